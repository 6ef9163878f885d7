"""Strategies for the Trainer that split one model over devices; the number of those, where a launcher knows it."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from meap_lit.checkpoint.checksums import TRAINER_STATE, read_file
from meap_lit.checkpoint.shards import load_shards, read_trainer_state
from meap_lit.errors import UserError
from meap_lit.model.decoder import Decoder
from meap_lit.parallel.sharding import flatten, shard, split

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
        self._shard_size = shard_size_of(self.num_processes, self.num_nodes, self.shard_size, self.tensor_parallel_size)
        if self.timeout_minutes <= 0:
            raise UserError(f"trainer.strategy.timeout_minutes must be above 0, got {self.timeout_minutes:g}")
        self._data_parallel_size = self.num_nodes * self.num_processes // self.tensor_parallel_size
        if self.cpu_offload and self.root_device.type == "cuda":
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # norms of gradients are summed where these lie
        super().setup_environment()
        # Lightning's mesh has two dimensions; sharding within copies needs a third, in the same order of ranks
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
        """Load one file as Lightning does, and shards by our reader, since torch's own runs what is pickled in them.

        The module looks at the checkpoint first; Lightning calls the hook after the weights are loaded. Of shards that
        hold more than the module, such as more layers, torch would read a part without a word.
        """
        path = Path(self.broadcast(checkpoint_path))
        state = self._show_to_module(path)
        if path.is_file():
            return super().load_checkpoint(path, weights_only=True)
        self._load_shards(path)
        return state

    def _load_shards(self, path: Path) -> None:
        """Fill the module and the optimizers, each rank its part."""
        assert self.model is not None
        assert self.lightning_module is not None
        options = StateDictOptions(strict=self.lightning_module.strict_loading)
        weights = get_model_state_dict(self.model)
        self._read({"state_dict": weights}, path)
        self._set_weights(weights, options)
        for number, optimizer in enumerate(self.optimizers):
            moments = get_optimizer_state_dict(self.model, optimizer)
            self._read({f"optimizer_{number}": moments}, path)
            set_optimizer_state_dict(self.model, optimizer, moments, options=options)

    def _set_weights(self, weights: dict[str, Any], options: StateDictOptions) -> None:
        assert self.model is not None
        self.model.load_state_dict(weights, strict=options.strict)

    def _read(self, states: dict[str, Any], path: Path) -> None:
        try:
            load_shards(states, path)
        except UserError:
            if self.is_global_zero:
                raise
            # rank 0 says it for all, and Lightning kills it when a process that it started fails
            raise SystemExit(2 if self.local_rank == 0 else 0) from None

    def _show_to_module(self, path: Path) -> dict[str, Any]:
        """Return what the checkpoint holds, the shards aside, after the module has looked at it."""
        assert self.lightning_module is not None
        state = read_trainer_state(path) if path.is_dir() else read_file(path)
        self.lightning_module.on_load_checkpoint(state)
        return state

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


class FlatSharded(Sharded):
    """FSDP1, for comparison: as `Sharded`, but the weights of a block are cut as one long vector.

    PyTorch has deprecated it in favour of FSDP2. Checkpoints are those of `Sharded`, and each goes on from the other's.
    GPUs only: torch does not support FSDP1 on the CPU, though it works there as far as the tests need it.

    Args:
        shard_size: Devices that share one copy of the weights, at least 2; all of them if not given.
        reshard_after_forward: As for `Sharded`.
        param_dtype: As for `Sharded`.
        reduce_dtype: As for `Sharded`.
        save_distributed_checkpoint: As for `Sharded`.
        timeout_minutes: As for `Sharded`.
    """

    def __init__(
        self,
        shard_size: int | None = None,
        reshard_after_forward: bool = True,
        param_dtype: Dtype | None = None,
        reduce_dtype: Dtype | None = None,
        save_distributed_checkpoint: bool = True,
        timeout_minutes: float = 30.0,
    ) -> None:
        super().__init__(
            shard_size=shard_size,
            reshard_after_forward=reshard_after_forward,
            param_dtype=param_dtype,
            reduce_dtype=reduce_dtype,
            save_distributed_checkpoint=save_distributed_checkpoint,
            timeout_minutes=timeout_minutes,
        )

    def setup_environment(self) -> None:
        self._check_devices()
        super().setup_environment()
        num_copies = self._data_parallel_size // self._shard_size
        sizes = (self._shard_size,) if num_copies == 1 else (num_copies, self._shard_size)
        self._mesh = init_device_mesh(
            self.root_device.type, sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :]
        )

    def _check_devices(self) -> None:
        if self.root_device.type == "cpu":
            raise UserError("trainer.strategy FlatSharded (fsdp.yaml) needs GPUs; use fsdp2.yaml")
        if self.shard_size == 1 or self.num_nodes * self.num_processes == 1:
            raise UserError(
                "trainer.strategy FlatSharded (fsdp.yaml) needs at least 2 devices to share the weights; "
                "use single.yaml or ddp.yaml"
            )

    def shard(self, decoder: Decoder) -> None:
        """Split `decoder` over the devices, in place; it is flattened once it is filled (`setup`)."""
        split(decoder, self._mesh)

    def setup(self, trainer: L.Trainer) -> None:
        """Build the optimizer while parameters have shapes to sort them by, flatten them, and hand it the new ones."""
        super().setup(trainer)
        module = self.lightning_module
        assert module is not None
        assert isinstance(module.decoder, Decoder)
        self.model, replaced = flatten(
            module,
            module.decoder,
            self._mesh,
            self.root_device,
            reshard_after_forward=self.reshard_after_forward,
            param_dtype=gathered_dtype(self.param_dtype, str(self.precision_plugin.precision)),
            reduce_dtype=getattr(torch, self.reduce_dtype or "float32"),
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["params"] = [replaced[parameter] for parameter in group["params"]]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._save_distributed_checkpoint:
            return super().lightning_module_state_dict()
        assert self.model is not None
        return self._gather(get_model_state_dict(self.model))

    def optimizer_state(self, optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        assert self.model is not None
        return self._gather(get_optimizer_state_dict(self.model, optimizer))

    def _gather(self, state: dict[str, Any]) -> dict[str, Any]:
        """`state` whole, in the host's memory of the first rank; empty on the others.

        Tensor by tensor: torch's own `offload_to_cpu` frees what it hands out, where the parts are on the CPU.
        """

        def gather(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: gather(item) for key, item in value.items()}
            if isinstance(value, list):
                return [gather(item) for item in value]
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if isinstance(whole, torch.Tensor):
                return whole.cpu() if self.is_global_zero else None
            return whole

        gathered = gather(state)
        return gathered if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load what `Sharded` writes, or one file, which Lightning cannot load into FSDP1."""
        path = Path(self.broadcast(checkpoint_path))
        state = self._show_to_module(path)
        if path.is_dir():
            self._load_shards(path)
            return state
        assert self.model is not None
        assert self.lightning_module is not None
        options = StateDictOptions(full_state_dict=True, strict=self.lightning_module.strict_loading)
        self._set_weights(state.pop("state_dict"), options)
        for optimizer, moments in zip(self.optimizers, state["optimizer_states"], strict=False):
            set_optimizer_state_dict(self.model, optimizer, moments, options=options)
        return state

    def _set_weights(self, weights: dict[str, Any], options: StateDictOptions) -> None:
        assert self.model is not None
        set_model_state_dict(self.model, weights, options=options)


