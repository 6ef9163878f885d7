"""The processes that read micro-batches ahead, and how they hand them over."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from meap_lit.errors import UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Those that tell a run to save and leave."""


class Loader(DataLoader):
    """Micro-batches of a stream, which its workers, if there are any, read ahead and send through pipes.

    Raises:
        UserError: While iterating, if the machine has no room for another worker.
    """

    def __init__(self, stream: IterableDataset, num_workers: int, *, pin_memory: bool) -> None:
        super().__init__(
            stream,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=Arrays.of if num_workers else None,
            pin_memory=pin_memory,
            worker_init_fn=_ignore_signals,
            # Lightning ends such workers when a run fails. Others live as long as the error's traceback, and since they
            # ignore the signal that ends them then, the process would wait for them for good
            persistent_workers=num_workers > 0,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            batches = super().__iter__()
        except OSError as error:
            raise UserError(
                f"cannot start the workers that read data (data.num_workers {self.num_workers}): {error.strerror}; "
                f"free memory and /dev/shm (in a container raise --shm-size), or set data.num_workers 0"
            ) from error
        for batch in batches:
            yield batch.batch() if isinstance(batch, Arrays) else batch


@dataclass(frozen=True)
class Arrays:
    """A micro-batch on its way from a worker, through a pipe.

    PyTorch would put its tensors into shared memory. Where that is full, as a container's often is, the batch is lost
    in a thread of the worker and the run waits for it for good.
    """

    values: dict[str, Any]

    @classmethod
    def of(cls, batch: Any) -> "Arrays":
        return cls({name: value.numpy() if isinstance(value, Tensor) else value for name, value in batch.items()})

    def batch(self) -> dict[str, Any]:
        return {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in self.values.items()
        }

    def pin_memory(self) -> dict[str, Any]:
        """Return the micro-batch in memory from which a GPU copies; called by PyTorch, in a thread of its own."""
        return {
            name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in self.batch().items()
        }


def _ignore_signals(worker: int) -> None:
    """Leave a signal to the group of processes to the one that trains; it ends its workers when it has saved."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
