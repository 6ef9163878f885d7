"""The fused loss against plain cross entropy over the full logits."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from meap_lit.model import IGNORE_INDEX, linear_cross_entropy, loss


def inputs(rows: tuple[int, ...], width: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocab, rows, generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden @ weight.T).flatten(0, -2)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Limits a piece to 100 logits; the sizes of the pieces that were taken are appended to the list."""
    monkeypatch.setattr(loss, "piece_rows", lambda vocab_size: max(1, 100 // vocab_size))
    sizes: list[int] = []
    log_softmax = F.log_softmax

    def recorded(logits: Tensor, **kwargs: object) -> Tensor:
        sizes.append(logits.size(0))
        return log_softmax(logits, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(loss.F, "log_softmax", recorded)
    return sizes


def test_by_hand() -> None:
    """Logits (0, ln 3) and (ln 3, 0): the second class has probability 3/4 and 1/4."""
    hidden = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0], [9.0, 9.0]], requires_grad=True)
    total, _ = linear_cross_entropy(hidden, torch.eye(2), torch.tensor([1, 1, IGNORE_INDEX]))
    total.backward()
    torch.testing.assert_close(total.detach(), torch.tensor(math.log(4 / 3) + math.log(4)))
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.25, -0.25], [0.75, -0.75], [0.0, 0.0]]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("rows", "width", "vocab", "expected_pieces"),
    [
        ((3, 7), 8, 20, [5, 5, 5, 5, 1]),
        ((10,), 4, 20, [5, 5]),
        ((2, 2, 2), 4, 33, [3, 3, 2]),
        ((4,), 3, 250, [1, 1, 1, 1]),  # a row may exceed the limit
        ((1, 1), 2, 2, [1]),
    ],
)
@pytest.mark.parametrize("ignored", [False, True])
def test_value_and_gradients_are_those_of_plain_cross_entropy(
    rows: tuple[int, ...],
    width: int,
    vocab: int,
    expected_pieces: list[int],
    dtype: torch.dtype,
    tolerance: float,
    ignored: bool,
    pieces: list[int],
) -> None:
    hidden, weight, labels = inputs(rows, width, vocab, dtype)
    if ignored:
        labels.view(-1)[::3] = IGNORE_INDEX
    total, _ = linear_cross_entropy(hidden, weight, labels)
    assert pieces == expected_pieces
    assert total.dtype == dtype
    expected = plain(hidden, weight, labels)
    torch.testing.assert_close(total, expected, atol=tolerance, rtol=tolerance)
    gradients = torch.autograd.grad(total * 0.37, (hidden, weight))
    for ours, theirs in zip(gradients, torch.autograd.grad(expected * 0.37, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_are_those_of_plain_cross_entropy(dtype: torch.dtype, pieces: list[int]) -> None:
    hidden, weight, labels = inputs((3, 7), 8, 20, dtype)
    labels[:, ::3] = IGNORE_INDEX
    total, rows = linear_cross_entropy(hidden, weight, labels)
    assert len(pieces) > 1
    assert (rows.dtype, rows.shape, rows.requires_grad) == (torch.float32, labels.shape, False)
    logits = (hidden @ weight.T).flatten(0, -2)
    expected = F.cross_entropy(logits.float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    torch.testing.assert_close(rows.flatten(), expected.detach(), atol=1e-5, rtol=1e-5)
    assert not rows[labels == IGNORE_INDEX].any()
    assert rows[labels != IGNORE_INDEX].all()
    torch.testing.assert_close(rows.sum().to(total.dtype), total.detach(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("vocab_size", "expected"), [(2048, 16384), (32_064, 1024), (50_257, 1024), (128 * 1024, 1024), (100, 335_360)]
)
def test_a_piece_is_large_enough_for_a_large_vocabulary(vocab_size: int, expected: int) -> None:
    assert loss.piece_rows(vocab_size) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_piece_takes_its_softmax_in_parts(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """7 rows are one piece of a product, and three parts of at most 60 logits in the softmax."""
    hidden, weight, labels = inputs((7,), 8, 20, dtype)
    labels[::3] = IGNORE_INDEX
    leaves = hidden, weight
    whole, rows = linear_cross_entropy(hidden, weight, labels)
    whole_gradients = torch.autograd.grad(whole, leaves)
    parts: list[torch.Size] = []
    monkeypatch.setattr(loss, "MAX_LOGITS", 60)
    with RecordShapes(parts):
        total, rows_of_parts = linear_cross_entropy(hidden, weight, labels)
    assert parts.count(torch.Size([7, 20])) == 1, "the products were taken in parts"
    assert torch.Size([3, 20]) in parts, "the softmax was not"
    torch.testing.assert_close(rows_of_parts, rows)
    for gradient, expected in zip(torch.autograd.grad(total, leaves), whole_gradients, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_rows_without_label_are_left_out_where_their_places_are_given(pieces: list[int]) -> None:
    hidden, weight, labels = inputs((3, 7), 8, 20, torch.float64)
    labels[labels % 3 > 0] = IGNORE_INDEX
    positions = (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
    assert 5 < len(positions) < 16
    leaves = hidden, weight
    total, rows = linear_cross_entropy(hidden, weight, labels, positions)
    assert sum(pieces) == len(positions)
    expected, expected_rows = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(rows, expected_rows)
    theirs = torch.autograd.grad(expected, leaves)
    for gradient, wanted in zip(torch.autograd.grad(total, leaves), theirs, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_no_places_at_all() -> None:
    hidden, weight, labels = inputs((3, 7), 8, 20, torch.float32)
    total, rows = linear_cross_entropy(hidden, weight, labels, torch.empty(0, dtype=torch.int64))
    total.backward()
    assert total.item() == 0
    assert rows.shape == labels.shape
    assert not rows.any()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_rows_without_grad_mode() -> None:
    hidden, weight, labels = inputs((5,), 4, 20, torch.float32)
    with torch.no_grad():
        total, rows = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(total, rows.sum())
    assert not total.requires_grad


def test_all_rows_ignored_gives_zero_and_zero_gradients(pieces: list[int]) -> None:
    hidden, weight, labels = inputs((3, 7), 8, 20, torch.float32)
    total, _ = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE_INDEX))
    total.backward()
    assert len(pieces) > 1
    assert total.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_no_rows_at_all() -> None:
    hidden, weight, labels = inputs((0, 7), 8, 20, torch.float32)
    total, _ = linear_cross_entropy(hidden, weight, labels)
    total.backward()
    assert total.item() == 0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_tied_weight_collects_both_gradients(pieces: list[int]) -> None:
    _, weight, labels = inputs((3, 7), 8, 20, torch.float64)
    input_ids = labels.roll(1, dims=1)
    (ours,) = torch.autograd.grad(linear_cross_entropy(F.embedding(input_ids, weight), weight, labels)[0], weight)
    (theirs,) = torch.autograd.grad(plain(F.embedding(input_ids, weight), weight, labels), weight)
    assert len(pieces) > 1
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_one_gradient_alone(trained: str, pieces: list[int]) -> None:
    hidden, weight, labels = inputs((3, 7), 8, 20, torch.float64)
    leaf = {"hidden": hidden, "weight": weight}[trained]
    (theirs,) = torch.autograd.grad(plain(hidden, weight, labels), leaf)
    hidden.requires_grad_(trained == "hidden")
    weight.requires_grad_(trained == "weight")
    total, _ = linear_cross_entropy(hidden, weight, labels)
    total.backward()
    assert len(pieces) > 1
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, theirs)
    assert hidden.grad is None or weight.grad is None


def test_a_second_backward_is_refused() -> None:
    """The gradients are scaled in place, so it would find them scaled already."""
    hidden, weight, labels = inputs((3, 7), 8, 20, torch.float64)
    total, _ = linear_cross_entropy(hidden, weight, labels)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("scale", [1.0, 0.125, -3.0])
def test_a_factor_on_the_loss_is_one_on_its_gradients(scale: float, pieces: list[int]) -> None:
    hidden, weight, labels = inputs((3, 7), 8, 20, torch.float64)
    leaves = hidden, weight
    ours = torch.autograd.grad(scale * linear_cross_entropy(hidden, weight, labels)[0], leaves)
    assert len(pieces) > 1
    for gradient, expected in zip(ours, torch.autograd.grad(plain(hidden, weight, labels), leaves), strict=True):
        torch.testing.assert_close(gradient, scale * expected)


def test_without_grad_mode_the_value_is_the_same_and_no_gradient_is_formed(pieces: list[int]) -> None:
    hidden, weight, labels = inputs((3, 7), 8, 20, torch.float32)
    expected = linear_cross_entropy(hidden, weight, labels)[0]
    shapes: list[torch.Size] = []
    with torch.no_grad(), RecordShapes(shapes):
        total, _ = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(total, expected)
    assert not total.requires_grad
    assert len(pieces) > 1
    assert torch.Size([5, 20]) in shapes, "no logits were seen"
    assert not {hidden.flatten(0, 1).shape, weight.shape} & set(shapes), "a gradient was formed"


def test_bf16_autocast_is_as_close_as_plain_autocast(pieces: list[int]) -> None:
    hidden, weight, labels = inputs((3, 7), 64, 20, torch.float32)
    exact = plain(hidden.double(), weight.double(), labels)
    exact_gradients = torch.autograd.grad(exact, (hidden, weight))
    errors = {}
    for name, function in (("ours", lambda *x: linear_cross_entropy(*x)[0]), ("plain", plain)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = function(hidden, weight, labels)
        assert total.dtype == torch.float32
        gradients = torch.autograd.grad(total, (hidden, weight))
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        errors[name] = [abs(total - exact).item() / exact.item()] + [
            ((ours - theirs).norm() / theirs.norm()).item()
            for ours, theirs in zip(gradients, exact_gradients, strict=True)
        ]
    assert len(pieces) > 1
    assert max(errors["ours"]) < 0.02
    for ours, theirs in zip(errors["ours"], errors["plain"], strict=True):
        assert ours < 1.5 * theirs + 1e-3


def test_bf16_head_gradient_accumulates_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed in bfloat16, 512 pieces of one row each would lose most of their small terms."""
    monkeypatch.setattr(loss, "piece_rows", lambda vocab_size: 1)
    hidden, weight, labels = inputs((512,), 16, 8, torch.bfloat16)
    (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels)[0], weight)
    (exact,) = torch.autograd.grad(plain(hidden.double(), weight.double(), labels), weight)
    assert gradient.dtype == torch.bfloat16
    assert (gradient.double() - exact).norm() / exact.norm() < 0.01


def test_logits_are_never_whole(pieces: list[int]) -> None:
    """Neither saved for the backward nor formed on the way; the largest tensors are those of one piece."""
    hidden, weight, labels = inputs((10, 20), 4, 30, torch.float32)
    saved: list[torch.Size] = []
    formed: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), RecordShapes(formed):
        total, _ = linear_cross_entropy(hidden, weight, labels)
    total.backward()
    assert len(pieces) > 60
    assert sorted(saved) == sorted([torch.Size([200, 4]), torch.Size([30, 4])])
    assert torch.Size([3, 30]) in formed, "no logits were seen"
    assert max(shape.numel() for shape in formed) <= hidden.numel()


class RecordShapes(torch.utils._python_dispatch.TorchDispatchMode):
    """Append the shape of every tensor that an operation makes."""

    def __init__(self, shapes: list[torch.Size]) -> None:
        super().__init__()
        self.shapes = shapes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not function.is_view:
            self.shapes.append(result.shape)
        return result


class LiveBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the memory of all tensors made under it that are still held, and its peak."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not function.is_view:
            self._count(result.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.storages:
            self.storages[key] = storage.nbytes()
            weakref.finalize(storage, self.storages.pop, key)
            self.peak = max(self.peak, self.held())

    def held(self) -> int:
        return sum(self.storages.values())


def test_live_bytes_are_counted() -> None:
    with LiveBytes() as live:
        first = torch.zeros(100)  # 400 bytes, and as many again for a moment
        (first + 1).sum()
        second = first.view(50, 2)[1:]
        assert live.held() == 400
        del first, second
    assert (live.peak, live.held()) == (804, 0)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_large_vocabulary_takes_less_than_two_gigabytes(autocast: bool) -> None:
    """128K entries and 8 x 4,096 tokens, beside weights and their gradients; sizes only, nothing is computed."""
    vocab, tokens, width = 128 * 1024, 8 * 4096, 4096
    dtype = torch.bfloat16 if autocast else torch.float32  # as the final norm returns it
    with FakeTensorMode():
        hidden = torch.empty(tokens, width, dtype=dtype, requires_grad=True)
        weight = torch.empty(vocab, width, requires_grad=True)
        labels = torch.empty(tokens, dtype=torch.int64)
        with LiveBytes() as live, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            gradients = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels)[0] / tokens, (hidden, weight))
        assert live.held() == sum(gradient.nbytes for gradient in gradients)
    beyond = live.peak - 4 * width * vocab
    assert hidden.nbytes < beyond < 2e9


@pytest.mark.parametrize("scaled", [False, True])
def test_the_gradient_that_the_forward_forms_becomes_that_of_the_head(scaled: bool) -> None:
    """Neither the backward nor the accumulation makes a copy."""
    hidden, weight, labels = inputs((3, 7), 8, 20, torch.float32)
    total, _ = linear_cross_entropy(hidden, weight, labels)
    formed = [saved.data_ptr() for saved in total.grad_fn.saved_tensors]  # type: ignore[union-attr]
    (total / 21 if scaled else total).backward()
    assert weight.grad is not None
    assert weight.grad.data_ptr() in formed
