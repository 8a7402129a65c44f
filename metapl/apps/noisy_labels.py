"""``metapl train noisy``: many pictures whose labels may be wrong, and a few with right labels."""

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
from metapl.apps.methods import CONTROLS, Data, Doubtful, Method, Trained, Training
from metapl.apps.settings import Batch, Fitting, Flat, Hidden, SomeSteps, unset
from metapl.data.steps import StepSampler
from metapl.errors import MetaplError, few
from metapl.models import Corrector
from metapl.networks.tuned import begin_as
from metapl.networks.weights import parameter_groups
from metapl.pictures.batches import EvaluationBatches, Images, LabeledBatches
from metapl.pictures.folders import LabeledFiles, check_folders, same_pictures, scan_labeled
from metapl.pictures.views.base import View
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

# The logit, at first, of "no noise" in a matrix of label noise, and of the given label in a
# corrector.
TRUSTED = 4.0

# The share of the steps on labels as they are given, before anything is learned about them.
WARM = 0.2

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

# The passes over pictures with wrong labels below which plain training is better than what is
# learned about labels: on Fashion-MNIST it is 4 points ahead in 9 passes, with wrong labels of
# three kinds, and in 45 passes it is 1 to 7 points behind.
FEW_PASSES = 20

# What the methods do, for the help.
SUMMARIES = {
    "example_weights": "Learn a weight for each picture.",
    "meta_weight_net": "Learn the weight of a picture as a function of its loss.",
    "label_correction": "Learn a second network that corrects the labels.",
    "noise_transition": "Learn how often each class is taken for each other one.",
}
LearnedKind = Literal["example_weights", "meta_weight_net", "label_correction", "noise_transition"]


@dataclass(frozen=True, kw_only=True)
class Plain(Method):
    """All labels as they are, or the clean ones alone."""

    clean_alone: Hidden[bool] = False

    @property
    def name(self) -> str:
        """Return clean for the clean labels alone, and plain for all."""
        return "clean" if self.clean_alone else "plain"

    @property
    def title(self) -> str:
        """Return which labels are learned, in words."""
        return "plain, clean labels alone" if self.clean_alone else "plain, given and clean labels"

    @property
    def summary(self) -> str:
        """Return which labels are learned, in a sentence for the help."""
        if self.clean_alone:
            return "Train on the pictures of --clean alone."
        return "Train on all pictures, with their labels as they are."

    def train(self, t: Training) -> Trained:
        """Train the student by itself."""
        labeled = t.data.labeled if self.clean_alone else t.data.everything
        return t.alone(t.student, PLAIN, labeled=labeled)


