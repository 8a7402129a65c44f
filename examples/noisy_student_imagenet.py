"""Noisy Student on ImageNet and SVHN: a teacher labels, and a noisy student learns its labels.

    python examples/noisy_student_imagenet.py b0 --root data/ \\
        --unlabeled pictures/ --out runs/b0
    torchrun --nproc-per-node=8 examples/noisy_student_imagenet.py l2 \\
        --root data/ --unlabeled pictures/ --mesh.shard 8 \\
        --select-by runs/b0/selection/selected --out runs/l2
    # a ready teacher labels, and is not trained again
    python examples/noisy_student_imagenet.py b2 --root data/ \\
        --unlabeled pictures/ --teacher runs/l2 --out runs/b2-l2
    # one network, from labels alone
    python examples/noisy_student_imagenet.py l2 --networks efficientnet_l2 \\
        --image-sizes 475 --finetune-sizes 800 --root data/ --out runs/l2-plain
    # SVHN's core and extra pictures, as Table 17
    python examples/noisy_student_imagenet.py svhn --root data/ --out runs/svhn
    # all that a run will do, and who says which value
    python examples/noisy_student_imagenet.py l2 --dry-run
    python examples/noisy_student_imagenet.py --sources

Rows b0 to b7 are the study of model sizes (Figure 2, Table 9): teacher and student of one network.
l2 is the chain of Table 7: B7, then three times L2 with ratios of 14, 14 and 28. resnet50 is Table
16, svhn Table 17.

Unlabeled pictures are selected once, by a network of its own (--filter-network, the paper's
EfficientNet-B0); later teachers label the same pictures anew. --select-by STORE takes a selection
that another run made, and --select-by each lets every teacher select. The paper's 300 million
pictures are not public: --unlabeled is a folder such as YFCC100M; without it, --labels-per-class N
leaves labels to so many pictures of ImageNet, and the others lose theirs.

Every value is a flag, for all networks of a run, or one for each: --magnitudes 15 27 --epochs 700
350. --dry-run says all that a run will do: who selects, each network's steps, noise, labels and
stages of training. --sources prints of every value whether it is the paper's, the authors'
published code's, or ours. --steps N shortens every phase. A run leaves the weights of each network,
which `robustness.py` reads, rounds/, metrics.jsonl and result.json, whose test accuracies were
measured once a network; and in delivered/ a run that `metapl predict`, `evaluate` and `export`
read. One that was stopped goes on with --resume.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from picture_sets import (
    PictureSet,
    build_network,
    deliver,
    load_pictures,
    save_weights,
    split_labels,
)
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

import metapl
from metapl.data import StepSampler
from metapl.data.draws import fold_in
from metapl.distributed import Mesh, shard
from metapl.errors import MetaplError, few
from metapl.execution.batch import digest
from metapl.labels.selection import check_interval, select
from metapl.labels.store import DIGEST_BYTES, LabelStore, LabelWriter
from metapl.machine import device as device_of
from metapl.metrics import Evaluation, evaluate_logits, predict_logits
from metapl.metrics.predictions import batches_of
from metapl.networks import Architecture
from metapl.noisy_student import (
    Chosen,
    LossesApart,
    Noised,
    PseudoLabeledBatches,
    end_matched,
    freeze_first_layers,
)
from metapl.pictures import (
    CIFAR_OPERATIONS,
    SVHN_OPERATIONS,
    Chain,
    EvaluationBatches,
    FileImages,
    Identity,
    LabeledBatches,
    RandAugment,
    ResizedCrop,
    View,
    Weak,
    scan_unlabeled,
)
from metapl.pictures.batches import Images, in_unit_range
from metapl.pictures.folders import digest as file_digest
from metapl.problems import NoisyStudentLoss
from metapl.problems.losses import CrossEntropy
from metapl.processes import Processes, joined
from metapl.run_folder import EndedRun

# Pictures that are labeled in one pass. The stores of several processes are cut between such
# passes, so that they hold the same bytes as that of one process.
LABELED_AT_ONCE = 256

# The number that stands for the network that selects, where rounds are counted from 0.
FILTER = 1_000_000

IMAGENET_PICTURES = 1_281_167
SVHN_PICTURES = 73_257


# ------------------------------------------------------------------------------------- the settings


# What changes a student, or its unlabeled pictures, while it learns a teacher's labels.
UnlabeledNoise = Literal["all", "standard", "model", "none"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run does. A row below has a value for everything that has no default here."""

    root: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""  # as torchvision calls it
    out: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    seed: int = 0
    resume: bool = False
    dry_run: bool = False  # say all that a run would do, and read nothing

    data: Literal["imagenet", "svhn"]
    # A folder of other pictures: all of ImageNet then keeps its labels.
    unlabeled: str | None = None
    # Of ImageNet, without --unlabeled; the other pictures of it are unlabeled.
    labels_per_class: int | None = None
    validation: int  # labeled pictures that are selected on, and not trained on

    # Of each network: the first teacher, then the student of each round. Where a tuple has fewer
    # values than there are networks, its last value serves on. One network learns from the labels
    # alone.
    networks: tuple[str, ...]
    # A finished run. The network that it delivers is the first teacher, in the place of the first
    # of --networks, and is not trained again.
    teacher: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    image_sizes: tuple[int, ...]
    dropouts: tuple[float, ...]
    magnitudes: tuple[float, ...]  # of two operations of RandAugment, of 10; 0: none of them
    epochs: tuple[float, ...]  # passes over the labeled pictures
    ratios: tuple[int, ...]  # of each student: unlabeled pictures in a batch for each labeled one
    stochastic_depth: float  # of the last block
    translate: float  # greatest shift at magnitude 10, in pixels
    cutout: int  # side of the grey square, in pixels; 0: none

    # So many steps a network instead of its epochs; finetuning and warmup shrink in proportion.
    steps: int | None = None
    labeled_batch: int
    lr: float  # for 2,048 labeled pictures; it follows the labeled batch
    warmup_epochs: float
    weight_decay: float
    label_smoothing: float
    ema_decay: float

    select_by: Annotated[str, tyro.conf.arg(metavar="once|each|STORE")] = "once"
    filter_network: str | None  # which network selects once; None: the first teacher
    filter_epochs: float
    threshold: float
    at_most: float | None = None  # the upper bound of an interval of confidence (Figure 5)
    per_class: int | None
    balance: tyro.conf.FlagConversionOff[bool] = True
    share: float | None = None  # a uniform share of the selected pictures (Table 10)
    count: int | None = None  # so many of them, drawn uniformly (Figure 5)
    # Labels are of augmented pictures, by a network with dropout and stochastic depth (Table 6).
    noisy_teacher: bool = False

    labels: Literal["soft", "hard"] = "soft"
    loss: Literal["mean", "two_means"] = "mean"
    unlabeled_noise: tuple[UnlabeledNoise, ...] = ("all",)  # of each student
    training: Literal["joint", "pretrain", "pretrain_finetune"] = "joint"  # Table 13
    # Of finetuning on labels after pretraining. Several lengths all begin with the pretrained
    # weights, and the held-out pictures choose one.
    stage_epochs: tuple[float, ...] = (10.0,)
    stage_lr: float = 0.01
    warm_start: bool = False  # students begin with the teacher's weights (Table 15)
    warm_epochs: float | None = None

    # FixRes, of each network: side of the pictures that it is finetuned and tested on; 0: none.
    finetune_sizes: tuple[int, ...]
    finetune_epochs: float
    finetune_batch: int = 512
    finetune_lr: float = 1e-5
    frozen: float = 0.5  # share of the layers that are frozen then

    mesh: Mesh = field(default_factory=Mesh)  # the processes that torchrun has started
    # How many of them share the statistics of batch norms; None: all.
    batch_norm_ranks: int | None = None
    accumulate: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = False
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    num_workers: int = 8
    log_every: int = 100
    validate_every: int = 5_000
    save_every: int = 5_000


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network of a run: how it is built, what noise its pictures get, and how long it trains."""

    name: str
    image_size: int
    epochs: float
    dropout: float
    stochastic_depth: float
    magnitude: float
    ratio: int
    unlabeled_noise: UnlabeledNoise
    finetune_size: int
    channels_last: bool
    device: str


def networks_of(c: Settings) -> list[Network]:
    """Return the networks of the rounds, the first teacher's first."""
    return [network_of(c, name, number) for number, name in enumerate(c.networks)]


