import json

import pytest

from meap_lit.data.read.conversations import Conversation, to_conversation
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
    trained = [message["role"] == "assistant" for message in messages]
    assert to_conversation(record) == Conversation(messages, trained)


def test_default_system_message():
    assert to_conversation(OPENAI, "be brief").messages == [system("be brief"), user("q"), assistant("a")]
    own = {"messages": [{"role": "system", "content": "own"}, *OPENAI["messages"]]}
    assert to_conversation(own, "be brief").messages[0] == system("own")
    by_developer = {"messages": [{"role": "developer", "content": "own"}, *OPENAI["messages"]]}
    assert to_conversation(by_developer) == to_conversation(own)
    assert to_conversation(SHAREGPT | {"system": "own"}, "be brief").messages[0] == system("own")
    assert to_conversation(own | {"system": "own"}) == to_conversation(own)


def openai(*roles, content="x"):
    return {"messages": [{"role": role, "content": content} for role in roles]}


def turn(number=1, **fields):
    """Two turns, one of them with more fields."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    messages[number] |= fields
    return {"messages": messages}


def nested(depth):
    return [nested(depth - 1)] if depth else 0


ALPACA = {"instruction": "i", "output": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"city": "Oslo"}}}


# -------------------------------------------------------------------------------------- what is learned


@pytest.mark.parametrize(
    ("fields", "trained"),
    [
        ({}, True),
        ({"weight": 1}, True),
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"train": True}, True),
        ({"train": False}, False),
        ({"training": False, "weight": 0}, False),
        ({"weight": None}, True),
    ],
)
def test_turns_that_are_not_learned(fields, trained):
    conversation = to_conversation(turn(**fields))
    assert conversation.trained == [False, trained]
    assert conversation.messages == [user("q"), assistant("a")]


def test_messages_as_prompt_and_completion():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * 2
    conversation = to_conversation({"prompt": turns[:3], "completion": turns[3:]}, "s")
    assert conversation == Conversation([system("s"), *turns], [False] * 4 + [True])
    with pytest.raises(UserError, match=r"^field 'completion' is not a list but str"):
        to_conversation({"prompt": turns[:3], "completion": "a"})


def test_of_what_is_not_learned_nothing_is_asked():
    record = {
        "system": "s",
        "conversations": [
            {"from": "human", "value": "q", "weight": 0, "id": "x"},
            {"from": "gpt", "value": " ", "weight": 0},
            {"from": "human", "value": "r"},
            {"from": "gpt", "value": "a", "weight": 1},
        ],
    }
    conversation = to_conversation(record)
    assert conversation.trained == [False, False, False, False, True]
    assert conversation.messages[2] == assistant(" ")


def test_metadata_does_not_matter():
    plain = to_conversation(OPENAI)
    assert to_conversation(OPENAI | {"id": 1, "source": "x", "images": [], "weight": 3, "category": ["a"]}) == plain
    assert to_conversation(turn(id="a", source="x", timestamp=1.5, refusal=None, annotations=[], text="")) == plain


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}, "."]
    assert to_conversation(openai("user", "assistant", content=parts)).messages == [
        user("one two."),
        assistant("one two."),
    ]


def test_history_of_alpaca():
    record = {"instruction": "i", "input": "x", "output": "a", "history": [["q", "b"], ("r", "c")], "system": "s"}
    conversation = to_conversation(record)
    turns = [
        user("q"),
        assistant("b"),
        user("r"),
        assistant("c"),
        user("i\n\nx", instruction="i", input="x"),
        assistant("a"),
    ]
    assert conversation.messages == [system("s"), *turns]
    assert conversation.trained == [False] + [False, True] * 3  # as LLaMA-Factory learns it
    assert to_conversation(ALPACA | {"history": []}) == to_conversation(ALPACA)


# ----------------------------------------------------------------------------------------------- tools

FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}


def test_tools_and_calls_of_openai():
    as_text = {**CALL, "function": {"name": "f", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [as_text], "reasoning_content": "hm"},
        {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": "f"},
        {"role": "assistant", "content": "a", "tool_calls": []},
    ]
    tool = {"type": "function", "function": FUNCTION}
    expected = Conversation(
        [
            user("q"),
            {"role": "assistant", "tool_calls": [as_text], "reasoning_content": "hm"},
            {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": "f"},
            assistant("a"),
        ],
        [False, True, False, True],
        [tool],
    )
    assert to_conversation({"messages": messages, "tools": [tool]}) == expected
    assert to_conversation({"messages": messages, "tools": json.dumps([tool])}) == expected
    assert to_conversation({"messages": messages, "functions": [FUNCTION]}) == expected
    messages[1] = messages[1] | {"tool_calls": json.dumps([as_text])}
    assert to_conversation({"messages": messages, "tools": [tool]}) == expected


def test_tools_and_calls_of_sharegpt():
    call = {"name": "f", "arguments": {"city": "Oslo"}}
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps([call, call])},
        {"from": "observation", "value": "rain"},
        {"from": "function_call", "value": json.dumps(call), "weight": 0},
        {"from": "observation", "value": "snow"},
        {"from": "gpt", "value": "a"},
    ]
    conversation = to_conversation({"conversations": turns, "tools": json.dumps([FUNCTION])})
    calling = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    assert conversation.messages == [
        user("q"),
        calling | {"tool_calls": calling["tool_calls"] * 2},
        {"role": "tool", "content": "rain"},
        calling,
        {"role": "tool", "content": "snow"},
        assistant("a"),
    ]
    assert conversation.trained == [False, True, False, False, False, True]
    assert conversation.tools == [{"type": "function", "function": FUNCTION}]
    # no tools are none, whoever wrote it
    for none in ("[]", [], "", None):
        assert to_conversation({"conversations": turns, "tools": none}).tools is None


def test_the_older_call_of_openai():
    call = {"name": "f", "arguments": '{"city": "Oslo"}'}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "f", "content": "rain"},
        {"role": "assistant", "content": "a"},
    ]
    called = [{"type": "function", "function": call}]
    assert to_conversation({"messages": messages}).messages[1:3] == [
        {"role": "assistant", "tool_calls": called},
        {"role": "tool", "name": "f", "content": "rain"},
    ]


def test_real_calls(shared_data):
    records = json.loads((shared_data / "sft" / "glaive_toolcall_en_demo.json").read_text())
    conversations = [to_conversation(record) for record in records]
    assert len(conversations) == 300
    calls = [message["tool_calls"] for chat in conversations for message in chat.messages if "tool_calls" in message]
    assert sum(map(len, calls)) == 211
    assert sum(chat.tools is not None for chat in conversations) == 191


# --------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"text": "t", "id": 1},
            r"unknown format with 'text', 'id'; known formats are Alpaca \(instruction, output\), ShareGPT",
        ),
        (
            {"version": 1, "data": [{"messages": []}]},
            "the records are in the list 'data' of an object; write that list alone",
        ),
        ({"data": [{"speaker": "a"}]}, "unknown format with 'data'; known formats are Alpaca"),
        ({}, "unknown format with no fields; known formats are Alpaca"),
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
            openai("user", "critic"),
            r"messages\[1\] has the unknown role 'critic'; known roles are system, developer, user, human, assistant",
        ),
        (openai("user", "tool"), "no answer: the assistant says nothing"),
        (openai("user", "tool", "assistant"), "roles out of order: message 2 is of the tool instead of the assistant"),
        (
            openai("user", "assistant", "tool", "user"),
            "roles .* message 4 is of the user instead of the assistant or th",
        ),
        (openai("user", "assistant", "tool"), "no answer: the last message is the tool's"),
        (openai("user", 3), r"field 'messages\[1\].role' is not a string but int"),
        ({"instruction": "i", "output": ""}, "empty answer"),
        (openai("user", "assistant", content=" \n"), "empty answer"),
        ({"instruction": "i", "output": 3}, "field 'output' is not a string but int"),
        ({"instruction": "i", "output": "a\ud800"}, "field 'output' holds a broken character"),
        ({"instruction": ["i"], "output": "a"}, "field 'instruction' is not a string but list"),
        ({"instruction": "i", "input": 1, "output": "a"}, "field 'input' is not a string but int"),
        (openai("user", "assistant", content=[]), "empty answer"),
        (openai("user", "assistant", content=["a", 3]), r"field 'messages\[0\].content\[1\]' is not a string but int"),
        (
            openai("user", "assistant", content=[{"type": "image_url", "image_url": {"url": "x"}}]),
            r"messages\[0\].content\[0\] is of type 'image_url'; only parts of type 'text' are read$",
        ),
        (
            openai("user", "assistant", content=[{"text": 3}]),
            r"field 'messages\[0\].content\[0\]' is not a string but int",
        ),
        (openai("user", "assistant", content=None), r"messages\[0\] has no 'content'"),
        ({"conversations": [{"role": "user", "content": "x"}]}, r"conversations\[0\] has no 'from'"),
        ({"conversations": "text"}, "field 'conversations' is not a list but str"),
        ({"conversations": ["text"]}, r"conversations\[0\] is not an object but str"),
        (SHAREGPT | {"system": 1}, "field 'system' is not a string but int"),
        (OPENAI | {"weight": 0}, "field 'weight' is 0: the record is not to be learned; remove it from the data$"),
        (
            {"prompt": "q", "completion": "a", "label": False},
            "field 'label' is False: the record is not to be learned; remove it",
        ),
        (
            turn(tool_calls=[CALL], function_call='{"name": "g", "arguments": {}}'),
            r"messages\[1\].function_call: the calls of this turn are given twice; keep one of them",
        ),
        (
            openai("user", "assistant", content=[{"text": "x", "image": "u"}]),
            r"messages\[0\].content\[0\].image is not known, and may change what is learned; remove it",
        ),
        (turn(weight=0.5), r"messages\[1\].weight must be 0 or 1, false or true, got 0.5; a turn is learned or not$"),
        (turn(train="no"), r"messages\[1\].train must be 0 or 1, false or true, got 'no'"),
        (
            turn(weight=1, train=False),
            r"messages\[1\] says both that it is learned and that it is not: {'weight': 1, 't",
        ),
        (
            turn(0, train=True),
            r"messages\[0\].train asks to learn what the user says; only the assistant's turns are le",
        ),
        (
            turn(training_detail=[{"train": True}]),
            r"messages\[1\].training_detail is not known, and may change what is ",
        ),
        (turn(refusal="x" * 99), r"messages\[1\].refusal is not known, .* \(its value is 'x{39}\.\.\. .*\); remove"),
        (turn(0, tool_calls=[CALL]), r"messages\[0\].tool_calls: only the assistant may have tool_calls"),
        (turn(tool_calls=["f"]), r"messages\[1\].tool_calls\[0\] is not an object but str"),
        (turn(tool_calls="[{"), r"messages\[1\].tool_calls: not valid JSON \(.*\): '\[{'"),
        (
            turn(tool_calls=[{"function": {"arguments": "x"}}]),
            r"messages\[1\].tool_calls\[0\] arguments: not valid J",
        ),
        (
            turn(tool_calls=[{"function": {"arguments": "[]"}}]),
            r"messages\[1\].tool_calls\[0\] arguments is not an obj",
        ),
        (turn(tool_calls=[{"name": "a\ud800"}]), r"field 'messages\[1\].tool_calls\[0\]' holds a broken character"),
        (
            turn(tool_calls=[{"name": b"f"}]),
            r"messages\[1\].tool_calls\[0\] holds a value that JSON cannot hold, of ",
        ),
        (turn(tool_calls=[{"name": float("nan")}]), r"messages\[1\].tool_calls\[0\] holds nan, which JSON cannot hold"),
        (
            turn(tool_calls=[{"function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}}]),
            r"messages\[1\].tool_calls\[0\] arguments: key 'a' is given more than once in an object",
        ),
        (turn(tool_calls=[{"name": nested(200)}]), r"messages\[1\].tool_calls\[0\] is nested too deeply"),
        (turn(reasoning_content=["x"]), r"field 'messages\[1\].reasoning_content' is not a string but list"),
        (
            SHAREGPT | {"system": "s", "system_prompt": "t"},
            "the system says different things in system and in system_pr",
        ),
        (
            openai("system", "user", "assistant") | {"system": "s"},
            "the system says different things in system and in the first message; keep one of them",
        ),
        (
            OPENAI | {"tools": [FUNCTION], "functions": [FUNCTION]},
            "fields 'tools' and 'functions' both describe tools;",
        ),
        (OPENAI | {"tools": "no"}, r"tools: not valid JSON \(.*\): 'no'"),
        (OPENAI | {"tools": {"name": "f"}}, "field 'tools' is not a list but dict"),
        (OPENAI | {"tools": ["f"]}, r"tools\[0\] is not an object but str"),
        (OPENAI | {"images": ["a.png"]}, "field 'images' would change the text, and is not read here; remove it"),
        (OPENAI | {"history": [["q", "a"]]}, "field 'history' would change the text, and is not read here"),
        (ALPACA | {"history": "x"}, "field 'history' is not a list but str"),
        (ALPACA | {"history": [["q"]]}, r"history\[0\] must be a question and its answer, got \['q'\]"),
        (ALPACA | {"history": [["q", ""]]}, "empty answer"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f(x)"}]},
            r"conversations\[1\].value: not valid JSON \(.*\): 'f\(x\)'",
        ),
    ],
)
def test_no_conversation(record, message):
    with pytest.raises(UserError, match=f"^{message}"):
        to_conversation(record)
