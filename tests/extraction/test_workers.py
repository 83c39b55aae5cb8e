"""Many workers on one store: killed, stopped, cut off from it; what they leave is the same."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import emulators
import pytest
from faulty_proxy import faulty
from numpy_workers import (
    MadeUpPrompts,
    NumpyForward,
    assert_whole_and_equal,
    round_of_killing,
    work,
)
from stores import assert_equal_stores

from ping_llm import storage
from ping_llm.activations import store
from ping_llm.activations.inspection import inspect_activations
from ping_llm.errors import StorageError
from ping_llm.extraction.run import extract_activations
from ping_llm.storage import KeyValueStore

BUCKETS = {"s3": "s3://bucket", "gs": "gs://anonymous@bucket"}
EMULATORS = {"s3": emulators.s3, "gs": emulators.gcs}
ROUNDS = int(os.environ.get("PING_LLM_ROUNDS", "1"))  # over file://; a fifth over each emulator
WORKERS = 4 if ROUNDS >= 50 else 2  # with a real model
UNITS = 16


@pytest.fixture(scope="module")
def prompts():
    return MadeUpPrompts(UNITS)


@pytest.fixture(scope="module")
def alone(prompts, tmp_path_factory):
    """What a single worker makes of the prompts."""
    url = tmp_path_factory.mktemp("alone") / "store"
    work(KeyValueStore(url), prompts)
    return url


@pytest.fixture
def emulator(tmp_path):
    """Starts an emulator and leads to it; returns (its URL, its environment)."""
    with contextlib.ExitStack() as stack:

        def start(kind):
            log = stack.enter_context(open(tmp_path / "log", "wb"))
            environment = stack.enter_context(EMULATORS[kind](log))
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            for key, value in environment.items():
                patch.setenv(key, value)
            return BUCKETS[kind], environment

        yield start


def assert_round_leaves_the_same(url, prompts, alone, **settings):
    created, killed = round_of_killing(url, prompts, **settings)
    assert killed
    print(f"{url}: {killed} killed")
    assert sorted(created) == [store.done_key(unit) for unit in range(UNITS)], "once each"
    assert_whole_and_equal(url, alone)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_workers_killed_at_random_leave_every_unit_published_once(seed, prompts, alone, tmp_path):
    assert_round_leaves_the_same(tmp_path / "store", prompts, alone, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_on_object_stores_too(kind, prompts, alone, emulator):
    bucket, _ = emulator(kind)
    for seed in range(max(ROUNDS // 5, 1)):
        url = f"{bucket}/store{seed}"
        assert_round_leaves_the_same(url, prompts, alone, seed=seed, lease_s=3.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_faults_on_the_way_lose_and_double_nothing(kind, prompts, alone, emulator, monkeypatch):
    bucket, environment = emulator(kind)
    monkeypatch.setattr(
        storage, "RETRIES", {"max_retries": 20, "initial_delay": "50ms", "max_delay": "1s"}
    )
    with faulty(environment) as (proxy, through), pytest.MonkeyPatch.context() as patch:
        for key, value in through.items():
            patch.setenv(key, value)
        timers = [threading.Timer(1.0, proxy.away.set), threading.Timer(5.0, proxy.away.clear)]
        for timer in timers:
            timer.start()
        url = f"{bucket}/store"
        created, _ = round_of_killing(url, prompts, seed=0, workers=4, kills=0, lease_s=3.0)
        for timer in timers:
            timer.join()
    assert set(proxy.counts) == set(proxy.rates)
    print(proxy.counts)
    assert sorted(created) == [store.done_key(unit) for unit in range(UNITS)], "once each"
    assert_whole_and_equal(url, alone)


class ClockThatJumps:
    """A clock that has gone on by ten minutes whenever it is asked after the first batch began."""

    def __init__(self):
        self.jumped = 0.0

    def __call__(self):
        return time.monotonic() + self.jumped


def test_a_worker_that_slept_drops_its_unit_and_takes_it_again(prompts, alone, tmp_path):
    clock, slept = ClockThatJumps(), []

    class Sleepy(NumpyForward):
        def __call__(self, batch):
            if not slept:
                slept.append(clock.jumped)
                clock.jumped += 600.0
            return super().__call__(batch)

    work(KeyValueStore(tmp_path / "store"), prompts, forward=Sleepy(), clock=clock)
    assert slept
    assert_whole_and_equal(tmp_path / "store", alone)
    attempts = [path for path in (tmp_path / "store").glob("units/*/*") if path.is_dir()]
    assert len(attempts) == UNITS, "what was dropped is gone"


def test_an_error_in_writing_ends_the_worker_and_lets_go_of_its_units(prompts, tmp_path):
    class Broken(NumpyForward):
        def to_host(self, result):
            raise StorageError("no room")

    kv = KeyValueStore(tmp_path / "store")
    with pytest.raises(StorageError, match="no room"):
        work(kv, prompts, forward=Broken())
    assert inspect_activations(str(tmp_path / "store")).workers == {}
    assert not list((tmp_path / "store").glob("units/*/*/*")), "no half-written attempt"
    work(kv, prompts)  # nobody waits for a lease


# --- processes --------------------------------------------------------------------------------

# Works on a store with batches that take a while, so that a signal finds it at work.
SLOW_WORKER = """
import sys, time
sys.path.insert(0, sys.argv[1])
import numpy_workers
from ping_llm.storage import KeyValueStore
class Slow(numpy_workers.NumpyForward):
    def __call__(self, batch):
        time.sleep(0.2)
        return super().__call__(batch)
