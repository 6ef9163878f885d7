"""`python -m meap_lit checkpoint ...`: look at the checkpoints of runs, check them, and make one file of shards."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meap_lit.checkpoint.checksums import check, checksums, read_file, recorded, seal, verify, write_file
from meap_lit.checkpoint.find import find_checkpoint
from meap_lit.checkpoint.shards import read_index, read_shards, read_trainer_state, weights_in
from meap_lit.errors import UserError


@dataclass(kw_only=True)
class Verify:
    """Compare the files of a checkpoint with the checksums that were written with it.

    Args:
        checkpoint: A .ckpt file or folder, or the folder of a run, which stands for its newest checkpoint.
    """

    checkpoint: str

    def run(self) -> None:
        """Print that all is well.

        Raises:
            UserError: If a file is damaged or missing (the first is named), or there are no checksums.
        """
        path = find_checkpoint(self.checkpoint)
        num_files = verify(path)
        if num_files is None:
            raise UserError(f"checkpoint {path} was written without checksums; nothing can be said of its content")
        print(f"{path}: as it was written ({num_files} file{'s' if num_files > 1 else ''}, {_gb(_size(path))})")


@dataclass(kw_only=True)
class Inspect:
    """Say what a checkpoint holds.

    Args:
        checkpoint: A .ckpt file or folder, or the folder of a run, which stands for its newest checkpoint.
        verify: Hash the checkpoint and compare it with its checksums; false compares sizes only.
    """

    checkpoint: str
    verify: bool = True

    def run(self) -> None:
        """Print a table.

        Raises:
            UserError: If there is no checkpoint, or it cannot be read.
        """
        path = find_checkpoint(self.checkpoint)
        check(path, hashes=self.verify)
        rows = describe(path)
        width = max(map(len, rows))
        print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))


@dataclass(kw_only=True)
class Consolidate:
    """Make one file of a checkpoint in shards, weights and optimizer's state, that every strategy resumes from.

    Args:
        checkpoint: A folder of shards, or the folder of a run, which stands for its newest checkpoint.
        output: The file to write, ending in .ckpt. All of the checkpoint passes through memory.
        verify: Hash the checkpoint and compare it with its checksums; false compares sizes only.
    """

    checkpoint: str
    output: str
    verify: bool = True

    def run(self) -> None:
        """Write the file.

        Raises:
            UserError: If the checkpoint is damaged or in one file already, or the file cannot be written.
        """
        path, output = find_checkpoint(self.checkpoint), Path(self.output)
        if path.is_file():
            raise UserError(f"checkpoint {path} is one file already")
        if output.suffix != ".ckpt":
            raise UserError(f"--output {output} must end in .ckpt; Lightning takes no other file for a checkpoint")
        if output.exists():
            raise UserError(f"--output {output} exists already; remove it or name another")
        check(path, hashes=self.verify)
        checkpoint = read_shards(path)
        aside = output.with_name(f"{output.name}.partial-{os.getpid()}")
        try:
            write_file(checkpoint, aside)
            seal(aside, checksums(aside))
            os.rename(aside, output)
        except OSError as error:
            if aside.exists():
                aside.unlink()
            raise UserError(f"cannot write --output {output}: {error.strerror}; nothing was kept") from error
        print(f"{output}: optimizer step {checkpoint['global_step']}, {_gb(_size(output))}")


def describe(path: Path) -> dict[str, str]:
    """What the checkpoint `path` holds, as rows of a table.

    Raises:
        UserError: If it cannot be read.
    """
    carries = recorded(path)
    state, weights, form = _read_file(path) if path.is_file() else _read_folder(path)
    rows = {
        "checkpoint": str(path),
        "format": form,
        "size": _gb(_size(path)),
        "optimizer step": str(state["global_step"]),
    }
    samples = [value["samples"] for value in state.values() if isinstance(value, Mapping) and "samples" in value]
    if samples:
        rows["samples seen"] = f"{samples[0]:,}"
    dtypes: Counter[str] = Counter()
    for size, dtype in weights.values():
        dtypes[str(dtype).removeprefix("torch.")] += size
    rows["weights"] = ", ".join(f"{count:,} {name}" for name, count in dtypes.items())
    about = state.get("decoder")
    if about:
        rows |= {f"decoder.{name}": str(value) for name, value in about["config"].items() if value is not None}
        if about.get("lora"):
            rows["adapters"] = ", ".join(f"{name} {value}" for name, value in about["lora"].items())
        if about.get("init_from"):
            rows["started from"] = about["init_from"]
    rows["checksums"] = "none" if carries is None else f"of {len(carries)} file{'s' if len(carries) > 1 else ''}"
    return rows


_Weights = dict[str, tuple[int, torch.dtype]]
"""Number of elements and dtype of each weight."""


def _read_file(path: Path) -> tuple[dict[str, Any], _Weights, str]:
    content = read_file(path)
    if "global_step" not in content:
        raise UserError(f"{path} is not a checkpoint of a run: it has no global_step in it")
    return content, {name: (tensor.numel(), tensor.dtype) for name, tensor in content["state_dict"].items()}, "one file"


def _read_folder(path: Path) -> tuple[dict[str, Any], _Weights, str]:
    index = weights_in(read_index(path))
    weights = {name: (about.size.numel(), about.properties.dtype) for name, about in index.items()}
    return read_trainer_state(path), weights, f"folder of {len(list(path.glob('*.distcp')))} shards"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e3:.1f} kB"
