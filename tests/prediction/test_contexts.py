import dataclasses

import numpy as np
import pytest

from ping_llm import tokenizer
from ping_llm.measurements import NO_TIME, MeasurementTable
from ping_llm.prediction.contexts import encode_prompts, from_groups, random_of_source, same_source
from ping_llm.prediction.rtt import questions

T0 = 1_600_000_000


def history(src, n, *, times):
    """Returns n measurements from `src`; `times` is None, or which of them have a time."""
    host = "2001:db8::{}" if ":" in src else "10.0.1.{}"
    table = questions([src] * n, [host.format(i + 1) for i in range(n)], [T0 + 9 * n] * n)
    has_time = np.zeros(n, bool) if times is None else np.array(times)
    time = np.where(has_time, T0 + np.arange(n), NO_TIME)
    return dataclasses.replace(table, rtt=np.linspace(1, 50, n, dtype=np.float32), time=time)


@pytest.mark.parametrize("times", [None, [True] * 3, [True, False, False], [False, True, False]])
@pytest.mark.parametrize("when", [None, T0 + 60])
@pytest.mark.parametrize("asker", ["10.0.0.1", "10.0.0.2", "2001:db8::77"])
def test_a_prompt_is_one_segment_cut_before_its_result(times, when, asker):
    known = history("10.0.0.1", 3, times=times)
    other = "2001:db8::1" if ":" in asker else "10.0.9.9"
    query = questions([asker], [other], [when])
    prompts = encode_prompts(from_groups(known, np.zeros(3, int), np.zeros(1, int)), query)
    whole = MeasurementTable.concat([known, dataclasses.replace(query, rtt=np.ones(1, np.float32))])
    order = np.tile(np.arange(4, dtype=np.uint8), (4, 1))
    tokens, _ = tokenizer.encode(whole, segment_offsets=np.array([0, 4]), field_order=order)
    found = np.concatenate([prompts.context_tokens, prompts.query_tokens])
    assert found.tolist() == tokens[:-2].tolist()
    named = np.isin(prompts.query_tokens, [tokenizer.SRC_IPV4, tokenizer.SRC_IPV6])
    assert np.count_nonzero(named) == (asker != "10.0.0.1")


def test_questions_with_and_without_a_context_keep_their_places():
    known = history("10.0.0.1", 2, times=[True, True])
    query = questions(["10.0.0.3", "10.0.0.1", "10.0.0.3"], ["10.0.9.9"] * 3, [None, T0, T0])
    prompts = encode_prompts(from_groups(known, np.zeros(2, int), np.array([-1, 0, -1])), query)
    lengths = np.diff(prompts.query_offsets)
    # START and RTT_START, 5 tokens of an address, 9 of a first time, 5 or 9 of a later one.
    assert lengths.tolist() == [12, 2 + 5 + 9, 12 + 9]
    parts = np.split(prompts.query_tokens, prompts.query_offsets[1:-1])
    assert all(part[0] == tokenizer.MEASUREMENT_START for part in parts)
    assert all(part[-1] == tokenizer.RTT_START for part in parts)


@pytest.mark.parametrize("source", ["10.0.0.1", "2001:db8::1"])
@pytest.mark.parametrize("make", ["newest", "random"])
def test_a_context_fits_its_room_and_leaves_none_for_another_measurement(source, make):
    known = history(source, 80, times=[True] * 80)
    known = dataclasses.replace(known, time=T0 + 10**4 * np.arange(80))
    query, room = known.slice(0, 1), 300
    if make == "newest":
        contexts = same_source(known, query, max_tokens=room)
    else:
        contexts = random_of_source(known, query, max_tokens=room, seed=0)
    used = encode_prompts(contexts, query).context_lengths()[0]
    more = tokenizer.BARE_TOKENS[int(known.family[0])] + tokenizer.NEXT_TIME_TOKENS
    assert room - more - 4 < used <= room
