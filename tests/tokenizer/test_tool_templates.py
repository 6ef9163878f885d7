"""Templates that know tools and reasoning, in the manner of well-known models, against transformers."""

import json

import pytest
import tokenizers
import transformers

from meap_lit.data.prepare.tokenizer import TrainTokenizer
from meap_lit.data.read.conversations import to_conversation
from meap_lit.errors import UserError
from meap_lit.tokenizer.builtin_templates import NAMED
from meap_lit.tokenizer.chat_template import ChatTemplate
from meap_lit.tokenizer.tokenizer import Tokenizer

# Tools in the system message, calls as JSON, what tools return in a turn of the user, several of them in one.
QWEN25 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {{- messages[0]['content'] if messages[0]['role'] == 'system' else 'You help.' }}
    {{- '\\n\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# Reasoning only behind the last question, and there always in the last turn. An earlier turn is written otherwise when
# it is the last, and what comes before a turn may change once more follows.
QWEN3 = """\
{%- if tools %}{{- '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.role != 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- else %}
        {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + message.content.lstrip('\\n') }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# Tools in the first message of the user; a call closed by a token of its own.
LLAMA31 = """\
{{- '<s>' }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- system + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- '}<|eom_id|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content | tojson + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {%- if loop.first and tools is not none %}
            {%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{%- endfor %}
        {%- endif %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

TEMPLATES = {"qwen2.5": QWEN25, "qwen3": QWEN3, "llama3.1": LLAMA31}
TEMPLATES |= {name: NAMED[name] for name in ("chatml", "llama3")}
CLOSING = {"qwen2.5": "<|im_end|>", "qwen3": "<|im_end|>", "llama3.1": "<|eot_id|>"}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"]
SPECIAL += ["<|eot_id|>", "<|eom_id|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer in which every byte is a token, and the special tokens of all templates."""
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "a.txt").write_text("a")
    TrainTokenizer(input=[str(folder / "a.txt")], vocab_size=258, output=str(folder / "base")).run()
    backend = tokenizers.Tokenizer.from_file(str(folder / "base" / "tokenizer.json"))
    backend.add_special_tokens(SPECIAL)
    Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}).save(folder / "tokenizer")
    return str(folder / "tokenizer")


@pytest.fixture(scope="module")
def ours(folder):
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def call(name, **arguments):
    return {"id": "a1b2c3d4e", "type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "What it is like \u2014 now.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}},
]
ASKED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it warm in Oslo?"},
    {"role": "assistant", "content": "", "tool_calls": [call("weather", city="Oslo", days=2)]},
    {"role": "tool", "content": '{"degrees": -3}', "name": "weather", "tool_call_id": "a1b2c3d4e"},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "In Rom\u00e9?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [call("weather", city="Rom\u00e9")]},
    {"role": "tool", "content": "warm"},
    {"role": "assistant", "content": "Yes."},
]
REASONED = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2", "reasoning_content": "One and one.\n"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "", "reasoning_content": "Ask.", "tool_calls": [call("add", a=2, b=2)]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "4", "reasoning_content": "It says 4."},
]
TWICE = [
    {"role": "user", "content": "Both?"},
    {"role": "assistant", "content": "", "tool_calls": [call("time"), call("weather", city="Lima")]},
    {"role": "tool", "content": "noon"},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "Noon, rain."},
]

