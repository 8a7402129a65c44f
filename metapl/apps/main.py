"""The ``metapl`` command: its commands by name, and its errors as a line and an exit code.

The words that name a command lead to a dataclass of :data:`COMMANDS`, which is imported then. tyro
makes it from the flags, and its method ``run`` does the work and returns the exit code. Help,
completion, and what is said of wrong flags, are tyro's.
"""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from typing import Any, Protocol

import torch
import tyro

from metapl.apps.printing import as_flags, paragraphs, tell_wrong
from metapl.apps.refusals import read_words, refuse_unknown_command
from metapl.errors import MetaplError, installation, needed_for
from metapl.runs.fields import check_fields
from metapl.runs.terminal import END, exit_code, is_heard
from metapl.words import shown


class Command(Protocol):
    """A dataclass whose fields are the flags of a command."""

    def run(self) -> int:
        """Do the work, and return the exit code."""


@dataclass(frozen=True)
class Entry:
    """Where a command is, and what it does.

    Args:
        module: the module of :mod:`metapl.apps` that has its dataclass.
        type_name: the name of the dataclass.
        summary: a sentence for the list of commands, which is printed without importing them.
    """

    module: str
    type_name: str
    summary: str

    def load(self) -> type[Command]:
        """Import the dataclass."""
        kind: type[Command] = getattr(import_module(f"metapl.apps.{self.module}"), self.type_name)
        return kind


COMMANDS = {
    "train images": Entry(
        "commands", "TrainImages", "Train on a few labeled pictures and many without labels."
    ),
    "train digits": Entry(
        "commands", "TrainDigits", "Train on handwritten digits, of which a few are labeled."
    ),
    "noisy-student images": Entry(
        "commands", "RoundsOfImages", "Train by Noisy Student on pictures."
    ),
    "noisy-student digits": Entry(
        "commands", "RoundsOfDigits", "Train by Noisy Student on digits."
    ),
    "predict": Entry("predict", "Predict", "Predict the classes of pictures, as CSV."),
    "evaluate": Entry("evaluate", "Evaluate", "Measure a run's network on its test set again."),
    "report": Entry("report", "Report", "Write a web page of a run."),
    "runs": Entry("list_runs", "Runs", "List the runs below a folder."),
    "compare": Entry("compare_runs", "Compare", "Test whether the accuracies of runs differ."),
    "export": Entry("export", "Export", "Write a run's network for other programs."),
    "label": Entry("label_commands", "Label", "Store a network's labels of many pictures."),
    "labels stats": Entry("label_commands", "Stats", "Say what is in a store of labels."),
    "labels select": Entry("label_commands", "Select", "Select examples of a store of labels."),
    "ablate": Entry("ablate", "AblateFactory", "Compare the modes on networks of your own."),
    "ablate images": Entry("ablate", "AblateImages", "Compare the modes on your pictures."),
    "ablate digits": Entry("ablate", "AblateDigits", "Compare the modes on digits."),
}

# What the commands of two words do, by their first one.
GROUPS = {
    "train": "Train a network: images, digits.",
    "noisy-student": "Train networks in rounds: images, digits.",
    "labels": "Read a store of labels: stats, select.",
    "ablate": "Compare the modes: images, digits, or networks of your own.",
}

# The commands that torchrun may start in several processes.
SEVERAL = ("train images", "train digits")

DESCRIPTION = """\
Train a classifier from a few labeled examples and many unlabeled ones.

  metapl train images --labeled few/ --unlabeled many/ --test held_out/
  metapl train digits --compare --seeds 0-4 --out runs/compared
  metapl COMMAND --help
  metapl --tyro-print-completion bash|zsh|fish
  metapl --version"""

# What stands in help above the command that installs them.
EXTRAS = "Stored labels, ONNX and the networks of timm need extras, by these names:"

# The fields of a dataclass that stands in another are flags without its name in front.
CONFIG = (
    tyro.conf.OmitArgPrefixes,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.DisallowNone,
    tyro.conf.HelptextFromCommentsOff,
)

