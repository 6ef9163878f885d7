import shutil

import pytest
from torch.utils.tensorboard import SummaryWriter

from meap_lit.errors import UserError
from meap_lit.report.runs import ACCURACY, LOSS, find_runs, shown
from tests.support.toy_study import recipe, write_run, write_table


def test_curves_are_over_tokens(tmp_path):
    write_run(tmp_path / "runs/a/version_0", recipe("a"), losses=(3, 2, 1.5), accuracies=(0.25, 0.75))
    (run,) = find_runs([str(tmp_path)])
    assert run.over_tokens(LOSS) == {320: 3, 640: 2, 960: 1.5}
    assert run.over_tokens(ACCURACY) == {320: 0.25, 640: 0.75}
    assert run.over_tokens("nothing") == {}
    assert (run.final(LOSS), run.final("nothing"), run.tokens) == (1.5, None, 960)
    assert (run.name, run.kind, run.seed) == ("a", "pretraining", 1)
    assert run.datasets == {"data/text": "f" * 64}
    # two matrices of 8 x 2, attention 4 x (2 x 2), SwiGLU 3 x (2 x 2), norms 3 x 2
    assert run.num_parameters == 2 * 16 + 16 + 12 + 6


def test_a_resumed_run_is_one_run(tmp_path):
    first, second = tmp_path / "a/version_0", tmp_path / "a/version_1"
    write_run(first, recipe("a"), losses=(5, 4, 9), summary={"seconds": 10.0, "first_step": 0})
    last = {"seconds": 5.5, "first_step": 20, "tokens_per_second": 7.0}
    resumed = recipe("a", ckpt_path=str(first / "checkpoints" / "step=20.ckpt"))
    write_run(second, resumed, losses=(3, 2), first_step=30, summary=last)
    (run,) = find_runs([str(tmp_path)])
    assert run.path == second
    assert [(point.step, point.value) for point in run.curves[LOSS]] == [(10, 5), (20, 4), (30, 3), (40, 2)]
    assert run.seconds == 15.5
    assert run.tokens_per_second == 7


@pytest.mark.parametrize("name", ["step=20.ckpt", "step=20-v1.ckpt"])
def test_what_a_resumed_run_has_discarded_is_not_of_its_curves(tmp_path, name):
    first, second = tmp_path / "a/version_0", tmp_path / "a/version_1"
    for summary in ({"seconds": 1.0, "first_step": 20}, None):  # without one, the name of the checkpoint says the step
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        write_run(first, recipe("a"), losses=(5, 4, 9, 8), accuracies=(0.1, 0.2, 0.6, 0.7))
        resumed = recipe("a", ckpt_path=str(first / "checkpoints" / name))
        write_run(second, resumed, losses=(3,), first_step=50, summary=summary)
        (run,) = find_runs([str(tmp_path)])
        assert [(point.step, point.value) for point in run.curves[LOSS]] == [(10, 5), (20, 4), (50, 3)]
        assert run.final(ACCURACY) == 0.2


def test_a_run_that_was_resumed_with_its_budget_spent_keeps_its_checkpoint(tmp_path):
    first, second = tmp_path / "a/version_0", tmp_path / "a/version_1"
    write_run(first, recipe("a"))
    checkpoint = first / "checkpoints" / "step=30.ckpt"
    write_run(second, recipe("a", ckpt_path=str(checkpoint)), losses=())
    (second / "checkpoints" / "step=30.ckpt").unlink()
    (run,) = find_runs([str(tmp_path)])
    assert run.path == second
    assert run.holds(checkpoint.resolve())
    assert run.tokens == 960


@pytest.mark.parametrize("older", [False, True])
def test_a_run_that_resumed_in_its_own_folder(tmp_path, older):
    folder = tmp_path / "a/seed_1"
    resumed = recipe("a", ckpt_path=str(folder / "checkpoints/step=20.ckpt"))
    write_run(folder, resumed, losses=(5, 4, 9), summary={"seconds": 3.0, "first_step": 20}, older=older)
    write_table(folder, {LOSS: (3.0, 2.0)}, first_step=30)
    (run,) = find_runs([str(tmp_path)])
    assert [(point.step, point.value) for point in run.curves[LOSS]] == [(10, 5), (20, 4), (30, 3), (40, 2)]
    assert run.seconds is None


