import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ping_llm import sharding, tokenizer
from ping_llm.models.config import DecoderConfig
from ping_llm.training.config import load_config
from ping_llm.training.optimizer import make_optimizer
from ping_llm.training.step import init_state, make_eval_step, make_train_step, target_fields

TINY = DecoderConfig(
    vocab_size=267,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=4,
    head_dim=8,
    d_ff=64,
    dtype="float32",
)
B, T = 8, 24


def batch(seed=0):
    """Random tokens; two segments and some padding a row, of a different length each."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 267, (B, T + 1)).astype(np.int32)
    place, end = np.arange(T + 1), T - np.arange(B)[:, None] // 2
    cut = 5 + np.arange(B)[:, None]
    segments = np.where(place < cut, 1, np.where(place < end, 2, 0)).astype(np.int32)
    positions = np.where(place < cut, place, place - cut).astype(np.int32)
    mask = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] != 0)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segments[:, :-1],
        "positions": positions[:, :-1],
        "mask": mask.astype(np.float32),
    }


class Trainer:
    """A model, an optimizer and a mesh, to take steps from the same start again and again."""

    def __init__(self, *, cfg=TINY, tx=None, **axis_sizes):
        self.cfg, self.mesh = cfg, sharding.make_mesh(**(axis_sizes or dict(data=4)))
        flags = ["warmup_steps=1", "learning_rate=1e-2"]
        self.tx = tx or make_optimizer(load_config(overrides=flags))
        self.graphdef, self.start = init_state(cfg, self.tx, seed=0, mesh=self.mesh)
        self._compiled = {}

    def steps(self, batches, *, accumulate_steps=1):
        """Returns (state, metrics of each step) after a step on each batch."""
        state, metrics = jax.tree.map(jnp.copy, self.start), []
        with jax.set_mesh(self.mesh):
            for batch in batches:
                placed = sharding.place_batch(self.mesh, batch)
                if accumulate_steps not in self._compiled:
                    step = make_train_step(
                        self.graphdef, self.cfg, self.tx, accumulate_steps=accumulate_steps
                    )
                    self._compiled[accumulate_steps] = step.lower(state, placed).compile()
                # Compiled for one layout: this fails if the state came out laid out otherwise.
                state, one = self._compiled[accumulate_steps](state, placed)
                metrics.append(jax.device_get(one))
        return state, metrics


def losses(metrics):
    return [one["loss"] for one in metrics]


@pytest.fixture(scope="module")
def trainer():
    return Trainer()


@pytest.mark.parametrize(("fsdp", "tensor"), [(4, 1), (2, 2), (1, 4)])
def test_the_loss_does_not_depend_on_the_mesh(trainer, fsdp, tensor):
    batches = [batch(seed) for seed in range(3)]
    state, metrics = Trainer(data=1, fsdp=fsdp, tensor=tensor).steps(batches)
    np.testing.assert_allclose(losses(metrics), losses(trainer.steps(batches)[1]), rtol=1e-5)
    adam = state.opt_state[1][0]
    params = jax.tree.leaves(state.params)
    for moments in (adam.mu, adam.nu):
        for moment, param in zip(jax.tree.leaves(moments), params, strict=True):
            assert moment.sharding.is_equivalent_to(param.sharding, param.ndim)
    kernel = state.params["blocks"]["mlp"]["up"]["kernel"][...]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_accumulated_parts_equal_one_big_batch(trainer):
    batches = [batch(seed) for seed in range(3)]
    in_parts = trainer.steps(batches, accumulate_steps=2)[1]
    np.testing.assert_allclose(losses(in_parts), losses(trainer.steps(batches)[1]), rtol=1e-5)


def test_the_metrics_add_up(trainer):
    rows = batch()
    metrics = trainer.steps([rows])[1][0]
    count = metrics["field_count"]
    assert count.sum() == rows["mask"].sum()
    assert metrics["field_nll"].sum() / count.sum() == pytest.approx(metrics["loss"], rel=1e-5)
    assert metrics["tokens"] == np.count_nonzero(rows["segment_ids"])
    # Logits of unit variance over tokens at random: half a nat above a uniform guess.
    assert metrics["loss"] == pytest.approx(np.log(267) + 0.5, abs=0.1)


def test_evaluation_gives_the_loss_of_the_step_that_follows(trainer):
    rows = batch()
    with jax.set_mesh(trainer.mesh):
        evaluate = make_eval_step(trainer.graphdef)
        nll, count = evaluate(trainer.start.params, sharding.place_batch(trainer.mesh, rows))
    metrics = trainer.steps([rows])[1][0]
    np.testing.assert_allclose(nll, metrics["field_nll"], rtol=1e-5)
    np.testing.assert_array_equal(count, metrics["field_count"])


def test_padding_and_masked_targets_do_not_count(trainer):
    rows = batch()
    garbled = dict(rows)
    garbled["inputs"] = np.where(rows["segment_ids"] == 0, 7, rows["inputs"])
    garbled["targets"] = np.where(rows["mask"] == 0, 7, rows["targets"])
    assert losses(trainer.steps([rows])[1]) == losses(trainer.steps([garbled])[1])


def test_a_few_sequences_are_learnt_by_heart():
    cfg = dataclasses.replace(TINY, n_layers=1)
    rows = batch()
    rows["mask"] = rows["mask"] * (rows["positions"] > 3)  # what comes first cannot be known
    _, metrics = Trainer(cfg=cfg, tx=optax.adam(1e-2)).steps([rows] * 150)
    assert losses(metrics)[-1] < 0.05


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.int32, (3, 9), elements=st.one_of(st.integers(0, 11), st.integers(0, 266))))
def test_fields_of_targets_are_those_of_the_tokenizer(tokens):
    got = target_fields(jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]))
    np.testing.assert_array_equal(got, tokenizer.field_of(tokens)[:, 1:])
