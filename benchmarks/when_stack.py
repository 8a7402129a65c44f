r"""Meta Pseudo Labels for a stack of small networks, a network a seed: what ``benchmarks/when.py`` and
``benchmarks/feedback_worth.py`` train with.

The passes of these networks are written out in batched matrix products, so that twenty seeds take little more time than
one through :class:`metapl.BilevelTrainer`; a step takes those of other networks too, such as the convolutional ones of
``benchmarks/feedback_worth_pictures.py``. It computes what the trainer computes with mode ``forward``: plain SGD for
the student, SGD with momentum for the teacher, soft labels. A test lets both run on the same batches from the same
weights.

With K student steps a teacher step, θ_{k+1} = θ_k − η ∇ℓ_k(θ_k), the feedback is the adjoint recursion of
:mod:`metapl.feedback.inner_step`:

.. math:: \lambda_{K+1} = \nabla L(\theta_{K+1}), \quad w_k = -\eta \lambda_{k+1}, \quad
          h_k = \tfrac1B \tfrac{d}{d\varepsilon} \log S(x_k; \theta_k + \varepsilon w_k), \quad
          \lambda_k = \lambda_{k+1} + \nabla^2 \ell_k(\theta_k)\, w_k
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl.apps.pictures.views import base

CLASSES = 10
Weights = list[Tensor]
"""Of a stack of S networks, (S, ...) each: here (S, in, out) and (S, 1, out) of the first layer, of the second, ..."""

_where_positive = torch.ops.aten.threshold_backward.default
"""Its first argument where the second one is above the third, else 0, in one pass over memory."""


# -------------------------------------------------------------------------------------------------------- the networks


def stacked(networks: Sequence[nn.Sequential]) -> Weights:
    """The weights of networks of one shape, as :func:`metapl.models.mlp` makes them."""
    layers = [[m for m in network if isinstance(m, nn.Linear)] for network in networks]
    weights: Weights = []
    for same in zip(*layers, strict=True):
        weights.append(torch.stack([layer.weight.detach().T for layer in same]))
        weights.append(torch.stack([layer.bias.detach()[None] for layer in same]))
    return weights


def copied(weights: Weights) -> Weights:
    """Weights of their own."""
    return [t.clone() for t in weights]


def _layers(weights: Weights) -> list[tuple[Tensor, Tensor]]:
    return list(zip(weights[::2], weights[1::2], strict=True))


NARROW = 16


def product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product, by way of its transpose where the result is narrow: a third of the time."""
    if b.shape[-1] >= NARROW:
        return a @ b
    return (b.transpose(1, 2) @ a.transpose(1, 2)).transpose(1, 2).contiguous()


def softmax(logits: Tensor) -> Tensor:
    """Over the last dimension, which is short: a fifth of the time of ``Tensor.softmax``."""
    e = (logits - logits.amax(-1, keepdim=True)).exp_()
    return e.div_(e.sum(-1, keepdim=True))


def forward(weights: Weights, *views: Tensor, fixed: int = 0) -> tuple[list[Tensor], Tensor]:
    """The input of every layer, without the first ``fixed`` views, and the outputs of all of them, (S, B, C)."""
    inputs, rows = [torch.cat(views, 1) if len(views) > 1 else views[0]], sum(x.shape[1] for x in views[:fixed])
    *hidden, (last, bias) = _layers(weights)
    for weight, b in hidden:
        inputs.append(torch.baddbmm(b, inputs[-1], weight).relu_())
    outputs = product(inputs[-1], last).add_(bias)
    return [x[:, rows:] for x in inputs], outputs


def backward(weights: Weights, inputs: list[Tensor], at_outputs: Tensor) -> Weights:
    """The gradient in the weights, from that in the outputs."""
    layers, gradient = _layers(weights), at_outputs
    found: Weights = []
    for i in reversed(range(len(layers))):
        found += [gradient.sum(1, keepdim=True), product(inputs[i].transpose(1, 2), gradient)]
        if i:
            gradient = _where_positive(gradient @ layers[i][0].transpose(1, 2), inputs[i], 0)
    return found[::-1]


