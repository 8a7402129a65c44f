"""Does Meta Pseudo Labels separate two moons with six labels? A bounded search over what the paper leaves open.

    python benchmarks/two_moons.py                             # goes on where it was stopped
    python benchmarks/two_moons.py --table                     # the table of the raw file
    python benchmarks/two_moons.py --write docs/two-moons.md   # put it there, and draw the figure beside the page
    python benchmarks/two_moons.py --miniature --out FILE      # all of it in seconds, to see that it runs

Every regime of :data:`REGIMES` is run with the same 64 seeds: Meta Pseudo Labels, the same loop without the feedback,
and, where they are not those of another regime, supervised learning (with UDA where the regime has UDA) and
pseudo-labels of the network that was trained so. A run succeeds if it classifies more than 95 % of the 2,000 points as
they were drawn. The list was written before it was run, and each regime's rows are kept, whatever they say. Every
method of a regime is a row of the raw file.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import append, arguments, parsed, read, write_between_marks
from two_moons_stack import Method, Outcome, TwoMoons, TwoMoonsRuns, mcnemar

from metapl.apps.machine.environment import environment

RAW = Path(__file__).parent / "results" / "two_moons.jsonl"
SEEDS = tuple(range(100, 164))
"""Other than those that the noise of UDA and the quick rates were picked on, by the success of UDA alone."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Regime:
    """A setting.

    Args:
        title: in the table.
        recipe: the setting.
        methods: those that are run.
        control: the regime whose loop without feedback is the same; None: its own.
    """

    title: str
    recipe: TwoMoons
    methods: tuple[Method, ...] = ("mpl", "none")
    control: str | None = None


ALL: tuple[Method, ...] = ("mpl", "none", "supervised", "pseudo_labels")

STATED = TwoMoons()
"""As the paper states it; the exact feedback, and a supervised loss of the teacher."""

QUICK = TwoMoons(activation="tanh", init_scale=0.5, student_lr=0.3, teacher_lr=0.3, steps=3000, unlabeled_batch=32)
"""The same without the plateau on which sigmoid networks with small weights spend thousands of steps."""

UDA = dataclasses.replace(QUICK, uda_weight=1.0, input_noise=0.2)
"""With the consistency term, whose noise has two fifths of the distance between the moons as its standard deviation."""


def _changed(recipe: TwoMoons, **fields: Any) -> TwoMoons:
    return dataclasses.replace(recipe, **fields)


REGIMES: dict[str, Regime] = {
    "many_labels": Regime(
        "quick, 100 labels a moon", _changed(QUICK, labels_per_class=100, steps=4000), ("supervised",)
    ),
    "stated": Regime("as stated", STATED, ALL),
    "quick": Regime("quick, feedback weight 10", _changed(QUICK, feedback_weight=10.0), ALL),
    "uda": Regime("UDA, feedback ratio 0.3", _changed(UDA, feedback_ratio=0.3), ALL),
    "uda_ratio_1": Regime("UDA, feedback ratio 1", _changed(UDA, feedback_ratio=1.0), ("mpl",), "uda"),
    "pretrained": Regime(
        "as stated, both pretrained on the labels, weight 10",
        _changed(STATED, pretrain_steps=6000, steps=3000, feedback_weight=10.0),
    ),
    "no_supervised": Regime(
        "the same, then no supervised loss",
        _changed(STATED, pretrain_steps=6000, steps=3000, feedback_weight=10.0, supervised_loss=False),
    ),
    "lookahead_5": Regime(
        "UDA, 5 student steps ahead, weight 10, 600 teacher steps",
        _changed(UDA, lookahead=5, steps=600, feedback_weight=10.0),
    ),
    "quick_ratio_1": Regime("quick, feedback ratio 1", _changed(QUICK, feedback_ratio=1.0), ("mpl",), "quick"),
    "lookahead_20": Regime(
        "UDA, 20 student steps ahead, weight 10, 150 teacher steps",
        _changed(UDA, lookahead=20, steps=150, feedback_weight=10.0),
    ),
    "spread": Regime("UDA, labels spread, feedback ratio 0.3", _changed(UDA, placement="spread", feedback_ratio=0.3)),
    "uda_unlabeled_teacher": Regime(
        "UDA, pretrained, then no supervised loss, ratio 1",
        _changed(UDA, supervised_loss=False, pretrain_steps=1000, feedback_ratio=1.0),
    ),
    "quick_scalar": Regime(
        "quick, Algorithm 1's scalar, ratio 1", _changed(QUICK, mode="reinforce", feedback_ratio=1.0)
    ),
    "longer": Regime("UDA, feedback ratio 0.3, three times as long", _changed(UDA, feedback_ratio=0.3, steps=9000)),
    # Added after those before it had been seen.
    "uda_weight_10": Regime("UDA, feedback weight 10", _changed(UDA, feedback_weight=10.0), ("mpl",), "uda"),
    "quick_spread": Regime(
        "quick, labels spread, feedback ratio 0.3",
        _changed(QUICK, placement="spread", feedback_ratio=0.3),
        ("mpl", "none", "supervised"),
    ),
    "lookahead_5_full": Regime(
        "UDA, 5 student steps ahead, weight 10, 3,000 teacher steps", _changed(UDA, lookahead=5, feedback_weight=10.0)
    ),
}
"""In the order in which they are run."""


