import pytest

from ping_llm import addresses
from ping_llm.errors import DataError
from ping_llm.serve.places import Places
from ping_llm.storage import Location

HEADER = "prefix,name,latitude,longitude\n"


def read(tmp_path, text):
    file = tmp_path / "places.csv"
    file.write_text(text)
    return Places.read(Location.of(file))


def test_the_longest_prefix_says_where_an_address_is(tmp_path):
    lines = "10.0.0.0/8,Wide,1,2\n10.1.0.0/16,Near,3,4\n10.1.2.3,Here,5,6\nfd00::/16,Six,-7,8\n"
    places = read(tmp_path, HEADER + lines)
    nodes, _ = addresses.parse(["10.1.2.3", "10.1.2.4", "10.9.9.9", "11.0.0.1", "fd00::1"])
    found = places.of(nodes)
    assert [place and place.name for place in found] == ["Here", "Near", "Wide", None, "Six"]
    assert found[4] is not None
    assert (found[4].latitude, found[4].longitude) == (-7, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prefix,name,latitude\n", "lacks longitude"),
        ("name,latitude,longitude\n", "lacks address or prefix"),
        (HEADER + "10.0.0.0/8,A,1,2\n10.0.0.1/8,B,1,2\n", "line 3: 10.0.0.1/8 has host bits"),
        (HEADER + "10.0.0.1,A,91,2\n", "line 2: .* nowhere on Earth"),
        (HEADER + "10.0.0.1,A,north,2\n", "line 2: could not convert"),
        (HEADER + "10.0.0.1,A\n", "line 2"),
        (HEADER + "10.0.0.1,A,nan,2\n", "nowhere"),
    ],
)
def test_a_file_that_is_no_list_of_places_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, text)
