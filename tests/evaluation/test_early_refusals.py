"""What is wrong is said before the work begins: before items are made, weights are read or anything is answered."""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from typing import Any

import pytest

from meap_lit.errors import UserError
from meap_lit.evaluation.attention.masked import MaskedAttention
from meap_lit.evaluation.attention.segments import AttentionSegments
from meap_lit.evaluation.command import Evaluate
from meap_lit.evaluation.runner import check_task, choose_items
from meap_lit.evaluation.tasks.copying import Copying
from meap_lit.evaluation.tasks.facts import FactRetrieval
from meap_lit.evaluation.tasks.hallucination import Hallucination
from meap_lit.evaluation.tasks.haystack_task import _Filler
from meap_lit.evaluation.tasks.key_value import KeyValueRetrieval
from meap_lit.evaluation.tasks.multi_document_qa import MultiDocumentQA
from meap_lit.evaluation.tasks.needle import MagicNumber, MultiNeedle, Needle
from meap_lit.evaluation.tasks.perplexity import Perplexity
from meap_lit.evaluation.tasks.reasoning import Reasoning
from meap_lit.inference.command import Generate
from meap_lit.inference.language_model import LanguageModel
from tests.support.toy_task import CountLetters

GRID = {"lengths": (60, 500), "depths": (50.0,)}
CONTEXT = 400  # of `source_folder`


@pytest.fixture(scope="module")
def data(tmp_path_factory, prepared) -> dict[str, str]:
    """Data files in the formats of the tasks; of `prepared` the dataset."""
    folder = tmp_path_factory.mktemp("data")
    documents = [{"title": f"t{number}", "text": "old stone " * 60, "isgold": number == 0} for number in range(4)]
    contents = {
        "qa": [{"question": f"q{number}", "answers": ["a"], "ctxs": documents} for number in range(3)],
        "reasoning": [{"derivation_count": 2, "derivations": ["x is y.", "y is z."], "question": "q", "answer": "z"}],
        "xsum": [{"document": "short", "summary": "s"}, {"document": "the old river " * 200, "summary": "s"}],
    }
    for name, rows in contents.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {**{name: str(folder / f"{name}.jsonl") for name in contents}, "dataset": prepared.dataset}


TASKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "needle": (Needle, GRID),
    "multi_needle": (MultiNeedle, {**GRID, "num_needles": 1, "max_new_tokens": 8}),
    "magic_number": (MagicNumber, GRID),
    "reasoning": (Reasoning, {**GRID, "file": "reasoning", "num_needles": (2,)}),
    "multi_document_qa": (MultiDocumentQA, {"file": "qa", "num_documents": 4, "gold": (0, 2)}),
    "key_value": (KeyValueRetrieval, {"num_pairs": 60, "num_sets": 2}),
    "hallucination": (Hallucination, {"file": "xsum", "prompt": "document", "max_new_tokens": 8}),
    "perplexity": (Perplexity, {"dataset": "dataset", "split": "train", "seq_len": 500}),
    "copying": (
        Copying,
        {"dataset": "dataset", "split": "train", "seq_len": 600, "span_len": 10, "distances": (0, 500)},
    ),
    "attention": (MaskedAttention, {"dataset": "dataset", "split": "train", "seq_len": 500}),
    "attention_segments": (AttentionSegments, {"lengths": [200, 500]}),
    "facts": (FactRetrieval, {"lengths": [200, 500]}),
}


SIZED = {*TASKS} - {"multi_document_qa", "key_value", "hallucination"}
"""Tasks with an option that decides the length of every item."""


def make(name: str, data: dict[str, str], **changes: Any):
    kind, options = TASKS[name]
    named = {key: data.get(value, value) if isinstance(value, str) else value for key, value in options.items()}
    return kind(**{**named, **changes})


@dataclass
class Command:
    """Evaluate a task, and fail the test if it gets as far as `unwanted`."""

    source: Any
    output: Any

    def refusal(self, task, **options: Any) -> str:
        with pytest.raises(UserError) as error:
            Evaluate(**{"task": task, "checkpoint": [str(self.source)], "output": str(self.output), **options}).run()
        assert "\n" not in str(error.value)
        assert not self.output.exists(), "a refused evaluation leaves no folder behind"
        return str(error.value)


@pytest.fixture
def command(source_folder, tmp_path) -> Command:
    return Command(source_folder, tmp_path / "out")


