"""Files of conversations to a dataset for fine-tuning.

A sample is one conversation as a chat template writes it, and the positions at which the assistant speaks in it.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from meap_lit.data.prepare.dataset import EncodedBatch, Encoder, PrepareDataset
from meap_lit.data.read.conversations import Conversation, to_conversation
from meap_lit.data.read.find import Input, find_input
from meap_lit.data.read.formats import RECORD_FORMATS, Entry, InputFile
from meap_lit.data.read.readers import InputPart, RecordReader, check_text
from meap_lit.data.store.manifest import ChatDetails
from meap_lit.data.store.writers import ChatWriter
from meap_lit.errors import UserError, check_range
from meap_lit.tokenizer.chat_template import ChatTemplate, EncodedChat
from meap_lit.tokenizer.tokenizer import Tokenizer


@dataclass(kw_only=True)
class PrepareChat(PrepareDataset):
    """Tokenize conversations into a dataset with a train and a val split, for fine-tuning.

    Args:
        output: Folder to make.
        input: Files, folders and glob patterns, local or remote such as s3://bucket/folder (.json, an array of objects;
            .jsonl, .jsonl.gz, .jsonl.zst and .parquet, one conversation a line or row). Alpaca, ShareGPT, OpenAI and
            prompt with completion are recognized by their fields. `weight`, `train` or `training` of a turn say whether
            it is learned.
        template: Chat template: `tokenizer` for the tokenizer's own, alpaca, llama3, chatml or mistral, or a file that
            ends in .jinja.
        system: System message of the conversations that have none.
        max_tokens: Longest sample; no limit if not given.
        on_long: What to do with a longer one: stop, drop it, or truncate it at the end.
    """

    kind = "chat"
    unit = "conversations"
    writer = ChatWriter

    template: str = "tokenizer"
    system: str | None = None
    max_tokens: int | None = None
    on_long: Literal["stop", "drop", "truncate"] = "stop"

    def source_files(self) -> Sequence[InputFile]:
        return [*super().source_files(), *([Path(self.template)] if self.template.endswith(".jinja") else [])]

    def new_encoder(self, tokenizer: Tokenizer) -> "ChatEncoder":
        check_range("max_tokens", self.max_tokens, "[1, inf)")
        if self.system is not None:
            check_text("system", self.system)
        from meap_lit.masking.duplication import Duplication  # imports torch, which no worker needs

        return ChatEncoder(ChatTemplate.load(self.template, tokenizer), tokenizer, self, Duplication.min_copied)

    def find(self) -> Input:
        return find_input(self.input, formats=RECORD_FORMATS)

    def reader(self, files: Sequence[InputFile], part: InputPart | None) -> RecordReader:
        return RecordReader(files, self.on_error, part)

    def chat_details(self, encoder: Any, counts: Counter[str]) -> ChatDetails:
        return ChatDetails(
            template=encoder.template.name,
            template_source=encoder.template.source,
            max_tokens=self.max_tokens,
            num_dropped=counts["dropped"],
            num_truncated=counts["truncated"],
            num_untrained=counts["untrained"],
        )

    def left_out(self, counts: Counter[str]) -> str:
        return f"{counts['dropped']} too long for max_tokens, {counts['untrained']} without a turn to learn"

    def summarize(self, splits: Sequence[Any], counts: Counter[str], encoder: Any) -> Iterator[str]:
        yield f"  template {self.template}"
        mean = sum(split.tokens for split in splits) / max(1, counts["samples"])
        longest = max((split.longest for split in splits), default=0)
        yield f"  length   longest {longest}, mean {mean:.1f} tokens; {counts['truncated']} truncated"
        num_answers = sum(split.answers for split in splits)
        answer_tokens = sum(split.answer_tokens for split in splits)
        closing = "those that close them included"
        if counts["closed_answers"] == 0 < num_answers:
            closing = "none closed by a special token: a model cannot learn from them where to stop"
        long = f"{counts['long_answers']} over {encoder.long_answer} tokens"
        yield f"  answers  {num_answers}, {long}; {answer_tokens} tokens, {closing}"
        if counts["other_prompts"]:
            yield (
                f"  prompts  in {counts['other_prompts']} conversations the first answer does not follow the tokens "
                f"that `generate --chat` sends: the tokenizer joins characters across its beginning, or splits them"
            )


class ChatEncoder(Encoder):
    """Encodes records as conversations, and counts answers of more than `long_answer` tokens."""

    batch_size = 256  # records

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, options: PrepareChat, long_answer: int) -> None:
        super().__init__(tokenizer, options.on_error)
        self.template = template
        self.options = options
        self.long_answer = long_answer

    def encode(self, entries: list[Entry], batch: EncodedBatch) -> None:
        for record in entries:
            assert isinstance(record.content, dict), "a plain text is not a record"
            try:
                conversation = to_conversation(record.content, self.options.system)
                if not any(conversation.trained):
                    batch.counts["untrained"] += 1
                    continue
                chat = self.template.encode(conversation.messages, conversation.tools, conversation.trained)
            except UserError as error:
                self.skip(record.where, error, batch)
                continue
            limit = self.options.max_tokens
            if limit is not None and len(chat.input_ids) > limit:
                shorter = self._shorten(chat, limit, record.where)
                batch.counts["dropped" if shorter is None else "truncated"] += 1
                if shorter is None:
                    continue
                chat = shorter
            answers = np.array(chat.answers, dtype=np.int32)
            batch.add((self.to_array(chat.input_ids), answers), json.dumps(conversation.messages).encode())
            start, stop, end = answers.T
            batch.counts["long_answers"] += int((stop - start > self.long_answer).sum())
            batch.counts["closed_answers"] += int((end > stop).sum())
            batch.counts["other_prompts"] += not self._follows_prompt(conversation, chat)
            if self.tokenizer.unk_token_id is not None:
                batch.counts["unknown"] += chat.input_ids.count(self.tokenizer.unk_token_id)

    def _follows_prompt(self, conversation: Conversation, chat: EncodedChat) -> bool:
        """Return whether the tokens begin with those of the prompt for the first answer that is learned."""
        messages = conversation.messages[: conversation.trained.index(True)]
        try:
            prompt = self.template.encode_prompt(messages, conversation.tools)
        except UserError:  # the template takes no conversation that waits for an answer
            return False
        return chat.input_ids[: len(prompt)] == prompt

    def _shorten(self, chat: EncodedChat, limit: int, where: str) -> EncodedChat | None:
        """Return a conversation that is too long cut to `limit` tokens, or None if it is to be left out."""
        if self.options.on_long == "stop":
            raise UserError(
                f"{where}: {len(chat.input_ids)} tokens, max_tokens is {limit}; raise it, or use "
                f"--on_long drop or --on_long truncate"
            )
        answers = [(start, min(stop, limit), min(end, limit)) for start, stop, end in chat.answers if start < limit]
        if self.options.on_long == "drop" or not answers:
            return None
        return EncodedChat(chat.input_ids[:limit], answers)
