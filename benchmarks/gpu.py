"""What a GPU has to show, the cheapest first, in one command that goes on where it was stopped.

    python benchmarks/gpu.py --minutes 9 --out runs/gpu    # make gpu; again: what is missing
    python benchmarks/gpu.py --table runs/gpu
    python benchmarks/gpu.py --device cpu --miniature --minutes 4 --out DIR    # that it runs; its figures mean nothing

Each part has a process of its own, which is killed when the minutes are over, and a file of the folder when it is done:
the compiled step beside the eager one, and by CUDA graphs (``compile="reduce-overhead"``); the tests that pytest calls
``gpu``; whole steps of every mode beside their own passes and beside double backward. A part that failed leaves what it
printed, and is run again by the next call. Other libraries: ``peers.py``, which runs on the GPU too.

Of a step, everything that is compared takes turns in one process, and figures are medians over turns of the ratios
within a turn. *Passes* are what a mode cannot do without, run by hand: forward and backward passes of both networks and
passes with dual numbers, without optimizers. Double backward is a whole step with the same optimizers.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from harness import Row, described, grid, loaded, write_json
from modes import Place
from peers import CausalLM, Tokens, by_hand
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import metapl
from metapl.ablation.cost import peak_bytes

HERE = Path(__file__).parent
ROOT = HERE.parent
RATE = 0.01
MODES = ("none", "loss_difference", "reinforce", "difference", "forward", "unrolled")

Told = tuple[str, str, str]  # what, the result, the goal


class Setting(NamedTuple):
    """What a part is told."""

    device: str
    miniature: bool
    folder: Path


class Part(NamedTuple):
    """A result of its own, which is not begun with fewer seconds left on a GPU."""

    seconds: float
    run: Callable[[Setting], Row]
    told: Callable[[Row], Iterator[Told]]


def tests(setting: Setting) -> Row:
    files = [path for path in sorted(ROOT.glob("tests/*/test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    some = ["-k", "replays_see"] if setting.miniature else []
    report = setting.folder / "tests.xml"
    asked = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    subprocess.run([*asked, *some, *map(str, files)], cwd=ROOT, check=False)
    cases = list(ET.parse(report).iter("testcase"))
    failed = [c.get("name", "") for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - skipped - len(failed), "skipped": skipped, "failed": failed}


def told_tests(row: Row) -> Iterator[Told]:
    failed = f": {', '.join(row['failed'])}" if row["failed"] else ""
    yield "tests on the device", f"{row['passed']} passed, {len(row['failed'])} failed{failed}", "none failed"


class Subject(NamedTuple):
    """Networks of a kind, the shape of an example, of words where there are any, and the sizes of both batches."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    labeled: int
    unlabeled: int
    words: int = 0


VIT: Row = {"num_layers": 12, "num_heads": 6, "hidden_dim": 384, "mlp_dim": 1536, "num_classes": 10}
LM: Row = {"words": 50257, "width": 768, "depth": 12, "length": 512, "head": 64, "outputs": 50257}
MLP = Subject(lambda: metapl.models.mlp([64, 64, 10]), (64,), 64, 64)  # a step is nothing but the host's overhead
TINY = Subject(lambda: nn.Linear(8, 10), (8,), 4, 4)
SMALL_CNN = Subject(lambda: metapl.models.small_cnn(), (3, 16, 16), 2, 6)
SMALL_VIT: Row = {"num_layers": 1, "num_heads": 1, "hidden_dim": 32, "mlp_dim": 128, "num_classes": 10}
WRN = Subject(metapl.models.wide_resnet28_2, (3, 32, 32), 128, 896)
NETWORKS: dict[str, tuple[Subject, Subject]] = {  # and in miniature
    "WRN-28-2": (WRN, SMALL_CNN),
    "ViT-S": (
        Subject(partial(torchvision.models.VisionTransformer, 224, 16, **VIT), (3, 224, 224), 32, 128),
        Subject(partial(torchvision.models.VisionTransformer, 32, 16, **SMALL_VIT), (3, 32, 32), 2, 4),
    ),
    "causal LM, 124 M": (
        Subject(partial(CausalLM, **LM), (512,), 8, 8, words=50257),
        Subject(CausalLM, (32,), 4, 4, words=256),
    ),
    "ResNet-50": (Subject(partial(torchvision.models.resnet50, num_classes=10), (3, 224, 224), 32, 128), SMALL_CNN),
}
COMPILED = {"MLP": (MLP, TINY), "transformer": (Subject(Tokens, (16, 8), 32, 32), TINY), "WRN-28-2": (WRN, TINY)}
PASSES: dict[str, dict[str, int]] = {
    "none": {"teacher reads": 1, "student": 1},
    "loss_difference": {"teacher": 1, "student": 1, "outer reads": 2},
    "reinforce": {"teacher": 1, "student": 1, "outer": 1},
    "difference": {"teacher": 1, "student": 1, "outer": 1, "student reads": 2},
    "forward": {"teacher": 1, "student": 1, "outer": 1, "dual": 1},
}
"""What a mode cannot do without; of ``unrolled`` there is no such list, it is double backward."""


