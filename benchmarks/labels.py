"""Ten million stored labels of 1,000 classes, top-8: how long they take to write, look at, select from and read.

    nice -n 15 python benchmarks/labels.py                 # some ten minutes, and 1.5 GB of disk for a while
    python benchmarks/labels.py --table benchmarks/results/labels.json
    python benchmarks/labels.py --write docs/labels.md

The distributions are made up: eight random classes of an example have most of the probability, the others share the
rest; some classes are a hundred times as frequent as others. They are given to the writer whole, (B, 1,000) float32, so
that it has to find the greatest ones. Each phase runs in a process of its own, whose greatest resident memory is
measured, memory maps included: 2 GiB are allowed. Beside the time on the clock stands that of the processor, over all
threads, for where other work takes turns with it. The selection is Noisy Student's: confidence above 0.3, at most N of
a class, and classes with fewer balanced by duplication; its result is compared with numpy's on the same columns.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from machine import arguments, described, parsed, write_between_marks, write_json
from torch import Tensor

from metapl.apps.labels import LabelStore, LabelWriter, select, statistics

RESULT = Path(__file__).parent / "results" / "labels.json"
ALLOWED = 2 * 2**30
"""Bytes of resident memory."""


@dataclass(frozen=True)
class Size:
    """How much is written and read."""

    rows: int
    classes: int
    per_class: int
    top_k: int = 8
    batch: int = 4096
    rows_per_part: int = 10_000
    reads: int = 1000
    read_at_once: int = 512


FULL = Size(10_000_000, 1_000, 13_000)
MINIATURE = Size(20_000, 50, 500, batch=1000, rows_per_part=2_000, reads=10)


def names(start: int, stop: int) -> list[str]:
    return [f"n{number // 10_000:05}/{number:08}.jpg" for number in range(start, stop)]


def distributions(size: Size) -> Iterator[tuple[list[str], Tensor]]:
    """Batches of ids and probabilities; the same each time."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, size.rows, size.batch):
        rows = min(size.batch, size.rows - start)
        peaks = torch.rand(rows, size.top_k, generator=generator).pow(4)
        rest = torch.rand(rows, 1, generator=generator) * 0.5
        # Squared, so that the first classes are more frequent.
        classes = (torch.rand(rows, size.top_k, generator=generator).square() * size.classes).long()
        p = (rest / size.classes).expand(rows, size.classes).contiguous()
        p.scatter_add_(1, classes, (1 - rest) * peaks / peaks.sum(dim=1, keepdim=True))
        yield names(start, start + rows), p


def write(folder: Path, size: Size) -> dict[str, Any]:
    made = made_cpu = 0.0
    with LabelWriter(
        folder / "store",
        [f"class {index}" for index in range(size.classes)],
        top_k=size.top_k,
        rows_per_part=size.rows_per_part,
    ) as writer:
        batches = distributions(size)
        while True:
            since, since_cpu = time.perf_counter(), time.process_time()
            batch = next(batches, None)
            made, made_cpu = made + time.perf_counter() - since, made_cpu + time.process_time() - since_cpu
            if batch is None:
                break
            writer.add(*batch)
    store = LabelStore(folder / "store")
    return {
        "made": made,
        "made_cpu": made_cpu,
        "parts": len(store.parts),
        "disk_bytes": sum(part.bytes for part in store.parts),
    }


def look(folder: Path, size: Size) -> dict[str, Any]:
    found = statistics(LabelStore(folder / "store"))
    return {"examples": found.rows, "largest": max(found.counts), "smallest": min(found.counts)}


def choose(folder: Path, size: Size) -> dict[str, Any]:
    found = select(
        LabelStore(folder / "store"), folder / "selected", threshold=0.3, per_class=size.per_class, balance=True
    )
    return {"kept": found.kept, "copies": found.copies, "missing": len(found.missing)}


def compare(folder: Path, size: Size) -> dict[str, Any]:
    """Whether numpy keeps the same rows; it sorts all of them in memory."""
    store, kept = LabelStore(folder / "store"), LabelStore(folder / "selected")
    tables = [store.table(number, ["label", "confidence"]) for number in range(len(store.parts))]
    label, confidence = (pa.concat_tables(tables)[name].to_numpy() for name in ("label", "confidence"))
    del tables
    order = np.lexsort((np.arange(size.rows), -confidence, label))
    order = order[confidence[order] > np.float32(0.3)]
    firsts = np.searchsorted(label[order], np.arange(size.classes))
    place = np.arange(len(order)) - firsts[label[order]]
    rows = np.sort(order[place < size.per_class])
    found = np.concatenate([store.rows(kept.table(n, ["id"])[0].to_pylist()) for n in range(len(kept.parts))])
    copies = np.concatenate([kept.table(n, ["copies"])[0].to_numpy() for n in range(len(kept.parts))])
    totals = np.bincount(label[found], weights=copies, minlength=size.classes)
    return {
        "same_rows": bool(np.array_equal(rows, found)),
        "balanced": {int(total) for total in totals} <= {0, size.per_class},
    }


