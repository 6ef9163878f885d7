"""Recipes as files, each of which may name another as its `base`, and their values as words of a command line."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from meap_lit.bounded_yaml import check_yaml
from meap_lit.errors import UserError, in_one_line
from meap_lit.files import decode
from meap_lit.recipe import packaged
from meap_lit.renamed import current, current_key, is_gone

MAX_BYTES = 10_000_000
"""Limit of a recipe's file."""


def lineage(path: Path) -> list[Path]:
    """Return the recipe at `path` after all recipes that it is based on.

    Raises:
        UserError: If a file is missing, cannot be read as a recipe, or is based on itself.
    """
    chain: list[Path] = []
    while True:
        name, path = path, packaged.find(path)
        if not path.is_file():
            named_by = f" (named as base by {chain[0]})" if chain else ""
            if path.is_dir():
                files = sorted(path.glob("*.yaml"))
                inside = f"name a file in it, such as {files[0]}" if files else "it has no .yaml file"
                raise UserError(f"recipe {path} is a folder{named_by}; {inside}")
            raise UserError(f"recipe {path} does not exist{named_by}; {packaged.suggestion(str(name))}")
        if path.resolve() in (other.resolve() for other in chain):
            raise UserError(f"recipe {path} is based on itself")
        chain.insert(0, path)
        base = _read(path).get("base")
        if not base:
            return chain
        if not isinstance(base, str):
            raise UserError(f"base of recipe {path} must be the path of a recipe, got {base}")
        path = name.parent / base
        if not path.exists() and packaged.is_packaged(base):
            path = Path(base)  # of a recipe outside the folder that the command runs in


def _read(path: Path) -> dict[str, Any]:
    """Return the content of one file, within limits."""
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"recipe {path} has {size:,} bytes, more than a recipe needs; name a YAML file")
    text = decode(path.read_bytes(), f"recipe {path}")
    try:
        check_yaml(text, f"recipe {path}")
        content = get_loader("yaml")(text)
    except yaml.YAMLError as error:
        reason = in_one_line(error).replace('in "<unicode string>", ', "at ")
        raise UserError(f"recipe {path} is not YAML: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} is empty or not a mapping of keys to values")
    return content


def check_words(words: Sequence[str]) -> None:
    """Refuse words of a command that are short but stand for a huge value; only aliases make that possible.

    Raises:
        UserError: Names the option.
    """
    for word in words:
        if re.fullmatch(r"-[a-z_]{3,}", word):  # argparse would take -config for -c onfig
            raise UserError(f"options begin with two dashes; write -{word}")
    for before, word in pairwise(("", *words)):
        option, equals, value = word.partition("=")
        name, text = (option, value) if option.startswith("--") and equals else (before, word)
        if "&" in text and "*" in text:
            with suppress(yaml.YAMLError):  # text that is not YAML is taken literally
                check_yaml(text, name, is_recipe=False)


def recipe_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command that reads recipes, as the parser takes them.

    Old names are replaced by current ones, options without effect are left out. `--model.decoder.vocab_size null` is
    replaced by `--model.decoder={vocab_size: null}`: jsonargparse (4.53) passes a value to a class within a class as
    text, in which null has become the word None.
    """
    taken: list[str] = []
    option = ""
    for word in words:
        starts = word.startswith("--")
        option, equals, value = word.partition("=") if starts else (option, "", word)
        option = f"--{current_key(option[2:])}" if starts else option
        if is_gone(option[2:]):
            option = "" if equals or not starts else option
            continue
        if option == "--base":
            raise UserError("`base` is a key of recipe files; on the command line give both recipes with --config")
        value = _current_text(value, option[2:].removesuffix("+"))
        group, *keys = option.replace(".init_args", "").split(".")
        if group in ("--model", "--data") and len(keys) > 1 and re.search(r"\bnull\b", value):
            if not starts:
                taken.pop()
            for key in reversed(keys[1:]):
                value = f"{{{key}: {value}}}"
            taken.append(f"{group}.{keys[0]}={value}")
        else:
            taken.append(option + equals + value if starts else value)
        option = option if starts else ""
    return taken


def _current_text(text: str, key: str) -> str:
    with suppress(yaml.YAMLError):
        given = get_loader("yaml")(text) if text.startswith(("{", "[")) else text
        if (renamed := current(given, key)) != given:
            return renamed if isinstance(renamed, str) else json.dumps(renamed, ensure_ascii=False)
    return text
