"""The ``metapl`` command: its commands by name, and its errors as a line and an exit code.

The words that name a command lead to a dataclass of :data:`COMMANDS`; tyro makes it from the flags,
``check_fields`` holds the values against its annotations, and its method ``run`` does the work and
returns the exit code. Which flags ``metapl train`` has depends on ``--method``, which is looked up
before tyro is called. Help is written by :mod:`metapl.apps.help_pages`.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

import torch
import tyro

from metapl.apps import help_pages
from metapl.apps.printing import as_flags, tell
from metapl.apps.refused_words import CommandLine, refuse_empty_values, refused_in_a_line
from metapl.apps.settings import flag_values
from metapl.errors import FieldError, MetaplError, needed_for
from metapl.runs.fields import check_fields
from metapl.runs.terminal import END, exit_code, is_heard
from metapl.words import did_you_mean, shown

if TYPE_CHECKING:
    from metapl.apps.stored_recipe import StoredRecipe

# Each command is a dataclass whose fields are the flags, with a method ``run``.
COMMANDS = {
    "train images": "commands.TrainImages",
    "train digits": "commands.TrainDigits",
    "noisy-student images": "commands.RoundsOfImages",
    "noisy-student digits": "commands.RoundsOfDigits",
    "predict": "predict.Predict",
    "evaluate": "evaluate.Evaluate",
    "report": "report.Report",
    "runs": "list_runs.Runs",
    "compare": "compare_runs.Compare",
    "export": "export.Export",
    "label": "label_commands.Label",
    "labels stats": "label_commands.Stats",
    "labels select": "label_commands.Select",
    "ablate": "ablate.AblateFactory",
    "ablate images": "ablate.AblateImages",
    "ablate digits": "ablate.AblateDigits",
}

# The commands that torchrun may start in several processes.
SEVERAL = ("train images", "train digits")

HELP = """\
usage: metapl COMMAND ...

Train a classifier from a few labeled examples and many unlabeled ones:

  metapl train images --labeled few/ --unlabeled many/ --test held_out/
  metapl train digits --compare --seeds 0-4 --out runs/compared

commands:"""

MORE_HELP = """\
Each command says more with --help.
metapl train --config runs/digits-001/recipe.json repeats a run.
metapl --print-completion SHELL completes them in bash, zsh or fish.
metapl --version says which version this is."""

# Those whose completion can be printed.
SHELLS = ("bash", "zsh", "fish")

CONFIG = (
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.DisallowNone,
    tyro.conf.OmitSubcommandPrefixes,
    tyro.conf.CascadeSubcommandArgs,
)

# Not every recipe has all of these flags.
LESS = (
    "lower the batch sizes (--labeled-batch, --unlabeled-batch), --image-size or --num-workers, "
    "raise --accumulate, or take --precision bfloat16"
)

# Python, NumPy, torch on the host and oneDNN each say in a way of their own that memory is short.
TOO_LITTLE_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|MemoryError|bad_alloc|"
    r"cannot allocate memory|could not create a (primitive|memory)",
    re.IGNORECASE,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words behind ``metapl``. None: those that the program was started with, which
            ends with this call.

    Returns: the exit code: 0 done; 1 done in part, or the system refused, or nobody reads what is
    printed; 2 wrong input; 128 + n stopped by signal n.
    """
    open_closed_streams()
    escape_unknown_letters()
    is_program = arguments is None
    words = [*sys.argv[1:]] if arguments is None else [*arguments]
    if is_program:
        # A warning is a line, without its place in the code.
        warnings.formatwarning = lambda message, *_, **__: f"metapl: {shown(message)}\n"
    with stoppable(for_good=is_program):
        return run(words)


