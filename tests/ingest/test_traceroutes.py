"""Traceroutes of RIPE Atlas: a measurement of the end, and one of each address on the way."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ping_llm import addresses
from ping_llm.data.rows import ProbeRows
from ping_llm.ingest.formats.ripe import parse_ripe_lines
from ping_llm.ingest.prepare import prepare_data
from ping_llm.ingest.records import REASONS
from ping_llm.inspection.dataset import inspect_data

SRC, DST, A, B = "193.0.0.1", "198.51.100.7", "8.8.8.8", "9.9.9.9"
LOST = {"x": "*"}


def trace(*hops, **changes):
    result = [{"hop": i, "result": list(packets)} for i, packets in enumerate(hops, 1)]
    record = {"type": "traceroute", "timestamp": 1_700_000_000, "af": 4, "from": SRC}
    return record | {"dst_addr": DST, "result": result} | changes


def reply(address, rtt, **marks):
    return {"from": address, "rtt": rtt, "ttl": 9, **marks}


def parse(record, traceroutes="hops"):
    """Returns {(kind, destination): (rtt, spread)} and the loss of the end, or the reason."""
    table, verdict = parse_ripe_lines(pa.array([json.dumps(record)]), traceroutes)
    if verdict.codes[0]:
        assert not len(table)
        return REASONS[verdict.codes[0]]
    texts = addresses.to_text(table.dst)
    rows = zip(table.column("kind").tolist(), texts, table.rtt.tolist(), table.spread, strict=True)
    found = {
        (kind, dst): (rtt, None if np.isnan(s) else round(float(s), 4))
        for kind, dst, rtt, s in rows
    }
    assert len(found) == len(table)
    assert addresses.to_text(table.src) == [SRC] * len(table)
    return found, float(table.loss[0])


FULL = trace(
    [reply("192.168.1.1", 0.5), LOST, LOST],  # private
    [reply(A, 9.0), reply(A, 7.5), reply(B, 8.0)],
    [reply(A, 7.0), reply(B, 1.0, late=2), reply(B, 1.0, dup=True)],
    [reply(B, 0.1, err="N"), LOST, LOST],
    [reply(DST, 20.0), reply(DST, 21.5), LOST],
)


def test_the_smallest_reply_of_each_public_address_counts():
    found, loss = parse(FULL)
    assert found == {(2, DST): (20.0, 1.5), (1, A): (7.0, 2.0), (1, B): (8.0, 0.0)}
    assert loss == pytest.approx(1 / 3)


def test_less_is_taken_where_less_is_asked():
    assert parse(FULL, "end")[0] == {(2, DST): (20.0, 1.5)}
    assert parse(FULL, "no") == "not a ping result"


def test_an_end_that_never_answered_has_failed():
    found, loss = parse(trace([reply(A, 7.5)], [LOST, LOST]))
    assert found == {(2, DST): (-1.0, None), (1, A): (7.5, 0.0)}
    assert np.isnan(loss)
    assert parse(trace([{"error": "sendto failed"}]))[0] == {(2, DST): (-1.0, None)}
    assert parse(trace(result=[{"hop": 1, "error": "connect failed"}]))[0] == {
        (2, DST): (-1.0, None)
    }


def test_an_unreachable_port_is_how_a_udp_traceroute_arrives():
    assert parse(trace([reply(DST, 5.0, err="p")]))[0] == {(2, DST): (5.0, 0.0)}
    assert parse(trace([reply(DST, 5.0, err="H")]))[0] == {(2, DST): (-1.0, None)}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (trace([reply("not an address", 5.0)]), "malformed traceroute"),
        (trace([reply(A, -5.0)]), "malformed traceroute"),
        (trace([reply(A, "x")]), "malformed traceroute"),
        (trace(result=[[]]), "malformed traceroute"),
        (trace(result=[{"hop": 1}]), "malformed traceroute"),
        (trace(result="x"), "malformed traceroute"),
        (trace([reply(A, 5.0)], dst_addr=None), "missing dst_addr"),
        (trace([reply(A, 5.0)], timestamp=None), "missing event_time"),
        (trace([reply(A, 5.0)], af=6), "address family mismatch"),
        (trace([reply(A, 5.0)], type="dns"), "not a ping or traceroute result"),
    ],
)
def test_what_is_no_traceroute_is_rejected_whole(record, reason):
    assert parse(record) == reason


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda x: (
            st.lists(x, max_size=3)
            | st.dictionaries(
                st.sampled_from(["hop", "result", "from", "rtt", "late", "err", "x"]), x, max_size=4
            )
        ),
        max_leaves=20,
    )
)
def test_any_result_is_taken_or_rejected(result):
    table, verdict = parse_ripe_lines(pa.array([json.dumps(trace(result=result))]))
    assert bool(verdict.codes[0]) != bool(len(table))


def test_pings_keep_loss_and_spread_and_traceroutes_stay_apart_in_rows(tmp_path):
    ping = {"type": "ping", "timestamp": 1_700_000_001, "af": 4, "from": SRC, "dst_addr": DST}
    ping |= {"sent": 3, "rcvd": 2, "min": 10.0, "max": 12.5}
    old = ping | {"sent": None, "timestamp": 1_700_000_002, "max": None}
    (tmp_path / "x.json").write_text(json.dumps([FULL, ping, old]))
    (tmp_path / "pings.json").write_text(json.dumps([{**ping, "sent": None, "max": None}]))
    output, fractions = tmp_path / "rows", {"valid_fraction": 0, "test_fraction": 0}
    result = prepare_data([str(tmp_path / "x.json")], output, **fractions)
    assert (result.measurements, result.rejected) == (5, {})
    table = ProbeRows(output, "train").to_table()
    assert sorted(table.kind.tolist()) == [0, 0, 1, 1, 2]
    np.testing.assert_allclose(np.sort(table.spread[table.kind == 0]), [2.5, np.nan])
    np.testing.assert_allclose(np.sort(table.loss[table.kind == 0]), [1 / 3, np.nan], rtol=1e-6)
    for path in (output, tmp_path / "x.json"):
        assert inspect_data(path).kinds == {"ping": 2, "hop": 2, "end": 1}
