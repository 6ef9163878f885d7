"""`meap-lit preview`: show the first rows of training as the model gets them."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from meap_lit.errors import NO_SPACE, UserError, check_range
from meap_lit.files import write_file
from meap_lit.modules import MEAPFineTuning, MEAPPretraining
from meap_lit.preview.page import page
from meap_lit.preview.rows import rows_of_step, why_unmasked
from meap_lit.preview.text import LEGEND_OF_LINES, lines_of_row
from meap_lit.recipe.cli import MODULES
from meap_lit.recipe.dry_run import DryRunCLI


@dataclass(frozen=True)
class PreviewOptions:
    """What to show.

    Args:
        rows: Rows to show, from the first of the step on.
        step: Optimizer step, counted from 0, whose rows and masks to show.
        html: File of one HTML page to write instead of printing the rows.
    """

    rows: int = 2
    step: int = 0
    html: str | None = None

    def __post_init__(self) -> None:
        check_range("--rows", self.rows, "[1, inf)")
        check_range("--step", self.step, "[0, inf)")


class PreviewCLI(DryRunCLI):
    """Read a recipe as `fit` does, prepare its data if it is missing, and show the first rows of a step."""

    name = "preview"
    description = "Show the first rows of training as the model gets them, token by token."
    example = "[--rows N] [--step S] [--html FILE]"
    options_class = PreviewOptions

    def start(self) -> None:
        """Prepare the data if it is missing, and show the rows.

        Raises:
            UserError: If the step is not in the run, or the data or the file cannot be used.
        """
        model, data, options = self.parts.model, self.parts.data, self.options
        data.prepare_data()
        data.setup("fit")
        if isinstance(model, MEAPPretraining):
            model.prepare_masks(data)
        elif not isinstance(model, MEAPFineTuning):
            raise UserError(
                f"model.class_path {type(model).__name__}: preview knows the masks of "
                f"{' and '.join(kind.__name__ for kind in MODULES.values())} only"
            )
        max_steps = self.parts.budget.steps(data)
        if options.step >= max_steps:
            raise UserError(f"--step must be below the {max_steps:,} steps of the run, got {options.step}")
        rows = rows_of_step(model, data, step=options.step, max_steps=max_steps, num_rows=options.rows)
        note = None if any(row.num_masked for row in rows) else why_unmasked(model, data, options.step, max_steps)
        if options.html is not None:
            _write(Path(options.html), page(rows, note))
            print(f"preview   {options.html}")
            return
        console = _Console(highlight=False)
        console.print(LEGEND_OF_LINES, style="dim")
        for row in rows:
            console.print()
            for line in lines_of_row(row, console.width):
                console.print(line, soft_wrap=True)
        if note is not None:
            console.print(f"\n{note}", style="bold")


class _Console(Console):
    """Console that raises `BrokenPipeError`, so that `main` sets the exit status; rich exits with status 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, text)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise UserError(f"cannot write {file} (--html): {error.strerror}; name another file") from error
