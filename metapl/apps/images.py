"""A folder of pictures with few labels, and one with many pictures without.

``metapl train images``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro
from torch import nn

from metapl.apps import networks
from metapl.apps.methods import (
    TITLES,
    Data,
    EntMin,
    FixMatch,
    Mpl,
    PseudoLabels,
    ReducedMpl,
    Supervised,
    Uda,
)
from metapl.apps.methods import Feedback as Fed
from metapl.apps.network_weights import parameter_groups
from metapl.apps.pictures import Finding, check_folders, scan_labeled, scan_unlabeled, verify_files
from metapl.apps.pictures.batches import (
    EvaluationBatches,
    FileImages,
    LabeledBatches,
    UnlabeledBatches,
)
from metapl.apps.pictures.folders import Files, LabeledFiles, hash_files, without_copies
from metapl.apps.pictures.input import LARGEST_SIDE, Input, NetworkCard
from metapl.apps.pictures.splits import stratified_split
from metapl.apps.pictures.views.base import Chain, Identity, View
from metapl.apps.pictures.views.transforms import (
    Affine,
    Color,
    Flip,
    Hole,
    Recolor,
    ResizedCrop,
    Sometimes,
)
from metapl.apps.progress import count_bar
from metapl.apps.settings import (
    Batch,
    Fitting,
    Flat,
    Hidden,
    Role,
    Share,
    Switch,
    replaced,
    require,
    unset,
)
from metapl.apps.tuned_networks import Normalized, Tuned
from metapl.data.steps import StepSampler
from metapl.errors import MetaplError
from metapl.errors import few as some
from metapl.runs.fields import Range, check_fields
from metapl.training import Say

IN_MEMORY = (
    2**30
)  # bytes of decoded pictures that are kept; of larger folders, files are read each time they are drawn
EVALUATED_AT_ONCE = 256  # pictures in a batch of an evaluation

# What is done to pictures, all with the same strengths: greatest rotation, shift (share of the
# side), zoom, shear; changes of brightness, contrast, saturation; of the hue, where colors do not
# tell classes apart; side of the hole.
MOVED, COLORED, HUE, HOLE = (20.0, 0.125, 1.33, 10.0), (0.4, 0.4, 0.4), 0.1, 0.5

# Share of the pictures that are changed in finetuning; the others are as they will be when they are
# predicted. Changes may take away what a class is told by: a hole covers one of the things to be
# counted.
FINETUNED_ON_CHANGED = 0.5

# Learning rates of AdamW by the beginning of a network's name, and with pretrained weights; that of
# finetuning, by SGD.
RATES = {
    "pooled_cnn": 1e-2,
    "small_cnn": 4e-3,
    "wide_resnet": 1e-3,
    "resnet": 1e-3,
    "efficientnet": 3e-4,
    "vit": 3e-4,
}
OTHER_RATE, PRETRAINED_RATE, FINETUNED_AT = 5e-4, 2e-4, 1e-2
TUNING_RATES = {"head": 1e-3, "lora": 1e-3, "all": PRETRAINED_RATE}
WEIGHT_DECAY, CLIPPED = 0.05, 1.0

METHODS: dict[str, Any] = {
    "uda": Uda(),
    "fixmatch": FixMatch(),
    "ent_min": EntMin(),
    "supervised": Supervised(),
    "pseudo_labels": PseudoLabels(),
    "mpl": Mpl(),
    **{kind: Mpl(feedback=Fed(feedback=kind)) for kind in TITLES if kind != "whole"},
    "reduced_mpl": ReducedMpl(),
    "reduced_none": ReducedMpl(feedback=Fed(feedback="none")),
}
COMPARED = ("uda", "mpl", "none", "supervised", "pseudo_labels")

Folder = Annotated[str, tyro.conf.arg(metavar="DIR")]
OtherFolder = Annotated[str | None, unset("DIR")]
Minutes = Annotated[Annotated[float, Range(above=0, most=60 * 24 * 366)] | None, unset()]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What a picture becomes, how it is changed, and the network. What is None is chosen by looking at some pictures.

    Args:
        network: pooled_cnn, resnet18, vit_b_16, timm:NAME.
        weights: pretrained; imagenet downloads them.
        backbone: none, auto, or one that is here.
        tuning: of it: head, lora or all; by default lora.
        lora_rank: of the changes, 4 to 16.
        image_size: side that pictures are resized to.
        grey: read pictures without colors.
        mirror: mirror half of them; not for letters.
        recolor: exchange colors, and light and dark.
        crop: learn from random parts of pictures.
        dropout: dropout rate of the networks.
        stochastic_depth: of dropping the last block.
    """

    network: Annotated[str | None, unset("NAME")] = None
    weights: Annotated[str | None, unset("FILE")] = None
    backbone: Annotated[str, unset("NAME|FILE")] = "none"
    tuning: Annotated[Literal["head", "lora", "all"] | None, unset("HOW")] = None
    lora_rank: Annotated[int, Range(4, most=16)] = 8
    image_size: Annotated[Annotated[int, Range(1, most=LARGEST_SIDE)] | None, unset("PIXELS")] = (
        None
    )
    grey: tyro.conf.FlagConversionOff[Annotated[bool | None, unset()]] = None
    mirror: Switch = False
    recolor: tyro.conf.FlagConversionOff[Annotated[bool | None, unset()]] = None
    crop: Switch = False
    dropout: Share = 0.0
    stochastic_depth: Share = 0.0
    mean: Hidden[tuple[float, ...] | None] = None
    std: Hidden[tuple[float, ...] | None] = None
    weights_sha256: Hidden[str | None] = None  # of the weights, once they were found

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            self, self.tuning is None or self.backbone != "none", "tuning", "--backbone beside it"
        )
        for noise in ("dropout", "stochastic_depth"):
            free = self.backbone == "none" or self.tuning == "all" or not getattr(self, noise)
            require(self, free, noise, "--tuning all, for what is frozen has no noise")
        if self.network is not None:
            self.architecture(classes=2)

    @property
    def input(self) -> Input:
        assert self.image_size is not None  # choose_settings gave it
        return Input(channels=1 if self.grey else 3, size=self.image_size)

    def views(self) -> dict[str, Any]:
        """How the pictures of a step are seen: unlabeled ones by who labels and by who learns,
        labeled ones, and in finetuning; ``crop`` draws the box that is cut out of a file before."""
        color = Color(*COLORED, HUE if self.recolor else 0.0)
        colored = (color, Hole((HOLE / 5, HOLE)), *((Recolor(),) if self.recolor else ()))
        if self.crop:
            changed: View = Chain(colored)
            crop = ResizedCrop(self.input.size, flip=self.mirror)
            return {
                "weak": Identity(),
                "strong": changed,
                "labeled": changed,
                "finetuned": changed,
                "crop": crop,
            }

        def moved(share: float) -> tuple[View, ...]:
            degrees, shift, zoom, shear = MOVED
            zoom = math.exp(share * math.log(zoom))
            affine = Affine(share * degrees, share * shift, (1 / zoom, zoom), share * shear)
            return (*((Flip(),) if self.mirror else ()), affine)

        # Labels are given to what has a quarter of the movement, and nothing else but mirroring.
        weak, strong = Chain(moved(0.25)), Chain((*moved(1.0), *colored))
        finetuned = Sometimes(strong, FINETUNED_ON_CHANGED)
        return {
            "weak": weak,
            "strong": strong,
            "labeled": strong,
            "finetuned": finetuned,
            "crop": None,
        }

    def images(self, paths: Iterable[str], log: Path | None) -> FileImages:
        """Each file is read when it is first drawn, and kept where all fit.

        Training starts at once.
        """
        side = self.input.size
        images = FileImages([*paths], size=(side, side), mode="L" if self.grey else "RGB", log=log)
        fits = len(images) * side * side * images.shape[0] <= IN_MEMORY
        return images.cached() if fits and not self.crop else images

    def architecture(self, classes: int) -> networks.Architecture:
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
        """The network with fresh or pretrained weights, normalizing pictures in [0, 1]."""
        assert self.mean is not None  # choose_settings gave it
        assert self.std is not None
        architecture = self.architecture(classes)
        module = architecture.create(self.weights)
        if self.tuning is None or self.weights is None:
            network = Normalized(module, self.mean, self.std)
        else:
            how: Any = {"tuning": self.tuning, "rank": self.lora_rank}
            network = Tuned(module, self.mean, self.std, heads=architecture.heads(module), **how)
        return network.to(memory_format=torch.channels_last)

    @property
    def rate(self) -> float:
        """The learning rate with which such a network trains."""
        if self.weights:
            return TUNING_RATES[self.tuning or "all"]
        return next(
            (rate for stem, rate in RATES.items() if str(self.network).startswith(stem)), OTHER_RATE
        )


