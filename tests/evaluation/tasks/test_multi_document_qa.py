import random
import re
from pathlib import Path

import pytest

from meap_lit.errors import UserError
from meap_lit.evaluation.results import extras, figures
from meap_lit.evaluation.task import Result, difference
from meap_lit.evaluation.tasks.multi_document_qa import MultiDocumentQA, best_subspan_em, normalize_answer
from meap_lit.inference.language_model import LanguageModel
from tests.support.reader import Reader, ask, write_rows

ORACLE_FILE = Path(__file__).parents[3].parent / "shared" / "data" / "qa_data" / "nq-open-oracle.jsonl.gz"
needs_oracle_file = pytest.mark.skipif(not ORACLE_FILE.is_file(), reason=f"no real data: {ORACLE_FILE} does not exist")

PEOPLE = ("Anna", "Bruno", "Clara", "David", "Emil", "Frida")


def documents(prompt: str) -> list[tuple[int, str, str]]:
    """Number, title and text of each document of a prompt, without the question."""
    body = prompt.rpartition("\n\nQuestion: ")[0].partition("irrelevant).\n\n")[2]
    found = re.split(r"(?:^|\n)Document \[(\d+)\]\(Title: (.*?)\) ", body)[1:]
    return [(int(number), title, text) for number, title, text in zip(found[::3], found[1::3], found[2::3])]


def row(person: str, distractors=(), gold: int = 0, **changes) -> dict:
    """A row of the benchmark's data: where somebody lives, the gold passage at index `gold`."""
    passages = [
        {"id": "7", "title": f"{other}, page", "text": text, "hasanswer": False, "isgold": False, "score": "1.5"}
        for other, text in distractors
    ]
    text = f"{person} lives in {person.upper()}-town."
    passages.insert(gold, {"title": person, "text": text, "hasanswer": True, "isgold": True})
    question = f"where does {person} live"
    return {"question": question, "answers": [f"{person}-Town"], "ctxs": passages, **changes}


@pytest.fixture
def oracle_file(tmp_path) -> str:
    return write_rows(tmp_path / "oracle.jsonl", [row(person) for person in PEOPLE])


def retrieved(person: str, gold: int = 0) -> dict:
    return row(person, [("One", f"{person} one"), ("Two", "two\nlines"), ("Three", "three")], gold)


@pytest.fixture
def retrieved_file(tmp_path) -> str:
    return write_rows(tmp_path / "gold_at_0.jsonl", [retrieved(person) for person in PEOPLE])


# ------------------------------------------------------------------------------------------------------ prompts


def test_prompts_word_for_word(retrieved_file):
    task = MultiDocumentQA(file=retrieved_file, num_documents=3, gold=(1,), num_questions=1)
    prompts, records = ask(task)
    assert prompts == [
        "Write a high-quality answer for the given question using only the provided search results (some of which "
        "might be irrelevant).\n\n"
        "Document [1](Title: One, page) Anna one\n"
        "Document [2](Title: Anna) Anna lives in ANNA-town.\n"
        "Document [3](Title: Two, page) two\nlines\n\n"
        "Question: where does Anna live\nAnswer:",
        "Write a high-quality answer for the given question using only the provided search results (some of which "
        "might be irrelevant).\n\n"
        "Document [1](Title: Anna) Anna lives in ANNA-town.\n\n"
        "Question: where does Anna live\nAnswer:",
        "Question: where does Anna live\nAnswer:",
    ]
    assert [record["id"] for record in records] == ["gold_at_1/0", "oracle/0", "closed_book/0"]
    assert records[0] == {
        "id": "gold_at_1/0",
        "cell": {"documents": 3, "gold": 1},
        "question": "where does Anna live",
        "answers": ["Anna-Town"],
        "model_answer": "no idea",
        "scores": {"best_subspan_em": 0.0},
    }


def test_room_for_the_answer_is_counted(retrieved_file):
    item = MultiDocumentQA(file=retrieved_file, num_documents=2, gold=(0,)).items(Reader(str))[0]
    assert item.num_tokens == len(item.input_ids) + 100


