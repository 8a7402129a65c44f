"""Command lines into frozen dataclasses, by tyro."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from metapl import words
from metapl.apps.commands.help import GROUPS, WIDE, WIDTH, entries_in, readable
from metapl.errors import FieldError, MetaplError

__all__ = ["WIDTH", "Run", "Switch", "on_recipe", "paragraph", "parse"]

T = TypeVar("T")

Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help_behavior_hint="")]
"""The folder of a run, by its place."""

Switch = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
"""Off unless given."""


def on_recipe(command: type[T], kind: type, about: str | None, *more: tuple[str, Any, Any]) -> type[T]:
    """A command with a field ``recipe`` on another kind of recipe.

    Args:
        command: a frozen dataclass.
        kind: of the recipe.
        about: what its help says.
        more: further fields with other defaults, by name, with type and default.
    """
    fields: list[Any] = [("recipe", Annotated[kind, tyro.conf.arg(name="")]), *more]
    name = f"{command.__name__}{kind.__name__}"
    made = dataclasses.make_dataclass(name, fields, bases=(command,), frozen=True, kw_only=True)
    made.__doc__ = about
    return made


def paragraph(text: str) -> str:
    """Text in lines of a terminal's width, broken only at spaces."""
    return textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False)


def parse(kind: type[T], program: str, arguments: list[str]) -> T:
    """An instance of ``kind`` from a command line.

    Raises:
        MetaplError: a wrong flag or value, in one line.
        SystemExit: 0, after ``--help``.
    """
    arguments = respelled(arguments)
    for before, word in zip([program, *arguments], arguments, strict=False):
        if word == "" or (word.startswith("--") and word.endswith("=")):
            raise MetaplError(
                f"nothing was given after {word.rstrip('=') or before}; expected a value. See {program} --help."
            )
    code, value, message, text = _ask_tyro(kind, program, arguments)
    if value is not None:
        for flag, after in zip(arguments, [*arguments[1:], "--"], strict=False):
            if flag.startswith("--") and after.startswith("--") and _is_left_empty(value, flag):
                raise MetaplError(f"nothing was given after {flag}; expected a value. See {program} --help.")
        return value
    if code == 0:
        print(readable(text))
        raise SystemExit(0)
    entries = list(entries_in(_ask_tyro(kind, program, ["--help"])[3]))
    completed = _with_true(arguments, [entry.name for entry in entries if entry.value == "{True,False}"])
    if completed != arguments:
        return parse(kind, program, completed)
    flags = [entry.name for entry in entries]
    unknown = unknown_flags(arguments, flags)
    why = (
        _left_over(_by_flag(_choice(_one_line(message)), flags), arguments)
        if not unknown
        else _no_such(unknown[0], program, flags)
    )
    raise MetaplError(f"{why} See {program} --help.")


def _is_left_empty(value: Any, flag: str) -> bool:
    """Whether a flag takes values, got none, and so says no more than if it were not there."""
    for field in dataclasses.fields(value):
        own = getattr(value, field.name)
        if dataclasses.is_dataclass(own) and _is_left_empty(own, flag):
            return True
        if own == () and field.default in ((), None) and flag[2:].replace("-", "_") == field.name:
            return True
    return False


def _no_such(flag: str, program: str, flags: Sequence[str]) -> str:
    """What is said of a flag that a command does not have: nothing is meant by one that others have.

    >>> _no_such("--lableed", "metapl train images", ["--labeled"])
    'there is no --lableed; did you mean --labeled?'
    >>> _no_such("--labeled", "metapl plan images", ["--labeled-batch"])
    'there is no --labeled for metapl plan images.'
    >>> _no_such("--seed", "metapl ablate digits", ["--seeds"])
    'there is no --seed for metapl ablate digits; did you mean --seeds?'
    """
    known = {name for names in GROUPS.values() for name in names.split()}
    prefix = flag[2:].partition(".")[0]
    group_of_others = f"{prefix}.*" in known and not any(own.startswith(f"--{prefix}.") for own in flags)
    if flag[2:] in known or group_of_others:
        other_number = [own for own in flags if own in (f"{flag}s", flag.removesuffix("s"))]
        return f"there is no {flag} for {program}{f'; did you mean {other_number[0]}?' if other_number else '.'}"
    return f"there is no {flag}{did_you_mean(flag, flags) or '.'}"


def _choice(text: str) -> str:
    """tyro's refusal of a value that is none of those there are, with the one that may be meant.

    >>> _choice("invalid choice 'fixmach' for argument '--method'. Expected one of ('uda', 'None', 'fixmatch').")
    '--method fixmach: there is no such value; did you mean fixmatch? Expected one of uda, fixmatch.'
    """
    match = re.match(r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*)\)\.$", text)
    if match is None:
        return text
    given, flag, listed = match.groups()
    values = [value for value in re.findall(r"'([^']*)'", listed) if value != "None"]
    meant = words.did_you_mean(given, values) or "."
    return f"{flag} {given}: there is no such value{meant} Expected one of {', '.join(values)}."


def _left_over(text: str, arguments: Sequence[str]) -> str:
    """tyro's refusal of a word that nothing takes, by the flag that it stands behind.

    >>> _left_over("Unrecognized options: pgd.", ["runs/mine", "--attack", "fgsm", "pgd"])
    "'pgd' stands behind --attack, which does not take it: one value was expected."
    >>> _left_over("Unrecognized options: more.", ["runs/mine", "more"])
    "nothing takes 'more'."
    """
    match = re.match(r"Unrecognized options: (\S+?)\.?(?: |$)", text)
    if match is None or match[1] not in arguments:
        return text
    flags = [word for word in arguments[: arguments.index(match[1])] if word.startswith("--")]
    return (
        f"'{match[1]}' stands behind {flags[-1]}, which does not take it: one value was expected."
        if flags
        else f"nothing takes '{match[1]}'."
    )


