"""RIPE Atlas: how a result, a JSON object, becomes measurements.

Results stand one a line, in an array as the API answers it, or in messages of the stream
(`["atlas_result", {...}]`).

Several replies make one measurement. The RTT of a ping is `min` when positive, else the least
numeric `rtt` of the replies that are neither late nor duplicate, else -1 (failed). The source is
`from`, the public address, or `src_addr` where `from` is absent or of the other family; the
destination is `dst_addr`, or `addr` or `name` when that is an address. Numbers may be strings. A
traceroute is a measurement of its destination, and one of each public address on the way.

Pings of scamper, as `sc_warts2json` prints them, are read likewise.
"""

# pyarrow.compute makes its functions when it is imported:
# pyright: reportAttributeAccessIssue=false
import functools
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ping_llm import addresses, columns
from ping_llm.ingest.formats.json_text import is_json_text, record_lines
from ping_llm.ingest.formats.lines import Lines, Text
from ping_llm.ingest.formats.traceroutes import parse_result
from ping_llm.ingest.records import REASON_CODES, Field, Verdict, check
from ping_llm.measurements import KINDS, MeasurementTable
from ping_llm.tokenizer import MAX_RTT_MS

_FIELDS = "type timestamp af from src_addr dst_addr addr name min max sent rcvd result".split()  # noqa: SIM905
# What scamper calls these (sc_warts2json, pings).
_SCAMPER = {"timestamp": "start.sec", "from": "src", "dst_addr": "dst", "min": "statistics.min"}
_SCAMPER |= {"max": "statistics.max", "sent": "ping_sent", "rcvd": "statistics.replies"}
_TYPES = ("ping", "traceroute")
_MALFORMED = REASON_CODES["malformed traceroute"]
_threads = threading.local()


class RipeLines(Lines):
    """Lines of results, and what is taken of traceroutes."""

    def __init__(self, traceroutes: str, *of_lines: Any):
        super().__init__(*of_lines)
        self._traceroutes = traceroutes

    @property
    def kind(self) -> str:
        """What is taken of traceroutes: results of all files are checked together."""
        return self._traceroutes

    @staticmethod
    def check(group: "Sequence[RipeLines]") -> tuple[MeasurementTable, np.ndarray]:
        """See `RawRecords.check`."""
        traceroutes = group[0].kind
        return Lines.checked(group, lambda lines: parse_ripe_lines(lines, traceroutes))


def read_ripe(text: Text) -> Iterator[RipeLines]:
    """Yields the results in a share of a file."""
    is_text = is_json_text(text.head)
    blocks = record_lines(text.blocks(), text.name) if is_text else text.line_blocks()
    return text.lines(blocks, functools.partial(RipeLines, text.file.reading.traceroutes))


def parse_ripe_lines(
    lines: pa.Array, traceroutes: str = "hops"
) -> tuple[MeasurementTable, Verdict]:
    """Returns the measurements in `lines`, and what is wrong with each of the other lines.

    Args:
        lines: JSON text, one result each, a `string` array without nulls.
        traceroutes: What is taken of them: their "hops" and ends, their "end", or "no".
    """
    lines = _without_messages(lines)
    fields = _extract(lines)
    verdict = Verdict(len(lines))
    is_object = pc.and_(fields["parsed"], pc.starts_with(pc.utf8_ltrim_whitespace(lines), "{"))
    verdict.reject(~np.asarray(is_object), "not a JSON object")
    types = (np.asarray(pc.fill_null(pc.equal(fields["type"], t), False)) for t in _TYPES)
    is_ping, is_trace = types
    is_trace &= traceroutes != "no"
    expected = "a ping or traceroute" if traceroutes != "no" else "a ping"
    verdict.reject(~is_ping & ~is_trace, f"not {expected} result")
    time = columns.to_seconds(*columns.parse_floats(fields["timestamp"]))
    names = ("dst_addr", "addr", "name", "from", "src_addr")
    dst_addr, addr, name, public, private = (columns.parse_addresses(fields[n]) for n in names)
    dst = _first_usable(dst_addr, addr, name)
    versions, problems = columns.parse_floats(fields["af"])
    absent = problems == columns.MISSING  # firmware before 4460
    versions = np.where(absent, dst.family_of_records(), versions)
    family = versions, np.where(absent, columns.OK, problems)
    src = _merge(public, private, _use_private(public, private, versions))
    values = {"rtt": _rtt(fields)} | _loss_and_spread(fields)
    hops: list[tuple[int, str, float, float]] = []
    if is_trace.any():
        values["kind"] = np.where(is_trace, KINDS.index("end"), 0), np.full(len(lines), columns.OK)
        texts = addresses.to_text(dst.values) if len(dst.values) else []
        for i in np.flatnonzero(is_trace & (dst.codes >= 0)).tolist():
            found = parse_result(fields["result"][i].as_py() or "", texts[dst.codes[i]])
            for name in ("rtt", "loss", "spread"):
                values[name][0][i] = getattr(found, name, np.nan)
                values[name][1][i] = columns.OK
            verdict.codes[i] = verdict.codes[i] or (found is None and _MALFORMED)
            hops += [(i, *hop) for hop in found.hops] if found and traceroutes == "hops" else []
    for name in ("loss", "spread"):
        if np.all(values[name][1] == columns.MISSING):
            del values[name]
    table = check(verdict, src=src, dst=dst, time=time, family=family, **values)
    return MeasurementTable.concat([table, *_hops(hops, verdict, src, time[0], family[0])]), verdict


