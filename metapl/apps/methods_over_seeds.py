"""The accuracies of several methods over several seeds: do they differ?"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from metapl.apps.inputs import plural
from metapl.apps.run_folder import READOUTS
from metapl.errors import MetaplError
from metapl.metrics import Evaluation, PairedTest, paired_test

DELIVERED, STUDENT, FINETUNED = READOUTS
MOST_SEEDS = 10_000

# With fewer, no claim is made on whether the feedback helped: a t-test over 3 pairs hardly ever
# finds a difference, and one that it finds is as often luck.
ENOUGH_SEEDS = 5

# What each method with feedback is tested against.
CONTROL = {"mpl": "none", "reduced_mpl": "reduced_none"}
CONTROL |= dict.fromkeys(
    ("example_weights", "meta_weight_net", "label_correction", "noise_transition"), "plain"
)


@dataclass(frozen=True)
class Comparison:
    """Accuracies by method, paired over seeds."""

    seeds: tuple[int, ...]  # in the order of the lists
    # By name, accuracies as fractions, one for each seed: of each of READOUTS, and as
    # "validation_accuracy" of the delivered network, where validation can tell networks apart.
    methods: dict[str, dict[str, list[float]]]
    titles: Mapping[str, str]  # of the methods, in words
    examples: int  # in the test set
    chance: float  # the accuracy of guessing there

    @classmethod
    def of(
        cls,
        seeds: tuple[int, ...],
        methods: Sequence[str],
        results: Mapping[tuple[str, int], Mapping[str, Any]],
    ) -> Comparison:
        """The comparison of what the ``result.json`` of each method and seed holds."""
        accuracies: dict[str, dict[str, list[float]]] = {}
        for method in methods:
            by_seed = [results[method, seed] for seed in seeds]
            validated = all(result["delivered_by"] == "validation" for result in by_seed)
            # A student that is not finetuned, as in Noisy Student, stands for the finetuned one.
            accuracies[method] = {
                readout: [result.get(readout, result[STUDENT]) for result in by_seed]
                for readout in (*READOUTS, *(["validation_accuracy"] if validated else []))
            }
        evaluations = [Evaluation(**result["evaluation"]) for result in results.values()]
        chance = statistics.fmean(result.chance for result in evaluations)
        titles = {method: results[method, seeds[0]]["title"] for method in methods}
        return cls(seeds, accuracies, titles, evaluations[0].n, chance)

    def mean(self, method: str, readout: str) -> float:
        return statistics.fmean(self.methods[method][readout])

    def against_control(self) -> tuple[str, str, str, str, PairedTest] | None:
        """The first method that was run beside its control, MPL before others, its read-out, that
        control, the read-out of that, and the test of their difference.

        Of the control it is the better read-out, the one with the higher mean on the test set,
        which favors it. Only finetuning learns from the clean labels, which plain training has
        learned from already.
        """
        pairs = [
            (name, CONTROL[name]) for name in self.methods if CONTROL.get(name) in self.methods
        ]
        if not pairs:
            return None
        method, control = min(pairs, key=lambda pair: pair[0] != "mpl")
        own = FINETUNED if control == "plain" else STUDENT
        better = max((STUDENT, FINETUNED), key=lambda readout: self.mean(control, readout))
        return (
            method,
            own,
            control,
            better,
            paired_test(self.methods[method][own], self.methods[control][better]),
        )

    def delivered(self) -> tuple[str, int, str]:
        """The method with the highest mean validation accuracy and its best seed by it, the earlier of equals, and why.

        The test set has no say in it. Where validation cannot tell them apart, it is the first
        method's first seed.
        """
        if not all("validation_accuracy" in of for of in self.methods.values()):
            why = ", the first one named; there was no validation that could tell them apart"
            return next(iter(self.methods)), self.seeds[0], why
        method = max(self.methods, key=lambda name: self.mean(name, "validation_accuracy"))
        by_seed = dict(zip(self.seeds, self.methods[method]["validation_accuracy"], strict=True))
        why = "; of all methods it has the best mean validation accuracy"
        return method, max(self.seeds, key=by_seed.__getitem__), why

    def rows(self) -> list[tuple[str, ...]]:
        """The methods with mean ± standard deviation of all read-outs, in %, below a head."""
        found: list[tuple[str, ...]] = [("method", "delivered", "student", "finetuned")]
        for name, of in self.methods.items():
            found.append((self.titles[name], *(spread(of[readout]) for readout in READOUTS)))
        return [*found, ("chance", *[f"{100 * self.chance:.1f}"] * len(READOUTS))]

    def caption(self) -> str:
        """What stands in :meth:`rows`."""
        over = (
            f", mean ± standard deviation over {len(self.seeds)} seeds"
            if len(self.seeds) > 1
            else ""
        )
        return f"test accuracy in % on {self.examples:,} examples{over}"

    def sentence(self) -> str:
        """Whether what was run beside its control helped, with its statistics, and which method is the best."""
        best = max(self.methods, key=lambda name: self.mean(name, DELIVERED))
        reached = (
            f"{self.mean(best, DELIVERED):.1%} of {self.examples:,} (chance {self.chance:.1%})"
        )
        said = f"The best on the test set is {self.titles[best]} with {reached}."
        if (found := self.against_control()) is None:
            return said
        name, own, control, readout, test = found
        what = "what is learned about labels" if control == "plain" else "the feedback"
        p = "" if test.p is None else f", paired t-test p = {test.p:.2g}"
        verdict = f"these seeds do not show whether {what} helped"
        if test.n < ENOUGH_SEEDS:
            verdict, p = (
                f"at least {ENOUGH_SEEDS} seeds are needed to tell whether {what} helped",
                "",
            )
        elif test.p is None:
            verdict = "with every seed the same"
        elif test.p < 0.05:
            verdict = f"{what} {'helped' if test.mean > 0 else 'hurt'}"
        which = {STUDENT: "student", FINETUNED: "finetuned student"}
        return (
            f"The {which[own]} of {self.titles[name]} reaches {self.mean(name, own):.1%} on the "
            f"test set (n = {self.examples:,}, chance {self.chance:.1%}), the {which[readout]} of "
            f"{self.titles[control]}, the better of its two, {self.mean(control, readout):.1%}: "
            f"{100 * test.mean:+.1f} points over {plural(test.n, 'seed')}{p}; "
            f"{verdict}.{f' {said}' if best != name else ''}"
        )

    def to_json(self) -> dict[str, Any]:
        """All of it, with the run that is delivered, ``method`` and ``seed``."""
        method, seed, why = self.delivered()
        content: dict[str, Any] = {
            "method": method,
            "seed": seed,
            "seeds": list(self.seeds),
            "methods": self.methods,
            "titles": dict(self.titles),
            "test_examples": self.examples,
            "chance": self.chance,
            "sentence": self.sentence(),
            "delivery": f"delivered: {self.titles[method]}, seed {seed}{why}",
        }
        if (found := self.against_control()) is not None:
            content[f"{found[0]}_against_{found[2]}"] = {"read_out": found[3], **asdict(found[4])}
        return content


def spread(values: Sequence[float]) -> str:
    """The mean in %, and the standard deviation of several values.

    >>> spread([0.8, 0.9]), spread([0.8])
    ('85.0 ± 7.1', '80.0')
    """
    mean = f"{100 * statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from ``"0-9"``, ``"0,3,5"`` or a mixture.

    >>> parse_seeds("0-2,7")
    (0, 1, 2, 7)
    """
    parts = [
        re.fullmatch(r"\s*([0-9]{1,10})(?:-([0-9]{1,10}))?\s*", part) for part in text.split(",")
    ]
    ranges = [
        range(int(part[1]), int(part[2] or part[1]) + 1) for part in parts if part is not None
    ]
    sound = None not in parts and all(each and each.stop <= 2**32 for each in ranges)
    seeds = [*itertools.chain(*ranges)] if sound and sum(map(len, ranges)) <= MOST_SEEDS else []
    if not seeds or len({*seeds}) < len(seeds):
        expected = (
            "rising numbers and ranges below 2^32, such as 0-9 or 0,3,5, each once, "
            f"{MOST_SEEDS:,} at most"
        )
        raise MetaplError(f"--seeds {text:.60}: expected {expected}.")
    return tuple(seeds)
