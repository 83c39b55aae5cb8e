"""Grids of a network: what the sources and destinations most like a question's measured.

Rows are the sources most like the one asked about, the most like last, then that one itself;
columns the destinations most like the one asked about, then that one itself. The last cell of the
last row is the question. A row is

    likeness  failure  estimate  (marker cell) x COLUMNS  weighted-median  noise noise  own

with a byte each but for `own`, which is a marker and the two bytes of the row's own cell; in the
last row the answer stands there. Before the rows stand GRID, the kind, the likeness of each column,
and how much is known of both ends. Each cell is the difference of its log RTT to that of the cell
at its left, else above it, so nothing tells the absolute RTTs; the cell asked for differs from its
weighted median.
"""

import numpy as np

from ping_llm.data.cells import BETWEEN_PAIRS, NOTHING, Grids, high_byte, level, low_byte
from ping_llm.estimators.world import MeasuredWorld
from ping_llm.tokenizer import BYTE_0, GRID

KIND = BYTE_0 + 1
ROWS = COLUMNS = 4  # likes of each end
HEADER_TOKENS = 2 + COLUMNS + 2 + 5  # GRID, kind, columns, degrees, failures
ROW_TOKENS = 3 + 2 * COLUMNS + 6
GRID_TOKENS = HEADER_TOKENS + (ROWS + 1) * ROW_TOKENS - 3  # without the answer

# Weights of what a grid teaches beside its answer; the factor column hardly depends on the rest.
OWN_WEIGHT, CELL_WEIGHT, ESTIMATE_WEIGHT = 0.6, 0.3, 0.1
LANDMARK_CLASSES = (1, 4, 16)  # common partners: 0, 1-3, 4-15, 16 and more
ONLY_FAILED = NOTHING + 255  # the marker of a pair that never answered


def network_grids(world: MeasuredWorld, a: np.ndarray, b: np.ndarray) -> Grids:
    """Returns the grids of questions about the pairs (a, b) of a world's nodes [q].

    What was measured of a pair itself is not shown.
    """
    q = len(a)
    columns = np.concatenate([world.likes(a, b, COLUMNS), b[:, None]], axis=1)
    rows = np.concatenate([world.likes(b, a, ROWS), a[:, None]], axis=1)
    there = (rows >= 0)[:, :, None] & (columns >= 0)[:, None, :]
    there[:, -1, -1] = False  # the question
    node_r, node_c = np.maximum(rows, 0), np.maximum(columns, 0)
    cell = node_r[:, :, None], node_c[:, None, :]
    measured = np.where(there, world.log_rtt[cell], np.nan)
    asked = node_r.ravel(), np.repeat(b, ROWS + 1)
    is_row = rows >= 0
    median, *noise = (
        np.where(is_row, each.reshape(q, -1), np.nan) for each in world.weighted_median(*asked)
    )
    estimate = np.where(is_row, world.estimate[node_r, b[:, None]], np.nan)
    shown = [estimate[:, :, None], measured[:, :, :-1], median[:, :, None], measured[:, :, -1:]]
    codes, reference = _differences(np.concatenate(shown, axis=2))
    high = np.where(codes < 0, NOTHING, high_byte(codes))  # [q, rows, columns + 3]
    marker = _markers(world, cell, there)

    header = np.full((q, HEADER_TOKENS), GRID)
    header[:, 1] = KIND
    header[:, 2 : 2 + COLUMNS] = _likeness(world, b, columns[:, :-1])
    header[:, 2 + COLUMNS] = _count(world.degree[b])
    about_ends = [_count(world.degree[a]), *_failures(world, a), *_failures(world, b)]
    about_ends.append(_failure(world.failure_logit[a, b]))
    header[:, 3 + COLUMNS :] = np.stack(about_ends, axis=1)
    body = np.full((q, ROWS + 1, ROW_TOKENS), NOTHING)
    body[:, :-1, 0] = _likeness(world, a, rows[:, :-1])
    body[:, :, 1] = np.where(is_row, _failure(world.failure_logit[node_r, b[:, None]]), NOTHING)
    body[:, :, 2] = high[:, :, 0]
    body[:, :, 3 : 3 + 2 * COLUMNS : 2] = marker[:, :, :-1]
    body[:, :, 4 : 4 + 2 * COLUMNS : 2] = high[:, :, 1:-2]
    end = 3 + 2 * COLUMNS
    body[:, :, end] = high[:, :, -2]
    for i, each in enumerate(noise):
        body[:, :, end + 1 + i] = level(each, 2e-4, 12)
    body[:, :, end + 3] = marker[:, :, -1]
    body[:, :, end + 4] = high[:, :, -1]
    body[:, :, end + 5] = np.where(codes[:, :, -1] < 0, NOTHING, low_byte(codes[:, :, -1]))

    weight = np.zeros(body.shape, np.float32)
    known = codes >= 0
    weight[:, :, 2] = ESTIMATE_WEIGHT * known[:, :, 0]
    weight[:, :, 4 : 4 + 2 * COLUMNS : 2] = CELL_WEIGHT * known[:, :, 1:-2]
    weight[:, :, end] = ESTIMATE_WEIGHT * known[:, :, -2]
    weight[:, :, end + 4] = OWN_WEIGHT * known[:, :, -1]
    weight[:, :, end + 5] = ESTIMATE_WEIGHT * known[:, :, -1]

    tokens = np.concatenate([header, body.reshape(q, -1)[:, :-3]], axis=1).astype(np.uint16)
    weights = np.concatenate([np.zeros(header.shape), weight.reshape(q, -1)[:, :-3]], axis=1)
    shown = np.where(there, world.answered[cell], 0).sum(axis=(1, 2))
    return Grids(tokens, weights.astype(np.float32), reference, BETWEEN_PAIRS, shown)


