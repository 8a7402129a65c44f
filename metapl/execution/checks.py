"""Wrong batches and networks, refused before anything moves.

On the CPU, values are checked at once. On an accelerator that would make the host wait, so the result of a check stays
on the device in a :class:`Fault`, and the error is raised when the report is read. The step has been taken by then, so
batches are better checked while they are on the host, as ``fit`` does.
"""

from __future__ import annotations

import inspect
import math
import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import CALLED, MetaplError, called, few


@dataclass
class Fault:
    """Results of checks that are still on the device, with the texts of their errors."""

    findings: list[tuple[Tensor, str]] = field(default_factory=list)

    def raise_if_found(self, where: str = "") -> None:
        """Wait for the device and raise the first error, with ``where`` before its text."""
        for bad, text in self.findings:
            if bool(bad):
                raise MetaplError(
                    f"{where}{text} (detected on the device after the step was taken: the weights may be spoiled, so "
                    "continue from the last good checkpoint)"
                )


def transformed() -> bool:
    """Whether this runs inside a transform of ``torch.func``, or is being compiled: no value can be read then."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


# What collects the checks that would have to wait for a device; None: the host waits.
deferred: ContextVar[Fault | None] = ContextVar("deferred", default=None)


def waits(t: Tensor) -> bool:
    """Whether reading a value would make the host wait for its device."""
    return t.device.type != "cpu"


def refuse(bad: Tensor, text: str) -> None:
    """Raise ``text`` where the boolean scalar ``bad`` holds, now or when the next report is read."""
    if transformed():
        return
    fault = deferred.get()
    if fault is not None and waits(bad):
        fault.findings.append((bad, text))
    elif bool(bad):
        raise MetaplError(text)


def refuse_not_finite(t: Tensor, text: str) -> None:
    """Raise ``text`` if a tensor has NaN or infinite values, now or when the next report is read."""
    if transformed():
        return
    t = t.detach() if t.requires_grad else t
    # On the host a sum is several times cheaper than isfinite; finite values may overflow in it, but seldom do.
    if waits(t) or not math.isfinite(t.sum()):
        refuse(~_finite(t), text)


def _finite(t: Tensor) -> Tensor:
    if t.layout != torch.strided:
        t = t._values() if t.layout == torch.sparse_coo else t.values()
    return torch.isfinite(t).all()


def whole_number(value: Any, given: str, expected: str) -> None:
    """Refuse what is not a whole number of 1 or more; ``given`` is how it was given, such as ``accumulate=0``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MetaplError(f"{given}: expected {expected}, 1 or more.")


def is_generator(value: Any) -> None:
    if not isinstance(value, torch.Generator | None):
        raise MetaplError(f"generator is {described(value)}; expected torch.Generator().manual_seed(0), or None.")


def described(value: Any) -> str:
    """A value in words: its type, and the shape, dtype and device of a tensor."""
    if isinstance(value, Tensor):
        if value.is_nested and value.layout == torch.strided:
            return "a nested tensor"  # without a shape
        kind = "tensor" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} tensor"
        return f"a {kind} of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}, on {value.device}"
    if isinstance(value, dict):
        return f"a dict of {len(value)} ({few(map(repr, value), 20)})"
    if isinstance(value, tuple | list):
        kinds = [type(t).__name__ for t in value]
        alike = len(kinds) > 3 and len({*kinds}) == 1
        return f"a {type(value).__name__} of {len(value)} ({f'all {kinds[0]}' if alike else few(kinds, 20)})"
    return f"of type {type(value).__name__}"


def batches(given: Iterable[tuple[str, Any]], device: torch.device, of_step: str = "") -> None:
    """Refuse batches, by name, that are empty, of uneven length, on another device than the networks, or not finite;
    ``of_step`` says of which step."""
    for own, batch in given:
        name = CALLED.get().get(own, own)
        the = f"the {name} batch{of_step}"
        lengths = []
        for t in leaves_of(batch):
            if isinstance(t, np.ndarray):
                raise MetaplError(f"{the} holds an array of NumPy; expected tensors: torch.as_tensor(x).")
            if not isinstance(t, Tensor):
                continue
            if t.is_nested or t.ndim == 0 or len(t) == 0 or t.device != device or t.is_inference() or t.requires_grad:
                for is_wrong, text in _WRONG:
                    if is_wrong(t, device):
                        raise MetaplError(f"{the} {text.format(t=described(t), at=t.device, device=device)}")
            if t.is_floating_point():
                refuse_not_finite(t, f"{the} holds NaN or infinite values; clean the inputs first.")
            lengths.append(len(t))
        if not lengths:
            raise MetaplError(
                f"{name}{of_step} is {described(batch)}; expected tensors, in any nesting of dicts and tuples."
            )
        if min(lengths) != max(lengths):
            of = ", ".join(map(str, lengths))
            raise MetaplError(f"the tensors of {the} have lengths {of}; expected one row per example.")


