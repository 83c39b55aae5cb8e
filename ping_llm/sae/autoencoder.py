"""A trained sparse autoencoder: used from Python, saved and loaded in SAELens's layout.

A directory holds `sae_weights.safetensors` and `cfg.json`. Activations go in as a model computes
them: the scale of training is folded into the biases.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ping_llm.errors import CheckpointError, DataError
from ping_llm.models.trees import check_shapes
from ping_llm.outputs import publish_file, publish_json
from ping_llm.runs import tensors_digest
from ping_llm.sae import architectures
from ping_llm.sae.settings import TrainSaeSettings
from ping_llm.storage import Location

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_SHAPES = {"W_enc": "DF", "W_dec": "FD", "b_dec": "D"}
_VECTORS = {
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "standard": ("b_enc",),
    "gated": ("b_gate", "r_mag", "b_mag"),
}


@dataclasses.dataclass(frozen=True)
class SparseAutoencoder:
    """Features of activations, and what they stand for.

    Attributes:
        config: What `cfg.json` holds: `architecture` (topk, jumprelu, gated or standard), `d_in`,
            `d_sae`, of topk `k`, and under `metadata` where it comes from.
        params: `W_enc` [D, F], `W_dec` [F, D], `b_dec` [D], and the vectors [F] of its kind.
    """

    config: Mapping[str, Any]
    params: Mapping[str, Array]

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What it says about where it comes from."""
        return self.config.get("metadata") or {}

    @functools.cached_property
    def encode(self):
        """Returns the features [*B, F] of activations [*B, D], in float32; compiled."""
        k, kind = self.config.get("k", 0), self.config["architecture"]

        @jax.jit
        def encode(x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
            rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
            pre = architectures.pre_activations(self.params, rows)
            if kind == "gated":
                features = architectures.gated_features(self.params, pre)
            elif kind == "topk":
                features = architectures.keep_largest(jax.nn.relu(pre), k)
            elif kind == "jumprelu":
                features = jax.nn.relu(jnp.where(pre > self.params["threshold"], pre, 0.0))
            else:
                features = jax.nn.relu(pre)
            return features.reshape(*x.shape[:-1], -1)

        return encode

    def decode(self, features: Float[Array, "*B F"]) -> Float[Array, "*B D"]:
        """Returns the activations [*B, D] that features stand for."""
        return architectures.decode(self.params, features)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns activations as rebuilt from their features [*B, D], float32."""
        return self.decode(self.encode(x))

    @classmethod
    def of_training(
        cls,
        cfg: TrainSaeSettings,
        params: Mapping[str, Array],
        rest: Mapping[str, Array],
        metadata: Mapping[str, Any],
    ) -> "SparseAutoencoder":
        """Returns the autoencoder of unscaled activations that a training has come to.

        Features scale with their activations, so directions stay as they are and biases and
        thresholds are divided. That of `batchtopk` becomes `jumprelu` with one threshold for all.
        """
        kind = {"l1": "standard", "batchtopk": "jumprelu"}.get(cfg.architecture, cfg.architecture)
        held = {name: np.asarray(value, np.float32) for name, value in params.items()}
        if cfg.architecture == "jumprelu":
            held["threshold"] = np.exp(held.pop("log_threshold"))
        elif cfg.architecture == "batchtopk":
            # Training keeps what is as large as the least kept; SAELens what is above a threshold.
            least = np.nextafter(np.asarray(rest["threshold"], np.float32), np.float32(0))
            held["threshold"] = np.full_like(held["b_enc"], least)
        scale = np.asarray(rest["scale"], np.float32)
        unscaled = {
            n: v if n in ("W_enc", "W_dec", "r_mag") else v / scale for n, v in held.items()
        }
        config = {
            "architecture": kind,
            "d_in": held["W_enc"].shape[0],
            "d_sae": held["W_enc"].shape[1],
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": dict(metadata),
        }
        if kind == "topk":
            config |= {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
        return cls(config, {name: jnp.asarray(value) for name, value in unscaled.items()})

    def save(self, directory: str | Path | Location) -> None:
        """Writes `sae_weights.safetensors` and then `cfg.json`; older ones are replaced.

        Raises:
            StorageError: They cannot be written.
        """
        from safetensors.numpy import save_file

        directory = Location.of(directory)
        tensors = {name: np.asarray(value) for name, value in sorted(self.params.items())}
        checksum = tensors_digest(tensors.items())
        with publish_file(directory / WEIGHTS) as path:
            save_file(tensors, path, metadata={"checksum": checksum})
        publish_json(directory / CONFIG, self.config)

    @classmethod
    def load(cls, directory: str | Path | Location) -> "SparseAutoencoder":
        """Returns the autoencoder in a directory, local or remote, of this package or SAELens.

        Raises:
            CheckpointError: There is none, it is damaged, or of a kind that is not read here.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        directory = Location.of(directory)
        if not (directory / CONFIG).is_file():
            raise CheckpointError(
                f"{directory} holds no sparse autoencoder: it has no {CONFIG}; give the directory "
                "of one layer, as train-sae writes it"
            )
        config = _read_config(directory / CONFIG)
        where = directory / WEIGHTS
        try:
            data = where.read_bytes()
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            checksum = header.get("__metadata__", {}).get("checksum")
            tensors = load(data)
            if checksum not in (None, tensors_digest(sorted(tensors.items()))):
                raise DataError("its checksum is another")
        except (SafetensorError, ValueError, AttributeError, DataError) as error:
            raise CheckpointError(
                f"{where} is not a sound safetensors file ({error}); fetch it again, or remove "
                f"{CONFIG} beside it and run train-sae again"
            ) from None
        sizes = {"D": config["d_in"], "F": config["d_sae"]}
        shapes = _SHAPES | dict.fromkeys(_VECTORS[config["architecture"]], "F")
        wanted = {
            name: np.broadcast_to(np.float32(), [sizes[letter] for letter in letters])
            for name, letters in shapes.items()
        }
        check_shapes(where, wanted, {name: tensor.shape for name, tensor in tensors.items()})
        return cls(config, {name: jnp.asarray(t, jnp.float32) for name, t in tensors.items()})

    @functools.cached_property
    def identity(self) -> str:
        """Hash of the weights."""
        tensors = sorted((name, np.asarray(value)) for name, value in self.params.items())
        return hashlib.sha256(tensors_digest(tensors).encode()).hexdigest()[:16]


def _read_config(path: Location) -> dict[str, Any]:
    """Returns the content of a `cfg.json`.

    Raises:
        CheckpointError: It is damaged, or of a kind that is not read here.
    """
    try:
        config = json.loads(path.read_text())
        kind = config["architecture"]
        numbers = [config["d_in"], config["d_sae"], *([config["k"]] if kind == "topk" else [])]
        if not all(type(number) is int and number > 0 for number in numbers):
            raise ValueError(f"{numbers} are not sizes")
        _ = {**(config.get("metadata") or {})}
    except (ValueError, KeyError, TypeError, DataError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{path} is damaged: {reason}; restore it, or remove it and run train-sae again"
        ) from None
    supported = {
        "architecture": (*_VECTORS,),
        "apply_b_dec_to_input": (True,),
        "normalize_activations": ("none",),
        "reshape_activations": ("none",),
        "rescale_acts_by_decoder_norm": (False,),
    }
    for name, values in supported.items():
        if (value := config.get(name, values[0])) not in values:
            expected = " or ".join(map(repr, values))
            raise CheckpointError(f"{path}: {name}={value!r} is not read here; expected {expected}")
    return config
