"""The teacher's half of a step: the signal, and the loss that it learns from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.agreement import check_copies, check_recomputed
from metapl.execution.batch import length
from metapl.execution.buffers import Slots, State, unchanged
from metapl.execution.compiled import runs_compiled
from metapl.execution.kernels import checkpoints_without_reentry, no_fast_path, overwritten_explained
from metapl.execution.local import NOTHING
from metapl.execution.numerics import wide
from metapl.execution.ranks import Ranks, rows_shared
from metapl.execution.rng import RandomState, replayed
from metapl.execution.writes import journal, tensors_in, weights_watched
from metapl.feedback.base import Feedback
from metapl.feedback.inner_step import InnerStep
from metapl.problems.base import Problem, Signal, check_signal, enters_input, has_rows, kind_of
from metapl.problems.losses import TeacherLoss, sum_of_terms


class Known(NamedTuple):
    """The signal of a pass that is computed again, and the generators and the teacher's state that it began with."""

    signal: Signal
    random: RandomState
    state: State
    drawn: Tensor | None


class TeacherPass:
    """The teacher's passes on one inner batch, all at θ_T from before the step: its signal, and the loss that it learns
    from.

    Args:
        student_outputs: S(x_u; θ_S), detached; the signal may depend on them. None: the student has not run, because
            the signal enters its input.
        recompute: make the signal without a graph first, and once more with a graph in :meth:`with_graph`. Cost: one
            more forward pass, and no graph in memory between the two.
        slots: of the teacher.
        student: whose weights are others when the signal is computed again, so that it must not run then; None: they
            are the same.
        records: note the outputs of the teacher, at which :meth:`backward` measures the gradients of its losses.
        known: of a pass that has been run before, and is to be computed again: its signal, and what it began with.
    """

    def __init__(
        self,
        teacher: nn.Module,
        problem: Problem,
        batch: Any,
        student_outputs: Tensor | None,
        generator: torch.Generator | None,
        recompute: bool,
        ranks: Ranks,
        slots: Slots,
        *,
        student: nn.Module | None = None,
        records: bool,
        known: Known | None = None,
    ) -> None:
        self.teacher, self.problem, self.batch, self.ranks = teacher, problem, batch, ranks
        self.student_outputs, self.generator, self.recompute = student_outputs, generator, recompute
        self.student = student
        self._slots, self.records = slots, records
        self._outputs: list[tuple[Tensor, int]] = []  # and their versions, as they were returned
        self._nested = False  # whether an input of a pass depends on another pass
        if known is not None:
            self.signal, self._random, self._state, self._drawn = known
            return
        if not recompute:
            self.signal = self._run()  # Algorithm 1, line 2: ŷ_u ~ T(x_u)
            return
        self._random = RandomState.now(tensors_in(batch)[0].device)
        self._state = State(self._slots.parts)
        self._drawn = None if generator is None else generator.get_state()
        kept = journal()
        with torch.no_grad(), no_fast_path(), checkpoints_without_reentry(), kept as self._state.parameters:
            self.signal = self._run()

    @property
    def known(self) -> Known:
        """What :meth:`with_graph` begins with."""
        return Known(self.signal.detached(), self._random, self._state, self._drawn)

    def with_graph(self) -> Signal:
        """The signal with the teacher's graph, computed again if it was made without."""
        if not self.recompute:
            return self.signal
        generator = self.generator
        before = None if generator is None else generator.get_state()
        try:
            if generator is not None and self._drawn is not None:
                generator.set_state(self._drawn)
            with replayed(self._random), self._state.again(self._slots), self._apart():
                again = self._run()
        finally:
            if generator is not None and before is not None:
                generator.set_state(before)
        for first, second in zip(self.signal.fields().values(), again.fields().values(), strict=True):
            check_recomputed(second.detach(), first.detach())
        return again

    def _run(self) -> Signal:
        outputs: Any = self.student_outputs
        who, given = "the problem's signal()", {"student_outputs": outputs}
        with self._recorded() if self.records else NOTHING, rows_shared(self.ranks), self.watched(self.batch):
            try:
                signal = unchanged(
                    who, given, self.problem.signal, self.teacher, self.batch, outputs, generator=self.generator
                )
            except (AttributeError, TypeError) as error:
                if outputs is not None or "NoneType" not in str(error):
                    raise
                kind, mend = kind_of(self.problem), ", or student_input(batch)"
                why = f"{kind}.student_input(batch, signal) makes the student's input from the signal"
                if not enters_input(self.problem):
                    why, mend = f"{kind}.normalized_signal joins what is said about all micro-batches", ""
                raise MetaplError(
                    f"{kind}.signal reads the student's outputs, and {why}, so the student has not run yet and "
                    f"student_outputs is None; expected a signal of the teacher and the batch alone{mend}. ({error})"
                ) from error
        return check_signal(signal, self.problem)

    def watched(self, inputs: Any = None) -> AbstractContextManager[object]:
        """Refuse a pass in this block that moves the teacher's weights, and keep what it moves of the frozen ones."""
        slots = self._slots
        if slots.weights is not None:
            return NOTHING  # they are compared at the end of the step
        if slots.spread:
            torch.clear_autocast_cache()  # it has casts of weights that were gathered before
            return weights_watched([], "teacher", inputs, looking=False)
        eager = not ("forward" in vars(self.teacher) and runs_compiled(self.teacher))
        on_host = not any(checks.waits(p) for _, _, p in slots.parameters[:1])
        looking = eager and not slots.comparable and (on_host or slots.has_frozen)
        values = slots.comparable and on_host
        return weights_watched(slots.by_part, "teacher", inputs, looking=looking, values=values)

    def _apart(self) -> AbstractContextManager[object]:
        """Refuse a pass of the student in this block, where it would be at other weights than at first."""
        if self.student is None:
            return NOTHING
        learned = {id(part) for part in self.student.modules() if any(p.requires_grad for p in part.parameters(False))}

        def refuse(part: nn.Module, args: Any) -> None:
            if id(part) in learned:
                raise MetaplError(
                    f"{kind_of(self.problem)}.signal runs the student, and it is asked again after a look-ahead of "
                    "several steps, when the student's weights are no longer those of this step. Expected a signal of "
                    "the student's outputs as they are given (student_outputs); or the batches in a list, with "
                    "accumulate=1 and without recompute_teacher, where no signal is computed again."
                )

        return register_module_forward_pre_hook(refuse)

    def _recorded(self) -> RemovableHandle:
        """Collect the outputs of the teacher in a block: the gradients of its losses are measured at these."""

        # A function, unlike a bound method, is not copied with a teacher that a loss copies.
        def record(module: nn.Module, args: Any, output: Any) -> Any:
            if module is not self.teacher:
                return output
            # What else the pass computes from an output is before the view, whose gradient is that of the losses alone.
            views: dict[int, Tensor] = {}
            self._nested |= any(t.requires_grad for t in tensors_in(args))

            def viewed(t: Any) -> Any:
                if t.requires_grad and id(t) not in views:
                    views[id(t)] = t.view_as(t) if t.layout == torch.strided and not t.is_nested else t
                return views.get(id(t), t)

            output = viewed(output) if isinstance(output, Tensor) else pytree.tree_map_only(Tensor, viewed, output)
            # A weight that is returned as it is has no gradient under no_grad.
            self._outputs += [(t, t._version) for t in views.values() if t.requires_grad]
            return output

        return self.teacher.register_forward_hook(record)

    def backward(
        self,
        feedback: Feedback,
        weight: float,
        ratio: float | None,
        losses: Sequence[TeacherLoss],
        labeled: Any,
        step: int,
        parts: int = 1,
    ) -> Objective:
        """Algorithm 1, lines 5-7: add the gradient of weight·(−Σ h·signal) + Σ own losses / parts to the weights'.

        With a ``ratio``, the weight is the one at which this is the ratio of the norms of the gradients of the feedback
        and of the own losses at the teacher's outputs. The norms are NaN for a loss that depends on the teacher's
        weights in other ways too, and where the processes hold shares of one gradient.
        """
        signal = self.with_graph()
        given = {"labeled": labeled, "unlabeled": self.batch, "signal": signal, "step": step}
        with self._recorded(), rows_shared(self.ranks), self.watched():
            terms = sum_of_terms(self.teacher, losses, kind="teacher loss", **given)
        if self.ranks.copies > 1:
            check_copies([*terms.values()], "losses of the teacher", self.ranks)
        from_feedback = feedback.teacher_loss(signal)
        if not self.ranks.alone:  # a sum over all rows, of a gradient that is averaged over the ranks
            from_feedback = self.ranks.size * from_feedback
        own = [*terms.values()] or [torch.zeros_like(from_feedback)]
        from_own = own[0] if len(own) == 1 else torch.stack(own).sum()
        checks.learns(from_own, "teacher")
        scalars = {f"teacher_{name}": term.detach() for name, term in terms.items()}
        scalars["teacher_loss"] = from_own.detach()
        from_own = from_own / parts if parts > 1 else from_own
        rows = length(self.batch) if self.student_outputs is None else len(self.student_outputs)
        shared = (parts > 1 or self.ranks.size > 1) and not all(has_rows(self.problem, signal, rows).values())
        if shared and ratio is not None:
            raise MetaplError(
                "feedback_ratio is measured row by row at the teacher's outputs, and this signal, or a field of it, "
                "which is one for all examples, gets its feedback from several processes; use feedback_weight."
            )
        with overwritten_explained("teacher"):
            at_feedback, further = self._gradients(from_feedback, "the signal", ratio)
            at_own, further_too = self._gradients(from_own, "a teacher loss", ratio)
            # Over the rows of all ranks; both sizes are in units of a mean over the ranks.
            sizes = _size(at_feedback, from_feedback), _size(at_own, from_own)
            of_feedback, of_own = (size * torch.nan if shared else self.ranks.pooled(size) for size in sizes)
            factor: Tensor | float = weight
            if ratio is not None:
                factor = ratio * of_own / of_feedback.clamp_min(torch.finfo(of_feedback.dtype).tiny)
                factor = torch.where(of_feedback > 0, factor, 0.0)
            if at_feedback is None or at_own is None or further or further_too or self._nested:
                total = factor * from_feedback + from_own
                if total.requires_grad:
                    total.backward()
            else:  # on from the outputs, so that no operation above them runs backward twice
                both = [
                    (t, own if h is None else factor * h if own is None else factor * h + own)
                    for (t, _), h, own in zip(self._outputs, at_feedback, at_own, strict=True)
                    if h is not None or own is not None
                ]
                if both:
                    torch.autograd.backward([t for t, _ in both], [g for _, g in both])
        found = [g for g in at_feedback or () if g is not None]
        pushes = [wide(g).sum(0).flatten() for g in found if g.layout == torch.strided and not g.is_nested]
        g = torch.cat(pushes or [of_own.new_empty(0)])
        pieces = F.pad(g, (0, -len(g) % ENTRIES)).view(-1, ENTRIES)
        # With weights by which the classes of a token, whose gradients sum to zero, do not cancel.
        weights = torch.arange(len(pieces), dtype=g.dtype, device=g.device).mul(math.sqrt(2)).cos()
        folded = (weights[:, None] * pieces).sum(0)
        return scalars, factor * of_feedback, of_own, folded if pushes else None

    def _gradients(self, loss: Tensor, name: str, ratio: float | None) -> tuple[list[Tensor | None] | None, bool]:
        """The gradients of a loss at the teacher's outputs, by a backward pass down to these alone, and whether it
        depends on further tensors that require a gradient. None in their place, or with a ratio an error, for a loss
        that depends on a weight in another way."""
        outputs, weights = [t for t, _ in self._outputs], {id(p) for p in self._slots.learned.values()}
        beside = self._beside(loss)
        if beside & weights or any(t._version != version for t, version in self._outputs):
            if ratio is not None:
                raise MetaplError(
                    f"feedback_ratio is measured at the outputs of the teacher's forward, and {name} also depends on "
                    "the teacher's weights in another way, such as through another method, an output that is not a "
                    "tensor, tuple or dict, or one that was changed in place. Let forward return what it depends on, "
                    "write z = z / 2 for z /= 2, or use feedback_weight."
                )
            return None, True
        if not (loss.requires_grad and outputs):
            return [None] * len(outputs), bool(beside)
        return [*torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)], bool(beside)

    def _beside(self, loss: Tensor) -> set[int]:
        """The tensors that require a gradient and that a loss depends on otherwise than through the outputs."""
        seen = {(t.grad_fn, t.output_nr) for t, _ in self._outputs}
        edges: list[tuple[Node | None, int]] = [(loss.grad_fn, loss.output_nr)]
        found: set[int] = set()
        while edges:
            edge = edges.pop()
            if edge[0] is None or edge in seen:
                continue
            seen.add(edge)
            if hasattr(edge[0], "variable"):
                found.add(id(edge[0].variable))
            edges += edge[0].next_functions
        return found


