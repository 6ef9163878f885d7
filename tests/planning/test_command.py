"""The command `plan`: a recipe's memory and time in text, what would make it fit, and wrong input in one line."""

import json
from pathlib import Path

import pytest

from meap_lit.cli import main
from meap_lit.planning.command import PlanCLI

pytestmark = pytest.mark.slow

RECIPE = "recipes/pretrain/meap_1.1b.yaml"


def plan(capsys, *arguments) -> str:
    assert main(["plan", *map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def complain(capsys, *arguments) -> str:
    assert main(["plan", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# ---------------------------------------------------------------------------------------------- the report


def test_a_recipe_of_the_paper_on_eight_devices(capsys):
    out = plan(capsys, "--config", RECIPE, "--devices", 8, "--model.activation_checkpointing", "full")
    assert "1,175,816,192 parameters trained" in out
    assert "256 rows x 4,096 = 1,048,576 tokens: 8 x 4 rows on each of 8 data-parallel devices" in out
    assert "190,734 steps, 200B tokens" in out  # 200e9 // 1,048,576
    # 6 per weight of a product (all but the embedding's 65,667,072 and the norms' 100,352) and 12 x 24 x 2,048 x 4,096
    per_token = 6 * (1_175_816_192 - 65_667_072 - 100_352) + 12 * 24 * 2048 * 4096
    flops = per_token * 190_734 * 1_048_576
    assert f"{flops:.3g} FLOPs" in out
    assert f"{flops / (8 * 989e12 * 0.4) / 86_400:.3g} days at 40% of 8 x 989 TFLOP/s" in out
    assert "of 80: fits" in out
    assert "tokenizer data/tokenizer does not exist: a vocabulary of 32,064 is assumed" in out


def test_overlays_and_overrides_are_followed(capsys):
    shard = ("--config", "recipes/strategy/hsdp.yaml", "--devices", 8, "--nodes", 2)
    out = plan(capsys, "--config", RECIPE, *shard, "--data.micro_batch_size", 2)
    assert "16, 2 copies of the model over 8 (FSDP) devices" in out
    assert "8 x 2 rows on each of 16 data-parallel devices" in out
    assert "gathered weights" in out


def test_with_the_overlay_ddps_buckets_hold_the_gradients_if_there_is_nothing_to_accumulate(capsys):
    small = ("--config", "recipes/pretrain/meap_0.1b.yaml", "--devices", 2)
    overlay = ("--config", "recipes/strategy/ddp.yaml")
    at_once = ("--data.global_batch_size", 8)
    assert "DDP's buckets" in plan(capsys, *small)
    assert "DDP's buckets" in plan(capsys, *small, *overlay)
    assert "DDP's buckets" not in plan(capsys, *small, *overlay, *at_once)


def test_what_does_not_fit_comes_with_the_smallest_changes(capsys):
    out = plan(capsys, "--config", RECIPE, "--devices", 8, "--device_memory", 50)
    assert "of 50: does not fit" in out
    assert "  --data.micro_batch_size 2: " in out
    assert "  --model.activation_checkpointing selective: " in out
    none = plan(capsys, "--config", RECIPE, "--devices", 1, "--device_memory", 1)
    assert "no change that plan knows makes it fit" in none


def test_a_prepared_recipe_is_planned_with_its_own_vocabulary_and_data(capsys, toy_sft_recipe):
    toy_sft_recipe.write_text(toy_sft_recipe.read_text().replace("max_steps: 12", "max_epochs: 2"))
    out = plan(capsys, "--config", toy_sft_recipe, "--devices", 1)
    assert "steps, " in out
    assert "note:" not in out
    hidden, inner, rows = 32, 64, 320  # the mask token is among the tokenizer's 320
    block = 4 * hidden * hidden - 2 * hidden * 16 + 3 * hidden * inner + 2 * hidden
    assert f"{2 * block + 2 * rows * hidden + hidden:,} parameters trained" in out


def test_a_dataset_that_is_not_there_leaves_epochs_open(capsys, toy_sft_recipe):
    toy_sft_recipe.write_text(toy_sft_recipe.read_text().replace("max_steps: 12", "max_epochs: 2"))
    out = plan(capsys, "--config", toy_sft_recipe, "--devices", 1, "--data.datasets", "nowhere")
    assert "steps and time are known when the dataset is prepared" in out
    assert "attention is counted over whole rows" in out


def test_a_tokenizer_of_another_model_is_refused_as_fit_does(capsys, source_folder, toy_sft_recipe, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    config = json.loads((source_folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 64}))
    line = complain(capsys, "--config", toy_sft_recipe, "--devices", 1, "--model.init_from", folder)
    assert f"model.init_from {folder} has 64 vocabulary rows, too few for the 320 ids of tokenizer" in line


def test_a_config_file_stands_in_for_a_model_that_is_not_there(capsys, source_folder, toy_sft_recipe):
    away = ("--config", toy_sft_recipe, "--devices", 1, "--model.init_from", "nowhere")
    assert "parameters trained" in plan(capsys, *away, "--decoder", source_folder / "config.json")


@pytest.mark.parametrize("recipe", ["released_code", "lora_llama3_8b"])
def test_a_recipe_of_the_same_shape_stands_in_for_a_model_that_is_not_there(capsys, recipe):
    words = ("--config", f"recipes/sft/{recipe}.yaml", "--config", "recipes/strategy/fsdp.yaml", "--devices", 8)
    out = plan(capsys, *words, "--decoder", "recipes/pretrain/meap_8b.yaml")
    # Meta-Llama-3-8B's published 8,030,261,248, and 64 more rows of embedding and head, 4,096 wide, for the mask token
    num_parameters = 8_030_261_248 + 2 * 64 * 4096
    adapters = recipe.startswith("lora")
    assert f"{num_parameters:,} {'frozen' if adapters else 'parameters trained'}" in out
    assert "of 80: fits" in out


@pytest.mark.parametrize("words", [["--device-memory", "50"], ["--device-memory=50"]])
def test_options_are_spelt_with_hyphens_too(capsys, words):
    assert "of 50: does not fit" in plan(capsys, "--config", RECIPE, "--devices", 8, *words)


def test_an_earlier_spelling_is_read(capsys):
    assert "at 50% of 8 x" in plan(capsys, "--config", RECIPE, "--devices", 8, "--utilisation", 0.5)


# ------------------------------------------------------------------------------------- the table of docs/scaling.md


def documented() -> list[list[str]]:
    """Recipe, GPUs, words, GB and time of each row of the table "From 1 to 512 GPUs"."""
    section = Path("docs/scaling.md").read_text().split("## From 1 to 512 GPUs")[1].split("\n## ")[0]
    rows = [[cell.strip("` ") for cell in line.split("|")[1:-1]] for line in section.splitlines() if line[:1] == "|"]
    return [row for row in rows if row[0].endswith(".yaml")]


def test_the_table_has_all_sizes_and_numbers_of_devices():
    rows = {(recipe.split("/")[1], int(devices)) for recipe, devices, *_ in documented()}
    wanted = {("meap_8b.yaml", 8), ("meap_8b.yaml", 64), ("meap_8b.yaml", 512), ("meap_70b.yaml", 64)}
    assert rows >= wanted | {("meap_70b.yaml", 512), ("lora_llama3_70b.yaml", 8)}


@pytest.mark.parametrize("row", documented(), ids=lambda row: f"{row[0]}-{row[1]}")
def test_what_the_table_says_fits(capsys, row):
    recipe, devices, words, gigabytes, time = row
    stand_in = ["--decoder", f"recipes/pretrain/meap_{'70b' if '70b' in recipe else '8b'}.yaml"]
    arguments = ["--config", f"recipes/{recipe}", *words.split(), *(stand_in if recipe.startswith("sft") else [])]
    out = plan(capsys, *arguments)
    assert f"devices       {devices}, " in out
    assert f"{gigabytes} of 80: fits" in out
    assert float(gigabytes) < 0.9 * 80, "a tenth is left free"
    assert f"time          {time} at 40%" in out if time else "time     " not in out


def test_70b_takes_32_devices():
    words = ["--config", "recipes/pretrain/meap_70b.yaml", "--config", "recipes/strategy/fsdp.yaml", "--devices", "8"]
    on_8, on_16 = (PlanCLI.read([*words, "--nodes", str(nodes)]).plan for nodes in (1, 2))
    whole = 8 * (on_8.memory.parameters + on_8.memory.gradients + on_8.memory.optimizer)
    [remedy] = on_8.text().split("fits with\n")[1].splitlines()
    assert remedy.startswith("  --trainer.strategy.cpu_offload true: 35.95 GB, and 141.11 GB of the host's memory for")
    offloaded = PlanCLI.read([*words, "--trainer.strategy.cpu_offload", "true"]).plan
    assert (offloaded.memory.parameters, offloaded.memory.host) == (0, whole // 8)
    assert "and in the host's memory, for each device" in offloaded.text()
    assert f"{whole / 1e9:,.0f} GB" in Path("docs/scaling.md").read_text()
    remedies = on_16.text().split("fits with\n")[1].splitlines()
    assert [line.split(": ")[0].strip() for line in remedies if line[:2] == "  "] == ["--trainer.precision bf16-true"]


# ---------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "set the devices of a node with --devices; trainer.devices is auto"),
        (["--devices", "0"], "set the devices of a node with --devices; trainer.devices is 0"),
        (["--devices", "8", "--nodes", "0"], "trainer.num_nodes must be in [1, 100000], got 0"),
        (["--devices", "8", "--utilization", "40"], "--utilization must be in (0, 1], got 40; write 0.4 for 40%"),
        (["--devices", "8", "--device_memory", "-1"], "--device_memory must be above 0, got -1"),
        (["--devices", "8", "--peak_teraflops", "0"], "--peak_teraflops must be above 0, got 0"),
        (["--devices", "3"], "data.global_batch_size 256 cannot be divided by data.micro_batch_size 4 x 3 devices"),
        (["--devices", "8", "--device", "4"], "unrecognized arguments: --device 4"),
        (["--devices", "8", "--trainer.strategy", "deepspeed"], "trainer.strategy deepspeed is not known to plan"),
        (["--devices", "8", "--trainer.precision", "16-mixed"], "trainer.precision 16-mixed is not known to plan"),
        (["--devices", "8", "--model.init_from", "nowhere"], "set one of model.decoder"),
        (["--devices", "8", "--trainer.max_steps", "5"], "trainer.max_steps 5 contradicts the budget"),
        (["--devices", "8", "--model.decoder.max_seq_len", "64"], "is longer than the model's context, 64 tokens"),
    ],
)
def test_wrong_options_are_named(capsys, arguments, message):
    assert message in complain(capsys, "--config", RECIPE, *arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "(--decoder) does not exist"),
        ("{", "not valid JSON"),
        ("[]", "not a JSON object but list"),
        (json.dumps({"model_type": "gpt2"}), "gpt2"),
    ],
)
def test_a_wrong_config_file_is_named(capsys, tmp_path, toy_sft_recipe, content, message):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    line = complain(capsys, "--config", toy_sft_recipe, "--devices", 1, "--decoder", file)
    assert message in line
    assert str(file) in line


def test_a_model_that_is_not_there_is_asked_for(capsys, toy_sft_recipe):
    line = complain(capsys, "--config", toy_sft_recipe, "--devices", 1, "--model.init_from", "nowhere")
    assert "model.init_from nowhere does not exist, and is not the id of a repository on the Hugging Face Hub" in line
    assert line.endswith("; or name its config.json, or a recipe of its shape, with --decoder FILE")
