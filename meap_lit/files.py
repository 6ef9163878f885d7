"""Files and folders that are written aside and renamed, so that whatever has its name is whole."""

import errno
import glob
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meap_lit.errors import UserError

_OWNER_FILE = ".owner.json"


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """An empty folder beside `output` that takes its name when the block ends well, and vanishes when it fails.

    What a killed run left behind is removed, recognised by its name and by the record of its process; a folder
    whose process still lives is left alone.
    """
    for old in output.parent.glob(f"{glob.escape(output.name)}.partial-*"):
        if _is_abandoned(old):
            shutil.rmtree(old)
    folder = output.parent / f"{output.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot make folder {output}: {error.strerror}") from error
    owner = folder / _OWNER_FILE
    try:
        owner.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        yield folder
        owner.unlink()
        try:
            os.rename(folder, output)
        except OSError as error:
            raise UserError(f"output folder {output} appeared while it was being made; nothing was replaced") from error
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left to make {output}; nothing was kept") from error
        raise


def is_unfinished(folder: Path) -> bool:
    """Whether a folder is one that `new_folder` has not renamed: it is being made, or a killed run left it behind."""
    return re.search(r"\.partial-[0-9a-f]{8}$", folder.name) is not None


def _is_abandoned(folder: Path) -> bool:
    if folder.is_symlink():  # somebody else's: what a run makes is a folder
        return False
    try:
        owner = json.loads((folder / _OWNER_FILE).read_text())
        host, pid = owner["host"], int(owner["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if host != socket.gethostname() or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False


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
