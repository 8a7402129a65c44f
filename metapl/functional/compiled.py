"""The pure step of a trainer, and that step as one compiled graph.

The pure step is :meth:`metapl.BilevelTrainer.functional`, the compiled one ``compile=True``. That
one reads the tensors where modules and optimizers hold them, runs its graph, and copies what comes
out back. The first step of each kind is compared with the eager one, taken by a copy of the
trainer; what cannot be captured is refused there.

Three parts share the work. :class:`Compiled` is a graph and what it was made for.
:class:`LiveState` is the trainer's tensors as the state of a pure step. :func:`refuse_other`
compares a step with the eager one. :class:`CompiledStep` has a cache of the first, and takes the
steps.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import attrgetter, is_
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from torch.utils import _pytree as pytree

from metapl.core.lookahead import InnerBatches, Lookahead
from metapl.data.held_values import names_written, numbers_of
from metapl.errors import MetaplError, few
from metapl.execution import checks
from metapl.execution.batch import Batch, length
from metapl.execution.checks import Fault
from metapl.execution.compare import TRIES
from metapl.execution.layout import refuse_compiled
from metapl.execution.numerics import as_real
from metapl.execution.state import (
    RandomState,
    all_with_contents_of,
    branching_to,
    replayed,
    trainable,
)
from metapl.feedback.report import StepReport
from metapl.functional.capture import (
    ATTRIBUTES_OF_ALL_MODULES,
    DROWNED,
    NUDGES,
    At,
    Capture,
    Captured,
    Capturing,
    Constants,
    Held,
    at_places,
    copy_with_strides,
    is_equal,
    rows_repeated,
    with_other_digits,
)
from metapl.functional.cuda_graphs import StepByGraphs
from metapl.functional.state import (
    Network,
    Optimizer,
    Report,
    State,
    clipped,
    constants_of,
    leaves_of,
    norm,
    number_on,
    settings_of,
    state_of,
    unclipped,
    with_fields,
)
from metapl.functional.step import StateStep, Step, StepRules
from metapl.problems.base import Signal, gumbel, kind_of, modules_in
from metapl.problems.losses import TeacherLoss
from metapl.protocols import TwoLevelTrainer
from metapl.updates import (
    TorchUpdate,
    Update,
    parts_of,
    rounded_options,
    update_of,
)
from metapl.updates.base import OptimizerState

NOTHING: AbstractContextManager[None] = nullcontext()

# How many steps are unrolled in one function at most.
LONGEST = 3


class Updates(NamedTuple):
    """The rules of the two optimizers of a trainer, each behind its clip, if there is one."""

    inner: Update
    outer: Update | None


def updates_of(trainer: TwoLevelTrainer) -> Updates:
    """Return the rules of a trainer's optimizers for the parameters that are trained now."""
    inner = trainer.update
    if trainer.teacher is None:
        return Updates(inner, None)
    outer = update_of(trainer.outer_optimizer, trainable(trainer.teacher), name="outer_optimizer")
    return Updates(inner, clipped(outer, trainer.clip_norm))


def step_of(trainer: TwoLevelTrainer, steps: int, updates: Updates) -> Step:
    """Return the step of a trainer that looks so many steps ahead, as a function of tensors.

    Raises: :class:`metapl.MetaplError` for what has no pure step.
    """
    refuse_compiled("student", trainer.student)
    refuse_compiled("teacher", trainer.teacher)
    inner = unclipped(updates.inner)
    if reason := why_not_pure(trainer, steps, inner):
        raise MetaplError(f"compile= or functional() was given {reason}.")

    losses_for: Callable[[Batch], Sequence[TeacherLoss]] = trainer.problem.default_teacher_losses
    if trainer.teacher_losses is not None:
        losses_for = for_every_batch(trainer.teacher_losses)
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    if trainer.precision != "float32":
        # Without the cache, which would keep casts of tensors inside a transform.
        autocast = partial(torch.autocast, trainer.device.type, torch.bfloat16, cache_enabled=False)
    return StateStep(
        StepRules(
            teacher=trainer.teacher_layout,
            student=trainer.layout,
            problem=trainer.problem,
            mode=trainer.mode,
            inner_update=updates.inner,
            outer_update=updates.outer,
            inner_constants=constants_of(inner),
            outer_constants=rounded_options(constants_of(unclipped(updates.outer))),
            losses_for=losses_for,
            steps=steps,
            feedback_size=trainer.feedback_size,
            direct_term=trainer.direct_term,
            device=trainer.device,
            autocast=autocast,
        ),
        sources_of(trainer),
    )


def for_every_batch(losses: Sequence[TeacherLoss]) -> Callable[[Batch], Sequence[TeacherLoss]]:
    """Return a function of a batch that returns the same losses for all of them."""
    return lambda batch: losses


def why_not_pure(trainer: TwoLevelTrainer, steps: int, inner: Update) -> str:
    """Return what of a trainer has no pure step, and what is expected instead; "" for nothing.

    Args:
        steps: how many the trainer looks ahead.
        inner: the rule of the student's optimizer, without its clip.
    """
    mode = trainer.mode
    is_alone = trainer.layout.kind == "plain" and trainer.ranks.alone
    if not mode.is_pure:
        name = type(mode).__name__
        return f"mode {name}, of the eager road alone; expected another, or is_pure = True in it"
    if mode.takes_outer_losses and trainer.precision != "float32":
        # Its outer losses run as one vmapped pass, in which autocast leaves biases in float32.
        return f'{mode.name} with precision="{trainer.precision}"; expected "float32"'
    if trainer.accumulate > 1:
        return f"accumulate={trainer.accumulate}; expected 1"
    if not is_alone:
        return "networks of several processes; expected one process"
    if steps > LONGEST:
        return f"{steps} steps ahead; expected at most {LONGEST}"
    if not isinstance(inner, TorchUpdate) and has_hidden_state(inner):
        return "a transform with hidden state; expected torch.optim's"
    return ""


def has_hidden_state(update: Update) -> bool:
    """Return whether a second call of an update with the same state gives another result."""
    weights = {name: p.detach() for name, p in update.parameters.items()}
    gradients = weights
    first, _ = update.update(weights, gradients, update.read_state())
    second, _ = update.update(weights, gradients, update.read_state())
    return not all(torch.equal(t, second[name]) for name, t in first.items())


