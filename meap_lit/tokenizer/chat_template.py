"""Conversations to token ids by a Jinja chat template, and which of the ids the assistant says.

A template is the tokenizer's own, a file, or one of `builtin_templates.py`. What is to be learned follows from the
template's structure: from `{% generation %}` blocks where it has them, else from where each turn of the assistant
begins and ends in the text, be it an answer, a call of a tool or reasoning. Markers
in the text play no role, and a special token spelled out in a message is encoded as ordinary characters.

The environment is the one that transformers gives a template (`apply_chat_template` in transformers 5), so that both
write the same text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes

from meap_lit.errors import UserError, in_one_line
from meap_lit.files import read_text
from meap_lit.tokenizer.builtin_templates import BOS, NAMED
from meap_lit.tokenizer.hidden_chat import REASONING, HiddenChat, Message, with_mark, with_parsed_arguments
from meap_lit.tokenizer.template_environment import GENERATION, MARKS, template_environment
from meap_lit.tokenizer.template_text import TemplateEncoder, to_tokens
from meap_lit.tokenizer.tokenizer import Tokenizer

_CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "
"""Mark at the end of a message that is to be continued; a template that trims messages removes its space."""


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as ids, and its answers in order: one for every turn of the assistant that is to be learned,
    unless the template marks several parts of a turn or none."""

    input_ids: list[int]
    answers: list[tuple[int, int, int]]
    """Start, stop and end of each, as in `duplication.Answer`, which would bring torch into all that prepares data."""


