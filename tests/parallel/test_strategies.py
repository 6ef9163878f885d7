"""One recipe on any number of devices: real processes (gloo) against a single one."""

import json
import subprocess
import sys
from unittest import mock

import pytest
import torch

from meap_lit.checkpoint.export import Export
from meap_lit.checkpoint.source import open_source
from meap_lit.cli import main
from meap_lit.errors import UserError
from meap_lit.modules import MEAPPretraining
from meap_lit.parallel.strategies import FlatSharded
from meap_lit.recipe.cli import RecipeCLI
from tests.support.split_model import save_split_model
from tests.support.toy_module import fork

# heads that two devices can share; a tied embedding; every step is four micro-batches of a device
MODEL = [
    "--model.decoder.num_heads",
    "4",
    "--model.decoder.num_kv_heads",
    "2",
    "--model.decoder.tie_embeddings",
    "true",
]
CLIPPED = [*MODEL, "--trainer.gradient_clip_val", "0.1"]  # so low that every step is


def train(recipe, *overrides):
    """A single process; its weights."""
    cli = RecipeCLI.run(["fit", "--config", str(recipe), "--data.micro_batch_size", "1", *overrides])
    return cli.model.decoder.state_dict()


def train_on(num_devices, recipe, *overrides, overlay="fsdp2"):
    """Real processes; fails with what they said."""
    command = [sys.executable, "-m", "meap_lit", "fit", "--config", str(recipe)]
    command += ["--config", f"recipes/strategy/{overlay}.yaml", "--trainer.devices", str(num_devices)]
    command += ["--data.micro_batch_size", "1", *overrides]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "clean validation loss" in result.stdout
    return result.stdout


def train_forked(num_devices, recipe, *overrides, overlay="fsdp"):
    """Real processes; FSDP1 on the CPU, too, which a user would be told to do without."""
    words = ["fit", "--config", str(recipe), "--config", f"recipes/strategy/{overlay}.yaml"]
    words += ["--trainer.devices", str(num_devices), "--data.micro_batch_size", "1", *overrides]

    def fit():
        with mock.patch.object(FlatSharded, "_check_devices"):
            sys.exit(main(words))

    assert fork(fit, num_devices, timeout=120) == [0] * num_devices


def weights_of(run):
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("decoder."): value for name, value in state.items() if name.startswith("decoder.")}


def assert_close(weights, expected):
    assert expected.keys() <= weights.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, atol=5e-6, rtol=1e-4, msg=name)


ONE_FILE = ["--trainer.strategy.save_distributed_checkpoint", "false"]


@pytest.mark.parametrize(
    ("overlay", "num_devices", "options"),
    [
        ("fsdp2", 2, []),
        ("fsdp2", 2, ["--trainer.strategy.cpu_offload", "true"]),
        ("hsdp", 4, ["--trainer.strategy.shard_size", "2"]),
        ("fsdp2_tp", 4, []),
    ],
)
def test_pretraining_is_the_same_on_any_devices(toy_recipe, tmp_path, overlay, num_devices, options):
    alone = train(toy_recipe, *CLIPPED)
    train_on(num_devices, toy_recipe, *CLIPPED, *options, *ONE_FILE, overlay=overlay)
    assert_close(weights_of(tmp_path / "runs" / "toy" / "version_1"), alone)


@pytest.mark.parametrize(
    ("overlay", "num_devices", "options"),
    [
        ("fsdp2", 2, []),
        ("hsdp", 4, ["--trainer.strategy.shard_size", "2"]),
        ("fsdp2_tp", 4, []),
    ],
)
def test_fine_tuning_is_the_same_on_any_devices(toy_sft_recipe, prepared, tmp_path, overlay, num_devices, options):
    source = ["--model.init_from", str(save_split_model(prepared.tokenizer, tmp_path / "source"))]
    alone = train(toy_sft_recipe, *source)
    train_on(num_devices, toy_sft_recipe, *source, *options, *ONE_FILE, overlay=overlay)
    assert_close(weights_of(tmp_path / "runs" / "toy" / "version_1"), alone)


@pytest.mark.parametrize(("num_devices", "options"), [(2, []), (4, ["--trainer.strategy.shard_size", "2"])])
def test_fsdp1_pretraining_is_the_same_on_any_devices(toy_recipe, tmp_path, num_devices, options):
    train_forked(num_devices, toy_recipe, *CLIPPED, *options, *ONE_FILE)
    assert_close(weights_of(tmp_path / "runs" / "toy" / "version_0"), train(toy_recipe, *CLIPPED))


