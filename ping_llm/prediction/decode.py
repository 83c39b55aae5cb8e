"""The decoder with a cache of keys and values: tokens after tokens that were read before.

What was read before may be shared: one prefix by many continuations, each of these by many further
ones. A cache of C rows serves a batch of any multiple of C rows, neighbours sharing a row.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ping_llm.models import attention, layers
from ping_llm.models.decoder import Decoder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of tokens that were read.

    Attributes:
        keys: Rotated keys of every layer [L, C, S, K, H].
        values: Values [L, C, S, K, H].
        positions: Position of each token; -1 where there is none [C, S], int32.
    """

    keys: Float[Array, "L C S K H"]
    values: Float[Array, "L C S K H"]
    positions: Int[Array, "C S"]


def read(
    model: Decoder,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    seen: Sequence[Cache] = (),
) -> tuple[Float[Array, "B T D"], Cache]:
    """Returns the residual stream after the last block, and the cache of these tokens.

    The modules and the numbers are those of `Decoder.hidden` on the whole sequence.

    Args:
        model: The decoder.
        tokens: Token ids.
        positions: Position of each token in its whole sequence; -1 at padding, which comes last.
        seen: Caches of what comes before, each of C rows with C a divisor of B.
    """
    cos, sin = layers.rope_angles(model.cfg, jnp.maximum(positions, 0))
    segment_ids = (positions >= 0).astype(jnp.int32)

    def apply(x, layer):
        block, window, cached = layer
        kept = []

        def attend(q, k, v, segment_ids, window):
            kept.append((k, v))
            if not seen:
                return attention.attention(q, k, v, segment_ids, window)
            before = [(*pair, cache.positions) for pair, cache in zip(cached, seen, strict=True)]
            return _attend(q, positions, window, [*before, (k, v, None)])

        x, _ = block(x, segment_ids, cos, sin, window, attend)
        return x, kept[0]

    # A window as wide as any position is no window.
    windows = model.layer_windows(jnp.iinfo(jnp.int32).max)
    cached = [(cache.keys, cache.values) for cache in seen]
    layer = (model.blocks, windows, cached)
    x, (keys, values) = jax.lax.scan(apply, model.embed(tokens), layer)
    return x, Cache(keys, values, positions)


# One question of one token, one head of width 1, q = [2.0] after scaling. Set 1 is a cache of two
# tokens, keys [0.5, -9] of which the second is padding, values [10, 0]; set 2 is the token itself,
# key [1.0], value [20].
#            scores        peak   weights   total   weighted sum of values
#   set 1    [1.0, -1e30]  1.0    [1, 0]    1       10
#   set 2    [2.0]         2.0    [1]       1       20
#   highest peak 2.0, scales [e^-1, 1] = [0.37, 1], total 0.37 * 1 + 1 * 1 = 1.37
#   out = (0.37 * 10 + 1 * 20) / 1.37 = 17.3, as softmax over all three scores gives
def _attend(
    q: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    window: Int[Array, ""] | None,
    key_sets: Sequence[tuple[Array, Array, Array | None]],
) -> Float[Array, "B T N H"]:
    """Returns attention over several sets of keys, each [C, S, K, H] with its positions [C, S].

    A set without positions is the queries' own: causal, by index. Each set is attended to in the
    layout of its own sharing, and the results are put together by their weights.
    """
    B, T, N, H = q.shape
    K = key_sets[0][0].shape[2]
    q = q * H**-0.5
    peaks, totals, sums = [], [], []
    for keys, values, key_positions in key_sets:
        C = keys.shape[0]
        grouped = q.reshape(C, B // C * T, K, N // K, H)
        scores = jnp.einsum("cqkgh,cskh->ckqgs", grouped, keys, preferred_element_type=jnp.float32)
        visible = _visible(positions.reshape(C, -1), window, key_positions, T)
        scores = jnp.where(visible[:, None, :, None], scores, attention.MASKED)
        peak = jnp.max(scores, axis=-1)
        weights = jnp.exp(scores - peak[..., None])
        summed = jnp.einsum("ckqgs,cskh->cqkgh", weights.astype(values.dtype), values)
        peaks.append(jnp.moveaxis(peak, 1, 2).reshape(B, T, K, N // K))
        totals.append(jnp.moveaxis(weights.sum(axis=-1), 1, 2).reshape(B, T, K, N // K))
        sums.append(summed.reshape(B, T, K, N // K, H))
    highest = jnp.max(jnp.stack(peaks), axis=0)
    scales = [jnp.exp(peak - highest) for peak in peaks]  # 0 for a set of which nothing is visible
    total = sum(t * scale for t, scale in zip(totals, scales, strict=True))
    out = sum(s * (scale / total)[..., None] for s, scale in zip(sums, scales, strict=True))
    return jnp.asarray(out, q.dtype).reshape(B, T, N, H)


def _visible(
    positions: Int[Array, "C q"],
    window: Int[Array, ""] | None,
    key_positions: Int[Array, "C S"] | None,
    length: int,
) -> Bool[Array, "c q1 S"]:
    """Returns which keys each query sees."""
    if key_positions is None:
        # One row of queries, its own keys: nothing is shared, and C is B.
        key_positions = positions
        visible = jnp.tril(jnp.ones((length, length), bool))[None]
    else:
        visible = key_positions[:, None, :] >= 0
    if window is not None:
        visible &= positions[:, :, None] - key_positions[:, None, :] < window
    return visible


def empty_cache(model: Decoder, rows: int, length: int) -> Cache:
    """Returns a cache with room for `length` tokens in each of `rows`."""
    cfg = model.cfg
    shape = (cfg.n_layers, rows, length, cfg.n_kv_heads, cfg.head_dim)
    zeros = jnp.zeros(shape, jnp.dtype(cfg.dtype))
    return Cache(zeros, zeros, jnp.full((rows, length), -1, jnp.int32))


def append(cache: Cache, new: Cache, start: Int[Array, ""]) -> Cache:
    """Returns `cache` with the tokens of `new`, as many rows, put in from column `start` on."""
    put = jax.lax.dynamic_update_slice_in_dim
    keys, values = put(cache.keys, new.keys, start, 2), put(cache.values, new.values, start, 2)
    return Cache(keys, values, put(cache.positions, new.positions, start, 1))


@functools.partial(jax.jit, static_argnums=(0, 4))
def begin(graphdef, params, tokens, positions, room):
    """Returns a cache of `room` tokens a sequence that begins with `tokens` [n, P]."""
    model = nnx.merge(graphdef, params)
    _, cache = read(model, tokens, positions)
    return append(empty_cache(model, tokens.shape[0], room), cache, jnp.int32(0))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def advance(graphdef, params, cache, ids, position, column):
    """Returns (the cache with one more token `ids` [n] each, the logits after it [n, V])."""
    model = nnx.merge(graphdef, params)
    x, new = read(model, ids[:, None], position[:, None], (cache,))
    return append(cache, new, column), model.logits(x)[:, 0]
