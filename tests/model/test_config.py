"""Counts that papers and budgets quote, and the errors of a wrong decoder."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from meap_lit.errors import UserError
from meap_lit.model import Decoder, DecoderConfig, RopeScaling
from meap_lit.model.config import vocab_rows

TOY = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 64}


def toy(**changes: object) -> DecoderConfig:
    return DecoderConfig(**{**TOY, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_tokens", "expected"), [(1, 64), (64, 64), (65, 128), (32_000, 32_000), (32_001, 32_064)])
def test_vocab_rows(num_tokens: int, expected: int) -> None:
    assert vocab_rows(num_tokens) == expected


@pytest.mark.parametrize(
    "config",
    [
        toy(),
        toy(num_layers=3, num_kv_heads=4),
        toy(num_kv_heads=1, head_dim=10),
        toy(tie_embeddings=True),
        toy(qkv_bias=True),
        toy(qk_norm=True),
        toy(qkv_bias=True, qk_norm=True, tie_embeddings=True, head_dim=12),
    ],
)
def test_num_parameters_is_that_of_the_module(config: DecoderConfig) -> None:
    assert config.num_parameters() == sum(parameter.numel() for parameter in Decoder(config).parameters())


@pytest.mark.parametrize(
    ("layers", "heads", "width", "mlp", "expected"),
    [
        (12, 12, 768, 2_048, 122_407_680),
        (24, 16, 1_024, 2_736, 324_060_160),
        (24, 16, 1_024, 4_864, 480_953_344),
        (24, 32, 2_048, 5_632, 1_175_816_192),
    ],
    ids=["0.1B", "0.3B", "0.5B", "1.1B"],
)
def test_ladder_of_the_paper(layers: int, heads: int, width: int, mlp: int, expected: int) -> None:
    """Built without memory for the weights; the counts are those that the names of the sizes round."""
    config = DecoderConfig(
        num_layers=layers, num_heads=heads, hidden_size=width, intermediate_size=mlp, vocab_size=vocab_rows(32_001)
    )
    with torch.device("meta"):
        model = Decoder(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_parameters() == expected


def test_defaults_are_the_largest_model_of_the_ladder() -> None:
    assert DecoderConfig(vocab_size=32_064).num_parameters() == 1_175_816_192


@pytest.mark.parametrize(
    "config", [toy(), toy(tie_embeddings=True), toy(num_kv_heads=4, head_dim=16, num_layers=3), toy(qk_norm=True)]
)
def test_flops_are_those_that_torch_counts(config: DecoderConfig) -> None:
    """With attention by plain matrix products: all T x T scores are formed, none again in the backward."""
    seq_len = 24
    model = Decoder(config)
    input_ids = torch.randint(0, 64, (2, seq_len))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.logits(model(input_ids)).sum().backward()
    assert counter.get_total_flops() == input_ids.numel() * config.flops_per_token(seq_len)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: toy(num_layers=0), "decoder.num_layers must be at least 1, got 0"),
        (lambda: toy(num_layers=10**9), "decoder.num_layers must be at most 10000, got 1000000000"),
        (lambda: toy(num_kv_heads=0), "decoder.num_kv_heads must be at least 1, got 0"),
        (lambda: toy(vocab_size=0), "decoder.vocab_size must be at least 1, got 0"),
        (lambda: toy(head_dim=0), "decoder.head_dim must be at least 1, got 0"),
        (lambda: toy(max_seq_len=-1), "decoder.max_seq_len must be at least 1, got -1"),
        (lambda: toy(norm_eps=0.0), "decoder.norm_eps must be above 0, got 0"),
        (lambda: toy(rope_theta=-1.0), "decoder.rope_theta must be above 0, got -1"),
        (
            lambda: toy(num_kv_heads=3),
            "decoder.num_heads must be a multiple of decoder.num_kv_heads, got 4 and 3",
        ),
        (
            lambda: toy(hidden_size=30),
            "decoder.hidden_size must be a multiple of decoder.num_heads, got 30 and 4; or set decoder.head_dim",
        ),
        (lambda: toy(head_dim=7), "decoder.head_dim must be even for rotary positions, got 7"),
        (lambda: toy(hidden_size=36), "decoder.head_dim must be even for rotary positions, got 9"),
        (lambda: RopeScaling("linear", 0.5), "decoder.rope_scaling.factor must be at least 1, got 0.5"),
        (
            lambda: RopeScaling("yarn", 2.0, original_max_seq_len=0),
            "decoder.rope_scaling.original_max_seq_len must be at least 1, got 0",
        ),
        (
            lambda: RopeScaling("llama3", 2.0, low_freq_factor=4.0),
            "decoder.rope_scaling.low_freq_factor must be above 0 and below high_freq_factor, got 4 and 4",
        ),
        (
            lambda: RopeScaling("yarn", 2.0, beta_fast=0.5),
            "decoder.rope_scaling.beta_slow must be above 0 and below beta_fast, got 1 and 0.5",
        ),
    ],
)
def test_wrong_values_are_refused_in_one_line(build: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError) as error:
        build()
    assert str(error.value) == message
