"""The figure of an ablation. Only a call that draws imports matplotlib."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from metapl.ablation.mode_cost import ModeCost
from metapl.errors import needed_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Modes = Mapping[str, ModeCost | str]

# Inches. At 4 inches and 100 dots an inch the figure is 400 pixels wide, and its smallest letters
# are 11 pixels high.
WIDTH = 4.0
ROW_OF_DISTANCES = 0.30
ROW_OF_COSTS = 0.27
MARGINS = 1.55

# The size of letters, in points.
LETTERS = 8.0

# Points of the training have colors that the color-blind can tell apart (Okabe and Ito), and marks
# of their own.
POINT_COLORS = ("#0072b2", "#e69f00", "#009e73")
POINT_MARKS = ("o", "s", "^")

# The colors of bars, and that of what is said in passing.
RECOMMENDED = "#0072b2"
OTHER = "#9db8cc"
CONTROL = "#d0d0d0"
QUIET = "#666666"

# Errors are drawn on a logarithmic scale that is linear below this, so that 0 has a place.
LINEAR_BELOW = 1e-4

# The letters of a mode's name in one line.
LONGEST_LINE = 12


def draw_modes(
    modes: Modes, altered: Modes, points: Sequence[int], recommended: str | None
) -> Figure:
    """Draw distances by mode and point, and below them the costs by mode.

    The controls come last.
    """
    with needed_for("the figure of an ablation"):
        from matplotlib.figure import Figure

    rows = {**modes, **altered}
    heights = (ROW_OF_DISTANCES * len(rows), ROW_OF_COSTS * len(rows))
    figure = Figure((WIDTH, sum(heights) + MARGINS), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=heights)

    distances = figure.add_subplot(grid[0, :])
    _draw_distances(distances, rows, points)
    _name_rows(distances, rows, altered=altered, recommended=recommended)
    distances.set_title("error, over the exact gradient's length", fontsize=LETTERS + 1, loc="left")
    distances.set_xlabel("lines reach to the error of one draw", fontsize=LETTERS, color=QUIET)

    first_panel = figure.add_subplot(grid[1, 0])
    _name_rows(first_panel, rows, altered=altered, recommended=recommended)
    other_panels = [figure.add_subplot(grid[1, column], sharey=first_panel) for column in (1, 2)]
    colors = {name: _color(name, altered, recommended) for name in rows}
    costs_by_title = _costs(rows)
    panels = [first_panel, *other_panels]
    for axes, (title, values) in zip(panels, costs_by_title.items(), strict=True):
        _draw_costs(axes, rows, values=values, colors=colors)
        axes.set_title(title, fontsize=LETTERS + 1, loc="left")
    for axes in other_panels:
        axes.tick_params(left=False, labelleft=False)
    return figure


def _draw_distances(axes: Axes, rows: Modes, points: Sequence[int]) -> None:
    """Draw a mark for each mode and point, the points of a mode below one another."""
    offsets = [0.26 * (number - (len(points) - 1) / 2) for number in range(len(points))]
    for number, (point, offset) in enumerate(zip(points, offsets, strict=True)):
        color = POINT_COLORS[number % len(POINT_COLORS)]
        mark = POINT_MARKS[number % len(POINT_MARKS)]
        places: list[float] = []
        errors: list[float] = []
        errors_of_one_draw: list[float] = []
        for place, mode in enumerate(rows.values()):
            if isinstance(mode, ModeCost) and number < len(mode.by_point):
                distance = mode.by_point[number]
                places.append(place + offset)
                errors.append(distance.relative_error)
                errors_of_one_draw.append(distance.of_one_draw)
        axes.hlines(places, errors, errors_of_one_draw, color=color, linewidth=1.2)
        axes.plot(errors, places, mark, color=color, markersize=4, label=f"step {point:,}")
    axes.set_xscale("symlog", linthresh=LINEAR_BELOW, linscale=0.5)
    largest = max([1.0, *_finite(mode.of_one_draw for mode in _that_ran(rows).values())])
    first_decade = round(math.log10(LINEAR_BELOW))
    last_decade = math.ceil(math.log10(largest))
    ticks = [0.0, *(10.0**decade for decade in range(first_decade, last_decade + 1))]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlim(-LINEAR_BELOW / 3, 2 * largest)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="0.9")
    for place, mode in enumerate(rows.values()):
        if isinstance(mode, str):
            axes.text(
                0.0, place, "cannot run on this model", va="center", fontsize=LETTERS, color=QUIET
            )
    if len(points) > 1:
        axes.legend(
            loc="lower center",
            bbox_to_anchor=(0.4, 1.07),
            ncols=len(points),
            fontsize=LETTERS,
            frameon=False,
            handletextpad=0.1,
            columnspacing=1.0,
        )


def _costs(rows: Modes) -> dict[str, dict[str, float]]:
    """Return what is drawn of each cost by mode, by the title of its panel.

    These are passes, seconds and memory, in units that fit.
    """
    ran = _that_ran(rows)
    longest = max(_finite(mode.seconds for mode in ran.values()), default=0.0)
    largest = max(_finite(mode.peak_bytes for mode in ran.values()), default=0.0)
    time_unit, time_scale = ("s", 1.0) if longest >= 1 else ("ms", 1e3)
    if largest >= 1e9:
        memory_unit = "GB"
        memory_scale = 1e-9
    elif largest >= 1e6:
        memory_unit = "MB"
        memory_scale = 1e-6
    else:
        memory_unit = "KB"
        memory_scale = 1e-3
    return {
        "passes a call": {name: mode.passes for name, mode in ran.items()},
        f"time, {time_unit}": {name: time_scale * mode.seconds for name, mode in ran.items()},
        f"peak, {memory_unit}": {
            name: memory_scale * mode.peak_bytes for name, mode in ran.items()
        },
    }


def _draw_costs(
    axes: Axes, rows: Modes, values: Mapping[str, float], colors: Mapping[str, str]
) -> None:
    """Draw a bar for each mode that ran, with its number behind it."""
    places = {name: place for place, name in enumerate(rows)}
    largest = max(_finite(values.values()), default=1.0)
    for name, value in values.items():
        if math.isfinite(value):
            axes.barh(places[name], value, color=colors[name], height=0.7)
            number = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            axes.text(value + 0.04 * largest, places[name], number, va="center", fontsize=LETTERS)
    # The numbers stand behind the bars, and need room.
    axes.set_xlim(0, 1.6 * largest)
    axes.tick_params(bottom=False, labelbottom=False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _name_rows(axes: Axes, rows: Modes, altered: Modes, recommended: str | None) -> None:
    """Name the rows, the first on top; the recommended mode in bold, the controls in grey."""
    axes.set_yticks(
        range(len(rows)), [_in_lines(name) for name in rows], fontsize=LETTERS, linespacing=0.95
    )
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(left=False, labelsize=LETTERS)
    for label, name in zip(axes.get_yticklabels(), rows, strict=True):
        if name == recommended:
            label.set_fontweight("bold")
        if name in altered:
            label.set_color(QUIET)
    if altered and len(rows) > len(altered):
        axes.axhline(len(rows) - len(altered) - 0.5, color="0.7", linewidth=0.8)


def _in_lines(name: str) -> str:
    """Return a mode's name, in two lines if it is long.

    It is broken at the underscore that is nearest to its middle.

    >>> _in_lines("reinforce_per_example"), _in_lines("unrolled")
    ('reinforce_\\nper_example', 'unrolled')
    """
    breaks = [place + 1 for place, letter in enumerate(name) if letter == "_"]
    if len(name) <= LONGEST_LINE or not breaks:
        return name
    middle = min(breaks, key=lambda place: abs(place - len(name) / 2))
    return f"{name[:middle]}\n{name[middle:]}"


def _color(name: str, altered: Modes, recommended: str | None) -> str:
    if name == recommended:
        return RECOMMENDED
    return CONTROL if name in altered else OTHER


def _that_ran(rows: Modes) -> dict[str, ModeCost]:
    return {name: mode for name, mode in rows.items() if isinstance(mode, ModeCost)}


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
