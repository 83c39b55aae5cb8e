"""Workers of a store that compute with NumPy, and stores that die under them, for tests."""

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from extraction_settings import settings
from stores import assert_equal_stores

from ping_llm.activations import store
from ping_llm.activations.arrays import ColumnSlice
from ping_llm.activations.begin import open_store
from ping_llm.activations.claims import Claims
from ping_llm.activations.inspection import inspect_activations
from ping_llm.activations.store import UnitPrompts, site_arrays
from ping_llm.errors import StorageError
from ping_llm.extraction.records import WorkUnit
from ping_llm.extraction.worker import Worker
from ping_llm.settings import to_json
from ping_llm.storage import KeyValueStore

WIDTH = 8
CONFIG = settings(sites=("embed", "residual"))
TABLE = np.random.default_rng(0).standard_normal((100, WIDTH)).astype(np.float32)


class MadeUpPrompts:
    """Prompts that depend on their unit only, some of them empty."""

    def __init__(self, units: int, *, samples: int = 6):
        self.identity = {"units": units, "samples": samples}
        self.units = [WorkUnit(0, unit, unit + 1) for unit in range(units)]
        self._samples = samples

    def read(self, unit: WorkUnit) -> UnitPrompts:
        rng = np.random.default_rng(unit.start)
        lengths = rng.integers(0, 60, self._samples)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = rng.integers(0, len(TABLE), offsets[-1]).astype(np.int32)
        ids = [f"{unit.start}/{sample}" for sample in range(self._samples)]
        empty = int((lengths == 0).sum())
        return UnitPrompts(tokens, offsets, np.zeros(len(tokens), np.uint8), ids, 0, empty)


class NumpyForward:
    """Activations that depend on a token and its position."""

    compile_seconds = 0.0
    peak_device_bytes = 1
    columns = ColumnSlice()

    def to_host(self, result):
        return result

    def __call__(self, batch):
        embed = TABLE[batch.tokens]  # [B, T, D]
        residual = embed * (1 + batch.positions[..., None]).astype(np.float32)
        real = (batch.segment_ids != 0)[..., None]

        def finish(x):
            x = np.where(real, x, 0)[None]
            return x, np.linalg.norm(x, axis=-1), x.sum((1, 2))

        return {"embed": finish(embed), "residual": finish(residual)}


def work(kv, prompts, *, lease_s=60.0, worker=None, forward=None, clock=time.monotonic):
    """Runs one worker until every unit is published; returns its `Claims`."""
    manifest = {
        "schema_version": store.SCHEMA_VERSION,
        "settings": to_json(CONFIG),
        "model": {},
        "input": prompts.identity,
        "lease_seconds": lease_s,
        "d_model": WIDTH,
        "arrays": [
            {"name": name, "site": site, "layer": 0 if "." in name else None}
            for name, (site, _) in site_arrays(CONFIG.sites, CONFIG.kept_layers).items()
        ],
        "units": [dataclasses.astuple(unit) for unit in prompts.units],
        "made_from": {"model": "numpy", "input": "made up"},
    }
    identity = open_store(kv, manifest)
    claims = Claims(kv, len(prompts.units), worker=worker, lease_s=lease_s, clock=clock)
    forward = forward or NumpyForward()
    widths = dict.fromkeys(site_arrays(CONFIG.sites, CONFIG.kept_layers), WIDTH)
    Worker(kv, CONFIG, prompts, forward, claims, store_identity=identity, widths=widths).run()
    return claims


def assert_whole_and_equal(url, expected):
    """Asserts that a store is complete, undamaged, and equal to another by sample and position."""
    found = inspect_activations(str(url), verify=True)
    assert found.errors == []
    assert found.complete
    assert_equal_stores(url, expected)


class KilledError(StorageError):
    """What a worker meets when it is dead: nothing it asks of the store is done any more."""


class DyingStore(KeyValueStore):
    """A store as a worker sees it that dies at its n-th operation, before or after its effect.

    Attributes:
        created: The keys of commit markers that this worker created, to be shared.
    """

    def __init__(self, url, created, *, at=None, after=False):
        super().__init__(url)
        self.created, self._at, self._after = created, at, after
        self._count, self._dead, self._lock = 0, False, threading.Lock()

    def _do(self, action, *arguments):
        with self._lock:
            self._count += 1
            dying = self._count == self._at
            if self._dead or (dying and not self._after):
                self._dead = True
                raise KilledError("killed")
            self._dead = dying
        result = action(*arguments)
        if action.__name__ == "swap" and arguments[0].endswith("done.json") and result:
            self.created.append(arguments[0])
        if self._dead:
            raise KilledError("killed")
        return result

    def read(self, key):
        return self._do(super().read, key)

    def write(self, key, value):
        return self._do(super().write, key, value)

    def swap(self, key, value, generation):
        return self._do(super().swap, key, value, generation)

    def delete(self, prefix):
        return self._do(super().delete, prefix)

    def spec(self, key):
        return self._do(super().spec, key)


def round_of_killing(url, prompts, *, seed, workers=8, kills=2, lease_s=0.5):
    """Runs workers on a store, each killed so many times at random.

    Returns (the keys of commit markers created, number of workers killed).

    A killed worker is followed by a new one. The last of each is left alive.
    """
    created, killed = [], []

    def slot(number):
        rng = np.random.default_rng([seed, number])
        for left in range(int(rng.integers(0, kills + 1)), -1, -1):
            at = int(rng.integers(1, 200)) if left else None
            kv = DyingStore(url, created, at=at, after=bool(rng.integers(2)))
            try:
                return work(kv, prompts, lease_s=lease_s)
            except KilledError:
                killed.append(number)
        raise AssertionError("unreachable")

    with ThreadPoolExecutor(workers) as pool:
        ended = list(pool.map(slot, range(workers)))
    assert all(claims.left == [] for claims in ended)
    return created, len(killed)
