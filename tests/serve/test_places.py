from ping_llm import addresses
from ping_llm.places import Places
from ping_llm.serve.places import Place, places_of


def test_nodes_are_where_their_coordinates_are(tmp_path):
    """Neither a node without a prefix nor one whose prefix has no coordinates is anywhere."""
    lines = "10.0.0.0/8,Wide,,\n10.1.0.0/16,Near,3,4\n10.1.2.3,Here,5,6\nfd00::/16,Six,-7,8\n"
    (tmp_path / "places.csv").write_text("prefix,name,latitude,longitude\n" + lines)
    nodes, _ = addresses.parse(["10.1.2.3", "10.1.2.4", "10.9.9.9", "11.0.0.1", "fd00::1"])
    places = Places.read(str(tmp_path / "places.csv"))
    expected = [Place("Here", 5, 6), Place("Near", 3, 4), None, None, Place("Six", -7, 8)]
    assert places_of(places, nodes) == expected
    assert places_of(None, nodes) == [None] * 5
