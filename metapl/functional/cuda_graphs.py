"""A pure step as CUDA graphs, without a compiler.

A CUDA graph is a list of kernels with the addresses that they read and write. It is recorded while
the step runs once, and repeated by one call of the host. So no trace of the networks is needed, and
recording takes about as long as three eager steps. In return everything is a constant of the graph
that the host knew while it was recorded: shapes, numbers of Python, and addresses. What may vary
between steps has one of three places here:

- The tensors of networks and optimizers are read where they are. Where others take their place, the
  step is recorded again.
- Batches, noise, settings of optimizers, the state of the mode and the number of the step are
  copied into memory of the graph before each replay.
- All else that a step reads is compared with what it was: shapes and numbers of batches, attributes
  of the networks and losses, and switches of PyTorch. Where something differs, the step is recorded
  for that too.

A value of a tensor that the host reads would be a constant in silence. So the second of the two
steps before a recording runs in a mode of PyTorch in which this is an error. Numbers that a network
or a loss reads from elsewhere than :mod:`metapl.functional.attributes` looks are those of
the recording.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, warn
from metapl.execution.batch import Batch
from metapl.execution.checks import unexpected
from metapl.execution.state import RandomState
from metapl.functional.attributes import Attributes
from metapl.functional.kinds import Kind, switches, take_apart, with_each
from metapl.functional.live_state import LiveState, Moved
from metapl.functional.operations import without_cache_of_casts
from metapl.functional.state import Report, State, leaves_of, with_fields
from metapl.functional.step import Step

Results = tuple[State, Report]

# Recordings of one step that are kept. Each holds a state's worth of results.
MOST_RECORDINGS = 8
CANNOT = 'compile="cudagraphs" cannot take this step'


class Recording(NamedTuple):
    """What a function did, to be done again.

    Attributes:
        results: what the function returned. Only a replay fills these tensors with values.
        replay: does again what the function did, with the same memory.
    """

    results: Results
    replay: Callable[[], Any]


def record_on_cuda(function: Callable[[], Results], device: torch.device, pool: Any) -> Recording:
    """Return a function's kernels as a CUDA graph.

    The function runs three times: once in which libraries choose their kernels and take their
    memory, once in which it may not read the value of a tensor, and once to be recorded.

    Args:
        pool: of memory for the graph's intermediate values. Graphs may share one if the results of
            each are copied before the next of them is replayed.
    """
    with torch.cuda.device(device):
        caller_stream = torch.cuda.current_stream()
        # One stream for all three runs: autograd lets the gradient of a weight wait for the stream
        # on which its node was made, which may be that of an earlier run, and a recording may wait
        # for no other stream.
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(caller_stream)
        with torch.cuda.stream(side_stream):
            function()
            with waiting_is_an_error():
                function()
        caller_stream.wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as one that pins batches, may do what a recording may not.
            with torch.cuda.graph(
                graph, pool=pool, stream=side_stream, capture_error_mode="thread_local"
            ):
                results = function()
        finally:
            # Where a recording fails, torch leaves its own stream the current one.
            torch.cuda.set_stream(caller_stream)
    return Recording(results, graph.replay)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Raise an error in this block where the host would wait for the device."""
    reaction_before = torch.cuda.get_sync_debug_mode()
    set_reaction_to_waiting("error")
    try:
        yield
    finally:
        set_reaction_to_waiting(reaction_before)


def set_reaction_to_waiting(reaction: int | str) -> None:
    """Set what torch does where the host waits for the device."""
    with warnings.catch_warnings():
        # Torch warns that the setting is a prototype.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(reaction)


# What records a function, by the type of the device.
RECORDERS: dict[str, Callable[[Callable[[], Results], torch.device, Any], Recording]] = {
    "cuda": record_on_cuda
}


def refuse_device(device: torch.device) -> None:
    """Refuse a device that has no graphs."""
    if device.type not in RECORDERS:
        raise MetaplError(f"compile='cudagraphs' was given on {device}; expected a CUDA device.")


class Varying(NamedTuple):
    """What is copied into the memory of a graph before each replay."""

    inner_settings: Any
    outer_settings: Any
    mode: Any
    step: Tensor
    outer_batch: Batch
    inner_batch: Batch
    noise: Any


@dataclass
class RecordedStep:
    """A step as a graph, and what it holds for.

    Attributes:
        state: the state whose tensors of networks and optimizers the graph reads.
        kind: of what varies, and of the attributes that the step reads.
        inputs: the memory of the tensors that vary.
        recording: the graph.
    """

    state: State
    kind: Kind
    inputs: list[Tensor]
    recording: Recording


