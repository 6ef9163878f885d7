"""Multi-needle reasoning: places by a step-by-step insertion, scores by hand, and a reader that knows the questions."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from meap_lit.errors import UserError
from meap_lit.evaluation.results import figures
from meap_lit.evaluation.tasks.reasoning import Reasoning, word_recall
from meap_lit.tokenizer.tokenizer import Tokenizer
from tests.support.oracle import Oracle, run, text_of

FILE = Path(__file__).parents[3] / "data" / "eval" / "reasoning.json"
RECORDS = json.loads(FILE.read_text())


def reasoning(**changes) -> Reasoning:
    return Reasoning(**{"file": str(FILE), "lengths": (1500, 2000), "depths": (0.0, 50.0, 100.0), **changes})


@pytest.fixture(scope="module")
def tokenizer(prepared) -> Tokenizer:
    return Tokenizer.load(prepared.tokenizer)


RECALLS = [
    ("The answer is Hugo Norrby.", "Hugo Norrby", 100.0),
    ("hugo", "Hugo Norrby", 50.0),
    ("Norrby-Hugosson", "Hugo Norrby", 100.0),  # within other words
    ("", "Hugo Norrby", 0.0),
    ("the tide", "The Clockmaker's Tide", 200 / 3),
    ("tide", "tide after tide", 200 / 3),  # a repeated word counts each time
    ("whatever", "", 0.0),
    ("1996", "1996, May", 0.0),  # punctuation stays
]


@pytest.mark.parametrize(("prediction", "answer", "recall"), RECALLS)
def test_word_recall(prediction, answer, recall) -> None:
    assert word_recall(prediction, answer) == pytest.approx(recall)
    assert reasoning().score({"model_answer": prediction, "answer": answer}) == {"word_recall": pytest.approx(recall)}


def inserted(num_tokens: int, depth: int, needle_lengths: list[int]) -> list[str]:
    """The reference's own way: points among all tokens, each the one before plus twice its length plus a tenth."""
    tokens = ["h"] * num_tokens
    point = 0
    for number, length in enumerate(needle_lengths):
        if number == 0:
            point = int(num_tokens * depth / 100)
        else:
            point = int(point + 2 * needle_lengths[number - 1] + num_tokens * 10 / 100)
        tokens[point:point] = [str(number)] * length  # a point past the end appends
    return tokens


@pytest.mark.parametrize("num_tokens", [1000, 257, 40])
@pytest.mark.parametrize("depth", [0, 5, 21, 73, 94, 100])
def test_needles_stand_where_the_reference_puts_them(num_tokens, depth) -> None:
    needle_lengths = [13, 8, 21, 5]
    indices = reasoning().indices(num_tokens, depth, needle_lengths)
    tokens = ["h"] * num_tokens
    for number in reversed(range(4)):
        tokens[indices[number] : indices[number]] = [str(number)] * needle_lengths[number]
    assert tokens == inserted(num_tokens, depth, needle_lengths)


def test_places_by_hand() -> None:
    assert reasoning().indices(1000, 20, [30, 40, 50]) == [200, 330, 470]


def test_prompt(tokenizer) -> None:
    model = Oracle(tokenizer)
    (item,) = reasoning(num_needles=(3,), lengths=(1500,), depths=(10.0,)).items(model)
    prompt = text_of(model, item.input_ids)
    assert item.num_tokens == len(item.input_ids) + 128 == 1500
    assert prompt.endswith(
        f"\n\nNow, the question is: {item.fields['question']}Before answering, please consider what in the document is "
        f"most relevant to this question."
    )
    sentences = item.fields["derivations"]
    places = [prompt.index(f"\n{sentence}\n") for sentence in sentences]
    assert places == sorted(places)
    assert len(places) == 3
    context = prompt.split("the user is ")[1].split("\n\nNow,")[0]
    assert set(re.split(r"\W+", re.sub("|".join(map(re.escape, sentences)), "", context))) >= {"grass", "yellow"}


