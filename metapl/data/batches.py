"""Batches by position: item t of a data set here is the whole batch of step t, a pure function of t.

A run that resumes at step t asks for item t, and nothing is replayed. That is the interface the trainer relies on: any
object with ``__getitem__(step)`` serves it, and :func:`loader` serves the same items from worker processes.
"""

from __future__ import annotations

import signal
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from metapl.data import draws
from metapl.data.sampler import StepSampler
from metapl.data.views.base import View
from metapl.device import to_device
from metapl.errors import MetaplError

BatchT = TypeVar("BatchT")

# One derived seed per role, so that no two views of one step share their draws even under one seed.
_LABELED, _WEAK, _STRONG = range(3)


class StepBatches(Dataset[BatchT], ABC):
    """A map-style data set whose item t is the batch of step t.

    A subclass has a field ``steps``, the number of steps or None for an endless stream, and says in :meth:`batch` what
    step t holds, from t and its own constant fields alone. ``batches[t]`` and ``len(batches)`` follow.

    Where half of the work is better done on the device, :meth:`raw` and :meth:`augment` are its halves; without them,
    the first is all of it.
    """

    steps: int | None

    @abstractmethod
    def batch(self, step: int) -> BatchT:
        """The batch of a step in [0, len(self))."""

    def raw(self) -> StepBatches[Any]:
        """What is fetched, for workers that leave the rest to the device; of as many steps."""
        return self

    def augment(self, step: int, fetched: Any) -> BatchT:
        """``self[step]``, from ``self.raw()[step]`` on whatever device it is on."""
        batch: BatchT = fetched
        return batch

    def __getitem__(self, step: int) -> BatchT:
        if step < 0:
            raise MetaplError(f"step is {step}; expected 0 or more: batches are counted from the start of the run")
        if step >= len(self):
            # What ends a ``for`` loop over the data set.
            raise IndexError(f"step is {step}, but there are {len(self)} steps")
        return self.batch(step)

    def __len__(self) -> int:
        return sys.maxsize if self.steps is None else self.steps


