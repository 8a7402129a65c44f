"""What a fit is made of, as plain values, and whether a checkpoint is of one that was made alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError, reason_of
from metapl.execution.layout import reshard
from metapl.moved import named_now
from metapl.runs.checkpoint import CheckpointError
from metapl.runs.fields import AtLeastZero, misfit_entries
from metapl.runs.fingerprints import as_values, network_record, unwrapped
from metapl.training.contract import Stepwise
from metapl.training.options import Rates

PARTS = (
    "student_optimizer", "teacher_optimizer", "trainer", "networks", "dtype", "labeled", "unlabeled", "validation",
)  # fmt: skip
"""What ``allow_changes`` may name."""

OF_SPEED = ("params", "lr", "foreach", "fused", "capturable", "differentiable", "initial_lr")
"""Settings of an optimizer that do not decide where it goes; its learning rate is compared as the schedule found it."""

OPTIONAL = ("fingerprint", "parameters", "settings")
"""Words in the names of facts that a side may lack: what is not known, or was not kept by earlier versions."""

BEST = {"accuracy": float | None, "step": int, "weights": dict[str, Any]}
STATE: dict[str, Any] = {
    "step": AtLeastZero, "options": dict[str, Any], "seen": dict[str, float], "made_of": dict[str, Any],
    "best": dict[str, Any], "ended": tuple[int, str] | None,
}  # fmt: skip
"""What the state of a fit has to say, with types; tensors stand in other entries."""

VERSIONS = {"torch": str(torch.__version__)}
"""What may round otherwise."""


def made_of(trainer: Stepwise, rates: Rates) -> dict[str, Any]:
    """The optimizers, the trainer's own settings, the networks and the types of their weights."""
    networks = {role: net for role, net in {"student": trainer.student, "teacher": trainer.teacher}.items() if net}
    for network in networks.values():
        reshard(network)  # else it holds other tensors than the optimizer
    dtypes = {role: {str(p.dtype).removeprefix("torch.") for p in net.parameters()} for role, net in networks.items()}
    content: dict[str, Any] = {
        "trainer": trainer.settings(),
        "dtype": {role: ", ".join(sorted(kinds)) for role, kinds in dtypes.items()},
        "networks": {**VERSIONS, **{role: network_record(network) for role, network in networks.items()}},
    }
    names = {id(p): unwrapped(name) for network in networks.values() for name, p in network.named_parameters()}
    for name, optimizer in rates.optimizers.items():
        groups = [
            {
                "lr": as_values(lr),
                **{key: as_values(value) for key, value in group.items() if key not in OF_SPEED},
                "parameters": [names.get(id(p), "") for p in group["params"]],
            }
            for group, lr in zip(optimizer.param_groups, rates.base[name], strict=False)
        ]
        of_groups = groups[0] if len(groups) == 1 else {str(number): group for number, group in enumerate(groups)}
        content[f"{name.removesuffix('_lr')}_optimizer"] = {"type": type(optimizer).__name__, **of_groups}
    return content


def data_of(sources: Mapping[str, Any]) -> dict[str, Any]:
    """The batches and the validation data."""
    from metapl.data.identity import source_record  # needed for fitting only

    return {name: source_record(source) for name, source in sources.items() if source is not None}


