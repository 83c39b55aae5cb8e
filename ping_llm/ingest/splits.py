"""Which split a measurement belongs to: pure functions of the seed and the record.

So any engine, any order of files and any number of workers agree. A held-out share is decided by
a keyed hash; the *time* split alone also needs the first and last time of each input.
"""

import dataclasses

import numpy as np

from ping_llm.errors import ConfigError
from ping_llm.hashing import scramble

TRAIN, VALID, TEST = 0, 1, 2  # indices into `rows.SPLITS`
METHODS = ("pair", "time", "probe")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitRule:
    """How measurements are dealt out to train, valid and test.

    *pair* holds out unordered pairs of addresses. *probe* holds out addresses: a record of which
    either end is held out belongs there, to test before valid, so that a held-out probe is nowhere
    in train. *time* holds out the end of each input's span of time.

    Attributes:
        split: "pair", "time" or "probe".
        valid_fraction: Share of valid.
        test_fraction: Share of test.
        seed: Key of the hashes that decide *pair* and *probe*.
    """

    split: str
    valid_fraction: float
    test_fraction: float
    seed: int

    def __post_init__(self) -> None:
        if self.split not in METHODS:
            raise ConfigError(f"split={self.split!r} is not one of {', '.join(METHODS)}")
        for name in ("valid_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.valid_fraction + self.test_fraction >= 1:
            raise ConfigError(
                f"valid_fraction={self.valid_fraction} and test_fraction={self.test_fraction} "
                "leave nothing to train on; their sum must be below 1"
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} must be at least 0 and below 2**63")

    def by_addresses(self, src: np.ndarray, dst: np.ndarray) -> np.ndarray:
        """Returns the split of each record for *pair* and *probe* [n], int8.

        Args:
            src: `keyed_hash_addresses` of the sources, by `seed` [n].
            dst: The same of the destinations [n].
        """
        if self.split == "probe":
            return np.maximum(self._held_out(src), self._held_out(dst))
        return self._held_out(scramble(scramble(np.minimum(src, dst)) ^ np.maximum(src, dst)))

    def _held_out(self, hashes: np.ndarray) -> np.ndarray:
        uniform = (hashes >> np.uint64(11)) * 2.0**-53
        held_out = uniform < self.test_fraction + self.valid_fraction
        return held_out.astype(np.int8) + (uniform < self.test_fraction)

    def time_cuts(self, first: int, last: int) -> tuple[int, int]:
        """Returns the last second of train, and of valid, of an input that spans [first, last]."""
        span = last - first
        test_after = last - int(self.test_fraction * span)
        return test_after - int(self.valid_fraction * span), test_after

    def by_time(self, event_time: np.ndarray, cuts: np.ndarray) -> np.ndarray:
        """Returns the split of each record for *time* [n], int8.

        Args:
            event_time: Seconds since 1970 [n].
            cuts: `time_cuts` of each record's input [n, 2].
        """
        return (event_time > cuts[:, 0]).astype(np.int8) + (event_time > cuts[:, 1])
