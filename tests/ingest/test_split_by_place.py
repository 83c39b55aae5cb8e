import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_tables import files_of, make_table

from ping_llm import addresses
from ping_llm.data.rows import SPLITS, ProbeRows
from ping_llm.errors import ConfigError, DataError
from ping_llm.ingest.prepare import prepare_data
from ping_llm.inspection.dataset import inspect_data


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """IPv4 sources 10.0.0.1 to 10.0.19.1, destinations 10.1.0.1 to 10.1.29.1; IPv6 is unknown."""
    place = tmp_path_factory.mktemp("places")
    pq.write_table(make_table(3000), place / "pings.parquet")
    lines = ["prefix,asn,country"]
    lines += [f"10.0.{i}.0/24,{64500 + i % 5},{'NL' if i % 2 else 'US'}" for i in range(20)]
    lines += [f"10.1.{i}.0/24,{64600 + i % 7},{'JP' if i % 2 else 'NL'}" for i in range(30)]
    (place / "prefixes.csv").write_text("\n".join(lines) + "\n")
    return place


def prepare(made, output, split="asn", **changes):
    changes = {"prefixes": made / "prefixes.csv", "test_fraction": 0.2, "workers": 1} | changes
    return prepare_data([made / "pings.parquet"], output=output, split=split, **changes)


def systems(output, split):
    """Returns the AS, or else the address, of both ends of all measurements of a split."""
    table = ProbeRows(output, split).to_table()
    found = []
    for end in (table.src, table.dst):
        for text in addresses.to_text(end):
            parts = text.split(".")
            number = int(parts[2]) if len(parts) == 4 else None
            base = 64500 + (number or 0) % 5 if parts[:2] == ["10", "0"] else 64600
            found.append(text if number is None else base + number % 7 * (base == 64600))
    return np.array(found, object).reshape(2, -1)


def test_all_addresses_of_an_autonomous_system_are_held_out_together(made, tmp_path):
    prepare(made, tmp_path / "rows")
    train = set(systems(tmp_path / "rows", "train").reshape(-1))
    test = systems(tmp_path / "rows", "test")
    assert test.size
    assert all(a not in train or b not in train for a, b in test.T)
    asn = {name for name in train if isinstance(name, int)}
    assert 0 < len(asn) < 12  # some are held out, and then no address of theirs is left
    (leakage,) = (
        check for check in inspect_data(tmp_path / "rows").checks if check.name == "splits apart"
    )
    assert leakage.ok


def test_a_region_is_a_country_and_workers_change_nothing(made, tmp_path):
    for workers in (1, 3):
        prepare(made, tmp_path / str(workers), "region", seed=1, workers=workers)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")
    counts = [len(ProbeRows(tmp_path / "1", split)) for split in SPLITS]
    assert counts[0]


def test_other_prefixes_on_the_same_output_are_refused_and_the_same_do_nothing(made, tmp_path):
    first = prepare(made, tmp_path / "rows")
    assert prepare(made, tmp_path / "rows") == first
    (tmp_path / "other.csv").write_text("prefix,asn\n10.0.0.0/8,1\n")
    with pytest.raises(ConfigError, match="prefixes="):
        prepare(made, tmp_path / "rows", prefixes=tmp_path / "other.csv")


def test_prefixes_that_do_not_fit_the_split_are_refused(made, tmp_path):
    with pytest.raises(ConfigError, match="--prefixes is for --split asn or region"):
        prepare(made, tmp_path / "rows", "pair")
    with pytest.raises(ConfigError, match="needed there"):
        prepare(made, tmp_path / "rows", prefixes=None)
    (tmp_path / "other.csv").write_text("prefix,asn\n10.0.0.0/8,1\n")
    with pytest.raises(DataError, match="has no country"):
        prepare(made, tmp_path / "rows", "region", prefixes=tmp_path / "other.csv")
    assert not (tmp_path / "rows").exists()
