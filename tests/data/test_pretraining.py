import shutil

import pytest
import torch

from meap_lit.data.prepare.text import PrepareText
from meap_lit.data.pretraining import PretrainingData
from meap_lit.data.stream.micro_batches import Slice
from meap_lit.errors import UserError
from meap_lit.recipe.cli import RecipeCLI


def fit(recipe, *overrides):
    return RecipeCLI.run(["fit", "--config", str(recipe), *overrides])


@pytest.fixture(scope="module")
def other(prepared, tmp_path_factory) -> str:
    """A second dataset, without a validation split."""
    folder = str(tmp_path_factory.mktemp("other") / "dataset")
    inputs = [str(prepared.texts / "1*.txt")]
    PrepareText(input=inputs, tokenizer=prepared.tokenizer, output=folder, val_share=0.0, num_workers=1).run()
    return folder


def test_datasets_are_mixed_by_weight(toy_recipe, prepared, other):
    mix = f"{{{prepared.dataset}: 3, {other}: 1}}"
    cli = fit(toy_recipe, "--data.datasets", mix, "--budget.max_steps", "2")
    batches = iter(cli.datamodule.train_dataloader())
    sources = [int(sample) >> 32 for _ in range(100) for sample in next(batches)["sample_ids"]]
    assert len(sources) == 400
    assert 0.65 < sources.count(0) / 400 < 0.85
    assert "val/loss" in cli.trainer.callback_metrics, "validated on the one dataset with a validation split"


def test_a_dataset_without_validation_split_trains_without_validation(toy_recipe, other):
    cli = fit(toy_recipe, "--data.datasets", other, "--budget.max_steps", "2")
    assert cli.trainer.global_step == 2
    assert "val/loss" not in cli.trainer.callback_metrics


def test_the_number_of_validation_rows_can_be_bounded(toy_recipe):
    cli = fit(toy_recipe, "--data.val_samples", "3", "--budget.max_steps", "1")
    assert cli.datamodule.val_counts == {cli.datamodule.paths_with_val[0]: 3}
    assert len(cli.datamodule.val_dataloader()) == 1  # 3 rows in batches of 4


@pytest.fixture
def data(prepared, other, monkeypatch):
    """A mix that was set up, in rows of 32 tokens, on one device."""
    monkeypatch.setattr(PretrainingData, "rank_slice", Slice())
    data = PretrainingData({prepared.dataset: 3, other: 1}, prepared.tokenizer, seq_len=32, micro_batch_size=4)
    data.setup("fit")
    return data


def test_tokens_are_counted_in_the_first_rows_of_the_run(data, monkeypatch):
    monkeypatch.setattr("meap_lit.data.pretraining.COUNTED_TOKENS", 32 * 40)
    visits = data.order().visits(0, 40)
    reader = data._reader("train")
    tokens = torch.cat([reader.block(*visit)[:-1] for visit in zip(visits.sources, visits.samples, strict=True)])
    expected = torch.zeros(data.tokenizer.vocab_size, dtype=torch.int64)
    for token in tokens.flatten().tolist():
        expected[token] += 1
    assert torch.equal(data.token_counts(), expected)


def test_counts_do_not_depend_on_device_micro_batch_or_resume(data, prepared, other, monkeypatch):
    monkeypatch.setattr("meap_lit.data.pretraining.COUNTED_TOKENS", 32 * 40)
    again = PretrainingData({prepared.dataset: 3, other: 1}, prepared.tokenizer, seq_len=32, micro_batch_size=8)
    again.setup("fit")
    fingerprints = {path: manifest.fingerprint for path, manifest in data.manifests.items()}
    again.load_state_dict({"step": 5, "samples": 1280, "rows": data.row_settings, "datasets": fingerprints})
    expected = data.token_counts()
    monkeypatch.setattr(PretrainingData, "rank_slice", Slice(rank=1, num_replicas=2))
    assert torch.equal(again.token_counts(), expected)


