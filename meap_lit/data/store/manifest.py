"""Write and read the manifest of a dataset, and check that the dataset is whole."""

import dataclasses
import hashlib
import json
import re
import shlex
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from meap_lit.data.store.chunks import (
    INDEX_FILE,
    MEND,
    SAMPLES_FILE,
    SHA256,
    ChatIndex,
    ChatSplit,
    Split,
    check_chunk_files,
    check_hash,
    check_index,
    parse_description,
    parse_index,
)
from meap_lit.data.store.remote import DEFAULT_STORAGE, Storage
from meap_lit.errors import UserError
from meap_lit.tokenizer.tokenizer import Tokenizer

MANIFEST_FILE = "manifest.json"
VERSION = 2
"""Since 2 the manifest has the hashes of the files that describe the dataset, and of itself."""
Kind = Literal["text", "chat"]


@dataclass(frozen=True)
class Source:
    """One file that the dataset was made of."""

    path: str
    bytes: int


@dataclass(frozen=True)
class ChatDetails:
    """The part of a manifest that only a dataset of conversations has."""

    template: str
    """Name of the chat template."""
    template_source: str
    """Its Jinja source."""
    max_tokens: int | None
    """Length to which samples were limited."""
    num_dropped: int
    """Conversations left out because they are longer."""
    num_truncated: int
    """Conversations cut because they are longer."""
    num_untrained: int = 0
    """Conversations left out because no turn is to be learned."""


