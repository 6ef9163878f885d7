import errno
import gzip
import json
import os
import re

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from meap_lit.data.read.find import find_files, find_input
from meap_lit.data.read.formats import RECORD_FORMATS
from meap_lit.data.read.readers import InputPart, RecordReader, TextReader, read_texts
from meap_lit.errors import UserError

SKIP_HINT = "use --on_error skip to leave out what cannot be read"


def read(*files, **options):
    return [entry.content for entry in TextReader(list(files), **{"on_error": "stop", **options})]


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
    expected = r"input file \S+/table.csv must end in one of .txt, .md, .jsonl, .jsonl.gz, .jsonl.zst, .parquet; name"
    with pytest.raises(UserError, match=expected):
        find_files([str(file)])
    assert find_files([str(file)], [".csv"]) == [file]


def test_file_that_vanished(tmp_path):
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(UserError, match=r"^cannot read \S+/link.txt: No such file or directory$"):
        read(*find_files([str(tmp_path)]))


# ------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("name", ["", "facts*", "*/a.jsonl"])
def test_what_a_preparation_has_not_finished_is_no_input(tmp_path, name):
    for folder in ("facts", "facts.partial-99@host-1"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.jsonl", jsonl("a"))
    assert find_files([str(tmp_path / name)]) == [tmp_path / "facts" / "a.jsonl"]


def test_the_home_of_an_unknown_user_does_not_exist():
    with pytest.raises(UserError, match="input ~nobody-of-this-name/x does not exist"):
        find_files(["~nobody-of-this-name/x"])


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "in" / "real").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    wanted = [write(tmp_path / "in" / "real" / "a.txt", b"a"), tmp_path / "in" / "linked" / "deep" / "b.txt"]
    write(tmp_path / "elsewhere" / "deep" / "b.txt", b"b")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in" / "real")
    (tmp_path / "in" / "real" / "up").symlink_to(tmp_path / "in")  # a cycle
    (tmp_path / "elsewhere" / "deep" / "self").symlink_to(tmp_path / "elsewhere" / "deep")
    assert find_files([str(tmp_path / "in")]) == sorted(wanted)
    (tmp_path / "root").symlink_to(tmp_path / "in")
    assert [file.name for file in find_files([str(tmp_path / "root")])] == ["b.txt", "a.txt"]


def test_what_is_passed_over_is_counted_by_ending(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("a.txt", "1.csv", "b/2.CSV", "b/README", "b/x.docx", ".hidden", "b/y.md"):
        (tmp_path / name).touch()
    found = find_input([str(tmp_path), str(tmp_path / "b")])
    assert found.passed_over == {".csv": 2, "": 1, ".docx": 1}
    assert found.lines_of_summary() == [
        "  skipped  files in the folders, 2 .csv, 1 without an ending, 1 .docx; "
        "to read those that are text too: --suffixes .txt .md .csv .docx"
    ]
    assert find_input([str(tmp_path), str(tmp_path / "b")], [".csv", "txt"]).passed_over == {
        ".md": 1,
        "": 1,
        ".docx": 1,
    }
    assert find_input([str(tmp_path / "a.txt")]).lines_of_summary() == []


def test_the_hint_on_what_is_passed_over_reads_all_of_it(tmp_path):
    for name in ("a.jsonl.gz", "b.py", "c.rst"):
        (tmp_path / name).touch()
    (line,) = find_input([str(tmp_path)]).lines_of_summary()
    suffixes = line.split("--suffixes ")[1].split()
    assert [file.name for file in find_files([str(tmp_path)], suffixes)] == ["a.jsonl.gz", "b.py", "c.rst"]
    (line,) = find_input([str(tmp_path)], formats=RECORD_FORMATS).lines_of_summary()
    assert line == "  skipped  files in the folders, 1 .py, 1 .rst"  # records are read in their formats only


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"^cannot read \S+/pipe.txt: not a regular file$"):
        TextReader(find_files([str(tmp_path)]))


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
    reader = TextReader([*files, tmp_path / "d.parquet"])
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
    reader = TextReader([file], on_error="skip")
    assert [entry.content for entry in reader] == ["before", "after"]
    assert reader.num_skipped == 1


def test_text_file_that_is_not_utf8(tmp_path):
    files = [write(tmp_path / "a.txt", b"one\ntwo \xe4\n"), write(tmp_path / "b.txt", b"fine")]
    with pytest.raises(UserError, match=rf"^\S+/a.txt, line 2: not valid UTF-8; {SKIP_HINT}$"):
        read(*files)
    assert read(*files, on_error="skip") == ["fine"]


@pytest.mark.parametrize(("encoding", "order"), [("utf-16", "LE"), ("utf-16-le", "LE"), ("utf-16-be", "BE")])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.json"])
def test_utf16_is_named_with_the_fix(tmp_path, encoding, order, name):
    content = (json.dumps({"text": "One line.", "messages": []}) + "\n").encode(encoding) * 2
    file = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    other = write(tmp_path / ("other.json" if name == "a.json" else "other.jsonl"), b'{"text": "fine"}\n')
    reader = RecordReader if name == "a.json" else TextReader
    message = (
        rf"{name}, line 1: UTF-16 instead of UTF-8; convert the file: iconv -f UTF-16{order} -t UTF-8 FILE > NEW; "
    )
    with pytest.raises(UserError, match=f"{re.escape(message)}{SKIP_HINT}$"):
        list(reader([file, other], on_error="stop"))
    lenient = reader([file, other], on_error="skip")
    assert len(list(lenient)) == 1
    assert lenient.num_skipped > 0
    assert lenient.why_skipped.startswith(f", first: {file}, line 1: UTF-16 instead of")


def test_a_nul_byte_is_no_text(tmp_path):
    file = write(tmp_path / "a.txt", b"one\ntwo \0" + b"three " * 200)
    with pytest.raises(UserError, match=r"a.txt, line 2: holds NUL bytes, which text never has"):
        read(file)


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.jsonl.zst"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_line_has_a_limit(tmp_path, monkeypatch, name, place):
    monkeypatch.setattr("meap_lit.data.read.formats.MAX_LINE_BYTES", 1000)
    texts = ["one", "two"]
    lines = [jsonl(text) for text in texts]
    lines.insert(place, jsonl("x" * 900_000))
    content = b"".join(lines)
    compress = {"d.jsonl": bytes, "d.jsonl.gz": gzip.compress, "d.jsonl.zst": zstandard.ZstdCompressor().compress}
    file = write(tmp_path / name, compress[name](content))
    message = (
        rf"^\S+/{name}, line {place + 1}: longer than 1,000 bytes; divide it; each line is a document; {SKIP_HINT}$"
    )
    with pytest.raises(UserError, match=message):
        read(file)
    reader = TextReader([file], on_error="skip")
    assert [entry.content for entry in reader] == texts
    assert reader.num_skipped == 1


def test_shards_agree_on_a_line_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr("meap_lit.data.read.formats.MAX_LINE_BYTES", 1000)
    texts = [str(number) * (400 if number == 3 else 5000 if number == 5 else 1) for number in range(9)]
    file = write(tmp_path / "d.jsonl", jsonl(*texts))
    readers = [TextReader([file], on_error="skip", part=InputPart(index, 4)) for index in range(4)]
    assert [entry.content for reader in readers for entry in reader] == texts[:5] + texts[6:]
    assert sum(reader.num_skipped for reader in readers) == 1


def test_too_little_memory_is_named(tmp_path, monkeypatch):
    def fail(raw, path):
        raise MemoryError

    monkeypatch.setattr("meap_lit.data.read.formats.decode", fail)
    file = write(tmp_path / "a.txt", b"a")
    with pytest.raises(
        UserError, match=r"^not enough memory to read \S+/a.txt; write its documents as lines of a .jsonl"
    ):
        read(file)


@pytest.mark.parametrize(
    "content", [b'[{"text": "a"}]', b'[\n{"text": "a"},\n{"text": "b"}\n]\n', b' [{"text": "a"},\n']
)
def test_a_json_array_named_jsonl_is_named(tmp_path, content):
    file = write(tmp_path / "d.jsonl", content)
    message = r"d.jsonl, line 1: begins a JSON array, but a .jsonl file has an object on each line; write it so"
    with pytest.raises(UserError, match=message):
        read(file)


def cut_gzip():
    return gzip.compress(jsonl(*map(str, range(5_000))))[:-2000]


def cut_zstd():
    return zstandard.ZstdCompressor().compress(jsonl(*map(str, range(5_000))))[:-5]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl.gz", cut_gzip()),
        ("d.jsonl.zst", cut_zstd()),
        ("d.jsonl.gz", b"not compressed\n"),
        ("d.jsonl.zst", b"not compressed\n"),
        ("d.jsonl.gz", b""),
        ("d.jsonl.zst", b""),
    ],
)
def test_damaged_compression(tmp_path, name, content):
    file, other = write(tmp_path / name, content), write(tmp_path / "other.txt", b"fine")
    with pytest.raises(UserError, match=rf"^\S+/{name}, line \d+: damaged or cut compressed file.*; {SKIP_HINT}$"):
        read(file, other)
    reader = TextReader([file, other], on_error="skip")
    documents = [entry.content for entry in reader]
    assert documents[-1] == "fine"
    assert documents[:-1] == list(map(str, range(len(documents) - 1)))
    assert reader.num_skipped == 1
    assert reader.why_skipped.endswith(f"; 1 file was not read to its end: {file}")


