"""Measure what the Trainer costs: a training step of `fit`, compared with the bare loop of `benchmarks.step`.

A step of `fit` has all that a run has: the Trainer, every callback, the data pipeline, TensorBoard. The bare loop has
one batch on the device and trains a second model on it, of the same shapes, precision and batch size: mask, forward,
loss, backward, clip, AdamW. The two take turns in one process, the bare loop between two steps of the Trainer. Data are
made up, and prepared by the command itself in a temporary folder.

    python -m benchmarks.trainer                                                     # the quickstart's shapes, CPU
    python -m benchmarks.trainer --model toy                                         # almost nothing but the Trainer
    python -m benchmarks.trainer --model 0.1b --device cuda --precision bf16 --micro_batch_size 4
"""

import contextlib
import dataclasses
import io
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import lightning as L
import torch
import yaml
from lightning.pytorch.profilers import PassThroughProfiler

from benchmarks.page import check_device, main, page, publish
from benchmarks.step import TrainingStep, known_decoder, sized
from meap_lit.errors import UserError
from meap_lit.model import DecoderConfig
from meap_lit.recipe.cli import RecipeCLI

Model = Literal["toy", "small", "quickstart", "10m", "0.1b", "0.3b", "0.5b", "1.1b"]
LOG_EVERY_N_STEPS = 10
VOCAB_SIZE = 448
"""Of the tokenizer; a model may have more rows."""
MASK_RATIO = 0.15
FETCH = "[_TrainingEpochLoop].train_dataloader_next"
"""Lightning's name for the time in which its loop waits for a batch."""


def benchmark(
    model: Model = "quickstart",
    seq_len: int | None = None,
    micro_batch_size: int = 32,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: Literal["cpu", "cuda"] = "cpu",
    compile: bool = False,
    num_workers: int | None = None,
    turns: int = 20,
    steps: int = 20,
    output: Path | None = None,
) -> None:
    """Print how long a step takes in `fit` and without it, and how long `fit` waits for its batches.

    Args:
        model: `toy` computes almost nothing; the others are those of `benchmarks.step`.
        seq_len: Tokens in a row; the model's max_seq_len if not given.
        micro_batch_size: Rows in a step; there is no accumulation, so that the Trainer is in every one of them.
        precision: As for `benchmarks.step`.
        device: Where to run.
        compile: Compile the blocks of both.
        num_workers: Processes that read ahead in `fit`; 0 on a CPU and 2 with a GPU if not given.
        turns: Times that each is measured.
        steps: Steps in a turn, as often logged as in any run: a multiple of 10.
        output: Markdown file to write the result to as well.
    """
    if turns < 2 or micro_batch_size < 1:
        raise UserError("--turns must be at least 2, --micro_batch_size at least 1")
    if steps < 1 or steps % LOG_EVERY_N_STEPS:
        raise UserError(f"--steps must be a multiple of {LOG_EVERY_N_STEPS}, after which `fit` logs; got {steps}")
    check_device(device)
    config = sized(toy_decoder() if model == "toy" else known_decoder(model), seq_len)
    num_workers = (0 if device == "cpu" else 2) if num_workers is None else num_workers
    bare = TrainingStep(config, micro_batch_size, precision, torch.device(device), compile)
    measured = Turns(bare, steps)
    with TemporaryDirectory() as folder:
        recipe = _recipe(Path(folder), bare, micro_batch_size, compile, num_workers)
        # one step more, at whose start the last turn ends; the first turn only warms up
        fit(recipe | {"budget": {"max_steps": (turns + 1) * steps + 1}}, Path(folder), measured)
    facts = [
        f"load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        f"{config.num_parameters():,} parameters, {micro_batch_size} rows of {config.max_seq_len:,} tokens a step, "
        f"{num_workers} processes that read ahead; {turns} turns of {steps} steps of each kind",
    ]
    title = f"Step of `fit` beside the bare loop: {model}, {device}, {precision}"
    publish(page("trainer", title, device, facts=facts, body=table(measured.turns[1:])), output)


def toy_decoder() -> DecoderConfig:
    """A model that computes almost nothing."""
    return DecoderConfig(
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        hidden_size=8,
        intermediate_size=8,
        vocab_size=VOCAB_SIZE,
        max_seq_len=16,
    )


@dataclass(frozen=True)
class Turn:
    """Mean seconds of a step in one turn.

    Args:
        bare: In the bare loop.
        fit: In the Trainer, from the start of one step to the start of the next.
        fetch: That part of `fit` in which the loop waits for the next batch.
    """

    bare: float
    fit: float
    fetch: float