def tangent(weights: Weights, inputs: list[Tensor], w: Weights) -> tuple[list[Tensor | None], Tensor]:
    """d/dε of every layer's input and of the outputs, along w; that of the first input is None, for it stays."""
    layers, directions = _layers(weights), _layers(w)
    moves: list[Tensor | None] = [None]
    for i, ((weight, _), (to_weight, to_bias)) in enumerate(zip(layers, directions, strict=True)):
        move, before = product(inputs[i], to_weight).add_(to_bias), moves[i]
        if before is not None:
            move += product(before, weight)
        moves.append(_where_positive(move, inputs[i + 1], 0) if i + 1 < len(layers) else move)
    *of_inputs, of_outputs = moves
    assert of_outputs is not None
    return of_inputs, of_outputs


def curved(
    weights: Weights, inputs: list[Tensor], w: Weights, moves: list[Tensor | None], at_outputs: Tensor, moved: Tensor
) -> Weights:
    """d/dε of :func:`backward` along w, where the gradient in the outputs changes by ``moved``."""
    layers, directions = _layers(weights), _layers(w)
    gradient, change, found = at_outputs, moved, []
    for i in reversed(range(len(layers))):
        in_weight, before = product(inputs[i].transpose(1, 2), change), moves[i]
        if before is not None:
            in_weight += product(before.transpose(1, 2), gradient)
        found += [change.sum(1, keepdim=True), in_weight]
        if i:
            weight, to_weight = layers[i][0].transpose(1, 2), directions[i][0].transpose(1, 2)
            change = _where_positive(torch.baddbmm(change @ weight, gradient, to_weight), inputs[i], 0)
            gradient = _where_positive(gradient @ weight, inputs[i], 0)
    return found[::-1]


@dataclass(frozen=True)
class Passes:
    """How a stack of networks is run and differentiated: these four functions, or those of other networks.

    Args:
        forward: weights, one or more inputs (S, B, ...), and ``fixed``, how many of the first ones are not
            differentiated, to what is kept for the others, and the outputs of all, (S, B + B + ..., C).
        backward: the gradient in the weights from that in the outputs that are differentiated.
        tangent: what moves within, and the outputs, by d/dε along a direction of the weights.
        curved: d/dε of the gradient; only a lookahead of several steps needs it.
    """

    forward: Callable[..., tuple[Any, Tensor]] = forward
    backward: Callable[..., Weights] = backward
    tangent: Callable[..., tuple[Any, Tensor]] = tangent
    curved: Callable[..., Weights] = curved


# ------------------------------------------------------------------------------------------------- altered feedback

Alteration = Literal[
    "permuted",
    "class_means",
    "random_sign",
    "rest",
    "own_class_means",
    "within_class",
    "sign",
    "one_number",
    "negated",
    "zero",
    "balance",
]


def altered(h: Tensor, q: Tensor, alteration: Alteration, rows: Tensor, coins: Tensor) -> Tensor:
    """The feedback as the controls have it; three of them are those of :class:`metapl.ablation.Altered`.

    Args:
        h: (S, B, C), whose mean over the classes by the student's probabilities is 0.
        q: (S, B, C), what the teacher said.
        alteration: of Altered: ``"permuted"``: rows of other examples; ``"class_means"``: every row is their mean over
            the batch; ``"random_sign"``: each row times ±1. ``"rest"``: what that mean leaves. ``"own_class_means"``:
            the mean over the examples for which the teacher's most probable class is the same; ``"within_class"``: what
            these leave. ``"sign"``: ± the mean size in the batch. ``"one_number"``: the entry of the teacher's most
            probable class alone, the others 0. ``"negated"``: −h. ``"zero"``: 0. ``"balance"``: no feedback at all, but
            1/(BC q̄_k) for every example, which descends the cross-entropy of the batch's mean label q̄ against equal
            frequencies.
        rows: (S, B), the permutations.
        coins: (S, B), the signs.
    """
    if alteration == "permuted":
        return h.gather(1, rows[..., None].expand_as(h))
    if alteration == "random_sign":
        return h * coins[..., None]
    if alteration in ("class_means", "rest"):
        mean = h.mean(1, keepdim=True).expand_as(h)
        return mean if alteration == "class_means" else h - mean
    if alteration in ("negated", "zero"):
        return -h if alteration == "negated" else torch.zeros_like(h)
    if alteration == "sign":
        return h.sign() * h.abs().mean((1, 2), keepdim=True)
    if alteration == "balance":
        return (1 / (q.shape[1] * q.shape[2] * q.mean(1, keepdim=True))).expand_as(q)
    own = F.one_hot(q.argmax(-1), q.shape[2]).to(h)
    if alteration == "one_number":
        return own * h
    means = own.transpose(1, 2) @ h / own.sum(1)[..., None].clamp_min(1)
    return own @ means if alteration == "own_class_means" else h - own @ means


