"""What every benchmark shares: its arguments, its rows, how figures are shown, and a page's tables.

A benchmark measures and writes rows; ``--table`` and ``--write PAGE`` make its tables of the rows
that are there and run nothing. A study goes on with the rows that are there. ``--miniature`` runs
all of it in seconds, to see it run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from metapl import machine
from metapl.metrics import paired_test

HERE = Path(__file__).parent
RESULTS = HERE / "results"
NONE = "–"

Row = dict[str, Any]

# ---------------------------------------------------------------------------------------- arguments


def arguments(description: str | None, result: Path) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=result, metavar="FILE", help="the file of the result"
    )
    parser.add_argument(
        "--miniature",
        action="store_true",
        help="everything in seconds, to see that it runs; its figures mean nothing",
    )
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="put the tables of --out there; runs nothing"
    )
    parser.add_argument(
        "--table", action="store_true", help="print the tables of --out; runs nothing"
    )
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the arguments, with ``runs``: whether anything is measured.

    A miniature does not take the place of the committed result.
    """
    args = parser.parse_args()
    args.runs = args.write is None and not args.table
    if args.miniature and args.out.resolve() == parser.get_default("out").resolve():
        parser.error(
            f"--miniature would write its figures to {args.out}; give it another file by --out FILE"
        )
    return args


# --------------------------------------------------------------------------------------------- rows


def read(file: Path, having: str = "") -> list[Row]:
    """Return the rows of a file of JSON lines, as far as there are any.

    Where a column is named, they are the rows that have it.
    """
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row for row in rows if not having or having in row]


def append(file: Path, *rows: Row) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as raw:
        raw.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def commit() -> str | None:
    """Return the measured commit, with ``+`` if files differ from it; None if it is not known.

    Where the files lie without their repository, ``METAPL_COMMIT`` says it.
    """
    git = ["git", "-C", str(HERE)]
    asked = {"capture_output": True, "text": True, "check": True}
    try:
        number = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], **asked).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], **asked
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("METAPL_COMMIT")
    return f"{number}+" if changes else number


def environment() -> Row:
    """Return what a row was measured on.

    The machine, the versions, the commit, and torch's switches.
    """
    facts = machine.environment()
    switches: Row = {name: facts.pop(name) for name in [*facts] if name.startswith("float32 ")}
    switches["deterministic algorithms"] = torch.are_deterministic_algorithms_enabled()
    switches["cudnn.benchmark"] = torch.backends.cudnn.benchmark
    return {**facts, "commit": commit(), "switches": switches}


def go_on(
    file: Path,
    jobs: Iterable[Row],
    run: Callable[..., Row | list[Row]],
    workers: int = 1,
    **about: Any,
) -> list[Row]:
    """Run the jobs that no row of the file has, and append their rows.

    A row has the job's own columns and what ``run(**job)`` finds; if that is a list, each thing
    has a row.

    Args:
        jobs: one at a time, so that later ones may be chosen by earlier rows; with several
            ``workers``, all at first.
        about: a line of its own before the first new row, such as what it was made with.

    Returns: all rows.
    """
    rows = read(file)
    said = False

    def missing() -> Iterator[Row]:
        for job in jobs:
            stored = json.loads(json.dumps(job))
            if not any(stored.items() <= row.items() for row in rows):
                yield job

    def keep(job: Row, measured: Row | list[Row]) -> None:
        nonlocal said
        new = [{**job, **row} for row in (measured if isinstance(measured, list) else [measured])]
        append(file, *[about] * (bool(about) and not said), *new)
        said = True
        rows.extend(json.loads(json.dumps(new)))
        for row in new:
            print(
                {name: value for name, value in row.items() if name != "made_with"},
                file=sys.stderr,
                flush=True,
            )

    stored_rows = len(rows)
    if workers == 1:
        for job in missing():
            keep(job, run(**job))
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for job, running in [(job, pool.submit(run, **job)) for job in missing()]:
                keep(job, running.result())
    if len(rows) == stored_rows:
        text = f"no job to run: all rows are in {file}; --out FILE measures anew"
        print(text, file=sys.stderr, flush=True)
    return rows


