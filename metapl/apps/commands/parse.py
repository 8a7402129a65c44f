"""Command lines into frozen dataclasses, by tyro: its help, and its refusals in a line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import shutil
import sys
import textwrap
import types
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import tyro

from metapl.apps.recipes.base import Method, Recipe, Unasked
from metapl.errors import FieldError, MetaplError
from metapl.runs.fields import check_fields

T = TypeVar("T")


def unset(metavar: str | None = None, help: str | None = None, default: str = "") -> Any:
    """Of a flag whose default is not shown, or in words; ``metavar`` stands for its value."""
    return tyro.conf.arg(metavar=metavar, help=help, help_behavior_hint=default)


Run = Annotated[Path, tyro.conf.Positional, unset("RUN")]  # the folder of a run, by its place
Switch = Annotated[bool, unset()]  # off unless given
Folder = Annotated[Path | None, unset("DIR")]
File = Annotated[Path | None, unset("FILE")]


@dataclass(frozen=True, kw_only=True)
class Command(ABC):
    """A command: its fields are the flags, with their ranges as types, and its docstring is the help."""

    alone: ClassVar[bool] = True  # in one process

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def given(cls, words: Sequence[str], program: str) -> tuple[type[Command], str]:
        """The command that a command line means, and how its help is asked for."""
        return cls, program

    def check(self) -> None:  # noqa: B027  # most leave it to what they call
        """Refuse what would lose work, before anything is read, and while no process waits for another."""

    @abstractmethod
    def run(self) -> int:
        """Do it; the exit code."""


CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
REGISTRY = tyro.constructors.ConstructorRegistry()
EXPECTED = {int: "a whole number", float: "a number", str: "a value", Path: "a path"}


@REGISTRY.primitive_rule
def _plain(of: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """How words become numbers, texts, places and choices, one or several, and switches that can be left open, with
    refusals in words of ours."""
    parts = get_args(of.type) if of.type_origin in (Union, types.UnionType) else (of.type,)
    kinds = [_bare(part) for part in parts if part is not NoneType]
    if len(kinds) != 1:
        return None
    several = get_origin(kinds[0]) is tuple and get_args(kinds[0])[1:] == (Ellipsis,)
    kind = _bare(get_args(kinds[0])[0]) if several else kinds[0]
    known = get_args(kind) if get_origin(kind) is Literal else (True, False) if kind is bool else ()
    if (kind not in EXPECTED and not known) or (kind is bool and NoneType not in parts):
        return None
    choices = {str(one): one for one in known}

    def read(word: str) -> Any:
        try:
            return choices[word] if known else kind(word)
        except ValueError as error:
            raise ValueError(f"expected {EXPECTED[kind]}, got {word!r}") from error

    def made(words: list[str]) -> Any:
        if kind is bool and not words:
            return True
        if not words or "" in words:
            raise ValueError("nothing was given; expected a value")
        return tuple(map(read, words)) if several else read(words[0])

    def fits(value: Any) -> bool:
        return value in known if known else isinstance(value, (kind, int) if kind is float else kind)

    metavar = "{" + ",".join(choices) + "}" if known else kind.__name__.upper()
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=(0, 1) if kind is bool else "*" if several else 1,
        metavar=f"{metavar} ..." if several else metavar,
        instance_from_str=made,
        is_instance=lambda value: (
            (value is None and NoneType in parts)
            or (all(map(fits, value)) if several and isinstance(value, tuple) else fits(value))
        ),
        str_from_instance=lambda value: [*map(str, value)] if isinstance(value, tuple) else [str(value)],
        choices=tuple(choices) or None,
    )


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def parse(kind: type[T], program: str, arguments: Sequence[str]) -> T:
    """An instance of ``kind`` from a command line; what is wrong is a MetaplError in one line."""
    if own := next((word for word in arguments if word.startswith("--tyro-")), None):  # it would write a file
        raise MetaplError(f"Unrecognized options: {own}. See {program} --help.")
    encoding = (sys.stdout.encoding or "utf-8") if {"-h", "--help"} & {*arguments} else "utf-8"
    message, help_text = io.StringIO(), io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    try:
        with contextlib.redirect_stderr(message), contextlib.redirect_stdout(help_text):
            return tyro.cli(kind, prog=program, args=[*arguments], config=CONFIG, registry=REGISTRY)
    except SystemExit as stop:
        if stop.code:
            error: BaseException | None = stop
            while error is not None and not isinstance(error, MetaplError):  # what a dataclass refused
                error = error.__cause__ or error.__context__
            said = in_a_line(message.getvalue())
            if "" in arguments:  # tyro names it by nothing
                said = re.sub("(?<=[:,]) ?(?=[,.])", " ''", said)
            raise error or MetaplError(f"{said}{perhaps(said)} See {program} --help.") from stop
        help_text.seek(0)
        width = shutil.get_terminal_size().columns
        for line in help_text.read().splitlines():  # paragraphs are lines of any length
            print(textwrap.fill(line, width, break_on_hyphens=False) if len(line) > width else line.rstrip())
        raise


def in_a_line(text: str) -> str:
    """What tyro says, in a line: without frames, and without the help of the arguments that it names.

    >>> in_a_line("╭─ Wrong ─────╮\\n│ Unrecognized: -x │\\n│ ────── │\\n│ For full help │\\n╰─────╯")
    'Unrecognized: -x.'
    """
    parts: list[list[str]] = [[]]
    for row in text.splitlines():
        line = row.strip("│").rstrip()
        if row.startswith("╭") or not line.strip("╰╯─ "):
            parts.append([])  # a rule between two parts
        elif not line.startswith(" " * 8):
            parts[-1].append(line.strip().rstrip("!"))
    texts = [" ".join(part).removeprefix("Error parsing ").rstrip() for part in parts if part]
    said = [re.sub(r"(?<=[^ .])\.+$", "", text) for text in texts]  # the word .. is none of its periods
    return ". ".join(part for part in said if not part.startswith(("For full help", "Argument helptext"))) + "."


def perhaps(said: str) -> str:
    """What may have been meant, where tyro does not say it: of choices, and of flags beside others that are missing.

    >>> perhaps("Missing from metapl: --labeled DIR. Unrecognized options: --labelled a.")
    ' Perhaps you meant: --labeled.'
    """
    choice, flag = re.search(r"invalid choice '(.*?)' .* one of \((.*)\)", said), r"--[\w.-]*\w"
    missing, _, unknown = said.partition("Unrecognized options")
    given, known = re.findall(flag, unknown), re.findall(flag, missing)
    if choice:
        given, known = [choice[1]], re.findall(r"'(.*?)'", choice[2])
    meant = [near for word in given for near in difflib.get_close_matches(word, known, n=1)]
    return f" Perhaps you meant: {', '.join(meant)}." if meant else ""


@contextlib.contextmanager
def flags_named(arguments: Sequence[str]) -> Iterator[None]:
    """Name the flag where a field is wrong that was given by one."""
    try:
        yield
    except FieldError as error:
        name = error.field.replace("_", "-")
        flags = {word.partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--")}
        own = flags & {f"--{name}", f"--{name.removesuffix('-name')}"}
        meant = [*own] or [flag for flag in flags if flag.endswith((f".{name}", f"-{name}"))]
        if len(meant) != 1:
            raise
        given = " ".join(map(str, error.value)) if isinstance(error.value, tuple) else error.value
        raise MetaplError(f"{meant[0]} {given}: expected {error.expected.removesuffix(' or None')}.") from error


@dataclass(frozen=True, kw_only=True)
class OnRecipe(Command):
    """A command whose flags are the fields of a recipe and of a method; from both the recipe by the method is made."""

    kind: ClassVar[type[Recipe]]  # of the recipe

    recipe: Unasked[Any]
    settings: Unasked[Any] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.recipe.method, Method):
            recipe, method = (type(part).__mro__[1] for part in (self.recipe, self.settings))
            made = recipe(**{**vars(self.recipe), "method": method(**vars(self.settings))})
            object.__setattr__(self, "recipe", made)

    @classmethod
    def on(cls, *kinds: type[Recipe]) -> dict[str, type[Self]]:
        return {kind.name: type(cls.__name__, (cls,), {"kind": kind}) for kind in kinds}

    @classmethod
    def flags(
        cls, settings: Method, words: Sequence[str], about: str, hidden: Collection[str], **fields: Any
    ) -> type[Self]:
        """The command with the flags of its recipe and of a method, with its defaults; ``about`` is what its help says.
        Of two kinds of views those have flags that ``words`` choose, and ``hidden`` fields have none; ``fields`` are
        further ones, (type, default) each."""
        views: tuple[str, ...] = ()
        if "randaugment" in cls.kind.__dataclass_fields__:
            views = ("changes",) if "--randaugment" in words else ("pad", "strong")
        own = _flags(type(settings), {*hidden, *views})
        made: list[Any] = [
            ("recipe", Annotated[_flags(cls.kind, {*hidden, *views, "method"}), tyro.conf.arg(name="")]),
            ("settings", Annotated[own, tyro.conf.arg(name="")], field(default=own(**vars(settings)))),
            *((name, hint, default) for name, (hint, default) in fields.items()),
        ]
        space = {"__doc__": about}
        return dataclasses.make_dataclass(cls.__name__, made, bases=(cls,), frozen=True, kw_only=True, namespace=space)


def _flags(kind: type, hidden: Collection[str]) -> type[Any]:
    """A dataclass as flags: without those that are hidden, and validated when all of it is known."""
    hints, unasked = get_type_hints(kind, include_extras=True), cast(Any, Unasked)
    fields = [
        (each.name, unasked[hints[each.name]], field(default=each.default, default_factory=each.default_factory))
        for each in dataclasses.fields(kind)
        if each.name in hidden
    ]
    namespace = {"__post_init__": lambda self: None, "__doc__": kind.__doc__}
    return dataclasses.make_dataclass(
        kind.__name__, fields, bases=(kind,), frozen=True, kw_only=True, namespace=namespace
    )
