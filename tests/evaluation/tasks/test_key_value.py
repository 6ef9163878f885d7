import json
import random
import re
import uuid
from pathlib import Path

import pytest

from meap_lit.errors import UserError
from meap_lit.evaluation.results import figures
from meap_lit.evaluation.task import Result
from meap_lit.evaluation.tasks.key_value import KeyValueRetrieval, quarter_ends
from meap_lit.inference.language_model import LanguageModel
from tests.support.reader import Reader, ask, write_rows

FOLDER = Path(__file__).parents[3].parent / "shared" / "data" / "kv_retrieval_data"

PAIRS = [["k1", "v1"], ["k2", "V2"], ["k3", "v3"], ["k4", "v4"]]
GOOD = {"ordered_kv_records": PAIRS, "key": "k2", "value": "V2"}


def parse(prompt: str) -> tuple[dict, str]:
    """The JSON object of a prompt and the key that is asked for."""
    data, key = re.search(r"JSON data:\n(\{.*\})\n\nKey: \"(.*)\"\nCorresponding value:$", prompt, re.DOTALL).groups()
    return json.loads(data), key


def looked_up(prompt: str) -> str:
    data, key = parse(prompt)
    return f' "{data[key].upper()}"'


# ------------------------------------------------------------------------------------------------------ prompts


def test_prompts_word_for_word(tmp_path):
    task = KeyValueRetrieval(file=write_rows(tmp_path / "a.jsonl", [GOOD]), gold=(0, 3))
    prompts, records = ask(task)
    assert prompts == [
        "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
        '{"k2": "V2",\n "k1": "v1",\n "k3": "v3",\n "k4": "v4"}\n\nKey: "k2"\nCorresponding value:',
        "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
        '{"k1": "v1",\n "k3": "v3",\n "k4": "v4",\n "k2": "V2"}\n\nKey: "k2"\nCorresponding value:',
    ]
    assert records[1] == {
        "id": "gold_at_3/0",
        "cell": {"pairs": 4, "gold": 3},
        "key": "k2",
        "value": "V2",
        "model_answer": "no idea",
        "scores": {"accuracy": 0.0},
    }
    item = task.items(Reader(str))[0]
    assert item.num_tokens == len(item.input_ids) + 100


def test_made_up_sets():
    task = KeyValueRetrieval(num_pairs=6, gold=(0, 2, 5), num_sets=8)
    prompts, records = ask(task)
    keys = set()
    for prompt, record in zip(prompts, records, strict=True):
        data, key = parse(prompt)
        assert len(data) == 6
        assert list(data).index(key) == record["cell"]["gold"]
        assert data[key] == record["value"]
        assert all(uuid.UUID(text).version == 4 for pair in data.items() for text in pair)
        keys |= set(data)
    assert len(prompts) == 24
    assert len(keys) == 6 * 8
    # the other pairs keep their order
    of_first = [list(parse(p)[0]) for p, r in zip(prompts, records, strict=True) if r["id"].endswith("/0")]
    assert len(of_first) == 3
    assert len({tuple(key for key in order if key != records[0]["key"]) for order in of_first}) == 1


def test_made_up_sets_follow_the_seed():
    def prompts(**options):
        return ask(KeyValueRetrieval(num_pairs=4, gold=(1,), **options))[0]

    assert prompts(num_sets=3) == prompts(num_sets=5)[:3]
    assert not set(prompts(num_sets=3)) & set(prompts(num_sets=3, seed=1))


@pytest.mark.parametrize(
    ("num_pairs", "positions"),
    [(140, [0, 34, 69, 104, 139]), (300, [0, 74, 149, 224, 299]), (50, [0, 11, 24, 36, 49]), (4, [0, 1, 2, 3])],
)
def test_positions_if_none_is_given(num_pairs, positions):
    assert quarter_ends(num_pairs) == positions  # those of 140 pairs are the benchmark's


def test_positions_of_small_sets():
    assert {record["cell"]["gold"] for record in ask(KeyValueRetrieval(num_pairs=2, num_sets=1))[1]} == {0, 1}
    assert quarter_ends(3) == [0, 1, 2]


def test_only_the_first_sets_of_a_file(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [GOOD, {**GOOD, "key": "k4", "value": "v4"}, {}])
    _, records = ask(KeyValueRetrieval(file=file, gold=(0,), num_sets=2))
    assert [record["key"] for record in records] == ["k2", "k4"]


# ------------------------------------------------------------------------------------------------------ scoring


@pytest.mark.parametrize(
    ("answer", "value", "score"),
    [
        ("V2", "V2", 100.0),
        ('no\nbut then "v2"', "V2", 100.0),  # case is ignored and nothing is cut
        ("v 2", "V2", 0.0),
        ("v", "V2", 0.0),
        ("", "V2", 0.0),
        ("anything", "", 100.0),
    ],
)
def test_score(answer, value, score):
    task = KeyValueRetrieval(num_pairs=2)
    assert task.score({"value": value, "model_answer": answer}) == {"accuracy": score}


