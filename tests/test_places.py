import ipaddress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ping_llm import addresses
from ping_llm.errors import DataError
from ping_llm.places import Places, great_circle_km

CSV = """\
prefix,asn,country,place,latitude,longitude
192.0.2.0/24,AS64500,NL,Amsterdam,52.37,4.9
192.0.2.128/25,64501,US,"New York, NY",40.71,-74.01
2001:db8::/32,64502,JP,Tokyo,35.68,139.69
0.0.0.0/0,64496,,,,
"""


@pytest.fixture
def places(tmp_path):
    (tmp_path / "prefixes.csv").write_text(CSV)
    return Places.read(str(tmp_path / "prefixes.csv"))


def ends(*texts):
    return addresses.parse(texts)[0]


def test_an_address_is_where_its_longest_prefix_is(places):
    asked = ends("192.0.2.1", "192.0.2.129", "2001:db8::7", "198.51.100.1", "2001:db9::1")
    assert places.labels(asked, "asn").tolist() == ["AS64500", "AS64501", "AS64502", "AS64496", ""]
    assert places.labels(asked, "country").tolist() == ["NL", "US", "JP", "", ""]
    assert places.labels(asked, "place")[1] == "New York, NY"


@settings(max_examples=40)
@given(st.data())
def test_matches_are_those_of_the_standard_library(tmp_path_factory, data):
    """Prefixes nested any way, of both families, are looked through one by one."""
    draw = data.draw
    networks = {
        ipaddress.ip_network((base << shift, bits), strict=False)
        for base, bits, shift in draw(
            st.lists(
                st.tuples(st.integers(0, 255), st.integers(0, 32), st.sampled_from([0, 16, 24])),
                min_size=1,
                max_size=12,
            )
        )
    }
    networks |= {
        ipaddress.ip_network((base << 112, bits), strict=False)
        for base, bits in draw(st.lists(st.tuples(st.integers(1, 999), st.integers(1, 128))))
    }
    ordered = sorted(networks, key=str)
    path = tmp_path_factory.mktemp("places") / "pyasn.dat"
    path.write_text("; made here\n" + "".join(f"{n}\t{i}\n" for i, n in enumerate(ordered)))
    asked = [ipaddress.ip_address(draw(st.integers(0, 2**32 - 1))) for _ in range(20)]
    asked += [network[draw(st.integers(0, 3)) % network.num_addresses] for network in ordered]
    found = Places.read(str(path)).find(ends(*map(str, asked)))
    for address, index in zip(asked, found.tolist(), strict=True):
        mapped = getattr(address, "ipv4_mapped", None)
        if mapped is not None:
            continue
        around = [n for n in ordered if n.version == address.version and address in n]
        best = max(around, key=lambda n: n.prefixlen, default=None)
        assert (ordered[index] if index >= 0 else None) == best


def test_distances_are_those_of_cities(places):
    """Amsterdam to New York is 5,860 km, to Tokyo 9,290 km."""
    src, dst = ends("192.0.2.1", "192.0.2.1", "192.0.2.1"), ends("192.0.2.200", "::1", "192.0.2.2")
    np.testing.assert_allclose(places.distance_km(src, dst)[[0, 2]], [5860, 0], rtol=0.01)
    assert np.isnan(places.distance_km(src, dst)[1])
    assert places.distance_km(src[:1], ends("2001:db8::1"))[0] == pytest.approx(9290, rel=0.01)
    halfway = great_circle_km(np.array([[0.0, 0.0]]), np.array([[0.0, 180.0]]))
    assert halfway[0] == pytest.approx(20015, rel=0.001)


def test_addresses_of_one_as_share_a_group_and_unknown_ones_have_their_own(places):
    asked = ends("192.0.2.1", "192.0.2.2", "192.0.2.129", "2001:db9::1", "2001:db9::2")
    groups = [row.tobytes() for row in places.groups(asked, "asn")]
    assert groups[0] == groups[1]
    assert len(set(groups)) == 4
    assert groups[3] == asked[3].tobytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prefix"),
        ("prefix,asn\n", "holds no prefix"),
        ("prefix,asn\n192.0.2.0/33,1\n", r"line 2: '192.0.2.0/33' has no length up to 32"),
        ("prefix,asn\n192.0.2.0/,1\n", "has no length"),
        ("prefix,address\n192.0.2.0/24,192.0.2.1\n", "each once"),
        ("prefix,latitude,longitude\n10.0.0.0/8,nan,0\n", r"\(nan, 0\) is no latitude"),
        ("prefix,asn\n\n192.0.2.1/24,1\n", r"line 3: '192.0.2.1/24' has bits set"),
        ("prefix,asn\nhere/24,1\n", "'here/24' is no prefix"),
        ("prefix,asn\n10.0.0.0/8,1\n10.0.0.0/8,2\n", "line 3: 10.0.0.0/8 stands in line 2"),
        ("prefix,asn\n10.0.0.0/8\n", "line 2: 1 values, expected 2"),
        ("prefix,latitude,longitude\n10.0.0.0/8,91,0\n", r"line 2: \(91, 0\) is no latitude"),
        ("prefix,latitude,longitude\n10.0.0.0/8,north,0\n", r"\(north, 0\) is no latitude"),
        ("prefix,latitude,longitude\n10.0.0.0/8,50,\n", r"\(50, \) is no latitude"),
        ("10.0.0.0/8\t1\t2\n", "line 1: .* is no prefix and AS number"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_line(tmp_path, text, message):
    (tmp_path / "prefixes").write_text(text)
    with pytest.raises(DataError, match=message):
        Places.read(str(tmp_path / "prefixes"))


def test_columns_may_be_called_address_and_name(tmp_path):
    (tmp_path / "places.csv").write_text("address,name\n10.1.2.3,Here\nfd00::/16,Six\n")
    places = Places.read(str(tmp_path / "places.csv"))
    assert places.labels(ends("10.1.2.3", "10.1.2.4", "fd00::1"), "place").tolist() == [
        "Here",
        "",
        "Six",
    ]


def test_what_the_file_does_not_tell_is_asked_for(tmp_path):
    (tmp_path / "pyasn.dat").write_text("10.0.0.0/8\t64500\n")
    with pytest.raises(DataError, match="has no country"):
        Places.read(str(tmp_path / "pyasn.dat")).labels(ends("10.0.0.1"), "country")
