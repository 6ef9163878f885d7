"""Read documents and records of many files, or of one part of them; refuse or count what cannot be read."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from meap_lit.data.read.find import size_of
from meap_lit.data.read.formats import (
    DIVISIBLE,
    FORMATS,
    RECORD_FORMATS,
    Entry,
    Format,
    InputFile,
    Span,
    has_suffix,
    read_file,
)
from meap_lit.errors import UserError
from meap_lit.files import Repeated

SKIP_HINT = "use --on_error skip to leave out what cannot be read"


@dataclass(frozen=True)
class InputPart:
    """One of `count` parts of the input; together they read every document once, in order.

    Each part has an equal share of the bytes of all files in line. Files of many lines or row groups are divided. A
    file of another kind goes to the part that has its middle, so a part may be without any.
    """

    index: int = 0
    """From 0, as SLURM_ARRAY_TASK_ID of `--array=0-7`."""
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "InputPart":
        """Return the part that "3/8" names."""
        match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
        part = cls(int(match[1]), int(match[2])) if match else None
        if part is None or part.index >= part.count:
            raise UserError(
                f"shard must be i/n with i from 0 to n - 1, such as 0/8 for the first of eight and 7/8 for the last, "
                f"got {text!r}"
            )
        return part

    def spans(self, files: Sequence[InputFile], sizes: Sequence[int]) -> list[tuple[InputFile, Span]]:
        """Return what this part reads of `files`, which have `sizes` bytes."""
        lengths = [size + 1 for size in sizes]  # an empty file has a place too
        start, stop = (sum(lengths) * index // self.count for index in (self.index, self.index + 1))
        spans = []
        first = 0  # place of the file's first byte
        for file, size, length in zip(files, sizes, lengths, strict=True):
            if has_suffix(file, DIVISIBLE):
                if max(start, first) < min(stop, first + length):
                    spans.append((file, Span(max(start - first, 0), min(stop - first, size))))
            elif start <= first + size // 2 < stop:
                spans.append((file, Span(0, size)))
            first += length
        return spans


class Reader(ABC):
    """Iterates over the entries of many files, one file after the other: over all, or over a part of the input.

    At the first entry that cannot be read, `UserError` names file and line, unless `on_error` is `skip`, which counts
    it. The message names this option only if `on_error` is given. A file that cannot be opened and a Parquet file
    without the column are never skipped.
    """

    formats: ClassVar[Mapping[str, Format]]
    """How files are read, by the endings of their names; a file of another ending is plain text."""
    column: str | None = None
    """The only column that is read of a Parquet file."""

    def __init__(
        self,
        files: Sequence[InputFile],
        on_error: Literal["stop", "skip"] | None = None,
        part: InputPart | None = None,
    ) -> None:
        self.files = files
        self.on_error = on_error
        self.num_skipped = 0
        self.first_skipped = ""
        self.cut: list[InputFile] = []
        """Files whose end could not be read."""
        self.bytes_read = 0
        """Bytes on disk that have been read so far, of `num_bytes`."""
        self.sizes = [size_of(file) for file in files]
        self.spans = (part or InputPart()).spans(files, self.sizes)
        self.num_bytes = sum(span.stop - span.start for _, span in self.spans)

    @property
    def why_skipped(self) -> str:
        """Why the first item was skipped and which files were cut, as the end of a sentence; empty if none was."""
        why = f", first: {self.first_skipped}" if self.first_skipped else ""
        if self.cut:
            names = [*map(str, self.cut[:3]), *(["and others"] if len(self.cut) > 3 else [])]
            files = (
                "1 file was not read to its" if len(self.cut) == 1 else f"{len(self.cut)} files were not read to their"
            )
            why += f"; {files} end: {', '.join(names)}"
        return why

    @abstractmethod
    def convert(self, entry: Entry) -> Entry:
        """Return what is wanted of an entry whose content was read; raise `UserError` if it does not hold it."""

    def __iter__(self) -> Iterator[Entry]:
        finished = 0
        for file, span in self.spans:
            for entry in read_file(file, self.formats, span, self.column):
                # the last line or row group may reach out of the span
                self.bytes_read = finished + min(max(entry.position, span.start), span.stop) - span.start
                try:
                    if isinstance(entry.content, UserError):
                        raise entry.content
                    converted = self.convert(entry)
                except UserError as error:
                    if self.on_error != "skip":
                        raise UserError(f"{error}; {SKIP_HINT}" if self.on_error else str(error)) from error
                    self.num_skipped += 1
                    self.cut += [file] if entry.ends_file else []
                    self.first_skipped = self.first_skipped or str(error)
                else:
                    yield converted
            finished += span.stop - span.start
            self.bytes_read = finished


class TextReader(Reader):
    """Iterates over the documents of many files, plain texts and the field `text_field` of records: text entries."""

    formats = FORMATS

    def __init__(
        self,
        files: Sequence[InputFile],
        text_field: str = "text",
        on_error: Literal["stop", "skip"] | None = None,
        part: InputPart | None = None,
    ) -> None:
        super().__init__(files, on_error, part)
        self.column = self.text_field = text_field

    def convert(self, entry: Entry) -> Entry:
        if isinstance(entry.content, str):
            return entry
        assert isinstance(entry.content, dict)
        if self.text_field not in entry.content:
            only = ", ".join(map(repr, entry.content)) or "an empty object"
            raise UserError(f"{entry.where}: no field {self.text_field!r}, only {only}")
        if isinstance(entry.content, Repeated) and self.text_field in entry.content.keys_repeated:
            raise UserError(f"{entry.where}: field {self.text_field!r} is given more than once")
        try:
            return entry._replace(content=check_text(self.text_field, entry.content[self.text_field]))
        except UserError as error:
            raise UserError(f"{entry.where}: {error}") from error


def read_texts(files: Sequence[InputFile]) -> Iterator[str]:
    """Yield the documents of many files; raise `UserError` at the first one that cannot be read."""
    return (str(entry.content) for entry in TextReader(files))


class RecordReader(Reader):
    """Iterates over the records of many files, entries that hold their fields."""

    formats = RECORD_FORMATS

    def convert(self, entry: Entry) -> Entry:
        refuse_repeated(entry.where, entry.content)
        return entry


def refuse_repeated(where: str, value: Any) -> None:
    """Raise `UserError` if an object of nested JSON, as `parse_json` marks it, has a key more than once."""
    parts = [value]
    while parts:  # not recursive: JSON may be nested deeper than Python's stack
        part = parts.pop()
        if isinstance(part, Repeated):
            raise UserError(f"{where}: key {min(part.keys_repeated)!r} is given more than once in an object")
        if isinstance(part, dict | list):
            parts += part.values() if isinstance(part, dict) else part


def check_text(name: str, text: Any) -> str:
    """Return `text` if it is a text that can be encoded; otherwise raise `UserError`, which names the field `name`."""
    if not isinstance(text, str):
        raise UserError(f"field {name!r} is not a string but {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may spell half of a surrogate pair
        raise UserError(f"field {name!r} holds a broken character (half of a surrogate pair)") from error
    return text
