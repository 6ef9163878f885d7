import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import torch
from litdata import StreamingDataset
from litdata.streaming.sampler import ChunkedIndex

from meap_lit.data.prepare.chat import PrepareChat
from meap_lit.data.store.manifest import Manifest, load_samples
from meap_lit.errors import UserError
from meap_lit.masking.duplication import Answer, Duplication, masked_copy, original
from meap_lit.model.loss import IGNORE_INDEX
from meap_lit.tokenizer.builtin_templates import NAMED
from meap_lit.tokenizer.chat_template import ChatTemplate
from meap_lit.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.slow


def records(number):
    return [
        {"instruction": f"Number {i}?", "input": "in a word" * (i % 2), "output": "How vexingly quick! " * (i % 7 + 1)}
        for i in range(number)
    ]


def write_json(path, content):
    path.write_text(json.dumps(content))
    return str(path)


def prepare(output, source, tokenizer_folder, **options):
    options = {"num_workers": 1, "val_share": 0.0, "template": "alpaca", **options}
    PrepareChat(**{"output": str(output), "input": [str(source)], "tokenizer": tokenizer_folder, **options}).run()


def read_samples(folder):
    """Ids and answers of every sample of a split, read by LitData."""
    return [
        (sample["input_ids"].tolist(), [tuple(answer) for answer in sample["answers"].tolist()])
        for sample in StreamingDataset(str(folder))
    ]


def encode(tokenizer, messages, template="alpaca"):
    chat = ChatTemplate.load(template, tokenizer).encode(messages)
    return chat.input_ids, chat.answers


def alpaca(record):
    content = f"{record['instruction']}\n\n{record['input']}" if record["input"] else record["instruction"]
    question = {"instruction": record["instruction"], "input": record["input"], "content": content}
    return [{"role": "user", **question}, {"role": "assistant", "content": record["output"]}]


