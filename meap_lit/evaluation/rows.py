"""Read the data files of tasks; read and append to files of answers. Errors name file, line and field."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meap_lit.data.read.formats import RECORD_FORMATS, Span, has_suffix, read_file
from meap_lit.data.read.readers import check_text
from meap_lit.errors import UserError
from meap_lit.files import local_path, parse_object


@dataclass(frozen=True)
class DataRow:
    """A JSON object of a data file. Each method returns a field as the type that it is named for.

    Args:
        where: File and line, and the field that holds it in another object.
        fields: The fields.

    Raises:
        UserError: In every method, if the field is missing or has another type.
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
            raise self.error(f"field {name!r} must be true or false, got {type(flag).__name__}")
        return flag

    def rows(self, name: str) -> "list[DataRow]":
        """Return a list of objects."""
        rows = [DataRow(f"{self.where}, {name}[{number}]", fields) for number, fields in enumerate(self.elements(name))]
        for row in rows:
            if not isinstance(row.fields, dict):
                raise row.error(f"must be a JSON object, got {type(row.fields).__name__}")
        return rows

    def elements(self, name: str) -> list[Any]:
        """Return a list of any type."""
        values = self.value(name)
        if not isinstance(values, list):
            raise self.error(f"field {name!r} must be a list, got {type(values).__name__}")
        return values

    def value(self, name: str) -> Any:
        """Return the field as it is."""
        if name not in self.fields:
            only = ", ".join(map(repr, self.fields)) or "an empty object"
            raise self.error(f"no field {name!r}, only {only}")
        return self.fields[name]

    def error(self, reason: str) -> UserError:
        """Return an error that names the row, to be raised by its reader."""
        return UserError(f"{self.where}: {reason}")

    def _checked_text(self, name: str, text: Any) -> str:
        try:
            return check_text(name, text)
        except UserError as error:
            raise self.error(str(error)) from error


def read_rows(path: str) -> Iterator[DataRow]:
    """Yield the rows of a data file (.jsonl, .jsonl.gz or another of `RECORD_FORMATS`), except empty lines.

    Raises:
        UserError: If the file does not exist or has no row, or a line is not a JSON object.
    """
    file = local_path(path)
    if not has_suffix(file, list(RECORD_FORMATS)):
        raise UserError(f"data file {path} must end in one of {', '.join(RECORD_FORMATS)}")
    if not file.is_file():
        raise UserError(f"data file {path} does not exist; the recipe names its source")
    is_empty = True
    for entry in read_file(file, RECORD_FORMATS, Span(0, file.stat().st_size)):
        if isinstance(entry.content, UserError):
            raise entry.content
        assert isinstance(entry.content, dict), "record formats have objects only"
        yield DataRow(entry.where, entry.content)
        is_empty = False
    if is_empty:
        raise UserError(f"data file {path} is empty")


def read_records(file: Path, keys: Sequence[str], author: str) -> list[dict[str, Any]]:
    """Return the records of a file that `append_records` wrote; none if it does not exist.

    A last line that a kill has cut is removed from the file.

    Args:
        file: The file.
        keys: Keys that every record has.
        author: Command or thing that wrote it, for messages.

    Raises:
        UserError: If another line is not such a record.
    """
    content = file.read_bytes() if file.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(file, len(whole))
    records = []
    for number, line in enumerate(whole.splitlines(), start=1):
        where = f"{file}:{number}"
        try:
            records.append(parse_object(line, where))
            _ = [records[-1][key] for key in keys]
        except (UserError, KeyError) as error:
            raise UserError(f"{where} is not an answer of {author} ({error}); remove that line") from error
    return records


def append_records(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Append records to a file; they are on disk when this returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as opened:
        opened.writelines(map(json_line, records))
        opened.flush()
        os.fsync(opened.fileno())


def json_line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
