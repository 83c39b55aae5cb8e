"""What may come next in the token language, for many sequences side by side."""

import numpy as np

from ping_llm import tokenizer

_SOURCE, _DESTINATION, _TIME, _RESULT = 1, 2, 4, 8
_NEEDED = _DESTINATION | _RESULT
# What each head gives, and the family it fixes.
_FIELD = np.zeros(tokenizer.VOCAB_SIZE, np.uint8)
_FIELD[[tokenizer.SRC_IPV4, tokenizer.SRC_IPV6]] = _SOURCE
_FIELD[[tokenizer.DST_IPV4, tokenizer.DST_IPV6]] = _DESTINATION
TIMES = [tokenizer.TIMESTAMP_ABS, tokenizer.TIMESTAMP_DELTA1, tokenizer.TIMESTAMP_DELTA4]
_FIELD[TIMES] = _TIME
_FIELD[[tokenizer.RTT_START, tokenizer.FAILED]] = _RESULT
_FAMILY = np.zeros(tokenizer.VOCAB_SIZE, np.uint8)  # 1 is IPv4, 2 is IPv6
_FAMILY[[tokenizer.SRC_IPV4, tokenizer.DST_IPV4]] = 1
_FAMILY[[tokenizer.SRC_IPV6, tokenizer.DST_IPV6]] = 2
_PAYLOAD = np.zeros(tokenizer.VOCAB_SIZE, np.uint8)
_PAYLOAD[: tokenizer.BYTE_0] = tokenizer.PAYLOAD_BYTES
_ZERO_BYTES_OF_ABS = 4  # of its 8: times are of 1970 to 2106


def _heads_table() -> np.ndarray:
    """Returns which ids may follow whole fields.

    By (fields so far, their family, whether a time was before, the family of the last source).
    """
    table = np.zeros((16, 3, 2, 3, tokenizer.VOCAB_SIZE), bool)
    for used, family, timed, of_source in np.ndindex(table.shape[:-1]):
        allowed = table[used, family, timed, of_source]
        for head in np.flatnonzero(_FIELD):
            fits = _FAMILY[head] in (0, family) or family == 0
            after_time = timed or head not in TIMES[1:]
            allowed[head] = not used & _FIELD[head] and fits and after_time
        # Without a source it is of the last one, if that is of its family.
        sourced = used & _SOURCE or of_source == family
        allowed[tokenizer.MEASUREMENT_START] = used & _NEEDED == _NEEDED and sourced
    return table


_HEADS = _heads_table()
_BYTES = np.arange(tokenizer.VOCAB_SIZE) >= tokenizer.BYTE_0
_ZERO = np.arange(tokenizer.VOCAB_SIZE) == tokenizer.BYTE_0
_START = np.arange(tokenizer.VOCAB_SIZE) == tokenizer.MEASUREMENT_START


class Grammar:
    """How far each of some sequences is in the token language, and what may come next.

    A sequence of allowed ids, cut after a whole measurement, decodes without a problem.
    """

    def __init__(self, timed: np.ndarray, source_family: np.ndarray):
        """Starts at the beginning of a measurement.

        Args:
            timed: Whether a time was known before, in each sequence [n], bool.
            source_family: Of the last source before, 1 for IPv4, 2 for IPv6, 0 for none [n], uint8.
        """
        n = len(timed)
        self._timed, self._source_family = timed.copy(), source_family.copy()
        self._started = np.zeros(n, bool)
        self._used, self._family = np.zeros(n, np.uint8), np.zeros(n, np.uint8)
        self._head, self._left = np.zeros(n, np.int64), np.zeros(n, np.uint8)

    def allowed(self) -> np.ndarray:
        """Returns which ids may come next [n, 267], bool."""
        timed = self._timed.astype(np.int64)
        ids = _HEADS[self._used, self._family, timed, self._source_family]
        ids[~self._started] = _START
        ids[self._left > 0] = _BYTES
        whole = _PAYLOAD[self._head]
        first = (self._head == tokenizer.TIMESTAMP_ABS) & (whole - self._left < _ZERO_BYTES_OF_ABS)
        ids[(self._left > 0) & first] = _ZERO
        return ids

    def advance(self, ids: np.ndarray) -> None:
        """Takes one allowed id for each sequence [n]."""
        payload = self._left > 0
        self._left = np.where(payload, self._left - 1, _PAYLOAD[ids])
        starts = ids == tokenizer.MEASUREMENT_START
        self._started |= starts
        head = ~payload & ~starts
        self._used = ~starts * (self._used | head * _FIELD[ids])
        named = head & (_FAMILY[ids] > 0)
        self._family = ~starts * np.where(named, _FAMILY[ids], self._family)
        source = head & (_FIELD[ids] == _SOURCE)
        self._source_family = np.where(source, _FAMILY[ids], self._source_family)
        self._head = np.where(head, ids, self._head)
        self._timed |= head & (_FIELD[ids] == _TIME)