def test_every_file_that_was_cut_is_counted_after_other_bad_lines(tmp_path):
    lines = b"bad\n" + jsonl(*map(str, range(5_000)))
    files = [write(tmp_path / f"{name}.jsonl.gz", gzip.compress(lines)[:-2000]) for name in "abcd"]
    reader = TextReader(files, on_error="skip")
    assert len(list(reader)) > 1000
    assert reader.num_skipped == 8
    first, cut = reader.why_skipped.split("; ")
    assert first.startswith(f", first: {files[0]}, line 1: not valid JSON")
    assert cut == f"4 files were not read to their end: {files[0]}, {files[1]}, {files[2]}, and others"


def test_a_command_without_the_option_does_not_advise_it(tmp_path):
    file = write(tmp_path / "d.jsonl", b"not json\n")
    with pytest.raises(UserError) as caught:
        list(read_texts([file]))
    assert "on_error" not in str(caught.value)


def test_zstandard_with_a_long_window(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # the size is not known before
    file = write(tmp_path / "d.jsonl.zst", compressor.compress(jsonl("text")) + compressor.flush())
    assert read(file) == ["text"]


def test_a_field_given_twice_is_refused_where_it_counts(tmp_path):
    metadata = b'{"text": "a", "id": 1, "id": 2, "meta": {"k": 1, "k": 2}}\n'
    twice = b'{"text": "a", "text": "b"}\n'
    file = write(tmp_path / "d.jsonl", metadata + twice + jsonl("after"))
    with pytest.raises(UserError, match=r"line 2: field 'text' is given more than once; use"):
        read(file)
    assert read(file, on_error="skip") == ["a", "after"]


def test_a_record_with_a_key_given_twice_is_refused_alone(tmp_path):
    twice = '{"messages": [{"role": "user", "content": "a", "content": "b"}]}'
    file = write(tmp_path / "d.json", f'[{{"prompt": "x"}}, {twice}, {{"prompt": "y"}}]'.encode())
    with pytest.raises(UserError, match=r"element 2: key 'content' is given more than once in an object"):
        list(RecordReader([file]))
    reader = RecordReader([file], on_error="skip")
    assert [entry.content for entry in reader] == [{"prompt": "x"}, {"prompt": "y"}]
    assert (reader.num_skipped, reader.cut) == (1, [])


def test_parquet_rows_and_columns(tmp_path):
    nulls = tmp_path / "nulls.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "c"]}), nulls)
    with pytest.raises(UserError, match=rf"^\S+/nulls.parquet, row 2: field 'text' is not a string.*; {SKIP_HINT}$"):
        read(nulls)
    assert read(nulls, on_error="skip") == ["a", "c"]
    with pytest.raises(UserError, match=r"nulls.parquet has no column 'body'; it has text: name one by --text_field"):
        read(nulls, text_field="body", on_error="skip")


def test_a_value_of_parquet_that_python_cannot_hold_is_a_bad_row(tmp_path):
    dates = pyarrow.array([1, 10**7], pyarrow.date32())
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "day": dates}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"d.parquet, row 2: column 'day' cannot be read \("):
        read_records(tmp_path / "d.parquet")
    assert len(read_records(tmp_path / "d.parquet", on_error="skip")) == 1


def test_a_column_given_twice_is_named(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(UserError, match="has more than one column 'text'"):
        read(tmp_path / "d.parquet")


def test_json_may_be_nested_deeper_than_the_stack(tmp_path):
    file = write(tmp_path / "d.jsonl", b'{"a": ' + b"[" * 700 + b"]" * 700 + b"}\n")
    assert len(read_records(file)) == 1


def test_cut_parquet(tmp_path):
    whole = tmp_path / "whole.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), whole)
    cut = write(tmp_path / "cut.parquet", whole.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"^\S+/cut.parquet, row 1: cannot be read as Parquet .*; {SKIP_HINT}$"):
        read(cut)
    assert read(cut, whole, on_error="skip") == ["a", "b"]


# ------------------------------------------------------------------------------------------------- records

RECORDS = [{"messages": [{"role": "user", "content": "ä"}], "id": 1}, {"messages": [], "id": None}]


def read_records(*files, **options):
    return [record.content for record in RecordReader(list(files), **options)]


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
    assert find_input([str(tmp_path)], formats=RECORD_FORMATS).files == sorted([*files, tmp_path / "one.json"])


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
    with pytest.raises(UserError, match=r"a.txt must end in one of .json, .jsonl, .jsonl.gz, .jsonl.zst, .parquet$"):
        find_input([str(text)], formats=RECORD_FORMATS)
    with pytest.raises(
        UserError, match=r"b.json must end in one of .txt, .*; name its ending in --suffixes to read it as"
    ):
        find_files([str(records)])
    assert read(*find_files([str(records)], [".json"])) == ['{"text": "t"}']
