"""Extraction from start to end: prompts in, activations out, and on again after any stop.

Three threads share the work: one reads and packs prompts, the main one keeps the device busy, one
takes results from the device and writes them. Each waits for the next, so memory stays bounded.
"""

import dataclasses
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from ping_llm import __version__, sharding
from ping_llm.extraction import store
from ping_llm.extraction.batches import PackedBatch, make_batches
from ping_llm.extraction.config import ExtractionConfig, parse_layers, parse_sites
from ping_llm.extraction.model import (
    Extractor,
    ModelSource,
    identity,
    open_model,
    peak_device_bytes,
)
from ping_llm.extraction.prompts import Prompts, PromptSource, open_source
from ping_llm.progress import progress
from ping_llm.storage import KeyValueStore

DEFAULT_BATCH_TOKENS = 8192
BATCHES_AHEAD = 4  # packed and waiting for the device
RESULTS_BEHIND = 1  # computed and waiting to be taken from the device

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ExtractResult:
    """What a store holds, and what it took.

    Attributes:
        samples: Number of prompts.
        tokens: Number of tokens, each one row of every array.
        seconds: Time spent on units, loading and compiling aside.
        tokens_per_second: Of these.
        bytes_written: Size of all arrays, before compression.
        units_done: Number of published work units.
        units: Number of all work units.
        peak_device_bytes: Most memory used on one device; on a CPU, by the process.
        padding_fraction: Part of what was computed that was padding.
        overlong: Number of prompts that were longer than allowed.
        empty: Number of prompts without a token.
        output: Where the store is.
    """

    samples: int
    tokens: int
    seconds: float
    tokens_per_second: float
    bytes_written: int
    units_done: int
    units: int
    peak_device_bytes: int
    padding_fraction: float
    overlong: int
    empty: int
    output: str


@dataclasses.dataclass(frozen=True)
class DryRunResult:
    """What an extraction would do.

    Attributes:
        samples: Number of prompts.
        tokens: Number of tokens.
        units: Number of work units.
        bytes_by_array: Size of each array, before compression.
        bytes: Of all of them.
        shapes: Shapes [B, T] that would be compiled.
        padding_fraction: Part of what would be computed that is padding.
        overlong: Number of prompts that are longer than allowed.
        empty: Number of prompts without a token.
    """

    samples: int
    tokens: int
    units: int
    bytes_by_array: dict[str, int]
    bytes: int
    shapes: list[list[int]]
    padding_fraction: float
    overlong: int
    empty: int


def extract_activations(
    model: str | Path,
    input: str | Path,  # noqa: A002
    output: str | Path,
    *,
    format: str = "text",  # noqa: A002
    layers: str = "all",
    sites: str = "residual",
    max_length: int | None = None,
    overlong: str = "error",
    batch_tokens: int | None = None,
    dtype: str | None = None,
    compression: str = "none",
    unit_mb: float = 1.0,
    mesh: str = "",
    limit: int | None = None,
    dry_run: bool = False,
) -> ExtractResult | DryRunResult:
    """Writes the activations of `model` over `input` into the store `output`.

    Units that are published already are left as they are.

    Args:
        model: Directory of a checkpoint, a hub id, or a run of this package.
        input: A file, directory or glob, local or remote.
        output: Where the store is or is to be, local or remote.
        format: What a record of the input is: text, chat, tokens or measurements.
        layers: `all`, or numbers with commas between; -1 is the last one.
        sites: Names with commas between: residual, attn, mlp, embed, final_norm.
        max_length: Tokens of the longest prompt; None: 2048, or what a run was trained on.
        overlong: What becomes of longer ones: error, truncate-left, truncate-right or split.
        batch_tokens: Tokens computed at once; None: 8192, or `max_length` if that is more.
        dtype: Dtype of the store; None: the model's own.
        compression: none or zstd.
        unit_mb: Size of a work unit, in MB of input.
        mesh: Sizes of the mesh axes, as for training.
        limit: Number of records to take, the first ones; None: all.
        dry_run: Whether to only say what would be done.

    Raises:
        ConfigError: A setting cannot be, or the store was begun with other settings.
        DataError: The input cannot be read, or a value does not fit `dtype`.
        CheckpointError: The model cannot be read.
        StorageError: The store cannot be written.
    """
    source = open_model(model)
    cfg = make_config(
        source,
        format=format,
        layers=layers,
        sites=sites,
        max_length=max_length,
        overlong=overlong,
        batch_tokens=batch_tokens,
        dtype=dtype,
        compression=compression,
        unit_mb=unit_mb,
        limit=limit,
    )
    prompts = open_source(
        str(input), cfg, model=source.checkpoint, vocab_size=source.cfg.vocab_size
    )
    if dry_run:
        return _dry_run(source, prompts, cfg)
    manifest = {
        "schema_version": store.SCHEMA_VERSION,
        "settings": dataclasses.asdict(cfg),
        "model": identity(source),
        "input": prompts.identity,
        "d_model": source.cfg.d_model,
        "arrays": [
            {"name": name, "site": site, "layer": cfg.layers[place] if "." in name else None}
            for name, (site, place) in cfg.arrays.items()
        ],
        "units": [dataclasses.astuple(unit) for unit in prompts.units],
        "made_from": {
            "model": source.name,
            "input": str(input),
            "ping_llm": __version__,
            "jax": jax.__version__,
            "platform": jax.default_backend(),
        },
    }
    kv = KeyValueStore(output)
    store_identity = store.identity(store.open_store(kv, manifest))
    done = store.read_all_done(kv, len(prompts.units))
    todo = [unit for unit in range(len(prompts.units)) if unit not in done]
    if todo:
        device_mesh = sharding.make_mesh(**sharding.parse_mesh(mesh))
        extractor = Extractor(source, cfg, device_mesh)
        work = _Work(kv, cfg, prompts, extractor, store_identity, source.cfg.d_model)
        done |= work.run(todo)
    store.remove_stale(kv, done, older_than_s=store.STALE_ATTEMPT_S)
    return _result(list(done.values()), str(output))


