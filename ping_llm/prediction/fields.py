"""How well a decoder knows each field of a measurement, and what it expects token by token."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ping_llm import tokenizer
from ping_llm.estimators.pairs import runs
from ping_llm.hashing import hash_addresses
from ping_llm.measurements import MeasurementTable
from ping_llm.prediction.joint import BYTES, normalised

MAX_MEASUREMENTS = 512  # whose fields are asked
MAX_COUNTED = 100_000  # train measurements whose frequencies are counted
BLOCK = 64  # sequences computed at once
SEED = 0
_NAMES = ("source", "destination", "time", "rtt")  # as `field_order` numbers them
_RESULTS = np.isin(np.arange(tokenizer.VOCAB_SIZE), [tokenizer.RTT_START, tokenizer.FAILED])
_HEADS = (
    (tokenizer.SRC_IPV4, tokenizer.SRC_IPV6),
    (tokenizer.DST_IPV4, tokenizer.DST_IPV6),
    (tokenizer.TIMESTAMP_ABS,),
    (tokenizer.RTT_START, tokenizer.FAILED),
)


@dataclasses.dataclass(frozen=True)
class FieldLoss:
    """Losses of one field in nats a measurement: of its bytes, and of failed or not.

    Attributes:
        n: Measurements.
        last: When it is asked last, all others given.
        first: When it is asked first, nothing given.
        marginal: Of its frequencies in train, each byte after those before it: the best that can be
            said without the other fields.
        constant: Of the frequencies in train of each of its bytes alone: the best constant.
    """

    n: int
    last: float
    first: float
    marginal: float
    constant: float


def field_losses(
    graphdef: Any, params: Any, rows: MeasurementTable, train: MeasurementTable
) -> dict[str, FieldLoss]:
    """Returns the losses of each field of at most `MAX_MEASUREMENTS` of some measurements.

    Args:
        graphdef: The decoder's static part.
        params: Its parameters.
        rows: The measurements.
        train: What frequencies are counted of.
    """
    rng = np.random.default_rng(SEED)

    def some(table: MeasurementTable, most: int) -> MeasurementTable:
        if len(table) <= most:
            return table
        return table.take(np.sort(rng.choice(len(table), most, replace=False)))

    rows, train = some(rows, MAX_MEASUREMENTS), some(train, MAX_COUNTED)
    # Four orders, in which each field stands first once, and last once.
    first, last = {}, {}
    for turn in range(4):
        order = np.roll(np.arange(4), -turn)
        tokens, lengths = _sequences(rows, order)
        nll = np.zeros(tokens.shape)
        for start in range(0, len(rows), BLOCK):
            part = slice(start, start + BLOCK)
            nll[part, 1:] = -_log_probabilities(graphdef, params, tokens[part])
        real = np.arange(tokens.shape[1]) < lengths[:, None]
        for place, losses in ((0, first), (3, last)):
            losses[order[place]] = _of_field(tokens, np.where(real, nll, 0.0), order[place])
    found = {}
    for field, name in enumerate(_NAMES):
        has = np.ones(len(rows), bool) if name != "time" else rows.has_time
        if has.any():
            marginal, constant = _frequencies(_payloads(train, field), _payloads(rows, field))
            values = (last[field][has], first[field][has], marginal, constant)
            found[name] = FieldLoss(int(has.sum()), *(float(np.mean(each)) for each in values))
    return found


def _sequences(rows: MeasurementTable, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens [n, T] of each measurement alone, how many they are [n])."""
    n = len(rows)
    tokens, offsets = tokenizer.encode(
        rows,
        segment_offsets=np.arange(n + 1),
        field_order=np.tile(order.astype(np.uint8), (n, 1)),
    )
    lengths = np.diff(offsets)
    padded = np.zeros((n, tokenizer.MAX_MEASUREMENT_TOKENS), np.int32)
    column = np.arange(padded.shape[1])
    real = column < lengths[:, None]
    padded[real] = tokens
    return padded, lengths


def _log_probabilities(graphdef: Any, params: Any, tokens: np.ndarray) -> np.ndarray:
    """Returns the log-probability of each token after the first of sequences [n, T - 1].

    A byte is normalised over bytes, a result over answered and failed; other tokens, which say
    which field comes, count nothing.
    """
    block = np.zeros((BLOCK, tokens.shape[1]), np.int32)
    block[: len(tokens)] = tokens
    logits = np.asarray(_logits(graphdef, params, block), np.float64)[: len(tokens), :-1]
    following = tokens[:, 1:]
    is_byte = (following >= tokenizer.BYTE_0)[..., None]
    log_p = normalised(logits, np.where(is_byte, BYTES, _RESULTS))
    chosen = np.take_along_axis(log_p, following[..., None], axis=2)[..., 0]
    return np.where(is_byte[..., 0] | _RESULTS[following], chosen, 0.0)


