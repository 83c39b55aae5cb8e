"""Distributions of RTTs and failures, from grids.

P(FAILED) against P(RTT_START), normalised over the two; then P(byte 1) over all 256; then P(byte 2
| byte 1) for the few likeliest first bytes. Inside the others RTTs are taken as equally likely.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ping_llm import tokenizer
from ping_llm.data.cells import Grids
from ping_llm.prediction import decode
from ping_llm.prediction.distribution import Distribution

FIRST_BYTES = 4  # of which second bytes are computed
STEPS = 16  # that stand for the 256 second bytes of the others
SHAPES = (1, 16, 256)  # questions computed at once; few, since each is compiled


def distributions(
    graphdef: Any, params: Any, grids: Grids
) -> Iterator[tuple[np.ndarray, Distribution]]:
    """Yields (questions, their distributions) until every question of `grids` has had its turn."""
    n = len(grids.tokens)
    size = next((size for size in SHAPES if size >= n), SHAPES[-1])
    for start in range(0, n, size):
        rows = np.arange(start, min(start + size, n))
        tokens = np.full((size, grids.tokens.shape[1] + 1), tokenizer.RTT_START, np.int32)
        tokens[: len(rows), :-1] = grids.tokens[rows]
        answer = [np.asarray(each, np.float64) for each in _ask(graphdef, params, tokens)]
        p_failed, first, chosen, second = (each[: len(rows)] for each in answer)
        codes, probabilities = _codes(first, chosen.astype(np.int64), second)
        difference = grids.scale.decode(codes)
        # Beyond these a hardly trained model would overflow: RTTs of 51 days, and of a nanosecond.
        log_rtt = np.clip(grids.reference[rows, None] + difference, -14, 22)
        yield rows, Distribution(np.exp(log_rtt), probabilities, p_failed)


# With 2 first bytes of 4 values each instead of 256 of 256: P(byte 1) = [0.9, 0.1], of the first
# P(byte 2) = [0.5, 0.5, 0, 0], and the second stands for its values by 2 steps:
#   codes          0     1     2    3    5     7
#   probabilities  0.45  0.45  0    0    0.05  0.05
def _codes(
    first: np.ndarray, chosen: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (codes, ascending; their probabilities), each [r, u].

    Args:
        first: Probability of each first byte [r, 256].
        chosen: First bytes whose second bytes are known [r, m].
        second: Probability of each second byte after those [r, m, 256].
    """
    r, m = chosen.shape
    rows = np.arange(r)[:, None]
    fine = chosen[:, :, None] * 256 + np.arange(256)
    fine_p = first[rows, chosen][:, :, None] * second
    others = np.ones((r, 256), bool)
    others[rows, chosen] = False
    byte = np.nonzero(others)[1].reshape(r, 256 - m)
    width = 256 // STEPS
    coarse = byte[:, :, None] * 256 + np.arange(STEPS) * width + width // 2
    coarse_p = np.repeat(first[rows, byte][:, :, None] / STEPS, STEPS, axis=2)
    codes = np.concatenate([fine.reshape(r, -1), coarse.reshape(r, -1)], axis=1)
    probabilities = np.concatenate([fine_p.reshape(r, -1), coarse_p.reshape(r, -1)], axis=1)
    order = np.argsort(codes, axis=1)
    codes, probabilities = (np.take_along_axis(x, order, axis=1) for x in (codes, probabilities))
    return codes, probabilities / probabilities.sum(axis=1, keepdims=True)


@functools.partial(jax.jit, static_argnums=0)
def _ask(graphdef, params, tokens):
    """Returns P(failed) [B], P(byte 1) [B, 256], first bytes [B, m], P(byte 2 | these) [B, m, 256].

    Args:
        graphdef: The decoder's static part.
        params: Its parameters.
        tokens: Grids, and RTT_START after each [B, T + 1].
    """
    model = nnx.merge(graphdef, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x, cache = decode.read(model, tokens, positions)
    logits = model.logits(x[:, -2:])
    results = logits[:, 0, jnp.array([tokenizer.FAILED, tokenizer.RTT_START])]
    first = _byte_probabilities(logits[:, 1])
    _, chosen = jax.lax.top_k(first, FIRST_BYTES)
    next_tokens = chosen.reshape(-1, 1) + tokenizer.BYTE_0
    next_positions = jnp.full_like(next_tokens, tokens.shape[1])
    x, _ = decode.read(model, next_tokens, next_positions, (cache,))
    second = _byte_probabilities(model.logits(x)).reshape(*chosen.shape, 256)
    return jax.nn.softmax(results)[:, 0], first, chosen, second


def _byte_probabilities(logits: jax.Array) -> jax.Array:
    return jax.nn.softmax(logits[..., tokenizer.BYTE_0 : tokenizer.BYTE_0 + 256])
