"""The door of the first step.

What carries a gradient past the signal is refused by name, and nothing has moved.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchopt
from problems_zoo import toy
from torch import Tensor, nn

import metapl
from metapl import Lookahead, MetaplError
from metapl.guards import door
from metapl.guards.verification import VerificationWarning
from metapl.problems import ExampleWeights, MetaWeightNet, Table, WeightNet

ROWS = 8
CLASSES = 3
MODES = ["forward", "unrolled", "difference"]


class Weigher(nn.Module):
    """A teacher that weighs examples, and has something else to learn beside."""

    def __init__(self) -> None:
        super().__init__()
        self.net = WeightNet(4)
        self.log_rate = nn.Parameter(torch.tensor(-1.0))
        self.alpha = nn.Parameter(torch.tensor([0.3, -0.2]))
        self.pictures = nn.Parameter(torch.randn(ROWS, 4))

    def forward(self, losses: Tensor) -> Any:
        return self.net(losses)


class Mixed(nn.Module):
    """A softmax of weights that are not its own, over two operations."""

    def __init__(self, weights: Callable[[], Tensor]) -> None:
        super().__init__()
        self.a = nn.Linear(4, CLASSES)
        self.b = nn.Linear(4, CLASSES)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        w = self.weights().softmax(0)
        return w[0] * self.a(x).tanh() + w[1] * self.b(x)


def batches() -> dict[str, Any]:
    data = torch.randn(ROWS, 4), torch.arange(ROWS) % CLASSES
    return {"outer": data, "inner": (data[0].clone(), data[1])}


def refused(call: Callable[[], Any], *networks: nn.Module, naming: str) -> None:
    """See a call refused by one line that names something, with all networks as they were."""
    tensors_before = [t.clone() for network in networks for t in network.state_dict().values()]
    generator = torch.get_rng_state()
    with pytest.raises(MetaplError, match=naming) as refusal:
        call()
    assert "\n" not in str(refusal.value)
    tensors = [t for network in networks for t in network.state_dict().values()]
    assert all(t.equal(t_before) for t, t_before in zip(tensors, tensors_before, strict=True))
    assert generator.equal(torch.get_rng_state())


def three_doors(
    teacher: Any, student: nn.Module, data: dict[str, Any], naming: str, **options: Any
) -> None:
    """See the same refusal at the door of a trainer, verifying or not, and of check_gradient."""
    for verify in (True, False):
        trainer = metapl.BilevelTrainer(teacher, student, verify=verify, **options)
        refused(lambda trainer=trainer: trainer.step(**data), teacher, student, naming=naming)
    trainer = metapl.BilevelTrainer(teacher, student, **options)
    assert re.search(naming, said_by_check_gradient(trainer, data))


def said_by_check_gradient(trainer: Any, data: dict[str, Any]) -> str:
    """Return the text of a refusal.

    A wrong call raises it, and a way past the signal does not.
    """
    try:
        check = metapl.check_gradient(trainer, **data)
    except MetaplError as error:
        return str(error)
    assert check.status == "refused"
    return check.verdict


@pytest.mark.parametrize("mode", MODES)
def test_a_student_that_reads_the_teacher_past_the_signal(mode: Any) -> None:
    torch.manual_seed(0)
    teacher = Weigher()
    readers: list[Callable[[], Tensor]] = [
        lambda: teacher.alpha,
        lambda: [*teacher.parameters()][1],
    ]
    for reader in readers:
        student = Mixed(reader)
        three_doors(
            teacher, student, batches(), r"the teacher's alpha", mode=mode, problem=MetaWeightNet()
        )
    with_a_list = Mixed(lambda: nn.Parameter(torch.zeros(2)))
    with_a_list.numbers = [torch.zeros(2, requires_grad=True)]
    with_a_list.weights = lambda: with_a_list.numbers[0]
    three_doors(
        teacher, with_a_list, batches(), "the student's numbers", mode=mode, problem=MetaWeightNet()
    )


def test_over_several_steps_and_in_hypergradient() -> None:
    torch.manual_seed(0)
    teacher = Weigher()
    student = Mixed(lambda: teacher.alpha)
    data = batches()
    data["inner"] = Lookahead([data["inner"]] * 3)
    for mode in ("forward", "unrolled"):
        sgd = torch.optim.SGD(student.parameters(), lr=0.1)
        options: Any = {
            "mode": mode,
            "problem": MetaWeightNet(),
            "inner_optimizer": sgd,
            "verify": True,
        }
        refused(
            lambda o=options: metapl.hypergradient(teacher, student, **data, **o),
            teacher,
            naming="teacher's alpha",
        )


class ReadsTeacher(MetaWeightNet):
    """A loss that reads a tensor past the signal."""

    def __init__(self, inner: Tensor | None = None, outer: Tensor | None = None) -> None:
        super().__init__()
        self.read = (lambda: inner), (lambda: outer)

    def inner_loss(self, outputs: Any, signal: Any, batch: Any, params: Any = None) -> Tensor:
        losses = super().inner_loss(outputs, signal, batch, params)
        t = self.read[0]()
        return losses if t is None else losses * (1 + t.sum())

    def outer_loss(self, outputs: Any, batch: Any) -> Any:
        loss: Any = super().outer_loss(outputs, batch)
        t = self.read[1]()
        return loss if t is None else loss * (1 + t.sum())


@pytest.mark.parametrize("loss", ["inner", "outer"])
def test_a_loss_that_reads_another_tensor(loss: str) -> None:
    torch.manual_seed(0)
    teacher = Weigher()
    student = nn.Linear(4, CLASSES)
    somewhere = torch.ones(2, requires_grad=True)
    options: Any = {"problem": ReadsTeacher(**{loss: somewhere}), "mode": "forward"}
    three_doors(teacher, student, batches(), rf"the {loss} loss depends on", **options)
    options = {"problem": ReadsTeacher(**{loss: somewhere.detach()}), "mode": "forward"}
    metapl.BilevelTrainer(teacher, student, **options).step(**batches())


def test_a_batch_that_requires_a_gradient() -> None:
    torch.manual_seed(0)
    teacher = Weigher()
    student = nn.Linear(4, CLASSES)
    options: Any = {"mode": "forward", "problem": MetaWeightNet()}
    data = batches()
    learned = {**data, "inner": (teacher.pictures, data["inner"][1])}
    three_doors(teacher, student, learned, r"inner\[0\]", **options)
    x, y = data["outer"]
    three_doors(
        teacher, student, {**data, "outer": (x.requires_grad_(), y)}, r"outer\[0\]", **options
    )
    sgd = torch.optim.SGD(student.parameters(), lr=0.1)
    inputs: Any = {
        **batches(),
        "inner": Lookahead([(teacher.pictures, y)]),
        "inner_optimizer": sgd,
        **options,
    }
    refused(
        partial(metapl.hypergradient, teacher, student, **inputs),
        teacher,
        naming=r"inner\[0\]\[0\]",
    )


@pytest.mark.parametrize("mode", [*MODES, "reinforce", "none"])
@pytest.mark.parametrize("place", ["outer[0]", "outer[1]", "inner"])
def test_a_tensor_of_inference_mode(mode: Any, place: str) -> None:
    torch.manual_seed(0)
    networks = nn.Linear(4, CLASSES), nn.Linear(4, CLASSES)
    x, y = batches()["outer"]
    values = {"outer[0]": x, "outer[1]": y, "inner": torch.randn(ROWS, 4)}
    with torch.inference_mode():
        made_there = values[place].clone()
    naming = re.escape("a tensor that was made under torch.inference_mode() enters a pass")

    def data(t: Tensor) -> dict[str, Any]:
        tensors = {**values, place: t}
        return {"outer": (tensors["outer[0]"], tensors["outer[1]"]), "inner": tensors["inner"]}

    for verify in (True, False):
        trainer = metapl.BilevelTrainer(*networks, mode, verify=verify)
        refused(partial(trainer.step, **data(made_there)), *networks, naming=naming)
    if mode in MODES:
        options = {"mode": mode, "inner_optimizer": torch.optim.SGD(networks[1].parameters(), 0.1)}
        refused(
            partial(metapl.hypergradient, *networks, **data(made_there), **options),
            *networks,
            naming=naming,
        )
    # What the error proposes is the same step.
    reports = []
    for t in (values[place], made_there.clone()):
        with torch.random.fork_rng():
            trainer = metapl.BilevelTrainer(*copy.deepcopy(networks), mode)
            reports.append(trainer.step(**data(t)))
    assert reports[0].inner_loss == reports[1].inner_loss
    assert reports[0].feedback.equal(reports[1].feedback)


def test_a_tensor_of_inference_mode_in_a_training_on_losses() -> None:
    network = nn.Linear(4, CLASSES)
    trainer = metapl.LossTrainer(network, optimizer=torch.optim.SGD(network.parameters(), 0.1))
    with torch.inference_mode():
        features = torch.randn(ROWS, 4)
    labels = torch.arange(ROWS) % CLASSES
    refused(lambda: trainer.step((features, labels)), network, naming="torch.inference_mode")
    trainer.step((features.clone(), labels))


@pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum"])
def test_a_setting_of_the_inner_optimizer_that_requires_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    teacher = Weigher()
    student = nn.Linear(4, CLASSES)
    for value in (teacher.log_rate.exp(), torch.tensor(0.1, requires_grad=True)):
        sgd = torch.optim.SGD(student.parameters(), lr=0.1)
        sgd.param_groups[0][name] = value
        options: Any = {"problem": MetaWeightNet(), "mode": "forward", "inner_optimizer": sgd}
        three_doors(teacher, student, batches(), f"{name} of the inner optimizer", **options)
        inputs: Any = {**batches(), **options}
        refused(
            partial(metapl.hypergradient, teacher, student, **inputs),
            teacher,
            naming=f"{name} of the inner",
        )


def test_a_transform_that_reads_a_learned_rate() -> None:
    torch.manual_seed(0)
    teacher = Weigher()
    student = nn.Linear(4, CLASSES)
    inner = torchopt.sgd(lr=lambda step: teacher.log_rate.exp())
    options: Any = {"problem": MetaWeightNet(), "mode": "forward", "inner_optimizer": inner}
    three_doors(teacher, student, batches(), "result of the TorchOpt transform", **options)
    inputs: Any = {**batches(), **options}
    refused(lambda: metapl.hypergradient(teacher, student, **inputs), teacher, naming="TorchOpt")
    options["inner_optimizer"] = torchopt.sgd(lr=lambda step: teacher.log_rate.exp().item())
    with pytest.warns(VerificationWarning, match="reads the teacher"):
        metapl.BilevelTrainer(teacher, student, **options).step(**batches())
    rate = teacher.log_rate.exp().item()
    options["inner_optimizer"] = torchopt.sgd(lr=lambda step: rate)
    metapl.BilevelTrainer(teacher, student, **options).step(**batches())


@pytest.mark.parametrize("mode", ["forward", "difference"])
def test_a_hook_on_a_parameter(mode: Any) -> None:
    case = toy()
    sgd = torch.optim.SGD(case.student.parameters(), lr=0.1)
    inputs: Any = {**case.data(), "inner_optimizer": sgd, "mode": mode}
    handle = next(case.student.parameters()).register_hook(lambda g: 2 * g)
    refused(
        lambda: metapl.check_gradient(case.teacher, case.student, **inputs), naming="have hooks"
    )
    refused(
        lambda: metapl.hypergradient(case.teacher, case.student, **inputs, verify=True),
        naming="have hooks",
    )
    handle.remove()
    trainer = metapl.BilevelTrainer(case.teacher, case.student, mode, verify=False)
    next(case.student.parameters()).register_hook(lambda g: 2 * g)
    refused(lambda: trainer.step(**case.data()), naming="have hooks")


def test_two_parameters_with_one_memory() -> None:
    """A step moves both by the gradients of both, and a copy of the network each by its own."""
    student, teacher = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)) for _ in range(2))
    student[1].weight.data = student[0].weight.data[:3]
    outer, inner = (torch.randn(8, 4), torch.arange(8) % 3), torch.randn(8, 4)
    trainer = metapl.BilevelTrainer(teacher, student)
    refused(lambda: trainer.step(outer, inner), naming="student.0.weight and student.1.weight")
    sgd = torch.optim.SGD(student.parameters(), lr=0.1)
    refused(
        lambda: metapl.hypergradient(
            teacher, student, outer=outer, inner=inner, inner_optimizer=sgd
        ),
        naming="have one memory",
    )


class InPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(1.1))


def test_a_batch_that_a_pass_changes_is_put_back() -> None:
    torch.manual_seed(0)
    student = InPlace(4, CLASSES)
    for verify in (True, False):
        trainer = metapl.BilevelTrainer(nn.Linear(4, CLASSES), student, "forward", verify=verify)
        x = torch.randn(ROWS, 4)
        x_before = x.clone()
        with pytest.raises(MetaplError, match="a batch is changed in place"):
            trainer.step(outer=(torch.randn(ROWS, 4), torch.arange(ROWS) % CLASSES), inner=x)
        assert x.equal(x_before)


class OfDerivatives(nn.Module):
    """A student with a leaf of its own in each pass.

    For derivatives of its outputs in its inputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            z = self.net(x)
            (slope,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
        return z + slope[:, :CLASSES]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_leaf_that_a_pass_makes_for_itself_is_no_way_past_the_signal(
    mode: Any, steps: int
) -> None:
    if mode == "difference" and steps > 1:
        pytest.skip("difference takes one step")
    torch.manual_seed(0)
    teacher = Table(torch.zeros(ROWS))
    student = OfDerivatives()
    data = batches()
    inner = (*data["inner"], torch.arange(ROWS))
    data["inner"] = inner if steps == 1 else Lookahead([inner] * steps)
    for verify in (True, False):
        trainer = metapl.BilevelTrainer(
            teacher, student, mode, problem=ExampleWeights(), verify=verify
        )
        trainer.step(**data)


def test_only_the_first_step_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    first_look = door.FirstLook

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal looks
        looks += 1
        return first_look(*args, **options)

    monkeypatch.setattr(door, "FirstLook", counted)
    case = toy()
    trainer = metapl.BilevelTrainer(case.teacher, case.student, "forward", verify=False)
    for _ in range(3):
        trainer.step(**case.data())
    assert looks == 1
    case.student.eval()
    trainer.step(**case.data())
    assert looks == 2


def test_a_refused_step_is_looked_at_again() -> None:
    torch.manual_seed(0)
    teacher = Weigher()
    student = Mixed(lambda: teacher.alpha)
    trainer = metapl.BilevelTrainer(
        teacher, student, "forward", problem=MetaWeightNet(), verify=False
    )
    data = batches()
    for _ in range(2):
        refused(lambda: trainer.step(**data), teacher, student, naming="teacher's alpha")
