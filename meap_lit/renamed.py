"""Old names of classes and keys, so that recipes and runs of earlier versions keep working.

Every recipe, saved `config.yaml`, record of an evaluation and word of a command line goes through `current` or
`current_key` where it is read. Nothing writes an old name.
"""

import re
from collections.abc import Mapping
from typing import Any

from meap_lit.errors import UserError

MODULES = {
    "meap_lit.data.chat": "meap_lit.data.prepare.chat",
    "meap_lit.data.python_text": "meap_lit.data.corpora.python_text",
    "meap_lit.data.synthetic": "meap_lit.data.corpora.facts",
    "meap_lit.data.text": "meap_lit.data.prepare.text",
    "meap_lit.data.tokenizer": "meap_lit.data.prepare.tokenizer",
    "meap_lit.duplication": "meap_lit.masking.duplication",
    "meap_lit.evaluation.attention": "meap_lit.evaluation.attention.masked",
    "meap_lit.evaluation.attention_segments": "meap_lit.evaluation.attention.segments",
    "meap_lit.evaluation.commonsense": "meap_lit.evaluation.tasks.commonsense",
    "meap_lit.evaluation.copying": "meap_lit.evaluation.tasks.copying",
    "meap_lit.evaluation.facts": "meap_lit.evaluation.tasks.facts",
    "meap_lit.evaluation.hallucination": "meap_lit.evaluation.tasks.hallucination",
    "meap_lit.evaluation.judges": "meap_lit.evaluation.judging.judges",
    "meap_lit.evaluation.key_value": "meap_lit.evaluation.tasks.key_value",
    "meap_lit.evaluation.multi_document_qa": "meap_lit.evaluation.tasks.multi_document_qa",
    "meap_lit.evaluation.needle": "meap_lit.evaluation.tasks.needle",
    "meap_lit.evaluation.perplexity": "meap_lit.evaluation.tasks.perplexity",
    "meap_lit.evaluation.reasoning": "meap_lit.evaluation.tasks.reasoning",
    "meap_lit.strategies": "meap_lit.parallel.strategies",
}
"""Modules whose classes a recipe may name: old to new."""

CLASSES = {
    "meap_lit.data.merge.MergeShards": "meap_lit.data.prepare.merge.MergeParts",
    "meap_lit.parallel.strategies.FlatSharded": "meap_lit.parallel.strategies.Sharded",
    "meap_lit.strategies.FlatSharded": "meap_lit.parallel.strategies.Sharded",
}
"""Classes with another name now, or another module than the rest of theirs."""

KEYS = {
    "model.mask": "mask_ratio",
    "model.mask_ratio.ratio": "mask_ratio",
    "model.mask_ratio.ratios": "mask_ratios",
    "utilisation": "utilization",
}
"""Keys of a recipe, without `init_args`, and the new last part of each: {"model.mask": "mask_ratio"}."""

GONE = {"model.mask_token_id", "probe.batch_size", "trainer.strategy.save_distributed_checkpoint"}
"""Keys of a recipe, without `init_args`, that have no effect any more and are left out."""

_REFERENCE = re.compile(r"(?<=\$\{)[\w.]+(?=\})")


def current(value: Any, key: str = "") -> Any:
    """Return a recipe, or the part of one under `key`, with current names.

    Args:
        value: Mappings, lists and scalars, as read from YAML or JSON. Not modified.
        key: Dotted key of the part, with current names; empty for a whole recipe.

    Raises:
        UserError: If a key is given under its old and its new name.
    """
    if isinstance(value, Mapping):
        found: dict[Any, Any] = {}
        for name, entry in value.items():
            if is_gone(f"{key}.{name}"):
                continue
            new = KEYS.get(_plain(f"{key}.{name}"), name)
            if new != name and new in value:
                raise UserError(f"{_plain(f'{key}.{name}')} is now called {new}, and both are given; leave out {name}")
            found[new] = current(entry, f"{key}.{new}")
        return found
    if isinstance(value, list):
        return [current(entry, key) for entry in value]
    if not isinstance(value, str):
        return value
    module, _, name = value.rpartition(".")
    found_value = CLASSES.get(value) or (f"{MODULES[module]}.{name}" if module in MODULES else value)
    return _REFERENCE.sub(lambda match: current_key(match[0]), found_value)


def current_key(key: str) -> str:
    """Return a dotted key with current names, with `init_args` where it has them.

    Example: `model.init_args.mask.ratio` becomes `model.init_args.mask_ratio.mask_ratio`.
    """
    parts = key.split(".")
    for end in range(1, len(parts) + 1):
        parts[end - 1] = KEYS.get(_plain(".".join(parts[:end])), parts[end - 1])
    return ".".join(parts)


def is_gone(key: str) -> bool:
    """Return whether a dotted key is obsolete and ignored."""
    return _plain(key) in GONE


def _plain(key: str) -> str:
    return key.replace(".init_args", "").removeprefix(".")
