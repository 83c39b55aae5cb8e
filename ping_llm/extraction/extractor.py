"""A loaded model with its compiled forward pass: from packed batches to activations."""

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ping_llm import environment, sharding
from ping_llm.activations.arrays import ColumnSlice
from ping_llm.errors import ConfigError
from ping_llm.extraction.batches import PackedBatch
from ping_llm.extraction.model import ModelSource
from ping_llm.extraction.settings import ExtractSettings


class Extractor:
    """A loaded model with its compiled forward pass.

    Attributes:
        compile_seconds: Time spent on compiling so far.
        columns: Those of the activations that this process holds.
    """

    def __init__(self, source: ModelSource, cfg: ExtractSettings, mesh: Mesh):
        self._mesh = mesh
        self._exact = source.compute_dtype(cfg.dtype) == "float32"
        slices = {_column_slice(mesh, site, source.cfg.width_of(site)) for site in cfg.sites}
        (self.columns,) = slices  # the same part of each
        self._multiple = mesh.shape["data"] * mesh.shape["fsdp"]  # of the rows of a batch
        graphdef, self._params = source.load(cfg, mesh)
        self._forward = _make_forward(graphdef, cfg, mesh)
        self._compiled: dict[tuple[int, ...], Any] = {}
        self.compile_seconds = 0.0

    def __call__(self, batch: PackedBatch) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
        """Returns {site: (activations [n, B, T, D], their norms [n, B, T], their sums [n, D])}.

        Sums are of the tokens that are kept. Norms are 0 at others, and those of the stored values:
        not finite where one does not fit the dtype.
        """
        by_rows = NamedSharding(self._mesh, sharding.BATCH_BT)
        missing = -len(batch.tokens) % self._multiple

        def distribute(array: np.ndarray) -> jax.Array:
            rows = np.pad(array, ((0, missing), (0, 0)))
            return jax.make_array_from_callback(rows.shape, by_rows, rows.__getitem__)

        arrays = [distribute(a) for a in (batch.tokens, batch.segment_ids, batch.positions)]
        shape = arrays[0].shape
        if shape not in self._compiled:
            started = time.monotonic()
            # Force full float32 matmuls; GPUs and TPUs default to lower precision.
            precision = jax.default_matmul_precision("highest" if self._exact else "default")
            with environment.signals_held(), jax.set_mesh(self._mesh), precision:
                lowered = self._forward.lower(self._params, *arrays)
                self._compiled[shape] = lowered.compile()
            self.compile_seconds += time.monotonic() - started
        result = self._compiled[shape](self._params, *arrays)
        if jax.default_backend() == "cpu":  # where two batches would share the cores
            jax.block_until_ready(result)
        return result

    def to_host(self, result: Mapping[str, tuple[jax.Array, ...]]) -> dict[str, list[np.ndarray]]:
        """Returns what a call returned, of D only this process's columns."""
        return {
            site: [_own_columns(activations), *map(np.asarray, replicated)]
            for site, (activations, *replicated) in result.items()
        }

    @property
    def peak_device_bytes(self) -> int:
        """The most memory used on one device so far; on a CPU, by the process."""
        return sharding.peak_device_bytes()


def _columns(mesh: Mesh) -> NamedSharding:
    """Returns how a group of processes shares activations [n, B, T, D]: by columns."""
    return NamedSharding(mesh, P(None, None, None, sharding.MESH_AXES))


def _column_slice(mesh: Mesh, site: str, site_width: int) -> ColumnSlice:
    """Returns which columns of a site this process holds.

    Raises:
        ConfigError: Columns cannot be dealt out equally, or not in one piece each.
    """
    processes, devices = jax.process_count(), mesh.size
    if processes == 1:
        return ColumnSlice()
    if site_width % devices:
        raise ConfigError(
            f"the width of {site}, {site_width}, must be a multiple of the {devices} devices of "
            "the processes"
        )
    indices = _columns(mesh).addressable_devices_indices_map((1, 1, 1, site_width)).values()
    spans = sorted(index[3].indices(site_width)[:2] for index in indices if index is not None)
    start, stop, width = spans[0][0], spans[-1][1], site_width // processes
    if stop - start != width or start % width:
        raise ConfigError(
            f"this mesh gives process {jax.process_index()} columns that are not one piece; order "
            "its axes so that each process's devices stand together"
        )
    return ColumnSlice(start // width, processes, leads=jax.process_index() == 0)


def _own_columns(activations: jax.Array) -> np.ndarray:
    if activations.is_fully_addressable:
        return np.asarray(activations)
    shards = sorted(activations.addressable_shards, key=lambda shard: shard.index[3].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards], axis=3)


def _make_forward(graphdef: Any, cfg: ExtractSettings, mesh: Mesh) -> jax.stages.Wrapped:
    def forward(params, tokens, segment_ids, positions):
        model = nnx.merge(graphdef, params)
        kept = model.activations(
            tokens, segment_ids, positions, sites=cfg.sites, of_layers=cfg.kept_layers
        )
        follows = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1))) == segment_ids
        stays = (segment_ids != 0) & cfg.kept_tokens(positions, ~follows)

        def finish(x):
            stored = x.astype(cfg.dtype)
            exact = jnp.where(stays[..., None], stored.astype(jnp.float32), 0.0)
            return stored, jnp.linalg.norm(exact, axis=-1), exact.sum((1, 2))

        return {site: finish(x) for site, x in kept.items()}

    if jax.process_count() == 1:
        return jax.jit(forward)
    replicated = NamedSharding(mesh, P())
    shared = dict.fromkeys(cfg.sites, (_columns(mesh), replicated, replicated))
    return jax.jit(forward, out_shardings=shared)
