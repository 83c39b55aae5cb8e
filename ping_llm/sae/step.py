"""One training step of a sparse autoencoder, and the state that it hands on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ping_llm import sharding
from ping_llm.errors import ConfigError
from ping_llm.sae import architectures
from ping_llm.sae.settings import TrainSaeSettings
from ping_llm.training.optimizer import GuardState, guard, learning_rate_at

_SPECS = {
    "W_enc": sharding.FEATURES_DF,
    "W_dec": sharding.FEATURES_FD,
    "b_dec": P(),
    "scale": P(),
    "threshold": P(),
}
_NEVER_MORE = 2**30  # tokens that are counted since a feature was active


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AutoencoderState:
    """What a resumed training needs of one autoencoder.

    Attributes:
        params: Its parameters, those of scaled activations.
        opt_state: State of the optimizer.
        rest: `scale`, by which activations are multiplied; `threshold` of `batchtopk`; `idle`, how
            many tokens ago each feature was active [F] int32.
    """

    params: dict[str, Array]
    opt_state: Any
    rest: dict[str, Array]


def make_optimizer(cfg: TrainSaeSettings) -> optax.GradientTransformation:
    """Returns Adam after clipping by the global norm; a gradient that is not finite is skipped."""
    adam = optax.adam(learning_rate_at(cfg), cfg.beta1, cfg.beta2, eps=1e-8)
    return guard(optax.chain(optax.clip_by_global_norm(cfg.clip_norm), adam), spike_factor=None)


def init_state(
    cfg: TrainSaeSettings, tx: optax.GradientTransformation, key: Array, center: Array, scale: Array
) -> AutoencoderState:
    """Returns the state before the first step.

    Args:
        cfg: The settings, nothing left open.
        tx: The optimizer.
        key: Of the random directions.
        center: Where unscaled activations lie about, [D].
        scale: What makes their variance 1.
    """
    assert cfg.features is not None
    params = architectures.init_params(key, cfg, features=cfg.features, bias=center * scale)
    rest = {
        "scale": scale.astype(jnp.float32),
        "threshold": jnp.zeros(()),
        "idle": jnp.zeros(cfg.features, jnp.int32),
    }
    return AutoencoderState(params, tx.init(params), rest)


def abstract_state(
    cfg: TrainSaeSettings, tx: optax.GradientTransformation, *, d_model: int, mesh: Mesh
) -> AutoencoderState:
    """Returns a state with shapes, dtypes and shardings in the place of values.

    Raises:
        ConfigError: The mesh cannot share out the features equally.
    """
    assert cfg.features is not None
    shares = mesh.shape["fsdp"] * mesh.shape["tensor"]
    if cfg.features % shares:
        raise ConfigError(
            f"features={cfg.features} must be a multiple of {shares}, the mesh's fsdp x tensor"
        )
    center = jax.ShapeDtypeStruct((d_model,), np.float32)
    scale = jax.ShapeDtypeStruct((), np.float32)
    shapes = jax.eval_shape(
        lambda c, s: init_state(cfg, tx, jax.random.key(0), c, s), center, scale
    )

    def place(path, leaf):
        name = path[-1].key if isinstance(path[-1], jax.tree_util.DictKey) else None
        spec = _SPECS.get(name, sharding.FEATURES_F) if name else P()
        return leaf.update(sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, shapes)


def make_train_step(
    cfg: TrainSaeSettings, tx: optax.GradientTransformation, abstract: AutoencoderState
) -> Callable[[AutoencoderState, Array, Array], tuple[AutoencoderState, dict[str, Array]]]:
    """Returns `train_step(state, activations [B, D], number) -> (state, metrics)`, to be compiled.

    Activations are as stored; `number` counts the steps from 0. The metrics are those of
    `architectures.losses`, `grad_norm`, `dead` features and `skipped`.
    """
    weight = cfg.sparsity or 0.0  # of the penalty
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def train_step(
        state: AutoencoderState, activations: Float[Array, "B D"], number: Int[Array, ""]
    ):
        params, rest = state.params, state.rest
        x = activations.astype(jnp.float32) * rest["scale"]
        risen = jnp.minimum((number + 1) / max(cfg.sparsity_warmup_steps, 1), 1.0)
        dead = rest["idle"] >= cfg.dead_tokens
        grad = jax.grad(architectures.losses, has_aux=True)
        grads, metrics = grad(params, x, cfg, sparsity=weight * risen, dead=dead)
        # What would only lengthen a direction is taken out, for its length is set to 1 again.
        along = jnp.sum(grads["W_dec"] * params["W_dec"], axis=1, keepdims=True)
        grads["W_dec"] -= along * params["W_dec"]
        updates, opt_state = tx.update(grads, state.opt_state, params)
        params: Any = optax.apply_updates(params, updates)
        params = params | {"W_dec": architectures.unit_rows(params["W_dec"])}
        assert isinstance(opt_state, GuardState)
        fired, least = metrics.pop("fired"), metrics.pop("least")
        threshold = rest["threshold"]
        rate = jnp.where(threshold == 0, 1.0, architectures.THRESHOLD_RATE)
        moved = threshold + rate * (least - threshold)
        idle = jnp.minimum(rest["idle"] + len(x), _NEVER_MORE)
        rest = {
            "scale": rest["scale"],
            "threshold": jnp.where(jnp.isfinite(least), moved, threshold),
            "idle": jnp.where(fired, 0, idle),
        }
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "dead": jnp.sum(dead),
            "skipped": opt_state.skipped,
        }
        # The outputs are constrained too, or XLA might choose another layout for them.
        new = jax.lax.with_sharding_constraint(AutoencoderState(params, opt_state, rest), layout)
        return new, jax.tree.map(lambda each: sharding.constrain(each, P()), metrics)

    return train_step
