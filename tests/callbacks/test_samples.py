"""Texts and titles in TensorBoard: rows of training, continuations of prompts, charts."""

import re
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from meap_lit.callbacks import Samples
from meap_lit.errors import UserError
from meap_lit.inference.language_model import LanguageModel
from meap_lit.recipe.cli import RecipeCLI

PROMPTS = ["the old river keeps", "every quiet stone"]


def fit(recipe, *words) -> RecipeCLI:
    return RecipeCLI.run(["fit", "--config", str(recipe), *map(str, words)])


def events(cli) -> EventAccumulator:
    return EventAccumulator(cli.trainer.log_dir, size_guidance={"tensors": 0}).Reload()


def texts(cli, tag) -> dict[int, str]:
    """Texts of a tag by step."""
    found = events(cli)
    if f"{tag}/text_summary" not in found.Tags()["tensors"]:
        return {}
    return {event.step: event.tensor_proto.string_val[0].decode() for event in found.Tensors(f"{tag}/text_summary")}


def test_prompts_are_continued_at_validations_as_a_checkpoint_continues_them(toy_recipe):
    cli = fit(toy_recipe, "--samples.prompts", PROMPTS, "--samples.max_new_tokens", 6)
    shown = texts(cli, "continuations")
    assert list(shown) == [5, 10, 12]
    for step, text in shown.items():
        model = LanguageModel(f"{cli.trainer.log_dir}/checkpoints/step={step}.ckpt", device="cpu")
        ids = [model.encode(prompt) for prompt in PROMPTS]
        for prompt, prompt_ids, new_ids in zip(PROMPTS, ids, model.generate(ids, max_new_tokens=6)):
            continuation = model.text_after(prompt_ids, new_ids)
            assert f"**Prompt**\n\n    {prompt}\n\n**Continuation**\n\n    {continuation}" in text


def test_a_prompt_of_fine_tuning_is_the_message_of_a_user(toy_sft_recipe):
    cli = fit(toy_sft_recipe, "--samples.prompts", PROMPTS[:1], "--samples.max_new_tokens", 4)
    [*_, (step, text)] = texts(cli, "continuations").items()
    model = LanguageModel(f"{cli.trainer.log_dir}/checkpoints/step={step}.ckpt", device="cpu")
    template = model.chat_template("tokenizer")
    ids = template.encode_prompt([{"role": "user", "content": PROMPTS[0]}])
    stops = cli.datamodule.stop_token_ids
    [new_ids] = model.generate([ids], max_new_tokens=4, stop_token_ids=stops)
    assert text.endswith(f"**Continuation**\n\n    {model.text_after(ids, new_ids)}")


@pytest.mark.parametrize(
    "words", [[], ["--trainer.precision", "bf16-mixed"], ["--model.activation_checkpointing", "full"]]
)
def test_training_is_the_same_to_the_bit(toy_recipe, words):
    with_samples = fit(toy_recipe, "--samples.prompts", PROMPTS, *words)
    assert texts(with_samples, "rows")
    assert texts(with_samples, "continuations")
    without = fit(toy_recipe, "--samples.rows", 0, *words)
    assert not texts(without, "rows")
    for one, other in zip(with_samples.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_rows_are_shown_from_the_start_until_they_have_masks(toy_recipe):
    cli = fit(toy_recipe)
    assert list(shown := texts(cli, "rows")) == [0]
    assert shown[0].count("[MASK]") == 2 * 4, "two rows of 32 tokens"
    hold = '{"class_path": "meap_lit.masking.WarmupHold", "init_args": {"mask_ratio": 0.4, "hold_off": 7}}'
    shown = texts(fit(toy_recipe, "--model.mask_ratio", hold), "rows")
    assert [(step, "[MASK]" in text) for step, text in shown.items()] == [(0, False), (5, False), (10, True)]
    assert "row 80 of the run, step 10:" in shown[10]
    assert list(texts(fit(toy_recipe, "--model.mask_ratio", 0), "rows")) == [0], "a plain run has no masks to wait for"


def test_every_curve_has_a_title(toy_recipe, toy_sft_recipe, prepared, tmp_path):
    shutil.copytree(prepared.dataset, tmp_path / "other")
    mixed = ["--data.datasets", {prepared.dataset: 0.5, str(tmp_path / "other"): 0.5}]
    probe = ["--model.decoder.max_seq_len", 160, "--data.seq_len", 160, "--probe.lengths", "[160]"]
    for recipe, words in ((toy_recipe, probe), (toy_recipe, mixed), (toy_sft_recipe, [])):
        found = events(fit(recipe, *words))
        [config] = found.Tensors("custom_scalars__config__")
        layout = layout_pb2.Layout.FromString(config.tensor_proto.string_val[0])
        tags = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
        logged = set(found.Tags()["scalars"]) - {"epoch", "hp_metric"}  # Lightning's own
        assert {tag for tag in logged if not any(re.match(expression, tag) for expression in tags)} == set()
        assert {expression for expression in tags if not any(re.match(expression, tag) for tag in logged)} <= {
            "val/retrieval_accuracy$"
        }


def test_other_loggers_get_no_texts(toy_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("meap_lit.callbacks.samples.generate", lambda *_, **__: pytest.fail("nobody reads it"))
    csv = f'{{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {{"save_dir": "{tmp_path / "csv"}"}}}}'
    root = ["--trainer.default_root_dir", tmp_path]  # of a run without loggers
    for logger in (csv, "false"):
        assert (
            fit(toy_recipe, "--trainer.logger", logger, "--samples.prompts", PROMPTS, *root).trainer.global_step == 12
        )


def test_a_sharded_model_leaves_the_prompts_out_and_says_so(toy_recipe, caplog):
    strategy = ["--config", "recipes/strategy/fsdp.yaml", "--trainer.devices", 1]
    with caplog.at_level("INFO"):
        cli = fit(toy_recipe, "--samples.prompts", PROMPTS, *strategy)
    assert list(texts(cli, "rows")) == [0]
    assert not texts(cli, "continuations")
    said = [record.message for record in caplog.records if "samples.prompts" in record.message]
    [message] = said
    assert message.startswith("samples.prompts are left out: trainer.strategy divides the model among devices")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples.rows", -1], r"samples.rows must be at least 0, got -1"),
        (["--samples.max_new_tokens", 0], r"samples.max_new_tokens must be at least 1, got 0"),
        (
            ["--samples.prompts", ["the old river " * 100]],
            r"samples.prompts: 1 of 1 prompts leave no room for max_new_tok",
        ),
    ],
)
def test_wrong_options_are_named(toy_recipe, words, message):
    with pytest.raises(UserError, match=f"^{message}"):
        fit(toy_recipe, *words)


def test_the_defaults_show_rows_and_continue_nothing():
    assert (Samples().rows, Samples().prompts) == (2, [])
