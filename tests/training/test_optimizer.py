import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_runs import train_settings

from ping_llm.models.decoder import Decoder
from ping_llm.training.optimizer import groups, guard, learning_rate_at, make_optimizer


def test_the_rate_warms_up_peaks_and_falls_to_its_floor():
    cfg = train_settings("steps=110", "warmup_steps=10", "learning_rate=1.0", preset="base")
    rates = np.array([learning_rate_at(cfg)(taken) for taken in range(120)])
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)  # half-way between the peak and a tenth of it
    np.testing.assert_allclose(rates[110:], 0.1, rtol=1e-6)


def test_a_run_shorter_than_its_warm_up_still_has_rates():
    cfg = train_settings("steps=5", "warmup_steps=10", "learning_rate=1.0", preset="base")
    rates = [float(learning_rate_at(cfg)(taken)) for taken in range(5)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_wsd_stays_at_its_peak_and_falls_in_a_line():
    overrides = ["steps=100", "warmup_steps=10", "learning_rate=1.0", "schedule=wsd"]
    cfg = train_settings(*overrides, "final_learning_rate_fraction=0", preset="base")
    rates = np.array([learning_rate_at(cfg)(taken) for taken in range(101)])
    np.testing.assert_allclose(rates[9:81], 1.0, rtol=1e-6)
    np.testing.assert_allclose(rates[80:], np.arange(20, -1, -1) / 20, atol=1e-6)


@pytest.fixture(scope="module")
def params():
    cfg = train_settings(
        "model.qkv_bias=true", "model.qk_norm=true", "model.d_model=16", "model.d_ff=24"
    ).model
    return nnx.state(Decoder(cfg, rngs=nnx.Rngs(0)))


def by_name(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def test_every_parameter_is_in_a_group(params):
    found = by_name(groups(params))
    names = [f"attn.{name}" for name in ("q", "k", "v", "out")]
    names += [f"mlp.{name}" for name in ("gate", "up", "down")]
    kernels = {f"blocks.{name}.kernel.value" for name in names}
    assert {name for name, group in found.items() if group == "kernel"} == kernels
    assert [name for name, group in found.items() if group == "embedding"] == [
        "embed.embedding.value"
    ]
    assert len(found) == len(names) + 1 + 3 + 5  # embedding; biases and five norms


def updates_of(params, *overrides, gradient=None):
    cfg = train_settings("warmup_steps=0", "learning_rate=0.1", *overrides, preset="base")
    tx = make_optimizer(cfg)
    gradient = gradient or jax.tree.map(jnp.zeros_like, params)
    return by_name(tx.update(gradient, tx.init(params), params)[0])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("decaying", ["kernel", "embedding,norm"])
def test_only_the_chosen_groups_decay(params, optimizer, decaying):
    updates = updates_of(params, f"optimizer={optimizer}", f"weight_decay_groups={decaying}")
    found = by_name(groups(params))
    for name, update in updates.items():
        at_zero = "bias" in name  # at first, so nothing of it can decay
        assert bool(jnp.any(update)) == (found[name] in decaying and not at_zero), name


def test_a_groups_rate_is_multiplied_by_its_factor(params):
    gradient = jax.tree.map(jnp.ones_like, params)
    factors = ["embedding_learning_rate_factor=3", "norm_learning_rate_factor=0.5"]
    plain = updates_of(params, gradient=gradient)
    scaled = updates_of(params, *factors, gradient=gradient)
    wanted = {"kernel": 1.0, "embedding": 3.0, "norm": 0.5}
    for name, group in by_name(groups(params)).items():
        np.testing.assert_allclose(scaled[name], wanted[group] * plain[name], rtol=1e-6)


def test_muon_makes_each_layers_kernel_near_orthogonal_and_leaves_the_rest_to_adam(params):
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
    settings = ["weight_decay=0", "clip_norm=1e9"]
    updates = updates_of(params, "optimizer=muon", *settings, gradient=gradient)
    adam = updates_of(params, *settings, gradient=gradient)
    up = np.asarray(updates["blocks.mlp.up.kernel.value"])  # [L, 16, 24]
    for layer in up:
        values = np.linalg.svd(layer, compute_uv=False)
        assert values.max() / values.min() < 2  # Newton-Schulz comes this near in five rounds
        assert np.sqrt(np.mean(layer**2)) == pytest.approx(0.1 * 0.2, rel=0.3)
    name = "embed.embedding.value"
    np.testing.assert_allclose(updates[name], adam[name], rtol=1e-5)


def test_a_bad_gradient_changes_nothing_and_a_good_one_is_as_if_it_had_not_been():
    tx = guard(optax.adam(0.1), spike_factor=5.0)
    params = {"w": jnp.ones(3)}
    good = [{"w": jnp.asarray([1.0, -2.0, 0.5 + i % 3])} for i in range(24)]
    bad = [{"w": jnp.asarray([1e6, 0.0, 0.0])}, {"w": jnp.asarray([jnp.nan, 0.0, 0.0])}]

    def walk(gradients):
        state, at, skipped = tx.init(params), params, []
        for gradient in gradients:
            updates, state = tx.update(gradient, state, at)
            at = optax.apply_updates(at, updates)
            skipped.append(bool(state.skipped))
        return at, state, skipped

    at, state, skipped = walk([*good[:22], *bad, *good[22:]])
    assert [i for i, flag in enumerate(skipped) if flag] == [22, 23]
    expected, expected_state, none = walk(good)
    assert not any(none)
    np.testing.assert_array_equal(at["w"], expected["w"])
    assert jax.tree.all(jax.tree.map(jnp.array_equal, state, expected_state))


def test_the_first_gradients_are_never_spikes_but_must_be_finite():
    tx = guard(optax.sgd(1.0), spike_factor=5.0)
    state = tx.init(jnp.zeros(()))
    for gradient, bad in ((1.0, False), (1e5, False), (jnp.inf, True)):
        updates, state = tx.update(jnp.asarray(gradient), state)
        assert bool(state.skipped) == bad
        assert updates == (0.0 if bad else -gradient)
