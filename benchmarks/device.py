"""Answer every question about a GPU by one command, within a budget of seconds.

    python -m benchmarks.device --output DIR                             # one GPU, nine minutes
    python -m benchmarks.device --output DIR --device cpu                # the same stages at toy size

Each stage is a process with a limit of its own. It writes `DIR/<stage>.md`, and what it prints goes to
`DIR/<stage>.log`. A stage that fails or takes too long is killed with all processes that it started, and the next one
begins. Stages whose table is in DIR are not run again, so a second call continues. `DIR/summary.md` is written after
every stage. The exit status is 1 if the tests of the stage `correctness` failed or ran out of time.
"""

import contextlib
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.page import check_device, main
from meap_lit.errors import UserError

ROOT = Path(__file__).parents[1]
LIMIT, TOY_LIMIT = 2, 10
"""A stage may take so many times its planned seconds; at toy size start-up is most of it, on any machine."""


@dataclass(frozen=True)
class Stage:
    """A command and what its table says first.

    Args:
        name: Of its files.
        seconds: Planned on an H200, start-up and compilation included.
        command: Words after `python` for a GPU; the table's path follows them.
        toy: The same for a CPU.
        headline: Pattern of the lines of the table that the summary has.
        is_check: Whether a failure is one of the whole command.
        needs: Module without which the stage is left out.
    """

    name: str
    seconds: float
    command: str
    toy: str
    headline: str
    is_check: bool = False
    needs: str | None = None


LARGE = "--model 1.1b --device cuda --precision bf16 --micro_batch_size 4"
STEP = r"^\| (NTP|MEAP) \||^- MEAP / NTP"
TOY_STEP = "-m benchmarks.step --seq_len 32 --micro_batch_size 1 --repetitions 2 --profile 5"
TOY_PEERS = "-m benchmarks.peers --model small --seq_len 32 --micro_batch_size 1 --repetitions 2 --compile [false]"

STAGES = (
    Stage(
        "chip",
        25,
        "-m benchmarks.chip",
        "-m benchmarks.chip --device cpu --toy true --repetitions 2",
        r"^- copy|^\| [\d,]+ x [\d,]+ x [\d,]+ \||^\| .* \| (flash|cuDNN) \||^\| (flash|cuDNN|packed rows) \|",
    ),
    Stage(
        "correctness",
        110,
        "-m benchmarks.correctness",
        "-m benchmarks.correctness --device cpu",
        r"^- \d+ passed|\| failed \|",
        is_check=True,
    ),
    Stage(
        "step_compiled",
        65,
        f"-m benchmarks.step {LARGE} --compile true --repetitions 10 --profile 20",
        TOY_STEP,
        STEP,
    ),
    Stage("step_eager", 35, f"-m benchmarks.step {LARGE} --repetitions 6", TOY_STEP, STEP),
    Stage(
        "loss",
        20,
        "-m benchmarks.loss --device cuda --bf16 true --hidden_size 2048 --ways [ours,plain] "
        "--rows [256,1024,2048,4096]",
        "-m benchmarks.loss --vocab_size 1024 --num_tokens 64 --hidden_size 32 --ways [ours,plain] "
        "--rows [8,32] --repetitions 1",
        r"^\| (ours|plain)",
    ),
    Stage(
        "packing",
        45,
        "-m benchmarks.packing --model 1.1b --device cuda --precision bf16 --seq_len 4096 --rows 4 --padded_rows 16 "
        "--repetitions 2",
        "-m benchmarks.packing --conversations 8 --seq_len 128 --padded_rows 4 --repetitions 1",
        r"^\| (packed|padded) \||^- packed / padded",
    ),
    Stage(
        "peers_transformers",
        85,
        f"-m benchmarks.peers {LARGE} --compile [true] --peers [transformers] --repetitions 8",
        f"{TOY_PEERS} --peers [transformers]",
        r"^\| (meap_lit|transformers)",
        needs="transformers",
    ),
    Stage(
        "peers_litgpt",
        60,
        f"-m benchmarks.peers {LARGE} --compile [true] --peers [litgpt] --repetitions 8",
        f"{TOY_PEERS} --peers [litgpt]",
        r"^\| (meap_lit|litgpt)",
        needs="litgpt",
    ),
    Stage(
        "trainer",
        50,
        "-m benchmarks.trainer --model 0.1b --device cuda --precision bf16 --micro_batch_size 4 --compile true "
        "--turns 8",
        "-m benchmarks.trainer --model toy --micro_batch_size 2 --turns 2 --steps 10",
        r"^\| (bare loop|`fit`)|^- the Trainer|in waiting for the next batch$",
    ),
    Stage(
        "step_float8",
        45,
        f"-m benchmarks.step {LARGE} --compile true --float8 true --repetitions 10 --profile 20",
        f"{TOY_STEP} --float8 true --decoder.num_layers 1 --decoder.num_heads 2 --decoder.hidden_size 32 "
        "--decoder.intermediate_size 1040 --decoder.vocab_size 64",
        STEP,
        needs="torchao",
    ),
)