@dataclass(frozen=True, kw_only=True)
class Learned(Method):
    """Something about labels is learned from what helps on the clean ones.

    A weight for each picture (example_weights), a weight as a function of its loss
    (meta_weight_net), another network that corrects labels (label_correction), or how often each
    class is taken for each other (noise_transition).

    Args:
        mode: how the feedback is computed: forward is exact, difference an approximation.
        warm_steps: number of steps on all labels as they are, at the start. By default it is 20 %
            of the steps.
        feedback: what is learned from: whole is the feedback itself, permuted and random_sign are
            controls.

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
        """Return the kind, and how the feedback is altered."""
        return self.kind if self.feedback == "whole" else f"{self.kind}_{self.feedback}"

    @property
    def title(self) -> str:
        """Return what is learned, and how the feedback is altered, in words."""
        if self.feedback == "whole":
            return TITLES[self.kind]
        return f"{TITLES[self.kind]}, {ALTERED[self.feedback]}"

    @property
    def is_control(self) -> bool:
        """Return whether the feedback is altered."""
        return self.feedback != "whole"

    @property
    def summary(self) -> str:
        """Return what is learned, in a sentence for the help."""
        if self.is_control:
            return f"Train as {self.kind} does, {CONTROLS[self.feedback]}."
        return SUMMARIES[self.kind]

    def scheduled(self, steps: int) -> Self:
        """Return the method with a number of warm steps."""
        warm_steps = self.warm_steps
        if warm_steps is None:
            warm_steps = round(WARM * steps)
        if warm_steps >= steps:
            raise MetaplError(
                f"--warm-steps {warm_steps:,}: expected fewer steps than the {steps:,} of the "
                "training."
            )
        return dataclasses.replace(self, warm_steps=warm_steps)

    def train(self, t: Training) -> Trained:
        """Train on the labels as they are, then beside what is learned about them."""
        fitting = t.config.fitting
        steps = fitting.chosen_steps
        warmup = fitting.warmup or 0
        warm_steps = self.warm_steps or 0
        problem, learned = self._problem(t)
        teacher = learned.to(t.place)
        if warm_steps:
            # While the network knows nothing yet, whatever it learns from helps it, and all weights
            # would grow.
            t.alone(
                t.student,
                PLAIN,
                labeled=t.data.everything,
                phase="warm",
                steps=warm_steps,
                schedule="constant",
                select=False,
                warmup=min(warmup, warm_steps),
            )
        mode: Any = feedback.estimator(self.mode)
        if self.feedback != "whole":
            mode = Altered(mode, self.feedback, seed=fitting.seed)
        groups = parameter_groups(teacher, 0.0)
        trainer = t.bilevel(
            teacher,
            mode,
            problem,
            teacher_losses=(),
            outer_optimizer=torch.optim.AdamW(groups, lr=RATES[self.kind]),
            student_lr=fitting.lr,
        )
        noisy = t.data.unlabeled
        if self.kind == "example_weights":
            fields = {field.name: getattr(noisy, field.name) for field in dataclasses.fields(noisy)}
            noisy = IndexedBatches(**fields)
        result = t.fit(
            trainer,
            t.data.labeled,
            noisy,
            steps=steps - warm_steps,
            warmup=0 if warm_steps else warmup,
            # The warm steps stand for the first steps that the problem names.
            first_steps=0,
        )
        return Trained(trainer, result)

    def _problem(self, t: Training) -> tuple[Any, nn.Module]:
        """Return the problem, and the small module that learns about labels."""
        classes = len(t.data.classes)
        if self.kind == "example_weights":
            return ExampleWeights(), Table(torch.zeros(len(t.data.unlabeled.images)))
        if self.kind == "meta_weight_net":
            return MetaWeightNet(), WeightNet()
        if self.kind == "label_correction":
            network = t.config.network().to(t.place)
            begin_as(t.student, network)
            return LabelCorrection(), Corrector(network, classes, TRUSTED)
        return NoiseTransition(), Table(TRUSTED * torch.eye(classes))


@dataclass(frozen=True, kw_only=True)
class WeightsOrPlain(Learned):
    """Learn a weight for each picture where the steps are many enough, or train plainly.

    Of a weight little is learned from one pass over the pictures, and a step that learns weights
    takes the time of two to four plain ones. So where the steps pass over the pictures fewer than
    20 times, all labels are learned as they are. Who asks for another setting of the weights than
    the usual ones gets weights. docs/label-noise.md has what both reach in one minute and in five.
    """

    name: ClassVar[str] = "auto"
    title: ClassVar[str] = "learned weights, or plain training"

    @property
    def summary(self) -> str:
        """Return what the method does, in a sentence for the help."""
        return "Learn a weight for each picture, or train plainly where the steps are few."

    @property
    def learned(self) -> Learned:
        """Return the method that learns weights, with the settings of this one."""
        return Learned(mode=self.mode, warm_steps=self.warm_steps, feedback=self.feedback)

    @property
    def takes_plain(self) -> bool:
        """Return whether plain training may be taken: the settings of the weights are usual."""
        return self == WeightsOrPlain()

    def chosen_before(self, name: str) -> Learned | Plain:
        """Return the method of a run that is resumed, with these settings.

        A run by another method than the two is refused by whoever compares it with this one.
        """
        return Plain() if name == Plain().name else self.learned

    def scheduled(self, steps: int) -> Any:
        """Return the method that learns weights: nothing tells here what the steps pass over."""
        return self.learned.scheduled(steps)


def passes_over(config: Noisy, count: int) -> float:
    """Return how often the steps of a training pass over a number of pictures."""
    return config.fitting.chosen_steps * config.fitting.labeled_batch / count


def _methods() -> dict[str, Any]:
    """Return the methods by name: those that learn, those that do not, and the controls."""
    methods: dict[str, Any] = {"auto": WeightsOrPlain()}
    kind: Any
    altered: Any
    for kind in RATES:
        methods[kind] = Learned(kind=kind)
    methods["plain"] = Plain()
    methods["clean"] = Plain(clean_alone=True)
    for kind in RATES:
        for altered in ALTERED:
            methods[f"{kind}_{altered}"] = Learned(kind=kind, feedback=altered)
    return methods


METHODS: dict[str, Any] = _methods()
COMPARED = ("plain", "clean")


@dataclass(frozen=True, eq=False)
class IndexedBatches(LabeledBatches):
    """Batches of which item t is (x, y, i): images, labels, and positions in the data set."""

    @property
    def columns(self) -> dict[str, Tensor]:
        """Return what stands beside the images: labels and positions."""
        return {"labels": self.labels, "indices": torch.arange(len(self.labels))}


@dataclass(frozen=True, kw_only=True)
class Noisy(OfPictures):
    """Train on pictures whose labels may be wrong, and on a few whose labels are right.

    Flags that you leave out are chosen by looking at the pictures, and by how many steps fit into
    the minutes.

    Args:
        labeled: folder of pictures whose labels may be wrong, with a folder for each class in it.
        clean: folder of a few pictures with right labels, with the same folders in it.
        val: folder of other pictures with right labels, by which the best network is selected.
        test: folder of other pictures with right labels, on which the accuracy is reported at the
            end.
        clean_batch: number of pictures of --clean in each step.
        minutes: minutes that the training may take. By default it takes 5.
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

    # Nothing is set aside of the few.
    val_fraction: Hidden[float | None] = 0.0
    classes: Hidden[tuple[str, ...]] = ()

    def check_first(self) -> None:
        """Refuse folders in each other, of other classes, or with the same pictures.

        Patience is refused too where there is nothing to measure on, before anything is tried.
        """
        if self.fitting.patience is not None and self.val is None:
            raise MetaplError(
                f"--patience {self.fitting.patience} was given, and there are no validation "
                "examples to measure on; leave it out, or give them by --val."
            )
        labeled_path = Path(self.labeled).expanduser().resolve()
        clean_path = Path(self.clean).expanduser().resolve()
        is_same = labeled_path == clean_path
        if is_same or labeled_path in clean_path.parents or clean_path in labeled_path.parents:
            relation = "the same folder" if is_same else "one inside the other"
            raise MetaplError(
                f"--labeled {self.labeled} and --clean {self.clean} are {relation}; expected two "
                "folders, so that the clean labels are told from those that may be wrong."
            )
        clean = scan_labeled(self.clean)
        noisy = scan_labeled(self.labeled)
        refuse_errors(check_folders(clean))
        unmatched = []
        for files, others in ((noisy, clean), (clean, noisy)):
            missing = [name for name in files.classes if name not in others.classes]
            if missing:
                unmatched.append(f"{few(missing)} in {files.root} alone")
        if unmatched:
            raise MetaplError(
                f"classes differ: {'; '.join(unmatched)}; expected subfolders of the same names in "
                "both."
            )
        empty = [name for name, count in noisy.counts().items() if not count]
        if empty:
            raise MetaplError(
                f"no picture of {few(empty)} in {noisy.root}; put some there, or remove it from "
                f"{clean.root} too."
            )
        copied = [f"{same[0]} is {copies[0]}" for copies, same in same_pictures(noisy, clean)]
        if copied:
            raise MetaplError(
                f"{len(copied)} clean pictures are among the labeled ones too: {few(copied)}; "
                f"remove them from {noisy.root}: labels are judged on clean pictures that the "
                "network was not trained on."
            )

    def data(self, say: Say, progress: bool, log: Path | None) -> Data:
        """Return the data; refuse pictures that would be learned from and measured on."""
        self.check_first()
        return super().data(say, progress, log)

    def sources(self, few: LabeledFiles, many: LabeledFiles, log: Path | None) -> dict[str, Any]:
        """Return the clean pictures as labeled ones, the others as unlabeled ones, and both.

        The unlabeled ones come with their given labels.
        """
        seed = self.fitting.seed
        batch_size = self.fitting.labeled_batch
        views = self.pictures.views()
        count = len(many)
        # Noisy and clean pictures are together in one list of files.
        all_images = self.pictures.images([*many.paths(), *few.paths()], log)
        labels = torch.cat([many.targets(self.classes), few.targets(self.classes)])
        noisy = all_images.select(torch.arange(count))
        clean = all_images.select(torch.arange(count, len(all_images)))
        given_labels = labels[:count]
        right_labels = labels[count:]

        def batches(
            images: Images,
            labels: Tensor,
            *,
            size: int,
            stream: int,
            view_seed: int,
            view: View = views.labeled,
        ) -> LabeledBatches:
            sampler = StepSampler(len(images), size, seed=seed, stream=stream)
            return LabeledBatches(images, labels, sampler, view, view_seed, crop=views.crop)

        examples = EvaluationBatches(noisy, torch.arange(count), EVALUATED_AT_ONCE)
        return {
            "labeled": batches(
                clean, right_labels, size=self.clean_batch, stream=0, view_seed=seed
            ),
            "unlabeled": batches(
                noisy, given_labels, size=batch_size, stream=1, view_seed=seed + 2
            ),
            "finetuning": batches(
                clean,
                right_labels,
                size=self.clean_batch,
                stream=2,
                view_seed=seed + 1,
                view=views.finetuned,
            ),
            "everything": batches(all_images, labels, size=batch_size, stream=0, view_seed=seed),
            "doubtful": Doubtful(examples, given_labels, tuple(many.paths())),
        }
