"""What ends in an error has moved no weight, buffer, gradient, optimizer state and generator.

There is a table of wrong calls, and there is a property: an error that is raised anywhere within a
step leaves everything bit for bit as it was, and the next step is the one that would have been
taken.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems_zoo import ANYWHERE
from test_bits import GRAPH, TANGENT
from test_functional import Modulus
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import metapl
from metapl import UDA, CrossEntropy, Lookahead, MetaplError, Signal
from metapl.problems import EqualWeights, LearningToReweight

ROWS = 6
LABELED = 4
WIDTH = 5
CLASSES = 3


def network(inside: nn.Module | None = None) -> nn.Module:
    """Return a network with all that a pass may leave behind."""
    return nn.Sequential(
        nn.Linear(WIDTH, 8),
        nn.BatchNorm1d(8),
        nn.Tanh(),
        nn.Dropout(0.3),
        nn.Identity() if inside is None else inside,
        nn.Linear(8, CLASSES),
    )


@dataclass
class Case:
    """Two networks with gradients, two optimizers, two batches and a generator.

    Some of them may be replaced.
    """

    teacher: Any = field(default_factory=network)
    student: Any = field(default_factory=network)
    inner: Any = None
    outer: Any = None
    generator: Any = None
    trainer: Any = None

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(LABELED, WIDTH, generator=generator)
        self.u = torch.randn(ROWS, WIDTH, generator=generator)
        self.y = torch.tensor([0, 1, 2, 0])
        self.inner = torch.optim.SGD(self.student.parameters(), lr=0.1, momentum=0.9)
        self.outer = torch.optim.Adam(self.teacher.parameters(), lr=0.01)
        for number, network in enumerate((self.teacher, self.student)):
            for p in network.parameters():
                p.grad = torch.full_like(p, 0.25 + number)

    def build(self, mode: Any = "forward", **options: Any) -> metapl.BilevelTrainer:
        """Return a trainer of these networks and optimizers, unless options say otherwise."""
        defaults = {
            "teacher": self.teacher,
            "student": self.student,
            "mode": mode,
            "inner_optimizer": self.inner,
            "outer_optimizer": self.outer,
            "teacher_losses": (CrossEntropy(),),
        }
        return metapl.BilevelTrainer(**{**defaults, **options})

    def step(
        self, mode: Any = "forward", *, outer: Any = None, inner: Any = None, **options: Any
    ) -> Any:
        """Return the call of a step of a trainer that is built here, on these batches or others."""
        if outer is None:
            outer = (self.x, self.y)
        if inner is None:
            inner = self.u
        return partial(self.build(mode, **options).step, outer, inner)

    def everything(self) -> dict[str, Any]:
        """Return what an error leaves as it was."""
        state: dict[str, Any] = {
            "default generator": torch.get_rng_state(),
            "python's": random.getstate(),
        }
        # The library must not draw from NumPy's old generator either.
        state["numpy's"] = np.random.get_state()[1].tolist()  # noqa: NPY002
        for role, network in (("teacher", self.teacher), ("student", self.student)):
            for name, p in network.named_parameters():
                state[f"{role}.{name}"] = p
                state[f"{role}.{name}.grad"] = p.grad
                state[f"{role}.{name} asks"] = p.requires_grad
            for name, buffer in network.named_buffers():
                state[f"{role}.{name}"] = buffer
            for name, module in network.named_modules():
                state[f"{role}.{name} is"] = (
                    module.training,
                    len(module._forward_hooks),
                    len(module._forward_pre_hooks),
                    sorted(vars(module)),
                )
        for role, optimizer in (("inner", self.inner), ("outer", self.outer)):
            leaves, _ = pytree.tree_flatten(optimizer.state_dict())
            for number, leaf in enumerate(leaves):
                state[f"{role} {number}"] = leaf
        if self.generator is not None:
            state["own generator"] = self.generator.get_state()
        if self.trainer is not None:
            trainer_state = self.trainer.state_dict()
            # The verdict of verification stands, whatever becomes of the step.
            del trainer_state["verification"]
            leaves, _ = pytree.tree_flatten(trainer_state)
            for number, leaf in enumerate(leaves):
                state[f"state {number}"] = leaf
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = value.detach().clone()
        return state


def is_same(a: Any, b: Any) -> bool:
    """Return whether two values are equal, tensors bit for bit: there NaN is equal to itself."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits_of_a = a.contiguous().reshape(-1).view(torch.uint8)
    bits_of_b = b.contiguous().reshape(-1).view(torch.uint8)
    return torch.equal(bits_of_a, bits_of_b)