def network_of(c: Settings, name: str, number: int) -> Network:
    """Return a network with the settings of the one of this number.

    The first teacher has no unlabeled pictures, and what is said of students begins with the first
    of these.
    """
    student = max(0, number - 1)
    return Network(
        name=name,
        image_size=c.image_sizes[min(number, len(c.image_sizes) - 1)],
        epochs=c.epochs[min(number, len(c.epochs) - 1)],
        dropout=c.dropouts[min(number, len(c.dropouts) - 1)],
        stochastic_depth=c.stochastic_depth,
        magnitude=c.magnitudes[min(number, len(c.magnitudes) - 1)],
        ratio=c.ratios[min(student, len(c.ratios) - 1)] if number else 0,
        unlabeled_noise=c.unlabeled_noise[min(student, len(c.unlabeled_noise) - 1)],
        finetune_size=c.finetune_sizes[min(number, len(c.finetune_sizes) - 1)],
        channels_last=c.channels_last,
        device=str(device_of(c.device)),
    )


def filter_of(c: Settings) -> Network | None:
    """Return the network that selects for all rounds, where that is none of theirs."""
    is_first_teacher = c.filter_network == c.networks[0] and c.teacher is None
    if len(c.networks) < 2 or c.select_by != "once" or c.filter_network is None or is_first_teacher:
        return None
    network = network_of(c, c.filter_network, number=0)
    network = dataclasses.replace(network, epochs=c.filter_epochs, finetune_size=0)
    if c.data == "svhn" or network.name not in AS_PUBLISHED:
        return network
    image_size, dropout, magnitude = AS_PUBLISHED[network.name]
    return dataclasses.replace(network, image_size=image_size, dropout=dropout, magnitude=magnitude)


# ----------------------------------------------------------------------------------------- the rows

Source = Literal["paper", "code", "ours"]

# B0 and B1 have RandAugment by the paper, as all of its EfficientNets, and by the authors' code the
# standard augmentation alone. Nobody says a magnitude of theirs: this is the least of the code's.
OUR_MAGNITUDE = 6.0

# The side of the pictures, the rate of dropout and RandAugment's magnitude of each network. All but
# the magnitudes of B0 and B1 are of the authors' code, whose magnitudes are of 10. The paper has
# the same for B7 and L2, and RandAugment's 9 for ResNet-50, and does not say of what scale. What
# ResNet-50 has of dropout nobody says.
AS_PUBLISHED: dict[str, tuple[int, float, float]] = {
    "efficientnet_b0": (224, 0.2, OUR_MAGNITUDE),
    "efficientnet_b1": (240, 0.2, OUR_MAGNITUDE),
    "efficientnet_b2": (260, 0.3, 6.0),
    "efficientnet_b3": (300, 0.3, 12.0),
    "efficientnet_b4": (380, 0.4, 15.0),
    "efficientnet_b5": (456, 0.4, 18.0),
    "efficientnet_b6": (528, 0.5, 24.0),
    "efficientnet_b7": (600, 0.5, 27.0),
    "efficientnet_l2": (475, 0.5, 27.0),
    "resnet50": (224, 0.0, 9.0),
}

IN_PAPER: dict[str, Any] = {
    "labeled_batch": 2_048,
    "lr": 0.128,
    "threshold": 0.3,
    "per_class": 130_000,
}
IN_PAPER |= {"filter_network": "efficientnet_b0", "stochastic_depth": 0.2}
IN_PAPER |= {"finetune_sizes": (0,), "finetune_epochs": 1.5, "data": "imagenet"}
IN_CODE: dict[str, Any] = {
    "warmup_epochs": 5.0,
    "weight_decay": 1e-5,
    "label_smoothing": 0.1,
    "ema_decay": 0.9999,
}
IN_CODE |= {"translate": 100.0}
OURS: dict[str, Any] = {"validation": 0, "cutout": 0, "channels_last": True}
# The paper's small students train so long; of its filter it says that it is a B0 of ImageNet.
OURS |= {"filter_epochs": 700}

# What every row does as it stands.
ALWAYS: Mapping[str, Source] = {
    "the mean cross-entropy over labeled and unlabeled pictures of a batch (the code has 1 + r "
    "times that)": "paper",
    "the rate falls by 0.97 every 2.4 of 350 epochs, or 4.8 of 700": "paper",
    "students begin with fresh weights": "paper",
    "soft labels, by a teacher without noise of pictures as they are": "paper",
    "students have the noise of labeled pictures on unlabeled ones": "paper",
    "pictures of ImageNet's validation set are not learned from": "paper",
    "two operations of RandAugment; dropout before the last layer alone; stochastic depth that "
    "grows linearly to that of the last block": "paper",
    "RMSProp as TensorFlow has it, with a decay and a momentum of 0.9, and an epsilon of 0.001 "
    "inside the root": "code",
    "no weight decay on the scales and shifts of norms": "code",
    "an average of the weights with the decay min(decay, (1 + t) / (10 + t)), which labels and is "
    "tested": "code",
    "the standard augmentation of ImageNet is a random crop that is mirrored half of the time; in "
    "Table 6 the paper has a random translation and flip": "code",
    "each operation of RandAugment takes place with a probability drawn from 0.2 to 0.8": "code",
    "the rate falls smoothly, where the code lets it fall in steps": "ours",
    "pictures of the validation set are known by their bytes": "ours",
    "FixRes by SGD at 1e-5 in batches of 512, with the first half of the layers frozen": "ours",
    "RandAugment's operations are those of Meta Pseudo Labels, 15, and on SVHN 12, without the "
    "code's SolarizeAdd and Cutout": "ours",
    "copies of a class are as many for each picture, and one more for some by their names; the "
    "code draws them": "ours",
    "a teacher labels as it was before FixRes, at the size that it was trained at; one of another "
    "run (--teacher) as that run delivers it": "ours",
    "with --training pretrain_finetune, finetuning by SGD at 0.01, which falls as a cosine, for 10 "
    "epochs or those of --stage-epochs": "ours",
    "pictures are normalized by a mean of 0.5 and a deviation of 0.25": "ours",
}

# What single rows do as they stand, where that differs from the authors' code.
OF_ROWS: Mapping[str, Source] = {
    "`b0`, `b1`: RandAugment, which the code does not have there": "paper",
    "`b0`, `b1`: its magnitude, the least of the code's, of B2": "ours",
    "`l2`: EfficientNet-L2 is finetuned at a larger size by FixRes, and tested at 800": "paper",
    "`l2`: it is finetuned at 800 too, in each of the three rounds": "ours",
    "`svhn`: the rate ends at 0.0118 of the first by the paper's rule, which is 0.000188 for a "
    "batch of 256, and 0.000094 for this one of 128; the paper says no rate of SVHN, and the "
    "code's script for SVHN ends at 0.0002 for 256 (--final_base_lr)": "ours",
    "`resnet50`: the network that selects has no stochastic depth, as the others": "ours",
}


@dataclass(frozen=True)
class Row:
    """A row: its title, its values, and who says so of each of them."""

    title: str
    values: Mapping[str, Any]
    sources: Mapping[str, Source]

    def settings(self) -> Settings:
        return Settings(**self.values)


def row(title: str, *layers: tuple[Source, Mapping[str, Any]]) -> Row:
    """Return a row of the values that all rows share, some of which later layers replace."""
    values: dict[str, Any] = {}
    sources: dict[str, Source] = {}
    for source, layer in (("paper", IN_PAPER), ("code", IN_CODE), ("ours", OURS), *layers):
        values |= layer
        sources |= dict.fromkeys(layer, source)  # type: ignore[arg-type]
    return Row(title, values, sources)


