"""A run on disk: what was run, what it measured, and what it ended with.

recipe.json           the recipe as it ran, with versions and hardware
data.json             on which data, by their hashes
split.json            which examples are labeled, unlabeled, held out, where the recipe draws that from a data set
metrics.jsonl         a row per logged step, each with its ``phase`` and ``step``
tensorboard/<phase>/  the same for TensorBoard
checkpoints/<phase>/  whole checkpoints only
student.safetensors   the student; finetuned_student.safetensors and teacher.safetensors likewise
pictures.safetensors  the pictures of the report
report.png            curves, confusion matrix, quality of the pseudo-labels, pictures
skipped.jsonl         the files that could not be read, where there are any
result.json           the end: accuracies
"""

from __future__ import annotations

import json
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, BinaryIO

from torch import Tensor

from metapl.cores import default_threads
from metapl.errors import MetaplError
from metapl.runs.atomic import replacing
from metapl.runs.checkpoint import CheckpointFolder
from metapl.runs.environment import environment
from metapl.runs.locks import lock

FORMAT = 2
"""The layout of run folders that this version writes and reads."""

SPEED_ALONE = ("num_workers",)
"""Fields of recipes in which the parts of a run may differ: they change nothing but speed."""


WEIGHTS = {
    "student": "student.safetensors",
    "finetuned": "finetuned_student.safetensors",
    "teacher": "teacher.safetensors",
}


def weights_file(network: str) -> str:
    """The file of a network's weights in a run folder: of the student, the student finetuned or the teacher."""
    return WEIGHTS[network]


class RunFolder:
    """The files of one run.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def exists(self) -> bool:
        """Whether a run has been started here."""
        return (self.path / "recipe.json").is_file()

    def start(self, recipe: Mapping[str, Any], *, resume: bool) -> None:
        """Claim the folder for a recipe, or go on with the run in it.

        Raises:
            MetaplError: a run is here and ``resume`` is not asked for; or it is of another recipe or format; or the
                folder cannot be made.
        """
        if self.exists:
            self._check_same(recipe, resume)
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MetaplError(f"the run folder {self.path} cannot be made: {error.strerror}.") from error
        self.write_json("recipe.json", {"format": FORMAT, "recipe": dict(recipe), "made_with": environment()})

    @contextmanager
    def claimed(self, recipe: Mapping[str, Any], *, resume: bool) -> Iterator[None]:
        """:meth:`start`, and hold the folder against other processes until the block ends or the process dies.

        A new run that is refused in the block before it has begun to train leaves nothing behind.
        """
        undo = None if self.exists else _beginning(self.path)
        self.start(recipe, resume=resume)
        with (self.path / ".lock").open("w") as file:
            _close_in_forks(file)
            _lock(file, self.path)
            try:
                yield
            except MetaplError:
                if undo is not None:
                    undo()
                raise

    def refuse_another_run(self, resume: bool) -> None:
        """Stop where a run is here and ``resume`` is not asked for."""
        if self.exists and not resume:
            raise MetaplError(f"{self.path} holds a run already; give --resume to go on with it, or another --out.")

    def _check_same(self, recipe: Mapping[str, Any], resume: bool) -> None:
        self.refuse_another_run(resume)
        before, now = (_by_flag(content) for content in (self.recipe(), json.loads(json.dumps(dict(recipe)))))
        changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k) and k not in SPEED_ALONE)
        if changed:
            what = ", ".join(f"{k} was {before.get(k)!r}, now {now.get(k)!r}" for k in changed[:4])
            raise MetaplError(f"{self.path} holds a run of another recipe ({what}); resume it as it was started.")

    def threads(self) -> int:
        """Threads of the linear algebra that the run in the folder was started with; for a new one, the default.

        A resumed run, or one that is evaluated again, takes as many: rounding depends on their number.
        """
        begun = self.read_json("recipe.json").get("made_with", {}) if self.exists else {}
        return int(begun.get("threads") or default_threads())

    def recipe(self) -> dict[str, Any]:
        """The recipe of the run in the folder."""
        content = self.read_json("recipe.json")
        if content.get("format") != FORMAT:
            made = content.get("made_with", {}).get("metapl", "?")
            raise MetaplError(
                f"{self.path} was written in run format {content.get('format')!r}; this metapl {version('metapl')} "
                f"reads format {FORMAT}. Train again, or use the version that wrote it: {made}."
            )
        recipe: dict[str, Any] = content["recipe"]
        return recipe

    def read_json(self, name: str) -> dict[str, Any]:
        """One of the folder's JSON files."""
        file = self.path / name
        if not file.is_file():
            raise MetaplError(
                f"{name} is missing in {self.path}: this is not a run folder, or its run has not come so far."
            )
        try:
            content: dict[str, Any] = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise MetaplError(f"{file} cannot be read: {error}.") from error
        return content

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file whole or not at all."""
        with _written(self.path / name) as file:
            file.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())

    def checkpoints(self, phase: str, keep: int = 2) -> CheckpointFolder:
        """The checkpoints of a phase, of which the last ``keep`` stay."""
        return CheckpointFolder(self.path / "checkpoints" / phase, keep=keep)

    def write_weights(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Weights as safetensors: the same weights give the same bytes."""
        from safetensors.torch import save

        plain = {key: t.detach().cpu().contiguous().clone() for key, t in sorted(state.items())}
        with _written(self.path / name) as file:
            file.write(save(plain))

    def _how_to_get(self, name: str) -> str:
        if not (self.path / "result.json").is_file():
            return "The run has not come so far: finish it with --resume."
        left = [network for network, file in WEIGHTS.items() if (self.path / file).is_file()]
        instead = f" What is left: --network {' or '.join(left)}." if left else ""
        return f"The run was finished, so --resume does not mend it: train again with another --out.{instead}"

    def read_weights(self, name: str) -> dict[str, Tensor]:
        """The weights in a safetensors file of the folder."""
        from safetensors.torch import load_file

        file = self.path / name
        if not file.is_file():
            raise MetaplError(f"{file} is missing. {self._how_to_get(name)}")
        try:
            weights: dict[str, Tensor] = load_file(file)
        except Exception as error:  # safetensors raises its own types, and OSError
            raise MetaplError(f"{file} cannot be read: {error}.") from error
        return weights


