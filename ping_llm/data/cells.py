"""Cells of a grid: differences of log RTTs as bytes, fine near 0 and coarse far away.

A grid is a segment of tokens that shows what was measured around a question, one byte or two a
cell. A cell holds by how much its log RTT differs from one that the model already knows, as the
inverse hyperbolic sine of the difference over `scale`: near 0 a step of the code is
`scale / STEPS` wide, far from 0 it is a share of the difference itself (companding, as in audio).
Its high byte alone is a good short form of it.
"""

import dataclasses

import numpy as np

from ping_llm.tokenizer import BYTE_0, FAILED, RTT_START

STEPS = 2900.0  # codes to one unit of asinh
ZERO = 32768 + 128  # of no difference: the middle of a high byte
# 0 of a byte in a grid: there is nothing to show.
NOTHING = BYTE_0
ANSWER_TOKENS = 3
ANSWER_WEIGHTS = (1.0, 2.0, 1.0)  # of RTT_START, and of the two bytes that tell most and least


@dataclasses.dataclass(frozen=True)
class Scale:
    """How differences of log RTTs are coded.

    Attributes:
        unit: The difference around which steps begin to widen: about the usual error.
    """

    unit: float

    def encode(self, difference: np.ndarray) -> np.ndarray:
        """Returns 16-bit codes of differences, int64; the high byte of none is 0."""
        code = ZERO + np.rint(STEPS * np.arcsinh(difference / self.unit))
        return np.clip(code, 256, 65535).astype(np.int64)

    def decode(self, code: np.ndarray) -> np.ndarray:
        """Returns the differences that codes stand for, float64."""
        return self.unit * np.sinh((np.asarray(code, np.float64) - ZERO) / STEPS)


# Of one pair over time, and of pairs against what their neighbours say.
OVER_TIME = Scale(5e-4)
BETWEEN_PAIRS = Scale(4e-3)


def level(value: np.ndarray, unit: float, steps_per_octave: float) -> np.ndarray:
    """Returns a byte token for positive values on a logarithmic scale; `NOTHING` for NaN.

    `unit` is the smallest value told apart: it and those below are byte 1.
    """
    steps = np.log2(np.maximum(np.nan_to_num(value), unit) / unit) * steps_per_octave
    byte = np.clip(1 + np.rint(steps), 1, 255).astype(np.int64)
    return np.where(np.isnan(value), NOTHING, NOTHING + byte)


def high_byte(code: np.ndarray) -> np.ndarray:
    """Returns the token of the high byte of codes."""
    return BYTE_0 + (code >> 8)


def low_byte(code: np.ndarray) -> np.ndarray:
    """Returns the token of the low byte of codes."""
    return BYTE_0 + (code & 255)


@dataclasses.dataclass(frozen=True)
class Grids:
    """Questions as grids, all of one shape, up to where the answer begins.

    Attributes:
        tokens: Token ids [q, T], uint16.
        weights: How much predicting each token counts in training [q, T], float32.
        reference: The log RTT that the answer is told as a difference to [q], float64.
        scale: How that difference is coded.
        shown: How many measurements the cells stand for [q].
    """

    tokens: np.ndarray
    weights: np.ndarray
    reference: np.ndarray
    scale: Scale
    shown: np.ndarray


def answer_tokens(difference: np.ndarray, scale: Scale) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens of answers, their weights) [q, 3].

    Args:
        difference: Log RTT minus the reference [q], infinite where the measurement failed.
        scale: How it is coded.
    """
    failed = np.isinf(difference)[:, None]
    code = scale.encode(np.where(np.isinf(difference), 0, difference))
    told = np.stack([np.full(len(code), RTT_START), high_byte(code), low_byte(code)], axis=1)
    tokens = np.where(failed, [FAILED, NOTHING, NOTHING], told)
    return tokens, np.where(failed, [1.0, 0.0, 0.0], ANSWER_WEIGHTS)


def answered(grids: Grids, log_rtt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens uint16, weights float32) of grids with their answers [q, T + 3].

    Args:
        grids: The questions.
        log_rtt: Log RTT that was measured [q], infinite where it failed.
    """
    tokens, weights = answer_tokens(log_rtt - grids.reference, grids.scale)
    return (
        np.concatenate([grids.tokens, tokens], axis=1).astype(np.uint16),
        np.concatenate([grids.weights, weights], axis=1).astype(np.float32),
    )