# ------------------------------------------------------------------------------------------------------------ the step


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How teacher and student are trained.

    Args:
        student_lr, teacher_lr: base rates of SGD, which a cosine takes to 0.
        momentum: the teacher's.
        feedback: what sets its size: ``"none"``: there is none; ``"gradient"``: ``size`` is the feedback's weight, so
            that it dies with the student's rate; ``"learning_rate"``: the same for h divided by that rate;
            ``"ratio"``: ``size`` is the feedback's ratio to the teacher's own loss, of the norms of their gradients in
            the teacher's parameters. (The committed rows have those at its outputs, as 0.2 took them.)
        size: see there.
        alteration: of the feedback; None: as it is.
        own_loss: whether the teacher learns from the labeled batch too.
        lookahead: student steps a teacher step.
        uda: weight of the teacher's consistency loss on unlabeled pictures, :class:`metapl.UDA`; 0: there is none.
        temperature, threshold, align: of that loss; its prior is the stack's.
    """

    student_lr: float = 1.0
    teacher_lr: float = 0.06
    momentum: float = 0.9
    feedback: Literal["none", "gradient", "learning_rate", "ratio"] = "gradient"
    size: float = 1.0
    alteration: Alteration | None = None
    own_loss: bool = True
    lookahead: int = 1
    uda: float = 0.0
    temperature: float = 1.0
    threshold: float = 0.0
    align: float = 0.0

    def target(self, p: Tensor, prior: Tensor | None) -> Tensor:
        """What the strong view should be called, from the probabilities (S, B, C) of the weak one: as
        :meth:`metapl.UDA.target` has it; zeros for pictures that are left out."""
        if self.align:
            shares = torch.full_like(p[:, :1], 1 / p.shape[-1]) if prior is None else prior[:, None]
            p = p * (shares / p.mean(1, keepdim=True)) ** self.align
            p = p / p.sum(-1, keepdim=True)
        confident = p.amax(-1, keepdim=True) > self.threshold
        if self.temperature not in (0.0, 1.0):
            sharp = p ** (1 / self.temperature)
            return sharp / sharp.sum(-1, keepdim=True) * confident
        return (p if self.temperature else F.one_hot(p.argmax(-1), p.shape[-1]).to(p)) * confident


@dataclass(frozen=True, eq=False)
class Batch:
    """What all stacks of the same seeds see in a step.

    Args:
        labeled, targets: (S, B_l, ...) as student and teacher see them, and one-hot (S, B_l, C).
        weak, strong: K unlabeled batches (S, B, ...): what the teacher labels, and what the student sees.
        rows, coins: (S, B), permutations and signs for altered feedback.
    """

    labeled: Tensor
    targets: Tensor
    weak: Sequence[Tensor]
    strong: Sequence[Tensor]
    rows: Tensor
    coins: Tensor


@dataclass
class Stack:
    """Pairs of a teacher and a student, a pair a seed, all trained by one rule.

    Args:
        rule: how.
        teacher, student: the first weights, which this stack changes; no student: the teacher is trained alone.
        ema_decay: of the average of the student's weights, or of the teacher's where there is no student; see
            :class:`metapl.training.average.Average`.
        prior: (S, C), the shares of the classes that labels of the consistency loss are moved to; None: equal ones.
        passes: of these networks.

    ``ratio`` is, seed by seed, the feedback's to the teacher's own losses in the last step: of the norms of their
    gradients at the teacher's outputs, or in its parameters where the rule is a ratio.
    """

    rule: Rule
    teacher: Weights
    student: Weights | None
    ema_decay: float
    prior: Tensor | None = None
    passes: Passes = Passes()
    average: Weights = field(init=False)
    velocity: Weights | None = field(init=False, default=None)
    ratio: Tensor = field(init=False)
    steps_done: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.average = copied(self.teacher if self.student is None else self.student)
        self.ratio = self.teacher[0].new_zeros(len(self.teacher[0]))

    def begin(self) -> None:
        """Let a student begin as the teacher's average, with an average of its own: a warm start."""
        self.student, self.steps_done = copied(self.average), 0

    def step(self, batch: Batch, rate: float, student_rate: float | None = None) -> None:
        """One step of Meta Pseudo Labels, at this factor of the base learning rates; the student's may be another."""
        rule, eta = self.rule, self.rule.student_lr * (rate if student_rate is None else student_rate)
        seen = [*batch.weak, batch.labeled, *(batch.strong if rule.uda else ())]
        unlabeled = sum(x.shape[1] for x in batch.weak)
        heard = rule.feedback != "none" and self.student is not None
        # Nothing comes back to weak views that are not heard of; without UDA they stay, as when.jsonl has them.
        fixed = len(batch.weak) if rule.uda and not heard else 0
        kept, logits = self.passes.forward(self.teacher, *seen, fixed=fixed)
        on_unlabeled, on_labeled, on_strong = logits.tensor_split((unlabeled, unlabeled + batch.labeled.shape[1]), 1)
        q = softmax(on_unlabeled)
        labels = q.chunk(len(batch.weak), 1)
        own = torch.zeros_like(on_labeled)
        if rule.own_loss:
            own = (softmax(on_labeled) - batch.targets) / on_labeled.shape[1]
        if rule.uda:
            targets = torch.cat([rule.target(one, self.prior) for one in labels], 1)
            consistency = softmax(on_strong) * targets.sum(-1, keepdim=True) - targets
            own = torch.cat([own, consistency * (rule.uda / unlabeled)], 1)
        path = [] if self.student is None else self._path(batch, labels, eta)
        at_unlabeled = torch.zeros_like(q)
        if heard:
            heeded = rule.alteration not in ("zero", "balance")  # what replaces it is not made from it
            h = torch.cat(self._feedback(path, batch, labels, eta), 1) if heeded else q
            if rule.alteration is not None:
                h = altered(h, q, rule.alteration, batch.rows, batch.coins)
            at_unlabeled = -q * (h - (q * h).sum(-1, keepdim=True))  # the gradient of −Σ h·q
            norms = [torch.linalg.vector_norm(t, dim=(1, 2), keepdim=True) for t in (at_unlabeled, own)]
            if rule.feedback == "ratio":  # of the gradients in the teacher's parameters, as ``feedback_ratio`` has it
                left, right = torch.zeros_like(at_unlabeled), torch.zeros_like(own)
                alone = torch.cat([at_unlabeled, right], 1), torch.cat([left, own], 1)
                found = [self.passes.backward(self.teacher, kept, t) for t in alone]
                squares = [torch.stack([t.flatten(1).square().sum(1) for t in tree]).sum(0) for tree in found]
                norms = [s.sqrt()[:, None, None] for s in squares]
            factor = self._factor(*norms)
            at_unlabeled *= factor
            self.ratio = (factor * norms[0] / norms[1])[:, 0, 0]
        if heard or rule.own_loss or rule.uda:
            at_outputs = own if fixed else torch.cat([at_unlabeled, own], 1)
            self._move_teacher(self.passes.backward(self.teacher, kept, at_outputs), rate)
        if path:
            self.student = path[-1].after
        # After a step of the trainer, as a fit takes the average.
        decay = min(self.ema_decay, (1 + self.steps_done) / (10 + self.steps_done))
        torch._foreach_lerp_(self.average, self.teacher if self.student is None else self.student, 1 - decay)
        self.steps_done += 1

    def _path(self, batch: Batch, labels: Sequence[Tensor], eta: float) -> list[_Step]:
        """The student's steps."""
        path: list[_Step] = []
        assert self.student is not None
        for x, q in zip(batch.strong, labels, strict=True):
            before = path[-1].after if path else self.student
            kept, logits = self.passes.forward(before, x)
            p = softmax(logits)
            at_outputs = (p - q) / x.shape[1]
            gradient = self.passes.backward(before, kept, at_outputs)
            path.append(_Step(before, kept, p, at_outputs, torch._foreach_add(before, gradient, alpha=-eta)))
        return path

    def _feedback(self, path: list[_Step], batch: Batch, labels: Sequence[Tensor], eta: float) -> list[Tensor]:
        """h on the labels of every student step, (S, B, C) each."""
        kept, logits = self.passes.forward(path[-1].after, batch.labeled)
        at_outputs = (softmax(logits) - batch.targets) / logits.shape[1]
        adjoint = self.passes.backward(path[-1].after, kept, at_outputs)
        # h is linear in w: with this factor left out of w, it is h divided by the learning rate.
        divided = self.rule.feedback == "learning_rate" and eta > 0
        found: list[Tensor] = []
        for k in reversed(range(len(path))):
            step = path[k]
            w = torch._foreach_mul(adjoint, -eta)
            moves, slope = self.passes.tangent(step.before, step.kept, w)
            of_log = slope - (step.p * slope).sum(-1, keepdim=True)
            found.append(of_log / (step.p.shape[1] * (eta if divided else 1.0)))
            if k:
                moved = step.p * of_log / step.p.shape[1]
                bent = self.passes.curved(step.before, step.kept, w, moves, step.at_outputs, moved)
                adjoint = list(torch._foreach_add(adjoint, bent))
        return found[::-1]

    def _factor(self, of_feedback: Tensor, of_own: Tensor) -> Tensor | float:
        """What the feedback is multiplied by: as in ``TeacherPass.backward``, seed by seed."""
        if self.rule.feedback != "ratio":
            return self.rule.size
        factor = self.rule.size * of_own / of_feedback.clamp_min(torch.finfo(of_own.dtype).tiny)
        return torch.where(of_feedback > 0, factor, 0.0)

    def _move_teacher(self, gradient: Weights, rate: float) -> None:
        if self.velocity is None:
            self.velocity = gradient
        else:
            torch._foreach_mul_(self.velocity, self.rule.momentum)
            torch._foreach_add_(self.velocity, gradient)
        torch._foreach_add_(self.teacher, self.velocity, alpha=-self.rule.teacher_lr * rate)