class Bench:
    """All that takes turns, on one subject; each way has networks of its own, with the same weights at first."""

    def __init__(self, subject: Subject, place: Place) -> None:
        torch.manual_seed(0)
        self.place, device = place, place.device
        self.teacher, self.student = (subject.build().to(device) for _ in range(2))
        if len(subject.shape) == 3:
            self.teacher, self.student = (
                network.to(memory_format=torch.channels_last) for network in (self.teacher, self.student)
            )
        sizes = ((n, *subject.shape) for n in (subject.labeled, subject.unlabeled))
        self.x, self.u = (
            torch.randint(subject.words, size, device=device) if subject.words else torch.rand(size, device=device)
            for size in sizes
        )
        self.y = torch.arange(subject.labeled, device=device) % 10
        self.along = {name: torch.randn_like(p) for name, p in self.student.named_parameters()}
        self.optimizers = [torch.optim.SGD(n.parameters(), RATE) for n in (self.teacher, self.student)]
        passes = {
            "teacher": (self.teacher, self.u, False),
            "student": (self.student, self.u, False),
            "outer": (self.student, self.x, True),
        }
        self.runs: dict[str, Callable[[], Any]] = {
            **{name: partial(self.passed, *of, backward=True) for name, of in passes.items()},
            **{f"{name} reads": partial(self.passed, *of, backward=False) for name, of in passes.items()},
            "dual": self.dual,
            **{mode: self.step(mode) for mode in MODES},
            "double backward": self.double_backward,
        }

    def passed(self, network: nn.Module, x: Tensor, outer: bool, backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            outputs = network(x).float()
            loss = F.cross_entropy(outputs, self.y) if outer else outputs.square().mean()
        if backward:
            torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)

    def dual(self) -> None:
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            duals = {n: forward_ad.make_dual(p, self.along[n]) for n, p in self.student.named_parameters()}
            forward_ad.unpack_dual(functional_call(self.student, duals, (self.u,)))

    def step(self, mode: str, **options: Any) -> Callable[[], Any]:
        teacher, student = copy.deepcopy(self.teacher), copy.deepcopy(self.student)
        inner, outer = (torch.optim.SGD(network.parameters(), RATE) for network in (student, teacher))
        options |= {"inner_optimizer": inner, "outer_optimizer": outer, "teacher_losses": ()}
        trainer = metapl.BilevelTrainer(teacher, student, mode, **options)
        return lambda: trainer.step((self.x, self.y), self.u)

    def double_backward(self) -> None:
        with sdpa_kernel(SDPBackend.MATH):
            grads = by_hand(self.teacher, self.student, (self.x, self.y), self.u, 1)
        for p, g in zip(self.teacher.parameters(), grads, strict=True):
            p.grad = g.detach()
        for p in self.student.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for optimizer in self.optimizers:
            optimizer.step()

    def seconds(self, run: Callable[[], Any]) -> float:
        self.place.wait()
        start = time.perf_counter()
        with self.place.active():
            run()
        self.place.wait()
        return time.perf_counter() - start

    def measured(self, seconds: float) -> Row:
        """Seconds of each in each turn, and the most memory that each takes."""
        found, first, failed = dict[str, list[float]](), dict[str, float](), dict[str, str]()
        for name, run in list(self.runs.items()):
            try:
                first[name] = self.seconds(run)
                for _ in range(2):  # a CUDA graph is recorded in the second call
                    self.seconds(run)
            except (RuntimeError, metapl.MetaplError) as error:
                failed[name] = str(error).strip().splitlines()[0][:160]
                del self.runs[name]
        began = time.perf_counter()
        while len(next(iter(found.values()), [])) < 21 and (not found or time.perf_counter() - began < seconds):
            for name, run in self.runs.items():
                found.setdefault(name, []).append(self.seconds(run))
        on = torch.device(self.place.device)
        memory = {name: peak_bytes(partial(self.seconds, run), on) for name, run in self.runs.items()}
        return {"seconds": found, "first": first, "bytes": memory, "failed": failed}


def compiled(network: str, setting: Setting) -> Row:
    """The same step eager, compiled and by CUDA graphs, and double backward by hand."""
    bench = Bench(COMPILED[network][setting.miniature], Place(setting.device, "float32"))
    bench.runs = {name: bench.runs[name] for name in ("forward", "double backward")} | {
        "compiled": bench.step("forward", compile=True),
        "compiled, CUDA graphs": bench.step("forward", compile="reduce-overhead"),
    }
    return bench.measured(0 if setting.miniature else 20)


