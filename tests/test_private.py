"""Private names of other libraries are few, listed, and there."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from meap_lit.model import Decoder
from meap_lit.model.recompute import checkpoint_and_compile
from meap_lit.private import NAMES
from tests.model.test_float8 import TOY

PACKAGE = Path(__file__).parents[1] / "meap_lit"
MODULES = sorted(file for file in PACKAGE.rglob("*.py") if file.name != "__main__.py")
FOREIGN = ("lightning", "torch", "litdata", "jsonargparse")
PUBLIC = {"_asdict", "_replace", "_fields", "_exit", "_getframe"}
"""Documented, though they begin with an underscore: of named tuples, `os._exit` and `sys._getframe`."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def touched(file: Path) -> Iterator[str]:
    """Private names that a module takes from objects of others."""
    own = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(own):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("meap_lit"):
            yield from filter(is_private, ((node.module or "").split(".")))
            yield from (alias.name for alias in node.names if is_private(alias.name))
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = node.value
            is_own = isinstance(owner, ast.Name) and owner.id in ("self", "cls")
            is_of_base = isinstance(owner, ast.Call) and getattr(owner.func, "id", "") == "super"
            if not is_own and not is_of_base and node.attr not in defined():
                yield node.attr
    yield from inherited(file)


@cache
def defined() -> set[str]:
    """Private attributes that the package defines itself."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in MODULES)
    found = re.findall(r"^\s*def (_\w+)|self\.(_\w+)(?:: [^=\n]+)? =", text, re.MULTILINE)
    return {name for pair in found for name in pair}


def inherited(file: Path) -> Iterator[str]:
    """Private names that the classes of a module take from bases of others, or override there."""
    name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    for kind in vars(module).values():
        if inspect.isclass(kind) and kind.__module__ == name:
            source = inspect.getsource(kind)
            mine = set(re.findall(r"(?:self|super\(\))\.(_[a-z]\w*)", source)) | set(re.findall(r"def (_\w+)", source))
            yield from mine & {name for base in kind.__mro__ if is_foreign(base) for name in of_class(base)}


def is_foreign(kind: type) -> bool:
    return kind.__module__.split(".")[0] in FOREIGN and not kind.__module__.startswith("torch._C")


@cache
def of_class(kind: type) -> set[str]:
    """Private attributes of a class and of its instances."""
    assigned = re.findall(r"self\.(_[a-z]\w*)(?:: [^=\n]+)? =", inspect.getsource(kind))
    return {*filter(is_private, vars(kind)), *assigned}


def test_the_package_touches_no_other_private_name():
    names = {part for name in NAMES for part in name.split(".") if is_private(part)}
    found = {str(file.relative_to(PACKAGE)): set(touched(file)) - names for file in MODULES}
    assert {file: others for file, others in found.items() if others} == {}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_private_name_exists_and_is_used(name):
    *_, last = name.split(".")
    assert any(re.search(rf"\b{last}\b", file.read_text()) for file in MODULES if file.name != "private.py") or (
        re.search(rf"\.{last}\b", inspect.getsource(importlib.import_module("meap_lit.private")).split("}\n", 1)[1])
    ), "used no more: remove it from NAMES"
    owner: Any = None
    for number, part in enumerate(name.split(".")):
        if isinstance(owner, type) and not hasattr(owner, part):
            assert any(part in of_class(base) for base in owner.__mro__ if base is not object)
            return
        if owner is None or (isinstance(owner, ModuleType) and not hasattr(owner, part)):
            owner = importlib.import_module(".".join(name.split(".")[: number + 1]))
        else:
            owner = getattr(owner, part)


def test_blocks_are_not_cut_at_the_buckets_of_ddp():
    torch._dynamo.config.optimize_ddp = True
    checkpoint_and_compile(Decoder(TOY), "none", compile=True)
    assert torch._dynamo.config.optimize_ddp is False
