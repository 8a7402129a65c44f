"""The options of ``fit`` and ``finetune`` as a type checker knows them; typed_calls.py has calls that it refuses."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import get_type_hints

import metapl
from metapl.training import FitOptions
from metapl.training.options import FinetuneKeywords, FitKeywords


def test_the_keywords_are_the_fields_of_the_options_and_the_arguments_of_fit() -> None:
    options = {field.name for field in fields(FitOptions)} - {"steps"}
    assert {*FitKeywords.__annotations__} == options
    of_fields, of_keywords = get_type_hints(FitOptions), get_type_hints(FitKeywords)
    assert {name: of_fields[name] for name in options} == of_keywords
    parameters = inspect.signature(metapl.BilevelTrainer.fit).parameters.values()
    named = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"steps", "inner", "outer"}
    assert {*get_type_hints(FinetuneKeywords)} == options | named
