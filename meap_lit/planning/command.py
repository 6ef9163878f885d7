"""`python -m meap_lit plan`: print the memory and time that a recipe needs on given devices.

The recipe is read as `fit` reads it, but nothing is trained or written, and of a Hub id only
configuration and tokenizer are downloaded.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import Namespace

from meap_lit.callbacks import Budget
from meap_lit.callbacks.budget import check_trainer
from meap_lit.checkpoint.source import open_source
from meap_lit.data.datamodule import StreamingData
from meap_lit.data.finetuning import FineTuningData
from meap_lit.data.store.manifest import MANIFEST_FILE
from meap_lit.errors import UserError, check_range
from meap_lit.files import read_json
from meap_lit.hf.config import read_config
from meap_lit.hf.folder import CONFIG_FILE
from meap_lit.hub import CONFIG_FILES, TOKENIZER_FILES, local_folder
from meap_lit.model.config import DecoderConfig, vocab_rows
from meap_lit.modules.base import DecoderModule, with_vocabulary
from meap_lit.planning.devices import Devices, devices_of, precision
from meap_lit.planning.memory import Memory, Step, memory_of, parameters_of
from meap_lit.planning.remedies import smallest_changes
from meap_lit.recipe.dry_run import DryRunCLI
from meap_lit.tokenizer.tokenizer import Tokenizer

USUAL_VOCAB_SIZE = 32_064
"""Llama 2's 32,000 tokens and the mask token, padded: the vocabulary of the paper's models."""

GB = 1e9
SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Hardware:
    """The devices to plan for.

    Args:
        device_memory: Memory of a device in GB (10^9 bytes).
        utilization: Share of the peak that the model's own FLOPs reach (MFU); recomputation does not count.
        peak_teraflops: Dense peak of a device at the precision of its products; 989 is an H100's in bfloat16.
        decoder: The model to plan for if model.init_from does not exist yet: a Hugging Face config.json, or a recipe
            (.yaml) of the same shape.
    """

    device_memory: float = 80.0
    utilization: float = 0.4
    peak_teraflops: float = 989.0
    decoder: str | None = None

    def __post_init__(self) -> None:
        for name in ("device_memory", "peak_teraflops"):
            check_range(f"--{name}", getattr(self, name), "(0, inf)")
        check_range("--utilization", self.utilization, "(0, 1]", "; write 0.4 for 40%")


class PlanCLI(DryRunCLI):
    """Read a recipe as `fit` does, with the options of `Hardware`, and plan for it."""

    name = "plan"
    description = "Print the memory and time that a recipe needs on given devices, without running it."
    example = "--devices N"
    options_class = Hardware
    plan: "Plan"

    def build(self) -> None:
        check_trainer(self.config.trainer.as_dict())
        super().build()
        parts = self.parts
        self.plan = Plan.of(parts.model, parts.data, parts.budget, self.config.trainer, self.options)


@dataclass(frozen=True)
class Plan:
    """Memory and time of a run on given devices.

    Args:
        step: What the memory depends on.
        memory: Memory of one device.
        rows_per_step: data.global_batch_size.
        num_steps: Optimizer steps; None if they depend on data that is not prepared yet.
        num_flops: FLOPs of the whole run; None if the steps are unknown.
        hardware: The devices.
        notes: Assumptions of the plan.
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
            UserError: If the devices do not divide as strategy and batch require, `plan` does not know the strategy or
                the precision, or the model's configuration does not exist.
        """
        devices = devices_of(trainer)
        decoder, notes = decoder_config(module, data, hardware.decoder)
        step = Step(
            decoder=decoder,
            num_tokens=data.micro_batch_size * data.seq_len,
            seq_len=data.seq_len,
            accumulation=data.accumulation(devices.num_replicas),
            precision=precision(trainer.precision),
            activation_checkpointing=module.activation_checkpointing,
            lora=module.lora,
            packed=isinstance(data, FineTuningData),
            devices=devices,
        )
        # one in a bucket is there, or `setup` says that it is not
        prepared = all("://" in path or Path(path, MANIFEST_FILE).is_file() for path in data.datasets)
        needs_data = budget.max_epochs is not None or step.packed
        if needs_data and prepared:
            data.setup("fit")
        elif step.packed:
            notes.append("the dataset is not prepared: attention is counted over whole rows")
        longest = data.longest_input if prepared or not step.packed else 0
        if longest > decoder.max_seq_len:
            raise UserError(
                f"the longest input of the data, {longest} tokens (data.seq_len {data.seq_len}), is longer than the "
                f"model's context, {decoder.max_seq_len} tokens; shorten the one or raise the other"
            )
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
        """Return whether the peak is within the device's memory."""
        return self.memory.total <= self.hardware.device_memory * GB

    @property
    def days(self) -> float | None:
        """Return the days of training at the stated utilization: FLOPs / (devices x peak x utilization)."""
        if self.num_flops is None:
            return None
        rate = self.step.devices.number * self.hardware.peak_teraflops * 1e12 * self.hardware.utilization
        return self.num_flops / rate / SECONDS_PER_DAY

    def text(self) -> str:
        """Return the plan as text for a terminal."""
        lines = [*self._run_lines(), "", *self._memory_lines()]
        if not self.fits:
            lines += ["", *self._remedy_lines()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _run_lines(self) -> Iterator[str]:
        step, devices = self.step, self.step.devices
        whole = parameters_of(dataclasses.replace(step, devices=Devices())).values()
        trained, frozen = (
            sum(p.numel() for p in whole if p.requires_grad == is_trained) for is_trained in (True, False)
        )
        yield f"model         {trained:,} parameters trained" + (f", {frozen:,} frozen" if frozen else "")
        yield f"devices       {devices.number}, {devices}"
        tokens_per_step = self.rows_per_step * step.seq_len
        yield (
            f"step          {self.rows_per_step} rows x {step.seq_len:,} = {tokens_per_step:,} tokens: "
            f"{step.accumulation} x {step.num_tokens // step.seq_len} rows on each of {devices.num_replicas} "
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
            f"time          {_duration(self.days)} at {self.hardware.utilization:.0%} of {devices.number} x "
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
            ("gradients of all shards" if self.step.devices.fsdp else "DDP's buckets", memory.buckets),
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
            yield "no change that plan knows makes it fit; use more devices, larger devices or a smaller model"
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


# ------------------------------------------------------------------------------------------------- the model


def decoder_config(module: DecoderModule, data: StreamingData, stand_in: str | None) -> tuple[DecoderConfig, list[str]]:
    """Return the model to plan for, with its vocabulary, and the assumptions made.

    Args:
        module: States the model, in `initial_config` or under `init_from`.
        data: Names the tokenizer, which decides the vocabulary if it exists.
        stand_in: A config.json or a recipe to read instead.

    Raises:
        UserError: If a file is missing or wrong, or the tokenizer does not fit the model.
    """
    config = _stated_config(module, stand_in)
    if module.context is not None:
        config = module.context.of(config)
    is_new = module.init_from is None and stand_in is None
    tokenizer = _tokenizer_of(data)
    if tokenizer is not None:
        if is_new:
            return with_vocabulary(config, tokenizer), []
        num_new = tokenizer.mask_is_new if stand_in is None else tokenizer.vocab_size
        rows = vocab_rows(tokenizer.vocab_size, config.vocab_size, new_tokens=num_new)
        if rows is None:
            raise UserError(
                f"model.init_from {module.init_from} has {config.vocab_size} vocabulary rows, too few for the "
                f"{tokenizer.vocab_size - num_new} ids of tokenizer {tokenizer.path}; name the tokenizer that belongs "
                f"to it"
            )
        return dataclasses.replace(config, vocab_size=rows), []
    missing = f"tokenizer {data.tokenizer_folder} does not exist: a vocabulary of"
    if config.vocab_size is None:
        config = dataclasses.replace(config, vocab_size=USUAL_VOCAB_SIZE)
        return config, [f"{missing} {USUAL_VOCAB_SIZE:,} is assumed"]
    taken = f"{missing} {config.vocab_size:,} is taken from the model, which may grow by a mask token"
    return config, [] if is_new else [taken]


def _tokenizer_of(data: StreamingData) -> Tokenizer | None:
    """Return the tokenizer of the data; None if there is none yet, so that preparation has to make it."""
    try:
        local_folder(data.tokenizer_folder, "tokenizer", TOKENIZER_FILES)
    except UserError:
        return None
    return Tokenizer.load(data.tokenizer_folder)


def _stated_config(module: DecoderModule, stand_in: str | None) -> DecoderConfig:
    if stand_in is not None:
        if not Path(stand_in).is_file():
            raise UserError(f"{stand_in} (--decoder) does not exist")
        if Path(stand_in).suffix in (".yaml", ".yml"):
            return PlanCLI.read(["--config", stand_in, "--devices", "1"]).plan.step.decoder
        return read_config(read_json(Path(stand_in)), stand_in)[0]
    if module.initial_config is not None:
        return module.initial_config
    try:
        folder = local_folder(module.init_from or "", "model.init_from", CONFIG_FILES)
    except UserError as error:
        raise UserError(f"{error}; or name its {CONFIG_FILE}, or a recipe of its shape, with --decoder FILE") from error
    if (folder / CONFIG_FILE).is_file():
        return read_config(read_json(folder / CONFIG_FILE), str(folder / CONFIG_FILE))[0]
    return open_source(folder, verify=False).config