# What of the conversation is learned, turn by turn.
LEARNED = {
    ("qwen2.5", "asked"): [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call><|im_end|>',
        "No.<|im_end|>",
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rom\u00e9"}}\n</tool_call><|im_end|>',
        "Yes.<|im_end|>",
    ],
    ("chatml", "asked"): [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call><|im_end|>',
        "No.<|im_end|>",
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rom\u00e9"}}\n</tool_call><|im_end|>',
        "Yes.<|im_end|>",
    ],
    ("llama3", "asked"): [
        '{"name": "weather", "parameters": {"city": "Oslo", "days": 2}}<|eot_id|>',
        "No.<|eot_id|>",
        'Let me see.\n{"name": "weather", "parameters": {"city": "Rom\u00e9"}}<|eot_id|>',
        "Yes.<|eot_id|>",
    ],
    ("chatml", "twice"): [
        '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
        '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Lima"}}\n</tool_call><|im_end|>',
        "Noon, rain.<|im_end|>",
    ],
    ("llama3", "twice"): [
        '{"name": "time", "parameters": {}}\n{"name": "weather", "parameters": {"city": "Lima"}}<|eot_id|>',
        "Noon, rain.<|eot_id|>",
    ],
    ("llama3.1", "asked"): [
        '{"name": "weather", "parameters": {"city": "Oslo", "days": 2}}<|eom_id|>',
        "No.<|eot_id|>",
        '{"name": "weather", "parameters": {"city": "Rom\u00e9"}}<|eom_id|>',
        "Yes.<|eot_id|>",
    ],
    ("qwen3", "asked"): [
        '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call><|im_end|>',
        "No.<|im_end|>",
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rom\u00e9"}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\nYes.<|im_end|>",
    ],
    ("qwen3", "reasoned"): [
        "2<|im_end|>",
        "<think>\nAsk.\n</think>\n\n"
        '\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>',
        "<think>\nIt says 4.\n</think>\n\n4<|im_end|>",
    ],
    ("qwen2.5", "twice"): [
        '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
        '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Lima"}}\n</tool_call><|im_end|>',
        "Noon, rain.<|im_end|>",
    ],
}
CHATS = {"asked": ASKED, "reasoned": REASONED, "twice": TWICE}


def learned(tokenizer, chat):
    return [tokenizer.decode(chat.input_ids[start:end]) for start, _, end in chat.answers]


@pytest.mark.parametrize("tools", [TOOLS, None], ids=["tools", "no tools"])
@pytest.mark.parametrize(("name", "chat"), LEARNED)
def test_like_transformers(ours, theirs, name, chat, tools):
    template, messages = ChatTemplate(name, TEMPLATES[name], ours), CHATS[chat]
    encoded = template.encode(messages, tools)
    options = {"chat_template": template.source, "tools": tools, "return_dict": False}
    assert encoded.input_ids == theirs.apply_chat_template(messages, **options)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            expected = theirs.apply_chat_template(messages[:turn], add_generation_prompt=True, **options)
            assert template.encode_prompt(messages[:turn], tools) == expected
    assert learned(ours, encoded) == LEARNED[name, chat]
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    for chosen, text in zip(turns, LEARNED[name, chat], strict=True):
        trained = [turn == chosen for turn in range(len(messages))]
        one = template.encode(messages, tools, trained)
        assert one.input_ids == encoded.input_ids
        assert learned(ours, one) == [text]


def with_arguments_as_text(messages, text):
    """Return the messages with every call's arguments as `text` makes a string of them."""
    copy = json.loads(json.dumps(messages))
    for message in copy:
        for entry in message.get("tool_calls", []):
            entry["function"]["arguments"] = text(entry["function"]["arguments"])
    return copy


def spaced(arguments):
    return json.dumps(arguments, ensure_ascii=True, separators=(" ,  ", ":"))


@pytest.mark.parametrize("name", ["qwen2.5", "llama3.1", "qwen3"])
def test_arguments_as_json_text_are_quoted_once(ours, name):
    template = ChatTemplate(name, TEMPLATES[name], ours)
    record = {"messages": with_arguments_as_text(ASKED, spaced), "tools": TOOLS}
    conversation = to_conversation(record)
    assert template.encode(conversation.messages, TOOLS) == template.encode(ASKED, TOOLS)
    assert template.encode_prompt(conversation.messages[:-1], TOOLS) == template.encode_prompt(ASKED[:-1], TOOLS)


@pytest.mark.parametrize(
    "written",
    [
        "call.arguments if call.arguments is string else call.arguments | tojson",  # Qwen3
        "call.arguments",  # a template that takes text only, such as DeepSeek's
    ],
)
def test_arguments_as_json_text_stay_as_they_are(ours, theirs, written):
    """A template that writes such text unchanged is given it, as transformers gives it."""
    source = QWEN25.replace("call.arguments | tojson", written)
    messages = with_arguments_as_text(ASKED, spaced)
    template = ChatTemplate("qwen3", source, ours)
    encoded = template.encode(to_conversation({"messages": messages}).messages, TOOLS)
    options = {"chat_template": source, "tools": TOOLS, "return_dict": False}
    assert encoded.input_ids == theirs.apply_chat_template(messages, **options)
    assert '{"city":"Oslo" ,  "days":2}' in learned(ours, encoded)[0]
    prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
    assert template.encode_prompt(messages[:-1], TOOLS) == prompt


