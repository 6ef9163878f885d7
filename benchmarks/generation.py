"""Evaluated tokens a second: greedy generation by `meap_lit evaluate` against `transformers`' `generate`.

One random Llama, written by transformers, is read by both; prompts are continued by the same number of tokens. Random
prompts of several lengths, with nothing in common: one at a time, and as a grid. And the grid of a needle in a haystack
at each length and depth, as the task makes it. Of a grid transformers gets either the batches that `evaluate` makes, or
batches of a fixed size in the order of the prompts, as a plain loop over a data set makes them. Both use a key-value
cache and their own scaled_dot_product_attention; transformers pads on the left, as its documentation asks. The same
tokens must come out. On a CPU the time is that of the process, which other processes disturb less.

    python -m benchmarks.generation                                              # a small model on this CPU
    python -m benchmarks.generation --model 1.1b --device cuda --dtype bfloat16 --lengths [1024,2048,3900] --batch 16
"""

import dataclasses
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.page import check_device, main, page, publish
from benchmarks.step import known_decoder
from meap_lit.data.corpora.facts import filler_sentence
from meap_lit.data.prepare.tokenizer import TrainTokenizer
from meap_lit.evaluation.runner import alike_together, batches
from meap_lit.evaluation.task import Item
from meap_lit.evaluation.tasks.needle import Needle
from meap_lit.inference.generation import generate
from meap_lit.inference.language_model import LanguageModel
from meap_lit.model import DecoderConfig

Prompts = list[list[int]]
Batches = list[list[int]]
"""Indices of the prompts of each batch."""
Engine = Callable[[Prompts, int], Prompts]
"""Continues a batch of prompts by a number of tokens."""

DEPTHS = (0, 10, 21, 31, 42, 52, 63, 73, 84, 94, 100)
"""Of the needle, in percent; those of recipes/eval/needle.yaml."""


