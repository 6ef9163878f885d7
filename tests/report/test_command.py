import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from meap_lit.cli import main
from tests.conftest import TOY_RECIPE
from tests.support.toy_study import recipe, write_run

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Trained:
    """Folders of runs and evaluations that the commands made."""

    runs: Path
    evaluations: Path


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory) -> Trained:
    """Two arms with two seeds each, trained for six steps and evaluated."""
    folder = tmp_path_factory.mktemp("study")
    runs, evaluations, config = folder / "runs", folder / "evaluations", folder / "toy.yaml"
    config.write_text(TOY_RECIPE.format(dataset=prepared.dataset, tokenizer=prepared.tokenizer, runs=runs))
    for seed in (1, 2):
        for ratio in ("0.0", "0.15"):
            options = ["--seed_everything", str(seed), "--model.mask_ratio", ratio, "--budget.max_steps", "6"]
            name = ["--trainer.logger.init_args.name", f"p{ratio}_s{seed}"]
            assert main(["fit", "--config", str(config), *options, *name]) == 0
        pair = [str(runs / f"p{ratio}_s{seed}") for ratio in ("0.0", "0.15")]
        task = ["--task.dataset", prepared.dataset, "--task.seq_len", "16", "--task.num_sequences", "4"]
        out = ["--output", str(evaluations), "--checkpoint", *pair]
        assert main(["evaluate", "--config", "recipes/eval/attention.yaml", *task, *out]) == 0
    return Trained(runs, evaluations)


@pytest.fixture(scope="module")
def report(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "report"
    arguments = ["--runs", str(trained.runs), "--evaluations", str(trained.evaluations), "--output", str(folder)]
    assert main(["report", *arguments]) == 0
    assert main(["report", *arguments]) == 0  # in place of the earlier one
    return folder


def test_report_of_real_runs(report, prepared):
    text = (report / "report.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("#")]
    for heading in (
        "## Setup",
        "### Validation loss over tokens",
        "### attention",
        "### Cost",
        "## The paper's claims",
    ):
        assert heading in headings
    assert re.search(r"\| p0.0 \| the baseline \| [\d,]+ \| 1,536 \| 1, 2 \|", text)
    assert re.search(r"\| p0.15 \| mask_ratio 0.15 \| [\d,]+ \| 1,536 \| 1, 2 \|", text)
    assert re.search(r"\| decay \(%\) \| p0.15 \| .* \| 1: .*, 2: .* \| [+-]\d+.\d+ \\\[", text)
    assert "attention: " in text.partition("## The paper's claims")[2]
    assert "not recorded" not in text
    assert "lightning" in text
    assert "no longer there" not in text


def test_no_path_of_this_machine_is_in_it(report, prepared, trained):
    for name in ("report.md", "report.html"):
        text = (report / name).read_text()
        for path in (prepared.dataset, str(trained.runs), str(Path.cwd()), f"{tempfile.gettempdir()}/"):
            assert path not in text


def test_every_figure_is_there_and_shown(report):
    text, page = (report / "report.md").read_text(), (report / "report.html").read_text()
    figures = re.findall(r"!\[[^\]]*\]\((figures/[^)]+)\)", text)
    assert len(figures) == len(list((report / "figures").iterdir())) == page.count("<img ") >= 2
    for figure in figures:
        assert (report / figure).read_bytes().startswith(b"\x89PNG")


def test_tables_of_both_forms_have_the_same_cells(report):
    text, page = (report / "report.md").read_text(), (report / "report.html").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    assert len(rows) == page.count("<tr>") > 20


def test_what_is_printed(trained, tmp_path, capsys):
    assert main(["report", "--runs", str(trained.runs), "--output", str(tmp_path / "r")]) == 0
    printed = capsys.readouterr().out
    assert "4 runs, 0 results" in printed
    assert re.search(r"not tested at this scale +\d+", printed)


def test_wrong_input_is_one_line(tmp_path, capsys):
    def complain(*arguments):
        assert main(["report", *arguments]) == 2
        return capsys.readouterr().err.splitlines()

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    write_run(tmp_path / "runs/a", recipe("a", 1, 0.15))
    runs = ["--runs", str(tmp_path / "runs")]
    (line,) = complain(*runs, "--output", str(tmp_path / "taken"))
    assert line.endswith("taken exists and is not a report; name another folder")
    (tmp_path / "taken/report.md").touch()  # of the user
    (line,) = complain(*runs, "--output", str(tmp_path / "taken"))
    assert line.endswith("taken exists and is not a report; name another folder")
    (line,) = complain(*runs, "--output", str(tmp_path / "new"))
    assert line.startswith("error: no baseline (model.mask_ratio 0)")
    assert not (tmp_path / "new").exists()
    (line,) = complain(*runs, "--claims", str(tmp_path / "none.yaml"))
    assert line.startswith(f"error: cannot read --claims {tmp_path / 'none.yaml'}: No such file")
    (line,) = complain("--runs", str(tmp_path / "taken"))
    assert line.startswith(f"error: no run found under --runs {tmp_path / 'taken'}")


def test_runs_and_results_moved_elsewhere_without_their_checkpoints_give_the_same_report(trained, report, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(trained.runs, moved / "runs", ignore=shutil.ignore_patterns("checkpoints", "events.*"))
    shutil.copytree(trained.evaluations, moved / "evaluations")
    away = trained.runs.rename(trained.runs.with_name("away"))
    try:
        words = ["--runs", str(moved / "runs"), "--evaluations", str(moved / "evaluations")]
        assert main(["report", *words, "--output", str(tmp_path / "report")]) == 0
    finally:
        away.rename(trained.runs)
    assert (tmp_path / "report/report.md").read_text() == (report / "report.md").read_text()
