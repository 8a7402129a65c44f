"""The ``metapl`` command: its commands by name, and its errors as a line and an exit code.

The words that name a command lead to a dataclass of :data:`COMMANDS`; tyro makes it from the flags,
``check_fields`` holds the values against its annotations, and its method ``run`` does the work and
returns the exit code.
"""

from __future__ import annotations

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
from typing import Annotated, Any, Union

import torch
import tyro

from metapl.apps.printing import exit_code, tell
from metapl.apps.settings import flag_values
from metapl.errors import FieldError, MetaplError, needed_for
from metapl.runs.fields import check_fields
from metapl.runs.terminal import END, is_heard
from metapl.words import did_you_mean, shown

# Each command is a dataclass whose fields are the flags, with a method ``run``.
COMMANDS = {
    "train images": "commands.TrainImages",
    "train digits": "commands.TrainDigits",
    "train noisy": "commands.TrainNoisy",
    "noisy-student images": "commands.RoundsOfImages",
    "noisy-student digits": "commands.RoundsOfDigits",
    "predict": "predict.Predict",
    "evaluate": "evaluate.Evaluate",
    "report": "report.Report",
    "runs": "list_runs.Runs",
    "compare": "compare_runs.Compare",
    "attribute": "attribute.Attribute",
    "export": "export.Export",
    "label": "label_commands.Label",
    "labels stats": "label_commands.Stats",
    "labels select": "label_commands.Select",
    "ablate": "ablate.AblateFactory",
    "ablate images": "ablate.AblateImages",
    "ablate digits": "ablate.AblateDigits",
}

# torchrun may start these commands in several processes.
SEVERAL = ("train images", "train digits")

HELP = """\
Train a classifier from a few labeled examples and many unlabeled ones:

  metapl train images --labeled few/ --unlabeled many/ --test held_out/
  metapl train digits --compare --seeds 0-4 --out runs/compared

Each command says more with --help.

metapl train --config runs/digits-001/recipe.json repeats a run.

metapl --print-completion SHELL completes them in bash, zsh or tcsh.

metapl --version says which version this is."""

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

    Returns: the exit code: 0 done; 1 done in part, or the system refused, or nobody reads what is
    printed; 2 wrong input; 128 + n stopped by signal n.
    """
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # Letters that the stream's encoding does not have are written as their escapes.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="surrogateescape"
                if stream.encoding.lower() == "utf-8"
                else "backslashreplace"
            )
    if arguments is None:
        # A warning is a line, without its place in the code.
        warnings.formatwarning = lambda message, *_, **__: f"metapl: {shown(message)}\n"
    logger, messages = logging.getLogger("metapl"), logging.StreamHandler()
    messages.setFormatter(logging.Formatter("metapl: %(message)s"))
    logger.addHandler(messages)
    logger.setLevel(logging.INFO)
    command: Any = None
    with stoppable(for_good=arguments is None):
        try:
            try:
                words = [*(sys.argv[1:] if arguments is None else arguments)]
                # The command may be what needs a package that is not installed, or its flags.
                with needed_for(f"metapl {shown(' '.join(words[:1]))}".strip()):
                    name, command = parsed(words)
                    count = os.environ.get("WORLD_SIZE", "1")
                    if "TORCHELASTIC_RUN_ID" in os.environ and count != "1" and name not in SEVERAL:
                        started = f"torchrun has started {count} processes of metapl {name}"
                        raise MetaplError(f"{started}, which takes one; start it without.")
                    check_fields(command)
                    return int(command.run())
            finally:
                logger.removeHandler(messages)
                sys.stdout.flush()
        except SystemExit as end:
            # tyro has printed help, or what is wrong.
            return int(end.code or 0)
        except KeyboardInterrupt as stopped:
            print("\nmetapl: stopped.", file=sys.stderr)
            return exit_code(stopped)
        except Exception as error:
            # An error that is a fault of metapl itself passes through.
            if isinstance(error, FieldError) and (
                command is None or error.field in flag_values(command)
            ):
                # The field is one of a dataclass whose fields are flags, or of a function that is
                # given them. No flag takes None.
                flag = error.field.replace("_", "-")
                expected = error.expected.removesuffix(" or None")
                error = MetaplError(f"--{flag} {error.value}: expected {expected}.")
            whose, rank = out_of_memory(error), os.environ.get("RANK", "0")
            if whose is not None or isinstance(error, MetaplError):
                text = error if whose is None else f"the memory {whose} does not suffice; {LESS}."
                tell(f"metapl: {'' if rank == '0' else f'process {rank}: '}{text}", file=sys.stderr)
                return 2
            if not isinstance(error, OSError):
                raise
            # Bytes that are still buffered would fail again at exit. The output of a test has no
            # file.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            # A broken pipe is no fault: its reader has gone, as head does.
            if not isinstance(error, BrokenPipeError):
                name, reason = error.filename or "input or output", error.strerror or error
                print(f"metapl: {shown(f'{name}: {reason}')}.", file=sys.stderr)
            return 1


def open_closed_streams() -> None:
    """Open the null device in the place of each standard stream that is closed.

    Some schedulers start a job without them, as a shell does by ``>&-``, and Python has None for
    such a stream. What would be written there is not, and a file that the command opens does not
    get the number of a standard stream, to which programs that it starts would write.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)
            is_inheritable = True
            os.set_inheritable(stream.fileno(), is_inheritable)
            setattr(sys, name, stream)


