"""The token language: measurements to token ids and back.

267 ids: eleven that give structure, then one for each byte. A measurement is MEASUREMENT_START and
then its fields in any order, each a token that names the field and a fixed number of bytes,
big-endian. One from the same source as the measurement before it leaves its source out.
`docs/token-language.md` has the table and the reasons.

`encode` works on a whole batch of segments at once; `decode` reads any ids whatever, one by one.
"""

import dataclasses
import ipaddress
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from ping_llm import addresses
from ping_llm.errors import DataError
from ping_llm.measurements import NO_TIME, MeasurementTable

# Counts up when the same measurements become other tokens: no model reads two versions.
LANGUAGE_VERSION = 2

MEASUREMENT_START, SRC_IPV4, SRC_IPV6, DST_IPV4, DST_IPV6 = range(5)
TIMESTAMP_ABS, TIMESTAMP_DELTA1, TIMESTAMP_DELTA4 = range(5, 8)
RTT_START, GRID, FAILED, BYTE_0 = range(8, 12)
VOCAB_SIZE = BYTE_0 + 256

# What a token is about, for the loss per field. An id below BYTE_0 is structure; a byte is of the
# field of the last id below BYTE_0 before it.
FIELDS = ("structure", "source", "destination", "time", "rtt")
STRUCTURE, SOURCE, DESTINATION, TIME, RTT = range(5)

# Of each id below BYTE_0: its name, how many bytes follow it, and the field that they are of.
TOKEN_NAMES, PAYLOAD_BYTES, FIELD_OF_PAYLOAD = zip(
    ("MEASUREMENT_START", 0, STRUCTURE),
    ("SRC_IPV4", 4, SOURCE),
    ("SRC_IPV6", 16, SOURCE),
    ("DST_IPV4", 4, DESTINATION),
    ("DST_IPV6", 16, DESTINATION),
    ("TIMESTAMP_ABS", 8, TIME),
    ("TIMESTAMP_DELTA1", 1, TIME),
    ("TIMESTAMP_DELTA4", 4, TIME),
    ("RTT_START", 2, RTT),
    ("GRID", 0, RTT),
    ("FAILED", 0, RTT),
    strict=True,
)

MANTISSA_BITS = 11
MAX_RTT_MS = 2047 * 2.0**31 / 1000

