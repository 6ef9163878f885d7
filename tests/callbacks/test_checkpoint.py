"""Checkpoints are whole or not seen, however a save ends; wrong options are named."""

import os
import resource
import shutil
import signal
import threading
from functools import partial
from unittest import mock

import lightning as L
import pytest
import torch

from meap_lit.callbacks import Checkpoint
from meap_lit.callbacks.checkpoint import VerifyCheckpoint, _publish, on_host, wait_for
from meap_lit.checkpoint.checksums import Checksum, checksums, verify
from meap_lit.checkpoint.find import newest_checkpoint
from meap_lit.checkpoint.folder import write
from meap_lit.checkpoint.source import open_source
from meap_lit.errors import UserError
from meap_lit.files import hold, release
from meap_lit.parallel.ranks import Ranks
from meap_lit.recipe.cli import RecipeCLI
from tests.support.checkpoints import read
from tests.support.toy_module import fork, fork_command, kill_at, train

pytestmark = pytest.mark.slow


def visible(folder):
    return sorted(path.name for path in folder.glob("*.ckpt"))


def leftovers(folder):
    return [path.name for path in folder.iterdir() if not path.name.endswith(".ckpt")]


# what is called during the second save, of step 4, and for the how manieth time
KILLS = [
    ("torch.distributed.checkpoint.FileSystemWriter.write_data", 2, ["last.ckpt", "step=2.ckpt"]),
    ("torch.distributed.checkpoint.FileSystemWriter.finish", 2, ["last.ckpt", "step=2.ckpt"]),
    ("os.rename", 3, ["last.ckpt", "step=2.ckpt"]),  # of the index, by torch
    ("meap_lit.callbacks.checkpoint.checksums", 2, ["last.ckpt", "step=2.ckpt"]),
    ("meap_lit.callbacks.checkpoint.seal", 2, ["last.ckpt", "step=2.ckpt"]),
    ("os.rename", 4, ["last.ckpt", "step=2.ckpt"]),
    ("pathlib.Path.symlink_to", 2, ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]),
    ("os.replace", 2, ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]),
    ("os.rename", 5, ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]),  # of the old one, to remove it
    ("meap_lit.callbacks.checkpoint.remove", 1, ["last.ckpt", "step=4.ckpt"]),
]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("target", "call", "left"), KILLS)
def test_a_kill_at_any_point_of_a_save_leaves_whole_checkpoints(tmp_path, target, call, left, asynchronous):
    def killed():
        kill_at(target, call)
        train(tmp_path, asynchronous=asynchronous)

    assert fork(killed) == [-signal.SIGKILL]
    assert visible(tmp_path) == left
    for name in left:
        assert verify(tmp_path / name) == 3
        assert read(tmp_path / name)["global_step"] in (2, 4)
    assert newest_checkpoint(tmp_path).name == max(left)

    assert fork(partial(train, tmp_path, max_steps=8, ckpt_path=tmp_path / "last.ckpt")) == [0]
    assert not leftovers(tmp_path)
    assert read(tmp_path / "last.ckpt")["global_step"] == 8


def test_a_copy_whose_files_have_other_times_goes_on_from_the_same_checkpoint(tmp_path):
    train(tmp_path / "run", max_steps=8, keep=-1)
    train(tmp_path / "run", max_steps=6, keep=-1, ckpt_path=tmp_path / "run" / "step=2.ckpt")
    assert newest_checkpoint(tmp_path / "run").name == "step=6-v1.ckpt"
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=True)
    for seconds, path in enumerate(sorted(copy.glob("step=*.ckpt"), reverse=True)):
        os.utime(path, (1e9 - seconds, 1e9 - seconds))
    assert newest_checkpoint(copy).name == "step=6-v1.ckpt", "step=8 was left behind"


