"""Against lm-evaluation-harness itself: its `hf` model on the same folder, its scores of the same answers. Offline."""
# ruff: noqa: E402  without the harness nothing below can be imported

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, processors

from meap_lit.errors import UserError
from meap_lit.evaluation import harness
from meap_lit.evaluation.harness import HarnessModel
from meap_lit.evaluation.runner import batches, choose_items
from meap_lit.evaluation.task import Result
from meap_lit.evaluation.tasks.commonsense import Commonsense
from meap_lit.inference.language_model import LanguageModel

pytestmark = pytest.mark.slow

ARC = [
    ("What keeps the old river near the market?", ["a stone", "the bright lantern of every garden", "new"], "B"),
    ("Which lantern is quiet? ", ["every one", "none", "the old"], "A"),
    ("Where is the garden?", ["under the stone", "near", "a river keeps the market new"], "C"),
    ("Who finds " + "the quiet river near a bright old stone and " * 40 + "a garden?", ["the old", "river", "a"], "B"),
]
BOOLQ = [("the garden is old", "is the garden new", 0), ("every stone is bright", "is every stone bright", 1)]
WINOGRANDE = [
    ("the stone is near the river since the _ is old .", "stone", "river", "1"),
    ("every lantern keeps the garden bright , the _ is new .", "lantern", "garden", "2"),
]
HELLASWAG = [
    (
        "Gardening",
        "a river [title] keeps the old",
        "market. the stone [substeps] is",
        ["quiet", "new  and old", "a"],
        "2",
    ),
    ("Lanterns", "every garden", "finds a", ["bright lantern", "[step] stone", "market"], "0"),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> str:
    """Folder of tasks with the YAML of the harness and data of our own; the cache of `datasets` is beside it."""
    import datasets

    folder = tmp_path_factory.mktemp("tasks")
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    rows = {
        "arc_easy": [
            {"question": question, "choices": {"text": choices, "label": ["A", "B", "C"]}, "answerKey": answer}
            for question, choices, answer in ARC
        ],
        "boolq": [{"passage": passage, "question": question, "label": label} for passage, question, label in BOOLQ],
        "winogrande": [
            {"sentence": sentence, "option1": first, "option2": second, "answer": answer}
            for sentence, first, second, answer in WINOGRANDE
        ],
        "hellaswag": [
            {"activity_label": activity, "ctx_a": a, "ctx_b": b, "endings": endings, "label": label}
            for activity, a, b, endings, label in HELLASWAG
        ],
    }
    theirs = Path(lm_eval.__file__).parent / "tasks"
    files = {
        "arc_easy": theirs / "arc" / "arc_easy.yaml",
        "boolq": theirs / "super_glue" / "boolq" / "default.yaml",
        "winogrande": theirs / "winogrande" / "default.yaml",
        "hellaswag": theirs / "hellaswag" / "hellaswag.yaml",
    }
    for name, content in rows.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in content))
        (folder / f"{name}.yaml").write_text(
            f"include: {files[name]}\ntask: own_{name}\ntag: null\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}\ntraining_split: null\nvalidation_split: null\n"
            f"test_split: test\n"
        )
    (folder / "write.yaml").write_text(
        f"task: own_write\noutput_type: generate_until\ndataset_path: json\ndoc_to_text: '{{{{question}}}}'\n"
        f"dataset_kwargs: {{data_files: {{test: {folder}/arc_easy.jsonl}}}}\ntest_split: test\n"
        f"doc_to_target: answerKey\ngeneration_kwargs: {{until: ['.'], max_gen_toks: 4}}\n"
        f"metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]\n"
    )
    (folder / "own.py").write_text("def rule(doc, results):\n    return {'acc': 1.0}\n")
    boolq = (folder / "boolq.yaml").read_text()
    for name, line in {"rule": "process_results: !function own.rule", "f1": "metric_list: [{metric: f1}]"}.items():
        (folder / f"{name}.yaml").write_text(boolq.replace("own_boolq", f"own_{name}") + f"{line}\n")
    return str(folder)


NAMES = ("own_arc_easy", "own_boolq", "own_winogrande", "own_hellaswag")


