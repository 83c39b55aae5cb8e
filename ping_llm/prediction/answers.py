"""From questions to answers: what a model says from what is known about each."""

import contextlib
import dataclasses
import hashlib
import json
from typing import Any

import jax
import numpy as np

from ping_llm import outputs, storage
from ping_llm.data.network import Network
from ping_llm.data.questions import question_grids
from ping_llm.errors import StorageError
from ping_llm.estimators.failures import FailureOdds
from ping_llm.measurements import MeasurementTable
from ping_llm.prediction import reading
from ping_llm.prediction.calibration import UNCALIBRATED, Answers, Calibration, calibrate
from ping_llm.storage import Location

MOST_REMEMBERED = 64  # calibrations in memory, of some kB each


@dataclasses.dataclass(frozen=True)
class Answerer:
    """A decoder that answers questions from what is known of a network.

    Attributes:
        graphdef: The decoder's static part.
        params: Its parameters.
        calibration: How its levels are read.
        remembered: Calibrations of networks, by name; None: they are in the user's cache.
    """

    graphdef: Any
    params: Any
    calibration: Calibration = UNCALIBRATED
    remembered: dict[str, Calibration] | None = None

    def answer(
        self,
        questions: MeasurementTable,
        known: MeasurementTable,
        history: MeasurementTable | None = None,
        network: Network | None = None,
    ) -> Answers:
        """Yields answers until every question has had its turn; see `question_grids`."""
        p_failed = None
        if self.calibration.failures is not None:
            odds = FailureOdds(known) if network is None else network.failures
            p_failed = odds.probability(questions)
        for rows, kind, grids in question_grids(questions, known, history, network):
            for some, answer in reading.distributions(self.graphdef, self.params, grids):
                asked = rows[some]
                classical = None if p_failed is None else p_failed[asked]
                yield asked, self.calibration.apply(answer, kind, classical), grids.shown[some]

    def calibrated(self, known: MeasurementTable) -> "Answerer":
        """Returns the same, calibrated on pairs that are left out of what is known.

        Which takes some hundred questions, so it is remembered in the user's cache.
        """
        name = hashlib.sha256(self.digest().encode())
        for column in (known.time, known.src, known.dst, known.rtt):
            name.update(np.ascontiguousarray(column).data)
        plain = dataclasses.replace(self, calibration=UNCALIBRATED)
        if self.remembered is not None:
            if name.hexdigest() not in self.remembered:
                while len(self.remembered) >= MOST_REMEMBERED:
                    del self.remembered[next(iter(self.remembered))]
                self.remembered[name.hexdigest()] = calibrate(plain.answer, known)
            calibration = self.remembered[name.hexdigest()]
            return dataclasses.replace(plain, calibration=calibration)
        cached = Location.of(storage.cache_root()) / "calibrations" / f"{name.hexdigest()}.json"
        try:
            calibration = Calibration.from_json(json.loads(cached.read_text()))
        except (StorageError, ValueError, LookupError, TypeError):  # not there yet, or damaged
            calibration = calibrate(plain.answer, known)
            # Where nothing can be cached, each start costs those questions again, and no more.
            with contextlib.suppress(StorageError):
                outputs.publish_json(cached, calibration.to_json())
        return dataclasses.replace(plain, calibration=calibration)

    def digest(self) -> str:
        """Returns what names the parameters."""
        sha256 = hashlib.sha256()
        for leaf in jax.tree.leaves(self.params):
            sha256.update(np.asarray(leaf).tobytes())
        return sha256.hexdigest()