def read(folder: Path, size: Size) -> dict[str, Any]:
    """Random rows by number, by id, and the rows of many ids."""
    begun = time.process_time()
    store = LabelStore(folder / "store")
    opened = time.process_time() - begun
    rng = np.random.default_rng(0)

    def rate(once: Callable[[np.ndarray[Any, Any]], Any], repeats: int) -> float:
        wanted = rng.integers(0, size.rows, (repeats, size.read_at_once))
        since = time.process_time()
        for rows in wanted:
            once(rows)
        return wanted.size / (time.process_time() - since)

    first = rate(store.at, size.reads)
    by_id = rate(lambda rows: store[[names(row, row + 1)[0] for row in rows.tolist()]], max(1, size.reads // 50))
    many = [names(row, row + 1)[0] for row in rng.integers(0, size.rows, size.rows // 100).tolist()]
    since = time.process_time()
    store.rows(many)
    return {
        "lookup_ids": len(many),
        "lookup_cpu_seconds": time.process_time() - since,
        "open_cpu_seconds": opened,
        "rows_a_cpu_second_first": first,
        "rows_a_cpu_second_again": rate(store.at, size.reads),
        "ids_a_cpu_second": by_id,
    }


PHASES: dict[str, Callable[[Path, Size], dict[str, Any]]] = {
    "write": write,
    "stats": look,
    "select": choose,
    "compare": compare,
    "read": read,
}


def measured(phase: str, folder: Path, size: Size) -> dict[str, Any]:
    """A phase in this process: what it found, its seconds, and the most memory that was ever resident."""
    since, since_cpu = time.perf_counter(), time.process_time()
    found = PHASES[phase](folder, size)
    seconds = time.perf_counter() - since - found.pop("made", 0.0)
    cpu_seconds = time.process_time() - since_cpu - found.pop("made_cpu", 0.0)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": kilobytes * 1024, **found}


def run(size: Size) -> dict[str, Any]:
    """Every phase, in a process of its own unless it is the miniature."""
    phases = {}
    with tempfile.TemporaryDirectory(prefix="metapl-") as scratch:
        for phase in PHASES:
            if size == MINIATURE:
                phases[phase] = measured(phase, Path(scratch), size)
                continue
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                phases[phase] = pool.submit(measured, phase, Path(scratch), size).result()
            print(f"{phase}: {phases[phase]}", file=sys.stderr, flush=True)
    return phases


def table(result: dict[str, Any]) -> str:
    """The table of the documentation."""
    size, phases, made = result["size"], result["phases"], result["made_with"]
    written, reading, rows = phases["write"], phases["read"], size["rows"]
    whats = {
        "write": f"{rows / written['cpu_seconds']:,.0f} examples a processor second; {written['parts']:,} parts, "
        f"{written['disk_bytes'] / rows:.0f} bytes an example",
        "stats": f"{phases['stats']['smallest']:,} to {phases['stats']['largest']:,} examples of a class",
        "select": f"{phases['select']['kept']:,} kept, {phases['select']['copies']:,} with copies",
        "read": f"in any order {reading['rows_a_cpu_second_again']:,.0f} rows a processor second "
        f"({reading['rows_a_cpu_second_first']:,.0f} while parts are checked); {reading['lookup_ids']:,} ids found at "
        f"once in {reading['lookup_cpu_seconds']:.1f} processor seconds, or by {size['read_at_once']} random ones at "
        f"a time {reading['ids_a_cpu_second']:,.0f} a processor second; opened in "
        f"{reading['open_cpu_seconds']:.2f}",
    }
    lines = ["| phase | seconds | of the processor | peak memory | |", "|---|---:|---:|---:|---|"]
    for phase, what in whats.items():
        found = phases[phase]
        seconds = f"{found['seconds']:,.1f} | {found['cpu_seconds']:,.1f}"
        lines.append(f"| {phase} | {seconds} | {found['peak_bytes'] / 2**20:,.0f} MiB | {what} |")
    agreed = "the same rows as numpy" if phases["compare"]["same_rows"] else "**other rows than numpy**"
    within = "within" if all(phases[phase]["peak_bytes"] <= ALLOWED for phase in whats) else "**above**"
    about = (
        f"{rows:,} examples, {size['classes']:,} classes, top-{size['top_k']}; {within} 2 GiB of resident memory, "
        f"memory maps included. Selected: confidence above 0.3, at most {size['per_class']:,} of a class, balanced by "
        f"duplication: {agreed}. {made['cpu']}, {made['cores']} cores, shared with other work; torch {made['torch']}, "
        f"pyarrow {made['pyarrow']}. `nice -n 15 python benchmarks/labels.py`; raw: `benchmarks/results/labels.json`."
    )
    return "\n".join([*lines, "", about])


def main() -> None:
    parser = arguments(__doc__, RESULT, page=True)
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a result and stop")
    options = parsed(parser)
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    if options.write:
        write_between_marks(options.write, "labels", table(json.loads(options.out.read_text())))
        return
    size = MINIATURE if options.miniature else FULL
    result = {"made_with": described("cpu") | {"pyarrow": pa.__version__}, "size": vars(size), "phases": run(size)}
    write_json(options.out, result)
    print(table(json.loads(options.out.read_text())))


if __name__ == "__main__":
    main()
