import json
from contextlib import nullcontext

import pytest

from meap_lit.errors import UserError
from meap_lit.evaluation.statistics import bootstrap
from meap_lit.report.arms import find_studies
from meap_lit.report.evaluations import check_items, find_evaluations
from meap_lit.report.measures import Score
from meap_lit.report.runs import find_runs
from meap_lit.report.tasks import task_sections
from tests.support.toy_study import recipe, write_result, write_run


@pytest.fixture
def two_arms(tmp_path):
    """Folders of the runs of two arms with two seeds each, by name."""
    return {
        f"{arm}_{seed}": write_run(tmp_path / f"runs/{arm}_{seed}/version_0", recipe(arm, seed, ratio))
        for arm, ratio in (("ntp", 0), ("meap", 0.15))
        for seed in (1, 2)
    }


def test_difference_of_two_seeds(two_arms, tmp_path):
    first, second = (("gold", 0),), (("gold", 1),)
    ntp = {("a", "q", first): 0.0, ("b", "q", second): 0.0, ("c", None, first): 100.0}
    better = dict.fromkeys(ntp, 100.0)
    out = tmp_path / "evaluations/kv"
    for seed in (1, 2):
        write_result(out / f"ntp_{seed}", two_arms[f"ntp_{seed}"], ntp)
    write_result(out / "meap_1", two_arms["meap_1"], better)
    write_result(out / "meap_2", two_arms["meap_2"], ntp)
    runs = find_runs([str(tmp_path / "runs")])
    found, num_others = find_evaluations([str(tmp_path / "evaluations")], runs)
    assert num_others == 0
    baseline, arm = find_studies(runs)[0].arms
    change = Score(found["kv"]).change(arm, baseline)
    assert change.num_seeds == 2
    assert change.value == pytest.approx((200 / 3 + 0) / 2)
    assert change[:3] == bootstrap([{"q": [100.0, 100.0], "c": [0.0]}, {"q": [0.0, 0.0], "c": [0.0]}])[:3]
    at_start = Score(found["kv"], cell={"gold": 0}).change(arm, baseline)
    assert at_start.value == pytest.approx((50 + 0) / 2)
    assert Score(found["kv"], "other").change(arm, baseline) is None
    assert Score(found["kv"], cell={"gold": 0}).by_seed(arm) == {"1": 100, "2": 50}
    assert Score(found["kv"], cell={"gold": 1}).by_seed(arm) == {"1": 100, "2": 0}
    assert Score(found["kv"], cell={"gold": 0}).by_seed(baseline) == {"1": 50, "2": 50}


def test_newest_checkpoint_counts_and_others_are_left_out(two_arms, tmp_path):
    out, run = tmp_path / "evaluations", two_arms["ntp_1"]
    write_result(out / "kv/old", run, {"a": 1.0}, step=20)
    newest = write_result(out / "kv/new", run, {"a": 2.0})
    write_result(out / "kv/older", run, {"a": 3.0}, step=10)
    write_result(out / "kv/stranger", tmp_path / "elsewhere", {"a": 4.0})
    pair = json.loads((newest / "result.json").read_text())
    pair["results"] *= 2
    (out / "kv/a--b").mkdir()
    (out / "kv/a--b/result.json").write_text(json.dumps(pair))
    runs = find_runs([str(tmp_path / "runs")])
    found, num_others = find_evaluations([str(out)], runs)
    assert [evaluation.path.parent for evaluation in found["kv"].values()] == [newest]
    assert num_others == 1


def test_runs_that_were_moved_are_known_by_their_names(two_arms, tmp_path):
    write_result(tmp_path / "evaluations/kv/x", tmp_path / "other/machine/runs/meap_1/version_0", {"a": 1.0})
    runs = find_runs([str(tmp_path / "runs")])
    found, num_others = find_evaluations([str(tmp_path / "evaluations")], runs)
    assert list(found["kv"]) == [two_arms["meap_1"]]
    assert num_others == 0


def test_other_items_do_not_compare(two_arms, tmp_path):
    out = tmp_path / "evaluations/kv"
    write_result(out / "a", two_arms["ntp_1"], {"a": 1.0})
    write_result(out / "b", two_arms["meap_1"], {"a": 1.0}, items="1" * 64)
    found, _ = find_evaluations([str(tmp_path / "evaluations")], find_runs([str(tmp_path / "runs")]))
    with pytest.raises(UserError, match=r"evaluation kv has other items in .*b/result.json than in .*a/result.json"):
        check_items(list(found["kv"].values()))