# The tokens of a source; the most a measurement takes without source and time; a first time; a
# later one, in time order.
SOURCE_TOKENS = {4: 5, 6: 17}
BARE_TOKENS = {4: 1 + 5 + 3, 6: 1 + 17 + 3}
FIRST_TIME_TOKENS = 9
NEXT_TIME_TOKENS = 5
MAX_MEASUREMENT_TOKENS = SOURCE_TOKENS[6] + BARE_TOKENS[6] + FIRST_TIME_TOKENS


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something in a token sequence that is no measurement.

    Attributes:
        position: Index of the token where it shows.
        reason: What is wrong, for a person.
    """

    position: int
    reason: str


def encode_rtt(ms: np.ndarray) -> np.ndarray:
    """Returns the 16-bit codes of round-trip times in ms, uint16.

    A code is a 5-bit exponent and an 11-bit mantissa, `mantissa * 2**exponent` microseconds, in
    canonical form: exponent 0 or mantissa >= 1024. The time is rounded once, half to even.

    Raises:
        DataError: A time is negative, not finite, or above `MAX_RTT_MS`.
    """
    ms = np.asarray(ms, np.float64)
    valid = (ms >= 0) & (ms <= MAX_RTT_MS)  # false for NaN too
    if not valid.all():
        raise DataError(
            f"RTT {ms[~valid].flat[0]} ms has no code; codes are for 0..{MAX_RTT_MS} ms"
        )
    us = np.maximum(ms * 1000, 1.0)
    _, bits = np.frexp(us)
    exponent = np.maximum(bits - MANTISSA_BITS, 0)
    mantissa = np.rint(np.ldexp(us, -exponent)).astype(np.int32)
    # Rounded up to 2048, the code carries by itself from the mantissa to exponent + 1 and mantissa
    # 0; only the top bit of that mantissa is missing.
    code = (exponent << MANTISSA_BITS) + mantissa
    return np.where(mantissa == 2048, code + 1024, code).astype(np.uint16)


def decode_rtt(codes: np.ndarray) -> np.ndarray:
    """Returns the round-trip times in ms, float64, of 16-bit codes, canonical or not."""
    codes = np.asarray(codes, np.int32)
    return np.ldexp((codes & 2047).astype(np.float64), codes >> MANTISSA_BITS) / 1000


# --- encode -----------------------------------------------------------------------------------
# Which tokens a measurement has, and where each field stands in it, depends on five things only:
# the family, the form of its time, whether it failed, whether its source is left out, and the order
# of the fields. The two tables below hold every such layout.

_UNTIMED, _ABS, _DELTA1, _DELTA4 = range(4)
_TIME_TOKENS = (0, FIRST_TIME_TOKENS, 2, NEXT_TIME_TOKENS)


def _layout_tables() -> tuple[np.ndarray, np.ndarray]:
    """Returns (start of each field within a measurement [4, 2048], tokens in all [2048])."""
    starts, lengths = np.zeros((4, 2048), np.uint8), np.zeros(2048, np.uint8)
    for order in itertools.permutations(range(4)):
        order_code = order[0] | order[1] << 2 | order[2] << 4
        for rest in range(32):
            time_form, failed, same_source = rest >> 1 & 3, rest >> 3 & 1, rest >> 4
            address = 17 if rest & 1 else 5
            source = 0 if same_source else address
            sizes = (source, address, _TIME_TOKENS[time_form], 1 if failed else 3)
            layout, length = order_code << 5 | rest, 1
            for field in order:
                starts[field, layout] = length
                length += sizes[field]
            lengths[layout] = length
    return starts, lengths


_FIELD_STARTS, _LENGTHS = _layout_tables()


def _scatter(tokens: np.ndarray, starts: np.ndarray, head: int, payload: np.ndarray) -> None:
    """Writes `head` and then the bytes `payload` [n, k] at each of `starts` [n].

    One item of a few tokens is written at a time, through a view of `tokens` as overlapping items:
    a third of the time of an index per token.
    """
    n, k = payload.shape
    items = np.empty((n, k + 1), np.uint16)
    items[:, 0] = head
    np.add(payload, BYTE_0, out=items[:, 1:], dtype=np.uint16)
    dtype = np.dtype((np.void, 2 * (k + 1)))
    view = np.ndarray(max(len(tokens) - k, 0), dtype, buffer=tokens, strides=(2,))
    view[starts] = items.view(dtype)[:, 0]


def _big_endian(values: np.ndarray, n_bytes: int) -> np.ndarray:
    """Returns the low `n_bytes` bytes of integers [n] as uint8 [n, n_bytes], high byte first."""
    return values.astype(f">u{n_bytes}").view(np.uint8).reshape(len(values), n_bytes)


def _time_forms(measurements: MeasurementTable, segment_offsets: np.ndarray):
    """Returns (form of each time [n] uint8, seconds since the previous time [n] uint64)."""
    forms = np.zeros(len(measurements), np.uint8)
    deltas = np.zeros(len(measurements), np.uint64)
    timed = np.flatnonzero(measurements.has_time)
    if len(timed) == 0:
        return forms, deltas
    times = measurements.time[timed]
    # A segment's first time is the first of `timed` at or after the segment's start.
    first = np.searchsorted(timed, segment_offsets[:-1])
    forward = np.empty(len(timed), bool)
    forward[1:] = times[1:] >= times[:-1]
    forward[first[first < len(timed)]] = False
    # Exact for any pair of times: where `forward`, the difference fits uint64 though not int64.
    delta = np.diff(times.astype(np.uint64), prepend=np.uint64(0))
    near = np.where(delta < 2**32, np.where(delta < 256, _DELTA1, _DELTA4), _ABS)
    forms[timed] = np.where(forward, near, _ABS)
    deltas[timed] = delta
    return forms, deltas


def _same_source(measurements: MeasurementTable, segment_offsets: np.ndarray) -> np.ndarray:
    """Returns whether each measurement has the source of the one before it in its segment [n]."""
    n = len(measurements)
    same = np.zeros(n, bool)
    halves = np.ascontiguousarray(measurements.src).view(np.uint64).reshape(n, 2)
    family = measurements.family
    same[1:] = (halves[1:] == halves[:-1]).all(axis=1) & (family[1:] == family[:-1])
    firsts = segment_offsets[:-1]
    same[firsts[firsts < n]] = False
    return same


def encode(
    measurements: MeasurementTable, *, segment_offsets: np.ndarray, field_order: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of segments of measurements, end to end, and where each segment starts.

    Args:
        measurements: The measurements of all segments, end to end, n of them.
        segment_offsets: Segment s is measurements `[s]:[s + 1]`, from 0 to n [S + 1], int64.
        field_order: The order in which each measurement's fields stand, a permutation of source 0,
            destination 1, time 2, result 3; an unknown time, and a source that is the one of the
            measurement before, are left out [n, 4], uint8.

    Returns:
        (tokens uint16, token_offsets int64 [S + 1]): segment s is `tokens[o[s]:o[s + 1]]`.

    Raises:
        DataError: An RTT has no code (`encode_rtt`).
    """
    n = len(measurements)
    forms, deltas = _time_forms(measurements, segment_offsets)
    failed = measurements.rtt < 0
    family6 = measurements.family == 6
    same_source = _same_source(measurements, segment_offsets)
    rest = family6.view(np.uint8) | forms << 1 | failed.view(np.uint8) << 3
    rest |= same_source.view(np.uint8) << 4
    order_code = field_order[:, 0] | field_order[:, 1] << 2 | field_order[:, 2] << 4
    layout = order_code.astype(np.uint16) << 5 | rest
    starts = np.zeros(n + 1, np.int64)
    np.cumsum(_LENGTHS[layout], out=starts[1:])
    tokens = np.empty(starts[n], np.uint16)
    tokens[starts[:n]] = MEASUREMENT_START

    def write(field: int, where: np.ndarray, head: int, payload: np.ndarray) -> None:
        _scatter(tokens, starts[where] + _FIELD_STARTS[field][layout[where]], head, payload)

    src_bytes, dst_bytes = (addresses.as_bytes(a) for a in (measurements.src, measurements.dst))
    families = (~family6, 4, SRC_IPV4, DST_IPV4), (family6, 16, SRC_IPV6, DST_IPV6)
    for among, width, src, dst in families:
        where = np.flatnonzero(among & ~same_source)
        write(0, where, src, src_bytes[where, 16 - width :])
        where = np.flatnonzero(among)
        write(1, where, dst, dst_bytes[where, 16 - width :])
    times = measurements.time
    for form, head, width, values in (
        (_ABS, TIMESTAMP_ABS, 8, times),
        (_DELTA1, TIMESTAMP_DELTA1, 1, deltas),
        (_DELTA4, TIMESTAMP_DELTA4, 4, deltas),
    ):
        where = np.flatnonzero(forms == form)
        write(2, where, head, _big_endian(values[where].astype(np.uint64), width))
    where = np.flatnonzero(~failed)
    write(3, where, RTT_START, _big_endian(encode_rtt(measurements.rtt[where]), 2))
    where = np.flatnonzero(failed)
    write(3, where, FAILED, np.empty((len(where), 0), np.uint8))
    return tokens, starts[segment_offsets]


