"""Whole trainings end on the bits that are stored in bits.json.

Each row takes 20 steps with a tiny network and is hashed: weights, buffers, feedback, the default
generator. A hash depends on torch's version, on the number of threads, and on the kernels that
torch's libraries choose for the processor, which no name of it tells: so a few steps in plain
PyTorch are hashed too, and hashes are compared only where all of these are the stored ones.
Elsewhere norms and a few products with fixed vectors are compared, to 1e-5.

A change that is meant to round otherwise renews the file in a commit of its own, and says why:

    python tests/library/test_bits.py
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

import metapl
from metapl import UDA, CrossEntropy, Lookahead

STORED = Path(__file__).with_name("bits.json")
STEPS = 20
ROWS = 12
LABELED = 8
WIDTH = 16
CLASSES = 4


def network(kind: str, scale: float = 1.0) -> nn.Module:
    """Return a network smooth everywhere, so that other rounding ends near the same weights."""
    if kind == "conv":
        return nn.Sequential(
            nn.Unflatten(1, (1, 4, 4)),
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.SiLU(),
            nn.Conv2d(6, 6, 3, stride=2),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(6, CLASSES),
        )
    layers: list[nn.Module] = [nn.Linear(WIDTH, 10)]
    layers.append(nn.BatchNorm1d(10) if "norm" in kind else nn.LayerNorm(10))
    layers.append(nn.GELU())
    if "dropout" in kind:
        layers.append(nn.Dropout(0.2 * scale))
    layers += [nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 4)]
    return nn.Sequential(*layers)


BuildOptimizer = Callable[[nn.Module], Any]
"""A function that builds an optimizer of a network's trainable weights."""


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def with_two_groups(optimizer_class: Any, **options: Any) -> BuildOptimizer:
    """Return what builds an optimizer: matrices decay, at a rate of their own; others do not."""

    def build(module: nn.Module) -> Any:
        matrices = [p for p in trainable(module) if p.ndim > 1]
        vectors = [p for p in trainable(module) if p.ndim <= 1]
        groups = [
            {"params": matrices, "lr": 0.02, "weight_decay": 0.05},
            {"params": vectors, "lr": 0.05},
        ]
        return optimizer_class(groups, **options)

    return build


def with_one_group(optimizer_class: Any, **options: Any) -> BuildOptimizer:
    return lambda module: optimizer_class(trainable(module), **options)


