"""Students that write to their weights in forward, register hooks or cast: right, or refused before anything moves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_zoo import ANYWHERE, CLASSES, Toy, mlp
from reference import error
from replays import ALL
from test_writes import RULE, TYPES, Average, alike, case, plainly, refused, state_of
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import MetaplError
from metapl.execution import writes

# ---------------------------------------------------------------------------------------------- writes to weights


class Writing(nn.Module):
    def __init__(self, write: Callable[[Any], Any]) -> None:
        super().__init__()
        self.body, self.head, self.write = nn.Linear(16, 6), nn.Linear(6, CLASSES), write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self)
        return self.head(self.body(x.flatten(1)).tanh())


class Words(nn.Module):
    """An embedding that keeps its rows short."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(4, 16, max_norm=1.0), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(torch.zeros(len(x), dtype=torch.long)) * x.flatten(1))


class Late(Writing):
    """Writes in the labeled pass alone, where other tensors stand in for its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.min() > 50 else self.head(self.body(x.flatten(1)).tanh())


class InAReplay(Writing):
    """Writes in the third pass of a call, by a count that nothing puts back."""

    def forward(self, x: Tensor) -> Tensor:
        counts.append(1)
        return super().forward(x) if len(counts) % 3 == 0 else self.head(self.body(x.flatten(1)).tanh())


counts: list[int] = []


def without_grad(write: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def called(net: Any) -> None:
        with torch.no_grad():
            write(net)

    return called


def exchanged(net: Any) -> None:
    net.body.weight = nn.Parameter(net.body.weight.detach() * 0.9)


def by_data(net: Any) -> None:
    net.body.weight.data = net.body.weight.data * 0.9


def augmented(net: Any) -> None:
    net.body.weight *= 0.9


def first_batch(net: Any) -> None:
    if not hasattr(net, "started"):
        net.started = True
        net.body.bias.data.fill_(0.3)


def registered(net: Any) -> None:
    net.register_parameter("late", nn.Parameter(torch.ones(1)))


def _out(net: Any) -> None:
    torch.mul(net.body.weight.detach(), 0.9, out=net.body.weight.detach())


WRITES: dict[str, Callable[[Any], Any]] = {
    "mask": without_grad(lambda net: net.body.weight.mul_(net.body.weight > 0)),
    "clamp": without_grad(lambda net: net.body.weight.clamp_(-0.1, 0.1)),
    "data": lambda net: net.body.weight.data.abs_(),
    "detached": lambda net: net.body.weight.detach().clamp_(-0.1, 0.1),
    "view": lambda net: net.body.weight.data[0, 1:].zero_(),
    "copy": lambda net: net.body.weight.data.copy_(net.body.weight.data * 0.9),
    "index": lambda net: net.body.weight.data.__setitem__((0, 0), 1.0),
    "out": _out,
    "foreach": lambda net: torch._foreach_mul_([net.body.bias.data, net.body.weight.data], 0.9),
    "set": lambda net: net.body.weight.data.set_(net.body.weight.data.clone()),
    "norm": without_grad(lambda net: net.body.weight.div_(net.body.weight.norm())),
    "init": lambda net: nn.init.ones_(net.body.weight),
    "exchanged memory": by_data,
    "exchanged parameter": exchanged,
    "first batch": first_batch,
}
IN_PLACE = {"augmented": augmented, "a view": lambda net: net.body.weight[0].mul_(0.9)}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("mode", ALL)
def test_writes_to_weights_are_refused_before_they_happen(mode: str, write: str) -> None:
    torch.manual_seed(5)
    problem = case(Writing(WRITES[write]), torch.float32)
    refused(
        problem, mode, 1, r"the student writes to its parameter body\.(weight|bias) in its forward.*leave the weight"
    )


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_and_in_several_steps(mode: str, write: str) -> None:
    problem = case(Writing(WRITES[write]), torch.float64)
    refused(problem, mode, 3, r"the student writes to its parameter body\.(weight|bias)")


@pytest.mark.parametrize("write", IN_PLACE)
@pytest.mark.parametrize("mode", ANYWHERE)
def test_pytorchs_error_about_a_leaf_is_the_same_refusal(mode: str, write: str) -> None:
    problem = case(Writing(IN_PLACE[write]), torch.float64)
    refused(problem, mode, 1, "the student writes to one of its parameters in its forward")


def test_a_parameter_that_forward_makes_is_refused() -> None:
    problem = case(Writing(registered), torch.float64)
    refused(problem, "forward", 1, "the student writes to its parameter late")


@pytest.mark.parametrize("mode", ANYWHERE)
def test_an_embedding_with_a_greatest_norm_is_refused(mode: str) -> None:
    refused(case(Words(), torch.float32), mode, 1, r"the student writes to its parameter table\.weight.*max_norm")


@pytest.mark.parametrize("write", ["clamp", "data"])
@pytest.mark.parametrize("mode", [mode for mode in ANYWHERE if mode != "none"])
def test_writes_in_the_labeled_pass_alone(mode: str, write: str) -> None:
    problem = case(Late(WRITES[write]), torch.float64)
    x, y = problem.labeled
    problem = Toy(problem.teacher, problem.student, (x + 100, y), problem.unlabeled, 0)
    refused(problem, mode, 1, r"the student writes to its parameter body\.weight")


class InItsBackwardPass(Writing):
    """Writes where a gradient comes by, out of sight of PyTorch's version counters."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.flatten(1)).tanh()
        if h.requires_grad:
            h.register_hook(lambda g: self.write(self))
        return self.head(h)