def files_in(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# -------------------------------------------------------------------------------------------------- result


def test_samples_are_what_the_template_says(tmp_path, tokenizer, tokenizer_folder, capsys):
    prepare(tmp_path / "out", write_json(tmp_path / "in.json", records(9)), tokenizer_folder)
    samples = read_samples(tmp_path / "out" / "train")
    assert samples == [encode(tokenizer, alpaca(record)) for record in records(9)]
    assert sorted(files_in(tmp_path / "out")) == [
        "manifest.json",
        "preparation.json",
        "train/chunk-0-0.bin",
        "train/index.json",
        "train/samples.npz",
    ]
    lengths = [len(ids) for ids, _ in samples]
    answers = [answer for _, answers in samples for answer in answers]
    learned = sum(end - start for start, _, end in answers)
    long = sum(stop - start > 50 for start, stop, _ in answers)
    assert long > 0
    printed = capsys.readouterr().out
    assert f"dataset {tmp_path / 'out'}\n" in printed
    assert "  template alpaca\n" in printed
    assert f"train    9 conversations, {sum(lengths)} tokens\n" in printed
    assert f"longest {max(lengths)}, mean {sum(lengths) / 9:.1f} tokens; 0 truncated\n" in printed
    assert f"answers  9, {long} over 50 tokens; {learned} tokens, those that close them included\n" in printed
    assert "left out 0 too long for max_tokens, 0 without a turn to learn, 0 unreadable\n" in printed
    assert "unknown" not in printed
    assert "prompts" not in printed


def test_any_sample_is_read_at_random_and_its_sizes_without_it(tmp_path, tokenizer_folder):
    turns = [{"from": "human", "value": "Go on?"}, {"from": "gpt", "value": "Yes, quick."}]
    conversations = [{"conversations": turns * (i % 3 + 1), "id": i} for i in range(60)]
    prepare(tmp_path / "out", write_json(tmp_path / "in.json", conversations), tokenizer_folder, chunk_bytes="4KB")
    table = load_samples(str(tmp_path / "out"), "train")
    assert table.num_tokens.dtype == table.num_answers.dtype == table.answer_tokens.dtype == np.int32
    assert len(table.chunk_sizes) > 2
    assert sum(table.chunk_sizes) == len(table.num_tokens) == 60

    in_order = read_samples(tmp_path / "out" / "train")
    dataset = StreamingDataset(str(tmp_path / "out" / "train"))
    len(dataset)  # reads the index
    ends, first = np.cumsum(table.chunk_sizes), np.cumsum(table.num_answers) - table.num_answers
    for index in np.random.default_rng(0).permutation(60):
        chunk = int(np.searchsorted(ends, index, side="right"))
        sample = dataset[ChunkedIndex(index=int(index), chunk_index=chunk)]
        assert str(sample["input_ids"].dtype) == "torch.uint16"
        assert str(sample["answers"].dtype) == "torch.int32"
        assert sample["input_ids"].tolist() == in_order[index][0]
        assert table.num_tokens[index] == len(sample["input_ids"])
        assert table.num_answers[index] == len(sample["answers"]) == index % 3 + 1
        start, stop, end = sample["answers"].numpy().T
        sizes = table.answer_tokens[first[index] : first[index] + table.num_answers[index]]
        assert sizes.tolist() == np.stack([stop - start, end - stop], axis=1).tolist()


def test_manifest_of_the_result(tmp_path, tokenizer, tokenizer_folder):
    source = write_json(tmp_path / "in.json", records(50))
    prepare(tmp_path / "out", source, tokenizer_folder, val_share=0.2, max_tokens=500)
    manifest = Manifest.load(str(tmp_path / "out"), kind="chat")
    manifest.check_tokenizer(tokenizer, dataset="out", tokenizer_folder=tokenizer_folder)
    assert manifest.chat.template == "alpaca"
    assert manifest.chat.template_source == NAMED["alpaca"]
    assert (manifest.chat.max_tokens, manifest.chat.num_dropped, manifest.chat.num_truncated) == (500, 0, 0)
    assert (manifest.vocab_size, manifest.dtype, manifest.val_share) == (300, "uint16", 0.2)
    assert [(entry.path, entry.bytes) for entry in manifest.sources] == [(source, os.path.getsize(source))]
    assert sum(split.documents for split in manifest.splits.values()) == 50
    for name, split in manifest.splits.items():
        samples = read_samples(tmp_path / "out" / name)
        assert split.documents == split.answers == len(samples)
        assert split.tokens == sum(len(ids) for ids, _ in samples)
        assert split.longest == max(len(ids) for ids, _ in samples)
        assert split.answer_tokens == sum(end - start for _, answers in samples for start, _, end in answers)


def test_large_vocabulary_is_stored_as_int32(tmp_path, tokenizer_folder):
    content = json.loads(Path(tokenizer_folder, "tokenizer.json").read_text())
    content["model"]["vocab"]["<|far|>"] = 70_000
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "tokenizer.json").write_text(json.dumps(content))
    prepare(tmp_path / "out", write_json(tmp_path / "in.json", records(1)), str(tmp_path / "large"))
    assert Manifest.load(str(tmp_path / "out"), kind="chat").dtype == "int32"
    expected = encode(Tokenizer.load(str(tmp_path / "large")), alpaca(records(1)[0]))
    assert read_samples(tmp_path / "out" / "train") == [expected]


