"""Which measurements are strange? Those to which a trained run gives the least probability.

    python examples/anomaly_scores.py RUN MEASUREMENTS.parquet

Each measurement is judged after those of its pair before it.
"""

import sys

import numpy as np
import pyarrow.parquet as pq

from ping_llm import Predictor


def main(run: str, measurements: str) -> np.ndarray:
    table = pq.read_table(measurements)
    scores = Predictor.load(run).score(table)  # in nats: the higher, the stranger
    for i in np.argsort(-scores)[:10].tolist():
        row = table.slice(i, 1).to_pylist()[0]
        print(f"row {i:8d}  {row['event_time']}  {row['rtt']:10.2f} ms  {scores[i]:6.1f} nats")
    return scores


if __name__ == "__main__":
    main(*sys.argv[1:])
