import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ping_llm.addresses import from_bytes
from ping_llm.ingest import sorting
from ping_llm.ingest.sorting import Run, cut_into_ranges, read_range
from ping_llm.measurements import MeasurementTable

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
    return from_bytes(np.frombuffer(b"".join(addresses), np.uint8).reshape(-1, 16))


@given(st.lists(ADDRESSES, min_size=1))
def test_ranks_number_the_distinct_addresses_by_family_then_bytes(addresses):
    values = packed(addresses)
    distinct, ranks = sorting.rank_addresses(values)
    expected = sorted(set(addresses), key=lambda a: (not a.startswith(PREFIX), a))
    assert [address.tobytes() for address in distinct] == expected
    assert (distinct[ranks] == values).all()


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
        table = MeasurementTable(
            time=time.astype(np.int64),
            src=addresses[src],
            dst=addresses[dst],
            family=np.full(len(part), 4, np.int8),
            rtt=rtt.astype(np.float32),
        )
        sampled, sorting.SAMPLE_EVERY = sorting.SAMPLE_EVERY, 2
        runs.append(Run(directory / str(i), [(table, 7)]))
        sorting.SAMPLE_EVERY = sampled
    bounds = cut_into_ranges(runs, range_size)
    found = []
    for starts, stops in itertools.pairwise(bounds):
        rows, index = read_range(runs, starts, stops)
        assert len(index) <= range_size + 2 * len(runs) + 4 or range_size < 4
        assert (index == 7).all()
        for r in range(len(rows)):
            for m in range(rows.offsets[r], rows.offsets[r + 1]):
                src, dst = rows.src[r].tobytes(), rows.dst[m].tobytes()
                found.append((src, int(rows.time[m]), dst, float(rows.rtt[m])))
    expected = [(EDGES[s], t, EDGES[d], r) for s, t, d, r in records]

    def order(record):
        src, time, dst, rtt = record
        family = not src.startswith(PREFIX), src
        return family, time, (not dst.startswith(PREFIX), dst), rtt

    assert found == sorted(expected, key=order)
