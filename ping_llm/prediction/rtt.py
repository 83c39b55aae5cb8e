"""What a trained model says about measurements: how long they take, whether they fail.

The distribution is exact, not sampled: P(FAILED) against P(RTT_START), normalised over the two,
then P(byte 1) over all 256, then P(byte 2 | byte 1) for every first byte that matters.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ping_llm import addresses, tokenizer
from ping_llm.data.pipeline import data_fingerprint
from ping_llm.data.rows import ProbeRows, is_dataset
from ping_llm.data.windows import WindowLaw
from ping_llm.errors import DataError, PingLLMError
from ping_llm.estimators.pairs import Nodes
from ping_llm.measurements import NO_TIME, MeasurementTable
from ping_llm.prediction import decode
from ping_llm.prediction.contexts import (
    Contexts,
    Prompts,
    dense,
    encode_prompts,
    hide_sources,
    no_contexts,
    same_source,
)
from ping_llm.prediction.distribution import Distribution
from ping_llm.runs import load_run

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
# First bytes that together have less than this probability are left out.
TAIL = 1e-5
QUESTION_TOKENS = tokenizer.MAX_MEASUREMENT_TOKENS - 2  # the longest, RTT_START included

# Shapes of what is computed at once; few, since each is compiled.
_QUESTIONS = (16, 256)
_QUESTION_LENGTHS = (8, 12, 24, 48)  # IPv4 after its source, with it, with a time, and IPv6
_SHORTEST_CONTEXT = 64
_CONTEXT_TOKENS = 32_768  # of all contexts together, for the memory of their caches
_SHARES = (1, 8, 16, 32, 64, 128, 256)  # questions of one context
_LEAVES = 16  # first bytes of one question
_POOLED = 512  # questions whose distributions are held at once


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Answers to n questions.

    Attributes:
        levels: Levels of the quantiles [q].
        quantiles_ms: RTTs below which a part `levels` of the probability lies [n, q].
        mean_ms: Expected RTTs, as `Distribution.mean` gives them [n].
        p_failed: Probability that the measurement fails [n].
        unseen_src: Whether the source was not in training; None: not known [n].
        unseen_dst: The same of the destination [n].
        history: Measurements that the model read before the question [n].
    """

    levels: np.ndarray
    quantiles_ms: np.ndarray
    mean_ms: np.ndarray
    p_failed: np.ndarray
    unseen_src: np.ndarray | None
    unseen_dst: np.ndarray | None
    history: np.ndarray

    def __len__(self) -> int:
        return len(self.mean_ms)


def questions(
    src: Sequence[str], dst: Sequence[str], times: Sequence[int | None] | None = None
) -> MeasurementTable:
    """Returns what to ask: RTT and failure from each of `src` to the `dst` beside it.

    Args:
        src: Source addresses, as text.
        dst: Destination addresses, as many.
        times: Seconds since 1970 UTC, or None where the time is not given.

    Raises:
        DataError: An address is none, or the families of a pair differ.
    """
    (src_packed, families), (dst_packed, dst_families) = map(addresses.parse, (src, dst))
    for i in np.flatnonzero(families != dst_families).tolist():
        raise DataError(f"{src[i]} and {dst[i]} are of different families; give IPv4 or IPv6")
    given = [None] * len(src) if times is None else times
    return MeasurementTable(
        time=np.array([NO_TIME if time is None else time for time in given], np.int64),
        src=src_packed,
        dst=dst_packed,
        family=families,
        rtt=np.full(len(src), -1, np.float32),
    )


