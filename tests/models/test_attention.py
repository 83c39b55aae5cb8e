import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from tiny_runs import train_settings

from ping_llm import sharding
from ping_llm.models import attention
from ping_llm.models.decoder import Decoder
from ping_llm.packing import SHORTEST_SEGMENT
from ping_llm.training.optimizer import make_optimizer
from ping_llm.training.step import TrainState, make_train_step


def reference_attention(q, k, v, segment_ids, window=None):
    """Attention as the textbook has it: one query at a time, in float64."""
    B, T, N, H = q.shape
    group = N // k.shape[2]
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        first = 0 if window is None else max(0, t - window + 1)
        seen = [s for s in range(first, t + 1) if segment_ids[b, s] == segment_ids[b, t]]
        scores = np.array([q[b, t, n] @ k[b, s, n // group] / math.sqrt(H) for s in seen])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, seen, n // group] / weights.sum()
    return out


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("block", [4, 7, 128])
def test_attention_equals_the_textbook_for_any_block(monkeypatch, block, window):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 13, 4, 8)).astype(np.float32)
    k, v = (rng.normal(size=(2, 13, 2, 8)).astype(np.float32) for _ in range(2))
    segment_ids = np.array([[1] * 6 + [2] * 7, [1] * 3 + [2] * 8 + [0] * 2])
    got = attention.attention(*map(jnp.asarray, (q, k, v, segment_ids)), window)
    np.testing.assert_allclose(got, reference_attention(q, k, v, segment_ids, window), atol=2e-6)


def test_attention_gradients_are_finite_where_everything_is_padding():
    q = k = v = jnp.ones((1, 5, 2, 4))
    segments = jnp.zeros((1, 5), jnp.int32)
    grads = jax.grad(lambda q: attention.attention(q, k, v, segments).sum())(q)
    assert jnp.isfinite(grads).all()


@settings(deadline=None)
@given(st.lists(st.integers(SHORTEST_SEGMENT, 40), min_size=1, max_size=4))
def test_segment_bounds_are_the_lengths_and_starts_of_the_segments_and_of_padding(sizes):
    T = 160
    padding = T - sum(sizes)
    ids = np.repeat([*range(1, len(sizes) + 1), 0], [*sizes, padding]).astype(np.int32)
    lengths, starts = (np.asarray(a)[0] for a in attention.segment_bounds(jnp.asarray(ids[None])))
    wanted = [*sizes, padding] if padding else sizes
    room = T // SHORTEST_SEGMENT + 1
    assert len(lengths) == room
    assert lengths.tolist() == wanted + [-1] * (room - len(wanted))
    ends = np.cumsum(wanted)
    assert starts.tolist() == [0, *ends[:-1].tolist()] + [-1] * (room + 1 - len(wanted))


class TestOnCUDA:
    """What is lowered for CUDA needs no GPU; the kernel itself runs in the last test only."""

    T = 384

    @pytest.fixture
    def pretend(self, monkeypatch):
        monkeypatch.setattr(attention, "cudnn_serves", lambda dtype, head_dim: True)
        monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91002)
        monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
        monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)

    def lowered(self, platform):
        small = ["d_model=64", "n_layers=2", "n_heads=4", "n_kv_heads=2", "head_dim=16", "d_ff=48"]
        overrides = [f"model.{text}" for text in small] + ["model.dtype=bfloat16"]
        cfg = train_settings(*overrides, f"seq_len={self.T}", "batch_size=2")
        graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(cfg.model, rngs=nnx.Rngs(0))))
        tx = make_optimizer(cfg)
        step = jax.ShapeDtypeStruct((), jnp.int32)
        state = TrainState(step, params, jax.eval_shape(tx.init, params))
        ids = jax.ShapeDtypeStruct((2, self.T), jnp.int32)
        names = ("inputs", "targets", "segment_ids", "positions")
        batch = dict.fromkeys(names, ids) | {"mask": jax.ShapeDtypeStruct(ids.shape, jnp.float32)}
        devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
        mesh = jax.sharding.Mesh(devices, sharding.MESH_AXES)
        with jax.set_mesh(mesh):
            traced = make_train_step(graphdef, cfg, tx).trace(state, batch)
            return traced.lower(lowering_platforms=(platform,)).as_text()

    def test_the_train_step_calls_cudnn_forward_and_backward_and_holds_no_mask(self, pretend):
        text = self.lowered("cuda")
        assert "__cudnn$fmhaSoftmax" in text
        assert "__cudnn$fmhaSoftmaxBackward" in text
        assert f"{self.T}x{self.T}x" not in text
        # No callback, no infeed: nothing in a step waits for the host.
        assert not any(word in text for word in ("callback", "infeed", "outfeed", "host_compute"))

    def test_elsewhere_blocks_take_its_place_and_hold_no_mask_either(self):
        text = self.lowered("cpu")
        assert "cudnn" not in text
        assert f"{attention.QUERY_BLOCK}x{self.T}x" in text
        assert f"{self.T}x{self.T}x" not in text

    def test_more_segments_than_there_is_room_for_give_no_numbers(self, pretend, monkeypatch):
        monkeypatch.setattr(cudnn, "dot_product_attention", lambda q, k, v, **_: q)
        q = k = v = jnp.ones((2, 32, 2, 8), jnp.bfloat16)
        ids = jnp.stack([jnp.arange(32), jnp.arange(32) // 16])
        out = attention.attention(q, k, v, ids)
        assert jnp.isnan(out[0]).all()
        assert jnp.isfinite(out[1]).all()

    @pytest.mark.skipif(
        not attention.cudnn_serves(jnp.dtype(jnp.bfloat16), 64), reason="needs a Hopper GPU"
    )
    def test_on_a_gpu_it_equals_the_blocks(self):
        rng = np.random.default_rng(0)
        shapes = ((2, 256, 4, 64), (2, 256, 2, 64), (2, 256, 2, 64))
        q, k, v = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in shapes)
        ids = jnp.asarray(np.repeat([[1, 2, 3, 0], [1, 1, 2, 3]], 64, axis=1))

        def summed(q, k, v, attend):
            return jnp.sum(attend(q, k, v, ids, None).astype(jnp.float32) ** 2)

        got = jax.value_and_grad(summed, (0, 1, 2))(q, k, v, attention.attention)
        wanted = jax.value_and_grad(summed, (0, 1, 2))(q, k, v, attention._in_blocks)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(np.float32(one), np.float32(other), rtol=0.05, atol=0.05)
