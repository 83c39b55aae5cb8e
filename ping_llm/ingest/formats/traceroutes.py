"""RIPE Atlas: what a traceroute measured, to its destination and to each router on the way.

A reply counts unless it is late, a duplicate or an error; of an address, the smallest RTT is taken.
A port that is unreachable (`err` p) at the destination is how a UDP traceroute arrives there. The
fields are those of https://atlas.ripe.net/docs/apis/result-format/.
"""

import dataclasses
import functools
import ipaddress
import math
from typing import Any

import msgspec

_MARKS = ("late", "dup", "err")


@dataclasses.dataclass(frozen=True)
class Traceroute:
    """What one traceroute measured.

    Attributes:
        rtt: Smallest RTT of the destination in ms, -1 where it never answered.
        loss: Fraction of the packets of its hop that it did not answer, NaN where unknown.
        spread: Largest minus smallest RTT of the destination, NaN where it did not answer.
        hops: (address, smallest RTT, largest minus smallest) of each public address on the way.
    """

    rtt: float
    loss: float
    spread: float
    hops: list[tuple[str, float, float]]


def parse_result(result: str, destination: str) -> Traceroute | None:
    """Returns what the `result` of a traceroute says, or None where it is malformed.

    Args:
        result: JSON text.
        destination: The address that was asked.
    """
    try:
        replies, lost = _replies(msgspec.json.decode(result), _packed(destination))
        hops = [
            (address, min(rtts), max(rtts) - min(rtts))
            for address, rtts in replies.items()
            if address is not None and ipaddress.ip_address(address).is_global
        ]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None  # msgspec.DecodeError is a ValueError
    rtts = replies.get(None)
    if rtts is None:
        return Traceroute(-1.0, math.nan, math.nan, hops)
    return Traceroute(min(rtts), lost, max(rtts) - min(rtts), hops)


def _replies(hops: list[Any], destination: bytes) -> tuple[dict[str | None, list[float]], float]:
    """Returns (RTTs by address, None the destination; the loss at its last hop)."""
    found: dict[str | None, list[float]] = {}
    lost = math.nan
    for hop in hops:
        packets, arrived = [] if "error" in hop else hop["result"], 0
        for reply in packets:
            if not isinstance(reply, dict) or "from" not in reply or reply.get("rtt") is None:
                continue
            is_end = _packed(reply["from"]) == destination
            marks = [reply.get(mark) for mark in _MARKS]
            if any(marks[:2]) or (marks[2] is not None and not (is_end and marks[2] == "p")):
                continue
            rtt = float(reply["rtt"])
            if not 0 <= rtt < math.inf:
                raise ValueError(rtt)
            found.setdefault(None if is_end else reply["from"], []).append(rtt)
            arrived += is_end
        if arrived:
            lost = 1 - arrived / len(packets)
    return found, lost


@functools.lru_cache(1 << 16)
def _packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed
