"""What is put around a finished decoder from outside: recomputation, compilation, sharding. The decoder does not know.

The only module that imports torch.distributed. Everything works on the meta device, so that a model larger than the
memory of one device is never held as a whole (PyTorch's FSDP2 and DTensor; pytorch/torchtitan shows their use), and
is handed block by block to the older FSDP1 where that is asked for.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from meap_lit.errors import UserError
from meap_lit.model.config import DecoderConfig
from meap_lit.model.decoder import Decoder
from meap_lit.model.lora import LoRALinear
from meap_lit.model.norm import RMSNorm, rms_norm
from meap_lit.model.recompute import _blocks

# ---------------------------------------------------------------------------------------- memory and speed


# ------------------------------------------------------------------------------------------------- sharding


def shard(
    decoder: Decoder,
    data_mesh: DeviceMesh,
    tensor_mesh: DeviceMesh | None = None,
    *,
    reshard_after_forward: bool = True,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    cpu_offload: bool = False,
) -> None:
    """Split every block over the devices of the meshes, in place: tensor parallel inside, FSDP2 around it.

    Args:
        decoder: On the meta device or not.
        data_mesh: Devices that read different data: one dimension shards the weights; of two the first replicates and
            the second shards (HSDP).
        tensor_mesh: Devices that read the same data and share each matrix product, if any.
        reshard_after_forward: Give a block's gathered weights back between forward and backward.
        param_dtype: Dtype in which weights are gathered and used; their own if not given.
        reduce_dtype: Dtype in which gradients are reduced; `param_dtype` if not given.
        cpu_offload: Parts and their gradients lie in the host's memory; `decoder` must be on the CPU when it trains.

    Raises:
        UserError: If the heads cannot be divided, or adapters would have to be.
    """
    if tensor_mesh is not None:
        _split_products(decoder, tensor_mesh)
    options: dict[str, Any] = {
        "mesh": data_mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype),
    }
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=data_mesh.device_type == "cuda")
    for block in _blocks(decoder):
        fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
    # the loss reads the head after the forward has ended, so what is left to the root stays gathered until the backward
    fully_shard(decoder, reshard_after_forward=False, **options)


def _split_products(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Query, key, value, gate and up by their outputs, o and down by their inputs: one sum of activations for each half
    of a block (Megatron-LM, arXiv 1909.08053). Embedding, head and norms are whole on every device.
    """
    part_of(decoder.config, mesh.size(), adapted=any(isinstance(module, LoRALinear) for module in decoder.modules()))
    by_output, by_input = ColwiseParallel, RowwiseParallel
    for block in _blocks(decoder):
        plan: dict[str, ParallelStyle] = {f"self_attn.{name}_proj": by_output() for name in "qkv"}
        plan |= {f"mlp.{name}_proj": by_output() for name in ("gate", "up")}
        plan |= {"self_attn.o_proj": by_input(), "mlp.down_proj": by_input()}
        parallelize_module(block, mesh, plan)
        for norm in (block.self_attn.q_norm, block.self_attn.k_norm):
            if isinstance(norm, RMSNorm):
                norm.forward = partial(_norm_of_some_heads, norm, mesh)  # type: ignore[method-assign]


def part_of(config: DecoderConfig, size: int, *, adapted: bool) -> DecoderConfig:
    """Return the decoder that one of `size` tensor-parallel devices computes: its heads and its part of the SwiGLU.

    Args:
        config: The whole decoder.
        size: Devices that share each matrix product.
        adapted: The decoder has adapters.

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
    """The norm of a device's own heads; its weight is one for all heads, so its gradient is summed over the devices."""
    assert norm.eps is not None
    return rms_norm(x, _SumGradient.apply(norm.weight, mesh), norm.eps)


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.group = mesh.get_group()
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


# ---------------------------------------------------------------------------------------------------- FSDP1


