"""Too little memory, however it is said."""

from __future__ import annotations

from metapl import MetaplError
from metapl.apps.machine.memory import out_of_memory


def test_other_errors_are_not_taken_for_it() -> None:
    assert out_of_memory(BlockingIOError(11, "Resource temporarily unavailable")) is None
    assert out_of_memory(RuntimeError("shape '[2]' is invalid")) is None
    wrapped = MetaplError("x")
    wrapped.__cause__ = MemoryError()
    assert out_of_memory(wrapped) == "of this machine"
    told = MetaplError("step 3: the memory of the GPU does not suffice; lower it")
    told.__cause__ = MemoryError()
    assert out_of_memory(told) is None