class OfPictures:
    """What trainings on folders of pictures have in common."""

    name: ClassVar[str]
    places: ClassVar[tuple[str, ...]]  # fields that are folders
    few_and_many: ClassVar[
        tuple[str, str]
    ]  # those of the pictures whose labels are right, and of the others
    batch_of_few: ClassVar[str]
    said: ClassVar[str]  # what there is to train on, in words
    known: ClassVar[str] = "labeled pictures"  # those whose labels are right, in words
    threads: ClassVar[int | None] = None  # those of the process

    pictures: Pictures
    fitting: Fitting
    val_fraction: float | None  # of each class, set aside for validation
    classes: tuple[str, ...]  # once they were found

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def input(self) -> Input:
        return self.pictures.input

    def scan(self, name: str) -> Any:
        """The files of a folder by the name of its flag."""
        return (scan_unlabeled if name == "unlabeled" else scan_labeled)(getattr(self, name))

    def check_first(self) -> None:
        """Refuse what can be seen of the folders at once, before anything is measured."""
        raise NotImplementedError

    def sources(self, few: LabeledFiles, many: Any, log: Path | None) -> dict[str, Any]:
        """What is learned from: fields of :class:`Data`."""
        raise NotImplementedError

    def data(self, say: Say, progress: bool, log: Path | None) -> Data:
        # 1. The files: listed, looked at, and compared; what would be learned from and measured on
        # is refused.
        found, skipped = dict[str, Any](), dict[str, str]()
        for name in (name for name in self.places if getattr(self, name) is not None):
            word = "validation" if name == "val" else name
            files = self.scan(name)
            if files.passed_over:
                others = ", ".join(
                    f"{count:,} with {suffix}"
                    for suffix, count in sorted(files.passed_over.items())
                )
                say(f"{name}: files without the name of a picture are passed over: {others}")
            with count_bar(f"looking at {word} files", progress, len(files)) as count:
                verified = verify_files(files, progress=count)
            if verified.skipped:
                say(
                    f"{name}: {len(verified.skipped):,} of {len(files):,} files are left "
                    f"out\n{verified.summary()}"
                )
            if not verified.sound:
                raise MetaplError(f"none of the {len(files)} pictures in {files.root} can be read.")
            skipped |= {str(files.root / one): reason for one, reason in verified.skipped.items()}
            found[name] = files.keep(verified.sound) if verified.skipped else files
        few, many = (found[name] for name in self.few_and_many)
        val, test = found.get("val"), found.get("test")
        compare_files(few, many, val, test, say, progress)
        hashes = {name: hash_files(files) for name, files in found.items()}
        # 2. Some are set aside to select on; nothing may be learned from copies of those.
        if val is None and self.val_fraction:
            train, aside = stratified_split(few.targets(), self.val_fraction, self.fitting.seed)
            few, val = few.keep(train.tolist()), few.keep(aside.tolist())
            with count_bar("comparing files", progress):
                many = apart(many, val, say)
        classes = f"{len(self.classes)} classes ({some(self.classes, most=6, longest=24)})"
        what = self.said.format(few=len(few), many=len(many), classes=classes)
        say(
            f"{what}, {len(val) if val else 'none'} for validation, "
            f"{f'{len(test):,}' if test else 'none'} to test on"
        )
        # 3. What is learned from, and measured on.
        listed, measured = (
            {self.few_and_many[0]: few, "validation": val, "test": test},
            dict[str, Any](),
        )
        for name, files in (("validation", val), ("test", test)):
            if files is not None:
                images, labels = (
                    self.pictures.images(files.paths(), log),
                    files.targets(self.classes),
                )
                measured[name] = EvaluationBatches(images, labels, EVALUATED_AT_ONCE)
        names = {name: list(files.names) if files else [] for name, files in listed.items()}
        return Data(
            **self.sources(few, many, log),
            **measured,
            classes=self.classes,
            test_names=test.names if test else None,
            skipped=skipped,
            record={**names, self.few_and_many[1]: len(many), "hash": hashes},
        )

    def network(self) -> nn.Module:
        return self.pictures.build(len(self.classes))

    def card(self, title: str) -> NetworkCard:
        pictures, made = self.pictures, self.pictures.architecture(len(self.classes))
        normalization: Any = {"mean": pictures.mean, "std": pictures.std}
        return NetworkCard(
            title=title, input=self.input, architecture=made, channels_last=True, **normalization
        )

    def optimizer(
        self, role: Role, module: nn.Module, lr: float | None = None
    ) -> torch.optim.Optimizer:
        groups = parameter_groups(module, WEIGHT_DECAY)
        return torch.optim.AdamW(
            groups, lr=(self.fitting.lr if role == "teacher" else lr) or self.pictures.rate
        )

    def finetuner(self, module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameter_groups(module, 0.0), lr=FINETUNED_AT)

    def trainer_options(self) -> dict[str, Any]:
        clip = (
            None if str(self.pictures.network).endswith("_cnn") else CLIPPED
        )  # deeper ones may diverge at first
        return {
            "clip_norm": clip,
            "accumulate": self.fitting.accumulate,
            "precision": self.fitting.precision,
        }

    def finetuning(self) -> dict[str, Any]:
        """A rate that stays, as Meta Pseudo Labels finetunes its students of small benchmarks."""
        return self.fitting.finetuning(schedule="constant")


