"""The Trainer's strategy that shards one model over devices, and the number of devices that a launcher started."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from meap_lit.checkpoint.folder import StoredCheckpoint, write
from meap_lit.errors import UserError, check_range
from meap_lit.model.decoder import Decoder
from meap_lit.parallel.ranks import Ranks
from meap_lit.parallel.sharding import shard

Dtype = Literal["float32", "bfloat16"]


class Sharded(ModelParallelStrategy):
    """Shard weights, gradients and optimizer states over devices by FSDP2, with tensor parallelism inside on request.

    The devices of a run are divided into groups of `tensor_parallel_size`, which read the same data and share each
    matrix product. `shard_size` groups hold one copy of the weights between them; the other groups hold further copies
    (HSDP: shard within a node, replicate across nodes).

    Args:
        shard_size: Data-parallel devices that share one copy of the weights; all of them if not given.
        tensor_parallel_size: Devices that share a matrix product; a divisor of the devices of a node.
        reshard_after_forward: Free gathered weights between forward and backward: less memory, more traffic.
        param_dtype: Dtype in which weights are gathered and used; if not given, bfloat16 with trainer.precision
            bf16-mixed (autocast would keep a copy of its own of every block), else their own.
        reduce_dtype: Dtype in which gradients are reduced; float32 if not given.
        reduce_each_micro_batch: Reduce gradients after each micro-batch of a step. Without it they are reduced once a
            step: less traffic, but each device holds those of the whole model in `reduce_dtype`.
        cpu_offload: Keep parameters, gradients and optimizer states in the host's memory, where the optimizer steps
            too; blocks come to the device when they are gathered. Slow: for models that fit in no other way.
        timeout_minutes: How long a device waits for the others before it gives up.
    """

    def __init__(
        self,
        shard_size: int | None = None,
        tensor_parallel_size: int = 1,
        reshard_after_forward: bool = True,
        param_dtype: Dtype | None = None,
        reduce_dtype: Dtype | None = None,
        reduce_each_micro_batch: bool = True,
        cpu_offload: bool = False,
        timeout_minutes: float = 30.0,
    ) -> None:
        super().__init__(tensor_parallel_size=tensor_parallel_size, timeout=timedelta(minutes=timeout_minutes))
        self.shard_size = shard_size
        self.tensor_parallel_size = tensor_parallel_size
        self.reshard_after_forward = reshard_after_forward
        self.param_dtype = param_dtype
        self.reduce_dtype = reduce_dtype
        self.reduce_each_micro_batch = reduce_each_micro_batch
        self.cpu_offload = cpu_offload
        self.timeout_minutes = timeout_minutes
        self.saving_group: ProcessGroup | None = None
        """Group for the ranks' messages during a save, beside training; that of training, between steps, if None."""

    def setup_environment(self) -> None:
        # the parser would take an error of the constructor for a wrong type
        self._shard_size = shard_size_of(self.num_processes, self.num_nodes, self.shard_size, self.tensor_parallel_size)
        check_range("trainer.strategy.timeout_minutes", self.timeout_minutes, "(0, inf)")
        self._data_parallel_size = self.num_nodes * self.num_processes // self.tensor_parallel_size
        if self.cpu_offload and self.root_device.type == "cuda":
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # norms of gradients are summed on their device
        super().setup_environment()
        # Lightning's mesh has two dimensions; sharding within copies needs a third, in the same order of ranks
        self._mesh = init_device_mesh(
            self.root_device.type,
            (self._data_parallel_size // self._shard_size, self._shard_size, self.tensor_parallel_size),
            mesh_dim_names=("replicate", "shard", "tensor"),
        )
        for group in self._mesh.get_all_groups():  # NCCL would give those that do not hold all ranks ten minutes
            _set_pg_timeout(timedelta(minutes=self.timeout_minutes), group)

    def model_to_device(self) -> None:
        """Move what is not sharded, but never offloaded weights: torch would keep them and call them the GPU's."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        module = self.lightning_module
        assert module is not None
        decoder, module.decoder = module.decoder, None
        super().model_to_device()
        module.decoder = decoder

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Leave out of a backward what only the last micro-batch of a step needs; Lightning calls it for the others.

        That is the sum over copies of the weights (HSDP), and the sum over shards if it is wanted once a step.
        """
        assert self.lightning_module is not None
        decoder = cast(FSDPModule, self.lightning_module.decoder)
        decoder.set_requires_gradient_sync(self.reduce_each_micro_batch)  # first: it sets the other, too
        decoder.set_requires_all_reduce(False)
        yield
        decoder.set_requires_gradient_sync(True)

    def optimizer_state(self, optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
        """Return the state by parameters' names; Lightning numbers them in another order than the groups have."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        assert self.model is not None
        return get_optimizer_state_dict(self.model, optimizer, options=StateDictOptions(cpu_offload=True))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write this rank's part of a checkpoint; Lightning's own method always uses the group that trains."""
        write(checkpoint, Path(filepath), rank=self.global_rank, group=self.saving_group)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill the module and the optimizers, each rank its shards, by our reader: torch's own runs pickled code.

        The module sees the trainer's state first, while Lightning calls the hook after the weights are loaded: from a
        checkpoint that holds more than the module, such as more layers, torch reads a part without an error.
        """
        assert self.model is not None
        assert self.lightning_module is not None
        stored, ranks = StoredCheckpoint(Path(self.broadcast(checkpoint_path))), Ranks(self.lightning_module.trainer)
        self.lightning_module.on_load_checkpoint(stored.trainer_state)
        options = StateDictOptions(strict=self.lightning_module.strict_loading)
        weights = get_model_state_dict(self.model)
        ranks.do(lambda: stored.load_into({"state_dict": weights}))
        self.model.load_state_dict(weights, strict=options.strict)
        for number, optimizer in enumerate(self.optimizers):
            moments = get_optimizer_state_dict(self.model, optimizer)
            ranks.do(partial(stored.load_into, {f"optimizer_{number}": moments}))
            set_optimizer_state_dict(self.model, optimizer, moments, options=options)
        return stored.trainer_state

    @property
    def parameter_device(self) -> torch.device:
        """Device of the shards between the steps."""
        return torch.device("cpu") if self.cpu_offload else self.root_device

    def shard(self, decoder: Decoder) -> None:
        """Shard `decoder` over the devices, in place."""
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
    """Return the dtype in which `Sharded` gathers weights for a `trainer.precision`; None for their own."""
    if param_dtype is None:
        return torch.bfloat16 if precision == "bf16-mixed" else None
    return getattr(torch, param_dtype)


def shard_size_of(devices: int, nodes: int, shard_size: int | None, tensor_parallel_size: int) -> int:
    """Return how many data-parallel devices share one copy of the weights, on nodes of so many devices.

    Raises:
        UserError: If a size is below 1, or the devices cannot be divided into groups of these sizes.
    """
    for name, size in (("shard_size", shard_size), ("tensor_parallel_size", tensor_parallel_size)):
        check_range(f"trainer.strategy.{name}", size, "[1, inf)")
    if devices % tensor_parallel_size:
        raise UserError(
            f"{devices} devices of a node cannot be divided by trainer.strategy.tensor_parallel_size "
            f"{tensor_parallel_size}; change one of the two"
        )
    if devices * nodes % ((shard_size or 1) * tensor_parallel_size):
        raise UserError(
            f"{devices * nodes} devices cannot be divided into groups of trainer.strategy.shard_size "
            f"{shard_size or 1} x tensor_parallel_size {tensor_parallel_size}; change one of the three"
        )
    return shard_size or devices * nodes // tensor_parallel_size


# ------------------------------------------------------------------------------------------------ launchers


def follow_launcher(options: dict[str, Any]) -> None:
    """Set the devices and nodes of a Trainer to those that torchrun or SLURM started, if one of them did.

    On SLURM this turns Lightning's requeueing off, which saves checkpoints into the current folder. Any later run there
    would start from them.

    Args:
        options: Arguments of the Trainer, changed in place.

    Raises:
        UserError: If the arguments contradict the launcher, or it started processes that Lightning cannot use.
    """
    plugins = options.get("plugins") or []
    plugins = plugins if isinstance(plugins, list) else [plugins]
    given = next((plugin for plugin in plugins if isinstance(plugin, ClusterEnvironment)), None)
    if isinstance(given, SLURMEnvironment):
        given.auto_requeue = False
    if given is not None and not isinstance(given, SLURMEnvironment | TorchElasticEnvironment):
        return
    if TorchElasticEnvironment.detect():
        name, num_devices, num_nodes, words = "torchrun", *_of_torchrun(), ("--nproc_per_node", "--nnodes")
    elif SLURMEnvironment.detect():
        name, num_devices, num_nodes, words = "SLURM", *_of_slurm(), ("--ntasks-per-node", "--nodes")
        if given is None:
            options["plugins"] = [*plugins, SLURMEnvironment(auto_requeue=False)]
    else:
        return
    wanted, nodes = _number_of_devices(options["devices"]), options["num_nodes"]
    for key, given_number, number, word in (
        ("devices", wanted, num_devices, words[0]),
        ("num_nodes", None if nodes == 1 else nodes, num_nodes, words[1]),
    ):
        if given_number not in (None, number):
            raise UserError(
                f"trainer.{key} {options[key]} contradicts {name}, which was started with {word} {number}; leave "
                f"trainer.{key} out, or start {name} with {word} {given_number or 'N'}"
            )
    if wanted is None:
        options["devices"] = num_devices
    options["num_nodes"] = num_nodes


def _of_torchrun() -> tuple[int, int]:
    """Return the processes of each node, and the nodes."""
    total, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if total % local:
        raise UserError(
            f"torchrun started {local} of {total} processes on this node; start the same number on every node"
        )
    return local, total // local


def _of_slurm() -> tuple[int, int]:
    """Return the tasks of each node, and the nodes."""
    total, nodes = (int(os.environ.get(f"SLURM_{name}", "1")) for name in ("NTASKS", "NNODES"))
    local = os.environ.get("SLURM_NTASKS_PER_NODE")
    if total > 1 and "SLURM_STEP_NUM_TASKS" not in os.environ:  # it would wait for the others forever
        raise UserError(
            f"this job has {total} tasks, and SLURM started this process alone; start all of them with srun: "
            f"srun python -m meap_lit fit ..."
        )
    if local is None and total > 1:
        raise UserError(
            f"SLURM started {total} tasks on {nodes} nodes without saying how many on each; give --ntasks-per-node"
        )
    if int(local or total) * nodes != total:
        raise UserError(
            f"SLURM started {total} tasks on {nodes} nodes, not --ntasks-per-node {local} on each; give all nodes as "
            f"many tasks"
        )
    return int(local or total), nodes


def _number_of_devices(devices: list[int] | str | int) -> int | None:
    """Return the number of devices in `trainer.devices`; None if it leaves that open."""
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([device for device in devices.split(",") if device.strip()])
    if str(devices) in ("auto", "-1"):
        return None
    return int(devices) if str(devices).isdigit() else 0  # anything else contradicts every number
