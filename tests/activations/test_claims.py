import json
import subprocess
import sys
import time

import pytest
from stores import marker

from ping_llm import storage
from ping_llm.activations import store
from ping_llm.activations.claims import Claims, claim_key, read_claim
from ping_llm.errors import StorageError
from ping_llm.hashing import seal
from ping_llm.storage import KeyValueStore


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def kv(tmp_path):
    return KeyValueStore(tmp_path / "store")


def worker(kv, *, units=1, clock=None, name=None):
    """A worker with a lease of 60 s whose renewals are called by hand."""
    return Claims(kv, units, worker=name, lease_s=60.0, clock=clock or Clock())


def publish(kv, unit):
    kv.create(store.done_key(unit), seal(marker(unit)))


def test_a_claim_names_worker_nonce_and_counter_and_no_time(kv):
    first = worker(kv, name="w1")
    (claim,) = first.available()
    content = json.loads(kv.read(claim_key(0))[0])
    assert content.keys() == {"worker", "nonce", "counter", "held"}
    assert content["worker"] == "w1"
    assert first.renew(claim)
    renewed = json.loads(kv.read(claim_key(0))[0])
    assert renewed["counter"] > content["counter"]
    assert renewed["nonce"] == content["nonce"]


def test_of_several_workers_one_has_a_unit_and_none_has_another_s(kv):
    all_of_them = [worker(kv, units=20) for _ in range(3)]
    takers = [worker.available() for worker in all_of_them]
    had = []
    while takers:
        for taker in list(takers):
            claim = next(taker, None)
            had += [] if claim is None else [claim.unit]
            if claim is None:
                takers.remove(taker)
    assert sorted(had) == list(range(20))


def test_workers_try_the_units_in_orders_of_their_own(kv):
    assert worker(kv, units=50).left != worker(kv, units=50).left


def test_a_lease_that_is_not_renewed_is_taken_over_after_its_length_and_not_before(kv):
    clock = Clock()
    first, second = worker(kv, clock=clock), worker(kv, clock=clock)
    (claim,) = first.available()
    assert list(second.available()) == []
    clock.now += 59.9
    assert list(second.available()) == []
    clock.now += 0.1
    (taken,) = second.available()
    assert not first.renew(claim)
    assert second.renew(taken)


def test_a_lease_that_is_renewed_is_never_taken_over(kv):
    clock = Clock()
    first, second = worker(kv, clock=clock), worker(kv, clock=clock)
    (claim,) = first.available()
    for _ in range(20):
        assert list(second.available()) == []
        clock.now += 20.0
        assert first.renew(claim)


def test_an_observer_counts_from_when_it_saw_the_claim_itself(kv):
    clock = Clock()
    (_,) = worker(kv, clock=clock).available()
    clock.now += 1000.0
    late = worker(kv, clock=clock)  # has never seen it before, so it may be of this moment
    assert list(late.available()) == []
    clock.now += 60.0
    assert [claim.unit for claim in late.available()] == [0]


def test_clocks_that_disagree_by_years_do_not_matter(kv):
    ours, theirs = Clock(), Clock()
    theirs.now = 1e9
    first, second = worker(kv, clock=ours), worker(kv, clock=theirs)
    (claim,) = first.available()
    assert list(second.available()) == []
    theirs.now += 40.0
    ours.now += 40.0
    assert first.renew(claim)
    assert list(second.available()) == []
    theirs.now += 59.0
    assert list(second.available()) == []


def test_a_worker_that_did_not_renew_for_a_lease_holds_nothing_though_nobody_took_it(kv):
    clock = Clock()
    first = worker(kv, clock=clock)
    (claim,) = first.available()
    clock.now += 60.0
    assert not first.holds(claim)
    assert not first.renew(claim)
    clock.now -= 30.0
    assert not first.holds(claim), "what is lost stays lost"


def test_a_renewal_that_arrives_after_the_lease_comes_too_late(kv, monkeypatch):
    clock = Clock()
    first = worker(kv, clock=clock)
    (claim,) = first.available()
    swap = kv.swap

    def slow_swap(*arguments):
        clock.now += 61.0
        return swap(*arguments)

    monkeypatch.setattr(kv, "swap", slow_swap)
    assert not first.renew(claim)


