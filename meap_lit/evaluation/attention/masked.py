"""What masked input tokens do to attention: less of it goes to them, and it is spread less evenly over the others.

From the analysis in the MEAP paper (arXiv 2502.07490). Every sequence is read as it is and with a share of its tokens
masked. The paper compares a model of plain next-token prediction on the first with one of MEAP on the second; the same
model on both is the control that tells the effect of the mask in the input from that of training with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from meap_lit.errors import UserError
from meap_lit.evaluation.attention.weights import PerHead, as_record, read, visible, weight_blocks
from meap_lit.evaluation.figures import curves, heat_maps
from meap_lit.evaluation.statistics import paired_t_test
from meap_lit.evaluation.task import Item, Record, Topic
from meap_lit.evaluation.tasks.sequences import SequenceTask
from meap_lit.inference.language_model import LanguageModel
from meap_lit.masking import mask_inputs, num_masked
from meap_lit.model import Decoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from meap_lit.evaluation.task import Result


@dataclass(kw_only=True)
class MaskedAttention(SequenceTask):
    """Attention to masked tokens, and the variance of that to the others, on clean and on masked sequences.

    Of each query, layer and head: the mean weight of the visible keys at masked positions (`attention`), and the
    variance of the weights of the other visible keys (`variance`); the positions are the same where the sequence is
    read clean. A record holds the mean over the queries that see at least one of the former and two of the latter,
    [num_layers, num_heads]. The scores are of one checkpoint, hence the control; with two, `extra` compares the first
    on clean with the second on masked sequences, as the paper does.

    Args:
        mask_ratio: Share of the tokens to mask.
        seed: Seed of the masks.
        block_size: Queries whose weights are held at a time.
    """

    name: ClassVar[str] = "attention"
    topic: ClassVar[Topic] = "attention"
    metrics: ClassVar[tuple[str, ...]] = ("decay", "variance_increase")

    mask_ratio: float = 0.15
    seed: int = 0
    block_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 1:
            raise UserError(f"task.block_size must be at least 1, got {self.block_size}")
        count = num_masked(self.mask_ratio, self.seq_len)
        if count == 0 or self.seq_len - count < 2:
            raise UserError(
                f"task.mask_ratio {self.mask_ratio:g} masks {count} of {self.seq_len} tokens; "
                f"at least 1 must be masked and 2 must not"
            )

    def extent(self, model: LanguageModel) -> tuple[int, int] | None:
        rows, mask_token_id = model.config.vocab_size, model.tokenizer.mask_token_id
        assert rows is not None
        if mask_token_id >= rows:
            raise UserError(
                f"checkpoint {model.checkpoint} has no vocabulary row for the mask token: its id is {mask_token_id}, "
                f"the rows are {rows}; export one that was trained here, with mask_ratio 0 for a baseline"
            )
        return super().extent(model)

    def items(self, model: LanguageModel) -> list[Item]:
        return [
            Item(f"{self.split}-{number}", {}, {"block": number}, block[:-1], num_tokens=self.seq_len)
            for number, block in enumerate(self.blocks(model))
        ]

    def answer(self, model: LanguageModel, items: Sequence[Item]) -> list[Record]:
        return [self._answer(model, item) for item in items]

    def _answer(self, model: LanguageModel, item: Item) -> Record:
        clean = torch.tensor([item.input_ids])  # [1, T]
        masked, input_mask = mask_inputs(
            clean,
            torch.tensor([item.fields["block"]]),
            mask_token_id=model.tokenizer.mask_token_id,
            mask_ratio=self.mask_ratio,
            seed=self.seed,
            step=0,
        )
        readings = {"clean": clean[0], "masked": masked[0]}
        return {
            reading: statistics(model.decoder, input_ids.to(model.device), input_mask[0], self.block_size)
            for reading, input_ids in readings.items()
        }

    def score(self, record: Record) -> dict[str, float]:
        return {
            "decay": -_percent_change(_mean(record, "clean", "attention"), _mean(record, "masked", "attention")),
            "variance_increase": _percent_change(
                _mean(record, "clean", "variance"), _mean(record, "masked", "variance")
            ),
        }

    def extra(self, results: "Sequence[Result]") -> dict[str, float]:
        return {
            f"{name} ({comparison.title})": value
            for comparison in comparisons(results)
            for name, value in comparison.figures().items()
        }

    def figures(self, results: "Sequence[Result]") -> "dict[str, Figure]":
        decays = {result.label: decay_by_head(result.records) for result in results}
        return {
            "attention_masked": curves(
                by_layer(results, "attention"), x_label="layer", y_label="mean weight of a masked position"
            ),
            "attention_variance": curves(
                by_layer(results, "variance"), x_label="layer", y_label="variance of the other weights"
            ),
            "attention_decay": heat_maps(
                decays,
                range(1, max(panel.shape[1] for panel in decays.values()) + 1),
                range(1, max(panel.shape[0] for panel in decays.values()) + 1),
                x_label="head",
                y_label="layer",
                title="decay of the attention to masked positions",
            ),
        }


# --------------------------------------------------------------------------------------------------- statistics


def statistics(decoder: Decoder, input_ids: Tensor, input_mask: Tensor, block_size: int) -> dict[str, PerHead]:
    """Attention to masked keys and variance of that to the others, each averaged over queries.

    Args:
        decoder: The model.
        input_ids: What it reads, [T], int64.
        input_mask: Which positions count as masked, [T], bool; at least one of them, and two that do not.
        block_size: Queries whose weights are held at a time, [num_heads, block_size, T].

    Returns:
        `attention` and `variance`, each [num_layers, num_heads] as lists, rounded to six digits.
    """
    input_mask = input_mask.to(input_ids.device)
    shape = (decoder.config.num_layers, decoder.config.num_heads)
    sums = torch.zeros(2, *shape, dtype=torch.float64, device=input_ids.device)

    def observe(layer: int, query: Tensor, key: Tensor) -> None:
        for weights in weight_blocks(query, key, block_size):
            for total, values in zip(sums, key_statistics(weights, input_mask[: weights.size(2)]), strict=True):
                total[layer] += values.sum(dim=1, dtype=torch.float64)

    read(decoder, input_ids, observe)
    num_masked_keys = input_mask.cumsum(0)
    means = sums / counted(num_masked_keys, torch.arange(1, len(input_ids) + 1, device=input_ids.device)).sum()
    return {name: as_record(values) for name, values in zip(("attention", "variance"), means, strict=True)}


def key_statistics(weights: Tensor, input_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean weight of the masked keys, and population variance of the weights of the others, of each query.

    Args:
        weights: Attention weights of n queries at the last n of S positions, [H, n, S].
        input_mask: Which keys are masked, [S], bool.

    Returns:
        Mean and variance, each [H, n]; 0 where a query sees no masked key or fewer than two others.
    """
    num_queries, num_keys = weights.shape[1:]
    num_seen = torch.arange(num_keys - num_queries + 1, num_keys + 1, device=weights.device)  # [n]
    num_masked_keys = input_mask.cumsum(0)[num_keys - num_queries :]  # [n]
    num_others = num_seen - num_masked_keys
    mean = weights @ input_mask.to(weights.dtype) / num_masked_keys  # [H, n]
    mean_of_others = weights @ (~input_mask).to(weights.dtype) / num_others  # [H, n]
    others = visible(num_queries, num_keys, weights.device) & ~input_mask  # [n, S]
    # deviations first: the difference of mean square and squared mean would lose the digits of small variances
    squares = (weights - mean_of_others[..., None]).square_().masked_fill_(~others, 0)
    variance = squares.sum(dim=-1) / num_others
    not_counted = ~counted(num_masked_keys, num_seen)
    return mean.masked_fill(not_counted, 0), variance.masked_fill(not_counted, 0)