Objective = tuple[dict[str, Tensor], Tensor, Tensor, Tensor | None]
"""Of the teacher on a micro-batch: ``teacher_loss``, the sum of its own losses, and ``teacher_<name>`` for each of
them; the norms of the gradients of the feedback and of these at the teacher's outputs; and the gradient of the
feedback, at weight 1, in a bias that is added to these outputs: the sum over the rows, of as many entries as
:data:`ENTRIES`, by zeros behind it or as a sum of its pieces. None where it cannot be told."""


def teacher_scalars(objectives: Sequence[Objective], parts: int, ranks: Ranks) -> dict[str, Tensor]:
    """The scalars of a step: means over its micro-batches and ranks, and ``feedback_ratio``, NaN without own losses.

    The last ``parts`` of the ``objectives``, the micro-batches of the last inner batch, hold the own losses. These are
    means over a micro-batch; the feedback is a sum.
    """
    last = objectives[-parts:]
    feedback, own = _norm([feedback for _, feedback, *_ in objectives]), _norm([own for _, _, own, _ in last])
    scalars = dict(last[0][0]) if len(last) == 1 else mean_scalars([scalars for scalars, *_ in last])
    scalars["feedback_ratio"] = torch.where(own > 0, feedback / own, torch.nan)
    return scalars if ranks.alone else ranks.mean_scalars(scalars)


