"""Collect text that every machine has: the sources and the documentation strings of Python itself.

Documentation strings are prose, sources are not; a text that the user brings, such as essays, counts as prose. Files
are held out as a whole, by a hash of their text, so that nothing of what is asked about later was read in training.
"""

import ast
import hashlib
import json
import site
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meap_lit.data.prepare.splits import draw
from meap_lit.data.prepare.step import Preparation
from meap_lit.data.read.find import find_files
from meap_lit.data.read.formats import InputFile
from meap_lit.data.read.readers import read_texts
from meap_lit.errors import UserError, check_range
from meap_lit.files import parse_bytes

FILES_FILE = "files.json"
"""In the folder that is made: each file that was read, with its size, SHA-256 and side."""

_SKIPPED = {"test", "tests", "idle_test", "encodings", "lib2to3", "__pycache__", "site-packages", "dist-packages"}
"""Folders without text worth reading: tests quote each other, encodings are tables, packages are not Python's own."""


@dataclass(kw_only=True)
class PythonText(Preparation):
    """Collect Python's sources and documentation strings as text files, a part of them held out.

    Makes `train` and `held_out`, each with `prose.jsonl` (documentation strings of a file, and `prose`) and
    `sources.jsonl`, and `files.json`, which tells what was read.

    Args:
        output: Folder to make.
        prose: Files and folders of text of your own, which counts as prose.
        packages: Read the packages installed beside Python too, hundreds of megabytes where torch is.
        held_out_share: Share of files held out, in (0, 1).
        max_bytes: Sources to read at most; files are taken in an order of their own, the same everywhere.
    """

    prose: list[str] = field(default_factory=list)
    packages: bool = False
    held_out_share: float = 0.05
    max_bytes: str = "1GB"

    def source_files(self) -> Sequence[InputFile]:
        return find_files(self.prose) if self.prose else []

    def make(self, folder: Path) -> str:
        check_range("held_out_share", self.held_out_share, "(0, 1)", "; write 0.05 for 5%")
        for side in ("train", "held_out"):
            (folder / side).mkdir()
        files: list[dict[str, Any]] = []
        for name, kind, text in self._texts():
            content = text.encode()
            # a draw of its own: that of the text alone is what a dataset of these texts is split by
            side = "held_out" if draw(b"held out" + content) < self.held_out_share else "train"
            digest = hashlib.sha256(content).hexdigest()
            files.append({"file": name, "bytes": len(content), "sha256": digest, "side": side})
            prose = text if kind == "prose" else documentation(text)
            for document, file in ((prose, "prose"), (text if kind == "sources" else "", "sources")):
                if document:
                    with open(folder / side / f"{file}.jsonl", "a", encoding="utf-8") as lines:
                        lines.write(json.dumps({"text": document}) + "\n")
        for side in ("train", "held_out"):
            if not (folder / side / "prose.jsonl").is_file():
                raise UserError(f"no file is left for {side} of {len(files)} files; change held_out_share")
        (folder / FILES_FILE).write_text(json.dumps(files, indent=1) + "\n")
        size = sum(entry["bytes"] for entry in files)
        return f"text {self.output}: {len(files):,} files, {size / 1e6:.1f} MB"

    def _texts(self) -> Iterator[tuple[str, str, str]]:
        """Yield name, kind and text of each file."""
        if self.prose:
            try:
                paths = find_files(self.prose)
            except UserError as error:
                hint = "put text there, or leave it out with prose: [] in the recipe"
                raise UserError(f"prose of {self.output}: {error}; {hint}") from error
            for path in paths:
                for number, text in enumerate(read_texts([path])):
                    yield f"{path.name}:{number}" if number else path.name, "prose", text
        room = parse_bytes(self.max_bytes, "max_bytes")
        for name, text in _sources(self.packages):
            room -= len(text.encode())
            if room < 0:
                break
            yield name, "sources", text


def documentation(source: str) -> str:
    """Return the documentation strings of a module, its classes and functions, with blank lines between them."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # installed packages contain templates and old syntax
        return ""
    found = [
        ast.get_docstring(node)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    return "\n\n".join(text for text in found if text)


def _sources(packages: bool) -> Iterator[tuple[str, str]]:
    """Yield name and text of Python's own source files, and those of installed packages if `packages`."""
    roots = {"python": Path(sysconfig.get_paths()["stdlib"])}
    if packages:
        roots |= {f"packages{number or ''}": Path(root) for number, root in enumerate(site.getsitepackages())}
    named = [
        (f"{label}/{file.relative_to(root).as_posix()}", file)
        for label, root in roots.items()
        for file in root.rglob("*.py")
        if not _SKIPPED.intersection(file.relative_to(root).parts[:-1])
    ]
    # by a hash of the name, so that a limit takes a bit of everything
    for name, file in sorted(named, key=lambda entry: hashlib.sha256(entry[0].encode()).digest()):
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):  # a link to nowhere, a folder named x.py
            continue
        if text.strip():
            yield name, text
