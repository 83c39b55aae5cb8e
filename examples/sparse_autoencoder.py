"""Trains a sparse autoencoder on the activations in a store, and draws how it went.

    python examples/sparse_autoencoder.py --store acts --layer 2 --output sae.png

Each activation is written as a sum of `--active` out of `--features` directions (TopK; Gao et al.
2024, "Scaling and evaluating sparse autoencoders"). What counts is the part of the variance that
the sum does not explain, at so few directions, and how many directions are never used.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ping_llm import ActivationReader

EVALUATION_ROWS = 8192


def init(key, mean, n_features):
    """Returns parameters: unit directions, read by the same directions at first."""
    directions = jax.random.normal(key, (n_features, len(mean)))
    directions /= jnp.linalg.norm(directions, axis=1, keepdims=True)
    return {
        "encode": directions.T,
        "encode_bias": jnp.zeros(n_features),
        "decode": directions,
        "decode_bias": mean,
    }


def forward(params, x, n_active):
    """Returns (x as rebuilt [B, D], strength of each feature [B, F], at most `n_active` not 0)."""
    strength = (x - params["decode_bias"]) @ params["encode"] + params["encode_bias"]
    top, which = jax.lax.top_k(strength, n_active)
    rows = jnp.arange(len(x))[:, None]
    sparse = jnp.zeros_like(strength).at[rows, which].set(jax.nn.relu(top))
    directions = params["decode"] / jnp.linalg.norm(params["decode"], axis=1, keepdims=True)
    return sparse @ directions + params["decode_bias"], sparse


def loss(params, x, n_active):
    rebuilt, _ = forward(params, x, n_active)
    return jnp.mean(jnp.sum((x - rebuilt) ** 2, axis=1))


@functools.partial(jax.jit, static_argnames=("tx", "n_active"))
def step(params, opt_state, x, *, tx, n_active):
    value, grads = jax.value_and_grad(loss)(params, x, n_active)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", required=True)
    parser.add_argument("--site", default="residual")
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--active", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="sae.png")
    args = parser.parse_args()

    reader = ActivationReader(args.store, site=args.site, layer=args.layer)
    rng = np.random.default_rng(args.seed)
    held = reader[rng.choice(len(reader), min(EVALUATION_ROWS, len(reader)), replace=False)]
    held = jnp.asarray(held, jnp.float32)
    mean = held.mean(axis=0)
    # Scaled so that the typical centred activation has length 1: one learning rate fits all layers.
    scale = jnp.sqrt(jnp.mean(jnp.sum((held - mean) ** 2, axis=1)))

    params = init(jax.random.key(args.seed), mean / scale, args.features)
    tx = optax.adam(optax.cosine_decay_schedule(args.learning_rate, args.steps))
    opt_state, unexplained = tx.init(params), []
    size = min(args.batch_size, len(reader))
    batches = reader.batches(size, seed=args.seed, kind="jax")
    for i in range(args.steps):
        x = next(batches).astype(jnp.float32) / scale
        params, opt_state, value = step(params, opt_state, x, tx=tx, n_active=args.active)
        unexplained.append(value)  # the variance is 1, so the loss is the part of it
        if (i + 1) % 100 == 0:
            print(f"step {i + 1}: {float(value):.4f} of the variance unexplained")

    rebuilt, sparse = forward(params, held / scale, args.active)
    left = float(jnp.mean(jnp.sum((held / scale - rebuilt) ** 2, axis=1)))
    frequency = np.sort(np.asarray((sparse > 0).mean(axis=0)))[::-1]
    dead = float((frequency == 0).mean())
    print(f"{left:.4f} unexplained, {dead:.1%} of {args.features} features never active")
    draw(np.array(unexplained), frequency, left, args)


def draw(unexplained: np.ndarray, frequency: np.ndarray, left: float, args) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    learning, features = figure.subplots(1, 2)
    learning.plot(unexplained, lw=0.8)
    learning.set(yscale="log", xlabel="step", ylabel="variance unexplained")
    learning.set_title(f"{args.site} {args.layer}: {left:.1%} left with {args.active} active")
    used = frequency[frequency > 0]
    features.plot(np.arange(1, len(used) + 1), used)
    features.set(
        yscale="log", xlabel="feature, by frequency", ylabel="part of tokens it is active on"
    )
    features.set_xlim(0, args.features)
    features.set_title(f"{len(used):,} of {args.features:,} features in use")
    figure.savefig(args.output, dpi=120)


if __name__ == "__main__":
    main()
