"""Settings that were left open: most follow from a look at the pictures, the steps from a time."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from metapl.apps import backbone
from metapl.apps.backbone import Backbone, some_of_each_class
from metapl.apps.data import Data
from metapl.apps.images import Images, Pictures, share_set_aside
from metapl.apps.labeling import ToLabel
from metapl.apps.measured import LEARNED
from metapl.apps.methods.base import Method, Trained, Training
from metapl.apps.pace import FINETUNED, LEAST_SHARE, SHARE, Timetable, parts_of
from metapl.apps.settings import USUAL_FINETUNING, with_flags, with_stored
from metapl.apps.train import COUNTED, STATISTICS_OF, some_of
from metapl.data.feed import feed
from metapl.errors import MetaplError
from metapl.machine import device
from metapl.metrics.predictions import logits_of
from metapl.networks.airbench import PATCH, patch_covariance
from metapl.networks.tuned import IMAGENET, begin_as
from metapl.networks.weights import fetch_imagenet_weights, read_normalization
from metapl.pictures.levels import find_levels
from metapl.pictures.reader import LUMA, Levels, UnreadableImage, read_image
from metapl.problems.losses import UDA
from metapl.runs.files import sha256_of
from metapl.runs.terminal import spoken_time
from metapl.training import FitResult, Say, Trainer
from metapl.training.loss_trainer import LossTrainer

# The sides of pictures in pixels: the least and the greatest where a network starts from nothing,
# and that of a pretrained network.
SMALLEST_SIDE = 16
GREATEST_SIDE = 48
PRETRAINED_SIDE = 128

PRETRAINED_NETWORK = "resnet18"
SCRATCH_NETWORK = "pooled_cnn"

# The network from scratch for pictures of these sides, in pixels.
SMALL_NETWORK = "airbench_small"
SMALL_SIDES = range(28, 64 + 1)

# The word for --weights that downloads some.
IMAGENET_WEIGHTS = "imagenet"

# The side in pixels from which on color pictures are taken for photographs.
PHOTOGRAPHS = 128

# Minutes for training, where neither minutes nor steps are given.
MINUTES = 5.0

# The steps of the training that is measured, of which a few are taken. A phase that was given in
# steps is short beside so many, and hardly counts.
REHEARSED = 100_000

# How often is validated in a training. Each takes a second or two, which counts in one of a minute.
VALIDATIONS = 10

# What of a backbone is trained, in words.
TUNINGS = {
    "head": "its head is trained",
    "all": "all of it is trained",
}

# What a run that is resumed is given anew, with what it was started with, or does not need.
GIVEN = (
    "labeled",
    "unlabeled",
    "val",
    "test",
    "weights",
    "feedback_ratio",
    "feedback_bound",
)

T = TypeVar("T")
MethodT = TypeVar("MethodT", bound=Method)


def choose_settings(
    config: Images,
    method: MethodT,
    say: Say,
    stored: Mapping[str, Any] | None = None,
    *,
    timetable: Timetable | None = None,
) -> tuple[Images, MethodT]:
    """Return the settings and the method with a value for everything that was left open.

    Paths are whole ones afterwards, and the classes are those of the folders.

    Args:
        config: a training on pictures, as the command line gave it.
        method: the method, likewise.
        say: is told what was chosen.
        stored: the settings of the run that is resumed, by the names of their flags: what was
            chosen there is not chosen anew. None: a new run.
        timetable: has the clock by which steps are timed that have to fit into the minutes, and is
            told what they take.
    """
    # 1. Files of weights that are not there are refused before anything is listed.
    weights = found_weights(config.pictures)
    asked = config.pictures.backbone
    chosen_backbone = None
    if asked != "none" and stored is None:
        chosen_backbone = backbone.find(asked, config.pictures.network)

    # 2. A run that is resumed has its settings.
    few = config.scan("labeled")
    many = config.scan("unlabeled")
    # What is wrong with them is said of the paths as they were typed.
    held_out = [config.scan(name) for name in ("val", "test") if name in config.parts]
    config = with_whole_paths(config, weights, classes=few.classes)
    if stored is not None:
        minutes = stored.get("minutes")
        if minutes is not None:
            say(f"note: of --minutes {minutes:g} the run has what was left when it was saved")
            if timetable is not None:
                timetable.minutes = minutes
        return resumed_settings(config, method, stored)

    # 3. What the folders and some of their pictures show.
    config.check_first()
    levels = find_levels([few, many], held_out, say)
    config = dataclasses.replace(
        config, pictures=dataclasses.replace(config.pictures, levels=levels)
    )
    # Without others the unlabeled pictures are the labeled ones, which count once.
    others = [] if config.learns_own else many.paths()
    seen = look([*map(Path, few.paths())], few.targets(), [*map(Path, others)], levels)
    if chosen_backbone is not None:
        pictures = with_backbone(config.pictures, chosen_backbone, seen, say)
        config = dataclasses.replace(config, pictures=pictures)
    elif method.named_networks:
        config = with_first_network(config, method.named_networks[0], say)
    has_several = len({*method.named_networks}) > 1
    config = fitted(config, seen, share_set_aside(config, len(few)), has_several=has_several)
    if config.fitting.patience is not None and config.val is None and not config.val_fraction:
        raise MetaplError(
            f"--patience {config.fitting.patience} was given, and there are no validation examples "
            "to measure on; leave it out, or give them by --val-fraction 0.1."
        )
    recipe = config.pictures.recipe
    is_alone_by_recipe = method.learns_labels_alone and not recipe.finetunes_alone
    finetuning = 0 if is_alone_by_recipe else USUAL_FINETUNING
    config = with_stored(config, {"finetune_steps": finetuning})
    usual_settings = {
        "uda_prior": seen.shares,
        "student_lr": config.pictures.rate,
        "label_smoothing": recipe.label_smoothing,
        "ratio": config.usual_ratio,
    }
    method = with_stored(method, usual_settings)

    # 4. The steps. Then all that was chosen is said in a line.
    learned = round((1 - (config.val_fraction or 0.0)) * len(few))
    config, method = with_steps(config, method, timetable or Timetable(), say, learned=learned)
    tell_choices(config, method, seen, say)
    return config, method


def with_first_network(config: Images, name: str, say: Say) -> Images:
    """Return the settings with the first of --networks, to which those that are open are fitted."""
    given = config.pictures.network
    if given not in (None, name):
        say(f"note: the networks are those of --networks, and not --network {given}")
    return dataclasses.replace(config, pictures=dataclasses.replace(config.pictures, network=name))


def found_weights(pictures: Pictures) -> str | Path | None:
    """Return the file of weights that was asked for; refuse it if it is not there."""
    weights: str | Path | None = pictures.weights
    if weights is not None and pictures.backbone != "none":
        raise MetaplError(
            f"--backbone {pictures.backbone} has its own weights, and --weights {weights} was "
            "given; leave one out."
        )
    if weights == IMAGENET_WEIGHTS:
        weights = fetch_imagenet_weights(pictures.network or PRETRAINED_NETWORK)
    if weights is not None and not Path(weights).expanduser().exists():
        raise MetaplError(f"--weights {weights}: there is no such file.")
    is_path = os.sep in pictures.backbone
    if is_path and not Path(pictures.backbone).expanduser().exists():
        raise MetaplError(f"--backbone {pictures.backbone}: there is no such file.")
    return weights


def whole_path(path: str | Path) -> str:
    """Return an absolute path without links."""
    return str(Path(path).expanduser().resolve())


def with_whole_paths(
    config: Images, weights: str | Path | None, *, classes: tuple[str, ...]
) -> Images:
    """Return the settings with absolute paths, the classes, and the weights with their SHA-256."""
    folders = {}
    for name in config.places:
        folder = getattr(config, name)
        if folder is not None:
            folders[name] = whole_path(folder)
    pictures = config.pictures
    if weights is not None:
        pictures = dataclasses.replace(pictures, weights=whole_path(weights))
        if Path(whole_path(weights)).is_file():
            pictures = dataclasses.replace(pictures, weights_sha256=sha256_of(whole_path(weights)))
    return with_flags(dataclasses.replace(config, pictures=pictures, classes=classes), **folders)


def resumed_settings(
    config: Images, method: MethodT, stored: Mapping[str, Any]
) -> tuple[Images, MethodT]:
    """Return the settings and the method of the run that is resumed, by its recipe.json."""
    if stored.get("weights") is not None:
        weights = Path(stored["weights"])
        if not weights.is_file() or sha256_of(weights) != stored.get("weights_sha256"):
            raise MetaplError(
                f"the weights of the run, {weights}, are gone or another file; put them back."
            )
        if config.pictures.backbone != "none":
            pictures = dataclasses.replace(config.pictures, weights=str(weights))
            config = dataclasses.replace(config, pictures=pictures)
    try:
        chosen = {name: value for name, value in stored.items() if name not in GIVEN}
        return with_stored(config, chosen), with_stored(method, stored)
    except (MetaplError, TypeError) as error:
        raise MetaplError(
            f"the run's settings are damaged or of another version: {error}"
        ) from error


def with_backbone(pictures: Pictures, chosen: Backbone, seen: Look, say: Say) -> Pictures:
    """Return the settings of pictures with a backbone; refuse what does not go with it."""
    asked = pictures.backbone
    if pictures.grey not in (None, chosen.grey):
        kind = "grey" if chosen.grey else "color"
        raise MetaplError(
            f"--backbone {asked} takes {kind} pictures; leave --grey {pictures.grey} out."
        )
    side = pictures.image_size or seen.side
    if side < backbone.LEAST_SIDE and chosen.image_size is None:
        raise MetaplError(
            f"--backbone {asked}: pictures of {side} pixels are too small for it; expected "
            f"{backbone.LEAST_SIDE} or more, by --image-size where they are to be enlarged, or no "
            "backbone."
        )
    tuning = pictures.tuning or "head"
    say(
        f"backbone: {chosen.network} from {chosen.weights} (SHA-256 "
        f"{chosen.weights_sha256[:12]}...), {TUNINGS[tuning]}"
    )
    return dataclasses.replace(
        pictures,
        network=chosen.network,
        weights=chosen.weights,
        weights_sha256=chosen.weights_sha256,
        mean=chosen.mean,
        std=chosen.std,
        grey=chosen.grey,
        image_size=pictures.image_size or chosen.image_size,
        tuning=tuning,
    )


def tell_choices(config: Images, method: Method, seen: Look, say: Say) -> None:
    """Say in a line what was chosen, and what pictures lose by it; each choice has a flag."""
    pictures = config.pictures
    fitting = config.fitting
    size = pictures.input.size
    lost = []
    if not seen.square:
        lost.append("cut to squares")
    if seen.side > size:
        lost.append(f"shrunk from about {seen.side}")
    kind = "grey" if pictures.grey else "color"
    colors = "light and dark" if pictures.grey else "colors"
    colors += " exchanged" if pictures.recolor else " kept"
    mirrored = "mirrored" if pictures.mirror else "not mirrored"
    if pictures.recipe.two_views and not pictures.mirror and seen.mirrors is None:
        mirrored += " (too few pictures to tell; --mirror True)"
    elif pictures.recipe.two_views and pictures.mirror and seen.mirrors:
        # All pictures together face both ways, also where each class faces one.
        mirrored += " (--mirror False where classes mirror each other)"
    names = method.named_networks or (str(pictures.network),)
    rates: dict[str, None] = {}
    for name in names:
        of_network = config.with_network(name).pictures
        rates[f"{of_network.recipe.optimizer} at {fitting.lr or of_network.rate:g}"] = None
    dropout, stochastic_depth = pictures.noise(pictures.architecture(classes=2))
    noise = ""
    if dropout:
        noise += f", dropout {dropout:g}"
    if stochastic_depth:
        noise += f", stochastic depth {stochastic_depth:g}"
    losses = f" ({', '.join(lost)})" if lost else ""
    say(
        f"chosen: {', then '.join(names)}{noise} on {size}x{size} {kind} pictures{losses}, "
        f"{colors}, {mirrored}, {pictures.augment} changes; {', then '.join(rates)}, "
        f"{fitting.precision}, {fitting.chosen_steps:,} steps"
    )
    is_from_scratch = pictures.weights is None and pictures.backbone == "none"
    if is_from_scratch and not pictures.grey and seen.side >= PHOTOGRAPHS:
        say(
            "for photographs a network that was trained on photographs is better: --backbone, or "
            "--weights imagenet"
        )


def fitted(config: Images, seen: Look, val_fraction: float, *, has_several: bool = False) -> Images:
    """Return the settings for such pictures, but for what depends on the number of steps.

    What was given stays.

    Args:
        has_several: whether several networks are trained, each at its own rate where none is given.
    """
    pictures = config.pictures
    grey = pictures.grey
    if grey is None:
        grey = seen.grey and pictures.weights is None
    mean: tuple[float, ...] = seen.mean
    std: tuple[float, ...] = seen.std
    if grey:
        mean = seen.level[:1]
        std = seen.level[1:]
    elif pictures.weights is not None:
        # Weights that metapl trained are not behind the normalization of published ones.
        mean, std = read_normalization(pictures.weights) or IMAGENET
    elif seen.grey:
        # Grey pictures that are read as color ones have three equal channels.
        mean = seen.mean * 3
        std = seen.std * 3
    if pictures.weights and pictures.network != SMALL_NETWORK:
        network = PRETRAINED_NETWORK
        side = PRETRAINED_SIDE
    else:
        network = SMALL_NETWORK if seen.side in SMALL_SIDES else SCRATCH_NETWORK
        side = min(max(seen.side, SMALLEST_SIDE), GREATEST_SIDE)
    multiple = 4
    if pictures.network:
        multiple = pictures.architecture(classes=2).patch or 4
    choices = {
        "grey": grey,
        "image_size": multiple * max(1, round(side / multiple)),
        "network": network,
        "val_fraction": val_fraction,
        "recolor": seen.exchangeable,
        "mean": mean,
        "std": std,
        "patches": seen.normalized_patches(std, grey=grey),
    }
    config = with_stored(config, choices)
    recipe = config.pictures.recipe
    return with_stored(
        config,
        {
            "lr": None if has_several else config.pictures.rate,
            "labeled_batch": recipe.labeled_batch,
            "schedule": recipe.schedule,
            "mirror": recipe.two_views and bool(seen.mirrors),
        },
    )


def with_steps(
    config: Images,
    method: MethodT,
    timetable: Timetable,
    say: Say = lambda text: None,
    *,
    learned: int,
) -> tuple[Images, MethodT]:
    """Return the settings and the method with a number of steps.

    Where it is open, it is as many as fit into the minutes, which the timetable is told.

    Args:
        learned: how many labeled pictures are learned from.
    """
    if config.fitting.steps is not None:
        return with_number_of_steps(config, method, config.fitting.steps, learned=learned)
    minutes = config.minutes or MINUTES
    rehearsal = with_number_of_steps(config, method, REHEARSED, learned=learned)
    timetable.minutes = minutes
    say(f"timing a few steps, to plan --minutes {minutes:g}")
    steps = steps_within(*rehearsal, timetable, say)
    config = dataclasses.replace(config, minutes=minutes)
    return with_number_of_steps(config, method, steps, learned=learned)


def with_number_of_steps(
    config: Images, method: MethodT, steps: int, *, learned: int
) -> tuple[Images, MethodT]:
    """Return the settings and the method for a number of steps; what was given in steps stays."""
    fitting = config.fitting
    warmup = fitting.warmup
    if warmup is None:
        warmup = round(config.pictures.recipe.warmup * steps)
    validate_every = fitting.validate_every
    if validate_every is None:
        validate_every = max(1, round(steps / VALIDATIONS))
    fitting = dataclasses.replace(
        fitting, steps=steps, warmup=warmup, validate_every=validate_every
    )
    pictures = config.pictures
    if pictures.augment is None:
        augment: Literal["mild", "strong"] = "strong"
        most = pictures.recipe.mild_until * learned
        if most and steps * fitting.chosen_batch <= most:
            augment = "mild"
        pictures = dataclasses.replace(pictures, augment=augment)
    config = dataclasses.replace(config, fitting=fitting, pictures=pictures)
    return config, method.scheduled(steps)


# --------------------------------------------------------------------------- what the pictures show

# How many pictures are read at most, of the labeled ones, and again of the unlabeled ones; pixels
# that a picture is brought to for a look at its colors; rows and columns where the object of most
# pictures is, not the background.
LOOKED_AT = 256
SIDE = 32
MIDDLE = slice(SIDE // 4, -(SIDE // 4))

# Greatest difference between the channels of a pixel, in levels of 256, in a picture that counts as
# grey; standard deviation in [0, 1] that blank pictures are given.
ALIKE = 8
SMALLEST_STD = 0.05

# Rows at the upper and at the lower edge, in whose colors photographs differ by class: sky, water,
# grass.
EDGE = SIDE // 4

# Shuffles of the labels that colors are compared with; of these and the labels as they are, the
# most that find the classes as well where color tells them apart. By chance that of the middle does
# so in one set of a hundred, and those of the middle and the edges in one of two hundred. Colors
# that are exchanged for nothing cost the only thing that tells such classes apart, and colors that
# are kept for nothing a kind of augmentation. Of 40 draws of 250 pictures of CIFAR-10, the middle
# tells the classes apart in 31, and the edges in the others.
SHUFFLES = 199
CHANCES = 2
CHANCES_OF_EDGES = 1

# Pictures that are compared with their mirror images, at least, and those among them whose class
# has two labeled ones or more; how many standard deviations of sets that are mirrored by chance
# their asymmetry may have; the pixels that are averaged for it. In 500 draws of 200 pictures or
# more, CIFAR-10 has 4 of these at most, and digits 9 at least.
COMPARED = 200
LABELED = 100
MIRRORED_BY = 6.0
COARSE = 4

# Pixels, of SIDE, of the square that a pixel is compared with; share of pictures, at least, with
# marks of the rarer kind where both light and dark marks are usual.
AROUND = 9
BOTH = 0.2


# The label of a picture without one.
UNLABELED = -1


@dataclass(frozen=True)
class Look:
    """A data set as a few of its pictures show it.

    Args:
        side: median of the shorter sides, in pixels.
        grey: whether none of the pictures has colors.
        mean, std: of each channel (one where grey), in [0, 1].
        level: mean and standard deviation of the pictures without their colors.
        colors_tell: whether the mean color, or grey, of a picture's middle tells the classes apart,
            or those of its middle and its edges.
        light: share of the pictures whose marks are lighter than what is around them, not darker.
        shares: shares of the classes among all labeled pictures, as if each had one more, so that
            none is 0.
        mirrors: whether the pictures look like their mirror images; None where they are too few.
        patches: the covariance of patches of 2 x 2 pixels of three channels in [0, 1], row by row.
        square: whether all of the pictures are as high as wide.
    """

    side: int
    grey: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    level: tuple[float, float]
    colors_tell: bool
    light: float
    shares: tuple[float, ...]
    patches: tuple[float, ...]
    mirrors: bool | None = False
    square: bool = True

    @property
    def exchangeable(self) -> bool:
        """Return whether colors may be exchanged, or light and dark.

        They may not where all marks are light, as in an X-ray.
        """
        return not self.colors_tell and (not self.grey or BOTH <= self.light <= 1 - BOTH)

    def normalized_patches(self, std: tuple[float, ...], *, grey: bool) -> tuple[float, ...]:
        """Return the covariance of patches of normalized pictures, in colors or grey."""
        pixels = PATCH**2
        covariance = torch.tensor(self.patches, dtype=torch.float64).view(3 * pixels, -1)
        if grey:
            to_luma = torch.kron(
                torch.tensor([LUMA], dtype=torch.float64), torch.eye(pixels, dtype=torch.float64)
            )
            covariance = to_luma @ covariance @ to_luma.T
        scales = torch.tensor(std, dtype=torch.float64).repeat_interleave(pixels)
        covariance = covariance / scales / scales[:, None]
        return tuple(round(value, 6) for value in covariance.flatten().tolist())


def look(
    labeled: Sequence[Path],
    labels: Tensor,
    unlabeled: Sequence[Path],
    levels: Levels | None = None,
) -> Look:
    """Look at ``LOOKED_AT`` pictures of each kind at most, evenly spread.

    Args:
        labeled, unlabeled: files of pictures.
        labels: of the labeled ones, int64 (len(labeled),).
        levels: as for :func:`metapl.pictures.read_image`.
    """
    examples = [
        *evenly(list(zip(labeled, labels.tolist(), strict=True))),
        *((path, UNLABELED) for path in evenly(unlabeled)),
    ]
    sides = []
    pictures = []
    classes = []
    square = True
    fault = ""
    for path, label in examples:
        try:
            picture = read_image(path, levels=levels)
        except UnreadableImage as error:
            # It is listed when the folders are checked.
            if label != UNLABELED:
                fault = str(error)
            continue
        _, height, width = picture.shape
        sides.append(min(height, width))
        square = square and height == width
        small = torch.nn.functional.interpolate(picture[None].float(), (SIDE, SIDE), mode="area")
        pictures.append(small[0])
        classes.append(label)
    if all(label == UNLABELED for label in classes):
        looked_at = len(evenly(labeled))
        raise MetaplError(
            f"none of the {looked_at} labeled pictures that were looked at can be read: {fault}"
        )
    levels_N3HW = torch.stack(pictures)
    label_N = torch.tensor(classes)
    grey = bool((levels_N3HW.amax(1) - levels_N3HW.amin(1)).max() <= ALIKE)
    unit = (levels_N3HW[:, :1] if grey else levels_N3HW) / 255
    level_NHW = (levels_N3HW / 255 * torch.tensor(LUMA)[:, None, None]).sum(1)
    # The marks of a picture are lighter than what is around them where the skewness of the
    # differences is above 0.
    padded = torch.nn.functional.pad(level_NHW[:, None], (AROUND // 2,) * 4, mode="reflect")
    marks_NHW = level_NHW - torch.nn.functional.avg_pool2d(padded, AROUND, stride=1)[:, 0]
    counts = (torch.bincount(labels) + 1).tolist()
    is_labeled_N = label_N != UNLABELED
    parts = [unit[..., MIDDLE, MIDDLE], unit[..., :EDGE, :], unit[..., -EDGE:, :]]
    colors_NPC = torch.stack([part.mean((2, 3)) for part in parts], dim=1)[is_labeled_N]
    labeled_N = label_N[is_labeled_N]
    return Look(
        side=int(statistics.median(sides)),
        grey=grey,
        mean=tuple(round(value, 3) for value in unit.mean((0, 2, 3)).tolist()),
        std=tuple(divisible(value) for value in unit.std((0, 2, 3)).tolist()),
        level=(round(float(level_NHW.mean()), 3), divisible(float(level_NHW.std()))),
        colors_tell=colors_tell(colors_NPC[:, 0], labeled_N)
        or colors_tell(colors_NPC.flatten(1), labeled_N, CHANCES_OF_EDGES),
        light=float((marks_NHW.pow(3).mean((1, 2)) > 0).double().mean()),
        shares=tuple(count / sum(counts) for count in counts),
        mirrors=mirrors(level_NHW, marks_NHW.abs(), label_N),
        patches=tuple(patch_covariance(levels_N3HW / 255).flatten().tolist()),
        square=square,
    )


def evenly(examples: Sequence[T]) -> Sequence[T]:
    """Return ``LOOKED_AT`` examples at most, evenly spread."""
    return examples[:: max(1, -(-len(examples) // LOOKED_AT))]


def divisible(std: float) -> float:
    """Return a standard deviation that can be divided by: that of blank pictures is 0."""
    return round(max(std, SMALLEST_STD), 3)


def colors_tell(colors_NC: Tensor, labels_N: Tensor, chances: int = CHANCES) -> bool:
    """Return whether the nearest class mean finds the class of an example that is not in it.

    ``colors_NC`` are mean colors of each picture. The share found, averaged over classes, is
    compared with that of ``SHUFFLES`` shuffles of the labels: whatever the sizes of the classes,
    colors that have nothing to do with them tell them apart in one of two hundred sets. They do not
    where no class has two examples.

    >>> reds = torch.tensor([[0.9], [0.8], [0.85], [0.1], [0.2], [0.15]]).repeat(3, 1)
    >>> colors_tell(reds, torch.tensor([0, 0, 0, 1, 1, 1]).repeat(3))
    True
    >>> colors_tell(reds, torch.tensor([0, 1, 0, 1, 0, 1]).repeat(3))
    False
    """
    classes, labels = labels_N.unique(return_inverse=True)
    if len(classes) < 2 or int(labels.bincount().max()) < 2:
        return False
    scaled = (colors_NC - colors_NC.mean(0)) / colors_NC.std(0).clamp_min(1e-6)
    generator = torch.Generator().manual_seed(0)
    shuffled = (labels[torch.randperm(len(labels), generator=generator)] for _ in range(SHUFFLES))
    right = _right_share(scaled, labels)
    as_well = 1 + sum(_right_share(scaled, order) >= right for order in shuffled)
    return as_well <= chances


def mirrors(level_NHW: Tensor, marks_NHW: Tensor, labels_N: Tensor) -> bool | None:
    """Return whether pictures look like their mirror images, as photographs do and letters do not.

    Each two pictures of a class are compared in how they differ from their mirror images, in
    brightness and in how much a place stands out whichever way. The sum is near 0 where pictures
    face both ways. Its standard deviation is that of sets in which each picture is mirrored by
    chance: the more pictures there are, the less asymmetry is one.

    Args:
        level_NHW: brightness.
        marks_NHW: the size of the differences from what is around.
        labels_N: of the pictures; those without one count as a class.

    Returns: None where they are too few to tell.
    """
    _, classes, counts = labels_N.unique(return_inverse=True, return_counts=True)
    counts_N = counts[classes]
    count_labeled = int(((labels_N != UNLABELED) & (counts_N > 1)).sum())
    if len(labels_N) < COMPARED or count_labeled < LABELED:
        return None
    halves = []
    for values_NHW in (level_NHW, marks_NHW):
        coarse = torch.nn.functional.avg_pool2d(values_NHW, COARSE)
        halves.append((coarse - coarse.flip(2)).flatten(1) / values_NHW.std().clamp_min(1e-6))
    odd_NF = torch.cat(halves, dim=1)
    # Each picture with the others of its class, at equal weight whatever the size of the class.
    pairs_NN = (classes[:, None] == classes) / (counts_N - 1).clamp_min(1)
    products_NN = (odd_NF @ odd_NF.T * pairs_NN).fill_diagonal_(0)
    generator = torch.Generator().manual_seed(0)
    signs_SN = 2.0 * torch.randint(0, 2, (SHUFFLES, len(odd_NF)), generator=generator) - 1.0
    by_chance_S = (signs_SN @ products_NN * signs_SN).sum(1)
    return bool(products_NN.sum() <= MIRRORED_BY * by_chance_S.square().mean().sqrt())


def _right_share(colors_NC: Tensor, labels: Tensor) -> float:
    """Return the share that is nearest to the mean of its own class, averaged over the classes.

    Classes of one example are left out.
    """
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

# Of each kind of step: steps before the timing, the most timed steps, and the most seconds of
# these.
WARM = 2
TIMED = 20
SECONDS = 4.0

# The seconds of a report and its figures, and how many times as long a prediction takes as the
# fastest of a few.
REPORT = 12.0
SLOWER = 1.5

# The most pictures that steps are taken on, beside one of each class.
PICTURES = 128


def steps_within(
    config: Images,
    method: Method,
    timetable: Timetable,
    say: Say = lambda text: None,
) -> int:
    """Return the number of steps that fit into the minutes of a timetable, rounded to two digits.

    What was spent until then, labeling, finetuning and validation take is not theirs; ``say`` is
    told where little is left. Steps of finetuning are skipped then, and labeling is done whole.
    """
    stopwatch = timed(config, method, timetable)
    minutes = timetable.minutes or MINUTES
    spent = timetable.clock() - timetable.begun
    planned = timetable.seconds_of(SHARE)
    seconds = max(planned - spent, LEAST_SHARE * planned)
    if seconds > planned - spent:
        say(
            f"note: the look at the pictures and a few steps took {spoken_time(spent)}, which is "
            f"too long for --minutes {minutes:g}: it will take longer"
        )
    beside = stopwatch.beside + stopwatch.validations
    seconds_of_steps = max(seconds - beside, LEAST_SHARE * seconds)
    if seconds - beside < seconds_of_steps:
        whole = beside - stopwatch.finetuning
        if spent + seconds_of_steps + whole > timetable.seconds_of(FINETUNED):
            say(
                f"note: labeling and validations take about {spoken_time(whole)} beside the steps, "
                f"which is too long for --minutes {minutes:g}: it will take longer"
            )
        else:
            say(
                f"note: all {config.fitting.chosen_finetuning:,} steps of finetuning would take "
                f"about {spoken_time(stopwatch.finetuning)}, which is too long for --minutes "
                f"{minutes:g}: some of them may be skipped"
            )
    # Validations come between the steps.
    during_steps = seconds_of_steps + stopwatch.validations
    timetable.reserved = planned - spent - during_steps
    steps = seconds_of_steps / stopwatch.per_step
    return max(1, int(float(f"{steps:.2g}")))


def kinds_of_steps(
    trainer: Any, steps: int, wait: int, small_until: int = 0
) -> list[tuple[int, int, Any]]:
    """Return the first and the last step of each kind, and the method that takes such a step.

    Kinds differ while a student waits, before UDA begins, and while pictures are smaller.
    """
    waits = min(wait, steps) if trainer.teacher is not None else 0
    losses: Any = getattr(trainer, "teacher_losses", None) or getattr(trainer, "losses", ())
    starts = [min(loss.start, steps) for loss in losses if isinstance(loss, UDA)]
    kinds = []
    for first, last in pairwise(sorted({0, waits, steps, min(small_until, steps), *starts})):
        step = trainer.teacher_step if first < waits else trainer.step
        kinds.append((first, last, step))
    return kinds


def timed(config: Images, method: Method, timetable: Timetable) -> Stopwatch:
    """Return what a training by a method takes on this machine: its steps, and what is beside them.

    Each kind of step is timed on a few of the labeled pictures, and counts as often as it comes. So
    is labeling, on a few of the unlabeled ones. Cost: some seconds; the default generator is put
    back.
    """
    stopwatch = Stopwatch(config, timetable)
    place = device(config.fitting.device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        few = config.scan("labeled")
        # Some methods cannot learn pictures of one class alone, as the first ones of a folder are.
        few = few.keep(some_of_each_class(few.targets(config.classes), PICTURES).tolist())
        data = Data(**config.sources(few, few, None), classes=config.classes, record={})
        if not config.pictures.crop:
            # As after the first epoch, which reads the files.
            for source in (data.labeled, data.unlabeled):
                source.images.fetch(torch.arange(len(source.images)))
        teacher = config.network().to(place)
        student = config.network().to(place)
        begin_as(teacher, student)

        def label(network: nn.Module) -> dict[str, Tensor]:
            stopwatch.label(network)
            return even_labels(data, ("unlabeled", "labeled"))

        training = Training(
            config=config,
            data=data,
            teacher=teacher,
            student=student,
            fit=stopwatch.fit,
            label=label,
            read_labels=lambda stores: even_labels(data, stores),
        )
        stopwatch.validate(student, data)
        trained = method.train(training)
        if trained.finetunes and config.fitting.chosen_finetuning:
            finetuner = config.finetuner(student)
            trainer = LossTrainer(student, optimizer=finetuner, **config.trainer_options())
            whole = stopwatch.beside
            stopwatch.fit(trainer, data.finetuning, None, steps=config.fitting.chosen_finetuning)
            stopwatch.finetuning = stopwatch.beside - whole
        stopwatch.tell_rest(trained)
    return stopwatch


def even_labels(data: Data, parts: Iterable[str]) -> dict[str, Tensor]:
    """Return labels of the pictures that steps are timed on, which name no class."""
    labels = {}
    for part in parts:
        count = len(getattr(data, part).images)
        labels[part] = torch.full((count, len(data.classes)), 1 / len(data.classes))
    return labels


class Stopwatch:
    """Times a few steps of each phase, in the place of a fit.

    Args:
        config: the settings of the training.
        timetable: whose clock is looked at before and after a step, and which is told what the
            steps of each phase take.
    """

    def __init__(self, config: Images, timetable: Timetable) -> None:
        self.config = config
        self.fitting = config.fitting
        self.small_until = round(config.pictures.recipe.small_until * config.fitting.chosen_steps)
        self.timetable = timetable

        # Seconds of a step, in the mean over all of the training, by the phases so far; those of
        # what takes as long whatever the number of steps is, with finetuning; of one validation of
        # a network, and of all of them.
        self.per_step = 0.0
        self.beside = 0.0
        self.per_validation = 0.0
        self.validations = 0.0
        self.finetuning = 0.0
        # Seconds in which the class of a picture is predicted.
        self.per_picture = 0.0
        self.phases = 0

    def fit(self, trainer: Trainer, labeled: Any, unlabeled: Any, **options: Any) -> FitResult:
        """Take some steps of each kind, and count them as often as the phase has them."""
        fitting = self.fitting
        # A phase may be shorter than the run.
        steps = options.get("steps", fitting.chosen_steps)
        with ExitStack() as opened:
            feeds = []
            for number, source in enumerate((labeled, unlabeled)):
                if source is None:
                    continue
                batches = feed(
                    source,
                    name=str(number),
                    stop=2**31,
                    num_workers=fitting.num_workers,
                    device=trainer.device,
                )
                opened.callback(batches.close)
                feeds.append(batches)
            wait = options.get("wait", 0)
            bounds = [0]
            times = []
            for first, last, step in kinds_of_steps(trainer, steps, wait, self.small_until):
                trainer.steps_done = first
                for batches in feeds:
                    batches.restore(batches.state() | {"position": first})
                seconds = self.usual_seconds(trainer, step, feeds)
                bounds.append(last)
                times.append(seconds)
        parts = parts_of(bounds, times)
        self.phases += 1
        if steps == fitting.chosen_steps:
            self.validations += VALIDATIONS * len(trainer.networks) * self.per_validation
            self.timetable.parts[options.get("phase", "fit")] = parts
            self.per_step += sum(part.seconds_after(0.0) for part in parts)
        else:
            self.beside += steps * sum(part.seconds_after(0.0) for part in parts)
        weights = {name: value.clone() for name, value in trainer.student.state_dict().items()}
        return FitResult(None, 0, weights)

    def label(self, network: nn.Module) -> None:
        """Label some unlabeled pictures, and count all of them, which are read from their files."""
        files = self.config.scan("unlabeled").without_repeats()
        some = files.keep(range(len(files))[:: -(-len(files) // PICTURES)])
        examples = ToLabel(
            images=some, ids=range(len(some)), name="unlabeled", input=self.config.input
        )
        since = self.timetable.clock()
        for step in range(examples.steps):
            pictures, *_ = examples.batch(step)
            if len(pictures):
                logits_of(network, [pictures])
        self.beside += (self.timetable.clock() - since) * len(files) / len(some)

    def validate(self, network: nn.Module, data: Data) -> None:
        """Time a validation of a network, with the statistics of batch norm before it."""
        batches = [*some_of([data.labeled.images], PICTURES)]
        # Without the first passes, by the fastest of the others.
        times = []
        for _ in range(2 * WARM):
            since = self.timetable.clock()
            logits_of(network, batches)
            times.append(self.timetable.clock() - since)
        self.per_picture = min(times[WARM:]) / sum(map(len, batches))
        pictures = len(self.config.scan("val")) if self.config.val else 0
        pictures += round((self.config.val_fraction or 0.0) * len(self.config.scan("labeled")))
        if pictures:
            self.per_validation = (pictures + STATISTICS_OF) * self.per_picture

    def tell_rest(self, trained: Trained) -> None:
        """Tell the timetable what tests and the report take after the last step.

        Args:
            trained: by a method, for as many networks as are tested.
        """
        networks = 1 + (trained.teacher is not None) + bool(self.finetuning)
        tested = len(self.config.scan("test")) if "test" in self.config.parts else 0
        pictures = networks * (tested + LEARNED) + self.phases * COUNTED
        self.timetable.rest = REPORT + SLOWER * self.per_picture * pictures

    def usual_seconds(self, trainer: Trainer, step: Any, feeds: Sequence[Any]) -> float:
        """Return the median time of some steps, after the first ones.

        By the fastest of them a third more steps were planned than there was time for, and what
        follows from their number, as mild changes do, did not fit those that were taken.

        As in a fit, an inner batch that a step does not read is not made, but in step 0.
        """
        times: list[float] = []
        begun = time.monotonic()
        while len(times) < WARM + TIMED:
            if len(times) > WARM and time.monotonic() - begun >= SECONDS:
                break
            since = self.timetable.clock()
            reads_inner = trainer.reads_inner or trainer.steps_done == 0
            read = feeds if reads_inner else feeds[:1]
            # To read the report waits for the device.
            step(*(batches.next() for batches in read)).as_dict()
            times.append(self.timetable.clock() - since)
        return statistics.median(times[WARM:])
