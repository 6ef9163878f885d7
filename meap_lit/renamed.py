"""Old names of classes, keys and values, so that recipes and runs of earlier versions keep working.

Every recipe, saved `config.yaml`, record of an evaluation and word of a command line goes through `current` or
`current_key` where it is read. Nothing writes an old name.
"""

import re
from collections.abc import Mapping
from typing import Any

from meap_lit.errors import UserError

CLASSES = {
    "meap_lit.data.chat.PrepareChat": "meap_lit.data.prepare.chat.PrepareChat",
    "meap_lit.data.merge.MergeShards": "meap_lit.data.prepare.merge.MergeParts",
    "meap_lit.data.python_text.PythonText": "meap_lit.data.corpora.python_text.PythonText",
    "meap_lit.data.synthetic.FactCorpus": "meap_lit.data.corpora.facts.FactCorpus",
    "meap_lit.data.synthetic.FactInstructions": "meap_lit.data.corpora.facts.FactInstructions",
    "meap_lit.data.text.PrepareText": "meap_lit.data.prepare.text.PrepareText",
    "meap_lit.data.tokenizer.TrainTokenizer": "meap_lit.data.prepare.tokenizer.TrainTokenizer",
    "meap_lit.duplication.Duplication": "meap_lit.masking.duplication.Duplication",
    "meap_lit.evaluation.attention.MaskedAttention": "meap_lit.evaluation.attention.masked.MaskedAttention",
    "meap_lit.evaluation.attention_segments.AttentionSegments": (
        "meap_lit.evaluation.attention.segments.AttentionSegments"
    ),
    "meap_lit.evaluation.commonsense.Commonsense": "meap_lit.evaluation.tasks.commonsense.Commonsense",
    "meap_lit.evaluation.copying.Copying": "meap_lit.evaluation.tasks.copying.Copying",
    "meap_lit.evaluation.facts.FactRetrieval": "meap_lit.evaluation.tasks.facts.FactRetrieval",
    "meap_lit.evaluation.hallucination.Hallucination": "meap_lit.evaluation.tasks.hallucination.Hallucination",
    "meap_lit.evaluation.judges.ChatJudge": "meap_lit.evaluation.judging.judges.ChatJudge",
    "meap_lit.evaluation.judges.RecordedJudge": "meap_lit.evaluation.judging.judges.RecordedJudge",
    "meap_lit.evaluation.key_value.KeyValueRetrieval": "meap_lit.evaluation.tasks.key_value.KeyValueRetrieval",
    "meap_lit.evaluation.multi_document_qa.MultiDocumentQA": (
        "meap_lit.evaluation.tasks.multi_document_qa.MultiDocumentQA"
    ),
    "meap_lit.evaluation.needle.MagicNumber": "meap_lit.evaluation.tasks.needle.MagicNumber",
    "meap_lit.evaluation.needle.MultiNeedle": "meap_lit.evaluation.tasks.needle.MultiNeedle",
    "meap_lit.evaluation.needle.Needle": "meap_lit.evaluation.tasks.needle.Needle",
    "meap_lit.evaluation.perplexity.Perplexity": "meap_lit.evaluation.tasks.perplexity.Perplexity",
    "meap_lit.evaluation.reasoning.Reasoning": "meap_lit.evaluation.tasks.reasoning.Reasoning",
    "meap_lit.parallel.strategies.FlatSharded": "meap_lit.parallel.strategies.Sharded",
    "meap_lit.strategies.FlatSharded": "meap_lit.parallel.strategies.Sharded",
    "meap_lit.strategies.Sharded": "meap_lit.parallel.strategies.Sharded",
}
"""Import paths that a recipe may name: old to new."""

KEYS = {
    "model.mask": "mask_ratio",
    "model.mask_ratio.ratio": "mask_ratio",
    "model.mask_ratio.ratios": "mask_ratios",
}
"""Keys of a recipe, without `init_args`, and the new last part of each: {"model.mask": "mask_ratio"}."""

GONE = {"trainer.strategy.save_distributed_checkpoint"}
"""Keys of a recipe, without `init_args`, that have no effect any more and are left out."""

VALUES: dict[tuple[str, str], str] = {}
"""Texts that are the value of a key, and the new text: {("data.duplication.layout", "joined"): "concat"}."""

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
            if _plain(f"{key}.{name}") in GONE:
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
    found_value = VALUES.get((_plain(key), value), CLASSES.get(value, value))
    return _REFERENCE.sub(lambda match: current_key(match[0]), found_value)


def current_key(key: str) -> str:
    """Return a dotted key with current names, with `init_args` where it has them.

    Example: `model.init_args.mask.ratio` becomes `model.init_args.mask_ratio.mask_ratio`.
    """
    parts = key.split(".")
    for end in range(1, len(parts) + 1):
        parts[end - 1] = KEYS.get(_plain(".".join(parts[:end])), parts[end - 1])
    return ".".join(parts)


def _plain(key: str) -> str:
    return key.replace(".init_args", "").removeprefix(".")
