"""Validation on several datasets: what is read of each, and what the loss of their mixture is."""

import json
import os

import pytest
import torch

from meap_lit.data.datamodule import share_out, short_names
from meap_lit.data.prepare.chat import PrepareChat
from meap_lit.data.prepare.text import PrepareText
from meap_lit.errors import UserError
from meap_lit.model import IGNORE_INDEX
from meap_lit.recipe.cli import RecipeCLI
from tests.support.toy_module import fork

STEPS = ["--budget.max_steps", "3", "--budget.val_every_n_steps", "3"]


def fit(recipe, datasets, *words):
    return RecipeCLI.run(["fit", "--config", str(recipe), "--data.datasets", json.dumps(datasets), *STEPS, *words])


@pytest.mark.parametrize(
    ("number", "weights", "available", "expected"),
    [
        (10, [0.7, 0.3], [100, 100], [7, 3]),
        (16, [0.01, 0.99], [100, 100], [1, 15]),  # none goes without
        (10, [3, 1], [2, 100], [2, 8]),  # what one lacks, the other gives
        (10, [1, 1], [2, 3], [2, 3]),
        (7, [1, 1, 1], [100, 100, 100], [3, 2, 2]),
        (5, [2.5], [100], [5]),
        (3, [1, 1, 1000], [1, 1, 9], [1, 1, 1]),
    ],
)
def test_samples_are_shared_out_by_weight(number, weights, available, expected):
    assert share_out(number, weights, available) == expected


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["data/wiki", "data/code/"], ["wiki", "code"]),
        (["s3://bucket/wiki", "data/wiki", "data/code"], ["bucket/wiki", "data/wiki", "data/code"]),
        (["a/x/text", "b/x/text"], ["a/x/text", "b/x/text"]),
        (["text", "/text"], ["text", "/text"]),
        (["data/wiki", "data/wiki/"], ["data/wiki", "data/wiki/"]),
    ],
)
def test_names_tell_datasets_apart(paths, names):
    assert short_names(paths) == names


@pytest.fixture(scope="module")
def texts(prepared, tmp_path_factory):
    """Folder of a smaller dataset of other words."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"zebra {number} " * 60)
    output = str(folder / "zebras")
    PrepareText(input=[str(folder)], tokenizer=prepared.tokenizer, output=output, val_share=0.2, num_workers=1).run()
    return output


@pytest.fixture(scope="module")
def short_answers(prepared, tmp_path_factory):
    """Folder of conversations with shorter answers than those of the fixture `chat`."""
    folder = tmp_path_factory.mktemp("short_answers")
    with open(folder / "chat.jsonl", "w") as file:
        for number in range(60):
            turns = [{"role": "user", "content": f"river {number}"}, {"role": "assistant", "content": "finds stone"}]
            file.write(json.dumps({"messages": turns}) + "\n")
    output = str(folder / "short")
    options = {"tokenizer": prepared.tokenizer, "template": "mistral", "val_share": 0.2, "num_workers": 1}
    PrepareChat(input=[str(folder / "chat.jsonl")], output=output, **options).run()
    return output


@pytest.fixture(params=["text", "chat"])
def case(request, prepared):
    """Recipe, its own dataset, another."""
    names = {"text": ("toy_recipe", "texts"), "chat": ("toy_sft_recipe", "short_answers")}[request.param]
    recipe, other = map(request.getfixturevalue, names)
    return recipe, prepared.dataset if request.param == "text" else request.getfixturevalue("chat"), other


def loss_by_hand(cli, path):
    """Mean loss, and labels in a sample, of what one dataset gives to the validation of a finished run."""
    module, data = cli.model, cli.datamodule
    place = list(data.val_counts).index(path)
    summed = labels = 0
    with torch.no_grad():
        for batch in data.val_dataloader():
            if batch["source"] == place:
                rest = () if "sample_ids" in batch else (batch["position_ids"], batch["documents"])
                logits = module.decoder.logits(module.decoder(batch["input_ids"], *rest)).double()
                summed += torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
                )
                labels += int((batch["labels"] != IGNORE_INDEX).sum())
    return float(summed) / labels, labels / data.val_counts[path]


@pytest.mark.parametrize("val_samples", [None, 6])
def test_the_loss_of_a_mixture_and_of_its_parts(case, val_samples):
    """Weights are shares of samples; a sample counts by its supervised tokens, however many of it were read."""
    recipe, one, other = case
    words = [] if val_samples is None else ["--data.val_samples", str(val_samples)]
    cli = fit(recipe, {one: 0.01, other: 0.99}, *words)
    if val_samples is not None:
        assert list(cli.datamodule.val_counts.values()) == [1, 5]
    (loss, labels), (other_loss, other_labels) = (loss_by_hand(cli, path) for path in (one, other))
    assert abs(loss - other_loss) > 0.02, "there is a difference to see"
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    names = cli.datamodule.names
    assert metrics[f"val/loss/{names[one]}"] == pytest.approx(loss, rel=1e-5)
    assert metrics[f"val/loss/{names[other]}"] == pytest.approx(other_loss, rel=1e-5)
    expected = 0.01 * labels * loss + 0.99 * other_labels * other_loss
    assert metrics["val/loss"] == pytest.approx(expected / (0.01 * labels + 0.99 * other_labels), rel=1e-5)


def test_ranks_and_micro_batches_change_nothing(toy_recipe, prepared, texts, tmp_path):
    mix = {prepared.dataset: 0.3, texts: 0.7}
    words = ["--data.val_samples", "11", "--model.optimizer.lr", "1e-9", "--model.optimizer.final_lr", "0"]
    alone = fit(toy_recipe, mix, *words).trainer.callback_metrics
    names = {name for name in alone if name.startswith("val/")}
    assert len(names) == 4

    def run():
        cli = fit(toy_recipe, mix, *words, "--trainer.devices", "2", "--trainer.strategy", "ddp")
        metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items() if name in names}
        (tmp_path / f"{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(metrics))

    assert fork(run, num_ranks=2) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first == pytest.approx({name: float(alone[name]) for name in names}, rel=1e-5)


def test_one_dataset_has_one_loss(toy_recipe, prepared):
    metrics = fit(toy_recipe, {prepared.dataset: 1.0}).trainer.callback_metrics
    assert {name for name in metrics if name.startswith("val/")} == {"val/loss", "val/perplexity"}


def test_fewer_samples_than_datasets_are_refused(toy_recipe, prepared, texts):
    message = r"data.val_samples 1 is less than one for each of the 2 datasets with a validation split; raise it to 2"
    with pytest.raises(UserError, match=message):
        fit(toy_recipe, {prepared.dataset: 1.0, texts: 1.0}, "--data.val_samples", "1")


def test_a_dataset_without_a_validation_split_is_named(toy_recipe, prepared, tmp_path, caplog, capsys):
    output = str(tmp_path / "unseen")
    inputs = [str(prepared.texts / "1*.txt")]
    PrepareText(input=inputs, tokenizer=prepared.tokenizer, output=output, val_share=0.0, num_workers=1).run()
    with caplog.at_level("INFO"):
        cli = fit(toy_recipe, {prepared.dataset: 1.0, output: 3.0})
    said = [message for message in caplog.messages if "validation split" in message]
    assert said == [f"dataset {output} has no validation split; val/loss does not include it"]
    metrics = cli.trainer.callback_metrics
    assert metrics["val/loss"] == metrics["val/loss/dataset"], "the loss of what there is"
    assert "val/loss/unseen" not in metrics
    assert "validation loss by dataset  dataset " in capsys.readouterr().out
