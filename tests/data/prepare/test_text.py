import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from litdata import StreamingDataset, TokensLoader
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors
from transformers import AutoTokenizer

from meap_lit.data.prepare.merge import MergeParts
from meap_lit.data.prepare.text import PrepareText
from meap_lit.data.read.find import find_files
from meap_lit.data.store.manifest import Manifest
from meap_lit.errors import UserError
from meap_lit.tokenizer.tokenizer import Tokenizer
from tests.support.object_store import one_store, store  # noqa: F401  fixtures
from tests.support.word_tokenizer import save_word_level

pytestmark = pytest.mark.slow


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def prepare(output, source, tokenizer_folder, **options):
    options = {"num_workers": 1, "val_share": 0.0, **options}
    PrepareText(output=str(output), input=[str(source)], tokenizer=tokenizer_folder, **options).run()


def read_tokens(folder):
    """All tokens of a split, read by LitData."""
    blocks = StreamingDataset(str(folder), item_loader=TokensLoader(block_size=1))
    return [int(block) for block in blocks]


def files_in(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def documents(number):
    return [f"Document {i}. " + "How vexingly quick daft zebras jump! " * (i % 7) for i in range(number)]


def leftovers(folder):
    return [path.name for path in folder.iterdir() if "partial" in path.name]


# -------------------------------------------------------------------------------------------------- result


def test_documents_are_closed_by_end_of_text(tmp_path, tokenizer, tokenizer_folder, capsys):
    texts = ["first", "", " \n\t", "second [MASK]", "third"]
    prepare(tmp_path / "out", write_jsonl(tmp_path / "in.jsonl", texts), tokenizer_folder)
    expected = []
    for text in ("first", "second [MASK]", "third"):
        expected += [*tokenizer.encode(text), tokenizer.eos_token_id]
    assert read_tokens(tmp_path / "out" / "train") == expected
    assert sorted(files_in(tmp_path / "out")) == [
        "manifest.json",
        "preparation.json",
        "train/chunk-0-0.bin",
        "train/index.json",
    ]
    printed = capsys.readouterr().out
    assert f"train    3 documents, {len(expected)} tokens\n" in printed
    assert "left out 2 empty, 0 unreadable\n" in printed
    assert f"dataset {tmp_path / 'out'}\n" in printed
    assert "MB/s" in printed


SINGERS = "In Oslo Anna sings. In Lima Hugo sings. In Paris Maria sings. "


def test_stored_truncation_and_padding_do_nothing(tmp_path, tokenizer_folder):
    """transformers writes them into tokenizer.json once a call has used them."""
    source = write_jsonl(tmp_path / "in.jsonl", [SINGERS * 5, "short one"])
    prepare(tmp_path / "clean", source, tokenizer_folder)
    theirs = AutoTokenizer.from_pretrained(tokenizer_folder, pad_token="<|endoftext|>")
    theirs([SINGERS, "short one"], truncation=True, max_length=16, padding=True)
    theirs.save_pretrained(tmp_path / "called")
    stored = json.loads((tmp_path / "called" / "tokenizer.json").read_text())
    assert None not in (stored["truncation"], stored["padding"])
    prepare(tmp_path / "out", source, str(tmp_path / "called"))
    tokens = read_tokens(tmp_path / "out" / "train")
    assert tokens == read_tokens(tmp_path / "clean" / "train")
    assert tokens.count(0) == 2
    expected = [theirs.encode(text, add_special_tokens=False) for text in (SINGERS * 5, "short one")]
    assert tokens == [*expected[0], 0, *expected[1], 0]


def test_documents_begin_as_the_tokenizer_begins_a_text(tmp_path, tokenizer):
    backend = tokenizer.copy_backend()
    backend.add_special_tokens(["<s>"])
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=[("<s>", bos), ("<|endoftext|>", 0)]
    )
    Tokenizer(backend, {"bos_token": "<s>", "eos_token": "<|endoftext|>"}).save(tmp_path / "t")
    prepare(tmp_path / "out", write_jsonl(tmp_path / "in.jsonl", ["first", " ", "second"]), str(tmp_path / "t"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert read_tokens(tmp_path / "out" / "train") == theirs("first").input_ids + theirs("second").input_ids
    assert theirs("first").input_ids[:: len(theirs("first").input_ids) - 1] == [bos, 0]  # one EOS, not two


def test_unknown_text_is_counted(tmp_path, capsys, tokenizer_folder):
    save_word_level(tmp_path / "t", 10, has_mask=True, unk_token="w3")
    backend = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    backend["model"]["unk_token"] = "w3"
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(backend))
    source = write_jsonl(tmp_path / "in.jsonl", ["w4 w5 strange", "w6 words"])
    prepare(tmp_path / "out", source, str(tmp_path / "t"))
    assert "unknown  2 tokens (28.57%) of text outside the vocabulary\n" in capsys.readouterr().out
    prepare(tmp_path / "known", source, tokenizer_folder)
    assert "  unknown  " not in capsys.readouterr().out


def test_text_that_leaves_no_token_is_said(tmp_path, capsys):
    backend = Backend(models.BPE({"</s>": 0, "a": 1}, []))
    Tokenizer(backend, {}).save(tmp_path / "t")
    prepare(tmp_path / "out", write_jsonl(tmp_path / "in.jsonl", ["aba"]), str(tmp_path / "t"))
    assert read_tokens(tmp_path / "out" / "train") == [1, 1, 0]
    assert "unknown  characters outside the vocabulary are left out" in capsys.readouterr().out


def test_manifest_of_the_result(tmp_path, tokenizer, tokenizer_folder):
    source = write_jsonl(tmp_path / "in.jsonl", documents(50))
    prepare(tmp_path / "out", source, tokenizer_folder, val_share=0.2)
    manifest = Manifest.load(str(tmp_path / "out"))
    manifest.check_tokenizer(tokenizer, dataset="out", tokenizer_folder=tokenizer_folder)
    assert manifest.vocab_size == 300
    assert (manifest.eos_token_id, manifest.mask_token_id, manifest.bos_token_id) == (0, 1, None)
    assert manifest.dtype == "uint16"
    assert [(entry.path, entry.bytes) for entry in manifest.sources] == [(source, os.path.getsize(source))]
    for name, split in manifest.splits.items():
        tokens = read_tokens(tmp_path / "out" / name)
        assert len(tokens) == split.tokens
        assert tokens.count(tokenizer.eos_token_id) == split.documents
    assert sum(split.documents for split in manifest.splits.values()) == 50


def test_large_vocabulary_is_stored_as_int32(tmp_path, tokenizer_folder):
    content = json.loads(Path(tokenizer_folder, "tokenizer.json").read_text())
    content["model"]["vocab"]["<|far|>"] = 70_000
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "tokenizer.json").write_text(json.dumps(content))
    prepare(tmp_path / "out", write_jsonl(tmp_path / "in.jsonl", ["abc"]), str(tmp_path / "large"))
    tokenizer = Tokenizer.load(str(tmp_path / "large"))
    assert tokenizer.vocab_size == 70_001
    assert Manifest.load(str(tmp_path / "out")).dtype == "int32"
    assert read_tokens(tmp_path / "out" / "train") == [*tokenizer.encode("abc"), tokenizer.eos_token_id]


