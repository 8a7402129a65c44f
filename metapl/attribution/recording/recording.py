"""What a user holds of a followed training: its recording, and the scores that it leads to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metapl.attribution.attribute import Attribution, Smoothing, warn_of_worth
from metapl.attribution.examples import examples_of
from metapl.attribution.recording.calls import (
    MissingColumns,
)
from metapl.attribution.recording.contents import OpenedRecording
from metapl.attribution.recording.folder import KeptState, RecordingFolder
from metapl.attribution.recording.network import network_in
from metapl.attribution.recording.recorder import Recorder
from metapl.attribution.recording.replay import (
    Cotangents,
    Replay,
    feedback_of,
    order_of,
)
from metapl.attribution.reliability import PERTURBATION, Reliability, estimate_by
from metapl.attribution.tables import columns_of, path_of_table, weights_by, write_table
from metapl.attribution.weighted import (
    EQUAL_WEIGHTS,
    judges_of,
    summed_scores,
    thetas_along,
    with_weights_of_one,
)
from metapl.core.replays import Tolerance
from metapl.errors import MetaplError, few, reason_of
from metapl.execution.numerics import Tree, deterministic, explain, float32_products
from metapl.execution.state import one_at_a_time
from metapl.problems.base import BilevelProblem, kind_of
from metapl.problems.doubtful import EqualWeights
from metapl.runs.fields import AboveZero, AtLeastOne, check_arguments
from metapl.updates.smoothing import smoothing_for
from metapl.words import summary

# A state costs about as much as a few steps, and a replay rounds on its own between two of them.
STATES_EVERY = 100
# Of recorded examples.
MAX_BYTES = 2**30


def record(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    out: str | Path,
    problem: EqualWeights | None = None,
    train: Any = None,
    states_every: AtLeastOne = STATES_EVERY,
    max_bytes: AtLeastOne = MAX_BYTES,
    clip_norm: AboveZero | None = None,
    resume: bool = False,
) -> Recording:
    r"""Follow the training of a network by a loop that is not metapl's, for its attribution.

    The loop may be anybody's: plain PyTorch, ``transformers.Trainer``, Lightning or accelerate. It
    runs within the context, unchanged and with the same bits:

    .. code-block:: python

        with metapl.record(model, out="recording") as recording:
            trainer.train()
        scores = recording.attribute(outer).scores

    A step of the loop is one or more calls of the network that are backpropagated, the
    micro-batches, and then a step of its optimizer. Recorded are the numbers of the examples in
    each call, the generators before it where it draws, the settings and the clipping of each step,
    and every m-th state with its digest. In the first step the mean of the problem's losses,

    .. math:: c \sum_j c_j \frac1{B_j} \sum_{i} \ell_i(\theta_0), \qquad c_j = \frac{B_j}{\sum B}
              \text{ or } \frac1J,

    is compared with the loss that the loop has backpropagated, which gives the factor c, usually 1,
    and its gradient with ``p.grad``. A difference beyond rounding, the root of the type's
    precision, is refused there. (transformers divides the loss of a GPT-2 by the number of tokens
    and not of predictions, so that c = (T − 1)/T; :attr:`Recording.loss_factor`.) The gradients of
    steps m, 2m, 4m and so on are compared too. One that differs ends the recording with a warning:
    the loop divides its loss by the sum of its batch's class weights, say, so that c changes.

    Args:
        model: the network that the loop calls, in one process on one device, or that network in
            ``DistributedDataParallel``; of a Lightning module the network in it.
        optimizer: ``torch.optim`` SGD, Adam or AdamW over the network's weights. None: the first
            optimizer that steps over them, since Trainers make theirs late.
        out: a folder for the recording; it is made if need be, and may have no recording, unless
            ``resume`` is given.
        problem: gives the losses ℓ_i, as for :func:`metapl.attribute`. Default
            :class:`metapl.problems.EqualWeights`, cross-entropy;
            :class:`metapl.problems.NextToken` for causal language models.
        train: the examples, in a form that :func:`metapl.attribute` takes, as the network is called
            with them; of a language model ``x`` or ``(x, x)``. Their numbers are then those of this
            data set, and each call's rows are found in it by their bits. None: the network has to
            be called with the labels, as transformers does; examples are recorded as they are, and
            numbered in the order in which they were first seen.
        states_every: m, steps from one kept state to the next. A state has the size of the weights
            and the optimizer's state.
        max_bytes: of recorded examples. Beyond them the recording ends with a warning, and the
            training goes on.
        clip_norm: the greatest norm of the gradient, for a loop that clips by a function of its
            own, which scales by c / (norm + 1e-6) as ``torch.nn.utils.clip_grad_norm_`` does; that
            one is seen.
        resume: go on with the recording in ``out``, if there is one, where the loop goes on from a
            checkpoint of its own. The weights, buffers and optimizer have to be, bit for bit, those
            of a kept state, so that the loop's checkpoints are of multiples of ``states_every``
            steps, or of the end of what was recorded. What was recorded of later steps is dropped,
            as soon as the first step of the loop was compared.

    Returns: a :class:`Recording`, a context around the training. Cost: a forward and a backward
    pass in the steps that are compared, and in each call two reads of the generators and four
    operations on the batch; docs/whole-trainings.md has what was measured. Not followed, and said
    at the first step by name: other optimizers, GradScaler and float16, weights in half precision,
    several processes, networks under ``torch.compile`` or whose forward writes to weights, random
    augmentation with ``train=``. Of examples that are equal the first has the score of all, which a
    warning says. What a later step does that cannot be followed ends the recording with a
    ``UserWarning``, and the training goes on. Hooks that the loop has on the network run in the
    comparison too. Raises: :class:`metapl.MetaplError`, at once for wrong arguments, and from the
    loop's first step for what cannot be followed or whose loss is another one.

    >>> import tempfile
    >>> x, y = torch.randn(12, 4), torch.arange(12) % 3
    >>> model = nn.Linear(4, 3)
    >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
    >>> with tempfile.TemporaryDirectory() as out:
    ...     with record(model, optimizer, out=out, train=(x, y)) as recording:
    ...         for rows in torch.arange(12).split(4):
    ...             optimizer.zero_grad()
    ...             nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
    ...             optimizer.step()
    ...     attribution = recording.attribute((x, y), progress=False)
    >>> recording.steps, attribution.scores.shape
    (3, torch.Size([12]))

    Source: MAGIC (Ilyas and Engstrom, 2025), whose trainings are its own.
    """
    check_arguments(record, locals())
    if not isinstance(model, nn.Module):
        raise MetaplError(f"record: model is of type {type(model).__name__}; expected a module.")
    model = network_in(model)
    folder = RecordingFolder(out)
    # Where no state was kept yet, the recording begins anew.
    resumes = resume and bool(folder.states())
    if not resume:
        folder.refuse_existing()
    problem = with_weights_of_one(problem or EQUAL_WEIGHTS)
    recorder = Recorder(
        model,
        optimizer,
        folder,
        problem=problem,
        train=train,
        states_every=states_every,
        max_bytes=max_bytes,
        clip_norm=clip_norm,
        resumes=resumes,
    )
    return Recording(folder, model, problem=problem, train=train, recorder=recorder)


class Recording:
    """A followed training: a context while it runs, and its attribution afterwards.

    :func:`metapl.record` makes one, and :meth:`open` reads one that another process wrote.
    """

    def __init__(
        self,
        folder: RecordingFolder,
        model: nn.Module,
        *,
        problem: EqualWeights,
        train: Any,
        recorder: Recorder | None = None,
    ) -> None:
        self._folder = folder
        self._model = model
        self._problem = problem
        self._train = train
        self._recorder = recorder
        self._contents: OpenedRecording | None = None

    @classmethod
    def open(
        cls,
        out: str | Path,
        model: nn.Module,
        *,
        problem: EqualWeights | None = None,
        train: Any = None,
    ) -> Recording:
        """Read a recording, also one whose process was killed: then of the steps until it was.

        Args:
            out: the folder.
            model: the network, built as for the recording; its weights may be any. Frozen weights
                have to be those of the recording.
            problem: of the same class as for the recording. Its fields may differ, such as
                ``NextToken(per="token")`` for the scores of tokens.
            train: the data set, where the recording was given one. One that was given none has its
                examples itself, and numbers them as the rows of this data set.

        Raises: :class:`metapl.MetaplError`, in one line, for a folder without a recording, a
        network with other weights, another version of torch, another problem, other data or
        another order of them, and a state that is missing.
        """
        problem = with_weights_of_one(problem or EQUAL_WEIGHTS)
        recording = cls(RecordingFolder(out), network_in(model), problem=problem, train=train)
        recording._read()
        return recording

    def __enter__(self) -> Recording:
        if self._recorder is None:
            raise MetaplError("the recording was opened to be read; expected metapl.record.")
        self._recorder.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._recorder is not None, "the context was entered with one"
        self._recorder.end(is_broken=error is not None)

    def __repr__(self) -> str:
        return summary("Recording", out=str(self._folder.path), steps=self.steps)

    @property
    def steps(self) -> int:
        """How many steps of the training were followed."""
        if self._contents is not None:
            return len(self._contents.rows)
        return 0 if self._recorder is None else self._recorder.steps

    @property
    def order(self) -> Tensor:
        """The examples of each step, (K, B), with −1 behind those of a smaller step."""
        contents = self._read()
        return order_of([contents.examples_of(row) for row in contents.rows])

    @property
    def loss_factor(self) -> float:
        """By which number the loop multiplies the mean of the problem's losses; usually 1."""
        return self._read().factor

    @one_at_a_time
    def attribute(
        self,
        outer: Any,
        *,
        each: bool = False,
        smoothing: Smoothing | None = None,
        verify: bool | Literal["warn"] = True,
        progress: bool = True,
        replay_tolerance: Tolerance | None = None,
    ) -> RecordedAttribution:
        r"""Return what each example of the training did to an outer loss after it.

        .. math:: \mathrm{score}_i = -\frac{\partial L(\theta_K)}{\partial w_i} \text{ at } w = 1

        as :func:`metapl.attribute` has it, through the steps that were recorded. They are taken
        again from the kept states, backwards, and each kept state is compared with where the steps
        before it lead.

        Args:
            outer: what the trained network is judged on, in a form that :func:`metapl.attribute`
                takes; one batch. The network evaluates, without dropout and by the running
                statistics of batch norm, which count as constants.
            each: the scores of each outer example's loss, (M, N).
            smoothing: of the derivative of Adam's steps, as for :func:`metapl.attribute`.
            verify: compare two steps with real ones, as there, from the state before the first.
            progress: show on a terminal how far it is.
            replay_tolerance: the most by which a state may differ from the recorded one, as a share
                of the way from the kept state before it; None: ten roots of the type's precision,
                3e-3 in float32, and 1.6e-2 under autocast to bfloat16.

        Returns: a :class:`RecordedAttribution`, with ``scores`` (N,), or (N, T) of tokens. Cost:
        some four plain trainings, and of each further outer example two. Memory: m states and
        gradients where they fit into half of what is free, else some √m of them, for one more
        training. Bias: none, as a derivative, where constants are constants: the settings of each
        step, batch norm's running statistics in the outer loss, and other buffers that passes move.
        Nothing of the network moves. Of several recordings, as of several seeds,
        :func:`metapl.attribution.attribute.mean_of` has the mean. Warns: ``UserWarning`` where
        losses read such buffers, and once of all reasons for which scores may not say what removals
        do, as :func:`metapl.attribute`. Raises:
        :class:`metapl.MetaplError` before the replay for an outer set that cannot be read, other
        data, another network or version of torch, a missing state and operations without a second
        derivative; in it, for steps that lead elsewhere.
        """
        check_arguments(Recording.attribute, locals())
        contents = self._read()
        smoothing_of_adjoint = smoothing_for(contents.update.optimizer, smoothing)
        replay = Replay(contents, replay_tolerance, smoothing_of_adjoint)
        first = next(self._model.parameters())
        outer_examples = examples_of(outer, "outer", first)
        batch = contents.outer_batch(outer_examples[torch.arange(len(outer_examples))])
        network = contents.network
        judges: list[BilevelProblem] = [self._problem]
        if each:
            judges = judges_of(self._problem, len(outer_examples), network.ranks)
        with torch.enable_grad(), deterministic(network.device):
            # What cannot be read is refused here, and not after the replay.
            try:
                replay.refuse_other_start(batch)
                replay.refuse_other_steps()
                start = replay.read_state(replay.state_numbers[-1])
                network.outer_losses(start.params, start.buffers, batch, judges[:1])
            except MetaplError:
                raise
            except Exception as error:
                # An operation without a second derivative has its own words.
                explain(error)
                raise MetaplError(
                    f"the network or the loss of {kind_of(self._problem)} cannot take outer "
                    f"({reason_of(error)}); expected examples in the form, the shape and the type "
                    "of those of the training."
                ) from error
            if verify:
                # Loaded where it is used.
                from metapl.attribution.recording.verified import verify_recorded_steps

                verify_recorded_steps(replay, batch, verify)
            end = replay.last_state(progress=progress)
            first_state = replay.read_state(0)
            loss_before, _ = network.outer_losses(
                first_state.params, first_state.buffers, batch, [self._problem]
            )
            losses, gradients = network.outer_losses(end.params, end.buffers, batch, judges)
            ends = [Cotangents(gradient) for gradient in gradients]
            feedback = feedback_of(replay, ends, progress=progress)
        by_step = [(contents.example_numbers[numbers], h) for numbers, h in feedback]
        scores = summed_scores(by_step, len(contents.digests), first.new_zeros(0, device="cpu"))

        def losses_with(weights: Tensor) -> Tensor:
            with torch.enable_grad(), deterministic(network.device):
                trained: KeptState = replay.trained(weights[contents.example_numbers])
                # Such as by validations in train mode, or an update of batch norm's statistics.
                unseen = replay.moved_unseen(end)
                buffers = {name: trained.buffers[name] + t for name, t in unseen.items()}
                with_weights, _ = network.outer_losses(
                    trained.params, {**trained.buffers, **buffers}, batch, judges
                )
            return with_weights.reshape(losses.shape if each else ())

        attribution = RecordedAttribution(
            scores=scores if each else scores[0],
            order=self.order,
            outer_loss=losses if each else losses[0],
            student_params=end.params,
            kept=f"one step in {contents.states_every:,}, of {len(contents.rows):,}",
            _losses_with=losses_with,
            _digests=contents.digests,
            replay_error=replay.check.error,
            float32_products=float32_products(network.device),
            outer_loss_before=loss_before[0],
            has_data_set=contents.has_data_set,
            smoothing=smoothing_of_adjoint,
            _numbers_in=contents.numbers_in,
        )
        warn_of_worth(attribution, self._problem, contents.update.optimizer)
        return attribution

    @one_at_a_time
    def reliability(self, *, progress: bool = True) -> Reliability:
        """Return how well scores of this training may be expected to predict retraining.

        As :func:`metapl.reliability`, of the recorded steps: the first half of them is taken again
        with three weightings of the examples, as the loop took them.

        Args:
            progress: show on a terminal how far it is.

        Returns: a :class:`metapl.attribution.reliability.Reliability`, printed as one line. Cost:
        one and a half trainings, and no derivative. Bias: as there. Raises:
        :class:`metapl.MetaplError` where no weight moves, or one becomes NaN.
        """
        contents = self._read()
        replay = Replay(contents, tolerance=None, smoothing=0.0)
        steps = len(contents.rows)
        first_steps = max(1, steps // 2)

        def train_with(weights: Tensor) -> Tree:
            return replay.trained(weights[contents.example_numbers], first_steps).params

        with torch.enable_grad(), deterministic(contents.network.device):
            thetas = thetas_along(
                train_with, len(contents.digests), h=PERTURBATION, v=None, progress=progress
            )
        return estimate_by(thetas, first_steps, steps)

    def _read(self) -> OpenedRecording:
        """Return what the folder has, which is read once and compared with network and data."""
        if self._recorder is not None and self._recorder.is_following:
            raise MetaplError("the training is being recorded; expected the end of the context.")
        if self._contents is None:
            self._contents = OpenedRecording.of(
                self._folder, self._model, self._problem, self._train
            )
        return self._contents


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class RecordedAttribution(Attribution):
    """The result of :meth:`Recording.attribute`: an Attribution, with weights for a next training.

    ``order`` is (K, B), with −1 behind the examples of a smaller step. :meth:`validate` trains by
    the recorded steps with other weights, as the loop did.

    Examples are numbered as the rows of ``train=``. Without it they are numbered as they were first
    seen, in all that is returned and in what is removed, and no row of a data set is known by its
    number. The tables below find rows of a ``dataset=`` by their bits, in any order: then they have
    a row for each of its rows. Of equal ones each has the mean of their scores, and one that no
    step has drawn has the score 0.
    """

    _numbers_in: Callable[[Any], Tensor]

    def weights(self, rate: AboveZero = 1.0, dataset: Any = None) -> Tensor:
        """Return weights that are a step of descent away from 1, as :meth:`Attribution.weights`.

        Args:
            rate: as there.
            dataset: the data set whose rows get the weights, in a form that
                :func:`metapl.attribute` takes; None: that of the recording.

        Raises: :class:`metapl.MetaplError` for a recording without a data set, and for a data set
        that lacks examples of it.
        """
        if dataset is None and not self.has_data_set:
            raise MetaplError(
                "the recording was made without train=, so that its examples are numbered as they "
                "were first seen; expected weights(dataset=) with the data set of the loop."
            )
        scores, _ = self._rows(dataset)
        return weights_by(scores, rate)

    def columns(self, rate: AboveZero = 1.0, dataset: Any = None) -> dict[str, list[Any]]:
        """Return a table with a row for each example, as :meth:`Attribution.columns`.

        Without a data set the first column is ``first_seen``, and equal examples count as one.

        Args:
            rate, dataset: as for :meth:`weights`.
        """
        scores, draws = self._rows(dataset)
        has_rows = self.has_data_set or dataset is not None
        name = "example" if has_rows else "first_seen"
        return columns_of(scores, draws, rate=rate, name_of_numbers=name)

    def save_table(self, file: str | Path, rate: AboveZero = 1.0, dataset: Any = None) -> None:
        """Write :meth:`columns` to a file, as :meth:`Attribution.save_table`.

        Args:
            file: its path, which ends in ``.csv`` or ``.parquet``.
            rate, dataset: as for :meth:`weights`.
        """
        path = path_of_table(file)
        write_table(self.columns(rate, dataset), path)

    def add_to(self, dataset: Any, rate: AboveZero = 1.0, *, replace: bool = False) -> Any:
        """Return a ``datasets.Dataset`` with the columns ``score`` and ``weight`` beside its own.

        Args:
            dataset: that of the loop, in any order.
            rate: as for :meth:`weights`.
            replace: put them in the place of columns of these names.

        Raises: :class:`metapl.MetaplError` for a data set that lacks examples of the recording,
        for one that has such a column, and for what is no such data set.
        """
        if not hasattr(dataset, "add_column"):
            raise MetaplError(
                f"dataset is of type {type(dataset).__name__}; expected a datasets.Dataset."
            )
        try:
            columns = self.columns(rate, dataset)
        except MissingColumns as error:
            # A data set has no rows of a collator, and a loader has no columns to add to.
            raise MetaplError(
                f"{error.what}; expected a dataset with what the collator adds, or the weights of "
                "weights(dataset=DataLoader(dataset, collate_fn=...)) as a column of your own: "
                "dataset.add_column('weight', weights.tolist())."
            ) from error
        names = ("score", "weight")
        present = [name for name in names if name in dataset.column_names]
        if present and not replace:
            raise MetaplError(
                f"dataset has the columns {few(present)} already; expected replace=True for new "
                "ones in their place."
            )
        if present:
            dataset = dataset.remove_columns(present)
        for name in names:
            dataset = dataset.add_column(name, columns[name])
        return dataset

    def _rows(self, dataset: Any) -> tuple[Tensor, Tensor]:
        """Return the scores of the rows of a data set, (N,) or (N, T), and their draws, (N,).

        Of M outer losses they are the means. None: the data set of the recording, or the examples
        as they were first seen.
        """
        scores, draws = self._scores_and_draws()
        if dataset is None and not self.has_data_set:
            return scores, draws
        numbers = self._numbers_in(dataset)
        copies = torch.bincount(numbers[numbers >= 0], minlength=len(scores)).clamp_min(1)
        means = scores / copies.reshape(-1, *[1] * (scores.ndim - 1))
        # Rows of no example, whose number is −1, read what is behind the last one.
        means = torch.cat([means, torch.zeros_like(means[:1])])
        draws = torch.cat([draws, torch.zeros_like(draws[:1])])
        return means[numbers], draws[numbers]
