"""What holds for a run of either module: it resumes, however it was stopped, and devices and workers change nothing."""

import json
import multiprocessing
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from meap_lit.checkpoint.export import Export
from meap_lit.checkpoint.source import new_mask_token, open_source, tokenizer_of
from meap_lit.data.prepare.text import PrepareText
from meap_lit.errors import UserError
from meap_lit.model import Decoder, DecoderConfig
from meap_lit.modules import AdamW
from meap_lit.recipe.cli import RecipeCLI
from meap_lit.tokenizer.tokenizer import Tokenizer
from tests.support.checkpoints import read
from tests.support.toy_module import fork_command
from tests.support.word_tokenizer import save_word_level


@pytest.fixture(params=["toy_recipe", "toy_sft_recipe"])
def any_recipe(request):
    """A recipe of twelve steps that pretrains, and one that fine-tunes a checkpoint of transformers."""
    return request.getfixturevalue(request.param)


def run(recipe, *overrides):
    return RecipeCLI.run(["fit", "--config", str(recipe), *overrides])


def weights(cli):
    return cli.model.decoder.state_dict()


def assert_same_weights(one, other):
    assert weights(one).keys() == weights(other).keys()
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(other)[name]), name


def test_a_resumed_run_equals_one_that_never_stopped(any_recipe, tmp_path):
    whole = run(any_recipe)
    checkpoints = tmp_path / "runs" / "toy" / "version_0" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "last.ckpt",
        "step=10.ckpt",
        "step=12.ckpt",
        "step=5.ckpt",
    ]
    for name in ("step=5.ckpt", "step=10.ckpt"):
        resumed = run(any_recipe, "--ckpt_path", str(checkpoints / name))
        assert resumed.trainer.global_step == 12
        assert_same_weights(whole, resumed)


def test_dropout_of_adapters_resumes_to_the_bit(any_recipe, tmp_path):
    lora = ["--model.lora.dropout", "0.5", "--model.lora.alpha", "64"]
    whole, plain = run(any_recipe, *lora), run(any_recipe, "--model.lora.alpha", "64")
    checkpoint = tmp_path / "runs" / "toy" / "version_0" / "checkpoints" / "step=5.ckpt"
    resumed = run(any_recipe, *lora, "--ckpt_path", str(checkpoint))
    assert resumed.trainer.global_step == 12
    assert_same_weights(whole, resumed)
    assert any(not torch.equal(tensor, weights(plain)[name]) for name, tensor in weights(whole).items())


def test_a_run_that_had_ended_goes_on_with_a_larger_budget(any_recipe, tmp_path):
    constant = ["--model.optimizer.warmup_share", "0", "--model.optimizer.final_lr", "3.0e-3"]  # whatever the budget
    whole = run(any_recipe, *constant)
    run(any_recipe, *constant, "--budget.max_steps", "7")
    checkpoint = tmp_path / "runs" / "toy" / "version_1" / "checkpoints" / "step=7.ckpt"
    resumed = run(any_recipe, *constant, "--ckpt_path", str(checkpoint))
    assert resumed.trainer.global_step == 12
    assert_same_weights(whole, resumed)


OTHER_OPTIONS = {
    "lr": 1e-3,
    "final_lr": 5e-4,
    "warmup_share": 0.5,
    "betas": [0.8, 0.99],
    "eps": 1e-3,
    "weight_decay": 0.5,
}


def as_words(options):
    return [word for name, value in options.items() for word in (f"--model.optimizer.{name}", str(value))]


def test_optimizer_options_given_on_a_resume_apply(any_recipe, tmp_path):
    """Each of them, from the first resumed step on; the schedule goes on at its step."""
    change = "--trainer.callbacks+=tests.support.breakdown.ChangeOptimizer"
    changed = run(any_recipe, change, "--trainer.callbacks.changes", json.dumps({5: OTHER_OPTIONS}))
    checkpoint = ["--ckpt_path", str(tmp_path / "runs" / "toy" / "version_0" / "checkpoints" / "step=5.ckpt")]
    resumed = run(any_recipe, *as_words(OTHER_OPTIONS), *checkpoint)
    assert_same_weights(changed, resumed)
    schedule = AdamW(**{name: value for name, value in OTHER_OPTIONS.items() if name != "betas"})
    logged = scalars(tmp_path / "runs" / "toy" / "version_1")["train/lr"]
    assert logged == {step: pytest.approx(schedule.lr * schedule.lr_factor(step, 12)) for step in range(5, 12)}
    recorded = yaml.safe_load((tmp_path / "runs" / "toy" / "version_1" / "config.yaml").read_text())
    assert recorded["model"]["init_args"]["optimizer"] == OTHER_OPTIONS


