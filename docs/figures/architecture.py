"""Draw the floors that docs/architecture.md lists in its table.

python docs/figures/architecture.py    # draw docs/architecture.svg
"""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "architecture.md"
FIGURE = FOLDER.parent / "architecture.svg"

WIDTH = 720
LEFT = 64
RIGHT = 8
TOP = 10
HEIGHT_OF_A_FLOOR = 52
GAP = 8
GAP_OF_FLOORS = 10

# The colors of the floors, from the lowest.
COLORS = (
    "#5c6370",
    "#5c6370",
    "#a8326b",
    "#8e5a00",
    "#00766c",
    "#00766c",
    "#00766c",
    "#3f51b5",
    "#3f51b5",
)

HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-labelledby="title"
     font-family="system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif" text-anchor="middle">
  <title id="title">The floors of metapl from the command at the top to errors at the bottom; imports go down.</title>
  <defs><marker id="tip" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="5" markerHeight="5" orient="auto"><path d="M0 0 10 5 0 10z" fill="#7b818c"/></marker></defs>
  <path d="M30 20v{arrow}" stroke="#7b818c" stroke-width="4" marker-end="url(#tip)"/>
"""  # noqa: E501


def floors() -> dict[int, list[str]]:
    """Return the rooms of each floor by its number, as the page has them."""
    rooms = {}
    for number, names in re.findall(r"^\| (\d) \| ([^|]+) \|", PAGE.read_text(), re.MULTILINE):
        rooms[int(number)] = re.findall(r"`(\w+)`", names)
    return rooms


def boxes(labels: list[str], top: int, color: str) -> str:
    """Return the boxes of a floor, as wide as it has room for."""
    space = WIDTH - LEFT - RIGHT
    width = (space - GAP * (len(labels) - 1)) / len(labels)
    # A letter of this font is about 0.55 of its size wide.
    longest = max(len(label) for label in labels)
    size = min(22, int((width - 12) / (0.58 * longest)))
    lines = []
    for number, label in enumerate(labels):
        left = LEFT + number * (width + GAP)
        lines.append(
            f'  <rect x="{left:.0f}" y="{top}" width="{width:.0f}" height="{HEIGHT_OF_A_FLOOR}" '
            f'rx="10" fill="{color}"/>\n'
            f'  <text x="{left + width / 2:.0f}" y="{top + 33}" font-size="{size}" '
            f'font-weight="600" fill="#fff">{label}</text>\n'
        )
    return "".join(lines)


def main() -> None:
    rooms = floors()
    step = HEIGHT_OF_A_FLOOR + GAP_OF_FLOORS
    height = TOP + step * (len(rooms) + 1) + 6
    picture = HEAD.format(width=WIDTH, height=height, arrow=height - 44)
    picture += boxes(["apps: the command, and all that it is made of"], TOP, COLORS[0])
    for place, number in enumerate(sorted(rooms, reverse=True), 1):
        picture += boxes(rooms[number], TOP + step * place, COLORS[number - 1])
    FIGURE.write_text(picture + "</svg>\n")


if __name__ == "__main__":
    main()
