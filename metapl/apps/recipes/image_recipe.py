"""What recipes for pictures share: views, networks, losses, how long. Where the pictures come from is their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import tyro
from torch import Tensor, nn

from metapl.apps import networks
from metapl.apps.pictures.batches import EvaluationBatches, LabeledBatches, UnlabeledBatches
from metapl.apps.pictures.card import NetworkCard
from metapl.apps.pictures.input import LARGEST_SIDE, Input
from metapl.apps.pictures.store import Images
from metapl.apps.pictures.views.base import Chain, Identity, View
from metapl.apps.pictures.views.randaugment import CIFAR_OPERATIONS, SVHN_OPERATIONS, RandAugment
from metapl.apps.pictures.views.transforms import ResizedCrop, Weak
from metapl.apps.recipes.base import Recipe, Role
from metapl.apps.recipes.methods import OF_PICTURES
from metapl.apps.recipes.settings import Batch, Optimizer, require
from metapl.data.sampler import StepSampler
from metapl.errors import MetaplError
from metapl.runs.fields import Range
from metapl.training.options import MOST_WORKERS

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation that pretrained weights expect
EVALUATED_AT_ONCE, SAMPLED = 256, 2048  # pictures in a batch of an evaluation; unlabeled ones that the report looks at
NESTEROV = Optimizer(lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4, decay_norms=False)


@dataclass(frozen=True, kw_only=True)
class Strong:
    """The student's view: the weak one, then RandAugment, then a square cut out.

    Args:
        operations: number of operations that are drawn for each picture.
        magnitude: strength of each operation; 10 is usual, and 17 about the most.
        cutout: side in pixels of the square that is cut out.
        writing: for digits and letters: do not mirror, rotate or shift pictures sideways.
        again: mirror and shift once more afterwards, as the authors' code does on CIFAR-10.
        translate: greatest shift at magnitude 10, as a share of the side.
    """

    operations: int = 2
    magnitude: float = 8.0
    cutout: int = 8
    writing: bool = False
    again: bool = False
    translate: float = 1 / 8

    def view(self, weak: View) -> View:
        """RandAugment with one of the paper's two lists of operations, after the weak view."""
        operations = SVHN_OPERATIONS if self.writing else CIFAR_OPERATIONS
        options: Any = {"operations": operations, "translate": self.translate, "cutout": self.cutout}
        changed = RandAugment(self.operations, self.magnitude, **options)
        return Chain((weak, changed, weak) if self.again else (weak, changed))


@dataclass(frozen=True)
class ImageParts:
    """A recipe's pictures: a few with labels, many without, and pictures to select on and to report on."""

    few: Images
    labels: Tensor  # int64 (n,), of the few
    many: Images
    val: tuple[Images, Tensor] | None = None
    test: tuple[Images, Tensor] | None = None
    hidden: Tensor | None = None  # true labels of the many: for looking at pseudo-labels only
    known: tuple[Images, Tensor] | None = None  # few and many with their true, or given, labels: for the headroom
    given: Tensor | None = None  # labels of the many that may be wrong
    names: tuple[str, ...] = ()  # of the many


@dataclass(frozen=True)
class Views:
    """What is done to the pictures of a step."""

    weak: View  # to unlabeled pictures, for the network that labels them
    strong: View  # to the same pictures, for the network that learns these labels
    labeled: View
    crop: ResizedCrop | None = None  # the box that is cut out of a file before any of them
    finetuned: View | None = None  # labeled pictures in finetuning; None: as in training