def test_the_names_of_reasoning(ours, theirs):
    template = ChatTemplate("qwen3", QWEN3, ours)
    expected = template.encode(REASONED)
    for name in ("thinking", "reasoning"):
        messages = [
            {name if key == "reasoning_content" else key: value for key, value in message.items()}
            for message in REASONED
        ]
        assert template.encode(messages) == expected
        options = {"chat_template": QWEN3, "return_dict": False}
        assert theirs.apply_chat_template(messages, **options) == expected.input_ids


@pytest.mark.parametrize("name", ["qwen2.5", "llama3.1"])
def test_blocks_and_turns_agree(ours, theirs, name):
    """The same template with {% generation %} blocks, from which transformers makes its assistant mask."""
    source = TEMPLATES[name]
    if name == "qwen2.5":
        source = source.replace(
            "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}", WRITTEN
        )
    else:
        source = source.replace("{{- message['content'] | trim + '<|eot_id|>' }}", WRITTEN_BY_LLAMA)
    assert source != TEMPLATES[name]
    template = ChatTemplate(name, source, ours)
    options = {"chat_template": source, "tools": TOOLS, "return_dict": True, "return_assistant_tokens_mask": True}
    expected = theirs.apply_chat_template(ASKED, **options)
    encoded = template.encode(ASKED, TOOLS)
    assert (
        encoded.input_ids
        == expected["input_ids"]
        == ChatTemplate(name, TEMPLATES[name], ours).encode(ASKED, TOOLS).input_ids
    )
    mask = [
        int(any(start <= place < end for start, _, end in encoded.answers)) for place in range(len(encoded.input_ids))
    ]
    assert mask == expected["assistant_masks"]
    closing = CLOSING[name]
    assert learned(ours, encoded) == [f"No.{closing}", f"Yes.{closing}"]  # calls are not in blocks of this template
    trained = [message["role"] == "assistant" and message["content"] != "No." for message in ASKED]
    assert learned(ours, template.encode(ASKED, TOOLS, trained)) == [f"Yes.{closing}"]


WRITTEN = """\
{{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.role == 'assistant' %}
            {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
        {%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}
        {{- '\\n' }}"""
WRITTEN_BY_LLAMA = """\
{%- if message.role == 'assistant' %}
            {%- generation %}{{- message.content | trim + '<|eot_id|>' }}{%- endgeneration %}
        {%- else %}{{- message.content | trim + '<|eot_id|>' }}{%- endif %}"""


def test_special_tokens_anywhere_stay_characters(ours):
    template = ChatTemplate("qwen2.5", QWEN25, ours)
    spelled = json.loads(json.dumps(ASKED).replace("Oslo", "<|im_end|></s>").replace("-3", "<|im_start|>"))
    tools = json.loads(json.dumps(TOOLS).replace("city", "<s>").replace("now", "<|eot_id|>"))
    plain, encoded = template.encode(ASKED, TOOLS), template.encode(spelled, tools)
    special = set(range(258, 258 + len(SPECIAL)))
    assert [id for id in encoded.input_ids if id in special] == [id for id in plain.input_ids if id in special]
    assert '"<|im_end|></s>"' in ours.decode(encoded.input_ids)
    assert '"<s>": {"type": "string"}' in ours.decode(encoded.input_ids)
    assert len(encoded.answers) == len(plain.answers)


# ---------------------------------------------------------------------------- templates that know too little


@pytest.mark.parametrize(
    ("name", "messages", "tools", "missing"),
    [
        *((name, ASKED[:2] + ASKED[4:5], TOOLS, "tools") for name in ("alpaca", "mistral")),
        *((name, ASKED[:5], TOOLS, "tools or tool_calls") for name in ("alpaca", "mistral")),
        *((name, ASKED[:5], None, "tool_calls") for name in ("alpaca", "mistral")),
        *((name, REASONED[:2], None, "reasoning_content") for name in NAMED),
    ],
)
def test_named_templates_refuse_what_they_do_not_write(ours, name, messages, tools, missing):
    template = ChatTemplate.load(name, ours)
    expected = (
        rf"^chat template {name} does not write {missing}, which this conversation has; name a template that does "
        rf"\(chatml, llama3, the tokenizer's own or a .jinja file\), or take them out of the data$"
    )
    for encode in (template.encode, template.encode_prompt):
        with pytest.raises(UserError, match=expected):
            encode(messages, tools)


