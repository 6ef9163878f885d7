"""Reading JSON with errors that name the file; writing a whole file or none."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from meap_lit.errors import UserError
from meap_lit.files import _pid_namespace, is_abandoned, parse_json, partial_path, read_json, remove, write_file


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


def test_a_leftover_that_goes_while_it_is_looked_at_is_not_abandoned(tmp_path, monkeypatch):
    partial = tmp_path / "out.partial-1@elsewhere"
    partial.mkdir()
    os.utime(partial, (0, 0))
    assert is_abandoned(partial)
    monkeypatch.setattr(type(partial), "rglob", lambda self, pattern: [self / "gone"])
    assert not is_abandoned(partial)


def test_two_processes_may_remove_the_same_folder(tmp_path):
    def start():
        barrier.wait()
        remove(tmp_path / "old")

    for _ in range(20):
        for number in range(50):
            (tmp_path / "old" / str(number) / "deep").mkdir(parents=True)
        barrier = threading.Barrier(2)
        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(start) for _ in range(2)]:
                future.result()
        remove(tmp_path / "old")  # what both have left


def test_processes_of_two_containers_of_one_host_name_are_told_apart(tmp_path, monkeypatch):
    ours = partial_path(tmp_path / "out")
    _pid_namespace.cache_clear()
    monkeypatch.setattr(os, "stat", lambda path: SimpleNamespace(st_ino=1))
    theirs = partial_path(tmp_path / "out")
    monkeypatch.undo()
    _pid_namespace.cache_clear()
    assert ours.name.partition("@")[0] == theirs.name.partition("@")[0]
    assert ours != theirs
    theirs.mkdir()
    assert not is_abandoned(theirs)  # whatever process has its number here
