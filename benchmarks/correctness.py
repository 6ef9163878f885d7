"""Run the tests that need a GPU, in one process, and write what each of them found.

    python -m benchmarks.correctness                                     # a GPU
    python -m benchmarks.correctness --device cpu                        # the same checks at toy size

The table is written after every test, so that one which hangs leaves those before it on record.
"""

from pathlib import Path
from typing import Literal

import pytest

from benchmarks.page import environment, main, page, publish
from meap_lit.errors import UserError

TESTS = Path(__file__).parents[1] / "tests"


def benchmark(device: Literal["cpu", "cuda"] = "cuda", output: Path | None = None) -> None:
    """Print a row for each test; the exit status is 1 if one failed, or if none ran.

    Args:
        device: `cuda` runs the tests marked gpu; `cpu` the same at toy size, without the slow ones.
        output: Markdown file to write the result to as well.
    """
    paths = [TESTS / "gpu"] if device == "cpu" else [TESTS / "gpu", TESTS / "test_waiting.py"]
    if not paths[0].is_dir():
        raise UserError(f"{paths[0]} does not exist; run the benchmark from a checkout of the repository")
    record = Record(device, output)
    words = ["-m", "not gpu and not slow" if device == "cpu" else "gpu", "-q", "--tb=short", "-p", "no:cacheprovider"]
    pytest.main([*words, *map(str, paths)], plugins=[record])
    publish(record.page(), output)
    if record.count("failed") or not record.count("passed"):
        raise SystemExit(1)


class Record:
    """A plugin of pytest that keeps the outcome of each test.

    Args:
        device: Of the tests.
        output: File to write the report to after each test.
    """

    def __init__(self, device: str, output: Path | None) -> None:
        self.output = output
        self._device = device
        environment(device)  # keeps it as it is before a test changes the threads, or breaks the GPU
        self._rows: dict[str, tuple[str, float, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":  # a set-up that fails or skips is the whole test
            reason = _reason(report) if report.outcome != "passed" else ""
            self._rows[report.nodeid] = (report.outcome, report.duration, reason)
        if self.output and report.when == "teardown":
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.output.write_text(self.page())

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._rows[report.nodeid] = ("failed", 0.0, "not imported: " + _reason(report))

    def count(self, outcome: str) -> int:
        return sum(row[0] == outcome for row in self._rows.values())

    def page(self) -> str:
        counts = ", ".join(f"{self.count(outcome)} {outcome}" for outcome in ("passed", "failed", "skipped"))
        first = sorted(self._rows.items(), key=lambda item: item[1][0] != "failed")  # failures first
        body = [
            "| test | outcome | s | reason |",
            "| --- | --- | --- | --- |",
            *(
                f"| `{name.split('/', 1)[-1]}` | {outcome} | {seconds:.1f} | {reason} |"
                for name, (outcome, seconds, reason) in first
            ),
        ]
        return page("correctness", "Tests that need a GPU", self._device, facts=[counts], body=body)


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return the line that says why a test failed or was skipped."""
    if isinstance(report.longrepr, tuple):
        text = str(report.longrepr[2])
    else:
        errors = [line[1:] for line in str(report.longrepr).splitlines() if line.startswith("E ")]
        text = errors[0] if errors else str(report.longrepr).strip().splitlines()[-1]
    return " ".join(text.split()).replace("|", "\\|")[:200]


if __name__ == "__main__":
    main(benchmark)
