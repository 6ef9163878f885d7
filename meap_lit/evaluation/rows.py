"""Rows of a task's data files; whatever is wrong with one is said by file, line and field."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meap_lit.data.read.formats import RECORD_FORMATS, Span, has_suffix, read_file
from meap_lit.data.read.readers import check_text
from meap_lit.errors import UserError


@dataclass(frozen=True)
class Row:
    """A JSON object of a data file. Its methods give a field of the type they are named for.

    Args:
        where: File and line, and which field if it is part of another object.
        fields: Its fields.

    Raises:
        UserError: By any method, if the field is missing or of another type.
    """

    where: str
    fields: Mapping[str, Any]

    def text(self, name: str) -> str:
        return self._checked_text(name, self.value(name))

    def texts(self, name: str) -> list[str]:
        return [self._checked_text(f"{name}[{number}]", text) for number, text in enumerate(self.elements(name))]

    def flag(self, name: str) -> bool:
        flag = self.value(name)
        if not isinstance(flag, bool):
            raise self.error(f"field {name!r} is neither true nor false but {type(flag).__name__}")
        return flag

    def rows(self, name: str) -> "list[Row]":
        """A list of objects."""
        rows = [Row(f"{self.where}, {name}[{number}]", fields) for number, fields in enumerate(self.elements(name))]
        for row in rows:
            if not isinstance(row.fields, dict):
                raise row.error(f"not a JSON object but {type(row.fields).__name__}")
        return rows

    def elements(self, name: str) -> list[Any]:
        """A list of whatever."""
        values = self.value(name)
        if not isinstance(values, list):
            raise self.error(f"field {name!r} is not a list but {type(values).__name__}")
        return values

    def value(self, name: str) -> Any:
        """Whatever the field holds."""
        if name not in self.fields:
            only = ", ".join(map(repr, self.fields)) or "an empty object"
            raise self.error(f"no field {name!r}, only {only}")
        return self.fields[name]

    def error(self, reason: str) -> UserError:
        """To be raised when the row is wrong in a way that only its reader knows."""
        return UserError(f"{self.where}: {reason}")

    def _checked_text(self, name: str, text: Any) -> str:
        try:
            return check_text(name, text)
        except UserError as error:
            raise self.error(str(error)) from error


def read_rows(path: str) -> Iterator[Row]:
    """The rows of a data file, .jsonl, .jsonl.gz or another of `RECORD_FORMATS`, in order; empty lines are passed over.

    Raises:
        UserError: While iterating, if there is no such file, it has no row, or a line is no JSON object.
    """
    file = Path(path).expanduser()
    if not has_suffix(file, list(RECORD_FORMATS)):
        raise UserError(f"data file {path} ends in none of {', '.join(RECORD_FORMATS)}")
    if not file.is_file():
        raise UserError(f"data file {path} does not exist; the recipe says where it comes from")
    is_empty = True
    for entry in read_file(file, RECORD_FORMATS, Span(0, file.stat().st_size)):
        if isinstance(entry.content, UserError):
            raise entry.content
        assert isinstance(entry.content, dict), "a plain text is no record"
        yield Row(entry.where, entry.content)
        is_empty = False
    if is_empty:
        raise UserError(f"data file {path} is empty")
