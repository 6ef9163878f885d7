"""Say what is wrong with a recipe, in one line that names the key, the value and the likely fix.

Most lines rewrite an error of jsonargparse. Some values pass jsonargparse and would fail later; they are checked here.

Reading a recipe and building its objects run libraries on values that a user wrote. Whatever a library raises there is
wrong input. What this package raises there, unless it is a `UserError`, is a bug and keeps its traceback, and so does
every exception once a run has started.
"""

import dataclasses
import difflib
import importlib
import inspect
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from meap_lit.errors import UserError, check_range, in_one_line, shorten

Known = Mapping[str, type | tuple[type, ...] | None]
"""The top-level keys of a recipe, or the options of a command, and the class that takes the values below each.

Several where the recipe names one of them; None for a single value.
"""

_KEY = re.compile(r'Parser key "([^"]+)": ')
_CLASS = re.compile(r"Problem with given class_path '([^']+)': ")
# of a value that may be of several types, each with its error, the one that a class of ours raised for the given value
_OWN = re.compile(r"^\s*- (model\.[\w.]+ must .*)$", re.MULTILINE)
# for an optional class, jsonargparse adds that the value is not null either, and prints all of it
_TAIL = re.compile(r"(\s*- Expected a <class 'NoneType'>| Given value type: ).*")
_NO_MODULE = re.compile(r"Problem with given class_path '([^']+)': (No module named '[^']+')")
_NO_SUBCLASS = re.compile(r"Import path (?:\S+ )?does not correspond to a subclass of (\w+)")
_UNION = re.compile(r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: - ")
_EXPECTED = re.compile(r"Expected (?:a )?(?:typing\.Literal\[([^]]*)\]|<class '([^']+)'>)(\. Got value)?")
_BASES = re.compile(r"Subtypes: \[(.*?)\]\s+Errors:")
_AMBIGUOUS = re.compile(
    r"Multiple subclasses with name (\w+)\. Give the full class path to avoid ambiguity: (.*?)\.(?:\s|$)"
)
_NOT_A_CLASS = r"(?:Expected (?:a )?dot import path string|Unexpected import path format|Not a valid subclass of \w+)"
_GIVEN = re.compile(rf"(?:Got value|{_NOT_A_CLASS}|Given value): ([^\n]*)")
_NO_CLASS = re.compile(r"is abstract\s+Given value type: .*\s+Given value: NestedArg\(key='([^']+)'")
_IN_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list ([...])",
    "tuple": "a list ([...])",
    "collections.abc.Iterable": "a list ([...])",
    "dict": "a mapping ({key: value})",
}


@contextmanager
def input_errors(known: Known) -> Iterator[None]:
    """Turn what libraries raise while a recipe is read or its objects are built into a `UserError`.

    Raises:
        UserError: Says what is wrong with the recipe.
        Exception: As it is, if code of this package raised it: a bug.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or any(raised_by(cause, "meap_lit") for cause in _raised_from(error)):
            raise
        raise find_user_error(error) or UserError(_line(error, known)) from error


def find_user_error(error: BaseException) -> UserError | None:
    """Return the `UserError` behind an exception of a library, if there is one."""
    return next((cause for cause in causes(error) if isinstance(cause, UserError)), None)


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, its cause or the error that it replaced, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _line(error: Exception, known: Known) -> str:
    if any(isinstance(cause, RecursionError) for cause in _raised_from(error)):
        return "a value of the recipe is nested too deeply, or refers to itself"
    if hasattr(error, "full_key"):  # an error of OmegaConf
        return _explain_interpolation(error)
    if str(error).startswith("dictionary changed size"):  # jsonargparse (4.53), if a recipe has several unknown keys
        return "the recipe has keys that this command does not know; recipes of `fit` are not those of `evaluate`"
    first = _raised_from(error)[-1]
    line = explain(str(error), known)
    if isinstance(first, ModuleNotFoundError) and str(first) not in line:  # the package of a logger
        return in_one_line(first)
    is_complaint = type(error).__name__ in _COMPLAINTS or str(error).startswith(("Parser key", "Does not validate"))
    return line if is_complaint else f"cannot build what the recipe names ({type(error).__name__}): {line}"


def _raised_from(error: BaseException) -> list[BaseException]:
    """Return the exception and those that it was raised from."""
    return [error, *([] if error.__cause__ is None else _raised_from(error.__cause__))]


_COMPLAINTS = ("ArgumentError", "MisconfigurationException")
"""Exceptions of jsonargparse and Lightning whose messages are written for users."""


def raised_by(error: BaseException, package: str) -> bool:
    """Return whether code in a module of `package` raised the exception, not code that it called.

    The package itself only looks names up, such as the class of a recipe.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith(f"{package}.")


