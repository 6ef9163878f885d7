"""How judges of the same summaries decide, and how far they agree."""

import math
from collections.abc import Sequence
from itertools import combinations

from meap_lit.evaluation.statistics import Mean
from meap_lit.evaluation.task import Record


def free_by_judge(records: Sequence[Record], judges: Sequence[str]) -> dict[str, Mean]:
    """Return the percentage of summaries that each judge found free of hallucination."""
    return {judge: Mean.of(100.0 * (record["verdicts"][judge] is True) for record in records) for judge in judges}


def agreements(records: Sequence[Record], judges: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return `agreement` of each pair of judges, by their names."""
    verdicts = {judge: [record["verdicts"][judge] for record in records] for judge in judges}
    return {f"{a} and {b}": agreement(verdicts[a], verdicts[b]) for a, b in combinations(judges, 2)}


def agreement(first: Sequence[bool | None], second: Sequence[bool | None]) -> tuple[float, float]:
    """Return the percentage of equal verdicts of two judges, and Cohen's kappa; undecided counts as not free.

    Kappa is 1 - (1 - equal) / (1 - expected), where `expected` is the share of equal verdicts of two independent judges
    with the same totals (Cohen, 1960). It is NaN if `expected` is 1.
    """
    pairs = [(a is True, b is True) for a, b in zip(first, second, strict=True)]
    if not pairs:
        return math.nan, math.nan
    equal = sum(a == b for a, b in pairs) / len(pairs)
    p, q = (sum(verdicts) / len(pairs) for verdicts in zip(*pairs, strict=True))
    expected = p * q + (1 - p) * (1 - q)
    return 100 * equal, math.nan if expected == 1 else 1 - (1 - equal) / (1 - expected)
