"""Wrong batches and networks, refused before anything moves.

On the CPU a look at the values costs nothing and errors are raised on the spot. On an accelerator it would make the
host wait, so there the finding stays on the device: a :class:`Fault` collects it, and it is raised when the report is
read. By then the step has been taken, so batches are best looked at while they are on the host, as ``fit`` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError


class Fault:
    """What was found wrong with values that are still on the device."""

    def __init__(self) -> None:
        self.found: list[tuple[Tensor, str]] = []

    def raise_if_found(self, where: str = "") -> None:
        """Wait for the device and raise the first finding, with ``where`` before its text."""
        for bad, text in self.found:
            if bool(bad):
                raise MetaplError(
                    f"{where}{text} (found on the device, when the step had been taken: the weights may be spoiled, so "
                    "go on from the last good checkpoint)"
                )


_fault: ContextVar[Fault | None] = ContextVar("fault", default=None)


@contextmanager
def deferred_to(fault: Fault) -> Iterator[None]:
    """Collect in ``fault`` what cannot be looked at without waiting for a device."""
    token = _fault.set(fault)
    try:
        yield
    finally:
        _fault.reset(token)


def waits(t: Tensor) -> bool:
    """Whether looking at a value would make the host wait for its device."""
    return t.device.type != "cpu"


def refuse(bad: Tensor, text: str) -> None:
    """Raise ``text`` where the boolean scalar ``bad`` holds, now or when the next report is read."""
    fault = _fault.get()
    if fault is not None and waits(bad):
        fault.found.append((bad, text))
    elif bool(bad):
        raise MetaplError(text)


def described(thing: Any) -> str:
    """A value in words: type, and shape and dtype of a tensor."""
    if isinstance(thing, Tensor):
        return f"a tensor of shape {tuple(thing.shape)}, {str(thing.dtype).removeprefix('torch.')}, on {thing.device}"
    if isinstance(thing, dict):
        return f"a dict of {len(thing)} ({', '.join(map(repr, thing))})"
    if isinstance(thing, tuple | list):
        return f"a {type(thing).__name__} of {len(thing)} ({', '.join(type(t).__name__ for t in thing)})"
    return f"of type {type(thing).__name__}"


def batches(labeled: Any, unlabeled: Sequence[Any], device: torch.device) -> None:
    """Refuse batches that are empty, of uneven length, elsewhere, or not finite.

    Args:
        labeled: the outer batch.
        unlabeled: the inner ones.
        device: of the networks.
    """
    for name, batch in (("labeled", labeled), *(("unlabeled", one) for one in unlabeled)):
        tensors = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor)]
        if not tensors:
            raise MetaplError(f"{name} is {described(batch)}; expected tensors.")
        for t in tensors:
            _tensor(name, t, device)
        lengths = {len(t) for t in tensors}
        if len(lengths) > 1:
            raise MetaplError(
                f"the tensors of the {name} batch have lengths {', '.join(str(len(t)) for t in tensors)}; "
                "expected one row per example in each."
            )


def finite_on_host(batch: Any) -> None:
    """Refuse a batch on the host with NaN or infinite values; what lies on a device already is not looked at."""
    for t in pytree.tree_leaves(batch):
        if isinstance(t, Tensor) and t.is_floating_point() and not waits(t) and not bool(torch.isfinite(t).all()):
            raise MetaplError("a batch holds NaN or infinite values; clean the inputs first.")


def no_inference_mode() -> None:
    """Refuse to learn where PyTorch records nothing that could be learned from."""
    if torch.is_inference_mode_enabled():
        raise MetaplError(
            "a step was asked for inside torch.inference_mode(), where no gradient can be taken; leave that block "
            "first (torch.no_grad() does no harm)."
        )


def _tensor(name: str, t: Tensor, device: torch.device) -> None:
    if t.ndim == 0 or len(t) == 0:
        raise MetaplError(f"the {name} batch is empty: {described(t)}; expected at least one example.")
    if t.device != device:
        raise MetaplError(
            f"the {name} batch is on {t.device}, the networks are on {device}; move it there with .to({str(device)!r})."
        )
    if t.is_inference():
        raise MetaplError(
            f"the {name} batch was made inside torch.inference_mode(), and no gradient can be taken through such a "
            "tensor; make it under torch.no_grad(), or copy it outside of that block: x.clone()."
        )
    if t.is_floating_point():
        refuse(~torch.isfinite(t).all(), f"the {name} batch holds NaN or infinite values; clean the inputs first.")


def logits(outputs: Any, who: str) -> Tensor:
    """The outputs of a network, refused where they are no tensor."""
    if isinstance(outputs, Tensor):
        return outputs
    raise MetaplError(
        f"the {who} returned {described(outputs)}; expected a tensor of logits. For a network that returns an object "
        f"or a dict with logits, give metapl.models.Logits({who}); for another one, such as a tuple, a module whose "
        "forward returns the logits alone."
    )


def class_outputs(outputs: Tensor, who: str) -> None:
    """Refuse outputs that are not (B, C) with at least two classes."""
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise MetaplError(
            f"the {who}'s outputs are {described(outputs)}; expected logits of shape (batch, classes), two classes or "
            "more. For other outputs, write a problem of your own (metapl.BilevelProblem)."
        )


def finite(logits_NC: Tensor) -> None:
    """Refuse logits of a network that has diverged."""
    bad_N = ~logits_NC.isfinite().all(dim=1)
    if bad_N.any():
        raise MetaplError(
            f"the logits of {int(bad_N.sum())} of {len(bad_N)} examples are not finite (first: example "
            f"{int(bad_N.nonzero()[0])}); the model diverged: go back to an earlier checkpoint or take smaller steps"
        )


def class_labels(labels: Any, classes: int) -> None:
    """Refuse labels that are not integers of [0, classes)."""
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
    ):
        raise MetaplError(
            f"the labels are {described(labels)}; expected integers, one class index per example: labels.long()."
        )
    if labels.ndim != 1:
        raise MetaplError(
            f"the labels have shape {tuple(labels.shape)}; expected one class index per example, (batch,)."
        )
    if labels.dtype != torch.int64:
        raise MetaplError(f"the labels are {described(labels)}; expected int64: labels.long().")
    low, high = labels.amin(), labels.amax()
    text = f"the labels hold a value outside 0..{classes - 1}"
    if not waits(labels):
        text = f"the labels run from {int(low)} to {int(high)}"
    refuse((low < 0) | (high >= classes), f"{text}; the networks have {classes} classes: expected 0..{classes - 1}.")


def within(labels: Tensor, classes: int) -> Tensor:
    """Labels that no kernel chokes on: where a finding is deferred, a wrong label must not kill the device first."""
    return labels.clamp(0, classes - 1) if waits(labels) else labels


def drawable(law: Tensor) -> Tensor:
    """Probabilities that can be drawn from: as :func:`within`, for NaN."""
    return law.nan_to_num(nan=1.0) if waits(law) else law


def same_classes(teacher_outputs: Tensor, student_outputs: Tensor) -> None:
    """Refuse a teacher whose outputs do not match the student's, or are not finite."""
    class_outputs(teacher_outputs, "teacher")
    if teacher_outputs.shape != student_outputs.shape:
        raise MetaplError(
            f"the teacher's outputs have shape {tuple(teacher_outputs.shape)}, the student's "
            f"{tuple(student_outputs.shape)}; expected the same batch and the same number of classes."
        )
    refuse(
        ~torch.isfinite(teacher_outputs.detach()).all(),
        "the teacher's outputs are NaN or infinite; its weights have probably diverged: lower its learning rate.",
    )


