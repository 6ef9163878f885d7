"""Measure head and loss: peak memory and time of the loss of hidden states, forward and backward.

Ours takes the rows in pieces (`meap_lit/model/loss.py`). It is compared with torch's own `linear_cross_entropy`, in
chunks that torch chooses (torch 2.13), and with the plain loss over all logits. On a CPU each is measured in a new
process, on a GPU by the clock and the allocator, after a run to warm up. Hidden states, head and labels are held when
the count begins. The gradients of both are subtracted.

    python -m benchmarks.loss                                 # 128K vocabulary, 8 x 4,096 tokens, 64 wide; Linux
    python -m benchmarks.loss --hidden_size 2048 --repetitions 1
    python -m benchmarks.loss --device cuda --bf16 true --hidden_size 2048 --rows [256,1024,4096]
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.fresh import Growth, in_fresh_process
from benchmarks.page import check_device, main, page, publish
from meap_lit.errors import UserError
from meap_lit.model import linear_cross_entropy, loss


def _ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels)[0]


def _torch(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(chunking_method="auto")
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)


def _plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ours": _ours,
    "torch": _torch,
    "plain": _plain,
}
if not hasattr(torch.nn, "LinearCrossEntropyOptions"):  # before torch 2.13
    del WAYS["torch"]


def benchmark(
    vocab_size: int = 128 * 1024,
    num_tokens: int = 8 * 4096,
    hidden_size: int = 64,
    ways: tuple[str, ...] = tuple(WAYS)[:-1],
    rows: tuple[int, ...] = (),
    bf16: bool = False,
    device: Literal["cpu", "cuda"] = "cpu",
    repetitions: int = 3,
    output: Path | None = None,
) -> None:
    """Print what each way to take the loss needs.

    Args:
        vocab_size: Rows of the head.
        num_tokens: Hidden states, all supervised.
        hidden_size: Their width.
        ways: Those of `ours`, `torch` and `plain` to measure; `plain` holds all logits a few times over.
        rows: Rows of a piece of `ours`, one line of the table each; those of the package if not given.
        bf16: Under bfloat16 autocast.
        device: Where to run.
        repetitions: Measurements of each; the table has medians.
        output: Markdown file to write the result to as well.
    """
    if unknown := set(ways) - set(WAYS):
        raise UserError(f"--ways has {min(unknown)!r}; choose from {', '.join(WAYS)}")
    if repetitions < 1:
        raise UserError("--repetitions must be at least 1")
    check_device(device)
    cases = {way: partial(measure, way, vocab_size, num_tokens, hidden_size, bf16, device) for way in ways}
    if rows and (ours := cases.pop("ours", None)):
        cases = {f"ours, pieces of {number:,} rows": partial(ours, number) for number in rows} | cases
    measured: dict[str, list[tuple[int, float]]] = {name: [] for name in cases}
    for _ in range(repetitions):
        for name, case in cases.items():
            measured[name].append(case() if device == "cuda" else in_fresh_process(case))
    gradients = 4 * hidden_size * (vocab_size + num_tokens)
    heading, unit = ("time, ms", 1e3) if device == "cuda" else ("CPU time, s", 1)
    facts = [
        f"vocabulary {vocab_size:,}, {num_tokens:,} tokens, {hidden_size} wide, "
        f"{'bfloat16 autocast' if bf16 else 'float32'}; all logits are {4e-9 * vocab_size * num_tokens:.1f} GB in "
        f"float32, the gradients {gradients / 1e9:.2f} GB",
        f"medians of {repetitions} measurement(s) each, by turns",
    ]
    body = [
        f"| way | peak beyond tensors given and gradients, GB | {heading} |",
        "| --- | --- | --- |",
        *(
            f"| {name} | {(statistics.median(peak for peak, _ in results) - gradients) / 1e9:.2f} "
            f"| {statistics.median(seconds for _, seconds in results) * unit:.1f} |"
            for name, results in measured.items()
        ),
    ]
    publish(page("loss", "Head and loss, forward and backward", device, facts=facts, body=body), output)


def measure(
    way: str,
    vocab_size: int,
    num_tokens: int,
    hidden_size: int,
    bf16: bool,
    device: str = "cpu",
    rows: int | None = None,
) -> tuple[int, float]:
    """Return the memory of one forward and backward at its peak, in bytes, and its seconds.

    On a CPU these are the growth of this process and its time, on a GPU the allocator's bytes and the clock's time.
    """
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator, device=device).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, generator=generator, device=device).mul_(hidden_size**-0.5)
    weight.requires_grad_()
    labels = torch.randint(0, vocab_size, (num_tokens,), generator=generator, device=device)

    def take(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            total = WAYS[way](hidden, weight, labels)
        (total / num_tokens).backward()

    sizes = patch.object(loss, "piece_rows", lambda _: rows) if rows else nullcontext()
    with sizes:
        if device == "cuda":
            return _measure_on_gpu(partial(take, hidden, weight, labels), [hidden, weight])
        small = torch.zeros(2, hidden_size, requires_grad=True)
        take(small, weight[:2].detach(), labels[:2] % 2)  # kernels load
        growth, start = Growth(), time.process_time()
        take(hidden, weight, labels)
        return growth(), time.process_time() - start


def _measure_on_gpu(take: Callable[[], None], leaves: list[Tensor]) -> tuple[int, float]:
    """Return the peak and the seconds of the second of two calls."""
    for _ in range(2):
        for leaf in leaves:
            leaf.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held, start = torch.cuda.memory_allocated(), time.perf_counter()
        take()
        torch.cuda.synchronize()
        seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated() - held
    return peak, seconds


if __name__ == "__main__":
    main(benchmark)
