"""Methods and runs side by side.

What a comparison says of its numbers, and that its runs are those of one alone.
"""

import json
import multiprocessing
import os
import re
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
from metapl.apps.methods_over_seeds import READOUTS, STUDENT, Comparison
from metapl.apps.several_runs import Job
from metapl.errors import MetaplError

NONE = [0.5, 0.52, 0.51, 0.52, 0.53]
TITLES = {
    "mpl": "Meta Pseudo Labels",
    "none": "same loop, no feedback",
    "uda": "UDA alone",
}
SHORT = (*TINY, "--compare", "--methods", "mpl", "none", "--seeds", "0-1")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a comparison of two methods and two seeds, which tests leave as it is."""
    command = (*SHORT, "--jobs", "1")
    return built_once(
        tmp_path_factory, "tiny-compared", lambda out: metapl(*command, "--out", str(out))
    )


def comparison(
    test: dict[str, list[float]], validation: dict[str, list[float]] | None = None
) -> Comparison:
    """Compare students with these accuracies, and finetuned ones that are worse."""
    methods = {
        name: {
            "test_accuracy": ones,
            "student_test_accuracy": ones,
            "finetuned_test_accuracy": [0.1] * len(ones),
        }
        for name, ones in test.items()
    }
    for name, ones in (validation or {}).items():
        methods[name]["validation_accuracy"] = ones
    titles = {name: TITLES.get(name, name) for name in methods}
    seeds = tuple(range(len(next(iter(test.values())))))
    return Comparison(seeds, methods, titles, controls={"mpl": "none"}, examples=400, chance=0.125)


@pytest.mark.parametrize(
    ("mpl", "words"),
    [
        ([0.9, 0.91, 0.92, 0.93], "+40.2 points over 4 seeds; at least 5"),
        ([0.9, 0.91, 0.92, 0.93, 0.93], "feedback helped."),
        ([0.2, 0.21, 0.22, 0.23, 0.23], "feedback hurt. The best on the test set is same loop"),
        ([0.5, 0.53, 0.5, 0.53, 0.53], "do not show"),
        (NONE, "every seed the same"),
    ],
)
def test_the_sentence_claims_what_a_paired_test_of_five_seeds_shows(
    mpl: list[float], words: str
) -> None:
    found = comparison({"mpl": mpl, "none": NONE[: len(mpl)]})
    assert words in found.sentence()
    assert "n = 400, chance 12.5%" in found.sentence()
    assert ("p =" in found.sentence()) == (len(mpl) == 5 and mpl != NONE)
    tested = found.to_json()["mpl_against_none"]
    assert tested["n"] == len(mpl)
    assert tested["mean"] == pytest.approx(
        sum(a - b for a, b in zip(mpl, NONE, strict=False)) / len(mpl)
    )


def test_the_best_method_is_named_and_the_delivered_student_is_the_best_by_validation_alone() -> (
    None
):
    two = {"mpl": [0.8, 0.8], "none": [0.7, 0.8], "uda": [0.85, 0.86]}
    assert comparison(two).sentence().endswith("is UDA alone with 85.5% of 400 (chance 12.5%).")
    assert "the best" not in comparison({"mpl": [0.9], "none": [0.7]}).sentence()
    assert comparison({"uda": [0.9], "none": [0.7]}).against_control() is None
    test = {"mpl": [0.9, 0.9], "uda": [0.1, 0.1], "supervised": [0.2, 0.2]}
    validation = {"mpl": [0.5, 0.6], "uda": [0.4, 0.9], "supervised": [0.65, 0.65]}
    # Ties go to the earlier one: 0.65 on the mean.
    assert comparison(test, validation).delivered()[:2] == (
        "uda",
        1,
    )
    assert comparison(test).delivered()[:2] == ("mpl", 0)


@pytest.mark.long
def test_runs_at_a_time_are_those_of_one_after_another(compared: Path, tmp_path: Path) -> None:
    told = metapl(*SHORT, "--seeds", "0", "--jobs", "2", "--out", tmp_path / "pool").stdout
    assert "2 at a time" in told
    for name in ("mpl", "none"):
        assert contents(tmp_path / "pool" / name / "seed-0") == contents(compared / name / "seed-0")


def test_a_comparison_delivers_the_networks_of_one_of_its_runs_which_are_those_of_one_alone(
    compared: Path, tiny: Path
) -> None:
    assert contents(compared / "mpl" / "seed-0") == contents(tiny)
    told = result(compared)
    source = compared / told["method"] / f"seed-{told['seed']}"
    assert {file.name for file in source.glob("*.safetensors")} == {
        f.name for f in compared.glob("*.safetensors")
    }
    for file in source.glob("*.safetensors"):
        assert (compared / file.name).read_bytes() == file.read_bytes()
    for name, of in told["methods"].items():
        for index, seed in enumerate(told["seeds"]):
            own = result(compared / name / f"seed-{seed}")
            assert [of[readout][index] for readout in READOUTS] == [
                own[readout] for readout in READOUTS
            ]
    validated = {name: sum(of["validation_accuracy"]) for name, of in told["methods"].items()}
    assert validated[told["method"]] == max(validated.values())
    found = json.loads(metapl("evaluate", compared, "--json").stdout)
    assert found["accuracy"] == found["recorded_accuracy"] == result(source)["test_accuracy"]
    page = (compared / "report.html").read_text()
    for title in told["titles"].values():
        assert title in page
    assert (compared / "report.png").is_file()


def test_a_comparison_that_was_stopped_goes_on_with_what_has_ended(
    compared: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(compared, tmp_path / "copy"))
    for name in ("result.json", "none/seed-1/result.json"):
        (copy / name).unlink()
    (entry,) = json.loads(metapl("runs", copy, "--json").stdout)
    assert (entry["phase"], entry["done"], entry["steps"]) == ("runs", 3, 4)
    assert "interrupted" in metapl("report", copy).stdout + (copy / "report.html").read_text()
    told = metapl(*SHORT, "--jobs", "1", "--out", copy, "--resume").stdout
    assert contents(copy) == contents(compared)
    assert result(compared)["sentence"] in " ".join(told.split())
    # What has ended is no job any more, and it must be whole.
    (copy / "result.json").unlink()
    (copy / "mpl" / "seed-0" / "student.safetensors").write_bytes(b"torn")
    assert "damaged" in metapl(*SHORT, "--jobs", "1", "--out", copy, "--resume", code=2).stderr


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
    mpl, none = (sum(result(one)["student_test_accuracy"] for one in both) for both in folders)
    for text in (singles, metapl("compare", compared).stdout):
        assert f"{50 * (none - mpl):+.2f} points  none" in text
    accuracy = result(compared / "none" / "seed-1")["test_accuracy"]
    assert re.search(rf"none +1 +{100 * accuracy:.1f}", singles)


def test_compare_pairs_by_the_seed_in_whatever_order_runs_are_named() -> None:
    reached = {"none": [0.5, 0.6, 0.7, 0.8, 0.9], "mpl": [0.51, 0.62, 0.71, 0.82, 0.91]}
    none, mpl = (
        [Entry(Path(), {}, {"method": name, "seed": seed, STUDENT: of[seed]}) for seed in range(5)]
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
