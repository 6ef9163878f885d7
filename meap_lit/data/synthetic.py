"""A small English-like world of facts, to pretrain on without downloading anything.

A document is about a few people. Each has a favourite place, drawn anew for every document, so that only the
document itself can tell whose place is whose:

    This is what people say. Anna loves Oslo. Hugo loves Lima. The old river shone near the mill. Hugo loves Lima.
    Which place does Anna love? Anna loves Oslo. ...

What is stated once is restated and asked for again and again, between filler that tells nothing. Guessing among the
places of the document is learned early; naming the right one takes attention to what was said of the person. The
sentences are short and one word stands between person and place, because two layers of attention find such a link
within minutes on a CPU; with "Anna lives in Oslo" they did not.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from meap_lit.data.preparation import Preparation
from meap_lit.errors import UserError

NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Maria", "Peter")
PLACES = ("Athens", "Berlin", "Cairo", "Delhi", "Dublin", "Lima", "London", "Madrid", "Oslo", "Paris", "Rome", "Tokyo")

OPENING = "This is what people say."
"""First sentence of every document; it gives all that follow the space in front that makes a word one token."""

_ADJECTIVES = ("old", "small", "quiet", "green", "narrow", "cold")
_NOUNS = ("river", "garden", "market", "bridge", "tower", "mill", "train", "harbour")
_VERBS = ("stood", "waited", "slept", "shone")
_PREPOSITIONS = ("near", "behind", "beside", "above")


@dataclass(frozen=True)
class Fact:
    """A person and the place that the person loves."""

    name: str
    place: str

    @property
    def prompt(self) -> str:
        """The statement up to the place, which it lacks with the space before it."""
        return f"{self.name} loves"

    @property
    def statement(self) -> str:
        return f"{self.prompt} {self.place}."

    @property
    def question(self) -> str:
        return f"Which place does {self.name} love?"


def draw_facts(rng: random.Random, count: int) -> list[Fact]:
    """`count` facts, no person and no place twice."""
    return [Fact(*pair) for pair in zip(rng.sample(NAMES, count), rng.sample(PLACES, count), strict=True)]


def filler_sentence(rng: random.Random) -> str:
    """A sentence without person or place."""
    first, second = rng.sample(_NOUNS, 2)
    return f"The {rng.choice(_ADJECTIVES)} {first} {rng.choice(_VERBS)} {rng.choice(_PREPOSITIONS)} the {second}."


def document(
    rng: random.Random, *, num_facts: int, num_mentions: int, question_share: float, filler_share: float
) -> str:
    """Text of one document.

    Every fact is stated once, then all of them again in a new order, and so on: `num_mentions` rounds. From the
    second round on, a share of the statements answers a question.

    Args:
        rng: Source of all choices; advanced.
        num_facts: People that the document is about.
        num_mentions: Times that each fact is stated.
        question_share: Chance that a restatement follows a question.
        filler_share: Chance that a sentence of filler stands before a statement.
    """
    facts = draw_facts(rng, num_facts)
    sentences = [OPENING]
    for mention in range(num_mentions):
        rng.shuffle(facts)
        for fact in facts:
            if rng.random() < filler_share:
                sentences.append(filler_sentence(rng))
            if mention > 0 and rng.random() < question_share:
                sentences.append(fact.question)
            sentences.append(fact.statement)
    return " ".join(sentences)


@dataclass(kw_only=True)
class FactCorpus(Preparation):
    """Write documents of facts stated, restated and asked for, as .jsonl files with a `text` on each line.

    Args:
        output: Folder to make.
        num_documents: Number of documents.
        seed: The same seed and numbers give the same files, byte for byte.
        min_facts: Fewest people in a document.
        max_facts: Most people in a document.
        num_mentions: Times that each fact is stated in its document.
        question_share: Share of the restatements that follow a question.
        filler_share: Sentences of filler for each statement, in [0, 1].
        num_files: Files that the documents are spread over.
    """

    num_documents: int = 8000
    seed: int = 0
    min_facts: int = 2
    max_facts: int = 4
    num_mentions: int = 10
    question_share: float = 0.15
    filler_share: float = 0.1
    num_files: int = 4

    def make(self, folder: Path) -> str:
        self._check()
        num_characters = 0
        for index in range(self.num_files):
            with open(folder / f"facts-{index:03}.jsonl", "w", encoding="utf-8") as file:
                for number in range(index, self.num_documents, self.num_files):
                    text = self._document(number)
                    num_characters += len(text)
                    file.write(json.dumps({"text": text}) + "\n")
        return f"corpus {self.output}: {self.num_documents:,} documents, {num_characters / 1e6:.1f} MB"

    def _document(self, number: int) -> str:
        rng = random.Random(f"{self.seed}/{number}")  # seeding by text is the same in every process and version
        return document(
            rng,
            num_facts=rng.randint(self.min_facts, self.max_facts),
            num_mentions=self.num_mentions,
            question_share=self.question_share,
            filler_share=self.filler_share,
        )

    def _check(self) -> None:
        for name in ("num_documents", "num_mentions", "num_files"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("question_share", "filler_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be in [0, 1], got {getattr(self, name):g}")
        if not 1 <= self.min_facts <= self.max_facts <= len(NAMES):
            raise UserError(
                f"facts must satisfy 1 <= min_facts <= max_facts <= {len(NAMES)}, "
                f"got min_facts {self.min_facts} and max_facts {self.max_facts}"
            )
