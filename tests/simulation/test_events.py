import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from ping_llm.errors import ConfigError
from ping_llm.simulation.simulate import simulate

SETTINGS = dict(probes=30, days=40.0, measurements=40_000, seed=5)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Returns (table of measurements as columns, events)."""
    directory = tmp_path_factory.mktemp("events")
    simulate(directory / "pings.parquet", events=directory / "events.jsonl", **SETTINGS)
    events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    return columns(directory / "pings.parquet"), events


def columns(path):
    table = pq.read_table(path)
    time = table["event_time"].to_numpy().astype("datetime64[s]").astype(np.int64)
    src, dst = (np.array(table[name].to_pylist()) for name in ("src_addr", "dst_addr"))
    return time, src, dst, table["rtt"].to_numpy()


def test_everything_of_a_host_fails_in_its_outage_and_hardly_anything_beside(world):
    (time, src, dst, rtt), events = world
    out = np.zeros(len(time), bool)
    outages = [event for event in events if event["kind"] == "outage"]
    assert len(outages) > 5
    for event in outages:
        of_host = np.isin(src, event["addresses"]) | np.isin(dst, event["addresses"])
        out |= of_host & (time >= event["start"]) & (time < event["end"])
    assert out.sum() > 30
    assert (rtt[out] < 0).all()
    assert (rtt[~out] < 0).mean() < 0.05


def test_round_trips_change_at_route_changes_as_the_factors_say(world):
    (time, src, dst, rtt), events = world
    answered = pd.DataFrame({"time": time, "src": src, "dst": dst, "rtt": rtt})[rtt > 0]
    of_pair = dict(list(answered.groupby(["src", "dst"])))
    found = []
    for event in events:
        for pair in event["pairs"] if event["kind"] == "route" else []:
            rows = of_pair[tuple(pair)]
            before = rows.rtt[rows.time < event["start"]][-5:]
            after = rows.rtt[rows.time >= event["start"]][:5]
            # Short ones are all last mile, which is no part of the route.
            if len(before) == len(after) == 5 and before.median() > 50:
                change = after.median() / before.median()
                found.append((change, event["after"] / event["before"]))
    change, factor = np.log(np.array(found)).T
    large = np.abs(factor) > np.log(1.05)
    assert large.sum() > 10
    assert np.mean(np.sign(change[large]) == np.sign(factor[large])) > 0.9
    assert 0.5 < np.median(change[large] / factor[large]) < 1.05


def test_a_quiet_internet_has_no_events_and_else_the_same_measurements(tmp_path, world):
    (time, src, dst, rtt), _ = world
    simulate(tmp_path / "quiet.parquet", no_events=True, **SETTINGS)
    quiet = columns(tmp_path / "quiet.parquet")
    for ours, theirs in zip(quiet[:3], (time, src, dst), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (quiet[3] < 0).mean() < (rtt < 0).mean()
    with pytest.raises(ConfigError, match="no_events"):
        simulate(tmp_path / "quiet.parquet", **SETTINGS)
    with pytest.raises(ConfigError, match="--no-events has no events"):
        simulate(tmp_path / "a.parquet", no_events=True, events=tmp_path / "e", **SETTINGS)
