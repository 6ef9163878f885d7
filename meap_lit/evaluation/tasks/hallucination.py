"""Contextual hallucination: summaries that contradict or exceed their document (MEAP paper, arXiv 2502.07490).

The model summarizes documents of XSum, MultiNews or WikiSum. `python -m meap_lit judge` lets other models compare each
summary with its document. The score is the share of summaries that are judged free of hallucination.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from meap_lit.errors import UserError, check_range
from meap_lit.evaluation.judging.agreement import agreements, free_by_judge
from meap_lit.evaluation.rows import read_rows
from meap_lit.evaluation.statistics import Mean
from meap_lit.evaluation.task import Item, Plot, Prompt, PromptTask, Record, Result
from meap_lit.inference.language_model import LanguageModel

# voidism/Lookback-Lens, step01_extract_attns.py: the first for XSum, the second for other summaries
PROMPTS = {
    "one_sentence": (
        "Generate a summary comprising of 1 sentence for the given article.\n\n#Article#: {document}\n#Summary#:"
    ),
    "document": ("Generate a summary based on the information in the document.\n\n#Document#: {document}\n#Summary#:"),
}

STOPS = ("#Document#:", "#Article#:")
"""Beginnings of a further example, which ends the summary."""


def _free(records: Sequence[Record]) -> dict[str, Mean]:
    return free_by_judge(records, _judges(records))


def _judges(records: Sequence[Record]) -> list[str]:
    """Return the judges who judged every summary."""
    judges = [list(record.get("verdicts", {})) for record in records]
    return [judge for judge in judges[0] if all(judge in others for others in judges)]


@dataclass(kw_only=True)
class Hallucination(PromptTask):
    """Summaries of documents, for `judge`.

    Args:
        file: Records with `document` and `summary` (.jsonl, .jsonl.gz, .json, .parquet).
        prompt: Ask for one sentence, as for XSum, or for a summary of any length.
        num_samples: Number of records drawn from the file; all of them if there are fewer.
        seed: Seed of the draw.
    """

    name = "hallucination"
    metrics = ("free", "undecided")
    plots = (Plot("judges", "judge", lines={"": _free}, value_label="free of hallucination (%)"),)

    file: str
    prompt: Literal["one_sentence", "document"]
    num_samples: int = 100
    seed: int = 0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("num_samples", self.num_samples, "[1, inf)")

    def prompts(self) -> Iterator[Prompt]:
        rows = [{name: row.text(name) for name in ("document", "summary")} for row in read_rows(self.file)]
        chosen = sorted(random.Random(self.seed).sample(range(len(rows)), min(self.num_samples, len(rows))))
        dataset = Path(self.file).name.partition(".")[0]
        for index in chosen:
            yield Prompt(f"{index}", {"dataset": dataset}, rows[index], PROMPTS[self.prompt].format(**rows[index]))

    def answer(self, model: LanguageModel, items: Sequence[Item]) -> list[Record]:
        return [{"model_answer": until_stop(answer["model_answer"])} for answer in super().answer(model, items)]

    def is_complete(self, text: str) -> bool:
        return any(stop in text for stop in STOPS)

    def score(self, record: Record) -> dict[str, float]:
        """Return the share of judges who found it free of hallucination, and who were undecided; {} before judging."""
        verdicts = list(record.get("verdicts", {}).values())
        if not verdicts:
            return {}
        return {
            "free": 100 * verdicts.count(True) / len(verdicts),
            "undecided": 100 * verdicts.count(None) / len(verdicts),
        }

    @classmethod
    def extra(cls, result: Result) -> dict[str, float]:
        """Return the share and the agreement of judges, or the number of summaries that are not judged yet."""
        num_open = sum(not record.get("verdicts") for record in result.records)
        if num_open:
            return {"not judged yet (python -m meap_lit judge)": num_open}
        found = {f"free by {judge}": mean.value for judge, mean in _free(result.records).items()}
        for pair, (equal, kappa) in agreements(result.records, _judges(result.records)).items():
            found |= {f"{pair} equal": equal, f"{pair} kappa": kappa}
        return found

    @classmethod
    def check_pair(cls, first: Result, second: Result) -> None:
        """Refuse results of different judges, whose scores are means over other verdicts.

        Raises:
            UserError: If a summary of one has a judge whom that of the other lacks, and both are judged.
        """
        judges = {record["id"]: record.get("verdicts", {}).keys() for record in first.records}
        for record in second.records:
            before, after = judges.get(record["id"], {}.keys()), record.get("verdicts", {}).keys()
            if before and after and before != after:
                judge = min(before ^ after)
                names = [str(result.path or result.label) for result in (first, second)]
                with_it, without = names if judge in before else reversed(names)
                raise UserError(
                    f"judge {judge} has judged {with_it} but not {without}, so their scores do not compare; run "
                    f"judge with the same judges for both"
                )


def until_stop(text: str) -> str:
    """Return a summary up to the first stop string."""
    for stop in STOPS:
        text = text.partition(stop)[0]
    return text.strip()
