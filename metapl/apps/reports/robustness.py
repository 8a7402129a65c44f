"""The picture of an evaluation, and of several evaluations side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metapl.apps.reports.canvas import drawing, headed_page, lay_out, write_page
from metapl.apps.reports.style import INK, MARGIN, PALETTE, QUIET
from metapl.apps.reports.text import fitted
from metapl.words import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
"""The kinds of ImageNet-C; a panel each."""

Curves = dict[str, dict[float, float]]
"""Accuracies by severity or ε, by name."""

PANEL, HEIGHT, IN_A_ROW, LEGEND_LINE = 3.2, 4.0, 5, 0.25
"""Inches of a panel with its legend, how many stand beside each other, and inches of a line of the page's legend."""

MOST_NUMBERS, LEAST_ROWS = 24, 6
"""Bars that have room for their numbers; rows below which bars would be thick."""

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
"""Shares that an evaluation may have, each with its place in ``evaluation.json``."""

RELATIVE = {
    "mCE, damaged pictures": ("mean_corruption_error",),
    "mCE, ImageNet-C": ("imagenet_c", "mean_corruption_error"),
    "mFR, ImageNet-P": ("imagenet_p", "mean_flip_rate"),
}
"""Figures in % of AlexNet's, likewise."""


def value_at(found: Mapping[str, Any], place: Sequence[str]) -> float | None:
    """A figure of an evaluation; None where it has none."""
    value: Any = found
    for key in place:
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


Panel = tuple[str, Callable[["Axes"], None] | None]
"""A part of the page: its title, and what draws it; None where there is nothing to show."""


def draw_robustness(path: Path, found: Mapping[str, Any], title: str) -> None:
    """Draw what an evaluation found: its figures, accuracy over the severity of each damage and over ε, and flips.

    Args:
        path: of the PNG, replaced as a whole.
        found: what ``evaluation.json`` holds.
        title: a line above.
    """
    panels: list[Panel] = [
        ("in %", _bars_of({"": found}, SUMMARY)),
        ("in % of AlexNet's", _bars_of({"": found}, RELATIVE)),
    ]
    for prefix, part in (("", found), ("ImageNet-C: ", found.get("imagenet_c", {}))):
        corruptions = part.get("corruptions", {})
        for group, names in GROUPS.items():
            curves: Curves = {
                name: dict(enumerate(corruptions[name]["accuracy_by_severity"], 1))
                for name in names
                if name in corruptions
            }
            if curves:
                # The pictures of ImageNet-C are not the test pictures, so their curves do not begin there.
                clean, chance = (None, None) if prefix else (found.get("accuracy"), found.get("chance"))
                panels.append((prefix + group, _curves(curves, "severity", clean, chance)))
    attacks: Curves = {
        name.upper(): {float(eps): accuracy for eps, accuracy in by_eps.items()}
        for name, by_eps in found.get("attacks", {}).items()
    }
    if attacks:
        panels.append(("attack", _curves(attacks, "ε, in 1/255", found.get("accuracy"), found.get("chance"))))
    flips = _flips(found)
    panels.append(("ImageNet-P: flips, %", _bars_of({"": flips}, {name: (name,) for name in flips})))
    _page(path, panels, title)