def make_config(
    source: ModelSource,
    *,
    format: str,  # noqa: A002
    layers: str,
    sites: str,
    max_length: int | None,
    batch_tokens: int | None,
    dtype: str | None,
    unit_mb: float,
    overlong: str = "error",
    compression: str = "none",
    limit: int | None = None,
) -> ExtractionConfig:
    """Returns the settings of `extract_activations` with what was left open filled in."""
    max_length = max_length or source.max_length
    dtype = dtype or source.cfg.dtype
    return ExtractionConfig(
        format=format,
        layers=parse_layers(layers, source.cfg.n_layers),
        sites=parse_sites(sites),
        max_length=max_length,
        overlong=overlong,
        batch_tokens=batch_tokens or max(DEFAULT_BATCH_TOKENS, max_length),
        dtype=dtype,
        compute_dtype=source.compute_dtype(dtype),
        compression=compression,
        unit_mb=unit_mb,
        limit=limit,
    )


def _result(done: list[dict[str, Any]], output: str) -> ExtractResult:
    def total(name: str) -> Any:
        return sum(entry[name] for entry in done)

    tokens, seconds = total("tokens"), total("seconds")
    return ExtractResult(
        samples=total("samples"),
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        bytes_written=total("bytes"),
        units_done=len(done),
        units=len(done),
        peak_device_bytes=max(entry["peak_device_bytes"] for entry in done),
        padding_fraction=1 - tokens / max(total("computed_tokens"), 1),
        overlong=total("overlong"),
        empty=total("empty"),
        output=output,
    )


