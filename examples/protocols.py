"""The picture protocols of Meta Pseudo Labels, on files that you have; nothing is downloaded.

    # 4,000 labels of 50,000; mean and deviation of ten runs; 128 labels a class
    python examples/protocols.py cifar10-4k --root data/ --out runs/cifar
    python examples/protocols.py svhn-1k-paper --root data/ --out runs/svhn \\
        --seeds 0-9
    python examples/protocols.py imagenet-10pct --root data/ --out runs/tenth
    # CIFAR and SVHN as torchvision reads them, as the binary version, Parquet or folders
    python examples/protocols.py cifar10-4k --data cifar100 --labels-per-class 100 --root data/ \\
        --out runs/hundred
    # 4,000 or 400 labels of Fashion-MNIST's 60,000, a package of Debian
    python examples/protocols.py fashion-4k \\
        --root /usr/share/datasets/fashion-mnist --out runs/f
    # each row, in a minute
    python examples/protocols.py fashion-4k --network wide_resnet10_1 \\
        --scale-to 300 --root /usr/share/datasets/fashion-mnist --out runs/small
    # all labels, and 12.8 M others
    torchrun --nproc-per-node=8 examples/protocols.py imagenet-jft \\
        --mesh.shard 8 --root data/ --unlabeled pictures/ --out runs/jft
    # who says which value
    python examples/protocols.py --sources

A row ends in -paper where it is Algorithm 1 with the paper's settings, evaluated at its last
checkpoint; its neighbor has the exact gradient. --sources prints of every value whether it is the
paper's text, of the table in its appendix (noted without it at hand: SVHN's and ImageNet's columns
are to be checked), of the authors' published code, or ours. Every value is a flag: --steps 1000.
Where a row's wait and warm-up do not fit into so few steps, they are shortened as by --scale-to,
and the program says to what. --method none trains without feedback, uda one network with the
teacher's losses, supervised on the labeled pictures alone, headroom on the true labels of all, and
reduced_mpl on stored labels. Of uda, supervised and headroom, --teacher-lr and --teacher-dropout
are the rate and the dropout.

A run leaves weights, metrics.jsonl, split.json, and result.json, whose test accuracies were
measured once, at the end; and in delivered/ a run that `metapl predict`, `evaluate` and `export`
read. One that was stopped goes on with --resume. With --seeds each run has a folder of its own, and
seeds.json has means and deviations.
"""

import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro
from picture_sets import (
    StoredBatches,
    StoredLabeledBatches,
    build_network,
    deliver,
    load_pictures,
    save_weights,
    split_labels,
    stored_pictures,
    stored_rows_of,
    views_of,
)
from torch import Tensor, nn

import metapl
from metapl.data import StepSampler
from metapl.data.seeds import parse_seeds
from metapl.distributed import Mesh, shard
from metapl.errors import MetaplError
from metapl.feedback import Forward, LossDifference, Reinforce, ReinforcePerExample
from metapl.labels import LabelStore
from metapl.machine import device as device_of
from metapl.metrics import Evaluation, evaluate_logits, predict_logits
from metapl.metrics.predictions import batches_of
from metapl.metrics.pseudo_labels import PseudoLabelAccuracy
from metapl.models import LabelAdjuster
from metapl.networks import parameter_groups, whiten
from metapl.pictures import (
    EvaluationBatches,
    FileImages,
    LabeledBatches,
    UnlabeledBatches,
    scan_unlabeled,
)
from metapl.problems import ReducedLabels, StoredCrossEntropy
from metapl.problems.losses import UDA, CrossEntropy
from metapl.processes import Processes, joined
from metapl.runs.terminal import exit_code

# How the teacher learns from the student, by the forms of h in facts about eq. (12): the exact
# gradient of soft labels; Algorithm 1, h times the mean cross-entropy of the drawn labels, as it is
# written; the same with the sum, whose expectation is the exact gradient; the cosine in the place
# of h, times the mean; the difference of the labeled loss before and after the step, times the
# mean; and one h for each example.
Feedback = Literal["exact", "dot", "dot-sum", "cosine", "loss-difference", "per-example"]
WITH_BASELINE = ("dot", "dot-sum", "cosine", "loss-difference")

# Labeled pictures by which the first layer of airbench_small is set.
WHITENED_BY = 512

# Of the sets whose pictures lie in memory.
SIDES = {"cifar10": 32, "cifar100": 32, "svhn": 32, "fashion": 28}


