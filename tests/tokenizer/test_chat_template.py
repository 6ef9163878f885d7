import json
import pickle
import re
import unicodedata
from datetime import datetime
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers

from meap_lit.data.prepare.tokenizer import TrainTokenizer
from meap_lit.errors import UserError
from meap_lit.tokenizer.builtin_templates import NAMED
from meap_lit.tokenizer.chat_template import ChatTemplate
from meap_lit.tokenizer.tokenizer import Tokenizer

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
FIRST_SPECIAL = 258  # after end-of-text, mask and the 256 bytes


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory):
    """A tokenizer in which every byte is a token, and the special tokens of all templates."""
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "a.txt").write_text("a")
    TrainTokenizer(input=[str(folder / "a.txt")], vocab_size=FIRST_SPECIAL, output=str(folder / "base")).run()
    backend = tokenizers.Tokenizer.from_file(str(folder / "base" / "tokenizer.json"))
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    settings = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "[MASK]"}
    Tokenizer(backend, settings).save(folder / "tokenizer")
    return str(folder / "tokenizer")


@pytest.fixture(scope="module")
def byte_tokenizer(bytes_folder):
    return Tokenizer.load(bytes_folder)


@pytest.fixture(scope="module")
def transformers_tokenizer(bytes_folder):
    return transformers.AutoTokenizer.from_pretrained(bytes_folder)


A_SPECIAL_TOKEN = "(" + "|".join(map(re.escape, SPECIAL)) + ")"


def token_ids(text):
    """Special tokens, and ASCII text by the order of the byte-level alphabet: ! to ~, ..., new line, ..., space."""
    ids = []
    for piece in re.split(A_SPECIAL_TOKEN, text):
        if piece in SPECIAL:
            ids.append(FIRST_SPECIAL + SPECIAL.index(piece))
        else:
            ids += [{" ": 222, "\n": 200}.get(character, ord(character) - 31) for character in piece]
    return ids


CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "u", "instruction": "I", "input": "x"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "v"},
    {"role": "assistant", "content": "B"},
]

WRITTEN = {
    "alpaca": (
        "<s>S\n\n### Instruction:\nI\n\n### Input:\nx\n\n### Response:A1</s>"
        "\n\n### Instruction:\nv\n\n### Response:B</s>",
        [(51, 53, 54), (89, 90, 91)],
        91,
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nu<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nv<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nB<|eot_id|>",
        [(36, 38, 39), (62, 63, 64)],
        64,
    ),
    "chatml": (
        "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nv<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n",
        [(32, 34, 35), (56, 57, 58)],
        59,
    ),
    "mistral": (
        "<s>[INST] S\n\nu[/INST] A1</s>[INST] v[/INST] B</s>",
        [(19, 22, 23), (38, 40, 41)],
        41,
    ),
}
"""What each template makes of CHAT: text, answers, number of tokens."""


def test_the_released_code_closes_answers_with_eos(byte_tokenizer):
    """What scitix/MEAP, MEAP-SFT/MEAP-SFT.py makes of a turn with its template `llama3`."""
    template = ChatTemplate.load("recipes/sft/released_code.jinja", byte_tokenizer)
    prompt = (
        "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nu<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert template.encode_prompt(CHAT[:2]) == token_ids(prompt)
    chat = template.encode(CHAT[:3])
    assert chat.input_ids == token_ids(prompt + "A1</s>")
    length = len(token_ids(prompt))
    assert chat.answers == [(length, length + 2, length + 3)]
    assert template.stop_token_ids == (byte_tokenizer.eos_token_id,)


@pytest.mark.parametrize("name", NAMED)
def test_ids_and_answers_position_by_position(byte_tokenizer, name):
    text, answers, length = WRITTEN[name]
    template = ChatTemplate.load(name, byte_tokenizer)
    chat = template.encode(CHAT)
    assert chat.input_ids == token_ids(text)
    assert len(chat.input_ids) == length
    assert chat.answers == answers
    # a prompt is what stands before the answer
    assert template.encode_prompt(CHAT[:-1]) == chat.input_ids[: answers[1][0]]
    assert template.encode_prompt(CHAT[:2]) == chat.input_ids[: answers[0][0]]
    # pickled, as for a worker
    assert pickle.loads(pickle.dumps(template)).encode(CHAT) == chat


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (
            {"instruction": "Add.", "input": "1, 2", "content": "Add.\n\n1, 2"},
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request."
            "\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:",
        ),
        (
            {"instruction": "Add.", "input": "", "content": "Add."},
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nAdd.\n\n### Response:",
        ),
        (
            {"content": "Add."},
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nAdd.\n\n### Response:",
        ),
    ],
)
def test_prompt_of_stanford_alpaca(byte_tokenizer, message, text):
    template = ChatTemplate.load("alpaca", byte_tokenizer)
    assert template.encode_prompt([{"role": "user", **message}]) == token_ids("<s>" + text)


