"""The ``metapl`` command."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from metapl.cli.commands import COMMANDS, after_training
from metapl.cli.process import drop_output, stoppable, streams
from metapl.words import shown, tell

HELP = """\
metapl trains a classifier from a few labeled examples and many unlabeled
ones. With Meta Pseudo Labels, a teacher network makes up labels for a student
network, and learns from how well the student then does on the labeled
examples. On your own pictures the default is UDA: one network that learns its
own labels of pictures that it is sure of.

  metapl train RECIPE           train a classifier; it goes to a folder (RUN)
  metapl noisy-student RECIPE   train students on the labels of their teachers
  metapl ablate RECIPE          compare the modes: which gradient to take
  metapl plan RECIPE            memory and hours on many ranks, without any
  metapl evaluate RUN           measure it on the test set again
  metapl predict RUN FILES...   let it classify your pictures
  metapl finetune RUN           finetune it on the labeled examples again
  metapl compare RUN RUN...     put runs side by side, and test if they differ
  metapl export RUN --out DIR   write it for others: a program, weights, a card
  metapl label RUN DIR          store its class probabilities of many pictures
  metapl labels DO STORE        look at such a store (stats), or select from it
  metapl shards FOLDER          write many pictures as a few tar files

For example, with the handwritten digits that come with scikit-learn, of which
two in each class are labeled (a minute on a laptop, no graphics card):

  metapl train digits --out runs/first
  metapl predict runs/first my_digit.png another.png
  metapl train digits --compare --seeds 0-4 --out runs/compared

With pictures of your own, a few of them in one folder a class:

  metapl train images --labeled few/ --unlabeled many/ --test held_out/

With pictures some of which are in the folder of a wrong class:

  metapl train noisy --labeled sorted_badly/ --clean few/

With the paper's data, as torchvision keeps them (svhn-1k, imagenet-10pct too):

  metapl train cifar10-4k --data-root DIR

With --compare, each recipe trains the same without the teacher's feedback,
and by other methods, and says whether the feedback helped.

Each command says more with --help: metapl train digits --help.
metapl --version says which metapl this is; metapl --print-completion SHELL
completes commands and flags in bash, zsh or fish.
"""

RECIPES_HELP = """\
metapl train RECIPE, with RECIPE one of:

  digits                handwritten digits that come with scikit-learn
  images                your own pictures, in folders
  noisy                 your own pictures, some of them in the wrong folder
  torchvision           CIFAR, SVHN, ImageNet or folders as torchvision has them
  cifar10-4k            CIFAR-10 with 4,000 labels, the authors' code's settings
  cifar10-4k-paper      the same with the settings of the paper's table
  svhn-1k               SVHN with 1,000 labels, the paper's table
  imagenet-10pct        ImageNet with 128 labels a class, the authors' code's
  imagenet-10pct-paper  the same with the settings of the paper's table
  two-moons             the paper's toy experiment, for many seeds at once

Each says more with --help: metapl train digits --help.
"""

NOISY_STUDENT_HELP = """\
metapl noisy-student RECIPE trains a teacher on the labeled examples, and then
students, one after another: each learns with noise from the labels that the
network before it gives the unlabeled examples. RECIPE is one of:

{recipes}  imagenet              ImageNet and a folder of other pictures
  noisy-imagenet-b0     the same as in the paper; likewise -b1 to -b7 and -l2

  metapl noisy-student digits --rounds 3 --out DIR
  metapl noisy-student digits --networks 32x32 64x64
  metapl noisy-student digits --compare --seeds 0-4

Each says more with --help: metapl noisy-student digits --help.
"""

ABLATE_HELP = """\
metapl ablate RECIPE compares the ways to find the teacher's gradient, on the
networks and data of a recipe: how far each is from the exact gradient, and
what it costs. It ends with the mode to take. RECIPE is one of:

{recipes}
For networks of your own: metapl ablate --factory MODULE:FUNCTION.

  metapl ablate digits --steps 200 --out DIR
  metapl ablate digits --steps 200 --stability --train-steps 500

Each says more with --help: metapl ablate digits --help.
"""


PLAN_HELP = """\
metapl plan RECIPE says what a training takes on many ranks, without any of
them: the memory of a rank, operations, bytes on the wire, hours. RECIPE is one
of:

  images                your own pictures; give --classes and --network
{recipes}  imagenet-l2           two EfficientNet-L2, the paper's largest experiment
  imagenet-b6-wide      the same with EfficientNet-B6-Wide
  noisy-imagenet-b0     a student of Noisy Student; likewise -b1 to -b7 and -l2
  vit-1b                two vision transformers of 1.2 billion weights

  metapl plan imagenet-l2 --mesh.replicate 16 --mesh.shard 128
  metapl plan vit-1b --ranks 2048 --memory 80GB --flops-per-second 4e14

