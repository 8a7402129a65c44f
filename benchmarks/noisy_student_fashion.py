"""Tables of Noisy Student on Fashion-MNIST, by networks with stochastic depth, paired over seeds.

    python benchmarks/noisy_student_fashion.py --source /usr/share/datasets/fashion-mnist --hours 4
    python benchmarks/noisy_student_fashion.py --write benchmarks/results/noisy_student_fashion.md

The pictures are those of Debian's package ``dataset-fashion-mnist``, averaged over 2 x 2 pixels. A
seed draws 1,000 labeled pictures, 100 a class, 1,000 to select on, and 10,000 without labels; the
test set has 10,000. Networks: a residual network of six blocks and three widths, S, M and L, in the
place of B0, B4 or B5, and L2 or B7; blocks are dropped by the linear rule, the last one with the
paper's probability 0.2, and dropout before the head is 0.2, which the authors' code has for B0.
Noise on pictures: the strong view of ``metapl noisy-student images`` and a flip; standard
augmentation: a move by up to two pixels and a flip. Selection: a confidence above 0.3, and classes
filled up to the largest. Steps are 1,000 of 32 labeled pictures, 32 epochs, where the paper has
350: the networks are not trained to their end, and this is said beside the tables.

Nothing was tuned but the learning rate of SGD, by hand, on the validation pictures of another seed
(320). The test set is read once by each network, after its last step.

Each row is written when its network has ended. Who stops the script, or lets it stop by
``--hours``, goes on with the same command: rows that are there are not run again, and networks that
label for others are kept in ``--networks``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import harness
import torch
from five_problems import halved, idx_labels, idx_pictures
from harness import NONE, RESULTS, Row
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from metapl.apps.images import Pictures
from metapl.apps.methods.noisy_student import THRESHOLD
from metapl.apps.rounds import STOCHASTIC_DEPTH
from metapl.apps.train import evaluated
from metapl.data.draws import fold_in
from metapl.data.steps import StepSampler
from metapl.labels.selection import select
from metapl.labels.store import LabelStore, LabelWriter
from metapl.metrics.predictions import logits_of
from metapl.noisy_student import Chosen, Noised, PseudoLabeledBatches, end_matched
from metapl.pictures import (
    EvaluationBatches,
    Identity,
    LabeledBatches,
    MemoryImages,
    View,
    Weak,
    load_digits_split,
)
from metapl.pictures.batches import in_unit_range
from metapl.problems import NoisyStudentLoss
from metapl.problems.losses import CrossEntropy
from metapl.training.loss_trainer import LossTrainer
from metapl.training.options import decay_interval

RAW = RESULTS / "noisy_student_fashion.jsonl"
SOURCE = Path("/usr/share/datasets/fashion-mnist")
NETWORKS = Path("build/noisy_student_fashion")

SEEDS = (300, 301, 302)
RATE, DROPOUT, WEIGHT_DECAY = 0.1, 0.2, 5e-4
STEPS, LABELED_BATCH, FINETUNE_STEPS, FINETUNE_RATE = 1_000, 32, 200, 0.01
LABELS_PER_CLASS, VALIDATION, UNLABELED, CLASSES, SIDE = 100, 1_000, 10_000, 10, 14

WIDTHS = {"S": 10, "M": 16, "L": 24}
BLOCKS_PER_STAGE, STAGES = 2, 3


# ----------------------------------------------------------------------------------------- networks


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions behind batch norm and ReLU, dropped for a picture with a probability."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, drop: float) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.BatchNorm2d(channels_in),
            nn.ReLU(),
            nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            StochasticDepth(drop, mode="row"),
        )
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != channels_out:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.shortcut(x) + self.branch(x)
        return result


def residual_network(width: int) -> nn.Module:
    """Return stages of 1, 2 and 4 widths, each of two blocks.

    Block l of L is dropped with probability l/L · 0.2.
    """
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False)]
    channels, number = width, 0
    for stage in range(STAGES):
        for block in range(BLOCKS_PER_STAGE):
            number += 1
            drop = STOCHASTIC_DEPTH * number / (STAGES * BLOCKS_PER_STAGE)
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(ResidualBlock(channels, width * 2**stage, stride, drop))
            channels = width * 2**stage
    head = [
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(DROPOUT),
    ]
    return nn.Sequential(*layers, *head, nn.Linear(channels, CLASSES))


# ----------------------------------------------------------------------------------------- the arms


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A network and how it is trained.

    Args:
        network: its size.
        teacher: the name of the arm that labels; None: it learns from the labeled pictures alone.
        ratio: unlabeled pictures in a batch for each labeled one.
        pool: how many unlabeled pictures there are.
        share: the uniform share of the selected pictures that are learned from.
        augmentation: of labeled pictures, and of unlabeled ones where they have ``all`` noise.
        unlabeled_noise: as ``--unlabeled-noise`` of the command.
        noisy_teacher: the teacher labels augmented pictures, with dropout and stochastic depth.
        balanced: classes are filled up to the largest by copies.
        training: on both kinds of pictures, or first on the unlabeled ones.
        percent: of the usual steps.
        warm: begin with the teacher's weights, at a rate that ends as usual.
    """

    network: Literal["S", "M", "L"]
    teacher: str | None = None
    ratio: int = 1
    pool: int = UNLABELED
    share: float = 1.0
    augmentation: Literal["strong", "standard"] = "strong"
    unlabeled_noise: Literal["all", "standard", "model", "none"] = "all"
    noisy_teacher: bool = False
    balanced: bool = True
    training: Literal["joint", "pretrain", "pretrain_finetune"] = "joint"
    percent: int = 100
    warm: bool = False


