"""The batches of a step, of which the inner ones may be those of several student steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor
from torch.optim import Optimizer

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import Batch, plain
from metapl.runs.fields import Range, check_fields
from metapl.updates import Settings, options_by_step


@dataclass(frozen=True)
class Lookahead(Sequence[Any]):
    """K inner batches, one for each student step of a look-ahead; given as ``inner``.

    A signal that reads the student's outputs, such as that of
    :class:`metapl.problems.MetaWeightNet`, reads them as constants: the derivative through them,
    from one step to the signals of later ones, is left out.

    Args:
        batches: each of them as for ``inner``: a sequence, or a function of the step's number,
            0 to ``steps`` - 1. Of a function's batches, those of steps that are computed again are
            not held: it is called again for them, and one that returns another batch then is
            refused. Of several tasks (:func:`metapl.hypergradient`) with their first dimension.
        steps: K; None: as many as the sequence has.
        settings: of the inner optimizer in each step and param group, by name: ``{"lr": (K,
            groups), "weight_decay": (K, groups)}``, as ``wrt=`` gives the gradient in them. Those
            of a ``torch.optim.lr_scheduler`` are :func:`metapl.scheduled_settings`. With
            :func:`metapl.hypergradient`, where the optimizer stays as it is.

    >>> import torch
    >>> len(Lookahead([torch.zeros(4, 3), torch.zeros(4, 3)]))
    2
    >>> Lookahead(lambda k: torch.full((4, 3), float(k)), steps=1000)[999].mean()
    tensor(999.)
    """

    batches: Sequence[Any] | Callable[[int], Any]
    steps: Annotated[int, Range(1, of="a number of student steps")] | None = None
    settings: Settings | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not self._has_batch_for_each_step():
            of_steps = "" if self.steps is None else f" of {self.steps} steps"
            expected = "a batch for each step ([*loader]), or a function of its number with steps="
            raise checks.unexpected(f"batches of a Lookahead{of_steps} are", self.batches, expected)

    def _has_batch_for_each_step(self) -> bool:
        """Return whether the batches are a long enough sequence, or a function with steps."""
        if isinstance(self.batches, Sequence) and not isinstance(self.batches, str | bytes):
            return len(self.batches) >= (self.steps or 1)
        return callable(self.batches) and self.steps is not None

    def __len__(self) -> int:
        if self.steps is not None:
            return self.steps
        # Without a number of steps the batches are a sequence.
        return len(self.batches)  # type: ignore[arg-type]

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        batch = self.batches(number) if callable(self.batches) else self.batches[number]
        return plain(batch)

    def options(self, optimizer: Any) -> list[list[dict[str, Any]]]:
        """Return the options of the inner optimizer in each step, by param group.

        Empty without settings: they are the same in all steps.
        """
        if self.settings is None:
            return []
        if not isinstance(optimizer, Optimizer):
            raise MetaplError("settings was given with a TorchOpt transform; expected torch.optim.")
        return options_by_step(optimizer, self.settings, len(self))


def require_batches(outer: Batch, inner: Batch) -> None:
    """Refuse a step without one of its batches, and one with several outer batches."""
    if outer is None or inner is None:
        raise MetaplError("a batch is missing; expected outer= and inner=.")
    if type(outer) is Lookahead:
        raise MetaplError("outer= was given a Lookahead, of inner batches; expected one batch.")


@dataclass(frozen=True)
class InnerBatches(Sequence[Any]):
    """The inner batches of a step, one for each student step, read from what the caller has given.

    Args:
        batches: a list of those in memory, or a :class:`Lookahead` whose function returns a batch
            whenever it is asked for it.
        is_lookahead: whether they were given as a :class:`Lookahead`, which may have one batch;
            what is returned for each student step is then a tuple.
        are_read_again: whether a batch that is needed once more is read once more, since none is
            kept.
    """

    batches: list[Any] | Lookahead
    is_lookahead: bool
    are_read_again: bool = False

    @staticmethod
    def of_one_step(inner: Batch) -> InnerBatches:
        """Return the one batch of one student step."""
        return InnerBatches([plain(inner)], is_lookahead=False)

    @staticmethod
    def of_trainer(inner: Batch, lookahead: int = 1) -> InnerBatches:
        """Return the batches of a trainer's step, all of them in memory.

        Args:
            inner: a batch, or a :class:`Lookahead` of any length.
            lookahead: the trainer's; above 1 a single batch is refused.
        """
        # A class that derives from Sequence answers isinstance slowly; most batches are tensors.
        if isinstance(inner, Tensor) or not isinstance(inner, Lookahead):
            if lookahead > 1:
                expected = f"a metapl.Lookahead of {lookahead} batches"
                raise MetaplError(f"the trainer has lookahead={lookahead}; expected {expected}.")
            return InnerBatches.of_one_step(inner)
        if inner.settings is not None:
            raise MetaplError("settings was given to a trainer; expected metapl.hypergradient.")
        return InnerBatches(list(inner), is_lookahead=True)

    @staticmethod
    def of_hypergradient(inner: Batch) -> InnerBatches:
        """Return the batches of a hypergradient; those of a function are read as they are taken."""
        if isinstance(inner, Tensor) or not isinstance(inner, Lookahead):
            return InnerBatches.of_one_step(inner)
        if callable(inner.batches):
            return InnerBatches(inner, is_lookahead=True, are_read_again=True)
        return InnerBatches(list(inner), is_lookahead=True)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: Any) -> Any:
        return self.batches[number]

    def in_memory(self) -> list[Any]:
        """Return the batches that are in memory; a function returns new ones in each call."""
        return self.batches if isinstance(self.batches, list) else []

    def as_argument(self) -> Any:
        """Return what a step takes for these batches: a :class:`Lookahead`, or the one batch."""
        if isinstance(self.batches, Lookahead):
            return self.batches
        return Lookahead(self.batches) if self.is_lookahead else self.batches[0]
