"""The pictures of the method in docs/ are what their script draws."""

import re
import runpy
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SCRIPT = runpy.run_path(str(DOCS / "pictures.py"))


@pytest.mark.parametrize("name", SCRIPT["PICTURES"])
def test_a_committed_picture_is_the_drawn_one(name):
    assert (DOCS / name).read_text(encoding="utf-8") == SCRIPT["PICTURES"][name](), "run python docs/pictures.py"


@pytest.mark.parametrize(("name", "num_masks"), [("pretraining.svg", 2), ("finetuning.svg", 1)])
def test_a_picture_has_as_many_masks_as_it_says(name, num_masks):
    texts = [element.text for element in ET.parse(DOCS / name).iter() if element.tag.endswith("}text")]
    assert texts.count("[MASK]") == num_masks
    assert any(re.match(rf"P = 1[05]%: {num_masks} of the 1[04] ", text) for text in texts)


@pytest.mark.parametrize("name", SCRIPT["PICTURES"])
def test_every_picture_is_shown_on_a_page(name):
    pages = [page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md")]
    assert any(f"]({name})" in page or f"](../{name})" in page for page in pages)


@pytest.mark.parametrize("name", ["pretraining.svg", "finetuning.svg", "quickstart.svg"])
def test_the_readme_shows_the_method_and_the_quickstart(name):
    assert f"](docs/{name})" in (DOCS.parent / "README.md").read_text(encoding="utf-8")
