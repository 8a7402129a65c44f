"""The help of each command: what it does, and its flags, those that are used most first.

A command is a dataclass whose fields are its flags. A flag is explained by the entry of its field
under ``Args:`` in the docstring of the dataclass that the field stands in, or by the ``help`` of
the field's annotation. tyro reads the same dataclasses when it takes a command line apart, and a
test compares the flags of the two.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tyro

# The flags that ask for help.
HELP_FLAGS = ("-h", "--help")

# A wider text is harder to read.
WIDEST = 100

# Columns of the flags and, behind them, of what is said about them. A flag that is longer stands on
# a line of its own.
FLAG_COLUMNS = 26

# A space at which no line is broken; it is printed as a space.
UNBROKEN = "\u00a0"

# What people give first, in the order in which it is shown.
MOST_USED = (
    "labeled",
    "unlabeled",
    "clean",
    "val",
    "test",
    "labels_per_class",
    "method_name",
    "networks",
    "rounds",
    "minutes",
    "backbone",
    "out",
    "resume",
    "compare",
    "steps",
    "seed",
)
MOST_USED_COUNT = 10

# The groups of the other flags of a training, in the order in which they are shown. Flags of the
# method, and of an ablation, are in groups of their own.
METHOD = "method"
ABLATION = "ablation"
GROUPS = {
    "data": ("image_size", "grey", "augment", "mirror", "recolor", "crop"),
    "network": (
        "backbone",
        "tuning",
        "lora_rank",
        "network",
        "weights",
        "hidden",
        "dropout",
        "stochastic_depth",
    ),
    METHOD: (),
    "training": (
        "steps",
        "seed",
        "labeled_batch",
        "unlabeled_batch",
        "clean_batch",
        "lr",
        "schedule",
        "warmup",
        "ema_decay",
        "finetune_steps",
        "validate_every",
        "patience",
        "device",
        "precision",
        "accumulate",
        "num_workers",
    ),
    ABLATION: (),
    "output": ("out", "resume", "recipe", "log_every", "save_every"),
    "comparison": ("compare", "seeds", "methods", "jobs"),
    "several processes": ("replicate", "shard"),
}
GROUPS_OF_PARTS = {"method": METHOD, "looking": ABLATION}

# What ends the part of a docstring that describes.
SECTION = re.compile(r"^(Args|Returns|Raises|Source):", re.MULTILINE)


@dataclass(frozen=True)
class Flag:
    """A flag of a command, or an argument that stands without a flag.

    Args:
        field: the name of its field.
        part: the field of the command that the flag is in, or its own field.
        name: what is typed, such as ``--labeled``; of an argument without a flag what stands for
            its value.
        metavar: what stands for the flag's value; empty for a switch.
        text: what it does.
        default: the default in words, such as "(default: 32)"; empty where none is shown.
        is_positional: whether it stands without a flag.
        is_required: whether it has to be given.
        hint: the annotation of its field, which says what its value may be.
        value: its value where it is not given; ``dataclasses.MISSING`` for none.
    """

    field: str
    part: str
    name: str
    metavar: str
    text: str
    default: str
    is_positional: bool
    is_required: bool
    hint: Any
    value: Any

    @property
    def choices(self) -> tuple[str, ...]:
        """Return the words that a value is one of; none where it may be anything of its type."""
        return choices_of(self.hint)

    @property
    def is_switch(self) -> bool:
        """Return whether it takes no value."""
        return not self.is_positional and not self.metavar

    @property
    def takes_several(self) -> bool:
        """Return whether it takes any number of values."""
        return self.metavar.endswith(" ...")

    @property
    def typed(self) -> str:
        """Return the flag with what stands for its value."""
        return f"{self.name} {self.metavar}".strip()

    @property
    def sentence(self) -> str:
        """Return what the flag does, with its default."""
        # The default is not broken, so that "32)" does not stand alone on a line.
        default = self.default.replace(" ", UNBROKEN)
        return f"{self.text[:1].upper()}{self.text[1:]} {default}".strip()


# ------------------------------------------------------------------------------ the flags of a type


def flags_of(kind: type, instance: Any = None) -> list[Flag]:
    """Return the flags of a command, in the order of its fields.

    Args:
        kind: its dataclass.
        instance: one whose values are the defaults; None: those of the class.
    """
    return _flags_of(kind, instance=instance, part="", prefix="")


def _flags_of(kind: type, *, instance: Any, part: str, prefix: str) -> list[Flag]:
    """Return the flags of a dataclass.

    Args:
        kind: the dataclass.
        instance: one whose values are the defaults; None: those of the class.
        part: the field of the command that has the dataclass; empty for the command itself.
        prefix: what the names of its flags begin with, such as "mesh.".
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    texts = explanations(kind)
    flags: list[Flag] = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        default = default_of(field, instance)
        metadata: Sequence[Any] = ()
        if get_origin(hint) is Annotated:
            hint, *metadata = get_args(hint)
        if tyro.conf.Suppress in metadata:
            continue
        part_of_field = part or field.name
        if dataclasses.is_dataclass(hint):
            nested: Any = hint
            nested_default = None
            if default is not dataclasses.MISSING:
                # The annotation may be a class above, such as Method.
                nested = type(default)
                nested_default = default
            # The name of a field that is Flat is empty.
            is_flat = any(getattr(entry, "name", None) == "" for entry in metadata)
            flags += _flags_of(
                nested,
                instance=nested_default,
                part=part_of_field,
                prefix=prefix if is_flat else f"{prefix}{field.name}.",
            )
            continue
        flag = _flag(field.name, hint, metadata, default=default, text=texts.get(field.name, ""))
        if prefix:
            name = f"--{prefix.replace('_', '-')}{flag.name.removeprefix('--')}"
            flag = dataclasses.replace(flag, name=name)
        flags.append(dataclasses.replace(flag, part=part_of_field))
    return flags


