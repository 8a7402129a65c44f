"""An ablation's settings that are varied, its short trainings, its controls and its reasons."""

from __future__ import annotations

import inspect
import json
import time
from typing import Any

import pytest
import torch
from problems_zoo import everything, same, toy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import metapl
from metapl import MetaplError
from metapl.ablation import Distance, ModeCost, Outcome, Sweep, ablate
from metapl.ablation.gradients import _seconds, sibling
from metapl.feedback import Altered, Difference, Forward

QUICK: dict[str, Any] = {"rounds": 1, "draws": 2}


def trainer_for(student: str = "mlp", mode: Any = "forward", **options: Any) -> tuple[Any, metapl.BilevelTrainer]:
    problem = toy(student, dtype=torch.float32, rows=16)
    return problem, metapl.BilevelTrainer(**problem.networks(), mode=mode, **options)


def swept(found: Sweep | str, mode: str) -> list[Distance]:
    assert isinstance(found, Sweep)
    row = [one for one in found.modes[mode] if isinstance(one, Distance)]
    assert len(row) == len(found.values)
    return row


# ------------------------------------------------------------------------------------------------------------ stability


def test_the_settings_are_varied_against_the_exact_gradient_with_the_same_setting() -> None:
    problem, trainer = trainer_for(problem=metapl.PseudoLabels(temperature=2.0))
    before, random = everything(problem), torch.get_rng_state()
    modes = ["forward", "difference", "reinforce", "none"]
    found = ablate(trainer, problem.labeled, problem.unlabeled, modes, stability=True, rounds=1, draws=12)
    assert same(before, everything(problem))
    assert torch.equal(random, torch.get_rng_state())
    assert [*found.stability] == ["epsilon", "temperature", "batch_size"]
    epsilon, temperature, size = (found.stability[name] for name in found.stability)
    assert isinstance(epsilon, Sweep)
    assert isinstance(temperature, Sweep)
    assert isinstance(size, Sweep)
    assert epsilon.values == pytest.approx((2e-5, 2e-4, 2e-3, 2e-2))
    assert [*epsilon.modes] == ["difference"]
    errors = [one.relative_error for one in swept(epsilon, "difference")]
    assert errors[0] > 10 * errors[2]  # rounding
    assert temperature.values == (0.5, 1.0, 2.0, 4.0)
    assert size.values == (2, 4, 8, 16)
    assert [*size.modes] == ["forward", "difference", "reinforce"]
    for sweep in (temperature, size):
        assert max(one.of_one_draw for one in swept(sweep, "forward")) < 1e-5
        assert min(one.noise_to_signal for one in swept(sweep, "reinforce")) > 0.2
    # The values that the trainer has are those of the modes themselves.
    own = found.modes["difference"]
    assert isinstance(own, ModeCost)
    for sweep, place in ((epsilon, 2), (temperature, 2), (size, 3)):
        assert swept(sweep, "difference")[place].relative_error == pytest.approx(own.relative_error)
    # A part of the batch is the batch of its first examples.
    part = ablate(trainer, problem.labeled, problem.unlabeled[:4], ["difference"], rounds=1, altered=False)
    four = part.modes["difference"]
    assert isinstance(four, ModeCost)
    assert swept(size, "difference")[1].relative_error == pytest.approx(four.relative_error)
    assert four.relative_error != pytest.approx(own.relative_error)


def test_a_temperature_changes_the_gradient_that_is_compared_with() -> None:
    """Hard labels of the wrong temperature would not have the exact gradient's direction."""
    problem, trainer = trainer_for()
    from metapl.ablation.gradients import Point, sibling

    def exact(temperature: float) -> Tensor:
        one = sibling(trainer, problem=metapl.PseudoLabels(temperature=temperature))
        return Point(one, problem.labeled, problem.unlabeled).exact()

    by_hand = metapl.hypergradient(
        problem.teacher,
        problem.student,
        labeled=problem.labeled,
        unlabeled=problem.unlabeled,
        mode="unrolled",
        problem=metapl.PseudoLabels(temperature=0.5),
        inner_optimizer=trainer.inner_optimizer,
    )
    assert torch.allclose(exact(0.5).float(), torch.cat([g.flatten() for g in by_hand.grads.values()]))
    assert not torch.allclose(exact(0.5), exact(1.0), rtol=0.1)


