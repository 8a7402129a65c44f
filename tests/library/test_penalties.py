"""Losses that read ``student.parameters()``: penalties on the weights that are trained.

The reference is double backward by hand: the moved weights are put into the student's tables before
each pass, and the loss is called while they are there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captures import as_functions, without_inductor
from problems_zoo import OPTIMISERS, product
from reference import Tree, error, own_stream, stepped
from test_implicit import D, Penalties, Ridge, closed_form, data, student
from test_replays import put
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import MetaplError, Signal
from metapl.feedback import Difference, Forward, Implicit
from metapl.functional import stack, unstack
from metapl.functional.architecture import Undescribed, description_of_object
from metapl.problems import ExampleWeights, Table

ROWS = 8
CLASSES = 3
RULE = OPTIMISERS["torch_sgd_nesterov"]

# The number of weights above which ``forward`` keeps no graph.
LARGE = 2**15 + 1

Penalty = Callable[[nn.Module, list[Tensor]], Tensor]


def l2(net: Any, start: list[Tensor]) -> Tensor:
    return torch.stack([p.square().sum() for p in net.parameters()]).sum()


def l1_of_a_layer(net: Any, start: list[Tensor]) -> Tensor:
    return net[0].weight.abs().sum()


def proximal(net: Any, start: list[Tensor]) -> Tensor:
    """Return the squared distance from the first weights of the training.

    It is weighed by entry, as in EWC.
    """
    pairs = zip(net.parameters(), start, strict=True)
    return torch.stack([((1 + q.square()) * (p - q).square()).sum() for p, q in pairs]).sum()


def orthogonality(net: Any, start: list[Tensor]) -> Tensor:
    weight = net.get_submodule("0").weight
    return (weight.T @ weight - torch.eye(weight.shape[1]).to(weight)).square().sum()


PENALTIES: dict[str, Penalty] = {
    "l2": l2,
    "l1 of a layer": l1_of_a_layer,
    "proximal": proximal,
    "orthogonality": orthogonality,
}


class Penalized(ExampleWeights):
    """Weights of examples, which also weigh a penalty on the student's own weights.

    And one in the outer loss.
    """

    def __init__(self, net: nn.Module, penalty: Penalty = l2) -> None:
        super().__init__()
        vars(self).update(
            net=net, penalty=penalty, first=[p.detach().clone() + 0.1 for p in net.parameters()]
        )

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        strength = 0.02 + 0.05 * signal.value
        return super().inner_loss(outputs, signal, batch, params) + strength * self.penalty(
            self.net, self.first
        )

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return super().outer_loss(outputs, batch) + 0.03 * self.penalty(self.net, self.first)


def network(width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, CLASSES)).double()


def batches(steps: int = 1) -> tuple[Any, list[Any]]:
    """Return an outer batch, and the inner ones, with the numbers of their examples."""
    draw = torch.Generator().manual_seed(1)
    x = [torch.randn(ROWS, 4, generator=draw, dtype=torch.float64) for _ in range(steps + 1)]
    y = torch.arange(ROWS) % CLASSES
    rows = torch.arange(ROWS)
    return (x[0], y), [(inputs, y, rows) for inputs in x[1:]]


def table() -> Table:
    return Table(torch.linspace(0.2, 1.5, ROWS, dtype=torch.float64))


def by_hand(net: nn.Module, penalty: Penalty, steps: int) -> tuple[Tree, Tree, Tensor]:
    """Return the gradient in the table, θ after the steps, and L there."""
    net = copy.deepcopy(net)
    teacher = table()
    problem = Penalized(net, penalty)
    outer, inner = batches(steps)
    phi = dict(teacher.named_parameters())
    theta = dict(net.named_parameters())
    state = None
    for batch in inner:
        put(net, theta)
        outputs = net(batch[0])
        signal = problem.signal(teacher, batch, outputs, generator=None)
        theta, state = stepped(
            problem.inner_loss(outputs, signal, batch).mean(), theta, RULE.rule, state
        )
    put(net, theta)
    torch.set_rng_state(own_stream(torch.get_rng_state()))
    loss = problem.outer_loss(net(outer[0]), outer)
    grads = dict(zip(phi, torch.autograd.grad(loss, list(phi.values())), strict=True))
    return grads, {name: t.detach() for name, t in theta.items()}, loss.detach()


def gradient_of(
    net: nn.Module, penalty: Penalty, mode: Any, steps: int, **options: Any
) -> metapl.Hypergradient:
    outer, inner = batches(steps)
    options = {"problem": Penalized(net, penalty), "inner_optimizer": RULE.build(net), **options}
    return metapl.hypergradient(
        table(),
        net,
        outer=outer,
        inner=inner[0] if steps == 1 else metapl.Lookahead(inner),
        mode=mode,
        **options,
    )


WAYS: dict[str, tuple[Any, int]] = {
    "graph": (Forward(by="graph"), 1),
    "tangent": (Forward(by="tangent"), 1),
    "unrolled": ("unrolled", 1),
    "difference": ("difference", 1),
    "one-sided difference": (Difference(one_sided=True), 1),
    "forward, three steps": ("forward", 3),
    "unrolled, three steps": ("unrolled", 3),
    "forward, recomputed": (Forward(keep_every=2), 3),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "unverified": {"verify": False},
    "verified": {"verify": True},
    "micro-batches": {"accumulate": 2},
}


@pytest.mark.parametrize(
    ("way", "penalty"), product(WAYS, PENALTIES, usual=("l2", "forward, three steps"))
)
def test_the_gradient_is_that_of_double_backward(way: str, penalty: str) -> None:
    net = network()
    mode, steps = WAYS[way]
    grads, theta, loss = by_hand(net, PENALTIES[penalty], steps)
    result = gradient_of(net, PENALTIES[penalty], mode, steps)
    assert error(result.grads, grads) < (1e-5 if "difference" in way else 1e-12)
    assert error(result.student_params, theta) < 1e-12
    assert float(abs(result.outer_loss - loss)) < 1e-12


@pytest.mark.parametrize(
    ("way", "option"), product(WAYS, OPTIONS, usual=("tangent", "unrolled, three steps"))
)
def test_it_is_right_verified_and_in_micro_batches(way: str, option: str) -> None:
    net = network()
    mode, steps = WAYS[way]
    grads, theta, _ = by_hand(net, l2, steps)
    result = gradient_of(net, l2, mode, steps, **OPTIONS[option])
    assert error(result.grads, grads) < (1e-5 if "difference" in way else 1e-12)
    assert error(result.student_params, theta) < 1e-12


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_a_large_student_is_as_right_as_a_small_one(mode: str, steps: int) -> None:
    net = network(LARGE // (4 + CLASSES + 1) + 1)
    assert sum(p.numel() for p in net.parameters()) > LARGE
    grads, theta, _ = by_hand(net, l1_of_a_layer, steps)
    result = gradient_of(net, l1_of_a_layer, mode, steps)
    assert error(result.grads, grads) < 1e-12
    assert error(result.student_params, theta) < 1e-12


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("mode", ["forward", "unrolled", "reinforce_per_example"])
def test_a_trainer_takes_the_steps_of_a_loop(mode: str, steps: int) -> None:
    """The student is moved by ``torch.optim`` alone, twice.

    The table has the weights that the trainer's table has then.
    """
    if mode == "reinforce_per_example":
        if steps == 3:
            pytest.skip("the mode looks one step ahead")
        problem: Any = PenalizedLabels
        teacher: nn.Module = nn.Linear(4, CLASSES).double()
    else:
        problem = Penalized
        teacher = table()
    net = network()
    trainer = metapl.BilevelTrainer(
        teacher,
        net,
        mode,
        problem=problem(net),
        inner_optimizer=RULE.build(net),
        lookahead=steps,
        teacher_losses=(),
    )
    loop = copy.deepcopy(net)
    rules = problem(loop)
    optimizer = RULE.build(loop)
    outer, inner = batches(steps)
    if mode == "reinforce_per_example":
        inner = [batch[0] for batch in inner]
    for _ in range(2):
        trained_teacher = copy.deepcopy(teacher)
        report = trainer.step(
            outer=outer, inner=inner[0] if steps == 1 else metapl.Lookahead(inner)
        )
        for batch in inner:
            outputs = loop(rules.student_input(batch))
            sampled = mode == "reinforce_per_example"
            signal = (
                report.signal
                if sampled
                else rules.signal(trained_teacher, batch, outputs, generator=None)
            )
            loss = rules.inner_loss(outputs, signal.detached(), batch).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert error(dict(net.named_parameters()), dict(loop.named_parameters())) < 1e-12


class PenalizedLabels(metapl.PseudoLabels):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        vars(self).update(net=net)

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return super().inner_loss(outputs, signal, batch) + 0.05 * l2(self.net, [])


@pytest.mark.parametrize(
    "mode", [Implicit(iterations=D), Implicit("neumann", iterations=400, step_size=0.2)]
)
def test_implicit_is_the_closed_form(mode: Implicit) -> None:
    class OwnWeights(Ridge):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            vars(self).update(net=net)

        def inner_loss(
            self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None
        ) -> Tensor:
            return super().inner_loss(outputs, signal, batch, dict(self.net.named_parameters()))

    net = student()
    inner, outer = data()
    options = {"outer": outer, "inner": inner, "mode": mode, "problem": OwnWeights(net)}
    options["inner_optimizer"] = torch.optim.SGD(net.parameters(), lr=0.1)
    for verify in (False, True):
        (gradient,) = metapl.hypergradient(
            Penalties(), net, verify=verify, **options
        ).grads.values()
        assert error({"": gradient}, {"": closed_form()}) < 1e-8


def test_scores_of_a_training_with_a_penalty() -> None:
    """By central differences of real trainings.

    The trainings that ``validate`` repeats are such a loop too.
    """
    net = network()
    outer, ((x, y, _),) = batches()

    class Decayed(metapl.problems.EqualWeights):
        def inner_loss(
            self, outputs: Tensor, signal: Any, batch: Any, params: Any = None
        ) -> Tensor:
            return super().inner_loss(outputs, signal, batch) + 0.1 * l2(net, [])

    attribution = metapl.attribute(
        net,
        (x, y),
        outer,
        optimizer=RULE.build(net),
        steps=4,
        batch_size=ROWS,
        problem=Decayed(),
        progress=False,
    )

    def trained(row: int, weight: float) -> float:
        twin = copy.deepcopy(net)
        weights = torch.ones(ROWS).double()
        weights[row] = weight
        optimizer = RULE.build(twin)
        for _ in range(4):
            losses = weights * F.cross_entropy(twin(x), y, reduction="none") + 0.1 * l2(twin, [])
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
        return float(F.cross_entropy(twin(outer[0]), outer[1]).detach())

    slopes = [(trained(i, 1 + 1e-5) - trained(i, 1 - 1e-5)) / 2e-5 for i in range(ROWS)]
    assert error({"": -attribution.scores}, {"": torch.tensor(slopes, dtype=torch.float64)}) < 1e-6
    validated = attribution.validate([[2], [5], [1]], progress=False)
    changes = [trained(row, 0.0) - trained(row, 1.0) for row in (2, 5, 1)]
    assert validated.retrained.tolist() == pytest.approx(changes, abs=1e-12)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("mode", "steps"), [("forward", 1), ("unrolled", 1), ("forward", 3), ("difference", 1)]
)
def test_the_pure_step_is_the_eager_one(mode: str, steps: int) -> None:
    """And of stacked seeds, each as alone: their losses read the weights of their own."""
    net = network()
    outer, inner = batches(steps)
    options = {
        "problem": Penalized(net, proximal),
        "inner_optimizer": RULE.build(net),
        "lookahead": steps,
    }
    trainer = metapl.BilevelTrainer(table(), net, mode, **options)
    step, state = trainer.functional()
    moved = {name: t + 0.1 for name, t in state.student.params.items()}
    moved_state = state._replace(student=state.student._replace(params=moved))
    step_batches = outer, inner[0] if steps == 1 else tuple(inner)
    alone = [step(one_state, *step_batches) for one_state in (state, moved_state)]
    together, report = torch.func.vmap(step, in_dims=(0, None, None), randomness="different")(
        stack([state, moved_state]), *step_batches
    )
    for (state_after_step, _), of_stack in zip(alone, unstack(together), strict=True):
        assert error(of_stack.student.params, state_after_step.student.params) < 1e-10
        assert error(of_stack.teacher.params, state_after_step.teacher.params) < 1e-10
    assert float(report.flag.max()) < 1e-6
    eager = trainer.step(outer=outer, inner=inner[0] if steps == 1 else metapl.Lookahead(inner))
    feedback_by_step = eager.feedback if steps > 1 else [eager.feedback]
    pure = alone[0][1].feedback if steps > 1 else [alone[0][1].feedback]
    assert error(dict(enumerate(pure)), dict(enumerate(feedback_by_step))) < (
        1e-5 if mode == "difference" else 1e-10
    )
    assert error(alone[0][0].student.params, dict(net.named_parameters())) < 1e-10


@pytest.mark.long
def test_compiled_it_is_that_of_double_backward() -> None:
    """A whole training, and a trainer's step."""
    net = network()
    grads, theta, loss = by_hand(net, proximal, 3)
    result = gradient_of(net, proximal, "forward", 3, compile=True)
    assert error(result.grads, grads) < 1e-10
    assert error(result.student_params, theta) < 1e-10
    assert float(abs(result.outer_loss - loss)) < 1e-10
    outer, (inner,) = batches()
    problems = []
    for is_compiled in (False, True):
        net = network()
        options = {
            "problem": Penalized(net),
            "inner_optimizer": RULE.build(net),
            "compile": is_compiled,
        }
        trainer = metapl.BilevelTrainer(table(), net, **options)
        for _ in range(3):
            trainer.step(outer=outer, inner=inner)
        problems.append(dict(net.named_parameters()) | {"w": trainer.teacher.values})
    assert error(*problems) < 1e-9


