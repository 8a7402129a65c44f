"""The help of a command, set for a reader: what is required first, the rest in groups.

tyro groups flags by the nesting of dataclasses alone, and recipes are flat so that ``recipe.json`` and the command line
call a field alike. So its text is taken apart into flags, and these are put in groups here.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WIDTH = 80
"""Columns of text."""

WIDE = 129
"""Columns of tyro's text: enough for its longest flag, and not enough for boxes side by side."""

INDENT = 26
"""Columns that a flag and its value have before its help."""

GROUPS: dict[str, str] = {
    "data": "labeled unlabeled teacher labels labeled-labels clean val test val-fraction data data-root "
    "labels-per-class validation split seed",
    "network": "network classes weights image-size grey mean std hidden dropout teacher-dropout stochastic-depth",
    "views": "view.* changes.* pad resized-crop randaugment strong.*",
    "training": "method minutes steps wait warm-start warm-steps labeled-batch unlabeled-batch clean-batch schedule "
    "warmup clip-norm ema-decay validate-every",
    "rounds": "rounds networks allow-smaller threshold per-class balance ratio loss training unlabeled-noise "
    "noisy-teacher",
    "losses of the teacher, or of the one network": "supervised-loss label-smoothing uda-weight uda-temperature "
    "uda-threshold uda-align uda-prior uda-start uda-ramp",
    "feedback": "mode pseudo-labels lookahead feedback-weight feedback-ratio normalization baseline temperature "
    "pseudo-label-smoothing exact-every",
    "optimizers": "student.* teacher.* student-lr teacher-lr",
    "finetuning": "finetune-steps finetune-batch finetune-size frozen finetune.*",
    "comparison": "compare seeds methods controls jobs modes draws altered stability train-steps train-seeds factory",
    "output": "out json resume log-every save-every keep",
    "machine": "device precision accumulate compile channels-last num-workers threads mesh.* ranks memory "
    "flops-per-second",
}
"""Flags by group, each without its dashes and the no- of a switch; ``x.*`` are all that begin with ``x.``."""

OTHERS, REQUIRED, HELP = "options", "(required)", "--help"

FEW = 20
"""Flags that need no groups."""


@dataclass(frozen=True)
class Entry:
    """A flag, or an argument by its place, as the help has it."""

    name: str
    value: str
    help: str

    @property
    def is_flag(self) -> bool:
        return self.name.startswith("-")

    @property
    def place(self) -> tuple[str, int]:
        """Its group, and where it stands there."""
        if not self.is_flag:
            return "arguments", 0
        if REQUIRED in self.help:
            return "required", 0
        name = re.sub(r"^--|(?<=\.)no-|(?<=--)no-", "", self.name)
        for group, names in GROUPS.items():
            for number, known in enumerate(names.split()):
                if known in (name, re.sub(r"\..*", ".*", name)):
                    return group, number
        return OTHERS, 0

    def text(self) -> str:
        """Its lines."""
        name = "-h, --help" if self.name == HELP else self.name
        flag, about = f"  {name} {self.value}".rstrip(), self.help.replace(f" {REQUIRED}", "")
        indent = " " * INDENT
        if not about:
            return flag
        if len(flag) < INDENT - 1:
            return textwrap.fill(about, WIDTH, initial_indent=flag.ljust(INDENT), subsequent_indent=indent)
        if len(flag) > WIDTH:
            flag = textwrap.fill(flag.replace(",", ", "), WIDTH, subsequent_indent=" " * 6, break_on_hyphens=False)
        return f"{flag}\n{textwrap.fill(about, WIDTH, initial_indent=indent, subsequent_indent=indent)}"


def readable(text: str) -> str:
    """tyro's help, in groups."""
    head, _, _ = text.partition("╭")
    paragraphs = [textwrap.fill(line, WIDTH) for line in head.strip().splitlines()]
    groups: dict[str, list[Entry]] = {name: [] for name in ("arguments", "required", *GROUPS, OTHERS)}
    entries = sorted(entries_in(text), key=lambda entry: (entry.name == HELP, entry.place[1]))
    for entry in entries:
        group, _ = entry.place
        groups[OTHERS if group in GROUPS and len(entries) <= FEW else group].append(entry)
    blocks = [
        f"{name}:\n" + "\n".join(entry.text() for entry in members) for name, members in groups.items() if members
    ]
    return "\n".join(paragraphs) + "\n\n" + "\n\n".join(blocks)


def entries_in(text: str) -> Iterator[Entry]:
    """The flags and arguments in tyro's help, one after another."""
    for box in re.findall(r"^╭[^\n]*\n(.*?)^╰", text, re.DOTALL | re.MULTILINE):
        lines = [line[2:-1].rstrip() for line in box.splitlines()]
        rule = next((number for number, line in enumerate(lines) if line.startswith("──")), -1)
        yield from _entries(lines[rule + 1 :])


def _entries(lines: Sequence[str]) -> Iterator[Entry]:
    parts: list[tuple[str, list[str]]] = []  # (flag and value, lines of help)
    for line in lines:
        if line.startswith(" "):
            parts[-1][1].append(line.strip())
        else:
            flag, _, beside = line.partition("  ")
            parts.append((flag, [beside.strip()]))
    for flag, about in parts:
        name, _, value = flag.removeprefix("-h, ").partition(" ")
        yield Entry(name, _plain_value(value), _plain_help(name, " ".join(filter(None, about))))


def _plain_value(value: str) -> str:
    """
    >>> _plain_value("{None}|FLOAT"), _plain_value("{None,soft,hard}"), _plain_value("{[INT [INT ...]]}")
    ('FLOAT', '{soft,hard}', 'INT ...')
    """
    value = value.replace("{None}|", "").replace("{None,", "{")
    return re.sub(r"\{?\[(\w+) \[\1 \.\.\.\]\]\}?", r"\1 ...", value)


def _plain_help(name: str, text: str) -> str:
    text = re.sub(r" ?\(default: (None|False|)\)", "", text.replace("``", ""))
    if re.search(r"(--|\.)no-", name):
        text = text.replace("(default: True)", "(on by default: this turns it off)")
    return text
