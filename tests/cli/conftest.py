"""What the tests of commands share."""

import emulators
import pytest

from ping_llm.storage import Location


@pytest.fixture(params=["s3", "gs"])
def bucket(request, tmp_path, monkeypatch):
    """An object store; emulators are found through the environment."""
    emulator = {"s3": emulators.s3, "gs": emulators.gcs}[request.param]
    with open(tmp_path / "log", "w") as log, emulator(log) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield Location.of({"s3": "s3://bucket", "gs": "gs://anonymous@bucket"}[request.param])
