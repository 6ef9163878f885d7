"""Attention of the last token of a text to the segments before it: context, answer, and question.

From the analysis in the MEAP paper (arXiv 2502.07490): a model trained with masks gives more attention to the part of
the context that contains the answer. A text is context, a fact, more context, a question about that fact, and EOS,
whose weights are measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meap_lit.errors import check_range
from meap_lit.evaluation.attention.weights import PerHead, as_record, attention_weights, by_head, read
from meap_lit.evaluation.statistics import Mean
from meap_lit.evaluation.task import Item, Plot, Record, Task, lengths_that_fit
from meap_lit.evaluation.tasks.facts import FactRetrieval
from meap_lit.inference.language_model import LanguageModel
from meap_lit.model import Decoder

SEGMENTS = ("context_before", "answer", "context_after", "query", "eos")


def share_by_segment(records: Sequence[Record]) -> dict[str, Mean]:
    """Return the mean share of each segment, in percent."""
    return {name: Mean.of(record["scores"][name] for record in records) for name in SEGMENTS}


def answer_by_head(records: Sequence[Record]) -> dict[tuple[int, int], float]:
    """Return the mean share of the answer, in percent, by the numbers of head and layer, from 1."""
    return by_head(100 * np.mean([record["shares"]["answer"] for record in records], axis=0))


@dataclass(kw_only=True)
class AttentionSegments(Task):
    """Shares of the EOS token's attention, in percent, to the segments of a text; they sum to 100.

    Texts are those of the retrieval probe: facts about people and places among filler. `context_before` begins with
    the first token, BOS if the tokenizer writes one. This token is an attention sink, so `bos` gives its share
    separately. A record has the shares in [0, 1], [num_layers, num_heads].

    Args:
        lengths: Maximum lengths of the texts in tokens.
        depths: Depths of the answer in its context, from 0 (first) to 100 (last).
        num_items: Texts for each length and depth.
        num_options: Facts in a text, including the requested one.
        seed: Seed of the texts.
    """

    name = "attention_segments"
    is_analysis = True
    metrics = ("answer", "context_before", "context_after", "query", "eos", "bos")
    plots = (
        Plot("attention_segments", "segment", lines={"": share_by_segment}, value_label="attention of EOS (%)"),
        Plot(
            "attention_to_answer",
            "head",
            "layer",
            lines={"": answer_by_head},
            value_label="attention of EOS to the answer (%)",
        ),
    )

    lengths: list[int] = field(default_factory=lambda: [4096])
    depths: list[float] = field(default_factory=lambda: [10.0, 30.0, 50.0, 70.0, 90.0])
    num_items: int = 20
    num_options: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for depth in self.depths:
            check_range("task.depths", depth, "[0, 100]")
        self._texts()  # checks the other options

    def _texts(self) -> FactRetrieval:
        return FactRetrieval(
            lengths=self.lengths,
            depths=[depth / 100 for depth in self.depths],
            num_items=self.num_items,
            num_options=self.num_options,
            seed=self.seed,
        )

    def extent(self, model: LanguageModel) -> tuple[int, int] | None:
        return min(self.lengths), max(self.lengths)

    def options_that_fit(self, context: int) -> dict[str, Any]:
        return {"lengths": lengths_that_fit(self.lengths, context)}

    def items(self, model: LanguageModel) -> list[Item]:
        items = []
        for number, source in enumerate(self._texts().build(model.tokenizer)):
            needle = source.fields["needle"]
            input_ids, ends = encode(source.fields["text"], needle, model)
            cell = {"length": source.cell["length"], "depth": round(100 * source.cell["depth"], 6)}
            items.append(Item(f"text-{number}", cell, {"needle": needle, "ends": ends}, input_ids, ends[-1]))
        return items

    def answer(self, model: LanguageModel, items: Sequence[Item]) -> list[Record]:
        rows = [torch.tensor(item.input_ids, device=model.device) for item in items]
        return [
            {"shares": shares(model.decoder, row, item.fields["ends"])} for row, item in zip(rows, items, strict=True)
        ]

    def score(self, record: Record) -> dict[str, float]:
        return {metric: 100 * float(np.mean(record["shares"][metric])) for metric in self.metrics}


def encode(text: str, needle: str, model: LanguageModel) -> tuple[list[int], list[int]]:
    """Return the tokens of a text up to its question, followed by EOS, and the end of each segment in tokens."""
    text = text[: text.rindex("?") + 1]  # without the beginning of the answer
    start = text.index(needle) - 1  # the space before a sentence is part of its first token
    query = text.rindex(". ") + 1
    input_ids = model.tokenizer.encode(text)

    def num_tokens_before(character: int) -> int:
        pairs = zip(input_ids, model.tokenizer.encode(text[:character]), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    before = model.tokenizer.before_text
    places = (start, start + 1 + len(needle), query, len(text))
    ends = [len(before) + num_tokens_before(place) for place in places]
    return [*before, *input_ids, model.tokenizer.eos_token_id], [*ends, ends[-1] + 1]


def shares(decoder: Decoder, input_ids: Tensor, ends: Sequence[int]) -> dict[str, PerHead]:
    """Return the shares of the last token's attention.

    Args:
        decoder: The model.
        input_ids: Token ids, [T], int64, on its device.
        ends: Position after the last token of each of `SEGMENTS`; the last is T.

    Returns:
        For each segment, and the first token as `bos`, shares in [0, 1], [num_layers, num_heads] as lists.
    """
    sizes = [end - start for start, end in pairwise([0, *ends])]
    found: list[Tensor] = []

    def observe(layer: int, query: Tensor, key: Tensor) -> None:
        weights = attention_weights(query[:, -1:], key)[:, 0]  # [H, T]
        found.append(torch.stack([part.sum(1) for part in (*weights.split(sizes, dim=1), weights[:, :1])]))  # [6, H]

    read(decoder, input_ids, observe)
    by_segment = torch.stack(found, dim=1)  # [6, L, H]
    return {name: as_record(values) for name, values in zip((*SEGMENTS, "bos"), by_segment, strict=True)}
