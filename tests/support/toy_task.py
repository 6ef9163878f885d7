"""A task whose answers are known: how many letters a word has."""

import math
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from meap_lit.evaluation.task import Item, Plot, Task

WORDS = ("garden", "lantern", "market", "stone", "river", "a")


@dataclass(kw_only=True)
class CountLetters(Task):
    """Right of the model named `source`, wrong by the number `miss` for any other.

    Args:
        miss: How wrong.
        kill_after: Kill this process after so many batches.
        lengths: Groups of items; the tokens of an item are as many.
    """

    name: ClassVar[str] = "letters"
    metrics: ClassVar[tuple[str, ...]] = ("right", "near")
    plots: ClassVar[tuple[Plot, ...]] = (Plot("letters", "word"),)

    miss: int = 1
    kill_after: int | None = None
    lengths: tuple[int, ...] = (10, 20)

    def items(self, model):
        start = model.tokenizer.encode("the")
        return [
            Item(f"{length}-{word}", {"length": length, "word": word}, {"word": word}, start * length, length)
            for length in self.lengths
            for word in WORDS
        ]

    def answer(self, model, items: Sequence[Item]):
        if self.kill_after is not None:
            if self.kill_after == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.kill_after -= 1
        wrong = 0 if model.checkpoint.endswith("right") else self.miss
        return [{"count": len(item.fields["word"]) + wrong, "pid": os.getpid()} for item in items]

    def score(self, record):
        distance = abs(record["count"] - len(record["word"]))
        return {"right": 100.0 * (distance == 0), "near": 100.0 * (distance <= 1)}

    @classmethod
    def extra(cls, result):
        return {"sum of counts": float(sum(record["count"] for record in result.records))}

    @classmethod
    def extra_of_pair(cls, first, second):
        return {"nothing": math.nan}


class OnTwoMachines(CountLetters):
    """Each process has files of its own: settings name them, and with `miss` 7 its items come from them."""

    def settings(self, model):
        return {"place": f"/machine_{os.environ['RANK']}"}

    def items(self, model):
        first, *others = super().items(model)
        fields = {**first.fields, "place": os.environ["RANK"] if self.miss == 7 else ""}
        return [replace(first, fields=fields), *others]
