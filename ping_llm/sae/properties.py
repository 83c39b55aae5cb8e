"""What each token of a latency model's contexts is about, as categories."""

import dataclasses
import ipaddress
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from ping_llm import tokenizer
from ping_llm.measurements import NO_TIME

RTT_EDGES_MS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
PREFIXES = 30  # told apart, the most frequent ones
PREFIX_BITS = {4: 16, 6: 32}
UNKNOWN, OTHER = "unknown", "other"


@dataclasses.dataclass(frozen=True)
class TokenProperty:
    """A property of tokens.

    Attributes:
        name: Such as `family`.
        categories: Their names.
        codes: Category of each token [n], int32.
    """

    name: str
    categories: list[str]
    codes: np.ndarray

    @classmethod
    def of(cls, name: str, values: Sequence[str], *, most: int | None = None) -> "TokenProperty":
        """Returns the property with these values; with `most`, the rarer ones are one, `other`."""
        kept = [value for value, _ in Counter(values).most_common(most)]
        codes = {value: code for code, value in enumerate(kept)}
        other = [OTHER] if len(set(values)) > len(kept) else []
        return cls(
            name, kept + other, np.array([codes.get(v, len(kept)) for v in values], np.int32)
        )


def token_properties(prompts: Sequence[np.ndarray]) -> list[TokenProperty]:
    """Returns the properties of the tokens of contexts, end to end; the first one is `place`.

    `place` is what the token itself is: its name, or which byte of which field. The others are of
    the measurement that it is part of, as a whole: some of it may stand after the token.
    """
    places = [place for prompt in prompts for place in _places(prompt)]
    described = [facts for prompt in prompts for facts in _measurements(prompt)]
    columns = list(zip(*described, strict=True)) or [()] * 6
    names = ("family", "result", "RTT band", "hour", "source prefix", "destination prefix")
    properties = [TokenProperty.of("place", places)]
    for name, values in zip(names, columns, strict=True):
        most = PREFIXES if name.endswith("prefix") else None
        properties.append(TokenProperty.of(name, values, most=most))
    return properties


def _places(prompt: np.ndarray) -> Iterator[str]:
    fields, byte = tokenizer.field_of(prompt), 0
    for token, field in zip(prompt.tolist(), fields.tolist(), strict=True):
        byte = byte + 1 if token >= tokenizer.BYTE_0 else 0
        yield f"{tokenizer.FIELDS[field]} byte {byte}" if byte else tokenizer.token_name(token)


def _measurements(prompt: np.ndarray) -> Iterator[tuple[str, ...]]:
    """Yields, for each token, the facts of its measurement."""
    measurements, problems = tokenizer.decode(prompt)
    index = np.cumsum(prompt == tokenizer.MEASUREMENT_START) - 1
    if problems or len(measurements) != index[-1] + 1:
        yield from [(UNKNOWN,) * 6] * len(prompt)
        return
    bands = np.searchsorted(RTT_EDGES_MS, measurements.rtt, side="right")
    prefixes = [
        [_prefix(a, f) for a, f in zip(column, measurements.family.tolist(), strict=True)]
        for column in (measurements.src, measurements.dst)
    ]
    facts = []
    for i in range(len(measurements)):
        failed, time = measurements.rtt[i] < 0, int(measurements.time[i])
        facts.append(
            (
                f"IPv{measurements.family[i]}",
                "failed" if failed else "answered",
                "failed" if failed else _band(int(bands[i])),
                "untimed" if time == NO_TIME else f"{time // 3600 % 24:02d} h UTC",
                prefixes[0][i],
                prefixes[1][i],
            )
        )
    yield from (facts[i] for i in index.tolist())


def _band(index: int) -> str:
    edges = ("0", *(f"{edge:g}" for edge in RTT_EDGES_MS))
    after = edges[index + 1] if index + 1 < len(edges) else ""
    return f"{edges[index]}-{after} ms" if after else f"over {edges[index]} ms"


def _prefix(address: np.void, family: int) -> str:
    packed = address.tobytes()[12:] if family == 4 else address.tobytes()
    bits = PREFIX_BITS[family]
    return str(ipaddress.ip_network((packed, bits), strict=False))
