"""What stands before a question: measurements that the model reads first, as tokens.

One context holds measurements of one source, like a segment in training, with the fields of each in
the order source, destination, time, result. The question is one more, cut before its result.
"""

import dataclasses

import numpy as np

from ping_llm import addresses, tokenizer
from ping_llm.hashing import hash_addresses
from ping_llm.measurements import NO_TIME, MeasurementTable

FIELD_ORDER = np.arange(4, dtype=np.uint8)
RTT_BYTES = 2


@dataclasses.dataclass(frozen=True)
class Contexts:
    """Contexts for n questions.

    Attributes:
        measurements: The measurements of all contexts, end to end.
        offsets: Context c is measurements `[c]:[c + 1]`; not empty [C + 1], int64.
        of_query: Which context each question has; -1 for none [n], int64.
    """

    measurements: MeasurementTable
    offsets: np.ndarray
    of_query: np.ndarray

    def lengths(self) -> np.ndarray:
        """Returns how many measurements stand before each question [n]."""
        return np.append(np.diff(self.offsets), 0)[self.of_query]


def no_contexts(n: int) -> Contexts:
    """Returns empty contexts for `n` questions."""
    return Contexts(MeasurementTable.empty(), np.zeros(1, np.int64), np.full(n, -1))


def from_groups(
    measurements: MeasurementTable, group: np.ndarray, of_query: np.ndarray
) -> Contexts:
    """Returns contexts out of groups of measurements.

    Args:
        measurements: In the order they are to be read.
        group: Which group each is in; -1: in none [m].
        of_query: Which group each question has for its context; -1 for none [n].
    """
    order = np.argsort(group, kind="stable")[np.count_nonzero(group < 0) :]
    groups, counts = np.unique(group[order], return_counts=True)
    at = np.searchsorted(groups, of_query)
    known = (of_query >= 0) & (np.append(groups, -2)[at] == of_query)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Contexts(measurements.take(order), offsets, np.where(known, at, -1))


def same_source(
    history: MeasurementTable, queries: MeasurementTable, *, max_tokens: int
) -> Contexts:
    """Returns for each question the newest measurements of its source that fit `max_tokens`.

    They stand in the order of time; those without a time come first, as they stood.
    """
    history = history.take(np.argsort(history.time, kind="stable"))
    sources, group = np.unique(hash_addresses(history.src), return_inverse=True)
    return trim(from_groups(history, group, _numbers(sources, queries)), max_tokens=max_tokens)


def _numbers(sources: np.ndarray, queries: MeasurementTable) -> np.ndarray:
    """Returns where in `sources`, ascending hashes, each question's source is; -1: nowhere."""
    wanted = hash_addresses(queries.src)
    at = np.searchsorted(sources, wanted)
    known = at < len(sources)
    known[known] = sources[at[known]] == wanted[known]
    return np.where(known, at, -1)


