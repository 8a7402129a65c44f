"""The accuracies of several methods over several seeds, and whether they differ."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from metapl.apps.inputs import plural
from metapl.metrics import Evaluation, PairedTest, paired_test
from metapl.run_folder import READOUTS

DELIVERED, STUDENT, FINETUNED = READOUTS

# With fewer, no claim is made on whether the feedback helped: a t-test over 3 pairs hardly ever
# finds a difference, and one that it finds is as often luck.
ENOUGH_SEEDS = 5


@dataclass(frozen=True)
class AgainstControl:
    """The test of a method against its control.

    Args:
        method: the method, of which the student is measured.
        control, control_readout: its control, and what is measured of that.
        test: of their difference over the seeds.
    """

    method: str
    control: str
    control_readout: str
    test: PairedTest


@dataclass(frozen=True)
class Comparison:
    """Accuracies by method, paired over seeds.

    Args:
        seeds: in the order of the lists of accuracies.
        methods: by the method's name, accuracies as fractions, one for each seed: of each of
            READOUTS, and as "validation_accuracy" that of the delivered network, where validation
            can tell networks apart.
        titles: what the methods are called in a sentence.
        controls: the method that one is tested against, by the names of those that have one.
        examples: number of examples in the test set.
        chance: accuracy of guessing there.
    """

    seeds: tuple[int, ...]
    methods: dict[str, dict[str, list[float]]]
    titles: Mapping[str, str]
    controls: Mapping[str, str]
    examples: int
    chance: float

    @classmethod
    def of(
        cls,
        seeds: tuple[int, ...],
        methods: Sequence[str],
        results: Mapping[tuple[str, int], Mapping[str, Any]],
    ) -> Comparison:
        """Compare what the ``result.json`` of each method and seed holds."""
        accuracies: dict[str, dict[str, list[float]]] = {}
        for method in methods:
            by_seed = [results[method, seed] for seed in seeds]
            readouts = list(READOUTS)
            if all(result["delivered_by"] == "validation" for result in by_seed):
                readouts.append("validation_accuracy")
            # A student that is not finetuned, as in Noisy Student, stands for the finetuned one.
            accuracies[method] = {
                readout: [result.get(readout, result[STUDENT]) for result in by_seed]
                for readout in readouts
            }
        evaluations = [Evaluation(**result["evaluation"]) for result in results.values()]
        chance = statistics.fmean(result.chance for result in evaluations)
        titles = {method: results[method, seeds[0]]["title"] for method in methods}
        controls = {}
        for method in methods:
            control = results[method, seeds[0]].get("control")
            if control is not None:
                controls[method] = control
        return cls(
            seeds=seeds,
            methods=accuracies,
            titles=titles,
            controls=controls,
            examples=evaluations[0].n,
            chance=chance,
        )

    def mean(self, method: str, readout: str) -> float:
        """Return the mean over the seeds."""
        return statistics.fmean(self.methods[method][readout])

    def against_control(self) -> AgainstControl | None:
        """Test the first method that was run beside its control; None: none was.

        Of the control it takes the better read-out, the one with the higher mean on the test set,
        which favors the control.
        """
        tested = [name for name in self.methods if self.controls.get(name) in self.methods]
        if not tested:
            return None
        method = tested[0]
        control = self.controls[method]
        control_readout = max((STUDENT, FINETUNED), key=lambda name: self.mean(control, name))
        return AgainstControl(
            method=method,
            control=control,
            control_readout=control_readout,
            test=paired_test(self.methods[method][STUDENT], self.methods[control][control_readout]),
        )

    def delivered(self) -> tuple[str, int, str]:
        """Return the method and the seed whose networks are delivered, and why.

        It is the method with the highest mean validation accuracy and its best seed by it, the
        earlier of equals. The test set has no say in it. Where validation cannot tell the methods
        apart, it is the first method's first seed.
        """
        if not all("validation_accuracy" in readouts for readouts in self.methods.values()):
            why = ", the first one named; there was no validation that could tell them apart"
            return next(iter(self.methods)), self.seeds[0], why
        method = max(self.methods, key=lambda name: self.mean(name, "validation_accuracy"))
        accuracies = self.methods[method]["validation_accuracy"]
        best_seed = self.seeds[accuracies.index(max(accuracies))]
        return method, best_seed, "; of all methods it has the best mean validation accuracy"

    def rows(self) -> list[tuple[str, ...]]:
        """Return a table of the methods: mean ± standard deviation of all read-outs, in %."""
        rows: list[tuple[str, ...]] = [("method", "delivered", "student", "finetuned")]
        for name, accuracies in self.methods.items():
            spreads = [spread(accuracies[readout]) for readout in READOUTS]
            rows.append((self.titles[name], *spreads))
        chance = f"{100 * self.chance:.1f}"
        rows.append(("chance", *(chance for _ in READOUTS)))
        return rows

    def caption(self) -> str:
        """Return what the table of :meth:`rows` shows."""
        caption = f"test accuracy in % on {self.examples:,} examples"
        if len(self.seeds) > 1:
            caption += f", mean ± standard deviation over {len(self.seeds)} seeds"
        return caption

    def sentence(self) -> str:
        """Say whether a method helped beside its control, and which method is the best."""
        best = max(self.methods, key=lambda name: self.mean(name, DELIVERED))
        best_sentence = (
            f"The best on the test set is {self.titles[best]} with "
            f"{self.mean(best, DELIVERED):.1%} of {self.examples:,} (chance {self.chance:.1%})."
        )
        against = self.against_control()
        if against is None:
            return best_sentence
        method = against.method
        control = against.control
        test = against.test
        p = "" if test.p is None else f", paired t-test p = {test.p:.2g}"
        if test.n < ENOUGH_SEEDS:
            verdict = (
                f"at least {ENOUGH_SEEDS} seeds are needed to tell whether the feedback helped"
            )
            p = ""
        elif test.p is None:
            verdict = "with every seed the same"
        elif test.p < 0.05:
            verdict = "the feedback helped" if test.mean > 0 else "the feedback hurt"
        else:
            verdict = "these seeds do not show whether the feedback helped"
        students = {STUDENT: "student", FINETUNED: "finetuned student"}
        sentence = (
            f"The student of {self.titles[method]} reaches {self.mean(method, STUDENT):.1%} on "
            f"the test set (n = {self.examples:,}, chance {self.chance:.1%}), the "
            f"{students[against.control_readout]} of {self.titles[control]}, the better of its "
            f"two, {self.mean(control, against.control_readout):.1%}: "
            f"{100 * test.mean:+.1f} points over {plural(test.n, 'seed')}{p}; {verdict}."
        )
        if best != method:
            sentence += f" {best_sentence}"
        return sentence

    def to_json(self) -> dict[str, Any]:
        """Return all of it, with the run that is delivered, ``method`` and ``seed``."""
        method, seed, why = self.delivered()
        content: dict[str, Any] = {
            "method": method,
            "seed": seed,
            "seeds": list(self.seeds),
            "methods": self.methods,
            "titles": dict(self.titles),
            "controls": dict(self.controls),
            "test_examples": self.examples,
            "chance": self.chance,
            "sentence": self.sentence(),
            "delivery": f"delivered: {self.titles[method]}, seed {seed}{why}",
        }
        against = self.against_control()
        if against is not None:
            content[f"{against.method}_against_{against.control}"] = {
                "read_out": against.control_readout,
                **asdict(against.test),
            }
        return content


def spread(values: Sequence[float]) -> str:
    """Return the mean in %, and the standard deviation of several values.

    >>> spread([0.8, 0.9]), spread([0.8])
    ('85.0 ± 7.1', '80.0')
    """
    mean = f"{100 * statistics.fmean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {100 * statistics.stdev(values):.1f}"
