"""`checkpoint consolidate | inspect | verify`, on what two processes wrote, one process, and version 0.1."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from meap_lit.cli import main
from tests.support.checkpoints import read, save, save_as_0_1
from tests.support.toy_module import Toy, fork, train


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Checkpoints of steps 2 and 4 of a run of two processes."""
    folder = tmp_path_factory.mktemp("parts")
    assert fork(partial(train, folder / "checkpoints", num_shards=2, keep=-1), num_ranks=2) == [0, 0]
    return folder


def complain(capsys, *arguments, notes=()):
    """The error of a command, after the given notes."""
    assert main(["checkpoint", *map(str, arguments)]) == 2
    *others, line = capsys.readouterr().err.splitlines()
    assert others == list(notes)
    return line


def unverified(path):
    return f"note: checkpoint {path} has no checksums, so its content is not verified"


def test_the_parts_of_two_ranks_become_one_that_goes_on_as_they_would(parts, tmp_path, capsys):
    output = tmp_path / "one.ckpt"
    step2 = parts / "checkpoints" / "step=2.ckpt"
    assert main(["checkpoint", "consolidate", "--checkpoint", str(step2), "--output", str(output)]) == 0
    assert "one.ckpt: optimizer step 2" in capsys.readouterr().out
    assert main(["checkpoint", "verify", "--checkpoint", str(output)]) == 0

    # the step that a resume takes depends on the moments of every parameter and on the decay of its group
    assert fork(partial(train, tmp_path / "auto", ckpt_path=output)) == [0]
    assert fork(partial(train, tmp_path / "two", num_shards=2, ckpt_path=output), num_ranks=2) == [0, 0]
    one = read(tmp_path / "auto" / "last.ckpt")["state_dict"]
    for name, folder in (("never stopped", parts / "checkpoints"), ("resumed by two", tmp_path / "two")):
        for key, value in read(folder / "last.ckpt")["state_dict"].items():
            torch.testing.assert_close(value, one[key], atol=1e-6, rtol=1e-5, msg=f"{name}: {key}")


def test_a_consolidated_optimizer_is_the_one_of_plain_training(parts, tmp_path):
    output = tmp_path / "one.ckpt"
    main(["checkpoint", "consolidate", "--checkpoint", str(parts), "--output", str(output)])
    content = read(output)
    assert content["global_step"] == 4
    [state] = content["optimizer_states"]
    assert [len(group["params"]) for group in state["param_groups"]] == [4, 2]
    assert state["param_groups"][0]["weight_decay"] == 0
    shapes = {name: parameter.shape for name, parameter in Toy().named_parameters()}
    assert {name: moments["exp_avg"].shape for name, moments in state["state"].items()} == shapes
    assert all(moments["step"] == 4 for moments in state["state"].values())


