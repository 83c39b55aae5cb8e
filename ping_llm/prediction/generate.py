"""Measurements sampled from a model, under the grammar of the token language."""

import dataclasses
from typing import Any

import numpy as np

from ping_llm import addresses, settings, tokenizer
from ping_llm.errors import ConfigError
from ping_llm.estimators.pairs import runs
from ping_llm.hashing import hash_addresses
from ping_llm.ingest.sources import read_table
from ping_llm.measurements import MeasurementTable
from ping_llm.prediction import decode
from ping_llm.prediction.grammar import TIMES, Grammar
from ping_llm.prediction.predictor import Predictor
from ping_llm.prediction.settings import GenerateSettings
from ping_llm.prediction.text import TextResult, continue_prompt
from ping_llm.progress import progress

MAX_SEQUENCES = 64  # sampled side by side


@dataclasses.dataclass(frozen=True)
class GenerateResult:
    """Measurements that were sampled.

    Attributes:
        measurements: Each with event_time (ISO 8601, None where there is none), src_addr, dst_addr,
            ip_version and rtt in ms, -1 for a failure.
    """

    measurements: list[dict[str, Any]]


@settings.takes(GenerateSettings)
def generate(chosen: GenerateSettings) -> GenerateResult | TextResult:
    """Returns measurements sampled from a run, or text from a language model.

    With a history, measurements follow those of its sources, in turn.

    Raises:
        ConfigError: The run's sequences are too short, or `model` is none or not supported.
        DataError: `history` cannot be read, or the tokenizer of `model`.
        CheckpointError: `run` is no run, or `model` cannot be read.
    """
    if chosen.run is None:
        return continue_prompt(chosen)
    assert chosen.count is not None  # which the settings see to
    predictor = Predictor.load(chosen.run, chosen.step)
    nothing = MeasurementTable.empty()
    history = nothing if chosen.history is None else read_table([chosen.history])
    table = sample(predictor, chosen.count, history=history, seed=chosen.seed)
    src, dst = (addresses.to_text(ends, table.family) for ends in (table.src, table.dst))
    times = np.datetime_as_string(table.time.astype("M8[s]"))
    return GenerateResult(
        [
            {
                "event_time": f"{times[i]}Z" if table.has_time[i] else None,
                "src_addr": src[i],
                "dst_addr": dst[i],
                "ip_version": int(table.family[i]),
                "rtt": round(float(table.rtt[i]), 3),  # the codes are of whole microseconds
            }
            for i in range(len(table))
        ]
    )


def sample(
    predictor: Predictor, count: int, *, history: MeasurementTable, seed: int = 0
) -> MeasurementTable:
    """Returns `count` sampled measurements; with a `history`, those that go on from it."""
    # About as many as will do: a sequence is sampled to its end.
    needed = -(-count * tokenizer.MAX_MEASUREMENT_TOKENS // predictor.max_tokens)
    tokens, positions = _prefixes(predictor, history, min(needed, MAX_SEQUENCES))
    rng, tables, done = np.random.default_rng(seed), [], 0
    with progress("generate", total=count, unit="measurements") as bar:
        while done < count:
            tables.append(_sample_sequences(predictor, tokens, positions, rng))
            done += len(tables[-1])
            bar.update(done=min(done, count))
    return MeasurementTable.concat(tables).slice(0, count)


def _prefixes(
    predictor: Predictor, history: MeasurementTable, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what each of `n` sequences starts from: (tokens, positions) [n, P], int32.

    They are the newest measurements of each source of `history`, sources taking turns, and take
    half of a sequence at most; the rest is for what is sampled. Positions are -1 at padding.
    """
    if not len(history):
        nothing = np.zeros((n, 1), np.int32)
        return nothing, nothing - 1
    source = hash_addresses(history.src)
    order = np.lexsort((history.time, source))
    starts, counts = runs(source[order])
    family = history.family[order[starts]]
    named, bare = (
        np.where(family == 6, tokens[6], tokens[4])
        for tokens in (tokenizer.SOURCE_TOKENS, tokenizer.BARE_TOKENS)
    )
    room = predictor.max_tokens // 2 - named
    # As many as fit whatever their times are.
    kept = np.minimum(counts, np.maximum(room // (bare + tokenizer.FIRST_TIME_TOKENS), 0))
    left = np.repeat(starts + counts, counts) - np.arange(len(order))  # to the source's end
    newest = history.take(order[left <= np.repeat(kept, counts)])
    field_order = np.tile(np.arange(4, dtype=np.uint8), (len(newest), 1))
    segments = np.append(0, np.cumsum(kept))
    tokens, offsets = tokenizer.encode(newest, segment_offsets=segments, field_order=field_order)
    chosen = np.arange(n) % len(starts)
    lengths = np.diff(offsets)[chosen]
    column = np.arange(lengths.max(initial=1))
    real = column < lengths[:, None]
    index = np.where(real, offsets[chosen, None] + column, len(tokens))
    positions = np.where(real, column, -1)
    return np.append(tokens, 0)[index].astype(np.int32), positions.astype(np.int32)


def _grammar(prefixes: np.ndarray) -> Grammar:
    """Returns what may follow the tokens of prefixes [n, P]."""
    six, four = (np.any(prefixes == t, axis=1) for t in (tokenizer.SRC_IPV6, tokenizer.SRC_IPV4))
    timed = np.any(np.isin(prefixes, TIMES), axis=1)
    return Grammar(timed, np.where(six, 2, four).astype(np.uint8))


def _sample_sequences(
    predictor: Predictor, prefixes: np.ndarray, positions: np.ndarray, rng: np.random.Generator
) -> MeasurementTable:
    """Returns the measurements that follow prefixes [n, P], each sequence as long as it can be."""
    length, longest = predictor.max_tokens, tokenizer.MAX_MEASUREMENT_TOKENS
    position = np.count_nonzero(positions >= 0, axis=1)
    if position.max() + longest > length:
        raise ConfigError(f"the model's sequences of {length} tokens are too short to sample in")
    decoder, column = (predictor.model.graphdef, predictor.model.params), prefixes.shape[1]
    cache, grammar = (
        decode.begin(*decoder, prefixes, positions, column + length),
        _grammar(prefixes),
    )
    ids, alive = np.full(len(position), tokenizer.MEASUREMENT_START), np.ones(len(position), bool)
    sampled: list[np.ndarray] = []
    while True:
        # A sequence ends where its next measurement might not fit.
        alive &= (ids != tokenizer.MEASUREMENT_START) | (position + longest <= length)
        if not alive.any():
            break
        sampled.append(np.where(alive, ids, -1))
        grammar.advance(ids)
        inputs = ids.astype(np.int32), position.astype(np.int32), np.int32(column)
        cache, logits = decode.advance(*decoder, cache, *inputs)
        noisy = np.asarray(logits, np.float64) + rng.gumbel(size=logits.shape)
        ids = np.argmax(np.where(grammar.allowed(), noisy, -np.inf), axis=1)
        position, column = position + 1, column + 1
    tables = []
    for prefix, real, ids in zip(prefixes, positions >= 0, np.array(sampled).T, strict=True):
        given = prefix[real]
        table, _ = tokenizer.decode(np.concatenate([given, ids[ids >= 0]]))
        first = int(np.count_nonzero(given == tokenizer.MEASUREMENT_START))
        tables.append(table.slice(first, len(table)))
    return MeasurementTable.concat(tables)
