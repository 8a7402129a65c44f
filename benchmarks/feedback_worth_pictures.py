r"""Generated pictures for stacks of small convolutional networks: what ``feedback_worth.py --device cuda`` trains with.

Not run on a GPU yet: on the CPU in miniature, and a step beside :class:`metapl.BilevelTrainer` in float64.

The networks of all seeds are one stack of weights, run by ``torch.func.vmap`` and differentiated by ``vjp`` and
``jvp``, in bfloat16 on a GPU; the step is that of ``when_stack.py``. The network is ``pooled_cnn`` without running
statistics: batch norm takes those of a pass, a pass for each view, and those of some unlabeled pictures where accuracy
is read. Group norm would need neither, but a mean over the positions of a picture that is normalized by itself says
little: after 160 steps of SGD on labeled letters the loss was 2.4 with it, 1.9 with batch norm, and 2.5 is chance.

A place is a problem of the seen half with 20,000 unlabeled pictures, those of no class among them. Every seed has its
own labeled pictures and weights; unlabeled and test pictures are drawn in as many parts as there are seeds, and shared
by them. Tuning has other pictures than the final runs, and is read on some that are drawn as the unlabeled ones are,
and set aside. Pictures are seen as ``metapl train images`` shows them where color tells no classes apart: weakly
changed for the teacher to label, strongly for all that is learned from.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import results
from torch import Tensor, nn
from torch.func import functional_call, jvp, stack_module_state, vjp, vmap
from torch.nn import functional as F
from when_stack import Batch, Passes, Weights, copied, cosine, descend

sys.path.append(str(Path(__file__).parents[1]))  # where `benchmarks` is a package

from benchmarks.pictures.problem import Problem
from benchmarks.pictures.problems import FOREIGN, Pictures, arrays, named
from metapl.apps.networks.architecture import pooled_cnn
from metapl.apps.pictures.views.base import View
from metapl.apps.recipes.image_folders import Changes
from metapl.data import draws
from metapl.execution.kernels import load_forward_mode

FINETUNE_LR, READ_AT_ONCE = 0.02, 500
CHUNK = 16
"""Steps whose batches are drawn at once: the only time that the device is waited for. Another number gives other
draws."""

WHICH, LABELED, WEAK, STRONG, FINETUNING = range(5)
"""Streams of draws; those of a labeled stream say which pictures are in its batches, too."""


# -------------------------------------------------------------------------------------------------------- the networks


class Norm(nn.BatchNorm2d):
    """Batch norm, in the weights' precision, by the statistics of a pass or of its first ``known`` pictures."""

    def __init__(self, channels: int, known: int | None) -> None:
        super().__init__(channels, track_running_stats=False)
        self.known = known

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if self.known is None:
            return super().forward(x)
        var, mean = torch.var_mean(x[: self.known], (0, 2, 3), correction=0)
        return F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=self.eps)


def network(problem: Problem, known: int | None = None) -> nn.Module:
    """A classifier of its pictures, with :class:`Norm`."""
    made = pooled_cnn(len(problem.classes), problem.channels, image_size=problem.size)
    for part in [*made.modules()]:
        for name, child in part.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(part, name, Norm(child.num_features, known))
    return made.eval()  # vmap refuses dropout, of whatever rate


def stacked(networks: list[nn.Module]) -> Weights:
    """Their weights, (S, ...) each."""
    return [weight.detach() for weight in stack_module_state(networks)[0].values()]


