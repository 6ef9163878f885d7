"""Questions about what is hidden in a long context, over a grid of lengths and depths.

A prompt's length is what the model's own tokenizer counts when all has been put together, so prompt and answer
never take more than the L tokens of their cell, and as a rule exactly as many.
"""

import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meap_lit.errors import UserError
from meap_lit.evaluation.task import GenerationTask, Item, Plot
from meap_lit.evaluation.tasks.haystack import Boundary, Documents, Haystack
from meap_lit.inference.language_model import LanguageModel

INTRODUCTION = (
    "You are an intelligent AI assistant skilled in answering user questions.\n"
    "Please keep your answers concise and clear. Do not talk about irrelevant topics or repeat your answers.\n"
    "The document given to you by the user is "
)
"""What stands before the context (open-compass/opencompass, opencompass/datasets/needlebench/origin.py)."""

_MAX_TRIES = 6  # to fill the last tokens; two are the rule


@dataclass(frozen=True)
class HaystackPrompt:
    """Something to hide and to ask for.

    Args:
        repeat: Which order of the documents it is asked with.
        needles: What is hidden, as it goes into the text, in order.
        before: Of the prompt, what stands before the context.
        after: Of the prompt, what stands after the context.
        fields: What the record keeps of the source.
        cell: Where it counts in the table, besides length and depth.
    """

    repeat: int
    needles: tuple[str, ...]
    before: str
    after: str
    fields: Mapping[str, Any]
    cell: Mapping[str, Any] = field(default_factory=dict)

    def with_needles(self, text: str, positions: Sequence[int]) -> str:
        """The prompt with each needle before the character of `text` at its position; positions ascend.

        Raises:
            UserError: If a needle is also part of the text, or there are two alike.
        """
        starts = [0, *positions]
        pieces = [text[start:stop] for start, stop in zip(starts, [*positions, len(text)], strict=True)]
        context = "".join(piece for pair in zip(pieces, [*self.needles, ""], strict=True) for piece in pair)
        for needle in self.needles:
            if needle.strip() in text or context.count(needle) != 1:
                raise UserError(
                    f"needle {needle.strip()!r} must stand once in its context, but the haystack or another needle "
                    f"holds it as well"
                )
        return self.before + context + self.after


def grid_plot(name: str, metric: str) -> Plot:
    """Return the heat map of a metric over length and depth."""
    return Plot(name, "length", "depth", {"": metric}, x_label="length (tokens)", y_label="depth of the needle (%)")


