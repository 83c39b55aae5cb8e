"""How a language model continues a prompt, to check that its checkpoint was read right."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from ping_llm.errors import CheckpointError, ConfigError
from ping_llm.extraction.model import open_model
from ping_llm.extraction.templates import CheckpointTokenizer
from ping_llm.models import huggingface
from ping_llm.prediction import decode
from ping_llm.prediction.settings import DEFAULT_MAX_TOKENS, GenerateSettings
from ping_llm.progress import progress


@dataclasses.dataclass(frozen=True)
class TextResult:
    """A prompt and its continuation.

    Attributes:
        text: Both, without special tokens.
        prompt_tokens: Token ids of the prompt, with those that the tokenizer itself adds.
        tokens: Token ids of the continuation, the last of which may be one that ends a text.
        ended: Whether it is.
    """

    text: str
    prompt_tokens: list[int]
    tokens: list[int]
    ended: bool


def continue_prompt(chosen: GenerateSettings) -> TextResult:
    """Returns the continuation of a prompt by a language model.

    It ends with a token that the checkpoint says ends a text, or after `max_tokens`. Nothing else
    that a `generation_config.json` asks for is done.

    Raises:
        ConfigError: The model is a run, or not supported, or the prompt has no token.
        CheckpointError: The checkpoint cannot be read.
        DataError: The tokenizer cannot be read, or is another model's.
    """
    assert chosen.model is not None  # which the settings see to
    assert chosen.prompt is not None
    source = open_model(chosen.model)
    if source.checkpoint is None:
        raise ConfigError(f"{chosen.model} is a run; give it as --run, with --count")
    tokenizer = CheckpointTokenizer(source.checkpoint, chat=False, vocab_size=source.cfg.vocab_size)
    ((_, prompt),) = tokenizer.encode([("the prompt", chosen.prompt)], add_special=True)
    if not len(prompt):
        raise ConfigError("the prompt has no token; give --prompt some text")
    total = huggingface.checkpoint_bytes(source.checkpoint)
    with progress(f"load {source.name}", total=total, unit="bytes") as bar:
        model = huggingface.load(source.checkpoint, on_tensor=bar.update)
    ends = _end_tokens(source.checkpoint)
    # Force full float32 matmuls; GPUs and TPUs default to lower precision.
    exact = "highest" if source.cfg.dtype == "float32" else "default"
    with jax.default_matmul_precision(exact):
        tokens = sample(
            model,
            prompt,
            max_tokens=chosen.max_tokens or DEFAULT_MAX_TOKENS,
            ends=ends,
            temperature=chosen.temperature or 0.0,
            seed=chosen.seed,
        )
    text = tokenizer.decode([*prompt.tolist(), *tokens])
    return TextResult(text, prompt.tolist(), tokens, bool(tokens) and tokens[-1] in ends)


def sample(
    model: nnx.Module,
    prompt: np.ndarray,
    *,
    max_tokens: int,
    ends: frozenset[int] = frozenset(),
    temperature: float = 0.0,
    seed: int = 0,
) -> list[int]:
    """Returns the token ids that follow a prompt, each the likeliest, or drawn.

    Args:
        model: A `Decoder`.
        prompt: Token ids [P], at least one.
        max_tokens: How many to return at most.
        ends: Ids after which nothing comes.
        temperature: What logits are divided by before one is drawn; 0: take the likeliest.
        seed: Seed of the draws.
    """
    decoder, rng, tokens = nnx.split(model), np.random.default_rng(seed), []
    # All but the last are read at once; where there is no other, a place that nobody sees.
    before = np.append(-1, prompt[:-1])[len(prompt) > 1 :][None].astype(np.int32)
    positions = np.where(before >= 0, np.arange(before.shape[1]), -1).astype(np.int32)
    cache = decode.begin(*decoder, np.maximum(before, 0), positions, len(prompt) + max_tokens + 1)
    column, position, last = before.shape[1], len(prompt) - 1, int(prompt[-1])
    with progress("generate", total=max_tokens, unit="tokens") as bar:
        while len(tokens) < max_tokens and last not in (ends if tokens else ()):
            inputs = np.array([last], np.int32), np.array([position], np.int32), np.int32(column)
            cache, logits = decode.advance(*decoder, cache, *inputs)
            scores = np.asarray(logits[0], np.float64)
            if temperature:
                scores = scores / temperature + rng.gumbel(size=scores.shape)
            last = int(np.argmax(scores))
            tokens.append(last)
            position, column = position + 1, column + 1
            bar.update(1)
    return tokens


def _end_tokens(directory: Path) -> frozenset[int]:
    """Returns the ids that end a text, as transformers finds them."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        ids = huggingface.read_json(path).get("eos_token_id") if path.is_file() else None
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(i) is int for i in ids):
                raise CheckpointError(f"{path}: eos_token_id is {ids}; expected whole numbers")
            return frozenset(ids)
    return frozenset()
