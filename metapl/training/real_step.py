r"""F(θ_T): the outer loss after the student's real steps on the teacher's signal, on copies of all that it depends on.

Everything is as a step has it: the draws of masks and labels, buffers that passes move, the clip, and the optimizer's
own ``step()``. :mod:`metapl.training.verify` takes differences of it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import few
from metapl.execution.state import RandomState, trainable
from metapl.feedback import Lookahead, Mode
from metapl.feedback.hypergradient import Hypergradient, hypergradient
from metapl.problems.base import Problem, Signal, enters_input, sum_and_weight
from metapl.updates import TorchUpdate, Update, parts_of

Tree = dict[Any, Tensor]
HOOKS = "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"


@dataclass
class Run:
    """One evaluation of F, and what was met on the way."""

    copies: Step
    loss: Any = None  # the outer loss
    inner: Any = None  # the first step's loss
    signals: list[Signal] = field(default_factory=list)  # of each step, with the teacher's graph
    outputs: list[Tensor] = field(default_factory=list)  # of each step; at last, with their graph, on the outer batch
    gradients: dict[str, Tree] = field(default_factory=dict)  # of the first inner loss and of the outer loss
    states: list[Tree] = field(default_factory=list)  # buffers and frozen parameters before each pass
    written: set[str] = field(default_factory=set)  # weights of the student that a pass or a loss has moved


@dataclass(frozen=True)
class Step:
    """What a step is computed from: as it was given, or copies of it, each of which serves one evaluation."""

    teacher: nn.Module | None
    student: nn.Module
    problem: Problem
    update: Update  # of the optimizer, without a clip
    labeled: Any
    batches: list[Any]
    clip_norm: float | None
    generator: torch.Generator | None
    random: RandomState
    parts: int = 1  # micro-batches, of which the batches are the first ones
    own: tuple[Tensor, ...] = ()  # what the problem holds that requires a gradient

    def copied(self, dtype: torch.dtype | None = None) -> Step:
        """Copies that share what the originals share, with all tensors of floating point in ``dtype``."""
        memo: dict[int, Any] = {id(self.generator): self.generator and self.generator.clone_state()}
        for network in (self.teacher, self.student, self.problem):
            for part in network.modules() if isinstance(network, nn.Module) else ():
                # Results in attributes, such as the old weight_norm's, which deepcopy refuses.
                memo |= {id(t): t.detach().clone() for t in vars(part).values() if isinstance(t, Tensor) and t.grad_fn}
        transform = getattr(self.update, "transform", None)  # of functions alone; TorchOpt's chains cannot be copied
        memo[id(transform)] = transform
        copy.deepcopy((self.teacher, self.student), memo)
        known = set(memo)
        copy.deepcopy(self.problem, memo)
        own = [t for i, t in memo.items() if i not in known and isinstance(t, Tensor) and t.requires_grad]
        case = replace(copy.deepcopy(self, memo), own=tuple(own))
        for t in memo.values() if dtype is not None else ():
            if isinstance(t, Tensor) and t.is_floating_point():
                t.grad, t.data = None, t.data.to(dtype)
        for p in [t for t in memo[id(memo)] if isinstance(t, nn.Parameter)]:
            vars(memo[id(p)]).update(copy.deepcopy(vars(p), memo))  # Python attributes, which torch's copy leaves out
        memory = {p.untyped_storage().data_ptr(): p for p in trainable(self.student).values()}
        for t in memo[id(memo)]:  # tensors in the memory of a parameter, whose copy has memory of its own
            if isinstance(t, Tensor) and not isinstance(t, nn.Parameter) and t.untyped_storage().data_ptr() in memory:
                p = memory[t.untyped_storage().data_ptr()]
                begin = t.storage_offset() - p.storage_offset()
                memo[id(t)].data = memo[id(p)].data.as_strided(t.shape, t.stride(), begin)
        if isinstance(self.update, TorchUpdate):
            pairs = zip(*(parts_of(vars(update)["optimizer"]) for update in (case.update, self.update)), strict=True)
            for copied, own in pairs:
                vars(copied).update({name: vars(own)[name] for name in HOOKS})  # which deepcopy leaves out
        case.update.follow(trainable(case.student))
        return case

    def beside(self) -> Step:
        """The same a hundredth of the weights' size away: no ReLU is at exactly 0, where it has two slopes."""
        case, draw = self.copied(), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in (*case.learned().values(), *trainable(case.student).values()):
                p.add_(1e-2 * max(size_of(p), 0.1) * torch.randn(p.shape, generator=draw).to(p))
        return case

    def learned(self) -> Tree:
        taught = {} if self.teacher is None else trainable(self.teacher)
        return {**taught, **{f"the problem's parameter {i}": t for i, t in enumerate(self.own)}}

    def by_mode(self, mode: Mode) -> Hypergradient:
        case = self.copied()
        case.random.restore()
        batches = {"labeled": case.labeled, "unlabeled": Lookahead(case.batches)}
        options: Any = {"inner_optimizer": case.update, "generator": case.generator, "clip_norm": case.clip_norm}
        return hypergradient(case.teacher, case.student, **batches, mode=mode, problem=case.problem, **options)

    def taken(
        self,
        moved: str = "",
        by: Tree | None = None,
        side: float = 0.0,
        *,
        told: list[Signal] | None = None,  # signals in the place of the teacher's
        seen: list[Tensor] | None = None,  # the student's outputs as the teacher is given them: constants to every mode
        held: list[Tree] | None = None,  # buffers and frozen parameters with which passes begin
        steps: bool = True,  # False: for L(θ), with the graph of the inner loss
    ) -> Run:
        """Take the steps on fresh copies, with something ``moved`` by ``side`` times ``by``: the ``"teacher"`` and the
        problem's parameters, fields of the ``"signal"``, the student's weights at the ``"inner"`` or the ``"outer"``
        loss, or the ``"weights"`` 1 + ε of the inner losses."""
        case, by = self.copied(), by or {}
        problem, student, update, theta = case.problem, case.student, case.update, trainable(case.student)
        enters, run = enters_input(problem), Run(case)

        def move(what: str, tree: Any) -> None:
            with torch.no_grad():
                for name, d in by.items() if what == moved else ():
                    tree[name].add_(d, alpha=side)

        def begin(network: nn.Module | None) -> None:
            named = [] if network is None else [*network.named_buffers(), *network.named_parameters()]
            still = {name: t for name, t in named if not t.requires_grad}
            for name, t in held[len(run.states)].items() if held is not None else ():
                if name in still:
                    still[name].copy_(t)
            run.states.append({name: t.detach().clone() for name, t in still.items()})

        def ask(x: Any, z: Tensor | None) -> Signal:
            begin(case.teacher)
            k, z = len(run.signals), z if z is None or seen is None else seen[len(run.signals)]
            run.signals.append(problem.signal(case.teacher or nn.Module(), x, z, generator=case.generator))
            signal = run.signals[k].detached() if told is None else told[k]
            shift = {name: d for (step, name), d in by.items() if step == k} if moved == "signal" else {}
            return signal.having({name: signal.fields()[name] + side * d for name, d in shift.items()})

        def now() -> Tree:
            return {name: p.detach().clone() for name, p in theta.items()}

        def compare(before: Tree) -> None:
            same = {n: p.dtype == before[n].dtype and p.shape == before[n].shape for n, p in theta.items()}
            changed = (n for n, p in theta.items() if not same[n] or not torch.allclose(p, before[n], 0, 0, True))
            run.written.update(changed)

        move("teacher", case.learned())
        move("inner", theta)
        case.random.restore()
        for k, x in enumerate(case.batches):
            before = now()
            signal = ask(x, None) if problem.signal_of_batch or enters else None
            begin(student)
            z = student(problem.student_input(x, *([signal] if enters else [])))
            after = RandomState.now(self.random.device)
            run.outputs.append(z.detach())
            signal = signal or ask(x, z.detach())
            losses = problem.inner_loss(z, signal, x, theta)
            loss = (losses * (1 + side * by[0, "log_prob"]) if moved == "weights" else losses).mean()
            loss.backward(retain_graph=not steps)
            run.inner = run.inner if k else loss
            compare(before)
            grads = {name: p.grad for name, p in theta.items() if p.grad is not None}
            run.gradients.setdefault("inner", {name: g.clone() for name, g in grads.items()})
            if case.clip_norm is not None:
                nn.utils.clip_grad_norm_(theta.values(), case.clip_norm)
            if steps:  # the optimizer's own; of a transform, and of Muon, the rule
                update.exactly(theta, grads)
            student.zero_grad()
        move("outer", theta)
        before, judged = now(), problem.outer_batch(case.labeled)
        after.branch().restore()  # the labeled pass draws from a stream of its own
        begin(student)
        run.outputs.append(student(problem.outer_input(judged)))
        total, weight = sum_and_weight(problem.outer_loss(run.outputs[-1], judged))
        compare(before)
        run.loss = total / weight
        if not moved and run.loss.requires_grad:
            run.loss.backward()
            run.gradients["outer"] = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theta.items()}
        run.loss = run.loss.detach()
        return run


