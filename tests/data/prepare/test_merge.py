import dataclasses
import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from litdata import StreamingDataset, TokensLoader

from meap_lit.cli import main
from meap_lit.data.prepare.chat import PrepareChat
from meap_lit.data.prepare.merge import MergeParts
from meap_lit.data.prepare.text import PrepareText
from meap_lit.data.read.find import find_files
from meap_lit.data.read.readers import InputPart, TextReader, read_texts
from meap_lit.data.store.manifest import Manifest, load_samples
from meap_lit.errors import UserError
from tests.support.older_dataset import make_older


def texts(number):
    return [f"Document {i}. " + "How vexingly quick daft zebras jump! " * (i % 7) for i in range(number)]


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def texts_of(files, part):
    return [entry.content for entry in TextReader(files, part=part)]


def items_in(folder):
    """The bytes of every item of the chunks of a split, parsed after the format that LitData's writer describes."""
    items = []
    for chunk in json.loads((folder / "index.json").read_text())["chunks"]:
        raw = (folder / chunk["filename"]).read_bytes()
        count = int.from_bytes(raw[:4], "little")
        offsets = np.frombuffer(raw, np.uint32, count + 1, offset=4)
        items += [raw[start:stop] for start, stop in pairwise(offsets)]
    return items


def documents_of(dataset, kind="text"):
    """How often each document stands in each split."""
    return {name: Counter(items_in(dataset / name)) for name in Manifest.load(str(dataset), kind=kind).splits}


# --------------------------------------------------------------------------------------- what a part reads


def every_format(folder):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(9)).encode()
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\n"))
    (folder / "b.jsonl").write_bytes(lines.rstrip())
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "d.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts(9)}), folder / "e.parquet", row_group_size=2)
    for name in ("f.txt", "g.md"):
        (folder / name).write_text(f"text of {name}")
    for name in ("0.txt", "0.jsonl", "h.jsonl", "h.txt"):
        (folder / name).touch()
    return find_files([str(folder)])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 100, 2000])
def test_parts_read_every_document_once_and_in_order(tmp_path, count):
    files = every_format(tmp_path / "in")
    whole = list(read_texts(files))
    assert len(whole) == 5 * 9 + 4
    shared_out, num_bytes = [], 0
    for index in range(count):
        reader = TextReader(files, part=InputPart(index, count))
        seen = []
        for entry in reader:
            shared_out.append(entry.content)
            seen.append(reader.bytes_read)
        assert seen == sorted(seen)
        assert reader.bytes_read == reader.num_bytes
        num_bytes += reader.num_bytes
    assert shared_out == whole
    assert num_bytes == sum(file.stat().st_size for file in files)


def test_a_file_of_lines_is_divided_anywhere(tmp_path):
    documents = ["a", "", "ccc", "d" * 30, "e"]
    file = write_jsonl(tmp_path / "in.jsonl", documents)
    for count in range(1, file.stat().st_size + 5):
        parts = [texts_of([file], InputPart(index, count)) for index in range(count)]
        assert list(chain(*parts)) == documents


def shares(files, count):
    return [len(texts_of(files, InputPart(index, count))) for index in range(count)]


def test_parts_are_of_equal_size(tmp_path):
    same = ["all of one length"] * 120
    huge = write_jsonl(tmp_path / "huge.jsonl", same)
    assert max(shares([huge], 4)) - min(shares([huge], 4)) <= 1
    pyarrow.parquet.write_table(pyarrow.table({"text": same}), tmp_path / "huge.parquet", row_group_size=10)
    assert shares([tmp_path / "huge.parquet"], 4) == [30, 30, 30, 30]
    small = [tmp_path / f"{number}.txt" for number in range(100)]
    for file in small:
        file.write_text("all of one length")
    assert shares(small, 4) == [25, 25, 25, 25]
    unequal = [tmp_path / f"{number}.jsonl.gz" for number in range(4)]
    for file, filler in zip(unequal, (2000, 1700, 2300, 2000), strict=True):
        file.write_bytes(gzip.compress(json.dumps({"text": os.urandom(filler).hex()}).encode()))
    assert shares(unequal, 4) == [1, 1, 1, 1]