def functional(trainer: TwoLevelTrainer) -> tuple[Step, State]:
    """Return the pure step of a trainer, and a copy of its state."""
    updates = updates_of(trainer)
    step = step_of(trainer, trainer.lookahead, updates)
    return step, pytree.tree_map_only(Tensor, Tensor.clone, state_of(trainer, updates))


class Moved(NamedTuple):
    """What a step by a graph leaves.

    Attributes:
        leaves: the tensors of networks and optimizers after it, as :func:`leaves_of` orders them;
            None: the step has written them into those that it was given.
        mode: the next state of the estimator.
        step: the number of the next step.
        flag: as of the report.
        report: makes the report.
        state: makes the whole state of these.
        start: the generators before the step, where the graph was made for it; else None.
    """

    leaves: list[Tensor] | None
    mode: dict[str, Tensor]
    step: Tensor
    flag: Tensor
    report: Callable[[], Report]
    state: Callable[[], State]
    start: RandomState | None


def moved_by_graphs(
    by_graphs: StepByGraphs,
    live: LiveState,
    outer: Batch,
    inner: Batch,
    noise: Any,
    *,
    on_copies: bool,
) -> Moved:
    """Return what a step by CUDA graphs leaves, which never writes into what it is given."""
    recordings = by_graphs.recordings_made
    start = RandomState.now(by_graphs.device)
    with torch.no_grad():
        moved, report = by_graphs(live.state, outer, inner, noise)
    is_first = by_graphs.recordings_made > recordings
    return Moved(
        leaves=leaves_of(moved),
        mode=moved.mode,
        step=moved.step,
        flag=report.flag,
        report=partial(at_places, report, ()),
        state=lambda: moved,
        start=start if is_first else None,
    )


class CapturedStep:
    """A step as compiled graphs, which write into the tensors that they are given.

    A step that is off writes nothing. Neither does the first one of a graph, whose results are to
    be compared.

    Args:
        sources: objects whose attributes the step reads: modules, the problem, losses and the mode.
    """

    def __init__(self, step: Step, device: torch.device, sources: Sequence[Any]) -> None:
        self.step = step
        self.captured = Captured(self._on_parts, device, sources)
        # Of the last graph, where its results have the parts of what a step leaves.
        self._capture: Capture | None = None
        self._leaves: list[Any] = []
        self._writes = False
        self._mode: dict[str, Any] = {}
        self._number: Any = 0
        self._flag: Any = 0
        # Nested places among the report's tensors alone, so that a report holds no weights.
        self._report: Any = None
        self._report_places: list[int] = []

    # A compiled graph runs without a graph of autograd by itself.
    @torch.no_grad()
    def _on_parts(
        self,
        held: tuple[Network, Network, OptimizerState, OptimizerState, Constants],
        numbers: Tensor,
        mode: dict[str, Tensor],
        number: Tensor,
        *batches: Any,
    ) -> tuple[State, Report]:
        """Take the step from the parts of a state, and write what it leaves into them.

        Returns: the state after it, whose settings are left out where it was written, and the
        report.
        """
        teacher, student, inner_state, outer_state, structure = held
        inner, outer = pytree.tree_unflatten([*numbers.unbind()], structure.value)
        state = State(
            teacher,
            student,
            inner=Optimizer(inner_state, inner),
            outer=Optimizer(outer_state, outer),
            mode=mode,
            step=number,
        )
        moved, report = self.step(state, *batches)
        tensors, moved_tensors = leaves_of(state), leaves_of(moved)
        if len(tensors) == len(moved_tensors):
            is_right = report.flag == 0
            for t, moved_t in zip(tensors, moved_tensors, strict=True):
                t.copy_(torch.where(is_right, moved_t, t))
            moved = with_fields(
                state,
                inner=Optimizer(inner_state, []),
                outer=Optimizer(outer_state, []),
                mode=moved.mode,
                step=moved.step,
            )
        return moved, report

    def __call__(
        self, live: LiveState, outer: Batch, inner: Batch, noise: Any, *, on_copies: bool
    ) -> Moved:
        """Return what the step leaves.

        Args:
            on_copies: write into copies of the live tensors.
        """
        state = live.state
        captures = self.captured.captures
        capture, tensors = self.captured.find(
            live.held(), live.numbers(), state.mode, state.step, outer, inner, noise
        )
        is_first = self.captured.captures > captures
        # Recording moves no generator.
        start = RandomState.now(self.captured.device) if is_first else None
        on_copies = on_copies or is_first
        if on_copies:
            tensors = [*map(copy_with_strides, tensors)]
        results = self.captured.replay(capture, tensors)
        if capture is not self._capture:
            self._find_places(capture)
        is_written = self._writes and not on_copies
        get = results.__getitem__
        return Moved(
            leaves=None if is_written else [*map(get, self._leaves)],
            mode={name: results[place] for name, place in self._mode.items()},
            step=results[self._number],
            flag=results[self._flag],
            report=partial(at_places, self._report, [*map(get, self._report_places)]),
            state=lambda: at_places(capture.results, results)[0],
            start=start,
        )

    def _find_places(self, capture: Capture) -> None:
        """Note where a graph's results have the parts of what a step leaves."""
        moved, report = capture.results
        self._capture = capture
        self._leaves = leaves_of(moved)
        self._writes = all(capture.places[place] < capture.given for place in self._leaves)
        self._mode = moved.mode
        self._number = moved.step
        self._flag = report.flag
        places = self._report_places = []

        def renumbered(place: At) -> At:
            places.append(place)
            return At(len(places) - 1)

        self._report = pytree.tree_map_only(At, renumbered, report)


@dataclass
class Compiled:
    """A step as one graph, and what it was made for.

    Attributes:
        key: what the graph was made for, by which the cache finds it.
        alive: the objects whose addresses are in the key. They are held here, so that no other
            object can get one of these addresses.
        updates: the rules of the optimizers.
        run: the graph, as a function of the live state, the batches and the noise.
        takes_outer_loss: whether the eager step has taken L(θ′).
        probs: class probabilities of the eager step, (B, C), which tell the type and the number of
            classes of noise for drawn labels; None where the signal has none.
        is_compared: whether a step that moves the student was compared with the eager one.
        tries_left: how many further steps are compared again whose difference rounding drowns.
        draws: whether a graph draws from the default generators.
        direct_term: that of the trainer, which looks through all parameters of the teacher.
    """

    key: tuple[object, ...]
    alive: tuple[object, ...]
    updates: Updates
    run: Callable[..., Moved]
    direct_term: Literal["", "included", "left out"]
    probs: Tensor | None = None
    takes_outer_loss: bool = False
    is_compared: bool = False
    tries_left: int = TRIES
    draws: bool = False


