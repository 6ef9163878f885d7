"""`python -m meap_lit checkpoint ...`: inspect the checkpoints of runs, verify them, and copy them into one part."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from meap_lit.checkpoint.checksums import check, checksums, reading, recorded, seal, verify
from meap_lit.checkpoint.find import find_checkpoint
from meap_lit.checkpoint.folder import StoredCheckpoint, write
from meap_lit.errors import UserError
from meap_lit.files import new_folder


@dataclass(kw_only=True)
class Verify:
    """Compare the files of a checkpoint with the checksums that were written with it.

    Args:
        checkpoint: A checkpoint (.ckpt), or the folder of a run for its newest checkpoint.
    """

    checkpoint: str

    def run(self) -> None:
        """Compare the checkpoint with its checksums and print its size.

        Raises:
            UserError: If a file is damaged or missing (the first is named), or there are no checksums.
        """
        path = find_checkpoint(self.checkpoint)
        num_files = verify(path)
        if num_files is None:
            raise UserError(f"checkpoint {path} was written without checksums, so its content cannot be verified")
        print(f"{path}: verified ({num_files} file{'s' if num_files > 1 else ''}, {_gb(_size(path))})")


@dataclass(kw_only=True)
class Inspect:
    """Print what a checkpoint holds.

    Args:
        checkpoint: A checkpoint (.ckpt), or the folder of a run for its newest checkpoint.
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
    """Copy a checkpoint of any strategy or version into one part, with checksums.

    Args:
        checkpoint: A checkpoint (.ckpt), or the folder of a run for its newest checkpoint.
        output: The checkpoint to write, ending in .ckpt. All of the checkpoint passes through memory.
        verify: Hash the checkpoint and compare it with its checksums; false compares sizes only.
    """

    checkpoint: str
    output: str
    verify: bool = True

    def run(self) -> None:
        """Write the checkpoint.

        Raises:
            UserError: If the checkpoint is damaged, or the output cannot be written.
        """
        path, output = find_checkpoint(self.checkpoint), Path(self.output)
        if output.suffix != ".ckpt":
            raise UserError(f"--output {output} must end in .ckpt, like every checkpoint")
        if output.exists():
            raise UserError(f"--output {output} exists already; remove it or name another")
        check(path, hashes=self.verify)
        stored = StoredCheckpoint(path)
        step, checkpoint = _step(stored), stored.read_all()
        with new_folder(output) as folder:
            write(checkpoint, folder)
            seal(folder, checksums(folder))
        print(f"{output}: optimizer step {step}, {_gb(_size(output))}")


def describe(path: Path) -> dict[str, str]:
    """Return what a checkpoint holds, as rows of a table.

    Raises:
        UserError: If it cannot be read.
    """
    carries, stored = recorded(path), StoredCheckpoint(path)
    step, state = _step(stored), stored.trainer_state
    rows = {
        "checkpoint": str(path),
        "format": _parts(path),
        "size": _gb(_size(path)),
        "optimizer step": str(step),
    }
    counters = [value["samples"] for value in state.values() if isinstance(value, Mapping) and "samples" in value]
    if counters:
        rows["samples seen"] = f"{counters[0]:,}" if isinstance(counters[0], int) else str(counters[0])
    dtypes: Counter[str] = Counter()
    for weight in stored.weights.values():
        dtypes[str(weight.properties.dtype).removeprefix("torch.")] += weight.size.numel()
    rows["weights"] = ", ".join(f"{count:,} {name}" for name, count in dtypes.items())
    if about := state.get("decoder"):
        if not isinstance(about.get("config"), Mapping) or not isinstance(about.get("lora") or {}, Mapping):
            raise UserError(f"checkpoint {path} is damaged: it does not describe its decoder")
        rows |= {f"decoder.{name}": str(value) for name, value in about["config"].items() if value is not None}
        if about.get("lora"):
            rows["adapters"] = ", ".join(f"{name} {value}" for name, value in about["lora"].items())
        if about.get("init_from"):
            rows["started from"] = about["init_from"]
    rows["checksums"] = "none" if carries is None else f"of {len(carries)} file{'s' if len(carries) > 1 else ''}"
    return rows


def _step(stored: StoredCheckpoint) -> int:
    if "global_step" not in stored.trainer_state:
        raise UserError(f"{stored.path} is not a checkpoint of a run: it has no global_step in it")
    return stored.trainer_state["global_step"]


def _parts(path: Path) -> str:
    if path.is_file():
        return "one file, of an earlier version"
    num_parts = len(list(path.glob("*.distcp")))
    return f"folder of {num_parts} part{'s' if num_parts > 1 else ''}"


def _size(path: Path) -> int:
    with reading(path):
        return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e3:.1f} kB"
