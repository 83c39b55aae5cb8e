"""Some nodes and a decoder with random weights, served."""

import dataclasses

import numpy as np
import pytest
import tiny_runs
from fastapi.testclient import TestClient

from ping_llm import MeasurementTable
from ping_llm.serve.app import Service, create_app


@pytest.fixture(scope="session")
def known():
    """Returns 4 sources measured to 6 destinations, 3 times each; one never answers."""
    rng = np.random.default_rng(0)
    src, dst, time = (each.ravel() for each in np.mgrid[0:4, 0:6, 0:3])
    rtt = 10.0 + 5 * np.abs(src - dst) + rng.random(len(src))
    columns = {
        "src_addr": [f"10.0.0.{i}" for i in src],
        "dst_addr": [f"10.0.1.{i}" for i in dst],
        "event_time": 1_700_000_000 + 1000 * time,
        "rtt": np.where((src == 3) & (dst == 5), -1, rtt),
    }
    return MeasurementTable.from_arrow(columns)


@pytest.fixture(scope="session")
def predictor(known):
    predictor = tiny_runs.predictor().knowing(known)
    # Calibrations of tests are remembered in memory, as those of a server are.
    model = dataclasses.replace(predictor.model, remembered={})
    return dataclasses.replace(predictor, model=model)


@pytest.fixture(scope="session")
def client(predictor):
    app = create_app(Service(predictor, model="run"))
    with TestClient(app, base_url="http://127.0.0.1:8400") as opened:
        yield opened
