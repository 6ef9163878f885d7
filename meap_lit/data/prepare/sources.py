"""Record the local files that a step reads, and notice later that one has changed.

A file is compared by its name, its size and a SHA-256: of its content, or of 256 pieces of a larger file, since a core
hashes about 1 GB a second. A file of the recorded path, size and modification time counts as unchanged; any other file
is hashed again. Remote files are compared by name and size only, in step.py.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from meap_lit.data.read.find import RECORD_FILE
from meap_lit.data.read.formats import InputFile
from meap_lit.errors import UserError

_PIECE = 1 << 20
_NUM_PIECES = 256
"""Maximum number of pieces of a file to hash, which limits the time for files of hundreds of GB."""


class SourceFile(NamedTuple):
    """A local file as it was when a step read it."""

    path: str
    bytes: int
    time: int
    """Modification time in nanoseconds. It decides whether the file is hashed again, never whether it is the same."""
    sha256: str | None
    """Result of `hash_file`; None if the step does not read the file, or the file could not be read."""


def look_at(
    files: Iterable[InputFile], read: Iterable[InputFile], bar: tqdm, known: Iterable[SourceFile] = ()
) -> list[SourceFile]:
    """Return the local ones of `files` as they are now.

    Args:
        files: What a step names, in order.
        read: Those that it reads; the others are not hashed.
        bar: Progress, in bytes.
        known: The files as they were earlier; what has not changed since then is not hashed again.
    """
    before = {file.path: file for file in known}
    paths_read = {str(file) for file in read}
    found: list[SourceFile] = []
    for file in files:
        if not isinstance(file, Path):
            continue
        try:
            status = file.stat()  # before the file is read, so that a later change has another time
        except OSError:  # removed since it was found
            continue
        now = SourceFile(str(file), status.st_size, status.st_mtime_ns, None)
        was = before.get(now.path)
        if was is not None and was[:3] == now[:3]:
            now = was
            bar.update(now.bytes)
        elif now.path in paths_read:
            now = now._replace(sha256=hash_file(file, bar))
        found.append(now)
    return found


def hash_file(file: Path, bar: tqdm | None = None) -> str | None:
    """Return the SHA-256 of a file, as sha256sum prints it; None if the file cannot be read.

    For a file larger than 256 MiB, the hash covers its size and 256 evenly spaced pieces of 1 MiB, including the first
    and the last.
    """
    try:
        with open(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if size <= _NUM_PIECES * _PIECE:
                found = hashlib.file_digest(opened, "sha256")
            else:
                found = hashlib.sha256(str(size).encode())
                for number in range(_NUM_PIECES):
                    opened.seek((size - _PIECE) * number // (_NUM_PIECES - 1))
                    found.update(opened.read(_PIECE))
            if bar is not None:
                bar.update(size)
    except OSError:
        return None
    return found.hexdigest()


def is_same(before: Iterable[SourceFile], now: Iterable[SourceFile]) -> bool:
    """Return whether files have the same names and contents, in whatever folders they are.

    Files without a hash are compared by name and size only.
    """
    before, now = list(before), list(now)
    places = {file.path: file for file in before}
    for file in now:
        was = places.get(file.path, file)
        if was.bytes != file.bytes or (was.sha256 and file.sha256 and was.sha256 != file.sha256):
            return False
    # copies have other paths
    states = [Counter((Path(file.path).name, file.bytes, file.sha256) for file in files) for files in (before, now)]
    unknown = {key[:2] for state in states for key in state if key[2] is None}
    before_known, now_known = ({key: state[key] for key in state if key[:2] not in unknown} for state in states)
    return before_known == now_known


def read_sources(record: Mapping[str, Any], folder: Path) -> list[SourceFile] | None:
    """Return the files that a step recorded when it made `folder`; None if an earlier version made it.

    Raises:
        UserError: If the record is damaged.
    """
    entries = record.get("files")
    if entries is None:
        return None
    try:
        files = [SourceFile(**entry) for entry in entries]
        is_sound = all(
            isinstance(file.path, str)
            and isinstance(file.bytes, int)
            and isinstance(file.time, int)
            and isinstance(file.sha256, str | None)
            for file in files
        )
    except TypeError:  # not a list, or of entries with other fields
        is_sound = False
    if not is_sound:
        raise UserError(f"{folder / RECORD_FILE} is damaged; remove {folder} and make it again")
    return files
