"""A compiled step beside the eager one, which a copy of the trainer takes, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from torch.utils import _pytree as pytree

from metapl.core.lookahead import InnerBatches, Lookahead
from metapl.data.held_values import names_written, numbers_of
from metapl.errors import MetaplError, few
from metapl.execution.batch import Batch
from metapl.execution.numerics import as_real
from metapl.execution.state import (
    RandomState,
    Slot,
    all_with_contents_of,
    branching_to,
    copies_of_results,
    replayed,
    swapped,
)
from metapl.feedback.report import StepReport
from metapl.functional.attributes import ATTRIBUTES_LEFT_OUT, cause_in_checkpoints
from metapl.functional.comparison import (
    NUDGES,
    is_equal,
    refuse_other_results,
    rows_repeated,
    with_other_digits,
)
from metapl.functional.pure_step import networks_of, updates_of
from metapl.functional.state import (
    State,
    leaves_of,
    norm,
    state_of,
    unclipped,
)
from metapl.functional.step import StateStep
from metapl.problems.base import kind_of
from metapl.protocols import TwoLevelTrainer
from metapl.updates import TorchUpdate

# What an error proposes, about a compiled step and about one as a function.
OWN_STEPS = "take the trainer's own steps, and leave compile out"


class Outcome(NamedTuple):
    """The state after a step, and the report of it, with its feedback and its scalars."""

    state: State
    report: Any


def eager_step(
    trainer: TwoLevelTrainer, outer_batch: Batch, inner_batches: InnerBatches
) -> Outcome:
    """Return the step of a trainer, taken by a copy of it on the eager road; no generator moves.

    Raises: :class:`metapl.MetaplError` where the step changes an attribute of a network, or makes
        one that later steps read, and where the problem writes its own state.
    """
    inner = inner_batches.as_argument()
    start = RandomState.now(trainer.device)
    # As one function, L(θ′) draws from where the teacher's passes end; in an eager step, from a
    # stream of its own. So a step that draws is taken again, with that stream begun where this one
    # ended.
    with branching_to(start):
        twin, report = step_of_copy(trainer, outer_batch, inner)
    end = RandomState.now(trainer.device)
    start.restore()
    if not end.equals(start):
        with branching_to(end):
            twin, report = step_of_copy(trainer, outer_batch, inner)
        start.restore()
    refuse_draws_of_problem(trainer, twin, report)
    made = attributes_made(trainer, twin)
    if made:
        refuse_made_that_are_read(made, trainer, outer_batch, inner_batches)
    refuse_written_by_problem(trainer, twin)
    return Outcome(state_of(twin, updates_of(twin)), report)


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


def refuse_written_by_problem(trainer: TwoLevelTrainer, twin: TwoLevelTrainer) -> None:
    """Refuse a problem in whose copy a step of a trainer's copy has written."""
    before, after = (
        numbers_of(one.problem, nn.ModuleList(networks_of(one))) for one in (trainer, twin)
    )
    written = names_written(before, after)
    if written:
        raise MetaplError(
            f"compile= or functional() cannot take this step: {kind_of(trainer.problem)} writes "
            f"state ({few(written, 3)}), no buffer of the teacher; {OWN_STEPS}."
        )


def step_of_copy(
    trainer: TwoLevelTrainer, outer_batch: Batch, inner: Batch
) -> tuple[TwoLevelTrainer, StepReport]:
    """Return a copy of a trainer that has taken a step on the eager road, and the step's report."""
    memo: dict[int, Any] = {}
    for network in networks_of(trainer):
        memo |= copies_of_results(network)
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
def at_values(trainer: TwoLevelTrainer, state: State) -> Iterator[None]:
    """Let the networks of a trainer have the values of a state in this block."""
    own: list[tuple[Tensor, Tensor, Tensor]] = []
    for module, network in ((trainer.teacher, state.teacher), (trainer.student, state.student)):
        given = {**network.params, **network.state}
        named = () if module is None else (*module.named_parameters(), *module.named_buffers())
        for name, t in named:
            # A buffer may have been made since.
            if name in given:
                own.append((t, t.detach().clone(), given[name].detach()))
    try:
        for t, _, value in own:
            # Past the version counter, for graphs that have saved the tensor. What shares its
            # memory has the value too.
            t.data.copy_(value)
        yield
    finally:
        for t, values, _ in own:
            t.data.copy_(values)


def refuse_first_call(
    trainer: TwoLevelTrainer,
    step: StateStep,
    outer: Batch,
    inner_batches: InnerBatches,
    *,
    has_noise: bool,
) -> None:
    """Refuse a step as a function that is not the trainer's own, which a copy of it takes.

    The networks have the values of a state, and optimizers and estimator are the trainer's. No
    generator moves.

    Args:
        has_noise: whether labels are drawn by noise that was given, which no trainer takes.
    """
    updates = updates_of(trainer)
    has_states = all(isinstance(unclipped(rule), TorchUpdate | None) for rule in updates)
    if has_noise or trainer.generator is not None or not has_states:
        with replayed(RandomState.now(trainer.device)):
            step_of_copy(trainer, outer, inner_batches.as_argument())
        return
    before = state_of(trainer, updates)
    start = RandomState.now(trainer.device)
    eager = eager_step(trainer, outer, inner_batches)

    def take_again() -> Trees:
        with replayed(start):
            return compared_trees(before, eager_step(trainer, outer, inner_batches))

    with replayed(start):
        moved, report = step.taken(before, outer, inner_batches.as_argument(), None)
    loss = {"inner_loss": report.inner_loss}
    taken = SimpleNamespace(feedback=report.feedback, scalars=loss)
    refuse_other_than_eager(
        compared_trees(before, Outcome(moved, taken)),
        compared_trees(before, eager),
        eager.report.scalars["inner_loss"],
        take_again=take_again,
        student=trainer.student,
    )


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


