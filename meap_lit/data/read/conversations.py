"""Turn records of the usual conversation formats into lists of messages.

| format     | fields of a record                                                                       |
|------------|------------------------------------------------------------------------------------------|
| Alpaca     | `instruction`, `output`; optional `input`, `system`, `history`                           |
| ShareGPT   | `conversations`: a list of {`from`, `value`}; optional `system` or `system_prompt`       |
| OpenAI     | `messages`: a list of {`role`, `content`}, as transformers' chat templates take them     |
| completion | `prompt`, `completion`; optional `system`; both may be lists of messages: then only      |
|            | the completion is learned, as in TRL                                                      |

The format is recognized by its fields. A field that is null, as in a Parquet file, counts as absent. Every format may
have `tools`. An unknown key that would change the text or what is learned is refused by its name; fields of the record
that are not listed count as metadata.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meap_lit.data.read.readers import check_text, refuse_repeated
from meap_lit.errors import UserError, shorten
from meap_lit.files import parse_json
from meap_lit.tokenizer.hidden_chat import REASONING, Message


@dataclass(frozen=True)
class Conversation:
    """The conversation of one record.

    Args:
        messages: At most one of the system, then user and assistant in turn, the assistant last; what tools return
            comes between two messages of the assistant.
        trained: For each message whether it is to be learned; true for messages of the assistant only.
        tools: Descriptions of the tools that the assistant may call, as JSON values; None if there are none.
    """

    messages: list[Message]
    trained: list[bool]
    tools: list[dict[str, Any]] | None = None


_FUNCTION_CALL = "function_call"
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    _FUNCTION_CALL: "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
_FOLLOWERS = {
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_WEIGHTS = ("weight", "train", "training")  # of OpenAI, and the usual names of axolotl's message_field_training
_OF_ASSISTANT = ("tool_calls", _FUNCTION_CALL, *REASONING)
_HANDED_ON = ("name", "tool_call_id")
# of a turn; where it came from and what was thought of it
_METADATA = {
    *("id", "uuid", "turn_id", "turn_identifier", "parent_id", "index", "turn", "source", "model", "metadata", "meta"),
    *("timestamp", "time", "date", "created_at", "create_time", "language", "lang", "country", "state", "score"),
    *("rating", "num_tokens", "token_count", "tokens", "hashed_ip", "header", "redacted", "toxic", "markdown"),
}
_OF_PART = ("type", "text", "annotations", "cache_control", "citations")
# of a record; each would change the text
_REFUSED_FIELDS = (
    *("documents", "chat_template", "chat_template_kwargs"),
    *("image", "images", "video", "videos", "audio", "audios"),
)


def to_conversation(record: Mapping[str, Any], system: str | None = None) -> Conversation:
    """Return the conversation of one record; `system` is the system message if the record has none.

    Raises:
        UserError: If the format is unknown, or the record does not hold a conversation.
    """
    fields = {name: value for name, value in record.items() if value is not None}
    trained: list[bool] = []
    if "messages" in fields:
        messages, trained = _from_list("messages", fields["messages"], role="role", content="content")
    elif "conversations" in fields:
        messages, trained = _from_list("conversations", fields["conversations"], role="from", content="value")
    elif "instruction" in fields:
        messages = [*_alpaca_history(fields), _alpaca_question(fields), _answer(fields, "output")]
    elif isinstance(fields.get("prompt"), list):
        before, _ = _from_list("prompt", fields["prompt"], role="role", content="content")
        after, trained = _from_list("completion", fields.get("completion", []), role="role", content="content")
        messages, trained = before + after, [False] * len(before) + trained
    elif "prompt" in fields:
        question = {"role": "user", "content": check_text("prompt", fields["prompt"])}
        messages = [question, _answer(fields, "completion")]
    elif wrapped := [name for name, value in fields.items() if _is_records(value)]:
        raise UserError(f"the records are in the list {wrapped[0]!r} of an object; write that list alone")
    else:
        raise UserError(
            f"unknown format with {', '.join(map(repr, fields)) or 'no fields'}; known formats are Alpaca "
            f"(instruction, output), ShareGPT (conversations), OpenAI (messages) and prompt with completion"
        )
    for name in (*_REFUSED_FIELDS, *(() if "instruction" in fields else ("history",))):
        if fields.get(name):
            raise UserError(f"field {name!r} would change the text, and is not read here; remove it")
    for name, value in fields.items():
        is_unwanted = name in _WEIGHTS and isinstance(value, (int, float)) and not value
        if is_unwanted or (name == "label" and value is False and "prompt" in fields):  # of TRL: a bad answer
            raise UserError(f"field {name!r} is {value}: the record is not to be learned; remove it from the data")
    trained = trained or [message["role"] == "assistant" for message in messages]
    before = _system_messages(fields, messages, system)
    messages, trained = before + messages, [False] * len(before) + trained
    _check_turns(messages, trained)
    return Conversation(messages, trained, _tools(fields))


def _is_records(value: Any) -> bool:
    """Return whether a value is a list of records of a known format."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and not {"messages", "conversations", "instruction", "prompt"}.isdisjoint(first)


