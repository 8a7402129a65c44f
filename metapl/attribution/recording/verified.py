"""Whether the derivative through two recorded steps is that of real ones."""

from __future__ import annotations

from typing import Any, Literal

import torch

from metapl.attribution.attribute import VERIFIED_ROWS, explained, verified_steps
from metapl.attribution.recording.replay import Replay
from metapl.core.lookahead import Lookahead
from metapl.execution.batch import Batch, map_tensors
from metapl.models import Logits
from metapl.training.hypergradient import verify_hypergradient


def verify_recorded_steps(replay: Replay, outer: Batch, verify: bool | Literal["warn"]) -> None:
    """Refuse a network whose derivative through two steps is wrong, or warn; nothing moves.

    The two are steps on the batches with the greatest rates, from the state before the first step,
    with an optimizer that begins, and without autocast.

    Args:
        outer: an outer batch, as the problem reads it.
    """
    contents = replay.recording
    rows = replay.rows
    steps = verified_steps([row.options for row in rows])
    calls = [replay.calls(number)[0] for number in range(len(rows))[steps]]
    options_of_groups = rows[steps.start].options
    state = replay.read_state(0)
    network = contents.network
    names = {id(p): name for name, p in network.parameters.items()}
    recorded: Any = contents.update.optimizer
    with (
        network.at(state.params, state.buffers, calls[0].draws, calls[0].training_parts) as (
            leaves,
            _,
        ),
        torch.autocast(network.device.type, enabled=False),
    ):
        groups: list[dict[str, Any]] = []
        for group, options in zip(recorded.param_groups, options_of_groups, strict=True):
            params = [leaves[names[id(p)]] for p in group["params"]]
            groups.append({**options, "params": params})
        ahead = Lookahead([call.batch for call in calls])
        outer = map_tensors(lambda t: t[:VERIFIED_ROWS], outer)
        with explained(outer, ahead):
            verify_hypergradient(
                Logits(network.model),
                outer=outer,
                inner=ahead,
                problem=network.problem,
                inner_optimizer=type(recorded)(groups),
                clip_norm=rows[steps.start].clip_norm,
                verify=verify,
            )
