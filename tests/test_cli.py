import errno
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from meap_lit import __version__
from meap_lit.cli import COMMANDS, EXAMPLES, main, read_command


def complain(capsys, *arguments):
    """Run a command that must fail; its one line on stderr."""
    assert main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_help_names_every_command_without_loading_torch():
    code = "import sys; from meap_lit.cli import main; [main(words.split()) for words in sys.argv[1:]]; "
    pages = ["--help", "--version", "prepare --help", "checkpoint -h", "tokenizer --help", "recipes --help"]
    result = subprocess.run(
        [sys.executable, "-c", code + "sys.exit('torch' in sys.modules)", *pages],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    whole, version, groups = result.stdout.partition(f"meap_lit {__version__}\n")
    assert version
    for command in ("fit", "validate", *COMMANDS):
        assert f"\n  {command}  " in whole
    for command in COMMANDS:
        if " " in command:
            assert f"\n  {command}  " in groups
            assert f"\n      python -m meap_lit {command} " in groups


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_a_command_is_one(command, capsys):
    assert read_command([*command.split(), *shlex.split(EXAMPLES[command])])
    if command != "recipes":  # has a page of its group
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        assert capsys.readouterr().out.endswith(f"\nexample:\n  python -m meap_lit {command} {EXAMPLES[command]}\n")


def test_help_of_a_preparation_describes_its_options(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["prepare", "text", "--help"])
    assert exit_info.value.code == 0
    assert "Share of the documents or conversations held out" in " ".join(capsys.readouterr().out.split())


def test_from_text_to_a_trained_and_validated_model(prepared, tmp_path, capsys):
    tokenizer, dataset, runs = tmp_path / "tokenizer", tmp_path / "dataset", tmp_path / "runs"
    inputs = [prepared.texts / "1*.txt", prepared.texts / "2.txt"]
    arguments = ["--input", *map(str, inputs), "--output"]
    assert main(["tokenizer", "train", *arguments, str(tokenizer), "--vocab_size", "300"]) == 0
    text = ["prepare", "text", *arguments, str(dataset), "--tokenizer", str(tokenizer)]
    assert main([*text, "--val_share", "0.2", "--num_workers", "1"]) == 0
    toy = [
        *("--model.decoder.num_layers", "1"),
        *("--model.decoder.hidden_size", "32"),
        *("--model.decoder.num_heads", "2"),
        *("--model.decoder.num_kv_heads", "1"),
        *("--model.decoder.intermediate_size", "64"),
        *("--data.datasets", str(dataset)),
        *("--data.tokenizer", str(tokenizer)),
        *("--data.seq_len", "32"),
        *("--data.global_batch_size", "4"),
        *("--data.micro_batch_size", "4"),
        *("--data.num_workers", "0"),
        *("--budget.max_tokens", "600"),
        *("--trainer.precision", "32-true"),
        *("--trainer.accelerator", "cpu"),
        *("--trainer.logger.init_args.save_dir", str(runs)),
    ]
    assert main(["fit", "--config", "recipes/pretrain/own_text.yaml", *toy]) == 0
    out = capsys.readouterr().out
    for expected in ("optimizer steps", "clean validation loss", "tokens per second", "tensorboard --logdir"):
        assert expected in out
    run = runs / "own_text" / "version_0"
    validate = ["validate", "--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    assert main(validate) == 0
    assert "val/loss" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- wrong input


@pytest.mark.slow
def test_a_torchvision_that_does_not_fit_is_named(tmp_path, toy_recipe):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    metadata = tmp_path / "torchvision-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
    result = subprocess.run(
        [sys.executable, "-m", "meap_lit", "fit", "--config", str(toy_recipe)],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: the installed torchvision does not fit torch")
    assert "pip uninstall torchvision" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fitt --config x", "no command 'fitt'; did you mean 'fit'?"),
        ("evalute", "no command 'evalute'; did you mean 'evaluate'?"),
        ("prepare", "prepare needs one of text, chat, merge, facts after it, got nothing"),
        ("prepare txt --input a", "got txt; did you mean 'prepare text'?"),
        ("checkpoint --output a", "checkpoint needs one of inspect, verify, consolidate after it, got nothing"),
        ("recipes/quickstart.yaml", "is a recipe, not a command; write fit --config recipes/quickstart.yaml"),
        ("fit", "the following arguments are required: --data, --model; name a recipe with --config FILE"),
        ("fit --config", "--config needs a value after it; --help describes the options"),
        ("fit --config recipes/quickstart.yaml --model.mask_ratio", "--model.mask_ratio needs a value after it; "),
        ("fit --config quickstart", "recipe quickstart does not exist; did you mean recipes/quickstart.yaml?"),
        ("fit --config recipes/pretrain/meap_1b.yaml", "did you mean recipes/pretrain/meap_1.1b.yaml?"),
        ("plan --config recipes/quickstart.yaml --data.seq_len -5", "data.seq_len must be at least 1, got -5"),
        ("fit recipes/quickstart.yaml", "options begin with two dashes, such as --config"),
        ("fit -config recipes/quickstart.yaml", "options begin with two dashes; write --config"),
        ("fit --config recipes/quickstart.yaml model.mask_ratio=0", "two dashes, such as --model.mask_ratio"),
        ("fit --config recipes/quickstart.yaml --mask_ratio 0.1", "0.1; did you mean '--model.mask_ratio'?"),
        ("fit --config recipes/quickstart.yaml --lr 0.1", "0.1; did you mean '--model.optimizer.lr'?"),
        ("fit --config recipes/quickstart.yaml --seq-len 8", "8; did you mean '--data.seq_len'?"),
        ("fit --config recipes/quickstart.yaml --max_steps 8", "8; did you mean '--budget.max_steps'?"),
        ("fit --config recipes/quickstart.yaml --device 8", "8; did you mean '--devices'?"),
        ("fit --config recipes/quickstart.yaml --model.lr 8", "no option 'lr'; did you mean 'optimizer.lr'?"),
        ("fit --config recipes/eval/needle.yaml", "it is for `evaluate`, not for this command"),
        ("generate", "the following arguments are required: --checkpoint"),
        ("generate runs/x", "unrecognized arguments: runs/x; options begin with two dashes, such as --checkpoint"),
        ("validate --config recipes/quickstart.yaml", "name a checkpoint with --ckpt_path, such as last"),
    ],
)
def test_words_of_a_newcomer_get_a_line_with_a_fix(capsys, words, message):
    assert message in complain(capsys, *words.split())


def test_an_unknown_command_gets_the_list(capsys):
    assert "choose from fit, validate, preview, " in complain(capsys, "frobnicate")


MASKS = "mask_ratio: {class_path: meap_lit.masking.Linear, init_args: {end: 0.15}}"


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("global_batch_size:", "global_batch:", "Data has no option 'global_batch'; did you mean 'global_batch_size'?"),
        ("num_layers:", "n_layers:", "DecoderConfig has no option 'n_layers'; did you mean 'num_layers'?"),
        (MASKS, MASKS.replace("end", "ende"), "masking.Linear has no option 'ende'; did you mean 'end'?"),
        ("budget:", "buget:", "there is no key 'buget.max_steps'; did you mean 'budget'?"),
        (MASKS, MASKS.replace("Linear", "Linaer"), "meap_lit.masking.Linaer does not exist; did you mean 'Linear'?"),
        ("optimizer:", "optimiser:", "MEAPPretraining has no option 'optimiser.lr'; did you mean 'optimizer'?"),
        ("num_layers: 2", "num_layers: two", "model.decoder.num_layers must be a whole number, got two"),
    ],
)
def test_what_is_misspelt_in_a_recipe_is_named_with_what_was_meant(capsys, toy_recipe, right, wrong, message):
    text = toy_recipe.read_text().replace("mask_ratio: 0.15", MASKS)
    assert right in text
    toy_recipe.write_text(text.replace(right, wrong))
    line = complain(capsys, "fit", "--config", toy_recipe)
    assert line.endswith(message)
    assert len(line) < 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("generate --checkpoint x --dtype fp16", "dtype must be float32 or bfloat16, got fp16"),
        ("generate --checkpoint x --device gpu", "device must be auto, cpu or cuda, got gpu"),
        ("generate --checkpoint x --top_k 1.5", "top_k must be a whole number, got 1.5"),
        ("generate --checkpoint x --temperature hot", "temperature must be a number, got hot"),
        ("export --checkpoint x --output y --dtype fp16", "dtype must be float32, bfloat16 or float16, got fp16"),
        ("export --chekpoint x", "unrecognized arguments: --chekpoint x; did you mean '--checkpoint'?"),
        ("fit --config {} --budget.max_steps many", "budget.max_steps must be a whole number, got many"),
        ("fit --config {} --model.protect [pad]", "model.protect must be bos, eos or last, got pad"),
        ("fit --config {} --model.protect eos", "model.protect must be a list ([...]), got eos"),
        (
            "fit --config {} --model.mask_ratio a",
            "model.mask_ratio must be a number or a class (Constant, Cosine, Linear, Piecewise, WarmupHold), got a",
        ),
        (
            "fit --config {} --data PretrainingDta",
            "data must be a class (FineTuningData, PretrainingData), got PretrainingDta; "
            "did you mean 'PretrainingData'?",
        ),
        (
            "fit --config {} --model.mask_ratio.hold_off 3",
            "model.mask_ratio.hold_off is an option of a class, and model.mask_ratio names none; "
            "name one with --model.mask_ratio CLASS_PATH",
        ),
        ("fit --config {} --data.datasets '{{a: half}}'", "data.datasets must be a number, got half"),
        ("fit --config {} --model.decoder.qk_norm maybe", "model.decoder.qk_norm must be true or false, got maybe"),
    ],
)
def test_a_value_of_a_wrong_kind_is_named_with_what_would_be_right(capsys, toy_recipe, arguments, message):
    line = complain(capsys, *shlex.split(arguments.format(toy_recipe)))
    line = line.replace("InOrder, ", "")  # a class of another test, which this process may have imported
    assert line == f"error: {message.format()}"