def flat(tree: Any) -> Tensor:
    return torch.cat([t.detach().to_dense().double().flatten() for t in pytree.tree_leaves(tree)])


def size_of(t: Tensor) -> float:
    return max(float(t.detach().double().square().mean().sqrt()), 1e-2)


def nodes_of(*tensors: Tensor) -> list[Any]:
    nodes: list[Any] = [t.grad_fn for t in tensors if t.grad_fn is not None]
    known = set(nodes)
    for node in nodes:  # which grows
        nodes += (new := {other for other, _ in node.next_functions if other is not None} - known)
        known |= new
    return nodes


def functions_in(t: Tensor) -> list[str]:
    """The names of autograd functions of one's own in a graph."""
    return sorted({type(n).__name__.removesuffix("Backward") for n in nodes_of(t) if hasattr(n, "_forward_cls")})


def rounding_of(run: Run) -> float:
    """The rounding of the coarsest type in the graphs of a run on copies in float64; 0 where all are in float64."""
    ends = run.inner, run.outputs[-1], *(t for signal in run.signals for t in signal.fields().values())
    dtypes = {result.dtype for node in nodes_of(*ends) for result in getattr(node, "_input_metadata", ())}
    return max((torch.finfo(t).eps for t in dtypes - {torch.float64} if t.is_floating_point), default=0.0)


def causes(before: Step, run: Run) -> list[str]:
    """What a step has in it, or has changed, that may make a gradient wrong."""
    pairs = [(getattr(before, who), getattr(run.copies, who)) for who in ("student", "teacher")]
    parts = [pair for a, b in pairs if a is not None for pair in zip(a.modules(), b.modules(), strict=False)]
    hooked = [type(a).__name__ for a, _ in parts if a._forward_hooks or a._backward_hooks]
    counted = [n for a, b in parts for n, v in vars(b).items() if isinstance(v, int | float) and vars(a).get(n) != v]
    inputs = zip(*(pytree.tree_leaves([case.batches, case.labeled]) for case in (before, run.copies)), strict=True)
    written = ["batches"] if any(isinstance(a, Tensor) and not a.equal(b) for a, b in inputs) else []
    found = {"hooks (of {})": hooked, "attributes that a pass changes ({})": counted, "{} changed in place": written}
    found["autograd functions of the student's own ({})"] = functions_in(run.outputs[-1])
    return [text.format(few(names, 3)) for text, names in found.items() if names]
