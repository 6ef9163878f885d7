"""Describe LitData chunk folders of token ids, and check that one is whole.

Documents of text are stored as one line of tokens, which a reader cuts into blocks of any length. Conversations are
stored as samples: `input_ids`, 1-D, and `answers`, [num_answers, 3], the positions start <= stop <= end of each answer
(see `duplication.Answer`). Their sizes are in a table beside the chunks, so that packing reads no token.

LitData's own `optimize` is not used: it deletes files that are not its own, and a killed run of it can be taken for
a whole one. Its writer alone does neither, and one writer makes the layout independent of the processes that tokenize.
"""

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from meap_lit.errors import UserError, in_one_line
from meap_lit.files import parse_object

INDEX_FILE = "index.json"
SAMPLES_FILE = "samples.npz"
SHA256 = "sha256"
"""Key of the hash of a chunk's file in the index; LitData ignores it, older datasets lack it."""
MEND = "copy or prepare the dataset again"


@dataclass(frozen=True)
class Split:
    """Size of one split, the folder `train` or `val`."""

    documents: int
    """Documents of text, or conversations."""
    tokens: int
    fingerprint: str
    """Hex SHA-256 of what is stored, tokens and answers, and of its layout in chunks."""
    files: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    """Hex SHA-256 of each file that describes the chunks, by its name; the index has those of the chunks themselves.
    Empty in a dataset of manifest version 1."""


@dataclass(frozen=True)
class ChatSplit(Split):
    """Size of one split of conversations."""

    answers: int
    answer_tokens: int
    """Supervised tokens: those of the answers and those that close them."""
    longest: int
    """Tokens of the longest conversation."""


@dataclass(frozen=True)
class ChatIndex:
    """Sizes of the samples of one split of conversations, known without reading a token."""

    num_tokens: np.ndarray
    """Tokens of each sample, [N] int32."""
    num_answers: np.ndarray
    """Answers of each sample, [N] int32."""
    answer_tokens: np.ndarray
    """Of each answer, sample after sample, the tokens of its own and those that close it, [A, 2] int32."""
    chunk_sizes: list[int]
    """Samples in each chunk."""

    @classmethod
    def parse(cls, table: bytes, index: dict[str, Any], folder: str) -> "ChatIndex":
        """Read the content of samples.npz; raise `UserError` if it is damaged or not of the chunk folder's index."""
        chunk_sizes = [documents for documents, _ in layout(index)]
        try:
            # written without compression: an archive that unpacks to more than it is was made to fill the memory
            unpacked = sum(entry.file_size for entry in zipfile.ZipFile(io.BytesIO(table)).infolist())
            if unpacked > len(table):
                raise ValueError(f"its {len(table)} bytes unpack to {unpacked}")
            with np.load(io.BytesIO(table), allow_pickle=False) as arrays:
                result = cls(arrays["num_tokens"], arrays["num_answers"], arrays["answer_tokens"], chunk_sizes)
            found = [(array.dtype, *array.shape[1:]) for array in (result.num_tokens, result.num_answers)]
            if found != [(np.int32,)] * 2 or result.answer_tokens.shape[1:] != (2,):
                raise ValueError("its arrays have other shapes or types")
        except Exception as error:  # a damaged archive may fail in any way
            reason = in_one_line(error)
            raise UserError(f"{folder}/{SAMPLES_FILE} is damaged: {reason:.200}; prepare the dataset again") from error
        num_samples, expected = len(result.num_tokens), sum(chunk_sizes)
        if num_samples != expected or result.num_answers.sum() != len(result.answer_tokens):
            raise UserError(
                f"{folder}/{SAMPLES_FILE} lists {num_samples} samples with {len(result.answer_tokens)} answers, "
                f"{INDEX_FILE} {expected} samples; prepare the dataset again"
            )
        return result


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the files that describe the chunks in `folder`, by their names."""
    return {name: sha256_of(folder / name) for name in (INDEX_FILE, SAMPLES_FILE) if (folder / name).is_file()}


def check_hash(content: bytes, files: Mapping[str, str] | None, file: str) -> None:
    """Raise `UserError` unless the content of `file` has the hash that `files` of a `Split`, if given, have for it."""
    if files and hashlib.sha256(content).hexdigest() != files.get(file.rpartition("/")[2]):
        raise UserError(f"{file} is damaged: its SHA-256 differs from that in the manifest; {MEND}")


def parse_description(content: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object of a file that describes a dataset, or raise `UserError`."""
    try:
        return parse_object(content, where)
    except UserError as error:
        raise UserError(f"{error}; {MEND}") from error


def check_index(content: bytes, split: Split, folder: str) -> dict[str, Any]:
    """Parse the index of a chunk folder as `parse_index` does, and compare it with what the manifest says."""
    check_hash(content, split.files, f"{folder}/{INDEX_FILE}")
    index = parse_index(content, folder)
    unit = "tokens" if index["config"]["item_loader"] == "TokensLoader" else "documents"
    found = sum(tokens if unit == "tokens" else documents for documents, tokens in layout(index))
    expected = getattr(split, unit)
    if found != expected:
        raise UserError(
            f"{folder}/{INDEX_FILE} lists {found} {unit}, the manifest {expected}; prepare the dataset again"
        )
    return index


