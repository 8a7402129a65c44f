"""The stacked steps of the studies are those of the library.

A seed of a stack is a trainer of its own.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metapl
from metapl.ablation import Altered
from metapl.feedback import Forward, Reinforce
from metapl.models import mlp
from metapl.pictures.views import base
from metapl.problems.losses import UDA, CrossEntropy
from metapl.training.loss_trainer import LossTrainer

pytestmark = [pytest.mark.docs, pytest.mark.usefixtures("as_scripts")]

SEEDS, STEPS, BATCH = (3, 4), 3, 6
PRIOR = tuple((torch.linspace(5, 1, 10, dtype=torch.float64) / 30).tolist())


def networks(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [mlp([64, 7, 5, 10]).double() for _ in range(count)]


def batches(lookahead: int = 1) -> list[tuple[Any, list[Any]]]:
    """Return, for two seeds at once, each step's labeled batch and pairs of unlabeled ones."""
    g = torch.Generator().manual_seed(1)

    def x() -> Tensor:
        return torch.rand(len(SEEDS), BATCH, 64, generator=g, dtype=torch.float64)

    return [
        (
            (x(), torch.randint(10, (len(SEEDS), BATCH), generator=g)),
            [(x(), x()) for _ in range(lookahead)],
        )
        for _ in range(STEPS)
    ]


def of_seed(s: int, batch: Any) -> Any:
    return tuple(part[s] for part in batch)


def difference(network: nn.Module, weights: dict[str, Tensor], seed: int) -> float:
    own = dict(network.named_parameters())
    return max(float((own[name] - t[seed]).detach().abs().max()) for name, t in weights.items())


# The rule of a stack; the mode and the arguments of a trainer. That pure steps are eager ones, and
# stacked ones single ones, is tested in tests/library/test_functional.py.
CASES: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "learning rate, lookahead": (
        {"feedback": "learning_rate", "lookahead": 3, "size": 2.0},
        Forward(normalization="learning_rate"),
        {"feedback_weight": 2.0},
    ),
    "feedback alone": (
        {"own_loss": False, "size": 3.0},
        Forward(),
        {"teacher_losses": (), "feedback_weight": 3.0},
    ),
    "uda, sharpened and aligned": (
        {"uda": 2.0, "temperature": 0.5, "align": 0.5, "feedback": "ratio", "size": 0.5},
        Forward(),
        {
            "teacher_losses": (CrossEntropy(), UDA(0.5, weight=2.0, align=0.5, prior=PRIOR)),
            "feedback_ratio": 0.5,
        },
    ),
    **{
        how: ({"alteration": how, "size": 3.0}, Altered(Forward(), how), {"feedback_weight": 3.0})  # type: ignore[arg-type]
        for how in ("permuted", "class_means", "random_sign")
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_seed_of_a_stack_takes_the_steps_of_a_trainer(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import when

    monkeypatch.setattr(when, "BATCH", BATCH)
    fields, mode, options = CASES[case]
    rule, first = when.Rule(student_lr=0.7, teacher_lr=0.3, **fields), networks(4)
    stack = when.Stack(rule, first[:2], first[2:], PRIOR)
    with torch.no_grad():
        for t, (labeled, pairs) in enumerate(batches(rule.lookahead)):
            extra = when.drawn_to_alter(rule.alteration, SEEDS, t)
            inner = tuple((*pair, *extra) for pair in pairs)
            stack.step(labeled, inner if len(inner) > 1 else inner[0], when.cosine(t, STEPS))
    for s in (0, 1):
        given, first = batches(rule.lookahead), networks(4)
        teacher, student = first[s], first[2 + s]
        trainer = metapl.BilevelTrainer(
            *(
                teacher,
                student,
                dataclasses.replace(mode, seed=SEEDS[s]) if isinstance(mode, Altered) else mode,
            ),
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.7),
            outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=0.3, momentum=0.9),
            lookahead=rule.lookahead,
            **{"teacher_losses": (CrossEntropy(),), **options},
        )
        labeled = [of_seed(s, x) for x, _ in given]
        unlabeled = [of_seed(s, pair) for _, pairs in given for pair in pairs]
        trainer.fit(labeled, unlabeled, steps=STEPS, log_every=STEPS, progress=False)
        assert difference(trainer.student, stack.state.student.params, s) < 1e-12
        assert difference(trainer.teacher, stack.state.teacher.params, s) < 1e-12
        assert difference(trainer.teacher, stack.state.teacher.params, 1 - s) > 1e-3


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_a_form_of_algorithm_1_is_trained_by_the_mean_on_the_labels_that_its_noise_draws(
    similarity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import when

    monkeypatch.setattr(when, "BATCH", BATCH)
    baseline = None if similarity == "dot" else 0.99
    form = {"mode": "reinforce", "similarity": similarity, "baseline": baseline, "size": 2.0}
    rule, first = when.Rule(student_lr=0.7, teacher_lr=0.3, **form), networks(4)
    stack = when.Stack(rule, first[:2], first[2:])
    noises = [noise.double() for noise in when.drawn_to_label(SEEDS, STEPS)]
    with torch.no_grad():
        for (labeled, [pair]), noise in zip(batches(), noises, strict=True):
            stack.step(labeled, pair, 1.0, noise=noise)
    for s, (teacher, student) in enumerate(zip(networks(4)[:2], networks(4)[2:], strict=True)):
        trainer = metapl.BilevelTrainer(
            teacher,
            student,
            Reinforce(similarity=similarity, baseline=baseline, reduction="mean"),
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.7),
            outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=0.3, momentum=0.9),
            teacher_losses=(CrossEntropy(),),
            feedback_weight=2.0,
        )
        step, state = trainer.functional()
        # What a seed draws does not depend on the others.
        own_noises = when.drawn_to_label(SEEDS[s : s + 1], STEPS)
        for (labeled, [pair]), noise in zip(batches(), own_noises, strict=True):
            state, _ = step(state, of_seed(s, labeled), of_seed(s, pair), noise[0].double())
        for stacked, own in (
            (stack.state.student, state.student),
            (stack.state.teacher, state.teacher),
        ):
            assert all(
                torch.allclose(stacked.params[name][s], p, rtol=0, atol=1e-12)
                for name, p in own.params.items()
            )


