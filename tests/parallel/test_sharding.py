"""What is put around the blocks of a decoder: the same loss and gradients, and one compilation for all of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from meap_lit.model import Decoder, DecoderConfig, linear_cross_entropy
from meap_lit.model.attention import Documents
from meap_lit.model.recompute import checkpoint_and_compile

pytestmark = pytest.mark.slow

TOY = DecoderConfig(
    num_layers=10,  # more than torch.compile would compile one function for
    num_heads=4,
    num_kv_heads=2,
    hidden_size=32,
    intermediate_size=48,
    vocab_size=64,
    max_seq_len=32,
    qk_norm=True,
)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the graphs that were compiled, up to the code generator."""
    sizes: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        sizes.append(len(graph.graph.nodes))
        return aot_eager(graph, inputs)

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward: compile(forward, backend=backend))
    torch.compiler.reset()
    return sizes


def step(decoder: Decoder, packed: bool) -> tuple[Tensor, dict[str, Tensor]]:
    input_ids = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(0))
    layout = (torch.arange(32).repeat(2, 1), Documents.of_rows([[20, 9], [5, 27]], 32)) if packed else (None, None)
    loss = linear_cross_entropy(decoder(input_ids, *layout), decoder.lm_head.weight, input_ids.roll(-1))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(TOY)


@pytest.mark.parametrize(
    ("packed", "mode", "num_graphs"),
    [
        (False, "none", 1),
        (False, "selective", 1),
        (False, "full", 1),
        (True, "none", 4),  # the parts around the attention, which is left to Python
        (True, "full", 4),
    ],
)
@pytest.mark.filterwarnings("ignore:.*context_fn is passed")
def test_all_blocks_are_compiled_once(packed: bool, mode: str, num_graphs: int, graphs: list[int]) -> None:
    compiled = decoder()
    names = [name for name, _ in compiled.named_parameters()]
    checkpoint_and_compile(compiled, mode, compile=True)  # type: ignore[arg-type]
    loss, gradients = step(compiled, packed)
    assert len(graphs) == num_graphs
    expected_loss, expected = step(decoder(), packed)
    torch.testing.assert_close(loss, expected_loss)
    assert list(expected) == names == [name for name, _ in compiled.named_parameters()]
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4)