def changes(state_before: dict[str, Any], state: dict[str, Any]) -> list[str]:
    """Return the names of what is no longer bit for bit as it was."""
    names = []
    for name in state_before:
        if name in state and not is_same(state_before[name], state[name]):
            names.append(name)
    return [*names, *sorted(state_before.keys() ^ state.keys())]


class Odd(metapl.problems.BilevelProblem):
    """Soft labels, of which one method returns something else, made from what it should return."""

    def __init__(self, **changes: Callable[[Any], Any]) -> None:
        self.changes = changes

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Any, *, generator: Any
    ) -> Signal:
        return self.odd("signal", Signal(teacher(batch).softmax(-1)))

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return self.odd("inner_loss", -(signal.value * outputs.log_softmax(-1)).sum(-1))

    def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
        return self.odd("outer_loss", F.cross_entropy(outputs, batch[1]))

    def odd(self, method: str, value: Any) -> Any:
        if method in self.changes:
            return self.changes[method](value)
        return value


class OwnLoss:
    """A teacher's loss that returns something else than its mean."""

    name = "own"

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        self.change = change

    def __call__(
        self, teacher: nn.Module, *, outer: Any, inner: Any, signal: Signal, step: int
    ) -> Any:
        return self.change(F.cross_entropy(teacher(outer[0]), outer[1], reduction="none"))


class Sparse(nn.Module):
    """A student whose embedding has sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(9, 4, sparse=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x.abs().long()))


def with_a_hook_on_a_weight() -> Case:
    """Change the gradient of a weight by a hook, which copies of a network drop."""
    case = Case()
    case.student[0].weight.register_hook(lambda g: g / 2)
    return case


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return network()


def in_inference_mode(step: Callable[[], Any]) -> None:
    with torch.inference_mode():
        step()


def with_a_shared_layer() -> Case:
    """Return a case whose networks both hold one layer."""
    case = Case()
    case.student[-1] = case.teacher[-1]
    case.inner = torch.optim.SGD(case.student.parameters(), lr=0.1)
    return case


def other_head(role: str) -> Callable[[Case], Callable[[], Any]]:
    """Replace the head of a network when the trainer is there.

    Its weights are then in no optimizer.
    """

    def step_with_another_head(case: Case) -> Callable[[], Any]:
        step = case.step()
        getattr(case, role)[-1] = nn.Linear(8, CLASSES)
        return step

    return step_with_another_head


def with_an_infinite_rate() -> Case:
    case = Case()
    case.inner.param_groups[0]["lr"] = float("inf")
    return case


def hypergradient(case: Case, **options: Any) -> Callable[[], Any]:
    defaults = {
        "outer": (case.x, case.y),
        "inner": case.u,
        "inner_optimizer": case.inner,
        "mode": "forward",
    }
    return partial(metapl.hypergradient, case.teacher, case.student, **{**defaults, **options})


def attribute(case: Case, **options: Any) -> Callable[[], Any]:
    defaults = {
        "train": (case.u, torch.arange(ROWS) % CLASSES),
        "outer": (case.x, case.y),
        "optimizer": case.inner,
        "steps": 2,
        "batch_size": 3,
        "progress": False,
    }
    return partial(metapl.attribute, case.student, **{**defaults, **options})


def without_first_weight(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([*module.parameters()][1:], lr=0.1)


def muon_of_matrices(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for p in module.parameters() if p.ndim == 2])


def muon_with_a_bias(module: nn.Module) -> torch.optim.Optimizer:
    muon = muon_of_matrices(module)
    muon.add_param_group({"params": [p for p in module.parameters() if p.ndim != 2]})
    return muon


Wrong = Callable[[Case], Callable[[], Any]]
"""A function that returns, of a case, the call that cannot be meant.

