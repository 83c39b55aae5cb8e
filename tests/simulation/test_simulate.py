import ipaddress
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ping_llm.errors import ConfigError, DataError, StorageError
from ping_llm.simulation import simulate as module
from ping_llm.simulation.cities import load_cities
from ping_llm.simulation.simulate import START_TIME, World, simulate

SETTINGS = {"probes": 60, "days": 3.0, "measurements": 20_000, "seed": 7}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("simulated") / "s.parquet"
    simulate(path, **SETTINGS)
    return pq.read_table(path)


def column(table, name):
    return np.array(table[name].to_pylist())


def test_the_columns_are_those_of_a_measurement_file(table):
    types = [str(field.type) for field in table.schema]
    assert table.column_names == ["event_time", "src_addr", "dst_addr", "ip_version", "rtt"]
    assert types == ["timestamp[us, tz=UTC]", "string", "string", "int8", "float"]
    assert sum(c.null_count for c in table.columns) == 0


def test_addresses_are_private_of_the_stated_family_and_of_different_hosts(table):
    versions = column(table, "ip_version")
    for name in ("src_addr", "dst_addr"):
        seen = set(zip(table[name].to_pylist(), versions.tolist(), strict=True))
        for text, version in seen:
            address = ipaddress.ip_address(text)
            assert address.version == version
            assert address.is_private
    assert not (column(table, "src_addr") == column(table, "dst_addr")).any()
    assert set(versions.tolist()) == {4, 6}


@pytest.mark.parametrize("probes", [2, 60, 20_000])
def test_no_two_hosts_share_an_address(probes):
    world = World(probes=probes, days=1, measurements=10, seed=3)
    for addresses in (world._hosts.ipv4, world._hosts.ipv6):
        assert len(set(addresses)) == probes


def test_times_ascend_through_the_whole_span(table):
    seconds = table["event_time"].cast(pa.int64()).to_numpy() // 1_000_000 - START_TIME
    assert (np.diff(seconds) >= 0).all()
    assert 0 <= seconds[0] < 100
    assert 3 * 86_400 - 100 < seconds[-1] < 3 * 86_400


def test_every_pair_is_measured_in_its_period(table):
    keys = list(zip(column(table, "src_addr"), column(table, "dst_addr"), strict=True))
    seconds = table["event_time"].cast(pa.int64()).to_numpy() // 1_000_000
    _, stream = np.unique(np.array([f"{a} {b}" for a, b in keys]), return_inverse=True)
    n_streams = stream.max() + 1
    period = 3 * 86_400 * n_streams / len(keys)
    for s in range(0, n_streams, 17):
        gaps = np.diff(seconds[stream == s])
        np.testing.assert_allclose(gaps, period, atol=3 * 86_400 / len(keys) + 1)


def test_round_trips_stay_above_light_speed_in_glass_and_are_mostly_plausible(table):
    rtt = column(table, "rtt")
    ok = rtt >= 0
    assert 0.002 < np.mean(~ok) < 0.05
    assert np.all(rtt[~ok] == -1.0)
    assert 5 < np.median(rtt[ok]) < 400
    assert rtt[ok].max() < 60_000
    assert rtt[ok].min() > 0
    world = World(**SETTINGS)
    place = dict(zip(world._hosts.ipv4, world._hosts.city, strict=True))
    place |= dict(zip(world._hosts.ipv6, world._hosts.city, strict=True))
    cities = [[place[a] for a in table[name].to_pylist()] for name in ("src_addr", "dst_addr")]
    km = load_cities().distances_km()[cities[0], cities[1]]
    assert (rtt[ok] > km[ok] / 100).all()


def test_great_circle_distances_are_the_published_ones():
    cities = load_cities()
    km, names = cities.distances_km(), cities.names
    # From the Great Circle Mapper, city to city; the table has two decimals of a degree.
    for a, b, expected in [("London", "New York", 5570), ("Sydney", "Santiago", 11_340)]:
        assert km[names.index(a), names.index(b)] == pytest.approx(expected, rel=0.01)
    np.testing.assert_allclose(km, km.T)
    np.testing.assert_allclose(np.diag(km), 0)


def medians(table, family):
    chosen = table.filter(pa.compute.equal(table["ip_version"], family))
    rtt = column(chosen, "rtt")
    keys = list(zip(chosen["src_addr"].to_pylist(), chosen["dst_addr"].to_pylist(), strict=True))
    groups = {}
    for key, value in zip(keys, rtt, strict=True):
        if value >= 0:
            groups.setdefault(key, []).append(value)
    return {key: np.median(values) for key, values in groups.items()}