def test_a_bad_line_of_a_part_is_named_by_its_byte(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' * 20 + b'{"text": 7}\n' + b'{"text": "fine"}\n' * 2)
    with pytest.raises(UserError, match=r"in.jsonl, byte 340: field 'text' is not a string but int$"):
        texts_of([file], InputPart(1, 2))
    assert file.read_bytes()[340:].startswith(b'{"text": 7}')
    assert texts_of([file], InputPart(0, 2)) == ["fine"] * 12
    with pytest.raises(UserError, match=r"in.jsonl, line 21: field"):
        texts_of([file], InputPart(0, 1))


def test_a_bad_row_of_a_part_is_named_by_its_number_in_the_file(tmp_path):
    file = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [*"abcdefg", None, "i"]}), file, row_group_size=2)
    assert texts_of([file], InputPart(0, 2)) == list("abcd")
    with pytest.raises(UserError, match=r"in.parquet, row 8: field 'text' is not a string"):
        texts_of([file], InputPart(1, 2))


# -------------------------------------------------------------------------------------------------- result


def prepare_text(output, source, tokenizer, **options):
    options = {"val_share": 0.1, "chunk_bytes": "2KB", "num_workers": 1, **options}
    PrepareText(output=str(output), input=[str(source)], tokenizer=tokenizer, **options).run()


def prepare_chat(output, source, tokenizer, **options):
    options = {"val_share": 0.1, "chunk_bytes": "2KB", "num_workers": 1, "template": "mistral", **options}
    PrepareChat(output=str(output), input=[str(source)], tokenizer=tokenizer, **options).run()


def merge(output, *parts):
    MergeParts(output=str(output), input=[str(part) for part in parts]).run()
    return output


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    write_jsonl(folder / "a.jsonl", [*texts(120), "", " "])
    (folder / "b.txt").write_text("A file of its own.")
    write_jsonl(folder / "c.jsonl", texts(40))
    return folder


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_merged_text_is_what_one_run_makes(tmp_path, sources, tokenizer, tokenizer_folder, count, capsys):
    prepare_text(tmp_path / "one", sources, tokenizer_folder)
    for index in range(count):
        prepare_text(tmp_path / "parts" / f"s{index}", sources, tokenizer_folder, shard=f"{index}/{count}")
    assert f"s0, part 0/{count} for prepare merge\n" in capsys.readouterr().out
    merged = merge(tmp_path / "merged", tmp_path / "parts" / "*")
    assert documents_of(merged) == documents_of(tmp_path / "one")
    assert sum(map(len, documents_of(merged).values())) > 100

    expected = Manifest.load(str(tmp_path / "one"))
    found = Manifest.load(str(merged))
    sizes = {name: (split.documents, split.tokens) for name, split in expected.splits.items()}
    assert {name: (split.documents, split.tokens) for name, split in found.splits.items()} == sizes
    assert dataclasses.replace(found, splits=expected.splits) == expected
    assert expected.num_empty == 2

    for name, split in found.splits.items():  # as a run reads it
        blocks = StreamingDataset(str(merged / name), item_loader=TokensLoader(block_size=1))
        assert len(blocks) == split.tokens
        tokens = [int(block) for block in blocks]
        assert tokens.count(tokenizer.eos_token_id) == split.documents
        assert np.array(tokens, np.uint16).tobytes() == b"".join(items_in(merged / name))
    printed = capsys.readouterr().out
    assert f"dataset {merged}, of {count} parts\n" in printed
    assert "  in all   161 documents, " in printed


