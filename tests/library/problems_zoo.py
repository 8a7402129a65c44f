"""Small networks, batches and optimisers that the proofs run over."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import reference
import torch
import torchopt
from torch import Tensor, nn
from torch.nn import functional as F

import metapl

CLASSES = 3

ANYWHERE = tuple(mode for mode in metapl.MODES if mode not in ("implicit", "direct"))
"""The modes for any student.

``implicit`` is for one that is near an optimum, and has tests of its own.
"""


class Attention(nn.Module):
    """One block of attention over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        # Each is (B, 1, length, width), with one head.
        q, k, v = self.qkv(x.flatten(1, 2))[:, None].chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v)[:, 0].mean(1))


def product(*values: Iterable[Any], usual: Iterable[Any]) -> list[Any]:
    """Return every combination, for ``parametrize``.

    Those of two or more values that are not ``usual`` are long.
    """
    usual_values = [*usual]
    params = []
    for case in itertools.product(*values):
        unusual_values = [value for value in case if value not in usual_values]
        marks = [pytest.mark.long] if len(unusual_values) > 1 else []
        params.append(pytest.param(*case, marks=marks))
    return params


class Judged(metapl.BilevelProblem):
    def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
        return F.cross_entropy(outputs, batch[1])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def noisy_teacher() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, CLASSES)
    )


STUDENTS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "batch_norm": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    ),
    "group_norm": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(16, CLASSES)
    ),
    "attention": Attention,
    "dropout": lambda: nn.Sequential(
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.Tanh(),
        nn.Dropout(0.4),
        nn.Linear(8, CLASSES),
        nn.Dropout(0.2),
    ),
}


@dataclass(frozen=True)
class Toy:
    """Two networks and two batches."""

    teacher: nn.Module
    student: nn.Module
    labeled: tuple[Tensor, Tensor]
    unlabeled: Any
    seed: int

    def networks(self) -> dict[str, nn.Module]:
        return {"teacher": self.teacher, "student": self.student}

    def data(self) -> dict[str, Any]:
        return {"outer": self.labeled, "inner": self.unlabeled}

    def draw_from_start(self) -> None:
        """Let both the library and the reference draw dropout masks and labels from here on."""
        torch.manual_seed(1000 + self.seed)


def toy(
    kind: str = "mlp",
    *,
    rows: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    views: bool = False,
    teacher: Callable[[], nn.Module] = mlp,
) -> Toy:
    """Build a problem that is the same whenever it is built from the same arguments."""
    torch.manual_seed(seed)
    networks = [net().to(dtype).train() for net in (teacher, STUDENTS[kind])]
    x_l, x_u, x_s = (torch.randn(n, 1, 4, 4, dtype=dtype) for n in (rows + 1, rows, rows))
    y_l = torch.randint(0, CLASSES, (rows + 1,))
    return Toy(networks[0], networks[1], (x_l, y_l), (x_u, x_s) if views else x_u, seed)


@dataclass(frozen=True)
class Optimiser:
    """An inner optimiser of the library, and the same rule written out in the tests."""

    name: str
    rule: reference.Rule
    torch_class: type[torch.optim.Optimizer] | None = None
    options: tuple[tuple[str, Any], ...] = ()
    transform: Callable[[], Any] | None = None
    tolerance: float = 1e-9

    def build(self, student: nn.Module) -> Any:
        if self.torch_class is None:
            return self.transform()
        return self.torch_class(student.parameters(), **dict(self.options))


def _torch(
    name: str, cls: type[torch.optim.Optimizer], rule: Callable[..., reference.Rule], **options: Any
) -> Optimiser:
    return Optimiser(f"torch_{name}", rule(**options), cls, tuple(options.items()))


def _torchopt(
    name: str, transform: Callable[[], Any], rule: reference.Rule, tolerance: float = 1e-9
) -> Optimiser:
    return Optimiser(f"torchopt_{name}", rule, transform=transform, tolerance=tolerance)