What the call needs, such as a trainer, is built by then.
"""

TRAINERS: dict[str, Wrong] = {
    "one network as both": lambda c: partial(metapl.BilevelTrainer, c.student, c.student),
    "a student without weights": lambda c: partial(c.build, student=nn.Identity()),
    "no teacher": lambda c: partial(
        c.build, teacher=None, outer_optimizer=None, teacher_losses=None
    ),
    "an inner optimizer that lacks a weight": lambda c: partial(
        c.build, inner_optimizer=without_first_weight(c.student)
    ),
    "an inner optimizer of the teacher": lambda c: partial(c.build, inner_optimizer=c.outer),
    "an inner optimizer without a rule": lambda c: partial(
        c.build, inner_optimizer=torch.optim.Rprop(c.student.parameters())
    ),
    "an outer optimizer that lacks a weight": lambda c: partial(
        c.build, outer_optimizer=without_first_weight(c.teacher)
    ),
    "two optimizers of one weight": lambda c: partial(
        c.build, inner_optimizer=(c.inner, without_first_weight(c.student))
    ),
    "two outer optimizers of one weight": lambda c: partial(
        c.build, outer_optimizer=(c.outer, without_first_weight(c.teacher))
    ),
    "an optimizer of matrices alone": lambda c: partial(
        c.build, inner_optimizer=(muon_of_matrices(c.student),)
    ),
    "Muon of a bias": lambda c: partial(c.build, inner_optimizer=(muon_with_a_bias(c.student),)),
    "a tuple of names": lambda c: partial(c.build, inner_optimizer=("muon", "adamw")),
    "an empty tuple": lambda c: partial(c.build, inner_optimizer=()),
    "an optimizer of another network beside": lambda c: partial(
        c.build, inner_optimizer=(c.inner, c.outer)
    ),
    "steps ahead in Algorithm 1": lambda c: partial(c.build, "reinforce", lookahead=2),
    "another way to compile": lambda c: partial(c.build, compile="max-autotune"),
    "hard labels in double backward": lambda c: partial(
        c.build, "unrolled", problem=metapl.PseudoLabels(kind="hard")
    ),
    "a student without shapes yet": lambda c: partial(
        c.build, student=nn.Sequential(nn.LazyLinear(CLASSES)), inner_optimizer=None
    ),
    "a student made in inference mode": lambda c: c.step(
        student=made_in_inference_mode(), inner_optimizer=None
    ),
    "a student in DataParallel": lambda c: partial(c.build, student=nn.DataParallel(c.student)),
}
STEPS: dict[str, Wrong] = {
    "a step in inference mode": lambda c: partial(in_inference_mode, c.step()),
    "a batch too few": lambda c: c.step(lookahead=2),
    "steps ahead that the mode does not take": lambda c: c.step(
        "reinforce", inner=Lookahead([c.u, c.u])
    ),
    "fewer rows than micro-batches": lambda c: c.step(accumulate=5),
    "one view for two": lambda c: c.step(teacher_losses=(UDA(),)),
    "a signal that is a tensor": lambda c: c.step(problem=Odd(signal=lambda s: s.value)),
    "a signal of complex numbers": lambda c: c.step(
        problem=Odd(signal=lambda s: Signal(s.value + 0j))
    ),
    "a signal that is no number": lambda c: c.step(
        problem=Odd(signal=lambda s: Signal(s.value * NAN))
    ),
    "a signal of whole numbers": lambda c: c.step(
        problem=Odd(signal=lambda s: Signal(s.value.argmax(-1)))
    ),
    "a signal without a graph": lambda c: c.step(
        problem=Odd(signal=lambda s: Signal(s.value.detach()))
    ),
    "log-probabilities of another shape": lambda c: c.step(
        "reinforce",
        problem=Odd(signal=lambda s: Signal(s.value.argmax(-1), log_prob=s.value.log())),
    ),
    "a soft signal where labels are sampled": lambda c: c.step("reinforce", problem=Odd()),
    "an inner loss that is a mean": lambda c: c.step(problem=Odd(inner_loss=lambda t: t.mean())),
    "an inner loss that is a number": lambda c: c.step(problem=Odd(inner_loss=lambda t: 0.5)),
    "an inner loss without a graph": lambda c: c.step(
        "unrolled", problem=Odd(inner_loss=lambda t: t.detach())
    ),
    "an outer loss for each example": lambda c: c.step(
        problem=Odd(outer_loss=lambda t: t.expand(LABELED))
    ),
    "an outer loss that is a number": lambda c: c.step(
        "difference", problem=Odd(outer_loss=lambda t: float(t.detach()))
    ),
    "an outer loss without a graph": lambda c: c.step(problem=Odd(outer_loss=lambda t: t.detach())),
    "a teacher loss that is a number": lambda c: c.step(teacher_losses=(OwnLoss(lambda t: 0.5),)),
    **{f"another head of the {role}": other_head(role) for role in ("teacher", "student")},
}
FUNCTIONS: dict[str, Wrong] = {
    "hypergradient: no optimizer": lambda c: hypergradient(c, inner_optimizer=None),
    "hypergradient: an optimizer that lacks a weight": lambda c: hypergradient(
        c, inner_optimizer=without_first_weight(c.student)
    ),
    "hypergradient: steps ahead": lambda c: hypergradient(
        c, mode="difference", inner=Lookahead([c.u, c.u])
    ),
    "attribute: no steps": lambda c: attribute(c, steps=0),
    "attribute: an optimizer that lacks a weight": lambda c: attribute(
        c, optimizer=without_first_weight(c.student)
    ),
    "attribute: another mode": lambda c: attribute(c, mode=metapl.feedback.Reinforce()),
}
OTHER_NETWORKS: dict[str, tuple[Callable[[], Case], Wrong]] = {
    "a shared layer": (with_a_shared_layer, lambda c: c.build),
    "sparse gradients of the student": (
        lambda: Case(student=Sparse()),
        lambda c: c.step("forward"),
    ),
    "sparse gradients under Adam": (
        lambda: Case(student=Sparse()),
        lambda c: c.step("reinforce", inner_optimizer=torch.optim.Adam(c.student.parameters())),
    ),
    "a complex weight under Adam": (
        lambda: Case(student=Modulus(WIDTH, CLASSES, dtype=torch.complex64)),
        lambda c: c.step("forward", inner_optimizer=torch.optim.Adam(c.student.parameters())),
    ),
    "a hook on a weight": (with_a_hook_on_a_weight, lambda c: lambda: c.step("forward")()),
    "a student that diverges within its step": (with_an_infinite_rate, lambda c: c.step("forward")),
}
TABLE: dict[str, tuple[Callable[[], Case], Wrong]] = {
    **{name: (Case, wrong_call) for name, wrong_call in (TRAINERS | STEPS | FUNCTIONS).items()},
    **OTHER_NETWORKS,
}


@pytest.mark.parametrize("name", TABLE)
def test_a_wrong_call_moves_nothing(name: str) -> None:
    build_case, wrong_call = TABLE[name]
    torch.manual_seed(0)
    case = build_case()
    call = wrong_call(case)
    state_before = case.everything()
    with pytest.raises(MetaplError):
        call()
    assert changes(state_before, case.everything()) == []


def calls_with(generator: torch.Generator, case: Case) -> dict[str, Callable[[], Any]]:
    """Return every call that takes a generator.

    ``generator`` is of another device than that on which it is to draw.
    """
    batches: dict[str, Any] = {"outer": (case.x, case.y), "inner": case.u}
    inputs: dict[str, Any] = {
        **batches,
        "teacher": case.teacher,
        "student": case.student,
        "mode": "reinforce",
        "inner_optimizer": case.inner,
        "generator": generator,
    }

    def gradient_of_a_trainer() -> Any:
        return case.build("reinforce").hypergradient(**batches, generator=generator)

    return {
        "a trainer": partial(case.build, "reinforce", generator=generator),
        "a trainer without verification": partial(
            case.build, "reinforce", generator=generator, verify=False
        ),
        "a trainer's gradient": gradient_of_a_trainer,
        "hypergradient": partial(metapl.hypergradient, **inputs),
        "hypergradient, verified": partial(metapl.hypergradient, **inputs, verify=True),
        "check_gradient": partial(metapl.check_gradient, **inputs),
    }


REFUSED_GENERATOR = (
    r"^generator is on {}.*, and the networks are on {}.*; "
    r"expected torch.Generator\('{}.*'\), or none.$"
)


CALLS_WITH_A_GENERATOR = [*calls_with(torch.Generator(), Case())]


# A trainer's gradient first saves the state of its device's own generator, which the meta device
# has not.
@pytest.mark.parametrize(
    "call", [call for call in CALLS_WITH_A_GENERATOR if call != "a trainer's gradient"]
)
def test_a_generator_of_the_cpu_is_refused_for_networks_elsewhere(call: str) -> None:
    """A refusal on the meta device, which is everywhere.

    A pass that began there would fail otherwise.
    """
    case = Case(network().to("meta"), network().to("meta"))
    generator = torch.Generator()
    generator_state = generator.get_state()
    with pytest.raises(MetaplError, match=REFUSED_GENERATOR.format("cpu", "meta", "meta")):
        calls_with(generator, case)[call]()
    assert torch.equal(generator.get_state(), generator_state)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch makes no generator of a device that is not there"
)
@pytest.mark.parametrize("call", CALLS_WITH_A_GENERATOR)
def test_a_generator_of_another_device_is_refused(call: str) -> None:
    case = Case()
    state_before = case.everything()
    with pytest.raises(MetaplError, match=REFUSED_GENERATOR.format("cuda", "cpu", "cpu")):
        calls_with(torch.Generator("cuda"), case)[call]()
    assert changes(state_before, case.everything()) == []


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch makes no generator of a device that is not there"
)
def test_attribute_draws_its_order_on_the_cpu() -> None:
    case = Case()
    data = case.x, case.y
    with pytest.raises(
        MetaplError,
        match=r"generator is on cuda(:0)?, and the order of the examples is drawn on cpu",
    ):
        metapl.attribute(
            case.student,
            data,
            data,
            optimizer=case.inner,
            steps=1,
            batch_size=2,
            generator=torch.Generator("cuda"),
        )


NAN = float("nan")
INF = float("inf")
TOO_WIDE = "one pixel too many"
"""An input that the user's own network refuses, in the network's words."""

NOT_INPUTS: dict[str, Callable[[Tensor], Any]] = {
    "nan": lambda x: x.index_fill(0, torch.tensor(1), NAN),
    "infinite": lambda x: x.index_fill(0, torch.tensor(0), -INF),
    "no rows": lambda x: x[:0],
    "elsewhere": lambda x: x.to("meta"),
    "text": lambda x: "pictures",
    "number": lambda x: 3,
    "object": lambda x: object(),
    "three views": lambda x: (x, x, x),
    "two lengths": lambda x: (x, x[:2]),
    "texts": lambda x: ["a", "b"],
    "a scalar": lambda x: x.sum(),
    TOO_WIDE: lambda x: torch.cat([x, x[..., :1]], -1),
    "other floats": lambda x: x.half(),
    "whole numbers": lambda x: x.long(),
}
NOT_LABELS: dict[str, Callable[[Tensor], Any]] = {
    "too large": lambda y: y + 3,
    "negative": lambda y: y - 3,
    "floats": lambda y: y.double(),
    "bools": lambda y: y > 0,
    "int32": lambda y: y.int(),
    "one-hot": lambda y: nn.functional.one_hot(y, 3),
    "too few": lambda y: y[:2],
    "none": lambda y: None,
    "a list": lambda y: y.tolist(),
    "a column": lambda y: y[:, None],
}
NOT_OPTIONS: dict[str, list[Any]] = {
    "steps": [0, -1, 2.5, "6", True, None],
    "schedule": ["linear", 3, None],
    "warmup": [-1, 99, "2"],
    "wait": [-1, 99],
    "ema_decay": [1.5, -0.1, NAN, "x"],
    "validate_every": [0, 1.5],
    "log_every": [0, -3],
    "save_every": [0, "all"],
    "keep": [0, -1],
    "phase": ["a/b", "..", "", 3],
    "num_workers": [-1, 257, 1.5],
    "validation": ["x", 5, [], (torch.zeros(0, 1, 4, 4), torch.zeros(0).long())],
}
NOT_TRAINERS: dict[str, list[Any]] = {
    "mode": ["foward", "", 3, None, object()],
    "problem": ["labels", 3, object()],
    "inner_optimizer": ["sgd", 0.1, object()],
    "outer_optimizer": ["sgd", 0.1],
    "teacher_losses": ["uda", 3, [3], (None,)],
    "feedback_weight": [NAN, INF, "1", None],
    "feedback_ratio": [-1.0, NAN, "1"],
    "clip_norm": [0, -1.0, NAN, "1"],
    "precision": ["float64", "fp16", 16, None],
    "accumulate": [0, -1, 1.5, "2"],
    "lookahead": [0, -1, 1.5],
    "student": [None, "net", 3, nn.Identity()],
    "teacher": ["net", 3],
}


def bad_data(draw: st.DrawFn, case: Case) -> dict[str, Any]:
    """Draw both batches, of which one cannot be meant."""
    kind = draw(st.sampled_from(["labels", "labeled inputs", "inner", "no pair"]))
    table = NOT_LABELS if kind == "labels" else NOT_INPUTS
    names = set(table)
    if kind == "labeled inputs":
        # A tuple of tensors is an input too.
        names -= {"three views", "two lengths"}
    change = table[draw(st.sampled_from(sorted(names)))]
    if kind == "labels":
        return {"outer": (case.x, change(case.y)), "inner": case.u}
    if kind == "labeled inputs":
        return {"outer": (change(case.x), case.y), "inner": case.u}
    if kind == "inner":
        return {"outer": (case.x, case.y), "inner": change(case.u)}
    return {"outer": change(case.x), "inner": case.u}


def bad_call(draw: st.DrawFn, case: Case, folder: Path) -> tuple[str, Callable[[], Any]]:
    """Return a call that cannot be meant, and its name."""
    kinds = [
        "step",
        "hypergradient",
        "fit",
        "fit data",
        "trainer",
        "evaluate",
        "load",
        "state",
        "save",
    ]
    kind = draw(st.sampled_from(kinds))
    trainer = case.trainer
    fit = partial(trainer.fit, steps=2, progress=False, out=folder / "run")
    sources = {"outer": [(case.x, case.y)], "inner": [case.u]}
    if kind == "step":
        return kind, partial(trainer.step, **bad_data(draw, case))
    if kind == "hypergradient":
        # Mode "none" does not read the values of the labeled batch.
        mode = draw(st.sampled_from([mode for mode in ANYWHERE if mode != "none"]))
        return kind, hypergradient(case, mode=mode, **bad_data(draw, case))
    if kind == "fit":
        option = bad_option(draw, NOT_OPTIONS)
        return f"{kind} {option}", partial(fit, **sources, **option)
    if kind == "trainer":
        option = bad_option(draw, NOT_TRAINERS)
        return f"{kind} {option}", partial(case.build, **option)
    if kind == "fit data":
        data = draw(st.sampled_from([5, "x", object(), [5], [None], [(1, 2)]]))
        name = draw(st.sampled_from(["outer", "inner", "validation"]))
        return kind, partial(fit, **{**sources, name: data})
    if kind == "evaluate":
        x = NOT_INPUTS[draw(st.sampled_from(["text", "number", "object", TOO_WIDE]))](case.x)
        calls = [partial(trainer.evaluate, (x, case.y)), partial(trainer.predict, x)]
        return kind, draw(st.sampled_from(calls))
    if kind == "load":
        file_names = ["nothing", "garbage", "empty", "cut", "flipped", "."]
        path = folder / draw(st.sampled_from(file_names))
        return f"load {path.name}", partial(trainer.load, path)
    if kind == "state":
        state = trainer.state_dict()
        name = draw(st.sampled_from(sorted(state)))
        without_name = {key: value for key, value in state.items() if key != name}
        state = draw(st.sampled_from([{}, without_name]))
        return f"state without {name}", partial(trainer.load_state_dict, state)
    return kind, partial(trainer.save, folder / draw(st.sampled_from(["garbage/under", "."])))


def bad_option(draw: st.DrawFn, table: dict[str, list[Any]]) -> dict[str, Any]:
    """Draw an option of this table, and a value that it cannot have."""
    name = draw(st.sampled_from(sorted(table)))
    return {name: draw(st.sampled_from(table[name]))}


@settings(max_examples=14, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_what_is_refused_leaves_everything_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Networks, generators, states and files are left."""
    torch.manual_seed(0)
    case = Case()
    folder = tmp_path_factory.mktemp("folder")
    case.generator = data.draw(st.sampled_from([None, torch.Generator().manual_seed(1)]))
    mode = data.draw(st.sampled_from(ANYWHERE))
    parts = data.draw(st.sampled_from([1, 2]))
    options = {
        "recompute_teacher": data.draw(st.booleans()),
        "clip_norm": data.draw(st.sampled_from([None, 1.0])),
    }
    with warnings.catch_warnings(action="ignore"):
        case.trainer = case.build(mode, accumulate=parts, generator=case.generator, **options)
        for _ in range(data.draw(st.integers(0, 2))):
            case.trainer.step((case.x, case.y), case.u)
        case.trainer.save(folder / "saved.safetensors")
        saved = (folder / "saved.safetensors").read_bytes()
        (folder / "garbage").write_bytes(b"\x80\x04nothing that was saved")
        (folder / "empty").write_bytes(b"")
        (folder / "cut").write_bytes(saved[: len(saved) // 2])
        (folder / "flipped").write_bytes(saved[:-7] + bytes([saved[-7] ^ 1]) + saved[-6:])
        name, call = data.draw(st.composite(bad_call)(case, folder), label="call")

        # The folder of a fit is not compared, for it is refused at its first step.
        def state_and_files() -> dict[str, Any]:
            files = {str(path): path.read_bytes() for path in folder.iterdir() if path.is_file()}
            return case.everything() | files

        state_before = state_and_files()
        kinds = (ValueError, RuntimeError, TypeError, LookupError, AttributeError)
        with pytest.raises(kinds) as refusal:
            call()
    assert changes(state_before, state_and_files()) == [], f"{name}: {refusal.value}"


class Broken(Exception):
    """An error that is raised within a step."""


COUNTS: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()


class Fuse:
    """Counts calls by their place, and breaks when a count is reached.

    A copy of a network has the same one. Counts stand apart, since they are no state of the
    problem, which would move with each call of its signal.
    """

    def __init__(self) -> None:
        self.breaks: tuple[str, int] | None = None

    def __deepcopy__(self, memo: Any) -> Fuse:
        return self

    @property
    def counts(self) -> dict[str, int]:
        return COUNTS.setdefault(self, {})

    def count(self, place: str) -> None:
        self.counts[place] = self.counts.get(place, 0) + 1
        if self.breaks == (place, self.counts[place]):
            raise Broken


class Wire(torch.autograd.Function):
    """The identity, whose passes a fuse counts."""

    @staticmethod
    def forward(x: Tensor, fuse: Fuse, name: str) -> Tensor:
        fuse.count(f"{name} forward")
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, ctx.fuse, ctx.network = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        ctx.fuse.count(f"{ctx.network} backward")
        return g, None, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> Tensor:
        ctx.fuse.count(f"{ctx.network} tangent")
        return t.view_as(t)


class Wired(nn.Module):
    def __init__(self, fuse: Fuse, name: str) -> None:
        super().__init__()
        self.fuse = fuse
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return Wire.apply(x, self.fuse, self.name)  # type: ignore[no-any-return]


class Fused(metapl.problems.BilevelProblem):
    """Pseudo-labels, soft or drawn, whose calls a fuse counts."""

    def __init__(self, fuse: Fuse, is_hard: bool) -> None:
        self.fuse = fuse
        self.is_hard = is_hard

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Any, *, generator: Any
    ) -> Signal:
        q = teacher(batch).softmax(-1)
        labels = torch.multinomial(q.detach(), 1, generator=generator)[:, 0]
        self.fuse.count("signal")
        if not self.is_hard:
            return Signal(q)
        q_of_labels = q.gather(1, labels[:, None])[:, 0]
        return Signal(labels, log_prob=q_of_labels.log())

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        self.fuse.count("inner loss")
        return F.cross_entropy(outputs, signal.value, reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        self.fuse.count("outer loss")
        return F.cross_entropy(outputs, batch[1])


class FusedLoss:
    name = "fused"

    def __init__(self, fuse: Fuse) -> None:
        self.fuse = fuse

    def __call__(
        self, teacher: nn.Module, *, outer: Any, inner: Any, signal: Signal, step: int
    ) -> Tensor:
        self.fuse.count("teacher loss")
        return F.cross_entropy(teacher(outer[0]), outer[1])


HARD = ("reinforce", "reinforce_per_example", "loss_difference")
LOOKAHEAD = ("forward", "unrolled", "none")


@st.composite
def situations(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the arguments of :func:`fused`."""
    mode = draw(st.sampled_from([*ANYWHERE, TANGENT, GRAPH]))
    accumulate = draw(st.sampled_from([1, 2]))
    return {
        "mode": mode,
        "lookahead": draw(st.sampled_from([1, 3])) if mode in LOOKAHEAD else 1,
        "accumulate": accumulate,
        "recompute_teacher": draw(st.booleans()),
        "clip_norm": draw(st.sampled_from([None, 0.5])),
        "has_generator": draw(st.booleans()),
        "steps": draw(st.sampled_from([0, 1, 2] if accumulate == 1 else [1, 2])),
    }


def fused(
    mode: Any, lookahead: int, has_generator: bool, steps: int, **options: Any
) -> tuple[Case, Fuse, Any]:
    """Return a case with so many steps behind it, its fuse, and the batches of the next step.

    Two calls return the same.
    """
    torch.manual_seed(0)
    fuse = Fuse()
    case = Case(network(Wired(fuse, "teacher")), network(Wired(fuse, "student")))
    if has_generator:
        case.generator = torch.Generator().manual_seed(5)
    case.trainer = case.build(
        mode,
        problem=Fused(fuse, is_hard=mode in HARD),
        teacher_losses=(FusedLoss(fuse),),
        lookahead=lookahead,
        generator=case.generator,
        **options,
    )
    unlabeled = Lookahead([case.u] * lookahead) if lookahead > 1 else case.u
    batches = (case.x, case.y), unlabeled
    for _ in range(steps):
        case.trainer.step(*batches)
    fuse.counts.clear()
    return case, fuse, batches


def causes(error: BaseException | None) -> list[BaseException]:
    """Return an error and all that it was raised from, or while it was handled."""
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data(), situations())
def test_an_error_anywhere_in_a_step_moves_nothing(
    data: st.DataObject, situation: dict[str, Any]
) -> None:
    """The next step is that of a trainer that never met an error."""
    twin, fuse_of_twin, batches = fused(**situation)
    twin.trainer.step(*batches)
    state_after_step = twin.everything()
    places = []
    for place, count in sorted(fuse_of_twin.counts.items()):
        for number in range(1, count + 1):
            places.append((place, number))

    case, fuse, batches = fused(**situation)
    # The problem's state, too, has the place at which its fuse breaks.
    fuse.breaks = data.draw(st.sampled_from(places), label="place")
    state_before = case.everything()
    # The library may raise an error of its own from the broken one.
    with pytest.raises(Exception) as raised:  # noqa: PT011
        case.trainer.step(*batches)
    assert any(isinstance(error, Broken) for error in causes(raised.value))
    assert changes(state_before, case.everything()) == []
    fuse.breaks = None
    case.trainer.step(*batches)
    assert changes(state_after_step, case.everything()) == []


def test_data_of_another_type_say_the_way_out() -> None:
    """Doubles beside float32 weights, names of classes, no batch size, batches in a list."""
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    student = metapl.models.mlp([4, 8, 3])
    trainer = metapl.BilevelTrainer(None, student, problem=LearningToReweight())

    def fit(outer: Any, inner: Any, **options: Any) -> None:
        trainer.fit(outer=outer, inner=inner, steps=2, progress=False, **options)

    of_type = "float64, and the weights of Sequential float32"
    cases: list[tuple[str, Any]] = [
        (
            "float64, and the weights of Sequential float32",
            lambda: fit((x.double(), y), (x, y), batch_size=6),
        ),
        ("return_inverse=True", lambda: fit((x, np.array([*"abc"] * 4)), (x, y), batch_size=6)),
        ("such as batch_size=64, or a list of batches", lambda: fit((x, y), (x, y))),
        (of_type, lambda: trainer.predict(x.double())),
        (
            r"metapl.Lookahead\(batches\) for a step on each",
            lambda: metapl.hypergradient(
                None,
                student,
                outer=(x, y),
                inner=[(x, y)] * 5,
                problem=EqualWeights(),
                inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
            ),
        ),
    ]
    for text, call in cases:
        with pytest.raises(MetaplError, match=text):
            call()
