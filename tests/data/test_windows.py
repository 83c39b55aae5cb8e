import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ping_llm import addresses, tokenizer
from ping_llm.data import windows
from ping_llm.data.rows import ProbeRows
from ping_llm.data.windows import FULL, NONE, PARTIAL, WindowConfig
from ping_llm.errors import ConfigError
from ping_llm.measurements import NO_TIME, MeasurementTable

ROOM = 10**6  # tokens, where a test does not want windows cut


def keys(n, seed=0):
    index = np.arange(n)
    return windows.make_keys(seed, index // 1000, index % 1000, np.zeros_like(index))


def assert_follows(counts, shares):
    """Checks observed counts against expected shares by chi-squared, at about 4 sigma."""
    counts, shares = np.asarray(counts, float), np.asarray(shares, float)
    expected = counts.sum() * shares / shares.sum()
    assert expected.min() > 5, "too few samples for this test"
    freedom = len(counts) - 1
    statistic = np.sum((counts - expected) ** 2 / expected)
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 8, (counts, expected)


def assert_uniform(outcomes, possible):
    """Checks that `outcomes` (hashables) fall evenly on `possible`."""
    possible = list(possible)
    tally = dict.fromkeys(possible, 0)
    for outcome in outcomes:
        tally[outcome] += 1
    assert_follows(list(tally.values()), np.ones(len(possible)))


def segments(selection):
    """Yields (index, has_time, field_order) of each window, as lists."""
    parts = selection.index, selection.has_time, selection.field_order
    lists = [part.tolist() for part in parts]
    for a, b in itertools.pairwise(selection.segment_offsets.tolist()):
        yield tuple(part[a:b] for part in lists)


def select(n_windows, n, *, length=ROOM, version=4, seed=0):
    size = np.full(n_windows, n)
    return windows.select(keys(n_windows, seed), size, np.full(n_windows, version), length)


def mode_of(has_time):
    return FULL if all(has_time) else PARTIAL if any(has_time) else NONE


# --- which windows ------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_permuted_is_a_bijection_for_any_size_and_key(size, key):
    image = windows.permuted(np.arange(size), size, np.full(size, key, np.uint64))
    assert sorted(image.tolist()) == list(range(size))


def test_every_index_is_as_likely_to_come_first_in_an_epoch():
    epochs = np.arange(6000)
    first = windows.permuted(np.zeros(6000, np.int64), 12, windows.make_keys(3, epochs))
    assert_uniform(first.tolist(), range(12))


@given(st.lists(st.integers(0, 700), min_size=1, max_size=30).filter(any), st.integers(0, 9))
def test_an_epoch_draws_of_every_row_and_k_once_in_an_order_of_its_own(sizes, seed):
    expected = [(r, k) for r, n in enumerate(sizes) for k in range(min(-(-n // 30), 16))]
    order = windows.WindowOrder(np.array(sizes), seed)
    assert order.per_epoch == len(expected)
    drawn = order[np.arange(3 * len(expected))]
    pairs = list(zip(drawn.row.tolist(), drawn.k.tolist(), strict=True))
    for epoch in range(3):
        of_epoch = slice(epoch * len(expected), (epoch + 1) * len(expected))
        assert set(drawn.epoch[of_epoch].tolist()) == {epoch}
        assert sorted(pairs[of_epoch]) == expected
    if len(expected) > 30:
        assert pairs[: len(expected)] != pairs[len(expected) : 2 * len(expected)]


def test_another_seed_gives_another_order_and_other_windows():
    sizes = np.full(50, 300)
    rows = [windows.WindowOrder(sizes, seed)[np.arange(100)].row.tolist() for seed in (0, 1, 0)]
    assert rows[0] == rows[2] != rows[1]
    assert select(50, 300, seed=0).index.tolist() != select(50, 300, seed=1).index.tolist()


# --- size and place of a window -----------------------------------------------------------------


def test_window_sizes_follow_floor_exp_u_ln_n_plus_1():
    n = 40
    count = np.diff(select(60_000, n).segment_offsets)
    shares = [math.log((w + 1) / w) / math.log(n + 1) for w in range(1, n + 1)]
    assert_follows(np.bincount(count, minlength=n + 1)[1:], shares)


@pytest.mark.parametrize("n", [1, 2, 3, 1000])
def test_windows_have_at_least_one_and_at_most_all_measurements(n):
    selection = select(5000, n)
    count = np.diff(selection.segment_offsets)
    assert count.min() == 1
    assert count.max() <= n
    assert selection.index.min() >= 0
    assert selection.index.max() < n


def test_an_uncut_window_is_consecutive_and_its_offset_is_uniform():
    offsets = {w: [] for w in range(1, 7)}
    for index, _, _ in segments(select(20_000, 6)):
        assert sorted(index) == list(range(min(index), min(index) + len(index)))
        offsets[len(index)].append(min(index))
    for w, found in offsets.items():
        if w < 6:
            assert_uniform(found, range(6 - w + 1))


def test_every_measurement_of_a_small_row_is_reached():
    reached = set(select(400, 25).index.tolist())
    assert reached == set(range(25))


# --- the largest count that is sure to fit ------------------------------------------------------


def worst_tokens(m, mode, fraction, coin, version):
    untimed = {FULL: 0, NONE: m}.get(mode)
    if untimed is None:
        untimed = coin if m == 1 else min(max(round(fraction * m), 1), m - 1)
    timed = m - untimed
    source, base = (17, 21) if version == 6 else (5, 9)
    return source + m * base + (9 + 5 * (timed - 1) if timed else 0)


@given(
    st.integers(47, 5000),
    st.sampled_from([FULL, PARTIAL, NONE]),
    st.floats(0.1, 0.9),
    st.integers(0, 1),
    st.sampled_from([4, 6]),
)
def test_the_largest_count_fits_at_worst_and_one_more_does_not(
    length, mode, fraction, coin, version
):
    one = [np.array([value]) for value in (version, mode, fraction, coin)]
    m = int(windows.largest_count(*one, length)[0])
    assert worst_tokens(m, mode, fraction, coin, version) <= length
    assert worst_tokens(m + 1, mode, fraction, coin, version) > length


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("length", [47, 48, 60, 129, 1025])
def test_a_window_of_the_costliest_values_fits_an_empty_sequence(version, length):
    selection = select(4000, 3000, length=length, version=version)
    n = len(selection.index)
    address = addresses.from_bytes(np.full((n, 16), 255, np.uint8))
    # In time order, each step a DELTA4.
    time = np.where(selection.has_time, selection.index * 1000, NO_TIME)
    far_apart = MeasurementTable(
        time=time,
        src=address,
        dst=address,
        family=np.full(n, version, np.int8),
        rtt=np.ones(n, np.float32),
    )
    _, offsets = tokenizer.encode(
        far_apart,
        segment_offsets=selection.segment_offsets,
        field_order=selection.field_order,
    )
    assert np.diff(offsets).max() <= length
    assert np.diff(offsets).max() > length - (14 if version == 4 else 30)


def test_a_sequence_too_short_for_one_measurement_is_an_error_that_says_how_long():
    windows.check_length(47)
    with pytest.raises(ConfigError, match=r"seq_len=45 .* 46 or more"):
        windows.check_length(46)


# --- the subset of a window that is cut ---------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "count"),
    [(4, 1), (5, 1), (5, 2), (9, 2), (13, 3), (4, 3)],
)
def test_a_sample_is_a_uniform_subset_in_uniform_order(size, count):
    n = 60_000
    sample = windows._sample(np.full(n, size), np.full(n, count), keys(n)).reshape(n, count)
    assert_uniform(map(tuple, sample.tolist()), itertools.permutations(range(size), count))


def test_a_sample_of_a_huge_window_is_uniform_and_has_no_measurement_twice():
    n, size, count = 4000, 250_000, 50
    sample = windows._sample(np.full(n, size), np.full(n, count), keys(n)).reshape(n, count)
    assert (np.diff(np.sort(sample, axis=1), axis=1) > 0).all()
    assert_follows(np.bincount(sample.ravel() * 100 // size, minlength=100), np.ones(100))
    first = sample[:, 0] * 20 // size * 20 + sample[:, 1] * 20 // size  # neighbours are independent
    assert_follows(np.bincount(first, minlength=400), np.ones(400))


@pytest.mark.parametrize("n", [12, 40])
def test_a_cut_window_shows_each_of_its_measurements_equally_often(n):
    # 45 tokens hold 2 measurements with full times and 4 without.
    shown = np.zeros(n)
    for index, has_time, _ in segments(select(60_000, n, length=45)):
        if not any(has_time) and len(index) == 4:
            shown[index] += 1
    # A window of w at a uniform offset shows measurement i with a chance that depends on w and i.
    chance = np.zeros(n)
    for w in range(4, n + 1):
        share = math.log((w + 1) / w) * 4 / w
        for offset in range(n - w + 1):
            chance[offset : offset + w] += share / (n - w + 1)
    assert_follows(shown, chance)


# --- timestamp modes ----------------------------------------------------------------------------


def test_times_are_full_partial_and_absent_in_shares_40_30_30():
    modes = [mode_of(t) for index, t, _ in segments(select(20_000, 60)) if len(index) > 1]
    assert_follows(np.bincount(modes, minlength=3), [0.4, 0.3, 0.3])


@pytest.mark.parametrize("untimed", [0.0, 0.8, 1.0])
def test_the_part_of_windows_without_times_is_a_setting(untimed):
    config = WindowConfig(untimed_fraction=untimed)
    size = np.full(20_000, 60)
    found = segments(windows.select(keys(20_000), size, np.full(20_000, 4), 257, config))
    modes = [mode_of(t) for index, t, _ in found if len(index) > 1]
    timed = 1 - untimed
    shares = np.array([timed * 4 / 7, timed * 3 / 7, untimed])
    counts = np.bincount(modes, minlength=3)
    assert not counts[shares == 0].any()
    if shares.min() > 0 or untimed == 0:
        assert_follows(counts[shares > 0], shares[shares > 0])


def test_a_window_law_takes_fractions_only():
    with pytest.raises(ConfigError, match=r"untimed_fraction=1\.5 must be between 0 and 1"):
        WindowConfig(untimed_fraction=1.5)
    with pytest.raises(ConfigError, match="result_last_fraction=-1 must be between 0 and 1"):
        WindowConfig(result_last_fraction=-1)


def test_a_single_measurement_loses_its_time_by_a_coin_where_times_are_partial():
    timed = [all(t) for _, t, _ in segments(select(20_000, 1))]
    assert_follows([sum(timed), len(timed) - sum(timed)], [0.4 + 0.15, 0.3 + 0.15])


def test_the_untimed_count_is_the_rounding_of_a_uniform_fraction_of_the_window():
    m, untimed = 6, []
    for index, has_time, _ in segments(select(60_000, 6)):
        if len(index) == m and mode_of(has_time) == PARTIAL:
            untimed.append(m - sum(has_time))
    shares = np.zeros(m)
    for fraction in np.linspace(0.1, 0.9, 100_001):
        shares[min(max(round(fraction * m), 1), m - 1)] += 1
    assert_follows(np.bincount(untimed, minlength=m)[1:], shares[1:])


def test_full_windows_and_the_timed_part_of_partial_ones_stand_in_time_order():
    for index, has_time, _ in segments(select(3000, 200, length=400)):
        timed = [i for i, t in zip(index, has_time, strict=True) if t]
        assert timed == sorted(timed)
        assert len(set(index)) == len(index)


def test_which_lose_their_time_and_where_they_stand_is_uniform_and_independent():
    outcomes = []
    for index, has_time, _ in segments(select(150_000, 4)):
        if len(index) == 4 and sum(has_time) == 2:
            places = tuple(i for i in range(4) if not has_time[i])
            outcomes.append((places, tuple(index[i] for i in places)))
    places = itertools.combinations(range(4), 2)
    assert_uniform(outcomes, itertools.product(places, itertools.permutations(range(4), 2)))


def test_without_times_the_order_is_uniform():
    orders = [
        tuple(index)
        for index, has_time, _ in segments(select(60_000, 4))
        if len(index) == 4 and not any(has_time)
    ]
    assert_uniform(orders, itertools.permutations(range(4)))


def test_the_fields_of_a_measurement_stand_in_a_uniform_order_whatever_its_neighbours():
    first, pairs = [], []
    for _, _, orders in segments(select(20_000, 3)):
        first.append(tuple(orders[0]))
        if len(orders) > 1:
            pairs.append((orders[0][0], orders[1][0]))
    assert_uniform(first, itertools.permutations(range(4)))
    assert_uniform(pairs, itertools.product(range(4), range(4)))


def test_the_result_stands_last_in_the_stated_part_of_the_windows_and_nothing_else_changes():
    args = keys(20_000), np.full(20_000, 5), np.full(20_000, 4), ROOM
    plain = windows.select(*args)
    some = windows.select(*args, WindowConfig(result_last_fraction=0.25))
    for name in ("segment_offsets", "index", "has_time"):
        np.testing.assert_array_equal(getattr(some, name), getattr(plain, name))
    starts = plain.segment_offsets[:-1]
    asked = (some.field_order == np.arange(4)).all(axis=1)
    whole = np.logical_and.reduceat(asked, starts)
    changed = (some.field_order != plain.field_order).any(axis=1)
    assert not changed[~np.repeat(whole, np.diff(plain.segment_offsets))].any()
    by_chance = np.logical_and.reduceat((plain.field_order == np.arange(4)).all(axis=1), starts)
    count = np.count_nonzero(whole & ~by_chance)
    assert_follows([count, np.count_nonzero(~by_chance) - count], [0.25, 0.75])
    always = windows.select(*args, WindowConfig(result_last_fraction=1.0))
    assert (always.field_order == np.arange(4)).all()


# --- independence -------------------------------------------------------------------------------


def test_a_window_does_not_depend_on_what_is_drawn_with_it():
    sizes = np.random.default_rng(0).integers(1, 5000, 300)
    version = np.where(np.arange(300) % 3 == 0, 6, 4)
    together = list(segments(windows.select(keys(300), sizes, version, 257)))
    for part in (slice(0, 1), slice(17, 60), slice(299, 300)):
        alone = windows.select(keys(300)[part], sizes[part], version[part], 257)
        assert list(segments(alone)) == together[part]


def test_encoded_windows_decode_to_measurements_of_their_row(write_rows):
    rows = ProbeRows(write_rows([1, 500, 40, 3, 2000, 77]), "train")
    drawn = windows.WindowOrder(rows.n_measurements, 5)[np.arange(200)]
    tokens, offsets = windows.encode_windows(rows, drawn, seed=5, length=300)
    for i, (a, b) in enumerate(itertools.pairwise(offsets)):
        decoded, problems = tokenizer.decode(tokens[a:b])
        assert not problems
        assert len(decoded) > 0
        row = drawn.row[i]
        flat, r = rows.batches[rows.batch_index[row]], rows.row_in_batch[row]
        assert np.all(decoded.src == flat.src[r])
        assert np.all(decoded.family == flat.family[r])
        # The fixture numbers the destinations of a row.
        at = flat.offsets[r] + addresses.as_bytes(decoded.dst)[:, 14:].astype(np.int64) @ [256, 1]
        np.testing.assert_array_equal(decoded.dst, flat.dst[at])
        timed = decoded.has_time
        np.testing.assert_array_equal(decoded.time[timed], flat.time[at][timed])
        np.testing.assert_allclose(decoded.rtt, flat.rtt[at], rtol=0.0005, atol=0.001)
