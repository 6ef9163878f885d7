import dataclasses

import pytest

from meap_lit.report import training
from meap_lit.report.arms import find_studies
from meap_lit.report.blocks import Paragraph, Table
from meap_lit.report.measures import Logged
from meap_lit.report.runs import LOSS, find_runs
from tests.support.toy_study import recipe, write_run


@pytest.fixture
def study(tmp_path):
    write_run(tmp_path / "a1", recipe("ntp", 1, 0), (3, 2.5, 1.0), (0.2, 0.49, 0.5))
    write_run(tmp_path / "a2", recipe("ntp", 2, 0), (3, 2.5, 2.0), (0.2, 0.3, 0.4))
    write_run(
        tmp_path / "b1",
        recipe("meap", 1, 0.15),
        (3, 2.5, 0.5),
        (0.7, 0.4, 0.6),
        summary={"seconds": 30.0, "first_step": 0},
    )
    write_run(
        tmp_path / "b2",
        recipe("meap", 2, 0.15),
        (3, 2.5, 2.5),
        (0.2, 0.6, 0.7),
        summary={"seconds": 40.0, "first_step": 0},
    )
    return find_studies(find_runs([str(tmp_path)]))[0]


def rows(blocks):
    (table,) = (block for block in blocks if isinstance(block, Table))
    return {row[0]: row[1:] for row in table.rows}


def test_loss(study):
    table = rows(training.loss_section(study))
    assert table["ntp"] == ["1.5000", "1: 1.0000, 2: 2.0000", ""]
    # deltas -0.5 and 0.5: standard error 0.5, quantile 12.7062
    assert table["meap"] == ["1.5000", "1: 0.5000, 2: 2.5000", "+0.0000 [-6.3531, +6.3531]"]
    assert training.mean_lines(training.seed_lines(study, Logged(LOSS)))["ntp"] == {320: 3, 640: 2.5, 960: 1.5}


def test_retrieval_emerges_at_the_first_validation_with_half(study):
    ntp, meap = study.arms
    assert training.emergence(ntp) == {"1": 960, "2": None}
    assert training.emergence(meap) == {"1": 320, "2": 640}
    assert training.emergence_difference(meap) is None  # a run of the baseline never did
    table = rows(training.emergence_section(study))
    assert table["ntp"] == ["1: 960, 2: never", "", "", "45.0"]
    assert table["meap"] == ["1: 320, 2: 640", "480", "no pair of seeds, or one that never did", "65.0"]


def test_cost(study):
    table = rows(training.cost_section(study))
    assert table["ntp"] == ["not recorded", "1,000", "not recorded"]
    assert table["meap"] == ["35", "1,000 (x 1.000)", "not recorded"]


def test_runs_without_probe_have_no_section_of_it(tmp_path):
    write_run(tmp_path / "a", recipe("ntp", 1, 0))
    (study,) = find_studies(find_runs([str(tmp_path)]))
    assert training.emergence_section(study) == []


def test_runs_that_had_not_ended_are_named(tmp_path):
    def warning(**options):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write_run(folder, recipe("ntp", 1, 0, budget=options.pop("budget")), **options)
        blocks = training.setup(find_studies(find_runs([str(folder)])), {})
        texts = [block.text for block in blocks if isinstance(block, Paragraph) and "budget" in block.text]
        return folder.name in texts[0] if texts else False

    assert not warning(budget={"max_steps": 30})
    assert warning(budget={"max_steps": 31})
    assert warning(budget={"max_tokens": 31 * 32})
    assert warning(budget={"max_epochs": 2}), "killed: nothing says how many steps two epochs have"
    machine = {"devices": 1, "device": "cpu", "threads": 1, "platform": "Linux", "versions": {}}
    ended = {"seconds": 1.0, "first_step": 0, **machine}
    assert not warning(budget={"max_epochs": 2}, summary={**ended, "max_steps": 30})
    assert warning(budget={"max_epochs": 2}, summary={**ended, "max_steps": 31}), "ended by trainer.max_time"
    assert not warning(budget={"max_epochs": 2}, summary=ended), "of an older version"


def test_runs_without_their_beginning_are_named(tmp_path):
    write_run(tmp_path / "ntp", recipe("ntp", 1, 0))
    write_run(tmp_path / "rest", recipe("rest", 1, 0, ckpt_path="runs/lost/checkpoints/step=20.ckpt"), first_step=30)
    blocks = training.setup(find_studies(find_runs([str(tmp_path)])), {})
    (text,) = (block.text for block in blocks if isinstance(block, Paragraph) and "beginning" in block.text)
    assert text.endswith("none of them is a baseline: rest.")


def test_a_dataset_in_a_bucket_is_not_called_gone(tmp_path):
    run = write_run(tmp_path / "run", recipe("ntp", 1, 0))
    (run_of,) = find_runs([str(run)])
    there = {"s3://bucket/text": "0", str(tmp_path / "gone"): "1"}
    tables = [
        block for block in training._data([dataclasses.replace(run_of, datasets=there)]) if isinstance(block, Table)
    ]
    assert [row[3] for row in tables[0].rows] == ["remote, not read", "no longer there"]
