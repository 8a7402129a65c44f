"""What the studies of smoothing and of the closed loop say, beside their committed rows."""

from __future__ import annotations

import importlib
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from metapl.metrics import paired_test
from metapl.updates.smoothing import DEFAULT_SMOOTHING

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "docs" / "studies"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that imports a benchmark as its command does."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module
    for path in (ROOT / "benchmarks").glob("*.py"):
        sys.modules.pop(path.stem, None)


def words_of(page: str) -> str:
    return " ".join((STUDIES / page).read_text().split())


def test_the_default_is_what_the_declared_test_has_chosen(scripts: Any) -> None:
    script = scripts("smoothing")
    rows = script.read(script.RAW, "ways")
    assert [row["name"] for row in rows] == [*script.CASES]
    exact = script.values_of(rows, "0", "own")
    passing = {}
    for way in script.WAYS[1:]:
        values = script.values_of(rows, way, "own")
        gains = [value - base for value, base in zip(values, exact, strict=True)]
        if min(gains) >= -script.MARGIN and statistics.mean(gains) > 0:
            passing[way] = statistics.mean(values)
    assert max(passing, key=passing.__getitem__) == f"{DEFAULT_SMOOTHING:g}"

    page = words_of("smoothing.md")
    chosen = script.values_of(rows, f"{DEFAULT_SMOOTHING:g}", "own")
    gains = [value - base for value, base in zip(chosen, exact, strict=True)]
    means = f"from {statistics.mean(exact):.2f} to {statistics.mean(chosen):.2f}"
    assert f"the mean rises {means}, {sum(gain > 0 for gain in gains)} of {len(rows)} gain" in page
    assert f"the one that loses most loses {-min(gains):.2f}" in page
    alone = statistics.mean(script.values_of(rows, f"{DEFAULT_SMOOTHING:g}", "others"))
    averaged = {
        way: statistics.mean(script.values_of(rows, way, "mean of seeds"))
        for way in (f"{DEFAULT_SMOOTHING:g}", "0.3", "1")
    }
    ceiling = statistics.mean(statistics.mean(row["ceilings"]) for row in rows)
    assert (
        f"the default goes from {alone:.2f} to {averaged[f'{DEFAULT_SMOOTHING:g}']:.2f}, c = 0.3 "
        f"has {averaged['0.3']:.2f} and c = 1 {averaged['1']:.2f}, where the true effects of one "
        f"seed have {ceiling:.2f}" in page
    )
    by_name = {
        row["name"]: (before, after) for row, before, after in zip(rows, exact, chosen, strict=True)
    }
    convolutions, normed = (
        by_name[f"digits, {name}, AdamW 0.005"] for name in ("convolutions", "batch norm")
    )
    assert f"have {convolutions[0]:.2f} exact and {convolutions[1]:.2f} at 0.1" in page
    assert f"with batch norm {normed[0]:.2f} and {normed[1]:.2f}" in page
    areas = {way: script.values_of(rows, way, "area") for way in (*script.WAYS, "TracIn")}
    losses = script.values_of(rows, "minus the loss", "area")
    for place, loss in enumerate(losses):
        assert all(round(loss, 2) >= round(values[place], 2) for values in areas.values())
    assert f"AUC {statistics.mean(losses):.2f} in the mean" in page
    large = [f"{statistics.mean(areas[way]):.2f}" for way in ("3", "10", "30")]
    assert f"c = 3 to 30 ({min(large)} to {max(large)})" in page
    few = [f"{statistics.mean(areas[way]):.2f}" for way in ("TracIn", "0")]
    assert f"TracIn ({few[0]}) and the exact scores ({few[1]})" in page


def test_the_sentences_of_the_closed_loop_are_those_of_the_rows(scripts: Any) -> None:
    script = scripts("closed_loop")
    rows = script.read(script.RAW, "reached")
    assert len(rows) == len(script.SETS) * len(script.SEEDS)

    def less_by_scores(name: str, arm: str) -> tuple[float, float, float]:
        """Return by how much the scores' arm is lower, and the interval's ends."""
        of_set = [row["reached"] for row in rows if row["name"] == name]
        test = paired_test(
            [reached[arm] for reached in of_set], [reached["scores"] for reached in of_set]
        )
        assert test.interval is not None
        return test.mean, *test.interval

    # On no set the scores are ahead of every simpler way.
    for name in script.SETS:
        arms = {arm for row in rows if row["name"] == name for arm in row["reached"]}
        simpler = arms - {"scores", "exact"}
        assert any(less_by_scores(name, arm)[1] <= 0 for arm in simpler)
    page = words_of("closed-loop.md")
    mean, low, high = less_by_scores("text", "dot")
    assert f"dot products ({mean:.2f}, {low:.2f} to {high:+.2f})" in page
    mean, low, high = less_by_scores("text", "longer")
    assert (
        f"{-mean:.2f} behind eight times the steps on all data ({-high:.2f} to {-low:.2f})" in page
    )
    mean, low, high = less_by_scores("people", "all")
    assert f"level with all data ({mean:.1f} points, {low:.1f} to {high:+.1f})" in page
    mean, low, high = less_by_scores("two classes", "all")
    assert f"{mean:.1f} points ahead of all data ({low:.1f} to {high:.1f})" in page
    mean, low, high = less_by_scores("two classes", "labels")
    assert f"{-mean:.1f} behind the examples that have one of the two" in page
    assert f"labels ({-high:.1f} to {-low:.1f})" in page
    by_exact = [less_by_scores(name, "exact") for name in script.SETS]
    assert all(low > 0 for _, low, _ in by_exact)
    text, people, pair = (mean for mean, _, _ in by_exact)
    assert f"by {text:.2f} nats, {people:.1f} and {pair:.1f} points" in page
    shares = [row["beside"]["scores"] for row in rows if row["name"] == "people"]
    assert f"{100 * statistics.mean(shares):.0f} % of its labels are wrong" in page
