"""Conversations to token ids by a Jinja chat template, and which of the ids the assistant says.

A template is the tokenizer's own, a file, or one of `named_templates.py`. What is to be learnt follows from the
template's structure: from `{% generation %}` blocks where it has them, else from where each turn of the assistant
begins and ends in the text, be it an answer, a call of a tool or reasoning. Nobody looks for markers in the text, and a
special token spelled out in a message stays the characters it is made of.

The environment is the one that transformers gives a template (`apply_chat_template` in transformers 5), so that both
write the same text.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import tokenizers
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from meap_lit.errors import UserError
from meap_lit.files import read_text
from meap_lit.tokenizer.bounded_jinja import BoundedEnvironment
from meap_lit.tokenizer.builtin_templates import BOS, NAMED
from meap_lit.tokenizer.tokenizer import Tokenizer

Message = dict[str, Any]
"""What a chat template is given: `role` (system, user, assistant or tool) and `content`; a user message of Alpaca also
has `instruction` and `input`, one of the assistant may have `tool_calls` and `reasoning_content`."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names under which a message may hold its reasoning, the one that templates should read first."""


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as ids, and its answers in order: one for every turn of the assistant that is to be learnt, unless
    the template marks several parts of a turn or none."""

    input_ids: list[int]
    answers: list[tuple[int, int, int]]
    """Start, stop and end of each, as in `duplication.Answer`, which would bring torch into all that prepares data."""


class ChatTemplate:
    """A chat template and the tokenizer it writes for.

    Args:
        name: Name for messages.
        source: Jinja source.
        tokenizer: Tokenizer whose ids are wanted.
        today: What `strftime_now` in a template says; the time of construction if not given.

    Raises:
        UserError: If the source is not valid Jinja.
    """

    def __init__(self, name: str, source: str, tokenizer: Tokenizer, today: datetime | None = None) -> None:
        self.name = name
        self.source = source
        self._tokenizer = tokenizer
        self._today = today or datetime.now()
        self._text_encoder = _TextEncoder(tokenizer)
        environment = _environment(self._today)
        try:
            self._template = environment.from_string(source)
            parsed = environment.parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"chat template {name}, line {error.lineno}: {error.message}") from error
        except (RecursionError, SyntaxError, MemoryError, OverflowError) as error:  # of the Python that it becomes
            raise UserError(f"chat template {name} is nested too deeply: {error}") from error
        calls = parsed.find_all(nodes.ExtensionAttribute)
        self._marks_answers = any(call.name == _GENERATION for call in calls)
        self._mentioned = {node.name for node in parsed.find_all(nodes.Name)}
        self._mentioned |= {node.attr for node in parsed.find_all(nodes.Getattr)}
        self._mentioned |= {node.value for node in parsed.find_all(nodes.Const) if isinstance(node.value, str)}

    @classmethod
    def load(cls, name: str, tokenizer: Tokenizer) -> "ChatTemplate":
        """The tokenizer's own template (`tokenizer`), one of `NAMED`, or the content of a file (`my_format.jinja`).

        Raises:
            UserError: If there is no such template, or the tokenizer has not the special tokens that it writes.
        """
        if name.endswith(".jinja"):
            return cls(name, read_text(Path(name)), tokenizer)
        if name == "tokenizer":
            source = _default_template(tokenizer)
            if source is None:
                raise UserError(f"tokenizer {tokenizer.path} has no chat_template; name a template: {', '.join(NAMED)}")
            return cls(name, source, tokenizer)
        if name not in NAMED:
            known = f"tokenizer (its own chat_template), {', '.join(NAMED)}, or a file that ends in .jinja"
            raise UserError(f"unknown template {name!r}; there are {known}")
        written = dict.fromkeys(re.findall(r"<\|\w+\|>", NAMED[name]))
        bos = tokenizer.special_tokens.get("bos_token")
        # a tokenizer that names <|im_start|> as BOS has it in front of every message of ChatML
        begins = tokenizer.bos_token_id in tokenizer.before_text and bos not in written
        template = cls(name, BOS * begins + NAMED[name], tokenizer)
        missing = [token for token in written if token not in template._text_encoder.special_tokens]
        if missing:
            raise UserError(
                f"template {name} writes {', '.join(missing)}, which tokenizer {tokenizer.path} does not have as "
                f"special tokens; name alpaca or mistral, which need none"
            )
        return template

    def __reduce__(self) -> tuple[Any, ...]:
        # compiled templates cannot be pickled; the date goes along so that all workers write the same
        return ChatTemplate, (self.name, self.source, self._tokenizer, self._today)

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids at which a generated answer ends: the first of those that close an answer. Empty if none does.

        Raises:
            UserError: If the template does not render a question and its answer.
        """
        question: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        chat = self.encode(question)
        return tuple(sorted({chat.input_ids[stop] for _, stop, end in chat.answers if stop < end}))

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        trained: Sequence[bool] | None = None,
    ) -> EncodedChat:
        """Ids of a whole conversation, and where the answers stand in them.

        Args:
            messages: As `conversations.to_conversation` returns them; ends with the assistant.
            tools: Descriptions of the tools that the assistant may call.
            trained: For each message whether it is to be learnt; all of the assistant's if not given.

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
        tokens = self._text_encoder.encode(text, chat.spellings)
        encoded: list[tuple[int, int, int]] = []
        for span in spans:
            after = encoded[-1][2] if encoded else 0
            if answer := _to_tokens(span, tokens, text, after):
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
        """Ids up to where the assistant is to speak next.

        Raises:
            UserError: If the template raises, or does not write what the conversation holds.
        """
        chat = self._hidden(messages, tools)
        self._check_written(chat)
        text, _ = self._render(chat, add_generation_prompt=True)
        return self._text_encoder.encode(text, chat.spellings).ids

    def _hidden(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> "_HiddenChat":
        if any(message.get("tool_calls") for message in messages) and not self._takes_json_text:
            messages = [_with_parsed_arguments(message) for message in messages]
        return _HiddenChat(messages, tools, self._text_encoder.special_token)

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
            text, _ = self._render(_HiddenChat(messages, None, self._text_encoder.special_token))
        except UserError:
            return False
        return arguments in text

    def _check_written(self, chat: "_HiddenChat") -> None:
        """Make sure that the template writes the conversation's tools, their calls and results, and its reasoning.

        transformers leaves out without a word what a template does not know.
        """
        missing = []
        if chat.tools and "tools" not in self._mentioned:
            missing.append("tools")
        for key, names in (("tool_calls", ("tool_calls",)), ("reasoning_content", REASONING)):
            if any(message.get(key) for message in chat.messages) and self._mentioned.isdisjoint(names):
                missing.append(key)
        returned = [turn for turn, message in enumerate(chat.messages) if message["role"] == "tool"]
        if returned and not missing:
            marked, _ = self._render(chat, marks=dict.fromkeys(returned, chat.place))
            if marked.count(chat.place) < len(returned):
                missing.append("messages of the role tool")
        if missing:
            raise UserError(
                f"chat template {self.name} does not write {' or '.join(missing)}, which this conversation has; name a "
                f"template that does, such as the tokenizer's own or a .jinja file, or take them out of the data"
            )

    def render_prompt(self, messages: Sequence[Message], *, continue_last: bool = False) -> str:
        """Return the text of a prompt as transformers' `apply_chat_template` writes it, for others to encode.

        Args:
            messages: The conversation so far.
            continue_last: Whether the last message is the beginning of the answer and the text ends with it. Otherwise
                the text ends where the assistant is to speak next.

        Raises:
            UserError: If the template raises, or leaves the last message out.
        """
        if continue_last:
            messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + _CONTINUED}]
        chat = _HiddenChat(messages, None, self._text_encoder.special_token)
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
        return self._text_encoder.encode(text, {}).ids

    def _render(
        self,
        chat: "_HiddenChat",
        stop: int | None = None,
        *,
        add_generation_prompt: bool = False,
        marks: Mapping[int, str] | None = None,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of the messages before `stop`, and the spans of it in `{% generation %}` blocks.

        `marks` are characters to append to what the messages of these numbers say.
        """
        messages = chat.messages[:stop]
        if marks is not None:
            messages = [
                _with_mark(message, marks[turn]) if turn in marks else message for turn, message in enumerate(messages)
            ]
        try:
            text = self._template.render(
                **self._tokenizer.special_tokens,
                messages=messages,
                tools=chat.tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{_MARKS: chat.marks},
            )
            return chat.cut_marks(text)
        except Exception as error:  # a template is a program of the user's: whatever it raises is for the user to mend
            reason = " ".join(str(error).split())
            raise UserError(f"chat template {self.name} does not take this conversation: {reason}") from error

    def _end_of(self, text: str, chat: "_HiddenChat", turn: int, with_header: bool = False) -> int:
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
        self, chat: "_HiddenChat", blocks: Sequence[tuple[int, int]], trained: Sequence[bool]
    ) -> list[tuple[int, int]]:
        """Return the `{% generation %}` blocks of the turns that are to be learnt.

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
                f"are not learnt; put all that the assistant says in a turn into one block"
            )
        return [block for block, inside in zip(blocks, said, strict=True) if kept in inside]


def _default_template(tokenizer: Tokenizer) -> str | None:
    """The tokenizer's template; tokenizer_config.json may hold a list of named ones."""
    template = given = tokenizer.chat_template
    if isinstance(given, list) and all(isinstance(entry, dict) and "name" in entry for entry in given):
        template = next((entry.get("template") for entry in given if entry["name"] == "default"), None)
    if template is not None and not isinstance(template, str):
        raise UserError(
            f"tokenizer {tokenizer.path}: chat_template in tokenizer_config.json must be text, or a list of named ones "
            f'such as [{{"name": "default", "template": "..."}}], got {json.dumps(given):.60}'
        )
    return template


