"""Recipes and results on disk: as they ran, and back."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Annotated, Any, Literal

from metapl.apps.experiments.accuracies import READOUTS
from metapl.apps.experiments.folder import ANOTHER, PLACES, WEIGHTS, RunFolder
from metapl.apps.recipes import RECIPES, ImageFolders
from metapl.apps.recipes.base import Recipe, as_dict, recipe_from_dict
from metapl.apps.recipes.methods import EVERY_METHOD
from metapl.apps.recipes.noisy_student import PAPER_RECIPES, NoisyImagenet
from metapl.errors import MetaplError
from metapl.metrics import Evaluation
from metapl.runs.fields import AtLeastZero, Range, misfit, misfit_entries
from metapl.runs.sealed import read_sealed

KNOWN: dict[str, type[Recipe]] = {**RECIPES, NoisyImagenet.name: NoisyImagenet, **PAPER_RECIPES}

TOLD = ("delivered", "delivered_by", "validation_size", "seed", "method", "steps", "best_step")
"""What every ``result.json`` says of the networks in its folder."""

Fraction = Annotated[float, Range(0, most=1)]

FINETUNED_WITH: dict[str, Any] = dict.fromkeys(("steps", "lr"), Annotated[float, Range(0)])

RESULT: dict[str, Any] = {
    "recipe": str,
    "method": Literal[tuple(EVERY_METHOD)],
    **dict.fromkeys(("seed", "steps", "best_step", "validation_size"), AtLeastZero),
    "validation_chance": float | None,
    "delivered": Literal[tuple(WEIGHTS)],
    "delivered_by": Literal["validation", "rule"],
    "evaluation": dict[str, Any],
    "sha256": dict[str, str],
    "finetuned_with": dict[str, float],
    "rounds": list[dict[str, Any]],
    "seeds": list[int],
    "methods": dict[str, dict[str, list[float]]],
    "delivery": str,
    "stores": dict[str, list[str]],
}
"""What ``result.json`` may say, with types; the names of accuracies, which are fractions, end in "_accuracy"."""

DATA: dict[str, Any] = {
    "hash": dict[str, str],
    "data": str,
    "counts": dict[str, int],
    **dict.fromkeys(("labeled", "unlabeled", "clean", "validation", "test"), int | list[str] | list[int]),
}
"""What ``data.json`` may say, with types."""


def describe(recipe: Recipe, **run_by: Any) -> dict[str, Any]:
    """A recipe and its method as plain values, with their names and how they are run."""
    return {"name": recipe.name, "method": recipe.method.name, **run_by, "fields": as_dict(recipe)}


def places(recipe: Recipe) -> dict[str, Any]:
    """Where the data of a recipe lie, by the names of its fields."""
    return {name: getattr(recipe, name) for name in PLACES if hasattr(recipe, name)}


def stored(folder: RunFolder) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a run folder, and its whole description."""
    file, description = folder.path / "recipe.json", folder.recipe()
    hints: dict[str, Any] = {"name": str, "method": str, "fields": dict[str, Any]}
    fault = misfit_entries(description, hints, "its recipe") or _unsaid(description, hints)
    if fault:
        raise MetaplError(f"{file} is damaged: {fault}.")
    kind = KNOWN.get(description["name"])
    if kind is None:
        raise MetaplError(
            f"{folder.path} is a run of the recipe {description['name']!r}, which this metapl does not have; it "
            f"has {', '.join(KNOWN)}."
        )
    try:
        recipe = recipe_from_dict(kind, description["method"], description["fields"])
    except MetaplError as error:
        raise MetaplError(f"{file} is damaged or of another version: {error}") from error
    except TypeError as error:  # a field without a default is missing
        raise MetaplError(f"{file} is damaged: {error}.") from error
    if isinstance(recipe, ImageFolders) and not recipe.complete:
        missing = ", ".join(name for name in recipe.chosen if getattr(recipe, name) is None)
        raise MetaplError(f"{file} is damaged: it has no value for {missing}.")
    return recipe, description


