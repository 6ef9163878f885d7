"""Find the changes to a recipe that bring its memory within that of a device."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any, get_args

import torch

from meap_lit.parallel.strategies import gathered_dtype
from meap_lit.planning.devices import PRECISIONS
from meap_lit.planning.fake_step import Checkpointing
from meap_lit.planning.memory import Memory, Step, memory_of

Change = tuple[str, Callable[[Step], Step]]
"""Words for the command line, and what they do to a step."""


def smallest_changes(step: Step, capacity: int) -> list[tuple[list[str], Memory]]:
    """Return the fewest changes to a recipe that bring its memory within `capacity` bytes.

    Returns:
        Command-line options and memory of each way that takes as few changes as possible, each change as mild as
        possible; empty if none is enough.
    """
    kinds = [options for options in _changes(step) if options]
    for count in range(1, len(kinds) + 1):
        found = [way for chosen in combinations(kinds, count) if (way := _mildest(step, chosen, capacity))]
        if found:
            return found
    if step.devices.fsdp and not step.devices.cpu_offload:  # the last resort, which costs the most time
        way = _mildest(step, ([("--trainer.strategy.cpu_offload true", _devices(cpu_offload=True))],), capacity)
        return [way] if way else []
    return []


def _mildest(step: Step, kinds: Sequence[list[Change]], capacity: int) -> tuple[list[str], Memory] | None:
    """Return the mildest way to take one change of each kind whose memory is within `capacity`, if there is one."""
    strongest = tuple(options[-1] for options in kinds)
    if _memory_with(strongest, step).total > capacity:
        return None
    for changes in product(*kinds):
        memory = _memory_with(changes, step)
        if memory.total <= capacity:
            return [words for words, _ in changes], memory
    return None


def _memory_with(changes: Iterable[Change], step: Step) -> Memory:
    for _, change in changes:
        step = change(step)
    return memory_of(step)


def _step(**changes: Any) -> Callable[[Step], Step]:
    return lambda step: replace(step, **changes)


def _devices(**changes: Any) -> Callable[[Step], Step]:
    return lambda step: replace(step, devices=replace(step.devices, **changes))


def _changes(step: Step) -> Iterator[list[Change]]:
    """Yield the options of each kind of change, the mildest first."""
    micro_batch = step.num_tokens // step.seq_len
    rows = step.accumulation * micro_batch
    yield [
        (f"--data.micro_batch_size {size}", _step(num_tokens=size * step.seq_len, accumulation=rows // size))
        for size in range(micro_batch - 1, 0, -1)
        if rows % size == 0
    ]

    modes = get_args(Checkpointing)
    stronger = modes[modes.index(step.activation_checkpointing) + 1 :]
    yield [(f"--model.activation_checkpointing {mode}", _step(activation_checkpointing=mode)) for mode in stronger]

    devices = step.devices
    if devices.number > 1 and not devices.fsdp:
        sharded = _devices(
            fsdp=True,
            shard_size=devices.number,
            param_dtype=gathered_dtype(None, step.precision),
            reduce_dtype=torch.float32,
            buckets=None,
        )
        yield [("--config recipes/strategy/fsdp.yaml", sharded)]
    elif devices.fsdp and devices.shard_size < devices.num_replicas:
        yield [("--trainer.strategy.shard_size null", _devices(shard_size=devices.num_replicas))]
    if devices.fsdp and not devices.reduce_each_micro_batch:
        yield [("--trainer.strategy.reduce_each_micro_batch true", _devices(reduce_each_micro_batch=True))]
    if devices.fsdp and devices.param_dtype is None and step.precision == "bf16-mixed":
        yield [("--trainer.strategy.param_dtype bfloat16", _devices(param_dtype=torch.bfloat16))]

    if step.lora is None:
        lower = list(PRECISIONS)[list(PRECISIONS).index(step.precision) + 1 :]
        yield [(f"--trainer.precision {name}", _step(precision=name)) for name in lower]
