"""Recipes made wrong on purpose, the same ones for the same seed."""

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from meap_lit.recipe.file import lineage

Tree = dict[str, Any]
Place = tuple[str | int, ...]
"""Keys and list indices from the root of a recipe to one of its values."""

VALUES: tuple[Any, ...] = (
    *(None, [], {}, [[]], [1, "a"], {"a": 1}, [None], [{}], {"class_path": None}, {"init_args": {}}),
    *("", "text", "a\nb", "é☃", "nowhere/at all", "x" * 10_000, "None", "true", "1.5"),
    *(True, False, 0, -1, 1, 2**31, 2**63, 2**70, 10**400, 0.0, -1.5, 1.5, 1e30, 1e308, 1e-320),
    *(float("nan"), float("inf"), float("-inf")),
    *("${nope.key}", "${model}", "${data}", "${", "${}", "${oc.env:NOPE}", "${trainer.callbacks.3}", "$"),
    *("nowhere.Nothing", "os.getcwd", "builtins.dict", "torch.nn.Linear", "meap_lit", "..", "1.2"),
)

CLASSES = (
    *("builtins.object", "builtins.int", "torch.nn.Linear", "lightning.Trainer", "collections.Counter"),
    *("meap_lit.masking.Constant", "meap_lit.modules.MEAPFineTuning", "meap_lit.data.pretraining.PretrainingData"),
    *("meap_lit.masking.positions", "meap_lit.nowhere.Nothing", "os.path.join", "Constant"),
    *("lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.WandbLogger"),
)

NUMBERS = (
    *("9" * 5000, "-" + "9" * 5000, "0x" + "f" * 5000, "0." + "1" * 5000, "1:" * 3000 + "1"),
    *("1e99999", "2026-11-29", "0o17", "1_0"),
)

JUNK = (
    *(b"\xff\xfe", b"\x80", b"\xc3", b"\x00", b"\x1b[31m", b"\t", b"\r", b"\n", b"---\n"),
    *(b"*x", b"&x ", b"!!python/name:os.system ", b"%", b"{", b"- ", b": ", b"'"),
)


class Mutant(NamedTuple):
    """A recipe's text, and how it was made."""

    name: str
    text: bytes


def merged(*recipes: Path) -> Tree:
    """Recipes with all that they are based on as one, without `base`."""
    tree: Tree = {}
    for recipe in recipes:
        for path in lineage(recipe):
            tree = _over(tree, yaml.safe_load(path.read_text()))
    tree.pop("base", None)
    return tree


def mutants(seeds: Mapping[str, Tree], count: int, seed: int) -> Iterator[Mutant]:
    """Yield `count` mutants, of every seed and of every kind in turn."""
    generator = random.Random(seed)
    names = list(seeds)
    for number in range(count):
        name = names[number % len(names)]
        kind = KINDS[number % len(KINDS)]
        what, text = kind(copy.deepcopy(seeds[name]), generator)
        yield Mutant(f"{number}: {name}, {kind.__name__.strip('_')} {what}", text)


def _over(below: Tree, above: Tree) -> Tree:
    both = [key for key in above if isinstance(above[key], dict) and isinstance(below.get(key), dict)]
    return {**below, **above, **{key: _over(below[key], above[key]) for key in both}}


