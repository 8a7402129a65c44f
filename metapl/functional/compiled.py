"""The pure step of a trainer (:meth:`metapl.BilevelTrainer.functional`), and ``compile=True``, that step as one graph.

A compiled step reads the tensors where modules and optimizers hold them, runs its graph, and copies
what comes out back. The first step of each kind is compared with the eager one, taken by a copy of
the trainer; what cannot be captured is refused there.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.batch import length
from metapl.execution.checks import Fault
from metapl.execution.layout import refuse_compiled
from metapl.execution.numerics import as_real, no_fast_path
from metapl.execution.state import RandomState, all_with_contents_of, branching_to, trainable
from metapl.feedback import MODES, Implicit, estimator
from metapl.feedback.lookahead import InnerBatches
from metapl.feedback.report import StepReport
from metapl.functional.state import (
    ImpureError,
    State,
    clipped,
    constants_of,
    impurity,
    leaves_of,
    norm,
    settings_of,
    state_of,
    unclipped,
)
from metapl.functional.step import Step, make_step
from metapl.problems.base import Signal, enters_input, gumbel
from metapl.protocols import TwoLevelTrainer
from metapl.updates import OwnStep, TorchUpdate, Update, as_taken, entry_shape, parts_of, update_of

LONGEST = 3  # steps that are unrolled in one function


# An estimator of one's own, or a subclass, has its feedback on the eager road alone.
KNOWN = {type(estimator(name)) for name in MODES} - {Implicit}


def updates_of(trainer: TwoLevelTrainer) -> tuple[Update, Update | None]:
    inner, outer = unclipped(trainer.update), None
    if trainer.teacher is not None:
        outer = update_of(
            trainer.outer_optimizer, trainable(trainer.teacher), name="outer_optimizer"
        )
    return clipped(inner, trainer.clip_norm), outer and clipped(outer, trainer.clip_norm)


def step_of(trainer: TwoLevelTrainer, steps: int, updates: tuple[Update, Update | None]) -> Step:
    """The pure step of a trainer that looks so many steps ahead."""
    refuse_compiled("student", trainer.student)
    refuse_compiled("teacher", trainer.teacher)
    mode, problem, own = trainer.mode, trainer.problem, trainer.teacher_losses
    inner, composed, hides = unclipped(updates[0]), steps > 1 or enters_input(problem), False
    if not isinstance(
        inner, TorchUpdate
    ):  # a second call with the same state gives the same update, or it hides some
        theta = {name: p.detach() for name, p in inner.parameters.items()}
        once, again = (inner.update(theta, theta, inner.read_state())[0] for _ in "ab")
        hides = not all(torch.equal(t, again[name]) for name, t in once.items())
    refused = {
        "an optimizer without a rule here; expected SGD, Adam, AdamW or Muon": isinstance(
            inner, OwnStep
        ),
        f"mode {type(mode).__name__}; expected one of the library's, other than implicit": type(
            mode
        )
        not in KNOWN,
        f"accumulate={trainer.accumulate}; expected 1": trainer.accumulate > 1,
        "networks of several processes; expected one process": trainer.layout.kind != "plain"
        or not trainer.ranks.alone,
        f"{steps} steps ahead; expected at most {LONGEST}": steps > LONGEST,
        "a cosine over several steps; expected 'gradient'": composed
        and getattr(mode, "normalization", "") == "cosine",
        "a transform with hidden state; expected torch.optim's": hides,
        'normalization="learning_rate" without a single learning rate; expected '
        '"gradient"': inner.learning_rate is None
        and getattr(mode, "normalization", "") == "learning_rate",
    }
    for what in (what for what, is_so in refused.items() if is_so):
        raise MetaplError(f"compile= or functional() was given {what}.")
    # Without the cache, which would keep casts of tensors inside a transform.
    cast = partial(torch.autocast, trainer.device.type, torch.bfloat16, cache_enabled=False)
    return make_step(
        trainer.teacher,
        trainer.student,
        problem,
        mode,
        *updates,
        [constants_of(inner), as_taken(constants_of(unclipped(updates[1])))],
        problem.default_teacher_losses if own is None else lambda batch: own,
        steps=steps,
        feedback_size=trainer.feedback_size,
        autocast=nullcontext if trainer.precision == "float32" else cast,
    )


def functional(trainer: TwoLevelTrainer) -> tuple[Step, State]:
    updates = updates_of(trainer)
    step: Any = step_of(trainer, trainer.lookahead, updates)
    step.__code__ = (
        step.__code__.replace()
    )  # Dynamo counts graphs by code object, which all steps would share
    return step, pytree.tree_map_only(Tensor, Tensor.clone, state_of(trainer, updates))


# Inductor's own kernels would draw other dropout masks than PyTorch's.
BACKEND: dict[str, Any] = {"options": {"fallback_random": True}}
LIBRARY = re.compile(r"__import_(torch|metapl)_|^__import__\('torch'\)")
SLOPES, BY_DIFFERENCE = (
    0.1,
    0.5,
)  # the greatest report.flag; by differences of outputs, whose curvature adds to it
OFF = (
    "the step is not finite, or the student's outputs do not follow its weights (the slopes "
    "differ)."
)


def backend_of(device: torch.device) -> dict[str, Any]:
    """``BACKEND`` for steps of a fraction of a millisecond, half of which would go into Python
    around the kernels and into guards, of which those are dropped that torch and metapl are what
    they are."""
    lean = {"cpp_wrapper": device.type == "cpu", "size_asserts": False, "alignment_asserts": False}
    keep = {"guard_filter_fn": lambda guards: [not LIBRARY.search(guard.name) for guard in guards]}
    return {"options": BACKEND["options"] | lean | keep}


def captured(function: Any, device: torch.device, **options: Any) -> Any:
    """A function as one graph, once it is called."""
    function.__code__ = function.__code__.replace()  # Dynamo counts graphs by code object
    how = dict(backend_of(device))
    how |= {"options": how.get("options", {}) | options} if options else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # while Inductor is imported
        return torch.compile(function, fullgraph=True, dynamic=False, **how)


@contextmanager
def capturing() -> Iterator[None]:
    """Name what cannot be captured by a graph that is called in this block."""
    try:
        yield
    except BaseException as error:
        # which Dynamo leaves off where a transform fails
        torch._C._autograd._saved_tensors_hooks_enable()
        from torch._dynamo.exc import TorchDynamoException

        impure = error if isinstance(error, ImpureError) else impurity(error, "a network")
        if impure is not None:
            said = impure.what
        elif isinstance(error, TorchDynamoException):
            said = " ".join(" ".join(str(error).splitlines()[:2]).split()) or type(error).__name__
        else:
            raise
        raise MetaplError(
            f"torch.compile cannot take this step: {said}; leave compile out."
        ) from error


class CompiledStep:
    """The compiled steps of one trainer, which every call is given; a copy of it compiles anew."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}  # the compiled steps, by what they were compiled for
        self.kind: Any = None  # that of the last step
        self.weights: list[Tensor] = []  # the networks' parameters and buffers,
        self.tables: list[dict[Any, Any]] = []  # where buffers and optimizers' tensors are held,
        self.tensors: list[Tensor] = []  # all of these, as leaves_of has them,
        self.state: Any = None  # and as a state,
        self.numbers: list[Any] = []  # whose settings these are
        self.marks: list[Any] = []  # with which all this was found

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledStep, ()

    def __call__(
        self, trainer: TwoLevelTrainer, outer_batch: Any, inner_batches: InnerBatches
    ) -> StepReport:
        """Take one step on the batches."""
        steps, draw, compared = len(inner_batches), trainer.generator, False
        in_graphs = trainer.compile == "reduce-overhead"
        if anew := self.seen(trainer, steps) != self.marks:
            self.marks, held = [], self.find(trainer, steps)
        if self.kind in self.known:
            compiled, updates, probs, held, compared = self.known[self.kind]
        else:
            compiled, updates = self.compile(trainer, steps, in_graphs)
        if not compared:
            eager = eager_step(trainer, outer_batch, inner_batches)
            probs = eager[1].signal.probs
        if any(entry_shape(group["lr"]) for group in unclipped(trainer.update).options):
            raise MetaplError(
                "compile= was given with a rate for each entry of a weight; leave compile out."
            )
        numbers = [[] if update is None else unclipped(update).settings() for update in updates]
        if anew:
            state = state_of(trainer, updates)
        else:  # in the very tensors that modules and optimizers hold, but for settings that are others now
            for number, optimizer in enumerate(
                (self.state.inner, self.state.outer) if numbers != self.numbers else ()
            ):
                optimizer.settings[:] = [
                    {
                        n: group[n] if old.get(n) == v else settings_of(v, trainer.device)
                        for n, v in new.items()
                    }
                    for group, old, new in zip(
                        optimizer.settings, self.numbers[number], numbers[number], strict=True
                    )
                ]
            step = torch.tensor(trainer.steps_done, device=trainer.device)
            mode = {name: t.to(trainer.device) for name, t in trainer.mode_state.items()}
            state = self.state._replace(mode=mode, step=step)
        self.numbers = numbers
        start, noise = RandomState.now(trainer.device, draw, outside=not compared), None
        if draw is not None and probs is not None:
            noise = tuple(
                gumbel(length(batch), probs.shape[1], probs, draw) for batch in inner_batches
            )
        try:
            with torch.no_grad(), no_fast_path(), capturing():
                given = (
                    (inner_batches[0], noise and noise[0])
                    if steps == 1
                    else (tuple(inner_batches), noise)
                )
                if in_graphs:
                    torch.compiler.cudagraph_mark_step_begin()
                moved, report = compiled(state, outer_batch, *given)
                if in_graphs:  # what outlives the next step, which writes to the same memory
                    mode, report = pytree.tree_map_only(Tensor, torch.clone, (moved.mode, report))
                    moved = moved._replace(mode=mode)
                shown = {"inner_loss": report.inner_loss}
                shown |= {f"teacher_{n}": t for n, t in report.teacher_losses.items()}
                shown |= {} if trainer.mode.name == "none" else {"outer_loss": report.outer_loss}
                shown |= {} if trainer.teacher is None else {"teacher_loss": report.teacher_loss}
                shown |= report.sizes
                shown |= {"step_rounding": report.step_rounding} if trainer.update.rounded else {}
                by_difference = "difference" in (
                    trainer.mode.name,
                    getattr(trainer.mode, "tangent", ""),
                )
                fault = Fault(
                    [(~(report.flag < (BY_DIFFERENCE if by_difference else SLOPES)), OFF)]
                )
                h = (
                    tuple(report.feedback)
                    if steps > 1
                    else (report.feedback,)
                    if inner_batches.is_lookahead
                    else report.feedback
                )
                signal = Signal(**(report.signal[-1] if steps > 1 else report.signal))
                seen: Any = {
                    "feedback": h,
                    "signal": signal,
                    "student_outputs": report.student_outputs,
                }
                wrapped = StepReport(
                    trainer.steps_done, shown, fault, **seen, direct_term=trainer.direct_term
                )
                if not compared:
                    refuse_other(state, (moved, wrapped), eager)
        except BaseException:
            start.restore()
            raise
        if not compared:  # again, while a warm-up has a rate of 0, by which h is 0
            compared = any(group["lr"] != 0 for group in unclipped(trainer.update).options)
            self.known[self.kind] = compiled, updates, probs, held, compared
        if anew:
            self.hold(trainer, state, moved, updates)
        torch._foreach_copy_(self.tensors, leaves_of(moved))
        if anew:
            self.marks = self.seen(trainer, steps)
        trainer.mode_state, trainer.steps_done = moved.mode, trainer.steps_done + 1
        return wrapped

    def seen(self, trainer: TwoLevelTrainer, steps: int) -> list[Any]:
        """What differs where another step is meant, or other tensors are held.

        By now these are alive.
        """
        optimizers = [one for optimizer in trainer.schedulable for one in parts_of(optimizer)]
        given = (
            trainer.mode,
            trainer.problem,
            trainer.teacher_losses,
            *optimizers,
            *(o.state for o in optimizers),
        )
        held = [id(t) for table in self.tables for t in table.values()]
        marks = steps, trainer.feedback_size, *map(id, given)
        return [*trainer.slots, *marks, *held, *[t.data_ptr() for t in self.weights]]

    def find(self, trainer: TwoLevelTrainer, steps: int) -> Any:
        """Look for modules and parameters anew.

        Returns what may not be freed while a kind of step is known by it.
        """
        networks = [
            network for network in (trainer.student, trainer.teacher) if network is not None
        ]
        parameters = [p for network in networks for p in network.parameters()]
        self.weights = [*parameters, *(b for network in networks for b in network.buffers())]
        parts = [part for network in networks for part in network.modules()]
        held = (
            *parts,
            *parameters,
            trainer.mode,
            trainer.problem,
            trainer.teacher_losses,
            *trainer.schedulable,
        )
        marks = (of_network.mark for of_network in trainer.slots)
        self.kind = steps, trainer.feedback_size, *marks, *map(id, held)
        return held

    def compile(self, trainer: TwoLevelTrainer, steps: int, in_graphs: bool) -> tuple[Any, Any]:
        """The trainer's step as one graph, once it is called; refused where none could be."""
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self.weights):
            raise MetaplError(
                "a parameter of the networks has a hook, which no graph captures; leave compile "
                "out."
            )
        if not isinstance(unclipped(trainer.update), TorchUpdate):
            raise MetaplError(
                "inner_optimizer is a TorchOpt transform; expected torch.optim's, or compile=False."
            )
        trainer.update.follow(trainable(trainer.student))
        updates = updates_of(trainer)
        # torch.compile's mode "reduce-overhead", beside our options.
        options = {"triton.cudagraphs": True} if in_graphs else {}
        return captured(step_of(trainer, steps, updates), trainer.device, **options), updates

    def hold(self, trainer: TwoLevelTrainer, state: State, moved: State, updates: Any) -> None:
        """Keep a state, whose tensors are those of the modules, and let the optimizers hold those that are new."""
        pairs = (state.inner, moved.inner), (state.outer, moved.outer)
        tables: list[dict[Any, Any]] = [
            table for of_network in trainer.slots for table in of_network.buffers
        ]
        for of, (optimizer, after) in zip(map(unclipped, updates), pairs, strict=True):
            for name, own in optimizer.state.items():
                held = of.owner[name].state[of.parameters[name]]
                own |= {
                    key: torch.empty_like(t)
                    for key, t in after.state[name].items()
                    if key not in own
                }
                held.update(own)
            for one in () if of is None else parts_of(of.optimizer):
                tables += [one.state, *one.state.values()]
        self.state, self.tensors, self.tables = state, leaves_of(state), tables


