"""Loading in place: vocabulary growth by hand, and what does not fit."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from meap_lit.errors import UserError
from meap_lit.hf.weights import WeightSource, build_decoder, copy_rows, load_weights
from meap_lit.model import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    num_layers=1, num_heads=2, num_kv_heads=1, hidden_size=8, intermediate_size=8, vocab_size=6, max_seq_len=16
)


@dataclass(frozen=True, kw_only=True)
class InMemory(WeightSource):
    """Weights that a test can change."""

    tensors: dict[str, Tensor] = field(repr=False)

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def source_of(config: DecoderConfig = CONFIG, dtype: torch.dtype = torch.float32) -> InMemory:
    torch.manual_seed(0)
    tensors = {name: tensor.to(dtype) for name, tensor in Decoder(config).state_dict().items()}
    return InMemory(path=Path("m.ckpt"), config=config, model_type="llama", dtype=dtype, tensors=tensors)


def wider(vocab_size: int, **changes: object) -> DecoderConfig:
    return dataclasses.replace(CONFIG, vocab_size=vocab_size, **changes)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- building


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_built_decoder_has_the_weights(tied: bool, dtype: torch.dtype | None) -> None:
    config = wider(6, tie_embeddings=tied)
    source = source_of(config, torch.bfloat16)
    decoder = build_decoder(config, source, dtype=dtype)
    assert (decoder.lm_head.weight is decoder.embed_tokens.weight) == tied
    for name, parameter in decoder.named_parameters():
        assert parameter.dtype == (dtype or torch.bfloat16)
        assert torch.equal(parameter, source.tensors[name].to(parameter.dtype))
    assert sum(parameter.numel() for parameter in decoder.parameters()) == config.num_parameters()


def test_loading_leaves_random_state_and_gradients_alone() -> None:
    source = source_of()
    before = torch.get_rng_state()
    decoder = build_decoder(CONFIG, source)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in decoder.parameters())


def test_tied_file_may_hold_an_equal_head_or_none() -> None:
    config = wider(6, tie_embeddings=True)
    source = source_of(config)
    assert "lm_head.weight" in source.tensors
    with_head = build_decoder(config, source).state_dict()
    del source.tensors["lm_head.weight"]
    without = build_decoder(config, source).state_dict()
    assert all(torch.equal(with_head[name], without[name]) for name in with_head)


# -------------------------------------------------------------------------------------------------- growth


def test_new_rows_are_the_mean_by_hand() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, -2.0]])
    target = torch.full((5, 2), torch.nan)
    copy_rows(target, rows)
    assert target.tolist() == [[1, 2], [3, 6], [5, -2], [3, 2], [3, 2]]


def test_a_reserve_row_becomes_the_mean_of_those_below() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 6.0], [50.0, 50.0], [7.0, 8.0]])
    target = torch.full((4, 2), torch.nan)
    copy_rows(target, rows, first_new_token=2)
    assert target.tolist() == [[1, 2], [3, 6], [2, 4], [7, 8]]  # the reserve above it stays
    assert rows[2].tolist() == [50, 50]


def test_mean_is_taken_in_float32() -> None:
    """30,000 rows of 1 and 10,000 of 0: bfloat16 would stop counting at 256."""
    rows = torch.ones(40_000, 1, dtype=torch.bfloat16)
    rows[:10_000] = 0
    target = torch.empty(40_001, 1)
    copy_rows(target, rows)
    assert target[-1].item() == 0.75


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_grow(tied: bool) -> None:
    source = source_of(wider(6, tie_embeddings=tied))
    decoder = build_decoder(wider(64, tie_embeddings=tied), source)
    load_weights(decoder, source, first_new_token=6)
    for weight, name in ((decoder.embed_tokens.weight, "embed_tokens"), (decoder.lm_head.weight, "lm_head")):
        old = source.tensors[f"{name}.weight"]
        assert torch.equal(weight[:6], old)
        torch.testing.assert_close(weight[6:], old.mean(0).expand(58, 8))
    assert decoder.embed_tokens.num_embeddings == 64


def test_growth_keeps_the_scores_of_the_old_tokens() -> None:
    source = source_of()
    small, large = build_decoder(CONFIG, source), build_decoder(wider(64), source)
    input_ids = torch.tensor([[0, 5, 3, 3, 1]])
    with torch.no_grad():
        expected, found = (decoder.logits(decoder(input_ids)) for decoder in (small, large))
    torch.testing.assert_close(found[..., :6], expected)
    probabilities = found[..., :7].softmax(-1)
    assert (probabilities[..., 6] <= probabilities[..., :6].mean(-1)).all()


# ---------------------------------------------------------------------------------------------- what is wrong


def missing(source: InMemory) -> None:
    del source.tensors["layers.0.mlp.up_proj.weight"]


def two_missing(source: InMemory) -> None:
    missing(source)
    del source.tensors["norm.weight"]


def extra(source: InMemory) -> None:
    source.tensors["layers.1.mlp.up_proj.weight"] = torch.zeros(8, 8)


def turned(source: InMemory) -> None:
    source.tensors["layers.0.self_attn.k_proj.weight"] = torch.zeros(8, 4)


def more_rows(source: InMemory) -> None:
    source.tensors["lm_head.weight"] = torch.zeros(7, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, "m.ckpt has no tensor layers.0.mlp.up_proj.weight; the model and its file do not fit"),
        (two_missing, "m.ckpt has no tensor layers.0.mlp.up_proj.weight and 1 more; the model and its file do not fit"),
        (extra, "m.ckpt has an unknown tensor layers.1.mlp.up_proj.weight; the model and its file do not fit"),
        (
            turned,
            "m.ckpt: tensor layers.0.self_attn.k_proj.weight has shape [8, 4], the model needs [4, 8]",
        ),
        (more_rows, "m.ckpt: tensor lm_head.weight has shape [7, 8], the model needs [6, 8]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message: str) -> None:
    source = source_of()
    change(source)
    with pytest.raises(UserError) as error:
        load_weights(Decoder(CONFIG), source)
    assert str(error.value) == message


def test_a_tied_head_that_differs_is_refused() -> None:
    config = wider(6, tie_embeddings=True)
    source = source_of(config)
    source.tensors["lm_head.weight"] = source.tensors["lm_head.weight"] + 1
    with pytest.raises(UserError, match=r"^m.ckpt: the embeddings are tied but lm_head.weight differs from embed_tok"):
        load_weights(Decoder(config), source)
