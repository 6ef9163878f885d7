import gzip
import json

import pytest

from meap_lit.errors import UserError
from meap_lit.evaluation.rows import read_rows

LINES = b'{"text": "caf\xc3\xa9"}\n\n{"text": "two"}\n'


@pytest.fixture
def row(tmp_path):
    """The third line of a file: one field of each type."""
    fields = {"text": "x", "texts": ["a", "b"], "flag": False, "rows": [{"n": 1}, {"n": 2}], "mixed": ["a", 1]}
    (tmp_path / "data.jsonl").write_text('{"other": 0}\n\n' + json.dumps(fields) + "\n")
    return list(read_rows(str(tmp_path / "data.jsonl")))[1]


CUT = gzip.compress(LINES * 99, mtime=0)[:-20]


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", LINES), ("a.jsonl.gz", gzip.compress(LINES, mtime=0))])
def test_lines_plain_or_compressed(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    rows = list(read_rows(str(tmp_path / name)))
    assert [row.text("text") for row in rows] == ["café", "two"]
    assert [row.where for row in rows] == [f"{tmp_path / name}, line 1", f"{tmp_path / name}, line 3"]


def test_only_what_is_asked_for_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\nbroken\n')
    assert next(read_rows(str(tmp_path / "a.jsonl"))).text("text") == "fine"


def test_fields_by_type(row):
    assert row.text("text") == "x"
    assert row.texts("texts") == ["a", "b"]
    assert row.flag("flag") is False
    assert [inner.fields for inner in row.rows("rows")] == [{"n": 1}, {"n": 2}]
    assert row.elements("mixed") == ["a", 1]


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda row: row.text("txt"), r"data\.jsonl, line 3: no field 'txt', only 'text', 'texts', "),
        (lambda row: row.text("flag"), r"data\.jsonl, line 3: field 'flag' is not a string but bool"),
        (lambda row: row.texts("text"), r"line 3: field 'text' must be a list, got str"),
        (lambda row: row.texts("mixed"), r"line 3: field 'mixed\[1\]' is not a string but int"),
        (lambda row: row.flag("text"), r"line 3: field 'text' must be true or false, got str"),
        (lambda row: row.rows("mixed"), r"line 3, mixed\[0\]: must be a JSON object, got str"),
        (lambda row: row.rows("rows")[1].text("m"), r"line 3, rows\[1\]: no field 'm', only 'n'"),
    ],
)
def test_a_wrong_field_is_named(row, read, message):
    with pytest.raises(UserError, match=message):
        read(row)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"{}\n{'a': 1}\n", r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1: begins a JSON array, but a \.jsonl file has an object on each line"),
        ("a.jsonl", b"\xff\n", r"a\.jsonl, line 1: not valid UTF-8"),
        ("a.jsonl", b"\n", r"a\.jsonl is empty"),
        ("a.jsonl.gz", CUT, r"a\.jsonl\.gz, line \d+: damaged or cut compressed file"),
        ("a.csv", b"a,b\n", r"a\.csv must end in one of \.json, \.jsonl, "),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_rows(str(tmp_path / name)))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"b\.jsonl does not exist; the recipe names its source"):
        next(read_rows(str(tmp_path / "b.jsonl")))
