"""`python -m meap_lit report`: one folder on finished runs and their evaluations."""

from collections.abc import Iterator, Sequence
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
    """Write a report on finished runs and their evaluations: report.md with figures, and the same as report.html.

    Args:
        runs: Folders of runs, or folders above them.
        evaluations: Folders that evaluate wrote to; `evaluations` by default, if it exists.
        output: Folder to write to.
        title: Title of the report.
        claims: File of the claims to test; recipes/study/claims.yaml by default, if it exists.
    """

    runs: list[str]
    evaluations: list[str] | None = None
    output: str = "report"
    title: str = "Masked and plain next-token prediction"
    claims: str | None = None

    def run(self) -> None:
        """Write the report, and print where it is and how many claims have each verdict.

        Raises:
            UserError: If a folder, a run, a result or the file of claims is missing or wrong.
        """
        folder = Path(self.output)
        is_report = all((folder / name).is_file() for name in ("report.md", "report.html"))
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not is_report):
            raise UserError(f"--output {folder} exists and is not a report; name another folder")
        tested = claims.read(self.claims)
        runs = find_runs(self.runs)
        evaluations, num_others = find_evaluations(self.evaluations, runs)
        studies = find_studies(runs)
        findings = claims.find(tested, studies, evaluations)
        blocks: list[Block] = [
            Heading(self.title, 1),
            *_opening(studies, tested, findings, num_others),
            *training.setup(studies, evaluations),
        ]
        for study in studies:
            blocks += [
                Heading(study.title),
                *training.loss_section(study),
                *training.emergence_section(study),
                *tasks.task_sections(study, evaluations),
                *tasks.ablation_section(study, evaluations),
                *tasks.variants_section(study, evaluations, tested.mask_ratios.get(study.kind)),
                *training.cost_section(study),
            ]
        blocks += claims.section(tested, findings)
        write(blocks, folder)
        print(f"{len(runs)} runs, {sum(map(len, evaluations.values()))} results")
        for verdict, count in claims.count(findings).items():
            print(f"{verdict:<24}  {count}")
        print(f"report    {folder / 'report.html'}, {folder / 'report.md'}")


def _opening(
    studies: Sequence[Study], tested: claims.Claims, findings: Sequence[claims.Finding], num_others: int
) -> Iterator[Block]:
    """Yield the scale, the verdicts in one sentence, and how to read intervals."""
    runs = [arm.any_run for study in studies for arm in study.arms]
    sizes, tokens = training.span(run.num_parameters for run in runs), training.span(run.tokens for run in runs)
    yield Paragraph(
        f"What training with masked input tokens (MEAP, {PAPER}) changed against plain next-token prediction (NTP), in "
        f"runs of {sizes} parameters on {tokens} tokens. {tested.scale}".rstrip()
    )
    if findings:
        counts = ", ".join(f"{count} {word}" for word, count in claims.count(findings).items())
        yield Paragraph(f"The paper's claims: {counts}. The last section has each with its numbers and the rule.")
    yield Paragraph(
        "Differences are arm minus baseline. Runs of equal seed are paired. For scores of items the 95% interval "
        "is a bootstrap of 10,000 draws: seeds are drawn with replacement, and items, the same ones for all "
        "seeds of a draw and those that ask the same together. For what a run has one value of, it is the t interval "
        "over seeds. The bootstrap of few seeds is narrower than it should be, since two or three seeds show little of "
        "how much seeds differ; look at the values of the seeds too."
    )
    if num_others:
        yield Paragraph(f"Left out: {num_others} results of checkpoints that belong to none of these runs.")
