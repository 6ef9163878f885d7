"""The model card of an exported folder: what the model is, and how it was trained."""

from typing import Any

import yaml

from meap_lit import __version__
from meap_lit.checkpoint.source import CheckpointSource
from meap_lit.files import read_text
from meap_lit.hf.weights import WeightSource
from meap_lit.hub import is_pinned
from meap_lit.secrets import without_secrets

PAPER = "https://arxiv.org/abs/2502.07490"


def model_card(source: WeightSource, name: str, adapter_only: bool) -> str:
    """Return the README.md of a repository on the Hugging Face Hub.

    Args:
        source: The weights. Those of a run of ours come with its recipe.
        name: The repository.
        adapter_only: Whether the folder holds adapters alone.
    """
    recipe = _recipe_of(source)
    base = source.init_from if isinstance(source, CheckpointSource) else None
    about: dict[str, Any] = {"library_name": "peft" if adapter_only else "transformers"}
    about |= {"pipeline_tag": "text-generation", "tags": ["meap"]}
    if base is not None and is_pinned(base):
        about["base_model"] = base.partition("@")[0]
    lines = ["---", yaml.safe_dump(about, sort_keys=False).rstrip(), "---", f"# {name.rpartition('/')[2]}", ""]
    what = "Adapters (LoRA) of a model" if adapter_only else f"A model of {source.config.num_parameters():,} parameters"
    lines += [f"{what} ({source.model_type}), exported by meap_lit {__version__}.", ""]
    lines += [f"- {line}" for line in _training(source, recipe, base)]
    if recipe:
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip()
        lines += ["", "## Recipe", "", "```yaml", text, "```"]
    return "\n".join(lines) + "\n"


def _recipe_of(source: WeightSource) -> dict[str, Any]:
    """Return the resolved recipe of a checkpoint's run, without secrets; empty if there is none.

    A checkpoint of an earlier version has no recipe in it; its run wrote one beside its checkpoints.
    """
    if not isinstance(source, CheckpointSource):
        return {}
    recipe = source.stored.recipe
    file = source.path.absolute().parent.parent / "config.yaml"
    if not recipe and file.is_file():
        recipe = yaml.safe_load(read_text(file))
    return without_secrets(recipe)


def _training(source: WeightSource, recipe: dict[str, Any], base: str | None) -> list[str]:
    """Return what is known of the training, as items of a list."""
    items = []
    if base is not None and is_pinned(base):
        repository, _, commit = base.partition("@")
        items.append(f"started from {repository}, commit {commit}")
    if source.tokens_seen is not None:
        items.append(f"tokens seen: {source.tokens_seen:,}")
    model, data = (recipe.get(part, {}).get("init_args") or {} for part in ("model", "data"))
    ratios = {
        "share of the input tokens that were masked": model.get("mask_ratio"),
        "share of the tokens of a copied answer that were masked": (data.get("duplication") or {}).get("mask_ratio"),
    }
    for meaning, ratio in ratios.items():
        if ratio is not None:
            items.append(f"{meaning} (mask_ratio): {_in_words(ratio)}")
    if any(ratio is not None for ratio in ratios.values()):
        items.append(f"method: Mask-Enhanced Autoregressive Prediction (MEAP, {PAPER}); mask_ratio 0 is plain training")
    return items


def _in_words(ratio: Any) -> str:
    """Return a number, or the class and the options of a schedule."""
    if not isinstance(ratio, dict):
        return str(ratio)
    options = (ratio.get("init_args") or {}).items()
    stated = ", ".join(f"{name} {value}" for name, value in options if value is not None)
    return f"{ratio['class_path'].rpartition('.')[2]} ({stated})"
