"""The command line: `fit`, `validate` and their like from recipes, and thin commands beside them.

Only the standard library is imported at the top, so that `--help` answers at once.
"""

import dataclasses
import errno
import importlib
import logging
import os
import re
import select
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any

from meap_lit.errors import NO_SPACE, UserError, shorten
from meap_lit.secrets import hide_in_text

USAGE = """\
usage: python -m meap_lit COMMAND [options]

Train and fine-tune decoder-only language models with Mask-Enhanced Autoregressive Prediction.

from a recipe (--config FILE, may be given several times; any value can follow as --key value):
  fit               train
  validate          clean validation loss of a checkpoint (--ckpt_path)
  test, predict     Lightning's other two, for modules that define them
  plan              memory and time on given devices, before any is asked for

data:
  tokenizer train   train a byte-level BPE tokenizer
  prepare text      tokenize text files into a dataset for streaming
  prepare chat      tokenize conversations into a dataset for fine-tuning
  prepare merge     put together the shards of a dataset (prepare ... --shard i/n)
  prepare facts     write the small made-up corpus of the quickstart

models:
  export            write a checkpoint as a Hugging Face folder
  generate          continue prompts with a checkpoint
  evaluate          a task of recipes/eval on a checkpoint, or on two side by side
  judge             have summaries judged that evaluate wrote
  report            what finished runs and their evaluations found, as one folder

recipes:
  recipes           list the recipes of this package
  recipes copy      write them into the current folder, all or those that are named

checkpoints of runs:
  checkpoint inspect      say what one holds
  checkpoint verify       compare its files with the checksums written with them
  checkpoint consolidate  make one file of shards, to resume from with any strategy

COMMAND --help lists its options. The first thing to try:
  python -m meap_lit fit --config recipes/quickstart.yaml
"""

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
RECIPE_COMMANDS = (*TRAINER_COMMANDS, "plan")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it went well, 2 after wrong input (one line on stderr), 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(USAGE, end="")
        elif arguments[0] in RECIPE_COMMANDS:
            _run_trainer(arguments)
        else:
            _run_command(read_command(arguments))
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except PermissionError as error:
        # asked for here, since a folder that may not be entered shows itself wherever a file in it is looked for
        print(
            f"error: no permission for {error.filename}: give this user access, or name another path", file=sys.stderr
        )
        return 2
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        return 141  # who read the output, such as head, has enough: what a shell says of SIGPIPE
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):  # no path of ours is so long, or a link to itself
            print(f"error: {shorten(str(error.filename))}: {error.strerror}; name another path", file=sys.stderr)
            return 2
        if error.errno not in NO_SPACE:
            raise
        where = f" {error.filename}" if error.filename else ""
        print(f"error: cannot write{where}: {error.strerror}; free some space or name another folder", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        _close_process_group()
    return 0


def _stdout_is_closed() -> bool:
    """Whether nobody reads what is printed any more. If so, what is left to be written goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
    return True


_LONGEST_LINE = 1000


def _one_line(error: UserError) -> str:
    """Return the message as a line that a terminal shows whole, without secrets, whatever values it quotes."""
    # a worker process of a DataLoader hands on its whole traceback as the message, which ends in the error's own
    text = re.sub(r"(?s)^Caught UserError in .*\n(\w+\.)*UserError: ", "", str(error)).strip()
    text = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in " ".join(text.split()))
    return shorten(hide_in_text(text), _LONGEST_LINE)


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
    "prepare merge": "meap_lit.data.prepare.merge.MergeShards",
    "prepare facts": "meap_lit.data.corpora.facts.FactCorpus",
}
"""Each is a dataclass of its options with a method `run`; only the one that is asked for is imported."""


def read_command(arguments: list[str]) -> Any:
    """Return the command that the words ask for, with its options; its method `run` runs it.

    Raises:
        UserError: If there is no such command, or an option is wrong.
    """
    from meap_lit.recipe.explain import check_options, input_errors
    from meap_lit.recipe.file import check_words

    check_words(arguments)
    words = " ".join(arguments[:2]) if " ".join(arguments[:2]) in COMMANDS else arguments[0]
    if words not in COMMANDS:
        known = ", ".join((*RECIPE_COMMANDS, *COMMANDS))
        raise UserError(f"no command '{' '.join(arguments[:2])}'; there are {known}")
    module, name = COMMANDS[words].rsplit(".", 1)
    command = getattr(importlib.import_module(module), name)
    parser = _command_parser(command, prog=f"python -m meap_lit {words}")
    with input_errors([option for action in parser._actions for option in action.option_strings]):
        namespace = parser.parse_args(arguments[len(words.split()) :])
        namespace.pop("config", None)
        check_options(namespace.as_dict(), command)
        return command(**vars(parser.instantiate_classes(namespace)))


def _run_command(command: Any) -> None:
    try:
        command.run()
    except OSError as error:
        if error.errno in NO_SPACE and error.filename is None:  # a write does not say where
            error.filename = getattr(command, "output", None)
        raise


def _command_parser(command: type, prog: str) -> Any:
    """A parser of the fields of a command: a list takes several words (`--input A B`), a switch none (`--chat`)."""
    import docstring_parser
    import jsonargparse

    from meap_lit.recipe.file import KeepsSecrets, RecipeFile

    class Parser(KeepsSecrets, jsonargparse.ArgumentParser):  # type: ignore[misc]
        pass

    doc = docstring_parser.parse(command.__doc__ or "")
    help_of = {parameter.arg_name: parameter.description for parameter in doc.params}
    parser = Parser(prog=prog, description=doc.short_description, exit_on_error=False, allow_abbrev=False)
    if any(f.name == "base" for f in dataclasses.fields(command)):  # it reads recipes
        parser.parser_mode = "omegaconf+"
        parser.add_argument("-c", "--config", action=RecipeFile, help="Recipe; a later one overrides an earlier one.")
    lists = [f for f in dataclasses.fields(command) if "list" in str(f.type)]
    for f in lists:
        if f.metadata.get("positional"):
            parser.add_argument(f.name, type=str, nargs="*", help=help_of.get(f.name))
            continue
        required = f.default is dataclasses.MISSING
        parser.add_argument(
            f"--{f.name}", type=str, nargs="+", required=required, default=None, help=help_of.get(f.name)
        )
    switches = [f for f in dataclasses.fields(command) if f.type is bool and f.default is False]
    for f in switches:
        parser.add_argument(f"--{f.name}", action="store_true", help=help_of.get(f.name))
    # a group of its own would repeat the description
    parser.add_class_arguments(command, as_group=False, skip={f.name for f in (*lists, *switches)})
    return parser


# ---------------------------------------------------------------------------------------------- training


def _run_trainer(arguments: list[str]) -> None:
    silence_noise()
    try:
        from meap_lit.recipe.cli import RecipeCLI
    except RuntimeError as error:
        if "torchvision" not in str(error):
            raise
        # litdata asks for torchvision; its CUDA build does not load beside a CPU-only torch, and torchmetrics tries to
        raise UserError(
            "the installed torchvision does not fit torch; nothing here uses it: pip uninstall torchvision"
        ) from error
    from meap_lit.recipe.file import check_words

    check_words(arguments)
    if arguments[0] == "plan":
        from meap_lit.planning.command import PlanCLI

        PlanCLI.run(arguments[1:])
        return
    RecipeCLI.run(arguments)


def _close_process_group() -> None:
    """End the threads of gloo and NCCL while the interpreter is whole.

    One that drops its last tensor while the interpreter is taken down needs a lock that it will not get, and C++ aborts
    the process (status -6) after all work was done. Lightning does this for NCCL alone.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def silence_noise() -> None:
    """Filter, by their text, what libraries say that no user of this package can act on."""
    # Lightning's own use of a pytree API that torch deprecates
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    # the validation stream's length is exact for any number of workers
    warnings.filterwarnings("ignore", message=r".*`IterableDataset` has `__len__` defined.*")
    # a dataset without a validation split is no mistake
    warnings.filterwarnings("ignore", message=r".*Total length of `list` across ranks is zero.*")
    # litdata copies the tensor that torch warns about in the very next call
    warnings.filterwarnings("ignore", message=r"The given buffer is not writable")
    # advertisement for other products
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(name in record.getMessage() for name in ("litlogger", "litmodels"))
    )
    threading.excepthook = _report_of_thread


def _report_of_thread(args: threading.ExceptHookArgs) -> None:
    """Print the traceback of an exception that ended a thread.

    TensorBoard raises those of its own again in the main thread; that of a full disk is one line there.
    """
    is_told_later = type(args.thread).__module__.startswith("tensorboard.")
    if not (is_told_later and isinstance(args.exc_value, OSError) and args.exc_value.errno in NO_SPACE):
        threading.__excepthook__(args)