def sparse_gradients(optimizer: torch.optim.Optimizer, network: nn.Module) -> None:
    """Refuse sparse gradients where the optimizer would fail on them, with half of the step taken."""
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SparseAdam) or (
            isinstance(optimizer, torch.optim.SGD | torch.optim.Adagrad) and not group["weight_decay"]
        ):
            continue
        sparse = {id(p) for p in group["params"] if p.grad is not None and p.grad.is_sparse}
        if sparse:
            name = next((name for name, p in network.named_parameters() if id(p) in sparse), "a parameter")
            raise MetaplError(
                f"the gradient of {name} is sparse, which {type(optimizer).__name__} with these options cannot "
                "use; build the embedding with sparse=False, or take torch.optim.SparseAdam, or SGD without weight "
                "decay."
            )


def dense_gradients(grads: Mapping[str, Tensor | None]) -> None:
    """Refuse a student with sparse gradients."""
    sparse = [name for name, g in grads.items() if g is not None and g.layout != torch.strided]
    if sparse:
        raise MetaplError(
            f"the gradient of the student's {sparse[0]} is sparse, and the student's update is differentiated with "
            "dense ones; build the embedding with sparse=False."
        )


def scalar_loss(loss: Any, name: str) -> None:
    """Refuse a loss that is not one number."""
    if not isinstance(loss, Tensor) or loss.ndim:
        raise MetaplError(f"{name} is {described(loss)}; expected a tensor without dimensions: take the mean.")


def finite_student(outputs: Tensor) -> None:
    """Refuse a student whose outputs would make the feedback, and so the teacher, NaN."""
    refuse(
        ~torch.isfinite(outputs.detach()).all(),
        "the student's outputs are NaN or infinite; its weights have probably diverged: lower its learning rate.",
    )


