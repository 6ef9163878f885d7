"""The benchmark of loading at toy size: what it measures, and what it makes of it."""

from pathlib import Path

import pytest

import benchmarks.load
from benchmarks.load import benchmark
from benchmarks.step import SMALL
from meap_lit.checkpoint.source import open_source
from meap_lit.errors import UserError


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With an idle process of 100 MB and others that hold the weights one and a half times beside that."""
    num_bytes = 4 * SMALL.num_parameters()
    dtypes = []

    def measure(place: Path | None, repetitions: int) -> tuple[int, float]:
        assert repetitions == 2
        if place is None:
            return 100_000_000, 0.0
        dtypes.append(str(open_source(place).dtype))
        return 100_000_000 + num_bytes * 3 // 2, 0.25

    monkeypatch.setattr(benchmarks.load, "_measure", measure)
    output = tmp_path / "results" / "load.md"
    benchmark(model="small", dtype="float32", max_shard_size="1MB", repetitions=2, output=output)
    report = output.read_text()
    assert capsys.readouterr().out == report + "\n"
    rows = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["one safetensors file", "safetensors shards", "checkpoint (.ckpt)"]
    largest = 4 * 2048 * 128
    expected = [f"{size / 1e9:.3f}" for size in (num_bytes, largest, num_bytes * 3 // 2)]
    assert all(row[1:] == [*expected, "1.500", "0.25"] for row in rows)
    assert dtypes == ["torch.float32"] * 3


@pytest.mark.slow
def test_an_idle_process_is_measured() -> None:
    peak, seconds = benchmarks.load._measure(None, 1)
    assert 50e6 < peak < 5e9
    assert seconds >= 0


def test_no_repetition_is_refused() -> None:
    with pytest.raises(UserError, match="--repetitions must be at least 1"):
        benchmark(repetitions=0)
