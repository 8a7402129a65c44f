"""``metapl evaluate RUN``, on its own test set or on another folder, and ``metapl evaluate --weights FILE``."""

from __future__ import annotations

import json
import statistics
import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from metapl.apps.commands.inputs import Network, TestFolder, counted, held, written
from metapl.apps.commands.parse import Command, File, Folder, Run, Switch, unset
from metapl.apps.evaluation import MultiLabelAccuracy, multi_label_accuracy, read_label_sets
from metapl.apps.evaluation import imagenet as sets
from metapl.apps.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from metapl.apps.evaluation.imagenet import Pictures, Subject, is_imagenet
from metapl.apps.evaluation.measure import FLIPS_OF_ALEXNET, LEVELS, Attack, Robustness, measure
from metapl.apps.experiments.folder import LoadedRun, load_run, weights_file
from metapl.apps.experiments.labeling import refuse_infinite
from metapl.apps.machine.progress import counting
from metapl.apps.recipes import ImageRecipe
from metapl.apps.words import WIDTH, short, table, tell
from metapl.errors import MetaplError
from metapl.metrics import Evaluation, evaluate_logits, interval, predict_logits
from metapl.metrics.predictions import batches_of
from metapl.runs.fields import Range
from metapl.words import shown

EVALUATION, PICTURE = "evaluation.json", "robustness.png"

# Keys of ``evaluation.json`` that ``robustness.png`` shows, and what is written of ImageNet-A.
DRAWN = ("corruptions", "attacks", "imagenet_a", "imagenet_c", "imagenet_p")
OF_A = ("n", "accuracy", "top5", "negative_log_likelihood", "expected_calibration_error", "interval")


@dataclass(frozen=True, kw_only=True)
class Evaluators(Command):
    """By what a network is measured, whether it is of a run or of a file of weights.

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
    label_sets: File = None
    corruptions: Switch = False
    attack: Annotated[Attack | None, unset()] = None
    eps: Annotated[tuple[Annotated[float, Range(0, most=LEVELS)], ...], unset("E ...", default="(default: 2 8)")] = ()
    imagenet_a: Folder = None
    imagenet_c: Folder = None
    imagenet_p: Folder = None
    out: Folder = None
    json: Switch = False

    @property
    def released(self) -> dict[str, Path]:
        """ImageNet's test sets that were given, by their letters."""
        given = {"a": self.imagenet_a, "c": self.imagenet_c, "p": self.imagenet_p}
        return {letter: folder for letter, folder in given.items() if folder is not None}

    def check(self) -> None:
        if self.eps and self.attack is None:
            raise MetaplError("--eps was given without --attack; expected --attack fgsm or --attack pgd.")
        if (self.corruptions or self.attack) and self.out is None and not self.json:
            raise MetaplError(
                "--corruptions and --attack were given without --out; expected --out DIR for evaluation.json and "
                "robustness.png, or --json."
            )
        for letter, folder in self.released.items():
            if not folder.is_dir():
                raise MetaplError(f"--imagenet-{letter} {folder}: there is no such folder; expected ImageNet's.")

    def run(self) -> int:
        with held(self.out, EVALUATION, PICTURE):
            return self.evaluated()

    @abstractmethod
    def evaluated(self) -> int:
        """Measure, tell and write what was found; the exit code."""

    def found(self, subject: Subject, on: TestFolder | Own | None, heading: str, about: Mapping[str, Any]) -> int:
        content, blocks, left_out = dict(about), [], 0

        def skip(reason: str) -> None:
            nonlocal left_out
            left_out += 1
            tell(f"metapl: left out {reason}", file=sys.stderr)

        with counting("pictures", shown=True) as update:
            subject = replace(subject, skip=skip, progress=update)
            if on is not None:
                blocks = self._of_pictures(subject, on, content)
                left_out = on.skipped
            for letter, folder in self.released.items():
                content[f"imagenet_{letter}"], block = RELEASED[letter](subject, folder)
                blocks.append(block)
        tell(json.dumps(content, indent=2) if self.json else "\n\n".join([heading, *blocks]))
        if self.out is not None:
            write_evaluation(self.out, content, heading.splitlines()[0])
        if left_out:
            tell(f"metapl: {counted(left_out, 'file')} left out", file=sys.stderr)
        return 1 if left_out else 0

    def _of_pictures(self, subject: Subject, on: TestFolder | Own, content: dict[str, Any]) -> list[str]:
        """Accuracy and what else was asked for, in ``content`` and in words."""
        content["measured_on"] = on.part
        logits, labels = predict_logits(subject.network, on.batches())
        names = on.names
        if names is not None and len(names) == len(logits):
            refuse_infinite(logits, names)
        clean = evaluate_logits(logits, labels, subject.classes)
        content |= _as_json(clean)
        several = None
        if self.label_sets is not None:
            classes = subject.classes or tuple(map(str, range(subject.outputs)))
            right = read_label_sets(self.label_sets, classes, names)
            if names is not None and len(logits) < len(names):
                raise MetaplError(
                    f"{len(names) - len(logits):,} of the {len(names):,} test files cannot be read and were left out, "
                    "so it is not known which prediction is whose; mend or remove these files, then evaluate with "
                    "--label-sets again."
                )
            several = multi_label_accuracy(logits.max(dim=1).indices, right)
            content["multi_label"] = asdict(several)
        blocks = [figures(clean, several, on), confusions(clean, subject.classes or ())]
        if self.corruptions or self.attack is not None:
            robust = measure(
                subject.network,
                on.batches(),
                corruptions=tuple(CORRUPTIONS) if self.corruptions else (),
                attacks=() if self.attack is None else (self.attack,),
                eps=self.eps or (2.0, 8.0),
                imagenet=subject.imagenet,
                progress=subject.progress,
            )
            content |= robust.to_json()
            blocks.append(robustness_table(robust, clean))
        return blocks


