"""``compile="cudagraphs"`` takes the eager trainer's steps, or refuses in one line.

On CUDA where there is one. Elsewhere a tape of operations stands in the place of the graph: it
repeats them with the same tensors, and what the host knew when they ran is a constant of it too.

python -m pytest -m gpu tests/library/test_cuda_graphs.py
"""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from captures import as_functions
from tape import record_on_tape
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import metapl
from metapl import UDA, CrossEntropy, MetaplError
from metapl.feedback import Reinforce
from metapl.functional import cuda_graphs

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLASSES = 4
ROWS = 6


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", record_on_tape)


class Attention(nn.Module):
    """One block of attention over the rows of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(24, 48)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.transpose(1, 2).flatten(2))[:, None].chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v)[:, 0].mean(1))


def convolutions(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(288, CLASSES),
    )


def sgd(network: nn.Module) -> Any:
    return torch.optim.SGD(
        network.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01
    )


def adamw(network: nn.Module) -> Any:
    """Return AdamW with an ε above the rounding error of a gradient that is 0."""
    return torch.optim.AdamW(network.parameters(), lr=0.01, eps=1e-4)


def noisy() -> nn.Module:
    return convolutions(dropout=0.2)


def trainers(
    mode: Any = "forward",
    *,
    network: Any = convolutions,
    noisy_teacher: Any = noisy,
    optimizer: Any = sgd,
    roads: tuple[Any, Any] = (False, "cudagraphs"),
    **options: Any,
) -> list[metapl.BilevelTrainer]:
    """Return an eager trainer and one by graphs, alike, in float64.

    The teacher alone has dropout: on the eager road the outer loss draws a student's masks from a
    stream of its own.

    Args:
        roads: what each of them is given for ``compile``.
    """
    pair: list[metapl.BilevelTrainer] = []
    for compile in roads:
        torch.manual_seed(0)
        teacher = noisy_teacher().to(DEVICE, torch.float64)
        student = network().to(DEVICE, torch.float64)
        trainer = metapl.BilevelTrainer(
            teacher,
            student,
            copy.deepcopy(mode),
            inner_optimizer=optimizer(student),
            outer_optimizer=optimizer(teacher),
            compile=compile,
            verify=False,
            **copy.deepcopy(options),
        )
        pair.append(trainer)
    return pair


def batch(number: int, rows: int = ROWS, steps: int = 1) -> tuple[Any, Any]:
    """Return the labeled and the unlabeled batches of a step."""
    torch.manual_seed(100 + number)
    labeled = torch.randn(rows, 3, 8, 8, dtype=torch.float64), torch.arange(rows) % CLASSES
    unlabeled = [torch.randn(rows + 2, 3, 8, 8, dtype=torch.float64) for _ in range(steps)]
    on_device = tuple(t.to(DEVICE) for t in labeled), [t.to(DEVICE) for t in unlabeled]
    if steps > 1:
        return on_device[0], metapl.Lookahead(on_device[1])
    return on_device[0], on_device[1][0]


def tensors_of(trainer: metapl.BilevelTrainer) -> list[Tensor]:
    """Return all tensors that a step moves, on the CPU."""
    networks = [trainer.teacher, trainer.student]
    tensors = [t for network in networks for t in network.state_dict().values()]
    for optimizer in trainer.schedulable:
        tensors += tree_leaves(optimizer.state_dict()["state"])
    tensors += trainer.mode_state.values()
    return [t.detach().double().cpu() for t in tensors]


def compare(trainer: metapl.BilevelTrainer, eager: metapl.BilevelTrainer) -> None:
    for t, expected in zip(tensors_of(trainer), tensors_of(eager), strict=True):
        torch.testing.assert_close(t, expected, rtol=1e-8, atol=1e-10)


def take(pair: list[metapl.BilevelTrainer], number: int, batches: tuple[Any, Any]) -> list[Any]:
    """Take one step by each trainer with the same draws; return the reports."""
    reports = []
    for trainer in pair:
        torch.manual_seed(number)
        reports.append(trainer.step(*batches))
    return reports


def graphs_of(trainer: metapl.BilevelTrainer) -> Any:
    return trainer.compiled_step._compiled.run


CASES: dict[str, dict[str, Any]] = {
    "forward": {},
    "forward, adamw": {"optimizer": adamw},
    "forward, two steps": {"lookahead": 2},
    "forward, attention": {"network": Attention},
    "unrolled": {"mode": "unrolled"},
    "difference": {"mode": "difference"},
    "reinforce": {"mode": Reinforce(baseline=0.9)},
    "reinforce, adamw": {"mode": "reinforce", "optimizer": adamw, "clip_norm": 0.5},
    "per example": {"mode": "reinforce_per_example"},
    "loss difference": {"mode": "loss_difference"},
    "none": {"mode": "none"},
    "a bound and losses": {
        "teacher_losses": (CrossEntropy(0.1), UDA(ramp=7, threshold=0.2)),
        "feedback_bound": 0.5,
    },
}


def batches_for(case: str, number: int, rows: int = ROWS) -> tuple[Any, Any]:
    labeled, unlabeled = batch(number, rows, CASES[case].get("lookahead", 1))
    if "teacher_losses" in CASES[case]:
        unlabeled = unlabeled, unlabeled + 0.1
    return labeled, unlabeled


@pytest.mark.parametrize("case", CASES)
def test_steps_by_graphs_are_eager_steps(case: str) -> None:
    """Compare weights, statistics, optimizers and reports, over a schedule of both rates.

    Four batches and rates are taken by one graph; a batch of another shape by a second.
    """
    pair = trainers(**CASES[case])
    eager, by_graphs = pair
    outputs: list[tuple[Tensor, Tensor]] = []
    reports: list[Any] = []
    for number in range(5):
        for trainer in pair:
            for optimizer in trainer.schedulable:
                optimizer.param_groups[0]["lr"] = 0.05 / (1 + number)
        rows = ROWS if number < 4 else ROWS - 1
        reports = take(pair, number, batches_for(case, number, rows))
        outputs.append((reports[1].student_outputs, reports[0].student_outputs.clone()))
        if case != "none":
            for h, expected in zip(*(tree_leaves(r.feedback) for r in reports[::-1]), strict=True):
                torch.testing.assert_close(h, expected, rtol=1e-7, atol=1e-10)
        reports[1].as_dict()
        compare(by_graphs, eager)
        assert graphs_of(by_graphs).recordings_made == (1 if number < 4 else 2)
    # Reports outlive the next steps.
    for output, expected in outputs:
        torch.testing.assert_close(output, expected, rtol=1e-8, atol=1e-10)


def test_dropout_of_the_student_has_new_masks_in_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compare with the pure step as it is, whose draws are in the same order."""
    as_functions(monkeypatch)
    pair = trainers(network=noisy, roads=(True, "cudagraphs"))
    for trainer in pair:
        for optimizer in trainer.schedulable:
            optimizer.param_groups[0]["lr"] = 1e-6
    outputs: list[Tensor] = []
    for number in range(4):
        reports = take(pair, number, batch(0))
        outputs.append(reports[1].student_outputs)
        compare(pair[1], pair[0])
    for output, next_output in itertools.pairwise(outputs):
        assert float((output - next_output).norm() / output.norm()) > 0.05
    assert graphs_of(pair[1]).recordings_made == 1


class WithoutForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Squared(nn.Module):
    """A network with an operation that has no forward mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return WithoutForwardMode.apply(self.layer(x.flatten(1)))


def test_an_operation_without_forward_mode_is_no_obstacle() -> None:
    pair = trainers(network=Squared)
    for number in range(2):
        take(pair, number, batch(number))
        compare(pair[1], pair[0])


def other_parameter(trainer: metapl.BilevelTrainer) -> None:
    layer = trainer.student[-1]
    old_weight = layer.weight
    layer.weight = nn.Parameter(0.9 * old_weight.detach())
    params = trainer.inner_optimizer.param_groups[0]["params"]
    is_old = [p is old_weight for p in params]
    params[is_old.index(True)] = layer.weight
    trainer.inner_optimizer.state.pop(old_weight)


def other_memory(trainer: metapl.BilevelTrainer) -> None:
    for p in (*trainer.student.parameters(), *trainer.teacher.parameters()):
        p.data = 0.9 * p.data


def loaded_state(trainer: metapl.BilevelTrainer) -> None:
    state = copy.deepcopy(trainer.state_dict())
    trainer.step(*batch(7))
    trainer.load_state_dict(state)


def loaded_weights(trainer: metapl.BilevelTrainer) -> None:
    state = trainer.student.state_dict()
    trainer.student.load_state_dict({name: 0.5 * t for name, t in state.items()})


def frozen_part(trainer: metapl.BilevelTrainer) -> None:
    trainer.student[0].requires_grad_(requires_grad=False)


def other_dropout(trainer: metapl.BilevelTrainer) -> None:
    trainer.teacher[3].p = 0.5


def evaluation(trainer: metapl.BilevelTrainer) -> None:
    trainer.student[1].eval()


def other_activation(trainer: metapl.BilevelTrainer) -> None:
    trainer.student[2].approximate = "tanh"


def other_momentum(trainer: metapl.BilevelTrainer) -> None:
    for optimizer in trainer.schedulable:
        optimizer.param_groups[0]["momentum"] = 0.5


CHANGES: dict[str, Any] = {
    "other parameters": other_parameter,
    "other memory": other_memory,
    "a loaded state": loaded_state,
    "loaded weights": loaded_weights,
    "no optimizer's state": lambda trainer: trainer.inner_optimizer.state.clear(),
    "a frozen part": frozen_part,
    "another dropout": other_dropout,
    "a part in evaluation": evaluation,
    "another activation": other_activation,
    "another momentum": other_momentum,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_between_steps_counts(change: str) -> None:
    pair = trainers()
    for number in range(2):
        take(pair, number, batch(number))
    for trainer in pair:
        torch.manual_seed(3)
        CHANGES[change](trainer)
    for number in range(4, 7):
        take(pair, number, batch(number))
        compare(pair[1], pair[0])


class Scaled(metapl.PseudoLabels):
    """An inner loss with a factor in an attribute, and one in the batch."""

    factor: float = 1.0

    def student_input(self, batch: Any, *signal: Any) -> Any:
        return batch["x"]

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any = None) -> Any:
        return super().signal(teacher, batch["x"], outputs, generator=generator)

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        return self.factor * batch["factor"] * super().inner_loss(outputs, signal, batch["x"])


def test_numbers_of_a_batch_and_of_a_loss_are_followed() -> None:
    pair = trainers(problem=Scaled())
    factors = [(1.0, 1.0), (1.0, 2.0), (0.5, 2.0), (1.0, 1.0)]
    for number, (of_batch, of_problem) in enumerate(factors):
        labeled, unlabeled = batch(number)
        for trainer in pair:
            trainer.problem.factor = of_problem
        take(pair, number, (labeled, {"x": unlabeled, "factor": of_batch}))
        compare(pair[1], pair[0])
    assert graphs_of(pair[1]).recordings_made == 3


class Keeping(Attention):
    """A network that keeps what it last saw."""

    seen: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach()
        return super().forward(x)


def test_a_tensor_that_a_pass_puts_into_an_attribute_is_no_reason_to_record_again() -> None:
    pair = trainers(network=Keeping, noisy_teacher=Keeping)
    for number in range(3):
        take(pair, number, batch(number))
        compare(pair[1], pair[0])
    assert graphs_of(pair[1]).recordings_made == 1


def test_a_generator_of_labels_is_the_same_on_both_roads() -> None:
    pair = trainers("reinforce")
    for trainer in pair:
        trainer.generator = torch.Generator(DEVICE).manual_seed(5)
    for number in range(3):
        take(pair, number, batch(number))
        compare(pair[1], pair[0])
    states = [trainer.generator.get_state() for trainer in pair]
    assert torch.equal(*states)


def test_a_region_of_autocast_is_followed() -> None:
    """Its casts of weights are not kept from one step to the next."""
    pair = trainers()
    for trainer in pair:
        for network in (trainer.teacher, trainer.student):
            network.float()
    ends = []
    for trainer in pair:
        for number in range(3):
            labeled, unlabeled = batch(number)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=number > 0):
                trainer.step((labeled[0].float(), labeled[1]), unlabeled.float())
        ends.append(torch.cat([t.flatten() for t in tensors_of(trainer)]))
    assert float((ends[0] - ends[1]).norm() / ends[0].norm()) < 2e-2
    assert graphs_of(pair[1]).recordings_made == 2


class AttentionLayer(nn.Module):
    """One of PyTorch's attention layers over the rows of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(24, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x.transpose(1, 2).flatten(2))
        attended, _ = self.attention(rows, rows, rows, need_weights=False)
        return self.head(attended.mean(1))


