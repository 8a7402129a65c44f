"""When does the teacher's feedback help, which part of it acts, and what is it worth? Digits.

    python benchmarks/when.py                        # tune, then run; goes on where it was stopped
    python benchmarks/when.py --parts worth          # the arms of some questions alone
    python benchmarks/when.py --parts worth --workers 16   # several groups of runs at a time
    python benchmarks/when.py --write benchmarks/results/when.md   # put tables there, draw figure

Five questions compare each arm with the same loop without feedback: the length of the training
(``length``), which part of the feedback acts (``part``), a teacher whose labels are wrong
(``wrong``), the size of the outer batch (``outer``), and how many student steps it looks ahead
(``ahead``). The sixth, ``worth``, has UDA in every teacher, and gives every arm the processor time
of 6,000 steps of Meta Pseudo Labels (``mpl``), by :data:`WORTH`. **Its primary test, named before
it was run**: two labels a class, equal frequencies, ``mpl`` minus the arm that is best of the
others over the final seeds, by a two-sided paired sign-flip test over 40 seeds. Everything else is
descriptive. The arms of :data:`FORMS` came later and are no part of it: Algorithm 1 as it is
written, and as its authors use it; all other arms with feedback have the exact gradient.

Tuning: the settings of :data:`GRIDS`, equally many for each method of a comparison, on 5 seeds, by
the mean accuracy on 197 labeled validation images of the student or the finetuned student,
whichever is better. Final runs: other seeds, whose test images are read once, by the average of the
student's weights at the last step. Of the two students of an arm tables show the one that tuning
chose at equal time, and elsewhere the better one on the test images. All arms of a place see the
same pictures in the same order from the same weights for a seed. Uneven frequencies fall evenly
from 5 to 1, in an order that each seed draws.

All seeds of an arm take the pure step of :class:`metapl.BilevelTrainer` at once (:class:`Stack`).
The committed rows are older: the same steps written by hand (``when_stack.py``, last in commit
4a9de278) gave them, with the ratio of the feedback that of the norms at the teacher's outputs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from harness import RESULTS, Row, append, arguments, environment, every, parsed
from harness import read as lines_of
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import metapl
from metapl.functional import stack
from metapl.models import mlp
from metapl.pictures import load_digits_split
from metapl.pictures.views import base
from metapl.problems import EqualWeights

RAW = RESULTS / "when.jsonl"
CLASSES = 10
SIZES = [64, 32, 32, 10]
BATCH = 64
EMA_DECAY = 0.995
MOMENTUM = 0.9
# So many arms are trained side by side at most. What is stopped before it has rows begins again.
BESIDE = 9
# The same where there are several processes.
BESIDE_IN_PROCESS = 4

COMPILED = 3000
"""Trainings of so many steps are compiled, which takes as long as a thousand steps without."""

LABELED, UNLABELED, FINETUNING, BEFORE = range(4)
"""Streams of batches."""

Weights = dict[str, Tensor]
"""The weights of all seeds by name, (S, ...)."""

# ----------------------------------------------------------------------------------------- the arms


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How teacher and student are trained.

    ``feedback`` says what sets its size: ``"gradient"``: ``size`` is ``feedback_weight``, so that
    it dies with the student's rate; ``"learning_rate"``: the same for h divided by that rate;
    ``"ratio"``: ``size`` is ``feedback_ratio``; ``"none"``: there is none.

    Attributes:
        student_lr, teacher_lr: base rates of SGD, which a cosine takes to 0.
        momentum: the teacher's.
        alteration: that of the feedback, see :func:`altered`; ``"zero"``: none at these rates.
        own_loss: the teacher learns from the labeled batch too.
        lookahead: student steps a teacher step.
        uda: the weight of the teacher's consistency loss on unlabeled pictures,
            :class:`metapl.UDA`, whose prior is the labels' shares; 0: there is none.
        temperature, threshold, align: settings of that loss.
        mode: ``"reinforce"`` is with the mean of the labels' cross-entropies.
        similarity, baseline: settings of ``"reinforce"``.
    """

    student_lr: float = 1.0
    teacher_lr: float = 0.06
    momentum: float = MOMENTUM
    feedback: Literal["none", "gradient", "learning_rate", "ratio"] = "gradient"
    size: float = 1.0
    alteration: str | None = None
    own_loss: bool = True
    lookahead: int = 1
    uda: float = 0.0
    temperature: float = 1.0
    threshold: float = 0.0
    align: float = 0.0
    mode: Literal["forward", "reinforce"] = "forward"
    similarity: Literal["dot", "cosine"] = "dot"
    baseline: float | None = None


@dataclass(frozen=True)
class Arm:
    """A run over all seeds.

    Attributes:
        part: the question that it belongs to.
        method: its name there.
        tuned: the entry of ``GRIDS`` that its settings are chosen from.
        condition: what the teacher has learned before, see ``CONDITIONS``.
        labels: labels of a class, on average.
        steps: those of the teacher.
        outer: labeled pictures in a batch.
        uneven: how often the most frequent class is there for one of the least frequent.
        begins: the share of the steps after which the student begins, as the teacher's average.
            With 0 it begins at the start, with weights of its own; with 1 it never does, and the
            teacher is what is trained.
    """

    part: str
    method: str
    tuned: str
    condition: Condition = "right"
    labels: int = 2
    steps: int = 1500
    outer: int = BATCH
    alteration: str | None = None
    lookahead: int = 1
    uneven: int = 1
    begins: float = 0.0

    @property
    def group(self) -> tuple[Any, ...]:
        """Arms of one group see the same batches."""
        return (
            self.condition,
            self.labels,
            self.steps,
            self.outer,
            self.lookahead,
            self.uneven,
            self.begins,
        )

    @property
    def of_worth(self) -> bool:
        """Whether it is of the question at equal time, or of its tuning."""
        return "worth" in self.part

    @property
    def place(self) -> str:
        return (
            f"{self.labels} labels a class, {'equal' if self.uneven == 1 else f'1:{self.uneven}'} "
            "frequencies"
        )