def forbid(monkeypatch, owner, name: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError(f"{name} was called before the refusal")

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("name", TASKS)
def test_lengths_beyond_the_context_are_refused_before_items_are_made(name, data, command, monkeypatch):
    task = make(name, data)
    forbid(monkeypatch, type(task), "items")
    message = command.refusal(task)
    assert f"items of {task.name} are longer than the context of {command.source}, {CONTEXT} tokens: the" in message
    shortest, longest = task.extent(LanguageModel(str(command.source)))
    assert f"the longest needs {longest}" in message
    assert longest > CONTEXT
    override = re.search(r"; add (--task\S+ \S+?)(?:, or |$)", message)
    assert bool(override) == (name in SIZED)
    if override:
        option, value = shlex.split(override[1])
        fitting = make(name, data, **{option.removeprefix("--task."): json.loads(value)})
        check_task(fitting, LanguageModel(str(command.source)), "stop")
    assert ("--on_overflow skip" in message) == (shortest <= CONTEXT)


@pytest.mark.parametrize("name", ["needle", "key_value", "perplexity", "facts"])
def test_skipping_is_refused_at_once_where_nothing_fits(name, data, command, monkeypatch):
    task = make(name, data, **{"lengths": (500, 600)} if name in ("needle", "facts") else {})
    forbid(monkeypatch, type(task), "items")
    refusal = command.refusal(task, on_overflow="skip")
    assert re.search(r"; (make the task shorter|add --task\.(lengths '\[400\]'|seq_len 400))$", refusal), refusal


@pytest.mark.parametrize("name", ["attention_segments", "hallucination", "facts"])
def test_what_is_known_before_agrees_with_the_items(name, data, source_folder):
    """The longest item is about as long as was said, and leaving long ones out still works."""
    task, model = make(name, data), LanguageModel(str(source_folder))
    shortest, longest = task.extent(model)
    sizes = [item.num_tokens for item in task.items(model)]
    assert longest - 60 < max(sizes) <= longest  # a sentence less, as a rule
    assert shortest - 60 < min(sizes) <= shortest
    items, num_skipped = choose_items(task, model, "skip")
    assert (len(items), num_skipped) == (len(sizes) // 2, len(sizes) // 2)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("needle", {"haystack": "no/where"}, "haystack: .*no/where"),
        ("needle", {"needles": "no/where.jsonl"}, "data file no/where.jsonl does not exist"),
        ("multi_needle", {"num_needles": 2}, "has 1 that differ in question and keyword"),
        ("needle", {"prompt_style": "chat"}, "has no chat_template; name a template"),
        ("needle", {"prompt_style": "chat", "template": "x.jinja"}, "cannot read x.jinja"),
        ("reasoning", {"file": "no/where.json"}, "data file no/where.json does not exist"),
        ("multi_document_qa", {"file": "no/where.jsonl"}, "data file no/where.jsonl does not exist"),
        ("multi_document_qa", {"num_documents": 9}, "'ctxs' has 3 distractors, num_documents 9 needs 8"),
        ("key_value", {"gold": (60,)}, "gold position 60 is outside a set of 60 pairs"),
        ("hallucination", {"file": "no/where.jsonl"}, "data file no/where.jsonl does not exist"),
        ("hallucination", {"prompt_style": "chat"}, "has no chat_template; name a template"),
        ("perplexity", {"dataset": "no/where"}, "no/where"),
        ("perplexity", {"split": "test"}, "has no test split, only"),
        ("copying", {"dataset": "no/where"}, "no/where"),
        ("facts", {"filler": "no/where"}, "no/where"),
    ],
)
def test_files_and_options_are_checked_before_items_are_made(name, changes, message, data, command, monkeypatch):
    task = make(name, data, **changes)
    forbid(monkeypatch, type(task), "items")
    with pytest.raises(AssertionError, match="was called before"):
        task.items(None)
    monkeypatch.setattr("meap_lit.evaluation.tasks.haystack.read_texts", None)  # no text is read either
    assert re.search(message, command.refusal(task))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Needle, {**GRID, "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        (FactRetrieval, {"lengths": [200], "num_options": 1}, "retrieval num_options must be in"),
        (KeyValueRetrieval, {"num_pairs": 5, "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        (
            MultiDocumentQA,
            {"file": "x", "num_documents": 2, "gold": (0,), "max_new_tokens": 0},
            "max_new_tokens must be at least 1, got 0",
        ),
        (Hallucination, {"file": "x", "prompt": "document", "max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        (Hallucination, {"file": "x", "prompt": "document", "num_samples": 0}, "num_samples must be at least 1, got 0"),
    ],
)
def test_options_that_need_no_model_are_refused_with_the_recipe(kind, options, message):
    with pytest.raises(UserError, match=message):
        kind(**options)


@pytest.fixture
def built(monkeypatch) -> list[int]:
    """The lengths of the items that are made."""
    lengths: list[int] = []
    item = _Filler.item

    def record(self: _Filler, length: int, depth: float):
        lengths.append(length)
        return item(self, length, depth)

    monkeypatch.setattr(_Filler, "item", record)
    return lengths


def test_a_length_without_room_is_said_before_the_grid_is_filled(source_folder, built):
    task = Needle(lengths=(900, 800, 70), depths=tuple(map(float, range(0, 100, 10))))
    with pytest.raises(UserError, match="length 70 has no room for a haystack"):
        task.items(LanguageModel(str(source_folder)))
    assert built == [70]


def test_too_little_haystack_is_said_before_the_grid_is_filled(source_folder, tmp_path, built):
    (tmp_path / "a.txt").write_text("The old river keeps a bright stone. " * 40)
    task = Needle(lengths=(700, 1500), depths=(0.0, 50.0, 100.0), haystack=str(tmp_path), repeat=False)
    with pytest.raises(UserError, match=r"too few for length 1500; add text, or set repeat to true"):
        task.items(LanguageModel(str(source_folder)))
    assert built == [700, 1500]


def test_a_retrieval_length_without_room_is_said_first(prepared, monkeypatch):
    from meap_lit.evaluation.tasks import facts
    from meap_lit.tokenizer.tokenizer import Tokenizer

    built: list[int] = []
    build = facts._build_item
    monkeypatch.setattr(
        facts, "_build_item", lambda task, length, *rest: built.append(length) or build(task, length, *rest)
    )
    with pytest.raises(UserError, match="retrieval length 10 has no room for 4 facts"):
        FactRetrieval(lengths=[200, 10]).build(Tokenizer.load(prepared.tokenizer))
    assert built == [10]
    with pytest.raises(UserError, match=r"retrieval lengths must name at least one value and each once, got \[\]"):
        FactRetrieval(lengths=[])


# --------------------------------------------------------------------------------------------- the whole command


@pytest.fixture
def two(source_folder, tmp_path):
    """A second checkpoint, to be spoiled."""
    return shutil.copytree(source_folder, tmp_path / "second")


@pytest.mark.parametrize("spoil", ["missing", "no tokenizer", "short context", "no config"])
def test_the_second_checkpoint_is_looked_at_before_the_first_answers(spoil, two, source_folder, tmp_path, monkeypatch):
    if spoil == "missing":
        shutil.rmtree(two)
    elif spoil == "no tokenizer":
        (two / "tokenizer.json").unlink()
    elif spoil == "no config":
        (two / "config.json").unlink()
    else:
        content = json.loads((two / "config.json").read_text())
        (two / "config.json").write_text(json.dumps({**content, "max_position_embeddings": 15}))
    forbid(monkeypatch, CountLetters, "answer")
    forbid(monkeypatch, CountLetters, "items") if spoil != "short context" else None
    with pytest.raises(UserError, match="second"):
        Evaluate(task=CountLetters(), checkpoint=[str(source_folder), str(two)], output=str(tmp_path / "out")).run()
    assert not (tmp_path / "out").exists()


def test_answers_of_other_settings_are_noticed_before_items_are_made(source_folder, tmp_path, monkeypatch):
    options = {"checkpoint": [str(source_folder)], "output": str(tmp_path), "label": ["one"]}
    Evaluate(task=CountLetters(), **options).run()
    forbid(monkeypatch, CountLetters, "items")
    with pytest.raises(UserError, match=r"has answers for another task.init_args.miss \(1 then, 2 now\)"):
        Evaluate(task=CountLetters(miss=2), **options).run()


@pytest.mark.parametrize("label", ["one", "one--two"])
def test_an_output_that_cannot_be_written_is_noticed_before_items_are_made(
    label, source_folder, two, tmp_path, monkeypatch
):
    (tmp_path / "out" / "letters").mkdir(parents=True)
    (tmp_path / "out" / "letters" / label).write_text("a file in the way")
    forbid(monkeypatch, CountLetters, "items")
    with pytest.raises(
        UserError, match=f"cannot write into .*letters/{label}: Not a directory; choose another --output"
    ):
        Evaluate(
            task=CountLetters(),
            checkpoint=[str(source_folder), str(two)],
            label=["one", "two"],
            output=str(tmp_path / "out"),
        ).run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 500}, "prompts leave no room for max_new_tokens 500 in the model's context of 400 tokens"),
        ({"top_p": 0.5}, "top_p does nothing at temperature 0"),
        ({"chat": True}, "has no chat_template"),
    ],
)
def test_generate_refuses_before_weights_are_read(options, message, source_folder, monkeypatch):
    forbid(monkeypatch, __import__("meap_lit.inference.language_model", fromlist=["x"]), "build_decoder")
    with pytest.raises(UserError, match=message):
        Generate(checkpoint=str(source_folder), prompt=["the"], **options).run()


def test_a_window_that_caps_the_context_is_named(two, tmp_path):
    content = json.loads((two / "config.json").read_text())
    content |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 100}
    (two / "config.json").write_text(json.dumps(content))
    window = r"100 tokens \(its sliding window; max_position_embeddings is 400\)"
    with pytest.raises(UserError, match=f"longer than the context of .*second, {window}: the longest needs 150"):
        Evaluate(task=CountLetters(lengths=(150,)), checkpoint=[str(two)], output=str(tmp_path / "out")).run()
    with pytest.raises(UserError, match=f"in the model's context of {window}: the longest has"):
        Generate(checkpoint=str(two), prompt=["the"], max_new_tokens=100).run()
