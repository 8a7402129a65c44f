"""The methods by which a network is trained: each is a frozen type with its settings, and one function, ``train``.

To add one, write its type, and enter it by its name in the METHODS of what it is to train:
metapl.apps.images, say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import torch
import tyro
from torch import Tensor, nn

from metapl import feedback, problems
from metapl.ablation import Altered
from metapl.apps.pictures import LabeledBatches, UnlabeledBatches
from metapl.apps.settings import Flat, Hidden, Share, SomeSteps, Weight, flat, replaced, unset
from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import views
from metapl.execution.numerics import wide
from metapl.models import label_adjuster
from metapl.problems.losses import UDA, CrossEntropy, TeacherLoss
from metapl.runs.fields import AboveZero, Range, check_fields
from metapl.training import FitResult, Say, Trainer
from metapl.training.loss_trainer import LossTrainer
from metapl.training.trainer import BilevelTrainer

# published is 0.95 (arXiv:2001.07685); with few steps this reached more (docs/pictures.md)
FIXMATCH_THRESHOLD = 0.85

ENTROPY_WEIGHT = 0.1  # of entropy minimization

# Shares of the steps: before the student of a teacher begins, before UDA begins, and of its ramp.
WAIT, START, RAMP = 0.75, 0.4, 0.1

Losses = tuple[TeacherLoss, ...]
FeedbackKind = Literal["whole", "none", "permuted", "class_means", "random_sign"]

if TYPE_CHECKING:
    Mode = str
else:
    Mode = Literal[feedback.MODES]  # what the command line offers


# ------------------------------------------------------------------------ what a method trains with


@dataclass(frozen=True, eq=False)
class Doubtful:
    """Examples whose given labels may be wrong."""

    examples: Any  # EvaluationBatches of all of them, with their positions as labels
    given: Tensor  # int64 (n,), their labels
    names: tuple[str, ...]  # such as their files


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is trained on. Examples to look at are (inputs, labels), or batches of these."""

    labeled: Any  # sources of batches, for fit
    unlabeled: Any
    finetuning: Any
    classes: tuple[str, ...]  # names
    record: Mapping[
        str, Any
    ]  # for the run's data.json; a run is resumed on data of the same "hash" only
    validation: Any = None
    test: Any = None
    everything: Any = None  # labeled batches of all examples with their true, or given, labels
    truth: Any = (
        None  # unlabeled examples whose labels are known, for looking at pseudo-labels only
    )
    test_names: tuple[str, ...] | None = None  # such as files
    doubtful: Doubtful | None = None  # for the list of suspects
    skipped: Mapping[str, str] = field(
        default_factory=dict
    )  # files that are left out, each with the reason


@dataclass(frozen=True, eq=False)
class Trained:
    """What a method ended with."""

    trainer: Trainer  # of the network that is kept
    result: FitResult
    teacher: tuple[nn.Module, Mapping[str, Tensor]] | None = (
        None  # a network that is kept beside it, with its weights
    )
    fallback: tuple[nn.Module, Mapping[str, Tensor]] | None = (
        None  # one that is kept where the student is far behind
    )
    finetunes: bool | Callable[[], Any] = (
        True  # whether the student is finetuned as usual; or how it is
    )
    rounds: list[dict[str, Any]] | None = None  # of Noisy Student, for result.json
    configs: Mapping[str, Any] = field(
        default_factory=dict
    )  # of kept networks that are not those of the training


