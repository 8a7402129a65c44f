"""What ``metapl evaluate`` prints."""

from __future__ import annotations

import statistics

from metapl.apps.commands.parse import WIDTH
from metapl.apps.evaluation import MultiLabelAccuracy
from metapl.apps.evaluation.corruptions import SEVERITIES
from metapl.apps.evaluation.errors import FLIPS_OF_ALEXNET
from metapl.apps.evaluation.imagenet import Stability
from metapl.apps.evaluation.measure import Robustness
from metapl.metrics import Evaluation, interval
from metapl.words import short, shown, table

MOST_LETTERS, LEAST_LETTERS = 16, 3
"""Letters of a class that head a column, as many as there is room for, and that head a row."""

LEAST_WITH_DOTS = 9
"""Letters from which on a name loses its middle, not its end."""

MOST_IN_A_MATRIX = 20
"""Classes of which a terminal shows the confusion matrix."""

LISTED = 10
"""Confusions, and classes, that are listed where there are more."""


def figures(evaluation: Evaluation, label_sets: MultiLabelAccuracy | None, part: str, of_accuracy: str) -> str:
    """Accuracy, its interval, the chance level and what else was measured, a line each."""
    low, high = interval(round(evaluation.accuracy * evaluation.n), evaluation.n)
    even = 1 / len(evaluation.confusion)
    lines = {
        f"{part} accuracy": f"{evaluation.accuracy:.2%} of {evaluation.n:,}" + f", {of_accuracy}" * bool(of_accuracy),
        "95 % interval": f"{low:.2%} to {high:.2%}",
        "chance level": f"{evaluation.chance:.2%}, the largest class; even guesses: {even:.2%}",
    }
    if evaluation.top5 is not None:
        lines["top-5 accuracy"] = f"{evaluation.top5:.2%}"
    if label_sets is not None:
        without = label_sets.without_label
        none = f" ({without:,} {'has' if without == 1 else 'have'} none)" if without else ""
        lines["multi-label accuracy"] = f"{label_sets.accuracy:.2%} of {label_sets.n:,} with a label{none}"
    lines["expected calibration error"] = f"{evaluation.expected_calibration_error:.2%}"
    lines["negative log-likelihood"] = f"{evaluation.negative_log_likelihood:.3f}"
    return "\n".join(f"{name:<28}{value}" for name, value in lines.items())


def robustness_table(found: Robustness, clean: Evaluation | None) -> str:
    """Accuracies by severity and by ε."""
    parts = []
    if found.corruptions:
        head = ("corruption", "none", *map(str, SEVERITIES), "mean error")
        rows = [
            (
                name,
                "-" if clean is None else f"{clean.accuracy:.1%}",
                *(f"{a:.1%}" for a in accuracies),
                f"{1 - statistics.fmean(accuracies):.1%}",
            )
            for name, accuracies in found.corruptions.items()
        ]
        mean = f"mean accuracy under corruption {found.mean_corrupted_accuracy:.1%}"
        mce = found.mean_corruption_error
        parts.append(
            f"accuracy by severity\n\n{table([head, *rows])}\n\n{mean}" + ("" if mce is None else f", mCE {mce:.1f} %")
        )
    if found.attacks:
        rows = [("attack", "ε in 1/255", "accuracy")]
        rows += [(name, eps, f"{a:.1%}") for name, by_eps in found.attacks.items() for eps, a in by_eps.items()]
        parts.append(table(rows))
    return "\n\n".join(parts)


def released_table(a: Evaluation | None, c: Robustness | None, p: Stability | None) -> list[str]:
    """Of ImageNet's released test sets."""
    blocks = []
    if a is not None:
        lines = {
            "ImageNet-A accuracy": f"{a.accuracy:.2%} of {a.n:,}, by {len(a.confusion)} classes alone",
            "ImageNet-A top-5 accuracy": "-" if a.top5 is None else f"{a.top5:.2%}",
            "ImageNet-A calibration error": f"{a.expected_calibration_error:.2%}",
        }
        blocks.append("\n".join(f"{name:<30}{value}" for name, value in lines.items()))
    if c is not None:
        blocks.append("ImageNet-C\n\n" + robustness_table(c, None))
    if p is not None:
        rows = [("ImageNet-P", "flip probability", "of AlexNet's")]
        rows += [(name, f"{flips:.2%}", f"{flips / FLIPS_OF_ALEXNET[name]:.1%}") for name, flips in p.flips.items()]
        rate = "" if p.mean_flip_rate is None else f", mFR {p.mean_flip_rate:.1f} %"
        count = f"accuracy {p.accuracy:.1%} of {p.frames:,} frames in {p.sequences:,} sequences{rate}"
        blocks.append(f"{table(rows)}\n\n{count}")
    return blocks


def confusions(evaluation: Evaluation, classes: tuple[str, ...]) -> str:
    """The confusion matrix, or what matters most of it where a terminal has no room for the whole."""
    if len(classes) <= MOST_IN_A_MATRIX:
        for letters in range(MOST_LETTERS, LEAST_LETTERS - 1, -1):
            matrix = _matrix(evaluation, classes, letters)
            if len(matrix.partition("\n")[0]) <= WIDTH:
                head = "how many of a class (row) were taken for which (column), and how many rightly"
                return f"\n{head}\n\n{matrix}"
    return f"\nwhat is taken for what most often\n\n{_most(evaluation, classes)}\n\n{_worst(evaluation, classes)}"


def _matrix(evaluation: Evaluation, classes: tuple[str, ...], letters: int) -> str:
    """The confusion matrix with the accuracy of each class; a dot is 0."""
    width = max(len(str(n)) for counts in evaluation.confusion for n in counts)
    rows = [("class", *(_heading(name, letters).rjust(width) for name in classes), "right")]
    for name, counts, right in zip(classes, evaluation.confusion, evaluation.per_class, strict=True):
        rows.append((short(name, MOST_LETTERS), *(str(n) if n else "." for n in counts), _share(right)))
    return table(rows)


def _heading(name: str, letters: int) -> str:
    """
    >>> _heading("triangle_pointing_up", 12), _heading("triangle", 5)
    ('trian...g_up', 'trian')
    """
    return short(name, letters) if letters >= LEAST_WITH_DOTS else shown(name)[:letters]


def _most(evaluation: Evaluation, classes: tuple[str, ...]) -> str:
    """The pairs of classes that are confused most often."""
    cells = [(n, true, p) for true, row in enumerate(evaluation.confusion) for p, n in enumerate(row)]
    pairs = [cell for cell in cells if cell[0] and cell[1] != cell[2]]
    rows = [("class", "taken for", "times", "of")]
    for n, true, taken in sorted(pairs, key=lambda pair: -pair[0])[:LISTED]:
        rows.append((short(classes[true]), short(classes[taken]), f"{n:,}", f"{sum(evaluation.confusion[true]):,}"))
    return table(rows, left=2) if len(rows) > 1 else "nothing is taken for anything else"


def _worst(evaluation: Evaluation, classes: tuple[str, ...]) -> str:
    """The classes of which the smallest share is right."""
    known = [(right, index) for index, right in enumerate(evaluation.per_class) if right is not None]
    rows = [("class", "right", "of")]
    for right, index in sorted(known)[:LISTED]:
        rows.append((short(classes[index]), _share(right), f"{sum(evaluation.confusion[index]):,}"))
    least = f"the {len(rows) - 1} of {len(classes):,} classes that are right least often"
    return f"{least}\n\n{table(rows)}"


def _share(right: float | None) -> str:
    return "-" if right is None else f"{right:.1%}"
