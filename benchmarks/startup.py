"""Time the start: `python -m meap_lit --help`, and the first step of `fit` on the prepared quickstart.

Each is a fresh process, timed from its start by the clock: to its end, or to the end of the first training step. The
quickstart's corpus, tokenizer and dataset are made before, where they are missing, and are not part of it.

    python -m benchmarks.startup                                                     # a minute or two
"""

import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L

from benchmarks.page import main, page, publish
from meap_lit.errors import UserError

ROOT = Path(__file__).parents[1]
TIMEOUT_SECONDS = 600
STAMP = "BENCHMARK_FIRST_STEP"
"""Environment variable with the file into which a run writes when its first step was done."""


class FirstStep(L.Callback):
    """Writes down when the first training step was done, and ends the process there."""

    def on_train_batch_end(self, *args: Any) -> None:
        Path(os.environ[STAMP]).write_text(repr(time.time()))
        os._exit(0)


def benchmark(
    repetitions: int = 5, recipe: Path = ROOT / "recipes" / "quickstart.yaml", output: Path | None = None
) -> None:
    """Print how long the help and the first step take.

    Args:
        repetitions: Processes of each kind, in turns.
        recipe: Recipe to train.
        output: Markdown file to write the result to as well.
    """
    if repetitions < 2:
        raise UserError("--repetitions must be at least 2")
    first_step(recipe)  # what is missing is prepared, and files come into the page cache
    seconds: dict[str, list[float]] = {
        "`python -m meap_lit --help`": [],
        f"`fit` of {recipe.name} to its first step": [],
    }
    for _ in range(repetitions):
        for times, measure in zip(seconds.values(), (shown_help, lambda: first_step(recipe)), strict=True):
            times.append(measure())
    facts = [
        f"load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
    ]
    body = [
        "| what | median, s | fastest, s | slowest, s | processes |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {what} | {statistics.median(times):.2f} | {min(times):.2f} | {max(times):.2f} | {len(times)} |"
            for what, times in seconds.items()
        ),
    ]
    publish(page("startup", "Start", "cpu", facts=facts, body=body), output)


def shown_help() -> float:
    """Seconds from the start of `python -m meap_lit --help` to its end."""
    start = time.time()
    _run(["--help"])
    return time.time() - start


def first_step(recipe: Path) -> float:
    """Seconds from the start of a run to the end of its first training step."""
    with TemporaryDirectory() as folder:
        stamp = Path(folder, "stamp")
        words = ["--config", str(recipe), "--trainer.callbacks+", "benchmarks.startup.FirstStep"]
        words += ["--trainer.logger.init_args.save_dir", folder]
        start = time.time()
        _run(["fit", *words], {STAMP: str(stamp)})
        if not stamp.is_file():
            raise RuntimeError(f"{shlex.join(['fit', *words])} ended before its first step")
        return float(stamp.read_text()) - start


def _run(words: list[str], variables: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "meap_lit", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | (variables or {}), capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main(benchmark)
