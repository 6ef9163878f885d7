"""Weights that FSDP2 gathers in float8: half the traffic of bfloat16 (`model.float8: all_gather`, by torchao)."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor


def find_scales(model: nn.Module) -> None:
    """Find the scales of all weights by one reduction, after an update; without it each gather finds its own."""
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp  # an extra

    precompute_float8_dynamic_scale_for_fsdp(model)


def as_plain_shards(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict without torchao's class around shards, so that checkpoints are those of any other run.

    The tensors share memory with those of `state`.
    """
    return {name: _as_plain(value) if isinstance(value, DTensor) else value for name, value in state.items()}


def _as_plain(weight: DTensor) -> DTensor:
    local = weight.to_local()
    if not hasattr(local, "__tensor_flatten__"):
        return weight
    (name, *_), _ = local.detach().__tensor_flatten__()  # type: ignore[attr-defined]
    return DTensor.from_local(
        getattr(local, name),
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
