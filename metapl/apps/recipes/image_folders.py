"""A folder of pictures with few labels, and one with many pictures without."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Optional, Self, TypeVar

import tyro

from metapl.apps.labels.files import DESCRIPTION
from metapl.apps.machine.progress import counting
from metapl.apps.machine.sealed import read_plain
from metapl.apps.pictures.check import (
    Finding,
    check_folders,
    find_nested,
    find_other_classes,
    verify_files,
    without_copies,
)
from metapl.apps.pictures.folders import Files, FilesT, LabeledFiles, Progress, hash_files, scan_labeled, scan_unlabeled
from metapl.apps.pictures.input import LARGEST_SIDE
from metapl.apps.pictures.splits import stratified_split
from metapl.apps.pictures.store import FileImages
from metapl.apps.pictures.views.base import Chain, Identity, View
from metapl.apps.pictures.views.transforms import Affine, Color, Flip, Hole, Recolor, ResizedCrop, Sometimes
from metapl.apps.recipes.base import Task
from metapl.apps.recipes.image_recipe import ImageParts, ImageRecipe, Views
from metapl.apps.recipes.settings import OPEN, OpenOptimizer, Optimizer, Share, Steps, Weight, require
from metapl.errors import MetaplError
from metapl.errors import few as some
from metapl.runs.fields import Range, check_fields
from metapl.training import Say

IN_MEMORY = 2**30  # bytes of decoded pictures that are kept; of larger folders, files are read each time they are drawn
HUE = 0.1  # share of a turn by which colors are changed that do not tell classes apart

# Shares of the steps: before the student of a teacher begins, of the growing learning rates, before UDA begins, of its
# ramp, and on labels as they are given before anything is learned about them.
WAIT, WARMUP, START, RAMP, WARM = 0.75, 0.05, 0.4, 0.1, 0.2

# Share of the pictures that are changed in finetuning; the others are as they will be when they are predicted. Changes
# may take away what a class is told by: a hole covers one of the things to be counted.
FINETUNED_ON_CHANGED = 0.5

# Learning rates of AdamW by the beginning of a network's name, and with pretrained weights.
RATES = {"pooled_cnn": 1e-2, "small_cnn": 4e-3, "wide_resnet": 1e-3, "resnet": 1e-3, "efficientnet": 3e-4, "vit": 3e-4}
OTHER_RATE, PRETRAINED_RATE = 5e-4, 2e-4

# Greatest norm of a gradient in networks other than pooled_cnn and small_cnn, some of which diverge at first without
# it; and in these two.
CLIPPED, NOT_CLIPPED = 1.0, 0.0

OF_METHOD = ("wait", "uda_start", "uda_ramp", "uda_prior", "warm_steps")  # fields of methods that are chosen where None

Minutes = Annotated[float, Range(above=0, most=60 * 24 * 366)]  # a year
LONG, SELECTED = (tyro.conf.create_mutex_group(required=False) for _ in range(2))  # of whose flags one is given

T = TypeVar("T")
if TYPE_CHECKING:
    Open = Annotated[T, "chosen when the recipe is settled"]
else:
    Open = Optional


@dataclass(frozen=True, kw_only=True)
class Changes:
    """How pictures are changed before the network learns from them, in whole batches on the device.

    Args:
        degrees: greatest rotation, in degrees.
        translate: greatest shift, as a share of the side.
        zoom: greatest factor by which a picture is enlarged or shrunk.
        shear: greatest shear, in degrees.
        brightness: greatest change of brightness, as a share.
        contrast: greatest change of contrast, as a share.
        saturation: greatest change of saturation, as a share.
        hue: greatest change of hue, as a share of a full turn; by default 0.1 with recolor, and 0 without.
        hole: greatest side of the square that is covered, as a share of the picture's side.
        mirror: mirror half of the pictures left to right. Not for letters, digits or anything else that has a right way
            round.
        recolor: exchange red, green and blue, and light and dark, so that the network learns shapes and textures. Not
            for classes that differ by color; by default it is off if color tells the classes apart.
    """

    degrees: float = 20.0
    translate: float = 0.125
    zoom: Annotated[float, Range(1)] = 1.33
    shear: float = 10.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float | None = None
    hole: Weight = 0.5
    mirror: bool = False
    recolor: tyro.conf.FlagConversionOff[bool | None] = None

    def __post_init__(self) -> None:
        check_fields(self)
        self.strong()

    def strong(self) -> View:
        """What is learned from."""
        return Chain((*self._moved(1.0), *self._colored()))

    def weak(self) -> View:
        """What is labeled: a quarter of the movement, and nothing else but mirroring."""
        return Chain(self._moved(0.25))

    def after_crop(self) -> View:
        """What is learned from, of a part of a picture."""
        return Chain(self._colored())

    def _colored(self) -> tuple[View, ...]:
        color = Color(self.brightness, self.contrast, self.saturation, self.hue or 0.0)
        return (color, Hole((self.hole / 5, self.hole)), *((Recolor(),) if self.recolor else ()))

    def _moved(self, share: float) -> tuple[View, ...]:
        zoom = math.exp(share * math.log(self.zoom))
        moved = Affine(share * self.degrees, share * self.translate, (1 / zoom, zoom), share * self.shear)
        return (*((Flip(),) if self.mirror else ()), moved)

    def settled(self, recolor: bool) -> Changes:
        """With a value for every field: ``recolor`` where it was left open, and the hue that goes with it."""
        recolor = recolor if self.recolor is None else self.recolor
        hue = (HUE if recolor else 0.0) if self.hue is None else self.hue
        return dataclasses.replace(self, recolor=recolor, hue=hue)


@dataclass(frozen=True, kw_only=True)
class ImageFolders(ImageRecipe):
    """One folder a class for labeled pictures, any folder tree for unlabeled ones.

    What is left None is chosen by looking at the pictures, and by how many steps fit into the minutes; a run's
    recipe.json has what was chosen.

    Args:
        labeled: labeled pictures: a folder with one subfolder for each class.
        unlabeled: unlabeled pictures: a folder, with or without subfolders; or a .txt file with a path in each line.
        val: validation pictures, in a folder like --labeled. By default a fifth of the labeled pictures is set aside
            if that makes 50 or more, and otherwise none.
        test: test pictures, in a folder like --labeled; the accuracy on them is reported.
        grey: read pictures without colors; by default if they have none.
        image_size: side in pixels that every picture is resized to; by default close to their own, from 16 to 48, or
            128 with --weights.
        network_name: pooled_cnn (the default), small_cnn, wide_resnet28_2, resnet18 (the default with --weights), 34,
            50, ..., efficientnet_b0 to b7, vit_b_16, ..., or timm:NAME. After an unknown name, the error lists all.
        weights: file with pretrained weights of the network; imagenet downloads those of torchvision.
        minutes: how long training may take: as many steps are taken as fit by a short measurement on this machine. By
            default 5; --steps replaces it. With --compare, every method takes the steps of --method.
        steps: number of training steps; by default as many as fit into --minutes.
        warmup: steps over which the learning rates grow from 0; by default 5 %. With mpl and none, both networks take
            the same share of the student's steps, which are those after --wait.
        val_fraction: share of each class that is set aside for validation if --val is not given; 0 sets none aside.
            Unlabeled pictures that are copies of these are left out.
        mean: mean of each channel, from 0 to 1, by which pictures are normalized; by default that of the
            pictures, or ImageNet's with --weights.
        std: standard deviation of each channel, likewise.
        clip_norm: greatest norm of either network's gradient; 0 turns clipping off. By default 0 for pooled_cnn and
            small_cnn, and 1 for other networks.
        validate_every: steps between validations; by default 5 % of all.
        changes: how pictures are changed before they are learned from.
        pad: with --randaugment: greatest shift of the weak view, in pixels.
        randaugment: use the paper's RandAugment, with --pad and --strong.*, instead of --changes.*. It takes Pillow's
            operations one by one, which is slower.
        class_names: found in labeled.
    """

    name: ClassVar[str] = "images"
    places: ClassVar[tuple[str, ...]] = ("labeled", "unlabeled", "val", "test")  # fields that are folders
    chosen: ClassVar[tuple[str, ...]] = (  # fields that the recipe chooses for itself where they are None
        *("steps", "image_size", "grey", "network_name", "warmup", "validate_every", "val_fraction", "mean", "std"),
    )
    sides: ClassVar[tuple[str, str]] = ("labeled", "unlabeled")  # pictures whose labels are right, and the others
    batch_of_few: ClassVar[str] = "labeled_batch"  # the field with the number of the first in a batch
    looks = True
    own: ClassVar[str] = "uda"
    settings: ClassVar[dict[str, Any]] = {
        "label_smoothing": 0.0,
        "uda_temperature": 0.5,
        "uda_threshold": 0.85,
        "uda_align": 0.5,
        "uda_start": OPEN,
        "uda_ramp": OPEN,
        "wait": OPEN,
        "warm_start": True,
        "student": OpenOptimizer(),
        "teacher": OpenOptimizer(),
    }

    labeled: Annotated[str, tyro.conf.arg(metavar="DIR")]
    unlabeled: Annotated[str, tyro.conf.arg(metavar="DIR")]
    val: Annotated[str | None, tyro.conf.arg(metavar="DIR"), SELECTED] = None
    test: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    minutes: Annotated[Open[Minutes], LONG] = OPEN
    steps: Annotated[Open[Steps], LONG] = OPEN
    image_size: Open[Annotated[int, Range(1, most=LARGEST_SIDE)]] = OPEN
    grey: tyro.conf.FlagConversionOff[Open[bool]] = OPEN
    network_name: Annotated[Open[str], tyro.conf.arg(name="network")] = OPEN
    warmup: Open[int] = OPEN
    validate_every: Open[int] = OPEN
    val_fraction: Annotated[Share | None, SELECTED] = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    changes: Changes = field(default_factory=Changes)
    randaugment: bool = False
    channels_last: bool = True
    labeled_batch: int = 32
    unlabeled_batch: int = 32
    clip_norm: Open[Weight] = OPEN
    ema_decay: float | None = 0.99
    finetune: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-2))
    class_names: tyro.conf.Suppress[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        require(self, (self.mean is None) == (self.std is None), "std", "a mean and a std, or neither")
        super().__post_init__()

    @property
    def complete(self) -> bool:
        of_method = all(getattr(self.method, name, 0) is not None for name in OF_METHOD)
        return of_method and all(getattr(self, name) is not None for name in self.chosen)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.class_names or self.trained_on()[0].classes

    # --------------------------------------------------------------------------------------- what is left open

    def for_network(self, name: str) -> Self:
        """The recipe with the rates and the clipping with which such a network trains, where none were given."""
        family = next((rate for stem, rate in RATES.items() if name.startswith(stem)), OTHER_RATE)
        clip = (NOT_CLIPPED if name.endswith("_cnn") else CLIPPED) if self.clip_norm is OPEN else self.clip_norm
        method = self.method.for_rate(PRETRAINED_RATE if self.weights else family)
        return dataclasses.replace(self, method=method, clip_norm=clip)

    def with_network(self, name: str) -> Self:
        """The recipe with another network; rates and clipping that are as where none were given become those of it."""
        changed, was = super().with_network(name), self.network_name
        if name == was or was is None:
            return changed
        own = {role: dataclasses.replace(one, lr=OPEN) for role, one in self.method.optimizers().items()}
        usual = dataclasses.replace(self.with_method(**own), clip_norm=OPEN).for_network(was)
        derived = {role: one for role, one in own.items() if getattr(self.method, role) == getattr(usual.method, role)}
        clip = OPEN if self.clip_norm == usual.clip_norm else self.clip_norm
        return dataclasses.replace(changed.with_method(**derived), clip_norm=clip).for_network(name)

    def by(self, method: str, seed: int | None = None) -> Self:
        made = super().by(method, seed)
        made = made if made.steps is OPEN else made.scheduled(made.steps)
        return made if self.network_name is OPEN else made.for_network(self.network_name)

    def scheduled(self, steps: int) -> Self:
        """The recipe with this number of steps, and with the phases that are a share of it."""
        shares = _shares(steps)
        own = ("warmup", "validate_every")
        missing: dict[str, Any] = {name: shares[name] for name in own if getattr(self, name) is None}
        return dataclasses.replace(self, steps=steps, method=self.method.settled(shares), **missing)

    def decided_by_minutes(self) -> tuple[str, ...]:
        if self.minutes is OPEN:
            return ()
        have = {**vars(self), **vars(self.method)}
        return "steps", *(name for name, value in _shares(self.steps).items() if name in have and have[name] == value)

    def warmup_after(self, wait: int) -> int:
        # A student that waits has fewer steps, and warms up over the same share of them.
        return round((self.steps - wait) / self.steps * self.warmup)

    def trainer_options(self) -> dict[str, Any]:
        return super().trainer_options() | {"clip_norm": self.clip_norm or None}

    # --------------------------------------------------------------------------------------------- the pictures

    def normalization(self) -> tuple[Sequence[float], Sequence[float]]:
        assert self.mean is not None  # settled
        assert self.std is not None
        return self.mean, self.std

    def views(self) -> Views:
        if self.randaugment:
            return super().views()
        if self.resized_crop:
            after = self.changes.after_crop()
            return Views(Identity(), after, after, ResizedCrop(self.image_size, flip=self.changes.mirror))
        strong = self.changes.strong()
        return Views(self.changes.weak(), strong, strong, finetuned=Sometimes(strong, FINETUNED_ON_CHANGED))

    def trained_on(self) -> tuple[LabeledFiles, Files]:
        """The pictures whose labels are right, and the others."""
        return scan_labeled(self.labeled), scan_unlabeled(self.unlabeled)

    def check_first(self) -> None:
        """Refuse what can be seen of the folders at once, before anything is measured."""
        labeled, unlabeled = self.trained_on()
        held_out = {name: Path(folder) for name, folder in (("validation", self.val), ("test", self.test)) if folder}
        refuse_errors([*find_nested(labeled, {"unlabeled": unlabeled.root} | held_out).values()])
        for name, folder in held_out.items():
            refuse_errors([*find_other_classes(labeled, scan_labeled(folder), name)])
        if not verify_files(labeled).skipped:  # else the files that are left out are listed first
            refuse_errors(check_folders(labeled))

    def task(self, say: Say | None = None, progress: bool = False, log: Path | None = None) -> Task:
        say, skipped, found = say or (lambda text: None), dict[str, str](), dict[str, Any]()
        for name in self.places:
            if (folder := getattr(self, name)) is not None:
                scan: Any = scan_unlabeled if name == "unlabeled" else scan_labeled
                found[name] = _listed(scan, folder, name, say, progress)
        found = {name: _sound(files, name, skipped, say, progress) for name, files in found.items()}
        few, many, val, test = (found.get(name) for name in (*self.sides, "val", "test"))
        assert few is not None
        assert many is not None
        with counting("comparing files", progress) as count:
            findings = check_folders(few, many, val, test, count)
        refuse_errors(findings)
        for finding in findings:
            say(f"note: {finding.message}")
        hashes = {name: hash_files(files) for name, files in found.items()}
        if val is None and self.val_fraction:
            train, aside = stratified_split(few.targets(), self.val_fraction, self.seed)
            few, val = few.keep(train.tolist()), few.keep(aside.tolist())
            with counting("comparing files", progress):
                many = apart(many, val, say)
        held_out = f"{len(val) if val else 'none'} for validation, {f'{len(test):,}' if test else 'none'} to test on"
        say(f"{self.spoken(few, many)}, {held_out}")
        # What describes stored labels has the hashes of their parts, or of the weights of a run.
        for name, place in self.method.labels_from.items():
            if place:
                content = read_plain(Path(place) / ("result.json" if name == "teacher" else DESCRIPTION))
                hashes[name] = hashlib.sha256(content).hexdigest()
        held: dict[str, Any] = {
            name: files and (self.images(files.paths(), log), files.targets(self.classes))
            for name, files in (("val", val), ("test", test))
        }
        names = {self.sides[0]: few, "validation": val, "test": test}
        listed = {name: list(files.names) if files else [] for name, files in names.items()}
        return Task(
            **self.batches(dataclasses.replace(self.parts(few, many, log), **held)),
            classes=self.classes,
            test_names=test.names if test else None,
            skipped=skipped,
            record={**listed, self.sides[1]: len(many), "hash": hashes},
        )

    def spoken(self, few: LabeledFiles, many: Files) -> str:
        return f"{len(few):,} labeled pictures of {spoken_classes(self.classes)}, {len(many):,} unlabeled"

    def parts(self, few: LabeledFiles, many: Files, log: Path | None) -> ImageParts:
        labels = few.targets(self.classes)
        return ImageParts(few=self.images(few.paths(), log), labels=labels, many=self.images(many.paths(), log))

    def images(self, paths: Iterable[str], log: Path | None) -> FileImages:
        """Each file is read when it is first drawn, and kept where all fit: training starts at once."""
        side = self.image_size
        images = FileImages([*paths], size=(side, side), mode=self.colors, log=log)
        fits = len(images) * side * side * images.shape[0] <= IN_MEMORY
        return images.cached() if fits and not self.resized_crop else images


def _shares(steps: int) -> dict[str, int]:
    """What is a share of the steps."""
    return {
        "wait": min(round(WAIT * steps), steps - 1),
        "warmup": round(WARMUP * steps),
        "uda_ramp": round(RAMP * steps),
        "uda_start": round(START * steps),
        "warm_steps": round(WARM * steps),
        "validate_every": max(1, round(steps / 20)),
    }


def _listed(scan: Callable[[str, Progress], FilesT], folder: str, name: str, say: Say, progress: bool) -> FilesT:
    with counting(f"listing {_word(name)} files", progress) as count:
        files = scan(folder, count)
    if files.passed_over:
        others = ", ".join(f"{count:,} with {suffix}" for suffix, count in sorted(files.passed_over.items()))
        say(f"{name}: files without the name of a picture are passed over: {others}")
    return files


def _sound(files: FilesT, name: str, skipped: dict[str, str], say: Say, progress: bool) -> FilesT:
    """Those that can be read; the others are added to ``skipped``, with the reason."""
    with counting(f"looking at {_word(name)} files", progress, len(files)) as count:
        verified = verify_files(files, progress=count)
    if verified.skipped:
        say(f"{name}: {len(verified.skipped):,} of {len(files):,} files are left out\n{verified.summary()}")
    if not verified.sound:
        raise MetaplError(f"none of the {len(files)} pictures in {files.root} can be read.")
    skipped.update({str(files.root / one): reason for one, reason in verified.skipped.items()})
    return files.keep(verified.sound) if verified.skipped else files


def apart(unlabeled: Files, val: Files, say: Say) -> Files:
    """The unlabeled pictures that are not set aside for validation too; nothing may be learned from those."""
    others = without_copies(unlabeled, val)
    if not others:
        raise MetaplError(
            f"all {len(unlabeled):,} unlabeled pictures in {unlabeled.root} are copies of labeled ones that are set "
            "aside for validation; expected others, or --val-fraction 0."
        )
    if len(others) < len(unlabeled):
        say(
            f"note: {len(unlabeled) - len(others):,} unlabeled pictures are left out: they are copies of labeled ones "
            "that are set aside for validation"
        )
    return others


def _word(folder: str) -> str:
    return "validation" if folder == "val" else folder


def spoken_classes(classes: Sequence[str]) -> str:
    """How many classes there are, and what the first few are called.

    >>> spoken_classes(["cat", "dog"])
    '2 classes (cat, dog)'
    """
    return f"{len(classes)} classes ({some(classes, most=6, longest=24)})"


def refuse_errors(findings: Sequence[Finding]) -> None:
    """Stop where the folders would spoil the training."""
    errors = [finding.message for finding in findings if finding.level == "error"]
    if errors:
        raise MetaplError("\n".join(errors))
