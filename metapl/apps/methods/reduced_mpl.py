"""``--method reduced_mpl``: stored labels, which a small network adjusts by feedback."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Self

import torch
import tyro

from metapl import problems
from metapl.apps.labeling import refuse_other_pictures
from metapl.apps.methods.base import Method, Trained, Training, TrainingConfig
from metapl.apps.methods.feedback import Feedback
from metapl.apps.methods.uda import Consistency
from metapl.errors import MetaplError, few
from metapl.labels.store import DESCRIPTION, LabelStore
from metapl.models import LabelAdjuster
from metapl.pictures import LabeledBatches, UnlabeledBatches


@dataclass(frozen=True, kw_only=True)
class ReducedMpl(Method):
    """Train a student on stored labels, which a small network adjusts by feedback (Reduced MPL).

    Args:
        label_store: store of labels of the unlabeled examples, which metapl label wrote. Without it
            a teacher is trained first, and labels them.
        labeled_label_store: store of labels of the labeled examples, which metapl label wrote. It
            needs --labels beside it.
    """

    packages: ClassVar[tuple[str, ...]] = ("pyarrow",)

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

    @property
    def trainings(self) -> int:
        """Return 1 where labels are stored, and else 2: a teacher gives them first."""
        return 1 if self.stores else 2

    @property
    def descriptions(self) -> Mapping[str, Path]:
        """Return the descriptions of the stores, which have the hashes of their labels."""
        return {
            f"labels of {part}": Path(store) / DESCRIPTION for part, store in self.stores.items()
        }

    def check(self, config: TrainingConfig) -> None:
        """Refuse a store that is of other classes, or of other pictures, or is damaged."""
        for part, folder in self.stores.items():
            files = config.scan(part)
            store = LabelStore(Path(folder))
            classes = config.scan("labeled").classes
            if store.classes != classes:
                raise MetaplError(
                    f"{folder} has the classes {few(store.classes)}; expected those of the labeled "
                    f"pictures: {few(classes)}."
                )
            names = store.ids_of_files(files.root, files.names)
            path_by_name = dict(zip(names, files.paths(), strict=True))
            refuse_other_pictures(store, path_by_name.get, lambda text: None)

    def scheduled(self, steps: int) -> Self:
        """Return the method with the steps of the teacher's consistency loss."""
        return dataclasses.replace(self, uda=self.uda.scheduled(steps))

    def train(self, t: Training) -> Trained:
        """Train a teacher and store its labels, unless stores are named; then adjust them."""
        fallback = None
        if self.stores:
            if "labeled" not in self.stores:
                t.say(
                    "note: without --labeled-labels, the labels are adjusted by the student's "
                    "feedback alone."
                )
            stored = t.read_labels(self.stores)
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
            adjuster_losses = (problems.StoredCrossEntropy(self.uda.label_smoothing or 0.0),)
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
