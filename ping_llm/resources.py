"""Memory that processes use."""

import contextlib
import resource
import sys
import threading

import psutil


def peak_rss_bytes() -> int:
    """Returns the most memory this process ever held, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class PeakMemory:
    """Samples the memory of this process and its children in the background."""

    def __init__(self, interval_s: float = 0.1):
        self._interval_s, self._stop = interval_s, threading.Event()
        self._peak = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.peak()

    def peak(self) -> int:
        """Returns the largest resident set size so far, in bytes, summed over the processes."""
        process, total = psutil.Process(), 0
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += each.memory_info().rss
        self._peak = max(self._peak, total)
        return self._peak
