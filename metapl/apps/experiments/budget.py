"""How many steps fit into a time, found by taking a few."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from metapl.apps.experiments.methods import rehearse
from metapl.apps.pictures.store import FileImages, Images, MemoryImages
from metapl.apps.recipes.base import Task
from metapl.apps.recipes.image_folders import ImageFolders
from metapl.apps.recipes.image_recipe import ImageParts
from metapl.data.feed import feed
from metapl.training import FitResult, Trainer

SHARE = 0.85
"""Part of the time that steps get; the rest is for reading pictures, validation, finetuning and the report."""

WARM, TIMED, SECONDS = 2, 20, 4.0
"""Steps before the timing, the greatest number of timed steps, and the greatest time that they may take."""

PICTURES = 128
"""Pictures of noise that the steps are taken on."""

LARGER = 1.25
"""How much larger the pictures in files are than the pictures that the network sees."""

Clock = Callable[[], float]
"""Seconds from some moment on."""


def _seconds(step: Callable[..., Any], batches: Iterator[Any], clock: Clock) -> float:
    """The median of a step, the making of its batches included."""
    times: list[float] = []
    begun = time.monotonic()
    while len(times) < WARM + TIMED and (len(times) <= WARM or time.monotonic() - begun < SECONDS):
        since = clock()
        report = step(*next(batches))
        report.as_dict()  # waits for the device
        times.append(clock() - since)
    return statistics.median(times[WARM:])


def _seconds_of_a_step(
    recipe: ImageFolders, trainer: Trainer, sources: Sequence[Any], waits: int, clock: Clock
) -> float:
    """Averaged over the run: steps differ before and after UDA begins, and while a student waits. Each kind is timed,
    and counts as often as it comes."""
    begins = min(getattr(recipe.method, "uda_start", None) or 0, recipe.steps)
    seconds = 0.0
    with ExitStack() as opened:
        feeds = []
        for number, source in enumerate(sources):
            batches = feed(source, name=str(number), stop=2**31, num_workers=recipe.num_workers, device=trainer.device)
            opened.callback(batches.close)
            feeds.append(batches)
        steps = iter(lambda: [batches.next() for batches in feeds], None)
        for first, last in pairwise(sorted({0, begins, waits, recipe.steps})):
            trainer.steps_done = first
            step = trainer.teacher_step if first < waits else trainer.step
            seconds += (last - first) / recipe.steps * _seconds(step, steps, clock)
    return seconds


def seconds_per_step(recipe: ImageFolders, clock: Clock = time.monotonic) -> float:
    """What a step of the recipe's method takes on this machine, on pictures of noise.

    Where views are cut out of the files themselves, these are files too, and reading them is a part of the step.

    Args:
        recipe: complete, of any number of steps.
        clock: ``time.process_time`` where other processes share the cores.

    Cost: some seconds; the default generator is put back.
    """
    seconds = []

    def timed(trainer: Trainer, labeled: Any, unlabeled: Any, task: Task, **options: Any) -> FitResult:
        """A fit of a few steps, which are timed."""
        sources = [labeled] if unlabeled is None else [labeled, unlabeled]
        waits = options.get("wait", 0)
        share: float = options.get("steps", recipe.steps) / recipe.steps  # of a phase that is shorter than the run
        seconds.append(share * _seconds_of_a_step(recipe, trainer, sources, waits, clock))
        return FitResult(None, 0, {name: value.clone() for name, value in trainer.student.state_dict().items()})

    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        images = _noise(recipe, Path(folder))
        labels = torch.arange(PICTURES) % len(recipe.classes)
        task = Task(
            **recipe.batches(ImageParts(few=images, labels=labels, many=images, known=(images, labels))),
            classes=recipe.classes,
            record={},
        )
        rehearse(recipe, task, timed, recipe.torch_device())
    return sum(seconds)


def _noise(recipe: ImageFolders, folder: Path) -> Images:
    """Pictures as the recipe's own are kept: in memory, or in files of ``folder`` where views are cut out of these."""
    generator = torch.Generator().manual_seed(0)
    channels = 1 if recipe.grey else 3

    def levels(side: int) -> Tensor:
        return torch.randint(0, 256, (PICTURES, channels, side, side), dtype=torch.uint8, generator=generator)

    if not recipe.resized_crop:
        return MemoryImages(levels(recipe.image_size))
    paths = [folder / f"{number}.png" for number in range(PICTURES)]
    for path, picture in zip(paths, levels(round(LARGER * recipe.image_size)), strict=True):
        Image.fromarray(picture.squeeze(0).numpy() if recipe.grey else picture.permute(1, 2, 0).numpy()).save(path)
    return FileImages(paths, size=(recipe.image_size,) * 2, mode="L" if recipe.grey else "RGB")


def steps_within(recipe: ImageFolders, minutes: float, clock: Clock = time.monotonic) -> int:
    """The number of steps that fit into a time, rounded to two digits.

    >>> _rounded(4371.8), _rounded(86.2)
    (4400, 86)
    """
    return _rounded(SHARE * 60 * minutes / seconds_per_step(recipe, clock))


def _rounded(steps: float) -> int:
    return max(1, int(float(f"{steps:.2g}")))