def test_chunk_files_are_those_of_the_parts(tmp_path, sources, tokenizer_folder):
    names = ("first", "second")
    for index, name in enumerate(names):
        prepare_text(tmp_path / name, sources, tokenizer_folder, shard=f"{index}/2")
    merged = merge(tmp_path / "merged", *[tmp_path / name for name in reversed(names)])
    chunks = [
        tmp_path / name / "train" / chunk["filename"]
        for name in names
        for chunk in json.loads((tmp_path / name / "train" / "index.json").read_text())["chunks"]
    ]
    assert len(chunks) > 4
    index = json.loads((merged / "train" / "index.json").read_text())
    assert len(index["chunks"]) == len(chunks)
    for chunk, original in zip(index["chunks"], chunks, strict=True):
        assert (merged / "train" / chunk["filename"]).samefile(original)  # a link, not a copy
    again = merge(tmp_path / "again", tmp_path / "first", tmp_path / "second")
    assert Manifest.load(str(again)).fingerprint == Manifest.load(str(merged)).fingerprint
    assert Manifest.load(str(again)).fingerprint != Manifest.load(str(tmp_path / "first")).fingerprint
    assert index["updated_at"] == Manifest.load(str(merged)).splits["train"].fingerprint
    shutil.rmtree(tmp_path / "first")
    Manifest.load(str(merged))


def test_chunk_files_are_copied_where_links_cannot_be(tmp_path, sources, tokenizer_folder, monkeypatch):
    def refuse(*paths):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    prepare_text(tmp_path / "shard", sources, tokenizer_folder, shard="0/1")
    monkeypatch.setattr(os, "link", refuse)
    merged = merge(tmp_path / "merged", tmp_path / "shard")
    assert documents_of(merged) == documents_of(tmp_path / "shard")
    assert not (merged / "train" / "chunk-0-0.bin").samefile(tmp_path / "shard" / "train" / "chunk-0-0.bin")


def rewrite(file):
    """Edit a file and keep its size."""
    file.write_text(file.read_text().replace("Document", "Dokument"))


@pytest.mark.parametrize("edited", ["a.jsonl", "b.jsonl"])
def test_a_file_that_changed_after_a_part_had_read_it_is_refused(tmp_path, tokenizer_folder, edited):
    """Part 0 reads a.jsonl, part 1 the rest of it, and b.jsonl; part 2 neither."""
    source = tmp_path / "in"
    source.mkdir()
    write_jsonl(source / "a.jsonl", texts(40))
    write_jsonl(source / "b.jsonl", texts(3))
    (source / "c.jsonl").write_bytes((source / "a.jsonl").read_bytes())
    for index in range(2):
        prepare_text(tmp_path / f"s{index}", source, tokenizer_folder, shard=f"{index}/3")
    rewrite(source / edited)
    prepare_text(tmp_path / "s2", source, tokenizer_folder, shard="2/3")
    reader = 0 if edited == "a.jsonl" else 1
    message = rf"^{source}/{edited} has changed since part {reader}/3 in {tmp_path}/s{reader} was made from it; prepare"
    with pytest.raises(UserError, match=message):
        merge(tmp_path / "merged", tmp_path / "s?")
    for index in range(2):
        shutil.rmtree(tmp_path / f"s{index}")
        prepare_text(tmp_path / f"s{index}", source, tokenizer_folder, shard=f"{index}/3")
    merged = merge(tmp_path / "merged", tmp_path / "s?")
    prepare_text(tmp_path / "one", source, tokenizer_folder)
    assert documents_of(merged) == documents_of(tmp_path / "one")


def test_a_file_that_changed_between_two_parts_that_read_it_is_refused(tmp_path, tokenizer_folder):
    source = write_jsonl(tmp_path / "in.jsonl", texts(20))
    prepare_text(tmp_path / "s0", source, tokenizer_folder, shard="0/2")
    rewrite(source)
    prepare_text(tmp_path / "s1", source, tokenizer_folder, shard="1/2")
    message = rf"^part 1/2 in \S+ was made from other input than part 0/2 in \S+: {source} has changed in between; prep"
    with pytest.raises(UserError, match=message):
        merge(tmp_path / "merged", tmp_path / "s?")
    record = tmp_path / "s0" / "preparation.json"
    content = json.loads(record.read_text())
    del content["files"]
    record.write_text(json.dumps(content))  # of an earlier version
    merge(tmp_path / "merged", tmp_path / "s?")


