"""What a list of prefixes says of measurements: where they are from, which outrun light."""

from collections import defaultdict
from typing import Any

import numpy as np

from ping_llm import addresses
from ping_llm.inspection.result import Check
from ping_llm.measurements import MeasurementTable
from ping_llm.places import LIGHT_KM_PER_MS, Attribute, Places

MARGIN_KM = 100.0  # by which a place may be off: a city is this large


class LocatedStatistics:
    """Accumulates tables of measurements by where their ends are."""

    def __init__(self, places: Places):
        self._places = places
        self._told = places.told()
        self._sums: dict[Attribute, dict[str, np.ndarray]] = {what: {} for what in self._told}
        self._measurements = self._found = self._between = self._outran = 0
        self._worst = (0.0, "")  # km too far, and which measurement

    def add(self, table: MeasurementTable) -> None:
        """Adds measurements."""
        failed = table.rtt < 0
        answered_ms = np.where(failed | ~np.isfinite(table.rtt), 0, table.rtt).astype(float)
        self._measurements += len(table)
        self._found += int(np.count_nonzero(self._places.find(table.src) >= 0))
        for what in self._told:
            sums = defaultdict(lambda: np.zeros(3), self._sums[what])
            names, index = np.unique(self._places.labels(table.src, what), return_inverse=True)
            columns = (np.ones(len(table)), failed, answered_ms)
            counts = [np.bincount(index, column, len(names)) for column in columns]
            for name, added in zip(names.tolist(), np.transpose(counts), strict=True):
                sums[name] = sums[name] + added
            self._sums[what] = dict(sums)
        self._add_distances(table.take(~failed & np.isfinite(table.rtt)))

    def _add_distances(self, answered: MeasurementTable) -> None:
        distance = self._places.distance_km(answered.src, answered.dst)
        self._between += int(np.count_nonzero(~np.isnan(distance)))
        # There and back again; places are not exact.
        too_far = 2 * (distance - MARGIN_KM) - answered.rtt * LIGHT_KM_PER_MS
        too_far = np.where(np.isnan(distance), -np.inf, too_far)
        self._outran += int(np.count_nonzero(too_far > 0))
        if len(answered) and too_far.max() > self._worst[0]:
            i = int(np.argmax(too_far))
            src, dst = (
                addresses.to_text(ends[i : i + 1])[0] for ends in (answered.src, answered.dst)
            )
            text = f"{src} -> {dst} took {answered.rtt[i]:.2f} ms over {distance[i]:,.0f} km"
            self._worst = (float(too_far[i]), text)

    def checks(self) -> list[Check]:
        """Returns whether RTTs are possible at the speed of light, where places are known."""
        if not self._between:
            return []
        detail = f"none of {self._between:,} between known coordinates"
        if self._outran:
            detail = (
                f"{self._outran:,} of {self._between:,} between known coordinates, so a place or "
                f"an RTT is wrong; the worst: {self._worst[1]}"
            )
        return [Check("no RTT outruns light", not self._outran, self._outran, detail)]

    def result(self, top: int) -> dict[str, Any]:
        """Returns the fraction of sources that is known, and the largest ASNs and countries."""
        found: dict[str, Any] = {
            "known_fraction": self._found / self._measurements if self._measurements else None
        }
        for what, sums in self._sums.items():
            largest = sorted(sums.items(), key=lambda item: -item[1][0])[:top]
            found[what] = [
                {
                    "name": name or "not known",
                    "measurements": int(count),
                    "failed_fraction": failed / count,
                    "mean_rtt_ms": total_ms / (count - failed) if count > failed else None,
                }
                for name, (count, failed, total_ms) in ((n, s.tolist()) for n, s in largest)
            ]
        return found
