"""What a step has in it, or has changed, that may make a gradient wrong: looked for once it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metapl.data.held_values import names_written, numbers_of
from metapl.errors import few
from metapl.execution.graphs import nodes_of, types_in_graphs
from metapl.execution.state import trainable
from metapl.guards.verification.case import Case
from metapl.guards.verification.real_step import Evaluation, RealStep
from metapl.problems.base import kind_of, sum_and_weight
from metapl.updates import parameters_of, torch_parts_of


def likely_causes(case: Case) -> list[str]:
    """Return what is found in the problem, the networks and the batches of a step, in words."""
    before = case.step
    after = case.real.copies
    causes = []
    changing = changing_loss(case.real)
    if changing:
        causes.append(changing.removesuffix("."))
    hooked = []
    counting = []
    for part, part_after in pairs_of_parts(before, after):
        if part._forward_hooks or part._backward_hooks:
            hooked.append(type(part).__name__)
        for name, value in vars(part_after).items():
            if isinstance(value, int | float) and vars(part).get(name) != value:
                counting.append(name)
    if hooked:
        causes.append(f"hooks (of {few(hooked, 3)})")
    if counting:
        causes.append(f"attributes that a pass changes ({few(counting, 3)})")
    for optimizer in torch_parts_of(vars(before.update).get("optimizer")):
        times_held = Counter(map(id, parameters_of(optimizer)))
        twice = [name for name, p in trainable(before.student).items() if times_held[id(p)] > 1]
        if twice:
            causes.append(f"a weight that the inner optimizer holds twice ({few(twice, 3)})")
    functions = own_functions_in(case.real.outputs[-1])
    if functions:
        causes.append(f"autograd functions of the student's own ({few(functions, 3)})")
    return causes


def why_again(written: Sequence[str]) -> str:
    """Return why equal calls differ, by what they have written, and what was expected.

    Args:
        written: the names of the problem's numbers that a call writes; none for other state.
    """
    cause = (
        "random numbers of a generator of its own, or state outside of buffers that a call writes, "
        "such as a running sum in a global"
    )
    if written:
        cause = f"a call writes state of the problem ({few(written, 3)})"
    return f"{cause}; expected draws by torch, and what moves in a buffer of the teacher."


def changing_loss(real: Evaluation) -> str:
    """Return a sentence on the first loss that is another one when it is called again; "" for none.

    Modes call a loss more often than a real step does, so that it moves what it keeps more often.
    """
    copies = real.copies
    problem = copies.problem
    theta = trainable(copies.student)
    inner_batch = copies.inner_batches[0]
    signal = real.signals[0].detached()

    def inner_loss() -> Tensor:
        losses: Tensor = problem.inner_loss(real.outputs[0], signal, inner_batch, theta)
        return losses.mean()

    def outer_loss() -> Tensor:
        batch = problem.outer_batch(copies.outer_batch)
        total, weight = sum_and_weight(problem.outer_loss(real.outputs[-1].detach(), batch))
        return total / weight

    with copies.in_the_originals():
        for name, loss in (("inner_loss", inner_loss), ("outer_loss", outer_loss)):
            copies.random.restore()
            first = loss().detach()
            numbers_before = numbers_of(problem, copies.teacher)
            copies.random.restore()
            again = loss().detach()
            if not torch.allclose(first, again, rtol=0, atol=0, equal_nan=True):
                written = names_written(numbers_before, numbers_of(problem, copies.teacher))
                return (
                    f"{name} of {kind_of(problem)} returns another value when it is called again "
                    f"with the same arguments: {why_again(written)}"
                )
    return ""


def first_difference(real: Evaluation, again: Evaluation) -> str:
    """Return the first part of two equal steps in which they differ, in words; "" for none."""
    problem = kind_of(real.copies.problem)
    steps = zip(real.signals, again.signals, real.outputs, again.outputs, strict=False)
    for signal, signal_again, outputs, outputs_again in steps:
        fields_again = signal_again.fields()
        if any(not t.equal(fields_again[name]) for name, t in signal.fields().items()):
            return f"the signal of {problem}, or the teacher"
        if not outputs.equal(outputs_again):
            return "the student's outputs"
    if not real.inner_loss.equal(again.inner_loss):
        return f"the inner loss of {problem}"
    if not real.outputs[-1].equal(again.outputs[-1]):
        return "the student's outputs on the outer batch"
    return "" if real.loss.equal(again.loss) else f"the outer loss of {problem}"


def pairs_of_parts(before: RealStep, after: RealStep) -> list[tuple[nn.Module, nn.Module]]:
    """Return the modules of both networks before and after a step."""
    pairs: list[tuple[nn.Module, nn.Module]] = []
    for network, network_after in (
        (before.student, after.student),
        (before.teacher, after.teacher),
    ):
        if network is not None and network_after is not None:
            pairs += zip(network.modules(), network_after.modules(), strict=False)
    return pairs


def own_functions_in(t: Tensor) -> list[str]:
    """Return the names of a user's autograd functions in a graph."""
    names = {
        type(node).__name__.removesuffix("Backward")
        for node in nodes_of([t])
        if hasattr(node, "_forward_cls")
    }
    return sorted(names)


def coarsest_rounding(evaluation: Evaluation) -> float:
    """Return the rounding of the coarsest type in the graphs of an evaluation.

    0 where all are in float64.
    """
    ends = [evaluation.inner_loss, evaluation.outputs[-1]]
    for signal in evaluation.signals:
        ends += signal.fields().values()
    shorter = types_in_graphs(ends) - {torch.float64}
    return max((torch.finfo(dtype).eps for dtype in shorter), default=0.0)
