"""`python -m meap_lit plan`: what a recipe needs of memory and time on given devices, before any is asked for.

The recipe is read as `fit` reads it, but nothing is trained, downloaded or written.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import Namespace

from meap_lit.callbacks import Budget
from meap_lit.checkpoint.source import open_source
from meap_lit.data.datamodule import StreamingData
from meap_lit.data.finetuning import FineTuningData
from meap_lit.data.store.manifest import MANIFEST_FILE
from meap_lit.errors import UserError
from meap_lit.hf.config import read_config
from meap_lit.hf.folder import CONFIG_FILE
from meap_lit.model.config import DecoderConfig, pad_vocab_size
from meap_lit.modules.base import DecoderModule
from meap_lit.planning.layout import Layout, layout_of, precision
from meap_lit.planning.memory import Memory, Step, memory_of, weights_of
from meap_lit.planning.savings import smallest_changes
from meap_lit.recipe.cli import RecipeCLI
from meap_lit.recipe.parser import Parser
from meap_lit.tokenizer.tokenizer import Tokenizer

USUAL_VOCAB_SIZE = 32_064
"""Llama 2's 32,000 tokens and the mask token, padded: the vocabulary of the paper's models."""

GB = 1e9
SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Hardware:
    """What is planned for.

    Args:
        devices: Devices of a node; trainer.devices if not given.
        nodes: Nodes; trainer.num_nodes if not given.
        device_memory: Memory of a device in GB (10^9 bytes).
        utilisation: Share of the peak that the model's own FLOPs reach (MFU); recomputation does not count into it.
        peak_teraflops: Dense peak of a device at the precision of its products; 989 is an H100's in bfloat16.
        decoder: What to plan with where model.init_from is not at hand: a config.json of Hugging Face, or a recipe
            (.yaml) of the same shape.
    """

    devices: int | None = None
    nodes: int | None = None
    device_memory: float = 80.0
    utilisation: float = 0.4
    peak_teraflops: float = 989.0
    decoder: str | None = None

    def __post_init__(self) -> None:
        for name in ("devices", "nodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}")
        for name in ("device_memory", "peak_teraflops"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name} must be above 0, got {getattr(self, name):g}")
        if not 0 < self.utilisation <= 1:
            raise UserError(f"--utilisation must be in (0, 1], got {self.utilisation:g}; write 0.4 for 40%")


class PlanCLI(RecipeCLI):
    """Reads a recipe as `fit` does, with the options of `Hardware` beside it, and prints the plan."""

    plan: "Plan"

    @classmethod
    def run(cls, arguments: list[str]) -> "PlanCLI":
        """Print the plan for the words after `plan`.

        Raises:
            UserError: As `read` does.
        """
        cli = cls.read(arguments)
        print(cli.plan.report())
        return cli

    @classmethod
    def read(cls, arguments: list[str]) -> "PlanCLI":
        """Parse the words after `plan`; hyphens serve in the options of `Hardware` too, as in `--device-memory`.

        Raises:
            UserError: If the recipe, an override or an option is wrong, or the devices cannot be divided as it asks.
        """
        spellings = {f"--{f.name.replace('_', '-')}": f"--{f.name}" for f in dataclasses.fields(Hardware)}
        words = (word.partition("=") for word in arguments)
        cli = super().run(["fit", *(spellings.get(name, name) + sign + value for name, sign, value in words)])
        assert isinstance(cli, PlanCLI)
        return cli

    def make_parser(self) -> Parser:
        parser = super().make_parser()
        parser.prog = "python -m meap_lit plan"
        parser.description = "Print what a recipe needs of memory and time on given devices; nothing is run."
        parser.usage = "python -m meap_lit plan --config RECIPE [--config OVERLAY ...] --devices N [--KEY VALUE ...]"
        parser.add_class_arguments(Hardware)
        return parser

    def build(self) -> None:
        """Build the recipe's model, data and budget, none of which reads anything yet; no Trainer."""
        recipe = self.config
        parts = self.parser.instantiate(Namespace(model=recipe.model, data=recipe.data, budget=recipe.budget))
        hardware = Hardware(**{f.name: recipe[f.name] for f in dataclasses.fields(Hardware)})
        self.plan = Plan.of(parts.model, parts.data, parts.budget, recipe.trainer, hardware)

    def start(self) -> None:
        """Run nothing."""


