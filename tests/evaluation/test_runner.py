"""Answers survive a kill and come out alike on any number of processes; scores follow from them."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from datetime import datetime, timedelta

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from meap_lit.cli import main
from meap_lit.errors import UserError
from meap_lit.evaluation.attention.masked import MaskedAttention
from meap_lit.evaluation.attention.segments import AttentionSegments
from meap_lit.evaluation.command import Evaluate, label_of
from meap_lit.evaluation.runner import Records, _share, alike_together, batches, begun, choose_items, fingerprint
from meap_lit.evaluation.statistics import Mean, bootstrap
from meap_lit.evaluation.task import Item, Result, difference
from meap_lit.evaluation.tasks.facts import FactRetrieval
from meap_lit.evaluation.tasks.key_value import KeyValueRetrieval
from meap_lit.inference.generation import Sampling
from meap_lit.inference.language_model import LanguageModel
from tests.support.toy_module import fork_command
from tests.support.toy_task import CountLetters

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "letters.yaml"
    file.write_text(
        f"task:\n  class_path: tests.support.toy_task.CountLetters\noutput: {tmp_path / 'out'}\nbatch_tokens: 40\n"
    )
    return file


def records_of(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_a_killed_evaluation_goes_on_where_it_was(recipe, source_folder, tmp_path):
    folder = tmp_path / "out" / "letters" / "source"
    command = ["evaluate", "--config", str(recipe), "--checkpoint", str(source_folder), "--label", "source"]
    statuses, log = fork_command([*command, "--task.kill_after", "3"])
    assert statuses == [-signal.SIGKILL], log
    [part] = folder.glob("predictions.part-0.jsonl")
    before = [json.loads(line) for line in part.read_text().splitlines()]
    assert len(before) == 6, "three batches of two items of 20 tokens"
    with open(part, "a") as file:
        file.write('{"id": "10-gar')  # as a kill in the middle of a line leaves it

    settings = json.loads((folder / "settings.json").read_text())
    settings["task"]["init_args"]["kill_after"] = None
    (folder / "settings.json").write_text(json.dumps(settings))
    assert main(command) == 0
    records = records_of(folder)
    assert [record["id"] for record in records] == [item.id for item in CountLetters().items(Fake)]
    assert {record["id"] for record in records if record["pid"] != os.getpid()} == {record["id"] for record in before}
    assert not list(folder.glob("predictions.part-*"))


class Fake:
    class tokenizer:
        encode = staticmethod(lambda text: [1])


def test_old_answers_are_drawn_together_as_the_items_are_now(recipe, source_folder, tmp_path):
    command = ["evaluate", "--config", str(recipe), "--checkpoint", str(source_folder), "--label", "source"]
    assert main(command) == 0
    folder = tmp_path / "out" / "letters" / "source"
    before = records_of(folder)
    lines = "".join(json.dumps({**record, "group": "of an older version"}) + "\n" for record in before)
    (folder / "predictions.jsonl").write_text(lines)
    assert main(command) == 0
    assert records_of(folder) == before


def test_a_part_that_was_left_behind_replaces_nothing(recipe, source_folder, tmp_path):
    command = ["evaluate", "--config", str(recipe), "--checkpoint", str(source_folder), "--label", "source"]
    assert main(command) == 0
    folder = tmp_path / "out" / "letters" / "source"
    merged = folder / "predictions.jsonl"
    shutil.copy(merged, folder / "predictions.part-0.jsonl")
    judged = [{**record, "verdicts": {"a judge": True}} for record in records_of(folder)]
    merged.write_text("".join(json.dumps(record) + "\n" for record in judged))
    assert main(command) == 0
    assert records_of(folder) == judged
    assert [file.name for file in folder.glob("predictions*")] == ["predictions.jsonl"]


def on_two_processes(*command):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*torchrun, "-m", "meap_lit", *command]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)


def test_machines_may_have_the_same_files_in_other_places(source_folder, tmp_path):
    options = ["--checkpoint", str(source_folder), "--output", str(tmp_path / "out"), "--label", "a"]
    command = ["evaluate", "--task", "tests.support.toy_task.OnTwoMachines", *options]
    for _ in range(2):
        result = on_two_processes(*command)
        assert result.returncode == 0, result.stderr
    (settings,) = (tmp_path / "out").rglob("settings.json")
    assert json.loads(settings.read_text())["place"] == "/machine_0"
    result = on_two_processes(*command, "--name", "other", "--task.miss", "7")
    assert "error: process 1 has other items than the first; give all machines the same data files" in result.stderr


def test_two_processes_find_what_one_does(recipe, source_folder, tmp_path):
    command = ["evaluate", "--config", str(recipe), "--checkpoint", str(source_folder), "--label"]
    assert main([*command, "one"]) == 0
    result = on_two_processes(*command, "two")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("two: 12 items") == 1
    one, two = (records_of(tmp_path / "out" / "letters" / label) for label in ("one", "two"))
    assert len({record.pop("pid") for record in two}) == 2
    assert len({record.pop("pid") for record in one}) == 1
    assert one == two


def test_two_checkpoints_stand_side_by_side(recipe, source_folder, tmp_path, capsys):
    right = tmp_path / "right"
    right.symlink_to(source_folder)
    Evaluate(
        task=CountLetters(miss=1, lengths=(10,)),
        checkpoint=[str(source_folder), str(right)],
        label=["wrong", "right"],
        output=str(tmp_path / "pair"),
    ).run()
    folder = tmp_path / "pair" / "letters" / "wrong--right"
    content = json.loads((folder / "result.json").read_text())
    assert content["difference"]["right"] == {"value": 100.0, "low": 100.0, "high": 100.0, "n": 6}
    assert content["difference"]["near"]["value"] == 0
    assert content["differences"][:2] == [
        {"length": 10, "value": 100.0, "low": 100.0, "high": 100.0, "n": 6},
        {"word": "garden", "value": 100.0, "low": None, "high": None, "n": 1},  # one item has no interval
    ]
    assert [result["scores"]["right"]["value"] for result in content["results"]] == [0, 100]
    assert content["extra"] == {
        "sum of counts (wrong)": 36.0,
        "sum of counts (right)": 30.0,
        "nothing (wrong to right)": None,
    }
    first = content["results"][0]
    assert first["items"][0] | {"pid": 0} == {
        "id": "10-garden",
        "group": "10-garden",
        "cell": {"length": 10, "word": "garden"},
        "word": "garden",
        "count": 7,
        "pid": 0,
        "scores": {"right": 0.0, "near": 100.0},
    }
    assert first["cells"][0]["length"] == 10
    assert first["cells"][0]["near"] == {"value": 100.0, "error": 0.0, "n": 1}
    assert len(first["about"]["items"]) == 64
    assert (folder / "letters.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(folder))
    events.Reload()
    assert events.Scalars("letters/right/right")[0].value == 100
    assert events.Tags()["images"] == ["letters/letters"]
    printed = capsys.readouterr().out
    assert "wrong" in printed.splitlines()[0]
    assert printed.count("+100.00 [+100.00, +100.00]") == 1, "all items"
    assert printed.count("+100.00 (no interval)") == 6, "each of the words"
    assert "right by word" in printed


def test_batches_hold_a_number_of_positions():
    items = [Item(str(size), {}, {}, [], size) for size in (50, 20, 19, 18, 5, 5)]
    found = batches(items, 40, lambda item: item.num_tokens)
    assert [[item.num_tokens for item in batch] for batch in found] == [[50], [20, 19], [18, 5], [5]]


def test_a_batch_is_as_long_as_the_longest_in_it():
    assert list(batches([9, 10, 9, 9, 3, 3, 4], 30, int)) == [[9, 10, 9], [9, 3, 3], [4]]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_ranks_divide_each_batch_evenly(num_ranks):
    sizes = sorted(np.random.default_rng(0).integers(1, 45, 100).tolist(), reverse=True)
    for count in (0, 1, 5, 100):
        rounds = list(batches(sizes[:count], 40, int, num_ranks))
        shares = [[_share(batch, rank, num_ranks) for rank in range(num_ranks)] for batch in rounds]
        assert [size for batch in shares for share in batch for size in share] == sizes[:count]
        for batch in shares:
            assert max(map(len, batch)) - min(map(len, batch)) <= 1
            assert all(len(share) <= 1 or len(share) * max(share) <= 40 for share in batch)


def test_what_begins_alike_stands_together():
    """Two texts of 80 tokens, each ended in three ways, among others of about that length."""
    first, second = [1] * 80, [2] * 80
    rows = {
        "a1": [*first, 5, 6, 7],
        "x": [3] * 84,
        "b1": [*second, 5, 6],
        "a2": [*first, 9],
        "y": [4] * 82,
        "b2": [*second, 5],
        "short": [*first[:60], 8],  # shorter by more than an eighth
        "a3": first,
        "shorter": [*first[:59], 8],
    }
    items = [Item(name, {}, {}, row, len(row)) for name, row in rows.items()]
    found = [item.id for item in alike_together(items)]
    assert found == ["x", "a3", "a1", "a2", "b2", "b1", "y", "short", "shorter"]
    assert alike_together([]) == []


def test_without_common_beginnings_the_longest_comes_first():
    items = [Item(str(n), {}, {}, [n, *[0] * (n % 7)], 100 + n % 7) for n in range(40)]
    assert alike_together(items) == sorted(items, key=lambda item: -item.num_tokens)


# --------------------------------------------------------------------------------------------------- numbers


def result(scores, name="a"):
    records = [
        {"id": str(n), "group": str(n), "cell": {"length": 10 * (n // 2)}, "scores": {"right": score}}
        for n, score in enumerate(scores)
    ]
    return Result(CountLetters(), name, records)


def test_means_and_errors_are_those_of_the_textbook():
    mean = result([100, 0, 0, 0]).mean("right")
    assert mean == Mean(25.0, 100 * math.sqrt(0.25 * 0.75 / 4), 4)
    assert result([100, 0, 0, 0]).along("length") == {
        0: (50.0, pytest.approx(100 * math.sqrt(0.25 / 2)), 2),
        10: (0.0, 0.0, 2),
    }
    assert result([100, 0, 0, 0]).table()[(10,)].value == 0
    assert math.isnan(Mean.of([]).value)


def test_the_difference_is_paired():
    first, second = result([0, 100, 0, 0]), result([0, 100, 100, 100])
    change = difference(first, second, "right")
    assert change.value == 50
    assert change.n == 4
    assert 0 <= change.low < 50 < change.high <= 100
    assert difference(first, first, "right")[:3] == (0, 0, 0)


def test_what_belongs_together_is_drawn_together():
    """Ten questions asked 50 times alike tell no more than ten questions asked once."""
    deltas = [100.0, 0, 0, 100, 0, 100, 0, 0, 0, 100]
    once, often = (
        bootstrap([{str(number): [delta] * times for number, delta in enumerate(deltas)}]) for times in (1, 50)
    )
    assert often == once._replace(n=500)
    assert once.value == 40
    apart = bootstrap([{str(number): [delta] for number, delta in enumerate(deltas * 50)}])
    assert apart.high - apart.low < (once.high - once.low) / 5


def test_one_question_of_one_seed_has_no_interval():
    change = bootstrap([{"a": [5.0, 7.0]}])
    assert change[:4:3] == (6.0, 2)
    assert math.isnan(change.low)
    assert change.text(1) == "+6.0 (no interval)"
    assert bootstrap([{"a": [5.0]}, {"a": [7.0]}]).text(1) == "+6.0 [+5.0, +7.0]", "two seeds have one"


def test_the_error_over_seeds_estimates_that_of_all_seeds():
    assert Mean.of_seeds([10.0, 20.0]) == Mean(15.0, 5.0, 2)
    assert math.isnan(Mean.of_seeds([10.0]).error)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """95% of 400 samples of 40 normal differences with mean 1, in a range of four standard errors."""
    generator = np.random.default_rng(1)
    samples = generator.normal(1.0, 2.0, size=(400, 40))
    groups = [{str(number): [delta] for number, delta in enumerate(row)} for row in samples]
    covered = sum(low <= 1.0 <= high for _, low, high, *_ in (bootstrap([sample], 500) for sample in groups))
    assert 0.95 - 0.06 <= covered / 400 <= 0.95 + 0.04


# ---------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/models/Llama-3", "Llama-3"),
        ("/x/runs/meap_0.1b", "meap_0.1b"),
        ("/x/runs/meap_0.1b/version_3", "meap_0.1b-version_3"),
        ("/checkpoints/last.ckpt", "last"),
        ("/x/runs/meap_0.1b/version_3/checkpoints/step=12.ckpt", "meap_0.1b-version_3-step=12"),
    ],
)
def test_a_label_says_which_checkpoint(path, label):
    assert label_of(path) == label


# ----------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--task.lengths", "[10, 500]", "--name", "other"],
            "6 of 12 items of letters are longer than the context of .*, 400 tokens: the",
        ),
        (
            ["--task.lengths", "[500]", "--on_overflow", "skip", "--name", "other"],
            "6 of 6 items .* needs 500; make the task shorter$",
        ),
        (["--batch_tokens", "0"], "batch_tokens must be at least 1, got 0"),
        (["--label", "a", "b"], "--label must give each checkpoint a name of its own, got a, b"),
        (["--label", "../x"], r"--label must be the name of a folder, without any above it, got '\.\./x'"),
        (["--label", ".."], r"--label must be the name of a folder, without any above it, got '\.\.'"),
        (["--name", "/tmp/x"], "--name must be the name of a folder, without any above it, got '/tmp/x'"),
        (["--task.mis", "2"], "CountLetters has no option 'mis'; did you mean 'miss'"),
    ],
)
def test_wrong_input_is_one_line(recipe, source_folder, capsys, options, message):
    label = [] if "--label" in options else ["--label", "one"]
    assert main(["evaluate", "--config", str(recipe), "--checkpoint", str(source_folder), *label, *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error), error


def test_what_is_generated_counts_in_the_length_of_an_item(source_folder):
    task = KeyValueRetrieval(num_pairs=20, num_sets=1, max_new_tokens=30)
    model = LanguageModel(str(source_folder))
    longest = max(len(item.input_ids) for item in task.items(model)) + 30
    with pytest.raises(UserError, match=f"the longest needs {longest}, answer included; make the task shorter"):
        choose_items(task, model, "stop")


def test_other_weights_in_the_same_place_are_refused(recipe, source_folder, tmp_path, capsys):
    folder = shutil.copytree(source_folder, tmp_path / "model")
    command = ["evaluate", "--config", str(recipe), "--checkpoint", str(folder)]
    assert main(command) == main(command) == 0
    os.utime(folder / "model.safetensors", (0, 0))
    assert main(command) == 2
    message = r"letters/model has answers for another weights \(.* bytes of 2.* then, .* bytes of 1970-01-01T00:00:00"
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"rope_theta": 500.0}, r"another model\.rope_theta \(10000\.0 then, 500\.0 now\); choose"),
        (
            "config.json",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
            r"another model\.rope_scaling\.type \(None then, linear now\)",
        ),
        (
            "generation_config.json",
            {"eos_token_id": [2, 5]},
            r"another stop_token_ids \(\[0, 2\] then, \[0, 2, 5\] now\)",
        ),
        ("generation_config.json", {"suppress_tokens": [7]}, r"another suppress_tokens \(\[\] then, \[7\] now\)"),
    ],
)
def test_what_else_decides_answers_is_compared(source_folder, tmp_path, file, changes, message):
    folder = shutil.copytree(source_folder, tmp_path / "model")
    output = str(tmp_path / "out")
    command = Evaluate(
        task=KeyValueRetrieval(num_pairs=2, num_sets=1, max_new_tokens=2), checkpoint=[str(folder)], output=output
    )
    command.run()
    command.run()
    content = json.loads((folder / file).read_text())
    if "rope_theta" in changes:  # where transformers 5 has it
        changes = {"rope_parameters": {"rope_type": "default", **changes}}
    (folder / file).write_text(json.dumps(content | changes))
    with pytest.raises(UserError, match=message) as error:
        command.run()
    assert "\n" not in str(error.value)
    (settings,) = (tmp_path / "out").rglob("settings.json")
    written = json.loads(settings.read_text())
    for name in ("model", "stop_token_ids", "suppress_tokens"):
        del written[name]
    settings.write_text(json.dumps(written))
    command.run()  # earlier versions did not write them


def test_the_end_of_an_answer_in_a_chat_is_compared(source_folder, tmp_path):
    template = tmp_path / "chat.jinja"
    answers = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}END{% endif %} {% endfor %}"
    options = {"prompt_style": "chat", "template": str(template), "num_pairs": 2, "num_sets": 1, "max_new_tokens": 2}
    command = Evaluate(task=KeyValueRetrieval(**options), checkpoint=[str(source_folder)], output=str(tmp_path / "out"))
    template.write_text(answers.replace("END", "[MASK]"))
    command.run()
    template.write_text(answers.replace("END", "."))
    with pytest.raises(UserError, match=r"has answers for another stop_token_ids \(\[0, 1, 2\] then, \[0, 2\] now\)"):
        command.run()


def test_long_settings_that_differ_at_their_end_are_shown_with_it(tmp_path):
    ids = list(range(500))
    Records(tmp_path, {"stop_token_ids": ids}).begin("items")
    with pytest.raises(UserError, match=r"another stop_token_ids \(\[0, .* 498, 499\] then, \[0, .* 498, 7\] now\)"):
        Records(tmp_path, {"stop_token_ids": [*ids[:-1], 7]})


def test_a_template_writes_the_day_on_which_an_evaluation_began(source_folder, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ strftime_now('%Y-%m-%d') }} {% for m in messages %}{{ m.content }} {% endfor %}")
    options = {"prompt_style": "chat", "template": str(template), "num_pairs": 2, "num_sets": 1, "max_new_tokens": 2}
    command = Evaluate(task=KeyValueRetrieval(**options), checkpoint=[str(source_folder)], output=str(tmp_path / "out"))
    command.run()
    (file,) = (tmp_path / "out").rglob("settings.json")
    settings = json.loads(file.read_text())
    assert datetime.now() - datetime.fromisoformat(settings["begun"]) < timedelta(hours=1)
    model = LanguageModel(str(source_folder))
    model.today = datetime(1999, 12, 31)
    items = command.task.items(model)
    assert model.tokenizer.decode(items[0].input_ids).startswith("1999-12-31 ")
    then = {**settings, "items": fingerprint(items)}
    file.write_text(json.dumps({**then, "begun": "1999-12-31T23:59:00"}))
    command.run()
    file.write_text(json.dumps({**then, "begun": "2000-01-01T00:00:00"}))
    with pytest.raises(UserError, match="has answers for another items"):
        command.run()


def test_all_checkpoints_of_an_evaluation_have_the_date_of_the_first(tmp_path):
    for label, begin in (("a", "2001-01-01T00:00:00"), ("b", "2000-12-31T23:59:00"), ("c", None)):
        (tmp_path / label).mkdir()
        (tmp_path / label / "settings.json").write_text(json.dumps({"begun": begin} if begin else []))
    now = datetime(2001, 1, 2, 3, 4, 5, 6)
    assert begun(tmp_path / "new", now) == datetime(2000, 12, 31, 23, 59)
    assert begun(tmp_path / "a", now) == datetime(2001, 1, 1), "its answers are for that date"
    assert begun(tmp_path / "another" / "new", now) == begun(tmp_path / "c", now) == now.replace(microsecond=0)


def test_processes_that_do_not_know_of_each_other_are_refused(recipe, source_folder, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert main(["evaluate", "--config", str(recipe), "--checkpoint", str(source_folder)]) == 2
    assert "error: srun started several processes that are not connected; start" in capsys.readouterr().err


def evaluated(task, folder) -> None:
    Evaluate(task=task, checkpoint=[str(folder)], output=str(folder.parent / "out")).run()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "use",
    [
        lambda folder: evaluated(KeyValueRetrieval(num_pairs=2, num_sets=1, max_new_tokens=2), folder),
        lambda folder: evaluated(FactRetrieval(lengths=[200], num_items=1), folder),
        lambda folder: LanguageModel(str(folder)).log_probs([[5, 6, 8]], [1]),
        lambda folder: LanguageModel(str(folder)).generate([[5, 6]], max_new_tokens=2, sampling=Sampling(1.0)),
    ],
    ids=["generation", "facts", "log-likelihoods", "sampling"],
)
def test_values_that_are_not_finite_are_no_answers(source_folder, tmp_path, use, value):
    folder = shutil.copytree(source_folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][7] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"values that are not finite \(NaN or infinity\).*; add --dtype float32, or"):
        use(folder)
    assert not list(tmp_path.rglob("predictions*"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", [MaskedAttention, AttentionSegments])
def test_attention_that_is_not_finite_is_no_answer(source_folder, prepared, tmp_path, kind, value):
    folder = shutil.copytree(source_folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    masked = {"dataset": prepared.dataset, "seq_len": 60, "num_sequences": 1}
    segments = {"lengths": [200], "depths": [50.0], "num_items": 1}
    with pytest.raises(UserError, match=r"values that are not finite \(NaN or infinity\)"):
        evaluated(kind(**(masked if kind is MaskedAttention else segments)), folder)
    assert not list(tmp_path.rglob("predictions*"))


def test_more_processes_than_gpus_are_refused(recipe, source_folder, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(CountLetters, "items", None)  # nothing is prepared
    assert main(["evaluate", "--config", str(recipe), "--checkpoint", str(source_folder)]) == 2
    message = "error: more processes than the 2 GPUs of this machine; use --nproc_per_node 2"
    assert message in capsys.readouterr().err


def test_long_items_are_left_out_and_counted(recipe, source_folder, capsys):
    options = ["--task.lengths", "[10, 500]", "--on_overflow", "skip", "--label", "short"]
    assert main(["evaluate", "--config", str(recipe), "--checkpoint", str(source_folder), *options]) == 0
    assert "short: 6 items, 6 skipped as too long" in capsys.readouterr().out


def test_the_result_says_how_much_a_run_had_read_and_on_what_it_was_evaluated(recipe, toy_recipe, tmp_path):
    assert main(["fit", "--config", str(toy_recipe), "--budget.max_steps", "3"]) == 0
    options = ["--task.lengths", "[10]", "--label", "a"]
    assert main(["evaluate", "--config", str(recipe), "--checkpoint", str(tmp_path / "runs" / "toy"), *options]) == 0
    content = json.loads((tmp_path / "out" / "letters" / "a" / "result.json").read_text())
    about = content["results"][0]["about"]
    assert about["tokens_seen"] == 3 * 8 * 32
    (summary,) = (tmp_path / "runs" / "toy").rglob("summary.json")
    assert about["device"] == json.loads(summary.read_text())["device"]


def test_a_result_is_of_the_machine_that_answered_not_of_the_one_that_printed_it(
    recipe, source_folder, tmp_path, monkeypatch
):
    command = ["evaluate", "--config", str(recipe), "--checkpoint", str(source_folder), "--label", "a"]
    folder = tmp_path / "out" / "letters" / "a"

    def about(device):
        monkeypatch.setattr("meap_lit.evaluation.command.device_name", lambda _: device)
        assert main(command) == 0
        return json.loads((folder / "result.json").read_text())["results"][0]["about"]

    first = about("one")
    assert first["device"] == "one"
    assert about("two") == first
    file = folder / "predictions.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    resumed = about("three")
    assert (resumed["device"], [run["device"] for run in resumed["earlier_runs"]]) == ("three", ["one"])
    (folder / "runs.jsonl").unlink()  # earlier versions did not write it
    assert about("four")["device"] == "four"
