r"""Two moons for many seeds at once: each step is written for one pair of networks, and ``torch.func.vmap`` runs it for
the stack of all runs. The study of ``two_moons.py`` is made with it; ``examples/two_moons.py`` is the same experiment
with the library's trainers.

The feedback on K student steps θ_{k+1} = θ_k − η ∇ℓ_k(θ_k) is the adjoint recursion of
:mod:`metapl.feedback.inner_step` for plain SGD:

.. math:: \lambda_{K+1} = \nabla L(\theta_{K+1}), \quad w_k = -\eta \lambda_{k+1}, \quad
          h_k = \tfrac1B \tfrac{d}{d\varepsilon} \log S(x_k; \theta_k + \varepsilon w_k), \quad
          \lambda_k = \lambda_{k+1} + \nabla^2 \ell_k(\theta_k)\, w_k
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from sklearn.datasets import make_moons
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from metapl.data.draws import fold_in
from metapl.execution.kernels import load_forward_mode
from metapl.metrics import interval

Tree = dict[str, Tensor]
"""The parameters of one network, or, with one more dimension in front, of a stack."""

Method = Literal["supervised", "pseudo_labels", "mpl", "none"]
"""The last is the control: the loop of Meta Pseudo Labels without feedback."""

SUCCESS = 0.95
"""A run succeeds if it classifies more than this share of all points as they were drawn."""

CHUNK = 128
"""Steps whose batches are drawn at once. Part of what a seed means: other chunks draw other batches."""

_TEACHER, _STUDENT, _BATCHES, _POINTS, _LABELS = 1, 2, 3, 0x300E, 0x300F
"""Keep what is drawn of one seed apart."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}


@dataclass(frozen=True, kw_only=True)
class TwoMoons:
    """2,000 points on two moons, 6 of them labeled; networks of two hidden layers of 8 units; SGD at a constant rate.

    Three methods: supervised learning on the labeled points, pseudo-labels of the network that was trained so, and Meta
    Pseudo Labels.

    Args:
        points: number of points, half of them on each moon.
        noise: standard deviation of the noise on each coordinate.
        labels_per_class: labeled points on each moon.
        placement: where the labeled points are: anywhere on their moon, or spread evenly along it.
        hidden: widths of the hidden layers.
        activation: of the hidden layers.
        init_scale: the initial weights and biases are uniform between this and its negative.
        steps: training steps; of pseudo-labels, those of the student after as many of its teacher.
        pretrain_steps: before that, steps of teacher and student on the labeled points, in Meta Pseudo Labels.
        unlabeled_batch: unlabeled points in a batch, drawn with replacement. Labeled points are always taken all.
        student_lr: learning rate of the student.
        teacher_lr: learning rate of the teacher, and of supervised learning.
        mode: how the teacher's gradient is computed: forward is the exact one, of soft labels; reinforce is that of
            Algorithm 1, of sampled labels.
        lookahead: student steps in a training step, through which the feedback looks ahead (forward).
        feedback_weight: weight of the feedback, in units of the true gradient.
        feedback_ratio: instead of a weight, the ratio of the norms of the gradients of the feedback and of the
            teacher's own losses, in its parameters. (The committed rows have those at its outputs, as 0.2 took them.)
        supervised_loss: the teacher of Meta Pseudo Labels also learns from the labeled points.
        uda_weight: weight of a consistency term (UDA) in the own losses of every teacher, and in supervised learning.
        uda_temperature: temperature of UDA's targets; a value below 1 sharpens them.
        input_noise: standard deviation of noise that is added to the unlabeled points that a student learns from, and
            that UDA compares with the points as they are.

    Source: Meta Pseudo Labels, its experiment with two moons; ``docs/two-moons.md`` says what it leaves open.
    """

    points: int = 2000
    noise: float = 0.1
    labels_per_class: int = 3
    placement: Literal["random", "spread"] = "random"
    hidden: tuple[int, ...] = (8, 8)
    activation: Literal["sigmoid", "tanh", "relu"] = "sigmoid"
    init_scale: float = 0.1
    steps: int = 12_000
    pretrain_steps: int = 0
    unlabeled_batch: int = 32
    student_lr: float = 0.1
    teacher_lr: float = 0.1
    mode: Literal["forward", "reinforce"] = "forward"
    lookahead: int = 1
    feedback_weight: float = 1.0
    feedback_ratio: float | None = None
    supervised_loss: bool = True
    uda_weight: float = 0.0
    uda_temperature: float = 0.5
    input_noise: float = 0.0


