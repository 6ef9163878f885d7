import errno
import gzip
import json
import os
import re
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from meap_lit.data.formats import RECORD_FORMATS
from meap_lit.data.readers import DocumentReader, RecordReader, find_files
from meap_lit.errors import UserError

SKIP_HINT = "use --on_error skip to leave such lines out"


def read(*files, **options):
    return list(DocumentReader(list(files), **options))


def jsonl(*texts):
    return "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts).encode()


def write(path, content):
    path.write_bytes(content)
    return path


# ------------------------------------------------------------------------------------------------- finding


def test_finds_files_in_folders_at_all_levels_sorted_and_once(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    wanted = [tmp_path / name for name in ("a.txt", "b/c/x.jsonl.zst", "b/y.MD", "z.parquet")]
    for file in [*wanted, tmp_path / "b/code.py", tmp_path / ".hidden/h.txt", tmp_path / ".h.txt", tmp_path / "m.bin"]:
        file.touch()
    assert find_files([str(tmp_path)]) == wanted
    inputs = [str(tmp_path / "z.parquet"), str(tmp_path), str(tmp_path / "b" / ".." / "a.txt")]
    assert [file.resolve() for file in find_files(inputs)] == wanted
    assert find_files([str(tmp_path / "*" / "*.MD"), str(tmp_path / "**" / "x*")]) == wanted[1:3]


def test_suffixes_choose_what_is_taken_from_folders(tmp_path):
    code, text = write(tmp_path / "a.py", b"x = 1\n"), write(tmp_path / "b.txt", b"b")
    assert find_files([str(tmp_path)], [".py"]) == [code]
    assert find_files([str(tmp_path)], ["py", "txt"]) == [code, text]
    assert find_files([str(tmp_path / "*")], [".py"]) == [code, text]  # named one by one, by a pattern
    assert read(code) == ["x = 1\n"]


def test_input_that_names_nothing(tmp_path):
    with pytest.raises(UserError, match=r"^input \S+/nowhere.txt does not exist$"):
        find_files([str(tmp_path / "nowhere.txt")])
    with pytest.raises(UserError, match=r"^input \S+ holds no file that ends in .txt, .md, .jsonl, "):
        find_files([str(tmp_path)])
    with pytest.raises(UserError, match=r"^input \S+/\*.txt holds no file that ends in"):
        find_files([str(tmp_path / "*.txt")])
    with pytest.raises(UserError, match="no input named"):
        find_files([])


@pytest.mark.parametrize("locked", ["", "b/locked"])
def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch, locked):
    (tmp_path / "b" / "locked").mkdir(parents=True)
    write(tmp_path / "a.txt", b"a")
    scandir = os.scandir

    def refuse(path):
        if path == str(tmp_path / locked):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # a mode does not keep root out
    message = f"cannot list folder {tmp_path / locked}: Permission denied; give this user access, or name other input"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        find_files([str(tmp_path)])


def test_named_file_of_unknown_ending(tmp_path):
    file = write(tmp_path / "table.csv", b"a,b\n")
    expected = r"input file \S+/table.csv ends in none of .txt, .md, .jsonl, .jsonl.gz, .jsonl.zst, .parquet; name"
    with pytest.raises(UserError, match=expected):
        find_files([str(file)])
    assert find_files([str(file)], [".csv"]) == [file]


def test_file_that_vanished(tmp_path):
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(UserError, match=r"^cannot read \S+/link.txt: No such file or directory$"):
        read(*find_files([str(tmp_path)]))


# ------------------------------------------------------------------------------------------------- formats


