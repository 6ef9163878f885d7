"""Write token chunks in the format of LitData."""

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from meap_lit.data.store.chunks import (
    INDEX_FILE,
    SAMPLES_FILE,
    SHA256,
    ChatSplit,
    Split,
    check_chunk_files,
    check_index,
    hash_files,
    layout,
    sha256_of,
)


class ChunkWriter(ABC):
    """Write samples into the chunks of one folder, in the order they come, and with the same bytes whenever they do.

    A chunk is closed at `chunk_bytes`. It holds whole samples, so one with a sample larger than this is larger.
    `item_loader` is the one of LitData that is to read the samples; its default if not given.
    """

    def __init__(self, folder: Path, dtype: np.dtype, chunk_bytes: int, item_loader: Any = None) -> None:
        # imported here because it takes seconds, and the processes that tokenize import this module too
        from litdata.streaming.writer import BinaryWriter

        self.folder = folder
        self.dtype = dtype
        self.num_documents = self.num_tokens = 0
        self._writer = BinaryWriter(str(folder), chunk_bytes=chunk_bytes, item_loader=item_loader)
        self._hash = hashlib.sha256()

    @abstractmethod
    def add(self, document: Any) -> None:
        """Append one document."""

    def _append(self, sample: Any, tokens: np.ndarray, *others: np.ndarray) -> None:
        """Write one sample; `others` are the arrays that it holds beside its tokens, [N]."""
        assert tokens.dtype == self.dtype, f"{tokens.dtype} among {self.dtype} would read back as garbage"
        assert len(tokens) > 0, "LitData cannot open a folder with an empty document"
        self._writer.add_item(self.num_documents, sample)
        self.num_documents += 1
        self.num_tokens += len(tokens)
        for array in (tokens, *others):
            self._hash.update(array.tobytes())

    def close(self) -> Split:
        """Write what is left and the index, check the result, and return its size."""
        self._writer.done()
        # LitData would wait here for the indexes of every process that takes part in a distributed run
        (piece,) = self.folder.glob(f"*.{INDEX_FILE}")
        index = json.loads(piece.read_text())
        self._hash.update(json.dumps([index["config"]["data_format"], layout(index)]).encode())
        fingerprint = self._hash.hexdigest()
        # LitData names the cache of a remote folder after this; its own choice is the time
        index["updated_at"] = fingerprint
        for chunk in index["chunks"]:
            chunk[SHA256] = sha256_of(self.folder / chunk["filename"])
        (self.folder / INDEX_FILE).write_text(json.dumps(index, sort_keys=True))
        piece.unlink()
        split = Split(self.num_documents, self.num_tokens, fingerprint, files=hash_files(self.folder))
        check_chunk_files(self.folder, check_index((self.folder / INDEX_FILE).read_bytes(), split, str(self.folder)))
        return split


class TokenWriter(ChunkWriter):
    """Write documents of text."""

    def __init__(self, folder: Path, dtype: np.dtype, chunk_bytes: int) -> None:
        from litdata.streaming.item_loader import TokensLoader

        super().__init__(folder, dtype, chunk_bytes, TokensLoader())

    def add(self, document: np.ndarray) -> None:
        """Append the tokens of one document, [N], N > 0, of the writer's dtype."""
        import torch

        self._append(torch.from_numpy(document), document)


class ChatWriter(ChunkWriter):
    """Write conversations, and the table of their sizes."""

    def __init__(self, folder: Path, dtype: np.dtype, chunk_bytes: int) -> None:
        super().__init__(folder, dtype, chunk_bytes)
        self._num_tokens: list[int] = []
        self._answers: list[np.ndarray] = []

    def add(self, document: tuple[np.ndarray, np.ndarray]) -> None:
        """Append one conversation: tokens, [N], of the writer's dtype, and answers, [A, 3], int32; N and A > 0."""
        import torch

        tokens, answers = document
        assert answers.dtype == np.int32
        assert len(answers) > 0, "a conversation without answer has nothing to learn"
        arrays = {"input_ids": torch.from_numpy(tokens), "answers": torch.from_numpy(answers)}
        self._append(arrays, tokens, answers)
        self._num_tokens.append(len(tokens))
        self._answers.append(answers)

    def close(self) -> ChatSplit:
        """Write what `ChunkWriter.close` does, and the table."""
        split = super().close()
        start, stop, end = np.concatenate(self._answers).T
        np.savez(
            self.folder / SAMPLES_FILE,
            num_tokens=np.array(self._num_tokens, dtype=np.int32),
            num_answers=np.array([len(answers) for answers in self._answers], dtype=np.int32),
            answer_tokens=np.stack([stop - start, end - stop], axis=1),
        )
        return ChatSplit(
            **dataclasses.asdict(split) | {"files": hash_files(self.folder)},
            answers=len(start),
            answer_tokens=int((end - start).sum()),
            longest=max(self._num_tokens),
        )
