"""What to do with a run that has ended: commands that work as they are printed."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from meap_lit.callbacks.loggers import services
from meap_lit.callbacks.retrieval import RetrievalProbe
from meap_lit.data.finetuning import FineTuningData

LONGEST_PROMPT = 300
"""Characters of a prompt that still fit a command line."""
SHORTEST_CONTEXT = 40
"""Tokens that the facts of recipes/eval/small/needle.yaml need with a tokenizer of few merges."""


def next_steps(trainer: L.Trainer, run: str | None, checkpoint: str, probe: RetrievalProbe | None) -> Iterator[str]:
    """Yield commands for a run that has ended, each with a comment where its words do not say what it does.

    Args:
        trainer: The Trainer at the end of the run.
        run: Folder of the run with its recipe and tokenizer; None if it was not kept.
        checkpoint: The last checkpoint; empty if none was saved.
        probe: The retrieval probe of the run, if it has one.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            yield shlex.join(["tensorboard", "--logdir", str(logger.save_dir)])
    yield from filter(None, (service.view() for service in services(trainer)))
    recipe = f"{run}/config.yaml"
    inside = run is not None and Path(run) in Path(checkpoint).parents
    if run is not None:
        yield _command("preview", "--config", recipe) + "   # the rows as the model got them"
    if checkpoint:
        source = ["--checkpoint", run if run is not None and inside else checkpoint]
        if not inside:
            source += ["--tokenizer", trainer.datamodule.tokenizer_folder]
        yield _command("generate", *source, *_prompt(trainer, probe))
        yield _command("evaluate", *_evaluation(trainer, probe), *source)
        name = Path(run).parent.name if run is not None else "model"
        yield _command("export", *source, "--output", f"exported/{name}") + "   # for transformers"
    if run is not None:
        has_val = bool(trainer.datamodule.paths_with_val)
        if checkpoint and has_val:
            yield _command("validate", "--config", recipe, "--ckpt_path", checkpoint)
        if (plain := trainer.lightning_module.plain_override) is not None:
            names, runs = [logger.name for logger in trainer.loggers if logger.name], [Path(run).parent]
            words = ["fit", "--config", recipe, *plain.split()]
            if len(names) == 1:  # a name of its own, so that neither run is taken for the other
                words += ["--trainer.logger.name", f"{Path(names[0])}_plain"]
                runs.append(Path(f"{runs[0]}_plain"))
            if trainer.ckpt_path:  # the recipe of a resumed run names a checkpoint
                words += ["--ckpt_path", "null"]
            if checkpoint and not inside:  # in a folder that the recipe fixes
                words += ["--checkpoint.dirpath", "null"]
            yield _command(*words) + "   # the baseline: the same without masking"
            if has_val:  # which a report compares
                report = _command("report", "--runs", *map(str, runs))
                yield f"{report}   # then: both and their evaluations, as a page"


def _command(*words: str) -> str:
    return f"python -m meap_lit {shlex.join(words)}"


def _prompt(trainer: L.Trainer, probe: RetrievalProbe | None) -> list[str]:
    """Return the options of a prompt whose continuation shows something: a fact of the context, or held-out text."""
    is_chat = isinstance(trainer.datamodule, FineTuningData)
    asked = None if probe is None or is_chat else probe.question
    prompt = asked if asked is not None and len(asked) <= LONGEST_PROMPT else trainer.datamodule.example_prompt()
    return [*(["--chat"] if is_chat else []), "--prompt", " ".join((prompt or "Once").split())[:LONGEST_PROMPT]]


def _evaluation(trainer: L.Trainer, probe: RetrievalProbe | None) -> list[str]:
    """Return the recipe of an evaluation and the options that make it fit the model and its data."""
    context, data = trainer.lightning_module.config.max_seq_len, trainer.datamodule
    asked = [] if probe is None else probe.asked_lengths
    if asked or isinstance(data, FineTuningData):
        lengths = asked or sorted({max(SHORTEST_CONTEXT, context // part) for part in (4, 2, 1)})
        return ["--config", "recipes/eval/small/needle.yaml", "--task.lengths", f"[{','.join(map(str, lengths))}]"]
    dataset, split = (data.paths_with_val[0], "val") if data.paths_with_val else (next(iter(data.datasets)), "train")
    options = {"dataset": dataset, "split": split, "seq_len": str(data.seq_len)}
    words = (word for name, value in options.items() for word in (f"--task.{name}", value))
    return ["--config", "recipes/eval/small/perplexity.yaml", *words]
