"""A run that goes on with another number of devices trains on the samples of one that never stopped, step by step."""

import json
import os
import re
import signal
import sys
from dataclasses import dataclass
from itertools import groupby

import pytest
from litdata import StreamingDataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from meap_lit.cli import main
from meap_lit.data.prepare.text import PrepareText
from meap_lit.data.stream.text import TokenBlocks
from tests.support.split_model import save_split_model
from tests.support.toy_module import fork

NUM_STEPS = 12


@dataclass(frozen=True)
class Leg:
    """A part of a run: on so many devices, up to a step."""

    num_devices: int
    stop: int
    strategy: str
    micro_batch_size: int
    accumulation: int
    num_workers: int = 0


def legs(global_batch_size):
    """2 -> 1 -> 2 -> 4 devices, stopped by a signal after steps 3, 6 and 9; no two with the same micro-batches."""
    half = global_batch_size // 2
    return [
        Leg(2, 3, "ddp", micro_batch_size=half // 2, accumulation=2),
        Leg(1, 6, "single", micro_batch_size=half, accumulation=2),
        Leg(2, 9, "fsdp", micro_batch_size=half, accumulation=1, num_workers=2),
        Leg(4, NUM_STEPS, "fsdp_tp", micro_batch_size=1, accumulation=half),  # two and two read the same rows
    ]


def fit(folder, leg, *arguments):
    """One leg in processes of its own; what they trained on and logged goes to `folder`."""
    folder.mkdir()
    options = ["--config", f"recipes/strategy/{leg.strategy}.yaml", "--trainer.devices", str(leg.num_devices)]
    options += ["--data.micro_batch_size", str(leg.micro_batch_size), "--data.num_workers", str(leg.num_workers)]
    options += ["--trainer.logger.save_dir", str(folder), "--trainer.callbacks+=tests.support.recording.Recorder"]
    options += ["--trainer.callbacks.folder", str(folder)]
    if leg.stop < NUM_STEPS:
        options += ["--trainer.callbacks+=tests.support.interruption.SignalAt"]
        options += ["--trainer.callbacks.number", str(int(signal.SIGTERM))]
        options += ["--trainer.callbacks.batch", str(leg.stop * leg.accumulation - 1)]

    def run():
        log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 2)
        sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115
        sys.exit(main(["fit", *arguments, *options]))

    statuses = fork(run, leg.num_devices, timeout=240)
    expected = 128 + signal.SIGTERM if leg.stop < NUM_STEPS else 0
    assert statuses == [expected] + [0] * (leg.num_devices - 1), (folder / "log").read_text()


