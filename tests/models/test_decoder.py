import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ping_llm.models.config import SITES, DecoderConfig
from ping_llm.models.decoder import Decoder
from tests.models.test_attention import reference_attention

SHAPE = dict(vocab_size=31, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=24)
CONFIGS = {
    "plain": DecoderConfig(**SHAPE, dtype="float32"),
    "qwen2": DecoderConfig(**SHAPE, dtype="float32", qkv_bias=True, tie_embeddings=False),
    "qwen3": DecoderConfig(**SHAPE, dtype="float32", qk_norm=True),
    "sliding": DecoderConfig(
        **SHAPE,
        dtype="float32",
        sliding_window=4,
        sliding_layers=(True, False),
        logit_softcap=5.0,
        remat=True,
    ),
}


def random_decoder(cfg, *, seed=0):
    """A decoder with weights far larger than training starts from, so that a leak would show."""
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        mean = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(rng.normal(mean, 0.3, leaf.shape), leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, shapes))


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    return random_decoder(CONFIGS[request.param])


@jax.jit
def logits_of(model, tokens, segment_ids, positions):
    return model(tokens, segment_ids, positions)


def packed(seed=0):
    """Tokens of two rows: segments of 5 and 6 and a padded place; segments of 3, 2 and 7."""
    tokens = np.random.default_rng(seed).integers(0, 31, (2, 12)).astype(np.int32)
    lengths, ids_of = [[5, 6, 1], [3, 2, 7]], [[1, 2, 0], [1, 2, 3]]
    segment_ids = np.array([np.repeat(ids, n) for ids, n in zip(ids_of, lengths, strict=True)])
    positions = np.array([np.concatenate([np.arange(n) for n in row]) for row in lengths])
    return tokens, segment_ids, positions


def test_the_parameter_count_is_that_of_the_tree(model):
    leaves = jax.tree.leaves(nnx.state(model))
    assert sum(leaf.size for leaf in leaves) == model.cfg.parameter_count()


def test_logits_do_not_see_the_future(model):
    tokens, segment_ids, positions = packed()
    later = tokens.copy()
    later[:, 7:] = (later[:, 7:] + 1) % 31
    before, after = (logits_of(model, rows, segment_ids, positions) for rows in (tokens, later))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert not np.allclose(before[:, 7:], after[:, 7:])


def test_a_segment_does_not_see_another(model):
    tokens, segment_ids, positions = packed()
    changed = np.where(segment_ids == 1, (tokens + 1) % 31, tokens)
    before, after = (logits_of(model, rows, segment_ids, positions) for rows in (tokens, changed))
    np.testing.assert_array_equal(before[segment_ids != 1], after[segment_ids != 1])
    assert not np.allclose(before[segment_ids == 1], after[segment_ids == 1])


def test_packed_equals_separate(model):
    tokens, segment_ids, positions = packed()
    together = logits_of(model, tokens, segment_ids, positions)
    for row, segment in [(0, 1), (0, 2), (1, 3)]:
        here = segment_ids[row] == segment
        length = here.sum()
        alone = np.zeros((2, 12), np.int32)
        alone[0, :length] = tokens[row, here]
        own_segment = (np.arange(12) < length) * np.ones((2, 1), np.int32)
        separate = logits_of(model, alone, own_segment, np.tile(np.arange(12), (2, 1)))
        np.testing.assert_allclose(together[row, here], separate[0, :length], atol=2e-5)


def test_without_segments_a_row_is_one():
    model, (tokens, _, _) = random_decoder(CONFIGS["plain"]), packed()
    positions = np.tile(np.arange(12), (2, 1))
    whole = logits_of(model, tokens, np.ones_like(tokens), positions)
    np.testing.assert_allclose(jax.jit(lambda rows: model(rows))(tokens), whole, atol=1e-5)


def test_logits_are_float32_also_from_bfloat16():
    cfg = dataclasses.replace(CONFIGS["plain"], dtype="bfloat16")
    assert jax.eval_shape(logits_of, random_decoder(cfg), *packed()).dtype == jnp.float32


def test_a_soft_cap_bounds_the_logits():
    cfg = CONFIGS["plain"]
    tight = dataclasses.replace(cfg, logit_softcap=2.0)
    loose = logits_of(random_decoder(cfg), *packed())
    capped = logits_of(random_decoder(tight), *packed())
    np.testing.assert_allclose(capped, 2.0 * np.tanh(loose / 2.0), atol=1e-5)


def test_logits_equal_a_plain_numpy_transformer():
    cfg = CONFIGS["qwen2"]
    model = random_decoder(cfg)
    weights = nnx.to_pure_dict(nnx.state(model))
    tokens, segment_ids, positions = packed()

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + cfg.rms_norm_eps) * scale

    def rope(x):  # complex rotation of (first half, second half) pairs
        angles = positions[..., None, None] * cfg.rope_theta ** -(np.arange(4) / 4)
        turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], -1)

    x = np.asarray(weights["embed"]["embedding"])[tokens].astype(np.float64)
    for layer in range(cfg.n_layers):
        block = jax.tree.map(lambda w: np.asarray(w[layer], np.float64), weights["blocks"])  # noqa: B023
        h = norm(x, block["attn_norm"]["scale"])
        q, k, v = (
            (h @ block["attn"][name]["kernel"] + block["attn"][name]["bias"]).reshape(2, 12, -1, 8)
            for name in "qkv"
        )
        attended = reference_attention(rope(q), rope(k), v, segment_ids)
        x = x + attended.reshape(2, 12, -1) @ block["attn"]["out"]["kernel"]
        h = norm(x, block["mlp_norm"]["scale"])
        gate, up = (h @ block["mlp"][name]["kernel"] for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ block["mlp"]["down"]["kernel"]
    expected = norm(x, weights["final_norm"]["scale"]) @ np.asarray(weights["head"]["kernel"])
    got = logits_of(model, tokens, segment_ids, positions)
    np.testing.assert_allclose(got, expected, atol=2e-4, rtol=2e-4)


def test_a_block_shows_what_it_adds_to_the_residual_stream():
    cfg = dataclasses.replace(CONFIGS["plain"], n_layers=1)
    model = random_decoder(cfg)
    block = jax.tree.map(lambda leaf: leaf[0], model.blocks)
    x = jnp.ones((1, 3, 16))
    angles = jnp.ones((1, 3, 1, 4)), jnp.zeros((1, 3, 1, 4))
    out, sites = block(x, jnp.ones((1, 3), jnp.int32), *angles)
    assert tuple(sites) == SITES
    np.testing.assert_array_equal(out, sites["residual"])
    np.testing.assert_allclose(out, x + sites["attn"] + sites["mlp"], rtol=1e-6)
