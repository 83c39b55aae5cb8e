"""The model whose activations are read: a Hugging Face checkpoint, or a run of our own."""

import contextlib
import dataclasses
import resource
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from ping_llm import sharding
from ping_llm.checkpoints import load_run
from ping_llm.extraction.batches import PackedBatch
from ping_llm.extraction.config import ExtractionConfig, digest
from ping_llm.extraction.records import fingerprint
from ping_llm.models import qwen2
from ping_llm.models.config import DecoderConfig
from ping_llm.models.decoder import SITES, Decoder
from ping_llm.progress import progress

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
    """

    name: str
    checkpoint: Path | None
    run: Path | None
    cfg: DecoderConfig
    max_length: int

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
        cfg = DecoderConfig.from_json(config["model"])
        return ModelSource(str(model), None, Path(model), cfg, config["train"]["seq_len"])
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
        params = load_run(source.run)[2]
        weights = [zlib.crc32(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(params)]
    return {"config": digest(cfg), "weights": digest(weights)}


class Extractor:
    """A loaded model with its compiled forward pass.

    Attributes:
        compile_seconds: Time spent on compiling so far.
    """

    def __init__(self, source: ModelSource, cfg: ExtractionConfig, mesh: Mesh):
        self._cfg, self._mesh = cfg, mesh
        self._multiple = mesh.shape["data"] * mesh.shape["fsdp"]  # of the rows of a batch
        graphdef, self._params = _load(source, cfg, mesh)
        self._forward = _make_forward(graphdef, cfg)
        self._compiled: dict[tuple[int, ...], Any] = {}
        self.compile_seconds = 0.0

    def __call__(self, batch: PackedBatch) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
        """Returns {site: (activations [n, B, T, D], their norms [n, B, T], their sums [n, D])}.

        Norms are those of the stored values: not finite where one does not fit the dtype.
        """
        place = NamedSharding(self._mesh, sharding.BATCH_BT)
        missing = -len(batch.tokens) % self._multiple
        arrays = jax.device_put(
            tuple(
                np.pad(part, ((0, missing), (0, 0)))
                for part in (batch.tokens, batch.segment_ids, batch.positions)
            ),
            place,
        )
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

    @property
    def peak_device_bytes(self) -> int:
        """The most memory used on one device so far; on a CPU, by the process."""
        stats = [device.memory_stats() for device in jax.local_devices()]
        if all(stats):
            return max(stat["peak_bytes_in_use"] for stat in stats)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
    _, _, params = load_run(source.run)
    own = dataclasses.replace(source.cfg, dtype=cfg.compute_dtype, remat=False)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Decoder(own, rngs=nnx.Rngs(0))))
    return graphdef, jax.device_put(params, nnx.get_named_sharding(params, mesh))


def _make_forward(graphdef: Any, cfg: ExtractionConfig) -> jax.stages.Wrapped:
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

    return jax.jit(forward)
