"""One recipe on any number of devices: real processes (gloo) against a single one."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from functools import partial
from unittest import mock

import pytest
import torch

from meap_lit.checkpoint.export import Export
from meap_lit.checkpoint.source import open_source
from meap_lit.cli import main
from meap_lit.errors import UserError
from meap_lit.modules import MEAPPretraining
from meap_lit.recipe.cli import RecipeCLI
from tests.support.checkpoints import read, save_as_0_1
from tests.support.split_model import save_split_model
from tests.support.toy_module import fork

SHORT = ["--budget.max_steps", "6", "--budget.val_every_n_steps", "4", "--checkpoint.every_n_steps", "2"]
SHORT += ["--data.val_samples", "4"]
# heads that two devices can share; a tied embedding; every step is four micro-batches of a device
MODEL = [
    *SHORT,
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


def train_on(num_devices, recipe, *overrides, overlay="fsdp"):
    """Real processes; fails with what they said."""
    command = [sys.executable, "-m", "meap_lit", "fit", "--config", str(recipe)]
    command += ["--config", f"recipes/strategy/{overlay}.yaml", "--trainer.devices", str(num_devices)]
    command += ["--data.micro_batch_size", "1", *overrides]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "clean validation loss" in result.stdout
    return result.stdout


def train_forked(num_devices, recipe, *overrides, overlay="fsdp"):
    """Real processes, forked: they need not import anything."""
    words = ["fit", "--config", str(recipe), "--config", f"recipes/strategy/{overlay}.yaml"]
    words += ["--trainer.devices", str(num_devices), "--data.micro_batch_size", "1", *overrides]
    assert fork(lambda: sys.exit(main(words)), num_devices, timeout=300) == [0] * num_devices


def weights_of(run):
    state = read(run / "checkpoints" / "last.ckpt")["state_dict"]
    return {name.removeprefix("decoder."): value for name, value in state.items() if name.startswith("decoder.")}


def assert_close(weights, expected):
    assert expected.keys() <= weights.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, atol=5e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("overlay", "num_devices", "options"),
    [
        ("fsdp", 2, []),
        ("fsdp", 2, ["--trainer.strategy.cpu_offload", "true"]),
        ("hsdp", 4, ["--trainer.strategy.shard_size", "2"]),
        ("fsdp_tp", 4, []),
    ],
)
def test_pretraining_is_the_same_on_any_devices(toy_recipe, tmp_path, overlay, num_devices, options):
    alone = train(toy_recipe, *CLIPPED)
    start = train_forked if options or num_devices > 2 else train_on  # Lightning starts processes once; it takes long
    start(num_devices, toy_recipe, *CLIPPED, *options, overlay=overlay)
    assert_close(weights_of(tmp_path / "runs" / "toy" / "version_1"), alone)


@pytest.mark.parametrize(
    ("overlay", "num_devices", "options"),
    [
        ("fsdp", 2, []),
        ("hsdp", 4, ["--trainer.strategy.shard_size", "2", "--trainer.strategy.reduce_each_micro_batch", "false"]),
        ("fsdp_tp", 4, []),
    ],
)
def test_fine_tuning_is_the_same_on_any_devices(toy_sft_recipe, prepared, tmp_path, overlay, num_devices, options):
    source = [*SHORT, "--model.init_from", str(save_split_model(prepared.tokenizer, tmp_path / "source"))]
    alone = train(toy_sft_recipe, *source)
    train_forked(num_devices, toy_sft_recipe, *source, *options, overlay=overlay)
    assert_close(weights_of(tmp_path / "runs" / "toy" / "version_1"), alone)


def test_adapters_are_the_same_on_any_devices(toy_sft_recipe, tmp_path):
    options = [*SHORT, "--model.lora.rank", "4", "--model.activation_checkpointing", "selective"]
    alone = train(toy_sft_recipe, *options)
    train_forked(2, toy_sft_recipe, *options)
    trained = {name: value for name, value in alone.items() if "lora" in name}
    assert_close(weights_of(tmp_path / "runs" / "toy" / "version_1"), trained)


def test_a_checkpoint_resumes_on_other_devices(toy_recipe, tmp_path):
    """2 devices -> 4 with tensor parallel -> 1 alone; and 1 alone, as version 0.1 wrote it -> 2."""
    runs = tmp_path / "runs" / "toy"

    def checkpoint(version, step):
        return runs / f"version_{version}" / "checkpoints" / f"step={step}.ckpt"

    alone = train(toy_recipe, *MODEL)
    train_forked(2, toy_recipe, *MODEL)
    assert len(list(checkpoint(1, 2).glob("*.distcp"))) == 2
    train_forked(4, toy_recipe, *MODEL, "--ckpt_path", str(checkpoint(1, 2)), overlay="fsdp_tp")
    assert_close(weights_of(runs / "version_2"), alone)
    assert_close(train(toy_recipe, *MODEL, "--ckpt_path", str(checkpoint(2, 4))), alone)
    save_as_0_1(read(checkpoint(0, 2)), tmp_path / "old.ckpt")
    train_forked(2, toy_recipe, *MODEL, "--ckpt_path", str(tmp_path / "old.ckpt"))
    assert_close(weights_of(runs / "version_4"), alone)
    train_forked(2, toy_recipe, *MODEL, "--ckpt_path", str(checkpoint(1, 2)))
    same, whole = weights_of(runs / "version_5"), weights_of(runs / "version_1")
    assert all(torch.equal(same[name], value) for name, value in whole.items()), "the same devices: to the bit"


def test_a_checkpoint_of_replicated_shards_resumes_with_tensor_parallelism(toy_recipe, tmp_path):
    runs = tmp_path / "runs" / "toy"
    alone = train(toy_recipe, *MODEL)
    train_forked(4, toy_recipe, *MODEL, "--trainer.strategy.shard_size", "2", overlay="hsdp")
    checkpoint = runs / "version_1" / "checkpoints" / "step=2.ckpt"
    train_forked(4, toy_recipe, *MODEL, "--ckpt_path", str(checkpoint), overlay="fsdp_tp")
    assert_close(weights_of(runs / "version_2"), alone)


@pytest.mark.parametrize("words", [[], ["--config", "recipes/strategy/ddp.yaml", "--trainer.devices", "1"]])
def test_a_checkpoint_of_version_0_1_goes_on_to_the_bit(toy_recipe, tmp_path, words):
    alone = train(toy_recipe)
    save_as_0_1(read(tmp_path / "runs" / "toy" / "version_0" / "checkpoints" / "step=5.ckpt"), tmp_path / "old.ckpt")
    resumed = []

    def resume():
        resumed.append(train(toy_recipe, *words, "--ckpt_path", str(tmp_path / "old.ckpt")))
        assert all(torch.equal(resumed[0][name], value) for name, value in alone.items())

    assert fork(resume) == [0]


def test_optimizer_options_given_on_a_resume_apply_on_any_devices(toy_recipe, tmp_path):
    """1 alone -> DDP -> FSDP -> tensor parallel; other options on each."""
    runs, options = tmp_path / "runs" / "toy", [*MODEL, "--budget.max_steps", "8"]
    changes = {2 * leg: {"lr": 4e-3 / leg, "final_lr": 1e-4 * leg, "weight_decay": 0.3 * leg} for leg in range(1, 4)}
    changes[4] |= {"betas": [0.5, 0.9], "eps": 1e-3}
    change = ["--trainer.callbacks+=tests.support.breakdown.ChangeOptimizer"]
    expected = train(toy_recipe, *options, *change, "--trainer.callbacks.changes", json.dumps(changes))
    for number, overlay in enumerate(("ddp", "fsdp", "fsdp_tp")):
        step = 2 * (number + 1)
        words = [word for name, value in changes[step].items() for word in (f"--model.optimizer.{name}", str(value))]
        words += ["--trainer.strategy.tensor_parallel_size", "2"] if overlay == "fsdp_tp" else []
        words += ["--ckpt_path", str(runs / f"version_{number}" / "checkpoints" / f"step={step}.ckpt")]
        train_forked(2, toy_recipe, *options, *words, overlay=overlay)
    assert_close(weights_of(runs / "version_3"), expected)


def test_a_module_can_refuse_a_checkpoint_before_its_weights_are_read(toy_recipe, tmp_path):
    """Weights of another shape, which torch would fail on in its own words."""
    fit = ["fit", "--config", str(toy_recipe), "--config", "recipes/strategy/fsdp.yaml", "--trainer.devices", "1"]
    checkpoints = str(tmp_path / "runs" / "toy" / "version_0")
    assert fork(lambda: sys.exit(main([*fit, "--budget.max_steps", "1"]))) == [0]

    def refused():
        with mock.patch.object(MEAPPretraining, "on_load_checkpoint", side_effect=UserError("refused")) as asked:
            status = main([*fit, "--ckpt_path", checkpoints, "--model.decoder.num_layers", "3"])
        assert asked.call_args[0][0]["decoder"]["config"]["num_layers"] == 2
        sys.exit(status)

    assert fork(refused) == [2]


def test_parts_of_many_devices_are_exported(toy_recipe, tmp_path):
    train_forked(2, toy_recipe, "--budget.max_steps", "2")
    run, exported = tmp_path / "runs" / "toy" / "version_0", tmp_path / "exported"
    Export(checkpoint=str(run), output=str(exported)).run()
    parts, folder = open_source(run), open_source(exported)
    assert {*parts.names()} == {*folder.names()}
    for name in folder.names():
        assert torch.equal(parts.read(name), folder.read(name)), name


@pytest.mark.parametrize(("overlay", "num_devices"), [("ddp", 2), ("fsdp", 2), ("fsdp_tp", 4)])
def test_compiled_blocks_learn_the_same_on_any_devices(toy_recipe, tmp_path, overlay, num_devices):
    """As on a GPU, where blocks are compiled by default, but without the kernels, which take a minute to build."""
    alone = train(toy_recipe, *CLIPPED)
    with mock.patch("torch.compile", partial(torch.compile, backend="aot_eager")):
        train_forked(num_devices, toy_recipe, *CLIPPED, "--model.compile", "true", overlay=overlay)
    assert_close(weights_of(tmp_path / "runs" / "toy" / "version_1"), alone)


def test_sharded_weights_are_validated_without_inference_mode(toy_recipe):
    """FSDP2 keeps buffers from one forward to the next, and could not write to those of inference mode."""
    modes = []
    for overlay in ("single", "fsdp"):
        overlays = ["--config", f"recipes/strategy/{overlay}.yaml", "--trainer.devices", "1"]
        cli = RecipeCLI("fit", ["--config", str(toy_recipe), *overlays])
        cli.build()
        modes.append(cli.trainer.validate_loop.inference_mode)
    assert modes == [True, False]


def test_all_groups_of_a_mesh_wait_as_long_as_the_recipe_says(toy_recipe, tmp_path):
    def record(timeout, group):
        with open(tmp_path / f"groups-{os.getpid()}", "a") as file:
            file.write(f"{timeout / timedelta(minutes=1):g} minutes: {group.size()}\n")

    options = ["--trainer.strategy.shard_size", "2", "--trainer.strategy.timeout_minutes", "7"]
    with mock.patch("meap_lit.parallel.strategies._set_pg_timeout", record):
        train_forked(4, toy_recipe, *MODEL, *options, "--budget.max_steps", "1", overlay="hsdp")
    recorded = [sorted(file.read_text().splitlines()) for file in tmp_path.glob("groups-*")]
    assert recorded == [["7 minutes: 1", "7 minutes: 2", "7 minutes: 2"]] * 4


# ------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--trainer.strategy.shard_size", "3"],
            "1 devices cannot be divided into groups of .*shard_size 3 x tensor_pa",
        ),
        (["--trainer.strategy.timeout_minutes", "0"], "trainer.strategy.timeout_minutes must be above 0, got 0"),
    ],
)
def test_devices_that_do_not_divide_are_named(toy_recipe, options, message):
    overlay = ["--config", "recipes/strategy/fsdp.yaml", "--trainer.devices", "1"]
    with pytest.raises(UserError, match=message):
        RecipeCLI.run(["fit", "--config", str(toy_recipe), *overlay, *options])