def mean_scalars(scalars: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The means over micro-batches."""
    if len(scalars) == 1:
        return dict(scalars[0])
    return {name: torch.stack([part[name] for part in scalars]).mean() for name in scalars[0]}


def _norm(sizes: Sequence[Tensor]) -> Tensor:
    return sizes[0] if len(sizes) == 1 else torch.linalg.vector_norm(torch.stack(list(sizes)))


def _size(gradients: Sequence[Tensor | None] | None, loss: Tensor) -> Tensor:
    sizes = [torch.linalg.vector_norm(wide(g)).to(loss.dtype) for g in gradients or () if g is not None]
    return _norm(sizes) if sizes else loss.new_full((), torch.nan if gradients is None else 0.0)


# What one batch is too small to show: means over the last hundred steps or so, kept on the device.
Means = Mapping[str, Any]
ENTRIES = 1024  # of a gradient, alike in all steps and processes, whose sequences may be of any lengths
NEWEST = 0.02  # share of the newest step in the means, once they are over more than 50 steps


@torch.no_grad()
def updated(kept: Means, pushes: Sequence[Tensor], step: InnerStep, labeled: Any, ranks: Ranks) -> Means:
    """The means with one step more: plain ones of the first 50 steps, then exponential ones. ``spread`` is the sum of
    the squares of the steps' weights, 1/n in a plain mean of n. Of other shapes than before, they begin anew."""
    q: Any = step.signal.probs if step.signal.sampled else step.signal.value
    new: dict[str, Any] = {}
    if pushes:
        g = ranks.mean(sum(pushes[1:], pushes[0]))
        new = {"feedback": g, "feedback_square": g.square().sum()}
    labels: Any = labeled[1] if isinstance(labeled, tuple | list) and len(labeled) > 1 else None
    classes = step.problem.teacher_classifies and isinstance(q, Tensor) and q.ndim == 2 and q.is_floating_point()
    if classes and isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point():
        is_class = labels[:, None] == torch.arange(q.shape[1], device=q.device)  # of ignored ones, none
        p = wide(q).mean(0)
        new["shares"] = ranks.mean(torch.stack([p, is_class.to(p).mean(0)]))
    shapes = {name: t.shape for name, t in kept.items() if name != "spread"}
    if not kept or shapes != {name: t.shape for name, t in new.items()}:
        return {**new, "spread": 1.0}
    weight = max(NEWEST, kept["spread"] / (1 + kept["spread"]))
    means = {name: kept[name].to(t).lerp(t, weight) for name, t in new.items()}
    return {**means, "spread": (1 - weight) ** 2 * kept["spread"] + weight**2}


def figures(kept: Means) -> dict[str, Tensor]:
    r"""``feedback_snr``, the signal to noise of the gradient g of a step's feedback in a bias of the teacher's outputs:

    .. math:: \frac{\lVert E g \rVert^2}{\mathrm{tr}\,\mathrm{Var}\,g} \approx
              \frac{\lVert m \rVert^2 - \kappa s}{s - \lVert m \rVert^2}, \quad
              m = \sum_t w_t g_t, \quad s = \sum_t w_t \lVert g_t \rVert^2, \quad \kappa = \sum_t w_t^2

    Both parts are (1 − κ) times what they estimate, without bias while the g are independent and of one distribution;
    without a signal, it is around 0 by κ √(2/C), κ = 0.01. And ``class_shares_vs_labeled``, half the L1 distance of the
    mean class probabilities of the pseudo-labels from the shares of the classes among the labels.
    """
    found = {}
    if "feedback" in kept and kept["spread"] < 1:  # after one step, nothing is known of the noise
        signal, square = kept["feedback"].square().sum(), kept["feedback_square"]
        noise = (square - signal).clamp_min(torch.finfo(square.dtype).tiny)  # which is 0 without feedback
        found["feedback_snr"] = (signal - kept["spread"] * square) / noise
    if "shares" in kept:
        pseudo, labeled = kept["shares"]
        found["class_shares_vs_labeled"] = (pseudo - labeled / labeled.sum()).abs().sum() / 2
    return found