def fit_in_legs(folder, recipe, global_batch_size, *arguments):
    """The whole run in `folder`/whole, and the same in legs, each resumed from the one before, in `folder`/0 to 3."""
    config = ["--config", str(recipe), "--data.global_batch_size", str(global_batch_size), *arguments]
    config += ["--budget.max_steps", str(NUM_STEPS)]
    fit(folder / "whole", Leg(1, NUM_STEPS, "single", micro_batch_size=2, accumulation=global_batch_size // 2), *config)
    resume = []
    for number, leg in enumerate(legs(global_batch_size)):
        fit(folder / str(number), leg, *config, *resume)
        resume = ["--ckpt_path", str(folder / str(number) / "toy/version_0/checkpoints" / f"step={leg.stop}.ckpt")]
    return [folder / str(number) for number in range(4)]


def rows_by_step(folder):
    """{step: (hashes, contents) of its rows, in the order of the run} of one leg.

    Processes of the same data-parallel rank must have had the same.
    """
    lines = [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    place = ("step", "micro_batch", "replica")
    lines.sort(key=lambda line: [line[name] for name in place])
    steps = {}
    for (step, *_), same in groupby(lines, key=lambda line: [line[name] for name in place]):
        first, *others = same
        assert all(other == first for other in others)
        hashes, contents = steps.setdefault(step, ([], []))
        hashes += first["hashes"]
        contents += first["contents"]
    return steps


def scalars(folder):
    """{tag: [(step, value)]} of what one leg logged."""
    events = EventAccumulator(str(folder / "toy" / "version_0"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_resumed_exactly(folder, parts, global_batch_size):
    """Every step of the legs had the rows of the whole run, and they went on counting where the last one stopped.

    Returns:
        What stood in the rows, in the order of the run, and what the whole run logged.
    """
    whole, steps = rows_by_step(folder / "whole"), {}
    for part, leg in zip(parts, legs(global_batch_size), strict=True):
        mine = rows_by_step(part)
        assert len({file.name for file in part.glob("*.jsonl")}) == leg.num_devices
        assert not steps.keys() & mine.keys(), "no step is trained twice"
        assert max(mine) == leg.stop - 1
        steps |= mine
    assert sorted(steps) == sorted(whole) == list(range(NUM_STEPS))
    for step, (hashes, _) in whole.items():
        assert len(hashes) == global_batch_size
        assert steps[step][0] == hashes, f"step {step}"
    logged, expected = [scalars(part) for part in parts], scalars(folder / "whole")
    for tag in ("train/lr", "throughput/tokens_seen", *(tag for tag in expected if tag.startswith("mix/"))):
        assert [entry for part in logged for entry in part[tag]] == expected[tag], tag
        assert len(expected[tag]) == NUM_STEPS
    return [content for step in sorted(steps) for content in steps[step][1]], expected


def assert_once_an_epoch(samples, num_samples, num_before_stop):
    """Every epoch has each sample once, though the run stopped within the first, and went on into the second."""
    assert num_before_stop < num_samples < len(samples)
    for start in range(0, len(samples), num_samples):
        epoch = samples[start : start + num_samples]
        assert len(set(epoch)) == len(epoch)
        assert len(epoch) < num_samples or sorted(epoch) == list(range(num_samples))


@pytest.fixture(scope="module")
def mixed_datasets(prepared, tmp_path_factory):
    """Two small datasets and their weights."""
    folder = tmp_path_factory.mktemp("mixed")
    for name, texts in (("large", range(20)), ("small", range(20, 30))):
        files = [str(prepared.texts / f"{number}.txt") for number in texts]
        output = str(folder / name)
        PrepareText(input=files, tokenizer=prepared.tokenizer, output=output, val_share=0.0, num_workers=1).run()
    return {str(folder / "large"): 0.7, str(folder / "small"): 0.3}


# heads that two devices can share
HEADS = ["--model.decoder.num_heads", "4", "--model.decoder.num_kv_heads", "2"]


def test_pretraining_on_a_mix(toy_recipe, mixed_datasets, tmp_path):
    parts = fit_in_legs(tmp_path, toy_recipe, 8, *HEADS, "--data.datasets", json.dumps(mixed_datasets))
    sample_ids, logged = assert_resumed_exactly(tmp_path, parts, 8)
    for source, path in enumerate(mixed_datasets):
        samples = [sample_id % 2**32 for sample_id in sample_ids if sample_id >> 32 == source]
        num_before_stop = sum(sample_id >> 32 == source for sample_id in sample_ids[: 3 * 8])
        assert_once_an_epoch(samples, len(TokenBlocks(f"{path}/train", 32)), num_before_stop)
        name = path.rpartition("/")[2]
        for step, share in logged[f"mix/{name}"]:
            drawn = sample_ids[: 8 * (step + 1)]
            assert share == pytest.approx(sum(sample_id >> 32 == source for sample_id in drawn) / len(drawn), rel=1e-6)


def test_fine_tuning(toy_sft_recipe, prepared, chat, tmp_path):
    source = save_split_model(prepared.tokenizer, tmp_path / "source")
    parts = fit_in_legs(tmp_path, toy_sft_recipe, 4, "--model.init_from", str(source))
    rows, logged = assert_resumed_exactly(tmp_path, parts, 4)
    assert not any(tag.startswith("mix/") for tag in logged), "there is one dataset"
    conversations = [sample["input_ids"].tolist() for sample in StreamingDataset(f"{chat}/train")]
    number = {tuple(tokens): index for index, tokens in enumerate(conversations)}
    assert len(number) == len(conversations)

    def sample_of(document):
        original = document[: len(document) // 2]  # the other half is its masked copy
        return number[tuple(document)] if tuple(document) in number else number[tuple(original)]

    samples = [sample_of(document) for row in rows for document in row]
    assert_once_an_epoch(samples, len(conversations), sum(map(len, rows[: 3 * 4])))
    assert any(tuple(document) not in number for row in rows for document in row), "there are copies"


FIXED_FOLDERS = {
    "trainer.logger.version": ["--trainer.logger.version", "mine"],
    "checkpoint.dirpath": ["--checkpoint.dirpath", "$HERE/saved"],
}


@pytest.mark.parametrize("key", FIXED_FOLDERS)
def test_a_new_run_does_not_replace_an_earlier_one(toy_recipe, tmp_path, monkeypatch, capfd, key):
    monkeypatch.setenv("HERE", str(tmp_path))
    words = ["fit", "--config", str(toy_recipe), "--budget.max_steps", "2", *FIXED_FOLDERS[key]]
    main(words)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capfd.readouterr()
    assert main(words) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        rf"error: {tmp_path}/.* has an earlier run \((checkpoints/)?step=2.ckpt\), .*--ckpt_path last, .* as {key}",
        error,
    )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    main([*words, "--ckpt_path", "last", "--budget.max_steps", "4"])
    assert any(path.name == "step=4.ckpt" for path in tmp_path.rglob("*.ckpt"))
    assert not main([*words, "--checkpoint.dirpath", str(tmp_path / "new"), "--trainer.logger.version", "new"])


def test_a_run_without_checkpoints_is_not_replaced(toy_recipe, tmp_path, capfd):
    words = ["fit", "--config", str(toy_recipe), "--budget.max_steps", "2", *FIXED_FOLDERS["trainer.logger.version"]]
    main([*words, "--trainer.enable_checkpointing", "false"])
    assert main([*words, "--checkpoint.dirpath", str(tmp_path / "elsewhere")]) == 2
    assert "mine has an earlier run (summary.json)" in capfd.readouterr().err


@pytest.mark.parametrize("logger", ["TensorBoardLogger", "CSVLogger"])
def test_folders_may_name_variables(toy_recipe, tmp_path, monkeypatch, logger):
    monkeypatch.setenv("HERE", str(tmp_path / "there"))
    words = ["fit", "--config", str(toy_recipe), "--trainer.logger", f"lightning.pytorch.loggers.{logger}"]
    words += ["--trainer.logger.save_dir", "$HERE/runs", "--trainer.logger.name", "x", "--budget.max_steps"]
    main([*words, "2"])
    main([*words, "2"])
    folders = sorted(path.name for path in (tmp_path / "there" / "runs" / "x").iterdir())
    assert folders == ["version_0", "version_1"]
    main([*words, "4", "--ckpt_path", "last"])
    assert (tmp_path / "there" / "runs" / "x" / "version_2" / "checkpoints" / "step=4.ckpt").is_dir()