# What may be wrong with a tensor of a batch, its values aside.
_WRONG: tuple[tuple[Callable[[Tensor, torch.device], bool], str], ...] = (
    (
        lambda t, _: t.is_nested and t.layout == torch.strided,
        "holds a nested tensor, whose rows differ in length; expected rows of one length: x.to_padded_tensor(0.0).",
    ),
    (lambda t, _: t.ndim == 0 or len(t) == 0, "is empty: {t}; expected at least one example."),
    (
        lambda t, device: t.device != device,
        "is on {at}, the networks are on {device}; move it there with .to('{device}').",
    ),
    (
        lambda t, _: t.is_inference(),
        "was made inside torch.inference_mode(), where no gradient can be taken; copy it outside of that: x.clone().",
    ),
    (
        lambda t, _: t.requires_grad,
        "requires a gradient ({t}), and none is taken in it; expected x.detach(). Inputs that the teacher makes for "
        "the student are made in the problem: student_input(batch, signal).",
    ),
)


def leaves_of(tree: Any) -> Iterable[Any]:
    """The leaves of a tree as pytree finds them, several times as fast for the usual batches."""
    if isinstance(tree, Tensor):
        return (tree,)
    if type(tree) in (tuple, list, dict):
        return [leaf for part in (tree.values() if type(tree) is dict else tree) for leaf in leaves_of(part)]
    return pytree.tree_leaves(tree)


def dense(batch: Any, which: str) -> None:
    """Refuse sparse tensors, where rows are taken or values compared; ``which`` begins the sentence."""
    for t in leaves_of(batch):
        if isinstance(t, Tensor) and t.layout not in (torch.strided, torch.jagged):
            raise MetaplError(f"{which} {described(t)}; expected dense tensors: x.to_dense().")


def finite_on_host(batch: Any) -> None:
    """Refuse a batch on the host with NaN or infinite values; tensors on an accelerator are not checked."""
    for t in leaves_of(batch):
        if isinstance(t, Tensor) and t.is_floating_point() and not waits(t) and not _finite(t):
            raise MetaplError("a batch holds NaN or infinite values; clean the inputs first.")


def types(inputs: Any) -> set[torch.dtype]:
    return {t.dtype for t in leaves_of(inputs) if isinstance(t, Tensor)}


_OTHER_TYPE = re.compile("dtype|scalar type|input type|not implemented for", re.IGNORECASE)
_OTHER_WIDTH = re.compile(r"shapes cannot be multiplied|to have \d+ channels|size mismatch", re.IGNORECASE)
# What a network raises on wrong inputs: of another type, and one argument in place of several.
WRONG_INPUTS = (RuntimeError, TypeError, AttributeError, LookupError, ValueError)


def explain(
    error: Exception,
    networks: Mapping[str, nn.Module | None],
    batches: Sequence[tuple[str, Any]],
    *,
    widths: bool = False,
) -> None:
    """Say so where a network, by its role, may have failed because the inputs of ``batches``, by their names, are of
    another type than its weights, or in a dict or tuple: networks of Hugging Face take them as several arguments; with
    ``widths``, of another width than its layers take."""
    calls = [f.f_locals for f, _ in traceback.walk_tb(error.__traceback__) if f.f_code.co_name == "_call_impl"]
    for role, network in networks.items():
        if network is None:
            continue
        weight = next((p.dtype for p in network.parameters() if p.is_floating_point()), None)
        index = "argument #1 'indices'" in str(error)  # of an embedding
        of_type = calls and isinstance(error, RuntimeError) and _OTHER_TYPE.search(str(error))  # calls: not in a loss
        for name, inputs in batches if of_type else ():
            found = types(inputs) - ({torch.int64, torch.int32} if index else set())
            if weight is not None and found and (index or weight not in found):
                given, own = (
                    " and ".join(sorted(str(t).removeprefix("torch.") for t in ts))
                    for ts in (found, {torch.int64 if index else weight})
                )
                what = "its embedding takes" if index else "its weights are"
                raise MetaplError(
                    f"the {role} cannot take {name}inputs of {given}: {what} {own}; expected inputs of that "
                    f"type: x.to(torch.{own})."
                ) from error
        args: tuple[Any, ...] = next((call["args"] for call in calls if call.get("self") is network), ())
        if widths and args and isinstance(error, RuntimeError) and _OTHER_WIDTH.search(str(error)):
            raise MetaplError(
                f"the {role} cannot take inputs that are {described(args[0])} ({str(error).splitlines()[0]}); expected "
                "inputs of the shape that its layers take, in every batch."
            ) from error
        if isinstance(error, RuntimeError) or len(args) != 1 or not isinstance(args[0], Mapping | tuple | list):
            continue
        try:
            listed, named = ((), args[0]) if isinstance(args[0], Mapping) else (args[0], {})
            inspect.signature(network.forward).bind(*listed, **named)
            spread = bool(args[0])
        except TypeError:
            spread = False
        if spread:
            wrap = f"it takes them one by one, so wrap it: {role} = metapl.models.Logits({role})"
            mend = HEAD.format(role) if getattr(network, "base_model", None) is network else wrap
        elif role == "student" and type(args[0]).__name__ in str(error):
            mend = (
                "to pick those that it takes, give the problem a method student_input(batch), and outer_input(batch) "
                "for the labeled batch"
            )
        else:
            continue
        raise MetaplError(
            f"the {role}, a {type(network).__name__}, was given a batch's inputs as one argument, {described(args[0])} "
            f"({type(error).__name__}: {error}); {mend}."
        ) from error


