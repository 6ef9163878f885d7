"""Find the files that the options of a command name: paths, folders, glob patterns and remote addresses."""

import glob
import os
import stat
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from meap_lit.data.read.formats import FORMATS, Format, InputFile, has_suffix
from meap_lit.data.store.remote import RemoteFile, Storage
from meap_lit.errors import UserError
from meap_lit.files import is_partial, local_path

RECORD_FILE = "preparation.json"
"""Name of the file, in every folder that a step makes, with the step's class and arguments."""


@dataclass(frozen=True)
class Input:
    """The files to read, and those of the folders that have other endings."""

    files: list[InputFile]
    """Sorted, each once."""
    passed_over: Counter[str]
    """Number of files in the folders that are not read, by ending."""
    suffixes: list[str] | None
    """Endings for `--suffixes` that take from the folders what was read; None for input without that option."""

    def lines_of_summary(self) -> list[str]:
        """Return the line that says which files were passed over, and how to read them; none if none were."""
        counts = sorted(self.passed_over.items(), key=lambda entry: (-entry[1], entry[0]))
        kinds = [f"{count} {ending or 'without an ending'}" for ending, count in counts[:8]]
        kinds += [f"{sum(count for _, count in counts[8:])} others"] if len(counts) > 8 else []
        if not kinds:
            return []
        endings = [ending for ending, _ in counts[:8] if ending]
        hint = ""
        if endings and self.suffixes is not None:
            hint = f"; to read those that are text too: --suffixes {' '.join([*self.suffixes, *endings])}"
        return [f"  skipped  files in the folders, {', '.join(kinds)}{hint}"]


def find_files(inputs: Sequence[str], suffixes: Sequence[str] | None = None) -> list[InputFile]:
    """Return the files of documents that `find_input` finds."""
    return find_input(inputs, suffixes).files


def find_input(
    inputs: Sequence[str], suffixes: Sequence[str] | None = None, formats: Mapping[str, Format] = FORMATS
) -> Input:
    """Find the files named by paths, folders, glob patterns and remote addresses.

    Folders are read at all levels, links to other folders included; hidden files and folders are left out. From
    folders come files of the endings `suffixes`, or of all `formats` (`FORMATS` or `RECORD_FORMATS`) if not given.

    Raises:
        UserError: If an input names nothing, a folder that cannot be listed, or a file of an ending that is neither
            known nor in `suffixes`.
    """
    wanted = [suffix if suffix.startswith(".") else f".{suffix}" for suffix in suffixes or formats]
    found: dict[str, InputFile] = {}
    others: dict[str, InputFile] = {}
    for name in inputs:
        files, passed_over = _expand(name, wanted, formats)
        for file in sorted(files, key=str):  # of two names of a file always the same one
            found.setdefault(_identity(file), file)
        others.update((_identity(file), file) for file in passed_over)
    if not found:
        raise UserError("no input named; give files, folders or patterns with --input")
    endings = Counter(os.path.splitext(file.name)[1].lower() for key, file in others.items() if key not in found)
    taken = [suffix for suffix in wanted if any(has_suffix(file, [suffix]) for file in found.values())]
    return Input(sorted(found.values(), key=str), endings, taken if formats is FORMATS else None)


def _identity(file: InputFile) -> str:
    """Return a name that a file has alone, whatever links lead to it."""
    return os.path.realpath(file) if isinstance(file, Path) else str(file)


def _expand(name: str, wanted: Sequence[str], formats: Mapping[str, Format]) -> tuple[list[InputFile], list[InputFile]]:
    """Return the files that an input names, and those in its folders that have other endings."""
    if not name:
        raise UserError("an input has no name; give files, folders or patterns with --input")
    named, inside = _find_remote(name) if "://" in name else _find_local(name)
    for file in named:
        if not has_suffix(file, [*formats, *wanted]):
            hint = "; name its ending in --suffixes to read it as plain text" if formats is FORMATS else ""
            raise UserError(f"input file {file} must end in one of {', '.join(formats)}{hint}")
    files = named + [file for file in inside if has_suffix(file, wanted)]
    if not files:
        raise UserError(f"input {name} holds no file that ends in {', '.join(wanted)}")
    return files, [file for file in inside if not has_suffix(file, wanted)]


def expand(name: str) -> list[Path]:
    """Return the local file or folder of a name, or all that match it as a pattern, except unfinished ones."""
    path = local_path(name)
    if path.exists() or not glob.has_magic(name):
        return [path] if path.exists() else []
    matches = (Path(match) for match in glob.glob(str(path), recursive=True))
    return [match for match in matches if not any(is_partial(part) for part in (match, *match.parents))]


def _find_local(name: str) -> tuple[list[InputFile], list[InputFile]]:
    """Return the files that a path or pattern names, and the files in the folders that it names."""
    named = expand(name)
    if not named and not glob.has_magic(name):
        raise UserError(f"input {name} does not exist")
    folders = [entry for entry in named if entry.is_dir()]
    files: list[InputFile] = [entry for entry in named if not entry.is_dir()]
    return files, [file for folder in folders for file in _files_in(folder)]


def _find_remote(name: str) -> tuple[list[InputFile], list[InputFile]]:
    """Do the same as `_find_local` for a remote address."""
    found = Storage().find(name)
    if not found:
        raise UserError(f"input {name} does not exist")
    if glob.has_magic(name) or [file.address for file in found] == [name]:
        return [*found], []
    folder = f"{name.rstrip('/')}/"  # what was named is input, hidden or not
    return [], [file for file in found if not _is_left_out(file.address.removeprefix(folder).split("/"))]


def _is_left_out(names: Sequence[str]) -> bool:
    """Return whether a file in a folder is not input: hidden, unfinished, or the record of a preparation step."""
    return names[-1] == RECORD_FILE or any(name.startswith(".") or is_partial(Path(name)) for name in names)


def _files_in(folder: Path) -> list[InputFile]:
    """Return the files of a folder and of those below it, each folder once, whatever links lead to it."""

    def refuse(error: OSError) -> NoReturn:
        reason = f"cannot list folder {error.filename}: {error.strerror}"
        raise UserError(f"{reason}; give this user access, or name other input") from error

    files: list[InputFile] = []
    roots, seen = deque([str(folder)]), set[str]()
    while roots:  # the folder itself first, so that its files are named without links
        links = []
        for parent, folders, names in os.walk(roots.popleft(), onerror=refuse):
            real = os.path.realpath(parent)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = [name for name in folders if not _is_left_out([name])]
            links += [path for name in folders if os.path.islink(path := os.path.join(parent, name))]
            files += [Path(parent, name) for name in names if not _is_left_out([name])]
        roots += sorted(links)
    return files


def size_of(path: InputFile) -> int:
    """Return the size of a file in bytes; raise `UserError` if it cannot be read, or is not a regular file."""
    if isinstance(path, RemoteFile):
        return path.size
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"cannot read {path}: not a regular file")  # a pipe would be waited for
    return status.st_size