def test_inspect_says_what_parts_hold(parts, capsys):
    assert main(["checkpoint", "inspect", "--checkpoint", str(parts)]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["checkpoint"] == str(parts / "checkpoints" / "step=4.ckpt")
    assert rows["format"] == "folder of 2 parts"
    assert rows["optimizer"] == "step  4"
    assert rows["weights"] == "97 float32"  # 8 x 8 + 8, 8 + 8, 8 + 1
    assert rows["checksums"] == "of 4 files"


@pytest.mark.parametrize("sealed", [True, False])
def test_inspect_is_one_line_whenever_the_run_removes_the_checkpoint(parts, tmp_path, capsys, monkeypatch, sealed):
    path, aside = tmp_path / "step=4.ckpt", tmp_path / "aside"
    shutil.copytree(parts / "checkpoints" / "step=4.ckpt", path)
    if not sealed:
        (path / "checksums.json").unlink()
    look, ends = Path.stat, []
    for number in range(1, 100):
        left = number

        def count_and_look(self, **options):
            nonlocal left
            if self == path or self.parent == path:
                left -= 1
                if left == 0:
                    path.rename(aside)
            return look(self, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "stat", count_and_look)
            status = main(["checkpoint", "inspect", "--checkpoint", str(path)])
        if status == 0:  # it was there until all of it was known
            break
        ends.append(capsys.readouterr().err.splitlines()[-1])
        aside.rename(path)
    assert len(ends) > 10
    assert "does not exist" in ends[0]
    assert all(f"checkpoint {path} is gone, as a run removes" in line for line in ends[1:])


def test_inspect_says_what_a_run_of_ours_holds(toy_recipe, tmp_path, capsys):
    assert main(["fit", "--config", str(toy_recipe), "--budget.max_steps", "3"]) == 0
    capsys.readouterr()
    assert main(["checkpoint", "inspect", "--checkpoint", str(tmp_path / "runs" / "toy")]) == 0
    out = capsys.readouterr().out
    for expected in (
        r"version_0/checkpoints/step=3.ckpt",
        r"folder of 1 part",
        r"samples seen               24",
        r"decoder.hidden_size        32",
        r" float32",
        r"checksums                  of 3 files",
    ):
        assert expected in out


def test_verify_names_the_first_damaged_file(parts, tmp_path, capsys):
    path = tmp_path / "step=4.ckpt"
    shutil.copytree(parts / "checkpoints" / "step=4.ckpt", path)
    assert main(["checkpoint", "verify", "--checkpoint", str(path)]) == 0
    assert "step=4.ckpt: verified (4 files, " in capsys.readouterr().out
    content = bytearray((path / "__1_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "__1_0.distcp").write_bytes(content)
    damaged = f"error: checkpoint file {path}/__1_0.distcp is damaged: its content is not what was written; "
    assert complain(capsys, "verify", "--checkpoint", path).startswith(damaged)
    consolidate = ["consolidate", "--checkpoint", path, "--output", tmp_path / "one.ckpt"]
    assert complain(capsys, *consolidate).startswith(damaged)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("one.pt", "--output {folder}/one.pt must end in .ckpt, like every checkpoint"),
        ("there.ckpt", "--output {folder}/there.ckpt exists already; remove it or name another"),
        ("file/one.ckpt", "cannot make folder {folder}/file/one.ckpt: Not a directory"),
    ],
)
def test_an_output_that_cannot_be_is_named(parts, tmp_path, capsys, output, message):
    for name in ("there.ckpt", "file"):
        (tmp_path / name).touch()
    line = complain(capsys, "consolidate", "--checkpoint", parts, "--output", tmp_path / output)
    assert line == "error: " + message.format(folder=tmp_path)


def test_a_checkpoint_of_version_0_1_is_inspected_verified_and_written_anew(parts, tmp_path, capsys):
    old, output = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    content = read(parts / "checkpoints" / "last.ckpt")
    save_as_0_1(content, old)
    assert main(["checkpoint", "verify", "--checkpoint", str(old)]) == 0
    assert "old.ckpt: verified (1 file, " in capsys.readouterr().out
    assert main(["checkpoint", "inspect", "--checkpoint", str(old)]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["format"] == "one file, of an earlier version"
    assert (rows["weights"], rows["checksums"]) == ("97 float32", "of 1 file")
    assert main(["checkpoint", "consolidate", "--checkpoint", str(old), "--output", str(output)]) == 0
    assert main(["checkpoint", "verify", "--checkpoint", str(output)]) == 0
    again = read(output)
    assert again.keys() == content.keys()
    assert again["loops"] == content["loops"]
    [optimizer], [expected] = again["optimizer_states"], content["optimizer_states"]
    assert optimizer["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(again["state_dict"], content["state_dict"], atol=0, rtol=0)
    torch.testing.assert_close(optimizer["state"], expected["state"], atol=0, rtol=0)


def test_what_is_no_checkpoint_or_has_no_checksums_is_named(tmp_path, capsys):
    path = tmp_path / "old.ckpt"
    torch.save({"global_step": 1, "state_dict": {}}, path)
    line = complain(capsys, "verify", "--checkpoint", path)
    assert line == f"error: checkpoint {path} was written without checksums, so its content cannot be verified"
    torch.save({"weights": 1}, path)
    line = complain(capsys, "inspect", "--checkpoint", path, notes=[unverified(path)])
    assert line == f"error: {path} is not a checkpoint: it has no state_dict in it"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"global_step": "4"}, "is damaged: its global_step is str, not int"),
        ({"decoder": [1]}, "is damaged: its decoder is list, not dict"),
        ({"decoder": {"config": 3}}, "is damaged: it does not describe its decoder"),
        ({"hub": 3}, "is damaged: its hub is int, not dict"),
    ],
)
def test_a_checkpoint_with_values_of_other_types_is_damaged(parts, tmp_path, capsys, entry, message):
    content = read(parts / "checkpoints" / "step=2.ckpt")
    save(content | entry, tmp_path / "step=2.ckpt")
    assert complain(capsys, "inspect", "--checkpoint", tmp_path / "step=2.ckpt").endswith(message)


def test_what_no_run_wrote_is_not_consolidated(parts, tmp_path, capsys):
    content = read(parts / "checkpoints" / "step=2.ckpt")
    del content["global_step"]
    save(content, tmp_path / "step=2.ckpt")
    output = tmp_path / "one.ckpt"
    line = complain(capsys, "consolidate", "--checkpoint", tmp_path / "step=2.ckpt", "--output", output)
    assert line.endswith("is not a checkpoint of a run: it has no global_step in it")
    assert not output.exists()
