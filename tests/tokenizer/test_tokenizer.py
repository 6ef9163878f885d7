import json
import pickle
import shutil
from pathlib import Path

import pytest
import tokenizers
import transformers

from meap_lit.data.prepare.tokenizer import TrainTokenizer
from meap_lit.errors import UserError
from meap_lit.model.config import vocab_rows
from meap_lit.tokenizer.tokenizer import Tokenizer

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
    with pytest.raises(UserError, match=r"^tokenizer \S+/none does not exist, and is not the id of a repo"):
        Tokenizer.load(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"^tokenizer \S+ has no tokenizer.json; save the tokenizer in the fast"):
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


@pytest.mark.parametrize("role", ["eos", "bos"])
def test_a_mask_token_that_is_another_special_token_is_refused(role):
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2}
    settings = {"eos_token": "</s>", "bos_token": "<s>"}
    settings["mask_token"] = settings[f"{role}_token"]
    with pytest.raises(UserError, match=rf"has '\S+' both as mask_token and as {role}_token; .*: remove mask_token"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary)), settings)


def test_special_tokens_named_by_the_settings_go_before_well_known_ones(tmp_path):
    vocab = {"<unk>": 0, "</s>": 1, "<stop>": 2, "<s>": 3, "<hide>": 4, "a": 5}
    settings = {"eos_token": {"content": "<stop>", "special": True}, "bos_token": None, "mask_token": "<hide>"}
    tokenizer = Tokenizer.load(word_level(tmp_path / "t", vocab, settings=settings))
    # a folder that names its tokens has no BOS beside them, as for transformers
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.mask_token_id) == (2, None, 4)
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
    Tokenizer.copy_files(str(folder), tmp_path / "copy")
    names = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
    assert sorted(file.name for file in (tmp_path / "copy").iterdir()) == list(names)
    assert all((tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes() for name in names)


def test_loading_does_not_change_the_folder(tmp_path):
    folder = word_level(tmp_path / "t", {"<unk>": 0, "</s>": 1})
    before = {file.name: file.read_bytes() for file in (tmp_path / "t").iterdir()}
    Tokenizer.load(folder)
    assert {file.name: file.read_bytes() for file in (tmp_path / "t").iterdir()} == before


# ------------------------------------------------------------------------------------------------ encoding


SPELLED = "The tag </s> ends a strike and <mask> is a hole"


def unigram_model():
    letters = [(character, -5.0) for character in "▁" + "".join(sorted(set(SPELLED) - {" "}))]
    return tokenizers.models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("<mask>", 0.0), *letters], unk_id=0)


def bpe_model():
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("<", "m"), ("a", "s"), ("<m", "as"), ("k", ">"), ("<mas", "k>")]
    merges += [("</s>", "▁"), ("t", "h")]
    pieces = ["</s>", "<mask>", "▁", *sorted(set(SPELLED) - {" "})]
    pieces += [piece for pair in merges if (piece := "".join(pair)) not in pieces]
    return tokenizers.models.BPE({piece: token_id for token_id, piece in enumerate(pieces)}, merges)


def word_piece_model():
    letters = sorted(set(SPELLED) - {" "})
    pieces = ["<unk>", "</s>", "<mask>", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
    return tokenizers.models.WordPiece(vocabulary, unk_token="<unk>")


@pytest.mark.parametrize("make_model", [unigram_model, bpe_model, word_piece_model])
def test_a_vocabulary_with_special_tokens_as_pieces(make_model, tmp_path):
    backend = tokenizers.Tokenizer(make_model())
    if isinstance(backend.model, tokenizers.models.WordPiece):
        backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        backend.decoder = tokenizers.decoders.WordPiece(cleanup=False)
    else:
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        backend.decoder = tokenizers.decoders.Metaspace()
    raw = backend.encode(SPELLED).tokens
    assert all(any(piece in token for token in raw) for piece in ("</s>", "<mask>")), "nothing to be prevented"
    backend.add_tokens(["strike"])  # an ordinary one keeps its id
    tokenizer = Tokenizer(backend, {"eos_token": "</s>"})
    tokenizer.save(tmp_path / "saved")
    for copy in (tokenizer, pickle.loads(pickle.dumps(tokenizer)), Tokenizer.load(str(tmp_path / "saved"))):
        ids = copy.encode(SPELLED)
        assert not {tokenizer.eos_token_id, tokenizer.mask_token_id, tokenizer.unk_token_id} & set(ids)
        assert backend.token_to_id("strike") in ids
        assert copy.decode(ids) == SPELLED
        assert copy.encode_batch(["strike", SPELLED, ""]) == [copy.encode("strike"), ids, []]
    plain = "that strike has a hole"
    assert tokenizer.encode(plain) == backend.encode(plain).ids
    assert tokenizer.decode([tokenizer.eos_token_id]) == "</s>"


def test_text_that_only_a_special_token_can_write_is_refused():
    lines = tokenizers.Tokenizer(tokenizers.models.BPE({"\n": 0, "a": 1}, []))
    with pytest.raises(
        UserError, match=r"^tokenizer my/t can only write '\\n' as the special token '\\n'; replace it in"
    ):
        Tokenizer(lines, {"eos_token": "\n"}, "my/t").encode("a\na")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match=r"can only write 'other' as the special token '</s>'"):
        Tokenizer(words, {}).encode_batch(["a", "a other"])


