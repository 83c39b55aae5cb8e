import json

import pytest
from click.testing import CliRunner

from ping_llm.cli import cli
from ping_llm.ingest.prepare import prepare_data
from ping_llm.inspection.dataset import inspect_data

PREFIXES = """\
prefix,asn,country,latitude,longitude
192.0.2.0/24,64500,NL,52.37,4.9
198.51.100.0/24,64501,US,40.71,-74.01
203.0.113.0/24,64502,,,
"""
# From Amsterdam to New York and back light takes 39.1 ms.
PINGS = """\
event_time,src_addr,dst_addr,ip_version,rtt
2024-05-01T00:00:00Z,192.0.2.1,198.51.100.1,4,85.0
2024-05-01T00:01:00Z,192.0.2.1,198.51.100.1,4,12.5
2024-05-01T00:02:00Z,192.0.2.2,198.51.100.1,4,30.25
2024-05-01T00:03:00Z,198.51.100.1,192.0.2.2,4,-1
2024-05-01T00:04:00Z,203.0.113.1,192.0.2.2,4,0.5
2024-05-01T00:05:00Z,10.0.0.1,192.0.2.2,4,0.5
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "pings.csv").write_text(PINGS)
    (tmp_path / "prefixes.csv").write_text(PREFIXES)
    return tmp_path


def test_rtts_that_outrun_light_are_told_with_the_worst(files):
    for path in (files / "pings.csv", files / "rows"):
        result = inspect_data(path, prefixes=files / "prefixes.csv")
        (light,) = (check for check in result.checks if check.name == "no RTT outruns light")
        assert (light.ok, light.count) == (False, 2)
        assert "2 of 3 between known coordinates" in light.detail
        assert "192.0.2.1 -> 198.51.100.1 took 12.50 ms over 5,8" in light.detail
        prepare_data([files / "pings.csv"], output=files / "rows", test_fraction=0.0, workers=1)


def test_what_is_known_of_sources_is_counted(files):
    result = inspect_data(files / "pings.csv", prefixes=files / "prefixes.csv")
    assert result.places["known_fraction"] == pytest.approx(5 / 6)
    counts = {each["name"]: each["measurements"] for each in result.places["country"]}
    assert counts == {"NL": 3, "not known": 2, "US": 1}
    systems = {each["name"]: each for each in result.places["asn"]}
    assert systems["AS64500"]["mean_rtt_ms"] == pytest.approx((85 + 12.5 + 30.25) / 3)
    assert systems["AS64501"]["mean_rtt_ms"] is None
    assert inspect_data(files / "pings.csv").places is None


def test_the_terminal_and_the_page_show_it(files):
    given = ["inspect-data", str(files / "pings.csv"), "--prefixes", str(files / "prefixes.csv")]
    text = CliRunner().invoke(cli, [*given, "--report", str(files / "page.html")])
    assert text.exit_code == 0, text.output
    for shown in (text.stdout, (files / "page.html").read_text()):
        for word in ("no RTT outruns light", "AS64500", "top countries", "83.33 %"):
            assert word in shown
    json.loads(CliRunner().invoke(cli, [*given, "--json"]).stdout)


def test_a_list_without_coordinates_or_countries_leaves_these_out(files):
    (files / "pyasn.dat").write_text("192.0.2.0/24\t64500\n")
    result = inspect_data(files / "pings.csv", prefixes=files / "pyasn.dat")
    assert set(result.places) == {"known_fraction", "asn"}
    assert "no RTT outruns light" not in {check.name for check in result.checks}
