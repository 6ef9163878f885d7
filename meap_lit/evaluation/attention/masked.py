"""Effect of masked input tokens on attention: they get less of it, and the others get it less evenly.

From the analysis in the MEAP paper (arXiv 2502.07490). Every sequence is read twice: clean, and with a share of its
tokens masked. The paper compares a model of plain next-token prediction on clean sequences with one of MEAP on masked
ones. The same model on both is the control: it separates the effect of masks in the input from that of training with
them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from meap_lit.errors import UserError, check_range
from meap_lit.evaluation.attention.weights import PerHead, as_record, by_head, read, visible, weight_blocks
from meap_lit.evaluation.statistics import Mean, paired_t_test, student
from meap_lit.evaluation.task import Item, Plot, Record, Result
from meap_lit.evaluation.tasks.sequences import SequenceTask
from meap_lit.inference.language_model import LanguageModel
from meap_lit.masking import mask_inputs, num_masked
from meap_lit.model import Decoder

STATISTICS = (("attention", "decay", -1), ("variance", "variance increase", 1))
"""Statistic of a record, name of its change, and the sign of the paper's direction."""


def by_layer(reading: str, statistic: str) -> Callable[[Sequence[Record]], dict[int, Mean]]:
    """Return a function of records that gives the mean over sequences and heads, by the number of the layer from 1."""

    def means(records: Sequence[Record]) -> dict[int, Mean]:
        layers = np.mean([record[reading][statistic] for record in records], axis=2).T  # [num_layers, num_records]
        return {number: Mean.of(values) for number, values in enumerate(layers, start=1)}

    return means


def decay_by_head(records: Sequence[Record]) -> dict[tuple[int, int], float]:
    """Return the decay in percent by the numbers of head and layer, from 1."""
    clean, masked = (
        np.mean([record[reading]["attention"] for record in records], axis=0) for reading in ("clean", "masked")
    )
    return by_head(100 * (clean - masked) / clean)


def _layer_plot(name: str, statistic: str, value_label: str) -> Plot:
    lines = {reading: by_layer(reading, statistic) for reading in ("clean", "masked")}
    return Plot(name, "layer", lines=lines, value_label=value_label)


@dataclass(kw_only=True)
class MaskedAttention(SequenceTask):
    """Attention to masked tokens, and variance of the attention to the others, on clean and on masked sequences.

    For each query, layer and head: the mean weight of the visible keys at masked positions (`attention`), and the
    variance of the weights of the other visible keys (`variance`), at the same positions in both readings. A record has
    the means over the queries that see at least one masked and two other keys, [num_layers, num_heads]. The scores are
    of one checkpoint, the control. With two checkpoints, `extra_of_pair` compares the first on clean with the second on
    masked sequences, as in the paper.

    Args:
        mask_ratio: Share of the tokens to mask.
        seed: Seed of the masks.
        block_size: Number of queries whose weights are in memory at a time.
    """

    name = "attention"
    is_analysis = True
    metrics = ("decay", "variance_increase")
    decide_answers = ("mask_ratio", "seed")
    plots = (
        _layer_plot("attention_masked", "attention", "mean attention weight of a masked position"),
        _layer_plot("attention_variance", "variance", "variance of the other attention weights"),
        Plot(
            "attention_decay",
            "head",
            "layer",
            lines={"": decay_by_head},
            value_label="decay of the attention to masked positions (%)",
        ),
    )

    mask_ratio: float = 0.15
    seed: int = 0
    block_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("task.block_size", self.block_size, "[1, inf)")
        count = num_masked(self.mask_ratio, self.seq_len)
        if count == 0 or self.seq_len - count < 2:
            raise UserError(
                f"task.mask_ratio {self.mask_ratio:g} masks {count} of {self.seq_len} tokens; "
                f"at least 1 must be masked and 2 must not"
            )

    def extent(self, model: LanguageModel) -> tuple[int, int] | None:
        student()  # without it, the results could not be compared after the model has answered
        rows, mask_token_id = model.config.vocab_size, model.tokenizer.mask_token_id
        assert rows is not None
        if mask_token_id >= rows:
            raise UserError(
                f"checkpoint {model.checkpoint} has no vocabulary row for the mask token: its id is {mask_token_id}, "
                f"the rows are {rows}; export one that was trained here, with mask_ratio 0 for a baseline"
            )
        return super().extent(model)

    def items(self, model: LanguageModel) -> list[Item]:
        return [replace(item, input_ids=item.input_ids[:-1]) for item in super().items(model)]

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
            metric: sign * _percent_change(_mean(record, "clean", statistic), _mean(record, "masked", statistic))
            for metric, (statistic, _, sign) in zip(self.metrics, STATISTICS, strict=True)
        }

    @classmethod
    def extra(cls, result: Result) -> dict[str, float]:
        """Compare the clean with the masked readings of one checkpoint: the control."""
        return changes(result.records, result.records)

    @classmethod
    def extra_of_pair(cls, first: Result, second: Result) -> dict[str, float]:
        """Compare the clean readings of the first with the masked ones of the second, as in the paper."""
        masked = {record["id"]: record for record in second.records}
        shared = [record for record in first.records if record["id"] in masked]
        return changes(shared, [masked[record["id"]] for record in shared])


def statistics(decoder: Decoder, input_ids: Tensor, input_mask: Tensor, block_size: int) -> dict[str, PerHead]:
    """Return the attention to masked keys and the variance of that to the others, averaged over queries.

    Args:
        decoder: The model.
        input_ids: Token ids, [T], int64.
        input_mask: Positions that count as masked, [T], bool; at least one does, and two do not.
        block_size: Number of queries whose weights are in memory at a time, [num_heads, block_size, T].

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
    """Return for each query the mean weight of the masked keys and the population variance of the other weights.

    Args:
        weights: Attention weights of n queries at the last n of S positions, [H, n, S].
        input_mask: Masked keys, [S], bool.

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
    # the difference of mean square and squared mean would lose the digits of small variances
    squares = (weights - mean_of_others[..., None]).square_().masked_fill_(~others, 0)
    variance = squares.sum(dim=-1) / num_others
    not_counted = ~counted(num_masked_keys, num_seen)
    return mean.masked_fill(not_counted, 0), variance.masked_fill(not_counted, 0)


def counted(num_masked_keys: Tensor, num_seen: Tensor) -> Tensor:
    """Return which queries count: those that see a masked key and two others."""
    return (num_masked_keys >= 1) & (num_seen - num_masked_keys >= 2)


def changes(clean: Sequence[Record], masked: Sequence[Record]) -> dict[str, float]:
    """Compare readings sequence by sequence: changes of the means, and t-tests of the paired differences.

    Args:
        clean: Records whose clean reading counts.
        masked: Records of the same sequences whose masked reading counts.
    """
    found = {}
    for statistic, name, sign in STATISTICS:
        before = np.array([_mean(record, "clean", statistic) for record in clean])
        after = np.array([_mean(record, "masked", statistic) for record in masked])
        t, p = paired_t_test(sign * (after - before))
        found[f"{name}, clean to masked, %"] = sign * _percent_change(float(before.mean()), float(after.mean()))
        if statistic == "variance":
            found["variance difference, clean to masked"] = float((after - before).mean())
        found |= {f"{name}, clean to masked, t": t, f"{name}, clean to masked, p": p}
    return found


def _mean(record: Record, reading: str, statistic: str) -> float:
    """Return the mean over layers and heads."""
    return float(np.mean(record[reading][statistic]))


def _percent_change(before: float, after: float) -> float:
    return 100 * (after - before) / before
