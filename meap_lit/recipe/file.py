"""Recipes as files, each of which may name another as its `base`, and their values as words of a command line."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from meap_lit.errors import UserError, in_one_line
from meap_lit.files import decode
from meap_lit.recipe import packaged
from meap_lit.renamed import current, current_key, is_gone

MAX_BYTES = 10_000_000
MAX_LEVELS = 50
MAX_VALUES = 100_000
"""Limits of a recipe, with aliases counted as what they name. Recipes of this project have 8 levels and 80 values."""
MAX_DIGITS = 400
"""A longer number exceeds every float."""
MAX_REFERENCES = 20

_NUMBER = re.compile(r"[-+]?[0-9][0-9a-fA-FxXoO_:.+-]*")


_OTHER_BASES = {8: re.compile(r"[-+]?0[0-7_]+"), 60: re.compile(r"[-+]?[1-9][\d_]*(:[0-5]?\d)+(\.[\d_]*)?")}
"""Numbers that YAML 1.1 does not read in base 10: 010 is 8, and 12:30:45 is 45045."""


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
    """Return the content of one file, within the limits above."""
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


@dataclass
class _Level:
    """An open mapping or list."""

    anchor: str | None
    keys: set[str] | None
    """The keys of a mapping so far; None for a list."""
    num_values: int = 1
    expects_key: bool = field(init=False)

    def __post_init__(self) -> None:
        self.expects_key = self.keys is not None


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


def check_yaml(text: str, name: str, is_recipe: bool = True) -> None:
    """Refuse YAML whose value is huge or deeply nested, without building the value.

    In a recipe, refuse also a key that appears twice; a text such as a prompt may repeat what looks like one.

    Raises:
        UserError: Names the line.
        yaml.YAMLError: If the text is not YAML.
    """
    levels = [_Level(None, None)]
    sizes: dict[str, int] = {}  # values behind each anchor
    events: Iterator[Any] = yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    for event in events:
        where = f"{name}, line {event.start_mark.line + 1}"
        above = levels[-1]
        if isinstance(event, yaml.CollectionEndEvent):
            ended = levels.pop()
            num_values = ended.num_values
            if ended.anchor is not None:
                sizes[ended.anchor] = num_values
            above = levels[-1]
        elif isinstance(event, yaml.NodeEvent):
            if above.keys is not None:
                if above.expects_key and isinstance(event, yaml.ScalarEvent):
                    if is_recipe and event.value in above.keys:
                        raise UserError(f"{where}: the key {event.value!r} appears twice; keep one of the two")
                    above.keys.add(event.value)
                above.expects_key = not above.expects_key
            if isinstance(event, yaml.CollectionStartEvent):
                keys: set[str] | None = set() if isinstance(event, yaml.MappingStartEvent) else None
                levels.append(_Level(event.anchor, keys))
                if len(levels) > MAX_LEVELS:
                    raise UserError(f"{where}: values are nested more than {MAX_LEVELS} levels deep")
                continue
            num_values = 1
            if isinstance(event, yaml.AliasEvent):
                anchor = str(event.anchor)
                if any(level.anchor == anchor for level in levels):
                    raise UserError(f"{where}: *{anchor} is a part of itself")
                num_values = sizes.get(anchor, 1)
            elif isinstance(event, yaml.ScalarEvent):
                _check_scalar(event, where)
        else:
            continue
        above.num_values += num_values
        if above.num_values > MAX_VALUES:
            raise UserError(f"{where}: more than {MAX_VALUES:,} values, aliases (*name) counted as what they name")


def _check_scalar(event: Any, where: str) -> None:
    for base, form in _OTHER_BASES.items():
        if event.implicit[0] and form.fullmatch(event.value):
            raise UserError(
                f"{where}: YAML reads {event.value} as a number in base {base}; quote it if it is a text or a time, "
                f"or write the number in base 10"
            )
    if len(event.value) > MAX_DIGITS and event.implicit[0] and _NUMBER.fullmatch(event.value):
        raise UserError(f"{where}: a number of {len(event.value):,} digits; the most is {MAX_DIGITS}")
    if event.value.count("${") > MAX_REFERENCES:  # OmegaConf takes minutes to resolve thousands of nested ones
        raise UserError(f"{where}: more than {MAX_REFERENCES} references (${{...}}) in a value")