class LiveState:
    """The tensors that a trainer's modules and optimizers hold, as the state of a pure step.

    It is read from the modules once. Later steps go on with the same tensors, as long as
    :meth:`is_of` says that they are still the trainer's.

    Attributes:
        state: what the next step is given.
    """

    def __init__(self, trainer: TwoLevelTrainer, updates: Updates) -> None:
        self.updates = updates
        self.state = state_of(trainer, updates)
        if trainer.compile == "cudagraphs":
            self.state = with_counts_on_device(self.state, trainer.device)
        # The settings of param groups that the tensors in the state were made of.
        self._settings = [settings_by_group(update) for update in updates]
        # The optimizers, and what their param groups held when the settings were read; None where
        # a setting may change in place.
        self._optimizers = [unclipped(update).optimizer for update in updates if update is not None]
        self._group_contents = self._fixed_contents()
        self._has_same_contents = True
        self._held: Held | None = None
        self._numbers: Tensor | None = None
        # Whose weights these groups have, and what in them is a constant of the graph.
        self._group_weights = weights_of_groups(self._optimizers)
        self._group_constants = constants_of_groups(self._optimizers)
        # The number of the next step, and the tensor of it that the last one has made.
        self._next_number = -1
        self._next_step: Tensor = self.state.step
        # Filled by adopt: the tensors of the state, the tables in which modules and optimizers
        # hold some of them, with what these held, and what else the trainer is recognized by.
        self._tensors: list[Tensor] = []
        self._tables: list[dict[Any, Any]] = []
        self._empty_tables: list[dict[Any, Any]] = []
        self._table_values: list[object] = []
        self._weights: list[Tensor] = []
        self._addresses: list[int] = []
        self._parts: list[object] = []
        self._settings_of_step: tuple[object, ...] = ()
        # The modules that the problem holds, and their modes.
        self._held_modules: list[nn.Module] = []
        self._held_modes: list[bool] = []

    def held(self) -> Held:
        """Return the tensors of networks and optimizers, taken apart until they are others."""
        if self._held is None:
            state = self.state
            _, structure = pytree.tree_flatten((state.inner.settings, state.outer.settings))
            optimizers = (state.inner.state, state.outer.state)
            constants = Constants([structure], structure)
            self._held = Held.of((state.teacher, state.student, *optimizers, constants))
        return self._held

    def numbers(self) -> Tensor:
        """Return the settings of both optimizers as one vector.

        A graph takes longer to be given each number by itself.
        """
        if self._numbers is None:
            settings = self.state.inner.settings, self.state.outer.settings
            self._numbers = torch.stack([t.reshape(()) for t in pytree.tree_leaves(settings)])
        return self._numbers

    def is_of(self, trainer: TwoLevelTrainer, steps: int) -> bool:
        """Return whether the trainer still holds these tensors, and takes the same step.

        Every step asks this of hundreds of tensors, so the loops over them run in C.
        """
        return (
            settings_of_step(trainer, steps) == self._settings_of_step
            and [*map(_is_training, self._held_modules)] == self._held_modes
            and are_the_same(parts_of_step(trainer), self._parts)
            and self._has_same_groups()
            and not any(self._empty_tables)
            and are_the_same(values_of_tables(self._tables), self._table_values)
            and [*map(Tensor.data_ptr, self._weights)] == self._addresses
        )

    def refresh(self, trainer: TwoLevelTrainer) -> None:
        """Take over what changes between steps outside of the tensors that are held.

        These are settings of optimizers, the state of the mode, and the number of the step.
        """
        if not self._has_same_contents:
            self._group_contents = self._fixed_contents()
            self._refresh_settings(trainer)
        step = self._next_step
        if trainer.steps_done != self._next_number:
            step = number_on(trainer.device, trainer.steps_done, torch.int64)
        mode = {name: t.to(trainer.device) for name, t in trainer.mode_state.items()}
        self.state = State(*self.state[:4], mode, step)

    def _has_same_groups(self) -> bool:
        """Return whether param groups have the weights and the constants that the graph has."""
        expected = self._group_contents
        self._has_same_contents = expected is not None and are_the_same(
            contents_of_groups(self._optimizers), expected
        )
        return self._has_same_contents or (
            weights_of_groups(self._optimizers) == self._group_weights
            and constants_of_groups(self._optimizers) == self._group_constants
        )

    def _fixed_contents(self) -> list[object] | None:
        """Return what param groups hold; None where a setting of them may change in place."""
        if have_fixed_settings(self._optimizers):
            return contents_of_groups(self._optimizers)
        return None

    def _refresh_settings(self, trainer: TwoLevelTrainer) -> None:
        """Make tensors of the settings whose numbers have changed."""
        settings = [settings_by_group(update) for update in self.updates]
        if settings != self._settings:
            self._numbers = None
            optimizers = self.state.inner, self.state.outer
            pairs = zip(optimizers, self._settings, settings, strict=True)
            for optimizer, old_settings, new_settings in pairs:
                groups = zip(optimizer.settings, old_settings, new_settings, strict=True)
                optimizer.settings[:] = [
                    changed_settings(*group, device=trainer.device) for group in groups
                ]
            self._settings = settings

    def adopt(self, trainer: TwoLevelTrainer, moved: State, steps: int) -> None:
        """Let the optimizers hold the tensors that a first step has made.

        From then on :meth:`is_of` knows whose tensors these are.
        """
        tables: list[dict[Any, Any]] = []
        for slots in trainer.slots:
            tables += slots.buffers
        pairs = (self.state.inner, moved.inner), (self.state.outer, moved.outer)
        for update, (optimizer, optimizer_after) in zip(self.updates, pairs, strict=True):
            rule = unclipped(update)
            for name, tensors in optimizer.state.items():
                for key, t in optimizer_after.state[name].items():
                    if key not in tensors:
                        tensors[key] = torch.empty_like(t)
                rule.owner[name].state[rule.parameters[name]].update(tensors)
            if rule is not None:
                for part in parts_of(rule.optimizer):
                    tables += [part.state, *part.state.values()]
        # The optimizers may hold more than before.
        self._held = None
        # They are empty: a step with hooks is refused.
        tables += hooks_of_optimizers(trainer)
        self._tables = [table for table in tables if table]
        self._empty_tables = [table for table in tables if not table]
        self._table_values = values_of_tables(self._tables)
        self._tensors = leaves_of(self.state)
        self._weights = tensors_of_networks(trainer)
        self._addresses = [*map(Tensor.data_ptr, self._weights)]
        self._parts = parts_of_step(trainer)
        self._settings_of_step = settings_of_step(trainer, steps)
        self._held_modules = modules_in(trainer.problem)
        self._held_modes = [*map(_is_training, self._held_modules)]

    def write(self, moved: Moved, *, next_number: int) -> None:
        """Copy what a step leaves into the tensors.

        Args:
            next_number: that of the step that begins with this state.
        """
        if moved.leaves is not None:
            torch._foreach_copy_(self._tensors, moved.leaves)
        self._next_number = next_number
        self._next_step = moved.step


