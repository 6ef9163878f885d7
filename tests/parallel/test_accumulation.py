"""Which sums over devices a micro-batch takes, counted in a process group without other processes."""

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from meap_lit.model import Decoder, DecoderConfig
from meap_lit.parallel.sharding import shard
from meap_lit.parallel.strategies import Sharded
from tests.support.toy_module import fork

CONFIG = DecoderConfig(num_layers=2, num_heads=2, num_kv_heads=2, hidden_size=16, intermediate_size=32, vocab_size=32)
UNITS = 5  # embedding, two blocks, head, and the root with the final norm


class CountCollectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.counts[function._schema.name.split("::")[1]] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("reduce_each_micro_batch", "scattered"), [(True, [UNITS, UNITS]), (False, [0, UNITS])])
def test_a_step_is_summed_over_copies_once(reduce_each_micro_batch, scattered):
    def count():
        dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
        decoder = Decoder(CONFIG)
        shard(decoder, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
        strategy = Sharded(reduce_each_micro_batch=reduce_each_micro_batch)
        strategy._lightning_module = SimpleNamespace(decoder=decoder)
        input_ids = torch.zeros(1, 8, dtype=torch.int64)
        counts = []
        for waits in (strategy.block_backward_sync(), nullcontext()):  # a micro-batch, and the last of its step
            with CountCollectives() as mode, waits:
                decoder.lm_head.loss(decoder(input_ids), input_ids)[0].backward()
            counts.append(mode.counts)
        assert [count["_reduce_scatter_base_"] for count in counts] == scattered
        assert [count["allreduce_"] for count in counts] == [0, UNITS]
        assert all(parameter.grad is not None for parameter in decoder.parameters())

    assert fork(count) == [0]  # apart, since torch remembers which place in a mesh a process has
