"""What workers cost and gain, measured by hand: `PYTHONPATH=tests python tests/worker_speed.py`.

Devices are stood in for by a pause of 50 ms a batch, so that compute is not the limit.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import emulators
from numpy_workers import MadeUpPrompts, NumpyForward, work

from ping_llm.storage import KeyValueStore

UNITS, PAUSE_S, ROUNDS = 60, 0.05, 4


class Paused(NumpyForward):
    def __call__(self, batch):
        time.sleep(PAUSE_S)
        return super().__call__(batch)


class Timed(KeyValueStore):
    """Adds up the time of what is done for claims, and to create commit markers."""

    def __init__(self, url):
        super().__init__(url)
        self.claiming = self.committing = 0.0

    def read(self, key):
        started = time.perf_counter()
        result = super().read(key)
        self.claiming += (time.perf_counter() - started) * key.startswith("claims")
        return result

    def swap(self, key, value, generation):
        started = time.perf_counter()
        result = super().swap(key, value, generation)
        self.claiming += (time.perf_counter() - started) * key.startswith("claims")
        return result

    def create(self, key, value):
        started = time.perf_counter()
        result = super().create(key, value)
        self.committing += time.perf_counter() - started
        return result


def run_process(url):
    """Works once the file `go` is there; prints when it began and ended."""
    kv = KeyValueStore(url)
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.monotonic()
    work(kv, MadeUpPrompts(UNITS), forward=Paused())
    print(json.dumps([started, time.monotonic()]), flush=True)


def seconds_of(processes, place):
    command = [sys.executable, __file__, str(place)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    running = [subprocess.Popen(command, **pipes) for _ in range(processes)]
    for process in running:
        process.stdout.readline()
    for process in running:
        process.stdin.write(b"go\n")
        process.stdin.flush()
    times = [json.loads(process.communicate()[0]) for process in running]
    return max(end for _, end in times) - min(start for start, _ in times)


def main():
    with tempfile.TemporaryDirectory() as place:
        ratios = []
        for number in range(ROUNDS):
            one, two = (seconds_of(n, f"{place}/{number}-{n}") for n in (1, 2))
            ratios.append(one / two)
            load = os.getloadavg()[0]
            print(
                f"1 worker {one:.2f} s, 2 workers {two:.2f} s, {one / two:.2f} x, load {load:.1f}"
            )
        print(f"median {statistics.median(ratios):.2f} x")
        for kind, bucket in (
            ("file", place),
            ("gs", "gs://anonymous@bucket"),
            ("s3", "s3://bucket"),
        ):
            with contextlib.ExitStack() as stack:
                if kind != "file":
                    log = stack.enter_context(open(Path(place) / "log", "wb"))
                    emulator = {"gs": emulators.gcs, "s3": emulators.s3}[kind]
                    os.environ.update(stack.enter_context(emulator(log)))
                kv = Timed(f"{bucket}/cost")
                started = time.perf_counter()
                work(kv, MadeUpPrompts(200))
                whole = (time.perf_counter() - started) / 200
                claims, done = kv.claiming / 200, kv.committing / 200
                print(
                    f"{kind}: a unit {1e3 * whole:.1f} ms, of it claiming {1e3 * claims:.1f}, "
                    f"commit marker {1e3 * done:.1f}, load {os.getloadavg()[0]:.1f}"
                )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_process(sys.argv[1])
    else:
        main()
