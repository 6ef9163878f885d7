"""Shard a finished decoder over devices from outside, and work with parameters that a device holds in part.

The decoder has no code for it. Everything works on the meta device, so that a model larger than the memory of one
device is never held as a whole (PyTorch's FSDP2 and DTensor; pytorch/torchtitan shows their use).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from meap_lit.model.decoder import Decoder
from meap_lit.model.recompute import blocks_of
from meap_lit.parallel.tensor import split_products


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
    """Shard every block over the devices of the meshes, in place: tensor parallel inside, FSDP2 around it.

    Args:
        decoder: On the meta device or not.
        data_mesh: Devices that read different data: one dimension shards the weights; of two the first replicates and
            the second shards (HSDP).
        tensor_mesh: Devices that read the same data and share each matrix product, if any.
        reshard_after_forward: Give a block's gathered weights back between forward and backward.
        param_dtype: Dtype in which weights are gathered and used; their own if not given.
        reduce_dtype: Dtype in which gradients are reduced; `param_dtype` if not given.
        cpu_offload: Keep shards and their gradients in the host's memory; `decoder` must be on the CPU when it trains.

    Raises:
        UserError: If the heads cannot be divided, or adapters would have to be.
    """
    if tensor_mesh is not None:
        split_products(decoder, tensor_mesh)
    options: dict[str, Any] = {
        "mesh": data_mesh,
        # the residual stream and the rotation angles stay in float32, as on one device
        "mp_policy": MixedPrecisionPolicy(param_dtype, reduce_dtype, cast_forward_inputs=False),
    }
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=data_mesh.device_type == "cuda")
    units = list(_sharded_units(decoder, reshard_after_forward, options))
    for unit, following in pairwise(units):
        unit.set_modules_to_forward_prefetch([following])
    fully_shard(decoder, reshard_after_forward=False, **options)  # the final norm, and a weight that is tied


def _sharded_units(decoder: Decoder, reshard_after_forward: bool, options: dict[str, Any]) -> Iterator[FSDPModule]:
    """Shard the parts of `decoder` that are gathered one at a time, and return them in the order of the forward.

    A tied weight is that of the first and of the last of them. It is left to the root, which stays gathered.
    """
    tied = decoder.config.tie_embeddings
    if not tied:
        embedding = fully_shard(decoder.embed_tokens, reshard_after_forward=reshard_after_forward, **options)
        embedding.set_unshard_in_backward(False)  # its backward does not read the weight
        yield embedding
    *others, last = blocks_of(decoder)
    for block in others:
        yield fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
    yield fully_shard(last, reshard_after_forward=False, **options)  # its backward comes first
    if not tied:  # the loss forms the gradient of the head, which is reduced while the blocks compute theirs
        head = fully_shard(decoder.lm_head, reshard_after_forward=False, **options)
        register_fsdp_forward_method(decoder.lm_head, "loss")
        yield head


def write_shard(parameter: Tensor, value: Tensor) -> None:
    """Write a whole value into a parameter, of which this device may hold one shard."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(value)
        return
    local = parameter.to_local()
    whole = value.to(local.device, local.dtype)
    # no public function returns the place of a shard where FSDP2 shards what tensor parallelism has sharded already
    shape, offset = compute_local_shape_and_global_offset(whole.shape, parameter.device_mesh, parameter.placements)
    local.copy_(whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))])


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients so that their norm over all parameters and devices is at most `max_norm`.

    Returns:
        The norm before, scalar, the same on every device.
    """
    groups: dict[Any, list[Tensor]] = defaultdict(list)  # by mesh: one operation takes tensors of one mesh
    for parameter in parameters:
        if parameter.grad is not None:
            groups[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    if not math.isinf(max_norm):
        for group in groups.values():
            torch.nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total


def is_finite(parameters: Iterable[Tensor]) -> Tensor:
    """Return whether this device's shards of the parameters hold neither an infinity nor a NaN, scalar, bool.

    The largest absolute value tells, so nothing as large as a parameter is allocated.
    """
    shards = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    return torch.nn.utils.get_total_norm([shard.detach() for shard in shards if shard.numel()], math.inf).isfinite()
