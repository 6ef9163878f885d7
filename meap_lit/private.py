"""Private names of Lightning and PyTorch that this package depends on, each with the reason.

Such a name may change in any release, so the versions of these libraries are capped in pyproject.toml.
`tests/test_private.py` checks that each name exists in the installed version, that each is still used, and that the
package touches no other.
"""

from typing import Any

NAMES = {
    # Lightning calls this in every micro-batch of several ranks; see `skip_sigterm_broadcast`
    "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._broadcast_sigterm_tensor",
    # Lightning writes what a step logged again where a run stops between two steps; no public call resets it
    "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._results",
    # `Trainer.save_checkpoint` also writes the file, which `Checkpoint` does itself
    "lightning.pytorch.Trainer._checkpoint_connector",
    # the constructor takes a number, but the devices are known only when the environment is set up
    "lightning.pytorch.strategies.ModelParallelStrategy._data_parallel_size",
    # the constructor takes it, but the device is known only when the environment is set up
    "lightning.pytorch.strategies.ModelParallelStrategy._process_group_backend",
    # the groups of a mesh are made with NCCL's timeout; no public function changes it for every backend
    "torch.distributed.distributed_c10d._set_pg_timeout",
    # DDP's optimizer would cut each compiled block at every 25 MB of parameters; documented, under this name
    "torch._dynamo.config",
    # the rows of a DTensor that a rank holds, where FSDP splits what tensor parallelism has already split
    "torch.distributed.tensor._utils",
    # tensors without memory and the hook on each operation, by which `plan` counts bytes; documented, under these names
    "torch._subclasses.FakeTensorMode",
    "torch.utils._python_dispatch.TorchDispatchMode",
    # the operation by which autocast casts a weight
    "torch.ops.aten._to_copy",
    # operations that selective checkpointing keeps: attention has no public name below `scaled_dot_product_attention`
    "torch.ops.aten._scaled_dot_product_flash_attention",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "torch.ops.aten._scaled_dot_product_efficient_attention",
    "torch.ops.aten._scaled_dot_product_cudnn_attention",
    "torch.nn.attention.varlen._varlen_attn",
    # the number of packed documents differs from batch to batch; documented, under this name
    "torch._dynamo.mark_dynamic",
}


def skip_sigterm_broadcast(trainer: Any) -> None:
    """Keep the ranks of a run from asking each other for a SIGTERM in every micro-batch.

    Each time the host would wait for its device; `StopOnSignal` asks at steps that are logged. Lightning (2.6) has no
    option for it.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def disable_ddp_graph_splits() -> None:
    """Compile each block as one graph under DDP.

    By default TorchDynamo splits a graph at the bucket boundaries of DDP (25 MB of parameters), so that gradient
    communication overlaps with the backward of a model that is compiled as a whole. Blocks are compiled one by one.
    """
    import torch  # imported late: --help does not need it

    torch._dynamo.config.optimize_ddp = False
