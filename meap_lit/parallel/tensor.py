"""Share each matrix product among the devices of a mesh, which read the same data (tensor parallelism).

Between the products each device holds a part of the positions only (sequence parallelism, arXiv 2205.05198), so that
norms and the residual stream are divided, too.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from meap_lit.errors import UserError
from meap_lit.model.config import DecoderConfig
from meap_lit.model.decoder import Decoder, Head
from meap_lit.model.lora import LoRALinear
from meap_lit.model.loss import linear_cross_entropy
from meap_lit.model.norm import RMSNorm, rms_norm
from meap_lit.model.recompute import blocks_of


def split_products(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Shard query, key, value, gate and up by their outputs, o and down by their inputs (arXiv 1909.08053).

    Each half of a block gathers its input over the positions, and sums its output so that each device gets its
    positions; the backward does the reverse. Embedding, head and the weights of norms are whole on every device; of the
    loss each device computes a part of the rows.

    Raises:
        UserError: As for `part_of`.
    """
    part_of(decoder.config, mesh.size(), adapted=any(isinstance(module, LoRALinear) for module in decoder.modules()))
    stream = _ResidualStream(mesh)
    decoder.register_forward_pre_hook(stream.start)
    decoder.embed_tokens.register_forward_hook(stream.own_positions)
    for block in blocks_of(decoder):
        plan: dict[str, ParallelStyle] = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        plan |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
        for name in ("self_attn.o_proj", "mlp.down_proj"):  # their sums over the devices are left to `stream`
            plan[name] = RowwiseParallel(output_layouts=Partial())
        parallelize_module(block, mesh, plan)
        for half in (block.self_attn, block.mlp):
            half.register_forward_pre_hook(stream.whole_input)
            half.register_forward_hook(stream.own_sums)
    for module in [*decoder.modules()]:
        for name, norm in module.named_children():
            if isinstance(norm, RMSNorm):
                of_heads = name in ("q_norm", "k_norm")
                setattr(module, name, _NormOfOwnHeads(norm, stream) if of_heads else _NormOfOwnPositions(norm, stream))
    decoder.norm.register_forward_hook(stream.all_positions)
    decoder.lm_head.loss = partial(_loss_of_own_rows, decoder.lm_head, mesh)  # type: ignore[method-assign]


class _ResidualStream:
    """The hidden states between the products, [B, T / devices, D] on each device.

    If the devices cannot share T positions equally, each holds all of them, [B, T, D]: a step of generation has one.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.is_divided = False

    @property
    def placement(self) -> Placement:
        return Shard(1) if self.is_divided else Replicate()

    def start(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.is_divided = args[0].size(1) % self.mesh.size() == 0

    def own_positions(self, _: nn.Module, __: tuple[Any, ...], embedded: Tensor) -> Tensor:
        return self._convert(embedded, Replicate(), self.placement).to_local()

    def all_positions(self, _: nn.Module, __: tuple[Any, ...], hidden: Tensor) -> Tensor:
        return self._convert(hidden, self.placement, Replicate()).to_local()

    def whole_input(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # a DTensor: the products that read it then sum its gradient together, not each for itself
        return self._convert(args[0], self.placement, Replicate()), *args[1:]

    def own_sums(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return self._convert(output, Partial(), self.placement).to_local()

    def _convert(self, x: Tensor, before: Placement, after: Placement) -> DTensor:
        return DTensor.from_local(x, self.mesh, [before], run_check=False).redistribute(placements=[after])


class _NormOfOwnHeads(RMSNorm):
    """A norm of a device's own heads. All heads share one weight, so its gradient is summed over the devices.

    A class, and not another `forward` of the norm: the compiler would make a graph for each norm.
    """

    def __init__(self, norm: RMSNorm, stream: _ResidualStream) -> None:
        assert norm.eps is not None
        super().__init__(norm.normalized_shape, eps=norm.eps, device="meta")
        self.weight = norm.weight
        self.stream = stream

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return rms_norm(x, _sum_gradient(self.weight, self.stream.mesh), self.eps)


class _NormOfOwnPositions(_NormOfOwnHeads):
    """A norm of a device's own positions. If it holds all of them, its gradient is not summed."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return super().forward(x) if self.stream.is_divided else rms_norm(x, self.weight, self.eps)


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


def _loss_of_own_rows(
    head: Head, mesh: DeviceMesh, hidden: Tensor, labels: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what `Head.loss` does, the same on every device, though each computes only its part of the rows."""
    if positions is None:
        positions = torch.arange(labels.numel(), device=labels.device)
    own = positions.tensor_split(mesh.size())[mesh.get_local_rank()]
    hidden = _sum_gradient(hidden, mesh)
    weight = _sum_gradient(head.weight, mesh)  # last: autograd then sums it first, before FSDP2 takes the gradient
    total, losses = linear_cross_entropy(hidden, weight, labels, own)
    return _sum(total, mesh), _sum(losses, mesh)


def _sum(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the sum of `x` over the devices. The gradient of the sum is the same on every device."""
    return DTensor.from_local(x, mesh, [Partial()], run_check=False).full_tensor()


def _sum_gradient(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return `x`, which is the same on every device. Its gradient is the sum of those of the devices."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
