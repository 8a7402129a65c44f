"""What the pictures show decides most settings that were left open, and how many steps fit into a time the rest."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metapl.apps import backbone
from metapl.apps.backbone import IMAGENET
from metapl.apps.machine import sha256_of
from metapl.apps.methods import Data, Training
from metapl.apps.network_weights import fetch_imagenet_weights
from metapl.apps.pictures.reader import LUMA, UnreadableImage, read_image
from metapl.apps.settings import filled, flat, replaced
from metapl.apps.train import SELECTED_ON, device
from metapl.apps.tuned_networks import begin_as
from metapl.data.feed import feed
from metapl.errors import MetaplError
from metapl.problems.losses import UDA
from metapl.training import FitResult, Say, Trainer

SET_ASIDE = (
    0.2  # part of the labeled pictures to select on, where that is enough of them to tell anything
)
SMALLEST_SIDE, GREATEST_SIDE, PRETRAINED_SIDE = (
    16,
    48,
    128,
)  # pixels; the first two where a network starts from nothing
PRETRAINED_NETWORK, IMAGENET_WEIGHTS = "resnet18", "imagenet"
PHOTOGRAPHS = 128  # side in pixels from which on color pictures are taken for photographs
MINUTES = 5.0  # for training, where neither minutes nor steps are given
REHEARSED = 1000  # steps of the training that is measured, of which a few are taken
AGAIN = 2  # how often the number of steps is measured again where parts of it were asked for
FEW_STEPS = 300  # below which a network that starts from nothing has hardly learned
MANY_COPIES = 10  # how often a picture may be in one batch before that is told

WARMUP = 0.05  # share of the steps over which learning rates grow


def choose_settings(
    config: Any, method: Any, say: Say, before: Mapping[str, Any] | None = None
) -> tuple[Any, Any]:
    """The settings and the method with whole paths, the classes that are found, and a value for all that was left open.

    What was chosen ``before``, by the names of the settings, in the run that is resumed, is not
    chosen anew.
    """
    # 1. Files of weights that are not there are refused before anything is listed.
    weights, asked = config.pictures.weights, config.pictures.backbone
    if weights is not None and asked != "none":
        raise MetaplError(
            f"--backbone {asked} has its own weights, and --weights {weights} was given; leave "
            "one out."
        )
    if weights == IMAGENET_WEIGHTS:
        weights = fetch_imagenet_weights(config.pictures.network or PRETRAINED_NETWORK)
    for flag, file in (("weights", weights), ("backbone", asked if os.sep in asked else None)):
        if file is not None and not Path(file).expanduser().exists():
            raise MetaplError(f"--{flag} {file}: there is no such file.")
    found = None
    if asked not in ("none", "auto") and before is None:
        found = backbone.find(asked, config.pictures.network)
    # 2. A run that is resumed has its settings.
    few, many = (config.scan(name) for name in config.few_and_many)
    places: dict[str, Any] = {name: getattr(config, name) for name in config.places} | {
        "weights": weights
    }
    whole = {
        name: str(Path(one).expanduser().resolve())
        for name, one in places.items()
        if one is not None
    }
    if weights is not None and Path(whole["weights"]).is_file():
        whole["weights_sha256"] = sha256_of(whole["weights"])
    config = replaced(config, classes=few.classes, **whole)
    if before is not None:
        if before.get("weights") is not None:
            weights = Path(before["weights"])
            if not weights.is_file() or sha256_of(weights) != before.get("weights_sha256"):
                raise MetaplError(
                    f"the weights of the run, {weights}, are gone or another file; put them back."
                )
            config = replaced(config, weights=str(weights)) if asked != "none" else config
        try:
            config = filled(
                config, {name: value for name, value in before.items() if name not in GIVEN}
            )
            return config, filled(method, before)
        except (MetaplError, TypeError) as error:
            raise MetaplError(
                f"the run's settings are damaged or of another version: {error}"
            ) from error
    # 3. What the folders and some of their pictures show.
    config.check_first()
    of_few, count = config.batch_of_few, len(few)
    size = getattr(config, of_few, None) or config.fitting.labeled_batch
    if size > MANY_COPIES * count:
        say(
            f"note: --{of_few.replace('_', '-')} {size:,} is {size // count:,} times the {count:,} "
            "pictures that it is drawn from: each is in every batch so often, and each copy costs "
            "the time of a picture"
        )
    seen = look([*map(Path, few.paths())], few.targets(), [*map(Path, many.paths())])
    if asked == "auto":
        large = not seen.grey and seen.side >= backbone.AUTO_SIDE
        found = backbone.auto(config.pictures.network) if large else None
        if found is None:
            why = (
                "the weights of none are on this machine"
                if large
                else "the pictures are grey or small"
            )
            say(f"backbone: none, for {why}; from scratch")
    if found is not None:
        if config.pictures.grey not in (None, found["grey"]):
            kind = "grey" if found["grey"] else "color"
            raise MetaplError(
                f"--backbone {asked} takes {kind} pictures; leave --grey {config.pictures.grey} "
                "out."
            )
        own, tuning = config.pictures.image_size, config.pictures.tuning or "lora"
        if (own or seen.side) < backbone.LEAST_SIDE and found["image_size"] is None:
            raise MetaplError(
                f"--backbone {asked}: pictures of {own or seen.side} pixels are too small for it; "
                f"expected {backbone.LEAST_SIDE} or more, by --image-size where they are to be "
                "enlarged, or no backbone."
            )
        config = replaced(
            config, **found | {"tuning": tuning, "image_size": own or found["image_size"]}
        )
        what = {
            "head": "its head is trained",
            "lora": "low-rank changes are trained",
            "all": "all of it is trained",
        }
        sha256 = found["weights_sha256"][:12]
        say(
            f"backbone: {found['network']} from {found['weights']} (SHA-256 {sha256}...), "
            f"{what[tuning]}"
        )
    aside = round(SET_ASIDE * count) if not config.val else 0
    # Too few to select on train better.
    config = fitted(config, seen, val_fraction=SET_ASIDE if aside >= SELECTED_ON else 0.0)
    usual = {"uda_prior": seen.shares, "student_lr": config.pictures.rate}
    # Of Noisy Student; other trainings have none.
    usual["ratio"] = getattr(config, "usual_ratio", None)
    method = filled(method, usual)
    # 4. The steps; and what was chosen, in a line, and what pictures lose by it; each has a flag.
    steps = config.fitting.steps
    config, method = with_steps(config, method)
    pictures, fitting = config.pictures, config.fitting
    cut = [] if seen.square else ["cut to squares"]
    cut += [f"shrunk from about {seen.side}"] if seen.side > pictures.image_size else []
    lost = f" ({', '.join(cut)})" if cut else ""
    kind, of = ("grey", "light and dark") if pictures.grey else ("color", "colors")
    changed = (
        f"{of} {'exchanged' if pictures.recolor else 'kept'}, "
        f"{'' if pictures.mirror else 'not '}mirrored"
    )
    networks = ", then ".join(flat(method).get("networks") or (pictures.network,))
    dropout, stochastic_depth = pictures.noise(pictures.architecture(classes=2))
    noise = f", dropout {dropout:g}" if dropout else ""
    if stochastic_depth:
        noise += f", stochastic depth {stochastic_depth:g}"
    say(
        f"chosen: {networks}{noise} on {pictures.image_size}x{pictures.image_size} {kind} "
        f"pictures{lost}, {changed}; adamw at {fitting.lr:g}, {fitting.precision}, "
        f"{fitting.steps:,} steps"
    )
    if steps is None and fitting.steps < FEW_STEPS:
        say(
            f"note: {fitting.steps} steps are few, for this machine is slow or busy: give more "
            "--minutes, or --steps"
        )
    if seen.colors.may_tell and pictures.recolor and not pictures.grey:
        say(
            f"note: by their colors alone {seen.colors.right:.0%} of the labeled pictures are told "
            f"apart, and by chance {seen.colors.chance:.0%}, so colors may matter, and are "
            "exchanged: if they do, give --recolor False"
        )
    if (
        pictures.weights is None
        and asked == "none"
        and not pictures.grey
        and seen.side >= PHOTOGRAPHS
    ):
        say(
            "for photographs a network that was trained on photographs is better: --backbone, or "
            "--weights imagenet"
        )
    return config, method


# What a run that is resumed is given anew, with what it was started with, or does not need.
GIVEN = (
    "labeled",
    "unlabeled",
    "clean",
    "val",
    "test",
    "weights",
    "feedback_ratio",
    "feedback_bound",
)


def fitted(config: Any, seen: Look, val_fraction: float) -> Any:
    """The settings for such pictures, but for what depends on the number of steps."""
    given = config.pictures
    grey = seen.grey and given.weights is None if given.grey is None else given.grey
    mean, std = (part * 3 if seen.grey else part for part in (seen.mean, seen.std))
    if grey:
        mean, std = seen.level[:1], seen.level[1:]
    elif given.weights is not None:
        mean, std = IMAGENET
    side = PRETRAINED_SIDE if given.weights else min(max(seen.side, SMALLEST_SIDE), GREATEST_SIDE)
    part = given.architecture(classes=2).patch or 4 if given.network else 4
    choices = {
        "grey": grey,
        "image_size": part * max(1, round(side / part)),
        "network": PRETRAINED_NETWORK if given.weights else "pooled_cnn",
        "val_fraction": val_fraction,
        "recolor": seen.exchangeable,
        "mean": mean,
        "std": std,
    }
    config = filled(config, choices)
    return filled(config, {"lr": config.pictures.rate})


def with_steps(config: Any, method: Any) -> tuple[Any, Any]:
    """The settings and the method with a number of steps, as many as fit into the minutes where it is open."""

    def of(steps: int) -> tuple[Any, Any]:
        shares = {"warmup": round(WARMUP * steps), "validate_every": max(1, round(steps / 20))}
        return filled(replaced(config, steps=steps), shares), method.scheduled(steps)

    if config.fitting.steps is not None:
        return of(config.fitting.steps)
    # Phases that were given in steps do not grow with the number of steps: it is measured again
    # with what fits.
    asked = max(flat(method).get(name) or 0 for name in ("wait", "uda_start"))
    minutes = config.minutes or MINUTES
    steps = steps_within(*of(2 * asked or REHEARSED), minutes)
    for _ in range(AGAIN if asked else 0):
        steps = steps_within(*of(max(steps, asked + 1)), minutes)
    config = replaced(config, minutes=minutes)
    return of(steps)


# --------------------------------------------------------------------------- what the pictures show

# How many pictures are read at most, of the labeled ones, and again of the unlabeled ones; pixels
# that a picture is brought to for a look at its colors; rows and columns where the object of most
# pictures is, not the background.
LOOKED_AT, SIDE = 256, 32
MIDDLE = slice(SIDE // 4, -(SIDE // 4))

# Greatest difference between the channels of a pixel, in levels of 256, in a picture that counts as
# grey; standard deviation in [0, 1] that blank pictures are given.
ALIKE, SMALLEST_STD = 8, 0.05

# Shuffles of the labels that colors are compared with; of these and the labels as they are, the
# most that find the classes as well where color tells them apart, and where it may: by chance it
# does so in one set of a hundred, and may in one of ten. Colors that are exchanged for nothing cost
# the only thing that tells such classes apart, and colors that are kept for nothing a kind of
# augmentation.
SHUFFLES, CHANCES, DOUBTS = 199, 2, 20

# Pixels, of SIDE, of the square that a pixel is compared with; share of pictures, at least, with
# marks of the rarer kind where both light and dark marks are usual.
AROUND, BOTH = 9, 0.2


@dataclass(frozen=True)
class Colors:
    """Whether the mean color of the middle, or its mean level of grey, tells the labeled pictures' classes apart."""

    # share of pictures that are nearest to the mean of the others of their class, averaged over
    # classes
    right: float
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
    light: (
        float  # share of the pictures whose marks are lighter than what is around them, not darker
    )
    shares: tuple[
        float, ...
    ]  # of the classes among all labeled pictures, as if each had one more: no share is 0
    square: bool = True  # all of the pictures are as high as wide

    @property
    def exchangeable(self) -> bool:
        """Whether colors may be exchanged, or light and dark.

        Not where all marks are light, as in an X-ray.
        """
        return not self.colors.tell and (not self.grey or BOTH <= self.light <= 1 - BOTH)


