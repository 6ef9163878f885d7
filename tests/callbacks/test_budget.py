import pytest

from meap_lit.callbacks import Budget
from meap_lit.data.pretraining import PretrainingData
from meap_lit.errors import UserError


def data(global_batch_size, micro_batch_size=1, seq_len=128):
    return PretrainingData(
        "unused", "unused", seq_len=seq_len, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size
    )


@pytest.mark.parametrize(("num_devices", "accumulation"), [(1, 32), (4, 8), (32, 1)])
def test_accumulation_follows_the_number_of_devices(num_devices, accumulation):
    assert data(256, 8).accumulation(num_devices) == accumulation


def test_what_cannot_be_divided_is_named():
    with pytest.raises(UserError, match=r"global_batch_size 256 cannot be divided by .* 8 x 3 devices = 24"):
        data(256, 8).accumulation(3)


@pytest.mark.parametrize(
    ("batch", "micro", "devices", "hint"),
    [
        (16, 16, 2, "set data.micro_batch_size to 8"),
        (12, 4, 2, "set data.micro_batch_size to 3"),
        (16, 4, 3, "take a number of devices that divides it"),
        (2, 2, 4, "take a number of devices that divides it"),
    ],
)
def test_a_batch_that_devices_cannot_share_names_what_fits(batch, micro, devices, hint):
    with pytest.raises(UserError, match=rf"devices = \d+; {hint}$"):
        data(batch, micro).accumulation(devices)


def test_tokens_become_whole_steps_and_are_never_exceeded():
    assert Budget(max_tokens=200_000_000_000).steps(data(256, seq_len=4096)) == 190_734
    assert Budget(max_tokens=1000).steps(data(10, seq_len=100)) == 1
    assert Budget(max_tokens=1999).steps(data(10, seq_len=100)) == 1
    assert Budget(max_steps=7).steps(data(10, seq_len=100)) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "set one of budget.max_tokens, budget.max_steps, budget.max_epochs"),
        ({"max_tokens": 5, "max_steps": 6}, "budget.max_tokens 5 and budget.max_steps 6 contradict each other"),
        ({"max_epochs": 1, "max_steps": 6}, "budget.max_steps 6 and budget.max_epochs 1 contradict each other"),
    ],
)
def test_exactly_one_budget_is_stated(arguments, message):
    with pytest.raises(UserError, match=message):
        Budget(**arguments)


def test_a_budget_below_one_step_is_named():
    with pytest.raises(UserError, match=r"max_tokens 999 is less than one optimizer step, .* = 1000 tokens"):
        Budget(max_tokens=999).steps(data(10, seq_len=100))
