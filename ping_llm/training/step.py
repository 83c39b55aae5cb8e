"""One optimizer step."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ping_llm import sharding, tokenizer
from ping_llm.models.config import DecoderConfig
from ping_llm.models.decoder import Decoder
from ping_llm.training import flops
from ping_llm.training.optimizer import GuardState
from ping_llm.training.settings import TrainSettings

Arrays = Mapping[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a resumed run needs, apart from its place in the data.

    Attributes:
        step: Number of steps taken.
        params: Parameters of the decoder, an `nnx.State`.
        opt_state: State of the optimizer, every moment laid out like its parameter.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any


def init_state(
    cfg: DecoderConfig, tx: optax.GradientTransformation, *, seed: int, mesh: Mesh
) -> tuple[Any, TrainState]:
    """Returns (graphdef, state). Each array is created on its own devices."""
    graphdef, abstract = abstract_state(cfg, tx, mesh=mesh)
    init = functools.partial(_new_state, cfg, tx)
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return graphdef, jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def abstract_state(
    cfg: DecoderConfig, tx: optax.GradientTransformation, *, mesh: Mesh
) -> tuple[Any, TrainState]:
    """Returns (graphdef, state) with shapes, dtypes and shardings in the place of values."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0))))
    with jax.set_mesh(mesh):
        state = jax.eval_shape(lambda: _new_state(cfg, tx, jax.random.key(0)))
        shardings = _unmasked(state, nnx.get_named_sharding(state, mesh))

    placed = jax.tree.map(lambda leaf, where: leaf.update(sharding=where), state, shardings)
    return graphdef, placed