@dataclass(frozen=True, eq=False)
class _Step:
    """A student step: the weights before it, its pass, and the weights after it."""

    before: Weights
    kept: Any
    p: Tensor
    at_outputs: Tensor
    after: Weights


def descend(
    weights: Weights,
    x: Tensor,
    targets: Tensor,
    velocity: Weights | None,
    lr: float,
    momentum: float,
    passes: Passes = Passes(),
) -> Weights:
    """A step of SGD on the cross-entropy, in place; returns the velocity."""
    kept, logits = passes.forward(weights, x)
    gradient = passes.backward(weights, kept, (softmax(logits) - targets) / x.shape[1])
    if velocity is not None:
        gradient = list(torch._foreach_add(gradient, velocity, alpha=momentum))
    torch._foreach_add_(weights, gradient, alpha=-lr)
    return gradient


def cosine(step: int, steps: int) -> float:
    """The factor of the learning rates: that of :class:`metapl.training.FitOptions` without a warm-up."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


# ---------------------------------------------------------------------------------------------------------- the batches

CHUNK = 25
"""Steps whose batches are drawn at once. Another number gives other draws."""

SHIFT, NOISE, CUTOUT, SIDE = 1, 0.2, 2, 8
"""Of the digits' view, :class:`metapl.apps.pictures.ShiftNoiseCutout` with its defaults, and the side of a picture."""