Condition = Literal["right", "asymmetric", "style", "half"]
CONDITIONS: dict[Condition, str] = {
    "right": "no labels but the few right ones",
    "asymmetric": "30 % of all labels are of the next class",
    "style": "30 % of all labels are of the next class: one end of each class",
    "half": "50 of each class, from one end of it",
}


def _rules(**axes: Any) -> tuple[Rule, ...]:
    return tuple(Rule(**settings) for settings in every(**axes))


STUDENT_LR = (0.5, 1.0)
SIZES_OF = {
    "gradient": (0.3, 1.0, 3.0),
    "learning_rate": (0.1, 0.3, 1.0),
    "ratio": (0.03, 0.1, 0.3),
}
LONG_RATES: dict[str, Any] = {
    "feedback": "none",
    "student_lr": STUDENT_LR,
    "teacher_lr": (0.06, 0.12, 0.24),
}
# Each method has six configurations beside right labels.
METHODS: dict[str, tuple[Rule, ...]] = {
    "none": _rules(feedback="none", student_lr=STUDENT_LR, teacher_lr=(0.03, 0.06, 0.12)),
    **{
        feedback: _rules(feedback=feedback, student_lr=STUDENT_LR, size=sizes)
        for feedback, sizes in SIZES_OF.items()
    },
}
# Four configurations of each, after a teacher has learned wrong labels.
WRONG: dict[str, tuple[Rule, ...]] = {
    "fixed": _rules(feedback="none", own_loss=False, student_lr=(0.25, 0.5, 1.0, 2.0)),
    "alone": _rules(feedback="learning_rate", own_loss=False, size=(0.03, 0.1, 0.3, 1.0)),
    "own": _rules(feedback="none", teacher_lr=(0.01, 0.03, 0.06, 0.12)),
    "own_and_feedback": _rules(feedback="learning_rate", teacher_lr=(0.03, 0.06), size=(0.3, 1.0)),
}
# Of arms of 6,000 steps that were added when the others had been seen: the control tuned at its
# length, on a grid that its choice at 1,500 steps is in the middle of, and UDA as a loss of the
# teacher.
LATER: dict[str, tuple[Rule, ...]] = {
    "none_long": _rules(**LONG_RATES),
    "none_uda": _rules(**LONG_RATES, uda=1.0),
    "gradient_uda": _rules(
        feedback="gradient", uda=1.0, student_lr=STUDENT_LR, size=(0.3, 1.0, 3.0)
    ),
}

ALONE = {"uda": 1.0, "feedback": "none", "teacher_lr": (0.03, 0.06, 0.12, 0.24)}
PAIR = {"uda": 1.0, "teacher_lr": (0.03, 0.06), "temperature": (1.0, 0.5)}
SCALAR = {"mode": "reinforce"}
# Measured on compiled steps of 40 seeds, by turns with forward's: dot 0.95, cosine 0.96 (none
# 0.65).
COST_OF_SCALAR = 0.95
WORTH: dict[str, tuple[float, float, tuple[Rule, ...]]] = {
    "uda": (0.404, 1.0, _rules(**ALONE, temperature=(1.0, 0.5))),
    "uda_aligned": (0.418, 1.0, _rules(**ALONE, temperature=(1.0, 0.5), align=1.0)),
    "fixmatch": (0.432, 1.0, _rules(**ALONE, temperature=0.0, threshold=(0.8, 0.95))),
    "mpl": (1.0, 0.0, _rules(**PAIR, size=(1.0, 3.0))),
    "none": (0.611, 0.0, _rules(**PAIR, feedback="none", student_lr=STUDENT_LR)),
    "push": (0.72, 0.0, _rules(**PAIR, feedback="ratio", alteration="balance", size=(0.1, 0.3))),
    "late": (0.553, 0.75, _rules(**PAIR, size=(1.0, 3.0))),
    # No part of the primary test: what the feedback adds where the teacher's own labels are
    # aligned.
    "mpl_aligned": (1.014, 0.0, _rules(**PAIR, align=1.0, size=(1.0, 3.0))),
    "none_aligned": (0.625, 0.0, _rules(**PAIR, align=1.0, feedback="none", student_lr=STUDENT_LR)),
    # Neither are these. 1 is the weight of both in the paper; a cosine is mostly larger than a
    # product.
    "algorithm_1": (COST_OF_SCALAR, 0.0, _rules(**PAIR, **SCALAR, size=(1.0, 3.0))),
    "authors": (
        COST_OF_SCALAR,
        0.0,
        _rules(**PAIR, **SCALAR, similarity="cosine", baseline=0.99, size=(0.3, 1.0)),
    ),
}
"""Of each method the processor time of a step relative to one of ``mpl``, when its student begins,
and its eight configurations, which are tried in every place. The times were measured on two idle
cores with the networks that the committed rows are of, and fixed before the study was run; of the
aligned two: without alignment, and what it adds to UDA. Drawing the batches is left out."""

FORMS = ("algorithm_1", "authors")
"""The forms of Algorithm 1, whose arms came after all others."""

PLACES = (2, 1), (4, 1), (2, 5), (4, 5)
"""Labels a class, and how uneven: the first is that of the primary test."""

LENGTHS, OUTER, AHEAD, LONGEST = (1500, 6000, 24000), (16, 256), (2, 5, 10), 3
"""Steps, sizes of the outer batch, and student steps a teacher step that are compared; of the last,
rows of more than ``LONGEST`` stay as they were found: the pure step looks no further."""