def run(words: Sequence[str]) -> int:
    """Run the command that the words name, and return the exit code."""
    command: Any = None
    try:
        try:
            # The command may be what needs a package that is not installed, or its flags.
            with printed_messages(), needed_for(f"metapl {shown(' '.join(words[:1]))}".strip()):
                name, command = parsed(words)
                refuse_several_processes(name)
                check_fields(command)
                return int(command.run())
        finally:
            sys.stdout.flush()
    except SystemExit as end:
        # Help was printed, or tyro has printed what is wrong.
        return int(end.code or 0)
    except KeyboardInterrupt as stopped:
        print("\nmetapl: stopped.", file=sys.stderr)
        return exit_code(stopped)
    except Exception as error:
        code = tell_error(error, command)
        if code is None:
            # The error is a fault of metapl itself.
            raise
        return code


@contextmanager
def printed_messages() -> Iterator[None]:
    """Print what the library logs, on standard error, while the block lasts."""
    logger = logging.getLogger("metapl")
    messages = logging.StreamHandler()
    messages.setFormatter(logging.Formatter("metapl: %(message)s"))
    logger.addHandler(messages)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(messages)


def refuse_several_processes(name: str) -> None:
    """Refuse a command that torchrun has started in several processes, unless it takes them."""
    count = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ and count != "1" and name not in SEVERAL:
        raise MetaplError(
            f"torchrun has started {count} processes of metapl {name}, which takes one; start it "
            "without."
        )


def tell_error(error: Exception, command: Any) -> int | None:
    """Print the line of an error, and return the exit code.

    Args:
        error: what has ended the command.
        command: its dataclass; None where the words did not make one.

    Returns: the exit code; None for an error that is a fault of metapl itself, which is not
    printed.
    """
    error = called_by_flag(error, command)
    lacking = out_of_memory(error)
    if lacking is not None or isinstance(error, MetaplError):
        text = as_flags(str(error))
        if lacking is not None:
            text = f"the memory {lacking} does not suffice; {LESS}."
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            text = f"process {rank}: {text}"
        tell(f"metapl: {text}", file=sys.stderr)
        return 2
    if not isinstance(error, OSError):
        return None
    # Bytes that are still buffered would fail again at exit. The output of a test has no file.
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    # A broken pipe is no fault: its reader has gone, as head does.
    if not isinstance(error, BrokenPipeError):
        name = error.filename or "input or output"
        reason = error.strerror or error
        print(f"metapl: {shown(f'{name}: {reason}')}.", file=sys.stderr)
    return 1


def called_by_flag(error: Exception, command: Any) -> Exception:
    """Return an error in which the field that has a wrong value is called by its flag.

    The field is one of a dataclass whose fields are flags, or of a function that is given them.
    Other errors are returned as they are.
    """
    if not isinstance(error, FieldError):
        return error
    if command is not None and error.field not in flag_values(command):
        return error
    flag = f"--{error.field.replace('_', '-')}"
    if command is not None:
        # Some flags have another name than their field.
        names = {flag.field: flag.name for flag in help_pages.flags_of(type(command))}
        flag = names.get(error.field, flag)
    # No flag takes None.
    expected = error.expected.removesuffix(" or None")
    if error.value == ():
        return MetaplError(f"{flag} was given without a value; expected {expected}.")
    return MetaplError(f"{flag} {help_pages.spelled(error.value)}: expected {expected}.")


