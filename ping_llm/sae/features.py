"""What the features of an autoencoder are active on, over the tokens of a store."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from ping_llm.activations.reader import ActivationReader
from ping_llm.progress import progress
from ping_llm.sae.autoencoder import SparseAutoencoder
from ping_llm.sae.evaluation import encoded
from ping_llm.sae.properties import TokenProperty, token_properties
from ping_llm.sae.tokens import TokenChoice

ROWS_AT_ONCE, VALUES_AT_ONCE = 8192, 1 << 26  # tokens, of whole prompts; their features
_CHOOSING_PROMPTS = 1 << 62  # a key that no epoch has


@dataclasses.dataclass(frozen=True)
class Association:
    """How closely a feature goes with a property of tokens.

    Attributes:
        property: Name of the property.
        share: Part of the entropy of "the feature is active" that the property explains, beyond
            what the token's place explains; for the place itself, all that it explains.
        category: The category that contributes most.
        within: Part of the feature's tokens that are of this category.
        base: Part of all tokens that are; for a property other than the place, of the tokens in
            the places where the feature is active.
    """

    property: str
    share: float
    category: str
    within: float
    base: float


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """What features were active on.

    Attributes:
        tokens: Number of tokens looked at.
        counts: Tokens on which each feature was active [F], int64.
        means: Mean strength where it was [F].
        maxima: Largest strength [F].
        top_strengths: Its largest strengths, from different prompts, descending; 0: none [m, F].
        top_rows: Rows of the store where these are [m, F], int64.
        properties: The properties of the tokens; empty for language models.
        joint: For each property, tokens of each feature by place and category
            [F, places, categories]; of the place itself [F, places].
        totals: The same over all tokens.
    """

    tokens: int
    counts: np.ndarray
    means: np.ndarray
    maxima: np.ndarray
    top_strengths: np.ndarray
    top_rows: np.ndarray
    properties: list[TokenProperty]
    joint: list[np.ndarray]
    totals: list[np.ndarray]

    @property
    def contribution(self) -> np.ndarray:
        """How much each feature puts into what is rebuilt: its mean square, about [F]."""
        return self.counts * self.means**2 / max(self.tokens, 1)


def choose_prompts(reader: ActivationReader, tokens: int, *, seed: int) -> np.ndarray:
    """Returns (first row, row after the last) of prompts that have about so many tokens [n, 2]."""
    offsets = reader.sample_offsets()
    spans = np.stack([offsets[:-1], offsets[1:]], axis=1)
    spans = spans[spans[:, 1] > spans[:, 0]]
    rng = np.random.Generator(np.random.Philox(key=[seed, _CHOOSING_PROMPTS]))
    order = rng.permutation(len(spans))
    sizes = np.cumsum(np.diff(spans[order], axis=1)[:, 0])
    return spans[np.sort(order[: int(np.searchsorted(sizes, tokens)) + 1])]


def gather_statistics(
    sae: SparseAutoencoder,
    reader: ActivationReader,
    choice: TokenChoice,
    spans: np.ndarray,
    *,
    contexts: int,
    named: bool,
) -> FeatureStatistics:
    """Returns what features are active on, over the chosen tokens of prompts.

    Args:
        sae: The autoencoder.
        reader: Of its activations.
        choice: Which tokens of the prompts it is about.
        spans: The prompts.
        contexts: How many of a feature's strongest tokens are kept.
        named: Whether the tokens are those of a latency model, whose properties are known.
    """
    F = int(sae.config["d_sae"])
    properties, places = [], np.zeros(0, np.int32)
    if named:
        properties = token_properties([reader.column("tokens", slice(*s)) for s in spans.tolist()])
        places = properties[0].codes
    n_places = len(properties[0].categories) if named else 0
    sizes = [n_places * (len(p.categories) if i else 1) for i, p in enumerate(properties)]
    joint = [np.zeros((F, size), np.int32) for size in sizes]
    totals = [np.zeros(size, np.int64) for size in sizes]
    counts, sums = np.zeros(F, np.int64), np.zeros(F)
    strengths, rows = np.zeros((contexts, F), np.float32), np.zeros((contexts, F), np.int64)
    seen, first_token = 0, 0
    with progress("features", total=int(np.diff(spans).sum()), unit="tokens") as bar:
        for group in _groups(spans, max(min(ROWS_AT_ONCE, VALUES_AT_ONCE // F), 1)):
            numbers = np.concatenate([np.arange(first, stop) for first, stop in group.tolist()])
            chosen = np.concatenate([choice.chosen(reader, slice(*s)) for s in group.tolist()])
            activations = np.concatenate([reader[slice(*span)] for span in group.tolist()])
            dense = np.concatenate([features for _, features in encoded(sae, activations)])
            dense[~chosen] = 0
            seen += int(chosen.sum())
            counts += np.count_nonzero(dense, axis=0)
            sums += dense.sum(axis=0, dtype=np.float64)
            strengths, rows = _strongest(strengths, rows, dense, numbers, group)
            where, which = np.nonzero(dense)
            own = slice(first_token, first_token + len(numbers))
            for index, each in enumerate(properties):
                code = places[own]
                if index:
                    code = code * len(each.categories) + each.codes[own]
                flat = np.bincount(which * sizes[index] + code[where], minlength=F * sizes[index])
                joint[index] += flat.reshape(F, -1).astype(np.int32)
                totals[index] += np.bincount(code[chosen], minlength=sizes[index])
            first_token += len(numbers)
            bar.update(len(numbers))
    return FeatureStatistics(
        tokens=seen,
        counts=counts,
        means=sums / np.maximum(counts, 1),
        maxima=strengths[0],
        top_strengths=strengths,
        top_rows=rows,
        properties=properties,
        joint=[joint[0], *(j.reshape(F, n_places, -1) for j in joint[1:])] if named else [],
        totals=[totals[0], *(t.reshape(n_places, -1) for t in totals[1:])] if named else [],
    )


def _groups(spans: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
    """Yields prompts that have about `tokens` tokens together."""
    ends = np.cumsum(np.diff(spans, axis=1)[:, 0])
    cuts = np.searchsorted(ends, np.arange(tokens, ends[-1], tokens)) + 1
    yield from (group for group in np.split(spans, np.unique(cuts)) if len(group))


def _strongest(
    strengths: np.ndarray,
    rows: np.ndarray,
    dense: np.ndarray,
    numbers: np.ndarray,
    spans: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `strengths` and `rows` [m, F] with the best token of each new prompt among them."""
    found, where, start = [strengths], [rows], 0
    for size in np.diff(spans, axis=1)[:, 0].tolist():
        part = dense[start : start + size]
        best = part.argmax(axis=0)
        found.append(np.take_along_axis(part, best[None], axis=0))
        where.append(numbers[start + best][None])
        start += size
    found, where = np.concatenate(found), np.concatenate(where)
    order = np.argsort(-found, axis=0, kind="stable")[: len(strengths)]
    return np.take_along_axis(found, order, axis=0), np.take_along_axis(where, order, axis=0)