@pytest.mark.parametrize("mode", [Forward(by="tangent"), Forward(keep_every=1)])
def test_weights_that_a_loss_has_kept_are_refused_with_params_named(mode: Forward) -> None:
    """A list of the parameters is of θ_0 in later steps.

    It has no weights of the passes that are run again.
    """
    net = network()
    kept_weights = list(net.parameters())

    class Kept(ExampleWeights):
        def inner_loss(
            self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None
        ) -> Tensor:
            penalty = torch.stack([p.square().sum() for p in kept_weights]).sum()
            return super().inner_loss(outputs, signal, batch, params) + 0.1 * penalty

    steps = 1 if mode.by else 3
    with pytest.raises(
        MetaplError, match=r"a loss that has kept weights .* `params` or student.parameters\(\)"
    ):
        gradient_of(net, l2, mode, steps, problem=Kept(), verify=False)
    with pytest.raises(MetaplError, match=r"the student's \d.\w+ as it was .* list or dict"):
        gradient_of(net, l2, mode, steps, problem=Kept())


def test_a_training_learns_the_strength_of_a_penalty() -> None:
    """On noise, a student that is told to decay ends with the smaller outer loss.

    The table learns to tell it.
    """
    ends = []
    for mode in ("forward", "none"):
        torch.manual_seed(3)
        x = torch.randn(40, 20)
        y = torch.arange(40) % CLASSES
        net = nn.Linear(20, CLASSES)

        class Decay(metapl.BilevelProblem):
            def __init__(self, net: nn.Module) -> None:
                super().__init__()
                vars(self).update(net=net)

            def signal(
                self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any
            ) -> Signal:
                return Signal(teacher(torch.zeros(len(batch[0]), dtype=torch.long)).exp())

            def inner_loss(
                self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None
            ) -> Tensor:
                losses = F.cross_entropy(outputs, batch[1], reduction="none")
                return losses + signal.value * l2(self.net, [])

            def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
                return F.cross_entropy(outputs, batch[1])

        strength = Table(torch.full((1,), -6.0))
        options = {
            "inner_optimizer": torch.optim.SGD(net.parameters(), lr=0.5),
            "problem": Decay(net),
        }
        options["outer_optimizer"] = torch.optim.Adam(strength.parameters(), lr=0.1)
        trainer = metapl.BilevelTrainer(strength, net, mode, lookahead=3, **options)
        outer = x[20:], y.flip(0)[20:]
        for _ in range(60):
            trainer.step(outer=outer, inner=metapl.Lookahead([(x[:20], y[:20])] * 3))
        with torch.no_grad():
            ends.append(
                (float(F.cross_entropy(net(outer[0]), outer[1])), float(strength.values[0]))
            )
    (loss, strength_with_feedback), (loss_without_feedback, strength_without_feedback) = ends
    assert strength_without_feedback == -6.0
    assert strength_with_feedback > -4
    assert loss < 0.8 * loss_without_feedback


