"""The study on a real model: its records are kept without texts, and its pages follow from them."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from meap_lit.evaluation.results import save
from meap_lit.evaluation.statistics import Difference
from meap_lit.evaluation.task import Result
from meap_lit.evaluation.tasks.multi_document_qa import MultiDocumentQA
from tests.support.reader import write_rows

FOLDER = Path(__file__).parents[2] / "docs" / "study"
SETTINGS = sorted(path.stem for path in (FOLDER / "real").glob("*.csv"))


def script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


real, questions = script("real"), script("questions")


def make_part(arm, seed, right, loss):
    """Write a run and its answers to four questions; `right` has the scores of each at two positions."""
    run = Path(f"runs/study_real_alpaca/{arm}/seed_{seed}")
    run.mkdir(parents=True)
    summary = {"last_step": 44, "tokens": 180224, "seconds": 700.4, "device": "a processor", "threads": 1}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "curves.csv").write_text(f"step,name,value\n44,val/loss,{loss}\n44,train/masked_loss,0.5\n")
    records = [
        {
            "id": f"gold_at_{gold}/{number}",
            "group": str(number),
            "cell": {"documents": 5, "gold": gold},
            "question": "a text that is not ours",
            "scores": {"best_subspan_em": 100.0 * score},
        }
        for gold, scores in enumerate(right)
        for number, score in enumerate(scores)
    ]
    result = Result(MultiDocumentQA, f"{arm}-seed_{seed}", records)
    save([result], Path(f"evaluations/study_real_alpaca/qa_5/{arm}-seed_{seed}"))


@pytest.fixture
def parts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(real, "FOLDER", tmp_path / "real")
    real.FOLDER.mkdir()
    for seed in (11, 12):
        make_part("plain", seed, [[1, 0, 0, 0], [0, 0, 0, 0]], 1.5)
        make_part("concat", seed, [[1, 1, 1, 1], [1, 1, 1, 0]], 1.4)
    real.collect("alpaca")


def test_what_is_kept_has_no_text_and_gives_the_tables(parts):
    study = real.read("alpaca")
    assert study.arms == ["concat", "plain"]
    kept = study.results["qa_5"]["plain", "11"].records
    assert all(record.keys() == {"id", "group", "cell", "scores"} for record in kept)
    assert len(kept) == 8
    page = real.page("alpaca")
    assert re.search(r"\| H1 \| `concat` minus `plain` \| \+75\.0 \[\+\d+\.\d, \+\d+\.\d\] \| 2 \| supported \|", page)
    assert "| H2 | `concat` minus `copies` | not run |  |  |" in page
    assert "| H4 | held-out loss, `concat` minus `plain` | -0.1000 [-0.1000, -0.1000] | 2 | supported |" in page
    assert "| plain | 11 | 44 | 180224 | 700 | 1.5000 | 0.500 | a processor, 1 thread |" in page
    assert "| 0 | 100.0 | 25.0 |\n| 1 | 75.0 | 0.0 |" in page


def test_parts_of_another_machine_are_added(parts):
    before = (real.FOLDER / "alpaca.jsonl.gz").read_bytes()
    real.collect("alpaca")
    assert (real.FOLDER / "alpaca.jsonl.gz").read_bytes() == before
    for folder in ("runs", "evaluations"):
        Path(folder).rename(f"moved_{folder}")
    make_part("copies", 11, [[1, 1, 0, 0], [0, 0, 0, 0]], 1.45)
    real.collect("alpaca")
    study = real.read("alpaca")
    assert study.arms == ["concat", "copies", "plain"]
    assert study.difference("qa_5", "concat", "copies").num_seeds == 1


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.1, 9.0, "supported"),
        (-1.0, 3.9, "refuted at this size"),
        (-1.0, 4.1, "open"),
        (-9.0, -1.0, "refuted at this size"),
    ],
)
def test_verdicts_are_those_of_the_plan(low, high, expected):
    assert real.verdict(Difference((low + high) / 2, low, high, 240, 3)) == expected
    plan = (FOLDER / "plan.md").read_text(encoding="utf-8")
    assert f"smallest difference of interest is {real.SMALLEST:g} points" in plan


def test_a_committed_page_is_what_its_records_give():
    assert SETTINGS
    for setting in SETTINGS:
        committed = (FOLDER / "real" / f"{setting}.md").read_text(encoding="utf-8")
        assert committed == real.page(setting), f"run python docs/study/real.py {setting}"
        assert (FOLDER / "real" / f"{setting}.png").is_file()


def test_questions_to_train_on_have_their_passage_at_any_position(tmp_path):
    names = [f"N{number:02}" for number in range(30)]
    passages = [
        {"title": name, "text": f"{name} is in town {name.lower()}x.", "hasanswer": True, "isgold": True}
        for name in names
    ]
    rows = [
        {"question": f"where is {name}", "answers": [f"{name.lower()}x"], "ctxs": [passage]}
        for name, passage in zip(names, passages, strict=True)
    ]
    records = questions.records(write_rows(tmp_path / "rows.jsonl", rows), num_questions=30, num_documents=3)
    places = set()
    for name, record in zip(names, records, strict=True):
        titles = re.findall(r"Document \[\d\]\(Title: (\w+)\)", record["instruction"])
        assert len(titles) == 3
        assert record["instruction"].endswith(f"Question: where is {name}\nAnswer:")
        assert record["output"] == f"{name.lower()}x"
        places.add(titles.index(name))
    assert places == {0, 1, 2}
