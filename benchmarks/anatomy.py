"""Count what a training step does, by part, and predict its time on an H200 from bytes and FLOPs. Needs no GPU.

The step is the real one (mask, forward, loss, backward that adds to existing gradients, clip, AdamW) on fake tensors,
which have no memory. Fake tensors of a CPU take the paths of a GPU: one kernel for RMSNorm, FlashAttention for rows and
for packed documents, `foreach` for the clipping. `kernels.py` says what one kernel is.

The model of the time: a kernel takes the larger of bytes / 4.8 TB/s (the memory of an H200) and FLOPs / 790 TFLOP/s
(the most that dense products in bfloat16 reach on it), attention included, and kernels run one after another. Launches,
the host, communication and data take no time, and every kernel reads from memory. So the times are close to lower
bounds for these kernels, and comparisons of two versions are worth more than the times themselves. Attention counts the
half of the square that a causal kernel computes, and in the backward five products. MFU is defined as in `step.py`: the
causal half is not discounted.

    python -m benchmarks.anatomy                          # all cases, two minutes
    python -m benchmarks.anatomy --case 1.1b --top 20     # and the kernels that take most time
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

from benchmarks.kernels import CountKernels, Kernel
from benchmarks.page import main, page, publish
from benchmarks.step import known_decoder
from meap_lit.errors import UserError
from meap_lit.masking import mask_inputs
from meap_lit.model import Decoder, DecoderConfig, Documents
from meap_lit.model.float8 import use_float8
from meap_lit.model.recompute import checkpoint_and_compile
from meap_lit.modules import AdamW
from meap_lit.parallel.sharding import clip_grad_norm
from meap_lit.planning.fake_step import Checkpointing

BYTES_PER_SECOND = 4.8e12
FLOPS_PER_SECOND = 790e12
FLOAT8_FLOPS_PER_SECOND = 2 * FLOPS_PER_SECOND
"""Twice as many, as the hardware has it; not measured."""
NOMINAL_FLOPS_PER_SECOND = 989.5e12
"""Of an H200 in bfloat16: what MFU refers to, as in `benchmarks.step`."""

SUPERVISED = 0.42
"""Share of packed tokens with a label: that of 60 rows of `alpaca_en_demo.json` with copies and P = 0.1."""

PARTS = ("mask", "embedding", "blocks forward", "loss", "blocks backward", "optimizer")


@dataclass(frozen=True)
class Case:
    """A micro-batch.

    Args:
        decoder: The model.
        rows: Rows of the micro-batch.
        seq_len: Tokens of a row.
        checkpointing: Activation checkpointing.
        micro_batches: Micro-batches of a step and device.
        documents: Tokens of the documents of a row, if rows are packed; no masking, as in fine-tuning.
    """

    decoder: DecoderConfig
    rows: int
    seq_len: int
    checkpointing: Checkpointing = "none"
    micro_batches: int = 8
    documents: tuple[int, ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each run that attends within itself."""
        return (self.documents or (self.seq_len,)) * self.rows

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len


LLAMA3_8B = DecoderConfig(
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    hidden_size=4096,
    intermediate_size=14336,
    vocab_size=128_256,
    max_seq_len=8192,
    rope_theta=500_000.0,
)
CASES = {
    "0.1b": Case(known_decoder("0.1b"), rows=4, seq_len=4096),
    "1.1b": Case(known_decoder("1.1b"), rows=4, seq_len=4096),
    "8b": Case(LLAMA3_8B, rows=1, seq_len=8192, checkpointing="selective"),
    "8b packed": Case(LLAMA3_8B, rows=1, seq_len=2048, checkpointing="full", documents=(256,) * 8),
}
"""The ladder's ends and fine-tuning as the recipes have them; with 8 micro-batches a step."""