def test_readers():
    task = KeyValueRetrieval(num_pairs=10, gold=(0, 4, 9), num_sets=60)
    rng = random.Random(0)

    def accuracy(answer):
        return [mean.value for mean in Result(task, "x", ask(task, Reader(answer))[1]).along("gold").values()]

    assert accuracy(looked_up) == [100, 100, 100]
    assert accuracy(lambda prompt: list(parse(prompt)[0].values())[4]) == [0, 100, 0]
    # one in ten; 180 draws have a standard error of 2.2
    assert 3 < sum(accuracy(lambda prompt: rng.choice(list(parse(prompt)[0].values())))) / 3 < 17


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no real data: {FOLDER} does not exist")
def test_real_data():
    file = str(FOLDER / "kv-retrieval-75_keys.jsonl.gz")
    task = KeyValueRetrieval(file=file, gold=(0, 24, 49, 74), num_sets=12)
    prompts, records = ask(task, Reader(looked_up))
    assert len(records) == 48
    assert all(record["scores"] == {"accuracy": 100.0} for record in records)
    for prompt, record in zip(prompts, records, strict=True):
        data, key = parse(prompt)
        assert list(data).index(key) == record["cell"]["gold"]
        assert len(data) == record["cell"]["pairs"] == 75


def test_figure():
    task = KeyValueRetrieval(num_pairs=4, num_sets=2, gold=(3, 0))
    answers = {"NTP": lambda prompt: next(iter(parse(prompt)[0].values())), "MEAP": looked_up}
    pair = [Result(task, label, ask(task, Reader(answer))[1]) for label, answer in answers.items()]
    (axes,) = figures(pair)["key_value"].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {"NTP": [[0, 100], [3, 0]], "MEAP": [[0, 100], [3, 100]]}
    assert axes.get_title() == "Key-value retrieval: pairs 4"
    assert sorted(axes.get_xticks()) == [0, 3]


def test_a_real_model(source_folder):
    task = KeyValueRetrieval(num_pairs=2, num_sets=1, max_new_tokens=4)
    model = LanguageModel(str(source_folder))
    items = task.items(model)
    assert all(item.num_tokens <= model.config.max_seq_len for item in items)
    answers = task.answer(model, items)
    assert [set(answer) for answer in answers] == [{"model_answer"}] * 2


# -------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"either file or num_pairs must be given, got neither"),
        ({"file": "a.jsonl", "num_pairs": 5}, r"either file or num_pairs must be given, got a\.jsonl and 5"),
        ({"num_pairs": 1}, r"num_pairs must be at least 2, got 1"),
        ({"num_pairs": 5, "num_sets": 0}, r"num_sets must be at least 1, got 0"),
        ({"num_pairs": 5, "gold": ()}, r"gold must name at least one value and each once, got \[\]"),
        ({"num_pairs": 5, "gold": (1, 1)}, r"gold must name at least one value and each once, got \[1, 1\]"),
        ({"num_pairs": 5, "gold": (-1,)}, r"gold must be at least 0, got -1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        KeyValueRetrieval(**options)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"key": "k2", "value": "V2"}, r"a\.jsonl, line 2: no field 'ordered_kv_records', only 'key', 'value'"),
        ({**GOOD, "key": 2}, r"line 2: field 'key' is not a string but int"),
        ({"ordered_kv_records": PAIRS, "key": "k2"}, r"line 2: no field 'value', only 'ordered_kv_records', 'key'"),
        ({**GOOD, "ordered_kv_records": {}}, r"line 2: field 'ordered_kv_records' must be a list, got dict"),
        (
            {**GOOD, "ordered_kv_records": [*PAIRS, ["k"]]},
            r"line 2: 'ordered_kv_records\[4\]' must be a pair of strings",
        ),
        ({**GOOD, "ordered_kv_records": [*PAIRS, ["k", 1]]}, r"'ordered_kv_records\[4\]' must be a pair of strings"),
        ({**GOOD, "ordered_kv_records": PAIRS + PAIRS[:1]}, r"line 2: a key appears twice in 'ordered_kv_records'"),
        ({**GOOD, "value": "v1"}, r"line 2: 'key' and 'value' must be a pair of 'ordered_kv_records'"),
        (
            {**GOOD, "ordered_kv_records": PAIRS[:3]},
            r"gold position 3 is outside .*a\.jsonl, line 2; .* 3 pairs is at 2",
        ),
    ],
)
def test_a_wrong_row_is_named(tmp_path, bad, message):
    file = write_rows(tmp_path / "a.jsonl", [GOOD, bad])
    with pytest.raises(UserError, match=message):
        KeyValueRetrieval(file=file, gold=(3,)).items(Reader(str))


def test_a_position_outside_sets_that_are_made_up():
    with pytest.raises(
        UserError, match=r"gold position 5 is outside a set of 5 pairs; the last of its 5 pairs is at 4"
    ):
        KeyValueRetrieval(num_pairs=5, gold=(0, 5)).items(Reader(str))
