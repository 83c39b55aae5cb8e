"""The model whose activations are read: a Hugging Face checkpoint, or a run of our own."""

import contextlib
import dataclasses
import signal
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ping_llm import sharding
from ping_llm.activations.writer import Part
from ping_llm.data.windows import WindowLaw
from ping_llm.errors import ConfigError
from ping_llm.extraction.batches import PackedBatch
from ping_llm.extraction.config import ExtractionConfig
from ping_llm.extraction.records import fingerprint
from ping_llm.hashing import digest
from ping_llm.models import qwen2
from ping_llm.models.config import SITES, DecoderConfig
from ping_llm.models.decoder import Decoder
from ping_llm.progress import progress
from ping_llm.runs import load_run
from ping_llm.settings import from_json

DEFAULT_MAX_LENGTH = 2048


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model that has not been loaded.

    Attributes:
        name: What the user called it.
        checkpoint: Directory of a Hugging Face checkpoint, or None.
        run: Directory of a run of this package, or None.
        cfg: Its shape; `dtype` is its own.
        max_length: What prompts are limited to unless asked.
        law: What the windows of the run are like; None for a checkpoint.
    """

    name: str
    checkpoint: Path | None
    run: Path | None
    cfg: DecoderConfig
    max_length: int
    law: WindowLaw | None = None

    def compute_dtype(self, store_dtype: str) -> str:
        """Returns the dtype of the forward pass: float32 where it is the model's or the store's."""
        return "float32" if "float32" in (store_dtype, self.cfg.dtype) else self.cfg.dtype


def open_model(model: str | Path) -> ModelSource:
    """Returns what `model` is: a run, a directory in Hugging Face's layout, or a hub id.

    Raises:
        CheckpointError: It is none of these, or cannot be read.
        ConfigError: Its configuration is not supported.
    """
    path = Path(model) / "config.json"
    config = qwen2.read_json(path) if path.is_file() else {}
    if "model" in config and "train" in config:
        if jax.process_count() > 1:
            raise ConfigError(f"{model} is a run; runs are small, and read by one process each")
        cfg = from_json(DecoderConfig, config["model"])
        train = config["train"]
        law = WindowLaw.of(train)
        return ModelSource(str(model), None, Path(model), cfg, train["seq_len"], law)
    directory = qwen2.resolve(model)
    cfg = qwen2.read_config(directory)
    return ModelSource(str(model), directory, None, cfg, DEFAULT_MAX_LENGTH)


def identity(source: ModelSource) -> dict[str, Any]:
    """Returns what tells this model from others: its shape and its weights."""
    cfg = dataclasses.asdict(source.cfg)
    if source.checkpoint is not None:
        files = sorted(source.checkpoint.glob("*.safetensors"))
        weights = [fingerprint(str(file), file.stat().st_size) for file in files]
    else:
        assert source.run is not None
        params = load_run(source.run).params
        weights = [zlib.crc32(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(params)]
    return {"config": digest(cfg), "weights": digest(weights)}


class Extractor:
    """A loaded model with its compiled forward pass.

    Attributes:
        compile_seconds: Time spent on compiling so far.
        part: The columns of activations that this process holds.
    """

    def __init__(self, source: ModelSource, cfg: ExtractionConfig, mesh: Mesh):
        self._cfg, self._mesh = cfg, mesh
        self.part = _part(mesh, source.cfg.d_model)
        self._multiple = mesh.shape["data"] * mesh.shape["fsdp"]  # of the rows of a batch
        graphdef, self._params = _load(source, cfg, mesh)
        self._forward = _make_forward(graphdef, cfg, mesh)
        self._compiled: dict[tuple[int, ...], Any] = {}
        self.compile_seconds = 0.0

    def __call__(self, batch: PackedBatch) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
        """Returns {site: (activations [n, B, T, D], their norms [n, B, T], their sums [n, D])}.

        Norms are those of the stored values: not finite where one does not fit the dtype.
        """
        place = NamedSharding(self._mesh, sharding.BATCH_BT)
        missing = -len(batch.tokens) % self._multiple
        padded = (
            np.pad(part, ((0, missing), (0, 0)))
            for part in (batch.tokens, batch.segment_ids, batch.positions)
        )
        arrays = [
            jax.make_array_from_callback(rows.shape, place, rows.__getitem__) for rows in padded
        ]
        shape = arrays[0].shape
        if shape not in self._compiled:
            started = time.monotonic()
            # In float32, GPUs and TPUs would multiply in less unless told.
            exact = self._cfg.compute_dtype == "float32"
            precision = jax.default_matmul_precision("highest" if exact else "default")
            with _signals_held(), jax.set_mesh(self._mesh), precision:
                lowered = self._forward.lower(self._params, *arrays)
                self._compiled[shape] = lowered.compile()
            self.compile_seconds += time.monotonic() - started
        result = self._compiled[shape](self._params, *arrays)
        if jax.default_backend() == "cpu":  # where two batches would share the cores
            jax.block_until_ready(result)
        return result

    def to_host(self, result: Mapping[str, tuple[jax.Array, ...]]) -> dict[str, list[np.ndarray]]:
        """Returns what a call returned, of D only this process's part."""
        return {
            site: [_own_columns(activations), *map(np.asarray, replicated)]
            for site, (activations, *replicated) in result.items()
        }

    @property
    def peak_device_bytes(self) -> int:
        """The most memory used on one device so far; on a CPU, by the process."""
        return sharding.peak_device_bytes()


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Lets SIGINT and SIGTERM wait: interrupted, XLA compiles on, and crashes when Python exits."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    stops = (signal.SIGINT, signal.SIGTERM)
    before = {stop: signal.signal(stop, lambda signum, _: held.append(signum)) for stop in stops}
    try:
        yield
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)
    for signum in held:
        signal.raise_signal(signum)


