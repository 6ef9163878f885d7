"""Questions about sentences hidden in a long context, over a grid of lengths and depths.

The model's own tokenizer measures the finished prompt, so prompt and answer never exceed the L tokens of their cell
and usually fill them exactly.
"""

import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meap_lit.errors import UserError, check_range
from meap_lit.evaluation.task import GenerationTask, Item, Plot, check_distinct, lengths_that_fit
from meap_lit.evaluation.tasks.haystack import Boundary, Documents, Haystack
from meap_lit.inference.language_model import LanguageModel

INTRODUCTION = (
    "You are an intelligent AI assistant skilled in answering user questions.\n"
    "Please keep your answers concise and clear. Do not talk about irrelevant topics or repeat your answers.\n"
    "The document given to you by the user is "
)
"""Text before the context (open-compass/opencompass, opencompass/datasets/needlebench/origin.py)."""

_MAX_TRIES = 6
"""Attempts to fill the last tokens; two usually suffice."""

_FAR = 10
"""Percent of the haystack by which the end of a sentence may be away from the depth, if the sentence is long."""

_LONG = 2000
"""Characters that no sentence of a text has; the longest of Paul Graham's essays has 1,071."""


@dataclass(frozen=True)
class HaystackPrompt:
    """A prompt without its haystack.

    Args:
        repeat: Number of the haystack, each with another order of the documents.
        needles: Texts to hide, in order.
        before: Part of the prompt before the context.
        after: Part of the prompt after the context.
        fields: Fields of the source that the record keeps.
        cell: Cell of the table, besides length and depth.
    """

    repeat: int
    needles: tuple[str, ...]
    before: str
    after: str
    fields: Mapping[str, Any]
    cell: Mapping[str, Any] = field(default_factory=dict)

    def with_needles(self, text: str, positions: Sequence[int]) -> str:
        """Return the whole prompt, with each needle inserted into `text` before the character at its position.

        Raises:
            UserError: If a needle also appears elsewhere in the context.
        """
        starts = [0, *positions]
        pieces = [text[start:stop] for start, stop in zip(starts, [*positions, len(text)], strict=True)]
        context = "".join(piece for pair in zip(pieces, [*self.needles, ""], strict=True) for piece in pair)
        for needle in self.needles:
            if needle.strip() in text or context.count(needle) != 1:
                raise UserError(
                    f"needle {needle.strip()!r} must appear once in its context, but the haystack or another needle "
                    f"contains it too"
                )
        return self.before + context + self.after


def grid_plot(name: str, metric: str) -> Plot:
    """Return the heat map of a metric over length and depth."""
    return Plot(name, "length", "depth", {"": metric}, x_label="length (tokens)", y_label="depth of the needle (%)")


