"""The exception for wrong input, and the system's errors of a full disk."""

import errno
import math

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""A full disk, an exhausted quota, a read-only file system."""


class UserError(ValueError):
    """Wrong input. The message names the key or file, the value, and the fix.

    The command line prints it as one line and exits with status 2. Any other exception is a bug of this package and
    keeps its traceback.
    """


def shorten(text: str, limit: int = 100) -> str:
    """Return `text`, without its middle if it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    head = limit * 2 // 3
    return f"{text[:head]}... ({len(text):,} characters) ...{text[-(limit - head) :]}"


def printable(text: str) -> str:
    """Return `text` as one line, with escapes such as `\\x1b` for characters that control a terminal."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in " ".join(text.split()))


def fix_of_disk(error: OSError) -> str:
    """Return what a user can do about an error in `NO_SPACE`."""
    return "name another folder" if error.errno == errno.EROFS else "free some space or name another folder"


def in_one_line(error: BaseException) -> str:
    """Return the message of an exception without line breaks, or its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def check_range(name: str, value: float | None, bounds: str, hint: str = "") -> None:
    """Refuse a number outside of an interval; None, which leaves an option open, passes.

    Args:
        name: Key of the value, for the message.
        value: The number; infinity and NaN are outside of every interval.
        bounds: The interval in mathematical notation, such as "[1, inf)" or "(0, 1]".
        hint: What to write instead, appended to the message.

    Raises:
        UserError: If the number is outside.
    """
    low, high = bounds[1:-1].split(", ")
    if value is None or (
        (value >= float(low) if bounds[0] == "[" else value > float(low))
        and (value <= float(high) if bounds[-1] == "]" else value < float(high))
    ):
        return
    wanted = f"in {bounds}" if high != "inf" else f"at least {low}" if bounds[0] == "[" else f"above {low}"
    finite = " and finite" if high == "inf" and value == math.inf else ""
    raise UserError(
        f"{name} must be {wanted}{finite}, got {value if isinstance(value, int) else format(value, 'g')}{hint}"
    )