def write_evaluation(folder: Path, content: Mapping[str, Any], title: str) -> None:
    """``evaluation.json``, and ``robustness.png`` where there is something to draw: both, or neither."""
    from metapl.apps.reports.robustness import draw_robustness

    with written(folder, EVALUATION, f"{json.dumps(content, indent=1)}\n"):
        if any(key in content for key in DRAWN):
            draw_robustness(folder / PICTURE, content, title)


def _as_json(evaluation: Evaluation) -> dict[str, Any]:
    low, high = interval(round(evaluation.accuracy * evaluation.n), evaluation.n)
    beside = {"chance": evaluation.chance, "even_guess": 1 / len(evaluation.confusion)}
    return {**evaluation.to_json(), "interval": [low, high], **beside}


# ------------------------------------------------------------------------------------------------ the network of a run


@dataclass(frozen=True, kw_only=True)
class Evaluate(Evaluators):
    """Measure a run's network on its test set again: accuracy, calibration, and which classes it takes for which.

    It is the network that the run delivers, or the one named; of a comparison, the run that it delivers: the best
    method's best seed by validation, and the first method's first seed where validation cannot tell. Where the accuracy
    is not the one in the run's result.json, the output says so. Beside it stand its 95 % interval, the chance level,
    which is what always naming the largest class gives, and what guessing evenly gives. A run without a test set is
    measured on its validation examples, and the accuracy is called so.

    With --test, it is measured on other pictures: one folder a class, called as the run's classes. A file that cannot
    be read is left out, with the reason on standard error; the exit code is then 1.

    With label sets, several classes of a picture can be right, or none: ReaL accuracy. The file is a JSON list with a
    list of classes for each test picture, such as ReaL's own real.json; or a JSON object of such lists by file name; or
    CSV with the columns file and labels, these with ; between them. A class is its name or its index.

    The pictures can also be damaged in 15 ways and 5 severities each, as in ImageNet-C (--corruptions), and be moved
    against the network (--attack); all accuracies are then written to --out, as evaluation.json and robustness.png.

    A network of a file of weights, without a run: metapl evaluate --weights FILE --help says how.

    Args:
        folder: the run folder.
    """

    folder: Run
    network: Network = "delivered"

    def evaluated(self) -> int:
        run = load_run(self.folder)
        recipe, name = run.recipe, run.name(self.network)
        network = run.network(name).to(run.device)
        if self.released and not isinstance(recipe, ImageRecipe):
            raise MetaplError(
                "--imagenet-a, --imagenet-c and --imagenet-p are for networks of pictures in files, and "
                f"{self.folder} is of {recipe.name}."
            )
        about: dict[str, Any] = {
            "run": str(self.folder),
            "recipe": recipe.name,
            "method": run.result["method"],
            "seed": recipe.seed,
            "network": name,
            "weights": weights_file(name),
        }
        on: TestFolder | Own = Own.of(run, name) if self.test is None else TestFolder(recipe, self.test)
        if self.label_sets is not None and on.part == "validation":
            raise MetaplError(f"--label-sets are of test pictures, and {_UNTESTED.format(self.folder)}")
        pictures = Pictures(1)
        if isinstance(recipe, ImageRecipe):
            pictures = Pictures(recipe.image_size, recipe.grey, recipe.center)
        imagenet = getattr(recipe, "data", None) == "imagenet" or is_imagenet(recipe.classes)
        subject = Subject(network, pictures, recipe.classes, len(recipe.classes), imagenet)
        where = "" if self.test is None else f"\non {self.test}"
        return self.found(subject, on, f"{run.heading(name)}{where}", about | on.about)