NAMED = network()


class ByName(ExampleWeights):
    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return super().inner_loss(outputs, signal, batch, params) + of_named()


def of_named() -> Tensor:
    return torch.stack([p.abs().sum() for p in NAMED.parameters()]).sum()


def test_a_compiled_training_is_of_the_student_that_a_loss_names() -> None:
    """And of no bare copy, of which graphs are compiled where no method reads a module.

    By a global, or a closure.
    """
    net = network()

    class ByClosure(ExampleWeights):
        def inner_loss(
            self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None
        ) -> Tensor:
            return super().inner_loss(outputs, signal, batch, params) + l2(net, [])

    for problem in (ByName(), ByClosure(), Penalized(net)):
        with pytest.raises(Undescribed):
            description_of_object(problem)
    assert description_of_object(ExampleWeights())


@pytest.mark.parametrize(
    "way", ["graph", "tangent", "difference", "forward, three steps", "unrolled, three steps"]
)
def test_verification_sees_the_student_that_a_loss_names(way: str) -> None:
    """Whose copies it moves.

    Of the networks themselves nothing changes, their gradients included.
    """
    net = network()
    mode, steps = WAYS[way]

    class ByClosure(ExampleWeights):
        def inner_loss(
            self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None
        ) -> Tensor:
            strength = 0.02 + 0.05 * signal.value
            return super().inner_loss(outputs, signal, batch, params) + strength * l2(net, [])

    parameters = list(net.parameters())
    outer, inner = batches(steps)
    options = {
        "outer": outer,
        "inner": metapl.Lookahead(inner),
        "mode": mode,
        "problem": ByClosure(),
    }
    check = metapl.check_gradient(table(), net, inner_optimizer=RULE.build(net), **options)
    assert check.status == "right"
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert all(p.grad is None for p in parameters)