def test_rows_of_a_small_dataset_count_as_often_as_they_are_seen(data, prepared, monkeypatch):
    data = PretrainingData(prepared.dataset, prepared.tokenizer, seq_len=32)
    data.setup("fit")
    rows = data.rows_in(1)
    monkeypatch.setattr("meap_lit.data.pretraining.COUNTED_TOKENS", 32 * rows)
    once = data.token_counts()
    monkeypatch.setattr("meap_lit.data.pretraining.COUNTED_TOKENS", 3 * 32 * rows)
    assert torch.equal(data.token_counts(), 3 * once)
    assert once.sum() == 32 * rows


def test_a_token_outside_the_vocabulary_is_named_when_counted(data, monkeypatch):
    monkeypatch.setattr(data.tokenizer, "vocab_size", 5)
    with pytest.raises(UserError, match=r"holds token id \d+, outside the model's vocabulary of 5;"):
        data.token_counts()


def test_preparation_makes_what_is_missing_and_only_that(toy_recipe, prepared, tmp_path, capsys):
    dataset = tmp_path / "made"
    recipe = toy_recipe.read_text().replace(f"datasets: {prepared.dataset}", f"datasets: {dataset}")
    recipe = recipe.replace(
        "    seq_len: 32\n",
        f"""\
    seq_len: 32
    preparation:
      - class_path: meap_lit.data.prepare.text.PrepareText
        init_args: {{input: [{prepared.texts}], tokenizer: {prepared.tokenizer}, output: {dataset}, val_share: 0.1}}
""",
    )
    toy_recipe.write_text(recipe)
    fit(toy_recipe, "--budget.max_steps", "1")
    made = (dataset / "manifest.json").stat().st_mtime_ns
    fit(toy_recipe, "--budget.max_steps", "1")
    assert (dataset / "manifest.json").stat().st_mtime_ns == made
    toy_recipe.write_text(recipe.replace("val_share: 0.1", "val_share: 0.2"))
    with pytest.raises(UserError, match=r"was made with val_share = 0.1, the recipe says 0.2; remove the folder"):
        fit(toy_recipe, "--budget.max_steps", "1")


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_must_be_positive(weight):
    with pytest.raises(UserError, match=f"the weight of a must be above 0( and finite)?, got {weight:g}"):
        PretrainingData({"a": weight}, "unused")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"datasets": {}}, "data.datasets names no dataset; name a folder"),
        ({"seq_len": 0}, "data.seq_len must be at least 1, got 0"),
        ({"val_samples": 0}, "data.val_samples must be at least 1, got 0"),
        ({"num_workers": -1}, "data.num_workers must be at least 0, got -1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        PretrainingData(**{"datasets": "a", "tokenizer": "unused", **options})


def test_rows_longer_than_the_text_are_named(toy_recipe):
    longer = ["--data.seq_len", "100000", "--model.decoder.max_seq_len", "100000"]
    with pytest.raises(
        UserError, match=r"train split of dataset .* has no chunk with data.seq_len \+ 1 = 100001 tokens"
    ):
        fit(toy_recipe, *longer)


def test_a_resume_on_other_data_is_refused(toy_recipe, prepared, tmp_path):
    other = str(tmp_path / "other")
    inputs = [str(prepared.texts / "1*.txt")]
    PrepareText(input=inputs, tokenizer=prepared.tokenizer, output=other, val_share=0.3, num_workers=1).run()
    fit(toy_recipe)
    checkpoint = str(tmp_path / "runs" / "toy" / "version_0" / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match="the checkpoint was trained on other data"):
        fit(toy_recipe, "--ckpt_path", checkpoint, "--data.datasets", other)
    moved = tmp_path / "moved"
    shutil.copytree(prepared.dataset, moved)
    longer = ["--budget.max_steps", "13"]
    fit(toy_recipe, *longer, "--ckpt_path", checkpoint, "--data.datasets", str(moved))  # the same content elsewhere
    validate = ["validate", "--config", str(toy_recipe), "--ckpt_path", checkpoint, "--data.datasets", other]
    assert RecipeCLI.run(validate).model.decoder is not None, "a model may be validated on any data"
