"""Read and write files: text and JSON with errors that name the file, and writes that leave a whole file or none."""

import errno
import fcntl
import glob
import json
import os
import re
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from meap_lit.errors import UserError

_PARTIAL = re.compile(r"\.partial-(?:(?P<pid>\d+)@(?P<namespace>.+)|[0-9a-f]{8})$")  # eight digits: of version 0.1
_SECONDS_PER_DAY = 86_400
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some Windows programs begin a file with it


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raise `UserError` if it cannot be read, or holds something else."""
    return parse_object(_read(file), str(file))


def parse_object(content: str | bytes, where: str) -> dict[str, Any]:
    """Return the JSON object of a text, as `parse_json` does any value."""
    return check_object(parse_json(content, where), where)


def check_object(value: Any, where: str) -> dict[str, Any]:
    """Return the value if it is a JSON object; otherwise raise `UserError` that begins with `where`."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object but {type(value).__name__}")
    return value


def read_text(file: Path) -> str:
    """Return the text of a file; raise `UserError` if it cannot be read, or is not UTF-8."""
    return decode(_read(file), str(file))


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error


class Repeated(dict[str, Any]):
    """A JSON object in which keys are given more than once; of each it holds the last value."""

    keys_repeated: set[str]


def parse_json(content: str | bytes, where: str, mark_repeated: bool = False) -> Any:
    """Return the value of JSON text, or of its bytes; raise `UserError` that begins with `where` if it is not valid.

    With `mark_repeated` an object with a key given more than once is a `Repeated`.
    """
    try:
        return json.loads(content, object_pairs_hook=_entries if mark_repeated else None)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise UserError(f"{where}: not valid JSON ({error.msg} at {line}column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{where}: not valid JSON ({reason})") from error


def _entries(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        entries = Repeated(entries)
        counts = Counter(key for key, _ in pairs)
        entries.keys_repeated = {key for key, count in counts.items() if count > 1}
    return entries


def decode(raw: bytes, path: str) -> str:
    """Return the text of a file; raise `UserError`, which names `path` and the line, if it holds none."""
    raw = raw.removeprefix(BYTE_ORDER_MARK)
    try:
        text = raw.decode("utf-8")
        position = raw.find(b"\0")
    except UnicodeDecodeError as error:
        position = error.start
    if position < 0:
        return text
    line = raw[:position].count(b"\n") + 1
    raise UserError(f"{path}, line {line}: {why_no_text(raw)}")


def why_no_text(raw: bytes) -> str:
    """Say why bytes are not UTF-8 text, with the fix where there is one."""
    sample = raw[:1000]
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or even + odd > len(sample) // 5:
        order = "BE" if raw.startswith(b"\xfe\xff") or even > odd else "LE"
        return f"UTF-16 instead of UTF-8; convert the file: iconv -f UTF-16{order} -t UTF-8 FILE > NEW"
    return "holds NUL bytes, which text never has" if b"\0" in raw else "not valid UTF-8"


def write_file(file: Path, content: str | bytes) -> None:
    """Write a file in one step: readers see its old content or the new, and a killed process leaves no half of it."""
    partial = partial_path(file)
    try:
        partial.unlink(missing_ok=True)  # left by an ended process with the same PID, or a planted link
        with open(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), "wb") as opened:
            opened.write(content.encode() if isinstance(content, str) else content)
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def local_path(name: str | Path) -> Path:
    """Return the path of a name that may begin with `~`; a user who does not exist is a part of the name."""
    return Path(os.path.expanduser(name))


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Provide an empty folder beside `output` that takes its name when the block ends well, and goes when it fails.

    What killed runs left behind is removed, see `is_abandoned`.
    """
    folder = partial_path(output)
    for old in output.parent.glob(f"{glob.escape(output.name)}.partial-*"):
        if old == folder or is_abandoned(old):  # left by an ended process with the same PID
            remove(old)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot make folder {output}: {error.strerror}") from error
    try:
        yield folder
        try:
            os.rename(folder, output)
        except OSError as error:
            if not os.path.lexists(output):
                raise
            raise UserError(f"output folder {output} appeared while it was being made; nothing was replaced") from error
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left to make {output}; nothing was kept") from error
        raise


def partial_path(path: Path) -> Path:
    """Return the name beside `path` under which this process writes it before it is whole, or removes it."""
    return path.parent / f"{path.name}.partial-{os.getpid()}@{_pid_namespace()}"


@cache
def _pid_namespace() -> str:
    """Return an identifier of this process's PID namespace: host name, boot ID and inode of the namespace.

    Containers may share a host name but not a PID namespace.
    """
    parts = [socket.gethostname()]
    with suppress(OSError):  # Linux alone has these files
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text()[:8])
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return "-".join(parts)


def hold(folder: Path, seconds: float = 30.0) -> int | None:
    """Lock a folder until `release`, or until this process and those that it has forked have ended.

    Processes that read data are forked. After a kill they end by themselves, within seconds. Other machines see the
    lock only where the file system passes it on.

    Args:
        folder: The folder.
        seconds: Maximum time to wait for another process, in seconds.

    Returns:
        The descriptor for `release`; None on a file system without locks.

    Raises:
        BlockingIOError: If another process still has the lock after `seconds` seconds.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise
            time.sleep(0.5)
        except OSError:
            os.close(descriptor)
            return None
        else:
            return descriptor


def release(descriptor: int) -> None:
    """Unlock a folder that `hold` has locked, also for forked processes, which have copies of the descriptor."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def is_partial(path: Path) -> bool:
    """Return whether a name is one of `partial_path`, which a kill may leave."""
    return _PARTIAL.search(path.name) is not None


def is_abandoned(path: Path) -> bool:
    """Return whether the process that wrote such a file or folder has ended.

    Processes of another host or container cannot be asked: theirs has ended if nothing was written for a day. False if
    the path goes meanwhile, since its owner has renamed or removed it.
    """
    match = _PARTIAL.search(path.name)
    if match is None or match["pid"] is None:
        return False
    if match["namespace"] != _pid_namespace():
        try:
            newest = max(file.lstat().st_mtime for file in (path, *path.rglob("*")))
        except FileNotFoundError:
            return False
        return time.time() - newest > _SECONDS_PER_DAY
    try:
        os.kill(int(match["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; nothing if there is none, or if another process removes it meanwhile."""
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(value: str, name: str) -> int:
    """Return the number of bytes in "64MB" (decimal units); raise `UserError`, which names the option, if it is not."""
    number, unit = value[:-2].strip(), value[-2:].upper()
    try:
        num_bytes = int(float(number) * _UNITS[unit])
    except (KeyError, OverflowError, ValueError):  # "infMB" overflows
        num_bytes = 0
    if num_bytes < 1:
        raise UserError(f"{name} must be a size in {', '.join(_UNITS)} such as 64MB, got {value!r}")
    return num_bytes


def run_versions(folder: Path) -> list[Path]:
    """Return the folders `version_0`, `version_1`, ... of a run, by their number."""
    numbered = ((re.fullmatch(r"version_(\d+)", run.name), run) for run in folder.glob("version_*"))
    return [run for _, run in sorted((int(match[1]), run) for match, run in numbered if match)]
