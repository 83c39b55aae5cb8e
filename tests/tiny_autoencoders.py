"""Autoencoders as a training leaves them, without the training."""

import jax
import jax.numpy as jnp
import numpy as np

from ping_llm.sae.architectures import init_params
from ping_llm.sae.autoencoder import SparseAutoencoder
from ping_llm.sae.settings import TrainSaeSettings

KINDS = ("topk", "batchtopk", "jumprelu", "gated", "l1")


def settings(architecture: str, **changes) -> TrainSaeSettings:
    """Returns the settings of a training that nobody starts."""
    given = {"activations": "acts", "output": "sae", "layer": (0,), "features": 24, "k": 4}
    return TrainSaeSettings(**given | {"architecture": architecture} | changes)


def autoencoder(architecture: str, *, scale: float = 0.4, **metadata) -> SparseAutoencoder:
    """Returns one with random directions and biases."""
    cfg, rng = settings(architecture), np.random.default_rng(0)
    params = init_params(jax.random.key(0), cfg, features=24, bias=jnp.ones(8))
    for name, value in params.items():
        if value.ndim == 1 and name != "b_dec":
            params[name] = value + 0.1 * rng.standard_normal(value.shape).astype(np.float32)
    rest = {"scale": np.float32(scale), "threshold": np.float32(0.3)}
    return SparseAutoencoder.of_training(cfg, params, rest, metadata)
