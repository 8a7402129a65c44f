"""What ordinary programs do wrong, or leave out.

Refused by its own name before anything moves; proposals run.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torchopt
from problems_zoo import same
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import metapl
from metapl import MetaplError
from metapl.errors import warn
from metapl.feedback import Forward
from metapl.problems import EqualWeights, ExampleWeights, Table

ROWS = 8
WIDTH = 4
CLASSES = 3


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, CLASSES)).to(dtype)


def pair(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(rows, WIDTH, generator=draw, dtype=dtype), torch.arange(rows) % CLASSES


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def weights(*modules: nn.Module | None) -> list[Tensor]:
    return [
        t.clone() for module in modules if module is not None for t in module.state_dict().values()
    ]


def with_nan(x: Tensor) -> Tensor:
    x = x.clone()
    x[1, 0] = math.nan
    return x


# ---------------------------------------------------------------------------- the outer loss is NaN

OUTER = {
    "no rows": lambda x, y: (x[:0], y[:0]),
    "NaN in the inputs": lambda x, y: (x * float("nan"), y),
    "infinite inputs": lambda x, y: (torch.where(x > 0, torch.inf, x), y),
}

# What is said of each, whether the loss was found not to be finite here or there.
SAID = {
    "no rows": "outer inputs: no rows; expected one or more",
    "NaN in the inputs": r"outer inputs: (\d+) of \1 rows have NaN; expected finite numbers",
    "infinite inputs": r"outer inputs: \d of \d rows with infinite numbers; the outer loss is NaN",
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize(
    "mode", [mode for mode in metapl.MODES if mode not in ("none", "direct", "implicit")]
)
def test_an_outer_loss_that_is_no_number_is_named(mode: str, outer: str, verify: bool) -> None:
    """And neither the student's passes nor another mode.

    The teacher has no losses that would be refused before.
    """
    trainer = metapl.BilevelTrainer(network(), network(), mode, teacher_losses=(), verify=verify)
    weights_before = weights(trainer.teacher, trainer.student)
    with pytest.raises(MetaplError, match=SAID[outer]):
        trainer.step(OUTER[outer](*pair()), pair()[0])
    assert same(weights(trainer.teacher, trainer.student), weights_before)
    trainer.step(pair(), pair()[0])


@pytest.mark.parametrize("mode", ["forward", "unrolled", Forward(truncate=0)])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("outer", OUTER)
def test_hypergradient_names_it_too(outer: str, steps: int, mode: Any) -> None:
    """The gradient of a batch without rows would be zeros.

    In first order NaN would come back as a gradient.
    """
    student = network()
    with pytest.raises(MetaplError, match=SAID[outer]):
        metapl.hypergradient(
            None,
            student,
            outer=OUTER[outer](*pair()),
            inner=metapl.Lookahead([pair()] * steps),
            mode=mode,
            problem=EqualWeights(),
            inner_optimizer=sgd(student),
            wrt="start",
        )


@pytest.mark.parametrize("verify", [True, False])
def test_a_bad_inner_batch_is_not_blamed_on_the_outer_one(verify: bool) -> None:
    trainer = metapl.BilevelTrainer(network(), network(), teacher_losses=(), verify=verify)
    with pytest.raises(MetaplError, match=r"^inner inputs: 1 of \d+ rows has NaN"):
        trainer.step(pair(), with_nan(pair()[0]))
    with pytest.raises(MetaplError, match=r"^inner inputs: no rows; expected one or more"):
        trainer.step(pair(), pair()[0][:0])
    with pytest.raises(MetaplError, match=r"^inner\[1\] inputs: 1 of \d+ rows has NaN"):
        trainer.step(pair(), metapl.Lookahead([pair()[0], with_nan(pair()[0])]))


def test_batches_of_finite_numbers_are_not_blamed() -> None:
    trainer = metapl.BilevelTrainer(network(), network(), teacher_losses=(), verify=False)
    with torch.no_grad():
        trainer.student[0].bias[0] = math.nan
    with pytest.raises(MetaplError, match="^the inner loss, the outer loss or the feedback is NaN"):
        trainer.step(pair(), pair()[0])


# What is done with inputs that may have NaN, and what they are called then.
READERS: dict[str, tuple[Callable[[Any, Any], object], str]] = {
    "evaluate": (lambda trainer, data: trainer.evaluate(data), "evaluated"),
    "its loss": (lambda trainer, data: trainer.evaluate(data, metric="loss"), "evaluated"),
    "predict": (lambda trainer, data: trainer.predict(data[0]), "the"),
    "validation": (
        lambda trainer, data: trainer.fit(
            [pair()], [pair()[0]], steps=1, validation=data, progress=False
        ),
        "evaluated",
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_inputs_that_are_nan_are_not_blamed_on_the_network(reader: str) -> None:
    x, y = pair()
    trainer = metapl.BilevelTrainer(network(), network(), verify=False)
    read, name = READERS[reader]
    with pytest.raises(MetaplError, match=rf"^{name} inputs: 1 of 8 rows has NaN; expected finite"):
        read(trainer, (with_nan(x), y))


def test_a_fit_says_which_of_its_batches_has_nan() -> None:
    x, y = pair(rows=24)
    trainer = metapl.BilevelTrainer(network(), network())
    with pytest.raises(MetaplError, match=r"^step \d: inner inputs: 1 of 8 rows has NaN"):
        trainer.fit((x, y), with_nan(x), steps=3, batch_size=8, progress=False)
    supervised = network()
    of_one = metapl.LossTrainer(supervised, optimizer=sgd(supervised))
    with pytest.raises(MetaplError, match=r"^outer inputs: 1 of 24 rows has NaN"):
        of_one.step((with_nan(x), y))


# ------------------------------------------------------ evaluation where the signal is in the input


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.linspace(-1, 1, WIDTH, dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.values.sigmoid()


class Preprocessing(metapl.BilevelProblem):
    """A scale of each column, learned, by which both losses are taken."""

    signal_has_rows = False

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher

    def signal(
        self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any
    ) -> metapl.Signal:
        return metapl.Signal(teacher())

    def student_input(self, batch: Any, signal: Any) -> Tensor:  # type: ignore[override]
        return batch[0] * signal.value

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        return F.cross_entropy(outputs, batch[1], reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


class ByModule(Preprocessing):
    def outer_input(self, batch: Any) -> Tensor:
        return batch[0] * self.teacher()


def test_an_outer_input_that_reads_the_teacher_is_evaluated() -> None:
    teacher = Scales()
    student = network(torch.float64)
    batches: dict[str, Any] = {"outer": pair(5, torch.float64), "inner": pair(dtype=torch.float64)}
    trainer = metapl.BilevelTrainer(teacher, student, problem=ByModule(teacher))
    trainer.fit(
        [batches["outer"]], [batches["inner"]], steps=2, validation=batches["outer"], progress=False
    )
    x, y = batches["outer"]
    right = (student(x * teacher()).argmax(1) == y).double().mean().item()
    assert trainer.evaluate(batches["outer"]).value == pytest.approx(right)


# ---------------------------------------------------------------------------------- what errors say


@pytest.mark.parametrize("labels", [torch.float32, torch.float16, torch.int32])
def test_an_error_describes_what_was_given_and_not_its_copies(labels: torch.dtype) -> None:
    x, y = pair()
    trainer = metapl.BilevelTrainer(network(), network())
    with pytest.raises(
        MetaplError, match=rf"the labels are a tensor of shape \(8,\), {str(labels)[6:]}, on cpu"
    ):
        trainer.step((x, y.to(labels)), x)


def refused_states() -> dict[str, tuple[Callable[[], Any], str]]:
    def bilevel(optimizer: Any = sgd) -> metapl.BilevelTrainer:
        student = network()
        return metapl.BilevelTrainer(network(), student, inner_optimizer=optimizer(student))

    def of_losses(optimizer: Any = sgd) -> metapl.LossTrainer:
        model = network()
        return metapl.LossTrainer(model, optimizer=optimizer(model))

    def adam(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(module.parameters(), lr=0.1)

    expected = r"expected that of a {} with the same networks, optimizers and mode\."
    bilevel_expected = expected.format("BilevelTrainer")
    loss_expected = expected.format("LossTrainer")
    return {
        "SGD's for Adam": (
            lambda: bilevel(adam).load_state_dict(bilevel().state_dict()),
            r"inner_optimizer has dampening.*, the trainer's has .*betas.*" + bilevel_expected,
        ),
        "Adam's for SGD": (
            lambda: bilevel().load_state_dict(bilevel(adam).state_dict()),
            r"inner_optimizer has .*betas.*, the trainer's has dampening.*" + bilevel_expected,
        ),
        "Adam's for SGD, of losses": (
            lambda: of_losses().load_state_dict(of_losses(adam).state_dict()),
            rf"optimizer has .*betas.*, the trainer's has dampening.*{loss_expected}",
        ),
        "a LossTrainer's": (
            lambda: bilevel().load_state_dict(of_losses().state_dict()),
            rf"it has no .*teacher.*{bilevel_expected}",
        ),
        "a network's": (
            lambda: of_losses().load_state_dict(network().state_dict()),
            rf"it has no held, optimizer, settings, steps_done, student.*{loss_expected}",
        ),
        "nothing": (
            lambda: bilevel().load_state_dict(None),
            rf"it is of type NoneType.*{bilevel_expected}",
        ),  # type: ignore[arg-type]
    }


@pytest.mark.parametrize("case", refused_states())
def test_a_state_of_another_trainer_is_refused_by_what_differs(case: str) -> None:
    call, words = refused_states()[case]
    with pytest.raises(MetaplError, match=words):
        call()


def test_a_state_of_the_same_trainer_is_taken_with_a_schedule() -> None:
    """Which adds a setting to the param groups."""
    model = network()
    optimizer = sgd(model)
    trainer = metapl.LossTrainer(model, optimizer=optimizer)
    torch.optim.lr_scheduler.StepLR(optimizer, 5)
    state = trainer.state_dict()
    other = network()
    metapl.LossTrainer(other, optimizer=sgd(other)).load_state_dict(state)


def rates_by_entry(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        [{"params": [p], "lr": torch.full_like(p, 0.1)} for p in module.parameters()], lr=0.1
    )


def fit(**options: Any) -> Any:
    return metapl.BilevelTrainer(network(), network()).fit(
        pair(), pair()[0], steps=2, batch_size=4, progress=False, **options
    )


def attribution(**options: Any) -> metapl.Attribution:
    student = network()
    return metapl.attribute(
        student,
        pair(),
        pair(),
        optimizer=sgd(student),
        steps=2,
        batch_size=4,
        progress=False,
        **options,
    )


def scheduled(steps: Any) -> Any:
    scheduler = torch.optim.lr_scheduler.StepLR(sgd(network()), 1)
    return metapl.scheduled_settings(scheduler, steps=steps)


def with_rates_of_the_teacher() -> Any:
    teacher = network()
    return metapl.BilevelTrainer(teacher, network(), outer_optimizer=rates_by_entry(teacher))


def state_of_a_wider_network() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(WIDTH, 9), nn.Tanh(), nn.Linear(9, CLASSES))
    return metapl.LossTrainer(model, optimizer=sgd(model)).state_dict()


def with_rates_of_losses() -> Any:
    model = network()
    return metapl.LossTrainer(model, optimizer=rates_by_entry(model))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a seed for a generator": (
        lambda: metapl.BilevelTrainer(network(), network(), generator=5),  # type: ignore[arg-type]
        r"generator is of type int; expected torch.Generator\('cpu'\), or none",
    ),
    "no removals": (
        lambda: attribution().validate([]),
        "0 sets of examples; expected three or more",
    ),
    "two removals": (
        lambda: attribution().validate([[0], [1]]),
        "2 sets of examples; expected three or more",
    ),
    "several removals for one": (
        lambda: attribution().predict([torch.tensor([0, 1]), torch.tensor([2, 3])]),
        "the examples to remove are a list of 2 .*; expected numbers from 0 to",
    ),
    "an example that is not there": (
        lambda: attribution().predict([ROWS]),
        f"index {ROWS} is out of bounds .*; expected numbers from 0 to {ROWS - 1}, or booleans",
    ),
    "a setting of no optimizer": (
        lambda: attribution(settings={"learning_rate": torch.ones(2, 1)}),
        "'learning_rate', no setting of inner_optimizer; expected some of lr, momentum",
    ),
    "a setting of another optimizer": (
        lambda: attribution(settings={"betas": torch.ones(2, 1, 2)}),
        "'betas', no setting of inner_optimizer; expected some of lr, momentum",
    ),
    "a setting that is NaN": (
        lambda: attribution(settings={"lr": torch.full((2, 1), math.nan)}),
        "'lr' with nan; expected 0 or more",
    ),
    "settings in a tuple": (
        lambda: attribution(settings=({"lr": torch.ones(2, 1)},)),
        r"settings is a tuple of 1 \(dict\); expected a dict of tensors",
    ),
    "settings of no steps": (lambda: scheduled(0), "steps=0: expected a whole number >= 1"),
    "an optimizer for a scheduler": (
        lambda: metapl.scheduled_settings(sgd(network()), steps=2),  # type: ignore[arg-type]
        "scheduler is of type SGD; expected a torch.optim.lr_scheduler",
    ),
    "a metric that is misspelled": (
        lambda: fit(validation=pair(), metric="acuracy"),
        "metric='acuracy': expected 'accuracy', 'loss'",
    ),
    "a state that is not there": (
        lambda: metapl.LossTrainer(model := network(), optimizer=sgd(model)).load("no.safetensors"),
        "no.safetensors is not there; expected the path of a file",
    ),
    "a folder for a state": (
        lambda: metapl.LossTrainer(model := network(), optimizer=sgd(model)).load("/"),
        "/ is a folder; expected a file that save wrote",
    ),
    "a state of another network": (
        lambda: metapl.LossTrainer(model := network(), optimizer=sgd(model)).load_state_dict(
            state_of_a_wider_network()
        ),
        r"size mismatch for 0.weight: .* more\); expected that of a LossTrainer",
    ),
    "a callback that is a number": (
        lambda: fit(callbacks=[3]),
        r"callbacks is a list of 1 \(int\); expected a list of functions",
    ),
    "a callback outside of a list": (
        lambda: fit(callbacks=print),
        "callbacks is of type builtin_function_or_method; expected a list of functions",
    ),
    "a file for a folder": (
        lambda: fit(out=__file__),
        r"cannot be made \(File exists\); expected a folder for out",
    ),
    "a rate for each entry of the teacher": (
        with_rates_of_the_teacher,
        r"outer_optimizer has 'lr' that is .*\(6, 4\).*; expected a number",
    ),
    "a rate for each entry of a network with losses": (
        with_rates_of_losses,
        r"optimizer has 'lr' that is .*\(6, 4\).*; expected a number",
    ),
}


def step(
    outer: Any = None, inner: Any = None, teacher: Any = None, student: Any = None
) -> metapl.StepReport:
    trainer = metapl.BilevelTrainer(teacher or network(), student or network(), "reinforce")
    return trainer.step(pair() if outer is None else outer, pair()[0] if inner is None else inner)


def with_labels(change: Callable[[Tensor], Any]) -> Callable[[], object]:
    x, y = pair()
    return lambda: step((x, change(y)))


def evaluation(y: Tensor) -> object:
    return metapl.BilevelTrainer(network(), network()).evaluate((pair()[0], y))


def fit_of(x: Any, y: Any) -> object:
    trainer = metapl.BilevelTrainer(network(), network())
    return trainer.fit((x, y), pair()[0], steps=1, batch_size=4, progress=False)


def of_losses() -> metapl.LossTrainer:
    model = network()
    return metapl.LossTrainer(model, optimizer=sgd(model))


def with_another(
    role: str, build: Callable[[], Any] | None = None, steps: int = 0
) -> Callable[[], object]:
    """Return a step of a trainer in which a network is replaced after some steps."""

    def replace() -> object:
        trainer = build() if build else metapl.BilevelTrainer(network(), network())
        for _ in range(steps):
            trainer.step(pair(), pair()[0])
        setattr(trainer, role, network())
        return trainer.step(pair(), pair()[0])

    return replace


def first_step_of_another() -> object:
    """Return a step of the student alone, beside a look-ahead, whose student was replaced."""
    trainer = metapl.BilevelTrainer(network(), network(), mode="forward", lookahead=2)
    trainer.student = network()
    return trainer.first_step(pair(), pair()[0])


def loss_of(labels: Any, classes: int = CLASSES) -> object:
    model = nn.Linear(WIDTH, classes)
    return metapl.LossTrainer(model, optimizer=sgd(model)).step((pair()[0], labels))


def fit_beside_a_scheduler() -> object:
    trainer = metapl.BilevelTrainer(network(), network())
    scheduler = torch.optim.lr_scheduler.StepLR(trainer.schedulable[0], 1)
    return trainer.fit(
        pair(),
        pair()[0],
        steps=2,
        batch_size=4,
        log_every=1,
        progress=False,
        callbacks=[lambda *_: scheduler.step()],
    )


def compiled_with(kind: Callable[..., torch.optim.Optimizer]) -> object:
    teacher = network()
    optimizer = kind(teacher.parameters(), lr=0.1)
    trainer = metapl.BilevelTrainer(teacher, network(), outer_optimizer=optimizer, compile=True)
    return trainer.step(pair(), pair()[0])


def stored_scores() -> object:
    x, y = pair()
    teacher = metapl.models.LabelAdjuster(CLASSES)
    problem = metapl.problems.ReducedLabels()
    trainer = metapl.BilevelTrainer(teacher, network(), problem=problem, teacher_losses=())
    return trainer.step((x, y), (x, torch.randn(ROWS, CLASSES)))


NAMES = np.array(["a", "b", "c", "a", "b", "c", "a", "b"])
REFUSED |= {
    "targets of one number": (
        lambda: loss_of(torch.rand(ROWS, 1), classes=1),
        r"the labels are .*\(8, 1\).*; expected two or more outputs .*, or a problem or a loss for",
    ),
    "scores in the place of distributions": (
        lambda: loss_of(torch.randn(ROWS, CLASSES)),
        r"the labels are .*\(8, 3\).*; expected class distributions \(8, 3\), which sum to 1",
    ),
    "scores in the place of stored labels": (
        stored_scores,
        r"the stored labels of the inner batch are a tensor of shape .*; expected class dist",
    ),
    "one-hot labels of whole numbers": (
        lambda: loss_of(F.one_hot(pair()[1], CLASSES)),
        r"the labels are .*int64.*; expected int64, .*, .*as_tensor\(labels\)\.argmax\(1\)",
    ),
    "a scheduler beside that of a fit": (
        fit_beside_a_scheduler,
        "something set the rate of inner_optimizer to 0.005 during a fit, .*; expected no other",
    ),
    "a compiled step of RMSprop": (
        lambda: compiled_with(torch.optim.RMSprop),
        r"outer_optimizer, beside compile= or functional\(\), is RMSprop; .*, or compile left out",
    ),
    "inputs in float64": (
        lambda: step(inner=pair()[0].double()),
        r"the student's inputs are float64, and .* float32; expected .*, such as x\.float\(",
    ),
    "a teacher in float64": (
        lambda: step(teacher=network(torch.float64)),
        r"the teacher's inputs are float32, .* float64; expected .*, such as teacher\.float\(",
    ),
    "a student in float64": (
        lambda: step(student=network(torch.float64)),
        r"inputs are float32, .* float64; expected the same, such as student\.float\(",
    ),
    "whole numbers as inputs": (
        lambda: step(inner=torch.ones(5, WIDTH, dtype=torch.int64)),
        r"the student's inputs are int64, .* x\.float\(\), or x\.astype\('float32'\) of NumPy",
    ),
    "an array of whole numbers": (
        lambda: fit_of(np.ones((ROWS, WIDTH), dtype=int), pair()[1].numpy()),
        r"inputs are int64, .*astype\('float32'\) of NumPy arrays",
    ),
    "one example of a plain network to predict": (
        lambda: metapl.BilevelTrainer(network(), network()).predict(pair()[0][0]),
        r"was given a tensor of shape \(4,\).*; expected a row for each example, such as x\[None\]",
    ),
    "a list of examples to predict": (
        lambda: metapl.BilevelTrainer(network(), network()).predict([*pair()[0]]),
        r"was given a tensor of shape \(4,\).*; expected a row for each example",
    ),
    "a data set to predict": (
        lambda: metapl.BilevelTrainer(network(), network()).predict(TensorDataset(pair()[0])),
        r"the data is of type TensorDataset; expected a batch, a DataLoader",
    ),
    "a data set to evaluate": (
        lambda: metapl.BilevelTrainer(network(), network()).evaluate(TensorDataset(*pair())),
        r"the data is of type TensorDataset; expected a batch, a DataLoader",
    ),
    "an array of whole numbers to predict": (
        lambda: metapl.BilevelTrainer(network(), network()).predict(np.ones((3, WIDTH), dtype=int)),
        r"inputs are int64, .*astype\('float32'\) of NumPy arrays",
    ),
    "arrays in a step": (
        lambda: step(tuple(t.numpy() for t in pair())),
        r"outer is a tuple of 2 \(ndarray\); expected .* give a step torch\.as_tensor\(x\) of each",
    ),
    "an inner array in a step": (
        lambda: step(inner=pair()[0].numpy()),
        r"inner is of type ndarray, shape \(8, 4\), float32; .* fit makes tensors",
    ),
    "float labels": (
        with_labels(Tensor.float),
        r"float32, on cpu; .*as_tensor\(labels\)\.long\(\)\.",
    ),
    "labels of no class": (with_labels(lambda y: y + 0.5), r"index per example, \(batch,\)\.$"),
    "int32 labels": (
        with_labels(Tensor.int),
        r"int32, .*as_tensor\(labels\)\.long\(\)\.",
    ),
    "labels in a column": (
        with_labels(lambda y: y[:, None]),
        r"as_tensor\(labels\)\.squeeze\(1\)\.",
    ),
    "one-hot labels": (
        with_labels(lambda y: F.one_hot(y, CLASSES)),
        r"as_tensor\(labels\)\.argmax\(1\)\.",
    ),
    "names of classes": (
        with_labels(lambda y: NAMES),
        r"shape \(8,\), <U1; .* torch\.as_tensor\(numpy\.unique\(labels, return_inverse=True",
    ),
    "a list of labels": (with_labels(Tensor.tolist), r"a list of 8 \(int\); .*torch\.as_tensor"),
    "classes from 1": (
        with_labels(lambda y: y + 1),
        r"labels are 1\.\.3; .* 0\.\.2, so subtract 1\.",
    ),
    "an ignored label": (
        with_labels(lambda y: y * 0 - 100),
        r"labels are -100\.\.-100; .* 0\.\.2\.",
    ),
    "float labels to evaluate": (
        lambda: evaluation(pair()[1].float()),
        r"the loss failed \(.*\), where the labels are a tensor .*as_tensor\(labels\)\.long\(\)\.",
    ),
    "one-hot labels to evaluate": (
        lambda: evaluation(F.one_hot(pair()[1], CLASSES)),
        r"the loss failed .*as_tensor\(labels\)\.argmax\(1\)\.",
    ),
    "classes from 1 to evaluate": (
        lambda: evaluation(pair()[1] + 1),
        r"from 1 to 3; expected .* from 0 to C - 1",
    ),
    "fewer labels than inputs": (
        lambda: fit_of(pair()[0], pair(6)[1]),
        "^outer inputs 8 rows, outer labels 6 rows; expected one number of rows",
    ),
    "fewer inputs than labels": (
        lambda: fit_of(pair(6)[0], pair()[1]),
        "^outer inputs 6 rows, outer labels 8 rows; expected one number of rows",
    ),
    "no rows to train on": (
        lambda: fit_of(pair(0)[0], pair(0)[1]),
        "^outer inputs 0 rows, outer labels 0 rows; expected one row or more",
    ),
    "another student": (
        with_another("student"),
        "another network was put into the trainer, .*; expected a new trainer",
    ),
    "another student after a step": (
        with_another("student", steps=1),
        "another network was put into the trainer, .*; expected a new trainer",
    ),
    "another student in a first step": (
        first_step_of_another,
        "another network was put into the trainer, .*; expected a new trainer",
    ),
    "another teacher after a step": (
        with_another("teacher", steps=1),
        "another network was put into the trainer, .*; expected a new trainer",
    ),
    "another network with losses": (
        with_another("student", of_losses, steps=1),
        "another network was put into the trainer, .*; expected a new trainer",
    ),
    "an option with a letter less": (
        lambda: metapl.BilevelTrainer(network(), network(), precison="bfloat16"),  # type: ignore[call-arg]
        "BilevelTrainer has no option 'precison'; did you mean precision",
    ),
    "an option of other libraries": (
        lambda: metapl.BilevelTrainer(network(), network(), lr=0.1),  # type: ignore[call-arg]
        "BilevelTrainer has no option 'lr'; expected one of .*inner_optimizer",
    ),
    "no mode": (
        lambda: metapl.BilevelTrainer(network(), network(), None),  # type: ignore[arg-type]
        r"mode=None: expected an estimator, or one of .*, none\.$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_call_is_refused_in_a_line(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(MetaplError, match=words) as refusal:
        call()
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("mode", "reinforce"),
        ("problem", metapl.problems.MetaWeightNet()),
        ("inner_optimizer", torch.optim.SGD([torch.zeros(1)], lr=1.0)),
        ("outer_optimizer", torch.optim.SGD([torch.zeros(1)], lr=1.0)),
        # It clipped the teacher's gradient alone.
        ("clip_norm", 1.0),
        ("precision", "bfloat16"),
        ("accumulate", 2),
        ("recompute_teacher", True),
        ("compile", True),
    ],
)
@pytest.mark.parametrize("steps", [0, 1])
def test_what_steps_are_of_is_assigned_once(option: str, value: Any, steps: int) -> None:
    trainer = metapl.BilevelTrainer(network(), network())
    for _ in range(steps):
        trainer.step(pair(), pair()[0])
    with pytest.raises(MetaplError, match=f"^{option} of a trainer was assigned; expected "):
        setattr(trainer, option, value)
    trainer.step(pair(), pair()[0])
    # What the error proposes.
    metapl.BilevelTrainer(
        trainer.teacher,
        trainer.student,
        inner_optimizer=trainer.inner_optimizer,
        outer_optimizer=trainer.outer_optimizer,
        clip_norm=1.0,
    ).step(pair(), pair()[0])


class WithDefaults(metapl.BilevelTrainer):
    """A trainer of a user's own, which notes its options before it is made of others."""

    def __init__(self, *networks: nn.Module) -> None:
        self.mode: Any = "reinforce"
        self.clip_norm = None
        super().__init__(*networks, self.mode, clip_norm=1.0)


