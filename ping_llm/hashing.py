"""Hashes that depend on values alone: of whole columns, of JSON, of files."""

import hashlib
import json
from typing import Any, BinaryIO

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def scramble(x: np.ndarray) -> np.ndarray:
    """Returns uint64 `x` scrambled: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(bits: np.ndarray) -> np.ndarray:
    """Returns 64 random bits each as a number uniform on [0, 1), of their upper 53."""
    return (bits >> np.uint64(11)) * 2.0**-53


def mix(*columns: np.ndarray) -> np.ndarray:
    """Returns one hash for each element of the integer columns [n] or [1]; their order matters."""
    key = np.zeros(np.shape(columns[0]), np.uint64)
    for column in columns:
        key = scramble((key + GOLDEN) ^ scramble(column.astype(np.uint64) + GOLDEN))
    return key


def hash_addresses(addresses: np.ndarray) -> np.ndarray:
    """Returns a 64-bit hash of each address, [n] of 16 bytes or uint8 [n, 16]."""
    halves = np.ascontiguousarray(addresses).view("<u8").reshape(-1, 2)
    return mix(halves[:, 0], halves[:, 1])


def keyed_hash_addresses(addresses: np.ndarray, seed: int) -> np.ndarray:
    """Returns another 64-bit hash of each address, by which `seed` deals out splits.

    Prepared data depend on it: it must never change.
    """
    words = np.ascontiguousarray(addresses).view(">u8").reshape(-1, 2).astype(np.uint64)
    key = scramble(np.array([seed + 1], np.uint64))
    return scramble(scramble(words[:, 0] ^ key) + words[:, 1])


def canonical_json(content: Any) -> bytes:
    """Returns `content` as JSON in the one form that equal contents share."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(content: Any) -> str:
    """Returns a hash of what JSON can hold, 32 hexadecimal digits."""
    return hashlib.sha256(canonical_json(content)).hexdigest()[:32]


def seal(content: dict[str, Any]) -> bytes:
    """Returns `content` as JSON that carries its own checksum."""
    return canonical_json(content | {"checksum": digest(content)}) + b"\n"


def unseal(data: bytes) -> dict[str, Any] | None:
    """Returns what `seal` was given, or None if any byte of `data` differs from what it made."""
    try:
        content = json.loads(data)
        content.pop("checksum")
        return content if seal(content) == data else None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None


def file_digest(file: BinaryIO) -> str:
    """Returns the SHA-256 of the rest of an open binary file, in hexadecimal."""
    sha256 = hashlib.sha256()
    while block := file.read(1 << 20):
        sha256.update(block)
    return sha256.hexdigest()
