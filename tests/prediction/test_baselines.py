import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ping_llm.addresses import from_packed
from ping_llm.errors import DataError
from ping_llm.estimators import neighbours, online, wmedian
from ping_llm.estimators.failures import logistic, logistic_by_day
from ping_llm.estimators.pairs import Nodes, Training, grouped_median, grouped_weighted_median
from ping_llm.measurements import NO_TIME, MeasurementTable
from ping_llm.prediction import baselines

N = 60


def measurements(src, dst, rtt, time=None, network=0):
    """Node i is 10.<network>.i.1: a /24 each, unless `i` holds three bytes."""
    return MeasurementTable(
        time=np.arange(len(src)) if time is None else np.asarray(time),
        src=from_packed(bytes([10, network, int(i), 1]) for i in src),
        dst=from_packed(bytes([10, network, int(i), 1]) for i in dst),
        family=np.full(len(src), 4, np.int8),
        rtt=np.asarray(rtt, np.float32),
    )


def split_of(matrix, seed=0):
    """Returns (training, held-out) measurements of the pairs of a symmetric matrix."""
    a, b = np.triu_indices(len(matrix), 1)
    flip = np.random.default_rng(seed).random(len(a)) < 0.5
    a, b = np.where(flip, b, a), np.where(flip, a, b)
    everything = measurements(a, b, matrix[a, b])
    held = np.random.default_rng(seed + 1).random(len(a)) < 0.1
    return everything.take(~held), everything.take(held)


def relative_error(name, matrix):
    train, test = split_of(matrix)
    predicted = baselines.predict(name, test, Training.of(train))
    return np.median(np.abs(predicted - test.rtt) / test.rtt)


@pytest.mark.parametrize(
    "name", ["prefix", "additive", "src_median", "biased_mf", "dmfsgd", "neighbours", "wmedian"]
)
def test_static_methods_do_not_change_when_each_measurement_is_seen_from_both_ends(name):
    rng = np.random.default_rng(0)
    src, dst = rng.integers(0, 12, (2, 300))
    src, dst = src[src != dst], dst[src != dst]
    train = measurements(src, dst, rng.gamma(3, 20, len(src)))
    mirrored = dataclasses.replace(train, src=train.dst, dst=train.src)
    queries = measurements(*rng.integers(0, 14, (2, 50)), np.zeros(50))
    one, both = (
        baselines.predict(name, queries, Training.of(table))
        for table in (train, MeasurementTable.concat([train, mirrored]))
    )
    np.testing.assert_array_equal(one, both)


@pytest.fixture(scope="module")
def plane():
    """Distances of points in a plane, with a height each."""
    rng = np.random.default_rng(0)
    points, height = rng.uniform(0, 200, (N, 2)), rng.uniform(1, 20, N)
    apart = np.linalg.norm(points[:, None] - points, axis=2)
    return apart + height[:, None] + height


@pytest.fixture(scope="module")
def low_rank():
    rng = np.random.default_rng(0)
    factors = rng.uniform(0.5, 2, (N, 3))
    return 20 * factors @ factors.T


def test_additive_recovers_a_sum_in_the_logarithm():
    part = np.random.default_rng(0).normal(0, 0.5, N)
    assert relative_error("additive", np.exp(3 + part[:, None] + part)) < 1e-3


def test_vivaldi_recovers_distances_with_heights(plane):
    assert relative_error("vivaldi", plane) < 0.03


def test_coordinates_recover_distances_with_heights():
    # In space; and where each node has some 8 of the 59 pairs.
    rng = np.random.default_rng(0)
    points, height = rng.uniform(0, 200, (N, 3)), rng.uniform(1, 20, N)
    matrix = np.linalg.norm(points[:, None] - points, axis=2) + height[:, None] + height
    assert relative_error("coordinates", matrix) < 0.02
    train, test = split_of(matrix)
    train = train.take(np.random.default_rng(1).random(len(train)) < 0.15)
    assert len(Training.of(train).nodes) == N
    predicted = baselines.predict("coordinates", test, Training.of(train))
    assert np.median(np.abs(predicted / test.rtt - 1)) < 0.15


