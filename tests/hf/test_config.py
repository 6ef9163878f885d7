"""config.json of transformers in both of its layouts, and what in it is refused."""

import dataclasses
import json
from typing import Any

import pytest
import torch
import transformers
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from meap_lit.errors import UserError
from meap_lit.hf.config import ARCHITECTURES, family, hf_name, our_name, read_config, write_config
from meap_lit.model import DecoderConfig, RopeScaling
from meap_lit.model.rope import rope_frequencies
from tests.support.hf_models import SIZES, VARIANTS, random_model

LLAMA2 = {  # what meta-llama/Llama-2-7b-hf states, a layout of 2023
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
TOY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 96,
}
QWEN2_WINDOW = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 24, "use_sliding_window": True}
SCALED = {"rope_type": "yarn", "factor": 4.0}


def test_llama_2() -> None:
    assert read_config(LLAMA2, "config.json") == (
        DecoderConfig(
            num_layers=32,
            num_heads=32,
            num_kv_heads=32,
            hidden_size=4096,
            intermediate_size=11008,
            vocab_size=32000,
            max_seq_len=4096,
        ),
        "llama",
    )


def test_defaults_of_absent_keys() -> None:
    config, _ = read_config(TOY, "config.json")
    assert (config.num_kv_heads, config.norm_eps, config.rope_theta, config.tie_embeddings) == (4, 1e-6, 10_000, False)
    qwen3, _ = read_config({**TOY, "architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2}, "config.json")
    assert (qwen3.num_kv_heads, qwen3.head_dim) == (2, 128)
    unnamed, model_type = read_config({**TOY, "architectures": None, "model_type": "llama"}, "config.json")
    assert (unnamed, model_type) == (config, "llama")


@pytest.mark.parametrize("name", VARIANTS)
def test_both_layouts_say_the_same(name: str) -> None:
    family_name, changes = VARIANTS[name]
    new = json.loads(random_model(family_name, **changes).config.to_json_string(use_diff=False))
    new["architectures"] = [f"{family_name}ForCausalLM"]
    rope = new["rope_parameters"]
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype")}
    old["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        old["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    assert read_config(old, "config.json") == read_config(new, "config.json")
    # and the scaling's name by the key that it had before `rope_type`
    if "rope_scaling" in old:
        old["rope_scaling"]["type"] = old["rope_scaling"].pop("rope_type")
        assert read_config(old, "config.json") == read_config(new, "config.json")


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_written_is_read_back(name: str) -> None:
    family_name, changes = VARIANTS[name]
    content = {**SIZES, "architectures": [f"{family_name}ForCausalLM"], **changes}
    config, model_type = read_config(content, "config.json")
    assert read_config(write_config(config, model_type, torch.bfloat16), "config.json") == (config, model_type)
    assert model_type == family(config, model_type) == family_name.lower()


def test_yarn_settings() -> None:
    rope = {**SCALED, "original_max_position_embeddings": 16, "beta_fast": 8, "mscale": 1.0, "mscale_all_dim": 1.0}
    config, _ = read_config({**TOY, "rope_scaling": rope}, "config.json")
    assert config.rope_scaling == RopeScaling("yarn", 4.0, original_max_seq_len=16, beta_fast=8.0, attention_factor=1.0)
    outer = {**TOY, "rope_scaling": rope, "original_max_position_embeddings": 8}
    assert read_config(outer, "config.json")[0].rope_scaling.original_max_seq_len == 8


@pytest.mark.parametrize(
    ("changes", "max_seq_len"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 24}, 24),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, 64),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, 64),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 24, "use_sliding_window": False}, 64),
        ({**QWEN2_WINDOW, "max_window_layers": 1}, 24),
        ({**QWEN2_WINDOW, "max_window_layers": 0}, 24),
        ({**QWEN2_WINDOW, "max_window_layers": 2}, 64),  # as many as there are layers, so that none slides
        (QWEN2_WINDOW, 64),  # 28 layers attend to everything by default
        ({**QWEN2_WINDOW, "layer_types": ["full_attention"] * 2, "max_window_layers": 0}, 64),
        ({**QWEN2_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}, 24),
        ({**QWEN2_WINDOW, "architectures": ["Qwen3ForCausalLM"], "max_window_layers": 2}, 64),
        ({**QWEN2_WINDOW, "architectures": ["Qwen3ForCausalLM"], "max_window_layers": 1}, 24),
        ({"sliding_window": 24}, 64),
    ],
)
def test_sliding_window_caps_the_context(changes: dict, max_seq_len: int) -> None:
    """The context ends at the window where transformers has a layer that slides."""
    content = {**TOY, "num_key_value_heads": 2, **changes}
    config, model_type = read_config(content, "config.json")
    assert config.max_seq_len == max_seq_len
    theirs = getattr(transformers, ARCHITECTURES[model_type].replace("ForCausalLM", "Config"))(**content)
    layer_types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 2
    slides = model_type != "llama" and theirs.sliding_window and "sliding_attention" in layer_types
    assert max_seq_len == (min(64, theirs.sliding_window) if slides else 64)


