"""Distributions of RTTs over the codes of the token language.

Several codes may decode to one value: what a distribution is over is the values, ascending.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ping_llm.tokenizer import decode_rtt

# Every value a code decodes to, in ms, ascending; and which of them each of the 65,536 codes has.
VALUES_MS, VALUE_OF_CODE = np.unique(decode_rtt(np.arange(2**16)), return_inverse=True)
VALUE_OF_CODE = VALUE_OF_CODE.astype(np.int32)

TAIL = 0.99


@dataclasses.dataclass(frozen=True)
class Distribution:
    """RTT distributions of n measurements, given that they are answered.

    Attributes:
        values_ms: Values that have any probability, ascending, of all rows [U] or of each [n, U],
            float64.
        probabilities: Probability of each; rows sum to 1 [n, U], float64.
        p_failed: Probability that the measurement fails [n], float64.
    """

    values_ms: np.ndarray
    probabilities: np.ndarray
    p_failed: np.ndarray

    def __len__(self) -> int:
        return len(self.p_failed)

    @classmethod
    def of_codes(
        cls, row: np.ndarray, code: np.ndarray, probability: np.ndarray, p_failed: np.ndarray
    ) -> "Distribution":
        """Returns distributions from probabilities of codes, normalised.

        Args:
            row: Which distribution each entry belongs to [m].
            code: The codes, canonical or not; equal values add up [m].
            probability: Their probabilities, up to a factor of each row [m].
            p_failed: By row [n].
        """
        value = VALUE_OF_CODE[code]
        first, n = int(value.min(initial=len(VALUES_MS) - 1)), len(p_failed)
        width = int(value.max(initial=first)) - first + 1
        sums = np.bincount(row * width + (value - first), probability, n * width).reshape(n, width)
        sums /= sums.sum(axis=1, keepdims=True)
        return cls(VALUES_MS[first : first + width], sums, p_failed)

    @classmethod
    def mixture(
        cls, n: int, answers: Sequence[tuple[np.ndarray, "Distribution"]]
    ) -> "Distribution":
        """Returns the mean of the distributions that `answers` give to each of `n` measurements.

        Args:
            n: Number of measurements.
            answers: (which of them, their distributions); each of them as often as the others.
        """
        firsts = np.searchsorted(VALUES_MS, [each.values_ms[0] for _, each in answers])
        ends = firsts + [len(each.values_ms) for _, each in answers]
        low, high = firsts.min(), ends.max()
        sums, answered, count = np.zeros((n, high - low)), np.zeros(n), np.zeros(n)
        for first, end, (rows, each) in zip(firsts - low, ends - low, answers, strict=True):
            weight = 1 - each.p_failed
            sums[rows, first:end] += weight[:, None] * each.probabilities
            answered[rows] += weight
            count[rows] += 1
        return cls(VALUES_MS[low:high], sums / answered[:, None], 1 - answered / count)

    def recalibrated(self, levels: np.ndarray) -> "Distribution":
        """Returns the distributions with their cumulative probabilities read as actual ones.

        Args:
            levels: At which levels of such distributions actual RTTs fell, ascending [m]; their
                share up to a level is the probability that it gets.
        """
        cumulative = np.cumsum(self.probabilities, axis=1)
        known = np.concatenate([[0.0], levels, [1.0]])
        bent = np.interp(cumulative / cumulative[:, -1:], known, np.linspace(0, 1, len(known)))
        return dataclasses.replace(self, probabilities=np.diff(bent, axis=1, prepend=0))

    def _values(self) -> np.ndarray:
        return np.broadcast_to(self.values_ms, self.probabilities.shape)

    def mean(self) -> np.ndarray:
        """Returns the mean RTTs in ms, those above the `TAIL` quantile counted as that [n].

        The codes reach to 51 days: what little probability a model gives to most of them would
        otherwise outweigh all that it knows.
        """
        ceiling = self.quantiles(np.array([TAIL]))  # [n, 1]
        return np.einsum("nu,nu->n", self.probabilities, np.minimum(self.values_ms, ceiling))

    def quantiles(self, levels: np.ndarray) -> np.ndarray:
        """Returns the smallest values at which the cumulative probability reaches each level.

        Args:
            levels: Each above 0 and below 1 [q].

        Returns:
            Milliseconds [n, q].
        """
        cumulative = np.cumsum(self.probabilities, axis=1)
        index = np.array([np.searchsorted(row, levels) for row in cumulative])
        index = np.minimum(index.reshape(len(self), len(levels)), cumulative.shape[1] - 1)
        return np.take_along_axis(self._values(), index, axis=1)

    def below(self, rtt: np.ndarray) -> np.ndarray:
        """Returns P(RTT < rtt) + P(RTT = rtt) / 2 [n], rtt rounded to its code [n].

        Over measurements that follow their distributions this is uniform on [0, 1].
        """
        # About half a step of the code to either side.
        low, high = (rtt * (1 + by) for by in (-(2.0**-12), 2.0**-12))
        less, at_most = (
            np.einsum("nu,nu->n", self.probabilities, within)
            for within in (self._values() < low[:, None], self._values() <= high[:, None])
        )
        return (less + at_most) / 2

    def crps(self, rtt: np.ndarray) -> np.ndarray:
        """Returns the continuous ranked probability score against `rtt` [n], in ms.

        It is the integral of the squared difference between the cumulative distribution and the
        step at `rtt`; for a distribution on one value it is the absolute error.
        """
        cumulative = np.cumsum(self.probabilities, axis=1)[:, :-1]
        values = self._values()
        gaps = np.diff(values, axis=1)
        # The fraction of each gap that lies below rtt.
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.clip((rtt[:, None] - values[:, :-1]) / gaps, 0.0, 1.0)
        squares = cumulative**2 * share + (1 - cumulative) ** 2 * (1 - share)
        inside = np.einsum("nu,nu->n", np.where(gaps > 0, squares, 0), gaps)
        return inside + np.maximum(values[:, 0] - rtt, 0) + np.maximum(rtt - values[:, -1], 0)
