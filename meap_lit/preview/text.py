"""Rows of a preview as lines of text with styles, for a terminal or a log."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import wrap

from rich.cells import cell_len
from rich.text import Text

from meap_lit.preview.rows import Document, Row, Token

STYLES = {
    "heading": "bold",
    "masked": "bold white on magenta",
    "original": "magenta",
    "label": "green",
    "special": "cyan",
    "dim": "dim",
    "plain": "",
}
_WHITESPACE = {" ": "·", "\n": "⏎", "\t": "⇥"}
_GUTTER = 14
IGNORED = "-"

LEGEND = (
    "input: what the model reads; original: the token that a mask replaces; "
    "label: the target at the same position, - where it is ignored (-100); copy: the masked copy, below its original; "
    "· is a space, ⏎ a newline, ⇥ a tab"
)
LEGEND_OF_LINES = f"{LEGEND}, │ a border of tokens; the number before a line is the position id of its first token"


def visible(text: str) -> str:
    """Return text with whitespace and characters that do not print made visible."""
    return "".join(
        _WHITESPACE.get(char, char if char.isprintable() else char.encode("unicode_escape").decode()) for char in text
    )


def describe(row: Row) -> str:
    """Return the counts of a row in words."""
    if row.num_maskable:
        share = f"{row.num_masked / row.num_maskable:.1%} of {row.num_maskable:,}; P = {row.mask_ratio:g}"
    else:
        share = f"P = {row.mask_ratio:g}, nothing to mask"
    num_documents = len(row.documents)
    return (
        f"{len(row.tokens):,} tokens, {row.num_masked:,} masked ({share}), {row.num_supervised:,} supervised, "
        f"{num_documents:,} document{'s' if num_documents != 1 else ''}, {row.num_padding:,} padding"
    )


def name_of(row: Row) -> str:
    """Return what a row is in words."""
    return f"row {row.number:,} of the run, step {row.step:,}: {row.name}"


def positions_of(document: Document) -> str:
    """Return the position ids of a document in words."""

    def span(tokens: Sequence[Token]) -> str:
        return f"{tokens[0].position:,} to {tokens[-1].position:,}"

    if not document.tokens:
        return f"masked copy alone, positions {span(document.copy)}"
    if not document.copy:
        return f"positions {span(document.tokens)}"
    return f"positions {span(document.tokens)}, masked copy at positions {span(document.copy)}"


def text_of_rows(rows: Sequence[Row], width: int) -> str:
    """Return rows as plain text for a log."""
    lines = wrap(LEGEND_OF_LINES, width)
    for row in rows:
        lines += ["", *(line.plain for line in lines_of_row(row, width))]
    return "\n".join(lines)


def lines_of_row(row: Row, width: int) -> Iterator[Text]:
    """Yield a row as lines of at most `width` columns, but for tokens that are longer."""
    yield Text(name_of(row), STYLES["heading"])
    yield Text(describe(row))
    for document in row.documents:
        yield Text()
        yield Text(f"{document.name}, {positions_of(document)}", STYLES["heading"])
        yield from _lines_of_document(document, width)
    if row.num_padding:
        yield Text()
        yield Text(f"{row.num_padding:,} tokens of padding, which nothing attends to, without labels", STYLES["dim"])


@dataclass(frozen=True)
class _Band:
    """A line of a document: its name, and for each token a text and a style."""

    name: str
    cells: list[tuple[str, str]]
    positions: list[int] | None = None
    """Position ids, shown at the beginning of the line."""


def bands_of(document: Document) -> list[_Band]:
    """Return the lines of a document, aligned token by token."""
    shown = []
    for name, tokens in (("input", document.tokens), ("copy", document.copy)):
        if not tokens:
            continue
        inputs = [(visible(token.input), _style_of(token)) for token in tokens]
        shown.append(_Band(name, inputs, [token.position for token in tokens]))
        if name == "input" or not document.tokens:  # the original beside a copy shows what its masks replace
            originals = ["" if token.original is None else visible(token.original) for token in tokens]
            if any(originals):
                shown.append(_Band("original", [(text, "original") for text in originals]))
        labels = [(IGNORED, "dim") if token.label is None else (visible(token.label), "label") for token in tokens]
        shown.append(_Band("label", labels))
    return shown


def _style_of(token: Token) -> str:
    return "masked" if token.original is not None else "special" if token.is_special else "plain"


def _lines_of_document(document: Document, width: int) -> Iterator[Text]:
    bands = bands_of(document)
    widths = [max(cell_len(text) for text, _ in column) for column in zip(*(band.cells for band in bands))]
    for start, stop in _pieces(widths, width - _GUTTER):
        if start:
            yield Text()
        for band in bands:
            position = "" if band.positions is None else f"{band.positions[start]:,}"
            line = Text(f"{position:>5} {band.name:<{_GUTTER - 6}}", STYLES["dim"])
            for (text, style), cell_width in zip(band.cells[start:stop], widths[start:stop]):
                line.append(text, STYLES[style])
                line.append(" " * (cell_width - cell_len(text)))
                line.append("│", STYLES["dim"])
            yield line


def _pieces(widths: Sequence[int], width: int) -> Iterator[tuple[int, int]]:
    """Yield where the lines begin and end that hold columns of these widths, and a border after each of them."""
    start = used = 0
    for column, column_width in enumerate(widths):
        if used + column_width + 1 > width and column > start:
            yield start, column
            start, used = column, 0
        used += column_width + 1
    yield start, len(widths)
