import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ping_llm.packing import SHORTEST_SEGMENT, best_fit, next_token_batch, pack

lengths_and_capacity = st.integers(SHORTEST_SEGMENT, 300).flatmap(
    lambda capacity: st.tuples(
        st.lists(st.integers(SHORTEST_SEGMENT, capacity), max_size=60), st.just(capacity)
    )
)


@given(lengths_and_capacity)
def test_best_fit_places_every_segment_once_and_overfills_no_sequence(drawn):
    lengths, capacity = np.array(drawn[0], np.int64), drawn[1]
    sequences = best_fit(lengths, capacity)
    assert sorted(i for sequence in sequences for i in sequence) == list(range(len(lengths)))
    assert all(sequence and lengths[sequence].sum() <= capacity for sequence in sequences)


@given(lengths_and_capacity)
def test_best_fit_leaves_at_most_one_sequence_half_empty(drawn):
    lengths, capacity = np.array(drawn[0], np.int64), drawn[1]
    filled = [lengths[sequence].sum() for sequence in best_fit(lengths, capacity)]
    assert sum(2 * n <= capacity for n in filled) <= 1


def test_best_fit_puts_a_segment_where_the_least_room_is_left():
    assert best_fit(np.array([50, 30, 20, 70]), 100) == [[3, 1], [0, 2]]
    assert best_fit(np.array([100, 100]), 100) == [[0], [1]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=200), st.integers(40, 100))
def test_best_fit_puts_no_more_segments_in_a_sequence_than_kernels_have_room_for(sizes, capacity):
    sequences = best_fit(np.array(sizes), capacity)
    assert max(map(len, sequences)) <= max(capacity // SHORTEST_SEGMENT, 1)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=6))
def test_packed_segments_stand_whole_and_in_order_with_positions_from_zero(sizes):
    counter = iter(range(1, 10_000))
    sequences = [[np.array([next(counter) for _ in range(n)]) for n in s] for s in sizes]
    tokens, segment_ids, positions = pack(sequences, 48)
    assert tokens.shape == segment_ids.shape == positions.shape == (len(sizes), 48)
    assert tokens.dtype == segment_ids.dtype == positions.dtype == np.int32
    for b, sequence in enumerate(sequences):
        for s, segment in enumerate(sequence, start=1):
            at = np.flatnonzero(segment_ids[b] == s)
            assert at.tolist() == list(range(at[0], at[0] + len(segment)))
            np.testing.assert_array_equal(tokens[b, at], segment)
            np.testing.assert_array_equal(positions[b, at], np.arange(len(segment)))
        used = sum(map(len, sequence))
        assert not segment_ids[b, used:].any()
        assert not tokens[b, used:].any()
        assert not positions[b, used:].any()


def test_the_mask_is_one_exactly_where_the_target_continues_the_segment_of_its_input():
    packed = pack([[np.array([7, 8, 9]), np.array([5, 6])], [np.array([4])]], 7)
    batch = next_token_batch(*packed)
    assert batch.inputs.tolist() == [[7, 8, 9, 5, 6, 0], [4, 0, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [[8, 9, 5, 6, 0, 0], [0] * 6]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0] * 6]
    assert batch.mask.tolist() == [[1, 1, 0, 1, 0, 0], [0] * 6]
    assert batch.mask.dtype == np.float32


@pytest.mark.parametrize("length", [16, 70_000])
def test_a_full_sequence_has_no_padding(length):
    tokens, segment_ids, positions = pack([[np.arange(length)]], length)
    assert segment_ids.all()
    assert positions[0, -1] == tokens[0, -1] == length - 1
