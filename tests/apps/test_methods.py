"""One network on its own losses, and what the comparison's methods have in common and where they differ."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metapl
from metapl import CrossEntropy, MetaplError
from metapl.ablation import Altered
from metapl.apps.experiments.experiment import Experiment
from metapl.apps.experiments.folder import RunFolder
from metapl.apps.recipes import Digits, Feedback, Optimizer
from metapl.apps.recipes.methods import COMPARED, CONTROLS, METHODS
from metapl.feedback import Forward, ReinforcePerExample
from metapl.training import Trainer
from metapl.training.loss_trainer import LossTrainer

TINY = Digits(
    steps=6,
    hidden=(8,),
    labeled_batch=16,
    unlabeled_batch=12,
    finetune_steps=3,
    validate_every=3,
    log_every=1,
    save_every=3,
    dropout=0.2,
).with_method(student=Optimizer(lr=0.3, momentum=0.5))


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------------------- methods


@dataclasses.dataclass
class Watched:
    """What every trainer of one method was given, step by step."""

    trainers: list[Any] = dataclasses.field(default_factory=list)
    data: dict[int, list[Any]] = dataclasses.field(default_factory=dict)
    first: dict[int, list[dict[str, Tensor]]] = dataclasses.field(default_factory=dict)
    reports: dict[int, list[Any]] = dataclasses.field(default_factory=dict)


def watched(method: str, folder: Path, patch: pytest.MonkeyPatch, recipe: Digits = TINY) -> Watched:
    seen = Watched()
    for kind in (metapl.BilevelTrainer, LossTrainer):
        real = kind.step

        def step(self: Trainer, labeled: Any, unlabeled: Any = None, real: Any = real) -> Any:
            if self not in seen.trainers:
                seen.trainers.append(self)
            number = seen.trainers.index(self)
            if number not in seen.first:
                networks = [n for n in (self.teacher, self.student) if n is not None]
                seen.first[number] = [copied(network) for network in networks]
            seen.data.setdefault(number, []).append((labeled, unlabeled))
            report = real(self, labeled, unlabeled)
            seen.reports.setdefault(number, []).append(report)
            return report

        patch.setattr(kind, "step", step)
    result = Experiment(recipe, RunFolder(folder), progress=False, say=lambda _: None).run(method)
    assert result["method"] == method
    assert (folder / "student.safetensors").exists()
    return seen


def same_data(a: list[Any], b: list[Any]) -> bool:
    flat = [torch.utils._pytree.tree_leaves(one) for one in (a, b)]
    return len(flat[0]) == len(flat[1]) and all(x is y is None or torch.equal(x, y) for x, y in zip(*flat, strict=True))


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_without_feedback_the_loop_sees_the_same_batches_and_first_weights(
    labels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode: Any = "forward" if labels == "soft" else "reinforce"
    recipe = TINY.with_method(feedback=Feedback(mode=mode))
    found = {}
    for method in ("mpl", "none"):
        with monkeypatch.context() as patch:
            found[method] = watched(method, tmp_path / method, patch, recipe)
    mpl, none = found["mpl"], found["none"]
    assert len(mpl.trainers) == len(none.trainers) == 2  # training, finetuning
    assert all(same(a, b) for a, b in zip(mpl.first[0], none.first[0], strict=True))
    assert same_data(mpl.data[0], none.data[0])
    assert same_data(mpl.data[1], none.data[1])
    first = [one.reports[0][0] for one in (mpl, none)]
    assert torch.equal(first[0].signal.value, first[1].signal.value)  # the first labels are the same too
    assert first[0].signal.sampled == first[1].signal.sampled == (labels == "hard")
    assert all(float(report.feedback) == 0 for report in none.reports[0])
    assert not same(copied(mpl.trainers[0].teacher), copied(none.trainers[0].teacher))


@pytest.mark.parametrize(("method", "kind"), [("pseudo_labels", "soft"), ("pseudo_labels_hard", "hard")])
def test_a_fixed_teacher_is_trained_alone_and_then_does_not_move(
    method: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(method, tmp_path, monkeypatch)
    supervised, bilevel, tuner = seen.trainers
    assert isinstance(supervised, LossTrainer)
    assert isinstance(tuner, LossTrainer)
    assert isinstance(bilevel, metapl.BilevelTrainer)
    assert supervised.student is bilevel.teacher
    assert all(unlabeled is None for _, unlabeled in seen.data[0])
    assert same(copied(bilevel.teacher), seen.first[1][0])
    assert not same(copied(bilevel.teacher), seen.first[0][0])
    assert not same(copied(bilevel.student), seen.first[1][1])
    assert all(report.signal.sampled == (kind == "hard") for report in seen.reports[1])


@pytest.mark.parametrize(("method", "losses"), [("supervised", {"cross_entropy"}), ("uda", {"cross_entropy", "uda"})])
def test_one_network_learns_from_its_own_losses(
    method: str, losses: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(method, tmp_path, monkeypatch)
    assert set(seen.reports[0][0].as_dict()) == {"loss", *(f"loss_{name}" for name in losses)}
    assert all((unlabeled is None) == (method == "supervised") for _, unlabeled in seen.data[0])
    assert len(seen.data[0]) == TINY.steps
    assert len(seen.data[1]) == TINY.finetune_steps


@pytest.mark.parametrize("method", CONTROLS)
def test_controls_alter_the_feedback_of_the_first_step_and_nothing_else_in_it(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for one in ("mpl", method):
        with monkeypatch.context() as patch:
            found[one] = watched(one, tmp_path / one, patch)
    assert same_data(found["mpl"].data[0], found[method].data[0])
    plain, other = (found[one].reports[0][0] for one in ("mpl", method))
    assert torch.equal(plain.signal.value, other.signal.value)
    h, changed = plain.feedback, other.feedback
    assert not torch.equal(h, changed)
    if method == "class_means":
        torch.testing.assert_close(changed, h.mean(0).expand_as(h))
    elif method == "permuted":
        torch.testing.assert_close(changed.sort(0).values, h.sort(0).values)
    else:
        torch.testing.assert_close(changed.abs(), h.abs())
        assert all(torch.equal(b, a) or torch.equal(b, -a) for a, b in zip(h, changed, strict=True))
    assert isinstance(found[method].trainers[0].mode, Altered)


def test_controls_alter_hard_labels_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = TINY.with_method(feedback=Feedback(mode="reinforce_per_example"))
    seen = watched("class_means", tmp_path, monkeypatch, recipe)
    report = seen.reports[0][0]
    assert isinstance(seen.trainers[0].mode.base, ReinforcePerExample)
    for label in report.signal.value.unique():
        assert len(report.feedback[report.signal.value == label].unique()) == 1


def test_every_method_is_compared_or_a_control_or_asked_for_by_name() -> None:
    assert set(METHODS) == {
        *COMPARED,
        *CONTROLS,
        "pseudo_labels_hard",
        "label_smoothing",
        "supervised_everything",
        "fixmatch",
        "reduced_mpl",
        "reduced_none",
    }
    assert Altered().base == Forward()


def test_headroom_and_label_smoothing_train_on_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = watched("supervised_everything", tmp_path / "a", monkeypatch)
    task = TINY.task()
    assert everything.trainers[0].losses == (CrossEntropy(),)
    labels = torch.cat([task.everything[t][1] for t in range(19)])
    assert len(task.everything.images) == 1200
    assert labels.bincount().min() > 5 * TINY.labels_per_class
    smoothed = watched("label_smoothing", tmp_path / "b", monkeypatch)
    assert smoothed.trainers[0].losses == (CrossEntropy(label_smoothing=0.1),)
    plain = watched("supervised", tmp_path / "c", monkeypatch)
    assert plain.trainers[0].losses == (CrossEntropy(),)


def test_headroom_needs_the_labels_of_all(tmp_path: Path) -> None:
    run = Experiment(TINY.by("supervised_everything"), RunFolder(tmp_path))
    task = dataclasses.replace(TINY.task(), everything=None)
    with pytest.raises(MetaplError, match="true labels of all examples"):
        run.train(task)
