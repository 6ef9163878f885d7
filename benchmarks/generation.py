"""Evaluated tokens a second: greedy generation by `meap_lit evaluate` against `transformers`' `generate`.

One random Llama, written by transformers, is read by both; prompts of several lengths are continued by the same number
of tokens: one at a time; as a grid, both in the batches of like length that `evaluate` makes; and as a grid of which
transformers gets batches of a fixed size in the order of the prompts, as a plain loop over a data set makes them.
Both use a key-value cache and their own scaled_dot_product_attention; transformers pads on the left, as its
documentation asks. The same tokens must come out.

    python -m benchmarks.generation                                              # a small model on this CPU
    python -m benchmarks.generation --model 1.1b --device cuda --dtype bfloat16 --lengths 1024,2048,3900 --batch 16
"""

import dataclasses
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from torch import Tensor

from benchmarks.step import environment, known_decoder
from meap_lit.checkpoints import open_source
from meap_lit.errors import UserError
from meap_lit.evaluation.generation import generate
from meap_lit.evaluation.runner import batches
from meap_lit.model import DecoderConfig
from meap_lit.model.weights import build_decoder

Prompts = list[list[int]]
Batches = list[list[int]]
"""Indices of the prompts of each batch."""


def benchmark(
    model: Literal["small", "0.1b", "0.3b", "0.5b", "1.1b"] = "small",
    lengths: tuple[int, ...] = (128, 256, 384, 512),
    per_length: int = 8,
    batch: int = 8,
    new_tokens: int = 32,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: Literal["cpu", "cuda"] = "cpu",
    repetitions: int = 3,
    output: Path | None = None,
) -> None:
    """Print how many prompts and new tokens a second either gets through.

    Args:
        model: A small model, or one of the paper's ladder.
        lengths: Tokens of the prompts.
        per_length: Prompts of each length in the grid.
        batch: Prompts of the longest length that share a batch; of shorter ones as many as take up the same room.
        new_tokens: Tokens added to each prompt.
        dtype: Dtype of the weights.
        device: Where to run.
        repetitions: Turns of each.
        output: Markdown file to write the result to as well.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device; use --device cpu")
    config = dataclasses.replace(known_decoder(model), max_seq_len=max(lengths) + new_tokens)
    generator = torch.Generator().manual_seed(0)
    assert config.vocab_size is not None
    draws = [[int(length * (0.8 + 0.2 * n / per_length)) for n in range(per_length)] for length in lengths]
    mixed = [length for column in zip(*draws, strict=True) for length in column]  # every length in turn
    grid = [torch.randint(3, config.vocab_size, (length,), generator=generator).tolist() for length in mixed]
    with tempfile.TemporaryDirectory() as folder:
        ours, peer = _ours(config, folder, device, dtype, new_tokens), _peer(folder, device, dtype, new_tokens)
        few = range(0, len(grid), len(grid) // 4 + 1)  # of all lengths
        alike = _batches_of_like_length(grid, batch, new_tokens)
        in_order = [list(range(len(grid)))[start : start + batch] for start in range(0, len(grid), batch)]
        cases = {
            "one prompt at a time": ([[index] for index in few],) * 2,
            "a grid": (alike, alike),
            "a grid, transformers in its order": (alike, in_order),
        }
        lines = []
        for name, (our_batches, peer_batches) in cases.items():
            passes = {
                "meap_lit": partial(_pass, ours, grid, our_batches),
                "transformers": partial(_pass, peer, grid, peer_batches),
            }
            shares = _agreement(passes["meap_lit"](), passes["transformers"]())  # this also warms both up
            seconds = _measure(passes, repetitions, device)
            ratio = statistics.median(b / a for a, b in zip(seconds["meap_lit"], seconds["transformers"], strict=True))
            num_prompts = sum(map(len, our_batches))
            rates = [num_prompts * new_tokens / statistics.median(seconds[who]) for who in passes]
            counts = f"{len(our_batches)}, {len(peer_batches)}"
            lines.append(
                f"| {name} | {num_prompts} | {counts} | {rates[0]:,.0f} | {rates[1]:,.0f} | {ratio:.2f} | {shares} |"
            )
    report = "\n".join(
        [
            f"# Generation: {model}, {device}, {dtype}",
            "",
            f"    python -m benchmarks.generation {shlex.join(sys.argv[1:])}".rstrip(),
            "",
            *environment(device),
            f"- model: {config.num_parameters():,} parameters; prompts of {', '.join(map(str, lengths))} tokens and "
            f"fewer, by up to a fifth; {new_tokens} new tokens each; {repetitions} turns of each, medians",
            "",
            "| | prompts | batches | meap_lit, new tokens/s | transformers, new tokens/s | ratio | same tokens |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *lines,
            "",
        ]
    )
    print(report)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(report)


def _batches_of_like_length(prompts: Prompts, size: int, new_tokens: int) -> Batches:
    """The batches of `evaluate`, with room for `size` of the longest prompts."""
    lengths = [len(prompt) + new_tokens for prompt in prompts]
    longest_first = sorted(range(len(prompts)), key=lambda index: -lengths[index])
    return list(batches(longest_first, size * max(lengths), lengths.__getitem__))


def _pass(engine: Callable[[Prompts], Prompts], prompts: Prompts, batches: Batches) -> dict[int, list[int]]:
    """New tokens of each prompt, by its index."""
    return {
        index: new_ids
        for indices in batches
        for index, new_ids in zip(indices, engine([prompts[index] for index in indices]), strict=True)
    }


def _measure(passes: Mapping[str, Callable[[], object]], repetitions: int, device: str) -> dict[str, list[float]]:
    """Seconds of each pass over all batches; the engines take turns, in changing order."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(repetitions):
        for name in sorted(passes, reverse=turn % 2 == 0):
            start = time.perf_counter()
            passes[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _agreement(ours: Mapping[int, list[int]], peers: Mapping[int, list[int]]) -> str:
    """Share of equal tokens."""
    pairs = [pair for index in ours for pair in zip(ours[index], peers[index], strict=True)]
    return f"{sum(a == b for a, b in pairs) / len(pairs):.1%}"


def _ours(config: DecoderConfig, folder: str, device: str, dtype: str, new_tokens: int) -> Callable[[Prompts], Prompts]:
    _write_llama(config, folder)
    source = open_source(folder)
    decoder = build_decoder(source.config, source, dtype=getattr(torch, dtype), device=torch.device(device)).eval()
    return lambda prompts: generate(decoder, prompts, max_new_tokens=new_tokens, batch_size=len(prompts))


def _write_llama(config: DecoderConfig, folder: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    assert config.vocab_size is not None
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_seq_len,
    )
    LlamaForCausalLM(llama).save_pretrained(folder)


def _peer(folder: str, device: str, dtype: str, new_tokens: int) -> Callable[[Prompts], Prompts]:
    from transformers import AutoModelForCausalLM

    options = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa", "device_map": device}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)

    def run(prompts: Prompts) -> Prompts:
        longest = max(map(len, prompts))
        input_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            attention_mask[row, longest - len(prompt) :] = 1
        result: Tensor = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return result[:, longest:].tolist()

    return run


if __name__ == "__main__":
    auto_cli(benchmark, as_positional=False)
