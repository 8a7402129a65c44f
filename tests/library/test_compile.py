"""Compiled passes: the numbers of plain ones, the same dropout masks, and nothing of it to be seen outside a step."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from metapl.execution.compiled import CompiledPasses
from problems_zoo import ANYWHERE, CLASSES, Toy, everything, noisy_teacher, same, toy
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import metapl
from metapl import CrossEntropy, MetaplError
from metapl.execution import compiled
from metapl.execution.local import LocalStudent
from metapl.training.loss_trainer import LossTrainer

pytestmark = [
    pytest.mark.skipif(
        shutil.which("g++") is None and shutil.which("clang++") is None, reason="Inductor needs a C++ compiler"
    ),
    # Older releases of torch warn of themselves when Inductor is loaded.
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script:DeprecationWarning"),
]


def noisy() -> nn.Module:
    # No bias where batch norm takes it out: its gradient would be rounding alone.
    hidden = (nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4))
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(8, CLASSES), nn.Dropout(0.1))


def noisy_toy(dtype: torch.dtype = torch.float64) -> Toy:
    base = toy(dtype=dtype, teacher=noisy_teacher, views=True)
    torch.manual_seed(1)
    labeled = (base.labeled[0][:4], base.labeled[1][:4])  # one size of batch has fewer graphs
    return Toy(base.teacher, noisy().to(dtype), labeled, base.unlabeled, 0)


def graphs() -> int:
    """How many were compiled in this process."""
    return counters["stats"]["unique_graphs"]


@contextmanager
def quickly() -> Iterator[None]:
    """Dynamo without Inductor, where only its mechanics matter."""
    with torch.compiler.set_stance(force_backend="aot_eager"):
        yield


def gap(found: list[Tensor], expected: list[Tensor]) -> float:
    """The greatest relative difference, tensor by tensor."""
    pairs = ((a.detach().double(), b.detach().double()) for a, b in zip(found, expected, strict=True))
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in pairs)


def run(case: Toy, mode: Any, steps: int = 5, **options: Any) -> tuple[list[Tensor], list[int]]:
    """What a run saw and where it ended, the generator last; and how many graphs there were after each step."""
    trainer = metapl.BilevelTrainer(**case.networks(), mode=mode, **options)
    torch.manual_seed(2)
    seen, counts = [], []
    for step in range(steps):
        for optimizer in trainer.schedulable:
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        report = trainer.step(**case.data())
        seen += [report.student_outputs, report.feedback, report.signal.value]
        counts.append(graphs())
    return seen + everything(case, *trainer.schedulable), counts


# ------------------------------------------------------------------------------------------------ numbers and masks


STEPS = [
    *((mode, torch.float64, mode in ("forward", "reinforce")) for mode in ANYWHERE),
    ("difference", torch.float32, False),
]
BY_INDUCTOR = (("forward", torch.float64, True),)
"""What ``make test`` compiles to machine code too, which takes some ten seconds; the others, it traces."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "dtype", "recompute", "traced"),
    [
        # Of the passes of "reinforce", these two modes leave some out.
        *(
            pytest.param(
                *step, step not in BY_INDUCTOR, marks=[pytest.mark.long] * (step[0] in ("none", "loss_difference"))
            )
            for step in STEPS
        ),
        *(pytest.param(*step, False, marks=pytest.mark.long) for step in STEPS if step not in BY_INDUCTOR),
    ],
)
def test_compiled_steps_are_plain_steps_to_rounding(
    mode: str, dtype: torch.dtype, recompute: bool, traced: bool
) -> None:
    """Outputs, feedback, labels, weights, statistics, optimisers' states; the generator to the bit; and after the
    second step nothing is compiled any more, whatever the learning rates."""
    plain, _ = run(noisy_toy(dtype), mode, recompute_teacher=recompute)
    before = graphs()
    with quickly() if traced else nullcontext():
        found, counts = run(noisy_toy(dtype), mode, recompute_teacher=recompute, compile=True)
    assert torch.equal(found[-1], plain[-1])
    rounding = 1e-11 if dtype == torch.float64 else 1e-3
    # A difference of outputs divides their rounding by its step.
    assert gap(found, plain) < rounding * (1e4 if mode == "difference" and dtype == torch.float64 else 1)
    assert counts[0] > before
    assert counts[1] == counts[-1]


class Masks(nn.Module):
    """At weights I and inputs 1 the outputs are the dropout mask, and so are their derivative along I."""

    def __init__(self, size: int = 40) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5) @ self.weight


