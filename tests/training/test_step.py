import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny_runs import train_settings

from ping_llm import sharding, tokenizer
from ping_llm.models.config import DecoderConfig
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
    """A model, an optimizer and a mesh, to take steps from the same start again and again.

    `changes` of `steps` are settings that differ from those of the trainer.
    """

    def __init__(self, *overrides, cfg=TINY, **axis_sizes):
        self.mesh = sharding.make_mesh(**(axis_sizes or dict(data=4)))
        flags = ["warmup_steps=1", "learning_rate=1e-2", *overrides]
        self.cfg = dataclasses.replace(train_settings(*flags, preset="base"), model=cfg)
        self.tx = make_optimizer(self.cfg)
        self.graphdef, self.start = init_state(cfg, self.tx, seed=0, mesh=self.mesh)
        self._compiled = {}

    def steps(self, batches, **changes):
        """Returns (state, metrics of each step) after a step on each batch."""
        state, metrics = jax.tree.map(jnp.copy, self.start), []
        key = tuple(changes.items())
        with jax.set_mesh(self.mesh):
            for batch in batches:
                placed = sharding.place_batch(self.mesh, batch)
                if key not in self._compiled:
                    cfg = dataclasses.replace(self.cfg, **changes)
                    step = make_train_step(self.graphdef, cfg, self.tx)
                    self._compiled[key] = step.lower(state, placed).compile()
                # Compiled for one layout: this fails if the state came out laid out otherwise.
                state, one = self._compiled[key](state, placed)
                metrics.append(jax.device_get(one))
        return state, metrics


def losses(metrics):
    return [one["loss"] for one in metrics]


@pytest.fixture(scope="module")
def trainer():
    return Trainer()


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(1, 4, 1), (2, 1, 2), (1, 1, 4)])
def test_the_first_five_losses_do_not_depend_on_the_mesh(trainer, data, fsdp, tensor):
    batches = [batch(seed) for seed in range(5)]
    state, metrics = Trainer(data=data, fsdp=fsdp, tensor=tensor).steps(batches)
    np.testing.assert_allclose(losses(metrics), losses(trainer.steps(batches)[1]), rtol=1e-5)
    adam = state.opt_state.inner[1][0]
    params = jax.tree.leaves(state.params)
    for moments in (adam.mu, adam.nu):
        for moment, param in zip(jax.tree.leaves(moments), params, strict=True):
            assert moment.sharding.is_equivalent_to(param.sharding, param.ndim)
    kernel = state.params["blocks"]["mlp"]["up"]["kernel"][...]
    assert kernel.addressable_shards[0].data.size == kernel.size // (fsdp * tensor)


def test_muons_moments_are_sharded_like_their_parameters_too():
    state = Trainer("optimizer=muon", data=1, fsdp=2, tensor=2).steps([batch()])[0]
    leaves = jax.tree_util.tree_flatten_with_path
    params = leaves(state.params)[0]
    moments = [(path, leaf) for path, leaf in leaves(state.opt_state)[0] if leaf.ndim == 3]
    assert len(moments) == 7  # one for each kernel: no second moment
    for path, moment in moments:
        (param,) = (leaf for place, leaf in params if path[-len(place) :] == place)
        assert moment.sharding.is_equivalent_to(param.sharding, 3)


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
    _, metrics = Trainer("weight_decay=0", "steps=150", cfg=cfg).steps([rows] * 150)
    assert losses(metrics)[-1] < 0.05


def test_loss_weights_choose_what_is_learnt(trainer):
    rows = batch()
    weights = (0.0, 0.0, 0.0, 0.0, 1.0)
    assert losses(trainer.steps([rows], loss_weights=weights)[1]) == losses(
        trainer.steps([rows])[1]
    )  # what is reported has no weights
    metrics = trainer.steps([rows] * 40, loss_weights=weights)[1]
    mean = [one["field_nll"] / np.maximum(one["field_count"], 1) for one in metrics]
    rtt = tokenizer.FIELDS.index("rtt")
    assert mean[-1][rtt] < 0.5 * mean[0][rtt]
    others = [i for i in range(len(mean[0])) if i != rtt and metrics[0]["field_count"][i]]
    assert all(mean[-1][i] > 0.9 * mean[0][i] for i in others)


def test_z_loss_keeps_the_softmax_denominator_near_one(trainer):
    rows = [batch()] * 30

    def log_z(state):
        model = nnx.merge(trainer.graphdef, state.params)
        arrays = (jnp.asarray(rows[0][n]) for n in ("inputs", "segment_ids", "positions"))
        return float(jnp.mean(jax.nn.logsumexp(model(*arrays), axis=-1) ** 2))

    without, with_z = (trainer.steps(rows, z_loss=z)[0] for z in (0.0, 0.1))
    assert log_z(with_z) < 0.1 * log_z(without)


def test_a_step_with_a_gradient_that_is_not_finite_leaves_the_state_as_it_was(trainer):
    rows = batch()
    broken = dict(rows, mask=np.where(rows["mask"] > 0, np.float32(np.inf), np.float32(0)))
    before = trainer.steps([rows])[0]
    after, metrics = trainer.steps([rows, broken])
    assert [bool(one["skipped"]) for one in metrics] == [False, True]
    for one, other in zip(
        jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.int32, (3, 9), elements=st.one_of(st.integers(0, 11), st.integers(0, 266))))
def test_fields_of_targets_are_those_of_the_tokenizer(tokens):
    got = target_fields(jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]))
    np.testing.assert_array_equal(got, tokenizer.field_of(tokens)[:, 1:])
