"""The benchmark of head and loss at toy size: its ways agree, and its table is made of what was measured."""

from pathlib import Path

import pytest
import torch

import benchmarks.loss
from benchmarks.loss import WAYS, benchmark
from meap_lit.errors import UserError
from meap_lit.model import loss


def test_all_ways_take_the_same_loss_and_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = torch.randn(40, 8, generator=generator), torch.randn(96, 8, generator=generator)
    labels = torch.randint(0, 96, (40,), generator=generator)
    results = {}
    for way, take in WAYS.items():
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        total = take(*leaves, labels)
        results[way] = (total.detach(), *torch.autograd.grad(total, leaves))
    assert {"ours", "plain"} <= set(results)
    for result in results.values():
        torch.testing.assert_close(result, results["plain"], atol=1e-4, rtol=1e-5)


def test_the_table_has_what_lies_beyond_the_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gradients = 4 * 8 * (1000 + 50)
    monkeypatch.setattr(benchmarks.loss, "in_fresh_process", lambda work: (gradients + 1_500_000_000, 2.25))
    output = tmp_path / "loss.md"
    benchmark(vocab_size=1000, num_tokens=50, hidden_size=8, ways=("ours", "plain"), output=output)
    report = output.read_text()
    assert report in capsys.readouterr().out
    assert report.rstrip().splitlines()[-2:] == ["| ours | 1.50 | 2.2 |", "| plain | 1.50 | 2.2 |"]


def test_pieces_of_several_sizes_are_compared(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The size is set while the loss is taken, and only then."""
    seen = []
    ours = WAYS["ours"]
    monkeypatch.setitem(WAYS, "ours", lambda *tensors: seen.append(loss.piece_rows(96)) or ours(*tensors))
    monkeypatch.setattr(benchmarks.loss, "in_fresh_process", lambda work: work())
    benchmark(vocab_size=96, num_tokens=40, hidden_size=8, ways=("ours",), rows=(7, 20), repetitions=1)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ours, pieces of ")]
    assert [row.split(" | ")[0] for row in rows] == ["| ours, pieces of 7 rows", "| ours, pieces of 20 rows"]
    assert seen == [7, 7, 20, 20]  # a small call before each that counts
    assert loss.piece_rows(96) > 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": ("ours", "mine")}, "--ways has 'mine'; choose from ours, "),
        ({"repetitions": 0}, "--repetitions must be at least 1"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        benchmark(**options)
