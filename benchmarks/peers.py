"""The same hypergradient by metapl and by the other libraries, side by side in one run.

    python benchmarks/peers.py                                    # about an hour of one core
    python benchmarks/peers.py --write benchmarks/results/peers.md

Each library gets a throw-away environment with a pinned version of its own, which reads PyTorch
from this one; one that does not install is named with the reason. All compute the gradient of the
labeled loss after K student steps of plain SGD on a teacher's soft labels, in float32, from the
same weights and batches; attention is computed by PyTorch's plain kernel, since the others have no
second derivative, but in the causal language model, which has PyTorch's default. What is marked "by
its algorithm" is written here, as its paper has it: Betty installs under Python 3.10 at most, and
MixFlow-MG is code for JAX. Each measurement is a process of its own, and their order is drawn anew
in each round, after which the rows are written. The error is relative to double backward in
float64, the time is the median over rounds, and the memory is the allocator's peak beyond weights
and batches. They run on a CUDA device, if there is one.
"""

from __future__ import annotations

import importlib.util
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import (
    NONE,
    RESULTS,
    Row,
    apart,
    arguments,
    environment,
    grid,
    loaded,
    parsed,
    show,
    write_json,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

RESULT = RESULTS / "peers.json"
LEARNING_RATE = 0.1
CAUSAL = "causal LM, default attention"
NETWORKS = ("MLP", "transformer", CAUSAL, "WRN-28-2")
TRUTH = "double backward by hand, float64"
HAND = "double backward by hand"
FORWARD = "metapl, forward"
UNROLLED = "metapl, unrolled"
RECOMPUTED = f"{FORWARD}, teacher recomputed"
COMPILED = f"{FORWARD}, compiled"
OWN = (FORWARD, RECOMPUTED, UNROLLED, COMPILED)
UNMEASURED = {
    (COMPILED, "WRN-28-2"): "not measured: one step compiled for 21 minutes at commit 4031f786"
}

Gradient = Sequence[Tensor]
Case = tuple[nn.Module, nn.Module, tuple[Tensor, Tensor], Tensor]


class Tokens(nn.Module):
    """A small transformer on sequences of 16 vectors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            64, 4, 128, dropout=0.0, batch_first=True, norm_first=True
        )
        self.embed = nn.Linear(8, 64)
        self.head = nn.Linear(64, 10)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class CausalLM(nn.Module):
    """A causal language model, with PyTorch's default attention.

    The logits of the token behind the others.
    """

    def __init__(
        self,
        words: int = 256,
        width: int = 64,
        depth: int = 2,
        length: int = 32,
        head: int = 16,
        outputs: int = 256,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.place = nn.Embedding(length, width)
        self.of_token = head
        self.head = nn.Linear(width, outputs)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block = {
                "norm": nn.LayerNorm(width),
                "qkv": nn.Linear(width, 3 * width),
                "out": nn.Linear(width, width),
            }
            wide = (
                nn.LayerNorm(width),
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Linear(4 * width, width),
            )
            self.blocks.append(nn.ModuleDict({**block, "mlp": nn.Sequential(*wide)}))

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs (B, outputs) of words (B, L)."""
        h = self.embed(x) + self.place.weight
        for block in self.blocks:
            parts = block["qkv"](block["norm"](h)).chunk(3, -1)
            q, k, v = (t.unflatten(-1, (-1, self.of_token)).transpose(1, 2) for t in parts)
            heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + block["out"](heads.transpose(1, 2).flatten(2))
            h = h + block["mlp"](h)
        return self.head(h[:, -1])


def case(network: str, device: str, dtype: torch.dtype = torch.float32) -> Case:
    """Return teacher, student, a labeled batch and an unlabeled one."""
    from metapl.models import wide_resnet28_2

    torch.manual_seed(0)
    if network == "MLP":
        teacher, student = (
            nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)) for _ in range(2)
        )
        shape: tuple[int, ...] = (64, 64)
    elif network == "transformer":
        teacher, student, shape = Tokens(), Tokens(), (32, 16, 8)
    elif network == CAUSAL:
        teacher = CausalLM().to(device, dtype)
        student = CausalLM().to(device, dtype)
        x, u = (torch.randint(0, 256, (16, 32), device=device) for _ in range(2))
        return teacher, student, (x, torch.randint(0, 256, (16,), device=device)), u
    else:
        teacher, student, shape = wide_resnet28_2(), wide_resnet28_2(), (16, 3, 32, 32)
    x = torch.randn(shape)
    u = torch.randn(shape)
    y = torch.randint(0, 10, shape[:1])
    teacher = teacher.to(device, dtype)
    student = student.to(device, dtype)
    return teacher, student, (x.to(device, dtype), y.to(device)), u.to(device, dtype)