def of_one_network(name: str, epochs: int, ratio: int = 3) -> Row:
    """Return the row of a teacher and a student of one network."""
    image_size, dropout, magnitude = AS_PUBLISHED[name]
    said_in: Source = "paper" if name == "efficientnet_b7" else "code"
    chosen_by: Source = "ours" if name in ("efficientnet_b0", "efficientnet_b1") else said_in
    return row(
        f"ImageNet, {name} twice",
        ("paper", {"networks": (name, name), "epochs": (epochs,), "ratios": (ratio,)}),
        (said_in, {"image_sizes": (image_size,), "stochastic_depth": 0.2, "dropouts": (dropout,)}),
        (chosen_by, {"magnitudes": (magnitude,)}),
    )


SHORT_SCHEDULE = 350
LONG_SCHEDULE = 700

ROWS: dict[str, Row] = {
    "b0": of_one_network("efficientnet_b0", LONG_SCHEDULE, ratio=1),
    **{
        f"b{scale}": of_one_network(f"efficientnet_b{scale}", LONG_SCHEDULE)
        for scale in (1, 2, 3, 4)
    },
    **{
        f"b{scale}": of_one_network(f"efficientnet_b{scale}", SHORT_SCHEDULE) for scale in (5, 6, 7)
    },
    "l2": row(
        "ImageNet, the chain of Table 7: EfficientNet-B7, then L2 three times",
        (
            "paper",
            {
                "networks": (
                    "efficientnet_b7",
                    "efficientnet_l2",
                    "efficientnet_l2",
                    "efficientnet_l2",
                ),
                "image_sizes": (600, 475, 475, 475),
                "ratios": (14, 14, 28),
                "dropouts": (0.5,),
                "magnitudes": (27.0,),
                "epochs": (SHORT_SCHEDULE,),
                "finetune_sizes": (0, 800),
            },
        ),
        ("ours", {"precision": "bfloat16"}),
    ),
    "resnet50": row(
        "ImageNet, ResNet-50 twice (Table 16)",
        ("paper", {"networks": ("resnet50", "resnet50"), "magnitudes": (9.0,)}),
        ("ours", {"image_sizes": (224,), "dropouts": (0.0,), "stochastic_depth": 0.0}),
        ("ours", {"epochs": (SHORT_SCHEDULE,), "ratios": (1,)}),
    ),
    "svhn": row(
        "SVHN, core with labels and extra without, EfficientNet-B0 with two strides of 1 (Table "
        "17)",
        ("paper", {"data": "svhn", "networks": ("efficientnet_b0_svhn", "efficientnet_b0_svhn")}),
        ("paper", {"image_sizes": (32,)}),
        (
            "code",
            {"ratios": (5,), "dropouts": (0.2,), "stochastic_depth": 0.2, "magnitudes": (5.0,)},
        ),
        (
            "code",
            {
                "translate": 4.0,
                "cutout": 16,
                "labeled_batch": 128,
                "weight_decay": 1e-4,
                "lr": 0.128,
            },
        ),
        # The code takes 109,474 steps on the 69,257 pictures that it does not select on.
        (
            "code",
            {
                "epochs": (109_474 * 128 / 69_257,),
                "validation": 4_000,
                "threshold": 0.3,
                "per_class": 53_113,
            },
        ),
        ("ours", {"filter_network": None, "filter_epochs": 0, "channels_last": False}),
    ),
}


def sources_table() -> str:
    """Return the values of all rows with the letters of their sources, and what all rows share."""
    names = list(dict.fromkeys(name for row in ROWS.values() for name in row.values))
    lines = [
        f"| setting | {' | '.join(f'`{name}`' for name in ROWS)} |",
        f"|---|{'---|' * len(ROWS)}",
    ]
    for name in names:
        cells: list[str] = []
        for row in ROWS.values():
            is_there = name in row.values
            cells.append(f"{spoken(row.values[name])} {row.sources[name][0]}" if is_there else "")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    shared = [f"- {text}: {source}" for text, source in ALWAYS.items()]
    of_rows = [f"- {text}: {source}" for text, source in OF_ROWS.items()]
    return "\n".join(
        [*lines, "", "In every row:", "", *shared, "", "In single rows:", "", *of_rows]
    )


