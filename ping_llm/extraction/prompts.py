"""Prompts: what the model is given, in token ids, of text, chats, ids or measurements."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ping_llm.data import windows
from ping_llm.data.rows import SPLITS, ProbeRows, read_metadata
from ping_llm.errors import ConfigError, DataError
from ping_llm.extraction.config import ExtractionConfig
from ping_llm.extraction.records import Records, Unit
from ping_llm.models.qwen2 import read_json

REAL, SPECIAL, BOS = range(3)  # roles of tokens
COLUMNS = {"text": ("text",), "chat": ("messages",), "tokens": ("tokens", "input_ids")}
TEXTS_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of a work unit, end to end.

    Attributes:
        tokens: Token ids [n], int32.
        offsets: Sample s is `[offsets[s]:offsets[s + 1]]` of the rest [S + 1], int64.
        roles: REAL, SPECIAL or BOS of each token [n], uint8.
        ids: Id of each sample.
        overlong: Number of records that were longer than allowed.
        empty: Number of samples without a token.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    roles: np.ndarray
    ids: list[str]
    overlong: int
    empty: int


class PromptSource(Protocol):
    """Where prompts come from.

    Attributes:
        identity: What decides the prompts beside the settings: files, tokenizer, template.
        units: The work units.
    """

    identity: dict[str, Any]
    units: list[Unit]

    def read(self, unit: Unit) -> Prompts:
        """Returns the prompts of a unit."""
        ...


def open_source(
    path: str, cfg: ExtractionConfig, *, model: Path | None, vocab_size: int
) -> PromptSource:
    """Returns the prompts in `path`.

    Args:
        path: The input.
        cfg: The settings.
        model: Directory of the checkpoint, for its tokenizer; None: a run of our own.
        vocab_size: Number of ids the model knows.

    Raises:
        ConfigError: The format does not go with the model.
        DataError: The input cannot be read.
        CheckpointError: The tokenizer cannot be read.
    """
    if cfg.format == "measurements":
        if model is not None:
            raise ConfigError(f"format='measurements' needs a run of this package; {model} is none")
        return MeasurementPrompts(Path(path), cfg)
    if model is None and cfg.format != "tokens":
        raise ConfigError(
            f"format={cfg.format!r} needs a language model; a run takes measurements or tokens"
        )
    return TextPrompts(path, cfg, model=model, vocab_size=vocab_size)


# --- text, chats, ids -------------------------------------------------------------------------


class Tokenizer:
    """A checkpoint's own tokenizer.

    Attributes:
        identity: Hash of what decides the token ids.
        special: Ids of special tokens.
        bos: Id of the token that begins a sequence, or None.
    """

    def __init__(self, directory: Path, *, chat: bool):
        import tokenizers

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
        self.special = np.array([i for i, token in added.items() if token.special], np.int64)
        bos = _content(settings.get("bos_token"))
        self.bos = None if bos is None else self._tokenizer.token_to_id(bos)
        self.template = ChatTemplate(directory, settings) if chat else None
        parts = content + (self.template.source.encode() if self.template else b"")
        self.identity = hashlib.sha256(parts).hexdigest()[:32]

    def encode(self, texts: list[str], *, add_special: bool) -> list[list[int]]:
        """Returns the ids of each text."""
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special)
        return [one.ids for one in encoded]


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
        found = (
            path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
        )
        if isinstance(found, list):  # several, by name
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
        if not isinstance(found, str):
            raise DataError(
                f"{directory} has no chat template; use an instruct model or --format text"
            )
        self.source = found

        def tojson(value: Any, indent: int | None = None) -> str:
            return json.dumps(value, ensure_ascii=False, indent=indent)

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        self._variables = {
            key: _content(settings.get(key)) or ""
            for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        self._error = jinja2.TemplateError
        try:
            self._template = environment.from_string(found)
        except jinja2.TemplateError as error:
            raise DataError(f"{directory}: its chat template cannot be used: {error}") from None

    def render(self, record: dict[str, Any], sample: str) -> str:
        """Returns the text of the chat in a record's `messages`, with its `tools` if it has any."""
        try:
            return self._template.render(
                messages=record["messages"],
                tools=record.get("tools"),
                add_generation_prompt=False,
                **self._variables,
            )
        except (self._error, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{sample}: the chat template refuses these messages: {error}"
            ) from None


