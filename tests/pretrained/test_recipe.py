import hashlib

import pytest

from ping_llm.data.network import Network
from ping_llm.data.rows import ProbeRows
from ping_llm.errors import DataError
from ping_llm.pretrained import recipe
from ping_llm.runs import load_run
from ping_llm.simulation.simulate import simulate

SMALL = {
    "steps": 2,
    "batch_size": 4,
    "overrides": ["model.n_layers=1", "model.d_model=32", "model.d_ff=32", "eval_batches=1"],
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two files that give the same addresses to other nodes, and their recipe."""
    sources = {}
    for seed in range(2):
        path = tmp_path / f"{seed}.parquet"
        simulate(path, probes=40, days=1.0, measurements=3000, seed=0)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        sources[path.name] = recipe.Source(digest, flipped=128 * seed)
    monkeypatch.setattr(recipe, "SOURCES", sources)
    return tmp_path


def test_the_files_become_networks_of_their_own_and_the_export_knows_none(files):
    recipe.pretrain(files, files / "made", **SMALL)
    rows = ProbeRows(files / "made" / "rows", "train").to_table()
    parts = Network.of(rows).parts()
    assert len(parts) >= 2
    exported = files / "made" / "pretrained"
    assert sorted(path.name for path in exported.iterdir()) == ["config.json", "model.safetensors"]
    assert load_run(exported).config["train"]["grid_fraction"] == 1.0
    recipe.pretrain(files, files / "without", without="1.parquet", **SMALL)
    alone = ProbeRows(files / "without" / "rows", "train").to_table()
    assert len(alone) < len(rows)


def test_a_file_that_is_not_the_one_named_is_refused(files):
    (files / "0.parquet").write_bytes(b"else")
    with pytest.raises(DataError, match=r"0\.parquet has SHA-256 .*; get the file named"):
        recipe.pretrain(files, files / "made", **SMALL)
