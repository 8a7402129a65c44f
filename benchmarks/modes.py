"""What each mode costs and how noisy it is, side by side in one run.

    python benchmarks/modes.py                          # about five minutes on two cores
    python benchmarks/modes.py --write docs/studies/modes.md

The latter also prints and draws ``ablate_digits.json``, the ``ablation.json`` of

    metapl ablate digits --steps 400 --out DIR

On WRN-28-2: the cost of one ``BilevelTrainer.step`` (equal batches, no losses of the teacher's own)
in student forward passes, by counting FLOPs; its time, the modes taking turns; and its peak memory
beyond weights and optimizer states, by the allocator's own account. Then, over draws of the labels
at fixed weights, the noise and the bias of the teacher's gradient against the exact one (double
backward in float64), on a small classifier of digits and on WRN-28-2.

With a CUDA device the same is measured on it, in float32 (TF32 off) and in bf16 autocast, instead
of on the CPU.
"""

from __future__ import annotations

import contextlib
import copy
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
from harness import NONE, RESULTS, Row
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl.ablation import Ablation
from metapl.ablation.cost import flops, peak_bytes
from metapl.apps.ablate import DOTS_PER_INCH
from metapl.apps.printing import wrapped
from metapl.apps.report_picture import png_of
from metapl.feedback import Difference, Estimator, LossDifference, Reinforce, ReinforcePerExample
from metapl.pictures import load_digits_split

# The profiler's own log would go to the terminal.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# η of the step whose gradient is judged.
LEARNING_RATE = 0.05
RESULT = RESULTS / "modes.json"
ABLATION = RESULTS / "ablate_digits.json"
FIGURE = "ablate_digits.png"


class Network(NamedTuple):
    """A wide residual network, and the side of its pictures."""

    build: Callable[[], nn.Module]
    side: int


NETWORK = Network(metapl.models.wide_resnet28_2, 32)
MINIATURE_NETWORK = Network(lambda: metapl.models.wide_resnet(10, 1), 8)


@dataclass(frozen=True)
class Mode:
    """A mode as it is measured; ``noisy`` where the gradient depends on drawn labels."""

    name: str
    what: str
    exact: str
    mode: str | Estimator
    kind: str
    noisy: bool = False
    recompute_teacher: bool = False


ON_AVERAGE = "up to O(η), on average"
SAME = "the same in expectation, sampled labels"
DIFFERENCE_OF_LOSSES = "sampled labels, L(θ) − L(θ′)"
ONE_NUMBER_EACH = "sampled labels, one number each"
# Noise and bias are those of the sum over the labels, whose expectation is the gradient; the
# default is 1/B of it.
SUM_OF_LOSSES = LossDifference(reduction="sum")
SUM_OF_SCALAR = Reinforce(reduction="sum")
MODES = [
    Mode("none", "no feedback, the control", NONE, "none", "soft"),
    Mode("loss_difference", DIFFERENCE_OF_LOSSES, ON_AVERAGE, SUM_OF_LOSSES, "hard", noisy=True),
    Mode(
        "reinforce",
        "Algorithm 1: sampled labels, one scalar",
        ON_AVERAGE,
        SUM_OF_SCALAR,
        "hard",
        noisy=True,
    ),
    Mode(
        "reinforce_per_example",
        ONE_NUMBER_EACH,
        ON_AVERAGE,
        ReinforcePerExample(),
        "hard",
        noisy=True,
    ),
    Mode(
        "difference, one-sided",
        "outputs' difference, soft labels",
        "up to O(δ)",
        Difference(one_sided=True),
        "soft",
    ),
    Mode("difference", "central difference, soft labels", "up to O(δ²)", "difference", "soft"),
    Mode("forward", "forward-mode derivative, soft labels", "yes", "forward", "soft"),
    Mode("forward, hard labels", SAME, "up to O(η)", "forward", "hard", noisy=True),
    Mode(
        "forward, recompute_teacher",
        "the same, teacher run twice",
        "yes",
        "forward",
        "soft",
        recompute_teacher=True,
    ),
    Mode("unrolled", "double backward, soft labels", "yes", "unrolled", "soft"),
]
# The modes that have no place where the others are measured: that is far from an optimum, and its
# outer loss does not read the teacher.
NOT_MEASURED = (
    (
        "`implicit`",
        "through an optimum of the student's loss, soft labels",
        "at that optimum",
        "15 + 6 n",
    ),
    ("`direct`", "the direct term alone, of an outer loss that reads the teacher", NONE, "5.0"),
)


@dataclass(frozen=True)
class Place:
    """A device and the precision of its passes."""

    device: str
    precision: str

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Set what a training loop in this precision would set."""
        if self.device == "cuda":
            torch.backends.cuda.matmul.fp32_precision = "ieee"
            torch.backends.cudnn.conv.fp32_precision = "ieee"
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            yield

    def seconds(
        self, run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter
    ) -> float:
        """Return what a call takes; on a GPU until it is done there."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = clock()
        with self.active():
            run()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return clock() - start


