"""Files to a dataset of token ids, split into train and val, which LitData streams.

Several processes encode and one writes, so the dataset is the same, byte for byte, whatever their number. What a
sample is, documents of text or conversations, is up to an `Encoder`.
"""

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from meap_lit.data.prepare.splits import SplitWriter, draw
from meap_lit.data.prepare.step import Preparation, progress_bar
from meap_lit.data.prepare.workers import default_num_workers, map_in_order
from meap_lit.data.read.find import Input, size_of
from meap_lit.data.read.formats import Entry, InputFile
from meap_lit.data.read.readers import SKIP_HINT, InputPart, Reader
from meap_lit.data.store.chunks import Split
from meap_lit.data.store.manifest import ChatDetails, Kind, Manifest, PartDetails, Source, fingerprint_for
from meap_lit.data.store.writers import ChunkWriter
from meap_lit.errors import UserError, check_range
from meap_lit.files import parse_bytes
from meap_lit.secrets import without_secrets
from meap_lit.tokenizer.tokenizer import Tokenizer


@dataclass
class EncodedBatch:
    """The samples of a batch, and numbers for the summary and the manifest."""

    bytes_read: int
    """Bytes of the input files read so far."""
    samples: list[tuple[Any, float]] = field(default_factory=list)
    """Each as the writer's `add` takes it, with a number in [0, 1) that depends on its text alone."""
    counts: Counter[str] = field(default_factory=Counter)
    first_skipped: str = ""
    """Why the first entry was skipped."""

    def add(self, sample: Any, text: bytes) -> None:
        """Append a sample, to be split by its text."""
        self.samples.append((sample, draw(text)))
        self.counts["text_bytes"] += len(text)


class Encoder(ABC):
    """Encodes batches of entries. It is pickled and sent to every worker."""

    batch_size: ClassVar[int]
    """Sum of the sizes of a batch's entries; a worker should take about a tenth of a second for it."""

    def __init__(self, tokenizer: Tokenizer, on_error: Literal["stop", "skip"]) -> None:
        self.tokenizer = tokenizer
        self.on_error = on_error

    @abstractmethod
    def encode(self, entries: list[Entry], batch: EncodedBatch) -> None:
        """Encode entries into `batch`; raise `UserError` if one cannot be encoded and is not to be skipped."""

    def skip(self, where: str, error: UserError, batch: EncodedBatch) -> None:
        """Count an entry that cannot be encoded, unless the first one is to stop the command, and name it."""
        if self.on_error == "stop":
            raise UserError(f"{where}: {error}; {SKIP_HINT}") from error
        batch.counts["skipped"] += 1
        batch.first_skipped = batch.first_skipped or f"{where}: {error}"

    def size(self, entry: Entry) -> int:
        """Return the size of an entry, in the unit of `batch_size`."""
        return 1

    def __call__(self, batch: tuple[list[Entry], int]) -> EncodedBatch:
        entries, bytes_read = batch
        encoded = EncodedBatch(bytes_read)
        self.encode(entries, encoded)
        return encoded

    def batches(self, reader: Reader) -> Iterator[tuple[list[Entry], int]]:
        """Yield batches of entries, each with the bytes of the input files read so far."""
        entries: list[Entry] = []
        size = 0
        for entry in reader:
            entries.append(entry)
            size += self.size(entry)
            if size >= self.batch_size:
                yield entries, reader.bytes_read
                entries, size = [], 0
        yield entries, reader.bytes_read

    @property
    def dtype(self) -> np.dtype:
        """Type of the stored tokens."""
        return np.dtype(np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.int32)

    def to_array(self, ids: Sequence[int]) -> np.ndarray:
        """Return ids as an array, [N], of `dtype`."""
        tokens = np.array(ids, dtype=np.int64)
        assert tokens.max(initial=0) < self.tokenizer.vocab_size, "the tokenizer gave an id outside its vocabulary"
        return tokens.astype(self.dtype)


