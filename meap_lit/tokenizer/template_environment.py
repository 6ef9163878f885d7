"""The Jinja environment of chat templates, which is that of transformers."""

import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from meap_lit.tokenizer.bounded_jinja import BoundedEnvironment

GENERATION = "_mark_answer"
MARKS = "answer_marks"


class _GenerationTag(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: what it encloses is put between the two `answer_marks`."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method(GENERATION, [nodes.Name(MARKS, "load")])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark_answer(self, marks: tuple[str, str], caller: Any) -> str:
        begin, end = marks
        return begin + caller() + end


def template_environment(today: datetime) -> BoundedEnvironment:
    """Return the environment that transformers gives a chat template (`apply_chat_template` in transformers 5)."""
    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes what HTML must
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = environment.bounded("tojson", tojson)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = today.strftime
    return environment