@pytest.mark.parametrize("argument", ["--budget.max_step", "--trainer.devics", "--ckpt"])
def test_an_unknown_argument_is_named(capsys, toy_recipe, argument):
    assert f"unrecognized arguments: {argument} 4" in complain(capsys, "fit", "--config", toy_recipe, argument, "4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model.optimizer null", "model.optimizer must not be null; give it a value"),
        ("--data.seed null", "data.seed must not be null; leave it out for its default"),
        (
            "--budget null",
            "budget must be a mapping ({{key: value}}), got null; a run needs one of budget.max_tokens, "
            "budget.max_steps and budget.max_epochs",
        ),
        (
            "--checkpoint null",
            "checkpoint must be a mapping ({{key: value}}), got null; trainer.enable_checkpointing false saves no "
            "checkpoints",
        ),
        ("--samples false", "samples must be a mapping ({{key: value}}), got false; null turns it off"),
    ],
)
def test_a_value_that_nothing_can_be_done_with_is_named(capsys, toy_recipe, arguments, message):
    assert complain(capsys, "fit", "--config", toy_recipe, *arguments.split()) == f"error: {message.format()}"


@pytest.mark.parametrize("key", ["--data.datasets", "--data.tokenizer", "--model.init_from", "--ckpt_path"])
def test_a_folder_that_may_not_be_entered_is_named(capsys, toy_sft_recipe, tmp_path, monkeypatch, key):
    locked = tmp_path / "locked"
    locked.mkdir()
    is_file = Path.is_file

    def refuse(path):
        if path.parent == locked:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)
    line = complain(capsys, "fit", "--config", toy_sft_recipe, key, locked)
    assert line.startswith(f"error: no permission for {locked}/")
    assert line.endswith(": give this user access, or name another path")


