"""Exact distributions of RTTs and failures, from encoded prompts.

Exact, not sampled: P(FAILED) against P(RTT_START), normalised over the two, then P(byte 1) over all
256, then P(byte 2 | byte 1) for every first byte that matters. Prompts are computed in batches of
few shapes, each of which is compiled once for all decoders of one structure.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ping_llm import tokenizer
from ping_llm.prediction import decode
from ping_llm.prediction.contexts import EncodedPrompts, dense
from ping_llm.prediction.distribution import Distribution

# First bytes that together have less than this probability are left out.
TAIL = 1e-5
QUESTION_TOKENS = tokenizer.MAX_MEASUREMENT_TOKENS - 2  # the longest, RTT_START included

# Shapes of what is computed at once; few, since each is compiled.
_QUESTIONS = (16, 256)
_QUESTION_LENGTHS = (8, 12, 24, 48)  # IPv4 after its source, with it, with a time, and IPv6
_SHORTEST_CONTEXT = 64
_CONTEXT_TOKENS = 32_768  # of all contexts together, for the memory of their caches
_SHARES = (1, 8, 16, 32, 64, 128, 256)  # questions of one context
_FIRST_BYTES = 16  # of one question, whose second bytes are computed at once


def distributions(
    graphdef: Any, params: Any, prompts: EncodedPrompts
) -> Iterator[tuple[np.ndarray, Distribution]]:
    """Yields (rows, their distributions) until every question of `prompts` has had its turn."""
    for plan in _plan(prompts):
        batch = _Batch(graphdef, params, prompts, plan)
        yield batch.rows, _distribution(batch)


def log_likelihood(
    graphdef: Any, params: Any, prompts: EncodedPrompts, rtt: np.ndarray
) -> np.ndarray:
    """Returns the log of the probability of the code of each `rtt`, or of its failure [n]."""
    first, second = np.divmod(tokenizer.encode_rtt(np.maximum(rtt, 0)).astype(np.int64), 256)
    result = np.zeros(len(rtt))
    for plan in _plan(prompts):
        batch = _Batch(graphdef, params, prompts, plan)
        each, one, two = np.arange(len(batch.rows)), first[batch.rows], second[batch.rows]
        p2 = batch.second_bytes(each, one[:, None])[each, 0, two]
        answered = (1 - batch.p_failed) * batch.first_bytes[each, one] * p2
        probability = np.where(rtt[batch.rows] < 0, batch.p_failed, answered)
        result[batch.rows] = np.log(np.maximum(probability, 1e-300))
    return result


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is computed at once.

    Attributes:
        rows: Questions, those of one context side by side; -1 fills up [G * Q].
        contexts: The context of each Q of them; empty where there are none [G] or [0].
        context_length: Width of the contexts in tokens.
        length: Width of the questions in tokens.
    """

    rows: np.ndarray
    contexts: np.ndarray
    context_length: int
    length: int


