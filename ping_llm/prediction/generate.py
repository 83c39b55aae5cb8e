"""Measurements sampled from a model, under the grammar of the token language."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ping_llm import addresses, tokenizer
from ping_llm.errors import ConfigError
from ping_llm.hashing import hash_addresses
from ping_llm.ingest.sources import read_table
from ping_llm.measurements import MeasurementTable
from ping_llm.prediction import decode
from ping_llm.prediction.contexts import dense, encode_prompts, same_source
from ping_llm.prediction.rtt import Predictor
from ping_llm.progress import progress

MAX_LANES = 64  # sequences sampled side by side
_SOURCE, _DESTINATION, _TIME, _RESULT = 1, 2, 4, 8
_NEEDED = _DESTINATION | _RESULT
# What each head gives, and the family it fixes.
_FIELD = np.zeros(tokenizer.VOCAB_SIZE, np.uint8)
_FIELD[[tokenizer.SRC_IPV4, tokenizer.SRC_IPV6]] = _SOURCE
_FIELD[[tokenizer.DST_IPV4, tokenizer.DST_IPV6]] = _DESTINATION
_TIMES = [tokenizer.TIMESTAMP_ABS, tokenizer.TIMESTAMP_DELTA1, tokenizer.TIMESTAMP_DELTA4]
_FIELD[_TIMES] = _TIME
_FIELD[[tokenizer.RTT_START, tokenizer.FAILED]] = _RESULT
_FAMILY = np.zeros(tokenizer.VOCAB_SIZE, np.uint8)  # 1 is IPv4, 2 is IPv6
_FAMILY[[tokenizer.SRC_IPV4, tokenizer.DST_IPV4]] = 1
_FAMILY[[tokenizer.SRC_IPV6, tokenizer.DST_IPV6]] = 2
_PAYLOAD = np.zeros(tokenizer.VOCAB_SIZE, np.uint8)
_PAYLOAD[: tokenizer.BYTE_0] = tokenizer.PAYLOAD_BYTES
_ZERO_BYTES_OF_ABS = 4  # of its 8: times are of 1970 to 2106


def _heads_table() -> np.ndarray:
    """Returns which ids may follow whole fields.

    By (fields there, their family, whether a time was before, the family of the last source).
    """
    table = np.zeros((16, 3, 2, 3, tokenizer.VOCAB_SIZE), bool)
    for used, family, timed, of_source in np.ndindex(table.shape[:-1]):
        allowed = table[used, family, timed, of_source]
        for head in np.flatnonzero(_FIELD):
            fits = _FAMILY[head] in (0, family) or family == 0
            after_time = timed or head not in _TIMES[1:]
            allowed[head] = not used & _FIELD[head] and fits and after_time
        # Without a source it is of the last one, if that is of its family.
        sourced = used & _SOURCE or of_source == family
        allowed[tokenizer.MEASUREMENT_START] = used & _NEEDED == _NEEDED and sourced
    return table


_HEADS = _heads_table()
_BYTES = np.arange(tokenizer.VOCAB_SIZE) >= tokenizer.BYTE_0
_ZERO = np.arange(tokenizer.VOCAB_SIZE) == tokenizer.BYTE_0
_START = np.arange(tokenizer.VOCAB_SIZE) == tokenizer.MEASUREMENT_START


class Grammar:
    """Where each of some sequences is in the token language, and what may come next.

    A sequence of allowed ids, cut behind a whole measurement, decodes without a problem.
    """

    def __init__(self, timed: np.ndarray, source_family: np.ndarray):
        """Starts at the beginning of a measurement.

        Args:
            timed: Whether a time was known before, in each sequence [n], bool.
            source_family: Of the last source before, 1 for IPv4, 2 for IPv6, 0 for none [n], uint8.
        """
        n = len(timed)
        self._timed, self._source_family = timed.copy(), source_family.copy()
        self._started = np.zeros(n, bool)
        self._used, self._family = np.zeros(n, np.uint8), np.zeros(n, np.uint8)
        self._head, self._left = np.zeros(n, np.int64), np.zeros(n, np.uint8)

    def allowed(self) -> np.ndarray:
        """Returns which ids may come next [n, 267], bool."""
        timed = self._timed.astype(np.int64)
        found = _HEADS[self._used, self._family, timed, self._source_family]
        found[~self._started] = _START
        found[self._left > 0] = _BYTES
        whole = _PAYLOAD[self._head]
        first = (self._head == tokenizer.TIMESTAMP_ABS) & (whole - self._left < _ZERO_BYTES_OF_ABS)
        found[(self._left > 0) & first] = _ZERO
        return found

    def advance(self, ids: np.ndarray) -> None:
        """Takes one allowed id for each sequence [n]."""
        payload = self._left > 0
        self._left = np.where(payload, self._left - 1, _PAYLOAD[ids]).astype(np.uint8)
        starts = ids == tokenizer.MEASUREMENT_START
        self._started |= starts
        head = ~payload & ~starts
        self._used = np.where(starts, 0, self._used | np.where(head, _FIELD[ids], 0))
        self._used = self._used.astype(np.uint8)
        named = head & (_FAMILY[ids] > 0)
        self._family = np.where(starts, 0, np.where(named, _FAMILY[ids], self._family))
        self._family = self._family.astype(np.uint8)
        source = head & (_FIELD[ids] == _SOURCE)
        self._source_family = np.where(source, _FAMILY[ids], self._source_family)
        self._head = np.where(head, ids, self._head)
        self._timed |= head & (_FIELD[ids] == _TIME)


def generate(
    run: str | Path, *, count: int, history: str | Path | None = None, seed: int = 0
) -> dict[str, Any]:
    """Returns measurements sampled from a model, fit for JSON, under the key `measurements`.

    Args:
        run: A run directory.
        count: How many.
        history: Measurements to go on from: the sampled ones follow those of its sources, in turn.
        seed: Of the samples.

    Raises:
        ConfigError: `count` is below 1, or the model's sequences are too short.
        DataError: `history` cannot be read.
        CheckpointError: `run` is no run.
    """
    if count < 1:
        raise ConfigError(f"{count=} must be at least 1")
    predictor = Predictor.load(run)
    known = MeasurementTable.empty() if history is None else read_table([str(history)])
    found = sample(predictor, count, history=known, seed=seed)
    return {"measurements": _to_json(found)}


def sample(
    predictor: Predictor, count: int, *, history: MeasurementTable, seed: int = 0
) -> MeasurementTable:
    """Returns `count` sampled measurements; with a `history`, those that go on from it."""
    # About as many as will do: a sequence is sampled to its end.
    lanes = min(-(-count * tokenizer.MAX_MEASUREMENT_TOKENS // predictor.max_tokens), MAX_LANES)
    rng, prefix = np.random.default_rng(seed), _prefix(predictor, history, lanes)
    step = _Step(predictor, prefix.tokens.shape[1] + predictor.max_tokens)
    parts, done = [], 0
    with progress("generate", total=count, unit="measurements") as bar:
        while done < count:
            parts.append(_sample_lanes(predictor.max_tokens, step, prefix, rng))
            done += len(parts[-1])
            bar.update(done=min(done, count))
    return MeasurementTable.concat(parts).slice(0, count)


@dataclasses.dataclass(frozen=True)
class _Prefix:
    """What each lane starts from.

    Attributes:
        tokens: Token ids [lanes, P], int32.
        positions: Their positions; -1 at padding [lanes, P], int32.
    """

    tokens: np.ndarray
    positions: np.ndarray

    def grammar(self) -> Grammar:
        """Returns what may follow."""
        six = np.any(self.tokens == tokenizer.SRC_IPV6, axis=1)
        four = np.any(self.tokens == tokenizer.SRC_IPV4, axis=1)
        timed = np.any(np.isin(self.tokens, _TIMES), axis=1)
        return Grammar(timed, np.where(six, 2, four).astype(np.uint8))


def _prefix(predictor: Predictor, history: MeasurementTable, lanes: int) -> _Prefix:
    """Returns the newest measurements of each source of `history`, lanes taking turns.

    They take half of a sequence at most; the rest is for what is sampled.
    """
    if not len(history):
        nothing = np.zeros((lanes, 1), np.int32)
        return _Prefix(nothing, nothing - 1)
    first = np.unique(hash_addresses(history.src), return_index=True)[1]
    queries = history.take(first)
    contexts = same_source(history, queries, max_tokens=predictor.max_tokens // 2)
    prompts = encode_prompts(contexts, queries)
    of_lane = contexts.of_query[np.arange(lanes) % len(first)]
    width = int(prompts.context_lengths().max(initial=1))
    tokens, positions = dense(
        prompts.context_tokens, prompts.context_offsets, of_lane, np.zeros(lanes, np.int64), width
    )
    return _Prefix(tokens, positions)


def _sample_lanes(
    length: int, step: "_Step", prefix: _Prefix, rng: np.random.Generator
) -> MeasurementTable:
    """Returns the measurements of one sequence a lane, each as long as it can be."""
    longest = tokenizer.MAX_MEASUREMENT_TOKENS
    position = np.count_nonzero(prefix.positions >= 0, axis=1)
    if position.max() + longest > length:
        raise ConfigError(f"the model's sequences of {length} tokens are too short to sample in")
    cache, grammar = step.start(prefix.tokens, prefix.positions), prefix.grammar()
    place = prefix.tokens.shape[1]
    ids, alive = np.full(len(position), tokenizer.MEASUREMENT_START), np.ones(len(position), bool)
    sampled: list[np.ndarray] = []
    while True:
        # A lane ends where its next measurement might not fit.
        alive &= (ids != tokenizer.MEASUREMENT_START) | (position + longest <= length)
        if not alive.any():
            break
        sampled.append(np.where(alive, ids, -1))
        grammar.advance(ids)
        cache, logits = step.next(cache, ids, position, place)
        noisy = np.where(grammar.allowed(), logits + rng.gumbel(size=logits.shape), -np.inf)
        ids = np.argmax(noisy, axis=1)
        position, place = position + 1, place + 1
    found = []
    for lane, ids in enumerate(np.array(sampled).T):
        given = prefix.tokens[lane][prefix.positions[lane] >= 0]
        whole, _ = tokenizer.decode(np.concatenate([given, ids[ids >= 0]]))
        known = int(np.count_nonzero(given == tokenizer.MEASUREMENT_START))
        found.append(whole.slice(known, len(whole)))
    return MeasurementTable.concat(found)


class _Step:
    """One more token of every lane, over a cache of fixed size."""

    def __init__(self, predictor: Predictor, room: int):
        graphdef = predictor.graphdef

        def start(params, tokens, positions):
            model = nnx.merge(graphdef, params)
            _, read = decode.read(model, tokens, positions)
            empty = decode.empty_cache(model, tokens.shape[0], room)
            return decode.append(empty, read, jnp.int32(0))

        def following(params, cache, ids, position, place):
            model = nnx.merge(graphdef, params)
            x, read = decode.read(model, ids[:, None], position[:, None], (cache,))
            return decode.append(cache, read, place), model.logits(x)[:, 0]

        self._params = predictor.params
        self._start, self._following = jax.jit(start), jax.jit(following, donate_argnums=1)

    def start(self, tokens: np.ndarray, positions: np.ndarray) -> decode.Cache:
        """Returns the cache of what comes before."""
        return self._start(self._params, tokens, positions)

    def next(
        self, cache: decode.Cache, ids: np.ndarray, position: np.ndarray, place: int
    ) -> tuple[decode.Cache, np.ndarray]:
        """Returns (the cache with one more token a lane, the logits after it [n, 267])."""
        ids, position = ids.astype(np.int32), position.astype(np.int32)
        cache, logits = self._following(self._params, cache, ids, position, np.int32(place))
        return cache, np.asarray(logits, np.float64)


def _to_json(table: MeasurementTable) -> list[dict[str, Any]]:
    src, dst = (addresses.to_text(ends, table.family) for ends in (table.src, table.dst))
    times = np.datetime_as_string(table.time.astype("M8[s]"))
    return [
        {
            "event_time": f"{times[i]}Z" if table.has_time[i] else None,
            "src_addr": src[i],
            "dst_addr": dst[i],
            "ip_version": int(table.family[i]),
            "rtt": round(float(table.rtt[i]), 3),  # the codes are of whole microseconds
        }
        for i in range(len(table))
    ]