def test_the_number_of_workers_changes_no_byte(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setattr("meap_lit.data.prepare.text.TextEncoder.batch_size", 300)  # many batches for each worker
    source = write_jsonl(tmp_path / "in.jsonl", documents(200))
    results = []
    for num_workers in (1, 2, 3):
        output = tmp_path / str(num_workers) / "out"
        prepare(output, source, tokenizer_folder, val_share=0.1, chunk_bytes="1KB", num_workers=num_workers)
        results.append(files_in(output))
    assert results[0] == results[1] == results[2]
    assert len([name for name in results[0] if name.startswith("train/chunk")]) > 2


def test_plain_text_code_is_read_with_its_suffix(tmp_path, tokenizer_folder):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.py").write_text("def add(a, b):\n    return a + b\n")
    (tmp_path / "in" / "notes.txt").write_text("not wanted")
    prepare(tmp_path / "out", tmp_path / "in", tokenizer_folder, suffixes=[".py"])
    assert [Path(source.path).name for source in Manifest.load(str(tmp_path / "out")).sources] == ["a.py"]


def test_remote_input_makes_the_same_dataset(tmp_path, store, tokenizer_folder, monkeypatch):  # noqa: F811
    """Files of every kind, from object storage and from a web server, of which a part begins within a file."""
    folder = store.root / "bucket" / "texts"
    (folder / "more").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", documents(50))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.table({"text": documents(9)}), folder / "more" / "c.parquet")
    for name in ("more/.hidden.txt", "preparation.json", "more/d.csv"):
        (folder / name).write_text("not read")
    store.put_into_environment(monkeypatch)
    inputs = {
        "local": [str(folder)],
        "s3": ["s3://bucket/texts"],
        "patterns": ["s3://bucket/texts/[ab].*", "s3://bucket/texts/**/*.parquet"],
        "web": [f"{store.endpoint}/files/bucket/texts/{name}" for name in ("a.jsonl", "b.jsonl.gz", "more/c.parquet")],
    }
    for kind, input in inputs.items():
        options = {"tokenizer": tokenizer_folder, "val_share": 0.1, "num_workers": 1}
        PrepareText(output=str(tmp_path / kind), input=input, **options).run()
        PrepareText(output=str(tmp_path / f"{kind}-part"), input=input, shard="1/3", **options).run()
    for part in ("", "-part"):
        expected = Manifest.load(str(tmp_path / f"local{part}"))
        assert sum(split.documents for split in expected.splits.values()) >= 20
        for kind in ("s3", "patterns", "web"):
            manifest = Manifest.load(str(tmp_path / f"{kind}{part}"))
            assert manifest.splits == expected.splits
            assert [source.bytes for source in manifest.sources] == [source.bytes for source in expected.sources]
    assert Manifest.load(str(tmp_path / "s3")).sources[2].path == "s3://bucket/texts/more/c.parquet"


def test_a_remote_folder_that_is_named_is_read_also_below_a_hidden_one(store, monkeypatch):  # noqa: F811
    folder = store.root / "bucket" / ".staging" / "texts"
    (folder / ".hidden").mkdir(parents=True)
    for name in ("a.txt", ".hidden/b.txt"):
        (folder / name).write_text("x")
    store.put_into_environment(monkeypatch)
    for name in ("s3://bucket/.staging/texts", "s3://bucket/.staging/texts/"):
        assert [file.address for file in find_files([name])] == ["s3://bucket/.staging/texts/a.txt"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("s3://bucket/none", "^input s3://bucket/none does not exist$"),
        (
            "s3://bucket/a.csv",
            "^input file s3://bucket/a.csv must end in one of .txt, .*; name its ending in --suffixes",
        ),
        ("s3://bucket", "^input s3://bucket holds no file that ends in .txt"),
        ("s3://other/a.txt", "^cannot read s3://other/a.txt at http://.*: NoSuchBucket .*; check the name of the buck"),
        ("ftp://host/a.txt", "^address ftp://host/a.txt must begin with one of s3, "),
    ],
)
def test_remote_input_that_is_not_there(tmp_path, store, tokenizer_folder, monkeypatch, name, message):  # noqa: F811
    (store.root / "bucket" / "a.csv").write_text("a")
    store.put_into_environment(monkeypatch)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "out", name, tokenizer_folder)


