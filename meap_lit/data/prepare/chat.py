"""Files of conversations to a dataset of token ids for fine-tuning, which LitData streams.

A sample is one conversation as a chat template writes it, and where the assistant speaks in it. As in `text.py` many
processes encode and one writes, so the dataset is the same, byte for byte, whatever their number.
"""

import json
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from meap_lit.data.prepare.splits import ShardWriter, SplitWriter, draw
from meap_lit.data.prepare.step import Preparation, progress_bar
from meap_lit.data.prepare.workers import default_num_workers, map_in_order
from meap_lit.data.read.conversations import Conversation, to_conversation
from meap_lit.data.read.formats import RECORD_FORMATS
from meap_lit.data.read.readers import SKIP_HINT, InputShard, Record, RecordReader, check_text, find_input
from meap_lit.data.store.chunks import Split
from meap_lit.data.store.manifest import ChatDetails, Manifest, ShardDetails, Source
from meap_lit.data.store.writers import ChatWriter
from meap_lit.errors import UserError
from meap_lit.files import parse_bytes
from meap_lit.tokenizer.chat_template import ChatTemplate, EncodedChat
from meap_lit.tokenizer.tokenizer import Tokenizer

_BATCH_RECORDS = 256  # what a worker encodes at once: a tenth of a second for answers of a few sentences

LONG_ANSWER = 50  # by default answers of more tokens than this get a masked copy: `duplication.Duplication.min_copied`

Sample = tuple[np.ndarray, np.ndarray]
"""Token ids, [N], and answers, [A, 3] int32."""


