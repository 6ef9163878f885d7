"""Jinja for templates of others: sandboxed, and bounded in what a rendering may cost.

The sandbox keeps a template from reaching Python, but a few nested loops hang it and `"x" * 10**10` fills the memory.
Here every iteration, call and operation takes steps off a budget, and so does every character and element that they
make. What becomes text is counted down to its leaves, and before it is made: a list that holds itself twice, twenty
times over, is a short program and a long text. Steps are counted and not timed, so that a template renders on every
machine or on none.
"""

import functools
import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Sized, ValuesView
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

BUDGET = 20_000_000
"""Steps of one rendering: a few seconds of loops, or a text of several megabytes."""

_OPERATION, _CALL = 10, 50
"""Steps of an operation or filter, and of a call: about as many empty iterations take as long."""

_PART = 5
"""Steps of a value inside another one that becomes text."""
_MAX_NUMBER = 10_000
"""The largest number that a method or filter takes, such as the width of `center`."""
_MAX_BITS = 4096
_MULTIPLYING = ("replace", "join", "indent", "expandtabs", "tojson", "translate")
"""Methods and filters whose result may be as long as the product of what they are given."""
_SHALLOW = {
    "abs", "attr", "batch", "count", "d", "default", "first", "float", "int", "items", "last", "length", "list", "map",
    "random", "reject", "rejectattr", "reverse", "round", "select", "selectattr", "slice",
}  # fmt: skip
"""Filters that neither make text of what is in their arguments nor compare it."""
_COMPARING = {
    *("==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge", "<", "lt", "lessthan", "<=", "le", "in"),
}
"""Tests that compare all of what is in their arguments."""


class TooCostly(jinja2.TemplateError):
    """A rendering has spent its budget."""

    def __init__(self) -> None:
        super().__init__(f"it takes more than {BUDGET:,} steps and characters, as nested loops do; shorten it")


