"""What is written is read again, to the bit, from a folder and from a file of version 0.1."""

import pytest
import torch

from meap_lit.checkpoint.folder import StoredCheckpoint
from meap_lit.errors import UserError
from tests.support.checkpoints import read, save, save_as_0_1


def content():
    """Two optimizers, one of more groups than digits; a tied weight; keys that are names, and numbers."""
    tied = torch.randn(3, 2)
    state = {name: {"step": torch.tensor(4.0), "exp_avg": torch.randn(3, 2)} for name in ("a.weight", "b.weight")}
    return {
        "state_dict": {"a.weight": tied, "b.weight": tied, "c": torch.tensor(7, dtype=torch.int64)},
        "optimizer_states": [
            {"state": state, "param_groups": [{"params": ["a.weight", "b.weight"], "betas": (0.9, 0.95)}]},
            {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"params": [n], "lr": n} for n in range(12)]},
            {"state": {}, "param_groups": [{"params": ["a.weight"]}]},
        ],
        "global_step": 4,
        "loops": {"fit_loop": {"epoch": 1}},
    }


@pytest.fixture(params=[save, save_as_0_1])
def stored(request, tmp_path):
    """A checkpoint in either form, and what was written."""
    written, path = content(), tmp_path / "step=4.ckpt"
    request.param(written, path)
    return path, written


def test_what_was_written_is_read(stored):
    path, written = stored
    again = read(path)
    assert again.keys() == written.keys()
    assert {key: again[key] for key in ("global_step", "loops")} == {"global_step": 4, "loops": written["loops"]}
    assert again["state_dict"].keys() == written["state_dict"].keys()
    for name, weight in written["state_dict"].items():
        assert torch.equal(again["state_dict"][name], weight)
        assert again["state_dict"][name].dtype == weight.dtype
    for found, expected in zip(again["optimizer_states"], written["optimizer_states"], strict=True):
        assert found["param_groups"] == expected["param_groups"]
        torch.testing.assert_close(found["state"], expected["state"], atol=0, rtol=0)


def test_one_weight_is_read_without_the_others(stored):
    path, written = stored
    checkpoint = StoredCheckpoint(path)
    assert {name: tuple(about.size) for name, about in checkpoint.weights.items()} == {
        "a.weight": (3, 2),
        "b.weight": (3, 2),
        "c": (),
    }
    for name, weight in written["state_dict"].items():
        assert torch.equal(checkpoint.read_weight(name), weight)


def test_what_a_checkpoint_lacks_is_one_line(stored):
    path, _ = stored
    states = {"state_dict": {"a.weight": torch.zeros(3, 2), "other": torch.zeros(1)}}
    with pytest.raises(UserError, match=r"^the parts of checkpoint .*step=4.ckpt cannot be read: .*other") as error:
        StoredCheckpoint(path).load_into(states)
    assert "\n" not in str(error.value)


def test_weights_of_another_shape_are_one_line(stored):
    path, _ = stored
    with pytest.raises(UserError, match=r"^the parts of checkpoint .*step=4.ckpt cannot be read: .*[Ss]ize"):
        StoredCheckpoint(path).load_into({"state_dict": {"a.weight": torch.zeros(5, 2)}})


def test_a_checkpoint_that_a_run_removes_while_it_is_read_is_gone(stored, tmp_path):
    path, _ = stored
    begun, unread = StoredCheckpoint(path), StoredCheckpoint(path)
    is_folder = path.is_dir()
    assert begun.weights
    path.rename(tmp_path / "aside")
    message = rf"^checkpoint {path} is gone, as a run removes its old ones; repeat the command"
    for read_more in (lambda: unread.trainer_state, lambda: unread.index, lambda: unread.read_all()):
        with pytest.raises(UserError, match=message):
            read_more()
    if is_folder:  # a file stays open
        with pytest.raises(UserError, match=message):
            begun.read_weight("c")