def escape_unknown_letters() -> None:
    """Let the standard streams write letters that their encoding does not have as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            is_utf8 = stream.encoding.lower() == "utf-8"
            stream.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")


def open_closed_streams() -> None:
    """Open the null device in the place of each standard stream that is closed.

    Some schedulers start a job without them, as a shell does by ``>&-``, and Python has None for
    such a stream. What would be written there is not, and a file that the command opens does not
    get the number of a standard stream, to which programs that it starts would write.
    """
    for name, access in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, access)
            is_inheritable = True
            os.set_inheritable(stream.fileno(), is_inheritable)
            setattr(sys, name, stream)


def parsed(words: Sequence[str]) -> tuple[str, Any]:
    """Return the name of the command that the words begin with, and its dataclass.

    The dataclass is made of the other words by tyro.

    Raises:
        SystemExit: help was asked for and printed, or tyro has printed what is wrong.
        MetaplError: the words name no command, or a flag of a method that was not asked for.
    """
    recipe = None
    if words[1:] and words[0] in ("help", *help_pages.HELP_FLAGS):
        # As it is asked of git: help train digits.
        words = [*words[1:], help_pages.HELP_FLAGS[-1]]
    if words[:1] and words[0] in ("train", "noisy-student"):
        # Behind this import are the trainings on pictures.
        from metapl.apps.stored_recipe import StoredRecipe, flag_value

        path, words = flag_value(words, "--config")
        if path is not None:
            recipe = StoredRecipe.read(Path(path))
            words = words_by_recipe(recipe, words)
    name = command_named(words)
    if name is None:
        print_what_needs_no_command(words)
        raise SystemExit(0)
    kind = command_type(name)
    flags = [*words[len(name.split()) :]]
    methods: Mapping[str, Any] = {}
    method = None
    if hasattr(kind, "method_name"):
        methods = kind.methods.METHODS
        if flags and flags[0] in methods:
            raise MetaplError(f"{flags[0]} is a method; expected --method {flags[0]}.")
        method = method_asked(flags)
        if method is not None:
            if method not in methods:
                meant = did_you_mean(method, [*methods]) or "."
                expected = ", ".join(methods)
                raise MetaplError(f"--method {shown(method)}{meant} Expected {expected}.")
            kind = kind.with_method(method)
    if recipe is not None:
        kind = kind.with_recipe(recipe, method)
    if asks_for_help(flags):
        tell(help_pages.page(name, kind, methods))
        raise SystemExit(0)
    refuse_empty_values(flags)
    with refused_in_a_line(command_line(name, kind, methods, flags)):
        command = tyro.cli(kind, prog=f"metapl {name}", args=flags, config=CONFIG)
    if recipe is not None:
        flag_names = {flag.partition("=")[0] for flag in flags if flag.startswith("--")}
        setting_names = {name.removeprefix("--").replace("-", "_") for name in flag_names}
        command = command.with_seen_again(setting_names)
    return name, command


def words_by_recipe(recipe: StoredRecipe, words: Sequence[str]) -> list[str]:
    """Return the words of a command with the name of the one that trains by a recipe in front.

    What is trained on may be named behind ``train``, as the recipe has it, or left out.

    Raises: MetaplError for a recipe of another command, or of none.
    """
    name = recipe.command
    if name not in COMMANDS:
        expected = [name.partition(" ")[2] for name in COMMANDS if name.startswith("train ")]
        meant = did_you_mean(recipe.name, expected) or "."
        raise MetaplError(
            f"{recipe.path}: no command trains on {shown(recipe.name)!r}{meant} Expected one of "
            f"{', '.join(expected)}."
        )
    count = 2 if words[1:] and not words[1].startswith("-") else 1
    asked = " ".join(words[:count])
    if not f"{name} ".startswith(f"{asked} "):
        raise MetaplError(
            f"{shown(asked)} was asked for, and {recipe.path} is the recipe of {name}; "
            f"expected metapl {name} --config {recipe.path}."
        )
    return [*name.split(), *words[count:]]


def command_named(words: Sequence[str]) -> str | None:
    """Return the command that the first two words name, or the first one alone, or None."""
    for name in (" ".join(words[:2]), *words[:1]):
        if name in COMMANDS:
            return name
    return None


def command_type(name: str) -> Any:
    """Return the dataclass of a command."""
    module, _, kind = COMMANDS[name].rpartition(".")
    return getattr(import_module(f"metapl.apps.{module}"), kind)


def asks_for_help(words: Sequence[str]) -> bool:
    """Return whether one of the words is a flag that asks for help."""
    return any(word in help_pages.HELP_FLAGS for word in words)


def print_what_needs_no_command(words: Sequence[str]) -> None:
    """Print the help of all commands, the version, or a shell's completion.

    Raises: MetaplError for words that ask for none of these.
    """
    first = words[0] if words else "help"
    if first == "--version":
        if words[1:]:
            raise MetaplError(f"--version takes no value; leave out {shown(words[1])!r}.")
        print(f"metapl {version('metapl')}")
        return
    if first == "--print-completion":
        if len(words) != 2 or words[1] not in SHELLS:
            raise MetaplError(
                f"{shown(' '.join(words))}: expected --print-completion SHELL, one of "
                f"{', '.join(SHELLS)}."
            )
        # tyro prints it, and raises SystemExit.
        args = ["--tyro-print-completion", *words[1:]]
        tyro.cli(every_command(), prog="metapl", args=args, config=CONFIG)
    group = [name for name in COMMANDS if name.split()[0] == first]
    if first == "help" or first in help_pages.HELP_FLAGS:
        listed = help_pages.list_of((name, command_type(name)) for name in COMMANDS)
        tell(f"{HELP}\n{listed}\n\n{MORE_HELP}")
        return
    if group and asks_for_help(words[1:2]):
        listed = help_pages.list_of((name, command_type(name)) for name in group)
        tell(f"usage: metapl {first} ...\n\n{listed}\n\n{MORE_HELP}")
        return
    asked = first
    if group:
        if not words[1:] or words[1].startswith("-"):
            raise MetaplError(f"{first} alone is no command; expected one of {', '.join(group)}.")
        asked = f"{first} {words[1]}"
    expected = group or [*dict.fromkeys(name.split()[0] for name in COMMANDS)]
    flags = ["--version", "--print-completion", help_pages.HELP_FLAGS[-1]]
    meant = did_you_mean(asked, [*expected, *flags]) or "."
    raise MetaplError(
        f"there is no command {shown(asked)!r}{meant} Expected {', '.join(expected)}."
    )


def method_asked(words: Sequence[str]) -> str | None:
    """Return the last value of ``--method``, which decides what the other flags are, or None."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--method")
    try:
        method: str | None = parser.parse_known_args(words)[0].method
    except argparse.ArgumentError:
        # It has no value, which tyro says.
        return None
    return method


