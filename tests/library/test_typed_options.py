"""Misspelt and mistyped options of ``fit`` and ``finetune``, as a type checker sees them."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

import metapl
from metapl.training import FitOptions
from metapl.training.options import FinetuneKeywords, FitKeywords

WRONG = """\
import metapl

def fitted(trainer: metapl.BilevelTrainer) -> None:
    trainer.fit([], steps=3, validate_every=2, batch_size=4, metric="loss")
    trainer.fit([], steps=3, valdate_every=2)
    trainer.fit([], steps=3, warmup="2")
    trainer.fit([], steps=3, mode="best")
    trainer.finetune([], steps=3, validation=None, resume=True, log_every=1)
    trainer.finetune([], steps=3, log_evry=1)
    print(trainer.evaluate([]).accuracy, trainer.evaluate([], metric="loss").value)
    print(trainer.evaluate([], metric="loss").accuracy)
"""


def test_the_keywords_are_the_fields_of_the_options_and_the_arguments_of_fit() -> None:
    options = {field.name for field in fields(FitOptions)} - {"steps"}
    assert {*FitKeywords.__annotations__} == options
    of_fields, of_keywords = get_type_hints(FitOptions), get_type_hints(FitKeywords)
    assert {name: of_fields[name] for name in options} == of_keywords
    parameters = inspect.signature(metapl.BilevelTrainer.fit).parameters.values()
    named = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"steps", "inner", "outer"}
    assert {*get_type_hints(FinetuneKeywords)} == options | named


def test_mypy_finds_options_that_are_wrong(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    root = Path(metapl.__file__).parent.parent
    (tmp_path / "wrong.py").write_text(WRONG)
    # The settings and the cache of the package's own check, which takes half a minute where it has not run before.
    how = [f"--config-file={root / 'pyproject.toml'}", f"--cache-dir={root / '.mypy_cache'}"]
    told, failed, _ = api.run([str(tmp_path / "wrong.py"), "--no-error-summary", *how])
    assert not failed
    found = {int(line.split(":")[1]): line for line in told.splitlines() if ": error: " in line}
    assert found.keys() == {5, 6, 7, 9, 11}, told
    for number, text in ((5, "valdate_every"), (6, "warmup"), (7, "mode"), (9, "log_evry"), (11, "accuracy")):
        assert text in found[number]