@dataclass(kw_only=True)
class HaystackTask(GenerationTask):
    """Questions about what is hidden in a long context, over a grid of lengths and depths.

    Args:
        lengths: Lengths L in the model's tokens, from the first of the prompt to the last of `max_new_tokens`.
        depths: Percentage of the haystack's tokens that stand before the needle, the first if there are several.
        num_repeats: Questions for each length and depth, each in another order of the documents; the first in that of
            the files' names.
        haystack: What to hide something in: a folder of .txt, .md or .jsonl (field `text`), or such a file. If not
            given, one line of noise over and over (NVIDIA/RULER).
        repeat: Begin the haystack anew where it is too short for a length; without, that is an error.
        seed: Seed of the orders and of what is drawn.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    num_repeats: int = 1
    haystack: str | None = None
    repeat: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in (("lengths", self.lengths), ("depths", self.depths)):
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name} must name at least one value and each once, got {list(values)}")
        for depth in self.depths:
            if not 0 <= depth <= 100:
                raise UserError(f"depths must be in [0, 100] percent, got {depth:g}")
        if self.num_repeats < 1:
            raise UserError(f"num_repeats must be at least 1, got {self.num_repeats}")

    @abstractmethod
    def prompts(self) -> list[HaystackPrompt]:
        """What is asked at each length and depth, `num_repeats` for each of their cells; data files are read here."""

    @property
    def cut_at(self) -> Boundary:
        """Where the haystack may be cut to put a needle in. With lines it consists of whole ones."""
        return "token"

    def indices(self, num_tokens: int, depth: float, needle_lengths: Sequence[int]) -> list[int]:
        """The tokens of a haystack before which the needles go; ascending, `num_tokens` is the end.

        Several are spread evenly between `depth` and the end (gkamradt/LLMTest_NeedleInAHaystack,
        needlehaystack/llm_multi_needle_haystack_tester.py).

        Args:
            num_tokens: Length of the haystack.
            depth: Of the first needle, in percent.
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

    def items(self, model: LanguageModel) -> list[Item]:
        questions = self.prompts()
        if self.haystack is None:
            documents = Documents.noise(model.tokenizer)
        else:
            documents = Documents.read(self.haystack, model.tokenizer)
        # a document may have fewer tokens within a text than alone, so there are more than the longest prompt takes
        num_tokens = max(self.lengths) * 5 // 4 + 64
        orders = [random.Random(f"{self.seed}/{repeat}") if repeat else None for repeat in range(self.num_repeats)]
        repeat = self.repeat or self.haystack is None
        haystacks = [documents.haystack(num_tokens, order, repeat) for order in orders]
        ids: dict[int, int] = {}

        def filler(question: HaystackPrompt) -> _Filler:
            return _Filler(self, model, question, haystacks[question.repeat], ids)

        for question in questions:  # what has too little room, or too little haystack, shows in these first
            for length in (min(self.lengths), max(self.lengths)):
                filler(question).item(length, self.depths[0])
        fillers = [filler(question) for question in questions]
        return [filler.item(length, depth) for length in self.lengths for depth in self.depths for filler in fillers]


class _Filler:
    """Puts as much of a haystack around the needles of a question as a length has room for.

    Args:
        task: The task.
        model: Its tokenizer counts.
        question: The question.
        haystack: What to take from, longer than any length unless the task does not repeat it.
        ids: Shared by all, so that equal ids are one object: many long prompts then take a quarter of the memory.
    """

    def __init__(
        self,
        task: HaystackTask,
        model: LanguageModel,
        question: HaystackPrompt,
        haystack: Haystack,
        ids: dict[int, int],
    ) -> None:
        self.task = task
        self.model = model
        self.question = question
        self.haystack = haystack
        self.ids = ids
        self.needle_lengths = [len(model.tokenizer.encode(needle)) for needle in question.needles]
        self.num_others = sum(self.needle_lengths)
        """Tokens of a prompt that are not the haystack's; a guess until there has been one."""

    def item(self, length: int, depth: float) -> Item:
        """The item whose prompt and answer fill `length` tokens, or as many of them as can be.

        Raises:
            UserError: If there is no room for the needles and the question, or not enough haystack.
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
        cell = {**self.question.cell, "length": length, "depth": depth}
        id = "/".join(f"{key}={value:.10g}" for key, value in [*cell.items(), ("repeat", self.question.repeat)])
        num_positions = len(input_ids) + self.task.max_new_tokens
        return Item(
            id,
            cell,
            {**self.question.fields, **measured},
            [self.ids.setdefault(token_id, token_id) for token_id in input_ids],
            num_positions,
        )

    def _prompt(self, num_tokens: int, depth: float) -> tuple[list[int], list[float]]:
        """The prompt with the first tokens of the haystack, and how deep in these each needle really is, in percent."""
        text = self.haystack.text[: self.haystack.cut(num_tokens, "token")]
        positions = [
            len(text) if index >= num_tokens else self.haystack.cut(index, self.task.cut_at)
            for index in self.task.indices(num_tokens, depth, self.needle_lengths)
        ]
        prompt = self.question.with_needles(text, positions)
        true_depths = [round(100 * self.haystack.index(place) / max(1, num_tokens), 2) for place in positions]
        return self.task.encode_prompt(self.model, prompt), true_depths

    def _whole(self, num_tokens: int) -> int:
        """Tokens without those of a broken line at the end, where lines matter."""
        if self.task.cut_at != "line":
            return num_tokens
        return self.haystack.index(self.haystack.cut(num_tokens, "line"))
