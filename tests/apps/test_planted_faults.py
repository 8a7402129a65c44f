"""The suite of the application can fail.

Each planted fault, bent as a mistake would be, is caught by a check.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import test_folders
import test_resume
from command import metapl, result
from test_goldens import of_run
from tiny_runs import TINY, colored_pictures

from metapl.apps import images, train
from metapl.apps.images import Pictures
from metapl.apps.methods import reduced_mpl
from metapl.apps.methods.base import Training
from metapl.apps.settings import Fitting
from metapl.execution.shards import weights_of
from metapl.processes import Processes
from metapl.training import FitResult, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Here:
    root: Path  # pictures
    out: Path


Check = Callable[[Here], None]


ENDED_ON: dict[str, Any] = {}
"""The weights of runs without a fault on this machine, by the name of the golden run."""


def golden(name: str) -> Check:
    """Return a check of the weights that a run ends on, to the bit.

    The stored ones may be of another processor, where they are compared to 5e-3 of their norm,
    within which most of these faults stay; so the first call, without a fault, is remembered.
    """

    def weights(here: Here) -> None:
        if name not in ENDED_ON:
            ENDED_ON[name] = of_run(name, here.root, here.out)
        elif here.out.parent.name == "bent":
            assert of_run(name, here.root, here.out)["sha256"] == ENDED_ON[name]["sha256"]

    return weights


def resumed(kind: str) -> Check:
    """Check a run killed in the phase after the first, before anything of it was saved."""

    def ends_alike(here: Here) -> None:
        whole = here.out.with_name("whole")
        metapl(*test_resume.command(kind, here.root, whole))
        test_resume.interrupted(kind, here.root, here.out, (0, 2), test_resume.Killed())
        test_resume.gone_on_with(kind, here.root, here.out)
        test_resume.assert_equal(here.out, whole)

    return ends_alike


def images_command(here: Here) -> list[str]:
    return test_resume.command("images uda", here.root, here.out)


def a_test_picture_that_is_labeled_is_refused(here: Here) -> None:
    shutil.copy(here.root / "labeled/red/red-1.png", here.root / "test/red/again.png")
    assert metapl(*images_command(here), code=None).returncode == 2


def nothing_is_learned_from_what_is_selected_on(here: Here) -> None:
    test_folders.test_pictures_set_aside_for_validation_are_not_learned_from_as_unlabeled_ones(
        here.root, 3
    )


def delivered_by_validation(here: Here) -> None:
    for seed in (2, 5):  # in one of them test would choose another
        out = here.out.with_name(f"run-{seed}")
        metapl(*TINY, "--steps", "10", "--finetune-steps", "10", "--seed", str(seed), "--out", out)
        found = result(out)
        best = max(
            found[f"{name}_validation_accuracy"] for name in ("student", "teacher", "finetuned")
        )
        assert found["validation_accuracy"] == best


def replaced_pictures_are_noticed(here: Here) -> None:
    """Check that labels are refused if their pictures were replaced under the same names."""
    run, store = here.out, here.out.with_name("store")
    metapl(*images_command(here))
    metapl("label", run, here.root / "unlabeled", "--out", store)
    shutil.copy(here.root / "unlabeled/red-1.png", here.root / "unlabeled/blue-1.png")
    words = [
        *images_command(here)[:-1],
        run.with_name("other"),
        "--method",
        "reduced_mpl",
        "--labels",
        store,
    ]
    assert metapl(*words, code=None).returncode == 2


def exchanged(**own: Any) -> Training:
    return Training(**{**own, "teacher": own["student"], "student": own["teacher"]})


def best_by_test(kept: Any, select: bool, last: bool) -> str:
    return str(max(kept, key=lambda name: kept[name].accuracies()["test_accuracy"]))


def skipping(trainer: Any, *sources: Any, **options: Any) -> FitResult:
    if options.get("resume") and options["phase"] == "teacher":
        return FitResult(None, 0, weights_of(trainer.student))
    return FIT(trainer, *sources, **options)


FIT, SAMPLER, VIEWS, OPTIONS = Trainer.fit, images.StepSampler, Pictures.views, Fitting.options
FAULTS: dict[str, tuple[Any, str, Callable[..., Any], Check]] = {
    # An owner, its attribute, what a mistake would make of it, and the check that catches it.
    "one stream of draws": (
        *(images, "StepSampler", lambda *given, **named: SAMPLER(*given, **{**named, "stream": 0})),
        golden("images uda"),
    ),
    "teacher built after the student": (train, "Training", exchanged, golden("digits forward")),
    "seed not set before finetuning": (
        Processes,
        "seed",
        lambda *given: None,
        golden("digits reinforce"),
    ),
    "validation copies kept": (
        *(images, "apart", lambda unlabeled, *given, **named: unlabeled),
        nothing_is_learned_from_what_is_selected_on,
    ),
    "copies in test not refused": (
        *(images, "compare_files", lambda *given, **named: None),
        a_test_picture_that_is_labeled_is_refused,
    ),
    "chosen by test": (train, "delivered", best_by_test, delivered_by_validation),
    "finetuned on changed pictures alone": (
        *(Pictures, "views", lambda *given: replace(VIEWS(*given), finetuned=VIEWS(*given).strong)),
        golden("images uda"),
    ),
    "resume skips a phase": (Trainer, "fit", skipping, resumed("images pseudo labels")),
    "labels of other pictures taken": (
        *(reduced_mpl, "refuse_other_pictures", lambda *given, **named: None),
        replaced_pictures_are_noticed,
    ),
    "average not kept": (
        *(Fitting, "options", lambda self: {**OPTIONS(self), "ema_decay": None}),
        golden("images uda"),
    ),
}


TESTED = ("ends_alike", "nothing_is_learned_from_what_is_selected_on")
"""Checks that are tests elsewhere, which would fail if they did not pass on what is there."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *planted, caught = FAULTS[fault]
    here, bent = (
        Here(colored_pictures(tmp_path / name / "pictures"), tmp_path / name / "run")
        for name in ("as_it_is", "bent")
    )
    if caught.__name__ not in TESTED:
        caught(here)
    monkeypatch.setattr(*planted)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        caught(bent)
