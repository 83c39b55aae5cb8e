"""How queries meet keys: causal attention inside segments, in two forms that agree.

On GPUs that can, cuDNN's fused kernel takes the segments as they are packed. Elsewhere queries are
taken in blocks. Neither holds a T x T mask.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ping_llm.packing import SHORTEST_SEGMENT

QUERY_BLOCK = 128  # best of 64, 128, 256 for T = 1024 on a CPU
MASKED = -1e30  # finite, so that no row of scores turns into NaN

# What `attention` is; `prediction/decode.py` adds keys of its own.
Attend = Callable[[Array, Array, Array, Array, Array | None], Array]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    window: Int[Array, ""] | None = None,
) -> Float[Array, "B T N H"]:
    """Returns causal attention inside each segment.

    Args:
        q: Queries; N is a multiple of K.
        k: Keys.
        v: Values.
        segment_ids: Segment of each token, equal ids side by side; a token meets only its own.
        window: Number of keys a query sees, itself included; None: all before it.
    """
    if window is None and cudnn_serves(q.dtype, q.shape[3]):
        return _by_cudnn(q, k, v, segment_ids)
    return _in_blocks(q, k, v, segment_ids, window)


def cudnn_serves(dtype: jnp.dtype, head_dim: int) -> bool:
    """Returns whether cuDNN's kernel for packed segments can be used.

    It needs GPUs of the Hopper generation or later, 16-bit numbers, and heads whose width is a
    multiple of 8, up to 256.
    """
    if jax.default_backend() != "gpu" or dtype not in (jnp.bfloat16, jnp.float16):
        return False
    capability = getattr(jax.local_devices()[0], "compute_capability", "0")  # ROCm has none
    return float(capability) >= 9.0 and head_dim % 8 == 0 and head_dim <= 256


def _by_cudnn(q, k, v, segment_ids):
    # JAX's public function takes one length a row; segments are known only to what it calls.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    lengths, starts = segment_bounds(segment_ids)
    out: Any = cudnn.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=starts,
        kv_offsets=starts,
        scale=q.shape[3] ** -0.5,
        mask_type=cudnn.MaskType.CAUSAL,
    )
    # More segments than there is room for would be wrong without a sound.
    room = lengths.shape[1]
    boundaries = jnp.sum(segment_ids[:, 1:] != segment_ids[:, :-1], axis=1)
    return jnp.where((boundaries < room)[:, None, None, None], out, jnp.nan)


def segment_bounds(segment_ids: Int[Array, "B T"]) -> tuple[Int[Array, "B M"], Int[Array, "B M1"]]:
    """Returns (length of each segment, its start), -1 where there is none; M1 is M + 1.

    Padding is a segment too, so that every place of the output is written. M is what fits when
    segments have `packing.SHORTEST_SEGMENT` tokens, and one for padding.
    """
    B, T = segment_ids.shape
    M = max(T // SHORTEST_SEGMENT, 1) + 1
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    number = jnp.cumsum(begins, axis=1)  # of the segment of each token, from 0
    row = jnp.arange(B)[:, None]
    lengths = jnp.zeros((B, M), jnp.int32).at[row, number].add(1, mode="drop")
    starts = jnp.cumsum(lengths, axis=1) - lengths
    there = lengths > 0
    lengths, starts = jnp.where(there, lengths, -1), jnp.where(there, starts, -1)
    return lengths, jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)


def _in_blocks(q, k, v, segment_ids, window):
    """Returns the same, computed block of queries by block.

    A block meets only the keys up to its own end, which halves the work, and builds only its own
    part of the mask. Its scores are computed again in the backward pass. At 8 x 1024 tokens, 4
    heads of 32, this took a sixth of the time of `jax.nn.dot_product_attention` with a mask on 2
    CPU cores.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    q = jnp.moveaxis((q * H**-0.5).reshape(B, T, K, N // K, H), 1, 3)  # [B, K, G, T, H]
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)  # [B, K, T, H]
    block = jax.checkpoint(_attend_block, static_argnums=(6,))
    outputs = []
    for start in range(0, T, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, T)
        queries, segments = q[:, :, :, start:stop], segment_ids[:, start:stop]
        seen = k[:, :, :stop], v[:, :, :stop], segment_ids[:, :stop]
        outputs.append(block(queries, segments, *seen, window, start))
    return jnp.moveaxis(jnp.concatenate(outputs, axis=3), 3, 1).reshape(B, T, N, H)


def _attend_block(q, q_segments, k, v, k_segments, window, start):
    distance = start + np.arange(q.shape[3])[:, None] - np.arange(k.shape[2])  # [t, s]
    visible = (q_segments[:, :, None] == k_segments[:, None, :]) & (distance >= 0)  # [B, t, s]
    if window is not None:
        visible &= distance < window
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, MASKED))
    return jnp.einsum("bkgts,bksh->bkgth", weights.astype(v.dtype), v)