def _of_field(tokens: np.ndarray, nll: np.ndarray, field: int) -> np.ndarray:
    """Returns the sum over the tokens of one field [n]."""
    heads = np.isin(tokens, _HEADS[field])
    # From its head to the next id that is no byte.
    is_head = tokens < tokenizer.BYTE_0
    position = np.where(is_head, np.arange(tokens.shape[1]), 0)
    owner = np.maximum.accumulate(position, axis=1)
    return np.where(np.take_along_axis(heads, owner, axis=1), nll, 0.0).sum(axis=1)


def _payloads(table: MeasurementTable, field: int) -> list[tuple[int, ...]]:
    """Returns what the tokens of a field say: families, failures and bytes, for frequencies."""
    if field == 2:
        table = table.take(table.has_time)
    tokens, _ = _sequences(table, np.roll(np.arange(4), -field))  # the field first
    return [(row[1], *row[2 : 2 + tokenizer.PAYLOAD_BYTES[row[1]]]) for row in tokens.tolist()]


def _frequencies(
    train: list[tuple[int, ...]], asked: list[tuple[int, ...]]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns losses [n] by the frequencies in `train` of bytes after those before, and alone.

    Each of 256 bytes has one count more than it has, shared among them, so that none is impossible.
    """
    after: dict[tuple[int, ...], int] = {}
    alone: dict[tuple[int, ...], int] = {}
    for payload in train:
        for i in range(len(payload) + 1):
            after[payload[:i]] = after.get(payload[:i], 0) + 1
        for i, byte in enumerate(payload[1:]):
            alone[payload[0], i, byte] = alone.get((payload[0], i, byte), 0) + 1
    results = (tokenizer.RTT_START, tokenizer.FAILED)
    losses = np.zeros((2, len(asked)))
    for j, payload in enumerate(asked):
        if payload[0] in results:
            share = (after.get(payload[:1], 0) + 0.5) / (len(train) + 1)
            losses[:, j] -= np.log(share)
        total = after.get(payload[:1], 0)
        for i, byte in enumerate(payload[1:]):
            before = after.get(payload[: i + 1], 0)
            counted = after.get(payload[: i + 2], 0), alone.get((payload[0], i, byte), 0)
            for row, (count, of) in enumerate(zip(counted, (before, total), strict=True)):
                losses[row, j] -= np.log((count + 1 / 256) / (of + 1))
    return losses[0], losses[1]


def token_table(
    graphdef: Any, params: Any, rows: MeasurementTable, count: int, *, longest: int
) -> list[dict[str, Any]]:
    """Returns the actual and the expected token at each of the first `count` places of a window.

    The window is of the source of most measurements, in time order, their fields in random orders.
    Each has its `position`, `field`, the `actual` token and its probability `p_actual`, the one
    `predicted`, which is the likeliest, and its probability `p_predicted`.
    """
    sources = hash_addresses(rows.src)
    order = np.lexsort((rows.time, sources))
    starts, counts = runs(sources[order])
    largest = int(np.argmax(counts))
    window = rows.take(order[starts[largest] : starts[largest] + counts[largest]])
    count = min(count, longest)  # which it was trained on
    window = window.slice(0, count)  # each has more than one token
    rng = np.random.default_rng(SEED)
    orders = np.array([rng.permutation(4) for _ in range(len(window))], np.uint8)
    offsets = np.array([0, len(window)])
    tokens, _ = tokenizer.encode(window, segment_offsets=offsets, field_order=orders)
    tokens = tokens[: count + 1].astype(np.int32)
    logits = np.asarray(_logits(graphdef, params, tokens[None]), np.float64)[0, :-1]
    probabilities = np.exp(normalised(logits, np.ones(tokenizer.VOCAB_SIZE, bool)))
    fields = tokenizer.field_of(tokens)
    return [
        {
            "position": i + 1,
            "field": tokenizer.FIELDS[fields[i + 1]],
            "actual": tokenizer.token_name(int(token)),
            "p_actual": float(each[token]),
            "predicted": tokenizer.token_name(int(np.argmax(each))),
            "p_predicted": float(each.max()),
        }
        for i, (token, each) in enumerate(zip(tokens[1:], probabilities, strict=True))
    ]


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, params, tokens):
    return nnx.merge(graphdef, params)(jnp.asarray(tokens))