AGREES = {torch.float64: 1e-6, torch.float32: 2e-2}  # by norm
Taken = tuple[State, Any]  # the state after a step, and the trainer's report


def eager_step(trainer: TwoLevelTrainer, outer_batch: Any, inner_batches: InnerBatches) -> Taken:
    """The step of a trainer, taken by a copy of it on the eager road. No generator moves."""
    start, generator = RandomState.now(trainer.device), trainer.generator

    def taken() -> Any:
        twin = copy.deepcopy(
            trainer, {} if generator is None else {id(generator): generator.clone_state()}
        )
        vars(twin)["compile"] = False
        # A loss may read the networks by a closure, which no copy changes.
        pairs = (
            (twin.problem, trainer.problem),
            (twin.teacher, trainer.teacher),
            (twin.student, trainer.student),
        )
        with all_with_contents_of(pairs):
            return twin, twin.step(outer_batch, inner_batches.as_argument())

    twin, report = taken()
    end = RandomState.now(trainer.device)
    start.restore()
    # L(θ′) draws on where the teacher's passes end; on the eager road, from its own stream.
    if not end.is_as(start):
        with branching_to(end):
            twin, report = taken()
        start.restore()
    for net, other in ((trainer.student, twin.student), (trainer.teacher, twin.teacher)):
        for (path, part), moved in (
            zip(net.named_modules(), other.modules(), strict=True) if net is not None else ()
        ):
            for name, value in vars(moved).items():
                if isinstance(value, int | float | str) and vars(part).get(name) != value:
                    raise MetaplError(
                        f"a network's {path}.{name} changes in a step, which no graph captures."
                    )
    return state_of(twin, updates_of(twin)), report