def benchmark(
    case: Literal["0.1b", "1.1b", "8b", "8b packed"] | None = None, top: int = 10, output: Path | None = None
) -> None:
    """Print launches, bytes, FLOPs and predicted times of a training step.

    Args:
        case: One of the cases; all if not given.
        top: How many kernels of a compiled micro-batch to list, by predicted time.
        output: Markdown file to write the result to as well.
    """
    if top < 0:
        raise UserError(f"--top must be at least 0, got {top}")
    facts = [
        f"predicted time of a kernel: the larger of bytes / {BYTES_PER_SECOND / 1e12:g} TB/s and FLOPs / "
        f"{FLOPS_PER_SECOND / 1e12:g} TFLOP/s (one H200; products in float8: twice that); launches, host and "
        "communication take no time",
        "eager: one kernel for each operation; compiled: the blocks have one kernel for each product and each "
        "attention, and one for connected operations between them; float8: compiled, with `model.float8`",
        "bf16-mixed: float32 weights, gradients and moments; masking with P = 0.15, none in packed rows, where "
        f"{SUPERVISED:.0%} of the positions have a label",
    ]
    body = [line for name in ([case] if case else CASES) for line in _section(name, CASES[name], top)]
    title = "Anatomy of a training step: counted on fake tensors; times are predicted, not measured"
    publish(page("anatomy", title, "cpu", facts=facts, body=body), output)


def _section(name: str, case: Case, top: int) -> list[str]:
    kinds = {"eager": count(case, compiled=False)}
    torch._dynamo.utils.counters.clear()
    kinds["compiled"] = count(case, compiled=True)
    graphs, breaks = graphs_and_breaks()
    kinds["float8"] = count(case, compiled=True, float8=True)
    rows = f"{case.rows} row(s) of {case.seq_len:,} tokens"
    packed = f", packed with documents of {case.documents[0]} tokens" if case.documents else ""
    lines = [
        f"## {name}: {case.decoder.num_parameters():,} parameters, {rows}{packed}",
        "",
        f"Activation checkpointing {case.checkpointing}. Compiled: {graphs} graph(s) for all blocks, "
        f"{breaks} graph break(s).",
        "",
        "| part | launches, eager | compiled | GB, eager | compiled | TFLOP, eager | compiled "
        "| predicted ms, eager | compiled | float8 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    micro_batch = PARTS[:-1]
    groups = {part: (part,) for part in micro_batch} | {"**micro-batch**": micro_batch, "optimizer": PARTS[-1:]}
    for title, parts in groups.items():
        lines.append(_row(title, *([k for part in parts for k in kernels.get(part, [])] for kernels in kinds.values())))
    lines += ["", f"A step of {case.micro_batches} micro-batches, predicted:"]
    for kind, kernels in kinds.items():
        time = sum(
            seconds(k) * (1 if part == "optimizer" else case.micro_batches) for part in kernels for k in kernels[part]
        )
        rate = case.tokens * case.micro_batches / time
        span = sum(n * n for n in case.lengths) / case.tokens
        mfu = rate * case.decoder.flops_per_token(span) / NOMINAL_FLOPS_PER_SECOND
        lines.append(f"- {kind}: {time * 1e3:,.1f} ms, {rate:,.0f} tokens/s, MFU {mfu:.1%}")
    return [*lines, "", *(_costliest(kinds["compiled"], top) if top else [])]


def _row(title: str, *kinds: Sequence[Kernel]) -> str:
    """Return a row of the table; of the last kind, float8, only the time."""
    columns = [
        *(f"{len(kernels):,}" for kernels in kinds[:-1]),
        *(f"{sum(k.bytes for k in kernels) / 1e9:,.2f}" for kernels in kinds[:-1]),
        *(f"{sum(k.flops for k in kernels) / 1e12:,.2f}" for kernels in kinds[:-1]),
        *(f"{sum(map(seconds, kernels)) * 1e3:,.2f}" for kernels in kinds),
    ]
    return f"| {title} | {' | '.join(columns)} |"


def _costliest(kernels: dict[str, list[Kernel]], number: int) -> list[str]:
    same: dict[tuple[str, Kernel], int] = defaultdict(int)
    for part in kernels:
        for kernel in kernels[part]:
            same[part, kernel] += 1
    ordered = sorted(same, key=lambda key: -same[key] * seconds(key[1]))[:number]
    return [
        "| costliest kernels, compiled | part | launches | GB each | predicted ms in all | limited by |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {_short(kernel.name)} | {part} | {same[part, kernel]} | {kernel.bytes / 1e9:.3f} "
            f"| {same[part, kernel] * seconds(kernel) * 1e3:.2f} "
            f"| {'FLOPs' if kernel.flops / _rate(kernel) > kernel.bytes / BYTES_PER_SECOND else 'bytes'} |"
            for part, kernel in ordered
        ),
        "",
    ]


def _short(name: str) -> str:
    return name if len(name) <= 60 else name[:57] + "..."


def seconds(kernel: Kernel) -> float:
    """Return the predicted time of a kernel on an H200."""
    return max(kernel.bytes / BYTES_PER_SECOND, kernel.flops / _rate(kernel))


