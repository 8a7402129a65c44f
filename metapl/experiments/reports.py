"""The pictures of runs and comparisons."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metapl.experiments.comparison import Comparison
from metapl.recipes.methods import title
from metapl.runs.metrics import Metrics

SHOWN = 7
"""Methods that one picture can tell apart."""


def draw_comparison(folder: Path, comparison: Comparison, results: Mapping[tuple[str, int], Mapping[str, Any]]) -> None:
    """``report.png`` of a comparison: curves averaged over seeds, and the confusion matrix of the method that is
    delivered, summed over them."""
    from metapl.report import draw_report

    curves = {
        method: mean_rows(
            [Metrics(folder / method / f"seed-{s}" / "metrics.jsonl").rows("fit") for s in comparison.seeds]
        )
        for method in list(comparison.methods)[:SHOWN]
    }
    first, _ = comparison.delivered()
    evaluations = [results[first, seed]["evaluation"] for seed in comparison.seeds]
    confusion = [
        [sum(evaluation["confusion"][i][j] for evaluation in evaluations) for j in range(len(row))]
        for i, row in enumerate(evaluations[0]["confusion"])
    ]
    draw_report(
        folder / "report.png",
        title=f"{results[first, comparison.seeds[0]]['recipe']}: {len(comparison.methods)} methods, "
        f"{len(comparison.seeds)} seeds (means)",
        curves=curves,
        confusion=confusion,
        classes=evaluations[0]["classes"],
        summary=f"{comparison.sentence()} Confusion: {title(first)}, all seeds together.",
    )


def mean_rows(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, float]]:
    """Rows averaged over runs, step by step, of the figures that every run has there.

    >>> mean_rows([[{"step": 1, "x": 1.0}], [{"step": 1, "x": 3.0}]])
    [{'step': 1, 'x': 2.0}]
    """
    by_step: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for rows in runs:
        for row in rows:
            by_step[row["step"]].append(row)
    mean = []
    for step, rows_here in sorted(by_step.items()):
        if len(rows_here) < len(runs):
            continue
        numbers = [k for k, v in rows_here[0].items() if isinstance(v, float) and k != "step"]
        values = {k: [row[k] for row in rows_here if isinstance(row.get(k), float)] for k in numbers}
        averaged = {k: sum(v) / len(v) for k, v in values.items() if len(v) == len(runs)}
        mean.append({"step": step, **averaged})
    return mean
