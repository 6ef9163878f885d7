"""What is not finite ends a run in one line, and never reaches a checkpoint."""

import copy
import math
import shutil
import sys

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from meap_lit.cli import main
from meap_lit.errors import UserError
from meap_lit.modules import AdamW
from meap_lit.recipe.cli import RecipeCLI
from tests.support.checkpoints import read, save
from tests.support.toy_module import fork

OVERFLOW = "--trainer.callbacks+=tests.support.breakdown.OverflowAtStep"


@pytest.fixture(params=["toy_recipe", "toy_sft_recipe"])
def any_recipe(request):
    """A recipe of twelve steps that pretrains, and one that fine-tunes a checkpoint of transformers."""
    return request.getfixturevalue(request.param)


def run(recipe, *words):
    return RecipeCLI.run(["fit", "--config", str(recipe), *words])


def overflow_at(step, rank=0):
    return [OVERFLOW, "--trainer.callbacks.step", str(step), "--trainer.callbacks.rank", str(rank)]


def checkpoints(tmp_path, version=0):
    return tmp_path / "runs" / "toy" / f"version_{version}" / "checkpoints"


def saved(tmp_path):
    return sorted(path.name for path in checkpoints(tmp_path).glob("step=*.ckpt"))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(any_recipe, tmp_path):
    message = r"loss is not finite at optimizer step 8; last good checkpoint: .*step=5.ckpt; resume from it"
    with pytest.raises(UserError, match=message):
        run(any_recipe, "--trainer.callbacks+=tests.support.breakdown.BreakAtStep7")
    assert saved(tmp_path) == ["step=5.ckpt"]


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(any_recipe, tmp_path):
    """No step before the eighth is logged; the save of the eighth finds what its backward did."""
    whole = run(any_recipe, "--trainer.logger.version", "whole")
    words = ["--checkpoint.every_n_steps", "4", "--trainer.log_every_n_steps", "100"]
    message = r"gradients are not finite at optimizer step 8, though the loss is; last good checkpoint: .*step=4.ckpt; "
    with pytest.raises(UserError, match=message):
        run(any_recipe, *words, *overflow_at(8))
    assert saved(tmp_path) == ["step=4.ckpt"]
    resumed = run(any_recipe, "--ckpt_path", str(checkpoints(tmp_path) / "step=4.ckpt"))
    for name, tensor in whole.model.decoder.state_dict().items():
        assert torch.equal(tensor, resumed.model.decoder.state_dict()[name]), name


class Watch(L.Callback):
    """Keeps weights and optimizer state after step 7, and at the end of the run."""

    kept: list

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 7 and not Watch.kept:
            Watch.kept.append(copy.deepcopy(self.state(trainer)))

    def on_exception(self, trainer, pl_module, exception):
        Watch.kept.append(self.state(trainer))

    def state(self, trainer):
        moments = trainer.optimizers[0].state_dict()["state"]
        return [*trainer.model.parameters(), *(value for state in moments.values() for value in state.values())]


def test_no_update_is_made_from_such_a_gradient_on_until_the_host_knows(toy_recipe):
    Watch.kept = []
    words = ["--checkpoint.every_n_steps", "100", "--budget.val_every_n_steps", "100"]
    words += ["--trainer.log_every_n_steps", "100", f"--trainer.callbacks+={__name__}.Watch"]
    with pytest.raises(
        UserError,
        match=r"gradients are not finite at optimizer step 8, .*; no good checkpoint was saved yet; start",
    ):
        run(toy_recipe, *words, *overflow_at(8))
    before, after = Watch.kept
    assert len(before) > 20
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


