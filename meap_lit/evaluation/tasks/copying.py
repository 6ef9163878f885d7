"""Loss on a repeated span of tokens: whether the model copies from its context, and over which distance.

An item is a span of held-out text, other text, and the span again. Spans of random tokens, which only copying can
predict, are the repeated random sequences of "In-context Learning and Induction Heads" (Olsson et al. 2022,
arXiv 2209.11895).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from meap_lit.errors import UserError, check_range
from meap_lit.evaluation.task import Item, Plot, Record, check_distinct, lengths_that_fit
from meap_lit.evaluation.tasks.sequences import SequenceTask
from meap_lit.inference.language_model import LanguageModel
from meap_lit.tokenizer.tokenizer import Tokenizer


@dataclass(kw_only=True)
class Copying(SequenceTask):
    """Mean negative log-likelihood of a span at its first (`first_loss`) and at its second occurrence (`copy_loss`).

    `gain` is their difference. The first token of each occurrence does not count, since nothing indicates that the span
    begins. The text before the second occurrence may help or mislead, so the gain on spans of text is not due to
    copying alone. As in `Perplexity`, no token is put before a sequence.

    Spans are drawn from the sequences of the dataset and do not overlap. The text between is the end of another
    sequence. Every span is used at every distance, with the same text directly before its second occurrence.

    Args:
        seq_len: Maximum number of tokens that the model reads; 2 * span_len + distance - 1 must not exceed it.
        num_sequences: Number of sequences from which spans and the text between are drawn.
        source: Take spans from the text of the dataset, or draw random tokens that are not special.
        span_len: Tokens of a span.
        distances: Tokens between the two occurrences.
        num_spans: Number of spans, each at all distances.
        seed: Seed of the spans.
    """

    name = "copying"
    metrics = ("copy_loss", "first_loss", "gain", "copy_accuracy")
    unit = "nats"
    other_units = {"copy_accuracy": "%"}
    higher_is_better = False
    by_key = ("copy_accuracy",)
    plots = (
        Plot(
            "copying",
            "distance",
            lines={"repeated": "copy_loss", "first time": "first_loss"},
            x_label="distance between the two occurrences (tokens)",
            value_label="loss of the span (nats per token)",
            log_x=True,
            caption="A model that copies from its context has a lower loss when it reads a span the second time. The "
            "distance is the number of tokens between the first time and the second.",
        ),
    )

    source: Literal["text", "random"] = "text"
    span_len: int = 64
    distances: tuple[int, ...] = (0, 64, 256, 1024, 3900)
    num_spans: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("task.span_len", self.span_len, "[2, inf)", "; the first token of a span does not count")
        check_range("task.num_spans", self.num_spans, "[1, inf)")
        check_distinct("task.distances", self.distances)
        check_range("task.distances", min(self.distances), "[0, inf)")
        longest = 2 * self.span_len + max(self.distances) - 1
        if longest > self.seq_len:
            raise UserError(
                f"two spans of {self.span_len} tokens with {max(self.distances)} between need task.seq_len {longest}, "
                f"got {self.seq_len}; shorten task.span_len or task.distances, or raise task.seq_len"
            )

    def extent(self, model: LanguageModel) -> tuple[int, int] | None:
        super().extent(model)
        return 2 * self.span_len + min(self.distances) - 1, 2 * self.span_len + max(self.distances) - 1

    def options_that_fit(self, context: int) -> dict[str, Any]:
        longest = context - 2 * self.span_len + 1
        return {"distances": lengths_that_fit(self.distances, longest)} if longest >= 0 else {}

    def items(self, model: LanguageModel) -> list[Item]:
        items = []
        for number, (span, between) in enumerate(self._draws(model)):
            text = model.tokenizer.decode(span)
            for distance in self.distances:
                input_ids = [*span, *between[len(between) - distance :], *span]
                cell, name = {"distance": distance}, f"{self.source}-{number}"
                # the last token is only a label
                items.append(Item(f"{name}/{distance}", cell, {"span": text}, input_ids, len(input_ids) - 1, name))
        return items

    def answer(self, model: LanguageModel, items: Sequence[Item]) -> list[Record]:
        results = model.log_probs([item.input_ids for item in items], [1] * len(items))
        counted = self.span_len - 1
        return [
            {
                "first_loss": -float(log_probs[:counted].double().mean()),
                "copy_loss": -float(log_probs[-counted:].double().mean()),
                "copied": float(is_best[-counted:].double().mean()),
            }
            for log_probs, is_best in results
        ]

    def score(self, record: Record) -> dict[str, float]:
        first, copy = record["first_loss"], record["copy_loss"]
        return {"copy_loss": copy, "first_loss": first, "gain": first - copy, "copy_accuracy": 100 * record["copied"]}

    def _draws(self, model: LanguageModel) -> list[tuple[list[int], list[int]]]:
        """Return each span, and the sequence whose end comes between its occurrences."""
        blocks, rng = self.blocks(model), random.Random(self.seed)
        if self.source == "random":
            vocabulary = ordinary_ids(model.tokenizer)
            return [(rng.choices(vocabulary, k=self.span_len), rng.choice(blocks)) for _ in range(self.num_spans)]
        spans_in_block = (self.seq_len + 1) // self.span_len
        num_possible = len(blocks) * spans_in_block
        if len(blocks) < 2 or num_possible < self.num_spans:
            raise UserError(
                f"the {self.split} split of dataset {self.dataset} gives {len(blocks)} sequences of {self.seq_len + 1} "
                f"tokens, too few: they have {num_possible} spans for task.num_spans {self.num_spans}, and the text "
                f"between is of another sequence; lower task.num_spans or task.seq_len, or raise task.num_sequences"
            )
        draws = []
        for place in rng.sample(range(num_possible), self.num_spans):
            row, start = place // spans_in_block, place % spans_in_block * self.span_len
            other = (row + rng.randrange(1, len(blocks))) % len(blocks)
            draws.append((blocks[row][start : start + self.span_len], blocks[other]))
        return draws


def ordinary_ids(tokenizer: Tokenizer) -> list[int]:
    """Return all ids of the vocabulary except special tokens."""
    backend = tokenizer.copy_backend()
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    special |= set(tokenizer.special_tokens.values())
    vocabulary = backend.get_vocab(with_added_tokens=True)
    return sorted(token_id for token, token_id in vocabulary.items() if token not in special)
