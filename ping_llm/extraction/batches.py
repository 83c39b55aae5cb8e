"""The prompts of a work unit, packed into batches of a few fixed shapes."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from ping_llm.activations.store import UnitPrompts
from ping_llm.extraction.settings import ExtractSettings
from ping_llm.packing import best_fit, pack

# Prompts are packed into rows of one width; longer ones go into rows of the next, and each width
# that occurs is one compiled program. Attention is computed over the whole row, so rows should not
# be wide, yet narrow ones are hard to fill: rows of 2,048 hold prompts of 200 to 1,500 tokens with
# 2 % padding.
ROW_WIDTHS = (2048, 8192, 32768)

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


def row_widths(cfg: ExtractSettings) -> tuple[int, ...]:
    """Returns the widths of rows, ascending; the last holds a prompt of `max_length`."""
    assert cfg.max_length is not None
    assert cfg.batch_tokens is not None
    roomy = min(2 * cfg.max_length, ROW_WIDTHS[0], cfg.batch_tokens)
    widest = max(cfg.max_length, roomy)
    return (*(width for width in ROW_WIDTHS if width < widest), widest)


def make_batches(
    prompts: UnitPrompts, cfg: ExtractSettings, *, values: int
) -> Iterator[PackedBatch]:
    """Yields the batches of a unit; they depend on what is given here only.

    Prompts stay near their order, so that finished rows can be written while others are computed.

    Args:
        prompts: The unit's prompts.
        cfg: The settings, nothing left open.
        values: How many numbers are taken from the device for each token, of all arrays.
    """
    assert cfg.batch_tokens is not None
    widths = np.array(row_widths(cfg))
    row_bytes = int(widths[-1]) * values * (4 if cfg.dtype == "float32" else 2)
    window_rows = int(np.clip(WAITING_BYTES // row_bytes, *WINDOW_ROWS))
    waiting: dict[int, list[list[int]]] = {int(width): [] for width in widths}
    for row in _rows(np.diff(prompts.offsets), widths, window_rows):
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
        for first in range(0, len(rows), height):
            yield _batch(prompts, rows[first : first + height], height, width)


# Example: seven prompts, rows of 64 or 128 tokens, and a window of one row, 128 tokens.
#
#   lengths      30 40 0 63 20 90 34       sample 2 is empty: it is in no row
#   1st window   30 40                     63 more would be over 128
#     best fit   [1] [0]                   40 + 30 > 64; neither is 98 % full: both are put off
#   2nd window   40 30 | 63 20             samples 1 and 0 once more, then 3 and 4
#     best fit   [3] [1 4] [0]             all are yielded: 3 is full, 1 and 0 have waited once
#   3rd window   90 34                     90 needs a row of 128, in which 34 still fits
#     best fit   [5 6]                     yielded, as nothing comes after it
def _rows(lengths: np.ndarray, widths: np.ndarray, window_rows: int) -> Iterator[list[int]]:
    """Yields rows, each a list of samples; empty samples are in none."""
    samples = np.flatnonzero(lengths)
    window = window_rows * int(widths[-1])
    ends = np.cumsum(lengths[samples])
    put_off: list[int] = []
    taken = 0  # of `samples`
    while taken < len(samples) or put_off:
        tokens_before = int(ends[taken - 1]) if taken else 0
        stop = int(np.searchsorted(ends, tokens_before + window, side="right"))
        stop = max(stop, taken + 1)
        chosen = np.array([*put_off, *samples[taken:stop].tolist()])
        capacity = widths[np.searchsorted(widths, lengths[chosen])]
        rows = [chosen[row].tolist() for row in best_fit(lengths[chosen], capacity)]
        put_off_before, put_off, taken = set(put_off), [], stop
        for row in rows:
            width = widths[np.searchsorted(widths, lengths[row].max())]
            full = lengths[row].sum() >= FULL_ENOUGH * width
            # A row with room waits once for the prompts that come next.
            if full or taken >= len(samples) or not put_off_before.isdisjoint(row):
                yield row
            else:
                put_off += row


def _batch(prompts: UnitPrompts, rows: list[list[int]], height: int, width: int) -> PackedBatch:
    sequences: list[list[np.ndarray]] = [[] for _ in range(height)]
    pieces = []
    for r, row in enumerate(rows):
        column = 0
        for sample in row:
            start, stop = (int(offset) for offset in prompts.offsets[sample : sample + 2])
            sequences[r].append(prompts.tokens[start:stop])
            pieces.append((r, column, stop - start, start))
            column += stop - start
    return PackedBatch(*pack(sequences, width), pieces=np.array(pieces, np.int64))
