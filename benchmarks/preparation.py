"""Compare the cost of preparing text with that of tokenizing it: `prepare text` against `encode_batch` of
the bare `tokenizers`.

Both have the same documents, one .jsonl file, the same tokenizer and the same cores, in fresh processes by turns.
The time of `prepare text` is the one that it prints: file read, worker processes started, tokens written, chunks
hashed. `encode_batch` has all texts in memory before its time begins and throws the tokens away; its threads are
as many as there are cores.

    python -m benchmarks.preparation                 # the sources of Python's standard library, a few minutes
    python -m benchmarks.preparation --input my_texts --suffixes '[.txt]'
"""

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import tokenizers

from benchmarks.fresh import in_fresh_process
from benchmarks.page import main, page, publish
from meap_lit.data.prepare.tokenizer import TrainTokenizer
from meap_lit.data.read.find import find_files, size_of
from meap_lit.data.read.readers import TextReader, read_texts
from meap_lit.data.store.manifest import Manifest
from meap_lit.errors import UserError
from meap_lit.tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
BATCH_CHARACTERS = 1 << 24
"""Texts of one `encode_batch`: enough that no thread waits for the last one, few enough to be held as encodings."""


def benchmark(
    input: list[str] | None = None,
    suffixes: list[str] | None = None,
    vocab_size: int = 16_384,
    repetitions: int = 5,
    output: Path | None = None,
) -> None:
    """Print how many tokens a second are prepared, and how many are encoded without anything around it.

    Args:
        input: Files and folders of text; the sources of Python's standard library if not given.
        suffixes: File name endings to take from folders; .py with the standard library.
        vocab_size: Of the byte-level BPE tokenizer that is trained on the first 20 MB of the text.
        repetitions: Processes of each kind, in turns.
        output: Markdown file to write the result to as well.
    """
    if repetitions < 2:
        raise UserError("--repetitions must be at least 2")
    if input is None:
        library = Path(sysconfig.get_path("stdlib"))
        sources = (file for file in sorted(library.rglob("*.py")) if "site-packages" not in file.parts)
        input, suffixes = [str(file) for file in sources], [".py"]
    files = find_files(input, suffixes)
    num_bytes = sum(map(size_of, files))
    with TemporaryDirectory() as place:
        documents, tokenizer = Path(place, "documents.jsonl"), Path(place, "tokenizer")
        with documents.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": entry.content}) + "\n" for entry in TextReader(files, on_error="skip"))
        tokenizer.mkdir()
        TrainTokenizer(input=[str(documents)], vocab_size=vocab_size, max_megabytes=20, output=str(tokenizer)).make(
            tokenizer
        )
        kinds = {
            "`prepare text`": partial(prepare, documents, tokenizer),
            "`encode_batch`": partial(in_fresh_process, partial(encode, documents, tokenizer, False)),
            "`encode_batch_fast`": partial(in_fresh_process, partial(encode, documents, tokenizer, True)),
        }
        rates: dict[str, list[float]] = {name: [] for name in kinds}
        for turn in range(repetitions):
            for name in sorted(kinds, reverse=turn % 2 == 0):
                rates[name].append(kinds[name]())
    prepared = rates["`prepare text`"]
    facts = [
        f"tokenizers {tokenizers.__version__}, byte-level BPE of {vocab_size:,} tokens",
        f"{len(files):,} files, {num_bytes / 1e6:.1f} MB; {repetitions} turns; {os.cpu_count()} cores, "
        f"load of the machine {os.getloadavg()[0]:.1f} at the end",
    ]
    body = [
        "| what | tokens/s, median | slowest and fastest | prepare text / this, turn by turn | middle half |",
        "| --- | --- | --- | --- | --- |",
        *(_row(name, rate, prepared) for name, rate in rates.items()),
    ]
    publish(page("preparation", "Preparing text and tokenizing it", "cpu", facts=facts, body=body), output)


def _row(name: str, rates: list[float], prepared: list[float]) -> str:
    low, median, high = statistics.quantiles([ours / rate for ours, rate in zip(prepared, rates, strict=True)], n=4)
    return (
        f"| {name} | {statistics.median(rates):,.0f} | {min(rates):,.0f} to {max(rates):,.0f} "
        f"| {median:.1%} | {low:.1%} to {high:.1%} |"
    )


def prepare(documents: Path, tokenizer: Path) -> float:
    """Tokens a second of the command, end-of-text tokens left out; its own start, not the workers', comes before."""
    with TemporaryDirectory() as place:
        output = Path(place, "dataset")
        words = ["--input", str(documents), "--tokenizer", str(tokenizer), "--output", str(output)]
        command = [sys.executable, "-m", "meap_lit", "prepare", "text", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        took = re.search(r"took +([0-9.]+) s", done.stdout)
        if done.returncode or took is None:
            raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")
        splits = Manifest.load(str(output)).splits.values()
        return sum(split.tokens - split.documents for split in splits) / float(took[1])


def encode(documents: Path, tokenizer: Path, fast: bool) -> float:
    """Tokens a second of the library alone, on texts in memory and with its own threads."""
    texts = [text for text in read_texts([documents]) if text.strip()]
    backend = Tokenizer.load(str(tokenizer)).copy_backend()
    backend.encode_special_tokens = True
    encode_batch = backend.encode_batch_fast if fast else backend.encode_batch
    num_tokens, seconds = 0, 0.0
    for batch in _batches(texts):
        start = time.perf_counter()
        encodings = encode_batch(batch, add_special_tokens=False)
        seconds += time.perf_counter() - start
        num_tokens += sum(map(len, encodings))
    return num_tokens / seconds


def _batches(texts: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


if __name__ == "__main__":
    main(benchmark)
