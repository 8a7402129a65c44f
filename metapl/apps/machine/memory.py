"""Too little memory, however it is said: Python, NumPy, torch on the host and on a GPU each have a way of their own."""

from __future__ import annotations

import errno
import re
import sys

_SAID = re.compile(
    r"can't allocate memory|not enough memory|out of memory|MemoryError|bad_alloc|"
    r"cannot allocate memory(?! in static TLS block)|"  # the loader's own limit, whatever memory there is
    r"failed to map segment from shared object|"  # a library that is loaded
    r"could not create a (primitive|memory)|"  # oneDNN
    r"resource temporarily unavailable|can't start new thread|"  # a thread's stack
    r"error return without exception set",  # what Python says where there is no memory for the error either
    re.IGNORECASE,
)

LESS = (  # not every recipe has all of these
    "lower the batch sizes (--labeled-batch, --unlabeled-batch), --image-size or --num-workers, raise --accumulate, or "
    "take --precision bfloat16"
)


def out_of_memory(error: BaseException) -> str | None:
    """Whose memory did not suffice, where that is the error or one that it came from; None for any other error, and for
    a refusal that says so itself."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen and "does not suffice" not in str(cause):
        seen.add(id(cause))
        if where := _where(cause):
            return where
        cause = cause.__cause__ or cause.__context__
    return None


def _where(error: BaseException) -> str | None:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "of the GPU"
    if isinstance(error, MemoryError):
        return "of this machine"
    if isinstance(error, OSError):
        return "of this machine" if error.errno == errno.ENOMEM else None
    if isinstance(error, RuntimeError | ImportError | SystemError | TypeError) and _SAID.search(str(error)):
        return "of the GPU" if "CUDA" in str(error) else "of this machine"
    return None
