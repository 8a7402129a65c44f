"""What tyro refuses of a command line, as a line: what was typed, and what was expected.

tyro prints it, and says it in no other way that lasts: its text is read here.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from typing import TypeVar

from metapl.errors import MetaplError, few
from metapl.words import did_you_mean, shown

# What stands for a number in help, in words.
NUMBERS = {"INT": "a whole number", "FLOAT": "a number"}

T = TypeVar("T")

# Makes a command of words, or prints what is wrong, or help, and raises SystemExit.
Reader = Callable[[Sequence[str]], T]


def read_words(read: Reader[T], program: str, words: Sequence[str]) -> T:
    """Return the command of the words; refuse what tyro refuses by :class:`MetaplError`.

    Args:
        read: makes a command of words, by tyro.
        program: the words that name the command.
        words: those behind them.
    """
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            command = read(words)
    except SystemExit as end:
        if not end.code:
            raise
        error = own_error(end)
        if error is not None:
            raise error from None
        # It is printed again, for what goes to a terminal has colors and boxes.
        text = text_of(printed_by(read, words))
        help_text = printed_by(read, ["--help", *words])
        flags = flags_in(help_text)
        unknown = [flag for flag in typed_flags(words) if flag not in flags]
        owners = methods_with(unknown[0], read, words, help_text) if unknown else []
        if owners:
            raise MetaplError(
                f"{unknown[0]}: a flag of --method {' or '.join(owners)}; leave it out, or give "
                f"one of these. {program} --method NAME --help lists the flags of a method."
            ) from None
        raise MetaplError(refusal(program, words, flags, text)) from None
    sys.stderr.write(errors.getvalue())
    return command


def own_error(error: BaseException | None) -> MetaplError | None:
    """Return the error of a dataclass that an error came from, if one did."""
    while error is not None:
        if isinstance(error, MetaplError):
            return error
        error = error.__cause__ or error.__context__
    return None


def printed_by(read: Reader[T], words: Sequence[str]) -> str:
    """Return what is printed where the words are read, without colors and boxes."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed), suppress(SystemExit):
        read(words)
    return printed.getvalue()


def flags_in(text: str) -> dict[str, str]:
    """Return the flags that a help has, each with what stands for its value, or nothing."""
    # What is said of a flag stands further to the right.
    return dict(re.findall(r"(?m)^  (?:-h, )?(--[\w.-]+)(?: (\S+))?", text))


def methods_with(flag: str, read: Reader[T], words: Sequence[str], help_text: str) -> list[str]:
    """Return the methods of a command that have a flag.

    Args:
        help_text: of the method of these words, which does not have it.
    """
    owners: list[str] = []
    methods = re.search(r"--method \{(.*?)\}", help_text, re.DOTALL)
    for method in re.findall(r"\w+", methods[1]) if methods else []:
        help_of_method = printed_by(read, ["--help", *words, "--method", method])
        if flag in flags_in(help_of_method):
            owners.append(method)
    return owners


def text_of(error: str) -> str:
    """Return the first part of what is printed of an error, without its title, in a line.

    >>> text_of(" Value error\\n ------- \\n  Error parsing --lr: \\n  x. \\n  ------- \\n  See")
    'Error parsing --lr: x.'
    """
    parts = re.split(r"(?m)^ +-{4,} *$", error)
    return " ".join(parts[min(1, len(parts) - 1)].split())


def refusal(program: str, words: Sequence[str], flags: Mapping[str, str], text: str) -> str:
    """Return what was typed, and what was expected.

    Args:
        program: the words that name the command.
        words: those behind them.
        flags: all flags that there are, each with what stands for its value.
        text: what tyro says.
    """
    values = typed_flags(words)
    unknown = [flag for flag in values if flag not in flags]
    if unknown:
        meant = did_you_mean(unknown[0], [*flags]) or "."
        return f"{few(unknown)}: there is no such flag{meant} {program} --help lists them."
    choice = re.match(r"invalid choice '(.*?)' for argument '(.*?)'\. Expected one of (.*)", text)
    if choice:
        value, flag, expected = choice.groups()
        # A flag that is left out is None, which nobody types.
        names = [name for name in re.findall(r"'(.*?)'", expected) if name != "None"]
        meant = did_you_mean(value, names) or "."
        return f"{flag} {shown(value)}: expected one of {', '.join(names)}{meant}"
    unread = re.match(r"Error parsing (--[\w.-]+):", text)
    if unread and unread[1] in values:
        flag = unread[1]
        expected = NUMBERS.get(flags[flag], flags[flag])
        return f"{flag} {shown(values[flag])}: expected {expected}."
    return f"{text.rstrip('.')}. {program} --help says more."


def typed_flags(words: Sequence[str]) -> dict[str, str]:
    """Return the flags among the words, each with the word behind it.

    >>> typed_flags(["few", "--label_smoothing=0.1", "--lr", "-1"])
    {'--label-smoothing': '0.1', '--lr': '-1'}
    """
    values = {}
    for number, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") or flag == "--":
            continue
        if not equals:
            value = " ".join(words[number + 1 : number + 2])
        values[flag.replace("_", "-")] = value
    return values


def refuse_unknown_command(words: Sequence[str], names: Sequence[str]) -> None:
    """Refuse words that name none of the commands, unless a flag stands there.

    Args:
        words: all that was typed behind the program.
        names: of the commands, of a word or two.
    """
    known = [word for word in words[:1] if any(name.split()[0] == word for name in names)]
    typed = words[len(known) : len(known) + 1]
    if typed and typed[0].startswith("-"):
        return
    choices: list[str] = []
    for name in names:
        parts = name.split()
        if parts[: len(known)] == known and parts[len(known)] not in choices:
            choices.append(parts[len(known)])
    program = " ".join(["metapl", *known])
    expected = f"expected {', '.join(choices[:-1])} or {choices[-1]}"
    if not typed:
        raise MetaplError(f"{program} was typed alone; {expected} behind it.")
    meant = did_you_mean(typed[0], choices) or "."
    raise MetaplError(f"{program} has no {shown(typed[0])}; {expected}{meant}")
