"""`python -m meap_lit judge`: what language models, or people, say of summaries that a model wrote.

No model of ours is needed: the answers lie in the file that `evaluate` wrote, and the verdicts are added there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from meap_lit.errors import UserError
from meap_lit.evaluation.judging.judges import Judge
from meap_lit.evaluation.rows import read_rows
from meap_lit.evaluation.runner import RECORDS_FILE, write_records
from meap_lit.evaluation.statistics import Mean
from meap_lit.evaluation.task import Record


@dataclass(kw_only=True)
class JudgeSummaries:
    """Have summaries judged that `evaluate` had a model write.

    Each record gets `verdicts` and `explanations`, by judge; `evaluate`, given again as before, then has the scores.

    Args:
        predictions: Files `predictions.jsonl` of `evaluate`, or the folders that hold them.
        judges: Who judges, by a name for tables.
        max_cost: Refuse to begin if it may cost more, in the unit of the judges' prices.
        base: Recipe that this one starts from, relative to its folder.
    """

    predictions: list[str]
    judges: dict[str, Judge]
    max_cost: float | None = None
    base: str | None = None

    def run(self) -> None:
        """Print the cost before, and the shares after.

        Raises:
            UserError: If an option or a file is wrong, it may cost more than `max_cost`, or a judge fails.
        """
        if not self.judges:
            raise UserError("judges names nobody; give one, as recipes/eval/judge.yaml does")
        paths = [Path(name) for name in self.predictions or ()]
        if not paths:
            raise UserError("no summaries; name the folder that evaluate wrote with --predictions")
        files = [path / RECORDS_FILE if path.is_dir() else path for path in paths]
        summaries = {file: read_summaries(file) for file in files}
        everything = [record for records in summaries.values() for record in records]
        self._check_cost(everything)
        for name, judge in self.judges.items():
            for record, judgement in zip(everything, judge.judge(everything), strict=True):
                record["verdicts"] = {**record.get("verdicts", {}), name: judgement.verdict}
                record["explanations"] = {**record.get("explanations", {}), name: judgement.explanation}
            for file, records in summaries.items():  # after each judge: the next may fail
                write_records(file, records)
        for file, records in summaries.items():
            print(f"{file}\n{report(records, list(self.judges))}")

    def _check_cost(self, records: Sequence[Record]) -> None:
        total = 0.0
        for name, judge in self.judges.items():
            cost = judge.cost(records)
            price = "price unknown" if cost.price is None else f"at most {cost.price:.2f}"
            print(
                f"{name}: {cost.num_requests} requests, about {cost.input_tokens:,} tokens read, "
                f"at most {cost.output_tokens:,} written, {price}",
                flush=True,
            )
            if self.max_cost is not None and cost.price is None:
                raise UserError(
                    f"max_cost {self.max_cost:g} needs input_price and output_price of judge {name}; give them, "
                    f"or leave max_cost out"
                )
            total += cost.price or 0.0
        if self.max_cost is not None and total > self.max_cost:
            raise UserError(f"judging may cost {total:.2f}, more than max_cost {self.max_cost:g}; nothing was asked")


def report(records: Sequence[Record], judges: Sequence[str]) -> str:
    """Shares of each judge and the agreement of each two, as lines."""
    verdicts = {name: [record["verdicts"][name] for record in records] for name in judges}
    lines = []
    for name, given in verdicts.items():
        free = Mean.of(100.0 * (verdict is True) for verdict in given)
        lines.append(
            f"  {name}: {free.value:.2f} ± {free.error:.2f} % free of hallucination, {given.count(None)} of "
            f"{free.n} undecided"
        )
    for first, second in combinations(judges, 2):
        equal, kappa, _ = agreement(verdicts[first], verdicts[second])
        lines.append(f"  {first} and {second}: {equal:.2f} % equal, kappa {kappa:.3f}")
    return "\n".join(lines)


def read_summaries(file: Path) -> list[Record]:
    """The records of a file that `evaluate` wrote for a task of summaries.

    Raises:
        UserError: If it cannot be read or is of another task.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist; evaluate writes it when the last summary is there")
    records = []
    for row in read_rows(str(file)):
        for name in ("id", "document", "summary", "model_answer"):
            row.text(name)
        records.append(dict(row.fields))
    return records


# ------------------------------------------------------------------------------------------------- agreement


class Agreement(NamedTuple):
    """Of two judges: share of verdicts that are equal, in percent; Cohen's kappa; number of verdicts."""

    equal: float
    kappa: float
    n: int


def agreement(first: Sequence[bool | None], second: Sequence[bool | None]) -> Agreement:
    """How far two judges agree on what is free of hallucination; undecided is not free, as in the score.

    Kappa is 1 - (1 - equal) / (1 - expected), with the share that two judges with these leanings would have in common
    by chance (Cohen, 1960); NaN if that is everything.
    """
    pairs = [(a is True, b is True) for a, b in zip(first, second, strict=True)]
    if not pairs:
        return Agreement(math.nan, math.nan, 0)
    equal = sum(a == b for a, b in pairs) / len(pairs)
    p, q = (sum(verdicts) / len(pairs) for verdicts in zip(*pairs, strict=True))
    expected = p * q + (1 - p) * (1 - q)
    return Agreement(100 * equal, math.nan if expected == 1 else 1 - (1 - equal) / (1 - expected), len(pairs))