def inner_loss(
    student: Callable[[Tensor], Tensor],
    teacher: nn.Module,
    u: Tensor,
    params: dict[str, Tensor] | None = None,
) -> Tensor:
    """Return the student's cross-entropy with the teacher's probabilities, at these weights."""
    outputs = student(u) if params is None else functional_call(student, params, (u,))  # type: ignore[arg-type]
    return F.cross_entropy(outputs, teacher(u).softmax(-1))


def by_hand(
    teacher: nn.Module, student: nn.Module, labeled: tuple[Tensor, Tensor], u: Tensor, steps: int
) -> Gradient:
    """Go backward twice through ``torch.func.functional_call``."""
    params: dict[str, Tensor] = {
        name: p for name, p in student.named_parameters() if p.requires_grad
    }
    for _ in range(steps):
        grads = torch.autograd.grad(
            inner_loss(student, teacher, u, params), list(params.values()), create_graph=True
        )
        params = {
            name: p - LEARNING_RATE * g for (name, p), g in zip(params.items(), grads, strict=True)
        }
    outer = F.cross_entropy(functional_call(student, params, (labeled[0],)), labeled[1])
    return torch.autograd.grad(outer, list(teacher.parameters()))


def by_metapl(mode: Any, **options: Any) -> Any:
    """Return the gradient by ``metapl.hypergradient`` in a mode.

    It uses one optimizer, by which it knows what it has compiled.
    """
    import metapl

    optimizers: dict[nn.Module, Any] = {}

    def gradient(
        teacher: nn.Module, student: nn.Module, labeled: Any, u: Tensor, steps: int
    ) -> Gradient:
        unlabeled = u if steps == 1 else metapl.Lookahead([u] * steps)
        if student not in optimizers:
            optimizers[student] = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE)
        inputs = {
            "outer": labeled,
            "inner": unlabeled,
            "inner_optimizer": optimizers[student],
            # Steps are timed, and gradients are compared with exact ones.
            "verify": False,
        }
        result = metapl.hypergradient(teacher, student, mode=mode, **inputs, **options)
        return list(result.grads.values())

    return gradient


def by_higher(
    teacher: nn.Module, student: nn.Module, labeled: Any, u: Tensor, steps: int
) -> Gradient:
    """Return the gradient by ``higher.innerloop_ctx``."""
    import higher

    inner = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE)
    with higher.innerloop_ctx(student, inner, copy_initial_weights=False) as (
        patched,
        differentiable,
    ):
        for _ in range(steps):
            differentiable.step(inner_loss(patched, teacher, u))
        outer = F.cross_entropy(patched(labeled[0]), labeled[1])
        return torch.autograd.grad(outer, list(teacher.parameters()))


def by_torchopt(
    teacher: nn.Module, student: nn.Module, labeled: Any, u: Tensor, steps: int
) -> Gradient:
    """Return the gradient by ``torchopt.MetaSGD``; put the student's weights back afterwards."""
    import torchopt

    inner = torchopt.MetaSGD(student, lr=LEARNING_RATE)
    state_before = torchopt.extract_state_dict(student, by="reference", with_buffers=True)
    for _ in range(steps):
        inner.step(inner_loss(student, teacher, u))
    outer = F.cross_entropy(student(labeled[0]), labeled[1])
    gradients = torch.autograd.grad(outer, list(teacher.parameters()))
    torchopt.recover_state_dict(student, state_before)
    return gradients


def lower_level(
    feed: dict[str, Tensor], upper: nn.Module, lower: nn.Module, params: Any = None
) -> Tensor:
    """Return the inner loss, by the name that BOAT imports."""
    return inner_loss(lower, upper, feed["u"])


def upper_level(
    feed: dict[str, Tensor], upper: nn.Module, lower: nn.Module, params: Any = None
) -> Tensor:
    """Return the outer loss, by the name that BOAT imports."""
    outputs = lower(feed["x"]) if params is None else lower(feed["x"], params=params)
    return F.cross_entropy(outputs, feed["y"])