BEFORE_TRAINING = ("recipe.json", ".lock", "data.json", "split.json", "skipped.jsonl")
"""What a run writes before its first step."""


def _beginning(path: Path) -> Callable[[], None]:
    """Note what stands where a run is about to start.

    Returns: removes what the run has made since, unless it has begun to train: then it is worth keeping.
    """
    there = {*os.listdir(path)} if path.is_dir() else set()
    made = [folder for folder in (path, *path.parents) if not folder.exists()]

    def undo() -> None:
        new = {*os.listdir(path)} - there
        if new <= {*BEFORE_TRAINING}:
            for name in new:
                (path / name).unlink()
            with suppress(OSError):  # another run is in one of them by now
                for folder in made:
                    folder.rmdir()

    return undo


@contextmanager
def _written(file: Path) -> Iterator[BinaryIO]:
    """:func:`replacing`, with the disk's refusal in words."""
    try:
        with replacing(file) as new:
            yield new
    except OSError as error:
        raise MetaplError(
            f"{file} could not be written: {error.strerror or error}; what was there before is whole. Mend that (is "
            "the disk full?), then go on with --resume."
        ) from error


def _by_flag(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What is run and how, with every field by the name that it has on the command line."""
    return {name.removeprefix("fields."): value for name, value in flat(recipe).items()}


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested values by their whole names, as on the command line.

    >>> flat({"seed": 3, "student": {"lr": 0.1}})
    {'seed': 3, 'student.lr': 0.1}
    """
    fields: dict[str, Any] = {}
    for name, value in values.items():
        whole = f"{above}{name}"
        fields |= flat(value, f"{whole}.") if isinstance(value, Mapping) else {whole: value}
    return fields


def _close_in_forks(file: IO[str]) -> None:
    """A forked process shares the lock: workers that outlive a parent that was killed would hold it."""
    held = weakref.ref(file)

    def close() -> None:
        open_file = held()
        if open_file is not None:
            open_file.close()

    if hasattr(os, "register_at_fork"):  # Windows has no forks
        os.register_at_fork(after_in_child=close)


def _lock(file: IO[str], folder: Path, patience: float = 3.0) -> None:
    """Take the lock, waiting a little for a process that is just going."""
    give_up = time.monotonic() + patience
    while True:
        try:
            lock(file, wait=False)
            return
        except OSError:
            if time.monotonic() > give_up:
                raise MetaplError(f"another process is running in {folder}; wait for it, or stop it.") from None
            time.sleep(0.1)