# ------------------------------------------------------------------------------------- the settings


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What a run does. A row below has a value for everything that has no default here."""

    root: Annotated[
        str,
        tyro.conf.arg(
            metavar="DIR",
            help="Folder of the data as torchvision reads it; of CIFAR also its binary version, of "
            "CIFAR and SVHN Parquet files or folders; of fashion, its 4 files.",
        ),
    ]
    out: Annotated[str, tyro.conf.arg(metavar="DIR", help="Folder that the run is written to.")]
    seed: Annotated[int, tyro.conf.arg(help="Seed of all random numbers.")] = 0
    seeds: Annotated[
        str | None, tyro.conf.arg(metavar="0-9", help="Several runs, one after the other.")
    ] = None
    resume: Annotated[bool, tyro.conf.arg(help="Go on with a run that was stopped.")] = False

    data: Literal["cifar10", "cifar100", "svhn", "fashion", "imagenet"]
    unlabeled: str | None = (
        None  # a folder of other pictures: all of the training pictures then keep their labels
    )
    labels: str | None = None  # of reduced_mpl: the store of their labels, by `metapl label`
    # Of reduced_mpl: the store of the labeled pictures' labels, on which the small network has a
    # loss of its own.
    labeled_labels: str | None = None
    split: str | None = None  # the split.json of another run, instead of drawing one from the seed
    labels_per_class: int | None  # None: all keep their labels
    validation: int  # training pictures that are selected on, and not trained on
    select: Literal["last", "validation"]  # which checkpoint is evaluated
    method: Literal["mpl", "none", "uda", "supervised", "headroom", "reduced_mpl", "reduced_none"]
    feedback: Feedback
    feedback_baseline: float | None  # decay of a moving average that is taken off h
    feedback_weight: float | None  # None: at most 0.1 of the gradient of the teacher's own losses

    network: str
    image_size: int
    dropout: float
    teacher_dropout: float  # likewise
    stochastic_depth: float
    # Whose list of RandAugment: grey is cifar10's without Color, which leaves a grey picture as it
    # is; svhn's pictures are not mirrored.
    operations: Literal["cifar10", "svhn", "grey"]
    magnitude: float  # of two operations of RandAugment, of 10
    cutout: int
    translate: float  # greatest shift at magnitude 10, as a share of the side

    steps: int
    scale_to: int | None = (
        None  # so many steps instead; wait, warmup, ramp and finetuning shrink with them
    )
    wait: int  # steps of the teacher alone
    warmup: int
    schedule: Literal["cosine", "exponential"]  # exponential: by 0.97 after 2.4 of 350 parts
    labeled_batch: int
    unlabeled_batch: int
    student_lr: float
    teacher_lr: float  # also of the one network of --method uda, supervised and headroom
    weight_decay: float
    clip_norm: float | None
    ema_decay: float
    label_smoothing: float  # of the teacher's cross-entropy
    pseudo_label_smoothing: float  # of the student's
    # The view of an unlabeled picture that the student learns; the weak one is the teacher's.
    student_view: Literal["weak", "strong"]
    uda_weight: float
    uda_temperature: float
    uda_threshold: float
    uda_threshold_on: Literal["prediction", "sharpened"]
    uda_ramp: int
    finetune_steps: int
    finetune_batch: int
    finetune_lr: float

    mesh: Mesh = field(default_factory=Mesh)  # the processes that torchrun has started
    batch_norm_ranks: int | None = (
        None  # of them, how many share the statistics of batch norms; None: all
    )
    accumulate: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = False
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    num_workers: int = 2
    log_every: int = 100
    validate_every: int = 1_000
    save_every: int = 5_000
    training_accuracy_on: int = (
        4_000  # so many labeled pictures; measured whenever something is validated
    )


# ----------------------------------------------------------------------------------------- the rows

Source = Literal["paper", "table", "code", "ours"]
Layer = tuple[Source, Mapping[str, Any]]


def paper(**values: Any) -> Layer:
    """Return values that the paper's text, tables and algorithm state, with that source."""
    return "paper", values


def table(**values: Any) -> Layer:
    """Return values of the table in the paper's appendix, which was not at hand."""
    return "table", values


def code(**values: Any) -> Layer:
    """Return values of the code that the authors published, with that source."""
    return "code", values


def ours(**values: Any) -> Layer:
    """Return values that we chose, with that source."""
    return "ours", values


@dataclass(frozen=True)
class Row:
    """A protocol: its title, its values, and who says so of each of them."""

    title: str
    values: Mapping[str, Any]
    sources: Mapping[str, Source]

    @classmethod
    def of(cls, title: str, *layers: Layer) -> "Row":
        return Row("", {}, {}).but(title, *layers)

    def but(self, title: str, *layers: Layer) -> "Row":
        """Return another row, in which the values of the layers replace those that are here."""
        values = dict(self.values)
        sources = dict(self.sources)
        for source, changes in layers:
            values |= changes
            sources |= dict.fromkeys(changes, source)
        return Row(title, values, sources)

    def elsewhere(self) -> "Row":
        """Return this row for another experiment, with its values as our choice.

        Neither the table nor the code says anything of that one.
        """
        sources: dict[str, Source] = {}
        for name, source in self.sources.items():
            sources[name] = "paper" if source == "paper" else "ours"
        return Row(self.title, self.values, sources)

    def cell(self, name: str) -> str:
        """Return a value and the first letter of its source, or nothing where it has none."""
        if name not in self.values:
            return ""
        return f"{spoken_value(name, self.values[name])} {self.sources[name][0]}"

    def settings(self) -> Protocol:
        return Protocol(root=tyro.MISSING, out=tyro.MISSING, **self.values)


