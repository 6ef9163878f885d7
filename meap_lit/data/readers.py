"""Documents out of text files: .txt, .md, .jsonl (plain, gzip, zstandard) and .parquet.

Everything but plain text is read as a stream, so a file may be larger than memory. A plain text file is one document.
"""

import glob
import gzip
import importlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Literal

from meap_lit.errors import UserError

Record = tuple[int, str | UserError]
"""How many bytes of the file have been read, and a document or, in its place, why it cannot be read."""


class DocumentReader:
    """Iterates over the documents of many files, one file after the other.

    Args:
        files: Files to read, as `find_files` returns them.
        text_field: Name of the text in a JSON object or of the column in a Parquet file.
        on_error: `stop` raises at the first document that cannot be read, `skip` counts it.

    Raises:
        UserError: While iterating; names file and line. A file that cannot be opened, a missing package and a Parquet
            file without the column are never skipped.
    """

    def __init__(
        self, files: Sequence[Path], text_field: str = "text", on_error: Literal["stop", "skip"] = "stop"
    ) -> None:
        self.files = files
        self.text_field = text_field
        self.on_error = on_error
        self.num_skipped = 0
        self.bytes_read = 0
        """Bytes of the files on disk that have been read so far."""
        self.sizes = [_size(file) for file in files]

    def __iter__(self) -> Iterator[str]:
        finished = 0
        for path, size in zip(self.files, self.sizes, strict=True):
            for position, document in read_file(path, self.text_field):
                self.bytes_read = finished + position
                if isinstance(document, str):
                    yield document
                elif self.on_error == "skip":
                    self.num_skipped += 1
                else:
                    raise UserError(f"{document}; use --on_error skip to leave such lines out")
            finished += size
            self.bytes_read = finished


def find_files(inputs: Sequence[str], suffixes: Sequence[str] | None = None) -> list[Path]:
    """Files named by paths, folders (all levels, hidden ones left out) and glob patterns, sorted, each once.

    Args:
        inputs: Paths, folders and patterns.
        suffixes: File name endings to take from folders, all of `FORMATS` if not given.

    Raises:
        UserError: If an input names nothing, or a file of an ending that is neither known nor in `suffixes`.
    """
    wanted = [suffix if suffix.startswith(".") else f".{suffix}" for suffix in suffixes or FORMATS]
    found: dict[str, Path] = {}
    for name in inputs:
        for path in _expand(name, wanted):
            found.setdefault(os.path.realpath(path), path)
    if not found:
        raise UserError("no input named; give files, folders or patterns with --input")
    return sorted(found.values(), key=Path.as_posix)


def _expand(name: str, wanted: Sequence[str]) -> list[Path]:
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
        elif _has_suffix(entry, [*FORMATS, *wanted]):
            files.append(entry)
        else:
            raise UserError(
                f"input file {entry} ends in none of {', '.join(FORMATS)}; "
                f"name its ending in --suffixes to read it as plain text"
            )
    if not files:
        raise UserError(f"input {name} holds no file that ends in {', '.join(wanted)}")
    return files


def _files_in(folder: Path, wanted: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".") and _has_suffix(Path(name), wanted)]
    return files


def _has_suffix(path: Path, suffixes: Sequence[str]) -> bool:
    return path.name.lower().endswith(tuple(suffix.lower() for suffix in suffixes))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def read_file(path: Path, text_field: str) -> Iterator[Record]:
    """Records of one file, read by the ending of its name; an unknown ending is plain text.

    Raises:
        UserError: If the file cannot be read at all; a document that cannot be read is a record.
    """
    read = next((read for suffix, read in FORMATS.items() if _has_suffix(path, [suffix])), _read_text)
    try:
        with path.open("rb") as file:
            yield from read(path, file, text_field)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


# ------------------------------------------------------------------------------------------------- formats


def _read_text(path: Path, file: IO[bytes], text_field: str) -> Iterator[Record]:
    content = file.read()
    try:
        yield len(content), content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        yield len(content), UserError(f"{path}, line {line}: not valid UTF-8")


def _read_jsonl(path: Path, file: IO[bytes], text_field: str) -> Iterator[Record]:
    return _parse_lines(path, file, file, text_field)


