"""Let the ranks of a run take an action together: if it fails on one, it fails on all."""

from collections.abc import Callable
from typing import Any, TypeVar

import lightning as L
import torch.distributed as dist

from meap_lit.errors import UserError

T = TypeVar("T")


class Ranks:
    """All ranks of a run.

    Args:
        trainer: The trainer of this rank, whose strategy has brought up the process group.
        beside_training: Use a gloo group of its own, which a thread may use while the training step uses the devices'
            group. All ranks must create it at the same point.
    """

    def __init__(self, trainer: L.Trainer, *, beside_training: bool = False) -> None:
        self.rank = trainer.global_rank
        self.number = trainer.world_size
        self.is_first_of_node = trainer.local_rank == 0
        self.group: dist.ProcessGroup | None = None
        if beside_training and self.number > 1:
            self.group = dist.new_group(backend="gloo")

    def do(self, action: Callable[[], T]) -> list[T]:
        """Do `action` on every rank, wait for all, and return the results in the order of the ranks.

        Raises:
            OSError: If a file cannot be written or read on one rank. Rank 0 raises it; the others exit.
            UserError: If one rank finds wrong input, likewise.
        """
        result: T | None = None
        problem: Exception | None = None
        try:
            result = action()
        except (OSError, UserError) as error:
            problem = error
        outcomes: list[Any] = [(result, problem)] * self.number
        if self.number > 1:
            dist.all_gather_object(outcomes, (result, problem), group=self.group)
        for _, found in outcomes:
            if found is not None and self.rank == 0:
                raise found
            if found is not None:  # rank 0 reports it
                raise self.exit(2)
        return [value for value, _ in outcomes]

    def exit(self, status: int) -> SystemExit:
        """Return the end of this process, as a step of all ranks.

        Lightning kills the first process of a node when one that it started fails, so only the first has the status.
        """
        return SystemExit(status if self.is_first_of_node else 0)
