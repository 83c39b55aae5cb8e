"""Extraction from start to end: prompts in, activations out, and on again after any stop."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ping_llm import __version__, outputs, settings, sharding
from ping_llm.activations import store
from ping_llm.activations.begin import open_store
from ping_llm.activations.claims import Claims
from ping_llm.extraction.batches import make_batches
from ping_llm.extraction.extractor import Extractor
from ping_llm.extraction.group import Follower, Leader
from ping_llm.extraction.model import ModelSource, open_model
from ping_llm.extraction.prompts import PromptSource, open_source
from ping_llm.extraction.settings import ExtractSettings
from ping_llm.extraction.worker import Worker
from ping_llm.progress import progress
from ping_llm.storage import KeyValueStore, Location


@dataclasses.dataclass(frozen=True)
class ExtractResult:
    """What a store holds, and what it took.

    Attributes:
        samples: Number of prompts.
        tokens: Number of tokens stored, each one row of every array.
        seconds: Time that workers spent on units, loading, compiling and waiting aside.
        tokens_per_second: Tokens of prompts that a worker computed in this time, on average.
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
        tokens: Number of tokens that would be stored.
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


@settings.takes(ExtractSettings)
def extract_activations(chosen: ExtractSettings) -> ExtractResult | DryRunResult:
    """Writes the activations of `model` over `input` into the store `output`.

    Any number of workers may do so on one store: each claims units, and returns when all are
    published. Units that are published already are left as they are.

    Raises:
        ConfigError: A setting cannot be, or the store was begun with other settings.
        DataError: The input cannot be read, or a value does not fit `dtype`.
        CheckpointError: The model cannot be read.
        StorageError: The store cannot be written.
    """
    sharding.start_processes(chosen.coordinator, chosen.num_processes, chosen.process_id)
    model = open_model(chosen.model)
    cfg = model.fill_in(chosen)
    arrays = store.site_arrays(cfg.sites, cfg.kept_layers)
    widths = {name: model.cfg.width_of(site) for name, (site, _) in arrays.items()}
    prompts = open_source(
        cfg, model=model.checkpoint, vocab_size=model.cfg.vocab_size, sampling=model.sampling
    )
    if cfg.dry_run:
        return _dry_run(cfg, prompts, widths)
    mesh = sharding.make_mesh(**sharding.parse_mesh(cfg.mesh))
    output = Location.of(cfg.output)
    with outputs.claim(output, what="extract-activations", shared=True):
        kv = output.kv()
        identity = open_store(kv, _manifest(cfg, model, prompts))
        claims = _open_claims(kv, len(prompts.units), cfg)
        if claims.left:
            forward = Extractor(model, cfg, mesh)
            store_facts = {"store_identity": identity, "widths": widths}
            Worker(kv, cfg, prompts, forward, claims, **store_facts).run()
        if jax.process_index() == 0:
            done = claims.done
            store.remove_stale(kv, done, older_than_s=store.STALE_ATTEMPT_S)
        else:
            done = store.read_all_done(kv, len(prompts.units))
    return _result([done[unit] for unit in sorted(done)], cfg.output)


def _manifest(cfg: ExtractSettings, model: ModelSource, prompts: PromptSource) -> dict[str, Any]:
    layers = cfg.kept_layers
    numbered = {"layers": layers, "compute_dtype": model.compute_dtype(cfg.dtype)}
    return {
        "schema_version": store.SCHEMA_VERSION,
        "settings": settings.to_json(cfg) | numbered,
        "model": model.identity,
        "input": prompts.identity,
        "lease_seconds": cfg.lease_seconds,
        "d_model": model.cfg.d_model,
        "arrays": [
            {
                "name": name,
                "site": site,
                "layer": layers[index] if "." in name else None,
                "width": model.cfg.width_of(site),
            }
            for name, (site, index) in store.site_arrays(cfg.sites, layers).items()
        ],
        "units": [dataclasses.astuple(unit) for unit in prompts.units],
        "made_from": {
            "model": model.name,
            "input": cfg.input,
            "ping_llm": __version__,
            "jax": jax.__version__,
            "platform": jax.default_backend(),
        },
    }


def _open_claims(kv: KeyValueStore, units: int, cfg: ExtractSettings) -> Claims | Follower:
    def claims(kind: Callable[..., Claims], *group: str) -> Claims:
        return kind(kv, units, *group, worker=cfg.worker_id, lease_s=cfg.lease_seconds)

    if jax.process_count() == 1:
        return claims(Claims)
    name = np.frombuffer(store.new_attempt().encode(), np.uint8)
    group = multihost_utils.broadcast_one_to_all(name).tobytes().decode()  # that of process 0
    shared = claims(Leader, group) if jax.process_index() == 0 else Follower(kv, group)
    if not multihost_utils.broadcast_one_to_all(np.array(bool(shared.left))):
        shared.left.clear()  # process 0 has nothing to do, so nobody has
    return shared


def _result(done: list[dict[str, Any]], output: str) -> ExtractResult:
    counts = store.totals(done, "samples", "tokens", "seconds", "overlong", "empty")
    sizes = store.totals(done, "bytes", "computed_tokens")
    seconds = counts["seconds"]
    tokens = sum(entry.get("prompt_tokens", entry["tokens"]) for entry in done)
    return ExtractResult(
        **counts,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        bytes_written=sizes["bytes"],
        units_done=len(done),
        units=len(done),
        peak_device_bytes=max(entry["peak_device_bytes"] for entry in done),
        padding_fraction=1 - tokens / max(sizes["computed_tokens"], 1),
        output=output,
    )


def _dry_run(
    cfg: ExtractSettings, prompts: PromptSource, widths: Mapping[str, int]
) -> DryRunResult:
    counts: Counter[str] = Counter()
    tokens, computed, shapes = 0, 0, set()
    with progress("tokenise", total=len(prompts.units), unit="units") as bar:
        for unit in prompts.units:
            read = prompts.read(unit)
            counts.update(read.counts)
            tokens += int(np.count_nonzero(cfg.kept_tokens(read.positions, read.is_last)))
            for batch in make_batches(read, cfg, values=sum(widths.values())):
                shapes.add(batch.tokens.shape)
                computed += batch.tokens.size
            bar.update(1)
    itemsize = jnp.dtype(cfg.dtype).itemsize
    by_array = {name: tokens * width * itemsize for name, width in widths.items()}
    return DryRunResult(
        **counts | {"tokens": tokens},
        units=len(prompts.units),
        bytes_by_array=by_array,
        bytes=sum(by_array.values()),
        shapes=[list(shape) for shape in sorted(shapes)],
        padding_fraction=1 - counts["tokens"] / max(computed, 1),
    )
