"""What each training example did to a trained network.

The derivative of an outer loss in the example's weight.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.execution.batch import labeled_pair, map_tensors
from metapl.execution.checks import generator_of
from metapl.execution.layout import layouts
from metapl.execution.numerics import deterministic, wide
from metapl.execution.ranks import Ranks
from metapl.execution.shards import gathered, local
from metapl.execution.state import RandomState, replayed, trainable, with_contents_of
from metapl.feedback import Forward
from metapl.feedback.keeping import SHARE, folder_of, free_bytes, generators_at_start
from metapl.feedback.lookahead import Lookahead
from metapl.feedback.replays import REPLAY_TOLERANCE, Tolerance
from metapl.functional.training import differentiate
from metapl.problems.base import Problem, Signal, sum_and_weight
from metapl.problems.doubtful import EqualWeights
from metapl.runs.fields import AboveZero, AtLeastOne, check_arguments
from metapl.runs.folder import replacing
from metapl.runs.terminal import step_bar
from metapl.training.examples import examples_of
from metapl.training.hypergradient import hypergradient
from metapl.updates import Schedule, as_one_optimizer, options_by_step, update_of
from metapl.words import summary

# metasmoothness of the first steps, below which scores were unreliable: docs/whole-trainings.md
SMOOTH = 0.95
EQUAL_WEIGHTS = EqualWeights()  # one, by which compiled graphs are known again


class DatamodelingScore(NamedTuple):
    """How a prediction agrees with trainings without the examples: correlations, and the changes of
    the outer loss of R removals, (R,), or (R, M)."""

    spearman: float
    pearson: float
    predicted: Tensor
    retrained: Tensor


@dataclass(frozen=True, eq=False)
class Attribution:
    """The result of :func:`attribute`.

    Args:
        scores: minus the derivative of the outer loss in the weight of each of the N training
            examples, (N,), or of the loss of each of M outer examples, (M, N); in units of the
            outer loss. Positive: more of the example would lower the loss. One that no step has
            drawn has 0. Of a problem with weights of parts of an example, such as tokens, (N, T) or
            (M, N, T).
        order: the training examples of each step, (K, B).
        outer_loss: L(θ_K), a scalar or (M,).
        student_params: θ_K by name.
        kept: which steps kept their states.
        replay_error: the largest relative difference between a kept state and the same state
            computed again, as of :class:`metapl.Hypergradient`.
        float32_products: in what precision matrix products and convolutions of float32 were taken
            on the device: ``"ieee"``, ``"tf32"`` or ``"bf16"`` by name; empty for a device that has
            no such switches. Scores whose factors are rounded keep their order roughly.
    """

    scores: Tensor
    order: Tensor
    outer_loss: Tensor
    student_params: dict[str, Tensor]
    kept: str
    _losses_with: Callable[[Tensor], Tensor] = field(repr=False)
    replay_error: float = 0.0
    float32_products: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return summary(
            "Attribution",
            scores=self.scores,
            order=self.order,
            outer_loss=self.outer_loss,
            kept=self.kept,
        )

    def predict(self, removed: Any) -> Tensor:
        """The predicted change of the outer loss, to first order, when ``removed`` examples have weight 0: Σ score_i.

        Args:
            removed: their numbers, as torch takes them for an index, or N booleans; of scores of
                tokens also (N, T) booleans, which remove these tokens.

        Returns: a scalar, or (M,), in units of the outer loss.
        """
        return self.scores[..., self._removed(removed)].sum(-1)

    def validate(self, removals: Iterable[Any], *, progress: bool = True) -> DatamodelingScore:
        """Train without each of some sets of examples, on the same batches, initial weights and
        dropout masks, and compare: the linear datamodeling score is ``spearman``, of M outer losses
        the mean of theirs.

        Cost: a plain training for each removal.

        Args:
            removals: sets, each as for :meth:`predict`; three or more, for a correlation.
            progress: as for :func:`attribute`, by the trainings.
        """
        from scipy import stats

        sets = [self._removed(removed) for removed in removals]
        if not sets:
            raise MetaplError(
                "validate was given no sets of examples; expected three or more, for a correlation."
            )
        changes = []
        with step_bar(progress, len(sets), "trainings without examples", 0) as tell:
            for gone in sets:
                changes.append(self._losses_with(1.0 - gone.float()) - self.outer_loss)
                tell()
        retrained = torch.stack(changes).double().cpu()  # (R,) or (R, M)
        predicted = torch.stack([self.predict(gone) for gone in sets]).double().cpu()
        columns = list(
            zip(predicted.reshape(len(sets), -1).T, retrained.reshape(len(sets), -1).T, strict=True)
        )
        pairs = [
            [float(by(p.numpy(), r.numpy())[0]) for by in (stats.spearmanr, stats.pearsonr)]
            for p, r in columns
        ]
        spearman, pearson = torch.tensor(pairs, dtype=torch.float64).mean(0).tolist()
        return DatamodelingScore(spearman, pearson, predicted, retrained)

    def top(self, count: int = 10) -> tuple[Tensor, Tensor]:
        """The numbers of the most helpful examples and of the most harmful ones, by means over outer losses."""
        examples = self.scores.shape[self.outer_loss.ndim]
        mean = self.scores.reshape(self.outer_loss.numel(), examples, -1).sum(2).mean(0)
        ranked = mean.argsort(descending=True)
        return ranked[:count], ranked.flip(0)[:count]

    def save(self, file: str | Path) -> None:
        """Write scores, order, outer loss and weights as a file for ``torch.load``.

        Its folder is made if need be.
        """
        names = ("scores", "order", "outer_loss", "student_params")
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with replacing(Path(file)) as out:
            torch.save(gathered({name: getattr(self, name) for name in names}), out)

    def _removed(self, removed: Any) -> Tensor:
        shape = self.scores.shape[self.outer_loss.ndim :]
        found = torch.zeros(shape, dtype=torch.bool, device=self.scores.device)
        found[torch.as_tensor(removed, device=found.device)] = True
        return found


def attribute(
    student: nn.Module,
    train: Any,
    outer: Any,
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    steps: AtLeastOne,
    batch_size: AtLeastOne,
    schedule: Schedule | None = None,
    generator: torch.Generator | None = None,
    problem: Problem | None = None,
    each: bool = False,
    mode: Forward | None = None,
    clip_norm: AboveZero | None = None,
    compile: bool = False,
    progress: bool = True,
    replay_tolerance: Tolerance = REPLAY_TOLERANCE,
) -> Attribution:
    r"""What each training example does to the outer loss, through a whole training.

    Of a training on weighted examples, with the batches I_0, ..., I_{K-1} and w = 1,

    .. math:: (\theta_{k+1}, s_{k+1}) = U\Big(\theta_k,\ \nabla_\theta \frac1B \sum_{i \in I_k} w_i\,
              \ell_i(\theta_k),\ s_k\Big), \qquad \mathrm{score}_i = -\frac{\partial L(\theta_K)}{\partial w_i}
              = \sum_{k :\ i \in I_k} h_{k,i}

    with the feedback h of :func:`metapl.hypergradient` on the weight of i in step k: positive means
    that more of the example lowers the outer loss. Without the examples R, whose weights are then 0
    while a batch's mean keeps its B, the loss is to first order L + Σ_{i∈R} score_i.

    Args:
        student: the network at the start of the training; it stays as it is (``student_params`` has
            θ_K). In several processes, in ``DistributedDataParallel`` or sharded by
            ``fully_shard``: every rank is given the same data, takes its share of each batch, and
            gets all scores. A sharded one's trainings cannot be repeated, for
            :meth:`Attribution.validate`.
        train: (inputs, labels), tensors or arrays of N rows; one dict of such columns, as
            tokenizers give it, with the labels under ``labels``; or a data set of such pairs or
            dicts by number, whose views are always the same. Of a ``DataLoader`` the data set and
            its ``collate_fn`` count, and not its batch size and order. A problem with a
            ``student_input`` of its own gets the batch as it is, and it may be a tuple or a
            dataclass of any columns.
        outer: what the trained network is judged on, in any of these forms; one batch. The network
            runs as it is, in train or eval mode, on these too.
        optimizer: ``torch.optim`` SGD, Adam, AdamW or Muon over the student's parameters, or a
            tuple of these; it stays as it is. Muon's products are taken in the type of the weights.
        steps, batch_size: K batches of B examples, in shuffled passes over all of them; a batch may
            hold the end of one pass and the beginning of the next.
        schedule: of the learning rate, as for :class:`metapl.Lookahead`.
        generator: for the order; default ``torch.Generator().manual_seed(0)``.
        problem: default :class:`metapl.problems.EqualWeights`, cross-entropy; see there for other
            losses. :class:`metapl.problems.NextToken` for sequences and for their tokens.
        each: the scores of each outer example's loss, (M, N), in place of the whole outer loss's;
            the network sees all M, as for that one.
        mode: default ``Forward()``, which keeps as many steps as half of the free memory holds.
            With ``Forward(keep_on=folder)`` and ``compile=True`` the same call goes on after a
            kill.
        clip_norm: the greatest global norm of the gradient in each step; None: no clipping.
        compile: one step and its adjoint as two compiled graphs, as for
            :func:`metapl.hypergradient`; with ``each``, the adjoint takes all M outer losses at
            once, in the memory of M sets of weights and optimizer states.
        progress: show on standard error how far it is, where that is a terminal.
        replay_tolerance: the most that ``replay_error`` of the result may be, as for
            :func:`metapl.hypergradient`; above it the call is refused.

    Returns: an :class:`Attribution`. Cost: in plain trainings (docs/whole-trainings.md): 4 to 5 on
    WRN-28-2; on small networks 4 to 7 with all states kept (2 to 3 compiled), 7 to 9 with one in
    √K, 7 to 12 with a tree; with ``each``, M times, unless compiled. From 100 steps on, three times
    the first tenth of the steps, 50 at most, for the warning below. Memory: one plain step, the
    kept states, and of each step its masks' generator states and buffers. Bias: none, as a
    derivative. As a prediction of what a removal does it is of first order: it fails for large
    removals and for trainings that are not smooth in the weights, such as those with large rates or
    many steps. A removed example stays in its batch, with the weight 0: it counts in B and in the
    statistics of a batch norm. Warns: ``UserWarning`` where the metasmoothness of the first steps
    is below 0.95, as with weights in bfloat16, Adam's usual eps, or ten times a good learning rate.
    Raises: :class:`metapl.MetaplError` for other data, and as :func:`metapl.hypergradient`.

    >>> x, y = torch.randn(12, 4), torch.arange(12) % 3
    >>> student = nn.Linear(4, 3)
    >>> found = attribute(student, (x, y), (x, y), optimizer=torch.optim.SGD(student.parameters(), 0.1), steps=5,
    ...                   batch_size=6)
    >>> found.scores.shape, found.order.shape, bool(found.predict([3]) == found.scores[3])
    (torch.Size([12]), torch.Size([5, 6]), True)

    Source: MAGIC (Ilyas and Engstrom, 2025); metagradients (Engstrom et al., 2025).
    """
    check_arguments(attribute, arguments := locals())
    mode, device = mode or Forward(), next(student.parameters()).device
    start = generators_at_start(mode.keep_on, device)
    training = _Training(arguments, start)
    problem, one, order, ranks = (
        training.problem,
        training.optimizer,
        training.order,
        training.layout.ranks,
    )
    if getattr(mode, "truncate", None) == 0:
        raise MetaplError(
            "truncate=0 differentiates no step, so nothing reaches the examples; expected 1 or "
            "more."
        )
    if folder_of(mode.keep_on) and (each or not compile):
        raise MetaplError(
            f"keep_on={mode.keep_on!r} is a folder; expected compile=True and each=False with it."
        )
    if (
        steps >= 100 and training.begun is not None
    ):  # a sharded student's training cannot be repeated
        few = min(steps // 10, 50)
        agreement = training.smoothness(0.1, None, few, progress=False)[0].agreement
        if agreement < SMOOTH:
            warnings.warn(
                f"the metasmoothness of the first {few} of {steps:,} steps is {agreement:.2f}, "
                f"below {SMOOTH}: scores may not say what removals do. Try float32 weights, a "
                "lower learning rate, or a larger eps of Adam.",
                stacklevel=2,
            )
    # This rank's rows of them.
    ahead = Lookahead(
        lambda number: training.batch(ranks.own_rows(order[number])), steps=steps, schedule=schedule
    )
    outer_batch = map_tensors(ranks.own_rows, training.outer_batch)
    judging = (
        [_of_example(problem, number, ranks) for number in range(training.judged)]
        if each
        else [problem]
    )
    given: dict[str, Any] = {
        "clip_norm": clip_norm,
        "progress": progress,
        "replay_tolerance": replay_tolerance,
    }
    scores, losses = list[Tensor](), list[Tensor]()  # of each outer loss
    replay_error = 0.0
    at_once = len(judging) if compile else 1
    if compile and each:  # as many as half of the memory that is free holds the cotangents of
        size = 3 * sum(p.nbytes for p in student.parameters() if p.requires_grad)
        at_once = max(1, min(at_once, int(SHARE * (free_bytes(device) or math.inf) / size)))
    for begin in range(0, len(judging), at_once):
        if scores:
            start.restore()  # the dropout masks of the same training
        own = judging[begin : begin + at_once]
        if compile:
            judged_by: dict[str, Any] = {"judging": own} if each else {}
            found = differentiate(
                None, student, problem, one, mode, outer_batch, ahead, **judged_by, **given
            )
        else:
            how: dict[str, Any] = {
                "outer": outer_batch,
                "inner": ahead,
                "mode": mode,
                "inner_optimizer": one,
            }
            found = hypergradient(None, student, problem=own[0], **how, **given)
        parts = found.feedback[0].shape[
            2 if compile and each else 1 :
        ]  # h is (B, ...), or (M, B, ...)
        summed = wide(
            local(next(student.parameters())).new_zeros(len(own), len(training.data), *parts)
        )
        for chosen, h in zip(map(ranks.own_rows, order.to(device)), found.feedback, strict=True):
            summed.index_add_(1, chosen, h.reshape(len(own), len(chosen), *parts).to(summed))
        scores += ranks.sum(summed).unbind()
        losses += found.outer_loss.flatten().unbind()
        replay_error = max(replay_error, found.replay_error)

    by_loss, L = (torch.stack(scores), torch.stack(losses)) if each else (scores[0], losses[0])
    return Attribution(
        scores=by_loss,
        order=order,
        outer_loss=L,
        student_params=found.student_params,
        kept=found.kept,
        _losses_with=lambda w: training.repeated(w, judging)[1].reshape(L.shape),
        replay_error=replay_error,
        float32_products=found.float32_products,
    )


class Metasmoothness(NamedTuple):
    """The result of :func:`metasmoothness`.

    The agreement, in [-1, 1], and the outer loss of each training, (3,).
    """

    agreement: float
    outer_loss: Tensor


def metasmoothness(
    student: nn.Module,
    train: Any,
    outer: Any,
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    steps: AtLeastOne,
    batch_size: AtLeastOne,
    schedule: Schedule | None = None,
    generator: torch.Generator | None = None,
    problem: Problem | None = None,
    clip_norm: AboveZero | None = None,
    step: AboveZero = 0.1,
    direction: Tensor | None = None,
    progress: bool = True,
) -> Metasmoothness:
    r"""Whether derivatives through a training say what other weights of its examples do: three plain trainings.

    .. math:: \hat S = \sum_j \frac{|\theta_{2h} - \theta_0|_j}{\|\theta_{2h} - \theta_0\|_1}\,
              \mathrm{sign}(\theta_h - \theta_0)_j\, \mathrm{sign}(\theta_{2h} - \theta_h)_j,
              \qquad \theta_h = \theta_K(w = 1 + h v)

    θ_h − θ_0 and θ_2h − θ_h are h times the derivatives of the trained weights along v at two
    places h apart: 1 where all have the same sign, as of a training that is linear in the weights
    of its examples, and near 0 where a derivative at w = 1 says nothing of weights that are h away.

    Args:
        student, train, outer, optimizer, steps, batch_size, schedule, generator, problem,
            clip_norm, progress: as for :func:`attribute`.
        step: h.
        direction: v, as many numbers as there are training examples, (N,); default: standard normal
            ones, by ``torch.Generator().manual_seed(0)``. With -1 for some examples and 0 for the
            others, and h = 0.5, the third training is the one without them.

    Returns: a :class:`Metasmoothness`. Cost: three plain trainings, and two more copies of the
    weights. No derivative is taken. Raises: :class:`metapl.MetaplError` for other data, and where
    no weight moves along v, or one becomes NaN.

    >>> x, y = torch.randn(12, 4), torch.arange(12) % 3
    >>> student = nn.Linear(4, 3)
    >>> optimizer = torch.optim.SGD(student.parameters(), 0.1)
    >>> found = metasmoothness(student, (x, y), (x, y), optimizer=optimizer, steps=5, batch_size=6)
    >>> found.agreement > 0.9, found.outer_loss.shape
    (True, torch.Size([3]))

    Source: definition 2 of metagradient descent (Engstrom et al., 2025), whose metaparameters are
    here the weights.
    """
    check_arguments(metasmoothness, given := locals())
    found, moved = _Training(given).smoothness(step, direction, steps, progress)
    if not 0 < moved < math.inf:
        raise MetaplError(
            f"the direction moves the student's weights by {moved:g} in all; expected a finite "
            "number."
        )
    return found


class _Training:
    """A training on weighted examples, as ``given`` to :func:`attribute`, which can be repeated."""

    def __init__(self, given: Mapping[str, Any], start: RandomState | None = None) -> None:
        student, steps, batch_size = given["student"], given["steps"], given["batch_size"]
        first = next(student.parameters())
        _, self.layout, _ = layouts(None, student)
        self.data, judged = (examples_of(given[name], name, first) for name in ("train", "outer"))
        problem, self.optimizer = (
            given["problem"] or EQUAL_WEIGHTS,
            as_one_optimizer(given["optimizer"], "optimizer"),
        )
        # A score is a derivative in weights that are 1.
        if not isinstance(problem, EqualWeights) or type(problem).signal is not EqualWeights.signal:
            raise MetaplError(
                f"problem is {type(problem).__name__}; expected an EqualWeights with its signal."
            )
        self.problem, self.clip_norm, schedule = problem, given["clip_norm"], given["schedule"]
        # (K, B) examples, in shuffled passes.
        generator_of(
            given["generator"], torch.device("cpu"), "the order of the examples is drawn on"
        )
        draw, rows = given["generator"] or torch.Generator().manual_seed(0), len(self.data)
        passes = [
            torch.randperm(rows, generator=draw) for _ in range(-(-steps * batch_size // rows))
        ]
        self.order = torch.cat(passes)[: steps * batch_size].view(steps, batch_size)
        self.judged, self.outer_batch = len(judged), judged[torch.arange(len(judged))]
        for what, count in {
            "batch_size": batch_size,
            "the number of outer examples": self.judged,
        }.items():
            if count % (shares := self.layout.ranks.size):
                raise MetaplError(
                    f"{what} is {count}; expected a multiple of {shares}, the ranks that share a "
                    "batch."
                )
        # What a hook or a forward has left in a module, such as a weight that weight_norm made, may
        # have a graph.
        left = [
            t
            for part in student.modules()
            for t in vars(part).values()
            if isinstance(t, Tensor) and not t.is_leaf
        ]
        self.begun: Any = None  # a sharded network cannot be copied
        if not self.layout.is_sharded:
            self.begun = copy.deepcopy(
                (self.layout.network, self.optimizer), {id(t): t.detach() for t in left}
            )
        self.start = start or RandomState.now(first.device)
        self.options: Any = (
            [[]] * steps if schedule is None else options_by_step(self.optimizer, schedule, steps)
        )
        kind = first.device.type  # in the precision of the scores, wherever it is called
        cast = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        self.autocast = partial(torch.autocast, kind, *cast)

    def batch(self, numbers: Tensor) -> Any:
        """Return a batch of training examples as the problem reads it.

        (inputs, labels), unless it says otherwise.
        """
        batch = self.data[numbers]
        if type(self.problem).student_input is not EqualWeights.student_input:
            return batch
        return labeled_pair(
            batch, "train", " For other batches, give the problem a method student_input(batch)."
        )

    def smoothness(
        self, h: float, v: Tensor | None, steps: int, progress: bool
    ) -> tuple[Metasmoothness, float]:
        """That of the first ``steps`` steps, and by how much all trained weights move along v, in sum."""
        v = (
            torch.randn(len(self.data), generator=torch.Generator().manual_seed(0))
            if v is None
            else v
        )
        trained, losses = list[Tensor](), list[Tensor]()
        with step_bar(progress, 3, "trainings", 0) as tell:
            for number in range(3):
                params, (loss,) = self.repeated(1 + number * h * v, [self.problem], steps)
                trained.append(torch.cat([t.flatten() for t in params.values()]))
                losses.append(loss)
                tell()
        t0, t1, t2 = trained
        moved = (t2 - t0).abs().double()
        total, same = float(moved.sum()), float((moved * (t1 - t0).sign() * (t2 - t1).sign()).sum())
        return Metasmoothness(same / total if total else math.nan, torch.stack(losses)), total

    def repeated(
        self, weights: Tensor, judging: Sequence[Problem], steps: int | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The training, or its first ``steps``, with weights of the examples, (N,) or as the
        problem's, by a plain loop: the trained weights by name, and the outer losses."""
        if self.begun is None:
            raise MetaplError(
                "the student is sharded, and is trained again on a copy; expected one that is not."
            )
        network, again = copy.deepcopy(self.begun)
        weights_of, problem, ranks = trainable(network), self.problem, self.layout.ranks
        rule, device = update_of(again, weights_of), self.start.device
        # A loss may read ``student.parameters()`` by a closure, which has to find those of this
        # training.
        whose = with_contents_of(network, self.layout.network)
        with (
            whose,
            replayed(self.start),
            torch.enable_grad(),
            self.autocast(),
            deterministic(device),
        ):
            for chosen, of_step in zip(
                map(ranks.own_rows, self.order[:steps]), self.options[:steps], strict=True
            ):
                batch = self.batch(chosen)
                for group, own in zip(again.param_groups, of_step, strict=False):
                    group.update(own)
                again.zero_grad()
                torch.clear_autocast_cache()  # of weights before the step
                outputs = wide(network(problem.student_input(batch)))
                own, shape = weights.to(outputs)[chosen], problem.weight_shape(outputs)
                signal = Signal(
                    own.reshape(*own.shape, *[1] * (len(shape) - own.ndim)).expand(shape)
                )
                problem.inner_loss(
                    outputs, signal, batch, dict(network.named_parameters())
                ).mean().backward()
                own_grads = {name: p.grad for name, p in weights_of.items() if p.grad is not None}
                for name, g in ranks.mean_tree(own_grads, {**weights_of}).items():
                    weights_of[name].grad = g
                if self.clip_norm is not None:
                    nn.utils.clip_grad_norm_(network.parameters(), self.clip_norm)
                rule.take_differentiated_step(
                    weights_of,
                    {name: p.grad for name, p in weights_of.items() if p.grad is not None},
                )
            torch.clear_autocast_cache()
            given = problem.outer_batch(map_tensors(ranks.own_rows, self.outer_batch))
            # With the dropout masks of the outer loss that was differentiated.
            with torch.no_grad(), replayed(RandomState.now(device).branch()):
                outputs = wide(network(problem.outer_input(given)))
                pairs = [sum_and_weight(own.outer_loss(outputs, given)) for own in judging]
                both = [
                    torch.stack([total, torch.as_tensor(weight).to(total)])
                    for total, weight in pairs
                ]
                totals, counts = ranks.mean(torch.stack(both)).unbind(1)
        params = {name: p.detach() for name, p in weights_of.items()}
        return params, totals / counts


def _of_example(problem: Problem, number: int, ranks: Ranks) -> Problem:
    """The problem as it is judged by one outer example.

    The network sees them all, as for the whole outer loss.
    """
    own = copy.copy(problem)

    def outer_loss(outputs: Tensor, batch: Any) -> Any:
        at = number - ranks.rank * len(outputs)
        if not 0 <= at < len(outputs):  # another rank has it
            return 0 * outputs.sum(), 0.0
        row = slice(at, at + 1)
        return problem.outer_loss(
            outputs[row], map_tensors(lambda t: t[row] if t.ndim else t, batch)
        )

    object.__setattr__(own, "outer_loss", outer_loss)
    return own