def every(**axes: Any) -> tuple[Row, ...]:
    """Return every choice from these values; a value that is no tuple is the only one.

    >>> every(lr=(0.1, 0.2), momentum=0.9)
    ({'lr': 0.1, 'momentum': 0.9}, {'lr': 0.2, 'momentum': 0.9})
    """
    columns = [value if isinstance(value, tuple) else (value,) for value in axes.values()]
    return tuple(dict(zip(axes, point, strict=True)) for point in itertools.product(*columns))


def best(rows: Iterable[Row], column: str, score: str | Callable[[Row], float]) -> Any:
    """Return the value of a column with the highest mean of another one over its rows.

    Of equals it is the first. A value may be a run's settings.
    """
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(json.dumps(row[column]), []).append(
            row[score] if isinstance(score, str) else score(row)
        )
    return json.loads(max(values, key=lambda value: statistics.fmean(values[value])))


def apart(use: str, python: str = sys.executable) -> Any:
    """Return what an expression of a benchmark gives, evaluated in a process of its own.

    An expression is one like ``"peers.measure(1)"``.

    Raises: :class:`RuntimeError` with what it wrote, if it ends otherwise.
    """
    code = f"import json, sys, torch; sys.path.insert(0, {str(HERE)!r}); torch.set_num_threads(1)\n"
    code += f"import {use.partition('.')[0]}; print(json.dumps({use}))"
    paths = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-c", code], env=paths, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def loaded(file: Path) -> Any:
    return json.loads(file.read_text())


