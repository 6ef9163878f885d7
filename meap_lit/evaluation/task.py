"""Tasks of the evaluation, their items, and their results.

A task makes items, lets a model answer them, and scores the answers. `runner.py` writes a record for each item, a JSON
object. Scores, tables and figures follow from the records alone and need no model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from meap_lit.errors import UserError, check_range
from meap_lit.evaluation.statistics import Difference, Mean, bootstrap
from meap_lit.hf.weights import token_ids
from meap_lit.inference.language_model import LanguageModel

Cell = tuple[Any, ...]
"""Values of some keys of a record's `cell`."""
Record = dict[str, Any]
"""An item that was answered: `id`, `group`, `cell`, the fields of its source, those of its answer, and `scores`."""


@dataclass(frozen=True)
class Item:
    """A question for a model.

    Args:
        id: Name, unique in the task and the same for every model.
        cell: Cell of the table in which its score counts, such as {"length": 4096, "depth": 50}. All items of a task
            have the same keys.
        fields: Fields of the source that the record keeps, with their names there.
        input_ids: Token ids that the model reads.
        num_tokens: Positions that the item needs, including generated ones.
        group: Name that items share if they ask the same under different conditions, such as a question at every
            position. The bootstrap draws them together. Each item is its own group by default.
    """

    id: str
    cell: Mapping[str, Any]
    fields: Mapping[str, Any]
    input_ids: list[int] = field(repr=False)
    num_tokens: int
    group: str | None = None


Values = Mapping[Any, Mean | float]
"""Values to draw by the value of one key, or by a pair of them."""


@dataclass(frozen=True)
class Plot:
    """A figure of results over one or two keys of their cells.

    A key whose values are numbers gives lines, one whose values are names gives bars, and two keys give a heat map for
    each result. A second key with a single value counts as none.

    Args:
        name: Name of the file, without ending.
        x: Key of the cells.
        y: Key of the rows of a heat map.
        lines: Metrics to draw, by the name of their line; the headline by default. A function of the records replaces
            a metric where values are finer than scores: it returns them by x, or by (x, y).
        x_label: Label of x; the key by default.
        y_label: Label of y; the key by default.
        value_label: Label of the values; the metric and its unit by default.
        log_x: Use a logarithmic x axis, linear from 0 to 1.
        levels: Metrics whose means are dashed lines.
        choices: Option of the task that counts the choices of an answer; guessing is then a dashed line, or named.
        options: Options of the task that the title gives.
        caption: How to read the figure, in a sentence or two; written below it.
    """

    name: str
    x: str
    y: str | None = None
    lines: Mapping[str, str | Callable[[Sequence[Record]], Values]] = field(default_factory=lambda: {"": ""})
    x_label: str = ""
    y_label: str = ""
    value_label: str = ""
    log_x: bool = False
    levels: tuple[str, ...] = ()
    choices: str | None = None
    options: tuple[str, ...] = ()
    caption: str = ""


class Task(ABC):
    """Base class of tasks. Subclasses are dataclasses; their fields are the options of a recipe."""

    name: ClassVar[str]
    """Name in files."""
    title: ClassVar[str] = ""
    """Name in titles of figures; `name` in words by default."""
    is_analysis: ClassVar[bool] = False
    """Whether it tells how a model works instead of how well; reports put such tasks last."""
    metrics: ClassVar[tuple[str, ...]]
    """Names of the scores of an item; the first is the headline."""
    unit: ClassVar[str] = "%"
    """Unit of the scores."""
    other_units: ClassVar[Mapping[str, str]] = {}
    """Units of the metrics that have another one."""
    higher_is_better: ClassVar[bool] = True
    """Direction of the headline."""
    decide_answers: ClassVar[tuple[str, ...]] = ()
    """Options that change the answers to the same items; `report` refuses to compare results that differ in them."""
    by_key: ClassVar[tuple[str, ...]] = ()
    """Metrics that the printed table gives for each value of each key, besides the headline."""
    plots: ClassVar[tuple[Plot, ...]] = ()
    """Figures of one or more results."""

    def extent(self, model: LanguageModel) -> tuple[int, int] | None:
        """Check options, files and chat template before items are made.

        Returns:
            Estimated positions of the shortest and the longest item; None if unknown.

        Raises:
            UserError: If an option or a data file is invalid.
        """
        return None

    def options_that_fit(self, context: int) -> dict[str, Any]:
        """Return values of options with which no item is longer than `context`, by name; empty if none are known."""
        return {}

    def settings(self, model: LanguageModel) -> dict[str, Any]:
        """Return what answers depend on besides options, items, tokenizer, weights and decoder, by name."""
        return {}

    @abstractmethod
    def items(self, model: LanguageModel) -> list[Item]:
        """Return all items, without reading the weights of `model`.

        The same options and tokenizer give the same items. Making them may take minutes, so `extent` does the cheap
        checks before.

        Raises:
            UserError: If an option or a data file is invalid.
        """

    @abstractmethod
    def answer(self, model: LanguageModel, items: Sequence[Item]) -> list[Record]:
        """Answer a batch of items; return the JSON fields to add to the record of each."""

    @abstractmethod
    def score(self, record: Record) -> dict[str, float]:
        """Score an answered item from its record alone, by each of `metrics` that applies to it."""

    @classmethod
    def extra(cls, result: "Result") -> dict[str, float]:
        """Return further numbers about a result that are not means over items, by name."""
        return {}

    @classmethod  # noqa: B027, most tasks have nothing to check
    def check_pair(cls, first: "Result", second: "Result") -> None:
        """Raise `UserError` if the scores of two results do not compare although they have the same items."""

    @classmethod
    def extra_of_pair(cls, first: "Result", second: "Result") -> dict[str, float]:
        """Return further numbers about two results, such as the ratio of the second to the first, by name."""
        return {}