@pytest.mark.parametrize(
    "settings", [{"threshold": 0.1, "align": 1.0}, {"threshold": 0.1, "temperature": 0.0}]
)
def test_networks_without_teachers_are_those_of_a_loss_trainer(settings: dict[str, float]) -> None:
    import when

    rule = when.Rule(teacher_lr=0.3, feedback="none", uda=1.0, **settings)
    uda, plain = (when.Stack(rule, None, networks(2), PRIOR) for _ in "ab")
    with torch.no_grad():
        for t, (labeled, [views]) in enumerate(batches()):
            uda.step(labeled, (*labeled, *views), when.cosine(t, STEPS))
            plain.step(labeled, labeled, when.cosine(t, STEPS))
    both = (CrossEntropy(), UDA(**settings, prior=PRIOR))
    for stack, losses in ((plain, both[:1]), (uda, both)):
        for s, model in enumerate(networks(2)):
            labeled, pairs = (
                [of_seed(s, x) for x in each]
                for each in zip(*((x, p) for x, [p] in batches()), strict=True)
            )
            optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
            LossTrainer(model, losses, optimizer=optimizer).fit(
                *(labeled, pairs if len(losses) == 2 else None),
                steps=STEPS,
                log_every=STEPS,
                progress=False,
            )
            assert difference(model, stack.state.student.params, s) < 1e-12


def test_altered_feedback_is_what_it_is_called() -> None:
    import when

    g = torch.Generator().manual_seed(0)
    h = torch.randn(9, 10, generator=g).double()
    q = torch.randn(9, 10, generator=g).double().softmax(-1)
    of = {
        how: when.altered(h, q, how)
        for how in when.ALTERATIONS
        if how not in ("permuted", "random_sign")
    }
    assert torch.allclose(of["class_means"] + of["rest"], h)
    assert torch.allclose(of["own_class_means"] + of["within_class"], h)
    assert torch.allclose(of["sign"].abs(), h.abs().mean().expand_as(h))
    own = q.argmax(1)
    means = torch.stack([h[own == label].mean(0) for label in own])
    assert torch.allclose(of["own_class_means"], means)
    assert torch.equal(of["one_number"], h * nn.functional.one_hot(own, 10))
    leaf = q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(-(leaf.mean(0).log() / 10).sum(), leaf)
    assert torch.allclose(when.altered(h, q, "balance"), gradient)


def test_the_views_are_those_of_the_library_and_a_seed_s_batches_its_own() -> None:
    import when

    pictures = torch.rand(2, 20, 64, generator=torch.Generator().manual_seed(0))
    which, seen = map(torch.stack, zip(*when.views(pictures, SEEDS, 0, 50, 60), strict=True))
    epochs = which.transpose(0, 1).flatten(1).unflatten(1, (-1, 20)).sort(-1).values
    # Every epoch of 20 pictures has each of them once.
    assert torch.equal(epochs, torch.arange(20).expand_as(epochs))
    # The square takes 4 of the 64 values.
    assert torch.equal((seen != 0).sum(-1), torch.full(seen.shape[:-1], 60))
    # The second of nine.
    images = pictures[0].unflatten(-1, (1, 8, 8))
    moves = torch.tensor([[-1, 0]]).expand(20, 2)
    assert torch.equal(
        when.shifted(pictures[0])[1], base.crop_flip(images, moves, None, 0.0).flatten(1)
    )
    alone, views = map(
        torch.stack, zip(*when.views(pictures[1:], SEEDS[1:], 0, 50, 30), strict=True)
    )
    assert torch.equal(alone[:, 0], which[:30, 1])
    assert torch.equal(views[:, 0], seen[:30, 1])


def test_uneven_classes_have_their_shares_and_wrong_labels_are_as_wrong_as_they_are_called() -> (
    None
):
    import when

    data = when.drawn(4, (300, 301), 5)
    few = torch.tensor(when.apportioned(torch.linspace(5, 1, 10).tolist(), 40))
    assert when.prior_of(when.Arm("worth", "uda", "", labels=4, uneven=5)) == pytest.approx(
        (few / 40).tolist()
    )
    for s in range(2):
        assert torch.equal(data.labeled[1][s].bincount(minlength=10), few)
        counts = data.unlabeled[1][s].bincount(minlength=10).double()
        assert torch.allclose(counts / counts[0], torch.linspace(5, 1, 10).double() / 5, atol=0.01)
    always = torch.zeros_like(data.test[1])  # the most frequent class: 5 / 30
    assert when.accuracies(always, data.test[1], 5) == pytest.approx([5 / 30] * 2, abs=1e-5)
    x, y = (part[0] for part in when.drawn(4, (100,)).unlabeled)
    for condition in ("asymmetric", "style"):
        _, given = when.wrongly_labeled(condition, x, y, 100)
        assert all(
            abs(float((given[y == c] == (c + 1) % 10).double().mean()) - 0.3) < 0.01
            for c in range(10)
        )
    pictures, given = when.wrongly_labeled("half", x, y, 100)
    assert given.bincount().tolist() == [50] * 10
    # From one end.
    assert float(pictures[given == 3].var(0).sum()) < 0.95 * float(x[y == 3].var(0).sum())
