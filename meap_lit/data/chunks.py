"""LitData chunk folders of token ids: writing one, and checking that one is whole.

Documents of text are stored as one line of tokens, which a reader cuts into blocks of any length. Conversations are
stored as samples: `input_ids`, 1-D, and `answers`, [num_answers, 3], the positions start <= stop <= end of each answer
(see `duplication.Answer`). Their sizes stand in a table beside the chunks, so that packing reads no token.

LitData's own `optimize` is not used: it deletes files that are not its own, and a killed run of it can be taken for
a whole one. Its writer alone does neither, and one writer makes the layout independent of who tokenised.
"""

import dataclasses
import hashlib
import io
import json
import zipfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from meap_lit.errors import UserError

INDEX_FILE = "index.json"
SAMPLES_FILE = "samples.npz"
SHA256 = "sha256"
"""Key of the hash of a chunk's file in the index; LitData reads past it. Older datasets lack it."""

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


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
    except (KeyError, OverflowError, ValueError):  # "infMB" overflows
        num_bytes = 0
    if num_bytes < 1:
        raise UserError(f"{name} must be a size in {', '.join(_UNITS)} such as 64MB, got {value!r}")
    return num_bytes


@dataclass(frozen=True)
class Split:
    """Size of one split, the folder `train` or `val`."""

    documents: int
    """Documents of text, or conversations."""
    tokens: int
    fingerprint: str
    """Hex SHA-256 of what is stored, tokens and answers, and of its layout in chunks."""


@dataclass(frozen=True)
class ChatSplit(Split):
    """Size of one split of conversations."""

    answers: int
    answer_tokens: int
    """Supervised tokens: those of the answers and those that close them."""
    longest: int
    """Tokens of the longest conversation."""


class ChunkWriter(ABC):
    """Writes samples into the chunks of one folder, in the order they come.

    The files depend on the samples and the arguments only, byte for byte.

    Args:
        folder: Folder to write into; made if missing.
        dtype: Type of the tokens, uint16 or int32.
        chunk_bytes: Size at which a chunk is closed. A chunk holds whole samples, so one with a sample larger than
            this is larger.
        item_loader: LitData's loader that is to read the samples; its default if not given.
    """

    def __init__(self, folder: Path, dtype: np.dtype, chunk_bytes: int, item_loader: Any = None) -> None:
        # imported here because it takes seconds, and the processes that tokenise import this module too
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
        """Write what is left and the index, and check the result."""
        self._writer.done()
        # LitData would wait here for the indexes of every process that takes part in a distributed run
        (piece,) = self.folder.glob(f"*.{INDEX_FILE}")
        index = json.loads(piece.read_text())
        self._hash.update(json.dumps([index["config"]["data_format"], _layout(index)]).encode())
        fingerprint = self._hash.hexdigest()
        # LitData names the cache of a remote folder after this; its own choice is the time
        index["updated_at"] = fingerprint
        for chunk in index["chunks"]:
            chunk[SHA256] = _sha256(self.folder / chunk["filename"])
        (self.folder / INDEX_FILE).write_text(json.dumps(index, sort_keys=True))
        piece.unlink()
        split = Split(self.num_documents, self.num_tokens, fingerprint)
        check_index(index, split, str(self.folder))
        check_chunk_files(self.folder, index)
        return split


class TokenWriter(ChunkWriter):
    """Writes documents of text."""

    def __init__(self, folder: Path, dtype: np.dtype, chunk_bytes: int) -> None:
        from litdata.streaming.item_loader import TokensLoader

        super().__init__(folder, dtype, chunk_bytes, TokensLoader())

    def add(self, document: np.ndarray) -> None:
        """Append the tokens of one document, [N], N > 0, of the writer's dtype."""
        import torch

        self._append(torch.from_numpy(document), document)