def parsed(given: Sequence[str]) -> tuple[str, Any]:
    """Return the name of the command that the words begin with, and its dataclass.

    The dataclass is made of the other words. Words that name no command end in help, or with what
    is wrong.
    """
    names = " ".join(given[:2]), *given[:1]
    name = next((name for name in names if name in COMMANDS), None)
    is_training = bool(given) and given[0] in ("train", "noisy-student")
    if is_training and any(word.partition("=")[0] == "--config" for word in given):
        return parsed_by_recipe(given)
    if name is None:
        if given[:1] == ["--version"]:
            print(f"metapl {version('metapl')}")
            raise SystemExit(0)
        group = [name for name in COMMANDS if given and name.split()[0] == given[0]]
        words = given[: 2 if group else 1]
        known = group or [*dict.fromkeys(name.split()[0] for name in COMMANDS)]
        if words and words[0] != "help" and not words[-1].startswith("-"):
            asked = " ".join(words)
            meant = did_you_mean(asked, known) or "."
            raise MetaplError(
                f"there is no command {shown(asked)!r}{meant} Expected {', '.join(known)}."
            )
        other = {"help": ["--help"], "--print-completion": ["--tyro-print-completion", *given[1:]]}
        args = other.get(given[0], [*given]) if given else ["--help"]
        return "", tyro.cli(
            every_command(), prog="metapl", description=HELP, args=args, config=CONFIG
        )
    words = words_for_tyro(given[len(name.split()) :])
    return name, tyro.cli(found(name), prog=f"metapl {name}", args=words, config=CONFIG)


def words_for_tyro(given: Sequence[str]) -> list[str]:
    """Return the words behind the name of a command as tyro reads them.

    The names behind --methods become one word, for each of them alone is taken for a method; and
    --method NAME, of several the last one, the word NAME in front of the flags.
    """
    words, method, others = [*given], list[str](), list[str]()
    if "--methods" in words:
        first = words.index("--methods") + 1
        last = next((i for i in range(first, len(words)) if words[i].startswith("--")), len(words))
        words[first:last] = [",".join(words[first:last])]
    each = iter(words)
    for word in each:
        flag, _, value = word.partition("=")
        if flag == "--method" and (value := value or next(each, "")):
            method = [value]
        else:
            others.append(word)
    return [*method, *others]