def test_one_file_for_all_positions_gives_the_prompts_of_a_file_for_each(tmp_path, retrieved_file):
    for gold in (1, 3):
        write_rows(tmp_path / f"gold_at_{gold}.jsonl", [retrieved(person, gold) for person in PEOPLE])
    options = {"num_documents": 4, "gold": (0, 1, 3)}
    one = MultiDocumentQA(file=retrieved_file, **options)
    each = MultiDocumentQA(file=str(tmp_path / "gold_at_{gold}.jsonl"), **options)
    assert ask(one) == ask(each)


def test_fewer_documents_are_the_first_ones(retrieved_file):
    prompts, _ = ask(MultiDocumentQA(file=retrieved_file, num_documents=3, gold=(2,), bounds=()))
    assert [title for _, title, _ in documents(prompts[0])] == ["One, page", "Two, page", "Anna"]


# -------------------------------------------------------------------------------------------------- distractors


def test_synthetic_distractors_are_the_same_at_every_position(oracle_file):
    task = MultiDocumentQA(file=oracle_file, num_documents=4, gold=(0, 2, 3), distractors="synthetic", bounds=())
    prompts, records = ask(task)
    at = {record["id"]: documents(prompt) for record, prompt in zip(records, prompts, strict=True)}
    assert len(at) == 3 * len(PEOPLE)
    for number, person in enumerate(PEOPLE):
        others = []
        for gold in (0, 2, 3):
            found = at[f"gold_at_{gold}/{number}"]
            assert [n for n, *_ in found] == [1, 2, 3, 4]
            assert found[gold][1] == person
            others.append([title for _, title, _ in found if title != person])
        assert others[0] == others[1] == others[2]
        assert len(set(others[0])) == 3


def test_synthetic_distractors_follow_the_seed_and_nest(oracle_file):
    def drawn(seed, num_documents, num_questions=None):
        task = MultiDocumentQA(
            file=oracle_file,
            num_documents=num_documents,
            gold=(0,),
            distractors="synthetic",
            bounds=(),
            num_questions=num_questions,
            seed=seed,
        )
        return [[title for _, title, _ in documents(prompt)] for prompt in ask(task)[0]]

    assert drawn(0, 5) == drawn(0, 5)
    assert drawn(0, 5) != drawn(1, 5)
    assert [titles[:3] for titles in drawn(0, 5)] == drawn(0, 3)
    assert drawn(0, 5)[:2] == drawn(0, 5, num_questions=2)


def test_no_synthetic_distractor_holds_an_answer_or_repeats(tmp_path):
    rows = [row(person) for person in PEOPLE]
    rows += [row("Anna", question="where is Anna"), row("Gina", answers=["the BRUNOTOWN!", "the *"])]
    file = write_rows(tmp_path / "oracle.jsonl", rows)
    task = MultiDocumentQA(file=file, num_documents=6, gold=(0,), distractors="synthetic", bounds=())
    titles = [[title for _, title, _ in documents(prompt)] for prompt in ask(task)[0]]
    assert all(len(set(found)) == 6 for found in titles)
    assert set(titles[7]) == {"Gina", "Anna", "Clara", "David", "Emil", "Frida"}
    assert "Bruno" not in titles[7]


def test_too_few_passages_to_draw_from(oracle_file):
    task = MultiDocumentQA(file=oracle_file, num_documents=7, gold=(0,), distractors="synthetic")
    with pytest.raises(UserError, match=r"oracle\.jsonl, line 1: only 5 passages of other questions .* needs 6; lower"):
        task.items(Reader(str))


