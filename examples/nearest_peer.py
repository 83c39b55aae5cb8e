"""Which of these peers is nearest to me? Ask a trained run, after a few pings of one's own.

    python examples/nearest_peer.py RUN SOURCE PEERS.txt [PINGS.parquet]

PEERS.txt has one address a line; PINGS has src_addr, dst_addr, event_time and rtt.
"""

import sys
from pathlib import Path

import pyarrow.parquet as pq

from ping_llm import Predictor


def main(run: str, source: str, peers: str, pings: str | None = None) -> list[str]:
    addresses = Path(peers).read_text().split()
    pairs = {"src_addr": [source] * len(addresses), "dst_addr": addresses}
    history = None if pings is None else pq.read_table(pings)
    answers = Predictor.load(run).predict(pairs, history=history).sort_by("rtt_mean").to_pylist()
    for row in answers[:10]:
        low, mode, high = (row[f"rtt_{name}"] for name in ("p5", "mode", "p95"))
        print(f"{row['dst_addr']:40s} {mode:8.2f} ms  (90 %: {low:.2f} to {high:.2f})")
    return [row["dst_addr"] for row in answers]


if __name__ == "__main__":
    main(*sys.argv[1:])
