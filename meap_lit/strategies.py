"""Strategies for the Trainer that split one model over devices."""

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from meap_lit.errors import UserError
from meap_lit.integrity import TRAINER_STATE
from meap_lit.model.decoder import Decoder
from meap_lit.model.parallelize import shard
from meap_lit.shards import read_trainer_state

Dtype = Literal["float32", "bfloat16"]


class Sharded(ModelParallelStrategy):
    """FSDP2: weights, gradients and optimizer states split over devices; with tensor parallelism inside, if asked.

    The devices of a run are divided into groups of `tensor_parallel_size`, which read the same data and share each
    matrix product; `shard_size` such groups hold one copy of the weights between them, and there are as many
    copies as it takes (HSDP: shard within a node, replicate across nodes).

    Args:
        shard_size: Data-parallel devices that share one copy of the weights; all of them if not given.
        tensor_parallel_size: Devices that share a matrix product; a divisor of the devices of a node.
        reshard_after_forward: Give gathered weights back between forward and backward: less memory, more traffic.
        param_dtype: Dtype in which weights are gathered and used; if not given, bfloat16 with trainer.precision
            bf16-mixed (autocast would keep a copy of its own of every block), else their own.
        reduce_dtype: Dtype in which gradients are reduced; float32 if not given.
        cpu_offload: Parameters, gradients and optimizer states lie in the host's memory, where the optimizer steps too;
            blocks come to the device when they are gathered. Slow: for models that fit in no other way.
        save_distributed_checkpoint: A checkpoint is a folder into which every device writes its part; else one file.
        timeout_minutes: How long a device waits for the others before it gives up.
    """

    def __init__(
        self,
        shard_size: int | None = None,
        tensor_parallel_size: int = 1,
        reshard_after_forward: bool = True,
        param_dtype: Dtype | None = None,
        reduce_dtype: Dtype | None = None,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = True,
        timeout_minutes: float = 30.0,
    ) -> None:
        super().__init__(
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.shard_size = shard_size
        self.tensor_parallel_size = tensor_parallel_size
        self.reshard_after_forward = reshard_after_forward
        self.param_dtype = param_dtype
        self.reduce_dtype = reduce_dtype
        self.cpu_offload = cpu_offload
        self.timeout_minutes = timeout_minutes
        self.saving_group: ProcessGroup | None = None
        """The ranks as they talk during a save; as in training if None, and then not beside it."""

    def setup_environment(self) -> None:
        # not checked on construction, where the parser would take an error for a wrong type
        for name in ("shard_size", "tensor_parallel_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise UserError(f"trainer.strategy.{name} must be at least 1, got {size}")
        if self.timeout_minutes <= 0:
            raise UserError(f"trainer.strategy.timeout_minutes must be above 0, got {self.timeout_minutes:g}")
        if self.num_processes % self.tensor_parallel_size:
            raise UserError(
                f"{self.num_processes} devices of a node cannot be divided by trainer.strategy.tensor_parallel_size "
                f"{self.tensor_parallel_size}; change one of the two"
            )
        num_devices = self.num_nodes * self.num_processes
        copy = (self.shard_size or 1) * self.tensor_parallel_size
        if num_devices % copy:
            raise UserError(
                f"{num_devices} devices cannot be divided into groups of trainer.strategy.shard_size "
                f"{self.shard_size or 1} x tensor_parallel_size {self.tensor_parallel_size}; change one of the three"
            )
        self._data_parallel_size = num_devices // self.tensor_parallel_size
        if self.cpu_offload and self.root_device.type == "cuda":
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # norms of gradients are summed where these lie
        super().setup_environment()
        # Lightning's mesh has two dimensions; sharding within copies needs a third, in the same order of ranks
        self._shard_size = self.shard_size or self._data_parallel_size
        self._mesh = init_device_mesh(
            self.root_device.type,
            (self._data_parallel_size // self._shard_size, self._shard_size, self.tensor_parallel_size),
            mesh_dim_names=("replicate", "shard", "tensor"),
        )

    def optimizer_state(self, optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
        """State by parameters' names; Lightning would number them in another order than the optimizer's groups have."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        assert self.model is not None
        whole = not self._save_distributed_checkpoint
        options = StateDictOptions(full_state_dict=whole, cpu_offload=True)
        return get_optimizer_state_dict(self.model, optimizer, options=options)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write in Lightning's layout; Lightning itself always talks over the group that trains."""
        if not self._save_distributed_checkpoint:
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, filepath)
            return
        path = Path(filepath)
        path.mkdir(parents=True, exist_ok=True)
        states = {f"optimizer_{number}": state for number, state in enumerate(checkpoint.pop("optimizer_states", []))}
        states["state_dict"] = checkpoint.pop("state_dict")
        dcp.save(states, checkpoint_id=path, process_group=self.saving_group)
        if self.is_global_zero:
            torch.save(checkpoint, path / TRAINER_STATE)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load as Lightning does, once the module has looked at it: Lightning calls the hook when weights are loaded.

        Of shards that hold more than the module, such as more layers, torch would read a part without a word.
        """
        path = Path(self.broadcast(checkpoint_path))
        assert self.lightning_module is not None
        is_safe = weights_only is not False
        state = read_trainer_state(path) if path.is_dir() else torch.load(path, "cpu", mmap=True, weights_only=is_safe)
        self.lightning_module.on_load_checkpoint(state)
        return super().load_checkpoint(path, weights_only)

    @property
    def parameter_device(self) -> torch.device:
        """Where each part of the weights lies between the steps."""
        return torch.device("cpu") if self.cpu_offload else self.root_device

    def shard(self, decoder: Decoder) -> None:
        """Split `decoder` over the devices, in place."""
        replicated = self._mesh.size(0) > 1
        shard(
            decoder,
            self._mesh["replicate", "shard"] if replicated else self._mesh["shard"],
            self._mesh["tensor"] if self.tensor_parallel_size > 1 else None,
            reshard_after_forward=self.reshard_after_forward,
            param_dtype=gathered_dtype(self.param_dtype, str(self.precision_plugin.precision)),
            reduce_dtype=getattr(torch, self.reduce_dtype or "float32"),
            cpu_offload=self.cpu_offload,
        )


def gathered_dtype(param_dtype: Dtype | None, precision: str) -> torch.dtype | None:
    """Dtype in which `Sharded` gathers weights for a `trainer.precision`; None for their own."""
    if param_dtype is None:
        return torch.bfloat16 if precision == "bf16-mixed" else None
    return getattr(torch, param_dtype)