def _alpaca_question(fields: Mapping[str, Any]) -> Message:
    instruction = check_text("instruction", fields["instruction"])
    context = check_text("input", fields.get("input", ""))
    content = f"{instruction}\n\n{context}" if context else instruction
    return {"role": "user", "content": content, "instruction": instruction, "input": context}


def _alpaca_history(fields: Mapping[str, Any]) -> list[Message]:
    history = _list("history", fields.get("history", []))
    messages = []
    for number, pair in enumerate(history):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise UserError(f"history[{number}] must be a question and its answer, got {_short(pair)}")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": check_text(f"history[{number}]", text)})
    return messages


def _answer(fields: Mapping[str, Any], name: str) -> Message:
    if name not in fields:
        raise UserError(f"no answer: field {name!r} is missing")
    return {"role": "assistant", "content": check_text(name, fields[name])}


def _from_list(name: str, turns: Any, role: str, content: str) -> tuple[list[Message], list[bool]]:
    messages, trained = [], []
    for number, turn in enumerate(_list(name, turns)):
        where = f"{name}[{number}]"
        if not isinstance(turn, Mapping):
            raise UserError(f"{where} is not an object but {type(turn).__name__}")
        fields = {key: value for key, value in turn.items() if value is not None}
        if role not in fields:
            raise UserError(f"{where} has no {role!r}")
        kind = check_text(f"{where}.{role}", fields.pop(role))
        if kind not in _ROLES:
            raise UserError(f"{where} has the unknown role {kind!r}; known roles are {', '.join(_ROLES)}")
        trained.append(_is_trained(where, fields, _ROLES[kind]))
        messages.append(_message(where, fields, kind, content))
    return messages, trained


def _is_trained(where: str, fields: dict[str, Any], role: str) -> bool:
    """Return whether a turn is to be learned, and take the keys that say so out of its fields."""
    given = {key: fields.pop(key) for key in _WEIGHTS if key in fields}
    for key, value in given.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise UserError(
                f"{where}.{key} must be 0 or 1, false or true, got {_short(value)}; a turn is learned or not"
            )
        if value and role != "assistant":
            raise UserError(f"{where}.{key} asks to learn what the {role} says; only the assistant's turns are learned")
    if len({bool(value) for value in given.values()}) > 1:
        raise UserError(f"{where} says both that it is learned and that it is not: {_short(given)}")
    return role == "assistant" and all(given.values())


def _message(where: str, fields: dict[str, Any], kind: str, content: str) -> Message:
    """Return the message of a turn whose role and weights have been taken out of its fields."""
    message: Message = {"role": _ROLES[kind]}
    value = fields.pop(content, None)
    if kind == _FUNCTION_CALL:
        message |= {"content": "", "tool_calls": _function_calls(f"{where}.{content}", value)}
    elif value is not None:
        message["content"] = _text(f"{where}.{content}", value)
    elif message["role"] != "assistant" or not any(fields.get(key) for key in _OF_ASSISTANT):
        raise UserError(f"{where} has no {content!r}")
    for key, entry in fields.items():
        place = f"{where}.{key}"
        if key in ("tool_calls", _FUNCTION_CALL) and entry and "tool_calls" in message:
            raise UserError(f"{place}: the calls of this turn are given twice; keep one of them")
        if key in _OF_ASSISTANT and message["role"] != "assistant" and entry:
            raise UserError(f"{place}: only the assistant may have {key}")
        if key == "tool_calls" and entry:
            message[key] = _tool_calls(place, entry)
        elif key == _FUNCTION_CALL and entry:
            message["tool_calls"] = _function_calls(place, entry)
        elif key in REASONING or key in _HANDED_ON:
            message[key] = check_text(place, entry)
        elif key not in _METADATA and entry not in ("", [], {}):
            raise UserError(
                f"{place} is not known, and may change what is learned (its value is {_short(entry)}); remove it"
            )
    return message