def outputs_of(one: nn.Module) -> Callable[[Weights, Tensor], Tensor]:
    """Weights of a stack of such networks and inputs (S, B, ...) to the outputs, (S, B, C)."""
    names = [name for name, _ in one.named_parameters()]
    bare = copy.deepcopy(one).to("meta")

    def of_one(weights: tuple[Tensor, ...], x: Tensor) -> Tensor:
        outputs: Tensor = functional_call(bare, dict(zip(names, weights, strict=True)), (x,))
        return outputs

    def outputs(weights: Weights, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            return vmap(of_one)(tuple(weights), x).to(x.dtype)

    return outputs


def passes_of(outputs: Callable[[Weights, Tensor], Tensor]) -> Passes:
    """The passes of a step; what a forward pass keeps is a function of the weights, and its pullback."""

    def forward(weights: Weights, *views: Tensor, fixed: int = 0) -> tuple[tuple[Callable[..., Any], ...], Tensor]:
        def of_rest(*w: Tensor) -> Tensor:
            return torch.cat([outputs(w, x) for x in views[fixed:]], 1)

        logits, pull = vjp(of_rest, *weights)
        return (of_rest, pull), torch.cat([*(outputs(weights, x) for x in views[:fixed]), logits], 1)

    def backward(weights: Weights, kept: tuple[Callable[..., Any], ...], at_outputs: Tensor) -> Weights:
        return list(kept[1](at_outputs))

    def tangent(weights: Weights, kept: tuple[Callable[..., Any], ...], w: Weights) -> tuple[None, Tensor]:
        return None, jvp(kept[0], tuple(weights), tuple(w))[1]

    def curved(
        weights: Weights, kept: tuple[Callable[..., Any], ...], w: Weights, _: None, at_outputs: Tensor, moved: Tensor
    ) -> Weights:
        def gradient(v: Weights, g: Tensor) -> Weights:
            with torch.enable_grad():  # else batch norm's backward pass is one that has no forward mode
                return vjp(kept[0], *v)[1](g)

        return list(jvp(gradient, (tuple(weights), at_outputs), (tuple(w), moved))[1])

    load_forward_mode()
    return Passes(forward, backward, tangent, curved)


# -------------------------------------------------------------------------------------------------------- the pictures


@dataclass(frozen=True)
class Generated:
    """A problem of the seen half, with other numbers of pictures.

    Args:
        problem: its name.
        unlabeled: unlabeled pictures.
        held_out: pictures that tuning is read on, and test pictures.
        batch: labeled pictures in a batch; of unlabeled ones, whose noise is the feedback's, there are twice as many.
    """

    problem: str
    unlabeled: int = 20_000
    held_out: int = 2_000
    batch: int = 64

    def __str__(self) -> str:
        return f"{self.problem}, {self.unlabeled:,} unlabeled pictures"


def one_part(place: Generated, seed: int, parts: int) -> Pictures:
    """A seed's labeled pictures, and its part of the others."""
    many = (place.unlabeled + place.held_out) // parts
    problem = dataclasses.replace(named(place.problem), unlabeled=many, test=place.held_out // parts)
    return arrays(problem, seed)


def drawn(place: Generated, seeds: tuple[int, ...], folder: Path, workers: int) -> dict[str, np.ndarray]:
    """All pictures as they are drawn, (..., H, W, channels) uint8, and their labels; from a file where it is there."""
    file = folder / f"{place.problem}-{place.unlabeled}-{seeds[0]}-{len(seeds)}.npz"
    if not file.exists():
        parts = [*results(one_part, [(place, seed, len(seeds)) for seed in seeds], workers)]
        every = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
        columns = {name: (np.stack if name.startswith("labeled") else np.concatenate)(c) for name, c in every.items()}
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".part")
        with partial.open("wb") as opened:
            np.savez(opened, **columns)
        partial.replace(file)  # all of it or none
    with np.load(file) as columns:
        return dict(columns)


class GeneratedTask:
    """The pictures of a place for a stack of seeds, on a device, and the networks that learn from them: a ``Task`` of
    ``feedback_worth.py``.

    What is drawn for a seed depends on the seed, the chunk and the place in it alone, by
    :mod:`metapl.data.draws`.
    """

    shares = None

    def __init__(
        self, place: Generated, seeds: tuple[int, ...], device: torch.device, folder: Path, workers: int
    ) -> None:
        self.place, self.seeds, self.device = place, seeds, device
        self.problem, columns = named(place.problem), drawn(place, seeds, folder, workers)
        on_device = {name: torch.from_numpy(column).to(device) for name, column in columns.items()}
        labeled, unlabeled, test = (
            (on_device[name].movedim(-1, -3).contiguous(), on_device[f"{name}_labels"])
            for name in ("labeled", "unlabeled", "test")
        )
        kept, aside = zip(*(column.tensor_split([place.unlabeled]) for column in unlabeled), strict=True)
        self.labeled, self.unlabeled = labeled, kept[0]
        self.parts = {
            name: (x[y != FOREIGN], y[y != FOREIGN])
            for name, (x, y) in (("unlabeled", kept), ("validation", aside), ("test", test))
        }
        self.labeled_shares = F.one_hot(labeled[1], len(self.problem.classes)).float().mean(1)
        levels = self.unlabeled.transpose(0, 1).flatten(1).float() / 255
        self.mean, self.std = (each[:, None, None] for each in (levels.mean(1), levels.std(1)))
        changes = Changes().settled(recolor=True)  # as the recipe finds these problems
        self.weak, self.strong = changes.weak(), changes.strong()
        self.passes = passes_of(outputs_of(network(self.problem)))
        known = self.unlabeled[:READ_AT_ONCE]
        self._known, self._read = self._normalized(known), outputs_of(network(self.problem, len(known)))

    def first_weights(self) -> tuple[Weights, Weights]:
        """Teachers and students as they begin."""
        pairs = []
        for seed in self.seeds:
            torch.manual_seed(seed)
            pairs.append((network(self.problem), network(self.problem)))
        teachers, students = ([w.to(self.device) for w in stacked([*same])] for same in zip(*pairs, strict=True))
        return teachers, students

    def batches(self, steps: int) -> Iterator[Batch]:
        """Of the steps of training."""
        nothing, labeled = torch.empty(0), self._labeled(LABELED, steps)
        for step, (x, targets) in enumerate(labeled):
            chunk, t = divmod(step, CHUNK)
            if t == 0:
                which = self._which(WHICH, chunk, len(self.unlabeled), 2 * self.place.batch)
                weak, strong = (
                    self._seen(view, stream, chunk, self.unlabeled[which])
                    for view, stream in ((self.weak, WEAK), (self.strong, STRONG))
                )
            yield Batch(x, targets, [weak[t]], [strong[t]], nothing, nothing)

    def finetuned(self, weights: Weights, steps: int) -> Weights:
        """The networks after some more steps on the labeled pictures."""
        weights = copied(weights)
        for step, (x, targets) in enumerate(self._labeled(FINETUNING, steps)):
            descend(weights, x, targets, None, FINETUNE_LR * cosine(step, steps), 0.0, self.passes)
        return weights

    def called(self, weights: Weights, part: str) -> tuple[Tensor, Tensor]:
        """The classes that the networks find in the pictures of a part, and the true ones, (S, n) both."""
        pictures, truth = self.parts[part]
        many, found = (len(self.seeds), *[-1] * pictures.ndim), []
        for part_of_them in pictures.split(READ_AT_ONCE):
            x = torch.cat([self._known, self._normalized(part_of_them)]).expand(many)
            found.append(self._read(weights, x)[:, len(self._known) :])
        return torch.cat(found, 1).argmax(-1), truth.expand(len(self.seeds), -1)

    def _labeled(self, stream: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Strongly changed labeled pictures, and one-hot labels."""
        pictures, labels = self.labeled
        targets = F.one_hot(labels, len(self.problem.classes)).float()
        seed = torch.arange(len(self.seeds), device=self.device)[:, None]
        for step in range(steps):
            chunk, t = divmod(step, CHUNK)
            if t == 0:
                which = self._which(stream, chunk, labels.shape[1], self.place.batch)
                seen, said = self._seen(self.strong, stream, chunk, pictures[seed, which]), targets[seed, which]
            yield seen[t], said[t]

    def _which(self, stream: int, chunk: int, count: int, batch: int) -> Tensor:
        """(CHUNK, S, B): each batch without a picture twice, and where it is larger than that, in whole rounds."""
        rounds = -(-batch // count)
        u = draws.uniform(stream, chunk, self._keys(1).flatten(), rounds * count, dtype=torch.float64)
        return u.view(CHUNK, len(self.seeds), rounds, count).argsort(-1).flatten(2)[..., :batch]

    def _seen(self, view: View, stream: int, chunk: int, pictures: Tensor) -> Tensor:
        """Pictures (CHUNK, S, B, C, H, W) uint8 as the networks get them."""
        keys = self._keys(pictures.shape[2])
        seen = view(pictures.flatten(0, 2).float() / 255, seed=stream, step=chunk, examples=keys.flatten())
        return ((seen - self.mean) / self.std).unflatten(0, keys.shape)

    def _normalized(self, pictures: Tensor) -> Tensor:
        return (pictures.float() / 255 - self.mean) / self.std

    def _keys(self, batch: int) -> Tensor:
        """(CHUNK, S, B): what a draw is of."""
        seeds = torch.tensor(self.seeds, device=self.device)[:, None]
        places = torch.arange(CHUNK * batch, device=self.device).view(CHUNK, 1, batch)
        return seeds * 2**32 + places
