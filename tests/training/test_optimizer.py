import jax
import numpy as np
import pytest
from flax import nnx

from ping_llm.models.decoder import Decoder
from ping_llm.training.config import load_config
from ping_llm.training.optimizer import decays, learning_rate_at


def test_the_rate_warms_up_peaks_and_falls_to_its_floor():
    cfg = load_config(overrides=["steps=110", "warmup_steps=10", "learning_rate=1.0"])
    rates = np.array([learning_rate_at(cfg)(taken) for taken in range(120)])
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)  # half-way between the peak and a tenth of it
    np.testing.assert_allclose(rates[110:], 0.1, rtol=1e-6)


def test_a_run_shorter_than_its_warm_up_still_has_rates():
    cfg = load_config(overrides=["steps=5", "warmup_steps=10", "learning_rate=1.0"])
    rates = [float(learning_rate_at(cfg)(taken)) for taken in range(5)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_only_kernels_decay():
    cfg = load_config(overrides=["model.qkv_bias=true", "model.qk_norm=true"]).model
    params = nnx.state(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0))))
    flags = jax.tree_util.tree_flatten_with_path(decays(params))[0]
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator=".") for path, flag in flags if flag
    }
    names = [f"attn.{name}" for name in ("q", "k", "v", "out")]
    names += [f"mlp.{name}" for name in ("gate", "up", "down")]
    assert decayed == {f"blocks.{name}.kernel.value" for name in names}
    assert len(flags) == len(names) + 3 + 6  # biases; embedding and five norms