# A row of log RTTs [2.0, -, 2.5] under one of [1.8, 1.9, -], "-" unknown: the first row is told as
# [-, 0.1, -], for nothing precedes its first cell; the second as [0.2, -, 0.5], its first cell
# against the one above, its last against the one known at its left.
def _differences(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (codes of the cells, what the last cell of each grid differs from).

    Args:
        values: Log RTTs by row and column, NaN where there is none [q, rows, columns].

    Returns:
        Codes [q, rows, columns], -1 where there is nothing to show; log RTTs [q].
    """
    q, n_rows, n_columns = values.shape
    codes = np.full(values.shape, -1)
    above = np.full((q, n_columns), np.nan)
    reference = np.zeros(q)
    for i in range(n_rows):
        left = np.full(q, np.nan)
        for j in range(n_columns):
            value = values[:, i, j]
            reference = np.where(np.isnan(left), above[:, j], left)
            difference = value - reference
            told = np.isfinite(difference)
            codes[told, i, j] = BETWEEN_PAIRS.encode(difference[told])
            left = np.where(np.isnan(value), left, value)
            above[:, j] = np.where(np.isnan(value), above[:, j], value)
    return codes, np.nan_to_num(reference)


def _markers(
    world: MeasuredWorld, cell: tuple[np.ndarray, np.ndarray], there: np.ndarray
) -> np.ndarray:
    """Returns the marker of each cell: how many measurements, and how much they vary."""
    answered, spread = world.answered[cell], world.spread[cell]
    steps = 1 + np.rint(3 * np.log2(np.maximum(np.nan_to_num(spread), 1e-9) / 5e-4))
    varied = np.where(answered > 1, np.clip(steps, 0, 38), 0)
    marker = NOTHING + 1 + 40 * np.floor(np.log2(np.maximum(answered, 1))) + varied
    marker = np.where(answered > 0, marker, np.where(world.failed[cell] > 0, ONLY_FAILED, NOTHING))
    return np.where(there, marker, NOTHING)


def _likeness(world: MeasuredWorld, node: np.ndarray, likes: np.ndarray) -> np.ndarray:
    """Returns a byte of how alike `likes` [q, k] are to `node` [q], and on how many partners."""
    other = np.maximum(likes, 0)
    difference = np.maximum(world.difference[node[:, None], other], 1e-4)
    steps = np.clip(np.rint(5 * np.log2(difference / 1e-3)), 0, 62)
    known = np.searchsorted(LANDMARK_CLASSES, world.common[node[:, None], other], side="right")
    return np.where(likes >= 0, NOTHING + 1 + 63 * known + steps, NOTHING)


def _count(number: np.ndarray) -> np.ndarray:
    return NOTHING + 1 + np.minimum(np.rint(8 * np.log2(1.0 + number)), 254)


def _failures(world: MeasuredWorld, node: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    share, count = world.failures[:, node]
    return NOTHING + 1 + np.rint(64 * np.sqrt(share)), _count(count)


def _failure(logit: np.ndarray) -> np.ndarray:
    return NOTHING + 128 + np.clip(np.rint(12 * logit), -127, 127)
