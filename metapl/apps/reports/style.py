"""The look that all pictures share: colors, sizes of letters, lengths in inches."""

from __future__ import annotations

from typing import Any

# Okabe and Ito's palette without its yellow, which is too pale for a line on white; the color-blind can distinguish
# the others.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, QUIET, FRAME, AXIS = "#222222", "#6B6B6B", "#BDBDBD", "#9A9A9A"
DASHED = (0, (4, 1.8))

MARGIN = 0.4
"""Inches around a page."""

TITLE_LINE, SUMMARY_LINE, PANEL_TITLE_LINE, NOTE_LINE, CAPTION_LINE = 0.36, 0.26, 0.24, 0.19, 0.165
"""Inches from one line of letters to the next."""

TITLE_SIZE, SUMMARY_SIZE, PANEL_TITLE_SIZE, NOTE_SIZE, CAPTION_SIZE = 18.0, 11.5, 12.5, 10.0, 9.0
"""Points of letters."""

STYLE: dict[str, Any] = {
    "figure.dpi": 150,
    "savefig.dpi": "figure",
    "figure.facecolor": "white",
    "font.size": 10,
    "axes.edgecolor": AXIS,
    "axes.labelcolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.9,
    **{f"{axis}tick.{which}.size": 0 for axis in "xy" for which in ("major", "minor")},
    **{f"{axis}tick.{name}": value for axis in "xy" for name, value in (("labelcolor", QUIET), ("labelsize", 9.5))},
    "text.color": INK,
    "text.parse_math": False,  # a name such as "$5" is not a formula
}
"""As matplotlib's own settings, beside its defaults."""