def spoken(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(spoken(part) for part in value).replace("efficientnet_", "")
    if value is None:
        return "none"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


# ------------------------------------------------------------------------------- how long, how fast


@dataclass(frozen=True)
class Schedule:
    """The steps of a phase, the first rate, and the steps of growing rates."""

    steps: int
    lr: float
    warmup: int


def schedule_of(c: Settings, network: Network, labeled: int) -> Schedule:
    """Return the schedule of a network that trains for its epochs of the labeled pictures.

    Steps and rate follow the labeled batch.
    """
    steps = max(1, round(network.epochs * labeled / c.labeled_batch))
    warmup = round(c.warmup_epochs * labeled / c.labeled_batch)
    if c.steps is not None:
        # Warmup is as large a share of the steps as it would be.
        warmup = round(warmup * c.steps / steps)
        steps = c.steps
    return Schedule(steps=steps, lr=c.lr * c.labeled_batch / 2_048, warmup=min(warmup, steps - 1))


def student_schedule(c: Settings, network: Network, labeled: int) -> Schedule:
    """Return the schedule of a student.

    With --warm-epochs it is shorter, and its first rate is such that it ends at the usual one.
    """
    usual = schedule_of(c, network, labeled)
    if c.warm_epochs is None:
        return usual
    steps = max(1, round(c.warm_epochs / network.epochs * usual.steps))
    return Schedule(
        steps=steps,
        lr=usual.lr * end_matched(steps, usual.steps),
        warmup=min(usual.warmup, steps - 1),
    )


def finetune_steps(c: Settings, network: Network, labeled: int, epochs: float, batch: int) -> int:
    """Return the steps of finetuning for so many epochs, in the proportion of --steps."""
    steps = epochs * labeled / batch
    if c.steps is not None:
        steps *= c.steps / (network.epochs * labeled / c.labeled_batch)
    return max(1, round(steps))


# ---------------------------------------------------------------------------- what a run will do


def plan_of(c: Settings, labeled: int) -> str:
    """Return all that a run will do: a line for each network, and indented how it is trained."""
    networks = networks_of(c)
    lines = [settings_of_all_phases(c)]
    selecting = filter_of(c)
    if selecting is not None:
        schedule = schedule_of(c, selecting, labeled)
        lines.append(f"filter: {training_in_words(c, selecting, schedule)}")
        lines.append(f"  {length_in_words(selecting.epochs, schedule)}")
    if len(networks) > 1:
        lines.append(f"selection: {selection_in_words(c)}")
    if c.teacher is not None:
        lines.append(f"teacher: the network that {c.teacher} delivers, not trained again")
    else:
        lines += round_in_words(c, networks[0], 0, labeled)
    for number, network in enumerate(networks[1:], start=1):
        lines += round_in_words(c, network, number, labeled)
    return "\n".join(lines)


def round_in_words(c: Settings, network: Network, number: int, labeled: int) -> list[str]:
    """Return how the network of a round is trained, in lines."""
    schedule = student_schedule(c, network, labeled) if number else schedule_of(c, network, labeled)
    lines = [f"round {number}: {training_in_words(c, network, schedule)}"]
    is_warm = number > 0 and c.warm_start
    epochs = network.epochs
    begins = "begins with fresh weights"
    if is_warm:
        begins = "begins with the weights of its teacher"
        epochs = epochs if c.warm_epochs is None else c.warm_epochs
    lines.append(f"  {length_in_words(epochs, schedule)}; {begins}")
    if number > 0:
        lines += [f"  {line}" for line in student_in_words(c, network, number, labeled)]
    if network.finetune_size:
        steps = finetune_steps(c, network, labeled, c.finetune_epochs, c.finetune_batch)
        lines.append(
            f"  FixRes: {network.name}, {network.finetune_size} pixels, {steps:,} steps of "
            f"{c.finetune_batch:,} labeled, not augmented, at {c.finetune_lr:g}"
        )
        lines.append(
            f"    {c.finetune_epochs:g} epochs by SGD at a constant rate; the first {c.frozen:g} "
            "of the layers are frozen"
        )
    return lines


def settings_of_all_phases(c: Settings) -> str:
    """Return what holds for every network of a run."""
    parts = [
        f"{c.data}, seed {c.seed}, {c.validation:,} labeled pictures held out",
        f"RMSProp, weight decay {c.weight_decay:g}, label smoothing {c.label_smoothing:g}, an "
        f"average of the weights by {c.ema_decay:g}",
        f"RandAugment moves by up to {c.translate:g} pixels, a square of {c.cutout} pixels is cut",
        f"{c.precision}, {'channels last' if c.channels_last else 'channels first'}, "
        f"batches in {c.accumulate:,} part{'s' if c.accumulate > 1 else ''}",
        f"validated every {c.validate_every:,} steps",
        "the rate falls by 0.97 every 2.4 of 350 parts of the steps",
    ]
    if c.mesh.size > 1:
        ranks = c.batch_norm_ranks or c.mesh.shares
        parts.append(
            f"{c.mesh.replicate:,} x {c.mesh.shard:,} processes, of which {ranks:,} share the "
            "statistics of batch norms"
        )
    if c.unlabeled is not None:
        parts.append(f"unlabeled pictures: {c.unlabeled}")
    elif c.labels_per_class is not None:
        parts.append(f"{c.labels_per_class:,} labels a class, the other pictures have none")
    return "; ".join(parts)


def training_in_words(c: Settings, network: Network, schedule: Schedule) -> str:
    """Return what a network learns from, for how many steps, and with what noise."""
    labeled = f"{c.labeled_batch:,} labeled"
    unlabeled = f"{network.ratio * c.labeled_batch:,} unlabeled"
    if network.ratio == 0:
        batch = labeled
    elif c.training == "joint":
        batch = f"{labeled} and {unlabeled}"
    else:
        batch = unlabeled
    return (
        f"{network.name}, {network.image_size} pixels, {schedule.steps:,} steps of {batch} at "
        f"{schedule.lr:.4g}; magnitude {network.magnitude:g}, dropout {network.dropout:g}, depth "
        f"{network.stochastic_depth:g}"
    )


def length_in_words(epochs: float, schedule: Schedule) -> str:
    return f"{epochs:g} epochs; warmup {schedule.warmup:,} steps"


def selection_in_words(c: Settings) -> str:
    """Return who selects the unlabeled pictures, when, and which are kept."""
    if c.select_by not in ("once", "each"):
        return f"that of {c.select_by}, for all rounds"
    if c.select_by == "each":
        selector = "each round anew, by its teacher"
    elif filter_of(c) is not None:
        selector = f"once, by the filter {c.filter_network}"
    elif c.teacher is not None:
        selector = "once, by the first teacher"
    else:
        selector = f"once, by the first teacher {c.networks[0]}"
    confidence = f"confidence above {c.threshold:g}"
    if c.at_most is not None:
        confidence += f" and at most {c.at_most:g}"
    most = "all of a class" if c.per_class is None else f"the surest {c.per_class:,} of a class"
    copies = "smaller classes repeated" if c.balance else "not balanced"
    drawn = ""
    if c.share is not None:
        drawn = f", a uniform share of {c.share:g} of these"
    elif c.count is not None:
        drawn = f", {c.count:,} of these, drawn uniformly"
    return f"{selector}; {confidence}, {most}, {copies}{drawn}"


UNLABELED_NOISE: Mapping[UnlabeledNoise, str] = {
    "all": "that of labeled pictures",
    "standard": "the standard augmentation, dropout and stochastic depth",
    "model": "dropout and stochastic depth, no augmentation",
    "none": "none",
}


def student_in_words(c: Settings, network: Network, number: int, labeled: int) -> list[str]:
    """Return how a student learns its teacher's labels, in lines."""
    of_what = (
        "of augmented pictures, with dropout and depth" if c.noisy_teacher else "without noise"
    )
    teacher = f"round {number - 1}"
    if number == 1 and c.teacher is not None:
        teacher = c.teacher
    lines = [
        f"{c.labels} labels by {teacher}, {of_what}; noise on unlabeled pictures: "
        f"{UNLABELED_NOISE[network.unlabeled_noise]}"
    ]
    if c.training == "joint":
        added = "the mean over the batch" if c.loss == "mean" else "the sum of two means"
        lines.append(f"labeled and unlabeled together, by {added}")
    else:
        lines.append("pretrained on unlabeled pictures alone")
    if c.training != "pretrain_finetune":
        return lines
    for epochs in c.stage_epochs:
        steps = finetune_steps(c, network, labeled, epochs, c.labeled_batch)
        lines.append(
            f"then finetuned: {steps:,} steps of {c.labeled_batch:,} labeled at {c.stage_lr:g}, "
            f"{epochs:g} epochs by SGD, the rate falls as a cosine"
        )
    if len(c.stage_epochs) > 1:
        lines.append("each from the pretrained weights; the held-out pictures choose one")
    return lines


class TensorFlowRMSProp(torch.optim.Optimizer):
    r"""RMSProp as the authors' code has it, which is TensorFlow's.

    .. math:: v \leftarrow 0.9\, v + 0.1\, g^2, \quad
              m \leftarrow 0.9\, m + \eta\, g / \sqrt{v + \epsilon}, \quad
              \theta \leftarrow \theta - m, \quad v_0 = 1, \quad \epsilon = 10^{-3}

    torch's has v_0 = 0, adds ε behind the root, and multiplies the momentum by the rate of the step
    at hand.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float) -> None:
        super().__init__(
            groups, {"lr": lr, "decay": 0.9, "momentum": 0.9, "eps": 1e-3, "weight_decay": 0.0}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["mean_square"] = torch.ones_like(p)
                    state["momentum"] = torch.zeros_like(p)
                gradient = p.grad + group["weight_decay"] * p
                state["mean_square"].lerp_(gradient.square(), 1 - group["decay"])
                scaled = gradient / (state["mean_square"] + group["eps"]).sqrt()
                state["momentum"].mul_(group["momentum"]).add_(group["lr"] * scaled)
                p.sub_(state["momentum"])


def optimizer_of(c: Settings, network: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Return the authors' optimizer, whose weight decay leaves norms alone."""
    norms = [part for part in network.modules() if isinstance(part, _BatchNorm)]
    of_norms = {id(p) for part in norms for p in part.parameters()}
    decayed = [p for p in network.parameters() if id(p) not in of_norms]
    spared = [p for p in network.parameters() if id(p) in of_norms]
    groups = [
        {"params": decayed, "weight_decay": c.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return TensorFlowRMSProp([group for group in groups if group["params"]], lr)


# ----------------------------------------------------------------------------- before anything runs

# Settings that decide nothing of a result.
FREE = (
    "root",
    "out",
    "resume",
    "dry_run",
    "mesh",
    "device",
    "num_workers",
    "log_every",
    "save_every",
)


def check(c: Settings) -> None:
    """Refuse settings that do not go together, in one line, before anything is read or written."""
    for one in dataclasses.fields(c):
        if getattr(c, one.name) == ():
            raise MetaplError(f"--{one.name.replace('_', '-')}: expected one value or more.")
    for network in networks_of(c):
        Architecture(
            name=network.name,
            num_classes=10,
            dropout=network.dropout,
            stochastic_depth=c.stochastic_depth,
        )
    if c.teacher is not None and len(c.networks) < 2:
        raise MetaplError(
            f"--teacher {c.teacher} with --networks {c.networks[0]}: nothing is left to train; "
            "expected two networks or more, of which the teacher stands for the first."
        )
    check_interval(c.threshold, c.at_most)
    if c.share is not None and not 0 < c.share <= 1:
        raise MetaplError(f"--share {c.share}: expected more than 0, and at most 1.")
    if c.count is not None and (c.count < 1 or c.share is not None):
        raise MetaplError(f"--count {c.count}: expected 1 or more, and no --share.")
    if c.training == "pretrain_finetune" and len(c.stage_epochs) > 1 and not c.validation:
        raise MetaplError(
            f"--stage-epochs {' '.join(f'{epochs:g}' for epochs in c.stage_epochs)}: expected one "
            "length, or --validation N, the held-out pictures that choose one."
        )
    if c.filter_network is not None and c.filter_network not in (*AS_PUBLISHED, *c.networks):
        raise MetaplError(
            f"--filter-network {c.filter_network}: expected one of {', '.join(AS_PUBLISHED)}."
        )
    if c.training != "joint" and c.loss != "mean":
        raise MetaplError(
            f"--loss {c.loss}: expected mean with --training {c.training}, which has no sum."
        )
    ready = 0 if c.teacher is None else 1
    if c.warm_start and len(set(c.networks[ready:])) > 1:
        raise MetaplError(
            f"--warm-start: expected one network in --networks, not {', '.join(set(c.networks))}."
        )
    if c.warm_epochs is not None and not c.warm_start:
        raise MetaplError(f"--warm-epochs {c.warm_epochs:g} was given without --warm-start.")
    for network in networks_of(c):
        if network.finetune_size:
            check_larger(network)
    check_processes(c)
    if c.dry_run:
        return
    if not c.root or not c.out:
        raise MetaplError(
            "expected --root DIR, where the set lies, and --out DIR, where the run goes; or "
            "--dry-run."
        )
    has_students = len(c.networks) > 1
    is_all_labeled = c.unlabeled is None and c.labels_per_class is None
    if c.data == "imagenet" and has_students and is_all_labeled:
        raise MetaplError(
            "expected --unlabeled DIR, or --labels-per-class N, so that the rest of ImageNet has "
            "no labels."
        )
    if c.data == "svhn" and c.unlabeled is not None:
        raise MetaplError(
            "--unlabeled: SVHN's unlabeled pictures are its extra ones; leave it out."
        )
    if c.data == "svhn" and c.labels_per_class is not None:
        raise MetaplError(
            "--labels-per-class: all of SVHN's core pictures keep their labels; leave it out."
        )
    if c.select_by not in ("once", "each"):
        check_selection(c)
    if c.teacher is not None:
        ready_teacher(c)
    check_run(c)


def check_larger(network: Network) -> None:
    """Refuse a side for FixRes that is not larger, or for which the network is another one."""
    flag = f"--finetune-sizes {network.finetune_size}"
    if network.finetune_size <= network.image_size:
        raise MetaplError(
            f"{flag}: expected 0, or more pixels than the {network.image_size} that {network.name} "
            "is trained on."
        )
    usual = weight_shapes(network.name, network.image_size)
    if weight_shapes(network.name, network.finetune_size) != usual:
        raise MetaplError(
            f"{flag}: {network.name} has other weights there than for {network.image_size} pixels; "
            "expected 0, or a network of any size."
        )


@cache
def weight_shapes(name: str, image_size: int) -> dict[str, torch.Size]:
    """Return the shapes of a network's tensors, without making it."""
    with torch.device("meta"):
        network = Architecture(name=name, num_classes=10, image_size=image_size).create()
    return {key: tensor.shape for key, tensor in network.state_dict().items()}


def check_processes(c: Settings) -> None:
    """Refuse a mesh that is not of the processes here, and batches that it does not divide."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if c.mesh.size != started and not c.dry_run:
        raise MetaplError(
            f"{started:,} process{'es were' if started > 1 else ' was'} started for a mesh of "
            f"{c.mesh.size:,}; expected as many: torchrun --nproc-per-node=N "
            "examples/noisy_student_imagenet.py ... --mesh.replicate N, or --mesh.shard N for "
            "shared weights."
        )
    if c.mesh.tensor > 1:
        raise MetaplError(
            f"--mesh.tensor {c.mesh.tensor}: expected 1, for these networks have no plan of "
            "products."
        )
    if c.batch_norm_ranks is not None and (
        c.batch_norm_ranks < 1 or c.mesh.shares % c.batch_norm_ranks
    ):
        raise MetaplError(
            f"--batch-norm-ranks {c.batch_norm_ranks}: expected a divisor of {c.mesh.shares:,} "
            "processes."
        )
    parts = c.mesh.shares * c.accumulate
    for name in ("labeled_batch", "finetune_batch"):
        if getattr(c, name) % parts:
            raise MetaplError(
                f"--{name.replace('_', '-')} {getattr(c, name):,}: expected a multiple of "
                f"{parts:,}, for {c.mesh.shares:,} processes and --accumulate {c.accumulate:,}."
            )


def check_selection(c: Settings) -> None:
    """Refuse a store for --select-by that is not a selection of this run's unlabeled pictures."""
    flag = f"--select-by {c.select_by}"
    if not Path(c.select_by, "store.json").is_file():
        raise MetaplError(
            f"{flag}: expected once, each, or a folder such as RUN/selection/selected of another "
            "run."
        )
    store = LabelStore(c.select_by)
    if "selected" not in store.provenance:
        raise MetaplError(
            f"{flag}: nothing was selected in it; expected the store beside it, selected."
        )
    pictures = unlabeled_name(c)
    if store.provenance.get("pictures") != pictures:
        raise MetaplError(
            f"{flag} was selected of {store.provenance.get('pictures')}; expected a selection of "
            f"{pictures}."
        )


def unlabeled_name(c: Settings) -> str:
    """Return what a store says of the pictures that it has labels of."""
    if c.unlabeled is not None:
        return str(Path(c.unlabeled).resolve())
    labeled = "core" if c.data == "svhn" else f"{c.labels_per_class} a class"
    return (
        f"{c.data} without the labeled pictures ({labeled}), {c.validation} held out, seed {c.seed}"
    )


def check_run(c: Settings) -> None:
    """Refuse a folder that holds a run of other settings, or one that is not to be gone on with."""
    file = Path(c.out, "config.json")
    if not file.exists():
        return
    if not c.resume:
        raise MetaplError(
            f"{c.out} holds a run already; go on with --resume, or give another --out."
        )
    stored = json.loads(file.read_text())
    asked = json.loads(json.dumps(dataclasses.asdict(c)))
    changed = [name for name in asked if name not in FREE and asked[name] != stored.get(name)]
    if changed:
        said = few([f"{name} was {stored.get(name)}, now {asked[name]}" for name in changed])
        raise MetaplError(
            f"the run in {c.out} was begun otherwise ({said}); go on as it was begun, or give "
            "another --out."
        )


# ------------------------------------------------------------------------------------- the pictures


@dataclass(frozen=True)
class Sized:
    """What load_pictures reads, of pictures of one size."""

    data: str
    root: str
    image_size: int


@cache
def pictures_of(data: str, root: str, image_size: int) -> PictureSet:
    return load_pictures(Sized(data, root, image_size))


@cache
def folder_of(folder: str, image_size: int) -> FileImages:
    return FileImages(
        scan_unlabeled(folder).without_repeats().paths(),
        size=(image_size, image_size),
        center=224 / 256,
    )


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures of a run at the size of a network.

    Labeled ones, unlabeled ones, and those that are held out.
    """

    labeled: Images
    labels: Tensor
    unlabeled: Images
    validation: EvaluationBatches | None
    test: EvaluationBatches
    classes: list[str]


def pictures_at(c: Settings, image_size: int) -> Pictures:
    sets = pictures_of(c.data, c.root, image_size)
    if c.data == "svhn":
        # The core pictures have labels, and the extra ones, which come after them, none.
        core = sets.train_labels[: sets.labelable]
        split = split_labels(core, None, c.validation, c.seed, sets.labelable)
        split["unlabeled"] = torch.arange(sets.labelable, len(sets.train_labels))
    else:
        per_class = None if c.unlabeled is not None else c.labels_per_class
        split = split_labels(sets.train_labels, per_class, c.validation, c.seed, sets.labelable)
    unlabeled = sets.train.select(split["unlabeled"])
    if c.unlabeled is not None:
        unlabeled = folder_of(c.unlabeled, image_size)
    validation = None
    held_out = split["validation"]
    if len(held_out):
        validation = EvaluationBatches(
            sets.train.select(held_out), sets.train_labels[held_out], batch_size=256
        )
    return Pictures(
        labeled=sets.train.select(split["labeled"]),
        labels=sets.train_labels[split["labeled"]],
        unlabeled=unlabeled,
        validation=validation,
        test=EvaluationBatches(sets.test, sets.test_labels, batch_size=256),
        classes=sets.classes,
    )


def standard_view(c: Settings) -> View:
    """Return the standard augmentation.

    Small pictures move by four pixels, others are cropped as they are read.
    """
    return Identity() if c.data == "imagenet" else Weak(4, flip=False)


def crop_of(c: Settings, network: Network) -> ResizedCrop | None:
    return ResizedCrop(network.image_size, flip=True) if c.data == "imagenet" else None


def noisy_view(c: Settings, network: Network) -> View:
    """Return the standard augmentation and RandAugment, where the network has a magnitude."""
    standard = standard_view(c)
    if network.magnitude == 0:
        return standard
    changed = RandAugment(
        2,
        network.magnitude,
        operations=SVHN_OPERATIONS if c.data == "svhn" else CIFAR_OPERATIONS,
        translate=c.translate / network.image_size,
        cutout=c.cutout,
    )
    return Chain((changed, standard))


def labeled_batches(c: Settings, network: Network, pictures: Pictures, seed: int) -> LabeledBatches:
    sampler = StepSampler(len(pictures.labels), c.labeled_batch, seed=seed)
    return LabeledBatches(
        pictures.labeled,
        pictures.labels,
        sampler,
        noisy_view(c, network),
        seed,
        crop=crop_of(c, network),
    )


def pseudo_labeled_batches(
    c: Settings, network: Network, pictures: Pictures, chosen: Chosen, seed: int
) -> PseudoLabeledBatches:
    view: View = Identity()
    if network.unlabeled_noise == "all":
        view = noisy_view(c, network)
    elif network.unlabeled_noise == "standard":
        view = standard_view(c)
    is_augmented = network.unlabeled_noise in ("all", "standard")
    return PseudoLabeledBatches(
        pictures.unlabeled.select(chosen.positions),
        StepSampler(len(chosen.positions), network.ratio * c.labeled_batch, seed=seed, stream=1),
        view,
        None,
        seed,
        crop=crop_of(c, network) if is_augmented else None,
        chosen=chosen,
    )


# --------------------------------------------------------------------------------------- the labels


def write_labels(
    c: Settings,
    network: nn.Module,
    spec: Network,
    pictures: Pictures,
    positions: Tensor,
    folder: Path,
    processes: Processes,
    seed: int,
) -> LabelStore:
    """Store a network's labels of unlabeled pictures, and go on with a store that was begun.

    Each process labels a range of the passes and writes a store of its own, and the first process
    puts them together, into the store that one process would have written, to the byte.
    """
    about: dict[str, Any] = {
        "pictures": unlabeled_name(c),
        "examples": len(positions),
        "weights_fingerprint": int(digest(network.state_dict())),
        "views": f"augmented, seed {seed}, with dropout" if c.noisy_teacher else "as they are",
    }
    shares = processes.mesh.shares
    passes = -(-len(positions) // LABELED_AT_ONCE)
    is_whole = False
    if (folder / "store.json").exists():
        is_whole = LabelStore(folder, must_be_complete=False).complete
    parts = [folder.with_name(f"{folder.name}-{number}-of-{shares}") for number in range(shares)]
    ranges = [
        range(number * passes // shares, (number + 1) * passes // shares)
        for number in range(shares)
    ]
    if shares == 1:
        parts = [folder]
    share = processes.mesh.share if shares > 1 else 0
    if ranges[share] and not (is_whole and shares > 1):
        label_range(
            c,
            network,
            spec,
            pictures,
            positions,
            parts[share],
            ranges[share],
            about=about,
            seed=seed,
        )
    wait_for_all()
    if shares > 1 and processes.first:
        with LabelWriter(
            folder, pictures.classes, provenance=about, resume=folder.exists()
        ) as writer:
            rows_to_skip = writer.rows
            for part, passes_of_part in zip(parts, ranges, strict=True):
                if writer.complete or not passes_of_part:
                    continue
                for table in LabelStore(part).tables:
                    if rows_to_skip < len(table):
                        writer.add_table(table.slice(rows_to_skip))
                    rows_to_skip = max(0, rows_to_skip - len(table))
    wait_for_all()
    return LabelStore(folder)


@torch.no_grad()
def label_range(
    c: Settings,
    network: nn.Module,
    spec: Network,
    pictures: Pictures,
    positions: Tensor,
    folder: Path,
    passes: range,
    *,
    about: Mapping[str, Any],
    seed: int,
) -> None:
    """Label the pictures of some passes in their order, without noise unless that is asked for."""
    network.eval()
    labeler = Noised(network, seed) if c.noisy_teacher else network
    view = noisy_view(c, spec) if c.noisy_teacher else Identity()
    device = next(network.parameters()).device
    images = pictures.unlabeled
    fetch = images.fetch_sound if isinstance(images, FileImages) else images.fetch
    with LabelWriter(folder, pictures.classes, provenance=about, resume=folder.exists()) as writer:
        for number in passes:
            batch = positions[number * LABELED_AT_ONCE : (number + 1) * LABELED_AT_ONCE]
            # A pass of which a part is stored is run again whole, for a smaller batch may round
            # otherwise.
            if writer.complete or (writer.last is not None and int(batch[-1]) <= int(writer.last)):
                continue
            x, used = fetch(batch)
            if not len(used):
                continue
            x = view(in_unit_range(x), seed=seed, step=number, examples=used)
            probabilities = labeler(x.to(device)).float().softmax(dim=1).cpu()
            if not bool(probabilities.isfinite().all()):
                raise MetaplError(
                    f"the labels of {spec.name} are not finite: its training diverged; lower --lr."
                )
            is_new = (
                torch.ones(len(used), dtype=torch.bool)
                if writer.last is None
                else used > int(writer.last)
            )
            new = used[is_new].tolist()
            digests = None
            if c.unlabeled is not None and isinstance(images, FileImages):
                digests = [
                    file_digest(str(images.path(position)))[:DIGEST_BYTES] for position in new
                ]
            writer.add(new, probabilities[is_new], digests)


@dataclass(frozen=True, eq=False)
class Selection:
    """The positions of the selected pictures, ascending, and how often each counts."""

    positions: Tensor
    copies: Tensor

    @classmethod
    def of(cls, store: LabelStore) -> "Selection":
        return cls(torch.from_numpy(store.column("id")), torch.from_numpy(store.column("copies")))

    def chosen(self, labels: LabelStore) -> Chosen:
        """Return the selected pictures with the labels of a store, as often as they count."""
        positions = labels.column("id")
        copies = self.copies.numpy()[np.searchsorted(self.positions.numpy(), positions)]
        rows = torch.from_numpy(np.repeat(np.arange(len(labels)), copies))
        return Chosen(torch.from_numpy(positions)[rows], rows, labels.at)


def select_from(c: Settings, labels: LabelStore, folder: Path, processes: Processes) -> Selection:
    """Select as the paper does, without pictures of ImageNet's validation set.

    The first process writes, all read.
    """
    if processes.first:
        select(
            labels,
            folder,
            threshold=c.threshold,
            at_most=c.at_most,
            per_class=c.per_class,
            balance=c.balance,
            share=c.share,
            count=c.count,
            seed=c.seed,
            drop_overlap=None if c.unlabeled is None else Path(c.root, "val"),
        )
    wait_for_all()
    return Selection.of(LabelStore(folder))


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


# ------------------------------------------------------------------------------------------ the run


def train(c: Settings, processes: Processes | None = None) -> dict[str, Any]:
    """Train the rounds, and return what result.json holds."""
    processes = processes or Processes()
    out = Path(c.out)
    networks = networks_of(c)
    if processes.first:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(c), indent=1))
        print(plan_of(c, len(pictures_at(c, networks[0].image_size).labels)), flush=True)

    # 1. What is selected once: by another run, or by a network of its own, which learns from
    # labeled pictures alone.
    selection: Selection | None = None
    selecting = filter_of(c)
    if c.select_by not in ("once", "each"):
        selection = Selection.of(LabelStore(c.select_by))
    elif selecting is not None:
        pictures = pictures_at(c, selecting.image_size)
        weights = train_supervised(c, selecting, pictures, FILTER, "filter", processes)
        labels = label_all(
            c, weights, selecting, pictures, out / "selection" / "labels", FILTER, processes
        )
        selection = select_from(c, labels, out / "selection" / "selected", processes)

    # 2. The first teacher learns from labeled pictures alone, or has done so in another run.
    first = networks[0]
    if c.teacher is not None:
        first, weights, classes = ready_teacher(c)
        pictures = pictures_at(c, first.image_size)
        if classes != pictures.classes:
            raise MetaplError(
                f"--teacher {c.teacher} tells {few(classes, 3)} apart; expected the "
                f"{len(pictures.classes):,} classes of these pictures, {few(pictures.classes, 3)}."
            )
        networks[0] = first
        last = End(first, weights, pictures, reached(c, first, weights, pictures))
    else:
        pictures = pictures_at(c, first.image_size)
        weights = train_supervised(c, first, pictures, 0, "round-0", processes)
        last = end_of_round(c, first, weights, pictures, 0, processes)
    rounds = [last.result]

    # 3. Each teacher labels, and a student learns from its labels and from the labeled pictures.
    for number, spec in enumerate(networks[1:], start=1):
        teacher = networks[number - 1]
        place = out / "rounds" / str(number)
        of_teacher = pictures_at(c, teacher.image_size)
        if selection is None:
            labels = label_all(c, weights, teacher, of_teacher, place / "labels", number, processes)
            selected = select_from(c, labels, place / "selected", processes)
            if c.select_by == "once":
                selection = selected
            labels = LabelStore(place / "selected")
        else:
            selected = selection
            labels = label_some(
                c,
                weights,
                teacher,
                of_teacher,
                selected.positions,
                place / "labels",
                number,
                processes,
            )
        chosen = selected.chosen(labels)
        pictures = pictures_at(c, spec.image_size)
        weights, stages = train_student(c, spec, pictures, chosen, weights, number, processes)
        counts = {
            "kept": len(selected.positions),
            "copies": len(chosen.positions),
            "unlabeled": len(pictures.unlabeled),
        }
        last = end_of_round(c, spec, weights, pictures, number, processes)
        rounds.append(last.result | counts | stages)

    # 4. The last network is delivered, after FixRes where it had that. The test set has chosen
    # nothing.
    result: dict[str, Any] = {
        "rounds": rounds,
        "labeled": len(pictures.labels),
        "tested_on": len(pictures.test.labels),
    }
    if processes.first:
        network = whole_network(c, last.spec, last.weights, last.pictures)
        evaluation = evaluated(network, last.pictures.test)
        deliver(
            DeliveredAs(out=c.out, seed=c.seed, steps=c.steps, channels_last=c.channels_last),
            network,
            "noisy_student",
            last.spec.name,
            last.spec.image_size,
            last.pictures.test.images,
            last.pictures.classes,
            evaluation,
        )
        (out / "result.json").write_text(json.dumps(result, indent=1))
    wait_for_all()
    return json.loads(json.dumps(result))  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class End:
    """What a round ends with: a network as it is tested last, and what result.json says of it."""

    spec: Network
    weights: Mapping[str, Tensor]
    pictures: Pictures
    result: dict[str, Any]


def end_of_round(
    c: Settings,
    spec: Network,
    weights: Mapping[str, Tensor],
    pictures: Pictures,
    number: int,
    processes: Processes,
) -> End:
    """Test a network and write its weights; then finetune it by FixRes, where it has that."""

    def tested(name: str, spec: Network, weights: Mapping[str, Tensor], pictures: Pictures) -> Any:
        if processes.first:
            save_weights(
                weights,
                Path(c.out, f"{name}.safetensors"),
                spec.name,
                size=spec.image_size,
                test=pictures.test.images,
                classes=pictures.classes,
            )
        return reached(c, spec, weights, pictures)

    result = tested(f"round-{number}", spec, weights, pictures)
    if not spec.finetune_size:
        return End(spec, weights, pictures, result)
    larger = dataclasses.replace(spec, image_size=spec.finetune_size)
    pictures = pictures_at(c, larger.image_size)
    weights = finetune_larger(c, larger, pictures, weights, number, processes)
    finetuned = tested(f"round-{number}-finetuned", larger, weights, pictures)
    return End(larger, weights, pictures, result | {"finetuned": finetuned})


def ready_teacher(c: Settings) -> tuple[Network, dict[str, Tensor], list[str]]:
    """Return the network that another run delivers, its weights, and its classes.

    With --noisy-teacher it has the noise of the first network's settings.
    """
    assert c.teacher is not None
    place = Path(c.teacher, "delivered")
    run = EndedRun.load(place if place.is_dir() else c.teacher)
    name = run.name("delivered")
    card = run.cards[name]
    if card.architecture is None or card.mean is None or card.input.channels != 3:
        raise MetaplError(
            f"--teacher {c.teacher}: expected a run of this script, or another one whose network "
            "has a name and takes pictures in colors."
        )
    teacher = network_of(c, card.architecture.name, number=0)
    if c.warm_start and teacher.name != c.networks[1]:
        raise MetaplError(
            f"--warm-start: {c.teacher} delivers {teacher.name}; expected a {c.networks[1]}."
        )
    depth = c.stochastic_depth if c.noisy_teacher else 0.0
    teacher = dataclasses.replace(teacher, image_size=card.input.size, stochastic_depth=depth)
    return teacher, run.network(name).state_dict(), list(run.classes)


@dataclass(frozen=True, kw_only=True)
class DeliveredAs:
    """What deliver reads of a run."""

    out: str
    seed: int
    steps: int | None
    channels_last: bool


def fit_options(c: Settings, pictures: Pictures) -> dict[str, Any]:
    """Return the options that all phases share."""
    return {
        "out": Path(c.out),
        "resume": c.resume,
        "validation": pictures.validation,
        "select": pictures.validation is not None,
        "num_workers": c.num_workers,
        "log_every": c.log_every,
        "validate_every": c.validate_every,
        "save_every": c.save_every,
    }


def laid_out(c: Settings, network: nn.Module, seed: int, processes: Processes) -> nn.Module:
    """Lay a network out over the processes, each of which draws masks of its own."""
    if c.mesh.size > 1:
        network = shard(network, c.mesh, batch_norm_ranks=c.batch_norm_ranks or c.mesh.shares)
    processes.seed(network, seed)
    return network


def train_supervised(
    c: Settings,
    spec: Network,
    pictures: Pictures,
    number: int,
    phase: str,
    processes: Processes,
) -> dict[str, Tensor]:
    """Train a network on labeled pictures alone, with noise, and return its averaged weights."""
    seed = fold_in(c.seed, number)
    torch.manual_seed(seed)
    network = build_network(spec, len(pictures.classes), spec.dropout, spec.name)
    network = laid_out(c, network, seed, processes)
    schedule = schedule_of(c, spec, len(pictures.labels))
    trainer = metapl.LossTrainer(
        network,
        (CrossEntropy(c.label_smoothing),),
        optimizer=optimizer_of(c, network, schedule.lr),
        accumulate=c.accumulate,
        precision=c.precision,
    )
    fitted = trainer.fit(
        processes.share(labeled_batches(c, spec, pictures, seed)),
        steps=schedule.steps,
        warmup=schedule.warmup,
        schedule="exponential",
        ema_decay=c.ema_decay,
        phase=phase,
        **fit_options(c, pictures),
    )
    return fitted.weights


def train_student(
    c: Settings,
    spec: Network,
    pictures: Pictures,
    chosen: Chosen,
    teacher_weights: Mapping[str, Tensor],
    number: int,
    processes: Processes,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train a network with noise on labels and on a teacher's.

    Returns: its averaged weights, and what result.json says of their finetuning.
    """
    seed = fold_in(c.seed, number)
    torch.manual_seed(seed)
    network = build_network(spec, len(pictures.classes), spec.dropout, spec.name)
    usual = schedule_of(c, spec, len(pictures.labels))
    schedule = student_schedule(c, spec, len(pictures.labels))
    if c.warm_start:
        network.load_state_dict(teacher_weights)
    network = laid_out(c, network, seed, processes)
    loss = NoisyStudentLoss(
        c.loss, c.labels == "hard", spec.unlabeled_noise != "none", c.label_smoothing
    )
    trainer = metapl.LossTrainer(
        network,
        (loss,),
        optimizer=optimizer_of(c, network, schedule.lr),
        accumulate=c.accumulate,
        precision=c.precision,
    )
    labeled = labeled_batches(c, spec, pictures, seed)
    pairs = pseudo_labeled_batches(c, spec, pictures, chosen, seed)
    sources: Any = (labeled, pairs) if c.training == "joint" else (pairs, None)
    fitted = trainer.fit(
        *map(processes.share, sources),
        steps=schedule.steps,
        warmup=schedule.warmup,
        schedule="exponential",
        decay_every=usual.steps * 2.4 / 350,
        ema_decay=c.ema_decay,
        callbacks=[LossesApart(labeled, pairs, loss, every=c.validate_every, steps=schedule.steps)],
        phase=f"round-{number}",
        **fit_options(c, pictures),
    )
    if c.training != "pretrain_finetune":
        return fitted.weights, {}
    return finetune_stages(c, spec, pictures, fitted.weights, number, processes)


def finetune_stages(
    c: Settings,
    spec: Network,
    pictures: Pictures,
    pretrained: Mapping[str, Tensor],
    number: int,
    processes: Processes,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Finetune a pretrained network on labels, for each length from the same weights.

    Returns: the weights that are best on the held-out pictures, and of each length what
        result.json says.
    """
    seed = fold_in(fold_in(c.seed, number), 1)
    stages: list[dict[str, Any]] = []
    weights_of_stages: list[dict[str, Tensor]] = []
    for epochs in c.stage_epochs:
        network = whole_network(c, spec, pretrained, pictures).train()
        network = laid_out(c, network, seed, processes)
        slow = torch.optim.SGD(network.parameters(), lr=c.stage_lr, momentum=0.9)
        trainer = metapl.LossTrainer(
            network, optimizer=slow, accumulate=c.accumulate, precision=c.precision
        )
        steps = finetune_steps(c, spec, len(pictures.labels), epochs, c.labeled_batch)
        fitted = trainer.fit(
            processes.share(labeled_batches(c, spec, pictures, seed)),
            steps=steps,
            schedule="cosine",
            phase=f"round-{number}-finetune-{epochs:g}",
            **fit_options(c, pictures),
        )
        tested = reached(c, spec, fitted.weights, pictures)
        stages.append(
            {
                "epochs": epochs,
                "steps": steps,
                "validation_accuracy": fitted.validation_accuracy,
                "test_accuracy": tested["test_accuracy"],
            }
        )
        weights_of_stages.append(fitted.weights)
    # Of equal ones the first; a single length may have no held-out pictures.
    best = max(range(len(stages)), key=lambda stage: stages[stage]["validation_accuracy"] or 0.0)
    return weights_of_stages[best], {"stages": stages, "chosen_epochs": stages[best]["epochs"]}


def finetune_larger(
    c: Settings,
    spec: Network,
    pictures: Pictures,
    weights: Mapping[str, Tensor],
    number: int,
    processes: Processes,
) -> dict[str, Tensor]:
    """Finetune a network on larger labeled pictures as they are, its first layers frozen."""
    seed = fold_in(fold_in(c.seed, number), 2)
    network = whole_network(c, spec, weights, pictures).train()
    freeze_first_layers(network, c.frozen)
    network = laid_out(c, network, seed, processes)
    trained = [p for p in network.parameters() if p.requires_grad]
    trainer = metapl.LossTrainer(
        network,
        optimizer=torch.optim.SGD(trained, lr=c.finetune_lr),
        accumulate=c.accumulate,
        precision=c.precision,
    )
    sampler = StepSampler(len(pictures.labels), c.finetune_batch, seed=seed, stream=2)
    plain = LabeledBatches(pictures.labeled, pictures.labels, sampler, Identity(), seed)
    fitted = trainer.fit(
        processes.share(plain),
        steps=finetune_steps(c, spec, len(pictures.labels), c.finetune_epochs, c.finetune_batch),
        schedule="constant",
        phase=f"round-{number}-resolution",
        **fit_options(c, pictures),
    )
    return fitted.weights


def whole_network(
    c: Settings, spec: Network, weights: Mapping[str, Tensor], pictures: Pictures
) -> nn.Module:
    """Return a network with these weights, which is not laid out over processes."""
    network = build_network(spec, len(pictures.classes), spec.dropout, spec.name)
    network.load_state_dict(weights)
    return network.eval()


def label_all(
    c: Settings,
    weights: Mapping[str, Tensor],
    spec: Network,
    pictures: Pictures,
    folder: Path,
    number: int,
    processes: Processes,
) -> LabelStore:
    """Store a network's labels of all unlabeled pictures."""
    return label_some(
        c, weights, spec, pictures, torch.arange(len(pictures.unlabeled)), folder, number, processes
    )


def label_some(
    c: Settings,
    weights: Mapping[str, Tensor],
    spec: Network,
    pictures: Pictures,
    positions: Tensor,
    folder: Path,
    number: int,
    processes: Processes,
) -> LabelStore:
    """Store a network's labels of the unlabeled pictures at some positions."""
    network = whole_network(c, spec, weights, pictures)
    seed = fold_in(c.seed, number)
    return write_labels(c, network, spec, pictures, positions, folder, processes, seed)


def evaluated(network: nn.Module, examples: EvaluationBatches) -> Evaluation:
    device = next(network.parameters()).device
    return evaluate_logits(*predict_logits(network, batches_of(examples, device)))


def reached(
    c: Settings, spec: Network, weights: Mapping[str, Tensor], pictures: Pictures
) -> dict[str, Any]:
    """Return what a network reaches on the test pictures."""
    evaluation = evaluated(whole_network(c, spec, weights, pictures), pictures.test)
    accuracies: dict[str, Any] = {"network": spec.name, "image_size": spec.image_size}
    accuracies["test_accuracy"] = evaluation.accuracy
    if evaluation.top5 is not None:
        accuracies["test_top5"] = evaluation.top5
    return accuracies


def settings_of(words: Sequence[str]) -> Settings:
    """Return the settings that a command line asks for, before they are checked."""
    rows = {name: (row.title, row.settings()) for name, row in ROWS.items()}
    return tyro.extras.overridable_config_cli(
        rows, prog="noisy_student_imagenet.py", description=__doc__, args=words
    )


def main(words: Sequence[str]) -> int:
    if "--sources" in words:
        print(sources_table())
        return 0
    try:
        c = settings_of(words)
        check(c)
        if c.dry_run:
            labeled = (
                SVHN_PICTURES - c.validation
                if c.data == "svhn"
                else IMAGENET_PICTURES - c.validation
            )
            if c.labels_per_class is not None and c.unlabeled is None:
                labeled = 1_000 * c.labels_per_class
            print(plan_of(c, labeled))
            return 0
        with joined(c.mesh, device_of(c.device)) as processes:
            result = train(c, processes)
            if processes.first:
                print(json.dumps(result, indent=1))
    except MetaplError as error:
        print(f"noisy_student_imagenet.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
