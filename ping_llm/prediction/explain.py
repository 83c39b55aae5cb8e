"""Which measurements an answer was drawn from, and how far each counted."""

import dataclasses

import numpy as np

from ping_llm import addresses
from ping_llm.data.history_grids import PairSeries, lookup
from ping_llm.data.network import Network
from ping_llm.measurements import MeasurementTable

SHOWN = 8
NEWEST = 3  # measurements of a pair whose median its answer is told against


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What was measured between two ends that stand for the ones asked about.

    Attributes:
        src: The source asked about, or one like it.
        dst: The destination asked about, or one like it.
        rtt_ms: The median RTT that was measured between the two.
        share: How far it counts in the estimate that the model starts from; those of all sum to 1.
    """

    src: str
    dst: str
    rtt_ms: float
    share: float


def explain(question: MeasurementTable, known: MeasurementTable) -> list[Evidence]:
    """Returns up to eight pieces of evidence for one question, those that count most first.

    Of a pair that was measured before they are its newest measurements; of another one, those of
    its source to destinations like its own, and of sources like its own to its destination.

    Args:
        question: One measurement to predict.
        known: What the network is known by.
    """
    src, dst = (addresses.to_text(end, question.family)[0] for end in (question.src, question.dst))
    series = PairSeries.of(known)
    pair, stop, _ = lookup(series, question)
    if pair[0] >= 0:
        first = series.start[pair[0]]
        past = series.log_rtt[first : first + stop[0]]
        newest = past[np.isfinite(past)][-NEWEST:]
        return [Evidence(src, dst, float(np.exp(x)), 1 / len(newest)) for x in newest[::-1]]
    network = Network.of(known, question.src, question.dst)
    _, world, a, b = next(network.worlds(question))
    return [
        Evidence(
            src if from_source else _text(network, node),
            _text(network, node) if from_source else dst,
            float(np.exp(log_rtt)),
            share,
        )
        for from_source, node, log_rtt, share in world.evidence(int(a[0]), int(b[0]), SHOWN)
    ]


def _text(network: Network, node: int) -> str:
    return addresses.to_text(network.nodes.addresses[[node]])[0]