def test_a_trainer_of_a_users_own_may_assign_options_before_it_is_made() -> None:
    trainer = WithDefaults(network(), network())
    assert (trainer.mode.name, trainer.clip_norm) == ("reinforce", 1.0)
    trainer.step(pair(), pair()[0])
    with pytest.raises(MetaplError, match="^clip_norm of a trainer was assigned"):
        trainer.clip_norm = None


def test_what_a_step_reads_anew_may_be_assigned() -> None:
    """A larger feedback moves the teacher in the next step."""
    moved = []
    for weight in (0.0, 100.0):
        torch.manual_seed(0)
        trainer = metapl.BilevelTrainer(network(), network(), feedback_weight=0.0)
        trainer.step(pair(), pair()[0])
        trainer.feedback_weight = weight
        trainer.step(pair(), pair()[0])
        moved.append(next(iter(network_of(trainer).parameters())).detach().clone())
    assert not torch.equal(*moved)


def network_of(trainer: metapl.BilevelTrainer) -> nn.Module:
    """Return the teacher of a trainer that has one."""
    assert trainer.teacher is not None
    return trainer.teacher


# Calls that torch refuses in its own words, and what stands beside these.
NOTED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "a wrong width of the inner batch": (
        lambda: step(inner=torch.randn(5, 3)),
        RuntimeError,
        r"in the student \(Sequential\), on the inner batch: tensor \(5, 3\)",
    ),
    "a wrong width of the outer batch": (
        lambda: step((torch.randn(5, 3), torch.arange(5) % 3)),
        RuntimeError,
        r"in the student \(Sequential\), on the outer batch: tensor \(5, 3\)",
    ),
    "a teacher of another width": (
        lambda: step(teacher=nn.Linear(3, CLASSES)),
        RuntimeError,
        r"in the teacher \(Linear\), on the inner batch: tensor \(8, 4\)",
    ),
    "a wrong width in a fit": (
        lambda: fit_of(torch.randn(ROWS, 3), pair()[1]),
        RuntimeError,
        r"in the student \(Sequential\), on the outer batch: tensor \(4, 3\)",
    ),
    "a wrong width to predict": (
        lambda: metapl.BilevelTrainer(network(), network()).predict(torch.randn(5, 3)),
        RuntimeError,
        r"in the network \(Sequential\): tensor \(5, 3\)",
    ),
    "a wrong width to evaluate": (
        lambda: metapl.BilevelTrainer(network(), network()).evaluate(
            (torch.ones(5, 3), pair(5)[1])
        ),
        RuntimeError,
        r"in the network \(Sequential\): tensor \(2, 3\)",
    ),
    "one example to predict": (
        lambda: metapl.BilevelTrainer(Flat(), Flat()).predict(pair()[0][0]),
        IndexError,
        r"\(Flat\): tensor \(4,\); expected a row for each example, such as x\[None\]",
    ),
    "fewer labels than inputs": (
        lambda: step((pair()[0], pair(6)[1])),
        ValueError,
        r"in a step on outer inputs tensor \(8, 4\), outer labels tensor \(6,\), inner inputs",
    ),
    "one row for batch norm": (
        lambda: step(pair(1), teacher=with_norm(), student=with_norm()),
        ValueError,
        r"in the student \(Sequential\), on the outer batch: tensor \(1, 4\)",
    ),
    "inputs without memory": (
        lambda: step(inner=pair()[0].to("meta")),
        RuntimeError,
        r"tensor \(8, 4\) on meta",
    ),
}