def test_parts_of_copies_with_other_times_are_merged(tmp_path, tokenizer_folder):
    source = tmp_path / "in"
    source.mkdir()
    for name in "ab":
        write_jsonl(source / f"{name}.jsonl", texts(20))
    for index in range(2):
        prepare_text(tmp_path / f"s{index}", source, tokenizer_folder, shard=f"{index}/2")
        for file in source.iterdir():
            os.utime(file, (index, index))  # as of a copy
    merge(tmp_path / "merged", tmp_path / "s?")
    shutil.rmtree(source)
    merge(tmp_path / "without_the_input", tmp_path / "s?")


@pytest.mark.parametrize("on_long", ["drop", "truncate"])
def test_merged_conversations_are_what_one_run_makes(tmp_path, tokenizer_folder, on_long):
    turns = [{"role": role, "content": text} for role, text in [("user", "Go on?"), ("assistant", "Yes, quick.")]]
    with open(tmp_path / "in.jsonl", "w") as file:
        for number in range(90):
            turn = {"role": "user", "content": f"Number {number}?"}
            messages = [turn, *turns[1:], *turns * (number % 5)]
            file.write(json.dumps({"messages": messages if number % 30 else "none"}) + "\n")
    options = {"max_tokens": 100, "on_long": on_long, "on_error": "skip"}
    prepare_chat(tmp_path / "one", tmp_path / "in.jsonl", tokenizer_folder, **options)
    for index in range(3):
        prepare_chat(tmp_path / f"s{index}", tmp_path / "in.jsonl", tokenizer_folder, shard=f"{index}/3", **options)
    merged = merge(tmp_path / "merged", *[tmp_path / f"s{index}" for index in range(3)])
    assert documents_of(merged, "chat") == documents_of(tmp_path / "one", "chat")

    expected = Manifest.load(str(tmp_path / "one"), kind="chat")
    found = Manifest.load(str(merged), kind="chat")
    assert dataclasses.replace(found, splits=expected.splits) == expected
    assert found.num_skipped == 3
    assert (found.chat.num_dropped > 5, found.chat.num_truncated > 5) == (on_long == "drop", on_long == "truncate")
    for name, split in found.splits.items():
        differing = {"fingerprint": "", "files": {}}
        assert dataclasses.replace(split, **differing) == dataclasses.replace(expected.splits[name], **differing)
        samples = list(StreamingDataset(str(merged / name)))
        table = load_samples(str(merged), name, files=split.files)
        assert table.num_tokens.tolist() == [len(sample["input_ids"]) for sample in samples]
        assert table.num_answers.tolist() == [len(sample["answers"]) for sample in samples]
        start, stop, end = np.concatenate([sample["answers"].numpy() for sample in samples]).T
        assert table.answer_tokens.tolist() == np.stack([stop - start, end - stop], axis=1).tolist()


def test_a_merged_dataset_trains(tmp_path, prepared, toy_recipe, capsys):
    for index in range(2):
        prepare_text(tmp_path / f"s{index}", prepared.texts, prepared.tokenizer, shard=f"{index}/2")
    merged = merge(tmp_path / "merged", tmp_path / "s?")
    arguments = ["--config", str(toy_recipe), "--data.datasets", str(merged), "--budget.max_steps", "2"]
    assert main(["fit", *arguments]) == 0
    assert "clean validation loss" in capsys.readouterr().out


# ------------------------------------------------------------------------------- few documents, or none


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_validation_document_of_a_small_corpus_is_that_of_one_run(tmp_path, tokenizer_folder, count):
    source = write_jsonl(tmp_path / "in.jsonl", ["one", "two", "three", "four", "one"])
    prepare_text(tmp_path / "one", source, tokenizer_folder, val_share=1e-9)
    for index in range(count):
        prepare_text(tmp_path / f"s{index}", source, tokenizer_folder, val_share=1e-9, shard=f"{index}/{count}")
    merged = merge(tmp_path / "merged", tmp_path / "s?")
    assert documents_of(merged) == documents_of(tmp_path / "one")
    assert {name: split.documents for name, split in Manifest.load(str(merged)).splits.items()} == {
        "train": 3,
        "val": 2,
    }


