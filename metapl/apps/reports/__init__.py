"""Pictures of a training and of what it learned, as PNG files."""

from metapl.apps.reports.canvas import SOFTWARE
from metapl.apps.reports.gallery import MOST_GROUPS, Gallery, draw_grid, pictures_a_group
from metapl.apps.reports.page import PANELS, draw_report

__all__ = ["MOST_GROUPS", "PANELS", "SOFTWARE", "Gallery", "draw_grid", "draw_report", "pictures_a_group"]
