"""The command line.

Only the standard library is imported at the top, so that `--help` is fast.
"""

import dataclasses
import difflib
import errno
import importlib
import inspect
import io
import logging
import os
import re
import select
import shlex
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from meap_lit import __version__
from meap_lit.errors import NO_SPACE, UserError, fix_of_disk, printable, shorten
from meap_lit.secrets import hide_in_text

USAGE = """\
usage: python -m meap_lit COMMAND [options]

Train and fine-tune decoder-only language models with Mask-Enhanced Autoregressive Prediction.

from a recipe (--config FILE, may be given several times; any value can follow as --key value):
  fit               train a model
  validate          print the clean validation loss of a checkpoint (--ckpt_path)
  preview           show the first rows of training as the model gets them, with masks and labels
  plan              memory and time that a recipe needs on given devices

data:
  tokenizer train   train a byte-level BPE tokenizer
  prepare text      tokenize text files into a dataset for streaming
  prepare chat      tokenize conversations into a dataset for fine-tuning
  prepare merge     join the parts of a dataset (prepare ... --shard i/n)
  prepare facts     write the small synthetic corpus of the quickstart

models:
  export            write a checkpoint as a Hugging Face folder
  generate          continue prompts with a checkpoint
  evaluate          run a task of recipes/eval on one checkpoint, or on two side by side
  judge             judge the summaries that `evaluate` wrote
  report            write a report of finished runs and their evaluations

recipes:
  recipes           list the recipes of this package
  recipes copy      write them into the current folder, all or those that are named

checkpoints of runs:
  checkpoint inspect      print the content of a checkpoint
  checkpoint verify       compare its files with their checksums
  checkpoint consolidate  copy a checkpoint into one part, with checksums

COMMAND --help describes a command, and --version prints the version. To begin:
  python -m meap_lit fit --config recipes/quickstart.yaml
"""

EXAMPLES = {
    "tokenizer train": "--input my_texts --vocab_size 16384 --output data/tokenizer",
    "prepare text": "--input my_texts --tokenizer data/tokenizer --output data/pretrain",
    "prepare chat": "--input chats.jsonl --tokenizer data/tokenizer --template alpaca --output data/chat",
    "prepare merge": "--input data/part-* --output data/pretrain",
    "prepare facts": "--output data/facts --num_documents 8000",
    "export": "--checkpoint runs/quickstart --output exported",
    "generate": '--checkpoint runs/quickstart --prompt "In Oslo Anna sings. Who sings in Oslo? In Oslo"',
    "evaluate": "--config recipes/eval/needle.yaml --checkpoint runs/ntp_1.1b runs/meap_1.1b",
    "judge": "--config recipes/eval/judge.yaml --predictions evaluations/xsum/meap_1.1b",
    "report": "--runs runs --evaluations evaluations --output report",
    "recipes": "",
    "recipes copy": "recipes/quickstart.yaml recipes/eval",
    "checkpoint inspect": "--checkpoint runs/quickstart",
    "checkpoint verify": "--checkpoint runs/quickstart",
    "checkpoint consolidate": "--checkpoint runs/quickstart --output whole.ckpt",
}
"""Options of an example of each command, for its help."""

