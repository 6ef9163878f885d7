"""Multi-document question answering: is an answer found wherever its passage stands among others?

The benchmark of "Lost in the Middle" (arXiv 2307.03172; nelson-liu/lost-in-the-middle, commit 29b8a6d), which the MEAP
paper reports. Questions are from Natural Questions; of N passages of Wikipedia one, the gold passage, holds the answer.
Two bounds stand beside it: the gold passage alone (oracle), and the question alone (closed book).
"""

import random
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar, Literal, NamedTuple

from meap_lit.errors import UserError
from meap_lit.evaluation.rows import Row, read_rows
from meap_lit.evaluation.task import Item, Plot, Prompt, PromptTask, Record, Result
from meap_lit.inference.language_model import LanguageModel

Bound = Literal["oracle", "closed_book"]


class Passage(NamedTuple):
    """A piece of a Wikipedia article."""

    title: str
    text: str


@dataclass(frozen=True)
class Question:
    """A question of the benchmark.

    Args:
        where: File and line.
        text: The question.
        answers: Right answers; any of them will do.
        gold: The passage that holds one.
        distractors: Passages that hold none, the most similar to the question first.
    """

    where: str
    text: str
    answers: list[str]
    gold: Passage
    distractors: list[Passage]

    @classmethod
    def from_row(cls, row: Row) -> "Question":
        contexts = row.rows("ctxs")
        passages = [Passage(context.text("title"), context.text("text")) for context in contexts]
        is_gold = [context.flag("isgold") for context in contexts]
        if sum(is_gold) != 1:
            raise row.error(f"{sum(is_gold)} of the passages in 'ctxs' have 'isgold', it must be one")
        gold = passages.pop(is_gold.index(True))
        return cls(row.where, row.text("question"), row.texts("answers"), gold, passages)

    def prompt(self, passages: Sequence[Passage]) -> str:
        """The benchmark's prompt, for a closed book if there is no passage (`qa.prompt`, `closedbook_qa.prompt`)."""
        ending = f"Question: {self.text}\nAnswer:"
        if not passages:
            return ending
        documents = [
            f"Document [{number}](Title: {passage.title}) {passage.text}"
            for number, passage in enumerate(passages, start=1)
        ]
        return "\n".join([_INSTRUCTION, "", *documents, "", ending])


_INSTRUCTION = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant)."
)


@dataclass(kw_only=True)
class MultiDocumentQA(PromptTask):
    """Questions with the gold passage at several positions among distractors.

    An answer is stripped, cut at its first line break and compared. The benchmark strips in its script for Llama 2
    (scripts/get_qa_responses_from_llama_2.py) before `evaluate_qa_responses.py` cuts; its scripts for MPT and LongChat
    do not, so there an answer that begins with a line break counts as empty.

    Args:
        file: Data in the benchmark's format. A `{gold}` in it stands for the position of the gold passage, if there is
            a file for each; one file serves all positions as well, since the gold passage is put where it belongs.
        num_documents: Passages N in a prompt, the gold one included.
        gold: Positions of the gold passage, from 0.
        distractors: `retrieved`: those in the file, the first N - 1 of them. `synthetic`: gold passages of other
            questions of the file, none of which holds an answer; they are easier to tell from the gold passage, so
            the scores compare with each other only.
        bounds: Which bounds to ask for as well.
        num_questions: Only so many questions, the first of the file.
        seed: Of the draw of synthetic distractors.
    """

    name: ClassVar[str] = "multi_document_qa"
    metrics: ClassVar[tuple[str, ...]] = ("best_subspan_em", "oracle", "closed_book")
    """Each item has one of them: the last two are the same score of the prompts that make a bound."""
    plots: ClassVar[tuple[Plot, ...]] = (
        Plot(
            "multi_document_qa",
            "gold",
            x_label="position of the document with the answer, from 0",
            levels=("oracle", "closed_book"),
            options=("distractors",),
        ),
    )

    file: str
    num_documents: int
    gold: tuple[int, ...]
    distractors: Literal["retrieved", "synthetic"] = "retrieved"
    bounds: tuple[Bound, ...] = ("oracle", "closed_book")
    num_questions: int | None = None
    seed: int = 0
    max_new_tokens: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_documents < 2:
            raise UserError(f"num_documents must be at least 2, got {self.num_documents}")
        if not self.gold or len(set(self.gold)) < len(self.gold):
            raise UserError(f"gold must name at least one position and each once, got {list(self.gold)}")
        for position in self.gold:
            if not 0 <= position < self.num_documents:
                raise UserError(
                    f"gold positions must be in [0, {self.num_documents - 1}] for num_documents {self.num_documents}, "
                    f"got {position}"
                )
        if self.num_questions is not None and self.num_questions < 1:
            raise UserError(f"num_questions must be at least 1, got {self.num_questions}")

    def prompts(self) -> Iterator[Prompt]:
        questions = self._questions()
        for position in self.gold:
            cell: dict[str, Any] = {"documents": self.num_documents, "gold": position}
            for number, question in enumerate(questions[position]):
                passages = question.distractors[: self.num_documents - 1]
                passages.insert(position, question.gold)
                yield _prompt(f"gold_at_{position}/{number}", cell, question, passages)
        for number, question in enumerate(questions[self.gold[0]]):
            if "oracle" in self.bounds:
                cell = {"documents": 1, "gold": 0}
                yield _prompt(f"oracle/{number}", cell, question, [question.gold])
            if "closed_book" in self.bounds:
                cell = {"documents": 0, "gold": None}
                yield _prompt(f"closed_book/{number}", cell, question, [])

    def answer(self, model: LanguageModel, items: Sequence[Item]) -> list[Record]:
        # as the benchmark's script for Llama 2 does; its scorer does not strip before it cuts at the first line break
        return [{"model_answer": record["model_answer"].strip()} for record in super().answer(model, items)]

    def score(self, record: Record) -> dict[str, float]:
        metric = {0: "closed_book", 1: "oracle"}.get(record["cell"]["documents"], "best_subspan_em")
        prediction = record["model_answer"].strip().split("\n")[0].strip()
        return {metric: 100.0 * best_subspan_em(prediction, record["answers"])}

    @classmethod
    def extra_of_pair(cls, first: Result, second: Result) -> dict[str, float]:
        """Return the gain of the second relative to the first, as the paper gives it for pretrained models."""
        later = second.along("gold")
        pairs = {
            f"relative gain at position {position + 1}, %": (mean.value, later[position].value)
            for position, mean in first.along("gold").items()
            if position in later
        }
        pairs["relative gain, %"] = (first.mean().value, second.mean().value)
        return {name: 100 * (after - before) / before for name, (before, after) in pairs.items() if before > 0}

    def _questions(self) -> dict[int, list[Question]]:
        """The questions for each position; they differ in nothing but the order of passages that their file had."""
        paths = {position: self.file.replace("{gold}", str(position)) for position in self.gold}
        read = {path: self._read(path) for path in dict.fromkeys(paths.values())}
        _check_same_questions(list(read.values()))
        return {position: read[path] for position, path in paths.items()}

    def _read(self, path: str) -> list[Question]:
        rows = read_rows(path)
        if self.distractors == "synthetic":
            every = [Question.from_row(row) for row in rows]
            return _with_synthetic_distractors(every, self.num_questions, self.num_documents - 1, self.seed)
        questions = [Question.from_row(row) for row in islice(rows, self.num_questions)]
        for question in questions:
            if len(question.distractors) < self.num_documents - 1:
                raise UserError(
                    f"{question.where}: 'ctxs' holds {len(question.distractors)} distractors, num_documents "
                    f"{self.num_documents} needs {self.num_documents - 1}; lower it, or set distractors to synthetic"
                )
        return questions