def test_a_document_kept_back_is_trained_on_if_another_part_has_one_for_validation(tmp_path, tokenizer_folder):
    source = write_jsonl(tmp_path / "in.jsonl", texts(12))
    prepare_text(tmp_path / "one", source, tokenizer_folder, val_share=0.1)
    for index in range(3):
        prepare_text(tmp_path / f"s{index}", source, tokenizer_folder, val_share=0.1, shard=f"{index}/3")
    splits = [set(Manifest.load(str(tmp_path / f"s{index}")).splits) for index in range(3)]
    assert {"train", "val"} in splits
    assert {"train", "reserve"} in splits
    merged = merge(tmp_path / "merged", tmp_path / "s?")
    assert documents_of(merged) == documents_of(tmp_path / "one")


def test_a_part_without_a_document(tmp_path, tokenizer_folder, capsys):
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text("" if index == 1 else f"text {index}")
    for index in range(5):
        prepare_text(tmp_path / f"s{index}", tmp_path / "?.txt", tokenizer_folder, val_share=0, shard=f"{index}/5")
    sizes = [Manifest.load(str(tmp_path / f"s{index}")).splits for index in range(5)]
    assert sum(size == {} for size in sizes) >= 3
    assert "in all   0 documents, 0 tokens" in capsys.readouterr().out
    merged = merge(tmp_path / "merged", tmp_path / "s?")
    assert Manifest.load(str(merged)).splits["train"].documents == 2
    assert Manifest.load(str(merged)).num_empty == 1

    (tmp_path / "in.json").write_text(json.dumps([{"prompt": "q", "completion": "a"}]))
    for index in range(2):
        prepare_chat(tmp_path / f"c{index}", tmp_path / "in.json", tokenizer_folder, val_share=0, shard=f"{index}/2")
    assert "in all   0 conversations, 0 tokens" in capsys.readouterr().out
    merged = merge(tmp_path / "chat", tmp_path / "c?")
    assert Manifest.load(str(merged), kind="chat").splits["train"].documents == 1


def test_no_document_in_any_part_and_none_to_train_on(tmp_path, tokenizer_folder):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "one.txt").write_text("only one")
    for index in range(2):
        prepare_text(tmp_path / f"e{index}", tmp_path / "empty.txt", tokenizer_folder, shard=f"{index}/2")
        prepare_text(tmp_path / f"s{index}", tmp_path / "one.txt", tokenizer_folder, shard=f"{index}/2")
    with pytest.raises(UserError, match=r"^the 2 parts hold no document"):
        merge(tmp_path / "merged", tmp_path / "e?")
    with pytest.raises(UserError, match=r"took 1 of 1; prepare the parts again with a val_share below 0.1, or 0 for"):
        merge(tmp_path / "merged", tmp_path / "s?")
    assert not (tmp_path / "merged").exists()


# ---------------------------------------------------------------------------------------------------- a kill