@dataclass(frozen=True)
class Plan:
    """A run on given devices.

    Args:
        step: What the memory depends on.
        memory: That of one device.
        rows_per_step: data.global_batch_size.
        num_steps: Optimizer steps; None if they depend on data that is not there.
        num_flops: FLOPs of the whole run; None likewise.
        hardware: What is planned for.
        notes: What had to be assumed.
    """

    step: Step
    memory: Memory
    rows_per_step: int
    num_steps: int | None
    num_flops: float | None
    hardware: Hardware
    notes: list[str]

    @classmethod
    def of(
        cls, module: DecoderModule, data: StreamingData, budget: Budget, trainer: Namespace, hardware: Hardware
    ) -> "Plan":
        """Plan for a recipe's parts.

        Raises:
            UserError: If the devices do not divide as the strategy or the batch asks, something is not known to the
                plan, or the model's configuration is not at hand.
        """
        layout = layout_of(trainer, hardware.devices, hardware.nodes)
        decoder, notes = decoder_config(module, data, hardware.decoder)
        step = Step(
            decoder=decoder,
            num_tokens=data.micro_batch_size * data.seq_len,
            seq_len=data.seq_len,
            accumulation=data.accumulation(layout.num_replicas),
            precision=precision(trainer.precision),
            activation_checkpointing=module.activation_checkpointing,
            lora=module.lora,
            packed=isinstance(data, FineTuningData),
            layout=layout,
            on_cpu=trainer.accelerator == "cpu",
        )
        prepared = all(Path(path, MANIFEST_FILE).is_file() for path in data.datasets)
        needs_data = budget.max_epochs is not None or step.packed
        if needs_data and prepared:
            data.setup("fit")
        elif step.packed:
            notes.append("the dataset is not prepared: attention is counted over whole rows")
        num_steps = budget.steps(data) if prepared or budget.max_epochs is None else None
        span = data.mean_span if prepared or not step.packed else data.seq_len
        per_token = decoder.flops_per_token(span, frozen=module.lora is not None)
        return cls(
            step=step,
            memory=memory_of(step),
            rows_per_step=data.global_batch_size,
            num_steps=num_steps,
            num_flops=None if num_steps is None else float(per_token) * num_steps * data.tokens_per_step,
            hardware=hardware,
            notes=notes,
        )

    @property
    def fits(self) -> bool:
        """Whether the peak is within the device's memory."""
        return self.memory.total <= self.hardware.device_memory * GB

    @property
    def days(self) -> float | None:
        """Days of training at the stated utilisation: FLOPs / (devices x peak x utilisation)."""
        if self.num_flops is None:
            return None
        rate = self.step.layout.num_devices * self.hardware.peak_teraflops * 1e12 * self.hardware.utilisation
        return self.num_flops / rate / SECONDS_PER_DAY

    def report(self) -> str:
        """The plan as text for a terminal."""
        lines = [*self._run_lines(), "", *self._memory_lines()]
        if not self.fits:
            lines += ["", *self._remedy_lines()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _run_lines(self) -> Iterator[str]:
        step, layout = self.step, self.step.layout
        weights = weights_of(dataclasses.replace(step, layout=Layout()))
        trained = sum(w.size for w in weights if w.trained)
        frozen = sum(w.size for w in weights) - trained
        yield f"model         {trained:,} parameters trained" + (f", {frozen:,} frozen" if frozen else "")
        yield f"devices       {layout.num_devices}, {layout}"
        tokens_per_step = self.rows_per_step * step.seq_len
        yield (
            f"step          {self.rows_per_step} rows x {step.seq_len:,} = {tokens_per_step:,} tokens: "
            f"{step.accumulation} x {step.num_tokens // step.seq_len} rows on each of {layout.num_replicas} "
            f"data-parallel devices"
        )
        if self.num_steps is None:
            yield "run           steps and time are known when the dataset is prepared (budget.max_epochs)"
            return
        yield (
            f"run           {self.num_steps:,} steps, {_short(self.num_steps * tokens_per_step)} tokens, "
            f"{self.num_flops:.3g} FLOPs"
        )
        assert self.days is not None
        yield (
            f"time          {_duration(self.days)} at {self.hardware.utilisation:.0%} of {layout.num_devices} x "
            f"{self.hardware.peak_teraflops:g} TFLOP/s"
        )

    def _memory_lines(self) -> Iterator[str]:
        memory = self.memory
        checkpointing = self.step.activation_checkpointing
        yield "memory of one device, GB"
        for name, size in (
            ("parameters", memory.parameters),
            ("gradients", memory.gradients),
            ("optimizer states", memory.optimizer),
            ("DDP's buckets", memory.buckets),
            ("gathered weights", memory.gathered),
            ("weights as autocast casts them", memory.copies),
            (f"activations kept (activation_checkpointing {checkpointing})", memory.activations),
        ):
            if size:
                yield _row(name, size)
        at_loss = memory.loss >= memory.backward
        yield _row("loss in pieces" if at_loss else "backward of a block", max(memory.loss, memory.backward))
        room = self.hardware.device_memory
        yield _row("total", memory.total) + f" of {room:g}: {'fits' if self.fits else 'does not fit'}"
        if memory.host:
            yield _row("and in the host's memory, for each device", memory.host)

    def _remedy_lines(self) -> Iterator[str]:
        remedies = smallest_changes(self.step, int(self.hardware.device_memory * GB))
        if not remedies:
            yield "nothing that the plan knows makes it fit; it takes more devices, larger ones or a smaller model"
            return
        yield "fits with"
        for options, memory in remedies:
            host = f", and {memory.host / GB:.2f} GB of the host's memory for each device" if memory.host else ""
            yield f"  {' '.join(options)}: {memory.total / GB:.2f} GB{host}"


def _row(name: str, size: int) -> str:
    return f"  {name:<52}{size / GB:>9.2f}"


def _short(count: int) -> str:
    return f"{count / 1e9:.4g}B" if count >= 1e9 else f"{count / 1e6:.4g}M"


def _duration(days: float) -> str:
    name, length = next(((n, s) for n, s in (("days", 1), ("hours", 24)) if days * s >= 1), ("minutes", 24 * 60))
    return f"{days * length:.3g} {name}"


# ------------------------------------------------------------------------------------------------ what a recipe says


def decoder_config(module: DecoderModule, data: StreamingData, stand_in: str | None) -> tuple[DecoderConfig, list[str]]:
    """The model to plan for, its vocabulary known, and what had to be assumed.

    Args:
        module: Its `initial_config`, or the configuration under its `init_from`.
        data: Its tokenizer decides the vocabulary, if it is there.
        stand_in: A config.json or a recipe that is read instead.

    Raises:
        UserError: If a file is missing or wrong, or the tokenizer does not fit the model.
    """
    has_tokenizer = Path(data.tokenizer_folder).expanduser().is_dir()  # else preparation makes it
    num_tokens = Tokenizer.load(data.tokenizer_folder).vocab_size if has_tokenizer else None
    config = _stated_config(module, stand_in)
    if module.context is not None:
        config = module.context.of(config)
    rows, fresh = config.vocab_size, module.init_from is None and stand_in is None
    if num_tokens is not None:
        if rows is None or (num_tokens > rows and not fresh):
            rows = pad_vocab_size(num_tokens)  # a checkpoint's vocabulary grows
        elif num_tokens > rows:
            raise UserError(f"decoder.vocab_size {rows} is smaller than the tokenizer's {num_tokens} tokens")
        return dataclasses.replace(config, vocab_size=rows), []
    missing = f"tokenizer {data.tokenizer_folder} is not there: a vocabulary of"
    if rows is None:
        return dataclasses.replace(config, vocab_size=USUAL_VOCAB_SIZE), [f"{missing} {USUAL_VOCAB_SIZE:,} is assumed"]
    return config, [] if fresh else [f"{missing} {rows:,} is taken from the model, which may grow by a mask token"]


def _stated_config(module: DecoderModule, stand_in: str | None) -> DecoderConfig:
    if stand_in is not None:
        if not Path(stand_in).is_file():
            raise UserError(f"{stand_in} (--decoder) does not exist")
        if Path(stand_in).suffix in (".yaml", ".yml"):
            return PlanCLI.read(["--config", stand_in, "--devices", "1"]).plan.step.decoder
        return _read_config_file(Path(stand_in))
    if module.initial_config is not None:
        return module.initial_config
    folder = Path(module.init_from or "").expanduser()
    if (folder / CONFIG_FILE).is_file():
        return _read_config_file(folder / CONFIG_FILE)
    if not folder.exists():
        raise UserError(
            f"model.init_from {folder} does not exist; name its {CONFIG_FILE}, or a recipe of its shape, with "
            f"--decoder FILE"
        )
    return open_source(folder, verify=False).config


def _read_config_file(file: Path) -> DecoderConfig:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return read_config(content, str(file))[0]
