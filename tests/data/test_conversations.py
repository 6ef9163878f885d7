import pytest

from meap_lit.data.conversations import to_messages
from meap_lit.errors import UserError


def user(content, **others):
    return {"role": "user", "content": content, **others}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
OPENAI = {"messages": [{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "a"}]}

RECORDS = {
    "alpaca": (
        {"instruction": "i", "input": "x", "output": "a", "text": "whatever"},
        [user("i\n\nx", instruction="i", input="x"), assistant("a")],
    ),
    "alpaca without input": (
        {"instruction": "i", "output": "a"},
        [user("i", instruction="i", input=""), assistant("a")],
    ),
    "alpaca with empty input": (
        {"instruction": "i", "input": "", "output": "a"},
        [user("i", instruction="i", input=""), assistant("a")],
    ),
    "alpaca with nulls, from parquet": (
        {"instruction": "i", "input": None, "output": "a", "system": None, "messages": None},
        [user("i", instruction="i", input=""), assistant("a")],
    ),
    "alpaca with system": (
        {"instruction": "i", "output": "a", "system": "s"},
        [system("s"), user("i", instruction="i", input=""), assistant("a")],
    ),
    "sharegpt": (SHAREGPT, [user("q"), assistant("a")]),
    "sharegpt with system": (SHAREGPT | {"system": "s"}, [system("s"), user("q"), assistant("a")]),
    "sharegpt with system_prompt": (SHAREGPT | {"system_prompt": "s"}, [system("s"), user("q"), assistant("a")]),
    "sharegpt of many turns": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "user", "value": "q"},
                {"from": "assistant", "value": "a"},
                {"from": "human", "value": "r"},
                {"from": "gpt", "value": "b"},
            ]
        },
        [system("s"), user("q"), assistant("a"), user("r"), assistant("b")],
    ),
    "openai": (OPENAI, [user("q"), assistant("a")]),
    "completion": ({"prompt": "q", "completion": "a"}, [user("q"), assistant("a")]),
}


@pytest.mark.parametrize("name", RECORDS)
def test_formats(name):
    record, messages = RECORDS[name]
    assert to_messages(record) == messages


def test_default_system_message():
    assert to_messages(OPENAI, "be brief") == [system("be brief"), user("q"), assistant("a")]
    own = {"messages": [{"role": "system", "content": "own"}, *OPENAI["messages"]]}
    assert to_messages(own, "be brief")[0] == system("own")
    assert to_messages(SHAREGPT | {"system": "own"}, "be brief")[0] == system("own")


def openai(*roles, content="x"):
    return {"messages": [{"role": role, "content": content} for role in roles]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"text": "t", "id": 1},
            r"unknown format with 'text', 'id'; known are Alpaca \(instruction, output\), ShareGPT",
        ),
        ({}, "unknown format with no fields; known are Alpaca"),
        ({"instruction": "i"}, "no answer: field 'output' is missing"),
        ({"instruction": "i", "output": None}, "no answer: field 'output' is missing"),
        ({"prompt": "p"}, "no answer: field 'completion' is missing"),
        (openai(), "no answer: the assistant says nothing"),
        (openai("user"), "no answer: the assistant says nothing"),
        (openai("user", "assistant", "user"), "no answer: the last message is the user's"),
        (openai("assistant"), "roles out of order: message 1 is of the assistant instead of the user; after an opt"),
        (openai("user", "user", "assistant"), "roles out of order: message 2 is of the user instead of the assistant"),
        (openai("user", "system", "assistant"), "roles out of order: message 2 is of the system instead of the assis"),
        (
            openai("system", "assistant", "user"),
            "roles out of order: message 2 is of the assistant instead of the user",
        ),
        (
            openai("user", "tool"),
            r"messages\[1\] has the unknown role 'tool'; known are system, user, human, assistant",
        ),
        (openai("user", 3), r"field 'messages\[1\].role' is not a string but int"),
        ({"instruction": "i", "output": ""}, "empty answer"),
        (openai("user", "assistant", content=" \n"), "empty answer"),
        ({"instruction": "i", "output": 3}, "field 'output' is not a string but int"),
        ({"instruction": "i", "output": "a\ud800"}, "field 'output' holds a broken character"),
        ({"instruction": ["i"], "output": "a"}, "field 'instruction' is not a string but list"),
        ({"instruction": "i", "input": 1, "output": "a"}, "field 'input' is not a string but int"),
        (openai("user", "assistant", content=[]), r"field 'messages\[0\].content' is not a string but list"),
        (openai("user", "assistant", content=None), r"messages\[0\] has no 'content'"),
        ({"conversations": [{"role": "user", "content": "x"}]}, r"conversations\[0\] has no 'from'"),
        ({"conversations": "text"}, "field 'conversations' is not a list but str"),
        ({"conversations": ["text"]}, r"conversations\[0\] is not an object but str"),
        (SHAREGPT | {"system": 1}, "field 'system' is not a string but int"),
    ],
)
def test_no_conversation(record, message):
    with pytest.raises(UserError, match=f"^{message}"):
        to_messages(record)