@pytest.mark.parametrize("by", ["data", "numpy"])
@pytest.mark.parametrize("mode", ["forward", "unrolled", "reinforce", "none"])
def test_writes_in_a_backward_pass(mode: str, by: str) -> None:
    def write(net: Any) -> None:
        net.body.weight.data.numpy().__imul__(0.9) if by == "numpy" else net.body.weight.data.mul_(0.9)

    refused(case(InItsBackwardPass(write), torch.float64), mode, 1, r"the student writes to its parameter body\.weight")


@pytest.mark.parametrize("mode", ["forward", "difference", "difference_one_sided", "reinforce_per_example"])
def test_writes_in_a_replay_alone(mode: str) -> None:
    counts.clear()
    problem = case(InAReplay(WRITES["data"]), torch.float64)
    trainer = metapl.BilevelTrainer(**problem.networks(), mode=ALL[mode])
    before = state_of(problem.teacher, problem.student)
    with pytest.raises(MetaplError, match=r"writes to its parameter body\.weight|does not return the same outputs"):
        trainer.step(**problem.data())
    assert len(counts) == 3
    assert alike(before, state_of(problem.teacher, problem.student))


def repeated(problem: Toy, mode: Any, by: str) -> Callable[[], Any]:
    """Steps of a trainer, or calls of ``hypergradient``, one after the other."""
    if by == "trainer":
        trainer = metapl.BilevelTrainer(**problem.networks(), mode=mode)
        return lambda: trainer.step(**problem.data())
    inner = torch.optim.SGD(problem.student.parameters(), lr=0.1)
    return lambda: metapl.hypergradient(**problem.networks(), **problem.data(), mode=mode, inner_optimizer=inner)


class Later(Writing):
    """Writes when it is told to."""

    late = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.late else self.head(self.body(x.flatten(1)).tanh())


@pytest.mark.parametrize(
    "write", [name for name in WRITES if name not in ("first batch", "set")]
)  # this leaves the values
@pytest.mark.parametrize("mode", ["forward", "unrolled", "reinforce"])
@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("by", ["trainer", "hypergradient"])
def test_writes_that_begin_after_the_first_step(by: str, role: str, mode: str, write: str) -> None:
    """Small networks are compared then, and not looked at operator by operator; the weights are as they were."""
    torch.manual_seed(5)
    later = Later(WRITES[write])
    problem = case(later if role == "student" else mlp(), torch.float32, later if role == "teacher" else None)
    step = repeated(problem, ALL[mode], by)
    step()
    later.late = True
    before = state_of(problem.teacher, problem.student)
    with pytest.raises(MetaplError, match=rf"the {role} writes to its parameter body\.(weight|bias)"):
        step()
    assert alike(before, state_of(problem.teacher, problem.student))
    later.late = False
    step()


class Changed(Later):
    """Writes to its input when it is told to."""

    def __init__(self) -> None:
        super().__init__(lambda net: None)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(1.0) if self.late else x)


class LaterInTheLabeledPass(Late):
    """As it is told to, in the labeled pass alone, where other tensors stand in for its weights."""

    late = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.late else self.head(self.body(x.flatten(1)).tanh())