def benchmark(
    model: Literal["small", "10m", "0.1b", "0.3b", "0.5b", "1.1b"] = "small",
    lengths: tuple[int, ...] = (128, 256, 384, 512),
    per_length: int = 8,
    batch: int = 8,
    new_tokens: int = 32,
    needle_lengths: tuple[int, ...] = (500, 1000, 1500),
    needle_depths: tuple[float, ...] = DEPTHS,
    haystack: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: Literal["cpu", "cuda"] = "cpu",
    repetitions: int = 3,
    output: Path | None = None,
) -> None:
    """Print prompts and new tokens per second of both.

    Args:
        model: A small model, or one of the paper's ladder.
        lengths: Tokens of the random prompts.
        per_length: Prompts of each length in the grid.
        batch: Prompts of the longest length that share a batch; of shorter ones as many as take up the same room.
        new_tokens: Tokens added to each random prompt; to those of the needle as many as the task asks for.
        needle_lengths: Lengths of the needle's grid, in tokens, answer included.
        needle_depths: Its depths, in percent.
        haystack: Text for it, as for the task; made-up sentences if not given.
        dtype: Dtype of the weights.
        device: Where to run.
        repetitions: Turns of each.
        output: Markdown file to write the result to as well.
    """
    check_device(device)
    longest = max(max(lengths) + new_tokens, *needle_lengths)
    config = dataclasses.replace(known_decoder(model), max_seq_len=longest)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        _write_llama(config, folder)
        text = haystack or _made_up_text(Path(folder), max(needle_lengths))
        needle = Needle(haystack=text, lengths=needle_lengths, depths=needle_depths)
        _write_tokenizer(config, needle, folder)
        language_model = LanguageModel(folder, dtype=dtype, device=device)
        engines = {"meap_lit": _ours(language_model), "transformers": _peer(folder, device, dtype)}
        items = needle.items(language_model)
        grid, needles = _random_prompts(config, lengths, per_length), [item.input_ids for item in items]
        few = range(0, len(grid), len(grid) // 4 + 1)  # of all lengths
        alike = _batches_of_evaluate(_as_items(grid, new_tokens), batch)
        needles_alike = _batches_of_evaluate(items, batch)
        cases = {
            "random, one at a time": (grid, new_tokens, [[index] for index in few], [[index] for index in few]),
            "random": (grid, new_tokens, alike, alike),
            "random, transformers in its order": (grid, new_tokens, alike, _batches_in_order(grid, batch)),
            "needle": (needles, needle.max_new_tokens, needles_alike, needles_alike),
            "needle, transformers in its order": (
                needles,
                needle.max_new_tokens,
                needles_alike,
                _batches_in_order(needles, batch),
            ),
        }
        lines = []
        for name, (prompts, num_new, *both) in cases.items():
            passes = {
                who: partial(_pass, engine, prompts, num_new, batches)
                for (who, engine), batches in zip(engines.items(), both, strict=True)
            }
            shares = _agreement(passes["meap_lit"](), passes["transformers"]())  # this also warms both up
            seconds = _measure(passes, repetitions, device)
            ratio = statistics.median(b / a for a, b in zip(seconds["meap_lit"], seconds["transformers"], strict=True))
            num_prompts = sum(map(len, both[0]))
            rates = [num_prompts * num_new / statistics.median(seconds[who]) for who in passes]
            counts = ", ".join(str(len(batches)) for batches in both)
            lines.append(
                f"| {name} | {num_prompts} | {counts} | {rates[0]:,.1f} | {rates[1]:,.1f} | {ratio:.2f} | {shares} |"
            )
    facts = [
        f"{'wall-clock' if device == 'cuda' else 'CPU'} time; load of the machine {load:.1f} at the start, "
        f"{os.getloadavg()[0]:.1f} at the end",
        f"model: {config.num_parameters():,} parameters; new tokens a second, medians of {repetitions} turns",
        f"random prompts: {', '.join(map(str, lengths))} tokens and fewer, by up to a fifth; {new_tokens} new "
        f"tokens each",
        f"needle: {', '.join(map(str, needle_lengths))} tokens, answer included, at {len(needle_depths)} depths "
        f"in {'the text given' if haystack else 'made-up text'}; {needle.max_new_tokens} new tokens each",
        f"batches hold {batch} of the longest prompts",
    ]
    body = [
        "| prompts | number | batches | meap_lit, tokens/s | transformers, tokens/s | ratio | same tokens |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *lines,
    ]
    publish(page("generation", f"Generation: {model}, {device}, {dtype}", device, facts=facts, body=body), output)


def _random_prompts(config: DecoderConfig, lengths: tuple[int, ...], per_length: int) -> Prompts:
    """Prompts of every length in turn."""
    generator = torch.Generator().manual_seed(0)
    assert config.vocab_size is not None
    draws = [[int(length * (0.8 + 0.2 * n / per_length)) for n in range(per_length)] for length in lengths]
    mixed = [length for column in zip(*draws, strict=True) for length in column]
    return [torch.randint(3, config.vocab_size, (length,), generator=generator).tolist() for length in mixed]


def _as_items(prompts: Prompts, new_tokens: int) -> list[Item]:
    return [Item(str(number), {}, {}, prompt, len(prompt) + new_tokens) for number, prompt in enumerate(prompts)]


def _batches_of_evaluate(items: list[Item], size: int) -> Batches:
    """With room for `size` of the longest items."""
    numbers = {item.id: number for number, item in enumerate(items)}
    room = size * max(item.num_tokens for item in items)
    return [
        [numbers[item.id] for item in batch]
        for batch in batches(alike_together(items), room, lambda item: item.num_tokens)
    ]


def _batches_in_order(prompts: Prompts, size: int) -> Batches:
    return [list(range(len(prompts)))[start : start + size] for start in range(0, len(prompts), size)]


def _pass(engine: Engine, prompts: Prompts, new_tokens: int, batches: Batches) -> dict[int, list[int]]:
    """New tokens of each prompt, by its index."""
    return {
        index: new_ids
        for indices in batches
        for index, new_ids in zip(indices, engine([prompts[index] for index in indices], new_tokens), strict=True)
    }


def _measure(passes: Mapping[str, Callable[[], object]], repetitions: int, device: str) -> dict[str, list[float]]:
    """Seconds of each pass over all batches; the engines take turns, in changing order."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    clock = time.perf_counter if device == "cuda" else time.process_time
    for turn in range(repetitions):
        for name in sorted(passes, reverse=turn % 2 == 0):
            start = clock()
            passes[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return seconds


def _agreement(ours: Mapping[int, list[int]], peers: Mapping[int, list[int]]) -> str:
    """Share of equal tokens."""
    pairs = [pair for index in ours for pair in zip(ours[index], peers[index], strict=True)]
    return f"{sum(a == b for a, b in pairs) / len(pairs):.1%}"


def _ours(model: LanguageModel) -> Engine:
    return lambda prompts, new_tokens: generate(
        model.decoder, prompts, max_new_tokens=new_tokens, batch_size=len(prompts)
    )


def _made_up_text(folder: Path, num_sentences: int) -> str:
    """A file of short documents."""
    rng = random.Random(0)
    texts = folder / "text"
    texts.mkdir()
    sentences = [filler_sentence(rng) for _ in range(num_sentences)]
    for start in range(0, num_sentences, 100):
        (texts / f"{start:06}.txt").write_text(" ".join(sentences[start : start + 100]) + "\n")
    return str(texts)


def _write_tokenizer(config: DecoderConfig, needle: Needle, folder: str) -> None:
    """Trained on the haystack, and on the question, which would be all letters otherwise."""
    assert config.vocab_size is not None
    assert needle.haystack is not None
    [question] = needle.prompts()
    asked = Path(folder) / "question.txt"
    asked.write_text(2 * "".join([question.before, *question.needles, question.after]))
    train = TrainTokenizer(output=folder, input=[needle.haystack, str(asked)], vocab_size=config.vocab_size)
    train.make(Path(folder))


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


def _peer(folder: str, device: str, dtype: str) -> Engine:
    from transformers import AutoModelForCausalLM

    options = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa", "device_map": device}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)

    def run(prompts: Prompts, new_tokens: int) -> Prompts:
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
    main(benchmark)
