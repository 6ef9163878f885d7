"""Every command that a finished run names works as it is printed."""

import re
import shlex
from pathlib import Path

import pytest

from meap_lit.cli import main
from meap_lit.data.prepare.text import PrepareText


def named_by(capsys, *words: str) -> list[list[str]]:
    """Train, and return the words of the commands under "Next"."""
    assert main(["fit", *words, "--trainer.enable_progress_bar", "false"]) == 0
    lines = capsys.readouterr().out.partition("\nNext:\n")[2].splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    return [command[3:] for command in commands if command[:3] == ["python", "-m", "meap_lit"]]


def paste(capsys, commands: list[list[str]]) -> dict[str, str]:
    """Run the commands in their order; return what each printed."""
    printed = {}
    for words in commands:
        assert main(words) == 0, shlex.join(words)
        printed[words[0]] = capsys.readouterr().out
    return printed


ALL = ["preview", "generate", "evaluate", "export", "validate", "fit", "report"]


def test_after_a_run_in_a_folder_of_a_study(toy_recipe, capsys):
    commands = named_by(
        capsys, "--config", str(toy_recipe), "--budget.max_steps", "1", "--trainer.logger.name", "study/a"
    )
    (report,) = (words for words in commands if words[0] == "report")
    runs = toy_recipe.with_name("runs") / "study"
    assert report == ["report", "--runs", f"{runs}/a", f"{runs}/a_plain"]


@pytest.mark.slow
def test_after_the_quickstart_and_its_fine_tuning(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--budget.max_steps", "4", "--checkpoint.every_n_steps", "4"]
    commands = named_by(capsys, "--config", "recipes/quickstart.yaml", *small)
    assert [words[0] for words in commands] == ALL
    assert "sings. In" in shlex.join(commands[1])  # a question on a context of facts
    printed = paste(capsys, commands)
    assert "results    evaluations/needle_small/" in printed["evaluate"]
    fine_tuning = ["--config", "recipes/sft/quickstart.yaml", "--budget.max_epochs", "1"]
    commands = named_by(capsys, *fine_tuning)
    assert [words[0] for words in commands] == ALL
    assert "--chat" in commands[1]
    assert re.match("This is what people say", commands[1][-1])
    paste(capsys, commands)


def test_after_a_run_on_own_text(toy_recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = named_by(capsys, "--config", str(toy_recipe))
    assert [words[0] for words in commands] == ALL
    assert "nll" in paste(capsys, commands)["evaluate"]


def test_the_baseline_of_a_resumed_run_starts_anew(toy_recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    named_by(capsys, "--config", str(toy_recipe), "--budget.max_steps", "5")
    commands = named_by(capsys, "--config", str(toy_recipe), "--ckpt_path", "last")
    (baseline,) = [words for words in commands if words[0] == "fit"]
    assert main(baseline) == 0
    [run] = Path("runs/toy_plain").iterdir()
    steps = [line.split(",")[0] for line in (run / "curves.csv").read_text().splitlines()[1:]]
    assert steps[0] == "1"


def test_the_baseline_of_a_run_in_a_fixed_folder_has_one_of_its_own(toy_recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fixed = ["--trainer.logger.version", "mine", "--checkpoint.dirpath", "saved", "--budget.max_steps", "2"]
    commands = named_by(capsys, "--config", str(toy_recipe), *fixed)
    paste(capsys, [words for words in commands if words[0] in ("fit", "report")])
    assert Path("runs/toy_plain/mine/checkpoints/step=2.ckpt").is_dir()
    assert "toy_plain" in Path("report/report.md").read_text()


def test_a_run_without_a_validation_split_names_what_needs_none(prepared, toy_recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    output = str(tmp_path / "unseen")
    inputs = [str(prepared.texts / "1*.txt")]
    PrepareText(input=inputs, tokenizer=prepared.tokenizer, output=output, val_share=0.0, num_workers=1).run()
    words = ["--config", str(toy_recipe), "--data.datasets", output]
    commands = named_by(capsys, *words, "--budget.max_steps", "2")
    assert [words[0] for words in commands] == ["preview", "generate", "evaluate", "export", "fit"]
    paste(capsys, commands)
    assert main(["validate", *words, "--ckpt_path", "last"]) == 2
    message = "error: no dataset of data.datasets has a validation split; prepare one with --val_share above 0"
    assert capsys.readouterr().err.splitlines()[-1] == message


def test_a_run_without_logger_names_no_missing_file(toy_recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    commands = named_by(capsys, "--config", str(toy_recipe), "--trainer.logger", "false")
    assert [words[0] for words in commands] == ["generate", "evaluate", "export"]
    assert {path.name for path in tmp_path.iterdir()} - before == {"runs"}
    assert [path.name for path in Path("runs").iterdir()] == ["checkpoints"]
    paste(capsys, commands)


def test_a_run_without_logger_and_checkpoints_leaves_nothing(toy_recipe, tmp_path, monkeypatch, capsys):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    without = ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]
    assert named_by(capsys, "--config", str(toy_recipe), *without) == []
    assert not any(here.iterdir())
