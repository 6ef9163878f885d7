"""The benchmark of head and loss at toy size: its ways agree, and its table is made of what was measured."""

from pathlib import Path

import pytest
import torch

import benchmarks.loss
from benchmarks.loss import WAYS, benchmark
from meap_lit.errors import UserError


def test_all_ways_take_the_same_loss_and_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = torch.randn(40, 8, generator=generator), torch.randn(96, 8, generator=generator)
    labels = torch.randint(0, 96, (40,), generator=generator)
    results = {}
    for way, loss in WAYS.items():
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        total = loss(*leaves, labels)
        results[way] = (total.detach(), *torch.autograd.grad(total, leaves))
    assert len(results) == 3
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": ("ours", "mine")}, "--ways has 'mine'; choose from ours, torch, plain"),
        ({"repetitions": 0}, "--repetitions must be at least 1"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        benchmark(**options)
