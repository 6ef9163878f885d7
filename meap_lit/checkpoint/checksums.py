"""Record and compare the sizes and hashes of a checkpoint's files.

A checkpoint's folder keeps them in `checksums.json`. A hash is sha256 over the sha256 of each 16 MiB piece: pieces are
hashed in threads, and a CPU with SHA instructions does 1.2 GB a second on one core where blake2b does 0.5 (AMD EPYC,
Python 3.11).
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from meap_lit.checkpoint.one_file import comment
from meap_lit.errors import UserError
from meap_lit.files import parse_json

CHECKSUMS_FILE = "checksums.json"
INDEX = ".metadata"
TRAINER_STATE = "meta.pt"
"""What Lightning puts beside the tensors: everything but the weights and the optimizers' states."""

_PIECE = 16 << 20
_NUM_THREADS = 8
_HASH = "sha256 of the sha256 of each 16 MiB piece"
_LENGTH = 2
"""Bytes of the length that precedes the comment of a ZIP archive (APPNOTE 4.3.16)."""


class Checksum(NamedTuple):
    """Size and hash of a file."""

    bytes: int
    hash: str


# ------------------------------------------------------------------------------------------ writing


def checksums(folder: Path, rank: int = 0, num_ranks: int = 1) -> dict[str, Checksum]:
    """Return the checksums of the files of a checkpoint that `rank` wrote, by their name.

    That rank still has them in memory.
    """
    names = [INDEX, TRAINER_STATE, *(file.name for file in folder.glob("__*.distcp"))]
    sizes = {name: (folder / name).stat().st_size for name in sorted(names) if _owner(name) % num_ranks == rank}
    return {name: Checksum(size, _hash(folder / name, size)) for name, size in sizes.items()}


def seal(folder: Path, found: Mapping[str, Checksum]) -> None:
    """Write the checksums of a checkpoint that is whole, and wait until it is on the disk."""
    content = {"algorithm": _HASH, "files": {name: found[name]._asdict() for name in sorted(found)}}
    (folder / CHECKSUMS_FILE).write_text(json.dumps(content, indent=2))
    for name in (CHECKSUMS_FILE, TRAINER_STATE, "."):  # torch has seen to the rest
        to_disk(folder / name)


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _owner(name: str) -> int:
    match = re.match(r"__(\d+)_", name)
    return int(match[1]) if match else 0


def _hash(file: Path, end: int) -> str:
    """Return the hash of the first `end` bytes."""
    with open(file, "rb") as opened, ThreadPoolExecutor(_NUM_THREADS) as threads:

        def piece(start: int) -> bytes:
            return hashlib.sha256(os.pread(opened.fileno(), min(_PIECE, end - start), start)).digest()

        return hashlib.sha256(b"".join(threads.map(piece, range(0, end, _PIECE)))).hexdigest()


# ------------------------------------------------------------------------------------------ checking