def _places(value: Any, here: Place = ()) -> list[Place]:
    """The places of all values but the root."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, entry in items for place in [(*here, key), *_places(entry, (*here, key))]]


def _at(tree: Any, place: Place) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def _dump(tree: Any) -> bytes:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode()


def any_place(tree: Tree, generator: random.Random, inside: type | None = None) -> Place:
    places = [place for place in _places(tree) if inside is None or isinstance(_at(tree, place[:-1]), inside)]
    depth = generator.choice(sorted({len(place) for place in places}))  # the few near the root as often as the others
    return generator.choice([place for place in places if len(place) == depth])


def _dotted(place: Place) -> str:
    return ".".join(map(str, place))


def _delete(tree: Tree, generator: random.Random) -> tuple[str, bytes]:
    place = any_place(tree, generator)
    del _at(tree, place[:-1])[place[-1]]
    return _dotted(place), _dump(tree)


def _replace(tree: Tree, generator: random.Random) -> tuple[str, bytes]:
    place, value = any_place(tree, generator), copy.deepcopy(generator.choice(VALUES))
    _at(tree, place[:-1])[place[-1]] = value
    return f"{_dotted(place)} by {str(value)[:40]!r}", _dump(tree)


def _misspell(tree: Tree, generator: random.Random) -> tuple[str, bytes]:
    place = any_place(tree, generator, inside=dict)
    parent = _at(tree, place[:-1])
    old = place[-1]
    name = generator.choice((f"{old}s", old[1:], old.upper(), f"{old}.x", f".{old}", "", "a b", 5, None, True))
    parent[name] = parent.pop(old)
    return f"{_dotted(place)} as {name!r}", _dump(tree)


def _duplicate(tree: Tree, generator: random.Random) -> tuple[str, bytes]:
    place = any_place(tree, generator, inside=dict)
    parent = _at(tree, place[:-1])
    parent["another-key"] = copy.deepcopy(generator.choice((parent[place[-1]], *VALUES)))
    return _dotted(place), _dump(tree).replace(b"another-key:", f"{place[-1]}:".encode())


def _swap(tree: Tree, generator: random.Random) -> tuple[str, bytes]:
    one, other = any_place(tree, generator), any_place(tree, generator)
    value = copy.deepcopy(_at(tree, other))
    _at(tree, one[:-1])[one[-1]] = value
    return f"{_dotted(one)} by {_dotted(other)}", _dump(tree)


def _change_class(tree: Tree, generator: random.Random) -> tuple[str, bytes]:
    places = [place for place in _places(tree) if place[-1] == "class_path"]
    place = generator.choice(places)
    name = generator.choice(CLASSES)
    _at(tree, place[:-1])["class_path"] = name
    return f"{_dotted(place)} to {name}", _dump(tree)


def _nest(tree: Tree, generator: random.Random) -> tuple[str, bytes]:
    place, depth = any_place(tree, generator), generator.choice((3, 50, 3000))
    _at(tree, place[:-1])[place[-1]] = "another-value"
    opening, closing = generator.choice((("[", "]"), ("{a: ", "}"), ("${", "}"), ("[{a: ", "}]")))
    nested = opening * depth + "1" + closing * depth
    return f"{_dotted(place)} {opening} {depth} times", _dump(tree).replace(b"another-value", nested.encode())


def _refer(tree: Tree, generator: random.Random) -> tuple[str, bytes]:
    place, target = any_place(tree, generator), any_place(tree, generator)
    text = generator.choice(("${%s}", "x${%s}", "${%s}${%s}", "${.%s}", "${..%s}", "${%s.nope}"))
    value = text.replace("%s", _dotted(generator.choice((place, target, target[:1]))))
    _at(tree, place[:-1])[place[-1]] = value
    return f"{_dotted(place)} to {value}", _dump(tree)


def _bomb(tree: Tree, generator: random.Random) -> tuple[str, bytes]:
    place, levels = any_place(tree, generator), generator.choice((3, 9, 30))
    _at(tree, place[:-1])[place[-1]] = "another-value"
    lines = ["bomb:", "- &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"- &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    text = _dump(tree).replace(b"another-value", f"*a{levels - 1}".encode())
    return f"{_dotted(place)}, {levels} levels", "\n".join(lines).encode() + b"\n" + text


def _number(tree: Tree, generator: random.Random) -> tuple[str, bytes]:
    place, number = any_place(tree, generator), generator.choice(NUMBERS)
    _at(tree, place[:-1])[place[-1]] = "another-value"
    return f"{_dotted(place)} to {number[:12]}", _dump(tree).replace(b"another-value", number.encode())


def _corrupt(tree: Tree, generator: random.Random) -> tuple[str, bytes]:
    raw, junk = bytearray(_dump(tree)), generator.choice(JUNK)
    where = generator.randrange(len(raw))
    raw[where:where] = junk
    return f"byte {where} {junk!r}", bytes(raw)


def _cut(tree: Tree, generator: random.Random) -> tuple[str, bytes]:
    raw = _dump(tree)
    start = generator.randrange(len(raw))
    stop = generator.choice((start + generator.randrange(1, 60), len(raw)))
    return f"bytes {start} to {stop}", raw[:start] + raw[stop:]


def _encode(tree: Tree, generator: random.Random) -> tuple[str, bytes]:
    encoding = generator.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"))
    return encoding, _dump(tree).decode().encode(encoding)


def _whole(tree: Tree, generator: random.Random) -> tuple[str, bytes]:
    value = copy.deepcopy(generator.choice((*VALUES, list(tree), [tree], {"model": tree})))
    return str(value)[:40], _dump(value)


KINDS: tuple[Callable[[Tree, random.Random], tuple[str, bytes]], ...] = (
    *(_delete, _replace, _misspell, _replace, _duplicate, _swap, _change_class, _replace, _nest, _refer, _bomb),
    *(_number, _corrupt, _cut, _replace, _encode, _whole),
)
