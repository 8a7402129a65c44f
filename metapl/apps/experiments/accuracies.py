"""What runs reached, in sentences, and the accuracies of several methods over several seeds: do they differ?"""

from __future__ import annotations

import itertools
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from metapl.apps.experiments.folder import READOUTS as READOUTS
from metapl.apps.recipes.methods import EVERY_METHOD, title, titled
from metapl.apps.words import table
from metapl.errors import MetaplError
from metapl.metrics import Evaluation, PairedTest, interval, paired_test

DELIVERED, STUDENT, FINETUNED = READOUTS

MOST_SEEDS = 10_000

# With fewer, no claim is made on whether the feedback helped: a t-test over 3 pairs hardly ever finds a difference, and
# one that it finds is as often luck.
ENOUGH_SEEDS = 5


@dataclass(frozen=True)
class Comparison:
    """Accuracies by method, paired over seeds."""

    seeds: tuple[int, ...]  # in the order of the lists
    # By name, accuracies as fractions, one for each seed: of each of READOUTS, and as "validation_accuracy" of the
    # delivered network, where validation can tell networks apart.
    methods: dict[str, dict[str, list[float]]]
    examples: int  # in the test set
    chance: float  # the accuracy of guessing there

    def __post_init__(self) -> None:
        for name, readouts in self.methods.items():
            if any(len(values) != len(self.seeds) for values in readouts.values()):
                raise MetaplError(f"method {name} has not one accuracy for each of the {len(self.seeds)} seeds.")

    @classmethod
    def of(
        cls, seeds: tuple[int, ...], methods: Sequence[str], results: Mapping[tuple[str, int], Mapping[str, Any]]
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
        return cls(seeds, accuracies, evaluations[0].n, chance)

    def mean(self, method: str, readout: str) -> float:
        return statistics.fmean(self.methods[method][readout])

    def pair(self) -> tuple[str, str] | None:
        """The first method that was run beside its control, MPL before others, and that control."""
        for name in sorted(self.methods, key=lambda name: name != "mpl"):
            control = EVERY_METHOD[name].control if name in EVERY_METHOD else None
            if control in self.methods:
                return name, str(control)
        return None

    def against_control(self) -> tuple[PairedTest, str] | None:
        """The first of :meth:`pair` against the second, and the read-out of the second by its name.

        It is the student of the first against the better read-out of the second, the one with the higher mean on the
        test set, which favors the control.
        """
        if (pair := self.pair()) is None:
            return None
        method, control = pair
        asked = _question(method)
        better = max((STUDENT, FINETUNED), key=lambda readout: self.mean(control, readout))
        return paired_test(self.methods[method][asked.own], self.methods[control][better]), better

    def best(self) -> str:
        """The method whose delivered networks have the highest mean accuracy on the test set; the earlier of equals."""
        return max(self._methods(), key=lambda name: self.mean(name, DELIVERED))

    def delivered(self) -> tuple[str, int]:
        """The method with the highest mean validation accuracy and its best seed by it; the earlier of equals.

        The test set has no say in it. Where validation cannot tell them apart, it is the first method's first seed.
        """
        names = self._methods()
        if not self._validated():
            return names[0], self.seeds[0]
        method = max(names, key=lambda name: self.mean(name, "validation_accuracy"))
        by_seed = dict(zip(self.seeds, self.methods[method]["validation_accuracy"], strict=True))
        return method, max(self.seeds, key=by_seed.__getitem__)

    def _methods(self) -> list[str]:
        """The methods that can be used, or all where the headroom is alone."""
        headroom = [name for name, method in EVERY_METHOD.items() if method.place == "headroom"]
        return [name for name in self.methods if name not in headroom] or list(self.methods)

    def _validated(self) -> bool:
        return all("validation_accuracy" in self.methods[name] for name in self._methods())

    def table(self) -> str:
        """The methods with mean ± standard deviation of all read-outs, in %.

        >>> accuracies = dict.fromkeys(READOUTS, [0.8, 0.9])
        >>> print(Comparison((0, 1), {"mpl": accuracies}, examples=400, chance=0.1).table())
        method              delivered   student     finetuned
        Meta Pseudo Labels  85.0 ± 7.1  85.0 ± 7.1  85.0 ± 7.1
        chance              10.0        10.0        10.0
        """
        rows: list[tuple[str, ...]] = [("method", "delivered", "student", "finetuned")]
        for name, accuracies in self.methods.items():
            rows.append((title(name), *(spread(accuracies[readout], digits=1) for readout in READOUTS)))
        rows.append(("chance", *[f"{100 * self.chance:.1f}"] * len(READOUTS)))
        return table(rows, left=len(rows[0]))

    def caption(self) -> str:
        over = f", mean ± standard deviation over {seeds_in_words(len(self.seeds))}" if len(self.seeds) > 1 else ""
        return f"test accuracy in % on {self.examples:,} examples{over}{where_one_network(self.methods)}"

    def sentence(self) -> str:
        """Whether what was run beside its control helped, with its statistics, and which method is the best."""
        difference, pair, best = self.against_control(), self.pair(), self.best()
        reached = with_chance(self.mean(best, DELIVERED), self.examples, self.chance)
        said = f"the best on the test set is {title(best)} with {reached}"
        if difference is not None and pair is not None:
            (test, readout), (name, control), asked = difference, pair, _question(pair[0])
            which = titled(control, "finetuned" if readout == FINETUNED else "student")
            better = f" (its {which}, the better of its two read-outs)"
            said = (
                f"{asked.subject} reaches {self.mean(name, asked.own):.1%} on the test set (n = {self.examples:,}, "
                f"chance {self.chance:.1%}), {asked.control} {self.mean(control, readout):.1%}{better}: "
                f"{100 * test.mean:+.1f} points over {seeds_in_words(test.n)}{_verdict(test, asked)}"
                f"{f'; {said}' if best != name else ''}"
            )
        return f"{said[0].upper()}{said[1:]}."

    def delivery(self) -> str:
        """Which run the comparison delivers, and why that one."""
        method, seed = self.delivered()
        why = ", the first one named; there was no validation that could tell them apart"
        if self._validated():
            why = "; of all methods it has the best mean validation accuracy"
        return f"delivered: {title(method)}, seed {seed}{why}"

    def to_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {
            "seeds": list(self.seeds),
            "methods": self.methods,
            "test_examples": self.examples,
            "chance": self.chance,
            "sentence": self.sentence(),
            "delivery": self.delivery(),
        }
        if (difference := self.against_control()) is not None:
            content["_against_".join(self.pair() or ())] = {"read_out": difference[1], **difference[0].to_json()}
        return content


def where_one_network(methods: Iterable[str]) -> str:
    """A remark on the columns of a table, where some of the methods have no student.

    >>> where_one_network(["mpl", "uda"]), where_one_network(["mpl", "none"])
    ('; student: where one network is trained, that network', '')
    """
    alone = any(name in EVERY_METHOD and EVERY_METHOD[name].one_network for name in methods)
    return "; student: where one network is trained, that network" if alone else ""


def spread(values: Sequence[float], digits: int) -> str:
    """The mean in %, and the standard deviation of several values.

    >>> spread([0.8, 0.9], digits=1), spread([0.8], digits=2)
    ('85.0 ± 7.1', '80.00')
    """
    mean = f"{100 * statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.{digits}f}"


def seeds_in_words(n: int) -> str:
    return f"{n} seed{'s' if n != 1 else ''}"


class _Question(NamedTuple):
    """What the comparison of a method with its control asks."""

    subject: str  # the networks, as the sentence calls them
    control: str
    question: str  # what the test could tell, after "tell" and "show"
    answers: tuple[str, str]  # where the difference is above 0, and where it is not
    own: str = STUDENT  # the read-out of the method


def _question(name: str) -> _Question:
    method = EVERY_METHOD[name]
    subject, what, control, own = "MPL's student", "the teacher's feedback", "the same loop without feedback", STUDENT
    if method.reduced:
        subject, what = "reduced MPL's student", "the student's feedback"
    if method.doubting:
        # Only finetuning learns from the clean labels, which plain training has learned from already.
        subject, what = f"with {title(name)} the finetuned student", "what is learned about labels"
        control, own = "plain training", FINETUNED
    return _Question(subject, control, f"whether {what} helped", (f"{what} helped", f"{what} hurt"), own)


def _verdict(test: PairedTest, asked: _Question) -> str:
    if test.n < ENOUGH_SEEDS:
        return f"; at least {ENOUGH_SEEDS} seeds are needed to tell {asked.question}"
    if test.p is None:  # all differences are the same
        return f", with every seed the same: too little to tell {asked.question}"
    found = asked.answers[test.mean <= 0] if test.p < 0.05 else f"these seeds do not show {asked.question}"
    p = f"{test.p:.2g}" if test.p >= 1e-4 else f"{test.p:.0e}"
    return f", paired t-test p = {p}: {found}"


def parse_seeds(text: str, flag: str = "--seeds") -> tuple[int, ...]:
    """Seeds from ``"0-9"``, ``"0,3,5"`` or a mixture; ``flag`` is named in errors.

    >>> parse_seeds("0-2,7")
    (0, 1, 2, 7)
    """
    ranges: list[range] = []
    for part in text.split(","):
        # Python does not read any length.
        found = re.fullmatch(r"\s*([0-9]{1,99})(?:-([0-9]{1,99}))?\s*", part)
        if found is None:
            raise MetaplError(f"{flag}={text!r}: expected numbers and ranges, such as 0-9 or 0,3,5.")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise MetaplError(f"{flag}={text!r}: {first}-{last} ends before it begins; write {last}-{first}.")
        ranges.append(range(first, last + 1))
    if any(part.stop > 2**32 for part in ranges) or sum(map(len, ranges)) > MOST_SEEDS:
        raise MetaplError(f"{flag}={text!r}: expected at most {MOST_SEEDS:,} seeds, each below 2^32.")
    again, times = Counter(itertools.chain(*ranges)).most_common(1)[0]
    if times > 1:
        raise MetaplError(f"{flag}={text!r}: expected each seed once and none twice; {again} is named again.")
    return tuple(itertools.chain(*ranges))


# --------------------------------------------------------------------------------------------------------------- a run


def summary(content: Mapping[str, Any]) -> list[str]:
    """What a run reached, in sentences: ``result.json`` in words."""
    method, lines = EVERY_METHOD[content["method"]], []
    words, name, tested = method.networks, content["delivered"], content.get("evaluation")
    why = "by validation" if content["delivered_by"] == "validation" else "the rule where validation cannot tell"
    if method.is_noisy_student:
        why = "of the last round" + ", at its best step by validation" * (why == "by validation")
    if tested is not None:
        chance = Evaluation(**tested).chance
        lines.append(f"Test accuracy of the {words[name]}: {spoken(tested['accuracy'], tested['n'], chance)}.")
        if interval(round(tested["accuracy"] * tested["n"]), tested["n"])[0] <= chance:
            lines.append("That is not shown to be better than guessing: it may need more steps, or other choices.")
    if (reached := content.get("validation_accuracy")) is not None:
        guessed = content.get("validation_chance")  # older runs did not store it
        lines.append(f"Validation accuracy: {spoken(reached, content['validation_size'], guessed)}.")
    if not lines:
        lines.append(f"The {words[name]} is delivered; without --test and --val nothing says how good it is.")
    part = "test" if tested is not None else "validation"
    others = {name: content.get(f"{name}_{part}_accuracy") for name in words}
    shown = ", ".join(f"{words[name]} {100 * value:.1f} %" for name, value in others.items() if value is not None)
    if shown:
        lines.append(f"On {part}: {shown}; delivered is the {words[name]} ({why}).")
    if tested is not None and method.is_noisy_student:
        lines += better_before(content["rounds"], tested["accuracy"])
    return lines


def with_chance(accuracy: float, n: int, chance: float) -> str:
    """An accuracy with the number of examples and the chance level.

    >>> with_chance(0.7125, 400, 0.1)
    '71.2% of 400 (chance 10.0%)'
    """
    return f"{accuracy:.1%} of {n:,} (chance {chance:.1%})"


def spoken(accuracy: float, n: int, chance: float | None) -> str:
    """An accuracy in words, with its number of examples n, its 95 % interval, and what guessing reaches where known.

    >>> spoken(131 / 150, 150, 0.1)
    '87.3 % (n = 150, 95 % interval 81.1-91.7, chance 10.0 %)'
    """
    if not 0 <= accuracy <= 1 or not 0 <= (chance or 0) <= 1:
        raise MetaplError(f"accuracy {accuracy} beside chance {chance} was given; expected fractions, 0 to 1")
    low, high = (f"{100 * end:.1f}" for end in interval(round(accuracy * n), n))
    guessed = "" if chance is None else f", chance {100 * chance:.1f} %"
    return f"{accuracy * 100:.1f} % (n = {n:,}, 95 % interval {low}-{high}{guessed})"


def spoken_rounds(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the rounds reached and kept, in sentences.

    >>> counts = {"round": 1, "kept": 90, "copies": 90, "unlabeled": 100}
    >>> spoken_rounds([{"teacher": {"test_accuracy": 0.8}, "test_accuracy": 0.9, **counts}])[0]
    'Test accuracy by round: 80.0 %, 90.0 %.'
    """
    last, lines = rounds[-1], []
    if "test_accuracy" in last:
        reached = [rounds[0]["teacher"]["test_accuracy"], *(each["test_accuracy"] for each in rounds)]
        lines.append(f"Test accuracy by round: {', '.join(f'{100 * each:.1f} %' for each in reached)}.")
    kept = f"{last['kept']:,} of {last['unlabeled']:,}"
    copies = f", which count as {last['copies']:,}" if last["copies"] != last["kept"] else ""
    lines.append(f"In round {last['round']}, {kept} unlabeled examples were learned from{copies}.")
    return lines


def better_before(rounds: Sequence[Mapping[str, Any]], delivered: float) -> list[str]:
    """A sentence where an earlier network did better on the test set than the one that is delivered.

    >>> better_before([{"test_accuracy": 0.8, "teacher": {"test_accuracy": 0.7}}, {"test_accuracy": 0.75}], 0.75)
    ['Round 1 reached 80.0 % on test, more than the last, which is delivered by rule: the test set chooses nothing.']
    """
    reached = [each.get("test_accuracy") or 0.0 for each in (rounds[0]["teacher"], *rounds[:-1])]
    best = max(range(len(reached)), key=reached.__getitem__)
    if reached[best] <= delivered:
        return []
    return [
        f"Round {best} reached {100 * reached[best]:.1f} % on test, more than the last, which is delivered by rule: "
        "the test set chooses nothing."
    ]