def command_line(
    name: str, kind: Any, methods: Mapping[str, Any], words: Sequence[str]
) -> CommandLine:
    """Return the words of a command, with all that they may be.

    Args:
        name: of the command.
        kind: its dataclass, with the method that was asked for.
        methods: the methods of ``--method`` by name; empty where there is one.
        words: those behind the name.
    """

    def flags_of_methods() -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for method in methods:
            flags = help_pages.flags_of(kind.with_method(method))
            names[method] = [flag.name for flag in flags]
        return names

    return CommandLine(
        command=f"metapl {name}",
        words=words,
        flags=help_pages.flags_of(kind),
        method=kind.method_name if methods else None,
        flags_of_methods=flags_of_methods,
        longer_commands=[other for other in COMMANDS if other.startswith(f"{name} ")],
    )


def every_command() -> Any:
    """Return all commands as one type, of which tyro makes the completion of a shell."""
    kinds: dict[str, dict[str, Any]] = {}
    for name in COMMANDS:
        first, _, second = name.partition(" ")
        kinds.setdefault(first, {})[second] = with_flags_of_all_methods(name)
    types_of_words: dict[str, Any] = {}
    for first, by_second in kinds.items():
        # "ablate" is a command, and so is "ablate digits": those of two words are completed.
        of_two_words = {second: kind for second, kind in by_second.items() if second}
        if of_two_words:
            group = [("command", one_of(of_two_words))]
            types_of_words[first] = dataclasses.make_dataclass(first.replace("-", "_"), group)
        else:
            types_of_words[first] = by_second[""]
    return one_of(types_of_words)


