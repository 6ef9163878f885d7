"""Which changes to a recipe bring its memory within that of a device."""

import dataclasses
from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

import torch

from meap_lit.parallel.strategies import gathered_dtype
from meap_lit.planning.layout import PRECISIONS
from meap_lit.planning.memory import Memory, Step, memory_of

Change = tuple[str, dict[str, Any]]
"""Words for the command line, and the fields of `Step` (or of its layout) that they change."""


def smallest_changes(step: Step, capacity: int) -> list[tuple[list[str], Memory]]:
    """The fewest changes to a recipe that bring its memory within `capacity` bytes.

    Args:
        step: The recipe's.
        capacity: Bytes of a device.

    Returns:
        Command-line options and memory of each way that takes as few changes as possible, each change as mild as
        possible; empty if none is enough.
    """
    kinds = [options for options in _changes(step) if options]
    for count in range(1, len(kinds) + 1):
        found = []
        for chosen in combinations(kinds, count):
            for options in product(*chosen):  # mild ones first
                changed = step
                for _, change in options:
                    changed = _apply(changed, change)
                memory = memory_of(changed)
                if memory.total <= capacity:
                    found.append(([words for words, _ in options], memory))
                    break
        if found:
            return found
    return _offload(step, capacity)


def _offload(step: Step, capacity: int) -> list[tuple[list[str], Memory]]:
    """The last resort, which costs the most time."""
    if step.layout.fsdp and not step.layout.cpu_offload:
        memory = memory_of(_apply(step, {"layout": {"cpu_offload": True}}))
        if memory.total <= capacity:
            return [(["--trainer.strategy.cpu_offload true"], memory)]
    return []


def _apply(step: Step, change: dict[str, Any]) -> Step:
    layout = change.get("layout")
    rest = {key: value for key, value in change.items() if key != "layout"}
    return dataclasses.replace(step, **rest, layout=dataclasses.replace(step.layout, **(layout or {})))


def _changes(step: Step) -> Iterator[list[Change]]:
    """For each kind of change its options, the mildest first."""
    micro_batch = step.num_tokens // step.seq_len
    rows = step.accumulation * micro_batch
    yield [
        (f"--data.micro_batch_size {size}", {"num_tokens": size * step.seq_len, "accumulation": rows // size})
        for size in range(micro_batch - 1, 0, -1)
        if rows % size == 0
    ]

    modes = ("none", "selective", "full")
    stronger = modes[modes.index(step.activation_checkpointing) + 1 :]
    yield [(f"--model.activation_checkpointing {mode}", {"activation_checkpointing": mode}) for mode in stronger]

    layout = step.layout
    if layout.num_devices > 1 and not layout.fsdp:
        sharded = {
            "fsdp": True,
            "shard_size": layout.num_devices,
            "param_dtype": gathered_dtype(None, step.precision),
            "reduce_dtype": torch.float32,
            "buckets": None,
        }
        yield [("--config recipes/strategy/fsdp.yaml", {"layout": sharded})]
    elif layout.fsdp and layout.shard_size < layout.num_replicas:
        yield [("--trainer.strategy.shard_size null", {"layout": {"shard_size": layout.num_replicas}})]
    if layout.fsdp and layout.param_dtype is None and step.precision == "bf16-mixed":
        yield [("--trainer.strategy.param_dtype bfloat16", {"layout": {"param_dtype": torch.bfloat16}})]

    if step.lora is None:
        lower = list(PRECISIONS)[list(PRECISIONS).index(step.precision) + 1 :]
        yield [(f"--trainer.precision {name}", {"precision": name}) for name in lower]
