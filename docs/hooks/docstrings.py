"""Griffe extension: metapl's docstrings as Markdown.

The docstrings follow Google's style, with Sphinx roles (``:class:`metapl.Signal```), ``.. math::``
blocks, doctests anywhere, and short paragraphs that begin with a label (``Cost: ...``).
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`(~?)([\w.]+)`")
MATH = re.compile(r"^\.\. math::(.*(?:\n(?:[ \t]+.*|(?=\n[ \t])))*)", re.MULTILINE)
DOCTEST = re.compile(r"^( *)>>> .*(?:\n\1\S.*|\n\1 +.*)*", re.MULTILINE)
LABEL = re.compile(r"^([A-Z][a-z]+(?:, [a-z]+)?): (?=\S)", re.MULTILINE)
LITERAL = re.compile(r"``(.+?)``", re.DOTALL)
SEVERAL = re.compile(r"^( {4})(\w+(?:, \w+)+): ", re.MULTILINE)


class Markdown(griffe.Extension):
    """Translate every docstring when its object is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """Return a docstring in Markdown."""
    text = LITERAL.sub(r"`\1`", text)
    text = MATH.sub(_formula, text)
    text = DOCTEST.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", text)
    text = LABEL.sub(r"\n**\1:** ", text)
    text = SEVERAL.sub(lambda found: f"{found[1]}{found[2].replace(', ', ' / ')}: ", text)
    return ROLE.sub(_reference, text)


def _formula(found: re.Match[str]) -> str:
    return f"$$\n{textwrap.dedent(found[1].strip())}\n$$\n"


def _reference(found: re.Match[str]) -> str:
    short, name = found[1], found[2]
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref optional identifier="{name}"><code>{shown}</code></autoref>'