def refuse_other(before: State, found: Taken, expected: Taken) -> None:
    """Refuse a compiled step that is not the eager one: by h, both gradients, and the buffers."""

    def seen(state: State, report: Any) -> dict[str, dict[Any, Tensor]]:
        trees = {"h": dict(enumerate(pytree.tree_leaves(report.feedback)))}
        for role, held in (("student", state.inner.state), ("teacher", state.outer.state)):
            network, was = getattr(state, role), getattr(before, role).params
            # By first moments, in which gradients are; of a fresh Adam, a weight's move is a sign.
            params = network.params.items()
            moved = {
                n: held[n].get("exp_avg", held[n].get("momentum_buffer", t - was[n]))
                for n, t in params
            }
            trees |= {f"the {role}'s gradient": moved, f"the {role}'s buffers": network.state}
        return trees

    for role in ("student", "teacher"):
        was, there, here = (
            getattr(state, role).params for state in (before, expected[0], found[0])
        )
        for name in (
            n for n, p in was.items() if torch.equal(p, there[n]) and not torch.equal(p, here[n])
        ):
            raise MetaplError(
                f"no loss reaches the {role}'s {name}, which would decay; expected "
                "requires_grad=False."
            )
    ours, loss = seen(*found), expected[1].scalars["inner_loss"]
    for name, tree in seen(*expected).items():
        refuse_gap(name, ours[name], tree, loss, rounding=name == "h")


def refuse_gap(name: str, ours: Any, eager: Any, loss: Tensor, *, rounding: bool = False) -> None:
    """Refuse a tree that is not the eager one's values, by norm.

    ``rounding``: of scalars that cancel.
    """
    off = {n: as_real(ours[n]).double() - as_real(t).double() for n, t in eager.items()}
    gap, size = (norm(tree) if tree else 0.0 * loss for tree in (off, eager))
    least = 1e3 * torch.finfo(loss.dtype).eps * loss.abs() if rounding else 0.0
    if not bool(gap <= AGREES[loss.dtype] * size + least):
        raise MetaplError(
            f"compiled, {name} is {float(gap / size):.2g} off its eager value; leave compile out."
        )
