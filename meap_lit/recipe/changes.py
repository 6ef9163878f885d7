"""Name the values that a resume changes in the recipe of its run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from meap_lit.checkpoint.folder import StoredCheckpoint
from meap_lit.errors import UserError, printable, shorten
from meap_lit.renamed import current

_IGNORED = {"base", "ckpt_path", "trainer.logger"}
"""Keys that do not affect the training: where the run starts, and where it logs."""


def changes_since(checkpoint: Path, recipe: Mapping[str, Any]) -> list[str]:
    """Return each value that differs from the recipe in a checkpoint, such as `model.mask_ratio 0.15 -> 0.0`.

    Args:
        checkpoint: The checkpoint.
        recipe: The resolved recipe that resumes from it, as `config.yaml` holds one.

    Returns:
        Nothing if the checkpoint has no readable recipe. Keys that one of the recipes lacks are left out, since other
        versions have other keys.
    """
    try:
        before = current(StoredCheckpoint(checkpoint).recipe)
    except UserError:  # `VerifyCheckpoint` reports damage
        return []
    return list(_changes(before, recipe))


def _changes(before: Any, now: Any, key: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict) and before.get("class_path") == now.get("class_path"):
        for name in now:
            inner = key if name == "init_args" else f"{key}.{name}".removeprefix(".")
            if name in before and inner not in _IGNORED:
                yield from _changes(before[name], now[name], inner)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (was, entry) in enumerate(zip(before, now, strict=True)):
            yield from _changes(was, entry, f"{key}.{number}")
    elif before != now:
        yield f"{key} {_short(before)} -> {_short(now)}"


def _short(value: Any) -> str:
    """Return a short form of a value; a class is represented by its name."""
    if isinstance(value, dict) and isinstance(value.get("class_path"), str):
        return str(value["class_path"].rpartition(".")[2])
    return "null" if value is None else shorten(printable(str(value)))