def clip_by_norm(max_norm: float) -> Any:
    """Return TorchOpt's clip as a transform of one's own, whose norm autograd sees."""

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
        norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in updates.values()]))
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return {name: g * scale for name, g in updates.items()}, state

    return torchopt.base.GradientTransformation(lambda params: (), update)


_SGD = torch.optim.SGD
_ADAM = torch.optim.Adam
_ADAMW = torch.optim.AdamW
# At ε = 1e-8 Adam's first step is the gradient's sign.
_ALMOST_ADAM = {
    "lr": 0.05,
    "betas": (0.8, 0.95),
    "eps": 1e-2,
}

OPTIMISERS: dict[str, Optimiser] = {
    o.name: o
    for o in (
        _torch("sgd", _SGD, reference.sgd, lr=0.3),
        _torch("sgd_momentum", _SGD, reference.sgd, lr=0.3, momentum=0.9),
        _torch(
            "sgd_nesterov",
            _SGD,
            reference.sgd,
            lr=0.3,
            momentum=0.9,
            nesterov=True,
            weight_decay=0.01,
        ),
        _torch(
            "sgd_dampening",
            _SGD,
            reference.sgd,
            lr=0.3,
            momentum=0.8,
            dampening=0.4,
            weight_decay=0.05,
        ),
        _torch(
            "sgd_maximize",
            _SGD,
            reference.sgd,
            lr=0.3,
            momentum=0.8,
            weight_decay=0.05,
            maximize=True,
        ),
        _torch("adam", _ADAM, reference.adam, **_ALMOST_ADAM, weight_decay=0.02),
        _torch("adam_amsgrad", _ADAM, reference.adam, **_ALMOST_ADAM, amsgrad=True),
        _torch("adam_defaults", _ADAM, reference.adam, lr=1e-3),
        _torch(
            "adam_maximize", _ADAM, reference.adam, **_ALMOST_ADAM, weight_decay=0.02, maximize=True
        ),
        _torch("adamw", _ADAMW, reference.adamw, **_ALMOST_ADAM, weight_decay=0.1),
        _torch(
            "adamw_amsgrad", _ADAMW, reference.adamw, **_ALMOST_ADAM, weight_decay=0.1, amsgrad=True
        ),
        _torchopt("sgd", lambda: torchopt.sgd(0.3), reference.sgd(lr=0.3)),
        _torchopt(
            "sgd_nesterov",
            lambda: torchopt.sgd(0.3, momentum=0.9, nesterov=True),
            reference.sgd(lr=0.3, momentum=0.9, nesterov=True),
        ),
        _torchopt(
            "sgd_momentum_decay",
            lambda: torchopt.sgd(0.3, momentum=0.9, weight_decay=0.05),
            reference.sgd(lr=0.3, momentum=0.9, weight_decay=0.05),
        ),
        _torchopt(
            "adam", lambda: torchopt.adam(0.05, eps=1e-2), reference.adam(lr=0.05, eps=1e-2), 1e-4
        ),
        _torchopt(
            "adamw",
            lambda: torchopt.adamw(0.05, eps=1e-2, weight_decay=0.1),
            reference.adamw(lr=0.05, eps=1e-2, weight_decay=0.1),
            1e-4,
        ),
        _torchopt(
            "clip",
            lambda: torchopt.chain(clip_by_norm(0.05), torchopt.sgd(0.3)),
            reference.clipped(0.05, reference.sgd(lr=0.3)),
        ),
        _torchopt(
            "clip_momentum",
            lambda: torchopt.chain(clip_by_norm(0.05), torchopt.sgd(0.3, momentum=0.9)),
            reference.clipped(0.05, reference.sgd(lr=0.3, momentum=0.9)),
        ),
    )
}