def by_boat(
    teacher: nn.Module, student: nn.Module, labeled: Any, u: Tensor, steps: int
) -> Gradient:
    """Return the gradient by ``boat_torch.Problem``.

    It descends by naive gradients and differentiates automatically in reverse.
    """
    from boat_torch import Problem

    for p in teacher.parameters():
        p.grad = None
    with tempfile.TemporaryDirectory() as folder:
        networks = {"lower_level_model": student, "upper_level_model": teacher}
        variables = {
            "lower_level_var": list(student.parameters()),
            "upper_level_var": list(teacher.parameters()),
        }
        config: Row = {
            "fo_op": None,
            "gm_op": ["NGD"],
            "na_op": ["RAD"],
            "lower_iters": steps,
            **networks,
            **variables,
        }
        for level, network in (("lower", student), ("upper", teacher)):
            config[f"{level}_level_opt"] = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)
        config |= {
            "accumulate_grad": False,
            "copy_last_param": False,
            "return_grad": True,
            "device": str(u.device),
        }
        config |= {"GDA": {"alpha_init": 0.0, "alpha_decay": 1.0}, "RGT": {"truncate_iter": 0}}
        config["loss_log_path"] = str(Path(folder) / "loss.json")
        losses = {
            f"{name}_loss": {"function": f"{__name__}.{name}"}
            for name in ("lower_level", "upper_level")
        }
        problem = Problem(config, losses)
        problem.build_ll_solver()
        problem.build_ul_solver()
        feed = {"x": labeled[0], "y": labeled[1], "u": u}
        grads, _ = problem.run_iter(feed, feed, 0)
    return [g.detach() for g in grads]


def plain_steps(
    teacher: nn.Module, student: nn.Module, u: Tensor, steps: int
) -> list[dict[str, Tensor]]:
    """Return the student's weights before each step of plain SGD and after the last, as leaves."""
    params: dict[str, Tensor] = {
        name: p.detach().requires_grad_() for name, p in student.named_parameters()
    }
    path = [params]
    for _ in range(steps):
        with torch.no_grad():
            q = teacher(u).softmax(-1)
        loss = F.cross_entropy(functional_call(student, params, (u,)), q)
        pairs = zip(params.items(), torch.autograd.grad(loss, list(params.values())), strict=True)
        params = {name: (p.detach() - LEARNING_RATE * g).requires_grad_() for (name, p), g in pairs}
        path.append(params)
    return path


def by_betty(
    teacher: nn.Module, student: nn.Module, labeled: Any, u: Tensor, steps: int
) -> Gradient:
    """Return the gradient by Betty's default, ``darts``.

    It is of the last step alone (Choe et al. 2023, sec. 3; Liu et al. 2019, eq. 8): the mixed
    derivative at the new weights, with the identity for the Hessian, by a central difference of
    gradients in the teacher over 0.01 / ||v|| along v. Times the rate, which Betty leaves out.
    """
    params = plain_steps(teacher, student, u, steps)[-1]
    outer = F.cross_entropy(functional_call(student, params, (labeled[0],)), labeled[1])
    v = torch.autograd.grad(outer, list(params.values()))
    size = 0.01 / torch.linalg.vector_norm(torch.cat([g.flatten() for g in v]))
    sides = []
    for sign in (1, -1):
        moved = {
            n: (p.detach() + sign * size * g).requires_grad_()
            for (n, p), g in zip(params.items(), v, strict=True)
        }
        sides.append(
            torch.autograd.grad(inner_loss(student, teacher, u, moved), list(teacher.parameters()))
        )
    return [
        -LEARNING_RATE * (plus - minus) / (2 * size) for plus, minus in zip(*sides, strict=True)
    ]


def by_mixflow(
    teacher: nn.Module, student: nn.Module, labeled: Any, u: Tensor, steps: int
) -> Gradient:
    """Return the gradient by MixFlow-MG (Kemaev et al. 2025).

    Backwards through the steps, the product with the Hessian and the derivative in the teacher are
    one derivative, in forward mode along the adjoint, of the inner loss's gradient in both
    networks; each step's passes are run again from its kept weights, and no graph outlives its
    step.
    """
    *earlier, last = plain_steps(teacher, student, u, steps)
    outer = F.cross_entropy(functional_call(student, last, (labeled[0],)), labeled[1])
    v = torch.autograd.grad(outer, list(last.values()))
    learned = list(teacher.parameters())
    total = [torch.zeros_like(p) for p in learned]
    for number, params in reversed(list(enumerate(earlier))):
        with forward_ad.dual_level():
            pairs = zip(params.items(), v, strict=True)
            duals = {name: forward_ad.make_dual(p, -LEARNING_RATE * g) for (name, p), g in pairs}
            loss = inner_loss(student, teacher, u, duals)
            # The first step needs no product with the Hessian.
            ends = [
                *learned,
                *(duals.values() if number else ()),
            ]
            slopes = [forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(loss, ends)]
        total = [t if s is None else t + s for t, s in zip(total, slopes, strict=False)]
        v = tuple(g + s for g, s in zip(v, slopes[len(learned) :], strict=False))
    return total


