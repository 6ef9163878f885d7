"""Recipes as files: each may name another as its `base`."""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, Namespace, get_loader
from omegaconf.errors import InterpolationResolutionError

from meap_lit.errors import UserError
from meap_lit.files import decode
from meap_lit.recipe import packaged
from meap_lit.secrets import without_secrets

MAX_BYTES = 10_000_000
MAX_LEVELS = 50
MAX_VALUES = 100_000
"""What a recipe may hold, aliases counted as what they name; recipes of this project have 8 levels and 80 values."""
MAX_DIGITS = 400
"""Longer numbers are beyond every float."""
MAX_REFERENCES = 20

_NUMBER = re.compile(r"[-+]?[0-9][0-9a-fA-FxXoO_:.+-]*")


class KeepsSecrets:
    """A parser of recipes that writes and prints none of their secrets; goes before the class of the parser."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:
        """Parse as the parser does.

        Raises:
            UserError: If a variable of the environment is missing that a value is read from.
        """
        try:
            return packaged.with_paths(super().parse_args(*args, **kwargs))  # type: ignore[misc]
        except InterpolationResolutionError as error:
            variable = re.search(r"Environment variable '(.+?)' not found", str(error))
            if variable is None:
                raise
            key = re.sub(r"^fit\.|\.init_args", "", error.full_key or "a value")
            raise UserError(
                f"{key} comes from the environment, where {variable[1]} is not set; set that variable (saved recipes "
                f"hold no secrets), or change the key"
            ) from error

    def dump(self, namespace: Namespace, *args: Any, skip_link_targets: bool = True, **kwargs: Any) -> str:
        # With the targets of links a dump has no reader: jsonargparse and Lightning take the values from it. A parser
        # of a class within a recipe dumps its part of either.
        is_for_reader = skip_link_targets and not _is_dumping.get()
        shown = namespace
        if is_for_reader:
            if not kwargs.get("skip_validation"):
                self.validate(namespace)  # type: ignore[attr-defined]
            # a reference to the environment would not validate
            shown, kwargs["skip_validation"] = packaged.with_names(without_secrets(namespace)), True
        before = _is_dumping.set(True)
        try:
            return super().dump(shown, *args, skip_link_targets=skip_link_targets, **kwargs)  # type: ignore[misc]
        finally:
            _is_dumping.reset(before)


_is_dumping: ContextVar[bool] = ContextVar("is_dumping", default=False)


class RecipeFile(ActionConfigFile):
    """Reads a recipe after the recipes that it names as `base`."""

    @staticmethod
    def apply_config(parser: Any, cfg: Namespace, dest: str, value: str) -> None:
        for path in lineage(Path(value)):
            ActionConfigFile.apply_config(parser, cfg, dest, str(path))


def lineage(path: Path) -> list[Path]:
    """Return the recipe at `path` and all that it is based on, the most basic first.

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
                inside = f"name a file in it, such as {files[0]}" if files else "no .yaml lies in it"
                raise UserError(f"recipe {path} is a folder{named_by}; {inside}")
            raise UserError(f"recipe {path} does not exist{named_by}; `meap-lit recipes` lists those of this package")
        if path.resolve() in (other.resolve() for other in chain):
            raise UserError(f"recipe {path} is based on itself")
        chain.insert(0, path)
        base = _read(path).get("base")
        if not base:
            return chain
        if not isinstance(base, str):
            raise UserError(f"base of recipe {path} must be the path of a recipe, got {base}")
        path = name.parent / base


def _read(path: Path) -> dict[str, Any]:
    """Return the content of one file, whose size as a value is bounded.

    Raises:
        UserError: If it is not a YAML mapping in UTF-8, or exceeds a limit.
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"recipe {path} has {size:,} bytes, which no recipe needs; name a YAML file")
    text = decode(path.read_bytes(), f"recipe {path}")
    if isinstance(text, UserError):
        raise text
    try:
        _check(text, f"recipe {path}")
        content = get_loader("yaml")(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split()).replace('in "<unicode string>", ', "at ")
        raise UserError(f"recipe {path} is not YAML: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} is empty or not a mapping of keys to values")
    return content


@dataclass
class _Level:
    """A mapping or list that has begun."""

    anchor: str | None
    keys: set[str] | None
    """The keys of a mapping so far; None for a list."""
    num_values: int = 1
    expects_key: bool = field(init=False)

    def __post_init__(self) -> None:
        self.expects_key = self.keys is not None


def check_words(words: Sequence[str]) -> None:
    """Refuse words of a command that are short but a huge value; without aliases a word is bounded by its length.

    Raises:
        UserError: Names the option.
    """
    for before, word in pairwise(("", *words)):
        option, equals, value = word.partition("=")
        name, text = (option, value) if option.startswith("--") and equals else (before, word)
        if "&" in text and "*" in text:
            with suppress(yaml.YAMLError):  # text that is not YAML is taken as it is
                _check(text, name, is_recipe=False)


def _check(text: str, name: str, is_recipe: bool = True) -> None:
    """Refuse text that is short but a huge, deep or, in a recipe, ambiguous value; nothing is built from it.

    Args:
        text: YAML.
        name: What it is, for the message.
        is_recipe: Refuse a key that appears twice; a text such as a prompt may repeat what looks like one.

    Raises:
        UserError: Names the line.
        YAMLError: If it is not YAML.
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
    if len(event.value) > MAX_DIGITS and event.implicit[0] and _NUMBER.fullmatch(event.value):
        raise UserError(f"{where}: a number of {len(event.value):,} digits; the most is {MAX_DIGITS}")
    if event.value.count("${") > MAX_REFERENCES:  # OmegaConf takes minutes for some thousands within each other
        raise UserError(f"{where}: more than {MAX_REFERENCES} references (${{...}}) in a value")
