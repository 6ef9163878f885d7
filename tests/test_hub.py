import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from huggingface_hub import HfFileSystem, constants

from meap_lit import hub
from meap_lit.checkpoint.card import model_card
from meap_lit.checkpoint.source import open_source
from meap_lit.cli import main
from meap_lit.data.store.manifest import Manifest
from meap_lit.data.store.remote import Storage
from meap_lit.errors import UserError
from meap_lit.tokenizer.tokenizer import Tokenizer
from tests.support.checkpoints import read
from tests.support.hub_server import TOKEN, Hub

ROOT = Path(__file__).parents[1]
NAME = "org/tiny"
MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def server(source_folder, tmp_path, monkeypatch):
    """A Hub with the model `org/tiny`; this process uses it, with an empty cache, in an empty working directory."""
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    address = "{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address.format(endpoint=server.endpoint))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub, "_commits", {})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    server.add(NAME, source_folder)
    yield server
    server.close()


@pytest.fixture
def offline(monkeypatch):
    """Return a function that forbids every request, and forgets what this process has resolved."""

    def switch() -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(hub, "_commits", {})

    return switch


def complain(capsys, *arguments):
    """Run a command that must fail; its one line on stderr."""
    assert main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def other_weights(source_folder, folder):
    """Copy a model with its embedding and its last norm doubled."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 2
    weights["model.norm.weight"] *= 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("HuggingFaceTB/SmolLM2-135M", True),
        ("Qwen/Qwen2.5-0.5B@v1.0", True),
        ("org/name@refs/pr/4", True),
        (f"org/name@{'0a' * 20}", True),
        *(
            (f"{folder}/Meta-Llama-3-8B", False)
            for folder in ("checkpoints", "data", "evaluations", "exported", "runs")
        ),
        ("checkpoints/Meta-Llama-3-8B@main", True),
        ("gpt2", False),
        ("./org/name", False),
        ("/org/name", False),
        ("~/name", False),
        ("org/name/", False),
        ("org/sub/name", False),
        ("runs/last.ckpt", False),
        ("s3://org/name", False),
        ("org/name@", False),
        ("", False),
    ],
)
def test_form_of_an_id(name, is_id):
    assert hub.is_hub_id(name) is is_id


def test_a_local_path_comes_before_an_id(server, source_folder):
    shutil.copytree(source_folder, NAME)
    assert open_source(NAME).path == Path(NAME)
    assert Tokenizer.load(NAME).vocab_size
    assert not server.requests


def test_a_mistyped_path_is_not_looked_up_where_its_folder_exists(server):
    Path("org").mkdir()
    with pytest.raises(UserError, match=r"^checkpoint org/tiny does not exist; .* Hub, write org/tiny@main$"):
        open_source(NAME)
    assert not server.requests
    assert open_source(f"{NAME}@main").config.hidden_size == 32


@pytest.mark.parametrize("name", ["nowhere", "no/such/folder", "org/a--b"])
def test_neither_a_path_nor_an_id(server, name):
    for read_it, what in ((open_source, "checkpoint"), (Tokenizer.load, "tokenizer")):
        with pytest.raises(UserError, match=rf"^{what} {name} does not exist, and is not the id of a repository"):
            read_it(name)


# ------------------------------------------------------------------------------------------- downloads


def test_only_data_is_downloaded(server, source_folder, tmp_path):
    folder = shutil.copytree(source_folder, tmp_path / "full")
    for extra in (
        "pytorch_model.bin",
        "modeling.py",
        "consolidated.safetensors",
        "onnx/model.safetensors",
        "a.md",
    ):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_bytes(b"x")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "special_tokens_map.json").write_text("{}")
    server.add("org/full", folder)
    found = hub.local_folder("org/full", "checkpoint")
    assert {file.name for file in found.iterdir()} == MODEL | {"chat_template.jinja", "special_tokens_map.json"}
    assert (found / "model.safetensors").read_bytes() == (source_folder / "model.safetensors").read_bytes()


def test_of_a_tokenizer_only_its_files_are_downloaded(server):
    tokenizer = Tokenizer.load(NAME)
    (folder,) = Path(constants.HF_HUB_CACHE).glob("models--org--tiny/snapshots/*")
    assert {file.name for file in folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert tokenizer.path == NAME
    assert open_source(NAME).names(), "the weights come when they are needed"


def test_revisions(server, source_folder, tmp_path):
    first = server.repositories["models", NAME].names["main"]
    tagged = server.add(NAME, other_weights(source_folder, tmp_path / "tagged"), branch="v1.0")
    branch = server.add(NAME, source_folder, branch="refs/pr/4")
    assert open_source(NAME).path.name == first
    for name in (f"{NAME}@v1.0", f"{NAME}@{tagged}"):
        assert open_source(name).path.name == tagged
    assert open_source(f"{NAME}@refs/pr/4").path.name == branch
    assert hub.pinned(f"{NAME}@v1.0") == f"{NAME}@{tagged}"
    weights = [open_source(name).read("embed_tokens.weight") for name in (NAME, f"{NAME}@v1.0")]
    torch.testing.assert_close(weights[1], 2 * weights[0])


def test_a_process_keeps_the_revision_that_it_found(server, source_folder, tmp_path, monkeypatch):
    first = open_source(NAME).path.name
    moved = server.add(NAME, other_weights(source_folder, tmp_path / "moved"))
    server.requests.clear()
    assert open_source(NAME).path.name == first
    assert not server.requests
    monkeypatch.setattr(hub, "_commits", {})
    assert open_source(NAME).path.name == moved


def test_what_is_cached_is_not_asked_for_again(server, offline):
    open_source(NAME)
    server.requests.clear()
    offline()
    assert open_source(NAME).names()
    assert Tokenizer.load(f"{NAME}@main").vocab_size
    assert not server.requests


def test_a_hub_that_is_down_is_not_missed_if_all_is_cached(server, monkeypatch):
    open_source(NAME)
    monkeypatch.setattr(hub, "_commits", {})
    server.close()
    assert open_source(NAME).names()


# ------------------------------------------------------------------------------------------- errors


def remove_weights(server, source_folder, tmp_path):
    folder = shutil.copytree(source_folder, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    server.add(NAME, folder)


ERRORS = {
    "org/missing": (
        None,
        "org/missing does not exist here, and {endpoint} has no such repository, or only for another",
    ),
    "org/tiny@v9": (None, "org/tiny@v9: the repository has no revision v9; name a branch, a tag or a commit"),
    f"org/tiny@{'0' * 40}": (None, f"org/tiny@{'0' * 40}: the repository has no revision {'0' * 40}"),
    "org/gated": (None, "org/gated is gated: accept its conditions at {endpoint}/org/gated, and set HF_TOKEN"),
    "org/private": (
        None,
        "org/private does not exist here, and {endpoint} has no such repository, or only for another",
    ),
    "org/tiny": (remove_weights, "org/tiny: the repository has no weights in safetensors, and no others are read"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_had_ends_in_one_line(server, source_folder, tmp_path, capsys, name):
    prepare, message = ERRORS[name]
    server.add("org/gated", source_folder, gated=True)
    server.add("org/private", source_folder, private=True)
    if prepare is not None:
        prepare(server, source_folder, tmp_path)
    line = complain(capsys, "generate", "--checkpoint", name, "--prompt", "a")
    assert line.startswith(f"error: checkpoint {message.format(endpoint=server.endpoint)}")


@pytest.mark.parametrize("option", [{"gated": True}, {"private": True}])
def test_a_token_opens_what_is_closed_and_is_not_printed(server, source_folder, monkeypatch, capsys, option):
    server.add("org/closed", source_folder, **option)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["generate", "--checkpoint", "org/closed", "--prompt", "the old", "--max_new_tokens", "2"]) == 0
    assert f"Bearer {TOKEN}" in server.tokens
    complain(capsys, "generate", "--checkpoint", "org/missing", "--prompt", "a")
    assert TOKEN not in str(capsys.readouterr())


def test_a_token_goes_to_the_hub_only(server, source_folder, monkeypatch):
    """Large files come from another address, to which the Hub sends."""
    storage = Hub()
    try:
        for one in (server, storage):
            one.add("org/elsewhere", source_folder)
        server.storage = storage.endpoint
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert open_source("org/elsewhere").names()
        assert f"Bearer {TOKEN}" in server.tokens
        assert any(request.endswith("model.safetensors") for request in storage.requests)
        assert storage.tokens == {None}
    finally:
        storage.close()


def test_a_wrong_token(server, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    line = complain(capsys, "generate", "--checkpoint", NAME, "--prompt", "a")
    assert line.endswith(f"{NAME}: {server.endpoint} answered with status 401; check HF_TOKEN")


def test_offline_and_not_cached(server, offline, capsys):
    offline()
    line = complain(capsys, "generate", "--checkpoint", NAME, "--prompt", "a")
    assert line.startswith(f"error: checkpoint {NAME} does not exist here, the cache {constants.HF_HUB_CACHE} does not")
    assert "HF_HUB_OFFLINE is set" in line


def test_offline_and_only_the_tokenizer_is_cached(server, offline, capsys):
    Tokenizer.load(NAME)
    offline()
    line = complain(capsys, "export", "--checkpoint", NAME, "--output", "exported")
    assert "does not hold all of it, and HF_HUB_OFFLINE is set" in line


def test_a_hub_that_is_down(server, capsys):
    server.close()
    line = complain(capsys, "prepare", "text", "--input", "a.txt", "--tokenizer", NAME, "--output", "dataset")
    assert line.startswith(f"error: tokenizer {NAME} does not exist here")
    assert f"{server.endpoint} cannot be reached (ConnectError: " in line


def test_a_tokenizer_in_another_format(server, source_folder, tmp_path, capsys):
    folder = shutil.copytree(source_folder, tmp_path / "slow")
    (folder / "tokenizer.json").unlink()
    server.add("org/slow", folder)
    line = complain(capsys, "prepare", "text", "--input", "a.txt", "--tokenizer", "org/slow", "--output", "dataset")
    assert line == "error: tokenizer org/slow has no tokenizer.json; save the tokenizer in the fast format"


def generate_in_a_process(server, tmp_path):
    command = [sys.executable, "-m", "meap_lit", "generate", "--checkpoint", NAME, "--prompt", "the", "--device", "cpu"]
    environment = server.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_download_is_made_whole_by_the_next_try(server, source_folder, tmp_path):
    server.slow.set()
    killed = generate_in_a_process(server, tmp_path)
    assert server.stalled.wait(60)
    killed.kill()
    killed.communicate()
    server.slow.clear()
    again = generate_in_a_process(server, tmp_path)
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    (weights,) = (tmp_path / "home").glob("hub/models--org--tiny/snapshots/*/model.safetensors")
    assert weights.read_bytes() == (source_folder / "model.safetensors").read_bytes()


def test_the_library_is_not_imported_for_a_local_folder(tokenizer_folder):
    code = f"from meap_lit.tokenizer.tokenizer import Tokenizer; Tokenizer.load({tokenizer_folder!r}); "
    code += "import sys; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------- commands


def test_prepare_and_export_take_an_id(server, prepared, source_folder):
    texts = ["--input", str(prepared.texts / "1*.txt"), "--num_workers", "1"]
    assert main(["prepare", "text", *texts, "--tokenizer", NAME, "--output", "dataset"]) == 0
    assert main(["prepare", "text", *texts, "--tokenizer", str(source_folder), "--output", "same"]) == 0
    manifests = [Manifest.load(folder, Storage(), kind="text") for folder in ("dataset", "same")]
    assert manifests[0].fingerprint == manifests[1].fingerprint
    assert main(["export", "--checkpoint", NAME, "--tokenizer", NAME, "--output", "exported"]) == 0
    before, after = open_source(str(source_folder)), open_source("exported")
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.names())
    assert Path("exported/tokenizer.json").read_text() == (source_folder / "tokenizer.json").read_text()


def test_plan_downloads_no_weights(server, toy_sft_recipe, capsys):
    plan = ["plan", "--config", str(toy_sft_recipe), "--devices", "1"]
    assert main([*plan, "--model.init_from", NAME, "--data.tokenizer", NAME]) == 0
    (folder,) = Path(constants.HF_HUB_CACHE).glob("models--org--tiny/snapshots/*")
    assert {file.name for file in folder.iterdir()} == MODEL - {"model.safetensors"}
    line = complain(capsys, *plan, "--model.init_from", "org/missing")
    assert "model.init_from org/missing does not exist here" in line
    assert "--decoder FILE" in line


@pytest.mark.slow
def test_answers_of_an_id_belong_to_its_commit_wherever_the_cache_is(
    server, source_folder, tmp_path, monkeypatch, capsys
):
    options = ["--task", "tests.support.toy_task.CountLetters", "--output", str(tmp_path / "out"), "--device", "cpu"]
    command = ["evaluate", "--checkpoint", NAME, *options]
    assert main(command) == 0
    commit = hub.commits()[NAME]
    settings = json.loads((tmp_path / "out" / "letters" / "tiny" / "settings.json").read_text())
    assert (settings["checkpoint"], "weights" in settings) == (f"{NAME}@{commit}", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert main(command) == 0
    monkeypatch.setattr(hub, "_commits", {})
    server.add(NAME, other_weights(source_folder, tmp_path / "later"))
    line = complain(capsys, *command)
    assert f"has answers for another checkpoint ({NAME}@{commit} then, {NAME}@{hub.commits()[NAME]} now)" in line


@pytest.mark.slow
def test_processes_that_evaluate_download_once(server, tmp_path):
    options = ["--task", "tests.support.toy_task.CountLetters", "--checkpoint", NAME, "--output", str(tmp_path / "out")]
    result = run_processes(server, tmp_path, "evaluate", *options, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out" / "letters" / "tiny" / "result.json").read_text())["results"]
    assert_downloaded_once(server)


@pytest.mark.parametrize(
    ("name", "num_documents"),
    [("texts/data/1.parquet", 10), ("texts@v1.0/data", 20), ("texts@v1.0/data/*.parquet", 20)],
)
def test_prepare_reads_a_dataset_of_the_hub(server, prepared, tmp_path, capsys, name, num_documents):
    folder = tmp_path / "parquet"
    (folder / "data").mkdir(parents=True)
    for number in (1, 2):
        texts = [file.read_text() for file in sorted(prepared.texts.glob(f"{number}?.txt"))]
        pq.write_table(pa.table({"text": texts}), folder / "data" / f"{number}.parquet")
    server.add("org/texts", folder, kind="datasets", branch="v1.0" if "@" in name else "main")
    assert prepare_text(prepared, f"hf://datasets/org/{name}") == 0
    assert f"in all   {num_documents} documents" in capsys.readouterr().out


def test_a_dataset_that_the_hub_does_not_have(server, prepared, capsys):
    address = "hf://datasets/org/none/1.parquet"
    assert prepare_text(prepared, address) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot read {address}: RepositoryNotFoundError: 401 Client Error.")
    assert line.endswith("; check the address and the credentials")


def prepare_text(prepared, address):
    HfFileSystem.clear_instance_cache()  # it remembers its endpoint
    return main(["prepare", "text", "--tokenizer", prepared.tokenizer, "--input", address, "--output", "out"])


# ------------------------------------------------------------------------------------------- push


def test_an_export_is_pushed(server, source_folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    export = ["export", "--checkpoint", str(source_folder), "--output", "exported", "--push", "org/new"]
    assert main(export) == 0
    output = capsys.readouterr()
    assert f"pushed exported to {server.endpoint}/org/new" in output.out
    assert TOKEN not in str(output)
    before, after = open_source(str(source_folder)), open_source("org/new")
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.names())
    _, repository = server.repositories["models", "org/new"].folder("main")
    assert {file.name for file in repository.iterdir()} == MODEL | {"README.md"}
    assert not server.repositories["models", "org/new"].private
    about = yaml.safe_load((repository / "README.md").read_text().split("---\n")[1])
    assert about == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["meap"]}


def test_an_export_from_before_its_checkpoint_is_not_described_by_it(server, source_folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    shutil.copytree(source_folder, "model")
    export = ["export", "--checkpoint", "model", "--output", "exported"]
    assert main(export) == 0
    later = Path("exported").stat().st_mtime + 10
    os.utime("model", (later, later))
    assert "model is newer than exported, which was exported before; remove exported" in complain(
        capsys, *export, "--push", "org/later"
    )
    assert ("models", "org/later") not in server.repositories


def test_an_export_from_before_its_checkpoint_is_not_pushed_again(server, source_folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    shutil.copytree(source_folder, "model")
    export = ["export", "--checkpoint", "model", "--output", "exported", "--push", "org/again"]
    assert main(export) == 0
    assert main(export) == 0
    before = Path("exported/preparation.json").stat().st_mtime
    os.utime("model", (before + 10, before + 10))
    os.utime("exported", (before + 20, before + 20))  # as after an edit of its README.md
    num_pushed = len(server.repositories["models", "org/again"].commits)
    assert "model is newer than exported, which was exported before; remove exported" in complain(capsys, *export)
    assert len(server.repositories["models", "org/again"].commits) == num_pushed
    shutil.rmtree("model")
    assert main(export) == 0  # nothing newer is left


def test_a_push_that_failed_is_repeated_by_the_same_command(server, source_folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    export = ["export", "--checkpoint", str(source_folder), "--output", "exported", "--push", "closed/new"]
    server.closed.add("closed")
    line = complain(capsys, *export)
    assert line.startswith(
        f"error: exported is whole, but was not pushed to closed/new: {server.endpoint} answered with"
    )
    assert "status 403; set HF_TOKEN to one that may write there" in line
    server.closed.clear()
    Path("exported/README.md").write_text("# Our own card\n")
    assert main(export) == 0
    assert "exported exists already and is pushed as it is" in capsys.readouterr().out
    _, repository = server.repositories["models", "closed/new"].folder("main")
    assert (repository / "README.md").read_text() == "# Our own card\n"
    line = complain(capsys, *export, "--dtype", "bfloat16")
    assert "was made with dtype = None, the recipe says 'bfloat16'" in line


def test_a_private_repository(server, source_folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    export = ["export", "--checkpoint", str(source_folder), "--output", "exported", "--private"]
    assert main([*export, "--push", "org/secret"]) == 0
    assert server.repositories["models", "org/secret"].private
    line = complain(capsys, *export, "--push", NAME)
    assert "the repository is public; make it private there, or leave out --private" in line
    assert len(server.repositories["models", NAME].commits) == 1


@pytest.mark.parametrize(
    ("token", "options", "message"),
    [
        (TOKEN, ["--push", "new"], "--push must name a repository on the Hugging Face Hub as ORG/NAME, got 'new'"),
        (TOKEN, ["--push", "org/new@v1"], "--push must name a repository on the Hugging Face Hub as ORG/NAME, got"),
        (None, ["--push", "org/new"], "--push org/new needs a token with write access; set HF_TOKEN"),
        (TOKEN, ["--private"], "--private does nothing without --push ORG/NAME"),
    ],
)
def test_a_push_that_cannot_succeed_is_refused_before_the_export(
    server, source_folder, monkeypatch, capsys, token, options, message
):
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    line = complain(capsys, "export", "--checkpoint", source_folder, "--output", "exported", *options)
    assert line.startswith(f"error: {message}")
    assert not Path("exported").exists()
    assert not server.requests


# ------------------------------------------------------------------------------------------- runs


def fit(recipe, *arguments):
    lora = ["--model.lora.rank", "2", "--model.lora.alpha", "4", "--model.lora.targets", "[q_proj, v_proj]"]
    return ["fit", "--config", str(recipe), *lora, *arguments]


def run_folder(recipe, version):
    return recipe.parent / "runs" / "toy" / f"version_{version}"


def test_a_resume_uses_the_revision_that_the_run_began_with(
    server, offline, toy_sft_recipe, source_folder, tmp_path, monkeypatch, capsys
):
    names = ["--model.init_from", NAME, "--data.tokenizer", NAME]
    commit = server.repositories["models", NAME].names["main"]
    with monkeypatch.context() as having:
        having.setenv("HF_TOKEN", TOKEN)
        assert main(fit(toy_sft_recipe, *names)) == 0
    written = [file for file in run_folder(toy_sft_recipe, 0).rglob("*") if file.is_file()]
    assert written
    assert not any(TOKEN.encode() in file.read_bytes() for file in written)
    recipe = (run_folder(toy_sft_recipe, 0) / "config.yaml").read_text()
    assert f"init_from: {NAME}@{commit}\n" in recipe
    assert f"tokenizer: {NAME}@{commit}\n" in recipe
    checkpoints = run_folder(toy_sft_recipe, 0) / "checkpoints"
    assert read(checkpoints / "step=5.ckpt")["decoder"]["init_from"] == f"{NAME}@{commit}"

    moved = server.add(NAME, other_weights(source_folder, tmp_path / "moved"))
    resume = ["--ckpt_path", str(checkpoints / "step=5.ckpt")]
    line = complain(capsys, *fit(toy_sft_recipe, "--model.init_from", f"{NAME}@{moved}", *resume))
    assert f"adapters were trained on {NAME}@{commit}, model.init_from is {NAME}@{moved} now" in line

    offline()
    assert main(fit(toy_sft_recipe, *names, *resume)) == 0
    assert main(["fit", "--config", str(run_folder(toy_sft_recipe, 0) / "config.yaml"), *resume]) == 0
    whole = read(checkpoints / "step=12.ckpt")["state_dict"]
    for version in (2, 3):  # 1 was refused
        resumed = read(run_folder(toy_sft_recipe, version) / "checkpoints" / "step=12.ckpt")
        assert resumed["hub"][NAME] == commit or version == 3
        assert all(torch.equal(whole[name], resumed["state_dict"][name]) for name in whole)

    assert main(["export", "--checkpoint", str(checkpoints / "step=12.ckpt"), "--output", "exported"]) == 0
    adapter = ["export", "--checkpoint", str(checkpoints / "step=12.ckpt"), "--adapter_only"]
    assert main([*adapter, "--output", "adapter"]) == 0
    settings = json.loads(Path("adapter/adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == (NAME, commit)
    card = model_card(open_source(checkpoints / "step=12.ckpt"), "org/tuned", adapter_only=True)
    about, recipe = yaml.safe_load(card.split("---\n")[1]), yaml.safe_load(card.split("```")[1].removeprefix("yaml"))
    assert (about["base_model"], about["library_name"]) == (NAME, "peft")
    assert recipe["model"]["init_args"]["init_from"] == f"{NAME}@{commit}"
    assert "of a copied answer that were masked (mask_ratio): 0.2\n" in card


def test_the_base_of_adapters_is_not_looked_up_without_its_commit(server, toy_sft_recipe, source_folder, capsys):
    """A folder that is gone may have the name of a repository that anybody could make."""
    shutil.copytree(source_folder, NAME)
    assert main(fit(toy_sft_recipe, "--model.init_from", NAME, "--data.tokenizer", NAME)) == 0
    shutil.rmtree("org")
    server.requests.clear()
    line = complain(capsys, "generate", "--checkpoint", run_folder(toy_sft_recipe, 0), "--prompt", "a")
    assert f"holds adapters, and their model cannot be opened: checkpoint {NAME} does not exist" in line
    assert not server.requests


def test_processes_that_train_download_once(server, toy_sft_recipe, tmp_path):
    overlay = ["--config", "recipes/strategy/ddp.yaml"]
    arguments = [*fit(toy_sft_recipe, "--data.tokenizer", NAME), *overlay]
    result = run_processes(server, tmp_path, *arguments, "--model.init_from", NAME)
    assert result.returncode == 0, result.stderr
    assert_downloaded_once(server)
    failed = run_processes(server, tmp_path, *arguments, "--model.init_from", "org/missing")
    assert failed.returncode != 0
    assert failed.stderr.count("error: checkpoint org/missing does not exist here") == 1, failed.stderr


def run_processes(server, tmp_path, *arguments):
    """Run a command in two processes that torchrun starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "meap_lit"]
    options = {"env": server.environment(tmp_path / "home"), "cwd": ROOT, "timeout": 300, "check": False}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, **options)


def assert_downloaded_once(server):
    """Files and revisions were asked for once, and the weights were among them."""
    asked = {key: count for key, count in server.requests.items() if "/resolve/" in key or "/revision/" in key}
    assert any(key.startswith("GET") and key.endswith("model.safetensors") for key in asked)
    assert set(asked.values()) == {1}, asked
