"""The benchmark of generation at toy size: all lines, and both engines say the same."""

import re

import pytest

from benchmarks.generation import _as_items, _batches_of_evaluate, benchmark


@pytest.mark.slow
def test_report(tmp_path, capsys):
    output = tmp_path / "results" / "generation.md"
    sizes = {
        "lengths": (10, 20),
        "per_length": 2,
        "batch": 2,
        "needle_lengths": (220, 260),
        "needle_depths": (0, 50, 100),
    }
    benchmark(**sizes, new_tokens=3, repetitions=1, output=output)
    report = output.read_text()
    assert report.strip() in capsys.readouterr().out
    rows = re.findall(r"^\| (\w.*?) \| (\d+) \| (\d+), (\d+) \| .* \| 100\.0% \|$", report, re.MULTILINE)
    assert rows == [
        ("random, one at a time", "2", "2", "2"),
        ("random", "4", "2", "2"),
        ("random, transformers in its order", "4", "2", "2"),
        ("needle", "6", "3", "3"),
        ("needle, transformers in its order", "6", "3", "3"),
    ]


def test_short_prompts_share_larger_batches():
    prompts = [[number] * length for number, length in enumerate((10, 3, 9, 2, 4, 4))]
    assert _batches_of_evaluate(_as_items(prompts, 1), 2) == [[0, 2], [4, 5, 1, 3]]
