"""Long texts made of documents, which can be cut after any token, sentence or line."""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from meap_lit.data.read.find import find_files
from meap_lit.data.read.formats import InputFile
from meap_lit.data.read.readers import read_texts
from meap_lit.errors import UserError
from meap_lit.tokenizer.tokenizer import Tokenizer

Boundary = Literal["sentence", "line", "token"]
"""Places to cut a text: after a period that white space follows, after a line break, or after any token."""

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
"""Line without meaning (NVIDIA/RULER, scripts/data/synthetic/niah.py)."""

_ENDS = {"sentence": re.compile(r"\.(?=\s|\Z)"), "line": re.compile(r"\n")}


@dataclass(frozen=True)
class Haystack:
    """A text that can be cut after any of its N tokens.

    Args:
        text: The text.
        ends: Number of characters in the first i tokens, [N + 1], int64.
    """

    text: str
    ends: np.ndarray

    def __len__(self) -> int:
        """Return the number of tokens N."""
        return len(self.ends) - 1

    def cut(self, index: int, boundary: Boundary) -> int:
        """Return the position of token `index` in characters, or the last end of a sentence or line before it, or 0.

        Ends of sentences are searched in the text, not in the tokens: Llama 2 encodes a lone "." in another way than
        the period of a sentence.
        """
        position = int(self.ends[index])
        if boundary == "token":
            return position
        stops = self._stops[boundary]
        return int(stops[np.searchsorted(stops, position, side="right") - 1])

    def sentence_length(self, index: int) -> float:
        """Return the characters of the sentence that holds the place before token `index`; infinite without any end."""
        stops = self._stops["sentence"]
        if len(stops) == 1:
            return math.inf
        following = np.searchsorted(stops, self.ends[index], side="right")
        end = stops[following] if following < len(stops) else len(self.text)
        return float(end - stops[following - 1])

    def index(self, position: int) -> int:
        """Return the number of whole tokens in the first `position` characters."""
        return int(np.searchsorted(self.ends, position, side="right")) - 1

    @cached_property
    def _stops(self) -> dict[str, np.ndarray]:
        """Positions in characters at which the text may be cut, ascending from 0, for each kind of boundary."""
        return {kind: np.array([0, *(match.end() for match in end.finditer(self.text))]) for kind, end in _ENDS.items()}


class Documents:
    """Texts to make haystacks of; each is tokenized once, when it is first needed.

    Args:
        texts: The texts.
        tokenizer: Tokenizer that counts tokens.
        name: Name of the source, for messages.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, name: str) -> None:
        self.name = name
        self._texts = texts
        self._backend = tokenizer.copy_backend()
        self._backend.encode_special_tokens = True
        self._backend.post_processor = None  # it may remove white space from the offsets
        self._ends: dict[int, np.ndarray] = {}

    @staticmethod
    def find(path: str) -> list[InputFile]:
        """Return the files that `read` reads.

        Raises:
            UserError: If there is none.
        """
        try:
            return find_files([path])
        except UserError as error:
            raise UserError(f"task.haystack: {error}; name a folder or file of text") from error

    @classmethod
    def read(cls, path: str, tokenizer: Tokenizer) -> "Documents":
        """Read the documents of a file, or of all files in a folder: texts, and field `text` of records.

        Raises:
            UserError: If there is no file, or a document cannot be read.
        """
        return cls(list(read_texts(cls.find(path))), tokenizer, path)

    @classmethod
    def noise(cls, tokenizer: Tokenizer) -> "Documents":
        """Return one text of many lines `NOISE`."""
        return cls([NOISE * 200], tokenizer, "of noise")

    def haystack(self, num_tokens: int, order: random.Random | None = None, repeat: bool = True) -> Haystack:
        """Join documents until there are about `num_tokens` tokens.

        Args:
            num_tokens: Tokens wanted; there are fewer if the documents have fewer and are not repeated.
            order: Random state that shuffles the documents; by default they keep their order.
            repeat: Start again at the first document after the last.

        Raises:
            UserError: If all documents are empty.
        """
        numbers = [number for number, text in enumerate(self._texts) if text.strip()]
        if not numbers:
            raise UserError(f"haystack {self.name} has no text")
        if order is not None:
            order.shuffle(numbers)
        texts: list[str] = []
        ends = [np.zeros(1, dtype=np.int64)]
        found = num_characters = 0
        while found < num_tokens and (repeat or len(texts) < len(numbers)):
            number = numbers[len(texts) % len(numbers)]
            ends.append(self._token_ends(number) + num_characters)
            texts.append(self._texts[number])
            num_characters += len(texts[-1])
            found += len(ends[-1])
        return Haystack("".join(texts), np.concatenate(ends))

    def _token_ends(self, number: int) -> np.ndarray:
        """Return the end of each token of a document in characters, [N], int64."""
        if number not in self._ends:
            offsets = self._backend.encode(self._texts[number], add_special_tokens=False).offsets
            self._ends[number] = np.array([end for _, end in offsets], dtype=np.int64)
        return self._ends[number]
