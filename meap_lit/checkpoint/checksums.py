"""Whether a checkpoint is what was written: sizes and hashes of its files, and which checkpoint of a run is the newest.

A checkpoint is one file or a folder of shards (`.metadata`, `__*.distcp`, `meta.pt`). A folder keeps its checksums in
`checksums.json`; a file keeps them inside, as the comment of the ZIP archive that torch writes, so that a copy of the
file takes them along and one rename makes both visible.

A hash is sha256 over the sha256 of each 16 MiB piece: pieces are hashed in threads, and a CPU with SHA instructions
does 1.2 GB a second on one core where blake2b does 0.5 (AMD EPYC, Python 3.11).
"""

import hashlib
import json
import os
import pickle
import re
import struct
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from meap_lit.errors import UserError

CHECKSUMS_FILE = "checksums.json"
SHARDS_INDEX = ".metadata"
TRAINER_STATE = "meta.pt"
"""What Lightning puts beside the shards: everything but the weights and the optimizer's state."""

_PIECE = 16 << 20
_NUM_THREADS = 8
_HASH = "sha256 of the sha256 of each 16 MiB piece"
# end of central directory, the last record of a ZIP archive: signature, counts and offsets, length of the comment (the
# ZIP specification, APPNOTE 4.3.16)
_END = b"PK\x05\x06"
_END_SIZE = 22
_MAX_COMMENT = 0xFFFF


class Checksum(NamedTuple):
    """Size and hash of a file; of a checkpoint in one file, of all that comes before its comment's length."""

    bytes: int
    hash: str


class Damaged(UserError):
    """A checkpoint is not what was written."""


# ------------------------------------------------------------------------------------------ writing