def test_every_format_gives_the_same_documents(tmp_path):
    texts = ["first", "zweitens: äöü\nnew line", "", "四"]
    lines = jsonl(*texts)
    half = len(lines) // 2
    compressor = zstandard.ZstdCompressor()
    table = pyarrow.table({"id": [1, 2, 3, 4], "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=2)
    pyarrow.parquet.write_table(
        pyarrow.table({"text": pyarrow.array(texts).dictionary_encode()}), tmp_path / "coded.parquet"
    )
    files = [
        write(tmp_path / "d.jsonl", lines),
        write(tmp_path / "bom.jsonl", b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n")),
        write(tmp_path / "open.jsonl", lines.rstrip()),
        write(tmp_path / "d.jsonl.gz", gzip.compress(lines)),
        write(tmp_path / "members.jsonl.gz", gzip.compress(lines[:half]) + gzip.compress(lines[half:])),
        write(tmp_path / "d.jsonl.zst", compressor.compress(lines)),
        write(tmp_path / "frames.jsonl.zst", compressor.compress(lines[:half]) + compressor.compress(lines[half:])),
        tmp_path / "d.parquet",
        tmp_path / "coded.parquet",
    ]
    for file in files:
        assert read(file) == texts, file.name
    assert read(*files) == texts * len(files)


def test_plain_text_is_one_document_as_it_stands(tmp_path):
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\r\ntwo\n"), write(tmp_path / "b.md", b"")) == [
        "one\r\n\r\ntwo\n",
        "",
    ]


def test_other_text_field(tmp_path):
    file = write(tmp_path / "d.jsonl", b'{"body": "b", "text": "t"}\n')
    assert read(file, text_field="body") == ["b"]


def test_long_lines_over_many_blocks(tmp_path):
    text = "".join(map(str, range(100_000)))
    file = write(tmp_path / "d.jsonl.zst", zstandard.ZstdCompressor().compress(jsonl(text, "short")))
    assert read(file) == [text, "short"]


def test_bytes_read_grows_to_the_size_on_disk(tmp_path):
    files = [write(tmp_path / f"{i}.jsonl", jsonl(*["text"] * 1000)) for i in range(3)]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", "c"]}), tmp_path / "d.parquet")
    reader = DocumentReader([*files, tmp_path / "d.parquet"])
    seen = [reader.bytes_read for _ in reader]
    assert seen == sorted(seen)
    assert reader.bytes_read == sum(reader.sizes) == sum(file.stat().st_size for file in reader.files)


# -------------------------------------------------------------------------------------------------- damage

BAD_LINES = [
    (b'{"text": "cut', r"line 2: not valid JSON \(Unterminated string"),
    (b"not json", r"line 2: not valid JSON \(Expecting value"),
    (b"[" * 200_000, "line 2: not valid JSON"),
    (b'["text"]', "line 2: not a JSON object but list"),
    (b'{"body": "x", "id": 1}', "line 2: no field 'text', only 'body', 'id'"),
    (b'{"text": null}', "line 2: field 'text' is not a string but NoneType"),
    (b'{"text": 17}', "line 2: field 'text' is not a string but int"),
    (b'{"text": "\xff"}', "line 2: not valid UTF-8"),
    (b'{"text": "\\ud800"}', "line 2: field 'text' holds a broken character"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_line(tmp_path, line, message):
    file = write(tmp_path / "d.jsonl", jsonl("before") + line + b"\n" + jsonl("after"))
    with pytest.raises(UserError, match=rf"^\S+/d.jsonl, {message}.*; {SKIP_HINT}$"):
        read(file)
    reader = DocumentReader([file], on_error="skip")
    assert list(reader) == ["before", "after"]
    assert reader.num_skipped == 1


def test_text_file_that_is_not_utf8(tmp_path):
    files = [write(tmp_path / "a.txt", b"one\ntwo \xe4\n"), write(tmp_path / "b.txt", b"fine")]
    with pytest.raises(UserError, match=rf"^\S+/a.txt, line 2: not valid UTF-8; {SKIP_HINT}$"):
        read(*files)
    assert read(*files, on_error="skip") == ["fine"]


def cut_gzip():
    return gzip.compress(jsonl(*map(str, range(20_000))))[:-2000]


def cut_zstd():
    return zstandard.ZstdCompressor().compress(jsonl(*map(str, range(20_000))))[:-5]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl.gz", cut_gzip()),
        ("d.jsonl.zst", cut_zstd()),
        ("d.jsonl.gz", b"not compressed\n"),
        ("d.jsonl.zst", b"not compressed\n"),
    ],
)
def test_damaged_compression(tmp_path, name, content):
    file, other = write(tmp_path / name, content), write(tmp_path / "other.txt", b"fine")
    with pytest.raises(UserError, match=rf"^\S+/{name}, line \d+: damaged or cut compressed file.*; {SKIP_HINT}$"):
        read(file, other)
    reader = DocumentReader([file, other], on_error="skip")
    documents = list(reader)
    assert documents[-1] == "fine"
    assert documents[:-1] == list(map(str, range(len(documents) - 1)))
    assert reader.num_skipped == 1


def test_parquet_rows_and_columns(tmp_path):
    nulls = tmp_path / "nulls.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "c"]}), nulls)
    with pytest.raises(UserError, match=rf"^\S+/nulls.parquet, row 2: field 'text' is not a string.*; {SKIP_HINT}$"):
        read(nulls)
    assert read(nulls, on_error="skip") == ["a", "c"]
    with pytest.raises(UserError, match=r"nulls.parquet has no column 'body'; it has text: name one by --text_field"):
        read(nulls, text_field="body", on_error="skip")


def test_cut_parquet(tmp_path):
    whole = tmp_path / "whole.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), whole)
    cut = write(tmp_path / "cut.parquet", whole.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"^\S+/cut.parquet, row 1: cannot be read as Parquet .*; {SKIP_HINT}$"):
        read(cut)
    assert read(cut, whole, on_error="skip") == ["a", "b"]


@pytest.mark.parametrize(("name", "package"), [("d.jsonl.zst", "zstandard"), ("d.parquet", "pyarrow")])
def test_missing_package(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    expected = rf"^reading \S+/{name} needs the package {package}: pip install {package}$"
    with pytest.raises(UserError, match=expected):
        read(write(tmp_path / name, b""), on_error="skip")


# ------------------------------------------------------------------------------------------------- records

RECORDS = [{"messages": [{"role": "user", "content": "ä"}], "id": 1}, {"messages": [], "id": None}]


def read_records(*files, **options):
    return [record.fields for record in RecordReader(list(files), **options)]


def test_every_format_gives_the_same_records(tmp_path):
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "r.parquet", row_group_size=1)
    files = [
        write(tmp_path / "r.json", json.dumps(RECORDS, indent=1).encode()),
        write(tmp_path / "bom.JSON", b"\xef\xbb\xbf" + json.dumps(RECORDS).encode()),
        write(tmp_path / "r.jsonl", lines),
        write(tmp_path / "r.jsonl.gz", gzip.compress(lines)),
        write(tmp_path / "r.jsonl.zst", zstandard.ZstdCompressor().compress(lines)),
        tmp_path / "r.parquet",
    ]
    for file in files:
        assert read_records(file, on_error="stop") == RECORDS, file.name
    assert read_records(write(tmp_path / "one.json", json.dumps(RECORDS[0]).encode()), on_error="stop") == RECORDS[:1]
    assert find_files([str(tmp_path)], formats=RECORD_FORMATS) == sorted([*files, tmp_path / "one.json"])


def test_records_know_where_they_stand(tmp_path):
    files = [write(tmp_path / "r.json", b"[{}, {}]"), write(tmp_path / "r.jsonl", b"\n{}\n")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"a": 1}]), tmp_path / "r.parquet")
    reader = RecordReader([*files, tmp_path / "r.parquet"], "stop")
    places, positions = [], []
    for record in reader:
        places.append(record.where.removeprefix(f"{tmp_path}/"))
        positions.append(reader.bytes_read)
    assert places == ["r.json, element 1", "r.json, element 2", "r.jsonl, line 2", "r.parquet, row 1"]
    assert positions == sorted(positions)
    assert reader.bytes_read == sum(reader.sizes)