def look(labeled: Sequence[Path], labels: Tensor, unlabeled: Sequence[Path]) -> Look:
    """What at most ``LOOKED_AT`` pictures of each kind show, evenly spread.

    Labels are int64 (len(labeled),).
    """
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
        pictures.append(
            torch.nn.functional.interpolate(picture[None].float(), (SIDE, SIDE), mode="area")[0]
        )
        classes.append(label)
    if not any(label >= 0 for label in classes):
        raise MetaplError(
            f"none of the {len(few)} labeled pictures that were looked at can be read."
        )
    levels_N3HW, label_N = torch.stack(pictures), torch.tensor(classes)
    grey = bool((levels_N3HW.amax(1) - levels_N3HW.amin(1)).max() <= ALIKE)
    unit = (levels_N3HW[:, :1] if grey else levels_N3HW) / 255
    level_NHW = (levels_N3HW / 255 * torch.tensor(LUMA)[:, None, None]).sum(1)
    # The marks of a picture are lighter than what is around them where the skewness of the
    # differences is above 0.
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
        colors=colors_tell(
            unit[label_N >= 0][..., MIDDLE, MIDDLE].mean((2, 3)), label_N[label_N >= 0]
        ),
        light=float((marks_NHW.pow(3).mean((1, 2)) > 0).double().mean()),
        shares=tuple(count / sum(counts) for count in counts),
        square=square,
    )


