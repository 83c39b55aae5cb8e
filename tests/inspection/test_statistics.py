import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ping_llm import addresses
from ping_llm.inspection.statistics import (
    RTT_RESOLUTION,
    TIME_BINS,
    HashTable,
    Statistics,
    TimeHistogram,
    rtt_quantile,
)
from ping_llm.measurements import MeasurementTable


def host(numbers, family):
    """Returns address number `numbers` [n] of each family [n]."""
    pairs = zip(np.asarray(numbers).tolist(), family, strict=True)
    head = bytes([0xFD]) + bytes(14)
    return addresses.from_packed(bytes([0, 0, 0, i] if f == 4 else [*head, i]) for i, f in pairs)


def random_table(rng, n, *, hosts=9, version=None):
    """Returns n random measurements among a few hosts, each of one family."""
    family = rng.choice([4, 6], n) if version is None else np.full(n, version)
    time = rng.integers(1_600_000_000, 1_700_000_000, n)
    src, dst = (host(rng.integers(0, hosts, n), family) for _ in range(2))
    return MeasurementTable(
        time=time,
        src=src,
        dst=dst,
        family=family.astype(np.int8),
        rtt=np.where(rng.random(n) < 0.1, -1, rng.gamma(2, 30, n)).astype(np.float32),
    )


@given(
    parts=st.lists(
        hnp.arrays(np.uint64, st.integers(0, 40), elements=st.integers(0, 30)), max_size=6
    )
)
@settings(deadline=None)
def test_a_table_that_is_not_full_counts_like_a_counter(parts):
    table = HashTable(2, capacity=100)
    for part in parts:
        table.add(part, np.stack([np.ones(len(part)), part.astype(float)], axis=1))
    table.merge()
    expected = Counter(int(key) for part in parts for key in part)
    assert table.fraction == 1.0
    assert table.distinct() == len(expected)
    assert table.keys.tolist() == sorted(expected)
    assert table.sums[:, 0].tolist() == [expected[key] for key in sorted(expected)]
    assert table.sums[:, 1].tolist() == [key * expected[key] for key in sorted(expected)]


@pytest.mark.parametrize("labels", [False, True])
def test_a_full_table_holds_a_fair_sample_with_exact_sums_and_the_largest(labels):
    rng = np.random.default_rng(0)
    keys = np.unique(rng.integers(0, 2**64, 200_000, dtype=np.uint64))
    repeats = rng.integers(1, 4, len(keys))
    repeats[7] = 50_000
    stream = rng.permutation(np.repeat(keys, repeats))
    table = HashTable(1, capacity=10_000, label_bytes=16 if labels else 0)
    for part in np.array_split(stream, 20):
        named = part.view(np.uint8).reshape(-1, 8).repeat(2, axis=1) if labels else None
        table.add(part, np.ones((len(part), 1)), named)
    table.merge()
    assert table.fraction < 0.1
    sampled = table.sampled()
    assert np.count_nonzero(sampled) <= 10_000
    assert table.distinct() == pytest.approx(len(keys), rel=0.05)
    true = dict(zip(keys.tolist(), repeats.tolist(), strict=True))
    held = zip(table.keys[sampled].tolist(), table.sums[sampled, 0].tolist(), strict=True)
    assert all(true[key] == count for key, count in held)
    if labels:
        top = table.top(1)
        assert table.keys[top[0]] == keys[7]
        assert table.labels[top[0]].tolist() == np.repeat(keys[7:8].view(np.uint8), 2).tolist()


