"""One network on its own losses: supervised learning, UDA, finetuning."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from metapl.core.teacher import NOT_FINITE, mean_scalars
from metapl.errors import MetaplError, warn
from metapl.execution import checks
from metapl.execution.batch import Batch, Inputs, labeled_pair, micro_batches, plain
from metapl.execution.layout import layout_of
from metapl.execution.ranks import rows_shared
from metapl.execution.state import Slots, one_at_a_time, restored
from metapl.feedback.report import Report
from metapl.problems.base import Signal
from metapl.problems.losses import (
    CrossEntropy,
    TeacherLoss,
    check_losses,
    reads_inner_at,
    sum_of_terms,
)
from metapl.problems.means import refuse_other_than_means, shares_of_losses
from metapl.runs.fields import AboveZero, MicroBatches, check_arguments, options_by_name
from metapl.training.base import Trainer, assigned_once
from metapl.updates import as_one_optimizer, load_copy_of_state, parameters_of, refuse_unfit

if TYPE_CHECKING:
    from metapl.metrics.metric import Term

# What decides a step beside the losses.
SETTINGS = ("clip_norm", "precision", "accumulate")


class LossArguments(TypedDict):
    """The arguments of a :class:`metapl.problems.losses.TeacherLoss` besides the network."""

    outer: Batch
    inner: Batch
    signal: Signal
    step: int


@assigned_once("student", "optimizer", "clip_norm", "precision", "accumulate")
class LossTrainer(Trainer):
    """Train one network on a sum of losses.

    The loop, the checkpoints and the selection are the bilevel trainer's, and the losses those of
    the teacher's objective: ``(CrossEntropy(),)`` is supervised learning and, at a small learning
    rate, finetuning; ``(CrossEntropy(), UDA())`` is UDA.

    Args:
        model: the network; in several processes in ``DistributedDataParallel`` or sharded, as for
            :class:`~metapl.BilevelTrainer`.
        losses: the terms, each a mean over the rows of its batch, or over what its ``mean_over``
            says; default ``(CrossEntropy(),)``.
        optimizer: any ``torch.optim`` optimizer over the model's parameters, or a tuple of several.
        clip_norm, precision, accumulate: as for :class:`~metapl.BilevelTrainer`.
        compile: run the network through ``torch.compile``, with the same dropout masks; it stays a
            plain module.

    Attributes:
        total: the name of the sum of the losses, in reports.
        prefix: what begins the name of each of them there.

    Raises: :class:`metapl.MetaplError` before anything moves.
    """

    total = "loss"
    prefix = "loss"

    @options_by_name
    def __init__(
        self,
        model: nn.Module,
        losses: Sequence[TeacherLoss] = (CrossEntropy(),),
        *,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        clip_norm: AboveZero | None = None,
        precision: Literal["float32", "bfloat16"] = "float32",
        accumulate: MicroBatches = 1,
        compile: bool = False,
    ) -> None:
        check_arguments(LossTrainer.__init__, locals())
        self.as_given = model
        self.layout = layout_of("network", model)
        self.layouts = [self.layout]
        self.ranks = self.layout.ranks
        self.student = self.layout.network
        self.losses: Sequence[TeacherLoss] = check_losses(losses, "losses")
        self.optimizer = as_one_optimizer(optimizer, "optimizer")
        if isinstance(self.optimizer, torch.optim.Optimizer):
            refuse_unfit(self.optimizer, "optimizer")
        if not self.losses:
            raise MetaplError("losses is empty; expected at least one, such as CrossEntropy().")
        self.classifies = any(getattr(loss, "of_classes", False) for loss in self.losses)
        self.device = next(self.student.parameters()).device
        self.clip_norm = clip_norm
        self.precision = precision
        self.accumulate = accumulate
        self.network: Any = self.student
        if compile:
            with warnings.catch_warnings():
                # Inductor warns while it is imported.
                warnings.simplefilter("ignore", DeprecationWarning)
                # Inductor's own kernels would draw other dropout masks than PyTorch's.
                options: dict[str, Any] = {"fallback_random": True}
                self.network = torch.compile(self.student, dynamic=False, options=options)
        self.is_made = True

    @property
    def optimizers(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer}

    @property
    def owners(self) -> dict[str, object]:
        return {f"losses[{number}]": loss for number, loss in enumerate(self.losses)}

    @property
    def reads_inner(self) -> bool:
        return any(reads_inner_at(loss, self.steps_done) for loss in self.losses)

    def _choices(self) -> str:
        return f"losses {' + '.join(type(loss).__name__ for loss in self.losses)}"

    @one_at_a_time
    def step(self, outer: Batch, inner: Batch = None) -> Report:
        """Take a step on an outer batch and, for losses that read one, an inner batch.

        Args:
            outer, inner: as in :meth:`metapl.BilevelTrainer.step`.

        Returns: a report with ``loss`` and a ``loss_<name>`` per term.
        """
        outer = labeled_pair(outer)
        inner = plain(inner)
        self.layout.begin_step()
        if self.steps_done == 0:
            self.tell_evaluation(warn)
            if not self._optimizer_holds_any_weight():
                raise MetaplError("the optimizer holds no trainable weight of the network.")
        with restored(
            Slots(self.student), trained=parameters_of(self.optimizer), device=self.device
        ) as fault:
            outer_parts = micro_batches(outer, self.accumulate, "outer")
            inner_parts = micro_batches(inner, self.accumulate, "inner")
            if self.accumulate > 1 and self.steps_done == 0:
                with rows_shared(self.ranks):
                    refuse_other_than_means(
                        self.student,
                        self.losses,
                        outer_parts,
                        inner_parts,
                        signals=[self._no_signal()] * self.accumulate,
                        step=self.steps_done,
                        ranks=self.ranks,
                    )
            shares = shares_of_losses(
                self.losses, outer_parts, inner_parts, self.ranks, self.device
            )
            scalars: list[dict[str, Tensor]] = []
            with self._autocast(), rows_shared(self.ranks):
                for outer_part, inner_part, shares_of_part in zip(
                    outer_parts, inner_parts, shares, strict=True
                ):
                    terms = sum_of_terms(
                        self.network,
                        self.losses,
                        kind=self.total.replace("_", " "),
                        shares=shares_of_part,
                        **self._arguments_of_losses(outer_part, inner_part),
                    )
                    loss = torch.stack(list(terms.values())).sum()
                    checks.learns(loss, "network")
                    # UDA alone is a plain 0 before its start.
                    if loss.requires_grad:
                        # The micro-batches' shares add up in ``.grad``.
                        (loss / self.accumulate).backward()
                    scalars_of_part = {self.total: loss.detach()}
                    for name, term in terms.items():
                        scalars_of_part[f"{self.prefix}_{name}"] = term.detach()
                    scalars.append(scalars_of_part)
            means = mean_scalars(scalars)
            means = self.ranks.mean_tree(means, means)
            checks.refuse_not_finite(NOT_FINITE, means[self.total])
            self.layout.mean_gradients(self.clip_norm)
            self.optimizer.step()
            self.layout.agree_on_buffers()
            self.steps_done += 1
            return Report(self.steps_done - 1, means, fault)

    def _optimizer_holds_any_weight(self) -> bool:
        ids_in_optimizer = {id(p) for p in parameters_of(self.optimizer)}
        return any(id(p) in ids_in_optimizer for p in self.layout.parameters().values())

    def read_outer(self, batch: Batch, name: str) -> tuple[Inputs, Batch]:
        batch = labeled_pair(batch, name)
        return batch[0], batch

    def outer_terms(self) -> list[Term]:
        def term(loss: Any, network: Any, inputs: Inputs, batch: Batch) -> Any:
            return loss(network, **self._arguments_of_losses(batch, None))

        return [partial(term, loss) for loss in self.losses]

    def _arguments_of_losses(self, outer: Batch, inner: Batch) -> LossArguments:
        """Return the arguments of a loss besides the network, whose outputs it computes itself."""
        return {
            "outer": outer,
            "inner": inner,
            "signal": self._no_signal(),
            "step": self.steps_done,
        }

    def _no_signal(self) -> Signal:
        return Signal(torch.empty(0, device=self.device))

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("losses", *SETTINGS)}

    def live_state(self) -> dict[str, Any]:
        return {**super().live_state(), "optimizer": self.optimizer.state_dict()}

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        load_copy_of_state(self.optimizer, state["optimizer"], "optimizer")
