"""What a network is measured by, whether it is of a run or of a file of weights."""

from __future__ import annotations

import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from torch import Tensor

from metapl.apps.commands.evaluation_text import confusions, figures, released_table, robustness_table
from metapl.apps.commands.folders import held, written_to
from metapl.apps.commands.inputs import TestFolder, require_finite
from metapl.apps.commands.parse import Switch
from metapl.apps.evaluation import MultiLabelAccuracy, multi_label_accuracy, read_label_sets
from metapl.apps.evaluation.attacks import LEVELS, Attack
from metapl.apps.evaluation.corruptions import CORRUPTIONS
from metapl.apps.evaluation.imagenet import Stability, Subject, imagenet_a, imagenet_c, imagenet_p
from metapl.apps.evaluation.measure import Robustness, measure
from metapl.errors import MetaplError
from metapl.metrics import Evaluation, evaluate_logits, interval, predict_logits
from metapl.runs.atomic import written_last
from metapl.runs.sealed import refuse_irregular
from metapl.training.progress import counting
from metapl.words import tell

EPS = (2.0, 8.0)
"""Of attacks, in 1/255."""

EVALUATION, PICTURE = "evaluation.json", "robustness.png"

Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")]


@dataclass(frozen=True)
class Measured:
    """Labeled examples that a network is measured on.

    Args:
        batches: reads pictures and labels, as often as it is called.
        names: of the pictures, once the batches were read; None where they have none.
        part: what the accuracy is called.
        remark: what is printed beside it.
        skipped: how many files were left out, once the batches were read.
        about: for JSON.
    """

    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    names: Callable[[], Sequence[str] | None]
    part: Literal["test", "validation"] = "test"
    remark: str = ""
    skipped: Callable[[], int] = lambda: 0
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def on_folder(cls, folder: TestFolder) -> Measured:
        """The pictures of a folder of test pictures."""
        about = {"test": str(folder.folder), "missing_classes": list(folder.missing)}
        return cls(folder.batches, lambda: folder.names, skipped=lambda: folder.skipped, about=about)


@dataclass(frozen=True)
class Found:
    """What the evaluators found; None for what was not asked for.

    Args:
        clean: on the test pictures as they are.
        label_sets: accuracy where several labels can be right.
        robustness: on the same pictures, damaged and attacked.
        a, c, p: on ImageNet-A, -C and -P.
        skipped: files that could not be read.
    """

    clean: Evaluation | None
    label_sets: MultiLabelAccuracy | None
    robustness: Robustness | None
    a: Evaluation | None
    c: Robustness | None
    p: Stability | None
    skipped: int

    def to_json(self) -> dict[str, Any]:
        """As ``evaluation.json`` has it."""
        content: dict[str, Any] = {} if self.clean is None else self.clean.to_json() | _beside(self.clean)
        if self.label_sets is not None:
            content["multi_label"] = self.label_sets.to_json()
        if self.robustness is not None:
            content |= self.robustness.to_json()
        if self.a is not None:
            figures_of_a = ("n", "accuracy", "top5", "negative_log_likelihood", "expected_calibration_error")
            whole = self.a.to_json() | _beside(self.a)
            content["imagenet_a"] = {name: whole[name] for name in (*figures_of_a, "interval")}
            content["imagenet_a"]["classes"] = len(whole["per_class"])
        if self.c is not None:
            content["imagenet_c"] = {"n": self.c.n, **self.c.to_json()}
        if self.p is not None:
            content["imagenet_p"] = self.p.to_json()
        return content

    def text(self, part: str, of_accuracy: str, classes: Sequence[str]) -> str:
        """As it is printed."""
        blocks = []
        if self.clean is not None:
            blocks += [figures(self.clean, self.label_sets, part, of_accuracy), confusions(self.clean, tuple(classes))]
        if self.robustness is not None:
            blocks.append(robustness_table(self.robustness, self.clean))
        blocks += released_table(self.a, self.c, self.p)
        return "\n\n".join(block.strip("\n") for block in blocks)


