import importlib.util
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_runs import write_run

from ping_llm.data.simulate import simulate

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("examples")
    simulate(place / "pings.parquet", probes=4, days=1.0, measurements=20, seed=0)
    write_run(place / "run")
    return place


def test_the_nearest_peer_is_found_among_those_given(made, capsys):
    rows = pq.read_table(made / "pings.parquet").to_pylist()
    source, version = rows[0]["src_addr"], rows[0]["ip_version"]
    peers = sorted({row["dst_addr"] for row in rows if row["ip_version"] == version})[:4]
    (made / "peers.txt").write_text("\n".join(peers))
    given = (str(made / "run"), source, str(made / "peers.txt"), str(made / "pings.parquet"))
    assert sorted(load("nearest_peer").main(*given)) == peers
    assert " ms " in capsys.readouterr().out


def test_every_measurement_gets_a_score(made):
    scores = load("anomaly_scores").main(str(made / "run"), str(made / "pings.parquet"))
    assert scores.shape == (20,)
    assert np.all(scores > 0)
