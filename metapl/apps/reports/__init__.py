"""Pictures of a training and of what it learned, as PNG files."""

from metapl.apps.reports.gallery import Gallery, draw_grid, pictures_a_group
from metapl.apps.reports.page import PANELS, draw_report, draw_rounds

__all__ = ["PANELS", "Gallery", "draw_grid", "draw_report", "draw_rounds", "pictures_a_group"]
