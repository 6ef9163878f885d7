"""Whole runs: resumed to the bit, on one device and as a group of one, and on a GPU as on a CPU."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from meap_lit.recipe.cli import RecipeCLI
from tests.support.checkpoints import read
from tests.support.devices import on_devices, on_gpu
from tests.support.toy_module import fork

ACCELERATORS = {"cpu": "cpu", "cuda": "gpu"}


@pytest.fixture(autouse=True)
def _undo_deterministic() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def weights(run):
    return read(run / "checkpoints" / "last.ckpt")["state_dict"]


@pytest.mark.parametrize(
    ("device", "overlay"),
    [("cpu", "fsdp"), *(pytest.param("cuda", overlay, marks=on_gpu) for overlay in ("single", "fsdp", "offload"))],
)
def test_a_resumed_run_ends_with_the_same_bits(toy_recipe, tmp_path, device, overlay):
    """With `fsdp` this saves and reads shards, over NCCL on a GPU."""
    options = ["--trainer.strategy.cpu_offload", "true"] if overlay == "offload" else []
    overlay = "fsdp" if overlay == "offload" else overlay
    words = ["fit", "--config", str(toy_recipe), "--config", f"recipes/strategy/{overlay}.yaml", *options]
    words += ["--trainer.accelerator", ACCELERATORS[device], "--trainer.devices", "1", "--model.compile", "false"]
    words += ["--trainer.deterministic", "true", "--trainer.precision", "bf16-mixed"]
    words += ["--budget.max_steps", "4", "--checkpoint.every_n_steps", "2", "--budget.val_every_n_steps", "4"]
    runs = tmp_path / "runs" / "toy"
    for start in ([], ["--ckpt_path", str(runs / "version_0" / "checkpoints" / "step=2.ckpt")]):
        run = partial(RecipeCLI.run, [*words, *start])
        if device == "cuda":  # which a forked process cannot use
            run()
        else:
            assert fork(run) == [0]  # apart: the threads of a process group end with its process
    whole, resumed = weights(runs / "version_0"), weights(runs / "version_1")
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


@on_devices
def test_fine_tuning_takes_the_losses_of_a_cpu(toy_sft_recipe, tmp_path, device):
    """The same weights, rows and masks in float32; packed rows go document by document then."""
    losses = []
    for number, accelerator in enumerate(("cpu", ACCELERATORS[device])):
        words = ["--trainer.accelerator", accelerator, "--budget.max_steps", "2", "--model.compile", "false"]
        RecipeCLI.run(["fit", "--config", str(toy_sft_recipe), *words])
        events = EventAccumulator(str(tmp_path / "runs" / "toy" / f"version_{number}"))
        events.Reload()
        losses.append([event.value for event in events.Scalars("train/loss")])
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