@pytest.mark.parametrize("fallback", [True, False])
def test_every_pass_of_a_step_sees_the_masks_of_the_inner_pass(fallback: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with Inductor's own draws, the planted fault, a plain pass beside compiled ones does not."""
    monkeypatch.setattr(compiled, "OPTIONS", {"fallback_random": fallback})
    monkeypatch.setattr(compiled._CompiledForward, "_compared", lambda self, passes, *args: passes(*args))
    student, ones = Masks(), torch.ones(6, 40, dtype=torch.float64)
    monkeypatch.setattr("metapl.execution.local.check_outputs", lambda *given, **named: None)
    torch.manual_seed(0)
    plain = student(ones)
    torch.manual_seed(0)
    with CompiledPasses(student)():
        local = LocalStudent(student)
        step = local.pass_type(local, local.params, ones).run()
        along = {"weight": student.weight.detach()}
        z_dot = step.tangent(along)
        moved = step.shifted(torch.tensor(1.0, dtype=torch.float64), along)
    assert set(step.outputs.unique().tolist()) == {0, 2}
    assert torch.equal(step.outputs, plain) == fallback
    assert torch.equal(step.outputs, z_dot) == fallback  # a plain pass
    assert torch.equal(step.outputs, moved / 2)  # a compiled one, which starts from the same seed


@pytest.mark.slow
def test_draws_of_inductors_own_are_refused_and_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "OPTIONS", {"fallback_random": False})
    case = noisy_toy()
    trainer = metapl.BilevelTrainer(**case.networks(), mode="forward", compile=True)
    before = everything(case)
    with pytest.raises(MetaplError, match=r"compiled Sequential draws other random numbers.*leave compile out"):
        trainer.step(**case.data())
    assert same(before, everything(case))


