"""How many steps fit into a time, found by taking a few."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from metapl.apps.experiments.equal_cost import kinds_of_steps
from metapl.apps.pictures.store import FileImages, Images, MemoryImages
from metapl.apps.recipes.base import Task, rehearse
from metapl.apps.recipes.image_folders import ImageFolders
from metapl.apps.recipes.image_recipe import ImageParts
from metapl.data.feed import feed
from metapl.training import FitResult, Trainer

SHARE = 0.85
"""Part of the time that steps get; the rest is for reading pictures, validation, finetuning and the report."""

WARM, TIMED, SECONDS = 2, 20, 4.0
"""Steps before the timing, the greatest number of timed steps, and the greatest time that they may take."""

PICTURES, LARGER = 128, 1.25
"""Pictures of noise that the steps are taken on; how much larger they are in files than the network sees them."""

Clock = Callable[[], float]
"""Seconds from some moment on."""


def steps_within(recipe: ImageFolders, minutes: float, clock: Clock = time.monotonic) -> int:
    """The number of steps that fit into a time, rounded to two digits."""
    fits = SHARE * 60 * minutes / seconds_per_step(recipe, clock)
    return max(1, int(float(f"{fits:.2g}")))


def seconds_per_step(recipe: ImageFolders, clock: Clock = time.monotonic) -> float:
    """What a step of the recipe's method takes on this machine, on pictures of noise.

    Each kind of step is timed, and counts as often as it comes. Where views are cut out of the files themselves, these
    are files too, and reading them is a part of the step.

    Args:
        recipe: complete, of any number of steps.
        clock: ``time.process_time`` where other processes share the cores.

    Cost: some seconds; the default generator is put back.
    """
    seconds = 0.0

    def timed(trainer: Trainer, labeled: Any, unlabeled: Any, task: Task, **options: Any) -> FitResult:
        """In the place of a fit, a few steps."""
        nonlocal seconds
        sources = [source for source in (labeled, unlabeled) if source is not None]
        share: float = options.get("steps", recipe.steps) / recipe.steps  # of a phase that is shorter than the run
        with ExitStack() as opened:
            feeds = []
            for number, source in enumerate(sources):
                fed = feed(source, name=str(number), stop=2**31, num_workers=recipe.num_workers, device=trainer.device)
                opened.callback(fed.close)
                feeds.append(fed)
            for first, last, step in kinds_of_steps(trainer, recipe.steps, options.get("wait", 0)):
                trainer.steps_done = first
                each = _seconds(lambda step=step: step(*(fed.next() for fed in feeds)), clock)  # type: ignore[misc]
                seconds += share * (last - first) / recipe.steps * each
        return FitResult(None, 0, {name: value.clone() for name, value in trainer.student.state_dict().items()})

    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        images, labels = _noise(recipe, Path(folder)), torch.arange(PICTURES) % len(recipe.classes)
        parts = ImageParts(few=images, labels=labels, many=images, known=(images, labels))
        task = Task(**recipe.batches(parts), classes=recipe.classes, record={})
        rehearse(recipe, task, timed, recipe.torch_device())
    return seconds


def _seconds(step: Callable[[], Any], clock: Clock) -> float:
    """The median of a step, the making of its batches included."""
    times: list[float] = []
    begun = time.monotonic()
    while len(times) < WARM + TIMED and (len(times) <= WARM or time.monotonic() - begun < SECONDS):
        since = clock()
        step().as_dict()  # waits for the device
        times.append(clock() - since)
    return statistics.median(times[WARM:])


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