prompts = numpy_workers.MadeUpPrompts(int(sys.argv[3]))
kv = KeyValueStore(sys.argv[2])
numpy_workers.work(kv, prompts, lease_s=float(sys.argv[4]), worker="process", forward=Slow())
"""


@contextlib.contextmanager
def slow_worker(url, units, lease_s):
    """Yields a process that is at work on the store `url`."""
    command = [sys.executable, "-c", SLOW_WORKER, Path(__file__).parent.parent, url, units, lease_s]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.DEVNULL)
    try:
        kv = KeyValueStore(url)
        while not kv.keys("claims/"):
            assert process.poll() is None
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_worker_that_was_stopped_never_publishes_over_its_successor(seed, tmp_path):
    url, prompts = tmp_path / "store", MadeUpPrompts(6)
    with slow_worker(url, 6, lease_s=1.0) as process:
        time.sleep(random.Random(seed).uniform(0, 0.8))
        process.send_signal(signal.SIGSTOP)
        successor = work(KeyValueStore(url), prompts, lease_s=1.0, worker="successor")
        published = {path: path.read_bytes() for path in url.glob("units/*/done.json")}
        assert len(published) == 6
        assert "successor" in {entry["worker"] for entry in successor.done.values()}
        process.send_signal(signal.SIGCONT)
        assert process.wait(30) == 0, "it finds that all is done"
    assert {path: path.read_bytes() for path in url.glob("units/*/done.json")} == published
    attempts = {path.name for path in url.glob("units/*/*") if path.is_dir()}
    assert attempts == {entry["attempt"] for entry in successor.done.values()}
    assert inspect_activations(str(url), verify=True).errors == []


@pytest.mark.slow
def test_a_lone_worker_waits_for_a_dead_one_at_most_one_lease(tmp_path):
    url, lease_s = tmp_path / "store", 3.0
    with slow_worker(url, 4, lease_s) as process:
        process.kill()
        process.wait()
    started = time.monotonic()
    work(KeyValueStore(url), MadeUpPrompts(4), lease_s=lease_s)
    assert time.monotonic() - started < lease_s + 1.0  # and what the work itself takes


@pytest.mark.slow
def test_leases_of_the_dead_are_told_from_those_of_the_living_by_watching(tmp_path):
    url, lease_s = tmp_path / "store", 2.0
    with slow_worker(url, 300, lease_s) as process:
        first = inspect_activations(str(url))
        assert first.workers["process"].leased
        assert first.stale_leases is None, "one look cannot tell"
        alive = inspect_activations(str(url), watch=True)
        assert alive.stale_leases == []
        while not inspect_activations(str(url)).units_done:
            time.sleep(0.1)
        found = inspect_activations(str(url))
        assert found.workers["process"].units == found.units_done
        assert 0 < found.eta_seconds < 1000
        process.kill()
        process.wait()
        dead = inspect_activations(str(url), watch=True)
        assert dead.stale_leases == dead.workers["process"].stale != []
        assert dead.eta_seconds is None


REAL_WORKER = """
import json, sys
from ping_llm.extraction.run import extract_activations
extract_activations(*sys.argv[1:4], **json.loads(sys.argv[4]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(max(ROUNDS * 3 // 50, 1)))
def test_processes_with_a_real_model_killed_with_9_leave_the_same(
    seed, checkpoint, small, tmp_path
):
    rng, killed, logs = random.Random(seed), 0, []
    documents, url, expected = (tmp_path / name for name in ("in.jsonl", "store", "alone"))
    texts = [" ".join(rng.choices(["the", "cat", "then", "über"], k=20)) for _ in range(400)]
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = small | {"unit_mb": 0.0002}
    total = extract_activations(checkpoint, documents, expected, **settings).units
    command = [sys.executable, "-c", REAL_WORKER, checkpoint, documents, url]
    command = [*map(str, command), json.dumps(settings)]
    environment = os.environ | {"XLA_FLAGS": ""}

    def start():
        logs.append(tmp_path / f"log.{len(logs)}")
        with logs[-1].open("w") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def units_done():
        return len(list(url.glob("units/*/done.json")))

    running = [start() for _ in range(WORKERS)]
    for number in range(WORKERS):
        enough = rng.randrange(total * number // WORKERS, total * (number + 1) // WORKERS)
        while units_done() < enough:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        running[0].kill()
        running[0].wait()
        killed += 1
        running = [*running[1:], start()]
    codes = [process.wait(240) for process in running]
    assert codes == [0] * WORKERS, [log.read_text()[-3000:] for log in logs[-WORKERS:]]
    assert_equal_stores(url, expected)
    found = inspect_activations(str(url), verify=True)
    assert found.errors == []
    attempts = {path.name for path in url.glob("units/*/*") if path.is_dir()}
    shares = [worker.units for worker in found.workers.values()]
    print(f"{total} units, {len(attempts)} attempts, {killed} killed, by worker {shares}")