class LearnedBias(Attention):
    """Attention with a number for each pair of places, which is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.transpose(1, 2).flatten(2))[:, None].chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        return self.head(attended[:, 0].mean(1))


class CausalAttention(Attention):
    """Attention to the rows above, with a scale of its own."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.transpose(1, 2).flatten(2))[:, None].chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7)
        return self.head(attended[:, 0].mean(1))


@pytest.mark.parametrize("network", [Attention, AttentionLayer, CausalAttention])
@pytest.mark.parametrize("mode", ["forward", "reinforce", "unrolled"])
def test_attention_is_that_of_the_eager_step(network: Any, mode: str) -> None:
    """By its formula, which has a forward mode and a second derivative."""
    pair = trainers(mode, network=network, noisy_teacher=network)
    for number in range(2):
        take(pair, number, batch(number))
        compare(pair[1], pair[0])


@pytest.mark.parametrize("mode", ["forward", "reinforce"])
def test_a_learned_bias_of_attention_has_its_gradient(mode: str) -> None:
    pair = trainers(mode, network=LearnedBias)
    bias = pair[1].student.bias
    start = bias.detach().clone()
    for number in range(2):
        take(pair, number, batch(number))
        compare(pair[1], pair[0])
    assert not torch.equal(bias, start)


