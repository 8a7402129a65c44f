"""What a checkpoint of a fit says, whether it is of one that was made alike, and what of it is of one process."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from metapl.errors import MetaplError, reason_of
from metapl.execution.layout import reshard
from metapl.execution.shards import is_sharded
from metapl.runs.checkpoint import CheckpointError
from metapl.runs.checkpoint_parts import Like, PartsWriter, named
from metapl.runs.fields import AtLeastZero, misfit_entries
from metapl.runs.fingerprints import as_values, network_record, unwrapped
from metapl.runs.generators import rng_state, set_rng_state
from metapl.training.contract import Say, Stepwise
from metapl.training.options import Rates

PARTS = (
    "student_optimizer", "teacher_optimizer", "trainer", "networks", "dtype", "labeled", "unlabeled", "validation",
)  # fmt: skip
"""What ``allow_changes`` may name."""

# Settings of an optimizer that do not decide where it goes; its learning rate is compared as the schedule found it.
OF_SPEED = ("params", "lr", "foreach", "fused", "capturable", "differentiable", "initial_lr")

# Words in the names of facts that a side may lack: what is not known, or was not kept by earlier versions.
OPTIONAL = ("fingerprint", "parameters", "settings")

# What the state of a fit has to say, with types; tensors stand in other entries.
BEST = {"value": float | None, "step": int, "weights": dict[str, Any], "beside": dict[str, Any]}
STATE: dict[str, Any] = {
    "step": AtLeastZero, "options": dict[str, Any], "seen": dict[str, float], "made_of": dict[str, Any],
    "best": dict[str, Any], "ended": tuple[int, str] | None, "rows": str,
    "metric": tuple[str, str] | None,
}  # fmt: skip

VERSIONS = {"torch": str(torch.__version__)}
"""What may round otherwise."""


# ------------------------------------------------------------------------------------------------ what it was made of


def made_of(trainer: Stepwise, rates: Rates) -> dict[str, Any]:
    networks = trainer.networks
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
    from metapl.data.identity import source_record  # needed for fitting only

    return {name: source_record(source) for name, source in sources.items() if source is not None}


def refuse_changes(file: Path, before: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Stop where a run was made otherwise, by :func:`made_of` and :func:`data_of` before and now, but for the parts
    that are ``allowed``; what is not known of one of them is not compared."""
    changed: list[tuple[str, str]] = []
    for part in [part for part in PARTS if part not in allowed]:
        had, has = before.get(part), now.get(part)
        if before and part == "validation" and (had is None) != (has is None):
            changed.append((part, f"{part} was {'not ' * (had is None)}given, now it is the other way round"))
        if not isinstance(had, Mapping) or not isinstance(has, Mapping):
            continue
        if part == "networks":
            pairs, shown = _of_networks(had, has), _layer
        else:
            had, has = _flat(had), _flat(has)
            pairs, shown = {name: (had.get(name), has.get(name)) for name in {**had, **has}}, _short
        for name, (was, is_now) in sorted(pairs.items()):
            if was != is_now and not (None in (was, is_now) and {*OPTIONAL} & {*name.split(".")}):
                changed.append((part, f"{part}.{name} was {shown(was, is_now)}, now {shown(is_now, was)}"))
    if changed:
        more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
        raise MetaplError(
            f"{file} is of a run that was made otherwise ({', '.join(text for _, text in changed[:6])}{more}); resume "
            f"it as it was started, or say that this may change: allow_changes={[*dict(changed)]!r}."
        )


