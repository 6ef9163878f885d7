"""What a report is made of: a list of blocks, written as Markdown and as HTML."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = "figures"
"""Folder of the PNG files, beside report.md."""


@dataclass(frozen=True)
class Heading:
    """A heading; the title of the report has level 1."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Plain text; no markup is read in it."""

    text: str


@dataclass(frozen=True)
class Code:
    """Lines shown as they are, such as commands."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Cells of plain text; every row has as many as the header."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A figure.

    Args:
        name: Of its file, without ending; unique in a report.
        figure: What is drawn.
        caption: What it shows.
    """

    name: str
    figure: "Figure"
    caption: str


Block = Heading | Paragraph | Code | Table | Picture


def write(blocks: Sequence[Block], folder: Path) -> None:
    """Write report.md with its figures, and report.html that holds the same figures in itself, into `folder`."""
    figures = folder / FIGURES
    figures.mkdir(parents=True, exist_ok=True)
    for old in figures.glob("*.png"):
        old.unlink()
    images: dict[str, bytes] = {}
    for block in blocks:
        if isinstance(block, Picture):
            assert block.name not in images, f"two figures are named {block.name}"
            images[block.name] = _png(block.figure)
            (figures / f"{block.name}.png").write_bytes(images[block.name])
    (folder / "report.md").write_text("\n\n".join(map(_markdown, blocks)) + "\n", encoding="utf-8")
    title = next((block.text for block in blocks if isinstance(block, Heading)), "Report")
    body = "\n".join(_html(block, images) for block in blocks)
    page = _PAGE.format(title=html.escape(title), style=_STYLE, body=body)
    (folder / "report.html").write_text(page, encoding="utf-8")


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------------- Markdown


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_escape(text)}"
        case Paragraph(text):
            return _escape(text)
        case Code(lines):
            return "\n".join(f"    {line}" for line in lines)
        case Table(header, rows):
            return "\n".join([_row(header), "|" + "---|" * len(header), *map(_row, rows)])
        case Picture(name, _, caption):
            return f"![{_escape(caption)}]({FIGURES}/{name}.png)\n\n{_escape(caption)}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escape(cell).replace("|", "\\|") for cell in cells) + " |"


def _escape(text: str) -> str:
    for character in "\\*<[":
        text = text.replace(character, "&lt;" if character == "<" else "\\" + character)
    return text


# ------------------------------------------------------------------------------------------------------ HTML

_STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.85rem; display: block; overflow-x: auto; }
th, td { border: 1px solid #ccc; padding: 0.25rem 0.6rem; text-align: left; vertical-align: top; }
th { background: #f3f3f3; }
pre { background: #f6f6f6; padding: 0.6rem; overflow-x: auto; font-size: 0.85rem; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; }
figcaption { font-size: 0.9rem; color: #555; }"""

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def _html(block: Block, images: dict[str, bytes]) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Code(lines):
            return f"<pre>{html.escape(chr(10).join(lines))}</pre>"
        case Table(header, rows):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            body = "\n".join(
                "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
            )
            return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"
        case Picture(name, _, caption):
            data = base64.b64encode(images[name]).decode()
            text = html.escape(caption)
            return (
                f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'
            )
