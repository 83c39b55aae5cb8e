import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ping_llm.models import layers
from ping_llm.models.config import DecoderConfig, RopeScaling

SHAPE = dict(vocab_size=11, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=64)
PLAIN = DecoderConfig(**SHAPE, dtype="float32")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 100), st.integers(0, 2**32 - 1))
def test_a_rotated_product_depends_on_the_distance_only(start, distance, seed):
    q, k = np.random.default_rng(seed).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def product(q_position, k_position):
        q_at, k_at = (jnp.full((1, 1), at) for at in (q_position, k_position))
        rotated_q = layers.rotate(jnp.asarray(q), *layers.rope_angles(PLAIN, q_at))
        return jnp.vdot(rotated_q, layers.rotate(jnp.asarray(k), *layers.rope_angles(PLAIN, k_at)))

    near, far = product(distance, 0), product(start + distance, start)
    np.testing.assert_allclose(near, far, atol=0.02)  # float32 angles of up to 10,100 radians


def yarn(**changes):
    fields = dict(factor=4.0, original_max_positions=32_768) | changes
    shape = SHAPE | dict(head_dim=128)
    return DecoderConfig(**shape, rope_theta=1e6, rope_scaling=RopeScaling(**fields))


def test_yarn_keeps_fast_dimensions_and_divides_slow_ones():
    shape = SHAPE | dict(head_dim=128)
    plain, _ = layers.rope_frequencies(DecoderConfig(**shape, rope_theta=1e6))
    scaled, attention_factor = layers.rope_frequencies(yarn())
    # Qwen2.5's setting. Bounds by the paper's formula: 23.6 and 39.7, rounded outwards.
    np.testing.assert_allclose(scaled[:24], plain[:24], rtol=1e-6)
    np.testing.assert_allclose(scaled[40:], plain[40:] / 4, rtol=1e-6)
    assert np.all(scaled[24:40] < plain[24:40])
    assert np.all(scaled[24:40] > plain[24:40] / 4)
    assert attention_factor == pytest.approx(0.1 * math.log(4) + 1)


def test_yarn_takes_its_attention_factor_from_what_is_given():
    assert layers.rope_frequencies(yarn(attention_factor=1.5))[1] == 1.5
    both = layers.rope_frequencies(yarn(factor=40.0, mscale=0.707, mscale_all_dim=1.0))[1]
    expected = (0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1)
    assert both == pytest.approx(expected)


def test_yarn_of_factor_one_changes_nothing():
    shape = SHAPE | dict(head_dim=128)
    plain, _ = layers.rope_frequencies(DecoderConfig(**shape, rope_theta=1e6))
    scaled, attention_factor = layers.rope_frequencies(yarn(factor=1.0))
    np.testing.assert_allclose(scaled, plain, rtol=1e-6)
    assert attention_factor == 1.0
