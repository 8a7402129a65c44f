"""The picture of an evaluation under corruption and attack."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metapl.report.canvas import blank_page, drawing, png, write_whole
from metapl.report.style import GRID, INK, PALETTE, QUIET
from metapl.report.text import wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
"""The kinds of ImageNet-C; a column of panels each."""

Curves = dict[str, dict[float, float]]
"""Accuracies by severity or ε, by name."""

PANEL, HEIGHT = 3.0, 4.0
"""Inches."""


def draw_robustness(path: Path, found: Mapping[str, Any], title: str) -> None:
    """Draw accuracy over the severity of each kind of corruption, and over the ε of each attack.

    Args:
        path: of the PNG, replaced as a whole.
        found: what ``evaluation.json`` holds.
        title: a line above.
    """
    corruptions, attacks = found.get("corruptions", {}), found.get("attacks", {})
    groups = {group: [name for name in names if name in corruptions] for group, names in GROUPS.items()}
    groups = {group: names for group, names in groups.items() if names}
    columns = len(groups) + bool(attacks)
    width = max(PANEL * columns, 2 * PANEL)
    lines = wrap(title, width - 0.5, 11)
    with drawing(lines):
        figure = blank_page(width, HEIGHT + 0.25 * len(lines))
        figure.set_layout_engine("constrained")
        panels = list(figure.subplots(1, columns, sharey=True, squeeze=False)[0])
        for axes, (group, names) in zip(panels, groups.items(), strict=False):
            by_kind: Curves = {name: _by_severity(corruptions[name]) for name in names}
            _draw(axes, group, "severity", by_kind, found)
        if attacks:
            by_attack: Curves = {
                name.upper(): {float(eps): accuracy for eps, accuracy in by_eps.items()}
                for name, by_eps in attacks.items()
            }
            _draw(panels[-1], "attack", "ε, in 1/255", by_attack, found)
        panels[0].set_ylabel("accuracy, %")
        panels[0].set_ylim(0, 100)
        figure.suptitle("\n".join(lines), fontsize=11, x=0.01, ha="left")
        write_whole(path, png(figure))


def _by_severity(kind: Mapping[str, Any]) -> dict[float, float]:
    return {float(severity): accuracy for severity, accuracy in enumerate(kind["accuracy_by_severity"], 1)}


def _draw(axes: Axes, title: str, label: str, curves: Curves, found: Mapping[str, Any]) -> None:
    for (name, curve), color in zip(curves.items(), PALETTE, strict=False):
        points = {0: found["accuracy"], **curve}
        places = sorted(points)
        axes.plot(places, [100 * points[x] for x in places], "o-", ms=3.5, lw=1.6, color=color, label=name)
    axes.axhline(100 * found["chance"], color=QUIET, lw=0.8, ls=":", label="chance")
    axes.set_title(title, fontsize=10.5, loc="left", color=INK)
    axes.set_xlabel(label, loc="left")
    axes.grid(color=GRID)
    axes.tick_params(length=0)
    # Below the panel, where no curve can run through it.
    axes.legend(
        frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(-0.02, -0.2), labelcolor=INK, borderaxespad=0
    )
