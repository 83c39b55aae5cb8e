"""The model whose activations are read: a Hugging Face checkpoint, or a run of our own."""

import dataclasses
import functools
import hashlib
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ping_llm.data import windows
from ping_llm.errors import ConfigError
from ping_llm.extraction.settings import ExtractSettings
from ping_llm.hashing import digest
from ping_llm.models import huggingface
from ping_llm.models.config import SITES, DecoderConfig
from ping_llm.models.decoder import Decoder
from ping_llm.outputs import digest_files
from ping_llm.progress import progress
from ping_llm.runs import load_run
from ping_llm.settings import from_json
from ping_llm.storage import Location

DEFAULT_MAX_LENGTH = 2048


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model that has not been loaded.

    Attributes:
        name: What the user called it.
        checkpoint: Directory of a Hugging Face checkpoint; None: it is a run of this package.
        cfg: Its shape; `dtype` is its own.
        max_length: What prompts are limited to unless asked.
        max_positions: Positions that it was trained for; None: its config does not say.
        sampling: How windows were sampled for a run.
    """

    name: str
    checkpoint: Path | None
    cfg: DecoderConfig
    max_length: int
    sampling: windows.WindowConfig = windows.DEFAULTS
    max_positions: int | None = None

    def fill_in(self, chosen: ExtractSettings) -> ExtractSettings:
        """Returns the settings with what they leave to the model filled in.

        Says so where prompts may be longer than the model was trained for.
        """
        if chosen.max_length and self.max_positions and chosen.max_length > self.max_positions:
            print(
                f"max_length={chosen.max_length} is more than the {self.max_positions} positions "
                f"that {self.name} was trained for (max_position_embeddings)",
                file=sys.stderr,
                flush=True,
            )
        return chosen.for_model(
            n_layers=self.cfg.n_layers, max_length=self.max_length, dtype=self.cfg.dtype
        )

    def compute_dtype(self, store_dtype: str | None) -> str:
        """Returns the dtype of the forward pass: float32 where it is the model's or the store's."""
        return "float32" if "float32" in (store_dtype, self.cfg.dtype) else self.cfg.dtype

    @functools.cached_property
    def run_params(self) -> Any:
        """The parameters of a run."""
        return load_run(self.name).params

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this model from others: its shape and its weights."""
        if self.checkpoint is not None:
            digests = digest_files(huggingface.weight_files(self.checkpoint))
            weights = [file.sha256 for file in digests]
        else:
            leaves = jax.tree.leaves(self.run_params)
            weights = [hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for leaf in leaves]
        return {"config": digest(dataclasses.asdict(self.cfg)), "weights": digest(weights)}

    def load(self, cfg: ExtractSettings, mesh: Mesh) -> tuple[Any, Any]:
        """Returns (graphdef, parameters on `mesh`) of the blocks that the sites need."""
        dtype = self.compute_dtype(cfg.dtype)
        if self.checkpoint is None:
            own = dataclasses.replace(self.cfg, dtype=dtype, remat=False)
            graphdef = nnx.graphdef(nnx.eval_shape(lambda: Decoder(own, rngs=nnx.Rngs(0))))
            shardings = nnx.get_named_sharding(self.run_params, mesh)
            return graphdef, jax.device_put(self.run_params, shardings)
        depth = cfg.kept_layers[-1] + 1 if set(cfg.sites) & set(SITES) else 1
        if "final_norm" in cfg.sites:
            depth = self.cfg.n_layers
        total = huggingface.checkpoint_bytes(self.checkpoint)
        with progress(f"load {self.name}", total=total, unit="bytes") as bar:
            model = huggingface.load(
                self.checkpoint,
                n_layers=depth,
                head=False,
                dtype=dtype,
                mesh=mesh,
                on_tensor=bar.update,
            )
        return nnx.split(model)


def open_model(model: str) -> ModelSource:
    """Returns what `model` is: a run, a directory in Hugging Face's layout, or a hub id.

    Raises:
        CheckpointError: It is none of these, or cannot be read.
        ConfigError: Its configuration is not supported.
    """
    config = Location.of(model) / "config.json"
    fields = huggingface.read_json(config) if config.is_file() else {}
    if "model" in fields and "train" in fields:
        if jax.process_count() > 1:
            raise ConfigError(f"{model} is a run; runs are small, and read by one process each")
        shape, train = from_json(DecoderConfig, fields["model"]), fields["train"]
        return ModelSource(model, None, shape, train["seq_len"], windows.WindowConfig.of(train))
    directory = huggingface.resolve(model)
    shape = huggingface.read_config(directory)
    positions = huggingface.read_json(directory / "config.json").get("max_position_embeddings")
    limit = min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)
    return ModelSource(model, directory, shape, limit, max_positions=positions)
