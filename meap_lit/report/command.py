"""`python -m meap_lit report`: one folder that says what finished runs and evaluations found."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meap_lit.errors import UserError
from meap_lit.report import claims, tasks, training
from meap_lit.report.arms import Study, find_studies
from meap_lit.report.blocks import Block, Heading, Paragraph, write
from meap_lit.report.evaluations import find_evaluations
from meap_lit.report.runs import find_runs

PAPER = "arXiv 2502.07490"


@dataclass(kw_only=True)
class Report:
    """Write what finished runs and their evaluations found: report.md with figures, and the same as report.html.

    Args:
        runs: Folders of runs, or folders above them.
        evaluations: Folders that evaluate wrote to; `evaluations`, if it is there, if not given.
        output: Folder to write to.
        title: Of the report.
    """

    runs: list[str]
    evaluations: list[str] | None = None
    output: str = "report"
    title: str = "Masked and plain next-token prediction"

    def run(self) -> None:
        """Print where the report lies and how many claims have which verdict.

        Raises:
            UserError: If a folder, a run or a result is not what a report can be made of.
        """
        folder = Path(self.output)
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "report.md").is_file()):
            raise UserError(f"--output {folder} is there already and is no report; name another folder")
        runs = find_runs(self.runs)
        evaluations, num_others = find_evaluations(self.evaluations, runs)
        studies = find_studies(runs)
        findings = claims.find(studies, evaluations)
        blocks = [
            Heading(self.title, 1),
            *_opening(studies, findings, num_others),
            *training.setup(studies, evaluations),
        ]
        for study in studies:
            blocks += [
                Heading(study.title),
                *training.loss_section(study),
                *training.emergence_section(study),
                *tasks.task_sections(study, evaluations),
                *tasks.ablation_section(study, evaluations),
                *tasks.variants_section(study, evaluations),
                *training.cost_section(study),
            ]
        blocks += claims.section(findings)
        write(blocks, folder)
        print(f"{len(runs)} runs, {sum(map(len, evaluations.values()))} results")
        for verdict, count in _counted(findings).items():
            print(f"{verdict:<24}  {count}")
        print(f"report    {folder / 'report.html'}, {folder / 'report.md'}")


def _counted(findings: Sequence[claims.Finding]) -> dict[str, int]:
    words = (claims.NOT_TESTED, claims.NOT_SUPPORTED, claims.SUPPORTED)
    found = Counter(next(word for word in words if word in finding.verdict) for finding in findings)
    return {word: found[word] for word in reversed(words)}


def _opening(studies: Sequence[Study], findings: Sequence[claims.Finding], num_others: int) -> list[Block]:
    """Scale, verdicts in one sentence, how to read intervals."""
    sizes = [arm.any_run.num_parameters or 0 for study in studies for arm in study.arms]
    tokens = [arm.any_run.tokens for study in studies for arm in study.arms]
    counts = ", ".join(f"{count} {word}" for word, count in _counted(findings).items())
    blocks: list[Block] = [
        Paragraph(
            f"What training with masked input tokens (MEAP, {PAPER}) changed against plain next-token prediction "
            f"(NTP), in runs of {_span(sizes)} parameters on {_span(tokens)} tokens. The paper pretrains 1.1B "
            f"parameters on up to 200B tokens and fine-tunes models of 3B to 14B: nothing here says what happens at "
            f"that scale."
        ),
        Paragraph(f"The paper's claims: {counts}. The last section has each with its numbers and the rule."),
        Paragraph(
            "Differences are arm minus baseline. Runs of equal seed are paired. For scores of items the 95% interval "
            "is a bootstrap of 10,000 draws: seeds are drawn with replacement, and within each of them the items, "
            "those that ask the same together. For what a run has one value of, it is the t interval over seeds. The "
            "bootstrap of few seeds is narrower than it should be, since two or three seeds show little of how much "
            "seeds differ; look at the values of the seeds too."
        ),
    ]
    if num_others:
        blocks.append(Paragraph(f"Left out: {num_others} results of checkpoints that are of none of these runs."))
    return blocks


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
