"""Find a checkpoint by its own name, by that of a run, or by that of a folder of runs."""

import re
from contextlib import suppress
from pathlib import Path

from meap_lit.checkpoint.checksums import INDEX, is_whole
from meap_lit.checkpoint.folder import StoredCheckpoint
from meap_lit.errors import UserError, shorten
from meap_lit.files import local_path, run_versions

LAST = "last.ckpt"
"""Link to the checkpoint that a run saved last."""


def age_of(path: str | Path) -> tuple[int, int] | None:
    """Return what the name of a checkpoint says, or None: its step, and how often a resumed run saved that step again.

    Example: `step=8.ckpt` is (8, 0) and `step=8-v1.ckpt` is (8, 1).
    """
    match = re.fullmatch(r"step=(\d+)(?:-v(\d+))?\.ckpt", Path(path).name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def find_checkpoint(path: str | Path, option: str = "--checkpoint") -> Path:
    """Return the checkpoint that `path` names: itself, or the newest whole one of a run's folder.

    Raises:
        UserError: If there is none; the message names the option that gave the path.
    """
    path = local_path(path)
    if not path.exists():
        raise UserError(f"checkpoint {path} ({option}) does not exist")
    if path.suffix == ".ckpt":
        return path
    if path.is_file() or (path / INDEX).is_file():
        raise UserError(f"checkpoint {path} ({option}) does not end in .ckpt, as those of a run do")
    newest = newest_checkpoint(path)
    if newest is None:
        # runs whose folder the recipe names, as by trainer.logger.version, have no order
        runs = sorted(run.name for run in path.iterdir() if run.is_dir() and newest_checkpoint(run) is not None)
        if runs:
            raise UserError(f"{path} ({option}) has runs with names of their own, {shorten(', '.join(runs))}; name one")
        raise UserError(f"{path} ({option}) has no complete checkpoint (step=N.ckpt); name another run or a .ckpt")
    return newest


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the whole checkpoint of a run that was saved last; None if there is none.

    Args:
        folder: Folder of one run (`runs/NAME/version_0`) or of its checkpoints, or the one above (`runs/NAME`), whose
            highest version with a whole checkpoint counts.
    """
    for run in [folder, *reversed(run_versions(folder))]:
        for checkpoints in (run / "checkpoints", run):
            steps = sorted(checkpoints.glob("step=*.ckpt"), key=lambda path: age_of(path) or (-1, 0), reverse=True)
            link = checkpoints / LAST
            if link.is_symlink() and (linked := checkpoints / link.readlink()) in steps:
                # a run that went back to an earlier step has left those after it behind, unless a kill came between
                # the save and the link
                saved_later = [path for path in steps[: steps.index(linked)] if _was_saved_later(path, linked)]
                steps = [*saved_later, linked, *steps]
            newest = next((path for path in steps if is_whole(path)), None)
            if newest is not None:
                return newest
    return None


def _was_saved_later(path: Path, other: Path) -> bool:
    """Return whether a checkpoint was saved after another.

    Their own times decide. If an earlier version wrote one of them, it has none, and the times of the files decide.
    """
    saved, before = _saved(path), _saved(other)
    if saved is None or before is None:
        try:
            saved, before = path.stat().st_mtime, other.stat().st_mtime
        except FileNotFoundError:  # the run has removed it meanwhile
            return False
    return saved > before


def _saved(path: Path) -> float | None:
    with suppress(UserError):  # damaged, which is said where it is read
        return StoredCheckpoint(path).trainer_state.get("saved")
    return None
