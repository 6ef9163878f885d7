"""Launches, bytes and FLOPs of programs small enough to count by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from benchmarks.kernels import CountKernels, Kernel


def kernels(program: Callable[..., object], *shapes: tuple[int, ...], compiled: bool = False) -> list[Kernel]:
    """Kernels of a program of float32 tensors, in order of their names."""
    counter = CountKernels()
    torch._dynamo.reset()
    if compiled:
        program = torch.compile(program, backend=counter.backend())
    with FakeTensorMode():
        tensors = [torch.zeros(shape) for shape in shapes]
        with counter:
            program(*tensors)
    return sorted(counter.kernels.get("", []), key=lambda kernel: kernel.name)


def test_a_linear_layer_is_one_product() -> None:
    (product,) = kernels(torch.nn.functional.linear, (4, 8), (16, 8))
    assert product == Kernel("mm", bytes=4 * (4 * 8 + 16 * 8 + 4 * 16), flops=2 * 4 * 8 * 16)


@pytest.mark.parametrize(
    ("program", "nbytes"),
    [
        (lambda x: x.view(-1).detach()[None, :3], []),  # views
        (lambda x: torch.empty_like(x), []),
        (lambda x: x + 1, [2 * 64]),
        (lambda x: x.mul_(2), [2 * 64]),
        (lambda x: x.zero_(), [64]),  # written only
        (lambda x: x.copy_(x.T), [2 * 64]),
        (lambda x: x[:1].expand(4, 4) * x, [16 + 64 + 64]),  # an expanded row is one row
        (lambda x: x.bfloat16(), [64 + 32]),
        (lambda x: torch.relu(x) + x, [2 * 64, 3 * 64]),
        (lambda x: x * x, [2 * 64]),
        (lambda x: torch.addmm(x, x.T, x[0:4], out=x), [4 * 64]),  # three are read
        (lambda x: torch._foreach_mul_([x, x[0]], 2), [2 * (64 + 16)]),  # one launch
        (lambda x: x[torch.zeros(2, dtype=torch.int64)], [2 * 32 + 16, 16]),  # two rows and their numbers
    ],
)
def test_an_operation_reads_its_arguments_and_writes_its_results(
    program: Callable[[Tensor], object], nbytes: list[int]
) -> None:
    assert sorted(kernel.bytes for kernel in kernels(program, (4, 4))) == sorted(nbytes)


def test_operations_between_products_are_one_kernel() -> None:
    def program(x: Tensor, weight: Tensor) -> Tensor:
        x = torch.relu(x) * 2 + 1
        return torch.sigmoid((x @ weight) + x)

    first, second, product = kernels(program, (4, 8), (8, 8), compiled=True)
    assert {first.bytes, second.bytes} == {2 * 128, 3 * 128}  # in, out; product, addend, out
    assert (product.name, product.flops) == ("mm", 2 * 4 * 8 * 8)
    assert len(kernels(program, (4, 8), (8, 8))) == 6


def test_what_does_not_need_a_product_waits_for_what_does() -> None:
    gate, product = kernels(lambda x, weight: torch.sigmoid(x) * (x @ weight), (4, 8), (8, 8), compiled=True)
    assert gate.bytes == 3 * 128
    assert product.name == "mm"


def test_a_kernel_does_not_wait_for_itself() -> None:
    """The first sum is read by the product and by the last sum, so the two sums are not one kernel."""

    def program(x: Tensor, weight: Tensor) -> Tensor:
        x = x + 1
        return x + x @ weight

    first, second, _ = kernels(program, (4, 8), (8, 8), compiled=True)
    assert {first.bytes, second.bytes} == {2 * 128, 3 * 128}


def test_what_needs_a_reduction_to_one_number_is_a_kernel_apart() -> None:
    scale, apply = kernels(lambda x: x / x.abs().max(), (4, 8), compiled=True)
    assert {scale.bytes, apply.bytes} == {128 + 4, 128 + 4 + 128}


def test_unconnected_operations_are_kernels_apart() -> None:
    assert [k.bytes for k in kernels(lambda x, y: (x + 1, y + 1), (4,), (2,), compiled=True)] == [32, 16]
