"""Devices that share each matrix product, as real processes (gloo)."""

import os
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from meap_lit.model import IGNORE_INDEX, Decoder, DecoderConfig
from meap_lit.parallel import tensor
from meap_lit.parallel.sharding import shard
from tests.support.toy_module import fork

TOY = DecoderConfig(
    num_layers=1, num_heads=3, num_kv_heads=3, hidden_size=24, intermediate_size=48, vocab_size=40, max_seq_len=9
)


def losses(decoder, labels, positions):
    """Loss, those of the rows, and gradients of the hidden states and the head."""
    hidden = torch.randn(*labels.shape, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    total, rows = decoder.lm_head.loss(hidden, labels, positions)
    (total * 0.5).backward()
    return total.detach(), rows, hidden.grad, decoder.lm_head.weight.grad


@pytest.mark.parametrize("num_supervised", [None, 7, 1])
def test_each_device_computes_the_loss_of_a_part_of_the_rows(num_supervised):
    """13 rows, or some of them, on 3 devices; the last has none of 1."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(40, (1, 13), generator=generator)
    positions = None
    if num_supervised is not None:
        positions = torch.randperm(13, generator=generator)[:num_supervised].sort().values
        unsupervised = torch.ones(13, dtype=torch.bool).index_fill(0, positions, False)
        labels[0, unsupervised] = IGNORE_INDEX
    torch.manual_seed(0)
    decoder = Decoder(TOY)
    expected = losses(decoder, labels, positions)
    decoder.zero_grad()

    def compute():
        os.environ["RANK"] = os.environ["LOCAL_RANK"]
        mesh = init_device_mesh("cpu", (3,))
        tensor.split_products(decoder, mesh)
        num_rows, whole = [], tensor.linear_cross_entropy
        tensor.linear_cross_entropy = lambda *x: num_rows.append(len(x[-1])) or whole(*x)
        for ours, one_process in zip(losses(decoder, labels, positions), expected, strict=True):
            torch.testing.assert_close(ours, one_process, atol=1e-6, rtol=1e-5)
        total = num_supervised or 13
        assert num_rows == [total // 3 + (mesh.get_rank() < total % 3)]

    assert fork(compute, 3) == [0, 0, 0]


def gradients(decoder, input_ids):
    """Those of two equal micro-batches."""
    for _ in range(2):
        decoder.lm_head.loss(decoder(input_ids), input_ids.roll(-1, 1))[0].backward()
    return {name: parameter.grad for name, parameter in decoder.named_parameters()}


class CountCollectives(TorchDispatchMode):
    """Counts what devices exchange by DTensor: the hidden states of a row, whole or a part, and their gradients."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (name := str(function).split(".")[1]) in (GATHERED, SUMMED, SHARED):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


GATHERED, SUMMED, SHARED = "all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor"


@pytest.mark.parametrize(
    ("seq_len", "forward", "backward"),
    [
        # attention and MLP gather their input and share out their sums; the loss reads all positions; of each norm,
        # which has a part of them, the gradient of the weight is summed
        (9, {GATHERED: 3, SHARED: 2}, {GATHERED: 3, SHARED: 2, SUMMED: 3}),
        (8, {SUMMED: 2}, {SUMMED: 2}),  # not to be divided among three
    ],
)
def test_a_block_exchanges_hidden_states_twice_and_their_gradients_twice(seq_len, forward, backward):
    """Once for the attention and once for the MLP, however many products read the same."""

    def count():
        dist.init_process_group("fake", rank=0, world_size=3, store=FakeStore())
        decoder, sizes = Decoder(TOY), []
        tensor.split_products(decoder, init_device_mesh("cpu", (3,)))
        decoder.layers[0].register_forward_hook(lambda *args: sizes.append(args[-1].shape))
        with CountCollectives() as exchanged:
            hidden = decoder(torch.zeros(1, seq_len, dtype=torch.int64))
        assert exchanged.counts == forward
        with CountCollectives() as exchanged:
            hidden.sum().backward()
        assert exchanged.counts == backward
        assert hidden.shape == (1, seq_len, 24)
        assert sizes == [(1, 3 if seq_len == 9 else 8, 24)]

    assert fork(count) == [0]  # apart, since torch remembers which place in a mesh a process has


@pytest.mark.filterwarnings("ignore:While redistributing")
@pytest.mark.parametrize(("seq_len", "tie_embeddings"), [(8, False), (8, True), (7, False)])
def test_gradients_are_those_of_one_process(seq_len, tie_embeddings):
    """Two pairs of devices, with FSDP2 over the pairs; each pair has a row of its own, and may divide its positions."""
    torch.manual_seed(0)
    config = replace(TOY, num_layers=2, num_heads=4, num_kv_heads=2, qk_norm=True, tie_embeddings=tie_embeddings)
    decoder = Decoder(config)
    input_ids = torch.randint(40, (2, seq_len))
    expected = {name: grad.clone() for name, grad in gradients(decoder, input_ids).items()}
    decoder.zero_grad()

    def compute():
        os.environ["RANK"] = os.environ["LOCAL_RANK"]
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
        shard(decoder, mesh["shard"], mesh["tensor"])
        row = mesh["shard"].get_local_rank()
        for name, grad in gradients(decoder, input_ids[row : row + 1]).items():
            torch.testing.assert_close(2 * grad.full_tensor(), expected[name], atol=1e-5, rtol=1e-4, msg=name)

    assert fork(compute, 4) == [0, 0, 0, 0]