# The flags that take True or False, by command; it chooses where they are left out.
TRUE_OR_FALSE = {
    "train images": ("--grey", "--mirror", "--recolor", "--warm-start"),
    "train digits": ("--warm-start",),
    "noisy-student images": ("--balance", "--grey", "--mirror", "--recolor"),
    "noisy-student digits": ("--balance",),
    "ablate images": ("--grey", "--mirror", "--recolor", "--warm-start"),
    "ablate digits": ("--warm-start",),
}

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
    try:
        try:
            # The command may be what needs a package that is not installed, or its flags.
            with printed_messages(), needed_for(shown(" ".join(["the command", *words[:1]]))):
                name, command = parsed(words)
                refuse_several_processes(name)
                check_fields(command)
                return int(command.run())
        finally:
            sys.stdout.flush()
    except SystemExit as end:
        # Help was printed.
        return int(end.code or 0)
    except KeyboardInterrupt as stopped:
        print("\nmetapl: stopped.", file=sys.stderr)
        return exit_code(stopped)
    except Exception as error:
        code = tell_error(error)
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


def tell_error(error: Exception) -> int | None:
    """Print the line of an error, and return the exit code.

    Returns: the exit code; None for an error that is a fault of metapl itself, which is not
    printed.
    """
    lacking = out_of_memory(error)
    if lacking is not None or isinstance(error, MetaplError):
        text = as_flags(str(error))
        if lacking is not None:
            text = f"the memory {lacking} does not suffice; {LESS}."
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            text = f"process {rank}: {text}"
        tell_wrong(text)
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


def parsed(words: Sequence[str]) -> tuple[str, Command]:
    """Return the name of the command that the words begin with, and its dataclass.

    Raises:
        SystemExit: tyro has printed help or completion.
        MetaplError: a word is wrong, or the recipe of ``--config`` cannot be read.
    """
    name = command_named(words)
    if name is None:
        if [*words] == ["--version"]:
            print(f"metapl {version('metapl')}")
            raise SystemExit(0)
        refuse_unknown_command(words, [*COMMANDS])
        commands = command_tree(is_complete="--tyro-print-completion" in words)
        description = f"{DESCRIPTION}\n\n{EXTRAS}\n\n  {installation('labels,onnx,timm')}"

        def run_tree(arguments: Sequence[str]) -> None:
            commands.cli(prog="metapl", description=description, args=arguments, config=CONFIG)

        read_words(run_tree, "metapl", words)
        raise SystemExit(0)
    kind = COMMANDS[name].load()
    flags = words[len(name.split()) :]
    refuse_lacking_truth(name, flags)
    program = f"metapl {name}"
    description = paragraphs(kind.__doc__ or "")

    def read(arguments: Sequence[str]) -> Command:
        default = tyro.MISSING_NONPROP
        if hasattr(kind, "default_for"):
            # Its flags, and their defaults, depend on some of them.
            default = kind.default_for(arguments)
        command: Command = tyro.cli(
            kind,
            prog=program,
            description=description,
            args=arguments,
            default=default,
            config=CONFIG,
        )
        return command

    return name, read_words(read, program, flags)


def refuse_lacking_truth(command: str, flags: Sequence[str]) -> None:
    """Refuse a flag of :data:`TRUE_OR_FALSE` that is given without one of both."""
    for word, next_word in pairwise([*flags, ""]):
        flag, equals, value = word.replace("_", "-").partition("=")
        if not equals:
            value = next_word
        if flag in TRUE_OR_FALSE.get(command, ()) and value not in ("True", "False"):
            stood_there = f" {value}" if value and not value.startswith("-") else ""
            raise MetaplError(
                f"{flag}{shown(stood_there)} was given; expected {flag} True or {flag} False."
            )


def command_named(words: Sequence[str]) -> str | None:
    """Return the command that the first two words name, or the first one alone, or None."""
    for name in (" ".join(words[:2]), *words[:1]):
        if name in COMMANDS:
            return name
    return None


def nothing() -> None:
    """Do nothing: stands in the list of commands for one that is not imported."""


def command_tree(*, is_complete: bool) -> tyro.extras.SubcommandApp:
    """Return the commands as tyro lists them, those of two words in groups.

    Args:
        is_complete: whether the commands are imported and have flags, as completion needs them.
    """
    commands = tyro.extras.SubcommandApp()
    groups: dict[str, tyro.extras.SubcommandApp] = {}
    for name, entry in COMMANDS.items():
        kind = entry.load() if is_complete else nothing
        group_name, _, name_in_group = name.rpartition(" ")
        if not group_name:
            commands.command(name=name, help=entry.summary)(kind)
            continue
        if group_name not in groups:
            groups[group_name] = tyro.extras.SubcommandApp()
            commands.command(groups[group_name], name=group_name, help=GROUPS[group_name])
        groups[group_name].command(name=name_in_group, help=entry.summary)(kind)
    return commands


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