def _load(source: ModelSource, cfg: ExtractionConfig, mesh: Mesh) -> tuple[Any, Any]:
    inner = any(site in SITES for site in cfg.sites)
    depth = cfg.layers[-1] + 1 if inner else 1
    if "final_norm" in cfg.sites:
        depth = source.cfg.n_layers
    if source.checkpoint is not None:
        total = qwen2.checkpoint_bytes(source.checkpoint)
        with progress(f"load {source.name}", total=total, unit="bytes") as bar:
            model = qwen2.load(
                source.checkpoint,
                n_layers=depth,
                head=False,
                dtype=cfg.compute_dtype,
                mesh=mesh,
                on_tensor=bar.update,
            )
        return nnx.split(model)
    assert source.run is not None
    params = load_run(source.run).params
    own = dataclasses.replace(source.cfg, dtype=cfg.compute_dtype, remat=False)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Decoder(own, rngs=nnx.Rngs(0))))
    return graphdef, jax.device_put(params, nnx.get_named_sharding(params, mesh))


def _columns(mesh: Mesh) -> NamedSharding:
    """Returns how a group of processes shares activations [n, B, T, D]: by columns."""
    return NamedSharding(mesh, P(None, None, None, sharding.MESH_AXES))


def _part(mesh: Mesh, d_model: int) -> Part:
    """Returns which columns this process holds.

    Raises:
        ConfigError: Columns cannot be dealt out equally, or not in one piece each.
    """
    processes, devices = jax.process_count(), mesh.size
    if processes == 1:
        return Part()
    if d_model % devices:
        raise ConfigError(
            f"{d_model=} must be a multiple of the {devices} devices of the processes"
        )
    indices = _columns(mesh).addressable_devices_indices_map((1, 1, 1, d_model)).values()
    spans = sorted(index[3].indices(d_model)[:2] for index in indices if index is not None)
    start, stop, width = spans[0][0], spans[-1][1], d_model // processes
    if stop - start != width or start % width:
        raise ConfigError(
            f"this mesh gives process {jax.process_index()} columns that are not one piece; order "
            "its axes so that each process's devices stand together"
        )
    return Part(start // width, processes, leads=jax.process_index() == 0)


def _own_columns(activations: jax.Array) -> np.ndarray:
    if activations.is_fully_addressable:
        return np.asarray(activations)
    shards = sorted(activations.addressable_shards, key=lambda shard: shard.index[3].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards], axis=3)


def _make_forward(graphdef: Any, cfg: ExtractionConfig, mesh: Mesh) -> jax.stages.Wrapped:
    def forward(params, tokens, segment_ids, positions):
        model = nnx.merge(graphdef, params)
        kept = model.activations(
            tokens, segment_ids, positions, sites=cfg.sites, of_layers=cfg.layers
        )
        real = (segment_ids != 0)[..., None]

        def finish(x):
            stored = x.astype(cfg.dtype)
            exact = jnp.where(real, stored.astype(jnp.float32), 0.0)
            return stored, jnp.linalg.norm(exact, axis=-1), exact.sum((1, 2))

        return {site: finish(x) for site, x in kept.items()}

    if jax.process_count() == 1:
        return jax.jit(forward)
    everywhere = NamedSharding(mesh, P())
    shared = dict.fromkeys(cfg.sites, (_columns(mesh), everywhere, everywhere))
    return jax.jit(forward, out_shardings=shared)