PEERS: dict[str, tuple[tuple[str, ...], Any]] = {
    "TorchOpt 0.7.3": (("torchopt==0.7.3",), by_torchopt),
    "higher 0.2.1": (("higher==0.2.1",), by_higher),
    "Betty 0.2.1": (("betty-ml==0.2.1",), None),
    "BOAT 1.1.1": (("boat-torch==1.1.1", "higher==0.2.1"), by_boat),
    "learn2learn 0.2.0": (("learn2learn==0.2.0",), None),
    "Betty (darts), by its algorithm": ((), by_betty),
    "MixFlow-MG, by its algorithm": ((), by_mixflow),
}
"""The pinned packages of a library's environment, and its gradient.

None: it has not installed so far.
"""


def measure(library: str, network: str, steps: int, calls: int, truth: str, device: str) -> Row:
    """Measure once, in the process and the environment that it is called in.

    Args:
        calls: timed ones, after one that is not.
        truth: the file with the exact gradient; made by :data:`TRUTH`.
    """
    from metapl.ablation.cost import peak_bytes

    torch.set_num_threads(1)
    options = {RECOMPUTED: {"recompute_teacher": True}, COMPILED: {"compile": True}}.get(
        library, {}
    )
    rival_of_ours = by_metapl(library.split(", ")[1], **options) if library in OWN else None
    # Of (teacher, student, both batches, steps).
    gradient = by_hand if library in (TRUTH, HAND) else rival_of_ours or PEERS[library][1]
    # By hand one knows that the default attention has no second derivative.
    if network != CAUSAL or library in (TRUTH, HAND):
        gradient = sdpa_kernel(SDPBackend.MATH)(gradient)
    if library == TRUTH:
        torch.save(gradient(*case(network, device, torch.float64), steps), truth)
        return {}
    inputs = case(network, device)
    exact = torch.cat([g.flatten() for g in torch.load(truth)])
    began = time.perf_counter()
    gradient_vector = torch.cat([g.flatten().double() for g in gradient(*inputs, steps)])
    first = time.perf_counter() - began
    clock = time.perf_counter if device == "cuda" else time.process_time
    seconds = []
    for _ in range(calls):
        since = clock()
        gradient(*inputs, steps)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - since)
    return {
        "error": float((gradient_vector - exact).norm() / exact.norm()),
        "seconds": statistics.median(seconds),
        "first": first,
        "bytes": peak_bytes(lambda: gradient(*inputs, steps), torch.device(device)),
    }


