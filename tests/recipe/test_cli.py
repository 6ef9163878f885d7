"""Every recipe of the project is parsed, and runs at toy size."""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from meap_lit.errors import UserError
from meap_lit.recipe.cli import RecipeCLI
from meap_lit.recipe.file import lineage
from tests.conftest import TOY_RECIPE

RECIPES = sorted(path for path in Path("recipes").rglob("*.yaml"))
OVERLAYS = [path for path in RECIPES if path.parent.name in ("strategy", "variant", "logger")]
VARIANTS = [path for path in OVERLAYS if path.parent.name == "variant"]
EVALUATIONS = [path for path in RECIPES if path.parent.name.startswith(("eval", "small"))]
RUNNABLE = [
    path for path in RECIPES if path.name not in ("base.yaml", "claims.yaml") and path not in (*OVERLAYS, *EVALUATIONS)
]
FINE_TUNING = [path for path in RUNNABLE if any("MEAPFineTuning" in part.read_text() for part in lineage(path))]
EXTENSIONS = [path for path in RUNNABLE if path.name.startswith("extend_")]
CONTINUATIONS = [path for path in RUNNABLE if path.name.startswith("continue")]

TOY = [
    *("--data.global_batch_size", "4"),
    *("--data.micro_batch_size", "2"),
    *("--data.num_workers", "0"),
    *("--data.preparation", "null"),
    *("--budget.max_steps", "2"),
    *("--trainer.precision", "32-true"),
    *("--trainer.accelerator", "cpu"),
]
TOY_DECODER = [
    *("--model.decoder.num_layers", "1"),
    *("--model.decoder.hidden_size", "32"),
    *("--model.decoder.num_heads", "2"),
    *("--model.decoder.num_kv_heads", "1"),
    *("--model.decoder.intermediate_size", "64"),
    *("--model.decoder.vocab_size", "384"),
]
TOY_PRETRAINING = [
    *("--data.seq_len", "192"),
    *("--budget.max_tokens", "null"),
    *("--probe.lengths", "[192]"),
    *("--probe.num_items", "1"),
    *("--probe.num_options", "3"),
    *("--probe.filler", "null"),
]
TOY_FINE_TUNING = [
    *("--data.seq_len", "400"),
    *("--budget.max_epochs", "null"),
]


def test_there_are_recipes():
    assert len(RUNNABLE) >= 19
    assert len(OVERLAYS) >= 5
    assert Path("recipes/quickstart.yaml") in RUNNABLE


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_recipe_opens_with_what_it_is_for(recipe):
    head = recipe.read_text().split("\n\n")[0]
    comment = [line for line in head.splitlines() if line.startswith("#")]
    assert len(comment) >= 2
    if recipe in RUNNABLE:
        assert f"python -m meap_lit fit --config {recipe}" in "\n".join(comment)
        assert "Hardware" in "\n".join(comment)
    if recipe in EVALUATIONS:
        command = "judge" if recipe.name == "judge.yaml" else "evaluate"
        assert f"python -m meap_lit {command} --config {recipe}" in "\n".join(comment)
    if recipe in OVERLAYS:
        assert f"--config {recipe}" in "\n".join(comment)


@pytest.mark.parametrize("recipe", sorted({*RUNNABLE} - {*FINE_TUNING}), ids=str)
@pytest.mark.slow
def test_a_pretraining_recipe_runs_at_toy_size(recipe, prepared, source_folder, tmp_path):
    data = [
        *("--data.datasets", prepared.dataset),
        *("--data.tokenizer", prepared.tokenizer),
        *("--trainer.logger.init_args.save_dir", str(tmp_path)),
    ]
    continues = recipe in (*EXTENSIONS, *CONTINUATIONS)
    model = ["--model.init_from", str(source_folder)] if continues else TOY_DECODER
    cli = RecipeCLI.run(["fit", "--config", str(recipe), *TOY, *TOY_PRETRAINING, *model, *data])
    assert cli.trainer.global_step == 2
    assert {"val/loss", "val/retrieval_accuracy"} <= cli.trainer.callback_metrics.keys()
    config = cli.model.decoder.config
    # that of the source, of the longest evaluation, or the length of a row
    context = 400 if recipe in CONTINUATIONS else {"facts": 256, "facts_256": 512}.get(recipe.stem, 192)
    assert (config.num_layers, config.max_seq_len) == (2 if continues else 1, context)
    assert config.rope_theta == 640_000 or recipe not in EXTENSIONS


