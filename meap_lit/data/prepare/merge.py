"""The shards of a dataset, each made by a run of its own, put together as if one run had made them.

The result holds the documents that one run would hold, split in the same way, in the order of the shards. Chunk files
are those of the shards, byte for byte: nothing is tokenised or written anew. A merged split has as fingerprint the
SHA-256 of the fingerprints of what it is made of, one a line, in the same order.
"""

import dataclasses
import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from meap_lit.data.prepare.splits import RESERVE
from meap_lit.data.prepare.step import Preparation, progress_bar
from meap_lit.data.read.readers import RECORD_FILE
from meap_lit.data.store.chunks import INDEX_FILE, SAMPLES_FILE, ChatSplit, Split, check_chunk, check_index, hash_files
from meap_lit.data.store.manifest import VERSION, Kind, Manifest, ShardDetails, Source, load_samples
from meap_lit.errors import UserError
from meap_lit.files import is_unfinished

_KINDS: dict[str, Kind] = {"PrepareText": "text", "PrepareChat": "chat"}

_COMPARED_BY_CONTENT = {"input", "tokenizer", "template", "shard"}
"""Options that are paths, or differ by right: what they stand for is compared itself."""

_HINT = "name the folders that prepare text or prepare chat made with --shard"


@dataclass(kw_only=True)
class MergeShards(Preparation):
    """Put together the shards of a dataset that `prepare text` or `prepare chat` made with --shard.

    Args:
        output: Folder to make. Where it lies on the file system of the shards, their chunk files are linked into it
            (hard links), else copied; the shards may be removed afterwards.
        input: Folders of all shards, in any order, and glob patterns.
    """

    input: list[str]

    def make(self, folder: Path) -> str:
        started = time.perf_counter()
        shards = _all_of_them(_load(_find_folders(self.input)))
        _check_alike(shards)
        pieces = _share_out(shards)
        num_bytes = sum(chunk["chunk_bytes"] for some in pieces.values() for piece in some for chunk in piece.chunks)
        with progress_bar(f"merging {self.output}", num_bytes) as bar:
            splits = {name: _merge(folder / name, some, bar) for name, some in pieces.items()}
        manifest = _whole([shard.manifest for shard in shards], splits)
        manifest.save(folder)
        Manifest.load(str(folder), kind=manifest.kind)  # reads the result as a run will
        return self._summary(manifest, len(shards), num_bytes, time.perf_counter() - started)

    def _summary(self, manifest: Manifest, num_shards: int, num_bytes: int, seconds: float) -> str:
        unit = {"text": "documents", "chat": "conversations"}[manifest.kind]
        documents = sum(size.documents for size in manifest.splits.values())
        tokens = sum(size.tokens for size in manifest.splits.values())
        return "\n".join(
            [
                f"dataset {self.output}, of {num_shards} shards",
                *(
                    f"  {name:<9}{size.documents} {unit}, {size.tokens} tokens"
                    for name, size in manifest.splits.items()
                ),
                f"  in all   {documents} {unit}, {tokens} tokens, of {len(manifest.sources)} files",
                f"  took     {seconds:.1f} s for {num_bytes / 1e6:.1f} MB of chunks",
            ]
        )


@dataclass(frozen=True)
class _Shard:
    folder: Path
    options: dict[str, Any]
    manifest: Manifest
    details: ShardDetails

    @classmethod
    def load(cls, folder: Path) -> "_Shard":
        try:
            record = json.loads((folder / RECORD_FILE).read_text())
            kind, options = _KINDS[record["step"]], record["arguments"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"input {folder} is no shard of a dataset; {_HINT}") from error
        manifest = Manifest.load(str(folder), kind=kind)
        if manifest.shard is None:
            raise UserError(f"input {folder} is no shard but a whole dataset, prepared without --shard; {_HINT}")
        return cls(folder, options, manifest, manifest.shard)

    def __str__(self) -> str:
        return f"shard {self.details.index}/{self.details.count} in {self.folder}"


