"""Where the hosts of the simulated internet stand: true places, with rough population weights."""

import dataclasses

import numpy as np

EARTH_RADIUS_KM = 6371.0

# Name, region, latitude, longitude, inhabitants of the urban area in millions.
_TABLE = (
    ("Amsterdam", "Europe", 52.37, 4.90, 2.5),
    ("Athens", "Europe", 37.98, 23.73, 3.6),
    ("Barcelona", "Europe", 41.39, 2.17, 4.8),
    ("Berlin", "Europe", 52.52, 13.40, 4.0),
    ("Bucharest", "Europe", 44.43, 26.10, 2.1),
    ("Dublin", "Europe", 53.35, -6.26, 1.3),
    ("Frankfurt", "Europe", 50.11, 8.68, 2.0),
    ("Helsinki", "Europe", 60.17, 24.94, 1.3),
    ("Kyiv", "Europe", 50.45, 30.52, 3.0),
    ("Lisbon", "Europe", 38.72, -9.14, 2.9),
    ("London", "Europe", 51.51, -0.13, 10.8),
    ("Madrid", "Europe", 40.42, -3.70, 6.2),
    ("Marseille", "Europe", 43.30, 5.37, 1.6),
    ("Milan", "Europe", 45.46, 9.19, 5.0),
    ("Oslo", "Europe", 59.91, 10.75, 1.1),
    ("Paris", "Europe", 48.86, 2.35, 11.0),
    ("Prague", "Europe", 50.08, 14.44, 1.4),
    ("Reykjavik", "Europe", 64.15, -21.94, 0.2),
    ("Rome", "Europe", 41.90, 12.50, 3.3),
    ("Stockholm", "Europe", 59.33, 18.07, 1.7),
    ("Vienna", "Europe", 48.21, 16.37, 2.0),
    ("Warsaw", "Europe", 52.23, 21.01, 2.4),
    ("Zurich", "Europe", 47.37, 8.54, 1.4),
    ("Istanbul", "Asia", 41.01, 28.98, 15.6),
    ("Tel Aviv", "Asia", 32.09, 34.78, 3.8),
    ("Dubai", "Asia", 25.20, 55.27, 3.0),
    ("Almaty", "Asia", 43.22, 76.85, 2.0),
    ("Karachi", "Asia", 24.86, 67.01, 17.0),
    ("Mumbai", "Asia", 19.08, 72.88, 21.0),
    ("Delhi", "Asia", 28.61, 77.21, 32.0),
    ("Bangalore", "Asia", 12.97, 77.59, 13.0),
    ("Dhaka", "Asia", 23.81, 90.41, 23.0),
    ("Bangkok", "Asia", 13.76, 100.50, 11.0),
    ("Singapore", "Asia", 1.35, 103.82, 6.0),
    ("Jakarta", "Asia", -6.21, 106.85, 11.0),
    ("Manila", "Asia", 14.60, 120.98, 14.0),
    ("Hong Kong", "Asia", 22.32, 114.17, 7.5),
    ("Shanghai", "Asia", 31.23, 121.47, 28.0),
    ("Beijing", "Asia", 39.90, 116.41, 21.0),
    ("Seoul", "Asia", 37.57, 126.98, 10.0),
    ("Tokyo", "Asia", 35.68, 139.69, 37.0),
    ("Osaka", "Asia", 34.69, 135.50, 19.0),
    ("Sydney", "Oceania", -33.87, 151.21, 5.0),
    ("Melbourne", "Oceania", -37.81, 144.96, 5.0),
    ("Perth", "Oceania", -31.95, 115.86, 2.1),
    ("Auckland", "Oceania", -36.85, 174.76, 1.6),
    ("Cairo", "Africa", 30.04, 31.24, 21.0),
    ("Lagos", "Africa", 6.52, 3.38, 15.0),
    ("Nairobi", "Africa", -1.29, 36.82, 5.0),
    ("Johannesburg", "Africa", -26.20, 28.05, 6.0),
    ("Cape Town", "Africa", -33.92, 18.42, 4.8),
    ("New York", "North America", 40.71, -74.01, 19.0),
    ("Ashburn", "North America", 39.04, -77.49, 1.0),
    ("Miami", "North America", 25.76, -80.19, 6.2),
    ("Chicago", "North America", 41.88, -87.63, 8.9),
    ("Dallas", "North America", 32.78, -96.80, 6.5),
    ("Denver", "North America", 39.74, -104.99, 2.9),
    ("Los Angeles", "North America", 34.05, -118.24, 12.5),
    ("San Jose", "North America", 37.34, -121.89, 2.0),
    ("Seattle", "North America", 47.61, -122.33, 3.5),
    ("Toronto", "North America", 43.65, -79.38, 6.4),
    ("Mexico City", "North America", 19.43, -99.13, 22.0),
    ("Bogota", "South America", 4.71, -74.07, 11.0),
    ("Lima", "South America", -12.05, -77.04, 11.0),
    ("Santiago", "South America", -33.45, -70.67, 6.8),
    ("Buenos Aires", "South America", -34.60, -58.38, 15.0),
    ("Sao Paulo", "South America", -23.55, -46.63, 22.0),
)

REGIONS = tuple(dict.fromkeys(region for _, region, *_ in _TABLE))


@dataclasses.dataclass(frozen=True)
class Cities:
    """The table as arrays, one entry a city.

    Attributes:
        names: Names.
        region: Index into `REGIONS` [C].
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
    names, regions, latitude, longitude, population = zip(*_TABLE, strict=True)
    region = np.array([REGIONS.index(name) for name in regions])
    return Cities(names, region, *(np.array(c) for c in (latitude, longitude, population)))
