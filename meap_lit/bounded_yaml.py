"""Refuse YAML whose value is huge or deeply nested, before the value is built."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from meap_lit.errors import UserError

MAX_LEVELS = 50
MAX_VALUES = 100_000
"""Limits of a text, with aliases counted as what they name. Recipes of this project have 8 levels and 80 values."""
MAX_DIGITS = 400
"""A longer number exceeds every float."""
MAX_REFERENCES = 20

_NUMBER = re.compile(r"[-+]?[0-9][0-9a-fA-FxXoO_:.+-]*")
_OTHER_BASES = {8: re.compile(r"[-+]?0[0-7_]+"), 60: re.compile(r"[-+]?[1-9][\d_]*(:[0-5]?\d)+(\.[\d_]*)?")}
"""Numbers that YAML 1.1 does not read in base 10: 010 is 8, and 12:30:45 is 45045."""


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
