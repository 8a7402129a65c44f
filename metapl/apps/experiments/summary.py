"""What a run reached, in sentences: ``result.json`` in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metapl.apps.recipes.methods import EVERY_METHOD
from metapl.metrics import Evaluation, interval, spoken


def summary(content: Mapping[str, Any]) -> list[str]:
    """What a run reached, in sentences."""
    name, words, lines = content["delivered"], EVERY_METHOD[content["method"]].networks, []
    tested, n = content.get("evaluation"), content["validation_size"]
    why = "by validation" if content["delivered_by"] == "validation" else "the rule where validation cannot tell"
    if EVERY_METHOD[content["method"]].is_noisy_student:
        why = "of the last round" + ", at its best step by validation" * (why == "by validation")
    if tested is not None:
        chance = Evaluation(**tested).chance
        lines.append(f"Test accuracy of the {words[name]}: {spoken(tested['accuracy'], tested['n'], chance)}.")
        if interval(round(tested["accuracy"] * tested["n"]), tested["n"])[0] <= chance:
            lines.append("That is not shown to be better than guessing: it may need more steps, or other choices.")
    if content.get("validation_accuracy") is not None:
        guessed = content.get("validation_chance")  # older runs did not store it
        lines.append(f"Validation accuracy: {spoken(content['validation_accuracy'], n, guessed)}.")
    if not lines:
        lines.append(f"The {words[name]} is delivered; without --test and --val nothing says how good it is.")
    part = "test" if tested is not None else "validation"
    others = {name: content.get(f"{name}_{part}_accuracy") for name in words}
    shown = ", ".join(f"{words[name]} {100 * value:.1f} %" for name, value in others.items() if value is not None)
    if shown:
        lines.append(f"On {part}: {shown}; delivered is the {words[name]} ({why}).")
    if tested is not None and EVERY_METHOD[content["method"]].is_noisy_student:
        lines += better_before(content["rounds"], tested["accuracy"])
    return lines


def spoken_rounds(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the rounds reached and kept, in sentences.

    >>> counts = {"round": 1, "kept": 90, "copies": 90, "unlabeled": 100}
    >>> spoken_rounds([{"teacher": {"test_accuracy": 0.8}, **counts}])[0]  # of another method than Noisy Student
    'Test accuracy of the first teacher, whose labels they are: 80.0 %.'
    """
    last, lines = rounds[-1], []
    taught = rounds[0]["teacher"].get("test_accuracy")
    if "weights_fingerprint" in last and "test_accuracy" in last:
        reached = [taught, *(each["test_accuracy"] for each in rounds)]
        lines.append(f"Test accuracy by round: {', '.join(f'{100 * each:.1f} %' for each in reached)}.")
    elif taught is not None:
        lines.append(f"Test accuracy of the first teacher, whose labels they are: {100 * taught:.1f} %.")
    kept = f"{last['kept']:,} of {last['unlabeled']:,}"
    copies = f", which count as {last['copies']:,}" if last["copies"] != last["kept"] else ""
    lines.append(f"In round {last['round']}, {kept} unlabeled examples were learned from{copies}.")
    return lines


def better_before(rounds: Sequence[Mapping[str, Any]], delivered: float) -> list[str]:
    """A sentence where an earlier network did better on the test set than the one that is delivered.

    >>> better_before([{"test_accuracy": 0.8, "teacher": {"test_accuracy": 0.7}}, {"test_accuracy": 0.75}], 0.75)
    ['Round 1 reached 80.0 % on test, more than the last, which is delivered by rule: the test set chooses nothing.']
    """
    reached = [rounds[0]["teacher"].get("test_accuracy"), *(each.get("test_accuracy") for each in rounds[:-1])]
    best = max(range(len(reached)), key=lambda number: reached[number] or 0.0)
    if (reached[best] or 0.0) <= delivered:
        return []
    return [
        f"Round {best} reached {100 * reached[best]:.1f} % on test, more than the last, which is delivered by rule: "
        "the test set chooses nothing."
    ]
