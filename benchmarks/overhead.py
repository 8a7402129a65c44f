"""What the host does around the graph of a compiled step, in microseconds.

    python benchmarks/overhead.py --label NAME         # measures the code as it is
    python benchmarks/overhead.py --write benchmarks/results/overhead.md

A compiled step is a graph, and the host's work around it: it looks whether the step is still the
one that was compiled, reads settings, hands the tensors in, copies the new state into modules and
optimizers, and makes the report. On a GPU a graph of a small network takes less than that. Here the
graph is one of nothing: it returns the state that it was given, whose copy into itself ends at
once, and the report of the first step. So what is left is the host's.

*Compiled* is ``compile=True``, whose graph is replayed without a compiler; *by graphs* is
``compile="cudagraphs"``, whose inputs are copied into memory of its own, and whose report is copied
out. Times are of the processor, on one thread: the median over rounds, with quartiles. Batches are
small: of the host's work none depends on their size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import step
import torch
from harness import RESULTS, Row, arguments, environment, grid, loaded, parsed, show, write_json

import metapl
from metapl.functional import capture, cuda_graphs
from metapl.functional.state import with_fields

RESULT = RESULTS / "overhead.json"
COMPILED, BY_GRAPHS = "compiled", "by graphs"
WAYS: dict[str, Any] = {COMPILED: True, BY_GRAPHS: "cudagraphs"}
ROUNDS, SECONDS = 21, 0.1
"""Rounds, and the least seconds of each."""


def wide_resnet() -> tuple[step.Pair, step.Data]:
    torch.manual_seed(0)
    teacher, student = metapl.models.wide_resnet28_2(), metapl.models.wide_resnet28_2()
    x, u = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    return (teacher, student), ((x, torch.arange(2)), u)


NETWORKS: dict[str, Callable[[], tuple[step.Pair, step.Data]]] = {
    "MLP 64-64-10": step.NETWORKS["mlp"].make,
    "transformer, 2 layers of 64": step.NETWORKS["transformer"].make,
    "WRN-28-2": wide_resnet,
}


def step_of(network: str, way: str, mode: str) -> Callable[[], Any]:
    """Return a trainer's step whose graph is one of nothing; two real steps have been taken."""
    pair, data = NETWORKS[network]()
    trainer = step.trainer(mode, pair, compile=WAYS[way], verify=False)
    trainer.step(*data)
    trainer.step(*data)
    compiled_step: Any = trainer.compiled_step
    state = compiled_step._live.state
    graph = compiled_step._compiled
    if way == COMPILED:
        captured = graph.run.captured
        kept = captured.kept[-1]
        returned: Any = None

        def first_time_only(*tensors: Any) -> Any:
            nonlocal returned
            if returned is None:
                returned = kept.graph(*tensors)
            return returned

        captured.kept[-1] = kept._replace(graph=first_time_only)
        trainer.step(*data)
    else:
        recorded = graph.run.recorded[-1]
        moved, report = recorded.recording.results
        moved = with_fields(state, mode=moved.mode, step=moved.step)
        recorded.recording = cuda_graphs.Recording((moved, report), lambda: None)
    return lambda: trainer.step(*data)


def record_once(function: Callable[[], Any], device: torch.device, pool: Any) -> Any:
    """Return a recording on the CPU, whose replay does nothing."""
    return cuda_graphs.Recording(function(), lambda: None)


def measure(network: str, way: str, mode: str, rounds: int) -> Row:
    """Return what the host takes for a step, in microseconds."""
    run = step_of(network, way, mode)
    start = time.process_time()
    for _ in range(5):
        run()
    each = (time.process_time() - start) / 5
    calls = 1 if rounds == 1 else max(5, round(SECONDS / each))
    times = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(calls):
            run()
        times.append(1e6 * (time.process_time() - start) / calls)
    low, middle, high = statistics.quantiles(times, n=4) if rounds > 1 else 3 * times
    row: Row = {"network": network, "way": way, "mode": mode, "us": middle}
    row |= {"quartiles": [low, high], "rounds": rounds, "calls": calls}
    return row | {"measured_on": environment()}


def measured(label: str, networks: list[str], modes: tuple[str, ...], rounds: int) -> list[Row]:
    """Return a row for each network, way and mode."""
    # What is measured is the work around the graph, and the two real steps need none.
    as_it_is: Any = lambda graph, examples: graph  # noqa: E731
    compiled_graph = capture.compiled_graph
    recorders = dict(cuda_graphs.RECORDERS)
    rows: list[Row] = []
    try:
        capture.compiled_graph = as_it_is
        cuda_graphs.RECORDERS["cpu"] = record_once
        for network in networks:
            for way in WAYS:
                rows += [{"label": label, **measure(network, way, mode, rounds)} for mode in modes]
    finally:
        capture.compiled_graph = compiled_graph
        cuda_graphs.RECORDERS.clear()
        cuda_graphs.RECORDERS.update(recorders)
    return rows


def table(result: Row) -> str:
    """Return a row for each label, network, way and mode."""
    lines = []
    for row in result["rows"]:
        low, high = row["quartiles"]
        spread = f"{low:.0f} to {high:.0f}"
        cells = [row["label"], row["network"], row["way"], f"`{row['mode']}`"]
        lines.append([*cells, f"{row['us']:.0f}", spread])
    head = ["label", "network", "way", "mode", "microseconds", "quartiles"]
    return grid(head, lines, names=4)


def main() -> None:
    parser = arguments(__doc__, RESULT)
    parser.add_argument("--label", default="now", help="of the rows; those of others stay")
    given = parsed(parser)
    torch.set_num_threads(1)
    if given.runs:
        old = loaded(given.out)["rows"] if given.out.exists() else []
        networks = [*NETWORKS]
        rounds = ROUNDS
        if given.miniature:
            networks = networks[:1]
            rounds = 1
        rows = measured(given.label, networks, ("forward", "reinforce"), rounds)
        kept = [row for row in old if row["label"] != given.label]
        write_json(given.out, {"rows": [*kept, *rows]})
    show(given.write, "overhead", table(loaded(given.out)))


if __name__ == "__main__":
    main()
