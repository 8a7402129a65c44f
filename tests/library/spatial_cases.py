"""What the ranks of tests/library/test_spatial.py do: a network on their columns, beside the same network on whole
images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd import forward_ad
from torch.nn import functional as F

import metapl
from metapl.distributed import spatial as exchange
from metapl.distributed.spatial import spatial, split_width, sum_over, with_halo
from metapl.errors import MetaplError
from metapl.models import small_cnn

CLASSES = 5


class _Squeezed(nn.Module):
    """A depthwise convolution whose channels are weighted by a pooled network, as in EfficientNet."""

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels)
        self.pool, self.squeeze = nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * torch.sigmoid(self.squeeze(self.pool(x)))


class _OnPooled(nn.Module):
    """Norms and windows on what is pooled, a layer in two places, and windows that leave columns out."""

    def __init__(self) -> None:
        super().__init__()
        twice = nn.Conv2d(4, 4, 3, padding=1)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1), nn.Tanh(), twice, nn.Tanh(), twice)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=None),
            nn.MaxPool2d(3, 1, 1), nn.GroupNorm(2, 4),
        )  # fmt: skip
        self.tail = nn.Sequential(
            nn.AvgPool2d((3, 1), 1, (1, 0), count_include_pad=False), nn.MaxPool2d((2, 3), (2, 4), (0, 1)),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.Linear(4, CLASSES),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.tail(x * torch.sigmoid(self.squeeze(x)))


def network(name: str) -> nn.Module:
    torch.manual_seed(1)
    if name == "on_pooled":
        return _OnPooled()
    if name == "layers":
        return nn.Sequential(
            nn.Conv2d(3, 4, 7, 2, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 6, 3, 1, 2, 2),
            nn.GroupNorm(2, 6), nn.Tanh(), _Squeezed(6, 5, 2), nn.AvgPool2d(2), nn.Conv2d(6, 6, 1, 1),
            nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.0), nn.Linear(6, CLASSES),
        )  # fmt: skip
    if name == "small_cnn":
        return small_cnn(CLASSES)
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)


def images(rows: int = 6, side: int = 64) -> Tensor:
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def error(a: Any, b: Any) -> float:
    """The relative difference of tensors, or of lists of them."""
    a, b = ([a], [b]) if isinstance(a, Tensor) else (list(a), list(b))
    a, b = (torch.cat([t.detach().flatten() for t in tensors]) for tensors in (a, b))
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def mean(t: Tensor) -> Tensor:
    total = t.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def from_first(compute: Callable[[], Any]) -> Any:
    """What the first process computes, on all of them."""
    found = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def passes(
    kind: str, side: int = 64, training: bool = True, rows: int = 6, fault: str | None = None
) -> dict[str, float]:
    """Outputs, running statistics, gradients, tangents and second derivatives, each beside those of whole images."""
    with _planted(fault):
        return _passes(kind, side, training, rows)


@contextmanager
def _planted(fault: str | None) -> Iterator[None]:
    """A fault of the exchanges that leaves the outputs right."""

    def wrong(name: str, of: Any, instead: Callable[[Tensor, dict[str, Any]], Tensor]) -> Any:
        """A way of the exchange ``of`` that gives what ``instead`` makes, and of other exchanges what it gave."""
        right, more = getattr(exchange.Exchange, name), (None, None) if name == "backward" else ()

        def way(ctx: Any, t: Tensor, *rest: Any) -> Any:
            if ctx.exchange.func is not of:
                return right(ctx, t, *rest)
            made = instead(t, ctx.exchange.keywords)
            return (made, *more) if more else made

        return exchange.Exchange, name, staticmethod(way)

    faults: dict[str, tuple[Any, str, Any]] = {
        "columns that are not given back": (exchange, "_returned", lambda t, left, right, group: _own(t, left, right)),
        "a sum that is not summed backwards": wrong("backward", exchange._summed, lambda g, _: g),
        "a tangent without halo": wrong(
            "jvp", exchange._gathered, lambda t, sides: F.pad(t, (sides["left"], sides["right"]))
        ),
        "a tangent that is not summed": wrong("jvp", exchange._summed, lambda t, _: t.clone()),
    }
    if fault is None:
        yield
        return
    with mock.patch.object(*faults[fault]):
        yield


def _own(t: Tensor, left: int, right: int) -> Tensor:
    return t[..., left : t.shape[-1] - right].clone()


def _passes(kind: str, side: int, training: bool, rows: int) -> dict[str, float]:
    x, group = images(rows, side), dist.group.WORLD
    expected = from_first(lambda: _whole(kind, side, training, rows))
    parts = spatial(network(kind).double(), group, x)
    found = _seen(parts.train(training), split_width(x, group), expected["gradient"])
    return {name: error(found[name], t) for name, t in expected.items() if t}


@cache
def _whole(kind: str, side: int, training: bool, rows: int) -> dict[str, list[Tensor]]:
    return _seen(network(kind).double().train(training), images(rows, side), None)


def _seen(net: nn.Module, x: Tensor, along: list[Tensor] | None) -> dict[str, list[Tensor]]:
    """All passes of one network; the tangent is that along some gradient, of a whole network its own."""
    params, y = list(net.parameters()), torch.arange(len(x)) % CLASSES
    outputs = net(x)
    statistics = [b.clone() for b in net.buffers() if b.is_floating_point()]
    grads = torch.autograd.grad(F.cross_entropy(net(x), y), params, create_graph=True)
    # The processes' gradients are averaged before any product is taken, as a trainer does.
    averaged = [g.detach() if along is None else mean(g) for g in grads]
    dot = torch.stack([(g * w).sum() for g, w in zip(grads, averaged, strict=True)]).sum()
    products = [p if along is None else mean(p) for p in torch.autograd.grad(dot, params)]
    with torch.no_grad(), forward_ad.dual_level():
        named = zip(net.named_parameters(), along or averaged, strict=True)
        duals = {name: forward_ad.make_dual(p, w) for (name, p), w in named}
        tangent = forward_ad.unpack_dual(torch.func.functional_call(net, duals, (x,))).tangent.clone()
    found = {"outputs": [outputs.detach()], "statistics": statistics, "gradient": averaged}
    return found | {"hessian product": products, "tangent": [tangent]}


def training(kind: str) -> float:
    """SGD with momentum on averaged gradients: the weights beside those of whole images, relative to the update."""
    x, group, whole = images(), dist.group.WORLD, network(kind).double()
    start = [p.detach().clone() for p in whole.parameters()]
    expected = from_first(lambda: _after_steps(whole, x, lambda g: g))
    found = _after_steps(spatial(network(kind).double(), group, x), split_width(x, group), mean)
    a, b = ([p - old for p, old in zip(weights, start, strict=True)] for weights in (found, expected))
    return error(a, b)


def _after_steps(net: nn.Module, x: Tensor, reduced: Callable[[Tensor], Tensor]) -> list[Tensor]:
    y = torch.arange(len(x)) % CLASSES
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        for p in net.parameters():
            p.grad = reduced(p.grad)
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def adjoint(left: int, right: int) -> list[float]:
    """⟨Ax, y⟩ − ⟨x, Aᵀy⟩ over all processes, of the halo exchange and of the sum."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    differences = []
    for run in (lambda t: with_halo(t, left, right, dist.group.WORLD), lambda t: sum_over(t, dist.group.WORLD)):
        out = run(x)
        y = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        (back,) = torch.autograd.grad(out, x, y)
        differences.append(float(mean((out.detach() * y).sum() - (x.detach() * back).sum())))
    return differences


