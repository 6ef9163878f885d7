"""Checkpoints read and written whole; in the form of version 0.1 too."""

import json
import struct
from pathlib import Path
from typing import Any

import torch

from meap_lit.checkpoint import checksums
from meap_lit.checkpoint.folder import StoredCheckpoint, write


def read(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, as Lightning's Trainer takes it."""
    return StoredCheckpoint(path).read_all()


def save(content: dict[str, Any], path: Path, sealed: bool = True) -> None:
    """Write a checkpoint, with its checksums."""
    write(content, path)
    if sealed:
        checksums.seal(path, checksums.checksums(path))


def save_as_0_1(content: Any, path: Path) -> None:
    """Write a checkpoint as version 0.1 wrote one: a file whose ZIP comment holds its checksum."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    seal_as_0_1(path)


def seal_as_0_1(path: Path) -> None:
    end = path.stat().st_size - 2  # the length of the comment, which is empty
    checksum = {"algorithm": checksums._HASH, "bytes": end, "hash": checksums._hash(path, end)}
    comment = json.dumps(checksum).encode()
    with open(path, "r+b") as file:
        file.seek(end)
        file.write(struct.pack("<H", len(comment)) + comment)
