"""The paper's claims beside what was found here, and what may be said of each."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from meap_lit.evaluation.statistics import Difference
from meap_lit.report.arms import Arm, Study
from meap_lit.report.blocks import Block, Heading, Paragraph, Table
from meap_lit.report.differences import seed_difference
from meap_lit.report.evaluations import Evaluations, compare
from meap_lit.report.runs import Kind
from meap_lit.report.tasks import attention_change, difference_text, digits_of, results_of, seed_means
from meap_lit.report.training import emergence, emergence_difference, ratios, seed_text

SUPPORTED = "supported"
NOT_SUPPORTED = "not supported"
NOT_TESTED = "not tested at this scale"
ON_PAR = 1.0
"""Percentage points that "on par" may be worse; the margin is ours, the paper states none."""
SAME_SPEED = 5.0
"""Percent that the speed may be lower and still be the same; ours too."""
RETRIEVAL_TASKS = ("needle", "multi_needle", "magic_number", "facts")
STAND_INS = {"facts": "stand-in: a made-up fact, chosen among a few"}
"""Tasks of ours that test a claim in another way than the paper does."""


@dataclass(frozen=True)
class Claim:
    """A claim about the scores of tasks: masking raises them.

    Args:
        text: What the paper says.
        kind: Of which training.
        tasks: Names of the tasks that test it.
        paper: The paper's numbers, NTP to MEAP; with * where read in a summary of the paper.
        metric: Score that it is about; the headline if not given.
        margin: How much worse masking may be for the claim to hold, in the unit of the score.
    """

    text: str
    kind: Kind
    tasks: tuple[str, ...]
    paper: str
    metric: str | None = None
    margin: float = 0.0


CLAIMS = (
    Claim(
        "retrieval from context is better (needle in a haystack)",
        "pretraining",
        RETRIEVAL_TASKS,
        "1.1B at 32K: 65.9 to 80.2 after 40B tokens, 52.8 to 85.8 after 60B, 87.1 to 98.2 after 200B",
    ),
    Claim(
        "multi-document QA: better after pretraining",
        "pretraining",
        ("multi_document_qa",),
        "* relative gain: 10 documents, position 10 +30.6%; 20 documents, positions 10 and 20 +5.1%, +27.2%",
    ),
    Claim("long-context reasoning (M-RS) is better", "pretraining", ("reasoning",), "* 8K to 32K: +6.6 points"),
    Claim(
        "commonsense: on par or better",
        "pretraining",
        ("commonsense",),
        "no number at hand",
        margin=ON_PAR,
    ),
    Claim(
        "summaries have fewer hallucinations",
        "pretraining",
        ("hallucination",),
        "* GPT-4o: XSum 14 to 16, MultiNews 10 to 13, WikiSum 19 to 24",
    ),
    Claim(
        "attention of the last token to the answer grows",
        "pretraining",
        ("attention_segments",),
        "9.4 to 34.5",
        metric="answer",
    ),
    Claim(
        "multi-document QA: better after fine-tuning",
        "fine-tuning",
        ("multi_document_qa",),
        "Llama-3-8B on Alpaca, 20 documents: 25.56 to 37.33",
    ),
    Claim(
        "commonsense after fine-tuning: on par or better",
        "fine-tuning",
        ("commonsense",),
        "* Llama-3-8B on Alpaca: 67.30 to 68.42",
        margin=ON_PAR,
    ),
)
"""Numbers as in docs/evaluation.md."""


@dataclass(frozen=True)
class Finding:
    """A row of the table of claims."""

    claim: str
    study: str
    paper: str
    ours: str
    difference: str
    verdict: str

    @property
    def row(self) -> list[str]:
        return [self.claim, self.study, self.paper, self.ours, self.difference, self.verdict]


def verdict(low: float, high: float, num_seeds: int, margin: float = 0.0) -> str:
    """What the interval of a difference says of a claim whose direction is upwards.

    Args:
        low: Its lower end.
        high: Its upper end.
        num_seeds: How many pairs of runs it rests on.
        margin: How far below 0 the claim still holds.
    """
    bound = f"-{margin:g}" if margin else "0"
    if math.isnan(low):
        return f"{NOT_TESTED}: one seed has no interval"
    if low > -margin:
        text = SUPPORTED
    elif high < -margin:
        text = f"{NOT_SUPPORTED}: the interval lies below {bound}, on the other side"
    else:
        text = f"{NOT_SUPPORTED}: the interval includes {bound}"
    return text if num_seeds > 1 else f"{text} (one seed: says nothing of other seeds)"


def find(studies: Sequence[Study], evaluations: Evaluations) -> list[Finding]:
    """Every claim in every study of its kind, with its verdict."""
    findings = []
    for claim in CLAIMS:
        findings += _each_study(claim.text, claim.paper, claim.kind, studies, _score_test(claim, evaluations))
    attention = "attention to masked tokens falls; variance of the others' weights grows"
    findings += _each_study(
        attention, "53.34%; 7.80%, at 4,096 tokens", "pretraining", studies, _attention_test(evaluations)
    )
    findings += _each_study(
        "P = 0.15 is the best of the ratios tried",
        "P = 0.15 is what the paper chose",
        "pretraining",
        studies,
        _ratio_test(evaluations),
    )
    findings += _each_study(
        "retrieval emerges after fewer tokens",
        "60B tokens of MEAP (85.8) are near 200B of NTP (87.1), needle at 32K",
        "pretraining",
        studies,
        _emergence_test,
    )
    findings += _each_study("masking costs no time in pretraining", "no extra pass", "pretraining", studies, _cost_test)
    return findings


Tested = tuple[str, str, str]
"""What was found here, the difference, and the verdict."""
Test = Callable[[Arm], list[Tested]]


def _each_study(claim: str, paper: str, kind: Kind, studies: Sequence[Study], test: Test) -> list[Finding]:
    findings = []
    for study in studies:
        arm = study.paper_arm
        if study.kind == kind and arm is not None:
            findings += [Finding(claim, study.title, paper, *tested) for tested in test(arm)]
    return findings or [Finding(claim, "", paper, "", "", NOT_TESTED)]


def _score_test(claim: Claim, evaluations: Evaluations) -> Test:
    def test(arm: Arm) -> list[Tested]:
        found = []
        for name, results in evaluations.items():
            first = next(iter(results_of(arm, results).values()), None)
            if first is None:
                continue
            change = compare(results, arm, arm.baseline or arm, claim.metric) if first.task in claim.tasks else None
            if change is None:
                continue
            digits = digits_of(first, claim.metric)
            before, after = (
                statistics.mean(seed_means(one, results, claim.metric).values()) for one in (arm.baseline or arm, arm)
            )
            stand_in = STAND_INS.get(first.task)
            if first.options.get("distractors") == "synthetic":
                stand_in = "synthetic distractors"
            ours = f"{name}{f' ({stand_in})' if stand_in else ''}: {before:.{digits}f} to {after:.{digits}f}"
            says = verdict(change[0].low, change[0].high, change[1], claim.margin)
            found.append((ours, difference_text(change, digits), says))
        return found

    return test


def _attention_test(evaluations: Evaluations) -> Test:
    def test(arm: Arm) -> list[Tested]:
        found = []
        for name, results in evaluations.items():
            if next(iter(results.values())).task != "attention" or arm.baseline is None:
                continue
            decay = attention_change(arm, arm.baseline, results, "attention", -1)
            variance = attention_change(arm, arm.baseline, results, "variance", 1)
            if decay is None or variance is None:
                continue
            texts = [
                f"{word} {verdict(c.low, c.high, n)}" for word, (c, n) in (("decay", decay), ("variance", variance))
            ]
            both = f"decay {difference_text(decay, 2)}; variance {difference_text(variance, 2)}"
            found.append((f"{name}: {decay[0].value:.2f}%; {variance[0].value:.2f}%", both, "; ".join(texts)))
        return found

    return test


def _ratio_test(evaluations: Evaluations) -> Test:
    def test(arm: Arm) -> list[Tested]:
        assert arm.baseline is not None
        found = []
        for name, results in evaluations.items():
            if next(iter(results.values())).task not in (*RETRIEVAL_TASKS, "multi_document_qa", "key_value"):
                continue
            changes = [
                (other.ratio, change)
                for other in arm.rivals
                if results_of(other, results) and (change := compare(results, arm, other)) is not None
            ]
            if len(changes) < 2:
                continue
            worst: tuple[Difference, int] = min((change for _, change in changes), key=lambda change: change[0].low)
            texts = [f"against P = {ratio:g} {difference_text(change, 2)}" for ratio, change in changes]
            says = verdict(worst[0].low, worst[0].high, worst[1])
            found.append((name, "; ".join(texts), says))
        return found

    return test


def _emergence_test(arm: Arm) -> list[Tested]:
    assert arm.baseline is not None
    before, after = emergence(arm.baseline), emergence(arm)
    if not before or not after:
        return []
    ours = " to ".join(
        "/".join("never" if tokens is None else f"{tokens:,.0f}" for tokens in seeds.values())
        for seeds in (before, after)
    )
    change = emergence_difference(arm)
    late = [seed for seed, tokens in after.items() if tokens is None and before.get(seed) is not None]
    if late:
        word = "seed" if len(late) == 1 else "seeds"
        where = f"where the baseline did, this arm never reached half in {word} {', '.join(late)}"
        return [(f"probe: {ours} tokens", "", f"{NOT_SUPPORTED}: {where}")]
    if change is None:
        return [(f"probe: {ours} tokens", "", f"{NOT_TESTED}: a run never reached half, or no seed is in common")]
    # fewer is what the paper's direction is
    return [(f"probe: {ours} tokens", seed_text(change, 0), verdict(-change.high, -change.low, change.num_seeds))]


def _cost_test(arm: Arm) -> list[Tested]:
    found = ratios(arm, lambda run: run.tokens_per_second)
    if not found:
        return []
    change = seed_difference([100 * (ratio - 1) for ratio in found])
    says = verdict(change.low, change.high, change.num_seeds, SAME_SPEED)
    return [("tokens per second, in percent of the baseline's", seed_text(change, 1), says)]


def section(findings: Sequence[Finding]) -> list[Block]:
    """The table of claims with the rule of its verdicts."""
    return [
        Heading("The paper's claims"),
        Paragraph(
            f"Numbers of the paper are NTP to MEAP; those marked * were read in a summary of it. The arm is the one "
            f"with the paper's mask ratio (0.15, in fine-tuning 0.10). A claim is {SUPPORTED} if the 95% interval of "
            f"the difference to the baseline lies above 0 in the paper's direction, {NOT_SUPPORTED} if it includes 0 "
            f"or lies on the other side, {NOT_TESTED} if nothing of the kind was evaluated. On par means that the "
            f"interval lies above -{ON_PAR:g} points; no time, that that of tokens per second lies above "
            f"-{SAME_SPEED:g}%. P = 0.15 is the best if every interval of its differences to the other ratios lies "
            f"above 0. Intervals are not corrected for the number of claims."
        ),
        Table(
            ["claim", "study", "paper", "here, baseline to arm", "difference, 95%", "verdict"],
            [finding.row for finding in findings],
        ),
    ]
