"""Records of the usual conversation formats as lists of messages.

| format     | fields of a record                                                                       |
|------------|------------------------------------------------------------------------------------------|
| Alpaca     | `instruction`, `output`; optional `input`, `system`                                      |
| ShareGPT   | `conversations`: a list of {`from`, `value`}; optional `system` or `system_prompt`       |
| OpenAI     | `messages`: a list of {`role`, `content`}                                                |
| completion | `prompt`, `completion`; optional `system`                                                |

The format is recognised by its fields. A field that is null, as in a Parquet file, counts as absent.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from meap_lit.data.readers import check_text
from meap_lit.errors import UserError

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`; a user message of Alpaca also has `instruction` and `input`."""

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def to_messages(record: Mapping[str, Any], system: str | None = None) -> list[Message]:
    """Messages of one record: at most one of the system, then user and assistant in turn, the assistant last.

    Args:
        record: A JSON object or a row of a table.
        system: What the system says where the record does not say it.

    Raises:
        UserError: If the format is unknown, or the record is no such conversation; says what is wrong.
    """
    fields = {name: value for name, value in record.items() if value is not None}
    if "messages" in fields:
        messages = _from_list("messages", fields["messages"], role="role", content="content")
    elif "conversations" in fields:
        messages = _from_list("conversations", fields["conversations"], role="from", content="value")
    elif "instruction" in fields:
        messages = [_alpaca_question(fields), _answer(fields, "output")]
    elif "prompt" in fields:
        question = {"role": "user", "content": check_text("prompt", fields["prompt"])}
        messages = [question, _answer(fields, "completion")]
    else:
        raise UserError(
            f"unknown format with {', '.join(map(repr, fields)) or 'no fields'}; known are Alpaca (instruction, "
            f"output), ShareGPT (conversations), OpenAI (messages) and prompt with completion"
        )
    messages = _system_messages(fields, messages, system) + messages
    _check_turns(messages)
    return messages


def _alpaca_question(fields: Mapping[str, Any]) -> Message:
    instruction = check_text("instruction", fields["instruction"])
    context = check_text("input", fields.get("input", ""))
    content = f"{instruction}\n\n{context}" if context else instruction
    return {"role": "user", "content": content, "instruction": instruction, "input": context}


def _answer(fields: Mapping[str, Any], name: str) -> Message:
    if name not in fields:
        raise UserError(f"no answer: field {name!r} is missing")
    return {"role": "assistant", "content": check_text(name, fields[name])}


def _from_list(name: str, turns: Any, role: str, content: str) -> list[Message]:
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise UserError(f"field {name!r} is not a list but {type(turns).__name__}")
    return [_message(f"{name}[{number}]", turn, role, content) for number, turn in enumerate(turns)]


def _message(where: str, turn: Any, role: str, content: str) -> Message:
    if not isinstance(turn, Mapping):
        raise UserError(f"{where} is not an object but {type(turn).__name__}")
    for name in (role, content):
        if turn.get(name) is None:
            raise UserError(f"{where} has no {name!r}")
    speaker = _ROLES.get(check_text(f"{where}.{role}", turn[role]))
    if speaker is None:
        raise UserError(f"{where} has the unknown role {turn[role]!r}; known are {', '.join(_ROLES)}")
    return {"role": speaker, "content": check_text(f"{where}.{content}", turn[content])}


def _system_messages(fields: Mapping[str, Any], messages: Sequence[Message], default: str | None) -> list[Message]:
    """What the system says, where the messages do not begin with it."""
    if messages and messages[0]["role"] == "system":
        return []
    name = "system" if "system" in fields else "system_prompt"
    content = check_text(name, fields.get(name, "")) or default
    return [{"role": "system", "content": content}] if content else []


def _check_turns(messages: Sequence[Message]) -> None:
    """Make sure that user and assistant speak in turn, that every answer says something, and that there is one."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if "assistant" not in turns:
        raise UserError("no answer: the assistant says nothing")
    for number, role in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            place = number + 1 + len(roles) - len(turns)
            raise UserError(
                f"roles out of order: message {place} is of the {role} instead of the {expected}; after an optional "
                f"system message user and assistant take turns, the user first"
            )
    if turns[-1] == "user":
        raise UserError("no answer: the last message is the user's")
    for message in messages:
        if message["role"] == "assistant" and not message["content"].strip():
            raise UserError("empty answer")
