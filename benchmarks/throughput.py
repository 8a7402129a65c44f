"""What a whole step costs beside the passes that it cannot do without, and what loading the pictures adds.

    python benchmarks/throughput.py                                      # about ten minutes on two cores
    python benchmarks/throughput.py --small small_cnn                    # its rows alone, into the same result
    python benchmarks/throughput.py --against ../other-checkout          # and as that checkout measures itself
    python benchmarks/throughput.py --table benchmarks/results/throughput.json
    python benchmarks/throughput.py --write benchmarks/results/throughput.md

The step is Algorithm 1 with a teacher that learns from labels and by UDA, at the ratio of unlabeled to labeled
pictures of the recipes: 7 for WRN-28-2 on 32x32 pictures, 15 for ResNet-50. Four things take turns in one process, so
that what else the machine does hits all of them:

- floor: the plain forward and backward passes alone, as anybody would write them in PyTorch: the teacher's on the weak
  view, on the strong view and on the labeled batch with one backward pass; the student's on the strong view and, of
  what it would be after the step, on the labeled batch, each with its backward pass; for mode ``forward`` also one
  pass with dual numbers. No optimiser moves anything, no label is drawn, no coefficient made.
- moves: the steps of the two optimisers alone, by themselves, which every training has on top of its passes.
- step: ``BilevelTrainer.step`` on the same batches.
- fed: the same step on batches that are drawn, augmented and moved anew each time, by a feed with and without worker
  processes. The large networks are fed by the paper's views (crop, mirror, RandAugment), the small one by views that
  change whole batches (mirror, affine, color, hole).

Figures are medians over rounds of the ratios within a round. Peak memory is what a step holds beyond what was held
before it. With a CUDA device the same is measured on it in float32 (TF32 off) and bf16, compiled and not.

With ``--against`` this checkout and another one take turns, each running its own copy of this script, on a CPU with the
first network alone: the floor is the same in both, so that their ratios to it can be compared.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import arguments, described, parsed, write_between_marks, write_json
from modes import Place, places
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import metapl
from metapl.ablation.cost import peak_bytes
from metapl.apps.pictures import (
    Affine,
    Chain,
    Color,
    Flip,
    Hole,
    LabeledBatches,
    MemoryImages,
    RandAugment,
    UnlabeledBatches,
    View,
    Weak,
)
from metapl.data import StepSampler, feed
from metapl.problems.losses import UDA, CrossEntropy

HERE = Path(__file__).parent
RESULT = HERE / "results" / "throughput.json"
BESIDE = "throughput_against.json"
MODES = ("reinforce", "forward")
BATCHED = ", batched views"


@dataclass(frozen=True)
class Subject:
    """A network, its pictures, and the batches of a step."""

    network: str
    side: int
    labeled: int
    unlabeled: int
    batched: bool = False
    """Whether its views change whole batches, or are the paper's."""

    @property
    def examples(self) -> int:
        return self.labeled + self.unlabeled

    def views(self) -> tuple[View, View]:
        """The weak and the strong one."""
        if self.batched:
            weak = Chain((Flip(), Affine(translate=1 / 8, scale=(0.9, 1.1))))
            affine = Affine(degrees=15, translate=1 / 8, scale=(0.8, 1.2), shear=10, fill="reflect")
            return weak, Chain((Flip(), affine, Color(0.4, 0.4, 0.4, 0.1), Hole((0.2, 0.5))))
        moved = Weak(self.side // 8)
        return moved, Chain((moved, RandAugment(translate=1 / 8, cutout=self.side // 2)))

    def __str__(self) -> str:
        views = BATCHED if self.batched else ""
        return f"{self.network}, {self.side} px, {self.labeled} + {self.unlabeled}{views}"


CPU_SUBJECTS = (Subject("wide_resnet28_2", 32, 8, 56), Subject("resnet50", 64, 2, 30))
CUDA_SUBJECTS = (Subject("wide_resnet28_2", 32, 128, 896), Subject("resnet50", 224, 32, 480))


MINIATURE_SUBJECTS = (Subject("small_cnn", 16, 2, 6), Subject("small_cnn", 16, 2, 6, batched=True))


def small(network: str) -> Subject:
    """A network whose passes cost little, with the batches of the recipe for pictures."""
    return Subject(network, 32, 32, 64, batched=True)


class Bench:
    """A trainer and the same networks by hand, on the same batches."""

    def __init__(self, subject: Subject, mode: str, place: Place, compiled: bool) -> None:
        torch.manual_seed(0)
        self.subject, self.mode, self.place = subject, mode, place
        precision = "bfloat16" if place.precision == "bf16" else "float32"
        self.teacher, self.student = (self._network() for _ in range(2))
        self.trainer = metapl.BilevelTrainer(
            self.teacher,
            self.student,
            mode,
            teacher_losses=(CrossEntropy(0.1), UDA(temperature=0.7, threshold=0.6)),
            precision=precision,
            compile=compiled,
        )
        self.plain_teacher, self.plain_student = (self._network() for _ in range(2))
        if compiled:
            for network in (self.plain_teacher, self.plain_student):
                network.compile()
        self.after = {n: p.detach().clone().requires_grad_() for n, p in self.plain_student.named_parameters()}
        self.along = {n: torch.randn_like(p) for n, p in self.plain_student.named_parameters()}
        self.optimizers = []
        for network in (self._network(), self._network()):
            for p in network.parameters():
                p.grad = torch.randn_like(p)
            self.optimizers.append(torch.optim.SGD(network.parameters(), 1e-3, 0.9, weight_decay=5e-4, nesterov=True))
        self.x_l, self.y_l = self._pictures(subject.labeled), self._classes(subject.labeled)
        self.weak, self.strong = self._pictures(subject.unlabeled), self._pictures(subject.unlabeled)
        self.y_u = self._classes(subject.unlabeled)

    def _network(self) -> nn.Module:
        network = metapl.apps.networks.create(self.subject.network, 10).to(self.place.device)
        return network.to(memory_format=torch.channels_last) if self.place.device == "cuda" else network

    def _pictures(self, count: int) -> Tensor:
        return torch.rand(count, 3, self.subject.side, self.subject.side, device=self.place.device)

    def _classes(self, count: int) -> Tensor:
        return torch.arange(count, device=self.place.device) % 10

    def step(self) -> None:
        self.trainer.step((self.x_l, self.y_l), (self.weak, self.strong))

    def floor(self) -> None:
        """The passes alone."""
        with self.place.active():
            teacher, student = self.plain_teacher, self.plain_student
            weak = teacher(self.weak)
            F.cross_entropy(student(self.strong).float(), self.y_u).backward()
            at_after = torch.func.functional_call(student, self.after, (self.x_l,))
            torch.autograd.grad(F.cross_entropy(at_after.float(), self.y_l), list(self.after.values()))
            if self.mode == "forward":
                self._dual_pass()
            own = F.cross_entropy(teacher(self.x_l).float(), self.y_l)
            own = own + F.cross_entropy(teacher(self.strong).float(), self.y_u)
            (own + F.cross_entropy(weak.float(), self.y_u)).backward()
        for network in (teacher, student):
            network.zero_grad(set_to_none=True)

    def moves(self) -> None:
        """The optimisers' steps, on gradients that are there."""
        for optimizer in self.optimizers:
            optimizer.step()

    def _dual_pass(self) -> None:
        warnings.filterwarnings("ignore", "`torch.jit.script` is", category=FutureWarning)  # torch's own, of its rules
        with torch.no_grad(), forward_ad.dual_level(), torch.compiler.set_stance("force_eager"):
            duals = {n: forward_ad.make_dual(p, self.along[n]) for n, p in self.plain_student.named_parameters()}
            forward_ad.unpack_dual(torch.func.functional_call(self.plain_student, duals, (self.strong,)))

    def fed(self, num_workers: int) -> Callable[[], None]:
        """A step on batches that are drawn, augmented and moved for it."""
        few, many = self.subject.labeled, self.subject.unlabeled
        size = 4 * many
        images = MemoryImages(torch.randint(0, 256, (size, 3, self.subject.side, self.subject.side), dtype=torch.uint8))
        weak, strong = self.subject.views()
        sources = {
            "labeled": LabeledBatches(images, torch.arange(size) % 10, StepSampler(size, few, seed=0), weak, 0),
            "unlabeled": UnlabeledBatches(images, StepSampler(size, many, seed=1), weak, strong, 0),
        }
        feeds = {
            name: feed(source, name=name, stop=10**6, num_workers=num_workers, device=self.place.device)
            for name, source in sources.items()
        }

        def step() -> None:
            self.trainer.step(feeds["labeled"].next(), feeds["unlabeled"].next())

        return step


def timed(run: Callable[[], Any], place: Place) -> float:
    place.wait()
    start = time.perf_counter()
    run()
    place.wait()
    return time.perf_counter() - start


def measure(subject: Subject, mode: str, place: Place, compiled: bool, rounds: int) -> dict[str, Any]:
    """One row of the result."""
    bench = Bench(subject, mode, place, compiled)
    workers = 4 if place.device == "cuda" else 1
    runs = {
        "floor": bench.floor,
        "moves": bench.moves,
        "step": bench.step,
        "fed": bench.fed(0),
        f"fed, {workers} worker{'s' * (workers > 1)}": bench.fed(workers),
    }
    for _ in range(3 if compiled else 2):
        for run in runs.values():
            run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs) if turn % 2 == 0 else list(runs)[::-1]:
            found[name].append(timed(runs[name], place))
    memory = {name: peak_bytes(runs[name], torch.device(place.device)) for name in ("floor", "step")}
    base = found["floor"]
    return {
        "subject": str(subject),
        "mode": mode,
        "precision": place.precision,
        "compiled": compiled,
        "examples": subject.examples,
        "rounds": rounds,
        "seconds": found,
        "ratio": {n: statistics.median(t / f for t, f in zip(ts, base, strict=True)) for n, ts in found.items()},
        "examples_per_second": {n: subject.examples / statistics.median(ts) for n, ts in found.items()},
        "peak_bytes": memory,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| network, pictures, batch | mode | precision | examples/s | step ÷ floor | of which optimisers | "
        "fed ÷ floor | with workers | peak memory, floor | step |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        ratio = row["ratio"]
        workers = next(value for name, value in ratio.items() if "worker" in name)
        precision = row["precision"] + (", compiled" if row["compiled"] else "")
        cells = [row["subject"], f"`{row['mode']}`", precision, f"{row['examples_per_second']['step']:.0f}"]
        cells += [f"{ratio['step']:.3f}", f"{ratio['moves']:.3f}", f"{ratio['fed']:.3f}", f"{workers:.3f}"]
        cells += [f"{row['peak_bytes'][name] / 1e6:.0f} MB" for name in ("floor", "step")]
        lines.append("| " + " | ".join(cells) + " |")
    made = result["made_with"]
    lines += [
        "",
        f"Medians of {result['rows'][0]['rounds']} rounds on {made['device']} ({made['cpu']}, {made['threads']} "
        f"threads), torch {made['torch']}. `python benchmarks/throughput.py`; raw: "
        "`benchmarks/results/throughput.json`.",
    ]
    return "\n".join(lines)


def measured(subjects: Sequence[Subject], rounds: int) -> list[dict[str, Any]]:
    """Rows for every place, way and mode."""
    rows = []
    for place in places():
        for subject in subjects:
            for compiled in (False, True) if place.device == "cuda" else (False,):
                for mode in MODES:
                    rows.append(measure(subject, mode, place, compiled, rounds))
                    print(f"{rows[-1]['subject']}, {mode}: {rows[-1]['ratio']}", flush=True)
    return rows


def turn(checkout: Path, rounds: int, miniature: bool) -> list[dict[str, Any]]:
    """The rows that a checkout measures of itself, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{checkout / 'benchmarks'}"}
    code = "import throughput; throughput.CPU_SUBJECTS = throughput.CPU_SUBJECTS[:1]; throughput.main()"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-c", code, "--rounds", str(rounds), "--out", str(out)]
        subprocess.run([*command, *["--miniature"] * miniature], env=environment, cwd=checkout, check=True)
        rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    return rows


def beside(here: Path, other: Path, rounds: int, turns: int, miniature: bool) -> list[dict[str, Any]]:
    """The seconds of both checkouts, of the rows that both measure, and the medians of their ratios to the floor."""
    found: dict[str, dict[tuple[str, str], list[dict[str, list[float]]]]] = {"this": {}, "other": {}}
    for _ in range(turns):
        for name, checkout in (("other", other), ("this", here)):
            for row in turn(checkout, rounds, miniature):
                found[name].setdefault((row["subject"], row["mode"]), []).append(row["seconds"])
    both = []
    for subject, mode in found["other"].keys() & found["this"].keys():
        result: dict[str, Any] = {"subject": subject, "mode": mode}
        for name, rows in found.items():
            seconds = {part: [t for row in rows[subject, mode] for t in row[part]] for part in rows[subject, mode][0]}
            floor = seconds["floor"]
            ratio = {p: statistics.median(t / f for t, f in zip(ts, floor, strict=True)) for p, ts in seconds.items()}
            result[name] = {"seconds": seconds, "ratio": ratio}
        both.append(result)
    return sorted(both, key=lambda row: (row["subject"], row["mode"]))


def table_beside(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| network, pictures, batch | mode | step ÷ floor, other checkout | this one | fed ÷ floor, other | this one |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        ratios = [f"{row[name]['ratio'][part]:.2f}" for part in ("step", "fed") for name in ("other", "this")]
        lines.append(f"| {row['subject']} | `{row['mode']}` | {' | '.join(ratios)} |")
    rounds = len(result["rows"][0]["this"]["seconds"]["floor"])
    return "\n".join([*lines, "", f"Medians of {rounds} rounds."])


def main() -> None:
    parser = arguments(__doc__, RESULT, page=True)
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout of metapl, to take turns with")
    parser.add_argument("--turns", type=int, default=2, help="of each checkout, with --against")
    parser.add_argument("--rounds", type=int, help="in which the four take turns; default 15")
    parser.add_argument("--small", metavar="NETWORK", help="measure this small network alone, and add it to the result")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a result and stop")
    options = parsed(parser)
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    if options.write:
        write_between_marks(options.write, "throughput", table(json.loads(options.out.read_text())))
        against = json.loads(options.out.with_name(BESIDE).read_text())
        write_between_marks(options.write, "throughput-against", table_beside(against))
        return
    if options.against:
        rows = beside(HERE.parent, options.against.resolve(), options.rounds or 3, options.turns, options.miniature)
        result = {"made_with": described(places()[0].device), "rows": rows}
        out = options.out if options.out != RESULT else RESULT.with_name(BESIDE)
        write_json(out, result)
        print(table_beside(json.loads(out.read_text())))
        return
    made_with, kept = described(places()[0].device), []
    rounds = options.rounds or (1 if options.miniature else 15)
    if options.miniature:
        subjects: tuple[Subject, ...] = MINIATURE_SUBJECTS
    elif options.small:
        subjects = (small(options.small),)
        before = json.loads(options.out.read_text()) if options.out.exists() else {"made_with": made_with, "rows": []}
        if before["made_with"] != made_with:
            raise SystemExit(f"{options.out} was made with {before['made_with']}, and this is {made_with}; use --out")
        kept = [row for row in before["rows"] if not row["subject"].endswith(BATCHED)]
    else:
        large = CUDA_SUBJECTS if torch.cuda.is_available() else CPU_SUBJECTS
        subjects = (*large, small("small_cnn"))
    result = {"made_with": made_with, "rows": kept + measured(subjects, rounds)}
    write_json(options.out, result)
    print(table(json.loads(options.out.read_text())))


if __name__ == "__main__":
    main()
