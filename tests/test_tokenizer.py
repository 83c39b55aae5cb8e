import itertools
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ping_llm import addresses
from ping_llm import tokenizer as tk
from ping_llm.errors import PingLLMError
from ping_llm.measurements import NO_TIME, MeasurementTable

MAX_US = 2047 * 2**31


def measurements(records):
    """Makes a table of tuples (time or None, src, dst, family, rtt)."""
    return MeasurementTable(
        time=np.array([NO_TIME if r[0] is None else r[0] for r in records], np.int64),
        src=addresses.from_packed(r[1] for r in records),
        dst=addresses.from_packed(r[2] for r in records),
        family=np.array([r[3] for r in records], np.int8),
        rtt=np.array([r[4] for r in records], np.float32),
    )


def encode_one_segment(records, orders=None):
    orders = orders or [(0, 1, 2, 3)] * len(records)
    tokens, offsets = tk.encode(
        measurements(records),
        segment_offsets=np.array([0, len(records)]),
        field_order=np.array(orders, np.uint8).reshape(-1, 4),
    )
    assert offsets.tolist() == [0, len(tokens)]
    return tokens


# --- an independent encoder, one measurement at a time, after DESIGN section 4 ------------------


def reference_code(us):
    """Returns the code of a float64 of microseconds, rounded once and exactly."""
    us = max(Fraction(us), Fraction(1))
    exponent = 0
    while us / 2**exponent >= 2048:
        exponent += 1
    mantissa = round(us / 2**exponent)  # half to even
    if mantissa == 2048:
        mantissa, exponent = 1024, exponent + 1
    return exponent * 2048 + mantissa


def reference_encode(segments, orders):
    """Encodes segments of records; `orders` is one list of permutations over all of them."""
    out, orders = [], iter(orders)
    for segment in segments:
        previous, last_source, tokens = None, None, []
        for time, src, dst, version, rtt in segment:

            def field(head, payload):
                return [head, *(11 + byte for byte in payload)]

            cut = 12 if version == 4 else 0
            parts = [field(1 if cut else 2, src[cut:]), field(3 if cut else 4, dst[cut:])]
            if (version, src) == last_source:
                parts[0] = []
            last_source = version, src
            if time is None:
                parts.append([])
            else:
                delta = -1 if previous is None else time - previous
                if 0 <= delta <= 255:
                    parts.append(field(6, struct.pack(">B", delta)))
                elif 0 <= delta < 2**32:
                    parts.append(field(7, struct.pack(">I", delta)))
                else:
                    parts.append(field(5, struct.pack(">q", time)))
                previous = time
            parts.append(
                [10] if rtt < 0 else field(8, struct.pack(">H", reference_code(rtt * 1000.0)))
            )
            tokens.append(0)
            for i in next(orders):
                tokens.extend(parts[i])
        out.append(tokens)
    return out


SOURCES = (addresses.MAPPED_PREFIX + bytes([10, 0, 0, 1]), bytes(range(16)))


@st.composite
def record(draw):
    version = draw(st.sampled_from([4, 6]))
    # Few sources, so that they repeat; the first stands for another one in each family.
    if version == 4:
        address = st.binary(min_size=4, max_size=4).map(lambda b: addresses.MAPPED_PREFIX + b)
        source = st.just(SOURCES[0]) | address
    else:
        address = st.binary(min_size=16, max_size=16)
        source = st.sampled_from(SOURCES) | address
    near = st.integers(0, 600)
    far = st.sampled_from([2**32 - 1, 2**32, 2**32 + 255, 0, -1])
    anywhere = st.integers(NO_TIME + 1, 2**63 - 1)
    time = draw(st.none() | near | far | anywhere)
    rtt = draw(st.just(-1.0) | st.floats(0, tk.MAX_RTT_MS) | st.floats(0, 1000, width=32))
    return time, draw(source), draw(address), version, float(np.float32(rtt))


permutations = st.permutations(range(4))
segments_of_records = st.lists(st.lists(st.tuples(record(), permutations), max_size=8), max_size=5)


