"""Addresses, whole arrays at once: 16 bytes each, IPv4 as IPv4-mapped IPv6 (RFC 4291).

An array of addresses is of dtype `ADDRESS`, one item an address, which moves several times faster
than a row of bytes does. Where a function only reads addresses, uint8 [n, 16] will do as well.
"""

import ipaddress
import socket
from collections.abc import Iterable, Sequence

import numpy as np

from ping_llm.errors import DataError

MAPPED_PREFIX = bytes(10) + b"\xff\xff"
ADDRESS = np.dtype("V16")

_MASKS = np.packbits(np.tri(129, 128, -1, bool), axis=1)  # row k begins with k ones [129, 16]


def from_bytes(packed: np.ndarray) -> np.ndarray:
    """Returns uint8 [n, 16] as addresses [n], without a copy where it is contiguous."""
    return np.ascontiguousarray(packed, np.uint8).view(ADDRESS)[:, 0]


def as_bytes(addresses: np.ndarray) -> np.ndarray:
    """Returns addresses [n] as uint8 [n, 16], without a copy where they are contiguous."""
    return np.ascontiguousarray(addresses).view(np.uint8).reshape(-1, 16)


def from_packed(packed: Iterable[bytes]) -> np.ndarray:
    """Returns the addresses [n] of 4 bytes for IPv4, or 16, each."""
    data = b"".join(MAPPED_PREFIX + each if len(each) == 4 else each for each in packed)
    return np.frombuffer(data, ADDRESS)


