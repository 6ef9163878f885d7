"""The lines that a run ends with."""

import math
import sys
from typing import TypeVar

import lightning as L

from meap_lit.callbacks.mixture import Mixture
from meap_lit.callbacks.retrieval import RetrievalProbe
from meap_lit.callbacks.throughput import Throughput

C = TypeVar("C", bound=L.Callback)


class RunSummary(L.Callback):
    """Prints what a finished run reached, where it lies, and what to do next."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        log_dir = trainer.log_dir  # asked of every rank, since Lightning broadcasts it
        if trainer.is_global_zero:
            print("\n" + "\n".join(summarise(trainer, log_dir)), file=sys.stdout)


def summarise(trainer: L.Trainer, log_dir: str | None) -> list[str]:
    """The closing lines of a run."""
    data = trainer.datamodule
    metrics = trainer.callback_metrics
    rows = [("optimizer steps", f"{trainer.global_step:,} ({data.samples_seen * data.seq_len:,} tokens)")]
    if "val/loss" in metrics:
        loss = float(metrics["val/loss"])
        rows.append(("clean validation loss", f"{loss:.4f} (perplexity {math.exp(loss):.2f})"))
    probe = _callback(trainer, RetrievalProbe)
    if probe is not None and probe.accuracy is not None:
        rows.append(("retrieval accuracy", f"{probe.accuracy.mean():.1%} (chance {probe.grid.chance:.1%})"))
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
    rows.append(("logs and resolved recipe", str(log_dir)))
    checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if checkpoint:
        rows.append(("checkpoint", checkpoint))
    if probe is not None and probe.figure_path is not None:
        rows.append(("retrieval figure", str(probe.figure_path)))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    recipe = f"{log_dir}/config.yaml"
    lines += ["", "Next:"]
    lines += [f"  tensorboard --logdir {trainer.logger.save_dir}"] if trainer.logger else []
    if checkpoint:
        lines += [f"  python -m meap_lit validate --config {recipe} --ckpt_path {checkpoint}"]
        lines += [f"  python -m meap_lit export --checkpoint {checkpoint} --output DIR   # for transformers"]
    plain = trainer.lightning_module.plain_override
    lines += [f"  python -m meap_lit fit --config {recipe} {plain}   # the same without masking"] if plain else []
    return lines


def _callback(trainer: L.Trainer, kind: type[C]) -> C | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)
