import hashlib
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ping_llm import hashing

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)  # fmt: skip
CONTENTS = st.dictionaries(st.text(max_size=3).filter(lambda key: key != "checksum"), JSON)

# 192.0.2.1, 2001:db8::1 and the bytes 240..255.
ADDRESSES = np.frombuffer(
    bytes(10) + b"\xff\xff\xc0\x00\x02\x01"
    + bytes.fromhex("20010db8000000000000000000000001") + bytes(range(240, 256)),
    np.uint8,
).reshape(3, 16)  # fmt: skip


def test_the_first_outputs_are_those_of_splitmix64():
    # Published outputs of SplitMix64 with seed 1234567 (Vigna's splitmix64.c).
    states = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert hashing.scramble(states).tolist() == expected


def test_hashes_of_addresses_never_change():
    expected = [0x72E69787466A6D04, 0x6B803A2675E35491, 0x36E5D2D66F4D6116]
    assert hashing.hash_addresses(ADDRESSES).tolist() == expected
    assert hashing.hash_addresses(ADDRESSES.view("V16")[:, 0]).tolist() == expected


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (0, [0xBEFD8F7C7686A4D8, 0xAE419810A2BC6360, 0xE88D5C56C7A8E71E]),
        (7, [0x5F68BAC9A9103F49, 0xF97D9291B866F375, 0x4BF5073CA823005A]),
        (2**63 - 1, [0x8319A69C47559404, 0x1C9806FADCB1C2BE, 0xF05C9DC71764FF22]),
    ],
)
def test_the_hashes_that_deal_out_splits_never_change(seed, expected):
    assert hashing.keyed_hash_addresses(ADDRESSES, seed).tolist() == expected
    assert hashing.keyed_hash_addresses(ADDRESSES.view("V16")[:, 0], seed).tolist() == expected


def test_mixed_columns_never_change():
    found = hashing.mix(np.array([0, 1, -1]), np.array([2, 3, 4]))
    assert found.tolist() == [0x8613585117A8AB6D, 0xF0C13517A3D9D5, 0x922BAF687D558FAC]


def test_seals_never_change():
    content = {"b": [1, 2.5, None], "a": "é"}
    checksum = b"84afbf1d4853005f9dd0c81cb1819b53"
    assert hashing.digest(content) == checksum.decode()
    expected = b'{"a":"\\u00e9","b":[1,2.5,null],"checksum":"' + checksum + b'"}\n'
    assert hashing.seal(content) == expected


@given(CONTENTS, st.integers(0), st.integers(1, 255))
def test_a_seal_gives_back_its_content_and_notices_any_changed_byte(content, at, flip):
    sealed = bytearray(hashing.seal(content))
    assert hashing.unseal(bytes(sealed)) == content
    sealed[at % len(sealed)] ^= flip
    assert hashing.unseal(bytes(sealed)) is None
    assert hashing.unseal(bytes(sealed[: at % len(sealed)])) is None


def test_the_digest_of_a_file_is_its_sha256():
    data = bytes(range(256)) * 8200  # more than two blocks
    assert hashing.file_digest(io.BytesIO(data)) == hashlib.sha256(data).hexdigest()
