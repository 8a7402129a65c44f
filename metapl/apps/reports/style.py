"""The look that all pictures share: colors, sizes of letters, lengths in inches."""

from __future__ import annotations

from typing import Any

DOTS_PER_INCH = 150

# Okabe and Ito's palette without its yellow, which is too pale for a line on white; the color-blind can distinguish
# the others.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, QUIET, GRID = "#222222", "#6B6B6B", "#E4E4E4"
RIGHT, WRONG, FRAME = PALETTE[2], PALETTE[1], "#BDBDBD"

# Inches. Above a panel, a matrix or a gallery stand its title and a line that says what is drawn.
MARGIN = 0.4
ABOVE_PANEL = 0.8
TITLE_ABOVE, NOTE_ABOVE = 29 / 72, 8 / 72
TITLE_LINE, SUMMARY_LINE, PANEL_TITLE_LINE, NOTE_LINE = 0.36, 0.26, 0.24, 0.19

# Points.
TITLE_SIZE, SUMMARY_SIZE, PANEL_TITLE_SIZE, NOTE_SIZE, CAPTION_SIZE = 18.0, 11.5, 12.5, 10.0, 9.0

STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.edgecolor": "#9A9A9A",
    "axes.labelcolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "xtick.color": "#9A9A9A",
    "ytick.color": "#9A9A9A",
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "text.color": INK,
}
