"""The tensors that a trainer's modules and optimizers hold, as the state of a pure step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.execution.state import (
    RandomState,
)
from metapl.functional.kinds import Constants, Held, Named
from metapl.functional.pure_step import (
    Updates,
    hooks_of_optimizers,
    tensors_of_networks,
)
from metapl.functional.state import (
    Report,
    State,
    leaves_of,
    number_on,
    settings_of,
    state_of,
    unclipped,
    with_fields,
)
from metapl.problems.base import modules_in
from metapl.protocols import TwoLevelTrainer
from metapl.updates import (
    Update,
    parts_of,
)


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
        # hold some of them, the modules that the problem holds, and what the trainer is known by.
        self._tensors: list[Tensor] = []
        self._tables: list[dict[Any, Any]] = []
        self._empty_tables: list[dict[Any, Any]] = []
        self._weights: list[Tensor] = []
        self._held_modules: list[nn.Module] = []
        self._objects: list[object] = []
        self._values: list[object] = []

    def held(self) -> Held:
        """Return the tensors of networks and optimizers, taken apart until they are others."""
        if self._held is None:
            state = self.state
            _, structure = pytree.tree_flatten((state.inner.settings, state.outer.settings))
            optimizers = (state.inner.state, state.outer.state)
            kind = Named("which numbers of the optimizers are not 0", structure)
            constants = Constants([kind], structure)
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
        objects, values = self._known_by(trainer, steps)
        return (
            values == self._values
            and are_the_same(objects, self._objects)
            and self._has_same_groups()
            and not any(self._empty_tables)
        )

    def _known_by(self, trainer: TwoLevelTrainer, steps: int) -> tuple[list[object], list[object]]:
        """Return the objects of a step with these tensors, and numbers and settings of it."""
        objects = [*parts_of_step(trainer), *chain.from_iterable(map(dict.values, self._tables))]
        modes = map(_is_training, self._held_modules)
        addresses = map(Tensor.data_ptr, self._weights)
        return objects, [*settings_of_step(trainer, steps), *modes, *addresses]

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
            and names_in(map(settings_by_group, self.updates)) == names_in(self._settings)
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
                    # A scheduler of torch warns of an optimizer whose own step was never taken.
                    vars(part)["_opt_called"] = True
        # The optimizers may hold more than before.
        self._held = None
        # They are empty: a step with hooks is refused.
        tables += hooks_of_optimizers(trainer)
        self._tables = [table for table in tables if table]
        self._empty_tables = [table for table in tables if not table]
        self._tensors = leaves_of(self.state)
        self._weights = tensors_of_networks(trainer)
        for t in self._weights:
            # As an eager step leaves them.
            t.grad = None
        self._held_modules = modules_in(trainer.problem)
        self._objects, self._values = self._known_by(trainer, steps)

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

_fixed_parts = attrgetter("mode", "problem", "teacher_losses")

_options_of_step = attrgetter(
    "feedback_weight", "feedback_ratio", "feedback_bound", "clip_norm", "precision"
)


def settings_of_step(trainer: TwoLevelTrainer, steps: int) -> tuple[object, ...]:
    """Return what a step is besides its parts: settings of the trainer."""
    return (steps, *_options_of_step(trainer))


def parts_of_step(trainer: TwoLevelTrainer) -> list[object]:
    """Return the objects that a trainer's step is made of.

    A step with other ones is another step. Networks are among them as they are held now.
    """
    losses = trainer.teacher_losses or ()
    parts: list[object] = [*trainer.slots, *_fixed_parts(trainer), *losses]
    for optimizer in trainer.optimizers.values():
        for part in parts_of(optimizer):
            parts += (part, part.state)
    return parts


def with_counts_on_device(state: State, device: torch.device) -> State:
    """Return a state whose optimizers have all their tensors on the device.

    ``torch.optim`` counts steps on the host, where a graph would read each count once. From the
    first step by graphs on it holds these counts on the device.
    """
    optimizers = (state.inner, state.outer)
    inner, outer = pytree.tree_map_only(Tensor, lambda t: t.to(device), optimizers)
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


def names_in(settings: Iterable[Sequence[Mapping[str, Any]]]) -> list[list[list[str]]]:
    """Return the names of the settings of each optimizer's groups.

    A momentum or a weight decay that becomes 0, or leaves it, is in no step as a setting, and a
    momentum has buffers of its own.
    """
    return [[*map(list, groups)] for groups in settings]


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
