"""What the model card of a run's network says: its figures, data, recipe and notes."""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Any

from metapl.apps.pace import spoken_counts
from metapl.apps.run_summary import spoken
from metapl.run_folder import EndedRun, data_in_words, stored_data


def sections_of(run: EndedRun, name: str) -> dict[str, Any]:
    """Return what the card says of a network of a run: its figures, data, recipe and notes.

    The figures are those of this network, and of no others.
    """
    result = run.result
    sizes: dict[str, int | None] = {
        "test": (result.get("evaluation") or {}).get("n"),
        "validation": result.get("validation_size"),
    }
    metrics: dict[str, str] = {}
    for part, size in sizes.items():
        accuracy = result.get(f"{name}_{part}_accuracy")
        if accuracy is None:
            continue
        if size is None:
            metrics[f"{part} accuracy"] = f"{100 * accuracy:.1f} %"
        else:
            metrics[f"{part} accuracy"] = spoken(accuracy, size, None)
    fields: dict[str, Any] = {}
    stored_fields = run.folder.recipe().get("fields", {})
    for field, value in stored_fields.items():
        if field == "classes":
            continue
        # Of the place of a file, the last name alone is left.
        is_place = isinstance(value, str) and "/" in value
        fields[field] = PurePath(value).name if is_place else value
    recipe = {"name": result["recipe"], "method": result["method"], "fields": fields}
    recipe_json = json.dumps(recipe, indent=2, sort_keys=True, default=str)
    card = run.cards[name]
    step = f"step {result['best_step']:,} of {result['steps']:,}"
    if name == "teacher":
        step = "the last step"
    if result.get("skipped_steps"):
        step += f" (to end in time, not all were taken: {spoken_counts(result['steps_by_phase'])})"
    return {
        "Metrics": metrics,
        "Data": data_in_words(stored_data(run.folder), stored_fields),
        "Recipe": f"```json\n{recipe_json}\n```",
        "Notes": f"- The weights are those of the {card.title}, of {step}.\n- {card.input.note}",
    }