def test_a_larger_budget_stretches_the_schedule_from_the_first_resumed_step_on(any_recipe, tmp_path):
    run(any_recipe, "--budget.max_steps", "10")
    run(any_recipe, "--budget.max_steps", "40", "--ckpt_path", "last")
    run(any_recipe, "--budget.max_steps", "40")
    resumed, whole = (scalars(tmp_path / "runs" / "toy" / f"version_{number}")["train/lr"] for number in (1, 2))
    assert resumed == {step: rate for step, rate in whole.items() if step >= 10}
    assert resumed[10] > 2.7e-3, "the run before had come down to 3e-4"


def test_a_run_of_another_kind_is_not_resumed(toy_recipe, toy_sft_recipe, tmp_path):
    run(toy_recipe, "--budget.max_steps", "1")
    checkpoint = tmp_path / "runs" / "toy" / "version_0" / "checkpoints" / "last.ckpt"
    message = r"last.ckpt \(--ckpt_path\) was not written by a run on FineTuningData, .*, set model.init_from"
    with pytest.raises(UserError, match=message):
        run(toy_sft_recipe, "--ckpt_path", str(checkpoint))


def test_a_resume_may_split_the_batch_otherwise(any_recipe, tmp_path):
    whole = run(any_recipe)
    checkpoint = tmp_path / "runs" / "toy" / "version_0" / "checkpoints" / "step=5.ckpt"
    resumed = run(any_recipe, "--ckpt_path", str(checkpoint), "--data.micro_batch_size", "1")
    assert resumed.trainer.global_step == 12
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(resumed)[name], atol=1e-5, rtol=1e-4)


def test_workers_change_nothing(any_recipe):
    assert_same_weights(run(any_recipe), run(any_recipe, "--data.num_workers", "2"))


def test_the_saved_recipe_runs_again(any_recipe, tmp_path):
    first = run(any_recipe)
    again = run(tmp_path / "runs" / "toy" / "version_0" / "config.yaml")
    assert_same_weights(first, again)


def test_a_checkpoint_says_which_model_it_holds(any_recipe, tmp_path):
    run(any_recipe)
    path = tmp_path / "runs" / "toy" / "version_0" / "checkpoints" / "last.ckpt"
    checkpoint = read(path)
    decoder = Decoder(DecoderConfig(**checkpoint["decoder"]["config"]))
    prefix = "decoder."
    decoder.load_state_dict({k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if prefix in k})
    assert checkpoint["decoder"]["mask_token_id"] == 1


def test_a_killed_run_resumes_as_if_nothing_had_happened(toy_recipe, tmp_path):
    arguments = ["--budget.max_steps", "60", "--budget.val_every_n_steps", "20"]
    whole = run(toy_recipe, *arguments)
    checkpoints = tmp_path / "runs" / "toy" / "version_1" / "checkpoints"
    process = multiprocessing.get_context("fork").Process(target=run, args=(toy_recipe, *arguments))
    process.start()
    while process.is_alive() and not (checkpoints / "step=10.ckpt").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run was to be stopped before its end"
    resumed = run(toy_recipe, *arguments, "--ckpt_path", str(checkpoints / "last.ckpt"))
    assert_same_weights(whole, resumed)


def test_two_processes_train_as_one(any_recipe, tmp_path):
    whole = run(any_recipe, "--data.micro_batch_size", "2")
    overrides = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.micro_batch_size", "2"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*sync_dist")
        statuses, log = fork_command(["fit", "--config", any_recipe, *overrides], num_ranks=2)
    assert statuses == [0, 0], log
    assert log.count("clean validation loss") == 1, "one summary, not one a process"
    path = tmp_path / "runs" / "toy" / "version_1" / "checkpoints" / "last.ckpt"
    state = read(path)["state_dict"]
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(state[f"decoder.{name}"], tensor, atol=1e-5, rtol=1e-4)


