"""What each training example did to a trained network.

The derivative of an outer loss in the example's weight.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from metapl.attribution.removals import (
    DatamodelingScore,
    Removals,
    StackedTrainings,
    datamodeling_score,
    most_at_once,
    rank_correlations,
)
from metapl.attribution.tables import columns_of, path_of_table, weights_by, write_table
from metapl.attribution.weighted import BatchesOfSteps, WeightedTraining, judges_of, thetas_along
from metapl.attribution.worth import reason_of_agreement, reason_of_eps, reason_of_possible_loss
from metapl.core.lookahead import Lookahead
from metapl.core.replays import REPLAY_TOLERANCE, Tolerance
from metapl.errors import MetaplError, few, warn
from metapl.execution import checks
from metapl.execution.batch import Batch, map_tensors, returned_by
from metapl.execution.checks import described, unexpected
from metapl.execution.failed_steps import explain_step
from metapl.execution.numerics import MissingDerivative, explain
from metapl.execution.shards import gathered
from metapl.execution.state import replayed
from metapl.feedback import Forward
from metapl.functional.training import CompiledPath, PathRequest, path_of
from metapl.problems.base import BilevelProblem
from metapl.runs import checkpoint
from metapl.runs.fields import AboveZero, AtLeastOne, Range, check_arguments
from metapl.training.hypergradient import hypergradient, verify_hypergradient
from metapl.updates import (
    Settings,
)
from metapl.updates.smoothing import smoothed_optimizer, smoothing_for
from metapl.words import summary

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
SomeAttribution = TypeVar("SomeAttribution", bound="Attribution")
# By how much of the typical second moment an adjoint of Adam is smoothed.
Smoothing = Annotated[float, Range(0)]

# The metasmoothness of the first steps below which scores were unreliable
# (docs/whole-trainings.md).
SMOOTH = 0.95
# How many outer examples the comparison with real steps takes at most.
VERIFIED_ROWS = 256
# What an error expects where an operation lacks a derivative: there are no modes to choose from.
NO_OTHER_MODE = "another operation, since attribute needs the second derivative of each"


@dataclass(frozen=True, eq=False)
class Attribution:
    """The result of :func:`attribute`.

    Args:
        scores: minus the derivative of the outer loss in the weight of each of the N training
            examples, (N,), or of the loss of each of M outer examples, (M, N); in units of the
            outer loss. Positive: more of the example would lower the loss. One that no step has
            drawn has 0. Of a problem with weights of parts of an example, such as tokens, (N, T) or
            (M, N, T).
        order: the training examples of each step, (K, B); of S seeds (S, K, B).
        outer_loss: L(θ_K), a scalar or (M,); of several seeds the mean.
        student_params: θ_K by name; of several seeds the first one's.
        kept: which steps kept their states.
        replay_error: the largest relative difference between a kept state and the same state
            computed again, as of :class:`metapl.Hypergradient`.
        float32_products: in what precision matrix products and convolutions of float32 were taken
            on the device: ``"ieee"``, ``"tf32"`` or ``"bf16"`` by name; empty for a device that has
            no such switches. Scores whose factors are rounded keep their order roughly.
        outer_loss_before: L(θ_0), a scalar, also of M outer losses; None of a sharded student.
        of_seeds: the result of each seed, whose mean this is; empty of a single training.
        agreement: the rank correlation of the scores of two seeds, the mean over all pairs, and
            over M outer losses; None of a single training.
        has_data_set: whether examples are numbered as the rows of a data set.
        smoothing: the c of :func:`attribute`; 0: the scores are exact derivatives.
    """

    scores: Tensor
    order: Tensor
    outer_loss: Tensor
    student_params: dict[str, Tensor]
    kept: str
    _losses_with: Callable[[Tensor], Tensor] = field(repr=False)
    _stacks: StackedTrainings | None = field(default=None, repr=False)
    # By which each example of a recording is known.
    _digests: Tensor | None = field(default=None, repr=False)
    replay_error: float = 0.0
    float32_products: dict[str, str] = field(default_factory=dict)
    outer_loss_before: Tensor | None = None
    of_seeds: tuple[Attribution, ...] = ()
    agreement: float | None = None
    has_data_set: bool = True
    smoothing: float = 0.0

    def __repr__(self) -> str:
        shown: dict[str, Any] = {
            "scores": self.scores,
            "order": self.order,
            "outer_loss": self.outer_loss,
            "kept": self.kept,
        }
        if self.agreement is not None:
            shown["agreement"] = self.agreement
        return summary("Attribution", **shown)

    @property
    def by_example(self) -> Tensor:
        """The scores of whole examples, (M, N), also of a single outer loss: sums over parts."""
        examples = self.scores.shape[self.outer_loss.ndim]
        return self.scores.reshape(self.outer_loss.numel(), examples, -1).sum(2)

    def predict(self, removed: Any) -> Tensor:
        """Return Σ score_i, the change of the outer loss, to first order, without some examples.

        Args:
            removed: the examples that get the weight 0: their numbers, as torch takes them for an
                index, or N booleans; of scores of tokens also (N, T) booleans, which remove these
                tokens.

        Returns: a scalar, or (M,), in units of the outer loss.
        """
        return self.scores[..., self._removed(removed)].sum(-1)

    def validate(
        self,
        removals: Iterable[Any],
        *,
        top: AboveZero | None = None,
        at_once: AtLeastOne = 32,
        compile: bool | None = None,
        progress: bool = True,
    ) -> DatamodelingScore:
        """Train without each of some sets of examples, and compare with what was predicted.

        The trainings have the same batches, initial weights and dropout masks. A removed example
        has the weight 0, and a batch that loses one keeps its size. The linear datamodeling score
        is ``spearman``, of M outer losses the mean of theirs.

        Of several seeds the changes are means over the trainings of each.

        Cost: a training for each removal, and for ``top`` one for each outer loss. A hundred of a
        perceptron with 64 (256) hidden units take 14 (28) plain trainings in compiled stacks, 38
        (55) without a compiler, and 150 (138) one by one. The first steps of a stack are compared
        with a single training's, and the end of one more training, on all examples, with that of
        the attribution. Memory: that of ``at_once`` trainings.

        Args:
            removals: sets, each as for :meth:`predict`; three or more, for a correlation.
            top: a share of the examples, such as 0.01: also train without those of the highest
                scores, for ``qld`` of the result.
            at_once: how many trainings are stacked at most; 1: each is taken alone.
            compile: take the steps of a stack by one compiled graph. None: where there are so many
                steps times trainings, 50,000, that it pays on small networks.
            progress: as for :func:`attribute`.

        Returns: a :class:`metapl.attribution.removals.DatamodelingScore`. Trainings in stacks are
        those alone to rounding.

        Warns: ``UserWarning`` where the trainings cannot be stacked, and are taken one by one: of a
        student in several processes, in half precision or under autocast, of one whose forward
        :func:`torch.func.vmap` does not take, and where a stack leads elsewhere than alone.

        Raises: :class:`metapl.MetaplError` for fewer than three sets, for a share that is not below
        1, and with ``compile=True`` for what cannot be compiled.
        """
        check_arguments(Attribution.validate, locals())
        sets = [self._removed(removed) for removed in removals]
        if len(sets) < 3:
            raise MetaplError(
                f"validate was given {len(sets)} sets of examples; expected three or more, "
                "for a correlation."
            )
        highest = list[Tensor]()
        if top is not None:
            highest = self._highest(top)
        weights = 1.0 - torch.stack([*sets, *highest]).float()
        losses_of_seeds = list[Tensor]()
        for attribution in self.of_seeds or [self]:
            trainings = Removals(
                attribution._losses_with, attribution._stacks, at_once=at_once, compile=compile
            )
            losses_of_seeds.append(
                trainings.losses(weights, attribution.outer_loss, progress=progress)
            )
        losses = torch.stack(losses_of_seeds).mean(0)
        # (R,) or (R, M), and behind them those without the highest scores of each outer loss.
        changes = losses - self.outer_loss
        changes_without_top = None
        if highest:
            of_highest = changes[len(sets) :]
            changes_without_top = of_highest.diagonal() if of_highest.ndim == 2 else of_highest[0]
        return datamodeling_score(
            predicted=torch.stack([self.predict(is_removed) for is_removed in sets]),
            retrained=changes[: len(sets)],
            changes_without_top=changes_without_top,
            execution=trainings.execution,
        )

    def _highest(self, share: float) -> list[Tensor]:
        """Return which examples have the highest scores, as :meth:`_removed` does.

        There is one such set for each outer loss.
        """
        if share >= 1:
            raise MetaplError(f"validate was given top={share:g}; expected a share below 1.")
        by_loss = self.by_example
        count = max(1, round(share * by_loss.shape[1]))
        return [self._removed(scores.argsort(descending=True)[:count]) for scores in by_loss]

    def top(self, count: int = 10) -> tuple[Tensor, Tensor]:
        """Return the numbers of the most helpful examples and of the most harmful ones.

        Of M outer losses, by the means of their scores.

        Args:
            count: how many of each; of fewer examples all.

        Raises: :class:`metapl.MetaplError` for a negative number.
        """
        if count < 0:
            raise MetaplError(f"top was given count={count}; expected 0 or more.")
        ranked = self.by_example.mean(0).argsort(descending=True)
        return ranked[:count], ranked.flip(0)[:count]

    def save(self, file: str | Path) -> None:
        """Write scores, order, outer loss and weights to a file, whole or not at all.

        The file is in the format of safetensors, so that ``safetensors.torch.load_file`` reads it:
        "scores", "order", "outer_loss", and "student_params/0.weight" and so on. Its folder is made
        if need be.

        Args:
            file: its path, which ends in ``.safetensors``.

        Raises: :class:`metapl.MetaplError` for another suffix, and where it cannot be written.
        """
        checkpoint.check_suffix(file)
        names = ("scores", "order", "outer_loss", "student_params")
        checkpoint.save(file, gathered({name: getattr(self, name) for name in names}))

    def weights(self, rate: AboveZero = 1.0) -> Tensor:
        r"""Return weights of the examples that are a step of descent away from 1, (N,) or (N, T).

        .. math:: a_i = N\, \frac{\max(0,\, 1 + \mathrm{rate}\cdot s_i / \mathrm{rms}(s))}
                  {\sum_j \max(0,\, 1 + \mathrm{rate}\cdot s_j / \mathrm{rms}(s))}

        for the scores s, of M outer losses their means. They have the mean 1, so that a weighted
        mean loss keeps its size. Examples that no step has drawn have the weight of a score of 0.
        It is one step along a derivative: small rates lower the outer loss where scores predict
        removals, and large ones may not.

        Args:
            rate: 1 leaves out what is as harmful as the typical size of a score.
        """
        scores, _ = self._scores_and_draws()
        return weights_by(scores, rate)

    def columns(self, rate: AboveZero = 1.0) -> dict[str, list[Any]]:
        """Return a table with a row for each example, as columns by name.

        ``example`` is its number, ``score`` its score, which of tokens is the sum, ``weight`` as
        :meth:`weights` has it, and ``draws`` how often it was drawn. Of tokens, ``token_score`` and
        ``token_weight`` are lists, and ``weight`` is the mean of the example's.

        Args:
            rate: as for :meth:`weights`.
        """
        scores, draws = self._scores_and_draws()
        return columns_of(scores, draws, rate=rate, name_of_numbers="example")

    def save_table(self, file: str | Path, rate: AboveZero = 1.0) -> None:
        """Write :meth:`columns` to a CSV file, which needs no further package, or to Parquet.

        Args:
            file: its path, which ends in ``.csv`` or ``.parquet``; its folder is made if need be.
            rate: as for :meth:`weights`.

        Raises: :class:`metapl.MetaplError` for another suffix, and for Parquet without pyarrow.
        """
        path = path_of_table(file)
        write_table(self.columns(rate), path)

    def _scores_and_draws(self) -> tuple[Tensor, Tensor]:
        """Return the scores, of M outer losses their means, and how often each was drawn, (N,)."""
        scores = self.scores.mean(0) if self.outer_loss.ndim else self.scores
        return scores, torch.bincount(self.order[self.order >= 0], minlength=len(scores))

    def _removed(self, removed: Any) -> Tensor:
        """Return which scores of one outer loss are removed, as booleans of their shape."""
        shape = self.scores.shape[self.outer_loss.ndim :]
        is_removed = torch.zeros(shape, dtype=torch.bool, device=self.scores.device)
        if isinstance(removed, Sequence) and len(removed) == 0:
            # An empty list has no type, and would be one of floating point.
            return is_removed
        try:
            is_removed[torch.as_tensor(removed, device=is_removed.device)] = True
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise MetaplError(
                f"the examples to remove are {described(removed)} ({error}); expected numbers from "
                f"0 to {len(is_removed) - 1}, or booleans of shape {tuple(shape)}."
            ) from error
        return is_removed


def attribute(
    student: nn.Module | Callable[[], nn.Module],
    train: Any,
    outer: Any,
    *,
    optimizer: Optimizers | Callable[[nn.Module], Optimizers],
    steps: AtLeastOne,
    batch_size: AtLeastOne,
    settings: Settings | None = None,
    generator: torch.Generator | None = None,
    problem: BilevelProblem | None = None,
    each: bool = False,
    smoothing: Smoothing | None = None,
    seeds: AtLeastOne = 1,
    mode: Forward | None = None,
    clip_norm: AboveZero | None = None,
    compile: bool = False,
    progress: bool = True,
    replay_tolerance: Tolerance = REPLAY_TOLERANCE,
    verify: bool | Literal["warn"] = True,
) -> Attribution:
    r"""Return what each training example does to the outer loss, through a whole training.

    Of a training on weighted examples, with the batches I_0, ..., I_{K-1} and w = 1,

    .. math:: (\theta_{k+1}, s_{k+1}) = U\Big(\theta_k,\ \nabla_\theta \frac1B
              \sum_{i \in I_k} w_i\, \ell_i(\theta_k),\ s_k\Big), \qquad
              \mathrm{score}_i = -\frac{\partial L(\theta_K)}{\partial w_i}
              = \sum_{k :\ i \in I_k} h_{k,i}

    with the feedback h of :func:`metapl.hypergradient` on the weight of i in step k: positive means
    that more of the example lowers the outer loss. Without the examples R, whose weights are then 0
    while a batch's mean keeps its B, the loss is to first order L + Σ_{i∈R} score_i.

    Args:
        student: the network at the start of the training; it stays as it is (``student_params`` has
            θ_K). Or a function without arguments that makes one, for ``seeds``. In several
            processes, in ``DistributedDataParallel`` or sharded by ``fully_shard``: every rank is
            given the same data, takes its share of each batch, and gets all scores. A sharded one's
            trainings cannot be repeated, for :meth:`Attribution.validate`.
        train: (inputs, labels), tensors or arrays of N rows; one dict of such columns, as
            tokenizers give it, with the labels under ``labels``; or a data set of such pairs or
            dicts by number, whose views are always the same. Of a ``DataLoader`` the data set and
            its ``collate_fn`` count, and not its batch size and order. With
            :class:`metapl.problems.NextToken` token ids x are both: ``x`` alone, or ``(x, x)``. A
            problem with a ``student_input`` of its own gets the batch as it is, and it may be a
            tuple or a dataclass of any columns.
        outer: what the trained network is judged on, in any of these forms; one batch. The network
            runs as it is, in train or eval mode, on these too.
        optimizer: ``torch.optim`` SGD, Adam, AdamW or Muon over the student's parameters, or a
            tuple of these; it stays as it is. Muon's products are taken in the type of the weights.
            Beside a function for the student, a function that makes it for a student.
        steps, batch_size: K batches of B examples, in shuffled passes over all of them; a batch may
            hold the end of one pass and the beginning of the next.
        settings: of the optimizer in each step, as for :class:`metapl.Lookahead`; those of a
            scheduler are ``metapl.scheduled_settings(scheduler, steps=K)``.
        generator: for the order, of one seed after another; default, for each,
            ``torch.Generator().manual_seed(seed)``, from seed 0 on.
        problem: default :class:`metapl.problems.EqualWeights`, cross-entropy; see there for other
            losses. :class:`metapl.problems.NextToken` for sequences and for their tokens.
        each: the scores of each outer example's loss, (M, N), in place of the whole outer loss's;
            the network sees all M, as for that one.
        smoothing: c. Where Adam's second moments n̂ are small, its step is nearly a sign, and the
            derivative through many such steps is exact and says nothing of a removal. With c > 0
            the training stays what it is, and the derivative is that of steps with ε + c·rms(√n̂)
            of each tensor, a constant, in the place of ε, in Adam and AdamW alone. Default: 0.1 for
            these, whose scores predicted removals from the same training better than the exact
            ones in 13 of 15 trainings, and worse by 0.01 of rank correlation at most; for what
            holds of other seeds take 1 (docs/studies/smoothing.md). 0: the exact derivative, which
            other optimizers and sharded students have.
        seeds: S. The mean of the scores of S trainings: for each seed the two functions make a
            student and an optimizer with torch's generators at it, from 0 to S - 1, and the order
            and the dropout masks are the seed's. ``agreement`` of the result says how alike their
            scores are, and ``of_seeds`` has the result of each.
        mode: default ``Forward()``, which keeps as many steps as half of the free memory holds.
        clip_norm: the greatest global norm of the gradient in each step; None: no clipping.
        compile: one step and its adjoint as two compiled graphs, as for
            :func:`metapl.hypergradient`; with ``each``, the adjoint takes all M outer losses at
            once, in the memory of M sets of weights and optimizer states.
        progress: show on standard error how far it is, where that is a terminal; log it elsewhere,
            every half minute.
        replay_tolerance: the most that ``replay_error`` of the result may be, as for
            :func:`metapl.hypergradient`; above it the call is refused.
        verify: compare the derivative through two steps with differences after real steps, and
            refuse one that is wrong, as :func:`metapl.hypergradient` does; or ``"warn"`` of it; or
            never, False. Of a sharded student nothing is compared.

    Returns: an :class:`Attribution`. Cost: in plain trainings (docs/whole-trainings.md): 4 to 5 on
    WRN-28-2; on small networks 4 to 7 with all states kept (2 to 3 compiled), 7 to 9 with one in
    √K, 7 to 12 with a tree; with ``each``, M times, unless compiled. From 100 steps on, three times
    the first tenth of the steps, 50 at most, for the warning below. Memory: one plain step, the
    kept states, and of each step its masks' generator states and buffers. Bias: none, as a
    derivative. As a prediction of what a removal does it is of first order: it fails for large
    removals and for trainings that are not smooth in the weights, such as those with large rates or
    many steps, or by Adam at its usual ε; ``smoothing`` has a bias as a derivative, and less of one
    there. A removed example stays in its batch, with the weight 0: it counts in B and in the
    statistics of a batch norm. Of S seeds, S times the cost.
    Warns: ``UserWarning`` where the metasmoothness of the first steps is below 0.95, as with
    weights in bfloat16, Adam's usual eps, or ten times a good learning rate; where the student
    reads buffers that its passes move, as spectral norm does; and once of all reasons for which
    scores may not say what removals do: effects that no loss can have, seeds whose scores have a
    rank correlation below 0.3, and an eps of 1e-8 in Adam without smoothing.
    Raises: :class:`metapl.MetaplError` for other data, for a student whose forward writes to its
    weights, and as :func:`metapl.hypergradient`. A sharded student is not looked at for weights and
    buffers.

    >>> x, y = torch.randn(12, 4), torch.arange(12) % 3
    >>> student = nn.Linear(4, 3)
    >>> optimizer = torch.optim.SGD(student.parameters(), 0.1)
    >>> found = attribute(student, (x, y), (x, y), optimizer=optimizer, steps=5, batch_size=6)
    >>> found.scores.shape, found.order.shape, bool(found.predict([3]) == found.scores[3])
    (torch.Size([12]), torch.Size([5, 6]), True)

    Source: MAGIC (Ilyas and Engstrom, 2025); metagradients (Engstrom et al., 2025).
    """
    check_arguments(attribute, locals())
    mode = mode or Forward()
    if mode.truncate == 0:
        raise MetaplError(
            "truncate=0 differentiates no step, so nothing reaches the examples; expected 1 or "
            "more."
        )
    refuse_one_start(student, optimizer, seeds)
    attributions = list[Attribution]()
    for seed in range(seeds):
        order_generator = generator
        if generator is None:
            order_generator = torch.Generator().manual_seed(seed)
        with started(student, optimizer, seed) as (network, its_optimizer):
            training = WeightedTraining(
                network,
                train,
                outer,
                optimizer=its_optimizer,
                steps=steps,
                batch_size=batch_size,
                settings=settings,
                generator=order_generator,
                problem=problem,
                clip_norm=clip_norm,
            )
            smoothing_of_adjoint = smoothing_for(
                training.optimizer, smoothing, is_sharded=training.layout.is_sharded
            )
            looks = seed == 0 and training.can_be_repeated
            if looks:
                look_at_passes(training)
                if verify:
                    verify_steps(training, verify)
            attributions.append(
                attribution_of(
                    training,
                    network,
                    each=each,
                    smoothing=smoothing_of_adjoint,
                    mode=mode,
                    compile=compile,
                    progress=progress,
                    replay_tolerance=replay_tolerance,
                    looks_at_roughness=looks and steps >= 100,
                )
            )
    attribution = attributions[0] if seeds == 1 else mean_of(attributions)
    warn_of_worth(attribution, training.problem, training.optimizer)
    return attribution


def verify_steps(training: WeightedTraining, verify: bool | Literal["warn"]) -> None:
    """Refuse a student whose derivative through two steps is wrong, or warn; nothing moves."""
    steps = verified_steps(training.options_of_steps)
    settings = training.settings
    if settings is not None:
        settings = {name: values[steps] for name, values in settings.items()}
    batches = [training.batch(numbers) for numbers in training.order[steps]]
    outer = map_tensors(lambda t: t[:VERIFIED_ROWS], training.outer_batch)
    # One step needs no second derivative of the network.
    ahead = Lookahead(batches, settings=settings)
    with explained(outer, ahead), replayed(training.start):
        verify_hypergradient(
            training.layout.network,
            outer=outer,
            inner=ahead,
            problem=training.problem,
            inner_optimizer=training.optimizer,
            clip_norm=training.clip_norm,
            verify=verify,
        )


def verified_steps(options_of_steps: Sequence[Sequence[Mapping[str, Any]]]) -> slice:
    """Return which steps the derivative is verified through: two with the greatest rates.

    The first ones of a warm-up may hide everything by rounding.

    Args:
        options_of_steps: the optimizer's, by group.
    """
    rates = [max(options["lr"] for options in groups) for groups in options_of_steps]
    begin = max(0, min(rates.index(max(rates)), len(rates) - 2))
    return slice(begin, begin + 2)


@contextmanager
def explained(outer: Batch, ahead: Lookahead) -> Iterator[None]:
    """Say of an error in this block what of the batches is its cause.

    Where an operation lacks a derivative, no other mode is proposed: attribution has none.
    """
    try:
        yield
    except MissingDerivative as error:
        raise MissingDerivative(error.what, NO_OTHER_MODE) from error
    except Exception as error:
        explain_step(error, outer, ahead)
        raise


def warn_of_worth(attribution: Attribution, problem: BilevelProblem, optimizer: Any) -> None:
    """Warn, in one line, of all reasons for which scores may not say what removals do.

    Of M outer losses the means count.

    Args:
        problem: whose outer loss was judged.
        optimizer: of the training.
    """
    before = attribution.outer_loss_before
    reasons = [
        reason_of_possible_loss(
            attribution.by_example.mean(0),
            float(attribution.outer_loss.mean()),
            None if before is None else float(before),
            problem,
        ),
        reason_of_agreement(attribution.agreement, len(attribution.of_seeds)),
        reason_of_eps(optimizer, attribution.smoothing),
    ]
    clauses = "; ".join(reason for reason in reasons if reason)
    if clauses:
        warn(f"scores may not say what removals do: {clauses}.")


def refuse_one_start(student: Any, optimizer: Any, seeds: int) -> None:
    """Refuse one network for several seeds, and what does not go together."""
    makes_student = not isinstance(student, nn.Module)
    makes_optimizer = callable(optimizer)
    if makes_student and not callable(student):
        raise unexpected("student is", student, "a module, or a function that makes one")
    if makes_student != makes_optimizer:
        raise MetaplError(
            f"student is a {type(student).__name__}, and optimizer a {type(optimizer).__name__}; "
            "expected a module and an optimizer over its weights, or two functions, such as "
            "optimizer=lambda student: torch.optim.AdamW(student.parameters())."
        )
    if seeds > 1 and not makes_student:
        raise MetaplError(
            f"seeds={seeds} was given with one {type(student).__name__}, which is one start; "
            "expected two functions, such as lambda: Network() and optimizer=lambda student: "
            "torch.optim.AdamW(student.parameters()), or lambda: copy.deepcopy(network) where all "
            "seeds begin at the same weights."
        )


@contextmanager
def started(
    student: nn.Module | Callable[[], nn.Module],
    optimizer: Optimizers | Callable[[nn.Module], Optimizers],
    seed: int,
) -> Iterator[tuple[nn.Module, Optimizers]]:
    """Give a network and its optimizer, which functions make with generators at a seed."""
    if isinstance(student, nn.Module):
        yield student, cast(Optimizers, optimizer)
        return
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        network = student()
        make_optimizer = cast(Callable[[nn.Module], Optimizers], optimizer)
        yield network, make_optimizer(network)


def attribution_of(
    training: WeightedTraining,
    student: nn.Module,
    *,
    each: bool,
    smoothing: float,
    mode: Forward,
    compile: bool,
    progress: bool,
    replay_tolerance: float,
    looks_at_roughness: bool,
) -> Attribution:
    """Return the scores of one training; for the arguments see :func:`attribute`."""
    steps = len(training.order)
    ranks = training.layout.ranks
    # Batches of a function are compared when they are read again.
    batches: Sequence[Batch] | Callable[[int], Batch] = training.batch_of_step
    if compile and training.has_constant_batches:
        batches = BatchesOfSteps(training)
    ahead = Lookahead(batches, steps=steps, settings=training.settings)
    outer_batch = map_tensors(ranks.own_rows, training.outer_batch)
    differentiated = smoothed_optimizer(training.optimizer, smoothing)
    judges: list[BilevelProblem] = [training.problem]
    if each:
        judges = judges_of(training.problem, training.outer_examples, ranks)
    at_once = 1
    if compile and each:
        # Cotangents of the weights, and of the optimizer's state, which is at most twice as large.
        at_once = most_at_once(student, len(judges), copies=3)

    scores = list[Tensor]()
    losses = list[Tensor]()
    replay_error = 0.0
    for begin in range(0, len(judges), at_once):
        judging = judges[begin : begin + at_once]
        if scores:
            # The same training has the same dropout masks.
            training.start.restore()
        with explained(outer_batch, ahead):
            path = None
            if compile:
                request = PathRequest(
                    teacher=None,
                    student=student,
                    problem=training.problem,
                    optimizer=differentiated,
                    mode=mode,
                    outer=outer_batch,
                    ahead=ahead,
                    judging=judging if each else (),
                    clip_norm=training.clip_norm,
                    weights=torch.ones(1, training.order.shape[1], device=training.start.device),
                    shows_progress=progress,
                    replay_tolerance=replay_tolerance,
                )
                path = path_of(request)
            if looks_at_roughness and not scores:
                warn_of_roughness(training, path)
            if path is not None:
                result = path.find()
            else:
                result = hypergradient(
                    None,
                    student,
                    outer=outer_batch,
                    inner=ahead,
                    mode=mode,
                    problem=judging[0],
                    inner_optimizer=differentiated,
                    clip_norm=training.clip_norm,
                    progress=progress,
                    # Two passes of its first step were looked at.
                    verify=False,
                    replay_tolerance=replay_tolerance,
                )
        feedback = result.feedback
        if not (compile and each):
            feedback = [h[None] for h in feedback]
        scores += training.summed(feedback).unbind()
        losses += result.outer_loss.flatten().unbind()
        replay_error = max(replay_error, result.replay_error)

    L = torch.stack(losses) if each else losses[0]
    loss_before = None
    if training.can_be_repeated:
        # Of a copy, whose buffers may move.
        network = copy.deepcopy(training.begun[0])
        with replayed(training.start), torch.no_grad():
            loss_before = training.outer_losses(network, [training.problem])[0]
    return Attribution(
        scores=torch.stack(scores) if each else scores[0],
        order=training.order,
        outer_loss=L,
        student_params=result.student_params,
        kept=result.kept,
        _losses_with=lambda weights: training.repeated(weights, judges)[1].reshape(L.shape),
        _stacks=StackedTrainings(training, judges),
        replay_error=replay_error,
        float32_products=result.float32_products,
        outer_loss_before=loss_before,
        smoothing=smoothing,
    )


def mean_of(attributions: Sequence[SomeAttribution]) -> SomeAttribution:
    """Return the mean of several results on the same examples, such as those of several seeds.

    Its ``agreement`` says how alike they are, and its ``of_seeds`` are these results.

    Args:
        attributions: two or more of :func:`attribute`, or of recordings with ``train=``.

    Raises: :class:`metapl.MetaplError` for fewer, and for results of other examples.

    >>> x = torch.randn(12, 4)
    >>> y = x[:, :3].argmax(1)
    >>> found = attribute(
    ...     lambda: nn.Linear(4, 3),
    ...     (x, y),
    ...     (x, y),
    ...     optimizer=lambda student: torch.optim.SGD(student.parameters(), 0.5),
    ...     steps=20,
    ...     batch_size=12,
    ...     seeds=3,
    ... )
    >>> found.scores.shape, found.order.shape, found.agreement > 0.3
    (torch.Size([12]), torch.Size([3, 20, 12]), True)
    """
    shapes = {(a.scores.shape, a.order.shape) for a in attributions}
    if len(attributions) < 2 or len(shapes) > 1:
        listed = ", ".join(f"{tuple(a.scores.shape)}" for a in attributions)
        raise MetaplError(
            f"{len(attributions)} results were given, with scores of shape {listed}; expected two "
            "or more of the same examples and of as many steps."
        )
    if not all(a.has_data_set for a in attributions):
        raise MetaplError(
            "a recording was made without train=, so that its examples are numbered as they were "
            "first seen; expected recordings with the same train=."
        )
    known = [a._digests for a in attributions if a._digests is not None]
    if any(not torch.equal(digests, known[0]) for digests in known):
        raise MetaplError("results of recordings of different examples; expected the same train=.")

    def mean_losses(weights: Tensor) -> Tensor:
        return torch.stack([a._losses_with(weights) for a in attributions]).mean(0)

    before = [a.outer_loss_before for a in attributions if a.outer_loss_before is not None]
    mean_before = torch.stack(before).mean(0) if before else None
    return replace(
        attributions[0],
        scores=torch.stack([a.scores for a in attributions]).mean(0),
        order=torch.stack([a.order for a in attributions]),
        outer_loss=torch.stack([a.outer_loss for a in attributions]).mean(0),
        outer_loss_before=mean_before,
        _losses_with=mean_losses,
        replay_error=max(a.replay_error for a in attributions),
        of_seeds=tuple(attributions),
        agreement=agreement_of(attributions),
    )


def agreement_of(attributions: Sequence[Attribution]) -> float:
    """Return the mean rank correlation of the scores of all pairs of results."""
    scores = [a.by_example.double().cpu().numpy() for a in attributions]
    pairs = combinations(scores, 2)
    return float(np.mean([rank_correlations(first, second).mean() for first, second in pairs]))


def refuse_written(call: str, names: Sequence[str]) -> None:
    """Refuse a network whose forward has written to weights of these names, in a call."""
    if names:
        raise MetaplError(
            f"{call}: the network's forward writes to {few(names, 3)}, as an nn.Embedding with "
            "max_norm does, and a derivative does not see that; expected weights that the "
            "optimizer alone moves."
        )


def look_at_passes(training: WeightedTraining) -> None:
    """Look at two passes of the first step for what no derivative through the training sees.

    A forward that writes to weights is refused. Of buffers that a pass moves and the next one
    reads, such as the vectors of spectral norm, a derivative makes constants: that is warned of.

    Raises: :class:`metapl.MetaplError`.
    """
    # Nothing of the student itself moves.
    network = copy.deepcopy(training.begun[0])
    inputs = training.problem.student_input(training.batch(training.order[0]))
    weights_before = [p.detach().clone() for p in network.parameters()]
    buffers_before = [b.detach().clone() for b in network.buffers()]
    versions_before = [b._version for b in network.buffers()]
    # A forward may ask for a gradient.
    with torch.enable_grad(), replayed(training.start):
        try:
            outputs = returned_by(network, inputs, "student, on an inner batch")
            first_outputs = checks.logits(outputs, "student").detach()
        except RuntimeError as error:
            explain(error)
            raise
    written: list[str] = []
    for (name, p), weight in zip(network.named_parameters(), weights_before, strict=True):
        if not torch.equal(p, weight):
            written.append(name)
    refuse_written("attribute", written)
    moved: list[str] = []
    places = zip(network.named_buffers(), buffers_before, versions_before, strict=False)
    for (name, b), buffer, version in places:
        is_written = b._version != version or not torch.equal(b, buffer)
        if b.is_floating_point() and is_written:
            moved.append(name)
            # Half away from where it was: what the pass itself did may be too little to be seen in
            # the first step, and not in a later one.
            alternating = 1 - 2 * (torch.arange(b.numel(), device=b.device) % 2)
            with torch.no_grad():
                b.copy_(buffer * (1 + 0.5 * alternating.view_as(buffer)))
    if not moved:
        return
    with torch.enable_grad(), replayed(training.start):
        next_outputs = checks.logits(network(inputs), "student").detach()
    # Both passes round alike, so that what differs was read from a buffer.
    gap = (next_outputs - first_outputs).abs().max()
    if bool(gap > 100 * torch.finfo(gap.dtype).eps * first_outputs.abs().max()):
        warn(
            f"the student reads {few(moved, 3)}, which its passes move. A derivative counts them "
            "as constants, as torch does in each pass, so that scores leave out what acts by "
            "them.",
        )


def warn_of_roughness(training: WeightedTraining, path: CompiledPath | None) -> None:
    """Warn where the first steps of a training are not smooth in the weights of its examples.

    Args:
        path: the training's compiled steps, by which it is taken again; None: by the student's own.
    """
    steps = len(training.order)
    few = min(steps // 10, 50)

    def train_with(weights: Tensor) -> Mapping[str, Tensor]:
        if path is None:
            params, _ = training.repeated(weights, [training.problem], few)
            return params
        weights_of_steps = weights.to(training.start.device)[training.order[:few]]
        with replayed(training.start):
            return path.weights_after(weights_of_steps, few)

    thetas = thetas_along(train_with, len(training.data), h=0.1, v=None, progress=False)
    agreement, _ = agreement_of_signs(*thetas)
    if agreement < SMOOTH:
        warn(
            f"the metasmoothness of the first {few} of {steps:,} steps is "
            f"{agreement:.2f}, below {SMOOTH}: scores may not say what removals do. Try "
            "float32 weights, a lower learning rate, or a larger eps of Adam.",
        )


class Metasmoothness(NamedTuple):
    """The result of :func:`metasmoothness`.

    Attributes:
        agreement: Ŝ, in [-1, 1].
        outer_loss: of each training, (3,).
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
    settings: Settings | None = None,
    generator: torch.Generator | None = None,
    problem: BilevelProblem | None = None,
    clip_norm: AboveZero | None = None,
    step: AboveZero = 0.1,
    direction: Tensor | None = None,
    progress: bool = True,
) -> Metasmoothness:
    r"""Return whether derivatives through a training say what other weights of its examples do.

    It is seen in three plain trainings.

    .. math:: \hat S = \sum_j \frac{|\theta_{2h} - \theta_0|_j}{\|\theta_{2h} - \theta_0\|_1}\,
              \mathrm{sign}(\theta_h - \theta_0)_j\, \mathrm{sign}(\theta_{2h} - \theta_h)_j,
              \qquad \theta_h = \theta_K(w = 1 + h v)

    θ_h − θ_0 and θ_2h − θ_h are h times the derivatives of the trained weights along v at two
    places h apart: 1 where all have the same sign, as of a training that is linear in the weights
    of its examples, and near 0 where a derivative at w = 1 says nothing of weights that are h away.

    Args:
        student, train, outer, optimizer, steps, batch_size: as for :func:`attribute`.
        settings, generator, problem, clip_norm, progress: as for :func:`attribute`.
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
    check_arguments(metasmoothness, locals())
    training = WeightedTraining(
        student,
        train,
        outer,
        optimizer=optimizer,
        steps=steps,
        batch_size=batch_size,
        settings=settings,
        generator=generator,
        problem=problem,
        clip_norm=clip_norm,
    )
    trained, losses = training.trained_along(step, direction, steps, progress=progress)
    agreement, moved = agreement_of_signs(*trained)
    if not 0 < moved < math.inf:
        raise MetaplError(
            f"the direction moves the student's weights by {moved:g} in all; expected a finite "
            "number."
        )
    return Metasmoothness(agreement, losses)


def agreement_of_signs(theta_0: Tensor, theta_h: Tensor, theta_2h: Tensor) -> tuple[float, float]:
    """Return Ŝ of :func:`metasmoothness`, and how far all weights move, ‖θ_2h − θ_0‖_1."""
    moved = (theta_2h - theta_0).abs().double()
    total = float(moved.sum())
    signs = (theta_h - theta_0).sign() * (theta_2h - theta_h).sign()
    in_same_direction = float((moved * signs).sum())
    agreement = in_same_direction / total if total else math.nan
    return agreement, total
