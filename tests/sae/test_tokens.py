import itertools

import numpy as np
import pytest

from ping_llm.activations.reader import ActivationReader
from ping_llm.errors import ConfigError
from ping_llm.sae.tokens import TokenChoice, TokenStream


def choice(**changes):
    given = {"seed": 3, "held_out_tokens": 100, "min_position": 1, "special_tokens": False}
    return TokenChoice(**given | changes)


@pytest.fixture(scope="module")
def reader(planted_store):
    return ActivationReader(planted_store, layer=1)


def stream(reader, *, batch_size=64, buffer_mb=0.05, **changes):
    return TokenStream([reader], choice(**changes), batch_size=batch_size, buffer_mb=buffer_mb)


def take(batches, n):
    return [rows for rows, *_ in itertools.islice(batches, n)]


@pytest.mark.parametrize("first", [1, 7, 30, 61])
def test_a_batch_depends_on_its_number_alone(reader, first):
    tokens = stream(reader)
    assert tokens.per_epoch < 40  # so that some of these are in a later epoch
    straight = take(tokens.batches(), first + 3)
    for a, b in zip(take(tokens.batches(first), 3), straight[first:], strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_epoch_has_each_token_once_and_none_that_is_left_out(reader):
    held = choice().held_out(reader)
    rows = reader.rows(slice(None))
    wanted = (rows.roles == 0) & (rows.positions >= 1)
    for first, stop in held.tolist():
        wanted[first:stop] = False
    tokens = stream(reader, batch_size=1)
    assert tokens.tokens == tokens.per_epoch == wanted.sum()
    seen = np.concatenate(take(tokens.batches(), tokens.per_epoch))
    expected = reader[wanted]
    assert not np.array_equal(seen, expected)
    np.testing.assert_array_equal(np.sort(seen[:, 0]), np.sort(expected[:, 0]))
    again = np.concatenate(take(tokens.batches(tokens.per_epoch), tokens.per_epoch))
    assert not np.array_equal(again, seen)
    np.testing.assert_array_equal(np.sort(again[:, 0]), np.sort(expected[:, 0]))


def test_layers_show_the_same_tokens(planted_store):
    readers = [ActivationReader(planted_store, layer=layer) for layer in (1, 4)]
    tokens = TokenStream(readers, choice(), batch_size=50, buffer_mb=0.05)
    numbers = {row.tobytes(): number for number, row in enumerate(readers[0][:])}
    ones, fours = next(tokens.batches())
    rows = [numbers[row.tobytes()] for row in ones]
    np.testing.assert_array_equal(fours, readers[1][rows])


def test_held_out_prompts_are_whole_and_few(reader):
    offsets = reader.sample_offsets()
    held = choice(held_out_tokens=10**9).held_out(reader)
    assert len(held) == 6  # a tenth of 60
    assert set(map(tuple, held.tolist())) <= set(itertools.pairwise(offsets.tolist()))
    assert len(choice(held_out_tokens=1).held_out(reader)) == 1
    assert not np.array_equal(choice(seed=4, held_out_tokens=10**9).held_out(reader), held)


def test_a_batch_larger_than_the_store_is_refused(reader):
    with pytest.raises(ConfigError, match=r"batch_size=100000 is more than the \d+ tokens"):
        stream(reader, batch_size=100_000)
