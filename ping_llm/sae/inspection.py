"""What an autoencoder is worth, and what its features are: numbers, names, contexts, a page."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from ping_llm import settings, tokenizer
from ping_llm.activations import store
from ping_llm.activations.reader import ActivationReader
from ping_llm.errors import CheckpointError, ConfigError
from ping_llm.extraction.model import ModelSource, open_model
from ping_llm.extraction.templates import CheckpointTokenizer
from ping_llm.models.config import END_SITES
from ping_llm.report import write_page
from ping_llm.sae.autoencoder import SparseAutoencoder
from ping_llm.sae.evaluation import (
    evaluate_rows,
    held_out_rows,
    replacement_losses,
)
from ping_llm.sae.features import (
    Association,
    FeatureStatistics,
    associations,
    choose_prompts,
    gather_statistics,
    neighbours,
)
from ping_llm.sae.page import html_page
from ping_llm.sae.result import Context, FeatureReport, InspectSaeResult
from ping_llm.sae.settings import InspectSaeSettings
from ping_llm.sae.tokens import TokenChoice

AROUND = 24  # tokens of a context before its strongest, and half as many after it
NEIGHBOURS = 3
TOKENS_TO_TRUST = 20  # on which a feature is active, before its name counts


@settings.takes(InspectSaeSettings)
def inspect_sae(chosen: InspectSaeSettings) -> InspectSaeResult:
    """Returns what an autoencoder is worth and what its features are; writes a page if asked.

    Raises:
        CheckpointError: There is no autoencoder, or it is damaged, or the model cannot be read.
        ConfigError: Store, site and layer do not go with it, or the model is not the store's.
        StorageError: The store cannot be read, or the page not be written.
    """
    sae = SparseAutoencoder.load(chosen.sae)
    facts = sae.metadata
    url = chosen.activations or (facts.get("store") or {}).get("url")
    site = chosen.site or facts.get("site")
    if url is None or site is None:
        raise ConfigError(
            f"{chosen.sae} does not say what it was trained on: give --activations, --site and "
            "--layer"
        )
    layer = facts.get("layer") if chosen.layer is None else chosen.layer
    reader = ActivationReader(url, site=site, layer=layer)
    if reader.shape[1] != sae.config["d_in"]:
        raise ConfigError(
            f"{chosen.sae} is of activations of width {sae.config['d_in']}, those in {url} have "
            f"{reader.shape[1]}; give the store of its model"
        )
    layer = None if site in END_SITES else layer
    sae = dataclasses.replace(
        sae, config={**sae.config, "metadata": {**facts, "site": site, "layer": layer}}
    )
    choice = _choice(facts)
    source = _find_model(chosen.model, reader.manifest)
    spans = choice.held_out(reader)
    measured = evaluate_rows(sae, held_out_rows(reader, choice, spans))
    whole = _are_whole(reader, spans)
    can_be_replaced = site not in ("q", "k", "v")
    losses = None
    if source is not None and whole and can_be_replaced:
        losses = replacement_losses(sae, source, reader, choice, spans)
    elif source is not None:
        reason = f"site={site!r} cannot be replaced" if whole else "the store lacks some tokens"
        print(f"{reason}: the model's loss is not measured", file=sys.stderr, flush=True)
    named = whole and reader.manifest["settings"].get("format") == "measurements"
    statistics = gather_statistics(
        sae,
        reader,
        choice,
        choose_prompts(reader, chosen.tokens, seed=choice.seed),
        contexts=chosen.contexts,
        named=named,
    )
    alive = np.flatnonzero(statistics.counts)
    by_part = alive[np.argsort(-statistics.contribution[alive], kind="stable")].tolist()
    related = {feature: associations(statistics, feature) for feature in by_part}
    order = sorted(by_part, key=lambda feature: -_closeness(statistics, feature, related[feature]))
    shown, others = order[: chosen.features], order[chosen.features :]
    texts = _Texts(reader, source, named=named)
    reports = [
        _report(
            statistics, feature, related[feature], near, texts.contexts(sae, statistics, feature)
        )
        for feature, near in zip(shown, neighbours(sae, shown, NEIGHBOURS), strict=True)
    ]
    trained_on = (facts.get("store") or {}).get("identity")
    result = InspectSaeResult(
        sae=str(chosen.sae),
        architecture=facts.get("trained_as") or sae.config["architecture"],
        d_in=int(sae.config["d_in"]),
        d_sae=int(sae.config["d_sae"]),
        held_out=trained_on == store.identity(reader.manifest),
        explained_variance=measured["explained_variance"],
        l0=measured["l0"],
        losses=losses,
        tokens=statistics.tokens,
        never_active=int(sae.config["d_sae"]) - len(alive),
        features=reports,
    )
    if chosen.report is not None:
        rest = [_report(statistics, feature, related[feature], [], []) for feature in others]
        write_page(html_page(result, statistics, rest), chosen.report)
    return result


def _choice(facts: Mapping[str, Any]) -> TokenChoice:
    """Returns which tokens the autoencoder is about; of one made elsewhere, as by default."""
    defaults = {"seed": 0, "held_out_tokens": 16384, "min_position": 1, "special_tokens": False}
    return TokenChoice(**{name: facts.get(name, value) for name, value in defaults.items()})


def _are_whole(reader: ActivationReader, spans: np.ndarray) -> bool:
    """Returns whether the store holds every token of these prompts."""
    positions = (reader.column("positions", slice(*span)) for span in spans.tolist())
    return all(np.array_equal(each, np.arange(len(each))) for each in positions)


def _find_model(given: str | None, manifest: Mapping[str, Any]) -> ModelSource | None:
    """Returns the model of a store; None where the store's own is not at hand, which is said.

    Raises:
        CheckpointError: The given one cannot be read.
        ConfigError: It is not the store's.
    """
    name = given or manifest["made_from"]["model"]
    try:
        source = open_model(name)
    except CheckpointError as error:
        if given:
            raise
        said = f"the model of the store is not at hand, so its loss is not measured: {error}"
        print(said, file=sys.stderr, flush=True)
        return None
    if source.identity != manifest["model"]:
        raise ConfigError(
            f"{name} is not the model whose activations the store holds; give that one as --model"
        )
    return source


def _closeness(statistics: FeatureStatistics, feature: int, related: list[Association]) -> float:
    """Returns how closely a feature goes with a property beyond the place; of rare ones, 0."""
    enough = statistics.counts[feature] >= TOKENS_TO_TRUST
    return related[1].share if related and enough else 0.0


def _report(
    statistics: FeatureStatistics,
    feature: int,
    related: list[Association],
    near: list[tuple[int, float]],
    contexts: list[Context],
) -> FeatureReport:
    return FeatureReport(
        feature=feature,
        density=float(statistics.counts[feature] / statistics.tokens),
        mean=float(statistics.means[feature]),
        maximum=float(statistics.maxima[feature]),
        associations=related,
        neighbours=near,
        contexts=contexts,
    )


# --- contexts ------------------------------------------------------------------------------------


class _Texts:
    """The tokens of a store as text."""

    def __init__(self, reader: ActivationReader, source: ModelSource | None, *, named: bool):
        self._reader, self._named = reader, named
        self._offsets = reader.sample_offsets()
        self._tokenizer = None
        directory = source.checkpoint if source else None
        if directory is not None and (directory / "tokenizer.json").is_file():
            size = source.cfg.vocab_size if source else 0
            self._tokenizer = CheckpointTokenizer(directory, chat=False, vocab_size=size)

    def of(self, tokens: np.ndarray) -> list[str]:
        """Returns each token as text; as its number where the tokenizer is not at hand."""
        if self._named:
            return [tokenizer.token_name(token).removeprefix("byte ") for token in tokens.tolist()]
        return self._tokenizer.texts(tokens) if self._tokenizer else list(map(str, tokens.tolist()))

    def contexts(
        self, sae: SparseAutoencoder, statistics: FeatureStatistics, feature: int
    ) -> list[Context]:
        """Returns where a feature is strongest."""
        contexts = []
        strengths, rows = statistics.top_strengths[:, feature], statistics.top_rows[:, feature]
        for row in rows[strengths > 0].tolist():
            sample = int(np.searchsorted(self._offsets, row, side="right")) - 1
            first, stop = self._offsets[sample : sample + 2].tolist()
            begin, end = max(row - AROUND, first), min(row + AROUND // 2 + 1, stop)
            tokens = self._reader.column("tokens", slice(begin, end))
            # Of one size, and so one compiled program.
            padded = np.zeros((AROUND + AROUND // 2 + 1, self._reader.shape[1]), np.float32)
            padded[: end - begin] = self._reader[begin:end]
            active = np.asarray(sae.encode(padded))[: end - begin, feature]
            caption = ""
            if self._named:
                prompt = self._reader.column("tokens", slice(first, stop))
                caption = _measurement(prompt, row - first)
            (name,) = self._reader.rows([row]).samples
            contexts.append(Context(name, self.of(tokens), active.tolist(), row - begin, caption))
        return contexts


def _measurement(prompt: np.ndarray, index: int) -> str:
    """Returns the measurement that a token of a latency model's prompt is part of, as text."""
    starts = np.flatnonzero(prompt == tokenizer.MEASUREMENT_START)
    number = int(np.searchsorted(starts, index, side="right"))
    if not number:
        return ""
    stop = starts[number] if number < len(starts) else len(prompt)
    return tokenizer.format_tokens(prompt[starts[number - 1] : stop]).replace("\n", " ")