@pytest.mark.slow
@pytest.mark.parametrize("fallback", [True, False])
def test_feedback_on_other_masks_is_refused(fallback: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same fault in a whole step: h itself would be another."""
    monkeypatch.setattr(compiled, "OPTIONS", {"fallback_random": fallback})
    monkeypatch.setattr(compiled._CompiledForward, "_compared", lambda self, passes, *args: passes(*args))
    plain = run(noisy_toy(), "forward", 1, teacher_losses=())[0][1]
    if not fallback:
        with pytest.raises(MetaplError, match="does not return the same outputs when the inner pass is repeated"):
            run(noisy_toy(), "forward", 1, teacher_losses=(), compile=True)
        return
    compiled_one = run(noisy_toy(), "forward", 1, teacher_losses=(), compile=True)[0][1]
    assert float((compiled_one - plain).norm() / plain.norm()) < 1e-12


class Noisy(nn.Module):
    """Draws of several kinds, and a buffer that it moves itself."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, CLASSES)
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        kept = x.new_empty(len(x), 1).bernoulli_(0.7)
        x = kept * F.rrelu(x + 0.3 * torch.randn_like(x), training=True) * torch.rand(16, dtype=x.dtype)
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return F.dropout(self.head(x + self.mean), 0.2)


@pytest.mark.slow
def test_draws_of_many_kinds_are_those_of_plain_passes() -> None:
    def end(on: bool) -> list[Tensor]:
        base = noisy_toy()
        torch.manual_seed(3)
        case = Toy(base.teacher, Noisy().double(), base.labeled, base.unlabeled, 0)
        return run(case, "forward", 2, compile=on)[0]

    from torch._inductor.fx_passes import post_grad

    if not hasattr(post_grad, "_chain_random_ops_for_ordering"):  # older releases may draw in another order
        with pytest.raises(MetaplError, match="draws other random numbers"):
            end(True)
        return
    ends = [end(False), end(True)]
    assert torch.equal(ends[0][-1], ends[1][-1])
    assert gap(ends[1], ends[0]) < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("mode", [pytest.param("forward", marks=pytest.mark.long), "reinforce"])
def test_channels_last_and_autocast_go_with_it(mode: str) -> None:
    ends = []
    for on in (False, True):
        torch.manual_seed(0)
        teacher, student = (
            nn.Sequential(
                *(nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Dropout2d(0.2)),
                *(nn.Flatten(), nn.Linear(288, 3)),
            ).to(memory_format=torch.channels_last)
            for _ in range(2)
        )
        x, u = (torch.randn(n, 2, 8, 8).to(memory_format=torch.channels_last) for n in (6, 8))
        case = Toy(teacher, student, (x, torch.arange(6) % 3), u, 0)
        generator = torch.Generator().manual_seed(1)
        ends.append(run(case, mode, 2, precision="bfloat16", compile=on, generator=generator)[0])
    assert torch.equal(ends[0][-1], ends[1][-1])
    assert gap(ends[1][:2], ends[0][:2]) < 0.1  # outputs and h of the first step; other masks would change them by 1
    assert gap(ends[1], ends[0]) < 0.5


@pytest.mark.slow
def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not() -> None:
    """A new trainer compiles anew, and gets the same graphs."""

    def run_in(parts: list[int]) -> list[Tensor]:
        state = None
        for steps in parts:
            case = noisy_toy()
            trainer = metapl.BilevelTrainer(**case.networks(), mode="forward", compile=True)
            if state is not None:
                trainer.load_state_dict(state)
            for _ in range(steps):
                torch.manual_seed(trainer.steps_done)
                trainer.step(**case.data())
            state = copy.deepcopy(trainer.state_dict())
        return everything(case, *trainer.schedulable)

    assert same(run_in([4]), run_in([2, 2]))


# --------------------------------------------------------------------------------------- nothing of it is to be seen


def test_outside_a_step_the_networks_are_plain() -> None:
    """Names, weights, copies, files; evaluation, on batches of any length, and `hypergradient` compile nothing."""
    case = noisy_toy()
    names = [list(net.state_dict()) for net in case.networks().values()]
    trainer = metapl.BilevelTrainer(**case.networks(), mode="difference", compile=True)
    with quickly():
        trainer.step(**case.data())
        compiled_so_far = graphs()
        for rows in range(1, 5):
            trainer.evaluate((case.labeled[0][:rows], case.labeled[1][:rows]))
        metapl.hypergradient(**case.networks(), **case.data(), inner_optimizer=trainer.inner_optimizer)
        assert trainer.exact_cosine(case.labeled, case.unlabeled) is not None
    assert graphs() == compiled_so_far
    assert names == [list(net.state_dict()) for net in case.networks().values()]
    for net in case.networks().values():
        assert "forward" not in vars(net)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert same(list(twin.state_dict().values()), list(net.state_dict().values()))
            assert "forward" not in vars(twin)


def test_a_copy_made_within_a_step_runs_its_own_weights() -> None:
    copies = []

    class Copies:
        name = "copies"

        def __call__(self, teacher: nn.Module, *, labeled: Any, **_: Any) -> Tensor:
            twin = copy.deepcopy(teacher)
            with torch.no_grad():
                twin[1].weight.zero_()
                copies.append((twin(labeled[0]), twin))
            return teacher(labeled[0]).square().mean()

    case = toy()
    trainer = metapl.BilevelTrainer(**case.networks(), mode="none", teacher_losses=(Copies(),), compile=True)
    with quickly():
        trainer.step(**case.data())
    outputs, twin = copies[0]
    assert twin.forward.__self__ is twin
    assert outputs.std(0).max() == 0  # with weights 0 every row gives the same


def test_a_copy_of_a_trainer_trains_its_own_networks() -> None:
    case = noisy_toy()
    trainer = metapl.BilevelTrainer(**case.networks(), mode="forward", compile=True)
    before = everything(case, generator=False)
    with quickly():
        twin = copy.deepcopy(trainer)
        torch.manual_seed(0)
        twin.step(**case.data())
        assert same(before, everything(case, generator=False))
        torch.manual_seed(0)
        trainer.step(**case.data())
    for name, weight in trainer.student.state_dict().items():
        assert torch.equal(weight, twin.student.state_dict()[name])


def test_a_fit_with_a_moving_average_is_the_plain_one() -> None:
    """The average is a copy of the student; validation runs in eval mode."""
    ends = []
    for on in (False, True):
        case = noisy_toy()
        trainer = metapl.BilevelTrainer(**case.networks(), mode="reinforce", compile=on)
        torch.manual_seed(0)
        with quickly():
            found = trainer.fit(
                [case.labeled],
                [case.unlabeled],
                steps=4,
                ema_decay=0.9,
                validate_every=2,
                validation=case.labeled,
                progress=False,
            )
            trainer.finetune([case.labeled], steps=2, progress=False)
        ends.append([*found.weights.values(), *case.student.state_dict().values()])
    assert gap(ends[1], ends[0]) < 1e-11


# Under "error" filters torch trips over a warning that it hides otherwise (torch/_dynamo/variables/builder.py).
@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor:UserWarning")
def test_a_network_that_compiles_in_pieces_has_the_same_masks() -> None:
    class Pieces(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for part in self:
                torch._dynamo.graph_break()
                x = part(x)
            return x

    ends = []
    for on in (False, True):
        case = noisy_toy()
        case = Toy(case.teacher, Pieces(*case.student), case.labeled, case.unlabeled, 0)
        with quickly():
            ends.append(run(case, "forward", 2, compile=on)[0])
    assert torch.equal(ends[0][-1], ends[1][-1])
    assert gap(ends[1], ends[0]) < 1e-11


def test_a_new_length_of_batch_is_compiled_once() -> None:
    case = noisy_toy()
    trainer = metapl.BilevelTrainer(**case.networks(), mode="forward", compile=True)
    counts = []
    with quickly():
        for rows in (4, 3, 4, 3, 4):
            trainer.step(case.labeled, tuple(view[:rows] for view in case.unlabeled))
            counts.append(graphs())
    assert counts[0] < counts[1] == counts[-1]


def test_networks_of_one_class_do_not_use_up_each_others_graphs() -> None:
    """Dynamo gives up on a function after 8; every trainer's passes count for themselves."""
    counts = []
    with quickly():
        for _ in range(10):
            case = toy()
            optimizer = torch.optim.SGD(case.student.parameters(), lr=0.1)
            before = graphs()
            LossTrainer(case.student, optimizer=optimizer, compile=True).step(case.labeled)
            counts.append(graphs() - before)
    assert counts == [1] * 10


# ------------------------------------------------------------------------------------------------------------ errors


def _whole(net: nn.Module) -> nn.Module:
    return torch.compile(net)  # type: ignore[return-value]


def _in_place(net: nn.Module) -> nn.Module:
    net.compile()
    return net


def _part(net: nn.Module) -> nn.Module:
    net[1].compile()  # type: ignore[index]
    return net


def _forward(net: nn.Module) -> nn.Module:
    net.forward = torch.compile(net.forward)
    return net


@pytest.mark.parametrize("how", [_whole, _in_place, _part, _forward])
@pytest.mark.parametrize("on", [False, True])
def test_a_network_that_was_compiled_already_is_refused(how: Any, on: bool) -> None:
    expected = r"is compiled already .*expected the plain module and compile=True"
    for which in ("teacher", "student"):
        networks = noisy_toy().networks()
        networks[which] = how(networks[which])
        with pytest.raises(MetaplError, match=f"the {which} {expected}"):
            metapl.BilevelTrainer(**networks, compile=on)
    model = how(noisy())
    with pytest.raises(MetaplError, match=f"the model {expected}"):
        LossTrainer(model, optimizer=torch.optim.SGD(model.parameters()), compile=on)


def test_a_forward_that_asks_not_to_be_compiled_is_none_that_was() -> None:
    class Asks(nn.Linear):
        @torch.compiler.disable
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    compiled.refuse_compiled(student=Asks(2, 2))


def _fails(*_: Any) -> Any:
    raise NotImplementedError("no such kernel")


@pytest.mark.parametrize("kind", ["bilevel", "losses"])
def test_what_the_compiler_refuses_is_an_error_that_says_so_and_nothing_moves(kind: str) -> None:
    case = noisy_toy()
    if kind == "bilevel":
        trainer: Any = metapl.BilevelTrainer(**case.networks(), compile=True)
    else:
        optimizer = torch.optim.SGD(case.student.parameters(), lr=0.1)
        trainer = LossTrainer(case.student, optimizer=optimizer, compile=True)
    before = everything(case)
    expected = r"torch\.compile cannot run these networks \(NotImplementedError: no such kernel\); leave compile out"
    with torch.compiler.set_stance(force_backend=_fails), pytest.raises(MetaplError, match=expected):
        trainer.step(**case.data())
    assert same(before, everything(case))
    assert "forward" not in vars(case.student)


def test_a_second_derivative_through_a_compiled_network_is_refused() -> None:
    class Penalty:
        name = "penalty"

        def __call__(self, teacher: nn.Module, *, labeled: Any, **_: Any) -> Tensor:
            x = labeled[0].clone().requires_grad_()
            (g,) = torch.autograd.grad(teacher(x).sum(), x, create_graph=True)
            return g.square().sum()

    case = noisy_toy()
    trainer = metapl.BilevelTrainer(**case.networks(), mode="none", teacher_losses=(Penalty(),), compile=True)
    before = everything(case)
    with quickly(), pytest.raises(MetaplError, match=r"double backward.*leave compile out"):
        trainer.step(**case.data())
    assert same(before[:-1], everything(case)[:-1])


def test_a_networks_own_error_passes_through() -> None:
    class Divides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError("of its own")

    case = toy()
    student = Divides().double()
    trainer = metapl.BilevelTrainer(case.teacher, student, "none", compile=True)
    with pytest.raises(ZeroDivisionError, match="of its own"):
        trainer.step(**case.data())


# ------------------------------------------------------------------------------------------------------- LossTrainer


def test_a_compiled_loss_trainer_is_the_plain_one() -> None:
    ends = []
    for on in (False, True):
        case = noisy_toy()
        optimizer = torch.optim.SGD(case.student.parameters(), lr=0.1, momentum=0.9)
        losses = (CrossEntropy(0.1), metapl.UDA(0.5))
        trainer = LossTrainer(case.student, losses, optimizer=optimizer, compile=on)
        torch.manual_seed(0)
        before = graphs()
        reports = [trainer.step(**case.data()).as_dict() for _ in range(3)]
        assert (graphs() > before) == on
        ends.append([torch.tensor([r["loss"] for r in reports]), *everything(case, optimizer)])
    assert torch.equal(ends[0][-1], ends[1][-1])
    assert gap(ends[1], ends[0]) < 1e-11
