"""The processes that read data: what they hand over, and what is said when one is gone or cannot start."""

import errno
import re
from unittest import mock

import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory
from torch.utils.tensorboard import SummaryWriter

from meap_lit.cli import main
from meap_lit.data.stream.loader import Arrays
from meap_lit.errors import UserError
from meap_lit.recipe.cli import RecipeCLI, _as_user_error
from tests.callbacks.test_stopping import fit


def batches(recipe, num_workers):
    # a run of one step, for a trainer that the data belongs to
    words = ["fit", "--config", str(recipe), "--budget.max_steps", "1", "--data.num_workers", str(num_workers)]
    loader = RecipeCLI.run(words).datamodule.train_dataloader()
    iterator = iter(loader)
    return [next(iterator) for _ in range(3)]


@pytest.mark.parametrize("recipe", ["toy_recipe", "toy_sft_recipe"])
def test_workers_hand_over_the_same_batches_without_shared_memory(recipe, request):
    """With a full /dev/shm PyTorch's way to hand over a tensor leaves the run waiting for good."""
    recipe = request.getfixturevalue(recipe)
    for alone, handed in zip(batches(recipe, 0), batches(recipe, 1), strict=True):
        assert alone.keys() == handed.keys()
        for name, value in alone.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, handed[name])
                assert value.dtype == handed[name].dtype
                assert not handed[name].is_shared()
                handed[name].fill_(0)  # it may be written to
            else:
                assert value == handed[name]


def test_a_killed_worker_is_named(toy_recipe):
    killed = ["--trainer.callbacks+=tests.support.interruption.KillWorkerAt", "--trainer.callbacks.batch", "6"]
    status, log = fit(toy_recipe, "--data.num_workers", "1", *killed)
    assert status == 2
    [line] = [line for line in log.splitlines() if line.startswith("error: ")]
    # torch learns of it by a signal or by looking
    assert re.match(
        r"error: a worker that reads data \(pid.*?\) (is killed by signal: Killed|exited unexpectedly): usually "
        r"because memory ran out; free some or lower data.num_workers \(0 reads within the training\), then resume",
        line,
    )
    assert "Traceback" not in log


def test_a_killed_worker_is_named_whatever_the_error_interrupts(toy_recipe, monkeypatch):
    """Torch raises it from a signal, here while a value is logged; Lightning's logger replaces it."""

    write = SummaryWriter.add_scalar

    def interrupted(self, tag, *args, **kwargs):
        if tag == "train/loss":
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        return write(self, tag, *args, **kwargs)

    monkeypatch.setattr(SummaryWriter, "add_scalar", interrupted)
    with pytest.raises(UserError, match=r"^a worker that reads data \(pid 7\) is killed by signal: Killed: usually"):
        RecipeCLI.run(["fit", "--config", str(toy_recipe)])


def test_workers_that_cannot_start(toy_recipe, monkeypatch, capsys):
    """They keep semaphores in /dev/shm; Lightning's teardown fails over the error, and hides it."""

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DataLoader, "__iter__", full)
    assert main(["fit", "--config", str(toy_recipe), "--data.num_workers", "2"]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "workers that read data (data.num_workers 2): No space left on device; free memory and /dev/shm" in line


def test_the_loss_of_another_rank_is_one_line():
    error = RuntimeError("[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:13988. This is")
    assert str(_as_user_error(error)) == (
        "another process of this run has ended (Connection closed by peer [10.0.0.2]); its own output has the reason"
    )


def test_a_batch_of_a_worker_is_pinned_for_a_gpu():
    """PyTorch's thread calls this method of a batch that is not a tensor."""
    batch = {"input_ids": torch.arange(6).view(2, 3), "num_labels": 5}
    with mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor + 1):
        pinned = pin_memory(Arrays.of(batch))
    assert torch.equal(pinned["input_ids"], batch["input_ids"] + 1)
    assert pinned["num_labels"] == 5
