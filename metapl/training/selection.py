"""Which student is kept: the average of its weights, and the best one by validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from metapl.errors import MetaplError
from metapl.execution.batch import is_whole, labeled_pair, length, rows
from metapl.execution.checks import dense, described
from metapl.execution.layout import reshard
from metapl.execution.rng import RandomState, replayed
from metapl.execution.shards import as_sharded, laid_out_like, local, whole
from metapl.metrics import evaluate_logits, predict_logits
from metapl.metrics.classification import Evaluation, check_labels
from metapl.metrics.predictions import batch_name, batches_of, iterated, logits_of
from metapl.training.contract import Say


class Average:
    r"""The average that follows a network's weights, \theta̅ \leftarrow d_t \theta̅ + (1 - d_t) \theta.

    .. math:: d_t = \min\big(\mathrm{decay}, \tfrac{1 + t}{10 + t}\big), \quad t = 0, 1, \dots

    so early in training the average is over the last few steps only. Buffers (running statistics) are copied.
    ``torch.optim.swa_utils.AveragedModel`` would do the same, but counts on the device, so that each step would wait
    for it, and copies the module, which a sharded one does not allow.

    Args:
        network: whose weights take turns with their average.
        decay: in [0, 1).

    Cost: a copy of the weights, of sharded ones of this process's parts; one fused pass over them an update.

    >>> network = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(network.weight)
    >>> average = Average(network, decay=0.995)
    >>> _ = nn.init.ones_(network.weight)
    >>> average.update()
    >>> with average.held() as averaged:
    ...     print(round(averaged.weight.item(), 6))  # d_0 = 1/10
    0.9
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in network.parameters()):
            raise MetaplError(
                "the average of 16-bit weights does not move: its steps are below their resolution; expected "
                "ema_decay=None, or 32-bit weights with precision='bfloat16'."
            )
        self.network, self.decay, self.steps = network, decay, 0
        self._kept = [t.clone() for t in self._parts()]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        learned, parts = len([*self.network.parameters()]), self._parts()
        torch._foreach_lerp_(self._kept[:learned], parts[:learned], 1 - decay)
        _write(self._kept[learned:], parts[learned:])
        self.steps += 1

    @contextmanager
    def held(self) -> Iterator[nn.Module]:
        """The network with the averaged weights in this block, and bit for bit its own afterwards."""
        own = [t.clone() for t in self._parts()]
        try:
            _write(self._parts(), self._kept)
            yield self.network
        finally:
            _write(self._parts(), own)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights, as the network's state has its own, and how many steps they have followed."""
        return {"module": {name: as_sharded(kept, t) for name, t, kept in self._of_state()}, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, whole or laid out as the network is."""
        given = {name: local(laid_out_like(state["module"][name], t)) for name, t, _ in self._of_state()}
        for name, _, kept in self._of_state():
            if kept.shape != given[name].shape:
                raise ValueError(f"the average of {name} has the shape {tuple(given[name].shape)}")
            kept.copy_(given[name])
        self.steps = state["steps"]

    def _tensors(self) -> list[Any]:
        reshard(self.network)  # else a sharded network holds other tensors
        return [*self.network.parameters(), *self.network.buffers()]

    def _parts(self) -> list[Tensor]:
        """This process's parts of the weights, sharing their memory."""
        return [local(t).detach() for t in self._tensors()]

    def _of_state(self) -> Iterator[tuple[str, Any, Tensor]]:
        """The tensors of the network's state by name, each with this process's part of its average."""
        kept = dict(zip(map(id, self._tensors()), self._kept, strict=True))
        state = self.network.state_dict(keep_vars=True)
        return ((name, t, kept[id(t)]) for name, t in state.items() if id(t) in kept)


@torch.no_grad()
def _write(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for t, value in zip(into, values, strict=True):
        t.copy_(value)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's weights and buffers on the host; of a sharded one every process has all of them."""
    return {name: whole(t).detach().cpu().clone() for name, t in model.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------- validation

Kept = Callable[[], AbstractContextManager[nn.Module]]
"""A network in a block."""


@dataclass
class Best:
    """The best student so far, by validation accuracy; the latest of equals."""

    accuracy: float | None = None
    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)


class Selection:
    """Looks at the networks on validation data, and remembers the best student.

    Args:
        validation: (inputs, labels) or an iterable of such batches; None: nothing is looked at.
        truth: (inputs, labels) of unlabeled examples, for the teacher.
        device: where the networks are.
        select: whether the best student is remembered.
        say: takes what a user should know of the validation data.
    """

    def __init__(
        self, validation: Any, truth: Any, device: torch.device, select: bool = True, say: Say | None = None
    ) -> None:
        self.validation, self.truth, self.device, self.select = validation, truth, device, select
        self.say: Say = say or (lambda text: None)
        self.best = Best()
        self.lost = self.examples = 0  # that could not be read; on which the last accuracy was measured

    def check(self, student: nn.Module, labeler: nn.Module | None = None) -> None:
        """Refuse validation data, and truth, that could not be used later; it costs a pass on two examples of each.

        Of data in batches the first batch is looked at, and nothing of what can be read only once.
        """
        for name, data, network in (("validation", self.validation, student), ("truth", self.truth, labeler)):
            if data is None or network is None or isinstance(data, Iterator):
                continue
            with replayed(RandomState.now(self.device)):
                first = data if is_whole(data) else next(iterated(data, name), None)
                if first is None:
                    raise MetaplError(f"{name} has no batches; expected at least one example, or None.")
                inputs, labels = labeled_pair(first, batch_name(data, name))[:2]
                dense((inputs, labels), f"{name} holds")
                count = length(inputs)
                if isinstance(data, Dataset) and isinstance(labels, int | Tensor) and not getattr(labels, "ndim", 0):
                    raise MetaplError(
                        f"{name} is a data set of single examples; expected batches: DataLoader({name}, 256)."
                    )
                if not isinstance(labels, Tensor) or labels.ndim != 1 or len(labels) != count or count == 0:
                    raise MetaplError(
                        f"{name} has the labels {described(labels)} for {count:,} examples; expected one class index "
                        "for each, and at least one example."
                    )
                check_labels(labels, logits_of(network, [rows(inputs, 0, 2)]).shape[-1], f" of {name}")

    def look(
        self, student: Kept | None, teacher: Kept | None, labeler: nn.Module | None, step: int
    ) -> dict[str, float]:
        """The accuracies after ``step`` steps; None for a network that there is not, or that has not begun.

        Args:
            student, teacher: the networks that are kept, such as the averages, each in a block of its own: averages of
                sharded networks take the place of these.
            labeler: the network that makes the pseudo-labels.
            step: number of steps done.
        """
        if self.validation is None:
            return {}
        accuracies = {}
        if student is not None:
            with student() as network:
                found = self._evaluated(network, self.validation, "validation")
                accuracy, self.examples = found.accuracy, found.n
                if self.select and accuracy >= (self.best.accuracy or 0.0):
                    self.best = Best(accuracy, step, weights_of(network))
            accuracies["student_validation_accuracy"] = accuracy
        if teacher is not None:
            with teacher() as network:
                found = self._evaluated(network, self.validation, "validation")
                accuracies["teacher_validation_accuracy"] = found.accuracy
        if labeler is not None and self.truth is not None:
            found = self._evaluated(labeler, self.truth, "truth")
            off = torch.tensor(found.confusion).sum(0) - torch.tensor(found.confusion).sum(1)
            accuracies["pseudo_label_accuracy"] = found.accuracy
            accuracies["class_shares_vs_truth"] = float(off.abs().sum()) / (2 * found.n)
        return accuracies

    def _evaluated(self, model: nn.Module, data: Any, name: str) -> Evaluation:
        from metapl.data.steps import StepBatches  # needed for fitting only

        # A DataLoader draws from the default generator; looking at the validation data must not change the training.
        with replayed(RandomState.now(self.device)):
            logits, labels = predict_logits(model, self._batches(data, name))
        expected = (data.examples if isinstance(data, StepBatches) else None) or len(labels)
        lost, before = expected - len(labels), self.lost
        self.lost = max(lost, before)
        if 0 < lost == expected:
            raise MetaplError(
                f"none of the {expected:,} validation pictures can be read any more; were they moved or removed while "
                "the run was under way? Put them back, then go on with the run."
            )
        if lost > before:
            self.say(
                f"note: {lost:,} of the {expected:,} validation pictures cannot be read any more; accuracies are of "
                "the others, and are not to be compared with those before"
            )
        return evaluate_logits(logits, labels)

    def _batches(self, data: Any, name: str) -> Iterator[tuple[Any, Tensor]]:
        empty = True
        for batch in batches_of(data, self.device, name=name):
            empty = False
            yield batch
        if empty and isinstance(data, Iterator):  # an earlier look has used it up
            raise MetaplError(
                f"{name} is {described(data)}, which can be read only once, and was read before; expected a pair "
                "(inputs, labels), a list of batches or a DataLoader."
            )
