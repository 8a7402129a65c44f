"""What a GPU has to show, the cheapest first, in one command that goes on where it was stopped.

    python benchmarks/gpu.py --minutes 9 --out runs/gpu    # make gpu; again: what is missing
    python benchmarks/gpu.py --table runs/gpu
    python benchmarks/gpu.py --device cpu --miniature --minutes 4 --out DIR    # that it runs; its figures mean nothing

Each part has a process of its own, which is killed when the minutes are over, and a file of the folder when it is done:
the compiled step beside the eager one, and by CUDA graphs (``compile="reduce-overhead"``); the tests that pytest calls
``gpu``; whole steps of every mode beside their own passes and beside other ways to the same gradient. A part that
failed leaves what it printed, and is run again by the next call.

Of a step, everything that is compared takes turns in one process, and figures are medians over turns of the ratios
within a turn. *Passes* are what a mode cannot do without, run by hand: forward and backward passes of both networks and
passes with dual numbers, without optimizers. Double backward, TorchOpt and the loop of the PyTorch port of Meta Pseudo
Labels (its signals only: no losses of the teacher's own) are whole steps with the same optimizers.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from harness import Row, described, grid, loaded, write_json
from modes import Place
from peers import CausalLM, Tokens
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

Told = tuple[str, str, str]  # what, the result, the goal


class Setting(NamedTuple):
    """What a part is told; the seconds are those that are left."""

    device: str
    miniature: bool
    seconds: float
    folder: Path


class Part(NamedTuple):
    """A result of its own, which is not begun with fewer seconds left on a GPU."""

    seconds: float
    run: Callable[[Setting], Row]
    told: Callable[[Row], Iterator[Told]]


def timed(run: Callable[[], Any], place: Place) -> float:
    place.wait()
    start = time.perf_counter()
    run()
    place.wait()
    return time.perf_counter() - start


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


@dataclass
class Subject:
    """Two networks, their batches, and both losses for those who do not call metapl."""

    teacher: nn.Module
    student: nn.Module
    labeled: Any
    unlabeled: Tensor
    inner_loss: Callable[[Tensor, Tensor], Tensor]  # of both networks' outputs on the unlabeled batch
    outer_loss: Callable[[Tensor], Tensor]
    problem: Any = None
    modes: Sequence[str] = ("none", "loss_difference", "reinforce", "difference", "forward", "unrolled")


def inputs(
    build: Callable[[], nn.Module], shape: tuple[int, ...], labeled: int, unlabeled: int, device: str
) -> Subject:
    teacher, student = (build().to(device) for _ in range(2))
    if len(shape) == 3:
        teacher, student = (network.to(memory_format=torch.channels_last) for network in (teacher, student))
    x, u = (torch.rand(n, *shape, device=device) for n in (labeled, unlabeled))
    y = torch.arange(labeled, device=device) % 10

    def inner(outputs: Tensor, taught: Tensor) -> Tensor:
        return F.cross_entropy(outputs.float(), taught.float().softmax(-1))

    return Subject(teacher, student, (x, y), u, inner, lambda outputs: F.cross_entropy(outputs.float(), y))


class Sequences(CausalLM):
    """With one output, a score of each sequence; else the logits behind each token."""

    def forward(self, ids: Tensor) -> Tensor:
        h = self.hidden(ids)
        scored: Tensor = self.head(h.mean(1))[:, 0] if self.head.out_features == 1 else self.head(h)
        return scored


def sequences(words: int, width: int, depth: int, length: int, rows: int, device: str) -> Subject:
    """A rater of sequences and a language model (:class:`metapl.problems.DataRater`)."""
    student = Sequences(words, width, depth, length, 64, words).to(device)
    teacher = Sequences(words, max(64, width // 4), max(1, depth // 3), length, 64, 1).to(device)
    ids, clean = (torch.randint(0, words, (rows, length), device=device) for _ in range(2))

    def losses(outputs: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(outputs[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none").mean(1)

    return Subject(
        *(teacher, student, clean, ids),
        lambda outputs, taught: (taught.float().softmax(0) * losses(outputs, ids)).sum(),
        lambda outputs: losses(outputs, clean).mean(),
        metapl.problems.DataRater(),
        ("none", "difference", "forward", "unrolled"),  # for signals that are not drawn
    )


def convolutional(build: Callable[[], nn.Module], side: int, labeled: int, unlabeled: int) -> Any:
    def subject(miniature: bool, device: str) -> Subject:
        if miniature:
            return inputs(lambda: metapl.models.small_cnn(), (3, 16, 16), 2, 6, device)
        return inputs(build, (3, side, side), labeled, unlabeled, device)

    return subject


def vit_small(miniature: bool, device: str) -> Subject:
    depth, width, side, few, many = (1, 32, 32, 2, 4) if miniature else (12, 384, 224, 32, 128)
    sizes: Row = {"num_layers": depth, "hidden_dim": width, "num_heads": max(1, width // 64), "mlp_dim": 4 * width}
    build = partial(torchvision.models.VisionTransformer, side, 16, num_classes=10, **sizes)
    return inputs(build, (3, side, side), few, many, device)


def causal_lm(miniature: bool, device: str) -> Subject:
    return sequences(50, 64, 1, 16, 4, device) if miniature else sequences(50257, 768, 12, 512, 8, device)


def perceptron(miniature: bool, device: str) -> Subject:
    """Of a step that is nothing but the host's overhead."""
    if miniature:
        return inputs(lambda: nn.Linear(8, 10), (8,), 4, 4, device)
    return inputs(lambda: metapl.models.mlp([64, 64, 10]), (64,), 64, 64, device)


