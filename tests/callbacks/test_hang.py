"""A run whose one rank hangs ends, and says which."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meap_lit.callbacks.hang import StopOnHang, Whereabouts, blame
from meap_lit.errors import UserError


def told(rank, marks=7, beats=3):
    return Whereabouts(rank, "node", 100 + rank, marks=marks, where="in optimizer step 4", beats=beats)


LATER = {rank: told(rank, beats=4) for rank in range(3)}


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ({**LATER, 1: told(1, 6, 4)}, "the others wait for rank 1 (pid 101 on node), which is in optimizer step 4"),
        (
            {**LATER, 2: told(2, beats=3)},
            "rank 2 (pid 102 on node) has not reported since it was in optimizer step 4: the process has stopped "
            "or ended",
        ),
        (LATER, "all ranks are in optimizer step 4: they wait for the network, storage or their devices"),
        ({0: LATER[0], 1: LATER[1]}, "rank 2 has never reported"),
    ],
)
def test_the_rank_that_is_behind_is_named(after, message):
    assert blame({rank: told(rank) for rank in after}, after, 3) == message


def command(recipe, *options):
    command = [sys.executable, "-m", "meap_lit", "fit", "--config", str(recipe)]
    command += ["--config", "recipes/strategy/ddp.yaml", "--trainer.devices", "2", "--data.micro_batch_size", "2"]
    command += ["--hang.timeout_minutes", "0.1", "--trainer.callbacks+=tests.support.interruption.HangAt"]
    return [*command, "--trainer.callbacks.rank", "1", "--trainer.callbacks.batch", "5", *options]


def is_alive(pid):
    """Whether a process runs; a zombie does not, which waits for a parent that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], r"the others wait for rank 1 \(pid (\d+) on \S+\), which is reading the next batch after optimizer step"),
        (
            ["--trainer.callbacks.stopped", "true"],
            r"rank 1 \(pid (\d+) on \S+\) has not reported since it was ",
        ),
    ],
)
def test_a_run_with_a_hanging_rank_ends(toy_recipe, options, reason):
    result = subprocess.run(command(toy_recipe, *options), capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 1, result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    found = re.search(rf"^error: no progress on rank 0 .* for \d+ s \(hang.timeout_minutes 0.1\): {reason}", line)
    assert found, line
    deadline = time.monotonic() + 60  # the system takes a moment to end a killed process
    while is_alive(int(found[1])):
        assert time.monotonic() < deadline, "the other rank lives on"
        time.sleep(0.1)


def test_the_others_end_when_the_process_with_the_store_is_stopped(toy_recipe, tmp_path):
    """It is rank 0, the process that was started: it stays stopped, and nothing is heard of its store."""
    options = ["--trainer.callbacks.rank", "0", "--trainer.callbacks.stopped", "true"]
    with open(tmp_path / "log", "wb") as log:
        stopped = subprocess.Popen(command(toy_recipe, *options), stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 200
        while "error: " not in (text := (tmp_path / "log").read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        os.killpg(stopped.pid, signal.SIGKILL)
        stopped.wait()
    assert re.search(r"error: no progress on rank 1 .*: the store of rank 0 does not answer \(.*\); look there", text)


@pytest.mark.parametrize("minutes", [0, -1])
def test_a_wrong_timeout_is_named(minutes):
    with pytest.raises(UserError, match=f"^hang.timeout_minutes must be above 0, got {minutes}; null is for never$"):
        StopOnHang(minutes)
