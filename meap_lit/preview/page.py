"""Rows of a preview as one HTML page that loads nothing."""

from collections.abc import Iterator, Sequence

import jinja2

from meap_lit.preview.rows import Document, Row
from meap_lit.preview.text import LEGEND, bands_of, describe, name_of, positions_of


def page(rows: Sequence[Row], note: str | None) -> str:
    """Return the page; `note` is shown above the rows."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        rows=rows,
        note=note,
        legend=LEGEND,
        bands_of=bands_of,
        describe=describe,
        name_of=name_of,
        positions_of=positions_of,
        columns_of=_columns_of,
    )


def _columns_of(document: Document) -> Iterator[tuple[str, Sequence[tuple[str, str]]]]:
    """Yield for each token its ids in words, and its cells from top to bottom, texts with their styles."""
    named = [(name, part) for name, part in (("input", document.tokens), ("copy", document.copy)) if part]
    cells = zip(*(band.cells for band in bands_of(document)))
    for place, column in enumerate(cells):
        tokens = [(name, part[place]) for name, part in named]
        ids = (f"{name} id {t.input_id}, label id {t.label_id}, position {t.position}" for name, t in tokens)
        yield "; ".join(ids), column