def colors_tell(colors_NC: Tensor, labels_N: Tensor) -> Colors:
    """Whether the nearest class mean, with each example left out of its own, finds the classes.

    ``colors_NC`` are the mean colors of each picture's middle. The share found, averaged over
    classes, is compared with that of ``SHUFFLES`` shuffles of the labels: whatever the sizes of the
    classes, colors that have nothing to do with them tell them apart in one of a hundred sets. They
    do not where no class has two examples.

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
    right_K = (
        labels.bincount(weights=(nearest_N == labels).double(), minlength=len(counts_K)) / counts_K
    )
    return float(right_K[counts_K >= 2].mean())


# ------------------------------------------------------------------- how many steps fit into a time

# part of the time that steps get; the rest is for reading, validation, finetuning and the report
SHARE = 0.85
WARM, TIMED, SECONDS = (
    2,
    20,
    4.0,
)  # steps before the timing, the most timed steps, and the most time that they take
PICTURES = 128  # that steps are taken on

Clock = Callable[[], float]  # seconds from some moment on


def steps_within(config: Any, method: Any, minutes: float, clock: Clock = time.monotonic) -> int:
    """The number of steps that fit into a time, rounded to two digits."""
    fits = SHARE * 60 * minutes / seconds_per_step(config, method, clock)
    return max(1, int(float(f"{fits:.2g}")))


def kinds_of_steps(trainer: Any, steps: int, wait: int) -> list[tuple[int, int, Any]]:
    """First and last step of each kind, and what does it.

    They differ while a student waits, and before UDA begins.
    """
    waits = min(wait, steps) if trainer.teacher is not None else 0
    losses: Any = getattr(trainer, "teacher_losses", None) or getattr(trainer, "losses", ())
    ends = sorted(
        {0, waits, steps, *(min(loss.start, steps) for loss in losses if isinstance(loss, UDA))}
    )
    return [(a, b, trainer.teacher_step if a < waits else trainer.step) for a, b in pairwise(ends)]


def seconds_per_step(config: Any, method: Any, clock: Clock = time.monotonic) -> float:
    """What a step of a method takes on this machine, on a few of the labeled pictures.

    Each kind of step is timed, and counts as often as it comes. Cost: some seconds; the default
    generator is put back.
    """
    seconds, fitting, place = 0.0, config.fitting, device(config.fitting.device)

    def timed(trainer: Trainer, labeled: Any, unlabeled: Any, **options: Any) -> FitResult:
        nonlocal seconds
        sources = [source for source in (labeled, unlabeled) if source is not None]
        share: float = (
            options.get("steps", fitting.steps) / fitting.steps
        )  # of a phase that is shorter than the run
        with ExitStack() as opened:
            feeds = []
            for number, source in enumerate(sources):
                fed = feed(
                    source,
                    name=str(number),
                    stop=2**31,
                    num_workers=fitting.num_workers,
                    device=trainer.device,
                )
                opened.callback(fed.close)
                feeds.append(fed)
            for first, last, step in kinds_of_steps(trainer, fitting.steps, options.get("wait", 0)):
                trainer.steps_done, times, begun = first, list[float](), time.monotonic()
                while len(times) < WARM + TIMED and (
                    len(times) <= WARM or time.monotonic() - begun < SECONDS
                ):
                    since = clock()
                    step(*(fed.next() for fed in feeds)).as_dict()  # waits for the device
                    times.append(clock() - since)
                seconds += share * (last - first) / fitting.steps * statistics.median(times[WARM:])
        return FitResult(
            None, 0, {name: value.clone() for name, value in trainer.student.state_dict().items()}
        )

    def even(network: Any) -> dict[str, Tensor]:
        share = 1 / len(config.classes)
        sources = {"unlabeled": data.unlabeled, "labeled": data.labeled}
        return {
            name: torch.full((len(of.images), len(config.classes)), share)
            for name, of in sources.items()
        }

    with torch.random.fork_rng():
        torch.manual_seed(0)
        few = config.scan(config.few_and_many[0])
        few = few.keep(range(min(len(few), PICTURES)))
        data = Data(**config.sources(few, few, None), classes=config.classes, record={})
        for source in () if config.pictures.crop else (data.labeled, data.unlabeled):
            source.images.fetch(
                torch.arange(len(source.images))
            )  # as after the first epoch, which reads the files
        teacher, student = (config.network().to(place) for _ in range(2))
        begin_as(teacher, student)
        method.train(
            Training(
                config=config, data=data, teacher=teacher, student=student, fit=timed, label=even
            )
        )
    return seconds