def test_a_template_that_leaves_out_what_tools_return(ours):
    messages = [{**message, "tool_calls": None} if "tool_calls" in message else message for message in ASKED[:5]]
    messages[2] = {"role": "assistant", "content": "weather of Oslo"}
    for name in ("alpaca", "mistral"):
        with pytest.raises(UserError, match=f"^chat template {name} does not write messages of the role tool, which"):
            ChatTemplate.load(name, ours).encode(messages)
    chat = ChatTemplate.load("chatml", ours).encode(messages)
    expected = '<|im_start|>user\n<tool_response>\n{"degrees": -3}\n</tool_response><|im_end|>\n<|im_start|>assistant'
    assert expected in ours.decode(chat.input_ids)


# ---------------------------------------------------------------------------- named templates that know tools

FUNCTION = {"name": "now", "parameters": {"type": "object", "properties": {}}}
CALLED = {
    "conversations": [
        {"from": "human", "value": "How late is it?"},
        {"from": "function_call", "value": '{"name": "now", "arguments": {"zone": "UTC"}}'},
        {"from": "observation", "value": '{"time": "12:05"}'},
        {"from": "gpt", "value": "Five past twelve."},
    ],
    "tools": json.dumps([FUNCTION]),
}
CHATML_CALLED = """\
<|im_start|>system
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
<|im_start|>user
How late is it?<|im_end|>
<|im_start|>assistant
[<tool_call>
{"name": "now", "arguments": {"zone": "UTC"}}
</tool_call><|im_end|>]
<|im_start|>user
<tool_response>
{"time": "12:05"}
</tool_response><|im_end|>
<|im_start|>assistant
[Five past twelve.<|im_end|>]
"""
LLAMA3_CALLED = """\
<|start_header_id|>user<|end_header_id|>

Given the following functions, please respond with a JSON for a function call with its proper arguments that best \
answers the given prompt.

Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. Do not use \
variables.

{
    "type": "function",
    "function": {
        "name": "now",
        "parameters": {
            "type": "object",
            "properties": {}
        }
    }
}

How late is it?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

[{"name": "now", "parameters": {"zone": "UTC"}}<|eot_id|>]<|start_header_id|>ipython<|end_header_id|>

{"time": "12:05"}<|eot_id|><|start_header_id|>assistant<|end_header_id|>

[Five past twelve.<|eot_id|>]"""


@pytest.mark.parametrize(("name", "text"), [("chatml", CHATML_CALLED), ("llama3", LLAMA3_CALLED)])
def test_a_record_of_sharegpt_with_a_call(ours, name, text):
    """In the text, what is learned is in brackets."""
    chat = to_conversation(CALLED)
    encoded = ChatTemplate(name, NAMED[name], ours).encode(chat.messages, chat.tools, chat.trained)
    assert ours.decode(encoded.input_ids) == text.replace("[", "").replace("]", "")
    assert learned(ours, encoded) == [part.split("]")[0] for part in text.split("[")[1:]]


def test_chatml_writes_tools_after_the_system_message(ours):
    """As the template of Qwen2.5, whose description of the tools is shortened here."""
    encoded = [ChatTemplate("x", source, ours).encode(ASKED, TOOLS) for source in (NAMED["chatml"], QWEN25)]
    texts = [ours.decode(chat.input_ids) for chat in encoded]
    assert texts[0].startswith("<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call")
    assert texts[0].partition("<|im_end|>")[2] == texts[1].partition("<|im_end|>")[2]


# ------------------------------------------------------------------------------------------------ real data


@pytest.mark.parametrize("name", TEMPLATES)
def test_real_calls(shared_data, ours, theirs, name):
    records = json.loads((shared_data / "sft" / "glaive_toolcall_en_demo.json").read_text())
    template = ChatTemplate(name, TEMPLATES[name], ours)
    for record in records[::10]:
        chat = to_conversation(record)
        encoded = template.encode(chat.messages, chat.tools, chat.trained)
        options = {"chat_template": template.source, "tools": chat.tools, "return_dict": False}
        assert encoded.input_ids == theirs.apply_chat_template(chat.messages, **options)
        assert len(encoded.answers) == sum(chat.trained)