def _load(folders: Sequence[Path]) -> list[_Shard]:
    shards: list[_Shard] = []
    for folder in folders:
        shard = _Shard.load(folder)
        if shards and shard.manifest.sources == (sources := shards[0].manifest.sources):
            # each shard lists all files of the input: once is enough in memory
            shard = dataclasses.replace(shard, manifest=dataclasses.replace(shard.manifest, sources=sources))
        shards.append(shard)
    return shards


def _find_folders(inputs: Sequence[str]) -> list[Path]:
    """Folders named by paths and patterns; those that a run has not finished are left out, as if not there."""
    folders: list[Path] = []
    for name in inputs:
        path = Path(name).expanduser()
        matches = [path] if path.exists() else [Path(match) for match in glob.glob(str(path), recursive=True)]
        named = [match for match in matches if match.is_dir()]
        if not named:
            raise UserError(f"input {name} is no folder; {_HINT}")
        folders += [folder for folder in named if not is_unfinished(folder)]
    return folders


# -------------------------------------------------------------------------------------------------- what fits together


def _all_of_them(shards: Sequence[_Shard]) -> list[_Shard]:
    """The shards from 0 to n - 1."""
    if not shards:
        raise UserError(f"the input holds no finished shard; {_HINT}")
    count = shards[0].details.count
    found: dict[int, _Shard] = {}
    for shard in shards:
        if shard.details.count != count:
            raise UserError(f"{shard} and {shards[0]} do not belong together: name the shards of one n")
        other = found.setdefault(shard.details.index, shard)
        if other is not shard:
            raise UserError(f"{other} is there once more, in {shard.folder}; name one of the two")
    missing = [f"{index}/{count}" for index in range(count) if index not in found]
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise UserError(
            f"of {count} shards {len(missing)} missing: {', '.join(missing[:8])}{more}; "
            f"prepare each with its --shard and name its folder too"
        )
    return [found[index] for index in range(count)]


def _check_alike(shards: Sequence[_Shard]) -> None:
    """Refuse shards that were not made of one input in one way."""
    _check_equal("prepare", [(shard, shard.manifest.kind) for shard in shards])
    _check_equal("tokenizer", [(shard, shard.manifest.tokenizer_fingerprint[:8]) for shard in shards])
    _check_equal("template", [(shard, _template(shard)) for shard in shards])
    for shard in shards:
        for source, first in zip_longest(shard.manifest.sources, shards[0].manifest.sources):
            if source != first:
                raise UserError(
                    f"{shard} was made of other input than {shards[0]}: "
                    f"{_describe(source)} where that has {_describe(first)}; prepare one of the two anew"
                )
    for name in sorted({name for shard in shards for name in shard.options} - _COMPARED_BY_CONTENT):
        values = [(shard, shard.options.get(name)) for shard in shards]
        if name in ("on_error", "on_long"):
            # a shard that was told to stop did not meet what others skipped, dropped or truncated
            values = [(shard, value) for shard, value in values if value != "stop"]
        _check_equal(name, values)


def _check_equal(what: str, values: Sequence[tuple[_Shard, Any]]) -> None:
    for shard, value in values:
        first_shard, first_value = values[0]
        if value != first_value:
            raise UserError(
                f"{shard} was made with {what} {value}, {first_shard} with {what} {first_value}; "
                f"prepare one of the two anew"
            )


def _template(shard: _Shard) -> str | None:
    if shard.manifest.chat is None:
        return None
    name, source = shard.manifest.chat.template, shard.manifest.chat.template_source
    return f"{name} ({hashlib.sha256(source.encode()).hexdigest()[:8]})"


def _describe(source: Source | None) -> str:
    return "no more file" if source is None else f"{source.path} of {source.bytes} bytes"


# ---------------------------------------------------------------------------------------------------- putting together


