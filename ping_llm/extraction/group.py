"""A group: several processes that hold one sharded model, and together are one worker.

The first process leads: it claims units, and lists them below `groups/` in the store. The others
read that list, so that all run the same batches in the same order. It is not done by a collective,
as units are chosen ahead, beside the forward passes, and collectives must have one order.
"""

import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

from ping_llm.activations.claims import Claims, UnitClaim
from ping_llm.errors import StorageError
from ping_llm.hashing import canonical_json
from ping_llm.storage import KeyValueStore

POLL_S = 0.05


def _key(group: str, number: int) -> str:
    return f"groups/{group}/{number:06d}"


class Leader(Claims):
    """Claims of the first process, which tells the others of each."""

    def __init__(self, kv: KeyValueStore, units: int, group: str, **settings: Any):
        """Looks at what is published; `settings` are those of `Claims`."""
        super().__init__(kv, units, **settings)
        self._group, self._told = group, 0

    def _tell(self, entry: dict[str, Any]) -> None:
        self._kv.write(_key(self._group, self._told), canonical_json(entry))
        self._told += 1

    def available(self) -> Iterator[UnitClaim]:
        """As in `Claims`."""
        for claim in super().available():
            self._tell({"unit": claim.unit, "attempt": claim.attempt})
            yield claim

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        super().__exit__(kind, *rest)
        try:
            self._tell({"failed": kind is not None})
        except StorageError:
            if kind is None:  # else it would hide what went wrong first
                raise


class Follower(contextlib.AbstractContextManager):
    """What stands in the place of `Claims` in the other processes.

    Attributes:
        done: Empty: what is published is the leader's to know.
        left: The next entry of the list; nothing once it is at its end.
    """

    def __init__(self, kv: KeyValueStore, group: str):
        """Begins at the beginning of the list."""
        self._kv, self._group = kv, group
        self.worker = ""
        self.done: dict[int, dict[str, Any]] = {}
        self.left = [0]
        self._stop = threading.Event()

    def __exit__(self, *_: object) -> None:
        """Does nothing: the leader lets go."""

    def available(self) -> Iterator[UnitClaim]:
        """Yields the units that the leader claims, until it is at the end.

        Raises:
            StorageError: The leader failed.
        """
        while self.left and not self._stop.is_set():
            key = _key(self._group, self.left[0])
            data, _ = self._kv.read(key)
            if data is None:
                self._stop.wait(POLL_S)
                continue
            entry = json.loads(data)
            self.left[0] += 1
            if entry.get("failed"):
                raise StorageError(
                    f"{self._kv.url}: process 0 of the group failed, see its message"
                )
            if "unit" not in entry:
                self.left = []
                return
            yield UnitClaim(entry["unit"], entry["attempt"], b"", b"", 0.0)

    def interrupt(self) -> None:
        """Lets `available` end soon, as the work failed."""
        self._stop.set()

    def holds(self, _claim: UnitClaim) -> bool:
        """Returns True: the batches of a unit are run by all processes or none."""
        return True

    def renew(self, _claim: UnitClaim) -> bool:
        """Returns True: the leader renews."""
        return True

    def release(self, _claim: UnitClaim, _published: dict[str, Any] | None = None) -> None:
        """Does nothing: the leader releases."""

    def wait(self) -> None:
        """Does nothing: `available` waits."""