NESTEROV = with_one_group(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
# Adam divides by the root of its second moment: with a tiny eps the first steps would magnify
# rounding.
ADAM = with_one_group(torch.optim.Adam, lr=0.02, betas=(0.8, 0.95), eps=1e-3)
ADAMW = with_one_group(torch.optim.AdamW, lr=0.02, eps=1e-3, weight_decay=0.1)


def torchopt_sgd(module: nn.Module) -> Any:
    return torchopt.sgd(0.1, momentum=0.9)


@dataclass(frozen=True)
class Row:
    """One training.

    A row does not depend on defaults: unless its options say otherwise, the feedback has the weight
    1, and that of a whole batch is times the sum of its labels' terms.

    Attributes:
        options: further arguments of the trainer.
        net: what :func:`network` builds.
        lookahead: K inner batches a step.
        has_views: each inner batch is a weak and a strong view.
        is_frozen: the first layer of both networks is not trained.
        tolerance: what each number may be off, of the norm, where hashes are not compared.
    """

    mode: Any
    inner: BuildOptimizer
    outer: BuildOptimizer = NESTEROV
    net: str = "plain"
    options: Mapping[str, Any] = field(default_factory=lambda: {"feedback_weight": 1.0})
    lookahead: int = 1
    has_views: bool = False
    is_frozen: bool = False
    tolerance: float = 1e-5


FEEDBACK = metapl.feedback
TANGENT = FEEDBACK.Forward(by="tangent")
GRAPH = FEEDBACK.Forward(by="graph")
SUM = FEEDBACK.Reinforce(reduction="sum")
SGD_GROUPS = with_two_groups(torch.optim.SGD)
ADAMW_GROUPS = with_two_groups(torch.optim.AdamW, eps=1e-3)
WEIGHT_ONE = {"feedback_weight": 1.0}

TABLE: dict[str, Row] = {
    "forward nesterov norm dropout": Row(TANGENT, NESTEROV, net="norm dropout"),
    "forward adam accumulate": Row(TANGENT, ADAM, options={**WEIGHT_ONE, "accumulate": 2}),
    "forward adamw groups conv": Row(TANGENT, ADAMW_GROUPS, ADAMW, net="conv"),
    "forward nesterov K=3 norm dropout": Row(
        TANGENT, NESTEROV, ADAM, net="norm dropout", lookahead=3
    ),
    "forward nesterov bfloat16": Row(
        TANGENT,
        NESTEROV,
        net="norm",
        options={**WEIGHT_ONE, "precision": "bfloat16"},
        tolerance=5e-2,
    ),
    "forward nesterov UDA": Row(TANGENT, NESTEROV, net="norm dropout", has_views=True),
    "forward by graph adamw groups conv": Row(GRAPH, ADAMW_GROUPS, ADAM, net="conv"),
    "reinforce nesterov UDA norm dropout": Row(SUM, NESTEROV, net="norm dropout", has_views=True),
    "reinforce plain frozen groups": Row(SUM, SGD_GROUPS, SGD_GROUPS, is_frozen=True),
    # Not with one number for all examples: that of a step of clipped length is 0.
    "per example adam ratio": Row(
        "reinforce_per_example",
        ADAM,
        net="norm dropout",
        options={"feedback_ratio": 0.5},
        tolerance=1e-4,
    ),
    "unrolled adamw K=3 groups": Row("unrolled", ADAMW_GROUPS, net="norm", lookahead=3),
    # A difference of outputs in float32 has few digits.
    "difference nesterov norm dropout": Row(
        "difference", NESTEROV, net="norm dropout", tolerance=1e-3
    ),
    "loss difference torchopt baseline": Row(
        FEEDBACK.LossDifference(baseline=0.5, reduction="sum"), torchopt_sgd, tolerance=1e-4
    ),
    "none adam K=3 dropout": Row("none", ADAM, ADAM, net="dropout", lookahead=3),
    "reinforce mean bound": Row("reinforce", NESTEROV, net="norm", options={"feedback_bound": 0.1}),
    "forward bound accumulate": Row(
        TANGENT, NESTEROV, ADAM, options={"accumulate": 2, "feedback_bound": 0.05}
    ),
    "implicit series": Row(
        FEEDBACK.Implicit(solver="neumann", iterations=3, damping=0.1), NESTEROV
    ),
}


def batches(row: Row) -> list[tuple[Any, Any]]:
    """Return all batches, from a generator of their own: steps alone use the default one."""
    generator = torch.Generator().manual_seed(1)

    def inner_batch() -> Any:
        x = torch.randn(ROWS, WIDTH, generator=generator)
        if not row.has_views:
            return x
        strong = x + 0.3 * torch.randn(ROWS, WIDTH, generator=generator)
        return x, strong

    pairs: list[tuple[Any, Any]] = []
    for _ in range(STEPS):
        x = torch.randn(LABELED, WIDTH, generator=generator)
        y = torch.randint(CLASSES, (LABELED,), generator=generator)
        if row.lookahead > 1:
            inner: Any = Lookahead([inner_batch() for _ in range(row.lookahead)])
        else:
            inner = inner_batch()
        pairs.append(((x, y), inner))
    return pairs


def teacher_losses(row: Row) -> list[Any]:
    """Return losses with all settings, so that a row does not depend on defaults.

    UDA's labels are soft, which rounding cannot flip.
    """
    losses: list[Any] = [CrossEntropy(label_smoothing=0.1)]
    if row.has_views:
        losses.append(UDA(temperature=0.7, threshold=0.0, ramp=10, start=2))
    return losses


def freeze_first_layer(module: nn.Module) -> None:
    linear_layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    linear_layers[0].requires_grad_(requires_grad=False)


def train(row: Row) -> tuple[metapl.BilevelTrainer, list[Tensor]]:
    """Return the trainer after its steps, and the feedback of each."""
    torch.manual_seed(0)
    teacher = network(row.net)
    student = network(row.net, 1.5)
    if row.is_frozen:
        freeze_first_layer(teacher)
        freeze_first_layer(student)
    options: dict[str, Any] = {
        "teacher_losses": teacher_losses(row),
        # Two rows have a first step that is verified, which draws nothing.
        "verify": row.has_views,
        **row.options,
    }
    if row.lookahead > 1:
        options["lookahead"] = row.lookahead
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        row.mode,
        inner_optimizer=row.inner(student),
        outer_optimizer=row.outer(teacher),
        **options,
    )
    pairs = batches(row)
    torch.manual_seed(2)
    feedback: list[Tensor] = []
    for outer, inner in pairs:
        h = trainer.step(outer, inner).feedback
        feedback += h if isinstance(h, tuple) else (h,)
    return trainer, feedback


