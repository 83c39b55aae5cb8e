"""Random series of one pair's RTTs over time, of many kinds, to train on.

A series is a base level, noise, and what happens to paths: drift, busy hours, changes of route,
flapping between two, spikes, congestion; then the clock's resolution, losses and failures.
"""

import numpy as np

DAY = 86_400.0
STEPS = (60.0, 240.0, 240.0, 300.0, 900.0)  # s from one measurement to the next
RESOLUTIONS_MS = (0.001, 0.005, 0.01, 0.1, 1.0)


def random_series(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (times in s [m], RTTs in ms, -1 for failures [m]) of up to `n` measurements."""
    step = rng.choice(STEPS)
    time = np.arange(n) * step + rng.uniform(0, DAY)
    if rng.random() < 0.5:
        time = time + rng.integers(-3, 4, n)
    scale = log_uniform(rng, 1e-4, 0.02)
    changes = (
        _noise(rng, n, scale)
        + _drift(rng, n, scale)
        + _busy_hours(rng, time, scale)
        + _routes(rng, n)
        + _flapping(rng, n)
        + _spikes(rng, n)
        + _congestion(rng, n)
    )
    rtt = np.exp(np.clip(rng.normal(4, 1.3) + changes, -2, 8))
    resolution = rng.choice(RESOLUTIONS_MS, p=[0.45, 0.2, 0.2, 0.1, 0.05])
    rtt = np.maximum(np.round(rtt / resolution) * resolution, max(resolution, 0.02))
    rtt[rng.random(n) < rng.choice([0, 0, 0.002, 0.02])] = -1
    kept = rng.random(n) >= rng.choice([0, 0, 0.01, 0.1])
    return np.round(time[kept]).astype(np.int64), rtt[kept].astype(np.float32)


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Returns a number between two positive ones, its logarithm uniform."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _noise(rng: np.random.Generator, n: int, scale: float) -> np.ndarray:
    """Returns noise of one of four laws, of a strength that may change from time to time."""
    draw = (
        lambda: rng.standard_normal(n),
        lambda: rng.exponential(1, n),
        lambda: rng.gamma(2, 0.7, n),
        lambda: np.abs(rng.standard_normal(n)),
    )[rng.integers(4)]
    strength = np.ones(n)
    if rng.random() < 0.5:
        regime = np.cumsum(rng.random(n) < log_uniform(rng, 5e-4, 0.03))
        strength = np.exp(rng.normal(0, log_uniform(rng, 0.2, 1.2), regime[-1] + 1))[regime]
    return scale * strength * draw()


def _drift(rng: np.random.Generator, n: int, scale: float) -> np.ndarray:
    """Returns an autoregressive process of order 1, or nothing."""
    if rng.random() >= 0.6:
        return np.zeros(n)
    decay = 1 - log_uniform(rng, 0.002, 0.5)
    shocks = rng.standard_normal(n) * scale * log_uniform(rng, 0.05, 1.5) * np.sqrt(1 - decay**2)
    # What is left of a shock k steps later is decay^k: a convolution, cut where that is 1e-4.
    kernel = decay ** np.arange(min(n, int(np.log(1e-4) / np.log(decay)) + 1))
    return np.convolve(shocks, kernel)[:n]


def _busy_hours(rng: np.random.Generator, time: np.ndarray, scale: float) -> np.ndarray:
    """Returns a level and a noise that rise for a part of each day, or nothing."""
    if rng.random() >= 0.5:
        return np.zeros(len(time))
    wave = np.sin(2 * np.pi * time / DAY + rng.uniform(0, 2 * np.pi))
    busy = np.maximum(0, wave) ** rng.choice([1, 3])
    level = log_uniform(rng, 0.2, 20) * scale * busy
    if rng.random() < 0.5:
        level = level + scale * log_uniform(rng, 0.1, 6) * busy * rng.exponential(1, len(time))
    return level


def _routes(rng: np.random.Generator, n: int) -> np.ndarray:
    """Returns levels that change with the route: a walk, independent ones, or a few in turn."""
    route = np.cumsum(rng.random(n) < log_uniform(rng, 1e-4, 0.01))
    count, size = route[-1] + 1, log_uniform(rng, 2e-3, 0.2)
    kind = rng.random()
    if kind < 0.4:
        steps = rng.normal(0, 1, count) * size * np.exp(rng.normal(0, 0.8, count))
        level = 0.7 * np.cumsum(steps)
    elif kind < 0.7:
        level = rng.normal(0, size, count)
    else:
        few = rng.normal(0, size, rng.integers(2, 5))
        level = few[rng.integers(len(few), size=count)]
    return level[route]


def _flapping(rng: np.random.Generator, n: int) -> np.ndarray:
    """Returns the levels of a pair that goes to and fro between two paths, or nothing."""
    if rng.random() >= 0.4:
        return np.zeros(n)
    share, stay = rng.choice([0.02, 0.1, 0.3, 0.5]), log_uniform(rng, 1, 60)
    stretch = np.cumsum(rng.random(n) < 1 / stay)
    second = (rng.random(stretch[-1] + 1) < share)[stretch]
    return second * log_uniform(rng, 1e-3, 0.1) * rng.choice([-1, 1])


def _spikes(rng: np.random.Generator, n: int) -> np.ndarray:
    """Returns single slow measurements."""
    share = rng.choice([0, 0.003, 0.01, 0.03, 0.1])
    return (rng.random(n) < share) * rng.exponential(1, n) * log_uniform(rng, 0.005, 0.5)


def _congestion(rng: np.random.Generator, n: int) -> np.ndarray:
    """Returns stretches of 3 to 60 slow measurements, or nothing."""
    if rng.random() >= 0.5:
        return np.zeros(n)
    begins = rng.random(n) < log_uniform(rng, 1e-4, 0.003)
    length = int(log_uniform(rng, 3, 60))
    congested = np.convolve(begins, np.ones(length))[:n] > 0
    return congested * rng.exponential(1, n) * log_uniform(rng, 0.005, 0.3)
