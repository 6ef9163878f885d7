"""Devices that share each matrix product, as real processes (gloo)."""

import os
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
    num_layers=1, num_heads=3, num_kv_heads=3, hidden_size=24, intermediate_size=48, vocab_size=40, max_seq_len=8
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
        num_rows, whole = [], tensor.linear_cross_entropy_of_rows
        tensor.linear_cross_entropy_of_rows = lambda *x: num_rows.append(len(x[-1])) or whole(*x)
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


class CountSums(TorchDispatchMode):
    """Counts sums over the devices of hidden states, [1, 8, 24]."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops._c10d_functional.all_reduce.default:
            assert args[0].shape == (1, 8, 24)
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_block_sums_hidden_states_twice_and_their_gradients_twice():
    """Once for the attention and once for the MLP, however many products read the same."""
    dist.init_process_group("fake", rank=0, world_size=3, store=FakeStore())
    try:
        decoder = Decoder(TOY)
        tensor.split_products(decoder, init_device_mesh("cpu", (3,)))
        with CountSums() as sums:
            hidden = decoder(torch.zeros(1, 8, dtype=torch.int64))
        assert sums.count == 2
        with CountSums() as sums:
            hidden.sum().backward()
        assert sums.count == 2
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:While redistributing")
def test_gradients_are_those_of_one_process():
    """Two pairs of devices, with FSDP2 over the pairs; each pair has a row of its own."""
    torch.manual_seed(0)
    decoder = Decoder(replace(TOY, num_layers=2, num_heads=4, num_kv_heads=2, qk_norm=True))
    input_ids = torch.randint(40, (2, 8))
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