def _by_flag(text: str, flags: Sequence[str]) -> str:
    """tyro's refusal of a group of flags, by the flag that is wrong in it.

    >>> _by_flag("Error parsing recipe.changes: Changes(zoom=0.5): expected 1 or more.", ["--changes.zoom"])
    '--changes.zoom 0.5: expected 1 or more.'
    >>> _by_flag("Error parsing mesh: Mesh(shard=0): expected a number of processes, 1 or more.", ["--mesh.shard"])
    '--mesh.shard 0: expected a number of processes, 1 or more.'
    """
    match = re.match(r"Error parsing (?:recipe\.)?([\w.]+): \w+\((\w+)=(.*?)\): (expected .*)$", text)
    flag = "" if match is None else f"--{match[1]}.{match[2]}".replace("_", "-")
    return text if match is None or flag not in flags else f"{flag} {match[3]}: {match[4]}"


FLAGS = {"network_name": "network"}
"""Fields of recipes whose flag has another name."""


@contextlib.contextmanager
def flags_named() -> Iterator[None]:
    """Name the flag where a field of a recipe is wrong."""
    try:
        yield
    except FieldError as error:
        name = FLAGS.get(error.field, error.field).replace("_", "-")
        if not any({name, f"{name.partition('.')[0]}.*"} & {*known.split()} for known in GROUPS.values()):
            raise
        given = " ".join(map(str, error.value)) if isinstance(error.value, tuple) else error.value
        raise MetaplError(f"--{name} {given}: expected {error.expected}.") from error


def _with_true(arguments: list[str], switches: list[str]) -> list[str]:
    """``--grey`` alone is ``--grey True``, for switches that can also be left open.

    >>> _with_true(["--grey", "--pad", "2", "--color", "False"], ["--grey", "--color"])
    ['--grey', 'True', '--pad', '2', '--color', 'False']
    """
    following = [*arguments[1:], ""][: len(arguments)]
    return [
        part
        for word, after in zip(arguments, following, strict=True)
        for part in ([word, "True"] if word in switches and after not in ("True", "False") else [word])
    ]


def _ask_tyro(kind: type[T], program: str, arguments: list[str]) -> tuple[int | None, T | None, str, str]:
    """The exit code it would end with (None: it does not), the instance, and what it says as errors and as help."""
    # tyro draws the frames that entries_in looks for only where the output has this encoding.
    message, text = io.StringIO(), io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    code: int | None = None
    value: T | None = None
    with contextlib.redirect_stderr(message), contextlib.redirect_stdout(text), _columns(WIDE):
        try:
            value = tyro.cli(kind, prog=program, args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
        except SystemExit as stop:
            code = int(stop.code or 0)
    text.seek(0)
    return code, value, message.getvalue(), text.read()


@contextlib.contextmanager
def _columns(number: int) -> Iterator[None]:
    """As if the terminal were so wide."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(number)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _one_line(box: str) -> str:
    """What tyro's framed message says, in a line: without the frame, its title, and the help of the arguments named.

    >>> _one_line("╭─ Wrong ─────────╮\\n│ Unrecognized: -x │\\n│ ─────────────── │\\n│ For full help │\\n╰─────╯")
    'Unrecognized: -x.'
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [match[1] for match in re.finditer(r"^│ (.*?) *│?$", plain, re.MULTILINE)] or plain.splitlines()
    parts = re.split(r"^─+$", "\n".join(line for line in lines if not line.startswith(8 * " ")), flags=re.MULTILINE)
    kept = [parts[0].partition("Got errors:")[0], *(p for p in parts[1:] if p.strip().startswith("Perhaps"))]
    sentences = [re.sub(r"\s+", " ", part).strip().rstrip(".") for part in kept]
    text = ". ".join(sentences).replace("{None}|", "") + "."
    text = re.sub(r"^Missing from [^:]*:", "missing:", text)
    whole, real = r"invalid literal for int\(\) with base 10", r"could not convert string to float"
    text = re.sub(rf"^Error parsing (\S+): {whole}: (.*)", r"\1: expected a whole number, got \2", text)
    text = re.sub(rf"^Error parsing (\S+): {real}: (.*)", r"\1: expected a number, got \2", text)
    return re.sub(r"^Error parsing (\S+): no type matching (\S+) .* from \[(.*)\]", r"\1: expected \2, got \3", text)


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
    """As :func:`metapl.words.did_you_mean`, for flags too: the end of one is enough.

    >>> did_you_mean("--lr", ["--student.lr", "--teacher.lr", "--seed"])
    '; did you mean --student.lr or --teacher.lr?'
    """
    nested = [name for name in known if name.endswith(f".{given.removeprefix('--')}")]
    return f"; did you mean {' or '.join(nested)}?" if nested else words.did_you_mean(given, known)


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
    """Only whole words, between dashes, dots and underscores."""
    return "".join(SPELLINGS.get(word, word) for word in re.split(r"([-._])", flag))


def unknown_flags(arguments: Sequence[str], known: Sequence[str]) -> list[str]:
    """The flags among arguments that are not known.

    >>> unknown_flags(["--steps=5", "--image_size", "-1", "--stpes"], ["--steps", "--image-size"])
    ['--stpes']
    """
    flags = [word.partition("=")[0] for word in arguments if word.startswith("--") and word != "--"]
    return [flag for flag in flags if flag.replace("_", "-") not in known]