def split(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Give each device its part of every parameter, in place, until `flatten`; so it can be filled part by part.

    Args:
        decoder: On the meta device.
        mesh: As for `flatten`.

    Raises:
        UserError: If there are adapters: a flat parameter is of one dtype, and trained or frozen as a whole.
    """
    if any(isinstance(module, LoRALinear) for module in decoder.modules()):
        raise UserError("adapters cannot be flattened with the weights they adapt: use fsdp2.yaml with model.lora")
    placements: list[Placement] = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    for module in decoder.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(distribute_tensor(parameter.data, mesh, placements)))


def flatten(
    module: nn.Module,
    decoder: Decoder,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    reshard_after_forward: bool = True,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> tuple[FullyShardedDataParallel, dict[Tensor, nn.Parameter]]:
    """Hand a `split` decoder to PyTorch's FSDP1, which cuts the weights of a block as one long vector.

    A block at a time is whole on a device. Parameters are vectors from then on, of which a device may hold nothing.

    Args:
        module: Holds `decoder`; its forward takes the loss too, as the head is gathered no longer than that.
        decoder: As `split` left it, and filled; its blocks are wrapped in place.
        mesh: Of one dimension, which shards the weights, or of two, of which the first replicates (HSDP); no part of
            a larger mesh, where FSDP1 would look for tensor parallelism.
        device: This process's.
        reshard_after_forward: Give a block's gathered weights back between forward and backward.
        param_dtype: Dtype in which weights are gathered and used; their own if not given.
        reduce_dtype: Dtype in which gradients are reduced; `param_dtype` if not given.

    Returns:
        The wrapped module, and for every parameter that `decoder` had the one that it has now.
    """
    strategies = {
        (1, True): ShardingStrategy.FULL_SHARD,
        (1, False): ShardingStrategy.SHARD_GRAD_OP,
        (2, True): ShardingStrategy.HYBRID_SHARD,
        (2, False): ShardingStrategy._HYBRID_SHARD_ZERO2,
    }
    wrap = partial(
        FullyShardedDataParallel,
        device_mesh=mesh,
        device_id=device,
        sharding_strategy=strategies[mesh.ndim, reshard_after_forward],
        mixed_precision=MixedPrecision(param_dtype, reduce_dtype, cast_forward_inputs=True),
        use_orig_params=True,
    )
    replaced: dict[Tensor, nn.Parameter] = {}
    for number, block in enumerate(_blocks(decoder)):
        _gather(block, replaced)
        decoder.layers[number] = wrap(block)
    _gather(decoder, replaced)
    root = wrap(module)
    for parameter in replaced.values():
        setattr(parameter, _SHARED_BY, mesh)
    return root, replaced


_SHARED_BY = "_shared_by"
"""Attribute of a flattened parameter: the mesh, which FSDP1 does not write on it."""


def _gather(module: nn.Module, replaced: dict[Tensor, nn.Parameter]) -> None:
    """Make the split parameters of `module` whole, in place; ties stay ties."""
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            part = parameter.data
            if isinstance(part, DTensor):
                if parameter not in replaced:
                    replaced[parameter] = nn.Parameter(part.full_tensor())
                setattr(child, name, replaced[parameter])


# ------------------------------------------------------------------------------------------ parts of parameters


def write_shard(parameter: Tensor, value: Tensor) -> None:
    """Write a whole value into a parameter of which this device may hold a part."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(value)
        return
    local = parameter.to_local()
    whole = value.to(local.device, local.dtype)
    local.copy_(_part_of(whole, parameter))


def _part_of(whole: Tensor, parameter: DTensor) -> Tensor:
    # no public function says which part it is where FSDP2 splits what tensor parallelism has split already
    shape, offset = compute_local_shape_and_global_offset(whole.shape, parameter.device_mesh, parameter.placements)
    return whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients so that their norm over all parameters and devices is at most `max_norm`.

    Returns:
        The norm before, scalar, the same on every device.
    """
    groups = by_mesh(p for p in parameters if p.grad is not None or hasattr(p, _SHARED_BY))
    norms = [_norm_of(group) for group in groups]
    total = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    if not math.isinf(max_norm):
        for group in groups:
            torch.nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total


def _norm_of(group: list[Tensor]) -> Tensor:
    norm = torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
    if isinstance(norm, DTensor):
        return norm.full_tensor()
    mesh = getattr(group[0], _SHARED_BY, None)
    if mesh is None:
        return norm
    squared = norm.to(group[0].device).square()  # of nothing, on a device that holds no part of these: 0
    torch.distributed.all_reduce(squared, group=mesh.get_group("shard"))
    return squared.sqrt()


def is_finite(parameters: Iterable[Tensor]) -> Tensor:
    """Return whether this device's parts of the parameters hold neither an infinity nor a NaN, scalar, bool.

    Nothing as large as a parameter is allocated: the largest absolute value tells.
    """
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    return torch.nn.utils.get_total_norm([part.detach() for part in parts if part.numel()], math.inf).isfinite()


def by_mesh(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters grouped by the devices that share them: one operation takes tensors of a single group."""
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else getattr(parameter, _SHARED_BY, None)
        groups[mesh].append(parameter)
    return list(groups.values())
