"""A rater's weights in the loss of ``transformers.Trainer``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metapl.core.replays import sketch
from metapl.data.feed import feed
from metapl.errors import MetaplError, few, needed_for, warn
from metapl.execution.batch import plain
from metapl.execution.checks import unexpected
from metapl.feedback import Mode
from metapl.models import Logits
from metapl.problems.sequences import DataRater
from metapl.runs import checkpoint
from metapl.runs.fields import AtLeastOne, check_arguments
from metapl.training.hypergradient import hypergradient

# The rater's file in a checkpoint of the Trainer. It holds no code.
FILE = "metapl_rater.safetensors"


def weighted(
    trainer: Any,
    rater: nn.Module,
    *,
    outer: Any,
    every: AtLeastOne = 1,
    problem: DataRater | None = None,
    rater_optimizer: torch.optim.Optimizer | None = None,
    mode: Mode = "forward",
    verify: bool | Literal["warn"] = True,
) -> RatedLoss:
    r"""Let a ``transformers.Trainer`` weight each batch by a rater, which learns beside the model.

    .. math:: \theta' = U\Big(\theta, \nabla_\theta \frac1B \sum_i a_i(\phi)\, \ell_i(\theta)\Big),
              \qquad a = B\, \mathrm{softmax}(T(x; \phi)), \qquad
              \phi \leftarrow U_\phi\Big(\phi, \frac{d L(\theta')}{d\phi}\Big)

    The model's training loss becomes that of the problem, the mean over the sequences of a_i times
    the mean loss of the sequence's tokens; the loss of evaluations stays the model's own. In the
    first step, and after it in every ``every``-th, the rater takes a step of its own before the
    model does: φ moves by the gradient of the outer loss after the model's coming step, at the
    model's weights, the state and rates of the Trainer's optimizer, and its clipping. The model's
    step is by the weights from before. So one step is that of ``metapl.BilevelTrainer``, to
    rounding, with the Trainer's schedules, logs and checkpoints around it.

    Args:
        trainer: a ``transformers.Trainer`` of a causal language model, in one process on one
            device, whose batches are dicts with ``input_ids``, and perhaps ``attention_mask`` and
            ``labels``. It is changed: its loss, and a callback for its checkpoints.
        rater: maps what the model takes, a dict without the labels, to scores (B,) or (B, 1), such
            as ``metapl.models.Logits`` of a model for sequence classification with one label. It is
            moved to the Trainer's device.
        outer: clean batches as the Trainer's own: a ``DataLoader``, or a list of batches. The rater
            draws one for each of its steps, again and again.
        every: model steps from one step of the rater to the next, 1 or more.
        problem: how scores become weights, and both losses: a
            :class:`metapl.problems.DataRater`, or a subclass of yours.
        rater_optimizer: default the problem's own, Adam at 1e-3.
        mode: how the gradient is found; see :mod:`metapl.feedback`.
        verify: compare the rater's first gradient with its definition; see
            :func:`metapl.hypergradient`.

    Returns: a :class:`RatedLoss`, with what was last measured.

    Cost: a pass of the rater in each step; in the rater's, :func:`metapl.hypergradient` besides, of
    which nothing is shared with the model's step. Bias: that of the mode, none in ``forward``. With
    dropout the rater sees other masks than the model's step has; the model's own draws are the same
    with and without the rater's steps.

    Checkpoints of the Trainer hold the rater, its optimizer and the position in ``outer``, and
    ``trainer.train(resume_from_checkpoint=...)`` goes on with them. What a callback changes in
    gradients before the step, the rater does not see; one that may is warned of.

    Raises: :class:`metapl.MetaplError`, at once, for gradient accumulation, a loss or a training
    step of the Trainer's own (``compute_loss``, ``compute_loss_func``, label smoothing,
    ``training_step``), float16, several processes, and an optimizer of other tensors than the
    rater's; at the first step, before anything moves, for an optimizer without a derivative here or
    a wrapped model, and for a checkpoint's rater that learned beside another model.

    Source: Calian et al., "DataRater: meta-learned dataset curation" (2025).
    """
    check_arguments(weighted, {"every": every})
    if reason := unsupported(trainer):
        raise MetaplError(f"weighted: the Trainer has {reason}.")
    if not isinstance(rater, nn.Module):
        raise unexpected("weighted: rater is", rater, "a module")
    problem = problem or DataRater()
    if rater_optimizer is None:
        rater_optimizer = problem.default_outer_optimizer(rater)
    rater_parameters = {id(p) for p in rater.parameters()}
    for group in rater_optimizer.param_groups:
        if not all(id(p) in rater_parameters for p in group["params"]):
            raise MetaplError("weighted: rater_optimizer holds more than rater.parameters().")
    rated = RatedLoss(
        trainer,
        rater,
        outer=outer,
        every=every,
        problem=problem,
        rater_optimizer=rater_optimizer,
        mode=mode,
        verify=verify,
    )
    with needed_for("metapl.integrations.transformers"):
        from transformers import TrainerCallback
    warn_of_callbacks(trainer)
    # Nothing is refused from here on. A parameter stays the same object where it is moved.
    rater.to(trainer.args.device)
    # The methods of Checkpoints, and of TrainerCallback for all other events.
    callback_kind = type("RaterCheckpoints", (Checkpoints, TrainerCallback), {})
    trainer.add_callback(callback_kind(rated))
    trainer.compute_loss = rated.compute_loss
    # The loss is a mean over the batch, and not over the batches of a longer step.
    trainer.loss_is_scaled_for_ga = False
    return rated


def unsupported(trainer: Any) -> str | None:
    """Return what of a Trainer the weighted loss cannot do, and what is expected, or None."""
    with needed_for("metapl.integrations.transformers"):
        from transformers import Trainer
    if not isinstance(trainer, Trainer):
        return f"the type {type(trainer).__name__}; expected a transformers.Trainer"
    if isinstance(getattr(trainer.compute_loss, "__self__", None), RatedLoss):
        return "a rater already; expected one that weighted() has not changed"
    arguments = trainer.args
    if arguments.gradient_accumulation_steps != 1:
        return (
            f"gradient_accumulation_steps={arguments.gradient_accumulation_steps}, of which the "
            "rater would see one part; expected 1"
        )
    kind = type(trainer)
    if kind.compute_loss is not Trainer.compute_loss:
        return (
            f"the type {kind.__name__} with a compute_loss of its own, which the rater's loss "
            "would replace; expected Trainer's, and the loss as inner_loss of a subclass of "
            "DataRater in problem="
        )
    if kind.training_step is not Trainer.training_step:
        return (
            f"the type {kind.__name__} with a training_step of its own, whose gradients the rater "
            "would not see; expected Trainer's"
        )
    if trainer.compute_loss_func is not None:
        return "a compute_loss_func, which the rater's loss would replace; expected None"
    if arguments.label_smoothing_factor:
        return (
            f"label_smoothing_factor={arguments.label_smoothing_factor}, which the rater's loss "
            "does not have; expected 0"
        )
    if arguments.fp16:
        return "fp16=True, whose scaled step has no derivative here; expected float32 or bf16"
    if arguments.world_size > 1 or arguments.n_gpu > 1:
        devices = max(arguments.world_size, arguments.n_gpu)
        return f"{devices} processes or devices; expected one"
    return None


def warn_of_callbacks(trainer: Any) -> None:
    """Warn of callbacks that may change gradients between the backward pass and the step."""
    with needed_for("metapl.integrations.transformers"):
        from transformers import TrainerCallback
    usual = TrainerCallback.on_pre_optimizer_step
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    names = [kind.__name__ for kind in kinds if kind.on_pre_optimizer_step is not usual]
    if names:
        warn(
            f"weighted: the Trainer has {few(names)} with on_pre_optimizer_step; the rater's step "
            "does not see what it changes in gradients.",
        )


class RatedLoss:
    """The loss of a Trainer whose batches a rater weights; :func:`weighted` makes it.

    Attributes:
        weights: a of the last training batch, (B,), detached; None before the first one.
        outer_loss: L(θ′) of the rater's last step, a scalar; None before the first one.
        updates: steps that the rater has taken.
        steps: steps of the Trainer, the one under way included.
    """

    def __init__(
        self,
        trainer: Any,
        rater: nn.Module,
        *,
        outer: Any,
        every: int,
        problem: DataRater,
        rater_optimizer: torch.optim.Optimizer,
        mode: Mode,
        verify: bool | Literal["warn"],
    ) -> None:
        self.trainer = trainer
        self.rater = rater
        self.every = every
        self.problem = problem
        self.rater_optimizer = rater_optimizer
        self.mode = mode
        self.verify = verify
        self.outer = feed(outer, name="outer", stop=1, device=trainer.args.device)
        self.student = Logits(trainer.model)
        self._usual_loss = trainer.compute_loss
        self.weights: Tensor | None = None
        self.outer_loss: Tensor | None = None
        self.updates = 0
        self.steps = 0
        # Of the model beside which the rater was saved, or read; None: neither.
        self.model_sketch: Tensor | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the weighted loss of a training batch, or the Trainer's own of an evaluation.

        This stands in the place of ``Trainer.compute_loss``, whose arguments it takes.
        """
        if not model.training:
            return self._usual_loss(
                model,
                inputs,
                return_outputs=return_outputs,
                num_items_in_batch=num_items_in_batch,
            )
        if model is not self.trainer.model:
            wrapper = f"the Trainer wraps the model in {type(model).__name__}"
            raise MetaplError(f"weighted: {wrapper}; expected one process, without torch_compile.")
        batch = plain(inputs)
        with torch.no_grad():
            signal = self.problem.signal(self.rater, batch, None, generator=None)
        self.weights = signal.value
        step = self.trainer.state.global_step
        if step % self.every == 0:
            self.update_rater(batch)
        self.steps = step + 1
        logits = self.student(self.problem.student_input(batch))
        loss = self.problem.inner_loss(logits, signal, batch, None).mean()
        return (loss, {"logits": logits}) if return_outputs else loss

    def update_rater(self, batch: Any) -> None:
        """Move the rater by one step of its optimizer, and nothing else.

        Args:
            batch: the batch of the model's coming step.
        """
        device = self.trainer.args.device
        cuda_devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda_devices):
            result = hypergradient(
                self.rater,
                self.student,
                outer=self.outer.next(),
                inner=batch,
                problem=self.problem,
                inner_optimizer=unwrapped(self.trainer.optimizer),
                clip_norm=self.trainer.args.max_grad_norm or None,
                mode=self.mode,
                verify=self.verify,
            )
        parameters = dict(self.rater.named_parameters())
        if not all(gradient.isfinite().all() for gradient in result.grads.values()):
            step = f"step {self.trainer.state.global_step + 1:,}"
            found = f"the rater's gradient in {step} is not finite"
            loss = result.outer_loss.item()
            raise MetaplError(f"weighted: {found} (outer loss {loss:g}); expected a lower rate.")
        for name, gradient in result.grads.items():
            parameters[name].grad = gradient
        self.rater_optimizer.step()
        self.rater_optimizer.zero_grad()
        self.outer_loss = result.outer_loss
        self.updates += 1

    def sketch_of_model(self) -> Tensor:
        """Return a digest of the weights of the Trainer's model."""
        model = self.trainer.model
        return sketch(model.parameters(), next(model.parameters()).device).cpu()

    def state_dict(self) -> dict[str, Any]:
        """Return the rater, its optimizer, the position in the outer batches, and the counts.

        The digest is that of the model beside it.
        """
        self.model_sketch = self.sketch_of_model()
        return {
            "model": self.model_sketch,
            "rater": self.rater.state_dict(),
            "rater_optimizer": self.rater_optimizer.state_dict(),
            "outer": self.outer.state(),
            "updates": self.updates,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was asked for."""
        self.rater.load_state_dict(state["rater"])
        self.rater_optimizer.load_state_dict(state["rater_optimizer"])
        self.outer.restore(state["outer"])
        self.updates = state["updates"]
        self.steps = state["steps"]
        # A checkpoint of before has none.
        self.model_sketch = state.get("model")

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Go on with the rater of a checkpoint of the Trainer, such as output/checkpoint-500.

        ``trainer.train(resume_from_checkpoint=...)`` does so by itself where the checkpoint lies in
        the Trainer's output_dir.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise MetaplError(f"{path} is missing; expected a checkpoint of a weighted Trainer.")
        self.load_state_dict(checkpoint.load(path))


class Checkpoints:
    """Keeps a rater in the checkpoints of its Trainer: two events of a ``TrainerCallback``."""

    def __init__(self, rated: RatedLoss) -> None:
        self.rated = rated

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the rater into the checkpoint that the Trainer has written."""
        checkpoint.save(folder_of(args, state) / FILE, self.rated.state_dict())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read the rater of the checkpoint that the Trainer goes on from.

        It lies in output_dir; of another folder :meth:`RatedLoss.load` was called before.
        """
        rated = self.rated
        if state.global_step == 0:
            return
        if rated.steps != state.global_step:
            rated.load(folder_of(args, state))
        expected = rated.model_sketch
        # On another device sums are rounded otherwise.
        if expected is not None and not torch.allclose(
            rated.sketch_of_model(), expected, rtol=1e-9
        ):
            raise MetaplError(
                f"the rater of {folder_of(args, state)} learned beside another model than the one "
                "that the Trainer goes on with; expected rated.load(FOLDER) before train(), of the "
                "checkpoint that it goes on from."
            )


def folder_of(args: Any, state: Any) -> Path:
    """Return the folder of the Trainer's checkpoint of the step that it is at."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer of torch.optim inside the wrapper of accelerate."""
    inside = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inside, torch.optim.Optimizer):
        raise unexpected("weighted: the Trainer's optimizer is", optimizer, "one of torch.optim")
    return inside