def _flag(field: str, hint: Any, metadata: Sequence[Any], *, default: Any, text: str) -> Flag:
    """Describe the flag of a field by its annotation, its default and the docstring's entry."""
    name = f"--{field.replace('_', '-')}"
    metavar = None
    default_text = None
    for entry in metadata:
        # What tyro.conf.arg returns.
        if getattr(entry, "name", None):
            name = f"--{entry.name}"
        metavar = getattr(entry, "metavar", None) or metavar
        text = getattr(entry, "help", None) or text
        if isinstance(getattr(entry, "help_behavior_hint", None), str):
            default_text = entry.help_behavior_hint
    is_switch = hint is bool and tyro.conf.FlagConversionOff not in metadata
    is_positional = tyro.conf.Positional in metadata
    is_required = default is dataclasses.MISSING or default is tyro.MISSING
    if is_switch and default is True:
        name = f"--no-{name.removeprefix('--')}"
    if metavar is None:
        metavar = "" if is_switch else metavar_of(hint)
    if is_required:
        default_text = "(required)"
    elif default_text is None:
        default_text = "" if is_switch or default is None else f"(default: {spelled(default)})"
    return Flag(
        field=field,
        part=field,
        name=metavar if is_positional else name,
        metavar="" if is_positional else metavar,
        text=text,
        default=default_text,
        is_positional=is_positional,
        is_required=is_required,
        # A range may stand beside the type.
        hint=Annotated[(hint, *metadata)] if metadata else hint,
        value=default,
    )


def default_of(field: dataclasses.Field[Any], instance: Any) -> Any:
    """Return the value of a field where no flag gives it; ``dataclasses.MISSING`` for none."""
    if instance is not None:
        return getattr(instance, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def metavar_of(hint: Any) -> str:
    """Return what stands for a value of a type.

    >>> metavar_of(float | None), metavar_of(tuple[int, ...]), metavar_of(bool)
    ('FLOAT', 'INT ...', 'True|False')
    """
    origin = get_origin(hint)
    if origin is Annotated:
        return metavar_of(get_args(hint)[0])
    if origin in (Union, types.UnionType):
        (kind,) = (part for part in get_args(hint) if part is not type(None))
        return metavar_of(kind)
    if origin is Literal:
        return "|".join(map(str, get_args(hint)))
    if origin is tuple:
        return f"{metavar_of(get_args(hint)[0])} ..."
    if hint is bool:
        return "True|False"
    return str(hint.__name__).upper()


def choices_of(hint: Any) -> tuple[str, ...]:
    """Return the words that a value of a type, or each of several, is one of.

    >>> choices_of(Literal["soft", "hard"] | None), choices_of(bool), choices_of(int)
    (('soft', 'hard'), ('True', 'False'), ())
    """
    origin = get_origin(hint)
    if origin is Literal:
        return tuple(map(str, get_args(hint)))
    if hint is bool:
        return ("True", "False")
    if origin is Annotated or origin is tuple:
        return choices_of(get_args(hint)[0])
    if origin in (Union, types.UnionType):
        words: list[str] = []
        for part in get_args(hint):
            words += choices_of(part)
        return tuple(words)
    return ()


def spelled(value: Any) -> str:
    """Return a default as it is typed."""
    if isinstance(value, tuple):
        return " ".join(map(spelled, value)) or "none"
    return str(value)


def explanations(kind: type) -> dict[str, str]:
    """Return what the docstrings of a class, and of those above it, say of their fields."""
    texts: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        docstring = owner.__dict__.get("__doc__")
        if docstring:
            texts |= entries_of(docstring)
    return texts


def entries_of(docstring: str) -> dict[str, str]:
    """Return the entries under ``Args:`` of a docstring, each as one line.

    >>> entries_of("Train.\\n\\nArgs:\\n    steps: number of\\n        steps.\\n    lr: rate.")
    {'steps': 'number of steps.', 'lr': 'rate.'}
    """
    _, _, block = inspect.cleandoc(docstring).partition("\nArgs:\n")
    entries: dict[str, str] = {}
    name = ""
    for line in block.splitlines():
        if line and not line.startswith(" "):
            break
        begun = re.match(r" {4}(\w+): (.*)", line)
        if begun:
            name = begun[1]
            entries[name] = begun[2]
        elif name and line.strip():
            entries[name] += f" {line.strip()}"
    return entries


def description_of(kind: type) -> list[str]:
    """Return the paragraphs of a docstring before its ``Args:``, each as one line."""
    text = inspect.cleandoc(kind.__doc__ or "")
    section = SECTION.search(text)
    if section:
        text = text[: section.start()]
    return [" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n")]