@given(segments_of_records)
@settings(deadline=None, max_examples=300)
def test_the_scalar_reference_encoder_agrees_token_for_token(drawn):
    segments = [[r for r, _ in segment] for segment in drawn]
    orders = [order for segment in drawn for _, order in segment]
    flat = [r for segment in segments for r in segment]
    tokens, offsets = tk.encode(
        measurements(flat),
        segment_offsets=np.cumsum([0] + [len(s) for s in segments]),
        field_order=np.array(orders, np.uint8).reshape(-1, 4),
    )
    got = [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert got == reference_encode(segments, orders)


@given(st.lists(st.tuples(record(), permutations), max_size=12))
@settings(deadline=None, max_examples=300)
def test_decoding_gives_back_every_field_up_to_the_rounding_of_the_rtt(drawn):
    records, orders = [r for r, _ in drawn], [o for _, o in drawn]
    decoded, problems = tk.decode(encode_one_segment(records, orders))
    expected = measurements(records)
    assert problems == []
    np.testing.assert_array_equal(decoded.time, expected.time)
    np.testing.assert_array_equal(decoded.src, expected.src)
    np.testing.assert_array_equal(decoded.dst, expected.dst)
    np.testing.assert_array_equal(decoded.family, expected.family)
    answered = expected.rtt >= 0
    np.testing.assert_array_equal(decoded.rtt[~answered], -1.0)
    us = np.maximum(expected.rtt[answered].astype(float) * 1000, 1)
    allowed = np.where(us < 1024, 0.5, us * 0.00049)
    rounding = 1e-7 * us  # of float32
    assert np.all(np.abs(decoded.rtt[answered].astype(float) * 1000 - us) <= allowed + rounding)


@given(st.lists(st.integers(0, 266), max_size=120))
@settings(deadline=None, max_examples=500)
def test_decoding_random_ids_never_raises_and_accounts_for_every_start(ids):
    decoded, problems = tk.decode(ids)
    starts = ids.count(tk.MEASUREMENT_START)
    outside = bool(ids) and ids[0] != tk.MEASUREMENT_START
    assert len(decoded) + len(problems) == starts + outside
    assert all(0 <= p.position < len(ids) and p.reason for p in problems)


heads = st.sampled_from(range(11))
plausible = heads.flatmap(
    lambda head: st.lists(
        st.integers(11, 266), min_size=tk.PAYLOAD_BYTES[head], max_size=tk.PAYLOAD_BYTES[head]
    ).map(lambda payload: [head, *payload])
)


@given(st.lists(plausible, max_size=30))
@settings(deadline=None, max_examples=500)
def test_what_decodes_from_any_fields_encodes_and_decodes_to_itself(parts):
    decoded, _ = tk.decode([token for part in parts for token in part])
    n = len(decoded)
    tokens, _ = tk.encode(
        decoded,
        segment_offsets=np.array([0, n]),
        field_order=np.tile(np.arange(4, dtype=np.uint8), (n, 1)),
    )
    again, problems = tk.decode(tokens)
    assert problems == []
    for name in ("time", "src", "dst", "family"):
        np.testing.assert_array_equal(getattr(again, name), getattr(decoded, name))
    # A decoded 0 us comes back as 1 us, the smallest that is encoded.
    np.testing.assert_array_equal(
        again.rtt, np.where(decoded.rtt < 0, -1, np.maximum(decoded.rtt, 0.001))
    )


@pytest.mark.parametrize("ids", [[267], [-1], [0, 300, 11], [0, 1, -5], [2**40, 0], []])
def test_decoding_ids_outside_the_vocabulary_reports_them(ids):
    decoded, problems = tk.decode(ids)
    assert len(decoded) == 0
    assert bool(problems) == bool(ids)


# --- the RTT code -------------------------------------------------------------------------------


def test_every_code_decodes_to_the_value_it_stands_for_and_canonical_ones_round_trip():
    codes = np.arange(65536)
    us = [(code & 2047) << (code >> 11) for code in codes.tolist()]
    ms = tk.decode_rtt(codes)
    np.testing.assert_array_equal(ms, np.array(us, np.float64) / 1000)
    canonical = (codes < 2048) | ((codes & 2047) >= 1024)
    canonical[0] = False  # 0 us is encoded as 1 us
    again = tk.encode_rtt(ms)
    np.testing.assert_array_equal(again[canonical], codes[canonical])
    np.testing.assert_array_equal(tk.decode_rtt(again[1:]), np.maximum(ms[1:], 0.001))


def test_between_two_codes_the_nearer_wins_and_the_middle_goes_to_the_even_mantissa():
    codes = np.flatnonzero((np.arange(65536) < 2048) | ((np.arange(65536) & 2047) >= 1024))[1:]
    us = np.ldexp((codes & 2047).astype(np.float64), codes >> 11)
    middle = (us[:-1] + us[1:]) / 2
    for near in (np.nextafter(middle, 0), middle, np.nextafter(middle, np.inf)):
        ms = near[::53] / 1000
        expected = [reference_code(value) for value in ms * 1000]
        assert tk.encode_rtt(ms).tolist() == expected


@pytest.mark.parametrize(
    ("us", "code"),
    [
        (0.0, 1),
        (0.3, 1),
        (1.0, 1),
        (1.5, 2),
        (2.5, 2),
        (2047.0, 2047),
        (62.5, 62),
        (187.5, 188),
        (2047.9, 2048 + 1024),
        (2048.0, 2048 + 1024),
        (2049.0, 2048 + 1024),
        (2051.0, 2048 + 1026),
        (4095.1, 2 * 2048 + 1024),
        (MAX_US, 65535),
    ],
)
def test_rtt_codes_worked_out_by_hand(us, code):
    assert tk.encode_rtt(np.array([us / 1000])).tolist() == [code]


@given(st.floats(1.024, tk.MAX_RTT_MS))
def test_the_relative_error_of_a_code_is_at_most_half_a_thousandth(ms):
    assert abs(tk.decode_rtt(tk.encode_rtt(np.array([ms])))[0] / ms - 1) <= 0.00049


@pytest.mark.parametrize(
    "ms", [-1.0, float("nan"), float("inf"), np.nextafter(tk.MAX_RTT_MS, np.inf), 1e300]
)
def test_an_rtt_without_a_code_is_an_error_and_is_never_clamped(ms):
    with pytest.raises(PingLLMError, match="has no code"):
        tk.encode_rtt(np.array([1.0, ms]))


# --- time ---------------------------------------------------------------------------------------

V4 = addresses.MAPPED_PREFIX + bytes([192, 0, 2, 1])
V6 = bytes(range(16))


def time_heads(times):
    tokens = encode_one_segment([(t, V4, V4, 4, 1.0) for t in times])
    return [t for t in tokens.tolist() if 5 <= t <= 7]


@pytest.mark.parametrize(
    ("times", "heads"),
    [
        ([1000], [5]),
        ([1000, 1000], [5, 6]),
        ([1000, 1255], [5, 6]),
        ([1000, 1256], [5, 7]),
        ([1000, 1000 + 2**32 - 1], [5, 7]),
        ([1000, 1000 + 2**32], [5, 5]),
        ([1000, 999], [5, 5]),
        ([NO_TIME + 1, 2**63 - 1], [5, 5]),
        ([1000, None, 1010], [5, 6]),
        ([None, None, 1010], [5]),
        ([None], []),
        ([1000, 500, 510], [5, 5, 6]),
    ],
)
def test_the_form_of_a_time_follows_from_the_previous_known_time(times, heads):
    assert time_heads(times) == heads


def test_the_first_time_of_every_segment_is_absolute_whatever_came_before():
    records = [(t, V4, V4, 4, 1.0) for t in (10, 11, None, 12, 13)]
    tokens, offsets = tk.encode(
        measurements(records),
        segment_offsets=np.array([0, 2, 2, 3, 5, 5]),
        field_order=np.tile(np.arange(4, dtype=np.uint8), (5, 1)),
    )
    parts = [tokens[a:b] for a, b in itertools.pairwise(offsets)]
    assert [[t for t in part.tolist() if 5 <= t <= 7] for part in parts] == [
        [5, 6],
        [],
        [],
        [5, 6],
        [],
    ]


# --- source -------------------------------------------------------------------------------------


def source_heads(tokens):
    """Returns the source head of each measurement, None where it has none."""
    text = tk.format_tokens(tokens).splitlines()
    return [next((w for w in line.split() if w.startswith("SRC")), None) for line in text]


def test_a_source_is_named_where_it_begins_and_where_it_changes():
    other4, mapped = V4[:15] + b"\x02", V4
    sources = [(V4, 4), (V4, 4), (other4, 4), (V4, 4), (V6, 6), (V6, 6), (mapped, 6), (V4, 4)]
    tokens = encode_one_segment([(None, src, V6 if v == 6 else V4, v, 1.0) for src, v in sources])
    four, six = "SRC_IPV4", "SRC_IPV6"
    assert source_heads(tokens) == [four, None, four, four, six, None, six, four]


def test_the_first_measurement_of_every_segment_names_its_source():
    tokens, offsets = tk.encode(
        measurements([(None, V4, V4, 4, 1.0)] * 5),
        segment_offsets=np.array([0, 2, 2, 3, 5, 5]),
        field_order=np.tile(np.arange(4, dtype=np.uint8), (5, 1)),
    )
    assert np.diff(offsets).tolist() == [14 + 9, 0, 14, 14 + 9, 0]
    four = "SRC_IPV4"
    assert source_heads(tokens) == [four, None, four, four, None]


def test_the_most_tokens_of_a_measurement_are_what_the_constants_say():
    for version, address in ((4, V4), (6, V6)):
        one = [(10**9, address, address, version, 1.0)]
        first = tk.SOURCE_TOKENS[version] + tk.BARE_TOKENS[version] + tk.FIRST_TIME_TOKENS
        assert len(encode_one_segment(one)) == first
        later = [(10**9 + 10**6, address, address, version, 1.0)]
        both = first + tk.BARE_TOKENS[version] + tk.NEXT_TIME_TOKENS
        assert len(encode_one_segment(one + later)) == both
    assert first == tk.MAX_MEASUREMENT_TOKENS


# --- problems -----------------------------------------------------------------------------------

SRC4, DST4 = [1, 11, 12, 13, 14], [3, 21, 22, 23, 24]
DST6 = [4, *range(11, 27)]
ABS, DELTA, RTT = [5, *[11] * 7, 20], [6, 12], [8, 15, 16]
GOOD = [0, *SRC4, *DST4, *RTT]


@pytest.mark.parametrize(
    ("bad", "position", "reason"),
    [
        ([0, *DST4, *RTT], 0, "without a source"),
        ([0, *SRC4, *RTT], 0, "without a destination"),
        ([0, *SRC4, *DST4], 0, "without a result"),
        ([0], 0, "without a source"),
        ([0, *SRC4, *SRC4, *DST4, *RTT], 6, "a second source"),
        ([0, *SRC4, *DST4, *RTT, 10], 14, "a second result"),
        ([0, *SRC4, *DST4, *ABS, *ABS, *RTT], 20, "a second timestamp"),
        ([0, *SRC4, *DST6, *RTT], 0, "different families"),
        ([0, *SRC4, *DST4, 8, 15], 11, "RTT_START has 1 of 2 bytes"),
        ([0, 1, 11, 12, *DST4, *RTT], 1, "SRC_IPV4 has 2 of 4 bytes"),
        ([0, *SRC4, *DST4, *DELTA, *RTT], 11, "TIMESTAMP_DELTA1 without a timestamp before it"),
        ([0, *SRC4, *DST4, 5, 11 + 128, *[11] * 7, *RTT], 11, "TIMESTAMP_ABS is no time"),
        ([0, *SRC4, *DST4, 50, *RTT], 11, "byte 27 where a field should start"),
        ([0, *SRC4, *DST4, 9, 15, 16], 11, "GRID where a field should start"),
        ([0, *SRC4, *DST4, 400, *RTT], 11, "unknown id 400 where a field should start"),
        (
            [0, *SRC4, *DST4, 5, 11 + 127, *[266] * 7, *RTT, 0, *SRC4, *DST4, *DELTA, *RTT],
            34,
            "beyond 64 bits",
        ),
    ],
)
def test_a_broken_measurement_is_a_problem_and_the_next_one_is_read(bad, position, reason):
    decoded, problems = tk.decode([*bad, *GOOD])
    assert [p.position for p in problems] == [position]
    assert reason in problems[0].reason
    assert decoded.rtt[-1] == np.float32(tk.decode_rtt(np.array([4 * 256 + 5]))[0])


def test_tokens_before_the_first_measurement_are_one_problem():
    decoded, problems = tk.decode([50, 60, *SRC4, *GOOD])
    assert len(decoded) == 1
    assert problems == [tk.Problem(0, "byte 27 outside a measurement")]


def test_a_measurement_without_a_source_is_of_the_last_one_named_even_by_a_broken_one():
    bare, other = [0, *DST4, *RTT], [1, 11, 12, 13, 99]
    decoded, problems = tk.decode(
        [*GOOD, *bare, 0, *DST4, *RTT, *other, *bare, 0, *SRC4, 99, *bare, *GOOD]
    )
    assert len(problems) == 1
    assert addresses.as_bytes(decoded.src)[:, 15].tolist() == [3, 3, 88, 88, 3, 3]


def test_a_destination_of_another_family_than_the_last_source_is_a_problem():
    decoded, problems = tk.decode([*GOOD, 0, *DST6, *RTT])
    assert len(decoded) == 1
    assert [p.reason for p in problems] == ["source and destination of different families"]


def test_a_timestamp_read_before_the_rest_went_wrong_counts_as_the_previous_one():
    broken = [0, *SRC4, *ABS]
    decoded, problems = tk.decode([*broken, 0, *SRC4, *DST4, *DELTA, *RTT])
    assert len(problems) == 1
    assert decoded.time.tolist() == [10]


# --- fields, text, document ---------------------------------------------------------------------


def test_each_byte_belongs_to_the_field_that_the_last_structure_token_names():
    tokens = np.array([[*GOOD, *ABS, 10], [99, 99, *GOOD, *DELTA, *SRC4, 10]])
    source, destination, time, rtt = [0] + [1] * 4, [0] + [2] * 4, [0] + [3] * 8, [0, 4, 4]
    assert tk.field_of(tokens).tolist() == [
        [0, *source, *destination, *rtt, *time, 0],
        [0, 0, 0, *source, *destination, *rtt, 0, 3, *source, 0],
    ]


def test_formatting_shows_one_measurement_a_line_with_payloads_as_what_they_mean():
    text = tk.format_tokens([*GOOD, 0, *ABS, 6, 15, 2, *range(11, 27), 10])
    assert text.splitlines() == [
        "MEASUREMENT_START SRC_IPV4 0.1.2.3 DST_IPV4 10.11.12.13 RTT_START 1.029 ms",
        "MEASUREMENT_START TIMESTAMP_ABS 1970-01-01T00:00:09Z TIMESTAMP_DELTA1 +4 s "
        "SRC_IPV6 1:203:405:607:809:a0b:c0d:e0f FAILED",
    ]


def test_formatting_hands_each_piece_and_its_field_to_the_colour_callback():
    text = tk.format_tokens([*GOOD], colour=lambda text, field: f"<{field}>")
    assert text == "<structure> <source> <destination> <rtt>"


@given(st.lists(st.integers(-5, 300), max_size=60))
def test_formatting_never_raises(ids):
    tk.format_tokens(ids)
    tk.format_tokens(ids, colour=lambda text, field: text)


def test_the_table_in_the_document_is_the_code():
    document = Path(__file__).parents[1] / "docs" / "token-language.md"
    rows = [line.split("|")[1:-1] for line in document.read_text().splitlines() if "|" in line]
    table = {}
    for row in rows:
        cells = [cell.strip().strip("`") for cell in row]
        if cells[0].isdigit():
            table[int(cells[0])] = (cells[1], int(cells[2]))
    assert table == dict(enumerate(zip(tk.TOKEN_NAMES, tk.PAYLOAD_BYTES, strict=True)))
    assert f"{tk.VOCAB_SIZE} ids" in document.read_text()
    assert f"{tk.BYTE_0}..{tk.VOCAB_SIZE - 1}" in document.read_text()
