"""Stopping between two steps: what a loop does about SIGINT and SIGTERM."""

import signal
import threading
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class StopSignals:
    """Notes SIGINT and SIGTERM while a step runs; a second one acts as it did before."""

    def __init__(self) -> None:
        self._noted = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            both = (signal.SIGINT, signal.SIGTERM)
            self._before = {signum: signal.signal(signum, self._note) for signum in both}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _: FrameType | None) -> None:
        self._noted = signum
        self.__exit__()

    def agreed(self, *, at_log_point: bool) -> int:
        """Returns the signal that every process is to stop for now, 0 for none.

        Several processes must stop at the same step, so they ask each other, but only where they
        wait for the devices anyway.
        """
        if jax.process_count() == 1:
            return self._noted
        if not at_log_point:
            return 0
        return int(np.max(multihost_utils.process_allgather(np.int32(self._noted))))
