"""The picture of an evaluation, and of several evaluations side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metapl.apps.reports.canvas import INK, MARGIN, PALETTE, QUIET, drawing, fitted, headed_page, lay_out, write_page
from metapl.words import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GROUPS = {  # the kinds of ImageNet-C; a panel each
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}

# Inches of a panel with its legend, how many stand beside each other, and inches of a line of the page's legend.
PANEL, HEIGHT, IN_A_ROW, LEGEND_LINE = 3.2, 4.0, 5, 0.25
MOST_NUMBERS, LEAST_ROWS = 24, 6  # bars that have room for their numbers; rows below which bars would be thick

# Shares that an evaluation may have, each with its place in ``evaluation.json``; and figures in % of AlexNet's.
SUMMARY = {
    "top-1": ("accuracy",),
    "top-5": ("top5",),
    "ReaL, several labels": ("multi_label", "accuracy"),
    "ImageNet-A, top-1": ("imagenet_a", "accuracy"),
    "ImageNet-A, top-5": ("imagenet_a", "top5"),
    "damaged pictures, mean": ("mean_corrupted_accuracy",),
    "ImageNet-C, mean": ("imagenet_c", "mean_corrupted_accuracy"),
    "ImageNet-P frames": ("imagenet_p", "accuracy"),
    "calibration error": ("expected_calibration_error",),
    "ImageNet-A calibration error": ("imagenet_a", "expected_calibration_error"),
}
RELATIVE = {
    "mCE, damaged pictures": ("mean_corruption_error",),
    "mCE, ImageNet-C": ("imagenet_c", "mean_corruption_error"),
    "mFR, ImageNet-P": ("imagenet_p", "mean_flip_rate"),
}

Places = Mapping[str, Sequence[str]]
Evaluations = Mapping[str, Mapping[str, Any]]
Panel = tuple[str, Callable[["Axes"], None]]
"""A part of the page: its title, and what draws it."""


def value_at(found: Mapping[str, Any], place: Sequence[str]) -> float | None:
    """A figure of an evaluation; None where it has none."""
    value: Any = found
    for key in place:
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def draw_robustness(path: Path, found: Mapping[str, Any], title: str) -> None:
    """Draw what ``evaluation.json`` holds: its figures, accuracy over the severity of each damage and over ε, flips."""
    panels: list[Panel] = []
    clean, chance = found.get("accuracy"), found.get("chance")
    start = {} if clean is None else {0.0: clean}
    for prefix, part in (("", found), ("ImageNet-C: ", found.get("imagenet_c", {}))):
        for group, names in GROUPS.items():
            # The pictures of ImageNet-C are not the test pictures, so their curves do not begin there.
            curves = {
                name: ({} if prefix else start) | {float(s): y for s, y in enumerate(kind["accuracy_by_severity"], 1)}
                for name in names
                if (kind := part.get("corruptions", {}).get(name))
            }
            draw = partial(_curves, curves=curves, label="severity", chance=None if prefix else chance)
            panels += [(prefix + group, draw)] if curves else []
    attacks = {name.upper(): start | _by_eps(found, name) for name in found.get("attacks", {})}
    if attacks:
        panels.append(("attack", partial(_curves, curves=attacks, label="ε, in 1/255", chance=chance)))
    _page(path, _with_bars({"": found}, {}, panels), title)


def draw_evaluations(path: Path, evaluations: Evaluations, title: str) -> None:
    """Draw several evaluations by name, side by side: figures, mean error of each damage, accuracy over ε, flips."""
    evaluations = {shown(name): found for name, found in evaluations.items()}
    kinds = [kind for names in GROUPS.values() for kind in names]
    errors: dict[str, Places] = {
        "damaged pictures: error, %": {kind: ("corruptions", kind, "error") for kind in kinds},
        "ImageNet-C: error, %": {kind: ("imagenet_c", "corruptions", kind, "error") for kind in kinds},
    }
    # An evaluation without a curve keeps its color for the others.
    colors = dict(zip(evaluations, PALETTE, strict=False))
    panels: list[Panel] = []
    for attack in sorted({attack for found in evaluations.values() for attack in found.get("attacks", {})}):
        have = {name: found for name, found in evaluations.items() if attack in found.get("attacks", {})}
        curves = {name: {0.0: found["accuracy"]} | _by_eps(found, attack) for name, found in have.items()}
        panels.append((attack.upper(), partial(_curves, curves=curves, label="ε, in 1/255", colors=colors)))
    _page(path, _with_bars(evaluations, errors, panels), title, legend=tuple(evaluations))


def _by_eps(found: Mapping[str, Any], attack: str) -> dict[float, float]:
    return {float(eps): accuracy for eps, accuracy in found["attacks"][attack].items()}


def _with_bars(evaluations: Evaluations, more: Mapping[str, Places], panels: Sequence[Panel]) -> list[Panel]:
    flips = [name for found in evaluations.values() for name in found.get("imagenet_p", {}).get("perturbations", {})]
    last: Places = {name: ("imagenet_p", "perturbations", name, "flip_probability") for name in flips}
    bars = {"in %": SUMMARY, "in % of AlexNet's": RELATIVE, **more, "ImageNet-P: flips, %": last}
    drawn: list[Panel] = [
        (title, partial(_bars, evaluations=evaluations, places=places))
        for title, places in bars.items()
        if any(value_at(found, place) is not None for found in evaluations.values() for place in places.values())
    ]
    end = len(drawn) - bool(flips)
    return [*drawn[:end], *panels, *drawn[end:]]


def _page(path: Path, panels: Sequence[Panel], title: str, legend: Sequence[str] = ()) -> None:
    from matplotlib.patches import Patch

    columns = min(len(panels), IN_A_ROW)
    rows = math.ceil(len(panels) / columns)
    # The names of bars stand beside them, in the first column and in others that have bars.
    width = max(PANEL * columns, 2 * PANEL) + 1.2
    with drawing([title, *legend]) as explanation:
        low = MARGIN + LEGEND_LINE * len(legend)
        figure = headed_page(title, explanation, width, low + HEIGHT * rows)
        lay_out(figure, low, low + HEIGHT * rows)
        places = figure.subplots(rows, columns, squeeze=False).flat
        for (name, draw), axes in zip(panels, places, strict=False):
            axes.set_title(name, fontsize=10.5, loc="left")
            axes.grid()
            draw(axes)
        for axes in places:
            axes.set_visible(False)
        colored = zip(legend, PALETTE, strict=False)
        marks = [Patch(color=color, label=fitted(name, width - 2, 9.5)) for name, color in colored]
        if marks:
            figure.legend(handles=marks, fontsize=9.5, loc="lower left", bbox_to_anchor=(0.02, 0.02))
        write_page(path, figure)


def _curves(
    axes: Axes,
    curves: Mapping[str, Mapping[float, float]],
    label: str,
    chance: float | None = None,
    colors: Mapping[str, str] | None = None,
) -> None:
    """Accuracies over a severity or ε; with ``colors`` by name, the page has a legend of its own."""
    for name, color in (colors or dict(zip(curves, PALETTE, strict=False))).items():
        points = sorted(curves.get(name, {}).items())
        if points:
            axes.plot(
                *zip(*((x, 100 * y) for x, y in points), strict=True), "o-", ms=3.5, lw=1.6, color=color, label=name
            )
    if chance is not None:
        axes.axhline(100 * chance, color=QUIET, lw=0.8, ls=":", label="chance")
    axes.set_xticks(sorted({x for curve in curves.values() for x in curve}))
    axes.set_ylim(0, 100)
    axes.set_ylabel("accuracy, %")
    axes.set_xlabel(label, loc="left")
    if colors is None:  # below the panel, where no curve can run through it
        axes.legend(fontsize=8.5, loc="upper left", bbox_to_anchor=(-0.02, -0.2), borderaxespad=0)


def _bars(axes: Axes, evaluations: Evaluations, places: Places) -> None:
    """Figures in %, a row for each and a bar for each evaluation that has it."""
    shares = places is not RELATIVE
    by_name = {name: [value_at(found, place) for found in evaluations.values()] for name, place in places.items()}
    rows = {
        name: [math.nan if value is None else (100 if shares else 1) * value for value in values]
        for name, values in by_name.items()
        if any(value is not None for value in values)
    }
    count = len(evaluations)
    thick = 0.8 / count
    for number, (values, color) in enumerate(zip(zip(*rows.values(), strict=True), PALETTE, strict=False)):
        ys = [row + (number - (count - 1) / 2) * thick for row in range(len(rows))]
        bars = axes.barh(ys, values, height=0.9 * thick, color=color)
        if len(rows) * count <= MOST_NUMBERS:
            labels = ["" if math.isnan(value) else f"{value:.1f}" for value in values]
            axes.bar_label(bars, labels, padding=3, fontsize=8.5 if count == 1 else 7.0, color=INK)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(max(len(rows), LEAST_ROWS) - 0.4, -0.6)
    axes.set_xlim(0, 1.2 * float(np.nanmax([*rows.values()], initial=1e-9)))
    if shares:  # there is nothing beyond 100 %
        axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= min(100, axes.get_xlim()[1])])
    axes.grid(visible=False, axis="y")
