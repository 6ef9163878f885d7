"""Write runs and results like those of the commands, with given numbers."""

import json
from pathlib import Path

import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from meap_lit.callbacks.metrics import MetricsTable
from tests.support.checkpoints import save_as_0_1

TOKENS_PER_STEP = 4 * 8
DECODER = {"num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "hidden_size": 2, "intermediate_size": 2}


def recipe(name, seed=1, ratio=0.0, *, init_from=None, fine_tuning=False, schedule=None, **values):
    """A resolved recipe; `values` are dotted keys with `__` for the dot, such as trainer__devices."""
    config = {
        "seed_everything": seed,
        "trainer": {"precision": "32-true", "devices": "auto", "logger": {"init_args": {"name": name}}},
        "model": {
            "class_path": "meap_lit.modules.MEAPPretraining",
            "init_args": {
                "seed": seed,
                "mask_ratio": ratio if schedule is None else schedule,
                "init_from": init_from,
            },
        },
        "data": {
            "class_path": "meap_lit.data.pretraining.PretrainingData",
            "init_args": {"datasets": "data/text", "seed": seed, "seq_len": 8, "global_batch_size": 4},
        },
        "budget": {"max_steps": 30},
        "probe": {"num_options": 4},
        "ckpt_path": None,
    }
    if fine_tuning:
        config["model"]["class_path"] = "meap_lit.modules.MEAPFineTuning"
        del config["model"]["init_args"]["mask_ratio"]
        config["data"]["init_args"]["duplication"] = {"mask_ratio": ratio}
    for key, value in values.items():
        *parents, last = key.split("__")
        section = config
        for parent in parents:
            section = section[parent]
        section[last] = value
    return config


def write_run(
    folder: Path, config, losses=(3.0, 2.0, 1.0), accuracies=(), *, first_step=10, saved=30, summary=None, older=False
) -> Path:
    """A run that validated every ten steps and saved once; an older one has only events of TensorBoard."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    write = write_events if older else write_table
    write(folder, {"val/loss": losses, "val/retrieval_accuracy": accuracies}, first_step)
    content = {
        "state_dict": {"decoder.x": torch.zeros(1)},
        "decoder": {"config": {**DECODER, "vocab_size": 8}},
        "PretrainingData": {"datasets": {"data/text": "f" * 64}},
    }
    save_as_0_1(content, folder / "checkpoints" / f"step={saved}.ckpt")
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_table(folder: Path, curves, first_step) -> None:
    """The metrics of a run that starts, or resumes ten steps before `first_step`."""
    table = MetricsTable(folder, first_step - 10)
    for tag, values in {"throughput/tokens_per_second": [1000.0], **curves}.items():
        for number, value in enumerate(values):
            table.log_metrics({tag: value}, first_step + 10 * number - 1)  # Lightning counts the steps before


def write_events(folder: Path, curves, first_step) -> None:
    """The same as events of TensorBoard."""
    with SummaryWriter(str(folder)) as writer:
        for tag, values in {"throughput/tokens_per_second": [1000.0], **curves}.items():
            for number, value in enumerate(values):
                writer.add_scalar(tag, value, first_step + 10 * number - 1)


def write_result(folder: Path, run: Path, scores, *, task="key_value", metric="accuracy", step=30, **changes) -> Path:
    """A result of `evaluate` in NAME/LABEL; `scores` by the id of the item, or (id, group, cell)."""
    items = []
    for key, score in scores.items():
        name, group, cell = key if isinstance(key, tuple) else (key, None, {})
        items.append({"id": name, "group": group, "cell": dict(cell), "scores": {metric: score}})
    about = {
        "task": {"class_path": "some.Task", "init_args": {"seed": 0}},
        "checkpoint": str((run / "checkpoints" / f"step={step}.ckpt").resolve()),
        "items": "0" * 64,
        "tokens_seen": step * TOKENS_PER_STEP,
        "device": "cpu",
        "versions": {"torch": "2"},
    }
    result = {"label": folder.name, "scores": {metric: {}}, "items": items, "about": {**about, **changes}}
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"task": task, "unit": "%", "results": [result]}))
    return folder