def test_absent_window_of_mistral_is_that_of_transformers() -> None:
    content = {**TOY, "architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}
    content["max_position_embeddings"] = 32_768
    assert transformers.MistralConfig().sliding_window == 4096
    assert read_config(content, "config.json")[0].max_seq_len == 4096


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"factor": 4.0, "original_max_position_embeddings": 32_768, "type": "yarn"}, 131_072),  # Qwen2.5's model card
        ({"factor": 4.0, "original_max_position_embeddings": 32_768, "rope_type": "yarn"}, 131_072),
        ({"factor": 4.0, "rope_type": "yarn"}, 131_072),  # the original context is then the stated one
        ({"factor": 2.0, "original_max_position_embeddings": 8_192, "rope_type": "yarn"}, 32_768),
        (None, 32_768),
    ],
)
def test_yarn_lengthens_the_context(rope: dict[str, Any] | None, context: int) -> None:
    """The numbers are those of Qwen2.5-7B-Instruct, frequencies and factor those of transformers."""
    content = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "max_position_embeddings": 32_768,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rope_scaling": rope,
        "rope_theta": 1_000_000.0,
        "sliding_window": 131_072,
        "use_sliding_window": False,
        "vocab_size": 152_064,
    }
    config, _ = read_config(content, "config.json")
    assert config.max_seq_len == context
    theirs = Qwen2RotaryEmbedding(transformers.Qwen2Config(**content))
    frequencies, factor = rope_frequencies(config)
    torch.testing.assert_close(frequencies, theirs.inv_freq, atol=0, rtol=1e-6)
    assert factor == pytest.approx(theirs.attention_scaling)
    # and it goes out as it came
    assert read_config(write_config(config, "qwen2", torch.bfloat16), "config.json")[0] == config


MISTRAL_POSITIONS = {"max_position_embeddings": 32_768, "sliding_window": 4_096}