@given(
    times=st.lists(
        hnp.arrays(np.int64, st.integers(1, 30), elements=st.integers(-(2**40), 2**40)),
        min_size=1,
        max_size=5,
    )
)
@settings(deadline=None)
def test_a_time_histogram_counts_each_time_in_its_bin(times):
    histogram = TimeHistogram(2)
    for part in times:
        histogram.add(part, part % 2)
    assert len(histogram.counts) <= TIME_BINS
    every = np.concatenate(times)
    expected = np.zeros_like(histogram.counts)
    np.add.at(expected, (every // histogram.width - histogram.first, every % 2), 1)
    np.testing.assert_array_equal(histogram.counts, expected)


def test_a_time_histogram_takes_any_64_bit_time():
    histogram = TimeHistogram(1)
    histogram.add(np.array([-(2**63), 0, 2**63 - 1]), np.zeros(3, np.int64))
    assert histogram.counts.sum() == 3
    assert len(histogram.counts) <= TIME_BINS


@given(
    rtt=hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(2**-13, 2**30, width=32)),
    q=st.floats(0, 1),
)
@settings(deadline=None)
def test_rtt_quantiles_are_true_to_the_stated_resolution(rtt, q):
    n = len(rtt)
    stats = Statistics()
    measured = random_table(np.random.default_rng(0), n, version=4)
    stats.add(dataclasses.replace(measured, rtt=rtt))
    expected = np.quantile(rtt.astype(float), q, method="inverted_cdf")
    found = rtt_quantile(stats.rtt[0], q)
    assert found == pytest.approx(expected, rel=RTT_RESOLUTION)
    assert rtt_quantile(stats.rtt[1], q) is None


@given(cuts=st.lists(st.integers(0, 500), max_size=6))
@settings(max_examples=20, deadline=None)
def test_statistics_do_not_depend_on_where_tables_are_cut(cuts):
    measured = random_table(np.random.default_rng(1), 500)
    whole, parts = Statistics(), Statistics()
    whole.add(measured)
    bounds = [0, *sorted(cuts), 500]
    for start, stop in itertools.pairwise(bounds):
        parts.add(measured.slice(start, stop))
    for stats in (whole, parts):
        stats.finish()
    for name in ("measurements", "failed", "by_family", "rtt"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    for name in ("sources", "destinations", "pairs", "records"):
        a, b = getattr(whole, name), getattr(parts, name)
        np.testing.assert_array_equal(a.keys, b.keys)
        np.testing.assert_allclose(a.sums, b.sums)
    assert whole.time_range == parts.time_range
    np.testing.assert_array_equal(whole.time.counts, parts.time.counts)


def test_sums_by_source_destination_pair_and_record_equal_counters():
    rng = np.random.default_rng(2)
    measured = random_table(rng, 3000, hosts=5)
    order = rng.integers(0, 3000, 4000)  # some records several times
    measured = measured.take(order)
    stats = Statistics()
    stats.add(measured)
    stats.finish()
    src, dst, rtt = measured.src.tolist(), measured.dst.tolist(), measured.rtt
    assert stats.sources.distinct() == len(set(src))
    assert stats.destinations.distinct() == len(set(dst))
    assert stats.pairs.distinct() == len({frozenset(pair) for pair in zip(src, dst, strict=True)})
    records = Counter(zip(measured.time.tolist(), src, dst, rtt.tolist(), strict=True))
    assert stats.records.distinct() == len(records)
    assert stats.problems["self"] == sum(a == b for a, b in zip(src, dst, strict=True))
    for label, sums in zip(stats.sources.labels, stats.sources.sums, strict=True):
        mine = measured.src == addresses.from_bytes(label[None])
        good = mine & (rtt >= 0)
        expected = [mine.sum(), (mine & (rtt < 0)).sum(), rtt[good].astype(float).sum()]
        assert sums[:3].tolist() == pytest.approx(expected)


def test_steps_back_and_leaps_count_within_a_source_only():
    def add(stats, source, times):
        table = random_table(np.random.default_rng(0), len(times), version=4)
        stats.add(
            dataclasses.replace(table, src=host(source, table.family), time=np.asarray(times))
        )

    year = 366 * 86_400
    cases = [
        ([([1, 1, 1], [5, 5, 6])], 0, 0),
        ([([1, 2, 1], [9, 5, 9])], 0, 0),
        ([([1, 2, 1], [9, 5, 8])], 1, 0),
        ([([1, 1], [5, 6]), ([1, 1], [4, 5])], 1, 0),
        ([([1, 1], [5, 6]), ([2, 1], [4, 7])], 0, 0),
        ([([1, 1, 1], [5, 6 + year, 7 + year])], 0, 1),
        ([([1, 1], [2**62, -(2**62)])], 1, 1),
    ]
    for tables, backwards, jumps in cases:
        stats = Statistics()
        for source, times in tables:
            add(stats, source, times)
        assert (stats.problems["backwards"], stats.problems["jumps"]) == (backwards, jumps), tables