class KeptWeights(ExampleWeights):
    """Losses that read a list of the student's parameters, which was made before the training."""

    def __init__(self, net: nn.Module, level: str) -> None:
        self.level = level
        self.weights_of_the_net = list(net.parameters())

    def penalty(self, level: str) -> Tensor | float:
        if level != self.level:
            return 0.0
        return 0.1 * torch.stack([p.pow(4).sum() for p in self.weights_of_the_net]).sum()

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return super().inner_loss(outputs, signal, batch, params) + self.penalty("inner")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return super().outer_loss(outputs, batch) + self.penalty("outer")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("mode", "steps", "level"),
    [
        ("unrolled", 3, "inner"),
        ("forward", 3, "inner"),
        ("unrolled", 1, "outer"),
        ("difference", 1, "outer"),
    ],
)
def test_a_list_of_weights_is_refused_by_the_name_of_the_weight(
    mode: str, steps: int, level: str, verify: bool
) -> None:
    """Without verification too: the door of the first step sees the leaf in the graph."""
    net = network()
    teacher = table()
    problem = KeptWeights(net, level)
    trainer = metapl.BilevelTrainer(
        teacher,
        net,
        mode,
        problem=problem,
        inner_optimizer=RULE.build(net),
        lookahead=steps,
        verify=verify,
    )
    outer, inner = batches(steps)
    first_state = copy.deepcopy(net.state_dict())
    with pytest.raises(
        MetaplError, match=rf"the {level} loss depends on the student's \S*(weight|bias) as it was"
    ):
        trainer.step(outer=outer, inner=metapl.Lookahead(inner) if steps > 1 else inner[0])
    assert all(torch.equal(first_state[name], t) for name, t in net.state_dict().items())