def test_the_number_of_workers_changes_no_byte(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setattr("meap_lit.data.prepare.chat.ChatEncoder.batch_size", 7)  # many batches for each worker
    source = write_json(tmp_path / "in.json", records(100))
    results = []
    for num_workers in (1, 2):
        output = tmp_path / str(num_workers) / "out"
        prepare(output, source, tokenizer_folder, val_share=0.1, chunk_bytes="4KB", num_workers=num_workers)
        results.append(files_in(output))
    assert results[0] == results[1]
    assert len([name for name in results[0] if name.startswith("train/chunk")]) > 2


def test_system_message_and_the_tokenizers_own_template(tmp_path, tokenizer, tokenizer_folder):
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(NAMED["mistral"])
    source = write_json(tmp_path / "in.json", {"prompt": "q", "completion": "a"})
    prepare(tmp_path / "out", source, str(tmp_path / "tokenizer"), template="tokenizer", system="Be brief.")
    messages = [("system", "Be brief."), ("user", "q"), ("assistant", "a")]
    messages = [{"role": role, "content": content} for role, content in messages]
    assert read_samples(tmp_path / "out" / "train") == [encode(tokenizer, messages, "mistral")]


def test_a_parquet_file_with_nulls_gives_the_same_samples(tmp_path, tokenizer, tokenizer_folder):
    turns = [{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "a", "name": "x"}]
    rows = [
        {"messages": turns, "prompt": None, "completion": None},
        {"messages": None, "prompt": "q", "completion": "a"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    prepare(tmp_path / "out", tmp_path / "in.parquet", tokenizer_folder, template="mistral")
    expected = encode(tokenizer, [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "mistral")
    assert read_samples(tmp_path / "out" / "train") == [expected, expected]


def test_answers_that_nothing_closes_are_pointed_out(tmp_path, tokenizer, tokenizer_folder, capsys):
    tokenizer.save(tmp_path / "tokenizer")
    source = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(source)
    data = write_json(tmp_path / "in.json", records(1))
    prepare(tmp_path / "out", data, str(tmp_path / "tokenizer"), template="tokenizer")
    assert "none closed by a special token: a model cannot learn from them where to stop" in capsys.readouterr().out


def test_prompts_that_are_encoded_otherwise_are_counted(tmp_path, tokenizer, tokenizer_folder, capsys):
    """`generate --chat` sends the prompt alone; here the space before the answer joins its first word."""
    tokenizer.save(tmp_path / "tokenizer")
    source = """{% for message in messages %}
        {%- if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n' }}
        {%- else %}{{ 'Model: ' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% endif %}
        {%- endfor %}{% if add_generation_prompt %}{{ 'Model: ' }}{% endif %}"""
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(source)
    records = [{"prompt": "Go on?", "completion": text} for text in ("quick", "?", "quick fox")]
    data = write_json(tmp_path / "in.json", records)
    prepare(tmp_path / "out", data, str(tmp_path / "tokenizer"), template="tokenizer")
    printed = capsys.readouterr().out
    assert (
        printed.count("\n  prompts  in 2 conversations the first answer does not follow the tokens that `generate --")
        == 1
    )
    samples = read_samples(tmp_path / "out" / "train")
    said = [tokenizer.decode(ids[start:stop]) for ids, [(start, stop, _)] in samples]
    assert said == [" quick", "?", " quick fox"]


def test_unknown_tokens_are_counted(tmp_path, capsys):
    vocab = {"<unk>": 0, "</s>": 1, "[": 2, "INST": 3, "]": 4, "/": 5, "yes": 6, "no": 7}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(["<unk>", "</s>"])
    (tmp_path / "tokenizer").mkdir()
    backend.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"unk_token": "<unk>", "eos_token": "</s>"}')
    records = [{"prompt": "no", "completion": "yes"}, {"prompt": "what no", "completion": "yes then"}]
    prepare(
        tmp_path / "out", write_json(tmp_path / "in.json", records), str(tmp_path / "tokenizer"), template="mistral"
    )
    assert "\n  unknown  2 tokens (9.09%) of text outside the vocabulary\n" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- what is learned


def test_turns_that_are_not_learned_have_no_answer(tmp_path, tokenizer, tokenizer_folder, capsys):
    texts = [("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "two")]
    messages = [{"role": role, "content": text} for role, text in texts]
    ids, answers = encode(tokenizer, messages, "mistral")
    weighted = [
        [messages[0], messages[1] | first, messages[2], messages[3] | second]
        for first, second in (({}, {}), ({"weight": 0}, {"weight": 1}), ({}, {"train": False}), ({"weight": 0},) * 2)
    ]
    source = write_json(tmp_path / "in.json", [{"messages": turns} for turns in weighted])
    prepare(tmp_path / "out", source, tokenizer_folder, template="mistral")
    assert read_samples(tmp_path / "out" / "train") == [(ids, answers), (ids, answers[1:]), (ids, answers[:1])]
    table = load_samples(str(tmp_path / "out"), "train")
    assert table.num_answers.tolist() == [2, 1, 1]
    assert Manifest.load(str(tmp_path / "out"), kind="chat").chat.num_untrained == 1
    assert "left out 0 too long for max_tokens, 1 without a turn to learn, 0 unreadable" in capsys.readouterr().out
    none = write_json(tmp_path / "none.json", [{"messages": weighted[3]}])
    with pytest.raises(
        UserError, match=r"^no conversations to tokenize in .*, 1 without a turn to learn, 0 unreadable\)$"
    ):
        prepare(tmp_path / "none", none, tokenizer_folder, template="mistral")


def test_labels_and_copies_follow_the_turns_that_are_learned(tmp_path, tokenizer, tokenizer_folder):
    long = "How vexingly quick daft zebras jump! " * 4
    texts = [("user", "q"), ("assistant", long), ("user", "r"), ("assistant", long)]
    messages = [{"role": role, "content": text} for role, text in texts]
    messages[1]["weight"] = 0
    prepare(
        tmp_path / "out", write_json(tmp_path / "in.json", {"messages": messages}), tokenizer_folder, template="mistral"
    )
    [(ids, [answer])] = read_samples(tmp_path / "out" / "train")
    input_ids, answers = torch.tensor(ids), [Answer(*answer)]
    learned = torch.zeros(len(ids), dtype=torch.bool)
    learned[answer[0] - 1 : answer[2] - 1] = True
    assert torch.equal(original(input_ids, answers).labels != IGNORE_INDEX, learned)
    copy = masked_copy(input_ids, answers, Duplication(), mask_token_id=1, seed=0, sample_id=0, visit=0)
    masked = (copy.input_ids != input_ids).nonzero().flatten()
    assert len(masked) == (answer[1] - answer[0]) // 10 > 0
    assert masked.min() >= answer[0] > len(ids) // 2


def test_tools_of_a_parquet_file(tmp_path, tokenizer, tokenizer_folder):
    """Its columns have every key in every row: those that a row does not have are null."""
    calls = [
        {"function": {"name": name, "arguments": arguments}} for name, arguments in (("f", {"a": 1}), ("g", {"b": 2}))
    ]
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
        for call in calls
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    tokenizer.save(tmp_path / "tokenizer")
    called = "{{ message.tool_calls | tojson if message.tool_calls }}"
    source = "{% for message in messages %}{{ message.content }}" + called + "\n{% endfor %}"
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(source)
    prepare(tmp_path / "out", tmp_path / "in.parquet", str(tmp_path / "tokenizer"), template="tokenizer")
    samples = read_samples(tmp_path / "out" / "train")
    assert [tokenizer.decode(ids) for ids, _ in samples] == [f"q\n{json.dumps([call])}\n" for call in calls]


# ------------------------------------------------------------------------------------------------ held out


def test_held_out_conversations_depend_on_their_text_alone(tmp_path, tokenizer_folder):
    held_out = []
    for name, order in (("a", records(60)), ("b", records(60)[::-1])):
        prepare(tmp_path / name, write_json(tmp_path / f"{name}.json", order * 2), tokenizer_folder, val_share=0.2)
        samples = read_samples(tmp_path / name / "val")
        assert all(samples.count(sample) == 2 for sample in samples)  # a conversation and its copy stay together
        held_out.append(sorted(samples))
    assert held_out[0] == held_out[1]
    assert 4 < len(held_out[0]) / 2 < 25


def test_small_corpora_and_the_validation_split(tmp_path, tokenizer_folder):
    source = write_json(tmp_path / "in.json", records(3))
    prepare(tmp_path / "out", source, tokenizer_folder, val_share=1e-9)
    splits = Manifest.load(str(tmp_path / "out"), kind="chat").splits
    assert {name: split.documents for name, split in splits.items()} == {"train": 2, "val": 1}
    with pytest.raises(UserError, match=r"^the input has one sample, .*; add others, or set val_share to 0 for"):
        prepare(tmp_path / "one", write_json(tmp_path / "one.json", records(1)), tokenizer_folder, val_share=0.01)
    assert not (tmp_path / "one").exists()


# ------------------------------------------------------------------------------------------------ too long


@pytest.fixture
def turns(tmp_path):
    """A conversation of two turns, and one of a single short turn."""
    messages = [
        {"role": role, "content": text}
        for role, text in [("user", "ab"), ("assistant", "cd"), ("user", "ef"), ("assistant", "gh")]
    ]
    write_json(tmp_path / "in.json", [{"messages": messages}, {"messages": messages[:2]}])
    return messages


def test_long_conversations_stop(tmp_path, tokenizer, tokenizer_folder, turns):
    length = len(encode(tokenizer, turns)[0])
    message = (
        rf"^\S+/in.json, element 1: {length} tokens, max_tokens is {length - 1}; raise it, or use --on_long drop or"
    )
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "out", tmp_path / "in.json", tokenizer_folder, max_tokens=length - 1, on_error="skip")
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]
    prepare(tmp_path / "out", tmp_path / "in.json", tokenizer_folder, max_tokens=length)
    assert len(read_samples(tmp_path / "out" / "train")) == 2


def test_long_conversations_are_dropped(tmp_path, tokenizer, tokenizer_folder, turns, capsys):
    limit = len(encode(tokenizer, turns)[0]) - 1
    prepare(tmp_path / "out", tmp_path / "in.json", tokenizer_folder, max_tokens=limit, on_long="drop")
    assert read_samples(tmp_path / "out" / "train") == [encode(tokenizer, turns[:2])]
    chat = Manifest.load(str(tmp_path / "out"), kind="chat").chat
    assert (chat.num_dropped, chat.num_truncated) == (1, 0)
    assert "left out 1 too long for max_tokens, 0 without a turn to learn, 0 unreadable" in capsys.readouterr().out


def test_long_conversations_are_truncated(tmp_path, tokenizer, tokenizer_folder, turns):
    ids, [first, second] = encode(tokenizer, turns)
    short = encode(tokenizer, turns[:2])
    start, stop, end = second
    assert (stop, end) == (start + 2, start + 3)
    cases = {  # tokens kept -> answers kept
        end - 1: [first, (start, stop, stop)],
        stop - 1: [first, (start, stop - 1, stop - 1)],
        start: [first],
    }
    for limit, answers in cases.items():
        output = tmp_path / str(limit)
        prepare(output, tmp_path / "in.json", tokenizer_folder, max_tokens=limit, on_long="truncate")
        assert read_samples(output / "train") == [(ids[:limit], answers), short]
        chat = Manifest.load(str(output), kind="chat").chat
        assert (chat.num_dropped, chat.num_truncated) == (0, 1)


def test_a_conversation_cut_before_its_answer_is_dropped(tmp_path, tokenizer, tokenizer_folder):
    long, short = records(2)[1], {"instruction": "a", "input": "", "output": "b"}
    limit = encode(tokenizer, alpaca(long))[1][0][0]
    assert len(encode(tokenizer, alpaca(short))[0]) < limit
    source = write_json(tmp_path / "in.json", [long, short])
    prepare(tmp_path / "out", source, tokenizer_folder, max_tokens=limit, on_long="truncate")
    assert read_samples(tmp_path / "out" / "train") == [encode(tokenizer, alpaca(short))]
    chat = Manifest.load(str(tmp_path / "out"), kind="chat").chat
    assert (chat.num_dropped, chat.num_truncated) == (1, 0)


# -------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_share": 1.0}, r"val_share must be in \[0, 1\), got 1; write 0.01 for 1%"),
        ({"num_workers": 0}, "num_workers must be at least 1, got 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"chunk_bytes": "64 apples"}, "chunk_bytes must be a size in KB, MB, GB, TB such as 64MB, got '64 apples'"),
        ({"chunk_bytes": "infMB"}, "chunk_bytes must be a size in KB, MB, GB, TB such as 64MB, got 'infMB'"),
        ({"system": "\udce9"}, r"field 'system' holds a broken character \(half of a surrogate pair\)"),
        ({"shard": "3/3"}, "shard must be i/n with i from 0 to n - 1, such as 0/8 .*, got '3/3'"),
        ({"tokenizer": "nowhere"}, "tokenizer nowhere does not exist"),
        ({"template": "vicuna"}, "unknown template 'vicuna'; choose from tokenizer"),
        ({"template": "tokenizer"}, r"tokenizer .* has no chat_template; name a template \(--template\): alpaca"),
        ({"template": "llama3"}, r"template llama3 writes <\|start_header_id\|>, .* name alpaca or mistral"),
        ({"input": ["nowhere.json"]}, "input nowhere.json does not exist"),
        (
            {"max_tokens": 3, "on_long": "drop"},
            r"no conversations to tokenize in \S+/in.json \(2 too long for max_tokens, 0 without a turn to learn, 0 u",
        ),
    ],
)
def test_wrong_options(tmp_path, tokenizer_folder, options, message):
    source = write_json(tmp_path / "in.json", records(2))
    with pytest.raises(UserError, match=f"^{message}"):
        prepare(tmp_path / "out", source, tokenizer_folder, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]


ANSWERED = {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "q"}, "no answer: field 'completion' is missing"),
        ({"prompt": "q", "completion": " "}, "empty answer"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "roles out of order: message 1 is of the assistant"),
        ({"text": "t"}, "unknown format with 'text'; known formats are Alpaca"),
        (
            {"prompt": "q", "completion": "refuse"},
            "chat template tokenizer does not take this conversation: I do not do",
        ),
        (["text"], "not a JSON object but list"),
    ],
)
def test_bad_records_stop_or_are_counted(tmp_path, tokenizer, record, message, capsys):
    tokenizer.save(tmp_path / "tokenizer")
    refusing = "{% if 'refuse' in messages[1]['content'] %}{{ raise_exception('I do not do this') }}{% endif %}"
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(refusing + NAMED["mistral"])
    source = write_json(tmp_path / "in.json", [ANSWERED, record, ANSWERED])
    options = {"template": "tokenizer"}
    with pytest.raises(UserError, match=rf"^\S+/in.json, element 2: {message}.*; use --on_error skip to leave out wh"):
        prepare(tmp_path / "out", source, str(tmp_path / "tokenizer"), **options)
    assert not (tmp_path / "out").exists()
    prepare(tmp_path / "out", source, str(tmp_path / "tokenizer"), on_error="skip", **options)
    assert len(read_samples(tmp_path / "out" / "train")) == 2
    printed = capsys.readouterr().out
    assert "left out 0 too long for max_tokens, 0 without a turn to learn, 1 unreadable, first: " in printed
    assert "in.json, element 2: " in printed
    assert Manifest.load(str(tmp_path / "out"), kind="chat").num_skipped == 1