def test_id_of_unknown_text():
    def unknown(model):
        return Tokenizer(tokenizers.Tokenizer(model), {}).unk_token_id

    assert unknown(unigram_model()) == unknown(word_piece_model()) == 0
    assert unknown(bpe_model()) is None
    assert unknown(tokenizers.models.BPE({"</s>": 0, "a": 1, "?": 2}, [], unk_token="?")) == 2


def test_text_that_a_model_cannot_encode_is_refused_or_known_to_be_dropped(tokenizer):
    words = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "a": 1})), {}, "my/t")
    for encode in (words.encode, lambda text: words.encode_batch(["a", text])):
        with pytest.raises(UserError, match=r"^tokenizer my/t has no token for a part of a text \(.*UNK.*; give it an"):
            encode("b")
    letters = {"</s>": 0, "a": 1, "?": 2}
    dropping = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE(letters, [])), {})
    assert dropping.encode("ab") == dropping.encode("a")
    telling = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE(letters, [], unk_token="?")), {})
    assert [each.drops_unknown for each in (dropping, telling, words, tokenizer)] == [True, False, False, False]


@pytest.mark.parametrize("rebuilt", [False, True])
def test_stored_truncation_and_padding_are_ignored(tmp_path, rebuilt):
    vocab = {"<unk>": 0, "</s>": 1, "a": 2, "b": 6 if rebuilt else 3}  # with a hole the mask is put in by hand
    clean = Tokenizer.load(word_level(tmp_path / "clean", vocab))
    folder = word_level(tmp_path / "t", vocab)
    backend = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    backend.enable_truncation(max_length=2)
    backend.enable_padding(pad_id=1, pad_token="</s>", length=5)
    backend.save(f"{folder}/tokenizer.json")
    assert len(backend.encode("a b a").ids) == 5
    tokenizer = Tokenizer.load(folder)
    tokenizer.save(tmp_path / "saved")
    copies = (tokenizer, pickle.loads(pickle.dumps(tokenizer)), Tokenizer.load(str(tmp_path / "saved")))
    for copy in copies:
        assert copy.encode("a b a") == clean.encode("a b a") == [2, vocab["b"], 2]
        assert copy.encode_batch(["a b a", "b"]) == [[2, vocab["b"], 2], [vocab["b"]]]
        assert copy.copy_backend().encode("a b a").ids == [2, vocab["b"], 2]
        assert copy.fingerprint == clean.fingerprint


# ------------------------------------------------------------------------------------------- around a text


@pytest.fixture(params=["none", "bytes only", "bos", "bos in a sequence", "eos", "bos and eos"])
def habit(request, tokenizer, tmp_path):
    """A folder of a tokenizer that names a BOS, and what it writes before and after a text."""
    backend = tokenizer.copy_backend()
    backend.add_special_tokens(["<s>"])
    before = ["<s>"] if "bos" in request.param else []
    after = ["<|endoftext|>"] if "eos" in request.param else []
    template = tokenizers.processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(token, backend.token_to_id(token)) for token in ("<s>", "<|endoftext|>")],
    )
    in_bytes = tokenizers.processors.ByteLevel(trim_offsets=False)
    backend.post_processor = {
        "none": None,
        "bytes only": in_bytes,
        "bos in a sequence": tokenizers.processors.Sequence([in_bytes, template]),
    }.get(request.param, template)
    folder = tmp_path / "habit"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    # transformers 5 does not read add_bos_token where there is a tokenizer.json
    settings = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "add_bos_token": True}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder, [backend.token_to_id(token) for token in before], [backend.token_to_id(token) for token in after]