def refuse_changes(file: Path, before: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Stop where a run was made otherwise; what is not known of one of them is not compared.

    Args:
        file: the checkpoint.
        before, now: what :func:`made_of` and :func:`data_of` gave.
        allowed: parts that may differ.
    """
    changed: list[str] = []
    parts = [part for part in PARTS if before and part not in allowed]  # a checkpoint of an earlier version has none
    for part in parts:
        had, has = before.get(part), now.get(part)
        if part == "validation" and (had is None) != (has is None):
            changed.append(f"{part} was {'not ' * (had is None)}given, now it is the other way round")
        if not isinstance(had, Mapping) or not isinstance(has, Mapping):
            continue
        if part == "networks":
            pairs, shown = _of_networks(had, has), _layer
        else:
            had, has = _flat(had), _flat(has)
            pairs, shown = {name: (named_now(had.get(name)), has.get(name)) for name in {**had, **has}}, _short
        for name, (was, is_now) in sorted(pairs.items()):
            if was != is_now and not (None in (was, is_now) and {*OPTIONAL} & {*name.split(".")}):
                changed.append(f"{part}.{name} was {shown(was, is_now)}, now {shown(is_now, was)}")
    if changed:
        more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
        named = [part for part in parts if any(change.startswith((f"{part}.", f"{part} ")) for change in changed)]
        raise MetaplError(
            f"{file} is of a run that was made otherwise ({', '.join(changed[:6])}{more}); resume it as it was "
            f"started, or say that this may change: allow_changes={named!r}."
        )


def _of_networks(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What the layers of both say of themselves, and whether their parameters are learned, then and now."""
    pairs: dict[str, tuple[Any, Any]] = {}
    # What a module says of itself depends on torch's version, its type hardly ever does.
    told = None if before.get("torch") == now.get("torch") else 1
    for role in [role for role in ("student", "teacher") if role in before and role in now]:
        had, has = (network[role]["modules"] for network in (before, now))
        for name in {**had, **has}:
            was, is_now = (of.get(name, ["nothing"])[:told] for of in (had, has))
            if was and is_now:  # of what stands in for another module, for the sake of a layout, nothing is known
                pairs[f"{role}.{name}" if name else role] = was, is_now
        had, has = (network[role]["frozen"] for network in (before, now))
        words = {True: ["frozen"], False: ["learned"]}
        pairs |= {f"{role}.{name}": (words[name in had], words[name in has]) for name in (*had, *has)}
    return pairs


def _layer(value: Any, other: Any) -> str:
    """A layer as it shows itself; beside another of its type, what they do not have in common."""
    kind, *says = value
    says = [text for text in says if text not in other] if other[0] == kind else says[:1]
    return f"{kind}({', '.join(says):.200})" if len(value) > 1 else kind


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return found


def _short(value: Any, other: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def check_allowed(allowed: Sequence[str]) -> tuple[str, ...]:
    """Names of parts, or a refusal."""
    if isinstance(allowed, str) or not {*PARTS} >= {*allowed}:
        raise MetaplError(f"allow_changes={allowed!r}: expected a list of some of {', '.join(PARTS)}.")
    return tuple(allowed)


def check_state(file: Path, state: Mapping[str, Any], student: nn.Module, steps: int) -> None:
    """Refuse a state that no fit of this student and of so many steps wrote: an entry is missing or of another kind, or
    more steps are done than the fit has."""
    missing = [name for name in ("step", "options", "trainer", "seen", "best", "feeds", "rng") if name not in state]
    fault = f"it has no {missing[0]}" if missing else misfit_entries(state, STATE, "its state")
    fault = fault or misfit_entries(best := state["best"], BEST, "its best student")
    if fault is None and best.keys() != BEST.keys():
        fault = f"its best student says {', '.join(map(str, best))}"
    elif fault is None and best["weights"]:
        shapes, kept = (
            {name: value.shape for name, value in of.items() if isinstance(value, Tensor)}
            for of in (student.state_dict(), best["weights"])
        )
        fault = None if kept == shapes else "its best student is of another network"
    if fault is not None:
        raise CheckpointError(
            f"{file} is whole, but no fit wrote it so: {fault}; go back to an older checkpoint by moving it away."
        )
    if state["step"] > steps:
        raise MetaplError(f"{file} is of a run that has done {state['step']} steps, and steps={steps}; expected more.")


@contextmanager
def going_on_from(file: object) -> Iterator[None]:
    """Name the file where something cannot go on from what it holds."""
    try:
        yield
    except MetaplError as error:
        if str(error).startswith(str(file)):
            raise
        raise MetaplError(f"{file}: {error}") from error
    except Exception as error:
        raise MetaplError(
            f"{file} is whole, but this trainer cannot go on with it ({type(error).__name__}: "
            f"{reason_of(error):.200}); build networks and optimizers as they were built before."
        ) from error


def version_note(before: Any) -> str | None:
    """What to say where a run was begun with another torch; None where it was not, or is not known."""
    then = before.get("torch") if isinstance(before, Mapping) else None
    if then is None or then == VERSIONS["torch"]:
        return None
    return f"note: the run was begun with torch {then}, and this is {VERSIONS['torch']}, which may round otherwise"
