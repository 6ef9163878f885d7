"""The table of tests: what failed comes first, with its reason, and decides the exit status."""

from pathlib import Path

import pytest

import benchmarks.correctness
from benchmarks.correctness import benchmark

TESTS = """\
import pytest

def test_right(): pass

def test_wrong(): assert 1 == 2, "one | two"

def test_left_out(): pytest.skip("no reason")

@pytest.fixture
def broken(): raise ValueError("no fixture")

def test_not_set_up(broken): pass
"""


@pytest.fixture
def tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(benchmarks.correctness, "TESTS", tmp_path)
    (tmp_path / "gpu").mkdir()
    return tmp_path / "gpu"


def test_failures_come_first_and_have_a_reason(tests: Path, tmp_path: Path) -> None:
    (tests / "test_four.py").write_text(TESTS)
    with pytest.raises(SystemExit) as ended:
        benchmark("cpu", tmp_path / "table.md")
    assert ended.value.code == 1
    table = (tmp_path / "table.md").read_text()
    assert "- 1 passed, 2 failed, 1 skipped\n" in table
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if "::test_" in line]
    assert [row[0].split("::")[1].strip("`") for row in rows] == [
        "test_wrong",
        "test_not_set_up",
        "test_right",
        "test_left_out",
    ]
    assert rows[0][3].startswith("AssertionError: one \\| two")
    assert rows[1][3] == "ValueError: no fixture"
    assert rows[3][3] == "Skipped: no reason"


def test_a_file_that_cannot_be_imported_is_a_failure(tests: Path, tmp_path: Path) -> None:
    (tests / "test_one.py").write_text("def test_right(): pass\n")
    (tests / "test_two.py").write_text("import a_module_that_is_not_there\n")
    with pytest.raises(SystemExit):
        benchmark("cpu", tmp_path / "table.md")
    assert "| failed | 0.0 | not imported: ModuleNotFoundError" in (tmp_path / "table.md").read_text()


def test_nothing_that_ran_is_a_failure(tests: Path) -> None:
    with pytest.raises(SystemExit):
        benchmark("cpu")