Each says more with --help: metapl plan digits --help.
"""

LABELS_HELP = """\
metapl labels DO STORE, with DO one of:

  stats   what is in a store that metapl label wrote: classes, confidence
  select  write a store of some of its examples: by confidence, balanced

Each says more with --help: metapl labels select --help.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns: the exit code: 0 done; 1 done in part, or the system refused; 2 wrong input; 128 + n stopped by signal n.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    with streams(), stoppable(for_good=arguments is None):
        try:
            return _run(given)
        except KeyboardInterrupt as stopped:
            number = getattr(stopped, "signal_number", signal.SIGINT)
            print("\nmetapl: stopped.", file=sys.stderr)
            return 128 + int(number)
        except BrokenPipeError:
            # The reader has gone, as head does. What is still buffered must not be written again at exit.
            drop_output()
            return 128 + signal.SIGPIPE
        except OSError as error:
            drop_output()
            print(f"metapl: {shown(_os_error(error))}.", file=sys.stderr)
            return 1


def _run(given: list[str]) -> int:
    from metapl.errors import MetaplError
    from metapl.memory import LESS, out_of_memory

    try:
        with _messages_shown():
            try:
                return _dispatch(given)
            finally:
                sys.stdout.flush()
    except MetaplError as error:
        tell(f"metapl: {error}", file=sys.stderr, wrap=True)
        return 2
    except (MemoryError, RuntimeError, OSError, ImportError) as error:
        whose = out_of_memory(error)
        if whose is None:
            raise
        tell(f"metapl: the memory {whose} does not suffice; {LESS}.", file=sys.stderr, wrap=True)
        return 2


def _os_error(error: OSError) -> str:
    return f"{error.filename or 'input or output'}: {error.strerror or error}"