def _of_networks(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
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
    if isinstance(allowed, str) or not {*PARTS} >= {*allowed}:
        raise MetaplError(f"allow_changes={allowed!r}: expected a list of some of {', '.join(PARTS)}.")
    return tuple(allowed)


# ---------------------------------------------------------------------------------------------------------- its state


def check_state(file: Path, state: Mapping[str, Any], student: nn.Module, steps: int) -> None:
    """Refuse a state that no fit of this student and of so many steps wrote: an entry is missing or of another kind, or
    more steps are done than the fit has."""
    missing = [name for name in ("step", "options", "trainer", "seen", "best", "feeds", "rng") if name not in state]
    fault = f"it has no {missing[0]}" if missing else misfit_entries(state, STATE, "its state")
    fault = fault or misfit_entries(best := state["best"], BEST, "its best student")
    if fault is None and {"beside", *best} != BEST.keys():  # which states of earlier versions do not have
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


def refuse_other_options(
    file: Path, state: Mapping[str, Any], now: Mapping[str, Any], sources: Collection[str]
) -> None:
    """Stop where the options that decide a step, or the kinds of sources, are others."""
    before = state["options"]
    changed = [
        f"{k} was {before.get(k)!r}, now {now.get(k)!r}" for k in {**before, **now} if before.get(k) != now.get(k)
    ]
    if changed:
        raise MetaplError(f"{file} is of a run with other options ({', '.join(changed)}); resume it as it was started.")
    if {*state["feeds"]} != {*sources}:
        had, has = (" and ".join(kinds) for kinds in (state["feeds"], sources))
        raise MetaplError(f"{file} is of a run on {had} batches, now there are {has} ones; give the same sources.")


def refuse_other_metric(file: Path, state: Mapping[str, Any], now: tuple[str, ...] | None) -> None:
    """Stop where another metric has found the best student so far."""
    before = state.get("metric", ["accuracy", "max"])  # the only one of earlier versions
    if before is not None and now is not None and [*before] != [*now]:
        had, has = (f"{name!r} ({mode})" for name, mode in (before, now))
        raise MetaplError(
            f"{file} is of a run that was validated by the metric {had}, now it is {has}; resume it as it was started."
        )


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


# ------------------------------------------------------------------------------------- of several processes together


def own_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """What differs between processes."""
    generator, best = state["trainer"].get("generator"), state["best"].get("beside", {})
    return {
        "rng": state["rng"],
        "generator": generator,
        "feeds": state["feeds"],
        "beside": state.get("beside", {}),
        "best_beside": best,
    }


def parts_writer(trainer: Stepwise, folder: Path | None, keep: int) -> PartsWriter | None:
    """What writes checkpoints in parts, of which ``keep`` stay in a folder that the first process knows: where networks
    are sharded over all processes of the job. Elsewhere the first process has everything, or could not say who else
    writes."""
    ranks = trainer.ranks
    sharded = any(is_sharded(p) for network in trainer.networks.values() for p in network.parameters())
    if ranks.alone or not sharded or ranks.processes != dist.get_world_size():
        return None
    path = ranks.gathered(None if folder is None else str(folder.resolve()))[0]
    return PartsWriter(Path(path), keep)


def layouts_of(state: Mapping[str, Any], trainer: Stepwise) -> Like:
    """The layouts of the tensors of a fit's state, by their names; those of optimizers may not be there yet."""
    known = named(state)
    optimizers = [key for key, value in state["trainer"].items() if isinstance(value, dict) and "param_groups" in value]
    for key, optimizer in zip(optimizers, trainer.schedulable, strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        known |= {f"trainer/{key}/state/{i}": p for i, p in enumerate(parameters) if is_sharded(p)}

    def like(name: str, shape: torch.Size) -> Any:
        layout = known.get(name, known.get(name.rpartition("/")[0]))
        return layout if layout is not None and layout.shape == shape else None

    return like


def of_this(state: dict[str, Any], trainer: Stepwise, file: Path, *, whole_batches: bool, say: Say) -> dict[str, Any]:
    """The state of a fit, by one process or several, with the generators and the places in the sources of this process.

    On another number of processes, each takes the default generators of the first one; where the networks drop row
    after row by these, each share seeds them anew, from that state and its number.

    Raises: :class:`metapl.MetaplError` where the processes are as many as before no longer, and have sources of their
    own rather than ``whole_batches``, of which each takes its share.
    """
    from metapl.problems.stored import model_noise  # needed for resuming only

    ranks, best = trainer.ranks, state.get("best")
    if isinstance(best, dict) and "accuracy" in best:  # as earlier versions called it
        state = state | {"best": {"value" if name == "accuracy" else name: entry for name, entry in best.items()}}
    if ranks.alone and "ranks" not in state:
        return state
    every = state.get("ranks") or [own_state(state)]
    count = ranks.processes
    if len(every) != count and ranks.size > 1 and not whole_batches:
        raise MetaplError(
            f"{file} is of a run in {len(every)} processes, each with sources of its own, and now there are {count}, "
            "so their places in these are not known; resume it in as many, or give all of them the same whole batches, "
            "with split_batches=True."
        )
    own = every[ranks.number if len(every) == count else 0]
    if len(every) != count and any(map(model_noise, trainer.networks.values())):
        say(f"the run was in {len(every)} processes and goes on in {count}: dropout masks are others than before")
        set_rng_state(own["rng"])
        drawn = torch.get_rng_state().numpy().tobytes() + ranks.rank.to_bytes(4, "little")
        torch.manual_seed(int.from_bytes(hashlib.sha256(drawn).digest()[:8], "little"))
        own = own | {"rng": rng_state()}
    held = state["trainer"] | ({"generator": own["generator"]} if "generator" in state["trainer"] else {})
    beside = {"beside": own.get("beside", {}), "best": state["best"] | {"beside": own.get("best_beside", {})}}
    return state | {"rng": own["rng"], "feeds": own["feeds"], "trainer": held} | beside
