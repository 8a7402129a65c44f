"""Methods and runs side by side.

What a comparison says of its numbers, and that its runs are those of one alone.
"""

import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
from command import edited, metapl, reseal, result
from test_resume import contents
from tiny_runs import TINY, built_once

from metapl.apps import several_runs
from metapl.apps.compare_runs import Entry, verdict
from metapl.apps.digits import METHODS, Digits, fitting
from metapl.apps.several_runs import Job
from metapl.errors import MetaplError
from metapl.run_folder import STUDENT_READOUT

SHORT = (*TINY, "--compare", "--methods", "mpl", "none", "--seeds", "0-1")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a comparison of two methods and two seeds, which tests leave as it is."""
    command = (*SHORT, "--jobs", "1")
    return built_once(
        tmp_path_factory, "tiny-compared", lambda out: metapl(*command, "--out", str(out))
    )


@pytest.mark.long
def test_runs_at_a_time_are_those_of_one_after_another(compared: Path, tmp_path: Path) -> None:
    told = metapl(*SHORT, "--seeds", "0", "--jobs", "2", "--out", tmp_path / "pool").stdout
    assert "2 at a time" in told
    for name in ("mpl", "none"):
        assert contents(tmp_path / "pool" / name / "seed-0") == contents(compared / name / "seed-0")


def test_the_runs_of_a_comparison_are_those_of_one_alone_and_stand_side_by_side(
    compared: Path, tiny: Path
) -> None:
    assert contents(compared / "mpl" / "seed-0") == contents(tiny)
    text = metapl("compare", compared).stdout
    baselines = [result(compared / "mpl" / f"seed-{seed}")["control_accuracy"] for seed in (0, 1)]
    assert re.search(rf"linear baseline +0,1 +{50 * sum(baselines):.1f} ±", text)
    entries = json.loads(metapl("runs", compared, "--json").stdout)
    assert sorted((entry["method"], entry["seed"]) for entry in entries) == [
        ("mpl", 0),
        ("mpl", 1),
        ("none", 0),
        ("none", 1),
    ]
    assert "recipe.json" in metapl("predict", compared, compared, code=2).stderr


def test_a_comparison_is_gone_on_with_by_the_line_that_its_folder_proposes(
    compared: Path, tmp_path: Path
) -> None:
    place = tmp_path / "compared"
    shutil.copytree(compared, place)
    # A comparison that was stopped before its last run.
    last = place / "none" / "seed-1"
    there = contents(last)
    shutil.rmtree(last)
    edited(
        place / "mpl" / "seed-0" / "recipe.json",
        command=shlex.join(["metapl", *SHORT, "--jobs", "1", "--out", str(place)]),
    )
    refused = metapl("train", "digits", "--resume", "--out", place, code=2).stderr
    assert "mpl/seed-0" in refused
    proposed = refused.partition("go on with it by metapl ")[2]
    metapl(*shlex.split(proposed))
    assert contents(last) == there


def test_a_comparison_that_was_stopped_goes_on_with_what_has_ended(
    compared: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(compared, tmp_path / "copy"))
    (copy / "none" / "seed-1" / "result.json").unlink()
    assert "holds files" in metapl(*SHORT, "--jobs", "1", "--out", copy, code=2).stderr
    told = metapl(*SHORT, "--jobs", "1", "--out", copy, "--resume").stdout
    assert contents(copy) == contents(compared)
    # The folder stands in the table.
    _, verdict_of_compared = metapl("compare", compared).stdout.rsplit("\n\n", 1)
    assert verdict_of_compared in told


def _killed(job: Job) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.long
def test_a_worker_that_is_killed_is_reported_and_the_others_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(several_runs, "_run_apart", _killed)
    two = [
        Job(
            Digits(fitting=fitting(seed=s)),
            METHODS["mpl"],
            tmp_path / str(s),
            resume=False,
            threads=1,
        )
        for s in (0, 1)
    ]
    with pytest.raises(MetaplError, match="killed"):
        list(several_runs.run_all(two, workers=2))
    assert multiprocessing.active_children() == []


def test_compare_pairs_the_runs_of_a_comparison_and_single_ones(compared: Path) -> None:
    singles = metapl(
        "compare", *(compared / m / f"seed-{s}" for m in ("mpl", "none") for s in (0, 1))
    ).stdout
    folders = [[compared / m / f"seed-{s}" for s in (0, 1)] for m in ("mpl", "none")]
    mpl, none = (sum(result(one)["test_accuracy"] for one in both) for both in folders)
    for text in (singles, metapl("compare", compared).stdout):
        assert f"{50 * (none - mpl):+.2f} points  none" in text
    accuracy = result(compared / "none" / "seed-1")["test_accuracy"]
    assert re.search(rf"none +1 +{100 * accuracy:.1f}", singles)


def test_compare_says_what_short_runs_cannot_tell(compared: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(compared, tmp_path / "copy"))

    def said(*accuracies: float) -> str:
        for run, accuracy in zip(sorted(copy.glob("*/seed-*")), accuracies, strict=True):
            for network in result(run)["networks"]:
                edited(run / "result.json", **{f"{network}_test_accuracy": accuracy})
        return " ".join(metapl("compare", copy).stdout.split())

    good = said(0.9, 0.9, 0.9, 0.9)
    assert "not told apart by 2 seeds: a test takes 5, --seeds 0-4" in good
    assert "better than guessing" not in good
    for run in copy.glob("*/seed-*"):
        edited(run / "result.json", test_accuracy=0.9)
    assert "+0.00 points none (equal in every seed)" in said(0.9, 0.9, 0.9, 0.9)
    expected = "1 of 4 runs deliver what is not shown to be better than guessing, after 6 steps"
    assert expected in said(0.9, 0.9, 0.1, 0.9)


def test_compare_pairs_by_the_seed_in_whatever_order_runs_are_named() -> None:
    reached = {"none": [0.5, 0.6, 0.7, 0.8, 0.9], "mpl": [0.51, 0.62, 0.71, 0.82, 0.91]}
    none, mpl = (
        [
            Entry(Path(), {}, {"method": name, "seed": seed, STUDENT_READOUT: of[seed]})
            for seed in range(5)
        ]
        for name, of in reached.items()
    )
    assert "p = 0.0046" in verdict([*none, *mpl])
    assert verdict([*none, *mpl]) == verdict([*none, *mpl[::-1]])


def test_compare_pairs_runs_of_the_same_minutes_and_says_why_it_does_not_pair(
    compared: Path, tiny: Path, run: Path, tmp_path: Path
) -> None:
    first, other = compared / "mpl" / "seed-0", compared / "none" / "seed-1"
    edited(run / "recipe.json", "recipe", "fields", lr=0.5)
    for runs, words in (
        ((first, other), "Not paired: mpl has seeds 0, none has 1."),
        ((compared, first), "is there twice"),
        ((tiny,), "Nothing to pair"),
        ((tiny, run), "points  mpl, lr 0.5"),
    ):
        assert words in metapl("compare", *runs).stdout
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    # Of the same minutes, whatever the number of their steps.
    for one, steps in (
        (run, 6),
        (other, 9),
    ):
        edited(
            one / "recipe.json",
            "recipe",
            "fields",
            minutes=5.0,
            steps=steps,
            wait=steps // 2,
            lr=0.1,
        )
        edited(one / "result.json", steps=steps)
    edited(other / "recipe.json", "recipe", method="none")
    edited(other / "result.json", method="none", title="no feedback")
    assert "points  none" in metapl("compare", run, other).stdout


def test_compare_has_a_baseline_for_each_run_where_they_learned_other_labels(
    tiny: Path, run: Path
) -> None:
    same = metapl("compare", tiny, run).stdout
    (row,) = [line for line in same.splitlines() if "linear baseline" in line]
    assert row.split()[:2] == ["linear", "baseline"]
    edited(run / "result.json", control_accuracy=0.125)
    expected = [(str(tiny), 100 * result(tiny)["control_accuracy"]), (str(run), 12.5)]
    for pairs in (expected, expected[::-1]):
        text = metapl("compare", *(name for name, _ in pairs)).stdout
        rows = [line.split() for line in text.splitlines() if "linear baseline" in line]
        assert rows == [[name, "linear", "baseline", "0", f"{value:.1f}"] for name, value in pairs]


def test_compare_refuses_runs_on_other_data_or_of_other_classes(tiny: Path, run: Path) -> None:
    classes = result(run)["evaluation"]["classes"]
    edited(
        run / "result.json",
        "evaluation",
        classes=["three" if name == "3" else name for name in classes],
    )
    assert "three" in metapl("compare", tiny, run, code=2).stderr
    shutil.copy(tiny / "result.json", run)
    edited(run / "data.json", "hash", test="0")
    assert "damaged" in metapl("compare", tiny, run, code=2).stderr
    reseal(run)
    assert "test differ" in " ".join(metapl("compare", tiny, run, code=2).stderr.split())
    # Another seed has another split of the same data.
    edited(run / "recipe.json", "recipe", "fields", seed=1)
    edited(run / "result.json", seed=1)
    metapl("compare", tiny, run)


def test_a_comparison_of_nothing_names_the_program_once() -> None:
    told = metapl("compare", code=2)
    assert told.stderr.startswith("metapl: compare RUN RUN...: expected runs")
