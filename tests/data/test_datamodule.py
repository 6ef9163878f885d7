"""Runs whose data lies in object storage."""

import re
import shutil
from pathlib import Path

import pytest
import torch

import meap_lit.data.store.remote as storage_module
from meap_lit.cli import main
from meap_lit.data.prepare.chat import PrepareChat
from meap_lit.data.prepare.text import PrepareText
from meap_lit.data.pretraining import PretrainingData
from meap_lit.errors import UserError
from meap_lit.recipe.cli import RecipeCLI
from tests.support.object_store import one_store, store  # noqa: F401  fixtures

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text_dataset(prepared, tmp_path_factory):
    output = str(tmp_path_factory.mktemp("text") / "dataset")
    options = {"tokenizer": prepared.tokenizer, "val_share": 0.1, "chunk_bytes": "1KB", "num_workers": 1}
    PrepareText(input=[str(prepared.texts)], output=output, **options).run()
    return output


@pytest.fixture(scope="module")
def chat_dataset(prepared, chat, tmp_path_factory):
    output = str(tmp_path_factory.mktemp("chat") / "dataset")
    options = {"tokenizer": prepared.tokenizer, "val_share": 0.1, "chunk_bytes": "1KB", "num_workers": 1}
    PrepareChat(input=[str(Path(chat).parent / "chat.jsonl")], template="mistral", output=output, **options).run()
    return output


@pytest.fixture
def bucket(store, monkeypatch, tmp_path, text_dataset, chat_dataset):  # noqa: F811
    """A store with both datasets, which the environment leads to."""
    for name in ("text", "chat"):
        shutil.copytree({"text": text_dataset, "chat": chat_dataset}[name], store.root / "bucket" / name)
    store.put_into_environment(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(storage_module, "_LONGEST_PAUSE", 0.01)
    return store


@pytest.fixture(params=["text", "chat"])
def recipe(request):
    """Recipe and address or folder of its dataset."""
    name = {"text": "toy_recipe", "chat": "toy_sft_recipe"}[request.param]
    return request.param, request.getfixturevalue(name), request.getfixturevalue(f"{request.param}_dataset")


def arguments(recipe, datasets, *overrides):
    return ["fit", "--config", str(recipe), "--data.datasets", datasets, "--budget.max_steps", "6", *overrides]


def test_a_run_on_storage_with_faults_is_the_run_on_the_folder(bucket, recipe, tmp_path):
    kind, file, folder = recipe
    local = RecipeCLI.run(arguments(file, folder)).model.decoder.state_dict()
    kinds = ["reset", "503", "truncate", "flip"]  # the last of chunks only, which are what is verified
    bucket.fault = lambda key, number: kinds[len(bucket.requests) % (3 + key.endswith(".bin"))] if not number else None
    options = ("--data.num_workers", "2", "--data.cache_dir", str(tmp_path / "cache"), "--data.cache_bytes", "50KB")
    remote = RecipeCLI.run(arguments(file, f"s3://bucket/{kind}", *options)).model.decoder.state_dict()
    assert sum(count > 1 for count in bucket.requests.values()) > 5, "no fault occurred"
    for name, value in local.items():
        assert torch.equal(value, remote[name]), name


@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_a_fault_that_stays_ends_the_run_in_one_line(bucket, recipe, num_workers, capfd):
    kind, file, _ = recipe
    bucket.fault = lambda key, number: "flip" if key.endswith(".bin") and "/train/" in key else None
    overrides = ("--data.num_workers", num_workers, "--data.storage_tries", "2")
    assert main(arguments(file, f"s3://bucket/{kind}", *overrides)) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"error: cannot read s3://bucket/{kind}/train/chunk-0-")
    assert lines[-1].endswith("(tries: 2): differs from its SHA-256 in index.json")
    assert not [line for line in lines if "Traceback" in line or "Error" in line]


@pytest.mark.parametrize(
    ("dataset", "environment", "overrides", "message"),
    [
        (
            "text",
            {"AWS_ACCESS_KEY_ID": "wrong"},
            (),
            "cannot read s3://bucket/text/manifest.json .*InvalidAccessKey",
        ),
        (
            "text",
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            (),
            r"\(tries: 3\): Could not connect to the endpoint",
        ),
        ("none", {}, (), "cannot read s3://bucket/none/manifest.json .*NoSuchKey.*made by meap_lit prepare"),
        ("text", {}, ("--data.cache_dir", "/dev/null"), "cannot write the cache /dev/null: .*data.cache_dir"),
        ("text", {}, ("--data.cache_bytes", "many"), "data.cache_bytes must be a size in KB, MB, GB, TB .* got 'many'"),
        ("text", {}, ("--data.storage_tries", "0"), "data.storage_tries must be at least 1, got 0"),
        ("text", {}, ("--data.storage_timeout", "0"), "data.storage_timeout must be above 0, got 0 seconds"),
    ],
)
def test_wrong_settings(bucket, toy_recipe, monkeypatch, capfd, dataset, environment, overrides, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(arguments(toy_recipe, f"s3://bucket/{dataset}", *overrides)) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line


# ----------------------------------------------------------------------------------------------- wrong input


def test_a_resume_with_other_weights_is_refused(prepared, text_dataset):
    """Rows are counted over the mix: with other weights they would be other rows."""

    def mixed(weight):
        data = PretrainingData({prepared.dataset: weight, text_dataset: 30}, prepared.tokenizer, seq_len=32)
        data.setup("fit")
        return data

    then = mixed(70)
    fingerprints = {path: manifest.fingerprint for path, manifest in then.manifests.items()}
    state = {"step": 3, "samples": 24, "datasets": fingerprints, "rows": then.row_settings}
    mixed(70.0).load_state_dict(state)
    with pytest.raises(UserError, match=r"^data.datasets \(share of each\) was \[0.7, 0.3\] in the run of the check"):
        mixed(30).load_state_dict(state)


def test_a_resume_with_another_batch_is_refused_of_an_older_checkpoint_too(prepared):
    """Steps are what budgets, schedules and masks count: with other steps none of them would mean the same."""
    data = PretrainingData(prepared.dataset, prepared.tokenizer, seq_len=32, global_batch_size=8)
    data.setup("fit")
    fingerprints = {path: manifest.fingerprint for path, manifest in data.manifests.items()}
    rows = {name: value for name, value in data.row_settings.items() if name != "global_batch_size"}
    state = {"step": 3, "samples": 24, "datasets": fingerprints, "rows": rows}
    data.load_state_dict(state)
    with pytest.raises(UserError, match=r"^data.global_batch_size was 4 in the run of the checkpoint and is 8 now"):
        data.load_state_dict(state | {"samples": 12})


def test_a_shard_alone_is_refused(prepared, tmp_path):
    options = {"input": [str(prepared.texts)], "tokenizer": prepared.tokenizer, "num_workers": 1}
    PrepareText(output=str(tmp_path / "shard"), shard="1/3", **options).run()
    with pytest.raises(UserError, match=r"is part 1/3 of a dataset; merge the parts with: python -m meap_lit prep"):
        PretrainingData(str(tmp_path / "shard"), prepared.tokenizer, seq_len=32).setup("fit")
