"""Too little memory, however it is said: Python, NumPy, torch on the host and on a GPU each have a way of their own."""

from __future__ import annotations

import re
import sys

_SAID = re.compile(
    r"can't allocate memory|not enough memory|out of memory|MemoryError|bad_alloc|cannot allocate memory|"
    r"could not create a (primitive|memory)",  # oneDNN
    re.IGNORECASE,
)

LESS = (  # not every recipe has all of these
    "lower the batch sizes (--labeled-batch, --unlabeled-batch), --image-size or --num-workers, raise --accumulate, or "
    "take --precision bfloat16"
)


def out_of_memory(error: BaseException | None) -> str | None:
    """Whose memory did not suffice, where that is the error or one that it came from; None for any other error, and for
    a refusal that says so itself."""
    torch = sys.modules.get("torch")
    while error is not None and "does not suffice" not in str(error):
        if torch is not None and isinstance(error, torch.OutOfMemoryError):
            return "of the GPU"
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError | OSError) and _SAID.search(str(error))):
            return "of the GPU" if "CUDA" in str(error) else "of this machine"
        error = error.__cause__ or error.__context__
    return None