@pytest.mark.slow
def test_a_part_that_was_killed_is_no_part(tmp_path, tokenizer_folder, capsys):
    source = write_jsonl(tmp_path / "in.jsonl", [f"{number}: {text}" for number in range(240) for text in texts(50)])
    parts = tmp_path / "parts"
    parts.mkdir()
    command = [sys.executable, "-m", "meap_lit", "prepare", "text", "--chunk_bytes", "100KB", "--num_workers", "1"]
    command += ["--input", source, "--tokenizer", tokenizer_folder, "--shard", "1/2", "--output", parts / "1"]
    killed = subprocess.Popen(
        command, cwd=Path(__file__).parents[3], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(parts.glob("1.partial-*/train")):
        assert killed.poll() is None, killed.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.kill()
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    options = {"val_share": 0.01, "chunk_bytes": "100KB"}
    prepare_text(parts / "0", source, tokenizer_folder, shard="0/2", **options)

    arguments = ["prepare", "merge", "--input", str(parts / "*"), "--output", str(tmp_path / "merged")]
    assert len(list(parts.iterdir())) == 2  # what was left behind is no part
    assert main(arguments) == 2
    assert capsys.readouterr().err.endswith(
        "error: 1 of 2 parts missing: 1/2; prepare each with its --shard and name its folder too\n"
    )
    prepare_text(parts / "1", source, tokenizer_folder, shard="1/2", **options)
    assert sorted(path.name for path in parts.iterdir()) == ["0", "1"]
    assert main(arguments) == 0
    prepare_text(tmp_path / "one", source, tokenizer_folder, **options)
    found = documents_of(tmp_path / "merged")
    assert found == documents_of(tmp_path / "one")
    assert sum(counts.total() for counts in found.values()) == 12_000
    shares = [sum(split.documents for split in Manifest.load(str(parts / name)).splits.values()) for name in "01"]
    assert min(shares) > 5_900


# ----------------------------------------------------------------------------------------------- wrong input


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tokenizer, tokenizer_folder):
    """Two parts, `0` and `1`, and others that do not go with the first."""
    folder = tmp_path_factory.mktemp("parts")
    source = write_jsonl(folder / "in.jsonl", texts(20))
    tokenizer.save(folder / "tokenizer")
    content = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(content | {"normalizer": {"type": "Lowercase"}}))
    for index in range(2):
        prepare_text(folder / str(index), source, tokenizer_folder, shard=f"{index}/2")
    prepare_text(folder / "whole", source, tokenizer_folder)
    prepare_text(folder / "of_three", source, tokenizer_folder, shard="1/3")
    prepare_text(folder / "other_tokenizer", source, str(folder / "tokenizer"), shard="1/2")
    prepare_text(folder / "other_share", source, tokenizer_folder, shard="1/2", val_share=0.2)
    prepare_text(folder / "other_chunks", source, tokenizer_folder, shard="1/2", chunk_bytes="4KB")
    prepare_text(folder / "skipping", source, tokenizer_folder, shard="1/2", on_error="skip")
    with source.open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    prepare_text(folder / "longer_input", source, tokenizer_folder, shard="1/2")
    (folder / "more").mkdir()
    shutil.copy(source, folder / "more" / "in.jsonl")
    (folder / "chat.json").write_text(json.dumps([{"prompt": "q", "completion": "a"}] * 4))
    options = {"val_share": 0, "system": "Be brief."}
    for name, changes in {
        "chat0": {"shard": "0/2"},
        "chat1": {"shard": "1/2"},
        "chat_template": {"shard": "1/2", "template": "alpaca"},
        "chat_system": {"shard": "1/2", "system": "Be kind."},
    }.items():
        prepare_chat(folder / name, folder / "chat.json", tokenizer_folder, **{**options, **changes})
    return folder


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("0", r"1 of 2 parts missing: 1/2; prepare each with its --shard and name its folder too"),
        ("0 1 0", r"part 0/2 in \S+/0 appears twice, the second time in \S+/0; name one of the two"),
        (
            "0 other_share 1",
            r"part 1/2 in \S+/other_share appears twice, the second time in \S+/1; name one",
        ),
        (
            "0 of_three",
            r"part 1/3 in \S+/of_three and part 0/2 in \S+/0 are parts of different datasets: name parts of",
        ),
        (
            "0 other_tokenizer",
            r"part 1/2 in \S+ was made with tokenizer \w{8}, part 0/2 in \S+/0 with tokenizer \w{8};",
        ),
        (
            "0 other_share",
            r"part 1/2 in \S+ was made with val_share 0.2, part 0/2 in \S+/0 with val_share 0.1; prepare",
        ),
        (
            "0 other_chunks",
            r"part 1/2 in \S+ was made with chunk_bytes 4KB, part 0/2 in \S+/0 with chunk_bytes 2KB; pr",
        ),
        (
            "0 longer_input",
            r"part 1/2 in \S+/longer_input was made from other input than part 0/2 in \S+/0: "
            r"\S+/in.jsonl of \d+ bytes where that has \S+/in.jsonl of \d+ bytes; prepare one of the two again",
        ),
        (
            "0 chat1",
            r"part 1/2 in \S+/chat1 was made with prepare chat, part 0/2 in \S+/0 with prepare text; prepare",
        ),
        (
            "chat0 chat_template",
            r"part 1/2 in \S+ was made with template alpaca \(\w{8}\), part 0/2 in \S+ with templa",
        ),
        (
            "chat0 chat_system",
            r"part 1/2 in \S+ was made with system Be kind., part 0/2 in \S+ with system Be brief.;",
        ),
        (
            "0 whole",
            r"input \S+/whole is not a part but a whole dataset, prepared without --shard; name the folders that",
        ),
        (
            "0 tokenizer",
            r"input \S+/tokenizer is not a part of a dataset; name the folders that prepare text or prepare ch",
        ),
        (
            "0 nowhere",
            r"input \S+/nowhere is not a folder; name the folders that prepare text or prepare ch",
        ),
        ("0 none*", r"input \S+/none\* is not a folder; name the folders"),
    ],
)
def test_what_does_not_make_a_dataset(tmp_path, parts, names, message):
    with pytest.raises(UserError, match=f"^{message}"):
        merge(tmp_path / "merged", *[parts / name for name in names.split()])
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_of_the_input_is_named(tmp_path, sources, tokenizer_folder):
    prepare_text(tmp_path / "0", sources, tokenizer_folder, shard="0/2")
    prepare_text(tmp_path / "1", sources / "[ab].*", tokenizer_folder, shard="1/2")
    with pytest.raises(
        UserError, match=r"made from other input .*: no further file where that has \S+/c.jsonl of \d+ bytes;"
    ):
        merge(tmp_path / "merged", tmp_path / "0", tmp_path / "1")


