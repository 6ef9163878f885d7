"""Measure what sharding saves: the memory of each process of a real run, for each layout of the model.

Every layout is a run of `python -m meap_lit fit` with an overlay of recipes/strategy, in processes of this machine that
talk over gloo. After the last optimizer step each process adds up the parts that it holds of parameters, gradients and
optimizer states, and reads how far its memory has grown since before the model was built. The table compares that with
`python -m meap_lit plan` for the same words.

    python -m benchmarks.sharding                                                    # Linux, two minutes
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import lightning as L
import yaml
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.fresh import memory
from benchmarks.page import main, page, publish
from meap_lit.data.prepare.text import PrepareText
from meap_lit.data.prepare.tokenizer import TrainTokenizer
from meap_lit.errors import UserError
from meap_lit.model import DecoderConfig
from meap_lit.planning.command import PlanCLI
from meap_lit.planning.memory import Memory

ROOT = Path(__file__).parents[1]
TIMEOUT_SECONDS = 600

SMALL = DecoderConfig(
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    hidden_size=512,
    intermediate_size=1408,
    vocab_size=4096,
    max_seq_len=256,
)


@dataclass(frozen=True)
class Way:
    """One way to lay a model over processes.

    Args:
        name: For the table.
        overlay: A file of recipes/strategy.
        num_processes: Processes of the run.
        options: Further words for the command line.
    """

    name: str
    overlay: str
    num_processes: int
    options: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """Words after a recipe on the command line, for `fit` and for `plan`."""
        overlay = ROOT / "recipes" / "strategy" / f"{self.overlay}.yaml"
        return ["--config", str(overlay), "--trainer.devices", str(self.num_processes), *self.options]


WAYS = (
    Way("single", "single", 1),
    Way("DDP", "ddp", 2),
    Way("FSDP", "fsdp", 2),
    Way("FSDP", "fsdp", 4),
    Way("HSDP, 2 copies of 2 shards", "hsdp", 4, ("--trainer.strategy.shard_size", "2")),
    Way("tensor parallel 2", "fsdp_tp", 2),
    Way("tensor parallel 2 x FSDP 2", "fsdp_tp", 4),
)


def benchmark(
    decoder: DecoderConfig = SMALL,
    micro_batch_size: int = 1,
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "32-true",
    steps: int = 3,
    output: Path | None = None,
) -> None:
    """Print the memory of each process, for every layout.

    Args:
        decoder: The model; rows are as long as its max_seq_len.
        micro_batch_size: Rows in one pass of one process; a step is one pass of four.
        precision: trainer.precision.
        steps: Optimizer steps before the count; the peak needs two.
        output: Markdown file to write the result to as well.
    """
    memory("VmHWM")  # fails at once where the processes could not read it
    if decoder.vocab_size is None or decoder.vocab_size < 320:
        raise UserError(f"--decoder.vocab_size must be at least 320, got {decoder.vocab_size}")
    if steps < 2 or micro_batch_size < 1:
        raise UserError("--steps must be at least 2 and --micro_batch_size at least 1")
    with TemporaryDirectory() as folder:
        recipe = write_recipe(Path(folder), decoder, micro_batch_size, precision, steps)
        held = {way: run(way, recipe, Path(folder, str(number))) for number, way in enumerate(WAYS)}
        planned = {way: plan(way, recipe) for way in WAYS}

    facts = [
        f"model: {decoder.num_parameters():,} parameters ({decoder.num_layers} layers, "
        f"{decoder.num_heads} heads, {decoder.hidden_size} wide, {decoder.intermediate_size} MLP, "
        f"vocabulary {decoder.vocab_size:,})",
        f"{precision}; micro-batches of {micro_batch_size} x {decoder.max_seq_len:,} tokens, four in a step; "
        f"one thread a process",
    ]
    publish(page("sharding", "Memory of a process by sharding", "cpu", facts=facts, body=table(held, planned)), output)


# --------------------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Held:
    """Bytes of one process: its parts after an optimizer step, and the growth of its memory at the peak."""

    parameters: int
    gradients: int
    optimizer: int
    peak: int

    @property
    def states(self) -> int:
        """What is there from step to step."""
        return self.parameters + self.gradients + self.optimizer


class CountMemory(L.Callback):
    """Write what its process holds after the last optimizer step, as `Held`, to `folder`/RANK.json.

    Args:
        folder: It exists.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._before = memory("VmRSS")  # there is no model yet

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step < trainer.max_steps:
            return
        peak = memory("VmHWM") - self._before
        parameters = list(pl_module.parameters())
        states = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        held = Held(
            parameters=local_bytes(parameters),
            gradients=local_bytes(p.grad for p in parameters if p.grad is not None),
            optimizer=local_bytes(value for value in states if isinstance(value, Tensor)),
            peak=peak,
        )
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(asdict(held)))