def recorded(path: Path) -> dict[str, Checksum] | None:
    """Return the checksums that a checkpoint carries, by file; None if it was written without.

    Args:
        path: A checkpoint's folder, or a file that an earlier version wrote, whose only name is "".

    Raises:
        UserError: If the record is damaged, or a file is missing or of another size; the first is named.
    """
    with reading(path):
        return _recorded_inside(path) if path.is_file() else _recorded_beside(path)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Report a checkpoint that is removed while this block reads it, for example by a run that is still training.

    Raises:
        UserError: If the checkpoint no longer exists when reading it fails; the original error is the cause.
    """
    try:
        yield
    except (OSError, UserError) as error:
        if path.exists():
            raise
        raise UserError(
            f"checkpoint {path} is gone, as a run removes its old ones; repeat the command (the folder of a run names "
            f"its newest)"
        ) from error


def _recorded_beside(path: Path) -> dict[str, Checksum] | None:
    record = path / CHECKSUMS_FILE
    if not record.is_file():
        compare_sizes(path, dict.fromkeys((INDEX, TRAINER_STATE)))
        return None
    files = _parse(record.read_bytes(), record).get("files")
    if not isinstance(files, dict) or not files.keys() >= {INDEX, TRAINER_STATE}:
        raise _damaged(record, "it does not list the files of a checkpoint")
    outside = min((name for name in files if Path(name).name != name), default=None)
    if outside is not None:
        raise _damaged(record, f"it lists {outside!r:.80} outside the folder")
    expected = {name: _checksum_of(checksum, record) for name, checksum in files.items()}
    compare_sizes(path, expected)
    return expected


def check(path: Path, hashes: bool = True, rank: int = 0, num_ranks: int = 1) -> None:
    """Do as `verify` before a checkpoint is read, without `hashes` by sizes only; say on stderr if it has no checksums.

    Raises:
        UserError: If a file is missing, cut short or changed; the first one is named.
    """
    if not hashes:
        recorded(path)
        return
    unverified = verify(path, rank, num_ranks) is None
    if unverified and rank == 0 and path.absolute() not in _told:
        _told.add(path.absolute())
        print(f"note: checkpoint {path} has no checksums, so its content is not verified", file=sys.stderr)


_told: set[Path] = set()
"""Checkpoints that this process has said to be unverified."""


def verify(path: Path, rank: int = 0, num_ranks: int = 1) -> int | None:
    """Compare a checkpoint with the checksums it carries.

    Args:
        path: As for `recorded`.
        rank: Hash only the files that this one of `num_ranks` would have written; all compare sizes.
        num_ranks: Number of ranks that divide the files among them.

    Returns:
        Number of files compared; None if the checkpoint carries no checksums and has all the files that it needs.

    Raises:
        UserError: If a file is missing, cut short or changed; the first one is named.
    """
    expected = recorded(path)
    if expected is None:
        return None
    mine = [name for name in expected if _owner(name) % num_ranks == rank]
    with reading(path):
        for name in mine:
            if _hash(path / name, expected[name].bytes) != expected[name].hash:
                raise _damaged(path / name, "its content is not what was written")
    return len(mine)


def is_whole(path: Path) -> bool:
    """Return whether all files of a checkpoint are there in full size; their content is not read."""
    try:
        recorded(path)
    except UserError:
        return False
    return True


def compare_sizes(folder: Path, expected: Mapping[str, Checksum | None]) -> None:
    """Compare the files of a checkpoint with what was written.

    Raises:
        UserError: If a file is missing or of another size; the first one is named.
    """
    for name, checksum in expected.items():
        file = folder / name
        try:
            size = file.stat().st_size if file.is_file() else None
        except FileNotFoundError:  # removed in between
            size = None
        if size is None:
            raise UserError(f"checkpoint file {file} is missing; {_FIX}")
        if checksum is not None and size != checksum.bytes:
            raise _damaged(file, f"it has {size} bytes where {checksum.bytes} were written")


_FIX = "name an earlier checkpoint"
_UNREADABLE = "its checksums cannot be read"


def _damaged(file: Path, why: str) -> UserError:
    return UserError(f"checkpoint file {file} is damaged: {why}; {_FIX}")


def _recorded_inside(file: Path) -> dict[str, Checksum] | None:
    """Return the checksum that version 0.1 put at the end of a checkpoint in one file, of all that comes before it."""
    content = comment(file)
    if not content:
        return None
    checksum = _checksum_of(_parse(content, file), file)
    if checksum.bytes + _LENGTH + len(content) != file.stat().st_size:
        raise _damaged(file, "its checksums are of another size")
    return {"": checksum}


def _parse(content: bytes, file: Path) -> dict[str, Any]:
    try:
        parsed = parse_json(content, str(file))
    except UserError as error:
        raise _damaged(file, _UNREADABLE) from error
    kind = parsed.get("algorithm") if isinstance(parsed, dict) else parsed
    if kind != _HASH:
        raise UserError(f"checkpoint file {file} is damaged, or has checksums of an unknown kind: {kind!s:.80}")
    return parsed


def _checksum_of(content: Any, file: Path) -> Checksum:
    match content:
        case {"bytes": int(size), "hash": str(found)}:
            return Checksum(size, found)
    raise _damaged(file, _UNREADABLE)
