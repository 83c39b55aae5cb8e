import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ping_llm.ingest import sorting
from ping_llm.ingest.records import Chunk
from ping_llm.ingest.sorting import Run, cut_into_ranges, order_words, read_range

PREFIX = bytes(10) + b"\xff\xff"
EDGES = [
    PREFIX + bytes(4),
    PREFIX + b"\xff" * 4,
    bytes(16),
    bytes(15) + b"\1",
    bytes(10) + b"\xff\xfe" + b"\xff" * 4,
    bytes(9) + b"\1" + bytes(6),
    bytes(7) + b"\1" + bytes(8),
    b"\xff" * 16,
]
ADDRESSES = st.sampled_from(EDGES) | st.binary(min_size=16, max_size=16)


def packed(addresses):
    return np.frombuffer(b"".join(addresses), np.uint8).reshape(-1, 16)


@given(st.lists(ADDRESSES, min_size=1))
def test_order_words_order_by_family_then_bytes(addresses):
    high, low = order_words(packed(addresses))
    found = sorted(range(len(addresses)), key=lambda i: (high[i], low[i]))
    expected = sorted(addresses, key=lambda a: (not a.startswith(PREFIX), a))
    assert [addresses[i] for i in found] == expected


RECORDS = st.lists(
    st.tuples(
        st.integers(0, 7),  # source
        st.sampled_from([0, 1, 2, 2**32 - 1]),
        st.integers(0, 3),  # destination
        st.sampled_from([-1.0, 0.0, 0.5, 3.0]),
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(records=RECORDS, run_size=st.integers(1, 60), range_size=st.integers(1, 70), data=st.data())
def test_the_order_is_total_and_does_not_depend_on_runs_or_ranges(
    records, run_size, range_size, data, tmp_path_factory
):
    directory = tmp_path_factory.mktemp("runs")
    shuffled = data.draw(st.permutations(records))
    addresses = packed(EDGES)
    runs = []
    for i in range(0, len(records), run_size):
        part = shuffled[i : i + run_size]
        src, time, dst, rtt = (np.array(column) for column in zip(*part, strict=True))
        chunk = Chunk(
            event_time=time.astype(np.int64),
            src_values=addresses,
            src_codes=src.astype(np.int32),
            dst_values=addresses[:4],
            dst_codes=dst.astype(np.int32),
            ip_version=np.full(len(part), 4, np.int8),
            rtt=rtt.astype(np.float32),
        )
        sampled, sorting.SAMPLE_EVERY = sorting.SAMPLE_EVERY, 2
        runs.append(Run(directory / str(i), [(chunk, 7)]))
        sorting.SAMPLE_EVERY = sampled
    bounds = cut_into_ranges(runs, range_size)
    found = []
    for starts, stops in itertools.pairwise(bounds):
        part = read_range(runs, starts, stops)
        if part is None:
            continue
        assert len(part) <= range_size + 2 * len(runs) + 4 or range_size < 4
        assert (part.input_index == 7).all()
        for s in range(len(part.src_addr)):
            for m in range(part.offsets[s], part.offsets[s + 1]):
                src, dst = part.src_addr[s].tobytes(), part.dst_addr[m].tobytes()
                found.append((src, int(part.event_time[m]), dst, float(part.rtt[m])))
    expected = [(EDGES[s], t, EDGES[d], r) for s, t, d, r in records]

    def order(record):
        src, time, dst, rtt = record
        family = not src.startswith(PREFIX), src
        return family, time, (not dst.startswith(PREFIX), dst), rtt

    assert found == sorted(expected, key=order)
