"""A disk that is full from the start is one line that names a path, and no traceback of a thread beside it."""

import errno
from unittest import mock

import pytest

from meap_lit.cli import main
from tests.callbacks.test_stopping import fit


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "target",
    [
        "meap_lit.recipe.cli.write_file",
        "tensorboard.compat.tensorflow_stub.io.gfile.LocalFileSystem.append",  # in TensorBoard's thread
        "meap_lit.callbacks.summary.measure",
    ],
)
def test_a_run(toy_recipe, tmp_path, target):
    with mock.patch(target, full):
        status, log = fit(toy_recipe, "--budget.max_steps", "2")
    assert status == 2
    assert "Traceback" not in log
    [line] = [line for line in log.splitlines() if line.startswith("error: ")]
    saved = tmp_path / "runs" / "toy" / "version_0" / "checkpoints" / "step=2.ckpt"
    last = saved if saved.exists() else "none was saved yet"
    assert line == (
        f"error: cannot write into {tmp_path / 'runs'}: No space left on device; free some space or name another "
        f"folder, such as trainer.logger.save_dir; last good checkpoint: {last}"
    )
    assert saved.exists() == target.endswith("measure")


def test_a_command(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("words")
    words = ["tokenizer", "train", "--input", str(tmp_path / "text.txt"), "--output", str(tmp_path / "tokenizer")]
    words += ["--vocab_size", "320"]
    with mock.patch("meap_lit.data.prepare.tokenizer.TrainTokenizer.run", full):
        assert main(words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: cannot write {tmp_path / 'tokenizer'}: No space left on device; free some space or name another folder"
    )
