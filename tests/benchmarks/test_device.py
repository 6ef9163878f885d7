"""The one command for a GPU: its stages are real processes here, and the commands of the table are read, not run."""

import importlib
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jsonargparse import auto_parser

import benchmarks.device
from benchmarks.device import STAGES, Stage, benchmark, run

WRITE = "import sys; open(sys.argv[-1], 'w').write({text!r})"


def stage(name: str, code: str, seconds: float = 10, **options) -> Stage:
    return Stage(name, seconds, f"-c {shlex.quote(code)}", "", r"^- speed|^\| MEAP", **options)


TABLE = "| step | ms | MFU |\n| --- | --- | --- |\n| NTP | 3 | |\n| MEAP | 3.5 | n/a |\n\n- speed 7\n"
GOOD = stage("good", WRITE.format(text=TABLE))
BAD = stage("bad", "print('it is | broken'); raise SystemExit(3)", is_check=True)


@pytest.fixture
def hanging(tmp_path: Path) -> Stage:
    """It writes a part of its table and the ids of itself and of a child, and waits with the child."""
    code = f"""\
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[-1], "w").write("- speed 1, so far\\n")
open({str(tmp_path / "ids")!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
time.sleep(60)
"""
    return stage("hanging", code, seconds=1)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_neither_a_failure_nor_a_stage_that_hangs_stops_the_others(tmp_path: Path, hanging: Stage) -> None:
    missing = stage("missing", "", needs="a_module_that_is_not_there")
    start = time.monotonic()
    results = {each.stage.name: each for each in run([BAD, hanging, missing, GOOD], tmp_path / "out", budget=60)}
    assert time.monotonic() - start < 30
    assert {name: each.status for name, each in results.items()} == {
        "bad": "failed",
        "hanging": "timed out",
        "missing": "skipped",
        "good": "ok",
    }
    assert results["bad"].headline == "it is / broken"
    assert results["hanging"].headline == "speed 1, so far"
    assert results["hanging"].seconds == pytest.approx(2, abs=1)
    assert results["missing"].headline == "a_module_that_is_not_there is not installed"
    assert results["good"].headline == "MEAP: ms 3.5; MFU n/a. speed 7"
    assert sorted(file.name for file in (tmp_path / "out").glob("*.md")) == ["good.md", "hanging.unfinished.md"]
    pids = [int(pid) for pid in (tmp_path / "ids").read_text().split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, pids)), "the child is killed too"


def test_a_second_call_runs_what_is_not_there_yet(tmp_path: Path) -> None:
    first = list(run([BAD, GOOD], tmp_path, budget=60))
    table = (tmp_path / "good.md").read_text()
    assert table.startswith(TABLE)
    mended = stage("bad", WRITE.format(text="- speed 9\n"))
    refused = stage("good", "raise SystemExit('run again')")
    second = list(run([mended, refused], tmp_path, budget=60))
    assert [result.status for result in second] == ["ok", "ok, earlier"]
    assert [result.headline for result in second] == ["speed 9", first[1].headline]
    assert second[1].seconds == pytest.approx(first[1].seconds, abs=0.1)
    assert (tmp_path / "good.md").read_text() == table


def test_a_stage_gets_no_more_than_what_is_left(tmp_path: Path, hanging: Stage) -> None:
    patient = Stage(**{**vars(hanging), "seconds": 2.0})  # its own limit would be 4 s
    late = stage("late", "", seconds=3)
    results = list(run([patient, late, Stage(**{**vars(GOOD), "seconds": 0.1})], tmp_path, budget=2))
    assert [result.status for result in results][:2] == ["timed out", "skipped for time"]
    assert results[0].seconds < 3


@pytest.mark.parametrize(("others", "status"), [([], 0), ([BAD], 1), ([Stage(**{**vars(BAD), "is_check": False})], 0)])
def test_only_a_failed_check_is_a_failure_of_the_command(
    tmp_path: Path,
    others: list[Stage],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stages = [Stage(**{**vars(each), "toy": each.command}) for each in (*others, GOOD)]
    monkeypatch.setattr(benchmarks.device, "STAGES", tuple(stages))
    try:
        benchmark(tmp_path, device="cpu", budget=60)
        ended = 0
    except SystemExit as end:
        ended = end.code
    assert ended == status
    summary = (tmp_path / "summary.md").read_text()
    assert summary in capsys.readouterr().out
    assert "| good | ok | " in summary
    assert ("| bad | failed | " in summary) is bool(others)


# -------------------------------------------------------------------------------------------- the table of stages


@pytest.mark.parametrize("kind", ["command", "toy"])
@pytest.mark.parametrize("each", STAGES, ids=lambda each: each.name)
def test_every_command_is_understood(each: Stage, kind: str) -> None:
    """A misspelt option would be found on the GPU only."""
    flag, module, *words = shlex.split(getattr(each, kind))
    assert flag == "-m"
    parser = auto_parser(importlib.import_module(module).benchmark, as_positional=False)
    options = parser.parse_args([*words, "--output", "table.md"])
    assert options.device == ("cuda" if kind == "command" else "cpu")


def test_the_plan_fits_the_budget() -> None:
    assert sum(each.seconds for each in STAGES) <= 540
    assert len({each.name for each in STAGES}) == len(STAGES)


@pytest.mark.slow
def test_a_dry_run_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.device", "--device", "cpu", "--stages", "[chip]"]
    result = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "| chip | ok | " in result.stdout
    rows = [line for line in (tmp_path / "chip.md").read_text().splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows if "packed" in row or "64 x 64 x 64" in row] == [
        "| 64 x 64 x 64",
        "| packed rows",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ("chip", "peer")}, "--stages has 'peer'; choose from chip, correctness, "),
        ({"budget": 0}, "--budget must be above 0, got 0"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(benchmarks.device.UserError, match=message):
        benchmark(tmp_path, device="cpu", **options)