def test_many_missing_parts_are_counted(tmp_path, sources, tokenizer_folder):
    prepare_text(tmp_path / "3", sources, tokenizer_folder, shard="3/100")
    with pytest.raises(UserError, match=r"^99 of 100 parts missing: 0/100, .*8/100 and 91 more; prepare each"):
        merge(tmp_path / "merged", tmp_path / "3")


def test_an_output_that_exists_is_not_touched(tmp_path, parts):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UserError, match=r"^output \S+ exists already; remove it or name another --output"):
        merge(tmp_path, parts / "0", parts / "1")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_one_part_may_skip_what_the_others_did_not_meet(tmp_path, parts):
    merged = merge(tmp_path / "merged", parts / "0", parts / "skipping")
    assert documents_of(merged) == documents_of(parts / "whole")


def test_a_damaged_or_missing_chunk_is_found(tmp_path, parts):
    for name in "01":
        shutil.copytree(parts / name, tmp_path / name)
        make_older(tmp_path / name)
    index = tmp_path / "1" / "train" / "index.json"
    content = json.loads(index.read_text())
    content["chunks"][0]["sha256"] = "0" * 64
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"^chunk \S+/1/train/chunk-0-0.bin differs from its SHA-256 in index.json"):
        merge(tmp_path / "merged", tmp_path / "0", tmp_path / "1")
    (tmp_path / "1" / "train" / "chunk-0-0.bin").unlink()
    with pytest.raises(UserError, match=r"^chunk \S+/1/train/chunk-0-0.bin is missing; the dataset is incomplete"):
        merge(tmp_path / "merged", tmp_path / "0", tmp_path / "1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_parts_stored_by_different_versions_of_litdata(tmp_path, parts):
    for name in "01":
        shutil.copytree(parts / name, tmp_path / name)
        make_older(tmp_path / name)
    index = tmp_path / "1" / "train" / "index.json"
    content = json.loads(index.read_text())
    content["config"]["item_loader"], content["config"]["new"] = "TokensLoader", 1
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"^\S+/1/train and \S+/0/train are stored differently, as by two versions"):
        merge(tmp_path / "merged", tmp_path / "0", tmp_path / "1")


@pytest.mark.parametrize("text", ["3/3", "4/3", "x", "1", "/3", "0/0", "-1/3", "1/3/5", ""])
def test_wrong_part(text):
    expected = (
        r"^shard must be i/n with i from 0 to n - 1, such as 0/8 for the first of eight and 7/8 for the last, got '"
    )
    with pytest.raises(UserError, match=f"{expected}{text}'$"):
        InputPart.parse(text)
