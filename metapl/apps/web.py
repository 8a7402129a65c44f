"""A training as one web page that needs nothing beside itself: no script, no file and no address from elsewhere."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from metapl.metrics import Evaluation, interval
from metapl.words import shown

GENERATOR = "metapl report"  # what a page says of who wrote it
ALLOWED = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # what a browser may load: nothing
WIDTH, HEIGHT, LEFT, BELOW, ABOVE = 460, 220, 52, 24, 10  # of a plot and around it, in units of the drawing
MOST_POINTS = 400  # of a line
MOST_IN_A_MATRIX, MOST_UNFOLDED = 20, 40  # classes of a matrix in numbers, and of a table that is open
AXES = "Rows are true classes, columns predicted ones; color: share of the true class."
LARGEST_PICTURE = 160  # pixels a side

Curves = Mapping[str, Sequence[Mapping[str, float]]]  # rows by method

STYLE = """
:root { color-scheme: light dark; --ink: #222; --quiet: #666; --line: #ddd; --page: #fff; --box: #f6f7f8; --on: #fff;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b0608f; --c4: #b97d00; --c5: #3a97cf; --c6: #000 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --quiet: #a0a4a8; --line: #3a3f44; --page: #15181b;
  --box: #1e2226; --on: #10151a; --c0: #4db1ec; --c1: #ff9248; --c2: #2fd3a2; --c3: #e6a0cb; --c4: #f5bc4a;
  --c5: #9bd6f7; --c6: #fff } }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
p { max-width: 46rem; margin: .4rem 0 } .number { font-size: 3rem; font-weight: 700; line-height: 1.1; margin: 1rem 0 }
.quiet, figcaption, th { color: var(--quiet) } figcaption, table, pre { font-size: .85rem }
.state { display: inline-block; padding: .1rem .7rem; border: 2px solid var(--c1); border-radius: 1rem }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
figure { margin: 0 } .plots figure, pre { background: var(--box); border-radius: .5rem; padding: .8rem }
svg { width: 100%; height: auto; display: block } svg text { font-size: 13px; fill: var(--quiet) }
svg path { fill: none; stroke-width: 2; stroke-linejoin: round } svg .grid { stroke: var(--line); stroke-width: 1 }
.d1 { stroke-dasharray: 7 3 } .d2 { stroke-dasharray: 2 3 } .key { display: inline-block; margin-right: 1rem }
.key svg { display: inline-block; width: 1.8rem; height: .7rem; margin-right: .3rem }
.wide { overflow-x: auto } table { border-collapse: collapse }
td, th { padding: .2rem .6rem; text-align: right; overflow-wrap: normal } td { white-space: nowrap }
th { font-weight: 600 }
th:first-child { text-align: left; min-width: 4rem; max-width: 16rem; overflow-wrap: anywhere }
tr + tr > * { border-top: 1px solid var(--line) }
.texts td { text-align: left; overflow-wrap: anywhere; white-space: normal }
.matrix td { border: 1px solid var(--line); text-align: center; min-width: 1.4rem;
  background: color-mix(in srgb, var(--c0) var(--s, 0%), var(--page)) } .matrix .high { color: var(--on) }
.turned span { writing-mode: vertical-rl; max-height: 9rem; overflow: hidden }
.pictures { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)) }
.pictures img { width: 7rem; max-width: 100%; image-rendering: pixelated; border: 3px solid var(--line) }
.pictures .right { border-color: var(--c2) } .pictures .wrong { border: 3px dashed var(--c1) }
details { margin: 1rem 0 } summary { cursor: pointer; font-weight: 600 } pre { white-space: pre-wrap }
"""


def web_page(title: str, parts: Sequence[str]) -> bytes:
    """The page of these parts, which are HTML."""
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="generator" content="{GENERATOR}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{ALLOWED}">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>\n"
    )
    return (head + "\n".join(filter(None, parts)) + "\n</body></html>\n").encode()


def text(words: object) -> str:
    """Words as HTML.

    >>> text('<a & "b">')
    '&lt;a &amp; &quot;b&quot;&gt;'
    """
    return html.escape(shown(words, keep="\n"))


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{text(title)}</h2>{''.join(parts)}</section>" if any(parts) else ""


def folded(title: str, content: str) -> str:
    return f"<details><summary>{text(title)}</summary>{content}</details>"


def paragraph(words: object, kind: str = "") -> str:
    return f'<p class="{kind}">{text(words)}</p>'


def rows(cells: Sequence[Sequence[object]], head: Sequence[object] = ()) -> str:
    """A table, the first cell of whose rows names them; without a head, of names and texts."""
    heads = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{text(name)}</th>{"".join(f"<td>{text(cell)}</td>" for cell in row)}</tr>'
        for name, *row in cells
    )
    kind = "" if head else ' class="texts"'
    return f'<div class="wide"><table{kind}><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


# -------------------------------------------------------------------------------------------------------------- curves


class Panel(NamedTuple):
    """A plot of a few quantities over the steps; the first is drawn solid, the next dashed, the third dotted."""

    title: str
    series: tuple[tuple[str, str], ...]  # (key of the rows, its name in the legend)
    percent: bool = False
    log: bool = False
    now_and_then: bool = False  # measured so, and not in each step: its last values count

    def points(self, rows: Sequence[Mapping[str, float]], key: str) -> Sequence[tuple[float, float]]:
        """Steps and values that can be drawn: a logarithmic scale has no zero."""
        pairs = ((float(row["step"]), float(row[key])) for row in rows if "step" in row and row.get(key) is not None)
        return sorted(pair for pair in pairs if all(map(math.isfinite, pair)) and (pair[1] > 0 or not self.log))

    def means(self, values: NDArray[Any]) -> NDArray[Any]:
        """The mean about each value of many, over fewer towards the ends."""
        span = np.ones(1 if self.now_and_then else 2 * (len(values) // 80) + 1)
        found: NDArray[Any] = np.convolve(values, span, "same") / np.convolve(np.ones(len(values)), span, "same")
        return found


# Of two with one title, the first that has figures is drawn.
PANELS = (
    Panel(
        "Validation accuracy",
        (("student_validation_accuracy", "student"), ("teacher_validation_accuracy", "teacher")),
        percent=True,
        now_and_then=True,
    ),
    Panel("Losses", (("inner_loss", "inner (student)"), ("outer_loss", "outer (labeled)"))),
    Panel(
        "Losses of the network",
        (
            ("loss_cross_entropy", "labeled"),
            ("loss_uda", "unlabeled (strong view, own label)"),
            ("loss_entropy", "unlabeled (entropy)"),
            ("loss_noisy_student", "with pseudo-labels"),
        ),
    ),
    Panel("Feedback to the teacher", (("feedback_std", "its standard deviation in a batch"),), log=True),
    Panel("Signal to noise of the feedback", (("feedback_snr", "of one step, by its examples"),)),
    Panel(
        "Pseudo-labels",
        (("pseudo_label_accuracy", "accuracy"), ("pseudo_label_confidence", "confidence"), ("agreement", "agreement")),
        percent=True,
    ),
    Panel("Class-frequency error", (("class_shares_vs_truth", "pseudo-labels against the truth"),), percent=True),
    Panel("Class-frequency error", (("class_shares_vs_labeled", "pseudo-labels against the labels"),), percent=True),
)


def panels_of(curves: Curves, network: str) -> list[Panel]:
    """Those that there are figures for; ``network``: what it is called where no method has a teacher beside it."""
    by_title: dict[str, Panel] = {}
    for panel in PANELS:
        there = [key for key, _ in panel.series if any(panel.points(rows, key) for rows in curves.values())]
        if panel.now_and_then and there == [panel.series[0][0]]:
            panel = panel._replace(series=((there[0], network), *panel.series[1:]))
        if there:
            by_title.setdefault(panel.title, panel)
    return list(by_title.values())


def plots(curves: Curves, network: str) -> str:
    """A drawing of each panel that there are figures for, as in report.png; several curves have a color each."""
    drawn = "".join(_plot(panel, curves) for panel in panels_of(curves, network))
    return f'<div class="plots">{drawn}</div>' if drawn else ""


def _plot(panel: Panel, curves: Curves) -> str:
    lines: list[tuple[str, str, NDArray[np.float64], NDArray[np.float64]]] = []  # class, name, steps, values
    for index, (method, of_method) in enumerate(curves.items()):
        for rank, (key, name) in enumerate(panel.series):
            if points := panel.points(of_method, key):
                steps, values = np.array(points).T
                look = f"{index if len(curves) > 1 else rank} d{rank}"
                lines.append((look, f"{method}, {name}" if len(curves) > 1 else name, steps, panel.means(values)))
    steps, values = (np.concatenate([line[part] for line in lines]) for part in (2, 3))
    marks, (low, high) = _scale(panel, float(values.min()), float(values.max()))
    first, last = float(steps.min()), max(float(steps.max()), float(steps.min()) + 1)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - 10) * (step - first) / (last - first)

    def y(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if panel.log else (value - low) / (high - low)
        return ABOVE + (HEIGHT - ABOVE - BELOW) * (1 - share)

    def written(value: float) -> str:
        return f"{100 * value:.4g} %" if panel.percent else f"{value:.3g}"

    parts = []
    for mark in marks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(mark):.1f}H{WIDTH - 10}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{written(mark)}</text>')
    for step, anchor in ((first, "start"), (last, "end"))[: 1 + (steps.max() > first)]:
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">step {step:,.0f}</text>')
    keys = []
    for look, name, at, of in lines:
        every = [*range(0, len(at) - 1, math.ceil(len(at) / MOST_POINTS)), len(at) - 1]
        place = "L".join(f"{x(at[i]):.1f} {y(of[i]):.1f}" for i in every)
        style, end = f'class="d{look[-1]}" style="stroke:var(--c{look[0]})"', f"{name}: {written(of[-1])} at the end"
        dot = f'<circle cx="{x(at[0]):.1f}" cy="{y(of[0]):.1f}" r="4" style="fill:var(--c{look[0]})"/>'
        parts.append(f'<path {style} d="M{place}"><title>{text(end)}</title></path>{dot if len(at) == 1 else ""}')
        keys.append(
            f'<span class="key"><svg viewBox="0 0 30 10" aria-hidden="true"><path {style} d="M0 5H30"/></svg>'
            f"{text(name)} {written(of[-1])}</span>"
        )
    return (
        f"<figure><b>{text(panel.title)}</b>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(panel.title)}">{"".join(parts)}</svg>'
        f"<figcaption>{' '.join(keys)}</figcaption></figure>"
    )


def _scale(panel: Panel, low: float, high: float) -> tuple[list[float], tuple[float, float]]:
    """The marks beside a panel, and its lower and upper edge."""
    if panel.log:  # what hardly changes would leave a scale without a mark
        middle, half = math.sqrt(low * high), max(math.sqrt(high / low) * 1.1, 2.0)
        low, high = middle / half, middle * half
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = -(-len(powers) // 8)
        found = [m * 10.0**power for power in powers[::every] for m in ((1,) if half > 10 else (1, 2, 5))]
    else:
        low, high = (low, high) if panel.percent else (min(0.0, low), high)
        beyond = 0.06 * (high - low) or 0.05
        low, high = (max(low - beyond, 0.0), min(high + beyond, 1.0)) if panel.percent else (low, high + beyond)
        rough = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
        found = [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [mark for mark in found if low <= mark <= high], (low, high)


# ------------------------------------------------------------------------------------------------------- the test set


def matrix(evaluation: Evaluation, names: Sequence[str]) -> str:
    """The confusion matrix of a few classes; nothing of many."""
    counts = np.array(evaluation.confusion)
    shares = np.sqrt(counts / np.maximum(counts.sum(1, keepdims=True), 1))  # as report.png colors them
    if len(names) > MOST_IN_A_MATRIX:  # the table of the classes has what each is taken for
        return ""
    head = "".join(f'<th scope="col"><span>{text(name)}</span></th>' for name in names)
    turned = ' class="turned"' * (max(map(len, names)) > 3)
    body = ""
    for name, row, of_row in zip(names, counts.tolist(), shares.tolist(), strict=True):
        cells = (
            f'<td style="--s:{100 * share:.0f}%"{" class=high" * (share > 0.6)}>{count or ""}</td>'
            for count, share in zip(row, of_row, strict=True)
        )
        body += f'<tr><th scope="row">{text(name)}</th>{"".join(cells)}</tr>'
    table = f'<table class="matrix"><thead{turned}><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="wide">{table}</div>{paragraph(AXES, "quiet")}'


def classes(evaluation: Evaluation, names: Sequence[str]) -> str:
    """How many of each class are right, the worst first, and what it is most often taken for."""
    cells: list[tuple[float, Sequence[object]]] = []
    for index, (name, row) in enumerate(zip(names, evaluation.confusion, strict=True)):
        n, right = sum(row), row[index]
        others = [0 if other == index else count for other, count in enumerate(row)]
        most = max(range(len(row)), key=others.__getitem__)
        taken = f"{names[most]} ({others[most]:,})" if others[most] else ""
        low, high = interval(right, n) if n else (0.0, 1.0)
        share = f"{100 * right / n:.1f} % ({100 * low:.1f}-{100 * high:.1f})" if n else "-"
        cells.append((right / n if n else 2.0, (name, f"{n:,}", f"{right:,}", share, taken)))
    head = ("class", "examples", "right", "accuracy (95 %)", "most often taken for")
    found = rows([row for _, row in sorted(cells, key=lambda cell: cell[0])], head)
    return found if len(names) <= MOST_UNFOLDED else folded(f"all {len(names):,} classes", found)


# ------------------------------------------------------------------------------------------------------------ pictures


class Picture(NamedTuple):
    """What is shown of an example."""

    x: Tensor  # (C, H, W) in [0, 1], C = 1 or 3
    caption: str  # in lines
    right: bool | None = None  # what its frame says


def pictures(title: str, note: str, shown: Sequence[Picture]) -> str:
    """Thumbnails with a few words beneath each; nothing where they are no pictures."""
    if not shown or shown[0].x.ndim != 3 or shown[0].x.shape[0] not in (1, 3):
        return ""
    figures = []
    for x, caption, right in shown:
        levels = (255 * x.detach().cpu().float().clamp(0, 1)).round().byte().permute(1, 2, 0).squeeze(-1).numpy()
        kind = {True: "right", False: "wrong", None: ""}[right]
        lines = "<br>".join(text(line) for line in caption.split("\n"))
        figures.append(
            f'<figure><img class="{kind}" alt="" src="{_png(levels)}"><figcaption>{lines}</figcaption></figure>'
        )
    return section(title, paragraph(note, "quiet"), f'<div class="pictures">{"".join(figures)}</div>')


def _png(levels: NDArray[np.integer]) -> str:
    """Levels (H, W) or (H, W, C) from 0 to 255 as the address of a picture, which holds all of it."""
    from PIL import Image

    image, file = Image.fromarray(levels.astype(np.uint8)), io.BytesIO()
    image.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    image.save(file, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