def places() -> list[Place]:
    return (
        [Place("cuda", "float32"), Place("cuda", "bf16")]
        if torch.cuda.is_available()
        else [Place("cpu", "float32")]
    )


def step_of(
    mode: Mode, place: Place, batch: int, network: Network
) -> tuple[Callable[[], Any], nn.Module, Tensor]:
    """Return a trainer's step on fixed batches, the student, its batch; one step has been taken."""
    torch.manual_seed(0)
    networks = [network.build().to(place.device) for _ in range(2)]
    unlabeled = torch.randn(batch, 3, network.side, network.side, device=place.device)
    labeled = torch.randn_like(unlabeled), torch.arange(batch, device=place.device) % 10
    options: Row = {"problem": metapl.PseudoLabels(mode.kind), "teacher_losses": ()}
    trainer = metapl.BilevelTrainer(
        *networks, mode.mode, **options, recompute_teacher=mode.recompute_teacher
    )

    def step() -> None:
        with place.active():
            trainer.step(labeled, unlabeled)

    step()
    return step, networks[1], unlabeled


def passes(mode: Mode, place: Place, network: Network) -> float:
    """Return one step's FLOPs over those of the student's forward pass on the same batch."""
    step, student, unlabeled = step_of(mode, place, 2, network)

    def one_step() -> None:
        with torch.no_grad(), place.active():
            student(unlabeled)

    return flops(step) / flops(one_step)