def table(turns: list[Turn]) -> list[str]:
    """The result, from at least two turns."""
    costs = [turn.fit - turn.bare for turn in turns]
    low, middle, high = _quartiles(costs)
    share = statistics.median(cost / turn.bare for cost, turn in zip(costs, turns, strict=True))
    waiting = sum(turn.fetch for turn in turns) / sum(turn.fit for turn in turns)
    rows = {
        "bare loop": [turn.bare for turn in turns],
        "`fit`": [turn.fit for turn in turns],
        "`fit`, waiting for the next batch": [turn.fetch for turn in turns],
    }
    return [
        "| step | median, ms | middle half, ms |",
        "| --- | --- | --- |",
        *(f"| {name} | {_milliseconds(*_quartiles(seconds))} |" for name, seconds in rows.items()),
        f"| difference, turn by turn | {_milliseconds(low, middle, high)} |",
        "",
        f"- the Trainer, its callbacks and the data cost {middle * 1e3:.2f} ms a step, {share:.2%} of the bare loop's",
        f"- {waiting:.2%} of the time of `fit` goes by in waiting for the next batch",
    ]


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def _milliseconds(low: float, middle: float, high: float) -> str:
    return f"{middle * 1e3:.2f} | {low * 1e3:.2f} to {high * 1e3:.2f}"


class Turns(L.Callback):
    """Stops the Trainer every few steps for as many of the bare loop, and the time of both.

    Args:
        bare: The bare loop's step.
        steps: Steps in a turn.
    """

    def __init__(self, bare: TrainingStep, steps: int) -> None:
        self.bare = bare
        self.steps = steps
        self.turns: list[Turn] = []
        self._fetching = FetchClock()
        self._start: float | None = None
        self._bare_seconds = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.profiler = self._fetching

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self.steps:
            return
        if self.bare.device.type == "cuda":
            torch.cuda.synchronize()
        if self._start is not None:
            spent = (self._bare_seconds, time.perf_counter() - self._start, self._fetching.seconds)
            self.turns.append(Turn(*(seconds / self.steps for seconds in spent)))
        self._bare_seconds = self.bare.seconds(self.bare, MASK_RATIO, times=self.steps)
        self._fetching.seconds = 0.0
        self._start = time.perf_counter()


class FetchClock(PassThroughProfiler):
    """Seconds that the Trainer's loop waits for batches."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def start(self, action_name: str) -> None:
        if action_name == FETCH:
            self._start = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name == FETCH:
            self.seconds += time.perf_counter() - self._start


def fit(recipe: dict[str, Any], folder: Path, callback: L.Callback) -> L.Trainer:
    """Run `fit` on a recipe as the command does, with one callback more; what it prints is kept from the reader."""

    class CLI(RecipeCLI):
        def make_trainer(self, options: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
            return super().make_trainer(options, [*callbacks, callback])

    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return CLI.run(["fit", "--config", str(file)]).trainer


def _recipe(folder: Path, bare: TrainingStep, micro_batch_size: int, compile: bool, num_workers: int) -> dict[str, Any]:
    """A run on the bare loop's shapes, budget aside, with the steps that prepare its data."""
    corpus, tokenizer, dataset = (str(folder / name) for name in ("corpus", "tokenizer", "dataset"))
    preparation = {
        "meap_lit.data.corpora.facts.FactCorpus": {"output": corpus, "num_documents": 4000},
        "meap_lit.data.prepare.tokenizer.TrainTokenizer": {
            "input": [corpus],
            "vocab_size": VOCAB_SIZE,
            "output": tokenizer,
        },
        "meap_lit.data.prepare.text.PrepareText": {
            "input": [corpus],
            "tokenizer": tokenizer,
            "output": dataset,
            "val_share": 0.0,
        },
    }
    return {
        "model": _object(
            "meap_lit.modules.MEAPPretraining",
            decoder=dataclasses.asdict(bare.config),
            mask_ratio=MASK_RATIO,
            optimizer={"lr": 1e-4, "final_lr": 1e-5},
            compile=compile,
        ),
        "data": _object(
            "meap_lit.data.pretraining.PretrainingData",
            datasets=dataset,
            tokenizer=tokenizer,
            seq_len=bare.config.max_seq_len,
            global_batch_size=micro_batch_size,
            micro_batch_size=micro_batch_size,
            num_workers=num_workers,
            preparation=[_object(kind, **arguments) for kind, arguments in preparation.items()],
        ),
        "trainer": {
            "accelerator": "cpu" if bare.device.type == "cpu" else "gpu",
            "devices": 1,
            "precision": "32-true" if bare.precision == "fp32" else "bf16-mixed",
            "gradient_clip_val": 1.0,
            "log_every_n_steps": LOG_EVERY_N_STEPS,
            "logger": _object("lightning.pytorch.loggers.TensorBoardLogger", save_dir=str(folder), name="runs"),
        },
    }


def _object(class_path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": arguments}


if __name__ == "__main__":
    main(benchmark)
