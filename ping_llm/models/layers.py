"""The layers of a decoder: norm, rotary embedding, attention, gated MLP."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ping_llm import sharding
from ping_llm.models.attention import Attend, attention
from ping_llm.models.config import DecoderConfig, RopeScaling


def rms_norm(cfg: DecoderConfig, width: int, *, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Returns an RMSNorm over the last axis; its mean square is taken in float32."""
    return nnx.RMSNorm(
        width,
        epsilon=cfg.rms_norm_eps,
        dtype=jnp.dtype(cfg.dtype),
        param_dtype=jnp.dtype(cfg.param_dtype),
        scale_metadata=sharding.metadata(sharding.NORM_D),
        rngs=rngs,
    )


def linear(
    cfg: DecoderConfig,
    d_in: int,
    d_out: int,
    spec: P,
    *,
    bias: bool = False,
    scale: float = 1.0,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """Returns a linear layer whose kernel [d_in, d_out] lives on the mesh as `spec` says.

    At first, what it makes of inputs of unit variance has standard deviation `scale`.
    """
    return nnx.Linear(
        d_in,
        d_out,
        use_bias=bias,
        dtype=jnp.dtype(cfg.dtype),
        param_dtype=jnp.dtype(cfg.param_dtype),
        kernel_init=nnx.initializers.normal(scale / math.sqrt(d_in)),
        kernel_metadata=sharding.metadata(spec),
        bias_metadata=sharding.metadata(sharding.BIAS_F),
        dot_general=_dot_general,
        rngs=rngs,
    )


@jax.custom_vjp
def _matmul(x: Float[Array, "... i"], kernel: Float[Array, "i o"]) -> Float[Array, "... o"]:
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _matmul_forward(x, kernel):
    return _matmul(x, kernel), (x, kernel)


def _matmul_backward(saved, gradient):
    x, kernel = saved
    of_x = jax.lax.dot_general(gradient, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    tokens = tuple(range(x.ndim - 1))
    contract = ((tokens, tokens), ((), ()))
    # The first operand is the one that XLA transposes on a CPU, and fuses with what computed it,
    # which is then slow: let it be the narrower one. JAX's own rule always takes the gradient.
    if x.shape[-1] <= gradient.shape[-1]:
        return of_x, jax.lax.dot_general(x, gradient, contract)
    return of_x, jax.lax.dot_general(gradient, x, contract).T


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _dot_general(x, kernel, dimension_numbers, **settings):
    # What `nnx.Linear` asks for is always this one product, in the dtype of its operands.
    del dimension_numbers, settings
    return _matmul(x, kernel)


def output_scale(cfg: DecoderConfig) -> float:
    """Returns the initial scale of a layer that writes to the residual stream.

    Each block writes twice; with this scale the sum of all L blocks does not grow with L.
    """
    return 1 / math.sqrt(2 * cfg.n_layers)


def rope_frequencies(cfg: DecoderConfig) -> tuple[np.ndarray, float]:
    """Returns (radians per position [H / 2], scale of the rotated vectors)."""
    exponents = np.arange(0, cfg.head_dim, 2, dtype=np.float64) / cfg.head_dim
    frequencies = cfg.rope_theta**-exponents
    scaling = cfg.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32), 1.0
    divided, scale = np.ones_like(frequencies), 1.0  # which part of each is divided by the factor
    if scaling.kind == "llama3":
        rotations = (scaling.original_max_positions or 0) * frequencies / (2 * math.pi)
        kept = (rotations - scaling.beta_slow) / (scaling.beta_fast - scaling.beta_slow)
        divided = 1 - np.clip(kept, 0.0, 1.0)
    elif scaling.kind == "yarn":
        divided, scale = _yarn_ramp(cfg, scaling), _attention_factor(scaling)
    frequencies = frequencies * (1 - divided) + frequencies / scaling.factor * divided
    return frequencies.astype(np.float32), scale


def _yarn_ramp(cfg: DecoderConfig, yarn: RopeScaling) -> np.ndarray:
    """Returns 0 where a dimension turns often over the original context, 1 where it hardly does."""
    low = _dimension_of(yarn.beta_fast, cfg, yarn)
    high = _dimension_of(yarn.beta_slow, cfg, yarn)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, cfg.head_dim - 1)
    if low == high:
        high += 0.001
    return np.clip((np.arange(cfg.head_dim // 2) - low) / (high - low), 0.0, 1.0)


def _dimension_of(rotations: float, cfg: DecoderConfig, yarn: RopeScaling) -> float:
    turns = (yarn.original_max_positions or 0) / (rotations * 2 * math.pi)
    return cfg.head_dim * math.log(turns) / (2 * math.log(cfg.rope_theta))


def _attention_factor(yarn: RopeScaling) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0

    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return scale(yarn.mscale) / scale(yarn.mscale_all_dim)
    return scale(1.0)


def rope_angles(
    cfg: DecoderConfig, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]:
    """Returns the cosines and sines of the rotations at `positions`, for half a head, float32."""
    frequencies, scale = rope_frequencies(cfg)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies  # [B, T, 1, H / 2]
    # Computed once: without the barrier XLA would do it again wherever something is rotated.
    return jax.lax.optimization_barrier((jnp.cos(angles) * scale, jnp.sin(angles) * scale))


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T 1 h"], sin: Float[Array, "B T 1 h"]
) -> Float[Array, "B T N H"]:
    """Returns `x` with its first and second half rotated into each other."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions, inside segments."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.head_dim = cfg.head_dim
        q_width, kv_width = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
        up, bias = sharding.UP_DF, cfg.qkv_bias
        self.q = linear(cfg, cfg.d_model, q_width, up, bias=bias, rngs=rngs)
        self.k = linear(cfg, cfg.d_model, kv_width, up, bias=bias, rngs=rngs)
        self.v = linear(cfg, cfg.d_model, kv_width, up, bias=bias, rngs=rngs)
        scale = output_scale(cfg)
        self.out = linear(cfg, q_width, cfg.d_model, sharding.DOWN_FD, scale=scale, rngs=rngs)
        if cfg.qk_norm:
            self.q_norm = rms_norm(cfg, cfg.head_dim, rngs=rngs)
            self.k_norm = rms_norm(cfg, cfg.head_dim, rngs=rngs)
        self.qk_norm = cfg.qk_norm

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        cos: Float[Array, "B T 1 h"],
        sin: Float[Array, "B T 1 h"],
        window: Int[Array, ""] | None,
        attend: Attend = attention,
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "B T _"]]]:
        """Returns what attention adds to the residual stream, and {site inside: what it held}."""
        held = {"q": self.q(x), "k": self.k(x), "v": self.v(x)}
        q, k, v = map(self._heads, held.values())
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = attend(q, k, v, segment_ids, window)  # [B, T, N, H]
        held["heads"] = attended.reshape(*x.shape[:2], -1)
        return self.out(held["heads"]), held

    def _heads(self, x: Array) -> Array:
        heads = x.reshape(*x.shape[:2], -1, self.head_dim)
        return sharding.constrain(heads, sharding.HEADS_BTNH)


class MLP(nnx.Module):
    """Gated MLP: down(silu(gate(x)) * up(x))."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.gate = linear(cfg, cfg.d_model, cfg.d_ff, sharding.UP_DF, rngs=rngs)
        self.up = linear(cfg, cfg.d_model, cfg.d_ff, sharding.UP_DF, rngs=rngs)
        scale = output_scale(cfg)
        self.down = linear(cfg, cfg.d_ff, cfg.d_model, sharding.DOWN_FD, scale=scale, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "B T F"]]]:
        """Returns what the MLP adds to the residual stream, and {site inside: what it held}."""
        hidden = jax.nn.silu(self.gate(x)) * self.up(x)  # [B, T, F]
        return self.down(hidden), {"mlp_inner": hidden}