def _explain_interpolation(error: Exception) -> str:
    """Return which `${...}` cannot be resolved."""
    key = (getattr(error, "full_key", None) or "").replace(".init_args", "")
    message = str(error).splitlines()[0]
    if match := re.search(r"Interpolation key '([^']*)' not found", message):
        message = f"the recipe has no key {shorten(match[1])} for ${{...}} to refer to"
    elif match := re.search(r"Error trying to access ([^:]+): node `([^`]+)` is not a container", message):
        message = f"${{{match[1]}}} is a key below {match[2]}, which must be {_IN_WORDS['dict']}"
    elif type(error).__name__ == "GrammarParseError":
        message = "a reference (${...}) that cannot be read; write it as ${data.init_args.seed}"
    return f"{shorten(key) or 'a value'}: {message}"


def explain(message: str, known: Known) -> str:
    """Return an error message of jsonargparse, which has a sentence for each level, as one line with a likely fix.

    Args:
        message: The message.
        known: The keys or options that there are.

    Example: `Parser key "data": Does not validate against ... Problem with given class_path 'm.Data': Option
    'global_batch' is not accepted - Expected ...` becomes `data: m.Data has no option 'global_batch'; did you mean
    'global_batch_size'?`.
    """
    if own := _OWN.search(message):
        return own[1]
    text = _UNION.sub("", _TAIL.sub("", " ".join(message.split())))
    missing = _NO_MODULE.search(text)  # of a value that may be of several types, each with its error
    where = ".".join(_KEY.findall(text[: missing.start()] if missing else text))
    if missing:
        return f"{where}: {_not_imported(*missing.groups())}"
    classes = _CLASS.findall(text)
    core = text[max((match.end() for kind in (_KEY, _CLASS) for match in kind.finditer(text)), default=0) :]
    return (
        _explain_option(core, where, classes, known)
        or _explain_class(core, where, message)
        or _explain_form(core, where, known)
        or _explain_words(core, where, known)
        or _explain_choice(core, where, message, known)
        or _at(where, core)
    )


def _at(where: str, reason: str) -> str:
    return f"{where}: {reason}" if where else reason


def _not_imported(class_path: str, reason: str) -> str:
    top = class_path.partition(".")[0]
    here = os.path.exists(f"{top}.py") or os.path.isdir(top)  # which `meap-lit`, unlike python -m, does not search
    is_missing = reason == f"No module named '{top}'"  # and not what it imports
    hint = "; to find it in the current folder, run python -m meap_lit" if here and is_missing else ""
    return f"class_path {class_path} cannot be imported: {reason}{hint}"


def _explain_option(core: str, where: str, classes: Sequence[str], known: Known) -> str | None:
    """Return a line about an unknown key, or an unknown option of the last of `classes`."""
    if match := re.match(r"Option '([^']+)' is not accepted", core):
        if classes:
            kind = _class(classes[-1])
            decides = getattr(kind, "decided_by", {}).get(match[1])
            hint = f"; leave it out: {decides} decides it" if decides else _option_hint(match[1], [kind])
            return _at(where, f"{classes[-1]} has no option '{match[1]}'{hint}")
        if match[1].startswith("task.") and "model" in known:
            return f"the recipe has the key '{match[1]}': it is for `evaluate`, not for this command"
        return f"there is no key '{match[1]}'{_key_hint(match[1], known)}"
    if match := re.match(r"Group '([^']+)' does not accept option '([^']+)'", core):
        if not classes:
            key = f"{match[1]}.{match[2]}"
            return _at(where, f"there is no key '{key}'{_key_hint(key, known)}")
        group = parameters_of(_class(classes[-1])).get(match[1])
        taken = inspect.signature(group.annotation).parameters if group else ()
        return _at(where, f"{match[1]} has no option '{match[2]}'{_hint(match[2], taken)}")
    return None