def test_a_gradient_that_is_not_finite_in_the_last_step_fails_the_run(toy_recipe, tmp_path, capsys):
    assert main(["fit", "--config", str(toy_recipe), *overflow_at(12)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: the gradients are not finite at optimizer step 12, though the loss is")
    assert saved(tmp_path) == ["step=10.ckpt", "step=5.ckpt"]


@pytest.mark.parametrize(
    ("overlay", "num_ranks", "options"),
    [
        ("ddp", 2, []),
        ("fsdp", 2, []),
        ("fsdp", 2, ["--trainer.strategy.cpu_offload", "true"]),
        ("fsdp_tp", 4, ["--model.decoder.num_heads", "4", "--model.decoder.num_kv_heads", "2"]),
    ],
)
def test_all_ranks_stop_where_one_has_such_a_gradient(toy_recipe, tmp_path, overlay, num_ranks, options):
    words = ["fit", "--config", str(toy_recipe), "--config", f"recipes/strategy/{overlay}.yaml", *options]
    words += ["--trainer.devices", str(num_ranks), "--data.micro_batch_size", "1", *overflow_at(8, num_ranks - 1)]
    words += ["--checkpoint.every_n_steps", "4", "--trainer.log_every_n_steps", "100"]
    status = fork(lambda: sys.exit(main(words)), num_ranks, timeout=120)
    assert status == [2] + [0] * (num_ranks - 1), "those that rank 0 may have started say nothing"
    assert saved(tmp_path) == ["step=4.ckpt"]


def learn_at(monkeypatch, rate):
    """Update at a rate that no recipe can ask for."""
    monkeypatch.setattr(AdamW, "lr_factor", lambda optimizer, step, max_steps: rate / optimizer.lr)


def test_an_update_that_ruins_the_weights_fails_the_run(toy_recipe, tmp_path, monkeypatch):
    """The checkpoint of the same step has finite weights, and yet is not what to go on from."""
    learn_at(monkeypatch, 1e10)
    rate = ["--checkpoint.every_n_steps", "1"]
    message = (
        r"validation loss is not finite at optimizer step 1 \(val/loss nan\); no good checkpoint was saved yet; start"
    )
    with pytest.raises(UserError, match=message):
        run(toy_recipe, *rate, "--budget.max_steps", "1")
    events = EventAccumulator(str(tmp_path / "runs" / "toy" / "version_0"))
    events.Reload()
    (logged,) = events.Scalars("val/loss")
    assert math.isnan(logged.value), "what the line says is logged, too"
    with pytest.raises(UserError, match=r"loss is not finite at optimizer step 2; last good checkpoint: .*step=1.ckpt"):
        run(toy_recipe, *rate)


def test_weights_that_an_update_has_ruined_are_not_saved(toy_recipe, tmp_path, monkeypatch):
    """Loss and gradients of the step were finite."""
    learn_at(monkeypatch, 1e39)
    message = r"decoder\.\S+ is not finite after optimizer step 1, and no checkpoint of it is saved"
    with pytest.raises(UserError, match=message):
        run(toy_recipe, "--checkpoint.every_n_steps", "1")
    assert saved(tmp_path) == []


def test_a_loss_too_large_for_a_perplexity_is_written_down(toy_recipe, capsys, monkeypatch):
    learn_at(monkeypatch, 1e3)
    cli = run(toy_recipe, "--budget.max_steps", "1")
    assert float(cli.trainer.callback_metrics["val/loss"]) > 709, "its exponential overflows"
    assert "(perplexity inf)" in capsys.readouterr().out


def spoil(checkpoint, row):
    """Put a NaN into a row of the embedding of a checkpoint, which has no checksums then."""
    content = read(checkpoint)
    content["state_dict"]["decoder.embed_tokens.weight"][row] = torch.nan
    shutil.rmtree(checkpoint)
    save(content, checkpoint, sealed=False)


def test_weights_that_are_not_finite_are_named_before_the_first_step(
    toy_recipe, toy_sft_recipe, source_folder, tmp_path
):
    run(toy_recipe, "--budget.max_steps", "2")
    (checkpoint,) = checkpoints(tmp_path).glob("step=2.ckpt")
    spoil(checkpoint, 300)  # of a token that does not occur
    with pytest.raises(
        UserError, match=r"step=2.ckpt \(--ckpt_path\) has weights .*not finite, in decoder.embed_tokens"
    ):
        run(toy_recipe, "--ckpt_path", str(checkpoint))
    folder = tmp_path / "spoiled"
    folder.mkdir()
    for file in source_folder.iterdir():
        if file.name == "model.safetensors":
            weights = load_file(file)
            weights["model.norm.weight"][0] = torch.inf
            save_file(weights, folder / file.name)
        else:
            (folder / file.name).write_bytes(file.read_bytes())
    message = (
        r"the weights of .*spoiled \(model.init_from\) are not all finite: decoder.norm.weight is not; name another"
    )
    with pytest.raises(UserError, match=message):
        run(toy_sft_recipe, "--model.init_from", str(folder))


def test_a_validation_loss_that_is_not_finite_is_seen(toy_recipe, tmp_path, capsys):
    """The NaN is in a part of the batches only."""
    cli = run(toy_recipe, "--budget.max_steps", "2")
    (checkpoint,) = checkpoints(tmp_path).glob("step=2.ckpt")
    spoil(checkpoint, cli.datamodule.tokenizer.eos_token_id)
    rows = [batch["input_ids"] for batch in cli.datamodule.val_dataloader()]
    hit = [bool((ids == cli.datamodule.tokenizer.eos_token_id).any()) for row in rows for ids in row]
    assert 0 < sum(hit) < len(hit)
    words = ["validate", "--config", str(toy_recipe), "--ckpt_path", str(checkpoint)]
    assert main(words) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        f"error: the validation loss of {checkpoint} is not finite (val/loss nan), as decoder.embed_"
    )