def refused(case: str) -> str:
    """The message of what is refused."""
    group, x = dist.group.WORLD, images(2, 16)
    cut: dict[str, tuple[nn.Module, Tensor]] = {
        "width": (network("small_cnn"), images(2, 17)),
        "stride": (nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.AdaptiveAvgPool2d(1)), images(2, 10)),
        "halo": (nn.Sequential(nn.Conv2d(3, 4, 21, 1, 10), nn.AdaptiveAvgPool2d(1)), x),
        "no padding": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)), x),
        "mean": (_Mean(), x),
        "upsampling": (nn.Sequential(nn.Upsample(scale_factor=2)), x),
        "pool": (nn.Sequential(nn.AdaptiveAvgPool2d(2)), x),
        "reflect": (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), x),
        "alone": (nn.Conv2d(3, 4, 3), x),
        "behind zeros": (_Own(lambda x: x.amax((2, 3)), head=0.0), x),
        "slopes drawn": (_Own(lambda x: x, nn.RReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), x),
        "pixels dropped": (_Own(lambda x: x, nn.AlphaDropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()), x),
    }
    net, example = cut[case]
    before = [(name, type(part)) for name, part in net.named_modules()]
    try:
        spatial(net.double(), group, example)
    except MetaplError as refusal:
        assert [(name, type(part)) for name, part in net.named_modules()] == before
        assert all(part.training for part in net.modules())
        return str(refusal)
    return ""


def dropped(rows: int) -> str:
    """Dropout of single pixels of parts of images; of one row, no training passes are compared."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5))
    try:
        spatial(net.double(), dist.group.WORLD, images(rows, 16))
    except MetaplError as refusal:
        return str(refusal)
    return ""


class _Own(nn.Module):
    """Code of a network's own between a convolution and its head, whose weights may be zero."""

    def __init__(self, run: Any, *layers: nn.Module, head: float | None = None) -> None:
        super().__init__()
        self.conv, self.layers, self.run = nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(*layers), run
        self.head = nn.Linear(4, CLASSES)
        if head is not None:
            nn.init.constant_(self.head.weight, head)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(self.run(self.conv(x))))
        return logits