# --- what they go with ---------------------------------------------------------------------------


def associations(statistics: FeatureStatistics, feature: int) -> list[Association]:
    """Returns how a feature goes with each property, the place first, then by share, descending."""
    if not statistics.properties or not statistics.counts[feature]:
        return []
    entropy = _entropy(statistics.counts[feature] / statistics.tokens)
    found = []
    for index, each in enumerate(statistics.properties):
        active, total = statistics.joint[index][feature], statistics.totals[index]
        if index == 0:
            active, total = active[None], total[None]
        information, gains = _information(active, total)
        bits, category = max(information, 0.0) / statistics.tokens, int(gains.argmax())
        fired = active.sum(axis=1)
        of_place = total[:, category] / np.maximum(total.sum(axis=1), 1)
        found.append(
            Association(
                property=each.name,
                share=min(bits / entropy, 1.0) if entropy else 0.0,
                category=each.categories[category],
                within=float(active[:, category].sum() / fired.sum()),
                base=float(fired @ of_place / fired.sum()),
            )
        )
    return [found[0], *sorted(found[1:], key=lambda each: -each.share)]


def _entropy(p: float) -> float:
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)


def _information(active: np.ndarray, total: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns (information, how much each category is active on beyond chance), bits times tokens.

    It is the mutual information of "active" and the category within each place, less what so few
    tokens would show by chance (Miller 1955: (categories - 1) / (2 n ln 2) bits in each place).

    Args:
        active: Tokens of the feature [places, categories].
        total: All tokens [places, categories].
    """
    rate = active.sum(axis=1, keepdims=True) / np.maximum(total.sum(axis=1, keepdims=True), 1)
    parts = []
    for here, expected in ((active, total * rate), (total - active, total * (1 - rate))):
        ratio = np.divide(here, expected, out=np.ones(total.shape), where=here > 0)
        parts.append(here * np.log2(ratio))
    varies = (rate[:, 0] > 0) & (rate[:, 0] < 1)
    chance = np.maximum((total > 0).sum(axis=1) - 1, 0)[varies].sum() / (2 * math.log(2))
    return float(parts[0].sum() + parts[1].sum() - chance), parts[0].sum(axis=0)


def neighbours(
    sae: SparseAutoencoder, features: Sequence[int], n: int
) -> list[list[tuple[int, float]]]:
    """Returns, for each of `features`, the n whose directions are most alike: (number, cosine)."""
    directions = np.asarray(sae.params["W_dec"])
    directions = directions / np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-12)
    found = []
    for feature in features:
        cosines = directions @ directions[feature]
        cosines[feature] = -np.inf
        best = np.argsort(-cosines, kind="stable")[: min(n, len(cosines) - 1)]
        found.append([(int(i), float(cosines[i])) for i in best])
    return found
