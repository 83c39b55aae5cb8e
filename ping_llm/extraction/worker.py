"""A worker: claims units of a store one after another, computes them and publishes them.

Three threads share the work: one claims units and reads and packs their prompts, the main one keeps
the device busy, one takes results from the device and writes them. Each waits for the next, so
memory stays bounded. What is computed is whatever it is given as `forward`.
"""

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import tensorstore as ts

from ping_llm.activations.arrays import ColumnSlice
from ping_llm.activations.begin import check_store
from ping_llm.activations.claims import Claims, UnitClaim
from ping_llm.activations.store import UnitPrompts, site_arrays
from ping_llm.activations.writer import UnitWriter
from ping_llm.errors import StorageError
from ping_llm.extraction.batches import PackedBatch, make_batches
from ping_llm.extraction.group import Follower
from ping_llm.extraction.prompts import PromptSource
from ping_llm.extraction.settings import ExtractSettings
from ping_llm.progress import Progress, progress
from ping_llm.storage import KeyValueStore

BATCHES_AHEAD = 4  # packed and waiting for the device
RESULTS_BEHIND = 1  # computed and waiting to be taken from the device


class Forward(Protocol):
    """What computes activations.

    Attributes:
        compile_seconds: Time spent on compiling so far.
        peak_device_bytes: Most memory used on one device so far.
        columns: Those of the activations that this process gets.
    """

    compile_seconds: float
    columns: ColumnSlice

    @property
    def peak_device_bytes(self) -> int: ...  # noqa: D102

    def __call__(self, batch: PackedBatch) -> Mapping[str, tuple[Any, Any, Any]]:
        """Returns {site: (activations [n, B, T, D], their norms [n, B, T], their sums [n, D])}."""
        ...

    def to_host(self, result: Mapping[str, tuple[Any, Any, Any]]) -> dict[str, list[np.ndarray]]:
        """Returns what a call returned, once it is there, of D only this process's columns."""
        ...


@dataclasses.dataclass(frozen=True)
class _UnitStep:
    """One step of a unit: a batch, or its end, where there is none."""

    claim: UnitClaim
    prompts: UnitPrompts
    batch: PackedBatch | None