# ------------------------------------------------------------------------------------------------ held out


def splits(output):
    return {name: split.documents for name, split in Manifest.load(str(output)).splits.items()}


def test_held_out_documents_depend_on_their_text_alone(tmp_path, tokenizer, tokenizer_folder):
    texts = documents(100)
    held_out = []
    for name, order in (("a", texts), ("b", texts[::-1])):
        source = write_jsonl(tmp_path / f"{name}.jsonl", order + order)
        prepare(tmp_path / name, source, tokenizer_folder, val_share=0.2)
        text = tokenizer.decode(read_tokens(tmp_path / name / "val"), skip_special_tokens=False)
        held_out.append(text.split("<|endoftext|>")[:-1])
        assert 10 < len(held_out[-1]) / 2 < 30
        assert all(held_out[-1].count(text) == 2 for text in held_out[-1])  # a text and its copy stay together
    assert sorted(held_out[0]) == sorted(held_out[1])


def test_a_small_corpus_still_gets_a_validation_document(tmp_path, tokenizer_folder):
    source = write_jsonl(tmp_path / "in.jsonl", ["one", "two", "three"])
    prepare(tmp_path / "out", source, tokenizer_folder, val_share=1e-9)
    assert splits(tmp_path / "out") == {"train": 2, "val": 1}


def test_copies_of_the_document_that_is_held_out_of_a_small_corpus_go_with_it(tmp_path, tokenizer_folder):
    texts = ["one", "two", "three", "four"]
    source = write_jsonl(tmp_path / "in.jsonl", texts * 3)
    prepare(tmp_path / "out", source, tokenizer_folder, val_share=1e-9)
    assert splits(tmp_path / "out") == {"train": 9, "val": 3}
    for index in range(2):
        options = {"val_share": 1e-9, "shard": f"{index}/2"}
        prepare(tmp_path / f"part{index}", source, tokenizer_folder, **options)
    MergeParts(input=[str(tmp_path / "part*")], output=str(tmp_path / "merged")).run()
    assert splits(tmp_path / "merged") == {"train": 9, "val": 3}


