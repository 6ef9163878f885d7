"""The one exception that a user can cause and mend, and the errors of the system that a full disk makes."""

import errno

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""A disk that is full, a quota that is used up, a file system that only reads."""


class UserError(ValueError):
    """Wrong input: the message names the key or file, the value, and what would be right.

    The command line prints it as a single line and exits with status 2; anything else is a bug of ours
    and keeps its traceback.
    """


def shorten(text: str, limit: int = 100) -> str:
    """Return `text` without its middle if it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    head = limit * 2 // 3
    return f"{text[:head]}... ({len(text):,} characters) ...{text[-(limit - head) :]}"
