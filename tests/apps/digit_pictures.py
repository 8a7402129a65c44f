"""A picture of a digit, as files of many kinds hold it."""

from __future__ import annotations

from PIL import Image
from sklearn.datasets import load_digits


def picture(kind: str) -> Image.Image:
    """One digit, as files of many kinds hold it."""
    ink = (load_digits().images[5] * 255 / 16).round().astype("uint8")
    plain = Image.fromarray(ink)
    return {
        "gray": lambda: plain,
        "color": lambda: plain.convert("RGB"),
        "palette": lambda: plain.convert("P"),
        "print": lambda: plain.convert("CMYK"),
        "16 bits": lambda: Image.fromarray(ink.astype("uint16") * 257),
        "paper": lambda: Image.fromarray(255 - ink),
        "transparent": lambda: Image.merge("LA", (Image.new("L", (8, 8)), plain)),
        "large": lambda: plain.resize((80, 120), Image.Resampling.NEAREST),
    }[kind]()
