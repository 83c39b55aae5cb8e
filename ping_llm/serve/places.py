"""Where nodes are on the world: a CSV of prefixes with coordinates."""

import csv
import dataclasses
import ipaddress

import numpy as np

from ping_llm import addresses
from ping_llm.errors import DataError
from ping_llm.storage import Location


@dataclasses.dataclass(frozen=True)
class Place:
    """A place with a name.

    Attributes:
        name: What people call it.
        latitude: Degrees north.
        longitude: Degrees east.
    """

    name: str
    latitude: float
    longitude: float


class Places:
    """Places by the prefixes of what stands there."""

    def __init__(self, by_prefix: dict[tuple[int, bytes, int], Place]):
        """Keeps {(family, packed address, bits of 32 or 128): place}."""
        self._by_prefix = by_prefix
        self._bits = {
            family: sorted({key[2] for key in by_prefix if key[0] == family}, reverse=True)
            for family in (4, 6)
        }

    @classmethod
    def read(cls, location: Location) -> "Places":
        """Returns the places of a CSV: address or prefix, name, latitude, longitude.

        Raises:
            DataError: A column is absent, or a value cannot be.
            StorageError: The file cannot be read.
        """
        lines = csv.DictReader(location.read_text().splitlines())
        names = lines.fieldnames or []
        ends = [name for name in names if name in ("address", "prefix")]
        missing = {"name", "latitude", "longitude"} - set(names)
        if missing or not ends:
            wanted = ", ".join(sorted(missing) + ["address or prefix"] * (not ends))
            raise DataError(f"{location} lacks {wanted}; its columns are {', '.join(names)}")
        found = {}
        for number, row in enumerate(lines, 2):
            try:
                network = ipaddress.ip_network((row[ends[0]] or "").strip())
                at = float(row["latitude"]), float(row["longitude"])
                if not (abs(at[0]) <= 90 and abs(at[1]) <= 180):
                    raise ValueError(f"{at} is nowhere on Earth; give degrees")
            except (ValueError, TypeError) as error:
                raise DataError(f"{location}, line {number}: {error}") from None
            packed = addresses.from_packed([network.network_address.packed])
            key = network.version, packed.tobytes(), network.prefixlen
            found[key] = Place(row["name"] or "", *at)
        return cls(found)

    def of(self, nodes: np.ndarray) -> list[Place | None]:
        """Returns the place of the longest prefix of each address [n]; None where none is known."""
        found: list[Place | None] = [None] * len(nodes)
        families = addresses.family(nodes)
        for family, lengths in self._bits.items():
            rows = np.flatnonzero(families == family)
            for bits in lengths:
                left = [row for row in rows if found[row] is None]
                masked = addresses.prefix(nodes[left], bits)
                for row, packed in zip(left, masked, strict=True):
                    found[row] = self._by_prefix.get((family, packed.tobytes(), bits))
        return found
