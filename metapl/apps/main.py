"""The ``metapl`` command: its commands by name, and how what goes wrong becomes a line and an exit code."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, Union

import tyro

from metapl.apps.process import LESS, accept_all_letters, drop_output, exit_code, out_of_memory, stoppable
from metapl.apps.settings import flat
from metapl.apps.words import tell
from metapl.errors import FieldError, MetaplError
from metapl.runs.fields import check_fields
from metapl.words import did_you_mean, shown

# Where each command is: a dataclass whose fields are the flags, with a method ``run``.
COMMANDS = {
    "train images": "commands.TrainImages",
    "train digits": "commands.TrainDigits",
    "train noisy": "commands.TrainNoisy",
    "noisy-student images": "commands.RoundsOfImages",
    "noisy-student digits": "commands.RoundsOfDigits",
    "predict": "predict.Predict",
    "evaluate": "evaluate.Evaluate",
    "report": "runs.Report",
    "runs": "runs.Runs",
    "compare": "compare.Compare",
    "attribute": "attribute.Attribute",
    "export": "export.Export",
    "label": "label.Label",
    "labels stats": "label.Stats",
    "labels select": "label.Select",
    "ablate images": "ablate.AblateImages",
    "ablate digits": "ablate.AblateDigits",
    "ablate own": "ablate.AblateFactory",
}

HELP = """\
metapl trains a classifier from a few labeled examples and many unlabeled ones.

  metapl train images           on your own pictures (--method: uda, mpl, ...)
  metapl train digits           on scikit-learn's digits, in a minute
  metapl train noisy            on pictures some of which have a wrong label
  metapl noisy-student images   students on the labels of their teachers
  metapl predict RUN FILES...   let a run classify your pictures
  metapl evaluate RUN           measure it again, or on other pictures
  metapl report RUN             all there is to see of it as one web page
  metapl runs [FOLDER]          the runs below runs/: accuracy, date, state
  metapl compare RUN RUN...     put runs side by side, and test if they differ
  metapl attribute RUN          which labeled pictures help, and which harm
  metapl export RUN --out DIR   for others: a program, weights, a card
  metapl label RUN DIR          store its probabilities of many pictures
  metapl labels stats STORE     look at such a store; select: from it
  metapl ablate digits          which way to take the teacher's gradient

For example:

  metapl train images --labeled few/ --unlabeled many/ --test held_out/
  metapl train digits --compare --seeds 0-4 --out runs/compared

