"""`meap-lit judge`: judge the summaries that `evaluate` wrote, by language models or people.

Verdicts are added to the file that holds the summaries; no checkpoint is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meap_lit.errors import UserError
from meap_lit.evaluation.judging.agreement import agreements, free_by_judge
from meap_lit.evaluation.judging.judges import Judge
from meap_lit.evaluation.rows import read_rows
from meap_lit.evaluation.runner import RECORDS_FILE, write_records
from meap_lit.evaluation.task import Record


@dataclass(kw_only=True)
class JudgeSummaries:
    """Judge the summaries that `evaluate` wrote.

    Each record gets `verdicts` and `explanations` by judge. The same `evaluate` command then computes the scores.

    Args:
        predictions: Files `predictions.jsonl` of `evaluate`, or the folders that hold them.
        judges: The judges, by a name for tables.
        max_cost: Refuse to start if judging may cost more, in the unit of the judges' prices.
        base: Recipe that this one starts from, relative to its folder.
    """

    predictions: list[str]
    judges: dict[str, Judge]
    max_cost: float | None = None
    base: str | None = None

    def run(self) -> None:
        """Print an estimate of the cost, judge, and print the share of summaries that are free of hallucination.

        Raises:
            UserError: If an option or a file is wrong, the cost may exceed `max_cost`, or a judge fails.
        """
        if not self.judges:
            raise UserError("judges is empty; name one, as recipes/eval/judge.yaml does")
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
            for file, records in summaries.items():  # after each judge, since the next may fail
                write_records(file, records)
        for file, records in summaries.items():
            print(f"{file}\n{summary(records, list(self.judges))}")

    def _check_cost(self, records: Sequence[Record]) -> None:
        total = 0.0
        for name, judge in self.judges.items():
            cost = judge.cost(records)
            written = "without limit" if cost.output_tokens is None else f"at most {cost.output_tokens:,}"
            price = "price unknown" if cost.price is None else f"at most {cost.price:.2f}"
            print(
                f"{name}: {cost.num_requests} requests, about {cost.input_tokens:,} tokens read, "
                f"{written} written, {price}",
                flush=True,
            )
            if self.max_cost is not None and cost.price is None:
                raise UserError(
                    f"max_cost {self.max_cost:g} needs input_price, output_price and max_tokens of judge {name}; give "
                    f"them, or leave max_cost out"
                )
            total += cost.price or 0.0
        if self.max_cost is not None and total > self.max_cost:
            raise UserError(f"judging may cost {total:.2f}, more than max_cost {self.max_cost:g}; nothing was asked")


def summary(records: Sequence[Record], judges: Sequence[str]) -> str:
    """Return the share of each judge and the agreement of each pair, as lines."""
    lines = []
    for name, free in free_by_judge(records, judges).items():
        undecided = sum(record["verdicts"][name] is None for record in records)
        lines.append(
            f"  {name}: {free.value:.2f} ± {free.error:.2f} % free of hallucination, {undecided} of {free.n} undecided"
        )
    for pair, (equal, kappa) in agreements(records, judges).items():
        lines.append(f"  {pair}: {equal:.2f} % equal, kappa {kappa:.3f}")
    return "\n".join(lines)


def read_summaries(file: Path) -> list[Record]:
    """Return the records of a file that `evaluate` wrote for a task of summaries.

    Raises:
        UserError: If the file cannot be read or belongs to another task.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist; evaluate writes it when all summaries are complete")
    records = []
    for row in read_rows(str(file)):
        for name in ("id", "document", "summary", "model_answer"):
            row.text(name)
        records.append(dict(row.fields))
    return records
