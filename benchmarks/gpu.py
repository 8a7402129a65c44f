"""Measure on a GPU, in one order of worth, in one command that goes on where it was stopped.

    python benchmarks/gpu.py --minutes 9 --out runs/gpu    # make gpu; again: what is missing
    python benchmarks/gpu.py --table runs/gpu
    python benchmarks/gpu.py --device cpu --miniature --minutes 4 --out DIR    # see that it runs
    python benchmarks/gpu.py --plan    # the memory of gpu_large.py, on a CPU, without a number

The order: the tests that pytest calls ``gpu``; the MLP and the transformer eager and
compiled; WRN-28-2 in bfloat16; what share of the card's rate a
step reaches, beside the plain training step of the same network (``card.py``); the gradient
through a whole training of GPT-2 (``gpt2_training.py``); how much of a bare step's rate the papers'
protocol has on Fashion-MNIST (``end_to_end.py``), and its five arms at once
(``fashion_protocol.py``; ``--source`` names the folder of the four files); larger networks, and
those that fill a card (``gpu_large.py``); other libraries, one step and ten ahead; the same in
float32, and WRN-28-2 compiled. Later work inserts its parts where they belong.

Each part has a process of its own, which is killed after ``--most`` seconds or when the minutes are
over, and a file of the folder when it is done. The rows that a killed part had measured stay, and
the next call goes on behind them. A part that failed leaves what it printed, and is run again by
the next call. Steps are measured as ``step.py`` does it, beside the same by hand; other libraries
as ``peers.py`` does it, if they are installed. Every mode on WRN-28-2: ``modes.py``, which runs on
the GPU too.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import card
import end_to_end
import fashion_protocol
import gpt2_training
import gpu_large
import peers
import protocol_rows
import step
import torch
import torchvision
from harness import Row, environment, grid, loaded, write_json
from modes import Place
from step import COMPILED, EAGER, MODES, Network
from torch import nn

import metapl

ROOT = Path(__file__).parents[1]
MOST = 90.0
"""Seconds that a part may take."""
TESTS = "tests"


def large(
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    labeled: int,
    unlabeled: int,
    *,
    words: int = 0,
    layout: torch.memory_format = torch.contiguous_format,
) -> tuple[step.Pair, step.Data]:
    """Make a pair of networks and their batches, of words if there are any, in a memory format."""
    torch.manual_seed(0)
    pair = build().to(memory_format=layout), build().to(memory_format=layout)
    sizes = (labeled, *shape), (unlabeled, *shape)
    if words:
        x, u = (torch.randint(words, size) for size in sizes)
    else:
        x, u = (torch.rand(size).contiguous(memory_format=layout) for size in sizes)
    return pair, ((x, torch.arange(labeled) % 10), u)


VIT: Row = {"num_layers": 12, "num_heads": 6, "hidden_dim": 384, "mlp_dim": 1536, "num_classes": 10}
LM: Row = {"words": 50257, "width": 768, "depth": 12, "length": 512, "head": 64, "outputs": 50257}
WRN = partial(large, metapl.models.wide_resnet28_2, (3, 32, 32), 128, 896)
LARGER = {
    "ViT-S": partial(
        large, partial(torchvision.models.VisionTransformer, 224, 16, **VIT), (3, 224, 224), 32, 128
    ),
    "causal LM, 124 M": partial(large, partial(peers.CausalLM, **LM), (512,), 8, 8, words=50257),
    "ResNet-50": partial(
        large,
        partial(torchvision.models.resnet50, num_classes=10),
        (3, 224, 224),
        32,
        128,
        layout=torch.channels_last,
    ),
    "EfficientNet-B0": partial(
        large,
        partial(torchvision.models.efficientnet_b0, num_classes=10),
        (3, 224, 224),
        32,
        128,
        layout=torch.channels_last,
    ),
}
LARGE = {
    "WRN-28-2": WRN,
    "WRN-28-2, channels-last": partial(WRN, layout=torch.channels_last),
    **LARGER,
}
ROUNDS = dict.fromkeys(LARGER, 5)
"""Rounds of the networks whose steps take long; of the others, eleven."""
# The test and the networks of a miniature, which has a part of each kind.
SMALL_TEST = "in_bfloat16_it_is_near and forward and convolutions"
SMALL = partial(large, metapl.models.small_cnn, (3, 16, 16), 2, 6)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Where a part leaves and finds its files, its device, and how long it may take.

    Args:
        folder: of the results.
        source: of the four files of Fashion-MNIST.
        end: when the part is ended, in seconds since the epoch.
    """

    folder: Path
    device: str
    source: str
    end: float
    is_small: bool

    @property
    def seconds_left(self) -> float:
        """Return for how long the part may still measure, and end before it is ended."""
        return self.end - time.time() - 3


