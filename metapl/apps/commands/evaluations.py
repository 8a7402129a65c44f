"""Evaluations side by side, for ``metapl compare``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from metapl.apps.commands.evaluators import EVALUATION, check_folder
from metapl.apps.commands.folders import held, written_to
from metapl.apps.evaluation import MultiLabelAccuracy
from metapl.apps.evaluation.attacks import LEVELS, Attack
from metapl.apps.evaluation.corruptions import CORRUPTIONS
from metapl.apps.evaluation.errors import FLIPS_OF_ALEXNET
from metapl.apps.evaluation.imagenet import Stability
from metapl.apps.evaluation.measure import Robustness
from metapl.apps.recipes.methods import EVERY_METHOD
from metapl.apps.reports.robustness import GROUPS, RELATIVE, SUMMARY, draw_evaluations, value_at
from metapl.apps.reports.style import PALETTE
from metapl.errors import MetaplError, few
from metapl.metrics import Evaluation
from metapl.runs.atomic import written_last
from metapl.runs.fields import misfit_entries
from metapl.runs.sealed import read_plain
from metapl.words import short, table

COMPARED, PICTURE = "compared.json", "compared.png"

Evaluations = dict[str, dict[str, Any]]


def has_evaluation(folder: Path) -> bool:
    """Whether ``metapl evaluate --out`` wrote there."""
    return (folder / EVALUATION).is_file()


def read_evaluations(folders: Sequence[Path]) -> Evaluations:
    """What the folders' ``evaluation.json`` hold, by folder.

    Raises:
        MetaplError: one is missing or damaged, there are too many, or they are of different classes.
    """
    if not 2 <= len(folders) <= len(PALETTE):
        raise MetaplError(
            f"{len(folders)} evaluation{'s' * (len(folders) != 1)} to compare; expected 2 to {len(PALETTE)}: "
            "metapl compare robust/a robust/b."
        )
    found = {str(folder): _read(folder) for folder in folders}
    (first, one), *others = found.items()
    for name, other in others:
        a, b = one.get("classes"), other.get("classes")
        if a is not None and b is not None and a != b:
            raise MetaplError(
                f"{name} and {first} are of different classes: {differing(a, b)}. Evaluate both on pictures of the "
                "same classes."
            )
        if _figures(one).keys().isdisjoint(_figures(other)):
            raise MetaplError(
                f"{name} and {first} have no figure in common: {few(_figures(other))} and {few(_figures(one))}. "
                "Evaluate both by the same flags."
            )
    return found


def differing(classes: Sequence[str], others: Sequence[str]) -> str:
    """How two lists of classes differ, in words."""
    alone = [name for name in (*classes, *others) if name not in classes or name not in others]
    return f"only one of them has {few(alone)}" if alone else "the order of the classes differs"


def _read(folder: Path) -> dict[str, Any]:
    file = folder / EVALUATION
    if not file.is_file():
        raise MetaplError(f"{folder} has no {EVALUATION}; write it by: metapl evaluate ... --out {folder}.")
    try:
        content: dict[str, Any] = json.loads(read_plain(file))
        fault = _fault(content) if isinstance(content, dict) else "it is not a JSON object"
        if fault is not None:
            raise ValueError(fault)
    except (OSError, ValueError, RecursionError) as error:
        raise MetaplError(
            f"{file} cannot be read: {error}; expected what metapl evaluate --out writes: write it again."
        ) from error
    return content


@dataclass(frozen=True)
class _Damaged:
    """What an evaluation says of one kind of damage."""

    error: float


@dataclass(frozen=True)
class _Flips:
    """What it says of one perturbation."""

    flip_probability: float


def _types(kind: type, *names: str) -> dict[str, Any]:
    """The types of some fields of a dataclass, whose values ``evaluation.json`` has by the same names."""
    hints = get_type_hints(kind)
    return {name: hints[name] for name in names}


_WORDS: dict[str, Any] = dict.fromkeys(("run", "method", "network", "weights", "test"), str | None)
_SHARES = _types(Evaluation, "n", "accuracy", "top5", "expected_calibration_error")
_DAMAGES = {"corruptions": dict[str, _Damaged], **_types(Robustness, "mean_corruption_error")}

EXPECTED: dict[str, dict[str, Any]] = {
    "": {
        **_WORDS,
        **_SHARES,
        **_DAMAGES,
        **_types(Evaluation, "classes"),
        **_types(Robustness, "attacks"),
        "interval": list[float] | None,
    },
    "multi_label": _types(MultiLabelAccuracy, "accuracy"),
    "imagenet_a": _SHARES,
    "imagenet_c": _DAMAGES,
    "imagenet_p": {"perturbations": dict[str, _Flips], **_types(Stability, "accuracy", "mean_flip_rate")},
}
"""What is read of ``evaluation.json``, with types: of its top, and of its parts."""


def _fault(content: Mapping[str, Any]) -> str | None:
    """What is wrong with what an ``evaluation.json`` holds, in words."""
    for part, hints in EXPECTED.items():
        values = content.get(part, {}) if part else content
        if not isinstance(values, Mapping):
            return f"{part} is not a JSON object"
        if fault := misfit_entries(values, hints, part or "its content"):
            return fault
    kinds = {*content.get("corruptions", {}), *content.get("imagenet_c", {}).get("corruptions", {})} - {*CORRUPTIONS}
    kinds |= {*content.get("imagenet_p", {}).get("perturbations", {})} - {*FLIPS_OF_ALEXNET}
    attacks: Mapping[str, Mapping[str, float]] = content.get("attacks", {})
    kinds |= {*attacks} - {*get_args(Attack)}
    if kinds:
        return f"it is of {few(map(short, sorted(kinds)))}, which are not known"
    if attacks and content.get("accuracy") is None:
        return "it has attacks, and no accuracy without them"
    eps = [number for by_eps in attacks.values() for number in by_eps]
    if strange := [number for number in eps if not _is_reach(number)]:
        return f"attacks have ε = {short(strange[0])}; expected 0 to {LEVELS}"
    try:
        figures = _figures(content)
    except LookupError as error:
        return f"an entry lacks its {error}"
    outside = [name for name, share in figures.items() if share < 0 or (share > 1 and name not in RELATIVE)]
    if len(content.get("interval") or (0, 1)) != 2:
        return "interval does not have two ends"
    if content.get("n", 1) < 1:
        return f"n is {content['n']}; expected 1 or more"
    return f"{outside[0]} is {figures[outside[0]]:g}; expected a number in [0, 1]" if outside else None


def _is_reach(number: str) -> bool:
    try:
        return 0 <= float(number) <= LEVELS
    except ValueError:
        return False


def _figures(found: Mapping[str, Any]) -> dict[str, float]:
    """All figures of an evaluation by what they are called: shares in [0, 1], and those in % of AlexNet's."""
    figures = {name: value_at(found, place) for name, place in (SUMMARY | RELATIVE).items()}
    for prefix, corruptions in (
        ("error, ", found.get("corruptions", {})),
        ("ImageNet-C error, ", found.get("imagenet_c", {}).get("corruptions", {})),
    ):
        kinds = [kind for names in GROUPS.values() for kind in names if kind in corruptions]
        figures |= {f"{prefix}{kind}": float(corruptions[kind]["error"]) for kind in kinds}
    for attack, by_eps in found.get("attacks", {}).items():
        figures |= {f"{attack.upper()}, ε = {eps}/255": float(value) for eps, value in by_eps.items()}
    for name, kind in found.get("imagenet_p", {}).get("perturbations", {}).items():
        figures[f"flips, {name}"] = float(kind["flip_probability"])
    return {name: value for name, value in figures.items() if value is not None}