def tokens(miniature: bool, device: str) -> Subject:
    return perceptron(True, device) if miniature else inputs(Tokens, (16, 8), 32, 32, device)


NETWORKS: dict[str, Callable[[bool, str], Subject]] = {
    "WRN-28-2": convolutional(metapl.models.wide_resnet28_2, 32, 128, 896),
    "ViT-S": vit_small,
    "causal LM, 124 M": causal_lm,
    "ResNet-50": convolutional(partial(torchvision.models.resnet50, num_classes=10), 224, 32, 128),
}
COMPILED: dict[str, Callable[[bool, str], Subject]] = {
    "MLP": perceptron,
    "transformer": tokens,
    "WRN-28-2": lambda miniature, device: (perceptron if miniature else NETWORKS["WRN-28-2"])(miniature, device),
}
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
        self.subject, self.place, self.failed = subject, place, dict[str, str]()
        self.along = {name: torch.randn_like(p) for name, p in subject.student.named_parameters()}
        self.optimizers = [torch.optim.SGD(n.parameters(), RATE) for n in (subject.teacher, subject.student)]
        teacher, student = subject.teacher, subject.student
        passes = {
            "teacher": (teacher, subject.unlabeled, False),
            "student": (student, subject.unlabeled, False),
            "outer": (student, _input(subject.labeled), True),
        }
        self.runs: dict[str, Callable[[], Any]] = {
            **{name: partial(self.passed, *of, backward=True) for name, of in passes.items()},
            **{f"{name} reads": partial(self.passed, *of, backward=False) for name, of in passes.items()},
            "dual": self.dual,
            "optimizers": self.moves,
            **{mode: self.step(mode) for mode in subject.modes},
            "double backward, default attention": partial(self.double_backward, nullcontext),
            "double backward": partial(self.double_backward, partial(sdpa_kernel, SDPBackend.MATH)),
            "port's loop": self.port,
        }
        if importlib.util.find_spec("torchopt"):
            self.runs["TorchOpt"] = self.torchopt

    def passed(self, network: nn.Module, x: Tensor, outer: bool, backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            outputs = network(x)
            loss = self.subject.outer_loss(outputs) if outer else outputs
        if backward:
            loss = loss if outer else loss.float().square().mean()
            torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)

    def dual(self) -> None:
        s = self.subject
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            duals = {n: forward_ad.make_dual(p, self.along[n]) for n, p in s.student.named_parameters()}
            forward_ad.unpack_dual(functional_call(s.student, duals, (s.unlabeled,)))

    def moves(self) -> None:
        for network in (self.subject.teacher, self.subject.student):
            for p in network.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for optimizer in self.optimizers:
            optimizer.step()

    def step(self, mode: str, **options: Any) -> Callable[[], Any]:
        s = self.subject
        teacher, student = copy.deepcopy(s.teacher), copy.deepcopy(s.student)
        inner, outer = (torch.optim.SGD(network.parameters(), RATE) for network in (student, teacher))
        options |= {"problem": s.problem, "inner_optimizer": inner, "outer_optimizer": outer, "teacher_losses": ()}
        trainer = metapl.BilevelTrainer(teacher, student, mode, **options)
        return lambda: trainer.step(s.labeled, s.unlabeled)

    def double_backward(self, kernel: Callable[[], Any]) -> None:
        s, params = self.subject, dict(self.subject.student.named_parameters())
        with kernel():
            loss = s.inner_loss(s.student(s.unlabeled), s.teacher(s.unlabeled))
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            moved = {name: p - RATE * g for (name, p), g in zip(params.items(), grads, strict=True)}
            outer = s.outer_loss(functional_call(s.student, moved, (_input(s.labeled),)))
            self._take(torch.autograd.grad(outer, list(s.teacher.parameters()), allow_unused=True), grads)

    def torchopt(self) -> None:
        import torchopt

        s, inner = self.subject, torchopt.MetaSGD(self.subject.student, lr=RATE)
        before = torchopt.extract_state_dict(s.student, by="reference", with_buffers=True)
        with sdpa_kernel(SDPBackend.MATH):
            inner.step(s.inner_loss(s.student(s.unlabeled), s.teacher(s.unlabeled)))
            outer = s.outer_loss(s.student(_input(s.labeled)))
            found = torch.autograd.grad(outer, list(s.teacher.parameters()), allow_unused=True)
        torchopt.recover_state_dict(s.student, before)
        self._take(found, None)

    def port(self) -> None:
        """The student's loss before and after its step weighs the teacher's: no gradient through the step."""
        s = self.subject
        taught, outputs = s.teacher(s.unlabeled), s.student(s.unlabeled)
        before = s.outer_loss(s.student(_input(s.labeled))).detach()
        grads = torch.autograd.grad(s.inner_loss(outputs, taught.detach()), list(s.student.parameters()))
        with torch.no_grad():
            torch._foreach_add_([*s.student.parameters()], grads, alpha=-RATE)
            change = s.outer_loss(s.student(_input(s.labeled))) - before
        loss = change * s.inner_loss(outputs.detach(), taught)
        self._take(torch.autograd.grad(loss, list(s.teacher.parameters()), allow_unused=True), None)

    def _take(self, of_teacher: Any, of_student: Any) -> None:
        for network, grads in ((self.subject.teacher, of_teacher), (self.subject.student, of_student)):
            if grads is not None:
                for p, g in zip(network.parameters(), grads, strict=True):
                    p.grad = None if g is None else g.detach()
        self.moves()

    def active(self, run: Callable[[], Any]) -> Any:
        with self.place.active():
            return run()

    def measured(self, seconds: float) -> Row:
        """Seconds of each in each turn, and the most memory that each takes."""
        found, first = dict[str, list[float]](), dict[str, float]()
        for name, run in list(self.runs.items()):
            try:
                first[name] = timed(partial(self.active, run), self.place)
                for _ in range(2):  # a CUDA graph is recorded in the second call
                    self.active(run)
            except (RuntimeError, metapl.MetaplError) as error:
                self.failed[name] = str(error).strip().splitlines()[0][:160]
                del self.runs[name]
        began = time.perf_counter()
        while len(next(iter(found.values()), [])) < 21 and (not found or time.perf_counter() - began < seconds):
            for name, run in self.runs.items():
                found.setdefault(name, []).append(timed(partial(self.active, run), self.place))
        on = torch.device(self.place.device)
        memory = {name: peak_bytes(partial(self.active, run), on) for name, run in self.runs.items()}
        return {"seconds": found, "first": first, "bytes": memory, "failed": self.failed}


def _input(batch: Any) -> Tensor:
    found: Tensor = batch[0] if isinstance(batch, tuple) else batch
    return found


def compiled(network: str, setting: Setting) -> Row:
    """The same step eager, compiled and by CUDA graphs, and double backward by hand."""
    torch.manual_seed(0)
    bench = Bench(COMPILED[network](setting.miniature, setting.device), Place(setting.device, "float32"))
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
    torch.manual_seed(0)
    bench = Bench(NETWORKS[network](setting.miniature, setting.device), Place(setting.device, precision))
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
    for other in ("unrolled", "double backward, default attention", "double backward", "TorchOpt", "port's loop"):
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
        setting = Setting(given.device, given.miniature, 60 * given.minutes, given.out)
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
