"""The code blocks of a page that are marked to run.

A marker is an HTML comment, which no rendered page shows, on a line of its own before a block (fenced, or indented by
four spaces):

    <!-- runnable -->                               the block runs as it is
    <!-- runnable: --budget.max_steps 4 -->         these words follow every `fit` command of the block
    <!-- run                                        hidden: what a reader has done before, such as making a file
    mkdir my_texts && cp "$REPOSITORY"/docs/*.md my_texts
    -->

Blocks are bash, or Python if the fence says so.
"""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted(
    file for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "data/*.md") for file in REPOSITORY.glob(pattern)
)

_MARKER = re.compile(r"<!--\s*run(?:nable(?::(?P<words>[^\n]*?))?\s*-->[ ]*\n|[ ]*\n(?P<hidden>.*?)-->)", re.DOTALL)
_BLOCK = re.compile(
    r"\s*?(?:```(?P<language>\w*)[^\n]*\n(?P<fenced>.*?)^```|(?P<indented>(?:(?: {4}[^\n]*)?\n)+))",
    re.DOTALL | re.MULTILINE,
)
_FIT = re.compile(r"((?:meap-lit|python -m meap_lit) fit\b[^#;\n]*)")


@dataclass(frozen=True)
class Block:
    """A block, and the line of its page that holds its marker."""

    line: int
    language: str
    text: str


def runnable_blocks(page: str) -> list[Block]:
    """Return the marked blocks of a page, in order."""
    blocks = []
    for marker in re.finditer(r"^<!--\s*run", page, re.MULTILINE):
        line = page.count("\n", 0, marker.start()) + 1
        found = _MARKER.match(page, marker.start())
        assert found, f"line {line}: not a marker, see {__name__}"
        if found["hidden"] is not None:
            blocks.append(Block(line, "bash", found["hidden"]))
            continue
        block = _BLOCK.match(page, found.end())
        text = "" if block is None else block["fenced"] or textwrap.dedent(block["indented"]).strip("\n") + "\n"
        assert text.strip(), f"line {line}: no block of code follows the marker"
        assert block is not None
        language = "python" if block["language"] == "python" else "bash"
        if found["words"] is not None:
            assert language == "bash", f"line {line}: only commands take words"
            text = _FIT.sub(rf"\1 {found['words'].strip()} ", text.replace("\\\n", " "))
        blocks.append(Block(line, language, text))
    return blocks
