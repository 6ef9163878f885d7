"""Retrieval of a fact from the context, over context length and depth.

An item is a context of about L tokens: a needle ("In Oslo Anna sings.") at relative depth d among filler and facts
about other places, then the question. The options are the people that the context names, scored by
log-likelihood, so guessing among what was seen gives 1 / num_options and only the needle tells more. Places and
people are drawn anew for every item. Any tokenizer and any decoder will do; nothing is generated.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from meap_lit.data.corpora.facts import NAMES, OPENING, Filler, draw_facts
from meap_lit.errors import UserError
from meap_lit.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RetrievalGrid:
    """What is asked.

    Args:
        lengths: Lengths L in tokens, from the first token to the last of the longest option.
        depths: Depths d of the needle, from 0 (first in the context) to 1 (last).
        num_items: Items for each length and depth.
        num_options: People in the context, the right one included.
        seed: Seed of all items.
        filler: File or folder of text whose sentences surround the facts; made up if not given.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    num_items: int = 20
    num_options: int = 4
    seed: int = 0
    filler: str | None = None

    def __post_init__(self) -> None:
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise UserError(f"retrieval depths must be in [0, 1], got {depth:g}")
        if not self.depths:
            raise UserError("retrieval depths must name at least one depth, got none")
        if self.num_items < 1:
            raise UserError(f"retrieval num_items must be at least 1, got {self.num_items}")
        if not 2 <= self.num_options <= len(NAMES):
            raise UserError(f"retrieval num_options must be in [2, {len(NAMES)}], got {self.num_options}")

    @property
    def chance(self) -> float:
        """Accuracy, in [0, 1], of guessing among the people that the context names."""
        return 1 / self.num_options


@dataclass(frozen=True)
class RetrievalItem:
    """One question.

    Args:
        length: Length L that it was built for, in tokens.
        depth: Depth that was asked for.
        text: Context and question as text, up to the answer.
        needle: The sentence that holds the answer; `text` has it once.
        context_ids: Tokens that all options continue.
        options: Tokens of each option, at least one each.
        answer: Index of the right option.
    """

    length: int
    depth: float
    text: str
    needle: str
    context_ids: list[int]
    options: list[list[int]]
    answer: int


# ---------------------------------------------------------------------------------------------------- items


def build_items(grid: RetrievalGrid, tokenizer: Tokenizer) -> list[RetrievalItem]:
    """All items of the grid: lengths outermost, then depths. The same grid and tokenizer give the same items.

    Raises:
        UserError: If a length has no room for the facts and the question, or `filler` cannot be read.
    """
    filler = Filler() if grid.filler is None else Filler.read(grid.filler)
    num_tokens = cache(lambda sentence: len(tokenizer.encode(" " + sentence)))  # many come again

    def build(length: int, depth: float, index: int) -> RetrievalItem:
        rng = random.Random(f"{grid.seed}/{length}/{depth}/{index}")
        return _build_item(grid, length, depth, rng, tokenizer, filler, num_tokens)

    if grid.lengths:  # a length without room is said before long ones are made
        build(min(grid.lengths), grid.depths[0], 0)
    return [
        build(length, depth, index)
        for length in grid.lengths
        for depth in grid.depths
        for index in range(grid.num_items)
    ]


def _build_item(
    grid: RetrievalGrid,
    length: int,
    depth: float,
    rng: random.Random,
    tokenizer: Tokenizer,
    filler: Filler,
    num_tokens: Callable[[str], int],
) -> RetrievalItem:
    facts = draw_facts(rng, grid.num_options)
    answer = rng.randrange(grid.num_options)
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

    while True:  # the room above is an estimate and filled to the brim: take filler out until the item fits
        text = " ".join([OPENING, *_insert(needle.statement, surroundings, depth), question])
        # what is too long with one option need not be encoded with the others
        if not padding or len(tokenizer.encode_prompt(f"{text} {facts[0].name}")) <= length:
            context_ids, options = _encode_options(text, [fact.name for fact in facts], tokenizer)
            size = len(context_ids) + max(map(len, options))
            if size <= length:
                return RetrievalItem(length, depth, text, needle.statement, context_ids, options, answer)
            if not padding:
                raise UserError(
                    f"retrieval length {length} has no room for {grid.num_options} facts and a question; "
                    f"make it at least {size}, or lower num_options"
                )
        surroundings.remove(padding.pop())


def _insert(needle: str, surroundings: list[str], depth: float) -> list[str]:
    """The sentences with `needle` where a share `depth` of their characters stands before it, as near as it gets."""
    starts = list(accumulate((len(sentence) for sentence in surroundings), initial=0))  # and the end of the last
    index = min(range(len(starts)), key=lambda index: abs(starts[index] - depth * starts[-1]))
    return [*surroundings[:index], needle, *surroundings[index:]]