RECIPE_COMMANDS = ("fit", "validate", "preview", "plan")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 after wrong input (one line on stderr), or 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # an error of a library may hold an address with its password
        sys.excepthook = _print_without_secrets
        if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may hold what the locale cannot write
            sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(USAGE, end="")
        elif arguments[0] == "--version":
            print(f"meap_lit {__version__}")
        elif " ".join(arguments) in (f"{group} {word}" for group in _groups() for word in ("-h", "--help")):
            print(_help_of_group(arguments[0]), end="")
        elif arguments[0] in RECIPE_COMMANDS:
            _run_trainer(arguments)
        else:
            _run_command(read_command(arguments))
        sys.stdout.flush()
    except UserError as error:
        return _fail(_one_line(error))
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        return 141  # the reader of the output, such as `head`, has ended: the status of SIGPIPE in a shell
    except OSError as error:
        if (reason := _fault_of_path(error)) is None:
            raise
        return _fail(reason)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        _close_process_group()
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _print_without_secrets(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(hide_in_text("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def _fault_of_path(error: OSError) -> str | None:
    """Return what is wrong with a path that the user named, or with its disk; None for any other error."""
    if isinstance(error, PermissionError):  # any access to a file in a folder without permission raises this
        return f"no permission for {error.filename}: give this user access, or name another path"
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):  # only a path of the user is so long, or a link to itself
        return f"{shorten(str(error.filename))}: {error.strerror}; name another path"
    if error.errno in NO_SPACE:
        where = f" {error.filename}" if error.filename else ""
        return f"cannot write{where}: {error.strerror}; {fix_of_disk(error)}"
    return None


def _stdout_is_closed() -> bool:
    """Return whether the reader of stdout is gone. If so, further output is discarded."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
    return True


_LONGEST_LINE = 1000


def _one_line(error: UserError) -> str:
    """Return the message as one printable line of bounded length, without secrets."""
    # the message of a DataLoader's worker process is its traceback, whose last line is the error's own
    text = re.sub(r"(?s)^Caught UserError in .*\n(\w+\.)*UserError: ", "", str(error)).strip()
    return shorten(hide_in_text(printable(text)), _LONGEST_LINE)


# ---------------------------------------------------------------------------------------------- thin commands

COMMANDS = {
    "export": "meap_lit.checkpoint.export.Export",
    "generate": "meap_lit.inference.command.Generate",
    "evaluate": "meap_lit.evaluation.command.Evaluate",
    "judge": "meap_lit.evaluation.judging.command.JudgeSummaries",
    "report": "meap_lit.report.command.Report",
    "recipes": "meap_lit.recipe.packaged.ListRecipes",
    "recipes copy": "meap_lit.recipe.packaged.CopyRecipes",
    "checkpoint inspect": "meap_lit.checkpoint.commands.Inspect",
    "checkpoint verify": "meap_lit.checkpoint.commands.Verify",
    "checkpoint consolidate": "meap_lit.checkpoint.commands.Consolidate",
    "tokenizer train": "meap_lit.data.prepare.tokenizer.TrainTokenizer",
    "prepare text": "meap_lit.data.prepare.text.PrepareText",
    "prepare chat": "meap_lit.data.prepare.chat.PrepareChat",
    "prepare merge": "meap_lit.data.prepare.merge.MergeParts",
    "prepare facts": "meap_lit.data.corpora.facts.FactCorpus",
}
"""Each is a dataclass of options with a method `run`. Only the requested one is imported."""


def read_command(arguments: list[str]) -> Any:
    """Return the command that the words name, with its options. Its method `run` runs it.

    Raises:
        UserError: If there is no such command, or an option is wrong.
    """
    from meap_lit.recipe.explain import check_value, input_errors
    from meap_lit.recipe.file import check_words, recipe_words
    from meap_lit.recipe.parser import command_parser, reads_recipes

    check_words(arguments)
    words = " ".join(arguments[:2]) if " ".join(arguments[:2]) in COMMANDS else arguments[0]
    if words not in COMMANDS:
        raise UserError(_no_command(arguments))
    module, name = COMMANDS[words].rsplit(".", 1)
    command = getattr(importlib.import_module(module), name)
    prog = f"python -m meap_lit {words}"
    parser = command_parser(command, prog)
    options = arguments[len(words.split()) :]
    if {"-h", "--help"} & {*options}:
        print(f"{parser.format_help()}\nexample:\n  {prog} {EXAMPLES[words]}")
        raise SystemExit(0)
    known = {field.name: field.type if inspect.isclass(field.type) else None for field in dataclasses.fields(command)}
    with input_errors(known):
        namespace = parser.parse_args(recipe_words(options) if reads_recipes(command) else options)
        namespace.pop("config", None)
        check_value(namespace.as_dict(), command)
        return command(**vars(parser.instantiate_classes(namespace)))


def _groups() -> list[str]:
    """Return the first words of the commands that have two."""
    return sorted({words.split()[0] for words in COMMANDS if " " in words})


def _help_of_group(group: str) -> str:
    """Return the commands that begin with a word, each with its line of `USAGE` and an example."""
    lines = [f"usage: python -m meap_lit {group} COMMAND [options]", ""]
    for words in COMMANDS:
        if words.split()[0] == group:
            meaning = re.search(rf"^  {words} {{2,}}(.*)$", USAGE, re.MULTILINE)
            assert meaning is not None, f"USAGE leaves out {words}"
            lines += [f"  {words:<24}{meaning[1]}", f"      python -m meap_lit {words} {EXAMPLES[words]}".rstrip()]
    return "\n".join([*lines, "", f"{group} COMMAND --help lists the options of a command.", ""])


def _no_command(arguments: list[str]) -> str:
    """Return what is wrong with the words of a command, and the nearest command."""
    known = [*RECIPE_COMMANDS, *COMMANDS]
    if arguments[0] in _groups():
        parts = [words.split()[1] for words in COMMANDS if words.startswith(f"{arguments[0]} ")]
        given = arguments[1] if len(arguments) > 1 and not arguments[1].startswith("-") else "nothing"
        near = difflib.get_close_matches(given, parts, n=1)
        return f"{arguments[0]} needs one of {', '.join(parts)} after it, got {given}" + (
            f"; did you mean '{arguments[0]} {near[0]}'?" if near else ""
        )
    if arguments[0].endswith((".yaml", ".yml")):
        return f"{arguments[0]} is a recipe, not a command; write fit --config {shlex.quote(arguments[0])}"
    near = difflib.get_close_matches(" ".join(arguments[:2]), known, n=1) or difflib.get_close_matches(
        arguments[0], known, n=1
    )
    hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(known)}"
    return f"no command '{arguments[0]}'; {hint}"


def _run_command(command: Any) -> None:
    try:
        command.run()
    except OSError as error:
        if error.errno in NO_SPACE and error.filename is None:  # an error of a write names no file
            error.filename = getattr(command, "output", None)
        raise


# ---------------------------------------------------------------------------------------------- training


ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""Segments of a GPU's memory that grow, so that rows with other documents in each step do not fragment it."""


def _run_trainer(arguments: list[str]) -> None:
    silence_noise()
    if not {*ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF"} & {*os.environ}:  # torch reads them when it is imported
        os.environ.update(ALLOCATOR)
    try:
        from meap_lit.recipe.cli import RecipeCLI
    except RuntimeError as error:
        if "torchvision" not in str(error):
            raise
        # litdata depends on torchvision, which torchmetrics imports and whose CUDA build fails with a CPU-only torch
        raise UserError(
            "the installed torchvision does not fit torch, and this package does not use it: pip uninstall torchvision"
        ) from error
    from meap_lit.recipe.file import check_words

    check_words(arguments)
    if arguments[0] == "plan":
        from meap_lit.planning.command import PlanCLI

        print(PlanCLI.read(arguments[1:]).plan.text())
    elif arguments[0] == "preview":
        from meap_lit.recipe.preview import PreviewCLI

        PreviewCLI.read(arguments[1:])
    else:
        RecipeCLI.run(arguments)


def _close_process_group() -> None:
    """End the threads of gloo and NCCL before the interpreter shuts down.

    A thread that frees its last tensor during the shutdown needs a lock that it cannot get, and C++ aborts the process
    (status -6) after all work is done. Lightning does this only for NCCL.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def silence_noise() -> None:
    """Filter, by their text, warnings of libraries that a user of this package cannot act on."""
    # Lightning uses a pytree API that torch deprecates
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    # the validation stream's length is exact for any number of workers
    warnings.filterwarnings("ignore", message=r".*`IterableDataset` has `__len__` defined.*")
    # a dataset may lack a validation split
    warnings.filterwarnings("ignore", message=r".*Total length of `list` across ranks is zero.*")
    # litdata copies the tensor that torch warns about in the very next call
    warnings.filterwarnings("ignore", message=r"The given buffer is not writable")
    # advertisements for other products
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(name in record.getMessage() for name in ("litlogger", "litmodels"))
    )
    threading.excepthook = _report_of_thread


def _report_of_thread(args: threading.ExceptHookArgs) -> None:
    """Print the traceback of an exception that ended a thread.

    TensorBoard raises its exceptions again in the main thread, where a full disk is one line.
    """
    is_told_later = type(args.thread).__module__.startswith("tensorboard.")
    if not (is_told_later and isinstance(args.exc_value, OSError) and args.exc_value.errno in NO_SPACE):
        threading.__excepthook__(args)
