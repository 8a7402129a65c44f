"""The study of modes on every problem: the library's, those of the pages, and of the examples."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pages
import pytest
import torch
from page_estimators import CLASSES
from test_problems import METHODS, teacher_of
from torch import nn

import metapl
from metapl import problems
from metapl.ablation import ModeCost
from metapl.ablation.altered import Alteration
from metapl.problems import EqualWeights, Table

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAGES = {}
for page in ("write-a-problem", "meta-learning", "whole-trainings"):
    PAGES |= pages.definitions(pages.code(ROOT / "docs" / f"{page}.md"))
ROWS = 6


class Given(NamedTuple):
    """What a trainer is made of, and two batches."""

    problem: metapl.BilevelProblem | None
    teacher: nn.Module | None
    student: nn.Module
    outer: Any
    inner: Any


def example(name: str) -> Any:
    """Return an example as a module; it may import others of its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return pages.script(EXAMPLES / f"{name}.py")


def digits(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(ROWS, *(shape or (64,))), torch.arange(ROWS) % 10


def tokens() -> torch.Tensor:
    return torch.randint(20, (ROWS, 7))


def network(*sizes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), metapl.models.mlp([*sizes]))


def language_model() -> nn.Module:
    return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))


class Rater(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids).mean((1, 2))


def of_method(name: str) -> Given:
    method = METHODS[name]
    x, y = method.batch[0], torch.arange(5) % 3
    return Given(method.problem, teacher_of(name), network(16, 6, 3).double(), (x, y), method.batch)


def labels() -> Given:
    return Given(None, network(64, 10), network(64, 8, 10), digits(), torch.randn(ROWS, 64))


def reweighted() -> Given:
    return Given(problems.LearningToReweight(), None, network(64, 8, 10), digits(), digits())


def rated() -> Given:
    return Given(problems.DataRater(), Rater(20, 1), language_model(), tokens(), tokens())


def next_tokens() -> Given:
    ids = tokens()
    return Given(problems.NextToken(), None, language_model(), (ids, ids), (ids, ids))


def equal_weights() -> Given:
    return Given(EqualWeights(), None, network(64, 8, 10), digits(), digits())


def pair_weights(kind: str, columns: int = 1) -> Given:
    table = Table(torch.zeros(100, 2) if columns == 2 else torch.zeros(100))
    problem = example("your_own_method").PairWeights() if kind == "example" else PAGES[kind]()
    return Given(problem, table, network(64, 8, 10), digits(), digits())


def masked_language_model() -> Given:
    class Weighed(PAGES["LanguageModel"]):  # type: ignore[misc]
        """With an inner loss on sequences, whose label is the first token."""

        def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> Any:
            return metapl.Signal(teacher(batch[1]).sigmoid())

        def inner_loss(self, outputs: Any, signal: Any, batch: Any, params: Any = None) -> Any:
            losses = nn.functional.cross_entropy(outputs[:, 0], batch[1], reduction="none")
            return signal.value * losses

    ids = tokens()
    inner = (ids, ids[:, 1])
    return Given(Weighed(), Table(torch.zeros(20)), language_model(), (ids, ids), inner)


def learned_noise(kind: str) -> Given:
    problem = example("learned_augmentation").Noise() if kind == "example" else PAGES[kind]()
    return Given(problem, Table(torch.tensor([-1.0])), network(64, 8, 10), digits(), digits())


def learned_scales() -> Given:
    scales = PAGES["Scales"]()
    return Given(PAGES["LearnedScales"](scales), scales, network(64, 8, 10), digits(), digits())


def regression() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(ROWS, 1), torch.randn(ROWS, 1)


def weighed_regression() -> Given:
    table = Table(torch.zeros(ROWS))
    inner = (*regression(), torch.arange(ROWS))
    return Given(PAGES["WeighedRegression"](), table, network(1, 8, 1), regression(), inner)


def plain_regression() -> Given:
    return Given(PAGES["Regression"](), None, network(1, 8, 1), regression(), regression())


def bootstrap() -> Given:
    return Given(PAGES["Bootstrap"](), None, network(64, 8, 10), digits(), digits())


def proximal() -> Given:
    start = network(1, 8, 1)
    return Given(PAGES["Proximal"](), start, network(1, 8, 1), regression(), regression())


def learned_loss() -> Given:
    loss = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    problem = PAGES["LearnedLoss"](loss)
    return Given(problem, loss, network(1, 8, 1), regression(), regression())


