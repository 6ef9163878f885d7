"""Measure what masking costs: a full training step of one model with it (MEAP) and without it (NTP).

A step is all that training does once a batch is on the device: mask, forward, loss, backward, clip, AdamW. Both kinds
run in one process on one model, in turns and with the order of a turn changing, so that a machine that warms up or
slows down does so for both. Data loading and logging are left out; they are the same for both.

    python -m benchmarks.step                                                        # a small model on this CPU
    python -m benchmarks.step --model 1.1b --device cuda --precision bf16 --micro_batch_size 8
"""

import contextlib
import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml
from torch import Tensor, nn

from benchmarks.page import about, check_device, main, page, publish
from meap_lit.callbacks.throughput import peak_flops
from meap_lit.errors import UserError
from meap_lit.masking import mask_inputs
from meap_lit.model import Decoder, DecoderConfig
from meap_lit.model.config import vocab_rows
from meap_lit.model.float8 import use_float8
from meap_lit.model.recompute import checkpoint_and_compile
from meap_lit.modules import AdamW

RECIPES = Path(__file__).parents[1] / "recipes"
Model = Literal["small", "quickstart", "10m", "0.1b", "0.3b", "0.5b", "1.1b"]
SMALL = DecoderConfig(
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    hidden_size=128,
    intermediate_size=384,
    vocab_size=2048,
    max_seq_len=256,
)
TEN_MILLION = DecoderConfig(
    num_layers=6,
    num_heads=6,
    num_kv_heads=2,
    hidden_size=384,
    intermediate_size=1024,
    vocab_size=4096,
    max_seq_len=512,
)

NUM_PROFILED = 5
"""Steps that are profiled."""


def benchmark(
    model: Model = "small",
    decoder: DecoderConfig | None = None,
    seq_len: int | None = None,
    micro_batch_size: int = 8,
    mask_ratio: float = 0.15,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: Literal["cpu", "cuda"] = "cpu",
    compile: bool = False,
    float8: bool = False,
    repetitions: int = 40,
    steps: int = 1,
    profile: int = 0,
    output: Path | None = None,
) -> None:
    """Print how long a training step takes with and without masking, and what else it needs.

    Args:
        model: A small model, the quickstart's, one of 10M parameters, or one of the paper's ladder (recipes/pretrain).
        decoder: Any other model; `model` is then ignored.
        seq_len: Tokens in a row; the model's max_seq_len if not given.
        micro_batch_size: Rows in a step.
        mask_ratio: P of the MEAP steps.
        precision: `bf16` is autocast with float32 weights and optimizer states, as Lightning's bf16-mixed.
        device: Where to run.
        compile: Compile the blocks.
        float8: Multiply in the blocks in float8, as `model.float8`; on a CPU its emulation.
        repetitions: Number of turns; each times NTP once and MEAP once.
        steps: Steps in one timing. More than 1 lets a GPU's queue hide launches, as in a real run.
        profile: How many operations to list by the time that they take in a MEAP step; none if 0.
        output: Markdown file to write the result to as well.
    """
    if repetitions < 2 or steps < 1 or micro_batch_size < 1 or profile < 0:
        raise UserError(
            "--repetitions must be at least 2, --steps and --micro_batch_size at least 1, --profile at least 0"
        )
    check_device(device)
    config = sized(decoder or known_decoder(model), seq_len)
    trainer = TrainingStep(config, micro_batch_size, precision, torch.device(device), compile, float8)

    name = "custom" if decoder else model
    facts = [
        about(config),
        f"{micro_batch_size} rows of {config.max_seq_len:,} tokens a step, P = {mask_ratio:g}; "
        f"{repetitions} turns, {steps} step(s) of each kind in a turn{', compiled' if compile else ''}"
        f"{', float8' if float8 else ''}",
    ]
    body = [
        *_measure(trainer, mask_ratio, repetitions, steps),
        "",
        *(_profile(trainer, mask_ratio, profile) if profile else []),
    ]
    title = f"Training step with and without masking: {name}, {device}, {precision}"
    publish(page("step", title, device, facts=facts, body=body), output)