def test_no_validation_split_if_none_is_asked(tmp_path, tokenizer_folder):
    prepare(tmp_path / "out", write_jsonl(tmp_path / "in.jsonl", ["one", "two"]), tokenizer_folder, val_share=0)
    assert splits(tmp_path / "out") == {"train": 2}
    assert not (tmp_path / "out" / "val").exists()


@pytest.mark.parametrize(
    ("texts", "val_share", "message"),
    [
        (["only one"], 0.01, "the input has one sample, .* set val_share to 0 for no validation split"),
        (["one"] * 10, 0.01, "all 10 samples have the same text, .* set val_share to 0 for no validation split"),
        (["one", "two"], 0.999999, "no sample is left .*took all 2; lower val_share, got 0.999999, or set it to 0 .*"),
    ],
)
def test_nothing_left_to_train_on(tmp_path, tokenizer_folder, texts, val_share, message):
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    with pytest.raises(UserError, match=f"^{message}$"):
        prepare(tmp_path / "out", source, tokenizer_folder, val_share=val_share)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


# -------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_share": 1.5}, r"val_share must be in \[0, 1\), got 1.5; write 0.01 for 1%"),
        ({"num_workers": 0}, "num_workers must be at least 1, got 0"),
        ({"chunk_bytes": "64 apples"}, "chunk_bytes must be a size in KB, MB, GB, TB such as 64MB, got '64 apples'"),
        ({"chunk_bytes": "0MB"}, "chunk_bytes must be a size in KB, MB, GB, TB such as 64MB, got '0MB'"),
        ({"shard": "3/3"}, "shard must be i/n with i from 0 to n - 1, such as 0/8 .*, got '3/3'"),
        ({"tokenizer": "nowhere"}, "tokenizer nowhere does not exist"),
        ({"text_field": "body"}, "in.jsonl, line 1: no field 'body', only 'text'; use --on_error skip"),
    ],
)
def test_wrong_options(tmp_path, tokenizer_folder, options, message):
    source = write_jsonl(tmp_path / "in.jsonl", ["one", "two"])
    with pytest.raises(UserError, match=message):
        PrepareText(
            **{"input": [source], "tokenizer": tokenizer_folder, "output": str(tmp_path / "o"), **options}
        ).run()
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_input_without_text(tmp_path, tokenizer_folder):
    with pytest.raises(UserError, match=r"no documents to tokenize in \S+/in.jsonl \(2 empty, 0 unreadable\)"):
        prepare(tmp_path / "out", write_jsonl(tmp_path / "in.jsonl", ["", " "]), tokenizer_folder)


def test_input_without_a_readable_line_says_why(tmp_path, tokenizer_folder):
    source = tmp_path / "in.jsonl"
    source.write_text("[1]\n[2]\n\n")
    message = r"^no documents to tokenize in \S+ \(0 empty, 2 unreadable, first: \S+/in.jsonl, line 1: "
    with pytest.raises(UserError, match=message + "begins a JSON array"):
        prepare(tmp_path / "out", source, tokenizer_folder, on_error="skip")


