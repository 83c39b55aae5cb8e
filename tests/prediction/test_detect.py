import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from ping_llm import MeasurementTable, Predictor
from ping_llm.cli import cli
from ping_llm.errors import DataError
from ping_llm.prediction.detect import EXPECTED, _alarms, _grouped, _Scored, _threshold, find_events

HOUR = 3600


def scored(src, dst, surprise, times=None):
    n = len(src)
    columns = {
        "src_addr": [f"10.0.0.{i}" for i in src],
        "dst_addr": [f"10.0.1.{i}" for i in dst],
        "event_time": [HOUR * i for i in range(n)] if times is None else times,
        "rtt": np.full(n, 10.0),
    }
    ends = np.stack([np.array(src), 100 + np.array(dst)], axis=1)
    table = MeasurementTable.from_arrow(columns)
    return _Scored(table, np.array(surprise, float), np.full(n, 10.0), ends)


def test_what_is_expected_is_no_alarm_one_great_surprise_is_and_so_are_some_small_ones():
    assert _alarms(scored([1] * 50, [1] * 50, [EXPECTED] * 50), 0.1) == []
    assert _alarms(scored([1] * 5, [1] * 5, [1, 1, 9, 1, 1]), 5.0) == [2]
    assert _alarms(scored([1] * 5, [1, 2, 3, 4, 5], [1, 4, 4, 4, 1]), 5.0) == [3]
    # Of different nodes they do not add up.
    assert _alarms(scored([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 4, 4, 4, 1]), 5.0) == []
    # Of one destination they do.
    assert _alarms(scored([1, 2, 3, 4, 5], [7] * 5, [1, 4, 4, 4, 1]), 5.0) == [3]


@pytest.mark.parametrize("allowed", [1, 10, 40])
def test_the_threshold_lets_so_many_alarms_pass_as_are_asked_for(allowed):
    rng = np.random.default_rng(0)
    usual = scored(rng.integers(1, 9, 3000), rng.integers(1, 9, 3000), rng.exponential(size=3000))
    threshold = _threshold(usual, allowed)
    assert len(_alarms(usual, threshold)) <= allowed
    assert len(_alarms(usual, threshold - 0.01)) >= allowed
    # An exponential tail: half as many, 0.7 nats more.
    assert _threshold(usual, 0.5) == pytest.approx(_threshold(usual, 1) + np.log(2))


def test_failures_that_follow_strange_ones_belong_to_the_event():
    table = scored([1] * 6, [1, 2] * 3, [9, 1, 0.1, 1, 0.1, 1])
    table.table.rtt[:] = [-1, 10, -1, -1, 10, -1]
    assert _grouped(table, [0]) == [[0, 2]]  # of the pair that was strange, while it fails


def test_alarms_with_an_end_in_common_are_one_event_until_it_has_been_quiet():
    # One a node and hour; strange are four of source 1, one of source 2 and, late, one of source 1.
    n = 60
    src, dst, surprise = np.arange(n) % 2 + 1, np.arange(n), np.full(n, 0.5)
    surprise[[10, 12, 13, 14, 18, 50]] = [9, 8, 9, 4, 3.5, 9]
    table = scored(src, dst, surprise)
    assert _grouped(table, [10, 12, 13, 50]) == [[10, 12, 14, 18], [13], [50]]
    assert _grouped(table, [12]) == [[10, 12, 14, 18]]
    assert _grouped(table, []) == []
    # Of one destination, whoever measures it.
    table = scored(np.arange(n), src, surprise)
    assert _grouped(table, [10, 13, 50]) == [[10, 12, 14, 18], [13], [50]]


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """Returns files of some usual days and of some with an outage and a change of route."""
    rng = np.random.default_rng(0)
    rows = []
    for step in range(48):  # every two hours
        for src in range(4):
            for dst in range(2):
                rtt = (20.0 + 15 * src + 7 * dst) * np.exp(0.02 * rng.standard_normal())
                rows.append((1_700_000_000 + 7200 * step + 600 * src + 100 * dst, src, dst, rtt))
    table = pd.DataFrame(rows, columns=["event_time", "src", "dst", "rtt"])
    step = np.repeat(np.arange(48), 8)
    table.loc[(table.src == 2) & (step >= 33) & (step < 38), "rtt"] = -1
    table.loc[(table.src == 0) & (table.dst == 1) & (step >= 42), "rtt"] *= 1.3
    table["src_addr"] = [f"10.0.0.{i + 1}" for i in table.src]
    table["dst_addr"] = [f"10.1.0.{i + 1}" for i in table.dst]
    table["ip_version"] = 4
    directory = tmp_path_factory.mktemp("stream")
    kept = table.drop(columns=["src", "dst"])
    kept[step < 30].to_csv(directory / "before.csv", index=False)
    kept[step >= 30].sample(frac=1, random_state=0).to_csv(directory / "now.csv", index=False)
    return directory


@pytest.mark.slow
def test_an_outage_and_a_change_of_route_are_found_with_when_where_and_how(stream):
    words = ["detect", f"{stream}/now.csv", "--pretrained", "--history", f"{stream}/before.csv"]
    result = CliRunner().invoke(cli, [*words, "--false-alarms", "0.3", "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["measurements"] == 18 * 8
    outage = max(found["events"], key=lambda event: event["failed"] * event["measurements"])
    assert outage["sources"] == ["10.0.0.3"]
    assert outage["destinations"] == ["10.1.0.1", "10.1.0.2"]
    assert outage["failed"] == 1.0
    assert outage["slower"] is None
    assert outage["measurements"] >= 8  # of 10
    begins = pd.Timestamp(1_700_000_000 + 7200 * 33 + 1200, unit="s", tz="UTC")
    assert abs(pd.Timestamp(outage["start"]) - begins) <= pd.Timedelta(hours=2)
    slower = [event for event in found["events"] if (event["slower"] or 0) > 1.2]
    assert any("10.0.0.1" in event["sources"] for event in slower), found["events"]
    # Not a list of everything: 0.3 false ones a day and source allow two or three.
    assert len(found["events"]) <= 7


def test_what_cannot_be_looked_through_is_told(tmp_path, stream):
    def error(*words):
        result = CliRunner().invoke(cli, ["detect", *map(str, words)])
        assert result.exit_code == 1
        return result.stderr

    usual = "--history", stream / "before.csv"
    table = pd.read_csv(stream / "now.csv")
    timed, untimed = (
        MeasurementTable.from_arrow(each)
        for each in (table, table[["src_addr", "dst_addr", "rtt"]])
    )
    ask = Predictor.pretrained().knowing
    with pytest.raises(DataError, match="have no time"):
        find_events(ask(timed), untimed)
    with pytest.raises(DataError, match="known times"):
        find_events(ask(untimed), timed)
    assert "--pretrained knows no network" in error(stream / "now.csv", "--pretrained")
    assert "either --run or --pretrained" in error(stream / "now.csv")
    assert "absent.csv" in error(tmp_path / "absent.csv", "--pretrained", *usual)