# Yields the rows of a part that is none of step.py's and peers.py's, without those that are done.
OwnRows = Callable[[Task, Sequence[Row]], Iterator[list[Row]]]


@dataclass(frozen=True)
class Part:
    """What one process measures: the tests, steps of a network, other libraries, or its own rows.

    Args:
        seconds: how many have to be left for the part to be begun on a GPU.
        network: a name of :data:`LARGE` or :data:`step.NETWORKS`, of :data:`peers.NETWORKS`, or of
            :data:`gpu_large.SETTINGS`; none: the tests.
        libraries: the libraries that are measured in the place of metapl's steps.
        student_steps: how many the gradient of these libraries looks ahead.
        own_rows: what is measured in the place of steps, by a file of its own.
        limit: the most seconds that the part takes, where these are not ``--most``.
    """

    seconds: float
    network: str = ""
    precision: str = "float32"
    modes: tuple[str, ...] = MODES
    ways: tuple[str, ...] = (EAGER,)
    libraries: tuple[str, ...] = ()
    student_steps: int = 1
    own_rows: OwnRows | None = None
    limit: float | None = None


CHANNELS_LAST = "WRN-28-2, channels-last"
SHARE = "share of the card"
BY_GRAPHS = (card.OURS, card.OURS_BY_GRAPHS, card.PLAIN, card.PLAIN_BY_GRAPHS)
SMALL_WAYS = (card.OURS, card.OURS_BY_GRAPHS, card.REPLAY, card.PLAIN)
# Network, precision and ways, the most worth first.
SHARES = (
    (CHANNELS_LAST, "bf16", BY_GRAPHS),
    ("mlp", "float32", SMALL_WAYS),
    (CHANNELS_LAST, "bf16", (card.PLAIN_COMPILED,)),
    ("causal LM, 124 M", "bf16", BY_GRAPHS),
    ("ViT-S", "bf16", BY_GRAPHS),
    ("ResNet-50", "bf16", BY_GRAPHS),
    ("EfficientNet-B0", "bf16", BY_GRAPHS),
    ("transformer", "float32", SMALL_WAYS),
    ("causal LM, 124 M", "bf16", (card.PLAIN_COMPILED,)),
    ("ViT-S", "bf16", (card.PLAIN_COMPILED,)),
    ("ResNet-50", "bf16", (card.PLAIN_COMPILED,)),
    ("mlp", "float32", (card.OURS_COMPILED,)),
    ("transformer", "float32", (card.OURS_COMPILED,)),
    (CHANNELS_LAST, "bf16", (card.OURS_COMPILED,)),
)
# Without compiling, which would be most of a miniature.
SHARES_OF_MINIATURE = ((CHANNELS_LAST, "bf16", BY_GRAPHS), ("mlp", "float32", SMALL_WAYS))