def test_both_directions_of_a_pair_have_about_the_same_latency(table):
    found = medians(table, 4)
    ratios = [found[a, b] / found[b, a] for a, b in found if (b, a) in found]
    assert len(ratios) > 10
    assert 0.8 < np.median(ratios) < 1.25
    assert np.mean(np.abs(np.log(ratios)) < 0.3) > 0.8


def test_a_pair_varies_far_less_than_pairs_differ(table):
    found = medians(table, 4)
    between = np.std(np.log(list(found.values())))
    keys = list(zip(table["src_addr"].to_pylist(), table["dst_addr"].to_pylist(), strict=True))
    rtt = column(table, "rtt")
    residual = [
        np.log(v / found[k]) for k, v in zip(keys, rtt, strict=True) if v >= 0 and k in found
    ]
    assert np.std(residual) < between / 2


def test_load_peaks_in_the_local_evening():
    world = World(probes=40, days=2, measurements=1000, seed=1)
    access = world._hosts.access
    host = np.flatnonzero(access == 2)[:1]  # cable
    anchor = np.zeros(1, np.int64)
    longitude = world._cities.longitude[world._hosts.city[host[0]]]
    by_hour = []
    for local_hour in (9, 21):
        time = np.full(4000, int((local_hour - longitude / 15) % 24 * 3600))
        arguments = [np.repeat(x, 4000) for x in (host, anchor)]
        rng = np.random.default_rng(0)
        by_hour.append(np.median(world._rtt_ms(*arguments, np.zeros(4000, bool), time, rng)))
    assert 3 < by_hour[1] - by_hour[0] < 8


def test_routes_change_level_at_change_points_and_hold_between():
    world = World(probes=40, days=60, measurements=1000, seed=1)
    time = np.arange(0, 60 * 86_400, 600)
    levels = world._route(np.full(len(time), 5), time)
    changes = np.flatnonzero(np.diff(levels))
    assert 0 < len(changes) < 70
    assert levels.min() >= 1.0
    assert levels.max() <= 1.2


def test_outages_are_intervals_in_which_everything_of_a_host_fails():
    world = World(probes=40, days=300, measurements=1000, seed=1)
    time = np.arange(0, 300 * 86_400, 300)
    hosts = np.full(len(time), 3), np.full(len(time), 5)
    failed = world._failed(*hosts, time, np.random.default_rng(0))
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], failed, [0]]))))[::2]
    assert runs.max() >= 3
    assert np.sum(runs >= 3) < 30


@given(
    cut=st.lists(st.integers(1, 9999), max_size=4),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=15, deadline=None)
def test_the_measurements_do_not_depend_on_how_blocks_are_asked_for(cut, seed):
    world = World(probes=9, days=1.0, measurements=10_000, seed=seed)
    again = World(probes=9, days=1.0, measurements=10_000, seed=seed)
    first = world.block(0)
    for _ in cut:
        assert world.block(0).equals(first)
    assert again.block(0).equals(first)


def test_a_long_file_joins_its_blocks_without_gap_or_overlap(tmp_path):
    n = module.BLOCK * 2 + 5
    path = tmp_path / "s.parquet"
    simulate(path, probes=20, days=2.0, measurements=n, seed=0)
    file = pq.ParquetFile(path)
    assert file.metadata.num_rows == n
    assert file.num_row_groups == 3
    world = World(probes=20, days=2.0, measurements=n, seed=0)
    for index in (2, 0, 1):  # in any order
        expected = world.block(index).to_pydict()
        assert file.read_row_group(index).to_pydict() == expected
    seconds = file.read(columns=["event_time"])["event_time"].cast(pa.int64()).to_numpy()
    assert (np.diff(seconds) >= 0).all()


def test_another_seed_makes_another_internet():
    worlds = [World(probes=20, days=1, measurements=100, seed=s) for s in (1, 2)]
    assert worlds[0]._hosts.ipv4 != worlds[1]._hosts.ipv4
    assert not worlds[0].block(0).equals(worlds[1].block(0))


@pytest.mark.parametrize(("probes", "measurements"), [(2, 1), (2, 1000), (3, 7), (500, 1)])
def test_the_smallest_worlds_have_the_number_of_measurements_asked_for(
    tmp_path, probes, measurements
):
    path = tmp_path / "s.parquet"
    result = simulate(path, probes=probes, days=0.01, measurements=measurements, seed=0)
    table = pq.read_table(path)
    assert result.measurements == table.num_rows == measurements