def run(out: Path, regimes: dict[str, Regime], seeds: Sequence[int]) -> None:
    """Run what the raw file does not have yet, and append its rows."""
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["regime"], row["method"]) for row in read(out)}
    # Pseudo-labels last: they only say again what their teacher knows.
    jobs = [(name, regime, method) for name, regime in regimes.items() for method in regime.methods]
    jobs = [job for job in jobs if (job[0], job[2]) not in done]
    prepared: dict[str, TwoMoonsRuns] = {}
    for name, regime, method in sorted(jobs, key=lambda job: job[2] == "pseudo_labels"):
        runs = prepared.setdefault(name, TwoMoonsRuns(regime.recipe, seeds))
        began = time.process_time()
        row = _row(name, method, regime, seeds, runs.run(method), began)
        append(out, row)
        print(f"{name}, {method}: {row['success']} of {row['runs']}, {row['seconds']} s", flush=True)


def _row(name: str, method: Method, regime: Regime, seeds: Sequence[int], outcome: Outcome, began: float) -> Row:
    made_with = environment()
    return {
        "regime": name,
        "method": method,
        "recipe": dataclasses.asdict(regime.recipe),
        "seeds": list(seeds),
        "success": outcome.success,
        "runs": len(outcome.accuracy),
        "interval": [round(end, 4) for end in outcome.interval],
        "accuracy": [round(accuracy, 4) for accuracy in outcome.accuracy],
        "seconds": round(time.process_time() - began, 1),
        "torch": made_with["torch"],
    }


# ----------------------------------------------------------------------------------------------- the table, the figure


def found(rows: Sequence[Row], name: str, method: str) -> Row | None:
    """The row of a method in a regime; of supervised learning and the control also in the regime that shares it."""
    names = [name]
    shared = REGIMES[name].control
    if shared is not None and method != "mpl":
        names.append(shared)
    return next((row for row in rows if row["method"] == method and row["regime"] in names), None)


def rate(row: Row | None) -> str:
    """A success rate with its 95 % interval, in %."""
    if row is None:
        return "–"
    low, high = (100 * end for end in row["interval"])
    return f"{row['success']} of {row['runs']} ({low:.0f}–{high:.0f})"


def difference(rows: Sequence[Row], name: str) -> str:
    """p of McNemar's exact test of Meta Pseudo Labels against the same loop without feedback."""
    mpl, none = (found(rows, name, method) for method in ("mpl", "none"))
    if mpl is None or none is None:
        return "–"
    return f"{mcnemar(mpl['accuracy'], none['accuracy'])[2]:.2g}"


