"""Read files: .txt, .md, .json, .jsonl (plain, gzip, zstandard) and .parquet.

Lines and rows are read as a stream, so such a file may be larger than memory, but a line has at most `MAX_LINE_BYTES`.
A plain text file is one document and a .json file, which only holds records, is read whole.
"""

import gzip
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, NamedTuple

import zstandard

from meap_lit.data.store.remote import RemoteFile
from meap_lit.errors import UserError
from meap_lit.files import BYTE_ORDER_MARK, check_object, decode, parse_json, why_no_text

MAX_LINE_BYTES = 1 << 28
"""Longest line of a .jsonl file, decompressed: 256 MiB."""


InputFile = Path | RemoteFile
"""A file to read. Both classes have `name` and `open`, and their text names the file in messages."""


class Span(NamedTuple):
    """A range of bytes of a file. It has the lines that begin in it, and the row groups whose middle row is in it."""

    start: int
    stop: int


class Entry(NamedTuple):
    """One text, line, element or row of a file."""

    position: int
    """Bytes of the file that have been read."""
    where: str
    """File and line, for messages."""
    content: str | dict[str, Any] | UserError
    """A plain text, the fields of a record, or why there is neither."""
    ends_file: bool = False
    """Whether the rest of the file cannot be read, which may hold any number of entries."""


Format = Callable[[InputFile, IO[bytes], Span, str | None], Iterator[Entry]]
"""Reads a span of a file; the last argument is the only column to read of a Parquet file."""

_ZSTD_WINDOW = 1 << 31  # bytes, the largest that `zstd --long=31` writes; the frame says how many it takes

DIVISIBLE = (".jsonl", ".parquet")
"""File name endings of files that can be read by spans; others are read whole, whatever the span."""


def read_file(path: InputFile, formats: Mapping[str, Format], span: Span, column: str | None = None) -> Iterator[Entry]:
    """Yield the entries of a file or, if it is `DIVISIBLE`, of a span of it; of a Parquet file only `column`, if given.

    The ending of its name tells how it is read; an unknown one is plain text. Spans that divide a file divide its
    entries: each belongs to one of them. A line that cannot be read is an entry.

    Raises:
        UserError: If the file cannot be read at all.
    """
    read = next((read for suffix, read in formats.items() if has_suffix(path, [suffix])), _read_text)
    try:
        with path.open("rb") as file:
            yield from read(path, file, span, column)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise UserError(f"not enough memory to read {path}; write its documents as lines of a .jsonl file") from error


def has_suffix(path: InputFile, suffixes: Sequence[str]) -> bool:
    """Return whether a file name ends in one of `suffixes`, in whatever case."""
    return path.name.lower().endswith(tuple(suffix.lower() for suffix in suffixes))


def _read_text(path: InputFile, file: IO[bytes], span: Span, column: str | None) -> Iterator[Entry]:
    raw = file.read()
    yield _entry(len(raw), str(path), decode, raw)


def _entry(position: int, where: str, parse: Callable[..., Any], *arguments: Any) -> Entry:
    """Return an entry with what `parse(*arguments, where)` returns, or why it raises `UserError`."""
    try:
        return Entry(position, where, parse(*arguments, where))
    except UserError as error:
        return Entry(position, where, error)


