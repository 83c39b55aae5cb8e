"""A checkpoint's own tokenizer and chat template."""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ping_llm.activations.roles import BOS, REAL, SPECIAL
from ping_llm.errors import DataError
from ping_llm.models.huggingface import read_json

TEXTS_AT_ONCE = 256


class CheckpointTokenizer:
    """A checkpoint's own tokenizer.

    Attributes:
        identity: Hash of what decides the token ids.
        template: Its chat template, or None.
    """

    def __init__(self, directory: Path, *, chat: bool, vocab_size: int):
        import tokenizers

        self._vocab_size = vocab_size
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise DataError(f"{path} does not exist; the checkpoint needs its fast tokenizer")
        content = path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{path} is not a tokenizer: {error}") from None
        # Some checkpoints are saved with either, which would cut or pad prompts unseen.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        path = directory / "tokenizer_config.json"
        settings = read_json(path) if path.is_file() else {}
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = np.array([i for i, token in added.items() if token.special], np.int64)
        bos = _content(settings.get("bos_token"))
        self._bos = None if bos is None else self._tokenizer.token_to_id(bos)
        self.template = ChatTemplate(directory, settings) if chat else None
        parts = content + (self.template.source.encode() if self.template else b"")
        self.identity = hashlib.sha256(parts).hexdigest()[:32]

    def encode(
        self, texts: Iterable[tuple[str, str]], *, add_special: bool
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (sample, token ids) of each (sample, text).

        Raises:
            DataError: The model does not know a token id.
        """
        encode, texts = self._tokenizer.encode_batch_fast, iter(texts)
        while batch := list(itertools.islice(texts, TEXTS_AT_ONCE)):
            encoded = encode([text for _, text in batch], add_special_tokens=add_special)
            for (sample, _), one in zip(batch, encoded, strict=True):
                tokens, vocab_size = np.array(one.ids, np.int32), self._vocab_size
                if len(tokens) and tokens.max() >= vocab_size:
                    raise DataError(
                        f"{sample}: token id {tokens.max()} is not below the model's "
                        f"{vocab_size=}; the tokenizer is not this model's"
                    )
                yield sample, tokens

    def roles(self, tokens: np.ndarray) -> np.ndarray:
        """Returns REAL, SPECIAL or BOS of each token [n], uint8."""
        roles = np.where(np.isin(tokens, self._special), SPECIAL, REAL).astype(np.uint8)
        roles[tokens == (-1 if self._bos is None else self._bos)] = BOS
        return roles


def _content(token: Any) -> str | None:
    """Returns the text of a token in `tokenizer_config.json`, where it is a string or an object."""
    return token.get("content") if isinstance(token, dict) else token


class ChatTemplate:
    """The model's own chat template, in a sandbox; like transformers' `apply_chat_template`."""

    def __init__(self, directory: Path, settings: dict[str, Any]):
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        path = directory / "chat_template.jinja"
        source = settings.get("chat_template")
        if path.is_file():
            source = path.read_text(encoding="utf-8")
        if isinstance(source, list):  # several, by name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not isinstance(source, str):
            raise DataError(
                f"{directory} has no chat template; use an instruct model or --format text"
            )
        self.source = source

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = raise_exception
        self._variables = {
            key: _content(settings.get(key)) or ""
            for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        self._error = jinja2.TemplateError
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(f"{directory}: its chat template cannot be used: {error}") from None

    def render(self, record: dict[str, Any], sample: str, *, generate: bool = False) -> str:
        """Returns the text of the chat in a record's `messages`, with its `tools` if it has any.

        Args:
            record: The chat.
            sample: What to call it in an error.
            generate: Whether the text ends where the model's answer begins.

        Raises:
            DataError: The template refuses it.
        """
        try:
            return self._template.render(
                messages=record["messages"],
                tools=record.get("tools"),
                add_generation_prompt=generate,
                **self._variables,
            )
        except (self._error, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{sample}: the chat template refuses these messages: {error}"
            ) from None