@pytest.mark.parametrize(("steps", "backend"), [(1, "plain"), (2, "captured")])
def test_a_compiled_trainer_follows_the_student_that_a_loss_names(
    steps: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first step is compared with that of a copy, which the loss does not know of."""
    if backend == "captured":
        without_inductor(monkeypatch)
    else:
        as_functions(monkeypatch)

    def teacher_after(compile: bool) -> Tensor:
        net = network()
        teacher = table()

        class ByClosure(ExampleWeights):
            def inner_loss(
                self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None
            ) -> Tensor:
                return super().inner_loss(outputs, signal, batch, params) + 0.1 * l2(net, [])

        trainer = metapl.BilevelTrainer(
            teacher,
            net,
            "forward",
            problem=ByClosure(),
            inner_optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=1.0),
            lookahead=steps,
            compile=compile,
        )
        outer, inner = batches(steps)
        for _ in range(2):
            trainer.step(outer=outer, inner=metapl.Lookahead(inner) if steps > 1 else inner[0])
        return teacher.values.detach().clone()

    torch.testing.assert_close(
        teacher_after(compile=True), teacher_after(compile=False), rtol=1e-9, atol=1e-12
    )


def test_the_door_runs_no_pass_of_a_student_that_is_right() -> None:
    """A count of passes in an attribute is right in ``unrolled``, which runs each pass once."""

    class Counting(nn.Sequential):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            return super().forward(x)

    net = Counting(network())
    teacher = table()
    trainer = metapl.BilevelTrainer(
        teacher,
        net,
        "unrolled",
        problem=ExampleWeights(),
        inner_optimizer=RULE.build(net),
        lookahead=3,
        verify=False,
    )
    outer, inner = batches(3)
    trainer.step(outer=outer, inner=metapl.Lookahead(inner))
    # Three steps of the student, and one pass on the outer batch.
    assert net.passes == 4
