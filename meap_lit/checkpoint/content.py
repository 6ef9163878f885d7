"""Read what `torch.save` wrote without running code in it, and divide a checkpoint into what goes where on disk."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from meap_lit.errors import UserError


def load(file: Path) -> dict[str, Any]:
    """Return the dict in a file, its tensors mapped into memory rather than read.

    Raises:
        UserError: If the file cannot be read, is damaged, has code in it, or holds anything but a dict.
    """
    try:
        # torch compresses nothing, and what is compressed may be a thousand times as large
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("compressed")
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read checkpoint file {file}: {error.strerror}") from error
    except Exception as error:  # a damaged archive may fail in any way
        raise UserError(f"checkpoint file {file} is damaged or contains code, and is not read") from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint file {file} is damaged: it holds a {type(content).__name__}")
    return content


def divide(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state dicts of the model and of the optimizers, by the names that they have on disk, and the rest."""
    rest = dict(checkpoint)
    states = {"state_dict": rest.pop("state_dict")}
    states |= {f"optimizer_{number}": state for number, state in enumerate(rest.pop("optimizer_states", []))}
    return states, rest
