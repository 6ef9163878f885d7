"""What the plan adds for FSDP2, against FSDP2 itself on fake tensors, in a process group without other processes."""

import importlib
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.testing._internal.distributed.fake_pg import FakeStore

from meap_lit.model import Decoder, DecoderConfig
from meap_lit.model.recompute import checkpoint_and_compile
from meap_lit.parallel.sharding import shard
from meap_lit.planning.devices import Devices
from meap_lit.planning.fake_step import _CountBytes
from meap_lit.planning.memory import Step, memory_of
from tests.support.toy_module import fork

CONFIG = DecoderConfig(
    num_layers=3, num_heads=8, num_kv_heads=4, hidden_size=256, intermediate_size=704, vocab_size=16_000
)
ROWS, SEQ_LEN = 2, 256


def counted(function, count):
    """A function of FSDP2 that allocates or frees the memory of a gathered weight, counted."""

    def run(tensor):
        before = tensor.untyped_storage().nbytes()
        function(tensor)
        count._add(tensor.untyped_storage().nbytes() - before, False)

    return run


@pytest.mark.parametrize("num_devices", [2, 8])
@pytest.mark.parametrize("activation_checkpointing", ["none", "full"])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_the_peak_is_that_of_fsdp2(num_devices, activation_checkpointing, tie_embeddings, monkeypatch):
    importlib.import_module("torch.distributed._tools.fake_collectives")  # collectives of fake tensors

    def compare():
        dist.init_process_group("fake", rank=0, world_size=num_devices, store=FakeStore())
        mesh = init_device_mesh("cpu", (num_devices,))
        config = replace(CONFIG, tie_embeddings=tie_embeddings)
        dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        with FakeTensorMode(allow_non_fake_inputs=True):
            decoder = Decoder(config)
            checkpoint_and_compile(decoder, activation_checkpointing, compile=False)
            shard(decoder, mesh, **dtypes)
            input_ids = torch.zeros(ROWS, SEQ_LEN, dtype=torch.int64)
            with _CountBytes([parameter.to_local().detach() for parameter in decoder.parameters()]) as count:
                for name in ("alloc_storage", "free_storage"):
                    monkeypatch.setattr(_fsdp_param, name, counted(getattr(_fsdp_param, name), count))
                for _ in range(2):  # in the second micro-batch gradients accumulate
                    with torch.autocast("cpu", torch.bfloat16):
                        hidden = decoder(input_ids)
                        loss, _ = decoder.lm_head.loss(hidden, input_ids)
                    del hidden
                    forward = count.start_phase()
                    loss.backward()
                    backward = max(count.before_embedding, count.start_phase())
        devices = Devices(mesh.size(), shard_size=mesh.size(), fsdp=True, **dtypes)
        memory = memory_of(
            Step(config, ROWS * SEQ_LEN, SEQ_LEN, activation_checkpointing=activation_checkpointing, devices=devices)
        )
        kept = memory.gradients + memory.gathered + memory.activations + memory.copies
        assert kept + memory.loss == pytest.approx(forward, rel=0.1)
        assert kept + memory.backward == pytest.approx(backward, rel=0.1)

    assert fork(compare) == [0]  # apart, since torch remembers which place in a mesh a process has