def test_records_are_drawn_by_number_of_sentences(tokenizer) -> None:
    task = reasoning(num_repeats=10, lengths=(1500,), depths=(0.0,))
    items = task.items(Oracle(tokenizer))
    assert len({item.id for item in items}) == len(items) == 40
    for item in items:
        assert len(item.fields["derivations"]) == item.cell["num_needles"]
        assert {"derivation_count": item.cell["num_needles"], **pick(item.fields)} in RECORDS
    drawn = Counter(item.fields["question"] for item in items)
    assert len(drawn) > 20
    again = reasoning(num_repeats=10, lengths=(1500,), depths=(0.0,)).items(Oracle(tokenizer))
    assert [item.input_ids for item in again] == [item.input_ids for item in items]


def pick(fields):
    return {name: fields[name] for name in ("derivations", "question", "answer")}


def test_a_reader_gets_everything_and_a_stranger_nothing(tokenizer) -> None:
    def knows(prompt: str) -> str:
        (record,) = (record for record in RECORDS if f"is: {record['question']}Before" in prompt)
        assert all(prompt.count(f"\n{sentence}\n") == 1 for sentence in record["derivations"])
        return f" {record['answer'].upper()}."

    task = reasoning(num_repeats=2)
    first, second = (
        run(task, Oracle(tokenizer, knows), "knows"),
        run(task, Oracle(tokenizer, lambda prompt: "?"), "not"),
    )
    assert {mean.value for mean in first.table().values()} == {100}
    assert len(first.table()) == 4 * 2 * 3
    assert {mean.value for mean in second.table().values()} == {0}
    assert {name: mean.value for name, mean in first.along("length").items()} == {1500: 100, 2000: 100}
    heights = {
        name: [list(line.get_ydata()) for line in figure.axes[0].lines]
        for name, figure in figures([first, second]).items()
    }
    assert heights == {"reasoning_by_length": [[100] * 2, [0] * 2], "reasoning_by_num_needles": [[100] * 4, [0] * 4]}


def test_our_records_can_be_answered_from_their_sentences_alone() -> None:
    assert Counter(record["derivation_count"] for record in RECORDS) == {2: 10, 3: 10, 4: 10, 5: 10}
    assert len({record["question"] for record in RECORDS}) == len(RECORDS)
    for record in RECORDS:
        assert len(set(record["derivations"])) == record["derivation_count"]
        assert record["answer"] in record["derivations"][-1]
        assert record["answer"] not in record["question"]
        assert not any(record["answer"] in sentence for sentence in record["derivations"][:-1])


GOOD = {"derivation_count": 2, "derivations": ["a is b.", "b is c."], "question": "What is a?", "answer": "c"}
WRONG = [
    ({"derivation_count": "2"}, "element 2: field 'derivation_count' must be an integer, got str"),
    ({"derivation_count": ...}, "element 2: no field 'derivation_count', only 'derivations', 'question', 'answer'"),
    ({"derivations": "a is b."}, "element 2: field 'derivations' must be a list, got str"),
    ({"derivations": []}, "element 2: field 'derivations' is empty"),
    ({"derivations": ["a", " "]}, "element 2: field 'derivations[1]' is empty"),
    ({"question": None}, "element 2: field 'question' is not a string but NoneType"),
    ({"answer": ...}, "element 2: no field 'answer', only"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_records(change, message, tmp_path) -> None:
    file = tmp_path / "mrs.json"
    bad = {name: value for name, value in {**GOOD, **change}.items() if value is not ...}
    file.write_text(json.dumps([GOOD, bad]))
    with pytest.raises(UserError, match=re.escape(f"mrs.json, {message}")):
        reasoning(file=str(file)).prompts()


def test_wrong_options(tmp_path) -> None:
    file = tmp_path / "mrs.jsonl"
    file.write_text(json.dumps(GOOD) + "\n")
    with pytest.raises(
        UserError, match=r"num_needles 3: .*mrs.jsonl has no question with that derivation_count, only 2$"
    ):
        reasoning(file=str(file), num_needles=(2, 3)).prompts()
    for values in ((), (2, 2)):
        with pytest.raises(UserError, match="num_needles must name at least one value and each once, got"):
            reasoning(num_needles=values)
    with pytest.raises(UserError, match=r"missing\.json does not exist"):
        reasoning(file=str(tmp_path / "missing.json")).prompts()