ALTERATIONS_OF_WRONG = "permuted", "class_means", "own_class_means", "within_class"
ALTERATIONS = (
    *("permuted", "class_means", "rest", "own_class_means", "within_class"),
    *("one_number", "sign", "random_sign", "negated"),
)


def _arms() -> Iterator[Arm]:
    def lengths(steps: int, labels: int, methods: Sequence[str] = (*METHODS,)) -> list[Arm]:
        return [Arm("length", method, method, labels=labels, steps=steps) for method in methods]

    def altered(method: str, alterations: Sequence[str], **settings: Any) -> list[Arm]:
        return [
            Arm(method=f"{method} {alteration}", tuned=method, alteration=alteration, **settings)
            for alteration in alterations
        ]

    def wrong(condition: Condition) -> list[Arm]:
        settings: dict[str, Any] = {"part": "wrong", "condition": condition, "labels": 4}
        arms = [Arm(method=method, tuned=method, **settings) for method in WRONG]
        return arms + altered("alone", ALTERATIONS_OF_WRONG, **settings)

    def lookahead(unit: str) -> list[Arm]:
        """Return arms with as many student steps, or as many teacher steps."""
        arms = []
        for K, method in itertools.product(AHEAD, ("none", "gradient")):
            steps = 1500 // K if unit == "student steps" else 1500
            arms.append(Arm("ahead", f"{method} as many {unit}", method, steps=steps, lookahead=K))
        return arms

    short, long, longest = LENGTHS
    yield from [*lengths(short, 4), *lengths(short, 2)]
    # The control is tuned by itself; this one has the rates of the feedback.
    for steps in (long, short):
        yield from altered("gradient", ["zero"], part="length", steps=steps)
    # The weight keeps what a part of h has; the ratio gives every part the same size.
    yield from altered("gradient", ALTERATIONS, part="part")
    yield from altered("ratio", ("balance", "rest"), part="part")
    yield from [*wrong("style"), *lengths(long, 2)[:3], *lookahead("student steps")]
    yield from (
        Arm("outer", method, method, outer=outer)
        for outer in OUTER
        for method in ("none", "gradient")
    )
    yield from [*wrong("asymmetric"), *wrong("half")]
    yield from altered("ratio", [name for name in ALTERATIONS if name != "rest"], part="part")
    yield from [
        *lengths(long, 2)[3:],
        *lengths(long, 4),
        *lengths(longest, 2),
        *lengths(longest, 4),
    ]
    yield from [
        *lookahead("teacher steps"),
        *altered("ratio", ["balance"], part="length", steps=long),
    ]
    yield from lengths(long, 2, (*LATER,))
    for (labels, uneven), (method, (cost, begins, _)) in itertools.product(PLACES, WORTH.items()):
        arm = Arm(
            "worth",
            method,
            "",
            labels=labels,
            steps=round(6000 / cost),
            uneven=uneven,
            begins=begins,
        )
        yield dataclasses.replace(arm, tuned=f"{method}, {arm.place}")


ARMS: tuple[Arm, ...] = tuple(_arms())
"""In the order in which they are run."""

PARTS = tuple(dict.fromkeys(arm.part for arm in ARMS))
GRIDS: dict[str, tuple[Arm, tuple[Rule, ...]]] = {
    **{name: (Arm("tuning", name, name), rules) for name, rules in METHODS.items()},
    **{name: (Arm("tuning", name, name, steps=LENGTHS[1]), rules) for name, rules in LATER.items()},
    **{
        name: (Arm("tuning", name, name, "style", labels=4), rules) for name, rules in WRONG.items()
    },
    **{
        arm.tuned: (dataclasses.replace(arm, part="tuning of worth"), WORTH[arm.method][2])
        for arm in ARMS
        if arm.part == "worth"
    },
}
"""What is chosen from: the configurations of a method, and where they are tried."""


# The seeds for tuning, and those for final runs.
SEEDS = {
    "worth": (tuple(range(110, 115)), tuple(range(300, 340))),
    "others": (tuple(range(100, 105)), tuple(range(200, 220))),
    "miniature": ((100,), (200, 201)),
}
FINETUNED = 200
"""Steps of finetuning."""
TAUGHT = 1500
"""Steps of a teacher on wrong labels."""


@dataclass(frozen=True)
class Size:
    """How much is run.

    In miniature two steps of all that there is, and one configuration of each.
    """

    miniature: bool = False

    def steps(self, steps: int) -> int:
        return 2 if self.miniature else steps

    def seeds(self, arm: Arm, final: bool) -> tuple[int, ...]:
        if self.miniature:
            name = "miniature"
        elif arm.of_worth:
            name = "worth"
        else:
            name = "others"
        for_tuning, for_final_runs = SEEDS[name]
        return for_final_runs if final else for_tuning


# ----------------------------------------------------------------------------------------- the step


