"""The parser of every command: recipes with their bases, `${...}` references, old names, and no secret printed."""

import dataclasses
import importlib
import json
import os
import pkgutil
import re
from collections.abc import Sequence
from contextlib import suppress
from contextvars import ContextVar
from itertools import pairwise
from pathlib import Path
from typing import Any

import docstring_parser
import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace, get_loader
from omegaconf.errors import InterpolationResolutionError

from meap_lit.errors import UserError
from meap_lit.recipe import packaged
from meap_lit.recipe.file import lineage
from meap_lit.renamed import current
from meap_lit.secrets import with_variables, without_secrets

_is_dumping: ContextVar[bool] = ContextVar("is_dumping", default=False)


class Parser(ArgumentParser):
    """jsonargparse's parser, which raises errors, resolves references in recipes, and writes no secrets."""

    def __init__(self, parser_mode: str = "omegaconf+", **kwargs: Any) -> None:
        # `--budget.max_step` is a mistake, not short for `--budget.max_steps`
        options = {"exit_on_error": False, "allow_abbrev": False, **kwargs}  # jsonargparse copies a parser with its own
        super().__init__(parser_mode=parser_mode, **options)
        self._prints = False
        self.off: dict[str, dict[str, Any]] = {}
        """Top-level keys that may be null, with the options that null sets."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse as jsonargparse does.

        Raises:
            UserError: If a value is read from a variable of the environment that is not set.
        """
        if args and args[0] is not None:  # jsonargparse prints what it has read when it meets the option
            words = sorted(self._without_null(args[0]), key=lambda word: word.partition("=")[0] == "--print_config")
            self._prints = bool(words) and words[-1].partition("=")[0] == "--print_config"
            args = (words, *args[1:])
        try:
            return packaged.with_paths(super().parse_args(*args, **kwargs))
        except ArgumentError as error:
            if "expected" not in str(error):
                raise
            option = _without_value(args[0] if args else None)
            if option is None:
                raise
            raise UserError(f"{option} needs a value after it; --help describes the options") from error
        except InterpolationResolutionError as error:
            variable = re.search(r"Environment variable '(.+?)' not found", str(error))
            if variable is None:
                raise
            key = (error.full_key or "a value").replace(".init_args", "")
            raise UserError(
                f"{key} comes from the environment, where {variable[1]} is not set; set that variable (saved recipes "
                f"hold no secrets), or change the key"
            ) from error

    def _without_null(self, words: Sequence[str]) -> list[str]:
        """Return the words with the options of `off` in place of null (`--samples null`, `--samples=null`)."""
        taken = []
        for before, word in pairwise(("", *words)):
            option, equals, value = word.partition("=") if word.startswith("--") else (before, "", word)
            options = self.off.get(option.removeprefix("--")) if value == "null" else None
            if options is not None:
                word = (option + equals if equals else "") + json.dumps(options)
            taken.append(word)
        return taken

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Namespace:
        """Parse the text of a recipe, with current names in place of old ones and the options of `off` for null."""
        with suppress(yaml.YAMLError):  # jsonargparse says what is wrong
            given = get_loader("yaml")(content)
            taken = current(given)
            if isinstance(taken, dict):
                # jsonargparse leaves empty mappings out before it looks for unknown keys
                empty = [key for key, value in taken.items() if value == {}]
                known = self.get_defaults() if empty else ()
                taken |= {key: None for key in empty if key not in known}
                taken = {key: self.off.get(key) if value is None else value for key, value in taken.items()}
            if taken != given:
                content = json.dumps(taken, ensure_ascii=False)
        return super().parse_string(content, *args, **kwargs)

    def dump(self, namespace: Namespace, *args: Any, skip_link_targets: bool = True, **kwargs: Any) -> str:
        # A dump with the targets of links is not for a reader: jsonargparse takes values from it. Neither is the dump
        # of a parser of a class within a recipe.
        is_for_reader = skip_link_targets and not _is_dumping.get()
        shown = namespace
        if is_for_reader:
            if not kwargs.get("skip_validation"):
                self.validate(namespace)
            if self.parser_mode.startswith("omegaconf"):
                # texts as a recipe spells them: what looks like a reference is none, since all have been resolved
                shown = packaged.replace_texts(shown, lambda text: with_variables(_escaped(text)))
            # a reference to the environment would not validate
            shown, kwargs["skip_validation"] = packaged.with_names(without_secrets(shown)), True
            if self._prints:
                shown = _from_anywhere(shown)
        before = _is_dumping.set(True)
        try:
            return super().dump(shown, *args, skip_link_targets=skip_link_targets, **kwargs)
        finally:
            _is_dumping.reset(before)