def told_compiled(name: str, row: Row) -> Iterator[Told]:
    seconds, memory = row["seconds"], row["bytes"]
    for way in (way for way in seconds if way.startswith("compiled")):
        of = {
            other: statistics.median(a / b for a, b in zip(seconds[way], seconds[other], strict=True))
            for other in ("forward", "double backward")
            if other in seconds
        }
        ratios = ", ".join(f"{ratio:.2f} of {other}" for other, ratio in of.items())
        rest = f"memory {memory[way] / max(1, memory['forward']):.2f}, first step {row['first'][way]:.0f} s"
        yield f"{name}: {way}, {1 / statistics.median(seconds[way]):.3g} steps a second", f"{ratios}, {rest}", ""
    for way, reason in row["failed"].items():
        yield f"{name}: {way}", reason, ""


def steps(network: str, precision: str, setting: Setting) -> Row:
    bench = Bench(NETWORKS[network][setting.miniature], Place(setting.device, precision))
    return bench.measured(0 if setting.miniature else 25)


def told_steps(name: str, row: Row) -> Iterator[Told]:
    seconds, memory = row["seconds"], row["bytes"]

    def ratio(of: str, parts: dict[str, int]) -> float:
        sums = [sum(n * seconds[part][turn] for part, n in parts.items()) for turn in range(len(seconds[of]))]
        return statistics.median(t / one for t, one in zip(seconds[of], sums, strict=True))

    for mode, parts in PASSES.items():
        if mode in seconds and parts.keys() <= seconds.keys():
            result = f"{ratio(mode, parts):.2f} of its passes, {memory[mode] / 1e6:.0f} MB"
            yield f"{name}: `{mode}`, {1 / statistics.median(seconds[mode]):.3g} steps a second", result, "1.10"
    for other in ("unrolled", "double backward"):
        if other in seconds and "forward" in seconds:
            less = memory[other] / max(1, memory["forward"])
            yield f"{name}: {other}", f"{ratio(other, {'forward': 1}):.2f} of `forward`, memory {less:.2f}", ""
    for other, reason in row["failed"].items():
        yield f"{name}: {other}", reason, ""


PARTS: dict[str, Part] = {
    **{
        f"compiled {network}": Part(seconds, partial(compiled, network), partial(told_compiled, network))
        for network, seconds in (("MLP", 60), ("transformer", 120), ("WRN-28-2", 210))
    },
    "tests": Part(90, tests, told_tests),
    **{
        f"{network}, {precision}": Part(
            45, partial(steps, network, precision), partial(told_steps, f"{network}, {precision}")
        )
        for network in NETWORKS
        for precision in ("float32", "bf16")
    },
}


def file_of(name: str, folder: Path) -> Path:
    return folder / f"{name.replace(', ', '-').replace(' ', '_')}.json"


def table(folder: Path) -> str:
    """The parts that are done, and what became of the others."""
    lines: list[Any] = []
    for name, part in PARTS.items():
        done = file_of(name, folder)
        log = done.with_suffix(".log")
        if done.exists():
            lines += part.told(loaded(done))
        else:
            last = log.read_text().strip().splitlines()[-1:] if log.exists() else []
            lines.append([name, f"failed: {last[0][:160]}" if last else "not measured", ""])
    made = loaded(folder / "made_with.json")
    shown = grid(["what", "result", "goal"], lines, "lll").replace("|  |", "| |")
    return f"{shown}\n\n{made['device']}, {made['cpu']}, torch {made['torch']}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="the folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call, which the next one goes on from")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: with --miniature, to see it run"
    )
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
    end = time.perf_counter() + 60 * given.minutes
    if given.part:
        setting = Setting(given.device, given.miniature, given.out)
        write_json(file_of(given.part, given.out), PARTS[given.part].run(setting))
        return
    write_json(given.out / "made_with.json", {**described(given.device), "miniature": given.miniature})
    for name, part in PARTS.items():
        done, left = file_of(name, given.out), end - time.perf_counter()
        if done.exists() or left < (1 if given.miniature else part.seconds):
            continue
        print(f"{name} ...", flush=True)
        options = ["--part", name, "--out", given.out, "--minutes", left / 60, "--device", given.device]
        asked = [sys.executable, __file__, *map(str, options), *["--miniature"] * given.miniature]
        with done.with_suffix(".log").open("w") as log, suppress(subprocess.TimeoutExpired):
            subprocess.run(asked, stdout=log, stderr=subprocess.STDOUT, timeout=left, check=False)
    print(table(given.out))


if __name__ == "__main__":
    main()