def known_decoder(model: str) -> DecoderConfig:
    """Sizes as the recipe of that name has them; the ladder's vocabulary is the paper's, 32,000 tokens and the mask."""
    if model in (known := {"small": SMALL, "10m": TEN_MILLION}):
        return known[model]
    if model == "quickstart":
        quickstart = yaml.safe_load((RECIPES / "quickstart.yaml").read_text())
        data = quickstart["data"]["init_args"]
        tokenizer = next(step["init_args"] for step in data["preparation"] if "vocab_size" in step["init_args"])
        sizes = quickstart["model"]["init_args"]["decoder"] | {"max_seq_len": data["seq_len"]}
        return DecoderConfig(**{**sizes, "vocab_size": vocab_rows(tokenizer["vocab_size"])})
    names = ("pretrain/base.yaml", f"pretrain/meap_{model}.yaml")
    base, recipe = (yaml.safe_load((RECIPES / name).read_text()) for name in names)
    sizes = base["model"]["init_args"]["decoder"] | recipe["model"]["init_args"]["decoder"]
    sizes["max_seq_len"] = base["data"]["init_args"]["seq_len"]  # the recipe refers to it
    return DecoderConfig(**{"vocab_size": vocab_rows(32_001), **sizes})


def sized(config: DecoderConfig, seq_len: int | None) -> DecoderConfig:
    """Return the model for rows of `seq_len` tokens, of its own max_seq_len if not given.

    Raises:
        UserError: If it has no vocabulary.
    """
    if config.vocab_size is None:
        raise UserError("--decoder.vocab_size must be given")
    return dataclasses.replace(config, max_seq_len=seq_len or config.max_seq_len)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of some work, from an idle device to an idle device."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    work()
    return now() - start


