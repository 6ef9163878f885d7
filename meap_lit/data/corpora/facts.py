"""A small English-like world of facts, to pretrain on without downloading anything.

A document is about a few places. In each a person sings who is drawn for every document, so that only the document
itself can tell who sings where:

    This is what people say. In Oslo Anna sings. In Lima Hugo sings. The old river shone near the mill. In Lima Hugo
    sings. Who sings in Oslo? In Oslo Anna sings. ...

Each fact is stated once, then restated and asked for many times, between filler without facts. A model learns early to
guess among the people of the document; to name the right one it must attend to the fact of that place. The
world is small in words and in sentences, and the answer follows its place at once, so that two layers of attention
learn this within minutes on a CPU. (With words between, "Anna lives in Oslo", they had not after as many steps.)
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count as count_up
from itertools import product
from pathlib import Path
from textwrap import shorten

from meap_lit.data.prepare.step import Preparation
from meap_lit.data.read.find import find_files
from meap_lit.data.read.formats import InputFile
from meap_lit.data.read.readers import read_texts
from meap_lit.errors import UserError, check_range

NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Hugo", "Maria", "Peter")
PLACES = ("Athens", "Berlin", "Cairo", "Lima", "London", "Oslo", "Paris", "Tokyo")

_FAMILY_NAMES = ("Berg", "Costa", "Duval", "Evans", "Haas", "Kovac", "Moreau", "Silva")
_QUARTERS = ("Old", "New", "East", "West", "North", "South", "Upper", "Lower")
_NEAR_NAMES = tuple(map(" ".join, product(NAMES, _FAMILY_NAMES)))
_NEAR_PLACES = tuple(map(" ".join, product(_QUARTERS, PLACES)))

OPENING = "This is what people say."
"""First sentence of every document; what follows has a space in front, so each word is always the same token."""

_ADJECTIVES = ("old", "small", "quiet", "green", "heavy", "bright", "narrow", "cold")
_NOUNS = ("river", "garden", "market", "bridge", "tower", "bakery", "train", "harbour", "library", "meadow")
_VERBS = ("stood", "waited", "opened", "closed", "slept", "shone")
_PREPOSITIONS = ("near", "behind", "beside", "above")


@dataclass(frozen=True)
class Fact:
    """Who sings where."""

    place: str
    name: str

    @property
    def prompt(self) -> str:
        """The statement up to the name, which it lacks with the space before it."""
        return f"In {self.place}"

    @property
    def statement(self) -> str:
        return f"{self.prompt} {self.name} sings."

    @property
    def question(self) -> str:
        return f"Who sings in {self.place}?"


def most_facts(near_duplicates: bool) -> int:
    """Return the largest number of facts in a text."""
    return len(_NEAR_NAMES if near_duplicates else NAMES)


def draw_facts(rng: random.Random, count: int, near_duplicates: bool = False) -> list[Fact]:
    """Draw `count` facts, without a place or a person twice.

    With `near_duplicates`, names have two words, and other names have one of them too: "In Old Oslo Anna Berg sings".
    """
    places, names = (_NEAR_PLACES, _NEAR_NAMES) if near_duplicates else (PLACES, NAMES)
    return [Fact(*pair) for pair in zip(rng.sample(places, count), rng.sample(names, count), strict=True)]


def filler_sentence(rng: random.Random) -> str:
    """Draw a sentence without person or place."""
    first, second = rng.sample(_NOUNS, 2)
    return f"The {rng.choice(_ADJECTIVES)} {first} {rng.choice(_VERBS)} {rng.choice(_PREPOSITIONS)} the {second}."


class Filler:
    """Sentences that tell nothing of the facts: made up, or those of texts, in their order from a random place on."""

    def __init__(self, sentences: Sequence[str] = ()) -> None:
        self.sentences = sentences

    @classmethod
    def read(cls, path: str) -> "Filler":
        """Read the sentences of a file, or of all files in a folder, of 20 to 100 characters; longer ones are cut."""
        pieces = (piece for text in read_texts(find_files([path])) for piece in _SENTENCE_END.split(text))
        sentences = [shorten(piece, 100, placeholder="") for piece in pieces]
        sentences = [sentence for sentence in sentences if len(sentence) >= 20]
        if not sentences:
            raise UserError(f"filler {path} holds no sentence")
        return cls(sentences)

    def draw(self, rng: random.Random) -> Iterator[str]:
        """Yield sentences without end; `rng` is advanced."""
        if not self.sentences:
            while True:
                yield filler_sentence(rng)
        for number in count_up(rng.randrange(len(self.sentences))):
            yield self.sentences[number % len(self.sentences)]


_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")


def instructions(count: int, seed: int = 0, filler: Filler | None = None) -> list[dict[str, str]]:
    """Return records of an instruction set in the same world, in Alpaca's fields; `data/instructions.jsonl` holds 400.

    Half ask for one fact of the input, half for all of them in turn, which makes the longer answers. The inputs
    of the former have one sentence of filler; with `filler`, all inputs do.
    """
    records = []
    for number in range(count):
        rng = random.Random(f"instructions/{seed}/{number}")
        facts = draw_facts(rng, rng.randint(3, 4))
        asked = facts if number % 2 else [rng.choice(facts)]
        sentences = [fact.statement for fact in facts]
        if len(asked) == 1 or filler is not None:
            sentences.insert(rng.randint(0, len(sentences)), next((filler or Filler()).draw(rng)))
        records.append(
            {
                "instruction": "Who sings where?" if number % 2 else asked[0].question,
                "input": " ".join([OPENING, *sentences]),
                "output": " ".join(fact.statement for fact in asked),
            }
        )
    return records


@dataclass(kw_only=True)
class FactCorpus(Preparation):
    """Write documents of facts stated, restated and asked for, as .jsonl files with a `text` on each line.

    Args:
        output: Folder to make.
        num_documents: Number of documents.
        seed: The same seed and numbers give the same files, byte for byte.
        min_facts: Fewest facts in a document.
        max_facts: Most facts in a document.
        near_duplicates: Use names of two words, where other names have one of the words too: up to 64 facts instead of
            8, and the right one is harder to tell from the others.
        num_mentions: Statements for each fact of a document, on average.
        question_share: Share of the restatements that follow a question.
        filler_share: Sentences of filler for each statement, in [0, 1].
        filler: File or folder of text whose sentences are the filler, as they follow each other; made up if not given.
        num_files: Files that the documents are spread over.
    """

    num_documents: int = 8000
    seed: int = 0
    min_facts: int = 2
    max_facts: int = 6
    near_duplicates: bool = False
    num_mentions: int = 5
    question_share: float = 0.15
    filler_share: float = 0.1
    filler: str | None = None
    num_files: int = 4

    def source_files(self) -> Sequence[InputFile]:
        return [] if self.filler is None else find_files([self.filler])

    def make(self, folder: Path) -> str:
        for name in ("num_documents", "num_mentions", "num_files"):
            check_range(name, getattr(self, name), "[1, inf)")
        for name in ("question_share", "filler_share"):
            check_range(name, getattr(self, name), "[0, 1]")
        most = most_facts(self.near_duplicates)
        if not 1 <= self.min_facts <= self.max_facts <= most:
            raise UserError(
                f"facts must satisfy 1 <= min_facts <= max_facts <= {most}, "
                f"got min_facts {self.min_facts} and max_facts {self.max_facts}"
            )
        filler = Filler() if self.filler is None else Filler.read(self.filler)
        num_characters = 0
        for index in range(self.num_files):
            with open(folder / f"facts-{index:03}.jsonl", "w", encoding="utf-8") as file:
                for number in range(index, self.num_documents, self.num_files):
                    text = self._document(number, filler)
                    num_characters += len(text)
                    file.write(json.dumps({"text": text}) + "\n")
        return f"corpus {self.output}: {self.num_documents:,} documents, {num_characters / 1e6:.1f} MB"

    def _document(self, number: int, filler: Filler | None = None) -> str:
        """Return the text of one document.

        Every fact is stated once. Then come restatements, some of them after a question, each of a fact drawn at random
        from all. (Were they taken in turn, the place not heard of for longest would be the likely answer: a shortcut
        that a decoder finds before it looks at the name.)
        """
        rng = random.Random(f"{self.seed}/{number}")  # seeding by text is the same in every process and version
        facts = draw_facts(rng, rng.randint(self.min_facts, self.max_facts), self.near_duplicates)
        filler_sentences = (filler or Filler()).draw(rng)
        restated = rng.choices(facts, k=len(facts) * (self.num_mentions - 1))
        sentences = [OPENING]
        for place, fact in enumerate([*facts, *restated]):
            if rng.random() < self.filler_share:
                sentences.append(next(filler_sentences))
            if place >= len(facts) and rng.random() < self.question_share:
                sentences.append(fact.question)
            sentences.append(fact.statement)
        return " ".join(sentences)


@dataclass(kw_only=True)
class FactInstructions(Preparation):
    """Write questions on facts of a text, and their answers, in Alpaca's fields, as a .jsonl file.

    Args:
        output: Folder to make.
        num_records: Number of questions.
        seed: The same seed and numbers give the same file, byte for byte.
        filler: File or folder of text; each question has a sentence of it among its facts; made up if not given.
    """

    num_records: int = 400
    seed: int = 0
    filler: str | None = None

    def source_files(self) -> Sequence[InputFile]:
        return [] if self.filler is None else find_files([self.filler])

    def make(self, folder: Path) -> str:
        check_range("num_records", self.num_records, "[1, inf)")
        records = instructions(self.num_records, self.seed, None if self.filler is None else Filler.read(self.filler))
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / "instructions.jsonl").write_text("".join(lines), encoding="utf-8")
        return f"instructions {self.output}: {len(lines):,} questions"