def _explain_class(core: str, where: str, message: str) -> str | None:
    """Return a line about a class_path that names no class, or the wrong one."""
    if match := re.search(r"module '([^']+)' has no attribute '([^']+)'", core):
        members = vars(importlib.import_module(match[1])).items()
        top = match[1].partition(".")[0]  # not what the module imports from elsewhere
        names = [name for name, value in members if inspect.isclass(value) and value.__module__.startswith(top)]
        return _at(where, f"class_path {match[1]}.{match[2]} does not exist{_hint(match[2], names)}")
    if match := _NO_SUBCLASS.search(core):
        given = _GIVEN.search(message)
        found = shorten(given[1] if given else "another")
        return _at(where, f"a class_path must name a subclass of {match[1]}, got {found}")
    return None


def _explain_form(core: str, where: str, known: Known) -> str | None:
    """Return a line about a value or a key of the wrong form."""
    if match := re.match(r"Exceeds the limit \((\d+) digits\)", core):
        return _at(where, f"a number of more than {match[1]} digits")
    if match := re.match(r"Key must be a string, got: (.*)\.", core):
        return _at(where, f"the key {match[1]} is not text")
    if match := re.match(r"(?:unhashable type:|argument of type) '(\w+)'", core):
        return _at(where, f"a class_path must be text, not a {match[1]}")
    if match := re.match(r"'(\w+)' object has no attribute 'keys'", core):
        return _at(where, f"init_args must be {_IN_WORDS['dict']}, not a {match[1]}")
    if match := re.match(r"Expected a tuple with (\d+) elements\. Got value: (.*)", core):
        return f"{where} must be a list of {match[1]} values, got {shorten(match[2])}"
    if match := re.match(r"Unable to load config \"([^\"]*)\"", core):
        where = re.sub(r"\b(\w+)\.\1$", r"\1", where)  # jsonargparse names a group twice
        return _not_a_mapping(where, match[1], known)
    return None


def _explain_words(core: str, where: str, known: Known) -> str | None:
    """Return a line about options of a class or of the command line that are missing or unknown."""
    if match := re.match(r"(the following arguments are required: )([\w., ]+\w)", core):
        if where:  # of a class, the rest says that the value is of no other type either
            return f"{where}: {match[0]}"
        needed = ", ".join(f"--{name}" for name in match[2].split(", "))
        hint = "; name a recipe with --config FILE (null counts as missing)" if "base" in known else ""
        return match[1] + needed + hint
    if match := re.match(r"unrecognized arguments: --([^\s=]+)", core):
        return _at(where, core + _key_hint(match[1], known, "--"))
    if match := re.match(r"unrecognized arguments: (\S+)", core):
        is_recipe = "base" in known and match[1].endswith((".yaml", ".yml"))
        option = "config" if is_recipe else match[1].partition("=")[0] if "=" in match[1] else next(iter(known))
        return _at(where, f"{core}; options begin with two dashes, such as --{option}")
    return None


def _explain_choice(core: str, where: str, message: str, known: Known) -> str | None:
    """Return a line about a value that is of none of the types, or names none of the classes, that the key takes."""
    if match := _NO_CLASS.search(message):
        return f"{where}.{match[1]} is an option of a class, and {where} names none; name one with --{where} CLASS_PATH"
    if match := _AMBIGUOUS.search(message):
        return f"{where}: several classes are called {match[1]}; name one of {match[2]}"
    classes = _choices(message, where, known)
    if wanted := _wanted(core, classes):
        given = _GIVEN.search(message)  # the innermost value comes first
        value = (given and given[1]) or "nothing"
        close = difflib.get_close_matches(value.rpartition(".")[2], classes, n=1, cutoff=0.55)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        if (whole := re.fullmatch(r"(-?\d+)\.0", value)) and _IN_WORDS["int"] in wanted:  # of 4e6
            hint = f"; write {int(whole[1]):_}"
        return f"{where} must be {wanted}, got {shorten(value)}{hint}"
    return None