def parse(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (addresses [n], families [n] int8) of addresses as text.

    Raises:
        DataError: One is no address.
    """
    encoded = [text.encode(errors="replace") for text in texts]
    lengths = np.array([len(text) for text in encoded], np.int64)
    data = np.frombuffer(b"".join(encoded), np.uint8)
    addresses, families = parse_texts(np.cumsum(lengths) - lengths, lengths, data)
    for i in np.flatnonzero(families == 0).tolist():
        raise DataError(f"{texts[i]!r} is no address; give one like 192.0.2.1 or 2001:db8::1")
    return addresses, families


def parse_texts(
    starts: np.ndarray, lengths: np.ndarray, data: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (addresses [n], families [n] int8) of text; family 0 where it is no address.

    IPv4 is a dotted quad without leading zeros. IPv6 is what `inet_pton` accepts, so no zone ids;
    IPv4-mapped IPv6 is the IPv4 address. Only what is no dotted quad is parsed one by one.

    Args:
        starts: Where each text starts in `data` [n], integer.
        lengths: Bytes of each text [n], integer.
        data: The bytes of all texts, uint8.
    """
    packed, families = np.zeros((len(starts), 16), np.uint8), np.zeros(len(starts), np.int8)
    short = np.flatnonzero((lengths >= 7) & (lengths <= 15))
    octets, ok = _parse_ipv4(starts[short].astype(np.int64), lengths[short], data)
    short = short[ok]
    packed[short, :12] = np.frombuffer(MAPPED_PREFIX, np.uint8)
    packed[short, 12:] = octets[ok]
    families[short] = 4
    for i in np.flatnonzero(families == 0):
        ipv6 = _inet6(data[starts[i] : starts[i] + lengths[i]].tobytes())
        if ipv6 is not None:
            packed[i] = np.frombuffer(ipv6, np.uint8)
            families[i] = 4 if ipv6.startswith(MAPPED_PREFIX) else 6
    return from_bytes(packed), families


def _parse_ipv4(starts: np.ndarray, lengths: np.ndarray, data: np.ndarray):
    """Returns (uint8 [n, 4], ok [n]): dotted quads without leading zeros, as inet_pton takes."""
    # All texts are read side by side, a character of each at a time. "10.0.2.33" after "10.0":
    # octets [10, 0, 0, 0] of which the first is complete, `part` 1, `value` 0, `digits` 1. The next
    # character is a dot: octet 1 becomes `value`, `part` 2, `value` and `digits` 0.
    n = len(starts)
    octets, part = np.zeros((n, 4), np.uint8), np.zeros(n, np.int64)
    value, digits, ok = np.zeros(n, np.int32), np.zeros(n, np.int32), np.ones(n, bool)
    rows = np.arange(n)
    for column in range(16):
        index = np.minimum(starts + column, max(len(data) - 1, 0))
        # A dot that closes the last number stands behind the text.
        char = np.where(column < lengths, data[index], ord(".")).astype(np.uint8)
        live = column <= lengths
        digit = char - np.uint8(48)
        is_digit, is_dot = digit < 10, char == ord(".")
        ends = live & is_dot
        ok &= ~live | is_digit | is_dot
        ok &= ~ends | ((digits > 0) & (digits <= 3) & (value <= 255) & (part < 4))
        ok &= ~(live & is_digit & (digits > 0) & (value == 0))  # 010 is 8 to some, 10 to others
        octets[rows[ends], part[ends] & 3] = value[ends].astype(np.uint8)
        value = np.where(is_dot, 0, np.minimum(value, 999) * 10 + digit)
        digits = np.where(is_dot, 0, digits + 1)
        part += ends
    return octets, ok & (part == 4)


def _inet6(text: bytes) -> bytes | None:
    try:
        return socket.inet_pton(socket.AF_INET6, text.decode("ascii"))
    except (OSError, ValueError):
        return None


def to_text(addresses: np.ndarray, families: np.ndarray | None = None) -> list[str]:
    """Returns addresses [n] as people write them.

    Args:
        addresses: The addresses [n].
        families: 4 or 6, how to read each [n]; None: IPv4 where IPv4-mapped.
    """
    families = family(addresses) if families is None else families
    packed = as_bytes(addresses).tobytes()
    return [
        _text(packed[16 * i : 16 * i + 16], version) for i, version in enumerate(families.tolist())
    ]


def _text(packed: bytes, version: int) -> str:
    if version == 4:
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    if packed.startswith(bytes(8)):  # inet_ntop writes some of these with a dotted quad
        return str(ipaddress.IPv6Address(packed))
    return socket.inet_ntop(socket.AF_INET6, packed)


def _raw_words(addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    words = np.ascontiguousarray(addresses).view(">u8").reshape(-1, 2).astype(np.uint64)
    return words[:, 0], words[:, 1]


def words(addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (high, low) uint64 [n] that order addresses [n] by family, then by bytes."""
    high, low = _raw_words(addresses)
    # IPv4, mapped to ::ffff:0:0/96, goes first; what of ::/64 stands before it moves behind it.
    below = (high == 0) & (low < 0x1_0000_0000_0000)
    ipv4 = below & (low >= 0xFFFF_0000_0000)
    moved = np.where(ipv4, low & np.uint64(0xFFFF_FFFF), low + np.uint64(0x1_0000_0000))
    return high, np.where(below, moved, low)


def family(addresses: np.ndarray) -> np.ndarray:
    """Returns 4 where addresses [n] are IPv4-mapped, else 6 [n], int8."""
    high, low = _raw_words(addresses)
    return np.where((high == 0) & (low >> np.uint64(32) == 0xFFFF), 4, 6).astype(np.int8)


def _bit_length(x: np.ndarray) -> np.ndarray:
    # With the bit below its highest one cleared, no number is rounded up to a power of two.
    return np.frexp((x & ~(x >> np.uint64(1))).astype(np.float64))[1]


def common_prefix_length(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns how many leading bits addresses `a` and `b` [n] share [n], int32.

    Of 32 for two IPv4 addresses, of 128 for two IPv6 addresses; 0 for one of each.
    """
    high, low = (x ^ y for x, y in zip(_raw_words(a), _raw_words(b), strict=True))
    shared = np.where(high != 0, 64 - _bit_length(high), 128 - _bit_length(low))
    families = family(a)
    shared = np.where(families == 4, shared - 96, shared)
    return np.where(families == family(b), shared, 0).astype(np.int32)


def prefix(addresses: np.ndarray, bits: int | np.ndarray) -> np.ndarray:
    """Returns addresses [n] with all but their first `bits` bits zero.

    Args:
        addresses: The addresses [n].
        bits: Of the 32 of an IPv4 address, or of the 128 of an IPv6 address; one number or [n].
    """
    kept = np.where(family(addresses) == 4, 96, 0) + bits
    return from_bytes(as_bytes(addresses) & _MASKS[kept])
