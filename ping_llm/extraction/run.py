"""Extraction from start to end: prompts in, activations out, and on again after any stop."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ping_llm import __version__, sharding
from ping_llm.activations import store
from ping_llm.activations.claims import Claims
from ping_llm.errors import ConfigError
from ping_llm.extraction.batches import make_batches
from ping_llm.extraction.config import ExtractionConfig, parse_layers, parse_sites
from ping_llm.extraction.group import Follower, Leader
from ping_llm.extraction.model import Extractor, ModelSource, identity, open_model
from ping_llm.extraction.prompts import PromptSource, open_source
from ping_llm.extraction.worker import Worker
from ping_llm.progress import progress
from ping_llm.storage import KeyValueStore

DEFAULT_BATCH_TOKENS = 8192


@dataclasses.dataclass(frozen=True)
class ExtractResult:
    """What a store holds, and what it took.

    Attributes:
        samples: Number of prompts.
        tokens: Number of tokens, each one row of every array.
        seconds: Time that workers spent on units, loading, compiling and waiting aside.
        tokens_per_second: Of a worker in this time, on average.
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
    lease_seconds: float = 60.0,
    worker_id: str | None = None,
    arc_encoder: str | None = None,
    arc_augmentations: int | None = None,
    arc_colors: str | None = None,
    arc_seed: int | None = None,
    mesh: str = "",
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    limit: int | None = None,
    dry_run: bool = False,
) -> ExtractResult | DryRunResult:
    """Writes the activations of `model` over `input` into the store `output`.

    Any number of workers may do so on one store: each claims units, and returns when all are
    published. Units that are published already are left as they are.

    Args:
        model: Directory of a checkpoint, a hub id, or a run of this package.
        input: A file, directory or glob, local or remote.
        output: Where the store is or is to be, local or remote.
        format: What a record of the input is: text, chat, tokens, arc or measurements.
        layers: `all`, or numbers with commas between; -1 is the last one.
        sites: Names with commas between: residual, attn, mlp, embed, final_norm.
        max_length: Tokens of the longest prompt; None: 2048, or what a run was trained on.
        overlong: What becomes of longer ones: error, truncate-left, truncate-right or split.
        batch_tokens: Tokens computed at once; None: 8192, or `max_length` if that is more.
        dtype: Dtype of the store; None: the model's own.
        compression: none or zstd.
        unit_mb: Size of a work unit, in MB of input.
        lease_seconds: For how long a unit stays with a worker that gives no sign of life; equal for
            all workers of a store.
        worker_id: Name of this worker in what `inspect_activations` shows; None: made up.
        arc_encoder: How the grids of ARC tasks are written, such as `shape-header+separated`; None:
            minimal.
        arc_augmentations: Number of prompts made of each test of a task; None: 1, as it is.
        arc_colors: What their permutations of colours move: keep (nothing), foreground (all but 0)
            or all; None: foreground.
        arc_seed: Decides the augmentations, with the task; None: 0.
        mesh: Sizes of the mesh axes, as for training.
        coordinator: Address of process 0, `host:port`, where several processes hold the model and
            are one worker.
        num_processes: How many there are.
        process_id: Which one this is.
        limit: Number of records to take, the first ones; None: all.
        dry_run: Whether to only say what would be done.

    Raises:
        ConfigError: A setting cannot be, or the store was begun with other settings.
        DataError: The input cannot be read, or a value does not fit `dtype`.
        CheckpointError: The model cannot be read.
        StorageError: The store cannot be written.
    """
    if not lease_seconds > 0:
        raise ConfigError(f"{lease_seconds=} must be above 0")
    sharding.start_processes(coordinator, num_processes, process_id)
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
        arc_encoder=arc_encoder,
        arc_augmentations=arc_augmentations,
        arc_colors=arc_colors,
        arc_seed=arc_seed,
    )
    prompts = open_source(
        str(input),
        cfg,
        model=source.checkpoint,
        vocab_size=source.cfg.vocab_size,
        law=source.law,
    )
    if dry_run:
        return _dry_run(source, prompts, cfg)
    manifest = {
        "schema_version": store.SCHEMA_VERSION,
        "settings": dataclasses.asdict(cfg),
        "model": identity(source),
        "input": prompts.identity,
        "lease_seconds": lease_seconds,
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
    units = len(prompts.units)
    claims = _open_claims(kv, units, worker=worker_id, lease_s=lease_seconds)
    if claims.left:
        extractor = Extractor(source, cfg, sharding.make_mesh(**sharding.parse_mesh(mesh)))
        d_model = source.cfg.d_model
        Worker(
            kv, cfg, prompts, extractor, claims, store_identity=store_identity, d_model=d_model
        ).run()
    if jax.process_index() == 0:
        done = claims.done
        store.remove_stale(kv, done, older_than_s=store.STALE_ATTEMPT_S)
    else:
        done = store.read_all_done(kv, units)
    return _result([done[unit] for unit in sorted(done)], str(output))


def _open_claims(
    kv: KeyValueStore, units: int, *, worker: str | None, lease_s: float
) -> Claims | Follower:
    if jax.process_count() == 1:
        return Claims(kv, units, worker=worker, lease_s=lease_s)
    name = np.frombuffer(store.new_attempt().encode(), np.uint8)
    group = multihost_utils.broadcast_one_to_all(name).tobytes().decode()  # that of process 0
    if jax.process_index() == 0:
        claims = Leader(kv, units, group, worker=worker, lease_s=lease_s)
    else:
        claims = Follower(kv, group)
    if not multihost_utils.broadcast_one_to_all(np.array(bool(claims.left))):
        claims.left.clear()  # process 0 has nothing to do, so nobody has
    return claims


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
    arc_encoder: str | None = None,
    arc_augmentations: int | None = None,
    arc_colors: str | None = None,
    arc_seed: int | None = None,
) -> ExtractionConfig:
    """Returns the settings of `extract_activations` with what was left open filled in."""
    max_length = max_length or source.max_length
    dtype = dtype or source.cfg.dtype
    if format == "arc":
        arc_encoder = "minimal" if arc_encoder is None else arc_encoder
        arc_augmentations = 1 if arc_augmentations is None else arc_augmentations
        arc_colors = "foreground" if arc_colors is None else arc_colors
        arc_seed = 0 if arc_seed is None else arc_seed
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
        arc_encoder=arc_encoder,
        arc_augmentations=arc_augmentations,
        arc_colors=arc_colors,
        arc_seed=arc_seed,
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