# ------------------------------------------------------------------------------------------- text to tokens


@dataclass
class _Tokens:
    """Tokens of a text, one entry each."""

    ids: list[int] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)
    """Numbers of the characters it begins at and ends before."""
    special: list[bool] = field(default_factory=list)

    def extend(self, ids: Sequence[int], offsets: Sequence[tuple[int, int]], special: Sequence[bool]) -> None:
        self.ids.extend(ids)
        self.offsets.extend(offsets)
        self.special.extend(special)


class _TextEncoder:
    """Encodes a template's text, in which special tokens are special, around messages, in which they are not."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        backend = tokenizer.copy_backend()
        known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        # the tokens that play a role are special even where tokenizer.json does not say so, as in transformers
        backend.add_special_tokens([token for token in tokenizer.special_tokens.values() if token not in known])
        backend.post_processor = None  # it may trim white space off the offsets, which hides where a token begins
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._spelling = {id: token.content for id, token in added.items() if token.special}
        self.special_tokens = set(self._spelling.values())
        # the longest first, should one be the beginning of another
        self.special_token = re.compile("|".join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True))))

    @cached_property
    def _plain(self) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
        """Encoders that find no special tokens, for the beginning of a text and for parts within it."""
        content = self._tokenizer.without_control_pieces(json.loads(self._backend.to_str()))
        first = tokenizers.Tokenizer.from_str(json.dumps(content))
        # a Metaspace of this scheme puts a space in front of a text, but not of a part within it
        content["pre_tokenizer"] = _replace(content["pre_tokenizer"], "prepend_scheme", "first", "never")
        within = tokenizers.Tokenizer.from_str(json.dumps(content))
        first.encode_special_tokens = within.encode_special_tokens = True
        return first, within

    def encode(self, text: str, spellings: dict[str, str]) -> _Tokens:
        """Tokens of `text`, in which each character of `spellings` stands for a text that is not special."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        special = [id in self._spelling for id in ids]
        for number in [number for number, is_special in enumerate(special) if is_special]:
            # a character that the tokenizer does not know may have become the unknown token, which is special too
            start, stop = offsets[number]
            special[number] = text[start:stop].strip() == self._spelling[ids[number]]
        # the vocabulary may have "</s>" as a piece like any other, or a normalizer may make it of other characters
        ordinary = {id for id, is_special in zip(ids, special, strict=True) if not is_special}
        is_clean = not (ordinary & self._spelling.keys() - {self._tokenizer.unk_token_id})
        if is_clean and not any(character in text for character in spellings):
            return _Tokens(ids, offsets, special)
        # Special tokens cut a text into parts that the tokenizer encodes one by one. Here it does so with the parts as
        # they are spelled, and never looks for special tokens in them.
        tokens = _Tokens()
        end = 0
        for id, (start, stop), is_special in zip(ids, offsets, special, strict=True):
            if is_special:
                self._encode_part(text, end, start, spellings, tokens)
                tokens.extend([id], [(start, stop)], [True])
                end = stop
        self._encode_part(text, end, len(text), spellings, tokens)
        return tokens

    def _encode_part(self, text: str, start: int, stop: int, spellings: dict[str, str], tokens: _Tokens) -> None:
        """Append the tokens of text[start:stop]; their offsets are those of `text`, where a spelling is a character."""
        spelled = [spellings.get(character, character) for character in text[start:stop]]
        origin = [start + number for number, piece in enumerate(spelled) for _ in piece] + [stop]
        encoding = self._plain[start > 0].encode("".join(spelled), add_special_tokens=False)
        # a token may stand for no character, such as a space that the tokenizer puts in front
        offsets = [(origin[first], origin[max(first, last - 1)] + 1) for first, last in encoding.offsets]
        tokens.extend(encoding.ids, offsets, [False] * len(offsets))


