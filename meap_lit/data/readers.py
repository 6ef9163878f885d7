"""Documents and records out of many files, what cannot be read refused or counted."""

import glob
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from tqdm import tqdm

from meap_lit.data.formats import FORMATS, RECORD_FORMATS, Entry, Format, has_suffix, read_file
from meap_lit.errors import UserError

Item = TypeVar("Item")

SKIP_HINT = "use --on_error skip to leave such lines out"


class Reader(ABC, Generic[Item]):
    """Iterates over the items of many files, one file after the other.

    Args:
        files: Files to read, as `find_files` returns them.
        formats: `FORMATS` or `RECORD_FORMATS`; a file of another ending is plain text.
        on_error: `stop` raises at the first item that cannot be read, `skip` counts it.
        column: The only column to read of a Parquet file, all if not given.

    Raises:
        UserError: While iterating; names file and line. A file that cannot be opened, a missing package and a Parquet
            file without the column are never skipped.
    """

    def __init__(
        self,
        files: Sequence[Path],
        formats: Mapping[str, Format],
        on_error: Literal["stop", "skip"],
        column: str | None = None,
    ) -> None:
        self.files = files
        self.formats = formats
        self.on_error = on_error
        self.column = column
        self.num_skipped = 0
        self.bytes_read = 0
        """Bytes of the files on disk that have been read so far."""
        self.sizes = [_size(file) for file in files]

    @abstractmethod
    def convert(self, entry: Entry) -> Item:
        """The item of an entry whose content was read.

        Raises:
            UserError: If it holds none.
        """

    def __iter__(self) -> Iterator[Item]:
        finished = 0
        for path, size in zip(self.files, self.sizes, strict=True):
            for entry in read_file(path, self.formats, self.column):
                self.bytes_read = finished + entry.position
                try:
                    if isinstance(entry.content, UserError):
                        raise entry.content
                    item = self.convert(entry)
                except UserError as error:
                    if self.on_error == "stop":
                        raise UserError(f"{error}; {SKIP_HINT}") from error
                    self.num_skipped += 1
                else:
                    yield item
            finished += size
            self.bytes_read = finished

    def progress_bar(self, description: str) -> tqdm:
        """A bar over the bytes of the files, for the caller to move."""
        # a log file gets a line every half minute instead of ten a second
        seconds = 0.1 if sys.stderr.isatty() else 30
        return tqdm(total=sum(self.sizes), desc=description, unit="B", unit_scale=True, mininterval=seconds)


class DocumentReader(Reader[str]):
    """Iterates over the documents of many files: plain texts, and one text field of records.

    Args:
        files: Files to read, as `find_files` returns them.
        text_field: Name of the text in a JSON object or of the column in a Parquet file.
        on_error: `stop` raises at the first document that cannot be read, `skip` counts it.
    """

    def __init__(
        self, files: Sequence[Path], text_field: str = "text", on_error: Literal["stop", "skip"] = "stop"
    ) -> None:
        super().__init__(files, FORMATS, on_error, column=text_field)
        self.text_field = text_field

    def convert(self, entry: Entry) -> str:
        if isinstance(entry.content, str):
            return entry.content
        assert isinstance(entry.content, dict)
        if self.text_field not in entry.content:
            only = ", ".join(map(repr, entry.content)) or "an empty object"
            raise UserError(f"{entry.where}: no field {self.text_field!r}, only {only}")
        try:
            return check_text(self.text_field, entry.content[self.text_field])
        except UserError as error:
            raise UserError(f"{entry.where}: {error}") from error


@dataclass(frozen=True)
class Record:
    """A JSON object or a row of a table, and the file and line it stands in."""

    where: str
    fields: dict[str, Any]


class RecordReader(Reader[Record]):
    """Iterates over the records of many files.

    Args:
        files: Files to read, as `find_files` finds them by `RECORD_FORMATS`.
        on_error: `stop` raises at the first record that cannot be read, `skip` counts it.
    """

    def __init__(self, files: Sequence[Path], on_error: Literal["stop", "skip"] = "stop") -> None:
        super().__init__(files, RECORD_FORMATS, on_error)

    def convert(self, entry: Entry) -> Record:
        assert isinstance(entry.content, dict), "a plain text is no record"
        return Record(entry.where, entry.content)


def check_text(name: str, text: Any) -> str:
    """`text`, if it is a text that can be encoded.

    Raises:
        UserError: If it is not; names the field `name`.
    """
    if not isinstance(text, str):
        raise UserError(f"field {name!r} is not a string but {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may spell half of a surrogate pair
        raise UserError(f"field {name!r} holds a broken character (half of a surrogate pair)") from error
    return text


def find_files(
    inputs: Sequence[str], suffixes: Sequence[str] | None = None, formats: Mapping[str, Format] | None = None
) -> list[Path]:
    """Files named by paths, folders (all levels, hidden ones left out) and glob patterns, sorted, each once.

    Args:
        inputs: Paths, folders and patterns.
        suffixes: File name endings to take from folders, all of `formats` if not given.
        formats: Formats that may be named: `FORMATS`, those of documents, if not given, or `RECORD_FORMATS`.

    Raises:
        UserError: If an input names nothing, or a file of an ending that is neither known nor in `suffixes`.
    """
    formats = FORMATS if formats is None else formats
    wanted = [suffix if suffix.startswith(".") else f".{suffix}" for suffix in suffixes or formats]
    found: dict[str, Path] = {}
    for name in inputs:
        for path in _expand(name, wanted, formats):
            found.setdefault(os.path.realpath(path), path)
    if not found:
        raise UserError("no input named; give files, folders or patterns with --input")
    return sorted(found.values(), key=Path.as_posix)


def _expand(name: str, wanted: Sequence[str], formats: Mapping[str, Format]) -> list[Path]:
    path = Path(name).expanduser()
    if path.exists():
        named = [path]
    elif glob.has_magic(name):
        named = [Path(match) for match in glob.glob(str(path), recursive=True)]
    else:
        raise UserError(f"input {name} does not exist")
    files = []
    for entry in named:
        if entry.is_dir():
            files += _files_in(entry, wanted)
        elif has_suffix(entry, [*formats, *wanted]):
            files.append(entry)
        else:
            hint = "; name its ending in --suffixes to read it as plain text" if formats is FORMATS else ""
            raise UserError(f"input file {entry} ends in none of {', '.join(formats)}{hint}")
    if not files:
        raise UserError(f"input {name} holds no file that ends in {', '.join(wanted)}")
    return files


def _files_in(folder: Path, wanted: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".") and has_suffix(Path(name), wanted)]
    return files


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
