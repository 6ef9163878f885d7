"""What a person reads shows every character, and no text controls the terminal or the page."""

from meap_lit.preview.page import page
from meap_lit.preview.rows import Document, Row, Token
from meap_lit.preview.text import lines_of_row, visible


def row_of(*texts: str) -> Row:
    tokens = [
        Token(input_id=7, input=text, original=None, label_id=7, label=text, position=place, is_special=False)
        for place, text in enumerate(texts)
    ]
    return Row(0, "block 0", 0, [Document("document 1", tokens)], 0, mask_ratio=0.0, num_maskable=len(tokens))


def test_whitespace_and_control_characters_are_visible():
    assert visible(" a\n\tb") == "·a⏎⇥b"
    assert visible("\x1b[2J\u202e\r") == r"\x1b[2J\u202e\r"
    assert visible("é漢🙂") == "é漢🙂"


def test_wide_characters_keep_the_columns():
    lines = [line.plain for line in lines_of_row(row_of("漢字", "a", "漢"), width=60) if "│" in line.plain]
    assert [line[14:] for line in lines] == ["漢字│a│漢│", "漢字│a│漢│"]


def test_lines_fit_the_width_and_hold_every_token_once():
    texts = [f"w{number}" for number in range(100)]
    lines = [line.plain for line in lines_of_row(row_of(*texts), width=50)]
    assert max(map(len, lines[4:])) <= 50
    inputs = [line for line in lines if " input " in line]
    assert [cell.strip() for line in inputs for cell in line[14:].rstrip("│").split("│")] == texts
    firsts = [int(line.split()[0]) for line in inputs]
    assert [texts[first] for first in firsts] == [line[14:].split("│")[0].strip() for line in inputs]


def test_a_token_longer_than_the_line_has_a_line_of_its_own():
    lines = [line.plain for line in lines_of_row(row_of("a", "b" * 80, "c"), width=40) if " input " in line.plain]
    assert len(lines) == 3


def test_text_is_escaped_in_the_page():
    written = page([row_of("<script>alert(1)</script>", "&amp;")], note="<b>")
    assert "<script" not in written
    assert "&lt;script&gt;" in written
    assert "&amp;amp;" in written
    assert "&lt;b&gt;" in written
