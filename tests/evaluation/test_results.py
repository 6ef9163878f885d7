import json

import numpy as np
import pytest

from meap_lit.errors import UserError
from meap_lit.evaluation.results import below_figure, load, save, task_classes
from meap_lit.evaluation.statistics import bootstrap
from meap_lit.evaluation.task import Plot, Result, paired_deltas
from meap_lit.evaluation.tasks.facts import FactRetrieval
from tests.support.toy_task import CountLetters


def test_deltas_of_items_that_both_have_by_group():
    first = [({"id": name, "group": group, "cell": {"x": x}}, 1.0) for name, group, x in (("a", "g", 0), ("b", "g", 1))]
    second = [({"id": name, "group": "g", "cell": {"x": x}}, 3.0) for name, x in (("a", 0), ("b", 1), ("c", 0))]
    one, other = (
        Result(CountLetters, "x", [{**record, "scores": {"right": score}} for record, score in scored])
        for scored in (first, second)
    )
    assert paired_deltas(one, other) == {"g": [2.0, 2.0]}
    assert paired_deltas(one, other, cell={"x": 1}) == {"g": [2.0]}


def written(class_path, task="facts", metric="accuracy"):
    items = [{"id": "a", "group": "a", "cell": {"length": 8, "depth": 0.5}, "scores": {metric: 100.0}}]
    about = {"task": {"class_path": class_path, "init_args": {"num_options": 4}}}
    result = {"label": "x", "scores": {metric: {}}, "items": items, "about": about}  # no "skipped": an older version
    return {"task": task, "unit": "%", "results": [result]}


@pytest.mark.parametrize("module", ["meap_lit.evaluation.tasks.facts", "meap_lit.evaluation.facts"])
def test_a_result_is_read_wherever_the_class_of_its_task_was(tmp_path, module):
    (tmp_path / "result.json").write_text(json.dumps(written(f"{module}.FactRetrieval")))
    (result,) = load(tmp_path / "result.json")
    assert (result.task, result.path) == (FactRetrieval, tmp_path / "result.json")
    assert (result.options["num_options"], result.num_skipped) == (4, 0)
    assert result.along("depth")[0.5].value == result.table()[(8, 0.5)].value == result.mean().value == 100


def test_the_result_of_a_task_that_is_not_at_hand(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(written("my.Riddles", "riddles", "solved")))
    (result,) = load(tmp_path / "result.json")
    assert (result.task.name, result.headline, result.metrics) == ("riddles", "solved", ["solved"])
    assert result.unit_of("solved") == "%"


def test_what_is_saved_is_read_again(tmp_path):
    records = [{"id": "a", "group": "a", "cell": {"x": 1}, "count": 1, "word": "a", "scores": {"right": 0.0}}]
    saved = Result(CountLetters(), "x", records, 2, {"task": {"class_path": "tests.CountLetters"}})
    save([saved, saved], tmp_path)
    first, second = load(tmp_path / "result.json")
    assert first.records == second.records == records
    assert first.num_skipped == 2


def test_a_figure_has_the_differences_of_what_it_draws():
    def result(**scores):
        return Result(CountLetters(), "x", [{"id": "a", "cell": {"word": "a"}, "scores": scores}])

    pair = [result(right=0.0, near=20.0), result(right=100.0, near=50.0)]
    near = Plot("near", "word", lines={"": "near"}, caption="How near.")
    assert below_figure(near, pair) == ["near, difference: +30.00 (no interval)", "How near."]
    assert below_figure(near, pair[:1]) == ["How near."]
    assert below_figure(Plot("headline", "word"), pair) == ["right, difference: +100.00 (no interval)"]
    both = Plot("both", "word", lines={"a": "near", "b": "right"})
    assert [line.partition(",")[0] for line in below_figure(both, pair)] == ["near", "right"]
    assert below_figure(Plot("other", "word", lines={"": lambda records: {"a": 1.0}}), pair) == []


def test_a_file_that_is_no_result(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(UserError, match=r"result.json is not a result of evaluate \(KeyError\('results'\)\)"):
        load(tmp_path / "result.json")


def test_tasks_of_the_package_are_known_by_name():
    assert {"needle", "multi_needle", "attention", "attention_segments", "facts"} < set(task_classes())
    assert len(set(task_classes().values())) == len(task_classes()) == 13


def test_without_differences_there_is_no_mean():
    assert bootstrap([]).n == bootstrap([{}]).n == 0


def test_seeds_count_alike_whatever_their_items():
    change = bootstrap([{str(number): [2.0] for number in range(50)}, {"0": [4.0]}])
    assert (change.value, change.n) == (3.0, 51)
    # two of two seeds are the same one in half of the draws, and a quarter of them each
    assert (change.low, change.high) == (2.0, 4.0)


def test_interval_has_the_spread_of_seeds_and_of_items():
    generator = np.random.default_rng(1)
    items = [generator.normal(shift, 3.0, size=200) for shift in np.linspace(-2, 2, 8)]
    change = bootstrap([{str(number): [delta] for number, delta in enumerate(seed)} for seed in items])
    means = np.array([seed.mean() for seed in items])
    variance = means.var() / 8 + sum(seed.var() / 200 for seed in items) / 64
    assert change.value == pytest.approx(means.mean())
    assert (change.high - change.low) / 2 == pytest.approx(1.96 * np.sqrt(variance), rel=0.05)


def test_what_a_question_does_in_every_seed_is_one_observation():
    deltas = {str(number): [delta] for number, delta in enumerate(np.random.default_rng(1).normal(0.0, 3.0, size=100))}
    one, three = bootstrap([deltas]), bootstrap([deltas] * 3)
    assert three.num_seeds == 3
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.05)
