"""Commonsense reasoning by multiple choice, zero-shot, as in the MEAP paper (arXiv 2502.07490).

EleutherAI's lm-evaluation-harness provides data, prompts and choices; this package computes the log-likelihood of each
choice. It needs pip install 'meap-lit[harness]'.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from meap_lit.errors import UserError, check_range
from meap_lit.evaluation.statistics import Mean
from meap_lit.evaluation.task import Item, Plot, Record, Result, Task
from meap_lit.inference.language_model import LanguageModel

if TYPE_CHECKING:
    from meap_lit.evaluation.harness import HarnessModel


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(Item):
    """A question; its `input_ids` are those of the longest choice.

    Args:
        rows: Token ids that the model reads for each choice, and the position of the first token that counts.
    """

    rows: list[tuple[list[int], int]] = field(repr=False)


@dataclass(kw_only=True)
class Commonsense(Task):
    """Choose the most likely continuation: by log-likelihood (`acc`), or by log-likelihood per character (`acc_norm`).

    `accuracy` is `acc_norm` for tasks that have it in the harness, and `acc` for the others. A question that is longer
    than the context loses its beginning, as in the harness; the table counts such questions.

    Args:
        tasks: Names of multiple-choice tasks of the harness, or of groups of them. Their data is downloaded from the
            Hugging Face Hub at the first use.
        include_path: Folder with your own tasks, in the YAML format of the harness.
        limit: Number of questions of each task, from the first on; all by default.
    """

    name = "commonsense"
    metrics = ("accuracy", "acc", "acc_norm")
    by_key = ("acc",)
    plots = (Plot("tasks", "task"),)

    tasks: tuple[str, ...]
    include_path: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UserError("tasks must name tasks of lm-evaluation-harness, such as [arc_easy, piqa], got none")
        check_range("limit", self.limit, "[1, inf)")

    def items(self, model: LanguageModel) -> list[Item]:
        from meap_lit.evaluation.harness import HarnessModel, load_tasks

        reader = HarnessModel(model)
        tasks = load_tasks(self.tasks, self.include_path)
        for name, task in tasks.items():
            if reason := _other_score(task):
                raise UserError(
                    f"task {name} {reason}; run it with the harness itself, "
                    f"python -m meap_lit.evaluation.harness run --model meap_lit"
                )
        items: list[Item] = []
        for name, task in tasks.items():
            task.build_all_requests(limit=self.limit)
            requests = groupby(task.instances, key=lambda request: request.doc_id)
            items += [_question(name, task, list(choices), reader) for _, choices in requests]
        return items

    def answer(self, model: LanguageModel, items: Sequence[Item]) -> list[Record]:
        from meap_lit.evaluation.harness import HarnessModel

        questions = [item for item in items if isinstance(item, MultipleChoice)]
        rows = [row for question in questions for row in question.rows]
        # an item is several rows, so bound the positions by those of the items
        batch_tokens = len(questions) * max(len(row) for row, _ in rows)
        scores = iter(HarnessModel(model, batch_tokens=batch_tokens).score_rows(rows))
        return [{"log_likelihoods": [next(scores)[0] for _ in question.rows]} for question in questions]

    def score(self, record: Record) -> dict[str, float]:
        sums = record["log_likelihoods"]
        acc = 100.0 * (sums.index(max(sums)) in record["gold"])
        if not record["has_acc_norm"]:
            return {"accuracy": acc, "acc": acc}
        means = [s / len(choice) if choice else -math.inf for s, choice in zip(sums, record["choices"], strict=True)]
        acc_norm = 100.0 * (means.index(max(means)) in record["gold"])
        return {"accuracy": acc_norm, "acc": acc, "acc_norm": acc_norm}

    @classmethod
    def extra(cls, result: Result) -> dict[str, float]:
        """Return means in which every task has the same weight, and the number of questions that were cut."""
        found = {
            f"{metric}, mean of tasks": Mean.of(mean.value for mean in result.along("task", metric).values()).value
            for metric in result.metrics
        }
        num_cut = sum(record["is_cut"] for record in result.records)
        return found | ({"questions that lost their beginning": num_cut} if num_cut else {})


def _other_score(task: Any) -> str | None:
    """Return why a task of the harness cannot be scored by acc or acc_norm; None if it can."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return f"must be multiple_choice, got {task.OUTPUT_TYPE}"
    if callable(task.config.process_results):
        return "must be scored by acc or acc_norm, but has a process_results of its own"
    if not {"acc", "acc_norm"} & set(task.aggregation()):
        return f"must be scored by acc or acc_norm, got {', '.join(task.aggregation())}"
    return None


def _question(name: str, task: Any, requests: Sequence[Any], reader: "HarnessModel") -> MultipleChoice:
    """Return the item of one document, given the harness's requests for it."""
    doc = requests[0].doc
    choices = list(task.doc_to_choice(doc))
    pairs = [tuple(request.args[:2]) for request in requests[: len(choices)]]  # some tasks add requests without context
    fields = {
        "arguments": pairs,
        "choices": choices,
        "gold": _gold(task, doc, choices),
        "has_acc_norm": "acc_norm" in task.aggregation(),
    }
    rows = [reader.row(context, continuation) for context, continuation in pairs]
    longest = max(rows, key=lambda row: len(row[0]))[0]
    context_size = reader.max_length
    # a row of one more id than the model has positions was cut or just fits
    fields["is_cut"] = len(longest) > context_size and any(reader.loses_beginning(*pair) for pair in pairs)
    return MultipleChoice(
        id=f"{name}-{requests[0].doc_id}",
        cell={"task": name},
        fields=fields,
        input_ids=longest,
        num_tokens=min(len(longest), context_size),
        rows=rows,
    )


def _gold(task: Any, doc: Any, choices: Sequence[str]) -> list[int]:
    """Return the indices of the right choices; a task gives one or several, as index or text."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    return [
        choices.index(one) if isinstance(one, str) else int(one) for one in (gold if isinstance(gold, list) else [gold])
    ]