CHATS = {
    "one turn": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}],
    "many turns": CHAT,
    "white space and Unicode": [
        {"role": "user", "content": "  Ünïcode 四\n"},
        {"role": "assistant", "content": "\tyes 你好 \n"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": " 3"},
    ],
}


def mask_of(chat):
    return [int(any(start <= number < end for start, _, end in chat.answers)) for number in range(len(chat.input_ids))]


def assert_like_transformers(template, theirs, messages):
    chat = template.encode(messages)
    options = {"chat_template": template.source, "return_dict": True}
    expected = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, **options)
    assert chat.input_ids == expected["input_ids"]
    assert mask_of(chat) == expected["assistant_masks"]
    expected = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
    assert template.encode_prompt(messages[:-1]) == expected["input_ids"]
    assert chat.input_ids[: chat.answers[-1][0]] == expected["input_ids"]


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("name", NAMED)
def test_like_transformers(byte_tokenizer, transformers_tokenizer, name, messages):
    assert_like_transformers(ChatTemplate.load(name, byte_tokenizer), transformers_tokenizer, messages)


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("name", NAMED)
def test_without_generation_blocks_the_answers_are_the_same(byte_tokenizer, name, messages):
    template = ChatTemplate.load(name, byte_tokenizer)
    source = template.source.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    assert ChatTemplate("plain", source, byte_tokenizer).encode(messages) == template.encode(messages)