def check_distinct(name: str, values: Sequence[Any]) -> None:
    """Raise `UserError` unless an option has at least one value, and each value once."""
    if not values or len(set(values)) < len(values):
        raise UserError(f"{name} must name at least one value and each once, got {list(values)}")


PromptStyle = Literal["raw", "chat"]


@dataclass(frozen=True)
class Prompt:
    """An item before its text is encoded, with the fields of `Item`."""

    id: str
    cell: Mapping[str, Any]
    fields: Mapping[str, Any]
    text: str
    group: str | None = None


@dataclass(kw_only=True)
class GenerationTask(Task):
    """A task whose prompts the model continues greedily; the record keeps the text as `model_answer`.

    Args:
        prompt_style: Give the prompt as plain text (raw), or as a user's message in a chat template (chat).
        template: Chat template, as for `prepare chat`; the tokenizer's own by default.
        system: System message of the chat, if training had one. The authors' fine-tuning (scitix/MEAP) has "You are a
            helpful, excellent and smart assistant."
        max_new_tokens: Maximum number of tokens in an answer.
    """

    decide_answers = ("max_new_tokens",)

    prompt_style: PromptStyle = "raw"
    template: str = "tokenizer"
    system: str | None = None
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        check_range("max_new_tokens", self.max_new_tokens, "[1, inf)")
        if self.prompt_style == "raw" and (self.system is not None or self.template != "tokenizer"):
            raise UserError(
                "task.system and task.template do nothing with prompt_style raw; add --task.prompt_style chat or leave "
                "them out"
            )

    def encode_prompt(self, model: LanguageModel, prompt: str) -> list[int]:
        """Return the token ids of a prompt in the task's style."""
        if self.prompt_style == "raw":
            input_ids = model.encode(prompt)
        else:
            messages = [] if self.system is None else [{"role": "system", "content": self.system}]
            messages.append({"role": "user", "content": prompt})
            input_ids = model.chat_template(self.template).encode_prompt(messages)
        return [_one_object(token_id) for token_id in input_ids]

    def extent(self, model: LanguageModel) -> tuple[int, int] | None:
        if self.prompt_style == "chat":
            self.encode_prompt(model, "")
            _ = model.chat_template(self.template).stop_token_ids
        return None

    def settings(self, model: LanguageModel) -> dict[str, Any]:
        return {
            "stop_token_ids": sorted({*model.stop_token_ids, *self._template_stops(model)}),
            "suppress_tokens": sorted(token_ids(model.source.generation, "suppress_tokens")),
        }

    def _template_stops(self, model: LanguageModel) -> tuple[int, ...]:
        return model.chat_template(self.template).stop_token_ids if self.prompt_style == "chat" else ()

    def item(self, model: LanguageModel, prompt: Prompt) -> Item:
        """Return the item that asks to continue a prompt."""
        input_ids = self.encode_prompt(model, prompt.text)
        num_tokens = len(input_ids) + self.max_new_tokens
        return Item(prompt.id, prompt.cell, prompt.fields, input_ids, num_tokens, prompt.group)

    def answer(self, model: LanguageModel, items: Sequence[Item]) -> list[Record]:
        texts = model.continue_texts(
            [item.input_ids for item in items],
            max_new_tokens=self.max_new_tokens,
            stop_token_ids=self._template_stops(model),
            is_done=lambda ids: self.is_complete(model.tokenizer.decode(ids, skip_special_tokens=True)),
        )
        return [{"model_answer": text} for text in texts]

    def is_complete(self, text: str) -> bool:
        """Return whether the score of an answer that begins with `text` does not depend on what follows."""
        return False