def _read_jsonl_gz(path: Path, file: IO[bytes], text_field: str) -> Iterator[Record]:
    return _parse_lines(path, file, gzip.GzipFile(fileobj=file), text_field)


def _read_jsonl_zst(path: Path, file: IO[bytes], text_field: str) -> Iterator[Record]:
    zstandard = _import("zstandard", path)
    return _parse_lines(path, file, _split_lines(_decompress_zstd(file, zstandard)), text_field)


def _read_parquet(path: Path, file: IO[bytes], text_field: str) -> Iterator[Record]:
    pyarrow, parquet = _import("pyarrow", path), _import("pyarrow.parquet", path)
    size = path.stat().st_size
    row = 0
    try:
        table = parquet.ParquetFile(file)
        columns = table.schema_arrow.names
        if text_field not in columns:
            raise UserError(
                f"{path} has no column {text_field!r}; it has {', '.join(columns)}: name one by --text_field"
            )
        for batch in table.iter_batches(batch_size=256, columns=[text_field]):
            for value in batch.column(0):
                row += 1
                yield size * row // table.metadata.num_rows, _parquet_text(path, row, text_field, value)
    except (pyarrow.ArrowException, OSError) as error:
        yield size, UserError(f"{path}, row {row + 1}: cannot be read as Parquet ({_first_line(error)})")


FORMATS: dict[str, Callable[[Path, IO[bytes], str], Iterator[Record]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl_gz,
    ".jsonl.zst": _read_jsonl_zst,
    ".parquet": _read_parquet,
}
"""Known file name endings and how they are read."""


def _parse_lines(path: Path, file: IO[bytes], lines: Iterable[bytes], text_field: str) -> Iterator[Record]:
    """One JSON object a line; blank lines are passed over. Damaged compression ends the file with an error."""
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark of some Windows programs
            if line.strip():
                yield file.tell(), _json_text(path, number, text_field, line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield (
            file.tell(),
            UserError(f"{path}, line {number + 1}: damaged or cut compressed file ({_first_line(error)})"),
        )


def _json_text(path: Path, number: int, text_field: str, line: bytes) -> str | UserError:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line.strip().decode("utf-8"))
    except UnicodeDecodeError:
        return UserError(f"{where}: not valid UTF-8")
    except json.JSONDecodeError as error:
        return UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:
        return UserError(f"{where}: not valid JSON ({_first_line(error)})")
    if not isinstance(record, dict):
        return UserError(f"{where}: not a JSON object but {type(record).__name__}")
    if text_field not in record:
        return UserError(f"{where}: no field {text_field!r}, only {', '.join(map(repr, record)) or 'an empty object'}")
    return _checked_text(where, text_field, record[text_field])


def _parquet_text(path: Path, row: int, text_field: str, value: Any) -> str | UserError:
    where = f"{path}, row {row}"
    try:
        return _checked_text(where, text_field, value.as_py())
    except UnicodeDecodeError:
        return UserError(f"{where}: not valid UTF-8")


def _checked_text(where: str, text_field: str, text: Any) -> str | UserError:
    if not isinstance(text, str):
        return UserError(f"{where}: field {text_field!r} is not a string but {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON may spell half of a surrogate pair
        return UserError(f"{where}: field {text_field!r} holds a broken character (half of a surrogate pair)")
    return text


# --------------------------------------------------------------------------------------------- zstandard


def _decompress_zstd(file: IO[bytes], zstandard: ModuleType) -> Iterator[bytes]:
    """Blocks of decompressed bytes; several frames may follow each other.

    The library's own stream reader takes a file that ends within a frame for a whole one.

    Raises:
        EOFError: If the stream is damaged or ends early.
    """
    frame = None
    try:
        while block := file.read(1 << 16):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                block = b""
                if frame.eof:
                    block, frame = frame.unused_data, None
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error
    if frame is not None:
        raise EOFError("the file ends too early")


def _split_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    begun: list[bytes] = []  # pieces of a line whose end has not come yet
    for block in blocks:
        *ended, rest = block.split(b"\n")
        for piece in ended:
            yield b"".join([*begun, piece])
            begun = []
        begun.append(rest)
    if line := b"".join(begun):
        yield line


def _import(name: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise UserError(f"reading {path} needs the package {package}: pip install {package}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
