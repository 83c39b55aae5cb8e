"""A synthetic internet, measured as RIPE Atlas measures the real one.

Hosts stand in true cities, belong to autonomous systems (ASes), and have addresses in their AS's
prefixes, so that addresses say where a host is: 10.0.0.0/8 and fd00::/16, private space that
cannot be mistaken for real hosts. The prefixes of one region lie together, one /24 (or /48) lies in
one city. A quarter of the hosts are anchors in data centres; every host pings some anchors, each in
its fixed period. A round-trip time is

    great circle in fibre x stretch of the AS pair x route of the day + last miles + load + jitter

and symmetric in its lasting part. All of it is a pure function of the settings.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ping_llm import addresses, settings
from ping_llm.errors import DataError
from ping_llm.hashing import mix, uniform
from ping_llm.outputs import claim, publish_file
from ping_llm.progress import progress
from ping_llm.simulation.cities import Cities, load_cities
from ping_llm.simulation.settings import DAY, SimulateSettings
from ping_llm.storage import Location

START_TIME = 1_704_067_200  # 2024-01-01T00:00:00Z
BLOCK = 1 << 17  # measurements of one row group, and of one noise generator: part of the format
SETTINGS_KEY = b"ping_llm.simulate"
_NAMES = ("event_time", "src_addr", "dst_addr", "ip_version", "rtt")
_TYPES = pa.timestamp("us", tz="UTC"), pa.string(), pa.string(), pa.int8(), pa.float32()
SCHEMA = pa.schema(zip(_NAMES, _TYPES, strict=True))

FIBRE_KM_PER_MS = 100.0  # there and back: light in glass covers 200 km in 1 ms
MAX_ANCHORS, MAX_TARGETS = 1000, 40
MIN_ROUNDS = 12  # a host gets fewer targets before it measures them less often than this
MAX_AS = 4096  # 10.0.0.0/8 holds as many /20 prefixes
CITY_SLOTS = 4  # cities an AS may be in; each has four /24 of its /20
HOSTS_PER_SLOT = 4 * 254

# Access technologies: share of the hosts, last mile from and to (ms), median jitter (ms), load at
# the busiest hour (ms), failure rate. The first one is for anchors.
ACCESS = np.array(
    [
        (0.00, 0.2, 0.8, 0.05, 0.1, 0.001),  # data centre
        (0.38, 1.0, 4.0, 0.20, 1.0, 0.003),  # fibre
        (0.25, 6.0, 14.0, 1.00, 5.0, 0.006),  # cable
        (0.22, 12.0, 30.0, 0.80, 4.0, 0.008),  # DSL
        (0.12, 25.0, 60.0, 6.00, 10.0, 0.020),  # mobile
        (0.03, 510.0, 600.0, 12.00, 20.0, 0.040),  # geostationary satellite
    ]
)


@dataclasses.dataclass(frozen=True)
class SimulateResult:
    """What was written; the same when a finished output is found.

    Attributes:
        output: The file.
        measurements: Measurements in it.
        probes: Hosts that measure.
        days: Time span in days.
        seed: Seed of the world and its noise.
        bytes: Size of the file.
    """

    output: str
    measurements: int
    probes: int
    days: float
    seed: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class _Hosts:
    """The hosts, anchors first; arrays have one entry a host [P]."""

    n_anchors: int
    asn: np.ndarray
    city: np.ndarray
    access: np.ndarray
    last_mile_ms: np.ndarray
    ipv4: list[str]
    ipv6: list[str]
    has_ipv6: np.ndarray


class World:
    """The hosts, who measures whom, and how long round trips take, for one seed."""

    def __init__(
        self, *, probes: int, days: float, measurements: int, seed: int, no_events: bool = False
    ):
        self._quiet = no_events
        rng = np.random.default_rng([seed, 0])
        self._seed, self._measurements, self._span = seed, measurements, days * DAY
        self._cities = load_cities()
        self._km = self._cities.distances_km()
        n_as = min(max(probes // 8, 3), MAX_AS)
        self._as_quality = rng.standard_normal(n_as)
        self._hosts = _make_hosts(rng, probes, n_as, self._cities)
        self._source, self._target, self._ipv6 = _make_streams(rng, self._hosts, measurements)
        # Families of one host are two addresses: 0..P-1 are IPv4, P..2P-1 IPv6.
        self._addresses = pa.array(self._hosts.ipv4 + self._hosts.ipv6)

    def block(self, index: int) -> pa.RecordBatch:
        """Returns measurements `index * BLOCK` and up, at most `BLOCK` of them, in time order.

        Measurement m belongs to stream m mod S, so every stream repeats in a period of its own
        phase; its noise comes from a generator that only this block uses.
        """
        m = np.arange(index * BLOCK, min((index + 1) * BLOCK, self._measurements))
        rng = np.random.Generator(np.random.Philox(key=[self._seed, index]))
        time = ((m + rng.random(len(m))) * (self._span / self._measurements)).astype(np.int64)
        stream = m % len(self._source)
        source, target = self._source[stream], self._target[stream]
        ipv6 = self._ipv6[stream]
        rtt = self._rtt_ms(source, target, ipv6, time, rng)
        rtt[self._failed(source, target, time, rng)] = -1.0
        offset = ipv6 * len(self._hosts.asn)
        columns = [
            pa.array((START_TIME + time) * 1_000_000, SCHEMA.field("event_time").type),
            self._addresses.take(pa.array(source + offset)),
            self._addresses.take(pa.array(target + offset)),
            pa.array(np.where(ipv6, 6, 4).astype(np.int8)),
            pa.array(rtt.astype(np.float32)),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)

    def _rtt_ms(self, source, target, ipv6, time, rng: np.random.Generator) -> np.ndarray:
        """Returns the round-trip times of measurements that succeed."""
        hosts, n = self._hosts, len(source)
        pair = self._as_pair(source, target)
        as_a, as_b = np.divmod(pair, MAX_AS)
        pair_uniform = self._hash(1, pair)
        # A part of each AS and a part of the pair: unseen pairs are predictable, but not wholly.
        quality = 0.3 * (self._as_quality[as_a] + self._as_quality[as_b])
        stretch = 1.15 + 0.45 * np.exp(quality + 0.5 * (pair_uniform - 0.5))
        stretch = np.where(as_a == as_b, 1.25, stretch)
        # One AS pair in eight has no good IPv6 path.
        stretch = np.where(ipv6 & (self._hash(2, pair) < 0.125), stretch * 1.3, stretch)
        km = self._km[hosts.city[source], hosts.city[target]]
        rtt = km / FIBRE_KM_PER_MS * stretch * self._route(pair, time)

        for host in (source, target):
            access = hosts.access[host]
            _, _, _, jitter, load, _ = ACCESS.T[:, access]
            hour = time / 3600 + self._cities.longitude[hosts.city[host]] / 15
            evening = (0.5 + 0.5 * np.cos((hour - 21) * (2 * math.pi / 24))) ** 3
            rtt += hosts.last_mile_ms[host] + load * evening * (0.5 + rng.random(n))
            rtt += jitter * np.exp(0.7 * rng.standard_normal(n))
        spike = rng.random(n) < 0.005  # now and then a reply waits in a full queue
        rtt[spike] += 40.0 * np.exp(rng.standard_normal(np.count_nonzero(spike)))
        return rtt

    def _as_pair(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Returns numbers of unordered pairs of ASes: the lower one times MAX_AS, + the other."""
        asn = self._hosts.asn
        low, high = np.minimum(asn[source], asn[target]), np.maximum(asn[source], asn[target])
        return low * np.int64(MAX_AS) + high

    def _route(self, pair: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Returns the factor of the route in use: a level, shifting at the pair's change points."""
        x = time / self._route_period(pair) + self._hash(4, pair)
        number = np.floor(np.zeros_like(x) if self._quiet else x).astype(np.int64)
        if not self._quiet:
            number -= x - number < self._hash(5, pair, number)  # change points off the regular grid
        return self._route_factor(pair, number)

    def _route_period(self, pair: np.ndarray) -> np.ndarray:
        return DAY * np.exp(3.4 * self._hash(3, pair))  # a change every 1 to 30 days

    def _route_factor(self, pair: np.ndarray, number: np.ndarray) -> np.ndarray:
        level = self._hash(6, pair, number)
        return 1.0 + 0.5 * np.maximum(level - 0.6, 0.0)  # mostly the shortest route

    def _failed(self, source, target, time, rng: np.random.Generator) -> np.ndarray:
        """Returns which measurements fail: single losses, and outages of either host."""
        access = self._hosts.access
        loss = ACCESS[access[source], 5] + ACCESS[access[target], 5]
        failed = rng.random(len(source)) < loss
        for host in () if self._quiet else (source, target):
            there, start, end = self._outage(host, time // DAY)
            failed |= there & (time >= start) & (time < end)
        return failed

    def _outage(self, host: np.ndarray, day: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns whether hosts have an outage on a day, when it starts and when it ends.

        There is at most one a day, of minutes to hours, on one day in fifty.
        """
        length = DAY * 0.01 * np.exp(3.0 * self._hash(8, host, day))
        start = day * DAY + self._hash(9, host, day) * (DAY - length)
        return self._hash(7, host, day) < 0.02, start, start + length

    def events(self) -> Iterator[dict[str, Any]]:
        """Yields what happens in the time span: all outages, then all route changes of its streams.

        An outage has `start`, `end` (seconds since 1970 UTC) and `addresses`, those of the host. A
        route change has `start`, the `pairs` of addresses measured on the route, and the factors
        `before` and `after` of their distance in fibre.
        """
        if self._quiet:
            return
        hosts, span = self._hosts, self._span
        n_days = math.ceil(span / DAY)
        host, day = (each.ravel() for each in np.mgrid[0 : len(hosts.asn), 0:n_days])
        there, start, end = self._outage(host, day)
        for i in np.flatnonzero(there & (start < span)):
            addresses = [
                hosts.ipv4[host[i]],
                *[hosts.ipv6[host[i]]] * bool(hosts.has_ipv6[host[i]]),
            ]
            times = {"start": START_TIME + start[i], "end": START_TIME + min(end[i], span)}
            yield {"kind": "outage", **times, "addresses": addresses}
        source, target, ipv6 = self._source, self._target, self._ipv6
        pair, stream = np.unique(self._as_pair(source, target), return_inverse=True)
        period, phase = self._route_period(pair), self._hash(4, pair)
        for i, key in enumerate(pair):
            number = np.arange(int(phase[i]), int(span / period[i] + phase[i]) + 1)
            key = np.full(len(number), key)
            time = (number + self._hash(5, key, number) - phase[i]) * period[i]
            before, after = self._route_factor(key, number - 1), self._route_factor(key, number)
            changes = np.flatnonzero((time > 0) & (time < span) & (before != after))
            if len(changes):
                rows = np.flatnonzero(stream == i)
                of = [hosts.ipv6 if six else hosts.ipv4 for six in ipv6[rows]]
                ends = zip(of, source[rows].tolist(), target[rows].tolist(), strict=True)
                pairs = [[texts[a], texts[b]] for texts, a, b in ends]
                for k in changes:
                    factors = {"before": round(before[k], 4), "after": round(after[k], 4)}
                    yield {
                        "kind": "route",
                        "start": START_TIME + time[k],
                        **factors,
                        "pairs": pairs,
                    }

    def _hash(self, what: int, *keys: np.ndarray) -> np.ndarray:
        """Returns numbers uniform on [0, 1), functions of the seed, `what` and `keys` alone."""
        return uniform(mix(np.array([self._seed]), np.array([what]), *keys))


def _make_hosts(rng: np.random.Generator, probes: int, n_as: int, cities: Cities) -> _Hosts:
    """Returns `probes` hosts, the first quarter of them anchors."""
    # An AS has a home city and is present in the nearest others.
    home = rng.choice(len(cities.names), n_as, p=cities.population / cities.population.sum())
    nearest = np.argsort(cities.distances_km(), axis=1, kind="stable")[:, :CITY_SLOTS]
    as_cities = nearest[home]  # [A, CITY_SLOTS]
    # Prefixes in the order of regions, as registries give them out, with room between them.
    prefix = np.empty(n_as, np.int64)
    prefix[np.argsort(cities.region[home], kind="stable")] = np.arange(n_as) * (MAX_AS // n_as)

    n_anchors = min(max(probes // 4, 2), MAX_ANCHORS)
    share = (rng.permutation(n_as) + 3.0) ** -0.5  # a few large ASes, many small ones
    asn = rng.choice(n_as, probes, p=share / share.sum())
    slot = rng.choice(CITY_SLOTS, probes, p=(0.55, 0.2, 0.15, 0.1))
    access = rng.choice(len(ACCESS), probes, p=ACCESS[:, 0])
    access[:n_anchors] = 0
    low, high = ACCESS[access, 1], ACCESS[access, 2]
    has_ipv6 = rng.random(probes) < np.where(access == 0, 0.9, 0.45)

    place = asn * CITY_SLOTS + slot
    order = np.argsort(place, kind="stable")
    rank = np.empty(probes, np.int64)
    rank[order] = np.arange(probes) - np.searchsorted(place[order], place[order])
    number = (rank * 389 + place * 57) % HOSTS_PER_SLOT  # 389 and 1016 are coprime: all different
    interface = rng.integers(0, 2**63, probes)
    site, host = prefix[asn], (slot << 10) | (number // 254 << 8) | (number % 254 + 1)
    as_ipv6 = (site << 32 | host << 16).astype(np.uint64) | np.uint64(0xFD00 << 48)
    ipv4 = _texts(np.zeros_like(site), 0xFFFF << 32 | 10 << 24 | site << 12 | host)
    ipv6, city = _texts(as_ipv6, interface), as_cities[asn, slot]
    last_mile_ms = low + (high - low) * rng.random(probes)
    return _Hosts(n_anchors, asn, city, access, last_mile_ms, ipv4, ipv6, has_ipv6)


def _texts(high: np.ndarray, low: np.ndarray) -> list[str]:
    """Returns the addresses whose two halves of 64 bits these are [P]."""
    halves = np.stack([high.astype(np.uint64), low.astype(np.uint64)], axis=1)
    return addresses.to_text(halves.astype(">u8").view(addresses.ADDRESS)[:, 0])


def _make_streams(
    rng: np.random.Generator, hosts: _Hosts, measurements: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns source, target and whether IPv6 of each stream of measurements, in order of phase."""
    probes, anchors = len(hosts.asn), hosts.n_anchors
    per_probe = measurements // (probes * MIN_ROUNDS)
    per_probe = min(max(per_probe, 3), MAX_TARGETS, anchors)
    source = np.arange(probes)[:, None]
    target = rng.integers(0, anchors, (probes, per_probe))
    common = per_probe // 5  # every host measures these, as Atlas probes do the root servers
    target[:, :common] = np.arange(common)
    target[:, -1:] = (source + 1) % anchors  # never the host itself, so each host has a target
    pairs = np.unique((source * anchors + target)[source != target])
    source, target = pairs // anchors, pairs % anchors
    both = hosts.has_ipv6[source] & hosts.has_ipv6[target]
    source, target = np.concatenate([source, source[both]]), np.concatenate([target, target[both]])
    ipv6 = np.arange(len(source)) >= len(both)
    order = rng.permutation(len(source))
    return source[order], target[order], ipv6[order]


@settings.takes(SimulateSettings)
def simulate(chosen: SimulateSettings) -> SimulateResult:
    """Writes the measurements of a synthetic internet to a Parquet file, in time order.

    A finished file with the same settings is left as it is; `events` are written anew.

    Raises:
        ConfigError: A setting cannot be, or the output was made with other settings, or is another
            process's.
        DataError: The output exists and is not a simulated file.
        StorageError: The output cannot be written.
    """
    output = Location.of(chosen.output)
    stored = settings.to_json(chosen)
    if not chosen.no_events:  # files told nothing of it before there was a choice
        del stored["no_events"]

    def made_with() -> dict[str, Any] | None:
        return {"no_events": False} | _read_settings(output) if output.is_file() else None

    with claim(output, what="simulate", settings=chosen, stored=made_with) as held:
        if not output.is_file():
            with publish_file(output, claim=held) as path:
                _write(path, stored)
        if chosen.events is not None:
            lines = (json.dumps(event) + "\n" for event in World(**stored).events())
            with publish_file(Location.of(chosen.events)) as path, path.open("w") as file:
                file.writelines(lines)
        stored.pop("no_events", None)
        return SimulateResult(output=chosen.output, bytes=output.size(), **stored)


def _read_settings(output: Location) -> dict[str, Any]:
    try:
        with output.open_input() as file:
            metadata = pq.read_metadata(file).metadata or {}
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{output} exists and is not a readable Parquet file: {error}") from None
    try:
        return dict(json.loads(metadata[SETTINGS_KEY]))
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{output} exists and was not written by simulate; choose another name"
        ) from None


def _write(path: Path, stored: dict[str, Any]) -> None:
    total, world = stored["measurements"], World(**stored)
    with (
        progress("simulate", total=total, unit="measurements") as shown,
        pq.ParquetWriter(
            path,
            SCHEMA.with_metadata({SETTINGS_KEY: json.dumps(stored)}),
            compression="zstd",
            use_dictionary=["src_addr", "dst_addr", "ip_version"],  # pyright: ignore[reportArgumentType]
            column_encoding={"event_time": "DELTA_BINARY_PACKED"},
            write_page_checksum=True,  # else a damaged page may read as other numbers
        ) as writer,
    ):
        for index in range(-(-total // BLOCK)):
            batch = world.block(index)
            writer.write_batch(batch)
            shown.update(len(batch))
