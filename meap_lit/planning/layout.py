"""How a recipe's strategy and precision lay a model over devices."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jsonargparse import Namespace

from meap_lit.errors import UserError
from meap_lit.parallel.strategies import gathered_dtype


@dataclass(frozen=True)
class Layout:
    """How a strategy lays a model over devices.

    Args:
        num_devices: All devices of the run.
        shard_size: Data-parallel devices that share one copy of the weights; 1 if each has its own.
        tensor_parallel_size: Devices that share a matrix product.
        fsdp: Weights are gathered block by block (FSDP2).
        reshard_after_forward: Gathered blocks are given back between forward and backward.
        param_dtype: Dtype of gathered weights; their own if not given.
        reduce_dtype: Dtype in which gradients are reduced; that of the gathered weights if not given.
        cpu_offload: Parameters, gradients and optimizer states lie in the host's memory.
        buckets: Gradients are reduced in DDP's buckets, which stay: `copy` of the gradients, or `view`, in which the
            gradients lie once they are reduced.
    """

    num_devices: int = 1
    shard_size: int = 1
    tensor_parallel_size: int = 1
    fsdp: bool = False
    reshard_after_forward: bool = True
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    cpu_offload: bool = False
    buckets: Literal["copy", "view"] | None = None

    @property
    def num_replicas(self) -> int:
        """Devices that read different data."""
        return self.num_devices // self.tensor_parallel_size

    def __str__(self) -> str:
        if not self.fsdp:
            return "a copy of the model on each" if self.num_devices > 1 else "a single one"
        num_copies = self.num_replicas // self.shard_size
        copies = "a copy" if num_copies == 1 else f"{num_copies} copies"
        tensor = f" x {self.tensor_parallel_size} (tensor parallel)" if self.tensor_parallel_size > 1 else ""
        return f"{copies} of the model over {self.shard_size} (FSDP){tensor} devices"


@dataclass(frozen=True)
class Numerics:
    """Dtypes of a `trainer.precision`.

    Args:
        weights: Parameters, their gradients and optimizer states.
        residual: What flows between the blocks.
        products: Inputs and outputs of matrix products.
    """

    weights: torch.dtype
    residual: torch.dtype
    products: torch.dtype


PRECISIONS = {
    "32-true": Numerics(torch.float32, torch.float32, torch.float32),
    "bf16-mixed": Numerics(torch.float32, torch.float32, torch.bfloat16),
    "bf16-true": Numerics(torch.bfloat16, torch.bfloat16, torch.bfloat16),
}


# ------------------------------------------------------------------------------------------------ from a recipe


def layout_of(trainer: Namespace, devices: int | None = None, nodes: int | None = None) -> Layout:
    """The devices and how a recipe's strategy uses them.

    Args:
        trainer: The recipe's `trainer`.
        devices: Devices of a node; the recipe's if not given.
        nodes: Nodes; the recipe's if not given.

    Raises:
        UserError: If the number of devices is not stated, the strategy is not known here, or they do not fit.
    """
    devices = trainer.devices if devices is None else devices
    nodes = trainer.num_nodes if nodes is None else nodes
    if not str(devices).isdigit() or int(devices) < 1:
        raise UserError(f"say how many devices a node has with --devices; trainer.devices is {devices}")
    num_devices = int(devices) * nodes
    strategy = trainer.strategy
    name, options = (strategy, {}) if isinstance(strategy, str) else (strategy.class_path, strategy.get("init_args"))
    name, options = name.rsplit(".", 1)[-1], vars(options) if options else {}
    if name == "auto" and num_devices == 1:
        return Layout()
    if name in ("auto", "ddp", "DDPStrategy"):
        return Layout(num_devices, buckets="view" if options.get("gradient_as_bucket_view") else "copy")
    if name == "SingleDeviceStrategy":
        if num_devices > 1:
            raise UserError(f"trainer.strategy SingleDeviceStrategy is for one device, not for {num_devices}")
        return Layout()
    if name != "Sharded":
        raise UserError(
            f"trainer.strategy {name} is not known to plan; it knows auto, ddp, SingleDeviceStrategy and "
            f"meap_lit.parallel.strategies.Sharded"
        )
    return _sharded(num_devices, int(devices), options, precision(trainer.precision))


def _sharded(num_devices: int, devices: int, options: Mapping[str, Any], precision: str) -> Layout:
    tensor, shard_size = options.get("tensor_parallel_size", 1), options["shard_size"]
    for key, value in (("tensor_parallel_size", tensor), ("shard_size", shard_size)):
        if value is not None and value < 1:
            raise UserError(f"trainer.strategy.{key} must be at least 1, got {value}")
    if devices % tensor:
        raise UserError(
            f"{devices} devices of a node cannot be divided by trainer.strategy.tensor_parallel_size {tensor}; "
            f"change one of the two"
        )
    if num_devices % ((shard_size or 1) * tensor):
        raise UserError(
            f"{num_devices} devices cannot be divided into groups of trainer.strategy.shard_size {shard_size} x "
            f"tensor_parallel_size {tensor}; change one of the three"
        )
    return Layout(
        num_devices,
        shard_size=shard_size or num_devices // tensor,
        tensor_parallel_size=tensor,
        fsdp=True,
        reshard_after_forward=options["reshard_after_forward"],
        param_dtype=gathered_dtype(options["param_dtype"], precision),
        reduce_dtype=getattr(torch, options["reduce_dtype"] or "float32"),
        cpu_offload=options.get("cpu_offload", False),
    )


def precision(given: str | int | None) -> str:
    """trainer.precision by the name that `PRECISIONS` has for it.

    Raises:
        UserError: If it is none of these.
    """
    name = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed"}.get(str(given), str(given))
    if name not in PRECISIONS:
        raise UserError(f"trainer.precision {given} is not known to plan; it knows {', '.join(PRECISIONS)}")
    return name