@pytest.fixture(scope="module", params=["eos only", "names bos", "writes bos"])
def folder(request, source_folder, tmp_path_factory) -> str:
    """The model of `source_folder`, with its own tokenizer or one with a BOS: GPT-2 names it, Llama 2 writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if request.param == "eos only":
        return str(source_folder)
    folder = tmp_path_factory.mktemp("bos")
    config = LlamaConfig.from_pretrained(source_folder)
    config.vocab_size = 328
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in source_folder.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<s>"])
    if request.param == "writes bos":
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
        # and leaves out the space at the beginning of what it decodes
        backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    backend.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": "<s>"}))
    return str(folder)


@pytest.fixture(scope="module")
def ours(folder) -> HarnessModel:
    return HarnessModel(folder, device="cpu", batch_tokens=900)


@pytest.fixture(scope="module")
def theirs(folder):
    """The harness's own model of the same folder."""
    pytest.importorskip("accelerate", reason="the hf model of the harness needs accelerate")
    return get_model("hf")(pretrained=folder, device="cpu", dtype="float32", batch_size=1)


def requests(kind, *arguments):
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def evaluate(model, tasks):
    manager = TaskManager(include_path=tasks, include_defaults=False)
    return simple_evaluate(
        model=model, tasks=list(NAMES), num_fewshot=0, task_manager=manager, bootstrap_iters=0, log_samples=True
    )


def test_log_likelihoods_are_those_of_the_hf_model(ours, theirs):
    long = "the old river keeps a new garden near every stone " * 60
    pairs = [
        ("the old", " river"),
        ("the old ", "river"),  # the space moves
        ("the quiet lantern", " keeps every bright stone"),
        ("", "the garden"),
        (long, " market"),  # cut on the left
        ("the", long),  # longer than the context by itself
        ("日本", "語"),
        ("x", "y"),
    ]
    pairs = [pair for pair in pairs if len(ours.model.encode(pair[1])) <= ours.max_length]  # theirs asserts so
    assert len(pairs) == 7
    assert len(ours.tok_encode(long)) > ours.max_length
    found = ours.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    expected = theirs.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (value, greedy), (other, other_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(other, abs=1e-4)
        assert greedy == other_greedy


def test_greedy_continuations_are_greedy_and_those_of_the_hf_model(ours, theirs):
    asked = [("the old", {"until": ["\n\n"], "max_gen_toks": 8}), ("a bright new lantern", {"max_gen_toks": 5})]
    asked += [("every stone", {"until": ["zzz"], "max_gen_toks": 8}), ("stone " * 500, {"max_gen_toks": 8})]
    found = ours.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    # theirs gives mask and padding ids a chance, ours never
    assert found == theirs.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert all(found)
    text = found[0]
    cut = ours.generate_until(requests("generate_until", ("the old", {"until": text[1:3], "max_gen_toks": 8})))
    assert cut == [text[: text.find(text[1:3])]]
    with pytest.raises(UserError, match="max_gen_toks 400 leaves no room in the context of 400 tokens"):
        ours.generate_until(requests("generate_until", ("the", {"max_gen_toks": 400})))


def test_sampling_is_repeatable(ours):
    asked = requests("generate_until", ("the old", {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 0}))
    assert (
        ours.generate_until(asked)
        == ours.generate_until(asked)
        != ours.generate_until(requests("generate_until", ("the old", {})))
    )


def test_repeats_of_a_request_are_drawn_apart_in_every_batch(ours):
    """The harness asks the same again for pass@k; a batch has room for a few of them."""
    asked = [("the old", {"do_sample": True, "temperature": 1.5, "max_gen_toks": 200})] * 12
    found = ours.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert len(set(found)) == 12


def test_nothing_is_generated_after_a_stop_string(ours, monkeypatch):
    written = []
    generate = ours.model.generate
    monkeypatch.setattr(
        ours.model, "generate", lambda *args, **kwargs: written.extend(generate(*args, **kwargs)) or written
    )
    options = {"until": ["zzz"], "max_gen_toks": 100}
    (whole,) = ours.generate_until(requests("generate_until", ("the old", options)), disable_tqdm=True)
    stop = whole[3:6]
    written.clear()
    (cut,) = ours.generate_until(
        requests("generate_until", ("the old", {**options, "until": [stop]})), disable_tqdm=True
    )
    assert cut == whole[: whole.find(stop)]
    assert len(written[0]) < 10


def test_rolling_log_likelihoods_are_those_of_the_hf_model(ours, theirs):
    texts = [("the old river",), ("every bright garden " * 200,), ("the",)]
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-4)
    # the first window by hand; a BOS that the tokenizer writes is scored too, after another
    ids = ours.model.tokenizer.encode_whole("the old river")
    ((log_probs, _),) = ours.model.log_probs([[ours.prefix_token_id, *ids]], [1])
    assert found[0] == pytest.approx(float(log_probs.sum()), abs=1e-4)


