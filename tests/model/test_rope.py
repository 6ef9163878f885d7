"""Rotary positions by hand and against transformers' frequencies."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from meap_lit.errors import UserError
from meap_lit.model import DecoderConfig, RopeScaling
from meap_lit.model.rope import apply_rope, rope_angles, rope_frequencies


def config_with(scaling: RopeScaling | None = None, head_dim: int = 64, rope_theta: float = 10_000.0) -> DecoderConfig:
    return DecoderConfig(
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        hidden_size=head_dim,
        rope_theta=rope_theta,
        rope_scaling=scaling,
    )


def test_a_pair_of_dimensions_is_rotated_by_its_angle() -> None:
    """Head of 4: dimensions 0 and 2 turn by the position in radians, 1 and 3 by a hundredth of it."""
    cos, sin = rope_angles(config_with(head_dim=4), torch.tensor([0, 3]))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 1, 2, 4)
    rotated = apply_rope(x, cos, sin)[0, 0]
    torch.testing.assert_close(rotated[0], x[0, 0, 0])
    c, s, c_slow, s_slow = math.cos(3), math.sin(3), math.cos(0.03), math.sin(0.03)
    expected = [c - 3 * s, 2 * c_slow - 4 * s_slow, 3 * c + s, 4 * c_slow + 2 * s_slow]
    torch.testing.assert_close(rotated[1], torch.tensor(expected))


def test_scores_depend_on_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 64, generator=generator)

    def score(query_position: int, key_position: int) -> torch.Tensor:
        turned = [
            apply_rope(x, *rope_angles(config_with(), torch.tensor([position])))
            for x, position in ((query, query_position), (key, key_position))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(7, 2), score(1_007, 1_002), atol=1e-3, rtol=1e-3)
    assert abs(score(7, 2) - score(7, 3)) > 0.1


def test_half_precision_is_kept_and_angles_are_not_rounded() -> None:
    cos, sin = rope_angles(config_with(), torch.tensor([[4_095, 8_191]]))
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == (1, 2, 64)
    assert apply_rope(torch.ones(1, 1, 2, 64, dtype=torch.bfloat16), cos, sin).dtype == torch.bfloat16
    torch.testing.assert_close(cos[0, :, 0], torch.tensor([math.cos(4_095), math.cos(8_191)]))


@pytest.mark.parametrize("rope_theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("linear", 4.0),
        RopeScaling("llama3", 8.0, original_max_seq_len=8_192),
        RopeScaling("llama3", 2.0, original_max_seq_len=512, low_freq_factor=0.5, high_freq_factor=6.0),
        RopeScaling("yarn", 4.0),
        RopeScaling("yarn", 1.0),
        RopeScaling("yarn", 40.0, original_max_seq_len=256, beta_fast=16.0, beta_slow=2.0),
        RopeScaling("yarn", 4.0, attention_factor=0.7),
    ],
    ids=str,
)
def test_scaled_frequencies_are_those_of_transformers(scaling: RopeScaling, head_dim: int, rope_theta: float) -> None:
    parameters = {
        "linear": {},
        "llama3": {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor},
        "yarn": {
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "attention_factor": scaling.attention_factor,
        },
    }[scaling.type]
    if scaling.type != "linear":
        parameters["original_max_position_embeddings"] = scaling.original_max_seq_len
    reference_config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=int(scaling.original_max_seq_len * scaling.factor),
        rope_parameters={
            "rope_type": scaling.type,
            "factor": scaling.factor,
            "rope_theta": rope_theta,
            **parameters,
        },
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling.type](reference_config, torch.device("cpu"))
    inv_freq, factor = rope_frequencies(config_with(scaling, head_dim, rope_theta))
    torch.testing.assert_close(inv_freq, expected)
    assert factor == pytest.approx(expected_factor)
    unscaled, _ = rope_frequencies(config_with(None, head_dim, rope_theta))
    assert scaling.factor == 1 or not torch.equal(inv_freq, unscaled)


def test_an_attention_factor_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"^decoder.rope_scaling.attention_factor must be above 0, got 0$"):
        RopeScaling("yarn", 4.0, attention_factor=0.0)
