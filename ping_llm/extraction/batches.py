"""The prompts of a work unit, packed into batches of a few fixed shapes."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from ping_llm.extraction.config import ExtractionConfig
from ping_llm.extraction.prompts import Prompts
from ping_llm.packing import best_fit

# Prompts that fill about so many rows are packed together: the more, the less padding, and the more
# activations wait on the host for those before them. So fewer where that would be much memory.
WINDOW_ROWS = (4, 32)
WAITING_BYTES = 4 << 30
FULL_ENOUGH = 0.98


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """What the device computes at once.

    Attributes:
        tokens: Token ids, 0 at padding [B, T], int32.
        segment_ids: From 1 in each row, 0 at padding [B, T], int32.
        positions: Position in the prompt [B, T], int32.
        pieces: For each prompt: row, first column, length, and where its first token stands among
            the unit's [s, 4].
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    pieces: np.ndarray


def make_batches(prompts: Prompts, cfg: ExtractionConfig, *, d_model: int) -> Iterator[PackedBatch]:
    """Yields the batches of a unit; they depend on its prompts, the settings and `d_model` only.

    Prompts stay near their order, so that finished rows can be written while others are computed.
    """
    widths = np.array(cfg.row_widths)
    waiting: dict[int, list[list[int]]] = {int(width): [] for width in widths}
    row_bytes = int(widths[-1]) * d_model * len(cfg.arrays) * (4 if cfg.dtype == "float32" else 2)
    fewest, most = WINDOW_ROWS
    window_rows = min(max(WAITING_BYTES // row_bytes, fewest), most)
    for row in _rows(prompts, widths, window_rows):
        longest = max(int(prompts.offsets[s + 1] - prompts.offsets[s]) for s in row)
        width = int(widths[np.searchsorted(widths, longest)])
        waiting[width].append(row)
        height = cfg.batch_tokens // width
        if len(waiting[width]) == height:
            yield _batch(prompts, waiting[width], height, width)
            waiting[width] = []
    for width, rows in waiting.items():
        # What is left over goes into batches of a quarter, unless one whole batch costs no more.
        height = cfg.batch_tokens // width
        quarter = max(height // 4, 1)
        height = height if len(rows) > height - quarter else quarter
        for at in range(0, len(rows), height):
            yield _batch(prompts, rows[at : at + height], height, width)


def _rows(prompts: Prompts, widths: np.ndarray, window_rows: int) -> Iterator[list[int]]:
    """Yields rows, each a list of samples; empty samples are in none."""
    lengths = np.diff(prompts.offsets)
    samples = np.flatnonzero(lengths)
    window = window_rows * int(widths[-1])
    ends = np.cumsum(lengths[samples])
    put_off: list[int] = []
    at = 0
    while at < len(samples) or put_off:
        done = int(ends[at - 1]) if at else 0
        stop = max(int(np.searchsorted(ends, done + window, side="right")), at + 1)
        chosen = np.array([*put_off, *samples[at:stop].tolist()])
        capacity = widths[np.searchsorted(widths, lengths[chosen])]
        rows = [chosen[row].tolist() for row in best_fit(lengths[chosen], capacity)]
        first, at = set(put_off), stop
        put_off = []
        for row in rows:
            width = widths[np.searchsorted(widths, lengths[row].max())]
            full = lengths[row].sum() >= FULL_ENOUGH * width
            # A row with room waits once for the prompts that come next.
            if full or at >= len(samples) or not first.isdisjoint(row):
                yield row
            else:
                put_off += row


def _batch(prompts: Prompts, rows: list[list[int]], height: int, width: int) -> PackedBatch:
    tokens, segments, positions = (np.zeros((height, width), np.int32) for _ in range(3))
    pieces = []
    for r, row in enumerate(rows):
        column = 0
        for segment, sample in enumerate(row, 1):
            start, stop = (int(offset) for offset in prompts.offsets[sample : sample + 2])
            place = r, slice(column, column + stop - start)
            tokens[place] = prompts.tokens[start:stop]
            segments[place] = segment
            positions[place] = np.arange(stop - start)
            pieces.append((r, column, stop - start, start))
            column += stop - start
    return PackedBatch(tokens, segments, positions, np.array(pieces, np.int64))