@dataclass(frozen=True, eq=False, kw_only=True)
class Training:
    """What a method trains, on what, and how a phase of it is run."""

    config: Any  # the settings of the training; see metapl.apps.train
    data: Data
    teacher: (
        nn.Module
    )  # both with fresh weights, on their device, over the processes that train together
    student: nn.Module
    # fit(trainer, labeled, unlabeled, **options): one phase, which goes on where it was stopped.
    fit: Callable[..., FitResult]
    # Stored class distributions of the unlabeled examples and perhaps the labeled ones, by a
    # network, or by what a method's settings name.
    label: Callable[[nn.Module | None], dict[str, Tensor]]
    # Lays a network out over the processes that train together, as both networks above are.
    lay_out: Callable[[nn.Module], nn.Module] = lambda network: network
    folder: Any = None  # that of the run, for what stores more; where a step is timed there is none
    progress: bool = False
    say: Say = lambda text: None

    @property
    def place(self) -> torch.device:
        return next(self.student.parameters()).device

    @property
    def options(self) -> dict[str, Any]:
        """Of every trainer."""
        found: dict[str, Any] = self.config.trainer_options()
        return found

    def alone(self, network: nn.Module, losses: Losses, **options: Any) -> Trained:
        """Train a network by itself, on labeled examples and, where a loss reads them, unlabeled ones."""
        trainer = LossTrainer(
            network, losses, optimizer=self.config.optimizer("teacher", network), **self.options
        )
        unlabeled = self.data.unlabeled if len(losses) > 1 else None
        labeled = options.pop("labeled", self.data.labeled)
        return Trained(trainer, self.fit(trainer, labeled, unlabeled, **options))

    def bilevel(
        self, teacher: nn.Module, mode: Any, problem: Any, **options: Any
    ) -> BilevelTrainer:
        """The trainer of the student beside a teacher.

        It is not verified: the tests verify these problems.
        """
        inner = self.config.optimizer("student", self.student, options.pop("student_lr", None))
        outer = options.pop("outer_optimizer", None) or self.config.optimizer("teacher", teacher)
        options = {"inner_optimizer": inner, "outer_optimizer": outer, **self.options, **options}
        return BilevelTrainer(teacher, self.student, mode, verify=False, problem=problem, **options)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method, whose fields are flags.

    Each has a ``name`` in commands and files, and a ``title`` in words.
    """

    def __post_init__(self) -> None:
        check_fields(self)

    def scheduled(self, steps: int) -> Self:
        """With a value for every field that is a share of the steps.

        Refused where it does not go with them.
        """
        parts: dict[str, Any] = {"uda": self.uda.scheduled(steps)} if hasattr(self, "uda") else {}
        return dataclasses.replace(self, **parts)

    def train(self, t: Training) -> Trained:
        """Go through its phases."""
        raise NotImplementedError


# -------------------------------------------------------------------------------------- one network


@dataclass(frozen=True, kw_only=True)
class Supervised(Method):
    """The labeled examples alone.

    Args:
        label_smoothing: label smoothing of the loss.
    """

    label_smoothing: Share = 0.0

    name: ClassVar[str] = "supervised"
    title: ClassVar[str] = "supervised, labeled data only"

    def train(self, t: Training) -> Trained:
        return t.alone(t.teacher, (CrossEntropy(self.label_smoothing),))


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """Consistency of the predictions on two views of unlabeled examples.

    Args:
        label_smoothing: of the supervised loss.
        uda_weight: of the loss; 0 leaves it out.
        uda_temperature: of its targets; 0: hard.
        uda_threshold: leave out what is less sure.
        uda_align: class shares to the labeled ones.
        uda_start: without it first; 40 %, of digits 0.
        uda_ramp: of growing weight; 10 %, of digits 0.
        uda_prior: shares of the classes that uda_align moves to; None: equal ones.
    """

    label_smoothing: Share = 0.0
    uda_weight: Weight = 1.0
    uda_temperature: Weight = 0.5
    uda_threshold: Share = 0.85
    uda_align: Annotated[float, Range(0, most=1)] = 0.5
    uda_start: Annotated[SomeSteps | None, unset()] = None
    uda_ramp: Annotated[SomeSteps | None, unset()] = None
    uda_prior: Hidden[tuple[float, ...] | None] = None

    def __post_init__(self) -> None:
        check_fields(self)
        self.losses()

    def losses(self) -> Losses:
        """The supervised loss, and UDA's where it has a weight."""
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
        return (plain, uda) if self.uda_weight else (plain,)

    def scheduled(self, steps: int) -> Self:
        shares = {"uda_start": round(START * steps), "uda_ramp": round(RAMP * steps)}
        missing: Any = {
            name: value for name, value in shares.items() if getattr(self, name) is None
        }
        return dataclasses.replace(self, **missing)


