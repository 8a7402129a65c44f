"""Hooks on gradients: which change what they are given, and where they would not be called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as modules

from metapl.errors import MetaplError

_GLOBAL: tuple[dict[int, Any], ...] = (modules._global_backward_hooks, modules._global_backward_pre_hooks)


class Changing:
    """Notes which hooks on gradients change what they are given, while they run in :meth:`noted` blocks.

    Args:
        parameters: the student's, by name.
        parts: of the student, with the prefixes of their names.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], parts: Sequence[tuple[str, nn.Module]]) -> None:
        self.found: str | None = None
        self._tables: list[tuple[str, Any]] = [
            (f"its parameter {name}", p._backward_hooks) for name, p in parameters.items()
        ]
        for prefix, part in parts:
            if part._backward_hooks or part._backward_pre_hooks:
                where = f"its module {prefix.rstrip('.') or type(part).__name__}"
                self._tables += [(where, part._backward_hooks), (where, part._backward_pre_hooks)]
        self._tables += [("all modules", table) for table in _GLOBAL]
        self._tables = [(where, table) for where, table in self._tables if table]

    @contextmanager
    def noted(self, *, forward: bool = False) -> Iterator[None]:
        """Note hooks that run in this block, and in a ``forward`` pass those that it puts on tensors."""
        if not self._tables and not forward:
            yield
            return
        with ExitStack() as stack:
            for where, table in self._tables:
                stack.callback(table.update, dict(table))
                table.update({key: self._noting(where, hook) for key, hook in table.items()})
            if forward:
                register = Tensor.register_hook
                stack.callback(setattr, Tensor, "register_hook", register)

                def registered(t: Tensor, hook: Any) -> Any:
                    return register(t, self._noting("a tensor of its forward", hook))  # type: ignore[no-untyped-call]

                Tensor.register_hook = registered  # type: ignore[method-assign]  # put back
            yield

    def _noting(self, where: str, hook: Any) -> Any:
        def called(*given: Any) -> Any:
            tensors = [t for g in given for t in (g if isinstance(g, tuple) else (g,)) if isinstance(t, Tensor)]
            versions = [t._version for t in tensors]
            result = hook(*given)
            new = result if isinstance(result, tuple) else (result,)
            if any(t is not None and not any(t is old for old in tensors) for t in new) or versions != [
                t._version for t in tensors
            ]:
                self.found = self.found or where
            return result

        return called

    def refuse(self) -> None:
        """Refuse to run a pass again, or to differentiate it twice, where a hook changed its gradient."""
        if self.found is not None:
            raise MetaplError(
                f"the student has a hook on {self.found} that changes gradients (register_hook, "
                "register_full_backward_hook), which a pass that is run again does not have, so the feedback would be "
                "wrong. Remove the hook: clip by clip_norm=, and scale a gradient in forward. Or look one step ahead "
                'with mode="unrolled", or "reinforce", which take the gradient as the hook leaves it.'
            )


def refuse_late_hooks(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse hooks that wait for ``.grad``, which no pass here fills."""
    hooked = [name for name, p in parameters.items() if p._post_accumulate_grad_hooks]
    if hooked:
        raise MetaplError(
            f"the student's parameter {hooked[0]} has a hook of register_post_accumulate_grad_hook, which would never "
            "be called: metapl takes the student's gradient without filling .grad. Remove the hook, or use "
            "register_hook, which is called with the gradient."
        )


def refuse_hooks(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse hooks of parameters where other tensors stand in for these."""
    hooked = [name for name, p in parameters.items() if p._backward_hooks]
    if hooked:
        raise MetaplError(
            f"the student's parameter {hooked[0]} has a hook of register_hook, which is not called where other "
            "tensors stand in for the parameters: from the second student step on, and in a step that is taken again "
            "on a revised signal. Remove the hook, or look one step ahead with a problem that revises no signal."
        )
