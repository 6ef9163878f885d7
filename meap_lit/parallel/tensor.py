"""Share each matrix product among the devices of a mesh, which read the same data (tensor parallelism)."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from meap_lit.errors import UserError
from meap_lit.model.config import DecoderConfig
from meap_lit.model.decoder import Decoder, Head
from meap_lit.model.lora import LoRALinear
from meap_lit.model.loss import linear_cross_entropy_of_rows
from meap_lit.model.norm import RMSNorm, rms_norm
from meap_lit.model.recompute import blocks_of


def split_products(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Shard query, key, value, gate and up by their outputs, o and down by their inputs.

    Each half of a block then needs one sum of activations, and one of their gradients (Megatron-LM, arXiv 1909.08053).
    Embedding, head and norms are whole on every device; of the loss each device computes a part of the rows.

    Raises:
        UserError: As for `part_of`.
    """
    part_of(decoder.config, mesh.size(), adapted=any(isinstance(module, LoRALinear) for module in decoder.modules()))
    by_output, by_input = ColwiseParallel, RowwiseParallel
    for block in blocks_of(decoder):
        plan: dict[str, ParallelStyle] = {f"self_attn.{name}_proj": by_output() for name in "qkv"}
        plan |= {f"mlp.{name}_proj": by_output() for name in ("gate", "up")}
        plan |= {"self_attn.o_proj": by_input(), "mlp.down_proj": by_input()}
        # the products that read the same input then sum its gradient together, not each for itself
        whole = Replicate()
        plan["self_attn"] = PrepareModuleInput(
            input_layouts=(whole, None, None, None), desired_input_layouts=(whole, None, None, None)
        )
        plan["mlp"] = PrepareModuleInput(input_layouts=(whole,), desired_input_layouts=(whole,))
        parallelize_module(block, mesh, plan)
        for norm in (block.self_attn.q_norm, block.self_attn.k_norm):
            if isinstance(norm, RMSNorm):
                norm.forward = partial(_norm_of_some_heads, norm, mesh)  # type: ignore[method-assign]
    decoder.lm_head.loss = partial(_loss_of_own_rows, decoder.lm_head, mesh)  # type: ignore[method-assign]


def part_of(config: DecoderConfig, size: int, *, adapted: bool) -> DecoderConfig:
    """Return the decoder that one of `size` tensor-parallel devices computes: its heads and its part of the SwiGLU.

    Raises:
        UserError: If heads or SwiGLU cannot be divided, or adapters would have to be.
    """
    parts = {}
    for name in ("num_heads", "num_kv_heads", "intermediate_size"):
        whole = getattr(config, name)
        if whole % size:
            raise UserError(
                f"decoder.{name} {whole} cannot be divided among tensor_parallel_size {size} devices; lower "
                f"trainer.strategy.tensor_parallel_size"
            )
        parts[name] = whole // size
    if adapted and size > 1:
        raise UserError("adapters cannot be split: use trainer.strategy.tensor_parallel_size 1 with model.lora")
    return replace(config, **parts, head_dim=config.head_width)


def _norm_of_some_heads(norm: RMSNorm, mesh: DeviceMesh, x: Tensor) -> Tensor:
    """Normalize a device's own heads. All heads share one weight, so its gradient is summed over the devices."""
    assert norm.eps is not None
    return rms_norm(x, _sum_gradient(norm.weight, mesh), norm.eps)


def _loss_of_own_rows(
    head: Head, mesh: DeviceMesh, hidden: Tensor, labels: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what `Head.loss` does, the same on every device, though each computes only its part of the rows."""
    if positions is None:
        positions = torch.arange(labels.numel(), device=labels.device)
    own = positions.tensor_split(mesh.size())[mesh.get_local_rank()]
    hidden = _sum_gradient(hidden, mesh)
    weight = _sum_gradient(head.weight, mesh)  # last: autograd then sums it first, before FSDP2 takes the gradient
    total, losses = linear_cross_entropy_of_rows(hidden, weight, labels, own)
    return _Sum.apply(total, mesh), _summed(losses, mesh)


def _summed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    total = x.clone()
    torch.distributed.all_reduce(total, group=mesh.get_group())
    return total


def _sum_gradient(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return `x`, which all devices have alike, for a use of which each computes a part: the gradients are summed."""
    return _SumGradient.apply(x, mesh)


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.mesh), None


class _Sum(torch.autograd.Function):
    """Sum over the devices, whose gradient all have alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        return _summed(x, mesh)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