@dataclass(frozen=True)
class _Piece:
    """A split of a shard, which becomes a part of a split of the dataset."""

    shard: Path
    name: str
    split: Split

    @property
    def folder(self) -> Path:
        return self.shard / self.name

    @cached_property
    def index(self) -> dict[str, Any]:
        return check_index((self.folder / INDEX_FILE).read_bytes(), self.split, str(self.folder))

    @property
    def chunks(self) -> list[dict[str, Any]]:
        return self.index["chunks"]


def _share_out(shards: Sequence[_Shard]) -> dict[str, list[_Piece]]:
    """What each split of the dataset is made of, in the order of the shards."""
    reserves = [shard for shard in shards if RESERVE in shard.manifest.splits]
    if any("val" in shard.manifest.splits for shard in shards):
        reserves = []
    # one run would have held out the document of the smallest draw, the first of equal ones
    held_out = min(reserves, key=lambda shard: shard.details.reserve_draw or 0.0, default=None)
    pieces: dict[str, list[_Piece]] = {"train": [], "val": []}
    for shard in shards:
        for name, split in shard.manifest.splits.items():
            target = name if name != RESERVE else "val" if shard is held_out else "train"
            pieces[target].append(_Piece(shard.folder, name, split))
    if not pieces["train"]:
        count = sum(piece.split.documents for piece in pieces["val"])
        if count == 0:
            raise UserError(f"the {len(shards)} shards hold no document; prepare them of other input")
        raise UserError(
            f"no document is left to train on: the validation split took {count} of {count}; prepare the shards anew "
            f"with a val_share below {shards[0].manifest.val_share:g}, or 0 for no validation split"
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
                f"prepare all shards with one"
            )
        for chunk in piece.chunks:
            name = f"chunk-0-{len(chunks)}.bin"  # as LitData names those of one run
            check_chunk(piece.folder, chunk)
            _link_or_copy(piece.folder / chunk["filename"], folder / name)
            chunks.append({**chunk, "filename": name})
            bar.update(chunk["chunk_bytes"])
    fingerprint = hashlib.sha256("\n".join(piece.split.fingerprint for piece in pieces).encode()).hexdigest()
    index = {**first.index, "chunks": chunks, "updated_at": fingerprint}
    (folder / INDEX_FILE).write_text(json.dumps(index, sort_keys=True))
    if isinstance(first.split, ChatSplit):
        tables = [load_samples(str(piece.shard), piece.name, files=piece.split.files) for piece in pieces]
        np.savez(
            folder / SAMPLES_FILE,
            num_tokens=np.concatenate([table.num_tokens for table in tables]),
            num_answers=np.concatenate([table.num_answers for table in tables]),
            answer_tokens=np.concatenate([table.answer_tokens for table in tables]),
        )
    return dataclasses.replace(_sum([piece.split for piece in pieces], fingerprint), files=hash_files(folder))


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _sum(splits: Sequence[Split], fingerprint: str) -> Split:
    combine: dict[str, Callable] = {"fingerprint": lambda _: fingerprint, "longest": max, "files": lambda _: {}}
    values = {f.name: [getattr(split, f.name) for split in splits] for f in dataclasses.fields(splits[0])}
    return type(splits[0])(**{name: combine.get(name, sum)(some) for name, some in values.items()})


def _whole(manifests: Sequence[Manifest], splits: dict[str, Split]) -> Manifest:
    """The manifest of the dataset."""
    first = manifests[0]
    chats = [manifest.chat for manifest in manifests if manifest.chat is not None]
    return dataclasses.replace(
        first,
        version=VERSION,
        splits=splits,
        num_empty=sum(manifest.num_empty for manifest in manifests),
        num_skipped=sum(manifest.num_skipped for manifest in manifests),
        chat=first.chat
        and dataclasses.replace(
            first.chat,
            num_dropped=sum(chat.num_dropped for chat in chats),
            num_truncated=sum(chat.num_truncated for chat in chats),
            num_untrained=sum(chat.num_untrained for chat in chats),
        ),
        shard=None,
    )