def _replace(value: Any, key: str, old: Any, new: Any) -> Any:
    """A copy of nested JSON in which `key` is `new` wherever it was `old`."""
    if isinstance(value, dict):
        value = {name: _replace(entry, key, old, new) for name, entry in value.items()}
        return value | {key: new} if value.get(key) == old else value
    if isinstance(value, list):
        return [_replace(entry, key, old, new) for entry in value]
    return value


def _to_tokens(span: tuple[int, int], tokens: _Tokens, text: str, after: int) -> tuple[int, int, int] | None:
    """The tokens of a span of characters, from the one that covers the first, as in transformers' assistant mask.

    Those before number `after` belong to another answer. Blank ones after the closing tokens are left out.
    """
    if span[0] == span[1]:
        return None
    starts = [start for start, _ in tokens.offsets]
    start, end = bisect_left(starts, span[0]), bisect_left(starts, span[1])
    # a special token that swallows the space after it is still the template's
    if start > after and tokens.offsets[start - 1][1] > span[0] and not tokens.special[start - 1]:
        start -= 1
    closing = end
    while closing > start and not tokens.special[closing - 1] and not text[slice(*tokens.offsets[closing - 1])].strip():
        closing -= 1
    if closing > start and tokens.special[closing - 1]:
        end = closing
    stop = end
    while stop > start and tokens.special[stop - 1]:
        stop -= 1
    return (start, stop, end) if start < end else None


