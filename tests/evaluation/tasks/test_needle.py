"""Prompts word for word, scores by hand, and a reader that finds everything."""

import functools
import json
import random
import re
from pathlib import Path

import pytest

from meap_lit.errors import UserError
from meap_lit.evaluation.results import figures
from meap_lit.evaluation.tasks.needle import (
    BUILT_IN,
    MagicNumber,
    MultiNeedle,
    Needle,
    levenshtein,
    needlebench_score,
    string_match_all,
)
from meap_lit.tokenizer.tokenizer import Tokenizer
from tests.support.oracle import Oracle, run, shared_data, text_of

NEEDLES = str(Path(__file__).parents[3] / "data" / "eval" / "needles.jsonl")
GRID = {"lengths": (1000, 1200), "depths": (0.0, 21.0, 63.0, 100.0)}


@pytest.fixture(scope="module")
def tokenizer(prepared) -> Tokenizer:
    return Tokenizer.load(prepared.tokenizer)


# ------------------------------------------------------------------------------------------------------ scores


LEVENSHTEIN = [
    ("", "", 0),
    ("", "abc", 3),
    ("abc", "", 3),
    ("abc", "abc", 0),
    ("kitten", "sitting", 3),
    ("flaw", "lawn", 2),
    ("intention", "execution", 5),
    ("aéß", "aeß", 1),
]


@pytest.mark.parametrize(("first", "second", "distance"), LEVENSHTEIN)
def test_levenshtein(first, second, distance) -> None:
    assert levenshtein(first, second) == levenshtein(second, first) == distance


def test_levenshtein_is_what_its_definition_says() -> None:
    @functools.cache
    def distance(first: str, second: str) -> int:
        if not first or not second:
            return len(first) + len(second)
        changed = distance(first[1:], second[1:]) + (first[0] != second[0])
        return min(distance(first[1:], second) + 1, distance(first, second[1:]) + 1, changed)

    rng = random.Random(0)
    for _ in range(100):
        first, second = ("".join(rng.choices("abc", k=rng.randrange(9))) for _ in range(2))
        assert levenshtein(first, second) == distance(first, second)


# needle "ab cd", keyword "cd": the reference deletes white space before it compares
NEEDLEBENCH = [
    (" it is cd.", 100.0, 100.0),
    ("c d", 0.0, 10.0),  # "cd" against "abcd": 2 of 4
    ("", 0.0, 0.0),
    (" \n ", 0.0, 0.0),
    ("a b\nc", 0.0, 15.0),  # "abc" against "abcd": 1 of 4
    ("xx abXd", 0.0, 10.0),  # "xxabXd": two to delete, one to replace, of 6
    ("CD", 0.0, 0.0),
    ("ab c d", 0.0, 20.0),
]


@pytest.mark.parametrize(("answer", "keyword", "needlebench"), NEEDLEBENCH)
def test_scores_of_a_needle(answer, keyword, needlebench) -> None:
    task = Needle(lengths=(100,), depths=(0.0,))
    scores = task.score({"model_answer": answer, "needle": "ab cd", "arg2": "cd"})
    assert scores == {"keyword": keyword, "needlebench": pytest.approx(needlebench)}


def test_line_breaks_around_the_needle_do_not_count() -> None:
    assert needlebench_score("a b", "\nab cd\n", "cd") == needlebench_score("a b", "ab cd", "cd") == pytest.approx(10)


MULTI = [
    ("first red, then blue and green", 100.0, 100.0),
    ("blue, red", 200 / 3, 0.0),
    ("Green", 0.0, 0.0),
    ("", 0.0, 0.0),
]


@pytest.mark.parametrize(("answer", "keyword", "all_found"), MULTI)
def test_scores_of_several_needles(answer, keyword, all_found) -> None:
    scores = MultiNeedle(lengths=(300,), depths=(0.0,)).score(
        {"model_answer": answer, "arg2": ["red", "blue", "green"]}
    )
    assert scores == {"keyword": pytest.approx(keyword), "all_found": all_found}


