"""A run whose one rank hangs ends, and says which."""

import re
import subprocess
import sys
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
            "rank 2 (pid 102 on node) gives no sign of life since it was in optimizer step 4: the process is stopped "
            "or gone",
        ),
        (LATER, "all ranks are in optimizer step 4: they wait for the network, storage or their devices"),
        ({0: LATER[0], 1: LATER[1]}, "rank 2 has never been heard of"),
    ],
)
def test_the_rank_that_is_behind_is_named(after, message):
    assert blame({rank: told(rank) for rank in after}, after, 3) == message


def run(recipe, *options):
    command = [sys.executable, "-m", "meap_lit", "fit", "--config", str(recipe)]
    command += ["--config", "recipes/strategy/ddp.yaml", "--trainer.devices", "2", "--data.micro_batch_size", "2"]
    command += ["--hang.timeout_minutes", "0.1", "--trainer.callbacks+=tests.callbacks.interruption.HangAt"]
    command += ["--trainer.callbacks.rank", "1", "--trainer.callbacks.batch", "5", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], r"the others wait for rank 1 \(pid (\d+) on \S+\), which is reading the next batch after optimizer step"),
        (
            ["--trainer.callbacks.stopped", "true"],
            r"rank 1 \(pid (\d+) on \S+\) gives no sign of life since it was ",
        ),
    ],
)
def test_a_run_with_a_hanging_rank_ends(toy_recipe, options, reason):
    result = run(toy_recipe, *options)
    assert result.returncode == 1, result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    found = re.search(rf"^error: no progress on rank 0 .* for \d+ s \(hang.timeout_minutes 0.1\): {reason}", line)
    assert found, line
    status = Path(f"/proc/{found[1]}/stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z", "the other rank lives on"


@pytest.mark.parametrize("minutes", [0, -1])
def test_a_wrong_timeout_is_named(minutes):
    with pytest.raises(UserError, match=f"^hang.timeout_minutes must be above 0, or null for never, got {minutes}$"):
        StopOnHang(minutes)
