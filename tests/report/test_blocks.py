import base64
import re

import pytest
from matplotlib.figure import Figure

from meap_lit.errors import UserError
from meap_lit.report.blocks import Code, Heading, Paragraph, Picture, Table, write


def drawn():
    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot([0, 1])
    return figure


def test_markdown_and_html_say_the_same(tmp_path):
    blocks = [
        Heading("Title", 1),
        Paragraph("a < b * c"),
        Table(["x", "y"], [["1|2", "[3, 4]"]]),
        Code(["run --this"]),
        Picture("loss", drawn(), "The loss"),
    ]
    write(blocks, tmp_path)
    assert (tmp_path / "report.md").read_text().split("\n\n") == [
        "# Title",
        "a &lt; b \\* c",
        "| x | y |\n|---|---|\n| 1\\|2 | \\[3, 4] |",
        "    run --this",
        "![The loss](figures/loss.png)",
        "The loss\n",
    ]
    page = (tmp_path / "report.html").read_text()
    assert "<title>Title</title>" in page
    for part in ("<h1>Title</h1>", "<p>a &lt; b * c</p>", "<td>1|2</td><td>[3, 4]</td>", "<pre>run --this</pre>"):
        assert part in page
    (image,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(image) == (tmp_path / "figures/loss.png").read_bytes()
    assert "<script" not in page


def test_figures_of_an_earlier_report_go(tmp_path):
    write([Picture("old", drawn(), "")], tmp_path)
    write([Picture("new", drawn(), "")], tmp_path)
    assert [file.name for file in (tmp_path / "figures").iterdir()] == ["new.png"]


def test_figures_of_the_same_name_are_refused_and_the_earlier_report_stays(tmp_path):
    write([Picture("old", drawn(), "")], tmp_path)
    with pytest.raises(UserError, match="two figures of the report are named new; rename"):
        write([Picture("new", drawn(), "")] * 2, tmp_path)
    assert [file.name for file in (tmp_path / "figures").iterdir()] == ["old.png"]
