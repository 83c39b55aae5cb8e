"""Which measurements are strange? Those to which a trained run gives the least probability.

    python examples/anomaly_scores.py RUN MEASUREMENTS.parquet

Each measurement is judged after those of its source before it.
"""

import sys

import numpy as np

from ping_llm.ingest.sources import read_table
from ping_llm.prediction.contexts import newest_before
from ping_llm.prediction.rtt import QUESTION_TOKENS, Predictor


def main(run: str, measurements: str) -> np.ndarray:
    predictor, table = Predictor.load(run), read_table([measurements])
    past = newest_before(table, table, max_tokens=predictor.max_tokens - QUESTION_TOKENS)
    scores = -predictor.log_likelihood(table, past)  # in nats: the higher, the stranger
    for i in np.argsort(-scores)[:10]:
        when = np.datetime64(int(table.time[i]), "s")
        print(f"row {i:8d}  {when}  {table.rtt[i]:10.2f} ms  {scores[i]:6.1f} nats")
    return scores


if __name__ == "__main__":
    main(*sys.argv[1:])