class Weighted:
    """A problem of one's own, without a temperature: the teacher weighs the examples."""

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> metapl.Signal:
        return metapl.Signal(teacher(batch[0])[:, 0].sigmoid())

    def inner_loss(self, outputs: Tensor, signal: metapl.Signal, batch: Any, params: Any = None) -> Tensor:
        return signal.value * nn.functional.cross_entropy(outputs, batch[1], reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


def test_what_a_model_does_not_have_is_not_varied_and_said() -> None:
    problem, trainer = trainer_for(problem=Weighted())
    inner = (problem.unlabeled[:3], torch.arange(3) % 3)
    found = ablate(trainer, problem.labeled, inner, ["forward", "reinforce"], stability=True, **QUICK)
    content = found.as_dict()["stability"]
    assert content["epsilon"] == {"reason": "none of the modes takes a finite difference, so there is no step size."}
    assert content["temperature"] == {"reason": "the problem Weighted has no temperature."}
    assert "fewer than four examples" in content["batch_size"]["reason"]
    assert "temperature of the pseudo-labels: not varied, the problem Weighted has" in found.table()
    refusal = str(found.modes["reinforce"])
    assert "is for sampled signals, and the problem's signal is differentiable" in refusal
    assert refusal.endswith("expected one of the modes unrolled, forward, difference, implicit, none.")


def test_labels_that_are_drawn_for_an_exact_mode_make_noise() -> None:
    problem, trainer = trainer_for(problem=metapl.PseudoLabels(kind="hard"))
    found = ablate(trainer, problem.labeled, problem.unlabeled, ["unrolled", "forward"], rounds=1, draws=6)
    hard = found.modes["forward"]
    assert isinstance(hard, ModeCost)
    assert hard.noise_to_signal > 1e-4
    assert 1e-3 < hard.relative_error < 0.5  # beside the exact gradient of soft labels
    assert "takes soft labels" in str(found.modes["unrolled"])


# ------------------------------------------------------------------------------------------------------ short trainings


def test_every_mode_trains_from_the_same_start_on_the_same_batches() -> None:
    """What the table says of ``none`` is what a training by hand ends with."""
    problem, trainer = trainer_for("dropout", mode="reinforce", teacher_losses=())
    outer = [(torch.randn(8, 1, 4, 4), torch.arange(8) % 3) for _ in range(3)]
    inner = [torch.randn(8, 1, 4, 4) for _ in range(5)]
    validation = torch.randn(30, 1, 4, 4), torch.arange(30) % 3
    before, state = everything(problem), trainer.state_dict()
    options: dict[str, Any] = {"train_steps": 3, "train_seeds": (0, 2), "validation": validation, **QUICK}
    found = ablate(trainer, outer, inner, ["forward", "unrolled", "reinforce", "none"], **options)
    assert same(before, everything(problem))
    assert found.trainings is not None
    ends = {name: mode for name, mode in found.trainings.modes.items() if isinstance(mode, Outcome)}
    assert [*ends] == ["forward", "unrolled", "reinforce", "none", *found.altered]
    assert ends["forward"].outer_loss == pytest.approx(ends["unrolled"].outer_loss, rel=1e-5)
    assert ends["forward"].outer_loss != ends["none"].outer_loss

    other = metapl.BilevelTrainer(**problem.networks(), mode="none", teacher_losses=())
    torch.manual_seed(2)
    for t in range(6, 9):
        other.step(outer[t % 3], inner[t % 5])
    other.student.eval()
    x, y = outer[9 % 3]
    assert float(nn.functional.cross_entropy(other.student(x), y).detach()) == pytest.approx(ends["none"].outer_loss[1])
    assert ends["none"].accuracy is not None
    assert other.evaluate(validation).accuracy == pytest.approx(ends["none"].accuracy[1])
    trainer.load_state_dict(state)


def test_trainings_of_a_regression_are_measured_by_its_loss_or_any_metric() -> None:
    class Weighted(metapl.BilevelProblem):
        def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> metapl.Signal:
            return metapl.Signal(teacher(batch[2])[:, 0].sigmoid())

        def inner_loss(self, outputs: Any, signal: Any, batch: Any, params: Any = None) -> Any:
            return signal.value * (outputs - batch[1]).square().sum(1)

        def outer_loss(self, outputs: Any, batch: Any) -> Any:
            return (outputs - batch[1]).square().mean()

    def error(outputs: Any, batch: Any) -> Any:
        return (outputs - batch[1]).abs().mean()

    x = torch.randn(12, 4)
    y = x[:, :2] + 1
    student, held = nn.Linear(4, 2), (torch.randn(7, 4), torch.zeros(7, 2))
    trainer = metapl.BilevelTrainer(nn.Embedding(12, 1), student, "none", problem=Weighted(), teacher_losses=())
    sources = [(x, y)], [(x, y, torch.arange(12))]
    options: dict[str, Any] = {"train_steps": 3, "train_seeds": (0,), "validation": held, "altered": False, **QUICK}
    found = {metric: ablate(trainer, *sources, ["none"], metric=metric, **options) for metric in (None, "loss", error)}
    for _ in range(3):
        trainer.step(sources[0][0], sources[1][0])
    for metric, one in found.items():
        assert one.trainings is not None
        assert isinstance(end := one.trainings.modes["none"], Outcome)
        expected = trainer.evaluate(held, metric=metric)
        assert (end.value if metric is error else end.validation_loss) == pytest.approx((expected.value,))
        assert (one.trainings.metric, end.accuracy) == (expected.metric, None)
        assert ("  error" if metric is error else "  val. loss") in one.table()
    with pytest.raises(MetaplError, match="the metric 'error' was given without validation data"):
        ablate(trainer, *sources, metric=error)


def test_a_loader_is_shuffled_by_the_seed_and_means_have_standard_errors() -> None:
    _, trainer = trainer_for()
    data = TensorDataset(torch.randn(64, 1, 4, 4), torch.arange(64) % 3)
    labeled = DataLoader(data, batch_size=8, shuffle=True)
    options: dict[str, Any] = {"train_steps": 2, "train_seeds": (0, 1, 2), "altered": False, **QUICK}
    found = ablate(trainer, labeled, metapl.data.without_labels(labeled), ["forward", "none"], **options)
    content = json.loads(found.to_json())["trainings"]
    assert (content["steps"], content["seeds"]) == (2, [0, 1, 2])
    loss = content["modes"]["forward"]["outer_loss"]
    assert len(set(loss["values"])) == 3
    assert loss["mean"] == pytest.approx(sum(loss["values"]) / 3)
    deviation = torch.tensor(loss["values"], dtype=torch.float64).std()
    assert loss["standard_error"] == pytest.approx(float(deviation) / 3**0.5)
    assert content["modes"]["forward"]["accuracy"] is None
    assert "trainings of 2 steps from the same start, 3 seeds" in found.table()
    with pytest.raises(MetaplError, match="labeled is an iterator"):
        ablate(trainer, iter(labeled), labeled, ["forward"], **options)


def test_a_mode_that_cannot_train_so_is_told() -> None:
    """Micro-batches and double backward exclude each other, which one gradient does not show."""
    problem, trainer = trainer_for(mode="forward", accumulate=2)
    labeled, unlabeled = tuple(part[:16] for part in problem.labeled), problem.unlabeled
    found = ablate(trainer, labeled, unlabeled, ["forward", "unrolled"], train_steps=1, train_seeds=(0,), **QUICK)
    assert found.trainings is not None
    assert "accumulate=2 with mode 'unrolled'" in str(found.trainings.modes["unrolled"])
    assert isinstance(found.modes["unrolled"], ModeCost)


# ----------------------------------------------------------------------------------------------------- altered feedback


def test_the_feedback_of_the_first_mode_that_runs_is_altered() -> None:
    problem, trainer = trainer_for()
    found = ablate(trainer, problem.labeled, problem.unlabeled, ["none", "difference", "unrolled"], rounds=1, draws=20)
    assert [*found.altered] == ["difference_permuted", "difference_class_means", "difference_random_sign"]
    figures = {name: mode for name, mode in found.altered.items() if isinstance(mode, ModeCost)}
    assert figures["difference_class_means"].noise_to_signal == 0
    assert figures["difference_class_means"].relative_error > 0.01
    signs = figures["difference_random_sign"]
    assert signs.noise_to_signal > 0.3  # drawn anew for every draw
    assert abs(signs.cosine) < 0.9
    assert "difference_permuted" not in found.recommendation
    assert not set(found.altered) & set(found.modes)
    assert not ablate(trainer, problem.labeled, problem.unlabeled, ["reinforce"], **QUICK).altered
    assert not ablate(trainer, problem.labeled, problem.unlabeled, ["forward"], altered=False, **QUICK).altered


def test_altered_feedback_can_be_named_too() -> None:
    problem, trainer = trainer_for()
    own = Altered(Forward(), "permuted")
    found = ablate(trainer, problem.labeled, problem.unlabeled, ["forward", own], **QUICK)
    assert [*found.altered] == ["forward_permuted", "forward_class_means", "forward_random_sign"]


# ------------------------------------------------------------------------------------------------ modes that cannot run


class Rounding(torch.autograd.Function):
    """Straight through: no derivative in forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Straight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Rounding.apply(self.first(x.flatten(1))))


def test_straight_through_rounding_leaves_double_backward() -> None:
    """A difference sees the steps of the rounding, which the derivative passes over."""
    problem = toy("mlp", dtype=torch.float32, rows=16)
    trainer = metapl.BilevelTrainer(problem.teacher, Straight())
    found = ablate(trainer, problem.labeled, problem.unlabeled, **QUICK)
    assert found.recommended == "unrolled"
    assert "no other of these modes is exact to rounding" in found.recommendation
    reason = found.modes["forward"]
    assert isinstance(reason, str)
    assert "You must implement the jvp function" in reason
    assert json.loads(found.to_json())["modes"]["forward"] == {"reason": reason}
    # On the terminal it is whole too, in lines of 80 letters.
    table = found.table()
    assert max(map(len, table.splitlines())) <= 80
    assert " ".join(reason.split()) in " ".join(table.split())
    lines = {line.split()[0]: line for line in table.splitlines() if line}
    assert lines["forward"].endswith("cannot run on this model [1]")
    assert lines["difference"].endswith("cannot run on this model [2]")
    assert lines["reinforce_per_example"].endswith("cannot run on this model [3]")
    assert lines["implicit"].endswith("cannot run on this model [4]")
    # Of the modes whose feedback can be altered, the one that runs.
    assert isinstance(found.altered["unrolled_permuted"], ModeCost)


class TooLarge(Difference):
    """Asks for more memory than there is."""

    def feedback(self, path: Any, state: Any) -> Any:
        raise MemoryError


def test_a_mode_that_memory_does_not_suffice_for_is_told() -> None:
    problem, trainer = trainer_for()
    found = ablate(trainer, problem.labeled, problem.unlabeled, ["forward", TooLarge()], **QUICK)
    assert found.modes["difference"] == "the memory of this machine does not suffice for it."


class Overwriting(nn.Module):
    """Changes what a backward pass needs: an error of the model's own, in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1)).relu_()
        hidden[:, 0] *= 2
        return self.last(hidden)


def test_an_error_in_the_model_is_said_once() -> None:
    problem = toy("mlp", dtype=torch.float32)
    trainer = metapl.BilevelTrainer(problem.teacher, Overwriting())
    with pytest.raises(MetaplError, match="modified by an inplace operation") as caught:
        ablate(trainer, problem.labeled, problem.unlabeled)
    assert str(caught.value).count("inplace operation") == 1
    assert "by double backward and by forward mode, RuntimeError" in str(caught.value)


def test_several_steps_ahead() -> None:
    problem, trainer = trainer_for(lookahead=2)
    found = ablate(trainer, [problem.labeled], [problem.unlabeled] * 3, stability=True, rounds=1)
    ran = {name for name, mode in found.modes.items() if isinstance(mode, ModeCost)}
    assert ran == {"unrolled", "forward", "none"}
    assert "looks one student step ahead" in str(found.modes["difference"])
    assert max(one.of_one_draw for one in swept(found.stability["batch_size"], "forward")) < 1e-5
    assert found.recommended in ("unrolled", "forward")


def test_a_problem_without_a_teacher_is_compared_and_trained_too() -> None:
    problem = toy("mlp", dtype=torch.float32, rows=16)
    trainer = metapl.BilevelTrainer(None, problem.student, "forward", problem=metapl.problems.LearningToReweight())
    inner = problem.unlabeled, torch.arange(16) % 3
    options: dict[str, Any] = {"stability": True, "train_steps": 2, "train_seeds": (0,), **QUICK}
    found = ablate(trainer, problem.labeled, inner, ["forward", "difference", "none"], **options)
    assert found.recommended == "forward"
    assert max(one.of_one_draw for one in swept(found.stability["batch_size"], "difference")) < 0.01
    assert found.trainings is not None
    ran = {name for name, mode in found.trainings.modes.items() if isinstance(mode, Outcome)}
    assert ran >= {"forward", "difference"}


OPTIONS: dict[str, dict[str, Any]] = {
    "weight": {"feedback_weight": 2.0, "lookahead": 2, "recompute_teacher": True, "clip_norm": 0.5},
    "ratio": {"feedback_ratio": 0.5, "precision": "bfloat16", "compile": True},
    "parts": {"accumulate": 2},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_sibling_has_every_setting_of_its_trainer(kind: str) -> None:
    problem = toy("mlp", dtype=torch.float32)
    networks = {"teacher": problem.teacher, "student": problem.student}
    optimizers = {
        "inner_optimizer": torch.optim.SGD(problem.student.parameters(), lr=0.3),
        "outer_optimizer": torch.optim.SGD(problem.teacher.parameters(), lr=0.2),
    }
    values: dict[str, Any] = {
        "problem": metapl.PseudoLabels(temperature=2.0),
        "teacher_losses": (metapl.CrossEntropy(),),
    }
    options = {**optimizers, **values, "generator": torch.Generator(), **OPTIONS[kind]}
    trainer = metapl.BilevelTrainer(**networks, mode=Forward(truncate=1), **options)
    made = sibling(trainer)
    arguments = {*inspect.signature(metapl.BilevelTrainer).parameters}
    assert arguments == {*networks, "mode", *options}.union(*OPTIONS.values())
    for name in arguments - {"problem"}:
        assert getattr(made, name) == getattr(trainer, name), name
    assert made.given_problem is trainer.given_problem
    other = sibling(trainer, mode="none", problem=metapl.PseudoLabels())
    assert (other.mode.name, other.given_problem) == ("none", metapl.PseudoLabels())


def test_a_call_that_waits_for_a_core_is_timed_by_what_it_computes() -> None:
    def preempted() -> None:
        time.sleep(0.2)

    assert _seconds(preempted, torch.device("cpu")) < 0.1