def _read_json(path: InputFile, file: IO[bytes], span: Span, column: str | None) -> Iterator[Entry]:
    """Yield the objects of an array, or one object."""
    raw, name = file.read(), str(path)
    try:
        content = parse_json(decode(raw, name), name, mark_repeated=True)
    except UserError as error:
        yield Entry(len(raw), name, error, ends_file=True)
        return
    if not isinstance(content, list):
        yield _entry(len(raw), name, check_object, content)
        return
    for number, element in enumerate(content, start=1):
        yield _entry(len(raw) * number // len(content), f"{path}, element {number}", check_object, element)


def _read_parquet(path: InputFile, file: IO[bytes], span: Span, column: str | None) -> Iterator[Entry]:
    import pyarrow.parquet  # here because it takes a while, and few inputs need it

    size = os.fstat(file.fileno()).st_size
    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if column is not None and column not in names:
            raise UserError(f"{path} has no column {column!r}; it has {', '.join(names)}: name one by --text_field")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{path} has more than one column {twice[0]!r}; rename or remove one")
        row, groups = _row_groups(table.metadata, size, span)
        columns = None if column is None else [column]
        for batch in table.iter_batches(batch_size=256, row_groups=groups, columns=columns):
            for number in range(batch.num_rows):
                row += 1
                where = f"{path}, row {row}"
                yield _entry(size * row // table.metadata.num_rows, where, _row, batch, number)
    except (pyarrow.ArrowException, OSError) as error:
        reason = UserError(f"{path}, row {row + 1}: cannot be read as Parquet ({_first_line(error)})")
        yield Entry(size, str(path), reason, ends_file=True)


_TABLES: dict[str, Format] = {
    ".jsonl": lambda path, file, span, column: _parse_lines(path, file, _lines_of(file, span), span.start),
    ".jsonl.gz": lambda path, file, span, column: _parse_lines(path, file, _gzip_lines(file)),
    ".jsonl.zst": lambda path, file, span, column: _parse_lines(path, file, _split_lines(_decompress_zstd(file))),
    ".parquet": _read_parquet,
}
FORMATS: dict[str, Format] = {".txt": _read_text, ".md": _read_text, **_TABLES}
"""File name endings of documents and how they are read."""

RECORD_FORMATS: dict[str, Format] = {".json": _read_json, **_TABLES}
"""File name endings of records and how they are read."""


def _parse_lines(path: InputFile, file: IO[bytes], lines: Iterable[bytes], start: int = 0) -> Iterator[Entry]:
    """Yield the JSON object of each line that is not blank. Damaged compression ends the file with an error.

    A line of a span that starts at byte `start` is named by the byte at which it begins: its number is not known.
    """
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}" if start == 0 else f"{path}, byte {file.tell() - len(line)}"
            is_first = number == 1 and start == 0
            if is_first:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if line.strip():
                entry = _entry(file.tell(), where, _parse_line, line)
                if is_first and isinstance(entry.content, UserError) and line.lstrip().startswith(b"["):
                    reason = UserError(
                        f"{where}: begins a JSON array, but a .jsonl file has an object on each line; write it so, or "
                        f"give a file of conversations the ending .json"
                    )
                    entry = entry._replace(content=reason)
                yield entry
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        where = f"{path}, line {number + 1}"
        reason = UserError(f"{where}: damaged or cut compressed file ({_first_line(error)})")
        yield Entry(file.tell(), where, reason, ends_file=True)


def _lines_of(file: IO[bytes], span: Span) -> Iterator[bytes]:
    """Yield the lines that begin in the span."""
    lines = _lines(file)
    if span.start > 0:
        file.seek(span.start - 1)
        next(lines, None)  # a line of the span before, or only its line break
    for line in lines:
        if file.tell() - len(line) >= span.stop:
            return
        yield line


def _lines(file: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    """Yield the lines of a file; a line that is too long is cut after `MAX_LINE_BYTES` + 1 bytes."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES + 1)


def _gzip_lines(file: IO[bytes]) -> Iterator[bytes]:
    _refuse_empty(file)
    yield from _lines(gzip.GzipFile(fileobj=file))


def _refuse_empty(file: IO[bytes]) -> None:
    """Raise `EOFError` if a compressed file has no bytes at all, as an interrupted download leaves it."""
    if os.fstat(file.fileno()).st_size == 0:
        raise EOFError("the file is empty")


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise UserError(f"{where}: longer than {MAX_LINE_BYTES:,} bytes; divide it; each line is a document")
    try:
        text = line.strip().decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{where}: {why_no_text(line)}")
    return check_object(parse_json(text, where, mark_repeated=True), where)


def _row_groups(metadata: Any, size: int, span: Span) -> tuple[int, list[int]]:
    """Return the number of rows before the span's row groups, and the numbers of these, which are consecutive."""
    counts = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    firsts = [*accumulate(counts, initial=0)][:-1]
    groups = [
        number
        for number, (first, count) in enumerate(zip(firsts, counts, strict=True))
        if count and span.start <= size * (2 * first + count) // (2 * metadata.num_rows) < span.stop
    ]
    return firsts[groups[0]] if groups else 0, groups


def _row(batch: Any, number: int, where: str) -> dict[str, Any]:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = _without_nulls(column[number].as_py())
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not valid UTF-8") from error
        except (ValueError, OverflowError, LookupError, NotImplementedError) as error:
            # pyarrow raises these for values that Python cannot hold, such as a date after the year 9999
            raise UserError(f"{where}: column {name!r} cannot be read ({_first_line(error)})") from error
    return row


def _without_nulls(value: Any) -> Any:
    """Return a value without its null keys: in a table every object has the keys of all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in value]
    return value


def _decompress_zstd(file: IO[bytes]) -> Iterator[bytes]:
    """Yield blocks of decompressed bytes; raise `EOFError` if the stream is damaged or ends early.

    The library's own stream reader takes a file that ends within a frame for a whole one.
    """
    _refuse_empty(file)
    frame = None
    try:
        while block := file.read(1 << 12):  # which may become 2^15 times as much
            while block:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
                yield frame.decompress(block)
                block = b""
                if frame.eof:
                    block, frame = frame.unused_data, None
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error
    if frame is not None:
        raise EOFError("the file ends too early")


def _split_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield lines as `_lines` does, without their line breaks."""
    begun: list[bytes] = []  # pieces of a line whose end has not come yet
    size = 0
    for block in blocks:
        *ended, rest = block.split(b"\n")
        for piece in ended:
            yield b"".join([*begun, piece])
            begun, size = [], 0
        if size <= MAX_LINE_BYTES:
            begun.append(rest)
            size += len(rest)
    if line := b"".join(begun):
        yield line


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
