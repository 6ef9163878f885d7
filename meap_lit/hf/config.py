"""Hugging Face's config.json and tensor names, to and from ours.

Four families have the decoder's shape: Llama, Mistral, Qwen2 (bias on query, key, value) and Qwen3 (norm of queries
and keys). What a config.json asks for and the decoder does not do is refused by name, wherever it would change a
number. Keys and defaults are those of transformers 5.23 in both of its layouts: `rope_theta` and `rope_scaling` of
version 4, `rope_parameters` of version 5.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from meap_lit.errors import UserError
from meap_lit.model.config import DecoderConfig, RopeScaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Class that transformers builds, by `model_type`."""

_HEAD = "lm_head.weight"

# Keys that would change what is computed, and the values with which they do not.
_NEUTRAL = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "is_causal": (True,),
    "attention_dropout": (0,),
    "partial_rotary_factor": (1,),
    "quantization_config": (),
    "compression_config": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
}
_SCALING_KEYS: dict[Any, tuple[str, ...]] = {
    "linear": (),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow"),
}
_ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"),
    *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate"),
    *("attention_factor", "mscale", "mscale_all_dim"),
}


POSITION_KEYS = ("max_position_embeddings", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
"""Keys of config.json that together limit the context."""

_DEFAULT_WINDOW, _DEFAULT_FIRST_WINDOW_LAYER = 4096, 28  # of transformers, where a file leaves these keys out


def hf_name(name: str) -> str:
    """Return the name in a Hugging Face file of the decoder's parameter `name`."""
    return name if name == _HEAD else f"model.{name}"


def our_name(hf_name: str) -> str | None:
    """Return the decoder's name of a tensor in a Hugging Face file; None for what is computed, not learned."""
    # old Llama files hold the inverse frequencies of the rotary positions
    return None if hf_name.endswith("rotary_emb.inv_freq") else hf_name.removeprefix("model.")


# ------------------------------------------------------------------------------------------------- reading


def read_config(content: Mapping[str, Any], where: str) -> tuple[DecoderConfig, str]:
    """Return the decoder that a config.json describes.

    The context is `max_position_embeddings`, or with YaRN factor * original context where that is more: Qwen2.5's model
    card adds YaRN beside an unchanged `max_position_embeddings`. A sliding window W caps the context, because the
    decoder attends to everything: rows of up to W tokens give the same numbers with and without the window.

    Args:
        content: The parsed file.
        where: The file, for messages.

    Returns:
        Its configuration, vocabulary as stated, and its `model_type`.

    Raises:
        UserError: If the file lacks a size, or names an architecture or a feature that the decoder does not have.
    """
    model_type = _model_type(content, where)
    _refuse_features(content, model_type, where)
    sizes = {key: _count(content, key, where) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")}
    num_heads = sizes["num_attention_heads"]
    max_seq_len = _count(content, "max_position_embeddings", where)
    # an absent width is the quotient everywhere but in Qwen3, which has a number as its default
    head_dim = _optional_count(content, "head_dim", where) or (128 if model_type == "qwen3" else None)
    outer_theta = _number(content, "rope_theta", 10_000.0, where)
    window = sliding_window(content, model_type, sizes["num_hidden_layers"], where)
    try:
        rope_scaling = _rope_scaling(content, max_seq_len, where)
        if rope_scaling is not None and rope_scaling.type == "yarn":
            max_seq_len = max(max_seq_len, int(rope_scaling.factor * rope_scaling.original_max_seq_len))
        return DecoderConfig(
            num_layers=sizes["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=_num_kv_heads(content, model_type, num_heads, where),
            hidden_size=sizes["hidden_size"],
            intermediate_size=_count(content, "intermediate_size", where),
            vocab_size=_count(content, "vocab_size", where),
            max_seq_len=min(max_seq_len, window or max_seq_len),
            head_dim=None if head_dim == sizes["hidden_size"] / num_heads else head_dim,
            norm_eps=_number(content, "rms_norm_eps", 1e-6, where),
            rope_theta=_number(_rope(content, where), "rope_theta", outer_theta, where),
            rope_scaling=rope_scaling,
            tie_embeddings=bool(content.get("tie_word_embeddings")),
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
        ), model_type
    except UserError as error:
        raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from error


def _model_type(content: Mapping[str, Any], where: str) -> str:
    architectures = content.get("architectures") or []
    for model_type, architecture in ARCHITECTURES.items():
        if architecture in architectures or (not architectures and content.get("model_type") == model_type):
            return model_type
    named = ", ".join(map(str, architectures)) or f"model_type {content.get('model_type')!r}"
    raise UserError(f"{where}: architecture {named} is not supported; choose from {', '.join(ARCHITECTURES.values())}")


def _refuse_features(content: Mapping[str, Any], model_type: str, where: str) -> None:
    for key, neutral in _NEUTRAL.items():
        if key == "attention_bias" and model_type in ("mistral", "qwen2"):
            continue  # these do not read it
        value = content.get(key)
        if value is not None and value not in neutral:
            raise UserError(f"{where}: {key} {_json(value)} is not supported{_instead(neutral)}")


def _instead(neutral: tuple[Any, ...]) -> str:
    return f"; it must be {_json(neutral[0])} or absent" if neutral else "; use the model as it was before quantization"


def _json(value: Any) -> str:
    """Return a value as JSON text, shortened if it is long."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _num_kv_heads(content: Mapping[str, Any], model_type: str, num_heads: int, where: str) -> int:
    # Llama 1 and 2 leave it out, null means as many as query heads, in every family
    if content.get("num_key_value_heads") is None and (model_type == "llama" or "num_key_value_heads" in content):
        return num_heads
    return _count(content, "num_key_value_heads", where)


def sliding_window(content: Mapping[str, Any], model_type: str, num_layers: int, where: str) -> int | None:
    """Return the width of the sliding window of some layer; None where all layers attend to everything.

    Args:
        content: A config.json, or its `POSITION_KEYS`.
        model_type: The family, which decides what the keys mean: Llama has no window, Mistral one in all layers, Qwen
            one from `max_window_layers` on if `use_sliding_window` is true.
        num_layers: Number of layers.
        where: The file, for messages.

    Raises:
        UserError: If a key has a wrong value.
    """
    layers = content.get("layer_types")
    if not isinstance(layers, list | None):
        raise UserError(f"{where}: layer_types must be a list, got {_json(layers)}")
    unknown = [kind for kind in layers or () if kind not in ("full_attention", "sliding_attention")]
    if unknown:
        raise UserError(f"{where}: layer_types {_json(unknown[0])} is not supported; only full_attention is")
    if model_type == "llama" or (model_type != "mistral" and not content.get("use_sliding_window")):
        return None
    width = _optional_count({"sliding_window": _DEFAULT_WINDOW, **content}, "sliding_window", where)
    first = _number(content, "max_window_layers", _DEFAULT_FIRST_WINDOW_LAYER, where)
    slides = num_layers > first if layers is None else "sliding_attention" in layers
    return width if slides or model_type == "mistral" else None


def _rope(content: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{where}: the rotary parameters must be an object, got {_json(rope)}")
    return rope


def _rope_scaling(content: Mapping[str, Any], max_seq_len: int, where: str) -> RopeScaling | None:
    rope = _rope(content, where)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if unknown := sorted(set(rope) - _ROPE_KEYS):
        raise UserError(f"{where}: {unknown[0]} in the rotary parameters is not supported")
    if rope_type not in ("default", *_SCALING_KEYS):
        known = ", ".join(_SCALING_KEYS)
        raise UserError(f"{where}: rope_type {rope_type} is not supported; choose from default, {known}")
    for key, neutral in (("partial_rotary_factor", (1,)), ("truncate", (True,))):
        if rope.get(key) is not None and rope[key] not in neutral:
            raise UserError(f"{where}: {key} {_json(rope[key])} is not supported{_instead(neutral)}")
    if rope_type == "default":
        return None
    numbers = {key: float(value) for key, value in rope.items() if isinstance(value, int | float)}
    needed = ("factor", *_SCALING_KEYS[rope_type]) if rope_type == "llama3" else ("factor",)
    for key in needed:
        if key not in numbers:
            raise UserError(f"{where}: rope_type {rope_type} needs a number as {key}, got {rope.get(key)!r}")
    settings: dict[str, Any] = {"type": rope_type, "factor": numbers["factor"]}
    settings |= {key: numbers[key] for key in _SCALING_KEYS[rope_type] if key in numbers}
    if rope_type != "linear":
        # as transformers 5 does: the outer value goes before the inner, the whole context is the default
        originals = (_optional_count(part, "original_max_position_embeddings", where) for part in (content, rope))
        settings["original_max_seq_len"] = next(filter(None, originals), max_seq_len)
    if rope_type == "yarn":
        settings["attention_factor"] = _attention_factor(numbers)
    return RopeScaling(**settings)


def _attention_factor(numbers: Mapping[str, float]) -> float | None:
    """Return YaRN's factor on cosine and sine, if not the usual one (transformers, `_compute_yarn_parameters`)."""
    mscale, mscale_all_dim = numbers.get("mscale"), numbers.get("mscale_all_dim")
    if "attention_factor" in numbers or not (mscale and mscale_all_dim):
        return numbers.get("attention_factor")
    log_factor = 0.1 * math.log(numbers["factor"])
    return (mscale * log_factor + 1) / (mscale_all_dim * log_factor + 1)


def _count(content: Mapping[str, Any], key: str, where: str) -> int:
    value = content.get(key)
    if not isinstance(value, int) or value < 1:
        found = "has no" if value is None else f"has a wrong value {value!r} for"
        raise UserError(f"{where} {found} {key}; a whole number of at least 1 is needed")
    return value


def _optional_count(content: Mapping[str, Any], key: str, where: str) -> int | None:
    return None if content.get(key) is None else _count(content, key, where)


def _number(content: Mapping[str, Any], key: str, default: float, where: str) -> float:
    value = content.get(key)
    if not isinstance(value, int | float | None):
        raise UserError(f"{where} has a wrong value {value!r} for {key}; a number is needed")
    return default if value is None else float(value)


# ------------------------------------------------------------------------------------------------- writing


def family(config: DecoderConfig, wanted: str | None = None) -> str | None:
    """Return the `model_type` under which transformers computes what a decoder of this configuration does.

    That is the `wanted` one if it fits, so that a Mistral stays one. It is None for the one combination that no family
    has, a bias on query and key and a norm over them.
    """
    if config.qkv_bias or config.qk_norm:
        return {(True, False): "qwen2", (False, True): "qwen3"}.get((config.qkv_bias, config.qk_norm))
    if config.hidden_size % config.num_heads:
        return "mistral"  # computes the same as Llama, whose configuration insists on a width that divides
    return wanted if wanted in ("llama", "mistral") else "llama"


def write_config(
    config: DecoderConfig, model_type: str, dtype: torch.dtype, positions: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the content of the config.json that describes a decoder, special tokens left out.

    Args:
        config: The decoder's.
        model_type: Its family.
        dtype: Dtype of the weights.
        positions: `POSITION_KEYS` of the config.json that the decoder came from. They are written as they were, unless
            the decoder has another context than they describe.

    Rotary parameters and dtype are written in the layout of transformers 4, which 5 reads too; the reverse does not
    hold, and version 4 would silently take its default `rope_theta`. Versions before 5 may differ on YaRN: 4.45
    computes it from the whole context instead of the original one.
    """
    content: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else _write_rope_scaling(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
    }
    if model_type == "llama":
        content |= {"attention_bias": False, "mlp_bias": False}
    else:
        content["sliding_window"] = None  # Mistral's default is a window of 4,096
    if not positions:
        return content
    as_before = {**content, **positions}
    return as_before if read_config(as_before, "config.json") == read_config(content, "config.json") else content


def _write_rope_scaling(scaling: RopeScaling) -> dict[str, Any]:
    content: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type == "linear":
        return content
    content["original_max_position_embeddings"] = scaling.original_max_seq_len
    content |= {key: getattr(scaling, key) for key in _SCALING_KEYS[scaling.type]}
    if scaling.attention_factor is not None:
        content["attention_factor"] = scaling.attention_factor
    return content
