"""Recipes from the names that fields have on the command line, whether they are the recipe's or its method's."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from metapl.apps.recipes.base import Recipe

R = TypeVar("R", bound=Recipe)


def made(kind: type[R], method: str | None = None, **fields: Any) -> R:
    """A recipe by a method, by default its own; fields that neither has are refused."""
    of_recipe = {each.name for each in dataclasses.fields(kind)}
    own = {name: value for name, value in fields.items() if name in of_recipe}
    rest = {name: value for name, value in fields.items() if name not in of_recipe}
    return kind(**own, method=dataclasses.replace(kind.by_name(method or kind.own), **rest))


def known(kind: type[R], method: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Those of the fields that the recipe or the method has."""
    names = {each.name for one in (kind, kind.known[method]) for each in dataclasses.fields(one)}
    return {name: value for name, value in fields.items() if name in names}
