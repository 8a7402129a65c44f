"""What takes most of a small run and is seldom its point, left out: pages are put together and not drawn."""

from __future__ import annotations

import io

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from metapl.apps.reports import canvas

DRAWN = canvas.png


def leave_pages_blank() -> None:
    """From here on, in this process."""
    file, made_by = io.BytesIO(), PngInfo()
    made_by.add_text("Software", canvas.SOFTWARE)
    Image.new("RGB", (8, 8), "white").save(file, "PNG", pnginfo=made_by)
    canvas.png = lambda figure: file.getvalue()