class _CountingCompiler(CodeGenerator):
    """Passes what loops iterate over, and what is written, through the environment."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        texts = [data.data for data in node.find_all(nodes.TemplateData)]
        texts += [str(constant.value) for constant in node.find_all(nodes.Const)]
        node.iter = _call("iterate", node.iter, nodes.Const(1 + sum(map(len, texts))))
        super().visit_For(node, frame)

    def visit_Output(self, node: nodes.Output, frame: Frame) -> None:
        constant = nodes.TemplateData | nodes.Const  # paid by the loop around it
        node.nodes = [part if isinstance(part, constant) else _call("write", part) for part in node.nodes]
        super().visit_Output(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.visit(_call("concatenate", *node.nodes), frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        node.expr = _call("compared", node.expr)
        for operand in node.ops:
            operand.expr = _call("compared", operand.expr)
        super().visit_Compare(node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        for pair in node.items:  # keys are hashed
            pair.key = pair.key if isinstance(pair.key, nodes.Const) else _call("compared", pair.key)
        super().visit_Dict(node, frame)

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:
        if not isinstance(node.node, nodes.EnvironmentAttribute):
            super().visit_Call(node, frame, forward_caller=forward_caller)
            return
        self.write(f"environment.{node.node.name}(")
        for argument in node.args:
            self.visit(argument, frame)
            self.write(", ")
        self.write(")")


def _call(method: str, *arguments: nodes.Node) -> nodes.Call:
    """Return the call of a method of the environment, which is made without going through its `call`."""
    call = nodes.Call(nodes.EnvironmentAttribute(method), list(arguments), [], None, None)
    call.set_lineno(arguments[0].lineno or 1)
    return call


class _Template(jinja2.Template):
    environment: "BoundedEnvironment"

    def render(self, *args: Any, **kwargs: Any) -> str:
        self.environment.spent = 0
        return super().render(*args, **kwargs)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which one rendering costs at most `BUDGET` steps."""

    code_generator_class = _CountingCompiler
    template_class = _Template
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.spent = 0
        self.filters = {name: self.bounded(name, filter) for name, filter in self.filters.items()}
        comparing: dict[str, Any] = {name: self.tests[name] for name in _COMPARING}
        self.tests |= {name: self.bounded(name, test) for name, test in comparing.items()}
        del self.globals["lipsum"]  # text without end

    def spend(self, steps: int) -> None:
        """Take `steps` off the budget; raise `TooCostly` if there are not as many left."""
        self.spent += steps
        if self.spent > BUDGET:
            raise TooCostly

    def iterate(self, items: Iterable[Any], cost: int) -> Iterable[Any]:
        """Return what a loop iterates over, at a cost for each item."""
        if isinstance(items, Sized):
            self.spend(len(items) * cost)
            return items
        return self._counted(items, cost)

    def _counted(self, items: Iterable[Any], cost: int) -> Iterator[Any]:
        for item in items:
            self.spend(cost)
            yield item

    def write(self, value: Any) -> Any:
        """Return a value that is about to be written."""
        self.spend(_OPERATION + self._text_size(value))
        return value

    def compared(self, value: Any) -> Any:
        """Return a value that is about to be compared, or searched."""
        self.spend(self._text_size(value) if isinstance(value, list | tuple) else _size(value))
        return value

    def concatenate(self, *values: Any) -> str:
        """Return the values as one text, as `~` does."""
        self.spend(_OPERATION + self._text_size(values))
        return "".join(map(str, values))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method for a template, at a cost."""
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # the sandbox wraps `format`
        name = getattr(obj, "__name__", "")
        if obj is not self.globals["range"]:  # it has a limit of its own
            self._check_arguments(name, (owner, *args, *kwargs.values()))
        if name == "changed":  # of a loop, which compares
            self.spend(self._text_size(args))
        if name in ("format", "format_map", "join"):
            self.spend(self._text_size((owner, args, kwargs)) * max(1, str(owner).count("{")))
        self.spend(_CALL)
        result = super().call(context, obj, *args, **kwargs)
        self.spend(_size(result))
        return result

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return an item for a template, at the cost of hashing its key."""
        if isinstance(argument, tuple):
            self.spend(self._text_size(argument))
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right` for a template, at a cost."""
        sizes = _size(left) + _size(right)
        if operator == "*" and sizes:
            sizes *= next((abs(number) for number in (left, right) if isinstance(number, int)), 1)
        elif operator == "%" and isinstance(left, str):
            self._check_format(left)
            sizes = len(left) + self._text_size(right) * left.count("%")
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (abs(right) if operator == "**" else 1)
            if max(bits, right.bit_length()) > _MAX_BITS:
                raise TooCostly
        self.spend(_OPERATION + sizes)
        return super().call_binop(context, operator, left, right)

    def bounded(self, name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that takes its cost off the budget."""

        @functools.wraps(filter)  # with the marks by which Jinja knows what a filter takes
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self._check_arguments(name, (*args, *kwargs.values()))
            self.spend(_OPERATION + (0 if name in _SHALLOW else self._text_size((args, kwargs))))
            result = filter(*args, **kwargs)
            self.spend(_size(result))
            return result

        return bounded

    def _check_arguments(self, name: str, arguments: Iterable[Any]) -> None:
        cost = 1
        for argument in arguments:
            if isinstance(argument, int):
                if abs(argument) > _MAX_NUMBER:
                    raise jinja2.TemplateError(f"{name} is given a number above {_MAX_NUMBER:,}")
                cost *= max(1, abs(argument))
            elif name in _MULTIPLYING:
                cost *= max(1, self._text_size(argument) if isinstance(argument, dict) else _size(argument))
            elif name == "format" and isinstance(argument, str):
                self._check_format(argument)
        if name in _MULTIPLYING:
            self.spend(cost)

    def _check_format(self, text: str) -> None:
        if re.search(r"\d{5}", text):
            raise jinja2.TemplateError(f"a format has a width above {_MAX_NUMBER:,}: {text!r:.40}")
        if re.search(r"%[^%a-zA-Z]*\*|\{[^{}]+\{", text.replace("{{", "")):
            raise jinja2.TemplateError(f"a format takes its width from a value: {text!r:.40}")

    def _text_size(self, value: Any) -> int:
        """Return about how many characters the text of a value has, at most a few more than the budget has left."""
        size, parts = 0, [value]
        while parts and size <= BUDGET - self.spent:
            part = parts.pop()
            size += len(part) if isinstance(part, str | bytes) else _PART
            if isinstance(part, Namespace):
                raise jinja2.TemplateError("a namespace is written or compared; name one of its values")
            if isinstance(part, dict):
                parts += [*part, *part.values()]
            elif isinstance(part, list | tuple | set | KeysView | ValuesView | ItemsView):
                parts += part
        return size


_SIZED = (str, list, tuple, dict, set, bytes)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, _SIZED) else 0
