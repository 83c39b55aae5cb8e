"""What `inspect-sae` finds."""

import dataclasses

from ping_llm.sae.evaluation import ReplacementLoss
from ping_llm.sae.features import Association


@dataclasses.dataclass(frozen=True)
class Context:
    """A stretch of a prompt around a token on which a feature is strongly active.

    Attributes:
        sample: Id of the prompt.
        tokens: Its tokens as text.
        strengths: How active the feature is on each.
        strongest: Index of the strongest token.
        caption: For a latency model, the measurement which that token is part of; else empty.
    """

    sample: str
    tokens: list[str]
    strengths: list[float]
    strongest: int
    caption: str


@dataclasses.dataclass(frozen=True)
class FeatureReport:
    """What is known of a feature.

    Attributes:
        feature: Its number.
        density: Part of the tokens on which it is active.
        mean: Mean strength there.
        maximum: Largest strength.
        associations: What it goes with, see `Association`; empty for language models.
        neighbours: The features whose directions are most alike: (number, cosine).
        contexts: Where it is strongest; only of the features that are shown in full.
    """

    feature: int
    density: float
    mean: float
    maximum: float
    associations: list[Association]
    neighbours: list[tuple[int, float]]
    contexts: list[Context]


@dataclasses.dataclass(frozen=True)
class InspectSaeResult:
    """What an autoencoder is worth, and what its features are.

    Attributes:
        sae: Where it is.
        architecture: As `cfg.json` names it.
        d_in: Width of the activations.
        d_sae: Number of features.
        held_out: Whether the evaluation is on prompts that it was not trained on.
        explained_variance: On these prompts.
        l0: Mean number of active features there.
        losses: Of the model with and without it, by what was predicted; None: not measured.
        tokens: Number of tokens over which features were looked at.
        never_active: Features that none of these activates.
        features: As many of the active ones as asked for: of a latency model those first whose
            activity goes closest with a property beyond the place, else those that rebuild most.
    """

    sae: str
    architecture: str
    d_in: int
    d_sae: int
    held_out: bool
    explained_variance: float
    l0: float
    losses: dict[str, ReplacementLoss] | None
    tokens: int
    never_active: int
    features: list[FeatureReport]