@dataclass(frozen=True, kw_only=True)
class Uda(Method):
    """One network, on the labeled examples and on its own labels of examples that it is sure of."""

    uda: Flat[Consistency] = field(default_factory=Consistency)

    name: ClassVar[str] = "uda"
    title: ClassVar[str] = "UDA alone"

    def train(self, t: Training) -> Trained:
        return t.alone(t.teacher, self.uda.losses())


@dataclass(frozen=True, kw_only=True)
class FixMatch(Uda):
    """UDA with the most probable class as the label where the network is sure of it."""

    uda: Flat[Consistency] = field(
        default_factory=lambda: Consistency(
            uda_temperature=0.0, uda_threshold=FIXMATCH_THRESHOLD, uda_align=0.0
        )
    )

    name: ClassVar[str] = "fixmatch"
    title: ClassVar[str] = "FixMatch alone"


@dataclass(frozen=True, kw_only=True)
class EntMin(Method):
    """Entropy minimization: one network, on the labeled examples and towards predictions that are sure.

    Source: Grandvalet and Bengio (2004), eq. (7).
    """

    name: ClassVar[str] = "ent_min"
    title: ClassVar[str] = "entropy minimization"

    def train(self, t: Training) -> Trained:
        return t.alone(t.teacher, (CrossEntropy(), Entropy(ENTROPY_WEIGHT)))


@dataclass(frozen=True)
class Entropy:
    r"""weight · (1/B) Σ_i H(softmax T(x_i)), of the weak view of unlabeled examples."""

    weight: float

    name: ClassVar[str] = "entropy"
    detaches_signal: ClassVar[bool] = True

    def __call__(
        self, teacher: nn.Module, *, labeled: Any, unlabeled: Any, signal: Any, step: int
    ) -> Tensor:
        log_p = wide(checks.logits(teacher(views(unlabeled)[0]), "network")).log_softmax(-1)
        return -self.weight * (log_p.exp() * log_p).sum(-1).mean()


# -------------------------------------------------------------------------- a teacher and a student


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """How a teacher labels, and what it learns from the student.

    Args:
        mode: one of metapl.MODES; see metapl ablate.
        pseudo_labels: soft or hard; as the mode needs.
        temperature: of the pseudo-labels' softmax.
        student_lr: its learning rate.
        feedback: whole, none, or an altered control.
        feedback_weight: of the feedback; a fixed one.
        feedback_ratio: its gradient by the own losses'.
        feedback_bound: that ratio at most; default 0.1.
        baseline: decay of an average to subtract.
        reduction: mean or sum, of reinforce and the like.
    """

    mode: Annotated[Mode, tyro.conf.arg(metavar="MODE")] = "forward"
    pseudo_labels: Annotated[Literal["soft", "hard"] | None, unset("KIND")] = None
    temperature: float = 1.0
    student_lr: Annotated[AboveZero | None, unset()] = None
    feedback: Annotated[FeedbackKind, tyro.conf.arg(metavar="KIND")] = "whole"
    feedback_weight: Annotated[float | None, unset()] = None
    feedback_ratio: Annotated[Weight | None, unset()] = None
    feedback_bound: Annotated[Weight | None, unset()] = None
    baseline: Annotated[float | None, unset()] = None
    reduction: Annotated[Literal["mean", "sum"] | None, unset("KIND")] = None

    def __post_init__(self) -> None:
        check_fields(self)
        self.estimator(seed=0)
        if self.mode == "implicit" and self.feedback != "none":
            raise MetaplError(
                "--mode implicit takes the gradient through an optimum of the student's loss, "
                "where a student in training is not: expected --mode forward, the exact gradient "
                "of its step. In Python, metapl.feedback.Implicit takes a solver and a damping."
            )
        if self.feedback_ratio is not None and (
            self.feedback_weight is not None or self.feedback_bound is not None
        ):
            beside = "--feedback-bound" if self.feedback_weight is None else "--feedback-weight"
            raise MetaplError(f"--feedback-ratio and {beside} were given; expected one of them.")
        self.problem()

    def estimator(self, seed: int) -> Any:
        """The mode, altered as it may be; "none" where nothing is fed back."""
        made: Any = feedback.estimator(self.mode)
        for name in ("baseline", "reduction"):
            value = getattr(self, name)
            if value is None:
                continue
            if not hasattr(made, name):
                with_one = [
                    mode for mode in feedback.MODES if hasattr(feedback.estimator(mode), name)
                ]
                raise MetaplError(
                    f"--{name} {value} was given, and mode '{self.mode}' has none; leave it out, "
                    f"or take --mode {' or '.join(with_one)}."
                )
            made = dataclasses.replace(made, **{name: value})
        if self.feedback == "none":
            return "none"
        return made if self.feedback == "whole" else Altered(made, self.feedback, seed=seed)

    def problem(self) -> problems.PseudoLabels:
        """The labels that the student learns, also without feedback those that the mode takes."""
        asked = problems.PseudoLabels(kind=self.pseudo_labels, temperature=self.temperature)
        taken = asked.for_modes(feedback.estimator(self.mode).labels, self.mode)
        return taken if self.feedback == "none" else asked

    def size(self) -> dict[str, Any]:
        """Return the rule of the feedback's size, as :class:`metapl.BilevelTrainer` takes it."""
        if self.feedback == "none":
            return {}
        return {
            name: getattr(self, name)
            for name in ("feedback_weight", "feedback_ratio", "feedback_bound")
        }