class ChatWriter(ChunkWriter):
    """Writes conversations, and the table of their sizes."""

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
        """Write what is left, the index and the table, and check the result."""
        split = super().close()
        start, stop, end = np.concatenate(self._answers).T
        np.savez(
            self.folder / SAMPLES_FILE,
            num_tokens=np.array(self._num_tokens, dtype=np.int32),
            num_answers=np.array([len(answers) for answers in self._answers], dtype=np.int32),
            answer_tokens=np.stack([stop - start, end - stop], axis=1),
        )
        return ChatSplit(
            **dataclasses.asdict(split),
            answers=len(start),
            answer_tokens=int((end - start).sum()),
            longest=max(self._num_tokens),
        )


@dataclass(frozen=True)
class ChatIndex:
    """Sizes of the samples of one split of conversations, known without reading a token.

    Args:
        num_tokens: Tokens of each sample, [N] int32.
        num_answers: Answers of each sample, [N] int32.
        answer_tokens: Of each answer, sample after sample, the tokens of its own and those that close it, [A, 2] int32.
        chunk_sizes: Samples in each chunk.
    """

    num_tokens: np.ndarray
    num_answers: np.ndarray
    answer_tokens: np.ndarray
    chunk_sizes: list[int]

    @classmethod
    def parse(cls, table: bytes, index: dict[str, Any], folder: str) -> "ChatIndex":
        """Read the content of samples.npz and compare it with the index of the chunk folder.

        Raises:
            UserError: If it is damaged or belongs to other data.
        """
        chunk_sizes = [documents for documents, _ in _layout(index)]
        try:
            with np.load(io.BytesIO(table), allow_pickle=False) as arrays:
                result = cls(arrays["num_tokens"], arrays["num_answers"], arrays["answer_tokens"], chunk_sizes)
        except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{folder}/{SAMPLES_FILE} is damaged: {error}; prepare the dataset anew") from error
        found, expected = len(result.num_tokens), sum(chunk_sizes)
        if found != expected or result.num_answers.sum() != len(result.answer_tokens):
            raise UserError(
                f"{folder}/{SAMPLES_FILE} lists {found} samples with {len(result.answer_tokens)} answers, "
                f"{INDEX_FILE} {expected} samples; prepare the dataset anew"
            )
        return result


def check_index(index: dict[str, Any], split: Split, folder: str) -> None:
    """Compare the index of a chunk folder with what was written.

    Raises:
        UserError: If they differ, or it is no index.
    """
    try:
        unit = "tokens" if index["config"]["item_loader"] == "TokensLoader" else "documents"
        found = sum(tokens if unit == "tokens" else documents for documents, tokens in _layout(index))
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}/{INDEX_FILE} is damaged; prepare the dataset anew") from error
    expected = getattr(split, unit)
    if found != expected:
        raise UserError(
            f"{folder}/{INDEX_FILE} lists {found} {unit}, the manifest {expected}; prepare the dataset anew"
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


def check_chunk(folder: Path, chunk: dict[str, Any]) -> None:
    """Compare the content of a chunk's file in a local folder with its entry in the index.

    Raises:
        UserError: If they differ, or the file cannot be read.
    """
    file = folder / chunk["filename"]
    try:
        with open(file, "rb") as content:
            problem = chunk_problem(content, chunk)
    except OSError as error:
        raise UserError(f"cannot read chunk {file}: {error.strerror}; copy it again or prepare it anew") from error
    if problem is not None:
        raise UserError(f"chunk {file} {problem}; the dataset is damaged: copy it again or prepare it anew")


def chunk_problem(content: io.BufferedIOBase, chunk: dict[str, Any]) -> str | None:
    """What is wrong with the content of a chunk's file, or None; where the index has no hash, its size is compared."""
    size = content.seek(0, io.SEEK_END)
    if size != chunk["chunk_bytes"]:
        return f"has {size} bytes instead of {chunk['chunk_bytes']}"
    content.seek(0)
    if SHA256 in chunk and hashlib.file_digest(content, "sha256").hexdigest() != chunk[SHA256]:
        return f"has another SHA-256 than {INDEX_FILE} says"
    return None


def _sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _layout(index: dict[str, Any]) -> list[tuple[int, int]]:
    """Number of documents and of tokens in each chunk; of samples LitData does not count the tokens."""
    return [(chunk["chunk_size"], chunk["dim"] or 0) for chunk in index["chunks"]]