def check_values(recipe: Mapping[str, Any], known: Known) -> None:
    """Refuse unusable values that pass the parser.

    Raises:
        UserError: If a value is null where null is not allowed, not finite, not a mapping where one is needed, or out
            of the range of an option of Lightning.
    """
    for key in (key for key, kind in known.items() if inspect.isclass(kind)):
        if not isinstance(recipe.get(key, {}), Mapping):
            raise UserError(_not_a_mapping(key, "null" if recipe[key] is None else str(recipe[key]), known))
    for key, value in recipe.items():
        check_value(value, known.get(key) or object, key)
    seed = recipe["seed_everything"]
    check_range("seed_everything", seed, f"[0, {2**32 - 1}]")  # numpy's limits
    for name, limit in {"log_every_n_steps": 1, "gradient_clip_val": 0}.items():
        check_range(f"trainer.{name}", recipe["trainer"].get(name), f"[{limit}, inf)")
    check_range("trainer.num_nodes", recipe["trainer"].get("num_nodes"), "[1, 100000]")


def _not_a_mapping(key: str, given: str, known: Known) -> str:
    """Return what is wrong with a value in place of a mapping, and how to turn off what the key is about."""
    hint = "; null turns it off" if hasattr(known.get(key), "off") else ""
    hint = f"; {_WITHOUT[key]}" if key in _WITHOUT else hint
    return f"{key} must be {_IN_WORDS['dict']}, got {shorten(given)}{hint}"


_WITHOUT = {
    "budget": "a run needs one of budget.max_tokens, budget.max_steps and budget.max_epochs",
    "checkpoint": "trainer.enable_checkpointing false saves no checkpoints",
}
"""What to set instead, for keys that cannot be turned off themselves."""


def check_value(value: Any, kind: Any, where: str = "") -> None:
    """Check the arguments of the class `kind`, or of the class that the value names, and of those within.

    Args:
        value: A value, or the arguments by name.
        kind: The class that takes them.
        where: Key of the value, for the message; empty for the options of a command.

    Raises:
        UserError: If a value is null where null is not allowed, not finite, or not a mapping where one is needed.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} must be finite, got {value}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{where} must have at most 64 bits, got {shorten(str(value))}")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{where} holds a NUL character, got {shorten(value)}")
    if isinstance(value, list):
        for number, entry in enumerate(value):
            check_value(entry, kind, f"{where}[{number}]")
    if not isinstance(value, Mapping):
        return
    if (named := _class_of(value)) is not None:
        value, kind = value.get("init_args") or {}, named
    parameters = parameters_of(kind) if inspect.isclass(kind) else {}  # a class_path may name a function
    for name, entry in value.items():
        place = f"{where}.{name}" if where else name
        parameter = parameters.get(name, _UNKNOWN)
        if entry is None and not _takes_null(parameter):
            default = "give it a value" if parameter.default is parameter.empty else "leave it out for its default"
            raise UserError(f"{place} must not be null; {default}")
        if entry is not None and not isinstance(entry, Mapping) and _takes_only_mappings(parameter.annotation):
            raise UserError(f"{place} must be {_IN_WORDS['dict']}, got {shorten(str(entry))}")
        check_value(entry, group_of(parameter) or object, place)


_UNKNOWN = inspect.Parameter("unknown", inspect.Parameter.KEYWORD_ONLY)
"""A parameter without annotation, which takes everything."""


def _takes_null(parameter: inspect.Parameter) -> bool:
    annotation = parameter.annotation
    return (
        parameter.default is None
        or annotation in (Any, parameter.empty)
        or isinstance(annotation, str)  # written for type checkers only
        or NoneType in get_args(annotation)
    )


def _takes_only_mappings(annotation: Any) -> bool:
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return all(kind is NoneType or dataclasses.is_dataclass(kind) for kind in kinds)


def _choices(message: str, where: str, known: Known) -> list[str]:
    """Return the names of the classes that a value may name, by the types in the message or that of the option."""
    listed = _BASES.findall(message)
    paths = re.findall(r"[a-z_]\w*(?:\.\w+)+", listed[-1]) if listed else []
    bases: list[Any] = [_class(path) for path in paths if path.startswith(("meap_lit.", "lightning."))]
    found = {kind for base in (*bases, known.get(where)) if inspect.isclass(base) for kind in subclasses_of(base)}
    return sorted(kind.__name__ for kind in found)


def subclasses_of(base: type) -> Iterator[type]:
    """Yield the classes known by now that derive from `base` and that a recipe can name."""
    derived: list[type] = base.__subclasses__()
    for kind in derived:
        if not (inspect.isabstract(kind) or kind.__name__.startswith("_") or "<locals>" in kind.__qualname__):
            yield kind
        yield from subclasses_of(kind)


def _wanted(core: str, classes: Sequence[str]) -> str:
    """Return the expected type in words, with the classes to choose from; empty if the message is not about a type."""
    found = _EXPECTED.findall(core)
    # a message with a value of its own is about something inside a list or mapping, and is more precise
    found = [entry for entry in found if entry[2]] or found
    kinds = [
        word
        for choices, kind, _ in found
        for word in (choices.replace("'", "").split(", ") if choices else [_IN_WORDS.get(kind, kind)])
    ]
    if re.search(_NOT_A_CLASS, core):
        kinds.append(f"a class ({', '.join(classes)})" if classes else "a class_path")
    if any(kind.isdigit() for kind in kinds):  # of a Literal, which jsonargparse calls a number too
        kinds = [kind for kind in kinds if kind != _IN_WORDS["int"]]
    *others, last = dict.fromkeys(kinds) or [""]
    return f"{', '.join(others)} or {last}" if others else last


def _class_of(value: Mapping[str, Any]) -> type | None:
    """Return the class that a mapping names; None if it names none, although a key of its own is called so."""
    with suppress(ImportError, AttributeError, ValueError):
        return _class(value["class_path"]) if "class_path" in value else None
    return None


def _class(class_path: str) -> type:
    module, name = class_path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def parameters_of(kind: type) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class, including those that it passes to its bases by `**kwargs`."""
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


