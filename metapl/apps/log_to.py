"""``--log-to MODULE:FUNCTION``: a function of one's own gets what a run records while it trains."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from metapl.errors import MetaplError, reason_of
from metapl.words import did_you_mean, shown

Function = Callable[[int, dict[str, float]], object]

EXPECTED = "expected MODULE:FUNCTION, a function of a step and a dict of metrics"


class MetricLog:
    """A user's function that gets every recorded row of a run, over all of its phases.

    It is called as ``function(step, metrics)``. ``metrics`` are numbers by phase and name, such as
    "fit/inner_loss", and at the end "result/test_accuracy". ``step`` counts the steps of all phases
    so far, so that it never falls.

    Args:
        place: MODULE:FUNCTION, for messages.
        function: the function.
    """

    def __init__(self, place: str, function: Function) -> None:
        self.place = place
        self.function = function
        # The steps of the phases that have ended.
        self.ended_steps = 0

    @classmethod
    def read(cls, place: str) -> MetricLog:
        """Import the function that MODULE:FUNCTION names, from the working folder too.

        Raises: MetaplError for a name of another form, and where there is no such function.
        """
        module_name, colon, name = place.partition(":")
        if not (module_name and colon and name):
            raise MetaplError(f"--log-to {shown(place)}: {EXPECTED}.")
        module = imported(place, module_name)
        function: Any = getattr(module, name, None)
        if function is None:
            functions = [key for key, value in vars(module).items() if callable(value)]
            meant = did_you_mean(name, functions, likeness=0.6) or f"; {EXPECTED}."
            raise MetaplError(f"--log-to {shown(place)}: {module_name} has no {name!r}{meant}")
        if not callable(function):
            raise MetaplError(
                f"--log-to {shown(place)} is {function!r:.60}, which cannot be called; {EXPECTED}."
            )
        return cls(place, function)

    def of_phase(self, phase: str) -> Callable[[int, Mapping[str, float], Any], None]:
        """Return the callback of a fit, the rows of which are of this phase."""

        def callback(step: int, row: Mapping[str, float], trainer: Any) -> None:
            numbers = {name: value for name, value in row.items() if name != "step"}
            self._call(step, phase, numbers)

        return callback

    def end_phase(self, steps: int) -> None:
        """Count the steps of a phase that has ended, in this run or before it was resumed."""
        self.ended_steps += steps

    def end(self, result: Mapping[str, Any]) -> None:
        """Give the accuracies of ``result.json``."""
        accuracies = {}
        for name, value in result.items():
            if name.endswith("accuracy") and isinstance(value, float):
                accuracies[name] = value
        self._call(0, "result", accuracies)

    def _call(self, step: int, phase: str, numbers: Mapping[str, float]) -> None:
        """Call the function; an error of its own is told in a line, with its place."""
        step += self.ended_steps
        metrics = {f"{phase}/{name}": float(value) for name, value in numbers.items()}
        try:
            self.function(step, metrics)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise MetaplError(
                f"--log-to {shown(self.place)} failed in step {step:,}: {type(error).__name__}: "
                f"{reason_of(error)} ({Path(frame.filename).name}, line {frame.lineno}); mend it, "
                "and go on with --resume."
            ) from error


def imported(place: str, module_name: str) -> Any:
    """Return a module, looked for in the working folder first."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        raise MetaplError(
            f"--log-to {shown(place)}: {shown(module_name)} cannot be imported "
            f"({type(error).__name__}: {reason_of(error)}); {EXPECTED}, in {shown(folder)} or "
            "installed."
        ) from error
    finally:
        sys.path.remove(folder)
