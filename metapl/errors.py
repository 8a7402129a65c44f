"""The errors that a user can cause."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from metapl.words import shown


class MetaplError(ValueError):
    """Base of every error that a user can cause: it says what was given, what was expected and how to mend it.

    It is raised before anything moved: weights, buffers, optimizer states, gradients, random number generators and
    files are as they were.
    """


class FieldError(MetaplError):
    """A field of a recipe that is not as expected: a command says so by the flag, for its name, value and what was
    expected are kept beside the message."""

    def __init__(self, text: str, field: str = "", value: object = None, expected: str = "") -> None:
        super().__init__(text)
        self.field, self.value, self.expected = field, value, expected


def require_extra(extra: str, need: str, *packages: str) -> None:
    """Refuse to go on without the packages of an extra; ``need`` is what the message begins with, "ONNX needs" say."""
    missing = " and ".join(name for name in packages if importlib.util.find_spec(name) is None)
    if missing:
        raise MetaplError(f"{need} {missing}: not installed; get it by: pip install 'metapl[{extra}]'")


def reason_of(error: BaseException) -> str:
    """Why something failed, in a line without its period: the system's words, or what the message begins with.

    >>> reason_of(RuntimeError("out of memory.\\nA traceback")), reason_of(KeyboardInterrupt())
    ('out of memory', 'KeyboardInterrupt')
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    first = next((line for line in map(str.strip, text.splitlines()) if line), type(error).__name__)
    return shown(f"{first:.300}".rstrip("."))


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Say where, in front of what a :class:`MetaplError` of this block says."""
    try:
        yield
    except MetaplError as error:
        raise MetaplError(f"{where}{error}") from error


CALLED: ContextVar[Mapping[str, str]] = ContextVar("called", default=MappingProxyType({}))


def called(name: str) -> str:
    """An argument, or another thing, as errors name it: by its own name, unless :func:`calling` gives it another."""
    return CALLED.get().get(name, name)


@contextmanager
def calling(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors of this block name arguments of what it calls as the caller knows them; of nested blocks, the outer
    one's names win.

    >>> with calling({"inner_optimizer": "optimizer"}):
    ...     called("inner_optimizer"), called("student")
    ('optimizer', 'student')
    """
    token = CALLED.set({**names, **CALLED.get()})
    try:
        yield
    finally:
        CALLED.reset(token)


def few(names: Iterable[object], most: int = 5, longest: int = 300) -> str:
    """The first few names, as an error gives them: each cut where it is too long, and how many there are besides.

    >>> few(["a", "b", "c", "d", "e"], 3), few([7])
    ('a, b, c and 2 more', '7')
    """
    texts = [shown(name) for name in names]
    first = [text if len(text) <= longest else f"{text[: longest - 3]}..." for text in texts[:most]]
    return ", ".join(first) + (f" and {len(texts) - most:,} more" if len(texts) > most else "")


def either(**spellings: object) -> Any:
    """The value of an argument that has two spellings, of which None is one that was not given.

    >>> either(labeled=None, outer=3)
    3
    """
    given = {name: value for name, value in spellings.items() if value is not None}
    if len(given) > 1:
        raise MetaplError(f"{'= and '.join(given)}= were both given; they are two names of one argument: expected one.")
    return next(iter(given.values()), None)
