"""A folder of pictures whose labels may be wrong, and one with a few whose labels are right.

``metapl train noisy``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import tyro
from torch import Tensor, nn

from metapl import feedback
from metapl.ablation import Altered
from metapl.apps.images import (
    EVALUATED_AT_ONCE,
    Folder,
    Minutes,
    OfPictures,
    OtherFolder,
    Pictures,
    refuse_errors,
)
from metapl.apps.methods import Data, Doubtful, Method, Trained, Training
from metapl.apps.network_weights import parameter_groups
from metapl.apps.pictures.batches import EvaluationBatches, Images, LabeledBatches
from metapl.apps.pictures.folders import LabeledFiles, check_folders, same_pictures, scan_labeled
from metapl.apps.settings import Batch, Fitting, Flat, Hidden, SomeSteps, unset
from metapl.apps.tuned_networks import begin_as
from metapl.data.steps import StepSampler
from metapl.errors import MetaplError, few
from metapl.models import Corrector
from metapl.problems import (
    ExampleWeights,
    LabelCorrection,
    MetaWeightNet,
    NoiseTransition,
    Table,
    WeightNet,
)
from metapl.problems.losses import CrossEntropy
from metapl.training import Say

# logit of "no noise" in a matrix of label noise, and of the given label in a corrector, at first
TRUSTED = 4.0
WARM = 0.2  # share of the steps on labels as they are given, before anything is learned about them
PLAIN = (CrossEntropy(),)

# The learning rates of what is learned about labels, by AdamW, and what it is called.
RATES = {
    "example_weights": 0.1,
    "meta_weight_net": 1e-3,
    "label_correction": 1e-3,
    "noise_transition": 0.05,
}
TITLES = {
    "example_weights": "learned weights of examples",
    "meta_weight_net": "weights learned from losses",
    "label_correction": "learned corrections of labels",
    "noise_transition": "a learned matrix of label noise",
}
ALTERED = {"permuted": "feedback permuted", "random_sign": "feedback with random signs"}
LearnedKind = Literal["example_weights", "meta_weight_net", "label_correction", "noise_transition"]


@dataclass(frozen=True, kw_only=True)
class Plain(Method):
    """All labels as they are, or the clean ones alone."""

    clean_alone: Hidden[bool] = False

    @property
    def name(self) -> str:
        return "clean" if self.clean_alone else "plain"

    @property
    def title(self) -> str:
        return "plain, clean labels alone" if self.clean_alone else "plain, given and clean labels"

    def train(self, t: Training) -> Trained:
        return t.alone(
            t.student, PLAIN, labeled=t.data.labeled if self.clean_alone else t.data.everything
        )


@dataclass(frozen=True, kw_only=True)
class Learned(Method):
    """Something about labels is learned from what helps on the clean ones.

    A weight for each picture (example_weights), a weight as a function of its loss
    (meta_weight_net), another network that corrects labels (label_correction), or how often each
    class is taken for each other (noise_transition).

    Args:
        mode: forward or difference.
        warm_steps: on all labels as they are; 20 %.
        feedback: whole, or an altered control.

    Source: the papers that :mod:`metapl.problems` names beside each problem.
    """

    kind: Hidden[LearnedKind] = "example_weights"
    mode: Annotated[Literal["forward", "difference"], tyro.conf.arg(metavar="MODE")] = "forward"
    warm_steps: Annotated[SomeSteps | None, unset()] = None
    feedback: Annotated[
        Literal["whole", "permuted", "random_sign"], tyro.conf.arg(metavar="KIND")
    ] = "whole"

    @property
    def name(self) -> str:
        return self.kind if self.feedback == "whole" else f"{self.kind}_{self.feedback}"

    @property
    def title(self) -> str:
        how = "" if self.feedback == "whole" else f", {ALTERED[self.feedback]}"
        return f"{TITLES[self.kind]}{how}"

    def scheduled(self, steps: int) -> Self:
        warm = round(WARM * steps) if self.warm_steps is None else self.warm_steps
        if warm >= steps:
            raise MetaplError(
                f"--warm-steps {warm:,}: expected fewer steps than the {steps:,} of the training."
            )
        return dataclasses.replace(self, warm_steps=warm)

    def train(self, t: Training) -> Trained:
        fitting, classes, warm = t.config.fitting, len(t.data.classes), self.warm_steps or 0
        problem: Any
        learned: nn.Module
        noisy = t.data.unlabeled
        if self.kind == "example_weights":
            problem, learned = ExampleWeights(), Table(torch.zeros(len(noisy.images)))
            noisy = IndexedBatches(
                **{each.name: getattr(noisy, each.name) for each in dataclasses.fields(noisy)}
            )
        elif self.kind == "meta_weight_net":
            problem, learned = MetaWeightNet(), WeightNet()
        elif self.kind == "label_correction":
            network = t.config.network().to(t.place)
            begin_as(t.student, network)
            problem, learned = LabelCorrection(), Corrector(network, classes, TRUSTED)
        else:
            problem, learned = NoiseTransition(), Table(TRUSTED * torch.eye(classes))
        teacher = learned.to(t.place)
        if warm:
            # While the network knows nothing yet, whatever it learns from helps it, and all weights
            # would grow.
            first = {
                "steps": warm,
                "schedule": "constant",
                "select": False,
                "warmup": min(fitting.warmup, warm),
            }
            t.alone(t.student, PLAIN, labeled=t.data.everything, phase="warm", **first)
        mode: Any = feedback.estimator(self.mode)
        if self.feedback != "whole":
            mode = Altered(mode, self.feedback, seed=fitting.seed)
        groups = parameter_groups(teacher, 0.0)
        own = torch.optim.AdamW(groups, lr=RATES[self.kind])
        options = {"outer_optimizer": own, "student_lr": fitting.lr}
        trainer = t.bilevel(teacher, mode, problem, teacher_losses=(), **options)
        # The warm steps above stand for the first steps that the problem names.
        rest = {
            "steps": fitting.steps - warm,
            "warmup": 0 if warm else fitting.warmup,
            "first_steps": 0,
        }
        return Trained(trainer, t.fit(trainer, t.data.labeled, noisy, **rest))


METHODS: dict[str, Any] = {
    **{kind: Learned(kind=kind) for kind in RATES},  # type: ignore[arg-type]  # the same words
    "plain": Plain(),
    "clean": Plain(clean_alone=True),
    **{
        f"{kind}_{how}": Learned(kind=kind, feedback=how)  # type: ignore[arg-type]
        for kind in RATES
        for how in ALTERED
    },
}
COMPARED = ("plain", "clean")


@dataclass(frozen=True, eq=False)
class IndexedBatches(LabeledBatches):
    """Item t is (x, y, i): images, their labels, and their positions in the data set."""

    @property
    def columns(self) -> dict[str, Tensor]:
        return {"labels": self.labels, "indices": torch.arange(len(self.labels))}


@dataclass(frozen=True, kw_only=True)
class Noisy(OfPictures):
    """Train on pictures some of which are in the folder of a wrong class, and a few whose labels are right.

    What is not given is chosen by looking at the pictures, and by how many steps fit into the
    minutes.

    Args:
        labeled: with doubtful labels, in a folder a class.
        clean: a few with right labels, likewise.
        val: more with right labels, to select on.
        test: more with right labels, to report on.
        clean_batch: pictures of --clean in a batch.
        minutes: for as many steps as fit; by default 5.
    """

    name: ClassVar[str] = "noisy"
    places: ClassVar[tuple[str, ...]] = ("labeled", "clean", "val", "test")
    few_and_many: ClassVar[tuple[str, str]] = ("clean", "labeled")
    batch_of_few: ClassVar[str] = "clean_batch"
    known: ClassVar[str] = "clean pictures"
    said: ClassVar[str] = (
        "{many:,} pictures of {classes} with labels that may be wrong, {few:,} with clean ones"
    )

    labeled: Folder
    clean: Folder
    val: OtherFolder = None
    test: OtherFolder = None
    clean_batch: Batch = 32
    minutes: Minutes = None
    pictures: Flat[Pictures] = field(default_factory=Pictures)
    fitting: Flat[Fitting] = field(
        default_factory=lambda: Fitting(ema_decay=0.99, labeled_batch=64)
    )
    val_fraction: Hidden[float | None] = 0.0  # nothing is set aside of the few
    classes: Hidden[tuple[str, ...]] = ()

    def check_first(self) -> None:
        first, second = (
            Path(folder).expanduser().resolve() for folder in (self.labeled, self.clean)
        )
        if first == second or first in second.parents or second in first.parents:
            how = "the same folder" if first == second else "one inside the other"
            raise MetaplError(
                f"--labeled {self.labeled} and --clean {self.clean} are {how}; expected two "
                "folders, so that the clean labels are told from those that may be wrong."
            )
        clean, noisy = scan_labeled(self.clean), scan_labeled(self.labeled)
        refuse_errors(check_folders(clean))
        without = [
            f"{few(missing)} in {one.root} alone"
            for one, other in ((noisy, clean), (clean, noisy))
            if (missing := [name for name in one.classes if name not in other.classes])
        ]
        if without:
            raise MetaplError(
                f"classes differ: {'; '.join(without)}; expected subfolders of the same names in "
                "both."
            )
        if empty := [name for name, count in noisy.counts().items() if not count]:
            raise MetaplError(
                f"no picture of {few(empty)} in {noisy.root}; put some there, or remove it from "
                f"{clean.root} too."
            )
        if pairs := [f"{same[0]} is {copies[0]}" for copies, same in same_pictures(noisy, clean)]:
            raise MetaplError(
                f"{len(pairs)} clean pictures are among the labeled ones too: {few(pairs)}; remove "
                f"them from {noisy.root}: labels are judged on clean pictures that the network was "
                "not trained on."
            )

    def data(self, say: Say, progress: bool, log: Path | None) -> Data:
        self.check_first()
        return super().data(say, progress, log)

    def sources(self, few: LabeledFiles, many: LabeledFiles, log: Path | None) -> dict[str, Any]:
        """Clean pictures are the labeled ones, the others with their labels the unlabeled ones.

        And both together.
        """
        views, seed, size = self.pictures.views(), self.fitting.seed, self.fitting.labeled_batch
        # Noisy and clean pictures are together in one list of files.
        both, count = self.pictures.images([*many.paths(), *few.paths()], log), len(many)
        labels = torch.cat([many.targets(self.classes), few.targets(self.classes)])
        noisy, clean = both.select(torch.arange(count)), both.select(torch.arange(count, len(both)))
        given, right = labels[:count], labels[count:]

        def of(
            images: Images, labels: Tensor, size: int, stream: int, seed: int, view: str
        ) -> LabeledBatches:
            sampler = StepSampler(len(images), size, seed=self.fitting.seed, stream=stream)
            return LabeledBatches(images, labels, sampler, views[view], seed, crop=views["crop"])

        examples = EvaluationBatches(noisy, torch.arange(count), EVALUATED_AT_ONCE)
        return {
            "labeled": of(clean, right, self.clean_batch, 0, seed, "labeled"),
            "unlabeled": of(noisy, given, size, 1, seed + 2, "labeled"),
            "finetuning": of(clean, right, self.clean_batch, 2, seed + 1, "finetuned"),
            "everything": of(both, labels, size, 0, seed, "labeled"),
            "doubtful": Doubtful(examples, given, tuple(many.paths())),
        }
