"""The joint distribution of a measurement's addresses and time, as the decoder's tokens give it.

What is given stands first, what is asked last. Its probability is the product of those of its
tokens, each normalised over the tokens that may stand there, so that over all that may stand there
the products add up to 1.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ping_llm import tokenizer
from ping_llm.prediction import decode

SIZES = (16, 256)  # tails computed at once; few, since each is compiled
BYTES = np.arange(tokenizer.VOCAB_SIZE) >= tokenizer.BYTE_0


@dataclasses.dataclass(frozen=True)
class Joint:
    """A decoder, and the tokens of what is given.

    Attributes:
        graphdef: The decoder's static part.
        params: Its parameters.
        given: The tokens of a measurement so far, from MEASUREMENT_START on [g].
    """

    graphdef: Any
    params: Any
    given: np.ndarray

    @functools.cached_property
    def _start(self) -> tuple[np.ndarray, decode.Cache]:
        # Always of one length, so that it is compiled once.
        tokens = np.zeros(tokenizer.MAX_MEASUREMENT_TOKENS, np.int32)
        tokens[: len(self.given)] = self.given
        logits, cache = _read(self.graphdef, self.params, tokens[None], len(self.given))
        return np.asarray(logits, np.float64), cache

    def _logits(self, tails: np.ndarray) -> np.ndarray:
        """Returns the logits of each token of tails [n, T], by what comes before it [n, T, V]."""
        first, cache = self._start
        n, width = tails.shape
        logits = np.empty((n, width, tokenizer.VOCAB_SIZE))
        logits[:, 0] = first
        size = next((size for size in SIZES if size >= n), SIZES[-1])
        for start in range(0, n if width > 1 else 0, size):
            block = np.zeros((size, width), np.int32)
            rows = tails[start : start + size]
            block[: len(rows)] = rows
            read = _continue(self.graphdef, self.params, cache, block, len(self.given))
            logits[start : start + size, 1:] = np.asarray(read)[: len(rows), :-1]
        return logits

    def score(self, tails: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """Returns the log-probability of each of tails [n, T] after what is given [n], nats.

        Args:
            tails: Tokens, each allowed at its place.
            allowed: Which tokens may stand at each place [T, V], bool.
        """
        found = np.zeros(len(tails))
        for start in range(0, len(tails), SIZES[-1]):
            rows = tails[start : start + SIZES[-1]]
            log_p = normalised(self._logits(rows), allowed)
            each = np.take_along_axis(log_p, rows[..., None].astype(np.int64), 2)
            found[start : start + SIZES[-1]] = each.sum(axis=(1, 2))
        return found

    def search(self, allowed: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (tails [n, T], their log-probabilities [n]), the most probable beginnings kept.

        Where no place has more than `width` beginnings before it, these are all there are.

        Args:
            allowed: Which tokens may stand at each place [T, V], bool.
            width: How many beginnings are kept before each place with a choice.
        """
        tails, log_p = np.zeros((1, len(allowed)), np.int64), np.zeros(1)
        for place, tokens in enumerate(map(np.flatnonzero, allowed)):
            if len(tokens) == 1:
                tails[:, place] = tokens
                continue
            kept = np.argsort(-log_p, kind="stable")[:width]
            tails, log_p = tails[kept], log_p[kept]
            steps = []
            for start in range(0, len(tails), SIZES[-1]):
                logits = self._logits(tails[start : start + SIZES[-1]])[:, place]
                steps.append(normalised(logits, allowed[place])[:, tokens])
            log_p = (log_p[:, None] + np.concatenate(steps)).reshape(-1)
            tails = np.repeat(tails, len(tokens), axis=0)
            tails[:, place] = np.tile(tokens, len(kept))
        return tails, log_p


def normalised(logits: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Returns log-probabilities over the tokens allowed; -inf at others."""
    logits = np.where(allowed, logits, -np.inf)
    peak = logits.max(axis=-1, keepdims=True)
    return logits - peak - np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True))


@functools.partial(jax.jit, static_argnums=0)
def _read(graphdef, params, tokens, length):
    """Returns (the logits after the first `length` of tokens [1, T], their cache)."""
    model = nnx.merge(graphdef, params)
    place = jnp.arange(tokens.shape[1])
    x, cache = decode.read(model, tokens, jnp.where(place < length, place, -1)[None])
    return model.logits(jax.lax.dynamic_slice_in_dim(x, length - 1, 1, 1))[:, 0], cache


@functools.partial(jax.jit, static_argnums=0)
def _continue(graphdef, params, cache, tails, start):
    """Returns the logits after each token of tails [n, T] that stand at `start` and on."""
    model = nnx.merge(graphdef, params)
    positions = jnp.broadcast_to(start + jnp.arange(tails.shape[1]), tails.shape)
    x, _ = decode.read(model, tails, positions, (cache,))
    return model.logits(x)