def scalars(folder):
    """What TensorBoard holds of a run, speed and memory aside: {tag: {step: value}}; Lightning counts from 0."""
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(("train/", "data/", "mask/", "val/"))]
    tags.append("throughput/tokens_seen")
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


def test_a_step_is_logged_alike_however_many_are(any_recipe, tmp_path):
    run(any_recipe)
    run(any_recipe, "--trainer.log_every_n_steps", "5")
    runs = tmp_path / "runs" / "toy"
    every, some = scalars(runs / "version_0"), scalars(runs / "version_1")
    assert some == {tag: {step: value for step, value in every[tag].items() if step in (4, 9, 11)} for tag in every}
    assert all(some.values())


def test_what_was_logged_is_not_logged_again_where_a_run_is_stopped(any_recipe, tmp_path):
    stop = "--trainer.callbacks+=tests.support.breakdown.StopAtStep7"
    run(any_recipe, "--trainer.log_every_n_steps", "5", stop)
    found = scalars(tmp_path / "runs" / "toy" / "version_0")
    assert list(found["train/loss"]) == [4]
    assert list(found["throughput/tokens_seen"]) == [4]


def test_bf16_autocast_trains(any_recipe):
    full, mixed = run(any_recipe), run(any_recipe, "--trainer.precision", "bf16-mixed")
    assert {tensor.dtype for tensor in weights(mixed).values()} == {torch.float32}
    losses = [float(cli.trainer.callback_metrics["val/loss"]) for cli in (full, mixed)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model.decoder.num_layers", "1"], "decoder.num_layers 2, that of the recipe 1; leave it as it was"),
        (["--model.decoder.rope_theta", "5e5"], r"decoder.rope_theta 10000.0, that of the recipe 500000.0; leave it"),
    ],
)
def test_a_resume_with_another_model_is_refused(toy_recipe, change, message):
    run(toy_recipe, "--budget.max_steps", "2")
    with pytest.raises(UserError, match=message):
        run(toy_recipe, *change, "--ckpt_path", "last")


@pytest.fixture
def of_another(prepared, tmp_path):
    """Arguments for a recipe whose tokenizer has the same number of ids, with the ids of two tokens exchanged."""
    folder = tmp_path / "another"
    shutil.copytree(prepared.tokenizer, folder, ignore=shutil.ignore_patterns("preparation.json"))
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    output = str(tmp_path / "of_another")
    PrepareText(input=[str(prepared.texts)], tokenizer=str(folder), output=output, val_share=0.1, num_workers=1).run()
    return ["--data.datasets", output, "--data.tokenizer", str(folder)]


def test_the_tokenizer_of_another_model_is_refused(toy_recipe, of_another, tmp_path):
    run(toy_recipe, "--budget.max_steps", "2")
    trained, tokenizer = str(tmp_path / "runs" / "toy"), of_another[-1]
    message = rf"^tokenizer {tokenizer} is not that of checkpoint .*step=2.ckpt: its id \d+ is '"
    with pytest.raises(UserError, match=message):
        run(toy_recipe, *of_another, "--model.decoder", "null", "--model.init_from", trained)
    with pytest.raises(UserError, match=message):
        RecipeCLI.run(["validate", "--config", str(toy_recipe), *of_another, "--ckpt_path", "last"])
    with pytest.raises(UserError, match=message):
        tokenizer_of(open_source(trained), tokenizer)


def test_a_resumed_fine_tuning_keeps_the_source_of_its_weights(toy_recipe, tmp_path):
    runs = [f"{tmp_path}/runs/toy/version_{version}" for version in (0, 1)]
    run(toy_recipe, "--budget.max_steps", "1")
    run(toy_recipe, "--budget.max_steps", "2")
    words = ["--model.decoder", "null", "--trainer.logger.name", "second", "--model.init_from"]
    run(toy_recipe, *words, runs[0], "--budget.max_steps", "1")
    run(toy_recipe, *words, runs[1], "--budget.max_steps", "2", "--ckpt_path", "last")
    steps = [read(tmp_path / f"runs/second/version_{version}/checkpoints/last.ckpt") for version in (0, 1)]
    assert steps[0]["decoder"]["init_from"] == steps[1]["decoder"]["init_from"]
    assert steps[0]["decoder"]["init_from"].startswith(runs[0])


