"""Retrieval of a made-up fact from the context, over length and depth, for models of any size.

The context has about L tokens: a needle ("In Oslo Anna sings.") at relative depth d among filler and facts about other
places. The question follows. The options are the people in the context, compared by log-likelihood. So guessing gives
1 / num_options, and nothing is generated. Every item has other places and people. Any tokenizer and any decoder will
do. `RetrievalProbe` runs the same task during training.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import accumulate, takewhile
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from meap_lit.data.corpora.facts import OPENING, Filler, draw_facts, most_facts
from meap_lit.data.read.find import find_files
from meap_lit.errors import UserError, check_range
from meap_lit.evaluation.runner import batches
from meap_lit.evaluation.task import Item, Plot, Record, Result, Task, check_distinct, lengths_that_fit
from meap_lit.inference.generation import not_finite
from meap_lit.inference.language_model import LanguageModel
from meap_lit.tokenizer.tokenizer import Tokenizer


@dataclass(kw_only=True)
class FactRetrieval(Task):
    """A fact among other facts and filler, over length and depth.

    Args:
        lengths: Lengths of the context in tokens, from the first token to the last of the longest option.
        depths: Depths of the fact in the context, from 0 (first) to 1 (last).
        num_items: Questions for each length and depth.
        num_options: People to choose from, the right one included.
        near_duplicates: Use names of two words, where other names have one of the words too, as in `FactCorpus`.
        seed: Seed of the questions.
        filler: File or folder of text whose sentences surround the facts; made up if not given.
    """

    name = "facts"
    metrics = ("accuracy",)
    plots = (
        Plot(
            "facts",
            "length",
            "depth",
            x_label="context length (tokens)",
            y_label="depth of the fact, from 0 to 1",
            choices="num_options",
        ),
    )

    lengths: list[int]
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    num_items: int = 100
    num_options: int = 4
    near_duplicates: bool = False
    seed: int = 1
    filler: str | None = None

    def __post_init__(self) -> None:
        check_distinct("retrieval lengths", self.lengths)
        check_distinct("retrieval depths", self.depths)
        for depth in self.depths:
            check_range("retrieval depths", depth, "[0, 1]")
        check_range("retrieval num_items", self.num_items, "[1, inf)")
        check_range("retrieval num_options", self.num_options, f"[2, {most_facts(self.near_duplicates)}]")

    def extent(self, model: LanguageModel) -> tuple[int, int] | None:
        if self.filler is not None:
            find_files([self.filler])
        return min(self.lengths), max(self.lengths)

    def options_that_fit(self, context: int) -> dict[str, Any]:
        return {"lengths": lengths_that_fit(self.lengths, context)}

    def items(self, model: LanguageModel) -> list[Item]:
        return self.build(model.tokenizer)

    def build(self, tokenizer: Tokenizer) -> list[Item]:
        """Return all items: lengths outermost, then depths.

        Their fields are `text` (context and question, up to the answer), `needle` (the sentence with the answer),
        `context_ids` (tokens that all options continue), `options` (tokens of each option) and `answer` (index of the
        right option).

        Raises:
            UserError: If a length has no room for the facts and the question, or `filler` cannot be read.
        """
        filler = Filler() if self.filler is None else Filler.read(self.filler)
        num_tokens = cache(lambda sentence: len(tokenizer.encode(" " + sentence)))  # most sentences appear often

        def build(length: int, depth: float, index: int) -> Item:
            rng = random.Random(f"{self.seed}/{length}/{depth}/{index}")
            fields = _build_item(self, length, depth, rng, tokenizer, filler, num_tokens)
            num_positions = len(fields["context_ids"]) + max(map(len, fields["options"]))
            cell = {"length": length, "depth": depth}
            return Item(f"{length}-{depth:.10g}-{index}", cell, fields, fields["context_ids"], num_positions)

        build(min(self.lengths), self.depths[0], 0)  # a length without room fails before long items are made
        return [
            build(length, depth, index)
            for length in self.lengths
            for depth in self.depths
            for index in range(self.num_items)
        ]

    def answer(self, model: LanguageModel, items: Sequence[Item]) -> list[Record]:
        scores = option_scores(model.decoder, items, len(items) * max(item.num_tokens for item in items))
        if not all(math.isfinite(score) for row in scores for score in row):
            raise not_finite()
        return [{"option_scores": row} for row in scores]

    def result(self, decoder: nn.Module, items: Sequence[Item], label: str, batch_tokens: int = 16_384) -> Result:
        """Return the result of a decoder that is in training, for items that `build` returned."""
        records = [
            {"id": item.id, "cell": item.cell, "answer": item.fields["answer"], "option_scores": row}
            for item, row in zip(items, option_scores(decoder, items, batch_tokens), strict=True)
        ]
        scored = [{**record, "scores": self.score(record)} for record in records]
        return Result(self, label, scored, about={"task": {"init_args": asdict(self)}})

    def score(self, record: Record) -> dict[str, float]:
        scores = record["option_scores"]
        return {"accuracy": 100.0 * (scores.index(max(scores)) == record["answer"])}


def _build_item(
    task: FactRetrieval,
    length: int,
    depth: float,
    rng: random.Random,
    tokenizer: Tokenizer,
    filler: Filler,
    num_tokens: Callable[[str], int],
) -> Record:
    """Return the fields of an item that has at most `length` tokens."""
    facts = draw_facts(rng, task.num_options, task.near_duplicates)
    answer = rng.randrange(task.num_options)
    needle = facts[answer]
    others = [fact.statement for index, fact in enumerate(facts) if index != answer]
    question = f"{needle.question} {needle.prompt}"
    padding: list[str] = []
    sentences = filler.draw(rng)
    room = length - sum(map(num_tokens, [OPENING, needle.statement, *others, question]))
    while room > 0:
        padding.append(next(sentences))
        room -= num_tokens(padding[-1])
    surroundings = others + padding
    rng.shuffle(surroundings)

    while True:  # the room above is an estimate: remove filler until the item fits
        text = " ".join([OPENING, *_insert(needle.statement, surroundings, depth), question])
        # encode the other options only if the text fits with the first
        if not padding or len(tokenizer.encode_prompt(f"{text} {facts[0].name}")) <= length:
            context_ids, options = _encode_options(text, [fact.name for fact in facts], tokenizer)
            size = len(context_ids) + max(map(len, options))
            if size <= length:
                return {
                    "text": text,
                    "needle": needle.statement,
                    "context_ids": context_ids,
                    "options": options,
                    "answer": answer,
                }
            if not padding:
                raise UserError(
                    f"retrieval length {length} has no room for {task.num_options} facts and a question; "
                    f"make it at least {size}, or lower num_options"
                )
        surroundings.remove(padding.pop())


def _insert(needle: str, surroundings: list[str], depth: float) -> list[str]:
    """Return the sentences with `needle` inserted so that about a share `depth` of their characters comes before it."""
    starts = list(accumulate((len(sentence) for sentence in surroundings), initial=0))  # and the end of the last
    index = min(range(len(starts)), key=lambda index: abs(starts[index] - depth * starts[-1]))
    return [*surroundings[:index], needle, *surroundings[index:]]


def _encode_options(text: str, options: list[str], tokenizer: Tokenizer) -> tuple[list[int], list[list[int]]]:
    """Return the tokens of `text`, as the beginning of a document, and those of each word that may continue it.

    Text and option are encoded together, as in training. If an option changes the last tokens of the text, these tokens
    are part of the options.
    """
    encoded = tokenizer.encode_batch([text, *(f"{text} {option}" for option in options)])
    rows = [[*tokenizer.before_text, *ids] for ids in encoded]
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    context_ids = [column[0] for column in columns]
    return context_ids, [row[len(context_ids) :] for row in rows[1:]]


@torch.no_grad()
def option_scores(decoder: nn.Module, items: Sequence[Item], batch_tokens: int) -> list[list[float]]:
    """Return the summed log-likelihood of each option of each item.

    Args:
        decoder: Maps token ids [B, T] to hidden states [B, T, D]; its `logits` maps those to scores [..., V].
        items: The items that `FactRetrieval.build` returned.
        batch_tokens: Maximum number of positions in a forward, padding included; a longer sequence is one of its own.
    """
    # an option's last token is predicted but not read, so options of one token share a row
    rows: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # input -> the (item, option) pairs read off it
    for item_index, item in enumerate(items):
        for option_index, option in enumerate(item.fields["options"]):
            rows.setdefault((*item.fields["context_ids"], *option[:-1]), []).append((item_index, option_index))

    scores = [[0.0] * len(item.fields["options"]) for item in items]
    device = next(decoder.parameters()).device
    for batch in batches(sorted(rows, key=len), batch_tokens, len):  # similar lengths together, for little padding
        read = [  # for every token of an option: row, position that predicts it, id, item, option
            (row, len(items[i].fields["context_ids"]) - 1 + offset, token, i, j)
            for row, tokens in enumerate(batch)
            for i, j in rows[tokens]
            for offset, token in enumerate(items[i].fields["options"][j])
        ]
        # attention is causal, so padding on the right has no effect
        input_ids = pad_sequence([torch.tensor(tokens) for tokens in batch], batch_first=True)  # [B, T]
        hidden = decoder(input_ids.to(device))  # [B, T, D], not on `device` if the strategy keeps weights on the host
        row_ids, positions, targets = torch.tensor([entry[:3] for entry in read], device=hidden.device).unbind(1)  # [N]
        hidden = hidden[row_ids, positions]  # [N, D]
        log_probs = decoder.logits(hidden).float().log_softmax(dim=-1)  # type: ignore[operator]  # [N, V]
        for (*_, i, j), log_prob in zip(read, log_probs.gather(1, targets[:, None])[:, 0].tolist(), strict=True):
            scores[i][j] += log_prob
    return scores
