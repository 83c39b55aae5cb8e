"""How good an autoencoder is: on activations alone, and in the place of what the model computes."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ping_llm import tokenizer
from ping_llm.activations.reader import ActivationReader
from ping_llm.errors import ConfigError
from ping_llm.extraction.model import ModelSource
from ping_llm.models import huggingface
from ping_llm.models.decoder import Decoder
from ping_llm.packing import Batch, best_fit, next_token_batch, pack
from ping_llm.progress import progress
from ping_llm.sae.autoencoder import SparseAutoencoder
from ping_llm.sae.tokens import TokenChoice
from ping_llm.training.step import field_losses, target_fields

ROWS_AT_ONCE = 1024
_LOGIT_BYTES = 512e6  # at once


def held_out_rows(reader: ActivationReader, choice: TokenChoice, spans: np.ndarray) -> np.ndarray:
    """Returns the chosen rows of held-out prompts [n, D].

    Args:
        reader: Where they are.
        choice: Which tokens of the prompts.
        spans: The prompts, as `TokenChoice.held_out` gives them.

    Raises:
        ConfigError: There are none.
    """
    parts = []
    for first, stop in spans.tolist():
        rows = slice(first, stop)
        parts.append(reader[rows][choice.chosen(reader, rows)])
    held = np.concatenate(parts)
    if not len(held):
        raise ConfigError(
            "the held-out prompts have no tokens but special and first ones; lower min_position, "
            "or set special_tokens=true"
        )
    return held


def encoded(sae: SparseAutoencoder, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (rows [n, D] in float32, their features [n, F]), `ROWS_AT_ONCE` or fewer at a time."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        padded = np.pad(part, ((0, ROWS_AT_ONCE - len(part)), (0, 0)))  # one compiled program
        yield part.astype(np.float32), np.asarray(sae.encode(padded))[: len(part)]


def evaluate_rows(sae: SparseAutoencoder, rows: np.ndarray) -> dict[str, float]:
    """Returns what an autoencoder makes of activations [n, D].

    `explained_variance` is 1 - (squared error) / (squared distance from the mean), `l0` the mean
    number of active features, `never_active` the fraction of features that none of them activates.
    """
    error, active = 0.0, 0
    fired = np.zeros(int(sae.config["d_sae"]), bool)
    for part, features in encoded(sae, rows):
        rebuilt = np.asarray(sae.decode(jnp.asarray(features)))
        error += float(np.sum((part - rebuilt).astype(np.float64) ** 2))
        active += int(np.count_nonzero(features))
        fired |= features.any(axis=0)
    exact = rows.astype(np.float64)
    variance = float(np.sum((exact - exact.mean(axis=0)) ** 2))
    return {
        "explained_variance": 1 - error / variance if variance else 0.0,
        "l0": active / len(rows),
        "never_active": float(1 - fired.mean()),
    }


# --- in the place of the activation --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ReplacementLoss:
    """Cross-entropy of the next token, nats, with and without an autoencoder in the model.

    Attributes:
        targets: How many tokens were predicted.
        model: The model as it is.
        autoencoder: With what the autoencoder rebuilds in the place of the activation.
        zero: With zeros in its place.
        recovered: (zero - autoencoder) / (zero - model): 1 where nothing is lost.
    """

    targets: int
    model: float
    autoencoder: float
    zero: float
    recovered: float | None


def replacement_losses(
    sae: SparseAutoencoder,
    source: ModelSource,
    reader: ActivationReader,
    choice: TokenChoice,
    spans: np.ndarray,
) -> dict[str, ReplacementLoss]:
    """Returns the losses over prompts: of `all` tokens and, of a run, by field, such as `rtt`.

    Tokens that the autoencoder is not about keep their activations.

    Args:
        sae: The autoencoder.
        source: The model of the store.
        reader: Of the store.
        choice: Which tokens the autoencoder is about.
        spans: The prompts, as `TokenChoice.held_out` gives them.
    """
    graphdef, params = _load_whole(source, reader.manifest["settings"]["dtype"])
    site, layer = sae.metadata["site"], sae.metadata["layer"]
    is_run = source.checkpoint is None

    @jax.jit
    def measure(params, weights, batch, chosen, keep, rebuild):
        placed = dataclasses.replace(sae, params=weights)

        def replace(x):
            new = keep * x + rebuild * placed(x).astype(x.dtype)
            return jnp.where(chosen[..., None], new, x)

        model: Decoder = nnx.merge(graphdef, params)
        logits = model.logits_with(
            batch["inputs"],
            batch["segment_ids"],
            batch["positions"],
            site=site,
            layer=layer,
            replace=replace,
        )
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        if is_run:
            fields = target_fields(batch["inputs"], batch["targets"])
        else:
            fields = jnp.zeros_like(batch["targets"])
        return field_losses(nll, fields, batch["mask"])

    ways = {"model": (1.0, 0.0), "autoencoder": (0.0, 1.0), "zero": (0.0, 0.0)}
    sums = {way: np.zeros(len(tokenizer.FIELDS)) for way in ways}
    counts = np.zeros(len(tokenizer.FIELDS))
    batches = _batches(reader, choice, spans, vocab_size=source.cfg.vocab_size)
    with progress("evaluate in the model", total=len(batches), unit="batches") as bar:
        for batch, chosen in batches:
            for way, (keep, rebuild) in ways.items():
                args = sae.params, vars(batch), chosen, keep, rebuild
                nll, count = jax.device_get(measure(params, *args))
                sums[way] += nll
            counts += count
            bar.update(1)
    losses = {"all": _loss({way: each.sum() for way, each in sums.items()}, counts.sum())}
    if is_run:
        for index, name in enumerate(tokenizer.FIELDS):
            if counts[index]:
                losses[name] = _loss({way: s[index] for way, s in sums.items()}, counts[index])
    return losses


def _loss(sums: Mapping[str, float], count: float) -> ReplacementLoss:
    means = {way: float(total / max(count, 1)) for way, total in sums.items()}
    at_stake = means["zero"] - means["model"]
    recovered = (means["zero"] - means["autoencoder"]) / at_stake if at_stake else None
    return ReplacementLoss(targets=int(count), recovered=recovered, **means)


def _load_whole(source: ModelSource, store_dtype: str) -> tuple[Any, Any]:
    """Returns (graphdef, parameters) of a model with all its layers and its head."""
    dtype = source.compute_dtype(store_dtype)
    if source.checkpoint is not None:
        return nnx.split(huggingface.load(source.checkpoint, dtype=dtype))
    own = dataclasses.replace(source.cfg, dtype=dtype, remat=False)
    return nnx.graphdef(nnx.eval_shape(lambda: Decoder(own, rngs=nnx.Rngs(0)))), source.run_params


def _batches(
    reader: ActivationReader, choice: TokenChoice, spans: np.ndarray, *, vocab_size: int
) -> list[tuple[Batch, np.ndarray]]:
    """Returns (batch [B, T], which of its inputs are chosen [B, T]), all of one shape."""
    prompts, chosen = [], []
    for first, stop in spans.tolist():
        rows = slice(first, stop)
        prompts.append(reader.column("tokens", rows))
        chosen.append(choice.chosen(reader, rows))
    lengths = np.array([len(prompt) for prompt in prompts])
    width = int(lengths.max()) + 1  # one place is lost to the shift of the targets
    rows = best_fit(lengths, width)
    height = max(min(int(_LOGIT_BYTES / (4 * vocab_size * width)), len(rows)), 1)
    batches = []
    for start in range(0, len(rows), height):
        part = [*rows[start : start + height]]
        empty = [[] for _ in range(height - len(part))]
        tokens, segment_ids, positions = pack(
            [[prompts[i] for i in row] for row in [*part, *empty]], width
        )
        dense = np.zeros(tokens.shape, bool)
        dense[segment_ids > 0] = np.concatenate([chosen[i] for row in part for i in row])
        batches.append((next_token_batch(tokens, segment_ids, positions), dense[:, :-1]))
    return batches
