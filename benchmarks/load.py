"""Measure the peak resident memory and the time of filling a decoder from a file.

A random model is written as one safetensors file, as several, and as a checkpoint of a run. A new process loads each,
and one more process loads nothing: its memory, with everything imported, is subtracted from the others.
Pages of a mapped file count as resident, so a loader that keeps the file mapped shows a ratio near 2.

    python -m benchmarks.load                  # a model of about 1 GB, under a minute; Linux
    python -m benchmarks.load --model small    # a quick look at the table
"""

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from benchmarks.fresh import Worker, memory
from benchmarks.page import main, page, publish
from benchmarks.step import known_decoder
from meap_lit.checkpoint.export import Export
from meap_lit.checkpoint.folder import write
from meap_lit.checkpoint.source import DTYPES, open_source
from meap_lit.data.prepare.tokenizer import TrainTokenizer
from meap_lit.errors import UserError
from meap_lit.hf.weights import build_decoder
from meap_lit.model import Decoder, DecoderConfig


def benchmark(
    model: Literal["small", "0.1b", "0.3b", "0.5b", "1.1b"] = "0.5b",
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    max_shard_size: str = "200MB",
    repetitions: int = 3,
    output: Path | None = None,
) -> None:
    """Print how much memory and time the loading of a model takes.

    Args:
        model: A small model, or one of the paper's ladder as recipes/pretrain has it.
        dtype: Dtype of the weights, in the file and in memory.
        max_shard_size: Size of a shard.
        repetitions: Processes that load each file; the table has the one with the highest peak.
        output: Markdown file to write the result to as well.
    """
    memory("VmHWM")  # fails at once where the processes could not read it
    if repetitions < 1:
        raise UserError("--repetitions must be at least 1")
    config = known_decoder(model)
    with tempfile.TemporaryDirectory() as folder:
        places = _write_model(Path(folder), config, DTYPES[dtype], max_shard_size)
        baseline, _ = _measure(None, repetitions)
        rows = [_row(name, place, baseline, repetitions) for name, place in places.items()]
    facts = [
        f"model: {config.num_parameters():,} parameters; shards of at most {max_shard_size}",
        f"a process that has imported everything and loads nothing: {baseline / 1e9:.3f} GB; "
        f"peaks are above it, the highest of {repetitions} processes",
    ]
    body = [
        "| file | weights, GB | largest tensor, GB | peak memory, GB | peak / weights | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
        *rows,
    ]
    publish(page("load", f"Loading weights: {model}, {dtype}", "cpu", facts=facts, body=body), output)


def _write_model(folder: Path, config: DecoderConfig, dtype: torch.dtype, max_shard_size: str) -> dict[str, Path]:
    """Write random weights in three forms and return their paths."""
    checkpoint, text = folder / "random.ckpt", folder / "text.txt"
    one, shards, tokenizer = (folder / name for name in ("one", "shards", "tokenizer"))
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder = decoder.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.02)
    state = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    write({"state_dict": state, "decoder": {"config": vars(config)}}, checkpoint)
    text.write_text("some text")
    for place in (one, shards, tokenizer):
        place.mkdir()
    TrainTokenizer(input=[str(text)], vocab_size=258, output=str(tokenizer)).make(tokenizer)
    for place, size in ((one, "1000GB"), (shards, max_shard_size)):
        export = Export(checkpoint=str(checkpoint), output=str(place), tokenizer=str(tokenizer), max_shard_size=size)
        export.make(place)
    return {"one safetensors file": one, "safetensors shards": shards, "checkpoint (.ckpt)": checkpoint}


def _row(name: str, place: Path, baseline: int, repetitions: int) -> str:
    source = open_source(place)
    sizes = [torch.Size(source.shape(tensor)).numel() * source.dtype.itemsize for tensor in source.names()]
    peak, seconds = _measure(place, repetitions)
    above = peak - baseline
    return (
        f"| {name} | {sum(sizes) / 1e9:.3f} | {max(sizes) / 1e9:.3f} | {above / 1e9:.3f} "
        f"| {above / sum(sizes):.3f} | {seconds:.2f} |"
    )


def _measure(place: Path | None, repetitions: int) -> tuple[int, float]:
    """Highest peak in bytes and its seconds, over fresh processes that load what is at `place`."""
    results = []
    for _ in range(repetitions):
        with Worker(partial(partial, _load, place)) as worker:
            results.append(worker())
    return max(results)


def _load(place: Path | None) -> tuple[int, float]:
    start = time.perf_counter()
    weights: list[Tensor] = []
    if place is not None:
        source = open_source(place)
        weights = list(build_decoder(source.config, source).parameters())
    seconds = time.perf_counter() - start
    peak = memory("VmHWM")
    del weights
    return peak, seconds


if __name__ == "__main__":
    main(benchmark)