@dataclass(frozen=True, kw_only=True)
class Images(OfPictures):
    """Train on pictures: a few of them in one folder a class, many without labels.

    What is not given is chosen by looking at the pictures, and by how many steps fit into the
    minutes.

    Args:
        labeled: labeled pictures, in a folder a class.
        unlabeled: a folder, or a .txt of paths.
        val: to select on, like --labeled.
        test: to report on, like --labeled.
        unlabeled_batch: unlabeled pictures in a batch.
        minutes: for as many steps as fit; by default 5.
    """

    name: ClassVar[str] = "images"
    places: ClassVar[tuple[str, ...]] = ("labeled", "unlabeled", "val", "test")
    few_and_many: ClassVar[tuple[str, str]] = ("labeled", "unlabeled")
    batch_of_few: ClassVar[str] = "labeled_batch"
    said: ClassVar[str] = "{few:,} labeled pictures of {classes}, {many:,} unlabeled"

    labeled: Folder
    unlabeled: Folder
    val: OtherFolder = None
    test: OtherFolder = None
    unlabeled_batch: Batch = 32
    minutes: Minutes = None
    pictures: Flat[Pictures] = field(default_factory=Pictures)
    fitting: Flat[Fitting] = field(default_factory=lambda: Fitting(ema_decay=0.99))
    val_fraction: Hidden[float | None] = None
    classes: Hidden[tuple[str, ...]] = ()

    def check_first(self) -> None:
        found: list[Any] = [
            None if getattr(self, name) is None else self.scan(name) for name in self.places
        ]
        refuse_errors(check_folders(*found, copies=False))

    def sources(self, few: LabeledFiles, many: Files, log: Path | None) -> dict[str, Any]:
        """The pictures of step t, and how they are seen, follow from the seed and t."""
        fitting, views = self.fitting, self.pictures.views()
        crop = views["crop"]
        labeled, unlabeled = (self.pictures.images(files.paths(), log) for files in (few, many))
        labels, seed = few.targets(self.classes), fitting.seed

        def drawn(files: Files, size: int, stream: int) -> StepSampler:
            return StepSampler(len(files), size, seed=seed, stream=stream)

        of_few, of_many = drawn(few, fitting.labeled_batch, 0), drawn(many, self.unlabeled_batch, 1)
        last = drawn(few, fitting.labeled_batch, 2)
        return {
            "labeled": LabeledBatches(labeled, labels, of_few, views["labeled"], seed, crop=crop),
            "unlabeled": UnlabeledBatches(
                unlabeled, of_many, views["weak"], views["strong"], seed, crop=crop
            ),
            "finetuning": LabeledBatches(
                labeled, labels, last, views["finetuned"], seed + 1, crop=crop
            ),
        }

    def with_network(self, name: str) -> Images:
        """With another network of the same pictures, and its rate where none was given.

        Weights are of one network.
        """
        if name == self.pictures.network:
            return self
        if self.pictures.backbone != "none":
            raise MetaplError(
                f"--backbone is of one network, and {name} is another one; leave --networks out."
            )
        found: Images = replaced(self, network=name, weights=None)
        usual = self.fitting.lr == self.pictures.rate
        return replaced(found, lr=found.pictures.rate) if usual else found

    def at_size(self, size: int) -> Images:
        """With larger pictures, where the network takes those."""
        if size <= (self.pictures.image_size or 0):
            raise MetaplError(
                f"--finetune-size {size}: expected more pixels than the {self.pictures.image_size} "
                "of --image-size, which the student is trained on."
            )
        if self.fitting.finetune_steps < 1:
            raise MetaplError(
                f"--finetune-size {size} was given with --finetune-steps 0; expected 1 step or "
                "more."
            )
        larger: Images = replaced(self, image_size=size)
        with torch.device("meta"):
            states = (
                replaced(sized, weights=None).network().state_dict() for sized in (self, larger)
            )
            own, other = ({name: value.shape for name, value in state.items()} for state in states)
        if own != other:
            raise MetaplError(
                f"--finetune-size {size}: {self.pictures.network} is built for pictures of one "
                "size; expected a network that takes any, such as small_cnn, a resnet or an "
                "efficientnet."
            )
        return larger


