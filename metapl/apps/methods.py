"""The methods by which networks are trained.

Each is a frozen type with its settings, and one function, ``train``. To add one, write its type,
and enter it by its name in the METHODS of what it is to train: metapl.apps.images, say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self

import torch
import tyro
from torch import Tensor, nn

from metapl import feedback, problems
from metapl.apps.settings import (
    Fitting,
    Role,
    Share,
    SomeSteps,
    Weight,
    flag_values,
    with_flags,
)
from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import views
from metapl.execution.numerics import wide
from metapl.models import LabelAdjuster
from metapl.networks.card import Input, NetworkCard
from metapl.pictures import LabeledBatches, UnlabeledBatches
from metapl.problems.losses import UDA, CrossEntropy, TeacherLoss
from metapl.runs.fields import AboveZero, Range, check_fields
from metapl.training import FitResult, Say, Trainer
from metapl.training.loss_trainer import LossTrainer
from metapl.training.trainer import BilevelTrainer

# Published is 0.95 (arXiv:2001.07685). With few steps this reached more.
FIXMATCH_THRESHOLD = 0.85

# The weight of the entropy in entropy minimization.
ENTROPY_WEIGHT = 0.1

# Shares of the steps: before the student of a teacher begins, before UDA begins, and of its ramp.
WAIT = 0.75
START = 0.4
RAMP = 0.1

Losses = tuple[TeacherLoss, ...]

# The modes in which a teacher can learn, which the type checker cannot read from a tuple.
if TYPE_CHECKING:
    Mode = str
else:
    Mode = Literal[tuple(mode for mode in feedback.MODES if mode != "implicit")]

# ------------------------------------------------------------------------ what a method trains with


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is trained on. Examples to look at are (inputs, labels), or batches of these.

    Args:
        labeled, unlabeled, finetuning: sources of batches for ``fit``.
        classes: names of the classes.
        record: what data.json says; a run is resumed on data of the same "hash" only.
        validation: examples to select on.
        test: examples to report on.
        truth: unlabeled examples whose labels are known, for looking at pseudo-labels only.
        test_names: what the test examples are called, such as their files.
        skipped: files that are left out, each with the reason.
    """

    labeled: Any
    unlabeled: Any
    finetuning: Any
    classes: tuple[str, ...]
    record: Mapping[str, Any]
    validation: Any = None
    test: Any = None
    truth: Any = None
    test_names: tuple[str, ...] | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)


