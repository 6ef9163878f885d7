"""Merge the parts of a dataset, each made by a run of its own, as if one run had made them.

The result holds the documents that one run would hold, split in the same way, in the order of the parts. Chunk files
are those of the parts, byte for byte: nothing is tokenized or written again. A merged split has as fingerprint the
SHA-256 of the fingerprints of the splits it is made of, one a line, in the same order.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from meap_lit.data.prepare.sources import hash_file, read_sources
from meap_lit.data.prepare.splits import RESERVE
from meap_lit.data.prepare.step import Preparation, progress_bar
from meap_lit.data.read.find import RECORD_FILE, expand
from meap_lit.data.store.chunks import INDEX_FILE, SAMPLES_FILE, ChatSplit, Split, check_chunk, check_index, hash_files
from meap_lit.data.store.manifest import VERSION, ChatDetails, Kind, Manifest, PartDetails, Source, load_samples
from meap_lit.errors import UserError
from meap_lit.files import is_partial, read_json

_KINDS: dict[str, Kind] = {"PrepareText": "text", "PrepareChat": "chat"}

_NOT_COMPARED = {"input", "tokenizer", "template", "shard"}
"""Options that are paths, whose content is compared instead, or that must differ."""

_HINT = "name the folders that prepare text or prepare chat made with --shard"


@dataclass(kw_only=True)
class MergeParts(Preparation):
    """Merge the parts of a dataset that `prepare text` or `prepare chat` made with --shard.

    Args:
        output: Folder to make. On the file system of the parts their chunk files are linked into it (hard links), on
            another they are copied; the parts may be removed afterwards.
        input: Folders of all parts, in any order, and glob patterns.
    """

    recorded_as = "MergeShards"  # its name in version 0.1

    input: list[str]

    def make(self, folder: Path) -> str:
        started = time.perf_counter()
        parts = _all_of_them(_load(_find_folders(self.input)))
        _check_alike(parts)
        pieces = _assign(parts)
        indexes = [piece.index for some in pieces.values() for piece in some]
        num_bytes = sum(chunk["chunk_bytes"] for index in indexes for chunk in index["chunks"])
        with progress_bar(f"merging {self.output}", num_bytes) as bar:
            splits = {name: _merge(folder / name, some, bar) for name, some in pieces.items()}
        manifests = [part.manifest for part in parts]
        chats = [manifest.chat for manifest in manifests if manifest.chat is not None]
        manifest: Manifest = _sum(
            manifests, version=VERSION, splits=splits, chat=_sum(chats) if chats else None, part=None
        )
        manifest.save(folder)
        Manifest.load(str(folder), kind=manifest.kind)  # reads the result as a run will
        seconds, unit = time.perf_counter() - started, {"text": "documents", "chat": "conversations"}[manifest.kind]
        documents, tokens = (sum(getattr(split, name) for split in splits.values()) for name in ("documents", "tokens"))
        lines = [
            f"dataset {self.output}, of {len(parts)} parts",
            *(f"  {name:<9}{split.documents} {unit}, {split.tokens} tokens" for name, split in splits.items()),
            f"  in all   {documents} {unit}, {tokens} tokens, of {len(manifest.sources)} files",
            f"  took     {seconds:.1f} s for {num_bytes / 1e6:.1f} MB of chunks",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Part:
    folder: Path
    options: dict[str, Any]
    manifest: Manifest
    details: PartDetails

    def __str__(self) -> str:
        return f"part {self.details.index}/{self.details.count} in {self.folder}"


def _load(folders: Sequence[Path]) -> list[_Part]:
    parts: list[_Part] = []
    for folder in folders:
        try:
            record = read_json(folder / RECORD_FILE)
            kind, options = _KINDS[record["step"]], record["arguments"]
        except (UserError, KeyError, TypeError) as error:
            raise UserError(f"input {folder} is not a part of a dataset; {_HINT}") from error
        manifest = Manifest.load(str(folder), kind=kind)
        details = manifest.part
        if details is None:
            raise UserError(f"input {folder} is not a part but a whole dataset, prepared without --shard; {_HINT}")
        if parts and manifest.sources == (sources := parts[0].manifest.sources):
            # each part lists all files of the input: once is enough in memory
            manifest = dataclasses.replace(manifest, sources=sources)
        parts.append(_Part(folder, options, manifest, details))
    return parts


def _find_folders(inputs: Sequence[str]) -> list[Path]:
    """Return the folders named by paths and patterns, without those that a run has not finished."""
    folders: list[Path] = []
    for name in inputs:
        named = [match for match in expand(name) if match.is_dir()]
        if not named:
            raise UserError(f"input {name} is not a folder; {_HINT}")
        folders += [folder for folder in named if not is_partial(folder)]
    return folders


def _all_of_them(parts: Sequence[_Part]) -> list[_Part]:
    """Return the parts from 0 to n - 1."""
    if not parts:
        raise UserError(f"the input holds no finished part; {_HINT}")
    count = parts[0].details.count
    found: dict[int, _Part] = {}
    for part in parts:
        if part.details.count != count:
            raise UserError(f"{part} and {parts[0]} are parts of different datasets: name parts of the same n")
        other = found.setdefault(part.details.index, part)
        if other is not part:
            raise UserError(f"{other} appears twice, the second time in {part.folder}; name one of the two")
    missing = [f"{index}/{count}" for index in range(count) if index not in found]
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise UserError(
            f"{len(missing)} of {count} parts missing: {', '.join(missing[:8])}{more}; "
            f"prepare each with its --shard and name its folder too"
        )
    return [found[index] for index in range(count)]


def _check_alike(parts: Sequence[_Part]) -> None:
    """Make sure that the parts were made of the same input in the same way."""
    _check_equal("prepare", [(part, part.manifest.kind) for part in parts])
    _check_equal("tokenizer", [(part, part.manifest.tokenizer_fingerprint[:8]) for part in parts])
    _check_equal("template", [(part, _template(part.manifest.chat)) for part in parts])
    for part in parts:
        for source, first in zip_longest(part.manifest.sources, parts[0].manifest.sources):
            if source != first:
                raise UserError(
                    f"{part} was made from other input than {parts[0]}: "
                    f"{_describe(source)} where that has {_describe(first)}; prepare one of the two again"
                )
    _check_content(parts)
    for name in sorted({name for part in parts for name in part.options} - _NOT_COMPARED):
        values = [(part, part.options.get(name)) for part in parts]
        if name in ("on_error", "on_long"):
            # a part that was told to stop did not meet what others skipped, dropped or truncated
            values = [(part, value) for part, value in values if value != "stop"]
        _check_equal(name, values)


def _check_content(parts: Sequence[_Part]) -> None:
    """Make sure that no file of the input changed between the first part and the last.

    A part records the hashes of the files that it reads, unless an earlier version made it. If all hashes of a file are
    the same but its times differ, it was copied, or it changed after the parts that read it: it is hashed once more.
    """
    hashes: dict[str, tuple[str, _Part]] = {}
    times: dict[str, int] = {}
    other_times: set[str] = set()
    for part in parts:
        for file in read_sources(read_json(part.folder / RECORD_FILE), part.folder) or []:
            if times.setdefault(file.path, file.time) != file.time:
                other_times.add(file.path)
            if file.sha256 is None:
                continue
            found, reader = hashes.setdefault(file.path, (file.sha256, part))
            if found != file.sha256:
                raise UserError(
                    f"{part} was made from other input than {reader}: {file.path} has changed in between; "
                    f"prepare one of the two again"
                )
    for path in sorted(other_times & hashes.keys()):
        found, reader = hashes[path]
        if hash_file(Path(path)) not in (None, found):  # None where the file is not here any more
            raise UserError(f"{path} has changed since {reader} was made from it; prepare that part again")


def _check_equal(what: str, values: Sequence[tuple[_Part, Any]]) -> None:
    for part, value in values:
        first_part, first_value = values[0]
        if value != first_value:
            raise UserError(
                f"{part} was made with {what} {value}, {first_part} with {what} {first_value}; "
                f"prepare one of the two again"
            )


def _template(chat: ChatDetails | None) -> str | None:
    if chat is None:
        return None
    return f"{chat.template} ({hashlib.sha256(chat.template_source.encode()).hexdigest()[:8]})"


def _describe(source: Source | None) -> str:
    return "no further file" if source is None else f"{source.path} of {source.bytes} bytes"


@dataclass(frozen=True)
class _Piece:
    """A split of a part, which becomes a piece of a split of the dataset."""

    folder: Path
    split: Split

    @cached_property
    def index(self) -> dict[str, Any]:
        return check_index((self.folder / INDEX_FILE).read_bytes(), self.split, str(self.folder))


def _assign(parts: Sequence[_Part]) -> dict[str, list[_Piece]]:
    """Return the pieces of each split of the dataset, in the order of the parts."""
    reserves = [part for part in parts if RESERVE in part.manifest.splits]
    if any("val" in part.manifest.splits for part in parts):
        reserves = []
    # one run would have held out the document of the smallest draw, and its copies
    draws = [part.details.reserve_draw for part in reserves if part.details.reserve_draw is not None]
    pieces: dict[str, list[_Piece]] = {"train": [], "val": []}
    for part in parts:
        for name, split in part.manifest.splits.items():
            held_out = bool(draws) and part.details.reserve_draw == min(draws)
            target = name if name != RESERVE else "val" if held_out else "train"
            pieces[target].append(_Piece(part.folder / name, split))
    if not pieces["train"]:
        count = sum(piece.split.documents for piece in pieces["val"])
        if count == 0:
            raise UserError(f"the {len(parts)} parts hold no document; prepare them of other input")
        raise UserError(
            f"no document is left to train on: the validation split took {count} of {count}; prepare the parts again "
            f"with a val_share below {parts[0].manifest.val_share:g}, or 0 for no validation split"
        )
    return {name: some for name, some in pieces.items() if some}


def _merge(folder: Path, pieces: Sequence[_Piece], bar: tqdm) -> Split:
    """Write a split."""
    folder.mkdir()
    first = pieces[0]
    chunks: list[dict[str, Any]] = []
    for piece in pieces:
        if piece.index["config"] != first.index["config"]:
            raise UserError(
                f"{piece.folder} and {first.folder} are stored differently, as by two versions of LitData; "
                f"prepare all parts with one"
            )
        for chunk in piece.index["chunks"]:
            name = f"chunk-0-{len(chunks)}.bin"  # as LitData names those of one run
            check_chunk(piece.folder, chunk)
            _link_or_copy(piece.folder / chunk["filename"], folder / name)
            chunks.append({**chunk, "filename": name})
            bar.update(chunk["chunk_bytes"])
    fingerprint = hashlib.sha256("\n".join(piece.split.fingerprint for piece in pieces).encode()).hexdigest()
    index = {**first.index, "chunks": chunks, "updated_at": fingerprint}
    (folder / INDEX_FILE).write_text(json.dumps(index, sort_keys=True))
    if isinstance(first.split, ChatSplit):
        tables = [
            load_samples(str(piece.folder.parent), piece.folder.name, files=piece.split.files) for piece in pieces
        ]
        np.savez(
            folder / SAMPLES_FILE,
            num_tokens=np.concatenate([table.num_tokens for table in tables]),
            num_answers=np.concatenate([table.num_answers for table in tables]),
            answer_tokens=np.concatenate([table.answer_tokens for table in tables]),
        )
    return _sum([piece.split for piece in pieces], fingerprint=fingerprint, files=hash_files(folder))


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


_COUNTS = re.compile("documents|tokens|answers|answer_tokens|num_.*")


def _sum(entries: Sequence[Any], **others: Any) -> Any:
    """Return the first of several entries of one class with the sums of all in its counts, and `others` replaced."""
    names = [f.name for f in dataclasses.fields(entries[0])]
    values = {name: [getattr(entry, name) for entry in entries] for name in names}
    sums = {name: sum(some) for name, some in values.items() if _COUNTS.fullmatch(name)}
    longest = {name: max(some) for name, some in values.items() if name == "longest"}
    return dataclasses.replace(entries[0], **sums, **longest, **others)
