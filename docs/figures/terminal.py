"""Run the command in a terminal of 80 columns, keep what it prints, and draw it.

    python docs/figures/terminal.py           # run, write terminal.txt, draw docs/terminal.svg
    python docs/figures/terminal.py --draw    # draw what terminal.txt has

terminal.txt is the screen as it stands at the end, with the command in its first line.
"""

from __future__ import annotations

import argparse
import errno
import os
import pty
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent
TEXT = FOLDER / "terminal.txt"
FIGURE = FOLDER.parent / "terminal.svg"

COMMAND = "metapl train digits --method uda --steps 3000 --out runs/first"
COLUMNS = 80

# In pixels of the drawing.
CHARACTER = 8.4
LINE = 19
MARGIN = 18
BAR = 34


def screen(output: str) -> list[str]:
    """Return the lines of a terminal after some output: a carriage return begins a line anew."""
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in output.replace("\r\n", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def run_in_terminal(command: list[str], folder: str) -> str:
    """Return all that a command writes to a terminal of its own.

    Raises: subprocess.CalledProcessError where it fails.
    """
    reader, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "TERM": "xterm", "NO_COLOR": "1"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    written = bytearray()
    while True:
        try:
            part = os.read(reader, 4096)
        except OSError as error:
            # Linux reports the end of a terminal whose last writer has gone as an input error.
            if error.errno != errno.EIO:
                raise
            break
        if not part:
            break
        written += part
    os.close(reader)
    if process.wait() != 0:
        raise subprocess.CalledProcessError(process.returncode, command, bytes(written))
    return written.decode()


def drawing(lines: list[str]) -> str:
    """Return an SVG of a window with these lines, the first of which is the command."""
    width = 2 * MARGIN + CHARACTER * COLUMNS
    height = BAR + 2 * MARGIN + LINE * len(lines)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img">',
        f"<title>{escape(lines[0])}</title>",
        f'<rect width="{width:.0f}" height="{height}" rx="8" fill="#1f2430"/>',
    ]
    for number, color in enumerate(("#ff5f57", "#febc2e", "#28c840")):
        parts.append(f'<circle cx="{MARGIN + 18 * number}" cy="18" r="5.5" fill="{color}"/>')
    parts.append(
        '<g font-family="ui-monospace, SFMono-Regular, Menlo, DejaVu Sans Mono, monospace"'
        ' font-size="14" fill="#d7dae0" xml:space="preserve">'
    )
    for number, line in enumerate(lines):
        if not line:
            continue
        baseline = BAR + MARGIN + LINE * number + 4
        color = ' fill="#8fd694"' if line.startswith("$ ") else ""
        length = f"{CHARACTER * len(line):.1f}"
        parts.append(
            f'<text x="{MARGIN}" y="{baseline}" textLength="{length}"{color}>{escape(line)}</text>'
        )
    parts += ["</g>", "</svg>"]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--draw", action="store_true", help="draw what terminal.txt has")
    arguments = parser.parse_args()
    if not arguments.draw:
        words = COMMAND.split()
        with tempfile.TemporaryDirectory() as folder:
            output = run_in_terminal([sys.executable, "-m", *words], folder)
        TEXT.write_text("\n".join([f"$ {COMMAND}", *screen(output)]) + "\n")
    FIGURE.write_text(drawing(TEXT.read_text().splitlines()))


if __name__ == "__main__":
    main()
