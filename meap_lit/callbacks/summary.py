"""Keep metrics and cost of a run on disk, and print its result."""

import dataclasses
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch

from meap_lit.callbacks.budget import Budget
from meap_lit.callbacks.loggers import services
from meap_lit.callbacks.metrics import MetricsTable
from meap_lit.callbacks.mixture import Mixture
from meap_lit.callbacks.next_steps import next_steps
from meap_lit.callbacks.retrieval import RetrievalProbe
from meap_lit.callbacks.throughput import Throughput
from meap_lit.provenance import device_name, git_commit, versions
from meap_lit.secrets import hide_in_text, hide_in_words

C = TypeVar("C", bound=L.Callback)

SUMMARY_FILE = "summary.json"


class RunSummary(L.Callback):
    """Keep what a run logs in `curves.csv` and its cost in `summary.json`; print the result and what to do next."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = time.monotonic()
        self._first_step: int | None = None  # trainer.max_time may end a run before its first step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first_step = trainer.global_step
        log_dir = trainer.log_dir  # on every rank, since Lightning broadcasts it
        if trainer.is_global_zero and trainer.loggers and log_dir:
            trainer.loggers.append(MetricsTable(Path(log_dir), self._first_step))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        log_dir = trainer.log_dir
        if trainer.is_global_zero:
            if trainer.loggers and log_dir and self._first_step is not None:
                cost = measure(trainer, time.monotonic() - self._began, self._first_step)
                Path(log_dir, SUMMARY_FILE).write_text(json.dumps(cost, indent=1) + "\n", encoding="utf-8")
            print("\n" + "\n".join(summarize(trainer, log_dir)), file=sys.stdout)


def measure(trainer: L.Trainer, seconds: float, first_step: int) -> dict[str, Any]:
    """Return the cost of a run, its hardware and its versions; for a resumed run, those of the part since then.

    Args:
        trainer: The Trainer at the end of the run.
        seconds: Wall time of training with validations, probes and checkpoints.
        first_step: Optimizer step at which this part started.
    """
    data, device = trainer.datamodule, trainer.strategy.root_device
    throughput = _callback(trainer, Throughput)
    memory = trainer.callback_metrics.get("memory/gigabytes")
    return {
        "seconds": round(seconds, 3),
        "first_step": first_step,
        "last_step": trainer.global_step,
        "max_steps": trainer.max_steps,
        "tokens": (trainer.global_step - first_step) * data.tokens_per_step,
        "tokens_per_second": throughput.tokens_per_second(data.tokens_per_step) if throughput is not None else None,
        "peak_memory_bytes": None if memory is None else round(float(memory) * 1e9),
        "device": device_name(device),
        "devices": trainer.world_size,
        "nodes": trainer.num_nodes,
        "threads": torch.get_num_threads(),
        "cpu_cores": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "command": shlex.join(["python", "-m", "meap_lit", *hide_in_words(sys.argv[1:])]),
        "git_commit": git_commit(),
        # also in the checkpoints, which are large: a run can be reported without them
        "decoder": dataclasses.asdict(trainer.lightning_module.decoder.config),
        "datasets": data.state_dict()["datasets"],
    }


def summarize(trainer: L.Trainer, log_dir: str | None) -> list[str]:
    """Return the lines to print at the end of a run."""
    data = trainer.datamodule
    metrics = trainer.callback_metrics
    rows = [("optimizer steps", f"{trainer.global_step:,} ({data.samples_seen * data.seq_len:,} tokens)")]
    budget = _callback(trainer, Budget)
    if budget is not None and budget.left_out is not None:
        rows.append(("left out of the last epoch", budget.left_out))
    if "val/loss" in metrics:
        loss, perplexity = float(metrics["val/loss"]), float(metrics["val/perplexity"])
        rows.append(("clean validation loss", f"{loss:.4f} (perplexity {perplexity:.2f})"))
        losses = {name: metrics.get(f"val/loss/{name}") for name in data.names.values()}
        of_each = ", ".join(f"{name} {float(value):.4f}" for name, value in losses.items() if value is not None)
        if of_each:
            rows.append(("validation loss by dataset", of_each))
    probe = _callback(trainer, RetrievalProbe)
    if probe is not None and probe.accuracy is not None:
        rows.append(("retrieval accuracy", f"{probe.accuracy:.1%} (chance {1 / probe.num_options:.1%})"))
    mixture = _callback(trainer, Mixture)
    if mixture is not None and mixture.shares:
        total = sum(data.datasets.values())
        parts = zip(mixture.shares.items(), data.datasets.values(), strict=True)
        mix = ", ".join(f"{name} {share:.1%} (weight {weight / total:.1%})" for (name, share), weight in parts)
        rows.append(("tokens by dataset", mix))
    throughput = _callback(trainer, Throughput)
    rate = throughput.tokens_per_second(data.tokens_per_step) if throughput is not None else None
    if rate is not None:
        rows.append(("tokens per second", f"{rate:,.0f}"))
    run = log_dir if trainer.loggers else None  # without a logger no recipe is kept
    if run is not None:
        rows.append(("logs and resolved recipe", run))
    pages = ((type(service).__name__, service.address()) for service in services(trainer))
    rows += [(name, hide_in_text(page)) for name, page in pages if page]
    checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if checkpoint:
        rows.append(("checkpoint", checkpoint))
    if probe is not None and probe.figure_path is not None:
        rows.append(("retrieval figure", str(probe.figure_path)))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    commands = [f"  {line}" for line in next_steps(trainer, run, checkpoint, probe)]
    return [*lines, *(["", "Next:", *commands] if commands else [])]


def _callback(trainer: L.Trainer, kind: type[C]) -> C | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)