@pytest.mark.parametrize("recipe", VARIANTS, ids=str)
@pytest.mark.slow
def test_a_variant_of_the_study_differs_in_its_masks_only(recipe, prepared, tmp_path):
    words = ["--data.datasets", prepared.dataset, "--data.tokenizer", prepared.tokenizer]
    words += ["--trainer.logger.init_args.save_dir", str(tmp_path), *TOY, *TOY_PRETRAINING, *TOY_DECODER]
    cli = RecipeCLI.run(["fit", "--config", "recipes/study/cpu.yaml", "--config", str(recipe), *words])
    assert cli.trainer.global_step == 2
    assert cli.trainer.logger.name == recipe.stem
    variant = yaml.safe_load(recipe.read_text())
    assert variant.keys() == {"model", "trainer"}
    assert variant["model"]["init_args"].keys() <= {"mask_ratio", "mask_scope", "span_len", "protect_rare"}
    assert max(cli.model.mask_ratio(step, 2) for step in range(10_000)) == pytest.approx(0.15)


@pytest.mark.parametrize("recipe", FINE_TUNING, ids=str)
def test_a_fine_tuning_recipe_runs_at_toy_size(recipe, prepared, chat, source_folder, tmp_path):
    data = [
        *("--model.init_from", str(source_folder)),
        *("--data.datasets", chat),
        *("--data.tokenizer", prepared.tokenizer),
        *("--trainer.logger.init_args.save_dir", str(tmp_path)),
    ]
    if "lora" in recipe.name:
        data += ["--trainer.precision", "bf16-mixed"]
    cli = RecipeCLI.run(["fit", "--config", str(recipe), *TOY, *TOY_FINE_TUNING, *data])
    assert cli.trainer.global_step == 2
    assert "val/loss" in cli.trainer.callback_metrics
    assert (cli.model.lora is not None) == ("lora" in recipe.name)


@pytest.mark.parametrize(
    ("name", "mask_ratio", "layout"),
    [
        ("meap_llama3_8b", 0.10, "concat"),
        ("ntp_llama3_8b", 0.0, "concat"),
        ("released_code", 0.10, "separate"),
        ("meap_llama3.2_3b", 0.10, "concat"),
        ("meap_mistral_7b", 0.10, "concat"),
        ("meap_qwen2.5_14b", 0.10, "concat"),
        ("meap_smollm2_135m", 0.10, "concat"),
        ("ntp_smollm2_135m", 0.0, "concat"),
        ("lora_smollm2_135m", 0.10, "concat"),
    ],
)
def test_fine_tuning_recipes_are_the_papers(name, mask_ratio, layout):
    data = resolve("--config", f"recipes/sft/{name}.yaml")["data"]["init_args"]
    duplication = data["duplication"]
    assert (duplication["mask_ratio"], duplication["layout"], duplication["min_copied"]) == (mask_ratio, layout, 50)


def resolve(*arguments):
    """The values of a recipe after its bases, interpolation and overrides, without running it."""
    parsed = {}

    class Parsed(RecipeCLI):
        def build(self):
            parsed.update(yaml.safe_load(self.parser.dump(self.config)))
            raise StopIteration

    with pytest.raises(StopIteration):
        Parsed.run(["fit", *arguments])
    return parsed


PAPER_LADDER = {
    "0.1b": (12, 12, 768, 2048),
    "0.3b": (24, 16, 1024, 2736),
    "0.5b": (24, 16, 1024, 4864),
    "1.1b": (24, 32, 2048, 5632),
}


@pytest.mark.parametrize("size", PAPER_LADDER)
@pytest.mark.parametrize(("objective", "ratio"), [("meap", 0.15), ("ntp", 0.0)])
def test_the_ladder_is_the_papers(size, objective, ratio):
    recipe = resolve("--config", f"recipes/pretrain/{objective}_{size}.yaml")
    model = recipe["model"]["init_args"]
    decoder = model["decoder"]
    names = ("num_layers", "num_heads", "hidden_size", "intermediate_size")
    assert tuple(decoder[name] for name in names) == PAPER_LADDER[size]
    assert (decoder["num_kv_heads"], decoder["max_seq_len"], decoder["norm_eps"]) == (2, 4096, 1e-5)
    assert decoder["rope_theta"] == 10_000
    assert not decoder["tie_embeddings"]
    assert model["mask_ratio"] == ratio
    optimizer = {"lr": 4e-4, "final_lr": 4e-5, "warmup_share": 0.1, "betas": [0.9, 0.95], "weight_decay": 0.05}
    assert optimizer.items() <= model["optimizer"].items()
    assert recipe["data"]["init_args"]["global_batch_size"] * 4096 == 2**20
    assert recipe["budget"]["max_tokens"] == 200_000_000_000
    assert recipe["trainer"]["gradient_clip_val"] == 1.0


