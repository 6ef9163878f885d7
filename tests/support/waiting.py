"""What would make the host wait for a GPU, recorded in a run on a CPU, by the kind of optimizer step it happened in."""

import traceback
from collections import Counter

import lightning as L
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from meap_lit.recipe.cli import RecipeCLI

aten = torch.ops.aten
KERNELS = {
    aten._local_scalar_dense.default,  # .item(), bool(), int() and float()
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
    torch.ops.c10d.barrier.default,
}
"""Their result, or its shape, depends on values."""

INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
READING = {Tensor.cpu, Tensor.numpy, Tensor.tolist}
MAKING = {torch.tensor, torch.as_tensor}
"""With a device they copy from the host, and wait for the copy."""

UNLOGGED, LOGGED = "not logged", "logged"

kind = ""
found: list[tuple[str, str]] = []
"""The kind of step and what would have waited, with the place."""
steps: Counter[str] = Counter()


def waits_of(recipe, *options):
    """Run ten optimizer steps, of which 4, 8 and 10 are logged, the 8th with a validation and a checkpoint.

    Returns:
        What would have waited in a step that is not logged, and in one that is.
    """
    global kind
    kind = ""  # until the first step
    found.clear()
    steps.clear()
    command = ["fit", "--config", str(recipe), "--trainer.callbacks+", "tests.support.waiting.Steps"]
    command += ["--budget.max_steps", "10", "--budget.val_every_n_steps", "8", "--checkpoint.every_n_steps", "8"]
    command += ["--trainer.log_every_n_steps", "4", "--trainer.enable_progress_bar", "true"]
    try:
        with Kernels(), Calls():
            RecipeCLI.run([*command, "--trainer.gradient_clip_val", "1.0", *options])
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
    assert steps == {UNLOGGED: 7, LOGGED: 3}
    return tuple([what for step, what in found if step == wanted] for wanted in (UNLOGGED, LOGGED))


class Steps(L.Callback):
    """Says of which kind the step is; on a GPU torch itself refuses to wait in one that is not logged."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        global kind
        trainer.checkpoint_callback.on_train_batch_start(trainer)  # a checkpoint of the step before is written now
        number = trainer.global_step + 1
        kind = LOGGED if number % trainer.log_every_n_steps == 0 or number == trainer.max_steps else UNLOGGED
        steps[kind] += batch_idx % trainer.accumulate_grad_batches == 0
        if pl_module.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default" if kind == LOGGED else "error")


class Kernels(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        if func in KERNELS or by_mask:
            record(str(func))
        return func(*args, **kwargs or {})


class Calls(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_made = func in MAKING and kwargs.get("device") is not None
        is_read = func in READING or (func is Tensor.to and "cpu" in (*args[1:], *kwargs.values()))
        if is_made or is_read:
            record(func.__name__)
        return func(*args, **kwargs)


def record(what):
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_stack()[:-2]]
    if not any("/torch/utils/data/" in frame for frame in frames):  # what is read there has not left the host yet
        found.append((kind, "\n  ".join([what, *frames[:-12:-1]])))