class TextPrompts:
    """Prompts of records that hold text, a chat, or token ids."""

    def __init__(self, path: str, cfg: ExtractionConfig, *, model: Path | None, vocab_size: int):
        self._cfg, self._vocab_size = cfg, vocab_size
        columns = (*COLUMNS[cfg.format], "id", *(("tools",) if cfg.format == "chat" else ()))
        self._records = Records(
            path, columns=columns, unit_bytes=max(int(cfg.unit_mb * 1e6), 1), limit=cfg.limit
        )
        self.units = self._records.units
        self._tokenizer = None
        if cfg.format != "tokens" or (model is not None and (model / "tokenizer.json").is_file()):
            assert model is not None  # open_source saw to it
            self._tokenizer = Tokenizer(model, chat=cfg.format == "chat")
        self.identity = {
            "files": self._records.files,
            "tokenizer": self._tokenizer.identity if self._tokenizer else None,
        }

    def read(self, unit: Unit) -> Prompts:
        """Returns the prompts of a unit.

        Raises:
            DataError: A record is not what the format says, or too long and that is an error.
        """
        ids: list[str] = []
        parts: list[np.ndarray] = []
        overlong = 0
        for sample, tokens in self._encoded(unit):
            if len(tokens) > self._cfg.max_length:
                overlong += 1
                pieces = _cut(tokens, self._cfg, sample)
            else:
                pieces = [tokens]
            parts += pieces
            ids += [sample] if len(pieces) == 1 else [f"{sample}/{n}" for n in range(len(pieces))]
        return _prompts(parts, ids, overlong, self._tokenizer)

    def _encoded(self, unit: Unit) -> Iterator[tuple[str, np.ndarray]]:
        if self._cfg.format == "tokens":
            for sample, record in self._records.read(unit):
                yield sample, self._checked(record, sample)
            return
        batch: list[tuple[str, str]] = []
        for sample, record in self._records.read(unit):
            batch.append((sample, self._text(record, sample)))
            if len(batch) == TEXTS_AT_ONCE:
                yield from self._tokenized(batch)
                batch = []
        yield from self._tokenized(batch)

    def _tokenized(self, batch: list[tuple[str, str]]) -> Iterator[tuple[str, np.ndarray]]:
        assert self._tokenizer is not None
        # A chat template writes the special tokens itself.
        add_special = self._cfg.format == "text"
        encoded = self._tokenizer.encode([text for _, text in batch], add_special=add_special)
        for (sample, _), ids in zip(batch, encoded, strict=True):
            tokens = np.array(ids, np.int32)
            if len(tokens) and tokens.max() >= self._vocab_size:
                raise DataError(
                    f"{sample}: token id {tokens.max()} is not below the model's vocab_size="
                    f"{self._vocab_size}; the tokenizer is not this model's"
                )
            yield sample, tokens

    def _text(self, record: dict[str, Any], sample: str) -> str:
        if self._cfg.format == "chat":
            messages = record.get("messages")
            if not isinstance(messages, list):
                raise DataError(f"{sample}: it has no list `messages`; its keys are {list(record)}")
            # A template takes what is missing for empty, and says nothing.
            if not all(isinstance(m, dict) and m.get("role") for m in messages):
                raise DataError(f"{sample}: each of its `messages` must be an object with a `role`")
            assert self._tokenizer is not None
            assert self._tokenizer.template is not None
            return self._tokenizer.template.render(record, sample)
        if not isinstance(record.get("text"), str):
            raise DataError(f"{sample}: it has no string `text`; its keys are {list(record)}")
        return record["text"]

    def _checked(self, record: dict[str, Any], sample: str) -> np.ndarray:
        ids = record.get("tokens", record.get("input_ids"))
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise DataError(f"{sample}: it has no list of whole numbers `tokens` or `input_ids`")
        if wrong := [i for i in ids if not 0 <= i < self._vocab_size]:
            raise DataError(f"{sample}: id {wrong[0]} is not in 0..{self._vocab_size - 1}")
        return np.array(ids, np.int32)