def installed(packages: Sequence[str], folder: Path, alone: bool = True) -> str:
    """Return the interpreter of a new environment with these packages.

    They are there ``alone`` or with what they need beyond this environment, from which it reads the
    others.

    Raises: :class:`RuntimeError` with pip's words, in short, if they do not install.
    """
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")

    def printed(interpreter: str) -> str:
        command = [interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    # A .pth file in the packages of the new environment lets it read those of this one.
    packages_here = printed(sys.executable)
    (Path(printed(python)) / "shared.pth").write_text(packages_here + "\n")
    install = [python, "-m", "pip", "install", "--quiet", *["--no-deps"] * alone, *packages]
    words = subprocess.run(install, capture_output=True, text=True, check=False)
    if words.returncode == 0:
        return python
    if version := re.search(r"Requires-Python ([^;]+)", words.stderr):
        raise RuntimeError(f"needs Python {version[1].strip()}")
    if compiler := re.search(r"fatal error: (.*)", words.stderr):
        raise RuntimeError(f"does not compile ({compiler[1].strip()})")
    raise RuntimeError(
        (
            [line for line in words.stderr.splitlines() if line.startswith("ERROR")]
            or ["pip failed"]
        )[-1]
    )


def call(python: str, *words: Any) -> Row:
    """Return :func:`measure` in a process of its own; what it raised is in ``reason``."""
    try:
        row: Row = apart(f"peers.measure(*{words!r})", python)
    except RuntimeError as error:
        raised = [line for line in str(error).splitlines() if re.match(r"[\w.]*Error\b", line)]
        return {"reason": f"stops: {(raised or [str(error)])[-1][:150].split(' because ')[0]}"}
    return row


def interpreters(folder: Path, miniature: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Return the interpreter of each library that installs, and why the others do not.

    A miniature takes what is installed here.
    """
    ours = OWN[:1] if miniature else OWN
    pythons = dict.fromkeys(ours, sys.executable)
    reasons = dict[str, str]()
    for library, (packages, gradient) in PEERS.items():
        is_here = (
            library.startswith("TorchOpt") and importlib.util.find_spec("torchopt") is not None
        )
        if not packages or (miniature and is_here):
            pythons[library] = sys.executable
        elif not miniature:
            try:
                python = installed(packages, folder / library.split()[0])
            except RuntimeError as error:
                reasons[library] = str(error)
                continue
            if gradient is None:
                reasons[library] = "installs, and has no measurement here yet"
            else:
                pythons[library] = python
    return pythons, reasons


def summary(rows: Sequence[Row]) -> Row:
    """Return the medians over the rounds of one case, and each round's seconds.

    If a round has a reason why there is nothing, return that alone.
    """
    for row in rows:
        if "reason" in row:
            return {"reason": row["reason"]}
    medians = {
        name: statistics.median(row[name] for row in rows)
        for name in ("error", "seconds", "first", "bytes")
    }
    return medians | {"each": [row["seconds"] for row in rows]}


def run(args: Any) -> None:
    """Measure all, each round in a drawn order; the result is written after each round."""
    result: Row = {"measured_on": environment()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    networks = ("MLP",) if args.miniature else NETWORKS
    lookaheads, rounds = ((2,), 1) if args.miniature else ((1, 10), args.rounds)
    measured: dict[tuple[str, str, int], list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        pythons, result["not_installed"] = interpreters(Path(folder), args.miniature)
        cases = [(network, steps) for network in networks for steps in lookaheads]
        truths = {case: str(Path(folder) / f"{case[0]}-{case[1]}.pt") for case in cases}
        for network, steps in cases:
            truth = call(sys.executable, TRUTH, network, steps, 0, truths[network, steps], device)
            if "reason" in truth:
                raise SystemExit(truth["reason"])
        jobs = [(library, network, steps) for library in pythons for network, steps in cases]
        draw = random.Random(0)
        for number in range(1, rounds + 1):
            draw.shuffle(jobs)
            for done, (library, network, steps) in enumerate(jobs, 1):
                row: Row = {"reason": UNMEASURED.get((library, network))}
                if row["reason"] is None:
                    calls = {"MLP": 50, "WRN-28-2": 2}.get(network, 10) // (
                        5 if steps > 1 else 1
                    ) or 1
                    row = call(
                        pythons[library],
                        library,
                        network,
                        steps,
                        calls,
                        truths[network, steps],
                        device,
                    )
                measured.setdefault((library, network, steps), []).append(row)
                progress = f"round {number}, {done}/{len(jobs)}"
                print(
                    f"[{progress}] {library}, {network}, K = {steps}: {row}",
                    file=sys.stderr,
                    flush=True,
                )
            result["rows"] = [
                {"library": library, "network": network, "steps": steps, **summary(rows)}
                for (library, network, steps), rows in sorted(measured.items())
            ]
            write_json(args.out, result)


def table(result: Row) -> str:
    """Return a table of errors, and of times and memory relative to metapl's ``forward``."""
    rows = {(row["network"], row["steps"], row["library"]): row for row in result["rows"]}
    lines = []
    for network, steps in sorted(
        {key[:2] for key in rows}, key=lambda size: (NETWORKS.index(size[0]), size[1])
    ):
        ours = rows[network, steps, FORWARD]
        for library in (library for library in (*OWN, *PEERS) if (network, steps, library) in rows):
            row = rows[network, steps, library]
            cold = (
                f" (first call {row['first']:.0f} s)"
                if library == COMPILED and "first" in row
                else ""
            )
            cells = [row.get("reason"), *[NONE] * 4]
            if "reason" not in row:
                cells = [
                    f"{row['error']:.1e}",
                    *(f"{row[key] / ours[key]:.2f}" for key in ("seconds", "bytes")),
                ]
                cells += [f"{1e3 * row['seconds']:.3g}", f"{row['bytes'] / 1e6:.3g}"]
            lines.append([network, steps, library + cold, *cells])
    head = (
        "network",
        "K",
        "library",
        "relative error",
        "time / forward",
        "memory / forward",
        "ms",
        "MB",
    )
    return grid(head, lines, "lrl") + missing(result)


def missing(result: Row) -> str:
    """Return a sentence of the libraries that did not install."""
    notes = " ".join(f"{library}: {reason}." for library, reason in result["not_installed"].items())
    return f"\n\nNot installed: {notes}" if notes else ""


def main() -> None:
    parser = arguments(__doc__, RESULT)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each case")
    args = parsed(parser)
    if args.runs:
        run(args)
    show(args.write, "peers", table(loaded(args.out)))


if __name__ == "__main__":
    main()
