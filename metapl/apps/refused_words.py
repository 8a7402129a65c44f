"""What a command line is refused for, as one line in the place of tyro's box.

tyro tells a hook what it is about to refuse, and which argument that concerns. The hook here raises
an error that says what was typed, what was expected, and which name was meant.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import tyro

from metapl.apps.help_pages import HELP_FLAGS, Flag, typed_command
from metapl.apps.settings import Unavailable
from metapl.errors import MetaplError, reason_of
from metapl.runs.fields import unmet
from metapl.words import did_you_mean, names_like, question_for, shown

# As much of a wrong value as a line shows.
LONGEST_VALUE = 60

# From so many letters on, a word stands for the flags that begin with it.
SHORTEST_BEGINNING = 3

# How like a flag is that was meant, from 0 to 1: "stepz" is to "steps" as 0.8.
LIKENESS = 0.8

# As many flags as a question proposes.
MOST_PROPOSED = 3


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The words of a command, and what they may be.

    Args:
        command: how the command is started, such as "metapl train digits".
        words: those behind it.
        flags: its flags.
        method: the name of the method that the flags belong to; None: the command has no methods.
        flags_of_methods: returns the names of the flags of each method, where they are asked for.
        longer_commands: commands that begin with the words of this one, such as "ablate digits".
    """

    command: str
    words: Sequence[str]
    flags: Sequence[Flag]
    method: str | None = None
    flags_of_methods: Callable[[], Mapping[str, Sequence[str]]] = dict
    longer_commands: Sequence[str] = ()

    # -------------------------------------------------------------------------- what is to be said

    def refusal(self, event: Any) -> str | None:
        """Return in a line what an event of tyro refuses; None for a fault that is left to tyro."""
        kind = type(event).__name__
        if kind == "UnrecognizedArgs":
            return self.unknown_word(event.tokens[0])
        if kind == "MissingArgs":
            for word in event.unrecognized_tokens:
                # The flag that is missing may be there, with an error in its name. And where a
                # command is missing, what it needs is not what this one does.
                if word.startswith("-") or self.longer_command_meant(word):
                    return self.unknown_word(word)
            return self.missing([self.flag_of(context.arg) for context in event.missing_arguments])
        if kind == "BadValue" and event.reason == "too_few_values":
            return self.missing_value(self.flag_of(event.argument))
        if kind == "InvalidChoice":
            return self.wrong_choice(self.flag_of(event.argument), event.value)
        if kind == "InstantiationFailure" and event.argument is not None:
            return self.wrong_value(self.flag_of(event.argument), event.message)
        return None

    def flag_of(self, argument: Any) -> Flag:
        """Return the flag that an argument of tyro is."""
        names = argument.lowered.name_or_flags
        field_name = argument.field.intern_name
        for flag in self.flags:
            if flag.name in names or (flag.is_positional and flag.field == field_name):
                return flag
        raise AssertionError(f"{names} is a flag of tyro, and none of the help")

    def missing(self, flags: Sequence[Flag]) -> str:
        """Return that flags, or arguments without a flag, have to be given."""
        names = [flag.typed for flag in flags]
        listed = names[-1]
        if names[1:]:
            listed = f"{', '.join(names[:-1])} and {names[-1]}"
        return f"{self.name} was given without {listed}; expected {self.usage}."

    def missing_value(self, flag: Flag) -> str:
        """Return that a flag stands without its value, or an argument without a flag is missing."""
        if flag.is_positional:
            # A flag that there is not stands where the argument was expected.
            for word in self.words:
                if word.startswith("-") and self.named(word) is None:
                    return self.unknown_flag(word.partition("=")[0])
            return self.missing([flag])
        text = f"{flag.name} was given without a value; expected {flag.typed}"
        next_word = "".join(self.words_behind(flag)[:1])
        if next_word.startswith("-") and self.named(next_word) is None:
            return f"{text}, and {flag.name}={next_word} if its value begins with a hyphen."
        return f"{text}."

    def wrong_choice(self, flag: Flag, value: str) -> str:
        """Return that a flag's value is none of those that it takes, or why it is not."""
        for entry in getattr(flag.hint, "__metadata__", ()):
            if isinstance(entry, Unavailable) and entry.word == value:
                return entry.reason
        meant = did_you_mean(value, flag.choices) or "."
        expected = flag.choices[-1]
        if flag.choices[1:]:
            expected = f"{', '.join(flag.choices[:-1])} or {expected}"
        return f"{flag.name} {value[:LONGEST_VALUE]}{meant} Expected {expected}."

    def wrong_value(self, flag: Flag, message: str) -> str:
        """Return that a flag's value cannot be read.

        Args:
            flag: the flag.
            message: what its reader says, for a flag whose type does not say what is expected.
        """
        values = self.values_of(flag)
        for word in values:
            if flag.choices and word not in flag.choices:
                return self.wrong_choice(flag, word)
        value = " ".join(values)
        # No flag takes None.
        expected = unmet(value, flag.hint).removesuffix(" or None")
        if expected:
            return f"{flag.name} {value[:LONGEST_VALUE]}: expected {expected}."
        return f"{flag.name} {value[:LONGEST_VALUE]}: {reason_of(ValueError(message))}."

    def unknown_word(self, word: str) -> str:
        """Return that a word is no flag of the command, or one argument too many."""
        if word.startswith("-") and word not in ("-", "--"):
            return self.unknown_flag(word.partition("=")[0][:LONGEST_VALUE])
        return self.stray_word(word)

    def unknown_flag(self, word: str) -> str:
        """Return that there is no such flag, and which one was meant."""
        name = word.replace("_", "-")
        owners = [method for method, names in self.flags_of_methods().items() if name in names]
        if owners:
            return (
                f"{name} is no flag of --method {self.method}; it is one of {', '.join(owners)}. "
                f"Those of a method: {self.command} --method {self.method} --help"
            )
        denied_flag = self.named(f"--{name.removeprefix('--no-')}")
        if denied_flag is not None and name.startswith("--no-"):
            if "False" in denied_flag.choices and not denied_flag.is_switch:
                return f"there is no flag {word}; did you mean {denied_flag.name} False?"
            return f"there is no flag {word}; {denied_flag.name} is off where it is left out."
        meant = self.meant(name)
        if meant:
            return f"there is no flag {word}{meant}"
        of_method = "" if self.method is None else f" --method {self.method}"
        return (
            f"there is no flag {word} of {self.command}; {self.command}{of_method} --help lists "
            "its flags."
        )

    def stray_word(self, word: str) -> str:
        """Return that a word stands where none is expected."""
        words_in_front: Sequence[str] = []
        for number, candidate in enumerate(self.words):
            # What stands behind the = of a flag without a value is a word too.
            if candidate.endswith(f"={word}") and self.named(candidate) is not None:
                words_in_front = self.words[: number + 1]
            elif candidate == word:
                words_in_front = self.words[:number]
        shown_word = repr(word[:LONGEST_VALUE])
        switch = self.named(words_in_front[-1]) if words_in_front else None
        if switch is not None and switch.is_switch:
            return f"{switch.name} takes no value; leave out {shown_word}."
        filled = self.named(words_in_front[-2]) if words_in_front[1:] else None
        if filled is not None and not filled.is_switch:
            return f"{filled.name} takes one value, and {shown_word} is another; leave it out."
        meant = self.longer_command_meant(word) or self.meant(f"--{word}") or "."
        return f"{shown_word} is one argument too many{meant} Expected {self.usage}."

    @property
    def name(self) -> str:
        """Return the command without the program's name."""
        return self.command.partition(" ")[2]

    @property
    def usage(self) -> str:
        """Return the command with all that it needs."""
        return typed_command(self.command, self.flags)

    # ------------------------------------------------------------------------- what the words have

    def named(self, word: str) -> Flag | None:
        """Return the flag that a word names, perhaps with its value behind =, or None."""
        name = word.partition("=")[0].replace("_", "-")
        for flag in self.flags:
            if flag.name == name and not flag.is_positional:
                return flag
        return None

    def meant(self, word: str) -> str:
        """Return a question for the flags that are like a word, or nothing.

        A flag that was given already is not what was meant, unless it is the only one.
        """
        names = [flag.name for flag in self.flags if not flag.is_positional] + [HELP_FLAGS[-1]]
        unused_names = [name for name in names if name not in self.words]
        # The hyphens, which all flags have, are no likeness.
        bare_word = word.strip("-").lower()
        for candidates in (unused_names, names):
            bare_names = [name.removeprefix("--") for name in candidates]
            likely_names = names_like(bare_word, bare_names, likeness=LIKENESS)
            if len(bare_word) >= SHORTEST_BEGINNING:
                longer_names = [name for name in bare_names if name.startswith(bare_word)]
                likely_names = longer_names[:MOST_PROPOSED] or likely_names
            if likely_names:
                return question_for([f"--{name}" for name in likely_names])
        return ""

    def longer_command_meant(self, word: str) -> str:
        """Return a question for the commands that are like this one with a word more."""
        return did_you_mean(f"{self.name} {word}", self.longer_commands)

    def words_behind(self, flag: Flag) -> Sequence[str]:
        """Return the words behind the last place of a flag."""
        for number in reversed(range(len(self.words))):
            if self.named(self.words[number]) is flag:
                return self.words[number + 1 :]
        return []

    def values_of(self, flag: Flag) -> list[str]:
        """Return the values that a flag was given, at its last place."""
        words_behind = self.words_behind(flag)
        flag_word = self.words[len(self.words) - len(words_behind) - 1]
        _, sign, joined_value = flag_word.partition("=")
        values = [joined_value] if sign else []
        for word in words_behind:
            is_complete = bool(values) and not flag.takes_several
            if is_complete or word.startswith("--"):
                break
            values.append(word)
        return values