class Flat(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


def with_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES))


@pytest.mark.parametrize("case", NOTED)
def test_torchs_own_errors_have_a_note_of_network_and_batch(case: str) -> None:
    call, kind, words = NOTED[case]
    with pytest.raises(kind) as failure:
        call()
    assert not isinstance(failure.value, MetaplError)
    (note,) = failure.value.__notes__
    assert re.search(words, note), note


def test_a_penalty_in_micro_batches_warns_of_nothing() -> None:
    """A loss that reads the weights has a graph wherever it is taken."""
    student = network()

    class Penalized(ExampleWeights):
        def inner_loss(
            self, outputs: Tensor, signal: Any, batch: Any, params: Any = None
        ) -> Tensor:
            return super().inner_loss(outputs, signal, batch, params) + sum(
                (p**2).sum() for p in student.parameters()
            )

        def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
            total = F.cross_entropy(outputs, batch[1], reduction="sum")
            return total + len(outputs) * sum((p**2).sum() for p in student.parameters()), len(
                outputs
            )

    trainer = metapl.BilevelTrainer(
        Table(torch.zeros(ROWS)),
        student,
        problem=Penalized(),
        inner_optimizer=sgd(student),
        accumulate=2,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.step(pair(), (*pair(), torch.arange(ROWS)))


def test_what_an_error_about_a_dataclass_proposes_runs() -> None:
    @dataclass
    class Batch:
        x: Tensor
        y: Tensor

    class Records(metapl.BilevelProblem):
        def signal(
            self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any
        ) -> metapl.Signal:
            return metapl.Signal(teacher(torch.arange(len(batch.y))).sigmoid())

        def inner_loss(
            self, outputs: Tensor, signal: Any, batch: Any, params: Any = None
        ) -> Tensor:
            return signal.value * F.cross_entropy(outputs, batch.y, reduction="none")

        def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return F.cross_entropy(outputs, batch.y)

        def outer_batch(self, batch: Any) -> Any:
            return batch

    class WithInputs(Records):
        def student_input(self, batch: Any) -> Tensor:
            return batch.x

        outer_input = student_input

    def step(problem: Any) -> Any:
        student = network()
        trainer = metapl.BilevelTrainer(
            Table(torch.zeros(ROWS)), student, problem=problem, inner_optimizer=sgd(student)
        )
        return trainer.step(Batch(*pair()), Batch(*pair()))

    with pytest.raises(MetaplError, match="student_input and outer_input of the problem"):
        step(Records())
    assert tuple(step(WithInputs()).feedback.shape) == (ROWS,)


# ------------------------------------------------------------------------- what a trainer is, shown


def test_a_trainer_shows_its_parts_and_how_far_it_is() -> None:
    teacher, student = network(), network()
    matrices = [p for p in student.parameters() if p.ndim == 2]
    vectors = [p for p in student.parameters() if p.ndim != 2]
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        metapl.feedback.Reinforce(baseline=0.9),
        inner_optimizer=(torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(vectors, lr=0.001)),
    )
    trainer.step(pair(), pair()[0])
    mode = "Reinforce(similarity='dot', baseline=0.9, normalization='gradient', reduction='mean')"
    assert repr(trainer).splitlines() == [
        f"BilevelTrainer: mode {mode}, problem PseudoLabels, 1 step done",
        "  student: Sequential, 51 weights, Muon with lr=0.02 and AdamW with lr=0.001",
        "  teacher: Sequential, 51 weights, SGD with lr=0.05",
    ]