def same_teacher(network: Literal["S", "M", "L"], **changes: object) -> Arm:
    """Return an arm whose teacher is a supervised network of its own size."""
    return Arm(network=network, teacher=f"{network} supervised", **changes)  # type: ignore[arg-type]


# The unlabeled pictures of Table 6's first column are as many as the labeled ones, with standard
# augmentation.
FEW = {"pool": 1_000, "augmentation": "standard"}
BEST = "L, third round"
SHARES = (1 / 64, 1 / 16, 1 / 4)
PERCENTS = (10, 20, 40, 80)

ARMS: dict[str, Arm] = {
    # Table 6.
    "M supervised": Arm(network="M"),
    "M": same_teacher("M"),
    "M without augmentation": same_teacher("M", unlabeled_noise="model"),
    "M without any noise": same_teacher("M", unlabeled_noise="none"),
    "M, noisy teacher": same_teacher("M", noisy_teacher=True),
    # Tables 12 and 14, as far as these need no other teacher.
    "M without balancing": same_teacher("M", balanced=False),
    "M, 3:1": same_teacher("M", ratio=3),
    # Table 7.
    "L, first round": Arm(network="L", teacher="M supervised", ratio=3),
    "L, second round": Arm(network="L", teacher="L, first round", ratio=3),
    BEST: Arm(network="L", teacher="L, second round", ratio=6),
    # Table 6, few unlabeled pictures.
    "M supervised, standard": Arm(network="M", augmentation="standard"),
    "M, few": Arm(network="M", teacher="M supervised, standard", **FEW),  # type: ignore[arg-type]
    "M, few, without augmentation": Arm(
        network="M",
        teacher="M supervised, standard",
        unlabeled_noise="model",
        **FEW,  # type: ignore[arg-type]
    ),
    "M, few, without any noise": Arm(
        network="M",
        teacher="M supervised, standard",
        unlabeled_noise="none",
        **FEW,  # type: ignore[arg-type]
    ),
    "M, few, noisy teacher": Arm(
        network="M",
        teacher="M supervised, standard",
        noisy_teacher=True,
        **FEW,  # type: ignore[arg-type]
    ),
    # Table 9.
    "S supervised": Arm(network="S"),
    "L supervised": Arm(network="L"),
    "S": same_teacher("S"),
    "L, 3:1": same_teacher("L", ratio=3),
    "S, best teacher": Arm(network="S", teacher=BEST, unlabeled_noise="standard"),
    "M, best teacher": Arm(network="M", teacher=BEST, ratio=3, unlabeled_noise="standard"),
    # Table 12.
    "S without balancing": same_teacher("S", balanced=False),
    # Table 14.
    "L, best teacher, 1:1": Arm(network="L", teacher=BEST, ratio=1),
    "L, best teacher, 3:1": Arm(network="L", teacher=BEST, ratio=3),
    "L, best teacher, 6:1": Arm(network="L", teacher=BEST, ratio=6),
    # Table 13.
    "S, pretraining only": same_teacher("S", training="pretrain"),
    "S, pretraining + finetuning": same_teacher("S", training="pretrain_finetune"),
    "M, pretraining only": same_teacher("M", training="pretrain"),
    "M, pretraining + finetuning": same_teacher("M", training="pretrain_finetune"),
    # Table 11.
    "M, S supervised": Arm(network="M", teacher="S supervised"),
    "L, M supervised": Arm(network="L", teacher="M supervised"),
    "L": same_teacher("L"),
    # Table 10.
    **{f"M, 1/{round(1 / share)}": same_teacher("M", share=share) for share in SHARES},
    # Table 15.
    **{
        f"S, warm, {percent} %": same_teacher("S", warm=True, percent=percent)
        for percent in PERCENTS
    },
}
"""By name, in the order in which they are run; an arm stands behind the one that labels for it."""