class _Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(x).mean((2, 3)))
        return logits


# ------------------------------------------------------------------------------------------------------ the trainer


def _trained(
    mode: Any, mesh: Any, optimizer: str, side: int, pair: bool
) -> tuple[metapl.BilevelTrainer, list[dict[str, float]]]:
    """A trainer after two steps on this process's rows and columns, without a mesh on everything; and its reports."""
    from metapl.distributed import shard

    torch.manual_seed(4)
    nets = [small_cnn(CLASSES).double(), network("layers").double()]
    if pair:  # of layers whose products several processes may compute together
        ends = [(nn.Linear(CLASSES, 8), nn.ReLU(), nn.Linear(8, CLASSES)) for _ in nets]
        nets = [nn.Sequential(net, *end).double() for net, end in zip(nets, ends, strict=True)]
    for norm in [part for net in nets for part in net.modules() if isinstance(part, nn.BatchNorm2d)]:
        norm.eval()  # each share of rows has statistics of its own
    if mesh is not None:
        nets = [shard(net, mesh, example=images(2, side) if mesh.spatial > 1 else None) for net in nets]
    build = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-2),
    }[optimizer]
    trainer = metapl.BilevelTrainer(
        *nets,
        mode=mode,
        inner_optimizer=build(nets[1].parameters()),
        outer_optimizer=build(nets[0].parameters()),
        generator=torch.Generator().manual_seed(5),
    )
    draw, rows = torch.Generator().manual_seed(6), []
    for _ in range(2):
        x, u = (torch.randn(4, 3, side, side, generator=draw, dtype=torch.float64) for _ in range(2))
        y = torch.randint(CLASSES, (4,), generator=draw)
        if mesh is not None:
            x, u, y = mesh.part(x), mesh.part(u), y.chunk(mesh.shares)[mesh.share]
        rows.append(trainer.step((x, y), u).as_dict())
    return trainer, rows


@cache
def _alone(mode: Any, optimizer: str, side: int, pair: bool) -> tuple[list[list[Tensor]], list[dict[str, float]]]:
    """The weights of one process, and its reports."""
    trainer, rows = _trained(mode, None, optimizer, side, pair)
    return [[p.detach() for p in net.parameters()] for net in (trainer.teacher, trainer.student)], rows


def parity(
    mode: Any, optimizer: str, replicate: int = 1, shards: int = 1, spatial: int = 2, tensor: int = 1
) -> dict[str, float]:
    """Weights after two steps on a mesh, and the reports' scalars, beside those of one process."""
    from metapl.distributed import Mesh

    side, mesh = 16 * spatial, Mesh(replicate=replicate, shard=shards, spatial=spatial, tensor=tensor)
    weights, reports = from_first(lambda: _alone(mode, optimizer, side, tensor > 1))
    trainer, rows = _trained(mode, mesh, optimizer, side, tensor > 1)
    for layout in trainer.layouts:
        layout.reshard()
    found = {}
    for role, expected in zip(("teacher", "student"), weights, strict=True):
        parts = getattr(trainer, role).parameters()
        found[role] = error([p.full_tensor() if hasattr(p, "full_tensor") else p for p in parts], expected)
    scalars = zip(rows, reports, strict=True)
    pairs = [(row[name], value) for row, other in scalars for name, value in other.items() if value == value]
    found["scalars"] = max(abs(a - b) / max(abs(b), 1e-6) for a, b in pairs)
    return found


def unwrapped() -> str:
    """A network whose images are cut, and whose gradients nothing averages."""
    net = spatial(small_cnn(CLASSES).double(), dist.group.WORLD, images(2, 64))
    try:
        metapl.BilevelTrainer(small_cnn(CLASSES).double(), net, "forward")
    except MetaplError as refusal:
        return str(refusal)
    return ""


def seeded_apart() -> str:
    """Labels drawn by generators in different states, for the same rows."""
    from metapl.distributed import Mesh, shard

    mesh, example = Mesh(spatial=2), images(2, 64)
    nets = [shard(network("layers").double(), mesh, example=example) for _ in range(2)]
    trainer = metapl.BilevelTrainer(*nets, mode="reinforce", generator=torch.Generator().manual_seed(dist.get_rank()))
    try:
        trainer.step((mesh.part(images(8)), torch.arange(8) % CLASSES), mesh.part(images(8)))
    except MetaplError as refusal:
        return str(refusal)
    return ""
