"""Who is where: the autonomous system and the place of addresses, by a user's list of prefixes."""

import csv
import dataclasses
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from ping_llm import addresses
from ping_llm.errors import DataError
from ping_llm.hashing import hash_addresses
from ping_llm.storage import Location

COLUMNS = ("prefix", "asn", "country", "place", "latitude", "longitude")
_ALSO = {"address": "prefix", "name": "place"}  # other names of columns
EARTH_RADIUS_KM = 6371.0
LIGHT_KM_PER_MS = 299.792458
UNKNOWN = ""

Attribute = Literal["asn", "country", "place"]


@dataclasses.dataclass(frozen=True)
class Places:
    """Prefixes and what is known of each; an address has that of the longest prefix it is under.

    Attributes:
        prefixes: Their first addresses [p], `addresses.ADDRESS`.
        bits: Their lengths: of 32 for IPv4, of 128 for IPv6 [p].
        asn: Autonomous systems as AS65536, UNKNOWN where not known [p], text.
        country: Countries, likewise [p].
        place: Names of places, likewise [p].
        coordinates: Latitude and longitude in degrees, NaN where not known [p, 2].
    """

    prefixes: np.ndarray
    bits: np.ndarray
    asn: np.ndarray
    country: np.ndarray
    place: np.ndarray
    coordinates: np.ndarray

    @classmethod
    def read(cls, file: str | Location) -> "Places":
        """Returns the prefixes of a file.

        It is CSV with a header: `prefix` (or `address`) and some of asn, country, place (or name),
        latitude, longitude. Or pyasn's text: a prefix, a tab and an AS number a line, and comments
        after `;`. An address is a prefix of its whole length.

        Raises:
            DataError: A line cannot be read, or a prefix stands there twice.
            StorageError: The file is absent.
        """
        location = Location.of(file)
        text = location.read_text()
        content = [line for line in text.splitlines() if line.strip() and line[0] != ";"]
        if not content:
            raise DataError(f"{location} holds no prefix")
        is_pyasn = not re.search("prefix|address", content[0].lower())
        records = _pyasn_lines(text, location) if is_pyasn else _csv_lines(text, location)
        numbers, rows = [], []
        for number, row in records:
            numbers.append(number)
            rows.append(row)
        if not rows:
            raise DataError(f"{location} holds no prefix")
        columns = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True))

        def refuse(bad: np.ndarray, say: Callable[[int], str]) -> None:
            for i in np.flatnonzero(bad).tolist():
                raise DataError(f"{location}, line {numbers[i]}: {say(i)}")

        starts, slashes, lengths = zip(
            *(text.partition("/") for text in columns["prefix"]), strict=True
        )
        first, families = _parse(starts)
        refuse(families == 0, lambda i: f"{columns['prefix'][i]!r} is no prefix like 192.0.2.0/24")
        most = np.where(families == 4, 32, 128)
        bits = np.array([int(t) if t.isdecimal() and len(t) < 4 else -1 for t in lengths])
        bits = np.where(np.array(slashes) == "", most, bits)
        wrong = (bits < 0) | (bits > most)
        refuse(wrong, lambda i: f"{columns['prefix'][i]!r} has no length up to {most[i]}")
        cut = addresses.prefix(first, bits) != first
        refuse(cut, lambda i: f"{columns['prefix'][i]!r} has bits set behind its length")
        place_of: dict[tuple[bytes, int], int] = {}
        for i, key in enumerate(zip(first.tolist(), bits.tolist(), strict=True)):
            if (before := place_of.setdefault(key, i)) != i:
                where = f"{location}, line {numbers[i]}"
                raise DataError(
                    f"{where}: {columns['prefix'][i]} stands in line {numbers[before]} already"
                )
        coordinates = np.stack([_degrees(columns[name]) for name in COLUMNS[4:]], axis=1)
        limits = np.array([90.0, 180.0])
        outside = ~(np.isnan(coordinates) | (np.abs(coordinates) <= limits))
        absent = np.isnan(coordinates).sum(axis=1) == 1
        given = [columns[name] for name in COLUMNS[4:]]
        garbled = np.array(
            [
                any(text and np.isnan(value) for text, value in zip(texts, values, strict=True))
                for texts, values in zip(zip(*given, strict=True), coordinates, strict=True)
            ]
        )
        refuse(
            outside.any(axis=1) | absent | garbled,
            lambda i: f"({given[0][i]}, {given[1][i]}) is no latitude and longitude in degrees",
        )
        return cls(
            prefixes=first,
            bits=bits,
            asn=np.array([_as_number(text) for text in columns["asn"]]),
            country=np.array(columns["country"]),
            place=np.array(columns["place"]),
            coordinates=coordinates,
        )

    @property
    def located(self) -> bool:
        """Whether the file tells coordinates."""
        return not np.isnan(self.coordinates).all()

    def told(self) -> list[Attribute]:
        """Returns which of AS and country the file tells."""
        whats: tuple[Attribute, ...] = ("asn", "country")
        return [what for what in whats if (getattr(self, what) != UNKNOWN).any()]

    def find(self, ends: np.ndarray) -> np.ndarray:
        """Returns which prefix is the longest that each of addresses [n] is under; -1: none."""
        found = np.full(len(ends), -1)
        family, of_prefix = addresses.family(ends), addresses.family(self.prefixes)
        for version in (4, 6):
            left = np.flatnonzero(family == version)
            lengths = np.unique(self.bits[of_prefix == version])
            for length in lengths[::-1].tolist():
                among = np.flatnonzero((of_prefix == version) & (self.bits == length))
                keys = hash_addresses(self.prefixes[among])
                order = np.argsort(keys)
                wanted = hash_addresses(addresses.prefix(ends[left], length))
                at = np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)
                hit = keys[order][at] == wanted
                found[left[hit]] = among[order[at[hit]]]
                left = left[~hit]
        return found

    def labels(self, ends: np.ndarray, what: Attribute) -> np.ndarray:
        """Returns the AS, country or place of each address [n], text; UNKNOWN: not known.

        Raises:
            DataError: The file tells it of no prefix.
        """
        values = getattr(self, what)
        if not (values != UNKNOWN).any():
            raise DataError(f"the file of prefixes has no {what}; add a column {what!r}")
        found = self.find(ends)
        return np.where(found >= 0, values[found], UNKNOWN)

    def groups(self, ends: np.ndarray, what: Attribute) -> np.ndarray:
        """Returns 16 bytes that addresses of one AS, country or place share [n, 16], uint8.

        Where it is not known these are the address itself, which is a group of its own.
        """
        labels, inverse = np.unique(self.labels(ends, what), return_inverse=True)
        digests = [hashlib.sha256(label.encode()).digest()[:16] for label in labels.tolist()]
        shared = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)[inverse]
        unknown = (labels == UNKNOWN)[inverse]
        return np.where(unknown[:, None], addresses.as_bytes(ends), shared)

    def distance_km(self, src: np.ndarray, dst: np.ndarray) -> np.ndarray:
        """Returns the great-circle distances of addresses [n]; NaN where one is not known."""
        ends = []
        for found in (self.find(src), self.find(dst)):
            ends.append(np.where((found >= 0)[:, None], self.coordinates[found], np.nan))
        return great_circle_km(*ends)