def is_even() -> Given:
    x, y = digits()
    batch = (x, (y % 2).float())
    return Given(PAGES["IsEven"](), None, network(64, 8, 1), batch, batch)


def distilled() -> Given:
    module = example("distilled_digits")
    images = Table(torch.randn(10, 8, 8))
    return Given(module.Distilled(), images, network(64, 8, 10), digits(8, 8), torch.arange(10))


def hyperparameters() -> Given:
    module = example("learned_hyperparameters")
    logs = {name: torch.tensor(values).log() for name, values in module.START.items()}
    student = nn.Sequential(nn.Flatten(), *map(nn.Linear, (64, 8, 8), (8, 8, 10)))
    batch = digits(8, 8)
    return Given(module.Hyperparameters(), nn.ParameterDict(logs), student, batch, batch)


def architecture() -> Given:
    module = example("darts")
    mix = module.Mix()
    return Given(module.Darts(mix), mix, module.Cell(), digits(1, 8, 8), digits(1, 8, 8))


def sinusoids() -> Given:
    module = example("maml_sinusoids")
    (few, many) = ([t[0] for t in batch] for batch in module.draw(1))
    return Given(module.PROBLEM, None, network(1, 8, 1), tuple(many), tuple(few))


CASES: dict[str, Callable[[], Given]] = {
    "PseudoLabels": labels,
    **{name: lambda name=name: of_method(name) for name in METHODS},
    "LearningToReweight": reweighted,
    "DataRater": rated,
    "NextToken": next_tokens,
    "EqualWeights": equal_weights,
    "examples: PairWeights": lambda: pair_weights("example"),
    "PairWeights": lambda: pair_weights("PairWeights"),
    "WeightsAndLabels": lambda: pair_weights("WeightsAndLabels", columns=2),
    "LanguageModel": masked_language_model,
    "LearnedNoise": lambda: learned_noise("LearnedNoise"),
    "examples: Noise": lambda: learned_noise("example"),
    "LearnedScales": learned_scales,
    "Regression": plain_regression,
    "WeighedRegression": weighed_regression,
    "Bootstrap": bootstrap,
    "Proximal": proximal,
    "LearnedLoss": learned_loss,
    "IsEven": is_even,
    "examples: Distilled": distilled,
    "examples: Hyperparameters": hyperparameters,
    "examples: Darts": architecture,
    "examples: Sinusoids": sinusoids,
}


def test_no_problem_of_the_library_is_left_out() -> None:
    tried = {type(make().problem) for make in CASES.values()} | {problems.PseudoLabels}
    for name in problems.__all__:
        kind = getattr(problems, name)
        if issubclass(kind, metapl.BilevelProblem) and kind is not metapl.BilevelProblem:
            assert kind in tried, name


@pytest.mark.parametrize("name", CASES)
def test_every_problem_has_its_table(name: str) -> None:
    torch.manual_seed(0)
    given = CASES[name]()
    trainer = metapl.BilevelTrainer(
        given.teacher,
        given.student,
        problem=given.problem,
        inner_optimizer=torch.optim.SGD(given.student.parameters(), lr=0.1),
        verify=False,
    )
    modes: list[Any] = [*metapl.MODES, CLASSES["SketchedW"]()]
    study = metapl.ablate(trainer, given.outer, given.inner, modes, draws=2, rounds=1)
    assert [*study.modes] == [*metapl.MODES, "sketched_w"]
    costs = {name: cost for name, cost in study.modes.items() if isinstance(cost, ModeCost)}
    for exact in ("unrolled", "forward"):
        assert costs[exact].relative_error < 1e-4
        assert costs[exact].noise_to_signal == 0
    assert study.recommended in ("unrolled", "forward")
    # An estimator of a user's own has its own error and noise.
    assert costs["sketched_w"].noise_to_signal > 0
    # The direct term is a row where there is one, and belongs to the controls.
    reads_teacher = trainer.direct_term != ""
    assert ("direct" in costs) == reads_teacher
    altered = [f"forward_{alteration}" for alteration in get_args(Alteration)]
    assert [*study.altered] == altered
    for control in study.altered.values():
        assert isinstance(control, ModeCost)
        if reads_teacher:
            # What is altered is the feedback alone, so that the error is at most twice its part.
            assert control.relative_error < 2.1 * costs["direct"].relative_error
    for row in study.modes.values():
        # A mode that cannot run is refused in words of this library.
        assert isinstance(row, ModeCost) or not re.match(r"\w+Error: ", row), row