TITLES: dict[FeedbackKind, str] = {
    "whole": "Meta Pseudo Labels",
    "none": "same loop, no feedback",
    "permuted": "MPL, feedback permuted over the batch",
    "class_means": "MPL, class means of the feedback only",
    "random_sign": "MPL, feedback with random signs",
}


@dataclass(frozen=True, kw_only=True)
class Mpl(Method):
    """Meta Pseudo Labels: a teacher learns from how the student does that learns its labels.

    Args:
        wait: teacher alone first; 75 %, of digits 0.
        warm_start: begin with its weights then.
    """

    feedback: Flat[Feedback] = field(default_factory=Feedback)
    uda: Flat[Consistency] = field(default_factory=Consistency)
    wait: Annotated[SomeSteps | None, unset()] = None
    warm_start: tyro.conf.FlagConversionOff[bool] = True

    @property
    def name(self) -> str:
        return "mpl" if self.feedback.feedback == "whole" else self.feedback.feedback

    @property
    def title(self) -> str:
        return TITLES[self.feedback.feedback]

    def scheduled(self, steps: int) -> Self:
        wait = min(round(WAIT * steps), steps - 1) if self.wait is None else self.wait
        if wait >= steps:
            raise MetaplError(
                f"--wait {wait:,}: expected fewer steps than the {steps:,} of the training."
            )
        return dataclasses.replace(self, wait=wait, uda=self.uda.scheduled(steps))

    def trainer(self, t: Training) -> BilevelTrainer:
        mode = self.feedback.estimator(t.config.fitting.seed)
        own = {
            "teacher_losses": self.uda.losses(),
            "student_lr": self.feedback.student_lr,
            **self.feedback.size(),
        }
        return t.bilevel(t.teacher, mode, self.feedback.problem(), **own)

    def train(self, t: Training) -> Trained:
        trainer = self.trainer(t)
        wait, steps = self.wait or 0, t.config.fitting.steps
        # A student that waits has fewer steps, and warms up over the same share of them.
        warmup = round((steps - wait) / steps * (t.config.fitting.warmup or 0))
        options = {"wait": wait, "warm_start": self.warm_start and wait > 0, "warmup": warmup}
        result = t.fit(trainer, t.data.labeled, t.data.unlabeled, **options)
        return Trained(trainer, result, (t.teacher, result.teacher_weights or {}))


