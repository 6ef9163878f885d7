"""Devices that share each matrix product, as real processes (gloo)."""

import os

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from meap_lit.model import IGNORE_INDEX, Decoder, DecoderConfig
from meap_lit.parallel import tensor
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