def test_a_renewal_whose_answer_was_lost_is_sent_again_and_holds(kv, monkeypatch):
    clock = Clock()
    first, second = worker(kv, clock=clock), worker(kv, clock=clock)
    (claim,) = first.available()
    swap = kv.swap

    def swap_without_answer(*arguments):
        swap(*arguments)
        raise StorageError("no answer")

    monkeypatch.setattr(kv, "swap", swap_without_answer)
    first.renew_all()
    monkeypatch.setattr(kv, "swap", swap)
    assert first.renew(claim)
    clock.now += 30.0
    assert first.renew(claim)
    assert list(second.available()) == []


def test_a_sleep_that_the_clock_did_not_count_is_seen_by_asking(kv):
    asleep, awake = Clock(), Clock()
    first, second = worker(kv, clock=asleep), worker(kv, clock=awake)
    (claim,) = first.available()
    assert list(second.available()) == []
    awake.now += 60.0
    (_,) = second.available()
    assert first.holds(claim), "by its own clock"
    assert not first.renew(claim), "which publishing goes by"


def test_what_is_let_go_is_free_at_once_and_what_is_published_is_done(kv):
    first, second = worker(kv, units=2), worker(kv, units=2)
    claims = {claim.unit: claim for claim in first.available()}
    first.release(claims[0])
    publish(kv, 1)
    first.release(claims[1], marker(1))
    assert [claim.unit for claim in second.available()] == [0]
    assert second.done == {1: marker(1)}
    assert first.left == [0]


def test_a_worker_that_ends_lets_go_of_what_it_holds(kv):
    with worker(kv, units=3) as first:
        assert len(list(first.available())) == 3
    assert len(list(worker(kv, units=3).available())) == 3


def test_a_published_unit_is_not_claimed_though_its_claim_is_stale(kv):
    clock = Clock()
    first, second = worker(kv, clock=clock), worker(kv, clock=clock)
    assert len(list(first.available())) == 1
    assert list(second.available()) == []
    publish(kv, 0)
    clock.now += 100.0
    assert list(second.available()) == []
    assert second.left == []


def test_renewals_come_by_themselves(kv):
    with Claims(kv, 1, lease_s=0.3) as first:
        (claim,) = first.available()
        before = claim.generation
        first._stop.wait(0.5)
        assert claim.generation != before
        assert first.holds(claim)


def test_a_wait_says_how_many_units_are_with_others_and_ends_when_a_lease_does(kv, capsys):
    (_,) = Claims(kv, 1, lease_s=0.2).available()
    second = Claims(kv, 1, lease_s=0.2)
    for _ in range(100):
        if found := list(second.available()):
            break
        second.wait()
    assert [claim.unit for claim in found] == [0]
    assert capsys.readouterr().err == "waiting for other workers; units left: 1\n"


LOCKER = """
import fcntl, os, sys, time
lock = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)
fcntl.lockf(lock, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(60)
"""


def test_a_worker_stopped_as_it_writes_a_claim_holds_up_nobody_else(kv, monkeypatch):
    monkeypatch.setattr(storage, "LOCK_S", 0.5)
    clock = Clock()
    (_,) = worker(kv, clock=clock).available()
    second = worker(kv, units=2, clock=clock)
    path = f"{kv.url}/{claim_key(0)}.__lock"  # as TensorStore locks it
    with subprocess.Popen([sys.executable, "-c", LOCKER, path], stdout=subprocess.PIPE) as stopped:
        assert stopped.stdout.readline() == b"locked\n"
        assert [claim.unit for claim in second.available()] == [1]
        clock.now += 60.0
        started = time.monotonic()
        assert list(second.available()) == []
        assert list(second.available()) == [], "it is not asked for again"
        assert time.monotonic() - started < 5.0
        stopped.kill()
    # The write that waited for the lock is done now, and counts as any other worker's claim.
    until = time.monotonic() + 10.0
    while not (found := list(second.available())) and time.monotonic() < until:
        clock.now += 60.0
        time.sleep(0.05)
    assert [claim.unit for claim in found] == [0]


def test_a_damaged_claim_is_an_error_that_names_it(kv):
    kv.write(claim_key(0), b"[]")
    with pytest.raises(StorageError, match="claims/00000 is damaged"):
        read_claim(kv, 0)
