"""Pictures of a training and of what it learned, as PNG files."""

from metapl.report.curves import PANELS
from metapl.report.gallery import Gallery
from metapl.report.grid import GRID_SHOWN, draw_grid
from metapl.report.page import draw_report

__all__ = ["GRID_SHOWN", "PANELS", "Gallery", "draw_grid", "draw_report"]