def test_interpolation_follows_an_override():
    recipe = ("--config", "recipes/pretrain/mask_ratio.yaml")
    assert resolve(*recipe)["trainer"]["logger"]["init_args"]["name"] == "mask_ratio_0.15"
    changed = resolve(*recipe, "--model.mask_ratio", "0.05", "--seed_everything", "7")
    assert changed["trainer"]["logger"]["init_args"]["name"] == "mask_ratio_0.05"
    assert changed["model"]["init_args"]["seed"] == changed["data"]["init_args"]["seed"] == 7


@pytest.mark.parametrize(
    ("words", "decoder"),
    [
        ("--model.decoder.head_dim null", "{head_dim: null}"),
        ("--model.decoder.head_dim=null --model.decoder.num_layers 3", "{head_dim: null, num_layers: 3}"),
        ("--model.init_args.decoder.head_dim null --model.decoder.head_dim 24", "{head_dim: 24}"),
        ("--model.decoder.vocab_size 384 --model.init_args.decoder.vocab_size=null", "{vocab_size: null}"),
        (
            "--model.decoder.rope_scaling '{type: yarn, factor: 2.0, attention_factor: null}'",
            "{rope_scaling: {type: yarn, factor: 2.0}}",
        ),
        (
            "--model.decoder.rope_scaling.type yarn --model.decoder.rope_scaling.factor 2.0 "
            "--model.decoder.rope_scaling.attention_factor null --model.mask_cycle null",
            "{rope_scaling: {type: yarn, factor: 2.0}}",
        ),
    ],
)
def test_null_on_the_command_line_is_that_of_a_file(tmp_path, words, decoder):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(f"model: {{init_args: {{decoder: {decoder}}}}}\n")
    recipe = ("--config", "recipes/quickstart.yaml")
    changed = resolve(*recipe, *shlex.split(words))
    assert changed == resolve(*recipe, "--config", str(overlay))
    if "head_dim" in decoder:
        assert changed != resolve(*recipe)


def test_null_turns_sections_off_and_a_later_word_turns_one_on(tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("samples: null\nprobe: null\nhang: null\n")
    recipe = ("--config", "recipes/quickstart.yaml")
    off = resolve(*recipe, "--config", str(overlay))
    assert off == resolve(*recipe, "--samples", "null", "--probe=null", "--hang.timeout_minutes", "null")
    assert (off["samples"]["rows"], off["samples"]["prompts"], off["probe"]["lengths"], off["hang"]) == (0, [], [], {})
    on = resolve(*recipe, "--config", str(overlay), "--samples.rows", "3")
    assert on == off | {"samples": off["samples"] | {"rows": 3}}


@pytest.mark.parametrize(
    ("save_dir", "message"),
    [
        (
            "s3://bucket/x",
            "trainer.logger.save_dir must be a folder of this machine or its network, got s3://bucket/x; name one, "
            "such as runs, and copy it there when the run has ended",
        ),
        (
            "{file}",
            "cannot make the folder of logs {file}: File exists; name another as trainer.logger.save_dir",
        ),
        (
            "{file}/below",
            "cannot make the folder of logs {file}/below: Not a directory; name another as trainer.logger.save_dir",
        ),
        (
            "{locked}",
            "cannot write into the folder of logs {locked}; name another as trainer.logger.save_dir",
        ),
    ],
)
def test_where_logs_cannot_be_written_is_named_before_anything_is_made(
    toy_recipe, tmp_path, monkeypatch, save_dir, message
):
    places = {"file": tmp_path / "file", "locked": tmp_path / "locked"}
    places["file"].touch()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != places["locked"] and access(path, mode))
    words = ["--trainer.logger.save_dir", save_dir.format(**places), "--data.datasets", "nowhere"]
    with pytest.raises(UserError, match=f"^{re.escape(message.format(**places))}$"):
        RecipeCLI.run(["fit", "--config", str(toy_recipe), *words])