def _rate(kernel: Kernel) -> float:
    return FLOAT8_FLOPS_PER_SECOND if kernel.name == "_scaled_mm" else FLOPS_PER_SECOND


def graphs_and_breaks() -> tuple[int, int]:
    """Return how many graphs the compiler made since its counters were cleared, and how often a graph broke."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def count(case: Case, *, compiled: bool, float8: bool = False) -> dict[str, list[Kernel]]:
    """Return the kernels of one micro-batch and one update, by part.

    The gradients exist and the moments too, as in all but the first micro-batch of a step.
    """
    counter = CountKernels(sum(n * (n + 1) / 2 for n in case.lengths) / case.tokens)
    torch._dynamo.reset()
    with FakeTensorMode(), _paths_of_a_gpu(counter):
        decoder = Decoder(case.decoder)
        optimizer = AdamW().build(decoder)
        _name_parts(decoder, counter)
        if float8:
            use_float8(decoder, torch.device("cpu"))
        checkpoint_and_compile(decoder, case.checkpointing, compile=compiled)
        with counter:
            with counter.paused():
                _step(decoder, optimizer, case, counter)
            _step(decoder, optimizer, case, counter)
    return counter.kernels


def _step(decoder: Decoder, optimizer: torch.optim.Optimizer, case: Case, counter: CountKernels) -> None:
    input_ids = torch.zeros(case.rows, case.seq_len, dtype=torch.int64)
    labels, sample_ids = torch.zeros_like(input_ids), torch.arange(case.rows)
    position_ids = torch.arange(case.seq_len).repeat(case.rows, 1) if case.documents else None
    documents = Documents(case.lengths) if case.documents else None
    supervised = torch.arange(round(SUPERVISED * case.tokens)) if case.documents else None
    counter.part = "mask"
    counter.kernels.clear()
    if not case.documents:
        input_ids, _ = mask_inputs(input_ids, sample_ids, mask_token_id=1, mask_ratio=0.15, seed=0, step=0)
    counter.part = "embedding"
    with torch.autocast("cpu", torch.bfloat16):
        hidden = decoder(input_ids, position_ids, documents)
        loss = decoder.lm_head.loss(hidden, labels, supervised)[0] / labels.numel()
    del hidden
    loss.backward()
    counter.part = "optimizer"
    clip_grad_norm(decoder.parameters(), 1.0)
    optimizer.step()


def _name_parts(decoder: Decoder, counter: CountKernels) -> None:
    """Set `counter.part` as forward and backward reach a part; `loss` is the final norm, the head and the loss."""

    def begin(part: str, _: Tensor | None = None) -> None:
        counter.part = part

    def before_blocks(_: object, args: tuple[Tensor, ...]) -> None:
        begin("blocks forward")
        args[0].register_hook(partial(begin, "embedding"))

    def after_blocks(_: object, __: object, output: Tensor) -> None:
        begin("loss")
        output.register_hook(partial(begin, "blocks backward"))

    decoder.layers[0].register_forward_pre_hook(before_blocks)
    decoder.layers[-1].register_forward_hook(after_blocks)


@contextmanager
def _paths_of_a_gpu(counter: CountKernels) -> Iterator[None]:
    """Let fake tensors of a CPU be computed as on a GPU; autograd on fake tensors of a GPU needs one."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0]

    def norm(x: Tensor, shape: Sequence[int], weight: Tensor, eps: float) -> Tensor:
        return torch.native_layer_norm(x, shape, weight, None, eps)[0]  # reads and writes as much as RMSNorm

    stand_ins = {
        "meap_lit.model.decoder.causal_attention": attention,
        "meap_lit.model.attention._has_flash_attention": lambda device: True,
        "meap_lit.model.float8._check_device": lambda device: None,
        "torch.nn.functional.rms_norm": norm,
        "torch.nn.utils.clip_grad._has_foreach_support": lambda tensors, device: True,
        "torch._dynamo.mark_dynamic": lambda bounds, dimension: None,  # a fake tensor has one size
        "torch.compile": partial(torch.compile, backend=counter.backend()),
    }
    with ExitStack() as stack:
        stack.enter_context(patch.object(FakeTensor, "is_cuda", True))
        for name, value in stand_ins.items():
            stack.enter_context(patch(name, value))
        yield


if __name__ == "__main__":
    main(benchmark)
