"""Measure what a GPU can do: the ceilings that every other figure is compared with.

Memory bandwidth, matrix products in bfloat16, attention by each kernel of `scaled_dot_product_attention`, and the first
call of a kernel at lengths that it has not seen, since packed rows bring new ones in every batch.

    python -m benchmarks.chip                                            # a GPU
    python -m benchmarks.chip --device cpu --toy true                    # small sizes, to see that it runs
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.page import check_device, main, page, publish
from benchmarks.step import seconds_of
from meap_lit.errors import UserError
from meap_lit.model import Documents
from meap_lit.model.attention import attention_within

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
NUM_LENGTHS = 10
"""Lengths that a kernel has not seen."""


def benchmark(
    device: Literal["cpu", "cuda"] = "cuda", toy: bool = False, repetitions: int = 10, output: Path | None = None
) -> None:
    """Print the ceilings of a device.

    Args:
        device: Where to run.
        toy: Small sizes, which say nothing about a GPU.
        repetitions: Timings of each; the tables have medians.
        output: Markdown file to write the result to as well.
    """
    check_device(device)
    if repetitions < 1:
        raise UserError("--repetitions must be at least 1")
    chip = Chip(torch.device(device), repetitions)
    products = [(64, 64, 64)] if toy else [(8192, 8192, 8192), (16384, 2048, 5632), (16384, 2048, 32064)]
    shapes = [(1, 2, 64, 16)] if toy else [(2, 32, 4096, 64), (2, 32, 4096, 128)]
    facts = [f"copy: {chip.bandwidth(2**20 if toy else 2**33) / 1e12:.2f} TB/s, bytes read and bytes written"]
    body = [
        "| product in bfloat16, m x k x n | ms | TFLOP/s |",
        "| --- | --- | --- |",
        *(chip.product(*sizes) for sizes in products),
        "",
        "| attention in bfloat16, B x H x T x head_dim | kernel | forward, ms | and backward, ms | TFLOP/s of both |",
        "| --- | --- | --- | --- | --- |",
        *(chip.attention(name, *shape) for shape in shapes for name in BACKENDS),
        "",
        f"| first call at {NUM_LENGTHS} new lengths, and backward | median, ms | longest, ms | second call, ms |",
        "| --- | --- | --- | --- |",
        *chip.first_calls(128 if toy else 4096),
    ]
    publish(page("chip", "The chip", device, facts=facts, body=body), output)


class Chip:
    """Times work on a device, from idle to idle.

    Args:
        device: The device.
        repetitions: Timings of each piece of work.
    """

    def __init__(self, device: torch.device, repetitions: int) -> None:
        self.device = device
        self.repetitions = repetitions

    def median(self, work: Callable[[], object]) -> float:
        """Return the median seconds of `repetitions` calls after two to warm up."""
        return statistics.median([seconds_of(work, self.device) for _ in range(self.repetitions + 2)][2:])

    def bandwidth(self, num_bytes: int) -> float:
        """Return the bytes per second that a copy of so many bytes reads and writes."""
        source = torch.ones(num_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * num_bytes / self.median(lambda: target.copy_(source))

    def product(self, m: int, k: int, n: int) -> str:
        """Return the row of a product [m, k] x [k, n]."""
        left, right = self._random(m, k), self._random(n, k)
        seconds = self.median(lambda: F.linear(left, right))
        return f"| {m:,} x {k:,} x {n:,} | {seconds * 1e3:.3f} | {2 * m * k * n / seconds / 1e12:,.1f} |"

    def attention(self, name: str, batch_size: int, num_heads: int, seq_len: int, head_dim: int) -> str:
        """Return the row of causal attention by one kernel; half of the scores count as work."""
        tensors = [self._random(batch_size, num_heads, seq_len, head_dim).requires_grad_() for _ in range(3)]
        cell = f"| {batch_size} x {num_heads} x {seq_len:,} x {head_dim} | {name} |"
        try:
            forward = self.median(partial(_attend, name, tensors, backward=False))
            both = self.median(partial(_attend, name, tensors, backward=True))
        except RuntimeError as error:  # a kernel that the device does not have, or its memory
            return f"{cell} {' '.join(str(error).split())[:80].replace('|', '')} | | |"
        work = 3.5 * 2 * batch_size * num_heads * seq_len**2 * head_dim  # two products forward, five backward
        return f"{cell} {forward * 1e3:.3f} | {both * 1e3:.3f} | {work / both / 1e12:,.1f} |"

    def first_calls(self, seq_len: int) -> list[str]:
        """Return the rows of first calls: two kernels on single rows, and the decoder's own on packed rows."""
        rows = []
        for name in ("flash", "cuDNN"):
            works = []
            for number in range(1 + NUM_LENGTHS):
                length = seq_len - 3 - 7 * number  # no multiple of a tile
                tensors = [self._random(1, 2, length, 64).requires_grad_() for _ in range(3)]
                works.append(partial(_attend, name, tensors, backward=True))
            rows.append(self._first_calls(name, works))
        packed = [self._random(1, 2, seq_len, 64).requires_grad_() for _ in range(3)]
        works = [partial(_attend_packed, packed, self._documents(seq_len, number)) for number in range(1 + NUM_LENGTHS)]
        return [*rows, self._first_calls("packed rows", works)]

    def _first_calls(self, name: str, works: Sequence[Callable[[], object]]) -> str:
        try:
            works[0]()  # kernels load
            firsts = [seconds_of(work, self.device) for work in works[1:]]
            again = [seconds_of(work, self.device) for work in works[1:]]
        except RuntimeError as error:
            return f"| {name} | {' '.join(str(error).split())[:80].replace('|', '')} | | |"
        cells = (statistics.median(firsts), max(firsts), statistics.median(again))
        return f"| {name} | " + " | ".join(f"{seconds * 1e3:.2f}" for seconds in cells) + " |"

    def _documents(self, seq_len: int, number: int) -> Documents:
        generator = torch.Generator().manual_seed(number)
        lengths = torch.randint(1, seq_len // 4, (6,), generator=generator).tolist()
        kept = [length for count, length in enumerate(lengths) if sum(lengths[: count + 1]) <= seq_len]
        return Documents.of_rows([kept], seq_len)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).bfloat16()


def _attend(name: str, tensors: list[Tensor], backward: bool) -> None:
    query, key, value = tensors
    with sdpa_kernel(BACKENDS[name]):
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    if backward:
        torch.autograd.grad(y, tensors, torch.ones_like(y))


def _attend_packed(tensors: list[Tensor], documents: Documents) -> None:
    y = attention_within(documents, tensors[0].device)(*tensors)
    torch.autograd.grad(y, tensors, torch.ones_like(y))


if __name__ == "__main__":
    main(benchmark)
