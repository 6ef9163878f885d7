"""The benchmark of sharding at toy size: two real processes, and what is made of their counts."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.sharding import SMALL, WAYS, Held, Way, benchmark, local_bytes, plan, run, table, write_recipe
from meap_lit.errors import UserError
from meap_lit.planning.memory import Memory

TOY = replace(SMALL, num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=64, intermediate_size=160, vocab_size=320)


@pytest.mark.slow
def test_two_processes_hold_what_is_planned_and_half_of_what_one_holds(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, replace(TOY, max_seq_len=32), micro_batch_size=1, precision="32-true", steps=2)
    sharded = next(way for way in WAYS if way.overlay == "fsdp" and way.num_processes == 2)
    memory, held = plan(sharded, recipe), run(sharded, recipe, tmp_path / "held")
    assert len(held) == 2
    for one in held:
        assert (one.parameters, one.gradients, one.optimizer) == (memory.parameters, memory.gradients, memory.optimizer)
        assert one.peak > one.states
    num_bytes, num_tensors = 4 * TOY.num_parameters(), 2 * 9 + 3  # each tensor's step is a float32 of its own
    assert sum(one.parameters for one in held) == sum(one.gradients for one in held) == num_bytes
    assert sum(one.optimizer for one in held) == 2 * num_bytes + 2 * 4 * num_tensors


def test_a_run_that_fails_is_named_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "ls")
    with pytest.raises(RuntimeError, match=r"(?s)ls -m meap_lit fit --config .*recipe.yaml.*unrecognized option"):
        run(Way("none", "single", 1), tmp_path / "recipe.yaml", tmp_path / "held")


def test_the_table_has_the_fullest_process_and_the_plan() -> None:
    one, two = Way("whole", "single", 1), Way("halves", "fsdp", 2)
    fields = dict.fromkeys(("buckets", "gathered", "activations", "copies", "loss"), 0)
    planned = {
        way: Memory(parameters=size, gradients=size, optimizer=2 * size, backward=10**6, **fields)
        for way, size in ((one, 8 * 10**6), (two, 4 * 10**6))
    }
    held = {
        one: [Held(8_000_000, 8_000_000, 16_000_000, 40_000_000)],
        two: [Held(3_000_000, 3_000_000, 6_000_000, 22_000_000), Held(4_000_000, 4_000_000, 8_000_000, 21_000_000)],
    }
    rows = [line.strip("| ").split(" | ") for line in table(held, planned)]
    assert rows[2] == ["whole", "1", "8.00", "8.00", "16.00", "32.00", "1.0000", "32.00", "40", "33"]
    assert rows[3] == ["halves", "2", "4.00", "4.00", "8.00", "16.00", "0.5000", "16.00", "22", "17"]


def test_bytes_are_those_of_the_dtype() -> None:
    assert local_bytes([torch.zeros(3, 5), torch.zeros(7, dtype=torch.bfloat16)]) == 3 * 5 * 4 + 7 * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, "--steps must be at least 2"),
        ({"micro_batch_size": 0}, "--micro_batch_size at least 1"),
        ({"decoder": replace(TOY, vocab_size=256)}, "--decoder.vocab_size must be at least 320, got 256"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        benchmark(**options)