def parse_index(content: bytes, folder: str) -> dict[str, Any]:
    """Parse the index of a chunk folder and check that nothing in it leads elsewhere.

    LitData joins the names of chunks to its folder, and unpickles samples whose `data_format` says so. Only plain names
    and tensors pass.
    """
    where = f"{folder}/{INDEX_FILE}"
    index = parse_description(content, where)
    try:
        chunks, config = index["chunks"], index["config"]
        names = [chunk["filename"] for chunk in chunks]
        is_whole = bool(chunks) and len(set(names)) == len(names) and all(map(_is_chunk, chunks))
        is_whole &= config["item_loader"] in ("TokensLoader", "PyTreeLoader")
        is_whole &= config["item_loader"] != "TokensLoader" or all(_is_count(chunk["dim"]) for chunk in chunks)
        formats = config["data_format"]
        is_whole &= _is_plain_spec(json.loads(config["data_spec"])[1], len(formats))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} is damaged; {MEND}") from error
    outside = next((name for name in names if not isinstance(name, str) or not _CHUNK_NAME.fullmatch(name)), None)
    if outside is not None:
        raise UserError(
            f"{where} names a chunk {outside!r:.80}, which is not a plain file name such as chunk-0-0.bin; {MEND}"
        )
    foreign = next((name for name in formats if not isinstance(name, str) or not _DATA_FORMAT.fullmatch(name)), None)
    if foreign is not None:
        raise UserError(
            f"{where} stores samples as {foreign!r:.80}; only tensors are read, as meap_lit prepare writes them"
        )
    if not is_whole or any(config.get(name, "") is not None for name in ("compression", "encryption")):
        raise UserError(f"{where} is damaged, or not made by meap_lit prepare; {MEND}")
    return index


_CHUNK_NAME = re.compile(r"[A-Za-z0-9_-]+\.bin")
_DATA_FORMAT = re.compile(r"tensor|no_header_tensor:(15|16|20)")
"""LitData's serializers of tensors; the numbers are its own for int32 and uint16."""


def _is_chunk(chunk: dict[str, Any]) -> bool:
    sha256 = chunk.get(SHA256, "0" * 64)
    return (
        _is_count(chunk["chunk_bytes"])
        and _is_count(chunk["chunk_size"])
        and (chunk["dim"] is None or _is_count(chunk["dim"]))
        and re.fullmatch("[0-9a-f]{64}", sha256) is not None
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_plain_spec(spec: dict[str, Any], num_leaves: int) -> bool:
    """Return whether LitData puts `num_leaves` values back together as one tensor or a dict of them."""
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    if num_leaves == 1:
        return spec == leaf
    keys = json.loads(spec["context"])
    is_dict = spec["type"] == "builtins.dict" and sorted(keys) == ["answers", "input_ids"]
    return is_dict and num_leaves == 2 and spec["children_spec"] == [leaf, leaf]


def check_chunk_files(folder: Path, index: dict[str, Any]) -> None:
    """Raise `UserError` if a chunk of the index is missing in a local folder or has another size; none is read."""
    for chunk in index["chunks"]:
        file = folder / chunk["filename"]
        if not file.is_file():
            raise UserError(f"chunk {file} is missing; the dataset is incomplete: copy or prepare it again")
        size = file.stat().st_size
        if size != chunk["chunk_bytes"]:
            raise UserError(f"chunk {file} has {size} bytes instead of {chunk['chunk_bytes']}; {_DAMAGED}")


def check_chunk(folder: Path, chunk: dict[str, Any]) -> None:
    """Compare the content of a chunk's file in a local folder with its entry in the index; raise `UserError`."""
    file = folder / chunk["filename"]
    try:
        with open(file, "rb") as content:
            problem = chunk_problem(content, chunk)
    except OSError as error:
        raise UserError(f"cannot read chunk {file}: {error.strerror}; copy or prepare it again") from error
    if problem is not None:
        raise UserError(f"chunk {file} {problem}; {_DAMAGED}")


_DAMAGED = "the dataset is damaged: copy or prepare it again"


def chunk_problem(content: io.BufferedIOBase, chunk: dict[str, Any]) -> str | None:
    """Return what is wrong with the content of a chunk's file, or None; without a hash in the index, by its size."""
    size = content.seek(0, io.SEEK_END)
    if size != chunk["chunk_bytes"]:
        return f"has {size} bytes instead of {chunk['chunk_bytes']}"
    content.seek(0)
    if SHA256 in chunk and hashlib.file_digest(content, "sha256").hexdigest() != chunk[SHA256]:
        return f"differs from its SHA-256 in {INDEX_FILE}"
    return None


def sha256_of(file: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def layout(index: dict[str, Any]) -> list[tuple[int, int]]:
    """Return the number of documents and of tokens in each chunk; LitData counts no tokens of conversations."""
    return [(chunk["chunk_size"], chunk["dim"] or 0) for chunk in index["chunks"]]