MATCHES = [
    (" 1234567.", ["1234567"], 100.0),
    ("1234568", ["1234567"], 0.0),
    ("12345 67", ["1234567"], 0.0),
    ("ABC and def", ["abc", "DEF", "ghi"], 200 / 3),
    ("", ["1234567"], 0.0),
]


@pytest.mark.parametrize(("prediction", "outputs", "score"), MATCHES)
def test_string_match_all(prediction, outputs, score) -> None:
    assert string_match_all(prediction, outputs) == pytest.approx(score)


# ----------------------------------------------------------------------------------------------------- prompts


def test_prompt_of_the_built_in_needle(tokenizer, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("The old market. " * 40)
    options = {"lengths": (700,), "depths": (0.0,), "haystack": str(tmp_path)}
    (item,) = Needle(**options).items(Oracle(tokenizer))
    introduction = (
        "You are an intelligent AI assistant skilled in answering user questions.\n"
        "Please keep your answers concise and clear. Do not talk about irrelevant topics or repeat your answers.\n"
        "The document given to you by the user is "
    )
    needle = "\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.\n"
    question = (
        "\n\nNow, the question is: What is the best thing to do in San Francisco? Before answering, please consider "
        "what in the document is most relevant to this question. "
    )
    prompt = text_of(Oracle(tokenizer), item.input_ids)
    assert prompt.startswith(introduction + needle + "The old market. ")
    assert prompt.endswith(question + "The best thing to do in San Francisco is")
    assert item.fields["arg2"] == "eat a sandwich and sit in Dolores Park on a sunny day"

    (item,) = Needle(**options, prompt_style="chat", template="alpaca").items(Oracle(tokenizer))
    ending = question + "Please answer in the format 'The best thing to do in San Francisco is________.'"
    assert f"{ending}\n\n### Response:" in text_of(Oracle(tokenizer), item.input_ids)


def test_a_line_of_needles_jsonl(tokenizer, tmp_path) -> None:
    line = {
        "needle": "The best fruit of Oslo is the plum.",
        "arg1": "Oslo",
        "arg2": "the plum",
        "retrieval_question": "Which fruit? Please answer in the format 'The best fruit of Oslo is ________.'",
        "language": "English",
    }
    others = [{**line, "language": "Chinese", "retrieval_question": "?"}]
    file = tmp_path / "needles.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in [*others, line]))
    (item,) = Needle(lengths=(700,), depths=(0.0,), needles=str(file)).items(Oracle(tokenizer))
    assert item.fields["retrieval_question"] == line["retrieval_question"]
    assert (item.fields["needle"], item.fields["arg2"]) == (line["needle"], line["arg2"])
    assert text_of(Oracle(tokenizer), item.input_ids).endswith(" question. The best fruit of Oslo is")


def test_each_repeat_has_another_needle(tokenizer) -> None:
    items = Needle(lengths=(900,), depths=(50.0,), num_repeats=12, needles=NEEDLES).items(Oracle(tokenizer))
    assert len({item.fields["needle"] for item in items}) == 12
    other_seed = Needle(lengths=(900,), depths=(50.0,), num_repeats=2, needles=NEEDLES, seed=5).items(Oracle(tokenizer))
    assert [item.fields["needle"] for item in other_seed] != [item.fields["needle"] for item in items[:2]]


def test_prompt_of_several_needles(tokenizer) -> None:
    task = MultiNeedle(lengths=(1500,), depths=(20.0,), num_needles=2, needles=NEEDLES)
    (item,) = task.items(Oracle(tokenizer))
    first, second = (question.split("?")[0] + "?" for question in item.fields["retrieval_question"])
    stems = [needle.split(" is ")[0] + " is" for needle in item.fields["needle"]]
    ending = (
        f"\n\nNow, the questions are: {first} {second} Before answering, please consider what in the document is most "
        f"relevant to these questions. Please answer in the format '{stems[0]}________. {stems[1]}________.'"
    )
    assert text_of(Oracle(tokenizer), item.input_ids).endswith(f"{ending} {stems[0]}")
    chat = MultiNeedle(**{**vars(task), "prompt_style": "chat", "template": "alpaca"})
    (item,) = chat.items(Oracle(tokenizer))
    assert f"{ending}\n\n### Response:" in text_of(Oracle(tokenizer), item.input_ids)


def test_prompt_of_a_magic_number(tokenizer, tmp_path) -> None:
    model = Oracle(tokenizer)
    (item,) = MagicNumber(lengths=(700,), depths=(50.0,)).items(model)
    key, (value,) = item.fields["query"], item.fields["outputs"]
    assert re.fullmatch(r"[1-9]\d{6}", value)
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    before = (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n"
    )
    after = (
        f"\nWhat is the special magic number for {key} mentioned in the provided text? The special magic number for "
        f"{key} mentioned in the provided text is"
    )
    prompt = text_of(model, item.input_ids)
    assert prompt.startswith(before)
    assert prompt.endswith(after)
    lines = prompt.removeprefix(before).removesuffix(after).split("\n")
    assert lines.count(noise) == len(lines) - 1 > 1
    assert lines.count(f"One of the special magic numbers for {key} is: {value}.") == 1

    (tmp_path / "a.txt").write_text("the old market. a stone. " * 40)
    (item,) = MagicNumber(lengths=(700,), depths=(50.0,), haystack=str(tmp_path)).items(model)
    prompt = text_of(model, item.input_ids)
    assert re.search(rf"(market|stone)\. One of the special magic numbers for {key} is: {value}\. (the|a) ", prompt)
    assert prompt.endswith(after)


# ----------------------------------------------------------------------------------------------------- readers


def finish_sentence(prompt: str) -> str:
    """The rest of the sentence that the prompt begins last and has somewhere else."""
    document, question = prompt.split("\n\nNow, the question")
    stem = question.split("question. ")[1]
    (rest,) = re.findall(re.escape(stem) + r"(.+)\n", document)
    return rest


def finish_all_sentences(prompt: str) -> str:
    document, question = prompt.split("\n\nNow, the questions are")
    stems = re.findall(r"(The [^_?]+?)________\.", question)
    return ". ".join(re.findall(re.escape(stem) + r"(.+)\n", document)[0] for stem in stems)


def find_number(prompt: str) -> str:
    (key,) = set(re.findall(r"number for (\S+) mentioned", prompt))
    (number,) = re.findall(rf"numbers for {key} is: (\d+)", prompt)
    return f" {number}."


TASKS = [
    (Needle(**GRID, num_repeats=3, needles=NEEDLES), finish_sentence),
    (Needle(**GRID, boundary="token"), finish_sentence),
    (
        MultiNeedle(lengths=(1500, 2000), depths=(0.0, 63.0, 100.0), num_repeats=2, needles=NEEDLES),
        finish_all_sentences,
    ),
    (MagicNumber(**GRID, num_repeats=3), find_number),
]


@pytest.mark.parametrize(("task", "reader"), TASKS)
def test_a_reader_gets_everything_and_who_does_not_read_nothing(task, reader, tokenizer) -> None:
    rng = random.Random(0)
    first = run(task, Oracle(tokenizer, reader), "reads")
    second = run(task, Oracle(tokenizer, lambda prompt: str(rng.randrange(10**7))), "guesses")
    for metric in task.metrics:
        assert set(first.table(metric)) == {(length, depth) for length in task.lengths for depth in task.depths}
        assert {mean.value for mean in first.table(metric).values()} == {100}
        assert second.mean(metric).value < (0.5 if metric != "needlebench" else 5)
    drawn = figures([first, second])
    assert all(len(figure.axes) == 3 for figure in drawn.values()), "two maps and the scale"
    assert len(drawn) == (1 if len(task.metrics) == 1 else 2)


def test_mean_over_lengths_of_the_mean_over_depths_is_the_plain_mean(tokenizer) -> None:
    result = run(
        Needle(**GRID, num_repeats=2, needles=NEEDLES),
        Oracle(tokenizer, lambda prompt: finish_sentence(prompt)[: len(prompt) % 40]),
    )
    rows = [
        sum(result.table()[length, depth].value for depth in GRID["depths"]) / len(GRID["depths"])
        for length in GRID["lengths"]
    ]
    assert result.mean().value == pytest.approx(sum(rows) / len(rows))


def test_needles_among_essays_in_llama_2_tokens() -> None:
    model = Oracle(Tokenizer.load(shared_data("tokenizer-llama2")), finish_sentence)
    task = Needle(lengths=(1000, 2000), depths=(0.0, 52.0, 100.0), haystack=shared_data("haystack"))
    assert run(task, model).mean().value == 100
    for item in task.items(model):
        assert item.num_tokens == item.cell["length"]
        assert text_of(model, item.input_ids).count(BUILT_IN.needle) == 1


# ------------------------------------------------------------------------------------------------- wrong input

GOOD = {
    "needle": "a is b.",
    "arg2": "b",
    "retrieval_question": "What is a? Please answer in the format 'a is________.'",
}
LINES = [
    ({"needle": None}, "line 2: field 'needle' is not a string"),
    ({"needle": " "}, "line 2: field 'needle' is empty"),
    ({"arg2": ""}, "line 2: field 'arg2' is empty"),
    ({"arg2": ...}, "line 2: no field 'arg2', only"),
    (
        {"retrieval_question": "What is a?"},
        "line 2: field 'retrieval_question' must end in \"Please answer in the format",
    ),
]


@pytest.mark.parametrize(("change", "message"), LINES)
def test_wrong_needles(change, message, tmp_path) -> None:
    file = tmp_path / "needles.jsonl"
    bad = {name: value for name, value in {**GOOD, **change}.items() if value is not ...}
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(UserError, match=re.escape(f"needles.jsonl, {message}")):
        Needle(lengths=(100,), depths=(0.0,), needles=str(file)).prompts()


def test_no_needles(tmp_path) -> None:
    file = tmp_path / "needles.jsonl"
    with pytest.raises(UserError, match=r"needles\.jsonl does not exist"):
        Needle(lengths=(100,), depths=(0.0,), needles=str(file)).prompts()
    file.write_text(json.dumps({**GOOD, "language": "Chinese"}) + "\n")
    with pytest.raises(UserError, match=r"needles\.jsonl has no line whose language is English"):
        Needle(lengths=(100,), depths=(0.0,), needles=str(file)).prompts()
    file.write_text(2 * (json.dumps(GOOD) + "\n"))
    with pytest.raises(
        UserError, match=r"needles\.jsonl has 1 that differ in question and keyword, but num_needles is 2"
    ):
        MultiNeedle(lengths=(300,), depths=(0.0,), num_needles=2, needles=str(file)).prompts()
    with pytest.raises(UserError, match=r"needles \(built in\) has 1 .* num_needles is 3; name a file with more"):
        MultiNeedle(lengths=(300,), depths=(0.0,)).prompts()
    with pytest.raises(UserError, match="num_needles must be at least 1, got 0"):
        MultiNeedle(lengths=(300,), depths=(0.0,), num_needles=0)


def test_a_haystack_that_holds_the_needle(tokenizer, tmp_path) -> None:
    (tmp_path / "a.txt").write_text(f"Some say: {BUILT_IN.needle} ")
    with pytest.raises(UserError, match=r"needle 'The best thing to do in San Francisco .* must appear once"):
        Needle(lengths=(900,), depths=(50.0,), haystack=str(tmp_path)).items(Oracle(tokenizer))
