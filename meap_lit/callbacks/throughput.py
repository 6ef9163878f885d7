"""Log tokens per second, model FLOPs utilization, tokens seen and memory."""

import resource
import time
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops

from meap_lit.modules.log_steps import ends_step, host_number, is_logged


class Throughput(L.Callback):
    """Log the speed since the last logged step, without the time of validations.

    `throughput/mfu` is the FLOPs of the model (`DecoderConfig.flops_per_token`) over the peak of its devices; it is
    absent where the peak is unknown, as on a CPU. Lightning's `ThroughputMonitor` counts micro-batches instead of
    optimizer steps and logs nothing during the first hundred.
    """

    def __init__(self) -> None:
        self._train_seconds, self._train_steps = 0.0, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # of all devices, at the precision of the matrix products
        dtype = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
        self._peak_flops = trainer.world_size * (peak_flops(trainer.strategy.root_device, dtype) or 0.0)
        self._compiles = pl_module.is_compiled
        self._start_window(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps = trainer.global_step - self._step
        if not ends_step(trainer, batch_idx) or steps == 0:
            return
        compiled, self._compiles = self._compiles, False  # the first step includes compilation
        logged = is_logged(trainer, trainer.global_step)
        if not (compiled or logged):
            return
        data = trainer.datamodule
        seconds = time.perf_counter() - self._start - self._excluded
        self._start_window(trainer)
        metrics = {
            "throughput/tokens_seen": data.samples_seen * data.seq_len,
            "memory/gigabytes": _memory(trainer),
        }
        if not compiled:
            self._train_seconds += seconds
            self._train_steps += steps
            rate = steps * data.tokens_per_step / seconds
            flops = rate * pl_module.config.flops_per_token(data.mean_span, frozen=pl_module.lora is not None)
            metrics["throughput/tokens_per_second"] = rate
            metrics["throughput/model_teraflops_per_second"] = flops / 1e12
            if self._peak_flops:
                metrics["throughput/mfu"] = flops / self._peak_flops
        if logged:
            pl_module.log_dict({name: host_number(value) for name, value in metrics.items()})

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._excluded += time.perf_counter() - self._pause

    def tokens_per_second(self, tokens_per_step: int) -> float | None:
        """Return the mean rate of the run so far; None before the first step."""
        return self._train_steps * tokens_per_step / self._train_seconds if self._train_steps else None

    def _start_window(self, trainer: L.Trainer) -> None:
        self._start, self._step, self._excluded = time.perf_counter(), trainer.global_step, 0.0


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the dense peak of one device in FLOP/s; None if it is unknown, as on a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    if dtype is torch.bfloat16 and (peak := next((peak for key, peak in _PEAKS.items() if key in name), None)):
        return peak
    return get_available_flops(device, dtype)


_PEAKS = {"h200 nvl": 835.5e12, "h200": 989.4e12, "h100 nvl": 835.5e12}
"""Dense FLOP/s in bfloat16, from NVIDIA's datasheets: Lightning lacks H200, and has that of two for the H100 NVL."""


def _memory(trainer: L.Trainer) -> float:
    """Return the peak memory in GB: allocated on the GPU, or resident in this process."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
