import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ping_llm.models.config import PRESETS, DecoderConfig
from ping_llm.models.decoder import Decoder
from ping_llm.training import flops

SHAPE = dict(vocab_size=267, d_model=64, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=96)


@pytest.mark.parametrize("window", [None, 3])
def test_pairs_are_those_that_attention_lets_through(window):
    cfg = DecoderConfig(**SHAPE | dict(n_layers=2), sliding_window=window)
    lengths = [4, 5, 1]
    segment_ids = np.repeat([1, 2, 0], lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    brute = sum(
        segment_ids[0, q] == segment_ids[0, k] != 0 and q - k < (window or 10)
        for q in range(10)
        for k in range(q + 1)
    )
    assert flops.attended_pairs(cfg, jnp.asarray(segment_ids), jnp.asarray(positions)) == 2 * brute


def test_the_count_for_a_known_model():
    # GPT-style rule of thumb: 6 FLOPs a parameter and token, norms aside, plus attention.
    tiny = PRESETS["tiny"]
    norms = 2 * tiny.n_layers * tiny.d_model + tiny.d_model
    assert flops.matmul_weights(tiny) == tiny.parameter_count() - norms
    assert flops.training_flops(tiny, 1, 0) == 6 * flops.matmul_weights(tiny)
    # 12 * L * D per key and token
    assert flops.training_flops(tiny, 0, tiny.n_layers) == 12 * tiny.n_layers * tiny.d_model


def test_the_count_is_near_what_xla_counts():
    cfg = DecoderConfig(**SHAPE, dtype="float32")
    B, T = 2, 64
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0))))
    forward = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
    lowered = forward.lower(params, jax.ShapeDtypeStruct((B, T), jnp.int32))
    pairs = B * T * T  # one block of queries computes also the masked half
    ours = flops.training_flops(cfg, B * T, pairs) / 3
    assert lowered.cost_analysis()["flops"] == pytest.approx(ours, rel=0.1)


def test_peaks_are_found_by_the_beginning_of_the_name():
    assert flops.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert flops.peak_flops("TPU v5 lite") == 197e12
    assert flops.peak_flops("cpu") is None