class Worker:
    """One worker of a store; others may work on it at the same time."""

    def __init__(
        self,
        kv: KeyValueStore,
        cfg: ExtractSettings,
        source: PromptSource,
        forward: Forward,
        claims: Claims | Follower,
        *,
        store_identity: str,
        widths: Mapping[str, int],
    ):
        """Takes what it works with.

        Args:
            kv: The store.
            cfg: Its settings.
            source: The prompts.
            forward: What computes their activations.
            claims: This worker's claims on the store's units, or where in its group to look for
                them.
            store_identity: Hash of what decides the store's content.
            widths: The activation arrays with their width.
        """
        self._kv, self._cfg, self._source = kv, cfg, source
        self._forward, self._claims = forward, claims
        self._identity, self._widths = store_identity, widths
        self._stored = {
            "dtype": np.dtype(ts.dtype(cfg.dtype or "").numpy_dtype),
            "zstd": cfg.compression == "zstd",
            "store_identity": store_identity,
            "columns": forward.columns,
        }
        self._sites = site_arrays(cfg.sites, cfg.kept_layers)
        self._writer: UnitWriter | None = None  # of the unit that is being written
        self._failed = False
        self._computed = 0
        self._clock, self._compiling = time.monotonic(), 0.0

    def run(self) -> dict[int, dict[str, Any]]:
        """Returns {unit: its commit marker} once all units are published, by any worker.

        Raises:
            DataError: A prompt cannot be read, or a value does not fit the store's dtype.
            StorageError: The store cannot be read or written.
        """
        claims = self._claims
        total, before = len(self._source.units), len(claims.done)
        with claims, progress("extract", total=total, unit="units", initial=before) as bar:
            while claims.left:
                self._work_on_available(bar)
                bar.update(done=len(claims.done))
                if claims.left:
                    claims.wait()
        return claims.done

    def _work_on_available(self, bar: Progress) -> None:
        """Computes what can be claimed now; when it returns, that is published or given up."""
        behind: deque[Future[None]] = deque()
        self._clock = started = time.monotonic()
        tokens = 0
        with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as writing:

            def write(work: Callable[..., None], *arguments: Any) -> None:
                behind.append(writing.submit(self._unless_failed, work, *arguments))

            try:
                for step in _prefetch(reading, self._steps(), BATCHES_AHEAD):
                    if step.batch is None:
                        write(self._publish, step)
                    # A group runs all batches of a unit, as its processes cannot tell each other.
                    elif self._forward.columns.count > 1 or self._claims.holds(step.claim):
                        write(self._store, step, self._forward(step.batch))
                        tokens += int(step.batch.pieces[:, 2].sum())
                        rate = tokens / (time.monotonic() - started)
                        bar.update(done=len(self._claims.done), note=f"{rate:,.0f} tokens/s")
                    while len(behind) > RESULTS_BEHIND:
                        behind.popleft().result()
                while behind:
                    behind.popleft().result()
            except BaseException:
                self._claims.interrupt()
                reading.shutdown(wait=False, cancel_futures=True)
                for future in behind:
                    future.cancel()
                with contextlib.suppress(StorageError):  # else it is garbage, removed by age
                    writing.submit(self._discard).result()
                raise

    def _steps(self) -> Iterator[_UnitStep]:
        for claim in self._claims.available():
            prompts = self._source.read(self._source.units[claim.unit])
            for batch in make_batches(prompts, self._cfg, values=sum(self._widths.values())):
                yield _UnitStep(claim, prompts, batch)
            yield _UnitStep(claim, prompts, None)

    # What follows runs in the writing thread.

    def _unless_failed(self, work: Callable[..., None], *arguments: Any) -> None:
        """Does a step's work, but none after one that failed: nothing is published without it."""
        if self._failed:
            return
        try:
            work(*arguments)
        except BaseException:
            self._failed = True
            self._claims.interrupt()  # so that nothing waits for another unit
            raise

    def _begun(self, step: _UnitStep) -> UnitWriter:
        if self._writer is None:
            unit, attempt = step.claim.unit, step.claim.attempt
            kept = self._cfg.kept_tokens(step.prompts.positions, step.prompts.is_last)
            self._writer = UnitWriter(
                self._kv, unit, attempt, self._widths, step.prompts, kept=kept, **self._stored
            )
        return self._writer

    def _store(self, step: _UnitStep, result: Mapping[str, tuple[Any, Any, Any]]) -> None:
        assert step.batch is not None
        writer = self._begun(step)
        self._computed += step.batch.tokens.size
        kept = self._forward.to_host(result)
        pieces = step.batch.pieces.tolist()
        for name, (site, layer) in self._sites.items():
            activations, norms, sums = kept[site]
            writer.add_sum(name, sums[layer])
            for row, column, length, start in pieces:
                piece = layer, row, slice(column, column + length)
                writer.put(name, start, activations[piece], norms[piece])

    def _publish(self, step: _UnitStep) -> None:
        now = time.monotonic()
        compiling = self._forward.compile_seconds - self._compiling
        self._compiling += compiling
        notes = {
            "worker": self._claims.worker,
            "seconds": now - self._clock - compiling,
            "computed_tokens": self._computed,
            "peak_device_bytes": self._forward.peak_device_bytes,
        }
        writer, published = self._begun(step), None
        if self._claims.holds(step.claim):
            done = writer.finish(notes)
            # Asked once more: a machine that was asleep does not see by its clock for how long.
            if done is not None and self._claims.renew(step.claim):
                check_store(self._kv, self._identity)
                published = writer.commit(done)
        if published is None or published["attempt"] != writer.attempt:
            writer.discard()
        self._claims.release(step.claim, published)
        self._clock, self._computed, self._writer = now, 0, None

    def _discard(self) -> None:
        if self._writer is not None:
            self._writer.discard()


def _prefetch(
    pool: ThreadPoolExecutor, source: Iterator[_UnitStep], depth: int
) -> Iterator[_UnitStep]:
    """Yields what `source` does, which runs in the thread of `pool`, `depth` elements ahead."""
    ahead = deque(pool.submit(next, source, None) for _ in range(depth))
    while (step := ahead.popleft().result()) is not None:
        ahead.append(pool.submit(next, source, None))
        yield step
