"""Every marked block of code of the pages runs, in the order of its page and in a folder of its own."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documents import PAGES, REPOSITORY, runnable_blocks
from tests.support.toy_module import fork_command

MARKED = [page for page in PAGES if runnable_blocks(page.read_text(encoding="utf-8"))]
COMMANDS = {"python": [sys.executable, "-c"], "bash": ["bash", "-euo", "pipefail", "-c"]}


def commands_of(block):
    """The words of each command of a block of plain `meap-lit` commands; none if a line needs a shell."""
    lines = [line for line in block.text.replace("\\\n", " ").splitlines() if line.strip()]
    commands = [shlex.split(line.replace("python -m meap_lit", "meap-lit"), comments=True) for line in lines]
    is_plain = not re.search(r"[][$*?|;&<>`~{}]", re.sub(r"'[^']*'|\"[^\"$`]*\"|#.*", "", block.text))
    return commands if is_plain and all(command[:1] == ["meap-lit"] for command in commands) else []


def run(block, folder):
    """Run a block; in forked processes where that does, since each new one imports for seconds."""
    if block.language == "bash" and (commands := commands_of(block)):
        for command in commands:
            [status], log = fork_command(command[1:], folder=folder)
            if status:
                break
        return subprocess.CompletedProcess(command, status, log, "")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "REPOSITORY": str(REPOSITORY),
    }
    command = [*COMMANDS[block.language], block.text]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=540)


def test_the_pages_have_marked_blocks():
    assert {"transformers.md", "python.md", "preview.md"} <= {page.name for page in MARKED}


@pytest.mark.slow
@pytest.mark.parametrize("page", MARKED, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_the_marked_blocks_of_a_page_run(page, tmp_path):
    for block in runnable_blocks(page.read_text(encoding="utf-8")):
        done = run(block, tmp_path)
        assert done.returncode == 0, (
            f"{page}, line {block.line}:\n{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )


PAGE = """\
Some text.

<!-- run
touch a
-->
<!-- runnable -->
```bash
ls a
```

<!-- runnable: --budget.max_steps 4 -->

    python -m meap_lit fit --config r.yaml \\
        --seed_everything 1      # a comment
    meap-lit export --checkpoint runs/r

    meap-lit fit --config s.yaml

Text. <!-- runnable --> in a line is none.

    ls not_run

<!-- runnable -->
```python
open("a")
```
"""


def test_blocks_are_found_with_their_language_and_words():
    hidden, fenced, indented, python = runnable_blocks(PAGE)
    assert (hidden.language, hidden.text) == ("bash", "touch a\n")
    assert (fenced.language, fenced.text, fenced.line) == ("bash", "ls a\n", 6)
    first, second, empty, last = ([*line.split()] for line in indented.text.splitlines())
    assert " ".join(first) == (
        "python -m meap_lit fit --config r.yaml --seed_everything 1 --budget.max_steps 4 # a comment"
    )
    assert " ".join(second) == "meap-lit export --checkpoint runs/r"
    assert not empty
    assert " ".join(last) == "meap-lit fit --config s.yaml --budget.max_steps 4"
    assert (python.language, python.text) == ("python", 'open("a")\n')


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        (
            "meap-lit a --b 'x; y' \\\n  --c \"What?\"   # no; comment\n\npython -m meap_lit d\n",
            [["a", "--b", "x; y"], ["d"]],
        ),
        ("meap-lit a data/*\n", []),
        ('meap-lit a "$B"\n', []),
        ("for b in c; do meap-lit a; done\n", []),
        ("meap-lit a\nls\n", []),
    ],
)
def test_plain_commands_are_told_from_what_needs_a_shell(text, commands):
    [block] = runnable_blocks(f"<!-- runnable -->\n```bash\n{text}```\n")
    assert [command[1:4] for command in commands_of(block)] == commands


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- runnable --budget.max_steps 4 -->\n\n    ls\n", "line 1: not a marker"),
        ("\n<!-- runnable -->\n\nText.\n", "line 2: no block of code follows"),
        ("<!-- runnable: --a 1 -->\n```python\nf()\n```\n", "only commands take words"),
    ],
)
def test_a_wrong_marker_is_named(page, message):
    with pytest.raises(AssertionError, match=message):
        runnable_blocks(page)


def test_a_block_that_fails_is_seen(tmp_path):
    (first, second) = runnable_blocks("<!-- runnable -->\n```bash\nfalse | cat\n```\n<!-- run\ntouch made\n-->\n")
    assert run(first, tmp_path).returncode == 1
    assert run(second, tmp_path).returncode == 0
    [command] = runnable_blocks("<!-- runnable -->\n```bash\nmeap-lit prepare txt\nmeap-lit --version\n```\n")
    done = run(command, tmp_path)
    assert (done.returncode, "did you mean 'prepare text'?" in done.stdout) == (2, True)
    assert (tmp_path / "made").exists()
