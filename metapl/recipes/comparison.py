"""Methods side by side over the same seeds, and what can be said of the difference."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metapl.errors import MetaplError
from metapl.evaluate import PairedTest, paired_test

ReadOuts = Mapping[str, Sequence[float]]

TITLES = {
    "mpl": "Meta Pseudo Labels",
    "none": "same loop, no feedback",
    "supervised": "supervised, labelled data only",
    "label_smoothing": "supervised with label smoothing",
    "supervised_everything": "supervised with all true labels (headroom)",
    "pseudo_labels": "pseudo labels of a fixed teacher, soft",
    "pseudo_labels_hard": "pseudo labels of a fixed teacher, hard",
    "uda": "UDA alone",
    "permuted": "MPL, feedback permuted over the batch",
    "class_means": "MPL, class means of the feedback only",
    "random_sign": "MPL, feedback with random signs",
}


@dataclass(frozen=True)
class Comparison:
    """Test accuracies by method, paired over seeds.

    Args:
        seeds: the seeds, in the order of the lists.
        methods: name → {"test_accuracy": one per seed, "finetuned_test_accuracy": one per seed}, fractions.
    """

    seeds: tuple[int, ...]
    methods: dict[str, dict[str, list[float]]]

    def __post_init__(self) -> None:
        for name, readouts in self.methods.items():
            if any(len(values) != len(self.seeds) for values in readouts.values()):
                raise MetaplError(f"method {name} has not one accuracy for each of the {len(self.seeds)} seeds.")

    def against_control(self) -> tuple[PairedTest, str] | None:
        """MPL's student against the better read-out of the same loop without feedback, and that read-out's name.

        The better one is the one with the higher mean on the test set, which favours the control.
        """
        if not {"mpl", "none"} <= self.methods.keys():
            return None
        control = self.methods["none"]
        better = max(control, key=lambda readout: statistics.fmean(control[readout]))
        return paired_test(self.methods["mpl"]["test_accuracy"], control[better]), better

    def table(self) -> str:
        """The methods with mean ± standard deviation of both read-outs, in %.

        >>> accuracies = {"test_accuracy": [0.8, 0.9], "finetuned_test_accuracy": [0.8, 0.8]}
        >>> print(Comparison((0, 1), {"mpl": accuracies}).table())
        method                                  student        finetuned      n
        Meta Pseudo Labels                      85.0 ± 7.1     80.0 ± 0.0     2
        """
        rows = [("method", "student", "finetuned", "n")]
        for name, found in self.methods.items():
            student, finetuned = _spread(found["test_accuracy"]), _spread(found["finetuned_test_accuracy"])
            rows.append((TITLES.get(name, name), student, finetuned, str(len(self.seeds))))
        return "\n".join(f"{a:<40}{b:<15}{c:<15}{d}" for a, b, c, d in rows)

    def sentence(self) -> str:
        """Whether the teacher's feedback helped, in one sentence with its statistics."""
        found = self.against_control()
        if found is None:
            return "No comparison of mpl with none was run."
        test, readout = found
        mine = statistics.fmean(self.methods["mpl"]["test_accuracy"])
        theirs = statistics.fmean(self.methods["none"][readout])
        which = "finetuned student" if readout.startswith("finetuned") else "student"
        start = (
            f"MPL's student reaches {mine:.1%} on the test set, the same loop without feedback {theirs:.1%} (its "
            f"{which}, the better of its two read-outs): {100 * test.mean:+.1f} points"
        )
        if test.p is None:
            return f"{start} on {_seeds(test.n)}, too few to tell whether the teacher's feedback helped."
        return f"{start} over {_seeds(test.n)}, paired t-test p = {_p(test.p)}: {_verdict(test.mean, test.p)}."

    def to_json(self) -> dict[str, Any]:
        """For ``result.json``."""
        found = self.against_control()
        content: dict[str, Any] = {"seeds": list(self.seeds), "methods": self.methods, "sentence": self.sentence()}
        if found is not None:
            content["mpl_against_none"] = {"read_out": found[1], **found[0].to_json()}
        return content


def _spread(values: Sequence[float]) -> str:
    std = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{100 * statistics.fmean(values):.1f} ± {100 * std:.1f}" if len(values) > 1 else f"{100 * values[0]:.1f}"


def _seeds(n: int) -> str:
    return f"{n} seed{'s' if n != 1 else ''}"


def _p(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}"


def _verdict(mean: float, p: float) -> str:
    if p >= 0.05:
        return "these seeds do not show whether the teacher's feedback helped"
    return "the teacher's feedback helped" if mean > 0 else "the teacher's feedback hurt"


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from ``"0-9"``, ``"0,3,5"`` or a mixture.

    >>> parse_seeds("0-2,7")
    (0, 1, 2, 7)
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise MetaplError(f"seeds={text!r}: expected numbers and ranges, such as 0-9 or 0,3,5.")
        seeds += range(int(first), int(last or first) + 1)
    if not seeds or len(set(seeds)) < len(seeds):
        raise MetaplError(f"seeds={text!r}: expected at least one seed, and none twice.")
    return tuple(seeds)
