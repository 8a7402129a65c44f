"""Flags that change nothing: beside the others that are given, or of a command that does not get so far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from metapl.apps.recipes.image_folders import ImageFolders
from metapl.apps.recipes.methods import CONTROLS, METHODS, NOISY_METHODS
from metapl.apps.recipes.noisy_folders import NoisyFolders
from metapl.errors import MetaplError

WITH_STUDENT = tuple(name for name, method in METHODS.items() if method.teaches)
"""Methods that train a teacher and a student at the same time."""

ANY_STUDENT = tuple(name for name, method in METHODS.items() if method.built_as == "student")
"""Methods that train a student, at the same time or afterwards."""

LABELS_ALONE = ("supervised", "label_smoothing", "supervised_everything")
"""Methods that do not look at unlabeled pictures."""

WITH_FEEDBACK = ("mpl", "reduced_mpl", *CONTROLS)
"""Methods whose teacher learns from the student's feedback."""

REDUCED = tuple(name for name, method in METHODS.items() if method.reduced)
"""Methods whose student learns stored labels."""

BY_UDA = ("uda", "fixmatch")
"""Methods that train one network by UDA."""

FEEDBACK = "feedback-weight feedback-ratio normalization baseline exact-every"
STRONG = "strong.operations strong.magnitude strong.cutout strong.again strong.translate"
"""Flags of the feedback; flags of the view that is learned from, without the one that is of both views."""


@dataclass(frozen=True)
class Rule:
    """Flags that have no effect.

    Args:
        flags: patterns of their names, without dashes.
        where: beside what they have none.
        mend: what to do instead.
    """

    flags: str
    where: str
    mend: str