@pytest.mark.parametrize(
    ("changes", "written"),
    [
        ({}, MISTRAL_POSITIONS),
        # another context than the source had: full attention over it
        ({"max_seq_len": 16_384}, {"max_position_embeddings": 16_384, "sliding_window": None}),
    ],
)
def test_positions_go_out_as_they_came(changes: dict[str, int], written: dict[str, int | None]) -> None:
    content = {**TOY, "architectures": ["MistralForCausalLM"], "num_key_value_heads": 2, **MISTRAL_POSITIONS}
    config = dataclasses.replace(read_config(content, "config.json")[0], **changes)
    out = write_config(config, "mistral", torch.float32, MISTRAL_POSITIONS)
    assert {key: out[key] for key in MISTRAL_POSITIONS} == written
    assert read_config(out, "config.json") == (config, "mistral")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GemmaForCausalLM"]},
            "architecture GemmaForCausalLM is not supported; choose from LlamaForCausalLM, MistralForCausalLM, "
            "Qwen2ForCausalLM, Qwen3ForCausalLM",
        ),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "architecture Qwen3MoeForCausalLM is not supported"),
        ({"architectures": [], "model_type": "gpt2"}, "architecture model_type 'gpt2' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act gelu is not supported; it must be silu or absent"),
        ({"attention_bias": True}, "attention_bias true is not supported; it must be false or absent"),
        ({"mlp_bias": True}, "mlp_bias true is not supported; it must be false or absent"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1 is not supported; it must be 0 or absent"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported; it must be 1 or absent"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            'quantization_config {"quant_method": "gptq", "bits": 4} is not supported; use the model as it was before '
            "quantization",
        ),
        ({"num_local_experts": 8}, "num_local_experts 8 is not supported; it must be 0 or absent"),
        ({"num_experts": 8}, "num_experts 8 is not supported; it must be 0 or absent"),
        ({"is_causal": False}, "is_causal false is not supported; it must be true or absent"),
        (
            {"compression_config": {"bits": 4}},
            'compression_config {"bits": 4} is not supported; use the model as it was',
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2, "layer_types": ["linear_attention"]},
            "layer_types linear_attention is not supported; only full_attention is",
        ),
        ({"layer_types": 2}, "layer_types must be a list, got 2"),
        ({"layer_types": [["full_attention"]]}, 'layer_types ["full_attention"] is not supported'),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type dynamic is not supported; choose from default, linear, llama3, yarn",
        ),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type longrope is not supported"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section in the rotary parameters"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5 is not supported; it must be 1 or absent",
        ),
        ({"rope_scaling": {**SCALED, "truncate": False}}, "truncate false is not supported; it must be true or absent"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_type yarn needs a number as factor, got None"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0}},
            "rope_type llama3 needs a number as low_freq_factor, got None",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 0.5}},
            "decoder.rope_scaling.factor must be at least 1, got 0.5",
        ),
        ({"hidden_size": None}, "has no hidden_size; a whole number of at least 1 is needed"),
        ({"num_hidden_layers": "2"}, "has a wrong value '2' for num_hidden_layers; a whole number"),
        ({"head_dim": "8"}, "has a wrong value '8' for head_dim; a whole number"),
        ({"rms_norm_eps": "1e-5"}, "has a wrong value '1e-5' for rms_norm_eps; a number is needed"),
        ({"rope_theta": "1e4"}, "has a wrong value '1e4' for rope_theta; a number is needed"),
        ({"rope_parameters": {"rope_theta": []}}, "has a wrong value [] for rope_theta; a number is needed"),
        ({"rope_scaling": "linear"}, "the rotary parameters must be an object, got linear"),
        (
            {"rope_scaling": {**SCALED, "original_max_position_embeddings": "16"}},
            "has a wrong value '16' for original_max_position_embeddings; a whole number",
        ),
        (
            {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2, "sliding_window": "24"},
            "has a wrong value '24' for sliding_window; a whole number",
        ),
        ({"architectures": ["MistralForCausalLM"]}, "has no num_key_value_heads"),
        ({"num_key_value_heads": 3}, "decoder.num_heads must be a multiple of decoder.num_kv_heads, got 4 and 3"),
    ],
)
def test_what_would_change_a_number_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_config({**TOY, **changes}, "m/config.json")
    assert str(error.value).startswith("m/config.json")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "wanted", "expected"),
    [
        ({}, None, "llama"),
        ({}, "mistral", "mistral"),
        ({}, "qwen2", "llama"),
        ({"qkv_bias": True}, None, "qwen2"),
        ({"qk_norm": True}, "llama", "qwen3"),
        ({"qk_norm": True, "qkv_bias": True}, "qwen3", None),
        ({"hidden_size": 30, "head_dim": 8}, None, "mistral"),  # Llama insists on 30 being a multiple of 4 heads
    ],
)
def test_family(changes: dict, wanted: str | None, expected: str | None) -> None:
    assert family(DecoderConfig(num_heads=4, num_kv_heads=2, **changes), wanted) == expected


def test_names() -> None:
    assert our_name("model.layers.0.self_attn.q_proj.weight") == "layers.0.self_attn.q_proj.weight"
    assert our_name("model.layers.0.self_attn.rotary_emb.inv_freq") is None
    for name in ("embed_tokens.weight", "norm.weight", "lm_head.weight"):
        assert our_name(hf_name(name)) == name
    assert hf_name("lm_head.weight") == "lm_head.weight"
