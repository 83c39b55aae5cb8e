"""Which split a measurement belongs to: pure functions of the seed and the record.

So any engine, any order of files and any number of workers agree. A held-out share is decided by
a keyed hash; the *time* split alone also needs the first and last time of each input.
"""

import numpy as np

from ping_llm.hashing import keyed_hash_addresses, scramble, uniform
from ping_llm.ingest.settings import ATTRIBUTES, PrepareSettings
from ping_llm.places import Places

TRAIN, VALID, TEST = 0, 1, 2  # indices into `rows.SPLITS`


def keyed_hashes(chosen: PrepareSettings, ends: np.ndarray, places: Places | None) -> np.ndarray:
    """Returns the hash of each address [n], or where these are held out, of its AS or country."""
    if places is not None:
        ends = places.groups(ends, ATTRIBUTES[chosen.split])
    return keyed_hash_addresses(ends, chosen.seed)


def by_addresses(chosen: PrepareSettings, src: np.ndarray, dst: np.ndarray) -> np.ndarray:
    """Returns the split of each record where it is not by *time* [n], int8.

    *pair* holds out unordered pairs of addresses. *probe* holds out addresses: a record of which
    either end is held out belongs there, to test before valid, so that a held-out probe is nowhere
    in train. *asn* and *region* hold out all addresses of an AS or a country together.

    Args:
        chosen: Says what is held out, and how much.
        src: `keyed_hashes` of the sources [n].
        dst: The same of the destinations [n].
    """
    if chosen.split != "pair":
        return np.maximum(_held_out(chosen, src), _held_out(chosen, dst))
    return _held_out(chosen, scramble(scramble(np.minimum(src, dst)) ^ np.maximum(src, dst)))


def _held_out(chosen: PrepareSettings, hashes: np.ndarray) -> np.ndarray:
    number = uniform(hashes)
    held_out = number < chosen.test_fraction + chosen.valid_fraction
    return held_out.astype(np.int8) + (number < chosen.test_fraction)


def time_cuts(
    chosen: PrepareSettings, first: int | np.ndarray, last: int | np.ndarray
) -> np.ndarray:
    """Returns the last second of train, and of valid, of inputs that span [first, last] [I, 2]."""
    shares = chosen.valid_fraction, chosen.test_fraction
    valid, test = ((share * (last - np.asarray(first))).astype(np.int64) for share in shares)
    return np.stack([last - test - valid, last - test], axis=-1)


def by_time(time: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """Returns the split of each record where the end of each input is held out [n], int8.

    Args:
        time: Seconds since 1970 [n].
        cuts: `time_cuts` of each record's input [n, 2].
    """
    return (time > cuts[:, 0]).astype(np.int8) + (time > cuts[:, 1])