def _unmasked(state: Any, shardings: Any) -> Any:
    """Returns `shardings` without those of variables that an optimizer leaves to another one.

    Optax puts an empty node in their place, to which Flax still gives a sharding.
    """

    def keep(variable, where):
        return where if jax.tree.leaves(variable) else variable

    return jax.tree.map(keep, state, shardings, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _new_state(cfg: DecoderConfig, tx: optax.GradientTransformation, key: Array) -> TrainState:
    _, params = nnx.split(Decoder(cfg, rngs=nnx.Rngs(params=key)))
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def target_fields(inputs: Int[Array, "B T"], targets: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns the index in `tokenizer.FIELDS` of each target, as `tokenizer.field_of` does.

    A byte belongs to the field of the last id below `BYTE_0`, which may stand in the row's first
    input.
    """
    row = jnp.concatenate([inputs[:, :1], targets], axis=1)  # [B, T + 1]
    column = jnp.where(row < tokenizer.BYTE_0, jnp.arange(row.shape[1]), 0)
    last_marker = jax.lax.associative_scan(jnp.maximum, column, axis=1)
    marker = jnp.take_along_axis(row, last_marker, axis=1)
    of_payload = jnp.asarray((*tokenizer.FIELD_OF_PAYLOAD, tokenizer.STRUCTURE))
    fields = of_payload[jnp.minimum(marker, tokenizer.BYTE_0)]
    return jnp.where(row < tokenizer.BYTE_0, tokenizer.STRUCTURE, fields)[:, 1:]


def field_losses(
    nll: Float[Array, "B T"], fields: Int[Array, "B T"], mask: Float[Array, "B T"]
) -> tuple[Float[Array, "5"], Float[Array, "5"]]:
    """Returns per field the sum of `nll`, and the number of targets, where `mask` is 1."""
    chosen = jax.nn.one_hot(fields, len(tokenizer.FIELDS)) * mask[:, :, None]  # [B, T, fields]
    return jnp.einsum("btf,bt->f", chosen, nll), jnp.sum(chosen, axis=(0, 1))


def _logits(graphdef: Any, params: Any, batch: Arrays) -> Float[Array, "B T V"]:
    model = nnx.merge(graphdef, params)
    return model(batch["inputs"], batch["segment_ids"], batch["positions"])


_negative_log_likelihood = optax.softmax_cross_entropy_with_integer_labels


def make_train_step(
    graphdef: Any, cfg: TrainSettings, tx: optax.GradientTransformation
) -> Callable[[TrainState, Arrays], tuple[TrainState, dict[str, Array]]]:
    """Returns the compiled `train_step(state, batch) -> (state, metrics)`; `state` is given up.

    It is to be called where `jax.set_mesh` holds.

    The metrics of a step: `loss`, nats per target, unweighted; `grad_norm` before clipping;
    `skipped`, whether the optimizer's guard left all as it was; `field_nll` and
    `field_count` by `tokenizer.FIELDS`; `tokens` that are not padding; `pairs` as
    `flops.attended_pairs` counts them.

    Where `cfg.accumulate_steps` is above 1, the gradients of so many parts of the batch are added
    up, and the step is that of the whole batch.

    Args:
        graphdef: The static part of the model.
        cfg: The run's settings.
        tx: The optimizer, as `make_optimizer` makes it.
    """
    weights = jnp.asarray(cfg.loss_weights, jnp.float32)  # by field

    def loss_fn(params, batch):
        logits = _logits(graphdef, params, batch)
        nll = _negative_log_likelihood(logits, batch["targets"])
        objective = jnp.sum(nll * batch["weight"])
        if cfg.z_loss:
            log_z = jax.nn.logsumexp(logits, axis=-1)
            objective += cfg.z_loss * jnp.sum(log_z**2 * batch["weight"])
        return objective, field_losses(nll, batch["fields"], batch["mask"])

    def gradients(params, batch):
        fields = target_fields(batch["inputs"], batch["targets"])
        weight = batch["mask"] * weights[fields]
        # Shares of the whole batch, so that the gradients of its parts add up.
        weight /= jnp.maximum(jnp.sum(weight), 1.0)
        batch = {**batch, "fields": fields, "weight": weight}
        grad = jax.grad(loss_fn, has_aux=True)
        if cfg.accumulate_steps == 1:
            return grad(params, batch)

        def add_part(so_far, part):
            return jax.tree.map(jnp.add, so_far, grad(params, part)), None

        parts = jax.tree.map(lambda rows: _cut(rows, cfg.accumulate_steps), batch)
        shapes = jax.eval_shape(grad, params, jax.tree.map(lambda rows: rows[0], parts))
        zeros = jax.tree.map(jnp.zeros_like, shapes)
        return jax.lax.scan(add_part, zeros, parts)[0]

    def train_step(state: TrainState, batch: Arrays):
        grads, (nll, count) = gradients(state.params, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        assert isinstance(opt_state, GuardState)
        segment_ids, positions = batch["segment_ids"], batch["positions"]
        metrics = {
            "loss": jnp.sum(nll) / jnp.maximum(jnp.sum(count), 1.0),
            "grad_norm": optax.tree.norm(grads),
            "skipped": opt_state.skipped,
            "field_nll": nll,
            "field_count": count,
            "tokens": jnp.sum(segment_ids != 0),
            "pairs": flops.attended_pairs(cfg.model, segment_ids, positions),
        }
        # The outputs are constrained too, or XLA might choose another layout for them.
        new_state = TrainState(state.step + 1, params, opt_state)
        specs = _unmasked(new_state, nnx.get_partition_spec(new_state))
        new_state = jax.lax.with_sharding_constraint(new_state, specs)
        return new_state, jax.lax.with_sharding_constraint(metrics, P())

    return jax.jit(train_step, donate_argnames="state")


def make_eval_step(graphdef: Any) -> Callable[[Any, Arrays], tuple[Array, Array]]:
    """Returns the compiled `eval_step(params, batch)`: per field, the NLL's sum and the count."""

    def eval_step(params, batch):
        nll = _negative_log_likelihood(_logits(graphdef, params, batch), batch["targets"])
        fields = target_fields(batch["inputs"], batch["targets"])
        sums = field_losses(nll, fields, batch["mask"])
        return tuple(sharding.constrain(each, P()) for each in sums)

    return jax.jit(eval_step)


def _cut(rows: Array, parts: int) -> Array:
    # Part i takes every `parts`-th row, so that each device keeps the rows it has.
    return rows.reshape(-1, parts, *rows.shape[1:]).swapaxes(0, 1)
