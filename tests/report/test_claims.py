import math

import pytest
import yaml

from meap_lit.errors import UserError
from meap_lit.evaluation.statistics import Difference
from meap_lit.report.arms import find_studies
from meap_lit.report.claims import CLAIMS_FILE, find, read, verdict
from meap_lit.report.evaluations import find_evaluations
from meap_lit.report.measures import Score
from meap_lit.report.runs import find_runs
from tests.support.toy_study import recipe, write_result, write_run

CLAIMS = read(CLAIMS_FILE)


@pytest.mark.parametrize(
    ("low", "high", "num_seeds", "margin", "says"),
    [
        (0.1, 2.0, 5, 0.0, "supported"),
        (0.1, 2.0, 3, 0.0, "supported (3 seeds: a bootstrap interval covers less than 95%)"),
        (0.0, 2.0, 3, 0.0, "not supported: the interval includes 0"),
        (-1.0, 2.0, 3, 0.0, "not supported: the interval includes 0"),
        (-2.0, -0.1, 3, 0.0, "not supported: the interval is below 0, on the other side"),
        (-0.9, 0.5, 2, 1.0, "supported"),
        (-1.5, 0.5, 2, 1.0, "not supported: the interval includes -1"),
        (-2.0, -1.5, 2, 1.0, "not supported: the interval is below -1, on the other side"),
        (0.1, 2.0, 1, 0.0, "supported (one seed: says nothing about other seeds)"),
        (math.nan, math.nan, 1, 0.0, "not tested at this scale: one observation has no interval"),
    ],
)
def test_verdicts(low, high, num_seeds, margin, says):
    num_items = 100 if "bootstrap" in says else num_seeds  # the t interval is over seeds alone
    assert verdict(Difference(0.0, low, high, num_items, num_seeds), margin) == says


def test_findings_of_a_study(tmp_path):
    for arm, ratio, accuracies in (("ntp", 0, (0.2, 0.4, 0.6)), ("meap", 0.15, (0.6, 0.7, 0.8))):
        for seed in (1, 2):
            run = write_run(tmp_path / f"runs/{arm}_{seed}", recipe(arm, seed, ratio), accuracies=accuracies)
            score = 100.0 if ratio else 0.0
            write_result(tmp_path / f"out/needle/{arm}_{seed}", run, {"a": score, "b": score}, task="needle")
    runs = find_runs([str(tmp_path / "runs")])
    evaluations, _ = find_evaluations([str(tmp_path / "out")], runs)
    found = {finding.claim: finding for finding in find(CLAIMS, find_studies(runs), evaluations)}
    needle = found["retrieval from context is better (needle in a haystack)"]
    assert needle.ours == "needle: 0.00 to 100.00"
    assert needle.difference == "+100.00 [+100.00, +100.00]"
    assert needle.verdict == "supported (2 seeds: a bootstrap interval covers less than 95%)"
    emergence = found["retrieval emerges after fewer tokens"]
    assert emergence.ours == "probe: 960/960 to 320/320 tokens"
    assert (emergence.difference, emergence.verdict) == ("-640 [-640, -640]", "supported")
    speed = found["masking costs no time in pretraining"]
    assert (speed.difference, speed.verdict) == ("+0.0 [+0.0, +0.0]", "supported")
    assert found["multi-document QA: better after fine-tuning"].verdict == "not tested at this scale"
    assert len(found) == len(CLAIMS.claims) == 12


def test_values_and_difference_are_of_the_same_seeds(tmp_path):
    for arm, ratio, scores in (("ntp", 0, (50.0, 50.0, 80.0)), ("meap", 0.15, (52.0, 52.0))):
        for seed, score in enumerate(scores, start=1):
            run = write_run(tmp_path / f"runs/{arm}_{seed}", recipe(arm, seed, ratio))
            write_result(tmp_path / f"out/needle/{arm}_{seed}", run, {"a": score, "b": score}, task="needle")
    runs = find_runs([str(tmp_path / "runs")])
    evaluations, _ = find_evaluations([str(tmp_path / "out")], runs)
    (study,) = find_studies(runs)
    found = {finding.claim: finding for finding in find(CLAIMS, [study], evaluations)}
    needle = found["retrieval from context is better (needle in a haystack)"]
    assert (needle.ours, needle.difference) == ("needle: 50.00 to 52.00", "+2.00 [+2.00, +2.00]")
    baseline, arm = study.arms
    assert Score(evaluations["needle"]).text(arm, baseline) == "52.00 (+2.00 [+2.00, +2.00], without seed 3)"


