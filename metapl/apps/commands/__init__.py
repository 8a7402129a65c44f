"""The ``metapl`` command."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from metapl.apps.commands.commands import CHOICES, COMMANDS, GONE, HELP, command_class, help_of, kinds, less_memory
from metapl.apps.commands.process import drop_output, exit_code, stoppable, streams
from metapl.words import shown, tell


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns: the exit code: 0 done; 1 done in part, or the system refused, or nobody reads what is printed; 2 wrong
    input; 128 + n stopped by signal n.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    with streams(), stoppable(for_good=arguments is None):
        try:
            return _run(given)
        except KeyboardInterrupt as stopped:
            print("\nmetapl: stopped.", file=sys.stderr)
            return exit_code(stopped)
        except BrokenPipeError:
            # The reader has gone, as head does. What is still buffered must not be written again at exit.
            drop_output()
            return 1
        except OSError as error:
            drop_output()
            print(f"metapl: {shown(_os_error(error))}.", file=sys.stderr)
            return 1


def _run(given: list[str]) -> int:
    from metapl.errors import MetaplError
    from metapl.runs.memory import out_of_memory

    try:
        with _messages_shown():
            try:
                return _dispatch(given)
            finally:
                sys.stdout.flush()
    except Exception as error:
        whose = out_of_memory(error)
        if whose is None and not isinstance(error, MetaplError):
            raise
        text = error if whose is None else f"the memory {whose} does not suffice; {less_memory(given)}."
        tell(f"metapl: {text}", file=sys.stderr, wrap=True)
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
        from metapl.apps.commands.completion import print_completion

        return print_completion(rest)
    if command not in COMMANDS:
        from metapl.apps.commands.parse import did_you_mean

        meant = did_you_mean(command, COMMANDS) or "."
        raise MetaplError(
            f"there is no command {command!r}{meant} Expected one of {', '.join(COMMANDS)}; see metapl --help."
        )
    from metapl.apps.commands.parse import parse

    kind = command_class(command, rest)
    return _chosen(command, rest) if kind is None else parse(kind, f"metapl {command}", rest)()


def _chosen(command: str, given: list[str]) -> int:
    """A command whose first word says which recipe, or what to do."""
    from metapl.apps.commands.parse import did_you_mean, flags_named, parse, respelled
    from metapl.errors import MetaplError

    choice, known = CHOICES[command], kinds(command)
    if given and given[0] in ("-h", "--help"):
        print(help_of(command), end="")
        return 0
    if (gone := " ".join([command, *given[:1]])) in GONE:
        raise MetaplError(f"there is no metapl {gone}: {GONE[gone]}.")
    if not given or given[0] not in known:
        named = choice.unknown.format(repr(given[0])) if given else choice.nothing
        meant = (did_you_mean(given[0], list(known)) if given else "") or "."
        raise MetaplError(f"{named}{meant} Expected one of {', '.join(known)}: metapl {command} {choice.example}.")
    words = respelled(given[1:])
    with flags_named(words):
        try:
            kind, program = known[given[0]], f"metapl {command} {given[0]}"
            flags = kind.given(words, program) if hasattr(kind, "given") else kind
            chosen = parse(flags, getattr(flags, "program", program), words)
            if hasattr(chosen, "made"):
                chosen = chosen.made()
        except MetaplError:
            from metapl.distributed.launch import is_first, left_to_first

            if is_first():
                raise
            return left_to_first()  # every process has the same flags
        code: int = chosen()
        return code