class StepByGraphs:
    """A pure step that is recorded when it is called, and repeated when it is called alike.

    Args:
        step: the pure step.
        sources: objects whose attributes the step reads: modules, the problem, losses and the mode.
    """

    def __init__(self, step: Step, device: torch.device, sources: Sequence[Any]) -> None:
        self.step = step
        self.device = device
        self.attributes = Attributes(sources)
        # The latest last.
        self.recorded: list[RecordedStep] = []
        self.recordings_made = 0
        self._pool: Any = None

    @torch.no_grad()
    def __call__(
        self, live: LiveState, outer: Batch, inner: Batch, noise: Any, *, on_copies: bool
    ) -> Moved:
        """Return what a step leaves.

        The networks and optimizers of that state lie in memory that the next step writes to.

        Args:
            on_copies: not to write into the live tensors, which no graph does.

        Raises: :class:`metapl.MetaplError` for a step that cannot be recorded.
        """
        state = live.state
        varying = Varying(
            inner_settings=state.inner.settings,
            outer_settings=state.outer.settings,
            mode=state.mode,
            step=state.step,
            outer_batch=outer,
            inner_batch=inner,
            noise=noise,
        )
        tensors: list[Tensor] = []
        kind = switches(self.device)
        take_apart(varying, tensors, kind)
        attributes = self.attributes.values()
        last = self.recorded[-1:]
        if not any(one.kind.is_of(kind, attributes, exactly=True) for one in last):
            # Another object may be in the place of one that was looked into.
            self.attributes.read_again()
            attributes = self.attributes.values()
        start = None
        recorded = self._find(state, kind, attributes)
        if recorded is None:
            start = RandomState.now(self.device)
            recorded = self._record(state, varying, kind=kind)
        torch._foreach_copy_(recorded.inputs, tensors)
        recorded.recording.replay()
        moved, report = recorded.recording.results
        # These outlive the next step. The other tensors are copied into those of modules and
        # optimizers before it.
        mode = with_each(moved.mode, Tensor.clone)
        moved = with_fields(moved, mode=mode, step=moved.step.clone())
        report = with_each(report, Tensor.clone)
        return Moved(
            leaves=leaves_of(moved),
            mode=moved.mode,
            step=moved.step,
            flag=report.flag,
            report=lambda: report,
            state=lambda: moved,
            start=start,
        )

    def _find(self, state: State, kind: list[Any], attributes: list[Any]) -> RecordedStep | None:
        """Return the step that was recorded for all this, or None."""
        if self.recorded and not reads_the_same(self.recorded[-1].state, state):
            # No later step has the tensors that these read.
            self.recorded.clear()
        for index in reversed(range(len(self.recorded))):
            recorded = self.recorded[index]
            if recorded.kind.is_of(kind, attributes):
                self.recorded.append(self.recorded.pop(index))
                return recorded
        return None

    def _record(self, state: State, varying: Varying, *, kind: list[Any]) -> RecordedStep:
        """Record the step for a state and a kind; no generator moves."""
        self._warn_of_many()
        refuse_other_devices(state, varying, self.device)
        static: Varying = with_each(varying, Tensor.clone)
        inputs: list[Tensor] = []
        take_apart(static, inputs, [])
        graph_state = with_fields(
            state,
            inner=with_fields(state.inner, settings=static.inner_settings),
            outer=with_fields(state.outer, settings=static.outer_settings),
            mode=static.mode,
            step=static.step,
        )

        def run() -> Results:
            with without_cache_of_casts():
                return self.step(graph_state, static.outer_batch, static.inner_batch, static.noise)

        if self._pool is None and self.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        start = RandomState.now(self.device)
        try:
            recording = RECORDERS[self.device.type](run, self.device, self._pool)
            refuse_draws_of_the_host(start, RandomState.now(self.device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = why_not_recorded(error)
            if not reason:
                raise
            raise MetaplError(f"{CANNOT}: {reason}; leave compile out.") from error
        finally:
            start.restore()
        self.attributes.read_again()
        recorded = RecordedStep(
            state=state,
            # Other objects may be in the places of those that were looked into, and a pass may have
            # put a tensor into an attribute. No pass runs in a replay.
            kind=Kind(kind, self.attributes.values()),
            inputs=inputs,
            recording=recording,
        )
        self.recorded.append(recorded)
        del self.recorded[:-MOST_RECORDINGS]
        self.recordings_made += 1
        return recorded

    def _warn_of_many(self) -> None:
        """Warn once of steps that are recorded again and again."""
        if self.recordings_made == MOST_RECORDINGS:
            warn(
                f'compile="cudagraphs" records the step for the {MOST_RECORDINGS + 1}th time, and '
                "each time takes as long as three eager steps; expected batches of few shapes, and "
                "no number in a batch, or in an attribute of a network or loss, that changes often",
            )


def reads_the_same(recorded: State, state: State) -> bool:
    """Return whether two states have the same objects for networks and optimizers."""
    return (
        recorded.teacher is state.teacher
        and recorded.student is state.student
        and recorded.inner.state is state.inner.state
        and recorded.outer.state is state.outer.state
    )


def refuse_other_devices(state: State, varying: Varying, device: torch.device) -> None:
    """Refuse tensors that a graph on the device does not read, or would read once."""
    groups = {
        "a batch": pytree.tree_leaves(varying),
        "the teacher": pytree.tree_leaves(state.teacher),
        "the student": pytree.tree_leaves(state.student),
    }
    for owner, values in groups.items():
        for value in values:
            if isinstance(value, Tensor) and value.device.type != device.type:
                raise unexpected(f"in {owner} is", value, f"all tensors on {device}")


def refuse_draws_of_the_host(start: RandomState, end: RandomState) -> None:
    """Refuse a step that draws on the host, whose draws would be the same in every replay."""
    if start.device.type != "cpu" and not torch.equal(start.cpu, end.cpu):
        raise MetaplError(f"{CANNOT}: it draws from the generator of the CPU; expected another.")


def why_not_recorded(error: RuntimeError) -> str:
    """Return what an error says of a step that cannot be recorded; "" for any other error."""
    text = str(error).strip()
    if "synchronizing CUDA operation" in text:
        return "it reads the value of a tensor (.item(), a mask as index), or makes one of numbers"
    if "expected input and grad types to match" in text:
        return "softmax of attention under autocast; expected precision='float32' or half weights"
    if "captur" in text.lower():
        return " ".join(text.splitlines()[0].split())
    return ""
