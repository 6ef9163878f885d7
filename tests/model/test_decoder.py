"""The decoder against transformers' own models at toy size, and the properties that training rests on."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from meap_lit.model import Decoder, DecoderConfig, Documents, KVCache, RopeScaling
from tests.support import varlen

VOCAB_SIZE = 96


def toy(**changes: object) -> DecoderConfig:
    values = {
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "vocab_size": VOCAB_SIZE,
        "max_seq_len": 128,
    }
    return DecoderConfig(**{**values, **changes})  # type: ignore[arg-type]


def reference(config: DecoderConfig) -> PreTrainedModel:
    """The transformers model of the same shape, with weights large enough for any difference to show."""
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling := config.rope_scaling:
        rope |= {"rope_type": scaling.type, "factor": scaling.factor}
        if scaling.type != "linear":
            rope |= {"original_max_position_embeddings": scaling.original_max_seq_len}
        if scaling.type == "llama3":
            rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    config_class, model_class = {
        (False, False): (LlamaConfig, LlamaForCausalLM),
        (True, False): (Qwen2Config, Qwen2ForCausalLM),
        (False, True): (Qwen3Config, Qwen3ForCausalLM),
    }[config.qkv_bias, config.qk_norm]
    model = model_class(
        config_class(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_width,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
        )
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.dim() == 1))
    return model.eval()


def our_name(name: str) -> str:
    return name.removeprefix("model.")


CONFIGS = {
    "llama": toy(),
    "one key-value head": toy(num_kv_heads=1),
    "no grouping": toy(num_kv_heads=4),
    "head_dim": toy(head_dim=12),
    "tied": toy(tie_embeddings=True),
    "rope base": toy(rope_theta=500.0),
    "linear": toy(rope_scaling=RopeScaling("linear", 4.0, original_max_seq_len=32)),
    "llama3": toy(rope_scaling=RopeScaling("llama3", 4.0, original_max_seq_len=32)),
    "yarn": toy(rope_scaling=RopeScaling("yarn", 4.0, original_max_seq_len=32)),
    "qwen2": toy(qkv_bias=True),
    "qwen2 tied": toy(qkv_bias=True, tie_embeddings=True),
    "qwen3": toy(qk_norm=True, head_dim=16),
    "qwen3 tied": toy(qk_norm=True, head_dim=6, tie_embeddings=True, norm_eps=1e-6),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_and_gradients_are_those_of_transformers(config: DecoderConfig) -> None:
    theirs = reference(config)
    ours = Decoder(config)
    weights = {our_name(name): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(weights)
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, VOCAB_SIZE, (3, 40), generator=generator)
    labels = torch.randint(0, VOCAB_SIZE, (120,), generator=generator)

    expected = theirs(input_ids, use_cache=False).logits
    logits = ours.logits(ours(input_ids))
    assert expected.std() > 0.5, "logits this small would agree whatever the decoder did"
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)

    F.cross_entropy(expected.flatten(0, 1), labels).backward()
    F.cross_entropy(logits.flatten(0, 1), labels).backward()
    gradients = {our_name(name): parameter.grad for name, parameter in theirs.named_parameters()}
    compared = dict(ours.named_parameters())
    assert gradients.keys() == compared.keys()
    for name, parameter in compared.items():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("scaling", [None, RopeScaling("yarn", 4.0, original_max_seq_len=32)])
def test_explicit_positions_are_those_of_transformers(scaling: RopeScaling | None) -> None:
    theirs = reference(toy(rope_scaling=scaling))
    ours = Decoder(toy(rope_scaling=scaling))
    ours.load_state_dict({our_name(name): tensor for name, tensor in theirs.state_dict().items()})
    input_ids = torch.randint(0, VOCAB_SIZE, (2, 10), generator=torch.Generator().manual_seed(2))
    # Gaps, so that distances differ. Positions never fall: transformers would take that for packed documents.
    position_ids = torch.tensor([[0, 1, 2, 10, 11, 12, 40, 41, 42, 90], [5, 6, 7, 8, 9, 60, 61, 62, 63, 64]])
    mask = torch.full((10, 10), -torch.inf).triu(1)[None, None]  # theirs, given so that it is not inferred
    with torch.no_grad():
        expected = theirs(input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False).logits
        logits = ours.logits(ours(input_ids, position_ids))
        shared = ours(input_ids, position_ids[1])  # [T], the same positions for both rows
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.logits(shared)[1], expected[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours.logits(ours(input_ids)), expected, atol=1e-2), "positions made no difference"


def test_default_positions_count_from_zero() -> None:
    model = Decoder(toy())
    input_ids = torch.arange(20).view(2, 10)
    assert torch.equal(model(input_ids), model(input_ids, torch.arange(10)))


def test_no_hidden_state_sees_a_later_token() -> None:
    torch.manual_seed(0)
    model = Decoder(toy())
    input_ids = torch.randint(0, VOCAB_SIZE, (1, 24))
    with torch.no_grad():
        before = model(input_ids)
        for t in range(24):
            changed = input_ids.clone()
            changed[0, t] = (changed[0, t] + 1) % VOCAB_SIZE
            difference = (model(changed) - before).abs().amax(dim=-1)[0]
            assert not difference[:t].any(), t
            assert difference[t:].all(), t


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # RMSNorm of a bfloat16 head with float32 weights is not fused
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}, {"qk_norm": True, "head_dim": 16}])
def test_bf16_autocast_stays_close_to_float32(changes: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = Decoder(toy(**changes))
    input_ids = torch.randint(0, VOCAB_SIZE, (2, 32))
    expected = model(input_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model(input_ids)
    assert F.cosine_similarity(hidden.float(), expected, dim=-1).min() > 0.999


# ---------------------------------------------------------------------------------------------- packed documents

ROWS = [[7, 1, 11], [16, 5]]  # documents of two rows of 24 tokens: 5 and 3 are padding
SEQ_LEN = 24


def packed_batch() -> tuple[Tensor, Tensor, Documents]:
    input_ids = torch.randint(0, VOCAB_SIZE, (2, SEQ_LEN), generator=torch.Generator().manual_seed(5))
    documents = Documents.of_rows(ROWS, SEQ_LEN)
    position_ids = torch.cat([torch.arange(length) for length in documents.lengths]).view(2, SEQ_LEN)
    return input_ids, position_ids, documents


def loss_of(model: Decoder, hidden: Tensor, weights: Tensor) -> Tensor:
    """Some scalar in which every hidden state and every parameter counts."""
    return (model.logits(hidden).flatten(0, -2).log_softmax(-1) * weights).sum()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ["llama", "no grouping", "yarn", "qwen2 tied", "qwen3"])
def test_packed_documents_are_the_documents_one_by_one(name: str, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    model = Decoder(CONFIGS[name]).to(dtype)
    input_ids, position_ids, documents = packed_batch()
    weights = torch.randn(2 * SEQ_LEN, VOCAB_SIZE, generator=torch.Generator().manual_seed(6), dtype=dtype)

    packed = model(input_ids, position_ids, documents)
    gradients = torch.autograd.grad(loss_of(model, packed, weights), list(model.parameters()))
    singles = [model(document[None])[0] for document in input_ids.flatten().split(documents.lengths)]
    single = torch.cat(singles)
    expected = torch.autograd.grad(loss_of(model, single, weights), list(model.parameters()))

    assert len(singles) == 7
    torch.testing.assert_close(packed.flatten(0, 1), single, atol=tolerance, rtol=tolerance)
    for (parameter, _), ours, theirs in zip(model.named_parameters(), gradients, expected, strict=True):
        assert theirs.any(), parameter
        torch.testing.assert_close(ours, theirs, atol=10 * tolerance * theirs.abs().max().item(), rtol=0)


def test_packed_logits_are_those_of_transformers_with_a_dense_mask() -> None:
    theirs = reference(toy())
    ours = Decoder(toy())
    ours.load_state_dict({our_name(name): tensor for name, tensor in theirs.state_dict().items()})
    input_ids, position_ids, documents = packed_batch()
    document_ids = torch.repeat_interleave(torch.arange(7), torch.tensor(documents.lengths)).view(2, SEQ_LEN)
    seen = (document_ids[:, :, None] == document_ids[:, None, :]).tril()
    mask = torch.zeros(2, 1, SEQ_LEN, SEQ_LEN).masked_fill(~seen[:, None], -torch.inf)
    with torch.no_grad():
        expected = theirs(input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False).logits
        logits = ours.logits(ours(input_ids, position_ids, documents))
        crossing = ours.logits(ours(input_ids, position_ids))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(crossing, expected, atol=1e-2), "the documents made no difference"


def test_no_document_feels_another() -> None:
    torch.manual_seed(0)
    model = Decoder(toy())
    input_ids, position_ids, documents = packed_batch()
    ends = torch.tensor(documents.lengths).cumsum(0).tolist()
    with torch.no_grad():
        before = model(input_ids, position_ids, documents).flatten(0, 1)
        for start, end in zip([0, *ends], ends):
            changed = input_ids.clone()
            changed.view(-1)[start] = (changed.view(-1)[start] + 1) % VOCAB_SIZE
            difference = (model(changed, position_ids, documents).flatten(0, 1) - before).abs().amax(-1)
            assert difference[start:end].all()
            assert not difference[:start].any()
            assert not difference[end:].any()


@pytest.mark.parametrize("in_one_call", [False, True])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_packed_under_bf16_autocast_stays_close_to_float32(in_one_call: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Decoder(toy(qk_norm=True, head_dim=16))
    batch = packed_batch()
    expected = model(*batch)
    varlen.calls.clear()
    if in_one_call:
        varlen.enable(monkeypatch, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model(*batch)
    assert len(varlen.calls) == (model.config.num_layers if in_one_call else 0)
    assert F.cosine_similarity(hidden.float(), expected, dim=-1).min() > 0.999


def test_packed_shapes_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Decoder(toy())
    input_ids, position_ids, documents = packed_batch()
    hidden = model(input_ids.to("meta"), position_ids.to("meta"), documents)
    assert hidden.is_meta
    assert hidden.shape == (2, SEQ_LEN, 32)
    hidden.sum().backward()


def test_compiled_layers_are_not_compiled_again_for_other_documents() -> None:
    torch.manual_seed(0)
    model, compiled = Decoder(toy()), Decoder(toy())
    compiled.load_state_dict(model.state_dict())
    graphs = CompileCounterWithBackend("eager")
    for layer in compiled.layers:
        layer.compile(backend=graphs)
    input_ids, position_ids, _ = packed_batch()
    after_first = 0
    for rows in (ROWS, [[24], [24]], [[2, 3, 4], [5]], [[1], [1]]):
        documents = Documents.of_rows(rows, SEQ_LEN)
        expected = model(input_ids, position_ids, documents)
        torch.testing.assert_close(compiled(input_ids, position_ids, documents), expected)
        after_first = after_first or graphs.frame_count
    assert 0 < after_first == graphs.frame_count


# ------------------------------------------------------------------------------------------------------ cache


def cache_for(model: Decoder, batch_size: int, max_len: int) -> KVCache:
    weight = model.embed_tokens.weight
    return KVCache(model.config, batch_size, max_len, weight.device, weight.dtype)


@pytest.mark.parametrize("name", ["llama", "one key-value head", "no grouping", "yarn", "qwen2 tied", "qwen3"])
def test_reading_in_pieces_with_a_cache_is_reading_at_once(name: str) -> None:
    torch.manual_seed(0)
    model = Decoder(CONFIGS[name])
    input_ids = torch.randint(0, VOCAB_SIZE, (3, 20))
    cache = cache_for(model, 3, 40)
    with torch.no_grad():
        expected = model(input_ids)
        pieces = [model(input_ids[:, :9], cache=cache)]  # positions count from 0 if not given
        for start, stop in ((9, 10), (10, 14), (14, 20)):
            pieces.append(model(input_ids[:, start:stop], torch.arange(start, stop), cache=cache))
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_right_padded_rows_with_a_cache_are_the_rows_alone() -> None:
    torch.manual_seed(0)
    model = Decoder(toy())
    lengths = torch.tensor([3, 8, 5])
    input_ids = torch.randint(0, VOCAB_SIZE, (3, 14))
    cache = cache_for(model, 3, 14)
    with torch.no_grad():
        prefill = model(input_ids[:, :8], cache=cache)  # the first row's tokens 3 to 7 stand for padding
        position_ids = lengths[:, None].clone()
        steps = []
        for _ in range(6):
            steps.append(model(input_ids.gather(1, position_ids), position_ids, cache=cache))
            position_ids += 1
        for row, length in enumerate(lengths.tolist()):
            expected = model(input_ids[row : row + 1, : length + 6])[0]
            ours = torch.cat((prefill[row, :length], torch.cat(steps, dim=1)[row]))
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block_size", [1, 4, 256])
@pytest.mark.parametrize("name", ["llama", "one key-value head", "no grouping", "yarn", "qwen2 tied", "qwen3"])
def test_rows_with_a_common_beginning_are_the_rows_alone(name: str, block_size: int, monkeypatch) -> None:
    """Read without padding, and what a row has in common with the one above only there; then they go on."""
    monkeypatch.setattr("meap_lit.model.kv_cache._BLOCK_SIZE", block_size)
    torch.manual_seed(0)
    model = Decoder(CONFIGS[name])
    first, second = torch.randint(0, VOCAB_SIZE, (2, 12)).tolist()
    rows = [first, first[:7] + second[:9], first[:7] + second[:3], second, second[:11] + first[:1]]
    beginnings = [0, 7, 9, 0, 11]
    cache = cache_for(model, len(rows), 20)
    ends = [row[start:] for row, start in zip(rows, beginnings, strict=True)]
    position_ids = [
        position for row, start in zip(rows, beginnings, strict=True) for position in range(start, len(row))
    ]
    with torch.no_grad():
        hidden = model(
            torch.tensor([[token for end in ends for token in end]]),
            torch.tensor(position_ids),
            documents=Documents(tuple(map(len, ends))),
            cache=cache,
        )
        lengths = torch.tensor([[len(row)] for row in rows])
        following = model(torch.full((len(rows), 1), 5), lengths, cache=cache)
        for row, start, end, after in zip(rows, beginnings, hidden[0].split([*map(len, ends)]), following, strict=True):
            alone = model(torch.tensor([[*row, 5]]))[0]
            torch.testing.assert_close(end, alone[start:-1], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(after, alone[-1:], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_cache_under_bf16_autocast_stays_close_to_float32() -> None:
    torch.manual_seed(0)
    model = Decoder(toy())
    input_ids = torch.randint(0, VOCAB_SIZE, (2, 12))
    expected = model(input_ids)
    cache = cache_for(model, 2, 12)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = torch.cat(
            (model(input_ids[:, :8], cache=cache), model(input_ids[:, 8:], torch.arange(8, 12), cache=cache)), dim=1
        )
    assert F.cosine_similarity(hidden.float(), expected, dim=-1).min() > 0.999


# ------------------------------------------------------------------------------------------------ initialization


def measured_std(parameter: Tensor) -> float:
    return parameter.detach().double().std().item()


def test_initial_weights_are_those_of_tinyllama() -> None:
    torch.manual_seed(0)
    width, layers = 256, 3
    model = Decoder(toy(hidden_size=width, intermediate_size=512, num_layers=layers, qkv_bias=True, qk_norm=True))
    std, residual_std = math.sqrt(2 / (5 * width)), 1 / math.sqrt(width) / layers
    kinds: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        kind = ".".join(name.split(".")[-2:])
        kinds[kind] = kinds.get(kind, 0) + 1
        if kind in ("o_proj.weight", "down_proj.weight"):
            assert measured_std(parameter) == pytest.approx(residual_std, rel=0.03), name
        elif kind.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif kind.endswith(".bias"):
            assert not parameter.any(), name
        else:
            assert parameter.dim() == 2, name
            assert measured_std(parameter) == pytest.approx(std, rel=0.03), name
    assert kinds["o_proj.weight"] == kinds["down_proj.weight"] == kinds["q_norm.weight"] == kinds["q_proj.bias"] == 3
    assert kinds["embed_tokens.weight"] == kinds["lm_head.weight"] == 1
    matrices = [parameter[0, :8].tolist() for parameter in model.parameters() if parameter.dim() == 2]
    assert len(set(map(tuple, matrices))) == len(matrices), "each has values of its own"


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_meta_device_start_gives_the_same_weights(tie_embeddings: bool) -> None:
    """As large models begin: built without memory, then allocated, then initialized; ties must survive."""
    config = toy(tie_embeddings=tie_embeddings)
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.reset_parameters()
    assert (model.lm_head.weight is model.embed_tokens.weight) == tie_embeddings
    direct, other = Decoder(config), Decoder(config)
    torch.manual_seed(3)
    torch.rand(5)  # the seed decides, not what was drawn before
    direct.reset_parameters()
    torch.manual_seed(4)
    other.reset_parameters()
    assert not torch.equal(other.lm_head.weight, direct.lm_head.weight)
    assert model.state_dict().keys() == direct.state_dict().keys()
    for name, tensor in direct.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert not list(model.buffers()), "a buffer would stay uninitialized"


def test_untrained_model_is_near_the_uniform_guess() -> None:
    torch.manual_seed(0)
    model = Decoder(toy(hidden_size=64))
    input_ids = torch.randint(0, VOCAB_SIZE, (4, 64))
    logits = model.logits(model(input_ids))
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(VOCAB_SIZE), abs=0.5)