class TrainingConfig(Protocol):
    """What is trained on, by which networks and optimizers, and how long.

    :class:`metapl.apps.images.Images` and :class:`metapl.apps.digits.Digits` are such: frozen
    dataclasses, whose fields are flags.
    """

    # What the recipe is called.
    name: ClassVar[str]

    @property
    def places(self) -> tuple[str, ...]:
        """Return the names of the fields that are folders."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes, empty until they were found."""

    @property
    def threads(self) -> int | None:
        """Return the threads of the linear algebra; None: those of the process."""

    @property
    def input(self) -> Input:
        """Return what a network takes."""

    @property
    def fitting(self) -> Fitting:
        """Return how long, how fast and in what batches is trained."""

    def data(self, say: Say, progress: bool, log: Path | None) -> Data:
        """Return the data; files that cannot be read later are listed in ``log``."""

    def network(self) -> nn.Module:
        """Build a network with fresh or pretrained weights."""

    def card(self, title: str) -> NetworkCard:
        """Describe the network for network.json."""

    def optimizer(
        self, role: Role, module: nn.Module, lr: float | None = None
    ) -> torch.optim.Optimizer:
        """Build the optimizer of a teacher, or of a student, with its rate ``lr`` or the usual."""

    def finetuner(self, module: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer that finetunes."""

    def trainer_options(self) -> dict[str, Any]:
        """Return the options of every trainer."""

    def finetuning(self) -> dict[str, Any]:
        """Return the options of the fit that finetunes."""


@dataclass(frozen=True, eq=False)
class Trained:
    """What a method ended with.

    Args:
        trainer: of the network that is kept.
        result: of the fit of that network.
        teacher: a network that is kept beside it, with its weights.
        fallback: a network that is kept where the student is far behind, with its weights.
        finetunes: whether the student is finetuned as usual; or a function that finetunes it.
        rounds: what result.json says of the rounds of Noisy Student.
        configs: settings of kept networks that are not those of the training.
    """

    trainer: Trainer
    result: FitResult
    teacher: tuple[nn.Module, Mapping[str, Tensor]] | None = None
    fallback: tuple[nn.Module, Mapping[str, Tensor]] | None = None
    finetunes: bool | Callable[[], Any] = True
    rounds: list[dict[str, Any]] | None = None
    configs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class Training:
    """What a method trains, on what, and how a phase of it is run.

    Args:
        config: the settings of the training.
        data: the data.
        teacher, student: networks with fresh weights, on their device, laid out over the processes
            that train together.
        fit: ``fit(trainer, labeled, unlabeled, **options)`` runs one phase, which goes on where it
            was stopped.
        label: return stored class distributions of the unlabeled examples and perhaps of the
            labeled ones, by a network, or (None) by what a method's settings name.
        lay_out: lay a network out over the processes that train together.
        folder: the run's folder, for a method that stores more; None where a step is timed.
        progress: show bars.
        say: where messages go.
    """

    config: TrainingConfig
    data: Data
    teacher: nn.Module
    student: nn.Module
    fit: Callable[..., FitResult]
    label: Callable[[nn.Module | None], dict[str, Tensor]]
    lay_out: Callable[[nn.Module], nn.Module] = lambda network: network
    folder: Any = None
    progress: bool = False
    say: Say = lambda text: None

    @property
    def place(self) -> torch.device:
        """Return the device of the networks."""
        return next(self.student.parameters()).device

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of every trainer."""
        return self.config.trainer_options()

    def alone(self, network: nn.Module, losses: Losses, **options: Any) -> Trained:
        """Train a network by itself, by losses on labeled examples.

        Unlabeled examples are drawn too where there is a second loss, which reads them.
        """
        trainer = LossTrainer(
            network, losses, optimizer=self.config.optimizer("teacher", network), **self.options
        )
        unlabeled = self.data.unlabeled if len(losses) > 1 else None
        return Trained(trainer, self.fit(trainer, self.data.labeled, unlabeled, **options))

    def bilevel(
        self, teacher: nn.Module, mode: Any, problem: Any, **options: Any
    ) -> BilevelTrainer:
        """Build the trainer of the student beside a teacher.

        It is not verified: the tests verify these problems.

        Args:
            teacher: the network that learns by feedback.
            mode: how the feedback is found.
            problem: what the teacher says about examples, and the two losses.
            options: of the trainer; and ``student_lr``, the student's learning rate.
        """
        student_lr = options.pop("student_lr", None)
        inner = self.config.optimizer("student", self.student, student_lr)
        return BilevelTrainer(
            teacher,
            self.student,
            mode,
            verify=False,
            problem=problem,
            inner_optimizer=inner,
            outer_optimizer=self.config.optimizer("teacher", teacher),
            **{**self.options, **options},
        )


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method, whose fields are flags."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def name(self) -> str:
        """Return what the method is called in commands and files."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """Return what the method is called in a sentence."""
        raise NotImplementedError

    def scheduled(self, steps: int) -> Self:
        """Return the method with a value for every field that is a share of the steps.

        Values that do not go with this number of steps are refused.
        """
        uda = getattr(self, "uda", None)
        if uda is None:
            return self
        changed: Any = {"uda": uda.scheduled(steps)}
        return dataclasses.replace(self, **changed)

    def train(self, t: Training) -> Trained:
        """Go through the phases of the method."""
        raise NotImplementedError


# -------------------------------------------------------------------------------------- one network


@dataclass(frozen=True, kw_only=True)
class Supervised(Method):
    """Train one network on the labeled examples alone.

    Args:
        label_smoothing: label smoothing of the loss, from 0 to 1.
    """

    label_smoothing: Share = 0.0

    name: ClassVar[str] = "supervised"
    title: ClassVar[str] = "supervised, labeled data only"

    def train(self, t: Training) -> Trained:
        """Train one network on the labeled examples."""
        return t.alone(t.teacher, (CrossEntropy(self.label_smoothing),))


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """Consistency of the predictions on two views of unlabeled examples.

    Args:
        label_smoothing: label smoothing of the supervised loss, from 0 to 1.
        uda_weight: weight of the consistency loss, which asks for equal predictions on two views of
            an unlabeled example. 0 leaves it out.
        uda_temperature: temperature of the targets of the consistency loss. 0 makes them hard
            labels.
        uda_threshold: leave an example out of the consistency loss if its most probable class has
            less than this probability.
        uda_align: how far the targets' shares of the classes are moved to those of the labeled
            examples, from 0 (not at all) to 1.
        uda_start: number of steps before the consistency loss begins. By default it is 40 % of the
            steps, and 0 for digits.
        uda_ramp: number of steps in which the consistency loss grows to its weight. By default it
            is 10 % of the steps, and 0 for digits.
        uda_prior: shares of the classes that uda_align moves to; None: equal ones.
    """

    label_smoothing: Share = 0.0
    uda_weight: Weight = 1.0
    uda_temperature: Weight = 0.5
    uda_threshold: Share = 0.85
    uda_align: Annotated[float, Range(0, most=1)] = 0.5
    uda_start: SomeSteps | None = None
    uda_ramp: SomeSteps | None = None
    uda_prior: tyro.conf.Suppress[tuple[float, ...] | None] = None

    def __post_init__(self) -> None:
        check_fields(self)
        self.losses()

    def losses(self) -> Losses:
        """Return the supervised loss, and UDA's where it has a weight."""
        plain = CrossEntropy(self.label_smoothing)
        uda = UDA(
            weight=self.uda_weight,
            temperature=self.uda_temperature,
            threshold=self.uda_threshold,
            align=self.uda_align,
            start=self.uda_start or 0,
            ramp=self.uda_ramp or 0,
            prior=self.uda_prior,
        )
        if self.uda_weight:
            return (plain, uda)
        return (plain,)

    def scheduled(self, steps: int) -> Self:
        """Return the settings with the usual shares of the steps where none were given."""
        start = self.uda_start
        if start is None:
            start = round(START * steps)
        ramp = self.uda_ramp
        if ramp is None:
            ramp = round(RAMP * steps)
        return dataclasses.replace(self, uda_start=start, uda_ramp=ramp)


@dataclass(frozen=True, kw_only=True)
class Uda(Method):
    """Train one network on labeled examples, and on its own labels of unlabeled ones (UDA)."""

    uda: Consistency = field(default_factory=Consistency)

    name: ClassVar[str] = "uda"
    title: ClassVar[str] = "UDA alone"

    def train(self, t: Training) -> Trained:
        """Train one network on labeled and unlabeled examples."""
        return t.alone(t.teacher, self.uda.losses())


@dataclass(frozen=True, kw_only=True)
class FixMatch(Uda):
    """Train as uda does, with hard labels of those examples that the network is sure of."""

    uda: Consistency = field(
        default_factory=lambda: Consistency(
            uda_temperature=0.0, uda_threshold=FIXMATCH_THRESHOLD, uda_align=0.0
        )
    )

    name: ClassVar[str] = "fixmatch"
    title: ClassVar[str] = "FixMatch alone"


@dataclass(frozen=True, kw_only=True)
class EntMin(Method):
    """Train one network on labels, and to be sure of unlabeled examples (entropy minimization).

    Source: Grandvalet and Bengio (2004), eq. (7).
    """

    name: ClassVar[str] = "ent_min"
    title: ClassVar[str] = "entropy minimization"

    def train(self, t: Training) -> Trained:
        """Train one network on labeled and unlabeled examples."""
        return t.alone(t.teacher, (CrossEntropy(), Entropy(ENTROPY_WEIGHT)))


@dataclass(frozen=True)
class Entropy:
    r"""weight · (1/B) Σ_i H(softmax T(x_i)), of the weak view of unlabeled examples."""

    weight: float

    name: ClassVar[str] = "entropy"
    detaches_signal: ClassVar[bool] = True

    def __call__(
        self, teacher: nn.Module, *, outer: Any, inner: Any, signal: Any, step: int
    ) -> Tensor:
        log_p = wide(checks.logits(teacher(views(inner)[0]), "network")).log_softmax(-1)
        return -self.weight * (log_p.exp() * log_p).sum(-1).mean()


# -------------------------------------------------------------------------- a teacher and a student


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """How a teacher labels, and what it learns from the student.

    Args:
        mode: how the feedback is computed: forward and unrolled are exact, and difference,
            reinforce, reinforce_per_example and loss_difference are estimates. metapl ablate
            compares them.
        pseudo_labels: labels that the student learns: soft are the teacher's probabilities, hard is
            one class for each example. By default the mode decides.
        temperature: temperature of the softmax that makes the pseudo-labels. Below 1 it sharpens
            them.
        student_lr: learning rate of the student. By default it fits the network.
        feedback_weight: weight of the feedback in the teacher's loss, the same in every step.
        feedback_ratio: size of the feedback's gradient, as a multiple of the gradient of the
            teacher's other losses.
        feedback_bound: largest size of the feedback's gradient, as a multiple of the gradient of
            the teacher's other losses. By default it is 0.1.
        baseline: decay of the running average that is subtracted from the feedback, in a mode that
            draws labels.
        reduction: whether the teacher's loss is the mean or the sum over the batch, in a mode that
            draws labels.
        learns_from_student: whether the teacher learns from what its labels do to the student. A
            control has the same loop without that.
    """

    mode: Mode = "forward"
    pseudo_labels: Literal["soft", "hard"] | None = None
    temperature: float = 1.0
    student_lr: AboveZero | None = None
    feedback_weight: float | None = None
    feedback_ratio: Weight | None = None
    feedback_bound: Weight | None = None
    baseline: float | None = None
    reduction: Literal["mean", "sum"] | None = None
    learns_from_student: tyro.conf.Suppress[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        self.estimator()
        kinds = feedback.estimator(self.mode).labels
        if self.pseudo_labels is not None and self.pseudo_labels not in kinds:
            modes = [name for name in feedback.modes_for(self.pseudo_labels) if name != "implicit"]
            raise MetaplError(
                f"--pseudo-labels {self.pseudo_labels} was given, and --mode {self.mode} takes "
                f"{' or '.join(kinds)} labels; leave it out, or take --mode {' or '.join(modes)}."
            )
        if self.feedback_ratio is not None and (
            self.feedback_weight is not None or self.feedback_bound is not None
        ):
            beside = "--feedback-bound" if self.feedback_weight is None else "--feedback-weight"
            raise MetaplError(f"--feedback-ratio and {beside} were given; expected one of them.")
        self.problem()

    def estimator(self) -> Any:
        """Return the estimator of the mode; "none" without feedback."""
        estimator: Any = feedback.estimator(self.mode)
        for name in ("baseline", "reduction"):
            value = getattr(self, name)
            if value is None:
                continue
            if not hasattr(estimator, name):
                modes = [mode for mode in feedback.MODES if hasattr(feedback.estimator(mode), name)]
                raise MetaplError(
                    f"--{name} {value} was given, and mode '{self.mode}' has none; leave it out, "
                    f"or take --mode {' or '.join(modes)}."
                )
            estimator = dataclasses.replace(estimator, **{name: value})
        if not self.learns_from_student:
            return "none"
        return estimator

    def problem(self) -> problems.PseudoLabels:
        """Return the labels that the student learns: without feedback too, those of the mode."""
        labels = problems.PseudoLabels(kind=self.pseudo_labels, temperature=self.temperature)
        if not self.learns_from_student:
            return labels.for_modes(feedback.estimator(self.mode).labels, self.mode)
        return labels

    def size(self) -> dict[str, Any]:
        """Return the rule of the feedback's size, as :class:`metapl.BilevelTrainer` takes it."""
        if not self.learns_from_student:
            return {}
        return {
            name: getattr(self, name)
            for name in ("feedback_weight", "feedback_ratio", "feedback_bound")
        }


@dataclass(frozen=True, kw_only=True)
class Mpl(Method):
    """Train a student on a teacher's labels, and the teacher on how that helps (MPL).

    Args:
        wait: number of steps in which the teacher learns alone, before the student begins. By
            default it is 75 % of the steps, and 0 for digits.
        warm_start: whether the student begins with the teacher's weights after --wait steps.
    """

    feedback: Feedback = field(default_factory=Feedback)
    uda: Consistency = field(default_factory=Consistency)
    wait: SomeSteps | None = None
    warm_start: tyro.conf.FlagConversionOff[bool] = True

    @property
    def name(self) -> str:
        """Return mpl, and none without feedback."""
        return "mpl" if self.feedback.learns_from_student else "none"

    @property
    def title(self) -> str:
        """Return what is fed back, in words."""
        if self.feedback.learns_from_student:
            return "Meta Pseudo Labels"
        return "same loop, no feedback"

    def scheduled(self, steps: int) -> Self:
        """Return the method with a number of steps before the student begins."""
        wait = self.wait
        if wait is None:
            wait = min(round(WAIT * steps), steps - 1)
        if wait >= steps:
            raise MetaplError(
                f"--wait {wait:,}: expected fewer steps than the {steps:,} of the training."
            )
        return dataclasses.replace(self, wait=wait, uda=self.uda.scheduled(steps))

    def trainer(self, t: Training) -> BilevelTrainer:
        """Build the trainer of both networks."""
        return t.bilevel(
            t.teacher,
            self.feedback.estimator(),
            self.feedback.problem(),
            teacher_losses=self.uda.losses(),
            student_lr=self.feedback.student_lr,
            **self.feedback.size(),
        )

    def train(self, t: Training) -> Trained:
        """Train both networks in one phase."""
        trainer = self.trainer(t)
        wait = self.wait or 0
        steps = t.config.fitting.chosen_steps
        # A student that waits has fewer steps, and warms up over the same share of them.
        warmup = round((steps - wait) / steps * (t.config.fitting.warmup or 0))
        result = t.fit(
            trainer,
            t.data.labeled,
            t.data.unlabeled,
            wait=wait,
            warm_start=self.warm_start and wait > 0,
            warmup=warmup,
        )
        return Trained(trainer, result, (t.teacher, result.teacher_weights or {}))


@dataclass(frozen=True, kw_only=True)
class PseudoLabels(Method):
    """Train a teacher on the labeled examples, and then a student on the teacher's labels.

    Args:
        pseudo_labels: labels that the student learns: soft are the teacher's probabilities, hard is
            the most probable class of each example.
        temperature: temperature of the softmax that makes the pseudo-labels. Below 1 it sharpens
            them.
        student_lr: learning rate of the student. By default it fits the network.
        label_smoothing: label smoothing of the teacher's loss, from 0 to 1.

    Source: Meta Pseudo Labels, eq. (1).
    """

    pseudo_labels: Literal["soft", "hard"] = "soft"
    temperature: float = 1.0
    student_lr: AboveZero | None = None
    label_smoothing: Share = 0.0

    name: ClassVar[str] = "pseudo_labels"
    title: ClassVar[str] = "pseudo labels of a fixed teacher"

    def __post_init__(self) -> None:
        check_fields(self)
        self.problem()

    def problem(self) -> problems.PseudoLabels:
        """Return the labels that the student learns."""
        return problems.PseudoLabels(kind=self.pseudo_labels, temperature=self.temperature)

    def train(self, t: Training) -> Trained:
        """Train the teacher, then the student on its labels."""
        taught = t.alone(t.teacher, (CrossEntropy(self.label_smoothing),), phase="teacher")
        # Without a loss and without feedback the teacher stays as it is.
        trainer = t.bilevel(
            t.teacher, "none", self.problem(), teacher_losses=(), student_lr=self.student_lr
        )
        result = t.fit(trainer, t.data.labeled, t.data.unlabeled)
        return Trained(trainer, result, fallback=(t.teacher, taught.result.weights))


@dataclass(frozen=True, kw_only=True)
class ReducedMpl(Method):
    """Train a student on stored labels, which a small network adjusts by feedback (Reduced MPL).

    Args:
        label_store: store of labels of the unlabeled examples, which metapl label wrote. Without it
            a teacher is trained first, and labels them.
        labeled_label_store: store of labels of the labeled examples, which metapl label wrote. It
            needs --labels beside it.
    """

    feedback: Feedback = field(default_factory=Feedback)
    uda: Consistency = field(default_factory=Consistency)
    label_store: Annotated[str | None, tyro.conf.arg(metavar="STORE", name="labels")] = None
    labeled_label_store: Annotated[
        str | None, tyro.conf.arg(metavar="STORE", name="labeled-labels")
    ] = None

    def __post_init__(self) -> None:
        if self.labeled_label_store is not None and self.label_store is None:
            raise MetaplError(
                f"--labeled-labels {self.labeled_label_store}: expected --labels beside it."
            )
        # Without stored labels of the labeled examples the small network has no loss of its own.
        if self.label_store is not None and self.labeled_label_store is None:
            for name in ("feedback_ratio", "feedback_bound"):
                if getattr(self.feedback, name) is not None:
                    flag = f"--{name.replace('_', '-')}"
                    raise MetaplError(
                        f"{flag} is measured by a loss on --labeled-labels; expected those, or "
                        "leave it out."
                    )

    @property
    def stores(self) -> dict[str, str]:
        """Return the stores that were named, of unlabeled and perhaps of labeled examples."""
        stores = {"unlabeled": self.label_store, "labeled": self.labeled_label_store}
        return {part: folder for part, folder in stores.items() if folder is not None}

    @property
    def name(self) -> str:
        """Return reduced_none without feedback, and reduced_mpl with it."""
        return "reduced_mpl" if self.feedback.learns_from_student else "reduced_none"

    @property
    def title(self) -> str:
        """Return what adjusts the labels, in words."""
        if not self.feedback.learns_from_student:
            return "stored labels, adjusted without feedback"
        return "Reduced MPL (stored labels, adjusted)"

    def train(self, t: Training) -> Trained:
        """Train a teacher and store its labels, unless stores are named; then adjust them."""
        fallback = None
        if self.stores:
            stored = t.label(None)
        else:
            taught = t.alone(t.teacher, self.uda.losses(), phase="teacher")
            fallback = (t.teacher, taught.result.weights)
            stored = t.label(t.teacher)
        labeled = t.data.labeled
        unlabeled = t.data.unlabeled
        assert isinstance(labeled, LabeledBatches)
        assert isinstance(unlabeled, UnlabeledBatches)
        # The small network begins alike, whatever was drawn for the labels.
        torch.manual_seed(t.config.fitting.seed)
        adjuster = t.lay_out(LabelAdjuster(len(t.data.classes)).to(t.place))
        adjuster_losses: tuple[problems.StoredCrossEntropy, ...] = ()
        if "labeled" in stored:
            adjuster_losses = (problems.StoredCrossEntropy(self.uda.label_smoothing),)
            labeled = dataclasses.replace(labeled, stored=stored["labeled"])
        labels = self.feedback.problem()
        trainer = t.bilevel(
            adjuster,
            self.feedback.estimator(),
            problems.ReducedLabels(labels.kind, labels.temperature),
            teacher_losses=adjuster_losses,
            student_lr=self.feedback.student_lr,
            **self.feedback.size(),
        )
        # The student sees the strong view where there are two.
        view = unlabeled.weak if unlabeled.strong is None else unlabeled.strong
        examples = dataclasses.replace(
            unlabeled, weak=view, strong=None, stored=stored["unlabeled"]
        )
        # The small network has no opinion on examples, of which some could be right.
        result = t.fit(trainer, labeled, examples, truth=None)
        return Trained(trainer, result, fallback=fallback)


def with_settings_of(method: Any, own: Any, usual: Any) -> Any:
    """Return a method of a comparison with the settings in which a run's own is not the usual one.

    Args:
        method: another method, as it is usually.
        own: the run's method.
        usual: the run's method as it is usually.

    >>> with_settings_of(Uda(), Mpl(uda=Consistency(uda_threshold=0.9)), Mpl()).uda.uda_threshold
    0.9
    """
    usual_values = flag_values(usual)
    flags = flag_values(method).keys()
    changed = {
        name: value
        for name, value in flag_values(own).items()
        if name in flags and value != usual_values[name]
    }
    return with_flags(method, **changed)