def _encode_options(text: str, options: list[str], tokenizer: Tokenizer) -> tuple[list[int], list[list[int]]]:
    """Tokens of `text`, started as a document of its own, and of each word that may continue it.

    Text and option are encoded together, as in training; where an option changes the last tokens of the text, those
    count as part of the options.
    """
    encoded = tokenizer.encode_batch([text, *(f"{text} {option}" for option in options)])
    rows = [[*tokenizer.before_text, *ids] for ids in encoded]
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    context_ids = [column[0] for column in columns]
    return context_ids, [row[len(context_ids) :] for row in rows[1:]]


# -------------------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def score_items(
    decoder: nn.Module, items: Sequence[RetrievalItem], grid: RetrievalGrid, batch_size: int = 32
) -> np.ndarray:
    """Share of items whose right option has the highest summed log-likelihood.

    Args:
        decoder: Maps token ids [B, T] to hidden states [B, T, D]; its `logits` maps those to scores [..., V].
        items: What `build_items` made for `grid`.
        grid: The grid.
        batch_size: Sequences in one forward.

    Returns:
        Accuracy in [0, 1], [num_lengths, num_depths].
    """
    scores = option_scores(decoder, items, batch_size)
    correct = [row.index(max(row)) == item.answer for row, item in zip(scores, items, strict=True)]
    return np.array(correct, dtype=float).reshape(len(grid.lengths), len(grid.depths), grid.num_items).mean(axis=2)


@torch.no_grad()
def option_scores(decoder: nn.Module, items: Sequence[RetrievalItem], batch_size: int) -> list[list[float]]:
    """Summed log-likelihood of each option of each item; arguments as in `score_items`."""
    # An option's last token is predicted but never read, so options of one token share a single row.
    rows: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # input -> the (item, option) pairs read off it
    for item_index, item in enumerate(items):
        for option_index, option in enumerate(item.options):
            rows.setdefault((*item.context_ids, *option[:-1]), []).append((item_index, option_index))

    scores = [[0.0] * len(item.options) for item in items]
    device = next(decoder.parameters()).device
    ordered = sorted(rows, key=len)  # rows of like length together, so that little of a batch is padding
    for first in range(0, len(ordered), batch_size):
        batch = ordered[first : first + batch_size]
        read = [  # of every option token: row of the batch, position that predicts it, its id, item, option
            (row, len(items[i].context_ids) - 1 + offset, token, i, j)
            for row, tokens in enumerate(batch)
            for i, j in rows[tokens]
            for offset, token in enumerate(items[i].options[j])
        ]
        # attention is causal, so padding on the right changes nothing before it
        input_ids = pad_sequence([torch.tensor(tokens) for tokens in batch], batch_first=True)  # [B, T]
        row_ids, positions, targets = torch.tensor([entry[:3] for entry in read], device=device).unbind(1)  # [N]
        hidden = decoder(input_ids.to(device))[row_ids, positions]  # [N, D]
        log_probs = decoder.logits(hidden).float().log_softmax(dim=-1)  # type: ignore[operator]  # [N, V]
        for (*_, i, j), log_prob in zip(read, log_probs.gather(1, targets[:, None])[:, 0].tolist(), strict=True):
            scores[i][j] += log_prob
    return scores


# --------------------------------------------------------------------------------------------------- figure

_COLOURS = ("#F0496E", "#EBB839", "#0CD79F")  # 0, 50 and 100%


def plot_grid(accuracy: np.ndarray, grid: RetrievalGrid, title: str) -> "Figure":
    """Heat map of accuracy in percent: length from left to right, depth from top to bottom.

    Args:
        accuracy: Accuracy in [0, 1], [num_lengths, num_depths].
        grid: The grid it was measured on.
        title: First line of the title; the second gives mean and chance.
    """
    # imported here because a run without a figure should not wait for it; no pyplot, hence no global state
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    num_lengths, num_depths = accuracy.shape
    figure = Figure(figsize=(2.5 + 0.8 * num_lengths, 1.8 + 0.5 * num_depths), layout="constrained")
    axes = figure.add_subplot()
    colours = LinearSegmentedColormap.from_list("retrieval", _COLOURS)
    image = axes.imshow(100 * accuracy.T, vmin=0, vmax=100, cmap=colours, aspect="auto")
    for column in range(num_lengths):
        for row in range(num_depths):
            axes.text(column, row, f"{100 * accuracy[column, row]:.0f}", ha="center", va="center")
    axes.set_xticks(range(num_lengths), [f"{length:,}" for length in grid.lengths])
    axes.set_yticks(range(num_depths), [f"{100 * depth:.0f}" for depth in grid.depths])
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("depth of the fact (%)")
    axes.set_title(f"{title}\nmean {100 * accuracy.mean():.1f}%, chance {100 * grid.chance:.1f}%")
    figure.colorbar(image, ax=axes, label="accuracy (%)")
    return figure
