"""`query`: any fields of a measurement given, any asked.

P(source, destination, time) is that of their tokens (`joint`), P(RTT | these) that of `predict`. So
what completes a measurement best is by Bayes' rule what maximises their product.
"""

import dataclasses
import ipaddress
from collections.abc import Iterator, Sequence

import numpy as np

from ping_llm import addresses, settings, tokenizer
from ping_llm.errors import ConfigError, DataError
from ping_llm.ingest.sources import read_table
from ping_llm.measurements import NO_TIME, MeasurementTable
from ping_llm.prediction.distribution import Distribution
from ping_llm.prediction.joint import BYTES, Joint
from ping_llm.prediction.predictor import LEVELS, Predictor, not_later
from ping_llm.prediction.settings import QuerySettings, rtt_band
from ping_llm.progress import progress
from ping_llm.storage import Location

HOURS = 24
_TIME_STEP = 256  # seconds that the last byte of a time tells apart
_HEADS = {
    ("src", 4): tokenizer.SRC_IPV4,
    ("src", 6): tokenizer.SRC_IPV6,
    ("dst", 4): tokenizer.DST_IPV4,
    ("dst", 6): tokenizer.DST_IPV6,
}

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclasses.dataclass(frozen=True)
class Completion:
    """One way to complete the measurement.

    Attributes:
        src: Source address.
        dst: Destination address.
        hour: Hour of the day, UTC, where the time was asked; else None.
        probability: Among all that were weighed.
    """

    src: str
    dst: str
    hour: int | None
    probability: float


@dataclasses.dataclass(frozen=True)
class QueryResult:
    """What completes a measurement.

    Attributes:
        ask: What was asked.
        completions: The most probable ones, falling; where the RTT was asked, those it was drawn
            from.
        weighed: How many were weighed.
        covered: The part of the probability, before the RTT is looked at, that falls on those
            weighed: of what the prefix allows, or for a list, of all addresses (of a pair, all
            pairs).
        p_rtt: Probability of the RTT that was given, before the asked field is known; None where
            none was given.
        rtt_ms: Where the RTT was asked, its quantiles `p5` to `p95`, `mode` and `mean` in ms, given
            that there is an answer.
        p_failed: Where the RTT was asked, the probability that there is none.
    """

    ask: str
    completions: list[Completion]
    weighed: int
    covered: float
    p_rtt: float | None = None
    rtt_ms: dict[str, float] | None = None
    p_failed: float | None = None