# ------------------------------------------------------------------------------------------------------ scoring


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("He was born in 1950.", ["5"], 1),  # no word boundaries
        ("Oslo", ["*"], 1),
        ("", ["*"], 1),
        ("Oslo", [], 0),
        ("", ["Oslo"], 0),
        ("Oslo", ["Oslo, Norway"], 0),  # the answer in the prediction, not the other way round
        ("It is oslo, norway!", ["Bergen", "Oslo Norway"], 1),
        ("the United  States", ["United States"], 1),
        ("United the States", ["United States"], 1),
        ("U.S.A.", ["USA"], 1),
        ("theatre", ["atre"], 1),  # articles are whole words
        ("theatre", ["re the"], 1),
        ("rock-n-roll", ["rock n roll"], 0),  # punctuation leaves no space
        ("rock \N{RIGHT SINGLE QUOTATION MARK}n roll", ["rock n roll"], 0),  # only ASCII punctuation goes
        ("Röntgen", ["Rontgen"], 0),
        ("RÖNTGEN", ["röntgen"], 1),
    ],
)
def test_best_subspan_em(prediction, answers, score):
    assert best_subspan_em(prediction, answers) == score


def test_normalize_answer():
    assert normalize_answer(' "The\tAnswer": an_apple  a-day\n(the end) ') == "answer anapple aday end"
    assert normalize_answer("The *") == ""


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (" Anna-Town", 100.0),
        ("\n\n Anna Town \nBruno", 0.0),  # a hyphen leaves no space
        ("\n\n ANNATOWN\nBruno", 100.0),  # stripped before the first line is taken
        ("Bruno\nAnna-Town", 0.0),
        ("", 0.0),
    ],
)
def test_only_the_first_line_counts(retrieved_file, text, score):
    task = MultiDocumentQA(file=retrieved_file, num_documents=2, gold=(0,), num_questions=1, bounds=())
    _, (record,) = ask(task, Reader(lambda prompt: text))
    assert record["model_answer"] == text.strip()
    assert record["scores"] == {"best_subspan_em": score}
    assert task.score({**record, "model_answer": text}) == record["scores"]  # a file that somebody else wrote


def looked_up(prompt: str) -> str:
    """Where the person of the question lives, if a document says so."""
    person = re.search(r"Question: where does (\w+) live", prompt)[1]
    found = re.search(rf"{person} lives in (\S+)\.", prompt)
    return f" {found[1]}\nQuestion:" if found else " I do not know"


def test_a_reader_that_looks_up_finds_everything_and_nothing_in_a_closed_book(oracle_file):
    task = MultiDocumentQA(file=oracle_file, num_documents=4, gold=(0, 3), distractors="synthetic")
    _, records = ask(task, Reader(looked_up))
    scores = [record["scores"] for record in records]
    assert scores[:12] == [{"best_subspan_em": 100.0}] * 12
    assert scores[12:] == [{"oracle": 100.0}, {"closed_book": 0.0}] * 6


@needs_oracle_file
def test_readers_of_real_data():
    task = MultiDocumentQA(
        file=str(ORACLE_FILE), num_documents=10, gold=(0, 4, 9), distractors="synthetic", num_questions=60, bounds=()
    )
    rng = random.Random(0)

    def read(choose):
        reader = Reader(lambda prompt: choose(documents(prompt))[2].replace("\n", " "))
        prompts, records = ask(task, reader)
        assert all(len(documents(prompt)) == 10 for prompt in prompts)
        means = Result(task, "reader", records).along("gold")
        return [means[gold].value for gold in (0, 4, 9)]

    assert read(lambda found: found[0]) == [100, 0, 0]
    assert read(lambda found: found[9]) == [0, 0, 100]
    assert 3 < sum(read(rng.choice)) / 3 < 17  # one in ten; 180 draws have a standard error of 2.2


@needs_oracle_file
def test_every_question_of_the_real_file_gets_synthetic_distractors():
    task = MultiDocumentQA(
        file=str(ORACLE_FILE), num_documents=10, gold=(0,), distractors="synthetic", bounds=("closed_book",)
    )
    seen = []

    class Peek(Reader):
        def encode(self, text):
            seen.append(text)
            return [0]

    items = task.items(Peek(str))
    assert len(items) == len(seen) == 2 * 2655
    assert task.score({**items[1451].fields, "cell": {"documents": 10}, "model_answer": "x"}) == {
        "best_subspan_em": 100.0  # the answer is "*"
    }
    assert items[1840].fields["answers"] == ["S"]  # which no passage is without
    assert len(documents(seen[1840])) == 10
    for item, prompt in zip(items[1:2655:20], seen[1:2655:20], strict=True):
        answers = [normalize_answer(answer) for answer in item.fields["answers"]]
        found = documents(prompt)
        # 25 gold passages of the file have line breaks, which stay
        assert len(found) == 10
        for _, title, text in found[1:]:
            assert not any(answer in normalize_answer(f"{title} {text}") for answer in answers)
        assert best_subspan_em(found[0][2], item.fields["answers"]) == 1