def _without_value(words: Sequence[str] | None) -> str | None:
    """Return the first option among the words of a command that no value follows."""
    for word, following in pairwise([*(words or ()), "--"]):
        if word.startswith("--") and "=" not in word and following.startswith("--"):
            return word
    return None


def _escaped(text: str) -> str:
    """Return a text such that OmegaConf reads it as it is, and not as a reference."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)


def _from_anywhere(recipe: Namespace) -> Namespace:
    """Return a recipe that runs in any folder: without `base`, which it contains, and with existing paths absolute."""

    def absolute(text: str) -> str:
        is_relative = "/" in text and "://" not in text and not packaged.is_packaged(text)
        return os.path.abspath(text) if is_relative and os.path.exists(text) else text

    found = packaged.replace_texts(recipe, absolute)
    if "base" in found:
        found.base = None
    return found


class RecipeFile(ActionConfigFile):
    """Reads a recipe after the recipes that it names as `base`."""

    @staticmethod
    def apply_config(parser: Any, cfg: Namespace, dest: str, value: str) -> None:
        for path in lineage(Path(value)):
            ActionConfigFile.apply_config(parser, cfg, dest, str(path))


def import_choices(package: str) -> None:
    """Import all modules of a package, so that a recipe may name their classes without the path."""
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        importlib.import_module(module.name)


def add_recipe_option(parser: Parser) -> None:
    """Add `--config`, which names a recipe and may be given several times."""
    parser.add_argument("-c", "--config", action=RecipeFile, help="Recipe; a later one overrides an earlier one.")


def reads_recipes(command: type) -> bool:
    """Return whether the options of a command may come from a recipe."""
    return any(field.name == "base" for field in dataclasses.fields(command))


def command_parser(command: type, prog: str) -> Parser:
    """Return a parser of the fields of a command.

    A list takes several words (`--input A B`), a switch none (`--chat`).
    """
    doc = docstring_parser.parse(command.__doc__ or "")
    help_of = {parameter.arg_name: parameter.description for parameter in doc.params}
    mode = "omegaconf+" if reads_recipes(command) else "yaml"  # `${` in a prompt is no reference
    parser = Parser(prog=prog, description=doc.short_description, parser_mode=mode)
    if reads_recipes(command):
        for package in ("tasks", "attention", "judging"):  # not the harness, which needs a package of its own
            import_choices(f"meap_lit.evaluation.{package}")
        add_recipe_option(parser)
    lists = [field for field in dataclasses.fields(command) if "list" in str(field.type)]
    for field in lists:
        if field.metadata.get("positional"):
            parser.add_argument(field.name, type=str, nargs="*", help=help_of.get(field.name))
            continue
        required = field.default is dataclasses.MISSING
        parser.add_argument(
            f"--{field.name}", type=str, nargs="+", required=required, default=None, help=help_of.get(field.name)
        )
    switches = [field for field in dataclasses.fields(command) if field.type is bool and field.default is False]
    for field in switches:
        parser.add_argument(f"--{field.name}", action="store_true", help=help_of.get(field.name))
    # a group of its own would repeat the description
    parser.add_class_arguments(command, as_group=False, skip={field.name for field in (*lists, *switches)})
    return parser