def _text(where: str, value: Any) -> str:
    """Return a text, given as a string or as a list of parts."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return check_text(where, value)
    texts = []
    for number, part in enumerate(value):
        place = f"{where}[{number}]"
        if isinstance(part, Mapping) and part.get("type", "text") != "text":
            raise UserError(f"{place} is of type {_short(part['type'])}; only parts of type 'text' are read")
        for key in part if isinstance(part, Mapping) else ():
            if key not in (*_OF_PART, *_METADATA) and part[key]:
                raise UserError(f"{place}.{key} is not known, and may change what is learned; remove it")
        texts.append(check_text(place, part.get("text") if isinstance(part, Mapping) else part))
    return "".join(texts)


def _tools(fields: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the record's tools; None for an empty list."""
    tools: list[dict[str, Any]] = []
    if fields.get("tools") and fields.get("functions"):
        raise UserError("fields 'tools' and 'functions' both describe tools; keep one of them")
    for name in ("tools", "functions"):
        value = _parsed(name, fields.get(name) or [])
        for number, tool in enumerate(_list(name, value)):
            checked = _object(f"{name}[{number}]", tool)
            # only OpenAI's `tools` are wrapped as transformers has them; elsewhere a function is described alone
            bare = "function" not in checked and (name == "functions" or "messages" not in fields)
            tools.append({"type": "function", "function": checked} if bare else checked)
    return tools or None


def _tool_calls(where: str, value: Any) -> list[dict[str, Any]]:
    calls = []
    for number, entry in enumerate(_list(where, _parsed(where, value))):
        place = f"{where}[{number}]"
        call = _object(place, entry)
        function = _object(f"{place}.function", call.get("function", call))
        if "arguments" in function:  # kept as they are written: `ChatTemplate` gives a template what it takes
            _object(f"{place} arguments", _parsed(f"{place} arguments", function["arguments"]))
        calls.append({**call, "function": function} if "function" in call else function)
    return calls


def _function_calls(where: str, value: Any) -> list[dict[str, Any]]:
    """Return calls that are written as ShareGPT does: one or a list of them, as JSON in a string."""
    content = _parsed(where, value)
    functions = [content] if isinstance(content, Mapping) else content
    return _tool_calls(where, [{"type": "function", "function": function} for function in _list(where, functions)])


def _parsed(where: str, value: Any) -> Any:
    """Return `value`, or its content if it is JSON in a string."""
    if not isinstance(value, str):
        return value
    try:
        content = parse_json(value, where, mark_repeated=True)
        refuse_repeated(where, content)
        return content
    except UserError as error:
        raise UserError(f"{error}: {_short(value)}") from error


def _system_messages(fields: Mapping[str, Any], messages: Sequence[Message], default: str | None) -> list[Message]:
    """Return what the system says, where the messages do not begin with it."""
    said = {name: check_text(name, fields[name]) for name in ("system", "system_prompt") if fields.get(name)}
    if messages and messages[0]["role"] == "system":
        said["the first message"] = messages[0]["content"]
    if len(set(said.values())) > 1:
        raise UserError(f"the system says different things in {' and in '.join(said)}; keep one of them")
    content = next(iter(said.values()), default)
    return [{"role": "system", "content": content}] if content and "the first message" not in said else []


def _check_turns(messages: Sequence[Message], trained: Sequence[bool]) -> None:
    """Make sure that the roles are in order, that there is an answer, and that none to be learned is empty."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise UserError("no answer: the assistant says nothing")
    expected: tuple[str, ...] = ("user",) if roles[0] != "system" else ("system",)
    for number, role in enumerate(roles, start=1):
        if role not in expected:
            raise UserError(
                f"roles out of order: message {number} is of the {role} instead of the {' or the '.join(expected)}; "
                f"after an optional system message user and assistant take turns, the user first, and what a tool "
                f"returns comes between two messages of the assistant"
            )
        expected = _FOLLOWERS[role]
    if roles[-1] != "assistant":
        raise UserError(f"no answer: the last message is the {roles[-1]}'s")
    for message, is_trained in zip(messages, trained, strict=True):
        if is_trained and not message.get("content", "").strip() and not any(map(message.get, _OF_ASSISTANT)):
            raise UserError("empty answer")


def _list(where: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"field {where!r} is not a list but {type(value).__name__}")
    return value


def _object(where: str, value: Any) -> dict[str, Any]:
    """Return a copy of `value`, a JSON object that can be written."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is not an object but {type(value).__name__}")
    _check_json(where, value, depth=0)
    return dict(value)


def _check_json(where: str, value: Any, depth: int) -> None:
    if depth > 100:
        raise UserError(f"{where} is nested too deeply")
    if isinstance(value, str):
        check_text(where, value)
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            check_text(where, key)
            _check_json(where, entry, depth + 1)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            _check_json(where, entry, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} holds {value}, which JSON cannot hold")
    elif not isinstance(value, (bool, int, float, type(None))):
        raise UserError(f"{where} holds a value that JSON cannot hold, of type {type(value).__name__}")


def _short(value: Any) -> str:
    return shorten(repr(value), 60)
