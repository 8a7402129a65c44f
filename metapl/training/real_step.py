r"""F(θ_T): the outer loss after the student's real steps on the teacher's signal, on copies of all that it depends on.

Everything is as a step has it: the draws of masks and labels, buffers that passes move, the clip, micro-batches, and
the optimizer's own ``step()``. :mod:`metapl.training.verify` takes differences of it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.batch import micro_batches
from metapl.execution.modules import trainable
from metapl.execution.rng import RandomState
from metapl.problems.base import Problem, Signal, enters_input, sum_and_weight
from metapl.updates import update_of

Tree = dict[Any, Tensor]

APPROXIMATE = 1e-2  # the relative error that a mode may have which takes differences itself
EPS, EPS32 = 2e-16, 1e-7  # rounding of F, and of one that runs in float32 somewhere


def of_torch(optimizer: Any) -> list[Any]:
    """The optimizers of ``torch.optim``; none of a transform."""
    parts = [*optimizer] if isinstance(optimizer, tuple | list) else [optimizer]
    return parts if all(isinstance(part, torch.optim.Optimizer) for part in parts) else []


@dataclass
class Run:
    """One evaluation of F, and what was met on the way."""

    copies: Step
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    inner: float = 0.0  # the first step's loss
    signals: list[Signal] = field(default_factory=list)  # of each micro-batch of each step, with the teacher's graph
    outputs: list[Tensor] = field(default_factory=list)
    labeled: list[Tensor] = field(default_factory=list)  # the student's outputs on the outer batch
    gradients: dict[str, Tree] = field(default_factory=dict)  # of the first inner loss and of the outer loss
    states: list[Tree] = field(default_factory=list)  # buffers and frozen parameters before each pass
    written: set[str] = field(default_factory=set)  # weights of the student that a pass or a loss has moved


@dataclass(frozen=True)
class Step:
    """What a step is computed from: as it was given, or copies of it, each of which serves one evaluation."""

    teacher: nn.Module | None
    student: nn.Module
    problem: Problem
    optimizer: Any
    state: Any
    labeled: Any
    batches: list[Any]
    clip_norm: float | None
    accumulate: int
    generator: torch.Generator | None
    random: RandomState
    own: tuple[Tensor, ...] = ()  # what the problem holds that requires a gradient

    def copied(self, dtype: torch.dtype | None = None) -> Step:
        """Copies that share what the originals share, with all tensors of floating point in ``dtype``."""
        memo: dict[int, Any] = {}
        for network in (self.teacher, self.student, self.problem):
            for part in network.modules() if isinstance(network, nn.Module) else ():
                # Results in attributes, such as the old weight_norm's, which deepcopy refuses.
                memo |= {id(t): t.detach().clone() for t in vars(part).values() if isinstance(t, Tensor) and t.grad_fn}
        teacher, student = copy.deepcopy((self.teacher, self.student), memo)
        before = set(memo)
        problem = copy.deepcopy(self.problem, memo)
        own = [t for i, t in memo.items() if i not in before and isinstance(t, Tensor) and t.requires_grad]
        state, labeled, batches = copy.deepcopy((self.state, self.labeled, self.batches), memo)
        for t in memo.values() if dtype is not None else ():
            if isinstance(t, Tensor) and t.is_floating_point():
                t.grad, t.data = None, t.data.to(dtype)
        memory = {p.untyped_storage().data_ptr(): p for p in trainable(self.student).values()}
        for t in memo.get(id(memo), ()):  # tensors in the memory of a parameter, whose copy has memory of its own
            if isinstance(t, Tensor) and not isinstance(t, nn.Parameter) and t.untyped_storage().data_ptr() in memory:
                p = memory[t.untyped_storage().data_ptr()]
                begin = t.storage_offset() - p.storage_offset()
                memo[id(t)].data = memo[id(p)].data.as_strided(t.shape, t.stride(), begin)
        # Built anew: a copy of an optimizer may hold a step() that is bound to the first one.
        rebuilt = tuple(_rebuilt(one, memo) for one in of_torch(self.optimizer)) or (self.optimizer,)
        optimizer = rebuilt if len(rebuilt) > 1 else rebuilt[0]
        options = self.clip_norm, self.accumulate, self.generator and self.generator.clone_state(), self.random
        return Step(teacher, student, problem, optimizer, state, labeled, batches, *options, tuple(own))

    def beside(self) -> Step:
        """The same a hundredth of the weights' size away: no ReLU is at exactly 0, where it has two slopes."""
        case, draw = self.copied(), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in (*case.learned().values(), *trainable(case.student).values()):
                p.add_(1e-2 * max(size_of(p), 0.1) * torch.randn(p.shape, generator=draw).to(p))
        return case

    def learned(self) -> Tree:
        """All parameters of the teacher and of the problem."""
        taught = {} if self.teacher is None else trainable(self.teacher)
        return {**taught, **{f"the problem's parameter {i}": t for i, t in enumerate(self.own)}}

    def taken(
        self,
        moved: str = "",
        by: Tree | None = None,
        side: float = 0.0,
        *,
        told: list[Signal] | None = None,
        seen: list[Tensor] | None = None,
        held: list[Tree] | None = None,
        steps: bool = True,
    ) -> Run:
        """Take the steps on fresh copies.

        Args:
            moved, by, side: the ``"teacher"`` with the problem's parameters, fields of the ``"signal"``, or the
                student's weights at the ``"start"`` or the ``"end"`` by ``side`` times ``by``; ``"weights"``: these
                are ε, and the inner losses count 1 + ε times.
            told: signals in the place of the teacher's.
            seen: the student's outputs as the teacher is given them, constants to every mode.
            held: buffers and frozen parameters with which passes begin.
            steps: False: for L(θ).
        """
        case, device, parts = self.copied(), self.random.device, self.accumulate
        problem, student, teacher, theta = case.problem, case.student, case.teacher, trainable(case.student)
        run, advance, by = Run(case), _stepper(case, theta), by or {}
        first = problem.signal_of_batch or enters_input(problem)  # the teacher is asked before the student runs

        def move(what: str, tree: Any) -> None:
            with torch.no_grad():
                for name, d in by.items() if what == moved else ():
                    tree[name].add_(d, alpha=side)

        def begin(network: nn.Module | None) -> None:
            named = [] if network is None else [*network.named_buffers(), *network.named_parameters()]
            still = {name: t for name, t in named if not t.requires_grad}
            for name, t in ({} if held is None else held[len(run.states)]).items():
                if name in still:
                    still[name].copy_(t)
            run.states.append({name: t.detach().clone() for name, t in still.items()})

        def ask(x: Any, z: Any) -> Signal:
            begin(teacher)
            z = z if z is None or seen is None else seen[len(run.signals)]
            return problem.signal(teacher or nn.Module(), x, z, generator=case.generator)

        def heard(given: Signal) -> Signal:
            """What the student learns from, of what the teacher says about a micro-batch."""
            k, i = divmod(len(run.signals), parts)
            run.signals.append(given)
            signal = given if told is None else told[len(run.signals) - 1]
            shift = {name: side * d for (step, name), d in by.items() if step == k} if moved == "signal" else {}
            whole = signal.fields()
            rows = {n: d if d.shape == whole[n].shape else d.chunk(parts)[i] for n, d in shift.items()}
            return signal.having({name: whole[name] + d for name, d in rows.items()})

        def compare(before: Tree) -> None:
            run.written.update(name for name, p in theta.items() if not same(p, before[name]))

        move("teacher", case.learned())
        move("start", theta)
        case.random.restore()
        for number, batch in enumerate(case.batches):
            pieces, before = micro_batches(batch, parts, "unlabeled"), {n: p.detach().clone() for n, p in theta.items()}
            said = ask(batch, None).chunks(parts) if problem.signal_of_batch else []
            answers = [heard(said[i] if said else ask(x, None)) for i, x in enumerate(pieces)] if first else []
            for i, x in enumerate(pieces):
                begin(student)
                z = student(problem.student_input(x, *answers[i : i + 1] if enters_input(problem) else ()))
                after = RandomState.now(device)
                run.outputs.append(z.detach())
                signal = answers[i] if first else heard(ask(x, z.detach()))
                losses = problem.inner_loss(z, signal.detached(), x, theta)
                if moved == "weights":
                    eps = side * by[moved]
                    losses = losses * (1 + (eps.chunk(parts)[i] if eps.ndim else eps))
                (losses.mean() / parts).backward()
                run.inner += 0.0 if number else float(losses.detach().mean()) / parts
            compare(before)
            grads = {name: p.grad for name, p in theta.items() if p.grad is not None}
            run.gradients.setdefault("start", {name: g.clone() for name, g in grads.items()})
            if case.clip_norm is not None:
                nn.utils.clip_grad_norm_([p for name, p in theta.items() if name in grads], case.clip_norm)
            if steps:
                advance(grads)
            student.zero_grad()
        move("end", theta)
        before, pairs = {n: p.detach().clone() for n, p in theta.items()}, []
        after.branch().restore()  # the labeled pass draws from a stream of its own
        for part in micro_batches(problem.outer_batch(case.labeled), parts, "labeled"):
            begin(student)
            run.labeled.append(student(problem.outer_input(part)))
            pairs.append(sum_and_weight(problem.outer_loss(run.labeled[-1], part)))
        compare(before)
        run.loss = torch.stack([total for total, _ in pairs]).sum() / sum(weight for _, weight in pairs)
        if not moved and run.loss.requires_grad:
            run.loss.backward()
            run.gradients["end"] = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theta.items()}
        run.loss = run.loss.detach()
        return run


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _rebuilt(optimizer: Any, memo: dict[int, Any]) -> Any:
    """An optimizer over the copies of its parameters."""
    if "step" in vars(optimizer) and not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise MetaplError("step() of the inner optimizer was replaced on the object; expected that of its class.")
    groups = [{**group, "params": [memo.get(id(p), p) for p in group["params"]]} for group in optimizer.param_groups]
    built = type(optimizer)(groups)
    built.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        getattr(built, name).update(getattr(optimizer, name))
    return built


