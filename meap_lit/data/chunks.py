"""LitData chunk folders of token ids: writing one, and checking that one is whole.

LitData's own `optimize` is not used: it deletes files that are not its own, and a killed run of it can be taken for
a whole one. Its writer alone does neither, and one writer makes the layout independent of who tokenised.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from meap_lit.errors import UserError

INDEX_FILE = "index.json"

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(value: str, name: str) -> int:
    """Number of bytes in "64MB" (decimal units).

    Args:
        value: Number and unit.
        name: Name of the option, for the message.

    Raises:
        UserError: If it is not a number with a unit, or not above 0.
    """
    number, unit = value[:-2].strip(), value[-2:].upper()
    try:
        num_bytes = int(float(number) * _UNITS[unit])
    except (KeyError, ValueError):
        num_bytes = 0
    if num_bytes < 1:
        raise UserError(f"{name} must be a size in {', '.join(_UNITS)} such as 64MB, got {value!r}")
    return num_bytes


class TokenWriter:
    """Writes documents into the chunks of one folder, in the order they come.

    The files depend on the documents and the arguments only, byte for byte.

    Args:
        folder: Folder to write into; made if missing.
        dtype: uint16 or int32.
        chunk_bytes: Size at which a chunk is closed. A chunk holds whole documents, so one with a document larger than
            this is larger.
    """

    def __init__(self, folder: Path, dtype: np.dtype, chunk_bytes: int) -> None:
        # imported here because it takes seconds, and the processes that tokenise import this module too
        from litdata.streaming.item_loader import TokensLoader
        from litdata.streaming.writer import BinaryWriter

        self.folder = folder
        self.dtype = dtype
        self.num_documents = self.num_tokens = 0
        self._writer = BinaryWriter(str(folder), chunk_bytes=chunk_bytes, item_loader=TokensLoader())
        self._hash = hashlib.sha256()

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, [N], N > 0, of the writer's dtype."""
        import torch

        assert tokens.dtype == self.dtype, f"{tokens.dtype} among {self.dtype} would read back as garbage"
        assert len(tokens) > 0, "LitData cannot open a folder with an empty document"
        self._writer.add_item(self.num_documents, torch.from_numpy(tokens))
        self.num_documents += 1
        self.num_tokens += len(tokens)
        self._hash.update(tokens.tobytes())

    def close(self) -> str:
        """Write what is left and the index, and check the result.

        Returns:
            Hex SHA-256 of the tokens and of how they are laid out in chunks.
        """
        self._writer.done()
        # LitData would wait here for the indexes of every process that takes part in a distributed run
        (piece,) = self.folder.glob(f"*.{INDEX_FILE}")
        index = json.loads(piece.read_text())
        self._hash.update(json.dumps([index["config"]["data_format"], _layout(index)]).encode())
        fingerprint = self._hash.hexdigest()
        # LitData names the cache of a remote folder after this; its own choice is the time
        index["updated_at"] = fingerprint
        (self.folder / INDEX_FILE).write_text(json.dumps(index, sort_keys=True))
        piece.unlink()
        check_index(index, self.num_tokens, str(self.folder))
        check_chunk_files(self.folder, index)
        return fingerprint


def check_index(index: dict[str, Any], num_tokens: int, folder: str) -> None:
    """Compare the index of a chunk folder with the number of tokens that were written.

    Raises:
        UserError: If they differ.
    """
    found = sum(tokens for _, tokens in _layout(index))
    if found != num_tokens:
        raise UserError(
            f"{folder}/{INDEX_FILE} lists {found} tokens, the manifest {num_tokens}; prepare the dataset anew"
        )


def check_chunk_files(folder: Path, index: dict[str, Any]) -> None:
    """Look for every chunk of the index in a local folder; contents are not read.

    Raises:
        UserError: If one is missing or has another size.
    """
    for chunk in index["chunks"]:
        file = folder / chunk["filename"]
        if not file.is_file():
            raise UserError(f"chunk {file} is missing; the dataset is incomplete: copy it again or prepare it anew")
        size = file.stat().st_size
        if size != chunk["chunk_bytes"]:
            raise UserError(
                f"chunk {file} has {size} bytes instead of {chunk['chunk_bytes']}; "
                f"the dataset is damaged: copy it again or prepare it anew"
            )


def _layout(index: dict[str, Any]) -> list[tuple[int, int]]:
    """Number of documents and of tokens in each chunk."""
    return [(chunk["chunk_size"], chunk["dim"]) for chunk in index["chunks"]]