@pytest.mark.parametrize("mode", ["forward", "reinforce"])
def test_writes_in_the_labeled_pass_that_begin_after_the_first_step(mode: str) -> None:
    torch.manual_seed(5)
    later = LaterInTheLabeledPass(WRITES["data"])
    problem = case(later, torch.float32)
    x, y = problem.labeled
    problem = Toy(problem.teacher, later, (x + 100, y), problem.unlabeled, 0)
    trainer = metapl.BilevelTrainer(**problem.networks(), mode=ALL[mode])
    trainer.step(**problem.data())
    later.late = True
    before = state_of(problem.teacher, problem.student)
    with pytest.raises(MetaplError, match=r"the student writes to its parameter body\.weight"):
        trainer.step(**problem.data())
    assert alike(before, state_of(problem.teacher, problem.student))


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("by", ["trainer", "hypergradient"])
def test_an_input_that_is_changed_in_place_after_the_first_step(by: str, role: str) -> None:
    torch.manual_seed(5)
    later = Changed()
    problem = case(later if role == "student" else mlp(), torch.float32, later if role == "teacher" else None)
    step = repeated(problem, "reinforce", by)
    step()
    later.late = True
    before = state_of(problem.teacher, problem.student)
    with pytest.raises(MetaplError, match="changed its input in place"):
        step()
    assert alike(before, state_of(problem.teacher, problem.student))


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("mode", ["forward", "reinforce"])
def test_an_input_that_is_changed_out_of_sight(mode: str, role: str) -> None:
    """By numpy, which PyTorch's version counters do not see."""

    class Halving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            x.detach().numpy().__imul__(0.5)
            return self.net(x)

    networks = {"student": mlp(), "teacher": mlp(), role: Halving()}
    problem = case(networks["student"], torch.float64, networks["teacher"].double())
    refused(problem, mode, 1, f"the {role} changed its input in place")


def test_a_network_that_is_changed_is_looked_at_again() -> None:
    """Its parts are others than on the first step: as on that one, every operator is looked at."""
    problem = case(nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, CLASSES)), torch.float64)
    step = repeated(problem, "forward", "trainer")
    seen = []
    watch = writes.Watch.__init__

    def counted(*given: Any) -> None:
        seen.append(given[1:])
        watch(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writes.Watch, "__init__", counted)
        for looked in (True, False, False):
            seen.clear()
            step()
            assert bool(seen) == looked
        problem.student[2] = nn.ReLU()
        seen.clear()
        step()
        assert seen


@pytest.mark.parametrize("recompute", [False, True])
def test_a_teacher_that_writes_to_its_weights_is_refused(recompute: bool) -> None:
    problem = case(mlp(), torch.float64, Writing(WRITES["data"]).double())
    refused(problem, "forward", 1, r"the teacher writes to its parameter body\.weight", recompute_teacher=recompute)


def test_a_teacher_that_writes_in_the_pass_for_its_own_losses_is_refused() -> None:
    """That on the labeled batch."""
    problem = case(mlp(), torch.float64, Late(WRITES["data"]).double())
    x, y = problem.labeled
    problem = Toy(problem.teacher, problem.student, (x + 100, y), problem.unlabeled, 0)
    before = state_of(problem.teacher, problem.student)
    with pytest.raises(MetaplError, match=r"the teacher writes to its parameter body\.weight"):
        metapl.BilevelTrainer(**problem.networks(), mode="forward").step(**problem.data())
    assert alike(before, state_of(problem.teacher, problem.student))


def test_a_frozen_backbone_is_not_copied() -> None:
    """Only what a pass writes to is."""
    problem = case(nn.Sequential(nn.Flatten(), nn.Linear(16, 16).requires_grad_(False), Average()), torch.float64)
    seen = []
    clone = Tensor.clone

    def counted(t: Tensor, **options: Any) -> Tensor:
        seen.append(t.numel())
        return clone(t, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "clone", counted)
        metapl.BilevelTrainer(**problem.networks(), mode="forward").step(**problem.data())
    assert 6 in seen
    assert 256 not in seen


# ---------------------------------------------------------------------------------------------------------- hooks


def halves(t: Any) -> Any:
    return tuple(None if g is None else 0.5 * g for g in t) if isinstance(t, tuple) else 0.5 * t


def on_weight(net: nn.Module) -> None:
    net[1].bias.register_hook(halves)


def on_weight_in_place(net: nn.Module) -> None:
    def hook(g: Tensor) -> None:
        g.mul_(0.5)

    net[1].bias.register_hook(hook)


def on_module(net: nn.Module) -> None:
    net[3].register_full_backward_hook(lambda module, given, got: halves(given))


def before_module(net: nn.Module) -> None:
    net[3].register_full_backward_pre_hook(lambda module, got: halves(got))


