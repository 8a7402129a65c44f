"""Recipes on disk: as they ran, and back."""

from __future__ import annotations

from typing import Any, Literal

from metapl.apps.experiments.accuracies import READOUTS
from metapl.apps.experiments.folder import PLACES, WEIGHTS, RunFolder
from metapl.apps.recipes import RECIPES, ImageFolders
from metapl.apps.recipes.base import Recipe, as_dict, recipe_from_dict
from metapl.apps.recipes.methods import EVERY_METHOD
from metapl.apps.recipes.noisy_student import PAPER_RECIPES, NoisyImagenet
from metapl.errors import MetaplError
from metapl.metrics import Evaluation
from metapl.runs.fields import misfit, misfit_entries

TOLD = ("delivered", "delivered_by", "validation_size", "seed", "method", "steps", "best_step")
"""What every ``result.json`` says of the networks in its folder."""

COUNTS = ("validation_size", "seed", "steps", "best_step")
"""Which of these are whole numbers of 0 or more."""

RESULT: dict[str, Any] = {
    "recipe": str,
    "method": Literal[tuple(EVERY_METHOD)],
    "seed": int,
    "steps": int,
    "best_step": int,
    "validation_size": int,
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
    file = folder.path / "recipe.json"
    description = folder.recipe()
    fault = misfit_entries(description, {"name": str, "method": str, "fields": dict[str, Any]}, "its recipe")
    lacks = [name for name in ("name", "fields") if name not in description]
    if fault or lacks:
        raise MetaplError(f"{file} is damaged: {fault or f'it does not say {lacks[0]}'}.")
    if "method" not in description:
        raise MetaplError(f"{file} is damaged: it does not say method.")
    known: dict[str, type[Recipe]] = {**RECIPES, NoisyImagenet.name: NoisyImagenet, **PAPER_RECIPES}
    kind = known.get(description["name"])
    if kind is None:
        raise MetaplError(
            f"{folder.path} is a run of the recipe {description['name']!r}, which this metapl does not have; it "
            f"has {', '.join(known)}."
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
        MetaplError: it is missing, damaged, or of another version.
    """
    result, file = folder.read_json("result.json"), folder.path / "result.json"
    if not result.keys() >= set(TOLD):
        raise MetaplError(f"{file} is damaged: it does not say {', '.join(TOLD)}.")
    accuracies = [name for name in result if name.endswith("_accuracy")]
    fault = misfit_entries(result, {**RESULT, **dict.fromkeys(accuracies, float)}, "its content")
    fault = fault or _counts_fault(result)
    outside = [name for name in accuracies if fault is None and not 0 <= result[name] <= 1]
    if outside:
        fault = f"{outside[0]} is {result[outside[0]]}; expected a fraction"
    if fault is None and "methods" in result:
        fault = _comparison_fault(result)
    if fault is not None:
        raise MetaplError(f"{file} is damaged: {fault}.")
    if "evaluation" in result:
        fault = _evaluation_fault(result["evaluation"])
        if fault is not None:
            raise MetaplError(f"{file} is damaged or of another version: its evaluation {fault}.")
    return result


def _counts_fault(result: dict[str, Any]) -> str | None:
    """What is wrong with the whole numbers of a ``result.json``, and with what its student was finetuned with."""
    negative = [name for name in COUNTS if result[name] < 0]
    if negative:
        return f"{negative[0]} is {result[negative[0]]}; expected 0 or more"
    tuned = result.get("finetuned_with")
    if tuned is None:
        return None
    wrong = [name for name in ("steps", "lr") if not tuned.get(name, -1) >= 0]
    return f"finetuned_with does not say {wrong[0]}, a number of 0 or more" if wrong else None


def _comparison_fault(result: dict[str, Any]) -> str | None:
    """What is wrong with what the ``result.json`` of a comparison says of its runs."""
    missing = [name for name in ("seeds", "delivery") if name not in result]
    if missing:
        return f"it does not say {missing[0]}"
    for name, readouts in result["methods"].items():
        if name not in EVERY_METHOD or not readouts.keys() >= set(READOUTS):
            return f"methods.{name} does not say {', '.join(READOUTS)} of a method"
        if any(len(values) != len(result["seeds"]) for values in readouts.values()):
            return f"methods.{name} has not one value for each of the {len(result['seeds'])} seeds"
    known = result["method"] in result["methods"] and result["seed"] in result["seeds"]
    return None if known else "the run that it delivers is not one of its own"


def _evaluation_fault(fields: dict[str, Any]) -> str | None:
    """What is wrong with a stored evaluation, in words that follow its name."""
    try:
        evaluation = Evaluation(**fields)
    except TypeError as error:
        return str(error).removeprefix("Evaluation.__init__() ")
    fault = misfit(fields, Evaluation, "of")
    if fault is not None:
        return fault
    width, counts = len(evaluation.confusion), [sum(row) for row in evaluation.confusion]
    wide = {width, *map(len, evaluation.confusion), len(evaluation.per_class)}
    wide |= set() if evaluation.classes is None else {len(evaluation.classes)}
    if len(wide) > 1 or sum(counts) != evaluation.n or evaluation.n < 1 or min(map(min, evaluation.confusion)) < 0:
        return f"has tables that do not fit each other and n = {evaluation.n}"
    return None if 0 <= evaluation.accuracy <= 1 else f"has the accuracy {evaluation.accuracy}"


def stored_data(folder: RunFolder) -> dict[str, Any]:
    """What the ``data.json`` of a run folder holds.

    Raises:
        MetaplError: it is missing or damaged.
    """
    data = folder.read_json("data.json")
    fault = "it does not say hash" if "hash" not in data else misfit_entries(data, DATA, "its content")
    if fault is not None:
        raise MetaplError(f"{folder.path / 'data.json'} is damaged: {fault}.")
    return data