@settings.takes(QuerySettings)
def query(chosen: QuerySettings) -> QueryResult:
    """Returns what completes a measurement of which some fields are given.

    Addresses that are asked are weighed exactly where they are those of a list or of a prefix with
    at most `beam` beginnings; else the `beam` most probable beginnings of each length are followed.

    Raises:
        ConfigError: What is given and asked do not fit together.
        DataError: An address, a prefix or a file cannot be read, or there is nothing to choose
            from.
        CheckpointError: `run` is no run, or has not learnt the fields.
    """
    asked = _Asked.of(chosen)
    history = None if chosen.history is None else read_table([chosen.history])
    predictor = Predictor.load(chosen.run, chosen.step)
    predictor.check_windows()
    table, log_p = asked.completions(predictor, history)
    covered = min(float(np.exp(log_p).sum()), 1.0)
    weights = np.exp(log_p - log_p.max())
    weights /= weights.sum()
    p_rtt, answer, rtt_ms = None, None, None
    if chosen.rtt is not None:
        likelihood = np.zeros(len(table))
        for rows, distribution in _answers(predictor, table, history):
            likelihood[rows] = _probability(distribution, chosen.rtt)
        weights = weights * likelihood
        p_rtt = float(weights.sum())
        if p_rtt == 0:
            raise DataError(f"no completion that was weighed can have the RTT {chosen.rtt}")
        weights /= p_rtt
    if chosen.ask == "rtt":
        answer = _mixture(weights, _answers(predictor, table, history))
        rtt_ms = dict(zip(LEVELS, answer.quantiles(np.array([*LEVELS.values()]))[0], strict=True))
        rtt_ms |= {"mode": answer.mode()[0], "mean": answer.mean()[0]}
        rtt_ms = {name: float(value) for name, value in rtt_ms.items()}
    best = np.argsort(-weights, kind="stable")[: chosen.top]
    shown = table.take(best)
    src, dst = (addresses.to_text(ends, shown.family) for ends in (shown.src, shown.dst))
    hours = (shown.time // 3600 % HOURS).tolist()
    return QueryResult(
        ask=chosen.ask,
        completions=[
            Completion(src[i], dst[i], hours[i] if chosen.ask == "time" else None, weight)
            for i, weight in enumerate(weights[best].tolist())
        ],
        weighed=len(table),
        covered=covered,
        p_rtt=p_rtt,
        rtt_ms=rtt_ms,
        p_failed=None if answer is None else float(answer.p_failed[0]),
    )


# --- what is asked -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A query that was read.

    Attributes:
        chosen: Its settings.
        src: The source: an address is a prefix of all its bits; None where nothing is given.
        dst: The destination, likewise.
        time: Seconds since 1970, or `NO_TIME`.
    """

    chosen: QuerySettings
    src: Network | None
    dst: Network | None
    time: int

    @classmethod
    def of(cls, chosen: QuerySettings) -> "_Asked":
        ends = {name: _network(name, getattr(chosen, name)) for name in ("src", "dst")}
        nowhere = {"src_addr": ["::"], "dst_addr": ["::"], "event_time": [chosen.time]}
        try:
            time = int(MeasurementTable.from_arrow(nowhere, questions=True).time[0])
        except DataError as error:
            raise DataError(str(error).removeprefix("row 1: ")) from None
        asked = cls(chosen, **ends, time=time)
        if len({end.version for end in ends.values() if end is not None}) > 1:
            raise ConfigError(f"src={asked.src} and dst={asked.dst} are of different families")
        wanted = {"dst": ["dst"], "src": ["src"], "pair": ["src", "dst"], "time": []}
        if chosen.ask in wanted and asked.unknown != wanted[chosen.ask]:
            raise ConfigError(
                f"--ask {chosen.ask} needs one address each as "
                f"{' and '.join({'src', 'dst'} - {*wanted[chosen.ask]}) or 'neither end'}; given "
                f"are src={chosen.src}, dst={chosen.dst}"
            )
        prefixes = [name for name in asked.unknown if ends[name] is not None]
        if prefixes and len(prefixes) < len(asked.unknown):
            raise ConfigError("of a pair, give a prefix for both ends or for neither")
        if chosen.candidates is not None and (prefixes or not asked.unknown):
            raise ConfigError("--candidates are for an end of which no address or prefix is given")
        return asked

    @property
    def unknown(self) -> list[str]:
        """The ends that are not one address."""
        ends = {"src": self.src, "dst": self.dst}
        return [name for name, end in ends.items() if end is None or end.num_addresses > 1]

    def completions(
        self, predictor: Predictor, history: MeasurementTable | None
    ) -> tuple[MeasurementTable, np.ndarray]:
        """Returns (questions, their log-probabilities before any RTT is looked at), each [n]."""
        if self.chosen.ask == "time":
            return self._hours(predictor)
        if not self.unknown:
            return self._questions([self._address("src")], [self._address("dst")]), np.zeros(1)
        if self.src is not None and self.dst is not None:
            return self._under_prefixes(predictor)
        return self._listed(predictor, history)

    def _joint(self, predictor: Predictor) -> Joint:
        given = [tokenizer.MEASUREMENT_START]
        for name in ("src", "dst"):
            if name not in self.unknown:
                packed = self._address(name)
                given += [_HEADS[name, 4 if len(packed) == 4 else 6], *_tokens(packed)]
        if self.time != NO_TIME:
            given += [tokenizer.TIMESTAMP_ABS, *_tokens(self.time.to_bytes(8, "big"))]
        model = predictor.model
        return Joint(model.graphdef, model.params, np.array(given))

    def _address(self, name: str) -> bytes:
        network = {"src": self.src, "dst": self.dst}[name]
        assert network is not None
        return network.network_address.packed

    def _questions(self, src: Sequence[bytes], dst: Sequence[bytes]) -> MeasurementTable:
        return MeasurementTable(
            time=np.full(len(src), self.time),
            src=addresses.from_packed(src),
            dst=addresses.from_packed(dst),
            family=np.array([4 if len(each) == 4 else 6 for each in src], np.int8),
            rtt=np.full(len(src), -1, np.float32),
        )

    def _of_tails(self, tails: np.ndarray, size: int) -> MeasurementTable:
        """Returns questions of which the unknown ends, `size` bytes each, stand in tails [n, T]."""
        columns = {}
        for name in ("src", "dst"):
            if name in self.unknown:
                start = 1 + self.unknown.index(name) * (1 + size)
                packed = (tails[:, start : start + size] - tokenizer.BYTE_0).astype(np.uint8)
                columns[name] = [row.tobytes() for row in packed]
            else:
                columns[name] = [self._address(name)] * len(tails)
        return self._questions(columns["src"], columns["dst"])

    def _under_prefixes(self, predictor: Predictor) -> tuple[MeasurementTable, np.ndarray]:
        places = []
        networks = {"src": self.src, "dst": self.dst}
        for name in self.unknown:
            network = networks[name]
            assert network is not None
            places += [_only(_HEADS[name, network.version]), *_under(network)]
        allowed, width = np.array(places), self.chosen.beam
        tails, log_p = self._joint(predictor).search(allowed, width)
        if self.chosen.rtt is not None or self.chosen.ask == "rtt":  # which each costs a question
            kept = np.argsort(-log_p, kind="stable")[:width]
            tails, log_p = tails[kept], log_p[kept]
        assert self.dst is not None
        return self._of_tails(tails, self.dst.max_prefixlen // 8), log_p

    def _listed(
        self, predictor: Predictor, history: MeasurementTable | None
    ) -> tuple[MeasurementTable, np.ndarray]:
        listed = self._list(predictor, history)
        joint, tables, scores = self._joint(predictor), [], []
        for version, size in ((4, 4), (6, 16)):
            ends = [each for each in listed if len(each[0]) == size]
            if not ends:
                continue
            heads = [_HEADS[name, version] for name in self.unknown]
            tails = np.array(
                [
                    [
                        token
                        for head, packed in zip(heads, each, strict=True)
                        for token in (head, *_tokens(packed))
                    ]
                    for each in ends
                ]
            )
            bytes_of_end = np.tile(BYTES, (size, 1))
            allowed = np.concatenate([[_only(head), *bytes_of_end] for head in heads])
            if len(heads) == 2:  # the family is not given
                allowed[0] |= _only(_HEADS["src", 4]) | _only(_HEADS["src", 6])
            tables.append(self._of_tails(tails, size))
            scores.append(joint.score(tails, allowed))
        return MeasurementTable.concat(tables), np.concatenate(scores)

    def _list(
        self, predictor: Predictor, history: MeasurementTable | None
    ) -> list[tuple[bytes, ...]]:
        """Returns the candidates, or else what is known, for the unknown ends, each once."""
        given = self.src or self.dst
        if self.chosen.candidates is not None:
            found = _read_candidates(self.chosen.candidates, len(self.unknown))
            where = self.chosen.candidates
        else:
            known = predictor.known
            if history is not None:
                known = MeasurementTable.concat([known, history])
            ends = [_packed(getattr(known, name), known.family) for name in self.unknown]
            found, where = list(zip(*ends, strict=True)), "what the run knows"
        if given is not None:
            size = given.max_prefixlen // 8
            found = [each for each in found if len(each[0]) == size]
        if not found:
            family = "" if given is None else f" of the family of {given.network_address}"
            raise DataError(f"{where} has no address{family} to choose from; give --candidates")
        return sorted(set(found))

    def _hours(self, predictor: Predictor) -> tuple[MeasurementTable, np.ndarray]:
        """Returns a question at the likeliest time of each hour of the day, and the hours' own."""
        zeros = [_only(tokenizer.BYTE_0)] * 4  # times are of 1970 to 2106
        allowed = np.array([_only(tokenizer.TIMESTAMP_ABS), *zeros, BYTES, BYTES, BYTES])
        tails, log_p = self._joint(predictor).search(allowed, self.chosen.beam)
        high = (tails[:, 5:] - tokenizer.BYTE_0) @ np.array([65536, 256, 1])
        times, p = high * _TIME_STEP, np.exp(log_p)
        # A step may lie in two hours: its sixteenths are counted.
        parts = times[:, None] + np.arange(0, _TIME_STEP, 16)
        hour = parts // 3600 % HOURS
        weights = np.repeat(p / parts.shape[1], parts.shape[1])
        total = np.bincount(hour.reshape(-1), weights, HOURS)
        order = np.argsort(p, kind="stable")
        likeliest = np.arange(HOURS) * 3600
        likeliest[hour[order, 0]] = times[order]  # of equal indices the last counts
        one = self._questions([self._address("src")], [self._address("dst")])
        table = dataclasses.replace(one.take(np.zeros(HOURS, np.int64)), time=likeliest)
        found = total > 0
        return table.take(found), np.log(total[found])


def _network(name: str, text: str | None) -> Network | None:
    if text is None:
        return None
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise DataError(
            f"{name}={text!r} is no address or prefix ({error}); give one like 192.0.2.1 or "
            "198.51.100.0/24"
        ) from None
    mapped = network.version == 6 and network.network_address.packed.startswith(
        addresses.MAPPED_PREFIX
    )
    if mapped:
        raise DataError(f"{name}={text!r} is IPv4 written as IPv6; give it as IPv4")
    return network


def _only(token: int) -> np.ndarray:
    return np.arange(tokenizer.VOCAB_SIZE) == token


def _under(network: Network) -> list[np.ndarray]:
    """Returns which tokens may stand for each byte of an address under a prefix."""
    first, last = network.network_address.packed, network.broadcast_address.packed
    token = np.arange(tokenizer.VOCAB_SIZE) - tokenizer.BYTE_0
    return [(token >= low) & (token <= high) for low, high in zip(first, last, strict=True)]


def _tokens(packed: bytes) -> list[int]:
    return [tokenizer.BYTE_0 + byte for byte in packed]


def _packed(ends: np.ndarray, families: np.ndarray) -> list[bytes]:
    rows = addresses.as_bytes(ends)
    return [
        rows[i, 12:].tobytes() if family == 4 else rows[i].tobytes()
        for i, family in enumerate(families)
    ]


def _read_candidates(path: str, count: int) -> list[tuple[bytes, ...]]:
    found = []
    for number, line in enumerate(Location.of(path).read_text().splitlines(), 1):
        words = line.replace(",", " ").split()
        if not words:
            continue
        try:
            if len(words) != count:
                raise DataError(f"expected {count} addresses, found {len(words)}")
            ends, families = addresses.parse(words)
            if len(set(families.tolist())) > 1:
                raise DataError("the addresses are of different families")
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
        found.append(tuple(_packed(ends, families)))
    return found


# --- RTTs ----------------------------------------------------------------------------------------


def _answers(
    predictor: Predictor, table: MeasurementTable, history: MeasurementTable | None
) -> Iterator[tuple[np.ndarray, Distribution]]:
    """Yields (questions, the distributions of their RTTs), as `predict` answers them."""
    so_far = not_later(history, int(table.time.min()))
    both = [
        predictor.known if each is None else MeasurementTable.concat([predictor.known, each])
        for each in (so_far, history)
    ]
    with progress("query", total=len(table), unit="RTTs") as bar:
        for rows, distribution, _ in predictor.answers(table, *both):
            yield rows, distribution
            bar.update(len(rows))


def _probability(distribution: Distribution, rtt: str) -> np.ndarray:
    """Returns the probability of a failure, or of an RTT in a band [n]."""
    band = rtt_band(rtt)
    if band is None:
        return distribution.p_failed
    inside = (distribution.values_ms >= band[0]) & (distribution.values_ms <= band[1])
    share = np.einsum("nu,nu->n", distribution.probabilities, inside)
    return share * (1 - distribution.p_failed)


def _mixture(
    weights: np.ndarray, answers: Iterator[tuple[np.ndarray, Distribution]]
) -> Distribution:
    """Returns the one distribution of measurements of which each is asked with its weight."""
    values, probabilities, failed = [], [], 0.0
    for rows, each in answers:
        failed += float(weights[rows] @ each.p_failed)
        answered = weights[rows] * (1 - each.p_failed)
        values.append(each.values_ms.reshape(-1))
        probabilities.append((answered[:, None] * each.probabilities).reshape(-1))
    values, probabilities = np.concatenate(values), np.concatenate(probabilities)
    order = np.argsort(values, kind="stable")
    total = probabilities.sum()
    return Distribution(values[order][None], probabilities[order][None] / total, np.array([failed]))