def parsed_by_recipe(given: Sequence[str]) -> tuple[str, Any]:
    """Return the name of the training command of --config FILE, and its dataclass.

    What no flag says is as in the file. What is trained on may be named before the flags, as the
    file has it, or left out.
    """
    from metapl.apps.stored_recipe import StoredRecipe, flag_value

    path, words = flag_value(given, "--config")
    assert path is not None, "the flag is among the words"
    recipe = StoredRecipe.read(Path(path))
    name = recipe.command
    if name not in COMMANDS:
        names = [name.partition(" ")[2] for name in COMMANDS if name.startswith("train ")]
        meant = did_you_mean(recipe.name, names) or "."
        raise MetaplError(
            f"{path}: no command trains on {shown(recipe.name)!r}{meant} Expected one of "
            f"{', '.join(names)}."
        )
    group, kind = name.split()
    is_named = len(words) > 1 and not words[1].startswith("-")
    if words[0] != group or (is_named and words[1] != kind):
        asked = shown(" ".join(words[: 2 if is_named else 1]))
        raise MetaplError(
            f"metapl {asked} was asked for, and {path} is the recipe of {name}; expected metapl "
            f"{name} --config {path}."
        )
    command = found(name)
    default = command.of_recipe(recipe)
    words = words_for_tyro(words[2 if is_named else 1 :])
    if words and words[0] in (command.methods.METHODS if command.methods else ()):
        # A method that is named by a flag has what the file says of the settings that it shares.
        default = default.by_method(words[0])
    repeated = tyro.cli(command, prog=f"metapl {name}", args=words, config=CONFIG, default=default)
    return name, repeated.with_seen_again()


def found(name: str) -> Any:
    module, _, kind = COMMANDS[name].rpartition(".")
    return getattr(import_module(f"metapl.apps.{module}"), kind)


def every_command() -> Any:
    """Return all commands as one type, for help, for completion, and for words that name none."""

    def either(kinds: Mapping[str, Any]) -> Any:
        summaries = {
            word: " ".join(kind.__doc__.partition("\n\n")[0].split())
            for word, kind in kinds.items()
        }
        commands = [
            Annotated[kind, tyro.conf.subcommand(word, description=summaries[word])]
            for word, kind in kinds.items()
        ]
        # `X | Y` has no form for a list that is made while the program runs.
        return Union[tuple(commands)]  # noqa: UP007

    kinds: dict[str, Any] = {}
    for name in COMMANDS:
        first, _, second = name.partition(" ")
        kinds.setdefault(first, {})[second] = found(name)
    for first, of in kinds.items():
        alone = of.pop("", None)
        kinds[first] = (
            dataclasses.make_dataclass(first.replace("-", "_"), [("of", either(of))])
            if of
            else alone
        )
        if of:
            kinds[first].__doc__ = (
                alone.__doc__ if alone else f"{', '.join(of)}: each says more with --help."
            )
    return either(kinds)


# -------------------------------------------------------------------------------- what may go wrong


class Terminated(KeyboardInterrupt):
    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number


@contextmanager
def stoppable(*, for_good: bool) -> Iterator[None]:
    """Unwind on SIGTERM and SIGHUP as on Ctrl-C, so that temporary files are removed.

    Another SIGTERM or SIGHUP that comes meanwhile is not heard. With ``for_good`` the process ends
    with the block: signals that come after it has begun to end are not heard either.
    """
    stopping = False

    def unwind(number: int, frame: Any) -> None:
        nonlocal stopping
        # Who stops a group of processes may reach one of them twice; a second Ctrl-C is meant.
        # A fit that was stopped has saved its step already, and says so when this has unwound.
        if number in END and (stopping or isinstance(sys.exc_info()[1], KeyboardInterrupt)):
            return
        stopping = True
        raise Terminated(number)

    before: dict[int, Any] = {}
    # The main thread alone may handle signals.
    if threading.current_thread() is threading.main_thread():
        before = {
            number: signal.signal(number, unwind)
            for number in filter(is_heard, (signal.SIGINT, *END))
        }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(
                number, signal.SIG_IGN if for_good and stopping else handler or signal.SIG_DFL
            )


def out_of_memory(error: BaseException | None) -> str | None:
    """Return whose memory did not suffice, if that is the error or one that it came from.

    Return None for any other error, and for a refusal that says so itself.
    """
    while error is not None and "does not suffice" not in str(error):
        if isinstance(error, torch.OutOfMemoryError):
            return "of the GPU"
        if isinstance(error, MemoryError | RuntimeError | OSError) and (
            isinstance(error, MemoryError) or TOO_LITTLE_MEMORY.search(str(error))
        ):
            return "of the GPU" if "CUDA" in str(error) else "of this machine"
        error = error.__cause__ or error.__context__
    return None
