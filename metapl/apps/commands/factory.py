"""Networks of a user's own: what a function of theirs, named as module:function, returns."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from metapl.errors import MetaplError
from metapl.words import did_you_mean


def made_by(name: str) -> Any:
    """What ``module:function`` returns; the module may lie in the current folder.

    Raises:
        MetaplError: in a line: there is no such module or function, or it failed, with the place in the user's file.
    """
    module, function = _parts(name)
    with _current_folder_first():
        try:
            imported = importlib.import_module(module)
            build = getattr(imported, function, None)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise MetaplError(f"--factory {name}: importing {module} failed: {_told(error)}.") from error
            raise MetaplError(
                f"--factory {name}: {error}; expected a module in this folder, or an installed one."
            ) from error
        except (Exception, SystemExit) as error:
            raise MetaplError(f"--factory {name}: importing {module} failed: {_told(error)}.") from error
        if not callable(build):
            own = [n for n, value in vars(imported).items() if inspect.isfunction(value)]
            meant = did_you_mean(function, own) or "."
            raise MetaplError(f"--factory {name}: the module {module} has no function {function}{meant}")
        _refuse_arguments(build, name)
        try:
            return build()
        except MetaplError:
            raise
        except (Exception, SystemExit) as error:
            raise MetaplError(f"--factory {name}: {function} failed: {_told(error)}.") from error


def _parts(name: str) -> tuple[str, str]:
    module, _, function = name.partition(":")
    path = module.removesuffix(".py").replace("\\", "/").rstrip("/")
    if module.endswith(".py") or "/" in module:
        folder, _, stem = path.rpartition("/")
        where = f", called in the folder {folder}" if folder not in ("", ".") else ""
        instead = f"{stem}:{function or 'build'}{where}"
        raise MetaplError(f"--factory {name}: {module} is a file; expected module:function, such as {instead}.")
    if not all(part.isidentifier() for part in module.split(".")) or not function.isidentifier():
        raise MetaplError(f"--factory {name}: expected module:function, such as my_networks:build.")
    return module, function


def _refuse_arguments(build: Any, name: str) -> None:
    try:
        inspect.signature(build).bind()
    except TypeError as error:
        raise MetaplError(
            f"--factory {name}: {error}; expected a function that can be called without arguments."
        ) from error
    except ValueError:  # a builtin without a signature
        return


def _told(error: BaseException) -> str:
    """An error in a line, with the file and line where it was raised."""
    text = str(error).strip().partition("\n")[0].rstrip(".")
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {text}"
    frames = traceback.extract_tb(error.__traceback__)
    # The innermost line of the user's own says more than one inside a library.
    own = [frame for frame in frames if frame.filename.startswith(os.getcwd() + os.sep)] or frames
    where = f" ({os.path.relpath(own[-1].filename)}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}{f': {text}' if text else ''}{where}"


@contextmanager
def _current_folder_first() -> Iterator[None]:
    """Its modules can be imported, by the function too."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
