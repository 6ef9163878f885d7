"""Figures of results.

The figures do not use pyplot, which keeps global state. matplotlib is imported when the first figure is drawn.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from meap_lit.evaluation.statistics import Mean
from meap_lit.evaluation.task import Plot, Record, Result, Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#F0496E", "#EBB839", "#0CD79F")
"""Colors of 0, 50 and 100% in heat maps (opencompass/opencompass, NeedleBench)."""

LINE_COLORS = ("#4C6EF5", "#F76707", "#2F9E44", "#9C36B5", "#E03131", "#0C8599", "#868E96", "#5F3DC4")

_PANELS_IN_A_ROW = 3
_MIN_TICKS, _MAX_TICKS = 3, 12
"""Above this number of x values, matplotlib chooses the ticks."""

Line = Mapping[Any, Mean]
"""Means by the values of a plot's keys, or by those of one key."""


def draw(plot: Plot, groups: Mapping[str, Sequence[Result]]) -> "Figure | None":
    """Draw a plot of results.

    Args:
        plot: What to draw.
        groups: Results by label. Those of one label are seeds: their mean is drawn, over thin lines for each of them.

    Returns:
        The figure; None if a result has no values yet.
    """
    seeds = {
        f"{label}, {name}" if name else label: [_line(plot, source, result) for result in results]
        for name, source in plot.lines.items()
        for label, results in groups.items()
    }
    if not all(line for lines in seeds.values() for line in lines):
        return None
    keys = [plot.x] if plot.y is None else [plot.x, plot.y]
    places = [_in_order(at[n] for lines in seeds.values() for line in lines for at in line) for n in range(len(keys))]
    kept = [n for n, values in enumerate(places) if len(values) > 1] or list(range(len(keys)))
    if len(kept) == 2:
        return _draw_grid(plot, groups, {label: _over_seeds(lines) for label, lines in seeds.items()}, places)
    [axis] = kept

    def project(line: Line) -> dict[Any, Mean]:
        values = {at[axis]: mean for at, mean in line.items()}
        return {x: values[x] for x in places[axis] if x in values}

    along_axis = {label: [project(line) for line in lines] for label, lines in seeds.items()}
    return _draw_lines(plot, groups, along_axis, places[axis], _axis_labels(plot)[axis])


def _draw_grid(
    plot: Plot,
    groups: Mapping[str, Sequence[Result]],
    means: Mapping[str, Line],
    places: Sequence[Sequence[Any]],
) -> "Figure":
    """Draw the means over two keys as heat maps."""
    columns, rows = places
    metric, value_label = _values_drawn(plot, groups)
    panels = {
        label if metric is None else f"{label}: {_mean(groups[label], metric):.1f}%": np.array(
            [[line[x, y].value if (x, y) in line else np.nan for x in columns] for y in rows]
        )
        for label, line in means.items()
    }
    about = ", ".join([value_label, *(f"{name} {level:.4g}" for name, level in _levels(plot, groups).items())])
    x_label, y_label = _axis_labels(plot)
    title = f"{_title(_any_result(groups))}: {about}"
    return heat_maps(panels, columns, rows, x_label=x_label, y_label=y_label, title=title)


def _draw_lines(
    plot: Plot,
    groups: Mapping[str, Sequence[Result]],
    seeds: Mapping[str, Sequence[Line]],
    places: Sequence[Any],
    x_label: str,
) -> "Figure":
    """Draw the means over one key as lines, with a thin line for each seed, or as bars if its values are names."""
    first = _any_result(groups)
    metric, value_label = _values_drawn(plot, groups)
    means = {label: _over_seeds(lines) for label, lines in seeds.items()}
    heights = {label: _heights(line) for label, line in means.items()}
    how: dict[str, Any] = {
        "x_label": x_label,
        "y_label": value_label,
        "title": ": ".join(filter(None, [_title(first), _same_everywhere(plot, first, metric or first.headline)])),
        "errors": {label: {x: mean.error for x, mean in line.items()} for label, line in means.items()},
    }
    if not _are_numbers(places):
        return bars(heights, **how)
    figure = curves(
        heights,
        levels=_levels(plot, groups),
        log_x=plot.log_x,
        faint={label: [_heights(line) for line in lines] for label, lines in seeds.items() if len(lines) > 1},
        y_range=(0, 102) if metric is not None and first.unit_of(metric) == "%" else None,
        **how,
    )
    if not plot.log_x and len(places) <= _MAX_TICKS:
        figure.axes[0].set_xticks(places)
    return figure


