"""Reading JSON with errors that name the file; writing a whole file or none."""

import os

import pytest

from meap_lit.errors import UserError
from meap_lit.files import parse_json, read_json, write_file


def test_an_object_is_read(tmp_path):
    file = tmp_path / "a.json"
    write_file(file, '{"a": [1, "\u00e9"]}')
    assert read_json(file) == {"a": [1, "\u00e9"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "not a JSON object but list"),
        (b"{", "not valid JSON"),
        (b'{"a": 1}\n}', "not valid JSON \\(Extra data at line 2, column 1\\)"),
        (b"\xff{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_what_is_no_object_is_refused_with_the_name_of_the_file(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=f"a.json.*{message}") as error:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none.json: No such file"):
        read_json(tmp_path / "none.json")


def test_a_line_is_named_by_where_it_is():
    with pytest.raises(UserError, match=r"data\.jsonl, line 7: not valid JSON"):
        parse_json("{", "data.jsonl, line 7")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    write_file(file, "old")

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_file(file, b"new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]
