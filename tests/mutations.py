"""Random changes to bytes and to JSON, for tests of what reads other people's files."""

import copy
import json
import math

import numpy as np

# What makes more of a text than noise does.
TOKENS = [b'"', b",", b"\n", b"\r", b"{", b"}", b"[", b"]", b":", b"-", b".", b"e", b"0", b"9" * 20,
          b"null", b"true", b"NaN", b"Infinity", b"\\", b"\x00", b"\xff", b'"rtt"', b"::", b"%",
          b"::ffff:1.2.3.4", b"1e400", b"-0.0", b"\xef\xbb\xbf", b" ", b"{{", b"%}", b"../",
          b"\\ud800", b"[" * 60]  # fmt: skip
VALUES = [None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 1e30, -1e-300, math.nan,
          math.inf, 0.5, "", "x", "1", "../../..", "\x1b[31m", "\ud800", "a" * 3000, "{{ 1 // 0 }}",
          [], {}, [[]], [None], {"": 0}, [1, "2", [3]], {"a": {"b": [1e30]}}]  # fmt: skip


def mutate(data, rng, tokens):
    """Returns `data` after one to four random changes."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at, kind = int(rng.integers(0, len(data) + 1)), rng.integers(0, 6)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            del data[at : at + int(rng.integers(1, 20))]
        elif kind == 2 and tokens:
            data[at:at] = tokens[rng.integers(0, len(tokens))]
        elif kind == 3 and tokens:
            data[at : at + int(rng.integers(0, 12))] = tokens[rng.integers(0, len(tokens))]
        elif kind == 4:
            data[at : at + 4] = rng.bytes(4)
        elif kind == 5:
            other = int(rng.integers(0, len(data) + 1))
            data[at:at] = data[other : other + int(rng.integers(1, 40))]
    return bytes(data)


def mutate_json(content, rng):
    """Returns a copy of what JSON can hold after one to three changes of a value or a key."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.integers(1, 4)):
        places = list(_places(content))
        if not places:
            return _value(rng)
        parent, key = places[rng.integers(0, len(places))]
        kind = rng.integers(0, 5)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[str(VALUES[rng.integers(0, len(VALUES))])] = parent.pop(key)
        elif kind == 2:
            other, at = places[rng.integers(0, len(places))]
            # A copy, or it would hold itself.
            parent[key] = json.loads(json.dumps(other[at])) if at in _keys(other) else None
        else:
            parent[key] = _value(rng)
    return content


def _value(rng):
    return copy.deepcopy(VALUES[rng.integers(0, len(VALUES))])


def _keys(parent):
    return parent if isinstance(parent, dict) else range(len(parent))


def _places(content):
    """Yields (object or array, key or index) of each value below `content`."""
    if isinstance(content, dict | list):
        for key in list(_keys(content)):
            yield content, key
            yield from _places(content[key])


def cases(seed, count, content):
    """Yields `count` files: of bytes as they are changed, of JSON by bytes or by its structure."""
    rng = np.random.default_rng(sum(seed.encode()))
    for _ in range(count):
        if isinstance(content, bytes):
            yield mutate(content, rng, None)
        elif rng.integers(0, 3):
            yield json.dumps(mutate_json(content, rng), ensure_ascii=bool(rng.integers(2))).encode(
                errors="surrogatepass"
            )
        else:
            yield mutate(json.dumps(content).encode(), rng, TOKENS)