class Altered(torch.autograd.Function):
    """The soft labels (B, C) themselves, whose gradient, which is -h, is altered."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, alteration: str, drawn: Tensor | None) -> Tensor:
        return q.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str, Tensor | None], output: Tensor) -> None:
        q, ctx.alteration, drawn = inputs
        ctx.save_for_backward(q, drawn)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        q, drawn = ctx.saved_tensors
        return altered(g, q, ctx.alteration, drawn), None, None


def altered(g: Tensor, q: Tensor, alteration: str, drawn: Any = None) -> Tensor:
    """Return -h as the controls have it, from -h and the labels, (B, C) each.

    Three are those of :class:`metapl.ablation.Altered`.
    """
    # The rows of other examples.
    if alteration == "permuted":
        return g[drawn]
    if alteration == "random_sign":
        return g * drawn[:, None]
    if alteration == "negated":
        return -g
    # The sign, at the mean size in the batch.
    if alteration == "sign":
        return g.sign() * g.abs().mean()
    # There is no h at all, but what descends the cross-entropy of the mean label against equal
    # frequencies.
    if alteration == "balance":
        return -(1 / (q.shape[0] * q.shape[1] * q.mean(0))).expand_as(q)
    mean = g.mean(0).expand_as(g)
    # The teacher's most probable class.
    is_top_class = (q.argmax(-1, keepdim=True) == torch.arange(q.shape[1])).to(g)
    sizes = is_top_class.sum(0)[:, None].clamp_min(1)
    means_of_class = is_top_class @ (is_top_class.T @ g / sizes)
    parts = {
        "class_means": mean,
        "rest": g - mean,
        "own_class_means": means_of_class,
        "within_class": g - means_of_class,
        "one_number": is_top_class * g,
    }
    return parts[alteration]


@dataclass(frozen=True)
class Labels(metapl.PseudoLabels):
    """Meta Pseudo Labels with altered feedback.

    An unlabeled batch is (weak, strong), and what is drawn to alter it.
    """

    alteration: str | None = None

    def teacher_input(self, batch: Any) -> Any:
        return batch[0]

    def student_input(self, batch: Any) -> Any:
        return batch[1]

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        if self.alteration is not None:
            drawn = batch[2] if len(batch) == 3 else None
            signal = signal.having({"value": Altered.apply(signal.value, self.alteration, drawn)})
        return super().inner_loss(outputs, signal, batch, params)


@dataclass(frozen=True)
class NoTeacher(EqualWeights):
    """A network alone: cross-entropy of (x, y), and UDA where a batch is (x, y, weak, strong)."""

    uda: metapl.UDA

    def student_input(self, batch: Any) -> Tensor:
        return torch.cat([batch[0], *batch[2:]])

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        """Return losses (B,), of which the mean is the sum of the two losses."""
        z, *views = outputs.split([len(x) for x in (batch[0], *batch[2:])])
        losses = [F.cross_entropy(z, batch[1], reduction="none") / len(z)]
        if views:
            weak, strong = views
            consistency = F.cross_entropy(
                strong, self.uda.target(weak.detach()), reduction="none"
            ) / len(strong)
            losses += [torch.zeros_like(consistency), self.uda.weight * consistency]
        return len(outputs) * torch.cat(losses)


def trainer(
    rule: Rule, teacher: nn.Module | None, student: nn.Module, prior: Any = None
) -> metapl.BilevelTrainer:
    """Return the library's trainer, for one seed.

    Without a teacher the student takes its place, its rate and its losses.
    """
    uda = metapl.UDA(rule.temperature, rule.threshold, rule.uda, align=rule.align, prior=prior)
    if teacher is None:
        optimizer = torch.optim.SGD(
            student.parameters(), lr=rule.teacher_lr, momentum=rule.momentum
        )
        return metapl.BilevelTrainer(
            None, student, "none", problem=NoTeacher(uda), inner_optimizer=optimizer
        )
    losses: list[Any] = []
    if rule.own_loss:
        losses.append(metapl.CrossEntropy())
    if rule.uda:
        losses.append(uda)
    silent = rule.feedback == "none" or rule.alteration == "zero"
    normalization: Any = "learning_rate" if rule.feedback == "learning_rate" else "gradient"
    estimator: metapl.feedback.Estimator = metapl.feedback.Forward(normalization=normalization)
    if rule.mode == "reinforce":
        estimator = metapl.feedback.Reinforce(
            similarity=rule.similarity,
            baseline=rule.baseline,
            normalization=normalization,
            reduction="mean",
        )
    size = {"feedback_ratio" if rule.feedback == "ratio" else "feedback_weight": rule.size}
    return metapl.BilevelTrainer(
        teacher,
        student,
        "none" if silent else estimator,
        problem=Labels(
            kind="hard" if rule.mode == "reinforce" else "soft",
            alteration=None if rule.alteration == "zero" else rule.alteration,
        ),
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=rule.student_lr),
        outer_optimizer=torch.optim.SGD(
            teacher.parameters(), lr=rule.teacher_lr, momentum=rule.momentum
        ),
        teacher_losses=losses,
        lookahead=rule.lookahead,
        **({} if silent else size),  # type: ignore[arg-type]
    )


class Stacked:
    """Networks of several seeds, with their teachers, that take their trainers' pure step at once.

    The step is recorded once as operations on the tensors of all seeds: of networks this small,
    most of a step would be the dispatch of ``vmap``. (What is recorded may be compiled.
    ``torch.compile`` of the step itself loses the gradient of :class:`Altered`.) Stacks of a
    ``kind`` share what is recorded: rates are tensors of the state.
    """

    graphs: ClassVar[dict[Any, Any]] = {}

    def __init__(
        self, trainers: Sequence[metapl.BilevelTrainer], kind: Any = None, compiled: bool = False
    ) -> None:
        # The steps of all seeds are one function, which differs in its state alone.
        self.single_step, first_state = trainers[0].functional()
        states = [first_state]
        for trainer_of_seed in trainers[1:]:
            _, state = trainer_of_seed.functional()
            states.append(state)
        self.student = trainers[0].student
        self.state = stack(states)
        self.kind = object() if kind is None else kind
        self.compiled = compiled
        self.rates = [
            [group["lr"] for group in self.state.inner.settings],
            [group["lr"] for group in self.state.outer.settings],
        ]

    def step(
        self,
        outer: Any,
        inner: Any,
        of_student: float,
        of_teacher: float = 1.0,
        noise: Tensor | None = None,
    ) -> None:
        """Take one step of all seeds, at these factors of their learning rates.

        ``noise`` (S, B, C) draws labels.
        """
        optimizers = []
        for optimizer, rates, factor in zip(
            (self.state.inner, self.state.outer), self.rates, (of_student, of_teacher), strict=True
        ):
            settings = []
            for group, rate in zip(optimizer.settings, rates, strict=True):
                settings.append(group | {"lr": factor * rate})
            optimizers.append(optimizer._replace(settings=settings))
        state = self.state._replace(inner=optimizers[0], outer=optimizers[1])
        arguments: tuple[Any, ...] = (state, outer, inner)
        if noise is not None:
            arguments = (*arguments, noise)
        shapes = tuple(t.shape for t in torch.utils._pytree.tree_leaves(arguments[1:]))
        key = (self.kind, self.compiled, shapes, self.rates[0][0].dtype)
        if key not in self.graphs:
            graph = make_fx(lambda *args: vmap(self.single_step)(*args)[0])(*arguments)
            graph.graph.eliminate_dead_code()
            graph.recompile()
            self.graphs[key] = torch.compile(graph, dynamic=False) if self.compiled else graph
        self.state = self.graphs[key](*arguments)

    @torch.no_grad()
    def outputs(self, x: Tensor, params: Weights | None = None) -> Tensor:
        """Return all seeds' outputs, (S, n, C), of the students or by other networks' weights."""
        weights = self.state.student.params if params is None else params
        outputs: Tensor = vmap(functional_call, (None, 0, 0))(self.student, weights, x)
        return outputs


class Stack(Stacked):
    """Pairs of a teacher and a student, a pair a seed, by a rule.

    Without teachers the students are what learns from the labels. ``average`` is that of the
    students' weights, as a fit takes it.
    """

    def __init__(
        self,
        rule: Rule,
        teachers: Sequence[nn.Module] | None,
        students: Sequence[nn.Module],
        prior: Any = None,
        compiled: bool = False,
    ) -> None:
        self.rule = rule
        self.alone = teachers is None
        pairs = zip(teachers or [None] * len(students), students, strict=True)
        kind = (
            dataclasses.replace(rule, student_lr=0, teacher_lr=0),
            self.alone,
            prior,
            next(students[0].parameters()).dtype,
        )
        super().__init__([trainer(rule, *pair, prior) for pair in pairs], kind, compiled)
        self.average = self.state.student.params
        self.steps_done = 0

    def step(
        self,
        outer: Any,
        inner: Any,
        rate: float,
        student_rate: float | None = None,
        noise: Tensor | None = None,
    ) -> None:
        """Take one step of all seeds, at this factor of the learning rates.

        The student's may be another.
        """
        of_student = rate if self.alone or student_rate is None else student_rate
        super().step(outer, inner, of_student, rate, noise=noise)
        decay = min(EMA_DECAY, (1 + self.steps_done) / (10 + self.steps_done))
        params = self.state.student.params
        self.average = {name: t.lerp(params[name], 1 - decay) for name, t in self.average.items()}
        self.steps_done += 1

    def going_on_from(self, finished: Stack, averaged: bool = False) -> Stack:
        """Return the stack, its teachers begun as the networks of another one that had none.

        With ``averaged`` its students begin as their average.
        """
        self.state = self.state._replace(teacher=finished.state.student)
        if averaged:
            student = self.state.student._replace(params=finished.average)
            self.state = self.state._replace(outer=finished.state.inner, student=student)
            self.average = finished.average
        return self


def cosine(step: int, steps: int) -> float:
    """Return the factor of the learning rates.

    It is that of :class:`metapl.training.FitOptions` without a warm-up.
    """
    return 0.5 * (1 + math.cos(math.pi * step / steps))


# ----------------------------------------------------------------------------------------- the data


@dataclass(frozen=True, eq=False)
class Data:
    """The digits of a stack of seeds: pictures (S, n, 64), and labels (S, n)."""

    labeled: tuple[Tensor, Tensor]
    unlabeled: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def apportioned(shares: Sequence[float], total: int) -> list[int]:
    """Return whole numbers in these proportions, at least 1 each.

    >>> apportioned([5, 4, 1], 20)
    [10, 8, 2]
    """
    exact = total * np.asarray(shares, dtype=float) / sum(shares)
    counts = np.maximum(1, exact.astype(int))
    for _ in range(total - counts.sum()):
        counts[np.argmax(exact - counts)] += 1
    return [int(n) for n in counts]


@lru_cache(maxsize=4)
def drawn(labels: int, seeds: tuple[int, ...], uneven: int = 1) -> Data:
    """Return the splits of these seeds.

    The labels of the unlabeled pictures are for diagnostics, and to make wrong ones. Of uneven
    classes the most frequent is number 0, so that one list of shares is that of every seed.
    """
    falling = np.linspace(uneven, 1, CLASSES)
    few = apportioned(falling, labels * CLASSES)
    parts: list[list[tuple[Tensor, Tensor]]] = []
    for seed in seeds:
        split = load_digits_split(max(few), seed)
        truth = split.unlabeled, split.unlabeled_truth
        four = [split.labeled, truth, split.validation, split.test]
        if uneven > 1:
            order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(seed))
            four = [(x, order.argsort()[y]) for x, y in four]
            many = int(truth[1].bincount(minlength=CLASSES).min())
            for part, counts in enumerate(
                (few, [round(many * share / uneven) for share in falling])
            ):
                x, y = four[part]
                rows = torch.cat([(y == c).nonzero()[:n, 0] for c, n in enumerate(counts)])
                four[part] = x[rows], y[rows]
        parts.append([(x.flatten(1), y) for x, y in four])
    columns = [
        tuple(map(torch.stack, zip(*part, strict=True))) for part in zip(*parts, strict=True)
    ]
    return Data(*columns)  # type: ignore[arg-type]


def prior_of(arm: Arm) -> tuple[float, ...] | None:
    """Return the shares of the classes among the labels; None: equal ones."""
    counts = apportioned(np.linspace(arm.uneven, 1, CLASSES), arm.labels * CLASSES)
    return None if arm.uneven == 1 else tuple(n / sum(counts) for n in counts)


SHARE = 0.3
KEPT = 50


def wrongly_labeled(condition: Condition, x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return what the teacher learns before: pictures and labels.

    Two ends of a class are those along the direction in which its pictures differ most, its first
    principal component.
    """
    noise = torch.rand(len(y), generator=torch.Generator().manual_seed(seed))
    ranks = torch.empty(len(y))
    for c in range(CLASSES):
        mine = (y == c).nonzero()[:, 0]
        centered = x[mine].double() - x[mine].double().mean(0)
        along = centered @ torch.linalg.svd(centered, full_matrices=False).Vh[0]
        score = noise[mine].double() if condition == "asymmetric" else along
        ranks[mine] = score.argsort().argsort().float()
        if condition != "half":
            ranks[mine] /= len(mine)
    if condition == "half":
        is_kept = ranks < KEPT
        return x[is_kept], y[is_kept]
    return x, torch.where(ranks < SHARE, (y + 1) % CLASSES, y)