class Line(NamedTuple):
    """A line of a table.

    The arm, the arm that it is compared with, and their top-1 accuracies on ImageNet in %.
    """

    arm: str
    against: str | None = None
    paper: float | None = None
    paper_against: float | None = None


TABLES: dict[str, tuple[Line, ...]] = {
    "Table 6, noise (B5; 1.3M and 130M unlabeled pictures)": (
        Line("M, few", "M supervised, standard", 83.9, 83.3),
        Line("M, few, without augmentation", "M, few", 83.6, 83.9),
        Line("M, few, without any noise", "M, few", 83.2, 83.9),
        Line("M, few, noisy teacher", "M, few", 83.7, 83.9),
        Line("M", "M supervised", 85.1, 84.0),
        Line("M without augmentation", "M", 84.6, 85.1),
        Line("M without any noise", "M", 84.3, 85.1),
        Line("M, noisy teacher", "M", 84.4, 85.1),
    ),
    "Table 7, rounds (B7, then L2; ratios 14, 14, 28; here 3, 3, 6)": (
        Line("L, first round", "M supervised", 87.6, 85.0),
        Line("L, second round", "L, first round", 88.1, 87.6),
        Line("L, third round", "L, second round", 88.4, 88.1),
    ),
    "Table 9, teacher capacity (B0, B4, B7; best teacher L2)": (
        Line("S", "S supervised", 78.1, 77.3),
        Line("S, best teacher", "S", 78.8, 78.1),
        Line("M, 3:1", "M supervised", 84.4, 83.2),
        Line("M, best teacher", "M, 3:1", 85.3, 84.4),
        Line("L, 3:1", "L supervised", 86.4, 85.0),
    ),
    "Table 12, balancing (B0, B2)": (
        Line("S without balancing", "S", 77.6, 77.9),
        Line("M without balancing", "M", 80.6, 80.7),
    ),
    "Table 14, batch ratio (B4; L2)": (
        Line("M, 3:1", "M", 84.0, 84.0),
        Line("L, best teacher, 3:1", "L, best teacher, 1:1", 87.4, 86.7),
        Line("L, best teacher, 6:1", "L, best teacher, 3:1", 87.9, 87.4),
    ),
    "Table 13, joint training (B0, B2)": (
        Line("S, pretraining only", "S", 72.6, 77.9),
        Line("S, pretraining + finetuning", "S", 77.5, 77.9),
        Line("M, pretraining only", "M", 75.9, 80.7),
        Line("M, pretraining + finetuning", "M", 80.3, 80.7),
    ),
    "Table 11, student capacity (B0 to B1; B4 to B5)": (
        Line("M, S supervised", "S", 79.5, 77.9),
        Line("L, M supervised", "M", 84.7, 84.0),
    ),
    "Table 10, unlabeled size (B4)": (
        Line("M, 1/64", "M", 83.3, 84.0),
        Line("M, 1/16", "M", 83.9, 84.0),
        Line("M, 1/4", "M", 83.8, 84.0),
    ),
    "Table 15, warm start (B0; lengths of 350 epochs)": (
        Line("S, warm, 10 %", "S", 77.4, 77.9),
        Line("S, warm, 20 %", "S", 77.5, 77.9),
        Line("S, warm, 40 %", "S", 77.7, 77.9),
        Line("S, warm, 80 %", "S", 77.8, 77.9),
    ),
}


# ----------------------------------------------------------------------------------------- the data


