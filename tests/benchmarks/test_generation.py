"""The benchmark of generation at toy size: all three lines, and both engines say the same."""

import re

from benchmarks.generation import _batches_of_like_length, benchmark


def test_report(tmp_path, capsys):
    output = tmp_path / "results" / "generation.md"
    benchmark(lengths=(10, 20), per_length=2, batch=2, new_tokens=3, repetitions=1, output=output)
    report = output.read_text()
    assert report.strip() in capsys.readouterr().out
    rows = re.findall(r"^\| (\w.*?) \| (\d+) \| (\d+), (\d+) \| .* \| 100\.0% \|$", report, re.MULTILINE)
    assert rows == [
        ("one prompt at a time", "2", "2", "2"),
        ("a grid", "4", "2", "2"),
        ("a grid, transformers in its order", "4", "2", "2"),
    ]


def test_short_prompts_share_larger_batches():
    prompts = [[0] * length for length in (10, 3, 9, 2, 4, 4)]
    assert _batches_of_like_length(prompts, size=2, new_tokens=1) == [[0, 2], [4, 5, 1, 3]]
