"""Train a byte-level BPE tokenizer, as a preparation step."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from meap_lit.data.prepare.step import Preparation
from meap_lit.data.read.find import find_input
from meap_lit.data.read.formats import InputFile
from meap_lit.data.read.readers import TextReader
from meap_lit.errors import UserError, check_range
from meap_lit.tokenizer.tokenizer import END_OF_TEXT, MASK_TOKEN, Tokenizer


@dataclass(kw_only=True)
class TrainTokenizer(Preparation):
    """Train a byte-level BPE tokenizer, for which no text is unknown.

    Args:
        output: Folder to make.
        input: Files, folders and glob patterns of text to train on, local or remote such as s3://bucket/folder (.txt,
            .md, .jsonl, .jsonl.gz, .jsonl.zst, .parquet).
        vocab_size: Number of tokens, the 256 bytes and the 2 special tokens included.
        text_field: Name of the text in .jsonl and .parquet files.
        suffixes: File name endings to take from folders, such as .py, which is read as plain text; the endings listed
            under `input` if not given.
        max_megabytes: Read no more text than this (in the order of the file names); all of it if not given.
        on_error: What to do at a line that cannot be read: stop, or skip it.
    """

    input: list[str]
    vocab_size: int
    text_field: str = "text"
    suffixes: list[str] | None = None
    max_megabytes: float | None = None
    on_error: Literal["stop", "skip"] = "stop"

    def source_files(self) -> Sequence[InputFile]:
        return find_input(self.input, self.suffixes).files

    def make(self, folder: Path) -> str:
        special = [END_OF_TEXT, MASK_TOKEN]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if self.vocab_size < len(alphabet) + len(special):
            raise UserError(
                f"vocab_size must be at least {len(alphabet) + len(special)} ({len(alphabet)} bytes and "
                f"{len(special)} special tokens), got {self.vocab_size}"
            )
        check_range("max_megabytes", self.max_megabytes, "(0, inf)")
        found = find_input(self.input, self.suffixes)
        reader = TextReader(found.files, self.text_field, self.on_error)
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=special,
            initial_alphabet=sorted(alphabet),
            min_frequency=2,
            show_progress=False,
        )
        texts = _Counted((str(entry.content) for entry in reader), self.max_megabytes)
        backend.train_from_iterator(texts, trainer)
        if texts.num_bytes == 0:
            skipped = f"{reader.num_skipped} lines unreadable{reader.why_skipped}"
            raise UserError(f"no text to train on in {', '.join(self.input)} ({skipped})")
        tokenizer = Tokenizer(backend, {"eos_token": END_OF_TEXT, "mask_token": MASK_TOKEN})
        tokenizer.save(folder)
        short = "" if tokenizer.vocab_size == self.vocab_size else f" ({self.vocab_size} requested: too little text)"
        line = (
            f"tokenizer {self.output}: {tokenizer.vocab_size} tokens{short} from {texts.num_documents} documents, "
            f"{texts.num_bytes / 1e6:.1f} MB, {reader.num_skipped} lines skipped"
        )
        return "\n".join([line, *found.lines_of_summary()])


class _Counted:
    """Texts up to a limit in bytes, counted as they pass."""

    def __init__(self, texts: Iterable[str], max_megabytes: float | None) -> None:
        self.texts = texts
        self.max_bytes = float("inf") if max_megabytes is None else max_megabytes * 1e6
        self.num_documents = self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            raw = text.encode()
            room = self.max_bytes - self.num_bytes
            if len(raw) > room:
                raw = raw[: int(room)]
                text = raw.decode(errors="ignore")  # the cut may go through a character
            if raw:
                self.num_documents += 1
                self.num_bytes += len(raw)
                yield text
            if len(raw) == room:
                return
