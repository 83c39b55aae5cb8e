import numpy as np
from extraction_settings import settings
from hypothesis import given
from hypothesis import strategies as st

from ping_llm.activations.store import UnitPrompts
from ping_llm.extraction.batches import make_batches, row_widths


def prompts_of(lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    roles = np.zeros(len(tokens), np.uint8)
    return UnitPrompts(tokens, offsets, roles, [str(i) for i in range(len(lengths))], 0, 0)


@given(
    lengths=st.lists(st.integers(0, 100), max_size=60),
    batch_tokens=st.sampled_from([100, 256, 1000]),
)
def test_every_token_is_in_one_place_with_its_position_and_its_own_segment(lengths, batch_tokens):
    prompts = prompts_of(lengths)
    cfg = settings(max_length=100, batch_tokens=batch_tokens)
    seen = np.zeros(len(prompts.tokens), int)
    for batch in make_batches(prompts, cfg, values=8):
        assert batch.tokens.shape[1] in row_widths(cfg)
        assert batch.tokens.size <= batch_tokens
        real = np.zeros(batch.tokens.shape, bool)
        for row, column, length, start in batch.pieces.tolist():
            at = row, slice(column, column + length)
            assert not real[at].any()
            real[at] = True
            np.testing.assert_array_equal(batch.tokens[at], prompts.tokens[start : start + length])
            np.testing.assert_array_equal(batch.positions[at], np.arange(length))
            (segment,) = set(batch.segment_ids[at].tolist())
            assert (batch.segment_ids[row] == segment).sum() == length
            assert start in prompts.offsets
            seen[start : start + length] += 1
        np.testing.assert_array_equal(real, batch.segment_ids != 0)
    assert (seen == 1).all()


def test_long_prompts_get_wide_rows_and_short_ones_do_not():
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(100, 600, 200).tolist(), 5000, 12_000]
    cfg = settings(max_length=12_000, batch_tokens=16_384)
    batches = list(make_batches(prompts_of(lengths), cfg, values=8))
    assert {batch.tokens.shape[1] for batch in batches} == {2048, 8192, 12_000}
    narrow = [batch for batch in batches if batch.tokens.shape[1] == 2048]
    assert sum(len(batch.pieces) for batch in narrow) > 150


def test_there_is_little_padding_and_there_are_few_shapes():
    lengths = np.random.default_rng(0).integers(200, 1501, 400)
    cfg = settings(max_length=1500, batch_tokens=8192)
    batches = list(make_batches(prompts_of(lengths), cfg, values=8))
    padding = np.mean(np.concatenate([(batch.segment_ids == 0).ravel() for batch in batches]))
    assert padding < 0.03
    assert {batch.tokens.shape for batch in batches} <= {(4, 2048), (1, 2048)}


def test_finished_tokens_are_never_far_behind():
    """What the writer must hold is bounded, however long the unit is."""
    lengths = np.random.default_rng(0).integers(1, 1501, 3000)
    cfg = settings(max_length=1500, batch_tokens=8192)
    prompts = prompts_of(lengths)
    done = np.zeros(len(prompts.tokens), bool)
    furthest = 0
    for batch in make_batches(prompts, cfg, values=8):
        for _, _, length, start in batch.pieces.tolist():
            done[start : start + length] = True
        last = int(np.flatnonzero(done)[-1])
        furthest = max(furthest, last - int(np.argmin(done)) if not done.all() else 0)
    assert furthest < 4 * 32 * 2048
