"""A folder of pictures whose labels may be wrong, and one with a few whose labels are right."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro
from torch import Tensor

from metapl.apps.pictures.batches import EvaluationBatches, LabeledBatches
from metapl.apps.pictures.check import check_folders, same_pictures
from metapl.apps.pictures.folders import Files, LabeledFiles, scan_labeled
from metapl.apps.pictures.hashes import hash_files
from metapl.apps.recipes.base import MOST_IN_A_BATCH, Doubtful, Feedback, Optimizer, Task, require, require_within
from metapl.apps.recipes.image_folders import (
    CHOSEN,
    OPEN,
    ImageFolders,
    Look,
    Open,
    OpenOptimizer,
    refuse_errors,
    spoken_classes,
)
from metapl.apps.recipes.image_recipe import EVALUATED_AT_ONCE, ImageParts, Strong
from metapl.apps.recipes.methods import LEARNED, Doubting
from metapl.data.sampler import StepSampler
from metapl.errors import MetaplError, few
from metapl.training import Say

NoisyMethod = Literal["example_weights", "meta_weight_net", "label_correction", "noise_transition", "plain", "clean"]

WARM = 0.2
"""Share of the steps on the labels as they are given, before anything is learned about them."""


@dataclass(frozen=True, kw_only=True)
class LabelOptimizer(OpenOptimizer):
    """The optimizer of what is learned about labels.

    Args:
        lr: learning rate; by default 0.1 for example_weights, 0.05 for noise_transition, and 0.001 for the others.
    """

    weight_decay: float = 0.0


@dataclass(frozen=True, eq=False)
class IndexedBatches(LabeledBatches):
    """Item t is (x, y, i): images, their labels, and their positions in the data set."""

    @property
    def columns(self) -> dict[str, Tensor]:
        return {"labels": self.labels, "indices": torch.arange(len(self.labels))}


@dataclass(frozen=True, kw_only=True)
class NoisyFolders(ImageFolders):
    """Pictures in one folder a class, some of them in the wrong one, and a few whose labels are right.

    What is left None is chosen as for ImageFolders.

    Args:
        labeled: pictures whose labels may be wrong: a folder with one subfolder for each class.
        clean: pictures whose labels are right, in subfolders of the same names; ten a class are of use. None of them
            may be in --labeled too.
        val: more pictures whose labels are right, to select on, in a folder like --labeled.
        test: more pictures whose labels are right, in a folder like --labeled; the accuracy on them is reported.
        method: what is learned about the labels, from what helps on --clean. example_weights gives each picture a
            weight, meta_weight_net makes the weight a function of the network's loss. label_correction trains another
            network that corrects labels. noise_transition learns how often each class is taken for each other one.
            plain learns from all labels as they are, clean from those of --clean alone.
        steps: number of training steps; by default as many as fit into --minutes.
        warm_steps: steps on all labels as they are, before anything is learned about them; by default 20 % of all.
            Methods plain and clean have none.
        warmup: steps over which the learning rate grows from 0; by default 5 %.
        labeled_batch: pictures of --labeled in a batch.
        clean_batch: pictures of --clean in a batch.
        mode: how the gradient of what is learned about labels is found: forward is exact; difference is for networks
            that forward-mode differentiation does not know.
        student: the network's optimizer.
        teacher: the optimizer of what is learned about labels.

    Raises:
        MetaplError: a value out of its range; later, folders that cannot be read, that overlap, or of other classes.

    Source: the papers that the problems of :data:`metapl.apps.recipes.methods.LEARNED` name.
    """

    name: ClassVar[str] = "noisy"
    places: ClassVar[tuple[str, ...]] = ("labeled", "clean", "val", "test")
    chosen: ClassVar[tuple[str, ...]] = (*CHOSEN, "warm_steps")
    batch_of_few: ClassVar[str] = "clean_batch"
    batches_shared: ClassVar[tuple[str, ...]] = ("labeled_batch", "clean_batch", "finetune_batch")

    labeled: Annotated[str, tyro.conf.arg(metavar="DIR")]
    clean: Annotated[str, tyro.conf.arg(metavar="DIR")]
    method: NoisyMethod = "example_weights"
    warm_steps: Open[int] = OPEN
    labeled_batch: int = 64
    clean_batch: int = 32
    mode: Literal["forward", "difference"] = "forward"
    teacher: LabelOptimizer = field(default_factory=LabelOptimizer)

    # What nothing here makes use of.
    unlabeled: tyro.conf.Suppress[str] = ""
    teacher_run: tyro.conf.Suppress[str | None] = None
    label_store: tyro.conf.Suppress[str | None] = None
    labeled_label_store: tyro.conf.Suppress[str | None] = None
    val_fraction: tyro.conf.Suppress[float | None] = 0.0
    unlabeled_batch: tyro.conf.Suppress[int] = 1
    feedback: tyro.conf.Suppress[Feedback] = field(default_factory=Feedback)
    feedback_ratio: tyro.conf.Suppress[float | None] = None
    exact_every: tyro.conf.Suppress[int | None] = None
    wait: tyro.conf.Suppress[int] = 0
    warm_start: tyro.conf.Suppress[bool] = False
    teacher_dropout: tyro.conf.Suppress[float | None] = None
    label_smoothing: tyro.conf.Suppress[float] = 0.0
    uda_weight: tyro.conf.Suppress[float] = 0.0
    uda_temperature: tyro.conf.Suppress[float] = 1.0
    uda_threshold: tyro.conf.Suppress[float] = 0.0
    uda_align: tyro.conf.Suppress[float] = 0.0
    uda_prior: tyro.conf.Suppress[tuple[float, ...] | None] = None
    uda_start: tyro.conf.Suppress[int] = 0
    uda_ramp: tyro.conf.Suppress[int] = 0
    pad: tyro.conf.Suppress[int] = 0
    randaugment: tyro.conf.Suppress[bool] = False
    strong: tyro.conf.Suppress[Strong] = field(default_factory=Strong)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within(self, "clean_batch", 1, MOST_IN_A_BATCH)
        warm, steps = self.warm_steps, self.steps
        fits = warm is None or (warm >= 0 and (steps is None or warm < steps))
        require(self, fits, "warm_steps", f"0 or more, and fewer than steps={steps}")
        both = self.labeled_batch % self.accumulate == 0 and self.clean_batch % self.accumulate == 0
        require(self, both, "accumulate", "a divisor of labeled_batch and clean_batch")

    def _shares(self, steps: int) -> dict[str, int]:
        return super()._shares(steps) | {"warm_steps": round(WARM * steps)}

    def beside(self, what: Doubting) -> Optimizer:
        """The optimizer of what is learned about labels; a comparison has one recipe for all methods."""
        return self.teacher if self.teacher.lr is not None else dataclasses.replace(self.teacher, lr=LEARNED[what].rate)

    def for_network(self, name: str) -> ImageFolders:
        return dataclasses.replace(super().for_network(name), teacher=self.teacher)

    def fit_options(self) -> dict[str, Any]:
        return super().fit_options() | {"warmup": self.warmup, "warm_start": False, "wait": 0}

    # ------------------------------------------------------------------------------------------------------ the data

    def trained_on(self) -> tuple[LabeledFiles, Files]:
        return scan_labeled(self.clean), scan_labeled(self.labeled)

    def check_first(self) -> None:
        """Refuse what can be seen of the folders at once, before anything is measured."""
        refuse_nested(self.labeled, self.clean)
        clean, noisy = scan_labeled(self.clean), scan_labeled(self.labeled)
        refuse_errors(check_folders(clean))
        refuse_other_classes(noisy, clean)
        refuse_shared(noisy, clean)

    def task(self, say: Say | None = None, progress: bool = False, log: Path | None = None) -> Task:
        tell, look = say or (lambda text: None), Look(say or (lambda text: None), progress)
        self.check_first()
        noisy = look.sound(look.listed(scan_labeled, self.labeled, "labeled"), "labeled")
        clean = look.sound(look.listed(scan_labeled, self.clean, "clean"), "clean")
        held_out = {
            name: look.sound(look.listed(scan_labeled, folder, name), name)
            for name, folder in (("val", self.val), ("test", self.test))
            if folder is not None
        }
        look.compare(clean, noisy, held_out)
        val, test = held_out.get("val"), held_out.get("test")
        tell(
            f"{len(noisy):,} pictures of {spoken_classes(self.classes)} with labels that may be wrong, {len(clean):,} "
            f"with clean ones, {len(val) if val else 'none'} for validation, {f'{len(test):,}' if test else 'none'} "
            "to test on"
        )
        both = self._images_at([*noisy.paths(), *clean.paths()], log)
        labels = torch.cat([noisy.targets(self.classes), clean.targets(self.classes)])
        sides = {"labeled": noisy, "clean": clean, **held_out}
        return Task(
            **self.batches(
                ImageParts(
                    few=both.select(torch.arange(len(noisy), len(both))),
                    labels=labels[len(noisy) :],
                    many=both.select(torch.arange(len(noisy))),
                    given=labels[: len(noisy)],
                    names=tuple(noisy.paths()),
                    known=(both, labels),
                    val=None if val is None else (self._images(val, log), val.targets(self.classes)),
                    test=None if test is None else (self._images(test, log), test.targets(self.classes)),
                )
            ),
            classes=self.classes,
            test_names=test.names if test else None,
            skipped=look.skipped,
            record={
                "labeled": len(noisy),
                "clean": list(clean.names),
                "validation": list(val.names) if val else [],
                "test": list(test.names) if test else [],
                "hash": {name: hash_files(files) for name, files in sides.items()},
            },
        )

    def batches(self, pictures: ImageParts) -> dict[str, Any]:
        views, many = self.views(), pictures.many
        given = pictures.given if pictures.given is not None else torch.zeros(len(many), dtype=torch.int64)
        kind = IndexedBatches if self.method.startswith("example_weights") else LabeledBatches
        sampler = StepSampler(len(many), self.labeled_batch, seed=self.seed, stream=1)
        noisy = kind(many, given, sampler, views.labeled, self.seed + 2, crop=views.crop)
        clean = dataclasses.replace(self, labeled_batch=self.clean_batch)
        sources = super(NoisyFolders, clean).batches(pictures)
        every = StepSampler(len(given) + len(pictures.few), self.labeled_batch, seed=self.seed, stream=0)
        if pictures.given is not None and pictures.known is not None:
            sources["everything"] = LabeledBatches(*pictures.known, every, views.labeled, self.seed, crop=views.crop)
        examples = EvaluationBatches(many, torch.arange(len(many)), EVALUATED_AT_ONCE)
        doubtful = Doubtful(examples, given, pictures.names)
        return {**sources, "unlabeled": noisy, "sample": None, "doubtful": doubtful}


# -------------------------------------------------------------------------------------------- folders that are refused


def refuse_nested(noisy: str, clean: str) -> None:
    """Refuse one folder, or one inside the other."""
    first, second = (Path(folder).expanduser().resolve() for folder in (noisy, clean))
    if first == second or first in second.parents or second in first.parents:
        how = "the same folder" if first == second else "one inside the other"
        raise MetaplError(
            f"--labeled {noisy} and --clean {clean} are {how}; expected two folders, so that the clean labels are told "
            "from those that may be wrong."
        )


def refuse_other_classes(noisy: LabeledFiles, clean: LabeledFiles) -> None:
    """Refuse folders of which one has a class, or pictures of it, that the other has not."""
    without = [
        f"{few(missing)} {'is' if len(missing) == 1 else 'are'} in {one.root} alone"
        for one, other in ((noisy, clean), (clean, noisy))
        if (missing := [name for name in one.classes if name not in other.classes])
    ]
    if without:
        raise MetaplError(f"the classes differ: {'; '.join(without)}; expected subfolders of the same names in both.")
    empty = [name for name, count in noisy.counts().items() if not count]
    if empty:
        raise MetaplError(
            f"{few(empty)} {'has' if len(empty) == 1 else 'have'} no picture in {noisy.root}; put some there, or "
            f"remove the class from {clean.root} too."
        )


def refuse_shared(noisy: LabeledFiles, clean: LabeledFiles) -> None:
    """Refuse a picture, by its bytes, that is in both folders."""
    pairs = [(same[0], copies[0]) for copies, same in same_pictures(noisy, clean)]
    if pairs:
        shown = few([f"{path} is {copy}" for path, copy in pairs])
        raise MetaplError(
            f"{len(pairs)} clean pictures are among the labeled ones too: {shown}; remove them from {noisy.root}, for "
            "what is learned about labels is judged on clean pictures that the network was not trained on."
        )
