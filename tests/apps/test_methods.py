"""What each method trains with.

Its networks, losses, problem and feedback, on which batches, in which phases.
"""

import itertools
import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metapl import UDA, BilevelTrainer, CrossEntropy, LossTrainer, MetaplError, problems
from metapl.apps import digits, images
from metapl.apps.methods.base import Training
from metapl.apps.methods.feedback import Feedback
from metapl.apps.methods.uda import Consistency
from metapl.apps.settings import flag_values, with_flags, with_settings_of
from metapl.training import FitResult

STEPS = 2  # that are taken of each phase


@dataclass
class Phase:
    """What was fitted, on what, and what became of it in a few steps."""

    trainer: Any
    labeled: Any
    unlabeled: Any
    options: dict[str, Any]
    before: list[dict[str, Tensor]]  # the weights of teacher and student, or of the one network
    reports: list[Any]


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def phases_of(config: Any, method: Any, data: Any) -> list[Phase]:
    torch.manual_seed(0)
    teacher, student = config.network(), config.network()
    found: list[Phase] = []

    def fit(trainer: Any, labeled: Any, unlabeled: Any, **options: Any) -> FitResult:
        before = [
            weights(network)
            for network in (trainer.teacher, trainer.student)
            if network is not None
        ]
        torch.manual_seed(1)
        rows = [(labeled[t], None if unlabeled is None else unlabeled[t]) for t in range(STEPS)]
        reports = [trainer.step(*row) for row in rows]
        found.append(Phase(trainer, labeled, unlabeled, options, before, reports))
        return FitResult(None, STEPS, weights(trainer.student))

    def label(network: nn.Module) -> dict[str, Tensor]:
        # Whoever labels was trained before.
        assert any(network is trained for trained in (teacher, *(p.trainer.student for p in found)))
        rows = len(data.unlabeled.images)
        return {"unlabeled": torch.eye(10)[torch.arange(rows) % 10]}

    unused: Any = None
    training = Training(
        config=config,
        data=data,
        teacher=teacher,
        student=student,
        fit=fit,
        label=label,
        read_labels=unused,
    )
    ended = method.scheduled(config.fitting.steps).train(training)
    assert ended.trainer is found[-1].trainer
    # What is kept is of the network that its card tells.
    if ended.teacher is not None and ended.teacher[1]:
        ended.configs.get("teacher", config).network().load_state_dict(ended.teacher[1])
    return found


FITTING = digits.fitting(steps=8, labeled_batch=10, seed=3)
DIGITS = digits.Digits(hidden=(8,), unlabeled_batch=12, fitting=FITTING)
DATA = DIGITS.data(lambda text: None, progress=False, log=None)


def trained(method: Any, config: Any = DIGITS) -> list[Phase]:
    return phases_of(config, method, DATA)


@pytest.mark.parametrize("of", [images, digits])
def test_a_method_says_the_name_by_which_it_is_asked_for(of: Any) -> None:
    assert {name: method.name for name, method in of.METHODS.items()} == {
        name: name for name in of.METHODS
    }
    titles = [method.title for method in of.METHODS.values()]
    assert len({*titles}) == len(titles)
    assert {*of.COMPARED} <= {*of.METHODS}
    for method in of.METHODS.values():
        json.dumps(flag_values(method))
        assert flag_values(method).keys() & flag_values(DIGITS).keys() == set(), (
            "flags of the command"
        )
        assert with_flags(method, **flag_values(method)) == method


@pytest.mark.parametrize("of", [images, digits])
def test_every_method_fits_into_any_number_of_steps_with_a_value_for_each_setting(of: Any) -> None:
    for method, steps in itertools.product(of.METHODS.values(), (1, 2, 3, 19, 1000)):
        found = method.scheduled(steps)
        assert found.scheduled(steps) == found
        have = flag_values(found)
        assert have.get("wait", 0) < steps
        assert have.get("uda_start", 0) + have.get("uda_ramp", 0) <= steps


def test_settings_that_cannot_be_are_refused() -> None:
    for word, make in {
        "psychic": lambda: Feedback(mode="psychic"),
        "uda_threshold": lambda: Consistency(uda_threshold=1.5),
        "prior": lambda: Consistency(uda_prior=(0.5, 0.2)),
        "labels": lambda: with_flags(images.METHODS["reduced_mpl"], labeled_label_store="here"),
    }.items():
        with pytest.raises(MetaplError, match=word):
            make()


def test_a_method_that_is_compared_has_the_settings_that_were_given_to_the_first() -> None:
    usual = digits.METHODS["mpl"]
    own = with_flags(usual, uda_weight=2.0, mode="difference", wait=3)
    assert with_settings_of(digits.METHODS["none"], own, usual) == with_flags(
        own, learns_from_student=False
    )
    assert with_settings_of(digits.METHODS["uda"], own, usual) == with_flags(
        digits.METHODS["uda"], uda_weight=2.0
    )
    assert (
        with_settings_of(digits.METHODS["supervised"], own, usual) == digits.METHODS["supervised"]
    )


