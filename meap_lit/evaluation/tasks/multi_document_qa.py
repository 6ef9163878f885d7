"""Multi-document question answering: find an answer at any position of its passage among others.

This is the benchmark of "Lost in the Middle" (arXiv 2307.03172; nelson-liu/lost-in-the-middle, commit 29b8a6d), which
the MEAP paper reports. Questions are from Natural Questions. One of N passages of Wikipedia, the gold passage, contains
the answer. Two prompts give bounds: the gold passage alone (oracle), and the question alone (closed book).
"""

import random
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, NamedTuple

from meap_lit.errors import UserError, check_range
from meap_lit.evaluation.rows import DataRow, read_rows
from meap_lit.evaluation.task import Item, Plot, Prompt, PromptTask, Record, Result, check_distinct
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
        answers: Right answers; any of them counts.
        gold: The passage that contains an answer.
        distractors: Passages that contain none, the most similar to the question first.
    """

    where: str
    text: str
    answers: list[str]
    gold: Passage
    distractors: list[Passage]

    @classmethod
    def from_row(cls, row: DataRow) -> "Question":
        contexts = row.rows("ctxs")
        passages = [Passage(context.text("title"), context.text("text")) for context in contexts]
        is_gold = [context.flag("isgold") for context in contexts]
        if sum(is_gold) != 1:
            raise row.error(f"one passage in 'ctxs' must have 'isgold', got {sum(is_gold)}")
        gold = passages.pop(is_gold.index(True))
        return cls(row.where, row.text("question"), row.texts("answers"), gold, passages)

    def prompt(self, passages: Sequence[Passage]) -> str:
        """Return the benchmark's prompt, without passages the closed-book one (`qa.prompt`, `closedbook_qa.prompt`)."""
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

    An answer is stripped, cut at its first line break and compared. The benchmark's script for Llama 2
    (scripts/get_qa_responses_from_llama_2.py) strips before `evaluate_qa_responses.py` cuts. Its scripts for MPT and
    LongChat do not, so an answer that begins with a line break counts there as empty.

    Args:
        file: Data in the benchmark's format. `{gold}` in the name is replaced by the position of the gold passage. One
            file for all positions gives the same prompts, since the gold passage is moved to its position.
        num_documents: Number N of passages in a prompt, including the gold one.
        gold: Positions of the gold passage, from 0.
        distractors: `retrieved` takes the first N - 1 distractors of the file. `synthetic` takes gold passages of other
            questions that contain no answer. They are easier to tell from the gold passage, so these scores compare
            only with each other.
        bounds: Bounds to evaluate too.
        num_questions: Number of questions, from the start of the file; all by default.
        seed: Seed of synthetic distractors.
    """

    name = "multi_document_qa"
    title = "Multi-document QA"
    metrics = ("best_subspan_em", "oracle", "closed_book")
    """Each item has one of them: the last two are the same score for the prompts of the bounds."""
    plots = (
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
        check_range("num_documents", self.num_documents, "[2, inf)")
        check_distinct("gold", self.gold)
        for position in self.gold:
            check_range("gold", position, f"[0, {self.num_documents - 1}]", f" for num_documents {self.num_documents}")
        check_range("num_questions", self.num_questions, "[1, inf)")

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
        # as in the benchmark's script for Llama 2; its scorer cuts at the first line break without stripping before
        return [{"model_answer": record["model_answer"].strip()} for record in super().answer(model, items)]

    def is_complete(self, text: str) -> bool:
        return "\n" in text.lstrip()

    def score(self, record: Record) -> dict[str, float]:
        metric = {0: "closed_book", 1: "oracle"}.get(record["cell"]["documents"], "best_subspan_em")
        prediction = record["model_answer"].strip().split("\n")[0].strip()
        return {metric: 100.0 * best_subspan_em(prediction, record["answers"])}

    @classmethod
    def extra_of_pair(cls, first: Result, second: Result) -> dict[str, float]:
        """Return the relative gain of the second, which the paper reports for pretrained models.

        Only items that both answered count, as in `difference`: a shorter context skips others.
        """
        shared = {record["id"] for record in first.records} & {record["id"] for record in second.records}
        first, second = (
            replace(result, records=[record for record in result.records if record["id"] in shared])
            for result in (first, second)
        )
        later = second.along("gold")
        pairs = {
            f"relative gain at position {position + 1}, %": (mean.value, later[position].value)
            for position, mean in first.along("gold").items()
            if position in later
        }
        pairs["relative gain, %"] = (first.mean().value, second.mean().value)
        return {name: 100 * (after - before) / before for name, (before, after) in pairs.items() if before > 0}

    def _questions(self) -> dict[int, list[Question]]:
        """Return the questions for each position; they differ only in the order of passages in their file."""
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
                    f"{question.where}: 'ctxs' has {len(question.distractors)} distractors, num_documents "
                    f"{self.num_documents} needs {self.num_documents - 1}; lower it, or set distractors to synthetic"
                )
        return questions


def _prompt(id: str, cell: Mapping[str, Any], question: Question, passages: Sequence[Passage]) -> Prompt:
    fields = {"question": question.text, "answers": question.answers}
    return Prompt(id, cell, fields, question.prompt(passages), id.rpartition("/")[2])


def _check_same_questions(files: Sequence[Sequence[Question]]) -> None:
    """Raise `UserError` unless the files for all positions have the same questions, which are compared in pairs."""
    for questions in files[1:]:
        for question, expected in zip(questions, files[0]):
            if question.text != expected.text:
                raise UserError(f"{question.where}: the question differs from that in {expected.where}")
        if len(questions) != len(files[0]):
            last = min(questions, files[0], key=len)[-1]
            raise UserError(f"{last.where}: the last question, but the file for another position has more")


def _with_synthetic_distractors(
    questions: Sequence[Question], num_questions: int | None, num_distractors: int, seed: int
) -> list[Question]:
    """Return the first questions with passages of others, drawn by (seed, number).

    A larger number of distractors begins with the same ones.
    """
    pool = {question.gold: normalize_answer(" ".join(question.gold)) for question in questions}
    chosen = []
    for number, question in enumerate(questions[:num_questions]):
        answers = [
            answer
            for answer in map(normalize_answer, question.answers)
            # ignore what every passage contains: "*", which is normalized to nothing, or a single letter
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
                f"{question.where}: only {len(distractors)} passages of other questions contain none of its answers, "
                f"num_documents {num_distractors + 1} needs {num_distractors}; lower it"
            )
        chosen.append(replace(question, distractors=distractors))
    return chosen


def _in_random_order(passages: list[Passage], rng: random.Random) -> Iterator[Passage]:
    """Yield passages in random order, drawn one by one because only a few of thousands are needed."""
    while passages:
        index = rng.randrange(len(passages))
        passages[index], passages[-1] = passages[-1], passages[index]
        yield passages.pop()


def best_subspan_em(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the normalized prediction contains a normalized answer, else 0.

    Characters are compared, not words: "1950" contains "5". Every prediction contains an answer that is normalized to
    nothing. Source: `metrics.py` of the benchmark.
    """
    normalized = normalize_answer(prediction)
    return float(any(normalize_answer(answer) in normalized for answer in answers))


def normalize_answer(text: str) -> str:
    """Lower the case, remove ASCII punctuation and English articles, join by single spaces (SQuAD's script)."""
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", text).split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")
