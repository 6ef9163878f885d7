"""One recipe on any number of devices: real processes (gloo) against a single one."""

import subprocess
import sys
from unittest import mock

import pytest
import torch

from meap_lit.checkpoints import open_source
from meap_lit.cli import main
from meap_lit.errors import UserError
from meap_lit.export import Export
from meap_lit.modules import MEAPPretraining
from meap_lit.recipe import RecipeCLI
from tests.callbacks.toy import fork
from tests.split_model import save_split_model

# heads that two devices can share; a tied embedding; every step is four micro-batches of a device
MODEL = [
    "--model.decoder.num_heads",
    "4",
    "--model.decoder.num_kv_heads",
    "2",
    "--model.decoder.tie_embeddings",
    "true",
]


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
    alone = train(toy_recipe, *MODEL)
    train_on(num_devices, toy_recipe, *MODEL, *options, *ONE_FILE, overlay=overlay)
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
