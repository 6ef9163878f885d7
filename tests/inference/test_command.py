"""The command, against transformers' own generation from the same folder."""

import json
import shutil
import sys

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from meap_lit.cli import main
from meap_lit.errors import UserError
from meap_lit.evaluation.tasks.key_value import KeyValueRetrieval
from meap_lit.inference.command import Generate, TextStream
from meap_lit.inference.language_model import LanguageModel
from meap_lit.tokenizer.tokenizer import Tokenizer

VOCAB_SIZE = 320
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    """A token for each byte, then <|endoftext|> and [MASK]; no BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "[MASK]"])
    return Tokenizer(backend, {"chat_template": chat_template} if chat_template else {})


def sentencepiece_tokenizer() -> Tokenizer:
    """Built as Llama 2's: spaces are part of words, bytes stand in for unknown characters."""
    words = ["\N{LOWER ONE EIGHTH BLOCK}" + word for word in ("the", "old", "river", "")]
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *words,
        *"abcdefghijklmnopqrstuvwxyz",
    ]
    merges = []
    for word in words[:3]:  # merged from the left
        for stop in range(1, len(word)):
            if (left := word[:stop]) not in tokens:
                tokens.append(left)
            merges.append((left, word[stop]))
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend(words[3]), tokenizers.normalizers.Replace(" ", words[3])]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(words[3], " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, {})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A random Llama of transformers, whose text is mostly broken characters."""
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=256,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save(folder)
    settings = {"eos_token_id": [256, 10], "suppress_tokens": list(range(257, VOCAB_SIZE))}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return str(folder)


def theirs(checkpoint: str, prompt: str | list[int], num_tokens: int = 24) -> str:
    """Text of transformers' greedy continuation of a text or of ids; at a newline or <|endoftext|> it ends."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    input_ids = tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
    output = model.generate(torch.tensor([input_ids]), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    new_ids = output[0, len(input_ids) :].tolist()
    if new_ids[-1] in (256, 10):
        new_ids.pop()
    return tokenizer.decode(new_ids, skip_special_tokens=True)


def generated(capsys, *arguments: str) -> str:
    assert main(["generate", *arguments]) == 0
    return capsys.readouterr().out


def test_one_prompt_is_continued_as_transformers_does(checkpoint, capsys):
    for text in ("The old river", "Näh", ""):
        expected = theirs(checkpoint, text or [256])  # transformers has nothing to begin with
        assert len(expected) > 5
        out = generated(capsys, "--checkpoint", checkpoint, "--prompt", text, "--max_new_tokens", "24")
        assert out == expected + "\n"


def test_a_prompt_is_whole_although_truncation_is_stored(checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "called")
    called = AutoTokenizer.from_pretrained(checkpoint, pad_token="<|endoftext|>")
    called(["The old river", "a"], truncation=True, max_length=4, padding="max_length")
    called.save_pretrained(tmp_path / "called")
    assert json.loads((tmp_path / "called" / "tokenizer.json").read_text())["truncation"]["max_length"] == 4
    options = ["--prompt", "The old river", "--max_new_tokens", "24"]
    out = generated(capsys, "--checkpoint", str(tmp_path / "called"), *options)
    assert out == generated(capsys, "--checkpoint", checkpoint, *options)
    model = LanguageModel(str(tmp_path / "called"), device="cpu")
    (item,) = KeyValueRetrieval(num_pairs=3, num_sets=1, gold=(0,)).items(model)
    assert len(item.input_ids) > 100


def test_several_prompts_and_a_file_are_printed_in_order(checkpoint, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("two\nlines\n")
    expected = [theirs(checkpoint, text) for text in ("a", "a longer one", "two\nlines")]
    out = generated(
        capsys,
        *("--checkpoint", checkpoint, "--prompt", "a", "a longer one", "--prompt_file", str(tmp_path / "prompt.txt")),
        *("--max_new_tokens", "24", "--batch_size", "2"),
    )
    assert out == "".join(f"--- {number} of 3\n{text}\n" for number, text in enumerate(expected, start=1))


def test_chat_renders_the_template(checkpoint, capsys):
    theirs_tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    messages = [{"role": "system", "content": "Sing."}, {"role": "user", "content": "Who?"}]
    ids = theirs_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    expected = theirs(checkpoint, ids)
    Generate(checkpoint=checkpoint, prompt=["Who?"], chat=True, system="Sing.", max_new_tokens=24).run()
    assert capsys.readouterr().out == expected + "\n"
    plain = generated(capsys, "--checkpoint", checkpoint, "--prompt", "Who?", "--max_new_tokens", "24")
    assert plain != expected + "\n"


def test_a_single_text_is_printed_as_it_grows(checkpoint, monkeypatch):
    written = []
    monkeypatch.setattr(sys.stdout, "write", lambda text: written.append(text))
    assert main(["generate", "--checkpoint", checkpoint, "--prompt", "The old", "--max_new_tokens", "24"]) == 0
    pieces = [piece for piece in written if piece]
    assert len(pieces) > 5
    assert "".join(pieces) == theirs(checkpoint, "The old") + "\n"


def test_sampling_follows_its_seed(checkpoint, capsys):
    options = ["--checkpoint", checkpoint, "--prompt", "The", "--temperature", "1.5", "--top_k", "50", "--top_p", "0.9"]
    options += ["--max_new_tokens", "24"]
    one, two = (generated(capsys, *options, "--seed", "1") for _ in range(2))
    assert one == two
    assert generated(capsys, *options, "--seed", "2") != one


def test_bfloat16_and_device(checkpoint, capsys):
    options = ["--checkpoint", checkpoint, "--prompt", "The", "--max_new_tokens", "24"]
    out = generated(capsys, *options, "--dtype", "bfloat16", "--device", "cpu")
    assert out.strip()


def test_mask_token_and_rows_without_a_token_are_never_generated(tmp_path, capsys):
    """A model that finds [MASK] most likely, then a row of the padding, then the letter x, whatever it reads."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(config)
    tokenizer = byte_tokenizer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.fill_(1)
        model.model.norm.weight.fill_(1)
        for rank, token_id in enumerate([*tokenizer.encode("x"), VOCAB_SIZE - 1, tokenizer.mask_token_id], start=1):
            model.lm_head.weight[token_id] = rank
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    tokenizer.save(tmp_path)
    out = generated(capsys, "--checkpoint", str(tmp_path), "--prompt", "a", "--max_new_tokens", "5")
    assert out == "xxxxx\n"


# ------------------------------------------------------------------------------------------------ wrong input


@pytest.fixture
def without_tokenizer(checkpoint, tmp_path) -> str:
    LlamaForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "bare")
    return str(tmp_path / "bare")