# ----------------------------------------------------------------------------------------- the page


def text_width() -> int:
    """Return the columns of a help page: those of the terminal, or 80 where there is none."""
    return max(40, min(WIDEST, shutil.get_terminal_size().columns))


def page(name: str, kind: type, methods: Mapping[str, Any]) -> str:
    """Return the help of a command.

    Args:
        name: its words, such as "train images".
        kind: its dataclass, with the method that was asked for.
        methods: the methods of ``--method`` by name; empty where there is one.
    """
    width = text_width()
    flags = flags_of(kind)
    lines = usage(name, flags, width)
    for paragraph in description_of(kind):
        lines += ["", *textwrap.wrap(paragraph, width, break_on_hyphens=False)]
    for title, members in grouped(kind, flags).items():
        lines += ["", f"{title}:"]
        for flag in members:
            lines += rows(flag.typed, flag.sentence, width)
            if flag.field == "method_name":
                lines += method_rows(methods, width)
    return "\n".join(lines)


def usage(name: str, flags: Sequence[Flag], width: int) -> list[str]:
    """Return how the command is typed, with all that it needs."""
    command = f"metapl {name}"
    return textwrap.wrap(
        f"usage: {typed_command(command, flags)}",
        width,
        subsequent_indent=" " * len(f"usage: {command} "),
        break_on_hyphens=False,
    )


def typed_command(command: str, flags: Sequence[Flag]) -> str:
    """Return a command with all that it needs.

    Args:
        command: its words, such as "metapl evaluate".
        flags: its flags.
    """
    words = [command]
    for flag in flags:
        if flag.is_positional:
            words.append(flag.typed if flag.is_required else f"[{flag.typed}]")
    words += [flag.typed for flag in flags if flag.is_required and not flag.is_positional]
    if any(not flag.is_positional and not flag.is_required for flag in flags):
        words.append("[flags]")
    return " ".join(words)


def grouped(kind: type, flags: Sequence[Flag]) -> dict[str, list[Flag]]:
    """Return the flags by the titles of their groups, without groups that are empty."""
    groups: dict[str, list[Flag]] = {"arguments": [], "flags": []}
    if "config" not in {field.name for field in dataclasses.fields(kind)}:
        for flag in flags:
            groups["arguments" if flag.is_positional else "flags"].append(flag)
        return {title: members for title, members in groups.items() if members}
    # No two flags of a command have the same field.
    ungrouped = {flag.field: flag for flag in flags}
    # The flags of an ablation stand together, though some have a name of a flag of a training.
    of_ablation = {flag.field for flag in flags if GROUPS_OF_PARTS.get(flag.part) == ABLATION}
    most_used = [field for field in MOST_USED if field in ungrouped and field not in of_ablation][
        :MOST_USED_COUNT
    ]
    groups = {"most used": [ungrouped.pop(field) for field in most_used]}
    method = getattr(kind, "method_name", None)
    # A field that two groups name goes to the first of them.
    for group, fields in GROUPS.items():
        of_part = [flag.field for flag in flags if GROUPS_OF_PARTS.get(flag.part) == group]
        members: list[Flag] = []
        for field in (*fields, *of_part):
            if field in ungrouped:
                members.append(ungrouped.pop(field))
        title = f"method {method}" if group == METHOD and method is not None else group
        groups[title] = members
    groups["other"] = [*ungrouped.values()]
    return {title: members for title, members in groups.items() if members}


def rows(name: str, text: str, width: int, indent: int = 2) -> list[str]:
    """Return a name and, beside it, what is said about it; or below it, where it is long."""
    beside = " " * (FLAG_COLUMNS + 2)
    head = f"{' ' * indent}{name}"
    is_long = len(head) > FLAG_COLUMNS
    wrapped = textwrap.wrap(
        text,
        width,
        initial_indent=beside if is_long else head.ljust(FLAG_COLUMNS + 2),
        subsequent_indent=beside,
        break_on_hyphens=False,
    )
    lines = [line.replace(UNBROKEN, " ") for line in wrapped]
    return [head, *lines] if is_long else lines


def method_rows(methods: Mapping[str, Any], width: int) -> list[str]:
    """Return a line for each method, and then one for each control."""
    lines: list[str] = []
    for name, method in methods.items():
        if not method.is_control:
            lines += rows(name, method.summary, width, indent=4)
    lines += textwrap.wrap(
        "Controls, which are trained to find out what the feedback does:",
        width,
        initial_indent="    ",
        subsequent_indent="    ",
    )
    for name, method in methods.items():
        if method.is_control:
            lines += rows(name, method.summary, width, indent=4)
    return lines


def list_of(commands: Iterable[tuple[str, type]]) -> str:
    """Return the commands, a line or two each, with what they do."""
    width = text_width()
    lines: list[str] = []
    for name, kind in commands:
        lines += rows(name, description_of(kind)[0], width)
    return "\n".join(lines)