def test_a_class_is_found_by_its_name(tmp_path):
    names = tmp_path / "names.yaml"
    paths = tmp_path / "paths.yaml"
    recipe = """
        model: {{class_path: {modules}MEAPPretraining, init_args: {{mask_ratio: {{class_path: {masking}Linear}}}}}}
        data:
          class_path: {pretraining}PretrainingData
          init_args: {{preparation: [{{class_path: {facts}FactCorpus, init_args: {{output: x}}}}]}}
        trainer: {{strategy: {{class_path: {strategies}Sharded}}, logger: {{class_path: {loggers}CSVLogger}}}}
    """
    folders = {
        "modules": "meap_lit.modules.",
        "masking": "meap_lit.masking.",
        "pretraining": "meap_lit.data.pretraining.",
        "facts": "meap_lit.data.corpora.facts.",
        "strategies": "meap_lit.parallel.strategies.",
        "loggers": "lightning.pytorch.loggers.",
    }
    names.write_text(recipe.format(**dict.fromkeys(folders, "")))
    paths.write_text(recipe.format(**folders))
    quickstart = ("--config", "recipes/quickstart.yaml")
    by_name, by_path = (resolve(*quickstart, "--config", str(file)) for file in (names, paths))
    assert by_name == by_path
    assert by_name["trainer"]["strategy"]["class_path"] == "meap_lit.parallel.strategies.Sharded"
    # the options that the recipe states for the same class are kept
    assert by_name["data"]["init_args"]["seq_len"] == 64
    words = ("--model", "MEAPPretraining", "--model.mask_ratio", "WarmupHold", "--data", "PretrainingData")
    ramp = resolve(*quickstart, *words)["model"]["init_args"]["mask_ratio"]
    assert ramp["class_path"] == "meap_lit.masking.WarmupHold"


@pytest.mark.parametrize("words", ["--devices 2 --nodes 3", "--devices=2 --nodes=3"])
def test_devices_win_over_every_recipe(words):
    overlay = ("--config", "recipes/strategy/ddp.yaml")
    trainer = resolve(*words.split(), "--config", "recipes/pretrain/meap_0.1b.yaml", *overlay)["trainer"]
    assert (str(trainer["devices"]), trainer["num_nodes"]) == ("2", 3)