def test_a_folder_instead_of_a_recipe_is_named(capsys, tmp_path):
    line = complain(capsys, "fit", "--config", "recipes/strategy")
    assert line.endswith("recipe recipes/strategy is a folder; name a file in it, such as recipes/strategy/ddp.yaml")
    assert f"recipe {tmp_path} is a folder; it has no .yaml file" in complain(capsys, "fit", "--config", str(tmp_path))


@pytest.mark.parametrize(("ratio", "hint"), [("15", "write 0.15 for 15%"), ("1.0", "got 1"), ("-1", "got -1")])
def test_a_mask_ratio_out_of_range_is_named(capsys, toy_recipe, ratio, hint):
    line = complain(capsys, "fit", "--config", toy_recipe, f"--model.mask_ratio={ratio}")
    assert "model.mask_ratio must be in [0, 1)" in line
    assert hint in line


def test_a_missing_dataset_is_named(capsys, toy_recipe):
    line = complain(capsys, "fit", "--config", toy_recipe, "--data.datasets", "nowhere")
    assert "dataset folder nowhere does not exist" in line
    assert "prepare text" in line


def test_a_half_prepared_dataset_is_named(capsys, toy_recipe, prepared, tmp_path):
    import shutil

    shutil.copytree(prepared.dataset, tmp_path / "half")
    (tmp_path / "half" / "manifest.json").unlink()
    line = complain(capsys, "fit", "--config", toy_recipe, "--data.datasets", tmp_path / "half")
    assert "manifest.json" in line