@dataclass(frozen=True, eq=False)
class Moons:
    """The points of one seed.

    Args:
        points: float32 (n, 2).
        classes: int64 (n,), 0 for the upper moon, 1 for the lower one.
        labeled: int64, the positions of the labeled points.
    """

    points: Tensor
    classes: Tensor
    labeled: Tensor

    @property
    def unlabeled(self) -> Tensor:
        """The positions of the other points."""
        hidden = torch.ones(len(self.points), dtype=torch.bool)
        hidden[self.labeled] = False
        return hidden.nonzero()[:, 0]


def moons_of(recipe: TwoMoons, seed: int) -> Moons:
    """The points of a run, half of them on each moon."""
    random_state = np.random.RandomState(fold_in(seed, _POINTS) % 2**32)
    x, y = make_moons(recipe.points, noise=recipe.noise, random_state=random_state)
    x, y = torch.from_numpy(x).float(), torch.from_numpy(y).long()
    generator = torch.Generator().manual_seed(fold_in(seed, _LABELS))
    labeled = [_labeled(recipe, x, (y == c).nonzero()[:, 0], c, generator) for c in (0, 1)]
    return Moons(x, y, torch.cat(labeled))


def _labeled(recipe: TwoMoons, x: Tensor, members: Tensor, moon: int, generator: torch.Generator) -> Tensor:
    """The positions of the labeled points of one moon."""
    count = recipe.labels_per_class
    if recipe.placement == "random":
        return members[torch.randperm(len(members), generator=generator)[:count]]
    angles = torch.pi * (torch.arange(count) + 0.5) / count
    upper = torch.stack([angles.cos(), angles.sin()], -1)
    # As scikit-learn draws them: the lower moon is the upper one turned by half a circle, and moved.
    centers = upper if moon == 0 else torch.tensor([1.0, 0.5]) - upper
    return members[torch.cdist(centers, x[members]).argmin(1)]


@dataclass(frozen=True)
class Stack:
    """Fully connected classifiers of one shape.

    Args:
        sizes: widths from the input to the classes.
        activation: between two layers.
    """

    sizes: tuple[int, ...]
    activation: str

    def initial(self, generators: Sequence[torch.Generator], scale: float) -> Tree:
        """Weights and biases of a network for each generator, uniform in ±``scale``."""
        networks = [self._initial_one(generator, scale) for generator in generators]
        return {name: torch.stack([network[name] for network in networks]) for name in networks[0]}

    def _initial_one(self, generator: torch.Generator, scale: float) -> Tree:
        def uniform(*shape: int) -> Tensor:
            return scale * (2 * torch.rand(shape, generator=generator) - 1)

        tree: Tree = {}
        for i, (fan_in, fan_out) in enumerate(zip(self.sizes, self.sizes[1:], strict=False)):
            tree |= {f"{i}.weight": uniform(fan_in, fan_out), f"{i}.bias": uniform(fan_out)}
        return tree

    def __call__(self, params: Tree, x: Tensor) -> Tensor:
        """The logits of one network, (B, C)."""
        for i in range(len(self.sizes) - 1):
            x = ACTIVATIONS[self.activation](x) if i else x
            x = torch.addmm(params[f"{i}.bias"], x, params[f"{i}.weight"])
        return x

    def classes(self, params: Tree, x: Tensor) -> Tensor:
        """The classes that each network of a stack takes its own points (runs, B, 2) for, (runs, B)."""
        return vmap(self)(params, x).argmax(-1)


@dataclass(frozen=True)
class Batch:
    """The batches of one step, of one pair of networks or, with one more dimension in front, of a stack.

    Args:
        labeled, targets: (B_l, 2), and (B_l, C) one-hot.
        weak: (K·B, 2), the unlabeled points of K student steps.
        strong: the same as the student sees them; None: as they are.
        uniform: (B,) in [0, 1), by which labels are sampled; None for soft labels.
    """

    labeled: Tensor
    targets: Tensor
    weak: Tensor
    strong: Tensor | None = None
    uniform: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields."""
        return self.labeled, self.targets, self.weak, self.strong, self.uniform


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy against class probabilities, a scalar."""
    return -(target * F.log_softmax(logits, -1)).sum(-1).mean()