_UNTESTED = "{} has no test set; give --test DIR, a folder of labeled pictures with one folder a class."


@dataclass(frozen=True)
class Own:
    """A run's own test set; where it has none, what it was validated on. ``note`` is printed beside the accuracy."""

    data: Any
    device: torch.device
    names: tuple[str, ...] | None
    part: str
    recorded: float | None
    note: str = ""
    skipped: int = field(default=0, init=False)

    @classmethod
    def of(cls, run: LoadedRun, network: str) -> Own:
        task = run.recipe.task(progress=True)
        if task.test is not None:
            return cls(task.test, run.device, task.test_names, "test", run.result.get(f"{network}_test_accuracy"))
        if task.validation is None:
            raise MetaplError(f"{_UNTESTED.format(run.folder.path)} It has no validation set either.")
        selected = run.result["delivered_by"] == "validation"
        note = "\n  the network was selected on these examples: train was given no --test" * selected
        recorded = run.result.get(f"{network}_validation_accuracy")
        return cls(task.validation, run.device, None, "validation", recorded, note)

    @property
    def about(self) -> dict[str, Any]:
        return {"recorded_accuracy": self.recorded}

    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        return batches_of(self.data, self.device)

    def remark(self, evaluation: Evaluation) -> str:
        if self.recorded is None:
            return f", not in result.json{self.note}"
        if evaluation.accuracy == self.recorded:
            return f", as in result.json{self.note}"
        changed = "the weights or the data have changed since, or this machine rounds otherwise"
        return f", but {self.recorded:.2%} in result.json:\n  {changed}{self.note}"


# ------------------------------------------------------------------------------------------------------- what is shown

# Letters of a class that head a column, as many as there is room for, and that head a row; and from which on a name
# loses its middle, not its end.
MOST_LETTERS, LEAST_LETTERS, LEAST_WITH_DOTS = 16, 3, 9
# Classes of which a terminal shows the confusion matrix; confusions, and classes, that are listed where there are more.
MOST_IN_A_MATRIX, LISTED = 20, 10


def figures(evaluation: Evaluation, several: MultiLabelAccuracy | None, on: TestFolder | Own) -> str:
    """Accuracy, its interval, the chance level and what else was measured, a line each."""
    low, high = interval(round(evaluation.accuracy * evaluation.n), evaluation.n)
    even = 1 / len(evaluation.confusion)
    rows = [
        (f"{on.part} accuracy", f"{evaluation.accuracy:.2%} of {evaluation.n:,}{on.remark(evaluation)}"),
        ("95 % interval", f"{low:.2%} to {high:.2%}"),
        ("chance level", f"{evaluation.chance:.2%}, the largest class; even guesses: {even:.2%}"),
    ]
    if evaluation.top5 is not None:
        rows.append(("top-5 accuracy", f"{evaluation.top5:.2%}"))
    if several is not None:
        without = several.without_label
        none = f" ({without:,} {'has' if without == 1 else 'have'} none)" if without else ""
        rows.append(("multi-label accuracy", f"{several.accuracy:.2%} of {several.n:,} with a label{none}"))
    rows.append(("expected calibration error", f"{evaluation.expected_calibration_error:.2%}"))
    rows.append(("negative log-likelihood", f"{evaluation.negative_log_likelihood:.3f}"))
    return table(rows, left=2)