def test_the_summary_says_what_was_skipped_and_passed_over(tmp_path, tokenizer_folder, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": 2}\n')
    (folder / "b.csv").touch()
    prepare(tmp_path / "out", folder, tokenizer_folder, on_error="skip")
    printed = capsys.readouterr().out
    assert f"left out 0 empty, 1 unreadable, first: {folder}/a.jsonl, line 2: field 'text' is " in printed
    assert "  skipped  files in the folders, 1 .csv; to read " in printed
    assert "text too: --suffixes .jsonl .csv\n" in printed


@pytest.mark.parametrize("num_workers", [1, 2])
def test_bad_lines_stop_or_are_counted(tmp_path, tokenizer_folder, capsys, num_workers):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "one"}\n{"text": 2}\n{"text": "three"}\n')
    options = {"num_workers": num_workers}
    with pytest.raises(UserError, match=r"^\S+/in.jsonl, line 2: field 'text' is not a string but int; use --on_error"):
        prepare(tmp_path / "out", source, tokenizer_folder, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    prepare(tmp_path / "out", source, tokenizer_folder, on_error="skip", **options)
    assert "0 empty, 1 unreadable" in capsys.readouterr().out
    assert Manifest.load(str(tmp_path / "out")).num_skipped == 1


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_document_that_cannot_be_encoded_is_named_or_skipped(tmp_path, num_workers):
    backend = Backend(models.WordLevel({"</s>": 0, "<mask>": 1, "the": 2, "cow": 3}, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    Tokenizer(backend, {"eos_token": "</s>", "mask_token": "<mask>"}).save(tmp_path / "tokenizer")
    source = write_jsonl(tmp_path / "in.jsonl", ["the cow", "the dog", "", "cow the"])
    options = {"num_workers": num_workers}
    with pytest.raises(UserError, match=r"^\S+/in.jsonl, line 2: tokenizer .* only write 'dog' as .*; use --on_error"):
        prepare(tmp_path / "out", source, str(tmp_path / "tokenizer"), **options)
    prepare(tmp_path / "out", source, str(tmp_path / "tokenizer"), on_error="skip", **options)
    manifest = Manifest.load(str(tmp_path / "out"))
    assert (manifest.splits["train"].documents, manifest.num_empty, manifest.num_skipped) == (2, 1, 1)


def test_nothing_of_the_users_is_touched(tmp_path, tokenizer_folder):
    source = write_jsonl(tmp_path / "in.jsonl", ["one", "two"])
    (tmp_path / "model.bin").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.bin").write_text("precious too")
    with pytest.raises(UserError, match="exists already"):
        prepare(tmp_path / "out", source, tokenizer_folder)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link exists already"):
        prepare(tmp_path / "link", source, tokenizer_folder)
    with pytest.raises(UserError, match=r"chunk_bytes must be in \[1, 4000000000\], got 5000000000"):
        prepare(tmp_path / "large", source, tokenizer_folder, chunk_bytes="5GB")
    prepare(tmp_path / "fresh", source, tokenizer_folder)
    assert (tmp_path / "model.bin").read_text() == "precious"
    assert (tmp_path / "out" / "model.bin").read_text() == "precious too"


# ----------------------------------------------------------------------------------------------- interrupted


def start_preparation(tmp_path, tokenizer_folder):
    """A run in a process of its own, well under way, with two workers; left alone it would take over 16 seconds."""
    source = write_jsonl(tmp_path / "in.jsonl", documents(50) * 10_000)
    call = f"PrepareText(output={str(tmp_path / 'out')!r}, input=[{source!r}], tokenizer={tokenizer_folder!r}"
    code = f"from meap_lit.data.prepare.text import PrepareText; {call}, num_workers=2, chunk_bytes='20KB').run()"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        cwd=Path(__file__).parents[3],
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.partial-*/train/chunk-0-3.bin")):
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.slow
def test_killed_run_leaves_no_dataset_and_no_process(tmp_path, tokenizer_folder):
    process = start_preparation(tmp_path, tokenizer_folder)
    process.kill()
    process.communicate(timeout=30)  # returns when no process has its output open any more, the workers included
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len(leftovers(tmp_path)) == 1
    with pytest.raises(UserError, match="does not exist; make it with"):
        Manifest.load(str(tmp_path / "out"))

    source = write_jsonl(tmp_path / "in.jsonl", documents(20))
    prepare(tmp_path / "out", source, tokenizer_folder)
    assert Manifest.load(str(tmp_path / "out")).splits["train"].documents == 20
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_interrupted_run_cleans_up(tmp_path, tokenizer_folder):
    process = start_preparation(tmp_path, tokenizer_folder)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    try:
        output, _ = process.communicate(timeout=8)
    except subprocess.TimeoutExpired:  # Python drops an interrupt that meets a callback of the garbage collector
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert b"KeyboardInterrupt" in output  # Python's own, for want of a command line; twice if it met a handler
    assert not re.search(rb"Process \w+Process-\d+", output), "a worker left with a traceback"
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


# ----------------------------------------------------------------------------------------------- real data


def test_haystack(shared_data, tmp_path):
    folder = str(shared_data / "tokenizer-llama2")
    prepare(tmp_path / "out", shared_data / "haystack", folder, val_share=0.01, num_workers=None)
    manifest = Manifest.load(str(tmp_path / "out"))
    assert sum(split.documents for split in manifest.splits.values()) == 49
    assert sum(split.tokens for split in manifest.splits.values()) == 167_751 + 2 * 49
    assert manifest.mask_token_id == 32_000
    tokens = read_tokens(tmp_path / "out" / "train")
    assert tokens.count(1) == tokens.count(2) == manifest.splits["train"].documents
    assert 32_000 not in tokens
