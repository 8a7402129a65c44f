"""The ``metapl`` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

HELP = """\
metapl trains a classifier from few labels and many unlabelled examples: a teacher makes up labels, a student learns
from them, and the teacher learns from how the student then does on the labelled data (Meta Pseudo Labels).

  metapl train digits                      train on scikit-learn's handwritten digits, 2 labels a class
  metapl train digits --compare --seeds 0-2
                                           the same beside its controls: did the teacher's feedback help?
  metapl train digits --help               everything that can be set

Each command says more with --help.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 wrong input, 128 + n stopped by signal n."""
    from metapl.errors import MetaplError

    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _dispatch(given)
    except MetaplError as error:
        print(f"metapl: {error}", file=sys.stderr)
        return 2


def _dispatch(given: list[str]) -> int:
    from metapl.errors import MetaplError

    if not given or given[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if given[0] == "--version":
        from metapl import __version__

        print(f"metapl {__version__}")
        return 0
    if given[0] == "train":
        return _train(given[1:])
    raise MetaplError(f"there is no command {given[0]!r}; expected train. See metapl --help.")


def _train(given: list[str]) -> int:
    from metapl.cli.parse import parse
    from metapl.cli.train import Train
    from metapl.errors import MetaplError

    recipes = {"digits": Train}
    if not given or given[0] not in (*recipes, "-h", "--help"):
        named = f"there is no recipe {given[0]!r}" if given else "no recipe was named"
        raise MetaplError(f"{named}; expected one of {', '.join(recipes)}: metapl train digits.")
    if given[0] not in recipes:
        print(f"metapl train RECIPE, with RECIPE one of: {', '.join(recipes)}. Each says more with --help.")
        return 0
    return parse(recipes[given[0]], f"metapl train {given[0]}", given[1:])()