def _prompt(id: str, cell: Mapping[str, Any], question: Question, passages: Sequence[Passage]) -> Prompt:
    fields = {"question": question.text, "answers": question.answers}
    return Prompt(id, cell, fields, question.prompt(passages), id.rpartition("/")[2])


def _check_same_questions(files: Sequence[Sequence[Question]]) -> None:
    """Positions are compared question by question, so the files for them must agree line by line."""
    for questions in files[1:]:
        for question, expected in zip(questions, files[0]):
            if question.text != expected.text:
                raise UserError(f"{question.where}: the question is another than in {expected.where}")
        if len(questions) != len(files[0]):
            last = min(questions, files[0], key=len)[-1]
            raise UserError(f"{last.where}: the last question, but the file for another position has more")


# ---------------------------------------------------------------------------------------------------- distractors


def _with_synthetic_distractors(
    questions: Sequence[Question], num_questions: int | None, num_distractors: int, seed: int
) -> list[Question]:
    """The first questions with passages of others, drawn by (seed, number): more of them begin with the same ones."""
    pool = {question.gold: normalize_answer(" ".join(question.gold)) for question in questions}
    chosen = []
    for number, question in enumerate(questions[:num_questions]):
        answers = [
            answer
            for answer in map(normalize_answer, question.answers)
            # "*" is normalised to nothing, and "S" is the only letter asked for: no passage is without them
            if len(answer) > 1 or not all(answer in text for text in pool.values())
        ]
        suitable = (
            passage
            for passage in _in_random_order(list(pool), random.Random(f"{seed}/{number}"))
            if passage != question.gold and not any(answer in pool[passage] for answer in answers)
        )
        distractors = list(islice(suitable, num_distractors))
        if len(distractors) < num_distractors:
            raise UserError(
                f"{question.where}: only {len(distractors)} passages of other questions hold none of its answers, "
                f"num_documents {num_distractors + 1} needs {num_distractors}; lower it"
            )
        chosen.append(replace(question, distractors=distractors))
    return chosen


def _in_random_order(passages: list[Passage], rng: random.Random) -> Iterator[Passage]:
    """Drawn one by one: of thousands a few are needed."""
    while passages:
        index = rng.randrange(len(passages))
        passages[index], passages[-1] = passages[-1], passages[index]
        yield passages.pop()


# ---------------------------------------------------------------------------------------------------- scoring


def best_subspan_em(prediction: str, answers: Sequence[str]) -> float:
    """1 if one of the answers is part of the prediction, both normalised, else 0.

    Characters are compared, not words: "5" is part of "1950". An answer of which nothing is left when it is normalised
    is part of everything. Source: `metrics.py` of the benchmark.
    """
    normalized = normalize_answer(prediction)
    return float(any(normalize_answer(answer) in normalized for answer in answers))


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, single spaces (SQuAD's evaluation script)."""
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", text).split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")