def lengths_that_fit(lengths: Sequence[int], context: int) -> list[int]:
    """Return the lengths that are not longer than `context`, or `context` alone if all are."""
    return [length for length in lengths if length <= context] or [context]


@cache
def _one_object(token_id: int) -> int:
    """Return the same object for equal ids: many long prompts then take a quarter of the memory."""
    return token_id


class PromptTask(GenerationTask):
    """A task whose prompts are texts, the same for every model."""

    @abstractmethod
    def prompts(self) -> Iterator[Prompt]:
        """Yield the prompts; data files are read here.

        Raises:
            UserError: If an option or a data file is invalid.
        """

    def extent(self, model: LanguageModel) -> tuple[int, int] | None:
        """Run the checks of `prompts`, and encode the prompts with the fewest and the most characters."""
        super().extent(model)
        found: list[Prompt] = []
        for prompt in self.prompts():
            found = sorted([*found, prompt], key=lambda prompt: len(prompt.text))
            found = [found[0], found[-1]]  # the others need not stay in memory
        return (self.item(model, found[0]).num_tokens, self.item(model, found[-1]).num_tokens) if found else None

    def items(self, model: LanguageModel) -> list[Item]:
        return [self.item(model, prompt) for prompt in self.prompts()]


@dataclass(frozen=True)
class Result:
    """Answers and scores of one checkpoint on one task.

    Args:
        task: The task, or its class: name, metrics and units.
        label: Name of the checkpoint in tables and figures.
        records: One record with `scores` for each item that was answered, in the order of the items.
        num_skipped: Items left out because they are longer than the model's context.
        about: Checkpoint, options of the task, versions, hashes.
        path: File that it was read from.
    """

    task: Task | type[Task]
    label: str
    records: list[Record]
    num_skipped: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def options(self) -> Mapping[str, Any]:
        """Options of the task."""
        return self.about.get("task", {}).get("init_args", {})

    @property
    def headline(self) -> str:
        """First metric of the task."""
        return self.task.metrics[0]

    @cached_property
    def metrics(self) -> list[str]:
        """Metrics of the task for which at least one record has a score."""
        return [metric for metric in self.task.metrics if self.scored(metric)]

    @property
    def cell_keys(self) -> list[str]:
        return list(self.records[0]["cell"]) if self.records else []

    def unit_of(self, metric: str) -> str:
        return self.task.other_units.get(metric, self.task.unit)

    def scored(self, metric: str | None = None) -> list[tuple[Record, float]]:
        """Return the records that have a score by `metric` (default: the headline), each with that score."""
        name = metric or self.headline
        return [(record, record["scores"][name]) for record in self.records if name in record["scores"]]

    def mean(self, metric: str | None = None) -> Mean:
        """Return the mean over all items that have the metric."""
        return Mean.of(score for _, score in self.scored(metric))

    def table(self, metric: str | None = None, keys: Sequence[str] | None = None) -> dict[Cell, Mean]:
        """Return means by the values of some keys of the cells (default: all), in the order of the items."""
        keys = self.cell_keys if keys is None else keys
        cells: dict[Cell, list[float]] = {}
        for record, score in self.scored(metric):
            cells.setdefault(tuple(record["cell"].get(key, "") for key in keys), []).append(score)
        return {cell: Mean.of(scores) for cell, scores in cells.items()}

    def along(self, key: str, metric: str | None = None) -> dict[Any, Mean]:
        """Return means by the values of one key of the cells, such as "length"."""
        return {value: mean for (value,), mean in self.table(metric, [key]).items()}


def paired_deltas(
    first: Result, second: Result, metric: str | None = None, cell: Mapping[str, Any] | None = None
) -> dict[str, list[float]]:
    """Return second minus first for the items that both answered, by the group that is drawn together.

    Args:
        first: The baseline.
        second: The result that is compared with it.
        metric: One of the scores; the headline by default.
        cell: Only items with these values in their cell, such as {"length": 4096}.
    """
    wanted = (cell or {}).items()
    scores = {record["id"]: score for record, score in first.scored(metric)}
    groups: dict[str, list[float]] = {}
    for record, score in second.scored(metric):
        if record["id"] in scores and wanted <= record["cell"].items():
            groups.setdefault(str(record.get("group") or record["id"]), []).append(score - scores[record["id"]])
    return groups


def difference(
    first: Result, second: Result, metric: str | None = None, cell: Mapping[str, Any] | None = None
) -> Difference:
    """Return the mean of `paired_deltas` with its paired bootstrap interval."""
    return bootstrap([paired_deltas(first, second, metric, cell)])
