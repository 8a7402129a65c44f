"""What a user may have meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

SPELLINGS = {
    "labelled": "labeled",
    "unlabelled": "unlabeled",
    "normalisation": "normalization",
    "optimiser": "optimizer",
    "gray": "grey",
    "colour": "color",
    "recolour": "recolor",
}
"""Other spellings of words in flags, which are taken for ours."""


def did_you_mean(given: str, known: Sequence[str]) -> str:
    """A question to append to a refusal, or nothing where nothing known is like what was given.

    >>> did_you_mean("trian", ["train", "evaluate"]), did_you_mean("xyz", ["train"])
    ('; did you mean train?', '')
    >>> did_you_mean("--lr", ["--student.lr", "--teacher.lr", "--seed"])
    '; did you mean --student.lr or --teacher.lr?'
    """
    nested = [name for name in known if name.endswith(f".{given.removeprefix('--')}")]
    close = nested or difflib.get_close_matches(given, known, n=3, cutoff=0.75)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def respelled(arguments: Sequence[str]) -> list[str]:
    """Flags in our spelling.

    >>> respelled(["--labelled", "labelled/", "--unlabelled-batch=8", "--changes.no-recolour", "--grayscale"])
    ['--labeled', 'labelled/', '--unlabeled-batch=8', '--changes.no-recolor', '--grayscale']
    """
    return [
        _respelled(flag) + equals + value if word.startswith("--") else word
        for word in arguments
        for flag, equals, value in [word.partition("=")]
    ]


def _respelled(flag: str) -> str:
    """Whole words alone, between dashes, dots and underscores."""
    return "".join(SPELLINGS.get(word, word) for word in re.split(r"([-._])", flag))


def unknown_flags(arguments: Sequence[str], known: Sequence[str]) -> list[str]:
    """The flags among arguments that are not known.

    >>> unknown_flags(["--steps=5", "--image_size", "-1", "--stpes"], ["--steps", "--image-size"])
    ['--stpes']
    """
    flags = [word.partition("=")[0] for word in arguments if word.startswith("--") and word != "--"]
    return [flag for flag in flags if flag.replace("_", "-") not in known]
