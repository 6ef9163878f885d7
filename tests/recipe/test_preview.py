"""The command `preview`: rows in a terminal, in a pipe and as a page, and wrong input in one line."""

import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from meap_lit.cli import main
from meap_lit.recipe.preview import PreviewCLI

pytestmark = pytest.mark.slow

HOLD = (
    '{"class_path": "meap_lit.masking.WarmupHold", "init_args": {"mask_ratio": 0.4, "hold_off": 3, "warmup_steps": 4}}'
)


@pytest.fixture
def preview(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")

    def run(recipe, *words) -> str:
        assert main(["preview", "--config", str(recipe), *map(str, words)]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.fixture
def complain(capsys):
    def run(recipe, *words) -> str:
        assert main(["preview", "--config", str(recipe), *map(str, words)]) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    return run


def test_masks_are_marked_without_colors_in_a_pipe(preview, toy_recipe, tmp_path):
    shown = preview(toy_recipe, "--rows", 3)
    assert "\x1b" not in shown
    assert shown.count("of the run, step 0: block") == 3
    assert shown.count("[MASK]") == 3 * 4, "P = 0.15 of 32"
    assert shown.count("32 tokens, 4 masked (12.5% of 32; P = 0.15), 32 supervised") == 3
    assert max(map(len, shown.splitlines())) <= 100
    assert not (tmp_path / "runs").exists()


def test_a_pipe_that_nobody_reads_is_left_to_the_command_line(toy_recipe, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):  # for which `main` returns 141
        PreviewCLI.read(["--config", str(toy_recipe)])


def test_a_terminal_gets_colors_unless_no_color_is_set(preview, toy_recipe, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert re.search(r"\x1b\[[\d;]*45m\[MASK\]", preview(toy_recipe))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[\d;]*4\d", preview(toy_recipe))


def test_every_row_of_tokens_is_above_its_labels(preview, toy_recipe):
    lines = preview(toy_recipe, "--rows", 1, "--model.mask_ratio", 0).splitlines()
    bands = [[line for line in lines if line[6:].startswith(name)] for name in ("input", "label")]
    inputs, labels = ([cell.strip() for line in band for cell in line[14:].rstrip("│").split("│")] for band in bands)
    assert len(inputs) == 32
    assert inputs[1:] == labels[:-1]
    assert "no masks: model.mask_ratio is 0, which is plain next-token prediction" in lines


def test_a_step_before_the_masks_names_one_with_masks(preview, toy_recipe):
    shown = preview(toy_recipe, "--model.mask_ratio", HOLD)
    assert "no masks: model.mask_ratio is 0 at step 0. Its maximum is 0.4; see it with --step 7" in " ".join(
        shown.split()
    )
    assert "P = 0.4)" in preview(toy_recipe, "--model.mask_ratio", HOLD, "--step", 7)


def test_a_copy_is_below_its_original(preview, toy_sft_recipe):
    shown = preview(toy_sft_recipe, "--rows", 2)
    counts = [line for line in shown.splitlines() if "masked (" in line]
    masked, documents, padding = (
        [int(re.search(rf"(\d+) {name}", line)[1]) for line in counts] for name in ("masked", "document", "padding")
    )
    assert sum(masked) == shown.count("[MASK]") > 0
    assert sum(documents) == shown.count(", epoch 0, positions ") > 2
    assert [number for number in padding if number] == [int(n) for n in re.findall(r"(\d+) tokens of padding", shown)]
    start, stop = re.search(r"positions 0 to (\d+), masked copy at positions (\d+) to", shown).groups()
    assert int(stop) == int(start) + 1
    above = None
    for line in shown.splitlines():
        if re.match(r" +\d+ (input|copy) ", line):
            cells = line[14:].split("│")
            if " copy " in line[:14]:
                assert len(cells) == len(above)
                assert all(cell == other or cell.strip() == "[MASK]" for cell, other in zip(cells, above))
            above = cells


def test_fine_tuning_without_copies_says_why(preview, toy_sft_recipe):
    assert "no masks: data.duplication.mask_ratio is 0" in preview(toy_sft_recipe, "--data.duplication.mask_ratio", 0)
    shown = " ".join(preview(toy_sft_recipe, "--data.duplication.min_copied", 300).split())
    assert "An answer needs more than 300 tokens for it (data.duplication.min_copied)" in shown


def test_adapters_and_missing_weights_do_not_matter(preview, toy_sft_recipe, prepared, tmp_path):
    words = ["--model.lora.rank", 4, "--model.init_from", tmp_path / "not_downloaded_yet"]
    assert "[MASK]" in preview(toy_sft_recipe, *words)


def test_what_is_missing_is_prepared(preview, prepared, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {Path('recipes/quickstart.yaml').resolve()}\n")
    step = {"class_path": "meap_lit.data.prepare.text.PrepareText"}
    step["init_args"] = {
        **{"input": [str(prepared.texts)], "tokenizer": prepared.tokenizer, "num_workers": 1},
        **{"output": str(tmp_path / "dataset"), "val_share": 0.1},
    }
    words = [
        "--data.tokenizer",
        prepared.tokenizer,
        "--data.datasets",
        tmp_path / "dataset",
        "--data.preparation",
        [step],
    ]
    assert "[MASK]" in preview(recipe, *words, "--model.mask_ratio", 0.15)
    assert (tmp_path / "dataset" / "manifest.json").is_file()


class _Page(HTMLParser):
    """Collects the texts of elements by class, and the attributes that load something."""

    def __init__(self):
        super().__init__()
        self.texts, self.loaded, self.kind = [], [], None

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.kind = given.get("class")
        self.loaded += [name for name in ("src", "href") if name in given] + [tag] * (tag in ("script", "link", "img"))

    def handle_data(self, data):
        self.texts.append((self.kind, data))


def test_the_page_holds_the_rows_and_loads_nothing(preview, toy_sft_recipe, tmp_path):
    file = tmp_path / "new" / "page.html"
    assert preview(toy_sft_recipe, "--rows", 2, "--html", file) == f"preview   {file}\n"
    page = _Page()
    page.feed(file.read_text())
    assert page.loaded == []
    assert "url(" not in file.read_text()
    masked = sum(kind == "masked" and text == "[MASK]" for kind, text in page.texts)
    counts = [text for _, text in page.texts if "masked (" in text]
    assert len(counts) == 2
    assert sum(int(re.search(r"(\d+) masked", text)[1]) for text in counts) == masked > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rows", 0), "error: --rows must be at least 1, got 0"),
        (("--step", -1), "error: --step must be at least 0, got -1"),
        (("--step", 12), "error: --step must be below the 12 steps of the run, got 12"),
        (("--html", "/proc/page.html"), "error: cannot write /proc/page.html (--html): "),
        (("--row", 1), "error: unrecognized arguments: --row 1; did you mean '--rows'?"),
        (("--data.datasets", "nowhere"), "error: dataset folder nowhere does not exist"),
        (("--data.micro_batch_size", 3), "error: data.global_batch_size 8 cannot be divided by"),
    ],
)
def test_wrong_input_is_one_line(complain, toy_recipe, words, message):
    assert complain(toy_recipe, *words).startswith(message)