def write_file(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint as one file, to the disk itself, without checksums."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        torch.save(dict(checkpoint), file)
        file.flush()
        os.fsync(file.fileno())


def read_file(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint in one file, its tensors mapped into memory rather than read.

    Raises:
        UserError: If it is damaged, has code in it, or is not a checkpoint.
    """
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"checkpoint {path} is damaged, or has code in it and so is not read") from error
    except Exception as error:  # a damaged archive may fail in any way
        raise UserError(f"checkpoint {path} is damaged or cut short, or not a checkpoint") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path} is not a checkpoint: it has no state_dict in it")
    return content


def checksums(path: Path, rank: int = 0, num_ranks: int = 1) -> dict[str, Checksum]:
    """Checksums of the files of the checkpoint `path` that fall to `rank`, by their name.

    A shard falls to the rank that wrote it, which has it in memory still.
    """
    if path.is_file():
        end = path.stat().st_size - 2
        return {path.name: Checksum(end, _hash(path, end))} if rank == 0 else {}
    names = [name for name in _files(path) if _owner(name) % num_ranks == rank]
    return {name: _checksum(path / name) for name in names}


def seal(path: Path, found: Mapping[str, Checksum]) -> None:
    """Put its checksums into a checkpoint that is whole."""
    if path.is_file():
        [checksum] = found.values()
        comment = json.dumps({"algorithm": _HASH, **checksum._asdict()}).encode()
        with open(path, "r+b") as file:
            file.seek(checksum.bytes)
            file.write(struct.pack("<H", len(comment)) + comment)
            file.flush()
            os.fsync(file.fileno())
        return
    content = {"algorithm": _HASH, "files": {name: found[name]._asdict() for name in sorted(found)}}
    with open(path / CHECKSUMS_FILE, "w") as file:
        json.dump(content, file, indent=2)
    for name in (CHECKSUMS_FILE, TRAINER_STATE, "."):  # torch has seen to the shards
        descriptor = os.open(path / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.is_file() and file.name != CHECKSUMS_FILE)


def _owner(name: str) -> int:
    match = re.match(r"__(\d+)_", name)
    return int(match[1]) if match else 0


def _checksum(file: Path) -> Checksum:
    size = file.stat().st_size
    return Checksum(size, _hash(file, size))


def _hash(file: Path, end: int) -> str:
    """Hash of the first `end` bytes."""
    with open(file, "rb") as opened, ThreadPoolExecutor(_NUM_THREADS) as threads:

        def piece(start: int) -> bytes:
            return hashlib.sha256(os.pread(opened.fileno(), min(_PIECE, end - start), start)).digest()

        return hashlib.sha256(b"".join(threads.map(piece, range(0, end, _PIECE)))).hexdigest()


# ------------------------------------------------------------------------------------------ checking


def recorded(path: Path) -> dict[str, Checksum] | None:
    """The checksums that the checkpoint `path` carries, by file; None if it was written without.

    Raises:
        Damaged: If the end of a file or a record is missing.
    """
    if path.is_file():
        comment = _comment(path)
        if not comment:
            return None
        checksum = _checksum_of(_parse(comment, path), path)
        if checksum.bytes + 2 + len(comment) != path.stat().st_size:
            raise Damaged(f"checkpoint file {path} is damaged: its checksums are of another size; {_OTHER}")
        return {path.name: checksum}
    record = path / CHECKSUMS_FILE
    if not record.is_file():
        return None
    files = _parse(record.read_bytes(), record).get("files")
    if not isinstance(files, dict) or not files.keys() >= {SHARDS_INDEX, TRAINER_STATE}:
        raise Damaged(f"checkpoint file {record} is damaged: it does not list the files of a checkpoint; {_OTHER}")
    outside = min((name for name in files if Path(name).name != name), default=None)
    if outside is not None:
        raise Damaged(f"checkpoint file {record} is damaged: it lists {outside!r:.80} outside the folder; {_OTHER}")
    return {name: _checksum_of(checksum, record) for name, checksum in files.items()}


def check(path: Path, hashes: bool = True, rank: int = 0, num_ranks: int = 1) -> None:
    """Compare a checkpoint that is about to be read with the checksums it carries; say on stderr if it has none.

    Args:
        path: A .ckpt file or a folder of shards.
        hashes: Compare hashes too, and not only sizes.
        rank: As for `verify`.
        num_ranks: As for `verify`.

    Raises:
        Damaged: If a file is missing, cut short or changed; the first one is named.
    """
    if not hashes:
        _refuse_parts(path, recorded(path))
        return
    unverified = verify(path, rank, num_ranks) is None
    if unverified and rank == 0 and path.absolute() not in _told:
        _told.add(path.absolute())
        print(f"note: checkpoint {path} carries no checksums, so its content is not verified", file=sys.stderr)


_told: set[Path] = set()
"""Checkpoints that this process has said to be unverified."""


def verify(path: Path, rank: int = 0, num_ranks: int = 1) -> int | None:
    """Compare the checkpoint `path` with the checksums it carries.

    Args:
        path: A .ckpt file or a folder of shards.
        rank: Hash only the files that fall to this one of `num_ranks`; sizes are compared by all.
        num_ranks: Number of ranks that share the files out.

    Returns:
        Number of files compared; None if the checkpoint carries no checksums and has all the parts that it needs.

    Raises:
        Damaged: If a file is missing, cut short or changed; the first one is named.
    """
    expected = recorded(path)
    _refuse_parts(path, expected)
    if expected is None:
        return None
    mine = [name for name in expected if _owner(name) % num_ranks == rank]
    for name in mine:
        file = path if path.is_file() else path / name
        if _hash(file, expected[name].bytes) != expected[name].hash:
            raise Damaged(f"checkpoint file {file} is damaged: its content is not what was written; {_OTHER}")
    return len(mine)


_OTHER = "name an earlier checkpoint"


def is_whole(path: Path) -> bool:
    """Whether all files of the checkpoint `path` are there in full size; their content is not read."""
    try:
        _refuse_parts(path, recorded(path))
    except Damaged:
        return False
    return True


def _refuse_parts(path: Path, expected: Mapping[str, Checksum] | None) -> None:
    if path.is_file():
        return  # its end was found
    names: Iterable[str] = expected if expected is not None else (SHARDS_INDEX, TRAINER_STATE)
    for name in names:
        file = path / name
        if not file.is_file():
            raise Damaged(f"checkpoint file {file} is missing; {_OTHER}")
        size = file.stat().st_size
        if expected is not None and size != expected[name].bytes:
            raise Damaged(
                f"checkpoint file {file} is damaged: it has {size} bytes where {expected[name].bytes} were written; "
                f"{_OTHER}"
            )


def _comment(file: Path) -> bytes:
    """The comment of the ZIP archive `file`."""
    with open(file, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        start = max(0, size - _END_SIZE - _MAX_COMMENT)
        opened.seek(start)
        tail = opened.read()
    end = tail.rfind(_END)
    if 0 <= end <= len(tail) - _END_SIZE:
        (length,) = struct.unpack_from("<H", tail, end + _END_SIZE - 2)
        if end + _END_SIZE + length == len(tail):
            return tail[end + _END_SIZE :]
    raise Damaged(f"checkpoint file {file} is cut short, or no checkpoint at all; {_OTHER}")


def _parse(content: bytes, file: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"checkpoint file {file} is damaged: its checksums cannot be read; {_OTHER}") from error
    if not isinstance(parsed, dict) or parsed.get("algorithm") != _HASH:
        kind = parsed.get("algorithm") if isinstance(parsed, dict) else parsed
        raise Damaged(f"checkpoint file {file} is damaged, or has checksums of a kind unknown here: {kind!s:.80}")
    return parsed


def _checksum_of(content: Any, file: Path) -> Checksum:
    try:
        checksum = Checksum(content["bytes"], content["hash"])
    except (KeyError, TypeError) as error:
        raise Damaged(f"checkpoint file {file} is damaged: its checksums cannot be read; {_OTHER}") from error
    if not isinstance(checksum.bytes, int) or not isinstance(checksum.hash, str):
        raise Damaged(f"checkpoint file {file} is damaged: its checksums cannot be read; {_OTHER}")
    return checksum


# ------------------------------------------------------------------------------------------ the newest of a run
