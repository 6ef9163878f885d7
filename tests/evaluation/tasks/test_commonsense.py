"""Scores of multiple-choice questions from their records; tests that need the harness itself are in test_harness.py."""

import sys

import pytest

from meap_lit.errors import UserError
from meap_lit.evaluation.results import extras, figures
from meap_lit.evaluation.task import Result
from meap_lit.evaluation.tasks.commonsense import Commonsense

TASK = Commonsense(tasks=("piqa", "boolq"))


def record(task, log_likelihoods, gold, choices=None, is_cut=False):
    return {
        "id": f"{task}-{log_likelihoods}",
        "cell": {"task": task},
        "log_likelihoods": log_likelihoods,
        "gold": gold,
        "choices": choices or ["no", "yes"],
        "has_acc_norm": choices is not None,
        "is_cut": is_cut,
    }


@pytest.mark.parametrize(
    ("log_likelihoods", "choices", "gold", "accuracy", "acc"),
    [
        ([-4.0, -6.0], ["ab", "abcd"], [1], 100, 0),  # -2 and -1.5 a character
        ([-4.0, -6.0], ["ab", "abcd"], [0], 0, 100),
        ([-6.0, -6.0, -7.0], ["ab", "ab", "ab"], [0], 100, 100),  # the first of a tie
        ([-6.0, -6.0, -7.0], ["ab", "ab", "ab"], [1], 0, 0),
        ([-6.0, -6.0, -7.0], ["ab", "ab", "ab"], [1, 0], 100, 100),  # either is right
        ([-4.0, -5.0], ["日本", "日本国"], [1], 100, 0),  # characters, not bytes
        ([-1.0, -9.0], ["", "a"], [1], 100, 0),  # nothing has no mean
        ([-4.0, -6.0], None, [0], 100, 100),  # a task without acc_norm
        ([-6.0, -4.0], None, [0], 0, 0),
    ],
)
def test_score(log_likelihoods, choices, gold, accuracy, acc):
    scores = {"accuracy": accuracy, "acc": acc} | ({} if choices is None else {"acc_norm": accuracy})
    assert TASK.score(record("piqa", log_likelihoods, gold, choices)) == scores


def test_tasks_count_alike():
    records = [record("piqa", [-1.0, -2.0], [0], ["a", "b"])] + [record("boolq", [-n, -1.0], [0]) for n in (2, 3, 4)]
    records[2]["is_cut"] = True
    for each in records:
        each["scores"] = TASK.score(each)
    result = Result(TASK, "x", records)
    assert result.mean().value == 25
    assert TASK.extra(result) == {
        "accuracy, mean of tasks": 50,
        "acc, mean of tasks": 50,
        "acc_norm, mean of tasks": 100,
        "questions that lost their beginning": 1,
    }
    assert {task: mean.value for task, mean in result.along("task", "acc").items()} == {"piqa": 100, "boolq": 0}
    both = extras([result, Result(TASK, "y", records[1:2])])
    assert both["accuracy, mean of tasks (x)"] == 50
    assert both["accuracy, mean of tasks (y)"] == 0
    assert list(figures([result])) == ["tasks"]


def test_missing_package(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("lm_eval", "meap_lit.evaluation.harness"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'meap-lit\[harness\]'"):
        TASK.items(None)