def _vjp(function: Callable[[Tree], Tensor], params: Tree) -> tuple[Tensor, Callable[[Tensor], tuple[Tree]]]:
    """``torch.func.vjp``, whose type does not say that it returns two values here."""
    value: tuple[Tensor, Callable[[Tensor], tuple[Tree]]] = vjp(function, params)  # type: ignore[assignment]
    return value


def descend(params: Tree, gradient: Tree, lr: float) -> Tree:
    """A step of SGD."""
    return {name: p - lr * gradient[name] for name, p in params.items()}


@dataclass(frozen=True)
class Steps:
    """The steps of one pair of networks, or of one network.

    Args:
        recipe: their settings.
    """

    recipe: TwoMoons

    @property
    def network(self) -> Stack:
        """The networks."""
        return Stack((2, *self.recipe.hidden, 2), self.recipe.activation)

    def teacher_and_student(self, teacher: Tree, student: Tree, batch: Batch) -> tuple[Tree, Tree]:
        """One step of Meta Pseudo Labels: K student steps, and a teacher step on the feedback and its own losses."""
        gradient, moved = self.teacher_gradient(teacher, student, batch)
        return descend(teacher, gradient, self.recipe.teacher_lr), moved

    def student_alone(self, teacher: Tree, student: Tree, batch: Batch) -> Tree:
        """K student steps on the labels of a teacher that stays as it is."""
        q = self.network(teacher, batch.weak).softmax(-1)
        return self._path(student, batch, self._targets(q, batch))[-1]

    def network_alone(self, params: Tree, batch: Batch, lr: float, *, uda: bool) -> Tree:
        """A step of one network on the labeled points and, with ``uda``, on UDA with the recipe's weight."""
        inputs = [batch.labeled, *(self._pair(batch) if uda else ())]
        logits, pullback = _vjp(lambda p: self.network(p, torch.cat(inputs)), params)
        parts = logits.split([len(x) for x in inputs])
        gradients = [self._at_labeled(parts[0], batch)]
        if uda:
            gradients += [torch.zeros_like(parts[1]), self._at_strong(parts[1], parts[2])]
        (gradient,) = pullback(torch.cat(gradients))
        return descend(params, gradient, lr)

    def teacher_gradient(self, teacher: Tree, student: Tree, batch: Batch) -> tuple[Tree, Tree]:
        """The gradient that the teacher descends, and the student after its K steps."""
        recipe = self.recipe
        inputs = [batch.weak, batch.labeled, *(self._pair(batch)[1:] if recipe.uda_weight else ())]
        # One pass of the teacher over all that it is asked about, and one backward pass from all of its outputs.
        logits, pullback = _vjp(lambda p: self.network(p, torch.cat(inputs)), teacher)
        on_unlabeled, on_labeled, *on_strong = logits.split([len(x) for x in inputs])
        q = on_unlabeled.softmax(-1)
        own = [recipe.supervised_loss * self._at_labeled(on_labeled, batch)]
        if on_strong:
            own.append(self._at_strong(on_unlabeled.chunk(recipe.lookahead)[-1], on_strong[0]))
        targets = self._targets(q, batch)
        path = self._path(student, batch, targets)
        if recipe.feedback_weight == 0:
            at_unlabeled = torch.zeros_like(q)
        elif recipe.mode == "reinforce":
            at_unlabeled = self.scalar_feedback(path, batch) * (q - targets[0])  # of h Σ CE(ŷ, T)
        else:
            h = self.feedback(path, batch, targets)
            at_unlabeled = -q * (h - (q * h).sum(-1, keepdim=True))  # of −Σ h·q
        factor: Tensor | float = recipe.feedback_weight
        if recipe.feedback_ratio is not None:  # of the norms in the teacher's parameters, as the library has it
            alone = [at_unlabeled, *map(torch.zeros_like, own)], [torch.zeros_like(at_unlabeled), *own]
            norm, size = (torch.cat([t.flatten() for t in pullback(torch.cat(t))[0].values()]).norm() for t in alone)
            factor = recipe.feedback_ratio * size / norm.clamp_min(torch.finfo(norm.dtype).tiny)
            factor = torch.where(norm > 0, factor, 0.0)
        (gradient,) = pullback(torch.cat([at_unlabeled * factor, *own]))
        return gradient, path[-1]

    def scalar_feedback(self, path: Sequence[Tree], batch: Batch) -> Tensor:
        """Algorithm 1's h for the score of all sampled labels, −⟨w, g⟩."""
        before, after = path
        v = self._outer_gradient(after, batch)
        # w = −ηv, and the step took ηg away.
        return torch.stack([(v[name] * (before[name] - after[name])).sum() for name in before]).sum()

    def feedback(self, path: Sequence[Tree], batch: Batch, targets: Sequence[Tensor]) -> Tensor:
        """The exact feedback h on the soft labels of all student steps, (K·B, C)."""
        adjoint = self._outer_gradient(path[-1], batch)
        inputs = self._inputs(batch)
        rows: list[Tensor] = []
        for k in reversed(range(len(targets))):
            w = {name: -self.recipe.student_lr * t for name, t in adjoint.items()}
            if k == 0:
                slope = self._slope(path[0], w, inputs[0])
            else:
                slope, curved = self._slope_and_curvature(path[k], w, inputs[k], targets[k])
                adjoint = {name: t + curved[name] for name, t in adjoint.items()}
            rows.append(slope / len(inputs[k]))
        return torch.cat(rows[::-1])

    # ------------------------------------------------------------------------------------------------- the student

    def _inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """The points of each student step, as the student sees them."""
        seen = batch.weak if batch.strong is None else batch.strong
        return seen.chunk(self.recipe.lookahead)

    def _targets(self, q: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """The labels of each student step: q, or one-hot labels of two classes that are drawn from it."""
        if batch.uniform is not None:
            q = F.one_hot((batch.uniform >= q[..., 0]).long(), 2).to(q)
        return q.chunk(self.recipe.lookahead)

    def _path(self, student: Tree, batch: Batch, targets: Sequence[Tensor]) -> list[Tree]:
        """The student before and after each of its steps, θ_1 to θ_{K+1}."""
        path = [student]
        for x, target in zip(self._inputs(batch), targets, strict=True):
            g = grad(lambda p, x=x, target=target: cross_entropy(self.network(p, x), target))(path[-1])
            path.append(descend(path[-1], g, self.recipe.student_lr))
        return path

    def _outer_gradient(self, student: Tree, batch: Batch) -> Tree:
        gradient: Tree = grad(lambda p: cross_entropy(self.network(p, batch.labeled), batch.targets))(student)
        return gradient

    def _slope(self, params: Tree, w: Tree, x: Tensor) -> Tensor:
        """d/dε log S(x; θ + εw)."""
        slope: Tensor = jvp(lambda p: F.log_softmax(self.network(p, x), -1), (params,), (w,))[1]
        return slope

    def _slope_and_curvature(self, params: Tree, w: Tree, x: Tensor, target: Tensor) -> tuple[Tensor, Tree]:
        """The same, and the product of w with the Hessian of the student's loss."""

        def slopes(p: Tree) -> tuple[Tensor, Tree]:
            log_S, pullback = _vjp(lambda p: F.log_softmax(self.network(p, x), -1), p)
            (g,) = pullback(-target / len(x))
            return log_S, g

        tangents: tuple[Tensor, Tree] = jvp(slopes, (params,), (w,))[1]
        return tangents

    # ------------------------------------------------------------------------------------ the teacher's own losses

    def _pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The points of the last student step, as they are and with noise."""
        assert batch.strong is not None
        K = self.recipe.lookahead
        return batch.weak.chunk(K)[-1], batch.strong.chunk(K)[-1]

    def _at_labeled(self, logits: Tensor, batch: Batch) -> Tensor:
        """The gradient of the cross-entropy of the labeled points in the outputs."""
        return (logits.softmax(-1) - batch.targets) / len(logits)

    def _at_strong(self, weak: Tensor, strong: Tensor) -> Tensor:
        """The gradient of UDA in the outputs on noisy points; its target, from the outputs without noise, is fixed."""
        target = (weak / self.recipe.uda_temperature).softmax(-1)
        return self.recipe.uda_weight * (strong.softmax(-1) - target) / len(strong)


def stacked(step: Callable[..., Any], *networks: Tree, batch: Batch) -> Callable[..., Any]:
    """The step of one pair of networks, for a stack of them.

    It is recorded once as plain operations on stacked tensors and replayed, since a step of tiny networks costs mostly
    the dispatch of ``vmap`` itself.

    Args:
        step: of networks and a :class:`Batch`.
        networks, batch: of a stack, of the shapes that later steps have too.
    """
    tensors = batch.tensors()
    here = tuple(i for i, t in enumerate(tensors) if t is not None)

    def one(networks: tuple[Tree, ...], columns: tuple[Tensor, ...]) -> Any:
        fields: list[Any] = [None] * len(tensors)
        for i, column in zip(here, columns, strict=True):
            fields[i] = column
        return step(*networks, Batch(*fields))

    load_forward_mode()
    recorded = make_fx(vmap(one))(networks, tuple(t for t in tensors if t is not None))
    recorded.graph.eliminate_dead_code()
    recorded.recompile()

    def run(*networks: Tree, batch: Batch) -> Any:
        fields = batch.tensors()
        return recorded(networks, tuple(fields[i] for i in here))

    return run


@dataclass(frozen=True)
class Outcome:
    """The runs of a method.

    Args:
        accuracy: the share of all points that each run classifies as they were drawn, by seed.
        networks: their stacked weights.
    """

    accuracy: tuple[float, ...]
    networks: Tree

    @property
    def success(self) -> int:
        """The number of runs that succeed."""
        return sum(accuracy > SUCCESS for accuracy in self.accuracy)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the success rate."""
        return interval(self.success, len(self.accuracy))


class TwoMoonsRuns:
    """The runs of all seeds, side by side; each ends as it would alone, up to rounding.

    Args:
        recipe: their settings.
        seeds: one for each run.
        dtype: of weights and points.
    """

    def __init__(self, recipe: TwoMoons, seeds: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        self.recipe, self.seeds = recipe, tuple(seeds)
        self.steps = Steps(recipe)
        self.moons = [moons_of(recipe, seed) for seed in self.seeds]
        columns = [(m.points, m.classes, m.points[m.labeled], m.classes[m.labeled]) for m in self.moons]
        points, self.classes, labeled, labels = (torch.stack(column) for column in zip(*columns, strict=True))
        self.points, self.labeled = points.to(dtype), labeled.to(dtype)
        self.targets = F.one_hot(labels, 2).to(dtype)

    @property
    def network(self) -> Stack:
        """The networks of all methods."""
        return self.steps.network

    @torch.no_grad()
    def run(self, method: Method) -> Outcome:
        """Train all runs by a method."""
        networks: Tree = getattr(self, f"_{method}_networks")()
        right = self.network.classes(networks, self.points) == self.classes
        return Outcome(tuple(right.double().mean(1).tolist()), networks)

    def initial(self, role: Literal["teacher", "student"]) -> Tree:
        """The first weights of teachers or students."""
        stream = _TEACHER if role == "teacher" else _STUDENT
        generators = [torch.Generator().manual_seed(fold_in(seed, stream)) for seed in self.seeds]
        tree = self.network.initial(generators, self.recipe.init_scale)
        return {name: t.to(self.points.dtype) for name, t in tree.items()}

    def batches(self, steps: int) -> Iterator[Batch]:
        """The stacked batches of so many steps; all methods get the same."""
        recipe = self.recipe
        generators = [torch.Generator().manual_seed(fold_in(seed, _BATCHES)) for seed in self.seeds]
        for start in range(0, steps, CHUNK):
            drawn = [self._chunk(moons, generator) for moons, generator in zip(self.moons, generators, strict=True)]
            index, noise, uniform = (
                None if column[0] is None else torch.stack(column, 1) for column in zip(*drawn, strict=True)
            )
            assert index is not None
            runs = torch.arange(len(self.seeds))[:, None]
            for i in range(min(CHUNK, steps - start)):
                weak = self.points[runs, index[i]]
                strong = None if noise is None else weak + recipe.input_noise * noise[i].to(weak)
                yield Batch(self.labeled, self.targets, weak, strong, None if uniform is None else uniform[i])

    # --------------------------------------------------------------------------------------------------- the methods

    @cached_property
    def _supervised(self) -> Tree:
        return self._alone("teacher", self.recipe.steps, uda=self.recipe.uda_weight != 0)

    def _supervised_networks(self) -> Tree:
        return self._supervised

    def _pseudo_labels_networks(self) -> Tree:
        networks = self._supervised, self.initial("student")

        def step(teacher: Tree, student: Tree, batch: Batch) -> tuple[Tree, Tree]:
            return teacher, self.steps.student_alone(teacher, student, batch)

        return self._trained(step, networks, self.recipe.steps)[1]

    def _mpl_networks(self) -> Tree:
        return self.teachers_and_students()[1]

    def _none_networks(self) -> Tree:
        return self.teachers_and_students(feedback=False)[1]

    def teachers_and_students(self, feedback: bool = True) -> tuple[Tree, Tree]:
        """The networks of all runs after the loop of Meta Pseudo Labels, or after the same loop without feedback."""
        recipe = self.recipe
        steps = self.steps
        if not feedback:
            steps = Steps(dataclasses.replace(recipe, feedback_weight=0.0, feedback_ratio=None))
        teacher, student = self._trained(steps.teacher_and_student, self._first, recipe.steps)
        return teacher, student

    @cached_property
    def _first(self) -> tuple[Tree, Tree]:
        """The teachers and students that the loop begins with."""
        steps = self.recipe.pretrain_steps
        return self._alone("teacher", steps, uda=False), self._alone("student", steps, uda=False)

    def _alone(self, role: Literal["teacher", "student"], steps: int, *, uda: bool) -> Tree:
        """Networks that learn from the labeled points and, with UDA, from the others too."""
        lr = self.recipe.teacher_lr if role == "teacher" else self.recipe.student_lr

        def step(params: Tree, batch: Batch) -> tuple[Tree]:
            return (self.steps.network_alone(params, batch, lr, uda=uda),)

        # Without UDA only the labeled points count, and no others are drawn.
        batches = None if uda else itertools.repeat(Batch(self.labeled, self.targets, self.labeled), steps)
        (params,) = self._trained(step, (self.initial(role),), steps, batches)
        return params

    def _trained(
        self,
        step: Callable[..., tuple[Tree, ...]],
        networks: tuple[Tree, ...],
        steps: int,
        batches: Iterable[Batch] | None = None,
    ) -> tuple[Tree, ...]:
        """The networks after so many steps.

        Args:
            step: of one run: the networks after it, from those before it and a batch.
            networks: of all runs.
            steps: their number.
            batches: one for each step; None: the unlabeled ones that all methods get.
        """
        run: Callable[..., tuple[Tree, ...]] | None = None
        for batch in self.batches(steps) if batches is None else batches:
            run = run or stacked(step, *networks, batch=batch)
            networks = run(*networks, batch=batch)
        return networks

    # ---------------------------------------------------------------------------------------------------------- draws

    def _chunk(self, moons: Moons, generator: torch.Generator) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Positions of unlabeled points, noise, and what labels are drawn by, for ``CHUNK`` steps of a run."""
        recipe = self.recipe
        shape = (CHUNK, recipe.lookahead * recipe.unlabeled_batch)
        unlabeled = moons.unlabeled
        index = unlabeled[torch.randint(len(unlabeled), shape, generator=generator)]
        noise = torch.randn(*shape, 2, generator=generator) if recipe.input_noise else None
        uniform = torch.rand(shape, generator=generator) if recipe.mode == "reinforce" else None
        return index, noise, uniform


def mcnemar(first: Sequence[float], second: Sequence[float]) -> tuple[int, int, float]:
    """McNemar's exact test of whether one of two methods succeeds more often, from the accuracies of paired runs.

    Returns: in how many pairs the first alone succeeds, in how many the second alone, and the two-sided p-value.

    >>> mcnemar([1.0, 1.0, 1.0, 0.8], [0.8, 0.8, 1.0, 0.8])
    (2, 0, 0.5)
    """
    import scipy.stats

    pairs = [(a > SUCCESS, b > SUCCESS) for a, b in zip(first, second, strict=True)]
    alone, other_alone = sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)
    differing = alone + other_alone
    return alone, other_alone, float(scipy.stats.binomtest(alone, differing).pvalue) if differing else 1.0
