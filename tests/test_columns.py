import datetime
import ipaddress
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ping_llm.columns import (
    INVALID,
    MISSING,
    OK,
    parse_addresses,
    parse_floats,
    parse_times,
)

ADDRESSES = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
    st.ip_addresses(v=6).map(lambda a: a.exploded.upper()),
    st.text("0123456789.", max_size=17),
    st.text("0123456789abcdef:.", max_size=20),
    st.text(max_size=20),
)


def reference(text):
    """Returns (family, bytes) by the standard library, or (0, None)."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return 0, None
    if address.version == 4:
        return 4, bytes(10) + b"\xff\xff" + address.packed
    if address.scope_id is not None:
        return 0, None
    return (4 if address.ipv4_mapped else 6), address.packed


@given(st.lists(ADDRESSES, max_size=30))
def test_addresses_parse_as_the_standard_library_parses_them(texts):
    parsed = parse_addresses(pa.array(texts, pa.string()))
    for i, text in enumerate(texts):
        family, packed = reference(text)
        assert parsed.family_of_records()[i] == family
        if packed is not None:
            assert parsed.values[parsed.codes[i]].tobytes() == packed
        expected = MISSING if text == "" else OK if family else INVALID
        assert parsed.problems()[i] == expected


@pytest.mark.parametrize(
    "text",
    ["01.2.3.4", "1.2.3", "1.2.3.4.5", "256.1.1.1", " 1.2.3.4", "1.2.3.4 ", "1..2.3", "1.2.3.",
     "fe80::1%eth0", "1.2.3.4/32", "0x1.2.3.4", "\u0661.2.3.4", "1.2.3.4\n", "::ffff:1.2.3.256"],
)  # fmt: skip
def test_what_only_resembles_an_address_is_invalid(text):
    assert parse_addresses(pa.array([text])).problems().tolist() == [INVALID]


def test_addresses_may_be_null_dictionary_encoded_sliced_or_large():
    texts = ["9.9.9.9", "1.2.3.4", None, "::1", "1.2.3.4"]
    plain = pa.array(texts)
    for column in (
        plain,
        plain.dictionary_encode(),
        plain.cast(pa.large_string()),
        plain.cast(pa.string_view()),
    ):
        parsed = parse_addresses(column.slice(1))
        assert parsed.family_of_records().tolist() == [4, 0, 6, 4]
        assert parsed.problems().tolist() == [OK, MISSING, OK, OK]


def test_a_dictionary_that_holds_null_gives_missing_addresses():
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1]), pa.array([None, "1.2.3.4"]))
    assert parse_addresses(column).problems().tolist() == [MISSING, OK]


@given(st.lists(st.floats().map(repr) | st.integers().map(str), max_size=20))
def test_numbers_parse_as_python_parses_them(texts):
    values, problems = parse_floats(pa.array(texts, pa.string()))
    np.testing.assert_array_equal(values, [float(text) for text in texts])
    assert (problems == OK).all()


@pytest.mark.parametrize(
    "text", ["abc", "1_0", "0x10", " 1", "1 ", "1,5", "true", "--1", "1e", "é", "1.2.3"]
)
def test_what_is_no_decimal_is_invalid_and_leaves_its_neighbours_alone(text):
    values, problems = parse_floats(pa.array(["1.5", text, None, "", "inf", "+2", ".5", "7."]))
    assert problems.tolist() == [OK, INVALID, MISSING, MISSING, OK, OK, OK, OK]
    assert values[[0, 4, 5, 6, 7]].tolist() == [1.5, math.inf, 2, 0.5, 7]


@settings(max_examples=50)
@given(
    st.datetimes(
        datetime.datetime(1950, 1, 1),
        datetime.datetime(2150, 1, 1),
        timezones=st.timezones().map(lambda z: z) | st.none(),
    )
)
def test_iso_8601_times_are_floored_to_seconds_and_naive_ones_are_utc(moment):
    text = moment.isoformat()
    aware = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
    if aware.utcoffset() % datetime.timedelta(minutes=1):
        return  # zones before standard time; ISO 8601 has no seconds in offsets
    seconds, problems = parse_times(pa.array([text, text.replace("T", " "), "x"]))
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    expected = (aware - epoch) // datetime.timedelta(seconds=1)
    assert problems.tolist() == [OK, OK, INVALID]
    assert seconds[:2].tolist() == [expected, expected]


@pytest.mark.parametrize(
    "text",
    ["2024-02-30T00:00:00", "2024-01-01", "2024-13-01T00:00:00", "2024-01-01T25:00:00", "nan",
     "2024-01-01T00:00:00+25:00", "20240101T000000", "2024-01-01T00:00:60", "1e300", "now"],
)  # fmt: skip
def test_what_is_no_time_is_invalid(text):
    seconds, problems = parse_times(pa.array(["12.9", text, "2024-01-01T00:00Z", "-0.5"]))
    assert problems.tolist() == [OK, INVALID, OK, OK]
    assert seconds[[0, 2, 3]].tolist() == [12, 1704067200, -1]


def test_a_corrupt_dictionary_is_noticed():
    indices = pa.array([0, 9, 1], pa.int32())
    column = pa.DictionaryArray.from_arrays(indices, pa.array(["::1", "::2"]), safe=False)
    with pytest.raises(pa.ArrowInvalid, match="out of range"):
        parse_addresses(column)
