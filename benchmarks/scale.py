"""Sharded steps beside unsharded ones, on this machine over gloo.

    python benchmarks/scale.py                        # measures, and writes results/scale.json
    python benchmarks/scale.py --write benchmarks/results/scale.md

A multi-layer perceptron with its teacher, SGD with Nesterov momentum. Every process has a batch of
the same size, so a process of several computes as much as one alone. Each layout has processes of
its own, on one thread each, and the layouts take turns; times are of the processor, so that
processes that share a core do not count twice, and of the slowest process. Operations and bytes are
counted as they are dispatched; memory is what lies there before a step and what the allocator adds.
"""

from __future__ import annotations

import gc
import json
import math
import os
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from harness import RESULTS, Row, arguments, environment, grid, loaded, parsed, show, write_json
from torch import Tensor, nn
from torch.utils import _pytree as pytree

HERE = Path(__file__).parent
RESULT = RESULTS / "scale.json"

MODES = ("none", "loss_difference", "reinforce", "reinforce_per_example", "difference", "forward")
LAYOUTS: dict[str, dict[str, int]] = {
    "one process": {},
    "2 replicas": {"replicate": 2},
    "2 shards": {"shard": 2},
    "4 shards": {"shard": 4},
    "2 x 2": {"replicate": 2, "shard": 2},
}
ALONE = "one process"
WIDTHS, ROWS = (128, 512, 512, 512, 10), 64


def run(sizes: dict[str, int], cases: Sequence[Row]) -> list[tuple[Row, ...]]:
    """Return what each process of a layout measures, case by case."""
    number = math.prod(sizes.values())
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(serve, (number, folder, sizes, cases), nprocs=number)
        ranks = [loaded(Path(folder) / f"{rank}.json") for rank in range(number)]
    return list(zip(*ranks, strict=True))


def serve(rank: int, number: int, folder: str, sizes: dict[str, int], cases: Sequence[Row]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    from torch import distributed as dist

    torch.set_num_threads(1)
    if number > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=number
        )
    (Path(folder) / f"{rank}.json").write_text(
        json.dumps([measure(rank, sizes, **case) for case in cases])
    )
    if number > 1:
        dist.destroy_process_group()


def measure(
    rank: int, sizes: dict[str, int], mode: str, widths: Sequence[int], steps: int, count: bool
) -> Row:
    """Return a step's seconds in this process; with ``count`` what it computes, sends, holds."""
    import metapl
    from metapl.ablation.cost import peak_bytes
    from metapl.distributed import Mesh, shard
    from metapl.execution.shards import local

    torch.manual_seed(0)
    teacher, student = (metapl.models.mlp(widths) for _ in range(2))
    networks: list[nn.Module] = [teacher, student]
    if sizes:
        teacher, student = (shard(network, Mesh(**sizes)) for network in networks)  # type: ignore[assignment]
    trainer = metapl.BilevelTrainer(teacher, student, mode)
    draw = torch.Generator().manual_seed(rank)
    x, u = (torch.randn(ROWS, widths[0], generator=draw) for _ in range(2))
    labeled = x, torch.arange(ROWS) % widths[-1]

    def step() -> Any:
        return trainer.step(labeled, u)

    for _ in range(2):
        step()
    start = time.process_time()
    for _ in range(steps):
        step()
    row: Row = {"seconds": (time.process_time() - start) / steps}
    if not count:
        return row
    with runpy.run_path(str(HERE.parent / "examples" / "plan.py"))["Memory"]() as seen:
        step()
    peaks = []
    for _ in range(3):
        gc.collect()
        peaks.append(peak_bytes(step, torch.device("cpu")))
    # Beside the peak, what lies there before a step; replicas have a bucket for each weight.
    states = [state for optimizer in trainer.schedulable for state in optimizer.state.values()]
    tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    tensors += [t for t in pytree.tree_leaves([states, labeled, u]) if isinstance(t, Tensor)]
    tensors += (
        [p for network in networks for p in network.parameters()]
        if set(sizes) == {"replicate"}
        else []
    )
    bytes_of_tensors = sum(t.numel() * t.element_size() for t in map(local, tensors))
    return row | {"flops": seen.flops, "sent": seen.sent, "bytes": bytes_of_tensors + min(peaks)}


def measured(miniature: bool) -> Row:
    names = ("one process", "2 shards") if miniature else tuple(LAYOUTS)
    modes = ("none", "forward") if miniature else MODES
    turns, steps, widths = (1, 1, (8, 8, 4)) if miniature else (3, 3, WIDTHS)
    load = os.getloadavg()[0]
    rows_by_way: dict[tuple[str, str], list[Sequence[Row]]] = {}
    for turn in range(turns):
        cases = [
            {"mode": mode, "widths": widths, "steps": steps, "count": turn == 0} for mode in modes
        ]
        for name in names:
            for mode, ranks in zip(modes, run(LAYOUTS[name], cases), strict=True):
                rows_by_way.setdefault((mode, name), []).append(ranks)
        print(f"turn {turn + 1} of {turns}", file=sys.stderr, flush=True)
    rows = []
    for (mode, name), by_turn in rows_by_way.items():
        seconds = [max(rank["seconds"] for rank in ranks) for ranks in by_turn]
        most = {key: max(rank[key] for rank in by_turn[0]) for key in ("flops", "sent", "bytes")}
        times = {"seconds": statistics.median(seconds), "turns": seconds}
        rows.append({"mode": mode, "layout": name, **times, **most})
    return {
        "rows": rows,
        "widths": widths,
        "batch": ROWS,
        "load": load,
        "measured_on": environment(),
    }


def table(result: Row) -> str:
    rows = {(row["mode"], row["layout"]): row for row in result["rows"]}
    names = [
        name for name in LAYOUTS if name != ALONE and any(layout == name for _, layout in rows)
    ]
    times = list[list[str]]()
    amounts = list[list[str]]()
    for mode in dict.fromkeys(mode for mode, _ in rows):
        alone = rows[mode, ALONE]
        sharded = [rows[mode, name] for name in names]
        ratios = [f"{row['seconds'] / alone['seconds']:.2f}" for row in sharded]
        operations = max(row["flops"] / alone["flops"] for row in sharded)
        times.append([f"`{mode}`", f"{1e3 * alone['seconds']:.1f}", *ratios, f"{operations:.2f}"])
        sent = [f"{row['sent'] / 1e6:.1f}" for row in sharded]
        amounts.append(
            [f"`{mode}`", *sent, *(f"{row['bytes'] / 1e6:.1f}" for row in (alone, *sharded))]
        )
    head = [
        "mode",
        *(f"sent: {name}" for name in names),
        *(f"held: {name}" for name in (ALONE, *names)),
    ]
    return "\n\n".join([grid(["mode", "alone, ms", *names, "FLOP"], times), grid(head, amounts)])


def main() -> None:
    args = parsed(arguments(__doc__, RESULT))
    if args.runs:
        write_json(args.out, measured(args.miniature))
    show(args.write, "scale", table(loaded(args.out)))


if __name__ == "__main__":
    main()
