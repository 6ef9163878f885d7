import json
from collections import Counter

import pytest

from meap_lit.cli import main
from meap_lit.errors import UserError
from meap_lit.evaluation.judging.judges import parse_verdict
from meap_lit.evaluation.results import extras, figures, save
from meap_lit.evaluation.runner import choose_items
from meap_lit.evaluation.task import Result
from meap_lit.evaluation.tasks.hallucination import Hallucination, until_stop

DOCUMENTS = [
    f"The {color} lantern hangs near {number} stones. It is {{old}}." for number, color in enumerate("abcdefgh")
]


class Characters:
    """A tokenizer of characters, as a model's."""

    def encode(self, text):
        return [ord(character) for character in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


class Oracle:
    """A model that gives the first sentence of the document, and goes on with another example."""

    checkpoint = "oracle"

    def __init__(self):
        self.config = type("Config", (), {"max_seq_len": 2000})

    def encode(self, text):
        return [1, *Characters().encode(text)]

    def continue_texts(self, prompts, *, max_new_tokens, stop_token_ids, is_done):
        assert max_new_tokens == 256
        documents = [Characters().decode(prompt[1:]).split("#Document#: ")[1] for prompt in prompts]
        return [f" {document.split('.')[0]}.\n\n#Document#: More.\n#Summary#: More." for document in documents]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "multi_news.jsonl"
    rows = [{"document": document, "summary": f"Lantern {n}."} for n, document in enumerate(DOCUMENTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_prompts(file):
    document = DOCUMENTS[0]
    items = {
        prompt: Hallucination(file=file, prompt=prompt).items(Oracle())[0] for prompt in ("one_sentence", "document")
    }
    assert Characters().decode(items["one_sentence"].input_ids[1:]) == (
        f"Generate a summary comprising of 1 sentence for the given article.\n\n#Article#: {document}\n#Summary#:"
    )
    assert Characters().decode(items["document"].input_ids[1:]) == (
        f"Generate a summary based on the information in the document.\n\n#Document#: {document}\n#Summary#:"
    )
    assert items["document"].num_tokens == len(items["document"].input_ids) + 256
    assert items["document"].cell == {"dataset": "multi_news"}
    assert items["document"].fields == {"document": document, "summary": "Lantern 0."}


def test_samples_are_drawn_once_for_all_models(file):
    drawn = [item.id for item in Hallucination(file=file, prompt="document", num_samples=5).items(Oracle())]
    assert drawn == [item.id for item in Hallucination(file=file, prompt="document", num_samples=5).items(Oracle())]
    assert len(set(drawn)) == 5
    assert drawn != ["0", "1", "2", "3", "4"]
    others = [
        [item.id for item in Hallucination(file=file, prompt="document", num_samples=5, seed=seed).items(Oracle())]
        for seed in range(200)
    ]
    counts = Counter(number for ids in others for number in ids)
    assert set(counts) == set("01234567")
    assert all(90 < count < 160 for count in counts.values())  # 125 expected
    assert len(Hallucination(file=file, prompt="document", num_samples=99).items(Oracle())) == 8


@pytest.mark.parametrize(
    ("text", "summary"),
    [
        (" A lantern.\n", "A lantern."),
        (" A lantern.#Document#: x", "A lantern."),
        (" A #Article#: lantern.#Document#: x", "A"),
        (" A lantern.#Document#: x #Article#: y", "A lantern."),
        ("#Article#:", ""),
        ("", ""),
        ("A #Document# stays: #Summary#: too", "A #Document# stays: #Summary#: too"),
    ],
)
def test_until_stop(text, summary):
    assert until_stop(text) == summary


@pytest.mark.parametrize(
    ("verdicts", "free", "undecided"),
    [
        ({"a": True}, 100, 0),
        ({"a": False}, 0, 0),
        ({"a": None}, 0, 100),  # undecided is not free
        ({"a": True, "b": False}, 50, 0),
        ({"a": True, "b": None}, 50, 50),
    ],
)
def test_score(verdicts, free, undecided):
    task = Hallucination(file="x", prompt="document")
    assert task.score({"verdicts": verdicts}) == {"free": free, "undecided": undecided}


def test_oracle_is_free_of_hallucination(file):
    task = Hallucination(file=file, prompt="document")
    items, _ = choose_items(task, Oracle(), "stop")
    answers = task.answer(Oracle(), items)
    records = [{"id": item.id, "cell": item.cell, **item.fields, **answer} for item, answer in zip(items, answers)]
    for record in records:
        record["scores"] = task.score(record)
    fresh = Result(task, "x", records)
    assert fresh.metrics == []
    assert task.extra(fresh) == {"not judged yet (python -m meap_lit judge)": 8}
    assert figures([fresh]) == {}
    for number, record in enumerate(records):
        said = f"Here. **Conclusion: {record['model_answer'] in record['document']}**"
        record["verdicts"] = {"mechanical": parse_verdict(said), "strict": [True, False, None, False][number % 4]}
        record["scores"] = task.score(record)
    result = Result(task, "x", records)
    assert result.mean().value == 62.5
    assert result.mean("undecided").value == 12.5
    found = task.extra(result)
    assert found["free by mechanical"] == 100
    assert found["free by strict"] == 25
    assert found["mechanical and strict equal"] == 25
    assert found["mechanical and strict kappa"] == 0
    assert list(figures([result])) == ["judges"]
    assert extras([result, fresh])["free by strict (x)"] == 25


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"document": "x"}', r"xsum.jsonl, line 2: no field 'summary', only 'document'"),
        ('{"summary": "x"}', r"xsum.jsonl, line 2: no field 'document', only 'summary'"),
        ('{"document": "x", "summary": 3}', "xsum.jsonl, line 2: .*summary"),
        ("[1]", "xsum.jsonl, line 2"),
        ("{", "xsum.jsonl, line 2"),
    ],
)
def test_wrong_lines(tmp_path, line, message):
    file = tmp_path / "xsum.jsonl"
    file.write_text('{"document": "a", "summary": "b"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        Hallucination(file=str(file), prompt="document").items(Oracle())


def test_wrong_options(file):
    with pytest.raises(UserError, match=r"data file no/xsum.jsonl does not exist"):
        Hallucination(file="no/xsum.jsonl", prompt="document").items(Oracle())
    with pytest.raises(UserError, match="num_samples must be at least 1, got 0"):
        Hallucination(file=file, prompt="document", num_samples=0).items(Oracle())


@pytest.mark.parametrize("dataset", ["xsum", "multi_news", "wikisum"])
def test_recipes(source_folder, tmp_path, capsys, dataset):
    words = ["evaluate", "--config", f"recipes/eval/hallucination_{dataset}.yaml", "--checkpoint", str(source_folder)]
    words += ["--label", "x", "--output", str(tmp_path), "--device", "cpu", "--task.init_args.max_new_tokens", "4"]
    file = tmp_path / "small.jsonl"
    file.write_text(json.dumps({"document": "the old river", "summary": "a river"}) + "\n")
    assert main([*words, "--task.init_args.file", str(file)]) == 0
    (record,) = map(json.loads, (tmp_path / dataset / "x" / "predictions.jsonl").read_text().splitlines())
    assert record["document"] == "the old river"
    assert "model_answer" in record
    assert "not judged yet" in capsys.readouterr().out


def test_results_of_other_judges_do_not_compare(file, tmp_path):
    def result(label, **verdicts):
        records = [{"id": "0", "cell": {"dataset": "x"}, "verdicts": verdicts}]
        scored = [{**record, "scores": Hallucination.score(None, record)} for record in records]
        return Result(Hallucination(file=file, prompt="document"), label, scored)

    both, one, fresh = result("ntp", a=True, b=False), result("meap", a=True), result("new")
    Hallucination.check_pair(both, both)
    Hallucination.check_pair(both, fresh)
    for pair in ([both, one], [one, both]):
        with pytest.raises(UserError, match="judge b has judged ntp but not meap, so their scores do not compare; run"):
            save(pair, tmp_path / "pair")
    assert not (tmp_path / "pair").exists()