def with_flags_of_all_methods(name: str) -> Any:
    """Return a command's dataclass with the flags of all its methods, for completion alone.

    A shell does not tell which ``--method`` is in the line. A flag that the method does not have is
    refused with those that have it.
    """
    kind = command_type(name)
    kinds = [kind]
    if hasattr(kind, "method_name"):
        kinds += [kind.with_method(method) for method in kind.methods.METHODS]
    flags: dict[str, help_pages.Flag] = {}
    for kind_of_method in kinds:
        for flag in help_pages.flags_of(kind_of_method):
            flags.setdefault(flag.name, flag)
    fields: list[Any] = []
    for flag in flags.values():
        # The type is known only while the program runs.
        described = tyro.conf.arg(help=flag.text)
        annotation: Any = Annotated[flag.hint, described]
        settings = dataclasses.field(kw_only=True)
        if not flag.is_required:
            settings = dataclasses.field(default=flag.value, kw_only=True)
        fields.append((flag.field, annotation, settings))
    command = dataclasses.make_dataclass(name.replace(" ", "_").replace("-", "_"), fields)
    command.__doc__ = kind.__doc__
    return command


def one_of(kinds: Mapping[str, Any]) -> Any:
    """Return a type that is one of these, each a subcommand by its word."""
    commands = [Annotated[kind, tyro.conf.subcommand(word)] for word, kind in kinds.items()]
    # `X | Y` has no form for a list that is made while the program runs.
    return Union[tuple(commands)]  # noqa: UP007


# -------------------------------------------------------------------------------- what may go wrong


class Terminated(KeyboardInterrupt):
    """A signal that asks the process to end."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number


class Unwinding:
    """Handles signals by unwinding the main thread, once."""

    def __init__(self) -> None:
        self.has_begun = False

    def __call__(self, number: int, frame: Any) -> None:
        """Raise :class:`Terminated`, unless the process is ending already.

        Who stops a group of processes may reach one of them twice; a second Ctrl-C is meant. A fit
        that was stopped has saved its step already, and says so when it has unwound.
        """
        is_ending = self.has_begun or isinstance(sys.exc_info()[1], KeyboardInterrupt)
        if number in END and is_ending:
            return
        self.has_begun = True
        raise Terminated(number)


@contextmanager
def stoppable(*, for_good: bool) -> Iterator[None]:
    """Unwind on SIGTERM and SIGHUP as on Ctrl-C, so that temporary files are removed.

    Another SIGTERM or SIGHUP that comes meanwhile is not heard. With ``for_good`` the process ends
    with the block: signals that come after it has begun to end are not heard either.
    """
    unwinding = Unwinding()
    former_handlers: dict[int, Any] = {}
    # The main thread alone may handle signals.
    if threading.current_thread() is threading.main_thread():
        for number in filter(is_heard, (signal.SIGINT, *END)):
            former_handlers[number] = signal.signal(number, unwinding)
    try:
        yield
    finally:
        for number, handler in former_handlers.items():
            if for_good and unwinding.has_begun:
                signal.signal(number, signal.SIG_IGN)
            else:
                # The handler of a program in another language is None.
                signal.signal(number, handler or signal.SIG_DFL)


def out_of_memory(error: BaseException | None) -> str | None:
    """Return whose memory did not suffice, if that is the error or one that it came from.

    Return None for any other error, and for a refusal that says so itself.
    """
    while error is not None and "does not suffice" not in str(error):
        if isinstance(error, torch.OutOfMemoryError):
            return "of the GPU"
        says_so = TOO_LITTLE_MEMORY.search(str(error)) is not None
        is_told_by_text = isinstance(error, RuntimeError | OSError) and says_so
        if isinstance(error, MemoryError) or is_told_by_text:
            return "of the GPU" if "CUDA" in str(error) else "of this machine"
        error = error.__cause__ or error.__context__
    return None