def test_every_host_measures_something():
    for probes in (2, 5, 33):
        world = World(probes=probes, days=1, measurements=10, seed=0)
        assert set(world._source.tolist()) == set(range(probes))


def test_the_same_settings_again_leave_the_file_and_return_the_same(tmp_path):
    path = tmp_path / "s.parquet"
    first = simulate(path, **SETTINGS)
    before = path.stat().st_mtime_ns
    assert simulate(path, **SETTINGS) == first
    assert path.stat().st_mtime_ns == before
    path.unlink()
    simulate(path, **SETTINGS)
    assert path.stat().st_size == first.bytes


@pytest.mark.parametrize(
    ("name", "value"), [("probes", 61), ("days", 3.5), ("measurements", 20_001), ("seed", 8)]
)
def test_other_settings_on_a_finished_file_are_refused_by_name(tmp_path, name, value):
    path = tmp_path / "s.parquet"
    simulate(path, **SETTINGS)
    content = path.read_bytes()
    with pytest.raises(ConfigError, match=f"{name}={value}, was {SETTINGS[name]}"):
        simulate(path, **{**SETTINGS, name: value})
    assert path.read_bytes() == content


def not_parquet(path):
    path.write_bytes(b"hello")


def empty(path):
    path.write_bytes(b"")


def foreign(path):
    pq.write_table(pa.table({"x": [1]}), path)


def torn(path):
    simulate(path, **SETTINGS)
    path.write_bytes(path.read_bytes()[:-7])


def bad_settings(path):
    schema = module.SCHEMA.with_metadata({module.SETTINGS_KEY: "{"})
    pq.write_table(schema.empty_table(), path)


def odd_settings(path):
    schema = module.SCHEMA.with_metadata({module.SETTINGS_KEY: json.dumps([1])})
    pq.write_table(schema.empty_table(), path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (not_parquet, "is not a readable Parquet file"),
        (empty, "is not a readable Parquet file"),
        (torn, "is not a readable Parquet file"),
        (foreign, "was not written by simulate"),
        (bad_settings, "was not written by simulate"),
        (odd_settings, "was not written by simulate"),
    ],
)
def test_a_file_of_another_kind_is_refused_and_left(tmp_path, make, message):
    path = tmp_path / "s.parquet"
    make(path)
    content = path.read_bytes()
    with pytest.raises(DataError, match=message):
        simulate(path, **SETTINGS)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probes": 0}, "probes=0 must be at least 2 and at most 100000"),
        ({"probes": 1}, "probes=1 "),
        ({"probes": 10**9}, "probes=1000000000 "),
        ({"days": 0.0}, "days=0.0 "),
        ({"days": -1.0}, "days=-1.0 "),
        ({"days": float("nan")}, "days=nan "),
        ({"days": float("inf")}, "days=inf "),
        ({"days": 1e6}, "days=1000000.0 must be at least 1.157.* and at most 20000"),
        ({"measurements": 0}, "measurements=0 "),
        ({"measurements": -5}, "measurements=-5 "),
        ({"seed": -1}, "seed=-1 "),
        ({"seed": 2**63}, "seed="),
    ],
)
def test_impossible_settings_are_refused_by_name_and_value(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        simulate(tmp_path / "s.parquet", **{**SETTINGS, **change})
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_cannot_be_are_refused_before_any_work(tmp_path):
    with pytest.raises(ConfigError, match=r"s\.csv must be a name that ends in \.parquet"):
        simulate(tmp_path / "s.csv", **SETTINGS)
    with pytest.raises(ConfigError, match="must be a name"):
        simulate(tmp_path, **SETTINGS)
    (tmp_path / "d.parquet").mkdir()
    with pytest.raises(ConfigError, match="exists and is not a file"):
        simulate(tmp_path / "d.parquet", **SETTINGS)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_run_that_is_stopped_leaves_nothing(tmp_path, monkeypatch, stop):
    def block(self, index):
        raise stop

    monkeypatch.setattr(World, "block", block)
    expected = StorageError if isinstance(stop, OSError) else stop
    with pytest.raises(expected):
        simulate(tmp_path / "s.parquet", **SETTINGS)
    assert list(tmp_path.iterdir()) == []