def shares_of_card(task: Task, done: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield the rows of :func:`card.measure`.

    All networks are in one process: to begin one takes as long as to measure a network.
    """
    for network, precision, ways in SHARES_OF_MINIATURE if task.is_small else SHARES:
        if network in LARGE:
            make = SMALL if task.is_small else LARGE[network]
        else:
            make = step.NETWORKS["tiny" if task.is_small else network].make
        share = card.Share(network, make, precision, ways)
        yield from card.measure(share, done, task.device, is_small=task.is_small)


def arms_of_fashion(task: Task, done: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield what the arms of fashion-4k reach, which share the card."""
    folder = task.folder / "fashion-4k"
    source = task.source
    if task.is_small:
        source = str(folder / "noise")
        Path(source).mkdir(parents=True, exist_ok=True)
        protocol_rows.write_noise(Path(source))
    together = fashion_protocol.Together(
        folder=folder, source=source, seconds=task.seconds_left, is_small=task.is_small
    )
    yield from together.rows(done)


def training_of_gpt2(task: Task, done: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield what the attribution of a whole training of GPT-2 takes."""
    yield from gpt2_training.rows(
        done, device=task.device, seconds=task.seconds_left, is_small=task.is_small
    )


def training_beside_bare_step(task: Task, done: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield how much of a bare step's rate the papers' protocol has."""
    yield from end_to_end.rows(done, device=task.device, source=task.source, is_small=task.is_small)


def filling(name: str) -> Part:
    """Return the part of a setting of :mod:`gpu_large`."""
    # The first step of EfficientNet-L2 took 46 s, seven of its later ones.
    limit = 150 if name == gpu_large.L2 else 75
    return Part(30, name, precision="bf16", modes=gpu_large.MODES[name], limit=limit)


LIBRARIES = (
    peers.FORWARD,
    peers.UNROLLED,
    peers.HAND,
    *(name for name, (_, gradient) in peers.PEERS.items() if gradient),
)
# The quickest first, since what a part has measured stays where it is stopped.
TEN_AHEAD = (
    peers.FORWARD,
    peers.HAND,
    peers.UNROLLED,
    "TorchOpt 0.7.3",
    "higher 0.2.1",
    "BOAT 1.1.1",
)
GPT2 = "GPT-2, whole training"
FASHION = "fashion-4k, five arms"
END_TO_END = "protocol, end to end"
PARTS: dict[str, Part] = {
    TESTS: Part(60),
    "compiled mlp": Part(50, "mlp", modes=("forward", "reinforce"), ways=(EAGER, COMPILED)),
    "compiled transformer": Part(75, "transformer", modes=("forward",), ways=(EAGER, COMPILED)),
    "WRN-28-2, bf16": Part(40, "WRN-28-2", precision="bf16"),
    "WRN-28-2, channels-last, bf16": Part(30, CHANNELS_LAST, precision="bf16", modes=("forward",)),
    SHARE: Part(30, own_rows=shares_of_card, limit=240),
    GPT2: Part(85, own_rows=training_of_gpt2, limit=gpt2_training.SECONDS),
    END_TO_END: Part(30, own_rows=training_beside_bare_step, limit=60),
    FASHION: Part(90, own_rows=arms_of_fashion, limit=fashion_protocol.SECONDS),
    **{f"{name}, bf16": Part(45, name, precision="bf16") for name in LARGER},
    **{name: filling(name) for name in (gpu_large.L2, gpu_large.TABLE, gpu_large.PAIR)},
    **{
        f"ten steps ahead, {name}": Part(30, name, libraries=TEN_AHEAD, student_steps=10, limit=60)
        for name in ("transformer", "MLP", peers.CAUSAL)
    },
    **{
        f"other libraries, {name}": Part(40, name, libraries=LIBRARIES)
        for name in ("transformer", "WRN-28-2", "MLP")
    },
    **{name: filling(name) for name in gpu_large.ATTENTION},
    **{f"{name}, float32": Part(45, name) for name in ("WRN-28-2", *LARGER)},
    "compiled WRN-28-2": Part(
        85, CHANNELS_LAST, precision="bf16", modes=("forward",), ways=(COMPILED,)
    ),
}
OF_MINIATURE = (
    TESTS,
    SHARE,
    END_TO_END,
    "compiled mlp",
    "WRN-28-2, bf16",
    GPT2,
    FASHION,
    gpu_large.TABLE,
    "ten steps ahead, MLP",
    "other libraries, MLP",
    "WRN-28-2, float32",
)


def tests(report: Path, *, is_small: bool) -> list[Row]:
    """Run the tests that are marked gpu, in four processes if pytest-xdist is installed.

    A miniature runs one test.
    """
    files = [
        path
        for path in sorted(ROOT.glob("tests/*/test_*.py"))
        if "pytest.mark.gpu" in path.read_text()
    ]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
    # pytest-benchmark, where it is installed, warns beside pytest-xdist, and warnings are errors
    # here.
    command += ["-p", "no:benchmark"]
    if is_small:
        command += ["-k", SMALL_TEST]
    elif importlib.util.find_spec("xdist"):
        command += ["-n", "4", "--dist", "worksteal"]
    # Four processes with a thread for each core would wait for each other.
    threads = {"OMP_NUM_THREADS": "2"}
    subprocess.run([*command, *map(str, files)], cwd=ROOT, env=threads | os.environ, check=False)
    cases = list(ET.parse(report).iter("testcase"))
    failed = [
        c.get("name", "")
        for c in cases
        if c.find("failure") is not None or c.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - skipped - len(failed)
    return [{"passed": passed, "skipped": skipped, "failed": failed, "measured_on": environment()}]


def steps(part: Part, done: Sequence[Row], device: str, *, is_small: bool) -> Iterator[list[Row]]:
    """Yield the rows of :func:`step.measure` mode by mode, without those ``done``.

    What stops is a row with a reason. Each way takes turns with the same by hand.
    """
    for name, make in LARGE.items():
        step.NETWORKS[name] = Network(name, 1, SMALL if is_small else make)
    network = "tiny" if is_small and COMPILED in part.ways else part.network
    rounds = 1 if is_small else ROUNDS.get(part.network, 11)
    # Compiling is most of a miniature.
    modes = part.modes[:1] if is_small and COMPILED in part.ways else part.modes
    for mode, way in itertools.product(modes, part.ways):
        if any((row["mode"], row["way"]) == (mode, way) for row in done):
            continue
        try:
            yield step.measure(network, mode, (way,), rounds, Place(device, part.precision))
        except (RuntimeError, metapl.MetaplError) as error:
            reason = str(error).strip().splitlines()[0][:160]
            yield [{"mode": mode, "way": way, "reason": reason, "measured_on": environment()}]


def libraries(
    part: Part, done: Sequence[Row], device: str, *, is_small: bool
) -> Iterator[list[Row]]:
    """Yield a row of :func:`peers.measure` for each library that is installed here.

    All run in one process, without TF32.
    """
    chosen = part.libraries[:1] if is_small else part.libraries
    ahead = part.student_steps
    with tempfile.TemporaryDirectory() as folder, Place(device, "float32").active():
        truth = str(Path(folder) / "truth.pt")
        peers.measure(peers.TRUTH, part.network, ahead, calls=0, truth=truth, device=device)
        for library in chosen:
            if any(row["library"] == library for row in done):
                continue
            packages = peers.PEERS[library][0] if library in peers.PEERS else ()
            modules = {"boat-torch": "boat_torch"}
            names = [package.partition("==")[0] for package in packages]
            lacking = [
                name for name in names if importlib.util.find_spec(modules.get(name, name)) is None
            ]
            row: Row = {"library": library, "network": part.network, "student_steps": ahead}
            row["measured_on"] = environment()
            if lacking:
                yield [row | {"reason": f"{', '.join(lacking)} is not installed"}]
                continue
            calls = 1 if is_small else max(3, 10 // ahead)
            try:
                measured = peers.measure(
                    library, part.network, ahead, calls=calls, truth=truth, device=device
                )
                yield [row | measured]
            # Another library may raise any error, and its text is the row.
            except Exception as error:
                yield [
                    row | {"reason": f"stops: {type(error).__name__}: {str(error).strip()[:120]}"}
                ]


def shown(part: str, row: Row) -> list[str]:
    """Return the cells of a row: what was measured, the result, the goal."""
    if part == TESTS:
        failed = f": {', '.join(row['failed'])}" if row["failed"] else ""
        return [
            "tests on the device",
            f"{row['passed']} passed, {len(row['failed'])} failed{failed}",
            "none failed",
        ]
    if part == GPT2:
        what = f"{part}: {gpt2_training.NAMES[row['what']]}"
        return [f"{what}, {gpt2_training.in_words(row)}", gpt2_training.remark(row), ""]
    if part == END_TO_END:
        return end_to_end.shown(row)
    if part == FASHION:
        teacher, student, finetuned = fashion_protocol.cells([row])
        result = f"student {student} %, finetuned {finetuned}, teacher {teacher}"
        return [f"{part}: {row['arm']}, {row['steps']:,} steps", result, ""]
    if "setting" in row:
        return gpu_large.shown(row)
    if "library" in row:
        what = f"{part}: {row['library']}"
    elif "mode" in row:
        what = f"{part}: `{row['mode']}`, {row['way']}"
    else:
        what = f"{part}: {row['network']}, {row['way']}"
    if "reason" in row:
        return [what, row["reason"], ""]
    if "share" in row:
        return [what, card.shown(row), ""]
    if "library" in row:
        result = (
            f"{1e3 * row['seconds']:.3g} ms, {row['bytes'] / 1e6:.3g} MB, error {row['error']:.1e}"
        )
        return [what, result, ""]
    result = (
        f"{row['ratio']:.2f} of by hand, memory {row['bytes'] / max(1, row['bytes_by_hand']):.2f}"
    )
    if "cold_seconds" in row:
        result += f", first step {row['cold_seconds']:.0f} s"
    goal = "1.10" if row["way"] == EAGER else ""
    return [f"{what}, {1e3 / row['ms']:.3g} steps a second", result, goal]


def file_of(name: str, folder: Path) -> Path:
    return folder / f"{name.replace(', ', '-').replace(' ', '_')}.json"


def unfinished(name: str, folder: Path) -> Path:
    """Return the file of the rows that a part has measured so far."""
    return file_of(name, folder).with_suffix(".part")


def measure(name: str, task: Task) -> None:
    """Measure a part in this process, and write its rows as they come."""
    part = PARTS[name]
    folder = task.folder
    partial_file = unfinished(name, folder)
    rows = loaded(partial_file) if partial_file.exists() else []
    if name == TESTS:
        rows = tests(folder / "tests.xml", is_small=task.is_small)
    else:
        for new in rows_of(part, task, list(rows)):
            rows += new
            write_json(partial_file, rows)
    write_json(file_of(name, folder), rows)
    partial_file.unlink(missing_ok=True)


def rows_of(part: Part, task: Task, done: Sequence[Row]) -> Iterator[list[Row]]:
    """Return the rows of a part that are not done, one measurement after the other."""
    if part.own_rows is not None:
        return part.own_rows(task, done)
    if part.libraries:
        return libraries(part, done, task.device, is_small=task.is_small)
    if part.network in gpu_large.SETTINGS:
        return gpu_large.rows(part, done, task.device, is_small=task.is_small)
    return steps(part, done, task.device, is_small=task.is_small)


def run_part(command: Sequence[str], name: str, folder: Path, *, seconds: float) -> None:
    """Run the process of a part until it is done, again where it failed behind new rows.

    Args:
        seconds: until it is killed.
    """
    end = time.perf_counter() + seconds
    rows_before = -1
    rows = 0
    while rows > rows_before and not file_of(name, folder).exists():
        left = end - time.perf_counter()
        if left <= 0:
            return
        rows_before = rows
        log_file = file_of(name, folder).with_suffix(".log")
        with log_file.open("w") as log, suppress(subprocess.TimeoutExpired):
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=left, check=False)
        partial_file = unfinished(name, folder)
        rows = len(loaded(partial_file)) if partial_file.exists() else 0


def table(folder: Path) -> str:
    """Return the table of the parts that are done, and of what became of the others."""
    lines: list[Any] = []
    made = loaded(folder / "made_with.json")
    for name in OF_MINIATURE if made["miniature"] else PARTS:
        done = file_of(name, folder)
        log = done.with_suffix(".log")
        if done.exists():
            lines += [shown(name, row) for row in loaded(done)]
            continue
        if unfinished(name, folder).exists():
            lines += [shown(name, row) for row in loaded(unfinished(name, folder))]
        last = log.read_text().strip().splitlines()[-1:] if log.exists() else []
        lines.append([name, f"failed: {last[0][:160]}" if last else "not measured", ""])
    text = grid(["what", "result", "goal"], lines, "lll").replace("|  |", "| |")
    switches = ", ".join(f"{name} {value}" for name, value in made.get("switches", {}).items())
    commit = made.get("commit") or "unknown"
    return (
        f"{text}\n\n{made['gpu']}, {made['processor']}, torch {made['torch']}, commit {commit}; "
        f"{switches}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/gpu"),
        metavar="DIR",
        help="the folder of the results",
    )
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="of this call, which the next one goes on from"
    )
    parser.add_argument("--most", type=float, default=MOST, metavar="SECONDS", help="of a part")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: with --miniature"
    )
    parser.add_argument(
        "--miniature", action="store_true", help="everything small; its figures mean nothing"
    )
    parser.add_argument(
        "--table", type=Path, metavar="DIR", help="print the table of a folder and stop"
    )
    parser.add_argument(
        "--source",
        default=fashion_protocol.DEBIAN,
        metavar="DIR",
        help="the folder of Fashion-MNIST's four files",
    )
    parser.add_argument("--part", choices=PARTS, help="this one, in this process")
    parser.add_argument(
        "--end", type=float, metavar="TIME", help="of --part, in seconds since the epoch"
    )
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="the parts whose names begin so, such as share"
    )
    parser.add_argument(
        "--plan", action="store_true", help="plan the memory of gpu_large.py on a CPU and stop"
    )
    options = parser.parse_args()
    if options.plan:
        old = loaded(gpu_large.PLAN) if gpu_large.PLAN.exists() else {}
        for plans in gpu_large.plan_all(old):
            write_json(gpu_large.PLAN, plans)
        text = gpu_large.table(loaded(gpu_large.PLAN), gpu_large.committed_rows())
        gpu_large.TABLE_OF_PLAN.write_text(text)
        return
    if options.table:
        print(table(options.table))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "there is no CUDA device; --device cpu --miniature runs everything small on the CPU"
        )
    if options.device == "cpu" and not options.miniature:
        parser.error("on the CPU there is the miniature alone; give --miniature as well")
    is_small = options.miniature
    if options.part:
        task = Task(
            folder=options.out,
            device=options.device,
            source=options.source,
            end=options.end or time.time() + options.most,
            is_small=is_small,
        )
        measure(options.part, task)
        return
    end = time.perf_counter() + 60 * options.minutes
    write_json(options.out / "made_with.json", {**environment(), "miniature": is_small})
    for name in OF_MINIATURE if is_small else PARTS:
        done = file_of(name, options.out)
        left = end - time.perf_counter()
        needed = 1 if is_small else PARTS[name].seconds
        if done.exists() or left < needed or not name.startswith(options.only):
            continue
        print(f"{name} ...", flush=True)
        limit = options.most if PARTS[name].limit is None else PARTS[name].limit
        limit = left if is_small else min(left, limit)
        arguments = ["--part", name, "--out", options.out, "--device", options.device]
        arguments += ["--source", options.source, "--end", time.time() + limit]
        command = [sys.executable, __file__, *map(str, arguments)]
        if is_small:
            command.append("--miniature")
        run_part(command, name, options.out, seconds=limit)
    print(table(options.out))


if __name__ == "__main__":
    main()
