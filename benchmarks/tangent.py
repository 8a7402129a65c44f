"""Ways to a cheaper exact step, each beside the way that metapl takes, in turns in one run.

    python benchmarks/tangent.py --note "who else used the machine"
    python benchmarks/tangent.py --write docs/modes.md

One step: the derivative of a student's outputs along w, with the inner pass that it follows, by a replay in forward
mode (``Forward(by="tangent")``), by the same with products of stacked rows (a layer's W meets the inputs and their
tangents in one product), and by double backward through the kept graph of the inner pass (``Forward(by="graph")``). A
whole step, teacher included, by hand and with nothing checked, in three ways, of which the first is that of TorchOpt
and higher; benchmarks/step.py has metapl's own. Times are of the processor, on one thread, the
median over turns of the ratio to the first way; memory is the allocator's peak; apart is how far what a way finds is
from what the first one does, over the size of that.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import arguments, described, parsed, show, write_json
from peers import CAUSAL, LEARNING_RATE, by_hand, case
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from metapl.ablation.cost import peak_bytes
from metapl.execution import kernels

RESULT = Path(__file__).parent / "results" / "tangent.json"
REPLAY, STACKED, KEPT = "replay in forward mode", "the same, rows stacked", "kept graph"
PARTS = ("step", "whole")
ONE_STEP = ("MLP", "transformer", CAUSAL, "WRN-28-2")

Row = dict[str, Any]
Way = Callable[[], Any]


# ------------------------------------------------------------------------------------------------------------ one step


def stacked(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A layer that is linear in its input and in its weight, in forward mode, by two calls in place of three."""

    def called(x: Tensor, weight: Tensor, bias: Tensor | None = None, *options: Any, **named: Any) -> Tensor:
        (x, dx), (weight, dw) = forward_ad.unpack_dual(x), forward_ad.unpack_dual(weight)
        b, db = (None, None) if bias is None else forward_ad.unpack_dual(bias)
        if dx is None:
            return forward_ad.make_dual(layer(x, weight, b, *options, **named), layer(x, dw, db, *options, **named))
        y, dy = layer(torch.cat([x, dx]), weight, None, *options, **named).chunk(2)
        dy = dy + layer(x, dw, db, *options, **named)
        return forward_ad.make_dual(y if b is None else y + (b if y.ndim < 4 else b[:, None, None]), dy)

    return called


@contextmanager
def stacking() -> Iterator[None]:
    """Linear layers and convolutions as :func:`stacked` has them, in this block."""
    linear, conv2d = F.linear, F.conv2d
    F.linear, F.conv2d = stacked(linear), stacked(conv2d)  # type: ignore[assignment]
    try:
        yield
    finally:
        F.linear, F.conv2d = linear, conv2d


def one_step(network: str) -> dict[str, Way]:
    """The derivative of the outputs along w after a plain inner pass, or through its graph."""
    teacher, student, _, u = case(network, "cpu")
    q = teacher(u).softmax(-1).detach()
    params: dict[str, Tensor] = dict(student.named_parameters())
    w = {name: -LEARNING_RATE * torch.randn_like(p) for name, p in params.items()}

    def replay(block: Callable[[], Any]) -> Tensor:
        torch.autograd.grad(F.cross_entropy(student(u), q), list(params.values()))
        with kernels.forward_mode(), block():
            duals = {name: forward_ad.make_dual(p.detach(), w[name]) for name, p in params.items()}
            return forward_ad.unpack_dual(functional_call(student, duals, (u,))).tangent

    def kept() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            z = student(u)
        leaf = z.detach().requires_grad_()
        (cotangent,) = torch.autograd.grad(F.cross_entropy(leaf, q), leaf)
        cotangent.requires_grad_()
        g = torch.autograd.grad(z, list(params.values()), cotangent, create_graph=True)
        return torch.autograd.grad(g, cotangent, list(w.values()))[0]

    return {REPLAY: partial(replay, nullcontext), STACKED: partial(replay, stacking), KEPT: kept}


# ---------------------------------------------------------------------------------------------------------- whole step


