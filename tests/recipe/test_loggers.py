"""A run looks the same with every logger, and what it sends to a service is all there, secrets aside."""

import importlib.util
import re
import shlex
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
import yaml
from mlflow import MlflowClient
from wandb.proto import wandb_internal_pb2

from meap_lit.callbacks.loggers import MLflow
from meap_lit.callbacks.metrics import read_metrics
from meap_lit.cli import main
from meap_lit.errors import UserError
from meap_lit.recipe.cli import RecipeCLI
from meap_lit.recipe.loggers import log_recipe

SECRET = "s3cr3t0fTh1sT3st"
OVERLAYS = {path.stem: path for path in Path("recipes/logger").glob("*.yaml")}
PROMPTS = ["--samples.prompts", "['the old river keeps']"]
PROBE = ["--model.decoder.max_seq_len", "160", "--data.seq_len", "160", "--probe.lengths", "[160]"]
PROBE += ["--probe.num_items", "1", "--probe.max_share", "1"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory, in which no service finds a login."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return folder


def words_of(recipe: Path, logger: str, *words: str) -> list[str]:
    offline = ["--trainer.logger.offline", "true"] if logger == "wandb" else []
    return ["fit", "--config", str(recipe), "--config", f"recipes/logger/{logger}.yaml", *offline, *words]


def fit(monkeypatch, *words: str) -> RecipeCLI:
    """Train by a command line that holds a secret."""
    words = (*words, "--data.storage_options", f"{{aws_secret_access_key: {SECRET}}}")
    monkeypatch.setattr(sys, "argv", ["meap-lit", *words])
    return RecipeCLI.run(list(words))


def sent(logger: str, run_id: str, runs: Path) -> tuple[dict[str, list[tuple[int, float]]], set[str]]:
    """What a service has of a run: its curves, and the names of its texts and figures."""
    if logger == "mlflow":
        client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
        names = client.get_run(run_id).data.metrics
        histories = {name: client.get_metric_history(run_id, name) for name in names}
        curves = {name: sorted((one.step, one.value) for one in found) for name, found in histories.items()}
        return curves, {artifact.path for artifact in client.list_artifacts(run_id)}
    wandb.teardown()  # waits until all is written
    curves, shown = {}, set()
    for file in sorted(runs.glob(f"toy/*/wandb/offline-run-*-{run_id}/run-{run_id}.wandb")):
        for data in records(file.read_bytes()):
            items = wandb_internal_pb2.Record.FromString(data).history.item
            shown |= {item.nested_key[0] for item in items if len(item.nested_key) > 1}
            values = {item.nested_key[0]: float(item.value_json) for item in items if len(item.nested_key) == 1}
            for name in values.keys() - {"step"}:
                curves.setdefault(name, []).append((int(values["step"]), values[name]))
    return curves, shown


def records(content: bytes) -> Iterator[bytes]:
    """The records of a file of W&B: LevelDB's log format after seven bytes."""
    position, parts = 7, b""
    while position < len(content):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield parts
            parts = b""


@pytest.mark.slow
@pytest.mark.parametrize("logger", sorted(OVERLAYS))
def test_a_run_is_the_same_with_every_logger(logger, toy_recipe, here, tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    cli = fit(monkeypatch, *words_of(toy_recipe, logger, *PROBE, *PROMPTS))
    run = runs / "toy" / "version_0"
    assert Path(cli.trainer.log_dir) == run
    of_service = {"wandb"} & {logger}
    files = {"checkpoints", "config.yaml", "curves.csv", "retrieval.png", "summary.json", "tokenizer"}
    assert {path.name for path in run.iterdir()} == files | of_service
    assert "step=12.ckpt" in {path.name for path in (run / "checkpoints").iterdir()}

    commands = [line.strip() for line in capsys.readouterr().out.partition("\nNext:\n")[2].splitlines()]

    # a resumed run goes on, from the recipe and from the saved one
    longer = ["--ckpt_path", "last", "--budget.max_steps", "14"]
    again = fit(monkeypatch, *words_of(toy_recipe, logger, *PROBE, *PROMPTS, *longer))
    assert Path(again.trainer.log_dir) == runs / "toy" / "version_1"
    saved = ["fit", "--config", str(runs / "toy" / "version_1" / "config.yaml")]
    third = fit(monkeypatch, *saved, "--ckpt_path", str(runs / "toy"), "--budget.max_steps", "16")
    assert Path(third.trainer.log_dir) == runs / "toy" / "version_2"
    assert (again.trainer.global_step, third.trainer.global_step) == (14, 16)

    if logger != "csv":
        ids = {part.trainer.loggers[0].run_id for part in (cli, again, third)}
        assert len(ids) == 1, "the parts are one run of the service"
        curves, shown = sent(logger, *ids, runs)
        parts = [read_metrics(runs / "toy" / f"version_{number}") for number in range(3)]
        assert len(parts[0]) > 8
        for name in parts[0]:
            kept = [tuple(point) for part in parts for point in part.get(name, [])]
            assert curves[name] == kept, name
        assert shown == {"recipe", "rows", "continuations", "retrieval"}
        apart = ["--trainer.logger.resume", "false", "--budget.max_steps", "17", "--ckpt_path", str(runs / "toy")]
        apart = fit(monkeypatch, *saved, *apart)
        assert apart.trainer.loggers[0].run_id not in ids

    assert not any(here.iterdir()), "nothing is left in the working directory"
    written = [path for path in runs.rglob("*") if path.is_file()]
    assert len(written) > 10
    for path in written:
        assert SECRET.encode() not in path.read_bytes(), path

    # the commands that the run named
    views = {"csv": 0, "wandb": 1, "mlflow": 1}[logger]
    if logger == "wandb":
        [folder] = run.glob("wandb/offline-run-*")
        assert commands[0] == f"wandb sync {Path('..', folder.relative_to(tmp_path))}"
    if logger == "mlflow":
        assert re.fullmatch(rf"uvx mlflow@[\d.]+ ui --backend-store-uri sqlite:///{runs}/mlflow.db", commands[0])
    assert len(commands) == views + 7
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)  # the saved recipe refers to it
    for command in commands[views:]:
        assert command.startswith("python -m meap_lit ")
        assert main(shlex.split(command, comments=True)[3:]) == 0, command


class FakeRun:
    """What `wandb.init` returns when it reaches the service."""

    offline, url = False, "https://wandb.test/meap_lit/runs/abc"

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.id = arguments["id"] or "abc"
        self.config = SimpleNamespace(update=lambda *_, **__: None)
        self.exit_code: int | None = None

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log(self, values: dict[str, Any]) -> None: ...

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def test_a_run_online(toy_recipe, here, monkeypatch, capsys):
    """Nothing is sent: `wandb.init` is replaced."""
    calls = []

    def init(**arguments: Any) -> FakeRun:
        calls.append((arguments, list(sys.argv), run := FakeRun(arguments)))
        return run

    monkeypatch.setattr("wandb.init", init)
    words = words_of(toy_recipe, "wandb", "--trainer.logger.offline", "false", "--trainer.logger.tags", "[a]")
    fit(monkeypatch, *words)
    printed = capsys.readouterr().out
    assert re.search(rf"^WandB +{FakeRun.url}$", printed, re.MULTILINE)
    assert "wandb sync" not in printed
    fit(monkeypatch, *words, "--ckpt_path", "last", "--budget.max_steps", "14", "--trainer.logger.project", "other")
    (first, argv, run), (second, *_) = calls
    assert (first["mode"], first["id"], first["project"], first["tags"]) == (None, None, "meap_lit", ["a"])
    assert first["name"], first["group"] == ("toy-version_0", "toy")
    assert (second["id"], second["resume"], second["project"]) == ("abc", "allow", "other")
    assert SECRET not in " ".join(argv)
    assert "--data.storage_options" in argv
    assert run.exit_code == 0


@pytest.mark.parametrize(
    ("logger", "words", "message"),
    [
        (
            "wandb",
            ["--trainer.logger.offline", "false"],
            r"trainer.logger WandB cannot be opened: No API key configured. Use `wandb login` to log in.",
        ),
        (
            "mlflow",
            ["--trainer.logger.tracking_uri", "http://me:s3cr3t0fTh1sT3st@127.0.0.1:9"],
            r"trainer.logger MLflow cannot be opened: API request to http://\*\*\*@127.0.0.1:9/.* failed .*",
        ),
        (
            "csv",
            ["--trainer.logger", "lightning.pytorch.loggers.WandbLogger"],
            r"trainer.logger WandbLogger cannot be opened: No API key configured.*",
        ),
        ("csv", ["--trainer.logger", "lightning.pytorch.loggers.CometLogger"], r"Requirement 'comet-ml.*' not met.*"),
        (
            "mlflow",
            ["--trainer.logger", "lightning.pytorch.loggers.MLFlowLogger", "--trainer.logger.log_model", "true"],
            r"trainer.logger.log_model True is refused: checkpoints stay in the run's folder; leave it out, and .*",
        ),
    ],
)
def test_what_a_service_refuses_is_one_line(logger, words, message, toy_recipe, here, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert main(words_of(toy_recipe, logger, *words)) == 2
    shown = capsys.readouterr()
    [line] = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(f"error: {message}", line), line
    assert SECRET not in shown.err + shown.out


def test_a_run_that_the_service_has_lost(tmp_path, monkeypatch):
    def experiment(self: MLflow) -> None:
        raise RuntimeError("Run\n  not found")

    logger = MLflow(str(tmp_path), "toy")
    monkeypatch.setattr(MLflow, "experiment", property(experiment))
    with pytest.raises(UserError, match=r"^trainer.logger MLflow cannot be opened: Run not found$"):
        log_recipe(logger, {})
    logger.run_id = "abc"
    with pytest.raises(UserError, match=r"not found \(run abc; --trainer.logger.resume false starts another\)$"):
        log_recipe(logger, {})


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_missing_package_is_named_with_its_extra(package, toy_recipe, here, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "meap_lit.callbacks.loggers.find_spec", lambda name: None if name == package else find_spec(name)
    )
    assert main(words_of(toy_recipe, package)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f"needs the package {package}: pip install 'meap-lit[{package}]'")


def test_a_second_logger_has_the_folder_of_the_first(toy_recipe, here, tmp_path):
    recipe = yaml.safe_load(toy_recipe.read_text())
    board = recipe["trainer"]["logger"]
    service = {"class_path": "WandB", "init_args": {**board["init_args"], "offline": True}}
    recipe["trainer"]["logger"] = [board, service]
    toy_recipe.write_text(yaml.safe_dump(recipe))
    for number in range(2):
        cli = RecipeCLI.run(["fit", "--config", str(toy_recipe), "--budget.max_steps", "2"])
        folder = str(tmp_path / "runs" / "toy" / f"version_{number}")
        assert {cli.trainer.log_dir, *(logger.log_dir for logger in cli.trainer.loggers[:2])} == {folder}


def test_runs_that_start_together_have_folders_of_their_own(toy_recipe, tmp_path):
    """With slow probes: their items are made between the choice of the folder and the first file in it."""
    words = ["fit", "--config", str(toy_recipe), *PROBE, "--probe.num_items", "60"]
    command = [sys.executable, "-m", "meap_lit", *words]
    runs = [subprocess.Popen([*command, "--model.seed", str(seed)], stderr=subprocess.DEVNULL) for seed in (1, 2, 3)]
    assert [run.wait(timeout=300) for run in runs] == [0, 0, 0]
    folders = sorted((tmp_path / "runs" / "toy").iterdir())
    assert [folder.name for folder in folders] == ["version_0", "version_1", "version_2"]
    recipes = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders]
    assert sorted(recipe["model"]["init_args"]["seed"] for recipe in recipes) == [1, 2, 3]
    steps = [[point.step for point in read_metrics(folder)["val/loss"]] for folder in folders]
    assert steps[0] == steps[1] == steps[2] == sorted(set(steps[0]))


def test_a_run_that_does_not_begin_leaves_no_folder(toy_recipe, tmp_path, capsys):
    assert main(["fit", "--config", str(toy_recipe), *PROBE, "--probe.lengths", "[8]"]) == 2
    assert "retrieval length 8 has no room" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*/*"))