def test_the_harness_gives_both_models_the_same_scores(ours, theirs, tasks):
    found, expected = evaluate(ours, tasks), evaluate(theirs, tasks)
    for name in NAMES:
        assert found["results"][name] == expected["results"][name]
        for sample, other in zip(found["samples"][name], expected["samples"][name], strict=True):
            values, others = ([value for value, _ in each["filtered_resps"]] for each in (sample, other))
            assert values == pytest.approx(others, abs=1e-4)


TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] | trim + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + TEMPLATE
HISTORIES = [
    [{"role": "user", "content": " the old river "}],
    [{"role": "system", "content": "be bright"}, {"role": "user", "content": "every garden"}],
    [
        {"role": "user", "content": "the stone"},
        {"role": "assistant", "content": "is old"},
        {"role": "user", "content": "the river {{ 1 }} <|endoftext|>"},
    ],
]


@pytest.fixture(scope="module", params=["template without BOS", "template with BOS", "no system"])
def chat_models(request, folder, tmp_path_factory):
    """Our model and the harness's own of a folder whose tokenizer has a chat template."""
    pytest.importorskip("accelerate", reason="the hf model of the harness needs accelerate")
    if request.param == "template with BOS" and "bos_token" not in (Path(folder) / "tokenizer_config.json").read_text():
        template = "{{ eos_token }}" + TEMPLATE
    else:
        template = {"template with BOS": "{{ bos_token }}" + TEMPLATE, "no system": NO_SYSTEM}.get(
            request.param, TEMPLATE
        )
    copy = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").write_text(template)
    theirs = get_model("hf")(pretrained=str(copy), device="cpu", dtype="float32", batch_size=1)
    return HarnessModel(str(copy), device="cpu", batch_tokens=900), theirs


@pytest.mark.parametrize("history", HISTORIES)
def test_chat_prompts_are_those_of_the_hf_model(chat_models, history):
    ours, theirs = chat_models
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.chat_template(False) is None
    prompt = ours.apply_chat_template(history)
    assert prompt == theirs.apply_chat_template(history)
    assert ours.tok_encode(prompt) == theirs.tok_encode(prompt)
    for beginning in ("The answer is", "The answer is "):  # the template trims the second
        started = [*history, {"role": "assistant", "content": beginning}]
        prompt = ours.apply_chat_template(started, add_generation_prompt=False)
        assert prompt == theirs.apply_chat_template(started, add_generation_prompt=False)
        assert prompt.endswith("The answer is")
        assert ours.tok_encode(prompt) == theirs.tok_encode(prompt)