def _dry_run(source: ModelSource, prompts: PromptSource, cfg: ExtractionConfig) -> DryRunResult:
    samples = tokens = computed = overlong = empty = 0
    shapes = set()
    with progress("tokenise", total=len(prompts.units), unit="units") as bar:
        for unit in prompts.units:
            part = prompts.read(unit)
            samples, tokens = samples + len(part.ids), tokens + len(part.tokens)
            overlong, empty = overlong + part.overlong, empty + part.empty
            for batch in make_batches(part, cfg, d_model=source.cfg.d_model):
                shapes.add(batch.tokens.shape)
                computed += batch.tokens.size
            bar.update(1)
    row = source.cfg.d_model * np.dtype(jax.numpy.dtype(cfg.dtype)).itemsize
    by_array = dict.fromkeys(cfg.arrays, tokens * row)
    return DryRunResult(
        samples=samples,
        tokens=tokens,
        units=len(prompts.units),
        bytes_by_array=by_array,
        bytes=sum(by_array.values()),
        shapes=[list(shape) for shape in sorted(shapes)],
        padding_fraction=1 - tokens / max(computed, 1),
        overlong=overlong,
        empty=empty,
    )


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step of a unit: a batch, or its end, where there is none."""

    unit: int
    prompts: Prompts
    batch: PackedBatch | None


class _Work:
    """What the threads share."""

    def __init__(
        self,
        kv: KeyValueStore,
        cfg: ExtractionConfig,
        source: PromptSource,
        extractor: Extractor,
        store_identity: str,
        d_model: int,
    ):
        self._kv, self._cfg, self._source = kv, cfg, source
        self._extractor, self._identity = extractor, store_identity
        self._d_model = d_model
        element = np.dtype(jax.numpy.dtype(cfg.dtype))
        self._arrays = [store.ArraySpec(name, d_model, element) for name in cfg.arrays]
        self._writer: store.UnitWriter | None = None  # of the unit that is being written
        self._computed = 0
        self._clock, self._compiling = time.monotonic(), 0.0

    def run(self, todo: list[int]) -> dict[int, dict[str, Any]]:
        """Returns {unit: its commit marker} once all of `todo` are published."""
        done: dict[int, dict[str, Any]] = {}
        behind: deque[Future[dict[str, Any] | None]] = deque()
        tokens, started = 0, time.monotonic()
        on_cpu = jax.default_backend() == "cpu"

        def finish_oldest() -> None:
            published = behind.popleft().result()
            if published is not None:
                done[published["unit"]] = published
                bar.update(1)

        with (
            progress("extract", total=len(todo), unit="units") as bar,
            Prefetch(self._steps(todo), BATCHES_AHEAD) as steps,
            ThreadPoolExecutor(1) as writing,
        ):
            try:
                for step in steps:
                    if step.batch is None:
                        behind.append(writing.submit(self._publish, step))
                    else:
                        result = self._extractor(step.batch)
                        if on_cpu:  # where two batches would share the cores
                            jax.block_until_ready(result)
                        behind.append(writing.submit(self._store, step, result))
                        tokens += int(step.batch.pieces[:, 2].sum())
                        rate = tokens / (time.monotonic() - started)
                        bar.update(note=f"{rate:,.0f} tokens/s")
                    while len(behind) > RESULTS_BEHIND:
                        finish_oldest()
                while behind:
                    finish_oldest()
            except BaseException:
                for future in behind:
                    future.cancel()
                writing.submit(self._discard).result()
                raise
        return done

    def _steps(self, todo: list[int]) -> Iterator[_Step]:
        for unit in todo:
            prompts = self._source.read(self._source.units[unit])
            for batch in make_batches(prompts, self._cfg, d_model=self._d_model):
                yield _Step(unit, prompts, batch)
            yield _Step(unit, prompts, None)

    # What follows runs in the writing thread.

    def _begun(self, step: _Step) -> store.UnitWriter:
        if self._writer is None:
            self._writer = store.UnitWriter(
                self._kv,
                step.unit,
                self._arrays,
                step.prompts,
                zstd=self._cfg.compression == "zstd",
                store_identity=self._identity,
            )
        return self._writer

    def _store(self, step: _Step, result: dict[str, tuple[jax.Array, ...]]) -> None:
        assert step.batch is not None
        writer = self._begun(step)
        self._computed += step.batch.tokens.size
        for site, arrays in result.items():
            activations, norms, sums = (np.asarray(array) for array in arrays)
            for name, (array_site, place) in self._cfg.arrays.items():
                if array_site != site:
                    continue
                writer.add_sum(name, sums[place])
                for row, column, length, start in step.batch.pieces.tolist():
                    at = place, row, slice(column, column + length)
                    writer.put(name, start, activations[at], norms[at])

    def _publish(self, step: _Step) -> dict[str, Any]:
        now = time.monotonic()
        compiling = self._extractor.compile_seconds - self._compiling
        self._compiling += compiling
        notes = {
            "seconds": now - self._clock - compiling,
            "computed_tokens": self._computed,
            "peak_device_bytes": peak_device_bytes(),
        }
        writer = self._begun(step)
        published, ours = writer.publish(notes)
        if not ours:
            writer.discard()
        self._clock, self._computed, self._writer = now, 0, None
        return published

    def _discard(self) -> None:
        if self._writer is not None:
            self._writer.discard()


class Prefetch(Iterator[T]):
    """Runs an iterable in a thread of its own, a few elements ahead; a context manager."""

    def __init__(self, source: Iterable[T], depth: int):
        self._queue: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(source,), daemon=True)

    def _fill(self, source: Iterable[T]) -> None:
        try:
            for element in source:
                self._put(True, element)
                if self._stop.is_set():
                    return
            self._put(False, StopIteration())
        except Exception as error:  # raised again by __next__
            self._put(False, error)

    def _put(self, more: bool, element: Any) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put((more, element), timeout=0.1)
                return
            except queue.Full:
                continue

    def __next__(self) -> T:
        more, element = self._queue.get()
        if not more:
            raise element
        return element

    def __enter__(self) -> "Prefetch[T]":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
