"""The inner batches of several student steps, and the outer batches of losses after each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import plain
from metapl.runs.fields import Range, check_fields
from metapl.updates import Schedule, options_by_step


@dataclass(frozen=True)
class Lookahead(Sequence[Any]):
    """K inner batches, one for each student step of a look-ahead; given in place of ``unlabeled``.

    A signal that reads the student's outputs, such as that of
    :class:`metapl.problems.MetaWeightNet`, reads them as constants: the derivative through them,
    from one step to the signals of later ones, is left out.

    Args:
        batches: each of them as for ``unlabeled``: a sequence, or a function of the step's number,
            0 to ``steps`` - 1. Of a function's batches, those of steps that are computed again are
            not held: it is called again for them, and one that returns another batch then is
            refused.
        steps: K; None: as many as the sequence has.
        schedule: of the inner optimizer's learning rate: a ``torch.optim.lr_scheduler`` of it,
            which takes a step after each of the student's, or the factor of the first rate as a
            function of the step's number, as in ``LambdaLR``; of several optimizers also a tuple,
            one for each. Or a dict of settings by name, in each step and param group: ``{"lr": (K,
            groups), "weight_decay": (K, groups)}``, as ``wrt=`` gives the gradient in them; where a
            group has a rate for each entry of its weight, ``{"lr": [(K, ...), ...]}``, by group.
            With :func:`metapl.hypergradient`, where optimizer and schedule stay as they are.
        weights: of outer batches, ``hypergradient(outer=Lookahead([...], weights=...))``: K
            numbers, by which the outer losses after the steps are added; None: 1 each.

    >>> import torch
    >>> len(Lookahead([torch.zeros(4, 3), torch.zeros(4, 3)]))
    2
    >>> Lookahead(lambda k: torch.full((4, 3), float(k)), steps=1000)[999].mean()
    tensor(999.)
    """

    batches: Sequence[Any] | Callable[[int], Any]
    steps: Annotated[int, Range(1, of="a number of student steps")] | None = None
    schedule: Schedule | None = None
    weights: Sequence[float] | Tensor | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        given: Any = self.batches
        held = isinstance(given, Sequence) and not isinstance(given, str | bytes)
        if (
            (len(given) < (self.steps or 1))
            if held
            else (self.steps is None or not callable(given))
        ):
            given = (
                f"Lookahead was given batches that are {checks.described(given)} and "
                f"steps={self.steps}"
            )
            raise MetaplError(
                f"{given}; expected a batch for each step, or a function of its number with steps=."
            )
        if self.weights is not None:
            try:
                weights = torch.as_tensor(self.weights, dtype=torch.float64)
            except (TypeError, ValueError, RuntimeError) as error:
                given = f"Lookahead was given weights that are {checks.described(self.weights)}"
                raise MetaplError(
                    f"{given}; expected {len(self)} numbers, one for each outer batch."
                ) from error
            if weights.shape != (len(self),) or not weights.isfinite().all():
                given = f"Lookahead was given weights of shape {tuple(weights.shape)}"
                raise MetaplError(
                    f"{given}; expected {len(self)} finite numbers, one for each outer batch."
                )

    def __len__(self) -> int:
        return self.steps or len(self.batches)  # type: ignore[arg-type]  # of a function, steps is given

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return plain(self.batches(number) if callable(self.batches) else self.batches[number])

    def options(self, optimizer: Any) -> list[list[dict[str, Any]]]:
        """The options of the inner optimizer in each step, where a schedule makes them differ."""
        if self.schedule is None:
            return []
        if not isinstance(optimizer, Optimizer):
            raise MetaplError(
                "Lookahead(schedule=) is for torch.optim; expected torchopt.schedule in the "
                "transform."
            )
        return options_by_step(optimizer, self.schedule, len(self))


def outer_batches(outer: Lookahead, inner: Lookahead) -> tuple[list[Any], list[float]]:
    """Return the outer batches of the steps, and their weights.

    Refuse what does not go with the steps.
    """
    if outer.schedule is not None:
        raise MetaplError(
            "outer=Lookahead(schedule=) was given; the schedule is of the inner optimizer: "
            "expected weights=."
        )
    if len(outer) != len(inner):
        given = f"outer is a Lookahead of {len(outer)}, and the student takes {len(inner)}"
        raise MetaplError(
            f"{given} step{'s' * (len(inner) > 1)}; expected an outer batch for each step, or one "
            "batch."
        )
    weights = (
        [1.0] * len(outer)
        if outer.weights is None
        else torch.as_tensor(outer.weights, dtype=torch.float64).tolist()
    )
    return list(outer), weights


def refuse_outer_lookahead(outer: Any) -> None:
    """Refuse outer batches of several steps, which the function ``hypergradient`` alone takes."""
    if not isinstance(outer, Tensor) and isinstance(outer, Lookahead):
        raise MetaplError(
            "outer= was given a Lookahead, and a trainer's step has one outer loss; expected one "
            "batch, or metapl.hypergradient(outer=metapl.Lookahead([...]))."
        )


def inner_batches(unlabeled: Any, asked: int = 1) -> list[Any]:
    """The batches of a look-ahead.

    Any other batch is one of one step, refused where more were ``asked`` for.
    """
    if not isinstance(unlabeled, Lookahead):
        if asked > 1:
            raise MetaplError(
                f"the trainer has lookahead={asked}; expected a metapl.Lookahead of {asked} "
                "batches."
            )
        return [plain(unlabeled)]
    if unlabeled.schedule is not None:
        raise MetaplError(
            "Lookahead(schedule=) is for metapl.hypergradient; a trainer's optimizer has its own "
            "rate."
        )
    return list(unlabeled)