def test_a_claim_is_about_the_arm_with_the_papers_ratio(tmp_path):
    for name, ratio in (("ntp", 0), ("meap", 0.3)):
        run = write_run(tmp_path / f"runs/{name}", recipe(name, 1, ratio))
        write_result(tmp_path / f"out/needle/{name}", run, {"a": 100.0 * ratio}, task="needle")
    runs = find_runs([str(tmp_path / "runs")])
    evaluations, _ = find_evaluations([str(tmp_path / "out")], runs)
    findings = find(CLAIMS, find_studies(runs), evaluations)
    assert {finding.verdict for finding in findings} == {"not tested at this scale"}


def test_a_loss_is_better_where_it_is_lower_and_other_differences_are_said(tmp_path):
    file = tmp_path / "claims.yaml"
    claim = {
        "claim": "c",
        "paper": "p",
        "kind": "pretraining",
        "test": "score",
        "tasks": ["perplexity"],
        "margin": 0.05,
    }
    content = {"claims": [claim], "scale": "", "rule": "", "mask_ratios": {"pretraining": 0.15}}
    file.write_text(yaml.safe_dump(content))
    said = []
    for loss in (3.55, 1.05):
        place = tmp_path / str(loss)
        for name, ratio, value in (("ntp", 0, 2.05), ("meap", 0.15, loss)):
            for seed in (1, 2):
                run = write_run(
                    place / f"runs/{name}_{seed}", recipe(name, seed, ratio, budget__max_steps=30 + 10 * (ratio > 0))
                )
                scores = {"a": value, "b": value}
                write_result(place / f"out/loss/{name}_{seed}", run, scores, task="perplexity", metric="nll")
        runs = find_runs([str(place / "runs")])
        evaluations, _ = find_evaluations([str(place / "out")], runs)
        (finding,) = find(read(str(file)), find_studies(runs), evaluations)
        assert finding.ours.endswith(" (also differs in budget.max_steps 40)")
        said.append(finding.verdict)
    few = "(2 seeds: a bootstrap interval covers less than 95%)"
    assert said == [f"not supported: the interval is below -0.05, on the other side {few}", f"supported {few}"]


def test_retrieval_that_never_emerges_where_that_of_the_baseline_does_is_a_verdict(tmp_path):
    accuracies = {("ntp", 1): (0.2, 0.6), ("meap", 1): (0.2, 0.3), ("ntp", 2): (0.2, 0.6), ("meap", 2): (0.6, 0.7)}
    for (arm, seed), values in accuracies.items():
        ratio = 0.15 if arm == "meap" else 0.0
        write_run(tmp_path / f"{arm}_{seed}", recipe(arm, seed, ratio), accuracies=values)
    found = {finding.claim: finding for finding in find(CLAIMS, find_studies(find_runs([str(tmp_path)])), {})}
    emergence = found["retrieval emerges after fewer tokens"]
    assert emergence.verdict == "not supported: this arm never reached half in seed 1, where the baseline did"


def test_without_claims_there_are_no_findings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find(read(None), [], {}) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read --claims {file}: No such file or directory; name a file such as recipes/study/claims.yaml"),
        ("claims: [", "--claims {file} is not a file of claims (while parsing"),
        ("- a\n", "--claims {file} is not a file of claims ("),
        ("claims: [{claim: a}]", "--claims {file} is not a file of claims (Claim.__init__() missing"),
        (
            "{scale: '', rule: '', mask_ratios: {}, claims: [{claim: a, kind: pretraining, paper: '', test: wish}]}",
            "--claims {file} has no test wish; choose one of score, attention, mask_ratio, emergence, speed",
        ),
    ],
)
def test_wrong_files_of_claims(tmp_path, content, message):
    file = tmp_path / "claims.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError) as error:
        read(str(file))
    assert str(error.value).startswith(message.format(file=file))
    assert "\n" not in str(error.value)


def test_a_note_is_shown_beside_a_task_or_an_option():
    assert CLAIMS.note("facts", {}) == " (stand-in: a made-up fact, chosen among a few)"
    assert CLAIMS.note("multi_document_qa", {"distractors": "synthetic"}) == " (synthetic distractors)"
    assert CLAIMS.note("multi_document_qa", {"distractors": "retrieved"}) == ""