def gathered_dtype(param_dtype: Dtype | None, precision: str) -> torch.dtype | None:
    """Dtype in which `Sharded` gathers weights for a `trainer.precision`; None for their own."""
    if param_dtype is None:
        return torch.bfloat16 if precision == "bf16-mixed" else None
    return getattr(torch, param_dtype)


def shard_size_of(devices: int, nodes: int, shard_size: int | None, tensor_parallel_size: int) -> int:
    """Return how many data-parallel devices share one copy of the weights.

    Args:
        devices: Devices of a node.
        nodes: Nodes.
        shard_size: As for `Sharded`.
        tensor_parallel_size: As for `Sharded`.

    Raises:
        UserError: If a size is below 1, or the devices cannot be divided into groups of these sizes.
    """
    for name, size in (("shard_size", shard_size), ("tensor_parallel_size", tensor_parallel_size)):
        if size is not None and size < 1:
            raise UserError(f"trainer.strategy.{name} must be at least 1, got {size}")
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
    """Set what a Trainer is told of devices and nodes to what torchrun or SLURM started, if one of them did.

    On SLURM, Lightning's requeueing is turned off: it saves checkpoints into the current folder, from which any later
    run there would start.

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
    """Processes of each node, and nodes."""
    total, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if total % local:
        raise UserError(f"torchrun started {local} of {total} processes on this node; give all nodes as many")
    return local, total // local


def _of_slurm() -> tuple[int, int]:
    """Tasks of each node, and nodes."""
    total, nodes = (int(os.environ.get(f"SLURM_{name}", "1")) for name in ("NTASKS", "NNODES"))
    local = os.environ.get("SLURM_NTASKS_PER_NODE")
    if total > 1 and "SLURM_STEP_NUM_TASKS" not in os.environ:  # it would wait for the others for good
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
    """How many `trainer.devices` asks for; None if it leaves that open."""
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([device for device in devices.split(",") if device.strip()])
    if str(devices) in ("auto", "-1"):
        return None
    return int(devices) if str(devices).isdigit() else 0  # anything else contradicts every number
