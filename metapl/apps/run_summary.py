"""What a run reached, in sentences: ``result.json`` in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metapl.apps.pace import spoken_counts
from metapl.apps.printing import as_flags
from metapl.metrics import Evaluation, interval
from metapl.run_folder import guessing

# The share of the labeled examples that a network has right, from which on it has memorized them.
MEMORIZED = 0.95


def summary(content: Mapping[str, Any]) -> list[str]:
    """Return what a run reached, in sentences.

    Args:
        content: what ``result.json`` holds.
    """
    words = content["networks"]
    delivered = words[content["delivered"]]
    tested = content.get("evaluation")
    validation_accuracy = content.get("validation_accuracy")
    lines: list[str] = []
    if tested is not None:
        chance = Evaluation(**tested).chance
        accuracy = spoken(tested["accuracy"], tested["n"], chance)
        lines.append(f"Test accuracy of the {delivered}: {accuracy}.")
    if validation_accuracy is not None:
        size = content["validation_size"]
        accuracy = spoken(validation_accuracy, size, content["validation_chance"])
        lines.append(f"Validation accuracy: {accuracy}.")
    if not lines:
        lines.append(
            f"The {delivered} is delivered; without --test and --val nothing says how good it is."
        )
    part = "test" if tested is not None else "validation"
    accuracies = []
    for name, word in words.items():
        value = content.get(f"{name}_{part}_accuracy")
        if value is not None:
            accuracies.append(f"{word} {100 * value:.1f} %")
    if len(accuracies) > 1:
        reason = reason_of_delivery(content)
        listed = ", ".join(accuracies)
        lines.append(f"On {part}: {listed}. The network to use is the {delivered}: {reason}.")
    if content.get("skipped_steps"):
        counts = spoken_counts(content["steps_by_phase"])
        lines.append(f"To end in time not all steps were taken: {counts}.")
    guesses = guessing(content)
    if guesses:
        named = [f"the {words[name]} ({100 * value:.1f} %)" for name, value in guesses.items()]
        lines.append(f"Not shown to be better than guessing on {part}: {', '.join(named)}.")
    for warning in content.get("warnings", ()):
        lines.append(f"Warning of the training: {as_flags(warning)}.")
    lines += linear_baseline(content)
    if guesses or is_behind_baseline(content):
        names = [*guesses] or [content["delivered"]]
        lines.append(next_try(content, names))
    return lines


def reason_of_delivery(content: Mapping[str, Any]) -> str:
    """Return why the network is delivered that is."""
    is_validated = content["delivered_by"] == "validation"
    if content.get("rounds") is None:
        if is_validated:
            return "validation chose it"
        if content.get("validation_accuracy") is None:
            return "no examples are set aside to choose by"
        return "validation cannot tell them apart"
    if content["delivered"] == "teacher":
        return "validation chose it, for the last round ended far behind it"
    if is_validated:
        return "it is of the last round, at the step that validation chose"
    return "it is of the last round"


def linear_baseline(content: Mapping[str, Any]) -> list[str]:
    """Return what the linear baseline reached, and whether the run is behind it."""
    if "control_accuracy" not in content:
        return []
    part = "test" if "test_accuracy" in content else "validation"
    examples = "labeled digits" if content.get("recipe") == "digits" else "labeled pictures"
    accuracy = f"{100 * content['control_accuracy']:.1f} %"
    lines = [
        f"The linear baseline, logistic regression on the {content['control_of']} of the "
        f"{examples} alone: {accuracy} on {part}."
    ]
    if is_behind_baseline(content):
        lines.append("This run is behind its linear baseline.")
    return lines


def is_behind_baseline(content: Mapping[str, Any]) -> bool:
    """Return whether a run that has a linear baseline reached less."""
    part = "test" if "test_accuracy" in content else "validation"
    reached = content.get(f"{part}_accuracy", 1.0)
    return bool(reached < content.get("control_accuracy", 0.0))


def next_try(content: Mapping[str, Any], networks: Sequence[str]) -> str:
    """Return what to do about networks that are at chance, or behind the linear baseline."""
    learned = min(content.get(f"{name}_labeled_accuracy", 0.0) for name in networks)
    is_memorized = learned >= MEMORIZED
    memorized = ""
    if is_memorized:
        memorized = f"The labeled examples are memorized: {100 * learned:.0f} % of them are right. "
    if content.get("recipe") == "digits":
        tries = [f"more steps (it took {content.get('steps', 0):,}: --steps)"]
        # Noisy Student has a command of its own, without these flags.
        is_of_train = content.get("method") != "noisy_student"
        if is_memorized:
            tries.append("more labels (--labels-per-class)")
        else:
            student_rate = ", and --student-lr where a teacher labels" if is_of_train else ""
            tries.append(f"other learning rates (--lr{student_rate})")
        if is_of_train:
            tries.append("other methods beside it (--compare)")
        return f"{memorized}Try {', '.join(tries[:-1])}, or {tries[-1]}."
    labels = "more labeled pictures"
    if is_memorized:
        # Other views of the labeled ones, and other pictures, are what tells more than these do.
        labels = "more pictures, labeled ones or not"
    # The baseline sees the features of a backbone, where there is one.
    start = "training its head alone, or all of it (--tuning head, --tuning all)"
    if content.get("control_of", "pixels") == "pixels":
        start = "a pretrained network (--backbone NAME)"
    return f"{memorized}Try more time (--minutes), {start}, or {labels}."


def spoken(accuracy: float, n: int, chance: float | None) -> str:
    """Return an accuracy in words, with n, its 95 % interval, and what guessing reaches.

    >>> spoken(131 / 150, 150, 0.1)
    '87.3 % (n = 150, 95 % interval 81.1-91.7, chance 10.0 %)'
    """
    low, high = interval(round(accuracy * n), n)
    ends = f"{100 * low:.1f}-{100 * high:.1f}"
    guessed = "" if chance is None else f", chance {100 * chance:.1f} %"
    return f"{accuracy * 100:.1f} % (n = {n:,}, 95 % interval {ends}{guessed})"