def benchmark(
    output: Path, budget: float = 540, stages: tuple[str, ...] = (), device: Literal["cpu", "cuda"] = "cuda"
) -> None:
    """Run the stages, and print the summary.

    Args:
        output: Folder for the tables.
        budget: Seconds for everything.
        stages: Names of those to run; all if not given.
        device: `cpu` is a dry run at toy size.
    """
    names = [stage.name for stage in STAGES]
    for name in stages:
        if name not in names:
            raise UserError(f"--stages has {name!r}; choose from {', '.join(names)}")
    if budget <= 0:
        raise UserError(f"--budget must be above 0, got {budget:g}")
    start = time.monotonic()
    check_device(device)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a stage does not outlive this process
    chosen = [stage for stage in STAGES if stage.name in (stages or names)]
    results = []
    for result in run(chosen, output, budget - (time.monotonic() - start), toy=device == "cpu"):
        results.append(result)
        print(f"{result.stage.name}: {result.status}, {result.seconds:.0f} s", flush=True)
        (output / "summary.md").write_text(summary(results))
    print(f"\n{summary(results)}")
    if any(result.stage.is_check and result.status in ("failed", "timed out") for result in results):
        raise SystemExit(1)


@dataclass(frozen=True)
class Result:
    """What came of a stage."""

    stage: Stage
    status: str
    seconds: float = 0.0
    headline: str = ""


def summary(results: Sequence[Result]) -> str:
    return "\n".join(
        [
            "# Summary",
            "",
            "| stage | status | s | planned, s | figures |",
            "| --- | --- | --- | --- | --- |",
            *(
                f"| {result.stage.name} | {result.status} | {result.seconds:.0f} | {result.stage.seconds:.0f} "
                f"| {result.headline} |"
                for result in results
            ),
            "",
        ]
    )


def run(stages: Sequence[Stage], folder: Path, budget: float, toy: bool = False) -> Iterator[Result]:
    """Run stages in order, within `budget` seconds altogether; yield the result of each."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget
    for stage in stages:
        left = end - time.monotonic()
        table = folder / f"{stage.name}.md"
        if table.exists():
            yield _read(stage, table, "ok, earlier")
        elif stage.needs and importlib.util.find_spec(stage.needs) is None:
            yield Result(stage, "skipped", headline=f"{stage.needs} is not installed")
        elif left < stage.seconds / 2:
            yield Result(stage, "skipped for time", headline=f"{max(left, 0):.0f} s left")
        else:
            limit = (TOY_LIMIT if toy else LIMIT) * stage.seconds
            yield _run(stage, table, min(limit, left), toy)


def _run(stage: Stage, table: Path, limit: float, toy: bool) -> Result:
    unfinished, log = table.with_suffix(".unfinished.md"), table.with_suffix(".log")
    unfinished.unlink(missing_ok=True)
    command = [
        sys.executable,
        *shlex.split(stage.toy if toy else stage.command),
        "--output",
        str(unfinished.absolute()),
    ]
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = "ok" if process.wait(limit) == 0 and unfinished.exists() else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            _kill(process)
    seconds = time.monotonic() - start
    if status == "ok":
        with unfinished.open("a") as file:
            file.write(f"- the stage took {seconds:.1f} s\n")
        return _read(stage, unfinished.rename(table), status)
    if unfinished.exists() and (figures := _headline(stage, unfinished)):
        return Result(stage, status, seconds, figures)
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Result(stage, status, seconds, lines[-1].replace("|", "/")[:200] if lines else "")


def _kill(process: subprocess.Popen) -> None:
    """Kill what is left of a process and of those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(stage: Stage, table: Path, status: str) -> Result:
    took = re.search(r"^- the stage took ([\d.]+) s$", table.read_text(), re.MULTILINE)
    return Result(stage, status, float(took[1]) if took else 0.0, _headline(stage, table))


def _headline(stage: Stage, table: Path) -> str:
    """Return the lines that match the stage's pattern; cells of a table are named by their columns."""
    lines, names, found = table.read_text().splitlines(), list[str](), []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if following.startswith("| ---"):
            names = _cells(line)
        elif re.search(stage.headline, line):
            first, *cells = _cells(line) if line.startswith("|") else [line.strip("- ")]
            named = [f"{name} {cell}" for name, cell in zip(names[1:], cells) if cell]
            found.append(": ".join([first, "; ".join(named)]) if named else first)
    return ". ".join(found)


def _cells(line: str) -> list[str]:
    return line.strip("| ").split(" | ")


if __name__ == "__main__":
    main(benchmark)
