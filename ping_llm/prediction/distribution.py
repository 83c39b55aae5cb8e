"""Distributions of RTTs and of failures, many at once."""

import dataclasses

import numpy as np

TAIL = 0.99  # of an RTT, above which a mean takes it as that: whatever a model gives to absurd ones

MODE_SHARE = 0.35  # chosen on valid rows of dense and thinned data


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Predictive distributions of n measurements.

    Attributes:
        values_ms: RTTs, ascending in each row [n, u], float64.
        probabilities: Probability of each given that there is an answer, rows sum to 1 [n, u].
        p_failed: Probability that the measurement fails [n], float64.
    """

    values_ms: np.ndarray
    probabilities: np.ndarray
    p_failed: np.ndarray

    def __len__(self) -> int:
        return len(self.p_failed)

    def recalibrated(self, levels: np.ndarray) -> "Distribution":
        """Returns the distributions whose cumulative probabilities are read as actual ones.

        Args:
            levels: At which levels of such distributions actual RTTs fell, ascending [m]; their
                share up to a level is the probability that it gets.
        """
        cumulative = np.cumsum(self.probabilities, axis=1)
        known = np.concatenate([[0.0], levels, [1.0]])
        actual = np.linspace(0, 1, len(known))
        bent = np.interp(cumulative / cumulative[:, -1:], known, actual)
        return dataclasses.replace(self, probabilities=np.diff(bent, axis=1, prepend=0))

    def mean(self) -> np.ndarray:
        """Returns the mean RTTs in ms, those above the `TAIL` quantile counted as that [n]."""
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
        last = self.values_ms.shape[1] - 1
        index = np.minimum(index.reshape(len(self), len(levels)), last)
        return np.take_along_axis(self.values_ms, index, axis=1)

    def mode(self) -> np.ndarray:
        """Returns the middle of the shortest interval that holds `MODE_SHARE` of each, in ms [n].

        Short means the ratio of its ends. It is the half-sample mode (Robertson and Cryer, 1974)
        with another share: where a distribution has two peaks, it lies in the higher one, while the
        median may lie between them.
        """
        cumulative = np.cumsum(self.probabilities, axis=1)
        before = cumulative - self.probabilities
        found = np.zeros(len(self))
        for i, values in enumerate(self.values_ms):
            last = np.searchsorted(cumulative[i], before[i] + MODE_SHARE * cumulative[i, -1])
            first = np.flatnonzero(last < len(values))
            width = values[last[first]] / values[first]
            best = first[np.argmin(width)]
            found[i] = np.sqrt(values[best] * values[last[best]])
        return found

    def below(self, rtt: np.ndarray) -> np.ndarray:
        """Returns P(RTT < rtt) + P(RTT = rtt) / 2 [n]; two RTTs within 1e-4 of each other equal.

        Over measurements that follow their distributions this is uniform on [0, 1].
        """
        less, at_most = (
            np.einsum("nu,nu->n", self.probabilities, self.values_ms <= (rtt * by)[:, None])
            for by in (1 - 1e-4, 1 + 1e-4)
        )
        return (less + at_most) / 2

    def within(self, rtt: np.ndarray, share: float) -> np.ndarray:
        """Returns the probability of an RTT within `share` of `rtt` [n], given an answer."""
        near = np.abs(self.values_ms - rtt[:, None]) <= share * rtt[:, None]
        return np.einsum("nu,nu->n", self.probabilities, near)

    def crps(self, rtt: np.ndarray) -> np.ndarray:
        """Returns the continuous ranked probability score against `rtt` [n], in ms.

        It is the integral of the squared difference between the cumulative distribution and the
        step at `rtt`; for a distribution on one value it is the absolute error.
        """
        cumulative = np.cumsum(self.probabilities, axis=1)[:, :-1]
        values, gaps = self.values_ms, np.diff(self.values_ms, axis=1)
        # The fraction of each gap that lies below rtt.
        apart = rtt[:, None] - values[:, :-1]
        share = np.clip(apart / np.where(gaps > 0, gaps, np.inf), 0.0, 1.0)
        integrand = cumulative**2 * share + (1 - cumulative) ** 2 * (1 - share)
        inside = np.einsum("nu,nu->n", integrand, gaps)
        first, last = values[:, 0], values[:, -1]
        return inside + np.maximum(first - rtt, 0) + np.maximum(rtt - last, 0)
