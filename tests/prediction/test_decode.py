import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_runs import decoder

from ping_llm.prediction import decode


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 267, shape).astype(np.int32)


def places(start, *shape):
    return np.broadcast_to(start + np.arange(shape[-1]), shape).astype(np.int32)


@pytest.mark.parametrize("window", [None, 4])
def test_a_tree_of_cached_tokens_has_the_logits_of_whole_sequences(window):
    """Two prefixes, three branches of each, two leaves of each branch; branch 4 is shorter."""
    slides = {} if window is None else {"sliding_window": window, "sliding_layers": (True, False)}
    graphdef, params = decoder(**slides)
    prefix, branch = random_tokens(2, 7), random_tokens(6, 5, seed=1)
    leaf = random_tokens(12, 1, seed=2)
    at = places(7, 6, 5).copy()
    at[4, 3:] = -1
    ends = np.where(np.arange(6) == 4, 3, 5)
    leaf_at = np.repeat(7 + ends, 2)[:, None].astype(np.int32)
    whole = np.zeros((12, 13), np.int32)  # what comes after a sequence does not touch it
    for i in range(12):
        b = i // 2
        parts = prefix[b // 3], branch[b, : ends[b]], leaf[i]
        whole[i, : 7 + ends[b] + 1] = np.concatenate(parts)

    @jax.jit
    def both(params):
        model = nnx.merge(graphdef, params)
        _, before = decode.read(model, prefix, places(0, 2, 7))
        x, here = decode.read(model, branch, at, (before,))
        y, _ = decode.read(model, leaf, leaf_at, (before, here))
        return model.logits(x), model.logits(y), model(jnp.asarray(whole))

    of_branch, of_leaf, expected = both(params)
    for i in range(12):
        b, end = i // 2, ends[i // 2]
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        close(of_leaf[i, 0], expected[i, 7 + end])
        close(of_branch[b, :end], expected[i, 7 : 7 + end])


def test_tokens_put_one_by_one_into_a_cache_have_the_logits_of_the_whole():
    graphdef, params = decoder()
    tokens = random_tokens(3, 6)

    @jax.jit
    def step(params, cache, token, place):
        model = nnx.merge(graphdef, params)
        x, new = decode.read(model, token, jnp.full((3, 1), place), (cache,))
        return decode.append(cache, new, place), model.logits(x)[:, 0]

    cache, logits = decode.empty_cache(nnx.merge(graphdef, params), 3, 8), []
    for i in range(6):
        cache, here = step(params, cache, tokens[:, i : i + 1], i)
        logits.append(here)
    expected = jax.jit(lambda params: nnx.merge(graphdef, params)(jnp.asarray(tokens)))(params)
    np.testing.assert_allclose(np.stack(logits, 1), expected, rtol=1e-5, atol=1e-5)
