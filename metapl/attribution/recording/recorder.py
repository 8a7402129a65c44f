"""Writes a recording while another loop trains: hooks on the network and on its optimizer.

A step of the loop is one or more calls of the network with a gradient, and then a step of the
optimizer; in Lightning the calls lie within the optimizer's step. Everything is therefore read in
four places:

- before a call: its arguments, the generators, and which parts train; before the first call of a
  step that keeps its state, the buffers too;
- after a call: whether the generators have moved;
- before the optimizer's step: the weights and its state, where they are kept;
- after it: the settings, the losses and the clipping that were seen, and, in the first step, the
  gradient.

A call counts where a backward pass has come to its outputs (:func:`calls_that_count`). A loop may
look at the network with a gradient and leave it at that, as an evaluation without
``torch.no_grad()`` does.

The loop's bits are what they are without a recording: nothing is drawn, and nothing is written to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from metapl.attribution.attribute import refuse_written
from metapl.attribution.examples import examples_of
from metapl.attribution.recording.calls import (
    CallForm,
    Data,
    NumbersBySight,
    NumbersInData,
    SeenRows,
    batch_of_call,
    refuse_other_rows,
    refuse_unknown,
)
from metapl.attribution.recording.first_step import (
    SeenStep,
    compared_factor,
    followed_update,
    gap_of_later_step,
    tolerance_of_replay,
)
from metapl.attribution.recording.folder import (
    EndOfTraining,
    KeptState,
    RecordingFolder,
    StepRow,
)
from metapl.attribution.recording.network import (
    Call,
    RecordedNetwork,
    names_of_statistics,
    parts_in_training,
)
from metapl.attribution.recording.watching import StepWatch, refuse_clipping, watching
from metapl.errors import MetaplError, reason_of, warn
from metapl.execution.batch import Batch, leaves_of, map_tensors, row_digests
from metapl.execution.numerics import Tree
from metapl.execution.outside import generators_outside_torch, refuse_draws_outside
from metapl.execution.state import RandomState, one_at_a_time, trainable
from metapl.problems.base import kind_of
from metapl.problems.doubtful import EqualWeights
from metapl.updates import TorchUpdate
from metapl.updates.optimizers import parameters_of

# Entries of a param group that no rule reads.
NO_SETTINGS = ("params", "param_names", "initial_lr")

Compared = TypeVar("Compared")

NO_CALL = (
    "record: the optimizer took a step, and the network was not called with a gradient before it; "
    "expected the network that the loop calls."
)


@dataclass
class SeenCall:
    """A call of the network in the step under way.

    Attributes:
        examples: (B,): digests of the rows with a data set, or else their numbers, which they get
            once the call counts.
        random_state: the generators before it; None where it drew nothing.
        training_parts: the names of the parts that were in training mode.
        batch: what the network was called with, in a step that is compared.
        autocast: in what type products were taken, in the first step; None: there was no autocast.
        is_reached: whether derivatives were taken that come to its outputs. True too of outputs in
            which no tensor is seen.
        is_backpropagated: whether ``backward`` took them, and not ``torch.autograd.grad`` alone.
    """

    examples: Tensor | SeenRows
    random_state: RandomState | None
    training_parts: list[str]
    batch: Batch = None
    autocast: torch.dtype | None = None
    is_reached: bool = True
    is_backpropagated: bool = True

    def numbers(self) -> Tensor:
        """Return the numbers of the examples, or digests of the rows, (B,)."""
        assert isinstance(self.examples, Tensor), "it is one once the call counts"
        return self.examples

    def draws(self) -> dict[str, Any] | None:
        """Return the generators before the call as plain values."""
        return None if self.random_state is None else self.random_state.values()


@dataclass
class SeenRow:
    """A step that is not written yet. What a device has is read when it is written.

    Attributes:
        calls: those that count, without what the first step alone needs.
        losses: that were backpropagated.
        clip_norm, options, without_gradient: as of :class:`StepRow`.
    """

    calls: list[SeenCall]
    losses: list[Tensor]
    clip_norm: float | None
    options: list[dict[str, Any]]
    without_gradient: list[str]


class RecordingHook:
    """A hook on the followed network, and on no copy of it.

    A loop may copy or pickle its network while it trains, for an average of its weights or the best
    ones so far. The copy has one that does nothing in the place of this one.
    """

    def __init__(self, hook: Callable[..., None]) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> None:
        self._hook(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordingHook, (no_hook,)


def no_hook(*args: Any) -> None:
    """Do nothing, as a hook of a copy."""


class Recorder:
    """Follows the training of a network by hooks, from :meth:`begin` to :meth:`end`.

    Args:
        model: the network that the loop calls and trains.
        optimizer: that of the loop; None: the first that steps over the network's weights.
        folder: where the recording is written.
        problem: gives the losses of the examples.
        train: the examples; None: they are recorded as the network is called with them.
        states_every: steps from one state that is kept to the next.
        max_bytes: of recorded examples.
        clip_norm: of a clipping that is not PyTorch's; None: what is seen.
        resumes: whether it goes on with the recording in the folder, from the kept state in which
            the loop begins.

    Attributes:
        steps: how many steps of the training were followed.
        ended_by: why the recording ended before the training did; "" where it did not.
        is_following: whether the context is open.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        folder: RecordingFolder,
        *,
        problem: EqualWeights,
        train: Any,
        states_every: int,
        max_bytes: int,
        clip_norm: float | None,
        resumes: bool,
    ) -> None:
        self.model = model
        # That of accelerate has PyTorch's own inside.
        self.optimizer: torch.optim.Optimizer | None = getattr(optimizer, "optimizer", optimizer)
        self.folder = folder
        self.problem = problem
        self.train = train
        self.states_every = states_every
        self.max_bytes = max_bytes
        self.clip_norm = clip_norm
        self.resumes = resumes
        self.steps = 0
        self.ended_by = ""
        self.is_following = False
        self._is_first_step = True
        self._device = next(model.parameters()).device
        self._watch = StepWatch(model.parameters(), self._before_backward)
        self._hooks = ExitStack()
        # Hooks on parts of the network, in the calls of the first step alone.
        self._looks = ExitStack()
        self._form: CallForm | None = None
        self._autocast: torch.dtype | None = None
        # Those of the first call that counts.
        self._training_parts: list[str] = []
        # Those of the last call, and the modes by which they are known again.
        self._parts_now: list[str] = []
        self._modes: list[bool] = []
        self._parts = [*model.modules()]
        self._is_learned: list[bool] = []
        self._data: Data | None = None
        self._in_data: NumbersInData | None = None
        self._by_sight: NumbersBySight | None = None
        self._update: TorchUpdate | None = None
        self._network: RecordedNetwork | None = None
        # The last step whose gradient was compared with the loop's, the factor of its loss, and the
        # sizes of the first step's calls.
        self._compared_step = 0
        self._factor = 1.0
        self._first_sizes: Sequence[float] = ()
        # Python's and NumPy's generators before a call in the first step.
        self._outside_torch: tuple[Any, Any] = (None, None)
        # A comparison calls the network too, and that call is none of the loop's.
        self._is_comparing = False
        self._weights = [*model.parameters()]
        self._versions: list[int] = []
        # The smallest weight, and its values after the last step: what writes past the versions, as
        # an average of weights does by ``.data``, writes to all weights.
        self._smallest: Tensor | None = None
        self._smallest_after_step = torch.empty(0)
        self._learned: dict[str, nn.Parameter] = {}
        self._norms_after_step: Sequence[Tensor] = ()
        self._buffers_after_step: Tree = {}
        # The steps since the last state that was kept, and the number of the first of them.
        self._rows: list[SeenRow] = []
        self._first_row = 0
        # The digest and buffers of a state that was written after the last step; None: none was.
        self._written: tuple[Tensor, Tree] | None = None
        self._moving_buffers: tuple[str, ...] = ()
        self._begin_step()

    def _begin_step(self) -> None:
        """Forget what was seen of the step before."""
        self._calls: list[SeenCall] = []
        # The call under way, which counts when it has ended without an error.
        self._open_call: SeenCall | None = None
        # Whether the weights were copied right before it.
        self._has_values_before_call = False
        self._params: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._optimizer_state: dict[str, dict[str, Any]] | None = None
        self._options: list[dict[str, Any]] = []
        self._watch.begin()

    @property
    def _keeps_state(self) -> bool:
        """Whether the state before the step under way is kept."""
        return self.steps % self.states_every == 0

    @property
    def _is_compared(self) -> bool:
        """Whether the gradient of the step under way is compared with the loop's.

        The first step is. With m steps between kept states, steps m, 2m, 4m and so on are too, each
        for a pass forward and one back.
        """
        if self._is_first_step:
            return True
        return self._keeps_state and self.steps >= 2 * self._compared_step

    # ---------------------------------------------------------------------------- beginning and end

    def begin(self) -> None:
        """Register the hooks."""
        before_forward = RecordingHook(self._before_forward)
        after_forward = RecordingHook(self._after_forward)
        hooks = [
            self.model.register_forward_pre_hook(before_forward, with_kwargs=True),
            self.model.register_forward_hook(after_forward),
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        for hook in hooks:
            self._hooks.callback(hook.remove)
        self._hooks.enter_context(watching(self._watch))
        self.is_following = True

    def end(self, *, is_broken: bool) -> None:
        """Remove the hooks, and write what was followed since the last state.

        Args:
            is_broken: whether an error ends the loop, in a step whose passes count for nothing.
        """
        is_whole = self.ended_by == ""
        self._hooks.close()
        self.is_following = False
        if self._is_first_step:
            if is_whole and not is_broken and not self.resumes:
                warn(
                    "the recording has no step: no optimizer has stepped over the network's "
                    "weights. Expected model= with the network itself that the loop trains, and no "
                    "copy (transformers.Trainer makes one by model_init=).",
                )
            return
        if not is_whole:
            return
        try:
            self._write_rows()
            # A loop may have put other weights into the network, such as its best ones. The last
            # state is then found by a replay, and compared with one weight of it.
            if self._has_weights_of_last_step():
                state = self._present_state()
                if is_broken:
                    state = state._replace(buffers=self._buffers_after_step)
                self.folder.write_state(self.steps, state)
            elif self._smallest is not None:
                if self._written is None:
                    self.folder.write_end(self.steps, self._end())
                if not torch.equal(self._smallest, self._smallest_after_step):
                    warn(
                        "the network holds other weights than after the last step of the training, "
                        "such as its best or averaged ones; the recording ends with those of the "
                        "last step, which its scores are about.",
                    )
        except MetaplError as error:
            self._stop(str(error))

    def _end(self) -> EndOfTraining:
        """Return what is known of the network after the last step."""
        names = {id(p): name for name, p in trainable(self.model).items()}
        weights: Tree = {}
        if id(self._smallest) in names:
            weights[names[id(self._smallest)]] = self._smallest_after_step
        norms: Tree = {}
        for p, norm in zip(self._learned.values(), self._norms_after_step, strict=True):
            if id(p) in names:
                norms[names[id(p)]] = norm
        return EndOfTraining(weights, norms, self._buffers_after_step)

    def _has_weights_of_last_step(self) -> bool:
        """Return whether the network holds the weights that the last step has led to."""
        if self._smallest is None or self._weight_versions() != self._versions:
            return False
        return torch.equal(self._smallest, self._smallest_after_step)

    def _state(
        self, params: Tree, optimizer_state: dict[str, dict[str, Any]], buffers: Tree
    ) -> KeptState:
        """Return a state with those buffers alone that a step moves."""
        moving = {name: buffers[name] for name in self._moving_buffers}
        return KeptState(params, optimizer_state, buffers=moving)

    def _present_state(self) -> KeptState:
        """Return the state that network and optimizer are in."""
        assert self._update is not None, "a step was taken"
        # The loop's next step writes to the optimizer's.
        optimizer_state: Any = map_tensors(lambda t: t.detach().clone(), self._update.read_state())
        return self._state(self._current_params(), optimizer_state, self._current_buffers())

    def _stop(self, reason: str) -> None:
        """End the recording with the last step that was followed, and let the training go on.

        Where its rows cannot be written, it ends with the last state that was kept.
        """
        self.ended_by = reason.removeprefix("record: ").rstrip(".")
        last = self._first_row
        if len(self._rows) == self.steps - self._first_row > 0:
            with suppress(MetaplError):
                self._write_rows()
                self.folder.write_end(self.steps, self._end())
                last = self.steps
        warn(
            f"the recording in {self.folder.path} ended before step {last:,}: "
            f"{self.ended_by}. The training goes on without it.",
        )

    # ------------------------------------------------------------------------------ the four places

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._is_active or not torch.is_grad_enabled():
            return
        with self._guarded():
            self._forget_gone()
            self._has_values_before_call = self._keeps_state and not self._params
            if self._has_values_before_call:
                self._params = self._current_params()
                self._buffers = self._current_buffers()
            batch = batch_of_call(module, args, kwargs)
            if self._form is None:
                self._read_data(batch)
            call = SeenCall(
                examples=self._examples_of(batch),
                random_state=RandomState.now(self._device),
                training_parts=self._parts_in_training(),
            )
            if self._is_compared:
                # The loop may write into its batch after the call.
                call.batch = map_tensors(lambda t: t.detach().clone(), batch)
            if self._is_first_step:
                self._device = next(self.model.parameters()).device
                self._outside_torch = generators_outside_torch()
                self._look_at_autocast(call)
                self._versions = self._weight_versions()
            self._open_call = call

    def _before_backward(self) -> None:
        if self._is_active:
            with self._guarded():
                self._forget_gone()

    def _forget_gone(self) -> None:
        """Forget what was backpropagated and then thrown away, as of a loss that is no number.

        A call counts again where another backward pass comes to it: a loop may look at the gradient
        of its loss first.
        """
        if self._watch.losses and self._watch.are_gradients_gone():
            for call in self._calls:
                call.is_reached = False
                call.is_backpropagated = False
            self._watch.begin()

    def _after_forward(self, module: nn.Module, args: Any, outputs: Any) -> None:
        call = self._open_call
        if not self._is_active or call is None:
            return
        self._open_call = None
        self._looks.close()
        with self._guarded():
            if self._is_first_step:
                refuse_draws_outside(self._outside_torch)
                self._refuse_written_weights()
            self._note_draws(call)
            self._watch_outputs(call, outputs)
            self._calls.append(call)

    def _note_draws(self, call: SeenCall) -> None:
        """Note whether a call that has ended has drawn random numbers."""
        start = call.random_state
        assert start is not None, "it was read before the call"
        if RandomState.now(self._device).equals(start):
            call.random_state = None

    def _watch_outputs(self, call: SeenCall, outputs: Any) -> None:
        """Let a backward pass that comes to the outputs of a call be noted."""
        leaves = [outputs] if isinstance(outputs, Tensor) else leaves_of(outputs)
        nodes = [t.grad_fn for t in leaves if isinstance(t, Tensor) and t.grad_fn is not None]
        if not nodes:
            return
        call.is_reached = False
        call.is_backpropagated = False
        for node in nodes:
            node.register_prehook(partial(note_reached, self._watch, call))

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_active or not self._is_followed(optimizer):
            return
        with self._guarded():
            if self._update is None:
                self._update = followed_update(self.model, optimizer)
                self._is_learned = [p.requires_grad for p in self._weights]
                self._learned = trainable(self.model)
                # Behind hooks of the loop, which may set the rate.
                hook = optimizer.register_step_pre_hook(RecordingHook(self._note_settings))
                self._hooks.callback(hook.remove)
            if self._is_learned != [p.requires_grad for p in self._weights]:
                raise MetaplError(
                    "the loop learns other weights than in its first step, as where it freezes "
                    "some; expected the same in all steps"
                )
            if self._keeps_state:
                # The first call of Lightning's step is within it, and has not come yet.
                self._params = self._params or self._current_params()
                self._buffers = self._buffers or self._current_buffers()
                # Its step writes to them.
                self._optimizer_state = map_tensors(
                    lambda t: t.detach().clone(), self._update.read_state()
                )
            if self._is_first_step and self.resumes:
                # Loaded where it is used.
                from metapl.attribution.recording.resumed import step_of_kept_state

                state = self._params, self._optimizer_state or {}, self._buffers
                self.steps = step_of_kept_state(self.folder, KeptState(*state), self._device)

    def _note_settings(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._is_active:
            with self._guarded():
                self._options = settings_of(optimizer)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_active:
            return
        if not self._is_followed(optimizer):
            with self._guarded():
                self._refuse_step_of_another(optimizer)
            return
        with self._guarded():
            self._calls = calls_that_count(self._calls)
            if self._is_first_step and self.resumes and self._by_sight is not None:
                parts, _ = self.folder.read_examples(before=self.steps)
                self._by_sight = NumbersBySight.of(parts)
            for call in self._calls:
                if self._by_sight is not None and isinstance(call.examples, SeenRows):
                    call.examples = self._by_sight.number(call.examples)
            if self._is_first_step:
                self._finish_first_step(optimizer)
            self._note_step(optimizer)
            self._is_first_step = False
            self.steps += 1
            self._versions = self._weight_versions()
            self._note_end()
            self._begin_step()
            self._written = None
            if self._keeps_state:
                # A loop that saves a checkpoint now, and is killed in its next step, goes on here.
                self._write_rows()
                state = self._present_state()
                self.folder.write_state(self.steps, state)
                self._written = state.digest(), state.buffers

    def _note_end(self) -> None:
        """Note of the network after a step what tells whether a replay comes to it.

        The loop may put other weights into it, and estimate other statistics of batch norm.
        """
        if self._smallest is None:
            self._smallest = min(self._learned.values(), key=Tensor.numel)
        self._smallest_after_step = self._smallest.detach().clone()
        with torch.no_grad():
            self._norms_after_step = torch._foreach_norm([*self._learned.values()])
        buffers = dict(self.model.named_buffers())
        self._buffers_after_step = {
            name: buffers[name].detach().clone() for name in self._moving_buffers if name in buffers
        }

    @property
    def _is_active(self) -> bool:
        """Whether calls and steps are those of a loop that is followed."""
        return not self.ended_by and not self._is_comparing

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Refuse a loop in its first step where this block fails; later, end the recording alone.

        Hooks stay until the end of the context, and do nothing from then on: PyTorch may be going
        through them now.
        """
        try:
            yield
        except Exception as error:
            if not self._is_first_step:
                self._stop(reason_of(error))
                return
            self.ended_by = reason_of(error)
            raise

    # ------------------------------------------------------------------------------- the first step

    def _parts_in_training(self) -> list[str]:
        """Return the names of the parts that train; the list of the call before if it is equal."""
        modes = [part.training for part in self._parts]
        if modes != self._modes:
            self._modes = modes
            self._parts_now = parts_in_training(self.model)
        return self._parts_now

    def _look_at_autocast(self, call: SeenCall) -> None:
        """Note in what type the products of a call are taken.

        A Trainer may begin autocast within the call of the network, so that only a part sees it.
        """

        note_autocast(call, self._device.type, self.model, ())
        look = RecordingHook(partial(note_autocast, call, self._device.type))
        for part in self.model.modules():
            is_leaf = next(part.children(), None) is None
            if is_leaf and part is not self.model:
                hook = part.register_forward_pre_hook(look)
                self._looks.callback(hook.remove)

    def _refuse_written_weights(self) -> None:
        """Refuse a network whose forward writes to its own weights, in a call of the first step."""
        written: list[str] = []
        parameters = self.model.named_parameters()
        for (name, p), version in zip(parameters, self._versions, strict=True):
            if p._version != version:
                written.append(name)
        if self._has_values_before_call:
            # What is written past the version is seen in the values.
            for name, value_before in self._params.items():
                if not torch.equal(self.model.get_parameter(name), value_before):
                    written.append(name)
        refuse_written("record", [*dict.fromkeys(written)])

    def _read_data(self, batch: Batch) -> None:
        """Learn the form of the calls, and read the data set once where there is one."""
        refuse_other_rows(batch)
        self._form = CallForm.of(batch)
        if self.train is not None:
            first = next(self.model.parameters())
            examples = examples_of(self.train, "train", first, each_once=False)
            self._data = Data(examples, self.problem, self._form)
            self._in_data = NumbersInData(self._data)
            self._in_data.warn_of_equal_examples()
            return
        self._by_sight = NumbersBySight()
        reads_inputs_alone = type(self.problem).student_input is not EqualWeights.student_input
        has_labels = self._form.has_labels or self.problem.inputs_have_labels
        if not has_labels and not reads_inputs_alone:
            raise MetaplError(
                "record: the network is called without labels, so that the loss of an example is "
                "not known; expected train= with (inputs, labels) or the loop's data set."
            )

    def _examples_of(self, batch: Batch) -> Tensor | SeenRows:
        """Return digests of the rows of a batch, or rows that are known by sight."""
        if self._by_sight is not None:
            return self._by_sight.look_at(batch)
        assert self._form is not None, "the form is known since the first call"
        inputs = batch
        if self._form.keys is not None:
            inputs = {key: batch[key] for key in self._form.keys}
        return row_digests(inputs, ignores_padding=True)

    def _numbers_of(self, examples: Tensor) -> Tensor:
        """Return the numbers of examples in the data set, or refuse what is none of them."""
        if self._in_data is None:
            return examples
        numbers = self._in_data.find(examples).cpu()
        refuse_unknown(numbers)
        return numbers

    def _finish_first_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Compare the problem's loss with the loop's, and write what is recorded."""
        if not self._calls:
            raise MetaplError(NO_CALL)
        self._training_parts = self._calls[0].training_parts
        self._autocast = self._calls[0].autocast
        if self._autocast == torch.float16:
            raise MetaplError(
                "record: the loop trains in float16, whose scaled steps have no derivative here; "
                "expected bfloat16 or float32."
            )
        refuse_clipping(self._watch, optimizer)
        network = RecordedNetwork(self.model, self.problem, self._autocast)
        buffers_after = self._current_buffers()
        # Batch norm may be in evaluation in this step, and not in later ones.
        statistics = names_of_statistics(self.model)
        self._moving_buffers = tuple(
            name
            for name, b in self._buffers.items()
            if name in statistics or not torch.equal(b, buffers_after[name])
        )
        step = self._seen_step()
        factor, counts_examples = self._compare(partial(compared_factor, step, network))
        self._network = network
        self._compared_step = self.steps
        self._factor = factor
        self._first_sizes = step.sizes
        description = {
            **self._description(optimizer, network),
            # Those that the comparison has seen, too.
            "types": sorted(map(str, network.types)),
            "factor": factor,
            "counts_examples": counts_examples,
            "first_sizes": [*step.sizes],
        }
        if not self.resumes:
            self.folder.write_description(description)
            # One that has lost its states may have left other files.
            self.folder.cut(self.steps)
            return
        from metapl.attribution.recording.resumed import refuse_other_loop

        recorded = self.folder.read_description()
        refuse_other_loop(recorded, description, self.folder)
        # The rows say of a call where it differs from the first one of all.
        self._training_parts = recorded["training_parts"]
        self._factor = recorded["factor"]
        self._first_sizes = recorded["first_sizes"]
        self.folder.cut(self.steps)
        self._first_row = self.steps

    def _seen_step(self) -> SeenStep:
        """Return what was seen of the step under way, which has just been taken."""
        calls = self._seen_calls()
        return SeenStep(
            state=self._state(self._params, self._optimizer_state or {}, self._buffers),
            calls=calls,
            loss=sum_of(self._watch.losses),
            loss_types={loss.dtype for loss in self._watch.losses},
            clip_norm=self._norm(),
            gradients={
                name: p.grad.detach().clone()
                for name, p in trainable(self.model).items()
                if p.grad is not None
            },
            sizes=[self.problem.batch_weight(call.batch) for call in calls],
        )

    def _seen_calls(self) -> list[Call]:
        """Return the calls of the step under way, with the examples as the problem reads them."""
        calls: list[Call] = []
        for seen_call in self._calls:
            if self._data is not None:
                batch = self._data.batch(self._numbers_of(seen_call.numbers()))
            else:
                assert self._form is not None, "the form is known since the first call"
                batch = self.problem.labeled_batch(
                    self._form.selected(seen_call.batch), "the call of the network"
                )
            calls.append(Call(batch, seen_call.random_state, frozenset(seen_call.training_parts)))
            seen_call.batch = None
        return calls

    @one_at_a_time
    def _compare(self, compare: Callable[[], Compared]) -> Compared:
        """Return what ``compare()`` returns, and follow none of its calls of the network."""
        self._is_comparing = True
        try:
            with torch.enable_grad():
                return compare()
        finally:
            self._is_comparing = False

    def _compare_again(self) -> None:
        """Refuse the step under way where its gradient is not that of the problem's losses.

        The recording then ends with the last kept state: the steps since may differ too.
        """
        assert self._network is not None, "it was compared in the first step"
        self._compared_step = self.steps
        step = self._seen_step()
        gap = self._compare(
            partial(
                gap_of_later_step,
                step,
                self._network,
                factor=self._factor,
                first_sizes=self._first_sizes,
            )
        )
        if gap > tolerance_of_replay(self._network):
            self._first_row = self.steps - self.states_every
            self.folder.cut(self._first_row)
            raise MetaplError(
                f"in step {self.steps} p.grad differs from the gradient of the mean of "
                f"{kind_of(self.problem)}'s losses by {gap:.2g} of its size; expected gradients "
                "that begin at zero, and the factor of the first step (a sum of class weights that "
                "a loss divides by belongs into inner_loss)"
            )

    def _description(
        self, optimizer: torch.optim.Optimizer, network: RecordedNetwork
    ) -> dict[str, Any]:
        """Return what was recorded, as plain values."""
        assert self._form is not None, "the form is known since the first call"
        names = {id(p): name for name, p in trainable(self.model).items()}
        groups = []
        for group in optimizer.param_groups:
            groups.append([names[id(p)] for p in group["params"] if id(p) in names])
        digests = None if self._in_data is None else self._in_data.of_all
        keys = None if self._form.keys is None else [*self._form.keys]
        return {
            "torch": str(torch.__version__),
            "device": self._device.type,
            "network": type(self.model).__qualname__,
            "weights": {name: shape_of(p) for name, p in trainable(self.model).items()},
            "fixed": network.fixed_digest(self._moving_buffers),
            "training_parts": self._training_parts,
            "autocast": None if self._autocast is None else str(self._autocast),
            "optimizer": type(optimizer).__name__,
            "groups": groups,
            "problem": kind_of(self.problem),
            "fields of the problem": {
                name: value
                for name, value in vars(self.problem).items()
                if isinstance(value, bool | int | float | str)
            },
            "keys": keys,
            "has_labels": self._form.has_labels,
            "constants": dict(self._form.constants),
            "states_every": self.states_every,
            "examples": digests,
        }

    # ------------------------------------------------------------------------------------ each step

    def _note_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note a step; where its state is kept, write it and what was noted before it."""
        refuse_clipping(self._watch, optimizer)
        if not self._calls:
            raise MetaplError(NO_CALL)
        if self._is_compared and not self._is_first_step:
            self._compare_again()
        if self._keeps_state:
            assert self._optimizer_state is not None, "it was read before the step"
            state = self._state(self._params, self._optimizer_state, self._buffers)
            # The loop may have changed something between two steps.
            if self._written is None or not is_same_state(state, *self._written):
                self.folder.write_state(self.steps, state)
        self._rows.append(
            SeenRow(
                calls=self._calls,
                losses=self._watch.losses,
                clip_norm=self._norm(),
                options=self._options,
                without_gradient=[name for name, p in self._learned.items() if p.grad is None],
            )
        )

    def _write_rows(self) -> None:
        """Write the rows that are not written yet, and the examples in them."""
        if not self._rows:
            return
        examples: list[Tensor] = []
        for row in self._rows:
            examples += [call.numbers() for call in row.calls]
        numbers = iter(self._numbers_of(torch.cat(examples)).split([*map(len, examples)]))
        rows: list[StepRow] = []
        for row in self._rows:
            rows.append(
                StepRow(
                    numbers=[next(numbers) for _ in row.calls],
                    draws=[call.draws() for call in row.calls],
                    training_parts=[self._other_parts(call) for call in row.calls],
                    loss=sum_of(row.losses),
                    clip_norm=row.clip_norm,
                    options=row.options,
                    without_gradient=row.without_gradient,
                )
            )
        if self._by_sight is not None:
            if self._by_sight.bytes > self.max_bytes:
                raise MetaplError(
                    f"its examples take {self._by_sight.bytes:,} bytes; expected max_bytes= of "
                    "more, or train= with the data set"
                )
            self.folder.write_examples(self._first_row, *self._by_sight.take_new_rows())
        self.folder.write_steps(self._first_row, rows)
        self._first_row += len(rows)
        self._rows = []

    def _other_parts(self, call: SeenCall) -> list[str] | None:
        """Return which parts trained in a call, or None where they are those of the first call."""
        is_usual = call.training_parts == self._training_parts
        return None if is_usual else call.training_parts

    def _norm(self) -> float | None:
        """Return the norm that the gradient is clipped to."""
        return self._watch.clip_norm if self.clip_norm is None else self.clip_norm

    def _is_followed(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether an optimizer is that of the network."""
        if self.optimizer is None:
            weights = {id(p) for p in self.model.parameters()}
            if not any(id(p) in weights for p in parameters_of(optimizer)):
                return False
            self.optimizer = optimizer
        return optimizer is self.optimizer

    def _refuse_step_of_another(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse a step of the network's weights by another optimizer than the one of before.

        One that wraps that one steps too, and has moved nothing since.
        """
        weights = {id(p) for p in self._weights}
        if self._is_first_step or not any(id(p) in weights for p in parameters_of(optimizer)):
            return
        if self._weight_versions() != self._versions:
            raise MetaplError(
                f"another optimizer, of type {type(optimizer).__name__}, steps over the network's "
                "weights, as where a loop makes a new one for each epoch; expected one optimizer "
                "in all steps, whose settings may change"
            )

    def _current_params(self) -> dict[str, Tensor]:
        """Return copies of the weights, by name."""
        return {name: p.detach().clone() for name, p in trainable(self.model).items()}

    def _current_buffers(self) -> dict[str, Tensor]:
        """Return copies of the buffers, by name."""
        return {name: b.detach().clone() for name, b in self.model.named_buffers()}

    def _weight_versions(self) -> list[int]:
        """Return a number of each weight that changes when it is written to."""
        return [p._version for p in self._weights]


def is_same_state(state: KeptState, digest: Tensor, buffers: Tree) -> bool:
    """Return whether a state has this digest and these buffers."""
    has_buffers = all(torch.equal(b, buffers[name]) for name, b in state.buffers.items())
    return has_buffers and torch.equal(state.digest(), digest)


def note_autocast(call: SeenCall, device_type: str, part: nn.Module, args: Any) -> None:
    """Note in what type products are taken where a part of the network is called."""
    if torch.is_autocast_enabled(device_type):
        call.autocast = torch.get_autocast_dtype(device_type)


def note_reached(watch: StepWatch, call: SeenCall, gradients: Any) -> None:
    """Note that a backward pass has come to the outputs of a call, as a hook of their node."""
    watch.has_reached_call = True
    call.is_reached = True
    call.is_backpropagated |= watch.is_in_backward


def calls_that_count(calls: Sequence[SeenCall]) -> list[SeenCall]:
    """Return the calls of a step that its gradient comes from.

    Derivatives in the inputs, for a picture of what the network looks at, are taken by
    ``torch.autograd.grad`` beside ``backward``. A loop without ``backward`` takes all of them so.
    """
    backpropagated = [call for call in calls if call.is_backpropagated]
    return backpropagated or [call for call in calls if call.is_reached]


def sum_of(losses: list[Tensor]) -> float:
    """Return the sum of the losses that were backpropagated in a step; NaN where none was seen."""
    return float(torch.stack(losses).sum()) if losses else math.nan


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the options of the param groups that a rule may read, as plain values."""
    settings: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        of_group: dict[str, Any] = {}
        for name, value in group.items():
            if name in NO_SETTINGS:
                continue
            if isinstance(value, Tensor):
                value = value.detach().clone()
            elif isinstance(value, float):
                # A scheduler may leave a number of NumPy.
                value = float(value)
            of_group[name] = value
        settings.append(of_group)
    return settings


def shape_of(p: Tensor) -> list[Any]:
    """Return the shape and the type of a weight, by which a network is known again."""
    return [list(p.shape), str(p.dtype)]