def no_inference_mode() -> None:
    if torch.is_inference_mode_enabled():
        raise MetaplError(
            "a step was called inside torch.inference_mode(), where no gradient can be taken; call it outside of that "
            "block (torch.no_grad() does no harm)."
        )


def logits(outputs: Any, who: str) -> Tensor:
    """The outputs of a network, refused if they are not a plain tensor of real numbers."""
    if type(outputs) is Tensor and not outputs.is_complex():
        return outputs
    if not isinstance(outputs, Tensor):
        has_logits = isinstance(logits_in(outputs), Tensor)
        mend = f"wrap it: {who} = metapl.models.Logits({who})" if has_logits else mend_of(outputs, who)
        raise MetaplError(f"the {who} returned {described(outputs)}; expected a tensor of logits; {mend}.")
    if outputs.is_complex():
        raise MetaplError(
            f"the {who} returned {described(outputs)}; expected real outputs, such as torch.view_as_real(outputs) or "
            "outputs.abs()."
        )
    if hasattr(outputs, "device_mesh"):
        raise MetaplError(
            f"the {who} returned a DTensor laid out as {getattr(outputs, 'placements', '')}; expected a plain tensor "
            "with the logits of this process's rows: give the last layer output_layouts=Replicate() and "
            "use_local_output=True, or call .full_tensor() at the end of forward."
        )
    return outputs


# Models of Hugging Face end in hidden states where they have no head.
HEAD = (
    "it has no head that makes logits of hidden states, so take its class that has one, such as "
    "AutoModelForSequenceClassification, and wrap that: {0} = metapl.models.Logits({0})"
)


def mend_of(outputs: Any, who: str) -> str:
    """What to do about outputs without logits."""
    return HEAD.format(who) if hasattr(outputs, "last_hidden_state") else "write a module that returns one tensor"


def logits_in(outputs: Any) -> Any:
    """The logits of an object, such as those of Hugging Face, or of a dict; None where it has none."""
    return outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)


def class_outputs(outputs: Tensor, who: str) -> None:
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise MetaplError(
            f"the {who}'s outputs are {described(outputs)}; expected logits of shape (batch, classes), two classes or "
            f"more. For other outputs, write {called('a problem of your own (metapl.BilevelProblem)')}."
        )


def finite(logits_NC: Tensor) -> None:
    bad_N = ~logits_NC.isfinite().all(dim=1)
    if bad_N.any():
        raise MetaplError(
            f"the logits of {int(bad_N.sum())} of {len(bad_N)} examples are not finite (first: example "
            f"{int(bad_N.nonzero()[0])}); the model diverged: go back to an earlier checkpoint or take smaller steps"
        )


def class_labels(labels: Any, classes: int, what: str = "the labels", why: str = "") -> None:
    """Refuse labels that are not integers in [0, classes); ``what`` and ``why`` are the error's words."""
    if not isinstance(labels, Tensor) or labels.layout != torch.strided:
        dense(labels, "the labels are")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 1:
        raise MetaplError(
            f"{what} are {described(labels)}; expected integers (int64), one class index per example, (batch,): "
            "labels.long(), labels.argmax(1) of one-hot rows, labels.squeeze(1) of (batch, 1)."
        )
    _in_range(labels, classes, what, ("hold", "run"), why or f"the networks have {classes} classes")


def safe_labels(labels: Tensor, classes: int) -> Tensor:
    """Labels within the range of classes: on a device, a wrong label would abort the process before it is reported."""
    return labels.clamp(0, classes - 1) if waits(labels) else labels


