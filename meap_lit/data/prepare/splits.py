"""Assign documents to the training and the validation split, by a hash of their text."""

import hashlib
from collections.abc import Callable
from typing import Any

from meap_lit.data.store.chunks import Split
from meap_lit.data.store.writers import ChunkWriter
from meap_lit.errors import UserError, check_range

RESERVE = "reserve"
"""Split of a part of a dataset that has no document for validation: what to use if no other part has any."""


def draw(text: bytes) -> float:
    """Return a number in [0, 1) that is equal for equal texts, so that copies are never on both sides of a split."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest()) / 2**48  # 48 bits: exact in a float


class SplitWriter:
    """Write documents whose draw is below `val_share` into `val`, the others into `train`.

    A small corpus may have no such document. Until there is one, the document with the smallest draw is therefore kept
    back, with its copies, and becomes the validation split if nothing else did. `new_writer` returns the writer of a
    split, given its name.
    """

    def __init__(self, new_writer: Callable[[str], ChunkWriter], val_share: float) -> None:
        check_range("val_share", val_share, "[0, 1)", "; write 0.01 for 1%")
        self._new_writer = new_writer
        self._writers = {name: new_writer(name) for name in (("train", "val") if val_share > 0 else ("train",))}
        self._val_share = val_share
        self.reserve_draw: float | None = None
        """Draw of the documents in the split `reserve`; None without such a split."""
        self._reserve: list[Any] = []
        self._smallest_draw = 1.0
        self._draws: set[float] = set()  # at most two; a single one means that all texts are equal

    def add(self, document: Any, draw: float) -> None:
        """Write one document, or keep it back."""
        if len(self._draws) < 2:
            self._draws.add(draw)
        if draw < self._val_share:
            self._writers["val"].add(document)
        elif draw > self._smallest_draw or not self._lacks_val:
            self._writers["train"].add(document)
        else:
            if draw < self._smallest_draw:
                self._release("train")
            self._reserve.append(document)
            self._smallest_draw = draw

    @property
    def _lacks_val(self) -> bool:
        return "val" in self._writers and self._writers["val"].num_documents == 0

    def _release(self, name: str) -> None:
        for document in self._reserve:
            self._writers[name].add(document)
        self._reserve = []

    def close(self) -> dict[str, Split]:
        """Finish both splits; raise `UserError` if one of them is empty, since LitData could not open it."""
        self._release("val" if self._lacks_val else "train")
        if self._writers["train"].num_documents == 0:
            count = self._writers["val"].num_documents
            if len(self._draws) == 1:
                why = "the input has one sample, which the validation split takes"
                if count > 1:
                    why = f"all {count} samples have the same text, and equal texts go to the same split"
                raise UserError(f"{why}; add others, or set val_share to 0 for no validation split")
            raise UserError(
                f"no sample is left to train on: the validation split took all {count}; lower val_share, got "
                f"{self._val_share:g}, or set it to 0 for no validation split"
            )
        return {name: writer.close() for name, writer in self._writers.items()}

    def close_part(self) -> dict[str, Split]:
        """Finish the splits that have a document, such that the parts of a dataset hold what one run would.

        Whether documents that were kept back are needed for validation is known when all parts are there. Until then
        they are a split of their own, `RESERVE`.
        """
        if self._lacks_val and self._reserve:
            self._writers[RESERVE] = self._new_writer(RESERVE)
            self.reserve_draw = self._smallest_draw
            self._release(RESERVE)
        self._release("train")
        for name in [name for name, writer in self._writers.items() if writer.num_documents == 0]:
            self._writers.pop(name).folder.rmdir()  # LitData cannot open a folder without samples
        return {name: writer.close() for name, writer in self._writers.items()}