@pytest.mark.skipif(DEVICE == "cuda", reason="torch may have no derivative of it there")
@pytest.mark.parametrize("network", [Attention, AttentionLayer, CausalAttention])
def test_attention_in_a_region_of_autocast(network: Any) -> None:
    pair = trainers(network=network, noisy_teacher=network)
    for trainer in pair:
        for part in (trainer.teacher, trainer.student):
            part.float()
        for number in range(3):
            labeled, unlabeled = batch(number)
            with torch.autocast(DEVICE, torch.bfloat16):
                trainer.step((labeled[0].float(), labeled[1]), unlabeled.float())
    ends = [torch.cat([t.flatten() for t in tensors_of(trainer)]) for trainer in pair]
    assert float((ends[0] - ends[1]).norm() / ends[0].norm()) < 2e-2


def test_the_first_step_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph whose results are not the eager step's is refused, and nothing moves."""
    record = cuda_graphs.RECORDERS[DEVICE]

    def record_another(function: Any, device: Any, pool: Any) -> Any:
        def other() -> Any:
            state, report = function()
            outputs = report.feedback * 1.5
            return state, report._replace(feedback=outputs)

        return record(other, device, pool)

    monkeypatch.setitem(cuda_graphs.RECORDERS, DEVICE, record_another)
    _, trainer = trainers()
    tensors_before = tensors_of(trainer)
    random_before = torch.get_rng_state()
    batches = batch(0)
    torch.set_rng_state(random_before)
    with pytest.raises(MetaplError, match="as one function, h is"):
        trainer.step(*batches)
    for t, expected in zip(tensors_of(trainer), tensors_before, strict=False):
        assert torch.equal(t, expected)
    assert torch.equal(torch.get_rng_state(), random_before)


class Reading(nn.Module):
    """A layer that does otherwise by a value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if x.detach().norm().item() > 1e6:
            x = 0 * x
        return self.layer(x)


class Drawing(nn.Module):
    """A layer whose pass depends on a draw of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1)) * (0.5 + float(torch.rand(())))


ON_CUDA = pytest.mark.skipif(DEVICE == "cpu", reason="there the host is the device")


@pytest.mark.parametrize(
    ("reason", "network"),
    [
        ("reads the value of a tensor", Reading),
        pytest.param("draws from the generator of the CPU", Drawing, marks=ON_CUDA),
    ],
)
def test_what_cannot_be_recorded_is_refused_and_nothing_moves(
    reason: str, network: type[nn.Module]
) -> None:
    _, trainer = trainers(network=network, noisy_teacher=network)
    tensors_before = tensors_of(trainer)
    with pytest.raises(MetaplError, match=reason):
        trainer.step(*batch(0))
    for t, expected in zip(tensors_of(trainer), tensors_before, strict=False):
        assert torch.equal(t, expected)
    assert trainer.steps_done == 0


@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
def test_a_step_by_graphs_does_not_wait(cuda_may_not_wait: Any) -> None:
    """Nor does one with another rate."""
    _, trainer = trainers(mode=Reinforce(baseline=0.9), optimizer=adamw)
    batches = batch(0)
    for _ in range(2):
        trainer.step(*batches)
    with cuda_may_not_wait():
        trainer.step(*batches)
        trainer.inner_optimizer.param_groups[0]["lr"] = 0.001
        trainer.step(*batches)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        # Of an H100 with torch 2.11, where the attention of a step runs by autocast.
        (
            "expected input and grad types to match, or input to be at::Half and grad to be "
            "at::Float",
            "softmax of attention",
        ),
        ("called a synchronizing CUDA operation", "reads the value of a tensor"),
        ("CUDA error: operation not permitted when stream is capturing", "stream is capturing"),
    ],
)
def test_what_torch_says_of_a_recording_is_told_in_one_line(text: str, reason: str) -> None:
    assert reason in cuda_graphs.why_not_recorded(RuntimeError(text))
    assert cuda_graphs.why_not_recorded(RuntimeError("something else")) == ""


def test_networks_on_the_cpu_are_refused_at_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(cuda_graphs.RECORDERS, "cpu")
    networks = nn.Linear(3, 2), nn.Linear(3, 2)
    with pytest.raises(MetaplError, match="expected a CUDA device"):
        metapl.BilevelTrainer(*networks, compile="cudagraphs")


def test_steps_that_are_recorded_again_and_again_warn_once() -> None:
    _, trainer = trainers(network=Attention)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(cuda_graphs.MOST_RECORDINGS + 3):
            trainer.step(*batch(number, rows=3 + number))
    texts = [str(warning.message) for warning in caught]
    assert sum("records the step for the 9th time" in text for text in texts) == 1
    assert len(graphs_of(trainer).recorded) == cuda_graphs.MOST_RECORDINGS
