import json
import random
import re
from itertools import islice
from pathlib import Path

import pytest

from meap_lit.data.corpora.facts import (
    NAMES,
    OPENING,
    PLACES,
    FactCorpus,
    FactInstructions,
    Filler,
    draw_facts,
    filler_sentence,
    instructions,
)
from meap_lit.data.prepare.chat import PrepareChat
from meap_lit.errors import UserError

STATEMENT = re.compile(r"In (\w+) (\w+) sings\.")
QUESTION = re.compile(r"Who sings in (\w+)\?")


def make_document(seed: int, num_facts=4, num_mentions=5, question_share=0.5, filler_share=0.5) -> str:
    corpus = FactCorpus(
        output="unused",
        min_facts=num_facts,
        max_facts=num_facts,
        num_mentions=num_mentions,
        question_share=question_share,
        filler_share=filler_share,
    )
    return corpus._document(seed)


def read_documents(folder) -> list[str]:
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line)["text"] for line in lines]


def test_facts_repeat_no_person_and_no_place():
    facts = draw_facts(random.Random(0), len(NAMES))
    assert {fact.name for fact in facts} == set(NAMES)
    assert {fact.place for fact in facts} <= set(PLACES)
    assert len({fact.place for fact in facts}) == len(NAMES)


def test_near_duplicates_share_a_word_and_repeat_no_person_and_no_place():
    facts = draw_facts(random.Random(0), 64, near_duplicates=True)
    for texts in ([fact.place for fact in facts], [fact.name for fact in facts]):
        assert len(set(texts)) == 64
        first, second = zip(*(text.split() for text in texts), strict=True)
        assert len(set(first)) == len(set(second)) == 8


def test_a_corpus_of_near_duplicates_has_up_to_64_facts(tmp_path):
    options = {"num_documents": 4, "min_facts": 12, "max_facts": 12, "filler_share": 0.0, "question_share": 0.0}
    FactCorpus(output=str(tmp_path / "facts"), near_duplicates=True, **options).run()
    for text in read_documents(tmp_path / "facts"):
        assert len(set(re.findall(r"In (\w+ \w+) (\w+ \w+) sings\.", text))) == 12
    with pytest.raises(UserError, match="max_facts <= 64, got min_facts 12 and max_facts 65"):
        FactCorpus(output=str(tmp_path / "more"), near_duplicates=True, **options | {"max_facts": 65}).run()


def test_the_name_follows_the_prompt_and_the_question_does_not_give_it_away():
    (fact,) = draw_facts(random.Random(1), 1)
    assert fact.statement.startswith(f"{fact.prompt} {fact.name} ")
    assert fact.place in fact.question
    assert fact.name not in fact.question


def test_every_question_asks_for_a_fact_stated_before_and_is_answered_with_it():
    num_questions = 0
    for seed in range(20):
        text = make_document(seed)
        assert text.startswith(OPENING)
        for question in QUESTION.finditer(text):
            stated = dict(STATEMENT.findall(text[: question.start()]))
            place, name = STATEMENT.match(text, question.end() + 1).groups()
            assert place == question[1]
            assert stated[place] == name
            num_questions += 1
    assert num_questions > 100


def test_every_fact_is_stated_first_and_never_contradicted():
    statements = STATEMENT.findall(make_document(0, num_facts=3, num_mentions=7))
    assert len(statements) == 21
    assert len(set(statements)) == len(set(statements[:3])) == 3
    assert len({place for place, _ in statements}) == len({name for _, name in statements}) == 3


def test_the_order_of_restatements_tells_nothing():
    """The fact longest unmentioned is no likelier than the others."""
    hits = total = 0
    for seed in range(300):
        statements = STATEMENT.findall(make_document(seed, num_facts=4, num_mentions=6))
        for index in range(4, len(statements)):
            last_mention = {fact: number for number, fact in enumerate(statements[:index])}
            hits += statements[index] == min(last_mention, key=last_mention.__getitem__)
            total += 1
    assert total == 6000
    assert hits / total == pytest.approx(0.25, abs=0.02)


def test_shares_of_zero_and_one():
    bare = make_document(0, question_share=0.0, filler_share=0.0)
    assert STATEMENT.sub("", bare).split() == OPENING.split()
    full = make_document(0, question_share=1.0, filler_share=1.0)
    assert len(QUESTION.findall(full)) == 4 * 4  # all but the first round
    assert full.count("The ") == 4 * 5  # one to a statement


def test_filler_names_no_person_and_no_place():
    rng = random.Random(0)
    words = {word for _ in range(300) for word in re.findall(r"\w+", filler_sentence(rng))}
    assert len(words) > 15
    assert not words & {*NAMES, *PLACES}


def test_people_are_drawn_anew_for_every_document(tmp_path):
    FactCorpus(output=str(tmp_path / "corpus"), num_documents=60).run()
    statements = [pair for text in read_documents(tmp_path / "corpus") for pair in STATEMENT.findall(text)]
    singers = {name for place, name in statements if place == "Oslo"}
    assert len(singers) > 5


def test_corpus_is_the_same_byte_for_byte_and_differs_by_seed(tmp_path):
    files = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        FactCorpus(output=str(tmp_path / name), num_documents=10, num_files=3, seed=seed).run()
        files[name] = [path.read_bytes() for path in sorted((tmp_path / name).glob("*.jsonl"))]
    assert len(files["one"]) == 3
    assert files["one"] == files["again"]
    assert files["one"] != files["other"]


