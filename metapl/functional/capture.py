"""Functions of nested tensors as graphs, and what each graph holds for.

What a function asked Python for is a constant of its graph. So each call compares what it is given
(:mod:`metapl.functional.kinds`), attributes and global variables that the function reads
(:mod:`metapl.functional.attributes`), and switches of PyTorch with what they were, and captures the
function anew where one of them differs. A new graph is compared with the function.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, count
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from metapl.errors import MetaplError, reason_of, warn
from metapl.execution.checks import described, has_values
from metapl.execution.numerics import explain
from metapl.execution.state import RandomState, replayed
from metapl.functional.attributes import (
    Attributes,
    are_for_all,
    cause_in_checkpoints,
    constants_of,
    modes_of,
)
from metapl.functional.comparison import (
    Comparisons,
    halved,
    is_as_near,
    is_equal,
    is_unchanged,
    refuse_other_results,
    rows_repeated,
    size_of,
    with_other_digits,
)
from metapl.functional.kinds import (
    At,
    HeldAt,
    Kind,
    at_places,
    difference_of,
    put_together,
    switches,
    take_apart,
)
from metapl.functional.operations import (
    NotRecorded,
    compiled_graph,
    graph_of,
    say_how_long,
    take_constants_as_inputs,
    take_each_result_once,
    why_not_captured,
)
from metapl.functional.transforms import (
    first_of_mapped,
    is_differentiated,
    is_transformed,
    no_transform,
)

# The most graphs of one function that are kept.
MOST_KEPT = 8

# How many times as much rounding a difference has as what it is of.
ROUNDINGS_OF_DIFFERENCES = 10_000

Result = TypeVar("Result")


class Capture(NamedTuple):
    """A function as a graph, compiled or not.

    Attributes:
        graph: takes the tensors of the arguments and those of ``held``, and returns others.
        held: tensors that were no arguments.
        given: how many tensors the graph takes.
        places: of the results' tensors, among those that the graph takes and returns.
        results: nested as the function returns them, with an :class:`At` for each tensor.
        operations: the graph as it was recorded.
    """

    kind: Kind
    graph: Callable[..., Sequence[Any]]
    held: list[Tensor]
    given: int
    places: list[int]
    results: Any
    operations: GraphModule | None = None

    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the results' tensors, from those of the arguments."""
        given = tensors + self.held
        taken_and_returned = [*given, *self.graph(*given)]
        return [*map(taken_and_returned.__getitem__, self.places)]