def stored_result(folder: RunFolder) -> dict[str, Any]:
    """What the ``result.json`` of a run folder holds.

    Raises:
        MetaplError: it is missing, damaged, of another version, or of another run than ``recipe.json``.
    """
    result = folder.read_json("result.json")
    for fault in chain(_faults(result), _contradictions(result, folder.recipe())):
        raise MetaplError(f"{folder.path / 'result.json'} is damaged or of another version: {fault}.")
    return result


def stored_data(folder: RunFolder) -> dict[str, Any]:
    """What the ``data.json`` of a run folder holds.

    Raises:
        MetaplError: it is missing, damaged, or of another run than ``result.json``.
    """
    file = folder.path / "data.json"
    if file.is_file() and (folder.path / "result.json").is_file():
        read_sealed(file, stored_result(folder).get("sha256", {}).get(file.name), mend=ANOTHER)
    data = folder.read_json("data.json")
    if fault := _unsaid(data, ("hash",)) or misfit_entries(data, DATA, "its content"):
        raise MetaplError(f"{folder.path / 'data.json'} is damaged: {fault}.")
    return data


def _unsaid(content: dict[str, Any], names: Any) -> str | None:
    return next((f"it does not say {name}" for name in names if name not in content), None)


def _faults(result: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a ``result.json``; each is looked for only where there was nothing before it."""
    fractions = {name: Fraction for name in result if name.endswith("_accuracy")}
    if fault := _unsaid(result, TOLD) or misfit_entries(result, {**RESULT, **fractions}, "its content"):
        yield fault
    if (tuned := result.get("finetuned_with")) is not None and (
        fault := _unsaid(tuned, FINETUNED_WITH) or misfit_entries(tuned, FINETUNED_WITH, "")
    ):
        yield f"of finetuned_with, {fault}"
    if "methods" in result:
        if fault := _unsaid(result, ("seeds", "delivery")):
            yield fault
        for name, readouts in result["methods"].items():
            if name not in EVERY_METHOD or not readouts.keys() >= set(READOUTS):
                yield f"methods.{name} does not say {', '.join(READOUTS)} of a method"
            if any(len(values) != len(result["seeds"]) for values in readouts.values()):
                yield f"methods.{name} has not one value for each of the {len(result['seeds'])} seeds"
        if result["method"] not in result["methods"] or result["seed"] not in result["seeds"]:
            yield "the run that it delivers is not one of its own"
    if "evaluation" in result:
        try:
            found = Evaluation(**result["evaluation"])
        except TypeError as error:
            yield f"its evaluation {str(error).removeprefix('Evaluation.__init__() ')}"
        if fault := misfit(result["evaluation"], Evaluation, "evaluation"):
            yield fault
        width, classes = len(found.confusion), found.per_class if found.classes is None else found.classes
        wide = {width, len(found.per_class), len(classes), *map(len, found.confusion)}
        counts = [count for row in found.confusion for count in row]
        if len(wide) > 1 or found.n < 1 or sum(counts) != found.n or min(counts) < 0:
            yield f"its evaluation has tables that do not fit each other and n = {found.n}"
        if not 0 <= found.accuracy <= 1:
            yield f"its evaluation has the accuracy {found.accuracy}"


def _contradictions(result: dict[str, Any], description: dict[str, Any]) -> Iterator[str]:
    """Where a ``result.json`` is of another run than a ``recipe.json``: both have the same name in every folder."""
    if "compare" in description:
        own = {name: description.get(of) for name, of in (("methods", "compare"), ("seeds", "seeds"))}
        pairs: dict[str, list[Any]] = {
            name: [sorted(map(str, each)) for each in (result.get(name, ()), run)]
            for name, run in own.items()
            if isinstance(run, list)
        }
    else:
        fields = description.get("fields")
        seed = fields.get("seed") if isinstance(fields, dict) else None
        pairs = {"method": [result["method"], description.get("method")], "seed": [result["seed"], seed]}
    for name, (told, run) in pairs.items():
        if told != run:
            yield f"its {name} is {told!s:.60}, and that of recipe.json {run!s:.60}"
