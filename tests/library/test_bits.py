"""Whole trainings end on the bits that are stored in bits.json.

Each row takes 20 steps with a tiny network and is hashed: weights, buffers, feedback, the default
generator. A hash depends on torch's version, on the instructions of the processor and on the number
of threads, so hashes are compared only where all three are the stored ones. Elsewhere norms and a
few products with fixed vectors are compared, to 1e-5.

A change that is meant to round otherwise renews the file in a commit of its own, and says why:

    python tests/library/test_bits.py
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

import metapl
from metapl import UDA, CrossEntropy, Lookahead

STORED = Path(__file__).with_name("bits.json")
STEPS, ROWS, LABELED, WIDTH, CLASSES = 20, 12, 8, 16, 4


def network(kind: str, scale: float = 1.0) -> nn.Module:
    """Return a network smooth everywhere, so that other rounding ends near the same weights."""
    if kind == "conv":
        layers: list[nn.Module] = [
            nn.Unflatten(1, (1, 4, 4)),
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.SiLU(),
        ]
        return nn.Sequential(
            *layers, nn.Conv2d(6, 6, 3, stride=2), nn.SiLU(), nn.Flatten(), nn.Linear(6, CLASSES)
        )
    norm = [nn.BatchNorm1d(10)] if "norm" in kind else [nn.LayerNorm(10)]
    drop = [nn.Dropout(0.2 * scale)] if "dropout" in kind else []
    return nn.Sequential(
        nn.Linear(WIDTH, 10),
        *norm,
        nn.GELU(),
        *drop,
        nn.Linear(10, 10),
        nn.Tanh(),
        nn.Linear(10, 4),
    )


Optimizer = Callable[[nn.Module], Any]


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def two_groups(build: Any, **options: Any) -> Optimizer:
    """Return what builds an optimizer: matrices decay, at a rate of their own; others do not."""

    def of(module: nn.Module) -> Any:
        flat, deep = (
            [p for p in trained(module) if (p.ndim > 1) == which] for which in (False, True)
        )
        return build(
            [{"params": deep, "lr": 0.02, "weight_decay": 0.05}, {"params": flat, "lr": 0.05}],
            **options,
        )

    return of


def of_torch(build: Any, **options: Any) -> Optimizer:
    return lambda module: build(trained(module), **options)


NESTEROV = of_torch(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
# Adam divides by the root of its second moment: with a tiny eps the first steps would magnify
# rounding.
ADAM = of_torch(torch.optim.Adam, lr=0.02, betas=(0.8, 0.95), eps=1e-3)
ADAMW = of_torch(torch.optim.AdamW, lr=0.02, eps=1e-3, weight_decay=0.1)


def torchopt_sgd(module: nn.Module) -> Any:
    return torchopt.sgd(0.1, momentum=0.9)


Row = dict[str, Any]


def row(
    mode: Any, inner: Optimizer, outer: Optimizer = NESTEROV, net: str = "plain", **options: Any
) -> Row:
    """Return one training.

    What is not an option of the trainer is ``ahead`` (K inner batches a step), ``views`` (a weak
    and a strong one), ``frozen`` (the first layer of both networks) and ``within`` (the tolerance
    without hashes).

    The feedback has the weight 1, and that of a whole batch is times the sum of its labels' terms,
    unless a row says otherwise: a row does not depend on defaults.
    """
    if not {"feedback_ratio", "feedback_bound"} & options.keys():
        options["feedback_weight"] = 1.0
    return {"mode": mode, "inner": inner, "outer": outer, "net": net, **options}


FEEDBACK = metapl.feedback


TANGENT = FEEDBACK.Forward(by="tangent")
GRAPH = FEEDBACK.Forward(by="graph")
SUM = FEEDBACK.Reinforce(reduction="sum")
TABLE: dict[str, Row] = {
    "forward nesterov norm dropout": row(TANGENT, NESTEROV, net="norm dropout"),
    "forward adam accumulate": row(TANGENT, ADAM, NESTEROV, accumulate=2),
    "forward adamw groups conv": row(
        TANGENT, two_groups(torch.optim.AdamW, eps=1e-3), ADAMW, "conv"
    ),
    "forward nesterov K=3 norm dropout": row(TANGENT, NESTEROV, ADAM, "norm dropout", ahead=3),
    "forward nesterov bfloat16": row(
        TANGENT, NESTEROV, net="norm", precision="bfloat16", within=5e-2
    ),
    "forward nesterov UDA": row(TANGENT, NESTEROV, net="norm dropout", views=True),
    "forward by graph adamw groups conv": row(
        GRAPH, two_groups(torch.optim.AdamW, eps=1e-3), ADAM, "conv"
    ),
    "reinforce nesterov UDA norm dropout": row(SUM, NESTEROV, net="norm dropout", views=True),
    "reinforce plain frozen groups": row(
        SUM, two_groups(torch.optim.SGD), two_groups(torch.optim.SGD), frozen=True
    ),
    # Not with one number for all examples: that of a step of clipped length is 0.
    "per example adam ratio": row(
        "reinforce_per_example", ADAM, net="norm dropout", feedback_ratio=0.5, within=1e-4
    ),
    "unrolled adamw K=3 groups": row(
        "unrolled", two_groups(torch.optim.AdamW, eps=1e-3), ahead=3, net="norm"
    ),
    # A difference of outputs in float32 has few digits.
    "difference nesterov norm dropout": row(
        "difference", NESTEROV, net="norm dropout", within=1e-3
    ),
    "loss difference torchopt baseline": row(
        FEEDBACK.LossDifference(baseline=0.5, reduction="sum"), torchopt_sgd, within=1e-4
    ),
    "none adam K=3 dropout": row("none", ADAM, ADAM, "dropout", ahead=3),
    "reinforce mean bound": row("reinforce", NESTEROV, net="norm", feedback_bound=0.1),
    "forward bound accumulate": row(TANGENT, NESTEROV, ADAM, accumulate=2, feedback_bound=0.05),
    "implicit series": row(
        FEEDBACK.Implicit(solver="neumann", iterations=3, damping=0.1), NESTEROV
    ),
}


def batches(steps: int, ahead: int, views: bool) -> list[tuple[Any, Any]]:
    """Return all batches, from a generator of their own: steps alone use the default one."""
    draw = torch.Generator().manual_seed(1)

    def inner() -> Any:
        x = torch.randn(ROWS, WIDTH, generator=draw)
        return (x, x + 0.3 * torch.randn(ROWS, WIDTH, generator=draw)) if views else x

    found = []
    for _ in range(steps):
        labeled = (
            torch.randn(LABELED, WIDTH, generator=draw),
            torch.randint(CLASSES, (LABELED,), generator=draw),
        )
        found.append(
            (labeled, Lookahead([inner() for _ in range(ahead)]) if ahead > 1 else inner())
        )
    return found


def losses(views: bool) -> list[Any]:
    """Return losses with all settings, so that a row does not depend on defaults.

    UDA's labels are soft, which rounding cannot flip.
    """
    return [
        CrossEntropy(label_smoothing=0.1),
        *([UDA(temperature=0.7, threshold=0.0, ramp=10, start=2)] if views else []),
    ]


def train(given: Row) -> Any:
    """Return the trainer after its steps, and the feedback of each."""
    options = {name: value for name, value in given.items() if name not in NOT_OPTIONS}
    torch.manual_seed(0)
    teacher, student = network(given["net"]), network(given["net"], 1.5)
    for module in (teacher, student) if given.get("frozen") else ():
        for p in next(
            layer for layer in module.modules() if isinstance(layer, nn.Linear)
        ).parameters():
            p.requires_grad_(requires_grad=False)
    views, ahead = given.get("views", False), given.get("ahead", 1)
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        given["mode"],
        inner_optimizer=given["inner"](student),
        outer_optimizer=given["outer"](teacher),
        **({"lookahead": ahead} if ahead > 1 else {}),
        # Two rows have a first step that is verified, which draws nothing.
        **{"teacher_losses": losses(views), "verify": views, **options},
    )
    drawn = batches(STEPS, ahead, views)
    torch.manual_seed(2)
    feedback: list[Tensor] = []
    for labeled, unlabeled in drawn:
        h = trainer.step(labeled, unlabeled).feedback
        feedback += h if isinstance(h, tuple) else (h,)
    return trainer, feedback


NOT_OPTIONS = ("mode", "inner", "outer", "net", "ahead", "views", "frozen", "within")


def parts(trainer: Any, feedback: Iterable[Tensor] = ()) -> dict[str, dict[str, Tensor]]:
    """Return the tensors that a training leaves, by what they are and by name."""
    found: dict[str, dict[str, Tensor]] = {"buffers": {}}
    for name in ("student", "teacher"):
        module = getattr(trainer, name)
        found[name] = {key: p.detach() for key, p in module.named_parameters()}
        found["buffers"] |= {f"{name}.{key}": b for key, b in module.named_buffers()}
    found["feedback"] = {f"{number:03}": h for number, h in enumerate(feedback)}
    return {part: tensors for part, tensors in found.items() if tensors}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of names, types, shapes and bytes, in the order of the names."""
    found = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        found.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        found.update(t.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def measured(tensors: Mapping[str, Tensor]) -> list[float]:
    """Return the norm of all numbers together, and their products with three vectors.

    Each is a vector of cosines with a frequency of its own: float64, and no greater than a norm.
    """
    flat = torch.cat([t.detach().double().flatten() for _, t in sorted(tensors.items())])
    place = torch.arange(len(flat), dtype=torch.float64)
    return [
        float(flat.norm()),
        *(float((flat * torch.cos(place * f + f)).sum()) for f in (0.7, 1.9, 2.8)),
    ]


def outcome(
    found: Mapping[str, Mapping[str, Tensor]], generator: Tensor | None = None
) -> dict[str, Any]:
    """Return what is stored of a row."""
    hashes = {part: digest(tensors) for part, tensors in found.items()}
    if generator is not None:
        hashes["generator"] = digest({"state": generator})
    return {
        "sha256": hashes,
        "numbers": {part: measured(tensors) for part, tensors in found.items()},
    }


def here() -> dict[str, Any]:
    """Return what the bits depend on."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "torch": torch.__version__,
        "capability": capability,
        "threads": torch.get_num_threads(),
    }


@contextmanager
def one_thread() -> Any:
    """Set one thread, on whose number rounding depends.

    The default generator is left as it was.
    """
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


def check(
    found: dict[str, Any], stored: dict[str, Any], machine: dict[str, Any], within: float = 1e-5
) -> None:
    """Assert that a row is as it is stored.

    To the bit where the machine is that of the store, else to ``within`` of each norm.
    """
    apart = [part for part, known in stored["sha256"].items() if found["sha256"].get(part) != known]
    if machine == here():
        assert not apart, f"other bits in {apart}"
    assert found["numbers"].keys() == stored["numbers"].keys()
    for part, known in stored["numbers"].items():
        scale = max(known[0], 1e-30)  # the norm
        gaps = [abs(a - b) / scale for a, b in zip(found["numbers"][part], known, strict=True)]
        assert max(gaps) <= within, (part, gaps)


@pytest.fixture(name="stored", scope="module")
def _stored() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(STORED.read_text())
    return found


def test_what_is_stored_is_what_is_run(stored: dict[str, Any]) -> None:
    assert stored["rows"].keys() == TABLE.keys()


def of_row(name: str) -> dict[str, Any]:
    with one_thread():
        trainer, feedback = train(TABLE[name])
        return outcome(parts(trainer, feedback), torch.get_rng_state())


LONG = {
    "forward nesterov K=3 norm dropout",
    "forward adamw groups conv",
    "forward nesterov UDA",
    "none adam K=3 dropout",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] * (n in LONG)) for n in TABLE]
)
def test_twenty_steps_end_on_the_same_bits(stored: dict[str, Any], name: str) -> None:
    with one_thread():
        check(
            of_row(name), stored["rows"][name], stored["machine"], TABLE[name].get("within", 1e-5)
        )


def main() -> None:
    """Write what is found here and now."""
    with one_thread():
        machine = here()
    STORED.write_text(lines({"machine": machine, "rows": {name: of_row(name) for name in TABLE}}))


def lines(stored: dict[str, Any]) -> str:
    """Return JSON with a line for each row."""
    fields = []
    for name, value in stored.items():
        inside = ",\n".join(f"  {json.dumps(key)}: {json.dumps(one)}" for key, one in value.items())
        fields.append(f' "{name}": {{\n{inside}\n }}')
    return "{\n" + ",\n".join(fields) + "\n}\n"


if __name__ == "__main__":
    main()