def table(rows: Sequence[Row]) -> str:
    """Success rates by regime and method."""
    lines = [
        "| regime | MPL | the same loop without feedback | p | supervised, with UDA where the regime has it | "
        "pseudo-labels | median accuracy of MPL, % |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, regime in REGIMES.items():
        cells_of = {method: found(rows, name, method) for method in ALL}
        if not any(row["regime"] == name for row in rows):
            continue
        mpl = cells_of["mpl"]
        median = "–" if mpl is None else f"{100 * statistics.median(mpl['accuracy']):.1f}"
        cells = [rate(mpl), rate(cells_of["none"]), difference(rows, name)]
        cells += [rate(cells_of["supervised"]), rate(cells_of["pseudo_labels"]), median]
        lines.append(f"| {regime.title} | " + " | ".join(cells) + " |")
    seeds = {tuple(row["seeds"]) for row in rows}
    runs = "/".join(str(len(group)) for group in seeds)
    lines += [
        "",
        f"Runs that classify more than 95 % of the 2,000 points as they were drawn, of {runs}, with the 95 % interval "
        "of Wilson's score in %; p of McNemar's exact test on the paired seeds, not corrected for the number of rows. "
        f"{sum(row['runs'] for row in rows):,} runs in {sum(row['seconds'] for row in rows) / 60:.0f} minutes of one "
        "core. `python benchmarks/two_moons.py`; raw rows: `benchmarks/results/two_moons.jsonl`.",
    ]
    return "\n".join(lines)


COLORS = {"mpl": "#0072B2", "none": "#D55E00", "supervised": "#555555"}
MARKERS = {"mpl": "o", "none": "s", "supervised": "D"}
NAMES = {
    "mpl": "MPL",
    "none": "the same loop without feedback",
    "supervised": "supervised, with UDA where the regime has it",
}

TOLD = {"stated": "as stated", "uda": "with UDA"}
"""The regimes that the figure's title tells of."""


def draw(path: Path, rows: Sequence[Row]) -> None:
    """The success rates with their intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in reversed(REGIMES) if any(row["regime"] == name for row in rows)]
    figure = Figure(figsize=(9.5, 1.4 + 0.42 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for y, name in enumerate(names):
        for number, (method, color) in enumerate(COLORS.items()):
            row = found(rows, name, method)
            if row is not None:
                place = y - 0.22 * (number - 1)
                axes.plot([100 * end for end in row["interval"]], [place, place], color=color, linewidth=1.6)
                axes.plot(100 * row["success"] / row["runs"], place, MARKERS[method], color=color, markersize=5.5)
    axes.set_yticks(range(len(names)), [REGIMES[name].title for name in names])
    axes.set_xlim(-2, 102)
    axes.set_xlabel("runs above 95 % accuracy, %, with the 95 % interval")
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False)
    for method, color in COLORS.items():
        axes.plot([], [], MARKERS[method], color=color, label=NAMES[method])
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    told = [(words, found(rows, name, "mpl"), found(rows, name, "none")) for name, words in TOLD.items()]
    said = [
        f"{words} MPL {mpl['success']}, without feedback {none['success']}" for words, mpl, none in told if mpl and none
    ]
    figure.suptitle(f"Runs that separate the moons: {'; '.join(said)}", fontsize=11)
    figure.savefig(path, dpi=150)


def write(page: Path, raw: Path) -> None:
    """Put the table between the marks of a page, and draw the figure beside it."""
    rows = read(raw)
    write_between_marks(page, "two_moons", table(rows))
    draw(page.with_name(f"{raw.stem}.png"), rows)


def _miniature() -> dict[str, Regime]:
    """All regimes on a few points, for a few steps."""
    small = {
        name: dataclasses.replace(
            regime.recipe,
            points=40,
            labels_per_class=3,
            steps=2,
            pretrain_steps=min(2, regime.recipe.pretrain_steps),
            lookahead=min(2, regime.recipe.lookahead),
            unlabeled_batch=4,
        )
        for name, regime in REGIMES.items()
    }
    return {name: dataclasses.replace(regime, recipe=small[name]) for name, regime in REGIMES.items()}


def main() -> None:
    parser = arguments(__doc__, RAW)
    parser.add_argument("--table", action="store_true", help="print the table of the raw file, and run nothing")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into a page, and draw its figure")
    given = parsed(parser)
    torch.set_num_threads(1)
    if not given.table and given.write is None:
        regimes, seeds = (_miniature(), (0, 1)) if given.miniature else (REGIMES, SEEDS)
        run(given.out, regimes, seeds)
    if given.write is not None:
        write(given.write, given.out)
    print(table(read(given.out)))


if __name__ == "__main__":
    main()