def robustness_table(found: Robustness, clean: Evaluation | None) -> str:
    parts = []
    if found.corruptions:
        rows = [("corruption", "none", *map(str, SEVERITIES), "mean error")]
        undamaged = "-" if clean is None else f"{clean.accuracy:.1%}"
        for name, accuracies in found.corruptions.items():
            shares = (f"{accuracy:.1%}" for accuracy in accuracies)
            rows.append((name, undamaged, *shares, f"{1 - statistics.fmean(accuracies):.1%}"))
        mce = "" if found.mean_corruption_error is None else f", mCE {found.mean_corruption_error:.1f} %"
        mean = f"mean accuracy under corruption {found.mean_corrupted_accuracy:.1%}{mce}"
        parts.append(f"accuracy by severity\n\n{table(rows)}\n\n{mean}")
    if found.attacks:
        head = ("attack", "ε in 1/255", "accuracy")
        rows = [(name, eps, f"{a:.1%}") for name, by_eps in found.attacks.items() for eps, a in by_eps.items()]
        parts.append(table([head, *rows]))
    return "\n\n".join(parts)


def _of_a(subject: Subject, folder: Path) -> tuple[dict[str, Any], str]:
    found = sets.imagenet_a(subject, folder)
    whole, classes = _as_json(found), len(found.confusion)
    rows = [
        ("ImageNet-A accuracy", f"{found.accuracy:.2%} of {found.n:,}, by {classes} classes alone"),
        ("ImageNet-A top-5 accuracy", "-" if found.top5 is None else f"{found.top5:.2%}"),
        ("ImageNet-A calibration error", f"{found.expected_calibration_error:.2%}"),
    ]
    return {**{name: whole[name] for name in OF_A}, "classes": classes}, table(rows, left=2)


def _of_c(subject: Subject, folder: Path) -> tuple[dict[str, Any], str]:
    found = sets.imagenet_c(subject, folder)
    return {"n": found.n, **found.to_json()}, f"ImageNet-C\n\n{robustness_table(found, None)}"


def _of_p(subject: Subject, folder: Path) -> tuple[dict[str, Any], str]:
    found = sets.imagenet_p(subject, folder)
    rows = [("ImageNet-P", "flip probability", "of AlexNet's")]
    rows += [(name, f"{flips:.2%}", f"{flips / FLIPS_OF_ALEXNET[name]:.1%}") for name, flips in found.flips.items()]
    rate = "" if found.mean_flip_rate is None else f", mFR {found.mean_flip_rate:.1f} %"
    count = f"accuracy {found.accuracy:.1%} of {found.frames:,} frames in {found.sequences:,} sequences{rate}"
    return found.to_json(), f"{table(rows)}\n\n{count}"


RELEASED = {"a": _of_a, "c": _of_c, "p": _of_p}  # what measures on ImageNet's test sets: for JSON, and in words


def confusions(evaluation: Evaluation, classes: tuple[str, ...]) -> str:
    """The confusion matrix, or what matters most of it where a terminal has no room for the whole."""
    share = ["-" if right is None else f"{right:.1%}" for right in evaluation.per_class]
    if len(classes) <= MOST_IN_A_MATRIX:
        width = max(len(str(n)) for counts in evaluation.confusion for n in counts)
        for letters in range(MOST_LETTERS, LEAST_LETTERS - 1, -1):
            # Where few letters fit, a name's first ones say more than its ends.
            heads = [short(name, letters) if letters >= LEAST_WITH_DOTS else shown(name)[:letters] for name in classes]
            rows = [("class", *(head.rjust(width) for head in heads), "right")]
            for name, counts, right in zip(classes, evaluation.confusion, share, strict=True):
                rows.append((short(name, MOST_LETTERS), *(str(n) if n else "." for n in counts), right))
            if len((matrix := table(rows)).partition("\n")[0]) <= WIDTH:
                head = "how many of a class (row) were taken for which (column), and how many rightly"
                return f"{head}\n\n{matrix}"
    cells = [
        (n, true, p) for true, row in enumerate(evaluation.confusion) for p, n in enumerate(row) if n and true != p
    ]
    sizes = [f"{sum(row):,}" for row in evaluation.confusion]
    most = [("class", "taken for", "times", "of")]
    for n, true, taken in sorted(cells, key=lambda cell: -cell[0])[:LISTED]:
        most.append((short(classes[true]), short(classes[taken]), f"{n:,}", sizes[true]))
    pairs = table(most, left=2) if cells else "nothing is taken for anything else"
    known = sorted((right, index) for index, right in enumerate(evaluation.per_class) if right is not None)[:LISTED]
    worst = table([("class", "right", "of"), *((short(classes[i]), share[i], sizes[i]) for _, i in known)])
    least = f"the {len(known)} of {len(classes):,} classes that are right least often"
    return f"what is taken for what most often\n\n{pairs}\n\n{least}\n\n{worst}"