def _hops(
    hops: Sequence[tuple[int, str, float, float]],
    verdict: Verdict,
    src: columns.Addresses,
    time: np.ndarray,
    family: np.ndarray,
) -> list[MeasurementTable]:
    """Returns (number of the record, address, RTT, spread) of good records as measurements."""
    if not hops:
        return []
    record, texts, rtt, spread = (np.array(each) for each in zip(*hops, strict=True))
    dst = columns.parse_addresses(pa.array(texts.tolist()))
    good = (verdict.codes[record] == 0) & (dst.family_of_records() == family[record])
    good &= rtt <= MAX_RTT_MS
    record = record[good]
    return [
        MeasurementTable(
            time=time[record],
            src=src.values[src.codes[record]],
            dst=dst.values[dst.codes[good]],
            family=family[record].astype(np.int8),
            rtt=rtt[good].astype(np.float32),
            kind=np.full(len(record), KINDS.index("hop"), np.uint8),
            loss=np.full(len(record), np.nan, np.float32),
            spread=spread[good].astype(np.float32),
        )
    ]


def _loss_and_spread(fields: dict[str, pa.Array]) -> dict[str, Field]:
    """Returns the fraction of packets lost, and largest minus smallest RTT, where they are told."""
    names = ("sent", "rcvd", "min", "max")
    (sent, received, least, most), problems = zip(
        *(columns.parse_floats(fields[name]) for name in names), strict=True
    )
    known = [problem == columns.OK for problem in problems]
    known[0] &= known[1] & (sent > 0) & (received >= 0) & (received <= sent)
    known[2] &= known[3] & (least > 0) & (most >= least) & (most <= MAX_RTT_MS)
    with np.errstate(all="ignore"):
        values = {"loss": (known[0], 1 - received / sent), "spread": (known[2], most - least)}
    return {
        name: (np.where(is_known, value, np.nan), np.where(is_known, columns.OK, columns.MISSING))
        for name, (is_known, value) in values.items()
    }


def _without_messages(lines: pa.Array) -> pa.Array:
    """Returns lines, those of messages replaced by the results in them."""
    is_message = pc.match_substring_regex(lines, r'^\s*\[\s*"atlas_result"\s*,')
    if not pc.any(is_message).as_py():
        return lines
    results = pc.replace_substring_regex(lines, r'^\s*\[\s*"atlas_result"\s*,|\]\s*$', "")
    return pc.if_else(is_message, results, lines)


def _extract(lines: pa.Array) -> dict[str, pa.Array]:
    """Returns each of `_FIELDS` as text, null where absent, and `parsed`, false for no JSON."""
    fields = _at_paths(lines, _FIELDS)
    if fields["timestamp"].null_count:
        other = _at_paths(lines, list(_SCAMPER.values()))
        fields |= {name: pc.coalesce(fields[name], other[p]) for name, p in _SCAMPER.items()}
    return fields


