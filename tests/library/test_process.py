"""Workers and the signals that reach a group of processes."""

from __future__ import annotations

import os
import signal

from metapl.data.steps import _begin_worker


def test_a_worker_outlives_any_number_of_sigterms_for_a_while() -> None:
    worker = os.fork()
    if not worker:
        try:
            _begin_worker(0)
            for _ in range(5):
                os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7 if signal.alarm(0) > 0 else 8)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 7
