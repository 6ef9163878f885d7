"""The exception for wrong input, and the system's errors of a full disk."""

import errno

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
