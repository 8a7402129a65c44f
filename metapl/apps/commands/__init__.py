"""The ``metapl`` command."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from metapl.apps.commands.commands import CHOICES, COMMANDS, GONE, HELP, LESS_MEMORY, found, help_of, print_completion
from metapl.apps.process import drop_output, exit_code, stoppable, streams
from metapl.apps.machine.memory import out_of_memory
from metapl.apps.words import tell
from metapl.errors import MetaplError
from metapl.words import did_you_mean, shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns: the exit code: 0 done; 1 done in part, or the system refused, or nobody reads what is printed; 2 wrong
    input; 128 + n stopped by signal n.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    with streams(), stoppable(for_good=arguments is None):
        try:
            try:
                with _messages_shown():
                    return _dispatch(given)
            finally:
                sys.stdout.flush()
        except KeyboardInterrupt as stopped:
            print("\nmetapl: stopped.", file=sys.stderr)
            return exit_code(stopped)
        except Exception as error:  # what is a fault of metapl passes through
            whose = out_of_memory(error)
            if whose is not None or isinstance(error, MetaplError):
                less = LESS_MEMORY.get(" ".join(given[:1]), "close other programs, or take a machine with more")
                text = error if whose is None else f"the memory {whose} does not suffice; {less}."
                tell(f"metapl: {text}", file=sys.stderr, wrap=True)
                return 2
            if not isinstance(error, OSError):
                raise
            drop_output()  # what is still buffered must not be written again at exit
            if not isinstance(error, BrokenPipeError):  # the reader has gone, as head does
                name, reason = error.filename or "input or output", error.strerror or error
                print(f"metapl: {shown(f'{name}: {reason}')}.", file=sys.stderr)
            return 1


@contextmanager
def _messages_shown() -> Iterator[None]:
    """Show on standard error what the library logs, such as which layers pretrained weights leave fresh: each message
    once, for networks are built several times."""
    logger, messages, told = logging.getLogger("metapl"), logging.Handler(logging.INFO), set[str]()

    def emit(record: logging.LogRecord) -> None:
        text = messages.format(record)
        if text not in told:
            told.add(text)
            tell(f"metapl: {text}", file=sys.stderr, wrap=True)

    messages.emit = emit  # type: ignore[method-assign]
    before = logger.level
    logger.addHandler(messages)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(messages)
        logger.setLevel(before)


def _dispatch(given: list[str]) -> int:
    command, words = (given[0], given[1:]) if given else ("help", [])
    if command in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if command == "--version":
        from metapl import __version__

        print(f"metapl {__version__}")
        return 0
    if command == "--print-completion":
        return print_completion(words)
    if command in GONE:
        raise MetaplError(f"there is no metapl {command}: {GONE[command]}.")
    if command not in COMMANDS:
        raise _unknown("command", command, [*COMMANDS], "see metapl --help")
    from metapl.apps.commands.launch import check_alone, is_first, left_to_first
    from metapl.apps.commands.parse import flags_named, parse

    program, kind = f"metapl {command}", found(command, words)
    if isinstance(kind, dict):
        if words[:1] in (["-h"], ["--help"]):
            print(help_of(command), end="")
            return 0
        choice = words[0] if words else None
        if (gone := f"{command} {choice}") in GONE:
            raise MetaplError(f"there is no metapl {gone}: {GONE[gone]}.")
        if choice not in kind:
            _, what, example = CHOICES[command]
            raise _unknown(what, choice, [*kind], f"{program} {example}")
        kind, program, words = kind[choice], f"{program} {choice}", words[1:]
    with flags_named(words):
        try:
            kind, program = kind.given(words, program)
            chosen = parse(kind, program, words)
            if kind.alone:
                check_alone(program)
            chosen.check()
        except MetaplError:
            if is_first():
                raise
            return left_to_first()  # every process has the same flags
        code: int = chosen.run()
        return code


def _unknown(what: str, given: str | None, known: Sequence[str], example: str) -> MetaplError:
    named = f"no {what} was named" if given is None else f"there is no {what} {given!r}"
    meant = "" if given is None else did_you_mean(given, known)
    return MetaplError(f"{named}{meant or '.'} Expected one of {', '.join(known)}; {example}.")