# ---------------------------------------------------------------------------------------- the files


def compare_files(few: Any, many: Any, val: Any, test: Any, say: Say, progress: bool) -> None:
    """Refuse pictures that are learned from and measured on.

    Say what else there is to be said of the folders.
    """
    with count_bar("comparing files", progress) as count:
        findings = check_folders(few, many, val, test, count)
    refuse_errors(findings)
    for finding in findings:
        say(f"note: {finding.message}")


def apart(unlabeled: Files, val: Files, say: Say) -> Files:
    """The unlabeled pictures that are not set aside for validation too.

    Nothing may be learned from those.
    """
    others = without_copies(unlabeled, val)
    if not others:
        raise MetaplError(
            f"all {len(unlabeled):,} unlabeled pictures in {unlabeled.root} are copies of labeled "
            "ones that are set aside for validation; expected others, or pictures to select on "
            "with --val."
        )
    if len(others) < len(unlabeled):
        say(
            f"note: {len(unlabeled) - len(others):,} unlabeled pictures are left out: they are "
            "copies of labeled ones that are set aside for validation"
        )
    return others


def refuse_errors(findings: Sequence[Finding]) -> None:
    """Stop where the folders would spoil the training."""
    errors = [finding.message for finding in findings if finding.level == "error"]
    if errors:
        raise MetaplError("\n".join(errors))
