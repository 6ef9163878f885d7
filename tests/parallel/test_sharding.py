"""What is put around the blocks of a decoder: the same loss and gradients, and one compilation for all of them."""

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from meap_lit.model import Decoder, DecoderConfig, linear_cross_entropy
from meap_lit.model.attention import Documents
from meap_lit.model.recompute import checkpoint_and_compile
from tests.support import varlen

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


ROWS = [[20, 9], [5, 27]]


def step(decoder: Decoder, rows: list[list[int]] | None) -> tuple[Tensor, dict[str, Tensor]]:
    decoder.zero_grad()
    input_ids = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(0))
    layout = (None, None) if rows is None else (torch.arange(32).repeat(2, 1), Documents.of_rows(rows, 32))
    loss = linear_cross_entropy(decoder(input_ids, *layout), decoder.lm_head.weight, input_ids.roll(-1))[0]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(TOY)


@pytest.mark.parametrize(
    ("rows", "mode", "num_graphs"),
    [
        (None, "none", 1),
        (None, "selective", 1),
        (None, "full", 1),
        (ROWS, "none", 4),  # the parts around the attention, which is left to Python
        (ROWS, "full", 4),
    ],
)
@pytest.mark.filterwarnings("ignore:.*context_fn is passed")
def test_all_blocks_are_compiled_once(
    rows: list[list[int]] | None, mode: str, num_graphs: int, graphs: list[int]
) -> None:
    compiled = decoder()
    names = [name for name, _ in compiled.named_parameters()]
    checkpoint_and_compile(compiled, mode, compile=True)  # type: ignore[arg-type]
    loss, gradients = step(compiled, rows)
    assert len(graphs) == num_graphs
    expected_loss, expected = step(decoder(), rows)
    torch.testing.assert_close(loss, expected_loss)
    assert list(expected) == names == [name for name, _ in compiled.named_parameters()]
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("mode", "num_forwards"), [("none", 1), ("selective", 1), ("full", 2)])
@pytest.mark.filterwarnings("ignore:.*context_fn is passed")
def test_attention_for_variable_lengths_is_compiled_once_for_all_documents(
    mode: str, num_forwards: int, graphs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`selective` keeps its results, and rows with padding have no NaN."""
    batches = [ROWS, [[3, 4, 1, 9], [31]], [[32], [32]], [[], [16, 15]], [[1] * 20, [2] * 7]]
    expected = [step(decoder(), rows) for rows in batches]
    varlen.enable(monkeypatch)
    compiled = decoder()
    checkpoint_and_compile(compiled, mode, compile=True)  # type: ignore[arg-type]
    torch._dynamo.utils.counters.clear()
    for rows, (expected_loss, expected_gradients) in zip(batches, expected, strict=True):
        varlen.calls.clear()
        loss, gradients = step(compiled, rows)
        bounds = [0, *accumulate(Documents.of_rows(rows, 32).lengths)]
        assert varlen.calls == [bounds] * TOY.num_layers * num_forwards
        torch.testing.assert_close(loss, expected_loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[name], atol=2e-5, rtol=2e-5)
    assert len(graphs) == 1
    assert not torch._dynamo.utils.counters["graph_break"]
