"""Needle in a haystack: find a sentence again at any depth of a long context.

- `Needle`: one sentence among essays. Prompt, needles and scores are those of NeedleBench 2024
  (open-compass/opencompass, opencompass/datasets/needlebench/origin.py); the built-in needle is that of
  gkamradt/LLMTest_NeedleInAHaystack.
- `MultiNeedle`: several at once, spread as LLMTest_NeedleInAHaystack spreads them; the prompt is ours.
- `MagicNumber`: a number among lines of noise, all of it made up (NVIDIA/RULER, niah.py).
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from meap_lit.errors import UserError, check_range
from meap_lit.evaluation.rows import DataRow, read_rows
from meap_lit.evaluation.task import Record
from meap_lit.evaluation.tasks.haystack import Boundary
from meap_lit.evaluation.tasks.haystack_task import INTRODUCTION, HaystackPrompt, HaystackTask, grid_plot


@dataclass(frozen=True)
class NeedleEntry:
    """A needle and the question about it, as in NeedleBench's needles.jsonl.

    Args:
        needle: The sentence, without the line breaks around it.
        keyword: Text that the answer must contain.
        question: The question.
        blank: Form of the answer: the sentence with a blank at its end, such as "The best thing is ________."
    """

    needle: str
    keyword: str
    question: str
    blank: str

    @classmethod
    def from_row(cls, row: DataRow) -> "NeedleEntry":
        """Parse a line of needles.jsonl."""
        match = _RETRIEVAL_QUESTION.fullmatch(row.text("retrieval_question"))
        if match is None:
            raise row.error("field 'retrieval_question' must end in \"Please answer in the format '... ________.'\"")
        entry = cls(row.text("needle").strip(), row.text("arg2"), match["question"], match["blank"])
        for name, text in (("needle", entry.needle), ("arg2", entry.keyword)):
            if not text:
                raise row.error(f"field {name!r} is empty")
        return entry

    @property
    def stem(self) -> str:
        """Sentence up to the blank, for a model to continue."""
        return self.blank.split("__")[0].rstrip()

    @property
    def retrieval_question(self) -> str:
        return f"{self.question} Please answer in the format '{self.blank}'"


_RETRIEVAL_QUESTION = re.compile(
    r"(?P<question>.+?)\s*Please answer in the format '(?P<blank>.+?__.*)'\.?\s*", re.DOTALL
)

BUILT_IN = NeedleEntry(
    needle="The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.",
    keyword="eat a sandwich and sit in Dolores Park on a sunny day",
    question="What is the best thing to do in San Francisco?",
    blank="The best thing to do in San Francisco is________.",
)


@dataclass(kw_only=True)
class Needle(HaystackTask):
    """One needle at each length and depth.

    Since the grid is full, the score over all items is the mean over lengths of the mean over depths.

    Args:
        needles: File in the format of NeedleBench's needles.jsonl; each repeat takes another line. The built-in needle
            by default.
        boundary: Insert the needle after the last sentence that ends before the depth (`sentence`), or at the depth
            itself, even within a word, as NeedleBench does (`token`).
    """

    name = "needle"
    metrics = ("keyword", "needlebench")
    plots = (
        grid_plot("needle_keyword", "keyword"),
        grid_plot("needle_needlebench", "needlebench"),
    )

    needles: str | None = None
    boundary: Literal["sentence", "token"] = "sentence"

    @property
    def cut_at(self) -> Boundary:
        return self.boundary

    def prompts(self) -> list[HaystackPrompt]:
        entries = self._entries()
        return [self._question(repeat, entries[repeat % len(entries)]) for repeat in range(self.num_repeats)]

    def score(self, record: Record) -> dict[str, float]:
        answer, needle, keyword = (record[name] for name in ("model_answer", "needle", "arg2"))
        return {
            "keyword": 100.0 if keyword in answer else 0.0,
            "needlebench": needlebench_score(answer, needle, keyword),
        }

    def _question(self, repeat: int, entry: NeedleEntry) -> HaystackPrompt:
        ending = entry.stem if self.prompt_style == "raw" else f"Please answer in the format '{entry.blank}'"
        after = f"\n\nNow, the question is: {entry.question} {_consider('this question')} {ending}"
        fields = {"needle": entry.needle, "arg2": entry.keyword, "retrieval_question": entry.retrieval_question}
        return HaystackPrompt(repeat, (f"\n{entry.needle}\n",), INTRODUCTION, after, fields)

    def _entries(self) -> list[NeedleEntry]:
        """Return all needles, in the order in which the repeats take them."""
        if self.needles is None:
            return [BUILT_IN]
        entries = [
            NeedleEntry.from_row(row)
            for row in read_rows(self.needles)
            if row.fields.get("language", "English") == "English"
        ]
        if not entries:
            raise UserError(f"needles {self.needles} has no line whose language is English")
        random.Random(self.seed).shuffle(entries)
        return entries


@dataclass(kw_only=True)
class MultiNeedle(Needle):
    """Several needles at once, the first at the depth and the others spread evenly from there to the end.

    The prompt is that of `Needle` with all questions and all forms of the answer in a row. It is our own, so its scores
    compare only with each other. `keyword` is the share of keywords found; `all_found` is 100 if all are.

    Args:
        num_needles: Needles in each context; more than one needs a file of `needles`.
    """

    name = "multi_needle"
    metrics = ("keyword", "all_found")
    plots = (
        grid_plot("multi_needle_keyword", "keyword"),
        grid_plot("multi_needle_all_found", "all_found"),
    )

    num_needles: int = 3
    max_new_tokens: int = 192

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("num_needles", self.num_needles, "[1, inf)")

    def prompts(self) -> list[HaystackPrompt]:
        entries = self._entries()
        return [self._joint_question(repeat, self._draw(entries, repeat)) for repeat in range(self.num_repeats)]

    def score(self, record: Record) -> dict[str, float]:
        found = [keyword in record["model_answer"] for keyword in record["arg2"]]
        return {"keyword": 100 * sum(found) / len(found), "all_found": 100.0 * all(found)}

    def _draw(self, entries: Sequence[NeedleEntry], repeat: int) -> list[NeedleEntry]:
        """Draw needles with distinct questions and keywords."""
        drawn: list[NeedleEntry] = []
        for entry in random.Random(f"{self.seed}/{repeat}").sample(entries, len(entries)):
            if all(entry.question != other.question and entry.keyword != other.keyword for other in drawn):
                drawn.append(entry)
            if len(drawn) == self.num_needles:
                return drawn
        raise UserError(
            f"needles {self.needles or '(built in)'} has {len(drawn)} that differ in question and keyword, but "
            f"num_needles is {self.num_needles}; name a file with more, or lower num_needles"
        )

    def _joint_question(self, repeat: int, entries: Sequence[NeedleEntry]) -> HaystackPrompt:
        questions = " ".join(entry.question for entry in entries)
        blanks = " ".join(entry.blank for entry in entries)
        after = (
            f"\n\nNow, the questions are: {questions} {_consider('these questions')} "
            f"Please answer in the format '{blanks}'"
        )
        if self.prompt_style == "raw":
            after += f" {entries[0].stem}"  # a base model gets the form and its beginning
        fields = {
            "needle": [entry.needle for entry in entries],
            "arg2": [entry.keyword for entry in entries],
            "retrieval_question": [entry.retrieval_question for entry in entries],
        }
        return HaystackPrompt(repeat, tuple(f"\n{entry.needle}\n" for entry in entries), INTRODUCTION, after, fields)


def _consider(what: str) -> str:
    return f"Before answering, please consider what in the document is most relevant to {what}."


@dataclass(kw_only=True)
class MagicNumber(HaystackTask):
    """A number of seven digits under a made-up key; each repeat draws another.

    Without a `haystack` the context is lines of noise and the needle is one more line. In a text it follows the last
    sentence that ends before the depth.
    """

    name = "magic_number"
    metrics = ("string_match_all",)
    plots = (grid_plot("magic_number", "string_match_all"),)

    max_new_tokens: int = 128

    @property
    def cut_at(self) -> Boundary:
        return "line" if self.haystack is None else "sentence"

    def prompts(self) -> list[HaystackPrompt]:
        return [self._question(repeat) for repeat in range(self.num_repeats)]

    def score(self, record: Record) -> dict[str, float]:
        return {"string_match_all": string_match_all(record["model_answer"], record["outputs"])}

    def _question(self, repeat: int) -> HaystackPrompt:
        rng = random.Random(f"{self.seed}/{repeat}")
        key, value = f"{rng.choice(_ADJECTIVES)}-{rng.choice(_NOUNS)}", str(rng.randint(1_000_000, 9_999_999))
        needle = f"One of the special magic numbers for {key} is: {value}."
        before = (
            "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you "
            "about the number afterwards.\n"
        )
        after = (
            f"What is the special magic number for {key} mentioned in the provided text? The special magic number for "
            f"{key} mentioned in the provided text is"
        )
        fields = {"needle": needle, "query": key, "outputs": [value]}
        if self.haystack is None:  # lines of noise end in a line break
            return HaystackPrompt(repeat, (f"{needle}\n",), before, after, fields)
        return HaystackPrompt(repeat, (f" {needle}",), before, f"\n{after}", fields)


_ADJECTIVES = (
    "amber", "brisk", "copper", "dusty", "eager", "foggy", "gentle", "hollow", "ivory", "jolly", "keen", "lively",
    "mellow", "narrow", "olive", "patient", "quiet", "rapid", "silver", "tidy", "upright", "velvet", "woolen", "young",
)  # fmt: skip
_NOUNS = (
    "anchor", "basket", "candle", "drum", "engine", "feather", "goblet", "hammer", "island", "jacket", "kettle",
    "ladder", "mirror", "needle", "orchard", "pebble", "quilt", "ribbon", "saddle", "teapot", "umbrella", "violin",
    "wagon", "yarn",
)  # fmt: skip


def needlebench_score(prediction: str, needle: str, keyword: str) -> float:
    """Return 100 if the prediction contains the keyword, else up to 20 for its similarity to the needle.

    Source: `NeedleBenchOriginEvaluator.score` in opencompass/datasets/needlebench/origin.py.
    """
    if keyword in prediction:
        return 100.0
    predicted, wanted = ("".join(text.split()) for text in (prediction, needle))
    return 0.2 * 100 * (1 - levenshtein(predicted, wanted) / max(len(predicted), len(wanted)))


def levenshtein(first: str, second: str) -> int:
    """Return the minimum number of characters to insert, delete or replace to turn one text into the other."""
    letters = np.array([ord(letter) for letter in second])
    steps = np.arange(len(second) + 1)
    row = steps  # distances of the characters read so far to each prefix of `second`
    for number, letter in enumerate(first, start=1):
        # deletions and replacements; the running minimum adds insertions, each of which costs a step to the right
        others = np.minimum(row[1:] + 1, row[:-1] + (letters != ord(letter)))
        row = np.minimum.accumulate(np.concatenate([[number], others]) - steps) + steps
    return int(row[-1])


def string_match_all(prediction: str, outputs: Iterable[str]) -> float:
    """Return the percentage of `outputs` in the prediction, ignoring case (NVIDIA/RULER, scripts/eval/synthetic)."""
    found = [output.lower() in prediction.lower() for output in outputs]
    return 100 * sum(found) / len(found)