@dataclass(kw_only=True)
class PrepareChat(Preparation):
    """Tokenise conversations into a dataset with a train and a validation split, for fine-tuning.

    Args:
        output: Folder to make.
        input: Files, folders and glob patterns (.json, an array of objects; .jsonl, .jsonl.gz, .jsonl.zst and .parquet,
            one conversation a line or row). Alpaca, ShareGPT, OpenAI and prompt with completion are recognised by
            their fields. `weight`, `train` or `training` of a turn say whether it is learnt.
        tokenizer: Folder with a tokenizer.json.
        template: Chat template: `tokenizer` for the tokenizer's own, alpaca, llama3, chatml or mistral, or a file that
            ends in .jinja.
        system: What the system says where a conversation does not say it.
        max_tokens: Longest sample; no limit if not given.
        on_long: What to do with a longer one: stop, drop it, or truncate it at the end.
        val_share: Share of conversations held out for validation, at least one, chosen by a hash of their text; in
            [0, 1). With 0 there is no validation split.
        on_error: What to do at a conversation that cannot be read: stop, or skip it and report how many were skipped.
        chunk_bytes: Size of a chunk file.
        shard: Part i of n to prepare, such as 3/8, i from 0 to n - 1 as SLURM_ARRAY_TASK_ID of `--array=0-7`; all parts
            together are made one dataset by `prepare merge`.
        num_workers: Processes that tokenise; one per core, fewer for a small input, if not given.
    """

    input: list[str]
    tokenizer: str
    template: str = "tokenizer"
    system: str | None = None
    max_tokens: int | None = None
    on_long: Literal["stop", "drop", "truncate"] = "stop"
    val_share: float = 0.01
    on_error: Literal["stop", "skip"] = "stop"
    chunk_bytes: str = "64MB"
    shard: str | None = None
    num_workers: int | None = field(default=None, compare=False)

    def make(self, folder: Path) -> str:
        started = time.perf_counter()
        chunk_bytes = self._check_options()
        tokenizer = Tokenizer.load(self.tokenizer)
        template = ChatTemplate.load(self.template, tokenizer)
        shard = None if self.shard is None else InputShard.parse(self.shard)
        found = find_input(self.input, formats=RECORD_FORMATS)
        reader = RecordReader(found.files, self.on_error, shard)
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
        writer = SplitWriter if shard is None else ShardWriter
        splits = writer(ChatWriter, folder, dtype, chunk_bytes, self.val_share)
        encoder = _Encoder(
            template,
            tokenizer.vocab_size,
            dtype,
            system=self.system,
            max_tokens=self.max_tokens,
            on_long=self.on_long,
            on_error=self.on_error,
        )
        encoded = map_in_order(encoder, _batches(reader), self.num_workers or default_num_workers(reader.num_bytes))
        counts = _Counts(tokenizer.unk_token_id)
        with closing(encoded), progress_bar(f"preparing {self.output}", reader.num_bytes) as bar:
            for batch in encoded:
                for sample, number in zip(batch.samples, batch.draws, strict=True):
                    splits.add(sample, number)
                counts.add(batch)
                bar.set_postfix_str(f"{counts.samples} conversations", refresh=False)
                bar.update(batch.bytes_read - bar.n)
        counts.skipped += reader.num_skipped
        counts.first_skipped = reader.first_skipped or counts.first_skipped
        if counts.samples == 0 and shard is None:
            raise UserError(
                f"no conversation to tokenise in {', '.join(self.input)} "
                f"({counts.dropped} too long for max_tokens, {counts.untrained} without a turn to learn, "
                f"{counts.skipped} unreadable{counts.why_skipped})"
            )
        sizes = splits.close()
        assert sum(split.documents for split in sizes.values()) == counts.samples, "samples were lost on the way"
        Manifest(
            kind="chat",
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            mask_token_id=tokenizer.mask_token_id,
            dtype=dtype.name,
            val_share=self.val_share,
            splits=sizes,
            sources=[Source(str(file), size) for file, size in zip(reader.files, reader.sizes, strict=True)],
            num_empty=0,
            num_skipped=counts.skipped,
            chat=ChatDetails(
                template=template.name,
                template_source=template.source,
                max_tokens=self.max_tokens,
                num_dropped=counts.dropped,
                num_truncated=counts.truncated,
                num_untrained=counts.untrained,
            ),
            shard=None if shard is None else ShardDetails(shard.index, shard.count, splits.reserve_draw),
        ).save(folder)
        return "\n".join([self._summary(sizes, counts, time.perf_counter() - started), *found.lines_of_summary()])

    def _check_options(self) -> int:
        """Size of a chunk in bytes."""
        if self.num_workers is not None and self.num_workers < 1:
            raise UserError(f"num_workers must be at least 1, got {self.num_workers}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.system is not None:
            check_text("system", self.system)
        return parse_bytes(self.chunk_bytes, "chunk_bytes")

    def _summary(self, sizes: dict[str, Split], counts: "_Counts", seconds: float) -> str:
        shard = "" if self.shard is None else f", shard {self.shard} for prepare merge"
        closing = "those that close them included"
        if counts.closed_answers == 0 < counts.answers:
            closing = "none closed by a special token: a model cannot learn from them where to stop"
        return "\n".join(
            [
                f"dataset {self.output}, template {self.template}{shard}",
                *(f"  {name:<9}{size.documents} conversations, {size.tokens} tokens" for name, size in sizes.items()),
                f"  in all   {counts.samples} conversations, {counts.tokens} tokens; "
                f"longest {counts.longest}, mean {counts.tokens / max(1, counts.samples):.1f}",
                f"  answers  {counts.answers}, {counts.long_answers} over {LONG_ANSWER} tokens; "
                f"{counts.answer_tokens} tokens, {closing}",
                *self._warnings(counts),
                f"  left out {counts.dropped} too long, {counts.untrained} without a turn to learn, "
                f"{counts.skipped} unreadable; {counts.truncated} truncated{counts.why_skipped}",
                f"  took     {seconds:.1f} s, {counts.samples / seconds:.0f} conversations/s",
            ]
        )

    def _warnings(self, counts: "_Counts") -> Iterator[str]:
        if counts.unknown:
            share = counts.unknown / max(1, counts.tokens)
            yield f"  unknown  {counts.unknown} tokens ({share:.2%}) of text outside the vocabulary"
        if counts.other_prompts:
            yield (
                f"  prompts  in {counts.other_prompts} conversations the first answer does not follow the tokens that "
                f"`generate --chat` sends: the tokenizer joins characters across its beginning, or splits them there"
            )


@dataclass(frozen=True)
class _Batch:
    records: list[Record]
    bytes_read: int
    """Bytes of the input files read up to here."""


@dataclass
class _EncodedBatch:
    bytes_read: int
    samples: list[Sample] = field(default_factory=list)
    draws: list[float] = field(default_factory=list)
    """A number in [0, 1) for each sample that depends on its text alone."""
    num_dropped: int = 0
    num_truncated: int = 0
    num_untrained: int = 0
    num_skipped: int = 0
    num_other_prompts: int = 0
    """Samples that do not begin as the prompt of their first answer."""
    first_skipped: str = ""
    """Why the first record was skipped."""


@dataclass
class _Counts:
    unk_token_id: int | None
    samples: int = 0
    tokens: int = 0
    longest: int = 0
    answers: int = 0
    answer_tokens: int = 0
    long_answers: int = 0
    closed_answers: int = 0
    dropped: int = 0
    truncated: int = 0
    untrained: int = 0
    skipped: int = 0
    unknown: int = 0
    other_prompts: int = 0
    first_skipped: str = ""

    @property
    def why_skipped(self) -> str:
        return f"; first unreadable: {self.first_skipped}" if self.skipped else ""

    def add(self, batch: _EncodedBatch) -> None:
        self.samples += len(batch.samples)
        for input_ids, answers in batch.samples:
            start, stop, end = answers.T
            self.tokens += len(input_ids)
            self.longest = max(self.longest, len(input_ids))
            self.unknown += int((input_ids == self.unk_token_id).sum())
            self.answers += len(answers)
            self.answer_tokens += int((end - start).sum())
            self.long_answers += int((stop - start > LONG_ANSWER).sum())
            self.closed_answers += int((end > stop).sum())
        self.dropped += batch.num_dropped
        self.truncated += batch.num_truncated
        self.untrained += batch.num_untrained
        self.other_prompts += batch.num_other_prompts
        self.skipped += batch.num_skipped
        self.first_skipped = self.first_skipped or batch.first_skipped


class _Encoder:
    """Encodes a batch; sent to every worker."""

    def __init__(
        self,
        template: ChatTemplate,
        vocab_size: int,
        dtype: np.dtype,
        *,
        system: str | None,
        max_tokens: int | None,
        on_long: str,
        on_error: str,
    ) -> None:
        self.template = template
        self.vocab_size = vocab_size
        self.dtype = dtype
        self.system = system
        self.max_tokens = max_tokens
        self.on_long = on_long
        self.on_error = on_error

    def __call__(self, batch: _Batch) -> _EncodedBatch:
        result = _EncodedBatch(batch.bytes_read)
        for record in batch.records:
            try:
                conversation = to_conversation(record.fields, self.system)
                if not any(conversation.trained):
                    result.num_untrained += 1
                    continue
                chat = self.template.encode(conversation.messages, conversation.tools, conversation.trained)
            except UserError as error:
                if self.on_error == "stop":
                    raise UserError(f"{record.where}: {error}; {SKIP_HINT}") from error
                result.num_skipped += 1
                result.first_skipped = result.first_skipped or f"{record.where}: {error}"
                continue
            if self.max_tokens is not None and len(chat.input_ids) > self.max_tokens:
                shorter = self._shorten(chat, record.where)
                if shorter is None:
                    result.num_dropped += 1
                    continue
                result.num_truncated += 1
                chat = shorter
            tokens = np.array(chat.input_ids)
            assert tokens.max() < self.vocab_size, "the tokenizer gave an id outside its vocabulary"
            result.samples.append((tokens.astype(self.dtype), np.array(chat.answers, dtype=np.int32)))
            result.draws.append(draw(json.dumps(conversation.messages).encode()))
            result.num_other_prompts += not self._follows_prompt(conversation, chat)
        return result

    def _follows_prompt(self, conversation: Conversation, chat: EncodedChat) -> bool:
        """Return whether the tokens begin with those of the prompt for the first answer that is learnt."""
        messages = conversation.messages[: conversation.trained.index(True)]
        try:
            prompt = self.template.encode_prompt(messages, conversation.tools)
        except UserError:  # the template takes no conversation that waits for an answer
            return False
        return chat.input_ids[: len(prompt)] == prompt

    def _shorten(self, chat: EncodedChat, where: str) -> EncodedChat | None:
        """A conversation that is too long cut to `max_tokens`, or None if it is to be left out."""
        assert self.max_tokens is not None
        if self.on_long == "stop":
            raise UserError(
                f"{where}: {len(chat.input_ids)} tokens, max_tokens is {self.max_tokens}; raise it, or use "
                f"--on_long drop or --on_long truncate"
            )
        limit = self.max_tokens
        answers = [(start, min(stop, limit), min(end, limit)) for start, stop, end in chat.answers if start < limit]
        if self.on_long == "drop" or not answers:
            return None
        return EncodedChat(chat.input_ids[:limit], answers)


def _batches(reader: RecordReader) -> Iterator[_Batch]:
    records: list[Record] = []
    for record in reader:
        records.append(record)
        if len(records) == _BATCH_RECORDS:
            yield _Batch(records, reader.bytes_read)
            records = []
    yield _Batch(records, reader.bytes_read)
