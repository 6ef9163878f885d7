"""Provide the chunks of a split as local files, each verified before anything reads it.

LitData's own downloads are not used. It fetches in a thread whose failure it prints as a traceback, verifies nothing,
reads conversations from object storage sample by sample, and bounds its cache correctly only if chunks are read one
after the other. Here a chunk is fetched by the process that needs it, and LitData opens the folder of the cache as any
local dataset.

Processes share a cache through locks on its files, which the system takes back from a killed one:

    FILE.part  locked while it is being fetched; it has its final size from the start, so that its room is taken
    FILE       whole and verified; shared lock of each process that reads it
    .lock      held while files are removed to make room: oldest use first, and only what nobody has locked
"""

import contextlib
import fcntl
import hashlib
import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import partial
from io import BufferedRandom
from pathlib import Path
from typing import Any

from meap_lit.data.store.chunks import INDEX_FILE, check_chunk, check_hash, chunk_problem, parse_index
from meap_lit.data.store.remote import Storage
from meap_lit.errors import UserError
from meap_lit.files import local_path, write_file

NUM_HELD = 16
"""Chunks of a split that a process counts as in use: two windows of `order.ShuffledOrder`, since rows that are packed
together may come from both sides of a border."""


class LocalChunks:
    """A split in a local folder. Each chunk is verified before this process reads from it for the first time."""

    def __init__(self, path: str, files: Mapping[str, str] | None) -> None:
        self.folder = path
        index = Path(path, INDEX_FILE).read_bytes()
        check_hash(index, files, f"{path}/{INDEX_FILE}")
        self._chunks = parse_index(index, path)["chunks"]
        self._verified: set[int] = set()

    def ensure(self, number: int) -> None:
        """Raise `UserError` unless chunk `number` exists and is whole; to be called before LitData reads from it."""
        if number not in self._verified:
            check_chunk(Path(self.folder), self._chunks[number])
            self._verified.add(number)