def test_a_printed_recipe_runs_from_any_folder(toy_recipe, tmp_path, monkeypatch, capsys):
    here = tmp_path / "here"
    here.mkdir()
    overlay = here / "mine.yaml"
    overlay.write_text("base: ../toy.yaml\ndata: {init_args: {datasets: {../prepared: 1.0}}}\n")
    dataset = yaml.safe_load(toy_recipe.read_text())["data"]["init_args"]["datasets"]
    (tmp_path / "prepared").symlink_to(dataset)
    monkeypatch.chdir(here)
    with pytest.raises(SystemExit):  # the option may be anywhere among the words
        RecipeCLI.run(["fit", "--print_config", "--config", "mine.yaml", "--model.mask_ratio", "0.1"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    recipe = yaml.safe_load(printed.read_text())
    assert recipe["base"] is None
    assert recipe["model"]["init_args"]["mask_ratio"] == 0.1
    assert recipe["data"]["init_args"]["datasets"] == {str(tmp_path / "prepared"): 1.0}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    cli = RecipeCLI.run(["fit", "--config", str(printed)])
    assert cli.trainer.global_step == 12


def test_a_printed_recipe_names_packaged_files_as_any_machine_finds_them(capsys):
    with pytest.raises(SystemExit):
        RecipeCLI.run(["fit", "--config", "recipes/sft/quickstart.yaml", "--print_config"])
    preparation = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["preparation"]
    assert preparation[0]["init_args"]["input"] == ["data/instructions.jsonl"]


def test_a_second_recipe_overrides_the_first(tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("trainer: {devices: 4}\nmodel: {init_args: {mask_ratio: 0.1}}\n")
    recipe = resolve("--config", "recipes/pretrain/meap_0.1b.yaml", "--config", str(overlay))
    assert recipe["trainer"]["devices"] == 4
    assert recipe["model"]["init_args"]["mask_ratio"] == 0.1
    assert recipe["model"]["init_args"]["decoder"]["hidden_size"] == 768


def test_bases_come_before_what_builds_on_them():
    names = [path.name for path in lineage(Path("recipes/pretrain/ntp_0.3b.yaml"))]
    assert names == ["base.yaml", "meap_0.3b.yaml", "ntp_0.3b.yaml"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("base: b.yaml", r"b.yaml does not exist \(named as base by .*a.yaml\)"),
        ("base: a.yaml", r"a.yaml is based on itself"),
        ("", r"a.yaml is empty or not a mapping"),
        ("model: [", r"a.yaml is not YAML"),
    ],
)
def test_a_broken_recipe_is_named(tmp_path, content, message):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        lineage(tmp_path / "a.yaml")


def test_a_model_and_data_that_do_not_go_together_are_named(toy_recipe, toy_sft_recipe):
    content, chat = yaml.safe_load(toy_recipe.read_text()), yaml.safe_load(toy_sft_recipe.read_text())
    toy_recipe.write_text(yaml.safe_dump(content | {"data": chat["data"]}))
    message = (
        "model.class_path MEAPPretraining does not train on the rows of data.class_path FineTuningData; set "
        "model.class_path to meap_lit.modules.MEAPFineTuning, or change the data"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        RecipeCLI.run(["fit", "--config", str(toy_recipe), "--model.protect_rare", "0.05"])
    toy_sft_recipe.write_text(yaml.safe_dump(chat | {"data": content["data"]}))
    with pytest.raises(UserError, match=r"^model\.class_path MEAPFineTuning does not .* to meap_lit.modules.MEAPPretr"):
        RecipeCLI.run(["fit", "--config", str(toy_sft_recipe)])


def test_an_option_that_does_nothing_in_fine_tuning_is_refused(toy_sft_recipe):
    """The config.yaml of an older run has it."""
    old = yaml.safe_load(toy_sft_recipe.read_text())
    old["model"]["init_args"]["seed"] = 0
    toy_sft_recipe.write_text(yaml.safe_dump(old))
    message = "model: meap_lit.modules.MEAPFineTuning has no option 'seed'; leave it out: data.seed decides it"
    with pytest.raises(UserError, match=f"^{message}$"):
        RecipeCLI.run(["fit", "--config", str(toy_sft_recipe)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--checkpoint.asynchronus true", "unrecognized arguments: .* true; did you mean '--checkpoint.asynchronous'?"),
        ("--trainer.devics 2", "unrecognized arguments: .* 2; did you mean '--trainer.devices'?"),
        (
            "--base recipes/quickstart.yaml",
            "`base` is a key of recipe files; on the command line give both recipes with .*",
        ),
        ("--checkpoint '{asynchronus: true}'", "there is no key .*; did you mean 'checkpoint.asynchronous'?"),
    ],
)
def test_a_misspelt_option_of_a_group_is_named_with_what_was_meant(toy_recipe, words, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?") + "$"):
        RecipeCLI.run(["fit", "--config", str(toy_recipe), *shlex.split(words)])


# ---------------------------------------------------------------------------------------------- --ckpt_path


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """The folder of a run of `toy_recipe` with checkpoints of steps 5 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = folder / "toy.yaml"
    recipe.write_text(TOY_RECIPE.format(dataset=prepared.dataset, tokenizer=prepared.tokenizer, runs=folder))
    RecipeCLI.run(["fit", "--config", str(recipe), "--budget.max_steps", "6"])
    return folder / "toy" / "version_0"


@pytest.fixture
def runs(trained, tmp_path):
    """Versions 0 and 1 of a run with a checkpoint of steps 5 and 6 each."""
    folder = tmp_path / "runs" / "toy"
    for version in ("version_0", "version_1"):
        shutil.copytree(trained, folder / version, symlinks=True)
    return folder


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("last", "version_1/checkpoints/step=6.ckpt"),
        ("{runs}", "version_1/checkpoints/step=6.ckpt"),
        ("{runs}/version_0", "version_0/checkpoints/step=6.ckpt"),
        ("{runs}/version_0/checkpoints/step=5.ckpt", "version_0/checkpoints/step=5.ckpt"),
    ],
)
def test_a_run_is_resumed_from_its_newest_whole_checkpoint_which_is_named(runs, toy_recipe, given, found, capsys):
    path = given.format(runs=runs)
    cli = RecipeCLI.run(["fit", "--config", str(toy_recipe), "--budget.max_steps", "7", "--ckpt_path", path])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("checkpoint: ")]
    assert said == [f"checkpoint: {runs / found}"]
    assert cli.trainer.ckpt_path == str(runs / found)
    assert cli.trainer.global_step == 7


def test_a_checkpoint_cut_short_is_passed_over_and_a_changed_one_refused(runs, toy_recipe):
    newest = runs / "version_1" / "checkpoints" / "step=6.ckpt"
    part = newest / "__0_0.distcp"
    content = part.read_bytes()
    part.write_bytes(content[:-100])
    resume = ["fit", "--config", str(toy_recipe), "--ckpt_path"]
    assert RecipeCLI.run([*resume, "last"]).trainer.ckpt_path == str(newest.with_name("step=5.ckpt"))
    with pytest.raises(UserError, match=r"^checkpoint file .*step=6.ckpt/__0_0.distcp is damaged: it has"):
        RecipeCLI.run([*resume, str(newest)])
    part.write_bytes(content[:5000] + bytes(10) + content[5010:])
    with pytest.raises(UserError, match=r"^checkpoint file .*__0_0.distcp is damaged: its content is not what was wri"):
        RecipeCLI.run([*resume, str(newest)])


def test_a_last_checkpoint_that_cannot_be_looked_for_is_named(toy_recipe):
    message = "--ckpt_path last needs a trainer.logger with save_dir and name; name a run's folder instead"
    with pytest.raises(UserError, match=f"^{message}$"):
        RecipeCLI.run(["fit", "--config", str(toy_recipe), "--trainer.logger", "false", "--ckpt_path", "last"])


def test_runs_without_loggers_do_not_share_a_folder(toy_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", str(toy_recipe), "--trainer.logger", "false", "--budget.max_steps"]
    RecipeCLI.run([*words, "1"])
    message = r"^runs/checkpoints has an earlier run \(step=1.ckpt\), which a new one would replace; continue it with"
    with pytest.raises(UserError, match=rf"{message} --ckpt_path runs/checkpoints, or name another folder as checkp"):
        RecipeCLI.run([*words, "1"])
    RecipeCLI.run([*words, "2", "--ckpt_path", "runs/checkpoints"])


def test_a_last_checkpoint_that_is_not_there_is_named_but_by_fit(toy_recipe, tmp_path):
    with pytest.raises(UserError, match=r"^checkpoint .*/runs/toy \(--ckpt_path last\) does not exist$"):
        RecipeCLI.run(["validate", "--config", str(toy_recipe), "--ckpt_path", "last"])
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "step=5.ckpt").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"cut \(--ckpt_path last\) has no complete checkpoint \(step=N.ckpt\); name"):
        RecipeCLI.run(
            ["fit", "--config", str(toy_recipe), "--checkpoint.dirpath", str(tmp_path / "cut"), "--ckpt_path", "last"]
        )


def test_runs_with_names_of_their_own_are_named(toy_recipe):
    words = ["--config", str(toy_recipe), "--budget.max_steps", "2"]
    RecipeCLI.run(["fit", *words, "--trainer.logger.version", "job_1"])
    with pytest.raises(
        UserError, match=r"runs/toy \(--ckpt_path last\) has runs with names of their own, job_1; name one$"
    ):
        RecipeCLI.run(["validate", *words, "--ckpt_path", "last"])


@pytest.fixture
def leaves_no_folder(tmp_path, monkeypatch):
    """Whatever the test does makes no folder of a run, and no file where it is started."""
    started = tmp_path / "started"
    started.mkdir()
    monkeypatch.chdir(started)
    versions = sorted((tmp_path / "runs").rglob("*"))
    yield
    assert sorted((tmp_path / "runs").rglob("*")) == versions
    assert not list(started.iterdir())


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"max_steps": 6}, "budget.max_steps 6 ends at step 6"),
        ({"max_steps": 4}, "budget.max_steps 4 ends at step 4"),
        ({"max_tokens": 1800}, "budget.max_tokens 1800 ends at step 7"),
        ({"max_epochs": 1}, r"budget.max_epochs 1 ends at step \d+"),
    ],
)
def test_a_spent_budget_is_said_in_a_line_and_leaves_nothing(toy_recipe, tmp_path, capsys, budget, said, request):
    words = [
        word for name, value in ({"max_steps": "null"} | budget).items() for word in (f"--budget.{name}", str(value))
    ]
    fit = ["fit", "--config", str(toy_recipe), *words]
    RecipeCLI.run(["fit", "--config", str(toy_recipe), "--budget.max_steps", "6"] if "max_steps" in budget else fit)
    request.getfixturevalue("leaves_no_folder")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        RecipeCLI.run([*fit, "--ckpt_path", "last"])
    assert ended.value.code == 0
    *_, line = capsys.readouterr().out.splitlines()
    step = r"checkpoint \S+step=(\d+).ckpt is at optimizer step \1"
    assert re.fullmatch(
        rf"the budget is spent: {step}, and {said}; raise it to continue, or start another run .*", line
    ), line


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("--model.mask_ratio 0", "model.mask_ratio 0.15 -> 0.0"),
        (
            "--model.mask_ratio WarmupHold --model.mask_ratio.mask_ratio 0.15 --model.mask_ratio.warmup_steps 4",
            "model.mask_ratio 0.15 -> WarmupHold",
        ),
        ("--model.mask_ratio 0.15", None),
        (
            "--model.optimizer.lr 0.1 --budget.val_every_n_steps 3",
            "model.optimizer.lr 0.003 -> 0.1, budget.val_every_n_steps 5 -> 3",
        ),
    ],
)
def test_what_a_resume_changes_is_named(runs, toy_recipe, capsys, words, changes):
    with pytest.raises(SystemExit):
        RecipeCLI.run(
            ["fit", "--config", str(toy_recipe), "--budget.max_steps", "6", "--ckpt_path", "last", *words.split()]
        )
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop().endswith("or start another run with --ckpt_path null --trainer.logger.name NAME")
    if changes is not None:
        assert lines.pop() == f"changed since the checkpoint was saved: {changes}"
    assert lines.pop().endswith("step=6.ckpt")


def test_a_resumed_schedule_is_no_other_one(toy_recipe, capsys):
    schedule = ["--model.mask_ratio", "WarmupHold", "--model.mask_ratio.mask_ratio", "0.15"]
    fit = ["fit", "--config", str(toy_recipe), *schedule, "--model.mask_ratio.warmup_steps", "2"]
    for steps in ("2", "3"):
        RecipeCLI.run([*fit, "--budget.max_steps", steps, "--ckpt_path", "last"])
    assert re.search(r"^checkpoint: .*step=2.ckpt$", capsys.readouterr().out, re.MULTILINE)


def test_validate_prints_what_it_finds_and_leaves_nothing(runs, toy_recipe, capsys, leaves_no_folder):
    longer = ["--model.decoder.max_seq_len", "256", "--data.seq_len", "160", "--probe.lengths", "[160]"]
    cli = RecipeCLI.run(["validate", "--config", str(toy_recipe), *longer, "--ckpt_path", "last"])
    found = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    printed = capsys.readouterr().out
    for name in ("val/loss", "val/perplexity", "val/retrieval_accuracy"):
        assert float(re.search(rf"{name}\W+([\d.]+)", printed)[1]) == pytest.approx(found[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "--data.global_batch_size 16",
            "data.global_batch_size was 8 in the run of the checkpoint and is 16 now, which changes the rows of its ",
        ),
        ("--data.seed 2", "data.seed was 1 in the run of the checkpoint and is 2 now"),
        # more tokens a step would have spent this budget
        ("--data.global_batch_size 16 --budget.max_steps 3", "data.global_batch_size was 8 "),
    ],
)
def test_other_rows_are_refused_and_leave_nothing(runs, toy_recipe, change, message, leaves_no_folder):
    with pytest.raises(UserError, match=f"^{message}"):
        RecipeCLI.run(["fit", "--config", str(toy_recipe), "--ckpt_path", "last", *change.split()])


def test_callbacks_of_a_recipe_find_its_loggers(toy_recipe):
    stats = "--trainer.callbacks+=lightning.pytorch.callbacks.DeviceStatsMonitor"  # refuses a run without loggers
    RecipeCLI.run(["fit", "--config", str(toy_recipe), "--budget.max_steps", "1", stats])
