"""Blocks of a report, written as Markdown and as HTML by the two templates beside this file."""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import jinja2

from meap_lit.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = "figures"
"""Folder of the PNG files, beside report.md."""


@dataclass(frozen=True)
class Heading:
    """A heading; the title of the report has level 1."""

    kind: ClassVar = "heading"
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Plain text without markup."""

    kind: ClassVar = "paragraph"
    text: str


@dataclass(frozen=True)
class Code:
    """Lines in a fixed-width font, such as commands."""

    kind: ClassVar = "code"
    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Cells of plain text; every row has as many cells as the header."""

    kind: ClassVar = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A figure.

    Args:
        name: Name of its file without ending, unique in a report.
        figure: The Matplotlib figure.
        caption: Text below it.
    """

    kind: ClassVar = "picture"
    name: str
    figure: "Figure"
    caption: str


Block = Heading | Paragraph | Code | Table | Picture


def write(blocks: Sequence[Block], folder: Path) -> None:
    """Write report.md with its figures, and report.html with the same figures inside, into `folder`.

    Raises:
        UserError: If two figures have the same name.
    """
    names = Counter(block.name for block in blocks if isinstance(block, Picture))
    twice = [name for name, times in names.items() if times > 1]  # evaluations whose names differ in punctuation only
    if twice:
        raise UserError(f"two figures of the report are named {twice[0]}; rename the folder of one of the evaluations")
    figures = folder / FIGURES
    figures.mkdir(parents=True, exist_ok=True)
    for old in figures.glob("*.png"):
        old.unlink()
    images: dict[str, str] = {}
    for block in blocks:
        if isinstance(block, Picture):
            buffer = io.BytesIO()
            block.figure.savefig(buffer, format="png", dpi=120)
            (figures / f"{block.name}.png").write_bytes(buffer.getvalue())
            images[block.name] = base64.b64encode(buffer.getvalue()).decode()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["md"] = _escape_markdown
    environment.filters["longest_word"] = lambda text: max(map(len, text.split()), default=0)
    title = next((block.text for block in blocks if isinstance(block, Heading)), "Report")
    for name in ("report.md", "report.html"):
        text = environment.get_template(f"{name}.jinja").render(title=title, blocks=blocks, images=images)
        (folder / name).write_text(text, encoding="utf-8")


def _escape_markdown(text: str) -> str:
    """Return `text` with the characters escaped that Markdown would read as markup, in tables too."""
    for character, escaped in (("\\", "\\\\"), ("*", "\\*"), ("<", "&lt;"), ("[", "\\["), ("|", "\\|")):
        text = text.replace(character, escaped)
    return text