class Renumbered(Nodes):
    """The same addresses with other numbers."""

    def __init__(self, nodes: Nodes, seed: int):
        self.number = np.random.default_rng(seed).permutation(len(nodes))
        self.addresses = nodes.addresses[np.argsort(self.number)]
        self.nodes = nodes

    def lookup(self, addresses):
        number = self.nodes.lookup(addresses)
        return np.where(number >= 0, self.number[number], -1)


@pytest.mark.parametrize("name", ["coordinates", "wmedian"])
def test_estimates_do_not_depend_on_how_nodes_are_numbered(name, plane):
    train, test = split_of(plane)
    table = Training.of(train.take(np.arange(len(train)) % 3 == 0))
    nodes = Renumbered(table.nodes, seed=3)
    numbers = {end: nodes.lookup(getattr(table.measurements, end)) for end in ("src", "dst")}
    assert not np.array_equal(numbers["src"], table.src)
    other = dataclasses.replace(table, nodes=nodes, **numbers)
    one, two = (baselines.predict(name, test, each) for each in (table, other))
    np.testing.assert_allclose(one, two, rtol=1e-6)


@pytest.mark.parametrize("name", ["coordinates", "wmedian", "neighbours"])
def test_tenfold_rtts_have_tenfold_estimates(name, plane):
    one, ten = (
        baselines.predict(name, test, Training.of(train))
        for train, test in (split_of(plane), split_of(10 * plane))
    )
    np.testing.assert_allclose(ten, 10 * one, rtol=1e-3)


def test_matrix_factorisations_recover_a_low_rank(low_rank):
    assert relative_error("dmfsgd", low_rank) < 0.05
    assert relative_error("biased_mf", low_rank) < 0.02