# --- decode -----------------------------------------------------------------------------------

# Which field of a measurement an id below BYTE_0 gives, and what messages call it.
_FIELD_OF_HEAD = {
    head: FIELD_OF_PAYLOAD[head]
    for head in range(SRC_IPV4, BYTE_0)
    if head != GRID  # which begins a segment of another kind
}
_FIELD_NAMES = {SOURCE: "source", DESTINATION: "destination", TIME: "timestamp", RTT: "result"}


def decode(tokens: Sequence[int] | np.ndarray) -> tuple[MeasurementTable, list[Problem]]:
    """Returns the measurements in the tokens of one segment, and what did not parse.

    Any ids may be given. A measurement that is not well-formed is left out as a whole and adds one
    `Problem`; reading goes on at the next MEASUREMENT_START. A source or timestamp read before the
    measurement went wrong still counts as the last one for what follows.
    """
    ids = np.asarray(tokens).tolist()
    decoded: list[dict[int, bytes]] = []  # the payload of each field
    times: list[int] = []
    problems: list[Problem] = []
    previous: int | None = None
    last_source: dict[int, bytes] = {}
    starts = [i for i, token in enumerate(ids) if i == 0 or token == MEASUREMENT_START]
    for begin, end in itertools.pairwise([*starts, len(ids)]):
        fields: dict[int, bytes] = {}
        time, problem, position = NO_TIME, None, begin + 1
        if ids[begin] != MEASUREMENT_START:
            problem = Problem(begin, f"{token_name(ids[begin])} outside a measurement")
        while problem is None and position < end:
            head = ids[position]
            if head not in _FIELD_OF_HEAD:
                problem = Problem(position, f"{token_name(head)} where a field should start")
                break
            field, size = _FIELD_OF_HEAD[head], PAYLOAD_BYTES[head]
            payload = _leading_bytes(ids[position + 1 : position + 1 + size])
            if len(payload) < size:
                reason = f"{token_name(head)} has {len(payload)} of {size} bytes"
                problem = Problem(position, reason)
            elif field in fields:
                problem = Problem(position, f"a second {_FIELD_NAMES[field]}")
            elif field == TIME:
                time, reason = _read_time(head, payload, previous)
                problem = Problem(position, reason) if reason else None
                previous = previous if time == NO_TIME else time
            elif field == SOURCE:
                last_source = {SOURCE: payload}
            fields[field] = payload
            position += 1 + size
        fields = last_source | fields
        problem = problem or _incomplete(fields, begin)
        if problem is None:
            decoded.append(fields)
            times.append(time)
        else:
            problems.append(problem)
    return _measurements(decoded, times), problems


