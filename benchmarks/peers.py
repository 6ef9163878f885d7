"""Compare the training step with those of transformers, and of LitGPT if it is installed.

Every contender trains a model of the same shapes on the same random batch in the same precision with the same
optimizer: (mask, ours only,) forward, loss, backward, clip, fused AdamW. transformers' Llama or Qwen3 runs with SDPA
and its own loss, LitGPT's GPT with the chunked loss of its `pretrain`, both with and without torch.compile of the whole
model. Each has its own process, ours with the allocator set as `fit` sets it on a CPU. All take turns, in rotating
order. Memory is the peak of one more process on a CPU, of torch's allocator on a GPU.

    python -m benchmarks.peers                                                    # the quickstart's model on this CPU
    python -m benchmarks.peers --model 1.1b --device cuda --precision bf16 --micro_batch_size 4

LitGPT pins versions that conflict with ours; `pip install --no-deps litgpt` is enough here.
"""

import contextlib
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import meap_lit
from benchmarks.fresh import Growth, Worker, in_fresh_process
from benchmarks.page import about, check_device, main, page, publish
from benchmarks.step import Model, TrainingStep, known_decoder, sized
from meap_lit.errors import UserError
from meap_lit.hf.config import family, write_config
from meap_lit.model import DecoderConfig
from meap_lit.modules.cpu_memory import keep_freed_memory

Name = Literal["meap_lit", "transformers", "litgpt"]


def benchmark(
    model: Model = "quickstart",
    decoder: DecoderConfig | None = None,
    seq_len: int | None = None,
    micro_batch_size: int = 32,
    mask_ratio: float = 0.15,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: Literal["cpu", "cuda"] = "cpu",
    peers: list[Name] | None = None,
    compile: list[bool] | None = None,
    repetitions: int = 20,
    output: Path | None = None,
) -> None:
    """Print how long a training step of each contender takes, and the memory it needs.

    Args:
        model: The quickstart's model, a small one, one of 10M parameters, or one of the paper's ladder.
        decoder: Any other model; `model` is then ignored.
        seq_len: Tokens in a row; the model's max_seq_len if not given.
        micro_batch_size: Rows in a step.
        mask_ratio: P of our own steps.
        precision: `bf16` is autocast with float32 weights and optimizer states.
        device: Where to run.
        peers: Peers to measure; those that are installed if not given.
        compile: With and without torch.compile, if not given.
        repetitions: Number of turns; each times every contender once.
        output: Markdown file to write the result to as well.
    """
    if repetitions < 2 or micro_batch_size < 1:
        raise UserError("--repetitions must be at least 2 and --micro_batch_size at least 1")
    check_device(device)
    installed = _versions()
    for peer in peers or []:
        if peer not in installed:
            raise UserError(f"--peers {peer} is not installed; pip install {peer}, or leave it out")
    config = sized(decoder or known_decoder(model), seq_len)
    names = list(dict.fromkeys(["meap_lit", *(peers or installed)]))
    contenders = [
        Contender(name, compiled, config, micro_batch_size, precision, device)
        for name in names
        for compiled in compile or [False, True]
    ]
    peaks = [contender.peak_bytes(mask_ratio) for contender in contenders if device == "cpu"]
    timings = measure(contenders, mask_ratio, repetitions)
    peaks = peaks or [timing.peak_bytes for timing in timings]
    facts = [
        ", ".join(f"{name} {installed[name]}" for name in names),
        about(config),
        f"{micro_batch_size} rows of {config.max_seq_len:,} tokens a step, P = {mask_ratio:g} of ours; "
        f"{repetitions} turns",
    ]
    title = f"Training step beside peers: {'custom' if decoder else model}, {device}, {precision}"
    publish(page("peers", title, device, facts=facts, body=table(contenders, timings, peaks)), output)