def complaint(capsys, *arguments: str) -> str:
    assert main(["generate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no prompt; give one with --prompt or --prompt_file"),
        (
            ["--prompt", "a" * 41, "b"],
            "1 of 2 prompts leave no room for max_new_tokens 24 in the model's context of 64 tokens: "
            "the longest has 41; shorten them or lower max_new_tokens",
        ),
        (["--prompt", "a", "--max_new_tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--prompt", "a", "--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be at least 0, got -1"),
        (
            ["--prompt", "a", "--system", "b"],
            "system and template do nothing without chat; add --chat or leave them out",
        ),
        (["--prompt", "a", "--device", "cuda"], "device cuda is not available; use --device cpu"),
        (["--prompt", "a", "--tokenizer", "nowhere"], "tokenizer nowhere does not exist"),
        (
            ["--prompt", "caf\udce9"],
            r"prompt 'caf\udce9' is not valid UTF-8; write it to a file in UTF-8 for --prompt_file",
        ),
        (["--prompt_file", "nowhere.txt"], "cannot read prompt_file nowhere.txt: [Errno 2] No such file or directory"),
        (["--prompt", "a", "--template", "alpaca"], "system and template do nothing without chat"),
    ],
)
def test_wrong_input_ends_in_one_line(checkpoint, capsys, monkeypatch, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    few = [] if "--max_new_tokens" in options else ["--max_new_tokens", "24"]
    assert complaint(capsys, "--checkpoint", checkpoint, *options, *few).startswith(f"error: {message}")


def test_checkpoint_without_tokenizer(without_tokenizer, checkpoint, capsys):
    message = f"error: checkpoint {without_tokenizer} has no tokenizer; name that of its training with --tokenizer"
    assert complaint(capsys, "--checkpoint", without_tokenizer, "--prompt", "a") == message
    few = ["--prompt", "a", "--max_new_tokens", "4"]
    named = generated(capsys, "--checkpoint", without_tokenizer, "--tokenizer", checkpoint, *few)
    assert named == generated(capsys, "--checkpoint", checkpoint, *few)


def test_tokenizer_of_another_model(checkpoint, tmp_path, capsys):
    backend = byte_tokenizer().copy_backend()
    backend.add_tokens([f"word{number}" for number in range(100)])
    Tokenizer(backend, {}).save(tmp_path)
    line = complaint(capsys, "--checkpoint", checkpoint, "--prompt", "a", "--tokenizer", str(tmp_path))
    for part in (f"{VOCAB_SIZE} vocabulary rows", "358 ids", str(tmp_path)):
        assert part in line


@pytest.mark.parametrize(
    ("template", "message"),
    [("tokenizer", "has no chat_template; name a template"), ("cats", "unknown template 'cats'")],
)
def test_chat_without_a_template(checkpoint, tmp_path, template, message):
    byte_tokenizer(chat_template=None).save(tmp_path)
    with pytest.raises(UserError, match=message):
        Generate(checkpoint=checkpoint, tokenizer=str(tmp_path), prompt=["a"], chat=True, template=template).run()


# ------------------------------------------------------------------------------------------------ text as it grows


def pieces_of(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


def test_a_character_is_told_when_its_last_byte_is_there():
    tokenizer = byte_tokenizer()
    pieces = pieces_of(tokenizer, tokenizer.encode("So "), tokenizer.encode("aé你🙂b"))
    assert pieces == ["a", "", "é", "", "", "你", "", "", "", "🙂", "b", ""]


def test_a_character_that_is_never_complete_is_told_at_the_end():
    tokenizer = byte_tokenizer()
    pieces = pieces_of(tokenizer, [], tokenizer.encode("a🙂")[:-1])
    assert pieces == ["a", "", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_a_broken_character_is_told_with_the_next_whole_one():
    tokenizer = byte_tokenizer()
    ids = [*tokenizer.encode("é")[:1], *tokenizer.encode("ab")]
    assert pieces_of(tokenizer, [], ids) == ["", "\N{REPLACEMENT CHARACTER}a", "b", ""]


def test_spaces_between_words_are_kept():
    tokenizer = sentencepiece_tokenizer()
    prompt, whole = tokenizer.encode("the old"), tokenizer.encode("the old river the é sea")
    assert whole[: len(prompt)] == prompt
    pieces = pieces_of(tokenizer, [tokenizer.bos_token_id, *prompt], whole[len(prompt) :])
    assert pieces[:2] == [" river", " the"]
    assert "".join(pieces) == " river the é sea"
    assert "".join(pieces_of(tokenizer, [tokenizer.bos_token_id], whole)) == "the old river the é sea"


def test_special_tokens_are_not_told():
    tokenizer = sentencepiece_tokenizer()
    first, second = tokenizer.encode("old river")
    ids = [first, tokenizer.eos_token_id, second]
    assert pieces_of(tokenizer, [tokenizer.bos_token_id], ids) == ["old", "", " river", ""]