def tensors_by_part(
    trainer: metapl.BilevelTrainer, feedback: Iterable[Tensor] = ()
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors that a training leaves: buffers, student, teacher, feedback, by name.

    A part without tensors is left out.
    """
    parts: dict[str, dict[str, Tensor]] = {"buffers": {}}
    for role in ("student", "teacher"):
        module = getattr(trainer, role)
        parts[role] = {name: p.detach() for name, p in module.named_parameters()}
        for name, buffer in module.named_buffers():
            parts["buffers"][f"{role}.{name}"] = buffer
    parts["feedback"] = {f"{number:03}": h for number, h in enumerate(feedback)}
    return {part: tensors for part, tensors in parts.items() if tensors}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of names, types, shapes and bytes, in the order of the names."""
    sha256 = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        sha256.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        sha256.update(t.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def norm_and_products(tensors: Mapping[str, Tensor]) -> list[float]:
    """Return the norm of all numbers together, and their products with three vectors.

    Each is a vector of cosines with a frequency of its own: float64, and no greater than a norm.
    """
    flat = torch.cat([t.detach().double().flatten() for _, t in sorted(tensors.items())])
    place = torch.arange(len(flat), dtype=torch.float64)
    numbers = [float(flat.norm())]
    for frequency in (0.7, 1.9, 2.8):
        cosines = torch.cos(place * frequency + frequency)
        numbers.append(float((flat * cosines).sum()))
    return numbers


def outcome(
    parts: Mapping[str, Mapping[str, Tensor]], generator: Tensor | None = None
) -> dict[str, Any]:
    """Return what is stored of a row."""
    hashes = {part: digest(tensors) for part, tensors in parts.items()}
    if generator is not None:
        hashes["generator"] = digest({"state": generator})
    return {
        "sha256": hashes,
        "numbers": {part: norm_and_products(tensors) for part, tensors in parts.items()},
    }


def this_machine() -> dict[str, Any]:
    """Return what the bits depend on."""
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "plain_steps": digest(plain_steps()),
    }


def plain_steps() -> dict[str, Tensor]:
    """Return the weights after three steps of each network, which plain PyTorch takes.

    A step goes along the derivative of a gradient's norm, so that its kernels include those of
    second derivatives.
    """
    ended = dict[str, Tensor]()
    for kind in ("norm", "layer", "conv"):
        torch.manual_seed(3)
        net = network(kind)
        inputs = torch.randn(ROWS, WIDTH)
        labels = torch.arange(ROWS) % CLASSES
        for _ in range(3):
            weights = [*net.parameters()]
            loss = nn.functional.cross_entropy(net(inputs), labels)
            gradient = torch.autograd.grad(loss, weights, create_graph=True)
            norm = torch.stack([g.square().sum() for g in gradient]).sum()
            along = torch.autograd.grad(norm, weights)
            with torch.no_grad():
                for p, g, t in zip(weights, gradient, along, strict=True):
                    p -= 0.05 * (g + t)
        ended |= {f"{kind}.{name}": p.detach() for name, p in net.named_parameters()}
    return ended


@contextmanager
def one_thread() -> Iterator[None]:
    """Set one thread, on whose number rounding depends.

    The default generator is left as it was.
    """
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


def check(
    result: dict[str, Any], stored: dict[str, Any], machine: dict[str, Any], tolerance: float = 1e-5
) -> None:
    """Assert that a row's outcome is as it is stored.

    To the bit where the machine is that of the store, else to ``tolerance`` of each norm.
    """
    hashes = result["sha256"]
    other_parts = [part for part, sha256 in stored["sha256"].items() if hashes.get(part) != sha256]
    if machine == this_machine():
        assert not other_parts, f"other bits in {other_parts}"
    assert result["numbers"].keys() == stored["numbers"].keys()
    for part, stored_numbers in stored["numbers"].items():
        norm = stored_numbers[0]
        scale = max(norm, 1e-30)
        numbers = result["numbers"][part]
        gaps = [abs(a - b) / scale for a, b in zip(numbers, stored_numbers, strict=True)]
        assert max(gaps) <= tolerance, (part, gaps)


@pytest.fixture(name="stored", scope="module")
def _stored() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(STORED.read_text())
    return stored


def test_what_is_stored_is_what_is_run(stored: dict[str, Any]) -> None:
    assert stored["rows"].keys() == TABLE.keys()


def outcome_of_row(name: str) -> dict[str, Any]:
    with one_thread():
        trainer, feedback = train(TABLE[name])
        return outcome(tensors_by_part(trainer, feedback), torch.get_rng_state())


LONG = {
    "forward nesterov K=3 norm dropout",
    "forward adamw groups conv",
    "forward nesterov UDA",
    "none adam K=3 dropout",
}


def row_names() -> list[Any]:
    """Return the names of all rows, those of ``LONG`` with that mark."""
    names: list[Any] = []
    for name in TABLE:
        if name in LONG:
            names.append(pytest.param(name, marks=pytest.mark.long))
        else:
            names.append(name)
    return names


@pytest.mark.parametrize("name", row_names())
def test_twenty_steps_end_on_the_same_bits(stored: dict[str, Any], name: str) -> None:
    with one_thread():
        check(
            outcome_of_row(name),
            stored["rows"][name],
            machine=stored["machine"],
            tolerance=TABLE[name].tolerance,
        )


def main() -> None:
    """Store what every row ends on, on this machine."""
    with one_thread():
        machine = this_machine()
    rows = {name: outcome_of_row(name) for name in TABLE}
    STORED.write_text(json_lines({"machine": machine, "rows": rows}))


def json_lines(stored: dict[str, Any]) -> str:
    """Return JSON with a line for each row."""
    fields = []
    for name, entries in stored.items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items()]
        text = ",\n".join(lines)
        fields.append(f' "{name}": {{\n{text}\n }}')
    return "{\n" + ",\n".join(fields) + "\n}\n"


if __name__ == "__main__":
    main()