@dataclass(kw_only=True)
class HaystackTask(GenerationTask):
    """Questions about sentences hidden in a long context, over a grid of lengths and depths.

    Args:
        lengths: Lengths L in the model's tokens, including prompt and `max_new_tokens`.
        depths: Percentage of the haystack's tokens before the (first) needle.
        num_repeats: Questions for each length and depth. Each has another order of the documents, the first the order
            of the file names.
        haystack: Text to hide needles in: a folder of .txt, .md or .jsonl (field `text`), or such a file. By default
            one line of noise, repeated (NVIDIA/RULER).
        repeat: Start the haystack again where it is too short for a length, instead of an error.
        seed: Seed of the orders and of the needles.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    num_repeats: int = 1
    haystack: str | None = None
    repeat: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_distinct("lengths", self.lengths)
        check_distinct("depths", self.depths)
        for depth in self.depths:
            check_range("depths", depth, "[0, 100]", " percent")
        check_range("num_repeats", self.num_repeats, "[1, inf)")

    @abstractmethod
    def prompts(self) -> list[HaystackPrompt]:
        """Return the prompts for each length and depth, `num_repeats` for each cell; data files are read here."""

    @property
    def cut_at(self) -> Boundary:
        """Boundary at which a needle is inserted. With lines, the haystack has whole lines only."""
        return "token"

    def indices(self, num_tokens: int, depth: float, needle_lengths: Sequence[int]) -> list[int]:
        """Return the index of the haystack token before which each needle is inserted, ascending.

        Several needles are spread evenly between `depth` and the end (gkamradt/LLMTest_NeedleInAHaystack,
        needlehaystack/llm_multi_needle_haystack_tester.py).

        Args:
            num_tokens: Length of the haystack; this index is its end.
            depth: Depth of the first needle, in percent.
            needle_lengths: Number of tokens of each needle.
        """
        step = (100 - depth) / len(needle_lengths)
        return [int(num_tokens * (depth + number * step) / 100) for number in range(len(needle_lengths))]

    def extent(self, model: LanguageModel) -> tuple[int, int] | None:
        super().extent(model)
        self.prompts()
        if self.haystack is not None:
            Documents.find(self.haystack)
        return min(self.lengths), max(self.lengths)

    def options_that_fit(self, context: int) -> dict[str, Any]:
        return {"lengths": lengths_that_fit(self.lengths, context)}

    def items(self, model: LanguageModel) -> list[Item]:
        prompts = self.prompts()
        if self.haystack is None:
            documents = Documents.noise(model.tokenizer)
        else:
            documents = Documents.read(self.haystack, model.tokenizer)
        # a document may have fewer tokens within a text than alone, so take more than the longest prompt needs
        num_tokens = max(self.lengths) * 5 // 4 + 64
        orders = [random.Random(f"{self.seed}/{repeat}") if repeat else None for repeat in range(self.num_repeats)]
        repeat = self.repeat or self.haystack is None
        haystacks = [documents.haystack(num_tokens, order, repeat) for order in orders]
        for prompt in prompts:  # fail early if a length has too little room, or the haystack is too short
            for length in (min(self.lengths), max(self.lengths)):
                _Filler(self, model, prompt, haystacks[prompt.repeat], "").item(length, self.depths[0])
        # what is asked under other conditions is drawn together, see `Item.group`
        questions = {needles: str(n) for n, needles in enumerate(dict.fromkeys(prompt.needles for prompt in prompts))}
        fillers = [
            _Filler(self, model, prompt, haystacks[prompt.repeat], questions[prompt.needles]) for prompt in prompts
        ]
        return [filler.item(length, depth) for length in self.lengths for depth in self.depths for filler in fillers]


class _Filler:
    """Fill a prompt with as much of a haystack as a length has room for."""

    def __init__(
        self, task: HaystackTask, model: LanguageModel, prompt: HaystackPrompt, haystack: Haystack, group: str
    ) -> None:
        self.task = task
        self.model = model
        self.prompt = prompt
        self.haystack = haystack
        self.group = group
        self.needle_lengths = [len(model.tokenizer.encode(needle)) for needle in prompt.needles]
        self.num_others = sum(self.needle_lengths)
        """Tokens of the prompt outside the haystack: estimated at first, then measured."""

    def item(self, length: int, depth: float) -> Item:
        """Return the item whose prompt and answer fill `length` tokens, or nearly so.

        Raises:
            UserError: If needles and question leave no room for a haystack, or the haystack is too short.
        """
        budget = length - self.task.max_new_tokens
        best: tuple[list[int], dict[str, Any]] | None = None
        tried: set[int] = set()
        num_tokens = max(0, budget - self.num_others)
        while True:
            num_tokens = self._whole(min(num_tokens, len(self.haystack)))
            if num_tokens in tried or (best is not None and len(tried) >= _MAX_TRIES):
                break
            tried.add(num_tokens)
            input_ids, true_depths = self._prompt(num_tokens, depth)
            self.num_others = len(input_ids) - num_tokens
            room = budget - len(input_ids)
            if room > 0 and num_tokens == len(self.haystack) and not self.task.repeat:
                raise UserError(
                    f"haystack {self.task.haystack} has {len(self.haystack)} tokens, {room} too few for length "
                    f"{length}; add text, or set repeat to true"
                )
            if room >= 0 and num_tokens > 0 and (best is None or len(input_ids) > len(best[0])):
                best = input_ids, {"true_depths": true_depths, "num_prompt_tokens": len(input_ids)}
            num_tokens = max(0, num_tokens + room)
        if best is None:
            raise UserError(
                f"length {length} has no room for a haystack; needles, question and answer alone need "
                f"{len(self._prompt(0, depth)[0]) + self.task.max_new_tokens} tokens"
            )
        input_ids, measured = best
        cell = {**self.prompt.cell, "length": length, "depth": depth}
        id = "/".join(f"{key}={value:.10g}" for key, value in [*cell.items(), ("repeat", self.prompt.repeat)])
        fields = {**self.prompt.fields, **measured}
        return Item(id, cell, fields, input_ids, len(input_ids) + self.task.max_new_tokens, self.group)

    def _prompt(self, num_tokens: int, depth: float) -> tuple[list[int], list[float]]:
        """Encode the prompt with the first `num_tokens` of the haystack; return also the true depths, in percent."""
        text = self.haystack.text[: self.haystack.cut(num_tokens, "token")]
        indices = self.task.indices(num_tokens, depth, self.needle_lengths)
        positions = [
            len(text) if index >= num_tokens else self.haystack.cut(index, self.task.cut_at) for index in indices
        ]
        if self.task.cut_at == "sentence":
            for index, place in zip(indices, positions, strict=True):
                self._check_depth(num_tokens, index, place)
        prompt = self.prompt.with_needles(text, positions)
        true_depths = [round(100 * self.haystack.index(place) / max(1, num_tokens), 2) for place in positions]
        return self.task.encode_prompt(self.model, prompt), true_depths

    def _check_depth(self, num_tokens: int, index: int, position: int) -> None:
        """Raise `UserError` if a needle is far from its depth because the haystack has no end of a sentence there."""
        asked, true = (100 * place / max(1, num_tokens) for place in (index, self.haystack.index(position)))
        if asked <= 100 and asked - true > _FAR and self.haystack.sentence_length(index) > _LONG:
            way_out = "add --task.boundary token" if hasattr(self.task, "boundary") else "name another haystack"
            raise UserError(
                f"haystack {self.task.haystack} has no end of a sentence (a period before a space) from {true:.0f}% to "
                f"{asked:.0f}% of its tokens, where a needle belongs; {way_out}"
            )

    def _whole(self, num_tokens: int) -> int:
        """Return `num_tokens` without those of an incomplete last line, if the haystack has whole lines only."""
        if self.task.cut_at != "line":
            return num_tokens
        return self.haystack.index(self.haystack.cut(num_tokens, "line"))