@dataclass(eq=False)
class Views:
    """Batches of altered pictures for a stack of seeds, which do not depend on what else is in the stack.

    They have the distribution of :class:`metapl.apps.pictures.ShiftNoiseCutout`, from pseudo-random numbers that take a
    tenth of the time: all shifts of all pictures are made once, and looked up.

    Args:
        pictures: (S, n, 64).
        seeds: S.
        stream: keeps apart what is drawn for different purposes.
        batch, steps: pictures in a batch, and batches. More batches begin with the same ones.
    """

    pictures: Tensor
    seeds: Sequence[int]
    stream: int
    batch: int
    steps: int

    def __post_init__(self) -> None:
        count = self.pictures.shape[1]
        self._generators = [torch.Generator().manual_seed(1_000 * seed + self.stream) for seed in self.seeds]
        self.order = torch.stack(
            [shuffled(count, self.batch * self.steps, seed, self.stream) for seed in self.seeds]
        ).unflatten(1, (self.steps, self.batch))
        moved = [shifted(pictures) for pictures in self.pictures]
        self._table = torch.stack(moved).flatten(0, 2)
        self._masks = masks().to(self.pictures)
        self._next = 0

    def chunk(self) -> tuple[Tensor, Tensor]:
        """The next CHUNK batches: which pictures, (T, S, B), and how they are seen, (T, S, B, 64)."""
        which = self.order[:, self._next : self._next + CHUNK].transpose(0, 1)
        self._next += CHUNK
        full = (len(self.seeds), CHUNK, self.batch)
        place, noise = torch.empty(full, dtype=torch.int64), torch.empty((*full, SIDE * SIDE))
        for s, generator in enumerate(self._generators):
            place[s].random_(0, SHIFTS * len(self._masks), generator=generator)
            noise[s].normal_(generator=generator)
        place, noise = place.transpose(0, 1)[: len(which)], noise.transpose(0, 1)[: len(which)]
        first = torch.arange(len(self.seeds))[:, None] * SHIFTS + place % SHIFTS
        seen = self._table[first * self.pictures.shape[1] + which]
        return which, seen.add_(noise.to(seen), alpha=NOISE).mul_(self._masks[place // SHIFTS])


SHIFTS = (2 * SHIFT + 1) ** 2


def shifted(pictures: Tensor) -> Tensor:
    """(n, 64) to (SHIFTS, n, 64): the pictures moved by each pair of (−1, 0, 1)."""
    images = pictures.unflatten(-1, (1, SIDE, SIDE))
    steps = range(-SHIFT, SHIFT + 1)
    moves = [torch.tensor([down, right]).expand(len(images), 2) for down in steps for right in steps]
    return torch.stack([base.crop_flip(images, move, None, 0.0).flatten(1) for move in moves])


def masks() -> Tensor:
    """(49, 64): 0 in the square that is left out, at each of its places."""
    places = range(SIDE - CUTOUT + 1)
    corners = torch.tensor([[row, column] for row in places for column in places])
    ones = torch.ones(len(corners), 1, SIDE, SIDE)
    return base.cutout(ones, corners, CUTOUT, 0.0).flatten(1)


def shuffled(count: int, length: int, seed: int, stream: int) -> Tensor:
    """The first so many of an endless stream of shuffled epochs."""
    epochs = -(-length // count)
    keys = torch.rand(epochs, count, generator=torch.Generator().manual_seed(1_000 * seed + 500 + stream))
    return keys.argsort(1).flatten()[:length]


def drawn_for_controls(seeds: Sequence[int], step: int, batch: int) -> tuple[Tensor, Tensor]:
    """The permutations and signs that :class:`metapl.ablation.Altered` draws for these seeds in a step."""

    def each(draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(torch.Generator().manual_seed(seed * 1_000_003 + step)) for seed in seeds])

    rows = each(lambda generator: torch.randperm(batch, generator=generator))
    coins = each(lambda generator: torch.randint(0, 2, (batch,), generator=generator) * 2 - 1)
    return rows, coins
