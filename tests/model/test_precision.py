"""Under autocast the dtypes are those that FSDP2 gathers, so both compute the same."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from meap_lit.model import Decoder, DecoderConfig
from meap_lit.parallel.sharding import shard
from tests.support.toy_module import fork

IDS = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(0))


def decoder(tie_embeddings: bool) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(
        DecoderConfig(
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            hidden_size=32,
            intermediate_size=48,
            vocab_size=64,
            max_seq_len=32,
            qk_norm=True,
            tie_embeddings=tie_embeddings,
        )
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:  # a weight of 1 would be the same in every dtype
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def two_micro_batches(model: Decoder) -> tuple[list[float], dict[str, Tensor]]:
    losses = []
    for ids in IDS.split(1):
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = model.lm_head.loss(model(ids), ids.roll(-1))
        loss.backward()
        losses.append(loss.item())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_fsdp_computes_what_one_device_does(tie_embeddings: bool) -> None:
    """To the bit, but for the gradient of the embedding, which FSDP2 sums over tokens in bfloat16."""

    def compare() -> None:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        sharded = decoder(tie_embeddings)
        shard(sharded, init_device_mesh("cpu", (1,)), param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        losses, gradients = two_micro_batches(sharded)
        expected_losses, expected = two_micro_batches(decoder(tie_embeddings))
        assert losses == expected_losses
        assert gradients.keys() == expected.keys()
        embedding = "embed_tokens.weight"
        summed, exact = gradients.pop(embedding), expected.pop(embedding)
        assert (summed - exact).norm() < 0.005 * exact.norm()
        for name, gradient in gradients.items():
            assert torch.equal(gradient, expected[name]), name

    assert fork(compare) == [0]  # apart: the threads of a process group end with its process


def test_the_residual_stream_is_in_float32() -> None:
    model, dtypes = decoder(False), []
    model.layers[1].register_forward_pre_hook(lambda _, args: dtypes.extend(x.dtype for x in args[:3]))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(IDS).dtype == torch.bfloat16
    assert dtypes == [torch.float32] * 3


def test_without_autocast_nothing_is_cast() -> None:
    model, dtypes = decoder(False).to(torch.bfloat16), []
    model.layers[1].register_forward_pre_hook(lambda _, args: dtypes.append(args[0].dtype))
    assert model(IDS).dtype == torch.bfloat16
    assert dtypes == [torch.bfloat16]
