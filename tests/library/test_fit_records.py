"""What a fit writes and shows; one at a time writes to a folder."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import (
    OPTIONS,
    Counting,
    _one_thread,  # noqa: F401  # used by every test
    batches,
    bilevel,
    events,
    rows,
    single,
)
from forked import context

from metapl import MetaplError
from metapl.execution.ranks import ALONE
from metapl.runs import folder as folders
from metapl.training.records import figures

SCALARS = {
    "inner_loss",
    "outer_loss",
    "teacher_loss",
    "teacher_cross_entropy",
    "feedback_mean",
    "feedback_std",
    "feedback_snr",
    "pseudo_label_confidence",
    "pseudo_label_entropy",
    "agreement",
    "student_lr",
    "teacher_lr",
    "student_validation_accuracy",
    "teacher_validation_accuracy",
    "class_shares_vs_labeled",
}


def test_tensorboard_shows_what_the_rows_say_each_step_once(tmp_path: Path) -> None:
    """Also after a resume, whose lost steps are purged, and beside a second phase with the same step numbers."""
    labeled, unlabeled = batches(5)
    how: dict[str, Any] = {**OPTIONS, "steps": 17, "out": tmp_path, "log_every": 2}
    breaking = Counting(labeled, 9, lambda: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError, match="stop"):
        bilevel().fit(breaking, unlabeled, **how)
    trainer = bilevel()
    trainer.fit(labeled, unlabeled, resume=True, say=lambda _: None, **how)
    trainer.finetune(labeled, steps=6, out=tmp_path, log_every=1)
    found, logged = events(tmp_path / "tensorboard/fit"), rows(tmp_path)
    assert set(found.Tags()["scalars"]) >= SCALARS
    for name in SCALARS:
        shown = [(event.step, event.value) for event in found.Scalars(name)]
        assert shown == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in logged if name in row]
    assert [e.step for e in events(tmp_path / "tensorboard/finetune").Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_damaged_lines_are_left_out_and_a_torn_one_is_written_anew(tmp_path: Path) -> None:
    how: dict[str, Any] = {"schedule": "constant", "log_every": 1, "say": lambda _: None, "out": tmp_path}
    single().fit(batches(5)[0], steps=4, **how)
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"x" + file.read_bytes() + b'{"phase": "fit", "st')
    found = single().fit(batches(5)[0], steps=6, resume=True, **how)
    assert [row["step"] for row in rows(tmp_path)] == [row["step"] for row in found.history] == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("mode", ["forward", "reinforce_per_example", "reinforce"])
def test_figures_of_the_feedback_are_those_of_a_loop_by_hand(mode: str) -> None:
    labeled, unlabeled = (one[0] for one in batches(1))
    trainer = bilevel(mode)
    report = trainer.step(labeled, unlabeled)
    found = {name: float(t) for name, t in figures(report, trainer.problem, labeled, ALONE).items()}
    h, logits = report.feedback.double(), report.signal.outputs
    assert found["feedback_mean"] == pytest.approx(float(h.mean()), rel=1e-6)
    assert found["feedback_std"] == pytest.approx(float(h.std(correction=0)), rel=1e-6)
    q = logits.softmax(1).double()
    assert found["pseudo_label_entropy"] == pytest.approx(float(-(q * q.log()).sum(1).mean()), rel=1e-5)
    shares = torch.bincount(labeled[1], minlength=3) / len(labeled[1])
    assert found["class_shares_vs_labeled"] == pytest.approx(float((q.mean(0) - shares).abs().sum() / 2), rel=1e-5)
    if mode == "reinforce":
        assert "feedback_snr" not in found  # one number for all rows
        return
    z = logits.detach().double().requires_grad_()
    spoken = z.softmax(1) if h.ndim == 2 else z.log_softmax(1)[range(len(h)), report.signal.value.long()]
    [g] = torch.autograd.grad((h * spoken).sum(), z)
    mean, square, count = g.mean(0).square().sum(), g.square().sum(1).mean(), len(g)
    expected = float((count * mean - square) / (square - mean))
    assert math.isfinite(found["feedback_snr"])
    assert found["feedback_snr"] == pytest.approx(expected, rel=1e-4)


def held(out: Path, begun: Any) -> None:
    with folders.Folder(out).held():
        begun.set()
        time.sleep(60)


def test_a_folder_that_another_process_writes_to_is_refused_until_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "PATIENCE", 0.2)
    begun = context().Event()
    other = context().Process(target=held, args=(tmp_path, begun))
    other.start()
    begun.wait(60)
    with pytest.raises(MetaplError, match="process"):
        single().fit(batches(3)[0], steps=3, out=tmp_path)
    other.kill()
    other.join()
    single().fit(batches(3)[0], steps=3, out=tmp_path)
    folder = folders.Folder(tmp_path)
    with folder.held():  # which may be held again, as several phases in one folder do
        single().fit(batches(3)[0], steps=3, out=folder, phase="finetune")
    assert [row["step"] for row in rows(tmp_path, "finetune")] == [3]
