"""Evaluated tokens a second: greedy generation by `meap_lit evaluate` against `transformers`' `generate`.

One random Llama, written by transformers, is read by both; prompts of several lengths are continued by the same number
of tokens, one at a time (batch 1) and as a grid in batches of like length. Both use a key-value cache and their own
scaled_dot_product_attention; transformers pads on the left, as its documentation asks. The same tokens must come out.

    python -m benchmarks.generation                                              # a small model on this CPU
    python -m benchmarks.generation --model 1.1b --device cuda --dtype bfloat16 --lengths 1024,2048,3900 --batch 16
"""

import dataclasses
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
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
from meap_lit.evaluation.task import Item
from meap_lit.model import DecoderConfig
from meap_lit.model.weights import build_decoder

Prompts = list[list[int]]


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
    grid = [
        torch.randint(3, config.vocab_size, (length,), generator=generator).tolist() for row in draws for length in row
    ]
    with tempfile.TemporaryDirectory() as folder:
        ours, peer = _ours(config, folder, device, dtype, new_tokens), _peer(folder, device, dtype, new_tokens)
        cases = {"one prompt at a time": (grid[:: max(1, len(grid) // 4)], 1), "a grid": (grid, batch)}
        lines = []
        for name, (prompts, size) in cases.items():
            room = size * (max(map(len, prompts)) + new_tokens)
            divided = [[prompts[int(item.id)] for item in group] for group in _divide(prompts, new_tokens, room, size)]
            shares = _agreement(ours, peer, divided)
            seconds = _measure({"meap_lit": ours, "transformers": peer}, divided, repetitions, device)
            ratio = statistics.median(b / a for a, b in zip(seconds["meap_lit"], seconds["transformers"], strict=True))
            total = len(prompts) * new_tokens
            rates = [f"{total / statistics.median(seconds[who]):,.0f}" for who in ("meap_lit", "transformers")]
            lines.append(
                f"| {name} | {len(prompts)} | {len(divided)} | {rates[0]} | {rates[1]} | {ratio:.2f} | {shares} |"
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


def _divide(prompts: Prompts, new_tokens: int, room: int, size: int) -> list[list[Item]]:
    items = [Item(str(n), {}, {}, prompt, len(prompt) + new_tokens) for n, prompt in enumerate(prompts)]
    longest_first = sorted(items, key=lambda item: -item.num_tokens)
    return list(batches(longest_first, room)) if size > 1 else [[item] for item in longest_first]


def _measure(
    engines: dict[str, Callable[[Prompts], Prompts]], divided: list[Prompts], repetitions: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each pass over all batches; the engines take turns, in changing order."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(repetitions):
        for name in sorted(engines, reverse=turn % 2 == 0):
            start = time.perf_counter()
            for prompts in divided:
                engines[name](prompts)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _agreement(ours: Callable[[Prompts], Prompts], peer: Callable[[Prompts], Prompts], divided: list[Prompts]) -> str:
    """Share of equal tokens; also warms both up."""
    pairs = [
        (a, b)
        for prompts in divided
        for one, other in zip(ours(prompts), peer(prompts), strict=True)
        for a, b in zip(one, other, strict=True)
    ]
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
