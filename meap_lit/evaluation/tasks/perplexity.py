"""Negative log-likelihood of a prepared dataset, also by the number of tokens read before."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from meap_lit.evaluation.task import Item, Plot, Record, Result
from meap_lit.evaluation.tasks.sequences import SequenceTask
from meap_lit.inference.language_model import LanguageModel


def nll_by_context(records: Sequence[Record]) -> dict[int, float]:
    """Return the mean negative log-likelihood of each group of contexts, by the longest context of the group."""
    return {
        end: sum(record["nll_sums"][group] for record in records)
        / sum(record["num_tokens"][group] for record in records)
        for group, end in enumerate(records[0]["context_ends"])
    }


@dataclass(kw_only=True)
class Perplexity(SequenceTask):
    """Mean negative log-likelihood of every next token without masks, as val/loss of `validate`.

    The context of a token is the part of its sequence before it. Contexts are grouped by doubling length: 1, 2, 3 to 4,
    5 to 8 tokens and so on. A record has the sum of each group.
    """

    name = "perplexity"
    metrics = ("nll",)
    unit = "nats"
    higher_is_better = False
    plots = (
        Plot(
            "perplexity",
            "context",
            lines={"": nll_by_context},
            x_label="length of the context, up to (tokens)",
            value_label="negative log-likelihood (nats per token)",
            log_x=True,
        ),
    )

    def answer(self, model: LanguageModel, items: Sequence[Item]) -> list[Record]:
        results = model.log_probs([item.input_ids for item in items], [1] * len(items))
        ends = context_ends(self.seq_len)
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        return [
            {
                "context_ends": ends,
                "num_tokens": sizes,
                "nll_sums": [-float(group.sum()) for group in log_probs.double().split(sizes)],
            }
            for log_probs, _ in results
        ]

    def score(self, record: Record) -> dict[str, float]:
        # all sequences have the same number of tokens, so their mean is the mean over tokens
        return {"nll": sum(record["nll_sums"]) / sum(record["num_tokens"])}

    @classmethod
    def extra(cls, result: Result) -> dict[str, float]:
        try:
            found = {"perplexity": math.exp(result.mean().value)}
        except OverflowError:
            found = {"perplexity": math.inf}
        start = 0
        for end, nll in nll_by_context(result.records).items():
            found[f"nll, context {_interval(start + 1, end)}"] = nll
            start = end
        return found


def context_ends(seq_len: int) -> list[int]:
    """Return the longest context of each group: 1, 2, 4, 8 and so on, and `seq_len`."""
    return [2**power for power in range((seq_len - 1).bit_length())] + [seq_len]


def _interval(first: int, last: int) -> str:
    return f"{last:,}" if first == last else f"{first:,} to {last:,}"
