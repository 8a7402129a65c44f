"""Whether the feedback is alive: means over the last steps, and what the rows of a fit have of them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems_zoo import toy
from sharded_cases import OfTokens
from trainers import trainer_for

import metapl
from metapl.execution.ranks import ALONE
from metapl.feedback.teacher import ENTRIES, NEWEST, Means, figures, updated
from metapl.metrics.metric import ACCURACY
from metapl.training.selection import Selection

STEP: Any = SimpleNamespace(signal=metapl.Signal(torch.zeros(2)), problem=metapl.problems.Problem)
"""Of a problem without classes."""


def _followed(gradients: torch.Tensor) -> Means:
    kept: Means = {}
    for g in gradients:
        kept = updated(kept, [g], STEP, None, ALONE)
    return kept


def _snr(gradients: torch.Tensor) -> float:
    return float(figures(_followed(gradients))["feedback_snr"])


def test_the_signal_to_noise_of_a_few_steps_is_the_unbiased_estimate() -> None:
    """(‖mean‖² − tr Var / n) / tr Var with the variances of n − 1 degrees of freedom, whatever the feedback's size."""
    gradients = 0.3 + torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = gradients.var(0).sum()
    expected = float((gradients.mean(0).square().sum() - noise / 40) / noise)
    assert _snr(gradients) == pytest.approx(expected)
    assert _snr(1e-6 * gradients) == pytest.approx(expected)
    assert "feedback_snr" not in figures(_followed(gradients[:1]))


@pytest.mark.parametrize("snr", [0.0, 0.2, 5.0])
def test_the_signal_to_noise_of_many_steps_is_that_of_the_last_ones(snr: float) -> None:
    """Its mean over fresh draws, behind steps that were otherwise."""
    draws = torch.Generator().manual_seed(1)
    found = []
    for _ in range(20):
        before, now = torch.randn(2, 400, 8, dtype=torch.float64, generator=draws)
        found.append(_snr(torch.cat([before - 3.0, now + math.sqrt(snr)])))
    assert sum(found) / 20 == pytest.approx(snr, rel=0.1, abs=0.01)


def test_the_weights_of_the_steps_are_known() -> None:
    """By gradients each of which has an entry of its own."""
    kept = _followed(torch.eye(120, dtype=torch.float64))
    assert float(kept["feedback"].sum()) == pytest.approx(1)
    assert kept["feedback"][-1] == NEWEST
    assert kept["spread"] == pytest.approx(float(kept["feedback"].square().sum()))
    assert float(_followed(torch.eye(30))["feedback"].std()) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"feedback_ratio": 0.5}], ids=str)
@pytest.mark.parametrize("mode", ["forward", "reinforce"])
def test_the_gradient_is_that_in_the_bias_of_the_teachers_last_layer(mode: str, options: dict[str, Any]) -> None:
    """Of the whole batch and at weight 1, whatever the weight."""
    case = toy("mlp")
    options = options if "accumulate" in options else {**options, "teacher_losses": (metapl.CrossEntropy(),)}
    trainer = trainer_for(case, mode, generator=torch.Generator().manual_seed(3), **options)
    batches = tuple(t[:4] for t in case.labeled), case.unlabeled
    g = trainer.hypergradient(*batches, generator=torch.Generator().manual_seed(3)).grads["3.bias"]
    trainer.step(*batches)
    torch.testing.assert_close(trainer.recent["feedback"][: len(g)], g)
    assert not trainer.recent["feedback"][len(g) :].any()
    assert not trainer.recent["feedback"].requires_grad
    trainer.step(*batches)
    assert math.isfinite(trainer.step(*batches).feedback_snr)


def test_no_graph_is_kept_from_step_to_step() -> None:
    case = toy("mlp")
    trainer = trainer_for(case, "unrolled")
    trainer.step(**case.data())
    assert not any(trainer.recent[name].requires_grad for name in ("feedback", "shares"))


def test_without_feedback_there_is_no_signal_to_noise() -> None:
    case = toy("mlp")
    trainer = trainer_for(case, "none")
    for _ in range(3):
        report = trainer.step(**case.data())
    assert report.as_dict().get("feedback_snr", 0) == 0
    assert 0 <= report.class_shares_vs_labeled <= 1


def test_the_class_frequencies_are_compared_with_those_of_the_labels() -> None:
    case = toy("mlp")
    trainer = trainer_for(case, "forward")
    off = []
    for _ in range(2):
        report = trainer.step(**case.data())
        off.append(report.signal.value.mean(0) - torch.eye(3, dtype=torch.float64)[case.labeled[1]].mean(0))
    assert report.class_shares_vs_labeled == pytest.approx(float((off[0] + off[1]).abs().sum() / 4))


