"""The errors that a user can cause."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from metapl.words import shown

# The name that a package has in registries, and the extra of pyproject.toml that installs it, by
# the name of its module. What the library itself needs is in no extra.
OPTIONAL_PACKAGES = {
    "PIL": ("pillow", "apps"),
    "einops": ("einops", "apps"),
    "joblib": ("joblib", "apps"),
    "matplotlib": ("matplotlib", "apps"),
    "sklearn": ("scikit-learn", "apps"),
    "tensorboard": ("tensorboard", "apps"),
    "torchvision": ("torchvision", "apps"),
    "tyro": ("tyro", "apps"),
    "pyarrow": ("pyarrow", "labels"),
    "onnx": ("onnx", "onnx"),
    "onnxruntime": ("onnxruntime", "onnx"),
    "onnxscript": ("onnxscript", "onnx"),
    "huggingface_hub": ("huggingface_hub", "timm"),
    "timm": ("timm", "timm"),
    "torchopt": ("torchopt", "torchopt"),
}


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


class MissingPackage(MetaplError, ImportError):
    """A package that is not installed, and the extra that installs it.

    It is an ``ImportError`` too, so that a program that does without the package can catch it as
    it catches the failed import of any other.

    Args:
        need: what needs the package, such as "a figure".
        module: the name that the package is imported by.

    >>> print(MissingPackage("a figure", "matplotlib"))
    a figure: expected the package matplotlib, which `pip install 'metapl[apps]'` installs.
    """

    def __init__(self, need: str, module: str) -> None:
        package, extra = OPTIONAL_PACKAGES[module]
        super().__init__(
            f"{need}: expected the package {package}, which `pip install 'metapl[{extra}]'` "
            "installs."
        )


@contextmanager
def needed_for(need: str) -> Iterator[None]:
    """Give the import of an optional package that fails in this block as :class:`MissingPackage`.

    Args:
        need: what needs the package, such as "a figure".
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module, _, _ = (error.name or "").partition(".")
        if module not in OPTIONAL_PACKAGES:
            raise
        raise MissingPackage(need, module) from error


def reason_of(error: BaseException) -> str:
    """Why something failed, in a line without its period.

    The system's words, or what the message begins with.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    first = next((line for line in map(str.strip, text.splitlines()) if line), type(error).__name__)
    return shown(f"{first:.300}".rstrip("."))


def few(names: Iterable[object], most: int = 5, longest: int = 300) -> str:
    """Return the first few names, as an error gives them.

    Each cut where it is too long, and how many there are besides.
    """
    texts = [shown(name) for name in names]
    first = [text if len(text) <= longest else f"{text[: longest - 3]}..." for text in texts[:most]]
    return ", ".join(first) + (f" and {len(texts) - most:,} more" if len(texts) > most else "")
