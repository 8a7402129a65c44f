"""``metapl train images``: a few labeled pictures, and many without labels."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import torch
import tyro
from torch import nn

from metapl.apps.data import Data
from metapl.apps.methods.base import Method
from metapl.apps.methods.feedback import Feedback
from metapl.apps.methods.fixmatch import FixMatch
from metapl.apps.methods.mpl import Mpl
from metapl.apps.methods.pseudo_labels import PseudoLabels
from metapl.apps.methods.reduced_mpl import ReducedMpl
from metapl.apps.methods.supervised import Supervised
from metapl.apps.methods.uda import Uda
from metapl.apps.progress import count_bar
from metapl.apps.settings import (
    Batch,
    Fitting,
    Role,
    Share,
    require,
)
from metapl.data.steps import StepSampler
from metapl.errors import MetaplError
from metapl.errors import few as some
from metapl.networks import architectures as networks
from metapl.networks.airbench import AirbenchSmall
from metapl.networks.card import LARGEST_SIDE, Input, NetworkCard
from metapl.networks.tuned import Normalized, Tuned, Tuning
from metapl.networks.weights import parameter_groups
from metapl.pictures import Finding, check_folders, scan_labeled, scan_unlabeled, verify_files
from metapl.pictures.batches import (
    EvaluationBatches,
    FileImages,
    LabeledBatches,
    UnlabeledBatches,
)
from metapl.pictures.folders import Files, FilesT, LabeledFiles, hash_files, without_copies
from metapl.pictures.reader import Levels
from metapl.pictures.splits import stratified_split
from metapl.pictures.views.base import Chain, Identity, Until, View
from metapl.pictures.views.transforms import (
    Affine,
    Color,
    Flip,
    Hole,
    Recolor,
    ResizedCrop,
    Sometimes,
)
from metapl.runs.fields import Range, check_fields
from metapl.training import Say
from metapl.words import shown

# Bytes of decoded pictures that are kept in memory. The files of a larger folder are read each time
# that they are drawn.
IN_MEMORY = 2**30

# Where nothing else measures the network: the share of the labeled pictures that is set aside, how
# many at most, and from how many on: too few to select on are better trained on, and so are more
# than tell networks apart. With test pictures all are trained on: of 1,000 labels of CIFAR-10 a
# fifth more is worth 2 to 3 points, and the last network is nearly always the best one.
SET_ASIDE = 0.2
MOST_SET_ASIDE = 400
SPLIT_FROM = 250

# Pictures in a batch of an evaluation.
EVALUATED_AT_ONCE = 256

# The greatest rotation and shear in degrees, the greatest shift as a share of the side, and the
# greatest zoom of an augmented picture.
ROTATION = 20.0
SHIFT = 0.125
ZOOM = 1.33
SHEAR = 10.0

# The greatest changes of brightness, contrast and saturation; of the hue, where colors do not tell
# classes apart; and the greatest side of the hole, as a share of the picture's.
BRIGHTNESS = 0.4
CONTRAST = 0.4
SATURATION = 0.4
HUE = 0.1
HOLE = 0.5

# The share of the greatest movement in pictures that are labeled by a network.
WEAK_MOVEMENT = 0.25

# Share of the labeled pictures that are changed strongly; the others are changed mildly. Strong
# changes may take away what a class is told by, and then nothing is learned where all are changed.
LABELED_STRONGLY = 0.75

# The greatest shift of the mildly changed ones, as a share of the side: 2 of 28 pixels.
MILD_SHIFT = 1 / 14

# Share of these pictures that are turned and zoomed too, and by how many degrees and by how much at
# most. The others are shifted alone, since interpolation blurs fine lines.
MILDLY_TURNED = 0.5
MILD_ROTATION = 10.0
MILD_ZOOM = 1.1

# Share of the pictures that are changed in finetuning; the others are as they will be when they are
# predicted. Changes may take away what a class is told by: a hole covers one of the things to be
# counted.
FINETUNED_ON_CHANGED = 0.5

# The small phase of a recipe: the share of the side that pictures have in it.
SMALL = 0.75

# The greatest changes of labeled pictures by a recipe of its own, between mild and strong: degrees
# of rotation, zoom, each change of color, and the side of the hole.
MEDIUM_ROTATION = 7.0
MEDIUM_ZOOM = 1.12
MEDIUM_COLOR = 0.2
MEDIUM_HOLE = 0.25

# Learning rates for networks from scratch, by the beginning of their names.
RATES = {
    "airbench": 6e-2,
    "pooled_cnn": 1e-2,
    "small_cnn": 4e-3,
    "wide_resnet": 1e-3,
    "resnet": 1e-3,
    "efficientnet": 3e-4,
    "vit": 3e-4,
}
OTHER_RATE = 5e-4

# Learning rates of AdamW for a network with pretrained weights, by what of it is trained.
TUNING_RATES = {"head": 1e-3, "all": 2e-4}

# The learning rate of SGD that finetunes.
FINETUNING_RATE = 1e-2

# Passes over the labeled pictures that are too few for strong changes: with 4,000 labels of
# CIFAR-10, mild ones are four points ahead after 7 passes, two after 15, and level from 30 on.
MILD_UNTIL = 20.0

CLIP_NORM = 1.0
USUAL_BATCH = 32
MOMENTUM = 0.9


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained where no flag says otherwise, beside its rate.

    Args:
        optimizer: AdamW, or SGD with Nesterov momentum.
        weight_decay: of the weights that are no scales or biases.
        clip_norm: the greatest norm of a gradient; None: any.
        label_smoothing: of the loss on labeled pictures.
        labeled_batch: the number of labeled pictures in a step.
        schedule: how learning rates fall.
        warmup: the share of the steps over which learning rates grow.
        small_until: the share of the steps in which pictures are smaller.
        changes: how labeled pictures change: as the unlabeled ones but for a quarter of them, or
            all of them less.
        mild_until: up to how many passes over the labeled pictures all changes are mild.
        finetunes_alone: whether a network that learns labels alone is finetuned on them at the end.
        two_views: whether pictures that look like their mirror images are mirrored in training, and
            the network predicts by both.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.05
    clip_norm: float | None = CLIP_NORM
    label_smoothing: float = 0.0
    labeled_batch: int = USUAL_BATCH
    schedule: Literal["cosine", "linear"] = "cosine"
    warmup: float = 0.05
    small_until: float = 0.0
    changes: Literal["strong", "medium"] = "strong"
    mild_until: float = 0.0
    finetunes_alone: bool = True
    two_views: bool = False


# Recipes of networks from scratch, by the beginning of their names. The deeper networks may
# diverge at first, and their gradients are clipped.
RECIPES = {
    "airbench": Recipe(
        optimizer="sgd",
        weight_decay=2e-3,
        clip_norm=None,
        label_smoothing=0.2,
        labeled_batch=64,
        schedule="linear",
        warmup=0.15,
        small_until=0.6,
        changes="medium",
        mild_until=MILD_UNTIL,
        finetunes_alone=False,
        two_views=True,
    ),
    "pooled_cnn": Recipe(clip_norm=None),
    "small_cnn": Recipe(clip_norm=None),
}

METHODS: dict[str, Method] = {
    "uda": Uda(),
    "fixmatch": FixMatch(),
    "supervised": Supervised(),
    "pseudo_labels": PseudoLabels(),
    "mpl": Mpl(),
    "none": Mpl(feedback=Feedback(learns_from_student=False)),
    "reduced_mpl": ReducedMpl(),
    "reduced_none": ReducedMpl(feedback=Feedback(learns_from_student=False)),
}
COMPARED = ("uda", "mpl", "none", "supervised", "pseudo_labels")

Folder = Annotated[str, tyro.conf.arg(metavar="DIR")]
OtherFolder = Annotated[str | None, tyro.conf.arg(metavar="DIR")]
T = TypeVar("T")

Minutes = Annotated[float, Range(above=0, most=60 * 24 * 366)] | None


@dataclass(frozen=True, kw_only=True)
class Views:
    """How the pictures of a step are augmented.

    Args:
        weak: unlabeled pictures for the network that labels them.
        strong: unlabeled pictures for the network that learns the labels.
        labeled: labeled pictures.
        finetuned: labeled pictures in finetuning.
        crop: draws the part that is cut out of a file before; None: the whole picture is taken.
    """

    weak: View
    strong: View
    labeled: View
    finetuned: View
    crop: ResizedCrop | None


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """How pictures are read and augmented, and the network.

    What is None is chosen by looking at some pictures.

    Args:
        network: architecture of the networks, such as airbench_small, resnet18, vit_b_16 or
            timm:NAME.
        weights: file of pretrained weights to begin with, or imagenet to download some.
        backbone: pretrained network to begin with: the name of one on this machine, a file, the
            folder of a run, or none to train from scratch.
        tuning: how the --backbone is trained: head trains its last layer alone (the default), all
            trains the whole network.
        image_size: side in pixels to which pictures are resized.
        grey: whether to read pictures without colors. By default it depends on the pictures.
        augment: how pictures are augmented: strong moves them, changes their colors and covers a
            part of each, but for a quarter of the labeled ones, which are changed mildly. mild
            shifts all of them a little, and turns half of them a little. By default it is strong,
            and mild where airbench_small sees each labeled picture 20 times or less.
        mirror: whether to mirror half of the pictures while training, which is wrong for letters.
            By default it depends on the pictures where the network is airbench_small, and else they
            are not mirrored.
        recolor: whether to exchange colors, and light and dark, while training. By default it
            depends on the pictures.
        crop: train on random parts of the pictures, in the place of moving and turning them.
        dropout: dropout rate of the networks.
        stochastic_depth: probability that the last block of a network is skipped in a step.
    """

    network: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    weights: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    backbone: Annotated[str, tyro.conf.arg(metavar="NAME|FILE")] = "none"
    tuning: Tuning | None = None
    image_size: Annotated[int, Range(1, most=LARGEST_SIDE)] | None = None
    grey: tyro.conf.FlagConversionOff[bool | None] = None
    augment: Literal["mild", "strong"] | None = None
    mirror: tyro.conf.FlagConversionOff[bool | None] = None
    recolor: tyro.conf.FlagConversionOff[bool | None] = None
    crop: bool = False
    dropout: Share = 0.0
    stochastic_depth: Share = 0.0
    mean: tyro.conf.Suppress[tuple[float, ...] | None] = None
    std: tyro.conf.Suppress[tuple[float, ...] | None] = None
    # The covariance of 2 x 2 patches of normalized pictures, row by row, that some networks whiten.
    patches: tyro.conf.Suppress[tuple[float, ...] | None] = None
    levels: tyro.conf.Suppress[Levels | None] = None
    # The SHA-256 of the weights, once they were found.
    weights_sha256: tyro.conf.Suppress[str | None] = None

    def __post_init__(self) -> None:
        check_fields(self)
        has_backbone = self.backbone != "none"
        require(self, self.tuning is None or has_backbone, "tuning", "--backbone beside it")
        has_frozen_layers = has_backbone and self.tuning != "all"
        for noise in ("dropout", "stochastic_depth"):
            fits = not (has_frozen_layers and getattr(self, noise))
            require(self, fits, noise, "--tuning all, for what is frozen has no noise")
        if self.network is not None:
            self.architecture(classes=2)

    @property
    def input(self) -> Input:
        """Return what the network takes."""
        assert self.image_size is not None, "choose_settings gave it"
        channels: Literal[1, 3] = 1 if self.grey else 3
        return Input(channels=channels, size=self.image_size, levels=self.levels)

    def views(self, small_until: int = 0) -> Views:
        """Return how the pictures of a step are augmented.

        Args:
            small_until: the number of steps in which pictures are smaller. Those that finetune, and
                boxes that are cut out of files, are not.
        """
        views = self._views(side=None)
        if small_until == 0 or self.crop:
            return views
        small = self._views(side=round(SMALL * self.input.size))
        return dataclasses.replace(
            views,
            weak=Until(small_until, small.weak, views.weak),
            strong=Until(small_until, small.strong, views.strong),
            labeled=Until(small_until, small.labeled, views.labeled),
        )

    def _views(self, side: int | None) -> Views:
        """Return views that bring pictures to a side; None: that they have."""
        if self.augment == "mild":
            return self._mild_views(side)
        color = Color(BRIGHTNESS, CONTRAST, SATURATION, HUE if self.recolor else 0.0)
        colored: list[View] = [color, Hole((HOLE / 5, HOLE))]
        if self.recolor:
            colored.append(Recolor())
        if self.crop:
            changed = Chain(tuple(colored))
            return Views(
                weak=Identity(),
                strong=changed,
                labeled=Sometimes(changed, LABELED_STRONGLY),
                finetuned=changed,
                crop=ResizedCrop(self.input.size, flip=bool(self.mirror)),
            )
        # Labels are given to what has a quarter of the movement, and nothing else but mirroring.
        weak = Chain(tuple(self._moved(WEAK_MOVEMENT, side)))
        strong = Chain((*self._moved(1.0, side), *colored))
        if self.recipe.changes == "medium":
            labeled: View = self._medium_view(side)
            finetuned = Sometimes(labeled, FINETUNED_ON_CHANGED)
        else:
            mild = self._mild_views(side).labeled
            labeled = Sometimes(strong, LABELED_STRONGLY, otherwise=mild)
            finetuned = Sometimes(strong, FINETUNED_ON_CHANGED)
        return Views(weak=weak, strong=strong, labeled=labeled, finetuned=finetuned, crop=None)

    def _medium_view(self, side: int | None) -> View:
        """Return a view that moves pictures a little, in one sampling, and changes their colors.

        The colors of most are exchanged where that is asked for, as those of unlabeled ones are.
        """
        affine = Affine(
            MEDIUM_ROTATION,
            SHIFT,
            (1 / MEDIUM_ZOOM, MEDIUM_ZOOM),
            flip=bool(self.mirror),
            side=side,
        )
        color = Color(MEDIUM_COLOR, MEDIUM_COLOR, MEDIUM_COLOR)
        changes: list[View] = [affine, color, Hole((MEDIUM_HOLE, MEDIUM_HOLE))]
        if self.recolor:
            # A few labels are learned by their colors where these stay.
            changes.append(Sometimes(Recolor(), LABELED_STRONGLY))
        return Chain(tuple(changes))

    def _mild_views(self, side: int | None) -> Views:
        """Return views that leave a picture as it is, but for its place and its direction."""
        if self.crop:
            crop = ResizedCrop(self.input.size, flip=bool(self.mirror))
            still = Identity()
            return Views(weak=still, strong=still, labeled=still, finetuned=still, crop=crop)
        shifted = Affine(0.0, MILD_SHIFT, (1.0, 1.0), 0.0, side=side)
        turned = Affine(MILD_ROTATION, MILD_SHIFT, (1 / MILD_ZOOM, MILD_ZOOM), 0.0, side=side)
        moved: list[View] = [Sometimes(turned, MILDLY_TURNED, otherwise=shifted)]
        if self.mirror:
            moved.insert(0, Flip())
        view = Chain(tuple(moved))
        finetuned = Sometimes(view, FINETUNED_ON_CHANGED)
        return Views(weak=view, strong=view, labeled=view, finetuned=finetuned, crop=None)

    def _moved(self, share: float, side: int | None) -> list[View]:
        """Return how a picture is mirrored, and moved by a share of the greatest movement."""
        zoom = math.exp(share * math.log(ZOOM))
        affine = Affine(share * ROTATION, share * SHIFT, (1 / zoom, zoom), share * SHEAR, side=side)
        if self.mirror:
            return [Flip(), affine]
        return [affine]

    def images(self, paths: Iterable[str], log: Path | None) -> FileImages:
        """Return pictures of which each file is read when it is first drawn, and kept if all fit.

        So training starts at once.
        """
        side = self.input.size
        colors: Literal["L", "RGB"] = "L" if self.grey else "RGB"
        images = FileImages([*paths], size=(side, side), colors=colors, levels=self.levels, log=log)
        fits = len(images) * side * side * images.shape[0] <= IN_MEMORY
        return images.cached() if fits and not self.crop else images

    def architecture(self, classes: int) -> networks.Architecture:
        """Describe the network for so many classes, with its noise."""
        plain = networks.Architecture(
            name=self.network or "",
            num_classes=classes,
            in_channels=1 if self.grey else 3,
            image_size=self.image_size,
        )
        dropout, stochastic_depth = self.noise(plain)
        return dataclasses.replace(plain, dropout=dropout, stochastic_depth=stochastic_depth)

    def noise(self, architecture: networks.Architecture) -> tuple[float, float]:
        """Return the rates of dropout and of stochastic depth of a network."""
        return self.dropout, self.stochastic_depth

    def build(self, classes: int) -> nn.Module:
        """Build the network with fresh or pretrained weights; it normalizes pictures in [0, 1]."""
        assert self.mean is not None, "choose_settings gave it"
        assert self.std is not None, "choose_settings gave it"
        architecture = self.architecture(classes)
        module = architecture.create(self.weights)
        if isinstance(module, AirbenchSmall) and self.weights is None:
            assert self.patches is not None, "choose_settings gave it"
            covariance = torch.tensor(self.patches, dtype=torch.float64)
            module.whiten(covariance.view(math.isqrt(len(covariance)), -1))
        network: Normalized
        if self.tuning is None or self.weights is None:
            network = Normalized(module, self.mean, self.std, mirrored=self.mirrored)
        else:
            network = Tuned(
                module,
                self.mean,
                self.std,
                heads=architecture.heads(module),
                tuning=self.tuning,
            )
        return network.to(memory_format=torch.channels_last)

    @property
    def rate(self) -> float:
        """Return the learning rate with which such a network trains."""
        if self.weights:
            return TUNING_RATES[self.tuning or "all"]
        return by_stem(RATES, self.network, OTHER_RATE)

    @property
    def recipe(self) -> Recipe:
        """Return how such a network trains, beside its rate.

        One that begins with weights trains as pretrained ones do.
        """
        if self.weights:
            return Recipe()
        return by_stem(RECIPES, self.network, Recipe())

    @property
    def mirrored(self) -> bool:
        """Return whether the network predicts by a picture and its mirror image."""
        return bool(self.mirror) and self.recipe.two_views and self.tuning is None


def by_stem(entries: Mapping[str, T], name: str | None, other: T) -> T:
    """Return the entry of networks whose names begin as this one; ``other`` where there is none."""
    for stem, entry in entries.items():
        if str(name).startswith(stem):
            return entry
    return other


@dataclass(frozen=True, kw_only=True)
class Images:
    """Train on pictures: a few of them in one folder a class, many without labels.

    Flags that you leave out are chosen by looking at the pictures, and by how many steps fit into
    the minutes.

    Args:
        labeled: folder of labeled pictures, with a folder for each class in it. Of CIFAR and SVHN
            as released, examples/set_folders.py writes such folders.
        unlabeled: folder of unlabeled pictures, or a .txt file of their paths. By default it is
            --labeled, whose pictures are learned without their labels too.
        val: folder of other labeled pictures, by which the best network is selected. By default
            there are none with --test or --test-fraction, and the last network is taken.
        val_fraction: share of each class of --labeled that is set aside in the place of --val, such
            as 0.1. By default it is 0 with --test or --test-fraction, unless --patience asks for
            some; else it is 0.2, 400 pictures at most, if there are 250 pictures or more.
        test: folder of other labeled pictures, on which the accuracy is reported at the end.
        test_fraction: share of each class of --labeled that is held out in the place of --test,
            such as 0.2: the same pictures whatever the seed is.
        unlabeled_batch: number of unlabeled pictures in each step.
        minutes: minutes of the clock that the training may take, with its labeling and finetuning;
            with --compare, each of them. The number of steps is planned as it begins. Where the
            machine becomes slower, or all steps of finetuning take too long, some are skipped. By
            default it takes 5.
    """

    name: ClassVar[str] = "images"
    places: ClassVar[tuple[str, ...]] = ("labeled", "unlabeled", "val", "test")
    # Threads of the linear algebra are those of the process.
    threads: ClassVar[int | None] = None
    # The unlabeled pictures for each labeled one that a method takes by default, where it asks.
    usual_ratio: ClassVar[int | None] = None

    labeled: Folder
    unlabeled: OtherFolder = None
    val: OtherFolder = None
    val_fraction: Share | None = None
    test: OtherFolder = None
    test_fraction: Share | None = None
    unlabeled_batch: Batch = 32
    minutes: Minutes = None
    pictures: Pictures = field(default_factory=Pictures)
    fitting: Fitting = field(default_factory=lambda: Fitting(ema_decay=0.99))
    classes: tyro.conf.Suppress[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if self.unlabeled is None:
            object.__setattr__(self, "unlabeled", self.labeled)
        is_one = self.test is None or not self.test_fraction
        require(self, is_one, "test_fraction", "it, or --test DIR, and not both")
        is_one = self.val is None or not self.val_fraction
        require(self, is_one, "val_fraction", "it, or --val DIR, and not both")

    @property
    def learns_own(self) -> bool:
        """Return whether the unlabeled pictures are the labeled ones, for want of others."""
        return self.unlabeled == self.labeled

    @property
    def input(self) -> Input:
        """Return what a network takes."""
        return self.pictures.input

    @property
    def parts(self) -> list[str]:
        """Return the names of the flags whose pictures there are."""
        parts = [name for name in self.places if getattr(self, name) is not None]
        return [*parts, "test"] if self.test_fraction else parts

    @property
    def has_frozen_layers(self) -> bool:
        """Return whether a backbone is trained in part."""
        return self.pictures.backbone != "none" and self.pictures.tuning != "all"

    def scan(self, name: str) -> Any:
        """Return the files of a folder by the name of its flag."""
        if name == "unlabeled":
            return scan_unlabeled(self.unlabeled or self.labeled)
        if not self.test_fraction or name == "val":
            return scan_labeled(getattr(self, name))
        files = scan_labeled(self.labeled)
        learned, held_out = stratified_split(files.targets(), self.test_fraction, seed=0)
        return files.keep((held_out if name == "test" else learned).tolist())

    def data(self, say: Say, progress: bool, log: Path | None) -> Data:
        """Return the data; refuse pictures that would be learned from and measured on."""
        # 1. The files are listed, looked at, and compared.
        files_by_place: dict[str, Any] = {}
        skipped: dict[str, str] = {}
        # Of pictures that are labeled too it has been said.
        say_of_many: Say = (lambda text: None) if self.learns_own else say
        for name in self.parts:
            say_of_them = say_of_many if name == "unlabeled" else say
            files_by_place[name] = self._readable(name, skipped, say_of_them, progress)
        few = files_by_place["labeled"]
        many = files_by_place["unlabeled"]
        val = files_by_place.get("val")
        test = files_by_place.get("test")
        if test is not None and self.test_fraction:
            with count_bar("comparing files", progress):
                few = apart(few, test, say, what="labeled", aside="testing", way_out="--test")
                many = apart(many, test, say_of_many, aside="testing", way_out="--test")
        compare_files(few, many, val, test, say=say, progress=progress)
        hashes = {name: hash_files(files) for name, files in files_by_place.items()}

        # 2. Some are set aside to select on. Nothing may be learned from copies of those.
        if val is None and self.val_fraction:
            train, aside = stratified_split(few.targets(), self.val_fraction, self.fitting.seed)
            val = few.keep(aside.tolist())
            say(set_aside(few, val, self.val_fraction))
            few = few.keep(train.tolist())
            with count_bar("comparing files", progress):
                few = apart(few, val, say, what="labeled", aside="validation", way_out="--val")
                many = apart(many, val, say_of_many, aside="validation", way_out="--val")
        elif val is None:
            say(
                f"all {len(few):,} labeled pictures are learned from, and none are set aside to "
                "select by; --val-fraction 0.1 or --val DIR gives some"
            )
        classes = f"{len(self.classes)} classes ({some(self.classes, most=6, longest=24)})"
        others = "no others" if self.learns_own else f"{len(many):,} unlabeled"
        summary = f"{len(few):,} labeled pictures of {classes}, {others}"
        validated = str(len(val)) if val else "none"
        tested = f"{len(test):,}" if test else "none"
        say(f"{summary}, {validated} for validation, {tested} to test on")

        # 3. What is learned from, and measured on.
        measured: dict[str, Any] = {}
        for name, files in (("validation", val), ("test", test)):
            if files is not None:
                images = self.pictures.images(files.paths(), log)
                labels = files.targets(self.classes)
                measured[name] = EvaluationBatches(images, labels, EVALUATED_AT_ONCE)
        listed = {"labeled": few, "validation": val, "test": test}
        names = {name: list(files.names) if files else [] for name, files in listed.items()}
        return Data(
            **self.sources(few, many, log),
            **measured,
            classes=self.classes,
            test_names=test.names if test else None,
            skipped=skipped,
            record={**names, "unlabeled": len(many), "hash": hashes},
        )

    def _readable(self, name: str, skipped: dict[str, str], say: Say, progress: bool) -> Any:
        """Return the files of a folder that can be read; add the others to ``skipped``."""
        files = self.scan(name)
        if files.passed_over:
            others = ", ".join(
                f"{count:,} with {suffix}" for suffix, count in sorted(files.passed_over.items())
            )
            say(f"{name}: some files are passed over: {others}")
        word = "validation" if name == "val" else name
        with count_bar(f"looking at {word} files", progress, len(files)) as count:
            verified = verify_files(files, progress=count, levels=self.pictures.levels)
        if verified.skipped:
            reasons = "; ".join(verified.summary().splitlines())
            say(f"{name}: of {len(files):,} files, {reasons}")
        if not verified.sound:
            raise MetaplError(f"none of the {len(files)} pictures in {files.root} can be read.")
        for file, reason in verified.skipped.items():
            skipped[str(files.root / file)] = reason
        return files.keep(verified.sound) if verified.skipped else files

    def network(self) -> nn.Module:
        """Build the network with fresh or pretrained weights."""
        return self.pictures.build(len(self.classes))

    def with_network(self, name: str) -> Self:
        """Return the settings with another network.

        Its weights are fresh ones, for a file of weights is of one network.
        """
        if name == self.pictures.network:
            return self
        if self.pictures.backbone != "none":
            raise MetaplError(
                f"--backbone is of one network, and {name} is another one; leave --networks out."
            )
        pictures = dataclasses.replace(self.pictures, network=name, weights=None)
        return dataclasses.replace(self, pictures=pictures)

    def card(self, title: str) -> NetworkCard:
        """Describe the network for network.json."""
        return NetworkCard(
            title=title,
            input=self.input,
            architecture=self.pictures.architecture(len(self.classes)),
            channels_last=True,
            mean=self.pictures.mean,
            std=self.pictures.std,
            mirrored=self.pictures.mirrored,
        )

    def optimizer(
        self, role: Role, module: nn.Module, lr: float | None = None
    ) -> torch.optim.Optimizer:
        """Build an optimizer with the rate of the teacher or student, or the usual one."""
        recipe = self.pictures.recipe
        groups = parameter_groups(module, recipe.weight_decay)
        rate = (self.fitting.lr if role == "teacher" else lr) or self.pictures.rate
        if recipe.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM, nesterov=True)
        return torch.optim.AdamW(groups, lr=rate)

    def finetuner(self, module: nn.Module) -> torch.optim.Optimizer:
        """Build SGD for finetuning."""
        return torch.optim.SGD(parameter_groups(module, 0.0), lr=FINETUNING_RATE)

    def trainer_options(self) -> dict[str, Any]:
        """Return the options of every trainer."""
        return {
            "clip_norm": self.pictures.recipe.clip_norm,
            "accumulate": self.fitting.accumulate,
            "precision": self.fitting.precision,
        }

    def finetuning(self) -> dict[str, Any]:
        """Return the options of the fit that finetunes.

        Its rate stays, as Meta Pseudo Labels finetunes its students of small benchmarks.
        """
        return self.fitting.finetuning(schedule="constant")

    def check_first(self) -> None:
        """Refuse folders whose files would spoil the training, without comparing their bytes."""
        files: list[Any] = []
        for name in self.places:
            files.append(self.scan(name) if name in self.parts else None)
        refuse_errors(check_folders(*files, copies=False))

    def sources(self, few: LabeledFiles, many: Files, log: Path | None) -> dict[str, Any]:
        """Return sources whose pictures, and views of them, follow from the seed and the step."""
        labeled = self.pictures.images(few.paths(), log)
        labels = few.targets(self.classes)
        unlabeled = self.pictures.images(many.paths(), log)
        seed = self.fitting.seed
        steps = self.fitting.steps or 0
        views = self.pictures.views(round(self.pictures.recipe.small_until * steps))
        few_a_step = self.fitting.chosen_batch
        many_a_step = self.unlabeled_batch
        return {
            "labeled": LabeledBatches(
                labeled,
                labels,
                StepSampler(len(labeled), few_a_step, seed=seed, stream=0),
                views.labeled,
                seed,
                crop=views.crop,
            ),
            "unlabeled": UnlabeledBatches(
                unlabeled,
                StepSampler(len(unlabeled), many_a_step, seed=seed, stream=1),
                views.weak,
                views.strong,
                seed,
                crop=views.crop,
            ),
            "finetuning": LabeledBatches(
                labeled,
                labels,
                StepSampler(len(labeled), few_a_step, seed=seed, stream=2),
                views.finetuned,
                seed + 1,
                crop=views.crop,
            ),
        }


# ---------------------------------------------------------------------------------------- the files


def compare_files(few: Any, many: Any, val: Any, test: Any, *, say: Say, progress: bool) -> None:
    """Refuse pictures that are both learned from and measured on; say what else is remarkable."""
    with count_bar("comparing files", progress) as count:
        findings = check_folders(few, many, val, test, count)
    refuse_errors(findings)
    for finding in findings:
        say(f"note: {finding.message}")


def apart(
    learned: FilesT,
    held_out: LabeledFiles,
    say: Say,
    *,
    what: Literal["labeled", "unlabeled"] = "unlabeled",
    aside: str,
    way_out: str,
) -> FilesT:
    """Return the pictures to learn from without copies of those that are set aside.

    Args:
        what: those to learn from are.
        aside: what the labeled ones are set aside for.
        way_out: the flag that names others.
    """
    others = without_copies(learned, held_out)
    of_class = ""
    if isinstance(learned, LabeledFiles) and isinstance(others, LabeledFiles):
        lost = sorted({*learned.labels} - {*others.labels})
        of_class = f" of {shown(learned.classes[lost[0]])}" if lost else ""
    if not others or of_class:
        number = "" if of_class else f"{len(learned):,} "
        raise MetaplError(
            f"all {number}{what} pictures{of_class} in {learned.root} are copies of labeled "
            f"ones that are set aside for {aside}; expected others, or pictures for {aside} by "
            f"{way_out} DIR."
        )
    if len(others) < len(learned):
        say(
            f"note: {len(learned) - len(others):,} {what} pictures are left out: they are "
            f"copies of labeled ones that are set aside for {aside}"
        )
    return others


def share_set_aside(config: Images, labeled: int) -> float:
    """Return the share of the labeled pictures that is set aside where no flag says one.

    Args:
        labeled: how many there are.
    """
    has_others = config.val is not None
    if config.fitting.patience is None:
        has_others |= "test" in config.parts
    if has_others or labeled < SPLIT_FROM:
        return 0.0
    return min(SET_ASIDE, MOST_SET_ASIDE / labeled)


def set_aside(few: LabeledFiles, val: LabeledFiles, share: float) -> str:
    """Return how many labeled pictures validation takes, and of the class with the fewest."""
    counts = Counter(few.labels)
    smallest, count = min(counts.items(), key=lambda item: item[1])
    return (
        f"{len(val):,} of {len(few):,} labeled pictures are set aside to select and to measure by: "
        f"of each class {share:.0%}, such as {Counter(val.labels)[smallest]:,} of {count:,} of "
        f"{shown(few.classes[smallest])}; --val-fraction 0 sets none aside"
    )


def refuse_errors(findings: Sequence[Finding]) -> None:
    """Stop where the folders would spoil the training."""
    errors = [finding.message for finding in findings if finding.level == "error"]
    if errors:
        raise MetaplError("\n".join(errors))