class CachedChunks:
    """A split at a remote address. Each chunk is fetched into the cache when it is first needed."""

    def __init__(self, address: str, storage: Storage, files: Mapping[str, str] | None) -> None:
        self.address = address
        self.storage = storage
        self.root = local_path(storage.cache_dir or "~/.cache/meap_lit")
        index = storage.read(f"{address}/{INDEX_FILE}")
        check_hash(index, files, f"{address}/{INDEX_FILE}")
        self._chunks = parse_index(index, address)["chunks"]
        # another index, another folder: what was fetched for older data of this address is never taken for it
        name = hashlib.sha256(f"{address}\n".encode() + index).hexdigest()[:32]
        self.folder = str(self.root / name)
        try:
            os.makedirs(self.folder, exist_ok=True)
            file = Path(self.folder, INDEX_FILE)  # LitData reads it from there
            if not file.exists() or file.read_bytes() != index:
                write_file(file, index)
        except OSError as error:
            raise UserError(
                f"cannot write the cache {self.root}: {error.strerror}; name another data.cache_dir"
            ) from error
        self._held: OrderedDict[int, BufferedRandom] = OrderedDict()  # open files with a lock, the latest used last
        self._verified: set[int] = set()
        _caches.add(self)

    def ensure(self, number: int) -> None:
        """Fetch chunk `number` unless it is in the cache, whole, and keep it there while `NUM_HELD` others are read."""
        if number in self._held:
            self._held.move_to_end(number)
            return
        while len(self._held) >= NUM_HELD:
            self._held.popitem(last=False)[1].close()
        try:
            self._held[number] = self._hold(number)
        except OSError as error:
            raise UserError(
                f"cannot keep {self._file(number)}: {error.strerror}; name another data.cache_dir"
            ) from error

    def release(self) -> None:
        """Count no chunk as in use."""
        while self._held:
            self._held.popitem()[1].close()

    def _hold(self, number: int) -> BufferedRandom:
        """Return the file of a chunk, whole, under a shared lock."""
        file = self._file(number)
        while True:
            held = _lock(file, fcntl.LOCK_SH) or self._fetch(number)
            if held is None:
                time.sleep(0.02)  # another process fetches it; if it dies or gives up, its lock is free
                continue
            # its place in the queue for removal
            os.utime(held.fileno())
            if number not in self._verified:  # it may be of an earlier process and a machine that crashed
                if chunk_problem(held, self._chunks[number]) is not None:
                    file.unlink(missing_ok=True)
                    held.close()
                    continue
                self._verified.add(number)
            return held

    def _fetch(self, number: int) -> BufferedRandom | None:
        """Download a chunk and return its file as `_hold` does, or None if another process downloads it."""
        chunk, file = self._chunks[number], self._file(number)
        part = file.with_name(f"{file.name}.part")
        target = _lock(part, fcntl.LOCK_EX, create=True)
        if target is None:
            return None
        try:
            if file.exists():
                part.unlink()
                target.close()
                return None
            self._make_room(target, chunk["chunk_bytes"])
            self.storage.download(f"{self.address}/{chunk['filename']}", target, partial(chunk_problem, chunk=chunk))
            target.flush()
            os.replace(part, file)
            self._verified.add(number)
            fcntl.flock(target, fcntl.LOCK_SH)
        except BaseException:
            part.unlink(missing_ok=True)
            target.close()
            raise
        # changing the kind of lock is not one step: the file may just have been removed
        return target if _is_at(file, target) else None

    def _make_room(self, part: BufferedRandom, num_bytes: int) -> None:
        """Remove files of the whole cache until `num_bytes` more fit, and take the room with `part`."""
        part.truncate(0)
        if self.storage.cache_bytes is None:
            return
        with open(self.root / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            files = sorted(_files(self.root))
            excess = sum(size for _, size, _ in files) + num_bytes - self.storage.cache_bytes
            for _, size, file in files:
                if excess <= 0:
                    break
                unused = _lock(file, fcntl.LOCK_EX)
                if unused is not None:
                    file.unlink()
                    unused.close()
                    excess -= size
            part.truncate(num_bytes)

    def _file(self, number: int) -> Path:
        return Path(self.folder, self._chunks[number]["filename"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": OrderedDict()}  # open files stay in their process


def open_chunks(path: str, storage: Storage, files: Mapping[str, str] | None) -> LocalChunks | CachedChunks:
    """Return the chunks of the split at `path`, a folder or an address.

    Raises:
        UserError: If the index has not the hash in `files`, those of the manifest: the split was replaced since.
    """
    return CachedChunks(path, storage, files) if "://" in path else LocalChunks(path, files)


_caches: weakref.WeakSet[CachedChunks] = weakref.WeakSet()


def _release_all() -> None:
    for cache in _caches:
        cache.release()


# a fork would keep its parent's chunks locked as long as it lives
os.register_at_fork(after_in_child=_release_all)


def _lock(path: Path, kind: int, create: bool = False) -> BufferedRandom | None:
    """Open and lock the file at `path`; return None if it does not exist or another process has locked it."""
    try:
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
    except FileNotFoundError:
        if create:  # the folder is gone
            raise
        return None
    file = os.fdopen(descriptor, "r+b")
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    if not _is_at(path, file):  # removed, and perhaps made again, between opening and locking it
        file.close()
        return None
    return file


def _is_at(path: Path, file: BufferedRandom) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _files(root: Path) -> Iterator[tuple[int, int, Path]]:
    """Yield time of last use, size and path of every chunk in the cache, also of those that are being fetched."""
    for path in root.glob(f"{'[0-9a-f]' * 32}/*"):  # nobody else's files, whatever folder the cache was given
        if path.name.startswith(INDEX_FILE):
            continue
        with contextlib.suppress(FileNotFoundError):  # it was renamed meanwhile
            stat = path.stat()
            yield stat.st_mtime_ns, stat.st_size, path
