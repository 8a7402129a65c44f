"""A look at what calls of a problem's ``signal`` leave in the problem, where each is made twice.

It is looked at in the first two steps with networks of the same weights: a mean teacher that begins
as a copy of the teacher does not move in the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from metapl.data.held_values import names_written, numbers_of
from metapl.errors import MetaplError, few
from metapl.execution.compare import same_to_rounding
from metapl.problems.base import BilevelProblem, kind_of


class KeptBySignal:
    """What calls of a problem's ``signal`` leave in the problem, where each is made twice.

    What a second call leaves otherwise than the first, such as a running mean or a counter, has
    moved twice in one step. A note of the last signal has not.

    Args:
        problem: whose tensors and numbers are looked at.
        teacher: whose buffers are rewound between the calls, and are left out.
    """

    def __init__(self, problem: BilevelProblem, teacher: nn.Module) -> None:
        self.problem = problem
        self.teacher = teacher
        self.left_by_first_calls: dict[int, dict[str, Tensor]] = {}

    @contextmanager
    def first_call(self, number: int) -> Iterator[None]:
        """Note what the call in this block leaves."""
        yield
        self.left_by_first_calls[number] = numbers_of(self.problem, self.teacher)

    @contextmanager
    def second_call(self, number: int) -> Iterator[None]:
        """Refuse what the call in this block changes otherwise than the first of the same batch.

        Args:
            number: of that first call.
        """
        before = numbers_of(self.problem, self.teacher)
        yield
        after = numbers_of(self.problem, self.teacher)
        left_first = self.left_by_first_calls[number]
        moved = []
        for name in names_written(before, after):
            is_as_first = name in left_first and same_to_rounding(after[name], left_first[name])
            if not is_as_first:
                moved.append(name)
        if moved:
            raise MetaplError(
                f"{kind_of(self.problem)} keeps state between calls of signal ({few(moved, 3)}), "
                "which is called twice here (recompute_teacher, accumulate, batches read again); "
                "expected it in a buffer of the teacher (register_buffer), which is rewound."
            )