def test_fsdp1_fine_tuning_is_the_same_on_any_devices(toy_sft_recipe, tmp_path):
    options = ["--model.activation_checkpointing", "selective", "--trainer.strategy.reshard_after_forward", "false"]
    train_forked(2, toy_sft_recipe, *options, *ONE_FILE)
    assert_close(weights_of(tmp_path / "runs" / "toy" / "version_0"), train(toy_sft_recipe))


def test_adapters_are_the_same_on_any_devices(toy_sft_recipe, tmp_path):
    options = ["--model.lora.rank", "4", "--model.activation_checkpointing", "selective"]
    alone = train(toy_sft_recipe, *options)
    train_on(2, toy_sft_recipe, *options, *ONE_FILE)
    trained = {name: value for name, value in alone.items() if "lora" in name}
    assert_close(weights_of(tmp_path / "runs" / "toy" / "version_1"), trained)


def test_a_checkpoint_resumes_on_other_devices(toy_recipe, tmp_path):
    """2 devices in shards -> 4 with tensor parallel, in one file -> 1 alone; and 1 alone -> 2."""
    runs = tmp_path / "runs" / "toy"

    def checkpoint(version, step):
        return ["--ckpt_path", str(runs / f"version_{version}" / "checkpoints" / f"step={step}.ckpt")]

    alone = train(toy_recipe, *MODEL)
    train_on(2, toy_recipe, *MODEL)
    assert (runs / "version_1" / "checkpoints" / "step=5.ckpt" / ".metadata").is_file(), "a folder of shards"
    train_on(4, toy_recipe, *MODEL, *ONE_FILE, *checkpoint(1, 5), overlay="fsdp2_tp")
    assert_close(weights_of(runs / "version_2"), alone)
    assert_close(train(toy_recipe, *MODEL, *checkpoint(2, 10)), alone)
    train_on(2, toy_recipe, *MODEL, *ONE_FILE, *checkpoint(0, 5))
    assert_close(weights_of(runs / "version_4"), alone)


def test_a_checkpoint_resumes_with_fsdp1_and_from_it(toy_recipe, tmp_path):
    """1 alone -> FSDP1 in shards -> FSDP2 in shards -> FSDP1 in one file -> 1 alone."""
    runs = tmp_path / "runs" / "toy"
    options = [*MODEL, "--checkpoint.every_n_steps", "3", "--budget.max_steps", "15"]

    def checkpoint(version, step):
        return ["--ckpt_path", str(runs / f"version_{version}" / "checkpoints" / f"step={step}.ckpt")]

    alone = train(toy_recipe, *options)
    train_forked(2, toy_recipe, *options, *checkpoint(0, 3))
    assert (runs / "version_1" / "checkpoints" / "step=6.ckpt" / ".metadata").is_file(), "a folder of shards"
    train_forked(2, toy_recipe, *options, *checkpoint(1, 6), overlay="fsdp2")
    train_forked(2, toy_recipe, *options, *ONE_FILE, *checkpoint(2, 9))
    assert_close(weights_of(runs / "version_3"), alone)
    assert_close(train(toy_recipe, *options, *checkpoint(3, 12)), alone)


def test_optimizer_options_given_on_a_resume_apply_on_any_devices(toy_recipe, tmp_path):
    """1 alone -> DDP -> FSDP2, from one file -> tensor parallel, from shards -> FSDP1; other options on each."""
    runs, options = tmp_path / "runs" / "toy", [*MODEL, "--checkpoint.every_n_steps", "3", "--budget.max_steps", "15"]
    changes = {3 * leg: {"lr": 4e-3 / leg, "final_lr": 1e-4 * leg, "weight_decay": 0.3 * leg} for leg in range(1, 5)}
    changes[6] |= {"betas": [0.5, 0.9], "eps": 1e-3}
    change = ["--trainer.callbacks+=tests.support.breakdown.ChangeOptimizer"]
    expected = train(toy_recipe, *options, *change, "--trainer.callbacks.changes", json.dumps(changes))
    for number, overlay in enumerate(("ddp", "fsdp2", "fsdp2_tp", "fsdp")):
        step = 3 * (number + 1)
        words = [word for name, value in changes[step].items() for word in (f"--model.optimizer.{name}", str(value))]
        words += ["--trainer.strategy.tensor_parallel_size", "2"] if overlay == "fsdp2_tp" else []
        words += ["--ckpt_path", str(runs / f"version_{number}" / "checkpoints" / f"step={step}.ckpt")]
        train_forked(2, toy_recipe, *options, *words, *(ONE_FILE if overlay == "fsdp" else []), overlay=overlay)
    assert (runs / "version_2" / "checkpoints" / "step=9.ckpt" / ".metadata").is_file(), "a folder of shards"
    assert_close(weights_of(runs / "version_4"), expected)