ALONE = {
    "supervised": (CrossEntropy(),),
    "uda": (CrossEntropy(), UDA()),
    "fixmatch": (CrossEntropy(), UDA(temperature=0.0, threshold=0.85)),
}


@pytest.mark.parametrize("name", ALONE)
def test_one_network_learns_as_a_loss_trainer_with_these_losses_does(name: str) -> None:
    (phase,) = trained(digits.METHODS[name])
    assert phase.trainer.losses == ALONE[name]
    assert phase.labeled is (DATA.labeled)
    assert phase.unlabeled is (DATA.unlabeled if len(ALONE[name]) > 1 else None)
    torch.manual_seed(0)
    network = DIGITS.network()
    plain = LossTrainer(network, ALONE[name], optimizer=DIGITS.optimizer("teacher", network))
    for t in range(STEPS):
        plain.step(phase.labeled[t], None if phase.unlabeled is None else phase.unlabeled[t])
    assert same(weights(phase.trainer.student), weights(network))
    assert not same(weights(network), phase.before[0])


@pytest.mark.parametrize("mode", ["forward", "reinforce"])
def test_meta_pseudo_labels_are_a_bilevel_trainer_of_both_networks(mode: Any) -> None:
    method = with_flags(digits.METHODS["mpl"], mode=mode, uda_weight=0.5, feedback_weight=2.0)
    (phase,) = trained(method)
    assert phase.options == {"wait": 0, "warm_start": False, "warmup": 0}
    torch.manual_seed(0)
    teacher, student = DIGITS.network(), DIGITS.network()
    plain = BilevelTrainer(
        *(teacher, student, mode),
        problem=problems.PseudoLabels(),
        teacher_losses=(CrossEntropy(), UDA(weight=0.5)),
        inner_optimizer=DIGITS.optimizer("student", student),
        outer_optimizer=DIGITS.optimizer("teacher", teacher),
        feedback_weight=2.0,
        verify=False,
    )
    torch.manual_seed(1)
    for t in range(STEPS):
        plain.step(DATA.labeled[t], DATA.unlabeled[t])
    for role, alone in (("student", student), ("teacher", teacher)):
        assert same(weights(getattr(phase.trainer, role)), weights(alone))
    # A student that waits warms up over its share of the steps.
    (phase,) = trained(with_flags(method, wait=6, warm_start=True), with_flags(DIGITS, warmup=4))
    assert phase.options == {"wait": 6, "warm_start": True, "warmup": 1}


@pytest.mark.parametrize("mode", ["forward", "reinforce"])
def test_without_feedback_the_same_loop_sees_the_same_labels_and_the_teacher_learns_on_its_own(
    mode: Any,
) -> None:
    (whole,), (none,) = (
        trained(with_flags(digits.METHODS[name], mode=mode)) for name in ("mpl", "none")
    )
    assert all(same(a, b) for a, b in zip(whole.before, none.before, strict=True))
    assert torch.equal(whole.reports[0].signal.value, none.reports[0].signal.value)
    assert (
        whole.reports[0].signal.sampled == none.reports[0].signal.sampled == (mode == "reinforce")
    )
    assert all(float(report.feedback) == 0 for report in none.reports)
    assert not same(weights(none.trainer.teacher), none.before[0])
    assert not same(weights(whole.trainer.teacher), weights(none.trainer.teacher))


@pytest.mark.parametrize("hard", [False, True])
def test_a_fixed_teacher_learns_alone_and_then_stays_as_it_is(hard: bool) -> None:
    alone, student = trained(
        with_flags(digits.METHODS["pseudo_labels"], pseudo_labels="hard" if hard else "soft")
    )
    assert (alone.options, alone.unlabeled, alone.trainer.losses) == (
        {"phase": "teacher"},
        None,
        (CrossEntropy(),),
    )
    assert alone.trainer.student is student.trainer.teacher
    assert not same(alone.before[0], student.before[0])
    assert same(weights(student.trainer.teacher), student.before[0])
    assert not same(weights(student.trainer.student), student.before[1])
    assert all(report.signal.sampled == hard for report in student.reports)


@pytest.mark.parametrize("name", ["reduced_mpl", "reduced_none"])
def test_stored_labels_are_adjusted_by_a_small_network(name: str) -> None:
    teacher, student = trained(digits.METHODS[name])
    assert teacher.options == {"phase": "teacher"}
    assert isinstance(student.trainer.problem, problems.ReducedLabels)
    assert student.trainer.teacher is not teacher.trainer.student
    assert student.unlabeled.stored.shape == (1180, 10)
    assert student.options["truth"] is None
    moved = not same(weights(student.trainer.teacher), student.before[0])
    assert moved == (name == "reduced_mpl")
