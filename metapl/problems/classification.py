"""What the problems of training on noisy labels share: a student of classes, judged on trusted labels."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import holds_tensors
from metapl.problems.base import Problem
from metapl.runs.memory import out_of_memory


class Classification(Problem):
    """A student that returns class logits, and an outer batch (x, y) with trusted labels."""

    inner_batch: ClassVar[tuple[str, ...]] = ("inputs", "labels")
    """The parts of an inner batch, by name."""

    def student_input(self, batch: Any) -> Any:
        """The inputs in an inner batch; refuse a batch of other parts before the student is given any."""
        inputs = self.parts_of(batch)["inputs"]
        if not holds_tensors(inputs):
            raise MetaplError(
                f"the inputs of the inner batch of {type(self).__name__} are {checks.described(inputs)}; expected a "
                "tensor, or a dict or tuple of tensors."
            )
        return inputs

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Mean cross-entropy on the trusted labels."""
        checks.class_outputs(outputs, "student")
        return F.cross_entropy(outputs, checks.safe_labels(batch[1], outputs.shape[1]))

    def check(self, outputs: Tensor, labeled: Any, unlabeled: Any) -> None:
        """Refuse labels, of either batch, that are not classes of the student's outputs."""
        checks.class_outputs(outputs, "student")
        checks.class_labels(labeled[1], outputs.shape[1])
        parts = self.parts_of(unlabeled)
        if "labels" in parts:
            checks.class_labels(parts["labels"], outputs.shape[1])

    def parts_of(self, batch: Any) -> dict[str, Any]:
        """The parts of an inner batch by name; refuse a batch with more or fewer."""
        if not isinstance(batch, tuple | list) or len(batch) != len(self.inner_batch):
            raise MetaplError(
                f"the inner batch of {type(self).__name__} is {checks.described(batch)}; expected "
                f"({', '.join(self.inner_batch)}) as unlabeled=."
            )
        return dict(zip(self.inner_batch, batch, strict=True))


def ask_teacher(teacher: nn.Module, expected: str, *given: Any) -> Any:
    """What a teacher returns; refuse one that cannot take what it is given.

    Args:
        teacher: is asked.
        expected: what it takes and returns, for the error.
        given: what it takes.
    """
    try:
        return teacher(*given)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, MetaplError) or out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        taken = " and ".join(map(checks.described, given)) or "a call without arguments"
        raise MetaplError(
            f"the teacher {type(teacher).__name__} cannot take {taken}: {reason}. Expected a module that "
            f"maps {expected}."
        ) from error


def check_rows(values: Tensor, outputs: Tensor, meaning: str, *shape: int) -> Tensor:
    """What the teacher returned, refused if it does not have one row for each example.

    Args:
        values: the teacher's outputs.
        outputs: the student's outputs, (B, C).
        meaning: the name of the teacher's outputs in the error.
        shape: of each row.
    """
    return check_numbers(values, outputs, meaning, (len(outputs), *shape))


def check_numbers(values: Any, outputs: Tensor, meaning: str, shape: tuple[int, ...]) -> Tensor:
    """What the teacher returned, refused if it is not a floating-point tensor of a shape, on the student's device."""
    if not isinstance(values, Tensor) or values.shape != shape:
        given = checks.described(values) if isinstance(values, Tensor | tuple | list | dict) else type(values).__name__
        raise MetaplError(f"the teacher returned {given}; expected {meaning} of shape {shape}.")
    if not values.is_floating_point() or values.device != outputs.device:
        raise MetaplError(
            f"the teacher returned {checks.described(values)}; expected {meaning} of floating point, on "
            f"{outputs.device}."
        )
    return values


def example_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each example, (B,)."""
    return F.cross_entropy(outputs, checks.safe_labels(labels, outputs.shape[1]), reduction="none")