def given_flags(arguments: Sequence[str]) -> list[str]:
    """The names of the flags in a command line.

    >>> given_flags(["--labeled", "few/", "--student.weight_decay=0", "--no-warm-start"])
    ['labeled', 'student.weight-decay', 'no-warm-start']
    """
    return [word[2:].partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--")]


def explained(given: Sequence[str], rules: Iterator[Rule]) -> str:
    """A sentence for each rule that is about some of the given flags; each flag is named once."""
    left, sentences = list(dict.fromkeys(given)), []
    for rule in rules:
        named = [name for name in left if any(fnmatchcase(name, pattern) for pattern in rule.flags.split())]
        left = [name for name in left if name not in named]
        if named:
            *others, last = (f"--{name}" for name in named)
            names = f"{', '.join(others)} and {last}" if others else last
            sentences.append(f"{names} {'have' if others else 'has'} no effect {rule.where}: {rule.mend}.")
    return " ".join(sentences)


def refuse_idle(given: Sequence[str], rules: Iterator[Rule]) -> None:
    """Refuse flags that are given and change nothing."""
    unused = explained(given, rules)
    if unused:
        raise MetaplError(unused)


def by_choice(recipe: ImageFolders, seeds: bool = False) -> Iterator[Rule]:
    """What has no effect beside another flag, whatever the method.

    Args:
        recipe: as it was given, before it is settled.
        seeds: whether ``--seeds`` was given.
    """
    if recipe.randaugment:
        yield Rule("changes.*", "beside --randaugment", "leave it out, or use --pad and --strong.* instead")
    else:
        yield Rule("pad strong.*", "without --randaugment", "add --randaugment, or use --changes.* instead")
    if recipe.resized_crop:
        moves = "pad strong.again changes.degrees changes.translate changes.zoom changes.shear"
        yield Rule(moves, "beside --resized-crop, which cuts out parts of a picture instead", "leave out one of them")
    if recipe.grey:
        yield Rule("changes.saturation changes.hue", "on grey pictures", "leave it out, or give --grey False")
    if recipe.teacher_run is not None:
        yield Rule("labels labeled-labels", "beside --teacher", "leave out one of them")
    elif recipe.label_store is None:
        yield Rule("labeled-labels", "without --labels", "give the store of --unlabeled too")
    if recipe.val is not None:
        yield Rule("val-fraction", "beside --val", "leave out one of them")
    if recipe.steps is not None:
        yield Rule("minutes", "beside --steps", "leave out one of them")
    if recipe.feedback_ratio is not None:
        yield Rule("feedback-weight", "beside --feedback-ratio", "leave out one of them")
    if recipe.uda_align == 0:
        yield Rule("uda-prior", "with --uda-align 0", "leave it out, or give an --uda-align above 0")
    if recipe.finetune_steps == 0:
        yield Rule("finetune-batch finetune.*", "with --finetune-steps 0", "give 1 or more finetuning steps")
    for name, optimizer in (("student", recipe.student), ("teacher", recipe.teacher), ("finetune", recipe.finetune)):
        if optimizer.weight_decay == 0:
            decay = f"--{name}.weight-decay"
            yield Rule(f"{name}.decay-norms {name}.no-decay-norms", f"with {decay} 0", f"give a {decay} above 0")
    if seeds:
        yield Rule("seed", "beside --seeds", "leave out one of them")


def by_method(recipe: ImageFolders, methods: Sequence[str]) -> Iterator[Rule]:
    """What has no effect because none of the methods uses it."""
    where = f"with --method{'s' * (len(methods) > 1)} {' '.join(methods)}"
    if not {*methods} & {*ANY_STUDENT}:
        yield Rule("student.*", where, "give --teacher.* instead, which is of the one network that is trained")
        yield Rule(
            "temperature pseudo-label-smoothing", where, "it is for --method mpl, none, reduced_mpl or pseudo_labels"
        )
        if recipe.teacher_dropout is not None:
            yield Rule("dropout", f"beside --teacher-dropout {where}", "leave out one of them")
    if not {*methods} & {*WITH_STUDENT}:
        yield Rule("wait warm-start no-warm-start", where, "it is for --method mpl or none")
    if not {*methods} & {*WITH_STUDENT, *REDUCED}:
        yield Rule("mode pseudo-labels", where, "it is for --method mpl, none or reduced_mpl")
    if not {*methods} & {*WITH_FEEDBACK}:
        yield Rule(FEEDBACK, where, "it is for --method mpl or reduced_mpl")
    elif recipe.feedback.mode == "none":
        yield Rule(FEEDBACK, "with --mode none", "leave it out, or take another mode")
    if not {*methods} & {*REDUCED}:
        yield Rule("teacher labels labeled-labels", where, "it is for --method reduced_mpl")
    if {*methods} <= {*LABELS_ALONE}:
        yield Rule(f"unlabeled-batch {STRONG}", where, "it is for methods that learn from unlabeled pictures")
    if {*methods} == {"supervised"}:
        yield Rule("label-smoothing", where, "it is for the other methods")
    yield from _uda(recipe, methods, where)


def _uda(recipe: ImageFolders, methods: Sequence[str], where: str) -> Iterator[Rule]:
    """Flags of UDA, which is a loss of the teacher unless its weight is 0, and what uda and fixmatch are."""
    of_teacher, alone = (not {*methods}.isdisjoint(names) for names in ((*WITH_STUDENT, *REDUCED), BY_UDA))
    if not of_teacher and not alone:
        yield Rule("uda-*", where, "it is for --method uda, fixmatch, mpl or none")
    elif not recipe.uda_weight and not alone:
        yield Rule("uda-[!w]*", "with --uda-weight 0", "leave it out, or give a weight above 0")
    elif not recipe.uda_weight and not of_teacher:
        yield Rule("uda-weight", f"at 0 {where}", "give a number above 0, or --method supervised")
    if alone and not of_teacher and "uda" not in methods:
        published = "FixMatch has values of its own; leave it out, or give --method uda"
        yield Rule("uda-temperature uda-threshold uda-align uda-prior", where, published)


def by_ablation(recipe: object) -> Iterator[Rule]:
    """What has no effect in ``metapl ablate``, whose trainings are steps at constant rates, without a run's folder."""
    of_fit = "schedule warmup wait ema-decay validate-every log-every save-every keep exact-every num-workers"
    of_run = "method warm-start no-warm-start finetune-steps finetune-batch finetune.*"
    where = "in metapl ablate, which takes steps of Meta Pseudo Labels at constant rates and keeps no run"
    yield Rule(f"{of_fit} {of_run}", where, "leave it out")
    if isinstance(recipe, ImageFolders):
        yield from by_choice(recipe)


def noisy_by_method(recipe: NoisyFolders, methods: Sequence[str]) -> Iterator[Rule]:
    """What has no effect in ``metapl train noisy`` because none of the methods uses it."""
    where = f"with --method{'s' * (len(methods) > 1)} {' '.join(methods)}"
    known = [NOISY_METHODS[name] for name in methods if name in NOISY_METHODS]  # others are refused afterwards
    if known and all(method.feedback is None for method in known):
        yield Rule("teacher.* warm-steps mode clean-batch", where, "it is for methods that learn about labels")
