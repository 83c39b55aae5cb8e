import numpy as np
import pytest

from ping_llm import tokenizer
from ping_llm.measurements import MeasurementTable
from ping_llm.sae.features import FeatureStatistics, associations
from ping_llm.sae.properties import TokenProperty, token_properties


def statistics(active, *properties):
    """Returns what is known of one feature, active on tokens [n], of properties [n] each."""
    active = np.asarray(active, bool)
    places = properties[0]
    joint, totals = [], []
    for index, each in enumerate(properties):
        code, size = places.codes, len(places.categories)
        if index:
            code, size = code * len(each.categories) + each.codes, size * len(each.categories)
        shape = (size,) if index == 0 else (len(places.categories), -1)
        joint.append(np.bincount(code[active], minlength=size).reshape(1, *shape))
        totals.append(np.bincount(code, minlength=size).reshape(shape))
    one, none = np.ones(1), np.zeros((1, 1))
    counts = np.array([active.sum()])
    return FeatureStatistics(
        len(active), counts, one, one, none, none, list(properties), joint, totals
    )


def random_properties(n):
    rng = np.random.default_rng(0)
    place = TokenProperty.of("place", rng.choice(["head", "byte"], n).tolist())
    family = TokenProperty.of("family", rng.choice(["IPv4", "IPv6"], n, p=[0.8, 0.2]).tolist())
    hour = TokenProperty.of("hour", [f"{h}" for h in rng.integers(0, 24, n)])
    return place, family, hour


def test_a_feature_goes_with_what_decides_it_and_with_nothing_else():
    place, family, hour = random_properties(20_000)
    is_v6 = family.codes == family.categories.index("IPv6")
    is_byte = place.codes == place.categories.index("byte")
    first, second, third = associations(statistics(is_v6 & is_byte, place, family, hour), 0)
    assert first.property == "place"
    assert first.category == "byte"
    assert first.within == 1.0
    assert second.property == "family"
    assert second.category == "IPv6"
    assert second.within == 1.0
    assert second.base == pytest.approx(0.2, abs=0.02)
    # Once place and family are known, nothing is left to know of it.
    assert first.share + second.share == pytest.approx(1.0, abs=1e-3)
    assert third.property == "hour"
    assert third.share < 1e-3


def test_few_tokens_do_not_make_a_name():
    # 30 tokens in 24 hours: by themselves, they would say much of any feature.
    place, family, hour = random_properties(200)
    active = np.random.default_rng(1).random(200) < 0.15
    named = {
        each.property: each for each in associations(statistics(active, place, family, hour), 0)
    }
    assert named["hour"].share < 0.1


def test_a_feature_that_is_never_active_goes_with_nothing():
    assert associations(statistics(np.zeros(200), *random_properties(200)), 0) == []


def test_tokens_are_described_by_their_measurement():
    table = MeasurementTable.from_arrow(
        {
            "src_addr": ["192.0.2.1", "192.0.2.1", "2001:db8::1"],
            "dst_addr": ["198.51.100.9", "198.51.100.9", "2001:db8:7::2"],
            "event_time": [7 * 3600 + 59 * 60, None, 90_000],
            "rtt": [12.5, -1.0, 431.0],
        }
    )
    order = np.tile(np.arange(4, dtype=np.uint8), (3, 1))
    tokens, _ = tokenizer.encode(table, segment_offsets=np.array([0, 3]), field_order=order)
    named = {each.name: each for each in token_properties([tokens.astype(np.int32)])}
    starts = np.flatnonzero(tokens == tokenizer.MEASUREMENT_START)

    def values(name, at):
        each = named[name]
        return [each.categories[code] for code in each.codes[at]]

    assert values("family", starts) == ["IPv4", "IPv4", "IPv6"]
    assert values("result", starts) == ["answered", "failed", "answered"]
    assert values("RTT band", starts) == ["10-30 ms", "failed", "over 300 ms"]
    assert values("hour", starts) == ["07 h UTC", "untimed", "01 h UTC"]
    assert values("source prefix", starts) == ["192.0.0.0/16", "192.0.0.0/16", "2001:db8::/32"]
    assert values("destination prefix", starts) == [*["198.51.0.0/16"] * 2, "2001:db8::/32"]
    places = values("place", slice(None))
    assert places[:7] == [
        "MEASUREMENT_START",
        "SRC_IPV4",
        *(f"source byte {i}" for i in (1, 2, 3, 4)),
        "DST_IPV4",
    ]
    assert places[-2:] == ["rtt byte 1", "rtt byte 2"]
    assert len(places) == len(tokens)


def test_what_is_no_measurement_is_unknown():
    named = {each.name: each for each in token_properties([np.array([0, 9, 300], np.int32)])}
    assert named["family"].categories == ["unknown"]


def test_rare_categories_are_one():
    each = TokenProperty.of("prefix", ["a"] * 5 + ["b"] * 3 + ["c", "d"], most=2)
    assert each.categories == ["a", "b", "other"]
    assert each.codes.tolist() == [0] * 5 + [1] * 3 + [2, 2]
