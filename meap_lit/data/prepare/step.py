"""Steps that make a folder once: a corpus, a tokenizer, a dataset.

A step is a dataclass of what it needs plus `output`, the folder it makes. The same classes serve the command line
(`python -m meap_lit prepare text ...`) and a recipe's `data.preparation` list, which makes what is missing before
the run. A folder is built aside and renamed when it is whole, so a folder that exists is complete.
"""

import dataclasses
import hashlib
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from meap_lit.data.prepare.sources import SourceFile, is_same, look_at, read_sources
from meap_lit.data.read.find import RECORD_FILE, size_of
from meap_lit.data.read.formats import InputFile
from meap_lit.errors import UserError
from meap_lit.files import new_folder, read_json, write_file
from meap_lit.secrets import without_secrets


@dataclass(kw_only=True)
class Preparation(ABC):
    """A step. Subclasses are dataclasses; a field with `compare=False` does not change what is made.

    Args:
        output: Folder to make.
    """

    recorded_as: ClassVar[str] = ""
    """Name of the step in preparation.json, if it is not that of the class."""

    output: str

    def __post_init__(self) -> None:
        self.output = os.path.expanduser(self.output)  # no shell does so in a recipe, or after --output=

    def source_files(self) -> Sequence[InputFile]:
        """Return the files that the step reads, except a tokenizer, which a dataset knows by its ids.

        Raises:
            UserError: If a source is not there, as after its removal.
        """
        return []

    def files_read(self, files: Sequence[InputFile]) -> Sequence[InputFile]:
        """Return the subset of `source_files` that the step reads, in whole or in part."""
        return files

    @abstractmethod
    def make(self, folder: Path) -> str | None:
        """Write the whole result into the empty `folder`, which becomes `output`, and return a summary to print."""

    def run(self) -> None:
        """Make `output`; raise `UserError` if it exists already, without touching it."""
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(self.output)  # also finds a link to nothing
            raise UserError(f"output {self.output} exists already; remove it or name another --output")
        files = self._sources()  # first, because files may be added or changed while `make` runs
        record = self._record() | {
            "sources": _stamp(files),
            "files": None if files is None else [file._asdict() for file in self._look_at(files)],
        }
        with new_folder(Path(self.output)) as folder:
            summary = self.make(folder)
            (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")
        if summary:
            print(summary)

    def ensure(self, check_sources: bool = True) -> None:
        """Make `output` unless this very step made it before.

        Args:
            check_sources: Refuse a folder that was made of other files than there are now.

        Raises:
            UserError: If it was made otherwise.
        """
        output = Path(self.output)
        if not output.exists():
            try:
                self.run()
                return
            except UserError:
                if not output.exists():
                    raise
            # another process, such as one on another node, has made it meanwhile
        record = output / RECORD_FILE
        if not record.is_file():
            raise UserError(f"{output} exists but was not made by meap_lit; remove it or name another output")
        was, now = _read_record(record), self._record()
        if was["step"] != now["step"]:
            raise UserError(f"folder {output} was made by {was['step']}, not {now['step']}; name another output")
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.default is not dataclasses.MISSING}
        for name, value in now["arguments"].items():
            # a step of an older version may lack the option
            before = without_secrets(was["arguments"].get(name, defaults.get(name)), (name,))
            if before != value:
                raise UserError(
                    f"folder {output} was made with {name} = {before!r}, the recipe says {value!r}; "
                    f"remove the folder or name another output"
                )
        files = self._sources() if check_sources else None
        if files is not None and not self._was_made_of(files, was):
            raise UserError(
                f"folder {output} was made of other files than its sources hold now; remove it to make it again, or "
                f"use it as it is with --data.preparation null"
            )

    def _record(self) -> dict[str, Any]:
        names = [f.name for f in dataclasses.fields(self) if f.compare and f.name != "output"]
        arguments = without_secrets({name: getattr(self, name) for name in names})  # signed URLs contain secrets
        return {
            "step": self.recorded_as or type(self).__name__,
            "arguments": json.loads(json.dumps(arguments)),
        }

    def _sources(self) -> list[InputFile] | None:
        """Return the files that the step reads, those in its own output aside; None if one cannot be found."""
        output = Path(self.output).absolute()
        try:
            files = [file for file in self.source_files() if output not in Path(str(file)).absolute().parents]
            _stamp(files)
        except UserError:
            return None
        return files

    def _was_made_of(self, files: Sequence[InputFile], record: dict[str, Any]) -> bool:
        """Return whether the step made its folder, whose record is given, of `files` as they are now."""
        if record.get("sources") not in (None, _stamp(files)):
            return False
        before = read_sources(record, Path(self.output))
        if before is None:
            return True
        now = self._look_at(files, before)
        if not is_same(before, now):
            return False
        places = {file.path: file for file in before}
        # a file that cannot be read now keeps its record
        now = [places.get(file.path, file) if file.sha256 is None else file for file in now]
        if now != before:
            # copies have other paths or times: hash them once, not whenever a run starts
            content = record | {"files": [file._asdict() for file in now]}
            with suppress(OSError):  # a folder that is not to be written is hashed again
                write_file(Path(self.output) / RECORD_FILE, json.dumps(content, indent=2) + "\n")
        return True

    def _look_at(self, files: Sequence[InputFile], known: Iterable[SourceFile] = ()) -> list[SourceFile]:
        num_bytes = sum(size_of(file) for file in files if isinstance(file, Path))
        with progress_bar(f"hashing the sources of {self.output}", num_bytes, delay=2) as bar:
            return look_at(files, self.files_read(files), bar, known)


def _stamp(files: Sequence[InputFile] | None) -> str | None:
    """Return a hash of the names and sizes of files; None of None.

    Raises:
        UserError: If a file is not there.
    """
    if files is None:
        return None
    sizes = sorted((file.name, size_of(file)) for file in files)
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]


def _read_record(file: Path) -> dict[str, Any]:
    hint = "remove the folder or name another output"
    try:
        record = read_json(file)
    except UserError as error:
        raise UserError(f"{error}; {hint}") from error
    if not isinstance(record.get("step"), str) or not isinstance(record.get("arguments"), dict):
        raise UserError(f"{file} is damaged; {hint}")
    return record


def progress_bar(description: str, num_bytes: int, delay: float = 0) -> tqdm:
    """Return a progress bar over `num_bytes` bytes of input, which the caller moves, after `delay` seconds."""
    # a log file gets a line every half minute instead of ten a second
    seconds = 0.1 if sys.stderr.isatty() else 30
    return tqdm(total=num_bytes, desc=description, unit="B", unit_scale=True, mininterval=seconds, delay=delay)