@dataclass(frozen=True, kw_only=True)
class PseudoLabels(Method):
    """A student on the labels of a teacher that learned from the labeled examples alone: eq. (1) of the paper.

    Args:
        pseudo_labels: soft or hard.
        temperature: of the softmax that makes them.
        student_lr: its learning rate.
        label_smoothing: of the teacher's loss.
    """

    pseudo_labels: Annotated[Literal["soft", "hard"], tyro.conf.arg(metavar="KIND")] = "soft"
    temperature: float = 1.0
    student_lr: Annotated[AboveZero | None, unset()] = None
    label_smoothing: Share = 0.0

    name: ClassVar[str] = "pseudo_labels"
    title: ClassVar[str] = "pseudo labels of a fixed teacher"

    def __post_init__(self) -> None:
        check_fields(self)
        self.problem()

    def problem(self) -> problems.PseudoLabels:
        return problems.PseudoLabels(kind=self.pseudo_labels, temperature=self.temperature)

    def train(self, t: Training) -> Trained:
        taught = t.alone(t.teacher, (CrossEntropy(self.label_smoothing),), phase="teacher")
        # Without a loss and without feedback the teacher stays as it is.
        trainer = t.bilevel(
            t.teacher, "none", self.problem(), teacher_losses=(), student_lr=self.student_lr
        )
        result = t.fit(trainer, t.data.labeled, t.data.unlabeled)
        return Trained(trainer, result, fallback=(t.teacher, taught.result.weights))


@dataclass(frozen=True, kw_only=True)
class ReducedMpl(Method):
    """Reduced Meta Pseudo Labels: a student on stored labels, which a small network adjusts by its feedback.

    Args:
        label_store: of --unlabeled, by metapl label.
        labeled_label_store: with --labels, of --labeled.
    """

    feedback: Flat[Feedback] = field(default_factory=Feedback)
    uda: Flat[Consistency] = field(default_factory=Consistency)
    label_store: Annotated[str | None, unset("STORE", name="labels")] = None
    labeled_label_store: Annotated[str | None, unset("STORE", name="labeled-labels")] = None

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
        """The folders of the labels that are given, of the unlabeled and perhaps of the labeled examples."""
        both = {"unlabeled": self.label_store, "labeled": self.labeled_label_store}
        return {part: place for part, place in both.items() if place is not None}

    @property
    def name(self) -> str:
        return "reduced_none" if self.feedback.feedback == "none" else "reduced_mpl"

    @property
    def title(self) -> str:
        if self.feedback.feedback == "none":
            return "stored labels, adjusted without feedback"
        return "Reduced MPL (stored labels, adjusted)"

    def train(self, t: Training) -> Trained:
        fallback = None
        if self.stores:
            stored = t.label(None)
        else:
            taught = t.alone(t.teacher, self.uda.losses(), phase="teacher")
            fallback = (t.teacher, taught.result.weights)
            stored = t.label(t.teacher)
        labeled, unlabeled = t.data.labeled, t.data.unlabeled
        assert isinstance(labeled, LabeledBatches)
        assert isinstance(unlabeled, UnlabeledBatches)
        torch.manual_seed(t.config.fitting.seed)  # whatever was drawn for the labels
        adjuster = t.lay_out(label_adjuster(len(t.data.classes)).to(t.place))
        own: tuple[problems.StoredCrossEntropy, ...] = ()
        if "labeled" in stored:
            own = (problems.StoredCrossEntropy(self.uda.label_smoothing),)
            labeled = dataclasses.replace(labeled, stored=stored["labeled"])
        labels = self.feedback.problem()
        problem = problems.ReducedLabels(labels.kind, labels.temperature)
        mode = self.feedback.estimator(t.config.fitting.seed)
        size = {**self.feedback.size(), "student_lr": self.feedback.student_lr}
        trainer = t.bilevel(adjuster, mode, problem, teacher_losses=own, **size)
        seen = unlabeled.weak if unlabeled.strong is None else unlabeled.strong
        pairs = dataclasses.replace(unlabeled, weak=seen, strong=None, stored=stored["unlabeled"])
        # The small network has no opinion on examples, of which some could be right.
        return Trained(trainer, t.fit(trainer, labeled, pairs, truth=None), fallback=fallback)


def with_settings_of(method: Any, own: Any, usual: Any) -> Any:
    """Another method in a comparison: with the settings in which the first one, ``own``, differs from its usual ones.

    >>> with_settings_of(Uda(), Mpl(uda=Consistency(uda_threshold=0.9)), Mpl()).uda.uda_threshold
    0.9
    """
    asked, have = flat(own), flat(usual)
    changed = {
        name: value for name, value in asked.items() if value != have[name] and name in flat(method)
    }
    made = replaced(method, **changed)
    return made if made.name == method.name else method