def finite_feedback(h: Tensor) -> None:
    """Refuse feedback that would make the teacher NaN."""
    refuse(
        ~torch.isfinite(h).all(),
        "the feedback is NaN or infinite: the student diverged within its step, or a loss of the problem has no "
        "finite derivative; lower the student's learning rate, or look for examples with extreme values.",
    )


_WRAPPERS = {
    "DistributedDataParallel": "averages gradients over processes, and metapl does not yet average those that the "
    "feedback is made of",
    "FullyShardedDataParallel": "shards the weights, which metapl does not support yet",
    "FSDPModule": "shards the weights, which metapl does not support yet",
    "DataParallel": "copies the network on every call, so that it cannot be run at other weights",
    "ScriptModule": "holds weights that cannot be replaced for a pass",
}
"""Classes of torch around or inside a network, and why the feedback cannot be had through them."""


def _wrapper(module: nn.Module) -> str | None:
    names = [kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("torch.")]
    return next((name for name in _WRAPPERS if name in names), None)


def plain(name: str, network: nn.Module) -> None:
    """Refuse a network that cannot be run again at other weights, by the name of what is in the way."""
    for path, part in network.named_modules():
        wrapper = _wrapper(part)
        if wrapper is not None:
            where = f"has a {wrapper} at {path!r}" if path else f"is a {wrapper}"
            raise MetaplError(
                f"the {name} {where}, which {_WRAPPERS[wrapper]}; expected the plain module, in one process."
            )
    for path, t in [*network.named_parameters(), *network.named_buffers()]:
        if nn.parameter.is_lazy(t):
            raise MetaplError(
                f"the {name}'s {path} has no shape yet (a lazy module, such as LazyLinear); run the {name} on one "
                "batch before the trainer is built."
            )
        if t.is_inference():
            raise MetaplError(
                f"the {name}'s {path} was made inside torch.inference_mode(), and cannot be trained; build the {name} "
                "outside of that block."
            )
        if type(t).__name__ == "DTensor" or type(t.data).__name__ == "DTensor":
            raise MetaplError(
                f"the {name}'s {path} is a DTensor, spread over several devices, which metapl does not support yet; "
                "expected the plain module, in one process."
            )


def networks(teacher: nn.Module, student: nn.Module) -> torch.device:
    """Refuse networks that cannot be run, have nothing to learn, share weights or live on several devices; return the
    device."""
    owned = {}
    for name, module in (("teacher", teacher), ("student", student)):
        if not isinstance(module, nn.Module):
            raise MetaplError(f"{name} is {described(module)}; expected a torch.nn.Module.")
        plain(name, module)
        owned[name] = [p for p in module.parameters() if p.requires_grad]
        if not owned[name]:
            raise MetaplError(f"the {name} has no parameter with requires_grad=True; it could not learn.")
    if {id(p) for p in owned["teacher"]} & {id(p) for p in owned["student"]}:
        raise MetaplError("teacher and student share weights; expected two networks: build the student separately.")
    devices = {
        name: {p.device for p in module.parameters()} for name, module in (("teacher", teacher), ("student", student))
    }
    if len(devices["teacher"] | devices["student"]) > 1:
        where = "; ".join(f"{name} on {', '.join(sorted(map(str, found)))}" for name, found in devices.items())
        raise MetaplError(f"the networks are on several devices: {where}. Move both to one with .to(device).")
    return owned["student"][0].device


def learns(loss: Tensor, who: str) -> None:
    """Refuse a loss that no gradient comes from; a plain 0, such as UDA's before its start, is none to learn from."""
    if not loss.requires_grad and bool(loss != 0):
        raise without_gradient(who)


def without_gradient(who: str) -> MetaplError:
    """The error of a network that cannot learn from its loss."""
    return MetaplError(
        f"the {who}'s loss has no gradient, so nothing would be learned. Likely causes: its outputs are detached "
        "(.detach(), .data, numpy), the parameters that they depend on have requires_grad=False, or this runs under "
        "torch.no_grad() or torch.inference_mode()."
    )


def moves(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse an optimizer that would move none of a network's parameters."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    learned = [p for p in model.parameters() if p.requires_grad]
    if not any(id(p) in held for p in learned):
        why = (
            "the optimizer holds none of the network's parameters that have requires_grad=True"
            if learned
            else "all parameters of the network have requires_grad=False"
        )
        raise MetaplError(
            f"{why}, so nothing would be learned; expected an optimizer over model.parameters(), some of them with "
            "requires_grad=True."
        )
