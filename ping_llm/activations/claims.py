"""Claims: which worker computes which unit, agreed on through the store alone.

`claims/00012` names the worker that holds a unit, and a counter. The holder raises the counter
every third of the lease; whoever has seen it unchanged for a whole lease, on its own clock, puts
its own claim in its place. Both are compare-and-swaps, so of two only one succeeds. No clock is
compared with another machine's, and no claim is ever deleted.

Claims keep workers from doing work twice. That a unit is published once is not theirs to ensure:
`done.json` is created where there is none.
"""

import dataclasses
import itertools
import json
import os
import random
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ping_llm.activations import store
from ping_llm.errors import LockedError, StorageError
from ping_llm.hashing import canonical_json
from ping_llm.progress import progress
from ping_llm.storage import KeyValueStore

SHORTEST_POLL_S, LONGEST_POLL_S = 0.05, 5.0


def claim_key(unit: int) -> str:
    """Returns the key of a unit's claim."""
    return f"claims/{unit:05d}"


def read_claim(kv: KeyValueStore, unit: int) -> tuple[dict[str, Any] | None, bytes]:
    """Returns (what a unit's claim says or None, its generation).

    Raises:
        StorageError: It cannot be read, or is no claim.
    """
    value, generation = kv.read(claim_key(unit))
    if value is None:
        return None, generation
    try:
        claim = json.loads(value)
        return {name: claim[name] for name in ("worker", "nonce", "counter", "held")}, generation
    except (ValueError, KeyError, TypeError):
        raise StorageError(f"{kv.url}/{claim_key(unit)} is damaged: {value[:60]!r}") from None


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who says to hold a unit.

    Attributes:
        worker: Name of the worker.
        generation: Of its claim; another one after each renewal.
    """

    worker: str
    generation: bytes


def read_holder(kv: KeyValueStore, unit: int) -> Holder | None:
    """Returns who says to hold a unit, or None where nobody does."""
    claim, generation = read_claim(kv, unit)
    return Holder(claim["worker"], generation) if claim is not None and claim["held"] else None


def find_stale(kv: KeyValueStore, holders: Mapping[int, Holder], lease_s: float) -> list[int]:
    """Returns the units whose claims are not renewed for a lease; takes up to a lease."""
    until, unchanged = time.monotonic() + lease_s, set(holders)
    with progress("watch leases", total=len(holders), unit="seen alive") as bar:
        while unchanged:
            last = time.monotonic() >= until
            unchanged = {
                unit
                for unit in unchanged
                if read_holder(kv, unit) == holders[unit] and store.read_done(kv, unit) is None
            }
            bar.update(done=len(holders) - len(unchanged))
            if last:
                break
            time.sleep(max(min(lease_s / 12, until - time.monotonic()), 0.0))
    return sorted(unchanged)


def release_stale(kv: KeyValueStore, unit: int, holder: Holder) -> None:
    """Frees the unit of a dead worker for all others."""
    content = {"worker": holder.worker, "nonce": secrets.token_hex(8), "counter": 0, "held": False}
    kv.swap(claim_key(unit), canonical_json(content), holder.generation)


@dataclasses.dataclass
class UnitClaim:
    """A unit that this worker holds.

    Attributes:
        unit: Which unit.
        attempt: Name of the attempt at it.
        generation: Of the claim as this worker last wrote it.
        following: What the next renewal writes; the same until it is known to be there.
        renewed: When the last renewal that arrived was sent, on the worker's own clock.
        lost: Whether the lease ran out or another took the unit; never false again.
        lock: Held while the claim is written.
    """

    unit: int
    attempt: str
    generation: bytes
    following: bytes
    renewed: float
    lost: bool = False
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


class Claims:
    """The units of a store as one worker sees them: published, its own, others'.

    Within its context a thread renews what the worker holds; at the end it lets go of the rest.

    Attributes:
        worker: Name of the worker.
        done: {unit: what its commit marker says} of the units known to be published.
    """

    def __init__(
        self,
        kv: KeyValueStore,
        units: int,
        *,
        worker: str | None = None,
        lease_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Looks at what is published.

        Args:
            kv: The store.
            units: Number of its units.
            worker: Name to go by; None: made of host, process and chance.
            lease_s: Length of the lease, equal for all workers of a store.
            clock: Seconds that never go back.

        Raises:
            StorageError: The store cannot be read.
        """
        self._nonce = secrets.token_hex(8)
        self.worker = worker or f"{socket.gethostname()}-{os.getpid()}-{self._nonce[:4]}"
        self._kv, self._lease_s, self._clock = kv, lease_s, clock
        self._counter = itertools.count(1)
        self._held: dict[int, UnitClaim] = {}
        self._seen: dict[int, tuple[bytes, float]] = {}  # others' claims, and since when unchanged
        self._locked: dict[int, bytes] = {}  # claims whose files are locked
        self._left_before, self._pause = 0, SHORTEST_POLL_S
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, daemon=True)
        self.done = store.read_all_done(kv, units)
        self._order = [unit for unit in range(units) if unit not in self.done]
        # Each worker in an order of its own, so that they seldom meet.
        random.Random(self._nonce).shuffle(self._order)

    def __enter__(self) -> "Claims":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for claim in list(self._held.values()):
            self.release(claim)

    @property
    def left(self) -> list[int]:
        """The units not known to be published, in the order in which this worker tries them."""
        return [unit for unit in self._order if unit not in self.done]

    def available(self) -> Iterator[UnitClaim]:
        """Claims units and yields the claims, until there is none that can be had at once."""
        for unit in self.left:
            if self._stop.is_set():
                return
            with self._lock:
                tried = unit in self.done or unit in self._held
            claim = None if tried else self._try(unit)
            if claim is not None:
                yield claim

    def interrupt(self) -> None:
        """Lets `available` end soon, as the work failed."""
        self._stop.set()

    def _try(self, unit: int) -> UnitClaim | None:
        before = self._clock()
        present, generation = read_claim(self._kv, unit)
        if present is not None:
            if (done := store.read_done(self._kv, unit)) is not None:
                self.done[unit] = done
                return None
            if present["held"] and not self._is_stale(unit, generation, before):
                return None
        if self._locked.get(unit) == generation:
            return None
        sent = self._clock()
        try:
            swapped = self._kv.swap(claim_key(unit), self._content(), generation)
        except LockedError:  # by a worker that was stopped as it wrote: not to be asked again
            self._locked[unit] = generation
            return None
        if swapped is None:  # another worker was first
            return None
        claim = UnitClaim(unit, store.new_attempt(), swapped, self._content(), sent)
        with self._lock:
            self._held[unit] = claim
        return claim

    def _is_stale(self, unit: int, generation: bytes, before: float) -> bool:
        """Returns whether a claim, read after the time `before`, has not changed for a lease."""
        seen, since = self._seen.get(unit, (None, 0.0))
        if seen != generation:
            self._seen[unit] = generation, self._clock()
            return False
        return before - since >= self._lease_s

    def wait(self) -> None:
        """Waits a moment, as others hold all that is left; says so when that is news.

        The moments grow while nothing changes, up to a twelfth of the lease.
        """
        left = self.left
        if len(left) != self._left_before:
            self._left_before, self._pause = len(left), SHORTEST_POLL_S
            print(
                f"waiting for other workers; units left: {len(left)}", file=sys.stderr, flush=True
            )
        now, watched = self._clock(), (set(left) & self._seen.keys()) - self._locked.keys()
        until_stale = [self._seen[unit][1] + self._lease_s - now for unit in watched]
        time.sleep(max(min([self._pause, *until_stale]), 0.001))
        self._pause = min(self._pause * 1.5, self._lease_s / 12, LONGEST_POLL_S)

    def renew(self, claim: UnitClaim) -> bool:
        """Renews a claim; returns whether the worker holds the unit.

        Raises:
            StorageError: The store does not answer.
        """
        with claim.lock:
            if not self.holds(claim):
                return False
            sent = self._clock()
            swapped = self._kv.swap(claim_key(claim.unit), claim.following, claim.generation)
            if swapped is None:
                claim.lost = True
                return False
            claim.generation, claim.following = swapped, self._content()
            if self.holds(claim):  # the answer may have come late
                claim.renewed = sent
            return not claim.lost

    def holds(self, claim: UnitClaim) -> bool:
        """Returns whether the lease of a claim still runs, without asking the store."""
        if self._clock() - claim.renewed >= self._lease_s:
            claim.lost = True
        return not claim.lost

    def renew_all(self) -> None:
        """Renews every claim, as is due every third of the lease."""
        with self._lock:
            held = list(self._held.values())
        for claim in held:
            try:
                self.renew(claim)
            except StorageError as error:  # until the lease runs out, the next renewal may arrive
                print(f"claim not renewed: {error}", file=sys.stderr, flush=True)

    def _keep_renewing(self) -> None:
        while not self._stop.wait(self._lease_s / 3):
            self.renew_all()

    def release(self, claim: UnitClaim, published: dict[str, Any] | None = None) -> None:
        """Lets go of a unit: it is published, or given up and free for others."""
        with self._lock:
            self._held.pop(claim.unit, None)
            if published is not None:
                self.done[claim.unit] = published
                return
        try:
            with claim.lock:
                content = self._content(held=False)
                self._kv.swap(claim_key(claim.unit), content, claim.generation)
        except StorageError as error:  # then it goes stale instead
            print(f"claim not released: {error}", file=sys.stderr, flush=True)

    def _content(self, *, held: bool = True) -> bytes:
        # Counted, so that no two contents are equal, nor their generations.
        counter = next(self._counter)
        claim = {"worker": self.worker, "nonce": self._nonce, "counter": counter, "held": held}
        return canonical_json(claim)
