"""``metapl --print-completion SHELL``: a script by which a shell completes commands, recipes and flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union

import tyro

from metapl.cli.ablate import COMMANDS as ABLATIONS
from metapl.cli.commands import COMMANDS, after_training
from metapl.cli.labels import COMMANDS as LABELS
from metapl.cli.noisy_student import COMMANDS as NOISY
from metapl.cli.plan import COMMANDS as PLANS
from metapl.cli.train import COMMANDS as RECIPES
from metapl.errors import MetaplError

SHELLS = ("bash", "zsh", "fish")


def print_completion(given: Sequence[str]) -> int:
    """Print the script for the shell named; tyro writes it."""
    if len(given) != 1 or given[0] not in SHELLS:
        raise MetaplError(
            f"--print-completion was given {' '.join(given) or 'no shell'}; expected one of {', '.join(SHELLS)}, "
            "such as: metapl --print-completion bash."
        )

    def train(recipe: Annotated[_one_of(RECIPES), tyro.conf.arg(name="")]) -> None:  # type: ignore[valid-type]  # built
        """Train a student; it goes to a run folder."""

    def noisy(recipe: Annotated[_one_of(NOISY), tyro.conf.arg(name="")]) -> None:  # type: ignore[valid-type]  # built
        """Train students on the labels of their teachers."""

    def ablate(recipe: Annotated[_one_of(ABLATIONS), tyro.conf.arg(name="")]) -> None:  # type: ignore[valid-type]  # built
        """Compare the modes."""

    def plan(recipe: Annotated[_one_of(PLANS), tyro.conf.arg(name="")]) -> None:  # type: ignore[valid-type]  # built
        """Say what a training takes on many ranks."""

    def labels(do: Annotated[_one_of(LABELS), tyro.conf.arg(name="")]) -> None:  # type: ignore[valid-type]  # built
        """Look at stored labels, or select from them."""

    of_choices = {"train": train, "noisy-student": noisy, "ablate": ablate, "plan": plan, "labels": labels}
    commands = of_choices | {name: after_training(name) for name in COMMANDS if name not in of_choices}
    try:
        tyro.cli(
            _one_of(commands),
            prog="metapl",
            args=["--tyro-write-completion", given[0], "-"],
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes),
        )
    except SystemExit as end:  # tyro prints the script and ends
        return int(end.code or 0)
    raise RuntimeError("tyro printed no script")


def _one_of(kinds: Mapping[str, Any]) -> Any:
    """The type of a choice between subcommands."""
    return Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items())]  # noqa: UP007  # made from a list
