"""A training as one web page that needs nothing beside itself.

No script, no file and no address from elsewhere.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from metapl.words import shown

# What a page says of who wrote it.
GENERATOR = "metapl report"

# A browser may load nothing for it.
ALLOWED = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

# The longest side of a thumbnail, in pixels.
LARGEST_PICTURE = 160

STYLE = """
:root { color-scheme: light dark; --ink: #222; --quiet: #666; --line: #ddd; --page: #fff; --box:
  #f6f7f8 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --quiet: #a0a4a8; --line: #3a3f44;
  --page: #15181b;
  --box: #1e2226 } }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 72rem; background: var(--page); color:
  var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0
  .6rem }
p { max-width: 46rem; margin: .4rem 0 } .number { font-size: 3rem; font-weight: 700; line-height:
  1.1; margin: 1rem 0 }
.quiet, figcaption, th { color: var(--quiet) } figcaption, table, pre { font-size: .85rem }
figure { margin: 0 } .drawn { max-width: 100% } pre { background: var(--box); border-radius: .5rem;
  padding: .8rem }
.wide { overflow-x: auto } table { border-collapse: collapse }
td, th { padding: .2rem .6rem; text-align: right; overflow-wrap: normal } td { white-space: nowrap }
th { font-weight: 600 }
th:first-child { text-align: left; min-width: 6rem; max-width: 16rem; overflow-wrap: anywhere }
tr + tr > * { border-top: 1px solid var(--line) }
.texts td { text-align: left; overflow-wrap: anywhere; white-space: normal }
.pictures { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)) }
.pictures img { width: 7rem; max-width: 100%; image-rendering: pixelated; border: 3px solid
  var(--line) }
details { margin: 1rem 0 } summary { cursor: pointer; font-weight: 600 } pre { white-space:
  pre-wrap }
"""


def web_page(title: str, folder: object, parts: Sequence[str]) -> bytes:
    """Return a page in HTML.

    Args:
        title: of the page.
        folder: of the run that it shows.
        parts: in HTML; empty ones are left out.
    """
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="generator" content="{GENERATOR}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{ALLOWED}">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>\n"
    )
    body = [f"<h1>{text(title)}</h1>", paragraph(folder, "quiet"), *filter(None, parts)]
    return (head + "\n".join(body) + "\n</body></html>\n").encode()


def text(words: object) -> str:
    """Return words as HTML.

    >>> text('<a & "b">')
    '&lt;a &amp; &quot;b&quot;&gt;'
    """
    return html.escape(shown(words, keep="\n"))


def section(title: str, *parts: str) -> str:
    """Return parts below a title; nothing where all of them are empty."""
    if not any(parts):
        return ""
    return f"<section><h2>{text(title)}</h2>{''.join(parts)}</section>"


def folded(title: str, content: str) -> str:
    """Return a part that is opened by a click on its title."""
    return f"<details><summary>{text(title)}</summary>{content}</details>"


def paragraph(words: object, kind: str = "") -> str:
    """Return words as a paragraph, of a kind that :data:`STYLE` has."""
    return f'<p class="{kind}">{text(words)}</p>'


def rows(cells: Sequence[Sequence[object]], head: Sequence[object] = ()) -> str:
    """Return a table; the first cell of a row names it. Without a head it has names and texts."""
    heads = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    lines = []
    for name, *row in cells:
        columns = "".join(f"<td>{text(cell)}</td>" for cell in row)
        lines.append(f'<tr><th scope="row">{text(name)}</th>{columns}</tr>')
    body = "".join(lines)
    kind = "" if head else ' class="texts"'
    table = f"<table{kind}><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


# ----------------------------------------------------------------------------------------- pictures


class Picture(NamedTuple):
    """What is shown of an example.

    Args:
        x: (C, H, W) in [0, 1], C = 1 or 3.
        caption: in lines.
    """

    x: Tensor
    caption: str


def pictures(title: str, note: str, examples: Sequence[Picture]) -> str:
    """Return thumbnails with a few words beneath each; nothing where they are no pictures."""
    if not examples or examples[0].x.ndim != 3 or examples[0].x.shape[0] not in (1, 3):
        return ""
    figures = []
    for x, caption in examples:
        lines = "<br>".join(text(line) for line in caption.split("\n"))
        image = f'<img alt="" src="{picture(thumbnail(x))}">'
        figures.append(f"<figure>{image}<figcaption>{lines}</figcaption></figure>")
    return section(
        title, paragraph(note, "quiet"), f'<div class="pictures">{"".join(figures)}</div>'
    )


def thumbnail(x: Tensor) -> bytes:
    """Return a picture (C, H, W) in [0, 1] as a small PNG."""
    levels_CHW = (255 * x.detach().cpu().float().clamp(0, 1)).round().byte()
    levels = levels_CHW.permute(1, 2, 0).squeeze(-1).numpy()
    image = Image.fromarray(levels)
    image.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    file = io.BytesIO()
    image.save(file, format="png", optimize=True)
    return file.getvalue()


def picture(content: bytes) -> str:
    """Return a picture in PNG as a part of the page itself."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