class TrainingStep:
    """One model, one optimizer and one batch of random rows of its max_seq_len; a call is one training step."""

    def __init__(
        self,
        config: DecoderConfig,
        micro_batch_size: int,
        precision: str,
        device: torch.device,
        compile: bool = False,
        float8: bool = False,
    ) -> None:
        assert config.vocab_size is not None
        torch.manual_seed(0)
        self.config, self.device, self.precision = config, device, precision
        with device:
            self.model = self.build()
        if float8:
            assert isinstance(self.model, Decoder)
            use_float8(self.model, device, emulate=device.type == "cpu")
        self.optimizer = AdamW(lr=1e-4).build(self.model)
        if compile:
            self.compile()
        generator = torch.Generator().manual_seed(0)  # of its own: the same batch whatever a model drew for its weights
        shape = (micro_batch_size, config.max_seq_len + 1)
        tokens = torch.randint(0, config.vocab_size - 1, shape, generator=generator).to(device)
        self.input_ids, self.labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.sample_ids = torch.arange(micro_batch_size, device=device)
        self.num_steps = 0

    def __call__(self, mask_ratio: float) -> None:
        input_ids = self.mask(mask_ratio)
        with self._autocast():
            loss = self.loss(input_ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_steps += 1

    def build(self) -> nn.Module:
        """The model, with random weights."""
        return Decoder(self.config)

    def compile(self) -> None:
        """Compile what `fit` compiles with `model.compile`."""
        assert isinstance(self.model, Decoder)
        checkpoint_and_compile(self.model, "none", compile=True)

    def loss(self, input_ids: Tensor) -> Tensor:
        """Mean loss of the batch's labels, scalar, for inputs [B, T]."""
        assert isinstance(self.model, Decoder)
        return self.model.lm_head.loss(self.model(input_ids), self.labels)[0] / self.labels.numel()

    def mask(self, mask_ratio: float) -> Tensor:
        """The batch's inputs, masked as at the present step, [B, T]."""
        assert self.config.vocab_size is not None
        return mask_inputs(
            self.input_ids,
            self.sample_ids,
            mask_token_id=self.config.vocab_size - 1,
            mask_ratio=mask_ratio,
            seed=0,
            step=self.num_steps,
        )[0]

    def seconds(self, action: Callable[[float], object], mask_ratio: float, times: int = 1) -> float:
        """Wall time of an action done so many times, from an idle device to an idle device."""

        def work() -> None:
            for _ in range(times):
                action(mask_ratio)

        return seconds_of(work, self.device)

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()


@dataclass
class Timings:
    """Seconds of a step in every turn, and the peak memory on a GPU."""

    seconds: list[float]
    peak_bytes: int = 0

    def row(self, name: str, step: TrainingStep) -> str:
        median = statistics.median(self.seconds)
        low, _, high = statistics.quantiles(self.seconds, n=4)
        rate = step.labels.numel() / median
        mfu = ""
        if peak := _peak_flops(step):
            mfu = f"{rate * step.config.flops_per_token(step.config.max_seq_len) / peak:.1%}"
        memory = self.peak_bytes or _peak_resident_bytes()
        return (
            f"| {name} | {median * 1e3:.2f} | {low * 1e3:.2f} to {high * 1e3:.2f} | {rate:,.0f} "
            f"| {memory / 1e9:.2f} | {mfu or 'n/a'} |"
        )


def _measure(step: TrainingStep, mask_ratio: float, repetitions: int, steps: int) -> list[str]:
    kinds = {"NTP": 0.0, "MEAP": mask_ratio}
    timings = {name: Timings([]) for name in kinds}
    for name in (*kinds, *kinds):  # warm up both twice: caches, autotuning, optimizer states
        step(kinds[name])
    for turn in range(repetitions):
        for name in sorted(kinds, reverse=turn % 2 == 0):
            timing, ratio = timings[name], kinds[name]
            if step.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            timing.seconds.append(step.seconds(step, ratio, times=steps) / steps)
            if step.device.type == "cuda":
                timing.peak_bytes = max(timing.peak_bytes, torch.cuda.max_memory_allocated())
    masking = statistics.median(step.seconds(step.mask, mask_ratio) for _ in range(max(20, repetitions)))
    ntp, meap = (statistics.median(timing.seconds) for timing in timings.values())
    low, middle, high = statistics.quantiles(
        [after / before for before, after in zip(timings["NTP"].seconds, timings["MEAP"].seconds, strict=True)], n=4
    )
    return [
        "| step | median, ms | middle half, ms | tokens/s | peak memory, GB | MFU |",
        "| --- | --- | --- | --- | --- | --- |",
        *(timing.row(name, step) for name, timing in timings.items()),
        "",
        f"- MEAP / NTP: {meap / ntp:.4f} by the two medians; turn by turn {middle:.4f} in the median, "
        f"{low:.4f} to {high:.4f} in the middle half",
        f"- masking alone: {masking * 1e3:.2f} ms, {masking / ntp:.3%} of an NTP step",
    ]


def _profile(step: TrainingStep, mask_ratio: float, num_rows: int) -> list[str]:
    """The operations that take most time, on the device where it is a GPU, else on the CPU."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if step.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step.seconds(step, mask_ratio, times=NUM_PROFILED)
    kind = "device" if step.device.type == "cuda" else "cpu"
    milliseconds = {
        event: getattr(event, f"self_{kind}_time_total") / 1e3 / NUM_PROFILED for event in profiler.key_averages()
    }
    costliest = sorted(milliseconds, key=milliseconds.__getitem__, reverse=True)[:num_rows]
    total = sum(milliseconds.values())
    return [
        "| operation | share | ms in a step | calls in a step |",
        "| --- | --- | --- | --- |",
        *(
            f"| `{event.key}` | {milliseconds[event] / total:.1%} | {milliseconds[event]:.2f} "
            f"| {event.count / NUM_PROFILED:g} |"
            for event in costliest
        ),
        "",
    ]


def _peak_flops(step: TrainingStep) -> float | None:
    return peak_flops(step.device, torch.bfloat16 if step.precision == "bf16" else torch.float32)


def _peak_resident_bytes() -> int:
    """Of the whole process: NTP and MEAP share the number."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main(benchmark)