class _Messages(logging.Handler):
    """What the library logs, each message once: networks are built several times."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if text not in self.shown:
            self.shown.add(text)
            tell(f"metapl: {text}", file=sys.stderr, wrap=True)


@contextmanager
def _messages_shown() -> Iterator[None]:
    """Show on standard error what the library logs, such as which layers pretrained weights leave fresh."""
    logger, messages = logging.getLogger("metapl"), _Messages()
    before = logger.level
    logger.addHandler(messages)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(messages)
        logger.setLevel(before)


def _dispatch(given: list[str]) -> int:
    from metapl.errors import MetaplError

    command, rest = (given[0], given[1:]) if given else ("help", [])
    if command in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if command == "--version":
        from metapl import __version__

        print(f"metapl {__version__}")
        return 0
    if command == "--print-completion":
        from metapl.cli.completion import print_completion

        return print_completion(rest)
    if command not in COMMANDS:
        from metapl.cli.parse import did_you_mean

        meant = did_you_mean(command, COMMANDS) or "."
        raise MetaplError(
            f"there is no command {command!r}{meant} Expected one of {', '.join(COMMANDS)}; see metapl --help."
        )
    if command == "ablate":
        return _ablate(rest)
    if command == "noisy-student":
        return _noisy_student(rest)
    if command == "plan":
        return _plan(rest)
    if command == "labels":
        return _labels(rest)
    return _train(rest) if command == "train" else _after_training(command, rest)


def _train(given: list[str]) -> int:
    from metapl.cli.idle import given_flags
    from metapl.cli.parse import did_you_mean, flags_named, parse, respelled
    from metapl.cli.train import COMMANDS as RECIPES
    from metapl.distributed.launch import is_first
    from metapl.errors import MetaplError

    if not given or given[0] not in (*RECIPES, "-h", "--help"):
        named = f"there is no recipe {given[0]!r}" if given else "no recipe was named"
        meant = (did_you_mean(given[0], list(RECIPES)) if given else "") or "."
        raise MetaplError(f"{named}{meant} Expected one of {', '.join(RECIPES)}: metapl train digits.")
    if given[0] not in RECIPES:
        print(RECIPES_HELP, end="")
        return 0
    with flags_named():
        try:
            command = parse(RECIPES[given[0]], f"metapl train {given[0]}", given[1:])
            command.check_flags(given_flags(respelled(given[1:])))
        except MetaplError:
            if is_first():
                raise
            return 2  # every process has the same flags
        return command()


def _noisy_student(given: list[str]) -> int:
    from metapl.cli.idle import given_flags
    from metapl.cli.noisy_student import COMMANDS as RECIPES
    from metapl.cli.parse import did_you_mean, flags_named, parse, respelled
    from metapl.errors import MetaplError

    if given and given[0] in ("-h", "--help"):
        print(NOISY_STUDENT_HELP.format(recipes=_lines_about(set(RECIPES))), end="")
        return 0
    if not given or given[0] not in RECIPES:
        named = f"there is no recipe {given[0]!r}" if given else "no recipe was named"
        meant = (did_you_mean(given[0], list(RECIPES)) if given else "") or "."
        raise MetaplError(f"{named}{meant} Expected one of {', '.join(RECIPES)}: metapl noisy-student digits.")
    with flags_named():
        command = parse(RECIPES[given[0]], f"metapl noisy-student {given[0]}", given[1:])
        command.check_flags(given_flags(respelled(given[1:])))
        return command()


def _ablate(given: list[str]) -> int:
    from metapl.cli.ablate import COMMANDS as RECIPES
    from metapl.cli.ablate import AblateFactory
    from metapl.cli.idle import given_flags
    from metapl.cli.parse import did_you_mean, flags_named, parse, respelled
    from metapl.errors import MetaplError

    if any(word.partition("=")[0] == "--factory" for word in given):
        return parse(AblateFactory, "metapl ablate", given)()
    if given and given[0] in ("-h", "--help"):
        print(ABLATE_HELP.format(recipes=_lines_about(RECIPES)), end="")
        return 0
    if not given or given[0] not in RECIPES:
        named = f"there is no recipe {given[0]!r}" if given else "no recipe was named"
        meant = (did_you_mean(given[0], list(RECIPES)) if given else "") or "."
        raise MetaplError(
            f"{named}{meant} Expected one of {', '.join(RECIPES)}: metapl ablate digits --steps 100; or "
            "--factory module:function, for networks of your own."
        )
    with flags_named():
        command = parse(RECIPES[given[0]], f"metapl ablate {given[0]}", given[1:])
        command.check_flags(given_flags(respelled(given[1:])))
        return command()


def _plan(given: list[str]) -> int:
    from metapl.cli.parse import did_you_mean, flags_named, parse
    from metapl.cli.plan import COMMANDS as RECIPES
    from metapl.errors import MetaplError

    if given and given[0] in ("-h", "--help"):
        print(PLAN_HELP.format(recipes=_lines_about(set(RECIPES) - {"images"})), end="")
        return 0
    if not given or given[0] not in RECIPES:
        named = f"there is no plan for {given[0]!r}" if given else "no recipe was named"
        meant = (did_you_mean(given[0], list(RECIPES)) if given else "") or "."
        raise MetaplError(f"{named}{meant} Expected one of {', '.join(RECIPES)}: metapl plan digits --mesh.shard 2.")
    with flags_named():
        return parse(RECIPES[given[0]], f"metapl plan {given[0]}", given[1:])()


def _lines_about(names: Collection[str]) -> str:
    """The lines of the help of ``metapl train`` about some recipes."""
    return "".join(line for line in RECIPES_HELP.splitlines(keepends=True) if set(line.split()[:1]) & set(names))


def _labels(given: list[str]) -> int:
    from metapl.cli.labels import COMMANDS as WAYS
    from metapl.cli.parse import did_you_mean, parse
    from metapl.errors import MetaplError

    if given and given[0] in ("-h", "--help"):
        print(LABELS_HELP, end="")
        return 0
    if not given or given[0] not in WAYS:
        named = f"metapl labels cannot {given[0]!r}" if given else "it was not said what to do with the labels"
        meant = (did_you_mean(given[0], list(WAYS)) if given else "") or "."
        raise MetaplError(f"{named}{meant} Expected one of {', '.join(WAYS)}: metapl labels stats STORE.")
    return parse(WAYS[given[0]], f"metapl labels {given[0]}", given[1:])()


def _after_training(command: str, given: list[str]) -> int:
    from metapl.cli.parse import parse

    if command == "evaluate" and any(word.partition("=")[0] == "--weights" for word in given):
        from metapl.cli.evaluate_weights import EvaluateWeights

        return parse(EvaluateWeights, "metapl evaluate", given)()
    return parse(after_training(command), f"metapl {command}", given)()