def newest_before(
    history: MeasurementTable, queries: MeasurementTable, *, max_tokens: int
) -> Contexts:
    """Returns for each question the newest measurements of its source before it that fit.

    They are of earlier seconds than the question's, in the order of time, and fit `max_tokens`.
    Questions that see the same measurements share a context.
    """
    sources, source = np.unique(hash_addresses(history.src), return_inverse=True)
    first = min(history.time.min(initial=2**40), queries.time.min(initial=2**40))
    last = max(history.time.max(initial=0), queries.time.max(initial=0))
    span = last - first + 1
    keys = source * span + (history.time - first)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    at = _numbers(sources, queries)
    begin = np.searchsorted(keys, at * span)
    stop = np.searchsorted(keys, at * span + (queries.time - first))
    # More than fit are cut off again below, by what they really take.
    begin = np.maximum(begin, stop - max_tokens // tokenizer.BARE_TOKENS[4])
    known = (at >= 0) & (stop > begin)
    ranges, of_range = np.unique(np.c_[begin, stop][known], axis=0, return_inverse=True)
    counts = ranges[:, 1] - ranges[:, 0]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    index = np.repeat(ranges[:, 0] - offsets[:-1], counts) + np.arange(offsets[-1])
    of_query = np.full(len(queries), -1)
    of_query[known] = of_range.ravel()
    contexts = Contexts(history.take(order[index]), offsets, of_query)
    return trim(contexts, max_tokens=max_tokens)


def random_of_source(
    history: MeasurementTable, queries: MeasurementTable, *, max_tokens: int, seed: int
) -> Contexts:
    """Returns for each question measurements of its source drawn at random, without their times.

    As many as are sure to fit `max_tokens`; all questions of a source share them.
    """
    sources, source = np.unique(hash_addresses(history.src), return_inverse=True)
    order = np.lexsort((np.random.default_rng(seed).random(len(source)), source))
    starts = np.searchsorted(source[order], source[order])
    rank = np.arange(len(order)) - starts
    chosen = order[rank < max_tokens // tokenizer.BARE_TOKENS[4]]
    contexts = from_groups(
        without_times(history.take(chosen)), source[chosen], _numbers(sources, queries)
    )
    return trim(contexts, max_tokens=max_tokens)


def without_times(measurements: MeasurementTable) -> MeasurementTable:
    """Returns the measurements as if their times were not known."""
    return dataclasses.replace(measurements, time=np.full(len(measurements), NO_TIME))


def trim(contexts: Contexts, *, max_tokens: int) -> Contexts:
    """Returns contexts without the first measurements of those that might not fit `max_tokens`.

    Measurements with a time must be in its order.
    """
    m = contexts.measurements
    six = m.family == 6
    most = np.where(six, tokenizer.BARE_TOKENS[6], tokenizer.BARE_TOKENS[4])
    most += np.where(m.has_time, tokenizer.NEXT_TIME_TOKENS, 0)
    group = np.repeat(np.arange(len(contexts.offsets) - 1), np.diff(contexts.offsets))
    left = np.cumsum(most[::-1])[::-1]  # tokens from here to the very end
    after = np.append(left, 0)[contexts.offsets[1:]]
    # The first one kept names the source, and may name a first time.
    first = np.where(six, tokenizer.SOURCE_TOKENS[6], tokenizer.SOURCE_TOKENS[4])
    first += tokenizer.FIRST_TIME_TOKENS - tokenizer.NEXT_TIME_TOKENS
    kept = left - after[group] <= max_tokens - first
    return from_groups(m.take(kept), group[kept], contexts.of_query)


def hide_sources(
    contexts: Contexts, queries: MeasurementTable, hidden: np.ndarray
) -> tuple[Contexts, MeasurementTable]:
    """Returns contexts and questions of which some do not tell their source.

    Args:
        contexts: One of each question, of its source.
        queries: The questions.
        hidden: Whether to hide the source of each question; the same for all of a context [n].
    """
    of_hidden = np.zeros(len(contexts.offsets), bool)
    of_hidden[contexts.of_query[hidden]] = True
    of_measurement = np.repeat(of_hidden[:-1], np.diff(contexts.offsets))
    measurements = _without_source(contexts.measurements, of_measurement)
    hidden_contexts = dataclasses.replace(contexts, measurements=measurements)
    return hidden_contexts, _without_source(queries, hidden)


def _without_source(measurements: MeasurementTable, hidden: np.ndarray) -> MeasurementTable:
    unspecified = addresses.unspecified(measurements.family)
    return dataclasses.replace(measurements, src=np.where(hidden, unspecified, measurements.src))


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Contexts and questions as tokens, ragged.

    Attributes:
        context_tokens: Tokens of all contexts, end to end, uint16.
        context_offsets: Context c is tokens `[c]:[c + 1]` [C + 1], int64.
        query_tokens: Tokens of all questions, end to end, each ending with RTT_START, uint16.
        query_offsets: Question i is tokens `[i]:[i + 1]` [n + 1], int64.
        of_query: Which context each question has; -1 for none [n], int64.
    """

    context_tokens: np.ndarray
    context_offsets: np.ndarray
    query_tokens: np.ndarray
    query_offsets: np.ndarray
    of_query: np.ndarray

    def context_lengths(self) -> np.ndarray:
        """Returns the tokens of the context of each question [n]."""
        return np.append(np.diff(self.context_offsets), 0)[self.of_query]


def encode_prompts(contexts: Contexts, queries: MeasurementTable) -> Prompts:
    """Returns the tokens of contexts and of the questions after them."""
    m, n = contexts.measurements, len(queries)
    context_tokens, context_offsets = _encode(m, contexts.offsets)
    # A question leaves out the source that its context ends with, and its time is counted from the
    # last known one there: encode it after a measurement of both, the anchor, and cut that off.
    rank = np.where(m.has_time, np.arange(len(m)), -1)
    ends = contexts.offsets[1:] - 1
    last_timed = np.maximum.accumulate(rank)[ends] if len(m) else ends
    anchored = np.flatnonzero(contexts.of_query >= 0)
    context = contexts.of_query[anchored]
    timed = last_timed[context]
    before = dataclasses.replace(
        m.take(ends[context]),
        time=np.where(timed >= contexts.offsets[context], m.time[timed], NO_TIME),
        rtt=np.full(len(anchored), -1, np.float32),
    )
    asked = dataclasses.replace(queries, rtt=np.zeros(n, np.float32))
    # Anchor, question, anchor, question, ...; a question without a context stands alone.
    joined = MeasurementTable.concat([before, asked])
    order = np.argsort(np.concatenate([2 * anchored, 2 * np.arange(n) + 1]))
    sizes = 1 + (contexts.of_query >= 0)
    tokens, offsets = _encode(joined.take(order), np.concatenate([[0], np.cumsum(sizes)]))
    skipped = np.zeros(n, np.int64)
    _, before_offsets = _encode(before, np.arange(len(anchored) + 1))
    skipped[anchored] = np.diff(before_offsets)
    starts, ends = offsets[:-1] + skipped, offsets[1:] - RTT_BYTES
    lengths = ends - starts
    query_offsets = np.concatenate([[0], np.cumsum(lengths)])
    at = np.repeat(starts - query_offsets[:-1], lengths) + np.arange(query_offsets[-1])
    return Prompts(context_tokens, context_offsets, tokens[at], query_offsets, contexts.of_query)


def _encode(measurements: MeasurementTable, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    field_order = np.broadcast_to(FIELD_ORDER, (len(measurements), 4))
    return tokenizer.encode(measurements, segment_offsets=offsets, field_order=field_order)


def dense(
    tokens: np.ndarray, offsets: np.ndarray, rows: np.ndarray, start: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens, positions) [r, length], int32, of ragged `rows`; -1 is padding or no row.

    Args:
        tokens: Ragged tokens, end to end.
        offsets: Where each row starts in them.
        rows: Which rows [r]; -1 gives an empty one.
        start: Position of the first token of each [r].
        length: Width of the result.
    """
    begin = np.append(offsets[:-1], 0)[rows]
    lengths = np.append(np.diff(offsets), 0)[rows]
    place = np.arange(length)
    real = place < lengths[:, None]
    at = np.where(real, begin[:, None] + place, 0)
    found = np.append(tokens, 0)[at].astype(np.int32)
    positions = np.where(real, start[:, None] + place, -1)
    return np.where(real, found, 0), positions.astype(np.int32)
