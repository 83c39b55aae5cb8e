"""How fast a model predicts RTT distributions."""

import dataclasses
import time

import numpy as np

from ping_llm import settings
from ping_llm.bench.settings import BenchPredictSettings
from ping_llm.measurements import MeasurementTable
from ping_llm.prediction.predictor import Predictor
from ping_llm.resources import peak_rss_bytes

KNOWN_NODES, KNOWN_PER_NODE = 200, 40


@dataclasses.dataclass(frozen=True)
class BenchPredictResult:
    """How fast a model answers questions; compiling and calibrating are not counted.

    Attributes:
        pairs_per_second: Pairs of a random network of 200 nodes, each measured to 40 others.
        pairs: Number of pairs.
        peak_rss_bytes: The most memory this process ever held.
    """

    pairs_per_second: float
    pairs: int
    peak_rss_bytes: int


@settings.takes(BenchPredictSettings)
def bench_predict(chosen: BenchPredictSettings) -> BenchPredictResult:
    """Returns how many pairs per second a run's model answers about a random network.

    Raises:
        ConfigError: A setting cannot be.
        CheckpointError: The model cannot be read.
    """
    rng = np.random.default_rng(chosen.seed)

    def random_pairs(n: int) -> MeasurementTable:
        ends = rng.integers(0, KNOWN_NODES, (2, n))
        src, dst = ([f"10.0.{i // 256}.{i % 256}" for i in end] for end in ends)
        return MeasurementTable.from_arrow({"src_addr": src, "dst_addr": dst}, questions=True)

    known = random_pairs(KNOWN_NODES * KNOWN_PER_NODE)
    known = dataclasses.replace(known, rtt=rng.uniform(1, 300, len(known)).astype(np.float32))
    questions, predictor = random_pairs(chosen.pairs), Predictor.load(chosen.run).knowing(known)
    predictor.ask(questions)  # compiles, and calibrates
    started = time.perf_counter()
    predictor.ask(questions)
    return BenchPredictResult(
        pairs_per_second=chosen.pairs / (time.perf_counter() - started),
        pairs=chosen.pairs,
        peak_rss_bytes=peak_rss_bytes(),
    )
