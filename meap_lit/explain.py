"""What is wrong with a recipe, as one line that names the key, the value and the likely fix.

Most of it is what jsonargparse complains of, put into other words; some it lets pass, and a class fails on it later.
"""

import dataclasses
import difflib
import importlib
import inspect
import re
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any, get_args

from meap_lit.errors import UserError

TOP_LEVEL_KEYS = (
    *("model", "data", "trainer", "budget", "checkpoint", "probe", "hang"),
    *("seed_everything", "base", "ckpt_path"),
)

_KEY = re.compile(r'Parser key "([^"]+)": ')
_CLASS = re.compile(r"Problem with given class_path '([^']+)': ")
# where a class is optional, jsonargparse tells at length that the value is not null either, and prints all of it
_TAIL = re.compile(r"(\s*- Expected a <class 'NoneType'>| Given value type: ).*")
_EXPECTED = re.compile(r"Expected a (?:typing\.Literal\[([^]]*)\]|<class '([^']+)'>)(\. Got value)?")
_NOT_A_CLASS = r"(?:Expected a dot import path string|Unexpected import path format|Not a valid subclass of \w+)"
_GIVEN = re.compile(rf"(?:Got value|{_NOT_A_CLASS}|Given value): ([^\n]*)")
_IN_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list ([...])",
    "dict": "a mapping ({key: value})",
}


def explain(message: str, options: Iterable[str] = (), groups: Mapping[str, type] | None = None) -> str:
    """Condense a complaint of jsonargparse, which nests one sentence a level, and add what may have been meant.

    Args:
        message: The complaint.
        options: The options that there are, such as `--seed`, if they are few.
        groups: The classes that take the values of a recipe's keys without a class_path, such as `trainer`.

    Example: `Parser key "data": Does not validate against ... Problem with given class_path 'm.Data': Option
    'global_batch' is not accepted - Expected ...` becomes `data: m.Data has no option 'global_batch'; did you mean
    'global_batch_size'?`.
    """
    text = _TAIL.sub("", " ".join(message.split()))
    keys, classes = _KEY.findall(text), _CLASS.findall(text)
    where = ".".join(keys)
    core = text[max((match.end() for kind in (_KEY, _CLASS) for match in kind.finditer(text)), default=0) :]

    if match := re.match(r"Option '([^']+)' is not accepted", core):
        kind = _class(classes[-1])
        decides = getattr(kind, "decided_by", {}).get(match[1])
        hint = f"; leave it out: {decides} decides it" if decides else _hint(match[1], _parameters(kind))
        core = f"{classes[-1]} has no option '{match[1]}'{hint}"
    elif match := re.match(r"Group '([^']+)' does not accept option '([^']+)'", core):
        group = _parameters(_class(classes[-1])).get(match[1]) if classes else None
        options = inspect.signature(group.annotation).parameters if group else ()
        core = f"{match[1]} has no option '{match[2]}'{_hint(match[2], options)}"
    elif match := re.search(r"module '([^']+)' has no attribute '([^']+)'", core):
        names = [name for name, value in vars(importlib.import_module(match[1])).items() if inspect.isclass(value)]
        core = f"class_path {match[1]}.{match[2]} does not exist{_hint(match[2], names)}"
    elif match := re.search(r"does not accept option '([^']+)'", core):
        core = f"there is no key '{match[1]}'{_key_hint(match[1], groups or {})}"
    elif re.search(r"arguments are required: .*\.model", core):
        core += "; name a recipe with --config"
    elif match := re.match(r"the following arguments are required: [\w., ]+\w", core):
        core = match[0]  # of a class; what follows says that the value is nothing else that may stand there
    elif match := re.match(r"Unable to load config \"([^\"]*)\"", core):
        where = re.sub(r"\b(\w+)\.\1$", r"\1", where)  # a group is named twice
        return f"{where} must be {_IN_WORDS['dict']}, got {match[1]}"
    elif match := re.match(r"unrecognized arguments: --([^\s=]+)", core):
        # of a recipe the parser knows too many options
        core += _hint(f"--{match[1]}", options) if options else _key_hint(match[1], groups or {}, "--")
    elif wanted := _wanted(core):
        given = _GIVEN.search(message)  # the innermost comes first
        return f"{where} must be {wanted}, got {(given and given[1]) or 'nothing'}"
    return f"{where}: {core}" if where else core