class ChatTemplate:
    """A chat template, Jinja source with a name for messages, and the tokenizer it writes for.

    `today` is what `strftime_now` in a template says; the time of construction if not given.
    """

    def __init__(self, name: str, source: str, tokenizer: Tokenizer, today: datetime | None = None) -> None:
        self.name = name
        self.source = source
        self._tokenizer = tokenizer
        self._today = today or datetime.now()
        self._encoder = TemplateEncoder(tokenizer)
        environment = template_environment(self._today)
        try:
            self._template = environment.from_string(source)
            parsed = environment.parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"chat template {name}, line {error.lineno}: {error.message}") from error
        except (RecursionError, SyntaxError, MemoryError, OverflowError) as error:  # of the Python that it becomes
            raise UserError(f"chat template {name} is nested too deeply: {error}") from error
        calls = parsed.find_all(nodes.ExtensionAttribute)
        self._marks_answers = any(call.name == GENERATION for call in calls)
        self._mentioned = {node.name for node in parsed.find_all(nodes.Name)}
        self._mentioned |= {node.attr for node in parsed.find_all(nodes.Getattr)}
        self._mentioned |= {node.value for node in parsed.find_all(nodes.Const) if isinstance(node.value, str)}

    @classmethod
    def load(cls, name: str, tokenizer: Tokenizer, today: datetime | None = None) -> "ChatTemplate":
        """Load the tokenizer's own template (`tokenizer`), one of `NAMED`, or a file (`my_format.jinja`)."""
        if name.endswith(".jinja"):
            return cls(name, read_text(Path(name)), tokenizer, today)
        if name == "tokenizer":
            source = _default_template(tokenizer)
            if source is None:
                raise UserError(
                    f"tokenizer {tokenizer.path} has no chat_template; name a template (--template): {', '.join(NAMED)}"
                )
            return cls(name, source, tokenizer, today)
        if name not in NAMED:
            known = f"tokenizer (its own chat_template), {', '.join(NAMED)}, or a file that ends in .jinja"
            raise UserError(f"unknown template {name!r}; choose from {known}")
        written = dict.fromkeys(re.findall(r"<\|\w+\|>", NAMED[name]))
        bos = tokenizer.special_tokens.get("bos_token")
        # a tokenizer that names <|im_start|> as BOS has it in front of every message of ChatML
        begins = tokenizer.bos_token_id in tokenizer.before_text and bos not in written
        template = cls(name, BOS * begins + NAMED[name], tokenizer, today)
        missing = [token for token in written if token not in template._encoder.special_tokens]
        if missing:
            raise UserError(
                f"template {name} writes {', '.join(missing)}, which tokenizer {tokenizer.path} does not have as "
                f"special tokens; name alpaca or mistral, which need none"
            )
        return template

    def __reduce__(self) -> tuple[Any, ...]:
        # compiled templates cannot be pickled; the date is kept so that all workers write the same
        return ChatTemplate, (self.name, self.source, self._tokenizer, self._today)

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids at which a generated answer ends: the first of those that close an answer. Empty if none does."""
        question: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        chat = self.encode(question)
        return tuple(sorted({chat.input_ids[stop] for _, stop, end in chat.answers if stop < end}))

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        trained: Sequence[bool] | None = None,
    ) -> EncodedChat:
        """Encode a whole conversation, and find the answers in it; arguments as in `Conversation`.

        Raises:
            UserError: If the template raises, does not write what the conversation holds, marks nothing that the
                assistant says, does not render turn by turn or begins with an answer.
        """
        chat = self._hidden(messages, tools)
        self._check_written(chat)
        if trained is None:
            trained = [message["role"] == "assistant" for message in messages]
        text, blocks = self._render(chat)
        answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        if self._marks_answers:
            spans = blocks if all(trained[turn] for turn in answers) else self._trained_blocks(chat, blocks, trained)
        else:
            spans = [
                (self._end_of(text, chat, turn - 1, with_header=True), self._end_of(text, chat, turn))
                for turn in answers
                if trained[turn]
            ]
        tokens = self._encoder.encode(text, chat.spellings)
        encoded: list[tuple[int, int, int]] = []
        for span in spans:
            after = encoded[-1][2] if encoded else 0
            if answer := to_tokens(span, tokens, text, after):
                encoded.append(answer)
        if not any(start < stop for start, stop, _ in encoded):
            raise UserError(f"chat template {self.name} marks nothing that the assistant says in this conversation")
        if encoded[0][0] == 0:
            raise UserError(
                f"chat template {self.name} begins with the answer, whose first token nothing predicts; it must write "
                f"something before it, such as the bos_token"
            )
        return EncodedChat(tokens.ids, encoded)

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> list[int]:
        """Return the ids up to where the assistant is to speak next; raises as `encode` does."""
        chat = self._hidden(messages, tools)
        self._check_written(chat)
        text, _ = self._render(chat, add_generation_prompt=True)
        return self._encoder.encode(text, chat.spellings).ids

    def _hidden(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> "HiddenChat":
        if any(message.get("tool_calls") for message in messages) and not self._takes_json_text:
            messages = [with_parsed_arguments(message) for message in messages]
        return HiddenChat(messages, tools, self._encoder.special_token)

    @cached_property
    def _takes_json_text(self) -> bool:
        """Whether the template writes the arguments of a call that are JSON in a string, as OpenAI has them, unchanged.

        That of Qwen3 does. Others quote the string once more or refuse it, and need the object.
        """
        arguments = '{"a":  "b"}'  # with a space that no JSON writer makes
        call = {"id": "000000000", "type": "function", "function": {"name": "c", "arguments": arguments}}
        messages: list[Message] = [
            {"role": "user", "content": "d"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        try:
            text, _ = self._render(HiddenChat(messages, None, self._encoder.special_token))
        except UserError:
            return False
        return arguments in text

    def _check_written(self, chat: "HiddenChat") -> None:
        """Make sure that the template writes the system message, tools, their calls and results, and reasoning.

        transformers leaves out without a word what a template does not know.
        """
        missing = []
        if chat.tools and "tools" not in self._mentioned:
            missing.append("tools")
        for key, names in (("tool_calls", ("tool_calls",)), ("reasoning_content", REASONING)):
            if any(message.get(key) for message in chat.messages) and self._mentioned.isdisjoint(names):
                missing.append(key)
        for role in ("system", "tool"):
            turns = [turn for turn, message in enumerate(chat.messages) if message["role"] == role]
            if turns and not missing:
                marked, _ = self._render(chat, marks=dict.fromkeys(turns, chat.place))
                if marked.count(chat.place) < len(turns):
                    missing.append(f"messages of the role {role}")
        if missing:
            raise UserError(
                f"chat template {self.name} does not write {' or '.join(missing)}, which this conversation has; name "
                f"a template that does (chatml, llama3, the tokenizer's own or a .jinja file), or take them out of the "
                f"data"
            )

    def render_prompt(self, messages: Sequence[Message], *, continue_last: bool = False) -> str:
        """Return the text of a prompt as transformers' `apply_chat_template` writes it, for others to encode.

        It ends where the assistant is to speak next or, with `continue_last`, with the last message, the beginning of
        the answer.
        """
        if continue_last:
            messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + _CONTINUED}]
        chat = HiddenChat(messages, None, self._encoder.special_token)
        text, _ = self._render(chat, add_generation_prompt=not continue_last)
        if continue_last:
            text, tag, rest = text.rpartition(_CONTINUED.rstrip())
            if not tag:
                raise UserError(f"chat template {self.name} leaves out the last message, which is to be continued")
            if not rest.startswith(" "):  # the template trims what is said
                text = text.rstrip()
        return "".join(chat.spellings.get(character, character) for character in text)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens are special, such as one of `render_prompt`."""
        return self._encoder.encode(text, {}).ids

    def _render(
        self,
        chat: "HiddenChat",
        stop: int | None = None,
        *,
        add_generation_prompt: bool = False,
        marks: Mapping[int, str] | None = None,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of the messages before `stop`, and its spans in `{% generation %}` blocks.

        `marks` are characters to append to what the messages of these numbers say.
        """
        messages = chat.messages[:stop]
        if marks is not None:
            messages = [
                with_mark(message, marks[turn]) if turn in marks else message for turn, message in enumerate(messages)
            ]
        try:
            text = self._template.render(
                **self._tokenizer.special_tokens,
                messages=messages,
                tools=chat.tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{MARKS: chat.marks},
            )
            return chat.cut_marks(text)
        except Exception as error:  # a template is a program of the user's: whatever it raises is for the user to mend
            raise UserError(
                f"chat template {self.name} does not take this conversation: {in_one_line(error)}"
            ) from error

    def _end_of(self, text: str, chat: "HiddenChat", turn: int, with_header: bool = False) -> int:
        """Return where message `turn` ends in `text`, that of the whole conversation, or the header that follows it.

        The conversation up to there is rendered alone, and usually the whole begins with it. Some templates write a
        turn in another way once others follow (Qwen3 drops its reasoning) but close it in the same way. There the end
        is found by a character that is appended to the message, in the part and in the whole.
        """
        until, _ = self._render(chat, turn + 1, add_generation_prompt=with_header)
        if text.startswith(until):
            return len(until)
        marks = {turn: chat.place}
        part, _ = self._render(chat, turn + 1, add_generation_prompt=with_header, marks=marks)
        whole, _ = self._render(chat, marks=marks)
        (_, found, closing), (_, found_in_whole, rest) = part.rpartition(chat.place), whole.rpartition(chat.place)
        if not (found and found_in_whole and rest.startswith(closing) and text.endswith(rest)):
            raise UserError(
                f"chat template {self.name} does not render turn by turn, so its answers cannot be told from the rest; "
                f"wrap what the assistant says in {{% generation %}} ... {{% endgeneration %}}, or name another "
                f"template: {', '.join(NAMED)}"
            )
        return len(text) - len(rest) + len(closing)

    def _trained_blocks(
        self, chat: "HiddenChat", blocks: Sequence[tuple[int, int]], trained: Sequence[bool]
    ) -> list[tuple[int, int]]:
        """Return the `{% generation %}` blocks of the turns that are to be learned.

        Two characters, one appended to what these turns say and one to the others, tell them apart.
        """
        kept, left_out = chat.marks_of_turns
        marks = {
            turn: kept if trained[turn] else left_out
            for turn, message in enumerate(chat.messages)
            if message["role"] == "assistant"
        }
        text, marked = self._render(chat, marks=marks)
        said = [text[slice(*block)] for block in marked]
        if len(said) != len(blocks) or any((kept in block) == (left_out in block) for block in said):
            raise UserError(
                f"chat template {self.name} does not show which of its {{% generation %}} blocks are of the turns that "
                f"are not learned; put all that the assistant says in a turn into one block"
            )
        return [block for block, inside in zip(blocks, said, strict=True) if kept in inside]


def _default_template(tokenizer: Tokenizer) -> str | None:
    """Return the tokenizer's template; tokenizer_config.json may hold a list of named ones."""
    template = given = tokenizer.chat_template
    if isinstance(given, list) and all(isinstance(entry, dict) and "name" in entry for entry in given):
        template = next((entry.get("template") for entry in given if entry["name"] == "default"), None)
    if template is not None and not isinstance(template, str):
        raise UserError(
            f"tokenizer {tokenizer.path}: chat_template in tokenizer_config.json must be text, or a list of named ones "
            f'such as [{{"name": "default", "template": "..."}}], got {json.dumps(given):.60}'
        )
    return template
