"""Tell the faults of storage that may pass from those that do not."""

from meap_lit.errors import UserError


class Passing(Exception):
    """A fault that another try may not meet."""


def fault_of_status(status: int, what: str, fault: str, hint: str) -> Exception:
    """Return the exception for the HTTP status of an answer: `Passing`, or a `UserError` that ends in `hint`."""
    if status >= 500 or status in (408, 429):
        return Passing(fault)
    return UserError(f"cannot read {what}: {fault}; {hint}")


def in_one_line(error: BaseException) -> str:
    """Return the message of an exception without line breaks, or its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
