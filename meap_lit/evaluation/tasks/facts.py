"""Which of the people that a context names sings in a place: retrieval that a small model can be asked for.

The task of the probe that runs during training (`retrieval.py`), as an evaluation with its items on disk. The answer is
chosen by log-likelihood among the people of the context, so that guessing gives 1 / num_options and nothing has to be
generated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from meap_lit.data.read.find import find_files
from meap_lit.errors import UserError
from meap_lit.evaluation.figures import curves, heat_maps
from meap_lit.evaluation.task import Item, Record, Task
from meap_lit.evaluation.tasks.retrieval import RetrievalGrid, RetrievalItem, build_items, option_scores
from meap_lit.inference.language_model import LanguageModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from meap_lit.evaluation.task import Result


@dataclass(kw_only=True)
class FactRetrieval(Task):
    """A fact among others and filler, over length and depth.

    Args:
        lengths: Lengths of the context in tokens, question and answer included.
        depths: Where the fact stands, from 0 (first) to 1 (last).
        num_items: Questions for each length and depth.
        num_options: People to choose from.
        seed: Seed of the questions.
        filler: File or folder of text whose sentences surround the facts; made up if not given.
    """

    name: ClassVar[str] = "facts"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    lengths: list[int]
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    num_items: int = 100
    num_options: int = 4
    seed: int = 1
    filler: str | None = None

    def __post_init__(self) -> None:
        if not self.lengths:
            raise UserError("task.lengths must name at least one length, got none")

    def extent(self, model: LanguageModel) -> tuple[int, int] | None:
        self._grid()
        if self.filler is not None:
            find_files([self.filler])
        return min(self.lengths), max(self.lengths)

    def _grid(self) -> RetrievalGrid:
        return RetrievalGrid(
            tuple(self.lengths), tuple(self.depths), self.num_items, self.num_options, self.seed, self.filler
        )

    def items(self, model: LanguageModel) -> list[Item]:
        return [
            Item(
                id=f"{item.length}-{item.depth:g}-{number % self.num_items}",
                cell={"length": item.length, "depth": item.depth},
                fields={
                    "text": item.text,
                    "needle": item.needle,
                    "context_ids": item.context_ids,
                    "options": item.options,
                    "answer": item.answer,
                },
                input_ids=item.context_ids,
                num_tokens=len(item.context_ids) + max(map(len, item.options)),
            )
            for number, item in enumerate(build_items(self._grid(), model.tokenizer))
        ]

    def answer(self, model: LanguageModel, items: Sequence[Item]) -> list[Record]:
        questions = [RetrievalItem(**item.cell, **item.fields) for item in items]
        return [{"option_scores": row} for row in option_scores(model.decoder, questions, len(items))]

    def score(self, record: Record) -> dict[str, float]:
        scores = record["option_scores"]
        return {"accuracy": 100.0 * (scores.index(max(scores)) == record["answer"])}

    def figures(self, results: "Sequence[Result]") -> "dict[str, Figure]":
        if len(self.lengths) == 1:
            lines = {
                result.label: {100 * depth: mean.value for depth, mean in result.along("depth").items()}
                for result in results
            }
            chance = {"chance": 100 / self.num_options}
            return {
                "facts": curves(
                    lines, x_label="depth of the fact (%)", y_label="accuracy (%)", levels=chance, y_range=(0, 105)
                )
            }
        panels = {}
        for result in results:
            table = result.table("accuracy")
            panels[result.label] = np.array(
                [[table[length, depth].value for length in self.lengths] for depth in self.depths]
            )
        return {
            "facts": heat_maps(
                panels,
                self.lengths,
                [100 * depth for depth in self.depths],
                x_label="context length (tokens)",
                y_label="depth of the fact (%)",
            )
        }