@pytest.mark.parametrize("form", [[], ["--trainer.strategy.save_distributed_checkpoint", "false"]])
def test_a_module_can_refuse_a_checkpoint_before_its_weights_are_read(toy_recipe, tmp_path, form):
    """Weights of another shape, which torch would fail on in its own words."""
    fit = ["fit", "--config", str(toy_recipe), "--config", "recipes/strategy/fsdp2.yaml", "--trainer.devices", "1"]
    checkpoints = str(tmp_path / "runs" / "toy" / "version_0")
    assert fork(lambda: sys.exit(main([*fit, *form, "--budget.max_steps", "1"]))) == [0]

    def refused():
        with mock.patch.object(MEAPPretraining, "on_load_checkpoint", side_effect=UserError("refused")) as asked:
            status = main([*fit, *form, "--ckpt_path", checkpoints, "--model.decoder.num_layers", "3"])
        assert asked.call_args[0][0]["decoder"]["config"]["num_layers"] == 2
        sys.exit(status)

    assert fork(refused) == [2]


def test_shards_are_exported_and_generate(toy_recipe, tmp_path):
    train_on(2, toy_recipe, "--budget.max_steps", "2")
    run, exported = tmp_path / "runs" / "toy" / "version_0", tmp_path / "exported"
    Export(checkpoint=str(run), output=str(exported)).run()
    shards, folder = open_source(run), open_source(exported)
    assert {*shards.names()} == {*folder.names()}
    for name in folder.names():
        assert torch.equal(shards.read(name), folder.read(name)), name


# ------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--trainer.strategy.shard_size", "3"],
            "1 devices cannot be divided into groups of .*shard_size 3 x tensor_pa",
        ),
        (["--trainer.strategy.shard_size", "0"], "trainer.strategy.shard_size must be at least 1, got 0"),
        (["--trainer.strategy.timeout_minutes", "0"], "trainer.strategy.timeout_minutes must be above 0, got 0"),
        (
            ["--trainer.strategy.tensor_parallel_size", "2"],
            "1 devices of a node cannot be divided by .*tensor_parallel_size 2;",
        ),
    ],
)
def test_devices_that_do_not_divide_are_named(toy_recipe, options, message):
    overlay = ["--config", "recipes/strategy/fsdp2.yaml", "--trainer.devices", "1"]
    with pytest.raises(UserError, match=message):
        RecipeCLI.run(["fit", "--config", str(toy_recipe), *overlay, *options])


@pytest.mark.parametrize(
    ("device", "options", "message"),
    [
        ("cpu", [], r"FlatSharded \(fsdp.yaml\) needs GPUs; use fsdp2.yaml"),
        (
            "cuda",
            [],
            r"FlatSharded \(fsdp.yaml\) needs at least 2 devices to share the weights; use single",
        ),
        ("cuda", ["--trainer.strategy.shard_size", "1"], "needs at least 2 devices to share the weights"),
    ],
)
def test_fsdp1_says_which_devices_it_needs(toy_recipe, device, options, message):
    fit = ["fit", "--config", str(toy_recipe), "--config", "recipes/strategy/fsdp.yaml", "--trainer.devices", "1"]
    where = mock.patch.object(FlatSharded, "root_device", torch.device(device))
    with where, pytest.raises(UserError, match=message):
        RecipeCLI.run([*fit, *options])


def test_fsdp1_splits_no_adapters(toy_sft_recipe):
    fit = ["fit", "--config", str(toy_sft_recipe), "--config", "recipes/strategy/fsdp.yaml", "--trainer.devices", "1"]

    def refused():
        with mock.patch.object(FlatSharded, "_check_devices"), pytest.raises(UserError, match=r"use fsdp2.yaml with"):
            RecipeCLI.run([*fit, "--model.lora.rank", "4"])
        sys.exit(7)

    assert fork(refused) == [7]