@dataclass(frozen=True)
class PartDetails:
    """The part of a manifest that only a part of a dataset has: one of `count`, which `prepare merge` puts together."""

    index: int
    count: int
    reserve_draw: float | None
    """Draw of the document in the split `reserve`, if there is one; see `SplitWriter.close_part`."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of manifest.json, which is beside the splits and is written last.

    Args:
        tokenizer_fingerprint: `fingerprint_for` the tokenizer that made the ids.
        vocab_size: Its vocabulary: every id is below.
        eos_token_id: Id that closes every document of text.
        bos_token_id: The id of the BOS that the tokenizer names; documents start with it if the tokenizer writes it.
        mask_token_id: Id of the mask token; the data does not have it.
        dtype: uint16 or int32.
        val_share: Share of documents that was to be held out.
        splits: `train`, and `val` unless val_share is 0; of a part those with a document (see `SplitWriter`).
        sources: Files read, in order; in a part, those of all parts.
        num_empty: Documents left out because they hold nothing but white space.
        num_skipped: Lines left out because they could not be read.
        version: Version of this format.
        kind: `text` or `chat`.
        chat: More of what a chat dataset is; None for text.
        part: Which part of a dataset this is, `shard` in the file; None for a whole one.
    """

    tokenizer_fingerprint: str
    vocab_size: int
    eos_token_id: int
    bos_token_id: int | None
    mask_token_id: int
    dtype: str
    val_share: float
    splits: Mapping[str, Split]  # ChatSplit in a chat dataset
    sources: list[Source]
    num_empty: int
    num_skipped: int
    version: int = VERSION
    kind: Kind = "text"
    chat: ChatDetails | None = None
    part: PartDetails | None = None

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the dataset's tokens, their layout and their tokenizer; the same wherever it is stored."""
        parts = [self.tokenizer_fingerprint, *(f"{name}:{split.fingerprint}" for name, split in self.splits.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @classmethod
    def load(cls, location: str, storage: Storage = DEFAULT_STORAGE, kind: Kind = "text") -> "Manifest":
        """Read the manifest of a dataset, a folder or address above `train` and `val`, and check that it is whole.

        The files that describe the dataset are compared with their hashes. In a local folder every chunk must be there
        and have its size; what chunks hold is compared when they are first read.

        Raises:
            UserError: If the folder holds no complete dataset, or a dataset of another kind.
        """
        read = _reader(location, storage, kind)
        manifest = cls._parse(read(MANIFEST_FILE), location)
        if manifest.kind != kind:
            found = _CONTENT.get(manifest.kind, manifest.kind)
            raise UserError(
                f"dataset {location} holds {found}, made by prepare {manifest.kind}; needed are {_CONTENT[kind]}, "
                f"which are made with: {_command('DIR', kind)}"
            )
        for name, split in manifest.splits.items():
            index = check_index(read(f"{name}/{INDEX_FILE}"), split, f"{location}/{name}")
            if "://" not in location:
                check_chunk_files(Path(location, name), index)
        return manifest

    @classmethod
    def _parse(cls, text: bytes, location: str) -> "Manifest":
        content = parse_description(text, f"{location}/{MANIFEST_FILE}")
        version = content.get("version")
        if isinstance(version, int) and version > VERSION:
            raise UserError(
                f"dataset {location} has a manifest of version {version}, this meap_lit reads up to {VERSION}; "
                f"upgrade meap_lit or prepare the dataset again"
            )
        _check_own_hash(text, content, location)
        try:
            chat, part = content.pop("chat", None), content.pop("shard", None)
            split_type = ChatSplit if chat else Split
            splits = {name: split_type(**split) for name, split in content.pop("splits").items()}
            sources = [Source(**source) for source in content.pop("sources")]
            manifest = cls(
                **content,
                splits=splits,
                sources=sources,
                chat=ChatDetails(**chat) if chat else None,
                part=PartDetails(**part) if part else None,
            )
            for entry in filter(None, (manifest, manifest.chat, manifest.part, *sources, *splits.values())):
                _check_types(entry)
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{location}/{MANIFEST_FILE} is not a manifest of meap_lit ({error})") from error
        if not splits.keys() <= _SPLITS or (part is None and "train" not in splits):
            raise UserError(
                f"{location}/{MANIFEST_FILE} is damaged: its splits are {', '.join(splits) or 'none'}; {MEND}"
            )
        return manifest

    def save(self, folder: Path) -> None:
        """Write manifest.json into `folder`."""
        content = dataclasses.asdict(self)
        content["shard"] = content.pop("part")
        content = {name: value for name, value in content.items() if name not in ("chat", "shard") or value is not None}
        body = json.dumps(content, indent=1).removesuffix("\n}")
        own_hash = hashlib.sha256(body.encode()).hexdigest()
        (folder / MANIFEST_FILE).write_text(f'{body},\n "{SHA256}": "{own_hash}"\n}}\n')

    def check_tokenizer(
        self, tokenizer: Tokenizer, dataset: str, tokenizer_folder: str, option: str = "data.tokenizer"
    ) -> None:
        """Raise `UserError` if the dataset was prepared with another tokenizer; the other arguments are for it."""
        expected = fingerprint_for(self.kind, tokenizer)
        if expected == self.tokenizer_fingerprint:
            return
        if tokenizer.fingerprint == self.tokenizer_fingerprint:
            around = tokenizer.decode([*tokenizer.before_text, *tokenizer.after_text])
            raise UserError(
                f"dataset {dataset} was prepared by an earlier version, without the {around} that {tokenizer_folder} "
                f"writes around each text; prepare the dataset again"
            )
        raise UserError(
            f"dataset {dataset} was prepared with another tokenizer than {tokenizer_folder} (fingerprint "
            f"{self.tokenizer_fingerprint[:8]} against {expected[:8]}); name that one as {option}, or prepare the "
            f"dataset again with this one"
        )


def fingerprint_for(kind: Kind, tokenizer: Tokenizer) -> str:
    """Return the fingerprint of what decides the ids of a dataset; in chats the template writes all special tokens."""
    return tokenizer.document_fingerprint if kind == "text" else tokenizer.fingerprint


def load_samples(
    location: str, split: str, storage: Storage = DEFAULT_STORAGE, files: Mapping[str, str] | None = None
) -> ChatIndex:
    """Read the sizes of the samples of one split of a chat dataset, whose manifest has been loaded.

    Raises:
        UserError: If the table is missing, damaged, belongs to other data or has not the hash in `files`, if given.
    """
    read = _reader(location, storage, "chat")
    folder = f"{location}/{split}"
    index, table = read(f"{split}/{INDEX_FILE}"), read(f"{split}/{SAMPLES_FILE}")
    check_hash(index, files, f"{folder}/{INDEX_FILE}")
    check_hash(table, files, f"{folder}/{SAMPLES_FILE}")
    return ChatIndex.parse(table, parse_index(index, folder), folder)


_SPLITS = {"train", "val", "reserve"}
"""Names that a split may have, since each is a folder; see `splits`."""

_OWN_HASH = re.compile(rb'(.*),\n "sha256": "([0-9a-f]{64})"\n}\n', re.DOTALL)
"""The end of a manifest: the hash of all that comes before it."""

_told: set[str] = set()
"""Datasets that this process has printed a note about."""


def _check_own_hash(text: bytes, content: dict[str, Any], location: str) -> None:
    """Compare a manifest with the hash at its end, which is taken out of `content`."""
    stated = content.pop(SHA256, None)
    if stated is None and content.get("version", 1) == 1:
        if "splits" in content and location not in _told:
            _told.add(location)
            print(f"note: dataset {location} is of an older version without hashes of its manifest", file=sys.stderr)
        return
    found = _OWN_HASH.fullmatch(text)
    if found is None or hashlib.sha256(found[1]).hexdigest() != stated:
        raise UserError(f"{location}/{MANIFEST_FILE} is damaged: its SHA-256 differs from that at its end; {MEND}")


def _check_types(entry: Any) -> None:
    """Raise TypeError if a field of a dataclass that was read from JSON has another type than it says."""
    for name, hint in typing.get_type_hints(type(entry)).items():
        hints = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
        origins = [typing.get_origin(kind) or kind for kind in hints]
        classes = tuple({Literal: str, float: int | float}.get(origin, origin) for origin in origins)
        value = getattr(entry, name)
        if not isinstance(value, classes) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r:.80}")


_CONTENT = {"text": "documents of text", "chat": "conversations"}


def _command(location: str, kind: Kind) -> str:
    return f"python -m meap_lit prepare {kind} --input FILES --tokenizer DIR --output {shlex.quote(location)}"


def _reader(location: str, storage: Storage, kind: Kind) -> Callable[[str], bytes]:
    """Return a function that reads a file of the dataset at `location`."""
    if "://" in location:
        return lambda name: storage.hasty.read(f"{location.rstrip('/')}/{name}")
    folder = Path(location)
    if folder.is_file():
        raise UserError(f"dataset {location} is a file; name the folder that prepare {kind} made (its --output)")
    if not folder.is_dir():
        raise UserError(f"dataset folder {location} does not exist; make it with: {_command(location, kind)}")
    if not (folder / MANIFEST_FILE).is_file():
        if (folder.parent / MANIFEST_FILE).is_file():
            raise UserError(f"{location} is one split of a dataset; name the folder above it, {folder.parent}")
        state = f"holds no {MANIFEST_FILE}" if any(folder.iterdir()) else "is empty"
        raise UserError(
            f"dataset folder {location} {state}: it was not made, or not finished, by meap_lit prepare {kind}"
        )

    def read(name: str) -> bytes:
        try:
            return (folder / name).read_bytes()
        except OSError as error:
            raise UserError(f"dataset {location} is incomplete: cannot read {name} ({error.strerror})") from error

    return read