class Drawn(NamedTuple):
    """What a seed draws: bytes (n, 1, 14, 14) with labels (n,)."""

    labeled: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    unlabeled: Tensor
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """Where a run is: the seed, where the pictures and networks are, and how much is run."""

    seed: int
    source: Path
    networks: Path
    is_miniature: bool

    def steps(self, usual: int) -> int:
        return max(2, usual // 500) if self.is_miniature else usual


def standard_view() -> View:
    """Return the standard augmentation.

    Pictures are moved by up to two pixels, and half of them mirrored.
    """
    return Weak(2, flip=True)


def noisy_view() -> View:
    """Return the strong view of ``metapl noisy-student images``, and a flip."""
    return Pictures(mirror=True, recolor=False, grey=True, image_size=SIDE).views().strong


@lru_cache(maxsize=1)
def all_pictures(source: Path, is_miniature: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training pictures (n, 1, 14, 14) as bytes, their labels, and those to test on.

    In miniature, digits.
    """
    if is_miniature:
        split = load_digits_split(40, 0)
        images = torch.cat([split.labeled[0], split.unlabeled, split.test[0]])
        labels = torch.cat([split.labeled[1], split.unlabeled_truth, split.test[1]])
        levels = F.interpolate(images * 255, (SIDE, SIDE), mode="bilinear").round().to(torch.uint8)
        count = len(images) - len(split.test[0])
        return levels[:count], labels[:count], levels[count:], labels[count:]
    parts: list[Tensor] = []
    for part in ("train", "t10k"):
        pictures = halved(idx_pictures(source / f"{part}-images-idx3-ubyte.gz"))
        parts.append(torch.from_numpy(pictures)[:, None])
        parts.append(torch.tensor(idx_labels(source / f"{part}-labels-idx1-ubyte.gz")).long())
    return parts[0], parts[1], parts[2], parts[3]


@lru_cache(maxsize=1)
def drawn(seed: int, source: Path, is_miniature: bool) -> Drawn:
    """Draw the pictures of a seed."""
    x, y, test_x, test_y = all_pictures(source, is_miniature)
    per_class, validation, unlabeled = LABELS_PER_CLASS, VALIDATION, UNLABELED
    if is_miniature:
        per_class, validation, unlabeled = 4, 40, 200
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    labeled = torch.cat([order[y[order] == c][:per_class] for c in range(CLASSES)])
    is_free = torch.ones(len(x), dtype=torch.bool)
    is_free[labeled] = False
    others = order[is_free[order]]
    held_out, many = others[:validation], others[validation : validation + unlabeled]
    return Drawn((x[labeled], y[labeled]), (x[held_out], y[held_out]), x[many], (test_x, test_y))


# ----------------------------------------------------------------------------------------- the runs


def train(name: str, setting: Setting) -> nn.Module:
    """Train the network of an arm, or read the weights that it was left with before."""
    arm = ARMS[name]
    kept = setting.networks / f"{setting.seed}-{digest(name)}.safetensors"
    network = residual_network(WIDTHS[arm.network])
    if kept.exists():
        network.load_state_dict(load_file(kept))
        return network
    # The name of an arm enters the seed of its draws; those of the labeled pictures are the same
    # for all.
    seed = fold_in(setting.seed, int(hashlib.sha256(name.encode()).hexdigest()[:12], 16))
    if arm.teacher is None:
        torch.manual_seed(seed)
        network = residual_network(WIDTHS[arm.network])
        fit(network, (CrossEntropy(),), labeled_batches(arm, setting), None, arm, setting)
    else:
        teacher = train(arm.teacher, setting)
        pairs = pseudo_labeled(arm, teacher, setting, seed)
        torch.manual_seed(seed)
        network = residual_network(WIDTHS[arm.network])
        if arm.warm:
            network.load_state_dict(teacher.state_dict())
        loss = NoisyStudentLoss(model_noise=arm.unlabeled_noise != "none")
        if arm.training == "joint":
            fit(network, (loss,), labeled_batches(arm, setting), pairs, arm, setting)
        else:
            fit(network, (loss,), pairs, None, arm, setting)
        if arm.training == "pretrain_finetune":
            slow = torch.optim.SGD(network.parameters(), lr=FINETUNE_RATE, momentum=0.9)
            trainer = LossTrainer(network, (CrossEntropy(),), optimizer=slow)
            steps = setting.steps(FINETUNE_STEPS)
            trainer.fit(
                labeled_batches(arm, setting),
                steps=steps,
                log_every=steps,
                progress=False,
                schedule="cosine",
            )
    kept.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: t.contiguous() for key, t in network.state_dict().items()}, kept)
    return network


def digest(name: str) -> str:
    """Return what tells a trained network apart.

    The settings of its arm, and of all that labeled before it.
    """
    chain = ""
    teacher: str | None = name
    while teacher is not None:
        chain += repr(ARMS[teacher])
        teacher = ARMS[teacher].teacher
    return hashlib.sha256(f"{name} {chain}".encode()).hexdigest()[:16]


def fit(
    network: nn.Module,
    losses: tuple,
    outer: object,
    inner: object,
    arm: Arm,
    setting: Setting,
) -> None:
    """Train by SGD with Nesterov's momentum and the paper's schedule.

    A shorter run ends at the usual rate.
    """
    usual = setting.steps(STEPS)
    steps = setting.steps(STEPS * arm.percent // 100)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=RATE * end_matched(steps, usual),
        momentum=0.9,
        nesterov=True,
        weight_decay=WEIGHT_DECAY,
    )
    trainer = LossTrainer(network, losses, optimizer=optimizer)
    trainer.fit(
        outer,
        inner,
        steps=steps,
        schedule="exponential",
        decay_every=decay_interval(usual),
        log_every=steps,
        progress=False,
    )


def labeled_batches(arm: Arm, setting: Setting) -> LabeledBatches:
    x, y = drawn(setting.seed, setting.source, setting.is_miniature).labeled
    view = standard_view() if arm.augmentation == "standard" else noisy_view()
    sampler = StepSampler(len(y), LABELED_BATCH, seed=setting.seed)
    return LabeledBatches(MemoryImages(x), y, sampler, view, setting.seed)


def pseudo_labeled(
    arm: Arm, teacher: nn.Module, setting: Setting, seed: int
) -> PseudoLabeledBatches:
    """Let the teacher label, select, and return batches with the noise of the arm."""
    pictures = drawn(setting.seed, setting.source, setting.is_miniature).unlabeled[: arm.pool]
    x = in_unit_range(pictures)
    labeler = teacher
    if arm.noisy_teacher:
        view = standard_view() if arm.augmentation == "standard" else noisy_view()
        labeler = Noised(teacher, seed)
        x = torch.cat(
            [
                view(part, seed=seed, step=number, examples=torch.arange(len(part)))
                for number, part in enumerate(x.split(500))
            ]
        )
    distributions = logits_of(labeler, x.split(500)).softmax(dim=1)
    positions = selected(distributions, arm, setting.seed)
    view = Identity()
    if arm.unlabeled_noise == "all":
        view = standard_view() if arm.augmentation == "standard" else noisy_view()
    elif arm.unlabeled_noise == "standard":
        view = standard_view()
    return PseudoLabeledBatches(
        MemoryImages(pictures[positions]),
        StepSampler(len(positions), arm.ratio * LABELED_BATCH, seed=seed, stream=1),
        view,
        None,
        seed,
        chosen=Chosen(positions, positions, lambda rows: distributions[rows]),
    )


def selected(distributions: Tensor, arm: Arm, seed: int) -> Tensor:
    """Return the numbers of the pictures that are learned from, each as often as it counts."""
    is_reached = bool((distributions.max(dim=1).values > THRESHOLD).any())
    with tempfile.TemporaryDirectory() as folder:
        every, kept = Path(folder, "every"), Path(folder, "kept")
        with LabelWriter(every, list("0123456789"), provenance={}) as writer:
            writer.add(range(len(distributions)), distributions)  # type: ignore[arg-type]
        select(
            LabelStore(every),
            kept,
            threshold=THRESHOLD if is_reached else 0.0,
            balance=arm.balanced,
            share=None if arm.share == 1.0 else arm.share,
            seed=seed,
        )
        store = LabelStore(kept)
        return torch.from_numpy(store.column("id"))[store.rows_with_copies()]


def accuracy(network: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    return evaluated(network, EvaluationBatches(MemoryImages(part[0]), part[1], 500)).accuracy


# ---------------------------------------------------------------------------------------- the study


def study(
    out: Path, source: Path, networks: Path, *, hours: float | None, is_miniature: bool
) -> None:
    """Run the arms that have no row yet, until the hours are over."""
    began = time.monotonic()

    def is_over() -> bool:
        return hours is not None and time.monotonic() - began > 3600 * hours

    def run(arm: str, seed: int, settings: Row) -> Row:
        start, cpu = time.monotonic(), time.process_time()
        setting = Setting(seed, source, networks, is_miniature)
        network = train(arm, setting)
        pictures = drawn(seed, source, is_miniature)
        return {
            "labeled": accuracy(network, pictures.labeled),
            "validation": accuracy(network, pictures.validation),
            "test": accuracy(network, pictures.test),
            "seconds": round(time.monotonic() - start, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
        }

    def jobs() -> Iterator[Row]:
        for name in [*ARMS][:: 5 if is_miniature else 1]:
            for seed in SEEDS[:2] if is_miniature else SEEDS:
                if is_over():
                    return
                yield {"arm": name, "seed": seed, "settings": dataclasses.asdict(ARMS[name])}

    harness.go_on(out, jobs(), run, about=harness.environment())


# --------------------------------------------------------------------------------------- the tables


def tested(rows: Sequence[Row], name: str) -> dict[int, float]:
    """Return the test accuracies of an arm by seed."""
    settings = dataclasses.asdict(ARMS[name])
    return {
        row["seed"]: row["test"]
        for row in rows
        if row.get("arm") == name and row["settings"] == settings
    }


def block(rows: Sequence[Row]) -> str:
    """Return the tables, of the arms that have been run; and what has not."""
    arms = [row for row in rows if "arm" in row]
    missing = [name for name in ARMS if not tested(arms, name)]
    fewer = [name for name in ARMS if 0 < len(tested(arms, name)) < len(SEEDS)]
    parts: list[str] = []
    head = ["arm", "here", "against", "difference", "95 %", "p", "paper", "its difference"]
    for title, lines in TABLES.items():
        cells: list[list[str]] = []
        for line in lines:
            own = tested(arms, line.arm)
            if not own:
                continue
            other = {} if line.against is None else tested(arms, line.against)
            both = [seed for seed in own if seed in other]
            compared = [NONE] * 3
            if both:
                first, second = [own[seed] for seed in both], [other[seed] for seed in both]
                gain, p = harness.difference(first, second)
                compared = [gain, harness.between(first, second), p]
            paper, difference = NONE, NONE
            if line.paper is not None:
                paper = f"{line.paper:.1f}"
                if line.paper_against is not None:
                    difference = f"{line.paper - line.paper_against:+.1f}"
            here = f"{harness.spread([*own.values()])} (n = {len(own)})"
            cells.append([line.arm, here, line.against or NONE, *compared, paper, difference])
        if cells:
            parts.append(f"**{title}**\n\n{harness.grid(head, cells, 'lrlrrrrr')}")
    supervised = [
        name for name in ARMS if name.endswith(("supervised", "standard")) and tested(arms, name)
    ]
    lines = [[name, harness.spread([*tested(arms, name).values()])] for name in supervised]
    if lines:
        parts.insert(
            0,
            "**Trained on the labeled pictures "
            f"alone**\n\n{harness.grid(['arm', 'here'], lines, 'lr')}",
        )
    said = f"Of {len(ARMS)} arms {len(ARMS) - len(missing)} have been run."
    if fewer:
        said += f" Not by all {len(SEEDS)} seeds: {'; '.join(fewer)}."
    if missing:
        said += f" Not run: {'; '.join(missing)}."
    return "\n\n".join([*parts, said])


def main() -> None:
    parser = harness.arguments(__doc__, RAW)
    parser.add_argument(
        "--source", type=Path, default=SOURCE, help="the folder of Fashion-MNIST's four files"
    )
    parser.add_argument(
        "--networks", type=Path, help=f"where trained networks are kept, which label; {NETWORKS}"
    )
    parser.add_argument("--hours", type=float, help="begin no run after these hours")
    arguments = harness.parsed(parser)
    torch.set_num_threads(1)
    if arguments.runs:
        if (
            not arguments.miniature
            and not (arguments.source / "train-images-idx3-ubyte.gz").exists()
        ):
            sys.exit(
                f"--source {arguments.source} has no Fashion-MNIST: install "
                "dataset-fashion-mnist, or name a folder."
            )
        study(
            arguments.out,
            arguments.source,
            arguments.networks
            or (arguments.out.parent / "networks" if arguments.miniature else NETWORKS),
            hours=arguments.hours,
            is_miniature=arguments.miniature,
        )
    harness.show(arguments.write, "noisy-student-fashion", block(harness.read(arguments.out)))


if __name__ == "__main__":
    main()