def test_another_tokenizer_is_refused(capsys, toy_recipe, prepared, tmp_path):
    other = tmp_path / "other"
    train = ["tokenizer", "train", "--input", str(prepared.texts), "--vocab_size", "310"]
    assert main([*train, "--output", str(other)]) == 0
    line = complain(capsys, "fit", "--config", toy_recipe, "--data.tokenizer", other)
    assert "was prepared with another tokenizer" in line
    assert str(other) in line


def test_a_malformed_line_is_named_by_file_and_number(capsys, prepared, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"text": \n')
    command = ["prepare", "text", "--input", bad, "--tokenizer", prepared.tokenizer, "--output", tmp_path / "out"]
    line = complain(capsys, *command)
    assert "bad.jsonl" in line
    assert "2" in line
    assert "--on_error skip" in line
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == [bad], "nothing half-made is left"


def test_a_token_outside_the_vocabulary_is_named_even_by_a_worker_process(capsys, toy_recipe, prepared, tmp_path):
    import json
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(prepared.dataset, damaged)
    index = json.loads((damaged / "train" / "index.json").read_text())
    for chunk in index["chunks"]:
        path = damaged / "train" / chunk["filename"]
        content = bytearray(path.read_bytes())
        content[-2000:] = b"\xff" * 2000  # token id 65,535
        path.write_bytes(content)
        del chunk["sha256"]  # as a dataset of another writer
    (damaged / "train" / "index.json").write_text(json.dumps(index))
    manifest = json.loads((damaged / "manifest.json").read_text())
    del manifest["sha256"], manifest["splits"]["train"]["files"]
    (damaged / "manifest.json").write_text(json.dumps(manifest | {"version": 1}))
    line = complain(
        capsys, "fit", "--config", toy_recipe, "--data.datasets", damaged, "--data.init_args.num_workers", 1,
        "--budget.max_steps", 300,
    )  # fmt: skip
    assert "holds token id 65535, outside the model's vocabulary of 320" in line


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("max_steps", 7, "budget.max_steps"),
        ("accumulate_grad_batches", 7, "data.global_batch_size and data.micro_batch_size"),
        ("max_epochs", 3, "budget.max_epochs"),
        ("min_steps", 30, "budget.max_steps"),  # would skip the last validation
        ("limit_train_batches", 1, "budget.max_steps"),
        ("overfit_batches", 2, "budget.max_steps"),
        ("fast_dev_run", True, "budget.max_steps"),
        ("val_check_interval", 3, "budget.val_every_n_steps"),
        ("check_val_every_n_epoch", 2, "budget.val_every_n_steps"),  # would never validate
    ],
)
def test_what_the_budget_decides_is_not_stated_twice(capsys, toy_recipe, key, value, instead):
    line = complain(capsys, "fit", "--config", toy_recipe, f"--trainer.{key}", str(value))
    assert f"trainer.{key} {value} contradicts the budget, which decides it; state {instead} instead" in line


def test_a_missing_checkpoint_is_named(capsys, toy_recipe):
    line = complain(capsys, "fit", "--config", toy_recipe, "--ckpt_path", "nowhere.ckpt")
    assert "nowhere.ckpt" in line


def test_a_run_needs_a_budget(capsys, toy_recipe):
    toy_recipe.write_text(toy_recipe.read_text().replace("max_steps: 12, ", ""))
    assert "budget.max_tokens" in complain(capsys, "fit", "--config", toy_recipe)


def test_output_that_nobody_reads_to_its_end_is_no_error():
    # what is printed fits into a pipe's buffer, so the reader must be gone before
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from meap_lit.cli import main; sys.exit(main(['--help']))"
    result = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert result.returncode == 141
    assert result.stderr == ""