Each says more with --help. metapl --print-completion SHELL completes commands
and flags in bash, zsh or tcsh; metapl --version says which metapl this is.
"""

CONFIG = (
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.DisallowNone,
    tyro.conf.OmitSubcommandPrefixes,
    tyro.conf.CascadeSubcommandArgs,
)


class Messages(logging.Handler):
    """What the library logs, such as which layers pretrained weights leave fresh: each message once, for networks are
    built several times."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.told = set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        if (text := self.format(record)) not in self.told:
            self.told.add(text)
            tell(f"metapl: {text}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns: the exit code: 0 done; 1 done in part, or the system refused, or nobody reads what is printed; 2 wrong
    input; 128 + n stopped by signal n.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    accept_all_letters()
    if arguments is None:  # a warning is a line, without its place in the code
        warnings.formatwarning = lambda message, *_, **__: f"metapl: {shown(message)}\n"
    logger, messages = logging.getLogger("metapl"), Messages(logging.INFO)
    logger.addHandler(messages)
    logger.setLevel(logging.INFO)
    with stoppable(for_good=arguments is None):
        try:
            try:
                return run(given)
            finally:
                logger.removeHandler(messages)
                sys.stdout.flush()
        except SystemExit as end:  # tyro has printed help, or what is wrong
            return int(end.code or 0)
        except KeyboardInterrupt as stopped:
            print("\nmetapl: stopped.", file=sys.stderr)
            return exit_code(stopped)
        except Exception as error:  # what is a fault of metapl passes through
            whose, rank = out_of_memory(error), os.environ.get("RANK", "0")
            if whose is not None or isinstance(error, MetaplError):
                text = error if whose is None else f"the memory {whose} does not suffice; {LESS}."
                tell(f"metapl: {'' if rank == '0' else f'process {rank}: '}{text}", file=sys.stderr)
                return 2
            if not isinstance(error, OSError):
                raise
            drop_output()  # what is still buffered must not be written again at exit
            if not isinstance(error, BrokenPipeError):  # the reader has gone, as head does
                name, reason = error.filename or "input or output", error.strerror or error
                print(f"metapl: {shown(f'{name}: {reason}')}.", file=sys.stderr)
            return 1


def run(given: list[str]) -> int:
    """Print what is asked for, or run the command that the words name."""
    first = given[0] if given else "help"
    if first in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if first == "--version":
        from metapl import __version__

        print(f"metapl {__version__}")
        return 0
    if first == "--print-completion":
        # The flags of all commands and methods, in the shell's own language.
        kinds = [Annotated[found(name), tyro.conf.subcommand(name.replace(" ", "-"))] for name in COMMANDS]
        every: Any = Union[tuple(kinds)]  # noqa: UP007  # made from a list
        tyro.cli(every, prog="metapl", args=["--tyro-print-completion", *given[1:2]], config=CONFIG)
    name, words = _named(given)
    count = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ and count != "1" and name not in ("train images", "train digits"):
        raise MetaplError(
            f"torchrun has started {count} processes of metapl {name}, which takes one; start it without."
        )
    command: Any = None
    try:
        command = tyro.cli(found(name), prog=f"metapl {name}", args=_method_first(words), config=CONFIG)
        check_fields(command)
        code: int = command.run()
    except FieldError as error:  # of a dataclass whose fields are flags, or of a function that is given them
        if command is not None and error.field not in flat(command):
            raise
        flag, expected = error.field.replace("_", "-"), error.expected.removesuffix(" or None")  # no flag takes it
        raise MetaplError(f"--{flag} {error.value}: expected {expected}.") from error
    return code


def _named(given: list[str]) -> tuple[str, list[str]]:
    """The command by its name, of one word or of two, and the other words."""
    two = " ".join(given[:2])
    for name in (two, given[0]):
        if name in COMMANDS:
            return name, given[len(name.split()) :]
    if given[0] == "ablate" and any(word.partition("=")[0] == "--factory" for word in given):
        return "ablate own", given[1:]
    ends = [name.split()[1] for name in COMMANDS if name.startswith(f"{given[0]} ")]
    if ends and given[1:2] in ([], ["-h"], ["--help"]):
        print(f"metapl {given[0]} {'|'.join(ends)} ...; each says more with --help: metapl {given[0]} {ends[0]} --help")
        raise SystemExit(0 if given[1:] else 2)
    known, word = (ends, given[1]) if ends else ([*dict.fromkeys(each.split()[0] for each in COMMANDS)], given[0])
    meant = did_you_mean(word, known) or "."
    named = two if ends else word
    raise MetaplError(f"there is no metapl {named}{meant} Expected one of {', '.join(known)}.")


def _method_first(words: list[str]) -> list[str]:
    """``--method NAME`` as the word NAME, which a command that trains takes before its flags; and the names behind
    ``--methods`` as one word, for each of them alone would be taken for that."""
    if "--methods" in words:
        first = words.index("--methods") + 1
        last = next((i for i in range(first, len(words)) if words[i].startswith("--")), len(words))
        words = [*words[:first], ",".join(words[first:last]), *words[last:]]
    each, method, others = iter(words), list[str](), list[str]()
    for word in each:
        flag, _, name = word.partition("=")
        if flag == "--method" and (name := name or next(each, "")):
            method = [name]  # the last one, as of other flags
        else:
            others.append(word)
    return [*method, *others]


def found(name: str) -> Any:
    module, _, kind = COMMANDS[name].rpartition(".")
    return getattr(import_module(f"metapl.apps.{module}"), kind)