def counted(num_masked_keys: Tensor, num_seen: Tensor) -> Tensor:
    """Which queries count: those that see a masked key and two others."""
    return (num_masked_keys >= 1) & (num_seen - num_masked_keys >= 2)


# -------------------------------------------------------------------------------------------------- comparisons


@dataclass(frozen=True)
class Comparison:
    """The records of one reading beside those of another, sequence by sequence.

    Args:
        title: What is compared.
        clean: Records whose clean reading counts.
        masked: Records of the same sequences whose masked reading counts.
    """

    title: str
    clean: Sequence[Record]
    masked: Sequence[Record]

    def figures(self) -> dict[str, float]:
        """Changes of the means over sequences, and the t-tests of the differences of each."""
        figures = {}
        for statistic, name, sign in (("attention", "decay", -1), ("variance", "variance increase", 1)):
            clean = np.array([_mean(record, "clean", statistic) for record in self.clean])
            masked = np.array([_mean(record, "masked", statistic) for record in self.masked])
            test = paired_t_test(sign * (masked - clean))
            figures[f"{name}, %"] = sign * _percent_change(float(clean.mean()), float(masked.mean()))
            if statistic == "variance":
                figures["variance difference"] = float((masked - clean).mean())
            figures |= {f"{name}, t": test.t, f"{name}, p": test.p}
        return figures


def comparisons(results: "Sequence[Result]") -> list[Comparison]:
    """The paper's comparison, if there are two results, and the control of each."""
    controls = [Comparison(f"{result.label} clean to masked", result.records, result.records) for result in results]
    if len(results) < 2:
        return controls
    first, second = results
    masked = {record["id"]: record for record in second.records}
    shared = [record for record in first.records if record["id"] in masked]
    title = f"{first.label} clean to {second.label} masked"
    return [Comparison(title, shared, [masked[record["id"]] for record in shared]), *controls]


def by_layer(results: "Sequence[Result]", statistic: str) -> dict[str, dict[str, float]]:
    """For each reading of each result the mean over sequences and heads, keyed by the number of the layer, from 1."""
    lines = {}
    for result in results:
        for reading in ("clean", "masked"):
            layers = np.mean([record[reading][statistic] for record in result.records], axis=(0, 2))
            numbers = map(str, range(1, len(layers) + 1))  # as text, so that no tick falls between two layers
            lines[f"{result.label} {reading}"] = dict(zip(numbers, layers.tolist(), strict=True))
    return lines


def decay_by_head(records: Sequence[Record]) -> np.ndarray:
    """Decay in percent, [num_layers, num_heads], of one checkpoint: a head of another has nothing in common with it."""
    clean, masked = (
        np.mean([record[reading]["attention"] for record in records], axis=0) for reading in ("clean", "masked")
    )
    return 100 * (clean - masked) / clean


def _mean(record: Record, reading: str, statistic: str) -> float:
    """Mean over layers and heads."""
    return float(np.mean(record[reading][statistic]))


def _percent_change(before: float, after: float) -> float:
    return 100 * (after - before) / before