@dataclass(kw_only=True)
class PrepareDataset(Preparation, ABC):
    """Tokenize files into a dataset with a train and a val split.

    Args:
        input: Files, folders and glob patterns, local or remote such as s3://bucket/folder.
        tokenizer: Folder with a tokenizer.json, or a Hub id (ORG/NAME or ORG/NAME@REVISION).
        val_share: Share of the documents or conversations held out for validation, at least one, chosen by a hash of
            their text; in [0, 1). 0 makes only the train split.
        on_error: What to do at a line or record that cannot be read: stop, or skip it and report how many were skipped.
        chunk_bytes: Size of a chunk file.
        shard: Part i of n of the input to prepare, such as 3/8, i from 0 to n - 1 as SLURM_ARRAY_TASK_ID of
            `--array=0-7`; `prepare merge` makes one dataset of all parts.
        num_workers: Processes that tokenize; one per core, fewer for a small input, if not given.
    """

    kind: ClassVar[Kind]
    unit: ClassVar[str]
    """Name of the samples in messages."""
    writer: ClassVar[type[ChunkWriter]]

    input: list[str]
    tokenizer: str
    val_share: float = 0.01
    on_error: Literal["stop", "skip"] = "stop"
    chunk_bytes: str = "64MB"
    shard: str | None = None
    num_workers: int | None = field(default=None, compare=False)

    @abstractmethod
    def new_encoder(self, tokenizer: Tokenizer) -> Encoder:
        """Return the encoder that all workers use."""

    @abstractmethod
    def find(self) -> Input:
        """Return the files that the options name."""

    @abstractmethod
    def reader(self, files: Sequence[InputFile], part: InputPart | None) -> Reader:
        """Return the reader of what the encoder encodes."""

    @abstractmethod
    def left_out(self, counts: Counter[str]) -> str:
        """Return in words how many samples were left out, apart from those that cannot be read."""

    @abstractmethod
    def summarize(self, splits: Sequence[Any], counts: Counter[str], encoder: Any) -> Iterator[str]:
        """Yield lines about the samples."""

    def chat_details(self, encoder: Any, counts: Counter[str]) -> ChatDetails | None:
        return None

    def source_files(self) -> Sequence[InputFile]:
        return self.find().files

    def files_read(self, files: Sequence[InputFile]) -> Sequence[InputFile]:
        if self.shard is None:
            return files
        found = self.find().files
        spans = InputPart.parse(self.shard).spans(found, [size_of(file) for file in found])
        unread = {str(file) for file in found} - {str(file) for file, _ in spans}
        return [file for file in files if str(file) not in unread]  # each part reads a template too

    def make(self, folder: Path) -> str:
        started = time.perf_counter()
        check_range("num_workers", self.num_workers, "[1, inf)")
        chunk_bytes = parse_bytes(self.chunk_bytes, "chunk_bytes")
        check_range("chunk_bytes", chunk_bytes, "[1, 4000000000]", "; LitData counts the bytes of a chunk in 32 bits")
        encoder = self.new_encoder(Tokenizer.load(self.tokenizer))
        part = None if self.shard is None else InputPart.parse(self.shard)
        found = self.find()
        reader = self.reader(found.files, part)
        writers = SplitWriter(lambda name: self.writer(folder / name, encoder.dtype, chunk_bytes), self.val_share)
        counts = self._write(writers, encoder, reader)
        left_out = f"{self.left_out(counts)}, {counts['skipped']} unreadable{reader.why_skipped}"
        if counts["samples"] == 0 and part is None:
            raise UserError(f"no {self.unit} to tokenize in {', '.join(self.input)} ({left_out})")
        splits = writers.close() if part is None else writers.close_part()
        assert sum(split.documents for split in splits.values()) == counts["samples"], "samples were lost on the way"
        details = None if part is None else PartDetails(part.index, part.count, writers.reserve_draw)
        self._manifest(encoder, reader, counts, splits, details).save(folder)
        seconds, megabytes = time.perf_counter() - started, counts["text_bytes"] / 1e6
        lines = [
            *self._contents(encoder, counts, splits),
            f"  left out {left_out}",
            *found.lines_of_summary(),
            f"  took     {seconds:.1f} s for {megabytes:.1f} MB of text, {megabytes / seconds:.2f} MB/s",
        ]
        if counts["unknown"]:
            share = counts["unknown"] / sum(split.tokens for split in splits.values())
            lines.append(f"  unknown  {counts['unknown']} tokens ({share:.2%}) of text outside the vocabulary")
        return "\n".join(lines)

    def _manifest(
        self,
        encoder: Encoder,
        reader: Reader,
        counts: Counter[str],
        splits: Mapping[str, Split],
        part: PartDetails | None,
    ) -> Manifest:
        tokenizer = encoder.tokenizer
        return Manifest(
            kind=self.kind,
            tokenizer_fingerprint=fingerprint_for(self.kind, tokenizer),
            vocab_size=tokenizer.vocab_size,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            mask_token_id=tokenizer.mask_token_id,
            dtype=encoder.dtype.name,
            val_share=self.val_share,
            splits=splits,
            sources=[
                Source(without_secrets(str(file)), size) for file, size in zip(reader.files, reader.sizes, strict=True)
            ],
            num_empty=counts["empty"],
            num_skipped=counts["skipped"],
            chat=self.chat_details(encoder, counts),
            part=part,
        )

    def _contents(self, encoder: Encoder, counts: Counter[str], splits: Mapping[str, Split]) -> Iterator[str]:
        """Yield the lines of the summary about what the dataset holds."""
        num_tokens = sum(split.tokens for split in splits.values())
        yield f"dataset {self.output}" + ("" if self.shard is None else f", part {self.shard} for prepare merge")
        for name, split in splits.items():
            yield f"  {name:<9}{split.documents} {self.unit}, {split.tokens} tokens"
        yield f"  in all   {counts['samples']} {self.unit}, {num_tokens} tokens, special tokens included"
        yield from self.summarize(list(splits.values()), counts, encoder)

    def _write(self, writers: SplitWriter, encoder: Encoder, reader: Reader) -> Counter[str]:
        """Encode what the reader reads, in parallel, write it in order, and return the sums of the batches' counts."""
        num_workers = self.num_workers or default_num_workers(reader.num_bytes)
        encoded = map_in_order(encoder, encoder.batches(reader), num_workers)
        counts: Counter[str] = Counter()
        with closing(encoded), progress_bar(f"preparing {self.output}", reader.num_bytes) as bar:
            for batch in encoded:
                for sample, number in batch.samples:
                    writers.add(sample, number)
                counts.update(batch.counts, samples=len(batch.samples))
                reader.first_skipped = reader.first_skipped or batch.first_skipped
                bar.set_postfix_str(f"{counts['samples']} {self.unit}", refresh=False)
                bar.update(batch.bytes_read - bar.n)
        counts["skipped"] += reader.num_skipped
        return counts