def _cut(tokens: np.ndarray, cfg: ExtractionConfig, sample: str) -> list[np.ndarray]:
    """Returns what becomes of a prompt that is too long."""
    most = cfg.max_length
    if cfg.overlong == "truncate-left":
        return [tokens[-most:]]
    if cfg.overlong == "truncate-right":
        return [tokens[:most]]
    if cfg.overlong == "split":
        return [tokens[start : start + most] for start in range(0, len(tokens), most)]
    raise DataError(
        f"{sample} has {len(tokens)} tokens, more than max_length={most}; raise it, or choose "
        "another --overlong than `error`: truncate-left, truncate-right, split"
    )


def _prompts(
    parts: Sequence[np.ndarray], ids: list[str], overlong: int, tokenizer: Tokenizer | None
) -> Prompts:
    lengths = np.array([len(part) for part in parts], np.int64)
    tokens = np.concatenate([np.zeros(0, np.int32), *parts])
    roles = np.full(len(tokens), REAL, np.uint8)
    if tokenizer is not None:
        roles[np.isin(tokens, tokenizer.special)] = SPECIAL
        if tokenizer.bos is not None:
            roles[tokens == tokenizer.bos] = BOS
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Prompts(tokens, offsets, roles, ids, overlong, int((lengths == 0).sum()))


# --- measurements -----------------------------------------------------------------------------


class MeasurementPrompts:
    """The contexts that one epoch of training on a directory of probe rows would draw."""

    def __init__(self, directory: Path, cfg: ExtractionConfig):
        windows.check_length(cfg.max_length)
        self._length = cfg.max_length
        self._splits = [(split, ProbeRows(directory, split)) for split in SPLITS]
        self._ends = [
            np.cumsum(windows.visits_per_row(rows.n_measurements)) for _, rows in self._splits
        ]
        self.units = []
        left = cfg.limit
        # A window is counted as if it took all its tokens, of 2 bytes each.
        per_unit = max(int(cfg.unit_mb * 1e6 / (2 * cfg.max_length)), 1)
        for index, ends in enumerate(self._ends):
            total = int(ends[-1]) if len(ends) else 0
            stop = total if left is None else min(total, left)
            left = None if left is None else left - stop
            for start in range(0, stop, per_unit):
                self.units.append(Unit(index, start, min(start + per_unit, stop)))
        if not self.units:
            raise DataError(f"{directory} holds no measurements")
        metadata = read_metadata(directory)
        self.identity = {"data": hashlib.sha256(json.dumps(metadata).encode()).hexdigest()[:32]}

    def read(self, unit: Unit) -> Prompts:
        """Returns the contexts of a unit, in the order of rows."""
        split, rows = self._splits[unit.file]
        visit = np.arange(unit.start, unit.stop)
        row = np.searchsorted(self._ends[unit.file], visit, side="right")
        first = np.concatenate([[0], self._ends[unit.file]])[row]
        visits = windows.Visits(np.zeros_like(visit), row, visit - first)
        tokens, offsets = windows.encode_visits(rows, visits, seed=0, length=self._length)
        ids = [f"{split}/{r}/{k}" for r, k in zip(visits.row, visits.k, strict=True)]
        return Prompts(
            tokens=tokens.astype(np.int32),
            offsets=offsets,
            roles=np.full(len(tokens), REAL, np.uint8),
            ids=ids,
            overlong=0,
            empty=0,
        )
