"""How fast a model predicts RTT distributions."""

import dataclasses
import time

import numpy as np

from ping_llm import settings
from ping_llm.bench.settings import BenchPredictSettings
from ping_llm.measurements import MeasurementTable
from ping_llm.prediction.contexts import encode_prompts
from ping_llm.prediction.predictor import Predictor
from ping_llm.resources import peak_rss_bytes


@dataclasses.dataclass(frozen=True)
class BenchPredictResult:
    """How fast a model answers questions; compiling is not counted.

    Attributes:
        pairs_per_second: Pairs without a history.
        pairs_per_second_with_history: Pairs after a history that fills the model's sequences.
        history_tokens: Tokens of that history.
        pairs: Number of pairs, in each of the two.
        peak_rss_bytes: The most memory this process ever held.
    """

    pairs_per_second: float
    pairs_per_second_with_history: float
    history_tokens: int
    pairs: int
    peak_rss_bytes: int


@settings.takes(BenchPredictSettings)
def bench_predict(chosen: BenchPredictSettings) -> BenchPredictResult:
    """Returns how many pairs per second a run's model answers, from one source to random IPv4.

    Raises:
        ConfigError: A setting cannot be.
        CheckpointError: The model cannot be read.
    """
    predictor = Predictor.load(chosen.run)
    rng = np.random.default_rng(chosen.seed)

    def random_pairs(n: int):
        hosts = rng.integers(0, 256, (n, 3))
        dst = [f"10.{a}.{b}.{c}" for a, b, c in hosts]
        pairs = {"src_addr": ["10.0.0.1"] * n, "dst_addr": dst}
        return MeasurementTable.from_arrow(pairs, questions=True)

    queries, history = random_pairs(chosen.pairs), random_pairs(predictor.max_tokens)
    history = dataclasses.replace(history, rtt=rng.uniform(1, 300, len(history)).astype(np.float32))
    contexts = predictor.contexts(history, queries)
    rates = []
    for given in (None, history):
        predictor.ask(queries, given)  # compiles
        started = time.perf_counter()
        predictor.ask(queries, given)
        rates.append(chosen.pairs / (time.perf_counter() - started))
    return BenchPredictResult(
        pairs_per_second=rates[0],
        pairs_per_second_with_history=rates[1],
        history_tokens=int(encode_prompts(contexts, queries).context_offsets[-1]),
        pairs=chosen.pairs,
        peak_rss_bytes=peak_rss_bytes(),
    )