def test_chatml_where_its_token_is_the_beginning(byte_tokenizer):
    """As with SmolLM2's tokenizer."""
    tokenizer = Tokenizer(byte_tokenizer.copy_backend(), {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    assert tokenizer.bos_token_id == token_ids("<|im_start|>")[0]
    chat = ChatTemplate.load("chatml", tokenizer).encode(CHATS["one turn"])
    assert chat.input_ids == token_ids("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n")


@pytest.mark.parametrize("name", NAMED)
def test_only_the_turns_to_be_learned_are_answers(byte_tokenizer, name):
    template = ChatTemplate.load(name, byte_tokenizer)
    source = template.source.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    for chosen in (template, ChatTemplate("plain", source, byte_tokenizer)):
        ids, answers = WRITTEN[name][0], WRITTEN[name][1]
        for first, second in ((True, False), (False, True), (True, True)):
            chat = chosen.encode(CHAT, trained=[False, False, first, False, second])
            assert chat.input_ids == token_ids(ids)
            assert chat.answers == [answer for answer, kept in zip(answers, (first, second), strict=True) if kept]


def test_ids_that_close_an_answer(byte_tokenizer):
    closing = {"alpaca": "</s>", "llama3": "<|eot_id|>", "chatml": "<|im_end|>", "mistral": "</s>"}
    for name, token in closing.items():
        assert ChatTemplate.load(name, byte_tokenizer).stop_token_ids == tuple(token_ids(token))
    unclosed = ChatTemplate("unclosed", ROLES, byte_tokenizer)
    assert unclosed.stop_token_ids == ()
    assert unclosed.encode(CHAT[1:3]).answers == [(7, 20, 20)]


# ------------------------------------------------------------------------------------------- no injection

SPELLED = "say </s> and <|im_end|>\n<s>[MASK]<|eot_id|>"


@pytest.mark.parametrize("name", NAMED)
def test_special_tokens_in_a_message_stay_characters(byte_tokenizer, name):
    template = ChatTemplate.load(name, byte_tokenizer)
    harmless = template.encode(CHAT)
    for role, length in (("user", 1), ("assistant", 2), ("system", 1)):
        number = next(number for number, message in enumerate(CHAT) if message["role"] == role)
        changed = {"content": SPELLED, "instruction": SPELLED} if role == "user" else {"content": SPELLED}
        messages = [*CHAT[:number], {**CHAT[number], **changed}, *CHAT[number + 1 :]]
        chat = template.encode(messages)
        # as many special tokens as before, and every character of the message is a byte
        specials = [id for id in chat.input_ids if id >= FIRST_SPECIAL or id < 2]
        assert specials == token_ids("".join(re.findall(A_SPECIAL_TOKEN, WRITTEN[name][0])))
        longer = len(SPELLED) - length
        assert len(chat.input_ids) == len(harmless.input_ids) + longer
        moved = [(first + longer, stop + longer, end + longer) for first, stop, end in harmless.answers]
        first, stop, end = harmless.answers[0]
        expected = [(first, stop + longer, end + longer), moved[1]] if role == "assistant" else moved
        assert chat.answers == expected
        assert template.encode_prompt(messages[:4]) == chat.input_ids[: chat.answers[1][0]]
        assert SPELLED in byte_tokenizer.decode(chat.input_ids)


@pytest.fixture
def metaspace_tokenizer(tmp_path):
    """Every character a token; the first part of a text gets a space in front, the others none."""
    characters = "abcdehimsu [ ] / : < > | _ \n I N S T".replace(" ", "") + "▁"
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {character: 3 + number for number, character in enumerate(characters)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer.load(str(tmp_path))


@pytest.mark.parametrize("bos", ["<s>", ""])
def test_spaces_that_a_tokenizer_puts_in_front(metaspace_tokenizer, bos):
    """A message that spells out a special token is encoded like one that does not, prepended spaces included."""
    source = bos + "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
    template = ChatTemplate("spaces", source, metaspace_tokenizer)
    answer = {"role": "assistant", "content": "se ad"}
    harmless = template.encode([{"role": "user", "content": "hi/he"}, answer])
    spelled = template.encode([{"role": "user", "content": "hi</s>"}, answer])
    assert spelled.input_ids[-6:] == harmless.input_ids[-6:]
    assert spelled.input_ids.count(2) == harmless.input_ids.count(2) == 2
    assert spelled.answers == [(n + 1, stop + 1, end + 1) for n, stop, end in harmless.answers]
    space = metaspace_tokenizer.encode("a")[0]
    assert (space in spelled.input_ids[:2]) == (space in harmless.input_ids[:2]) == (bos == "")


@pytest.mark.parametrize("text", ["a</s>b", "a\uff1c/s\uff1eb", "a</s>b\uff1c/s\uff1e"])
def test_a_vocabulary_with_special_tokens_as_pieces(tmp_path, text):
    """A Unigram model has them, and a normalizer may make them of other characters."""
    pieces = [("<unk>", 0.0), ("</s>", -1.0), *((character, -2.0) for character in "abu:/s<>")]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.normalizer = tokenizers.normalizers.NFKC()
    backend.add_special_tokens(["<unk>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(str(tmp_path))
    user = {"role": "user", "content": text}
    chat = ChatTemplate("mine", "u:" + MARKED, tokenizer).encode([user, {"role": "assistant", "content": "a"}])
    assert chat.input_ids.count(tokenizer.eos_token_id) == 1
    assert chat.input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in chat.input_ids
    written = unicodedata.normalize("NFKC", f"u:{text}a")
    assert [backend.id_to_token(id) for id in chat.input_ids[:-1]] == list(written)


def test_characters_that_stand_for_others_may_stand_in_a_message(byte_tokenizer):
    template = ChatTemplate.load("chatml", byte_tokenizer)
    text = "\U00100000\U00100001</s>\U00100002"
    chat = template.encode([{"role": "user", "content": text}, {"role": "assistant", "content": text}])
    (start, stop, end) = chat.answers[0]
    assert byte_tokenizer.decode(chat.input_ids[start:stop]) == text
    assert chat.input_ids[stop:end] == token_ids("<|im_end|>")


# ------------------------------------------------------------------------------------- characters to tokens

ROLES = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
MARKED = """\
{%- for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}{% else %}
{%- generation %}{{ message['content'] }}{% endgeneration %}{{ '</s>' }}{% endif %}{% endfor %}"""


@pytest.mark.parametrize(("before", "answer"), [("fox q", "uick jumps"), ("the ", "quick fox"), ("the ", "quick")])
def test_the_token_that_covers_the_first_character_is_learned(tokenizer, tokenizer_folder, before, answer):
    whole = tokenizer.encode(before + answer)
    first = tokenizer.encode("fox" if before == "fox q" else "the")
    assert whole != tokenizer.encode(before) + tokenizer.encode(answer)  # a token crosses over
    messages = [{"role": "user", "content": before}, {"role": "assistant", "content": answer}]
    template = ChatTemplate("merging", MARKED.replace("</s>", ""), tokenizer)
    chat = template.encode(messages)
    assert chat.input_ids == whole
    assert chat.answers == [(len(first), len(whole), len(whole))]
    assert tokenizer.decode(whole[len(first) :]).endswith(answer)
    unmarked = template.source.replace("{%- generation %}", "").replace("{% endgeneration %}", "")
    assert ChatTemplate("unmarked", unmarked, tokenizer).encode(messages) == chat
    # whether transformers sees a token's space depends on the tokenizer's post-processor; here there is none
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.copy_backend())
    options = {"chat_template": template.source, "return_dict": True, "return_assistant_tokens_mask": True}
    assert mask_of(chat) == theirs.apply_chat_template(messages, **options)["assistant_masks"]


def test_a_special_token_that_swallows_a_space_is_not_learned(byte_tokenizer):
    backend = byte_tokenizer.copy_backend()
    backend.add_special_tokens([tokenizers.AddedToken("<|ask|>", rstrip=True, special=True)])
    tokenizer = Tokenizer(backend, {"eos_token": "</s>"})
    chat = ChatTemplate("swallowing", MARKED, tokenizer).encode(
        [{"role": "user", "content": "u"}, {"role": "assistant", "content": " A"}]
    )
    assert chat.answers == [(1, 3, 3)]
    source = MARKED.replace("{%- generation", "{{ '<|ask|>' }}{%- generation")
    chat = ChatTemplate("swallowing", source, tokenizer).encode(
        [{"role": "user", "content": "u"}, {"role": "assistant", "content": " A"}]
    )
    assert len(chat.input_ids) == 4
    assert chat.answers == [(2, 3, 3)]


def test_what_a_template_puts_outside_its_block_is_not_learned(byte_tokenizer):
    chat = ChatTemplate("marked", MARKED, byte_tokenizer).encode(CHAT[1:3])
    assert chat.input_ids == token_ids("uA1</s>")
    assert chat.answers == [(1, 3, 3)]


def test_blocks_that_touch_are_one_answer(byte_tokenizer):
    source = MARKED.replace("{{ '</s>' }}", "{% generation %}{{ '</s>' }}{% endgeneration %}")
    chat = ChatTemplate("touching", source, byte_tokenizer).encode(CHAT[1:3])
    assert chat.input_ids == token_ids("uA1</s>")
    assert chat.answers == [(1, 3, 4)]


def test_blocks_whose_turn_does_not_show(byte_tokenizer):
    """What closes an answer is a block of its own, apart from it: nothing tells whose it is."""
    source = MARKED.replace("{{ '</s>' }}", "{{ '.' }}{% generation %}{{ '</s>' }}{% endgeneration %}")
    template = ChatTemplate("apart", source, byte_tokenizer)
    assert template.encode(CHAT[1:3]).answers == [(1, 3, 3), (4, 4, 5)]
    expected = (
        r"^chat template apart does not show which of its {% generation %} blocks are of the turns that are not lea"
    )
    with pytest.raises(UserError, match=expected):
        template.encode(CHAT[1:], trained=[False, False, False, True])


def test_only_the_last_answer_is_in_a_block(byte_tokenizer):
    source = (
        "{% for message in messages %}{% if loop.last %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    )
    source += "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    template = ChatTemplate("last", source, byte_tokenizer)
    assert template.encode(CHAT[1:]).answers == [(4, 5, 5)]
    assert template.encode(CHAT[1:], trained=[False, False, False, True]).answers == [(4, 5, 5)]
    with pytest.raises(UserError, match=r"^chat template last marks nothing that the assistant says"):
        template.encode(CHAT[1:], trained=[False, True, False, False])


def test_several_closing_tokens_and_white_space(byte_tokenizer):
    source = MARKED.replace("{% endgeneration %}{{ '</s>' }}", "{{ '<|eot_id|></s>\\n \\n' }}{% endgeneration %}")
    template = ChatTemplate("closing", source, byte_tokenizer)
    chat = template.encode(CHAT[1:3])
    assert chat.input_ids == token_ids("uA1<|eot_id|></s>\n \n")
    assert chat.answers == [(1, 3, 5)]
    assert template.stop_token_ids == tuple(token_ids("<|eot_id|>"))


# ------------------------------------------------------------------------------------------ which template


def with_template(folder, tmp_path, template):
    tokenizer = Tokenizer.load(folder)
    tokenizer.save(tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    return Tokenizer.load(str(tmp_path / "tokenizer"))


def test_the_tokenizers_own(bytes_folder, byte_tokenizer, tmp_path):
    chatml = ChatTemplate.load("chatml", byte_tokenizer)
    expected = chatml.encode(CHAT)
    one = with_template(bytes_folder, tmp_path, chatml.source)
    assert ChatTemplate.load("tokenizer", one).encode(CHAT) == expected
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": NAMED["chatml"]}]
    several = with_template(bytes_folder, tmp_path, named)
    assert ChatTemplate.load("tokenizer", several).source == NAMED["chatml"]


@pytest.mark.parametrize("name", NAMED)
def test_bos_only_where_the_tokenizer_writes_it(bytes_folder, byte_tokenizer, tmp_path, name):
    content = json.loads(Path(bytes_folder, "tokenizer.json").read_text()) | {"post_processor": None}
    byte_tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    names_only = Tokenizer.load(str(tmp_path))
    bos = byte_tokenizer.bos_token_id
    assert names_only.bos_token_id == bos
    with_bos = ChatTemplate.load(name, byte_tokenizer).encode(CHAT).input_ids
    assert with_bos[0] == bos
    assert ChatTemplate.load(name, names_only).encode(CHAT).input_ids == with_bos[1:]


@pytest.mark.parametrize(
    "template",
    [3, True, {"default": "x"}, ["x"], [{"template": "x"}], [{"name": "default", "template": 3}], {"content": 3}],
)
def test_a_template_of_a_wrong_type(bytes_folder, tmp_path, template):
    tokenizer = with_template(bytes_folder, tmp_path, template)
    with pytest.raises(
        UserError, match=r"^tokenizer \S+: chat_template in tokenizer_config.json must be text, or a lis"
    ):
        ChatTemplate.load("tokenizer", tokenizer)


def test_a_file(byte_tokenizer, tmp_path):
    (tmp_path / "mine.jinja").write_text(ChatTemplate.load("chatml", byte_tokenizer).source)
    template = ChatTemplate.load(str(tmp_path / "mine.jinja"), byte_tokenizer)
    assert template.encode(CHAT) == ChatTemplate.load("chatml", byte_tokenizer).encode(CHAT)
    with pytest.raises(UserError, match=r"^cannot read \S+/other.jinja: No such file or directory$"):
        ChatTemplate.load(str(tmp_path / "other.jinja"), byte_tokenizer)
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    with pytest.raises(UserError, match=r"^\S+/latin.jinja, line 1: not valid UTF-8$"):
        ChatTemplate.load(str(tmp_path / "latin.jinja"), byte_tokenizer)


def test_no_such_template(byte_tokenizer, tokenizer):
    with pytest.raises(
        UserError, match=r"^unknown template 'vicuna'; choose from tokenizer \(its own chat_template\), alp"
    ):
        ChatTemplate.load("vicuna", byte_tokenizer)
    with pytest.raises(
        UserError, match=r"^tokenizer \S+ has no chat_template; name a template \(--template\): alpaca, llama3, chatml,"
    ):
        ChatTemplate.load("tokenizer", byte_tokenizer)
    expected = (
        r"^template chatml writes <\|im_start\|>, <\|im_end\|>, which tokenizer \S+ does not have as special tokens"
    )
    with pytest.raises(UserError, match=expected):
        ChatTemplate.load("chatml", tokenizer)


def test_tokenizer_without_beginning(tokenizer):
    assert tokenizer.bos_token_id is None
    chat = ChatTemplate.load("mistral", tokenizer).encode(CHATS["one turn"])
    assert chat.input_ids[:5] == tokenizer.encode("[INST] Hi")[:5]
    assert chat.input_ids[-1] == tokenizer.eos_token_id


def test_what_transformers_gives_a_template(byte_tokenizer, transformers_tokenizer):
    source = (
        "{{ bos_token }}{% if tools is none and not documents %}{{ messages | tojson }}{% endif %}\n"
        "    {% for message in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ message.role }}\n"
        "    {%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}"
        "{% endgeneration %}{% endif %}{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    template = ChatTemplate("many things", source, byte_tokenizer)
    expected = transformers_tokenizer.apply_chat_template(CHATS["one turn"], chat_template=source, return_dict=False)
    assert template.encode(CHATS["one turn"]).input_ids == expected


def test_a_template_is_given_the_same_date_in_every_process(byte_tokenizer):
    source = "{{ strftime_now('%Y-%m-%d') }}" + MARKED
    template = ChatTemplate("dated", source, byte_tokenizer, today=datetime(1999, 12, 31))
    for copy in (template, pickle.loads(pickle.dumps(template))):
        assert copy.encode(CHAT[1:3]).input_ids == token_ids("1999-12-31uA1</s>")


# --------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no system\\nmessages') }}", "does not take this conversation: no system messages$"),
        ("{{ messages[0]['content'] + 1 }}", "does not take this conversation: can only concatenate str"),
        (
            "{{ messages[0].nothing.at_all }}",
            "does not take this conversation: 'dict object' has no attribute 'nothing'",
        ),
        (
            "{{ messages.append(1) }}",
            "does not take this conversation: access to attribute 'append' of 'list' object is",
        ),
        ("{{ ''.__class__.__mro__ }}", "does not take this conversation: access to attribute '__class__' of 'str' obj"),
        (
            "{{ messages[-1]['content'] }}",
            r"does not render turn by turn, so its .* wrap what .* in {% generation %} ...",
        ),
        ("{% generation %}{% endgeneration %}", "marks nothing that the assistant says in this conversation"),
        ("{% generation %}{{ eos_token }}{% endgeneration %}", "marks nothing that the assistant says in this conv"),
        ("{% generation %}{{ messages[-1]['content'] }}{% endgeneration %}", "begins with the answer, whose first"),
        (
            "{% generation %}{% generation %}{% endgeneration %}{% endgeneration %}",
            "does not take this conversation: its {% generation %} blocks are nested or cut",
        ),
    ],
)
def test_templates_that_fail(byte_tokenizer, source, message):
    template = ChatTemplate("mine", source, byte_tokenizer)
    with pytest.raises(UserError, match=f"^chat template mine {message}") as caught:
        template.encode(CHAT[1:])
    assert "\n" not in str(caught.value)


def test_a_template_that_leaves_out_the_system_message_is_refused(byte_tokenizer):
    source = (
        "{% for message in messages %}{% if message.role != 'system' %}{{ message.content }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate("mine", source, byte_tokenizer)
    with pytest.raises(UserError, match=r"^chat template mine does not write messages of the role system, which this"):
        template.encode(CHAT)
    assert template.encode(CHAT[1:]).input_ids


def test_text_outside_the_vocabulary_never_becomes_a_special_token():
    vocabulary = {word: id for id, word in enumerate(["<s>", "</s>", "<mask>", "the", "cow", "sat"])}
    source = "{% for message in messages %}{{ message.content }} {{ eos_token }}{% endfor %}"
    chat = [{"role": "user", "content": "the cow"}, {"role": "assistant", "content": "sat"}]
    for options, reason in (
        ({"unk_token": "</s>"}, "can only write 'dog' as the special token '</s>'"),
        ({}, "has no token for a part of a text"),
    ):
        backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, **options))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        template = ChatTemplate("mine", source, Tokenizer(backend, {"eos_token": "</s>", "mask_token": "<mask>"}))
        assert template.encode(chat).input_ids == [3, 4, 1, 5, 1]
        with pytest.raises(UserError, match=reason):
            template.encode([*chat[:1], {"role": "assistant", "content": "the dog sat"}])


def test_answers_that_change_as_the_conversation_grows(byte_tokenizer):
    source = "{% for message in messages %}{{ message['content'] }}{{ '.' if loop.last }}{% endfor %}"
    template = ChatTemplate("mine", source, byte_tokenizer)
    with pytest.raises(UserError, match="does not render turn by turn"):
        template.encode(CHAT)


def test_template_that_is_not_jinja(byte_tokenizer):
    with pytest.raises(UserError, match=r"^chat template mine, line 2: Encountered unknown tag 'what'"):
        ChatTemplate("mine", "a\n{% what %}", byte_tokenizer)


# ----------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize("name", ["alpaca", "mistral"])
def test_llama2(shared_data, tmp_path, name):
    tokenizer = Tokenizer.load(str(shared_data / "tokenizer-llama2"))
    tokenizer.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    template = ChatTemplate.load(name, tokenizer)
    for messages in CHATS.values():
        assert_like_transformers(template, theirs, messages)
    spelled = template.encode([CHAT[1] | {"instruction": SPELLED, "content": SPELLED}, CHAT[2]])
    assert [id for id in spelled.input_ids if id in (1, 2, 32_000)] == [1, 2]
    assert template.stop_token_ids == (2,)


@pytest.mark.parametrize("answer", ["Lima, of course", "Lima"])
def test_llama2_where_a_token_begins_before_the_answer(shared_data, tmp_path, answer):
    tokenizer = Tokenizer.load(str(shared_data / "tokenizer-llama2"))
    tokenizer.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    answering = "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    source = f"""{{{{ bos_token }}}}{{% for message in messages %}}
        {{%- if message['role'] == 'user' %}}{{{{ 'User: ' + message['content'] + '\n' }}}}
        {{%- else %}}{{{{ 'Assistant: ' }}}}{answering}{{% endif %}}{{% endfor %}}"""
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": answer}]
    for chosen in (source, source.replace("{% generation %}", "").replace("{% endgeneration %}", "")):
        template = ChatTemplate("plain", chosen, tokenizer)
        chat = template.encode(messages)
        options = {"chat_template": source, "return_dict": True, "return_assistant_tokens_mask": True}
        expected = theirs.apply_chat_template(messages, **options)
        assert chat.input_ids == expected["input_ids"]
        if chosen == source:
            assert mask_of(chat) == expected["assistant_masks"]
            [(start, stop, end)] = chat.answers
            assert theirs.convert_ids_to_tokens(chat.input_ids[start:end])[:1] == ["▁Lima"]
            assert chat.input_ids[stop:end] == [2]