def evaluations_table(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Every figure, a column for each evaluation; of two, their difference too."""
    figures = [_figures(found) for found in evaluations.values()]
    two = len(figures) == 2
    letters = list("ABCDEFG"[: len(figures)])
    rows = [("in %", *letters, *(["B - A"] * two))]
    for name in dict.fromkeys(name for found in figures for name in found):
        scale = 1 if name in RELATIVE else 100
        values = [None if name not in found else scale * found[name] for found in figures]
        cells = ["-" if value is None else f"{value:.1f}" for value in values]
        a, b = values[0], values[1]
        rows.append((name, *cells, *(["-" if a is None or b is None else f"{b - a:+.1f}"] * two)))
    counts = [found.get("n") for found in evaluations.values()]
    named = [
        "\n   ".join([f"{letter}  {short(name, 70)}", *_measured(found)])
        for letter, (name, found) in zip(letters, evaluations.items(), strict=True)
    ]
    note = ""
    if len({n for n in counts if n is not None}) > 1:
        note = "\n\nnote: the numbers of test pictures differ, so these are not the same pictures"
    elif len({found["test"] for found in evaluations.values() if found.get("test") is not None}) > 1:
        note = "\n\nnote: the folders of test pictures differ; differences count where the pictures are the same"
    return "\n".join(named) + f"\n\n{table(rows)}{note}"


def _measured(found: Mapping[str, Any]) -> Iterator[str]:
    """What was measured, on what, and how far the top-1 accuracy is known, where the evaluation says so."""
    if found.get("run") is not None:
        method, name = EVERY_METHOD.get(str(found.get("method"))), str(found.get("network"))
        said = name if method is None else method.networks.get(name, name)
        yield f"{said} of {short(str(found['run']), 50)}"
    elif found.get("weights") is not None:
        yield short(str(found["weights"]), 70)
    n, folder, interval = found.get("n"), found.get("test"), found.get("interval")
    if n is not None:
        of_folder = "" if folder is None else f" of {short(str(folder), 50)}"
        yield f"{n:,} test pictures{of_folder}"
    if interval is not None:
        low, high = interval
        yield f"95 % interval of top-1: {100 * low:.1f} to {100 * high:.1f}"


def write_comparison(folder: Path, evaluations: Mapping[str, Mapping[str, Any]]) -> None:
    """``compared.json`` and ``compared.png``: both, or neither."""
    check_folder(folder)
    content = {"evaluations": {name: _figures(found) for name, found in evaluations.items()}}
    with (
        held(folder),
        written_to(folder),
        written_last(folder / COMPARED, f"{json.dumps(content, indent=1)}\n".encode()),
    ):
        draw_evaluations(folder / PICTURE, evaluations, "evaluations side by side")