@pytest.mark.parametrize(
    ("option", "there", "message"),
    [
        ("max_new_tokens", 100, "task.max_new_tokens 100 in .*b/result.json and 5 in .*a/result.json"),
        ("dtype", "bfloat16", "dtype bfloat16 in .*b/result.json and float32 in"),
        ("path", "/mnt/data/nq.jsonl.gz", None),
        ("num_items", 500, None),
    ],
)
def test_answers_of_other_options_do_not_compare(two_arms, tmp_path, option, there, message):
    here = {"max_new_tokens": 5, "path": "data/nq.jsonl", "num_items": None, "dtype": "float32"}
    for label, run, options in (("a", "ntp_1", here), ("b", "meap_1", {**here, option: there})):
        folder = write_result(
            tmp_path / "evaluations/kv" / label, two_arms[run], {"a": 1.0}, dtype=options.pop("dtype")
        )
        content = json.loads((folder / "result.json").read_text())
        content["results"][0]["about"]["task"]["init_args"] = options
        (folder / "result.json").write_text(json.dumps(content))
    found, _ = find_evaluations([str(tmp_path / "evaluations")], find_runs([str(tmp_path / "runs")]))
    with pytest.raises(UserError, match=message) if message else nullcontext():
        check_items(list(found["kv"].values()))


def test_a_result_of_another_model_in_a_folder_of_the_same_names_is_not_of_a_run(two_arms, tmp_path):
    elsewhere = tmp_path / "other/machine/runs/meap_1/version_0"
    write_result(tmp_path / "evaluations/kv/x", elsewhere, {"a": 1.0}, model={"hidden_size": 4096})
    found, num_others = find_evaluations([str(tmp_path / "evaluations")], find_runs([str(tmp_path / "runs")]))
    assert not found
    assert num_others == 1


def test_a_run_that_another_began_with_keeps_its_results(two_arms, tmp_path):
    """One with masks resumed from step 20 of a plain run that went on."""
    checkpoint = two_arms["ntp_1"] / "checkpoints/step=20.ckpt"
    late = recipe("late", 1, 0.15, ckpt_path=str(checkpoint))
    branch = write_run(tmp_path / "runs/late_1/version_0", late, first_step=30)
    for name, run in (("plain", two_arms["ntp_1"]), ("late", branch)):
        write_result(tmp_path / f"evaluations/kv/{name}", run, {"a": 1.0 if name == "late" else 0.0})
    runs = find_runs([str(tmp_path / "runs")])
    found, _ = find_evaluations([str(tmp_path / "evaluations")], runs)
    assert {run: result.label for run, result in found["kv"].items()} == {two_arms["ntp_1"]: "plain", branch: "late"}
    write_result(tmp_path / "evaluations/kv/at_start", branch, {"a": 2.0}, checkpoint=str(checkpoint), tokens_seen=9**9)
    found, _ = find_evaluations([str(tmp_path / "evaluations")], runs)
    assert {run: result.label for run, result in found["kv"].items()}[branch] == "late", "the source's own"
    (study,) = find_studies(runs)
    assert {arm.name: list(arm.runs) for arm in study.arms} == {"ntp": ["1", "2"], "meap": ["1", "2"], "late": ["1"]}


def test_scores_of_other_judges_do_not_compare(two_arms, tmp_path):
    out = tmp_path / "evaluations/xsum"
    for name, judges in (("ntp_1", "ab"), ("meap_1", "ab"), ("ntp_2", "a"), ("meap_2", "ab")):
        folder = write_result(out / name, two_arms[name], {"0": 100.0}, task="hallucination", metric="free")
        content = json.loads((folder / "result.json").read_text())
        content["results"][0]["items"][0]["verdicts"] = dict.fromkeys(judges, True)
        (folder / "result.json").write_text(json.dumps(content))
    runs = find_runs([str(tmp_path / "runs")])
    found, _ = find_evaluations([str(tmp_path / "evaluations")], runs)
    (study,) = find_studies(runs)
    with pytest.raises(UserError, match=r"judge b has judged \S+/result.json but not \S+/ntp_2/result.json, so their"):
        list(task_sections(study, found))


def test_wrong_evaluations(two_arms, tmp_path):
    runs = find_runs([str(tmp_path / "runs")])
    with pytest.raises(UserError, match="missing is not a folder; name the one that evaluate wrote to"):
        find_evaluations([str(tmp_path / "missing")], runs)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(UserError, match=r"result.json is not a result of evaluate \(KeyError\('results'\)\)"):
        find_evaluations([str(tmp_path)], runs)
