"""Key-value retrieval: find the value of a key at any position in a JSON object of random pairs.

This is the synthetic task of "Lost in the Middle" (arXiv 2307.03172; nelson-liu/lost-in-the-middle, commit 29b8a6d).
Knowledge and language do not help; the model must look the value up.
"""

import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from meap_lit.errors import UserError, check_range
from meap_lit.evaluation.rows import DataRow, read_rows
from meap_lit.evaluation.task import Plot, Prompt, PromptTask, Record, check_distinct

Pair = tuple[str, str]


@dataclass(frozen=True)
class KeyValueSet:
    """A JSON object and the requested key.

    Args:
        where: File and line, or another name, for messages.
        pairs: Distinct keys and their values.
        key: The requested key.
        value: Its value.
    """

    where: str
    pairs: list[Pair]
    key: str
    value: str

    @classmethod
    def from_row(cls, row: DataRow) -> "KeyValueSet":
        pairs = []
        for number, pair in enumerate(row.elements("ordered_kv_records")):
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
                raise row.error(f"'ordered_kv_records[{number}]' must be a pair of strings")
            pairs.append((pair[0], pair[1]))
        key, value = row.text("key"), row.text("value")
        if len(dict(pairs)) < len(pairs):
            raise row.error("a key appears twice in 'ordered_kv_records'")
        if (key, value) not in pairs:
            raise row.error("'key' and 'value' must be a pair of 'ordered_kv_records'")
        return cls(row.where, pairs, key, value)

    @classmethod
    def draw(cls, num_pairs: int, rng: random.Random) -> "KeyValueSet":
        """Draw pairs of UUIDs of version 4, as in the benchmark."""
        pairs = [(_random_uuid(rng), _random_uuid(rng)) for _ in range(num_pairs)]
        return cls(f"a set of {num_pairs} pairs", pairs, *rng.choice(pairs))

    def prompt(self, gold: int) -> str:
        """Return the benchmark's prompt (`kv_retrieval.prompt`) with the requested pair at index `gold`."""
        pairs = [pair for pair in self.pairs if pair[0] != self.key]
        pairs.insert(gold, (self.key, self.value))
        data = ",\n ".join(f'"{key}": "{value}"' for key, value in pairs)
        return (
            "Extract the value corresponding to the specified key in the JSON object below.\n\n"
            f'JSON data:\n{{{data}}}\n\nKey: "{self.key}"\nCorresponding value:'
        )


@dataclass(kw_only=True)
class KeyValueRetrieval(PromptTask):
    """Sets of pairs, each with the requested pair at several positions.

    Args:
        file: Data in the benchmark's format; by default sets are made up.
        num_pairs: Pairs in a made-up set.
        gold: Positions of the requested pair, from 0; by default the first and the end of each quarter of the set.
        num_sets: Number of sets to make up, or to read from the start of the file.
        seed: Seed of made-up sets.
    """

    name = "key_value"
    title = "Key-value retrieval"
    metrics = ("accuracy",)
    plots = (Plot("key_value", "gold", x_label="position of the pair, from 0"),)

    file: str | None = None
    num_pairs: int | None = None
    gold: tuple[int, ...] | None = None
    num_sets: int = 500
    seed: int = 0
    max_new_tokens: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.file is None) == (self.num_pairs is None):
            got = "neither" if self.file is None else f"{self.file} and {self.num_pairs}"
            raise UserError(f"either file or num_pairs must be given, got {got}")
        check_range("num_pairs", self.num_pairs, "[2, inf)")
        check_range("num_sets", self.num_sets, "[1, inf)")
        if self.gold is not None:
            check_distinct("gold", self.gold)
            check_range("gold", min(self.gold), "[0, inf)")

    def prompts(self) -> Iterator[Prompt]:
        for number, entry in enumerate(self._sets()):
            positions = quarter_ends(len(entry.pairs)) if self.gold is None else self.gold
            if max(positions) >= len(entry.pairs):
                raise UserError(
                    f"gold position {max(positions)} is outside {entry.where}; the last of its {len(entry.pairs)} "
                    f"pairs is at {len(entry.pairs) - 1}"
                )
            for position in positions:
                cell = {"pairs": len(entry.pairs), "gold": position}
                fields = {"key": entry.key, "value": entry.value}
                yield Prompt(f"gold_at_{position}/{number}", cell, fields, entry.prompt(position), str(number))

    def score(self, record: Record) -> dict[str, float]:
        # anywhere in the whole answer, as in the benchmark's `evaluate_kv_responses.py`
        return {"accuracy": 100.0 * (record["value"].lower() in record["model_answer"].lower())}

    def _sets(self) -> Iterator[KeyValueSet]:
        if self.file is not None:
            return (KeyValueSet.from_row(row) for row in islice(read_rows(self.file), self.num_sets))
        assert self.num_pairs is not None
        return (
            KeyValueSet.draw(self.num_pairs, random.Random(f"{self.seed}/{number}")) for number in range(self.num_sets)
        )


def quarter_ends(num_pairs: int) -> list[int]:
    """Return the first position and the last of each quarter, as in the benchmark: 0, 34, 69, ... for 140 pairs."""
    return sorted({0, *(max(0, num_pairs * quarter // 4 - 1) for quarter in (1, 2, 3, 4))})


def _random_uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
