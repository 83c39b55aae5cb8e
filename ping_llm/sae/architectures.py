"""The five kinds of sparse autoencoder, as pure functions of their parameters.

All write a vector x of width D as f(x) @ W_dec + b_dec, with F features f(x) >= 0 of which few are
not 0, and read x - b_dec. They differ in f and in how few is asked for:

- `l1`: ReLU, and a penalty on the sum of the features (Bricken et al. 2023, Towards
  Monosemanticity).
- `gated`: whether a feature is active, and how strongly, are told apart (Rajamanoharan et al.
  2024a, Improving Dictionary Learning with Gated Sparse Autoencoders).
- `topk`: the k largest of each token (Gao et al. 2024, Scaling and evaluating sparse
  autoencoders).
- `batchtopk`: the k * B largest of a batch, later all above a threshold (Bussmann et al. 2024,
  BatchTopK Sparse Autoencoders).
- `jumprelu`: those above a learnt threshold, with a penalty on how many they are (Rajamanoharan et
  al. 2024b, Jumping Ahead).

In training, x is scaled so that its variance, summed over D, is 1. Rows of W_dec have length 1.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from ping_llm.sae.settings import TrainSaeSettings

Params = Mapping[str, Array]

DEFAULT_SPARSITY = {"jumprelu": 1.0, "gated": 0.2, "l1": 0.1}
MOST_OF_A_TOKEN = 4  # times k are the features that one token may have in batchtopk's training
THRESHOLD_RATE = 0.01  # of the running mean that becomes batchtopk's threshold


def init_params(
    key: Array, cfg: TrainSaeSettings, *, features: int, bias: Float[Array, " D"]
) -> dict[str, Array]:
    """Returns parameters: random directions of length 1, read by the same directions at first.

    Args:
        key: Of the random directions.
        cfg: Which kind.
        features: How many, F.
        bias: What `b_dec` begins with.
    """
    directions = unit_rows(jax.random.normal(key, (features, len(bias))))
    zeros = jnp.zeros(features)
    params = {"W_enc": directions.T, "W_dec": directions, "b_dec": bias.astype(jnp.float32)}
    if cfg.architecture == "gated":
        return params | {"b_gate": zeros, "r_mag": zeros, "b_mag": zeros}
    if cfg.architecture == "jumprelu":
        params["log_threshold"] = jnp.full(features, np.log(cfg.initial_threshold))
    return params | {"b_enc": zeros}


def unit_rows(rows: Float[Array, "F D"]) -> Float[Array, "F D"]:
    """Returns rows with length 1."""
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def pre_activations(params: Params, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
    """Returns what the features are made of; of `gated`, what opens the gates."""
    bias = params["b_gate" if "b_gate" in params else "b_enc"]
    return (x - params["b_dec"]) @ params["W_enc"] + bias


def gated_features(params: Params, gate: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """Returns the features of `gated`, whose two encoders share their directions."""
    magnitude = jnp.exp(params["r_mag"]) * (gate - params["b_gate"]) + params["b_mag"]
    return jnp.where(gate > 0, jax.nn.relu(magnitude), 0.0)


def decode(params: Params, features: Float[Array, "*B F"]) -> Float[Array, "*B D"]:
    """Returns what the features stand for."""
    return features @ params["W_dec"] + params["b_dec"]


def keep_largest(values: Float[Array, "B F"], k: int) -> Float[Array, "B F"]:
    """Returns `values` >= 0 with all but the k largest of each row 0."""
    return _scattered(*jax.lax.top_k(values, k), values.shape[1])


def keep_largest_of_all(values: Float[Array, "B F"], k: int, *, of_row: int) -> Array:
    """Returns `values` >= 0 with all but the k largest 0 [B, F], and at most `of_row` of a row.

    Values equal to the k-th largest all stay.
    """
    top, numbers = jax.lax.top_k(values, min(of_row, values.shape[1]))
    # Floats that are not negative are ordered like the integers that have their bits, so 31
    # comparisons find the k-th largest exactly, wherever the rows are; nothing is sorted.
    bits = jax.lax.bitcast_convert_type(top, jnp.int32)

    def narrow(i, threshold):  # the highest bit first
        higher = threshold | (1 << (30 - i))
        return jnp.where(jnp.sum(bits >= higher) >= k, higher, threshold)

    threshold = jax.lax.fori_loop(0, 31, narrow, jnp.int32(0))
    return _scattered(jnp.where(bits >= threshold, top, 0.0), numbers, values.shape[1])


def _scattered(values: Float[Array, "B k"], numbers: Int[Array, "B k"], features: int) -> Array:
    rows = jnp.arange(len(values))[:, None]
    return jnp.zeros((len(values), features), values.dtype).at[rows, numbers].set(values)


# --- thresholds that are learnt through a step ---------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump_relu(pre: Array, threshold: Array, bandwidth: float) -> Array:
    """Returns `pre` where it is above `threshold`, else 0; gradients as in section 4 of 2024b."""
    del bandwidth
    return jnp.where(pre > threshold, pre, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def step(pre: Array, threshold: Array, bandwidth: float) -> Array:
    """Returns 1 where `pre` is above `threshold`, else 0; its gradient reaches the threshold."""
    del bandwidth
    return (pre > threshold).astype(pre.dtype)


def _kernel(pre: Array, threshold: Array, bandwidth: float) -> Array:
    return (jnp.abs(pre - threshold) < bandwidth / 2) / bandwidth


def _jump_relu_back(bandwidth, saved, grad):
    pre, threshold = saved
    slope = threshold * _kernel(pre, threshold, bandwidth)
    return jnp.where(pre > threshold, grad, 0.0), -jnp.sum(slope * grad, axis=0)


def _step_back(bandwidth, saved, grad):
    pre, threshold = saved
    return jnp.zeros_like(pre), -jnp.sum(_kernel(pre, threshold, bandwidth) * grad, axis=0)


jump_relu.defvjp(lambda z, t, w: (jump_relu(z, t, w), (z, t)), _jump_relu_back)
step.defvjp(lambda z, t, w: (step(z, t, w), (z, t)), _step_back)


# --- training ------------------------------------------------------------------------------------


def losses(
    params: Params,
    x: Float[Array, "B D"],
    cfg: TrainSaeSettings,
    *,
    sparsity: Array | float,
    dead: Float[Array, " F"],
) -> tuple[Array, dict[str, Array]]:
    """Returns (loss, {what it is made of, and the features' activity}) of a batch.

    Args:
        params: The parameters.
        x: Scaled activations.
        cfg: Kind and weights.
        sparsity: Weight of the penalty.
        dead: Which features are dead.
    """
    gate_loss, penalty = jnp.zeros(()), jnp.zeros(())
    pre = pre_activations(params, x)
    if cfg.architecture == "gated":
        opened = jax.nn.relu(pre)
        features = gated_features(params, pre)
        # What the gates alone rebuild, through a decoder that does not learn from it.
        frozen = {name: jax.lax.stop_gradient(params[name]) for name in ("W_dec", "b_dec")}
        gate_loss = _squared_error(x, decode(frozen, opened))
        penalty = jnp.mean(jnp.sum(opened, axis=1))
    elif cfg.architecture == "jumprelu":
        threshold = jnp.exp(params["log_threshold"])
        features = jnp.asarray(jump_relu(jax.nn.relu(pre), threshold, cfg.bandwidth))
        steps = jnp.asarray(step(pre, threshold, cfg.bandwidth))
        active = jnp.mean(jnp.sum(steps, axis=1))
        # 2024b's appendix: a square about the number wanted. Far from it, the number itself, as in
        # its main text: at first half of all are active, and the square would drown all else.
        penalty = optax.huber_loss(active / cfg.k, jnp.ones(()))
    else:
        features = jax.nn.relu(pre)
        if cfg.architecture == "l1":
            penalty = jnp.mean(jnp.sum(features, axis=1))
        elif cfg.architecture == "topk":
            features = keep_largest(features, cfg.k)
        else:
            most = MOST_OF_A_TOKEN * cfg.k
            features = keep_largest_of_all(features, cfg.k * len(x), of_row=most)
    rebuilt = decode(params, features)
    unexplained = _squared_error(x, rebuilt)
    aux = _aux_loss(params, pre, x - rebuilt, dead) if cfg.aux_weight else jnp.zeros(())
    loss = unexplained + gate_loss + sparsity * penalty + cfg.aux_weight * aux
    fired = features > 0
    return loss, {
        "loss": loss,
        "unexplained": unexplained,
        "penalty": penalty,
        "aux_loss": aux,
        "l0": jnp.mean(jnp.sum(fired, axis=1)),
        "fired": jnp.any(fired, axis=0),
        "least": jnp.min(jnp.where(fired, features, jnp.inf)),
    }


def _squared_error(x: Float[Array, "B D"], rebuilt: Float[Array, "B D"]) -> Array:
    return jnp.mean(jnp.sum((x - rebuilt) ** 2, axis=1))


def _aux_loss(
    params: Params, pre: Float[Array, "B F"], error: Float[Array, "B D"], dead: Array
) -> Array:
    """Returns the part of the error that the D / 2 strongest dead features leave (Gao, A.2)."""

    def left_over(pre):
        most = min(max(error.shape[1] // 2, 1), pre.shape[1])
        target = jax.lax.stop_gradient(error)
        strongest = keep_largest(jnp.where(dead, jax.nn.relu(pre), 0.0), most)
        left = _squared_error(target, strongest @ params["W_dec"])
        variance = _squared_error(target, jnp.mean(target, axis=0))
        few = jnp.minimum(jnp.sum(dead) / most, 1.0)  # a few can do little about it
        return few * left / jnp.maximum(variance, 1e-12)

    return jax.lax.cond(jnp.any(dead), left_over, lambda _: jnp.zeros(()), pre)