class Captured(Generic[Result]):
    """A function of nested tensors as one graph for each kind of arguments that it is called with.

    A kind is what a graph was made for: nesting, shapes and numbers of the arguments, the
    attributes and variables that the function reads, and switches of PyTorch. It is called without
    a graph of autograd.

    Args:
        function: takes and returns nested tensors.
        device: on which they are.
        sources: objects whose attributes the function reads.
        is_compiled: whether Inductor compiles the graphs.
        looks_at_modes: whether each call looks at modes, hooks and parts of the sources. A trainer
            has looked at them before a compiled step.
        has_derivative: whether :meth:`compared` returns results with their graph. Their derivative
            is that of the numbers that the function computes: a graph of operations has those of
            the backward passes too, and no ``detach()``.
        holds_first: return the first result as it is held for the next call (:class:`HeldAt`).
        takes_differences: whether the function divides a difference of two results by a small move,
            and so its rounding.
        shared: graphs of functions that are told to be the same, which serve this one too where
            they hold for what it is given and hold no tensor; new ones join them.
    """

    what = "a step"
    """What is recorded, for warnings."""
    mapped_over = "states"
    """What ``torch.func.vmap`` maps the function over, for errors."""

    def __init__(
        self,
        function: Callable[..., Result],
        device: torch.device,
        sources: Sequence[Any] = (),
        *,
        is_compiled: bool = True,
        looks_at_modes: bool = False,
        has_derivative: bool = False,
        holds_first: bool = False,
        takes_differences: bool = False,
        shared: list[Capture] | None = None,
    ) -> None:
        self.function = function
        self.device = device
        self.is_compiled = is_compiled
        self.looks_at_modes = looks_at_modes
        self.has_derivative = has_derivative
        self.holds_first = holds_first
        self.takes_differences = takes_differences
        self.shared = [] if shared is None else shared
        self.attributes = Attributes(sources)
        # The latest last.
        self.kept: list[Capture] = []
        self.captures = 0
        # Whether the next graph is compared with the function, also where it is not new.
        self.is_doubted = False
        self.comparisons = Comparisons()

    def __call__(self, *arguments: Any) -> Result:
        capture, tensors = self.find(*arguments)
        result: Result = at_places(capture.results, self.replay(capture, tensors))
        return result

    def compared(self, *arguments: Any) -> Result:
        """Return the results of a graph that was compared with the function, also under vmap.

        A graph that is new is compared on these arguments, or on the first of what is mapped, and
        once more on other rows, where a function with a memory of its own has that of before.

        Raises: :class:`metapl.MetaplError` where the function cannot be recorded or comes out
            otherwise, and under a transform that differentiates results without a derivative.
        """
        if is_transformed() and not self.has_derivative and is_differentiated(()):
            raise MetaplError(self.text_of_derivative())
        captures = self.captures
        try:
            capture, tensors = self.find(*arguments)
        except NotRecorded as error:
            raise self.not_recorded(error) from error
        if (self.captures > captures or self.is_doubted) and has_values.get():
            self.is_doubted = False
            try:
                # In no mode either, such as that of a user's own recording.
                with no_transform(), _disable_current_modes(), self.attributes.restored():
                    first = pytree.tree_map_only(Tensor, first_of_mapped, arguments)
                    # Both are compared, also behind one of which nothing can be told.
                    decided = [
                        self._compare(capture, first),
                        self._compare_on_others(capture, first),
                    ]
                if not all(decided):
                    self.comparisons.count_drowned(
                        f"{self.what} comes out the same recorded, for rounding drowns the "
                        "difference",
                        " Expected float64, or no graph",
                    )
                    self.is_doubted = not self.comparisons.have_ended
            except BaseException:
                self.kept = [kept for kept in self.kept if kept is not capture]
                raise
        with torch.set_grad_enabled(self.has_derivative and torch.is_grad_enabled()):
            result: Result = at_places(capture.results, self.replay(capture, tensors))
        return result

    def _compare_on_others(self, capture: Capture, arguments: Any) -> bool:
        """Compare a graph with the function on other numbers than these arguments.

        A function that inverts a matrix raises where its rows are repeated, and on no halves.
        """
        for change in (rows_repeated, halved):
            try:
                return self._compare(capture, change(arguments))
            except MetaplError:
                raise
            except Exception as error:
                raised = error
        raise raised

    def _compare(self, capture: Capture, arguments: Any) -> bool:
        """Refuse a graph that returns something else than the function, or a function that writes.

        No generator moves.

        Returns: False where rounding drowns the difference, so that nothing can be told.
        """
        tensors: list[Tensor] = []
        take_apart(arguments, tensors, [])
        copies = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
        for t, copied in zip(tensors, copies, strict=True):
            if t.is_leaf and t.grad is not None:
                copied.grad = t.grad.clone()
        given = put_together(arguments, iter(copies))
        with replayed(RandomState.now(self.device)):
            wanted, structure = pytree.tree_flatten(self.function(*given))
        for t, copied in zip(tensors, copies, strict=True):
            # By ``p.data`` no version changes.
            is_as_it_was = is_unchanged(t, copied)
            if not self.has_derivative:
                is_as_it_was &= is_unchanged(t.grad if t.is_leaf else None, copied.grad)
            if not is_as_it_was:
                raise MetaplError(self.text_of_write(given, copied))
        with replayed(RandomState.now(self.device)), torch.no_grad():
            results = at_places(capture.results, capture.run(tensors))
        found, structure_found = pytree.tree_flatten(results)
        if structure_found != structure:
            raise MetaplError(self.text_of_difference(structure_found, structure))
        factor = 100 if self.is_compiled else 1
        if self.takes_differences:
            factor *= ROUNDINGS_OF_DIFFERENCES
        # The gradient of a bias before batch norm is 0, and comes out as rounding.
        sizes = [
            size_of(two[one != two])
            for one, two in zip(found, wanted, strict=True)
            if isinstance(one, Tensor) and isinstance(two, Tensor)
            if two.is_floating_point() and one.shape == two.shape
        ]
        scale = max(sizes, default=0.0)

        def refuse(wanted_there: list[Any] | None) -> None:
            for place, (one, two) in enumerate(zip(found, wanted, strict=True)):
                if is_equal(one, two, factor=factor, scale=scale):
                    continue
                if wanted_there is None or not is_as_near(one, two, wanted_there[place]):
                    raise MetaplError(self.text_of_difference(one, two))

        results_of = partial(self._results, arguments, tensors)
        return refuse_other_results(
            refuse,
            wanted,
            take_again=partial(results_of, change=torch.clone),
            take_at_other_digits=partial(results_of, change=with_other_digits),
        )

    def _results(
        self, arguments: Any, tensors: Sequence[Tensor], *, change: Callable[[Tensor], Tensor]
    ) -> list[Any]:
        """Return what the function returns, in a list; no generator moves.

        Args:
            arguments: of the function, whose tensors are changed.
        """
        changed = [change(t.detach()).requires_grad_(t.requires_grad) for t in tensors]
        with replayed(RandomState.now(self.device)):
            return pytree.tree_leaves(self.function(*put_together(arguments, iter(changed))))

    def not_recorded(self, error: NotRecorded) -> BaseException:
        """Return the error that says why the function cannot be recorded."""
        reason = why_not_captured(error) or reason_of(error)
        if not is_transformed():
            return MetaplError(
                f"torch.autograd cannot differentiate through this step: {reason}; expected a "
                "network and losses that can be recorded, or detach() of what the step is given."
            )
        return MetaplError(
            f"torch.func.vmap cannot map this step: {reason}; expected a loop over the "
            f"{self.mapped_over}."
        )

    def text_of_derivative(self) -> str:
        """Return what to say where a transform differentiates the function."""
        return (
            "torch.func differentiates a step that has no derivative here; expected the step of "
            "functional(), which has, or metapl.hypergradient."
        )

    def text_of_write(self, arguments: Any, t: Tensor) -> str:
        """Return what to say of a function that writes to one of its arguments."""
        return f"the step writes to {described(t)} that it is given; expected a new tensor."

    def text_of_difference(self, found: Any, wanted: Any) -> str:
        """Return what to say where a graph returns something else than the function."""
        cause = cause_in_checkpoints(self.attributes.modules())
        return (
            f"the step comes out otherwise when it is recorded{cause}, as torch.func.vmap and "
            "derivatives through it need it; expected a function of its arguments and of torch's "
            "default generators, without NumPy's, and without numbers that it keeps; or a loop "
            f"over the {self.mapped_over}."
        )

    def inputs_of_constants(self, graph: GraphModule) -> list[Tensor]:
        """Return the tensors that a graph holds, which are its last arguments from now on."""
        return take_constants_as_inputs(graph)

    def before_capture(self, *arguments: Any) -> None:
        """Do what has to be done before a graph is made for these arguments: nothing."""

    def find(self, *arguments: Any) -> tuple[Capture, list[Tensor]]:
        """Return the graph for these arguments, which may have to be made, and their tensors."""
        tensors: list[Tensor] = []
        kind = switches(self.device)
        take_apart(arguments, tensors, kind)
        if self.looks_at_modes:
            kind += chain.from_iterable(map(modes_of, self.attributes.modules()))
        values = self.attributes.values()
        if self.kept and self.kept[-1].kind.is_of(kind, values, exactly=True):
            return self.kept[-1], tensors
        # Another object may be in the place of one that was looked into.
        self.attributes.read_again()
        values = self.attributes.values()
        for index in reversed(range(len(self.kept))):
            if self.kept[index].kind.is_of(kind, values):
                self.kept.append(self.kept.pop(index))
                return self.kept[-1], tensors
        for capture in self.shared:
            known = capture.kind
            if known.arguments == kind and constants_of(known.attributes) == constants_of(values):
                return self._kept(capture._replace(kind=Kind(kind, values))), tensors
        self.before_capture(*arguments)
        capture = self._capture(arguments, tensors, kind)
        if not capture.held and are_for_all(values):
            self.shared.append(capture)
            del self.shared[:-MOST_KEPT]
        return capture, tensors

    def _kept(self, capture: Capture) -> Capture:
        """Keep a graph, and return it."""
        self.kept.append(capture)
        del self.kept[:-MOST_KEPT]
        self.captures += 1
        return capture

    def replay(self, capture: Capture, tensors: list[Tensor]) -> Sequence[Any]:
        """Return the tensors of the results of a graph."""
        if torch.is_autocast_enabled(self.device.type):
            # The casts are operations of the graph.
            with torch.autocast(self.device.type, enabled=False):
                return capture.run(tensors)
        return capture.run(tensors)

    def _capture(self, arguments: Any, tensors: list[Tensor], kind: list[Any]) -> Capture:
        """Capture the function for these arguments; nothing moves."""
        nested: list[Any] = []

        def on_tensors(*recorded: Tensor) -> list[Tensor]:
            returned = self.function(*put_together(arguments, iter(recorded)))
            numbers = count()

            def place_of(_: Tensor) -> At:
                return At(next(numbers))

            # PyTorch's trees make tuples of shapes.
            nested.append(pytree.tree_map_only(Tensor, place_of, returned, is_leaf=is_shape))
            leaves = pytree.tree_leaves(returned)
            return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]

        self._say_why(kind)
        try:
            with self.attributes.restored():
                graph = graph_of(on_tensors, tensors, has_derivatives=self.has_derivative)
        except (MetaplError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise NotRecorded(str(error)) from error
        held = self.inputs_of_constants(graph)
        if self.is_compiled:
            say_how_long(len(graph.graph.nodes), self.device)
        places = take_each_result_once(graph)
        compiled: Callable[..., Sequence[Any]] = graph
        if self.is_compiled:
            compiled = compiled_graph(graph, [*tensors, *held])
        # Other objects may be in the places of those that were looked into.
        self.attributes.read_again()
        whole_kind = Kind(kind, self.attributes.values())
        given = len(tensors) + len(held)
        results = self.with_held(nested[0])
        return self._kept(
            Capture(whole_kind, compiled, held, given, places, results, operations=graph)
        )

    def with_held(self, results: Any) -> Any:
        """Return nested places of results; those of one that is held as :class:`HeldAt`."""
        if not self.holds_first:
            return results
        first, *others = results
        parts = (HeldAt(first), *others)
        return type(results)(*parts) if hasattr(results, "_fields") else parts

    def _say_why(self, kind: list[Any]) -> None:
        """Warn, once, of a function that is captured for the third time, and say why."""
        if self.captures != 2 or not self.kept:
            return
        difference = difference_of(self.kept[-1].kind.arguments, kind)
        if not difference:
            difference = self.attributes.difference_from(self.kept[-1].kind.attributes)
        instead = "; or leave compile out" if self.is_compiled else ""
        warn(
            f"{self.what} is recorded for the third time: {difference}. Each time takes as long as "
            f"the first, and {MOST_KEPT} are kept; expected few shapes (pad to a few lengths, drop "
            "the last short batch by drop_last=True), and few values of numbers that it "
            f"reads{instead}.",
        )


def is_shape(value: Any) -> bool:
    """Return whether a value is the shape of a tensor."""
    return isinstance(value, torch.Size)


class Capturing:
    """A block that names what cannot be captured by a graph that is called there.

    Every step enters such a block, so this is a class: a generator would take longer.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if error is None or not isinstance(error, Exception):
            return
        # They stay disabled where a transform fails.
        torch._C._autograd._saved_tensors_hooks_enable()
        cause = error.__cause__ if isinstance(error, NotRecorded) else error
        if cause is not None and not isinstance(cause, MetaplError):
            explain(cause)
        reason = why_not_captured(error)
        if reason:
            text = f"compile=True cannot take this step: {reason}; leave compile out."
            raise MetaplError(text) from error
