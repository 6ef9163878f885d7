"""Reasoning over a long context: the answer follows from several distant sentences (M-RS).

Multi-needle reasoning of NeedleBench 2024 (open-compass/opencompass, opencompass/datasets/needlebench/multi.py). The
dataset opencompass/NeedleBench has the public questions, `multi_needle_reasoning_en.json`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from meap_lit.errors import UserError
from meap_lit.evaluation.rows import read_rows
from meap_lit.evaluation.task import Plot, Record, check_distinct
from meap_lit.evaluation.tasks.haystack_task import INTRODUCTION, HaystackPrompt, HaystackTask

# no space before it, as in the reference
_CONSIDER = "Before answering, please consider what in the document is most relevant to this question."

_SPACING = 10
"""Distance of one needle from the next, in percent of the haystack."""


@dataclass(kw_only=True)
class Reasoning(HaystackTask):
    """Questions that need several needles: the first at the depth, each other one a tenth of the haystack later.

    Args:
        file: Records with `derivation_count`, `derivations`, `question` and `answer`: a JSON array, or one a line.
        num_needles: Numbers of sentences from which an answer follows; each is asked at each length and depth.
    """

    name = "reasoning"
    metrics = ("word_recall",)
    plots = (
        Plot("reasoning_by_length", "length", x_label="length (tokens)"),
        Plot("reasoning_by_num_needles", "num_needles", x_label="sentences from which an answer follows"),
    )

    file: str
    num_needles: tuple[int, ...] = (2, 3, 4, 5)
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_distinct("num_needles", self.num_needles)

    def prompts(self) -> list[HaystackPrompt]:
        by_count: dict[int, list[Record]] = {}
        for row in read_rows(self.file):
            count = row.value("derivation_count")
            if not isinstance(count, int):
                raise row.error(f"field 'derivation_count' must be an integer, got {type(count).__name__}")
            sentences = row.texts("derivations")
            if not sentences:
                raise row.error("field 'derivations' is empty")
            for number, sentence in enumerate(sentences):
                if not sentence.strip():
                    raise row.error(f"field 'derivations[{number}]' is empty")
            fields = {"derivations": sentences, "question": row.text("question"), "answer": row.text("answer")}
            by_count.setdefault(count, []).append(fields)
        missing = [count for count in self.num_needles if count not in by_count]
        if missing:
            raise UserError(
                f"num_needles {missing[0]}: {self.file} has no question with that derivation_count, only "
                f"{', '.join(map(str, sorted(by_count)))}"
            )
        return [
            self._question(repeat, random.Random(f"{self.seed}/{count}/{repeat}").choice(by_count[count]), count)
            for count in self.num_needles
            for repeat in range(self.num_repeats)
        ]

    def indices(self, num_tokens: int, depth: float, needle_lengths: Sequence[int]) -> list[int]:
        """Return positions as the reference places them.

        The reference counts the length of the previous needle twice, in tokens of haystack and needles together. These
        are positions in the haystack alone, where that length counts once.
        """
        indices = [int(num_tokens * depth / 100)]
        for needle_length in needle_lengths[:-1]:
            indices.append(int(indices[-1] + needle_length + num_tokens * _SPACING / 100))
        return [min(index, num_tokens) for index in indices]

    def score(self, record: Record) -> dict[str, float]:
        return {"word_recall": word_recall(record["model_answer"], record["answer"])}

    def _question(self, repeat: int, fields: Record, count: int) -> HaystackPrompt:
        needles = tuple(f"\n{sentence}\n" for sentence in fields["derivations"])
        after = f"\n\nNow, the question is: {fields['question']}{_CONSIDER}"
        return HaystackPrompt(repeat, needles, INTRODUCTION, after, fields, {"num_needles": count})


def word_recall(prediction: str, answer: str) -> float:
    """Return the percentage of the answer's words in the prediction, ignoring case, also as parts of other words.

    Source: `NeedleBenchMultiEvaluator.score` in opencompass/datasets/needlebench/multi.py.
    """
    words = answer.lower().split()
    return 100 * sum(word in prediction.lower() for word in words) / max(1, len(words))