def warm(problem: Toy, optimiser: Optimiser, steps: int = 3) -> tuple[Any, Any, Any]:
    """Take real steps on given gradients.

    Return the optimiser, its inner_state for the library, and the reference's state.

    The reference's state comes from its own rule, never from the optimiser that it is compared
    with.
    """
    real = optimiser.build(problem.student)
    params = {name: p.detach().clone() for name, p in problem.student.named_parameters()}
    rule_state: Any = None
    inner_state = None if optimiser.torch_class else real.init(params)
    draw = torch.Generator().manual_seed(7)
    for _ in range(steps):
        grads = {
            n: 0.3 * torch.randn(p.shape, generator=draw, dtype=p.dtype) for n, p in params.items()
        }
        if optimiser.torch_class:
            for name, p in problem.student.named_parameters():
                p.grad = grads[name].clone()
            real.step()
            real.zero_grad()
        else:
            updates, inner_state = real.update(grads, inner_state, params=params, inplace=False)
            with torch.no_grad():
                for name, p in problem.student.named_parameters():
                    p.add_(updates[name])
        params, rule_state = optimiser.rule(params, grads, rule_state)
    return real, inner_state, rule_state


def everything(
    problem: Toy, *optimizers: torch.optim.Optimizer, generator: bool = True, counts: bool = True
) -> list[Tensor]:
    """Return copies of all that a call must leave as it is.

    These are weights, buffers, gradients, optimiser states (with their step ``counts``) and the
    generator.
    """
    networks = (problem.teacher, problem.student)
    tensors = [t for network in networks for t in network.state_dict().values()]
    for network in (problem.student, problem.teacher):
        for p in network.parameters():
            tensors.append(torch.ones(()) if p.grad is None else p.grad)
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for name, t in state.items():
                if isinstance(t, Tensor) and (counts or name != "step"):
                    tensors.append(t)
    if generator:
        tensors.append(torch.get_rng_state())
    return [t.detach().clone() for t in tensors]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Return whether all are equal bit for bit (a NaN is itself)."""
    return len(a) == len(b) and all(
        torch.allclose(x, y, 0, 0, equal_nan=True) for x, y in zip(a, b, strict=True)
    )


@contextmanager
def unmoved(
    problem: Toy, *optimizers: torch.optim.Optimizer, generator: bool = True
) -> Iterator[None]:
    """Assert that the block leaves everything bit for bit as it was.

    The ``generator`` may move, if the argument says so.
    """
    tensors_before = everything(problem, *optimizers, generator=generator)
    places_before = places(problem)
    yield
    assert places_before == places(problem), "a network holds other tensors than before"
    tensors = everything(problem, *optimizers, generator=generator)
    assert same(tensors_before, tensors), "something moved"


def places(problem: Toy) -> list[list[int]]:
    """Return the identities of the tensors that each network holds."""
    ids = []
    for network in problem.networks().values():
        ids.append([id(t) for t in network.state_dict(keep_vars=True).values()])
    return ids


def gradient(
    case: Toy, mode: Any = "forward", lookahead: Iterable[Any] | None = None, **options: Any
) -> Any:
    """Return the hypergradient of a case, or over the batches of a ``lookahead``.

    The inner optimizer is SGD, if no other is named. Nothing is verified by default: tests have
    references of their own.
    """
    arguments = {
        "verify": False,
        "outer": case.labeled,
        "inner": case.unlabeled if lookahead is None else metapl.Lookahead([*lookahead]),
        **options,
    }
    if "inner_optimizer" not in arguments:
        arguments["inner_optimizer"] = torch.optim.SGD(case.student.parameters(), lr=0.3)
    return metapl.hypergradient(**case.networks(), mode=mode, **arguments)


def trainer_for(case: Toy, mode: Any = "forward", **options: Any) -> metapl.BilevelTrainer:
    networks = {name: options.pop(name, network) for name, network in case.networks().items()}
    return metapl.BilevelTrainer(**networks, mode=mode, **{"verify": False, **options})


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}
