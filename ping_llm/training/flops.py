"""How much arithmetic a training step does, and how much the device could do.

Only work on real tokens counts: padding is not work, and a query is charged for the keys it can
see in its own segment, not for the whole row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ping_llm.models.config import DecoderConfig

# Dense bfloat16 FLOP/s of one device as its maker states them, by `jax.Device.device_kind`.
# The first name that begins the device's kind counts, so longer names stand before shorter ones.
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "TPU v6 lite": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
}


def attended_pairs(
    cfg: DecoderConfig, segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Returns the number of (query, key) pairs of real tokens, summed over the layers."""
    seen = jnp.where(segment_ids != 0, positions + 1, 0)
    pairs = jnp.zeros((), jnp.float32)
    for window in cfg.windows or (None,) * cfg.n_layers:
        visible = seen if window is None else jnp.minimum(seen, window)
        pairs += jnp.sum(visible, dtype=jnp.float32)
    return pairs


def matmul_weights(cfg: DecoderConfig) -> int:
    """Returns the number of weights a token is multiplied with in a forward pass."""
    D, H = cfg.d_model, cfg.head_dim
    block = 2 * D * H * (cfg.n_heads + cfg.n_kv_heads) + 3 * D * cfg.d_ff
    return cfg.n_layers * block + D * cfg.vocab_size


def training_flops(cfg: DecoderConfig, tokens: float, pairs: float) -> float:
    """Returns the FLOPs of forward and backward passes over `tokens` real tokens.

    A multiply-add is 2; the backward pass does twice the work of the forward pass. Norms,
    softmax, rotations, the optimizer, and what rematerialisation repeats are not counted.

    Args:
        cfg: Shape of the model.
        tokens: Number of tokens that are not padding.
        pairs: Number of (query, key) pairs, summed over the layers, as `attended_pairs` gives it.
    """
    per_pair = 2 * cfg.n_heads * cfg.head_dim  # q.k, and weight * v
    return 3 * 2 * (matmul_weights(cfg) * tokens + per_pair * pairs)


def peak_flops(device_kind: str) -> float | None:
    """Returns what such a device could do in bfloat16, in FLOP/s, or None where that is unknown."""
    peaks = (peak for kind, peak in PEAK_FLOPS.items() if device_kind.startswith(kind))
    return next(peaks, None)


def peak_of_devices() -> float | None:
    """Returns what all of JAX's devices could do together, in FLOP/s; None where unknown."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return None if peak is None else peak * jax.device_count()