def write_json(path: Path, value: Any) -> None:
    """Write JSON, with floats to four figures, which is more than any of them is known to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.4g}"))
    path.write_text(json.dumps(rounded, indent=1, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------------------ figures

# A difference is that of the two means as they are shown, to a tenth of a point: who subtracts two
# cells of a table gets the third. p and the interval are those of the pairs as they are.


def points(values: Sequence[float]) -> float:
    """Return the mean in %, as it is shown.

    >>> points([0.8, 0.8125])
    80.6
    """
    return float(f"{100 * statistics.fmean(values):.1f}")


def spread(values: Sequence[float]) -> str:
    """Return the mean ± standard deviation in %; of a single value, the value.

    >>> spread([0.8, 0.9])
    '85.0 ± 7.1'
    """
    mean = f"{points(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[str, str]:
    """Return the difference of the means, in points, and p of the paired t-test.

    >>> difference([0.7996, 0.9001, 0.8501], [0.7504, 0.8304, 0.8102])
    ('+5.3', '0.027')
    """
    p = paired_test(first, second).p
    return f"{points(first) - points(second):+.1f}", NONE if p is None else f"{p:.2g}"


def between(first: Sequence[float], second: Sequence[float]) -> str:
    """Return the 95 % interval of their difference, in points.

    >>> between([0.7996, 0.9001, 0.8501], [0.7504, 0.8304, 0.8102])
    '+1.5 to +9.1'
    """
    ends = paired_test(first, second).interval
    return NONE if ends is None else f"{100 * ends[0]:+.1f} to {100 * ends[1]:+.1f}"


def interval(
    first: Sequence[float], second: Sequence[float] | None = None, form: str = ".2f"
) -> str:
    """Return the mean of their difference with its 95 % interval, in their unit.

    Without a second sequence they are those of the first.

    >>> interval([1.0, 2.0, 4.0], [0.5, 1.0, 2.5])
    '1.00 (-0.24 to 2.24)'
    """
    test = paired_test(first, [0.0] * len(first) if second is None else second)
    ends = (
        ""
        if test.interval is None
        else f" ({test.interval[0]:{form}} to {test.interval[1]:{form}})"
    )
    return f"{test.mean:{form}}{ends}"


# ------------------------------------------------------------------------------- tables and figures


def grid(head: Sequence[str], lines: Iterable[Sequence[Any]], names: int | str = 1) -> str:
    """Return a table in Markdown.

    The first columns, of ``names``, are of text and those behind them of numbers, or as a string
    like ``"lrl"`` says.

    >>> print(grid(["arm", "p"], [["a", 0.5]]))
    | arm | p |
    |---|---:|
    | a | 0.5 |
    """
    sides = "l" * names if isinstance(names, int) else names
    rule = "".join("|---" if side == "l" else "|---:" for side in sides.ljust(len(head), "r")) + "|"
    return "\n".join(
        [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(map(str, line))} |" for line in lines)]
    )


def show(page: Path | None, name: str, tables: str) -> None:
    """Put tables between the marks of a name in a page, <!-- name:begin --> and <!-- name:end -->.

    Or print them.
    """
    if page is None:
        print(tables, end="\n\n")
        return
    begin = f"<!-- {name}:begin -->"
    end = f"<!-- {name}:end -->"
    text = page.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"{page} must contain {begin} and {end} once each, in this order")
    head, tail = text.split(begin)
    page.write_text(f"{head}{begin}\n{tables}\n{end}{tail.split(end)[1]}")


def figure_of(page: Path, name: str) -> Path:
    """Return where the figure of a page's tables goes.

    It goes into docs/, and that of a page outside of the project beside the page.
    """
    is_of_project = HERE.parent in page.resolve().parents
    return (HERE.parent / "docs" if is_of_project else page.parent) / name


# Of Okabe and Ito's colors, which the color-blind can tell apart.
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"


@dataclass(frozen=True)
class Bar:
    """A paired difference of two methods' accuracies in a figure, and maybe a paper's value."""

    label: str
    first: Sequence[float]
    second: Sequence[float]
    color: str = BLUE
    other: float | None = None


def bars(
    path: Path,
    panels: dict[str, list[Bar]],
    heading: str,
    axis: str,
    columns: int = 1,
    least: float | None = None,
) -> None:
    """Draw differences in points with their 95 % intervals, a panel a question.

    A value below ``least`` is written there.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = {name: len(bars_of_panel) + 2.5 for name, bars_of_panel in panels.items()}
    shares: list[list[str]] = [[] for _ in range(columns)]
    for number, height in zip(heights, itertools.accumulate(heights.values()), strict=True):
        shares[min(columns - 1, int(columns * (height - 1) / sum(heights.values())))].append(number)
    tallest = max(sum(heights[name] for name in share) for share in shares)
    figure = Figure(
        figsize=(9.5 if columns == 1 else 6.5 * columns, 0.8 + 0.22 * tallest), layout="constrained"
    )
    FigureCanvasAgg(figure)
    parts = figure.subfigures(1, columns, squeeze=False)[0]
    for part, names in zip(parts, shares, strict=True):
        of_column = part.subplots(
            len(names),
            1,
            squeeze=False,
            height_ratios=[heights[name] for name in names],
            sharex=least is not None,
        )[:, 0]
        for axes, name in zip(of_column, names, strict=True):
            for y, bar in enumerate(panels[name][::-1]):
                test = paired_test(bar.first, bar.second)
                if least is not None and 100 * test.mean < least:
                    text = f"\u2190 {100 * test.mean:+.1f}"
                    axes.annotate(text, (least, y), fontsize=8, va="center", color=bar.color)
                    continue
                if test.interval is not None:
                    axes.plot(
                        [100 * end for end in test.interval], [y, y], color=bar.color, linewidth=1.6
                    )
                axes.plot(100 * test.mean, y, "o", color=bar.color, markersize=5)
                if bar.other is not None:
                    axes.plot(bar.other, y, "D", color=ORANGE, markersize=4)
            axes.set_yticks(
                range(len(panels[name])), [bar.label for bar in panels[name][::-1]], fontsize=7.5
            )
            axes.axvline(0, color="0.6", linewidth=1)
            axes.set_ylim(-0.7, len(panels[name]) - 0.3)
            axes.set_title(name, fontsize=9.5, loc="left")
            axes.grid(axis="x", color="0.92")
            axes.set_axisbelow(True)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(left=False, labelsize=8)
            if least is not None:
                axes.set_xlim(least, -least)
        of_column[-1].set_xlabel(axis, fontsize=9)
    figure.suptitle(heading, fontsize=11)
    figure.savefig(path, dpi=120)