def test_the_harness_gives_both_models_the_same_scores_with_a_chat_template(chat_models, tasks):
    found, expected = (
        simple_evaluate(
            model=model,
            apply_chat_template=True,
            system_instruction="be bright",
            tasks=["own_arc_easy", "own_winogrande", "own_write"],
            num_fewshot=0,
            task_manager=TaskManager(include_path=tasks, include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
        for model in chat_models
    )
    for name in ("own_arc_easy", "own_winogrande", "own_write"):
        for sample, other in zip(found["samples"][name], expected["samples"][name], strict=True):
            assert sample["arguments"] == other["arguments"]
            if name != "own_write":  # theirs gives mask and padding ids a chance, ours never
                values, others = ([value for value, _ in each["filtered_resps"]] for each in (sample, other))
                assert values == pytest.approx(others, abs=1e-4)


def test_the_command_line_applies_a_chat_template(source_folder, tasks, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "model"
    shutil.copytree(source_folder, copy)
    manager = TaskManager(include_path=tasks, include_defaults=False)  # its own tasks take ten seconds to find
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: manager)
    words = ["run", "--model", "meap_lit", "--tasks", "own_write", "--limit", "1", "--model_args"]
    for wrong, message in (
        ("chekpoint=x", "--model_args: missing a required argument: 'checkpoint'; choose from checkpoint, tokenizer,"),
        ("checkpoint=no/where", "checkpoint no/where does not exist"),
        (f"checkpoint={copy},dtype=half", "dtype must be float32, bfloat16 or auto, got half"),
        (f"checkpoint={copy},device=gpu", "device gpu is not known to torch; write cpu, cuda, cuda:1 or auto"),
    ):
        monkeypatch.setattr("sys.argv", ["harness", *words, wrong])
        assert harness.main() == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
    words += [f"checkpoint={copy},dtype=auto", "--apply_chat_template"]  # no device, which then is cuda:0
    monkeypatch.setattr("sys.argv", ["harness", *words])
    assert harness.main() == 2
    assert f"error: tokenizer {copy} has no chat_template; name a template" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["harness", *words, "alpaca"])
    assert harness.main() == 0
    assert "own_write" in capsys.readouterr().out
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.setattr("sys.argv", ["harness", *words])
    assert harness.main() == 0


def test_without_the_harness_its_command_line_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(harness.__file__, run_name="__main__")
    assert ending.value.code == 2
    assert "pip install 'meap-lit[harness]'" in capsys.readouterr().err.splitlines()[-1]


def test_a_model_that_knows_is_always_right_and_its_opposite_never(ours, tasks, monkeypatch):
    task = Commonsense(tasks=NAMES, include_path=tasks)
    items = task.items(ours.model)
    right = {tuple(row) for item in items for row, _ in (item.rows[index] for index in item.fields["gold"])}

    def accuracy(of_right, of_wrong):
        def log_probs(rows, first):
            values = [of_right if tuple(row) in right else of_wrong for row in rows]
            return [(torch.tensor([value]), torch.tensor([True])) for value in values]

        monkeypatch.setattr(ours.model, "log_probs", log_probs)
        answers = task.answer(ours.model, items)
        scores = [task.score({**item.fields, **answer}) for item, answer in zip(items, answers, strict=True)]
        return {value for score in scores for value in score.values()}

    assert accuracy(0.0, -1.0) == {100}
    assert accuracy(-1.0, 0.0) == {0}


def test_our_command_has_the_scores_of_the_harness(ours, tasks):
    expected = evaluate(ours, tasks)["results"]
    task = Commonsense(tasks=NAMES, include_path=tasks)
    items, num_skipped = choose_items(task, ours.model, "stop")
    assert (len(items), num_skipped) == (10, 0)
    records = []
    longest_first = sorted(items, key=lambda item: -item.num_tokens)
    for batch in batches(longest_first, 500, lambda item: item.num_tokens):
        for item, answer in zip(batch, task.answer(ours.model, batch), strict=True):
            record = json.loads(json.dumps({"id": item.id, "cell": item.cell, **item.fields, **answer}))
            records.append({**record, "scores": task.score(record)})
    result = Result(task, "x", records)
    accuracy, acc, acc_norm = (result.along("task", metric) for metric in task.metrics)
    for name in NAMES:
        has_norm = "acc_norm,none" in expected[name]
        assert has_norm == (name in acc_norm) == (name in ("own_arc_easy", "own_hellaswag"))
        assert acc[name].value == pytest.approx(100 * expected[name]["acc,none"])
        assert accuracy[name].value == pytest.approx(100 * expected[name]["acc_norm,none" if has_norm else "acc,none"])
    assert task.extra(result)["questions that lost their beginning"] == 1


@pytest.mark.parametrize(("num_more", "is_cut"), [(-1, False), (0, False), (1, True)])
def test_a_question_that_just_fits_is_not_counted_as_cut(ours, tasks, monkeypatch, num_more, is_cut):
    task = Commonsense(tasks=("own_boolq",), include_path=tasks, limit=1)
    (item,) = task.items(ours.model)
    longest = len(item.input_ids)
    monkeypatch.setattr(HarnessModel, "max_length", longest - 1 - num_more)  # the last token is not read
    (item,) = task.items(ours.model)
    assert item.fields["is_cut"] == is_cut
    assert len(item.input_ids) == longest - max(0, num_more)


def test_prompts(ours, tasks):
    """What stands in the records is what the protocol says of each task."""
    items = {item.id: item for item in Commonsense(tasks=NAMES, include_path=tasks, limit=1).items(ours.model)}
    assert len(items) == 4
    question, choices, _ = ARC[0]
    arc = items["own_arc_easy-0"].fields
    assert arc["arguments"] == [(f"Question: {question}\nAnswer:", f" {choice}") for choice in choices]
    assert (arc["gold"], arc["choices"]) == ([1], choices)
    assert items["own_boolq-0"].fields["arguments"] == [
        ("the garden is old\nQuestion: is the garden new?\nAnswer:", f" {choice}") for choice in ("no", "yes")
    ]
    assert items["own_winogrande-0"].fields["arguments"] == [
        (f"the stone is near the river since the {option}", " is old .") for option in ("stone", "river")
    ]
    assert items["own_winogrande-0"].fields["gold"] == [0]
    assert items["own_hellaswag-0"].fields["arguments"] == [
        ("Gardening: a river. keeps the old Market. the stone is", f" {end}") for end in ("quiet", "new and old", "a")
    ]
    assert items["own_hellaswag-0"].fields["gold"] == [2]
    tokenizer = ours.model.tokenizer
    for row, _ in (row for item in items.values() for row in item.rows):
        assert row[: len(tokenizer.before_text)] == tokenizer.before_text
        assert row.count(tokenizer.bos_token_id) == len(tokenizer.before_text)


def test_tokens_are_those_of_the_hf_model(ours, theirs):
    assert (ours.prefix_token_id, ours.eot_token_id) == (theirs.prefix_token_id, theirs.eot_token_id)
    for text in ("the old river", " a", "", "\n日本"):
        for asked in (None, True, False):
            assert ours.tok_encode(text, add_special_tokens=asked) == theirs.tok_encode(text, add_special_tokens=asked)
    # a context without tokens is as good as none
    assert ours.row(" ", "the") == ([ours.prefix_token_id, *ours.model.tokenizer.encode(" the")], 1)
    assert ours._prompt("", 8) == [ours.prefix_token_id]


def test_the_harness_makes_it_by_name(source_folder, tasks):
    results = simple_evaluate(
        model="meap_lit",
        model_args=f"checkpoint={source_folder},dtype=float32,device=cpu",
        tasks=["own_boolq", "own_write"],
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        bootstrap_iters=0,
        limit=2,
    )
    assert results["results"]["own_boolq"]["acc,none"] in (0, 0.5, 1)
    assert results["results"]["own_write"]["exact_match,none"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ()}, "tasks must name tasks"),
        ({"tasks": ("own_boolq",), "limit": 0}, "limit must be at least 1, got 0"),
        ({"tasks": ("own_write",)}, "task own_write must be multiple_choice, got generate_until; run it with"),
        ({"tasks": ("own_rule",)}, "task own_rule must be scored by acc or acc_norm, but has a process_results of its"),
        ({"tasks": ("own_f1",)}, "task own_f1 must be scored by acc or acc_norm, got f1; run it with the harness"),
        ({"tasks": ("own_boolq",), "include_path": "no/where"}, "include_path no/where is not a folder"),
        ({"tasks": ("own_broken",)}, "cannot load the tasks own_broken: .*downloaded from the Hugging Face Hub"),
    ],
)
def test_wrong_options(source_folder, tasks, options, message):
    (Path(tasks) / "broken.yaml").write_text(
        (Path(tasks) / "boolq.yaml").read_text().replace("own_boolq", "own_broken").replace("boolq.jsonl", "none.jsonl")
    )
    with pytest.raises(UserError, match=message):
        Commonsense(**{"include_path": tasks, **options}).items(LanguageModel(str(source_folder), device="cpu"))


def test_unknown_task(source_folder, monkeypatch, tasks):
    # its own tasks take ten seconds to find
    monkeypatch.setattr("meap_lit.evaluation.harness.TaskManager", lambda **_: TaskManager(include_defaults=False))
    with pytest.raises(UserError, match="lm-evaluation-harness has no task 'arc_esy'; the command lm_eval ls tasks"):
        Commonsense(tasks=("arc_esy",)).items(LanguageModel(str(source_folder), device="cpu"))
