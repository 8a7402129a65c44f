"""Turn formulas into MathML, which browsers draw by themselves: a hook of MkDocs."""

from __future__ import annotations

import html
import logging
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(div|span) class="arithmatex">\\([\[(])(.*?)\\[\])]</\1>', re.DOTALL)
SIZED_ANGLE = re.compile(r"\\[Bb]igg?[lr]?\s*(?=\\[lr]angle)")

log = logging.getLogger("mkdocs.hooks.mathml")


def on_page_content(content: str, **_: Any) -> str:
    """Replace what pymdownx.arithmatex marked in a page."""
    return FORMULA.sub(_formula, content)


def _formula(found: re.Match[str]) -> str:
    latex = html.unescape(found[3]).strip()
    inline = found[2] == "("
    # latex2mathml does not know \Big before angles, which browsers stretch anyway.
    mathml = str(convert(SIZED_ANGLE.sub("", latex), display="inline" if inline else "block"))
    if "\\" in mathml:
        log.warning("a command of this formula is not known: %s", latex)
    return mathml if inline else f'<div class="formula">{mathml}</div>'