def whole_step(network: str) -> dict[str, Way]:
    """The teacher's gradient through one student step."""
    given = teacher, student, (x, y), u = case(network, "cpu")
    params: dict[str, Tensor] = dict(student.named_parameters())

    def unchecked(keep_graph: bool) -> Sequence[Tensor]:
        q, names = teacher(u).softmax(-1), list(params)
        signal = q.detach().requires_grad_()
        z = student(u)
        g = torch.autograd.grad(F.cross_entropy(z, signal), list(params.values()), create_graph=keep_graph)
        moved = {
            n: (params[n].detach() - LEARNING_RATE * d.detach()).requires_grad_() for n, d in zip(names, g, strict=True)
        }
        outer = F.cross_entropy(functional_call(student, moved, (x,)), y)
        w = [-LEARNING_RATE * v for v in torch.autograd.grad(outer, list(moved.values()))]
        if keep_graph:
            (h,) = torch.autograd.grad(g, signal, w)
            return torch.autograd.grad(q, list(teacher.parameters()), h)
        with forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(params[n].detach(), d) for n, d in zip(names, w, strict=True)}
            tangent = forward_ad.unpack_dual(functional_call(student, duals, (u,))).tangent
        leaf = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(leaf, signal), leaf, create_graph=True)
        (h,) = torch.autograd.grad(slope, signal, tangent)
        return torch.autograd.grad(q, list(teacher.parameters()), h)

    ways: dict[str, Way] = {
        "double backward by hand": partial(by_hand, *given, 1),
        "kept graph by hand": partial(unchecked, True),
        "forward mode by hand": partial(unchecked, False),
    }
    return {name: sdpa_kernel(SDPBackend.MATH)(way) for name, way in ways.items()}


# --------------------------------------------------------------------------------------------------------- measurement


def measure(ways: dict[str, Way], turns: int, of: Row) -> list[Row]:
    """A row for each way: its time over that of the first in the same turn, the median; and the peak of its memory."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    expected, errors = None, {}
    for name, way in ways.items():
        found = way()
        entries = torch.cat([t.detach().flatten() for t in (found if isinstance(found, list | tuple) else [found])])
        expected = entries if expected is None else expected
        errors[name] = float((entries - expected).norm() / expected.norm())
    for _ in range(turns):
        for name, way in ways.items():
            since = time.process_time()
            way()
            seconds[name].append(time.process_time() - since)
    first = next(iter(ways))
    print(of, seconds, file=sys.stderr, flush=True)
    return [
        of
        | {
            "way": name,
            "time": statistics.median(a / b for a, b in zip(seconds[name], seconds[first], strict=True)),
            "ms": 1e3 * statistics.median(seconds[name]),
            "turns": turns,
            "bytes": peak_bytes(way, torch.device("cpu")),
            "apart": errors[name],
        }
        for name, way in ways.items()
    ]


def run(miniature: bool, parts: Sequence[str]) -> list[Row]:
    torch.set_num_threads(1)
    rows = []
    for network in ONE_STEP[: 1 if miniature else len(ONE_STEP)] if "step" in parts else ():
        turns = 1 if miniature else {"MLP": 100, "WRN-28-2": 3}.get(network, 20)
        rows += measure(one_step(network), turns, {"part": "step", "of": "one step", "network": network})
    for network, turns in {"MLP": 200, "transformer": 40, "WRN-28-2": 5}.items() if "whole" in parts else ():
        if network == "MLP" or not miniature:
            of = {"part": "whole", "of": "whole step", "network": network}
            rows += measure(whole_step(network), 1 if miniature else turns, of)
    return rows


def table(result: Row) -> str:
    lines = ["| of | network | way | time | memory | ms | MB | apart | turns |"]
    lines += ["|---|---|---|---:|---:|---:|---:|---:|---:|"]
    first: Row = {}
    for row in result["rows"]:
        first = row if (row["of"], row["network"]) != (first.get("of"), first.get("network")) else first
        cells = [row["of"], row["network"], row["way"], f"{row['time']:.2f}", f"{row['bytes'] / first['bytes']:.2f}"]
        cells += [f"{row['ms']:.3g}", f"{row['bytes'] / 1e6:.3g}", f"{row['apart']:.2g}", str(row["turns"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, RESULT, page=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="the rows of the others stay")
    parser.add_argument("--note", default="", help="about the machine, such as who else used it")
    given = parsed(parser)
    if given.write is None:
        rows = [row | {"note": given.note} for row in run(given.miniature, given.parts)]
        if len(given.parts) < len(PARTS):
            rows += [row for row in json.loads(given.out.read_text())["rows"] if row["part"] not in given.parts]
        rows.sort(key=lambda row: PARTS.index(row["part"]))
        write_json(given.out, {"measured_on": described("cpu"), "rows": rows})
    show(given.write, "tangent", table(json.loads(given.out.read_text())))


if __name__ == "__main__":
    main()
