"""Functions that take gradients inside: eager, recorded, and by the ways that PyTorch has.

    python benchmarks/recorded.py     # some minutes of a core; goes on
    python benchmarks/recorded.py --write docs/recorded.md

Three functions of weights and a batch, in float32: a gradient penalty with its gradient in the
weights, the loss after two steps of descent with its gradient in the start (MAML), and a regression
on forces, which are a network's gradient in its inputs. Each is written once with
``torch.autograd.grad``, and once with ``torch.func.grad``, as one writes it for ``torch.compile``.
A row is a way in a process of its own, with an empty cache of Inductor: seconds of processor time
of the first call, and the milliseconds of a call beside the eager function's in the same process,
in turns, medians of 300, on one thread.
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
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import torch
from harness import RESULTS, Row, grid, read, show
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

RAW = RESULTS / "recorded.jsonl"
CALLS = 300
WAYS = {
    "eager": "as it is",
    "recorded": "`recorded(function)`",
    "recorded, compiled": "`recorded(function, compile=True)`",
    "torch.compile": "`torch.compile(function)`",
    "torch.compile, traced": "the same, with `trace_autograd_ops=True`",
    "torch.compile, traced, options": "that, with the options of Inductor that `recorded` has",
    "torch.func, compiled": "written with `torch.func.grad`, `torch.compile(fullgraph=True)`",
}
# Those that a recording gives to Inductor.
OPTIONS_OF_RECORDED = {"cpp_wrapper": True, "size_asserts": False, "alignment_asserts": False}
Params = dict[str, Tensor]


def network(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def leaves(params: Params) -> Params:
    return {name: t.detach().requires_grad_() for name, t in params.items()}


def gradients(loss: Tensor, params: Params) -> Params:
    grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
    return dict(zip(params, grads, strict=True))


# ------------------------------------------------------------------- as one writes it with autograd


def penalty(net: nn.Module, params: Params, x: Tensor) -> tuple[Tensor, Params]:
    params, x = leaves(params), x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(functional_call(net, params, (x,)).sum(), x, create_graph=True)
    loss = (slope.norm(dim=1) - 1).square().mean()
    return loss.detach(), gradients(loss, params)


def adapted(net: nn.Module, params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Params]:
    start = leaves(params)
    now = start
    for _ in range(2):
        loss = F.mse_loss(functional_call(net, now, (x,)), y)
        grads = torch.autograd.grad(loss, list(now.values()), create_graph=True)
        now = {name: t - 0.1 * g for (name, t), g in zip(now.items(), grads, strict=True)}
    loss = F.mse_loss(functional_call(net, now, (x,)), y)
    return loss.detach(), gradients(loss, start)


def forces(net: nn.Module, params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Params]:
    params, x = leaves(params), x.detach().requires_grad_()
    energy = functional_call(net, params, (x,)).sum()
    (slope,) = torch.autograd.grad(energy, x, create_graph=True)
    loss = F.mse_loss(-slope, y)
    return loss.detach(), gradients(loss, params)


# ----------------------------------------------------------------- as one writes it with torch.func


def penalty_func(net: nn.Module, params: Params, x: Tensor) -> tuple[Tensor, Params]:
    def loss(params: Params) -> tuple[Tensor, Tensor]:
        slope = torch.func.grad(lambda x: functional_call(net, params, (x,)).sum())(x)
        value = (slope.norm(dim=1) - 1).square().mean()
        return value, value

    grads, value = torch.func.grad(loss, has_aux=True)(params)
    return value, grads


def adapted_func(net: nn.Module, params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Params]:
    def loss(params: Params) -> Tensor:
        return F.mse_loss(functional_call(net, params, (x,)), y)

    def after(now: Params) -> tuple[Tensor, Tensor]:
        for _ in range(2):
            grads = torch.func.grad(loss)(now)
            now = {name: t - 0.1 * grads[name] for name, t in now.items()}
        value = loss(now)
        return value, value

    grads, value = torch.func.grad(after, has_aux=True)(params)
    return value, grads


def forces_func(net: nn.Module, params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Params]:
    def loss(params: Params) -> tuple[Tensor, Tensor]:
        slope = torch.func.grad(lambda x: functional_call(net, params, (x,)).sum())(x)
        value = F.mse_loss(-slope, y)
        return value, value

    grads, value = torch.func.grad(loss, has_aux=True)(params)
    return value, grads


FUNCTIONS: dict[str, tuple[Any, Any, tuple[int, ...], int]] = {
    "gradient penalty": (penalty, penalty_func, (16, 64, 64, 1), 0),
    "MAML, two steps": (adapted, adapted_func, (16, 64, 64, 4), 4),
    "forces": (forces, forces_func, (16, 64, 64, 1), 16),
}


def compiled(way: str, function: Callable[..., Any], by_func: Callable[..., Any]) -> Any:
    from metapl.functional import recorded

    if way == "recorded":
        return recorded(function)
    if way == "recorded, compiled":
        return recorded(function, compile=True)
    if way == "torch.compile":
        return torch.compile(function)
    if way == "torch.compile, traced":
        config: Any = torch._dynamo.config
        config.trace_autograd_ops = True
        return torch.compile(function)
    if way == "torch.compile, traced, options":
        config = torch._dynamo.config
        config.trace_autograd_ops = True
        return torch.compile(function, options=OPTIONS_OF_RECORDED)
    if way == "torch.func, compiled":
        return torch.compile(by_func, fullgraph=True)
    return function


def measure(name: str, way: str, calls: int) -> Row:
    """Return the first call's seconds, and a call's milliseconds beside the eager function's."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    function, by_func, widths, outputs = FUNCTIONS[name]
    net = network(*widths)
    eager = partial(function, net)
    params = {key: p.detach() for key, p in net.named_parameters()}
    batch = [torch.randn(64, widths[0])]
    if outputs:
        batch.append(torch.randn(64, outputs))
    loss, grads = eager(params, *batch)
    begun = time.process_time()
    children = os.times()
    try:
        run = compiled(way, eager, partial(by_func, net))
        found, others = run(params, *batch)
    except Exception as error:
        return {"error": str(error).splitlines()[0]}
    after = os.times()
    first = time.process_time() - begun
    first += after.children_user - children.children_user
    gap = max(
        float((others[key] - g).abs().max() / g.abs().max().clamp_min(1e-9))
        for key, g in grads.items()
    )
    times: dict[str, list[float]] = {"eager": [], "way": []}
    for _ in range(calls):
        for key, call in (("eager", eager), ("way", run)):
            before = time.process_time()
            call(params, *batch)
            times[key].append(time.process_time() - before)
    medians = {key: 1e3 * statistics.median(values) for key, values in times.items()}
    return {"first_s": first, "eager_ms": medians["eager"], "ms": medians["way"], "gap": gap}


