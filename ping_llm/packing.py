"""Ragged sequences to dense [B, T] batches with segment ids and positions."""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

# A sequence of T tokens holds at most T / 16 segments: kernels that take a packed batch must know
# how many there may be.
SHORTEST_SEGMENT = 16


@dataclasses.dataclass(frozen=True)
class Batch:
    """Next-token examples of one process.

    Attributes:
        inputs: Token ids [B, T], int32.
        targets: The ids that follow, [B, T], int32.
        segment_ids: Segment of each input, from 1 in each sequence [B, T], int32; 0 is padding.
        positions: Position of each input within its segment [B, T], int32.
        mask: How much each target counts, 0 where it lies outside its input's segment [B, T],
            float32.
    """

    inputs: np.ndarray
    targets: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    mask: np.ndarray


def next_token_batch(
    tokens: np.ndarray,
    segment_ids: np.ndarray,
    positions: np.ndarray,
    weights: Sequence[np.ndarray] | None = None,
) -> Batch:
    """Returns the next-token examples in packed sequences, each [B, T + 1], int32.

    Args:
        tokens: Token ids.
        segment_ids: Segment of each token.
        positions: Its position there.
        weights: How much predicting the tokens of each segment counts, in order; None: 1 each.
    """
    here, after = segment_ids[:, :-1], segment_ids[:, 1:]
    mask = ((here == after) & (after != 0)).astype(np.float32)
    if weights is not None:
        dense = np.zeros(tokens.shape, np.float32)
        dense[segment_ids > 0] = np.concatenate(weights)
        mask *= dense[:, 1:]
    return Batch(tokens[:, :-1], tokens[:, 1:], here, positions[:, :-1], mask)


def best_fit(lengths: np.ndarray, capacity: int | np.ndarray) -> list[list[int]]:
    """Returns which segments go into each sequence of `capacity` tokens.

    Capacities may differ [n]: a segment that fits nowhere opens a sequence of its own capacity.

    Longest first, each into the fullest sequence that it still fits (best-fit decreasing). A
    segment takes the room of `SHORTEST_SEGMENT` tokens at least, or that of a whole sequence.
    """
    sequences: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, which sequence), ascending
    capacities = np.broadcast_to(capacity, len(lengths))
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = max(int(lengths[i]), min(SHORTEST_SEGMENT, int(capacities[i])))
        at = bisect.bisect_left(room, (length, -1))
        if at == len(room):
            left, sequence = int(capacities[i]), len(sequences)
            sequences.append([])
        else:
            left, sequence = room.pop(at)
        sequences[sequence].append(i)
        bisect.insort(room, (left - length, sequence))
    return sequences


def pack(
    sequences: Sequence[Sequence[np.ndarray]], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns sequences of whole segments as dense arrays [B, length], int32.

    Args:
        sequences: The segments of each of B sequences, each an array of tokens.
        length: Tokens of a sequence; what is not filled is padding.

    Returns:
        (tokens, segment_ids, positions): tokens are 0 at padding; segments are numbered from 1 in
        each sequence, and 0 is padding; positions count from 0 in each segment.
    """
    segments = [segment for sequence in sequences for segment in sequence]
    sizes: list[int] = []
    ids: list[int] = []
    for sequence in sequences:
        filled = [len(segment) for segment in sequence]
        sizes += [*filled, length - sum(filled)]
        ids += [*range(1, len(sequence) + 1), 0]
    widths = np.array(sizes)
    segment_ids = np.repeat(np.array(ids, np.int32), widths)
    real = segment_ids > 0
    starts = (np.cumsum(widths) - widths).astype(np.int32)
    positions = np.arange(len(segment_ids), dtype=np.int32) - np.repeat(starts, widths)
    positions[~real] = 0
    tokens = np.zeros(len(segment_ids), np.int32)
    tokens[real] = np.concatenate(segments)
    shape = len(sequences), length
    return tokens.reshape(shape), segment_ids.reshape(shape), positions.reshape(shape)


def ragged(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (segment, index within it) of each element of segments of `counts` elements.

    For [2, 0, 1]: ([0, 0, 2], [0, 1, 0]), int64.
    """
    segment = np.repeat(np.arange(len(counts)), counts)
    return segment, np.arange(len(segment)) - np.repeat(np.cumsum(counts) - counts, counts)