def test_a_text_is_written_as_transformers_does(habit, tokenizer, tmp_path):
    folder, before, after = habit
    ours = Tokenizer.load(str(folder))
    assert (ours.before_text, ours.after_text) == (before, after)
    ours.save(tmp_path / "saved")
    bare = ours.encode("The lazy dog")
    for source in (folder, tmp_path / "saved"):
        copy, theirs = Tokenizer.load(str(source)), transformers.AutoTokenizer.from_pretrained(source)
        for text in ("The lazy dog", "", " jumps!\n"):
            assert copy.encode_whole(text) == theirs(text).input_ids
        assert copy.encode_prompt("The lazy dog") == [*before, *bare]
        assert copy.as_document(bare) == [*before, *bare, ours.eos_token_id]
        assert copy.document_fingerprint == ours.document_fingerprint
    # an end alone makes the documents that there always were
    assert (ours.document_fingerprint == ours.fingerprint) == (before == [])
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["add_bos_token"]


def test_an_empty_prompt_is_a_start(habit, tokenizer):
    folder, *_ = habit
    ours = Tokenizer.load(str(folder))
    assert ours.encode_prompt("") == [ours.start_token_id] == [ours.bos_token_id]
    assert tokenizer.encode_prompt("") == [tokenizer.start_token_id] == [tokenizer.eos_token_id]  # it names no BOS


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


def test_files_that_are_passed_over_are_said(tmp_path, capsys):
    texts = tmp_path / "in"
    texts.mkdir()
    for name in ("a.txt", "b.py", "c.py"):
        (texts / name).write_text("abc")
    TrainTokenizer(input=[str(texts)], vocab_size=258, output=str(tmp_path / "out")).run()
    assert " 1 documents, " in (printed := capsys.readouterr().out)
    line = "  skipped  files in the folders, 2 .py; to read those that are text too: --suffixes .txt .py"
    assert printed.splitlines()[1:] == [line]
    words = {"suffixes": [".txt", ".py"], "vocab_size": 258, "output": str(tmp_path / "again")}
    TrainTokenizer(input=[str(texts)], **words).run()
    assert " 3 documents, " in (printed := capsys.readouterr().out)
    assert "skipped  " not in printed


def test_too_little_text_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abc abc")
    (tmp_path / "b.txt").write_text("x" * 100)
    options = {"input": [str(tmp_path)], "vocab_size": 400, "max_megabytes": 1e-5}
    TrainTokenizer(**options, output=str(tmp_path / "out")).run()
    size = Tokenizer.load(str(tmp_path / "out")).vocab_size
    assert 258 < size < 400
    assert f"{size} tokens (400 requested: too little text) from 2 documents, 0.0 MB" in capsys.readouterr().out


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
    assert vocab_rows(tokenizer.vocab_size) == 32_064
    assert not {1, 2, 32_000} & set(tokenizer.encode("<s>[MASK]</s>"))

    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(str(tmp_path / "saved")).fingerprint == tokenizer.fingerprint
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    text = (shared_data / "haystack" / "addiction.txt").read_text()
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert theirs.encode("[MASK]", add_special_tokens=False)[-1] == theirs.mask_token_id == 32_000
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)


def test_the_text_of_a_token_is_what_it_adds_to_a_text(tokenizer):
    text = "The quick brown\n\tfox"
    ids = tokenizer.encode(text)
    assert "".join(map(tokenizer.text_of, ids)) == text
    assert any(tokenizer.text_of(token_id).startswith(" ") for token_id in ids)
    assert tokenizer.text_of(tokenizer.mask_token_id) == "[MASK]"
    assert tokenizer.text_of(10**6) == "<id 1000000>"
    part_of_a_character = tokenizer.encode("é")[0]
    assert tokenizer.text_of(part_of_a_character) == tokenizer.copy_backend().id_to_token(part_of_a_character)


def test_the_text_of_a_token_keeps_the_space_that_a_decoder_drops_at_the_beginning():
    pieces = {"<unk>": 0, "</s>": 1, "▁the": 2, "<0x0A>": 3, "<0xC3>": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = Tokenizer(backend, {"eos_token": "</s>"})
    assert tokenizer.decode([2]) == "the"
    assert [tokenizer.text_of(token_id) for token_id in range(1, 5)] == ["</s>", " the", "\n", "<0xC3>"]
    assert 1 in tokenizer.control_ids
    assert 2 not in tokenizer.control_ids