def test_and_with_those_of_the_truth_where_it_is_known() -> None:
    predicted, true = torch.eye(3)[[0, 0, 0, 1, 2]], torch.tensor([0, 1, 2, 2, 1])
    looks = Selection(trainer_for(toy("mlp")), (predicted, true), (predicted, true), ACCURACY)
    found = looks.look(None, None, torch.nn.Identity(), 1)
    assert found["class_shares_vs_truth"] == pytest.approx((abs(3 - 1) + abs(1 - 2) + abs(1 - 2)) / 2 / 5)
    assert found["pseudo_label_accuracy"] == pytest.approx(1 / 5)


def test_a_trainer_goes_on_with_its_means() -> None:
    """And from a state of an earlier version, which had none."""
    runs = [toy("mlp"), toy("mlp"), toy("mlp")]
    first, second, third = (trainer_for(case, "forward") for case in runs)
    for _ in range(3):
        first.step(**runs[0].data())
    state = first.state_dict()
    second.load_state_dict(state)
    earlier = {**state, "mode_state": {k: v for k, v in state["mode_state"].items() if k != "recent"}}
    third.load_state_dict(earlier)
    reports = [
        trainer.step(**case.data()).as_dict() for trainer, case in zip((first, second, third), runs, strict=True)
    ]
    assert reports[0] == reports[1]
    assert "feedback_snr" not in reports[2]
    assert reports[0]["inner_loss"] == reports[2]["inner_loss"]


def test_sequences_of_other_lengths_in_one_step_and_in_the_next() -> None:
    teacher, student = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    trainer = metapl.BilevelTrainer(teacher, student, "forward", problem=OfTokens(), lookahead=2)
    labeled = torch.randn(4, 6, 5), torch.zeros(4, 6, dtype=torch.long)
    for lengths in ((4, 7), (900, 2), (3, 3)):
        found = trainer.step(labeled, metapl.Lookahead([torch.randn(4, n, 5) for n in lengths]))
        assert trainer.recent["feedback"].shape == (ENTRIES,)
    assert math.isfinite(found.feedback_snr)


def test_what_many_tokens_push_alike_does_not_cancel() -> None:
    """Gradients in the logits of a token sum to zero; so would sums over pieces whose classes are shifted."""
    teacher, student = torch.nn.Linear(5, 3).double(), torch.nn.Linear(5, 3).double()
    trainer = metapl.BilevelTrainer(teacher, student, "forward", problem=OfTokens())
    x = torch.ones(2, 3 * ENTRIES, 5, dtype=torch.float64)
    trainer.step((x, torch.zeros(2, 3 * ENTRIES, dtype=torch.long)), x)
    push = trainer.hypergradient((x, torch.zeros(2, 3 * ENTRIES, dtype=torch.long)), x).grads["bias"]
    assert float(trainer.recent["feedback_square"].sqrt()) > 1e-4 * float(push.norm()) > 0


class _OwnLabels(metapl.PseudoLabels):
    """Labels of which the problem knows which to leave out."""

    def check(self, outputs: torch.Tensor, labeled: Any, unlabeled: Any) -> None:
        pass

    def outer_loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        if batch[1].is_floating_point():
            return (outputs[:, 0] - batch[1]).square().mean()
        return torch.nn.functional.cross_entropy(outputs, batch[1])


def test_labels_that_are_left_out_are_of_no_class() -> None:
    """The shares are those among the others; numbers are no classes."""
    case = toy("mlp")
    trainer = trainer_for(case, "forward", problem=_OwnLabels(), teacher_losses=())
    report = trainer.step((case.labeled[0], torch.tensor([0, -100, 2, 2, -100])), case.unlabeled)
    shares = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64) / 3
    assert report.class_shares_vs_labeled == pytest.approx(
        float((report.signal.value.mean(0) - shares).abs().sum()) / 2
    )
    report = trainer.step((case.labeled[0], torch.rand(5, dtype=torch.float64)), case.unlabeled)
    assert "class_shares_vs_labeled" not in report.as_dict()


def test_labels_that_are_whole_numbers_without_feedback() -> None:
    class Hard(metapl.PseudoLabels):
        def signal(self, teacher: torch.nn.Module, batch: Any, *_: object, **__: object) -> metapl.Signal:
            return metapl.Signal(torch.nn.functional.one_hot(teacher(batch).argmax(-1), 3))

        def inner_loss(self, outputs: torch.Tensor, signal: metapl.Signal, *_: object) -> torch.Tensor:
            return -(signal.value * outputs.log_softmax(-1)).sum(-1)

    case = toy("mlp")
    trainer = trainer_for(case, "none", problem=Hard(), teacher_losses=(metapl.CrossEntropy(),))
    assert "class_shares_vs_labeled" not in trainer.step(**case.data()).as_dict()


def test_a_problem_of_weights_has_no_class_frequencies() -> None:
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    table, student = metapl.problems.Table(torch.zeros(4)), torch.nn.Linear(3, 2)
    trainer = metapl.BilevelTrainer(table, student, "forward", problem=metapl.problems.ExampleWeights())
    report = trainer.step((x, y), (x, y, torch.arange(4)))
    assert "class_shares_vs_labeled" not in report.as_dict()