# ------------------------------------------------------------------------------------------------------ results


def results(oracle_file, bounds=()):
    """One that reads the first document and knows Anna, and one that finds everything."""
    task = MultiDocumentQA(file=oracle_file, num_documents=4, gold=(0, 3), distractors="synthetic", bounds=bounds)

    def first_only(prompt):
        return "ANNA-town" if "Anna live\n" in prompt else (documents(prompt) or [(0, "", "?")])[0][2]

    answers = {"NTP": first_only, "MEAP": looked_up}
    about = {"task": {"init_args": {"distractors": "synthetic"}}}
    return [Result(task, label, ask(task, Reader(answer))[1], 0, about) for label, answer in answers.items()]


def test_bounds_are_apart_from_the_mean(oracle_file):
    first, second = results(oracle_file, ("oracle", "closed_book"))
    assert first.mean().value == pytest.approx(100 * (6 + 1) / 12)
    assert first.mean().n == 12
    assert {gold: mean.value for gold, mean in first.along("gold").items()} == {0: 100, 3: pytest.approx(100 / 6)}
    assert first.table("oracle")[1, 0].value == 100
    assert first.mean("closed_book").value == pytest.approx(100 / 6)
    assert difference(first, second).n == 12
    assert difference(first, second, "closed_book").value == pytest.approx(-100 / 6)


def test_figure(oracle_file):
    pair = results(oracle_file, ("oracle", "closed_book"))
    (axes,) = figures(pair)["multi_document_qa"].axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["NTP"].get_xydata().tolist() == [[0, 100], [3, pytest.approx(100 / 6)]]
    assert lines["MEAP"].get_xydata().tolist() == [[0, 100], [3, 100]]
    assert axes.get_title() == "Multi-document QA: documents 4, distractors synthetic"
    assert axes.get_xticks().tolist() == [0, 3]
    dashed = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert dashed == pytest.approx([100, 100 / 6, 100, 0])
    assert [text.get_text() for text in axes.texts] == [
        "oracle, NTP",
        "closed book, NTP",
        "oracle, MEAP",
        "closed book, MEAP",
    ]


def test_figure_without_bounds(oracle_file):
    pair = results(oracle_file)
    (axes,) = figures(pair[1:])["multi_document_qa"].axes
    assert [line.get_label() for line in axes.lines] == ["MEAP"]


def test_the_relative_gain_is_that_of_items_that_both_have(oracle_file):
    first, second = results(oracle_file)
    kept = [record for record in first.records if not record["id"].endswith(("/0", "/1"))]
    shorter = Result(first.task, "short", kept)
    same = extras(
        [shorter, Result(second.task, "MEAP", [r for r in second.records if r["id"] in {k["id"] for k in kept}])]
    )
    assert extras([shorter, second]) == same
    assert extras([Result(first.task, "none", []), second]) == {}


def test_relative_gain(oracle_file):
    pair = results(oracle_file)
    assert extras(pair[:1]) == {}
    assert extras(pair) == {
        "relative gain at position 1, % (NTP to MEAP)": 0.0,
        "relative gain at position 4, % (NTP to MEAP)": pytest.approx(500),
        "relative gain, % (NTP to MEAP)": pytest.approx(100 * 5 / 7),
    }
    # nothing is relative to nothing
    nothing = Result(pair[0].task, "none", [{**r, "scores": {"best_subspan_em": 0.0}} for r in pair[0].records])
    assert extras([nothing, pair[1]]) == {}