@dataclass(frozen=True, kw_only=True)
class ImageRecipe(Recipe):
    """How a classifier of pictures is trained.

    The teacher labels weakly augmented pictures and learns from labeled ones, from consistency (UDA) and from the
    student's feedback; the student learns its labels on strongly augmented pictures.

    Args:
        image_size: side in pixels that every picture is resized to.
        grey: read pictures without colors.
        network_name: small_cnn, wide_resnet28_2, resnet18, 34, 50, ..., efficientnet_b0 to b7, vit_b_16, ..., or
            timm:NAME. After an unknown name, the error lists all names.
        weights: file with pretrained weights of the network.
        teacher_dropout: dropout rate of the teacher, or of the one network, if not the same.
        stochastic_depth: probability of dropping the last block, for networks that support it.
        channels_last: whether the networks are stored in the channels-last format, which is faster on tensor cores.
        compile: compile the networks with torch.compile.
        pad: greatest shift of the weak view, in pixels.
        resized_crop: cut a random part out of each picture, as is usual for photographs, instead of shifting it. Every
            step then reads its pictures from their files.
        strong: the student's view.
        clip_norm: greatest norm of either network's gradient; None turns clipping off.
        accumulate: number of parts that a batch is split into, to save memory.
        precision: bfloat16 runs the networks under autocast, which is faster where the device computes in it.
        finetune_batch: labeled pictures in a batch of finetuning, if not as in training.
        num_workers: number of processes that read pictures; it only changes the speed.
        device: auto takes a GPU if there is one.
    """

    known = OF_PICTURES
    settings: ClassVar[dict[str, Any]] = {"uda_ramp": 200, "student": NESTEROV, "teacher": NESTEROV}

    image_size: Annotated[int, Range(1, most=LARGEST_SIDE)] = 32
    grey: bool = False
    network_name: Annotated[str, tyro.conf.arg(name="network")] = "small_cnn"
    weights: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    teacher_dropout: float | None = None
    stochastic_depth: float = 0.0
    channels_last: bool = False
    compile: bool = False
    pad: Annotated[int, Range(0, most=LARGEST_SIDE)] = 4
    resized_crop: bool = False
    strong: Strong = field(default_factory=Strong)
    clip_norm: float | None = None
    accumulate: Batch = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    ema_decay: float | None = 0.995
    finetune_batch: Batch | None = None
    num_workers: Annotated[int, Range(0, most=MOST_WORKERS)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.finetune_batch is None or self.finetune_batch % self.accumulate == 0
        require(self, whole, "finetune_batch", f"a multiple of accumulate={self.accumulate}")
        self.strong.view(Identity())
        if self.complete:
            require(self, self.pad < self.image_size, "pad", f"less than the side of a picture, {self.image_size}")
            for role in ("teacher", "student"):
                self._architecture(role, num_classes=2)

    # ------------------------------------------------------------------------------------------------------ the data

    def views(self) -> Views:
        if self.resized_crop:
            # The crop mirrors too, so nothing is left for the weak view to do.
            crop = ResizedCrop(self.image_size, flip=not self.strong.writing)
            return Views(Identity(), self.strong.view(Identity()), Identity(), crop)
        weak = Weak(self.pad, flip=not self.strong.writing)
        return Views(weak, self.strong.view(weak), weak)

    def batches(self, pictures: ImageParts) -> dict[str, Any]:
        """The sources of a :class:`~metapl.apps.recipes.Task`."""
        views, few, many, seed = self.views(), pictures.few, pictures.many, self.seed

        def labeled(images: Images, labels: Tensor, size: int, stream: int, seed: int, view: View) -> LabeledBatches:
            sampler = StepSampler(len(images), size, seed=self.seed, stream=stream)
            return LabeledBatches(images, labels, sampler, view, seed, crop=views.crop)

        def looked_at(images: Images, labels: Tensor) -> EvaluationBatches:
            return EvaluationBatches(images, labels, EVALUATED_AT_ONCE)

        known, finetuned = pictures.known, views.finetuned or views.labeled
        sampler = StepSampler(len(many), self.unlabeled_batch, seed=seed, stream=1)
        some = torch.arange(min(len(many), SAMPLED))
        size = self.finetune_batch or self.labeled_batch
        return {
            "labeled": labeled(few, pictures.labels, self.labeled_batch, 0, seed, views.labeled),
            "unlabeled": UnlabeledBatches(many, sampler, views.weak, views.strong, seed, crop=views.crop),
            "finetuning": labeled(few, pictures.labels, size, 2, seed + 1, finetuned),
            "validation": pictures.val and looked_at(*pictures.val),
            "test": pictures.test and looked_at(*pictures.test),
            "truth": None if pictures.hidden is None else looked_at(many.select(some), pictures.hidden[some]),
            "everything": known and labeled(*known, self.labeled_batch, 0, seed, views.labeled),
        }

    @property
    def colors(self) -> Literal["L", "RGB"]:
        return "L" if self.grey else "RGB"

    @property
    def input(self) -> Input:
        return Input(channels=1 if self.grey else 3, size=self.image_size)

    # -------------------------------------------------------------------------------------------------- the networks

    def card(self, role: Role, title: str) -> NetworkCard:
        mean, std = map(tuple, self.normalization())
        architecture, last = self._architecture(role, len(self.classes)), self.channels_last
        return NetworkCard(
            title=title, input=self.input, architecture=architecture, mean=mean, std=std, channels_last=last
        )

    def _architecture(self, role: Role, num_classes: int) -> networks.Architecture:
        own = self.teacher_dropout is not None and role == "teacher"
        dropout = self.teacher_dropout if own else self.dropout
        return networks.Architecture(
            name=self.network_name,
            num_classes=num_classes,
            dropout=dropout or 0.0,
            stochastic_depth=self.stochastic_depth,
            in_channels=1 if self.grey else 3,
            image_size=self.image_size,
        )

    def network(self, role: Role = "student") -> nn.Module:
        """The teacher or the student with fresh or pretrained weights, normalizing pictures in [0, 1]."""
        network = self._architecture(role, len(self.classes)).create(self.weights)
        normalized = networks.normalized(network, *self.normalization())
        return normalized.to(memory_format=torch.channels_last) if self.channels_last else normalized

    def with_network(self, name: str) -> Self:
        changed: dict[str, Any] = {"network_name": name, "weights": None}  # a file is of one network
        return self if name == self.network_name else dataclasses.replace(self, **changed)

    def at_size(self, size: int) -> Self:
        if size <= (self.image_size or 0):
            raise MetaplError(
                f"--finetune-size {size}: expected more pixels than the {self.image_size} of --image-size, which the "
                "student is trained on."
            )
        if self.finetune_steps < 1:
            raise MetaplError(f"--finetune-size {size} was given with --finetune-steps 0; expected 1 step or more.")
        changed: dict[str, Any] = {"image_size": size}
        larger = dataclasses.replace(self, **changed)
        _ = self.classes  # some recipes read their data for them, which must not be done on the meta device
        with torch.device("meta"):
            own, other = (
                {name: value.shape for name, value in sized.network("teacher").state_dict().items()}
                for sized in (self, larger)
            )
        if own != other:
            raise MetaplError(
                f"--finetune-size {size}: {self.network_name} is built for pictures of one size; expected a network "
                "that takes any, such as small_cnn, a resnet or an efficientnet."
            )
        return larger

    def normalization(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation that pictures are normalized by, of each channel in [0, 1]."""
        channels = 1 if self.grey else 3
        return IMAGENET if self.weights and not self.grey else ((0.5,) * channels, (0.25,) * channels)

    # -------------------------------------------------------------------------------------------------- the training

    def finetune_options(self) -> dict[str, Any]:
        """A rate that stays: section 2.3 of the paper."""
        return {**super().finetune_options(), "schedule": "constant"}

    def trainer_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("clip_norm", "accumulate", "precision", "compile")}

    def torch_device(self) -> torch.device:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise MetaplError("device=cuda was asked for, and PyTorch sees no GPU; use --device auto or cpu.")
        return torch.device("cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu")


def whole(path: str | None) -> str | None:
    """A path as it can be stored; None stays None."""
    return None if path is None else str(Path(path).expanduser().resolve())