def great_circle_km(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the distances of points [n, 2] of degrees on a sphere (haversine formula)."""
    (lat_a, lon_a), (lat_b, lon_b) = np.radians(a).T, np.radians(b).T
    half = np.sin((lat_b - lat_a) / 2) ** 2
    half += np.cos(lat_a) * np.cos(lat_b) * np.sin((lon_b - lon_a) / 2) ** 2
    return 2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.minimum(half, 1.0)))


def _csv_lines(text: str, location: Location) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text))
    header = [name.strip().lower() for name in next(reader, [])]
    header = [_ALSO.get(name, name) for name in header]
    if "prefix" not in header or len(set(header)) < len(header):
        raise DataError(
            f"{location} has the columns {', '.join(header)}; expected prefix and some of "
            f"{', '.join(COLUMNS[1:])}, each once"
        )
    for cells in reader:
        if not any(cells):
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{location}, line {reader.line_num}: {len(cells)} values, expected {len(header)}"
            )
        row = dict(zip(header, map(str.strip, cells), strict=True))
        yield reader.line_num, [row.get(name, UNKNOWN) for name in COLUMNS]


def _pyasn_lines(text: str, location: Location) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.splitlines(), 1):
        cells = line.partition(";")[0].split()
        if not cells:
            continue
        if len(cells) != 2:
            raise DataError(
                f"{location}, line {number}: {line[:80]!r} is no prefix and AS number, and the "
                "file has no CSV header with a column prefix"
            )
        yield number, [*cells, *[UNKNOWN] * 4]


def _parse(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    encoded = [text.encode(errors="replace") for text in texts]
    lengths = np.array([len(text) for text in encoded], np.int64)
    data = np.frombuffer(b"".join(encoded), np.uint8)
    return addresses.parse_texts(np.cumsum(lengths) - lengths, lengths, data)


def _degrees(texts: Sequence[str]) -> np.ndarray:
    def value(text: str) -> float:
        try:
            return float(text)
        except ValueError:
            return np.nan

    return np.array([value(text) for text in texts])


def _as_number(text: str) -> str:
    number = text.upper().removeprefix("AS")
    return f"AS{number}" if number else UNKNOWN
