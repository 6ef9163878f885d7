"""The anatomy of a toy's step, counted by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import anatomy
from benchmarks.anatomy import Case, benchmark, count, graphs_and_breaks, seconds
from benchmarks.kernels import Kernel
from meap_lit.model import DecoderConfig, float8

TOY = DecoderConfig(
    num_layers=3, num_heads=2, num_kv_heads=1, hidden_size=16, intermediate_size=32, vocab_size=64, max_seq_len=8
)
DENSE = Case(TOY, rows=2, seq_len=8)
PACKED = replace(DENSE, documents=(5, 3))
BLOCK_WEIGHTS = 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("case", "num_pairs"), [(DENSE, 2 * 36), (PACKED, 2 * (15 + 6))])
def test_flops_of_the_parts(case: Case, num_pairs: int, compiled: bool) -> None:
    """A pair of query and key costs two products of the 16 numbers of all heads; five in the backward."""
    torch._dynamo.utils.counters.clear()
    kernels = count(case, compiled=compiled)
    flops = {part: sum(kernel.flops for kernel in kernels.get(part, [])) for part in anatomy.PARTS}
    products = 2 * 16 * BLOCK_WEIGHTS
    num_supervised = 7 if case.documents else 16
    assert flops == {
        "mask": 0,
        "embedding": 0,
        "blocks forward": 3 * (products + 2 * 2 * 16 * num_pairs),
        "loss": 3 * 2 * num_supervised * 16 * 64,
        "blocks backward": 3 * (2 * products + 5 * 2 * 16 * num_pairs),
        "optimizer": 0,
    }
    assert graphs_and_breaks() == ((1, 0) if compiled else (0, 0))  # one graph for three blocks
    assert bool(kernels.get("mask")) == (not case.documents)


def test_the_optimizer_reads_four_numbers_a_weight_and_writes_three() -> None:
    updates = [kernel for kernel in count(DENSE, compiled=False)["optimizer"] if kernel.name == "_fused_adamw_"]
    assert len(updates) == 2  # matrices and vectors
    tensors = 2 + 7 * 3 + 7  # each with a step of its own
    assert sum(kernel.bytes for kernel in updates) == 4 * (7 * TOY.num_parameters() + tensors)


def test_a_kernel_is_limited_by_bytes_or_flops() -> None:
    assert seconds(Kernel("", bytes=int(4.8e9), flops=1)) == pytest.approx(1e-3)
    assert seconds(Kernel("mm", bytes=1, flops=int(790e9))) == pytest.approx(1e-3)
    assert seconds(Kernel("_scaled_mm", bytes=1, flops=int(790e9))) == pytest.approx(0.5e-3)


@pytest.mark.slow
def test_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(float8, "SMALL", (0, 0))
    monkeypatch.setattr(anatomy, "CASES", {"1.1b": replace(DENSE, decoder=replace(TOY, hidden_size=32, num_layers=1))})
    benchmark(top=3, output=tmp_path / "anatomy.md")
    report = (tmp_path / "anatomy.md").read_text()
    assert report in capsys.readouterr().out
    assert report.count("0 graph break(s)") == 1
    assert report.count("| **micro-batch** |") == 1
