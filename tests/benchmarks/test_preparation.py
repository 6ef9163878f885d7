"""The benchmark of preparation at toy size: both kinds count the same tokens."""

import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

import benchmarks.preparation
from benchmarks.preparation import benchmark, encode, prepare
from meap_lit.data.prepare.text import PrepareText
from meap_lit.data.prepare.tokenizer import TrainTokenizer
from meap_lit.errors import UserError


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(f'{{"text": "in town {number} people sing"}}\n' for number in range(200)))
    return file


def test_both_kinds_count_the_same_tokens(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By clocks that say half a second each time, a rate is twice the number of tokens."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    TrainTokenizer(input=[str(text)], vocab_size=280, output=str(tokenizer)).make(tokenizer)

    def run(command: list[str], **options: object) -> SimpleNamespace:
        assert command[1:5] == ["-m", "meap_lit", "prepare", "text"]
        PrepareText(input=[str(text)], tokenizer=str(tokenizer), output=command[-1], num_workers=1).run()
        return SimpleNamespace(returncode=0, stdout="  took     0.5 s for 0.1 MB of text", stderr="")

    clock = SimpleNamespace(perf_counter=count(step=0.5).__next__)
    monkeypatch.setattr(benchmarks.preparation.subprocess, "run", run)
    monkeypatch.setattr(benchmarks.preparation, "time", clock)
    counts = {prepare(text, tokenizer), encode(text, tokenizer, False), encode(text, tokenizer, True)}
    assert len(counts) == 1
    assert counts.pop() > 2 * 200 * 5


def test_a_preparation_that_fails_is_shown(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "ls")
    with pytest.raises(RuntimeError, match=r"(?s)ls -m meap_lit prepare text .* failed:.*--input"):
        prepare(text, text.parent)


def test_report(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nine tokens are prepared in the time in which ten are encoded."""
    monkeypatch.setattr(benchmarks.preparation, "prepare", lambda documents, tokenizer: 90.0)
    monkeypatch.setattr(benchmarks.preparation, "in_fresh_process", lambda work: 100.0)
    output = tmp_path / "results" / "preparation.md"
    benchmark(input=[str(text)], vocab_size=280, repetitions=2, output=output)
    report = output.read_text()
    assert report in capsys.readouterr().out
    assert "| `prepare text` | 90 | 90 to 90 | 100.0% | 100.0% to 100.0% |" in report
    assert "| `encode_batch` | 100 | 100 to 100 | 90.0% | 90.0% to 90.0% |" in report


def test_one_repetition_is_refused() -> None:
    with pytest.raises(UserError, match="--repetitions must be at least 2"):
        benchmark(repetitions=1)
