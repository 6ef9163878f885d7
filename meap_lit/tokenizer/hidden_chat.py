"""Prepare a conversation for a chat template: mark or hide what must be found again in the text that it writes."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from meap_lit.errors import UserError

Message = dict[str, Any]
"""A message as a chat template takes it: `role` (system, user, assistant or tool) and `content`; a user message of
Alpaca also has `instruction` and `input`, one of the assistant may have `tool_calls` and `reasoning_content`."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names under which a message may hold its reasoning, the one that templates should read first."""


class HiddenChat:
    """A conversation for a template, with every special token that it spells out replaced by one character.

    The characters are from a private use area of Unicode, and the conversation has none of them. Two more mark where an
    answer begins and ends; others are appended to what a message says, to find it in the text.
    """

    def __init__(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, special_token: re.Pattern[str]
    ) -> None:
        given = [_with_reasoning(message) for message in messages]
        texts: list[str] = []

        def collect(text: str) -> str:
            texts.append(text)
            return text

        _map_texts(collect, [given, tools])
        text = "\0".join(texts)
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
        """Return the text without marks, and the spans of characters that they enclose."""
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


def with_parsed_arguments(message: Message) -> Message:
    """Return the message with the arguments of its calls as objects, where they are JSON in a string."""

    def parse(function: dict[str, Any]) -> dict[str, Any]:
        arguments = function.get("arguments")
        return {**function, "arguments": json.loads(arguments)} if isinstance(arguments, str) else function

    return _map_calls(parse, message)


def with_mark(message: Message, mark: str) -> Message:
    """Return the message with `mark` appended to all that it says and to the names of what it calls."""
    names = {"role", "name", "tool_call_id"}
    said: Message = {
        key: value + mark for key, value in message.items() if isinstance(value, str) and value and key not in names
    }
    if not said and not message.get("tool_calls"):
        said = {"content": mark}
    return _map_calls(lambda function: {**function, "name": f"{function.get('name', '')}{mark}"}, {**message, **said})


def _map_calls(change: Callable[[dict[str, Any]], dict[str, Any]], message: Message) -> Message:
    """Return a message with the function of each of its calls changed; some have it wrapped, others bare."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": change(call["function"])} if "function" in call else change(call)
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _map_texts(change: Callable[[str], str], value: Any) -> Any:
    """Return a copy of nested JSON with every string changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _map_texts(change, entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_texts(change, entry) for entry in value]
    return value
