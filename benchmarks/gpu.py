"""What a GPU has to show, the cheapest first, in one command that goes on where it was stopped.

    python benchmarks/gpu.py --minutes 9 --out runs/gpu    # make gpu; again: what is missing
    python benchmarks/gpu.py --table runs/gpu
    python benchmarks/gpu.py --device cpu --miniature --minutes 4 --out DIR    # that it runs; its figures mean nothing

Each part has a process of its own, which is killed when the minutes are over, and a file of the folder when it is done:
the compiled step beside the eager one, and by CUDA graphs (``compile="reduce-overhead"``); the tests that pytest calls
``gpu``; whole steps of larger networks in float32 and bfloat16. Steps are measured as ``step.py`` does it, beside the
same by hand. A part that failed leaves what it printed, and is run again by the next call. Every mode on WRN-28-2, and
other libraries: ``modes.py`` and ``peers.py``, which run on the GPU too.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import step
import torch
import torchvision
from harness import Row, environment, grid, loaded, write_json
from modes import Place
from peers import CausalLM
from step import COMPILED, EAGER, GRAPHS, MODES, Network
from torch import nn

import metapl

ROOT = Path(__file__).parents[1]
TESTS = "tests"


def large(
    build: Callable[[], nn.Module], shape: tuple[int, ...], labeled: int, unlabeled: int, words: int = 0
) -> tuple[step.Pair, step.Data]:
    """A pair and its batches, of words where there are any."""
    torch.manual_seed(0)
    pair, sizes = (build(), build()), ((labeled, *shape), (unlabeled, *shape))
    x, u = (torch.randint(words, size) if words else torch.rand(size) for size in sizes)
    return pair, ((x, torch.arange(labeled) % 10), u)


VIT: Row = {"num_layers": 12, "num_heads": 6, "hidden_dim": 384, "mlp_dim": 1536, "num_classes": 10}
LM: Row = {"words": 50257, "width": 768, "depth": 12, "length": 512, "head": 64, "outputs": 50257}
LARGE = {
    "WRN-28-2": partial(large, metapl.models.wide_resnet28_2, (3, 32, 32), 128, 896),
    "ViT-S": partial(large, partial(torchvision.models.VisionTransformer, 224, 16, **VIT), (3, 224, 224), 32, 128),
    "causal LM, 124 M": partial(large, partial(CausalLM, **LM), (512,), 8, 8, words=50257),
    "ResNet-50": partial(large, partial(torchvision.models.resnet50, num_classes=10), (3, 224, 224), 32, 128),
}
COMPARED = ("mlp", "transformer", "WRN-28-2")  # of the first a step is nothing but the host's overhead
SMALL = partial(large, metapl.models.small_cnn, (3, 16, 16), 2, 6)  # of a miniature, which has a part of each kind

PARTS: dict[str, tuple[float, tuple[str, str, tuple[str, ...], tuple[str, ...]]]] = {
    **{
        f"compiled {name}": (seconds, (name, "float32", MODES[:1], (EAGER, COMPILED, GRAPHS)))
        for name, seconds in zip(COMPARED, (60, 120, 210), strict=True)
    },
    TESTS: (90, ("", "", (), ())),
    **{
        f"{name}, {precision}": (45, (name, precision, MODES, (EAGER,)))
        for name, precision in itertools.product(LARGE, ("float32", "bf16"))
    },
}
"""The seconds that a part has to have left on a GPU; network, precision, modes and ways."""
OF_MINIATURE = ("compiled mlp", TESTS, "WRN-28-2, float32", "WRN-28-2, bf16")


def tests(report: Path, some: Sequence[str]) -> list[Row]:
    files = [path for path in sorted(ROOT.glob("tests/*/test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    asked = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    subprocess.run([*asked, *some, *map(str, files)], cwd=ROOT, check=False)
    cases = list(ET.parse(report).iter("testcase"))
    failed = [c.get("name", "") for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return [{"passed": len(cases) - skipped - len(failed), "skipped": skipped, "failed": failed}]


def steps(
    network: str, precision: str, modes: Sequence[str], ways: Sequence[str], device: str, small: bool
) -> list[Row]:
    """The rows of :func:`step.measure`, of each mode and way by itself; what stops is one of them."""
    step.NETWORKS |= {name: Network(name, 1, SMALL if small else make) for name, make in LARGE.items()}
    network = "tiny" if small and GRAPHS in ways else network
    rows = list[Row]()
    for mode, way in itertools.product(modes, ways):
        try:
            rows += step.measure(network, mode, (way,), 1 if small else 11, Place(device, precision))
        except (RuntimeError, metapl.MetaplError) as error:
            rows.append({"mode": mode, "way": way, "reason": str(error).strip().splitlines()[0][:160]})
    return rows


def told(part: str, row: Row) -> list[str]:
    """What, the result, the goal."""
    if part == TESTS:
        failed = f": {', '.join(row['failed'])}" if row["failed"] else ""
        return ["tests on the device", f"{row['passed']} passed, {len(row['failed'])} failed{failed}", "none failed"]
    if "reason" in row:
        return [f"{part}: `{row['mode']}`, {row['way']}", row["reason"], ""]
    result = f"{row['ratio']:.2f} of by hand, memory {row['bytes'] / max(1, row['bytes_by_hand']):.2f}"
    result += f", first step {row['cold_seconds']:.0f} s" if "cold_seconds" in row else ""
    what = f"{part}: `{row['mode']}`, {row['way']}, {1e3 / row['ms']:.3g} steps a second"
    return [what, result, "1.10" if row["way"] == EAGER else ""]


def file_of(name: str, folder: Path) -> Path:
    return folder / f"{name.replace(', ', '-').replace(' ', '_')}.json"


def table(folder: Path) -> str:
    """The parts that are done, and what became of the others."""
    lines: list[Any] = []
    made = loaded(folder / "made_with.json")
    for name in OF_MINIATURE if made["miniature"] else PARTS:
        done = file_of(name, folder)
        log = done.with_suffix(".log")
        if done.exists():
            lines += [told(name, row) for row in loaded(done)]
        else:
            last = log.read_text().strip().splitlines()[-1:] if log.exists() else []
            lines.append([name, f"failed: {last[0][:160]}" if last else "not measured", ""])
    shown = grid(["what", "result", "goal"], lines, "lll").replace("|  |", "| |")
    return f"{shown}\n\n{made['gpu']}, {made['processor']}, torch {made['torch']}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="the folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call, which the next one goes on from")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: with --miniature")
    parser.add_argument("--miniature", action="store_true", help="everything small; its figures mean nothing")
    parser.add_argument("--table", type=Path, metavar="DIR", help="print the table of a folder and stop")
    parser.add_argument("--part", choices=PARTS, help="this one, in this process")
    given = parser.parse_args()
    if given.table:
        print(table(given.table))
        return
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --miniature runs everything small on the CPU")
    if given.device == "cpu" and not given.miniature:
        parser.error("on the CPU there is the miniature alone; give --miniature as well")
    end, small = time.perf_counter() + 60 * given.minutes, given.miniature
    if given.part:
        of = PARTS[given.part][1]
        some = ["-k", "replays_see"] if small else []
        rows = tests(given.out / "tests.xml", some) if given.part == TESTS else steps(*of, given.device, small)
        write_json(file_of(given.part, given.out), rows)
        return
    write_json(given.out / "made_with.json", {**environment(), "miniature": small})
    for name in OF_MINIATURE if small else PARTS:
        seconds = PARTS[name][0]
        done, left = file_of(name, given.out), end - time.perf_counter()
        if done.exists() or left < (1 if small else seconds):
            continue
        print(f"{name} ...", flush=True)
        options = ["--part", name, "--out", given.out, "--minutes", left / 60, "--device", given.device]
        asked = [sys.executable, __file__, *map(str, options), *["--miniature"] * small]
        with done.with_suffix(".log").open("w") as log, suppress(subprocess.TimeoutExpired):
            subprocess.run(asked, stdout=log, stderr=subprocess.STDOUT, timeout=left, check=False)
    print(table(given.out))


if __name__ == "__main__":
    main()