def draw_evaluations(path: Path, evaluations: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Draw several evaluations side by side: their figures, the mean error of each damage, accuracy over ε, and flips.

    Args:
        path: of the PNG, replaced as a whole.
        evaluations: what ``evaluation.json`` holds, by a name.
        title: a line above.
    """
    evaluations = {shown(name): found for name, found in evaluations.items()}
    panels: list[Panel] = [
        ("in %", _bars_of(evaluations, SUMMARY)),
        ("in % of AlexNet's", _bars_of(evaluations, RELATIVE)),
    ]
    for name, place in (("damaged pictures", ("corruptions",)), ("ImageNet-C", ("imagenet_c", "corruptions"))):
        kinds = {kind: (*place, kind, "error") for names in GROUPS.values() for kind in names}
        panels.append((f"{name}: error, %", _bars_of(evaluations, kinds)))
    colors = dict(zip(evaluations, PALETTE, strict=False))
    attacks = sorted({attack for found in evaluations.values() for attack in found.get("attacks", {})})
    for attack in attacks:
        curves: Curves = {
            name: {0.0: found["accuracy"]} | {float(eps): value for eps, value in found["attacks"][attack].items()}
            for name, found in evaluations.items()
            if attack in found.get("attacks", {})
        }
        panels.append((attack.upper(), _curves(curves, "ε, in 1/255", None, None, colors)))
    flips = {name: _flips(found) for name, found in evaluations.items()}
    named = {name: (name,) for found in flips.values() for name in found}
    panels.append(("ImageNet-P: flips, %", _bars_of(flips, named)))
    _page(path, panels, title, legend=tuple(evaluations))


def _bars_of(
    evaluations: Mapping[str, Mapping[str, Any]], places: Mapping[str, Sequence[str]]
) -> Callable[[Axes], None] | None:
    if all(value_at(found, place) is None for found in evaluations.values() for place in places.values()):
        return None
    return lambda axes: _bars(axes, evaluations, places)


def _page(path: Path, panels: Sequence[Panel], title: str, legend: Sequence[str] = ()) -> None:
    from matplotlib.patches import Patch

    drawn = [(name, draw) for name, draw in panels if draw is not None]
    columns = min(len(drawn), IN_A_ROW)
    rows = math.ceil(len(drawn) / columns)
    # The names of bars stand beside them, in the first column and in others that have bars.
    width = max(PANEL * columns, 2 * PANEL) + 1.2
    with drawing([title, *legend]) as explanation:
        low = MARGIN + LEGEND_LINE * len(legend)
        figure = headed_page(title, explanation, width, low + HEIGHT * rows)
        lay_out(figure, low, low + HEIGHT * rows)
        places = figure.subplots(rows, columns, squeeze=False).flat
        for (name, draw), axes in zip(drawn, places, strict=False):
            axes.set_title(name, fontsize=10.5, loc="left")
            axes.grid()
            draw(axes)
        for axes in places:
            axes.set_visible(False)
        marks = [
            Patch(color=color, label=fitted(name, width - 2, 9.5)) for name, color in zip(legend, PALETTE, strict=False)
        ]
        if marks:
            figure.legend(handles=marks, fontsize=9.5, loc="lower left", bbox_to_anchor=(0.02, 0.02))
        write_page(path, figure)


def _flips(found: Mapping[str, Any]) -> dict[str, float]:
    kinds = found.get("imagenet_p", {}).get("perturbations", {})
    return {name: kind["flip_probability"] for name, kind in kinds.items()}


def _curves(
    curves: Curves, label: str, clean: float | None, chance: float | None, colors: Mapping[str, str] | None = None
) -> Callable[[Axes], None]:
    """Accuracies over a severity or ε; the first one is on the pictures as they are, where it is known.

    Args:
        curves: by name.
        label: of the axis.
        clean, chance: accuracies.
        colors: by name, where the page has a legend of its own; an evaluation without this curve keeps its color.
    """
    page_legend, colors = bool(colors), colors or dict(zip(curves, PALETTE, strict=False))

    def draw(axes: Axes) -> None:
        for name, curve in curves.items():
            points = curve if clean is None else {0: clean, **curve}
            places = sorted(points)
            axes.plot(places, [100 * points[x] for x in places], "o-", ms=3.5, lw=1.6, color=colors[name], label=name)
        if chance is not None:
            axes.axhline(100 * chance, color=QUIET, lw=0.8, ls=":", label="chance")
        axes.set_xticks(
            sorted({x for curve in curves.values() for x in curve} | ({0.0} if clean is not None else set()))
        )
        axes.set_ylim(0, 100)
        axes.set_ylabel("accuracy, %")
        axes.set_xlabel(label, loc="left")
        if not page_legend:  # below the panel, where no curve can run through it
            axes.legend(fontsize=8.5, loc="upper left", bbox_to_anchor=(-0.02, -0.2), borderaxespad=0)

    return draw


def _bars(axes: Axes, evaluations: Mapping[str, Mapping[str, Any]], places: Mapping[str, Sequence[str]]) -> None:
    """Figures in %, a row for each and a bar for each evaluation that has it."""
    rows = {
        name: [value_at(found, place) for found in evaluations.values()]
        for name, place in places.items()
        if any(value_at(found, place) is not None for found in evaluations.values())
    }
    thick = 0.8 / len(evaluations)
    look: dict[str, Any] = {"fontsize": 8.5 if len(evaluations) == 1 else 7.0, "color": INK}
    largest = 0.0
    for row, (name, values) in enumerate(rows.items()):
        scale = 1 if name in RELATIVE else 100
        for bar, (value, color) in enumerate(zip(values, PALETTE, strict=False)):
            if value is None:
                continue
            y, x = row + (bar - (len(evaluations) - 1) / 2) * thick, scale * value
            largest = max(largest, x)
            axes.barh(y, x, height=0.9 * thick, color=color)
            if len(rows) * len(evaluations) <= MOST_NUMBERS:
                axes.annotate(f"{x:.1f}", (x, y), (3, 0), textcoords="offset points", va="center", **look)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(max(len(rows), LEAST_ROWS) - 0.4, -0.6)
    axes.set_xlim(0, 1.2 * max(largest, 1e-9))
    if not any(name in RELATIVE for name in rows):  # shares: there is nothing beyond 100 %
        axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= min(100, axes.get_xlim()[1])])
    axes.grid(visible=False, axis="y")
