"""The devices of a run, and how a recipe's strategy divides the model among them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pydoc import locate
from typing import Any, Literal, cast

import torch
from jsonargparse import Namespace
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, StrategyRegistry

from meap_lit.errors import UserError
from meap_lit.parallel.strategies import Sharded, gathered_dtype, shard_size_of
from meap_lit.recipe import packaged


@dataclass(frozen=True)
class Devices:
    """The devices of a run and how they share the model.

    Args:
        number: All devices of the run.
        shard_size: Data-parallel devices that share one copy of the weights; 1 if each has its own.
        tensor_parallel_size: Devices that share a matrix product.
        fsdp: Weights are gathered block by block (FSDP2).
        reshard_after_forward: Gathered blocks are freed between forward and backward.
        param_dtype: Dtype of gathered weights; their own if not given.
        reduce_dtype: Dtype in which gradients are reduced; that of the gathered weights if not given.
        reduce_each_micro_batch: Gradients are reduced after each micro-batch, not once a step.
        cpu_offload: Parameters, gradients and optimizer states are in the host's memory.
        buckets: DDP reduces gradients in buckets that stay allocated: a `copy` of the gradients, or a `view`, in which
            the gradients are once they are reduced.
    """

    number: int = 1
    shard_size: int = 1
    tensor_parallel_size: int = 1
    fsdp: bool = False
    reshard_after_forward: bool = True
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    reduce_each_micro_batch: bool = True
    cpu_offload: bool = False
    buckets: Literal["copy", "view"] | None = None

    @property
    def num_replicas(self) -> int:
        """Devices that read different data."""
        return self.number // self.tensor_parallel_size

    def __str__(self) -> str:
        if not self.fsdp:
            return "a copy of the model on each" if self.number > 1 else "a single one"
        num_copies = self.num_replicas // self.shard_size
        copies = "a copy" if num_copies == 1 else f"{num_copies} copies"
        tensor = f" x {self.tensor_parallel_size} (tensor parallel)" if self.tensor_parallel_size > 1 else ""
        return f"{copies} of the model over {self.shard_size} (FSDP){tensor} devices"


PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}
"""Dtype of parameters, gradients and optimizer states, by `trainer.precision`."""


# ------------------------------------------------------------------------------------------------ from a recipe


def devices_of(trainer: Namespace) -> Devices:
    """Return the devices of a recipe, from its `trainer`.

    Raises:
        UserError: If the number of devices is not stated, the strategy is not known here, or they do not fit.
    """
    devices, nodes = trainer.devices, trainer.num_nodes
    if not str(devices).isdigit() or int(devices) < 1:
        raise UserError(f"set the devices of a node with --devices; trainer.devices is {devices}")
    number = int(devices) * nodes
    kind, options = _strategy(trainer.strategy, number)
    if issubclass(kind, SingleDeviceStrategy):
        if number > 1:
            raise UserError(f"trainer.strategy {kind.__name__} is for one device, not for {number}")
        return Devices()
    if issubclass(kind, DDPStrategy) and not issubclass(kind, DeepSpeedStrategy):
        return Devices(number, buckets="view" if options.get("gradient_as_bucket_view") else "copy")
    if not issubclass(kind, Sharded):
        given = trainer.strategy if isinstance(trainer.strategy, str) else kind.__name__
        overlays = ", ".join(name for name in packaged.names() if name.startswith("recipes/strategy/"))
        raise UserError(f"trainer.strategy {given} is not known to plan; use one of {overlays}")
    tensor_parallel_size = options["tensor_parallel_size"]
    return Devices(
        number,
        shard_size=shard_size_of(int(devices), nodes, options["shard_size"], tensor_parallel_size),
        tensor_parallel_size=tensor_parallel_size,
        fsdp=True,
        reshard_after_forward=options["reshard_after_forward"],
        param_dtype=gathered_dtype(options["param_dtype"], precision(trainer.precision)),
        reduce_dtype=getattr(torch, options["reduce_dtype"] or "float32"),
        reduce_each_micro_batch=options["reduce_each_micro_batch"],
        cpu_offload=options["cpu_offload"],
    )


def _strategy(given: str | Namespace, number: int) -> tuple[type, Mapping[str, Any]]:
    """Return class and options of a recipe's strategy; Lightning registers the names."""
    if isinstance(given, Namespace):
        return cast(type, locate(given.class_path)), given.get("init_args") or {}
    name = given if given != "auto" else "single_device" if number == 1 else "ddp"
    return (StrategyRegistry[name]["strategy"], {}) if name in StrategyRegistry else (object, {})


def precision(given: str | int | None) -> str:
    """Return a trainer.precision by its name in `PRECISIONS`.

    Raises:
        UserError: If it is none of these.
    """
    name = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed"}.get(str(given), str(given))
    if name not in PRECISIONS:
        raise UserError(f"trainer.precision {given} is not known to plan; it knows {', '.join(PRECISIONS)}")
    return name
