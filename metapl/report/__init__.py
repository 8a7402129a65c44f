"""Pictures of a training and of what it learned, as PNG files."""

from metapl.report.canvas import SOFTWARE
from metapl.report.curves import PANELS
from metapl.report.gallery import Gallery
from metapl.report.grid import MOST_GROUPS, draw_grid, pictures_a_group
from metapl.report.page import draw_report

__all__ = ["MOST_GROUPS", "PANELS", "SOFTWARE", "Gallery", "draw_grid", "draw_report", "pictures_a_group"]
