"""Where the hosts of the simulated internet stand: the true cities of `cities.csv`.

It gives latitude and longitude in degrees, and the inhabitants of the urban area in millions.
"""

import dataclasses
from pathlib import Path

import numpy as np
from pyarrow import csv

EARTH_RADIUS_KM = 6371.0


@dataclasses.dataclass(frozen=True)
class Cities:
    """Cities as arrays, one entry a city.

    Attributes:
        names: Names.
        region: Number of the region, in the order of the file [C].
        latitude: Degrees north [C].
        longitude: Degrees east [C].
        population: Inhabitants in millions [C].
    """

    names: tuple[str, ...]
    region: np.ndarray
    latitude: np.ndarray
    longitude: np.ndarray
    population: np.ndarray

    def distances_km(self) -> np.ndarray:
        """Returns the great-circle distances between all cities [C, C]."""
        lat, lon = np.radians(self.latitude), np.radians(self.longitude)
        d_lat, d_lon = lat[:, None] - lat, lon[:, None] - lon
        h = np.sin(d_lat / 2) ** 2 + np.cos(lat[:, None]) * np.cos(lat) * np.sin(d_lon / 2) ** 2
        return 2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.minimum(h, 1.0)))


def load_cities() -> Cities:
    """Returns the cities of the simulated world."""
    table = csv.read_csv(Path(__file__).with_name("cities.csv"))
    region = table["region"].combine_chunks().dictionary_encode().indices.to_numpy()
    names = tuple(table["name"].to_pylist())
    numbers = (table[name].to_numpy() for name in ("latitude", "longitude", "population"))
    return Cities(names, region, *numbers)
