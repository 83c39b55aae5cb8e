"""Many workers on one store: killed, stopped, cut off from it; what they leave is the same."""

import contextlib
import os
import threading

import emulators
import pytest
from faulty_proxy import faulty
from numpy_workers import MadeUpPrompts, assert_whole_and_equal, round_of_killing, work

from ping_llm import storage
from ping_llm.extraction import store
from ping_llm.storage import KeyValueStore

BUCKETS = {"s3": "s3://bucket", "gs": "gs://anonymous@bucket"}
EMULATORS = {"s3": emulators.s3, "gs": emulators.gcs}
ROUNDS = int(os.environ.get("PING_LLM_ROUNDS", "2"))  # over file://; a fifth over each emulator
UNITS = 24


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
        url = storage.join(bucket, f"store{seed}")
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
        url = storage.join(bucket, "store")
        created, _ = round_of_killing(url, prompts, seed=0, workers=4, kills=0, lease_s=3.0)
        for timer in timers:
            timer.join()
    assert set(proxy.counts) == set(proxy.rates)
    print(proxy.counts)
    assert sorted(created) == [store.done_key(unit) for unit in range(UNITS)], "once each"
    assert_whole_and_equal(url, alone)