def test_neighbours_find_the_hosts_of_one_site(plane):
    site = np.repeat(np.arange(N // 2), 2)  # two hosts each, which measure alike
    matrix = plane[np.ix_(site, site)]
    noise = np.exp(np.random.default_rng(2).normal(0, 0.005, matrix.shape))
    assert relative_error("neighbours", matrix * np.sqrt(noise * noise.T)) < 0.01
    # Alone, a host's neighbours are those around it.
    assert relative_error("neighbours", plane) < 0.15


def test_the_weighted_median_of_like_hosts_is_what_most_of_them_measure(plane):
    site = np.repeat(np.arange(N // 6), 6)  # six hosts each, which measure exactly alike
    matrix = plane[np.ix_(site, site)]
    train, test = split_of(matrix)
    apart = test.take(site[as_numbers(test.src)] != site[as_numbers(test.dst)])
    predicted = baselines.predict("wmedian", apart, Training.of(train))
    np.testing.assert_allclose(predicted, apart.rtt, rtol=1e-6)
    # One in twenty measurements is ten times too high: the median does not mind, the mean does.
    rtt = np.where(np.random.default_rng(3).random(len(train)) < 0.05, 10, 1) * train.rtt
    spoilt = Training.of(dataclasses.replace(train, rtt=rtt.astype(np.float32)))
    errors = {
        name: np.abs(np.log(baselines.predict(name, apart, spoilt) / apart.rtt))
        for name in ("wmedian", "neighbours")
    }
    assert np.mean(errors["wmedian"] < 0.01) > 0.9
    assert np.mean(errors["neighbours"] < 0.01) < 0.7


def as_numbers(addresses):
    return np.ascontiguousarray(addresses).view(np.uint8).reshape(-1, 16)[:, 14]


@pytest.mark.parametrize("measured", [1, 3])
def test_a_new_host_is_like_those_that_measured_its_few_partners_as_it_did(plane, measured):
    site = np.repeat(np.arange(N // 6), 6)  # six hosts each, which measure exactly alike
    matrix = plane[np.ix_(site, site)]
    a, b = np.triu_indices(N, 1)
    rest = measurements(a[a > 0], b[a > 0], matrix[a, b][a > 0])
    others = np.random.default_rng(0).permutation(np.arange(6, N))
    given, asked = (
        measurements(np.zeros(len(to)), to, matrix[0, to])
        for to in (others[:measured], others[measured:])
    )
    known = Training.of(MeasurementTable.concat([rest, given]))
    errors = {
        name: np.median(np.abs(baselines.predict(name, asked, known) / asked.rtt - 1))
        for name in ("wmedian", "neighbours", "coordinates")
    }
    assert errors["wmedian"] < 0.02 < errors["coordinates"]
    assert errors["wmedian"] <= errors["neighbours"]


def test_a_measured_pair_has_its_own_median_among_those_of_like_hosts(plane):
    train, _ = split_of(plane)
    some = train.take(np.arange(50))
    predicted = baselines.predict("wmedian", some, Training.of(train))
    np.testing.assert_allclose(predicted, some.rtt, rtol=1e-6)


def test_an_address_that_was_not_measured_is_like_those_of_its_network():
    # Two networks of four hosts each, 5 ms and 80 ms from all of eight others.
    hosts = [bytes([10, network, 1, host]) for network in (1, 2) for host in range(4)]
    others = [bytes([10, 9, host, 1]) for host in range(8)]
    pairs = [(a, b) for a in hosts for b in others]
    rtt = [5 if a[1] == 1 else 80 for a, _ in pairs]
    table = dataclasses.replace(
        measurements(np.zeros(len(pairs)), np.zeros(len(pairs)), rtt),
        src=from_packed(a for a, _ in pairs),
        dst=from_packed(b for _, b in pairs),
    )
    new = dataclasses.replace(
        measurements([0, 0], [0, 0], [1, 1]),
        src=from_packed([bytes([10, 1, 1, 99]), bytes([10, 2, 1, 99])]),
        dst=from_packed(others[:2]),
    )
    predicted = baselines.predict("wmedian", new, Training.of(table))
    np.testing.assert_allclose(predicted, [5, 80], rtol=1e-6)
    both_new = dataclasses.replace(new, dst=new.src)
    assert np.isnan(wmedian.fit_wmedian(Training.of(table))(both_new)).all()


def test_blocks_of_questions_do_not_change_the_weighted_median(monkeypatch, plane):
    train, test = split_of(plane)
    table = Training.of(train)
    one = baselines.predict("wmedian", test, table)
    monkeypatch.setattr(wmedian, "BLOCK", 300)
    monkeypatch.setattr(wmedian, "ROWS", 77)
    np.testing.assert_array_equal(baselines.predict("wmedian", test, table), one)
    monkeypatch.setattr(wmedian, "STAND_INS", 20)
    fewer = baselines.predict("wmedian", test, table)
    assert np.any(fewer != one)
    assert np.median(np.abs(fewer / test.rtt - 1)) < 0.3


def test_neighbours_have_no_answer_where_none_of_those_near_was_measured(monkeypatch):
    monkeypatch.setattr(neighbours, "NEIGHBOURS", 2)  # itself and one more
    # 0 and 1 measure 2 to 5 alike, 6 and 7 measure 8 and 9 alike; nothing joins the two groups.
    one, other = [0] * 4 + [1] * 4 + [6] * 2 + [7] * 2, [2, 3, 4, 5] * 2 + [8, 9] * 2
    rtt = [10, 30, 50, 70] * 2 + [200, 400] * 2
    train = Training.of(measurements(one, other, rtt))
    predict = neighbours.fit_neighbours(train)
    np.testing.assert_allclose(predict(measurements([0], [2], [1])), 10)  # measured
    assert np.isnan(predict(measurements([0], [6], [1])))
    held_out = Training.of(measurements(one[1:], other[1:], rtt[1:]))
    predict = neighbours.fit_neighbours(held_out)
    np.testing.assert_allclose(predict(measurements([0], [2], [1])), 10)  # as 1 did


def test_neighbours_of_many_nodes_are_of_those_that_measured_most(monkeypatch, plane):
    monkeypatch.setattr(neighbours, "COMPARISONS", 1)
    monkeypatch.setattr(neighbours, "NEIGHBOURS", N // 2)
    assert relative_error("neighbours", plane) < 0.3
    train, _ = split_of(plane)
    table = Training.of(train)
    one, other, rtt = table.directed
    near, distance = neighbours._neighbours(one, other, np.log(rtt), N)
    most = np.argsort(-np.bincount(one), kind="stable")[: N // 2]
    assert near[:, 0].tolist() == list(range(N))
    assert set(near[:, 1:].ravel()) <= set(most)
    assert all(len(set(row)) == len(row) for row in near)
    assert np.all(np.diff(distance, axis=1) >= 0)


def test_biased_mf_recovers_a_low_rank_of_the_logarithm():
    rng = np.random.default_rng(0)
    factors, bias = rng.normal(0, 0.4, (N, 3)), rng.normal(0, 0.3, N)
    assert (
        relative_error("biased_mf", np.exp(3 + bias[:, None] + bias + factors @ factors.T)) < 0.05
    )


def test_medians_are_of_pairs_and_either_end():
    train = Training.of(measurements([0, 0, 1, 2], [1, 1, 0, 0], [10, 20, 30, 7]))
    query = measurements([0, 1, 2, 5], [9, 9, 9, 2], [1, 1, 1, 1])
    # Pairs: 0-1 has the median 20, 0-2 has 7.
    np.testing.assert_allclose(baselines.predict("src_median", query, train)[:3], [13.5, 20, 7])
    np.testing.assert_allclose(baselines.predict("global_median", query, train), 13.5)
    # An unknown source: the destination's median stands in.
    assert baselines.predict("vivaldi", query, train)[3] == 7


def test_prefix_backs_off_from_the_pair_to_its_networks():
    train = measurements([1, 1, 2], [3, 3, 3], [10, 10, 50])

    def predict(queries):
        return baselines.predict("prefix", queries, Training.of(train))

    same_24 = dataclasses.replace(
        measurements([1], [3], [1]), dst=from_packed([bytes([10, 0, 3, 77])])
    )
    assert predict(measurements([3], [1], [1]))[0] == 10  # the other direction
    assert predict(same_24)[0] == 10
    assert predict(measurements([8], [9], [1]))[0] == 10  # same /16s: the median of all three
    assert predict(measurements([8], [9], [1], network=5))[0] == 30  # nothing: the median of pairs


@pytest.mark.parametrize("name", baselines.STATIC)
def test_every_method_answers_for_anything_it_is_asked(name):
    train = Training.of(measurements([0, 1], [1, 2], [10, 20]))
    queries = measurements([0, 0, 50, 50, 1], [1, 50, 1, 51, 1], [1] * 5)
    predicted = baselines.predict(name, queries, train)
    assert np.isfinite(predicted).all()
    assert (predicted > 0).all()


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3, st.integers(-1, 50)), min_size=2, max_size=60))
def test_online_methods_see_the_pairs_own_past_and_nothing_else(rows):
    src, dst, time, rtt = (np.array(column) for column in zip(*rows, strict=True))
    time = np.where(time == 0, NO_TIME, time)  # before all times
    history = measurements(src, dst, rtt, time)
    names = ("last_value", "median3", "median9", "ema")
    found = {name: getattr(online, name)(history, history) for name in names}
    for i in range(len(rows)):
        same = (src == src[i]) & (dst == dst[i]) & (time < time[i]) & (rtt >= 0)
        past = rtt[same][np.argsort(time[same], kind="stable")]
        if len(past):
            assert found["last_value"][i] == past[-1]
            assert found["median3"][i] == np.median(past[-3:])
            assert found["median9"][i] == np.median(past[-9:])
            logs = np.log(np.maximum(past[-online.EMA_OF :], 0.001))
            average = logs[0]
            for value in logs[1:]:
                average += online.EMA_WEIGHT * (value - average)
            np.testing.assert_allclose(found["ema"][i], np.exp(average), rtol=1e-9)
        else:
            assert all(np.isnan(values[i]) for values in found.values())


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(1, 4)), min_size=1, max_size=40
    )
)
def test_weighted_medians_are_those_of_values_repeated_by_weight(rows):
    keys, values, weights = np.array(rows).T
    # A group may weigh far more than another.
    scale = 10.0 ** (12 * keys)
    found_keys, medians = grouped_weighted_median(keys, values.astype(float), weights * scale)
    np.testing.assert_array_equal(found_keys, np.unique(keys))
    repeated = [np.repeat(values[keys == key], weights[keys == key]) for key in found_keys]
    np.testing.assert_allclose(medians, [np.median(each) for each in repeated])


def failing(source, destination, n, seed=0):
    """Returns n measurements, their log-odds of failure the sum of a number at each end."""
    rng = np.random.default_rng(seed)
    src, dst = rng.integers(0, len(source), n), rng.integers(0, len(destination), n)
    p = 1 / (1 + np.exp(-source[src] - destination[dst]))
    rtt = np.where(rng.random(n) < p, -1, 20)
    return measurements(src, 100 + dst, rtt), p


def test_logistic_recovers_the_failure_rates_of_both_ends():
    rng = np.random.default_rng(1)
    source, destination = rng.normal(-1, 1, 10), rng.normal(0, 1.5, 10)
    train, _ = failing(source, destination, 40_000)
    test, p = failing(source, destination, 500, seed=1)
    np.testing.assert_allclose(logistic(train, test), p, atol=0.04)
    np.testing.assert_allclose(logistic_by_day(train, test), p, atol=0.04)  # all on one day


def test_logistic_by_day_knows_on_which_day_a_destination_was_down():
    rng = np.random.default_rng(0)
    n = 2000
    src, dst, day = rng.integers(0, 9, n), rng.integers(0, 5, n), rng.integers(0, 4, n)
    down = (dst == 2) & (day == 1)
    train = measurements(src, 100 + dst, np.where(down, -1, 20), day * 86_400 + 7)
    asked = measurements([0, 0, 0, 0], [102, 102, 101, 102], [1] * 4, [86_500, 5, 86_500, NO_TIME])
    p = logistic_by_day(train, asked)
    assert p[0] > 0.9
    assert max(p[1:3]) < 0.05
    assert p[3] < 0.5  # no day
    assert logistic(train, asked)[0] == logistic(train, asked)[1]


@pytest.mark.parametrize("rtt", [[-1] * 6, [5] * 6, [-1, -1, -1, 5, 5, 5]])
def test_probabilities_of_ends_that_always_or_never_fail_lie_between_0_and_1(rtt):
    train = measurements([0, 0, 0, 1, 1, 1] * 500, [7, 8, 9] * 1000, rtt * 500)
    asked = measurements([0, 1, 50], [7, 60, 61], [1, 1, 1])
    for predict in (logistic, logistic_by_day):
        p = predict(train, asked)
        assert np.all((p > 0) & (p < 1))
        assert p[1] < p[0] or len(set(rtt)) == 1


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 99)), min_size=1, max_size=50))
def test_grouped_medians_are_numpys(rows):
    keys, values = np.array(rows).T
    found_keys, medians = grouped_median(keys, values.astype(float))
    np.testing.assert_array_equal(found_keys, np.unique(keys))
    np.testing.assert_allclose(medians, [np.median(values[keys == key]) for key in found_keys])


def test_nodes_know_their_addresses_and_no_others():
    table = measurements(np.arange(9), np.arange(9) + 1, np.ones(9))
    nodes = Nodes(table.src, table.dst)
    assert len(nodes) == 10
    np.testing.assert_array_equal(nodes.addresses[nodes.lookup(table.src)], table.src)
    assert nodes.lookup(from_packed([b"\t" * 16])).tolist() == [-1]


def test_failed_measurements_are_not_fitted():
    train = Training.of(measurements([0, 0], [1, 1], [-1, 30]))
    assert train.rtt.tolist() == [30]
    with pytest.raises(DataError, match="no measurement to fit on was answered"):
        Training.of(measurements([0], [1], [-1]))
