"""The errors that a user can cause."""

from __future__ import annotations

from collections.abc import Iterable

from metapl.words import shown


class MetaplError(ValueError):
    """Base of every error that a user can cause: it says what was given and what was expected.

    A call that raises it has moved nothing: weights, buffers, optimizer states, gradients, random
    number generators and files are as they were. Two exceptions: a fit keeps the steps that it has
    taken; and on an accelerator, values are checked when the report is read, after the step.
    """


class FieldError(MetaplError):
    """A field that is not as expected.

    Its name, its value and what was expected are kept for a command's flag.
    """

    def __init__(
        self, text: str, field: str = "", value: object = None, expected: str = ""
    ) -> None:
        super().__init__(text)
        self.field, self.value, self.expected = field, value, expected


def reason_of(error: BaseException) -> str:
    """Why something failed, in a line without its period.

    The system's words, or what the message begins with.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    first = next((line for line in map(str.strip, text.splitlines()) if line), type(error).__name__)
    return shown(f"{first:.300}".rstrip("."))


def few(names: Iterable[object], most: int = 5, longest: int = 300) -> str:
    """The first few names, as an error gives them.

    Each cut where it is too long, and how many there are besides.
    """
    texts = [shown(name) for name in names]
    first = [text if len(text) <= longest else f"{text[: longest - 3]}..." for text in texts[:most]]
    return ", ".join(first) + (f" and {len(texts) - most:,} more" if len(texts) > most else "")
