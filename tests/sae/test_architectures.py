import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from tiny_autoencoders import KINDS, autoencoder

from ping_llm.sae import architectures
from ping_llm.sae.architectures import keep_largest, keep_largest_of_all
from ping_llm.sae.autoencoder import SparseAutoencoder
from ping_llm.sae.settings import TrainSaeSettings
from ping_llm.sae.step import abstract_state, init_state, make_optimizer, make_train_step
from ping_llm.sharding import MESH_AXES

WIDTH, TRUE_FEATURES, FEATURES, BATCH = 32, 48, 96, 256
SMALL = {"learning_rate": 6e-3, "dead_tokens": 5000, "sparsity_warmup_steps": 100}


def settings(architecture, **changes):
    given = {"activations": "acts", "output": "sae", "layer": (0,), "batch_size": BATCH, "k": 3}
    given |= {"features": FEATURES, "architecture": architecture, **SMALL, **changes}
    return TrainSaeSettings(**given)


def one_device():
    auto = (AxisType.Auto,) * 3
    return jax.make_mesh((1, 1, 1), MESH_AXES, devices=jax.devices()[:1], axis_types=auto)


def make_step(cfg, width):
    tx, mesh = make_optimizer(cfg), one_device()
    with jax.set_mesh(mesh):
        return tx, make_train_step(cfg, tx, abstract_state(cfg, tx, d_model=width, mesh=mesh))


def planted(seed=0):
    """Returns (directions, a function that draws tokens which are sums of about 3 of them)."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((TRUE_FEATURES, WIDTH)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)

    def draw(key, n):
        a, b, c = jax.random.split(key, 3)
        active = jax.random.bernoulli(a, 3 / TRUE_FEATURES, (n, TRUE_FEATURES))
        strength = 0.5 + 0.5 * jax.random.exponential(b, (n, TRUE_FEATURES))
        noise = 0.02 * jax.random.normal(c, (n, WIDTH))
        return (active * strength) @ directions + noise + 3.0

    return directions, draw


# What the penalties must weigh for about 3 active features, and how long learning takes.
RECIPES = {
    "topk": {"steps": 700},
    "batchtopk": {"steps": 1000},
    "jumprelu": {"steps": 1000, "sparsity": 1.0},
    "gated": {"steps": 1000, "sparsity": 0.6},
    "l1": {"steps": 700, "sparsity": 0.3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_planted_features_are_found(kind):
    cfg = settings(kind, **RECIPES[kind])
    directions, draw = planted()
    tx, step = make_step(cfg, WIDTH)

    @jax.jit
    def train(key):
        seen = draw(jax.random.fold_in(key, 2**31), 4096)
        scale = 1 / jnp.sqrt(jnp.mean(jnp.sum((seen - seen.mean(axis=0)) ** 2, axis=1)))
        state = init_state(cfg, tx, key, seen.mean(axis=0), scale)

        def one(state, number):
            return step(state, draw(jax.random.fold_in(key, number), BATCH), number)

        return jax.lax.scan(one, state, jnp.arange(cfg.steps))

    with jax.set_mesh(one_device()):
        state, metrics = train(jax.random.key(0))
    cosine = directions @ np.asarray(state.params["W_dec"]).T
    recovered = np.mean(cosine.max(axis=1) >= 0.95)
    assert recovered >= 0.95, f"{kind}: {recovered:.1%} of the features"
    assert 1 < metrics["l0"][-100:].mean() < 6
    sae = SparseAutoencoder.of_training(cfg, state.params, state.rest, {})
    tokens = draw(jax.random.key(7), 2048)
    left = np.sum((tokens - sae(tokens)) ** 2) / np.sum((tokens - tokens.mean(axis=0)) ** 2)
    # In the units of the tokens it does what it did in training on scaled ones.
    assert float(left) == pytest.approx(float(metrics["unexplained"][-100:].mean()), rel=0.2)


def test_the_largest_are_kept_of_each_row_or_of_all():
    values = np.abs(np.random.default_rng(0).standard_normal((6, 40))).astype(np.float32)
    rows = np.asarray(keep_largest(jnp.asarray(values), 3))
    assert (np.count_nonzero(rows, axis=1) == 3).all()
    assert (rows.max(axis=1) == values.max(axis=1)).all()
    assert np.sort(rows, axis=1)[:, -3:].tolist() == np.sort(values, axis=1)[:, -3:].tolist()
    for k in (1, 5, 17):
        kept = np.asarray(keep_largest_of_all(jnp.asarray(values), k, of_row=40))
        assert np.count_nonzero(kept) == k
        assert np.sort(kept, axis=None)[-k:].tolist() == np.sort(values, axis=None)[-k:].tolist()
    # No row has more than it may, and nothing below 0 is made up.
    values[0] += 10
    kept = np.asarray(keep_largest_of_all(jnp.asarray(values), 20, of_row=8))
    assert np.count_nonzero(kept, axis=1)[0] == 8
    assert np.count_nonzero(kept) == 20
    assert not np.asarray(keep_largest_of_all(jnp.zeros((2, 4)), 3, of_row=4)).any()


def test_gradients_of_jumps_are_those_of_the_paper():
    pre, threshold = jnp.array([[0.2, 0.52, 0.9], [0.49, 0.3, 0.6]]), jnp.full(3, 0.5)
    width = 0.1  # the kernel reaches from 0.45 to 0.55
    total = lambda function: lambda z, t: function(z, t, width).sum()  # noqa: E731
    by_pre, by_threshold = jax.grad(total(architectures.jump_relu), (0, 1))(pre, threshold)
    np.testing.assert_array_equal(by_pre, pre > threshold)
    np.testing.assert_allclose(by_threshold, [-0.5 / 0.1, -0.5 / 0.1, 0.0])
    by_pre, by_threshold = jax.grad(total(architectures.step), (0, 1))(pre, threshold)
    np.testing.assert_array_equal(by_pre, 0 * pre)
    np.testing.assert_allclose(by_threshold, [-1 / 0.1, -1 / 0.1, 0.0])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_loaded(kind, tmp_path):
    sae = autoencoder(kind, site="residual")
    sae.save(tmp_path)
    again = SparseAutoencoder.load(tmp_path)
    assert again.config == sae.config
    x = jax.random.normal(jax.random.key(1), (5, 7, 8))
    np.testing.assert_array_equal(again(x), sae(x))
    assert again.encode(x).shape == (5, 7, 24)


def test_scaling_the_activations_scales_what_is_rebuilt():
    """The scale of training is folded into biases, whatever the kind."""
    for kind in KINDS:
        sae, other = autoencoder(kind), autoencoder(kind, scale=0.04)
        x = jax.random.normal(jax.random.key(1), (64, 8))
        np.testing.assert_allclose(other(10 * x), 10 * sae(x), rtol=1e-4, atol=1e-4)
