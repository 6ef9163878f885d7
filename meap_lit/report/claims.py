"""Claims that a study tests, read from a file of the study, each with its verdict."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from meap_lit.errors import UserError, in_one_line
from meap_lit.evaluation.attention.masked import STATISTICS
from meap_lit.evaluation.statistics import Difference, t_interval
from meap_lit.report.arms import Arm, Study, describe
from meap_lit.report.blocks import Block, Heading, Paragraph, Table
from meap_lit.report.evaluations import Evaluations
from meap_lit.report.measures import Results, Score, in_words
from meap_lit.report.runs import Kind
from meap_lit.report.tasks import attention_change
from meap_lit.report.training import emergence, emergence_difference, ratios

CLAIMS_FILE = "recipes/study/claims.yaml"
SUPPORTED = "supported"
NOT_SUPPORTED = "not supported"
NOT_TESTED = "not tested at this scale"
_ENOUGH_SEEDS = 5
"""A convention: with fewer, the bootstrap interval of a score may cover far less than 95%. In a simulation with 30
items, whose standard deviation was 0.3 of that of the seeds, it covered 54% (two seeds), 78% (three) and 85% (five)."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim about the arm with the mask ratio of the paper.

    Args:
        claim: Text of the claim.
        kind: Kind of training that it is about.
        paper: Numbers of the paper.
        test: Name of the test, one of `TESTS`.
        tasks: Names of the tasks that test it.
        metric: Score of these tasks; the headline by default.
        margin: Amount by which the arm may be worse than the baseline.
    """

    claim: str
    kind: Kind
    paper: str
    test: str
    tasks: Sequence[str] = ()
    metric: str | None = None
    margin: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Claims:
    """Content of a file of claims; `CLAIMS_FILE` explains its keys."""

    claims: Sequence[Claim]
    scale: str
    rule: str
    mask_ratios: Mapping[Kind, float]
    notes: Sequence[Mapping[str, Any]] = field(default_factory=list)

    def note(self, task: str, options: Mapping[str, Any]) -> str:
        """Return the note on results of a task, in brackets, or an empty text."""
        about = {**options, "task": task}
        fitting = [note for note in self.notes if all(about.get(key) == note[key] for key in note if key != "note")]
        return f" ({fitting[-1]['note']})" if fitting else ""


class Finding(NamedTuple):
    """A row of the table of claims."""

    claim: str
    study: str
    paper: str
    ours: str
    difference: str
    verdict: str


def read(path: str | None) -> Claims:
    """Read a file of claims, by default `CLAIMS_FILE` if it exists.

    Raises:
        UserError: If the file is missing or not a file of claims.
    """
    file = Path(path or CLAIMS_FILE)
    if path is None and not file.is_file():
        return Claims(claims=(), scale="", rule="", mask_ratios={})
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        claims = [Claim(**claim) for claim in content.pop("claims")]
        found = Claims(claims=claims, **content)
    except OSError as error:
        raise UserError(f"cannot read --claims {file}: {error.strerror}; name a file such as {CLAIMS_FILE}") from error
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"--claims {file} is not a file of claims ({in_one_line(error)}); compare it with {CLAIMS_FILE}"
        ) from error
    wrong = next((claim.test for claim in claims if claim.test not in TESTS), None)
    if wrong is not None:
        raise UserError(f"--claims {file} has no test {wrong}; choose one of {', '.join(TESTS)}")
    return found


def find(claims: Claims, studies: Sequence[Study], evaluations: Evaluations) -> list[Finding]:
    """Test every claim in every study of its kind."""
    findings = []
    for claim in claims.claims:
        found = [
            Finding(claim.claim, study.title, claim.paper, ours + _other_differences(arm), difference, said)
            for study in studies
            if study.kind == claim.kind and (arm := study.at_ratio(claims.mask_ratios.get(claim.kind))) is not None
            for ours, difference, said in TESTS[claim.test](Case(claims, claim, study, arm, evaluations))
        ]
        findings += found or [Finding(claim.claim, "", claim.paper, "", "", NOT_TESTED)]
    return findings


def _other_differences(arm: Arm) -> str:
    """Return a note on the options of an arm that differ from its baseline, apart from those of masks and copies."""
    values = arm.differs_from(arm.baseline or arm)
    about_masks = (arm.ratio_key, "data.duplication", "model.span_len", "model.mask_", "model.protect")
    others = {key: value for key, value in values.items() if not key.startswith(about_masks)}
    return f" (also differs in {describe(others)})" if others else ""


def count(findings: Sequence[Finding]) -> dict[str, int]:
    """Return how many findings have each verdict."""
    words = (NOT_TESTED, NOT_SUPPORTED, SUPPORTED)  # "not supported" holds "supported"
    found = Counter(next(word for word in words if word in finding.verdict) for finding in findings)
    return {word: found[word] for word in reversed(words)}


def verdict(change: Difference, margin: float = 0.0) -> str:
    """Return what the interval of a change says about a claim that it is above 0, or at most `margin` below."""
    bound = f"-{margin:g}" if margin else "0"
    if math.isnan(change.low):
        return f"{NOT_TESTED}: one observation has no interval"
    includes_bound = change.low <= -margin <= change.high
    if change.low > -margin:
        text = SUPPORTED
    elif includes_bound:
        text = f"{NOT_SUPPORTED}: the interval includes {bound}"
    else:
        text = f"{NOT_SUPPORTED}: the interval is below {bound}, on the other side"
    if change.num_seeds == 1:
        return f"{text} (one seed: says nothing about other seeds)"
    is_bootstrap = change.n > change.num_seeds  # over items too; the t interval is as wide as few seeds need
    if is_bootstrap and not includes_bound and change.num_seeds < _ENOUGH_SEEDS:
        return f"{text} ({change.num_seeds} seeds: a bootstrap interval covers less than 95%)"
    return text


@dataclass(frozen=True)
class Case:
    """A claim in a study, with the arm that it is about; the arm has a baseline."""

    claims: Claims
    claim: Claim
    study: Study
    arm: Arm
    evaluations: Evaluations

    @property
    def baseline(self) -> Arm:
        assert self.arm.baseline is not None
        return self.arm.baseline

    def results(self) -> Iterator[tuple[str, Results]]:
        """Yield the evaluations by tasks of the claim."""
        for name, results in self.evaluations.items():
            if next(iter(results.values())).task.name in self.claim.tasks:
                yield name, results


Tested = tuple[str, str, str]
"""Values of baseline and arm, difference, verdict."""


def _score(case: Case) -> Iterator[Tested]:
    for name, results in case.results():
        score = Score(results, case.claim.metric)
        change = score.change(case.arm, case.baseline)
        if change is not None:
            note = case.claims.note(score.result.task.name, score.result.options)
            values = [score.by_seed(arm) for arm in (case.baseline, case.arm)]
            seeds = [seed for seed in values[0] if seed in values[1]]
            before, after = (score.format(statistics.mean(value[seed] for seed in seeds)) for value in values)
            yield (
                f"{name}{note}: {before} to {after}",
                in_words(change, score.digits),
                verdict(_improvement(change, score), case.claim.margin),
            )


def _improvement(change: Difference, score: Score) -> Difference:
    """Return the change with its sign flipped if lower values of the headline metric are better."""
    is_headline = score.metric in (None, score.result.headline)
    if score.result.task.higher_is_better or not is_headline:
        return change
    return change._replace(value=-change.value, low=-change.high, high=-change.low)


def _attention(case: Case) -> Iterator[Tested]:
    for name, results in case.results():
        decay, variance = (
            attention_change(case.arm, case.baseline, results, statistic, sign) for statistic, _, sign in STATISTICS
        )
        if decay is not None and variance is not None:
            yield (
                f"{name}: {decay.value:.2f}%; {variance.value:.2f}%",
                f"decay {in_words(decay, 2)}; variance {in_words(variance, 2)}",
                f"decay {verdict(decay)}; variance {verdict(variance)}",
            )


def _mask_ratio(case: Case) -> Iterator[Tested]:
    for name, results in case.results():
        score = Score(results)
        found = [(other, score.change(case.arm, other)) for other in case.study.rivals(case.arm)]
        changes = [(other, change) for other, change in found if change is not None]
        if len(changes) > 1:
            worst = min((_improvement(change, score) for _, change in changes), key=lambda change: change.low)
            texts = [f"against P = {other.ratio:g} {in_words(change, 2)}" for other, change in changes]
            yield name, "; ".join(texts), verdict(worst)


def _emergence(case: Case) -> Iterator[Tested]:
    before, after = emergence(case.baseline), emergence(case.arm)
    if not before or not after:
        return
    ours = " to ".join(
        "/".join("never" if tokens is None else f"{tokens:,.0f}" for tokens in seeds.values())
        for seeds in (before, after)
    )
    ours = f"probe: {ours} tokens"
    change = emergence_difference(case.arm)
    late = [seed for seed, tokens in after.items() if tokens is None and before.get(seed) is not None]
    if late:
        seeds = f"seed{'s' if len(late) > 1 else ''} {', '.join(late)}"
        yield ours, "", f"{NOT_SUPPORTED}: this arm never reached half in {seeds}, where the baseline did"
    elif change is None:
        yield ours, "", f"{NOT_TESTED}: a run never reached half, or no seed is in common"
    else:  # the claim is that tokens are fewer
        yield ours, in_words(change, 0), verdict(change._replace(low=-change.high, high=-change.low))


def _speed(case: Case) -> Iterator[Tested]:
    found = [100 * (ratio - 1) for ratio in ratios(case.arm, lambda run: run.tokens_per_second)]
    if found:
        change = t_interval(found)
        ours = "tokens per second, in percent of the baseline's"
        yield ours, in_words(change, 1), verdict(change, case.claim.margin)


TESTS: Mapping[str, Callable[[Case], Iterator[Tested]]] = {
    "score": _score,
    "attention": _attention,
    "mask_ratio": _mask_ratio,
    "emergence": _emergence,
    "speed": _speed,
}


def section(claims: Claims, findings: Sequence[Finding]) -> list[Block]:
    """Return the table of claims with the rule of its verdicts; nothing without claims."""
    if not findings:
        return []
    header = ["claim", "study", "paper", "here, baseline to arm", "difference, 95%", "verdict"]
    return [Heading("The paper's claims"), Paragraph(claims.rule), Table(header, findings)]
