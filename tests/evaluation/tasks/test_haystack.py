"""Where a text is cut, against answers by hand, and what it is made of."""

import json
import random

import numpy as np
import pytest

from meap_lit.errors import UserError
from meap_lit.evaluation.tasks.haystack import Documents, Haystack
from meap_lit.tokenizer.tokenizer import Tokenizer
from tests.support.oracle import shared_data


def of_letters(text: str) -> Haystack:
    """A haystack whose tokens are its characters."""
    return Haystack(text, np.arange(len(text) + 1))


@pytest.fixture(scope="module")
def tokenizer(prepared) -> Tokenizer:
    return Tokenizer.load(prepared.tokenizer)


#                              0         1         2
#                              0123456789012345678901234567
CUTS = [
    (
        "sentence",
        "One two. Three 4.5 now.\nSix",
        [(0, 0), (7, 0), (8, 8), (9, 8), (18, 8), (22, 8), (23, 23), (27, 23)],
    ),
    ("sentence", "e.g.the end.", [(5, 0), (11, 0), (12, 12)]),
    ("sentence", "no period", [(9, 0)]),
    ("line", "ab.\ncd\n\nef", [(3, 0), (4, 4), (6, 4), (7, 7), (8, 8), (10, 8)]),
    ("token", "One two.", [(0, 0), (5, 5), (8, 8)]),
]


@pytest.mark.parametrize(("boundary", "text", "cuts"), CUTS)
def test_cut(boundary, text, cuts) -> None:
    haystack = of_letters(text)
    assert [(index, haystack.cut(index, boundary)) for index, _ in cuts] == cuts


def test_the_length_of_a_sentence_is_that_between_its_ends():
    haystack = of_letters("One two. Three 4.5 now.\nSix")
    assert [haystack.sentence_length(index) for index in (0, 7, 8, 22, 23, 27)] == [8, 8, 15, 15, 4, 4]
    assert of_letters("no period").sentence_length(3) == np.inf


def test_a_cut_is_never_within_a_character() -> None:
    # two tokens for each of the letters é and ß, as when bytes stand for what a vocabulary lacks
    haystack = Haystack("aéß", np.array([0, 1, 2, 2, 3, 3]))
    assert [haystack.cut(index, "token") for index in range(6)] == [0, 1, 2, 2, 3, 3]
    assert [haystack.index(position) for position in range(4)] == [0, 1, 3, 5]


def test_documents_are_joined_in_the_order_of_their_names_and_repeated(tmp_path, tokenizer) -> None:
    (tmp_path / "b.md").write_text("the river keeps. ")
    (tmp_path / "a.txt").write_text("a stone finds. ")
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "old market. "}) + "\n" + json.dumps({"text": " "}) + "\n")
    documents = Documents.read(str(tmp_path), tokenizer)
    once = "a stone finds. the river keeps. old market. "
    whole = documents.haystack(10_000, repeat=False)
    assert whole.text == once
    assert len(whole) == sum(
        len(tokenizer.encode(text)) for text in ("a stone finds. ", "the river keeps. ", "old market. ")
    )
    repeated = documents.haystack(3 * len(whole))
    assert repeated.text == 3 * once
    assert len(repeated) == 3 * len(whole)
    assert repeated.ends[-1] == len(repeated.text)
    assert repeated.text[: repeated.cut(len(whole), "token")] == once
    orders = {documents.haystack(len(whole), random.Random(seed)).text for seed in range(20)}
    assert len(orders) == 6, "all orders of three documents"
    assert {len(text) for text in orders} == {len(once)}


def test_tokens_end_where_the_tokenizer_says(tmp_path, tokenizer) -> None:
    text = "the  old\n\n lantern, über 3 stones.\n"
    (tmp_path / "a.txt").write_text(text)
    haystack = Documents.read(str(tmp_path), tokenizer).haystack(1)
    ids = tokenizer.encode(text)
    ends = [len(tokenizer.decode(ids[:count]).rstrip("\N{REPLACEMENT CHARACTER}")) for count in range(len(ids) + 1)]
    whole = [position == end for position, end in zip(haystack.ends, ends, strict=True)]
    assert whole.count(False) == 1, "the first byte of ü, which a cut puts on the side of the whole letter"
    assert np.all(np.diff(haystack.ends) >= 0)


def write(name, content):
    def make(folder):
        (folder / name).write_bytes(content)

    return make


WRONG = [
    (lambda folder: folder.rmdir(), "haystack: input .* does not exist"),
    (lambda folder: None, "haystack: input .* holds no file that ends in .txt, .md"),
    (write("a.txt", b" \n"), "haystack .* has no text"),
    (write("a.txt", b"ok\n\xff"), r"a\.txt, line 2: not valid UTF-8$"),
    (write("a.jsonl", b'{"text": "a"}\n{"body": "a"}\n'), r"a\.jsonl, line 2: no field 'text', only 'body'$"),
    (write("a.jsonl", b'{"text": "a"}\n{"text"\n'), r"a\.jsonl, line 2: not valid JSON"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_wrong_documents(make, message, tmp_path, tokenizer) -> None:
    folder = tmp_path / "haystack"
    folder.mkdir()
    make(folder)
    with pytest.raises(UserError, match=message):
        Documents.read(str(folder), tokenizer).haystack(10)


def test_the_essays_have_the_known_number_of_tokens() -> None:
    llama2 = Tokenizer.load(shared_data("tokenizer-llama2"))
    haystack = Documents.read(shared_data("haystack"), llama2).haystack(10**9, repeat=False)
    assert len(haystack.text) == 643_830
    assert len(haystack) == 167_751
    # the token that encode(".") ends in, 869, is not the one that ends a sentence, 29889
    middle = haystack.cut(len(haystack) // 2, "sentence")
    assert haystack.text[middle - 1] == "."
    assert abs(haystack.index(middle) / len(haystack) - 0.5) < 0.01
