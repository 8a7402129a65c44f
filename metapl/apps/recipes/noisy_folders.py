"""A folder of pictures whose labels may be wrong, and one with a few whose labels are right."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import tyro
from torch import Tensor

from metapl.apps.pictures.batches import EvaluationBatches, LabeledBatches
from metapl.apps.pictures.check import check_folders, same_pictures
from metapl.apps.pictures.folders import Files, LabeledFiles, scan_labeled
from metapl.apps.recipes.base import Doubtful, Task
from metapl.apps.recipes.image_folders import ImageFolders, refuse_errors, spoken_classes
from metapl.apps.recipes.image_recipe import EVALUATED_AT_ONCE, ImageParts, Strong
from metapl.apps.recipes.methods import NOISY_METHODS
from metapl.apps.recipes.settings import Batch, require
from metapl.data.sampler import StepSampler
from metapl.errors import MetaplError, few
from metapl.training import Say


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
        steps: number of training steps; by default as many as fit into --minutes.
        warmup: steps over which the learning rate grows from 0; by default 5 %.
        labeled_batch: pictures of --labeled in a batch.
        clean_batch: pictures of --clean in a batch.

    Raises:
        MetaplError: a value out of its range; later, folders that cannot be read, that overlap, or of other classes.

    Source: the papers that the problems of :mod:`metapl.apps.recipes.methods.label_noise` name.
    """

    name: ClassVar[str] = "noisy"
    places: ClassVar[tuple[str, ...]] = ("labeled", "clean", "val", "test")
    sides: ClassVar[tuple[str, str]] = ("clean", "labeled")
    batch_of_few: ClassVar[str] = "clean_batch"
    batches_shared: ClassVar[tuple[str, ...]] = ("labeled_batch", "clean_batch", "finetune_batch")
    known = NOISY_METHODS
    own: ClassVar[str] = "example_weights"
    settings: ClassVar[dict[str, Any]] = {}

    labeled: Annotated[str, tyro.conf.arg(metavar="DIR")]
    clean: Annotated[str, tyro.conf.arg(metavar="DIR")]
    labeled_batch: int = 64
    clean_batch: Batch = 32

    # What nothing here makes use of.
    unlabeled: tyro.conf.Suppress[str] = ""
    val_fraction: tyro.conf.Suppress[float | None] = 0.0
    unlabeled_batch: tyro.conf.Suppress[int] = 1
    teacher_dropout: tyro.conf.Suppress[float | None] = None
    pad: tyro.conf.Suppress[int] = 0
    randaugment: tyro.conf.Suppress[bool] = False
    strong: tyro.conf.Suppress[Strong] = field(default_factory=Strong)

    @classmethod
    def rivals(cls, own: str) -> tuple[str, ...]:
        return tuple(name for name in ("plain", "clean") if name != own)

    @classmethod
    def controls(cls, own: str) -> tuple[str, ...]:
        return tuple(name for name in super().controls(own) if issubclass(cls.known[name], cls.known[own]))

    def __post_init__(self) -> None:
        super().__post_init__()
        both = self.labeled_batch % self.accumulate == 0 and self.clean_batch % self.accumulate == 0
        require(self, both, "accumulate", "a divisor of labeled_batch and clean_batch")

    # ------------------------------------------------------------------------------------------------------ the data

    def trained_on(self) -> tuple[LabeledFiles, Files]:
        return scan_labeled(self.clean), scan_labeled(self.labeled)

    def check_first(self) -> None:
        first, second = (Path(folder).expanduser().resolve() for folder in (self.labeled, self.clean))
        if first == second or first in second.parents or second in first.parents:
            how = "the same folder" if first == second else "one inside the other"
            raise MetaplError(
                f"--labeled {self.labeled} and --clean {self.clean} are {how}; expected two folders, so that the clean "
                "labels are told from those that may be wrong."
            )
        clean, noisy = scan_labeled(self.clean), scan_labeled(self.labeled)
        refuse_errors(check_folders(clean))
        without = [
            f"{few(missing)} in {one.root} alone"
            for one, other in ((noisy, clean), (clean, noisy))
            if (missing := [name for name in one.classes if name not in other.classes])
        ]
        if without:
            raise MetaplError(f"classes differ: {'; '.join(without)}; expected subfolders of the same names in both.")
        if empty := [name for name, count in noisy.counts().items() if not count]:
            raise MetaplError(
                f"no picture of {few(empty)} in {noisy.root}; put some there, or remove it from {clean.root} too."
            )
        if pairs := [f"{same[0]} is {copies[0]}" for copies, same in same_pictures(noisy, clean)]:
            raise MetaplError(
                f"{len(pairs)} clean pictures are among the labeled ones too: {few(pairs)}; remove them from "
                f"{noisy.root}: labels are judged on clean pictures that the network was not trained on."
            )

    def task(self, say: Say | None = None, progress: bool = False, log: Path | None = None) -> Task:
        self.check_first()
        return super().task(say, progress, log)

    def spoken(self, few: LabeledFiles, many: Files) -> str:
        of = f"pictures of {spoken_classes(self.classes)} with labels that may be wrong"
        return f"{len(many):,} {of}, {len(few):,} with clean ones"

    def parts(self, few: LabeledFiles, many: Files, log: Path | None) -> ImageParts:
        """The noisy pictures and the clean ones, together in one list of files."""
        assert isinstance(many, LabeledFiles)
        both, count = self.images([*many.paths(), *few.paths()], log), len(many)
        labels = torch.cat([many.targets(self.classes), few.targets(self.classes)])
        sides: Any = {"few": both.select(torch.arange(count, len(both))), "many": both.select(torch.arange(count))}
        given, names = labels[:count], tuple(many.paths())
        return ImageParts(**sides, labels=labels[count:], given=given, names=names, known=(both, labels))

    def batches(self, pictures: ImageParts) -> dict[str, Any]:
        views, many, known = self.views(), pictures.many, pictures.known
        given = torch.zeros(len(many), dtype=torch.int64) if pictures.given is None else pictures.given
        sampler = StepSampler(len(many), self.labeled_batch, seed=self.seed, stream=1)
        kind = IndexedBatches if self.method.indexed else LabeledBatches
        noisy = kind(many, given, sampler, views.labeled, self.seed + 2, crop=views.crop)
        clean = dataclasses.replace(self, labeled_batch=self.clean_batch)
        sources = super(NoisyFolders, clean).batches(pictures)
        if pictures.given is not None and known is not None:
            every = StepSampler(len(known[1]), self.labeled_batch, seed=self.seed, stream=0)
            sources["everything"] = LabeledBatches(*known, every, views.labeled, self.seed, crop=views.crop)
        examples = EvaluationBatches(many, torch.arange(len(many)), EVALUATED_AT_ONCE)
        doubtful = Doubtful(examples, given, pictures.names)
        return {**sources, "unlabeled": noisy, "doubtful": doubtful}
