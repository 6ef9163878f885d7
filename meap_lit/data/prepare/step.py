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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from meap_lit.data.read.find import RECORD_FILE, find_all, size_of
from meap_lit.errors import UserError
from meap_lit.files import new_folder, read_json


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

    @property
    def sources(self) -> list[str]:
        """Paths, patterns and addresses of what the step reads, except a tokenizer, which datasets know by its ids."""
        return []

    @abstractmethod
    def make(self, folder: Path) -> str | None:
        """Write the whole result into the empty `folder`, which becomes `output`, and return a summary to print."""

    def run(self) -> None:
        """Make `output`; raise `UserError` if it exists already, without touching it."""
        if Path(self.output).exists():
            raise UserError(f"output folder {self.output} exists already; remove it or name another --output")
        with new_folder(Path(self.output)) as folder:
            summary = self.make(folder)
            (folder / RECORD_FILE).write_text(json.dumps(self._record(), indent=2) + "\n")
        if summary:
            print(summary)

    def ensure(self) -> None:
        """Make `output` unless this very step made it before; raise `UserError` if it was made otherwise."""
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
            raise UserError(f"folder {output} exists but was not made by meap_lit; remove it or name another output")
        was, now = _read_record(record), self._record()
        if was["step"] != now["step"]:
            raise UserError(f"folder {output} was made by {was['step']}, not {now['step']}; name another output")
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.default is not dataclasses.MISSING}
        for name, value in now["arguments"].items():
            # a step of an older version may lack the option
            before = was["arguments"].get(name, defaults.get(name))
            if before != value:
                raise UserError(
                    f"folder {output} was made with {name} = {before!r}, the recipe says {value!r}; "
                    f"remove the folder or name another output"
                )
        for source, stamp in now["sources"].items():
            if was.get("sources", {}).get(source, stamp) != stamp:
                raise UserError(
                    f"folder {output} was made when {source} had other content; remove {output} to make it again, or "
                    f"take the step out of the recipe to use it as it is"
                )

    def _record(self) -> dict[str, Any]:
        names = [f.name for f in dataclasses.fields(self) if f.compare and f.name != "output"]
        arguments = {name: getattr(self, name) for name in names}
        return {
            "step": self.recorded_as or type(self).__name__,
            "arguments": json.loads(json.dumps(arguments)),
            "sources": {name: stamp for name in self.sources if (stamp := _stamp(name)) is not None},
        }


def _stamp(source: str) -> str | None:
    """Return a hash that changes when another step makes `source` anew, or a file in it gets another size.

    None if it is remote or no longer there.
    """
    if "://" in source:
        return None
    path = Path(source).expanduser()
    made = next((folder for folder in (path, *path.parents) if (folder / RECORD_FILE).is_file()), None)
    if made is not None:
        return hashlib.sha256((made / RECORD_FILE).read_bytes()).hexdigest()[:16]
    try:
        files = sorted((str(file), size_of(file)) for file in find_all(source))
    except UserError:
        return None
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def _read_record(file: Path) -> dict[str, Any]:
    hint = "remove the folder or name another output"
    try:
        record = read_json(file)
    except UserError as error:
        raise UserError(f"{error}; {hint}") from error
    if not isinstance(record.get("step"), str) or not isinstance(record.get("arguments"), dict):
        raise UserError(f"{file} is damaged; {hint}")
    return record


def progress_bar(description: str, num_bytes: int) -> tqdm:
    """Return a progress bar over `num_bytes` bytes of input, which the caller moves."""
    # a log file gets a line every half minute instead of ten a second
    seconds = 0.1 if sys.stderr.isatty() else 30
    return tqdm(total=num_bytes, desc=description, unit="B", unit_scale=True, mininterval=seconds)
