"""The benchmark of starting up: what it takes the time of."""

import sys
from pathlib import Path

import pytest

import benchmarks.startup
from benchmarks.startup import FirstStep, benchmark, first_step, shown_help
from meap_lit.errors import UserError


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs that take 50 seconds the first time, 5 and 9 then; the first only prepares."""
    runs = iter([50.0, 5.0, 9.0])
    monkeypatch.setattr(benchmarks.startup, "shown_help", lambda: 0.5)
    monkeypatch.setattr(benchmarks.startup, "first_step", lambda recipe: next(runs))
    output = tmp_path / "results" / "startup.md"
    benchmark(repetitions=2, output=output)
    report = output.read_text()
    assert report in capsys.readouterr().out
    assert "| `python -m meap_lit --help` | 0.50 | 0.50 | 0.50 | 2 |" in report
    assert "| `fit` of quickstart.yaml to its first step | 7.00 | 5.00 | 9.00 | 2 |" in report


def test_help_is_a_process_of_its_own() -> None:
    assert shown_help() > 0


def test_a_run_that_fails_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "ls")
    with pytest.raises(RuntimeError, match=r"(?s)ls -m meap_lit fit --config .*recipe.yaml.* failed:.*--config"):
        first_step(tmp_path / "recipe.yaml")


def test_a_run_without_a_step_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "echo")
    with pytest.raises(RuntimeError, match=r"fit --config .*recipe.yaml.* ended before its first step"):
        first_step(tmp_path / "recipe.yaml")


def test_the_first_step_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    monkeypatch.setenv(benchmarks.startup.STAMP, str(tmp_path / "stamp"))
    monkeypatch.setattr(benchmarks.startup.os, "_exit", ended.append)
    FirstStep().on_train_batch_end()
    assert ended == [0]
    assert float((tmp_path / "stamp").read_text()) > 1e9


def test_one_repetition_is_refused() -> None:
    with pytest.raises(UserError, match="--repetitions must be at least 2"):
        benchmark(repetitions=1)
