"""Measure head and loss: peak memory and time of the loss of hidden states, forward and backward.

Ours takes the rows in pieces (`meap_lit/model/loss.py`). It is compared with torch's own `linear_cross_entropy`, in
chunks that torch chooses, and with the plain loss over all logits. Each is measured in a new process,
which holds hidden states, head and labels when the count begins. The gradients of both are subtracted.

    python -m benchmarks.loss                                 # 128K vocabulary, 8 x 4,096 tokens, 64 wide; Linux
    python -m benchmarks.loss --hidden_size 2048 --repetitions 1
"""

import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor

from benchmarks.fresh import Growth, in_fresh_process
from benchmarks.step import environment, publish
from meap_lit.errors import UserError
from meap_lit.model import linear_cross_entropy


def _torch(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(chunking_method="auto")
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)


def _plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ours": linear_cross_entropy,
    "torch": _torch,
    "plain": _plain,
}


def benchmark(
    vocab_size: int = 128 * 1024,
    num_tokens: int = 8 * 4096,
    hidden_size: int = 64,
    ways: tuple[str, ...] = ("ours", "torch"),
    bf16: bool = False,
    repetitions: int = 3,
    output: Path | None = None,
) -> None:
    """Print what each way to take the loss needs.

    Args:
        vocab_size: Rows of the head.
        num_tokens: Hidden states, all supervised.
        hidden_size: Their width.
        ways: Those of `ours`, `torch` and `plain` to measure; `plain` holds all logits a few times over.
        bf16: Under bfloat16 autocast.
        repetitions: Processes for each; the table has medians.
        output: Markdown file to write the result to as well.
    """
    if unknown := set(ways) - set(WAYS):
        raise UserError(f"--ways has {min(unknown)!r}; choose from {', '.join(WAYS)}")
    if repetitions < 1:
        raise UserError("--repetitions must be at least 1")
    measured: dict[str, list[tuple[int, float]]] = {way: [] for way in ways}
    for _ in range(repetitions):
        for way, results in measured.items():
            results.append(in_fresh_process(partial(measure, way, vocab_size, num_tokens, hidden_size, bf16)))
    gradients = 4 * hidden_size * (vocab_size + num_tokens)
    report = "\n".join(
        [
            "# Head and loss, forward and backward",
            "",
            f"    python -m benchmarks.loss {shlex.join(sys.argv[1:])}".rstrip(),
            "",
            *environment("cpu"),
            f"- vocabulary {vocab_size:,}, {num_tokens:,} tokens, {hidden_size} wide, "
            f"{'bfloat16 autocast' if bf16 else 'float32'}; all logits are {4e-9 * vocab_size * num_tokens:.1f} GB in "
            f"float32, the gradients {gradients / 1e9:.2f} GB",
            f"- medians of {repetitions} process(es) each, by turns",
            "",
            "| way | peak beyond tensors given and gradients, GB | CPU time, s |",
            "| --- | --- | --- |",
            *(
                f"| {way} | {(statistics.median(peak for peak, _ in results) - gradients) / 1e9:.2f} "
                f"| {statistics.median(seconds for _, seconds in results):.1f} |"
                for way, results in measured.items()
            ),
            "",
        ]
    )
    publish(report, output)


def measure(way: str, vocab_size: int, num_tokens: int, hidden_size: int, bf16: bool) -> tuple[int, float]:
    """Growth of this process at its peak in bytes, and seconds of CPU time, of one forward and backward."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, generator=generator).mul_(hidden_size**-0.5).requires_grad_()
    labels = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    small = torch.zeros(2, hidden_size, requires_grad=True)
    WAYS[way](small, weight[:2].detach(), labels[:2] % 2).backward()  # kernels load
    growth, start = Growth(), time.process_time()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = WAYS[way](hidden, weight, labels)
    (loss / num_tokens).backward()
    return growth(), time.process_time() - start


if __name__ == "__main__":
    try:
        auto_cli(benchmark, as_positional=False)
    except UserError as error:
        sys.exit(f"error: {error}")