def _versions() -> dict[str, str]:
    """Versions of the contenders that are installed."""
    versions = {"meap_lit": meap_lit.__version__}
    for name in ("transformers", "litgpt"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


# ---------------------------------------------------------------------------------------------- the contenders


class PeerStep(TrainingStep):
    """A peer's training step: nothing is masked, and the model is compiled as a whole."""

    def mask(self, mask_ratio: float) -> Tensor:
        return self.input_ids

    def compile(self) -> None:
        self.model.compile()


class TransformersStep(PeerStep):
    """transformers' model of the same shapes, with SDPA attention and the loss that it takes itself."""

    def build(self) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        model_type = family(self.config)
        if model_type is None:
            raise UserError("transformers has no model with decoder.qkv_bias and decoder.qk_norm; leave one out")
        content = write_config(self.config, model_type, torch.float32)
        config = AutoConfig.for_model(**content)
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()

    def loss(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, labels=self.labels, shift_labels=self.labels, use_cache=False).loss


class LitGPTStep(PeerStep):
    """LitGPT's GPT of the same shapes, with the chunked loss of its `pretrain`."""

    def build(self) -> nn.Module:
        from litgpt.config import Config
        from litgpt.model import GPT

        ours = self.config
        if ours.rope_scaling is not None or ours.tie_embeddings:
            raise UserError(
                "litgpt is measured without decoder.rope_scaling and decoder.tie_embeddings; leave them out"
            )
        config = Config(
            block_size=ours.max_seq_len,
            vocab_size=ours.vocab_size,
            padded_vocab_size=ours.vocab_size,
            n_layer=ours.num_layers,
            n_embd=ours.hidden_size,
            intermediate_size=ours.intermediate_size,
            n_head=ours.num_heads,
            n_query_groups=ours.num_kv_heads,
            head_size=ours.head_width,
            attn_bias=ours.qkv_bias,
            norm_qk=ours.qk_norm,
            norm_class_name="RMSNorm",
            norm_eps=ours.norm_eps,
            mlp_class_name="LLaMAMLP",
            rope_base=ours.rope_theta,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
        )
        return GPT(config)

    def loss(self, input_ids: Tensor) -> Tensor:
        from litgpt.utils import chunked_cross_entropy

        return chunked_cross_entropy(self.model(input_ids), self.labels)


STEPS: dict[str, type[TrainingStep]] = {
    "meap_lit": TrainingStep,
    "transformers": TransformersStep,
    "litgpt": LitGPTStep,
}


@dataclass(frozen=True)
class Contender:
    """What a contender's training step is made of; called, it makes it."""

    name: Name
    compile: bool
    config: DecoderConfig
    micro_batch_size: int
    precision: str
    device: str

    def __call__(self) -> TrainingStep:
        step = STEPS[self.name](
            self.config, self.micro_batch_size, self.precision, torch.device(self.device), self.compile
        )
        num_parameters = sum(parameter.numel() for parameter in step.model.parameters())
        assert num_parameters == self.config.num_parameters(), f"{self.name} has {num_parameters} parameters"
        return step

    @property
    def label(self) -> str:
        return f"{self.name}, compiled" if self.compile else self.name

    def peak_bytes(self, mask_ratio: float) -> int:
        """Memory of model, gradients, optimizer states and step at its peak, in a process of its own."""
        return in_fresh_process(partial(_peak_bytes, self, mask_ratio))


def _peak_bytes(contender: Contender, mask_ratio: float) -> int:
    importlib.import_module("transformers" if contender.name == "meap_lit" else contender.name)  # not what is measured
    growth = Growth()
    step = contender()
    step.seconds(step, mask_ratio, times=2)
    return growth()


# ---------------------------------------------------------------------------------------------- the measurement


@dataclass
class Timings:
    """Seconds of a contender's step in every turn, by the clock and by the processor; and its peak memory on a GPU."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def measure(contenders: Sequence[Contender], mask_ratio: float, repetitions: int) -> list[Timings]:
    """Let all take turns, each in a process of its own, each turn beginning with the next of them."""
    timings = [Timings() for _ in contenders]
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(partial(_timed_step, each, mask_ratio))) for each in contenders]
        for turn in range(-1, repetitions):  # the first compiles, and fills caches and optimizer states
            for number in range(len(workers)):
                number = (turn + number) % len(workers)
                wall, cpu, timings[number].peak_bytes = workers[number]()
                if turn >= 0:
                    timings[number].wall.append(wall)
                    timings[number].cpu.append(cpu)
    return timings


def _timed_step(contender: Contender, mask_ratio: float) -> Callable[[], tuple[float, float, int]]:
    """A call takes two steps, and returns the seconds of the second by the clock and by the processor, and the peak of
    the memory on a GPU so far.
    """
    if contender.name == "meap_lit" and contender.device == "cpu":
        keep_freed_memory()
    step = contender()

    def turn() -> tuple[float, float, int]:
        step(mask_ratio)  # others had the caches
        start = time.process_time()
        wall = step.seconds(step, mask_ratio)
        cpu = time.process_time() - start
        if contender.device == "cuda":
            torch.cuda.empty_cache()  # the memory of activations, for the next
            return wall, cpu, torch.cuda.max_memory_allocated()
        return wall, cpu, 0

    return turn


def table(contenders: Sequence[Contender], timings: Sequence[Timings], peaks: Sequence[int]) -> list[str]:
    """A row for each contender; then each peer's faster way against ours, pair by pair."""
    rows = [
        "| contender | step, ms | middle half, ms | CPU time, ms | tokens/s | peak memory, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for contender, timing, peak in zip(contenders, timings, peaks, strict=True):
        low, median, high = (1e3 * seconds for seconds in statistics.quantiles(timing.wall, n=4))
        rate = contender.micro_batch_size * contender.config.max_seq_len / median * 1e3
        rows.append(
            f"| {contender.label} | {median:.1f} | {low:.1f} to {high:.1f} | {1e3 * statistics.median(timing.cpu):.1f} "
            f"| {rate:,.0f} | {peak / 1e6:,.0f} |"
        )
    fastest: dict[str, Timings] = {}
    for contender, timing in zip(contenders, timings, strict=True):
        best = fastest.setdefault(contender.name, timing)
        if statistics.median(timing.wall) < statistics.median(best.wall):
            fastest[contender.name] = timing
    ours = fastest.pop("meap_lit")
    rows += [
        "",
        "| tokens/s, ours / peer, each in its faster way | by the clock | middle half | by CPU time | middle half |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows += [
        f"| {name} | {ratio(ours.wall, theirs.wall)} | {ratio(ours.cpu, theirs.cpu)} |"
        for name, theirs in fastest.items()
    ]
    return rows


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """How many times as long the peer took: median over the turns, and their middle half."""
    low, median, high = statistics.quantiles([slow / fast for fast, slow in zip(ours, theirs, strict=True)], n=4)
    return f"{median:.3f} | {low:.3f} to {high:.3f}"


if __name__ == "__main__":
    main(benchmark)