def option_keys(kind: type) -> Iterator[str]:
    """Yield the options of a class, and those of the dataclasses among them: `optimizer`, `optimizer.lr`, ..."""
    for name, parameter in parameters_of(kind).items():
        yield name
        if (group := group_of(parameter)) is not None:
            yield from (f"{name}.{key}" for key in option_keys(group))


def group_of(parameter: inspect.Parameter) -> type | None:
    """Return the dataclass whose fields are options below an argument, such as `decoder`."""
    kinds = (parameter.annotation, *get_args(parameter.annotation))
    return next((kind for kind in kinds if inspect.isclass(kind) and dataclasses.is_dataclass(kind)), None)


def _key_hint(key: str, known: Known, dashes: str = "") -> str:
    """Return a suggestion for an unknown key of a recipe, such as `trainer.devics` or `mask_ratio`."""
    first, _, rest = key.partition(".")
    classes = {name: kind if isinstance(kind, tuple) else (kind,) if kind else () for name, kind in known.items()}
    if first in known:
        return _option_hint(rest, classes[first], f"{dashes}{first}.")
    for name, kinds in classes.items():
        if same := _named_alike(key, kinds):
            return f"; did you mean '{dashes}{name}.{same}'?"
    return _hint(first, (*known, "config", "devices", "nodes") if dashes and "model" in known else known, dashes)


def _option_hint(key: str, kinds: Sequence[type], before: str = "") -> str:
    """Return a suggestion for an unknown option of classes; empty if the first part of its key is known."""
    known = list(dict.fromkeys(name for kind in kinds for name in parameters_of(kind)))
    if key.partition(".")[0] in known:
        return ""
    same = _named_alike(key, kinds)
    return f"; did you mean '{before}{same}'?" if same else _hint(key.partition(".")[0], known, before)


def _named_alike(key: str, kinds: Sequence[type]) -> str | None:
    """Return the option of a class whose key ends with `key`, with hyphens for underscores or without."""
    wanted = key.replace("-", "_")
    keys = (option for kind in kinds for option in option_keys(kind))
    return next((option for option in keys if f".{option}".endswith(f".{wanted}")), None)


def _hint(given: str, known: Iterable[str], before: str = "") -> str:
    """Return the known name nearest to the given one, or all known names, each with `before` in front of it."""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.55)
    if close:
        return f"; did you mean '{before}{close[0]}'?"
    return f"; choose from {', '.join(before + name for name in known)}" if list(known) else ""
