import dataclasses
import json
import shutil

import numpy as np
import pytest
from tokenizers import processors

from meap_lit.data.prepare.chat import PrepareChat
from meap_lit.data.prepare.text import PrepareText
from meap_lit.data.store.manifest import VERSION, Manifest, load_samples
from meap_lit.errors import UserError
from meap_lit.tokenizer.tokenizer import Tokenizer
from tests.support.object_store import one_store, store  # noqa: F401  fixtures
from tests.support.older_dataset import make_older


@pytest.fixture(scope="module")
def original(tmp_path_factory, tokenizer_folder):
    folder = tmp_path_factory.mktemp("original")
    lines = [json.dumps({"text": f"document {i}"}) + "\n" for i in range(20)]
    (folder / "in.jsonl").write_text("".join(lines))
    PrepareText(
        input=[str(folder / "in.jsonl")],
        tokenizer=tokenizer_folder,
        output=str(folder / "out"),
        val_share=0.2,
        chunk_bytes="1KB",
        num_workers=1,
    ).run()
    return folder / "out"


@pytest.fixture
def dataset(original, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(original, tmp_path / "set")
    return tmp_path / "set"


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_round_trip(dataset, tmp_path):
    manifest = Manifest.load(str(dataset))
    (tmp_path / "again").mkdir()
    manifest.save(tmp_path / "again")
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (dataset / "manifest.json").read_bytes()
    assert list(manifest.splits) == ["train", "val"]


def test_fingerprint_is_of_the_content(dataset):
    manifest = Manifest.load(str(dataset))
    moved = dataclasses.replace(manifest, sources=[], num_skipped=5)
    assert moved.fingerprint == manifest.fingerprint
    other_tokens = dataclasses.replace(manifest.splits["train"], fingerprint="0" * 64)
    for change in ({"splits": {**manifest.splits, "train": other_tokens}}, {"tokenizer_fingerprint": "0" * 64}):
        assert dataclasses.replace(manifest, **change).fingerprint != manifest.fingerprint


def test_missing_empty_and_foreign_folders(dataset, tmp_path):
    with pytest.raises(
        UserError, match=r"^dataset folder \S+/none does not exist; make it with: python -m meap_lit pr"
    ):
        Manifest.load(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"--output '\S+/no ne'$"):
        Manifest.load(str(tmp_path / "no ne"))
    with pytest.raises(UserError, match=r"^dataset \S+/manifest.json is a file; name the folder that prepare text"):
        Manifest.load(str(dataset / "manifest.json"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^dataset folder \S+/empty is empty: it was not made, or not finished, by"):
        Manifest.load(str(tmp_path / "empty"))
    (dataset / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"^dataset folder \S+/set holds no manifest.json: it was not made, or not fin"):
        Manifest.load(str(dataset))


def test_split_instead_of_dataset(dataset):
    with pytest.raises(UserError, match=r"set/train is one split of a dataset; name the folder above it, \S+/set$"):
        Manifest.load(str(dataset / "train"))


def test_missing_and_cut_chunks(dataset):
    chunk = dataset / "train" / "chunk-0-0.bin"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1])
    with pytest.raises(
        UserError, match=rf"train/chunk-0-0.bin has {len(content) - 1} bytes instead of {len(content)};"
    ):
        Manifest.load(str(dataset))
    chunk.unlink()
    with pytest.raises(
        UserError, match=r"^chunk \S+/train/chunk-0-0.bin is missing; the dataset is incomplete: copy or"
    ):
        Manifest.load(str(dataset))


def test_index_missing_damaged_or_of_other_data(dataset):
    index = dataset / "val" / "index.json"
    content = json.loads(index.read_text())
    edit(index, updated_at="now")
    with pytest.raises(
        UserError, match=r"val/index.json is damaged: its SHA-256 differs from that in the manifest; copy"
    ):
        Manifest.load(str(dataset))
    make_older(dataset)
    edit(index, chunks=[{**chunk, "dim": chunk["dim"] + 1} for chunk in content["chunks"]])
    with pytest.raises(
        UserError, match=r"val/index.json lists \d+ tokens, the manifest \d+; prepare the dataset again"
    ):
        Manifest.load(str(dataset))
    for damaged in ("{", "[]", "{}", '{"config": null}'):
        index.write_text(damaged)
        with pytest.raises(UserError, match=r"val/index.json(: not| is damaged).*copy or prepare the dataset again"):
            Manifest.load(str(dataset))
    index.unlink()
    with pytest.raises(UserError, match=r"set is incomplete: cannot read val/index.json \(No such file or directory\)"):
        Manifest.load(str(dataset))


def test_damaged_foreign_and_newer_manifests(dataset):
    file = dataset / "manifest.json"
    whole = {**json.loads(file.read_text()), "version": 1}
    del whole["sha256"]
    edit(file, version=VERSION + 1, something_new=1)
    with pytest.raises(
        UserError, match=rf"has a manifest of version {VERSION + 1}, this meap_lit reads up to {VERSION}"
    ):
        Manifest.load(str(dataset))
    file.write_text('{"name": "a web app"}')
    with pytest.raises(UserError, match=r"set/manifest.json is not a manifest of meap_lit"):
        Manifest.load(str(dataset))
    for changes in ({"kind": []}, {"splits": {"train": {"tokens": 1, "samples": 1, "files": "x"}}}):
        file.write_text(json.dumps({**whole, **changes}))
        with pytest.raises(UserError, match=r"set/manifest.json is not a manifest of meap_lit"):
            Manifest.load(str(dataset))
    file.write_text('{"name": ')
    with pytest.raises(UserError, match=r"set/manifest.json: not valid JSON .*; copy or prepare the dataset again"):
        Manifest.load(str(dataset))


def test_other_tokenizer(dataset, tokenizer, tmp_path):
    manifest = Manifest.load(str(dataset))
    manifest.check_tokenizer(tokenizer, dataset="data/set", tokenizer_folder="tok")
    tokenizer.save(tmp_path / "other")
    edit(tmp_path / "other" / "tokenizer.json", normalizer={"type": "Lowercase"})
    other = Tokenizer.load(str(tmp_path / "other"))
    expected = (
        rf"^dataset data/set was prepared with another tokenizer than tok/other "
        rf"\(fingerprint {tokenizer.fingerprint[:8]} against {other.fingerprint[:8]}\); name that one as data.tokenizer"
    )
    with pytest.raises(UserError, match=expected):
        manifest.check_tokenizer(other, dataset="data/set", tokenizer_folder="tok/other")


def test_text_without_the_bos_that_its_tokenizer_writes_is_refused(dataset, chat_dataset, tokenizer, tmp_path):
    """Earlier versions wrote none; conversations have what their template writes, then as now."""
    backend = tokenizer.copy_backend()
    eos = tokenizer.special_tokens["eos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{eos} $A", special_tokens=[(eos, tokenizer.eos_token_id)]
    )
    writing = Tokenizer(backend, {"eos_token": eos})
    assert writing.fingerprint == tokenizer.fingerprint != writing.document_fingerprint
    expected = (
        r"^dataset data/set was prepared by an earlier version, without the <\|endoftext\|> that tok "
        r"writes around each text; prepare the dataset again$"
    )
    with pytest.raises(UserError, match=expected):
        Manifest.load(str(dataset)).check_tokenizer(writing, dataset="data/set", tokenizer_folder="tok")
    Manifest.load(str(chat_dataset), kind="chat").check_tokenizer(writing, dataset="chat", tokenizer_folder="tok")


def test_manifest_that_does_not_say_its_kind_is_of_text(dataset):
    file = dataset / "manifest.json"
    expected = Manifest.load(str(dataset))
    make_older(dataset)
    content = json.loads(file.read_text())
    assert content.pop("kind") == "text"
    file.write_text(json.dumps(content))
    loaded = Manifest.load(str(dataset))
    assert loaded.kind == "text"
    assert loaded.fingerprint == expected.fingerprint


def test_an_older_dataset_opens_with_a_word(dataset, capsys):
    expected = Manifest.load(str(dataset))
    make_older(dataset)
    for _ in range(2):  # said once
        older = Manifest.load(str(dataset))
    note = f"note: dataset {dataset} is of an older version without hashes of its manifest\n"
    assert capsys.readouterr().err == note
    splits = {name: dataclasses.replace(split, files={}) for name, split in expected.splits.items()}
    assert older == dataclasses.replace(expected, version=1, splits=splits)


# ---------------------------------------------------------------------------------------------------- chat


@pytest.fixture(scope="module")
def chat_original(tmp_path_factory, tokenizer_folder):
    folder = tmp_path_factory.mktemp("chat")
    records = [{"prompt": f"Number {i}?", "completion": "Quick. " * (i % 3 + 1)} for i in range(20)]
    (folder / "in.json").write_text(json.dumps(records))
    PrepareChat(
        input=[str(folder / "in.json")],
        tokenizer=tokenizer_folder,
        output=str(folder / "out"),
        template="mistral",
        val_share=0.2,
        chunk_bytes="1KB",
        num_workers=1,
    ).run()
    return folder / "out"


@pytest.fixture
def chat_dataset(chat_original, tmp_path):
    """A copy that a test may damage, beside the other."""
    shutil.copytree(chat_original, tmp_path / "chat")
    return tmp_path / "chat"


def test_round_trip_of_chat(chat_dataset, tmp_path):
    manifest = Manifest.load(str(chat_dataset), kind="chat")
    (tmp_path / "again").mkdir()
    manifest.save(tmp_path / "again")
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (chat_dataset / "manifest.json").read_bytes()
    assert manifest.kind == "chat"


def test_one_kind_is_not_taken_for_the_other(dataset, chat_dataset):
    expected = (
        r"^dataset \S+/set holds documents of text, made by prepare text; needed are conversations, which are made "
        r"with: python -m meap_lit prepare chat --input FILES --tokenizer DIR --output DIR$"
    )
    with pytest.raises(UserError, match=expected):
        Manifest.load(str(dataset), kind="chat")
    expected = (
        r"^dataset \S+/chat holds conversations, made by prepare chat; needed are documents of text, which are made "
        r"with: python -m meap_lit prepare text --input FILES --tokenizer DIR --output DIR$"
    )
    with pytest.raises(UserError, match=expected):
        Manifest.load(str(chat_dataset))
    with pytest.raises(UserError, match=r"/none does not exist; make it with: python -m meap_lit prepare chat --input"):
        Manifest.load(str(dataset / "none"), kind="chat")


def test_chat_chunks_of_other_data(chat_dataset):
    index = chat_dataset / "train" / "index.json"
    make_older(chat_dataset)
    edit(index, chunks=json.loads(index.read_text())["chunks"][:-1])
    with pytest.raises(
        UserError, match=r"train/index.json lists \d+ documents, the manifest \d+; prepare the dataset ag"
    ):
        Manifest.load(str(chat_dataset), kind="chat")


def test_missing_damaged_and_foreign_table(chat_dataset):
    file, location = chat_dataset / "train" / "samples.npz", str(chat_dataset)
    content = file.read_bytes()
    shutil.copy(chat_dataset / "val" / "samples.npz", file)
    with pytest.raises(
        UserError, match=r"train/samples.npz lists \d+ samples with \d+ answers, index.json \d+ samples;"
    ):
        load_samples(location, "train")
    for damaged in (content[:-30], b"no archive", b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"^\S+/chat/train/samples.npz is damaged: .*; prepare the dataset again$"):
            load_samples(location, "train")
    np.savez(file, num_tokens=np.array([{}], dtype=object))  # pickled
    with pytest.raises(
        UserError, match=r"samples.npz is damaged: Object arrays cannot be loaded when allow_pickle=Fal"
    ):
        load_samples(location, "train")
    file.unlink()
    with pytest.raises(
        UserError, match=r"chat is incomplete: cannot read train/samples.npz \(No such file or directory"
    ):
        load_samples(location, "train")


# -------------------------------------------------------------------------------------------------- remote


@pytest.fixture
def remote(store, dataset, chat_dataset, tmp_path):  # noqa: F811
    """How the datasets are read at s3://bucket/set and s3://bucket/chat."""
    shutil.copytree(dataset, store.root / "bucket" / "set")
    shutil.copytree(chat_dataset, store.root / "bucket" / "chat")
    return store.storage(tmp_path)


def test_remote_dataset(dataset, store, remote):  # noqa: F811
    assert Manifest.load("s3://bucket/set", remote) == Manifest.load(str(dataset))
    assert Manifest.load("s3://bucket/set/", remote) == Manifest.load(str(dataset))
    (store.root / "bucket" / "set" / "val" / "index.json").unlink()
    with pytest.raises(UserError, match=r"cannot read s3://bucket/set/val/index.json at .*NoSuchKey"):
        Manifest.load("s3://bucket/set", remote)
    with pytest.raises(UserError, match=r"cannot read s3://bucket/none/manifest.json at .*made by meap_lit prepare\?"):
        Manifest.load("s3://bucket/none", remote)


def test_remote_chat_dataset(chat_dataset, remote):
    assert Manifest.load("s3://bucket/chat", remote, kind="chat") == Manifest.load(str(chat_dataset), kind="chat")
    here, there = load_samples(str(chat_dataset), "val"), load_samples("s3://bucket/chat", "val", remote)
    assert here.chunk_sizes == there.chunk_sizes
    for name in ("num_tokens", "num_answers", "answer_tokens"):
        assert getattr(here, name).tolist() == getattr(there, name).tolist()


def test_remote_endpoint_that_does_not_answer_is_given_up_soon(store, remote):  # noqa: F811
    patient = dataclasses.replace(remote, tries=50)
    store.fault = lambda key, number: "503"
    with pytest.raises(UserError, match=r"cannot read s3://bucket/set/manifest.json \(tries: 3\): SlowDown"):
        Manifest.load("s3://bucket/set", patient)


def test_unknown_kind_of_address():
    with pytest.raises(UserError, match=r"address ftp://host/set/.* must begin with one of s3, r2, gs, az"):
        Manifest.load("ftp://host/set")
