"""A recipe for a user's own pictures, with a value for all that was left open.

What a few of the pictures show decides most, and how many steps fit into the time is found by taking a few.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from metapl.apps.networks.weights import fetch_imagenet_weights
from metapl.apps.pictures.folders import scan_labeled
from metapl.apps.pictures.reader import LUMA, UnreadableImage, read_image
from metapl.apps.pictures.store import FileImages, Images, MemoryImages
from metapl.apps.recipes.base import SELECTED_ON, Task, rehearse
from metapl.apps.recipes.image_folders import Changes, ImageFolders
from metapl.apps.recipes.image_recipe import IMAGENET, ImageParts, whole
from metapl.apps.recipes.settings import OPEN, SelfTraining, require
from metapl.data.feed import feed
from metapl.errors import MetaplError
from metapl.problems.losses import UDA
from metapl.training import FitResult, Say, Trainer

SET_ASIDE = 0.2  # part of the labeled pictures to select on, where that is enough of them to tell anything
SMALLEST_SIDE, GREATEST_SIDE, PRETRAINED_SIDE = 16, 48, 128  # pixels; the first two where a network starts from nothing
PRETRAINED_NETWORK, IMAGENET_WEIGHTS = "resnet18", "imagenet"
PHOTOGRAPHS = 128  # side in pixels from which on color pictures are taken for photographs
MINUTES = 5.0  # for training, where neither minutes nor steps are given
REHEARSED = 1000  # steps of the recipe that is measured: of such a recipe, a few are taken
AGAIN = 2  # how often the number of steps is measured again where parts of it were asked for
FEW_STEPS = 300  # below which a network that starts from nothing has hardly learned
MANY_COPIES = 10  # how often a picture may be in one batch before that is told


def settled(
    recipe: ImageFolders,
    before: ImageFolders | None = None,
    say: Say | None = None,
    check: Callable[[ImageFolders], None] | None = None,
) -> ImageFolders:
    """The recipe as it can be stored: whole paths, the classes that are found, and a value for every field.

    What was chosen in ``before``, the recipe of the run that is resumed, is not chosen anew. ``check`` refuses the
    recipe before any step of it is measured; the number of steps may be open still.
    """
    given, say = recipe, say or (lambda text: None)
    places: dict[str, Any] = {name: whole(getattr(given, name)) for name in given.places}
    labeled, unlabeled = given.trained_on()
    weights = whole(given.weights)
    if given.weights == IMAGENET_WEIGHTS:
        weights = str(fetch_imagenet_weights(given.network_name or PRETRAINED_NETWORK))
    own: dict[str, Any] = {"weights": weights, "class_names": labeled.classes, "method": given.method.whole()}
    recipe = dataclasses.replace(given, **{**places, **own})
    if before is not None:
        kept = {name: getattr(before, name) for name in (*given.chosen, "minutes") if getattr(given, name) is None}
        kept["method"] = recipe.method.settled(vars(before.method))
        recipe = dataclasses.replace(recipe, **kept, changes=given.changes.settled(bool(before.changes.recolor)))
        return recipe.for_network(recipe.network_name)
    given.check_first()
    size, count = getattr(given, given.batch_of_few), len(labeled)
    if size > MANY_COPIES * count:
        say(
            f"note: --{given.batch_of_few.replace('_', '-')} {size:,} is {size // count:,} times the {count:,} "
            "pictures that it is drawn from: each is in every batch so often, and each copy costs the time of a picture"
        )
    seen = look([*map(Path, labeled.paths())], labeled.targets(), [*map(Path, unlabeled.paths())])
    recipe = fitted(recipe, seen)
    if check is not None:
        check(recipe)
    if recipe.grey and (given.changes.hue is not None or given.changes.saturation != Changes.saturation):
        say("note: the pictures are grey, and changes of hue and saturation have no effect")
    recipe = _with_steps(recipe)
    say(chosen(recipe, seen))
    if given.steps is OPEN and recipe.steps < FEW_STEPS:
        say(f"note: {recipe.steps} steps are few, for this machine is slow or busy: give more --minutes, or --steps")
    if seen.colors.may_tell and given.changes.recolor is None and not (recipe.grey or recipe.randaugment):
        say(
            f"note: by their colors alone {seen.colors.right:.0%} of the labeled pictures are told apart, and by "
            f"chance {seen.colors.chance:.0%}, so colors may matter, and are exchanged: if they do, give "
            "--changes.recolor False"
        )
    if recipe.weights is None and not recipe.grey and seen.side >= PHOTOGRAPHS:
        say("for photographs a network that was trained on photographs is better: --weights imagenet")
    return recipe


def _with_steps(recipe: ImageFolders) -> ImageFolders:
    """The recipe with the number of steps that fit into its minutes, where it is open."""
    if recipe.steps is not OPEN:
        # The minutes of a recipe whose steps were given decide nothing: they stay open.
        return dataclasses.replace(recipe.scheduled(recipe.steps), minutes=OPEN)
    # Phases that were given in steps do not grow with the number of steps: it is measured again with what fits.
    asked = max(getattr(recipe.method, name, 0) or 0 for name in ("wait", "uda_start"))
    minutes = recipe.minutes or MINUTES
    steps = steps_within(recipe.scheduled(2 * asked or REHEARSED), minutes)
    for _ in range(AGAIN if asked else 0):
        steps = steps_within(recipe.scheduled(max(steps, asked + 1)), minutes)
    return dataclasses.replace(recipe.scheduled(steps), minutes=minutes)


def fitted(recipe: ImageFolders, seen: Look) -> ImageFolders:
    """The recipe for such pictures, but for what depends on the number of steps."""
    grey = seen.grey and recipe.weights is None if recipe.grey is None else recipe.grey
    channels = 1 if grey else 3
    aside = round(SET_ASIDE * len(scan_labeled(recipe.labeled))) if not recipe.val else 0
    mean, std = (part * 3 if seen.grey else part for part in (seen.mean, seen.std))
    if grey:
        mean, std = seen.level[:1], seen.level[1:]
    elif recipe.weights is not None:
        mean, std = IMAGENET
    side = 4 * round(min(max(seen.side, SMALLEST_SIDE), GREATEST_SIDE) / 4)
    choices: dict[str, Any] = {
        "grey": grey,
        "image_size": PRETRAINED_SIDE if recipe.weights else side,
        "network_name": PRETRAINED_NETWORK if recipe.weights else "pooled_cnn",
        # Too few to select on train better.
        "val_fraction": SET_ASIDE if aside >= SELECTED_ON else 0.0,
        "mean": mean,
        "std": std,
    }
    missing = {name: value for name, value in choices.items() if getattr(recipe, name) is None}
    missing["method"] = recipe.method.settled({"uda_prior": seen.shares})
    recipe = dataclasses.replace(recipe, **missing, changes=recipe.changes.settled(seen.exchangeable))
    for name in ("mean", "std"):
        expected = f"{channels} for {'grey' if grey else 'color'} pictures"
        require(recipe, len(getattr(recipe, name)) == channels, name, expected)
    return recipe.for_network(recipe.network_name)


def chosen(recipe: ImageFolders, seen: Look | None = None) -> str:
    """What was chosen, in a line, and what pictures that were looked at lose by it; each has a flag."""
    optimizer = recipe.method.optimizers()[recipe.method.built_as]
    cut = ["cut to squares"] if seen is not None and not seen.square else []
    cut += [f"shrunk from about {seen.side}"] if seen is not None and seen.side > recipe.image_size else []
    lost = f" ({', '.join(cut)})" if cut else ""
    size, kind = f"{recipe.image_size}x{recipe.image_size}", "grey" if recipe.grey else "color"
    if recipe.randaugment:
        mirrored = "not mirrored" if recipe.strong.writing else "mirrored (not with --strong.writing)"
        changed = f"changed by RandAugment, {mirrored}"
    else:
        colors = f"{'light and dark' if recipe.grey else 'colors'} {'exchanged' if recipe.changes.recolor else 'kept'}"
        changed = f"{colors}, {'mirrored' if recipe.changes.mirror else 'not mirrored'}"
    rounds = recipe.method.selection
    networks = (", then ".join(rounds.networks) if isinstance(rounds, SelfTraining) else "") or recipe.network_name
    return (
        f"chosen: {networks} on {size} {kind} pictures{lost}, {changed}; "
        f"{optimizer.algorithm} at {optimizer.lr:g}, {recipe.precision}, {recipe.steps:,} steps"
    )


# ------------------------------------------------------------------------------------------- what the pictures show

# How many pictures are read at most, of the labeled ones, and again of the unlabeled ones; pixels that a picture is
# brought to for a look at its colors; rows and columns where the object of most pictures is, not the background.
LOOKED_AT, SIDE = 256, 32
MIDDLE = slice(SIDE // 4, -(SIDE // 4))

# Greatest difference between the channels of a pixel, in levels of 256, in a picture that counts as grey; standard
# deviation in [0, 1] that blank pictures are given.
ALIKE, SMALLEST_STD = 8, 0.05

# Shuffles of the labels that colors are compared with; of these and the labels as they are, the most that find the
# classes as well where color tells them apart, and where it may: by chance it does so in one set of a hundred, and may
# in one of ten. Colors that are exchanged for nothing cost the only thing that tells such classes apart, and colors
# that are kept for nothing a kind of augmentation.
SHUFFLES, CHANCES, DOUBTS = 199, 2, 20

# Pixels, of SIDE, of the square that a pixel is compared with; share of pictures, at least, with marks of the rarer
# kind where both light and dark marks are usual.
AROUND, BOTH = 9, 0.2


@dataclass(frozen=True)
class Colors:
    """Whether the mean color of the middle, or its mean level of grey, tells the labeled pictures' classes apart."""

    right: float  # share of pictures that are nearest to the mean of the others of their class, averaged over classes
    chance: float  # the same share expected of guessing evenly among the classes
    tell: bool  # whether it is more than chance explains
    may_tell: bool = False  # whether it is rather more, and the pictures are too few to say


