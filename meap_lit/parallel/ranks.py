"""The ranks of a run, which take an action together: it fails on all if it fails on one."""

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
        beside_training: Talk over a gloo group of their own, which a thread may use while the training step uses the
            devices'. All ranks must ask for it at the same point.
    """

    def __init__(self, trainer: L.Trainer, *, beside_training: bool = False) -> None:
        self.rank = trainer.global_rank
        self.number = trainer.world_size
        self.is_first_of_node = trainer.local_rank == 0
        self.group: dist.ProcessGroup | None = None
        if beside_training and self.number > 1:
            self.group = dist.new_group(backend="gloo")

    def do(self, action: Callable[[], T]) -> list[T]:
        """Do `action` on every rank and wait for all; what each returned, in the order of the ranks.

        Raises:
            OSError: If a file could not be written or read on one rank; raised on rank 0, while the others leave.
            UserError: If wrong input was found on one, likewise.
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
            if found is not None:  # rank 0 says it for all, and Lightning kills it when a process it started fails
                raise SystemExit(2 if self.is_first_of_node else 0)
        return [value for value, _ in outcomes]
