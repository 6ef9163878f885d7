import json

import pytest

from meap_lit.report import tasks
from meap_lit.report.arms import find_studies
from meap_lit.report.blocks import Heading, Paragraph, Picture, Table
from meap_lit.report.evaluations import find_evaluations
from meap_lit.report.runs import find_runs
from tests.support.toy_study import recipe, write_result, write_run


def study_with(tmp_path, ratios, scores, **result):
    """The study of arms with these ratios, each with one seed and the items that `scores` makes of the ratio."""
    for ratio in ratios:
        run = write_run(tmp_path / f"runs/p{ratio}", recipe(f"p{ratio}", 1, ratio))
        write_result(tmp_path / f"out/task/p{ratio}", run, scores(ratio), **result)
    runs = find_runs([str(tmp_path / "runs")])
    return find_studies(runs)[0], find_evaluations([str(tmp_path / "out")], runs)[0]


def tables(blocks):
    return [block for block in blocks if isinstance(block, Table)]


def cells(**keys):
    return tuple(keys.items())


def test_curves_over_the_position(tmp_path):
    def scores(ratio):
        return {(f"{gold}", None, cells(pairs=5, gold=gold)): 100 * ratio * gold for gold in (0, 2, 4)}

    study, evaluations = study_with(tmp_path, (0, 0.1), scores)
    blocks = list(tasks.task_sections(study, evaluations))
    overall, by_gold = tables(blocks)
    assert overall.rows[0] == ["accuracy (%)", "p0", "0.00", "1: 0.00", ""]
    assert overall.rows[1][:4] == ["accuracy (%)", "p0.1", "20.00", "1: 20.00"]
    assert overall.rows[1][4].startswith("+20.00 [")
    assert overall.rows[1][4].endswith("(one seed: over items only)")
    assert by_gold.rows[2] == ["4", "0.00", "40.00 (+40.00 (one seed, no interval))"]
    (picture,) = (block for block in blocks if isinstance(block, Picture))
    (axes,) = picture.figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines if not line.get_label().startswith("_")}
    assert lines == {"p0": [0, 0, 0], "p0.1": [0, 20, 40]}
    assert axes.get_xlabel() == "position of the pair, from 0"


def test_heat_maps_over_length_and_depth(tmp_path):
    def scores(ratio):
        places = [(length, depth) for length in (100, 200) for depth in (0.0, 50.0)]
        return {(f"{at}", None, cells(length=at[0], depth=at[1])): at[0] * ratio + at[1] for at in places}

    study, evaluations = study_with(tmp_path, (0, 0.1), scores, task="needle", metric="keyword")
    (picture,) = (block for block in tasks.task_sections(study, evaluations) if isinstance(block, Picture))
    first, second = picture.figure.axes[:2]
    assert [axes.get_title() for axes in (first, second)] == ["p0: 25.0%", "p0.1: 40.0%"]
    assert second.images[0].get_array().tolist() == [[10, 20], [60, 70]]


def test_bars_where_cells_are_names(tmp_path):
    study, evaluations = study_with(
        tmp_path,
        (0, 0.1),
        lambda ratio: {(name, None, cells(task=name)): 50.0 for name in ("boolq", "piqa")},
        task="commonsense",
    )
    (picture,) = (block for block in tasks.task_sections(study, evaluations) if isinstance(block, Picture))
    assert [bar.get_height() for bar in picture.figure.axes[0].patches] == [50] * 4


def test_ablation_and_variants(tmp_path):
    write_run(tmp_path / "runs/odd", recipe("odd", 1, 0.15, model__init_args__mask_scope="batch"), (2.0,))
    study, evaluations = study_with(tmp_path, (0, 0.1, 0.15), lambda ratio: {"a": 100 * ratio})
    blocks = list(tasks.ablation_section(study, evaluations))
    (table,) = tables(blocks)
    assert table.header == ["P", "arm", "clean validation loss", "probe, %", "task"]
    assert [row[0] for row in table.rows] == ["0", "0.1", "0.15"]
    assert [row[4].partition(" ")[0] for row in table.rows] == ["0.00", "10.00", "15.00"]
    scores, _ = (block.figure.axes[0] for block in blocks if isinstance(block, Picture))
    assert list(scores.lines[0].get_ydata()) == pytest.approx([0, 10, 15])
    (variants,) = tables(tasks.variants_section(study, evaluations, 0.15))
    assert variants.rows == [["odd", "mask_scope batch", "2.0000 (+1.0000 (one seed, no interval))", ""]]


def test_results_from_before_the_end_of_a_run_are_named(tmp_path):
    study, evaluations = study_with(tmp_path, (0, 0.1), lambda ratio: {"a": ratio})
    assert not any("last validation" in str(block) for block in tasks.task_sections(study, evaluations))
    study, evaluations = study_with(tmp_path / "early", (0, 0.1), lambda ratio: {"a": ratio}, tokens_seen=20 * 32)
    texts = [block.text for block in tasks.task_sections(study, evaluations) if isinstance(block, Paragraph)]
    (found,) = (text for text in texts if "last validation" in text)
    assert found.count("after 640 of 960 tokens") == 2


def test_attention_compares_clean_with_masked(tmp_path):
    def record(clean, masked):
        readings = {"clean": (clean, 1.0), "masked": (masked, 1.5)}
        return {name: {"attention": [[mean]], "variance": [[spread]]} for name, (mean, spread) in readings.items()}

    study, evaluations = study_with(tmp_path, (0, 0.15), lambda ratio: {"a": 1.0, "b": 1.0}, task="attention")
    by_ratio = {0: [record(0.4, 0.4), record(0.6, 0.6)], 0.15: [record(9.0, 0.2), record(9.0, 0.3)]}
    for ratio, records in by_ratio.items():
        file = tmp_path / f"out/task/p{ratio}/result.json"
        content = json.loads(file.read_text())
        for item, more in zip(content["results"][0]["items"], records, strict=True):
            item |= more
        file.write_text(json.dumps(content))
    evaluations, _ = find_evaluations([str(tmp_path / "out")], [run for arm in study.arms for run in arm.runs.values()])
    plain, masked = study.arms
    decay = tasks.attention_change(masked, plain, evaluations["task"], "attention", -1)
    # means 0.5 and 0.25
    assert (decay.value, decay.num_seeds) == (pytest.approx(50), 1)
    variance = tasks.attention_change(masked, plain, evaluations["task"], "variance", 1)
    assert variance.value == pytest.approx(50)
    blocks = list(tasks.task_sections(study, evaluations))
    assert [block.text for block in blocks if isinstance(block, Heading)] == ["task"]
    assert tables(blocks)[1].rows[2][:2] == ["p0.15", "decay"]
