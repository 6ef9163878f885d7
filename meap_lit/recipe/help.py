"""`--help` of the commands on a recipe: the keys of this project first, those of Lightning's Trainer last."""

import re
from argparse import SUPPRESS
from collections.abc import Iterator, Mapping, Sequence

from meap_lit.recipe.explain import group_of, parameters_of
from meap_lit.recipe.parser import Parser

_PATHS = re.compile(r"\b(?:meap_lit|lightning|torch)(?:\.\w+)*\.(?=[A-Z]\w*)")
_NOISE = re.compile(
    r"^  --[\w.]+(?:\.help\b.*| CONFIG\s+Path to a configuration file\.)\n(?:^ {6,}.*\n)*|^\w.*:\n+(?=\w)", re.MULTILINE
)
"""Options that take a file or print the help of a class, and titles without options below."""
_DEVICES = """\
  --devices N, --nodes N
                        Short for --trainer.devices and --trainer.num_nodes.
                        They win over every recipe.
"""


def help_page(parser: Parser, classes: Mapping[str, Sequence[type]]) -> str:
    """Return the help of a command on a recipe.

    Args:
        parser: Parser of the command.
        classes: The classes that take the options of a key, such as {"model": [MEAPPretraining, MEAPFineTuning]}.
    """
    for key, group in (parser.groups or {}).items():
        group.title = key if key in classes else f"{key}: {group.title}"
    page = _without_noise(parser).replace("  --seed_everything", f"{_DEVICES}  --seed_everything", 1)
    for key, kinds in classes.items():
        before, title, after = page.partition(f"\n{key}:\n")
        page = before + title[:1] + "".join(_options(kinds, key)) + after.partition("\n\n")[2]
    return _PATHS.sub("", page)


def _options(kinds: Sequence[type], key: str) -> Iterator[str]:
    """Yield a section for each class; options of an earlier class are not repeated."""
    yield f"{key}: a class, {' or '.join(kind.__name__ for kind in kinds)}; --{key}.help NAME shows its own options\n\n"
    known: set[str] = set()
    for kind in kinds:
        found = parameters_of(kind)
        new = [name for name in found if name not in known]
        if known:
            changes = [("without", sorted(known - found.keys())), ("and", [f"{key}.{name}" for name in new])]
            said = "".join(f", {word} {', '.join(names)}" for word, names in changes if names)
            yield f"{key} ({kind.__name__}): the options above{said}\n\n"
        parser = Parser(prog="", usage=SUPPRESS, add_help=False)
        groups = {name: group for name in new if (group := group_of(found[name])) is not None}
        parser.add_class_arguments(kind, key, fail_untyped=False, skip=known | groups.keys())
        for name, group in groups.items():
            parser.add_class_arguments(group, f"{key}.{name}", fail_untyped=False)
        for name, section in (parser.groups or {}).items():
            section.title = f"{name} ({kind.__name__}): {section.title}"
        yield _without_noise(parser).strip("\n") + "\n\n" if new else ""
        known |= found.keys()


def _without_noise(parser: Parser) -> str:
    return re.sub(r"\n{3,}", "\n\n", _NOISE.sub("", parser.format_help()))