def check_values(recipe: Mapping[str, Any], groups: Mapping[str, type]) -> None:
    """Refuse values that the parser lets pass though nothing can be done with them.

    Args:
        recipe: Values by top-level key, nested.
        groups: The classes that take the values of keys without a class_path, such as `trainer`.

    Raises:
        UserError: If a value is null where none may be, or one of Lightning's is out of range.
    """
    for key, value in recipe.items():
        _refuse_null(value, groups.get(key, object), key)
    seed = recipe["seed_everything"]
    if not 0 <= seed < 2**32:  # numpy's limits
        raise UserError(f"seed_everything must be in [0, {2**32 - 1}], got {seed}")
    for name, limit in {"log_every_n_steps": 1, "num_nodes": 1, "gradient_clip_val": 0}.items():
        value = recipe["trainer"].get(name)
        if value is not None and value < limit:
            raise UserError(f"trainer.{name} must be at least {limit}, got {value}")


def _refuse_null(value: Any, kind: Any, where: str) -> None:
    """Look for a null in what is given to the class `kind`, or the one that the value names, and to those within."""
    if isinstance(value, list):
        for number, entry in enumerate(value):
            _refuse_null(entry, kind, f"{where}[{number}]")
    if not isinstance(value, Mapping):
        return
    if "class_path" in value:
        value, kind = value.get("init_args") or {}, _class(value["class_path"])
    parameters = _parameters(kind) if inspect.isclass(kind) else {}  # a class_path may name a function
    for name, entry in value.items():
        parameter = parameters.get(name, _UNKNOWN)
        if entry is None and not _takes_null(parameter):
            default = "give it a value" if parameter.default is parameter.empty else "leave it out for its default"
            raise UserError(f"{where}.{name} must not be null; {default}")
        kinds = (parameter.annotation, *get_args(parameter.annotation))
        _refuse_null(entry, next(filter(dataclasses.is_dataclass, kinds), object), f"{where}.{name}")


_UNKNOWN = inspect.Parameter("unknown", inspect.Parameter.KEYWORD_ONLY)
"""A parameter of which nothing is known; it takes everything."""


def _takes_null(parameter: inspect.Parameter) -> bool:
    annotation = parameter.annotation
    return (
        parameter.default is None
        or annotation in (Any, parameter.empty)
        or isinstance(annotation, str)  # written for type checkers only
        or NoneType in get_args(annotation)
    )


def _wanted(core: str) -> str:
    """What a value of a wrong type should be, in words; empty if the complaint is about something else."""
    found = _EXPECTED.findall(core)
    # a complaint with a value of its own is of something inside a list or mapping, and says more than the others
    found = [entry for entry in found if entry[2]] or found
    kinds = [
        word
        for choices, kind, _ in found
        for word in (choices.replace("'", "").split(", ") if choices else [_IN_WORDS.get(kind, kind)])
    ]
    if re.search(_NOT_A_CLASS, core):
        kinds += [_IN_WORDS["dict"], "a class_path"]
    *others, last = dict.fromkeys(kinds) or [""]
    return f"{', '.join(others)} or {last}" if others else last


def _class(class_path: str) -> type:
    module, name = class_path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    """Parameters of a class, those that it hands on to its bases by `**kwargs` among them."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if "__init__" in vars(base):
            own = inspect.signature(vars(base)["__init__"]).parameters
            parameters = {**own, **parameters}
            if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in own.values()):
                break
    return {
        name: p for name, p in parameters.items() if name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


def _key_hint(key: str, groups: Mapping[str, type], dashes: str = "") -> str:
    """What may have been meant by a key of a recipe that there is not, such as `trainer.devics`."""
    first, _, rest = key.partition(".")
    if first not in TOP_LEVEL_KEYS:
        return _hint(first, TOP_LEVEL_KEYS, dashes)
    name, known = rest.partition(".")[0], _parameters(groups.get(first, object))
    return "" if name in known else _hint(name, known, f"{dashes}{first}.")


def _hint(given: str, known: Iterable[str], before: str = "") -> str:
    """The nearest of what is known, or all of it, each with the text that stands `before` it."""
    close = difflib.get_close_matches(given, list(known), n=1)
    if close:
        return f"; did you mean '{before}{close[0]}'?"
    return f"; there are {', '.join(before + name for name in known)}" if list(known) else ""