def times(place: Place, batch: int, network: Network, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of one step per mode and round.

    The modes take turns, so that what else the machine does hits all.
    """
    seconds_by_mode: dict[str, list[float]] = {mode.name: [] for mode in MODES}
    steps = {mode.name: step_of(mode, place, batch, network)[0] for mode in MODES}
    for turn in range(rounds):
        names = list(steps) if turn % 2 == 0 else list(steps)[::-1]
        for name in names:
            seconds_by_mode[name].append(place.seconds(steps[name]))
    return seconds_by_mode


@dataclass(frozen=True)
class Subject:
    """Networks at fixed weights, after a little supervised training, with a batch of each kind."""

    teacher: nn.Module
    student: nn.Module
    labeled: tuple[Tensor, Tensor]
    unlabeled: Tensor

    def gradient(
        self,
        mode: Mode,
        place: Place,
        generator: torch.Generator | None = None,
        double: bool = False,
    ) -> Tensor:
        """Return the teacher's gradient, flat, float64 on the host."""
        teacher = self.teacher
        student = self.student
        x_l = self.labeled[0]
        x_u = self.unlabeled
        if double:
            teacher = copy.deepcopy(teacher).double()
            student = copy.deepcopy(student).double()
            x_l = x_l.double()
            x_u = x_u.double()
        with contextlib.nullcontext() if double else place.active():
            result = metapl.hypergradient(
                teacher,
                student,
                outer=(x_l, self.labeled[1]),
                inner=x_u,
                mode=mode.mode,
                problem=metapl.PseudoLabels(mode.kind),
                inner_optimizer=torch.optim.SGD(student.parameters(), lr=LEARNING_RATE),
                generator=generator,
                # Errors are measured here.
                verify=False,
            )
        return torch.cat([g.double().flatten() for g in result.grads.values()]).cpu()


def subject_of(place: Place, network: Network | None = None) -> Subject:
    """Return MLPs of 64, 32 and 10 units on the digits, 64 unlabeled and 64 labeled images.

    Or larger networks, B = 8.
    """
    torch.manual_seed(0)
    split = load_digits_split(labels_per_class=20, seed=0)
    batch, steps = (64, 30) if network is None else (8, 20)

    def prepared(images: Tensor) -> Tensor:
        if network is not None:
            images = (
                F.interpolate(images, size=network.side, mode="bilinear")
                .expand(-1, 3, -1, -1)
                .contiguous()
            )
        return images.to(place.device)

    images = prepared(split.labeled[0])
    labels = split.labeled[1].to(place.device)
    networks = []
    for _ in range(2):
        build = (metapl.models.mlp([64, 32, 10]) if network is None else network.build()).to(
            place.device
        )
        optimizer = torch.optim.SGD(build.parameters(), lr=0.05, momentum=0.9)
        for _ in range(steps):
            rows = torch.randint(len(images), (max(batch, 16),))
            optimizer.zero_grad()
            F.cross_entropy(build(images[rows]), labels[rows]).backward()
            optimizer.step()
        networks.append(build)
    rows = torch.randperm(len(images))[:batch]
    unlabeled_rows = torch.randperm(len(split.unlabeled))[:batch]
    return Subject(
        *networks, (images[rows], labels[rows]), prepared(split.unlabeled[unlabeled_rows])
    )


def noise(subject: Subject, place: Place, draws: int) -> dict[str, dict[str, Any]]:
    r"""Return noise \sqrt{E‖g − ḡ‖²}/‖G‖ and bias ‖ḡ − G‖/‖G‖ per mode, G the exact gradient.

    Of n draws, noise alone would make the bias look like noise/√n, the standard error of ḡ:
    ``bias_floor``.
    """
    reference = next(mode for mode in MODES if mode.mode == "unrolled")
    exact = subject.gradient(reference, place, double=True)
    size = exact.norm()
    noise_by_mode: dict[str, dict[str, Any]] = {}
    for mode in MODES:
        if mode.mode == "none":
            continue
        n = draws if mode.noisy else 1
        generator = torch.Generator(place.device).manual_seed(1)
        g = torch.stack([subject.gradient(mode, place, generator) for _ in range(n)])
        mean = g.mean(0)
        spread = float(((g - mean).square().sum() / max(1, n - 1)).sqrt() / size)
        bias = float((mean - exact).norm() / size)
        noise_by_mode[mode.name] = {
            "draws": n,
            "bias": bias,
            "noise": spread,
            "bias_floor": spread / n**0.5,
        }
    return noise_by_mode


def measured(
    place: Place,
    network: Network,
    batch: int,
    rounds: int,
    memory_batch: int,
    draws: int,
    draws_wrn: int,
) -> Row:
    """Return every figure of every mode in one place."""
    print(f"{place.device}, {place.precision}: time", flush=True)
    seconds = times(place, batch, network, rounds)
    print("noise", flush=True)
    small = noise(subject_of(place), place, draws)
    large = noise(subject_of(place, network), place, draws_wrn)
    print("FLOPs and memory", flush=True)
    rows = list[Row]()
    device = torch.device(place.device)
    memory = {
        m.name: peak_bytes(step_of(m, place, memory_batch, network)[0], device) for m in MODES
    }
    for mode in MODES:
        seconds_of_mode = seconds[mode.name]
        row: Row = {"mode": mode.name, "what": mode.what, "exact": mode.exact}
        row |= {
            "passes": passes(mode, place, network),
            "seconds": {"median": statistics.median(seconds_of_mode)},
            "peak_bytes": memory[mode.name],
        }
        ratios = [a / b for a, b in zip(seconds_of_mode, seconds["forward"], strict=True)]
        row["time_over_forward"] = {"median": statistics.median(ratios)}
        row["memory_over_forward"] = memory[mode.name] / memory["forward"]
        rows.append(
            row | {"gradient_small": small.get(mode.name), "gradient_wrn": large.get(mode.name)}
        )
    return {"device": place.device, "precision": place.precision, "modes": rows}


def table(run: Row) -> str:
    """Return the table of a place."""
    lines = []
    for row in run["modes"]:
        (first, _, options), of_small = row["mode"].partition(", "), row["gradient_small"]
        cells = [
            f"`{first}`, {options}" if options else f"`{first}`",
            row["what"],
            row["exact"],
            f"{row['passes']:.1f}",
        ]
        cells += [
            f"{row['time_over_forward']['median']:.2f}",
            f"{row['memory_over_forward']:.2f}",
            NONE,
            NONE,
        ]
        if of_small is not None:
            bias = (
                f"{of_small['bias']:.1e}" if of_small["bias"] < 0.001 else f"{of_small['bias']:.2g}"
            )
            bias = (
                f"≤ {of_small['bias']:.2g}"
                if of_small["bias"] < 2 * of_small["bias_floor"]
                else bias
            )
            cells[-2:] = ["0" if of_small["noise"] == 0 else f"{of_small['noise']:.2g}", bias]
        lines.append(cells)
    lines += [[*cells, *[NONE] * 4] for cells in NOT_MEASURED]
    head = [
        "mode",
        "what",
        "exact?",
        "cost, passes",
        "time",
        "peak memory",
        "noise / signal",
        "bias",
    ]
    return harness.grid(head, lines, names=3)


def ablation(page: Path | None) -> str:
    """Return what the command prints of the committed ablation.

    Where there is a page, draw the figure beside it.
    """
    result = Ablation.from_json(ABLATION.read_text())
    if page is not None:
        harness.figure_of(page, FIGURE).write_bytes(png_of(result.plot(), DOTS_PER_INCH))
    return f"```\n{result.table()}\n\n{wrapped(result.recommendation)}\n```"


def main() -> None:
    args = harness.parsed(harness.arguments(__doc__, RESULT))
    if args.runs:
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.jit\._script")
        place_list = places()
        start = time.perf_counter()
        cuda = place_list[0].device == "cuda"
        sizes = {"batch": 128 if cuda else 8, "rounds": 21, "memory_batch": 128 if cuda else 32}
        sizes |= {"draws": 2000, "draws_wrn": 24}
        if args.miniature:
            sizes = {"batch": 2, "rounds": 1, "memory_batch": 2, "draws": 2, "draws_wrn": 2}
        network = MINIATURE_NETWORK if args.miniature else NETWORK
        result = {"runs": [measured(place, network, **sizes) for place in place_list]}
        setup = {**harness.environment(), "command": "python benchmarks/modes.py", **sizes}
        harness.write_json(
            args.out, {"setup": setup | {"minutes": (time.perf_counter() - start) / 60}, **result}
        )
    harness.show(args.write, "modes", "\n\n".join(map(table, harness.loaded(args.out)["runs"])))
    harness.show(args.write, "ablation", ablation(args.write))


if __name__ == "__main__":
    main()