def in_a_process(name: str, way: str, calls: int) -> Row:
    """Measure in a process of its own, with an empty cache of Inductor."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__, "--one", json.dumps([name, way, calls])],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
        )
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def table(rows: list[Row]) -> str:
    """Return the ratio of each way to the eager function, and its first call."""
    lines = []
    for way, title in WAYS.items():
        if way == "eager":
            continue
        line = [title]
        for name in FUNCTIONS:
            found = [row for row in rows if row["name"] == name and row["way"] == way]
            if not found:
                line.append("")
            elif "error" in found[0]:
                line.append("refused")
            else:
                ratio = found[0]["ms"] / found[0]["eager_ms"]
                line.append(f"{ratio:.2f} ({found[0]['first_s']:.1f} s)")
        lines.append(line)
    return grid(["way", *FUNCTIONS], lines, 1)


def main() -> None:
    parser = harness.arguments(__doc__, RAW)
    parser.add_argument("--one", help="measure one way, for a process of its own")
    args = harness.parsed(parser)
    if args.one:
        print(json.dumps(measure(*json.loads(args.one))))
        return
    if args.runs:
        calls = 2 if args.miniature else CALLS
        ways = [way for way in WAYS if way != "eager"]
        names = [*FUNCTIONS]
        if args.miniature:
            ways, names = ["recorded"], names[:1]
        jobs: list[Row] = [
            {"name": name, "way": way, "calls": calls} for name in names for way in ways
        ]
        harness.go_on(args.out, jobs, in_a_process, environment=harness.environment())
    show(args.write, "recorded", table(read(args.out, having="name")))


if __name__ == "__main__":
    main()
