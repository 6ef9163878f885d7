"""The study on a real model: its records are kept without texts, and its pages follow from them."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from meap_lit.errors import UserError
from meap_lit.evaluation.results import save
from meap_lit.evaluation.statistics import Difference
from meap_lit.evaluation.task import Result
from meap_lit.evaluation.tasks.multi_document_qa import MultiDocumentQA
from tests.support.reader import write_rows

FOLDER = Path(__file__).parents[2] / "docs" / "study"


def script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


records, questions = script("records"), script("questions")
ALPACA = records.SETTINGS["alpaca"]


def make_part(arm, seed, right, loss, items="0a1b"):
    """Write a run and its answers to four questions; `right` has the scores of each at two positions."""
    run = Path(f"runs/study_real_alpaca/{arm}/seed_{seed}")
    run.mkdir(parents=True)
    summary = {"first_step": 0, "last_step": 44, "seconds": 700.4, "device": "a processor", "threads": 1}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "curves.csv").write_text(
        f"step,name,value\n44,val/loss,{loss}\n44,train/masked_loss,0.5\n44,throughput/tokens_seen,180224\n"
    )
    records = [
        {
            "id": f"gold_at_{gold}/{number}",
            "group": str(number),
            "cell": {"documents": 5, "gold": gold},
            "question": "a text that is not ours",
            "model_answer": "two words\nand another line",
            "scores": {"best_subspan_em": 100.0 * score},
        }
        for gold, scores in enumerate(right)
        for number, score in enumerate(scores)
    ]
    result = Result(MultiDocumentQA, f"{arm}-seed_{seed}", records, about={"items": items})
    save([result], Path(f"evaluations/study_real_alpaca/qa_5/{arm}-seed_{seed}"))


@pytest.fixture
def parts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(records, "HERE", tmp_path)
    for seed in (11, 12, 13):
        make_part("plain", seed, [[1, 0, 0, 0], [0, 0, 0, 0]], 1.5)
        make_part("concat", seed, [[1, 1, 1, 1], [1, 1, 1, 0]], 1.4)
    records.collect(ALPACA)


def test_what_is_kept_has_no_text_and_gives_the_tables(parts):
    study = records.read(ALPACA)
    assert study.arms == ["concat", "plain"]
    kept = study.results["qa_5"]["plain", "11"].records
    assert all(record.keys() == {"id", "group", "cell", "scores", "words"} for record in kept)
    assert {record["words"] for record in kept} == {2}
    assert len(kept) == 8
    page = records.page(ALPACA)
    hypothesis, difference = r"\| H1 \| `concat` minus `plain` ", r"\+75\.0 \[\+\d+\.\d, \+\d+\.\d\]"
    assert re.search(rf"{hypothesis}\| {difference} \| \[\+75\.0, \+75\.0\] \| 3 \| above 0 \|", page)
    assert "| H2 | `concat` minus `copies` | not run |  |  |  |" in page
    assert "| H4 | held-out loss, `concat` minus `plain` | -0.1000 [-0.1000, -0.1000] |  | 3 | at most 0.02 |" in page
    assert "| plain | 11 | 44 | 180224 | 700 | 1.5000 | 0.500 | a processor, 1 thread |" in page
    assert "| 0 | 100.0 | 25.0 |\n| 1 | 75.0 | 0.0 |" in page


def test_parts_of_another_machine_are_added(parts):
    before = ALPACA.file(".jsonl.gz").read_bytes()
    records.collect(ALPACA)
    assert ALPACA.file(".jsonl.gz").read_bytes() == before
    for folder in ("runs", "evaluations"):
        Path(folder).rename(f"moved_{folder}")
    make_part("copies", 11, [[1, 1, 0, 0], [0, 0, 0, 0]], 1.45)
    records.collect(ALPACA)
    study = records.read(ALPACA)
    assert study.arms == ["concat", "copies", "plain"]
    assert study.difference("qa_5", "concat", "copies").num_seeds == 1


def test_results_of_other_items_are_not_compared(parts):
    make_part("copies", 11, [[1, 1, 0, 0], [0, 0, 0, 0]], 1.45, items="another")
    records.collect(ALPACA)
    with pytest.raises(UserError, match="the results of qa_5 are of different items"):
        records.read(ALPACA)


def test_answers_of_a_run_that_did_not_end_are_refused(parts):
    Path("runs/study_real_alpaca/plain/seed_11/summary.json").unlink()
    ALPACA.file(".csv").unlink()
    with pytest.raises(UserError, match="has answers of plain, seed 11, which has no run that ended"):
        records.collect(ALPACA)


@pytest.mark.parametrize(
    ("low", "high", "num_seeds", "expected"),
    [
        (0.1, 9.0, 3, "above 0"),
        (-1.0, 3.9, 3, "below 4 points"),
        (-9.0, -1.0, 3, "below 4 points"),
        (-1.0, 4.1, 3, "open"),
        (0.1, 9.0, 2, "incomplete: 2 of 3 seeds"),
    ],
)
def test_verdicts_are_those_of_the_plan(low, high, num_seeds, expected):
    assert records.verdict(Difference((low + high) / 2, low, high, 240, num_seeds), ALPACA) == expected
    plan = (FOLDER / "plan.md").read_text(encoding="utf-8")
    assert f"smallest difference of interest is {ALPACA.smallest:g} points" in plan


@pytest.mark.parametrize("setting", [one for one in records.SETTINGS.values() if one.file(".csv").exists()])
def test_a_committed_page_is_what_its_records_give(setting):
    committed = setting.file(".md").read_text(encoding="utf-8")
    assert committed == records.page(setting), f"run python docs/study/records.py {setting.name}"
    assert setting.file(".png").is_file()


def test_questions_to_train_on_have_their_passage_at_any_position(tmp_path):
    names = [f"N{number:02}" for number in range(30)]
    rows = [
        {
            "question": f"where is {name}",
            "answers": ["not in the passage", f"{name.lower()}x"],
            "ctxs": [{"title": name, "text": f"{name} is in town {name.lower()}x.", "hasanswer": True, "isgold": True}],
        }
        for name in names
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    places = set()
    for name, record in zip(names[5:], questions.conversations(rows, file, first=5, last=30), strict=True):
        titles = re.findall(r"Document \[\d\]\(Title: (\w+)\)", record["instruction"])
        assert len(titles) == questions.NUM_DOCUMENTS
        assert record["instruction"].endswith(f"Question: where is {name}\nAnswer:")
        place = titles.index(name)
        passage = f"Document [{place + 1}](Title: {name}) {name} is in town {name.lower()}x."
        assert passage in record["instruction"]
        assert record["output"] == f"{name.lower()}x\n{passage}"
        places.add(place)
    assert places == {0, 1, 2}
    again = {**rows[3], "question": "where again"}
    assert questions.unseen([*rows, again, rows[29]], num_rest=29) == [rows[29], rows[29]]


def test_the_results_of_facts_are_those_of_the_page():
    page = Path("docs/study/facts/facts.md").read_text()
    for text in (Path("README.md").read_text(), Path("docs/when-to-mask.md").read_text()):
        for number in ("73.8", "66.7", "55.6", "-7.1 [-11.0, -3.7]"):
            assert number in text, number
            assert number in page, number


def test_the_results_in_the_readme_are_those_of_the_page():
    readme = Path("README.md").read_text().partition("**A real model, fine-tuned.**")[2].partition("**Small models")[0]
    page = "".join(Path(f"docs/study/real/{setting}.md").read_text() for setting in ("alpaca", "questions"))
    shares = re.findall(r"\| (\d+\.\d)% \|", readme)
    intervals = re.findall(r"[+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\]", readme)
    assert (len(shares), len(intervals)) == (5, 6)
    for number in (*shares, *intervals):
        assert number in page, number
