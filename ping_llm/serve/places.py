"""Where nodes are on the world."""

import dataclasses

import numpy as np

from ping_llm.places import Places


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


def places_of(places: Places | None, nodes: np.ndarray) -> list[Place | None]:
    """Returns where each address [n] is; None where its coordinates are not known."""
    if places is None:
        return [None] * len(nodes)
    found = places.find(nodes)
    known = (found >= 0) & ~np.isnan(places.coordinates[found]).any(axis=1)
    return [
        Place(str(places.place[i]), *places.coordinates[i].tolist()) if there else None
        for i, there in zip(found.tolist(), known.tolist(), strict=True)
    ]