def test_data_without_a_readable_record_says_why(tmp_path, tokenizer_folder):
    source = write_json(tmp_path / "in.json", [{"prompt": "q"}, {"prompt": "r"}])
    message = r"2 unreadable, first: \S+/in.json, element 1: no answer: field 'com"
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "out", source, tokenizer_folder, on_error="skip")


@pytest.mark.parametrize(("name", "content"), [("in.json", "[]"), ("in.jsonl", ""), ("in.jsonl", "\n\n")])
def test_empty_data_file(tmp_path, tokenizer_folder, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(
        UserError,
        match=rf"^no conversations to tokenize in \S+/{name} \(0 too long for max_tokens, 0 without a turn to learn, ",
    ):
        prepare(tmp_path / "out", tmp_path / name, tokenizer_folder)
    assert not (tmp_path / "out").exists()


def test_a_worker_names_file_and_line(tmp_path, tokenizer_folder):
    (tmp_path / "in.jsonl").write_text(json.dumps(ANSWERED) + "\n\n" + json.dumps({"prompt": "q"}) + "\n")
    with pytest.raises(
        UserError, match=r"^\S+/in.jsonl, line 3: no answer: field 'completion' is missing; use --on_err"
    ):
        prepare(tmp_path / "out", tmp_path / "in.jsonl", tokenizer_folder, num_workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


# ----------------------------------------------------------------------------------------------- interrupted


@pytest.mark.slow
def test_killed_run_leaves_no_dataset(tmp_path, tokenizer_folder):
    source = write_json(tmp_path / "in.json", records(50) * 400)
    options = {"output": str(tmp_path / "out"), "input": [source], "tokenizer": tokenizer_folder, "template": "alpaca"}
    options |= {"num_workers": 1, "chunk_bytes": "20KB"}
    code = f"from meap_lit.data.prepare.chat import PrepareChat; PrepareChat(**{options!r}).run()"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[3])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.partial-*/train/chunk-0-3.bin")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        UserError, match=r"^dataset folder \S+ does not exist; make it with: python -m meap_lit prepare ch"
    ):
        Manifest.load(str(tmp_path / "out"), kind="chat")

    prepare(tmp_path / "out", write_json(tmp_path / "in.json", records(2)), tokenizer_folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.json", "out"]


# ----------------------------------------------------------------------------------------------- real data


def test_llama2(shared_data, tmp_path):
    folder = str(shared_data / "tokenizer-llama2")
    prepare(tmp_path / "out", write_json(tmp_path / "in.json", records(5)), folder, template="mistral")
    tokenizer = Tokenizer.load(folder)
    samples = read_samples(tmp_path / "out" / "train")
    assert samples[1] == encode(tokenizer, alpaca(records(5)[1]), "mistral")
    ids, [(start, stop, end)] = samples[0]
    assert (ids[0], ids[stop:end], end) == (1, [2], len(ids))
    assert tokenizer.decode(ids[start:stop]) == records(1)[0]["output"].strip()


@pytest.mark.parametrize(
    ("name", "count", "tools"),
    [("glaive_toolcall_en_demo", 300, True), ("alpaca_en_demo", 999, False), ("identity", 91, False)],
)
def test_real_files_are_read_whole(shared_data, tmp_path, name, count, tools):
    tokenizer = Tokenizer.load(str(shared_data / "tokenizer-llama2"))
    tokenizer.save(tmp_path / "tokenizer")
    source = """{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}
        {%- if message.role == 'assistant' %}{{ 'Model:' }}
        {%- generation %}{{ ' ' + message.content }}{{ message.tool_calls | tojson if message.tool_calls }}
        {{- eos_token }}{% endgeneration %}
        {%- else %}{{ message.role + ': ' + message.content + '\n' }}{% endif %}{% endfor %}
        {%- if add_generation_prompt %}{{ 'Model:' }}{% endif %}"""
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(source)
    file = shared_data / "sft" / f"{name}.json"
    prepare(tmp_path / "out", file, str(tmp_path / "tokenizer"), template="tokenizer")
    split = Manifest.load(str(tmp_path / "out"), kind="chat").splits["train"]
    assert split.documents == count
    if tools:
        assert split.answers == 957
        with pytest.raises(
            UserError, match=r"element 1: chat template mistral does not write tools or tool_calls, which "
        ):
            prepare(tmp_path / "named", file, str(tmp_path / "tokenizer"), template="mistral")
        add_special_tokens(tmp_path / "tokenizer", *(f"<|{name}|>" for name in MARKERS))
        for template in ("chatml", "llama3"):
            prepare(tmp_path / template, file, str(tmp_path / "tokenizer"), template=template)
            split = Manifest.load(str(tmp_path / template), kind="chat").splits["train"]
            assert (split.documents, split.answers) == (count, 957)


MARKERS = ("im_start", "im_end", "start_header_id", "end_header_id", "eot_id")


def add_special_tokens(folder, *tokens):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(list(tokens))
    backend.save(str(folder / "tokenizer.json"))
