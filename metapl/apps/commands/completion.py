"""``metapl --print-completion SHELL``: a script by which a shell completes commands, recipes and flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union

import tyro

from metapl.apps.commands.commands import CHOICES, COMMANDS, kinds, module_of
from metapl.apps.commands.parse import CONFIG, REGISTRY, OnRecipe
from metapl.errors import MetaplError

SHELLS = ("bash", "zsh", "fish")


def print_completion(given: Sequence[str]) -> int:
    """Print the script for the shell named; tyro writes it."""
    if len(given) != 1 or given[0] not in SHELLS:
        raise MetaplError(
            f"--print-completion was given {' '.join(given) or 'no shell'}; expected one of {', '.join(SHELLS)}, "
            "such as: metapl --print-completion bash."
        )
    commands = {
        name: _known(name) if name in CHOICES else getattr(module_of(name), name.capitalize()) for name in COMMANDS
    }
    try:
        tyro.cli(
            _one_of(commands),
            prog="metapl",
            args=["--tyro-write-completion", given[0], "-"],
            config=(*CONFIG, tyro.conf.OmitSubcommandPrefixes),
            registry=REGISTRY,
        )
    except SystemExit as end:  # tyro prints the script and ends
        return int(end.code or 0)
    raise RuntimeError("tyro printed no script")


def _known(command: str) -> Any:
    """A command whose first word is a choice, as tyro takes it: a function."""

    def chosen(choice: Any) -> None: ...

    known = {
        name: kind.completed(f"metapl {command} {name}") if issubclass(kind, OnRecipe) else kind
        for name, kind in kinds(command).items()
    }
    chosen.__annotations__["choice"] = Annotated[_one_of(known), tyro.conf.arg(name="")]
    return chosen


def _one_of(kinds: Mapping[str, Any]) -> Any:
    """The type of a choice between subcommands."""
    return Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items())]  # noqa: UP007  # made from a list
