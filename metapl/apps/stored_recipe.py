"""The recipe that a run left, as the settings of a new run: ``metapl train ... --config FILE``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from metapl.apps.images import Pictures
from metapl.apps.methods.base import Method, TrainingConfig
from metapl.apps.settings import with_flags
from metapl.errors import MetaplError, few
from metapl.machine import environment
from metapl.run_folder import FORMAT, RunFolder
from metapl.runs.fields import unmet
from metapl.runs.files import read_json
from metapl.words import did_you_mean, shown

# Settings without a flag that are chosen by looking at the pictures, and again at other pictures.
SEEN = ("mean", "std", "uda_prior")

# What the rounding of a run depends on beside its threads, by the names of made_with.
ROUNDING = ("metapl", "torch", "torchvision", "processor", "gpu")

T = TypeVar("T")
Config = TypeVar("Config", bound=TrainingConfig)


@dataclass(frozen=True)
class StoredRecipe:
    """The recipe in a file that a run wrote, perhaps edited since.

    Args:
        path: the file, in the layout of recipe.json.
        name: what was trained on, such as "digits".
        method: the name of the method.
        fields: the settings of both by the names of their flags.
        made_with: versions and hardware of the run.
    """

    path: Path
    name: str
    method: str
    fields: Mapping[str, Any]
    made_with: Mapping[str, Any]

    @classmethod
    def of_run(cls, path: Path) -> StoredRecipe | None:
        """Read the recipe of a run that is resumed; None where there is no run in the folder."""
        folder = RunFolder(path)
        if not folder.exists:
            return None
        # A damaged one is refused.
        folder.description()
        return cls.read(path / "recipe.json")

    @classmethod
    def read(cls, path: Path) -> StoredRecipe:
        """Read a file; refuse one that is no recipe of a run, or of another version.

        Its SHA-256 is not looked at, for a copy may be edited.
        """
        if path.is_dir():
            raise MetaplError(
                f"--config {path} is a folder; expected the recipe.json of a run, such as "
                f"{path / 'recipe.json'}."
            )
        content = read_json(path, mend="Expected the recipe.json of a run.")
        # Another version may have other keys, so its number is looked at first.
        if content.get("format", FORMAT) != FORMAT:
            raise MetaplError(
                f"{path} was written in run format {content['format']!r}; this metapl "
                f"{version('metapl')} reads format {FORMAT}. Expected a recipe of this version: "
                "train again by flags."
            )
        try:
            recipe = content["recipe"]
            return cls(
                path=path,
                name=str(recipe["name"]),
                method=str(recipe["method"]),
                fields=dict(recipe["fields"]),
                made_with=dict(content["made_with"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise MetaplError(
                f"{path} is not as a run writes it; expected the recipe.json of a run."
            ) from error

    def refuse_other_steps(self, steps: str | None) -> None:
        """Refuse another number of steps than that of the run that is gone on with.

        What follows from that number, such as the warm-up, would not fit either.
        """
        stored = self.fields.get("steps")
        if steps is not None and steps.isdecimal() and int(steps) != stored:
            raise MetaplError(
                f"the run in {self.path.parent} takes {stored:,} steps, and --steps {steps} was "
                "given; leave it out to go on, or begin another run with another --out."
            )

    @property
    def threads(self) -> int | None:
        """Return the threads of the run's linear algebra, on whose number rounding depends."""
        threads = self.made_with.get("threads")
        return threads if isinstance(threads, int) and threads >= 1 else None

    def settings(
        self, config_kind: type[Config], methods: Mapping[str, Method]
    ) -> tuple[Config, Method]:
        """Return what is trained on, and the method, with the settings of the file.

        Args:
            config_kind: what is trained on, such as :class:`metapl.apps.digits.Digits`.
            methods: the methods that it can be trained by, by their names.

        Raises: MetaplError for a recipe of another training, and for a setting that is missing,
            unknown, or not as its flag expects.
        """
        if self.name != config_kind.name:
            raise MetaplError(
                f"{self.path} is the recipe of a training on {shown(self.name)}; expected one on "
                f"{config_kind.name}."
            )
        if self.method not in methods:
            meant = did_you_mean(self.method, [*methods]) or "."
            raise MetaplError(
                f"{self.path}: there is no method {shown(self.method)!r} of {self.name}{meant} "
                f"Expected one of {', '.join(methods)}."
            )
        method_kind = type(methods[self.method])
        names = (*setting_names(config_kind), *setting_names(method_kind))
        self._refuse_other_settings(names)
        try:
            config = self._built(config_kind)
            method = self._built(method_kind)
        except MetaplError as error:
            raise MetaplError(f"{self.path}: {error}") from error
        if method.name != self.method:
            raise MetaplError(
                f"{self.path}: its method is {self.method!r}, and its settings are those of "
                f"{method.name!r}; expected both of one method."
            )
        if self.fields.get("backbone", "none") != "none":
            # It brings its own weights.
            config = with_flags(config, weights=None, weights_sha256=None)
        return config, method

    def _built(self, kind: type[T]) -> T:
        """Return a dataclass of settings, and those in it, with the values of the file."""
        classes = get_type_hints(kind)
        hints = get_type_hints(kind, include_extras=True)
        values: dict[str, Any] = {}
        untyped: Any = kind
        for field in dataclasses.fields(untyped):
            if dataclasses.is_dataclass(classes[field.name]):
                values[field.name] = self._built(classes[field.name])
                continue
            value = self.fields[field.name]
            if isinstance(value, list):
                # JSON has no tuples.
                value = tuple(value)
            expected = unmet(value, hints[field.name])
            if expected:
                raise MetaplError(f"{field.name} {value!r}: expected {expected}.")
            values[field.name] = value
        return kind(**values)

    def _refuse_other_settings(self, names: Sequence[str]) -> None:
        """Refuse fields that are not the settings of these names, each of them once."""
        missing = [name for name in names if name not in self.fields]
        unknown = [name for name in self.fields if name not in names]
        if unknown:
            meant = did_you_mean(unknown[0], missing or names)
            expected = meant or f"; expected {few(names, 100)}."
            raise MetaplError(f"{self.path}: there is no setting {shown(unknown[0])!r}{expected}")
        if missing:
            raise MetaplError(
                f"{self.path} has no setting {few(missing)}; expected all of them, as a run writes "
                "them."
            )

    def with_seen_again(self, config: Config, method: Method) -> tuple[Config, Method]:
        """Return settings that are chosen by looking at pictures as open ones, of other folders.

        An open setting is None. Each of the two has some of them, and :func:`with_flags` passes
        over the others.
        """
        if all(getattr(config, place) == self.fields[place] for place in config.places):
            return config, method
        reopened = dict.fromkeys(SEEN)
        return with_flags(config, **reopened), with_flags(method, **reopened)

    def check_weights(self, pictures: Pictures) -> None:
        """Refuse other pretrained weights than those of the run, under the same name."""
        is_same_backbone = pictures.backbone == self.fields["backbone"]
        # A backbone brings weights of its own, whatever is named beside it.
        is_named_alike = pictures.backbone != "none" or pictures.weights == self.fields["weights"]
        sha256 = self.fields["weights_sha256"]
        if is_same_backbone and is_named_alike and pictures.weights_sha256 != sha256:
            raise MetaplError(
                f"{self.path}: the weights that the run began with, {self.fields['weights']}, are "
                "another file now; put them back, or name others by --weights or --backbone."
            )

    def note(self) -> str:
        """Return why a run by this recipe may end with other bits, or nothing."""
        here = environment()
        differences = []
        for name in ROUNDING:
            if name in self.made_with and self.made_with[name] != here[name]:
                differences.append(f"{name} {self.made_with[name]}, here {here[name]}")
        if not differences:
            return ""
        return (
            f"{self.path} was made with {'; '.join(differences)}: the weights may be rounded "
            "otherwise"
        )


def setting_names(kind: Any) -> tuple[str, ...]:
    """Return the names of all settings of a dataclass and of those in it."""
    classes = get_type_hints(kind)
    names: list[str] = []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(classes[field.name]):
            names += setting_names(classes[field.name])
        else:
            names.append(field.name)
    return tuple(names)
