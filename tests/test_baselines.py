"""One network on its own losses, and what the comparison's methods have in common and where they differ."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import UDA, CrossEntropy, MetaplError
from metapl.distributed.ranks import ALONE
from metapl.experiments.experiment import Experiment
from metapl.feedback import Altered, Forward, ReinforcePerExample
from metapl.recipes import Digits, Feedback, Optimizer
from metapl.recipes.methods import COMPARED, CONTROLS, METHODS
from metapl.runs.folder import RunFolder
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
    student=Optimizer(lr=0.3, momentum=0.5),
)


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------------------------------------- LossTrainer


def test_a_step_is_torchs_own_on_the_sum_of_the_losses() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    theirs.load_state_dict(ours.state_dict())
    labeled = (torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1]))
    weak, strong = torch.randn(2, 6, 4).double()
    trainer = LossTrainer(
        ours,
        (CrossEntropy(label_smoothing=0.1), UDA(temperature=0.5, weight=2.0)),
        optimizer=torch.optim.SGD(ours.parameters(), lr=0.2, momentum=0.9),
        clip_norm=0.3,
    )
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.2, momentum=0.9)
    for _ in range(3):
        report = trainer.step(labeled, (weak, strong)).as_dict()
        supervised = F.cross_entropy(theirs(labeled[0]), labeled[1], label_smoothing=0.1)
        target = (theirs(weak) / 0.5).softmax(1).detach()
        consistency = 2.0 * F.cross_entropy(theirs(strong), target)
        optimizer.zero_grad()
        (supervised + consistency).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
        optimizer.step()
        assert report["loss"] == pytest.approx((supervised + consistency).item(), rel=1e-6)
        assert report["loss_cross_entropy"] == pytest.approx(supervised.item(), rel=1e-6)
        assert report["loss_uda"] == pytest.approx(consistency.item(), rel=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_two_losses_of_one_name_both_count() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    labeled = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    expected = 1.5 * F.cross_entropy(model(labeled[0]), labeled[1]).item()
    trainer = LossTrainer(
        model, (CrossEntropy(), CrossEntropy(weight=0.5)), optimizer=torch.optim.SGD(model.parameters())
    )
    report = trainer.step(labeled).as_dict()
    assert report["loss"] == pytest.approx(expected, rel=1e-6)
    assert report["loss_cross_entropy"] == pytest.approx(expected, rel=1e-6)


def test_a_trainer_without_losses_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(MetaplError, match="no losses"):
        LossTrainer(model, (), optimizer=torch.optim.SGD(model.parameters()))


def test_finetune_is_the_baseline_on_the_trainers_own_student(tmp_path: Path) -> None:
    labeled = [(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])) for _ in range(3)]
    ends = []
    for own in (True, False):
        torch.manual_seed(0)
        teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
        trainer = metapl.BilevelTrainer(teacher, student)
        if own:
            trainer.finetune(labeled, steps=4, out=tmp_path)
        else:
            optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
            LossTrainer(student, (CrossEntropy(),), optimizer=optimizer).fit(labeled, steps=4)
        ends.append(copied(student))
    assert same(*ends)
    assert (tmp_path / "checkpoints/finetune").is_dir()


# --------------------------------------------------------------------------------------------------- altered feedback


class Steps:
    """An estimator whose feedback is known."""

    name, labels, keep_graph, credits = "known", ("soft",), False, "signal"

    def __init__(self, h: Tensor, part: Any = "value") -> None:
        self.h, self.part = h, part

    def init(self) -> dict[str, Tensor]:
        return {}

    def feedback(self, path: Any, state: Any) -> Any:
        return [metapl.feedback.base.Feedback(self.h, self.part)], state


def altered(
    h: Tensor, how: Any, seed: int = 0, labels: Tensor | None = None, weights: Tensor | None = None
) -> list[Tensor]:
    """h as it is altered in four steps, on sampled labels or on a differentiable signal."""
    soft = torch.zeros(len(h)) if weights is None else weights
    signal = metapl.Signal(soft) if labels is None else metapl.Signal(labels, log_prob=torch.zeros(len(h)))
    step = type(
        "Step", (), {"signal": signal, "signal_has_rows": True, "student": type("Student", (), {"ranks": ALONE})}
    )
    estimator = Altered(Steps(h), how, seed)  # type: ignore[arg-type]
    state, found = estimator.init(), []
    for _ in range(4):
        (feedback,), state = estimator.feedback(type("Path", (), {"steps": [step]}), state)  # type: ignore[arg-type]
        found.append(feedback.h)
    return found


H = torch.tensor([[1.0, -1.0], [2.0, -2.0], [3.0, -3.0], [6.0, -6.0]])


def test_permuted_gives_the_rows_to_others() -> None:
    found = altered(H, "permuted")
    for one in found:
        assert sorted(one[:, 0].tolist()) == [1, 2, 3, 6]
        assert torch.equal(one[:, 1], -one[:, 0])
    assert len({tuple(one[:, 0].tolist()) for one in found}) > 1
    assert all(torch.equal(a, b) for a, b in zip(found, altered(H, "permuted"), strict=True))
    others = altered(H, "permuted", seed=1)
    assert any(not torch.equal(a, b) for a, b in zip(found, others, strict=True))


def test_class_means_leave_nothing_of_the_single_example() -> None:
    for one in altered(H, "class_means"):
        assert torch.equal(one, torch.tensor([[3.0, -3.0]] * 4))
    labels = torch.tensor([0, 1, 0, 1])
    for one in altered(torch.tensor([1.0, 2.0, 5.0, 8.0]), "class_means", labels=labels):
        assert one.tolist() == [3, 5, 3, 5]
    weights = torch.tensor([0.1, 0.2, 0.3, 0.3])  # equal weights are no class
    for one in altered(torch.tensor([1.0, 2.0, 5.0, 8.0]), "class_means", weights=weights):
        assert one.tolist() == [4, 4, 4, 4]


def test_random_sign_flips_whole_rows() -> None:
    found = torch.stack(altered(H, "random_sign"))
    signs = found[..., 0] / H[:, 0]
    assert torch.equal(found, H * signs[..., None])
    assert set(signs.flatten().tolist()) == {-1, 1}
    assert len({tuple(one.tolist()) for one in signs}) > 1


def test_alterations_leave_the_default_generator_alone() -> None:
    before = torch.get_rng_state()
    for how in ("permuted", "class_means", "random_sign"):
        altered(H, how)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_feedback_for_the_whole_batch_cannot_be_altered() -> None:
    for base, credits in ((metapl.feedback.Reinforce(), "batch"), (metapl.feedback.NoFeedback(), "nothing")):
        with pytest.raises(MetaplError, match=f'feedback on each example.*is "{credits}"'):
            Altered(base)


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
    recipe = dataclasses.replace(TINY, feedback=Feedback(mode=mode))
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
    recipe = dataclasses.replace(TINY, feedback=Feedback(mode="reinforce_per_example"))
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
    assert everything.trainers[0].losses == TINY.teacher_losses(uda=False)
    labels = torch.cat([task.everything[t][1] for t in range(19)])
    assert len(task.everything.images) == 1200
    assert labels.bincount().min() > 5 * TINY.labels_per_class
    smoothed = watched("label_smoothing", tmp_path / "b", monkeypatch)
    assert smoothed.trainers[0].losses == (CrossEntropy(label_smoothing=0.1),)
    plain = watched("supervised", tmp_path / "c", monkeypatch)
    assert plain.trainers[0].losses == (CrossEntropy(),)


def test_headroom_needs_the_labels_of_all(tmp_path: Path) -> None:
    run = Experiment(TINY, RunFolder(tmp_path))
    task = dataclasses.replace(TINY.task(), everything=None)
    with pytest.raises(MetaplError, match="true labels of all examples"):
        run.train("supervised_everything", task, TINY.network(), TINY.network())