def test_a_kill_while_ranks_save_their_parts_leaves_the_checkpoint_before(tmp_path):
    def killed():
        kill_at("meap_lit.callbacks.checkpoint.checksums", 2)
        train(tmp_path, num_shards=2)

    assert fork(killed, num_ranks=2) == [-signal.SIGKILL] * 2
    assert visible(tmp_path) == ["last.ckpt", "step=2.ckpt"]
    assert len(leftovers(tmp_path)) == 1
    assert verify(tmp_path / "last.ckpt") == 4

    resume = partial(train, tmp_path, max_steps=6, num_shards=2, ckpt_path=tmp_path / "step=2.ckpt", keep=-1)
    assert fork(resume, num_ranks=2) == [0, 0]
    assert visible(tmp_path) == ["last.ckpt", "step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    assert not leftovers(tmp_path)


def test_what_a_killed_run_left_elsewhere_is_removed_by_the_run_that_resumes_it(tmp_path):
    def killed():
        kill_at("os.rename", 4)
        train(tmp_path / "old")

    fork(killed)
    [dead] = leftovers(tmp_path / "old")
    alive = tmp_path / "old" / f"step=9.ckpt.partial-1@{dead.partition('@')[2]}"
    alive.touch()
    assert fork(partial(train, tmp_path / "new", ckpt_path=tmp_path / "old" / "last.ckpt")) == [0]
    assert leftovers(tmp_path / "old") == [alive.name]


def test_what_runs_left_that_were_killed_before_their_first_checkpoint_is_removed_by_the_next(tmp_path):
    def killed():
        kill_at("os.rename", 2)
        train(tmp_path / "version_0" / "checkpoints")

    fork(killed)
    elsewhere = {name: tmp_path / "version_0" / "checkpoints" / f"{name}.ckpt.partial-1@far" for name in "ab"}
    for path in elsewhere.values():
        path.mkdir()
        (path / "meta.pt").touch()
    for path in (elsewhere["a"], elsewhere["a"] / "meta.pt"):
        os.utime(path, (0, 0))
    assert len(leftovers(tmp_path / "version_0" / "checkpoints")) == 3
    train(tmp_path / "version_1" / "checkpoints")
    assert leftovers(tmp_path / "version_0" / "checkpoints") == [elsewhere["b"].name]


def test_a_rank_that_writes_nothing_copies_nothing_to_the_host(tmp_path):
    def counted():
        with mock.patch("meap_lit.callbacks.checkpoint.on_host", side_effect=on_host) as copy:
            train(tmp_path, num_copies=2, asynchronous=True)
        raise SystemExit(copy.call_count)

    assert fork(counted, num_ranks=2) == [4, 0], "two saves, each with the states of callbacks apart"
    assert read(tmp_path / "last.ckpt")["global_step"] == 4


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_one_error_and_leaves_the_checkpoint_before(tmp_path, asynchronous):
    def cramped():
        train(tmp_path, max_steps=2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        message = r"cannot save checkpoint .*step=4.ckpt: File too large; last good checkpoint: .*step=2.ckpt$"
        with pytest.raises(UserError, match=message):
            train(tmp_path, ckpt_path=tmp_path / "step=2.ckpt", asynchronous=asynchronous, max_steps=9)

    assert fork(cramped) == [0]
    assert visible(tmp_path) == ["last.ckpt", "step=2.ckpt"]
    assert not leftovers(tmp_path)


def test_a_disk_that_is_full_for_one_rank_ends_the_save_of_all(tmp_path):
    def cramped():
        train(tmp_path, num_shards=2, max_steps=2)
        if os.environ["LOCAL_RANK"] == "1":
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        with pytest.raises((UserError, SystemExit)) as left:
            train(tmp_path, num_shards=2, ckpt_path=tmp_path / "step=2.ckpt")
        if os.environ["LOCAL_RANK"] == "1":
            raise left.value
        assert "step=4.ckpt: File too large; last good checkpoint: " in str(left.value)
        raise SystemExit(2)

    assert fork(cramped, num_ranks=2) == [2, 0]
    assert visible(tmp_path) == ["last.ckpt", "step=2.ckpt"]
    assert not leftovers(tmp_path)


class AfterStep(L.Callback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            self.action()


def test_training_goes_on_while_an_asynchronous_save_is_written(tmp_path):
    train(tmp_path / "plain", max_steps=6, keep=-1)
    may_write = threading.Event()

    def slow(checkpoint, path):
        assert may_write.wait(timeout=60), "the training waits for the save"
        write(checkpoint, path)

    with mock.patch("meap_lit.callbacks.checkpoint.write", slow):
        going_on = AfterStep(3, may_write.set)  # the save of step 2 is under way
        train(tmp_path / "beside", max_steps=6, keep=-1, asynchronous=True, callbacks=[going_on])
    for step in (2, 4, 6):
        plain, beside = (read(tmp_path / run / f"step={step}.ckpt") for run in ("plain", "beside"))
        torch.testing.assert_close(beside["state_dict"], plain["state_dict"], atol=0, rtol=0)
        torch.testing.assert_close(beside["optimizer_states"], plain["optimizer_states"], atol=0, rtol=0)


def test_a_copy_on_the_host_is_a_copy_and_keeps_ties():
    weight = torch.ones(2)
    copy = on_host({"a": weight, "b": [weight, (3, "x")]})
    weight.zero_()
    assert copy["a"].tolist() == [1.0, 1.0]
    assert copy["b"][0] is copy["a"]
    assert copy["b"][1] == (3, "x")


def test_what_was_brought_to_the_host_for_a_checkpoint_is_not_copied_again():
    weight, count = torch.ones(3), torch.tensor(5.0)
    copied = on_host({"weight": weight, "step": count}, is_copy=True)
    count += 1
    assert copied["weight"] is weight
    assert copied["step"] == 5.0


def test_a_checkpoint_without_the_files_of_another_node_is_not_published(tmp_path):
    aside, path = tmp_path / "step=2.ckpt.partial-1", tmp_path / "step=2.ckpt"
    write({"state_dict": {"weight": torch.ones(3)}, "optimizer_states": [], "global_step": 2}, aside)
    found = {**checksums(aside), "__1_0.distcp": Checksum(10, "0")}
    with pytest.raises(
        UserError, match=rf"^cannot save checkpoint {path}: checkpoint file .*__1_0.distcp is missing; "
    ):
        _publish(aside, path, found)
    assert not path.exists()


def test_a_folder_into_which_another_run_writes_is_refused_and_left_alone(toy_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("meap_lit.callbacks.checkpoint.hold", partial(hold, seconds=0.0))
    words = ["fit", "--config", str(toy_recipe), "--trainer.logger.version", "main"]
    folder = tmp_path / "runs" / "toy" / "main"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "curves.csv").write_text("of the run that lives")
    held = hold(folder / "checkpoints")
    with pytest.raises(UserError, match=rf"^another run is writing its checkpoints into {folder}/checkpoints; wait"):
        RecipeCLI.run(words)
    assert {file.name for file in folder.iterdir()} == {"checkpoints", "curves.csv"}
    assert (folder / "curves.csv").read_text() == "of the run that lives"
    release(held)
    RecipeCLI.run([*words, "--budget.max_steps", "2", "--data.num_workers", "1"])
    RecipeCLI.run([*words, "--budget.max_steps", "3", "--ckpt_path", "last"])  # the first has let go


def test_a_run_does_not_go_on_from_a_checkpoint_that_is_no_longer_the_newest(toy_recipe, tmp_path, monkeypatch):
    """The run before it saves while this one starts."""
    words = ["fit", "--config", str(toy_recipe), "--trainer.logger.version", "main", "--budget.max_steps"]
    RecipeCLI.run([*words, "2"])
    folder = tmp_path / "runs" / "toy" / "main" / "checkpoints"

    def hold_later(path):
        shutil.copytree(folder / "step=2.ckpt", folder / "step=3.ckpt")
        (folder / "last.ckpt").unlink()
        (folder / "last.ckpt").symlink_to("step=3.ckpt")
        return hold(path)

    monkeypatch.setattr("meap_lit.callbacks.checkpoint.hold", hold_later)
    with pytest.raises(UserError, match=rf"^another run has just saved {folder}/step=3.ckpt; repeat the command"):
        RecipeCLI.run([*words, "4", "--ckpt_path", "last"])
    monkeypatch.setattr("meap_lit.callbacks.checkpoint.hold", hold)
    RecipeCLI.run([*words, "3", "--ckpt_path", str(folder / "step=2.ckpt")])  # as asked
    RecipeCLI.run([*words, "4", "--ckpt_path", "last"])


def test_nodes_with_folders_of_their_own_are_named(tmp_path, monkeypatch):
    saver, trainer = Checkpoint(dirpath=str(tmp_path)), mock.Mock(is_global_zero=False, global_rank=0, world_size=1)
    trainer.strategy.broadcast = lambda mark: mark
    saver._ranks = Ranks(trainer)
    monkeypatch.setattr("meap_lit.callbacks.checkpoint.wait_for", partial(wait_for, seconds=0.0))
    with pytest.raises(UserError, match=rf"^checkpoint.dirpath {tmp_path} is another folder on node"):
        saver._check_shared(trainer)  # the first rank has made the mark elsewhere
    trainer.is_global_zero = True
    saver._check_shared(trainer)
    assert not list(tmp_path.iterdir())


def test_ranks_save_their_parts_beside_training(toy_recipe, tmp_path):
    """The same files, byte for byte in every weight, as a save that training waits for."""
    command = ["fit", "--config", toy_recipe, "--budget.max_steps", "4"]
    command += ["--config", "recipes/strategy/fsdp.yaml", "--trainer.devices", "2", "--checkpoint.every_n_steps", "2"]
    for asynchronous in ("false", "true"):
        options = [*command, "--checkpoint.asynchronous", asynchronous, "--data.micro_batch_size", "2"]
        statuses, log = fork_command(options, num_ranks=2)
        assert statuses == [0, 0], log
    for step in (2, 4):
        runs = [tmp_path / "runs" / "toy" / f"version_{version}" / "checkpoints" for version in (0, 1)]
        plain, beside = (open_source(run / f"step={step}.ckpt") for run in runs)
        assert verify(runs[1] / f"step={step}.ckpt") == 4
        for name in plain.names():
            assert torch.equal(plain.read(name), beside.read(name)), name


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("inline_container.cc: pos")])
def test_nothing_is_left_of_a_save_that_failed(tmp_path, error):
    def half(checkpoint, file):
        file.write(b"half")
        raise error

    with mock.patch("torch.save", half), pytest.raises(UserError, match=r"step=2.ckpt: .*; .*none was saved yet"):
        train(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_milestones_stay(tmp_path):
    train(tmp_path, max_steps=8, every_n_steps=1, keep=2, milestone_every_n_steps=3)
    assert visible(tmp_path) == ["last.ckpt", *(f"step={step}.ckpt" for step in (3, 6, 7, 8))]
    assert (tmp_path / "last.ckpt").readlink().name == "step=8.ckpt"


def test_a_checkpoint_of_others_removes_no_folder_of_this_machine(tmp_path):
    """It holds what the run that wrote it kept; here the paths of other things."""
    precious = tmp_path / "precious"
    precious.mkdir()
    train(tmp_path / "run", max_steps=4)
    checkpoint = tmp_path / "run" / "step=4.ckpt"
    state = torch.load(checkpoint / "meta.pt", weights_only=True)
    kept = {str(precious): 1, "step=1.ckpt": 1, f"{precious}/step=2.ckpt": 2}
    state["callbacks"]["Checkpoint"]["best_k_models"] = kept
    torch.save(state, checkpoint / "meta.pt")
    (checkpoint / "checksums.json").unlink()
    (precious / "step=2.ckpt").mkdir()
    train(tmp_path / "run", max_steps=8, keep=1, ckpt_path=checkpoint)
    train(tmp_path / "elsewhere", max_steps=8, keep=1, ckpt_path=checkpoint)
    assert (precious / "step=2.ckpt").is_dir()


def test_what_may_not_be_removed_elsewhere_does_not_end_a_save(tmp_path, monkeypatch):
    train(tmp_path / "theirs", max_steps=4)
    old = tmp_path / "theirs" / "step=9.ckpt.partial-1@far"
    old.mkdir()
    os.utime(old, (0, 0))
    (tmp_path / "ours").mkdir()
    mine = tmp_path / "ours" / "notes.partial-draft.txt"
    mine.touch()

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("meap_lit.callbacks.checkpoint.remove", refuse)
    train(tmp_path / "ours", max_steps=6, ckpt_path=tmp_path / "theirs" / "step=4.ckpt")
    assert (tmp_path / "ours" / "step=6.ckpt").is_dir()
    assert mine.is_file()


def test_a_copy_in_place_of_the_link_is_named_before_the_training(tmp_path):
    train(tmp_path, max_steps=4)
    (tmp_path / "last.ckpt").unlink()
    shutil.copytree(tmp_path / "step=4.ckpt", tmp_path / "last.ckpt")
    with pytest.raises(
        UserError, match=r"last.ckpt is a copy of a checkpoint, where a run sets a link to its last one;"
    ):
        train(tmp_path, max_steps=6, ckpt_path=tmp_path / "step=4.ckpt")


def test_a_resume_that_keeps_fewer_removes_the_others(tmp_path):
    train(tmp_path, max_steps=6, keep=3)
    train(tmp_path, max_steps=8, keep=1, ckpt_path=tmp_path / "step=6.ckpt")
    assert visible(tmp_path) == ["last.ckpt", "step=6.ckpt", "step=8.ckpt"], "what it resumed from stays"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "checkpoint.every_n_steps must be at least 1, got 0"),
        ({"keep": 0}, "checkpoint.keep must be at least 1, or -1 for all, got 0"),
        ({"keep": -2}, "checkpoint.keep must be at least 1, or -1 for all, got -2"),
        (
            {"every_n_steps": 10, "milestone_every_n_steps": 15},
            "checkpoint.milestone_every_n_steps must be a multiple of checkpoint.every_n_steps 10, got 15",
        ),
        (
            {"milestone_every_n_steps": 0},
            "checkpoint.milestone_every_n_steps must be a multiple of checkpoint.every_n_steps 1000, got 0",
        ),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError) as error:
        Checkpoint(**options)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("s3://bucket/run", "checkpoint.dirpath must be a folder of this machine or its network, got s3://bucket/run"),
        ("{file}/run", "cannot make the folder of checkpoints {file}/run: Not a directory; name another as checkpoint"),
    ],
)
def test_a_folder_that_cannot_be_is_named_before_the_training(tmp_path, folder, message):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError) as error:
        train(folder.format(file=file), callbacks=[AfterStep(1, lambda: pytest.fail("it trains"))])
    assert str(error.value).startswith(message.format(file=file))


def test_a_damaged_part_is_named_before_anything_is_loaded(tmp_path):
    assert fork(partial(train, tmp_path, max_steps=2, num_shards=2), num_ranks=2) == [0, 0]
    part = tmp_path / "step=2.ckpt" / "__1_0.distcp"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)

    def resume():
        callbacks = [VerifyCheckpoint(str(tmp_path / "step=2.ckpt"))]
        with pytest.raises(UserError, match=f"^checkpoint file {part} is damaged: its content is not"):
            train(tmp_path, num_shards=2, ckpt_path=tmp_path / "step=2.ckpt", callbacks=callbacks)
        raise SystemExit(2)

    assert fork(resume, num_ranks=2) == [2, 0]