# Readers of attributes that map() calls without a frame of Python for each.
_is_training = attrgetter("training")
_options_of_step = attrgetter(
    "feedback_weight", "feedback_ratio", "feedback_bound", "clip_norm", "precision"
)


def settings_of_step(trainer: TwoLevelTrainer, steps: int) -> tuple[object, ...]:
    """Return what a step is besides its parts: settings of the trainer."""
    return (steps, *_options_of_step(trainer))


def hooks_of_optimizers(trainer: TwoLevelTrainer) -> list[dict[Any, Any]]:
    """Return the tables of hooks on the steps of a trainer's optimizers."""
    tables: list[dict[Any, Any]] = []
    for optimizer in trainer.schedulable:
        for part in parts_of(optimizer):
            tables += [part._optimizer_step_pre_hooks, part._optimizer_step_post_hooks]
    return tables


def parts_of_step(trainer: TwoLevelTrainer) -> list[object]:
    """Return the objects that a trainer's step is made of.

    A step with other ones is another step. Networks are among them as they are held now.
    """
    parts: list[object] = [
        *trainer.slots,
        trainer.mode,
        trainer.problem,
        trainer.teacher_losses,
        *(trainer.teacher_losses or ()),
    ]
    for optimizer in trainer.optimizers.values():
        for part in parts_of(optimizer):
            parts += (part, part.state)
    return parts


def values_of_tables(tables: Sequence[dict[Any, Any]]) -> list[object]:
    """Return the values that tables hold, in order."""
    return [*chain.from_iterable(map(dict.values, tables))]


def with_counts_on_device(state: State, device: torch.device) -> State:
    """Return a state whose optimizers have all their tensors on the device.

    ``torch.optim`` counts steps on the host, where a graph would read each count once. From the
    first step by graphs on it holds these counts on the device.
    """
    optimizers = []
    for optimizer in (state.inner, state.outer):
        tensors = pytree.tree_map_only(Tensor, lambda t: t.to(device), optimizer.state)
        optimizers.append(with_fields(optimizer, state=tensors))
    inner, outer = optimizers
    return with_fields(state, inner=inner, outer=outer)


