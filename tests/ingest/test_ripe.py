import json

import numpy as np
import pyarrow as pa
import pytest

from ping_llm import addresses
from ping_llm.ingest.formats.ripe import parse_ripe_lines
from ping_llm.ingest.records import REASONS

GOOD = {
    "type": "ping",
    "timestamp": 1_700_000_000,
    "af": 4,
    "from": "193.0.0.1",
    "src_addr": "192.168.1.2",
    "dst_addr": "198.51.100.7",
    "sent": 3,
    "rcvd": 3,
    "min": 10.5,
    "result": [{"rtt": 11.0}, {"rtt": 10.5}, {"rtt": 12}],
}
NONE_CAME = {"min": -1, "rcvd": 0, "result": [{"x": "*"}] * 3}
V6 = {"af": 6, "from": "2001:db8::1", "dst_addr": "2001:db8::2"}


def parse(**changes):
    """Returns (rtt, source, destination, time) of one result, or why it is rejected."""
    result = {k: v for k, v in (GOOD | changes).items() if v is not ...}
    return parse_line(json.dumps(result))


def parse_line(line):
    table, verdict = parse_ripe_lines(pa.array([line]))
    if verdict.codes[0]:
        assert len(table) == 0
        return REASONS[verdict.codes[0]]
    src, dst = (addresses.to_text(ends)[0] for ends in (table.src, table.dst))
    return float(table.rtt[0]), src, dst, int(table.time[0])


def test_a_result_of_many_replies_is_one_measurement():
    assert parse() == (10.5, "193.0.0.1", "198.51.100.7", 1_700_000_000)


@pytest.mark.parametrize(
    ("changes", "rtt"),
    [
        ({"min": "10.5"}, 10.5),
        ({"min": ...}, 10.5),
        ({"min": None}, 10.5),
        ({"min": -1}, 10.5),
        ({"min": 0}, 10.5),
        ({"min": ..., "result": [{"rtt": "9.25"}, {"rtt": 11}]}, 9.25),
        ({"min": -1, "result": [{"rtt": 3.5, "dup": 1}, {"rtt": 9}]}, 9),
        ({"min": -1, "result": [{"late": 2, "rtt": 3.5}, {"x": "*"}, {"rtt": 9}]}, 9),
        ({"min": -1, "result": [{"late": 0, "dup": "0", "rtt": 3.5}]}, 3.5),
        (NONE_CAME, -1),
        (NONE_CAME | {"min": ..., "rcvd": ...}, -1),
        (NONE_CAME | {"rcvd": "0", "min": ..., "result": ...}, -1),
        (NONE_CAME | {"result": [{"error": "sendto failed: Network is unreachable"}]}, -1),
        (NONE_CAME | {"result": [{"late": 3}, {"rtt": 4, "dup": 1}]}, -1),
        ({"min": "-1", "result": ..., "rcvd": ...}, -1),
    ],
)
def test_the_rtt_is_min_if_positive_else_the_least_reply_that_counts_else_failed(changes, rtt):
    assert parse(**changes)[0] == rtt


@pytest.mark.parametrize(
    ("changes", "source"),
    [
        ({"from": ...}, "192.168.1.2"),
        ({"from": None}, "192.168.1.2"),
        ({"from": ""}, "192.168.1.2"),
        ({"from": "2001:db8::1"}, "192.168.1.2"),
        ({"src_addr": ...}, "193.0.0.1"),
        ({"src_addr": "nonsense"}, "193.0.0.1"),
        (V6 | {"from": "193.0.0.1", "src_addr": "2001:db8::9"}, "2001:db8::9"),
        ({"af": ...}, "193.0.0.1"),
        ({"af": "4"}, "193.0.0.1"),
    ],
)
def test_the_source_is_the_public_address_unless_absent_or_of_the_other_family(changes, source):
    assert parse(**changes)[1] == source


@pytest.mark.parametrize(
    ("changes", "destination"),
    [
        ({"dst_addr": ..., "addr": "9.9.9.9", "name": "example.net"}, "9.9.9.9"),
        ({"dst_addr": ..., "name": "9.9.9.9"}, "9.9.9.9"),
        ({"dst_addr": None, "addr": "example.net", "name": "9.9.9.9"}, "9.9.9.9"),
        ({"addr": "9.9.9.9"}, "198.51.100.7"),
    ],
)
def test_the_destination_is_dst_addr_or_an_address_among_addr_and_name(changes, destination):
    assert parse(**changes)[2] == destination