def _leading_bytes(tokens: list[int]) -> bytes:
    """Returns the byte tokens that `tokens` begin with as bytes."""
    leading = itertools.takewhile(lambda token: BYTE_0 <= token < VOCAB_SIZE, tokens)
    return bytes(token - BYTE_0 for token in leading)


def _read_time(head: int, payload: bytes, previous: int | None) -> tuple[int, str]:
    """Returns (the time, ""), or (NO_TIME, why there is none)."""
    time = int.from_bytes(payload, "big", signed=head == TIMESTAMP_ABS)
    if head == TIMESTAMP_ABS:
        return time, f"{token_name(head)} is no time" if time == NO_TIME else ""
    if previous is None:
        return NO_TIME, f"{token_name(head)} without a timestamp before it"
    time += previous
    return (time, "") if time < 2**63 else (NO_TIME, f"{token_name(head)} leads beyond 64 bits")


def _incomplete(fields: dict[int, bytes], begin: int) -> Problem | None:
    for field in (SOURCE, DESTINATION, RTT):
        if field not in fields:
            return Problem(begin, f"a measurement without a {_FIELD_NAMES[field]}")
    if len(fields[SOURCE]) != len(fields[DESTINATION]):
        return Problem(begin, "source and destination of different families")
    return None


def _measurements(decoded: list[dict[int, bytes]], times: list[int]) -> MeasurementTable:
    src, dst, results = ([fields[key] for fields in decoded] for key in (SOURCE, DESTINATION, RTT))
    codes = np.array([int.from_bytes(payload, "big") for payload in results], np.uint16)
    failed = np.array([payload == b"" for payload in results], bool)
    return MeasurementTable(
        time=np.array(times, np.int64),
        src=addresses.from_packed(src),
        dst=addresses.from_packed(dst),
        family=np.array([4 if len(packed) == 4 else 6 for packed in src], np.int8),
        rtt=np.where(failed, -1.0, decode_rtt(codes)).astype(np.float32),
    )


# --- for people -------------------------------------------------------------------------------


def token_name(token: int) -> str:
    """Returns the name of an id: `RTT_START`, `byte 7f`, or `unknown id 300`."""
    if 0 <= token < BYTE_0:
        return TOKEN_NAMES[token]
    return f"byte {token - BYTE_0:02x}" if BYTE_0 <= token < VOCAB_SIZE else f"unknown id {token}"


def field_of(tokens: np.ndarray) -> np.ndarray:
    """Returns which of `FIELDS` each token of sequences [..., T] belongs to [..., T], int8.

    An id below BYTE_0 is structure; a byte is of the field of the last such id before it.
    """
    tokens = np.asarray(tokens)
    is_byte = tokens >= BYTE_0
    position = np.where(is_byte, 0, np.arange(tokens.shape[-1]))
    head = np.take_along_axis(tokens, np.maximum.accumulate(position, axis=-1), axis=-1)
    known = is_byte & (head < BYTE_0)  # false for bytes that nothing precedes
    return np.array(FIELD_OF_PAYLOAD, np.int8)[np.where(known, head, MEASUREMENT_START)]


def format_tokens(
    tokens: Sequence[int] | np.ndarray, colour: Callable[[str, str], str] | None = None
) -> str:
    """Returns tokens as text, one measurement a line: names, then payloads as what they mean.

    Args:
        tokens: Any ids.
        colour: Called with each piece of text and its field (one of `FIELDS`); returns the text to
            show in its place.
    """
    ids, position = np.asarray(tokens).tolist(), 0
    lines: list[list[str]] = []
    while position < len(ids):
        head = ids[position]
        if head == MEASUREMENT_START or not lines:
            lines.append([])
        size = PAYLOAD_BYTES[head] if 0 <= head < BYTE_0 else 0
        payload = _leading_bytes(ids[position + 1 : position + 1 + size])
        whole = len(payload) == size
        text = token_name(head)
        if size and whole:
            text += f" {_payload_text(head, payload)}"
        field = FIELDS[FIELD_OF_PAYLOAD[head] if size else STRUCTURE]
        lines[-1].append(colour(text, field) if colour else text)
        position += 1 + size if whole else 1
    return "\n".join(" ".join(line) for line in lines)


def _payload_text(head: int, payload: bytes) -> str:
    value = int.from_bytes(payload, "big")
    if FIELD_OF_PAYLOAD[head] in (SOURCE, DESTINATION):
        return str(ipaddress.ip_address(payload))
    if head == TIMESTAMP_ABS:
        seconds = int.from_bytes(payload, "big", signed=True)
        inside = 0 <= seconds < 2**32
        return f"{np.datetime64(seconds, 's')}Z" if inside else f"{seconds} s"
    if FIELD_OF_PAYLOAD[head] == TIME:
        return f"+{value} s"
    if head == RTT_START:
        return f"{decode_rtt(np.array(value)):.3f} ms"
    return f"0x{value:04x}"