def groups_of(optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """Return the param groups of optimizers, in order."""
    return [*chain.from_iterable([optimizer.param_groups for optimizer in optimizers])]


def contents_of_groups(optimizers: Sequence[torch.optim.Optimizer]) -> list[object]:
    """Return what the param groups of optimizers hold, in order, and their weights."""
    contents: list[object] = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            contents += group.values()
            contents += group["params"]
    return contents


def weights_of_groups(optimizers: Sequence[torch.optim.Optimizer]) -> tuple[tuple[int, ...], ...]:
    """Return the addresses of the weights of each param group."""
    return tuple(tuple(map(id, group["params"])) for group in groups_of(optimizers))


def constants_of_groups(optimizers: Sequence[torch.optim.Optimizer]) -> tuple[object, ...]:
    """Return what of param groups is a constant of a graph: switches such as ``maximize``."""
    constants: list[object] = []
    for optimizer in optimizers:
        for part in parts_of(optimizer):
            for group in part.param_groups:
                switches = [(name, group.get(name)) for name in part.defaults]
                constants.append(
                    tuple(pair for pair in switches if isinstance(pair[1], bool | str | None))
                )
    return tuple(constants)


def have_fixed_settings(optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Return whether no setting of the optimizers changes in place, as a rate in a tensor does."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, value in group.items():
                parts = value if isinstance(value, tuple) else (value,)
                if name != "params" and not all(type(part) in FIXED for part in parts):
                    return False
    return True


# The types of settings that do not change in place.
FIXED = frozenset([bool, int, float, str, type(None)])


def are_the_same(objects: Sequence[object], expected: Sequence[object]) -> bool:
    """Return whether two lists hold the same objects."""
    return len(objects) == len(expected) and all(map(is_, objects, expected))


def settings_by_group(update: Update | None) -> list[dict[str, Any]]:
    """Return copies of the numbers in the param groups of an update's optimizer.

    None of no update. A list, or a tensor in a tuple, may change in place.
    """
    return [] if update is None else copy.deepcopy(unclipped(update).settings())


def changed_settings(
    tensors: Mapping[str, Any],
    old: Mapping[str, object],
    new: Mapping[str, object],
    *,
    device: torch.device,
) -> dict[str, Any]:
    """Return the settings of a param group as tensors, the old ones where a number is the same."""
    changed: dict[str, Any] = {}
    for name, number in new.items():
        is_same = old.get(name) == number
        changed[name] = tensors[name] if is_same else settings_of(number, device)
    return changed


class CompiledStep:
    """The compiled steps of one trainer, which every call is given; a copy of it compiles anew."""

    def __init__(self) -> None:
        self._cache: dict[tuple[object, ...], Compiled] = {}
        # Those of the last step. Without live, the next step looks for both anew.
        self._compiled: Compiled | None = None
        self._live: LiveState | None = None

    def __reduce__(self) -> tuple[type[CompiledStep], tuple[()]]:
        return CompiledStep, ()

    def __call__(
        self, trainer: TwoLevelTrainer, outer_batch: Batch, inner_batches: InnerBatches
    ) -> StepReport:
        """Take one step on these batches, and return its report.

        Raises: :class:`metapl.MetaplError` before anything has moved.
        """
        steps = len(inner_batches)
        if self._live is not None and not self._live.is_of(trainer, steps):
            self._live = None
        if self._live is None or self._compiled is None:
            self._compiled = self._find_or_compile(trainer, steps)
        compiled = self._compiled
        eager = self._eager_step(compiled, trainer, outer_batch, inner_batches)

        live = self._live
        if live is None:
            live = LiveState(trainer, compiled.updates)
        else:
            live.refresh(trainer)
        moved, step_report = self._run(
            compiled, live, trainer, outer_batch, inner_batches, eager=eager
        )

        if self._live is None:
            live.adopt(trainer, moved.state(), steps)
            self._cache[compiled.key] = compiled
        live.write(moved, next_number=trainer.steps_done + 1)
        self._live = live
        trainer.mode_state = moved.mode
        trainer.steps_done += 1
        return step_report

    def prepare(
        self, trainer: TwoLevelTrainer, outer_batch: Batch, inner_batches: InnerBatches
    ) -> None:
        """Compile the step and compare it with the eager one, once, and move nothing.

        Steps before the first compiled one call this, so that a step that cannot be compiled is
        refused before anything has moved.

        Raises: :class:`metapl.MetaplError`.
        """
        if self._cache:
            return
        compiled = self._find_or_compile(trainer, len(inner_batches))
        eager = self._eager_step(compiled, trainer, outer_batch, inner_batches)
        live = LiveState(trainer, compiled.updates)
        start = RandomState.now(trainer.device, trainer.generator)
        try:
            self._run(compiled, live, trainer, outer_batch, inner_batches, eager=eager)
        finally:
            start.restore()
        self._cache[compiled.key] = compiled

    def _eager_step(
        self,
        compiled: Compiled,
        trainer: TwoLevelTrainer,
        outer_batch: Batch,
        inner_batches: InnerBatches,
    ) -> Outcome | None:
        """Take the step that a compiled one is compared with by a copy of the trainer.

        Returns: None where it has been compared before.
        """
        if compiled.is_compared:
            return None
        eager = eager_step(trainer, outer_batch, inner_batches)
        compiled.probs = eager.report.signal.probs
        compiled.takes_outer_loss = "outer_loss" in eager.report.scalars
        return eager

    def _run(
        self,
        compiled: Compiled,
        live: LiveState,
        trainer: TwoLevelTrainer,
        outer_batch: Batch,
        inner_batches: InnerBatches,
        *,
        eager: Outcome | None,
    ) -> tuple[Moved, StepReport]:
        """Run the graph, compare what comes out with the eager step, and return it.

        Only random numbers have moved then, and none where it raises.
        """
        start = None
        if eager is not None or compiled.draws or trainer.generator is not None:
            start = RandomState.now(trainer.device, trainer.generator)
        try:
            inner, noise = inner_arguments(inner_batches, compiled.probs, trainer.generator)
            if eager is not None:
                refuse_written(eager)
            with Capturing():
                moved = compiled.run(live, outer_batch, inner, noise, on_copies=eager is not None)
                if moved.start is not None:
                    start = start or moved.start
                    end = RandomState.now(trainer.device, trainer.generator)
                    compiled.draws = compiled.draws or not end.equals(moved.start)
                    if eager is None:
                        # For another shape or number, whose graph is another one.
                        start.restore()
                        eager = eager_step(trainer, outer_batch, inner_batches)
                        refuse_written(eager)
                        end.restore()
                step_report = step_report_of(compiled, trainer, moved, inner_batches)
                is_decided = eager is None or self._compare(
                    compiled,
                    trainer,
                    states=(live.state, Outcome(moved.state(), step_report), eager),
                    take_eager=partial(eager_step, trainer, outer_batch, inner_batches),
                    start=start,
                )
        except BaseException:
            if start is not None:
                start.restore()
            raise
        # A warm-up may begin with a rate of 0, by which h is 0 on both roads: then the next step is
        # compared again, as after one that rounding drowns.
        if eager is not None:
            compiled.is_compared = is_decided and any(rate != 0 for rate in rates_of(trainer))
        return moved, step_report

    def _compare(
        self,
        compiled: Compiled,
        trainer: TwoLevelTrainer,
        *,
        states: tuple[State, Outcome, Outcome],
        take_eager: Callable[[], Outcome],
        start: RandomState | None,
    ) -> bool:
        """Refuse a step that is not the eager one, and return whether it needs no other comparison.

        A fresh Adam divides each gradient by its own size and ε. Where one is about as small as ε,
        which is rounding, it may decide h, and a step at weights that differ in their last digit
        has another h as well. From such a step nothing can be told, and some of the next ones are
        compared too. An eager step that does not repeat itself has a memory, which is no rounding.

        Args:
            states: the one before the step, and those after it and after the eager one.
            take_eager: takes the eager step, by a copy.
            start: the random numbers that the step began with.
        """
        is_reduced = is_recorded_in_half_precision(trainer)
        try:
            refuse_other(*states, is_reduced=is_reduced)
        except MetaplError as error:
            end = RandomState.now(trainer.device, trainer.generator)
            assert start is not None, "it is kept where steps are compared"
            start.restore()
            again = take_eager()
            start.restore()
            with at_other_digits(trainer.student):
                by_rounding = take_eager()
            end.restore()
            before, _, eager = states
            if not is_repeated(before, eager, again):
                raise
            refuse_other(*states, by_rounding=by_rounding, is_reduced=is_reduced)
            if compiled.tries_left == 0:
                warnings.warn(f"cannot tell: {error} {DROWNED}", stacklevel=2)
                return True
            compiled.tries_left -= 1
            return False
        return True

    def _find_or_compile(self, trainer: TwoLevelTrainer, steps: int) -> Compiled:
        """Return the graph for the trainer's step as it is now.

        A new one comes into the cache when it has run without an error.
        """
        networks = networks_of(trainer)
        modules = [part for network in networks for part in network.modules()]
        parameters = [p for network in networks for p in network.parameters()]
        optimizers = trainer.schedulable
        alive = (
            *modules,
            *parameters,
            trainer.mode,
            trainer.problem,
            trainer.teacher_losses,
            *(trainer.teacher_losses or ()),
            *optimizers,
            *chain.from_iterable([group["params"] for group in groups_of(optimizers)]),
        )
        marks = [slots.mark for slots in trainer.slots]
        key = (
            *settings_of_step(trainer, steps),
            *map(_is_training, modules_in(trainer.problem)),
            *map(len, hooks_of_optimizers(trainer)),
            *marks,
            *map(id, alive),
            tuple(name for network in networks for name, _ in network.named_buffers()),
            weights_of_groups(optimizers),
            constants_of_groups(optimizers),
        )
        if key in self._cache:
            # Between then and now the param groups may have been different ones.
            trainer.update.follow(trainable(trainer.student))
            return self._cache[key]
        return compile_step(trainer, steps, key=key, alive=alive)


def rates_of(trainer: TwoLevelTrainer) -> list[Any]:
    """Return the learning rate of each param group of the student's optimizer."""
    return [group["lr"] for group in unclipped(trainer.update).options]


def networks_of(trainer: TwoLevelTrainer) -> list[nn.Module]:
    """Return the student and the teacher of a trainer, which may have no teacher."""
    return [network for network in (trainer.student, trainer.teacher) if network is not None]


def tensors_of_networks(trainer: TwoLevelTrainer) -> list[Tensor]:
    """Return the parameters and buffers of a trainer's networks."""
    networks = networks_of(trainer)
    parameters = [p for network in networks for p in network.parameters()]
    buffers = [b for network in networks for b in network.buffers()]
    return [*parameters, *buffers]


def why_no_graph(trainer: TwoLevelTrainer) -> str:
    """Return what of a trainer no graph captures, though there is a pure step; "" for nothing."""
    tensors = tensors_of_networks(trainer)
    if any(t._backward_hooks or t._post_accumulate_grad_hooks for t in tensors):
        return "a hook on a parameter of the networks"
    if any(hooks_of_optimizers(trainer)):
        return "a hook on an optimizer's step"
    if not isinstance(unclipped(trainer.update), TorchUpdate):
        return "a TorchOpt transform, in the place of torch.optim's"
    return ""


def compile_step(
    trainer: TwoLevelTrainer, steps: int, *, key: tuple[object, ...], alive: tuple[object, ...]
) -> Compiled:
    """Return the trainer's step as one graph, for a key and the objects that are alive in it.

    Raises: :class:`metapl.MetaplError` where no graph can be.
    """
    if reason := why_no_graph(trainer):
        raise MetaplError(f"compile= was given with {reason}; leave compile out.")
    trainer.update.follow(trainable(trainer.student))
    updates = updates_of(trainer)
    step = step_of(trainer, steps, updates)
    run: Callable[..., Moved]
    if trainer.compile == "cudagraphs":
        by_graphs = StepByGraphs(step, trainer.device, sources_of(trainer))
        run = partial(moved_by_graphs, by_graphs)
    else:
        run = CapturedStep(step, trainer.device, sources_of(trainer))
    return Compiled(
        key=key,
        alive=alive,
        updates=updates,
        run=run,
        direct_term=trainer.direct_term,
    )


def sources_of(trainer: TwoLevelTrainer) -> list[object]:
    """Return the objects whose attributes a step of the trainer reads."""
    modules = [part for network in networks_of(trainer) for part in network.modules()]
    losses = trainer.teacher_losses or ()
    held = modules_in(trainer.problem)
    return [*modules, *held, trainer.problem, trainer.mode, *losses]


def inner_arguments(
    inner_batches: InnerBatches, probs: Tensor | None, generator: torch.Generator | None
) -> tuple[Any, Any]:
    """Return the inner batch and its Gumbel noise as a pure step takes them, K of each for K steps.

    The noise is None where no labels are drawn, or where they are drawn from torch's default
    generator.
    """
    noise = None
    if generator is not None and probs is not None:
        classes = probs.shape[1]
        noise = tuple(
            gumbel(length(batch), classes, like=probs, generator=generator)
            for batch in inner_batches
        )
    if len(inner_batches) > 1:
        return tuple(inner_batches), noise
    return inner_batches[0], None if noise is None else noise[0]


def findings_of(report: Report) -> Fault:
    """Return what the checks of a step have found, as a fault that is read later."""
    fault = Fault()
    for texts, found in report.findings.items():
        fault.findings += [(partial(found.select, 0, place), t) for place, t in enumerate(texts)]
    return fault


def step_report_of(
    compiled: Compiled, trainer: TwoLevelTrainer, moved: Moved, inner_batches: InnerBatches
) -> StepReport:
    """Return the report of a pure step as the one that a trainer returns."""
    if not checks.waits(moved.flag) and math.isnan(moved.flag):
        raise MetaplError(findings_of(moved.report()).found())
    fields = partial(
        fields_of_report,
        moved.report,
        has_teacher=trainer.teacher is not None,
        takes_outer_loss=compiled.takes_outer_loss,
        is_rounded=trainer.update.is_rounded,
        steps=len(inner_batches),
        is_lookahead=inner_batches.is_lookahead,
    )
    return StepReport.later(fields, step=trainer.steps_done, direct_term=compiled.direct_term)


def fields_of_report(
    make_report: Callable[[], Report],
    *,
    has_teacher: bool,
    takes_outer_loss: bool,
    is_rounded: bool,
    steps: int,
    is_lookahead: bool,
) -> dict[str, Any]:
    """Return the fields of a trainer's report that are made when one of them is read."""
    report = make_report()
    scalars = {"inner_loss": report.inner_loss}
    for name, loss in report.teacher_losses.items():
        scalars[f"teacher_{name}"] = loss
    if takes_outer_loss:
        scalars["outer_loss"] = report.outer_loss
    if has_teacher:
        scalars["teacher_loss"] = report.teacher_loss
    scalars |= report.sizes
    if is_rounded:
        scalars["step_rounding"] = report.step_rounding
    feedback = report.feedback
    signal = report.signal
    if steps > 1:
        feedback = tuple(report.feedback)
        signal = report.signal[-1]
    elif is_lookahead:
        feedback = (report.feedback,)
    return {
        "scalars": scalars,
        "fault": findings_of(report),
        "feedback": feedback,
        "signal": Signal(**signal),
        "student_outputs": report.student_outputs,
    }


class Outcome(NamedTuple):
    """The state after a step, and the trainer's report of it.

    Attributes:
        written: what the problem has written in an eager step, in words; "" for nothing.
    """

    state: State
    report: StepReport
    written: str = ""


def eager_step(
    trainer: TwoLevelTrainer, outer_batch: Batch, inner_batches: InnerBatches
) -> Outcome:
    """Return the step of a trainer, taken by a copy of it on the eager road; no generator moves.

    Raises: :class:`metapl.MetaplError` where the step changes an attribute of a network, or makes
        one that later steps read.
    """
    inner = inner_batches.as_argument()
    start = RandomState.now(trainer.device)
    twin, report = step_of_copy(trainer, outer_batch, inner)
    end = RandomState.now(trainer.device)
    start.restore()
    # Recorded, L(θ′) draws from where the teacher's passes end; in an eager step, from a stream of
    # its own. So a step that draws is taken again, with that stream begun where this one
    # ended.
    if not end.equals(start):
        with branching_to(end):
            twin, report = step_of_copy(trainer, outer_batch, inner)
        start.restore()
    refuse_draws_of_problem(trainer, twin, report)
    made = attributes_made(trainer, twin)
    if made:
        refuse_made_that_are_read(made, trainer, outer_batch, inner_batches)
    return Outcome(state_of(twin, updates_of(twin)), report, written_by_problem(trainer, twin))


def refuse_draws_of_problem(
    trainer: TwoLevelTrainer, twin: TwoLevelTrainer, report: StepReport
) -> None:
    """Refuse a problem that draws other than labels from the generator of labels.

    A graph draws from the default generators alone; labels are drawn outside of it.
    """
    if trainer.generator is None or twin.generator is None or report.signal.probs is not None:
        return
    if not torch.equal(trainer.generator.get_state(), twin.generator.get_state()):
        raise MetaplError(
            f"compile= was given with generator=, of which {kind_of(trainer.problem)} draws other "
            "than labels; expected compile=False, or no generator= and torch.manual_seed."
        )


def refuse_written(eager: Outcome) -> None:
    """Refuse a problem that writes its own state in an eager step."""
    if eager.written:
        raise MetaplError(f"compile= cannot take this step: {eager.written}; leave compile out.")


def written_by_problem(trainer: TwoLevelTrainer, twin: TwoLevelTrainer) -> str:
    """Return what a step of a trainer's copy has written in the copy's problem; "" for nothing."""
    before, after = (
        numbers_of(one.problem, nn.ModuleList(networks_of(one))) for one in (trainer, twin)
    )
    written = names_written(before, after)
    if not written:
        return ""
    return f"{kind_of(trainer.problem)} writes state ({few(written, 3)}), no buffer of the teacher"


def step_of_copy(
    trainer: TwoLevelTrainer, outer_batch: Batch, inner: Batch
) -> tuple[TwoLevelTrainer, StepReport]:
    """Return a copy of a trainer that has taken a step on the eager road, and the step's report."""
    memo: dict[int, Any] = {}
    if trainer.generator is not None:
        memo[id(trainer.generator)] = trainer.generator.clone_state()
    twin = copy.deepcopy(trainer, memo)
    vars(twin)["compiled_step"] = None
    # A loss may read the networks by a closure, which no copy changes.
    pairs = (
        (twin.problem, trainer.problem),
        (twin.teacher, trainer.teacher),
        (twin.student, trainer.student),
    )
    with all_with_contents_of(pairs):
        return twin, twin.step(outer_batch, inner)


@contextmanager
def at_other_digits(network: nn.Module) -> Iterator[None]:
    """Let the weights of a network differ in their last digit in this block."""
    weights = [*network.parameters()]
    values = [p.detach().clone() for p in weights]
    try:
        with torch.no_grad():
            for p, value in zip(weights, values, strict=True):
                p.copy_(with_other_digits(value))
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(weights, values, strict=True):
                p.copy_(value)


class MadeAttribute(NamedTuple):
    """An attribute of a part of a network in which a step has put numbers.

    Attributes:
        part: of the network that took no step.
        name: the attribute's.
        place: the names of the part and of the attribute, in words.
        value: what a copy of the part holds after the step.
    """

    part: nn.Module
    name: str
    place: str
    value: Any


def attributes_made(trainer: TwoLevelTrainer, twin: TwoLevelTrainer) -> list[MadeAttribute]:
    """Return the attributes in which a step of a trainer's copy has put numbers anew.

    Of both networks, but for what one of them holds of the other.

    Raises: :class:`metapl.MetaplError` where a number, text or tensor that was there has changed.
    """
    made: list[MadeAttribute] = []
    networks, moved = (nn.ModuleList(networks_of(one)) for one in (trainer, twin))
    pairs = zip(networks.named_modules(), moved.modules(), strict=True)
    for (name, part), part_moved in pairs:
        path = name.partition(".")[2]
        before = numbers_of(held_by(part), networks)
        after = numbers_of(held_by(part_moved), moved)
        written = names_written(before, {name: t for name, t in after.items() if name in before})
        texts = [
            name
            for name, value in vars(part_moved).items()
            if isinstance(value, str) and vars(part).get(name) != value
        ]
        if written or texts:
            place = f"{path}.{[*written, *texts][0]}".lstrip(".")
            expected = "expected a registered buffer, or compile left out"
            raise MetaplError(f"a network's {place} changes in a step; {expected}.")
        for name, value in vars(held_by(part_moved)).items():
            if numbers_of(SimpleNamespace(**{name: value}), moved).keys() - before.keys():
                made.append(MadeAttribute(part, name, f"{path}.{name}".lstrip("."), value))
    return made


def refuse_made_that_are_read(
    made: Sequence[MadeAttribute],
    trainer: TwoLevelTrainer,
    outer_batch: Batch,
    inner_batches: InnerBatches,
) -> None:
    """Refuse a network to whose later steps it matters what a first step has put into attributes.

    A graph has each step as the first one. So an eager step on other rows is taken with these
    attributes and without; a cache that every step would fill with the same is none to be refused.
    """
    inner: Any = [*map(rows_repeated, inner_batches)]
    inner = Lookahead(inner) if inner_batches.is_lookahead else inner[0]
    outer = rows_repeated(outer_batch)
    start = RandomState.now(trainer.device)
    ends: list[State] = []
    for attributes in ((), made):
        with holding(attributes), replayed(start):
            twin, _ = step_of_copy(trainer, outer, inner)
        ends.append(state_of(twin, updates_of(twin)))
    without, with_made = map(leaves_of, ends)
    if not all(map(is_equal, with_made, without)):
        raise MetaplError(
            f"a network's {made[0].place} is made by its first step and read by later ones; "
            "expected a registered buffer, or compile left out."
        )


@contextmanager
def holding(made: Sequence[MadeAttribute]) -> Iterator[None]:
    """Let the parts of networks hold what a step has put into attributes, in this block."""
    tables = [vars(attribute.part) for attribute in made]
    before = [dict(table) for table in tables]
    try:
        for table, attribute in zip(tables, made, strict=True):
            detached = pytree.tree_map_only(Tensor, Tensor.detach, attribute.value)
            table[attribute.name] = detached
        yield
    finally:
        for table, attribute, held in zip(tables, made, before, strict=True):
            table.pop(attribute.name)
            if attribute.name in held:
                table[attribute.name] = held[attribute.name]


def held_by(part: nn.Module) -> SimpleNamespace:
    """Return what a part of a network holds besides tables of tensors, parts and hooks."""
    return SimpleNamespace(
        **{
            name: value
            for name, value in vars(part).items()
            if name not in ATTRIBUTES_OF_ALL_MODULES and not isinstance(value, nn.Module)
        }
    )


def is_recorded_in_half_precision(trainer: TwoLevelTrainer) -> bool:
    """Return whether passes in half precision are recorded as a CUDA graph, without a compiler."""
    is_in_region = torch.is_autocast_enabled(trainer.device.type)
    has_half_precision = trainer.precision != "float32" or is_in_region
    return trainer.compile == "cudagraphs" and has_half_precision


def is_repeated(before: State, eager: Outcome, again: Outcome) -> bool:
    """Return whether an eager step from one state comes out the same twice."""
    trees, trees_again = (compared_trees(before, outcome) for outcome in (eager, again))
    return all(map(is_equal, pytree.tree_leaves(trees_again), pytree.tree_leaves(trees)))


def refuse_other(
    before: State,
    compiled: Outcome,
    eager: Outcome,
    *,
    by_rounding: Outcome | None = None,
    is_reduced: bool = False,
) -> None:
    """Refuse a compiled step that is not the eager one: by h, both gradients, and the buffers.

    Args:
        by_rounding: an eager step at weights that differ in their last digit; the compiled one may
            be some times as far.
        is_reduced: see :func:`refuse_gap`.
    """
    trees_compiled = compared_trees(before, compiled)
    trees_eager = compared_trees(before, eager)
    trees_by_rounding = {} if by_rounding is None else compared_trees(before, by_rounding)
    loss = eager.report.scalars["inner_loss"]
    for name, tree in trees_eager.items():
        refuse_gap(
            name,
            trees_compiled[name],
            tree,
            loss,
            by_rounding=trees_by_rounding.get(name),
            rounding=name == "h",
            is_reduced=is_reduced,
        )


def compared_trees(before: State, outcome: Outcome) -> dict[str, dict[Any, Tensor]]:
    """Return the trees of tensors by which steps from one state are compared, by their names."""
    state = outcome.state
    trees: dict[str, dict[Any, Tensor]] = {}
    trees["h"] = dict(enumerate(pytree.tree_leaves(outcome.report.feedback)))
    trees["the inner loss"] = {"": outcome.report.scalars["inner_loss"]}
    trees["the mode's state"] = {name: t for name, t in state.mode.items() if t.is_floating_point()}
    for role, optimizer in (("student", state.inner), ("teacher", state.outer)):
        network = getattr(state, role)
        weights_before = getattr(before, role).params
        # By first moments, in which gradients are: of a fresh Adam, a weight's move is a sign.
        gradients = {}
        moves = {}
        for name, t in network.params.items():
            moments = optimizer.state[name]
            moves[name] = t - weights_before[name]
            gradients[name] = moments.get("exp_avg", moments.get("momentum_buffer", moves[name]))
        trees[f"the {role}'s move"] = moves
        trees[f"the {role}'s gradient"] = gradients
        trees[f"the {role}'s buffers"] = network.state
    return trees


# The greatest difference of a compiled tree from the eager one, by norm and relative to its size.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-2}
# That of a step that is recorded without a compiler, in half precision. There ż by forward mode, on
# the eager road, and ż by the transpose of the pullback round otherwise: by 2e-2 on WRN-28-2 in
# bfloat16.
TOLERANCE_OF_HALF = 0.1
# That of what weights move by: a first step of Adam is a sign for each weight, and that of a
# gradient that is 0 but for rounding may be either.
TOLERANCE_OF_MOVES = 0.5

# The release from which on graphs draw the masks of dropout as the eager road does.
DRAWS_ALIKE = "2.12"


def refuse_gap(
    name: str,
    compiled: Mapping[Any, Tensor],
    eager: Mapping[Any, Tensor],
    loss: Tensor,
    *,
    by_rounding: Mapping[Any, Tensor] | None = None,
    rounding: bool = False,
    is_reduced: bool = False,
) -> None:
    """Refuse a tree of tensors that is not the eager one, by norm.

    Args:
        name: what the tree is, for the error.
        loss: a loss of the step, in the type in which it was computed.
        by_rounding: an eager one at weights that differ in their last digit; None: the same.
        rounding: whether the entries are sums that may cancel, which are then allowed the rounding
            of the loss.
        is_reduced: whether the step is recorded without a compiler, in half precision.
    """
    gap = distance(compiled, eager) if eager else 0.0 * loss
    size = norm(dict(eager)) if eager else 0.0 * loss
    tolerance = TOLERANCE_OF_HALF if is_reduced else TOLERANCE[loss.dtype]
    if name.endswith("move"):
        tolerance = TOLERANCE_OF_MOVES
    allowed = tolerance * size
    if by_rounding:
        allowed = allowed + NUDGES * distance(by_rounding, eager)
    if rounding:
        allowed = allowed + 1e3 * torch.finfo(loss.dtype).eps * loss.abs()
    if not bool(gap <= allowed):
        advice = "leave compile out"
        if torch.__version__ < TorchVersion(DRAWS_ALIKE):
            # Measured on a network with dropout behind a batch norm.
            advice += f" (below torch {DRAWS_ALIKE}, graphs draw other masks of dropout)"
        off = f"{float(gap / size):.2g} off its eager value"
        raise MetaplError(f"compiled, {name} is {off}; {advice}.")


def distance(one: Mapping[Any, Tensor], other: Mapping[Any, Tensor]) -> Tensor:
    """Return the norm of the difference of two trees of tensors that have the same keys."""
    return norm({k: as_real(one[k]).double() - as_real(t).double() for k, t in other.items()})