def on_outputs(net: nn.Module) -> None:
    def hooked(module: nn.Module, given: Any, h: Tensor) -> None:
        if h.requires_grad:
            h.register_hook(halves)

    net[2].register_forward_hook(hooked)


HOOKS = [on_weight, on_weight_in_place, on_module, before_module, on_outputs]
REPLAYING = [mode for mode in ALL if mode.startswith(("forward", "difference")) or "per_example" in mode]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("mode", [*REPLAYING, "implicit"])
def test_hooks_that_change_gradients_are_refused_where_passes_are_repeated(
    mode: str, dtype: torch.dtype, hook: Any
) -> None:
    torch.manual_seed(5)
    problem = case(mlp(), dtype)
    hook(problem.student)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALL, "implicit", metapl.feedback.Implicit(damping=10.0))
        refused(problem, mode, 1, r"the student has a hook on .* that changes gradients.*mode=\"unrolled\"")


@pytest.mark.parametrize("hook", [on_weight, on_module, on_outputs])
@pytest.mark.parametrize("mode", ["reinforce", "loss_difference"])
def test_other_modes_take_the_gradient_as_a_hook_leaves_it(mode: str, hook: Any) -> None:
    """η⟨∇L(θ′), ĝ⟩ and L(θ) − L(θ′), with θ′ = θ − ηĝ and the gradient ĝ that the hook has changed."""
    problem = case(mlp(), torch.float64)
    hook(problem.student)
    problem.draw_from_start()
    student, (x, y) = problem.student, problem.labeled
    z = student(problem.unlabeled)
    drawn = torch.multinomial(problem.teacher(problem.unlabeled).softmax(-1), 1)[:, 0]
    theta = list(student.parameters())
    g = torch.autograd.grad(F.cross_entropy(z, drawn), theta)
    other = copy.deepcopy(student)
    with torch.no_grad():
        for p, d in zip(other.parameters(), g, strict=True):
            p.sub_(0.3 * d)
            p._backward_hooks = None
    before, after = F.cross_entropy(student(x), y), F.cross_entropy(other(x), y)
    v = torch.autograd.grad(after, list(other.parameters()))
    expected = 0.3 * sum((a * b).sum() for a, b in zip(v, g, strict=True)) if mode == "reinforce" else before - after
    problem.draw_from_start()
    inner = torch.optim.SGD(student.parameters(), lr=0.3)
    found = metapl.hypergradient(**problem.networks(), **problem.data(), mode=mode, inner_optimizer=inner)
    assert float(found.feedback) == pytest.approx(float(expected.detach()), rel=1e-9)


@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_hooks_on_modules_are_refused_over_several_steps(mode: str) -> None:
    """The second derivatives of later steps would go through them once more."""
    problem = case(mlp(), torch.float64)
    on_module(problem.student)
    refused(problem, mode, 3, "the student has a hook on its module 3 that changes gradients")


def test_hooks_that_only_look_are_no_matter() -> None:
    problem, seen = case(mlp(), torch.float32), []
    problem.student[3].register_full_backward_hook(lambda module, given, got: seen.append(len(got)))
    problem.student[1].weight.register_hook(lambda g: seen.append(0) or g)
    for mode in REPLAYING:
        metapl.BilevelTrainer(**problem.networks(), mode=ALL[mode]).step(**problem.data())
    assert seen


# ---------------------------------------------------------------------------------------------------------- casts


class Narrow(nn.Module):
    """A float64 network that computes its middle in another type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.head, self.dtype = nn.Linear(16, 16), nn.Linear(16, CLASSES), dtype

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.flatten(1)).to(self.dtype).tanh().softmax(-1)
        return self.head(16 * h.to(self.head.weight.dtype))


@pytest.mark.parametrize("mode", ["difference", "difference_one_sided", "forward", "unrolled"])
def test_float32_inside_a_float64_student(mode: str) -> None:
    torch.manual_seed(5)
    problem = case(Narrow(torch.float32), torch.float64)
    expected, _ = plainly(problem, 1, "soft")
    inner = RULE.build(problem.student)
    found = metapl.hypergradient(**problem.networks(), **problem.data(), mode=ALL[mode], inner_optimizer=inner)
    assert error(found.grads, expected) < (3e-3 if "difference" in mode else 1e-5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_inside_is_refused_by_a_difference(half: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    problem = case(Narrow(half), dtype)
    refused(problem, "difference", 1, r"the student casts to torch\.(b?float16) in its forward.*mode=\"forward\"")