def row_indices(index: Any, rows: int, who: str) -> Tensor:
    """Indices of rows, int64 or int32 (PyTorch takes uint8 for a mask), refused outside 0..rows - 1 (Python counts -1
    from the end); within the range on a device, for the reason that :func:`safe_labels` gives."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        raise MetaplError(f"the index of {who} is {described(index)}; expected integers, int64 or int32: index.long().")
    if not index.numel():
        return index
    _in_range(index, rows, "the index", ("holds", "runs"), f"{who} has {rows:,} rows")
    return safe_labels(index, rows)


def _in_range(numbers: Tensor, count: int, what: str, verbs: tuple[str, str], why: str) -> None:
    if transformed():
        return
    low, high = numbers.aminmax()
    if waits(numbers):
        text = f"{what} {verbs[0]} a value outside 0..{count - 1}; {why}: expected 0..{count - 1}."
        refuse((low < 0) | (high >= count), text)
    elif int(low) < 0 or int(high) >= count:
        mend = f", such as {what} - 1" if (int(low), int(high)) == (1, count) else ""
        raise MetaplError(f"{what} {verbs[1]} from {int(low)} to {int(high)}; {why}: expected 0..{count - 1}{mend}.")


def safe_probabilities(probabilities: Tensor) -> Tensor:
    """Probabilities without NaN, for ``torch.multinomial``: as :func:`safe_labels`."""
    return probabilities.nan_to_num(nan=1.0) if waits(probabilities) else probabilities


def same_classes(teacher_outputs: Tensor, student_outputs: Tensor) -> None:
    """Refuse a teacher whose outputs do not match the student's, or are not finite."""
    class_outputs(teacher_outputs, "teacher")
    if teacher_outputs.shape != student_outputs.shape:
        raise MetaplError(
            f"the teacher's outputs have shape {tuple(teacher_outputs.shape)}, the student's "
            f"{tuple(student_outputs.shape)}; expected the same batch and the same number of classes."
        )
    refuse_not_finite(teacher_outputs, DIVERGED.format("teacher"))


DIVERGED = "the {}'s outputs are NaN or infinite; its weights have probably diverged: lower its learning rate."


def scalar_loss(loss: Any, name: str, mend: str = "take the mean") -> None:
    if not isinstance(loss, Tensor) or loss.ndim or loss.is_complex():
        raise MetaplError(f"{name} is {described(loss)}; expected a real tensor without dimensions: {mend}.")


def learns(loss: Tensor, who: str) -> None:
    """Refuse a loss without a gradient, except a constant 0, such as UDA before its start."""
    if not loss.requires_grad:
        refuse(loss != 0, str(without_gradient(who)))


def without_gradient(who: str) -> MetaplError:
    return MetaplError(
        f"the {who}'s loss has no gradient, so nothing would be learned. Likely causes: its outputs are detached "
        "(.detach(), .data, numpy), the parameters that they depend on have requires_grad=False, or this runs under "
        "torch.no_grad() or torch.inference_mode()."
    )


def dense_gradients(grads: Mapping[str, Tensor | None]) -> None:
    sparse = [name for name, g in grads.items() if g is not None and g.layout != torch.strided]
    if sparse:
        raise MetaplError(
            f"the gradient of the student's {sparse[0]} is sparse, and the student's update is differentiated with "
            "dense ones; build the embedding with sparse=False."
        )


def sparse_gradients(optimizer: torch.optim.Optimizer, network: nn.Module) -> None:
    """Refuse sparse gradients for an optimizer that would fail on them in the middle of its step."""
    for group in optimizer.param_groups:
        sparse = {id(p) for p in group["params"] if p.grad is not None and p.grad.is_sparse}
        takes = isinstance(optimizer, torch.optim.SparseAdam) or (
            isinstance(optimizer, torch.optim.SGD | torch.optim.Adagrad) and not group["weight_decay"]
        )
        if sparse and not takes:
            name = next((name for name, p in network.named_parameters() if id(p) in sparse), "a parameter")
            raise MetaplError(
                f"the gradient of {name} is sparse, which {type(optimizer).__name__} with these options cannot use; "
                "build the embedding with sparse=False, or take torch.optim.SparseAdam, or SGD without weight decay."
            )


def steps_alone(optimizer: torch.optim.Optimizer) -> None:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise MetaplError(
            f"{type(optimizer).__name__} was given, whose step evaluates the loss again through a closure; expected an "
            "optimizer that steps along a gradient, such as SGD or Adam."
        )


def moves(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse an optimizer that holds none of a network's trainable parameters."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    learned = [p for p in model.parameters() if p.requires_grad]
    if not any(id(p) in held for p in learned):
        none = "the optimizer holds none of the network's parameters that have requires_grad=True"
        raise MetaplError(
            f"{none if learned else 'all parameters of the network have requires_grad=False'}, so nothing would be "
            "learned; expected an optimizer over model.parameters(), some of them with requires_grad=True."
        )