def _stepper(case: Step, theta: Any) -> Callable[[Tree], None]:
    """The real optimizer's step; of a transform, and of Muon, whose own step rounds to bfloat16, metapl's update."""
    many = of_torch(case.optimizer)
    real = bool(many) and not any(type(one).__name__ == "Muon" for one in many)
    update: Any = None if real else update_of(case.optimizer, theta, case.state)
    state = None if real else update.read_state()

    def advance(grads: Tree) -> None:
        nonlocal state
        for one in many if real else ():
            one.step()
        with torch.no_grad():
            if not real:
                new, state = update.update({name: p.detach() for name, p in theta.items()}, grads, state)
                for name, p in theta.items():
                    p.copy_(new[name])

    return advance


def off_by(
    at: Callable[[Tree, float], float], gradient: Tree, direction: Tree, level: float, eps: float, tolerance: float
) -> float | None:
    """How far ⟨gradient, direction⟩ is from the differences of a function, whose value is ``level``.

    The differences have errors of rounding, which grow as the move shrinks, and of kinks, which shrink with it. So has
    a fresh Adam: it is smooth at gradients below its eps alone.
    """
    terms = flat([gradient[n] * d for n, d in direction.items()])
    predicted, noise, errors = float(terms.sum()), 50 * eps * max(abs(level), 1e-3), list[float]()
    size = max(abs(predicted), float(terms.norm()))
    moves = [10.0**-n for n in range(12, 2, -1)] if eps < EPS32 else [1e-3, 1e-2, 3e-2]
    clear = [move for move in moves if noise / move <= tolerance * size]  # of rounding; the smallest first
    usual, small = [move for move in clear if move == 1e-5], list[tuple[float, float]]()
    for move in [*usual, *(move for move in clear if move not in usual), *(m for m in moves[::-1] if m not in clear)]:
        blind = noise / move
        if errors and blind > 0.1 * size:
            continue
        found = (at(direction, move) - at(direction, -move)) / (2 * move)
        gap, reach = abs(found - predicted), max(size, abs(found))
        if max(gap, reach) <= blind:  # both are zero, or what is not drowns
            return 0.0 if abs(predicted) <= noise else None
        if blind > 0.1 * reach or not math.isfinite(found):
            continue
        if gap <= tolerance * reach + blind:
            return max(gap - blind, 0.0) / reach
        errors.append(gap / reach)
        small += [(found, gap)] if move in clear[:2] else []
        if len(small) == 2 and abs(small[0][0] - small[1][0]) + 10 * blind <= 0.2 * min(small[0][1], small[1][1]):
            return max(min(errors), 2 * tolerance)  # the smallest moves agree with each other
    best = min(errors, default=None)
    return best if best is None or best > APPROXIMATE else min(best, tolerance)


def flat(tree: Any) -> Tensor:
    leaves = [t.detach() for t in pytree.tree_leaves(tree)]  # sparse ones of embeddings
    return torch.cat([(t.to_dense() if t.is_sparse else t).double().flatten() for t in leaves])


def size_of(t: Tensor) -> float:
    return max(float(t.detach().double().square().mean().sqrt()), 1e-2)