@dataclass(frozen=True, kw_only=True)
class Evaluators(ABC):
    """By what a network is measured.

    Args:
        test: folder with one folder a class, to measure on.
        label_sets: file with all the right labels of each test example.
        corruptions: measure on damaged pictures too: noise, blur, weather and digital damage.
        attack: measure on pictures that are moved against the network: by one step of the sign of the gradient (fgsm),
            or by ten (pgd).
        eps: how far each value of a picture may be moved, in 1/255 of the range from black to white; several can be
            given.
        imagenet_a: folder of ImageNet-A: 200 class folders.
        imagenet_c: folder of ImageNet-C: corruption/severity/class.
        imagenet_p: folder of ImageNet-P: perturbation/class/sequence.mp4.
        out: folder for evaluation.json and robustness.png; made if need be.
        json: print JSON.
    """

    test: Folder = None
    label_sets: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    corruptions: Switch = False
    attack: Annotated[Attack | None, tyro.conf.arg(help_behavior_hint="")] = None
    eps: Annotated[tuple[float, ...], tyro.conf.arg(metavar="E", help_behavior_hint="(default: 2 8)")] = ()
    imagenet_a: Folder = None
    imagenet_c: Folder = None
    imagenet_p: Folder = None
    out: Folder = None
    json: Switch = False

    @property
    def released(self) -> bool:
        """Whether one of ImageNet's test sets was given."""
        return any(folder is not None for folder in (self.imagenet_a, self.imagenet_c, self.imagenet_p))

    def __call__(self) -> int:
        self.check()
        with held(self.out):
            return self.measured()

    @abstractmethod
    def measured(self) -> int:
        """Measure, tell and write what was found; the exit code."""

    def check(self) -> None:
        """Refuse flags that say nothing together, before anything is read."""
        if self.eps and self.attack is None:
            raise MetaplError("--eps was given without --attack; expected --attack fgsm or --attack pgd.")
        for eps in self.eps:
            if not 0 <= eps <= LEVELS:
                raise MetaplError(f"--eps {eps:g}: expected 0 to {LEVELS}, in 1/{LEVELS} of the range.")
        if (self.corruptions or self.attack) and self.out is None and not self.json:
            raise MetaplError(
                "--corruptions and --attack were given without --out; expected --out DIR for evaluation.json and "
                "robustness.png, or --json."
            )
        if self.out is not None:
            check_folder(self.out)
        for flag, folder in (("a", self.imagenet_a), ("c", self.imagenet_c), ("p", self.imagenet_p)):
            if folder is not None and not folder.is_dir():
                state = "is a file" if folder.exists() else "does not exist"
                raise MetaplError(
                    f"--imagenet-{flag} {folder} {state}; expected the folder of ImageNet-{flag.upper()}."
                )

    def found(self, subject: Subject, on: Measured | None) -> Found:
        """Measure a network by all that was asked for.

        Args:
            subject: the network.
            on: labeled examples; None where there are only ImageNet's test sets.
        """
        clean, several, robustness = None, None, None
        if on is not None:
            logits, labels = predict_logits(subject.network, on.batches())
            names = on.names()
            if names is not None and len(names) == len(logits):
                require_finite(logits, names)
            clean = evaluate_logits(logits, labels, subject.classes)
            if self.label_sets is not None:
                sets = read_label_sets(self.label_sets, subject.classes or _numbers(subject.outputs), names)
                several = _against_sets(logits, sets, names)
            robustness = self._robustness(subject, on)
        skipped = 0

        def skip(reason: str) -> None:
            nonlocal skipped
            skipped += 1
            tell(f"metapl: left out {reason}", file=sys.stderr)

        with counting("pictures", shown=True) as update:
            counted = Subject(
                subject.network, subject.pictures, subject.classes, subject.outputs, subject.imagenet, skip, update
            )
            a = None if self.imagenet_a is None else imagenet_a(counted, self.imagenet_a)
            c = None if self.imagenet_c is None else imagenet_c(counted, self.imagenet_c)
            p = None if self.imagenet_p is None else imagenet_p(counted, self.imagenet_p)
        return Found(clean, several, robustness, a, c, p, skipped + (0 if on is None else on.skipped()))

    def _robustness(self, subject: Subject, on: Measured) -> Robustness | None:
        if not self.corruptions and self.attack is None:
            return None
        with counting("pictures", shown=True) as update:
            return measure(
                subject.network,
                on.batches(),
                corruptions=tuple(CORRUPTIONS) if self.corruptions else (),
                attacks=() if self.attack is None else (self.attack,),
                eps=self.eps or EPS,
                imagenet=subject.imagenet,
                progress=update,
            )


def left_out(count: int) -> int:
    """Say how many files were left out; the exit code."""
    if count:
        tell(f"metapl: {count} file{'s' * (count != 1)} left out", file=sys.stderr)
    return 1 if count else 0


def _numbers(outputs: int) -> tuple[str, ...]:
    return tuple(map(str, range(outputs)))


def _beside(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "interval": list(interval(round(evaluation.accuracy * evaluation.n), evaluation.n)),
        "chance": evaluation.chance,
        "even_guess": 1 / len(evaluation.confusion),
    }


def _against_sets(logits: Tensor, sets: Sequence[frozenset[int]], names: Sequence[str] | None) -> MultiLabelAccuracy:
    """Accuracy against label sets, once it is sure that the two go together."""
    expected = len(logits) if names is None else len(names)
    if len(logits) < expected:
        raise MetaplError(
            f"{expected - len(logits):,} of the {expected:,} test files cannot be read and were left out, so it is not "
            "known which prediction is whose; mend or remove these files, then evaluate with --label-sets again."
        )
    return multi_label_accuracy(logits.max(dim=1).indices, sets)


def check_folder(folder: Path) -> None:
    """Refuse a place that no evaluation can be written to, before anything is measured."""
    if folder.exists() and not folder.is_dir():
        raise MetaplError(f"--out {folder} is a file; expected a folder, or the name of a new one.")
    place = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        state = "may not be written to" if place.is_dir() else "is not a folder"
        raise MetaplError(
            f"--out {folder} cannot be written: {place} {state}; expected a folder, or a new one in such."
        )
    for name in (EVALUATION, PICTURE):
        try:
            refuse_irregular(folder / name)
        except OSError as error:
            raise MetaplError(f"--out {folder}: {name} in it cannot be replaced: {error.strerror}.") from error


DRAWN = ("corruptions", "attacks", "imagenet_a", "imagenet_c", "imagenet_p")
"""Keys of ``evaluation.json`` that ``robustness.png`` shows."""


def write_evaluation(folder: Path | None, content: Mapping[str, Any], title: str) -> None:
    """``evaluation.json``, and ``robustness.png`` where there is something to draw, if --out was given: both, or
    neither."""
    from metapl.apps.reports.robustness import draw_robustness

    if folder is None:
        return
    with written_to(folder), written_last(folder / EVALUATION, f"{json.dumps(content, indent=1)}\n".encode()):
        if any(key in content for key in DRAWN):
            draw_robustness(folder / PICTURE, content, title)
