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
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import arguments, parsed

from metapl.experiments.two_moons import Method, Outcome, TwoMoonsRuns
from metapl.recipes.two_moons import TwoMoons
from metapl.runs.environment import environment

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
"""With the consistency term, whose noise is about half the distance between the moons."""


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
        "UDA, 5 student steps ahead, weight 10", _changed(UDA, lookahead=5, steps=600, feedback_weight=10.0)
    ),
    "quick_ratio_1": Regime("quick, feedback ratio 1", _changed(QUICK, feedback_ratio=1.0), ("mpl",), "quick"),
    "lookahead_20": Regime(
        "UDA, 20 student steps ahead, weight 10", _changed(UDA, lookahead=20, steps=150, feedback_weight=10.0)
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
}
"""In the order in which they are run."""


def read(path: Path = RAW) -> list[Row]:
    """The rows of a raw file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


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
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
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


if __name__ == "__main__":
    main()