def _round_up(values: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    return np.array(steps)[np.searchsorted(steps, values)]


# Seven questions of 12 tokens each: 0 to 4 after context 0 of 50 tokens, 5 after context 1 of 100
# tokens, 6 without a context. Fewer than 16, so 16 at once. Widths of contexts are powers of 2 from
# 64 on, shares of a context are rounded up to 1, 8, 16, ...:
#   rows                                contexts         context_length  length
#   [6, 15 x -1]                        []               0               12
#   [0, 1, 2, 3, 4, -1, -1, -1, 8 x -1]  [0, -1]          64              12      shares of 8
#   [5, 15 x -1]                        [1, 15 x -1]     128             12      shares of 1
def _plan(prompts: EncodedPrompts) -> Iterator[_Plan]:
    """Yields plans that hold every question once, in few shapes."""
    n = len(prompts.query_offsets) - 1
    at_once = int(_round_up(np.array([min(n, _QUESTIONS[-1])]), _QUESTIONS)[0])
    lengths = _round_up(np.diff(prompts.query_offsets), _QUESTION_LENGTHS)
    widest = np.maximum(prompts.context_lengths(), _SHORTEST_CONTEXT)
    widths = np.where(prompts.of_query < 0, 0, 2 ** np.ceil(np.log2(widest)).astype(np.int64))
    for width, length in sorted(set(zip(widths.tolist(), lengths.tolist(), strict=True))):
        rows = np.flatnonzero((widths == width) & (lengths == length))
        if width == 0:
            for i in range(0, len(rows), at_once):
                yield _Plan(_filled(rows[i : i + at_once], at_once), rows[:0], 0, length)
            continue
        rows = rows[np.argsort(prompts.of_query[rows], kind="stable")]
        starts = np.flatnonzero(np.diff(prompts.of_query[rows], prepend=-1))
        by_share: dict[int, list[np.ndarray]] = {}
        for group in np.split(rows, starts[1:]):
            for i in range(0, len(group), at_once):
                block = group[i : i + at_once]
                share = int(_round_up(np.array([len(block)]), _SHARES)[0])
                by_share.setdefault(min(share, at_once), []).append(block)
        for share, blocks in sorted(by_share.items()):
            count = max(1, min(at_once // share, _CONTEXT_TOKENS // width))
            for i in range(0, len(blocks), count):
                chosen = blocks[i : i + count]
                filled = np.concatenate([_filled(block, share) for block in chosen])
                contexts = np.array([prompts.of_query[block[0]] for block in chosen])
                yield _Plan(_filled(filled, count * share), _filled(contexts, count), width, length)


def _filled(values: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([values, np.full(length - len(values), -1, values.dtype)])


class _Batch:
    """Answers to the r questions of one plan.

    Attributes:
        rows: Which questions they are [r].
        p_failed: Probability of failure [r], float64.
        first_bytes: Probability of each first byte of the RTT [r, 256], float64.
    """

    def __init__(self, graphdef: Any, params: Any, prompts: EncodedPrompts, plan: _Plan):
        self._decoder = graphdef, params
        self._columns = np.flatnonzero(plan.rows >= 0)
        self._share = len(plan.rows) // max(len(plan.contexts), 1)  # questions of one context
        self.rows = plan.rows[self._columns]
        seen: tuple[decode.Cache, ...] = ()
        if len(plan.contexts):
            context = prompts.context_tokens, prompts.context_offsets, plan.contexts
            zeros = np.zeros(len(plan.contexts), np.int64)
            seen = (_read(*self._decoder, *dense(*context, zeros, plan.context_length)),)
        start = np.append(prompts.context_lengths(), 0)[plan.rows]
        query = prompts.query_tokens, prompts.query_offsets, plan.rows
        tokens, positions = dense(*query, start, plan.length)
        p_failed, first, cache = _ask(*self._decoder, tokens, positions, seen)
        self._seen = (*seen, cache)
        self.p_failed = np.asarray(p_failed, np.float64)[self._columns]
        self.first_bytes = np.asarray(first, np.float64)[self._columns]

    def second_bytes(self, index: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Returns the probability of each second byte after first bytes [s, m] [s, m, 256].

        Args:
            index: Which of the r questions, ascending [s].
            first: The first bytes after each.
        """
        # Of each context the same number of questions, as few as hold all that are asked for.
        columns = self._columns[index]
        context = columns // self._share
        within = np.arange(len(index)) - np.searchsorted(context, context)
        share = min(int(_round_up(within.max(keepdims=True) + 1, _SHARES)[0]), self._share)
        slots = context * share + within
        groups = len(self._seen[-1].positions) // self._share
        kept = np.repeat(np.arange(groups) * self._share, share)
        given = np.zeros((len(kept), first.shape[1]), np.int32)
        kept[slots], given[slots] = columns, first
        answer = _ask_second(*self._decoder, given, kept, self._seen)
        return np.asarray(answer, np.float64)[slots]


def _distribution(batch: _Batch) -> Distribution:
    p1 = batch.first_bytes
    order = np.argsort(-p1, axis=1, kind="stable")
    ranked = np.take_along_axis(p1, order, axis=1)
    before = np.cumsum(ranked, axis=1) - ranked
    matters = before < 1 - TAIL  # [r, 256], true and then false
    rows, codes, probabilities = [], [], []
    for i in range(0, int(matters.sum(axis=1).max()), _FIRST_BYTES):
        some = np.flatnonzero(matters[:, i])  # those that have any left
        chosen = order[some, i : i + _FIRST_BYTES]
        second = batch.second_bytes(some, chosen)  # [some, _FIRST_BYTES, 256]
        index, rank = np.nonzero(matters[some, i : i + _FIRST_BYTES])
        row, byte = some[index], chosen[index, rank]
        rows.append(np.repeat(row, 256))
        codes.append((byte[:, None] * 256 + np.arange(256)).ravel())
        probabilities.append((p1[row, byte, None] * second[index, rank]).ravel())
    row, code, probability = map(np.concatenate, (rows, codes, probabilities))
    return Distribution.of_codes(row, code, probability, batch.p_failed)


# --- compiled programs, by the structure of the decoder ------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _read(graphdef, params, tokens, positions) -> decode.Cache:
    """Returns the cache of contexts [G, P]."""
    return decode.read(nnx.merge(graphdef, params), tokens, positions)[1]


@functools.partial(jax.jit, static_argnums=0)
def _ask(graphdef, params, tokens, positions, seen):
    """Returns (P(failed) [B], P(byte 1) [B, 256], cache) of questions [B, Q]."""
    model = nnx.merge(graphdef, params)
    x, cache = decode.read(model, tokens, positions, seen)
    last = jnp.sum(positions >= 0, axis=1) - 1  # RTT_START
    index = jnp.maximum(jnp.stack([last - 1, last], axis=1), 0)
    logits = model.logits(jnp.take_along_axis(x, index[:, :, None], axis=1))
    results = logits[:, 0, jnp.array([tokenizer.FAILED, tokenizer.RTT_START])]
    return jax.nn.softmax(results)[:, 0], _byte_probabilities(logits[:, 1]), cache


@functools.partial(jax.jit, static_argnums=0)
def _ask_second(graphdef, params, first_bytes, rows, seen):
    """Returns P(byte 2 | byte 1) [B, m, 256] of `rows` [B] after first bytes [B, m]."""
    model = nnx.merge(graphdef, params)
    seen = (*seen[:-1], seen[-1].of_rows(rows))
    position = jnp.max(seen[-1].positions, axis=1) + 1  # [B]
    tokens = first_bytes.reshape(-1, 1) + tokenizer.BYTE_0
    positions = jnp.repeat(position, first_bytes.shape[1])[:, None]
    x, _ = decode.read(model, tokens, positions, seen)
    return _byte_probabilities(model.logits(x)).reshape(*first_bytes.shape, 256)


def _byte_probabilities(logits: jax.Array) -> jax.Array:
    return jax.nn.softmax(logits[..., tokenizer.BYTE_0 : tokenizer.BYTE_0 + 256])