def _any_result(groups: Mapping[str, Sequence[Result]]) -> Result:
    return next(iter(groups.values()))[0]


def _axis_labels(plot: Plot) -> list[str]:
    return [plot.x_label or plot.x, plot.y_label or plot.y or ""]


def _values_drawn(plot: Plot, groups: Mapping[str, Sequence[Result]]) -> tuple[str | None, str]:
    """Return the first metric of a plot (None if it draws functions of the records) and the label of its values."""
    first = _any_result(groups)
    metric = next((source or first.headline for source in plot.lines.values() if isinstance(source, str)), None)
    name = metric or first.headline
    return metric, plot.value_label or f"{name} ({first.unit_of(name)})"


def _heights(line: Line) -> dict[Any, float]:
    return {x: mean.value for x, mean in line.items()}


def _title(result: Result) -> str:
    """Return the name of a task in words."""
    return result.task.title or result.task.name.replace("_", " ").capitalize()


def _line(plot: Plot, source: str | Callable[[Sequence[Record]], Values], result: Result) -> Line:
    """Return the values of one line for one result."""
    if isinstance(source, str):
        return result.table(source or None, [plot.x] if plot.y is None else [plot.x, plot.y])
    return {
        at if isinstance(at, tuple) else (at,): value if isinstance(value, Mean) else Mean(value, np.nan, 1)
        for at, value in source(result.records).items()
    }


def _levels(plot: Plot, groups: Mapping[str, Sequence[Result]]) -> dict[str, float]:
    """Return the values to compare with by name: bounds, and guessing."""
    found = {
        f"{level.replace('_', ' ')}, {label}": _mean(results, level)
        for label, results in groups.items()
        for level in plot.levels
        if results[0].scored(level)
    }
    options = _any_result(groups).options
    if plot.choices is not None and plot.choices in options:
        found["guessing"] = 100 / options[plot.choices]
    return found


def _over_seeds(lines: Sequence[Line]) -> Line:
    """Return the mean over seeds at each place of the first; a single seed keeps its standard errors over items."""
    if len(lines) == 1:
        return lines[0]
    return {at: Mean.of_seeds([line[at].value for line in lines if at in line]) for at in lines[0]}


def _mean(seeds: Sequence[Result], metric: str) -> float:
    return Mean.of(result.mean(metric).value for result in seeds).value


def _in_order(values: Iterable[Any]) -> list[Any]:
    """Return each value once: numbers ascending, names in the order of the items."""
    distinct = list(dict.fromkeys(values))
    return sorted(distinct) if _are_numbers(distinct) else distinct


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def _same_everywhere(plot: Plot, result: Result, metric: str) -> str:
    """Return what all values have in common: other keys of the cells, such as "documents 20", and options."""
    cells = [record["cell"] for record, _ in result.scored(metric)]
    others = {key: {cell[key] for cell in cells} for key in result.cell_keys if key not in (plot.x, plot.y)}
    found = {key: next(iter(values)) for key, values in others.items() if len(values) == 1}
    found |= {name: result.options[name] for name in plot.options if name in result.options}
    return ", ".join(f"{key} {label(value)}" for key, value in found.items())


