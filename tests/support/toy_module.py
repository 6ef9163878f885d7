"""A toy model and commands that run, and are killed, in forked processes, which need not import anything."""

import gc
import itertools
import multiprocessing
import os
import pkgutil
import signal
import socket
import sys
import tempfile
from unittest import mock

import lightning as L
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from meap_lit.callbacks import Checkpoint
from meap_lit.cli import main
from meap_lit.parallel.strategies import Sharded


class Toy(L.LightningModule):
    """Two parameter groups whose order is not that of the module's parameters."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 1))

    def configure_model(self):
        if isinstance(self.trainer.strategy, Sharded):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def train_dataloader(self):
        row = torch.randn(8, generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader(
            row.expand(64, 8), batch_size=2
        )  # the same batch on every rank, at every step

    def configure_optimizers(self):
        vectors = [p for p in self.parameters() if p.dim() < 2]
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        return torch.optim.AdamW([{"params": vectors, "weight_decay": 0.0}, {"params": matrices}], lr=0.01)


def train(folder, *, max_steps=4, num_shards=0, num_copies=0, ckpt_path=None, callbacks=(), **saving):
    """Train with a checkpoint in `folder`, every two steps, one kept, unless `saving` says otherwise."""
    L.seed_everything(0)
    split = Sharded() if num_shards else None
    trainer = L.Trainer(
        accelerator="cpu",
        devices=num_shards or num_copies or 1,
        strategy=split or ("ddp" if num_copies else "auto"),
        max_steps=max_steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Checkpoint(**{"every_n_steps": 2, "keep": 1, "dirpath": str(folder)} | saving), *callbacks],
    )
    trainer.fit(Toy(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def fork(action, num_ranks=1, timeout=60):
    """Do `action` in `num_ranks` forked processes; their exit statuses, "timeout" of one that did not end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank):
        # leaves the parent's garbage alone: a destructor that waits for a thread of the parent would wait for good
        gc.freeze()
        if num_ranks > 1:
            os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(num_ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        action()

    processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(num_ranks)]
    for process in processes:
        process.start()
    statuses = []
    for process in processes:
        process.join(timeout)
        statuses.append("timeout" if process.is_alive() else process.exitcode)
        process.kill()
        process.join()
    return statuses


def fork_command(words, num_ranks=1, timeout=300, folder="."):
    """Run a command in `num_ranks` forked processes; their exit statuses, and what they wrote to stdout and stderr."""
    with tempfile.TemporaryFile("w+") as log:

        def run():
            os.chdir(folder)
            for number in (1, 2):
                os.dup2(log.fileno(), number)
            sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))  # noqa: SIM115
            sys.exit(main([*map(str, words)]))

        statuses = fork(run, num_ranks, timeout)
        log.seek(0)
        return statuses, log.read()


def kill_at(target, call=1):
    """Make this process kill itself when `target` is called for the `call`th time."""
    original, calls = pkgutil.resolve_name(target), itertools.count(1)

    def deadly(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    mock.patch(target, deadly).start()
