"""Double backward by hand, with plain torch: L(θ′) as one graph to the teacher's weights, and real steps beside it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, reason_of
from metapl.execution.modules import trainable
from metapl.execution.rng import RandomState, replayed
from metapl.feedback import Estimator
from metapl.feedback.hypergradient import Hypergradient, hypergradient
from metapl.feedback.inner_step import read_batch
from metapl.feedback.lookahead import inner_batches
from metapl.problems.base import Problem, Signal, asked_first, enters_input
from metapl.updates import update_of

Tree = dict[str, Tensor]

SEED = 0  # of dropout masks, the same in every pass, and of the first draw of labels


@dataclass(frozen=True)
class Run:
    """L(θ′), what was met on the way to it, and its gradients in the teacher's weights and in the signals' values."""

    loss: Tensor
    signals: list[Signal]
    outputs: list[Tensor]  # of the student in each step, and on the labeled batch
    inner_loss: Tensor  # of the first step, and its gradient in the student's weights
    inner_grads: Tree
    grads: Tree = field(default_factory=dict)
    feedback: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """What a gradient is computed from: as it was given, or copies of it, each of which serves one computation."""

    teacher: nn.Module | None
    student: nn.Module
    problem: Problem
    inner_optimizer: Any
    inner_state: Any
    labeled_batch: Any
    unlabeled_batch: Any
    clip_norm: float | None

    def copied(self, dtype: torch.dtype | None = None) -> Case:
        """Copies on the CPU that share what the originals share, with all floating-point tensors in ``dtype``, also
        those that modules and problems hold as attributes; None: each in its own type."""
        transform = self.inner_optimizer  # of functions, if it is one of TorchOpt's
        memo: dict[int, Any] = {id(transform): transform} if isinstance(transform, tuple) else {}
        copies: dict[str, Any] = {}
        for name, thing in vars(self).items():
            try:
                copies[name] = copy.deepcopy(thing, memo)
            except Exception as error:
                raise MetaplError(
                    f"check_gradient computes on copies, and the {name.replace('_', ' ')} cannot be copied: "
                    f"{reason_of(error)}. Expected objects that copy.deepcopy takes: without tensors that have a "
                    "graph, generators, locks or files."
                ) from error
        # The memo has every tensor that was copied, wherever it was found.
        for t in [t for t in memo.values() if isinstance(t, Tensor)]:
            t.grad = None
            t.data = t.data.to("cpu", dtype if t.is_floating_point() else None)
        return Case(**copies)

    def by_mode(self, estimate: Estimator, seed: int = SEED) -> Hypergradient:
        update = update_of(self.inner_optimizer, trained(self.student), self.inner_state)
        torch.default_generator.manual_seed(SEED)
        return hypergradient(
            self.teacher,
            self.student,
            labeled=self.labeled_batch,
            unlabeled=self.unlabeled_batch,
            mode=estimate,
            problem=self.problem,
            inner_optimizer=update,
            generator=torch.Generator().manual_seed(seed),
            clip_norm=self.clip_norm,
        )

    def labeled_loss(self, truncate: int | None = None, seen: Sequence[Tensor] = ()) -> Run:
        """L(θ′) with its graph to the teacher's weights: the inner pass, the teacher, the step, the labeled pass.

        Args:
            truncate: steps, from the last, whose signals keep their graph.
            seen: what the signals read in the place of the student's outputs.
        """
        torch.default_generator.manual_seed(SEED)
        generator = torch.Generator().manual_seed(SEED)
        problem, signals, outputs, inner = self.problem, list[Signal](), list[Tensor](), list[tuple[Tensor, Tree]]()
        labeled, batches = read_batch(problem, "outer_batch", self.labeled_batch), inner_batches(self.unlabeled_batch)
        theta: Tree = {**trained(self.student)}
        step, state = self._update()

        def told(batch: Any, outputs: Any) -> Signal:
            with _named("the problem's signal"):
                teacher = nn.Module() if self.teacher is None else self.teacher
                signal = problem.normalized_signal(problem.signal(teacher, batch, outputs, generator=generator))
                signals.append(replace(signal, **pytree.tree_map_only(Tensor, _node, dict(vars(signal)))))
            cut = truncate is not None and len(signals) <= len(batches) - truncate
            return signal.detached() if cut else signals[-1]

        with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention have no second derivative
            for number, batch in enumerate(batches):
                early = (told(batch, None),) if asked_first(problem) else ()
                entering = early if enters_input(problem) else ()
                with _named("the student"):
                    z = functional_call(self.student, theta, (problem.student_input(batch, *entering),))
                branch = RandomState.now(torch.device("cpu")).branch()  # where L(θ′) draws its masks
                outputs.append(z.detach())
                (signal,) = early or (told(batch, seen[number] if seen else z.detach()),)
                with _named("the problem's inner_loss"):
                    loss = problem.inner_loss(z, signal, batch, theta).mean()
                    found = torch.autograd.grad(loss, list(theta.values()), create_graph=True, allow_unused=True)
                g = {name: t for name, t in zip(theta, found, strict=True) if t is not None}
                inner.append((loss.detach(), {name: t.detach() for name, t in g.items()}))
                theta, state = step(theta, _clipped(g, self.clip_norm), state)
            with replayed(branch):
                with _named("the student"):
                    z = functional_call(self.student, theta, (problem.outer_input(labeled),))
                with _named("the problem's outer_loss"):
                    outer: Any = problem.outer_loss(z, labeled)
        loss = outer[0] / outer[1] if isinstance(outer, tuple | list) else outer
        return Run(loss, signals, [*outputs, z.detach()], *inner[0])

    def by_hand(self, truncate: int | None = None) -> Run:
        """The same with the gradients of L(θ′)."""
        run, taught = self.labeled_loss(truncate), trained(self.teacher)
        values = [t for t in pytree.tree_leaves([s.value for s in run.signals]) if t.is_floating_point()]
        with _named("a backward pass"), sdpa_kernel(SDPBackend.MATH):
            found = torch.autograd.grad(run.loss, [*taught.values(), *values], materialize_grads=True)
        return replace(run, grads=dict(zip(taught, found, strict=False)), feedback=[-g for g in found[len(taught) :]])

    def _update(self) -> tuple[Callable[[Tree, Tree, Any], tuple[Tree, Any]], Any]:
        """The student's update by hand, and the optimizer's present state."""
        optimizer, theta = self.inner_optimizer, trained(self.student)
        if not isinstance(optimizer, torch.optim.Optimizer):
            transform = update_of(optimizer, theta, self.inner_state)
            return transform.update, transform.read_state()
        of_group = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        groups = {name: of_group[id(p)] for name, p in theta.items()}
        rule = _sgd if isinstance(optimizer, torch.optim.SGD) else _adam

        def stepped(theta: Tree, grads: Tree, state: Any) -> tuple[Tree, Any]:
            moved = {name: rule(theta[name], g, state[name], groups[name]) for name, g in grads.items()}
            return theta | {n: p for n, (p, _) in moved.items()}, state | {n: s for n, (_, s) in moved.items()}

        return stepped, {name: dict(optimizer.state.get(p, {})) for name, p in theta.items()}

    def off_by_moves(self, network: str, grads: Tree, run: Run, move: float) -> tuple[float, float, float]:
        r"""How far (f(p + δ) − f(p − δ)) / 2 is from ⟨∇f, δ⟩ along three moves δ of random signs, what rounding leaves
        of it, and the length of ∇f ⊙ δ; f is L(θ′) of the ``"teacher"``'s parameters p, or ℓ of the ``"student"``'s,
        and δ is ``move`` times their root mean square."""
        draw, weights, gaps = torch.Generator().manual_seed(SEED), trained(getattr(self, network)), []

        def f(delta: Tree, side: int) -> float:
            case = self.copied(torch.float64)
            named = trained(getattr(case, network))
            with torch.no_grad():
                for name, d in delta.items():
                    named[name].add_(side * d)
            there = case.labeled_loss(seen=run.outputs)
            return float(there.loss.detach() if network == "teacher" else there.inner_loss)

        sizes = {n: move * max(float(weights[n].detach().double().square().mean().sqrt()), 1e-3) for n in grads}
        for _ in range(3):
            signs = {n: torch.randint(0, 2, g.shape, generator=draw).double() * 2 - 1 for n, g in grads.items()}
            delta = {n: sizes[n] * t for n, t in signs.items()}
            terms = torch.cat([(d * grads[n]).flatten() for n, d in delta.items()])
            gaps.append((f(delta, 1) - f(delta, -1)) / 2 - float(terms.sum()))
        loss = run.loss.detach() if network == "teacher" else run.inner_loss
        return math.sqrt(sum(gap**2 for gap in gaps) / 3), 1e-14 * abs(float(loss)), float(terms.norm())


def trained(network: nn.Module | None) -> dict[str, nn.Parameter]:
    return {} if network is None else trainable(network)


def _node(t: Tensor) -> Tensor:
    """A tensor of a signal as a node of its own, whose gradient is not that through other fields."""
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_(t.is_floating_point())


def _clipped(grads: Tree, most: float | None) -> Tree:
    if most is None:
        return grads
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    return {name: g * (most / (norm + 1e-6)).clamp(max=1.0) for name, g in grads.items()}


def _sgd(p: Tensor, g: Tensor, state: Any, group: Any) -> tuple[Tensor, Any]:
    d = (-g if group["maximize"] else g) + group["weight_decay"] * p
    if group["momentum"]:
        before = state.get("momentum_buffer")
        velocity = d if before is None else group["momentum"] * before + (1 - group["dampening"]) * d
        d, state = d + group["momentum"] * velocity if group["nesterov"] else velocity, {"momentum_buffer": velocity}
    return p - group["lr"] * d, state


def _adam(p: Tensor, g: Tensor, state: Any, group: Any) -> tuple[Tensor, Any]:
    (beta1, beta2), lr, decay, t = group["betas"], group["lr"], group["weight_decay"], float(state.get("step", 0)) + 1
    decoupled = group.get("decoupled_weight_decay", False)
    d = (-g if group["maximize"] else g) + (0 if decoupled else decay * p)
    m = beta1 * state.get("exp_avg", 0) + (1 - beta1) * d
    n = top = beta2 * state.get("exp_avg_sq", 0) + (1 - beta2) * d.square()
    if group["amsgrad"]:
        before = state.get("max_exp_avg_sq", torch.zeros_like(n))
        top = torch.where(n >= before, n, before)
    root = (top / (1 - beta2**t)).clamp_min(torch.finfo(p.dtype).tiny).sqrt()  # the update is smooth at 0, this is not
    moved = p * (1 - lr * decay if decoupled else 1) - lr * (m / (1 - beta1**t)) / (root + group["eps"])
    return moved, {"step": t, "exp_avg": m, "exp_avg_sq": n, "max_exp_avg_sq": top}


@contextmanager
def _named(who: str) -> Iterator[None]:
    """Say whose code fails in a block: most often it makes tensors of one type, or for one device."""
    try:
        yield
    except MetaplError:
        raise
    except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise MetaplError(
            f"check_gradient computes on the CPU, in float64 too, by double backward, and {who} fails there: "
            f"{reason_of(error)}. Expected code that takes its types and devices from its inputs (x.new_zeros(...), "
            "t.to(x)) and operations with a second derivative."
        ) from error
