"""``metapl --print-completion SHELL``: a script by which a shell completes commands, recipes and flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union

import tyro

from metapl.apps.commands.commands import CHOICES, COMMANDS, command_class, kinds
from metapl.errors import MetaplError

SHELLS = ("bash", "zsh", "fish")


def print_completion(given: Sequence[str]) -> int:
    """Print the script for the shell named; tyro writes it."""
    if len(given) != 1 or given[0] not in SHELLS:
        raise MetaplError(
            f"--print-completion was given {' '.join(given) or 'no shell'}; expected one of {', '.join(SHELLS)}, "
            "such as: metapl --print-completion bash."
        )

    commands = {name: _choice(name) if name in CHOICES else command_class(name, ()) for name in COMMANDS}
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


def _choice(command: str) -> Any:
    """A command whose first word is a choice, as tyro takes it: a function."""

    def chosen(choice: Any) -> None: ...

    known = {
        name: kind.given((), f"metapl {command} {name}") if hasattr(kind, "given") else kind
        for name, kind in kinds(command).items()
    }
    chosen.__annotations__["choice"] = Annotated[_one_of(known), tyro.conf.arg(name="")]
    return chosen


def _one_of(kinds: Mapping[str, Any]) -> Any:
    """The type of a choice between subcommands."""
    return Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items())]  # noqa: UP007  # made from a list