def test_a_real_model(oracle_file, source_folder):
    task = MultiDocumentQA(
        file=oracle_file, num_documents=2, gold=(0,), distractors="synthetic", num_questions=2, max_new_tokens=4
    )
    model = LanguageModel(str(source_folder))
    items = task.items(model)
    assert all(item.num_tokens <= model.config.max_seq_len for item in items)
    for item, answer in zip(items, task.answer(model, items), strict=True):
        assert answer["model_answer"] == answer["model_answer"].strip()
        (score,) = task.score({**item.fields, **answer, "cell": dict(item.cell)}).values()
        assert score in (0.0, 100.0)


# -------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_documents": 1, "gold": (0,)}, r"num_documents must be at least 2, got 1"),
        ({"gold": ()}, r"gold must name at least one value and each once, got \[\]"),
        ({"gold": (1, 1)}, r"gold must name at least one value and each once, got \[1, 1\]"),
        ({"gold": (0, 4)}, r"gold must be in \[0, 3\], got 4 for num_documents 4"),
        ({"gold": (-1,)}, r"gold must be in \[0, 3\], got -1 for num_documents 4"),
        ({"num_questions": 0}, r"num_questions must be at least 1, got 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        MultiDocumentQA(**{"file": "x.jsonl", "num_documents": 4, "gold": (0,), **options})


def without(fields: dict, name: str) -> dict:
    return {key: value for key, value in fields.items() if key != name}


GOOD = retrieved("Anna")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (without(GOOD, "question"), r"a\.jsonl, line 2: no field 'question', only 'answers', 'ctxs'"),
        (without(GOOD, "answers"), r"a\.jsonl, line 2: no field 'answers', only 'question', 'ctxs'"),
        ({**GOOD, "answers": "Oslo"}, r"a\.jsonl, line 2: field 'answers' must be a list, got str"),
        ({**GOOD, "ctxs": {}}, r"a\.jsonl, line 2: field 'ctxs' must be a list, got dict"),
        ({**GOOD, "ctxs": [without(GOOD["ctxs"][0], "title")]}, r"line 2, ctxs\[0\]: no field 'title', only 'text', "),
        ({**GOOD, "ctxs": [without(GOOD["ctxs"][0], "isgold")]}, r"line 2, ctxs\[0\]: no field 'isgold', only "),
        ({**GOOD, "ctxs": GOOD["ctxs"][1:]}, r"line 2: one passage in 'ctxs' must have 'isgold', got 0"),
        ({**GOOD, "ctxs": GOOD["ctxs"][:1] * 2}, r"line 2: one passage in 'ctxs' must have 'isgold', got 2"),
        (row("Anna"), r"line 2: 'ctxs' has 0 distractors, num_documents 4 needs 3; lower it, or set distractors"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, bad, message):
    file = write_rows(tmp_path / "a.jsonl", [GOOD, bad])
    with pytest.raises(UserError, match=message):
        MultiDocumentQA(file=file, num_documents=4, gold=(0,)).items(Reader(str))


@pytest.mark.parametrize(
    ("people", "message"),
    [
        (("Anna", "Clara"), r"gold_at_1\.jsonl, line 2: the question differs from that in .*gold_at_0\.jsonl, line 2"),
        (("Anna",), r"gold_at_1\.jsonl, line 1: the last question, but the file for another position has more"),
    ],
)
def test_files_for_positions_must_agree(tmp_path, people, message):
    write_rows(tmp_path / "gold_at_0.jsonl", [retrieved("Anna"), retrieved("Bruno")])
    write_rows(tmp_path / "gold_at_1.jsonl", [retrieved(person, 1) for person in people])
    with pytest.raises(UserError, match=message):
        MultiDocumentQA(file=str(tmp_path / "gold_at_{gold}.jsonl"), num_documents=4, gold=(0, 1)).items(Reader(str))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gold_at_4\.jsonl does not exist"):
        MultiDocumentQA(file=str(tmp_path / "gold_at_{gold}.jsonl"), num_documents=9, gold=(4,)).items(Reader(str))
