"""Pictures of results. No pyplot, hence no global state; matplotlib is imported when the first is drawn."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#F0496E", "#EBB839", "#0CD79F")
"""0, 50 and 100% in heat maps of retrieval (opencompass/opencompass, NeedleBench)."""

LINES = ("#4C6EF5", "#F76707", "#2F9E44", "#9C36B5", "#E03131", "#0C8599", "#868E96", "#5F3DC4")

_PANELS_IN_A_ROW = 3


def heat_maps(
    panels: Mapping[str, np.ndarray],
    columns: Sequence[Any],
    rows: Sequence[Any],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
) -> "Figure":
    """Heat maps of percentages side by side, three in a row, all from 0 to 100.

    Args:
        panels: Values in [0, 100] under the title of each panel, [num_rows, num_columns]; NaN stays white.
        columns: What the columns stand for, from left to right.
        rows: What the rows stand for, from top to bottom.
        x_label: Of the columns.
        y_label: Of the rows.
        title: Above all panels.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    width, height = 1.2 + 0.75 * len(columns), 1.6 + 0.45 * len(rows)
    across = min(len(panels), _PANELS_IN_A_ROW)
    down = -(-len(panels) // across)
    figure = Figure(figsize=(1.3 + width * across, height * down), layout="constrained")
    colours = LinearSegmentedColormap.from_list("retrieval", COLOURS)
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.remove()
    all_axes = grid[: len(panels)]
    for number, (axes, (name, values)) in enumerate(zip(all_axes, panels.items(), strict=True)):
        image = axes.imshow(values, vmin=0, vmax=100, cmap=colours, aspect="auto")
        for row, column in np.argwhere(~np.isnan(values)):
            axes.text(column, row, f"{values[row, column]:.0f}", ha="center", va="center")
        axes.set_xticks(range(len(columns)), [_label(column) for column in columns])
        axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
        axes.set_xlabel(x_label)
        if number % across == 0:
            axes.set_ylabel(y_label)
        axes.set_title(name)
    figure.colorbar(image, ax=list(all_axes), label="%")
    if title:
        figure.suptitle(title)
    return figure


def curves(
    lines: Mapping[str, Mapping[Any, float]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    levels: Mapping[str, float] | None = None,
    log_x: bool = False,
    y_range: tuple[float, float] | None = None,
    faint: Mapping[str, Sequence[Mapping[Any, float]]] | None = None,
) -> "Figure":
    """Lines over a common axis.

    Args:
        lines: For each line its points, x to y.
        x_label: Of x.
        y_label: Of y.
        title: Above.
        levels: Values to draw as dashed lines, such as bounds.
        log_x: Logarithmic x.
        y_range: Limits of y.
        faint: Thin lines in the colour of a line, such as the seeds that it is the mean of.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(lines.items()):
        colour = LINES[number % len(LINES)]
        axes.plot(list(points), list(points.values()), marker="o", markersize=4, label=name, color=colour)
        for thin in (faint or {}).get(name, ()):
            axes.plot(list(thin), list(thin.values()), linewidth=0.8, alpha=0.35, color=colour)
    for name, level in (levels or {}).items():
        axes.axhline(level, linestyle="--", linewidth=1, color="grey")
        axes.annotate(name, (1.0, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    if log_x:
        axes.set_xscale("log", base=2)
    if y_range is not None:
        axes.set_ylim(*y_range)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def bars(
    groups: Mapping[str, Mapping[Any, float]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    errors: Mapping[str, Mapping[Any, float]] | None = None,
) -> "Figure":
    """Grouped bars: one colour for each key of `groups`, side by side at each x.

    Args:
        groups: For each colour its heights, x to y.
        x_label: Of x.
        y_label: Of y.
        title: Above.
        errors: Half lengths of error bars, keyed as `groups`.
    """
    from matplotlib.figure import Figure

    places = list(dict.fromkeys(x for heights in groups.values() for x in heights))
    figure = Figure(figsize=(max(5.0, 1.5 + 0.9 * len(places)), 4.0), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(groups)
    for number, (name, heights) in enumerate(groups.items()):
        offset = (number - (len(groups) - 1) / 2) * width
        axes.bar(
            [places.index(x) + offset for x in heights],
            list(heights.values()),
            width,
            yerr=None if errors is None else [errors[name][x] for x in heights],
            label=name,
            color=LINES[number % len(LINES)],
        )
    axes.set_xticks(range(len(places)), [_label(place) for place in places])
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _label(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