def test_corpus_of_a_seed_never_changes():
    """A reference that another Python version or machine must reproduce."""
    corpus = FactCorpus(output="unused", min_facts=2, max_facts=2, num_mentions=2, question_share=1.0, filler_share=0.5)
    assert corpus._document(0) == (
        "This is what people say. In Tokyo Maria sings. In Oslo Peter sings. "
        "Who sings in Oslo? In Oslo Peter sings. Who sings in Tokyo? In Tokyo Maria sings."
    )


def test_number_of_files_does_not_change_the_documents(tmp_path):
    for num_files in (1, 4):
        FactCorpus(output=str(tmp_path / str(num_files)), num_documents=10, num_files=num_files).run()
    one, four = (read_documents(tmp_path / name) for name in ("1", "4"))
    assert len(one) == 10
    assert sorted(one) == sorted(four)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_documents": 0}, "num_documents must be at least 1, got 0"),
        ({"filler_share": 15}, "filler_share must be in [0, 1], got 15"),
        ({"min_facts": 7}, "got min_facts 7 and max_facts 6"),
        ({"max_facts": 99}, f"max_facts <= {len(NAMES)}"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_made(tmp_path, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        FactCorpus(output=str(tmp_path / "corpus"), **changes).run()
    assert not list(tmp_path.iterdir())


def test_the_instruction_set_is_what_the_project_ships():
    shipped = [json.loads(line) for line in Path("data/instructions.jsonl").read_text().splitlines()]
    assert shipped == instructions(400)


def test_an_instruction_is_answered_by_its_input():
    records = instructions(40, seed=1)
    for record in records:
        assert all(f"{sentence}." in record["input"] for sentence in record["output"].rstrip(".").split(". "))
    single = [record for record in records if record["instruction"] != "Who sings where?"]
    assert len(single) == 20
    assert all(f"In {QUESTION.match(record['instruction'])[1]} " in record["output"] for record in single)


# ---------------------------------------------------------------------------------------------------- filler

TEXT = (
    "First comes this sentence, which is long enough. Too short. "
    + "And then another one, which\nhas a break inside! " * 2
)
TEXT += "A heading without an end\n\n" + "word " * 40


def test_filler_is_the_sentences_of_a_text_in_their_order(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    sentences = Filler.read(str(tmp_path)).sentences
    assert sentences[0] == "First comes this sentence, which is long enough."
    assert sentences[1:3] == ["And then another one, which has a break inside!"] * 2
    assert sentences[3] == "A heading without an end"
    assert sentences[4] == " ".join(["word"] * 20)  # cut at a word, before the hundredth character
    drawn = list(islice(Filler(sentences).draw(random.Random(0)), 12))
    start = sentences.index(drawn[0]) if drawn[0] != sentences[1] else 1 + (drawn[1] != sentences[2])
    assert drawn == [sentences[(start + number) % 5] for number in range(12)]


def test_a_corpus_in_real_text_states_the_same_kind_of_facts(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    corpus = FactCorpus(
        output=str(tmp_path / "corpus"),
        num_documents=20,
        filler=str(tmp_path / "text.txt"),
        filler_share=1.0,
        num_files=1,
    )
    corpus.run()
    documents = read_documents(tmp_path / "corpus")
    assert all("which" in text for text in documents)
    for text in documents:
        stated: dict[str, str] = {}
        for place, name in STATEMENT.findall(text):
            assert stated.setdefault(place, name) == name
        assert stated


@pytest.mark.parametrize(("content", "message"), [("Short.", "holds no sentence"), (None, "no_file")])
def test_filler_without_a_sentence(tmp_path, content, message):
    path = tmp_path / "no_file.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        FactCorpus(output=str(tmp_path / "corpus"), filler=str(path)).run()
    assert not (tmp_path / "corpus").exists()


def test_questions_in_real_text_are_answered_by_their_input(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    FactInstructions(output=str(tmp_path / "asked"), num_records=30, filler=str(tmp_path / "text.txt")).run()
    records = [json.loads(line) for line in (tmp_path / "asked" / "instructions.jsonl").read_text().splitlines()]
    assert len(records) == 30
    for record in records:
        stated = STATEMENT.findall(record["input"])
        answered = STATEMENT.findall(record["output"])
        assert set(answered) <= set(stated)
        assert len(answered) in (1, len(stated))
        assert re.search("sentence|another|heading|word", record["input"])
    with pytest.raises(UserError, match="num_records must be at least 1, got 0"):
        FactInstructions(output=str(tmp_path / "none"), num_records=0).run()


def test_a_folder_of_questions_is_an_input_as_it_is(tmp_path, prepared):
    FactInstructions(output=str(tmp_path / "asked"), num_records=10).run()
    template = Path(__file__).parents[3] / "data/instructions.jinja"
    PrepareChat(
        input=[str(tmp_path / "asked")],
        tokenizer=prepared.tokenizer,
        template=str(template),
        output=str(tmp_path / "chat"),
        num_workers=1,
    ).run()
    manifest = json.loads((tmp_path / "chat/manifest.json").read_text())
    assert [Path(source["path"]).name for source in manifest["sources"]] == ["instructions.jsonl"]