def attributes_made(trainer: TwoLevelTrainer, twin: TwoLevelTrainer) -> list[tuple[str, Slot]]:
    """Return the attributes in which a step of a trainer's copy has put numbers anew.

    Of both networks, but for what one of them holds of the other.

    Returns: each one's name in words, and its place in the network that took no step, with what the
    copy holds there, without its graph.

    Raises: :class:`metapl.MetaplError` where a number, text or tensor that was there has changed.
    """
    made: list[tuple[str, Slot]] = []
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
            raise MetaplError(
                f"a network's {place} changes in a step; expected a registered buffer, or "
                f"{OWN_STEPS}."
            )
        for name, value in vars(held_by(part_moved)).items():
            if numbers_of(SimpleNamespace(**{name: value}), moved).keys() - before.keys():
                detached = pytree.tree_map_only(Tensor, Tensor.detach, value)
                made.append((f"{path}.{name}".lstrip("."), (vars(part), name, detached)))
    return made


def refuse_made_that_are_read(
    made: Sequence[tuple[str, Slot]],
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
    for slots in ([], [slot for _, slot in made]):
        with swapped(slots), replayed(start):
            twin, _ = step_of_copy(trainer, outer, inner)
        ends.append(state_of(twin, updates_of(twin)))
    without, with_made = map(leaves_of, ends)
    if not all(map(is_equal, with_made, without)):
        place, _ = made[0]
        raise MetaplError(
            f"a network's {place} is made by its first step and read by later ones; expected a "
            f"registered buffer, or {OWN_STEPS}."
        )


def held_by(part: nn.Module) -> SimpleNamespace:
    """Return what a part of a network holds besides tables of tensors, parts and hooks."""
    return SimpleNamespace(
        **{
            name: value
            for name, value in vars(part).items()
            if name not in ATTRIBUTES_LEFT_OUT and not isinstance(value, nn.Module)
        }
    )


def is_recorded_in_half_precision(trainer: TwoLevelTrainer) -> bool:
    """Return whether passes in half precision are recorded as a CUDA graph, without a compiler."""
    is_in_region = torch.is_autocast_enabled(trainer.device.type)
    has_half_precision = trainer.precision != "float32" or is_in_region
    return trainer.compile == "cudagraphs" and has_half_precision


# Tensors by which a step is compared, by their keys, in trees that have names.
Trees = Mapping[str, Mapping[Any, Tensor]]


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


def refuse_gaps(
    compiled: Trees,
    eager: Trees,
    loss: Tensor,
    *,
    by_rounding: Trees | None = None,
    is_reduced: bool = False,
) -> None:
    """Refuse trees of tensors of which one is not the eager one, by norm.

    The entries of "h" are sums that may cancel, which are allowed the rounding of the loss.

    Args:
        compiled, eager: by what each tree is, for the error.
        loss: a loss of the step, in the type in which it was computed.
        by_rounding: eager ones at weights that differ in their last digit; None: the same.
        is_reduced: whether the step is recorded without a compiler, in half precision.
    """
    for name, tree in eager.items():
        gap = distance(compiled[name], tree) if tree else 0.0 * loss
        size = norm(dict(tree)) if tree else 0.0 * loss
        tolerance = TOLERANCE_OF_HALF if is_reduced else TOLERANCE[loss.dtype]
        if name.endswith("move"):
            tolerance = TOLERANCE_OF_MOVES
        allowed = tolerance * size
        if by_rounding and by_rounding[name]:
            allowed = allowed + NUDGES * distance(by_rounding[name], tree)
        if name == "h":
            allowed = allowed + 1e3 * torch.finfo(loss.dtype).eps * loss.abs()
        if not bool(gap <= allowed):
            advice = OWN_STEPS
            if torch.__version__ < TorchVersion(DRAWS_ALIKE):
                # Measured on a network with dropout behind a batch norm.
                advice += f" (below torch {DRAWS_ALIKE}, graphs draw other masks of dropout)"
            off = f"{float(gap / size):.2g} off its eager value"
            raise MetaplError(f"as one function, {name} is {off}; {advice}.")


def refuse_other_than_eager(
    found: Trees,
    eager: Trees,
    loss: Tensor,
    *,
    take_again: Callable[[], Trees],
    student: nn.Module,
    is_reduced: bool = False,
) -> bool:
    """Refuse what graphs have found where it is not what the eager step finds, but for rounding.

    Args:
        found, eager, loss, is_reduced: as of :func:`refuse_gaps`.
        take_again: finds what ``eager`` is once more, with the same draws.

    Returns: whether it can be told.
    """

    def refuse(by_rounding: Trees | None) -> None:
        refuse_gaps(found, eager, loss, by_rounding=by_rounding, is_reduced=is_reduced)

    def take_at_other_digits() -> Trees:
        with at_other_digits(student):
            return take_again()

    try:
        return refuse_other_results(
            refuse, eager, take_again=take_again, take_at_other_digits=take_at_other_digits
        )
    except MetaplError as error:
        if cause := cause_in_checkpoints(student.modules()):
            raise MetaplError(f"{str(error).removesuffix('.')}{cause}.") from error
        raise


def distance(one: Mapping[Any, Tensor], other: Mapping[Any, Tensor]) -> Tensor:
    """Return the norm of the difference of two trees of tensors that have the same keys."""
    return norm({k: as_real(one[k]).double() - as_real(t).double() for k, t in other.items()})