cifar = Row.of(
    "CIFAR-10, 4,000 labels, the authors' code, the exact gradient",
    paper(
        data="cifar10",
        labels_per_class=400,
        validation=5_000,
        method="mpl",
        network="wide_resnet28_2",
    ),
    paper(
        image_size=32,
        operations="cifar10",
        finetune_steps=1_000,
        finetune_batch=512,
        finetune_lr=1e-5,
    ),
    code(
        steps=300_000,
        wait=3_000,
        warmup=5_000,
        labeled_batch=128,
        unlabeled_batch=7 * 128,
        weight_decay=5e-4,
    ),
    # The code has a rate of 0.05 for 256 labeled pictures.
    code(student_lr=0.05 * 128 / 256, teacher_lr=0.05 * 128 / 256, clip_norm=None, ema_decay=0.995),
    code(dropout=0.2, teacher_dropout=0.2, magnitude=16.0, cutout=16, translate=1 / 8),
    code(
        label_smoothing=0.15,
        pseudo_label_smoothing=0.15,
        uda_weight=8.0,
        uda_temperature=0.7,
        uda_ramp=5_000,
    ),
    code(uda_threshold=0.6, uda_threshold_on="sharpened", student_view="strong"),
    table(schedule="cosine"),
    # The authors' code, read as it stands, has no gradient of the feedback at all: --method none.
    ours(
        feedback="exact",
        feedback_baseline=None,
        feedback_weight=1.0,
        select="validation",
        stochastic_depth=0.0,
    ),
)
# Algorithm 1: drawn labels, h times the mean cross-entropy, one view of an unlabeled picture in
# lines 2, 3 and 5, no smoothing in line 6, no threshold and no ramp in line 7. The appendix's table
# adds the weight and the temperature of line 7, and the smoothing of line 3.
ALGORITHM_1 = paper(
    feedback="dot",
    feedback_baseline=None,
    feedback_weight=1.0,
    label_smoothing=0.0,
    uda_threshold=0.0,
    uda_ramp=0,
    student_view="weak",
    # A gradient that is clipped leaves h at 0: the length of the step is then a constant.
    clip_norm=None,
)
cifar_paper = cifar.but(
    "CIFAR-10, 4,000 labels, Algorithm 1, the paper's settings",
    ALGORITHM_1,
    paper(select="last"),
    table(
        steps=1_000_000, wait=0, warmup=2_000, labeled_batch=128, student_lr=0.3, teacher_lr=0.125
    ),
    table(weight_decay=5e-4, dropout=0.35, teacher_dropout=0.5, pseudo_label_smoothing=0.1),
    table(uda_weight=1.0, uda_temperature=0.8),
)
svhn_paper = cifar_paper.elsewhere().but(
    "SVHN, 1,000 labels and 603,388 others, Algorithm 1, the paper's settings",
    paper(data="svhn", labels_per_class=100, validation=0, operations="svhn"),
    table(
        steps=1_000_000, wait=0, warmup=2_000, labeled_batch=128, student_lr=0.15, teacher_lr=0.05
    ),
    table(weight_decay=5e-4, dropout=0.45, teacher_dropout=0.65, pseudo_label_smoothing=0.1),
    table(uda_weight=2.5, uda_temperature=1.25),
)
# The expectation of Algorithm 1's mean is a batch size smaller. At weight 1 the exact gradient can
# outgrow that of the teacher's own losses and undo what they teach, so it is bounded here.
EXACT_GRADIENT = ours(feedback="exact", feedback_baseline=None, feedback_weight=None)
svhn = svhn_paper.but(
    "SVHN, 1,000 labels and 603,388 others, the exact gradient",
    EXACT_GRADIENT,
    ours(student_view="strong"),
)
# A set of CIFAR-10's size on which neither the paper nor the code says anything. The values are
# those of CIFAR-10 by the paper, in both rows, so that the two differ in the feedback alone. The
# square that is greyed out is half of a side, as there.
fashion_paper = cifar_paper.elsewhere().but(
    "Fashion-MNIST, 4,000 labels, Algorithm 1, the paper's settings for CIFAR-10",
    ours(data="fashion", labels_per_class=400, validation=5_000, network="wide_resnet28_2"),
    ours(image_size=28, operations="grey", cutout=14),
    ours(method="mpl", select="last", finetune_steps=1_000, finetune_batch=512, finetune_lr=1e-5),
)
fashion = fashion_paper.but(
    "Fashion-MNIST, 4,000 labels, the exact gradient",
    EXACT_GRADIENT,
)
FORTY_A_CLASS = ours(labels_per_class=40)
fashion_400_paper = fashion_paper.but(
    "Fashion-MNIST, 400 labels, Algorithm 1, the paper's settings for CIFAR-10", FORTY_A_CLASS
)
fashion_400 = fashion.but("Fashion-MNIST, 400 labels, the exact gradient", FORTY_A_CLASS)
tenth = cifar.but(
    "ImageNet, 128 labels a class, the authors' code, the exact gradient",
    paper(
        data="imagenet",
        labels_per_class=128,
        network="resnet50",
        image_size=224,
        finetune_steps=2_000,
    ),
    code(steps=700_000, wait=20_000, warmup=5_000, labeled_batch=1_024, unlabeled_batch=15 * 1_024),
    # The code has rates of 0.4 and 0.6 for 256 labeled pictures.
    code(
        student_lr=0.4 * 1_024 / 256, teacher_lr=0.6 * 1_024 / 256, weight_decay=1e-4, clip_norm=5.0
    ),
    code(
        ema_decay=0.999,
        dropout=0.1,
        teacher_dropout=0.1,
        magnitude=17.0,
        cutout=0,
        translate=100 / 224,
    ),
    code(
        label_smoothing=0.1,
        pseudo_label_smoothing=0.1,
        uda_weight=20.0,
        uda_temperature=0.5,
        uda_ramp=50_000,
    ),
    ours(validation=25_000),
)
tenth_paper = tenth.but(
    "ImageNet, 128 labels a class, Algorithm 1, the paper's settings",
    ALGORITHM_1,
    paper(select="last", validation=0),
    table(steps=500_000, wait=0, warmup=1_000, labeled_batch=2_048, student_lr=0.8, teacher_lr=0.5),
    table(weight_decay=2e-4, dropout=0.1, teacher_dropout=0.1, pseudo_label_smoothing=0.1),
    table(uda_weight=16.0, uda_temperature=0.75),
    code(unlabeled_batch=15 * 2_048),
)
# A ResNet-50 of all labels picks 12,800 pictures a class: metapl labels select --per-class 12800
# --any-class.
jft = tenth_paper.elsewhere().but(
    "ImageNet and 12.8 million other pictures, ResNet-50, Algorithm 1",
    paper(
        labels_per_class=None,
        validation=25_000,
        select="validation",
        labeled_batch=4_096,
        unlabeled_batch=32_768,
    ),
    paper(steps=500_000, finetune_steps=10_000, finetune_lr=1e-4, finetune_batch=512),
)
# All but the resolution is as in Noisy Student: the rate for 2,048 labeled pictures, and its fall
# by 0.97. The interval is stretched from Noisy Student's 350 epochs to the steps here; unstretched
# the rate would end at 2e-10. Of its optimizer neither paper says anything; the appendix is said to
# finetune with LARS.
l2 = jft.but(
    "ImageNet and 130 million other pictures, EfficientNet-L2, Algorithm 1",
    paper(
        network="efficientnet_l2",
        image_size=512,
        labeled_batch=2_048,
        unlabeled_batch=16_384,
        steps=1_000_000,
    ),
    paper(dropout=0.5, teacher_dropout=0.5, stochastic_depth=0.2, magnitude=27.0, validation=0),
    paper(finetune_steps=20_000, student_lr=0.128, teacher_lr=0.128, schedule="exponential"),
    # These are of Noisy Student's code.
    ours(weight_decay=1e-5, ema_decay=0.9999, warmup=5 * 1_281_167 // 2_048),
    ours(select="last", finetune_batch=2_048, finetune_lr=1e-4),
    # Noisy Student's rate was one of RMSProp; by SGD without a clip the miniature diverges.
    ours(clip_norm=5.0),
    # A rank holds one labeled picture, and a replica of the paper 16. What its batch norms see, the
    # paper does not say.
    ours(mesh=Mesh(replicate=16, shard=128), precision="bfloat16", batch_norm_ranks=16),
)
wide = l2.but(
    "ImageNet and 130 million other pictures, EfficientNet-B6-Wide, Algorithm 1",
    paper(network="efficientnet_b6_wide"),
)
# Of Reduced Meta Pseudo Labels the paper's text says no more than the network, the data and 86.9 %.
reduced = l2.but(
    "ImageNet and YFCC100M, EfficientNet-B7, Reduced MPL on stored labels",
    paper(method="reduced_mpl", network="efficientnet_b7"),
    ours(
        image_size=600,
        labeled_batch=2_048,
        unlabeled_batch=16_384,
        steps=500_000,
        finetune_steps=20_000,
    ),
    ours(
        dropout=0.5,
        teacher_dropout=0.0,
        stochastic_depth=0.2,
        magnitude=27.0,
        pseudo_label_smoothing=0.0,
        # The stored labels are of pictures as they are; the student learns them on the strong view.
        student_view="strong",
    ),
    ours(validation=0, select="last", mesh=Mesh(replicate=16, shard=128), batch_norm_ranks=16),
    ours(student_lr=0.128, teacher_lr=0.128, schedule="exponential", weight_decay=1e-5),
    ours(ema_decay=0.9999, warmup=5 * 1_281_167 // 2_048),
    ours(feedback="dot", feedback_baseline=None, feedback_weight=1.0),
    # The small network's loss is on the stored labels of the labeled pictures. It has no UDA.
    ours(label_smoothing=0.0, uda_threshold=0.0, uda_ramp=0),
)
for_imagenet = ours(channels_last=True, num_workers=8, validate_every=5_000)
ROWS = {
    "cifar10-4k": cifar,
    "cifar10-4k-paper": cifar_paper,
    "svhn-1k": svhn,
    "svhn-1k-paper": svhn_paper,
    "fashion-4k": fashion,
    "fashion-4k-paper": fashion_paper,
    "fashion-400": fashion_400,
    "fashion-400-paper": fashion_400_paper,
    "imagenet-10pct": tenth.but(tenth.title, for_imagenet),
    "imagenet-10pct-paper": tenth_paper.but(tenth_paper.title, for_imagenet),
    "imagenet-jft": jft.but(jft.title, for_imagenet, ours(unlabeled=tyro.MISSING)),
    "imagenet-l2": l2.but(l2.title, for_imagenet, ours(unlabeled=tyro.MISSING)),
    "imagenet-b6-wide": wide.but(wide.title, for_imagenet, ours(unlabeled=tyro.MISSING)),
    "imagenet-b7-reduced": reduced.but(
        reduced.title,
        for_imagenet,
        ours(unlabeled=tyro.MISSING, labels=tyro.MISSING, labeled_labels=tyro.MISSING),
    ),
}
PROTOCOLS = {name: (row.title, row.settings()) for name, row in ROWS.items()}

# What the program does in every row, and no flag changes.
ALWAYS: Mapping[str, Source] = {
    "teacher and student have the same architecture, but of Reduced MPL, and fresh weights of "
    "their own": "paper",
    "finetuning by SGD at a fixed rate, on the labeled pictures; of L2 and B6-Wide the text says "
    "no more than the set and the steps, and of Reduced MPL and Fashion-MNIST nothing": "paper",
    "RandAugment's operations are drawn uniformly": "paper",
    "both networks by SGD with Nesterov's momentum 0.9; the table says so of CIFAR-10, SVHN and "
    "ImageNet-10%, and elsewhere it is ours": "table",
    "two operations of RandAugment, each with a probability drawn from 0.2 to 0.8": "code",
    "small pictures are moved by up to 4 pixels, mirrored where they show no digits, and in the "
    "strong view moved once more after RandAugment": "code",
    "the teacher labels the weak view": "code",
    "an average of weights with the decay min(decay, (1 + t) / (10 + t))": "code",
    "an exponential rate falls by 0.97 after each 2.4 of 350 parts of the steps: Noisy Student's "
    "interval, stretched to the steps here": "ours",
    "no weight decay on vectors: biases, and scales and shifts of norms": "ours",
    "in finetuning no momentum, no decay, and the labeled pictures' weak view": "ours",
    "pictures are normalized by a mean of 0.5 and a deviation of 0.25": "ours",
    "a network that trains alone (--method uda, supervised, headroom) has the teacher's rate and "
    "dropout (--teacher-lr, --teacher-dropout), for nobody says which": "ours",
}


def sources_table() -> str:
    """Return the values of all rows with the letters of their sources, and what all rows share."""
    names = list(dict.fromkeys(name for row in ROWS.values() for name in row.values))
    lines = [
        f"| setting | {' | '.join(f'`{name}`' for name in ROWS)} |",
        f"|---|{'---|' * len(ROWS)}",
    ]
    for name in names:
        cells = [row.cell(name) for row in ROWS.values()]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    shared = [f"- {text}: {source}" for text, source in ALWAYS.items()]
    return "\n".join([*lines, "", "In every row:", "", *shared])


def sources_of(name: str) -> str:
    """Return the values of one row, a line each, with their source."""
    row = ROWS[name]
    lines = [f"{name}: {row.title}"]
    for name_of_value, source in sorted(
        row.sources.items(), key=lambda entry: get_args(Source).index(entry[1])
    ):
        value = spoken_value(name_of_value, row.values[name_of_value])
        lines.append(f"  {source:6} {name_of_value} = {value}")
    return "\n".join([*lines, *(f"  {source:6} {text}" for text, source in ALWAYS.items())])


def spoken_value(name: str, value: Any) -> str:
    """Return the value of a setting in words."""
    if name == "feedback_weight" and value is None:
        return "bound 0.1"
    return spoken(value)


def spoken(value: Any) -> str:
    if value is tyro.MISSING:
        return "to be given"
    if value is None:
        return "none"
    if isinstance(value, Mesh):
        return f"{value.replicate} x {value.shard}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ----------------------------------------------------------------------------- before anything runs


# What is counted in steps: in a shorter run it shrinks in proportion.
COUNTED = ("wait", "warmup", "uda_ramp", "finetune_steps")
# After how many steps something is done: in a shorter run five times, or more often.
INTERVALS = ("log_every", "validate_every", "save_every")


def scaled(c: Protocol, unchanged: Sequence[str] = ()) -> Protocol:
    """Return the settings of a shorter run.

    What is counted in steps shrinks in the proportion of --scale-to to --steps. It is validated,
    recorded and saved five times, or more often where that is asked for.

    Args:
        unchanged: names of settings that stay as they are.
    """
    if c.scale_to is None:
        return c
    if not 0 < c.scale_to <= c.steps:
        raise MetaplError(
            f"--scale-to {c.scale_to}: expected 1 to {c.steps:,}, the steps that are shortened."
        )

    def shorter(count: int) -> int:
        return max(1, round(count * c.scale_to / c.steps)) if count else 0

    changes = {name: shorter(getattr(c, name)) for name in COUNTED}
    changes |= {name: min(getattr(c, name), max(1, c.scale_to // 5)) for name in INTERVALS}
    changes = {name: value for name, value in changes.items() if name not in unchanged}
    return dataclasses.replace(c, steps=c.scale_to, scale_to=None, **changes)


def fitted_to_steps(c: Protocol, words: Sequence[str]) -> Protocol:
    """Return settings whose wait and warm-up fit into --steps, and say so where they change.

    A row's wait and warm-up are of its own number of steps. Where fewer are asked for, into which
    they do not fit, everything that is counted in steps is shortened as by --scale-to, but for what
    the command line names.

    Args:
        c: the settings that the command line asks for.
        words: the command line.
    """
    if c.steps < 1:
        raise MetaplError(f"--steps {c.steps}: expected 1 or more.")
    row = ROWS[next(word for word in words if word in ROWS)].settings()
    named = named_settings(words)
    fits = c.steps > waits_of(c) and c.steps >= waits_of(c) + c.warmup
    if c.scale_to is not None or fits or c.steps > row.steps or named & {"wait", "warmup"}:
        return c
    c = scaled(dataclasses.replace(c, steps=row.steps, scale_to=c.steps), [*named])
    counts = [f"--{name.replace('_', '-')} {getattr(c, name):,}" for name in COUNTED]
    print(
        f"protocols.py: --steps {c.steps:,} of a row of {row.steps:,} steps: {', '.join(counts)}, "
        "shortened as by --scale-to but for what was named",
        file=sys.stderr,
    )
    return c


def named_settings(words: Sequence[str]) -> set[str]:
    """Return the names of the settings that a command line names."""
    flags = [word for word in words if word.startswith("--")]
    return {flag.removeprefix("--").partition("=")[0].replace("-", "_") for flag in flags}


def waits_of(c: Protocol) -> int:
    """Return for how many steps the student waits; a network that trains alone waits for none."""
    return c.wait if c.method in ("mpl", "none") else 0


def check(c: Protocol) -> None:
    """Refuse settings that do not go together, in one line, before anything is read or written."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if c.mesh.size != started:
        raise MetaplError(
            f"{started:,} process{'es were' if started > 1 else ' was'} started for a mesh of "
            f"{c.mesh.size:,}; expected as many: torchrun --nproc-per-node=N examples/protocols.py "
            "... --mesh.replicate N, or --mesh.shard N for shared weights; --mesh.replicate 1 "
            "--mesh.shard 1 for one process."
        )
    if c.mesh.tensor > 1:
        raise MetaplError(
            f"--mesh.tensor {c.mesh.tensor}: expected 1, for these networks have no plan of "
            "products; examples/tensor_parallel.py trains transformers by one."
        )
    parts = c.mesh.shares * c.accumulate
    batches = {"labeled_batch": c.labeled_batch, "finetune_batch": c.finetune_batch}
    if c.method not in ("supervised", "headroom"):
        batches["unlabeled_batch"] = c.unlabeled_batch
    for name, size in batches.items():
        if size % parts:
            raise MetaplError(
                f"--{name.replace('_', '-')} {size:,}: expected a multiple of {parts:,}, for "
                f"{c.mesh.shares:,} process{'es' if c.mesh.shares > 1 else ''} and --accumulate "
                f"{c.accumulate:,}."
            )
    if c.batch_norm_ranks is not None and (
        c.batch_norm_ranks < 1 or c.mesh.shares % c.batch_norm_ranks
    ):
        raise MetaplError(
            f"--batch-norm-ranks {c.batch_norm_ranks}: expected a divisor of {c.mesh.shares:,} "
            "processes."
        )
    waits = waits_of(c)
    if waits + c.warmup > c.steps or waits >= c.steps:
        raise MetaplError(
            f"--steps {c.steps:,}: expected more than --wait {waits:,} and --warmup {c.warmup:,} "
            "together; --scale-to shortens these too."
        )
    if c.data in SIDES and c.image_size != SIDES[c.data]:
        raise MetaplError(
            f"--image-size {c.image_size}: the pictures of {c.data} have {SIDES[c.data]} pixels."
        )
    if c.select == "validation" and not c.validation:
        raise MetaplError(
            "--select validation: expected pictures to select on, --validation N, or --select last."
        )
    if c.feedback_baseline is not None and c.feedback not in WITH_BASELINE:
        expected = f"expected --feedback {', '.join(WITH_BASELINE[:-1])} or {WITH_BASELINE[-1]}"
        raise MetaplError(
            f"--feedback-baseline {c.feedback_baseline}: {c.feedback} has none; {expected}."
        )
    if c.method.startswith("reduced") and (c.unlabeled is None or c.labels is None):
        raise MetaplError(
            f"--method {c.method}: expected --unlabeled DIR, and --labels STORE by `metapl label`."
        )
    if c.labels is not None and not c.method.startswith("reduced"):
        raise MetaplError(
            f"--labels {c.labels}: expected --method reduced_mpl or reduced_none, which read them."
        )
    if c.labeled_labels is not None and (c.labels is None or c.data != "imagenet"):
        raise MetaplError(
            f"--labeled-labels {c.labeled_labels}: expected --labels beside it, and --data "
            "imagenet, whose pictures are files."
        )
    if c.seeds is not None:
        parse_seeds(c.seeds)
    elif Path(c.out, "config.json").exists() and not c.resume:
        raise MetaplError(
            f"{c.out} holds a run already; go on with --resume, or give another --out."
        )
    if c.seeds is not None and Path(c.out, "seeds.json").exists() and not c.resume:
        raise MetaplError(
            f"{c.out} holds runs already; go on with --resume, or give another --out."
        )


# ------------------------------------------------------------------------------------------ one run


def train(c: Protocol, processes: Processes | None = None) -> dict[str, Any]:
    """Train by the settings, finetune, test once, and return what result.json holds."""
    processes = processes or Processes()
    out = Path(c.out)
    # A run that has its result is read and not repeated; its settings have to be these.
    settings = json.loads(json.dumps(dataclasses.asdict(c)))
    if (out / "result.json").exists():
        stored = json.loads((out / "config.json").read_text())
        changed = [
            name for name in settings if name not in FREE and settings[name] != stored.get(name)
        ]
        if changed:
            was = ", ".join(
                f"{name} was {stored.get(name)}, now {settings[name]}" for name in changed
            )
            raise MetaplError(
                f"{out} holds the result of other settings ({was}); expected these, or another "
                "--out."
            )
        return json.loads((out / "result.json").read_text())

    # 1. The pictures: which have labels, which have none, and which are held out.
    sets = load_pictures(c)
    if c.split is not None:
        split = {
            name: torch.tensor(rows, dtype=torch.int64)
            for name, rows in json.loads(Path(c.split).read_text()).items()
        }
    else:
        per_class = c.labels_per_class if c.unlabeled is None else None
        split = split_labels(sets.train_labels, per_class, c.validation, c.seed, sets.labelable)
    labeled = split["labeled"]
    weak, strong, crop = views_of(c, operations=c.operations)

    def labeled_batches(rows: Tensor, batch_size: int, stream: int, seed: int) -> LabeledBatches:
        sampler = StepSampler(len(rows), batch_size, seed=c.seed, stream=stream)
        return LabeledBatches(
            sets.train.select(rows), sets.train_labels[rows], sampler, weak, seed, crop=crop
        )

    def with_stored(batches: LabeledBatches) -> LabeledBatches:
        if c.labeled_labels is None:
            return batches
        assert isinstance(batches.images, FileImages)
        store = LabelStore(c.labeled_labels)
        rows = stored_rows_of(batches.images, Path(c.root) / "train", store)
        return StoredLabeledBatches(
            batches.images,
            batches.labels,
            batches.sampler,
            batches.view,
            batches.seed,
            crop=batches.crop,
            rows=rows,
            store=store,
        )

    def unlabeled_batches() -> UnlabeledBatches:
        if c.labels is not None:
            store = LabelStore(c.labels)
            pictures, rows = stored_pictures(c.unlabeled, store, c.image_size)
            sampler = StepSampler(len(rows), c.unlabeled_batch, seed=c.seed, stream=1)
            return StoredBatches(
                pictures, sampler, strong, None, c.seed, crop=crop, rows=rows, store=store
            )
        pictures = sets.train.select(split["unlabeled"])
        if c.unlabeled is not None:
            pictures = FileImages(
                scan_unlabeled(c.unlabeled).paths(), size=(c.image_size, c.image_size)
            )
        sampler = StepSampler(len(pictures), c.unlabeled_batch, seed=c.seed, stream=1)
        return UnlabeledBatches(pictures, sampler, weak, strong, c.seed, crop=crop)

    def to_evaluate(rows: Tensor) -> EvaluationBatches:
        return EvaluationBatches(sets.train.select(rows), sets.train_labels[rows], batch_size=256)

    unlabeled = unlabeled_batches()
    validation = to_evaluate(split["validation"]) if len(split["validation"]) else None
    test = EvaluationBatches(sets.test, sets.test_labels, batch_size=256)

    # 2. Two networks from the seed, the teacher first, laid out over the processes.
    torch.manual_seed(c.seed)
    classes = len(sets.classes)
    if c.method.startswith("reduced"):
        teacher: nn.Module = LabelAdjuster(classes).to(c.device)
    else:
        teacher = build_network(c, classes, c.teacher_dropout, c.network)
    student = build_network(c, classes, c.dropout, c.network)
    if c.network == "airbench_small":
        looked_at = sets.train.fetch(labeled[:WHITENED_BY])[0] / 255
        whiten(teacher, looked_at)
        whiten(student, looked_at)
    if c.method in ("uda", "supervised", "headroom"):
        student = teacher
    if c.mesh.size > 1:
        ranks = c.batch_norm_ranks or c.mesh.shares
        student = shard(student, c.mesh, batch_norm_ranks=ranks)
        has_teacher = c.method not in ("uda", "supervised", "headroom")
        teacher = shard(teacher, c.mesh, batch_norm_ranks=ranks) if has_teacher else student
    processes.seed(student, c.seed)

    # 3. The trainer.
    trainer = trainer_of(c, teacher, student)
    if processes.first:
        out.mkdir(parents=True, exist_ok=True)
        (out / "split.json").write_text(
            json.dumps({name: rows.tolist() for name, rows in split.items()})
        )
        (out / "config.json").write_text(json.dumps(settings, indent=1))
    measured = labeled[:: max(1, len(labeled) // c.training_accuracy_on)][: c.training_accuracy_on]
    training_accuracy = TrainingAccuracy(to_evaluate(measured), c.validate_every, c.steps)
    callbacks: list[Any] = [training_accuracy]
    if len(split["unlabeled"]):
        callbacks.append(PseudoLabelAccuracy(to_evaluate(split["unlabeled"][:2_048])))
    reads_unlabeled = c.method not in ("supervised", "headroom")
    trained_on = labeled
    if c.method == "headroom":
        trained_on = torch.cat([labeled, split["unlabeled"]])
    fit_options: dict[str, Any] = {
        "out": out,
        "resume": c.resume,
        "validation": validation,
        "select": c.select == "validation",
        "num_workers": c.num_workers,
        "log_every": c.log_every,
        "save_every": c.save_every,
    }
    fitted_on = with_stored(labeled_batches(trained_on, c.labeled_batch, stream=0, seed=c.seed))
    fitted = trainer.fit(
        processes.share(fitted_on),
        processes.share(unlabeled) if reads_unlabeled else None,
        steps=c.steps,
        wait=waits_of(c),
        warmup=c.warmup,
        schedule=c.schedule,
        ema_decay=c.ema_decay,
        validate_every=c.validate_every,
        callbacks=callbacks,
        **fit_options,
    )
    weights = {"student": fitted.weights}
    tested = {"student": trainer.evaluate(test, classes=sets.classes)}
    values = {"student": fitted.value or 0.0}
    if fitted.teacher_weights and c.method in ("mpl", "none"):
        weights["teacher"] = fitted.teacher_weights
        tested["teacher"] = evaluated(trainer.teacher, test)

    # 4. The student never saw a label: it is finetuned on them.
    if c.finetune_steps and c.method != "headroom":
        processes.seed(student, c.seed)
        optimizer = torch.optim.SGD(parameter_groups(student, weight_decay=0.0), lr=c.finetune_lr)
        tuner = metapl.LossTrainer(student, optimizer=optimizer, **options_of(c))
        tuned = tuner.fit(
            processes.share(labeled_batches(labeled, c.finetune_batch, stream=2, seed=c.seed + 1)),
            steps=c.finetune_steps,
            phase="finetune",
            schedule="constant",
            validate_every=max(1, c.finetune_steps // 10),
            **fit_options,
        )
        weights["finetuned"] = tuned.weights
        tested["finetuned"] = tuner.evaluate(test, classes=sets.classes)
        values["finetuned"] = tuned.value or 0.0

    # 5. What is delivered: by validation the better one, else the last. The test set has chosen
    # nothing.
    delivered = list(values)[-1]
    if c.select == "validation":
        delivered = max(reversed(values), key=lambda name: values[name])
    result: dict[str, Any] = {"delivered": delivered, "best_step": fitted.step}
    for name, evaluation in tested.items():
        result[f"{name}_test_accuracy"] = evaluation.accuracy
        if evaluation.top5 is not None:
            result[f"{name}_test_top5"] = evaluation.top5
    result |= {f"{name}_training_accuracy": value for name, value in training_accuracy.last.items()}
    if validation is not None:
        result["validation_accuracy"] = values
    result |= {
        "labeled": len(labeled),
        "unlabeled": len(unlabeled.images),
        "tested_on": len(sets.test_labels),
    }
    if processes.first:
        for name, of_network in weights.items():
            save_weights(
                of_network,
                out / f"{name}.safetensors",
                c.network,
                size=c.image_size,
                test=sets.test,
                classes=sets.classes,
            )
        network = build_network(c, classes, c.dropout, c.network)
        network.load_state_dict(weights[delivered])
        deliver(
            c,
            network,
            c.method,
            c.network,
            c.image_size,
            sets.test,
            sets.classes,
            tested[delivered],
        )
        (out / "result.json").write_text(json.dumps(result, indent=1))
    return json.loads(json.dumps(result))


# Settings that decide nothing of a result.
FREE = (
    "root",
    "out",
    "resume",
    "seeds",
    "device",
    "num_workers",
    "log_every",
    "save_every",
    "mesh",
)


def options_of(c: Protocol) -> dict[str, Any]:
    """Return what every trainer of a run is given."""
    return {"clip_norm": c.clip_norm, "accumulate": c.accumulate, "precision": c.precision}


def trainer_of(c: Protocol, teacher: nn.Module, student: nn.Module) -> Any:
    """Return the trainer of a method."""

    def sgd(network: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameter_groups(network, c.weight_decay), lr=lr, momentum=0.9, nesterov=True
        )

    supervised = CrossEntropy(c.label_smoothing)
    consistency = UDA(
        weight=c.uda_weight,
        temperature=c.uda_temperature,
        threshold=c.uda_threshold,
        threshold_on=c.uda_threshold_on,
        ramp=c.uda_ramp,
    )
    if c.method in ("supervised", "headroom"):
        return metapl.LossTrainer(
            student, (supervised,), optimizer=sgd(student, c.teacher_lr), **options_of(c)
        )
    if c.method == "uda":
        losses = (supervised, consistency)
        return metapl.LossTrainer(
            student, losses, optimizer=sgd(student, c.teacher_lr), **options_of(c)
        )
    # Without feedback the labels are those of the mode that the row has: soft, or drawn.
    kind: Literal["soft", "hard"] = "soft" if c.feedback == "exact" else "hard"
    if c.method.startswith("reduced"):
        problem: metapl.PseudoLabels = ReducedLabels(kind, label_smoothing=c.pseudo_label_smoothing)
        teacher_losses: tuple[Any, ...] = ()
        if c.labeled_labels is not None:
            teacher_losses = (StoredCrossEntropy(c.label_smoothing),)
    else:
        problem = metapl.PseudoLabels(
            kind, label_smoothing=c.pseudo_label_smoothing, student_view=c.student_view
        )
        teacher_losses = (supervised, consistency)
    return metapl.BilevelTrainer(
        teacher,
        student,
        "none" if c.method.endswith("none") else estimator_of(c),
        problem=problem,
        teacher_losses=teacher_losses,
        inner_optimizer=sgd(student, c.student_lr),
        outer_optimizer=sgd(teacher, c.teacher_lr),
        # The papers add the feedback as it is; without a weight the library bounds it.
        feedback_weight=c.feedback_weight,
        # Labels are drawn alike in any number of processes, whose dropout masks differ.
        generator=torch.Generator(c.device).manual_seed(c.seed),
        # The tests verify this problem.
        verify=False,
        **options_of(c),
    )


def estimator_of(c: Protocol) -> Any:
    """Return how the feedback is found."""
    if c.feedback == "exact":
        return Forward()
    if c.feedback == "per-example":
        return ReinforcePerExample()
    if c.feedback == "loss-difference":
        return LossDifference(baseline=c.feedback_baseline)
    if c.feedback == "cosine":
        return Reinforce(similarity="cosine", baseline=c.feedback_baseline)
    return Reinforce(
        baseline=c.feedback_baseline, reduction="sum" if c.feedback == "dot-sum" else "mean"
    )


def evaluated(network: nn.Module, examples: EvaluationBatches) -> Evaluation:
    """Return what a network reaches, as it is now."""
    batches = batches_of(examples, next(network.parameters()).device)
    return evaluate_logits(*predict_logits(network, batches))


class TrainingAccuracy:
    """Measure networks in training on labeled training pictures as they are (Figure 4).

    This is a callback of a fit.

    The row has ``teacher_training_accuracy`` and ``student_training_accuracy``; a network that
    trains alone is the student. Their averages are not looked at.
    """

    def __init__(self, examples: EvaluationBatches, every: int, steps: int) -> None:
        self.examples = examples
        self.every = every
        self.steps = steps
        self.last: dict[str, float] = {}

    def __call__(self, step: int, row: Mapping[str, float], trainer: Any) -> dict[str, float]:
        if step % self.every and step != self.steps:
            return {}
        self.last = {}
        for role, network in trainer.networks.items():
            if role == "student" or trainer.teacher_classifies:
                self.last[role] = evaluated(network, self.examples).accuracy
        return {f"{role}_training_accuracy": value for role, value in self.last.items()}

    def state_dict(self) -> dict[str, float]:
        return self.last

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.last = state


# ------------------------------------------------------------------------------------- several runs


def train_seeds(c: Protocol, processes: Processes) -> dict[str, Any]:
    """Train once for each seed, each in a folder of its own, and return means and deviations."""
    results = {}
    for seed in parse_seeds(c.seeds or ""):
        run = dataclasses.replace(c, seed=seed, seeds=None, out=str(Path(c.out) / f"seed-{seed}"))
        results[seed] = train(run, processes)
        summary = summarized(results)
        if processes.first:
            (Path(c.out) / "seeds.json").write_text(json.dumps(summary, indent=1))
            print(f"seed {seed}: {shown(summary)}", flush=True)
    return summary


def summarized(results: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean and sample deviation of every accuracy, with its values in order of the seeds."""
    summary: dict[str, Any] = {"seeds": list(results)}
    first = next(iter(results.values()))
    for name in first:
        if name.endswith(("_accuracy", "_top5")) and isinstance(first[name], float):
            values = [result[name] for result in results.values()]
            deviation = statistics.stdev(values) if len(values) > 1 else None
            summary[name] = {
                "mean": statistics.fmean(values),
                "deviation": deviation,
                "values": values,
            }
    return summary


def shown(summary: Mapping[str, Any]) -> str:
    """Return the test accuracies of a summary in one line, in percent."""
    parts = []
    for name, entry in summary.items():
        if "_test_" in name:
            deviation = "" if entry["deviation"] is None else f" ± {100 * entry['deviation']:.2f}"
            parts.append(f"{name.replace('_test_', ' ')} {100 * entry['mean']:.2f}{deviation}")
    return f"{', '.join(parts)} ({len(summary['seeds'])} run{'s' * (len(summary['seeds']) > 1)})"


def settings_of(words: Sequence[str]) -> Protocol:
    """Return the settings that a command line asks for; what does not go together is refused."""
    c = tyro.extras.overridable_config_cli(
        PROTOCOLS, prog="protocols.py", description=__doc__, args=words
    )
    c = scaled(fitted_to_steps(c, words))
    check(c)
    return c


def main(words: Sequence[str]) -> int:
    if "--sources" in words:
        rows = [word for word in words if word in ROWS]
        print("\n\n".join(map(sources_of, rows)) if rows else sources_table())
        return 0
    try:
        c = settings_of(words)
        with joined(c.mesh, device_of(c.device)) as processes:
            result = train(c, processes) if c.seeds is None else train_seeds(c, processes)
            if processes.first:
                print(json.dumps(result, indent=1))
    except MetaplError as error:
        print(f"protocols.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"protocols.py: {str(stopped) or 'stopped'}; go on with --resume", file=sys.stderr)
        return exit_code(stopped)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