def test_a_trainer_without_a_teacher_shows_a_transform() -> None:
    trainer = metapl.BilevelTrainer(
        None,
        network(),
        problem=metapl.problems.LearningToReweight(),
        inner_optimizer=torchopt.sgd(0.1),
    )
    assert repr(trainer).splitlines() == [
        "BilevelTrainer: mode 'forward', problem LearningToReweight, 0 steps done",
        "  student: Sequential, 51 weights, a transform GradientTransformation",
    ]


def test_weights_of_one_without_feedback_are_the_loop_of_before() -> None:
    """Bit for bit, with the loop's own optimizer, clip and dropout."""
    torch.manual_seed(0)
    x, y, numbers = torch.randn(48, 6), torch.arange(48) % 3, torch.arange(48)
    network = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 3))
    other = copy.deepcopy(network)
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.01) for one in (network, other)]
    # The sigmoid of 40 is 1.
    trainer = metapl.BilevelTrainer(
        Table(torch.full((48,), 40.0)),
        network,
        "none",
        problem=ExampleWeights(),
        inner_optimizer=optimizers[0],
        clip_norm=0.5,
    )
    for step in range(4):
        rows = torch.arange(12) + 12 * step
        torch.manual_seed(step)
        trainer.step((x, y), (x[rows], y[rows], numbers[rows]))
        torch.manual_seed(step)
        optimizers[1].zero_grad()
        F.cross_entropy(other(x[rows]), y[rows], reduction="none").mean().backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizers[1].step()
    for one, two in zip(network.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_a_mode_that_draws_says_that_a_signal_of_weights_is_not_drawn() -> None:
    weights, student = metapl.problems.Table(torch.zeros(6)), nn.Linear(4, 3)
    trainer = metapl.BilevelTrainer(weights, student, "reinforce", problem=ExampleWeights())
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    with pytest.raises(MetaplError, match=r"expected drawn labels, .* or the mode .*forward"):
        trainer.step((x, y), (x, y, torch.arange(6)))


def test_a_warning_names_the_line_of_a_program_without_a_name() -> None:
    """As one that exec() runs."""
    with pytest.warns(UserWarning, match="in words") as warned:
        exec(compile("warn('in words')", "program", "exec"), {"warn": warn})
    assert warned[0].filename == "program"
