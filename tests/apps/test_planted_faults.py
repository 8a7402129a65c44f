"""The suite of the application can fail: each planted fault, bent as a mistake would be, is caught by a check."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import test_resume
from command import metapl, result
from test_bits import check, one_thread
from test_goldens import STORED, of_run, pictures
from tiny_runs import TINY

from metapl.apps import images, labeling, train
from metapl.apps.images import Pictures
from metapl.apps.launch import Processes
from metapl.apps.methods import Training
from metapl.apps.settings import Fitting
from metapl.training import FitResult
from metapl.training.selection import weights_of


@dataclass(frozen=True)
class Here:
    root: Path  # pictures
    out: Path


Fault = Callable[[pytest.MonkeyPatch], None]
Check = Callable[[Here], None]


# ----------------------------------------------------------------------------------------------------------- the faults


def one_stream_of_draws(patch: pytest.MonkeyPatch) -> None:
    real: Any = images.StepSampler
    patch.setattr(images, "StepSampler", lambda *given, **named: real(*given, **{**named, "stream": 0}))


def teacher_built_after_the_student(patch: pytest.MonkeyPatch) -> None:
    def exchanged(**own: Any) -> Training:
        return Training(**{**own, "teacher": own["student"], "student": own["teacher"]})

    patch.setattr(train, "Training", exchanged)


def seed_not_set_before_finetuning(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Processes, "seed", lambda self, network, seed: None)


def validation_copies_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(images, "apart", lambda unlabeled, val, say: unlabeled)


def copies_in_test_not_refused(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(images, "compare_files", lambda *given: None)


def chosen_by_test(patch: pytest.MonkeyPatch) -> None:
    def by_test(kept: Any, select: bool, rounds: bool) -> str:
        return str(max(kept, key=lambda name: kept[name].accuracies()["test_accuracy"]))

    patch.setattr(train, "delivered", by_test)


def finetuned_on_changed_pictures_alone(patch: pytest.MonkeyPatch) -> None:
    real = Pictures.views
    patch.setattr(Pictures, "views", lambda self: {**real(self), "finetuned": real(self)["strong"]})


def resume_skips_a_phase(patch: pytest.MonkeyPatch) -> None:
    real = train.fit

    def fit(trainer: Any, *sources: Any, **options: Any) -> FitResult:
        if options["resume"] and options["phase"] == "teacher":
            return FitResult(None, 0, weights_of(trainer.student))
        return real(trainer, *sources, **options)

    patch.setattr(train, "fit", fit)


def labels_of_other_pictures_taken(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(labeling, "refuse_other_pictures", lambda *given, **named: None)


def average_not_kept(patch: pytest.MonkeyPatch) -> None:
    real = Fitting.options
    patch.setattr(Fitting, "options", lambda self: {**real(self), "ema_decay": None})


# ----------------------------------------------------------------------------------------------------------- the checks


def golden(name: str) -> Check:
    def weights(here: Here) -> None:
        stored = json.loads(STORED.read_text())
        check(of_run(name, here.root, here.out), stored["runs"][name], stored["machine"], 5e-3)

    return weights


def resumed(kind: str) -> Check:
    """Killed in the phase after the first, before anything of it was saved."""

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
    """All unlabeled pictures are the labeled ones: those that are set aside leave."""
    for number in range(80):  # enough to be set aside
        for color in ("blue", "green", "red"):
            place = here.root / f"labeled/{color}/more-{number}.png"
            shutil.copy(here.root / f"labeled/{color}/{color}-1.png", place)
            place.write_bytes(place.read_bytes() + bytes([number, 1]))
    shutil.rmtree(here.root / "unlabeled")
    for file in here.root.glob("labeled/*/*.png"):
        (here.root / "unlabeled").mkdir(exist_ok=True)
        shutil.copy(file, here.root / f"unlabeled/{file.parent.name}-{file.name}")
    metapl(*images_command(here))
    data = json.loads((here.out / "data.json").read_text())
    assert len(data["validation"]) > 0
    assert data["unlabeled"] == len(data["labeled"])


def delivered_by_validation(here: Here) -> None:
    for seed in (2, 5):  # in one of them test would choose another
        out = here.out.with_name(f"run-{seed}")
        metapl(*TINY, "--steps", "10", "--finetune-steps", "10", "--seed", str(seed), "--out", out)
        found = result(out)
        best = max(found[f"{name}_validation_accuracy"] for name in ("student", "teacher", "finetuned"))
        assert found["validation_accuracy"] == best


def replaced_pictures_are_noticed(here: Here) -> None:
    """Under the same names, with the labels of the pictures that were there."""
    run, store = here.out, here.out.with_name("store")
    metapl(*images_command(here))
    metapl("label", run, here.root / "unlabeled", "--out", store)
    shutil.copy(here.root / "unlabeled/red-1.png", here.root / "unlabeled/blue-1.png")
    words = [*images_command(here)[:-1], str(run.with_name("other")), "--method", "reduced_mpl", "--labels", str(store)]
    words = [word for word in words if word not in ("--method", "uda")]
    words = [words[0], words[1], "reduced_mpl", *[word for word in words[2:] if word != "reduced_mpl"]]
    assert metapl(*words, code=None).returncode == 2


CAUGHT: dict[Fault, Check] = {
    one_stream_of_draws: golden("images uda"),
    teacher_built_after_the_student: golden("digits forward"),
    seed_not_set_before_finetuning: golden("digits reinforce"),
    validation_copies_kept: nothing_is_learned_from_what_is_selected_on,
    copies_in_test_not_refused: a_test_picture_that_is_labeled_is_refused,
    chosen_by_test: delivered_by_validation,
    finetuned_on_changed_pictures_alone: golden("images uda"),
    resume_skips_a_phase: resumed("images pseudo labels"),
    labels_of_other_pictures_taken: replaced_pictures_are_noticed,
    average_not_kept: golden("images uda"),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize("fault", CAUGHT, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_caught(fault: Fault, tmp_path: Path) -> None:
    """A check of goldens passes on what is there, or test_goldens.py fails."""
    for name in ("as it is", "bent")[CAUGHT[fault].__name__ == "weights" :]:
        here = Here(pictures(tmp_path / name / "pictures"), tmp_path / name / "run")
        with pytest.MonkeyPatch.context() as patch:
            if name == "as it is":
                CAUGHT[fault](here)
                continue
            fault(patch)
            with pytest.raises((AssertionError, pytest.fail.Exception)):
                CAUGHT[fault](here)
