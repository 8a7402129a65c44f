"""What a fit is made of, and whether a checkpoint is of one that was made alike."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError
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

BEST = {"accuracy": float | None, "step": int, "weights": dict[str, Any]}
STATE: dict[str, Any] = {
    "step": AtLeastZero, "options": dict[str, Any], "seen": dict[str, float], "made_of": dict[str, Any],
    "best": dict[str, Any], "ended": tuple[int, str] | None,
}  # fmt: skip
"""What the state of a fit has to say, with types; tensors stand in other entries."""


def made_of(trainer: Stepwise, rates: Rates) -> dict[str, Any]:
    """The optimizers, the trainer's own settings, the networks and the types of their weights, as plain values."""
    networks = _networks(trainer)
    for network in networks.values():
        reshard(network)  # else it holds other tensors than the optimizer
    content: dict[str, Any] = {
        "trainer": trainer.settings(),
        "dtype": _dtypes(networks),
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
    """The batches and the validation data, as plain values."""
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
    for part in PARTS if before else ():  # a checkpoint of an earlier version does not say
        if part in allowed:
            continue
        if part == "networks":
            changed += _network_changes(before.get(part, {}), now.get(part, {}))
            continue
        if (part in before) != (part in now) and part == "validation":
            changed.append(f"{part} was {'given' if part in before else 'not given'}, now it is the other way round")
        had, has = before.get(part), now.get(part)
        if isinstance(had, Mapping) and isinstance(has, Mapping):
            had, has = _flat(had), _flat(has)
            for name in sorted({*had, *has}):
                was, is_now = named_now(had.get(name)), has.get(name)
                # A fingerprint that one of them lacks says nothing, nor does what earlier versions did not keep.
                optional = name.endswith(("fingerprint", "parameters")) or name.startswith("settings.")
                if was != is_now and not (optional and None in (was, is_now)):
                    changed.append(f"{part}.{name} was {_short(was)}, now {_short(is_now)}")
    if changed:
        parts = list(dict.fromkeys(re.split(r"[ .:]", change, maxsplit=1)[0] for change in changed))
        raise MetaplError(
            f"{file} is of a run that was made otherwise ({', '.join(changed[:6])}"
            f"{f' and {len(changed) - 6} more' if len(changed) > 6 else ''}); resume it as it was started, or say that "
            f"this may change: allow_changes={parts!r}."
        )


def _network_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The first module of each network that is another, and the first parameter that is learned or frozen now."""
    # What a module says of itself depends on torch's version, its type hardly ever does.
    told = None if before.get("torch") == now.get("torch") else 1
    changes = []
    for role in ("student", "teacher"):
        if role not in before or role not in now:
            continue
        had, has = (network[role]["modules"] for network in (before, now))
        for name in {**has, **had}:
            was, is_now = had.get(name), has.get(name)
            # Of what stands in for another module, for the sake of a layout, nothing is known.
            if [] not in (was, is_now) and (was and was[:told]) != (is_now and is_now[:told]):
                layer = f"layer {name} of the {role}" if name else f"the {role}"
                changes.append(f"networks: {layer} {_module_change(was, is_now)}")
                break
        frozen, is_frozen = (network[role]["frozen"] for network in (before, now))
        for name in sorted({*frozen} ^ {*is_frozen}):
            was_now = "frozen, is learned" if name in frozen else "learned, is frozen"
            changes.append(f"networks: {name} of the {role} was {was_now}")
            break
    return changes


def _module_change(was: list[str] | None, is_now: list[str] | None) -> str:
    if was is None or is_now is None:
        return f"is {_module(is_now)}, was not there" if is_now else f"was {_module(was or [])}, is not there"
    return f"was {_module(was, is_now)}, is {_module(is_now, was)}"


def _module(record: Sequence[str], other: Sequence[str] = ()) -> str:
    """A module as it shows itself; beside another of its type, what they do not have in common."""
    kind, *settings = record
    settings = [text for text in settings if text not in other] if other and other[0] == kind else settings[:1]
    return f"{kind}({', '.join(settings):.200})"


def check_allowed(allowed: Sequence[str]) -> tuple[str, ...]:
    """Names of parts, or a refusal."""
    unknown = [name for name in ([allowed] if isinstance(allowed, str) else allowed) if name not in PARTS]
    if isinstance(allowed, str) or unknown:
        raise MetaplError(f"allow_changes={allowed!r}: expected a list of some of {', '.join(PARTS)}.")
    return tuple(allowed)


def check_state(file: Path, state: Mapping[str, Any], student: nn.Module, steps: int) -> None:
    """Refuse a state that no fit of this student and of so many steps wrote.

    Raises:
        CheckpointError: an entry is missing or of another kind, or more steps are done than the fit has.
    """
    missing = [name for name in ("step", "options", "trainer", "seen", "best", "feeds", "rng") if name not in state]
    fault = f"it has no {missing[0]}" if missing else misfit_entries(state, STATE, "its state")
    fault = fault or misfit_entries(best := state["best"], BEST, "its best student")
    shapes = {name: value.shape for name, value in student.state_dict().items() if isinstance(value, Tensor)}
    if fault is None and best.keys() != BEST.keys():
        fault = f"its best student says {', '.join(map(str, best))}"
    elif fault is None and best["weights"]:
        kept = {name: value.shape for name, value in best["weights"].items() if isinstance(value, Tensor)}
        fault = None if kept == shapes else "its best student is of another network"
    if fault is not None:
        raise CheckpointError(
            f"{file} is whole, but no fit wrote it so: {fault}; go back to an older checkpoint by moving it away."
        )
    if state["step"] > steps:
        raise MetaplError(f"{file} is of a run that has done {state['step']} steps, and steps={steps}; expected more.")


def _networks(trainer: Stepwise) -> dict[str, nn.Module]:
    networks = {"student": trainer.student, "teacher": trainer.teacher}
    return {role: network for role, network in networks.items() if network is not None}


def _dtypes(networks: Mapping[str, nn.Module]) -> dict[str, str]:
    return {
        role: ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in network.parameters()}))
        for role, network in networks.items()
    }


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


VERSIONS = {"torch": str(torch.__version__)}
"""What may round otherwise."""


def version_note(before: Any) -> str | None:
    """What to say where a run was begun with another torch; None where it was not, or is not known."""
    then = before.get("torch") if isinstance(before, Mapping) else None
    if then is None or then == VERSIONS["torch"]:
        return None
    return f"note: the run was begun with torch {then}, and this is {VERSIONS['torch']}, which may round otherwise"
