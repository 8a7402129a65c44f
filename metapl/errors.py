"""The errors that a user can cause."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import urllib.parse
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
    "accelerate": ("accelerate", "transformers"),
    "transformers": ("transformers", "transformers"),
}


# What stands between a warning and the line that led to it: this package, PyTorch, whose modules
# call hooks, and the functions of contexts.
BETWEEN = ("metapl", "torch", "contextlib")


def warn(text: str, kind: type[Warning] = UserWarning) -> None:
    """Warn at the line, outside of this package, that led here."""
    frame = sys._getframe(1)
    level = 2
    # A program that exec() runs may have no name.
    while frame.f_back is not None and (
        frame.f_globals.get("__name__", "").split(".")[0] in BETWEEN
    ):
        frame = frame.f_back
        level += 1
    warnings.warn(text, kind, stacklevel=level)


class MetaplError(ValueError):
    """Base of every error that a user can cause: it says what was given and what was expected.

    A call that raises it has moved nothing: weights, buffers, optimizer states, gradients, random
    number generators and files are as they were. Two exceptions: a fit keeps the steps that it has
    taken; and on an accelerator, values are checked when the report is read, after the step.
    """


class MissingPackage(MetaplError, ImportError):
    """A package that is not installed, and the extra that installs it.

    It is an ``ImportError`` too, so that a program that does without the package can catch it as
    it catches the failed import of any other.

    Args:
        need: what needs the package, such as "a figure".
        module: the name that the package is imported by.

    >>> print(MissingPackage("a figure", "matplotlib"))  # doctest: +ELLIPSIS
    a figure: expected the package matplotlib, which `pip install '...[apps]'` installs.
    """

    def __init__(self, need: str, module: str) -> None:
        package, extra = OPTIONAL_PACKAGES[module]
        super().__init__(
            f"{need}: expected the package {package}, which `{installation(extra)}` installs."
        )
        self.module = module


def installation(extra: str) -> str:
    """Return the command that installs an extra, which names no index, for metapl is on none."""
    return f"pip install '{origin()}[{extra}]'"


def origin() -> str:
    """Return what metapl was installed from: a checkout or a wheel file that is there still.

    pip notes it (PEP 610). A made-up path stands for what nothing is known of.
    """
    try:
        note = importlib.metadata.distribution("metapl").read_text("direct_url.json")
        address = urllib.parse.urlparse(json.loads(note or "{}")["url"])
    except (importlib.metadata.PackageNotFoundError, KeyError, ValueError, OSError):
        return "/path/to/metapl"
    path = Path(urllib.parse.unquote(address.path))
    return str(path) if address.scheme == "file" and path.exists() else "/path/to/metapl"


@contextmanager
def needed_for(need: str) -> Iterator[None]:
    """Give the import of an optional package that fails in this block as :class:`MissingPackage`.

    Args:
        need: what needs the package, such as "a figure". Of blocks within one another the outer one
            says it: what was asked for, and not what that imports.
    """
    try:
        yield
    except MissingPackage as error:
        raise MissingPackage(need, error.module) from error
    except ModuleNotFoundError as error:
        module, _, _ = (error.name or "").partition(".")
        if module not in OPTIONAL_PACKAGES:
            raise
        raise MissingPackage(need, module) from error


def require_packages(need: str, *modules: str) -> None:
    """Refuse to go on without these optional packages, before anything has been done."""
    for module in modules:
        try:
            # A package may be there, and lack a library of its own.
            importlib.import_module(module)
        except ImportError as error:
            raise MissingPackage(need, module) from error


def reason_of(error: BaseException) -> str:
    """Return why something failed, in a line without its period.

    These are the system's words, or the first line of the message that is not empty.
    """
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror
    lines = [line.strip() for line in message.splitlines()]
    first_line = next((line for line in lines if line), type(error).__name__)
    return shown(f"{first_line:.300}".rstrip("."))


def few(names: Iterable[object], most: int = 5, longest: int = 300) -> str:
    """Return the first few names, as an error gives them, and how many more there are.

    A name that is too long is cut.
    """
    texts = [shown(name) for name in names]
    listed = []
    for text in texts[:most]:
        listed.append(text if len(text) <= longest else f"{text[: longest - 3]}...")
    enumeration = ", ".join(listed)
    if len(texts) > most:
        enumeration += f" and {len(texts) - most:,} more"
    return enumeration