@contextmanager
def refused_in_a_line(line: CommandLine) -> Iterator[None]:
    """Raise as a MetaplError, in a line, what ``tyro.cli`` refuses in this block.

    An error of metapl itself that a value has led to is raised as it is.
    """
    # The hook is in a module that tyro keeps to itself. A release without it, or with other events,
    # prints its box, and ends with the same exit code.
    errors_of_tyro: Any = getattr(tyro, "_errors", None)
    if not hasattr(errors_of_tyro, "on_parse_error"):
        yield
        return

    def raise_in_a_line(event: Any) -> None:
        cause = _error_of_metapl(sys.exception())
        if cause is not None:
            raise cause
        text = None
        with suppress(AttributeError):
            text = line.refusal(event)
        if text is not None:
            # A word may have a line's end in it.
            raise MetaplError(shown(text))

    with errors_of_tyro.on_parse_error(raise_in_a_line):
        yield


def _error_of_metapl(error: BaseException | None) -> MetaplError | None:
    """Return the error of metapl that an error came from, or None."""
    while error is not None and not isinstance(error, MetaplError):
        error = error.__context__
    return error


def refuse_empty_values(words: Sequence[str]) -> None:
    """Refuse an empty word, or an empty value of a flag, as an unset variable of a shell is one.

    An empty folder would be taken for the one that the command was started in.
    """
    flag = ""
    for word in words:
        name, sign, value = word.partition("=")
        if name.startswith("--") and sign and not value:
            raise MetaplError(f"{name} was given an empty value; expected one, or leave it out.")
        if not word and flag:
            raise MetaplError(f"{flag} was given an empty value; expected one, or leave it out.")
        if not word:
            raise MetaplError("an empty argument was given; expected a value, or leave it out.")
        flag = word if word.startswith("--") else ""
