"""`meap-lit preview`: show the first rows of training as the model gets them."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from jsonargparse import Namespace
from rich.console import Console

from meap_lit.data.datamodule import StreamingData
from meap_lit.errors import NO_SPACE, UserError, check_range
from meap_lit.files import write_file
from meap_lit.modules import MEAPFineTuning, MEAPPretraining
from meap_lit.preview.page import page
from meap_lit.preview.rows import rows_of_step, why_unmasked
from meap_lit.preview.text import LEGEND_OF_LINES, lines_of_row
from meap_lit.recipe.cli import KEYS, MODULES, RecipeCLI, check_pair
from meap_lit.recipe.parser import Parser


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


class PreviewCLI(RecipeCLI):
    """Read a recipe as `fit` does, prepare its data if it is missing, and show the first rows of a step.

    Neither the model nor a Trainer is built.
    """

    keys = {**KEYS, **dict.fromkeys(f.name for f in dataclasses.fields(PreviewOptions))}

    @classmethod
    def read(cls, arguments: list[str]) -> Self:
        """Show the rows for the words after `preview`.

        Raises:
            UserError: If the recipe, an override or an option is wrong.
        """
        return cls.run(["fit", *arguments])

    def make_parser(self) -> Parser:
        parser = super().make_parser()
        parser.prog = "python -m meap_lit preview"
        parser.description = "Show the first rows of training as the model gets them, token by token."
        parser.usage = (
            "python -m meap_lit preview --config RECIPE [--config OVERLAY ...] [--rows N] [--step S] [--html FILE] "
            "[--KEY VALUE ...]"
        )
        parser.add_class_arguments(PreviewOptions, as_group=False)
        return parser

    def build(self) -> None:
        """Build the recipe's module, data and budget; none of them reads anything yet."""
        recipe = self.config
        self.options = PreviewOptions(**{f.name: recipe[f.name] for f in dataclasses.fields(PreviewOptions)})
        parts = self.parser.instantiate(Namespace(model=recipe.model, data=recipe.data, budget=recipe.budget))
        self.model, self.datamodule, self.budget = parts.model, parts.data, parts.budget
        check_pair(self.model, self.datamodule)

    def start(self) -> None:
        """Prepare the data if it is missing, and show the rows.

        Raises:
            UserError: If the step is not in the run, or the data or the file cannot be used.
        """
        data, options = self.datamodule, self.options
        assert isinstance(data, StreamingData)
        data.prepare_data()
        data.setup("fit")
        if isinstance(self.model, MEAPPretraining):
            self.model.prepare_masks(data)
        elif not isinstance(self.model, MEAPFineTuning):
            raise UserError(
                f"model.class_path {type(self.model).__name__}: preview knows the masks of "
                f"{' and '.join(kind.__name__ for kind in MODULES.values())} only"
            )
        max_steps = self.budget.steps(data)
        if options.step >= max_steps:
            raise UserError(f"--step must be below the {max_steps:,} steps of the run, got {options.step}")
        rows = rows_of_step(self.model, data, step=options.step, max_steps=max_steps, num_rows=options.rows)
        note = None if any(row.num_masked for row in rows) else why_unmasked(self.model, data, options.step, max_steps)
        if options.html is not None:
            _write(Path(options.html), page(rows, note))
            print(f"preview   {options.html}")
            return
        console = Console(highlight=False)
        console.print(LEGEND_OF_LINES, style="dim")
        for row in rows:
            console.print()
            for line in lines_of_row(row, console.width):
                console.print(line, soft_wrap=True)
        if note is not None:
            console.print(f"\n{note}", style="bold")


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, text)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise UserError(f"cannot write {file} (--html): {error.strerror}; name another file") from error