CHUNK = 25
"""Steps whose batches are drawn at once. Another number gives other draws."""

SHIFT = 1
NOISE = 0.2
CUTOUT = 2
SIDE = 8
"""Of the digits' view, :class:`metapl.pictures.ShiftNoiseCutout`, and a picture's side."""


def views(
    pictures: Tensor, seeds: Sequence[int], stream: int, batch: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a stack's batches in shuffled epochs: which pictures, (S, B), and views, (S, B, 64).

    They have the distribution of :class:`metapl.pictures.ShiftNoiseCutout`, from pseudo-random
    numbers that take a tenth of the time: all shifts of all pictures are made once, and looked up.
    What a seed sees does not depend on what else is in the stack, and more batches begin with the
    same ones.

    Args:
        pictures: (S, n, 64).
        stream: keeps apart what is drawn for different purposes.
    """
    count = pictures.shape[1], batch * steps
    order = torch.stack([shuffled(*count, seed, stream) for seed in seeds]).unflatten(
        1, (steps, batch)
    )
    generators = [torch.Generator().manual_seed(1_000 * seed + stream) for seed in seeds]
    table = torch.stack([shifted(pictures_of_seed) for pictures_of_seed in pictures])
    _, shifts, n, _ = table.shape
    table = table.flatten(0, 2)
    # Of the square that is left out.
    corners = torch.tensor([*itertools.product(range(SIDE - CUTOUT + 1), repeat=2)])
    holes = (
        base.cutout(torch.ones(len(corners), 1, SIDE, SIDE), corners, CUTOUT, 0.0)
        .flatten(1)
        .to(pictures)
    )
    # The rows of each chunk are (T, S, B).
    for rows in order.transpose(0, 1).split(CHUNK):
        place = torch.empty((len(seeds), CHUNK, batch), dtype=torch.int64)
        noise = torch.empty((*place.shape, SIDE * SIDE))
        for s, generator in enumerate(generators):
            place[s].random_(0, shifts * len(holes), generator=generator)
            noise[s].normal_(generator=generator)
        place = place.transpose(0, 1)[: len(rows)]
        noise = noise.transpose(0, 1)[: len(rows)]
        first = torch.arange(len(seeds))[:, None] * shifts + place % shifts
        seen = (
            table[first * n + rows]
            .add_(noise.to(pictures), alpha=NOISE)
            .mul_(holes[place // shifts])
        )
        yield from zip(rows, seen, strict=True)


def shifted(pictures: Tensor) -> Tensor:
    """Return the pictures, (n, 64), moved by each pair of (-1, 0, 1): (9, n, 64)."""
    images = pictures.unflatten(-1, (1, SIDE, SIDE))
    steps = range(-SHIFT, SHIFT + 1)
    moves = [torch.tensor(move).expand(len(images), 2) for move in itertools.product(steps, steps)]
    return torch.stack([base.crop_flip(images, move, None, 0.0).flatten(1) for move in moves])


def shuffled(count: int, length: int, seed: int, stream: int) -> Tensor:
    """Return the first so many of an endless stream of shuffled epochs."""
    epochs = -(-length // count)
    keys = torch.rand(
        epochs, count, generator=torch.Generator().manual_seed(1_000 * seed + 500 + stream)
    )
    return keys.argsort(1).flatten()[:length]


def drawn_to_alter(alteration: str | None, seeds: Sequence[int], step: int) -> tuple[Tensor, ...]:
    """Return the permutations or signs that :class:`metapl.ablation.Altered` draws, if any.

    They are those of these seeds in a step.
    """
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + step) for seed in seeds]
    if alteration == "permuted":
        return (torch.stack([torch.randperm(BATCH, generator=g) for g in generators]),)
    if alteration == "random_sign":
        bits = torch.stack([torch.randint(0, 2, (BATCH,), generator=g) for g in generators])
        return (2 * bits - 1,)
    return ()


def drawn_to_label(seeds: Sequence[int], steps: int) -> Iterator[Tensor]:
    """Yield Gumbel's noise of each step, (S, B, C), by which labels are drawn: -log(-log u).

    What a seed draws does not depend on what else is in the stack.
    """
    generators = [torch.Generator().manual_seed(1_000 * seed + 700) for seed in seeds]
    for first in range(0, steps, CHUNK):
        shape = (min(CHUNK, steps - first), BATCH, CLASSES)
        uniform = torch.stack(
            [torch.rand(shape, generator=generator) for generator in generators], 1
        )
        # A 0 would be drawn by no label.
        yield from uniform.clamp_min(1e-20).log().neg().log().neg()


# ----------------------------------------------------------------------------------------- the runs


def first_networks(seeds: Sequence[int]) -> tuple[list[nn.Module], ...]:
    """Return teachers and students as they begin."""
    pairs = []
    for seed in seeds:
        torch.manual_seed(seed)
        pairs.append((mlp(SIZES), mlp(SIZES)))
    return tuple(map(list, zip(*pairs, strict=True)))


def supervised(
    networks: Stack, x: Tensor, y: Tensor, seeds: Sequence[int], stream: int, steps: int
) -> Stack:
    """Return networks without teachers, after so many steps on these labels."""
    for step, (rows, seen) in enumerate(views(x, seeds, stream, BATCH, steps)):
        batch = seen, y.gather(1, rows)
        networks.step(batch, batch, cosine(step, steps))
    return networks


@lru_cache(maxsize=8)
def taught(condition: Condition, labels: int, seeds: tuple[int, ...], steps: int) -> Stack:
    """Return a stack that has learned wrong labels."""
    pictures, truth = drawn(labels, seeds).unlabeled
    pairs = [
        wrongly_labeled(condition, x, y, seed)
        for x, y, seed in zip(pictures, truth, seeds, strict=True)
    ]
    x, labels_of_x = map(torch.stack, zip(*pairs, strict=True))
    teachers, _ = first_networks(seeds)
    return supervised(Stack(Rule(), None, teachers), x, labels_of_x, seeds, BEFORE, steps)


def train(arm: Arm, rules: Sequence[Rule], seeds: tuple[int, ...], size: Size) -> list[Stack]:
    """Return stacks that are trained side by side on the batches of an arm."""
    data = drawn(arm.labels, seeds, arm.uneven)
    steps = size.steps(arm.steps)
    prior = prior_of(arm)
    teachers, students = first_networks(seeds)
    begins = round(arm.begins * steps)
    compiled = steps >= COMPILED

    alone = partial(Stack, prior=prior, compiled=compiled, students=teachers)
    together = partial(Stack, prior=prior, compiled=compiled, students=students)
    stacks = [alone(rule, None) if begins else together(rule, teachers) for rule in rules]
    if arm.condition != "right":
        first = taught(arm.condition, arm.labels, seeds, size.steps(TAUGHT))
        stacks = [stacked.going_on_from(first) for stacked in stacks]
    unlabeled = views(data.unlabeled[0], seeds, UNLABELED, BATCH, steps * arm.lookahead)
    labels = drawn_to_label(seeds, steps)
    all_seeds = torch.arange(len(seeds))[:, None]
    for step, (rows, seen) in enumerate(views(data.labeled[0], seeds, LABELED, arm.outer, steps)):
        batch = seen, data.labeled[1].gather(1, rows)
        pairs = [
            (data.unlabeled[0][all_seeds, rows_of_pair], strong)
            for rows_of_pair, strong in itertools.islice(unlabeled, arm.lookahead)
        ]
        rates = cosine(step, steps), cosine(max(0, step - begins), max(1, steps - begins))
        noise = next(labels) if any(rule.mode == "reinforce" for rule in rules) else None
        if begins and step == begins:
            stacks = [
                together(stacked.rule, teachers).going_on_from(stacked, averaged=True)
                for stacked in stacks
            ]
        for stacked in stacks:
            if stacked.alone:
                stacked.step(batch, (*batch, *pairs[0]), rates[0])
                continue
            extra = drawn_to_alter(stacked.rule.alteration, seeds, step)
            inner = tuple((*pair, *extra) for pair in pairs)
            noise_of_rule = noise if stacked.rule.mode == "reinforce" else None
            stacked.step(
                batch, inner if arm.lookahead > 1 else inner[0], *rates, noise=noise_of_rule
            )
    return stacks


def accuracies(classes: Tensor, truth: Tensor, uneven: int = 1) -> list[float]:
    """Return the accuracy of each seed, as if the classes had their shares."""
    shares = torch.linspace(uneven, 1, CLASSES, dtype=torch.float64)
    counts = torch.stack([truth_of_seed.bincount(minlength=CLASSES) for truth_of_seed in truth])
    if uneven == 1:
        weight = torch.ones(truth.shape, dtype=torch.float64)
    else:
        weight = (shares / counts).gather(1, truth)
    right = (classes == truth) * weight
    return [round(float(share), 5) for share in right.sum(1) / weight.sum(1)]


def row_of(
    arm: Arm, rule: Rule, stack: Stack, seeds: tuple[int, ...], size: Size, final: bool
) -> Row:
    """Return a row: tuning runs read the validation pictures, final runs the test pictures."""
    data = drawn(arm.labels, seeds, arm.uneven)

    def accuracies_of(weights: Weights, part: str) -> list[float]:
        x, y = getattr(data, part)
        uneven = 1 if part == "unlabeled" else arm.uneven
        return accuracies(stack.outputs(x, weights).argmax(-1), y, uneven)

    steps = size.steps(arm.steps)
    part = "test" if final else "validation"
    tuned = Stack(Rule(teacher_lr=0.02, momentum=0.0), None, first_networks(seeds)[0])
    tuned.state = tuned.state._replace(student=tuned.state.student._replace(params=stack.average))
    supervised(tuned, *data.labeled, seeds, FINETUNING, size.steps(FINETUNED))
    row: Row = {
        "final": final,
        **dataclasses.asdict(arm),
        "steps_run": steps,
        "rule": dataclasses.asdict(rule),
    }
    row["seeds"] = list(seeds)
    row["student"] = accuracies_of(stack.average, part)
    row["finetuned"] = accuracies_of(tuned.state.student.params, part)
    if final:
        teacher = (stack.state.student if stack.alone else stack.state.teacher).params
        x, truth = data.unlabeled
        calls = stack.outputs(x, stack.average).argmax(-1)
        count_of_calls = torch.stack([classes.bincount(minlength=CLASSES) for classes in calls])
        count_of_truth = torch.stack([classes.bincount(minlength=CLASSES) for classes in truth])
        # Total variation of the frequencies.
        error = (count_of_calls - count_of_truth).abs().sum(1) / (2 * x.shape[1])
        row["teacher"] = accuracies_of(teacher, part)
        row["labels_right"] = accuracies_of(teacher, "unlabeled")
        row["frequency_error"] = [round(float(share), 5) for share in error]
    return row


# ----------------------------------------------------------------------------------- running it all


def read(raw: Path = RAW) -> list[Row]:
    """Return the rows of runs so far, with the defaults of what older ones do not name."""
    defaults = {"uneven": 1, "begins": 0.0}
    return [{**defaults, **row} for row in lines_of(raw, "method")]


def arm_of(row: Row) -> Arm:
    return Arm(**{field.name: row[field.name] for field in dataclasses.fields(Arm)})


def run_group(group: Sequence[tuple[Arm, Rule]], size: Size, final: bool) -> list[Row]:
    """Return the rows of jobs that see the same batches, run side by side."""
    torch.set_num_threads(1)
    began = time.process_time()
    arm = group[0][0]
    seeds = size.seeds(group[0][0], final)
    with torch.no_grad():
        stacks = train(arm, [rule for _, rule in group], seeds, size)
        rows = [
            row_of(*job, stack, seeds, size, final)
            for job, stack in zip(group, stacks, strict=True)
        ]
    seconds = round((time.process_time() - began) / len(group), 1)
    return [{**row, "seconds": seconds} for row in rows]


SECONDS_OF_ARM = {False: 11, True: 95}
"""Of one core, of a tuning run and of a final one at equal time, as the committed rows have it."""


def run_missing(
    jobs: Sequence[tuple[Arm, Rule]], size: Size, raw: Path, final: bool, workers: int = 1
) -> None:
    """Run what the raw file does not hold yet.

    Jobs that see the same batches run side by side, and with several workers fewer of them, in a
    process each.
    """
    done = [(row["final"], row["steps_run"], arm_of(row), Rule(**row["rule"])) for row in read(raw)]
    missing = [job for job in jobs if (final, size.steps(job[0].steps), *job) not in done]
    if missing:
        append(
            raw,
            {"made_with": environment(), "seeds": SEEDS, "finetuned": FINETUNED, "taught": TAUGHT},
        )
    same = [
        [*jobs]
        for _, jobs in itertools.groupby(missing, key=lambda job: (job[0].of_worth, job[0].group))
    ]
    most = BESIDE if workers == 1 else BESIDE_IN_PROCESS
    groups = [jobs[first : first + most] for jobs in same for first in range(0, len(jobs), most)]
    of_worth = sum(arm.of_worth for arm, _ in missing)
    if of_worth:
        minutes = of_worth * SECONDS_OF_ARM[final] / 60
        print(
            f"{of_worth} {'final' if final else 'tuning'} runs at equal time: some {minutes:.0f} "
            "minutes of one core"
        )
    for number, rows in enumerate(rows_of_groups(groups, size, final, workers), 1):
        append(raw, *rows)
        group = arm_of(rows[0]).group
        seconds = rows[0]["seconds"]
        print(
            f"{number}/{len(groups)} groups: {len(rows)} runs of {group}, {seconds} s each",
            flush=True,
        )


def rows_of_groups(
    groups: Sequence[Sequence[tuple[Arm, Rule]]], size: Size, final: bool, workers: int
) -> Iterator[list[Row]]:
    """Yield the rows of each group when it is done."""
    if workers == 1:
        for group in groups:
            yield run_group(group, size, final)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for running in as_completed(
            [pool.submit(run_group, group, size, final) for group in groups]
        ):
            yield running.result()


def chosen(rows: Sequence[Row], tuned: str) -> tuple[Rule, str]:
    """Return the configuration and the read-out with the best mean over the tuning seeds.

    Of equals, the first.
    """
    tuning = [row for row in rows if not row["final"] and row["tuned"] == tuned]
    best = max(
        itertools.product(tuning, ("student", "finetuned")),
        key=lambda pair: statistics.fmean(pair[0][pair[1]]),
    )
    return Rule(**best[0]["rule"]), best[1]


def rule_of(arm: Arm, rows: Sequence[Row]) -> Rule:
    """Return the settings of a final run."""
    rule = chosen(rows, arm.tuned)[0]
    return dataclasses.replace(
        rule, alteration=arm.alteration or rule.alteration, lookahead=arm.lookahead
    )


def main() -> None:
    parser = arguments(__doc__, RAW)
    parser.add_argument(
        "--parts", nargs="+", default=PARTS, choices=PARTS, help="the questions whose arms are run"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes, each with one thread")
    args = parsed(parser)
    torch.set_num_threads(1)
    # Tune every method of these arms, then run them on the seeds that nothing was chosen on.
    if args.runs:
        arms = [arm for arm in ARMS if arm.part in args.parts and arm.lookahead <= LONGEST]
        # In miniature there is one place at equal time, and some of the others.
        if args.miniature:
            arms = [
                *arms[:50:12],
                *(arm for arm in arms if arm.of_worth and (arm.labels, arm.uneven) == PLACES[0]),
            ]
        needed = {arm.tuned for arm in arms}
        size = Size(args.miniature)
        grids = [
            (arm, rules[:1] if args.miniature else rules)
            for arm, rules in GRIDS.values()
            if arm.tuned in needed
        ]
        run_missing(
            [(arm, rule) for arm, rules in grids for rule in rules],
            size,
            args.out,
            final=False,
            workers=args.workers,
        )
        rows = read(args.out)
        run_missing(
            [(arm, rule_of(arm, rows)) for arm in arms],
            size,
            args.out,
            final=True,
            workers=args.workers,
        )
        return
    import when_tables

    when_tables.write(args.write, args.out)


if __name__ == "__main__":
    main()
