"""The changes that `plan` proposes."""

from dataclasses import replace

import pytest

from meap_lit.model import DecoderConfig
from meap_lit.planning.devices import Devices
from meap_lit.planning.memory import Step, memory_of
from meap_lit.planning.remedies import smallest_changes

pytestmark = pytest.mark.slow

SMALL = DecoderConfig(
    num_layers=8, num_heads=8, num_kv_heads=8, hidden_size=512, intermediate_size=1408, vocab_size=32_064
)


def test_changes_are_as_few_and_as_mild_as_possible():
    step = Step(SMALL, num_tokens=8 * 2048, seq_len=2048, accumulation=2, devices=Devices(2, buckets="copy"))
    total = memory_of(step).total
    ways = smallest_changes(step, capacity=total * 3 // 4)
    assert ["--data.micro_batch_size 4"] in [options for options, _ in ways]
    assert all(len(options) == 1 and memory.total <= total * 3 // 4 for options, memory in ways)
    in_quarter = memory_of(replace(step, num_tokens=4 * 2048)).total
    assert [memory.total for options, memory in ways if options == ["--data.micro_batch_size 4"]] == [in_quarter]


def test_several_changes_are_tried_together_where_one_is_not_enough():
    step = Step(SMALL, num_tokens=8 * 2048, seq_len=2048, devices=Devices(2, buckets="copy"))
    capacity = memory_of(replace(step, num_tokens=2048, activation_checkpointing="full")).total
    ways = smallest_changes(step, capacity)
    assert [len(options) for options, _ in ways] == [2] * len(ways)
    assert ways
    assert smallest_changes(step, capacity=1) == []
