import ipaddress
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ping_llm import addresses
from ping_llm.errors import DataError

IPV4, IPV6 = st.ip_addresses(v=4), st.ip_addresses(v=6)
# Addresses with long runs of equal bits, where text and prefixes have their corners.
SPARSE = st.integers(0, 127).flatmap(lambda k: st.sampled_from([1 << k, (1 << k) - 1]))
ANY = st.one_of(IPV4, IPV6, SPARSE.map(ipaddress.IPv6Address))


def packed(address):
    """Returns the 16 bytes of an address by the standard library."""
    return addresses.MAPPED_PREFIX[: 16 - len(address.packed)] + address.packed


def array(values):
    return np.frombuffer(b"".join(map(packed, values)), addresses.ADDRESS)


def plain(address):
    return getattr(address, "ipv4_mapped", None) or address


@given(st.lists(ANY, max_size=20))
def test_text_and_bytes_agree_with_the_standard_library_both_ways(values):
    parsed, families = addresses.parse([str(each) for each in values])
    assert parsed.tobytes() == b"".join(map(packed, values))
    assert families.tolist() == [plain(each).version for each in values]
    assert addresses.family(parsed).tolist() == families.tolist()
    assert addresses.to_text(parsed) == [str(plain(each)) for each in values]
    whole = addresses.from_packed(each.packed for each in values)
    assert whole.tobytes() == parsed.tobytes()


@given(st.lists(IPV4, max_size=5))
def test_a_mapped_address_prints_as_its_family_says(values):
    six = [str(ipaddress.IPv6Address(packed(each))) for each in values]
    assert addresses.to_text(array(values), np.full(len(values), 6)) == six


@pytest.mark.parametrize(
    "text", ["", "1.2.3", "fe80::1%eth0", "01.2.3.4", "\ud800", "\u0661.2.3.4"]
)
def test_what_is_no_address_is_refused_by_name(text):
    with pytest.raises(DataError, match="is no address; give one like 192"):
        addresses.parse(["192.0.2.1", text])


@given(st.lists(ANY, min_size=1, max_size=20))
def test_words_are_in_the_order_of_families_and_then_of_addresses(values):
    high, low = addresses.words(array(values))
    order = np.lexsort((low, high))
    found = [plain(values[i]) for i in order]
    assert found == sorted(map(plain, values), key=lambda each: (each.version, each))
    same = (high[:, None] == high) & (low[:, None] == low)
    assert same.tolist() == [[plain(a) == plain(b) for b in values] for a in values]


def shared_bits(a, b):
    a, b = plain(a), plain(b)
    if a.version != b.version:
        return 0
    return a.max_prefixlen - (int(a) ^ int(b)).bit_length()


@given(ANY, ANY, st.integers(0, 128))
def test_the_common_prefix_is_that_of_a_bitwise_comparison(a, b, bit):
    near = type(a)(int(a) ^ (1 << bit % a.max_prefixlen))
    left, right = array([a, a, a]), array([a, b, near])
    expected = [shared_bits(a, a), shared_bits(a, b), shared_bits(a, near)]
    assert addresses.common_prefix_length(left, right).tolist() == expected


@given(st.lists(st.tuples(ANY, st.floats(0, 1)), max_size=10))
def test_a_prefix_keeps_the_first_bits_of_its_own_family(pairs):
    values = [plain(each) for each, _ in pairs]
    bits = [int(part * each.max_prefixlen) for each, (_, part) in zip(values, pairs, strict=True)]
    cut = addresses.prefix(array(values), np.array(bits, np.int64))
    networks = [
        ipaddress.ip_network((each, n), strict=False) for each, n in zip(values, bits, strict=True)
    ]
    assert cut.tobytes() == b"".join(packed(each.network_address) for each in networks)


def test_bytes_are_a_view_both_ways_also_of_slices():
    raw = np.frombuffer(os.urandom(160), np.uint8).reshape(10, 16).copy()
    items = addresses.from_bytes(raw)
    assert items.shape == (10,)
    assert np.shares_memory(items, raw)
    assert np.shares_memory(addresses.as_bytes(items), raw)
    np.testing.assert_array_equal(addresses.as_bytes(items[::3]), raw[::3])
    np.testing.assert_array_equal(addresses.words(items), addresses.words(raw))
    assert addresses.as_bytes(items[:0]).shape == (0, 16)