def local_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the parts of tensors that this process holds."""
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def write_recipe(folder: Path, decoder: DecoderConfig, micro_batch_size: int, precision: str, steps: int) -> Path:
    """Write a recipe, and a text without meaning as its data."""
    text, tokenizer, dataset, recipe = (folder / name for name in ("text.txt", "tokenizer", "dataset", "recipe.yaml"))
    text.write_text("A text of no meaning.\n" * 5000)
    tokenizer.mkdir()
    TrainTokenizer(input=[str(text)], vocab_size=300, output=str(tokenizer)).make(tokenizer)
    dataset.mkdir()
    prepare = PrepareText(
        input=[str(text)], tokenizer=str(tokenizer), output=str(dataset), val_share=0.0, num_workers=1
    )
    prepare.make(dataset)
    data = {
        "datasets": str(dataset),
        "tokenizer": str(tokenizer),
        "seq_len": decoder.max_seq_len,
        "global_batch_size": 4 * micro_batch_size,
        "micro_batch_size": micro_batch_size,
        "num_workers": 0,
    }
    trainer = {
        "accelerator": "cpu",
        "precision": precision,
        "logger": False,
        "default_root_dir": str(folder),  # the resolved recipe goes there
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    }
    content = {
        "base": str(ROOT / "recipes" / "pretrain" / "base.yaml"),
        "model": {"init_args": {"decoder": {k: v for k, v in asdict(decoder).items() if v is not None}}},
        "data": {"init_args": data},
        "budget": {"max_tokens": None, "max_steps": steps},
        "probe": {"lengths": []},
        "trainer": trainer,
    }
    recipe.write_text(yaml.safe_dump(content))
    return recipe


def run(way: Way, recipe: Path, folder: Path) -> list[Held]:
    """Train with one layout, and return what each process held."""
    folder.mkdir()
    command = [sys.executable, "-m", "meap_lit", "fit", "--config", str(recipe), *way.words]
    command += ["--trainer.callbacks", "benchmarks.sharding.CountMemory", "--trainer.callbacks.folder", str(folder)]
    # by default glibc keeps freed tensors of up to 32 MiB in its heap, which the step does not need
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    # a process that waits for one that died would wait for half an hour
    result = subprocess.run(
        command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
    )
    if result.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{result.stderr}")
    return [Held(**json.loads((folder / f"{rank}.json").read_text())) for rank in range(way.num_processes)]


def plan(way: Way, recipe: Path) -> Memory:
    """Return the plan for one layout."""
    return PlanCLI.read(["--config", str(recipe), *way.words]).plan.memory


# -------------------------------------------------------------------------------------------------- the table


def table(held: dict[Way, list[Held]], planned: dict[Way, Memory]) -> list[str]:
    """Return a row for each layout: its fullest process and the plan, in MB, and shares of the first layout."""
    whole = max(one.states for one in next(iter(held.values())))
    lines = [
        "| layout | processes | parameters, MB | gradients, MB | optimizer states, MB | all three, MB | of the first "
        "| by plan, MB | peak growth, MB | by plan, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for way, processes in held.items():
        fullest, memory = max(processes, key=lambda one: one.states), planned[way]
        parts = (fullest.parameters, fullest.gradients, fullest.optimizer, fullest.states)
        by_plan = memory.parameters + memory.gradients + memory.optimizer
        cells = [way.name, str(way.num_processes), *map(_mb, parts), f"{fullest.states / whole:.4f}", _mb(by_plan)]
        cells += [_mb(max(one.peak for one in processes), 0), _mb(memory.total, 0)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _mb(size: int, digits: int = 2) -> str:
    return f"{size / 1e6:.{digits}f}"


if __name__ == "__main__":
    main(benchmark)