def test_times_may_be_strings_and_are_floored():
    assert parse(timestamp="1700000000")[3] == 1_700_000_000
    assert parse(timestamp=1700000000.9)[3] == 1_700_000_000


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"type": "traceroute"}, "malformed traceroute"),
        ({"type": ...}, "not a ping or traceroute result"),
        ({"type": None}, "not a ping or traceroute result"),
        ({"timestamp": ...}, "missing event_time"),
        ({"timestamp": "soon"}, "invalid event_time"),
        ({"timestamp": True}, "invalid event_time"),
        ({"timestamp": [1700000000]}, "invalid event_time"),
        ({"timestamp": 1_700_000_000_000}, "event_time outside 1970..2106"),
        ({"timestamp": -5}, "event_time outside 1970..2106"),
        ({"dst_addr": ..., "name": "example.net"}, "missing dst_addr"),
        ({"dst_addr": "example.net", "addr": "9.9.9.9"}, "invalid dst_addr"),
        ({"dst_addr": 3221225985}, "invalid dst_addr"),
        ({"dst_addr": "2001:db8::2"}, "address family mismatch"),
        ({"af": 6}, "address family mismatch"),
        ({"af": 5}, "invalid ip_version"),
        ({"af": "six"}, "invalid ip_version"),
        ({"from": ..., "src_addr": ...}, "missing src_addr"),
        ({"from": "somewhere"}, "invalid src_addr"),
        ({"from": ..., "src_addr": "fe80::1%eth0"}, "invalid src_addr"),
        ({"from": "2001:db8::1", "src_addr": ...}, "address family mismatch"),
        ({"from": ..., "src_addr": "2001:db8::1"}, "address family mismatch"),
        (V6 | {"from": "::ffff:193.0.0.1"}, "address family mismatch"),
        ({"min": ..., "result": ..., "rcvd": ...}, "missing rtt"),
        ({"min": ..., "result": [], "rcvd": ...}, "missing rtt"),
        ({"min": 0, "result": ...}, "missing rtt"),
        ({"min": "fast"}, "invalid rtt"),
        ({"min": True}, "invalid rtt"),
        ({"min": -1, "result": [{"rtt": True}]}, "invalid rtt"),
        ({"min": -1, "result": [{"rtt": -7}]}, "invalid rtt"),
        ({"min": -1, "result": [{"rtt": "x"}, {"rtt": 5}]}, "invalid rtt"),
        ({"min": float("nan")}, "non-finite rtt"),
        ({"min": float("inf")}, "non-finite rtt"),
        ({"min": -1, "result": [{"rtt": float("inf")}]}, "non-finite rtt"),
        ({"min": 2047 * 2**31 / 1000 * 1.001}, "rtt beyond the largest code"),
    ],
)
def test_what_cannot_be_used_is_rejected_with_the_reason(changes, reason):
    assert parse(**changes) == reason


@pytest.mark.parametrize(
    "line",
    ["x", "[]", "5", "null", '"ping"', '{"type":"ping"', '{"type":"ping"}{"type":"ping"}', "\x00",
     '{"type":"ping","min":01}', "{'type':'ping'}", '\ufeff{"type":"ping"}', '{"a":"\\ud800"}'],
)  # fmt: skip
def test_what_is_no_json_object_is_rejected_as_that(line):
    assert parse_line(line) == "not a JSON object"


def test_bad_lines_leave_the_others_as_they_are_in_any_position():
    good = [json.dumps(GOOD | {"timestamp": i, "min": i + 1}) for i in range(50)]
    lines = [line for i in range(50) for line in (["}"] * (i % 3) + [good[i]])]
    table, verdict = parse_ripe_lines(pa.array(lines))
    assert table.time.tolist() == list(range(50))
    np.testing.assert_array_equal(table.rtt, np.arange(1, 51))
    assert [line == "}" for line in lines] == (verdict.codes != 0).tolist()


def test_deeply_nested_replies_are_no_crash():
    line = json.dumps(GOOD | {"min": -1, "result": 0}).replace(
        '"result": 0', '"result": ' + '[{"rtt":' * 5000 + "1" + "}]" * 5000
    )
    assert parse_line(line) in REASONS


SCAMPER = {
    "type": "ping",
    "version": "0.4",
    "method": "icmp-echo",
    "src": "193.0.0.1",
    "dst": "198.51.100.7",
    "start": {"sec": 1_700_000_000, "usec": 5},
    "ping_sent": 4,
    "responses": [{"from": "198.51.100.7", "seq": 0, "rtt": 9.2}],
    "statistics": {"replies": 3, "loss": 0.25, "min": 9.2, "max": 10.7, "avg": 9.9, "stddev": 0.6},
}


def test_a_ping_of_scamper_is_read_as_one_of_ripe():
    line = json.dumps(SCAMPER)
    assert parse_line(line)[1:] == ("193.0.0.1", "198.51.100.7", 1_700_000_000)
    table, _ = parse_ripe_lines(pa.array([line]))
    assert table.rtt[0] == np.float32(9.2)
    assert table.loss[0] == 0.25
    assert table.spread[0] == pytest.approx(1.5)
    none = SCAMPER | {"responses": [], "statistics": {"replies": 0, "loss": 1}}
    assert parse_line(json.dumps(none))[0] == -1.0