def _at_paths(lines: pa.Array, paths: Sequence[str]) -> dict[str, pa.Array]:
    if not hasattr(_threads, "duckdb"):
        import duckdb

        _threads.duckdb = duckdb.connect(config={"threads": 1})
    wanted = ", ".join(f"'$.{path}'" for path in paths)
    selected = ", ".join(f'x[{i + 1}] AS "{path}"' for i, path in enumerate(paths))
    _threads.duckdb.register("lines", pa.table({"line": lines}))
    result = _threads.duckdb.sql(
        f"SELECT {selected}, x IS NOT NULL AS parsed "
        f"FROM (SELECT TRY(json_extract_string(line, [{wanted}])) AS x FROM lines)"
    )
    table = result.to_arrow_table()
    _threads.duckdb.unregister("lines")
    return {name: table[name].combine_chunks() for name in table.column_names}


def _merge(
    first: columns.Addresses, second: columns.Addresses, use_second: np.ndarray
) -> columns.Addresses:
    """Returns for each record the address of `second` where `use_second`, else of `first`."""
    shifted = np.where(second.codes >= 0, second.codes + len(first.values), -1)
    return columns.Addresses(
        values=np.concatenate([first.values, second.values]),
        family=np.concatenate([first.family, second.family]),
        codes=np.where(use_second, shifted, first.codes).astype(np.int32),
    )


def _first_usable(
    dst_addr: columns.Addresses, addr: columns.Addresses, name: columns.Addresses
) -> columns.Addresses:
    """Returns `dst_addr`, or where it is absent the one of the others that is an address."""
    other = _merge(addr, name, addr.family_of_records() == 0)
    absent = dst_addr.problems() == columns.MISSING
    return _merge(dst_addr, other, absent & (other.family_of_records() != 0))


def _use_private(
    public: columns.Addresses, private: columns.Addresses, family: np.ndarray
) -> np.ndarray:
    """Returns where the source is `src_addr`: `from` is absent, or of the other family."""
    problem, family_seen = public.problems(), public.family_of_records()
    absent = (problem == columns.MISSING) & (private.problems() != columns.MISSING)
    return absent | (
        (problem == columns.OK) & (family_seen != family) & (private.family_of_records() == family)
    )


def _rtt(fields: dict[str, pa.Array]) -> Field:
    values, problems = columns.parse_floats(fields["min"])
    received, received_problem = columns.parse_floats(fields["rcvd"])
    result = pc.fill_null(fields["result"], "")
    none_came = (received_problem == columns.OK) & (received == 0)
    none_came |= (problems == columns.OK) & (values < 0)  # RIPE's own mark
    none_came |= np.asarray(pc.starts_with(result, "[{"))
    undecided = (problems != columns.INVALID) & (values <= 0)
    with_replies = np.asarray(pc.match_substring_regex(result, r'"rtt"|\\'))
    values = np.where(undecided, -1.0, values)
    problems = np.where(
        undecided, np.where(none_came, columns.OK, columns.MISSING), problems
    ).astype(np.uint8)
    for i in np.flatnonzero(undecided & with_replies):
        least = _least_reply(result[int(i)].as_py())
        if least is not None:
            values[i], problems[i] = least, columns.INVALID if least < 0 else columns.OK
    return values, problems


def _least_reply(result: str) -> float | None:
    """Returns the least RTT of replies that count, None where none does, -1 for a wrong one."""
    try:
        replies = json.loads(result)
    except (ValueError, RecursionError):  # what DuckDB takes and Python does not
        return -1.0
    counted = []
    for reply in replies if isinstance(replies, list) else []:
        if not isinstance(reply, dict) or reply.get("rtt") is None:
            continue
        if _is_set(reply.get("late")) or _is_set(reply.get("dup")):
            continue
        rtt = reply["rtt"]
        if isinstance(rtt, bool) or not isinstance(rtt, int | float | str):
            return -1.0
        value, problem = columns.parse_floats(pa.array([str(rtt)]))
        if problem[0] != columns.OK or value[0] < 0:
            return -1.0
        counted.append(float(value[0]))
    return min(counted, default=None)


def _is_set(mark: object) -> bool:
    return str(mark) not in ("None", "0", "False", "")