@dataclass(frozen=True)
class Look:
    """A data set as a few of its pictures show it."""

    side: int  # median of the shorter sides, in pixels
    grey: bool  # none of the pictures has colors
    mean: tuple[float, ...]  # of each channel (one where grey), in [0, 1]
    std: tuple[float, ...]
    level: tuple[float, float]  # mean and standard deviation of the pictures without their colors
    colors: Colors
    light: float  # share of the pictures whose marks are lighter than what is around them, not darker
    shares: tuple[float, ...]  # of the classes among all labeled pictures, as if each had one more: no share is 0
    square: bool = True  # all of the pictures are as high as wide

    @property
    def exchangeable(self) -> bool:
        """Whether colors may be exchanged, or light and dark; not where all marks are light, as in an X-ray."""
        return not self.colors.tell and (not self.grey or BOTH <= self.light <= 1 - BOTH)


def look(labeled: Sequence[Path], labels: Tensor, unlabeled: Sequence[Path]) -> Look:
    """What at most ``LOOKED_AT`` pictures of each kind show, evenly spread; labels are int64 (len(labeled),)."""
    sides, pictures, classes, square = [], [], [], True
    few, many = (
        list(zip(files, each, strict=True))[:: max(1, -(-len(files) // LOOKED_AT))]
        for files, each in ((labeled, labels.tolist()), (unlabeled, [-1] * len(unlabeled)))
    )
    for path, label in (*few, *many):
        try:
            picture = read_image(path)
        except UnreadableImage:
            continue  # is listed, with the reason, when the folders are checked
        sides.append(min(picture.shape[1:]))
        square &= picture.shape[1] == picture.shape[2]
        pictures.append(torch.nn.functional.interpolate(picture[None].float(), (SIDE, SIDE), mode="area")[0])
        classes.append(label)
    if not any(label >= 0 for label in classes):
        raise MetaplError(f"none of the {len(few)} labeled pictures that were looked at can be read.")
    levels_N3HW, label_N = torch.stack(pictures), torch.tensor(classes)
    grey = bool((levels_N3HW.amax(1) - levels_N3HW.amin(1)).max() <= ALIKE)
    unit = (levels_N3HW[:, :1] if grey else levels_N3HW) / 255
    level_NHW = (levels_N3HW / 255 * torch.tensor(LUMA)[:, None, None]).sum(1)
    # The marks of a picture are lighter than what is around them where the skewness of the differences is above 0.
    padded = torch.nn.functional.pad(level_NHW[:, None], (AROUND // 2,) * 4, mode="reflect")
    marks_NHW = level_NHW - torch.nn.functional.avg_pool2d(padded, AROUND, stride=1)[:, 0]
    counts = (torch.bincount(labels) + 1).tolist()

    def spread(std: float) -> float:
        """A standard deviation that can be divided by: blank pictures have 0."""
        return round(max(std, SMALLEST_STD), 3)

    return Look(
        side=int(statistics.median(sides)),
        grey=grey,
        mean=tuple(round(value, 3) for value in unit.mean((0, 2, 3)).tolist()),
        std=tuple(spread(value) for value in unit.std((0, 2, 3)).tolist()),
        level=(round(float(level_NHW.mean()), 3), spread(float(level_NHW.std()))),
        colors=colors_tell(unit[label_N >= 0][..., MIDDLE, MIDDLE].mean((2, 3)), label_N[label_N >= 0]),
        light=float((marks_NHW.pow(3).mean((1, 2)) > 0).double().mean()),
        shares=tuple(count / sum(counts) for count in counts),
        square=square,
    )


def colors_tell(colors_NC: Tensor, labels_N: Tensor) -> Colors:
    """Whether the nearest class mean, with each example left out of its own, finds the classes.

    ``colors_NC`` are the mean colors of each picture's middle. The share found, averaged over classes, is compared with
    that of ``SHUFFLES`` shuffles of the labels: whatever the sizes of the classes, colors that have nothing to do with
    them tell them apart in one of a hundred sets. They do not where no class has two examples.

    >>> reds = torch.tensor([[0.9], [0.8], [0.85], [0.1], [0.2], [0.15]]).repeat(3, 1)
    >>> colors_tell(reds, torch.tensor([0, 0, 0, 1, 1, 1]).repeat(3)).tell
    True
    >>> colors_tell(reds, torch.tensor([0, 1, 0, 1, 0, 1]).repeat(3)).tell
    False
    """
    classes, labels = labels_N.unique(return_inverse=True)
    chance = 1 / len(classes)
    if len(classes) < 2 or int(labels.bincount().max()) < 2:
        return Colors(chance, chance, False)
    scaled = (colors_NC - colors_NC.mean(0)) / colors_NC.std(0).clamp_min(1e-6)
    generator = torch.Generator().manual_seed(0)
    shuffled = (labels[torch.randperm(len(labels), generator=generator)] for _ in range(SHUFFLES))
    right = _found(scaled, labels)
    as_well = 1 + sum(_found(scaled, order) >= right for order in shuffled)
    return Colors(right, chance, tell=as_well <= CHANCES, may_tell=CHANCES < as_well <= DOUBTS)


def _found(colors_NC: Tensor, labels: Tensor) -> float:
    """The share of each class that is nearest to its own mean, of classes that have two examples, averaged."""
    counts_K = labels.bincount()
    member_NK = torch.nn.functional.one_hot(labels, len(counts_K)).to(colors_NC.dtype)
    sums_KC = member_NK.T @ colors_NC
    # Each picture is taken out of the mean of its own class.
    left_NKC = sums_KC[None] - member_NK[:, :, None] * colors_NC[:, None]
    means_NKC = left_NKC / (counts_K[None, :, None] - member_NK[:, :, None]).clamp_min(1)
    nearest_N = (colors_NC[:, None] - means_NKC).square().sum(-1).argmin(1)
    right_K = labels.bincount(weights=(nearest_N == labels).double(), minlength=len(counts_K)) / counts_K
    return float(right_K[counts_K >= 2].mean())


# ------------------------------------------------------------------------------------ how many steps fit into a time

SHARE = 0.85  # part of the time that steps get; the rest is for reading, validation, finetuning and the report
WARM, TIMED, SECONDS = 2, 20, 4.0  # steps before the timing, the most timed steps, and the most time that they take
PICTURES, LARGER = 128, 1.25  # pictures of noise that steps are taken on; how much larger in files than seen

Clock = Callable[[], float]  # seconds from some moment on


def steps_within(recipe: ImageFolders, minutes: float, clock: Clock = time.monotonic) -> int:
    """The number of steps that fit into a time, rounded to two digits."""
    fits = SHARE * 60 * minutes / seconds_per_step(recipe, clock)
    return max(1, int(float(f"{fits:.2g}")))


def kinds_of_steps(trainer: Any, steps: int, wait: int) -> list[tuple[int, int, Any]]:
    """First and last step of each kind, and what does it: they differ while a student waits, and before UDA begins."""
    waits = min(wait, steps) if trainer.teacher is not None else 0
    losses: Any = getattr(trainer, "teacher_losses", None) or getattr(trainer, "losses", ())
    ends = sorted({0, waits, steps, *(min(loss.start, steps) for loss in losses if isinstance(loss, UDA))})
    return [(a, b, trainer.teacher_step if a < waits else trainer.step) for a, b in pairwise(ends)]


def seconds_per_step(recipe: ImageFolders, clock: Clock = time.monotonic) -> float:
    """What a step of a complete recipe's method takes on this machine, on pictures of noise.

    Each kind of step is timed, and counts as often as it comes. Where views are cut out of the files themselves, these
    are files too, and reading them is a part of the step. Cost: some seconds; the default generator is put back.
    """
    seconds = 0.0

    def timed(trainer: Trainer, labeled: Any, unlabeled: Any, task: Task, **options: Any) -> FitResult:
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
    return FileImages(paths, size=(recipe.image_size,) * 2, mode=recipe.colors)
