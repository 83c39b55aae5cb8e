"""Which of these peers is nearest to me? Ask a trained run, after a few pings of one's own.

    python examples/nearest_peer.py RUN SOURCE PEERS.txt [PINGS.parquet]

PEERS.txt has one address a line; PINGS holds measurements in any format that prepare-data reads.
"""

import sys
from pathlib import Path

from ping_llm.ingest.sources import read_table
from ping_llm.prediction.rtt import Predictor, questions


def main(run: str, source: str, peers: str, pings: str | None = None) -> list[str]:
    addresses = Path(peers).read_text().split()
    queries = questions([source] * len(addresses), addresses)
    predictor = Predictor.load(run)
    contexts = None if pings is None else predictor.contexts(read_table([pings]), queries)
    order, found = predictor.rank(queries, contexts)
    for i in order[:10]:
        low, _, median, _, high = found.quantiles_ms[i]
        print(f"{addresses[i]:40s} {median:8.2f} ms  (90 %: {low:.2f} to {high:.2f})")
    return [addresses[i] for i in order]


if __name__ == "__main__":
    main(*sys.argv[1:])
