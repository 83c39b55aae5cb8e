"""JSON text over any number of lines, as one record a line.

What an API answers is one array, compact or indented; what it streams is an array a message. Here
each becomes the lines of NDJSON, a block at a time, so that all that follows reads one form.
"""

import re
from collections.abc import Iterable, Iterator

import numpy as np

from ping_llm.errors import DataError

LONGEST_RECORD = 16 << 20
_QUOTE = 1
_KINDS = bytes(dict(zip(b'"[{]},', (1, 2, 2, 3, 3, 4), strict=True)).get(i, 0) for i in range(256))
_STEPS = np.array([0, 0, 1, -1, 0], np.int8)  # what each kind adds to the depth
_SPACES = bytes.maketrans(b"\r\n", b"  ")
_MESSAGE = re.compile(rb'\[\s*"')  # an array that is a record: ["atlas_result", {...}]
_ARRAY = re.compile(rb"\[\s*[^\s\"]")


def is_json_text(head: bytes) -> bool:
    """Returns whether a file that begins so is JSON text rather than one record a line."""
    first, _, more = head.lstrip().partition(b"\n")
    first = first.strip()
    if first.startswith(b"["):
        # A message to a line is NDJSON already.
        return not (_MESSAGE.match(head.lstrip()) and first.endswith(b"]"))
    return first == b"{" and bool(more.strip())


def record_lines(blocks: Iterable[bytes], path: object) -> Iterator[bytes]:
    """Yields blocks of lines, one a record of JSON text: each element of arrays, each other value.

    An array that begins with a string is a record as a whole. What comes after the last whole
    record is the last line, and so is the `[` of an array that does not end.

    Args:
        blocks: The text, cut anywhere.
        path: What errors call it.

    Raises:
        DataError: A record is longer than any can be.
    """
    rest, in_array = b"", False
    for block in blocks:
        lines, rest, in_array = _cut(rest + block.translate(_SPACES), in_array)
        if lines:
            yield b"\n".join(lines) + b"\n"
        if len(rest) > LONGEST_RECORD:
            raise DataError(f"{path} holds a record of over {LONGEST_RECORD:,} bytes")
    left = [rest] if rest.strip() else []
    if in_array:
        left.append(b"[")
    if left:
        yield b"\n".join(left) + b"\n"


# Example: `[{"a": "x]"}, {"b": [1]}` and then ` ]\n[{"c"` come in two blocks. The brackets, braces
# and commas outside strings are `[ { } , { [ ] }`, after which one is 1 2 1 1 2 3 2 1 deep. The
# first `[` and the comma at depth 1 end records (the one before the `[` is blank), so `{"a": "x]"}`
# is the line that comes out, and ` {"b": [1]}` is left over, in an array. With the second block its
# `]` ends this record too; at the next `[` a new array begins, of which `{"c"` is left over.
def _cut(data: bytes, in_array: bool) -> tuple[list[bytes], bytes, bool]:
    """Returns (the records that end in `data`, what is left over, whether that is in an array).

    Args:
        data: JSON text, from where a record begins.
        in_array: Whether that is in an array.
    """
    lines: list[bytes] = []
    while True:
        position, char, depth = _structure(data, int(in_array))
        stray = next(iter(position[depth < 0].tolist()), None)  # closes nothing
        if stray is not None:
            position, char, depth = (x[: np.argmax(depth < 0)] for x in (position, char, depth))
        before = np.append(int(in_array), depth)[:-1]
        opens, ends = (before == 0) & (depth == 1), (before == 1) & (depth == 0)
        # Whether the value at the top that each belongs to is an array; in_array: the first one.
        kinds = [in_array, *(bool(_ARRAY.match(data, at)) for at in position[opens].tolist())]
        is_array = np.array(kinds)[np.cumsum(opens)]
        # A separator is no part of a record; a brace or bracket that ends one is.
        separates = is_array & (opens | ends) & (char != ord("}"))
        separates |= (char == ord(",")) & (depth == is_array)
        cuts = separates | ends
        stops, starts = (position + ~separates)[cuts].tolist(), (position[cuts] + 1).tolist()
        if cuts.any():
            in_array = bool(depth[cuts][-1])
        if stray is not None:  # belongs to what is before it
            stops, starts, in_array = [*stops, stray + 1], [*starts, stray + 1], False
        pieces = (data[a:b] for a, b in zip([0, *starts[:-1]], stops, strict=bool(starts)))
        lines += [piece for piece in pieces if piece and not piece.isspace()]
        data = data[starts[-1] :] if starts else data
        if stray is None:
            return lines, data, in_array


def _structure(data: bytes, depth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns position, character and depth behind each bracket, brace and comma not in a string.

    Args:
        data: JSON text, from outside a string.
        depth: How many brackets and braces are open at its start.
    """
    text, kinds = (np.frombuffer(d, np.uint8) for d in (data, data.translate(_KINDS)))
    position = np.flatnonzero(kinds.view(bool))
    kinds = kinds[position]
    quotes = kinds == _QUOTE
    if (slashes := np.flatnonzero(text == ord("\\"))).size:
        quotes[quotes] = ~_escaped(position[quotes], slashes)
    in_strings = np.cumsum(quotes, dtype=np.uint8) % 2  # 256 is even, so that it may overflow
    outside = np.flatnonzero((in_strings == 0) & (kinds != _QUOTE))
    position, steps = position[outside], _STEPS[kinds[outside]]
    return position, text[position], depth + np.cumsum(steps, dtype=np.int64)


def _escaped(quotes: np.ndarray, slashes: np.ndarray) -> np.ndarray:
    """Returns whether each of `quotes`, positions in order, follows an odd run of backslashes."""
    begins = np.append(True, np.diff(slashes) != 1)  # a run
    first = slashes[np.flatnonzero(begins)[np.cumsum(begins) - 1]]
    at = np.searchsorted(slashes[:-1], quotes - 1)
    return (slashes[at] == quotes - 1) & ((quotes - first[at]) % 2 == 1)
