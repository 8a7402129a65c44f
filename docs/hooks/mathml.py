"""MkDocs hook: formulas become MathML, which browsers draw by themselves, without scripts from elsewhere."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(div|span) class="arithmatex">\\([\[(])(.*?)\\[\])]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replace what pymdownx.arithmatex marked in a page."""
    return FORMULA.sub(_formula, content)


def _formula(found: re.Match[str]) -> str:
    latex = html.unescape(found[3]).strip()
    if found[2] == "(":
        return str(convert(latex))
    return f'<div class="formula">{convert(latex, display="block")}</div>'
