"""Reduced Meta Pseudo Labels: stored labels, adjusted by a small network that learns from the student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from problems_zoo import CLASSES, OPTIMISERS, everything, same, toy, warm
from reference import error
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import MetaplError
from metapl.models import label_adjuster
from metapl.problems import ReducedLabels, StoredCrossEntropy


def stored(rows: int, seed: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, CLASSES, generator=draw, dtype=dtype)).softmax(-1)


def adjuster() -> nn.Module:
    """An adjuster that has learned something: at its start, its first layers get no gradient."""
    torch.manual_seed(2)
    network = label_adjuster(CLASSES, hidden=7, layers=3).double()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return network


class Closed(nn.Module):
    """A teacher that knows the stored labels of its only batch, whatever its input."""

    def __init__(self, network: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.network, self.labels = network, labels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(self.labels)
        return out


@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_the_adjuster_begins_as_the_identity(classes: int, layers: int) -> None:
    q = torch.rand(4, classes).pow(8)
    q[0] = 0
    q[0, 1] = 1
    q /= q.sum(1, keepdim=True)
    network = label_adjuster(classes, layers=layers)
    assert (network(q).softmax(-1) - q).abs().max() < 1e-5
    assert (network(q.half()).softmax(-1) - q).abs().max() < 1e-3
    assert sum(isinstance(part, nn.Linear) for part in network.modules()) == layers
    assert network.correction[0].out_features == 128


@pytest.mark.parametrize(
    "given", [{"num_classes": 1}, {"num_classes": 3, "layers": 1}, {"num_classes": 3, "hidden": 0}]
)
def test_sizes_that_are_no_network_are_refused(given: dict[str, int]) -> None:
    with pytest.raises(MetaplError, match=r"expected a whole number of [12] or more"):
        label_adjuster(**given)
    with pytest.raises(MetaplError, match=r"shape \(2, 4\).*expected stored distributions \(B, 3\)"):
        label_adjuster(3)(torch.rand(2, 4))


@pytest.mark.parametrize("mode", [mode for mode in metapl.MODES if mode != "implicit"])
@pytest.mark.parametrize("kind", ["batch_norm", "dropout"])
def test_its_feedback_is_that_of_pseudo_labels_from_the_stored_ones(mode: str, kind: str) -> None:
    """Meta Pseudo Labels is checked elsewhere; here its teacher knows the stored labels without being given them."""
    problem, q = toy(kind), stored(4)
    rule = OPTIMISERS["torch_sgd_nesterov"]
    inner, state, _ = warm(problem, rule, 2)
    network = adjuster()
    found = []
    for teacher, unlabeled, label_problem in (
        (network, (problem.unlabeled, q), ReducedLabels(temperature=0.7)),
        (Closed(network, q), problem.unlabeled, metapl.PseudoLabels(temperature=0.7)),
    ):
        torch.manual_seed(4)
        result = metapl.hypergradient(
            teacher,
            problem.student,
            labeled=problem.labeled,
            unlabeled=unlabeled,
            mode=mode,
            problem=label_problem,
            inner_optimizer=inner,
            inner_state=state,
        )
        found.append([*result.grads.values(), result.feedback, *result.student_params.values()])
    assert same(*found)
    assert mode == "none" or all(g.any() for g in found[0][: len(list(network.parameters()))])


def test_its_gradient_is_that_of_double_backward() -> None:
    problem, q = toy("mlp"), stored(4)
    network, (x_l, y_l) = adjuster(), problem.labeled
    params = dict(problem.student.named_parameters())
    z = problem.student(problem.unlabeled)
    inner = -(network(q).softmax(-1) * z.log_softmax(-1)).sum(-1).mean()
    g = torch.autograd.grad(inner, list(params.values()), create_graph=True)
    moved = {name: p - 0.3 * t for (name, p), t in zip(params.items(), g, strict=True)}
    outer = F.cross_entropy(torch.func.functional_call(problem.student, moved, (x_l,)), y_l)
    expected = torch.autograd.grad(outer, list(network.parameters()))
    found = metapl.hypergradient(
        network,
        problem.student,
        labeled=(x_l, y_l, stored(len(y_l), 6)),
        unlabeled=(problem.unlabeled, q),
        problem=ReducedLabels(),
        inner_optimizer=torch.optim.SGD(problem.student.parameters(), lr=0.3),
    )
    for one, other in zip(found.grads.values(), expected, strict=True):
        assert error(one, other) < 1e-10


@pytest.mark.parametrize("student", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("teacher", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("of_store", [torch.float16, torch.float32, torch.float64], ids=str)
def test_stored_labels_are_given_to_the_teacher_in_its_own_type(
    of_store: torch.dtype, teacher: torch.dtype, student: torch.dtype
) -> None:
    found = []
    for types in ((of_store, teacher, student), (torch.float64,) * 3):
        case = toy("mlp")
        network = adjuster().to(teacher).to(types[1])
        trainer = metapl.BilevelTrainer(network, case.student.to(types[2]), "forward", problem=ReducedLabels())
        labeled = case.labeled[0].to(types[2]), case.labeled[1], stored(5, 6).to(of_store).to(types[0])
        inner = case.unlabeled.to(types[2]), stored(4).to(of_store).to(types[0])
        found.append(trainer.hypergradient(labeled, inner).feedback.double())
        assert trainer.step(labeled, inner).feedback.any()
    assert error(*found) < (2e-2 if torch.float16 in (of_store, teacher) else 1e-4)


def test_the_supervised_term_reads_the_stored_labels_of_labeled_examples() -> None:
    problem, network = toy("mlp"), adjuster()
    (x, y), q = problem.labeled, stored(5, 6)
    trainer = metapl.BilevelTrainer(network, problem.student, "none", problem=ReducedLabels())
    expected = F.cross_entropy(network(q), y, label_smoothing=0.1)
    report = trainer.step((x, y, q), (problem.unlabeled, stored(4)))
    assert report.teacher_cross_entropy == pytest.approx(expected.item(), rel=1e-6)


def test_a_first_step_is_that_of_plain_pseudo_labels() -> None:
    """Because the adjuster begins as the identity."""
    problem, q = toy("mlp"), stored(4)
    twin = toy("mlp").student
    labeled = (*problem.labeled, stored(5, 6))
    trainer = metapl.BilevelTrainer(
        label_adjuster(CLASSES).double(), problem.student, "forward", problem=ReducedLabels()
    )
    trainer.step(labeled, (problem.unlabeled, q))
    inner = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    F.cross_entropy(twin(problem.unlabeled), q).backward()
    inner.step()
    for p, other in zip(problem.student.parameters(), twin.parameters(), strict=True):
        assert error(p.detach(), other.detach()) < 1e-6


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "no stored labels": (3, lambda x, q: x, r"expected \(inputs, stored\)"),
    "two views": (3, lambda x, q: (x, x), r"stored labels of the unlabeled batch are a tensor of shape \(4, 1, 4, 4\)"),
    "logits": (3, lambda x, q: (x, q.log()), "are not distributions"),
    "counts": (3, lambda x, q: (x, 7 * q), "are not distributions"),
    "other classes": (3, lambda x, q: (x, stored(4)[:, :2]), r"expected class distributions of shape \(4, 3\)"),
    "no stored labels of labeled examples": (2, lambda x, q: (x, q), r"expected \(inputs, labels, stored\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_batches_without_stored_distributions_are_refused_and_nothing_moves(name: str) -> None:
    parts, unlabeled, words = REFUSED[name]
    problem, network = toy("batch_norm"), adjuster()
    labeled = (*problem.labeled, stored(5, 6))[:parts]
    trainer = metapl.BilevelTrainer(network, problem.student, "forward", problem=ReducedLabels())
    before = everything(problem)
    with pytest.raises(MetaplError, match=words):
        trainer.step(labeled, unlabeled(problem.unlabeled, stored(4)))
    assert same(before, everything(problem))


def test_label_smoothing_out_of_range_is_refused() -> None:
    with pytest.raises(MetaplError, match=r"label_smoothing=1\.5"):
        StoredCrossEntropy(label_smoothing=1.5)


@pytest.mark.parametrize("mode", ["forward", "reinforce"])
def test_a_fit_with_validation_goes_on_bit_for_bit_and_is_finetuned(mode: str, tmp_path: Path) -> None:
    def fit(stop: int | None = None, **options: Any) -> list[Tensor]:
        def stopped(step: int, row: Any, trainer: Any) -> None:
            if stop is not None and step >= stop:
                raise KeyboardInterrupt

        problem = toy("mlp", dtype=torch.float32)
        torch.manual_seed(4)
        (x, y), network = problem.labeled, label_adjuster(CLASSES, hidden=4, layers=2)
        q = stored(5, 6).float()
        trainer = metapl.BilevelTrainer(network, problem.student, mode, problem=ReducedLabels())
        result = trainer.fit(
            [(x, y, q)] * 2,
            [(problem.unlabeled, stored(4, seed).float()) for seed in range(3)],
            steps=6,
            validation=(x, y),
            validate_every=2,
            save_every=1,
            progress=False,
            callbacks=[stopped],
            **options,
        )
        assert result.validation_accuracy is not None
        trainer.finetune([(x, y, q)], steps=2, progress=False)
        return [p.detach().clone() for net in (network, problem.student) for p in net.parameters()]

    whole = fit()
    with pytest.raises(KeyboardInterrupt):
        fit(3, out=tmp_path / "run")
    resumed = fit(out=tmp_path / "run", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
