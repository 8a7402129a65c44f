"""What the problems of training on noisy labels share: a student of classes, judged on trusted labels."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import holds_tensors
from metapl.execution.numerics import wide
from metapl.problems.base import Params, Problem, Signal
from metapl.runs.memory import out_of_memory


class Classification(Problem):
    """A student that returns class logits, and an outer batch (x, y) with trusted labels."""

    inner_batch: ClassVar[tuple[str, ...]] = ("inputs", "labels")
    """The parts of an inner batch, by name."""

    asks: ClassVar[tuple[str, ...]] = ("indices",)
    """The parts that the teacher is given."""

    maps: ClassVar[str] = ""
    """What the teacher takes and returns, for errors."""

    shape: ClassVar[str] = "B"
    """The shape of what it returns: B for the examples, C for the classes."""

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
        return F.cross_entropy(outputs, self.safe_labels(outputs, batch))

    def check(self, outputs: Tensor, labeled: Any, unlabeled: Any) -> None:
        """Refuse labels, of either batch, that are not classes of the student's outputs."""
        checks.class_outputs(outputs, "student")
        checks.class_labels(labeled[1], outputs.shape[1])
        parts = self.parts_of(unlabeled)
        if "labels" in parts:
            checks.class_labels(parts["labels"], outputs.shape[1])

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: torch.Generator | None
    ) -> Signal:
        """What the teacher makes of :attr:`asks`, as :meth:`made`; refuse one that takes, or returns, other things."""
        given = self.asked(teacher, batch, student_outputs)
        try:
            answer = teacher(*given)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, MetaplError) or out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0] or type(error).__name__
            taken = " and ".join(map(checks.described, given)) or "a call without arguments"
            raise MetaplError(
                f"the teacher {type(teacher).__name__} cannot take {taken}: {reason}. Expected a module that maps "
                f"{self.maps}."
            ) from error
        sizes = dict(zip("BC", student_outputs.shape, strict=True))
        shape, device = tuple(sizes[letter] for letter in self.shape), student_outputs.device
        tensor = isinstance(answer, Tensor)
        if not tensor or answer.shape != shape or not answer.is_floating_point() or answer.device != device:
            returned = checks.described(answer) if tensor else type(answer).__name__
            raise MetaplError(
                f"the teacher returned {returned}; expected numbers of floating point, of shape {shape}, on {device}: "
                f"a module that maps {self.maps}."
            )
        return self.made(answer)

    def asked(self, teacher: nn.Module, batch: Any, student_outputs: Tensor) -> tuple[Any, ...]:
        """What the teacher is given."""
        parts = self.parts_of(batch)
        return tuple(parts[name] for name in self.asks)

    def made(self, answer: Tensor) -> Signal:
        """The signal, of what the teacher returned."""
        return Signal(wide(answer))

    def parts_of(self, batch: Any) -> dict[str, Any]:
        """The parts of an inner batch by name; refuse a batch with more or fewer."""
        if not isinstance(batch, tuple | list) or len(batch) != len(self.inner_batch):
            raise MetaplError(
                f"the inner batch of {type(self).__name__} is {checks.described(batch)}; expected "
                f"({', '.join(self.inner_batch)}) as unlabeled=."
            )
        return dict(zip(self.inner_batch, batch, strict=True))

    @staticmethod
    def safe_labels(outputs: Tensor, batch: Any) -> Tensor:
        """The labels of a batch; on a device, within the range of classes."""
        return checks.safe_labels(batch[1], outputs.shape[1])


class Weighted(Classification):
    """Problems whose signal is a weight a_i for each example, (B,)."""

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Params | None = None) -> Tensor:
        """a_i CE_i, (B,)."""
        return signal.value * F.cross_entropy(outputs, self.safe_labels(outputs, batch), reduction="none")


class Relabeled(Classification):
    """Problems whose signal is a distribution q_i over the classes for each example, (B, C), by the teacher."""

    shape: ClassVar[str] = "BC"

    def made(self, answer: Tensor) -> Signal:
        """q = softmax(t), (B, C)."""
        return Signal(wide(answer).softmax(-1), outputs=answer)

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Params | None = None) -> Tensor:
        """CE against q, (B,)."""
        return F.cross_entropy(outputs, signal.value, reduction="none")