def test_a_run_of_before_has_events_only(tmp_path):
    folder = write_run(tmp_path / "a", recipe("a"), losses=(5, 4, 9), older=True)
    with SummaryWriter(str(folder), filename_suffix=".later") as writer:
        for step, value in ((29, 3.0), (39, 2.0)):
            writer.add_scalar(LOSS, value, step)
    (run,) = find_runs([str(tmp_path)])
    assert [(point.step, point.value) for point in run.curves[LOSS]] == [(10, 5), (20, 4), (30, 3), (40, 2)]
    assert run.tokens_per_second == 1000


def test_cost_of_a_run_without_summary(tmp_path):
    write_run(tmp_path / "a", recipe("a"))
    (run,) = find_runs([str(tmp_path)])
    assert run.seconds is None
    assert run.tokens_per_second == 1000
    assert run.peak_memory_gb is None


def test_a_folder_named_twice_is_read_once(tmp_path):
    write_run(tmp_path / "runs/a", recipe("a"))
    assert len(find_runs([str(tmp_path), str(tmp_path / "runs")])) == 1


def no_validation(folder):
    write_run(folder / "a", recipe("a"), losses=())


def no_checkpoint(folder):
    (write_run(folder / "a", recipe("a")) / "checkpoints/step=30.ckpt").unlink()


def no_recipe(folder):
    (folder / "a").mkdir()
    (folder / "a/config.yaml").write_text("some: thing\n")
    SummaryWriter(str(folder / "a")).close()


def foreign_checkpoint(folder):
    import torch

    torch.save({"state_dict": {}}, write_run(folder / "a", recipe("a")) / "checkpoints/step=31.ckpt")


def cut_summary(folder):
    run = write_run(folder / "a", recipe("a"), summary={"seconds": 1.0, "first_step": 0})
    content = (run / "summary.json").read_text()
    (run / "summary.json").write_text(content[: len(content) // 2])


def damaged_table(folder):
    with open(write_run(folder / "a", recipe("a")) / "curves.csv", "a") as table:
        table.write("40,val/loss,low\n")


def cut_recipe(folder):
    write_run(folder / "a", recipe("a"))
    (folder / "a/config.yaml").write_text('model: {class_path: "meap')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: folder.rmdir(), "is not a folder"),
        (lambda folder: None, "no run found under"),
        (no_validation, "a has no validation yet (val/loss); let it finish"),
        (no_checkpoint, "a has neither a complete checkpoint (checkpoints/step=N.ckpt) nor a summary.json"),
        (no_recipe, "is not the recipe of a run"),
        (damaged_table, "a/curves.csv is damaged (could not convert string to float: 'low'); restore it, or move it"),
        (cut_recipe, "a/config.yaml is damaged or cut short (while scanning a quoted scalar"),
        (cut_summary, "a/summary.json: not valid JSON (Expecting property name"),
        (foreign_checkpoint, "step=31.ckpt is not one of meap_lit: it has no decoder in it"),
    ],
)
def test_wrong_runs(tmp_path, spoil, message):
    folder = tmp_path / "runs"
    folder.mkdir()
    spoil(folder)
    with pytest.raises(UserError) as error:
        find_runs([str(folder)])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_no_path_of_this_machine_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown(f"fit --config {tmp_path}/runs/a.yaml --x /home/me/data") == "fit --config runs/a.yaml --x data"
    assert shown("s3://bucket/path and data/text and 1/2") == "s3://bucket/path and data/text and 1/2"
    assert shown("['/home/me/a', 'b/c'] --x=/home/me/d") == "['a', 'b/c'] --x=d"