# ------------------------------------------------------------------------------------- what a template is given


class _HiddenChat:
    """A conversation as a template is given it, every special token that it spells out replaced by one character.

    The characters are from a private use area of Unicode, and the conversation has none of them. Two more mark where an
    answer begins and ends; others are appended to what a message says, to find it in the text.
    """

    def __init__(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, special_token: re.Pattern[str]
    ) -> None:
        given = [_with_reasoning(message) for message in messages]
        text = "\0".join(_texts([given, tools]))
        free = (character for character in map(chr, range(0x100000, 0x10FFFE)) if character not in text)
        self.marks = (next(free), next(free))
        self.place = next(free)
        self.marks_of_turns = (next(free), next(free))
        hidden = {token: next(free) for token in dict.fromkeys(special_token.findall(text))}
        self.spellings = {character: token for token, character in hidden.items()}
        """The special tokens that the messages spell out, by the characters that replace them."""

        def hide(text: str) -> str:
            return special_token.sub(lambda found: hidden[found[0]], text)

        self.messages: list[Message] = _map_texts(hide, given) if hidden else given
        self.tools: Sequence[dict[str, Any]] | None = _map_texts(hide, tools) if hidden else tools

    def cut_marks(self, marked: str) -> tuple[str, list[tuple[int, int]]]:
        """The text without marks, and the spans of characters they enclosed.

        Raises:
            UserError: If the marks do not come in pairs.
        """
        text, *rest = re.split(f"([{''.join(self.marks)}])", marked)
        if tuple(rest[::2]) != self.marks * (len(rest) // 4):
            raise UserError("its {% generation %} blocks are nested or cut")
        spans: list[tuple[int, int]] = []
        for inside, after in zip(rest[1::4], rest[3::4], strict=True):
            start, end = len(text), len(text) + len(inside)
            if spans and spans[-1][1] == start:  # the text of an answer and what closes it may be blocks of their own
                start, _ = spans.pop()
            spans.append((start, end))
            text += inside + after
        return text, spans


def _with_reasoning(message: Message) -> Message:
    """Return the message with its reasoning under all names that templates read, as transformers does."""
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _with_parsed_arguments(message: Message) -> Message:
    """Return the message with the arguments of its calls as objects, where they are JSON in a string."""

    def parsed(function: dict[str, Any]) -> dict[str, Any]:
        arguments = function.get("arguments")
        return {**function, "arguments": json.loads(arguments)} if isinstance(arguments, str) else function

    calls = [
        {**call, "function": parsed(call["function"])} if "function" in call else parsed(call)
        for call in message.get("tool_calls") or ()
    ]
    return {**message, "tool_calls": calls} if calls else message


def _with_mark(message: Message, mark: str) -> Message:
    """Return the message with `mark` appended to all that it says and calls."""
    names = {"role", "name", "tool_call_id"}
    said: Message = {
        key: value + mark for key, value in message.items() if isinstance(value, str) and value and key not in names
    }
    if message.get("tool_calls"):
        said["tool_calls"] = [
            {**call, "function": _with_longer_name(call["function"], mark)}
            if "function" in call
            else _with_longer_name(call, mark)
            for call in message["tool_calls"]
        ]
    return {**message, **(said or {"content": mark})}


def _with_longer_name(function: dict[str, Any], mark: str) -> dict[str, Any]:
    return {**function, "name": f"{function.get('name', '')}{mark}"}


def _texts(value: Any) -> Iterator[str]:
    """Yield every string in nested JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for entry in value.values():
            yield from _texts(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _texts(entry)


def _map_texts(change: Callable[[str], str], value: Any) -> Any:
    """Return a copy of nested JSON with every string changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _map_texts(change, entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_texts(change, entry) for entry in value]
    return value


_CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "
"""What marks the end of a message that is to be continued; a template that trims messages takes its space away."""

_GENERATION = "_mark_answer"
_MARKS = "answer_marks"


class _GenerationTag(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: what it encloses is put between the two `answer_marks`."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method(_GENERATION, [nodes.Name(_MARKS, "load")])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark_answer(self, marks: tuple[str, str], caller: Any) -> str:
        begin, end = marks
        return begin + caller() + end


def _environment(today: datetime) -> BoundedEnvironment:
    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes what HTML must
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = today.strftime
    return environment