def heat_maps(
    panels: Mapping[str, np.ndarray],
    columns: Sequence[Any],
    rows: Sequence[Any],
    *,
    x_label: str,
    y_label: str,
    title: str,
) -> "Figure":
    """Draw heat maps of percentages, three in a row, with one color scale from 0 to 100.

    Args:
        panels: Values in [0, 100], [num_rows, num_columns], by the title of their panel; NaN stays white.
        columns: Labels of the columns, from left to right.
        rows: Labels of the rows, from top to bottom.
        x_label: Label of the columns.
        y_label: Label of the rows.
        title: Title above all panels.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    width, height = 1.2 + 0.75 * len(columns), 1.6 + 0.45 * len(rows)
    across = min(len(panels), _PANELS_IN_A_ROW)
    down = -(-len(panels) // across)
    figure = Figure(figsize=(1.3 + width * across, height * down), layout="constrained")
    colors = LinearSegmentedColormap.from_list("retrieval", COLORS)
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.remove()
    all_axes = grid[: len(panels)]
    for number, (axes, (name, values)) in enumerate(zip(all_axes, panels.items(), strict=True)):
        image = axes.imshow(values, vmin=0, vmax=100, cmap=colors, aspect="auto")
        for row, column in np.argwhere(~np.isnan(values)):
            axes.text(column, row, f"{values[row, column]:.0f}", ha="center", va="center")
        axes.set_xticks(range(len(columns)), [label(column) for column in columns])
        axes.set_yticks(range(len(rows)), [label(row) for row in rows])
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
    title: str,
    levels: Mapping[str, float] | None = None,
    log_x: bool = False,
    y_range: tuple[float, float] | None = None,
    errors: Mapping[str, Mapping[Any, float]] | None = None,
    faint: Mapping[str, Sequence[Mapping[Any, float]]] | None = None,
) -> "Figure":
    """Draw lines over a common axis.

    Args:
        lines: Points of each line, x to y.
        x_label: Label of x.
        y_label: Label of y.
        title: Title.
        levels: Values of dashed lines, such as bounds.
        log_x: Use a logarithmic x axis, linear from 0 to 1.
        y_range: Limits of y.
        errors: Half heights of a band around each line, keyed as `lines`.
        faint: Thin lines in the color of a line, such as the seeds of a mean.
    """
    figure, axes = _one_panel(6.4, x_label, y_label, title)
    for number, (name, points) in enumerate(lines.items()):
        color = LINE_COLORS[number % len(LINE_COLORS)]
        axes.plot(list(points), list(points.values()), marker="o", markersize=4, label=name, color=color)
        if errors is not None:
            low, high = ([y + sign * errors[name][x] for x, y in points.items()] for sign in (-1, 1))
            axes.fill_between(list(points), low, high, color=color, alpha=0.15, linewidth=0)
        for thin in (faint or {}).get(name, ()):
            axes.plot(list(thin), list(thin.values()), linewidth=0.8, alpha=0.35, color=color)
    for name, level in (levels or {}).items():
        axes.axhline(level, linestyle="--", linewidth=1, color="grey")
        axes.annotate(name, (1.0, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    places = sorted({x for points in lines.values() for x in points})
    if log_x:
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set_xticks(log_ticks(places))
        axes.minorticks_off()
    axes.xaxis.set_major_formatter(_tick_label)
    if y_range is not None:
        axes.set_ylim(*y_range)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def log_ticks(values: Sequence[float]) -> list[float]:
    """Return ticks of a logarithmic axis: the values, if they are far enough apart, else round numbers among them.

    `values` are ascending and not negative.
    """
    positive = [value for value in values if value > 0]
    zero = [value for value in values if value == 0]
    if not positive:
        return zero
    if all(second >= 1.4 * first for first, second in pairwise(positive)):
        return zero + positive[:: -(-len(positive) // _MAX_TICKS)]
    low, high = positive[0], positive[-1]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 2, 5), range(1, 10), range(10, 100, 5)):
        scale = 10 if max(digits) > 9 else 1
        ticks = [digit / scale * 10.0**decade for decade in decades for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= _MIN_TICKS:
            break
    return zero + ticks


def _tick_label(value: float, _: float) -> str:
    """Return a number as a person writes it: 0.15, 4,096, 65.5k, 6.1M."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(unit, 10_000):
            return f"{value / unit:.4g}{name}"
    return f"{value:,.10g}"


def bars(
    groups: Mapping[str, Mapping[Any, float]],
    *,
    x_label: str,
    y_label: str,
    title: str,
    errors: Mapping[str, Mapping[Any, float]] | None = None,
) -> "Figure":
    """Draw bars: one color for each key of `groups` (heights, x to y), side by side at each x.

    `errors` are half lengths of error bars, keyed as `groups`; the labels are as in `curves`.
    """
    places = list(dict.fromkeys(x for heights in groups.values() for x in heights))
    figure, axes = _one_panel(max(5.0, 1.5 + 0.9 * len(places)), x_label, y_label, title)
    width = 0.8 / len(groups)
    for number, (name, heights) in enumerate(groups.items()):
        offset = (number - (len(groups) - 1) / 2) * width
        axes.bar(
            [places.index(x) + offset for x in heights],
            list(heights.values()),
            width,
            yerr=None if errors is None else [errors[name][x] for x in heights],
            label=name,
            color=LINE_COLORS[number % len(LINE_COLORS)],
        )
    axes.set_xticks(range(len(places)), [label(place) for place in places])
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _one_panel(width: float, x_label: str, y_label: str, title: str) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title)
    return figure, axes


def label(value: Any) -> str:
    """Return the value of a key of the cells as text."""
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