@pytest.mark.parametrize(
    ("content", "message", "left"),
    [
        (b"", r"r.json: not valid JSON \(Expecting value at column 1\)", 0),
        (b'[{},\n{"a": ]', r"r.json: not valid JSON \(Expecting value at line 2, column 7\)", 0),
        (b'"text"', "r.json: not a JSON object but str", 0),
        (b'[{}, ["text"], {}]', "r.json, element 2: not a JSON object but list", 2),
        (b'[{},\n"\xff"]', "r.json, line 2: not valid UTF-8", 0),
    ],
)
def test_bad_json_file(tmp_path, content, message, left):
    file = write(tmp_path / "r.json", content)
    with pytest.raises(UserError, match=rf"^\S+/{message}; {SKIP_HINT}$"):
        read_records(file, on_error="stop")
    reader = RecordReader([file], "skip")
    assert len(list(reader)) == left
    assert reader.num_skipped == 1


def test_text_is_no_record_and_json_is_plain_text(tmp_path):
    text, records = write(tmp_path / "a.txt", b"text"), write(tmp_path / "b.json", b'{"text": "t"}')
    with pytest.raises(UserError, match=r"a.txt ends in none of .json, .jsonl, .jsonl.gz, .jsonl.zst, .parquet$"):
        find_files([str(text)], formats=RECORD_FORMATS)
    with pytest.raises(
        UserError, match=r"b.json ends in none of .txt, .*; name its ending in --suffixes to read it as"
    ):
        find_files([str(records)])
    assert read(*find_files([str(records)], [".json"])) == ['{"text": "t"}']
