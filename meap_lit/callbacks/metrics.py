"""The logged metrics of a run as a table on disk."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.loggers.logger import Logger

from meap_lit.callbacks.loggers import values_of
from meap_lit.errors import UserError
from meap_lit.files import write_file

METRICS_FILE = "curves.csv"


class Point(NamedTuple):
    """A logged value after `step` optimizer steps."""

    step: int
    value: float


class MetricsTable(Logger):
    """Append each logged value to `curves.csv` at once, as a row of optimizer steps, name and value.

    A killed run keeps all its rows. A run that resumes in the same folder logs the steps after its checkpoint again, so
    their rows are dropped. Lightning's `CSVLogger` does neither: it deletes the table that it finds in its folder.

    Args:
        folder: Folder of the run.
        step: Optimizer step at which the run starts or resumes.
    """

    name = version = None

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__()
        self._file = folder / METRICS_FILE
        kept = [row for row in _read(self._file) if row[0] <= step]
        write_file(self._file, _lines([("step", "name", "value"), *kept]))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        rows = [(step + 1, name, value) for name, value in values_of(metrics).items()]
        with open(self._file, "a", encoding="utf-8", newline="") as file:
            file.write(_lines(rows))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: config.yaml holds them."""


def read_metrics(folder: Path) -> dict[str, list[Point]]:
    """Return the points of each metric of a run by its name, in the order of the steps; empty without a table.

    Raises:
        UserError: If the table is damaged.
    """
    curves: dict[str, list[Point]] = {}
    for step, name, value in _read(folder / METRICS_FILE):
        curves.setdefault(name, []).append(Point(step, value))
    return curves


def _lines(rows: Iterable[tuple[Any, ...]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _read(file: Path) -> list[tuple[int, str, float]]:
    """Return the rows of a table, without a last line that a kill cut."""
    if not file.is_file():
        return []
    _, *lines = file.read_text(encoding="utf-8").rpartition("\n")[0].split("\n")
    try:
        return [(int(step), name, float(value)) for step, name, value in csv.reader(lines)]
    except (ValueError, csv.Error) as error:
        raise UserError(f"{file} is damaged ({error}); restore it, or move it away") from error