def test_shards_of_another_model_are_refused(toy_recipe):
    """Of shards that hold more layers torch would read a part without a word."""
    command = ["fit", "--config", toy_recipe, "--budget.max_steps", "2", "--ckpt_path", "last"]
    command += ["--config", "recipes/strategy/fsdp.yaml", "--trainer.devices", "1"]
    statuses, log = fork_command(command)
    assert statuses == [0], log
    assert "checkpoint: none in " in log
    statuses, log = fork_command([*command, "--budget.max_steps", "3", "--model.decoder.num_layers", "1"])
    assert statuses == [2]
    assert "decoder.num_layers 2, that of the recipe 1; leave it as it was" in log.splitlines()[-1]


@pytest.fixture
def without_mask(tmp_path):
    """Folder of a tokenizer without a mask token, and words for a recipe on data that it prepared."""
    tokenizer = str(save_word_level(tmp_path / "tokenizer", 100, has_mask=False))
    generator = torch.Generator().manual_seed(0)
    words = [" ".join(f"w{word}" for word in torch.randint(2, 30, (60,), generator=generator)) for _ in range(100)]
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(words):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    output = str(tmp_path / "dataset")
    PrepareText(input=[str(tmp_path / "texts")], tokenizer=tokenizer, output=output, val_share=0.1, num_workers=1).run()
    return tokenizer, ["--data.datasets", output, "--budget.max_steps"]


@pytest.mark.parametrize("kind", ["run", "export"])
def test_a_second_stage_keeps_the_mask_row_that_the_first_has_trained(toy_recipe, without_mask, tmp_path, kind):
    """Whether the data's tokenizer is the original one, which has no mask token, the run's own or the run itself."""
    tokenizer, words = without_mask
    first = run(toy_recipe, *words, "12", "--data.tokenizer", tokenizer)
    source = tmp_path / "runs" / "toy"
    if kind == "export":
        Export(checkpoint=str(source), output=str(tmp_path / "exported")).run()
        source = tmp_path / "exported"
    recipe = tmp_path / "second.yaml"
    stated = toy_recipe.read_text().splitlines()
    recipe.write_text("\n".join(line for line in stated if "decoder:" not in line))
    folders = [tokenizer, str(tmp_path / "runs" / "toy"), str(tmp_path / "runs" / "toy" / "version_0")]
    for folder in folders:
        start = ["--model.init_from", str(source), "--data.tokenizer", folder]
        cli = run(recipe, *words, "1", *start, "--model.optimizer.lr", "1e-20", "--model.optimizer.final_lr", "0")
        assert cli.model.mask_token_id == 100
        assert_same_weights(cli, first)


def test_a_mask_row_that_nothing_has_trained_starts_as_the_mean(toy_recipe, without_mask, tmp_path):
    tokenizer, words = without_mask
    run(toy_recipe, *words, "2", "--data.tokenizer", tokenizer)
    Export(checkpoint=str(tmp_path / "runs" / "toy"), output=str(tmp_path / "exported")).run()
    (tmp_path / "exported" / "tokenizer.json").write_bytes(Path(tokenizer, "tokenizer.json").read_bytes())
    source = open_source(tmp_path / "exported")
    assert new_mask_token(source, Tokenizer.load(tokenizer)) == 100
    assert new_mask_token(open_source(tmp_path / "runs" / "toy"), Tokenizer.load(tokenizer)) is None
    # nor has a plain run, whose row was never read
    run(toy_recipe, *words, "2", "--data.tokenizer", tokenizer, "--model.mask_ratio", "0")
    assert new_mask_token(open_source(tmp_path / "runs" / "toy"), Tokenizer.load(tokenizer)) == 100


class Clock:
    """A module `time` whose clock goes on by a second whenever it is read."""

    def __init__(self):
        self.seconds = 0

    def monotonic(self):
        self.seconds += 1
        return self.seconds


def test_a_resumed_run_has_the_whole_max_time_again(toy_recipe, monkeypatch):
    """Lightning's own timer goes on with the time of the run before, and would end the second at once."""
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", Clock())
    words = ["--trainer.max_time", "00:00:00:04", "--ckpt_path", "last"]
    steps = [run(toy_recipe, *words).trainer.global_step for _ in range(2)]
    assert 0 < steps[0] < steps[1] < 12
