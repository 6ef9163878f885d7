import json
import pickle
import shutil
from pathlib import Path

import pytest
import tokenizers
import transformers

from meap_lit.data.tokenizer import Tokenizer, TrainTokenizer
from meap_lit.errors import UserError
from meap_lit.model.config import pad_vocab_size

SAMPLE = "The quick fox says [MASK] and <|endoftext|>, ünïcode too: 四\n\ttab"


def word_level(folder, vocab, special=(), settings=None):
    """A tokenizer of whole words, [0-9a-z</>]+ split at white space."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([token for token in special if token in vocab])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


# ------------------------------------------------------------------------------------------------- loading


def test_missing_folder_and_files(tmp_path):
    with pytest.raises(UserError, match=r"^tokenizer folder \S+/none does not exist$"):
        Tokenizer.load(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"^tokenizer folder \S+ has no tokenizer.json; save the tokenizer in the fast"):
        Tokenizer.load(str(tmp_path))


@pytest.mark.parametrize("content", ['{"version": ', "[]", '{"version": "1.0"}', "\x00"])
def test_damaged_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"\S+/tokenizer.json") as caught:
        Tokenizer.load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_no_end_of_text_token(tmp_path):
    folder = word_level(tmp_path / "t", {"<unk>": 0, "a": 1})
    with pytest.raises(UserError, match=r"names no end-of-text token; set eos_token in its tokenizer_config.json"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("token", [5, ["</s>"], {"content": None}])
def test_a_special_token_is_text(tmp_path, token):
    folder = word_level(tmp_path / "t", {"<unk>": 0, "</s>": 1}, settings={"eos_token": token})
    with pytest.raises(UserError, match=r"t/tokenizer_config.json: eos_token must be a token such as \S+, got \S+"):
        Tokenizer.load(folder)


def test_special_tokens_named_by_the_settings_go_before_well_known_ones(tmp_path):
    vocab = {"<unk>": 0, "</s>": 1, "<stop>": 2, "<s>": 3, "<hide>": 4, "a": 5}
    settings = {"eos_token": {"content": "<stop>", "special": True}, "bos_token": None, "mask_token": "<hide>"}
    tokenizer = Tokenizer.load(word_level(tmp_path / "t", vocab, settings=settings))
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.mask_token_id) == (2, 3, 4)
    assert tokenizer.vocab_size == 6

    unnamed = Tokenizer.load(word_level(tmp_path / "u", vocab))
    assert (unnamed.eos_token_id, unnamed.bos_token_id, unnamed.mask_token_id) == (1, 3, 6)
    assert unnamed.vocab_size == 7


def test_mask_id_is_free_where_ids_have_holes(tmp_path):
    # the library would count 4 entries and hand out id 4, which is taken
    vocab = {"<unk>": 0, "</s>": 1, "a": 4, "b": 6}
    folder = word_level(tmp_path / "t", vocab, special=["</s>"])
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.mask_token_id == 7
    assert tokenizer.vocab_size == 8
    assert tokenizer.encode("a b") == [4, 6]
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.load(str(tmp_path / "saved"))
    assert (again.mask_token_id, again.vocab_size, again.fingerprint) == (7, 8, tokenizer.fingerprint)


def test_a_mask_token_is_new_where_the_folder_has_none(tmp_path):
    without = Tokenizer.load(word_level(tmp_path / "a", {"<unk>": 0, "</s>": 1}))
    named = Tokenizer.load(word_level(tmp_path / "b", {"</s>": 0, "<hide>": 1}, settings={"mask_token": "<hide>"}))
    well_known = Tokenizer.load(word_level(tmp_path / "c", {"</s>": 0, "<mask>": 1}))
    assert (without.mask_is_new, named.mask_is_new, well_known.mask_is_new) == (True, False, False)
    assert pickle.loads(pickle.dumps(without)).mask_is_new  # although its backend has one by now
    without.save(tmp_path / "saved")
    assert not Tokenizer.load(str(tmp_path / "saved")).mask_is_new


def test_ids_without_token(tmp_path):
    tokenizer = Tokenizer.load(word_level(tmp_path / "t", {"<unk>": 0, "</s>": 1, "a": 4, "b": 6}))
    assert tokenizer.mask_token_id == 7
    assert tokenizer.ids_without_token(10) == [2, 3, 5, 8, 9]
    assert tokenizer.ids_without_token(5) == [2, 3]


def test_copied_files_are_those_of_the_folder(tmp_path):
    folder = Path(word_level(tmp_path / "t", {"</s>": 0}, settings={"eos_token": "</s>"}))
    (folder / "chat_template.jinja").write_text("{{ 1 }}")
    (folder / "model.safetensors").write_text("x")
    (tmp_path / "copy").mkdir()
    Tokenizer.copy_files(folder, tmp_path / "copy")
    names = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
    assert sorted(file.name for file in (tmp_path / "copy").iterdir()) == list(names)
    assert all((tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes() for name in names)


def test_loading_does_not_change_the_folder(tmp_path):
    folder = word_level(tmp_path / "t", {"<unk>": 0, "</s>": 1})
    before = {file.name: file.read_bytes() for file in (tmp_path / "t").iterdir()}
    Tokenizer.load(folder)
    assert {file.name: file.read_bytes() for file in (tmp_path / "t").iterdir()} == before


# ------------------------------------------------------------------------------------------------ encoding


def test_text_never_becomes_a_special_token(tokenizer):
    special = {tokenizer.eos_token_id, tokenizer.mask_token_id}
    for copy in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        ids = copy.encode(SAMPLE)
        assert not special & set(ids)
        assert copy.encode_batch([SAMPLE, "", "a"]) == [ids, [], copy.encode("a")]
        assert copy.decode(ids) == SAMPLE
    assert tokenizer.decode([tokenizer.mask_token_id]) == "[MASK]"
    assert tokenizer.decode([tokenizer.mask_token_id], skip_special_tokens=True) == ""


# --------------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_is_of_the_ids_alone(tmp_path, tokenizer, tokenizer_folder):
    shutil.copytree(tokenizer_folder, tmp_path / "copy")
    file = tmp_path / "copy" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["decoder"] = None
    content["truncation"] = None
    file.write_text(json.dumps(content, sort_keys=True))
    assert Tokenizer.load(str(tmp_path / "copy")).fingerprint == tokenizer.fingerprint
    assert pickle.loads(pickle.dumps(tokenizer)).fingerprint == tokenizer.fingerprint

    content["model"]["merges"] = content["model"]["merges"][:-1]
    file.write_text(json.dumps(content))
    assert Tokenizer.load(str(tmp_path / "copy")).fingerprint != tokenizer.fingerprint


def test_fingerprint_knows_the_end_of_text_token(tmp_path):
    vocab = {"<unk>": 0, "</s>": 1, "<stop>": 2}
    a = Tokenizer.load(word_level(tmp_path / "a", vocab, settings={"eos_token": "</s>"}))
    b = Tokenizer.load(word_level(tmp_path / "b", vocab, settings={"eos_token": "<stop>"}))
    assert a.fingerprint != b.fingerprint


# ------------------------------------------------------------------------------------------------ training


def test_trained_tokenizer(tokenizer):
    assert tokenizer.vocab_size == 300
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id, tokenizer.bos_token_id) == (0, 1, None)
    assert len(tokenizer.encode("The quick brown fox")) < len("The quick brown fox") / 2
    every_byte = bytes(range(256)).decode("latin-1")
    assert tokenizer.decode(tokenizer.encode(every_byte)) == every_byte


def test_transformers_reads_what_was_saved(tokenizer, tokenizer_folder):
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    assert theirs.encode("The lazy 四 zebras", add_special_tokens=False) == tokenizer.encode("The lazy 四 zebras")
    assert theirs.decode(tokenizer.encode("Pack , it !")) == "Pack , it !"
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.eos_token_id, theirs.mask_token_id) == (tokenizer.eos_token_id, tokenizer.mask_token_id)


def test_training_is_deterministic(tmp_path, tokenizer_folder, tokenizer):
    corpus = str(tmp_path / "corpus.txt")
    shutil.copy(f"{tokenizer_folder}/../corpus.txt", corpus)
    TrainTokenizer(input=[corpus], vocab_size=300, output=str(tmp_path / "again")).run()
    again, first = (Path(folder, "tokenizer.json").read_text() for folder in (tmp_path / "again", tokenizer_folder))
    assert again == first


def test_vocabulary_below_the_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(UserError, match=r"vocab_size must be at least 258 \(256 bytes and 2 special tokens\), got 257"):
        TrainTokenizer(input=[str(tmp_path / "a.txt")], vocab_size=257, output=str(tmp_path / "out")).run()
    TrainTokenizer(input=[str(tmp_path / "a.txt")], vocab_size=258, output=str(tmp_path / "out")).run()
    assert Tokenizer.load(str(tmp_path / "out")).vocab_size == 258


def test_too_little_text_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abc abc")
    (tmp_path / "b.txt").write_text("x" * 100)
    options = {"input": [str(tmp_path)], "vocab_size": 400, "max_megabytes": 1e-5}
    TrainTokenizer(**options, output=str(tmp_path / "out")).run()
    size = Tokenizer.load(str(tmp_path / "out")).vocab_size
    assert 258 < size < 400
    assert f"{size} tokens (400 asked: too little text) from 2 documents, 0.0 MB" in capsys.readouterr().out


def test_training_input_errors(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"no text to train on in \S+/empty.txt"):
        TrainTokenizer(input=[str(tmp_path / "empty.txt")], vocab_size=300, output=str(tmp_path / "out")).run()
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"bad.jsonl, line 1: no field 'text'.*; use --on_error skip"):
        TrainTokenizer(input=[str(tmp_path / "bad.jsonl")], vocab_size=300, output=str(tmp_path / "out")).run()


# ----------------------------------------------------------------------------------------------- real data


def test_llama2(shared_data, tmp_path):
    tokenizer = Tokenizer.load(str(shared_data / "tokenizer-llama2"))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (1, 2, 32_000)
    assert tokenizer.vocab_size == 32_001
    assert pad_vocab_size(tokenizer.vocab_size) == 32_064
    assert not {1, 2, 32_000} & set(tokenizer.encode("<s>[MASK]</s>"))

    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(str(tmp_path / "saved")).fingerprint == tokenizer.fingerprint
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    text = (shared_data / "haystack" / "addiction.txt").read_text()
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert theirs.encode("[MASK]", add_special_tokens=False)[-1] == theirs.mask_token_id == 32_000
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
