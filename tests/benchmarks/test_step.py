"""The benchmark at toy size: it runs, and it measures what it says."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from benchmarks.step import TrainingStep, benchmark, known_decoder
from meap_lit.errors import UserError
from meap_lit.model import DecoderConfig

TOY = DecoderConfig(
    num_layers=1, num_heads=2, num_kv_heads=1, hidden_size=16, intermediate_size=16, vocab_size=64, max_seq_len=32
)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_report(precision: Literal["fp32", "bf16"], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results" / "step.md"
    benchmark(decoder=TOY, precision=precision, micro_batch_size=2, repetitions=3, output=output)
    report = output.read_text()
    assert report in capsys.readouterr().out
    rows = {line.split(" | ")[0]: line.split(" | ") for line in report.splitlines() if line.startswith("| ")}
    for kind in ("| NTP", "| MEAP"):
        median, tokens_per_second = float(rows[kind][1]), float(rows[kind][3].replace(",", ""))
        assert tokens_per_second == pytest.approx(2 * 32 / (median / 1e3), rel=0.05)
    assert "- MEAP / NTP: " in report
    assert "- masking alone: " in report


def test_the_costliest_operations_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark(decoder=TOY, micro_batch_size=2, repetitions=2, profile=40)
    table = capsys.readouterr().out.split("| operation")[1].splitlines()[2:]
    rows = [line.strip("| ").split(" | ") for line in table if line]
    assert len(rows) == 40
    times = [float(row[2]) for row in rows]
    assert times == sorted(times, reverse=True)
    calls = {row[0]: float(row[3]) for row in rows}
    assert calls["`aten::mm`"] == 3 * 7 + 2  # seven of the block; the head, whose own gradient `addmm_` adds


@pytest.mark.parametrize(
    ("model", "num_parameters"),
    [("0.1b", 122_407_680), ("0.3b", 324_060_160), ("0.5b", 480_953_344), ("1.1b", 1_175_816_192)],
)
def test_ladder_is_that_of_the_recipes(model: str, num_parameters: int) -> None:
    config = known_decoder(model)
    assert config.num_parameters() == num_parameters
    assert config.max_seq_len == 4096


def test_products_are_in_float8_on_request() -> None:
    """Which changes the loss a little, by rounding."""
    config = replace(TOY, num_kv_heads=2, intermediate_size=1040)  # multiples of 16, one of them not too small
    plain, rounded = (TrainingStep(config, 2, "fp32", torch.device("cpu"), False, float8) for float8 in (False, True))
    losses = [step.loss(step.input_ids).item() for step in (plain, rounded)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0] != losses[1]


def test_one_repetition_is_refused() -> None:
    with pytest.raises(UserError, match="--repetitions must be at least 2"):
        benchmark(repetitions=1)
