"""Steps of a whole decoder: packed, compiled, recomputed and in float8, against the plain step."""

from collections.abc import Iterator
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor

from meap_lit.model import Decoder, DecoderConfig, Documents, float8, linear_cross_entropy
from meap_lit.model.recompute import checkpoint_and_compile
from tests.support.devices import on_devices, on_gpu, relative_error

SIZES = {
    "cpu": {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "max_seq_len": 32},
    "cuda": {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024, "max_seq_len": 256},
}
ROWS = [[3, 1], [2, 5]]
"""Lengths of documents, in eighths of a row; the rest of the first is a document too."""

Step = dict[str, Tensor]
"""The loss, and the gradients by name."""


def decoder(device: str) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(num_layers=2, num_heads=4, num_kv_heads=2, **SIZES[device])
    with torch.device(device):
        return Decoder(config)


def batch(model: Decoder) -> tuple[Tensor, Tensor]:
    """Inputs and labels, [2, T]."""
    config = model.config
    assert config.vocab_size is not None
    tokens = torch.randint(
        config.vocab_size, (2, config.max_seq_len + 1), generator=torch.Generator().manual_seed(1)
    ).to(model.norm.weight.device)
    return tokens[:, :-1], tokens[:, 1:]


def documents(model: Decoder) -> Documents:
    seq_len = model.config.max_seq_len
    return Documents.of_rows([[length * seq_len // 8 for length in row] for row in ROWS], seq_len)


def step(model: Decoder, packed: bool = False, bf16: bool = True) -> Step:
    """One step on whole rows, or on packed ones."""
    input_ids, labels = batch(model)
    position_ids = None
    if packed:
        lengths = torch.tensor(documents(model).lengths)
        starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        position_ids = (torch.arange(len(starts)) - starts).view(2, -1).to(input_ids.device)
    model.zero_grad()
    with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=bf16):
        hidden = model(input_ids, position_ids, documents(model) if packed else None)
        loss = linear_cross_entropy(hidden, model.lm_head.weight, labels)[0]
    loss.backward()
    return result(model, loss)


def step_by_document(model: Decoder, bf16: bool = True) -> Step:
    """The same as a packed step: each document is a row of its own."""
    lengths = documents(model).lengths
    model.zero_grad()
    total = 0.0
    for input_ids, labels in zip(*(tokens.flatten().split(lengths) for tokens in batch(model)), strict=True):
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=bf16):
            loss = linear_cross_entropy(model(input_ids[None]), model.lm_head.weight, labels[None])[0]
        loss.backward()
        total = total + loss.detach()
    return result(model, total)


def result(model: Decoder, loss: Tensor) -> Step:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return {"loss": loss.detach().clone()} | {name: gradient.clone() for name, gradient in gradients.items()}


def assert_as_exact(ours: Step, usual: Step, exact: Step) -> None:
    """Compare the errors of two steps in bfloat16, tensor by tensor."""
    for name, expected in exact.items():
        error, usual_error = relative_error(ours[name], expected), relative_error(usual[name], expected)
        assert error < 0.1, name
        assert error < 1.5 * usual_error + 1e-3, name


@on_devices
def test_a_packed_step_is_that_of_its_documents_one_by_one(device: str) -> None:
    model = decoder(device)
    exact = step_by_document(deepcopy(model).double(), bf16=False)
    assert_as_exact(step(model, packed=True), step_by_document(model), exact)
    assert relative_error(step(model)["loss"], exact["loss"]) > 1e-4, "whole rows are something else"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "mode", "packed"),
    [
        ("cpu", "none", True),
        *(
            pytest.param("cuda", *case, marks=on_gpu)
            for case in (("none", False), ("none", True), ("selective", False))
        ),
    ],
)
def test_a_compiled_step_is_as_exact(device: str, mode: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":  # the graphs, without the generated code
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    plain = decoder(device)
    exact = step(deepcopy(plain).double(), packed, bf16=False)
    compiled = deepcopy(plain)
    checkpoint_and_compile(compiled, mode, compile=True)
    assert_as_exact(step(compiled, packed), step(plain, packed), exact)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """On a GPU the backward of attention adds up in changing order otherwise."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@on_devices
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_no_bit(device: str, mode: str, deterministic: None) -> None:
    plain, again = decoder(device), decoder(device)
    checkpoint_and_compile(again, mode, compile=False)
    expected, actual = step(plain), step(again)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                *on_gpu,
                pytest.mark.skipif(
                    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
                    reason="needs a GPU with float8",
                ),
            ],
        ),
    ],
)
def test_products_in_float8_are_those_of_the_emulation(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU both are the emulation. The step without float8 differs."""
    pytest.importorskip("torchao")
    monkeypatch.setattr(float8, "SMALL", (0, 0))
    plain = decoder(device)
    model, emulated = deepcopy(plain), deepcopy(plain)
    float8.use_float8(model, torch.device(device), emulate=device == "cpu")
    float8.use_float8(emulated, torch.device(device), emulate=True)
    actual, expected, without = step(model), step(emulated), step(plain)
    assert actual["loss"].item() == pytest.approx(expected["loss"].item(), rel=2e-3)
    for name, tensor in expected.items():
        assert relative_error(actual[name], tensor) < 0.33, name
    assert actual["loss"] != without["loss"]