@dataclass(frozen=True, eq=False)
class LabeledBatches(StepBatches[tuple[Tensor, Tensor]]):
    """The labelled batches: item t is (x, y), with x the view of the sampled images.

    x = view(images[i]), y = labels[i], i = sampler.indices(t).

    Args:
        images: (n, ...) on any device.
        labels: (n, ...) on any device.
        sampler: picks from n examples.
        view: augments; :class:`~metapl.data.Identity` does not.
        seed: of the view's draws, any integer.
        steps: number of steps, or None for an endless stream.

    Items: x (B, ...) and y (B, ...). An example that a batch holds more than once is augmented anew each time.

    Raises:
        MetaplError: images, labels and sampler disagree on n, or steps is negative; on access, a negative step.

    >>> from metapl.data import Identity, StepSampler
    >>> images, labels = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    >>> x, y = LabeledBatches(images, labels, StepSampler(20, 32, seed=0), Identity(), seed=0)[1000]
    >>> x.shape, y.shape
    (torch.Size([32, 1, 8, 8]), torch.Size([32]))
    """

    images: Tensor
    labels: Tensor
    sampler: StepSampler
    view: View
    seed: int
    steps: int | None = None

    def __post_init__(self) -> None:
        _check("LabeledBatches", self.sampler, self.steps, images=self.images, labels=self.labels)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(x, y) of a step."""
        x = _view(self.view, self.images, self.sampler, step, draws.fold_in(self.seed, _LABELED))
        return x, _pick(self.labels, self.sampler.indices(step))


@dataclass(frozen=True, eq=False)
class UnlabeledBatches(StepBatches[Tensor | tuple[Tensor, Tensor]]):
    """The unlabelled batches: item t is (weak, strong), two views of the same images, or one tensor.

    weak = weak_view(images[i]), strong = strong_view(images[i]), i = sampler.indices(t), with independent draws.

    Args:
        images: (n, ...) on any device.
        sampler: picks from n examples.
        weak: the view that the teacher labels.
        strong: the view that the student learns, or None for items of the weak view alone.
        seed: of the views' draws, any integer.
        steps: number of steps, or None for an endless stream.

    Items: a pair of tensors (B, ...), or one tensor (B, ...) without a strong view.

    Raises:
        MetaplError: images and sampler disagree on n, or steps is negative; on access, a negative step.

    >>> from metapl.data import Identity, ShiftNoiseCutout, StepSampler
    >>> images = torch.rand(100, 1, 8, 8)
    >>> batches = UnlabeledBatches(images, StepSampler(100, 64, seed=0), Identity(), ShiftNoiseCutout(), seed=0)
    >>> weak, strong = batches[7]
    >>> weak.shape == strong.shape
    True
    """

    images: Tensor
    sampler: StepSampler
    weak: View
    strong: View | None
    seed: int
    steps: int | None = None

    def __post_init__(self) -> None:
        _check("UnlabeledBatches", self.sampler, self.steps, images=self.images)

    def batch(self, step: int) -> Tensor | tuple[Tensor, Tensor]:
        """(weak, strong) of a step, or weak alone."""
        weak = _view(self.weak, self.images, self.sampler, step, draws.fold_in(self.seed, _WEAK))
        if self.strong is None:
            return weak
        return weak, _view(self.strong, self.images, self.sampler, step, draws.fold_in(self.seed, _STRONG))


def loader(
    batches: StepBatches[BatchT], start: int, stop: int, num_workers: int = 0, *, pin_memory: bool = False
) -> DataLoader[BatchT]:
    """Serve the batches of steps start, …, stop − 1 in order.

    Args:
        batches: item t is the batch of step t.
        start: first step, 0 or more; a resumed run starts where it stopped.
        stop: the step after the last.
        num_workers: processes that prepare batches ahead; 0 prepares them in this one.
        pin_memory: serve tensors in pinned memory, from which they are copied to CUDA without a wait; they must come
            from the CPU.

    Returns:
        A loader whose items are ``batches[start]``, …, ``batches[stop - 1]``, whatever the number of workers. It leaves
        the default random number generator alone.

    Raises:
        MetaplError: the steps are not 0 ≤ start ≤ stop ≤ len(batches), or the number of workers is negative.

    >>> from metapl.data import Identity, StepSampler
    >>> batches = UnlabeledBatches(torch.rand(10, 2), StepSampler(10, 4, seed=0), Identity(), None, seed=0)
    >>> [bool((x == batches[t]).all()) for t, x in enumerate(loader(batches, 5, 8), start=5)]
    [True, True, True]
    """
    if not 0 <= start <= stop <= len(batches):
        raise MetaplError(
            f"loader got steps {start} to {stop} of {len(batches)}; expected 0 <= start <= stop <= len(batches): "
            "a stream without an end has steps=None"
        )
    if num_workers < 0:
        raise MetaplError(f"loader got num_workers {num_workers}; expected 0 or more, 0 for no worker processes")
    return DataLoader(
        batches,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=num_workers,
        worker_init_fn=_begin_worker,
        pin_memory=pin_memory,
        # A loader draws a base seed for its workers. From the default generator, that would change what dropout and
        # sampled labels draw after a restart.
        generator=torch.Generator(),
    )


def _begin_worker(worker: int) -> None:
    # Ctrl-C, and who stops a group of processes, reach the workers too; the parent needs them for the step under way.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whoever means it asks twice, as Python does at its end.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    # Errors travel to the parent. What is printed here is that a parent that failed fetched nothing any more.
    sys.excepthook = lambda kind, error, trace: None


def _view(view: View, images: Tensor, sampler: StepSampler, step: int, seed: int) -> Tensor:
    indices = sampler.indices(step)
    # With B > n a batch holds copies of an example; counting the epoch in keeps their augmentations apart.
    examples = sampler.epochs(step) * sampler.size + indices
    # On the CPU, wherever the images are: a view that plans there would otherwise wait for the device.
    return view(_pick(images, indices), seed=seed, step=step, examples=examples)


def _pick(values: Tensor, indices: Tensor) -> Tensor:
    picked: Tensor = values[to_device(indices, values.device)]
    return picked


def _check(name: str, sampler: StepSampler, steps: int | None, **tensors: Tensor) -> None:
    counts = {key: len(value) for key, value in tensors.items()}
    if set(counts.values()) != {sampler.size}:
        given = ", ".join(f"{count} {key}" for key, count in counts.items())
        raise MetaplError(
            f"{name} got {given} and a sampler of size {sampler.size}; expected the same number everywhere: "
            "StepSampler(len(images), batch_size, seed)"
        )
    if steps is not None and steps < 0:
        raise MetaplError(f"{name} got steps {steps}; expected a number of steps, or None for an endless stream")