class Predictor:
    """A decoder that answers questions about measurements.

    An answer depends on the question and its context, not on what else is asked with it.
    """

    def __init__(
        self,
        graphdef: Any,
        params: Any,
        *,
        max_tokens: int,
        known: Nodes | None = None,
        hide_unseen: bool = False,
    ):
        """Wraps a decoder.

        Args:
            graphdef: Its static part.
            params: Its parameters.
            max_tokens: The longest sequence that it was trained on.
            known: The addresses it was trained on, where they are known.
            hide_unseen: Whether to ask as from a hidden source for each source not among them,
                which is for a decoder that was trained on hidden ones.
        """
        self.params, self.max_tokens, self.known = params, max_tokens, known
        self.hide_unseen = hide_unseen
        self.graphdef = graphdef

        def read(params, tokens, positions, seen=()):
            return decode.read(nnx.merge(graphdef, params), tokens, positions, seen)

        def ask(params, tokens, positions, seen):
            model = nnx.merge(graphdef, params)
            x, here = decode.read(model, tokens, positions, seen)
            last = jnp.sum(positions >= 0, axis=1) - 1  # RTT_START
            places = jnp.maximum(jnp.stack([last - 1, last], axis=1), 0)
            logits = decode.last_logits(model, x, places)
            results = logits[:, 0, jnp.array([tokenizer.FAILED, tokenizer.RTT_START])]
            return jax.nn.softmax(results)[:, 0], _byte_probabilities(logits[:, 1]), here

        def leaves(params, first_bytes, rows, seen):
            model = nnx.merge(graphdef, params)
            seen = (*seen[:-1], seen[-1].of_rows(rows))
            at = jnp.max(seen[-1].positions, axis=1) + 1  # [B]
            tokens = first_bytes.reshape(-1, 1) + tokenizer.BYTE_0
            positions = jnp.repeat(at, first_bytes.shape[1])[:, None]
            x, _ = decode.read(model, tokens, positions, seen)
            return _byte_probabilities(model.logits(x)).reshape(*first_bytes.shape, 256)

        self._read = jax.jit(lambda *args: read(*args)[1])
        self._ask, self._leaves = jax.jit(ask), jax.jit(leaves)

    @classmethod
    def load(cls, run: str | Path) -> "Predictor":
        """Returns the newest decoder of a run directory.

        The addresses it was trained on are known where its data set is still in its place. A
        source that is not among them is hidden if training has hidden some.

        Raises:
            CheckpointError: `run` is no run, or has no checkpoint.
        """
        loaded = load_run(run)
        known = _trained_addresses(loaded.config["data"])
        train = loaded.config["train"]
        return cls(
            loaded.graphdef,
            loaded.params,
            max_tokens=train["seq_len"],
            known=known,
            hide_unseen=WindowLaw.of(train).hidden_source_fraction > 0,
        )

    def contexts(self, history: MeasurementTable, queries: MeasurementTable) -> Contexts:
        """Returns for each question the newest measurements of its source that fit."""
        return same_source(history, queries, max_tokens=self.max_tokens - QUESTION_TOKENS)

    def predict(
        self,
        queries: MeasurementTable,
        contexts: Contexts | None = None,
        *,
        levels: Sequence[float] = LEVELS,
    ) -> Predictions:
        """Returns the answers to `queries`; their RTTs are not looked at."""
        n = len(queries)
        contexts = no_contexts(n) if contexts is None else contexts
        quantiles, mean, p_failed = np.zeros((n, len(levels))), np.zeros(n), np.zeros(n)
        for rows, answer in self.distributions(queries, contexts):
            quantiles[rows] = answer.quantiles(np.array(levels))
            mean[rows], p_failed[rows] = answer.mean(), answer.p_failed
        src, dst = self.unseen(queries)
        return Predictions(
            np.array(levels), quantiles, mean, p_failed, src, dst, contexts.lengths()
        )

    def unseen(self, queries: MeasurementTable) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Returns whether each source, and each destination, was not in training."""
        if self.known is None:
            return None, None
        return self.known.lookup(queries.src) < 0, self.known.lookup(queries.dst) < 0

    def distributions(
        self, queries: MeasurementTable, contexts: Contexts | None = None
    ) -> Iterator[tuple[np.ndarray, Distribution]]:
        """Yields (rows, their distributions) until every row of `queries` has had its turn."""
        for rows, chunk in self._chunks(queries, contexts):
            p1 = chunk.first_bytes
            order = np.argsort(-p1, axis=1, kind="stable")
            ranked = np.take_along_axis(p1, order, axis=1)
            before = np.cumsum(ranked, axis=1) - ranked
            matters = before < 1 - TAIL  # [r, 256], true and then false
            parts = []
            for i in range(0, int(matters.sum(axis=1).max()), _LEAVES):
                some = np.flatnonzero(matters[:, i])  # those that have any left
                chosen = order[some, i : i + _LEAVES]
                second = chunk.second_bytes(some, chosen)  # [some, _LEAVES, 256]
                at, rank = np.nonzero(matters[some, i : i + _LEAVES])
                row, byte = some[at], chosen[at, rank]
                code = byte[:, None] * 256 + np.arange(256)
                parts.append((row, code, p1[row, byte, None] * second[at, rank]))
            row = np.repeat(np.concatenate([part[0] for part in parts]), 256)
            code, probability = (np.concatenate([p[i].ravel() for p in parts]) for i in (1, 2))
            yield rows, Distribution.of_codes(row, code, probability, chunk.p_failed)

    def pooled(
        self, ways: Sequence[tuple[MeasurementTable, Contexts]]
    ) -> Iterator[tuple[np.ndarray, Distribution]]:
        """Yields (rows, their distributions), each the mean over several ways to ask about it.

        Args:
            ways: (questions, their contexts); question i of all ways is about the same thing.
        """
        of_query = ways[0][1].of_query
        order = np.argsort(of_query, kind="stable")  # what shares a context is asked together
        for start in range(0, len(order), _POOLED):
            rows = order[start : start + _POOLED]
            parts = [
                part
                for queries, contexts in ways
                for part in self.distributions(
                    queries.take(rows),
                    dataclasses.replace(contexts, of_query=contexts.of_query[rows]),
                )
            ]
            yield rows, Distribution.mixture(len(rows), parts)

    def log_likelihood(
        self, measurements: MeasurementTable, contexts: Contexts | None = None
    ) -> np.ndarray:
        """Returns the log of the probability of each measurement's result [n], in nats.

        That is of its failure, or of its RTT's code. The lower, the stranger: an anomaly score.
        """
        codes = tokenizer.encode_rtt(np.maximum(measurements.rtt, 0)).astype(np.int64)
        failed = measurements.rtt < 0
        result = np.zeros(len(measurements))
        for rows, chunk in self._chunks(measurements, contexts):
            first, second = np.divmod(codes[rows], 256)
            at = np.arange(len(rows))
            p2 = chunk.second_bytes(at, first[:, None])[at, 0, second]
            answered = (1 - chunk.p_failed) * chunk.first_bytes[at, first] * p2
            probability = np.where(failed[rows], chunk.p_failed, answered)
            result[rows] = np.log(np.maximum(probability, 1e-300))
        return result

    def rank(
        self, queries: MeasurementTable, contexts: Contexts | None = None
    ) -> tuple[np.ndarray, Predictions]:
        """Returns (the questions' numbers by expected RTT, shortest first; the predictions)."""
        predictions = self.predict(queries, contexts)
        return np.argsort(predictions.mean_ms, kind="stable"), predictions

    def _chunks(
        self, queries: MeasurementTable, contexts: Contexts | None
    ) -> "Iterator[tuple[np.ndarray, _Chunk]]":
        contexts = no_contexts(len(queries)) if contexts is None else contexts
        unseen, _ = self.unseen(queries)
        if self.hide_unseen and unseen is not None:
            contexts, queries = hide_sources(contexts, queries, unseen)
        prompts = encode_prompts(contexts, queries)
        for plan in _plan(prompts):
            real = plan.rows >= 0
            yield plan.rows[real], _Chunk(self, prompts, plan, real)


def _byte_probabilities(logits: jax.Array) -> jax.Array:
    return jax.nn.softmax(logits[..., tokenizer.BYTE_0 : tokenizer.BYTE_0 + 256])


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


def _plan(prompts: Prompts) -> Iterator[_Plan]:
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
        groups: dict[int, list[np.ndarray]] = {}
        for group in np.split(rows, starts[1:]):
            for i in range(0, len(group), at_once):
                block = group[i : i + at_once]
                share = int(_round_up(np.array([len(block)]), _SHARES)[0])
                groups.setdefault(min(share, at_once), []).append(block)
        for share, blocks in sorted(groups.items()):
            count = max(1, min(at_once // share, _CONTEXT_TOKENS // width))
            for i in range(0, len(blocks), count):
                part = blocks[i : i + count]
                filled = [_filled(block, share) for block in part]
                contexts = np.array([prompts.of_query[block[0]] for block in part])
                all_rows = _filled(np.concatenate(filled), count * share)
                yield _Plan(all_rows, _filled(contexts, count), width, length)


def _filled(values: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([values, np.full(length - len(values), -1, values.dtype)])


class _Chunk:
    """Answers to the questions of one plan, r of them.

    Attributes:
        p_failed: Probability of failure [r], float64.
        first_bytes: Probability of each first byte of the RTT [r, 256], float64.
    """

    def __init__(self, predictor: Predictor, prompts: Prompts, plan: _Plan, real: np.ndarray):
        self._predictor, self._places = predictor, np.flatnonzero(real)
        self._share = len(real) // max(len(plan.contexts), 1)  # questions of one context
        params = predictor.params
        self._seen: tuple[decode.Cache, ...] = ()
        if len(plan.contexts):
            zeros = np.zeros(len(plan.contexts), np.int64)
            tokens, positions = dense(
                prompts.context_tokens,
                prompts.context_offsets,
                plan.contexts,
                zeros,
                plan.context_length,
            )
            self._seen = (predictor._read(params, tokens, positions),)
        start = np.append(prompts.context_lengths(), 0)[plan.rows]
        tokens, positions = dense(
            prompts.query_tokens, prompts.query_offsets, plan.rows, start, plan.length
        )
        p_failed, first, here = predictor._ask(params, tokens, positions, self._seen)
        self._seen = (*self._seen, here)
        self.p_failed = np.asarray(p_failed, np.float64)[real]
        self.first_bytes = np.asarray(first, np.float64)[real]

    def second_bytes(self, rows: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Returns the probability of each second byte after first bytes [s, m] [s, m, 256].

        Args:
            rows: Which of the r questions, ascending [s].
            first: The first bytes after each.
        """
        # Of each context the same number of questions, as few as hold all that are asked for.
        places = self._places[rows]
        context = places // self._share
        within = np.arange(len(rows)) - np.searchsorted(context, context)
        share = min(int(_round_up(within.max(keepdims=True) + 1, _SHARES)[0]), self._share)
        at = context * share + within
        groups = len(self._seen[-1].positions) // self._share
        kept = np.repeat(np.arange(groups) * self._share, share)
        given = np.zeros((len(kept), first.shape[1]), np.int32)
        kept[at], given[at] = places, first
        answer = self._predictor._leaves(self._predictor.params, given, kept, self._seen)
        return np.asarray(answer, np.float64)[at]


def _trained_addresses(data: dict[str, Any]) -> Nodes | None:
    """Returns the addresses a run was trained on; None where its data set is gone or another."""
    path = Path(data["path"])
    try:
        if not is_dataset(path) or data_fingerprint(path) != data["fingerprint"]:
            return None
    except PingLLMError:
        return None
    # Batch by batch: not all measurements at once.
    parts = [Nodes(b.src_addr, b.dst_addr).addresses for b in ProbeRows(path, "train").batches]
    return Nodes(*parts, np.zeros(0, addresses.ADDRESS))
